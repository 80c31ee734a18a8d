"""What a journal in files promises beside what every journal does: strangers' files are refused, paid replies kept."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from agentflow import layout, writer
from agentflow.create import record_disk
from agentflow.errors import (
    JournalBusy,
    JournalError,
    JournalForeign,
    JournalFull,
    JournalIncomplete,
    JournalReadOnly,
    JournalVersionError,
    LeaseLost,
    UsageError,
)
from agentflow.journal import Add, Drop, Fence, Journal, Put, default_path

ROOT = Path(__file__).parent.parent


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "j")
    yield opened
    opened.close()


def python(code: str, *args: object, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def sql(folder: Path, statement: str, *args: object) -> list:
    con = sqlite3.connect(folder / "cache.db")
    with con:
        rows = con.execute(statement, args).fetchall()
    con.close()
    return rows


# -- records ---------------------------------------------------------------------------------------


def test_records_are_there_for_another_process_and_after_reopening(journal):
    journal.commit([Add("ключ/1", "wert é \x00 \U0001f600" * 10_000)])
    out = python(
        "import sys; from agentflow.journal import Journal; sys.stdout.buffer.write(Journal.open(sys.argv[1]).get('ключ/1').encode())",
        journal.path,
    ).communicate()[0]
    assert out == journal.get("ключ/1")
    path = journal.path
    journal.close()
    assert Journal.open(path).get("ключ/1") == out
    Journal.open(path).close()


# -- sharing fsyncs --------------------------------------------------------------------------------


async def test_one_task_alone_commits_without_a_thread(journal):
    for number in range(20):
        await journal.acommit([Add(f"k{number}", "v")])
    assert journal._writer._thread is None


class holding_the_lock:
    def __init__(self, journal):
        self.con = sqlite3.connect(journal.path / "cache.db", isolation_level=None, check_same_thread=False)

    def __enter__(self):
        self.con.execute("BEGIN IMMEDIATE")

    def __exit__(self, *exc):
        self.con.execute("ROLLBACK")
        self.con.close()


def test_a_lock_that_is_never_released_ends_in_an_error_that_says_what_to_do(journal):
    journal._writer.busy_seconds = 0.05
    with holding_the_lock(journal), pytest.raises(JournalBusy, match="fuser"):
        journal.commit([Add("a", "1")])
    assert journal.commit([Add("a", "1")]) == [True]


# -- the files -------------------------------------------------------------------------------------


def test_the_directory_is_private_and_ignored_by_git(journal):
    assert journal.path.stat().st_mode & 0o777 == 0o700
    assert (journal.path / ".gitignore").read_text() == "*\n"


def test_one_object_per_directory_and_process(journal, tmp_path):
    (tmp_path / "link").symlink_to(journal.path)
    assert Journal.open(tmp_path / "link") is journal
    assert Journal.open(str(journal.path)) is journal


def test_rows_are_valid_for_diskcache(journal):
    import diskcache

    journal.commit([Add("a", "1"), Add("b", "x" * 100_000), Drop("a"), Put("b", "y"), Add("c", "3")])
    cache = diskcache.Cache(str(journal.path), disk=record_disk())
    assert (cache.get("b"), cache.get("a"), len(cache), sorted(cache)) == ("y", None, 2, ["b", "c"])
    assert cache.set("d", "4") and journal.get("d") == "4"
    for wrong in (
        lambda: cache.set("e", {"no": "pickle"}),
        lambda: cache.set(("t",), "v"),
        lambda: cache.set(b"b", "v"),
    ):
        with pytest.raises(UsageError):
            wrong()
    assert cache.volume() < 10**7 and not cache.cull()
    cache.close()


def test_a_plain_diskcache_fails_before_it_changes_anything(journal):
    import diskcache

    before = sql(journal.path, "SELECT * FROM Settings ORDER BY key")
    with pytest.raises(TypeError, match="agentflow_layout") as caught:
        diskcache.Cache(str(journal.path))
    assert sql(journal.path, "SELECT * FROM Settings ORDER BY key") == before
    # The failed constructor leaves its connection to the garbage collector, which newer Pythons complain about.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        caught.value.__traceback__ = None
        del caught
        gc.collect()


def test_settings_that_somebody_changed_are_put_back(journal, caplog):
    journal.commit([Add("a", "1")])
    journal.close()
    sql(journal.path, "UPDATE Settings SET value = 'least-recently-stored' WHERE key = 'eviction_policy'")
    sql(journal.path, "UPDATE Settings SET value = 0 WHERE key = 'sqlite_synchronous'")
    again = Journal.open(journal.path)
    assert dict(sql(journal.path, "SELECT key, value FROM Settings"))["eviction_policy"] == "none"
    assert "eviction_policy, sqlite_synchronous" in caplog.text
    assert again._writer._con.execute("PRAGMA synchronous").fetchone() == (2,)
    assert again._writer._con.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    again.close()


def test_a_database_turned_away_from_wal_is_turned_back(journal):
    journal.close()
    con = sqlite3.connect(journal.path / "cache.db")
    con.execute("PRAGMA journal_mode = DELETE")
    con.close()
    again = Journal.open(journal.path)
    again.commit([Add("a", "1")])
    assert sql(journal.path, "PRAGMA journal_mode") == [("wal",)]
    again.close()


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_planted_rows_do_nothing_and_are_reported_once(journal, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BOMB", str(tmp_path / "boom"))
    (journal.path / "side.val").write_text("from a file")
    journal.commit([Add("r/ok", "1")])
    insert = "INSERT INTO Cache (key, raw, mode, filename, value) VALUES (?, 1, ?, ?, ?)"
    sql(journal.path, insert, "r/pickle", 4, None, pickle.dumps(Bomb()))
    sql(journal.path, insert, "r/file", 3, "side.val", None)
    sql(journal.path, insert, "r/number", 1, None, 17)
    for _ in range(2):
        assert [journal.get(f"r/{name}") for name in ("pickle", "file", "number")] == [None] * 3
        assert list(journal.scan("r/")) == [("r/ok", "1")]
        assert [key for _, key, _ in journal.rows("r/", from_rowid=0, limit=10)] == ["r/ok"]
    assert not (tmp_path / "boom").exists()
    assert len(journal.problems()) == 3
    assert len([record for record in caplog.records if "r/pickle" in record.message]) == 1
    assert journal.commit([Add("r/pickle", "mine")]) == [True]
    assert journal.get("r/pickle") == "mine"


@pytest.mark.parametrize("alone", [True, False], ids=["records alone", "transactions"])
def test_a_database_copied_without_its_log_is_refused(journal, tmp_path, alone):
    fence = owned(journal)
    at_least = layout.read_sibling(journal.path).commits
    for number in range(5):
        journal.commit([Add(f"k{number}", "v")] if alone else [Put("k0", "v"), Add(f"k{number}", "v")], fence=fence)
    assert layout.read_sibling(journal.path).commits >= at_least + 5
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("cache.db", "journal.json"):
        shutil.copy(journal.path / name, copy / name)
    with pytest.raises(JournalIncomplete, match=r"\d+ commits are missing.*-wal"):
        Journal.open(copy)
    shutil.rmtree(copy)
    shutil.copytree(journal.path, copy)
    whole = Journal.open(copy)
    assert whole.get("k4") == "v"
    whole.close()


def owned(journal: Journal, token: int = 7) -> Fence:
    """A lease row as lease.py writes it, and the fence of its owner."""
    journal.commit([Put("lease/r", f'{{"token":{token},"pid":1}}')])
    return Fence("lease/r", token)


def test_a_record_that_is_committed_alone_keeps_every_rule(journal):
    fence, other = owned(journal), Fence("lease/r", 6)
    assert journal.commit([Add("a", "1")], fence=fence) == [True]
    assert journal.commit([Add("a", "2")], fence=fence) == [False], "the first one wins"
    for stale in (other, Fence("lease/r", 70), Fence("lease/nobody", 7)):
        with pytest.raises(LeaseLost):
            journal.commit([Add("b", "1")], fence=stale)
    sql(journal.path, "INSERT INTO Cache (key, raw, mode, value) VALUES ('c', 1, 4, ?)", pickle.dumps(1))
    assert journal.commit([Add("c", "mine")], fence=fence) == [True], "what no journal wrote is no record"
    assert [journal.get(key) for key in "abc"] == ["1", None, "mine"]
    assert sql(journal.path, "SELECT value FROM Settings WHERE key = 'count'") == [(3,)]
    journal.commit([Put("lease/r", '{"token":8,"pid":2}')])
    with pytest.raises(LeaseLost):
        journal.commit([Add("d", "1")], fence=fence)


def test_a_record_committed_alone_waits_for_another_process_and_is_refused_when_it_takes_over_meanwhile(journal):
    fence = owned(journal)
    holder = sqlite3.connect(journal.path / "cache.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    holder.execute("""UPDATE Cache SET value = '{"token":8,"pid":2}' WHERE key = 'lease/r'""")
    seen: list[object] = []

    def commit() -> None:
        try:
            seen.append(journal.commit([Add("a", "1")], fence=fence))
        except LeaseLost as error:
            seen.append(type(error))

    thread = threading.Thread(target=commit)
    thread.start()
    while journal._writer._thread is None and thread.is_alive():  # it has met the lock and left its commit to the writer
        time.sleep(0.001)
    holder.execute("COMMIT")
    thread.join()
    assert seen == [LeaseLost] and journal.get("a") is None
    holder.close()


@pytest.mark.parametrize("mapped", [True, False], ids=["through memory", "with write()"])
def test_what_other_processes_have_committed_still_counts_after_a_record_committed_alone(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(layout, "can_map", lambda folder: mapped)
    journal = Journal.open(tmp_path / "j")
    fence = owned(journal)
    other = "import sys; from agentflow.journal import Add, Journal\nj = Journal.open(sys.argv[1])\n"
    other += "for i in range(9): j.commit([Add(f'o{i}', 'v')])"
    assert python(other, journal.path).communicate() == ("", "")
    known = layout.read_sibling(journal.path).commits
    journal.commit([Add("a", "1")], fence=fence)
    assert layout.read_sibling(journal.path).commits >= known > journal._writer.sequence
    journal.commit([Put("p", "1")])
    assert layout.read_sibling(journal.path).commits == known + 3, "the row, the other row and its transaction"
    journal.close()


def test_rows_that_go_do_not_make_a_journal_look_incomplete(journal):
    fence = owned(journal)
    for number in range(20):
        journal.commit([Add(f"k{number}", "v")], fence=fence)
    journal.commit([Drop(f"k{number}") for number in range(20)])
    sql(journal.path, "DELETE FROM Cache")
    journal.close()
    Journal.open(journal.path).close()


def test_a_journal_of_an_earlier_version_counts_its_commits_from_now_on(journal, caplog):
    """Its trigger let the count of commits fall with each row that goes."""
    earlier = "UPDATE Settings SET value = value - 1 WHERE key = 'count'; END"
    sql(journal.path, "DROP TRIGGER Settings_count_delete")
    sql(journal.path, f"CREATE TRIGGER Settings_count_delete AFTER DELETE ON Cache FOR EACH ROW BEGIN {earlier}")
    journal.close()
    again = Journal.open(journal.path)
    assert not caplog.records, "there is nothing that a user did"
    test_rows_that_go_do_not_make_a_journal_look_incomplete(again)


def test_an_older_database_put_back_is_refused(journal, tmp_path):
    journal.commit([Add("a", "1")])
    journal.close()
    shutil.copy(journal.path / "cache.db", tmp_path / "old.db")
    again = Journal.open(journal.path)
    again.commit([Add("b", "1")])
    again.close()
    shutil.copy(tmp_path / "old.db", journal.path / "cache.db")
    with pytest.raises(JournalIncomplete, match="missing"):
        Journal.open(journal.path)


@pytest.mark.parametrize("damage", ["gone", "empty", "other", "sibling gone", "sibling empty", "garbage"])
def test_a_journal_with_missing_parts_is_refused(journal, tmp_path, damage):
    journal.commit([Add("a", "1")])
    journal.close()
    database, sibling = journal.path / "cache.db", journal.path / "journal.json"
    if damage == "gone":
        database.unlink()
    elif damage == "empty":
        database.write_bytes(b"")
    elif damage == "garbage":
        database.write_bytes(b"x" * 8192)
    elif damage == "sibling gone":
        sibling.unlink()
    elif damage == "sibling empty":
        sibling.write_text("")
    else:
        Journal.open(tmp_path / "other").close()
        shutil.copy(tmp_path / "other" / "cache.db", database)
    files = {file.name: file.read_bytes() for file in journal.path.iterdir() if file.is_file()}
    with pytest.raises(JournalIncomplete, match=str(journal.path)):
        Journal.open(journal.path)
    kept = {name: (journal.path / name).read_bytes() for name in files}
    assert kept == files


@pytest.mark.parametrize("what", ["layout", "digest"])
def test_an_unknown_version_is_refused_and_never_rewritten(journal, what):
    journal.close()
    sibling = journal.path / "journal.json"
    good = sibling.read_text()
    sibling.write_text(json.dumps({**json.loads(good), what: 99}))
    with pytest.raises(JournalVersionError, match=f"{what} version 99"):
        Journal.open(journal.path)
    assert f'"{what}": 99' in sibling.read_text()
    sibling.write_text(good)
    sql(journal.path, "UPDATE Agentflow SET value = 99 WHERE key = ?", what)
    with pytest.raises(JournalVersionError, match=f"{what} version 99"):
        Journal.open(journal.path)


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    import diskcache

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").write_text("mine")
    diskcache.Cache(str(tmp_path / "cache")).close()
    (tmp_path / "file").write_text("")
    for name in ("docs", "cache", "file"):
        before = sorted(str(path) for path in (tmp_path / name).rglob("*"))
        with pytest.raises(JournalForeign, match="AGENTFLOW_PATH"):
            Journal.open(tmp_path / name)
        assert sorted(str(path) for path in (tmp_path / name).rglob("*")) == before


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalReadOnly, match="AGENTFLOW_PATH"):
        Journal.open(tmp_path / "file" / "j")


def test_network_file_systems_and_synchronised_folders_are_refused(tmp_path):
    mounts = "/dev/sda / ext4 rw 0 0\nsrv:/x /mnt/a\\040b nfs4 rw 0 0\ntmpfs /mnt/a\\040b/local tmpfs rw 0 0\nh:/ /m fuse.sshfs rw 0 0\n"
    layout.check_place(Path("/home/me/p/.agentflow"), mounts)
    layout.check_place(Path("/mnt/a b/local/p"), mounts)
    layout.check_place(Path("/mnt/a bc/p"), mounts)
    for place in ("/mnt/a b/p/.agentflow", "/m/x"):
        with pytest.raises(JournalError, match=r"network file system \((nfs4|fuse.sshfs)\).*AGENTFLOW_PATH"):
            layout.check_place(Path(place), mounts)
    for part in ("Dropbox", "OneDrive - Firm", "Mobile Documents", "Google Drive", "GoogleDrive-me@x.org"):
        with pytest.raises(JournalError, match="AGENTFLOW_PATH"):
            Journal.open(tmp_path / part / "p")
        assert not (tmp_path / part).exists()


def test_a_journal_deleted_while_in_use_acknowledges_nothing_more(journal):
    fence = owned(journal)
    journal.commit([Add("a", "1")], fence=fence)
    shutil.rmtree(journal.path)
    for given in (fence, None):
        with pytest.raises(JournalIncomplete, match="deleted"):
            journal.commit([Add("b", "1")], fence=given)
    fresh = Journal.open(journal.path)
    assert fresh is not journal and fresh.get("a") is None
    fresh.close()


def test_a_creator_killed_between_its_files_is_no_obstacle(journal):
    journal.close()
    (journal.path / "journal.json").unlink()
    (journal.path / "new-1-aa").mkdir()
    again = Journal.open(journal.path)
    assert again.id == journal.id and again.commit([Add("a", "1")]) == [True]
    again.close()


def test_opening_an_existing_journal_imports_no_diskcache(journal):
    code = (
        "import sys; from agentflow.journal import Journal, Add; Journal.open(sys.argv[1]).commit([Add('x', '1')]); "
        "print([name for name in ('diskcache', 'tempfile', 'pickle', 'pydantic') if name in sys.modules])"
    )
    out, err = python(code, journal.path).communicate()
    assert (out.strip(), err) == ("[]", "")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="setconfig")
def test_sqlite_builds_without_double_quoted_texts_work(tmp_path, monkeypatch):
    real = sqlite3.connect

    def strict(*args, **kwargs):
        con = real(*args, **kwargs)
        con.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DDL, False)
        con.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
        return con

    monkeypatch.setattr(sqlite3, "connect", strict)
    journal = Journal.open(tmp_path / "j")
    assert journal.commit([Add("a", "1"), Drop("a"), Add("b", "1")]) == [True] * 3
    journal.close()


def test_a_thread_that_ends_closes_its_connection(journal):
    journal.commit([Add("a", "1")])
    thread = threading.Thread(target=journal.get, args=("a",))
    thread.start()
    thread.join()
    assert len(journal._reads._readers) <= 1


# -- marks -----------------------------------------------------------------------------------------


def test_a_torn_mark_is_ignored_and_does_not_swallow_the_next_one(journal):
    journal.mark("r", "one")
    with open(journal._marks.file("r"), "ab") as file:
        file.write(b"9:torn")
    journal.close()
    again = Journal.open(journal.path)
    assert again.marks("r") == ["one"]
    again.mark("r", "two")
    assert again.marks("r") == ["one", "two"]
    again.close()


def test_many_runs_keep_few_files_open(journal):
    for number in range(150):
        journal.mark(f"r{number}", "x")
    assert len(journal._marks._descriptors) <= 64
    journal.mark("r0", "y")
    assert journal.marks("r0") == ["x", "y"]


# -- Ctrl-C ----------------------------------------------------------------------------------------

INTERRUPTED = """
import sys, time, sqlite3, _thread, threading, asyncio
from agentflow.journal import Journal, Add, Put
j = Journal.open(sys.argv[1])
def slow(txn):
    txn.put("half", "1")
    print("in", flush=True)
    time.sleep(30)
