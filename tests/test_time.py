"""Instants are recorded: neither a kill nor an edit moves the end of a sleep or the deadline of a run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agentflow import (
    Context,
    UsageError,
    Waiting,
    WorkflowTimeout,
    generate_content,
    human_task,
    parallel,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.testing import FakeClock, FakeModel
from tests.programs import notes, run_program

MODEL = "openai:gpt-5-mini"


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with FakeClock() as made:
        yield made


# -- sleeping ------------------------------------------------------------------------------------


async def test_equal_durations_are_one_sleep_however_they_are_written_and_near_ones_are_not(
    clock: FakeClock, again: Callable[[], None]
) -> None:
    duration: Any = "30d"

    @workflow("written")
    async def flow(ctx: Context) -> str:
        await ctx.sleep(duration)
        return "awake"

    first = await flow.start()
    clock.advance("20d")
    for duration in (timedelta(days=30), 30 * 86400, "720h", "29d24h"):
        again()
        assert (await flow.start()).waiting_on == first.waiting_on
    duration = 30 * 86400 + 1
    again()
    assert (await flow.start()).waiting_on[0]["until"] == first.waiting_on[0]["until"] + 20 * 86400 + 1
    duration = "30d"
    clock.advance("10d")
    assert await flow.run() == "awake"


async def test_sleep_that_is_asked_for_anew_is_slept_anew(clock: FakeClock) -> None:
    @workflow("anew")
    async def flow(ctx: Context) -> str:
        await ctx.sleep("1d")
        return "awake"

    await flow.start()
    clock.advance("1d")
    assert await flow.run() == "awake"
    run = await flow.options(rerun=["sleep 1d"]).start()
    assert [w["until"] for w in run.waiting_on] == [clock() + 86400]
    clock.advance("1d")
    assert await flow.run() == "awake"


@pytest.mark.parametrize("turns", [3])
async def test_sleeps_of_a_loop_and_of_branches_end_one_by_one(
    clock: FakeClock, again: Callable[[], None], turns: int
) -> None:
    polled: list[str] = []

    @workflow("loops")
    async def flow(ctx: Context) -> list[Any]:
        async def poll(name: str) -> str:
            for n in range(turns):
                await step("poll", lambda n=n: polled.append(f"{name}{n}"))
                await ctx.sleep("1h")
            return name

        return list(await parallel.map(poll, ["a", "b"]))

    for n in range(turns):
        run = await flow.start()
        assert [w["until"] for w in run.waiting_on] == [clock() + 3600] * 2
        assert sorted(polled) == sorted(f"{name}{m}" for name in "ab" for m in range(n + 1))
        clock.advance("30m")
        again()
        assert [w["until"] for w in (await flow.start()).waiting_on] == [w["until"] for w in run.waiting_on]
        clock.advance("30m")
        again()
    assert await flow.run() == ["a", "b"]


def test_plain_branches_sleep_side_by_side(clock: FakeClock) -> None:
    @sync.workflow("plain-branches")
    def flow(ctx: Context) -> Any:
        return sync.parallel([lambda: ctx.sleep("2d"), lambda: ctx.sleep("1d")])

    run = flow.start()
    assert sorted(w["until"] - clock() for w in run.waiting_on) == [86400, 2 * 86400]
    clock.advance("1d")
    assert [w["until"] - clock() for w in flow.start().waiting_on] == [86400]
    clock.advance("1d")
    assert flow.run() == [None, None]


SLEEPER = """
    import time
    from agentflow.settings import settings
    WAY
    settings.clock = lambda: time.time() + float(os.environ.get("LATER", 0))
    @workflow("sleeper")
    FLOW
        INSERTED
        WAITctx.sleep("30d")
        if "die" in sys.argv:
            die()
        AGAIN
    run = START
    print(run.status, [w["until"] for w in run.waiting_on], run.output)
