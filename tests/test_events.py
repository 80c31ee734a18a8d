"""An event is delivered once, to one wait, whichever comes first; no wake-up is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from agentflow import (
    CapturedChanged,
    Context,
    EventTimeout,
    RunCancelled,
    RunNotFound,
    UsageError,
    Waiting,
    human_task,
    runs,
    send_event,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow import events as events_
from agentflow.journal import Journal
from agentflow.testing import FakeClock
from tests.programs import notes, run_program, start_program


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with FakeClock() as made:
        yield made


def waiting_for(name: Any = "paid", **options: Any) -> Any:
    @workflow("waits")
    async def flow(ctx: Context, order: int = 1) -> Any:
        return await ctx.wait_for_event(name, **options)

    return flow


def left(journal: Journal) -> int:
    """How many events nobody has received."""
    return sum(1 for _ in journal.scan("ev/"))


# -- whichever comes first -----------------------------------------------------------------------


async def test_run_waits_names_the_event_and_goes_on_when_it_was_sent(again: Callable[[], None]) -> None:
    flow = waiting_for()
    with pytest.raises(Waiting, match="paid") as waits:
        await flow.run()
    (wait,) = waits.value.waiting_on
    assert (wait["kind"], wait["name"], wait["names"], wait["deadline"]) == ("event", "paid", ["paid"], None)
    assert "send_event('paid'" in str(waits.value) and flow.runs()[0].status == "waiting"
    send_event("paid", {"amount": 3}, run_id=flow.runs()[0].id)
    for _ in range(2):
        again()
        assert await flow.run() == {"amount": 3}
    (record,) = flow.runs()[0].steps
    assert (record.name, record.kind, record.output) == ("event paid", "event", {"amount": 3})


async def test_event_sent_before_the_run_or_the_wait_is_there_at_once(journal: Journal) -> None:
    @workflow("later")
    async def flow(ctx: Context) -> Any:
        ready = await human_task(data="ready?")
        return [ready.approved, await ctx.wait_for_event("one"), await ctx.wait_for_event("two")]

    send_event("one", 1)
    run = await flow.start()
    send_event("two", 2, run_id=run.id[:-3])
    assert left(journal) == 2
    tasks.approve(tasks.list()[0].id)
    assert await flow.run() == [True, 1, 2] and left(journal) == 0


def test_plain_workflow_waits_for_events_too(again: Callable[[], None]) -> None:
    @sync.workflow("plain")
    def flow(ctx: Context) -> Any:
        first = ctx.wait_for_event("one", match=lambda n: n > 1)
        return [first, *sync.parallel([lambda: ctx.wait_for_event("two"), lambda: ctx.wait_for_event(["two", "three"])])]

    assert flow.start().status == "waiting"
    for payload in (1, 5):
        sync.send_event("one", payload)
    assert sorted(w["name"] for w in flow.start().waiting_on) == ["three, two", "two"]
    sync.send_event("three", "x")
    assert [w["name"] for w in flow.start().waiting_on] == ["two"]
    sync.send_event("two", "y")
    again()
    for _ in range(2):
        assert flow.run() == [5, "y", ("three", "x")]


async def test_wait_true_hears_of_the_event(journal: Journal) -> None:
    flow = waiting_for()
    running = asyncio.create_task(flow.options(wait=True).run())
    async with asyncio.timeout(20):
        while not list(journal.scan("w/")):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert flow.runs()[0].status == "running"
        send_event("paid", "now")
        assert await running == "now"


# -- delivered once ------------------------------------------------------------------------------


async def test_each_event_is_delivered_once_in_the_order_in_which_they_were_sent(
    again: Callable[[], None], journal: Journal
) -> None:
    @workflow("each")
    async def flow(ctx: Context) -> list[Any]:
        return [await ctx.wait_for_event("tick") for _ in range(3)]

    for n in (1, 2):
        send_event("tick", n)
    assert (await flow.start()).status == "waiting" and left(journal) == 0
    again()
    assert (await flow.start()).status == "waiting"
    send_event("tick", 3)
    assert await flow.run() == [1, 2, 3]


async def test_event_for_any_run_goes_to_one_and_an_event_for_a_run_to_that_one() -> None:
    flow = waiting_for()
    first, second, third = [await flow.start(n) for n in range(3)]
    send_event("paid", "for the second", run_id=second.id)
    send_event("paid", "for any")
    assert (await flow.start(0)).output == "for any"
    assert (await flow.start(2)).status == "waiting"
    assert (await flow.start(1)).output == "for the second"
    assert runs.get(third.id).waiting_on == third.waiting_on and runs.get(first.id).status == "completed"


class Paid(BaseModel):
    order: int
    amount: int = 0


@pytest.mark.parametrize("kind", ["function", "dict"])
@pytest.mark.parametrize("payload", [lambda n: {"order": n, "amount": 7}, lambda n: Paid(order=n, amount=7)])
async def test_match_takes_the_event_that_fits_and_leaves_the_others(kind: str, payload: Any, journal: Journal) -> None:
    def fits(order: int) -> Any:
        if kind == "dict":
            return {"order": order, "amount": 7}
        return lambda p: (p["order"] if isinstance(p, dict) else p.order) == order

    @workflow("matches")
    async def flow(ctx: Context, order: int) -> Any:
        return await ctx.wait_for_event("paid", match=fits(order))

    send_event("paid", {"other": 1}) if kind == "dict" else None
    for n in (3, 2, 1):
        send_event("paid", payload(n))
    assert (await flow.start(4)).status == "waiting"
    for n in (1, 2, 3):
        assert await flow.run(n) == payload(n)
    assert left(journal) == (kind == "dict")


async def test_waits_with_other_values_in_match_keep_their_own_events(again: Callable[[], None]) -> None:
    orders = [1, 2]

    @workflow("own")
    async def flow(ctx: Context) -> dict[int, Any]:
        def one(order: int) -> Any:
            return ctx.wait_for_event("paid", match=lambda p: p["order"] == order)

        found = await asyncio.gather(*(one(order) for order in orders))
        await ctx.wait_for_event("go")
        return {order: event["at"] for order, event in zip(orders, found, strict=True)}

    await flow.start()
    send_event("paid", {"order": 2, "at": "b"})
    await flow.start()
    send_event("paid", {"order": 1, "at": "a"})
    await flow.start()
    orders.reverse()
    again()
    send_event("go")
    assert await flow.run() == {1: "a", 2: "b"}


async def test_match_that_captured_a_variable_which_was_rebound_is_refused_by_name() -> None:
    @workflow("rebound")
    async def flow(ctx: Context) -> None:
        waits = []
        for order in (1, 2):
            waits.append(ctx.wait_for_event("paid", match=lambda p: p == order))
        await asyncio.gather(*waits)

    with pytest.raises(CapturedChanged, match="order"):
        await flow.run()


async def test_match_that_raises_fails_the_wait_and_loses_no_event(again: Callable[[], None]) -> None:
    fixed: list[bool] = []

    @workflow("raises")
    async def flow(ctx: Context) -> Any:
        def fits(payload: Any) -> bool:
            return bool(payload["order" if not fixed else "id"])

        return await ctx.wait_for_event("paid", match=fits)

    send_event("paid", {"id": 1})
    with pytest.raises(KeyError):
        await flow.run()
    fixed.append(True)
    again()
    assert await flow.run() == {"id": 1}


async def test_list_of_names_gives_the_first_that_came_and_says_which(again: Callable[[], None]) -> None:
    flow = waiting_for(["cancelled", "paid"])
    assert (await flow.start()).waiting_on[0]["names"] == ["cancelled", "paid"]
    send_event("paid", 3)
    send_event("cancelled", 4)
    for _ in range(2):
        event = await flow.run()
        assert (event.name, event.payload) == ("paid", 3)
        again()


# -- deadlines -----------------------------------------------------------------------------------


async def test_timeout_gives_the_default_and_a_late_event_is_left_for_the_next_wait(
    clock: FakeClock, again: Callable[[], None]
) -> None:
    @workflow("late")
    async def flow(ctx: Context) -> list[Any]:
        return [await ctx.wait_for_event("paid", timeout="1h", default="none"), await ctx.wait_for_event("paid")]

    run = await flow.start()
    assert run.waiting_on[0]["deadline"] == clock() + 3600 == run._document["due"]
    clock.advance("58m")
    again()
    assert (await flow.start()).waiting_on == run.waiting_on, "a restart does not extend it"
    clock.advance("3m")
    send_event("paid", "late")
    again()
    for _ in range(2):
        assert await flow.run() == ["none", "late"]


async def test_timeout_without_a_default_is_a_timeout_error(clock: FakeClock, again: Callable[[], None]) -> None:
    flow = waiting_for(timeout="1h")
    await flow.start()
    clock.advance("1h")
    for _ in range(2):
        again()
        with pytest.raises(EventTimeout, match="paid") as late:
            await flow.run()
        assert isinstance(late.value, TimeoutError) and late.value.event == "paid"
        assert late.value.deadline == clock.now and late.value.run_id == flow.runs()[0].id
    assert flow.runs()[0].status == "failed"


async def test_default_none_is_a_value_and_timeout_zero_takes_what_is_there(clock: FakeClock) -> None:
    flow = waiting_for(timeout=0, default=None)
    assert await flow.run(1) is None
    send_event("paid", 3)
    assert await flow.run(2) == 3


async def test_event_sent_in_time_counts_however_late_the_run_goes_on(clock: FakeClock) -> None:
    flow = waiting_for(timeout="1h", default="none")
    await flow.start()
    clock.advance("59m")
    send_event("paid", "in time")
    clock.advance("9h")
    assert await flow.run() == "in time"


async def test_event_in_time_that_is_sent_while_the_wait_decides_that_it_is_over_is_taken(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = waiting_for(timeout="1h", default="none")
    await flow.start()
    looked = events_._Receiver._events

    def meanwhile(self: Any) -> Any:
        found = looked(self)
        if not found:
            # Sent by another process whose clock stands before the deadline, just after this one has looked.
            clock.advance(0)
            monkeypatch.setattr(events_._Receiver, "_events", looked)
            send_event("paid", "just in time")
        return found

    clock.advance("1h")
    monkeypatch.setattr(events_._Receiver, "_events", meanwhile)
    assert await flow.run() == "just in time"


# -- values and mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [None, Paid(order=1), {1: {2, 3}}, b"bytes", "text"])
async def test_payload_comes_back_as_what_it_was(payload: Any, again: Callable[[], None]) -> None:
    flow = waiting_for()
    send_event("paid", payload)
    for _ in range(2):
        assert await flow.run() == payload
        again()


@pytest.mark.parametrize(
    "send, words",
    [
        (lambda: send_event(""), "name"),
        (lambda: send_event(3), "name"),  # type: ignore[arg-type]
        (lambda: send_event("paid", {"lock": asyncio.Lock()}), "payload"),
    ],
)
def test_event_that_cannot_be_is_refused_where_it_is_sent(send: Any, words: str, journal: Journal) -> None:
    with pytest.raises(UsageError, match=words):
        send()
    assert left(journal) == 0


def test_event_for_a_run_that_is_not_there_is_refused(journal: Journal) -> None:
    with pytest.raises(RunNotFound, match="order-7"):
        send_event("paid", run_id="order-7")
    assert left(journal) == 0


async def test_event_for_a_run_that_is_over_says_so(said: Callable[[], str]) -> None:
    flow = waiting_for()
    send_event("paid")
    await flow.run()
    send_event("paid", run_id=flow.runs()[0].id)
    assert "completed" in said() and "nobody waits" in said()


@pytest.mark.parametrize(
    "arguments",
    [{"name": ""}, {"name": []}, {"name": 3}, {"name": ["a", ""]}, {"match": 3}, {"timeout": "soon"}, {"timeout": -1}],
)
async def test_wait_that_cannot_be_is_refused(arguments: dict[str, Any]) -> None:
    flow = waiting_for(**{"name": "paid", **arguments})
    with pytest.raises(UsageError, match="name|match|timeout|wait_for_event"):
        await flow.run()


async def test_async_match_is_refused() -> None:
    async def fits(payload: Any) -> bool:
        return True

    with pytest.raises(UsageError, match="plain function"):
        await waiting_for(match=fits).run()


async def test_plan_names_the_wait_and_sends_nothing(journal: Journal) -> None:
    @workflow("planned")
    async def flow(ctx: Context) -> None:
        send_event("begun")
        await ctx.wait_for_event("paid")

    assert [s.name for s in (await flow.plan()).steps] == ["event paid"]
    assert left(journal) == 0


# -- sending from a workflow ---------------------------------------------------------------------


async def test_event_sent_by_a_workflow_is_sent_once_however_often_its_code_runs(
    again: Callable[[], None], journal: Journal
) -> None:
    @workflow("sends")
    async def flow(ctx: Context) -> None:
        send_event("body", 1)
        send_event("body", 1)

        def attempt() -> None:
            send_event("step", 2)
            tried.append(1)
            if len(tried) == 1:
                raise OSError("again")

        await step("attempt", attempt, retry={"max_attempts": 2, "initial_delay": 0.001})
        await human_task(data=1)

    tried: list[int] = []
    for _ in range(3):
        await flow.start()
        again()
    assert sorted(key.split("/")[1] for key, _ in journal.scan("ev/")) == ["body", "body", "step"] and len(tried) == 2


async def test_suspending_run_sends_nothing_on_its_way_out(journal: Journal) -> None:
    @workflow("way-out")
    async def flow(ctx: Context) -> None:
        try:
            await human_task(data=1)
        finally:
            send_event("left")

    await flow.start()
    assert left(journal) == 0
    tasks.approve(tasks.list()[0].id)
    await flow.run()
    assert left(journal) == 1


async def test_one_run_wakes_another(again: Callable[[], None]) -> None:
    @workflow("parent")
    async def parent(ctx: Context, child: str) -> str:
        send_event("go", ctx.run_id, run_id=child)
        return str(await ctx.wait_for_event("done"))

    @workflow("child")
    async def child(ctx: Context) -> None:
        who = await ctx.wait_for_event("go")
        send_event("done", "by the child", run_id=who)

    run = await child.start()
    assert (await parent.start(run.id)).status == "waiting"
    await child.run()
    assert await parent.run(run.id) == "by the child"


# -- kills and races -----------------------------------------------------------------------------

KILLED = """
    from agentflow import events
    if "die" in sys.argv:
        take = events._Receiver.check
        def taken(self):
            outcome = take(self)
            if isinstance(outcome, dict):
                die()  # taken, and not recorded yet
            return outcome
        events._Receiver.check = taken
    @workflow("killed")
    async def flow(ctx):
        if "skip" in sys.argv:
            return "skipped"
        return [await ctx.wait_for_event("tick"), await ctx.wait_for_event("tick")]
    for word in sys.argv[1:]:
        if word.isdigit():
            send_event("tick", int(word))
    run = asyncio.run(flow.start())
    print(run.status, run.output)