try:
    if sys.argv[2] == "guarded":
        j.guarded(slow)
    else:
        print("in", flush=True)
        j.commit([Add("waited", "1")])
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(j.commit([Add("after", "1")]), j.get("half"), flush=True)
sys.stdin.readline()
"""


def test_ctrl_c_inside_guarded_leaves_a_free_lock_and_no_half_transaction(journal):
    child = python(INTERRUPTED, journal.path, "guarded", stdin=subprocess.PIPE)
    assert child.stdout.readline() == "in\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "interrupted\n"
    assert child.stdout.readline() == "[True] None\n"
    assert journal.commit([Add("mine", "1")]) == [True]
    child.communicate("\n")


# -- a paid reply ----------------------------------------------------------------------------------


@pytest.fixture
def broken(journal, monkeypatch, tmp_path):
    """A journal whose every transaction finds the disk full until ``broken.mend()``."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    real = writer.Writer._transact
    journal.paid_retry_seconds = 0.05

    def full(self, jobs, *, drain):
        if drain:
            self._drain(jobs)
        raise JournalFull("full")

    monkeypatch.setattr(writer.Writer, "_transact", full)
    journal.mend = lambda: monkeypatch.setattr(writer.Writer, "_transact", real)
    return journal


def test_a_paid_reply_is_spilled_served_and_taken_in_by_the_next_commit(broken, caplog):
    with pytest.raises(JournalFull):
        broken.commit([Add("plain", "1")])
    assert broken.commit([Add("r/2", "paid"), Put("doc", "new")], paid=True) == [True, True]
    assert "saved in" in caplog.text
    assert (broken.get("r/2"), broken.get("doc"), broken.get("plain")) == ("paid", "new", None)
    assert list(broken.scan("r/")) == [("r/2", "paid")]
    assert [key for _, key, _ in broken.rows("r/", from_rowid=0, limit=5)] == ["r/2"]
    assert len(list(broken.path.glob("spill-*.json"))) == 1
    broken.mend()
    broken.commit([Add("r/1", "v"), Add("r/2", "other")])
    assert list(broken.scan("r/")) == [("r/1", "v"), ("r/2", "paid")]
    assert sql(broken.path, "SELECT value FROM Cache WHERE key = 'r/2'") == [("paid",)]
    assert not list(broken.path.glob("spill-*"))
    assert broken._writer.before is None


