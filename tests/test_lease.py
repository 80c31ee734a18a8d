"""What leases promise: one owner, a dead one is replaced at once, a replaced one commits nothing more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentflow import lease as leases
from agentflow.errors import LeaseLost, RunBusy
from agentflow.journal import Add, Journal, Put
from agentflow.lease import aacquire, acquire, alive, holder
from tests.conftest import Kept
from tests.programs import stop_between_commits

ROOT = Path(__file__).parent.parent

OWNER = """
import sys
from agentflow.journal import Add, Journal
from agentflow.lease import acquire
journal = Journal.open(sys.argv[1])
lease = acquire(journal, "lease/r", what="run r")
print(lease.token, flush=True)
for line in sys.stdin:
    try:
        journal.commit([Add(line.strip(), "1")], fence=lease.fence)
        print("ok", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture
def journal(kept: Kept) -> Journal:
    return kept.journal


@pytest.fixture
def owner(journal):
    """Starts processes that own lease/r, with the given length of a lease."""
    children = []

    def start(seconds: float = 30) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(journal.path)],
            cwd=ROOT,
            env={**os.environ, "AGENTFLOW_LEASE_SECONDS": str(seconds)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        child.token = int(child.stdout.readline())
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def ask(child: subprocess.Popen, key: str) -> str:
    child.stdin.write(key + "\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def edit(journal, key="lease/r", **changes) -> None:
    row = json.loads(journal.get(key))
    journal.commit([Put(key, json.dumps({**row, **changes}, separators=(",", ":")))])


def test_taking_a_lease_commits_its_ops_in_one_sync(journal):
    before = journal._writer.transactions
    lease = acquire(journal, "lease/r", what="run r", ops=[Add("run/r", "1")])
    assert journal._writer.transactions == before + 1
    assert journal.get("run/r") == "1"
    assert journal.commit([Add("a", "1")], fence=lease.fence) == [True]


def test_tokens_rise_with_every_acquisition_even_after_a_release(journal):
    tokens = []
    for _ in range(3):
        lease = acquire(journal, "lease/r", what="run r")
        tokens.append(lease.token)
        lease.release([Add(f"done/{lease.token}", "1")])
        assert journal.get(f"done/{lease.token}") == "1"
    assert tokens == [1, 2, 3]
    assert not alive(holder(journal, "lease/r"))
    assert holder(journal, "lease/other") is None


async def test_leases_can_be_taken_and_released_from_a_coroutine(journal):
    lease = await aacquire(journal, "lease/r", what="run r")
    await lease.arelease([Add("done", "1")])
    assert journal.get("done") == "1" and not alive(holder(journal, "lease/r"))


def test_a_second_acquisition_in_this_process_is_refused_and_says_so(journal):
    acquire(journal, "lease/r", what="run r")
    with pytest.raises(RunBusy, match=r"run r is already running in this process.*busy=\"wait\"") as caught:
        acquire(journal, "lease/r", what="run r", run_id="r", ops=[Add("never", "1")])
    assert caught.value.run_id == "r" and caught.value.owner["pid"] == os.getpid()
    assert journal.get("never") is None


def test_a_living_owner_is_named_with_how_to_stop_it(journal, owner):
    child = owner()
    with pytest.raises(
        RunBusy, match=rf"process {child.pid} on this machine.*since.*`kill {child.pid}`.*busy=\"wait\""
    ):
        acquire(journal, "lease/r", what="run r")
    assert alive(holder(journal, "lease/r"))


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_replaced_at_once(journal, owner, reaped):
    child = owner()
    child.kill()
    if reaped:
        child.wait()
    else:  # what is left of it is a zombie
        until(lambda: leases._start_of(child.pid) is None)
    assert not alive(holder(journal, "lease/r"))
    assert acquire(journal, "lease/r", what="run r").token == child.token + 1


def test_a_process_id_that_was_given_to_another_process_does_not_hold_a_lease(journal):
    acquire(journal, "lease/r", what="run r")
    edit(journal, start="12345", owner="somebody")
    assert acquire(journal, "lease/r", what="run r").token == 2


@pytest.mark.parametrize("elsewhere", [{"host": "far"}, {"boot": "earlier"}])
def test_an_owner_elsewhere_is_replaced_only_when_its_lease_has_run_out(journal, elsewhere):
    acquire(journal, "lease/r", what="run r")
    edit(journal, owner="x", pid=2**22 + 1, **elsewhere)
    with pytest.raises(RunBusy, match=r"it can be taken over in (29|30)\."):
        acquire(journal, "lease/r", what="run r")
    edit(journal, expires=time.time() - 1)
    assert acquire(journal, "lease/r", what="run r").token == 2


def test_an_owner_goes_on_after_its_lease_ran_out_when_nobody_took_over(journal):
    lease = acquire(journal, "lease/r", what="run r")
    edit(journal, expires=time.time() - 60)
    assert journal.commit([Add("a", "1")], fence=lease.fence) == [True]


def test_a_replaced_owner_can_neither_commit_nor_release(journal):
    old = acquire(journal, "lease/r", what="run r")
    edit(journal, expires=time.time() - 1)
    new = acquire(journal, "lease/r", what="run r")
    with pytest.raises(LeaseLost):
        journal.commit([Add("a", "1")], fence=old.fence)
    with pytest.raises(LeaseLost):
        old.release([Add("b", "1")])
    assert old.lost and (journal.get("a"), journal.get("b")) == (None, None)
    old.release()
    assert alive(holder(journal, "lease/r")) and holder(journal, "lease/r").token == new.token


def test_an_owner_paused_past_its_lease_commits_nothing_after_it_was_replaced(journal, owner):
    child = owner(seconds=0.3)
    assert ask(child, "before") == "ok"
    stop_between_commits(journal.path, child.pid)
    until(lambda: not alive(holder(journal, "lease/r")))
    lease = acquire(journal, "lease/r", what="run r")
    os.kill(child.pid, signal.SIGCONT)
    assert ask(child, "after") == "LeaseLost"
    assert (journal.get("before"), journal.get("after")) == ("1", None)
    assert journal.commit([Add("mine", "1")], fence=lease.fence) == [True]


def test_an_owner_paused_past_its_lease_goes_on_when_nobody_came(journal, owner):
    child = owner(seconds=0.3)
    stop_between_commits(journal.path, child.pid)
    until(lambda: not alive(holder(journal, "lease/r")))
    os.kill(child.pid, signal.SIGCONT)
    assert ask(child, "after") == "ok"


def test_a_heartbeat_keeps_all_leases_of_a_process_and_marks_lost_ones(journal, monkeypatch):
    monkeypatch.setenv("AGENTFLOW_LEASE_SECONDS", "0.3")
    held = [acquire(journal, f"lease/{number}", what="run") for number in range(3)]
    first = holder(journal, "lease/0").expires
    until(lambda: holder(journal, "lease/0").expires > first)
    assert holder(journal, "lease/2").expires > first
    edit(journal, "lease/1", token=9)
    until(lambda: held[1].lost)
    assert not held[0].lost and not held[2].lost
    heart = leases._heart(journal)
    for lease in held:
        lease.release()
    until(lambda: heart._thread is None)


def test_beats_of_many_leases_share_one_sync(journal):
    held = [acquire(journal, f"lease/{number}", what="run") for number in range(10)]
    before = journal._writer.transactions
    leases._heart(journal).renew(held)
    assert journal._writer.transactions == before + 1


def test_many_short_leases_start_one_thread(journal):
    threads = set()
    for number in range(20):
        acquire(journal, f"claim/{number}", what="step").release()
        threads.add(leases._heart(journal)._thread)
    assert len(threads) == 1 and None not in threads


def test_a_forked_child_does_not_own_its_parents_leases(journal):
    acquire(journal, "lease/r", what="run r")
    code = """
import os, sys
from agentflow.journal import Journal
from agentflow.lease import acquire
from agentflow.errors import RunBusy
journal = Journal.open(sys.argv[1])
acquire(journal, "lease/f", what="run f")
pid = os.fork()
if pid == 0:
    try:
        acquire(journal, "lease/f", what="run f")
    except RunBusy as error:
        os._exit(3 if f"process {os.getppid()} on this machine" in str(error) else 4)
    os._exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(journal.path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (out.stdout.strip(), out.stderr) == ("3", "")
