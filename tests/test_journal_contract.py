"""What every journal promises, whatever keeps it: in files and in PostgreSQL alike."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agentflow.cancelled import CancelledAfterCommit
from agentflow.errors import JournalBusy, LeaseLost, UsageError
from agentflow.journal import Add, Drop, Fence, Journal, Put
from tests.conftest import Kept

ROOT = Path(__file__).parent.parent


@pytest.fixture
def journal(kept: Kept) -> Journal:
    return kept.journal


def python(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def owned(journal: Journal, token: int = 7) -> Fence:
    """A lease row as lease.py writes it, and the fence of its owner."""
    journal.commit([Put("lease/r", f'{{"token":{token},"pid":1}}')])
    return Fence("lease/r", token)


# -- records ---------------------------------------------------------------------------------------


def test_the_first_add_wins_and_put_overwrites(journal):
    assert journal.commit([Add("a", "1"), Put("p", "1")]) == [True, True]
    assert journal.commit([Add("a", "2"), Add("b", "1"), Put("p", "2"), Drop("none")]) == [False, True, True, True]
    assert [journal.get(key) for key in ("a", "b", "p", "none")] == ["1", "1", "2", None]


def test_ops_happen_in_order_and_a_dropped_key_can_be_added_again(journal):
    journal.commit([Add("a", "1"), Drop("a"), Add("a", "2")])
    assert journal.get("a") == "2"
    assert journal.commit([]) == []


def test_records_are_there_for_another_process_and_after_reopening(kept):
    kept.journal.commit([Add("ключ/1", "wert é \U0001f600 " * 10_000)])
    code = "import sys; from agentflow.journal import Journal; sys.stdout.buffer.write(Journal.open(sys.argv[1]).get('ключ/1').encode())"
    out = python(code, kept.where).communicate()[0]
    assert out == kept.journal.get("ключ/1")
    assert kept.reopen().get("ключ/1") == out


def test_scan_gives_a_prefix_in_key_order_and_nothing_else(journal):
    names = [f"run/{number:04}" for number in range(700)]
    journal.commit([Add(key, key) for key in [*names, "rum", "run0", "run/", "s", "run/\U0010ffff"]])
    expected = ["run/", *names, "run/\U0010ffff"]
    assert [key for key, _ in journal.scan("run/")] == expected
    assert [key for key, _ in journal.scan("run/", reverse=True)] == expected[::-1]
    assert [key for key, _ in journal.keys("run/")] == expected
    assert [key for key, _ in journal.keys("run/", reverse=True)] == expected[::-1]
    assert [key for key, _ in journal.scan("run/", after="run/0300", before="run/0303")] == ["run/0301", "run/0302"]
    assert [key for key, _ in journal.scan("run/", after="run/0600", limit=3, reverse=True)] == expected[::-1][:3]
    assert len(list(journal.scan("run/", limit=500))) == 500
    assert len(list(journal.scan(""))) == 705
    assert list(journal.scan("run/", limit=0)) == []
    assert [key for key, _ in journal.scan("run/\U0010ffff")] == ["run/\U0010ffff"]


def test_keys_come_byte_by_byte_whatever_the_language(journal):
    """Word order would put B between a and c, and look past the signs."""
    names = ["B", "Z", "a", "a b", "a-b", "a/b", "a0", "ab", "b", "c", "Ä", "ä", "ß", "日", "\U0001f600"]
    journal.commit([Add(name, "") for name in reversed(names)])
    assert [key for key, _ in journal.keys("")] == sorted(names, key=lambda name: name.encode()) == sorted(names)
    assert [key for key, _ in journal.scan("", reverse=True)] == sorted(names, reverse=True)


def test_a_scan_reads_large_values_in_pages_and_does_not_skip_any(journal):
    for number in range(6):
        journal.commit([Add(f"big/{number}", str(number) * 1_500_000)])
    assert [value[0] for _, value in journal.scan("big/")] == list("012345")
    assert [value[0] for _, value in journal.scan("big/", reverse=True)] == list("543210")
    pages = [len(page) for page in journal._reads._pages(True, "big/", None, None, None, False)]
    assert len(pages) > 1 and sum(pages) == 6, "a page is not all there is"


def test_a_scan_holds_no_snapshot_between_its_pages(journal):
    journal.commit([Add(f"k/{number:03}", "v") for number in range(400)])
    seen = journal.scan("k/")
    next(seen)
    journal.commit([Add("k/999", "late")])
    assert list(seen)[-1] == ("k/999", "late")


def test_rows_come_in_the_order_they_were_written_window_by_window(journal):
    for number in range(60):
        journal.commit([Add(f"r/{99 - number}", "v"), Add(f"other/{number}", "v")])
    seen, start = [], 0
    while window := journal.rows("r/", from_rowid=start, limit=7):
        seen += [key for _, key, _ in window]
        start = window[-1][0] + 1
    assert seen == [f"r/{99 - number}" for number in range(60)]
    journal.commit([Add("r/new", "v"), Drop("r/99")])
    assert [key for _, key, _ in journal.rows("r/", from_rowid=start, limit=7)] == ["r/new"]
    assert len(journal.rows("r/", from_rowid=0, limit=100)) == 60
    assert dict(journal.keys("r/"))["r/new"] == max(rowid for _, rowid in journal.keys("r/"))


def test_a_document_that_is_written_again_keeps_its_row(journal):
    journal.commit([Put("doc", "1"), Add("later", "1")])
    before = dict(journal.keys(""))
    journal.commit([Put("doc", "2")])
    assert dict(journal.keys("")) == before


def test_the_version_changes_when_anybody_commits_and_not_otherwise(kept):
    journal = kept.journal
    first = journal.version()
    assert journal.version() == first
    other = python("import sys; from agentflow.journal import *; Journal.open(sys.argv[1]).commit([Put('a', '1')])", kept.where)
    assert other.communicate()[1] == ""
    second = journal.version()
    assert second != first
    journal.commit([Put("a", "2")])
    assert journal.version() != second


# -- transactions ----------------------------------------------------------------------------------


def test_what_was_read_in_guarded_cannot_change_before_it_has_written(journal):
    def count(txn):
        value = int(txn.get("n") or 0) + 1
        txn.put("n", str(value))
        return value

    threads = [threading.Thread(target=lambda: [journal.guarded(count) for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.get("n") == "100"


COUNTS = """
import sys
from agentflow.journal import Add, Journal, Put
journal = Journal.open(sys.argv[1])
def count(txn):
    value = int(txn.get("n") or 0) + 1
    txn.put("n", str(value))
    for key, text in txn.scan("seen/"):
        assert text == "1"
    txn.add(f"seen/{value}", "1")
