"""One owner for a run, one execution for a key: several processes ask at once, die, are stopped and wake up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentflow import opening, runs, step, workflow
from agentflow.errors import LeaseLost, RunBusy
from agentflow.scratch import open_journal
from agentflow.sync import step as step_sync
from agentflow.sync import workflow as workflow_sync
from tests.programs import environment, notes, stop_between_commits, write_program

# A workflow whose second step waits for a file named after the argument; what it wrote tells who ran it.
OWNED = """
import json, time
from agentflow.errors import LeaseLost, RunBusy

def first():
    note(f"ran first {os.getpid()}")
    return os.getpid()

def second():
    gate = os.environ.get("GATE", "go")
    note(f"ran second {os.getpid()}")
    while not (HERE / gate).exists():
        time.sleep(0.005)
    note(f"left second {os.getpid()}")
    return os.getpid()

def third():
    note(f"ran third {os.getpid()}")
    return os.getpid()

@workflow
async def owned(ctx):
    return [await step("first", first), await step("second", second), await step("third", third)]

try:
    print(json.dumps(owned.options(busy=os.environ.get("BUSY", "raise")).run_sync()))
except RunBusy as error:
    print("busy", error.owner["pid"], error.run_id)
    print(error)
    sys.exit(7)
except LeaseLost as error:
    print("lost", error)
    sys.exit(8)
