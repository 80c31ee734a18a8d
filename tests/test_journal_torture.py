"""Kills, races and full disks. Small numbers run in the default suite, large ones under the torture marker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentflow.errors import JournalFull, JournalReadOnly
from agentflow.journal import Add, Journal
from agentflow.lease import alive, holder
from tests.programs import stop_between_commits

ROOT = Path(__file__).parent.parent
torture = pytest.mark.torture


def start(code: str, *args: object, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


COMMITTER = """
import asyncio, sys
from agentflow.journal import Add, Journal, Put
journal = Journal.open(sys.argv[1])
life, mode = sys.argv[2], sys.argv[3]
async def one(number):
    # Three rows that belong together, one of them shared with every other commit.
    ops = [Add(f"row/{life}/{number:06}", "v" * 500), Put("last/" + life, str(number)), Add(f"pair/{life}/{number:06}", "v")]
    assert (await journal.acommit(ops) if mode == "many" else journal.commit(ops)) == [True, True, True]
    print(number, flush=True)
async def main():
    for start in range(0, 100000, 8):
        await asyncio.gather(*[one(start + offset) for offset in range(8)])
asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["one", "many"])
@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=torture)])
def test_no_acknowledged_record_is_lost_to_kills(tmp_path, kills, mode):
    folder = tmp_path / "j"
    acknowledged: dict[int, set[str]] = {}
    seeded = random.Random(kills)
    for life in range(kills):
        child = start(COMMITTER, folder, life, mode)
        lines = [child.stdout.readline() for _ in range(seeded.randrange(1, 60))]
        child.send_signal(signal.SIGKILL)
        # communicate() would lose what readline() has read ahead.
        rest, err = child.stdout.read(), child.stderr.read()
        child.communicate()
        assert child.returncode == -signal.SIGKILL and err == ""
        text = "".join(lines) + rest
        # The last line may be torn by the kill.
        acknowledged[life] = set(text[: text.rfind("\n") + 1].split())
    journal = Journal.open(folder)
    total = 0
    for life, numbers in acknowledged.items():
        rows = [key.rpartition("/")[2] for key, _ in journal.scan(f"row/{life}/")]
        assert len(rows) == len(set(rows))
        assert {f"{int(number):06}" for number in numbers} <= set(rows)
        assert rows == [key.rpartition("/")[2] for key, _ in journal.keys(f"pair/{life}/")], "half a transaction"
        # Eight are in flight at once, and one more acknowledgement may be the line that the kill has torn.
        assert len(rows) - len(numbers) <= 9, "more than what was in flight went unacknowledged"
        total += len(numbers)
    assert total >= kills
    journal.close()


RACER = """
import asyncio, sys
from agentflow.journal import Add, Journal
sys.stdin.readline()
journal = Journal.open(sys.argv[1])
async def main():
    won = []
    async def one(number):
        if (await journal.acommit([Add(f"key/{number:05}", sys.argv[2])]))[0]:
            won.append(number)
    for start in range(0, int(sys.argv[3]), 10):
        await asyncio.gather(*[one(start + offset) for offset in range(10)])
    print(*won)
asyncio.run(main())
"""


@pytest.mark.parametrize(("processes", "keys"), [(4, 100), pytest.param(8, 3000, marks=torture)])
def test_each_key_has_one_winner_among_processes(tmp_path, processes, keys):
    children = [start(RACER, tmp_path / "j", number, keys) for number in range(processes)]
    won: dict[int, str] = {}
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    for number, child in enumerate(children):
        out, err = child.communicate()
        assert err == ""
        for key in map(int, out.split()):
            assert key not in won, "two processes were told that they had won"
            won[key] = str(number)
    journal = Journal.open(tmp_path / "j")
    assert {int(key[4:]): value for key, value in journal.scan("key/")} == won
    assert len(won) == keys
    journal.close()


CONTENDER = """
import os, sys, time
from agentflow.errors import LeaseLost, RunBusy
from agentflow.journal import Add, Journal
from agentflow.lease import acquire
journal = Journal.open(sys.argv[1])
goal = int(sys.argv[2])
while True:
    try:
        lease = acquire(journal, "lease/r", what="run r")
    except RunBusy:
        time.sleep(0.005)
        continue
    number = sum(1 for _ in journal.keys("step/"))
    try:
        while number < goal:
            # Had somebody else committed this step under a later token, this Add would be lost in silence.
            done = journal.commit([Add(f"step/{number:05}", str(lease.token))], fence=lease.fence)
            assert done == [True], "a step was committed twice"
            number += 1
            time.sleep(0.001)
        lease.release()
        break
    except LeaseLost:
        print("lost", flush=True)
"""


