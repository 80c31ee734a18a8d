"""The journal under real runs: foreign rows, wrong directories, lost files, full disks."""

from __future__ import annotations

import os
import pickle
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import Context, runs, step, workflow
from agentflow.errors import (
    JournalError,
    JournalForeign,
    JournalFull,
    JournalIncomplete,
    JournalReadOnly,
    JournalVersionError,
)
from agentflow.journal import Journal
from tests.loopback import Loopback, answer_to
from tests.programs import notes, run_program

PROGRAM = """
    @workflow("order")
    async def flow(ctx, n: int):
        first = await step("first", lambda: note("first") or n + 1)
        if "die" in sys.argv:
            die()
        return first + await step("second", lambda: note("second") or 10)
    print(flow.run_sync(1))
"""


class Bomb:
    def __reduce__(self) -> Any:
        return (os.system, ("touch $PWNED",))


def sql(folder: Path, statement: str, *values: Any) -> list[Any]:
    con = sqlite3.connect(folder / "cache.db", isolation_level=None)
    try:
        return con.execute(statement, values).fetchall()
    finally:
        con.close()


# -- rows that no journal wrote ------------------------------------------------------------------


def test_planted_pickle_does_nothing_and_is_reported(tmp_path: Path) -> None:
    """Every record of the run is replaced by a pickle that would run a command."""
    run_program(PROGRAM, tmp_path, "die", expect_kill=True)
    folder = tmp_path / "journal"
    bomb = pickle.dumps(Bomb())
    keys = [key for (key,) in sql(folder, "SELECT key FROM Cache WHERE key LIKE 's/%' AND raw = 1")]
    assert keys
    for key in keys:
        sql(folder, "UPDATE Cache SET mode = 4, filename = NULL, value = ? WHERE key = ?", bomb, key)
    pwned = tmp_path / "pwned"
    ended = run_program(PROGRAM, tmp_path, env={"PWNED": str(pwned)}, expect_failure=True)
    assert not pwned.exists()
    assert "a row that agentflow did not write" in ended.err and "a pickle" in ended.err
    assert "agentflow.errors.JournalIncomplete" in ended.err and "order-" in ended.err
    assert notes(tmp_path) == ["first"], "what cannot be read is not paid for again"


def test_planted_row_for_a_step_that_is_not_recorded_yet_is_not_its_result(tmp_path: Path) -> None:
    run_program(PROGRAM, tmp_path)
    folder = tmp_path / "journal"
    keys = [key for (key,) in sql(folder, "SELECT key FROM Cache WHERE key LIKE 's/%'")]
    assert keys
    sql(
        folder,
        "INSERT INTO Cache(key, raw, store_time, access_time, access_count, size, mode, filename, value) "
        "VALUES (?, 1, 0, 0, 0, 0, 4, NULL, ?)",
        "s/other-run/planted",
        pickle.dumps(Bomb()),
    )
    pwned = tmp_path / "pwned"
    ended = run_program(PROGRAM, tmp_path, env={"PWNED": str(pwned)})
    assert ended.out == "12\n" and not pwned.exists()
    assert notes(tmp_path) == ["first", "second"]


def test_bytes_in_place_of_a_reply_are_reported_and_a_run_says_so(tmp_path: Path) -> None:
    program = """
        from agentflow.scratch import open_journal
        @workflow("ask")
        async def flow(ctx):
            return await step("s", lambda: note("s") or "value")
        if "look" in sys.argv:
            journal = open_journal()
            list(journal.scan(""))
            print(journal.problems())
        else:
            flow.run_sync()
    """
    run_program(program, tmp_path)
    sql(tmp_path / "journal", "UPDATE Cache SET value = ?, mode = 1 WHERE key LIKE 's/%'", b"\x80\x04.")
    ended = run_program(program, tmp_path, "look")
    assert "s/ask" in ended.out and "which no journal writes" in ended.out


# -- directories ---------------------------------------------------------------------------------