"""
FORMS = {
    "async": {"WAY": "", "FLOW": "async def flow(ctx):", "WAIT": "await ", "START": "asyncio.run(flow.start())"},
    "plain": {"WAY": "from agentflow.sync import *", "FLOW": "def flow(ctx):", "WAIT": "", "START": "flow.start()"},
}


@pytest.mark.parametrize("form", FORMS)
def test_sleep_of_30_days_keeps_its_end_through_kills_and_edits(tmp_path: Path, form: str) -> None:
    def program(inserted: str = "pass") -> str:
        text = SLEEPER
        for name, word in {**FORMS[form], "INSERTED": inserted, "AGAIN": 'return "awake"'}.items():
            text = text.replace(name, word)
        return text

    day = 86400
    first = run_program(program(), tmp_path).out
    assert first.startswith("waiting [")
    wait = FORMS[form]["WAIT"]
    edited = program(f'{wait}step("first", lambda: note("inserted"))')
    assert run_program(edited, tmp_path, env={"LATER": str(29 * day)}).out == first
    run_program(edited, tmp_path, "die", env={"LATER": str(30 * day)}, expect_kill=True)
    # Slept and recorded: an earlier clock does not bring it back.
    assert run_program(edited, tmp_path).out == "completed [] awake\n"
    assert notes(tmp_path) == ["inserted"]


async def test_wait_true_stays_through_a_long_sleep(clock: FakeClock) -> None:
    @workflow("stays")
    async def flow(ctx: Context) -> timedelta:
        before = ctx.now("before")
        await ctx.sleep("30d")
        return ctx.now("after") - before

    running = asyncio.create_task(flow.options(wait=True).run())
    async with asyncio.timeout(20):
        while not running.done():
            clock.advance("1d")
            await asyncio.sleep(0.001)
    assert running.result() >= timedelta(days=30)


# -- the deadline of a run -------------------------------------------------------------------------


async def test_no_step_starts_after_the_deadline_and_the_run_fails_with_a_timeout_error(clock: FakeClock) -> None:
    done: list[str] = []

    @workflow("deadline", timeout="1h")
    async def flow(ctx: Context) -> str:
        await step("first", lambda: done.append("first"))
        await step("long", lambda: clock.advance("2h"))
        await step("last", lambda: done.append("last"))
        return "done"

    begun = clock.now
    with pytest.raises(WorkflowTimeout, match="deadline") as late:
        await flow.run()
    assert isinstance(late.value, TimeoutError) and late.value.deadline == begun + timedelta(hours=1)
    run = flow.runs()[0]
    assert late.value.run_id == run.id and run.id in str(late.value)
    assert run.status == "failed" and "WorkflowTimeout" in str(run.error) and done == ["first"]
    with pytest.raises(WorkflowTimeout):
        run.result()
    # Run again it goes on, with a new deadline; what was finished is not done again.
    assert await flow.run() == "done" and done == ["first", "last"]


def test_plain_workflow_ends_at_its_next_step(clock: FakeClock) -> None:
    done: list[str] = []

    @sync.workflow("plain-deadline", timeout="1h")
    def flow(ctx: Context) -> str:
        sync.step("first", lambda: done.append("first"))
        sync.step("long", lambda: clock.advance("2h"))
        try:
            sync.step("last", lambda: done.append("last"))
        except Exception:
            done.append("swallowed")
        return "done"

    with pytest.raises(WorkflowTimeout):
        flow.run()
    assert done == ["first"] and flow.runs()[0].status == "failed"
    assert flow.run() == "done" and done == ["first", "last"]


async def test_what_is_in_flight_at_the_deadline_is_stopped(clock: FakeClock) -> None:
    seen: list[str] = []

    @workflow("stopped", timeout="1h")
    async def flow(ctx: Context) -> None:
        async def slow() -> None:
            clock.advance("2h")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("stopped")
                raise

        try:
            await asyncio.gather(step("slow", slow), asyncio.Event().wait())
        finally:
            seen.append("finally")
            await step("never", lambda: seen.append("never"))

    async with asyncio.timeout(20):
        with pytest.raises(WorkflowTimeout):
            await flow.run()
    assert sorted(seen) == ["finally", "stopped"]


async def test_body_that_swallows_its_cancellation_fails_all_the_same(clock: FakeClock) -> None:
    @workflow("swallows", timeout="1h")
    async def flow(ctx: Context) -> str:
        clock.advance("2h")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return "went on"

    async with asyncio.timeout(20):
        with pytest.raises(WorkflowTimeout):
            await flow.run()


async def test_paid_call_in_flight_at_the_deadline_is_finished_recorded_and_not_bought_again(clock: FakeClock) -> None:
    stopped = asyncio.Event()

    @workflow("paid", timeout="1h")
    async def flow(ctx: Context) -> str:
        try:
            return await generate_content("Say hello.", model=MODEL)
        except asyncio.CancelledError:
            stopped.set()
            raise

    async def reply(request: Any) -> str:
        clock.advance("2h")
        await stopped.wait()
        return "hello"

    with FakeModel(reply) as model:
        async with asyncio.timeout(20):
            with pytest.raises(WorkflowTimeout):
                await flow.run()
        assert await flow.run() == "hello"
        assert len(model.calls) == 1


def test_plain_paid_call_that_ends_after_the_deadline_is_recorded_and_not_bought_again(clock: FakeClock) -> None:
    @sync.workflow("plain-paid", timeout="1h")
    def flow(ctx: Context) -> str:
        return str(sync.generate_content("Say hello.", model=MODEL))

    def reply(request: Any) -> str:
        clock.advance("2h")
        return "hello"

    with FakeModel(reply) as model:
        with pytest.raises(WorkflowTimeout):
            flow.run()
        assert flow.run() == "hello"
        assert len(model.calls) == 1


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_waiting_counts_and_a_restart_does_not_move_the_deadline(
    clock: FakeClock, again: Callable[[], None], plain: bool
) -> None:
    if plain:

        @sync.workflow("waits", timeout="2d")
        def flow(ctx: Context) -> Any:
            return sync.human_task(data=1).by
    else:

        @workflow("waits", timeout="2d")
        async def flow(ctx: Context) -> Any:
            return (await human_task(data=1)).by

    with pytest.raises(Waiting):
        flow.run_sync()
    clock.advance("1.5d")
    again()
    with pytest.raises(Waiting):
        flow.run_sync()
    tasks.approve(tasks.list()[0].id, by="Ann")
    clock.advance("12h")
    again()
    with pytest.raises(WorkflowTimeout):
        flow.run_sync()
    assert flow.run_sync() == "Ann"


async def test_completed_run_replays_long_after_its_deadline(clock: FakeClock, again: Callable[[], None]) -> None:
    @workflow("replays", timeout="1h")
    async def flow(ctx: Context) -> int:
        return await step("one", lambda: 1)

    assert await flow.run() == 1
    clock.advance("10d")
    again()
    assert await flow.run() == 1


async def test_compensations_run_after_the_deadline(clock: FakeClock) -> None:
    done: list[str] = []

    @workflow("undone", timeout="1h")
    async def flow(ctx: Context) -> None:
        await step("charge", lambda: done.append("charge"), compensate=lambda _: done.append("refund"))
        await step("long", lambda: clock.advance("2h"))
        await step("ship", lambda: done.append("ship"))

    with pytest.raises(WorkflowTimeout):
        await flow.run()
    assert done == ["charge", "refund"]
    with pytest.raises(WorkflowTimeout):
        await flow.run()
    assert done == ["charge", "refund"]


async def test_no_attempt_starts_after_the_deadline(clock: FakeClock) -> None:
    tried: list[int] = []

    @workflow("attempts", timeout="1h")
    async def flow(ctx: Context) -> None:
        def fails() -> None:
            tried.append(1)
            clock.advance("40m")
            raise OSError("no")

        await step("fails", fails, retry={"max_attempts": 9, "initial_delay": 0.001})

    with pytest.raises(WorkflowTimeout):
        await flow.run()
    assert len(tried) == 2


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_deadline_that_is_near_is_waited_for_on_the_spot(plain: bool) -> None:
    if plain:

        @sync.workflow("near", timeout="0.3s")
        def flow(ctx: Context) -> None:
            ctx.sleep("1h")
    else:

        @workflow("near", timeout="0.3s")
        async def flow(ctx: Context) -> None:
            await ctx.sleep("1h")

    with pytest.raises(WorkflowTimeout):
        flow.run_sync()


KILLED = """
    import time
    from agentflow.settings import settings
    settings.clock = lambda: time.time() + float(os.environ.get("LATER", 0))
    @workflow("killed", timeout=TIMEOUT)
    async def flow(ctx):
        await step("first", lambda: note("first"))
        if "die" in sys.argv:
            die()
        await step("second", lambda: note("second"))
        return "done"
    try:
        print(flow.run_sync())
    except WorkflowTimeout as late:
        print("late", late.deadline.timestamp())
