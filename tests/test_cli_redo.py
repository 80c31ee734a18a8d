"""Going on with runs from the command line: resume, retry, fork, diff, export, purge, watch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from agentflow import Waiting, human_task, runs, step, tasks, workflow
from agentflow.cli.app import run
from tests.programs import environment, notes, run_program, start_program, write_program

FLOW = """
    @workflow("job")
    async def job(ctx, n: int, word: str = "w") -> str:
        await step("first", note, f"first {n}")
        await step("middle", lambda: die() if os.environ.get("KILL") else note("middle"))
        if os.environ.get("BREAK"):
            raise ValueError("broken")
        if os.environ.get("ASK"):
            await human_task("approve", title="Go on?", data=n)
        await step("last", note, f"last {word}")
        return f"done {n} {word}"

    flows = [job]
    other = 1

    if __name__ == "__main__":
        job.run_sync(1)
"""


@pytest.fixture
def cli(capsys):
    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def agentflow(folder, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentflow", *args],
        cwd=folder, env=environment(folder, env), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def killed(tmp_path):
    """The id of a run whose process was killed; app.py defines its workflow."""
    file = write_program(FLOW, tmp_path, "app.py")
    run_program(file, tmp_path, env={"KILL": "1"}, expect_kill=True)
    return json.loads(agentflow(tmp_path, "runs", "list", "--json").stdout)[0]["id"]


def test_resume_goes_on_with_the_named_code_and_repeats_nothing(killed, tmp_path):
    done = agentflow(tmp_path, "runs", "resume", killed[:6], "--module", "app:job")
    assert (done.returncode, done.stdout) == (0, f'{killed} completed\n"done 1 w"\n'), done.stderr
    assert notes(tmp_path) == ["first 1", "middle", "last w"]
    again = agentflow(tmp_path, "runs", "resume", killed, "-m", "app:flows", "--json")
    assert json.loads(again.stdout)["status"] == "completed" and len(notes(tmp_path)) == 3


@pytest.mark.parametrize(("env", "code", "status"), [({"BREAK": "1"}, 1, "failed"), ({"ASK": "1"}, 3, "waiting")])
def test_the_exit_code_of_resume_tells_how_the_run_ended(killed, tmp_path, env, code, status):
    done = agentflow(tmp_path, "runs", "resume", killed, "--module", "app", "--json", **env)
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["status"] == status
    assert "Traceback" not in done.stderr


def test_a_module_that_does_not_fit_is_a_usage_error_that_says_what_to_write(killed, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_app.py").write_text("1 / 0\n")
    write_program("@workflow\nasync def flow(ctx): return 1\n", tmp_path, "another_app.py")
    write_program(FLOW, tmp_path, "fine_app.py")
    for module, says in (
        (None, "--module app:flow"),
        ("nowhere:flow", "no module 'nowhere'"),
        ("fine_app:nothing", "fine_app holds: fine_app:job"),
        ("fine_app:other", "no workflow"),
        ("fine_app.py:nothing", "fine_app.py:job"),
        ("nowhere.py:job", "no such file"),
        ("broken_app:flow", "ZeroDivisionError"),
        ("another_app:flow", "has no workflow 'job'"),
    ):
        for command in ("resume", "retry") if module else ("resume",):
            code, out, err = cli("runs", command, killed, *(("--module", module) if module else ()))
            assert (code, out) == (2, ""), err
            assert says in err and len(err.splitlines()) == 1
    assert runs.get(killed).status == "interrupted" and notes(tmp_path) == ["first 1"]


def test_retry_does_the_step_and_what_follows_anew(killed, tmp_path):
    agentflow(tmp_path, "runs", "resume", killed, "-m", "app:job")
    done = agentflow(tmp_path, "runs", "retry", killed, "--from", "middle", "-m", "app:job")
    assert done.returncode == 0, done.stderr
    assert notes(tmp_path) == ["first 1", "middle", "last w", "middle", "last w"]
    done = agentflow(tmp_path, "runs", "retry", killed, "--from", "last")
    assert (done.returncode, done.stdout) == (0, f"{killed} interrupted\n") and "--module" in done.stderr
    assert len(notes(tmp_path)) == 5


def test_fork_with_other_input_and_a_given_result(killed, tmp_path):
    agentflow(tmp_path, "runs", "resume", killed, "-m", "app:job")
    done = agentflow(
        tmp_path, "runs", "fork", killed, "--from", "middle", "--input", '{"word": "x"}', "--result", "middle=7",
        "-m", "app:job", "--json",
    )  # fmt: skip
    made = json.loads(done.stdout)
    assert (made["parent"], made["forked_at"], made["output"]) == (killed, "middle", "done 1 x"), done.stderr
    assert notes(tmp_path)[3:] == ["last x"]
    shown = agentflow(tmp_path, "runs", "show", made["id"]).stdout
    assert f"{killed}, from middle on" in shown
    for wrong in (("--input", "{x}"), ("--result", "middle"), ("--result", "middle=x"), ("--from", "nope")):
        assert agentflow(tmp_path, "runs", "fork", killed, *wrong).returncode == 2


@workflow("pair")
async def pair(ctx, n: int) -> int:
    await step("same", lambda: 1)
    return await step("twice", lambda: n * 2)


def test_diff_export_and_purge(cli, tmp_path):
    pair.run_sync(1)
    pair.run_sync(2)
    right, left = (r.id for r in runs.list())
    code, out, _ = cli("runs", "diff", left, right)
    assert code == 0 and "first difference: twice" in out and max(map(len, out.splitlines())) <= 80
    told = json.loads(cli("runs", "diff", left, right, "--json")[1])
    assert told["first"] == "twice" and told["same"] == 1 and told["steps"][0]["what"] == ["given", "output"]
    code, out, err = cli("runs", "export", left, str(tmp_path / "run.html"))
    assert (code, out) == (0, "") and (tmp_path / "run.html").exists() and "written" in err
    assert json.loads(cli("runs", "export", left)[1])["run"]["id"] == left
    assert cli("runs", "export", left, str(tmp_path / "no" / "x.json"))[0] == 2
    told = json.loads(cli("runs", "purge", "--older-than", "0", "--dry-run", "--json")[1])
    assert set(told["runs"]) == {left, right} and told["dry_run"] and len(runs.list()) == 2
    assert cli("runs", "purge", "--older-than", "30d")[1] == ""
    code, out, err = cli("runs", "purge", "--older-than", "0", "--workflow", "pair")
    assert set(out.split()) == {left, right} and "2 runs" in err and runs.list() == []
    assert cli("runs", "purge", "--older-than", "soon")[0] == 2


def test_what_is_not_there_has_exit_code_4(cli):
    for command in ("resume", "retry", "fork", "export", "watch"):
        code, out, err = cli("runs", command, "nope")
        assert (code, out) == (4, ""), command
    assert cli("runs", "diff", "a", "b")[0] == 4


def test_an_id_that_is_short_for_several_runs_names_them(cli):
    pair.run_sync(1)
    pair.run_sync(2)
    code, _, err = cli("runs", "show", "pair-")
    assert code == 4 and "short for 2 runs" in err and all(r.id in err for r in runs.list())


def test_ids_are_completed(journal):
    from agentflow.cli.complete import complete_run, complete_task

    pair.run_sync(1)

    @workflow("ask-it")
    async def ask(ctx) -> None:
        await human_task("approve", data=1)

    with pytest.raises(Waiting):
        ask.run_sync()
    assert complete_run("pai") == [runs.list(workflow="pair")[0].id] and len(complete_run("")) == 2
    assert complete_task("t-") == [tasks.list()[0].id] and complete_task("x") == []


def test_completion_answers_the_shell(killed, tmp_path):
    done = agentflow(
        tmp_path, _AGENTFLOW_COMPLETE="complete_bash", COMP_WORDS="agentflow runs show jo", COMP_CWORD="3"
    )
    assert killed in done.stdout, done.stderr


def test_watch_follows_a_run_until_it_has_ended(tmp_path):
    source = """
        @workflow("slow")
        async def slow(ctx) -> None:
            await step("one", note, "one")
            while not (HERE / "go").exists():
                await asyncio.sleep(0.02)
            await step("two", note, "two")

        slow.options(run_id="slow-1").run_sync()
    """
    process = start_program(source, tmp_path)
    while notes(tmp_path) != ["one"]:
        assert process.poll() is None
    watching = subprocess.Popen(
        [sys.executable, "-m", "agentflow", "runs", "watch", "slow-1", "--json"],
        cwd=tmp_path, env=environment(tmp_path, None), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first, second = json.loads(watching.stdout.readline()), json.loads(watching.stdout.readline())
    assert (first["event"], first["name"], second["status"]) == ("step", "one", "running")
    (tmp_path / "go").touch()
    rest = [json.loads(line) for line in watching.communicate(timeout=60)[0].splitlines()]
    assert [e.get("name") or e["status"] for e in rest] == ["two", "completed"] and watching.returncode == 0
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_watch_of_a_failed_run_tells_and_fails(cli):
    @workflow("watch-fails")
    async def flow(ctx) -> None:
        def fail() -> None:
            raise ValueError("no luck")

        await step("try", fail)

    with pytest.raises(ValueError):
        flow.run_sync()
    code, out, _ = cli("runs", "watch", "watch-fails")
    assert code == 1 and "try  failed" in out and "ValueError: no luck" in out and "\x1b" not in out
