"""Sync functions in their threads: how they come back, whoever waits for them by then."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentflow import calls, drive, step, sync, workflow
from agentflow.workers import Work, _Threads, in_flight
from tests.programs import notes, run_program

PATIENT = 30.0  # seconds; every function then counts as brief, and is waited for on the spot
QUICK = {"max_attempts": 2, "initial_delay": 0.001, "jitter": False}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> _Threads:
    """Threads of this test alone."""
    threads = _Threads()
    monkeypatch.setattr(drive, "threads", threads)
    return threads


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def work(fn: Callable[..., Any], *args: Any) -> Work:
    return Work(contextvars.copy_context(), fn, args, {})


def as_brief(name: str) -> None:
    place = calls.here.get()
    assert place is not None
    place.ex.brief.add(name)


def waits_on_the_spot(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each wait on the spot came to, as they are made."""
    found: list[bool] = []
    wait = Work.wait

    def waiting(self: Work, seconds: float) -> bool:
        found.append(wait(self, seconds))
        return found[-1]

    monkeypatch.setattr(Work, "wait", waiting)
    return found


# -- threads ----------------------------------------------------------------------------------------------------------


def test_a_thread_that_is_back_is_used_again_the_last_one_first() -> None:
    pool, go = _Threads(), [threading.Event(), threading.Event()]
    first, second = work(go[0].wait, 30), work(go[1].wait, 30)
    for each in (first, second):
        pool.start(each)
    for number, event in enumerate(go):
        event.set()
        until(lambda number=number: len(pool._idle) == number + 1)
    last = pool._idle[-1]
    third = work(threading.get_ident)
    pool.start(third)
    until(lambda: len(pool._idle) == 2)
    assert pool._idle[-1] is last and third.result() != threading.get_ident()


def test_functions_that_run_at_the_same_time_have_a_thread_each() -> None:
    pool, meet = _Threads(), threading.Barrier(3, timeout=60)
    futures = [pool.submit(contextvars.copy_context(), meet.wait, (), {}) for _ in range(3)]
    assert sorted(future.result(60) for future in futures) == [0, 1, 2]


def test_an_idle_thread_keeps_nothing_of_its_last_function_alive() -> None:
    class Big:
        pass

    pool, made = _Threads(), work(Big)
    future = made.future()
    gc.disable()  # what went round in a circle would stay
    try:
        pool.start(made)
        until(lambda: pool._idle)
        seen = weakref.ref(future.result())
        del made, future
        assert seen() is None
    finally:
        gc.enable()


def test_who_is_told_is_told_once_in_the_thread() -> None:
    told: list[Any] = []
    done = work(lambda: "value")
    assert done.tell(lambda: told.append("before"))
    assert done.tell(lambda: told.append(threading.get_ident()))
    thread = threading.Thread(target=done.run)
    thread.start()
    thread.join()
    assert told == [thread.ident] and done.result() == "value"
    assert not done.tell(lambda: told.append("after")) and done.wait(0) and len(told) == 1


def test_a_future_can_be_had_before_and_after_the_function_is_back() -> None:
    def stops() -> Any:
        return next(iter([]))

    good, bad, odd = work(lambda: "value"), work(lambda: 1 // 0), work(stops)
    before = [each.future() for each in (good, bad, odd)]
    assert not any(future.done() for future in before)
    for each in (good, bad, odd):
        each.run()
    for value, error, stopped in (before, [each.future() for each in (good, bad, odd)]):
        assert value.result(0) == "value" and isinstance(error.exception(0), ZeroDivisionError)
        with pytest.raises(RuntimeError, match="stops raised StopIteration") as caught:
            stopped.result(0)
        assert isinstance(caught.value.__cause__, StopIteration)


def test_waiting_on_the_spot_ends_when_the_function_is_back_or_the_time_is_over() -> None:
    pool, go = _Threads(), threading.Event()
    held = work(go.wait, 30)
    pool.start(held)
    assert not held.wait(0)
    go.set()
    assert held.wait(60) and held.result() is True


def test_how_long_a_function_took_is_known() -> None:
    def spins() -> None:
        start = time.perf_counter()
        while time.perf_counter() - start < 0.001:
            pass

    done = work(spins)
    done.run()
    assert done.took >= 0.001


def test_a_function_that_never_comes_back_does_not_keep_the_process(tmp_path: Path) -> None:
    source = """
    import threading
    def never():
        note("begun")
        threading.Event().wait()
    @workflow
    async def flow(ctx):
        try:
            await step("never", never, timeout=0.05)
        except StepTimeout:
            return "gone on"
    print(flow.run_sync())
    """
    assert run_program(source, tmp_path).out.strip() == "gone on"
    assert notes(tmp_path) == ["begun"]


# -- back before anybody awaits it -------------------------------------------------------------------------------------


async def test_a_function_that_is_back_before_it_is_awaited(pool: _Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "start", lambda made: made.run())

    @workflow
    async def flow(ctx: Any) -> Any:
        return await step("quick", lambda: "back")

    async with asyncio.timeout(60):
        assert await flow.run() == "back"


async def test_a_function_that_is_back_just_after_it_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: Work, seconds: float) -> bool:
        until(lambda: self.is_back)
        return False

    monkeypatch.setattr(Work, "wait", late)

    @workflow
    async def flow(ctx: Any) -> Any:
        as_brief("quick")
        return await step("quick", lambda: "back")

    async with asyncio.timeout(60):
        assert await flow.run() == "back"