"""


def test_deadline_is_kept_through_kills_and_edits_and_recorded_steps_still_count(tmp_path: Path) -> None:
    program = KILLED.replace("TIMEOUT", '"1h"')
    edited = KILLED.replace("TIMEOUT", '"9h"')
    run_program(program, tmp_path, "die", expect_kill=True)
    run_program(edited, tmp_path, "die", env={"LATER": "1800"}, expect_kill=True)
    first = run_program(edited, tmp_path, env={"LATER": "3601"}).out
    assert first.startswith("late ") and notes(tmp_path) == ["first"]
    assert run_program(edited, tmp_path, env={"LATER": "3602"}).out == "done\n", "a new deadline after it had failed"
    assert notes(tmp_path) == ["first", "second"]
    # Nothing but records is needed any more: that is not too late.
    assert run_program(edited, tmp_path, env={"LATER": "999999"}).out == "done\n"


def test_workflow_without_a_timeout_any_more_has_no_deadline(tmp_path: Path) -> None:
    run_program(KILLED.replace("TIMEOUT", '"1h"'), tmp_path, "die", expect_kill=True)
    assert run_program(KILLED.replace("TIMEOUT", "None"), tmp_path, env={"LATER": "7200"}).out == "done\n"


@pytest.mark.parametrize("timeout", [0, -1, "soon", True, float("inf")])
def test_timeout_that_is_none_is_refused_when_the_workflow_is_defined(timeout: Any) -> None:
    with pytest.raises(UsageError, match="timeout"):
        workflow("bad", timeout=timeout)(lambda ctx: None)
    with pytest.raises(UsageError, match="timeout"):
        sync.workflow("bad", timeout=timeout)(lambda ctx: None)


async def test_plan_of_a_run_whose_deadline_has_passed_shows_its_steps(clock: FakeClock) -> None:
    @workflow("planned", timeout="1h")
    async def flow(ctx: Context) -> None:
        await step("first", lambda: 1)
        await human_task(data=1)

    await flow.start()
    clock.advance("2h")
    assert [s.name for s in (await flow.plan()).steps] == ["first", "approve"]


async def test_run_that_waits_is_due_at_its_deadline(clock: FakeClock) -> None:
    @workflow("due", timeout="1h")
    async def flow(ctx: Context) -> None:
        await ctx.sleep("1d")

    run = await flow.start()
    assert run._document["due"] == clock() + 3600


def test_branches_of_plain_code_end_at_the_deadline(clock: FakeClock) -> None:
    asked = threading.Event()

    @sync.workflow("plain-many", timeout="1h")
    def flow(ctx: Context) -> Any:
        def late() -> None:
            asked.wait(10)
            clock.advance("2h")
            sync.step("never", lambda: None)

        def asks() -> None:
            asked.set()
            sync.human_task(data=1)

        return sync.parallel([asks, late])

    with pytest.raises(WorkflowTimeout):
        flow.run()
