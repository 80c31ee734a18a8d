"""``agentflow runs plan``, and ``agentflow plan``: what a run would do, told from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentflow import ledger, runs
from agentflow.cli.app import run as command
from agentflow.testing import FakeModel

SOURCE = """
import dataclasses
import agentflow
from agentflow import Context, generate_content, load_prompt, step, workflow
from agentflow.sync import workflow as plain_workflow, step as plain_step

print("imported")

@dataclasses.dataclass
class Order:
    id: str
    count: int = 1

@workflow("cli-triage")
async def triage(ctx: Context, message: str) -> str:
    print("planning", message)
    return await generate_content(load_prompt("triage", message=message), model="openai:planned")

@workflow("cli-order")
async def order(ctx: Context, order: Order) -> int:
    return await step("count", lambda order: order.count, order)

@workflow("cli-two")
async def two(ctx: Context, a: int, b: int = 2) -> int:
    return await step("sum", lambda a, b: a + b, a, b)

@plain_workflow("cli-plain")
def plain(ctx: Context) -> int:
    return plain_step("one", lambda: 1)

other = 3
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes ``app.py`` and a prompt; gives the module's name, which is new in each test."""
    name = f"planned_app_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "triage.md").write_text("Who answers?\n\n{{message}}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "main.py"), raising=False)
    monkeypatch.setattr(ledger, "_PRICES", {})
    ledger.set_price("planned", 1000, 1000)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def run_once(app: str, flow: str, *args: Any) -> Any:
    module = __import__(app)
    with FakeModel(["Fine."] if flow == "triage" else []):
        return getattr(module, flow).start(*args) if flow == "plain" else getattr(module, flow).run_sync(*args)


@pytest.mark.parametrize("words", [("runs", "plan"), ("plan",)])
def test_a_changed_prompt_is_shown_with_its_cost_and_nothing_is_written(app: str, cli: Any, words: Any) -> None:
    run_once(app, "triage", "Hello")
    Path("prompts/triage.md").write_text("Who answers this?\n\n{{message}}")
    before = [(run.id, run.status, len(run.steps)) for run in runs.list()]
    code, out, err = cli(*words, f"{app}:triage", "--input", '"Hello"')
    assert code == 0
    assert out.splitlines()[0].startswith("cli-triage-") and "  changed  triage · its request changed" in out
    assert "- Who answers?" in out and "+ Who answers this?" in out and "costs about $" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "planning Hello" in err and "planning" not in out  # what the program prints is not the data
    assert [(run.id, run.status, len(run.steps)) for run in runs.list()] == before


def test_json_has_steps_named_as_in_python(app: str, cli: Any) -> None:
    code, out, err = cli("runs", "plan", f"{app}.py:triage", "--input", '"Hello"', "--json")
    found = json.loads(out)
    assert code == 0 and "imported" in err
    (only,) = found.pop("steps")
    assert found == {"id": found["id"], "workflow": "cli-triage", "cost": only["cost"]}
    assert (only["name"], only["state"], only["diff"]) == ("triage", "unknown", "") and only["cost"] > 0
    assert "not recorded yet" in only["reason"]


def test_a_run_is_planned_with_the_input_it_has(app: str, cli: Any) -> None:
    module = __import__(app)
    run_once(app, "order", module.Order("o1", 2))
    (run,) = runs.list()
    code, out, _ = cli("plan", f"{app}:order", "--run", run.id)
    assert (code, out.splitlines()) == (0, [f"{run.id} · plan", "  reused   count"])
    code, out, _ = cli("plan", f"{app}:order", "--input", '{"id": "o1", "count": 2}')
    assert (code, out.splitlines()) == (0, [f"{run.id} · plan", "  reused   count"])
    code, out, _ = cli("plan", f"{app}:order", "--input", '{"order": {"id": "o1", "count": 2}}')  # by its name
    assert (code, out.splitlines()) == (0, [f"{run.id} · plan", "  reused   count"])
    module.order.options(run_id="mine").run_sync(module.Order("o1", 2))
    assert cli("plan", f"{app}:order", "--run", "mine")[1].splitlines() == ["mine · plan", "  reused   count"]
    code, _, err = cli("plan", f"{app}:triage", "--run", run.id)
    assert code == 4 and "cli-order" in err
    assert cli("plan", f"{app}:order", "--run", "nowhere")[0] == 4
    assert cli("plan", f"{app}:order", "--run", run.id, "--input", "1")[0] == 2