async def test_only_what_was_brief_the_last_time_is_waited_for_on_the_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits_on_the_spot(monkeypatch)
    waits: list[int] = []

    @workflow
    async def flow(ctx: Any) -> None:
        for brief in (0.0, PATIENT, PATIENT, 0.0, PATIENT):
            monkeypatch.setattr(drive, "BRIEF", brief)  # what counts as brief for the next call
            await step("s", lambda: None)
            await step(f"another {len(waits)}", lambda: None)
            waits.append(len(found))

    await flow.run()
    assert waits == [0, 0, 1, 2, 2]


async def test_a_function_that_is_not_back_on_the_spot_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs the loop to come back."""
    monkeypatch.setattr(drive, "BRIEF", 0.0)
    found = waits_on_the_spot(monkeypatch)
    loop = asyncio.get_running_loop()

    async def help() -> str:
        return "helped"

    @workflow
    async def flow(ctx: Any) -> Any:
        as_brief("needs help")
        return await step("needs help", lambda: asyncio.run_coroutine_threadsafe(help(), loop).result(60))

    assert await flow.run() == "helped"
    assert found == [False]


async def test_other_tasks_get_their_turn_between_brief_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "BRIEF", PATIENT)
    found = waits_on_the_spot(monkeypatch)
    turns, seen = 0, []

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    @workflow
    async def flow(ctx: Any) -> None:
        for number in range(10):
            await step("brief", lambda: None)
            seen.append(turns)
            assert len(found) == number

    task = asyncio.create_task(other())
    await flow.run()
    task.cancel()
    assert len(set(seen)) == 10 and all(found)


# -- the caller is released --------------------------------------------------------------------------------------------


async def test_cancelled_in_the_turn_after_a_brief_function_its_result_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drive, "BRIEF", PATIENT)
    found = waits_on_the_spot(monkeypatch)
    loop = asyncio.get_running_loop()
    charged: list[str] = []
    tasks: list[Any] = []

    def charge() -> str:
        charged.append("charge")
        loop.call_soon_threadsafe(tasks[0].cancel)
        return "paid"

    async def outer() -> Any:
        as_brief("charge")
        tasks.append(asyncio.ensure_future(step("charge", charge)))
        try:
            return await tasks[-1]
        except asyncio.CancelledError:
            raise ConnectionError("once more") from None

    @workflow
    async def flow(ctx: Any) -> Any:
        return await step("outer", outer, retry=QUICK)

    assert await flow.run() == "paid"
    assert charged == ["charge"] and found == [True] and tasks[0].cancelled()
    assert flow.runs()[0].id not in {run for _, run, _ in in_flight}


async def test_cancelled_while_the_loop_is_being_told_the_result_is_recorded(
    pool: _Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    charged: list[str] = []

    def charge() -> str:
        charged.append("charge")
        return "paid"

    async def outer() -> Any:
        task = asyncio.ensure_future(step("charge", charge))
        if calls.current_step().attempt == 1:
            while not charged:  # noqa: ASYNC110 (another thread is looked at)
                await asyncio.sleep(0)
            until(lambda: pool._idle)  # it has told the loop, which this holds up
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            raise ConnectionError("once more") from None

    @workflow
    async def flow(ctx: Any) -> Any:
        return await step("outer", outer, retry=QUICK)

    assert await flow.run() == "paid"
    assert charged == ["charge"] and not complaints


def test_what_comes_back_when_the_loop_is_closed_and_nobody_was_cancelled_is_recorded(tmp_path: Path) -> None:
    source = """
    import threading, time
    inside, go = threading.Event(), threading.Event()
    def charge():
        note("charge")
        inside.set()
        go.wait(30)
        return "paid"
    @workflow
    async def flow(ctx):
        return await step("charge", charge)
    async def begun():
        while not inside.is_set():
            await asyncio.sleep(0)
    if sys.argv[1] == "leave":
        loop = asyncio.new_event_loop()
        task = loop.create_task(flow.run())
        loop.run_until_complete(begun())
        loop.close()
        go.set()
        (run,) = flow.runs()
        deadline = time.monotonic() + 60
        while not (steps := flow.get(run.id).steps) or steps[0].status != "completed":
            assert time.monotonic() < deadline, "nothing was recorded"
            time.sleep(0.001)
        os._exit(0)
    print(flow.run_sync())
    """
    run_program(source, tmp_path, "leave")
    assert run_program(source, tmp_path, "again").out.strip() == "paid"
    assert notes(tmp_path) == ["charge"]


def test_what_is_recorded_on_cancelling_is_not_recorded_again_when_the_loop_is_closed(
    pool: _Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is about to tell the loop: meanwhile the caller is cancelled, and the loop closed."""
    about, go = threading.Event(), threading.Event()
    kept: list[Any] = []
    tell, keep_late = Work.tell, drive.keep_late

    def telling(self: Work, told: Callable[[], Any]) -> bool:
        return tell(self, lambda: about.set() or go.wait(30) and told())

    monkeypatch.setattr(Work, "tell", telling)
    monkeypatch.setattr(drive, "keep_late", lambda current, result: kept.append(result) or keep_late(current, result))

    @workflow
    async def flow(ctx: Any) -> Any:
        return await step("charge", lambda: "paid")

    async def main() -> None:
        task = asyncio.ensure_future(flow.run())
        while not about.is_set():  # noqa: ASYNC110 (another thread is looked at)
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert kept == ["paid"] and not pool._idle
    go.set()
    until(lambda: pool._idle)
    assert kept == ["paid"]
    assert flow.run_sync() == "paid"