@pytest.fixture
def flow() -> Any:
    calls: list[int] = []

    @workflow("flow")
    async def made(ctx: Context, n: int) -> int:
        return await step("s", lambda: calls.append(n) or n)  # type: ignore[func-returns-value]

    made.calls = calls  # type: ignore[attr-defined]
    return made


def closed(folder: Path) -> None:
    Journal.open(folder).close()


async def test_journal_of_an_unknown_version_is_refused_and_not_touched(journal_path: Path, flow: Any) -> None:
    await flow.run(1)
    closed(journal_path)
    sql(journal_path, "UPDATE Agentflow SET value = 99 WHERE key = 'layout'")
    before = (journal_path / "cache.db").read_bytes()
    for start in (flow.run, flow.start, flow.plan):
        with pytest.raises(JournalVersionError, match="99"):
            await start(1)
    with pytest.raises(JournalVersionError):
        runs.list()
    assert flow.calls == [1] and (journal_path / "cache.db").read_bytes() == before


async def test_directory_of_somebody_elses_diskcache_is_refused_and_not_touched(tmp_path: Path, flow: Any) -> None:
    import diskcache

    folder = tmp_path / "theirs"
    with diskcache.Cache(str(folder)) as cache:
        cache["a"] = {"b": 1}
    agentflow.configure(path=folder)
    with pytest.raises(JournalForeign) as caught:
        await flow.run(1)
    assert str(folder) in str(caught.value) and flow.calls == []
    with diskcache.Cache(str(folder)) as cache:
        assert cache["a"] == {"b": 1}


async def test_directory_of_other_files_is_refused(tmp_path: Path, flow: Any) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    agentflow.configure(path=folder)
    with pytest.raises(JournalForeign):
        await flow.run(1)
    assert os.listdir(folder) == ["cat.jpg"]


def test_copy_without_its_wal_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    """A killed process leaves its last records in the -wal file; a copy that forgets it must not pay again."""
    run_program(PROGRAM, tmp_path, "die", expect_kill=True)
    folder = tmp_path / "journal"
    assert (folder / "cache.db-wal").stat().st_size > 0
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "cache.db", copy)
    shutil.copy(folder / "journal.json", copy)
    ended = run_program(PROGRAM, tmp_path, env={"AGENTFLOW_PATH": str(copy)}, expect_failure=True)
    assert ended.code != 0 and "JournalIncomplete" in ended.err
    assert notes(tmp_path) == ["first"], "nothing was run again"
    shutil.copy(folder / "cache.db-wal", copy)
    assert run_program(PROGRAM, tmp_path, env={"AGENTFLOW_PATH": str(copy)}).out == "12\n"
    assert notes(tmp_path) == ["first", "second"]


async def test_emptied_database_is_refused(journal_path: Path, flow: Any) -> None:
    await flow.run(1)
    closed(journal_path)
    for name in ("cache.db-wal", "cache.db-shm"):
        (journal_path / name).unlink(missing_ok=True)
    (journal_path / "cache.db").write_bytes(b"")
    with pytest.raises(JournalIncomplete):
        await flow.run(1)
    assert flow.calls == [1]


async def test_journal_deleted_while_in_use_is_begun_anew_and_nothing_is_written_into_lost_files(
    journal_path: Path, flow: Any, again: Callable[[], None]
) -> None:
    await flow.run(1)
    shutil.rmtree(journal_path)
    again()
    assert await flow.run(1) == 1 and flow.calls == [1, 1]
    assert (journal_path / "cache.db").exists()
    closed(journal_path)
    again()
    assert await flow.run(1) == 1 and flow.calls == [1, 1]


# -- places that cannot take records -------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave not one free block."""
    file = folder / "ballast"
    with open(file, "wb", buffering=0) as out:
        for size in (4096, 1):
            try:
                while True:
                    out.write(b"x" * size)
            except OSError:
                pass
    return file