"""


def test_kill_between_taking_an_event_and_recording_it_loses_and_doubles_nothing(tmp_path: Path, journal: Journal) -> None:
    run_program(KILLED, tmp_path, "1", "2", "die", expect_kill=True)
    assert left(journal) == 1
    run_program(KILLED, tmp_path, "die", expect_kill=True)
    assert run_program(KILLED, tmp_path).out == "completed [1, 2]\n"
    assert left(journal) == 0 and not list(journal.scan("w/"))


def test_event_taken_before_a_kill_is_there_though_no_other_comes(tmp_path: Path, journal: Journal) -> None:
    run_program(KILLED, tmp_path, "1", "die", expect_kill=True)
    assert left(journal) == 0
    assert run_program(KILLED, tmp_path).out == "waiting None\n"
    assert [s.output for s in runs.list()[0].steps] == [1]
    assert run_program(KILLED, tmp_path, "2").out == "completed [1, 2]\n"


def test_event_taken_by_a_wait_that_is_not_asked_for_any_more_is_free_again(tmp_path: Path, journal: Journal) -> None:
    run_program(KILLED, tmp_path, "1", "die", expect_kill=True)
    assert left(journal) == 0
    assert run_program(KILLED, tmp_path, "skip").out == "completed skipped\n"
    assert left(journal) == 1


async def test_run_that_was_taken_away_at_that_moment_takes_no_event(journal: Journal) -> None:
    flow = waiting_for(match=lambda payload: runs.cancel(runs.list()[0].id) is not None)
    send_event("paid", 1)
    with pytest.raises(RunCancelled):
        await flow.run()
    assert left(journal) == 1


STAYS = """
    @workflow("stays")
    async def flow(ctx, n: int):
        await step("before", lambda: note(f"before {n}"))
        got = await ctx.wait_for_event("go", timeout="1h")
        await step("after", lambda: note(f"after {n}"))
        return got
    print("ready", flush=True)
    for n in range(int(sys.argv[1])):
        print(flow.options(wait=True, run_id=f"r{n}").run_sync(n), flush=True)