def test_ctrl_c_while_a_brief_function_is_waited_for_loses_no_result(tmp_path: Path) -> None:
    """With a loop that leaves Ctrl-C to Python: it is raised where the loop's thread waits."""
    source = """
    import threading, time
    from agentflow import calls, drive
    drive.BRIEF = 30.0
    hit, go = threading.Event(), threading.Event()
    def interrupted(*_):
        if not hit.is_set():
            hit.set()
            raise KeyboardInterrupt
    def charge():
        note("charge")
        if sys.argv[1] == "interrupt":
            while not hit.wait(0.05):  # again: one that comes just before the thread waits does not wake it
                os.kill(os.getpid(), signal.SIGINT)
            go.wait(30)
        return "paid"
    @workflow
    async def flow(ctx):
        calls.here.get().ex.brief.add("charge")
        return await step("charge", charge)
    if sys.argv[1] == "interrupt":
        signal.signal(signal.SIGINT, interrupted)
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(flow.run())
        except KeyboardInterrupt:
            note("interrupted")
        go.set()
        (run,) = flow.runs()
        deadline = time.monotonic() + 60
        while not (steps := flow.get(run.id).steps) or steps[0].status != "completed":
            assert time.monotonic() < deadline, "nothing was recorded"
            time.sleep(0.001)
        os._exit(0)
    print(flow.run_sync())
    """
    run_program(source, tmp_path, "interrupt")
    assert run_program(source, tmp_path, "again").out.strip() == "paid"
    assert notes(tmp_path) == ["charge", "interrupted"]


# -- what a function raises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["thread", "inline", "plain"])
def test_a_cancelled_future_inside_a_function_is_a_failure_of_the_step_and_no_stop_of_the_run(form: str) -> None:
    def gives_up() -> None:
        raise concurrent.futures.CancelledError("its pool was shut down")

    if form == "plain":

        @sync.workflow
        def flow(ctx: Any) -> Any:
            return sync.step("gives up", gives_up)
    else:

        @workflow
        async def flow(ctx: Any) -> Any:
            return await step("gives up", gives_up, thread=form == "thread")

    with pytest.raises(concurrent.futures.CancelledError, match="shut down"):
        flow.run_sync()
    assert [run.status for run in flow.runs()] == ["failed"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_a_function_that_ends_the_program_leaves_the_run_to_be_gone_on_with(kind: type[BaseException]) -> None:
    done: list[str] = []

    def first() -> str:
        done.append("first")
        return "first"

    def second() -> str:
        done.append("second")
        if done.count("second") == 1:
            raise kind
        return "second"

    @workflow
    async def flow(ctx: Any) -> list[str]:
        return [await step("first", first), await step("second", second)]

    with pytest.raises(kind):
        flow.run_sync()
    assert [run.status for run in flow.runs()] == ["interrupted"]
    assert flow.run_sync() == ["first", "second"]
    assert done == ["first", "second", "second"]