def test_reply_that_arrives_on_a_full_disk_is_kept_and_not_bought_again(tmp_path: Path, small_disk: Path) -> None:
    program = """
        @workflow("ask")
        async def flow(ctx):
            first = await generate_content("first", model="openai:gpt-4o-mini")
            return [first, await generate_content("second", model="openai:gpt-4o-mini")]
        try:
            print(flow.run_sync())
        except JournalFull as error:
            print("full", error)
    """

    class Fills(Loopback):
        """The disk fills up while the first reply is on its way."""

        def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
            if not self.arrived:
                fill(small_disk)
            return super().arrive(asked, path)

    temporary = tmp_path / "spill"
    temporary.mkdir()
    with Fills() as server:
        env = {
            **server.environment,
            "AGENTFLOW_PATH": str(small_disk / "journal"),
            "AGENTFLOW_PAID_RETRY_SECONDS": "0.2",
            "TMPDIR": str(temporary),
        }
        ended = run_program(program, tmp_path, env=env)
        assert ended.out.startswith("full"), ended.out + ended.err
        assert "disk" in ended.out.lower()
        (small_disk / "ballast").unlink()
        ended = run_program(program, tmp_path, env=env)
        assert ended.out == f"{[answer_to('first'), answer_to('second')]}\n", ended.err
        assert [event["text"] for event in server.arrived] == ["first", "second"], "nothing was bought again"
        run_program(program, tmp_path, env=env)
        assert len(server.arrived) == 2


def test_step_on_a_full_disk_fails_the_run_plainly_and_earlier_records_stay(tmp_path: Path, small_disk: Path) -> None:
    program = """
        @workflow("fills")
        async def flow(ctx):
            kept = await step("kept", lambda: note("kept") or 1)
            big = await step("big", lambda: note("big") or "x" * 3_000_000 if "big" in sys.argv else "small")
            return [kept, len(big)]
        try:
            print(flow.run_sync())
        except JournalFull as error:
            print("full:", error)
        print(flow.runs()[0].status)
    """
    env = {"AGENTFLOW_PATH": str(small_disk / "journal")}
    ended = run_program(program, tmp_path, "big", env=env)
    assert ended.out.startswith("full:") and str(small_disk) in ended.out
    assert ended.out.splitlines()[-1] == "interrupted"
    assert run_program(program, tmp_path, env=env).out == "[1, 5]\ncompleted\n"
    assert notes(tmp_path).count("kept") == 1
    assert issubclass(JournalFull, JournalError)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A file system that can be made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")

    def lock() -> Path:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        return folder

    yield lock
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_read_only_journal_is_named_and_no_step_runs(tmp_path: Path, read_only: Callable[[], Path]) -> None:
    env = {"AGENTFLOW_PATH": str(tmp_path / "disk" / "journal"), "PYTHONDONTWRITEBYTECODE": "1"}
    run_program(PROGRAM, tmp_path, "die", env=env, expect_kill=True)
    read_only()
    ended = run_program(PROGRAM, tmp_path, env=env, expect_failure=True)
    assert ended.code != 0 and "JournalReadOnly" in ended.err and str(tmp_path / "disk") in ended.err
    assert notes(tmp_path) == ["first"]
    assert issubclass(JournalReadOnly, JournalError)


# -- whose the files are -------------------------------------------------------------------------


async def test_directory_is_private_and_ignored_by_git(journal_path: Path, flow: Any) -> None:
    await flow.run(1)
    assert journal_path.stat().st_mode & 0o777 == 0o700
    assert (journal_path / ".gitignore").read_text().strip() == "*"


async def test_settings_that_another_opener_changed_are_put_back(
    journal_path: Path, flow: Any, said: Callable[[], str]
) -> None:
    await flow.run(1)
    closed(journal_path)
    sql(journal_path, "UPDATE Settings SET value = 1000 WHERE key = 'size_limit'")
    sql(journal_path, "UPDATE Settings SET value = 'least-recently-stored' WHERE key = 'eviction_policy'")
    await flow.run(2)
    await flow.run(1)
    assert flow.calls == [1, 2]
    assert dict(sql(journal_path, "SELECT key, value FROM Settings"))["eviction_policy"] == "none"