@pytest.mark.parametrize(("steps", "blows"), [(300, 3), pytest.param(4000, 40, marks=torture)])
def test_fenced_commits_with_takeovers_leave_no_gap_and_no_double(tmp_path, steps, blows):
    """Owners are killed, or paused past their lease and woken again, while others take over."""
    folder = tmp_path / "j"
    journal = Journal.open(folder)
    children = [start(CONTENDER, folder, steps, AGENTFLOW_LEASE_SECONDS="0.3") for _ in range(3)]
    taken = set()
    stopped = []
    deadline = time.monotonic() + 15 + 2 * blows
    while len(taken) < blows and time.monotonic() < deadline and any(child.poll() is None for child in children):
        owner = holder(journal, "lease/r")
        if owner is None or owner.token in taken or not alive(owner):
            time.sleep(0.002)
            continue
        if not any(value == str(owner.token) for _, value in journal.scan("step/", reverse=True, limit=1)):
            time.sleep(0.002)  # it has committed nothing yet
            continue
        taken.add(owner.token)
        if len(taken) % 2:
            stop_between_commits(folder, owner.pid)
            stopped.append(owner.pid)
        else:
            os.kill(owner.pid, signal.SIGKILL)
            children.append(start(CONTENDER, folder, steps, AGENTFLOW_LEASE_SECONDS="0.3"))
        if len(stopped) > 1:
            os.kill(stopped.pop(0), signal.SIGCONT)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    for child in children:
        out, err = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), err
    rows = list(journal.scan("step/"))
    assert [key for key, _ in rows] == [f"step/{number:05}" for number in range(steps)]
    tokens = [int(value) for _, value in rows]
    assert tokens == sorted(tokens), "a later owner's step comes before an earlier one's"
    assert len(taken) == blows and len(set(tokens)) > 1
    journal.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "agentflow-test", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    for opened in (Journal.open(folder / "j"),) if (folder / "j" / "journal.json").exists() else ():
        opened.close()
    subprocess.run(["umount", str(folder)], check=True)


def fill(journal: Journal, prefix: str) -> list[str]:
    kept = []
    with pytest.raises(JournalFull, match="disk is full"):
        for number in range(1000):
            journal.commit([Add(f"{prefix}/{number:04}", "v" * 8000)])
            kept.append(f"{prefix}/{number:04}")
    return kept


def test_a_full_disk_refuses_new_records_and_keeps_the_old_ones(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 500_000)
    journal = Journal.open(small_disk / "j")
    kept = fill(journal, "a")
    assert len(kept) > 10
    assert [key for key, _ in journal.scan("a/")] == kept
    ballast.unlink()
    assert journal.commit([Add("b", "1")]) == [True]
    journal.close()
    again = Journal.open(small_disk / "j")
    assert [key for key, _ in again.scan("a/")] == kept and again.get("b") == "1"
    again.close()


def test_a_paid_reply_survives_a_full_disk_and_the_process(small_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 500_000)
    journal = Journal.open(small_disk / "j")
    fill(journal, "a")
    for name in range(1000):  # no room for a spill file either
        try:
            (small_disk / f"more{name}").write_bytes(b"x" * 4096)
        except OSError:
            break
    journal.paid_retry_seconds = 0.05
    reply = "paid " * 20_000
    assert journal.commit([Add("reply", reply)], paid=True) == [True]
    assert journal.get("reply") == reply
    code = "import sys; from agentflow.journal import Journal; print(len(Journal.open(sys.argv[1]).get('reply') or ''))"
    assert start(code, small_disk / "j").communicate()[0].strip() == str(len(reply))
    ballast.unlink()
    assert journal.commit([Add("b", "1")]) == [True]
    journal.close()
    again = Journal.open(small_disk / "j")
    assert again.get("reply") == reply
    assert not list((tmp_path / "tmp").rglob("spill-*"))
    again.close()


def test_a_file_system_mounted_read_only_is_named(small_disk):
    Journal.open(small_disk / "j").close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        for name in ("j", "new"):
            with pytest.raises(JournalReadOnly, match="AGENTFLOW_PATH"):
                Journal.open(small_disk / name)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@torture
def test_time_and_memory_grow_linearly_with_100_000_records(tmp_path):
    journal = Journal.open(tmp_path / "j")
    for start_at in range(0, 100_000, 1000):
        journal.commit([Add(f"run/r/{number:06}", "v" * 200) for number in range(start_at, start_at + 1000)])
        journal.commit([Add(f"other/{start_at}", "v")])
    started = time.perf_counter()
    assert sum(1 for _ in journal.scan("run/r/")) == 100_000
    scanned = time.perf_counter() - started
    seen, position = 0, 0
    while window := journal.rows("run/r/", from_rowid=position, limit=5000):
        seen += len(window)
        position = window[-1][0] + 1
    windowed = time.perf_counter() - started - scanned
    assert seen == 100_000
    assert scanned < 3 and windowed < 5, (scanned, windowed)
    journal.close()