"""


class Processes:
    """Programs started side by side; none outlives its test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[subprocess.Popen[str]] = []

    def start(self, source: str | Path, *args: str, **env: str) -> subprocess.Popen[str]:
        file = source if isinstance(source, Path) else write_program(source, self.folder)
        process = subprocess.Popen(
            [sys.executable, str(file), *args],
            cwd=self.folder,
            env=environment(self.folder, env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.all.append(process)
        return process

    def end(self, process: subprocess.Popen[str], code: int = 0) -> str:
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, f"ended with {process.returncode}\n{out}\n{err}"
        return out

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{notes(self.folder)}"
            time.sleep(0.005)

    def noted(self, word: str) -> bool:
        return any(line.startswith(word) for line in notes(self.folder))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for process in made.all:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def ran(folder: Path) -> Counter[str]:
    """How often each step's function was called, by all processes."""
    return Counter(line.split()[1] for line in notes(folder) if line.startswith("ran "))


# -- one run --------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_owns_the_run_and_takes_over_at_once_when_it_is_killed(
    processes: Processes, tmp_path: Path
) -> None:
    file = write_program(OWNED, tmp_path)
    owner = processes.start(file, GATE="never")
    processes.until(lambda: processes.noted("ran second"), "the owner is at work")
    (run,) = runs.list()
    assert run.status == "running"

    told = processes.end(processes.start(file), 7)
    assert told.splitlines()[0] == f"busy {owner.pid} {run.id}"
    assert f"kill {owner.pid}" in told and 'busy="wait"' in told
    assert ran(tmp_path) == {"first": 1, "second": 1}

    processes.kill(owner)
    assert runs.get(run.id).status == "interrupted"
    (tmp_path / "go").touch()
    began = time.monotonic()
    heir = processes.start(file)
    assert processes.end(heir).strip() == f"[{owner.pid}, {heir.pid}, {heir.pid}]"
    assert time.monotonic() - began < 25, "the lease of 30 s was waited for"
    assert ran(tmp_path) == {"first": 1, "second": 2, "third": 1}
    assert runs.get(run.id).status == "completed"


def test_waiting_for_a_busy_run_gives_its_result(processes: Processes, tmp_path: Path) -> None:
    file = write_program(OWNED, tmp_path)
    owner = processes.start(file)
    processes.until(lambda: processes.noted("ran second"), "the owner is at work")
    waiting = [processes.start(file, BUSY="wait") for _ in range(2)]
    (tmp_path / "go").touch()
    expected = f"[{owner.pid}, {owner.pid}, {owner.pid}]"
    assert [processes.end(each).strip() for each in (owner, *waiting)] == [expected] * 3
    assert ran(tmp_path) == {"first": 1, "second": 1, "third": 1}


def test_one_who_waits_goes_on_with_the_run_when_its_owner_is_killed(processes: Processes, tmp_path: Path) -> None:
    file = write_program(OWNED, tmp_path)
    owner = processes.start(file, GATE="never")
    processes.until(lambda: processes.noted("ran second"), "the owner is at work")
    heir = processes.start(file, BUSY="wait")
    (tmp_path / "go").touch()
    owner.kill()
    assert processes.end(heir).strip() == f"[{owner.pid}, {heir.pid}, {heir.pid}]"
    assert ran(tmp_path) == {"first": 1, "second": 2, "third": 1}


def test_started_by_eight_processes_with_one_id_it_is_one_run_with_one_result(
    processes: Processes, tmp_path: Path
) -> None:
    source = """
    import json, time

    def work(name):
        note(f"ran {name}")
        time.sleep(0.01)
        return os.getpid()

    @workflow(run_id=lambda name: f"order-{name}")
    async def order(ctx, name: str):
        return [await step("one", work, name), await step("two", work, name)]

    note("ready")
    while not (HERE / "go").exists():
        time.sleep(0.002)
    print(json.dumps(order.options(busy="wait").run_sync(sys.argv[1])))
    """
    file = write_program(source, tmp_path)
    started = [processes.start(file, "other" if i == 7 else "same") for i in range(8)]
    processes.until(lambda: notes(tmp_path).count("ready") == 8, "all are up")
    (tmp_path / "go").touch()
    results = [processes.end(each) for each in started]
    assert len(set(results[:7])) == 1 and results[7] != results[0]
    assert ran(tmp_path) == {"same": 2, "other": 2}
    assert sorted(run.id for run in runs.list()) == ["order-other", "order-same"]
    assert processes.end(processes.start(file, "same")) == results[0], "after completion it is the same result"
    assert ran(tmp_path) == {"same": 2, "other": 2}


def test_an_owner_stopped_past_its_lease_can_commit_nothing_when_it_wakes(
    processes: Processes, tmp_path: Path
) -> None:
    file = write_program(OWNED, tmp_path)
    owner = processes.start(file, GATE="late", AGENTFLOW_LEASE_SECONDS="0.6")
    processes.until(lambda: processes.noted(f"ran second {owner.pid}"), "the owner is at work")
    stop_between_commits(open_journal().path, owner.pid)
    try:
        (tmp_path / "go").touch()
        told = processes.end(processes.start(file, AGENTFLOW_LEASE_SECONDS="0.6", BUSY="wait"))
    finally:
        (tmp_path / "late").touch()
        os.kill(owner.pid, signal.SIGCONT)
    heir = processes.all[-1].pid
    assert told.strip() == f"[{owner.pid}, {heir}, {heir}]"
    assert "lost" in processes.end(owner, 8)
    assert not processes.noted(f"ran third {owner.pid}"), "it went on with a run that is not its own any more"
    (run,) = runs.list()
    assert run.status == "completed" and run.output == [owner.pid, heir, heir]
    assert [each.output for each in run.steps] == [owner.pid, heir, heir]
    assert processes.end(processes.start(file)).strip() == told.strip()


def test_an_owner_stopped_past_its_lease_goes_on_when_nobody_took_over(processes: Processes, tmp_path: Path) -> None:
    owner = processes.start(OWNED, AGENTFLOW_LEASE_SECONDS="0.3")
    processes.until(lambda: processes.noted("ran second"), "the owner is at work")
    stop_between_commits(open_journal().path, owner.pid)
    try:
        processes.until(lambda: runs.list()[0].status == "interrupted", "its lease has run out")
    finally:
        os.kill(owner.pid, signal.SIGCONT)
    (tmp_path / "go").touch()
    assert processes.end(owner).strip() == f"[{owner.pid}, {owner.pid}, {owner.pid}]"
    assert ran(tmp_path) == {"first": 1, "second": 1, "third": 1}


def test_a_lease_is_kept_alive_for_as_long_as_its_owner_works(processes: Processes, tmp_path: Path) -> None:
    file = write_program(OWNED, tmp_path)
    owner = processes.start(file, AGENTFLOW_LEASE_SECONDS="0.3")
    processes.until(lambda: processes.noted("ran second"), "the owner is at work")
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        assert runs.list()[0].status == "running"
        time.sleep(0.02)
    (tmp_path / "go").touch()
    processes.end(owner)


# -- one key --------------------------------------------------------------------------------------

KEYED = """
import json, time

def charge():
    note(f"ran charge {os.getpid()}")
    gate = os.environ.get("GATE")
    while gate and not (HERE / gate).exists():
        time.sleep(0.005)
    time.sleep(0.05)
    return os.getpid()

@workflow
async def pay(ctx, customer: int):
    return await step("charge", charge, idempotency_key="order-7")

note("ready")
while not (HERE / "go").exists():
    time.sleep(0.002)
if sys.argv[1] == "outside":
    print(asyncio.run(step("charge", charge, idempotency_key="order-7")))
else:
    print(pay.run_sync(int(sys.argv[1])))
"""


@pytest.mark.parametrize("where", [*(pytest.param(each, marks=pytest.mark.torture) for each in ("workflows", "outside")), "both"])
def test_a_keyed_step_that_eight_processes_ask_for_at_once_runs_once(
    where: str, processes: Processes, tmp_path: Path
) -> None:
    file = write_program(KEYED, tmp_path)
    arguments = [str(i) if where == "workflows" or (where == "both" and i % 2) else "outside" for i in range(8)]
    started = [processes.start(file, argument) for argument in arguments]
    processes.until(lambda: notes(tmp_path).count("ready") == 8, "all are up")
    (tmp_path / "go").touch()
    results = {processes.end(each) for each in started}
    assert len(results) == 1
    assert ran(tmp_path) == {"charge": 1}


def test_a_keyed_step_whose_process_is_killed_is_run_by_the_next_one(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    file = write_program(KEYED, tmp_path)
    first = processes.start(file, "1", GATE="never")
    processes.until(lambda: processes.noted("ran charge"), "the first is at work")
    second = processes.start(file, "2")
    first.kill()
    assert processes.end(second).strip() == str(second.pid)
    assert processes.end(processes.start(file, "1")).strip() == str(second.pid)
    assert ran(tmp_path) == {"charge": 2}


@pytest.mark.parametrize("where", ["workflow", "outside"])
def test_a_process_stopped_within_a_keyed_step_gets_the_result_of_the_one_that_took_over(
    where: str, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    file = write_program(KEYED, tmp_path)
    mine = "1" if where == "workflow" else "outside"
    first = processes.start(file, mine, GATE="late", AGENTFLOW_LEASE_SECONDS="0.6")
    processes.until(lambda: processes.noted("ran charge"), "the first is at work")
    stop_between_commits(open_journal().path, first.pid)
    try:
        second = processes.start(file, "2", AGENTFLOW_LEASE_SECONDS="0.6")
        assert processes.end(second).strip() == str(second.pid)
    finally:
        (tmp_path / "late").touch()
        os.kill(first.pid, signal.SIGCONT)
    assert processes.end(first).strip() == str(second.pid), "two results under one key"
    assert processes.end(processes.start(file, mine)).strip() == str(second.pid)
    assert {each.output for run in runs.list() for each in run.steps} == {second.pid}


def test_a_process_stopped_within_a_step_outside_a_workflow_gets_what_is_on_record(
    processes: Processes, tmp_path: Path
) -> None:
    source = """
    import time

    def draw():
        note(f"ran draw {os.getpid()}")
        gate = os.environ.get("GATE")
        while gate and not (HERE / gate).exists():
            time.sleep(0.005)
        return os.getpid()

    print(asyncio.run(step("draw", draw)))
    """
    file = write_program(source, tmp_path)
    first = processes.start(file, GATE="late", AGENTFLOW_LEASE_SECONDS="0.6")
    processes.until(lambda: processes.noted("ran draw"), "the first is at work")
    stop_between_commits(open_journal().path, first.pid)
    try:
        second = processes.start(file, AGENTFLOW_LEASE_SECONDS="0.6")
        assert processes.end(second).strip() == str(second.pid)
    finally:
        (tmp_path / "late").touch()
        os.kill(first.pid, signal.SIGCONT)
    assert processes.end(first).strip() == str(second.pid)
    assert processes.end(processes.start(file)).strip() == str(second.pid)


def test_eight_processes_that_ask_for_the_same_step_outside_a_workflow_run_it_once(
    processes: Processes, tmp_path: Path
) -> None:
    file = write_program(KEYED.replace(', idempotency_key="order-7"', ""), tmp_path)
    started = [processes.start(file, "outside") for _ in range(8)]
    processes.until(lambda: notes(tmp_path).count("ready") == 8, "all are up")
    (tmp_path / "go").touch()
    assert len({processes.end(each) for each in started}) == 1
    assert ran(tmp_path) == {"charge": 1}


# -- one process ----------------------------------------------------------------------------------


def test_after_a_long_pause_the_journal_is_asked_who_owns_the_run_before_a_function_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    asked = []
    monkeypatch.setattr("agentflow.run.holder", lambda journal, key: asked.append(key))  # nobody: it was taken away

    @workflow_sync("paused")
    def paused(ctx: Any) -> None:
        ctx._ex.lease.seconds = -1.0  # as if half of it were always over
        step_sync("one", lambda: called.append(1))

    with pytest.raises(LeaseLost):
        paused.run_sync()
    assert len(asked) == 1 and not called


async def test_started_twice_in_one_process_the_second_is_told_to_await_the_first() -> None:
    called: list[int] = []

    async def slow() -> int:
        called.append(1)
        await asyncio.sleep(0.05)
        return len(called)

    @workflow
    async def twice(ctx: Any) -> int:
        return await step("slow", slow)

    one, other = await asyncio.gather(twice.run(), twice.run(), return_exceptions=True)
    assert one == 1 and isinstance(other, RunBusy)
    assert other.owner["pid"] == os.getpid() and "in this process" in str(other)
    assert await asyncio.gather(*[twice.options(busy="wait").run() for _ in range(3)]) == [1, 1, 1]
    assert called == [1]


async def test_started_twice_in_one_process_one_can_wait_for_the_other() -> None:
    called: list[int] = []

    async def slow() -> int:
        called.append(1)
        await asyncio.sleep(0.05)
        return 7

    @workflow
    async def twice(ctx: Any) -> int:
        return await step("slow", slow)

    patient = twice.options(busy="wait")
    assert await asyncio.gather(patient.run(), patient.run(), patient.run()) == [7, 7, 7]
    assert called == [1]
    assert len(runs.list()) == 1


def test_threads_of_one_process_that_start_the_same_run_get_one_result() -> None:
    called: list[int] = []

    def slow() -> int:
        called.append(1)
        time.sleep(0.02)
        return 7

    @workflow_sync
    def twice(ctx: Any) -> int:
        return step_sync("slow", slow)

    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(twice.options(busy="wait").run())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [7] * 5 and called == [1]


async def test_runs_with_other_ids_go_on_side_by_side_in_one_process() -> None:
    together = asyncio.Barrier(3)

    @workflow
    async def each(ctx: Any, number: int) -> int:
        return await step("meet", lambda: together.wait())

    async with asyncio.timeout(10):
        assert sorted(await asyncio.gather(*[each.run(i) for i in range(3)])) == [0, 1, 2]


def test_a_run_that_another_made_and_ended_between_looking_and_taking_is_one_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[int] = []

    @workflow
    async def raced(ctx: Any) -> int:
        return await step("s", lambda: len(called) if called.append(1) is None else 0)

    assert raced.run_sync() == 1
    (run,) = runs.list()
    # What the second process saw when it looked: no such run.
    monkeypatch.setattr(opening, "locate", lambda flow, journal, given: (None, run.id))
    assert raced.run_sync() == 1
    assert [each.id for each in runs.list()] == [run.id] == [runs.get(run.id[:-1]).id]
    assert called == [1]


def test_an_owner_that_ends_lets_go_whatever_its_end(tmp_path: Path) -> None:
    @workflow
    async def ends(ctx: Any, how: str) -> str:
        if how == "fails":
            raise ValueError(how)
        if how == "interrupt":
            raise KeyboardInterrupt
        return how

    for how, error in (("fails", ValueError), ("interrupt", KeyboardInterrupt), ("well", None)):
        for _ in range(2):
            if error is None:
                assert ends.run_sync(how) == how
            else:
                with pytest.raises(error):
                    ends.run_sync(how)
    assert Counter(run.status for run in runs.list()) == {"failed": 1, "interrupted": 1, "completed": 1}


# -- one journal ----------------------------------------------------------------------------------

STRESS = """
import time

def work(worker, number, i):
    note(f"ran {worker}.{number}.{i}")
    return f"{worker}.{number}.{i}"

def shared(i):
    note(f"ran shared.{i}")
    return os.getpid()

@workflow
async def busy(ctx, worker: int, number: int):
    found = await parallel.map(lambda i: step("work", work, worker, number, i), range(5))
    found.append(await step("shared", shared, number, idempotency_key=f"shared-{number}"))
    return found

worker, count = int(sys.argv[1]), int(sys.argv[2])
note("ready")
while not (HERE / "go").exists():
    time.sleep(0.002)
for number in range(count):
    found = busy.run_sync(worker, number)
    assert found[:5] == [f"{worker}.{number}.{i}" for i in range(5)]
    assert busy.run_sync(worker, number) == found
    note(f"ack {number} {found[5]}")
print("done")
"""


def stress(processes: Processes, folder: Path, workers: int, count: int) -> None:
    file = write_program(STRESS, folder)
    started = [processes.start(file, str(worker), str(count)) for worker in range(workers)]
    processes.until(lambda: notes(folder).count("ready") == workers, "all are up")
    (folder / "go").touch()
    for each in started:
        assert processes.end(each) == "done\n"
    counts = ran(folder)
    expected = {f"{w}.{n}.{i}" for w in range(workers) for n in range(count) for i in range(5)}
    expected |= {f"shared.{n}" for n in range(count)}
    assert counts == dict.fromkeys(expected, 1)
    assert len({line for line in notes(folder) if line.startswith("ack")}) == count, "one result for each key"
    listed = runs.list()
    assert len(listed) == workers * count and {run.status for run in listed} == {"completed"}
    for run in listed:
        assert sorted(each.name for each in run.steps) == ["shared", *["work"] * 5]


def test_six_processes_on_one_journal_lose_no_record_and_double_none(processes: Processes, tmp_path: Path) -> None:
    stress(processes, tmp_path, 6, 5)


@pytest.mark.torture
def test_sixteen_processes_on_one_journal_lose_no_record_and_double_none(
    processes: Processes, tmp_path: Path
) -> None:
    stress(processes, tmp_path, 16, 40)
