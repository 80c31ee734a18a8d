"""The user's code is found by each spelling that people write, from every command that takes one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentflow import loading, runs
from agentflow.errors import UsageError
from tests.programs import environment, notes, run_program, write_program

APP = """
    import agentflow.sync

    print("imported")

    @workflow("letter")
    async def letter(ctx, name: str):
        await step("first", note, "first")
        await step("kill", lambda: die() if os.environ.get("KILL") else None)
        print("a word of the user's code")
        return name

    @agentflow.sync.workflow("plain")
    def plain(ctx):
        return 1

    class shelf:
        both = {"a": letter, "b": plain}

    flows = [letter, plain]
    mixed = [letter, 3]
    none = []
    number = 7

    if __name__ == "__main__":
        letter.run_sync("Ada")
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The name of a module in the working directory, which is new in each test."""
    name = f"loaded_{tmp_path.name.replace('-', '_')}"
    write_program(APP, tmp_path, f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    for module in [each for each in sys.modules if each.split(".")[0] in (name, "pkg")]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("APP", ["letter", "plain"]),
        ("APP.py", ["letter", "plain"]),
        ("./APP.py", ["letter", "plain"]),
        ("APP:letter", ["letter"]),
        ("APP.py:letter", ["letter"]),
        ("APP:flows", ["letter", "plain"]),
        ("APP.py:shelf.both", ["letter", "plain"]),
    ],
)
def test_each_spelling_gives_its_workflows_and_says_nothing_on_stdout(app, capsys, target, names):
    found = loading.load([target.replace("APP", app)])
    assert sorted(found) == names and all(flow.name == name for name, flow in found.items())
    out, err = capsys.readouterr()
    assert out == "" and "imported" in err
    if len(names) == 1:
        assert loading.workflow(target.replace("APP", app)) is found["letter"]
    else:
        with pytest.raises(UsageError, match="which of its workflows"):
            loading.workflow(target.replace("APP", app))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("", "write MODULE:ATTRIBUTE"),
        (":letter", "write MODULE:ATTRIBUTE"),
        ("APP:", "write MODULE:ATTRIBUTE"),
        ("nowhere_at_all", "no module 'nowhere_at_all'"),
        ("APP.nowhere", "no module 'APP.nowhere'"),
        ("nowhere_at_all.py:letter", "no such file"),
        ("folder/APP", "a file that ends in .py"),
        ("APP:nothing", "is nothing, and no workflow. APP holds: APP:letter, APP:plain."),
        ("APP.py:nothing", "APP.py holds: APP.py:letter, APP.py:plain."),
        ("APP:number", "is a int, and no workflow"),
        ("APP:none", "is a list, and no workflow"),
        ("APP:mixed", "holds 3, which is no workflow"),
        ("json", "json holds no workflow"),
    ],
)
def test_a_target_that_is_no_workflow_is_an_error_of_usage_for_looking_and_for_running(app, target, says):
    for find in (loading.workflow, lambda one: loading.load([one])):
        with pytest.raises(UsageError) as error:
            find(target.replace("APP", app))
        assert says.replace("APP", app) in str(error.value)


def test_a_file_in_a_package_is_imported_under_its_full_name(app, tmp_path):
    (tmp_path / "pkg" / "inner").mkdir(parents=True)
    for folder in ("pkg", "pkg/inner"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "pkg" / "names.py").write_text("NAME = 'in-package'\n")
    (tmp_path / "pkg" / "inner" / "flows.py").write_text(
        "from agentflow import workflow\nfrom ..names import NAME\n\n@workflow(NAME)\nasync def flow(ctx): return 1\n"
    )
    found = loading.load(["pkg/inner/flows.py:flow"])
    assert found["in-package"].fn.__module__ == "pkg.inner.flows"
    assert loading.load(["pkg.inner.flows"]) == found


def test_a_file_that_another_module_hides_is_refused(app, tmp_path):
    (tmp_path / "json.py").write_text("from agentflow import *\n")
    with pytest.raises(UsageError, match="Rename one of them"):
        loading.load(["json.py"])


def test_two_different_workflows_of_one_name_are_refused(app, tmp_path):
    (tmp_path / f"other_{app}.py").write_text(f"from {app} import letter\n")
    assert list(loading.load([f"{app}:letter", f"other_{app}:letter"])) == ["letter"]
    write_program("@workflow('letter')\nasync def flow(ctx): return 2\n", tmp_path, f"third_{app}.py")
    with pytest.raises(UsageError, match="two workflows named 'letter'"):
        loading.load([f"{app}:letter", f"third_{app}.py"])


def test_an_import_that_starts_a_run_is_refused_by_looking_only(app, tmp_path):
    source = "@workflow('eager')\nasync def flow(ctx): return await step('s', note, 'ran')\n\nflow.run_sync()\n"
    write_program(source, tmp_path, f"eager_{app}.py")
    with pytest.raises(UsageError, match="only to be looked at"):
        loading.workflow(f"eager_{app}.py")
    assert notes(tmp_path) == [] and runs.list() == []
    assert list(loading.load([f"eager_{app}.py:flow"])) == ["eager"] and notes(tmp_path) == ["ran"]


@pytest.mark.parametrize(
    "target",
    [
        "app.py:letter",
        *(
            pytest.param(each, marks=pytest.mark.torture)
            for each in ("app", "app:letter", "app.py", "app:flows", "../work/app.py", "../work/app.py:flows")
        ),
    ],
)
def test_every_command_that_takes_code_takes_every_spelling(tmp_path, target):
    folder = tmp_path / "work"
    folder.mkdir()
    file = write_program(APP, folder, "app.py")

    def command(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agentflow", *args],
            cwd=folder, env=environment(folder, None), capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def begin(*args: str) -> None:
        run_program(file, folder, env={"KILL": "1"}, expect_kill=True)

    begin()
    run_id = json.loads(command("runs", "list", "--json").stdout)[0]["id"]
    if target.endswith(":letter"):
        for words in (("plan",), ("runs", "plan")):
            done = command(*words, target, "--run", run_id, "--json")
            assert json.loads(done.stdout)["id"] == run_id, done.stderr
    done = command("runs", "resume", run_id, "--module", target, "--json")
    assert json.loads(done.stdout)["status"] == "completed", done.stderr
    assert "a word of the user's code" in done.stderr
    done = command("runs", "retry", run_id, "--from", "first", "--module", target, "--json")
    assert json.loads(done.stdout)["status"] == "completed", done.stderr
    done = command("runs", "fork", run_id, "--module", target, "--json")
    assert json.loads(done.stdout)["status"] == "completed", done.stderr
    Path(folder / "journal").rename(folder / "before")
    begin()
    done = command("worker", target, "--once")
    assert done.returncode == 0 and "completed" in done.stderr, done.stderr
    assert json.loads(command("runs", "list", "--json").stdout)[0]["status"] == "completed"
