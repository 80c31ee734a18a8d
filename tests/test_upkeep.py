"""The journal's files: what is wrong is found and nothing is changed; copies are complete and open."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

import agentflow
from agentflow import Waiting, embed, generate_content, human_task, runs, step, tasks, upkeep, workflow
from agentflow.cli.app import run
from agentflow.journal import Journal
from agentflow.layout import SIBLING, read_sibling
from agentflow.store import DB_NAME
from agentflow.testing import FakeModel
from tests.programs import notes, run_program, start_program

calls: list[str] = []


def note(name: str) -> str:
    calls.append(name)
    return name


@pytest.fixture
def cli(capsys):
    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@workflow("inner")
async def inner(ctx) -> str:
    return await step("in", note, "in")


@workflow("full")
async def full(ctx, n: int) -> str:
    text = await generate_content(f"n {n}", model="openai:m", name="ask")
    await embed(["one", "two"], model="openai:text-embedding-3-small")
    await step("keyed", note, "keyed", idempotency_key="once")
    await inner.run()
    await human_task("approve", data=text, timeout="2d")
    return text


@pytest.fixture
def filled(journal):
    """A journal with a bit of everything: a waiting run, a completed one, keyed results, vectors, tasks."""
    calls.clear()
    with FakeModel(["A"]), pytest.raises(Waiting):
        full.run_sync(1)
    return journal


def sql(journal, *statements: str) -> None:
    con = sqlite3.connect(journal.path / DB_NAME)
    with con:
        for statement in statements:
            con.execute(statement)
    con.close()


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but what SQLite makes for a reader: shared memory and a log that holds nothing."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    return {name: data for name, data in found.items() if data and not name.endswith("-shm")}


def test_a_whole_journal_has_no_problems(filled, cli):
    found = upkeep.verify(filled.path)
    assert found and found.problems == [] and found.rows == len(list(filled.keys("")))
    code, out, err = cli("journal", "verify")
    assert (code, out) == (0, "") and "all well" in err
    assert json.loads(cli("journal", "verify", "--json")[1])["ok"] is True


DAMAGE = {
    "a record": ("UPDATE Cache SET value = '{\"name\"' WHERE key LIKE 's/full%'", "damaged", "s/full"),
    "a document": ("UPDATE Cache SET value = '[]' WHERE key LIKE 'r/inner%'", "damaged", "r/inner"),
    "a reply": ("UPDATE Cache SET value = '{' WHERE key LIKE 'm/%'", "damaged", "m/full"),
    "a task": ("UPDATE Cache SET value = '{' WHERE key LIKE 'h/%'", "damaged", "h/t-"),
    "no task": ("DELETE FROM Cache WHERE key LIKE 'h/%'", "missing", "xt/open/"),
    "no document": ("DELETE FROM Cache WHERE key LIKE 'r/full%'", "missing", "r/full"),
    "no index": ("DELETE FROM Cache WHERE key LIKE 'x/waiting/%'", "missing", "x/waiting/"),
    "no code": ("DELETE FROM Cache WHERE key LIKE 'c/%'", "missing", "c/"),
    "no keyed result": ("DELETE FROM Cache WHERE key LIKE 'k/%'", "missing", "k/"),
    "no vector": ("DELETE FROM Cache WHERE key LIKE 'e/%'", "missing", "e/"),
    "a pickle": (
        "INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES ('s/full/x', 1, 0, 0, 4, x'80')",
        "foreign", "s/full/x",
    ),
    "a side file": (
        "INSERT INTO Cache (key, raw, store_time, access_time, mode, filename) VALUES ('s/y', 1, 0, 0, 2, 'f.val')",
        "foreign", "s/y",
    ),
    "a key that is no text": (
        "INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES (x'00', 0, 0, 0, 1, 'v')",
        "foreign", "b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_missing_or_foreign_is_found_and_left_alone(filled, cli, what):
    statement, kind, where = DAMAGE[what]
    filled.close()
    sql(filled, statement)
    before = snapshot(filled.path)
    found = upkeep.verify(filled.path)
    assert not found and any(p.kind == kind and p.where.startswith(where) for p in found.problems), found.problems
    code, out, err = cli("journal", "verify", "--json")
    told = json.loads(out)
    assert code == 1 and told["ok"] is False and told["problems"][0].keys() == {"kind", "where", "what"}
    assert cli("journal", "verify")[0] == 1
    assert snapshot(filled.path) == before


def test_a_version_that_is_gone_is_missed(journal):
    @workflow("versions")
    async def flow(ctx) -> str:
        return await step("s", note, "s")

    flow.run_sync()
    flow.options(rerun=["s"]).run_sync()
    sql(journal, "DELETE FROM Cache WHERE key LIKE 's/versions%.0'")
    assert {p.kind for p in upkeep.verify(journal.path).problems} == {"missing"}


def test_files_that_do_not_belong_together_are_found(filled, tmp_path):
    filled.close()
    folder = tmp_path / "copy"
    shutil.copytree(filled.path, folder)
    text = (folder / SIBLING).read_text()
    (folder / SIBLING).write_text(re.sub(r'"commits":"\d+"', f'"commits":"{10_000:020d}"', text))
    assert "missing" in {p.kind for p in upkeep.verify(folder).problems}
    (folder / SIBLING).write_text("{")
    assert {p.where for p in upkeep.verify(folder).problems} == {SIBLING}
    (folder / SIBLING).unlink()
    assert [p.kind for p in upkeep.verify(folder).problems] == ["missing"]
    (folder / DB_NAME).unlink()
    assert {p.where for p in upkeep.verify(folder).problems} == {SIBLING, DB_NAME}
    (folder / DB_NAME).write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    assert not upkeep.verify(folder)


def test_stats_count_records_and_runs(filled, cli):
    found = json.loads(cli("journal", "stats", "--json")[1])
    assert found["runs"] == {"completed": 1, "waiting": 1} and found["records"]["vectors"]["rows"] == 2
    assert found["bytes"] == sum(found["files"].values()) > 0 and found["commits"] > 5
    assert sum(each["rows"] for each in found["records"].values()) == len(list(filled.keys("")))
    code, out, _ = cli("journal", "stats")
    assert code == 0 and re.search(r"^vectors +2 ", out, re.MULTILINE)


# -- backup ------------------------------------------------------------------------------------------


def test_a_backup_opens_and_replays(filled, tmp_path, cli):
    code, out, _ = cli("journal", "backup", str(tmp_path / "backup"))
    assert (code, out) == (0, f"{tmp_path / 'backup'}\n")
    copy = tmp_path / "backup"
    assert os.stat(copy).st_mode & 0o777 == 0o700 and (copy / ".gitignore").exists()
    assert upkeep.verify(copy).problems == []
    assert read_sibling(copy).commits == read_sibling(filled.path).commits > 0, "an older copy put back would show"
    before = list(filled.scan(""))
    filled.close()
    agentflow.configure(path=copy)
    assert list(Journal.open(copy).scan("")) == before
    tasks.approve(tasks.list()[0].id)
    with FakeModel([]):
        assert full.run_sync(1) == "A"
    assert calls == ["keyed", "in"]


def test_a_backup_of_a_journal_in_use_is_of_one_moment(tmp_path):
    source = """
        @workflow("busy")
        async def busy(ctx) -> None:
            i = 0
            while not (HERE / "stop").exists():
                await step("s", lambda i=i: i)
                i += 1
                note(i)

        busy.run_sync()
    """
    process = start_program(source, tmp_path)
    folder = tmp_path / "journal"
    while len(notes(tmp_path)) < 20:
        assert process.poll() is None
    for number in range(5):
        known = len(notes(tmp_path))
        copy = upkeep.backup(folder, tmp_path / f"backup{number}")
        assert upkeep.verify(copy).problems == []
        journal = Journal.open(copy)
        found = len([key for key, _ in journal.keys("s/") if "!" not in key])
        assert found >= known
        journal.close()
    (tmp_path / "stop").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_backup_is_made_in_a_new_directory_only(filled, tmp_path, cli):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    for target in (tmp_path / "there", tmp_path / "there" / "file", filled.path / "inside"):
        code, _, err = cli("journal", "backup", str(target))
        assert code == 2 and len(err.splitlines()) == 1
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["file"]


def test_a_backup_that_was_cut_off_does_not_open(filled, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(upkeep.layout, "write_sibling", killed)
    with pytest.raises(KeyboardInterrupt):
        upkeep.backup(filled.path, tmp_path / "half")
    monkeypatch.undo()
    with pytest.raises(agentflow.JournalIncomplete):
        Journal.open(tmp_path / "half")


def test_steps_begun_are_known_in_the_backup(tmp_path, journal_path):
    source = """
        @workflow("doubt")
        async def doubt(ctx) -> None:
            await step("s", lambda: die() if "die" in sys.argv else note("s"))

        doubt.run_sync()
    """
    run_program(source, tmp_path, "die", expect_kill=True)
    upkeep.backup(tmp_path / "journal", tmp_path / "backup")
    ended = run_program(source, tmp_path, env={"AGENTFLOW_PATH": str(tmp_path / "backup")})
    assert "in doubt" in ended.err and notes(tmp_path) == ["s"]


# -- copy --------------------------------------------------------------------------------------------


def test_copied_runs_replay_in_the_other_journal_with_what_they_share(filled, tmp_path, cli):
    run_id = tasks.list()[0].run_id
    code, out, err = cli("journal", "copy", str(tmp_path / "other"), "--run", run_id)
    assert code == 0 and set(out.split()) == {r.id for r in runs.list()}, err
    again = json.loads(cli("journal", "copy", str(tmp_path / "other"), "--json")[1])
    assert again["runs"] == [] and "there already" in again["skipped"][run_id]
    agentflow.configure(path=tmp_path / "other")
    assert upkeep.verify(tmp_path / "other").problems == []
    tasks.approve(tasks.list()[0].id)
    with FakeModel([]) as model:
        assert full.run_sync(1) == "A"

        @workflow("elsewhere")
        async def elsewhere(ctx) -> str:
            await embed(["two", "one"], model="openai:text-embedding-3-small")
            return await step("keyed", note, "keyed", idempotency_key="once")

        elsewhere.run_sync()
    assert calls == ["keyed", "in"] and model.embedded == []


def test_one_run_is_copied_without_the_others(filled, tmp_path):
    only = runs.list(workflow="inner")[0].id
    done = upkeep.copy(filled, Journal.open(tmp_path / "other"), [only])
    assert done.runs == [only] and {key.split("/")[0] for key, _ in Journal.open(tmp_path / "other").keys("")} == {
        "r", "x", "s", "c", "p", "lease", "ch", "cp",
    }  # fmt: skip


def test_a_journal_is_not_copied_into_itself(filled, tmp_path, cli):
    assert cli("journal", "copy", str(filled.path))[0] == 2
    assert cli("journal", "copy", str(tmp_path / "o"), "--run", "nope")[0] == 4


async def test_a_running_run_is_not_copied(journal, tmp_path):
    gate, started = asyncio.Event(), asyncio.Event()

    @workflow("busy-copy")
    async def flow(ctx) -> None:
        started.set()
        await gate.wait()

    going = asyncio.create_task(flow.run())
    await started.wait()
    target = Journal.open(tmp_path / "other")
    assert "running" in next(iter(upkeep.copy(journal, target).skipped.values()))
    with pytest.raises(agentflow.RunBusy):
        upkeep.copy(journal, target, [runs.list()[0].id])
    gate.set()
    await going


# -- doctor ------------------------------------------------------------------------------------------


def test_doctor_tells_what_is_there_and_what_is_not(filled, cli, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-proj-abcdefghij0123456789abcdefghij")
    monkeypatch.setenv("AGENTFLOW_MODEL", "openai:gpt-5-mini")
    code, out, err = cli("doctor", "--json")
    checks = {each["check"]: each for each in json.loads(out)}
    assert code == 0, err
    assert {"agentflow", "python", "openai", "model", "keys", "journal", "disk", "runs", "due"} <= set(checks)
    assert checks["keys"]["detail"] == "OPENAI_API_KEY" and "sk-proj" not in out
    assert checks["model"]["detail"] == "openai:gpt-5-mini"
    assert checks["runs"]["detail"] == "1 completed, 1 waiting" and "1 wait" in checks["tasks"]["detail"]
    tasks.approve(tasks.list()[0].id)
    code, out, _ = cli("doctor")
    assert code == 0 and "there is no worker" in out


def test_doctor_fails_on_a_journal_that_is_not_whole_and_changes_nothing(filled, cli):
    filled.close()
    (filled.path / SIBLING).unlink()
    before = snapshot(filled.path)
    code, out, _ = cli("doctor")
    assert code == 1 and "wrong" in out and snapshot(filled.path) == before


def test_looking_where_there_is_no_journal_makes_none(cli, journal_path, tmp_path):
    for command in (("verify",), ("stats",), ("backup", str(tmp_path / "b")), ("copy", str(tmp_path / "c"))):
        code, out, err = cli("journal", *command)
        assert (code, out) == (4, "") and "no journal" in err
    code, out, _ = cli("doctor", "--json")
    assert {each["check"]: each["ok"] for each in json.loads(out)}["journal"] is None
    assert not journal_path.exists() and not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