def test_a_record_that_is_committed_alone_takes_in_what_was_spilled_before_it(broken):
    insert = "INSERT INTO Cache (key, raw, mode, value) VALUES ('lease/r', 1, 1, ?)"
    sql(broken.path, insert, '{"token":7,"pid":1}')
    assert broken.commit([Add("r/2", "paid")], paid=True) == [True]
    broken.mend()
    assert broken.commit([Add("r/2", "other")], fence=Fence("lease/r", 7)) == [False], "the reply was there first"
    assert sql(broken.path, "SELECT value FROM Cache WHERE key = 'r/2'") == [("paid",)]


async def test_a_paid_reply_spilled_by_a_coroutine_survives_the_process(broken):
    assert await broken.acommit([Add("a", "paid")], paid=True) == [True]
    path = broken.path
    broken.mend()
    broken.close()
    again = Journal.open(path)
    assert sql(path, "SELECT value FROM Cache WHERE key = 'a'") == [("paid",)]
    assert not list(path.glob("spill-*"))
    again.close()


async def test_a_cancelled_paid_commit_is_spilled(broken):
    broken.paid_retry_seconds = 60
    task = asyncio.create_task(broken.acommit([Add("a", "paid")], paid=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert broken.get("a") == "paid"


def test_a_paid_reply_finds_the_temp_directory_when_its_own_is_full(broken, monkeypatch):
    from agentflow.spill import Spill

    real = Spill._write

    def full_here(self, folder, ops, fence):
        if folder == broken.path:
            raise OSError(28, "No space left on device")
        return real(self, folder, ops, fence)

    monkeypatch.setattr(Spill, "_write", full_here)
    broken.commit([Add("a", "paid")], paid=True)
    folder = Path(os.environ["TMPDIR"]) / f"agentflow-{os.getuid()}-{broken.id}"
    assert len(list(folder.glob("spill-*.json"))) == 1
    broken.mend()
    broken.close()
    again = Journal.open(broken.path)
    assert again.get("a") == "paid" and not list(folder.glob("spill-*"))
    again.close()


def test_a_spilled_document_of_a_lost_lease_is_not_written_but_the_reply_is(broken):
    broken.mend()
    broken.commit([Put("lease/r", '{"token":1,"x":1}'), Put("doc", "old")])
    broken._keep([Add("reply", "paid"), Put("doc", "stale")], Fence("lease/r", 1))
    broken._writer.before = None
    broken.commit([Put("lease/r", '{"token":2,"x":1}'), Put("doc", "newer")])
    broken._writer.before = broken._take_in
    broken.commit([Add("x", "1")])
    assert (broken.get("reply"), broken.get("doc")) == ("paid", "newer")


# -- the default place -----------------------------------------------------------------------------


def test_the_default_place_is_the_project_of_the_script_then_of_the_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("AGENTFLOW_PATH", raising=False)
    script = tmp_path / "p" / "pkg" / "main.py"
    script.parent.mkdir(parents=True)
    (tmp_path / "q" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "q" / "deep")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", str(script), raising=False)
    assert default_path() == script.parent / ".agentflow"
    (tmp_path / "q" / ".git").mkdir()
    assert default_path() == tmp_path / "q" / ".agentflow"
    (tmp_path / "p" / "pyproject.toml").write_text("")
    assert default_path() == tmp_path / "p" / ".agentflow"
    monkeypatch.delattr(main, "__file__")
    assert default_path() == tmp_path / "q" / ".agentflow"
    monkeypatch.setenv("AGENTFLOW_PATH", "~/x")
    assert default_path() == Path.home() / "x"


def test_the_default_place_asks_only_once_where_python_is_installed(tmp_path, monkeypatch):
    monkeypatch.delenv("AGENTFLOW_PATH", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "main.py"), raising=False)
    (tmp_path / "pyproject.toml").write_text("")
    default_path()
    monkeypatch.setattr("sysconfig.get_paths", lambda *args: pytest.fail("asked again"))
    assert default_path() == tmp_path / ".agentflow"


@pytest.mark.parametrize("mapped", [True, False], ids=["through memory", "with write()"])
def test_the_lower_bound_of_commits_survives_a_killed_process(tmp_path, mapped):
    folder = tmp_path / "journal"
    program = f"""
import os, signal
from pathlib import Path
from agentflow import layout
layout.can_map = lambda folder: {mapped}
from agentflow.journal import Add, Fence, Journal, Put
journal = Journal.open(Path({str(folder)!r}))
assert (journal._backend._counter is not None) is {mapped}
journal.commit([Put("lease/r", '{{"token":7,"pid":1}}')])
fence = Fence("lease/r", 7)
for i in range(7):
    journal.commit([Add(f"k{{i}}", "v")], fence=fence if i else None)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    # Eight rows, and two transactions that were more than one statement.
    assert layout.read_sibling(folder).commits == 10


@pytest.mark.parametrize(("kind", "safe"), [("ext4", True), ("tmpfs", True), ("btrfs", False), ("zfs", False)])
def test_files_are_mapped_only_where_a_full_disk_cannot_kill_the_process(kind, safe):
    assert layout.can_map(Path("/data/journal"), f"dev / ext4 rw 0 0\ndev /data {kind} rw 0 0\n") is safe


CLOSED_WHILE_READ = """
import sys, threading
from pathlib import Path
from agentflow.errors import UsageError
from agentflow.journal import Add, Journal

def read(journal, ended):
    try:
        while True:
            for k in range(50):
                journal.get(f"a/{k:04d}")
            list(journal.scan("a/"))
    except UsageError as error:
        ended.append(str(error))

for i in range(150):
    journal = Journal.open(Path(sys.argv[1]) / str(i))
    journal.commit([Add(f"a/{k:04d}", "x" * 2000) for k in range(100)])
    ended = []
    threads = [threading.Thread(target=read, args=(journal, ended)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not ended:  # they are at it
        if journal.get("a/0099") is not None and all(thread.is_alive() for thread in threads):
            break
    journal.close()
    for thread in threads:
        thread.join()
    assert len(ended) == 2 and all("is closed" in text for text in ended), ended
"""


def test_a_journal_that_is_closed_while_other_threads_read_says_so_to_them(tmp_path):
    """SQLite would take the process down: threads that nobody waits for are at work when a program ends."""
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_WHILE_READ, str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
