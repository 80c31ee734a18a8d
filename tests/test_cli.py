"""The command line: data on stdout, words on stderr, exit codes, no secrets, no traceback, no journal made by looking."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from decimal import Decimal

import pytest
from pydantic import BaseModel

import agentflow
from agentflow import Waiting, generate_content, human_task, ledger, parallel, runs, step, tasks, workflow
from agentflow.cli.app import run
from agentflow.testing import FakeModel
from tests.programs import ROOT, environment, run_program

RUN_FIELDS = {"id", "workflow", "status", "started_at", "completed_at", "cost", "saved", "waiting_on", "error"}
STEP_FIELDS = {"name", "id", "kind", "status", "attempts", "duration", "model", "cost", "output", "error"}
TASK_FIELDS = {"id", "run_id", "type", "assign_to", "status", "data", "title", "schema", "decision", "created_at"}


class Form(BaseModel):
    amount: int


@workflow("ask-boss")
async def ask_boss(ctx, name: str) -> str:
    text = await generate_content(f"About {name}", model="openai:priced", name="draft")
    decision = await human_task("approve", assign_to="boss", title=f"Send {name}?", data={"draft": text})
    return await step("send", lambda: f"sent {name}") if decision else "not sent"


@workflow("fill-in")
async def fill_in(ctx) -> int:
    return (await human_task("input", schema=Form, data="How much?")).amount


@workflow("breaks")
async def breaks(ctx, secret: str = "") -> None:
    def fail() -> None:
        raise RuntimeError(f"no luck {secret}".strip())

    await step("try", fail, retry={"max_attempts": 2, "initial_delay": 0})


@pytest.fixture
def cli(capsys):
    """Runs a command; gives its code, stdout and stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def waiting() -> str:
    """A run that waits for the boss; its task's id."""
    ledger.set_price("priced", 1, 10)
    with FakeModel(["a draft"]), pytest.raises(Waiting) as caught:
        ask_boss.run_sync("offer")
    return caught.value.waiting_on[0]["id"]


def fails() -> None:
    with pytest.raises(RuntimeError):
        breaks.run_sync()