sys.stdin.readline()
for number in range(25):
    journal.guarded(count)
    journal.commit([Put("plain", sys.argv[2]), Add(f"plain/{sys.argv[2]}/{number}", "1")])
"""


def test_guarded_functions_and_commits_of_four_processes_follow_one_another(kept):
    children = [python(COUNTS, kept.where, number) for number in range(4)]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    assert [child.communicate()[1] for child in children] == [""] * 4
    assert kept.journal.get("n") == "100"
    assert len(list(kept.journal.keys("seen/"))) == len(list(kept.journal.keys("plain/"))) == 100


def test_a_guarded_function_that_raises_has_written_nothing(journal):
    def bad(txn):
        txn.put("a", "1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        journal.guarded(bad)
    assert journal.get("a") is None
    assert journal.commit([Add("b", "1")]) == [True]


def test_committing_inside_guarded_is_refused_instead_of_waiting_for_itself(journal):
    with pytest.raises(UsageError, match="use the Txn"):
        journal.guarded(lambda txn: journal.commit([Add("a", "1")]))


def test_a_commit_without_any_change_costs_no_sync(journal):
    journal.commit([Add("a", "1")])
    before = journal._writer.transactions
    assert journal.commit([Add("a", "2")]) == [False]
    assert journal._writer.transactions == before


@pytest.mark.parametrize("fenced", [True, False])
async def test_200_commits_at_once_share_at_most_10_syncs(journal, fenced):
    fence = owned(journal) if fenced else None
    before = journal._writer.transactions
    commits = [journal.acommit([Add(f"k{number}", "v" * 2000)], fence=fence) for number in range(200)]
    results = await asyncio.gather(*commits)
    assert results == [[True]] * 200
    assert len(list(journal.keys("k"))) == 200
    assert journal._writer.transactions - before <= 10


async def test_a_lost_lease_in_a_shared_transaction_does_not_touch_its_neighbours(journal):
    journal.commit([Put("lease/a", '{"token":2,"x":1}'), Put("lease/b", '{"token":7,"x":1}')])
    fences = [
        Fence("lease/a", 2),
        Fence("lease/a", 1),
        Fence("lease/b", 7),
        Fence("lease/none", 1),
        Fence("lease/b", 70),
    ]
    results = await asyncio.gather(
        *[journal.acommit([Add(f"k{index}", "v")], fence=fence) for index, fence in enumerate(fences)],
        journal.aguarded(lambda txn: (txn.put("half", "1"), 1 / 0)),
        journal.aguarded(lambda txn: txn.add("whole", "1")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [list, LeaseLost, list, LeaseLost, LeaseLost, ZeroDivisionError, bool]
    assert [key for key, _ in journal.keys("k")] == ["k0", "k2"]
    assert (journal.get("half"), journal.get("whole")) == (None, "1")


async def test_of_plain_commits_together_only_those_whose_lease_is_held_are_done(journal):
    journal.commit([Put("lease/a", '{"token":2,"x":1}')])
    tokens = [2, 1, 2, 3, 2]
    results = await asyncio.gather(
        *[journal.acommit([Add(f"k{index}", "v"), Put("last", str(index))], fence=Fence("lease/a", token)) for index, token in enumerate(tokens)],
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [list, LeaseLost, list, LeaseLost, list]
    assert [key for key, _ in journal.keys("k")] == ["k0", "k2", "k4"] and journal.get("last") == "4"


def test_a_commit_under_a_lease_keeps_every_rule(journal):
    fence, other = owned(journal), Fence("lease/r", 6)
    assert journal.commit([Add("a", "1")], fence=fence) == [True]
    assert journal.commit([Add("a", "2")], fence=fence) == [False], "the first one wins"
    for stale in (other, Fence("lease/r", 70), Fence("lease/nobody", 7)):
        with pytest.raises(LeaseLost):
            journal.commit([Add("b", "1")], fence=stale)
    journal.commit([Put("lease/r", '{"token":8,"pid":2}')])
    with pytest.raises(LeaseLost):
        journal.commit([Add("d", "1")], fence=fence)
    assert [journal.get(key) for key in "abd"] == ["1", None, None]


async def test_a_value_that_cannot_be_stored_fails_alone(journal):
    results = await asyncio.gather(
        *[journal.acommit([Add(f"k{number}", "\ud800" if number == 3 else "v")]) for number in range(6)],
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [list] * 3 + [UnicodeEncodeError] + [list] * 2
    assert len(list(journal.keys("k"))) == 5


async def test_a_cancelled_commit_still_happens_and_is_waited_for(kept):
    journal = kept.journal
    with kept.locked():
        task = asyncio.create_task(journal.acommit([Add("a", "1")]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.001)
        assert not task.done()
    with pytest.raises(CancelledAfterCommit) as cancelled:
        await task
    assert cancelled.value.result == [True]
    assert journal.get("a") == "1"
    assert kept.reopen().get("a") == "1"


async def test_the_loop_goes_on_while_another_process_holds_the_lock(kept):
    with kept.locked():
        task = asyncio.create_task(kept.journal.acommit([Add("a", "1")]))
        ticks = 0
        while ticks < 20:
            await asyncio.sleep(0.001)
            ticks += 1
        assert not task.done()
    assert await task == [True]


def test_readers_do_not_wait_for_a_writer(kept):
    kept.journal.commit([Add("a", "1")])
    with kept.locked():
        assert kept.journal.get("a") == "1"
        assert list(kept.journal.scan("a")) == [("a", "1")]


def test_a_lock_that_is_never_released_ends_in_an_error_that_says_what_to_do(kept):
    kept.journal._writer.busy_seconds = 0.05
    with kept.locked(), pytest.raises(JournalBusy, match="end it, and run this again"):
        kept.journal.commit([Add("a", "1")])
    kept.journal._writer.busy_seconds = 30
    assert kept.journal.commit([Add("a", "1")]) == [True]


def test_a_paid_commit_waits_for_a_lock_only_as_long_as_its_limit_and_is_spilled(kept, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    journal = kept.journal
    journal.paid_retry_seconds = 0.1
    with kept.locked():
        assert journal.commit([Add("a", "paid")], paid=True) == [True]
        assert journal.get("a") == "paid" and "a" not in kept.rows()
        assert list(journal.scan("a")) == [("a", "paid")]
    journal.commit([Add("b", "1"), Add("a", "other")])
    assert kept.rows() == {"a": "paid", "b": "1"}
    assert journal.get("a") == "paid" and not journal._spill


def test_a_spilled_reply_survives_the_process_that_has_paid_for_it(kept, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    code = """
import os, sys
from agentflow.journal import Add, Journal
journal = Journal.open(sys.argv[1])
journal.paid_retry_seconds = 0.05
assert journal.commit([Add("a", "paid")], paid=True) == [True]
os.kill(os.getpid(), 9)
"""
    with kept.locked():
        child = python(code, kept.where)
        assert "saved in" in child.communicate()[1] and child.returncode == -signal.SIGKILL
    assert kept.reopen().get("a") == "paid" == kept.rows()["a"]


def test_a_lost_lease_refuses_a_paid_commit_without_spilling(journal):
    with pytest.raises(LeaseLost):
        journal.commit([Add("a", "1")], fence=Fence("lease/r", 3), paid=True)
    assert journal.get("a") is None and not journal._spill


# -- opening ---------------------------------------------------------------------------------------


def test_one_object_per_place_and_process(kept):
    assert Journal.open(kept.where) is kept.journal
    with pytest.raises(UsageError, match=r"closed: open it again"):
        closed = kept.journal
        kept.reopen()
        closed.commit([Add("a", "1")])
    with pytest.raises(UsageError, match=r"closed: open it again"):
        closed.get("a")


def test_a_forked_child_and_its_parent_both_go_on(kept):
    journal = kept.journal
    journal.commit([Add("a", "1")])
    assert journal.get("a") == "1"
    code = """