"""


def test_killed_while_waiting_and_event_sent_meanwhile(tmp_path: Path, journal: Journal) -> None:
    process = start_program(STAYS, tmp_path, "1")
    while not list(journal.scan("w/")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert runs.get("r0").status == "interrupted"
    send_event("go", 5, run_id="r0")
    ended = run_program(STAYS, tmp_path, "1")
    assert ended.out == "ready\n5\n" and notes(tmp_path) == ["before 0", "after 0"] and "doubt" not in ended.err


def test_no_wake_up_is_lost_between_two_processes_in_many_rounds(tmp_path: Path, journal: Journal) -> None:
    rounds = 40
    process = start_program(STAYS, tmp_path, str(rounds))
    for n in range(rounds):
        # At another moment in each round: as soon as the run is there, or a little later, around the wait's own commits.
        while journal.get(f"r/r{n}") is None:
            assert process.poll() is None
        for _ in range(n % 10):
            journal.get(f"w/{n}")
            time.sleep(0.0007)
        send_event("go", n, run_id=f"r{n}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == ["ready", *map(str, range(rounds))] and left(journal) == 0


WORKERS = """
    @workflow("worker")
    async def flow(ctx, n: int):
        return await ctx.wait_for_event("job", match=lambda job: job % 2 == n % 2)
    async def main():
        first = int(sys.argv[1])
        return await asyncio.gather(*(flow.options(wait=True, run_id=f"w{n}").run(n) for n in range(first, first + 8)))
    print(*asyncio.run(main()))
"""


def test_many_processes_share_events_and_each_is_delivered_once(tmp_path: Path, journal: Journal) -> None:
    workers = [start_program(WORKERS, tmp_path, str(8 * n)) for n in range(3)]
    for n in range(24):
        send_event("job", n)
    got: list[int] = []
    for process in workers:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        got += map(int, out.split())
    assert sorted(got) == list(range(24)) and left(journal) == 0


def test_sender_killed_at_any_moment_has_sent_or_has_not(tmp_path: Path, journal: Journal) -> None:
    program = """
        @workflow("sender")
        async def flow(ctx):
            for n in range(2000):
                send_event("tick", n)
                note(n)
        print("ready", flush=True)
        flow.run_sync()
    """
    for wanted in (3, 40):
        process = start_program(program, tmp_path)
        while len(notes(tmp_path)) < wanted:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.communicate()
    sent = [events_.orjson.loads(text)["payload"] for _, text in journal.scan("ev/")]
    noted = set(notes(tmp_path))
    # Sent at least what was noted, at most one more, nothing twice and nothing left out.
    assert sent == [str(n) for n in range(len(sent))] and len(noted) <= len(sent) <= len(noted) + 1