def test_runs_list_as_json_is_an_array_of_the_documented_objects(cli, waiting):
    fails()
    code, out, err = cli("runs", "list", "--json")
    newest, older = json.loads(out)
    assert code == 0 and err == ""
    assert set(newest) == RUN_FIELDS
    assert (newest["workflow"], newest["status"], newest["error"]) == ("breaks", "failed", "RuntimeError: no luck")
    assert older["status"] == "waiting" and older["cost"] > 0 and older["saved"] == 0
    assert older["waiting_on"][0]["id"] == waiting and older["completed_at"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", older["started_at"])


def test_runs_list_filters_and_names_what_it_knows_when_a_status_is_wrong(cli, waiting):
    fails()
    assert [r["workflow"] for r in json.loads(cli("runs", "list", "--status", "waiting", "--json")[1])] == ["ask-boss"]
    assert [r["workflow"] for r in json.loads(cli("runs", "list", "--workflow", "breaks", "--json")[1])] == ["breaks"]
    assert len(json.loads(cli("runs", "list", "--limit", "1", "--json")[1])) == 1
    code, out, err = cli("runs", "list", "--status", "wating")
    assert (code, out) == (2, "") and "running, waiting, completed" in err


def test_runs_show_has_each_step_with_status_attempts_duration_model_and_cost(cli, waiting):
    fails()
    run_id = tasks.get(waiting).run_id
    shown = json.loads(cli("runs", "show", run_id, "--json")[1])
    assert RUN_FIELDS | {"parent", "forked_at", "input", "output", "error", "steps"} == set(shown)
    assert shown["input"] == "offer"
    draft = shown["steps"][0]
    assert STEP_FIELDS < set(draft)
    assert draft["name"] == "draft" and draft["model"] == "priced" and draft["cost"] == shown["cost"] > 0
    assert draft["usage"]["input_tokens"] > 0
    code, out, _ = cli("runs", "show", "breaks")
    assert code == 0 and re.search(r"^try +failed +2 ", out, re.MULTILINE) and "RuntimeError: no luck" in out
    code, out, _ = cli("runs", "show", run_id)
    assert re.search(r"^draft +completed +1 .*\$0\.\d{4} +priced", out, re.MULTILINE)
    assert f"agentflow tasks approve {waiting}" in out


def test_a_task_is_listed_shown_approved_and_the_run_goes_on(cli, waiting):
    code, out, _ = cli("tasks", "list", "--json")
    (task,) = json.loads(out)
    assert code == 0 and set(task) >= TASK_FIELDS
    assert (task["id"], task["assign_to"], task["status"]) == (waiting, "boss", "open")
    assert task["data"] == {"draft": "a draft"} and task["title"] == "Send offer?"
    code, out, _ = cli("tasks", "show", waiting)
    assert code == 0 and "Send offer?" in out and '"draft": "a draft"' in out
    code, out, err = cli("tasks", "approve", waiting, "--by", "kim", "--comment", "fine")
    assert (code, out) == (0, f"{waiting} approved\n") and "goes on when its program runs again" in err
    assert cli("tasks", "list") == (0, "", "No open tasks.\n")
    (task,) = json.loads(cli("tasks", "list", "--all", "--json")[1])
    assert task["decision"]["by"] == "kim" and task["decision"]["comment"] == "fine"
    assert ask_boss.run_sync("offer") == "sent offer"


def test_a_rejection_with_json_prints_the_task(cli, waiting):
    code, out, _ = cli("tasks", "reject", waiting, "--json", "--comment", "no")
    assert code == 0 and json.loads(out)["status"] == "rejected"
    assert ask_boss.run_sync("offer") == "not sent"


def test_the_second_decision_is_refused_with_who_decided(cli, waiting):
    cli("tasks", "approve", waiting, "--by", "kim")
    code, out, err = cli("tasks", "reject", waiting)
    assert (code, out) == (1, "") and "was approved already, by kim" in err and "Traceback" not in err


def test_an_answer_is_checked_where_it_is_given(cli):
    with pytest.raises(Waiting) as caught:
        fill_in.run_sync()
    task = caught.value.waiting_on[0]["id"]
    for wrong in ('{"amount": "much"}', "{}"):
        code, _, err = cli("tasks", "answer", task, wrong)
        assert code == 2 and "amount" in err
    code, _, err = cli("tasks", "answer", task, "{amount}")
    assert code == 2 and "not JSON" in err
    assert cli("tasks", "answer", task, '{"amount": 30}')[0] == 0
    assert fill_in.run_sync() == 30


def test_the_command_shown_for_a_form_answers_it_and_times_are_texts(cli):
    @workflow("form-and-nap")
    async def flow(ctx) -> None:
        await parallel([human_task("input", schema=Form, data=1, timeout="2d"), ctx.sleep("3d")])

    with pytest.raises(Waiting):
        flow.run_sync()
    (task,) = json.loads(cli("tasks", "list", "--json")[1])
    run_id = task["run_id"]
    out = cli("runs", "show", run_id)[1]
    assert f"agentflow tasks answer {task['id']} '{{\"amount\": ...}}'" in out and "tasks approve" not in out
    (listed,) = json.loads(cli("runs", "list", "--json")[1])
    shown = json.loads(cli("runs", "show", run_id, "--json")[1])
    assert listed["waiting_on"] == shown["waiting_on"]
    form, nap = sorted(shown["waiting_on"], key=lambda wait: wait["kind"], reverse=True)
    assert form["deadline"] == task["deadline"] and "tasks answer" in form["command"]
    assert datetime.fromisoformat(nap["until"]).tzinfo is not None


def test_a_refused_answer_is_shown_with_who_gave_it_and_why(cli, tmp_path):
    source = """
        from typing import Annotated
        from pydantic import AfterValidator

        def odd(value):
            assert value % 2, "must be odd"
            return value

        @workflow("odd")
        async def flow(ctx):
            return await human_task("input", schema=Annotated[int, AfterValidator(odd)], data=1)

        try:
            print(flow.run_sync())
        except Waiting:
            print("waits")
    """
    assert run_program(source, tmp_path).out == "waits\n"
    (task,) = json.loads(cli("tasks", "list", "--json")[1])
    assert cli("tasks", "answer", task["id"], "2", "--by", "kim")[0] == 0
    assert run_program(source, tmp_path).out == "waits\n"
    (task,) = json.loads(cli("tasks", "list", "--json")[1])
    assert [(each["by"], each["data"]) for each in task["refused"]] == [("kim", 2)]
    out = cli("tasks", "show", task["id"])[1]
    assert "kim" in out and "must be odd" in out
    assert cli("tasks", "answer", task["id"], "3")[0] == 0
    assert run_program(source, tmp_path).out == "3\n"


def test_what_is_not_there_has_exit_code_4_and_one_line(cli, waiting):
    for command in (("runs", "show", "nope"), ("tasks", "show", "t-nope"), ("tasks", "approve", "t-nope")):
        code, out, err = cli(*command)
        assert (code, out) == (4, "") and len(err.splitlines()) == 1 and err.startswith("agentflow: no ")


def test_wrong_usage_has_exit_code_2(cli):
    for command in (("bogus",), ("runs", "list", "--bogus"), ("tasks", "approve"), ("runs", "list", "--limit", "0")):
        code, out, err = cli(*command)
        assert code == 2 and err, command


@pytest.mark.parametrize(("error", "code"), [
    (agentflow.Waiting("it waits", "r", []), 3), (agentflow.BudgetExceeded("too much"), 5),
    (agentflow.JournalBusy("busy"), 1), (agentflow.RunNotFound("none"), 4), (agentflow.UsageError("wrong"), 2),
])  # fmt: skip
def test_each_error_is_one_line_on_stderr_with_its_exit_code(cli, waiting, monkeypatch, error, code):
    def fail(**_):
        raise error

    monkeypatch.setattr(runs, "list", fail)
    assert cli("runs", "list") == (code, "", f"agentflow: {error}\n")


def test_looking_where_there_is_no_journal_makes_none(cli, journal_path):
    code, out, err = cli("runs", "list", "--json")
    assert (code, json.loads(out)) == (0, []) and str(journal_path) in err
    assert cli("tasks", "list")[0] == 0
    assert cli("runs", "show", "x")[0] == 4
    assert cli("tasks", "approve", "t-x")[0] == 4
    assert not journal_path.exists()


def test_secrets_and_terminal_codes_are_not_shown(cli, monkeypatch):
    key = "sk-proj-abcdefghij0123456789abcdefghij"
    with pytest.raises(RuntimeError):
        breaks.run_sync(key)
    with FakeModel(["\x1b[2J\x1b]0;owned\x07a draft"]), pytest.raises(Waiting) as caught:
        ask_boss.run_sync("\x1b[31mred")
    task = caught.value.waiting_on[0]["id"]
    for command in (("runs", "list"), ("runs", "show", "breaks"), ("tasks", "list"), ("tasks", "show", task)):
        for form in ((), ("--json",)):
            code, out, err = cli(*command, *form)
            assert code == 0, err
            assert key not in out + err and "\x1b" not in out + err and "\x07" not in out + err
    assert "[redacted:openai-key]" in cli("runs", "show", "breaks")[1]


def test_data_of_a_class_that_is_not_loaded_is_listed_shown_and_approved(cli, tmp_path, monkeypatch):
    # No module of the suite has a class of this name: that one would be taken for it.
    # No module of the suite has a class of this name: that one would be taken for it.
    source = """
        from decimal import Decimal
        from pydantic import BaseModel

        class Unloaded(BaseModel):
            id: str
            total: Decimal

        @workflow("typed")
        async def typed(ctx, order: Unloaded) -> Unloaded:
            await step("look", lambda: order)
            await human_task("approve", data=order)
            return order

        try:
            print(typed.run_sync(Unloaded(id="A-1", total="3.50")))
        except Waiting:
            print("waits")
    """
    assert run_program(source, tmp_path).out == "waits\n"
    (task,) = json.loads(cli("tasks", "list", "--json")[1])
    assert task["data"] == {"id": "A-1", "total": "3.50"}
    (found,) = runs.list()
    assert found.input == {"id": "A-1", "total": Decimal("3.50")}
    assert json.loads(cli("runs", "show", found.id, "--json")[1])["steps"][0]["output"]["id"] == "A-1"
    assert cli("tasks", "approve", task["id"])[0] == 0
    assert "A-1" in run_program(source, tmp_path).out
    with pytest.raises(agentflow.NotRecordable):
        runs.get(found.id).result()  # a result keeps its type or says why not


def test_the_cost_of_a_run_counts_what_a_killed_execution_paid(cli, tmp_path, monkeypatch):
    source = """
        from agentflow.testing import FakeModel
        from agentflow import ledger

        ledger.set_price("priced", 1, 10)

        @workflow("killed")
        async def killed(ctx) -> str:
            text = await generate_content("Hello", model="openai:priced")
            await step("die", lambda: die() if "die" in sys.argv else None)
            return text

        with FakeModel({"Hello": "Hi"}, all_used=False):
            killed.run_sync()
    """
    run_program(source, tmp_path, "die", expect_kill=True)
    (found,) = json.loads(cli("runs", "list", "--json")[1])
    assert found["status"] == "interrupted" and found["cost"] > 0
    run_program(source, tmp_path)
    (after,) = json.loads(cli("runs", "list", "--json")[1])
    assert after["status"] == "completed" and after["cost"] == found["cost"] == after["saved"]


# -- as a program ----------------------------------------------------------------------------------


def program(*args: str, folder, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentflow", *args],
        cwd=folder, env=environment(folder, env), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_version_and_help_are_plain_text(tmp_path):
    done = program("--version", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"agentflow {agentflow.__version__}\n")
    done = program("--help", folder=tmp_path, COLUMNS="80")
    assert all(word in done.stdout for word in ("demo", "runs", "tasks", "--install-completion"))
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


def test_importing_agentflow_does_not_load_the_command_line():
    source = "import sys, agentflow, agentflow.cli; sys.exit('typer' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, timeout=60).returncode == 0


def test_tables_are_coloured_in_a_terminal_only_and_never_with_no_color(waiting, journal_path):
    pty = pytest.importorskip("pty")

    def in_terminal(**env: str) -> str:
        mine, theirs = pty.openpty()
        base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        with subprocess.Popen(
            [sys.executable, "-m", "agentflow", "tasks", "list"], cwd=ROOT, stdout=theirs, stderr=theirs,
            env=base | {"AGENTFLOW_PATH": str(journal_path), "TERM": "xterm-256color", "COLUMNS": "80", **env},
        ) as child:  # fmt: skip
            os.close(theirs)
            text = b""
            while True:
                try:
                    part = os.read(mine, 65536)
                except OSError:  # Linux says so when the other side is closed
                    break
                if not part:
                    break
                text += part
            child.wait(30)
        os.close(mine)
        return text.decode()

    coloured, plain = in_terminal(), in_terminal(NO_COLOR="1")
    assert "\x1b[" in coloured and waiting in coloured
    assert "\x1b" not in plain and waiting in plain
    assert max(map(len, plain.splitlines())) <= 80


def test_the_journal_is_found_from_a_directory_inside_the_project(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    env = environment(tmp_path)
    del env["AGENTFLOW_PATH"]
    (tmp_path / "deep" / "app.py").write_text(
        "from agentflow import *\n\n@workflow\nasync def w(ctx): return 1\n\nw.run_sync()\n"
    )
    subprocess.run([sys.executable, "deep/app.py"], cwd=tmp_path, env=env, check=True, timeout=60, capture_output=True)
    listed = subprocess.run(
        [sys.executable, "-m", "agentflow", "runs", "list", "--json"],
        cwd=tmp_path / "deep" / "er", env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert [each["workflow"] for each in json.loads(listed.stdout)] == ["w"], listed.stderr


def test_a_closed_pipe_is_no_traceback(waiting, journal_path):
    done = subprocess.run(
        f"{sys.executable} -m agentflow runs list --json | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"AGENTFLOW_PATH": str(journal_path)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