import asyncio, os, sys
from agentflow.journal import Add, Journal
journal = Journal.open(sys.argv[1])
journal.commit([Add("parent/1", "1")])
assert journal.get("a") == "1"
pid = os.fork()
who = "child" if pid == 0 else "parent"
for number in range(2, 10):
    assert journal.commit([Add(f"{who}/{number}", "1")]) == [True]
    assert journal.get(f"{who}/{number}") == "1"
async def together():
    await asyncio.gather(*[journal.acommit([Add(f"{who}/c{number}", "1")]) for number in range(5)])
asyncio.run(together())
if pid == 0:
    journal.close()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert journal.commit([Add("after", "1")]) == [True]
"""
    child = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, kept.where], cwd=ROOT, capture_output=True, text=True)
    assert (child.stdout.strip(), child.stderr) == ("0", "")
    assert len(list(journal.keys("child/"))) == 13 and len(list(journal.keys("parent/"))) == 14


def test_eight_processes_can_open_a_new_journal_at_once(kept, tmp_path):
    code = (
        "import sys; from agentflow.journal import Journal, Add; sys.stdin.readline(); j = Journal.open(sys.argv[1]); "
        "print(j.id, j.commit([Add('first', sys.argv[2]), Add(sys.argv[2], '1')]))"
    )
    new = str(tmp_path / "new") if kept.server is None else kept.where + "_new"
    children = [python(code, new, number) for number in range(8)]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    outs = [child.communicate() for child in children]
    assert [err for _, err in outs] == [""] * 8
    assert len({out.split()[0] for out, _ in outs}) == 1
    assert sum("[True, True]" in out for out, _ in outs) == 1
    assert sum("[False, True]" in out for out, _ in outs) == 7


# -- marks -----------------------------------------------------------------------------------------


def test_marks_are_kept_in_order_and_cleared(journal):
    for run in ("a/b", "a%2fb", "ä" * 300):
        journal.mark(run, f"one {run}")
        journal.mark(run, "two")
        assert journal.marks(run) == [f"one {run}", "two"]
        journal.clear_marks(run)
        assert journal.marks(run) == []
    journal.mark("a/b", "three")
    assert journal.marks("a/b") == ["three"]
    with pytest.raises(UsageError, match="one line"):
        journal.mark("a/b", "four\nfive")


def test_a_mark_survives_the_kill_of_its_process(kept):
    code = (
        "import sys, os; from agentflow.journal import Journal; j = Journal.open(sys.argv[1]); j.mark('r', 'x'); "
        "os.kill(os.getpid(), 9)"
    )
    child = python(code, kept.where)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert kept.journal.marks("r") == ["x"]


# -- Ctrl-C ----------------------------------------------------------------------------------------

INTERRUPTED = """
import sys
from agentflow.journal import Journal, Add
j = Journal.open(sys.argv[1])
try:
    print("in", flush=True)
    j.commit([Add("waited", "1")])
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(j.commit([Add("after", "1")]), flush=True)
sys.stdin.readline()
"""


def test_ctrl_c_while_waiting_for_the_lock_returns_at_once_and_leaves_the_lock_free(kept):
    with kept.locked():
        child = python(INTERRUPTED, kept.where)
        assert child.stdout.readline() == "in\n"
        deadline = time.monotonic() + 30
        while len(os.listdir(f"/proc/{child.pid}/task")) < 2 and time.monotonic() < deadline:
            pass
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
    assert child.stdout.readline() == "[True]\n"
    assert kept.journal.commit([Add("mine", "1")]) == [True]
    child.communicate("\n")