def test_arguments_are_given_by_name_and_checked(app: str, cli: Any) -> None:
    code, out, _ = cli("plan", f"{app}:two", "--input", '{"a": 1}')
    assert code == 0 and "unknown  sum" in out
    assert cli("plan", f"{app}:plain")[:2][0] == 0
    for flow, text, says in (
        ("two", "[1, 2]", "an object with a, b"),
        ("two", '{"a": "x"}', "argument a does not fit int"),
        ("two", '{"c": 1}', "It takes"),
        ("order", "{}", "order"),
        ("plain", "1", "takes no input"),
        ("triage", "Hello", "is no JSON"),
    ):
        code, out, err = cli("plan", f"{app}:{flow}", "--input", text)
        assert (code, out) == (2, ""), err
        assert says in err


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such_module:flow", "no module 'no_such_module'"),
        ("no_such_file.py:flow", "no such file"),
        ("APP:nothing", "is nothing, and no workflow. APP holds: APP:order, APP:plain, APP:triage, APP:two"),
        ("APP:other", "is a int, and no workflow"),
        ("APP", "which of its workflows? APP holds: APP:order"),
        (":triage", "write MODULE:ATTRIBUTE"),
        ("APP:", "write MODULE:ATTRIBUTE"),
    ],
)
def test_a_workflow_that_cannot_be_found_is_an_error_of_usage(app: str, cli: Any, target: str, says: str) -> None:
    code, out, err = cli("plan", target.replace("APP", app))
    assert (code, out) == (2, "")
    assert says.replace("APP", app) in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("flow.run_sync(1)", "only to be looked at"),
        ("import agentflow.sync; agentflow.sync.step('s', lambda: open('ran', 'w').close())", "only to be looked at"),
        ("import asyncio; asyncio.run(generate_content('Hi', model='openai:m'))", "only to be looked at"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
        ("key = 'sk-abcdefghijklmnopqrstuvwxyz0123456789'; raise ValueError(key)", "[redacted"),
    ],
)
def test_a_module_that_runs_or_fails_when_it_is_imported_runs_and_pays_nothing(
    app: str, cli: Any, line: str, says: str
) -> None:
    Path(f"{app}.py").write_text(
        "from agentflow import *\n\n@workflow('cli-eager')\nasync def flow(ctx, n: int):\n"
        f"    return await step('s', open, 'ran', 'w')\n\n{line}\n"
    )
    with FakeModel([]) as model:
        code, out, err = cli("plan", f"{app}:flow", "--input", "1")
    assert (code, out) == (2, "") and says in err
    assert "sk-abc" not in err and "Traceback" not in err
    assert model.calls == [] and runs.list() == [] and not Path("ran").exists()


def test_after_a_plan_runs_go_on_as_before(app: str, cli: Any) -> None:
    assert cli("plan", f"{app}:two", "--input", '{"a": 1}')[0] == 0
    assert run_once(app, "two", 1) == 3


def test_the_only_workflow_of_a_module_needs_no_name_and_is_found_from_its_directory(app: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "single.py").write_text(
        "from agentflow import *\n\n@workflow('cli-single')\nasync def flow(ctx):\n    return await step('s', int)\n"
        "\nif __name__ == '__main__':\n    flow.run_sync()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "agentflow", "plan", "sub/single.py"],
        cwd=tmp_path,
        env=os.environ | {"AGENTFLOW_PATH": str(tmp_path / ".agentflow"), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "unknown  s · not recorded yet" in done.stdout


def test_a_run_is_planned_with_its_code_named_as_for_the_other_commands(app: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", f"{app}:plain", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    sys.modules[app].plain.run()
    (run,) = runs.list()
    assert run.id == first["id"]
    assert command(["runs", "plan", run.id, "--module", f"{app}:plain", "--json"]) == 0
    assert [step["state"] for step in json.loads(capsys.readouterr().out)["steps"]] == ["reused"]
    assert command(["runs", "plan", "nowhere", "-m", f"{app}:plain"]) == 4
    assert command(["runs", "plan", run.id, "-m", f"{app}:plain", "--run", run.id]) == 2
