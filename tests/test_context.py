"""What ``ctx`` hands out is recorded, so that a restart reads the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agentflow import Context, Waiting, parallel, step, sync, workflow
from agentflow.settings import settings
from tests.programs import notes, run_program


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, tzinfo=UTC).timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    settings.clock = made = Clock()
    return made


def test_now_uuid4_and_random_are_the_same_after_kills(tmp_path: Path) -> None:
    program = """
        @workflow("recorded")
        async def flow(ctx):
            values = [ctx.now(), ctx.now(), ctx.uuid4(), ctx.uuid4("order"), ctx.random(), ctx.random("dice")]
            note(" ".join(map(str, values)).replace("\\n", ""))
            if sys.argv[1] == "die":
                die()
            await step("use", lambda: note("used") or str(values[3]))
            return values
        values = flow.run_sync()
    """
    run_program(program, tmp_path, "die", expect_kill=True)
    run_program(program, tmp_path, "die", expect_kill=True)
    run_program(program, tmp_path, "live")
    run_program(program, tmp_path, "live")
    lines = notes(tmp_path)
    assert lines.count("used") == 1
    values = [line for line in lines if line != "used"]
    assert len(values) == 4 and len(set(values)) == 1


async def test_values_have_their_types_and_repeats_differ(again: Callable[[], None]) -> None:
    @workflow("types")
    async def flow(ctx: Context) -> list[Any]:
        return [ctx.now(), ctx.uuid4(), ctx.uuid4(), ctx.random(), ctx.random()]

    now, one, other, a, b = await flow.run()
    assert now.tzinfo is UTC and abs((datetime.now(UTC) - now).total_seconds()) < 60
    assert one.version == 4 and one != other
    assert 0 <= a < 1 and a != b
    again()
    assert await flow.run() == [now, one, other, a, b]


async def test_values_in_branches_belong_to_their_branch(again: Callable[[], None]) -> None:
    order = [3, 1, 2]

    @workflow("branches")
    async def flow(ctx: Context) -> dict[int, Any]:
        async def one(n: int) -> tuple[int, Any]:
            await asyncio.sleep(order[n] * 0.005)
            return n, ctx.uuid4()

        return dict(await parallel.map(one, [0, 1, 2]))

    first = await flow.run()
    order.reverse()
    again()
    assert await flow.run() == first and len(set(first.values())) == 3


async def test_now_reads_the_settings_clock(clock: Clock) -> None:
    @workflow("clock")
    async def flow(ctx: Context) -> datetime:
        return ctx.now()

    assert await flow.run() == datetime(2026, 3, 1, tzinfo=UTC)


# -- sleeping ------------------------------------------------------------------------------------


async def test_short_sleep_is_slept_and_not_again_on_replay(
    again: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow("short")
    async def flow(ctx: Context) -> str:
        await ctx.sleep("60ms")
        return "awake"

    loop = asyncio.get_running_loop()
    start = loop.time()
    assert await flow.run() == "awake"
    assert loop.time() - start >= 0.06
    again()
    slept = []
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *rest: (slept.append(seconds), sleep(seconds, *rest))[1])
    assert await flow.run() == "awake"
    assert sum(slept) < 0.06


async def test_long_sleep_suspends_the_run_and_ends_at_the_planned_instant(
    clock: Clock, again: Callable[[], None]
) -> None:
    @workflow("long")
    async def flow(ctx: Context) -> list[datetime]:
        before = ctx.now("before")
        await ctx.sleep("30d")
        return [before, ctx.now("after")]

    planned = clock.now + 30 * 86400
    with pytest.raises(Waiting) as waits:
        await flow.run()
    (wait,) = waits.value.waiting_on
    assert wait["kind"] == "sleep" and wait["until"] == planned
    assert "2026-03-31" in str(waits.value)
    clock.now += 29 * 86400
    again()
    assert (await flow.start()).status == "waiting"
    assert flow.runs()[0].waiting_on[0]["until"] == planned, "a restart does not begin the sleep anew"
    clock.now = planned + 5
    again()
    before, after = await flow.run()
    assert after - before == timedelta(days=30, seconds=5)


async def test_sleeps_of_branches_run_side_by_side_and_the_first_due_is_noted(clock: Clock) -> None:
    @workflow("sleeps")
    async def flow(ctx: Context) -> None:
        await asyncio.gather(ctx.sleep("2d"), ctx.sleep("1d"), ctx.sleep("2d"))

    run = await flow.start()
    start = clock.now
    assert sorted(w["until"] - start for w in run.waiting_on) == [86400, 2 * 86400, 2 * 86400]
    clock.now = start + 86401
    assert [w["until"] - start for w in (await flow.start()).waiting_on] == [2 * 86400] * 2
    clock.now = start + 2 * 86400
    assert (await flow.start()).status == "completed"


async def test_zero_sleep_goes_on_at_once_and_equal_sleeps_are_slept_each(clock: Clock) -> None:
    @workflow("equal")
    async def flow(ctx: Context) -> int:
        await ctx.sleep(0)
        await ctx.sleep("1h")
        await ctx.sleep("1h")
        return 3

    assert (await flow.start()).status == "waiting"
    clock.now += 3600
    assert (await flow.start()).status == "waiting"
    clock.now += 3600
    assert await flow.run() == 3


def test_sleep_across_a_kill_ends_at_the_planned_instant_and_is_not_in_doubt(tmp_path: Path) -> None:
    program = """
        import threading, time
        @workflow("killed-asleep")
        async def flow(ctx):
            await step("before", lambda: note("before"))
            if sys.argv[1] == "die":
                threading.Timer(0.3, die).start()
            await ctx.sleep("1s")
            await step("after", lambda: note("after"))
        start = time.time()
        flow.run_sync()
        began = flow.runs()[0].steps[0].completed_at.timestamp()
        print(round(time.time() - began, 1))
    """
    run_program(program, tmp_path, "die", expect_kill=True)
    ended = run_program(program, tmp_path, "live")
    assert notes(tmp_path) == ["before", "after"]
    assert "doubt" not in ended.err
    assert float(ended.out) >= 1.0


def test_plain_workflow_sleeps_too(clock: Clock) -> None:
    @sync.workflow("plain")
    def flow(ctx: Context) -> str:
        ctx.sleep("20ms") if settings.clock is None else None
        ctx.sleep("1d")
        return "awake"

    with pytest.raises(Waiting):
        flow.run()
    clock.now += 86400
    assert flow.run() == "awake"


# -- looking -------------------------------------------------------------------------------------


async def test_steps_of_one_name_are_all_there_in_their_order(again: Callable[[], None]) -> None:
    @workflow("all")
    async def flow(ctx: Context) -> list[Any]:
        for n in range(3):
            await step("poll", lambda n: n * 10, n)
        assert "nothing" not in ctx.steps and ctx.steps.get("nothing") is None
        with pytest.raises(KeyError, match="'nothing'.*'poll'"):
            ctx.steps["nothing"]
        assert list(ctx.steps) == ["poll"] and len(ctx.steps) == 1 and ctx.steps.all("nothing") == []
        return [ctx.steps["poll"].output, [record.output for record in ctx.steps.all("poll")]]

    assert await flow.run() == [20, [0, 10, 20]]
    again()
    assert await flow.run() == [20, [0, 10, 20]]


async def test_failed_step_is_in_ctx_steps(again: Callable[[], None]) -> None:
    @workflow("failed")
    async def flow(ctx: Context) -> tuple[str, int, str | None]:
        try:
            await step("fails", lambda: 1 / 0, retry={"max_attempts": 2, "initial_delay": 0.001})
        except ZeroDivisionError:
            pass
        record = ctx.steps["fails"]
        return record.status, record.attempts, record.error

    assert await flow.run() == ("failed", 2, "ZeroDivisionError: division by zero")
    again()
    assert await flow.run() == ("failed", 2, "ZeroDivisionError: division by zero")


async def test_input_is_the_single_argument_or_all_by_name() -> None:
    seen: list[Any] = []

    @workflow("one")
    async def one(ctx: Context, topic: str) -> None:
        seen.append((ctx.input, ctx.workflow, ctx.run_id))

    @workflow("two")
    async def two(ctx: Context, topic: str, count: int = 2) -> None:
        seen.append(ctx.input)

    run = await one.start("rivers")
    await two.run("rivers", count=3)
    assert seen == [("rivers", "one", run.id), {"topic": "rivers", "count": 3}]


async def test_log_speaks_through_the_agentflow_logger(said: Callable[[], str]) -> None:
    @workflow("logs")
    async def flow(ctx: Context) -> None:
        ctx.log.info("processing %s", "order 7")
        ctx.log.warning("careful")

    await flow.run()
    assert "processing order 7" in said() and "careful" in said()


async def test_context_passed_to_a_step_does_not_count_as_given(again: Callable[[], None]) -> None:
    calls = []

    @workflow("passes-ctx")
    async def flow(ctx: Context, n: int) -> str:
        async def body() -> str:
            calls.append(1)
            return f"{ctx.workflow} {n}"

        return await step("body", body)

    assert await flow.run(1) == "passes-ctx 1"
    again()
    assert await flow.run(1) == "passes-ctx 1"
    assert len(calls) == 1


async def test_ctx_values_inside_a_step_are_recorded_with_it(again: Callable[[], None]) -> None:
    @workflow("inside")
    async def flow(ctx: Context) -> str:
        async def body() -> str:
            return str(ctx.uuid4())

        return await step("body", body)

    first = await flow.run()
    again()
    assert await flow.run() == first
