"""A budget is never exceeded, survives restarts, and leaves a run that goes on with a higher one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

import agentflow
from agentflow import (
    BudgetExceeded,
    budgets,
    costlines,
    generate_content,
    lease,
    ledger,
    parallel,
    scratch,
    step,
    sync,
    workflow,
)
from agentflow.errors import UsageError
from agentflow.journal import Add, Journal
from agentflow.line import Line
from agentflow.settings import settings
from tests.loopback import Loopback, answer_to
from tests.programs import notes, run_program, start_program

MODEL = "openai:priced"


@pytest.fixture(autouse=True)
def prices() -> None:
    ledger.set_price("priced", 100, 1000)  # a call of some words costs about a cent


class Till(Loopback):
    """A server that adds up what it has charged."""

    charged = Decimal(0)

    def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
        found = super().arrive(asked, path)
        read, wrote = max(1, len(json.dumps(asked["body"])) // 4), len(answer_to(asked["text"])) // 4
        self.charged += (read * Decimal(100) + wrote * Decimal(1000)) / 1_000_000
        return found


@pytest.fixture
def till(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Till() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        yield server


def ask(text: str, **more: Any) -> Any:
    return generate_content(text, model=MODEL, max_tokens=20, **more)


async def until(happened: Callable[[], Any]) -> None:
    while not happened():  # noqa: ASYNC110 - it happens in other threads
        await asyncio.sleep(0.002)


# -- a run's budget ----------------------------------------------------------------------------------------------------


async def test_a_fan_out_never_exceeds_its_budget_and_goes_on_with_a_higher_one(till: Till, journal: Journal) -> None:
    till.latency = 0.02

    @workflow("fan", budget="0.20")
    async def fan(ctx: Any) -> list[str]:
        return await parallel([ask(f"question {n}") for n in range(50)])

    with pytest.raises(BudgetExceeded, match=r'budget of \$0\.20.*may cost up to.*\.options\(budget="0\.40"\)') as caught:
        await fan.run()
    assert caught.value.budget == Decimal("0.20") >= till.charged > Decimal("0.10")
    first = len(till.arrived)
    assert 10 < first < 50
    (stopped,) = fan.runs()
    assert stopped.status == "interrupted" and str(stopped.error).startswith("BudgetExceeded: ")
    assert stopped.cost == costlines.summary(journal)[0].paid == till.charged, "what was in flight was waited for"

    with pytest.raises(BudgetExceeded):
        await fan.run()
    assert len(till.arrived) == first, "nothing more fits"

    with pytest.raises(BudgetExceeded):
        await fan.options(budget="0.30").run()
    assert Decimal("0.20") < till.charged <= Decimal("0.30")

    assert await fan.options(budget="2").run() == [answer_to(f"question {n}") for n in range(50)]
    assert len(till.arrived) == len({event["digest"] for event in till.arrived}) == 50, "nothing was paid twice"
    (done,) = fan.runs()
    assert done.status == "completed" and done.error is None and done.cost == till.charged
    assert costlines.summary(journal)[0].in_doubt == 0


async def test_without_max_tokens_an_answer_of_two_thousand_tokens_is_assumed(till: Till) -> None:
    @workflow("one", budget="1.99")
    async def one(ctx: Any) -> str:
        return await generate_content("short", model=MODEL)

    with pytest.raises(BudgetExceeded, match="2,000 output tokens; max_tokens= lowers it"):
        await one.run()
    assert till.arrived == []
    assert await one.options(budget="2.10").run() == answer_to("short")


async def test_the_whole_budget_can_be_spent_and_not_a_cent_more(till: Till) -> None:
    @workflow("exact")
    async def exact(ctx: Any, count: int) -> list[str]:
        return [await ask(f"n {n}") for n in range(count)]

    with pytest.raises(BudgetExceeded) as caught:
        await exact.options(budget=0).run(1)
    needed = caught.value.needed
    assert needed is not None and caught.value.spent == 0
    with pytest.raises(BudgetExceeded):
        await exact.options(budget=needed - Decimal("0.00000001")).run(1)
    assert till.arrived == []
    await exact.options(budget=needed).run(1)
    assert len(till.arrived) == 1


async def test_replays_cost_no_budget(till: Till, again: Callable[[], None]) -> None:
    @workflow("twice")
    async def twice(ctx: Any) -> str:
        return await ask("hello")

    await twice.run()
    again()
    assert await twice.options(budget=0).run() == answer_to("hello")


def test_plain_code_has_budgets_too(till: Till) -> None:
    def one(n: int) -> str:
        return sync.generate_content(f"n {n}", model=MODEL, max_tokens=20)

    @sync.workflow("plain", budget="0.05")
    def plain(ctx: Any) -> list[str]:
        return sync.parallel.map(one, range(20))

    with pytest.raises(BudgetExceeded):
        plain.run()
    assert 0 < till.charged <= Decimal("0.05")
    with pytest.raises(BudgetExceeded):
        plain.start()
    assert plain.runs()[0].status == "interrupted"
    assert len(plain.options(budget="2").run()) == 20
    assert len(till.arrived) == len({event["digest"] for event in till.arrived}) == 20


async def test_a_call_that_does_not_fit_waits_for_those_in_flight_before_it_is_refused(till: Till) -> None:
    till.latency = 0.05

    @workflow("wait")
    async def wait(ctx: Any) -> list[str]:
        return await parallel([ask(f"w {n}") for n in range(3)])

    with pytest.raises(BudgetExceeded) as caught:
        await wait.options(budget=0, run_id="none").run()
    room = caught.value.needed
    assert room is not None
    # Less than three calls may cost, and enough for all three as they do cost.
    await wait.options(budget=room * Decimal("2.2"), run_id="narrow").run()
    assert len(till.arrived) == 3


# -- how it leaves a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "group"])
async def test_a_budget_is_no_failure_no_attempt_and_leaves_nothing_in_doubt(
    till: Till, form: str, said: Callable[[], str]
) -> None:
    undone = threading.Event()

    async def work() -> str:
        if form == "plain":
            return await ask("inside")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask("inside"))
        return task.result()

    @workflow("careful")
    async def careful(ctx: Any) -> str:
        await step("charge", lambda: "charged", compensate=lambda _: undone.set())
        return await step("work", work, retry={"max_attempts": 5, "initial_delay": 0}, in_doubt="raise")

    with pytest.raises(BudgetExceeded):
        await careful.options(budget=0).run()
    (stopped,) = careful.runs()
    assert stopped.status == "interrupted" and [s.name for s in stopped.steps] == ["charge"]
    with pytest.raises(BudgetExceeded):
        await careful.options(budget=0).start()
    assert await careful.options(budget="1").run() == answer_to("inside")
    assert not undone.is_set() and "attempt" not in said() and "doubt" not in said()


async def test_a_group_in_the_body_raises_the_budget_error_itself(till: Till) -> None:
    @workflow("grouped", budget=0)
    async def grouped(ctx: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask("a"))
            group.create_task(ask("b"))

    with pytest.raises(BudgetExceeded):
        await grouped.run()
    assert grouped.runs()[0].status == "interrupted" and till.arrived == []


async def test_settle_does_not_take_a_budget_for_a_result(till: Till) -> None:
    @workflow("settled", budget=0)
    async def settled(ctx: Any) -> list[Any]:
        return await parallel([ask("a"), ask("b")], settle=True)

    with pytest.raises(BudgetExceeded):
        await settled.run()


async def test_a_budget_given_for_a_run_stays_with_it_whoever_resumes_it(till: Till) -> None:
    @workflow("approve", budget=0)
    async def approve(ctx: Any) -> str:
        first = await ask("first")
        await agentflow.human_task(data=first)
        return await ask("second")

    waiting = await approve.options(budget="1").start()
    agentflow.tasks.approve(waiting.waiting_on[0]["id"])
    assert await agentflow.runs.get(waiting.id) == answer_to("second")


async def test_runs_started_inside_a_run_count_in_its_budget_also_after_a_restart(
    till: Till, again: Callable[[], None]
) -> None:
    @workflow("part")
    async def part(ctx: Any, n: int) -> str:
        return await ask(f"part {n}")

    @workflow("whole", budget="0.05")
    async def whole(ctx: Any) -> list[str]:
        first = await ask("whole")
        return [first, await part.run(1), *await step("rest", lambda: parallel.map(part.run, range(2, 10)))]

    for _ in range(2):
        with pytest.raises(BudgetExceeded, match=r"run whole-\w+ has a budget of \$0\.05"):
            await whole.run()
        assert Decimal("0.01") < till.charged <= Decimal("0.05")
        again()
    sent = len(till.arrived)
    await part.run(50)
    assert len(till.arrived) == sent + 1, "by itself it has no budget"
    assert len(await whole.options(budget="1").run()) == 10
    assert len(till.arrived) == len({event["digest"] for event in till.arrived}) == 11


async def test_what_a_budget_around_refuses_takes_nothing_from_the_own_one(till: Till) -> None:
    @workflow("inner", budget="0.05")
    async def inner(ctx: Any) -> str:
        for _ in range(5):
            with contextlib.suppress(BudgetExceeded):
                return await ask("x")
        assert ctx._ex.budget._spent == 0
        return "refused five times"

    @workflow("outer", budget="0.01")
    async def outer(ctx: Any) -> str:
        return await inner.run()

    assert await outer.run() == "refused five times" and till.arrived == []


async def test_a_model_of_unknown_price_is_refused_under_a_budget(till: Till) -> None:
    @workflow("unpriced", budget=5)
    async def unpriced(ctx: Any) -> str:
        return await generate_content("hi", model="openai:never-heard-of")

    with pytest.raises(BudgetExceeded, match=r"set_price\('never-heard-of', input=.*\)"):
        await unpriced.run()
    assert till.arrived == []
    ledger.set_price("never-heard-of", 0, 0)
    assert await unpriced.run() == answer_to("hi")


@pytest.mark.parametrize("bad", ["", "much", "-1", -1, float("nan"), float("inf"), True, [], "5/day"])
def test_what_is_no_amount_is_refused_where_it_is_written(bad: Any) -> None:
    async def flow(ctx: Any) -> None: ...

    with pytest.raises(UsageError, match="budget.*no amount of dollars"):
        workflow("bad", budget=bad)(flow)
    good = workflow("good", budget="$2.50")(flow)
    with pytest.raises(UsageError, match="budget.*no amount of dollars"):
        good.options(budget=bad)


# -- across processes --------------------------------------------------------------------------------------------------


def test_what_was_paid_before_a_kill_and_what_was_in_flight_still_count_after_it(tmp_path: Path) -> None:
    program = """
        from agentflow import ledger
        ledger.set_price("priced", 100, 1000)

        @workflow("killed", budget=sys.argv[1])
        async def killed(ctx):
            return [await generate_content(f"k {n}", model="openai:priced", max_tokens=20) for n in range(6)]

        print(len(killed.run_sync()))
    """

    class Kills(Till):
        def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
            found = super().arrive(asked, path)
            if len(self.arrived) == 3:
                process.kill()
                return found[0], "hang"
            return found

    with Kills() as server:
        process = start_program(program, tmp_path, "0.06", env=server.environment)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL and len(server.arrived) == 3
        line = costlines.summary(scratch.open_journal())[0]
        assert line.calls == 2 and line.in_doubt == 1
        ended = run_program(program, tmp_path, "0.06", env=server.environment, expect_failure=True)
        assert "BudgetExceeded" in ended.err and server.charged <= Decimal("0.06")
        sent = len(server.arrived)
        assert run_program(program, tmp_path, "1.00", env=server.environment).out == "6\n"
        assert len(server.arrived) == 7 and sent < 7, "six calls, and the one in doubt again"
    line = costlines.summary(scratch.open_journal())[0]
    assert line.calls == 6 and line.in_doubt == 1
    assert line.paid is not None and line.in_doubt_at_most is not None
    assert line.paid + line.in_doubt_at_most >= server.charged


# -- a budget for everything within a period ---------------------------------------------------------------------------


def at(text: str) -> Callable[[], float]:
    return lambda: datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


async def test_a_day_has_one_budget_for_all_runs_and_for_steps_outside_of_runs(till: Till) -> None:
    agentflow.configure(budget="0.05/day")
    settings.clock = at("2026-03-01 23:59")

    @workflow("daily")
    async def daily(ctx: Any, n: int) -> str:
        return await ask(f"n {n}")

    for n in range(2):
        await daily.run(n)
    await ask("alone")
    with pytest.raises(BudgetExceeded, match=r"budget of \$0\.05 a day.*since 2026-03-01 00:00 UTC.*0\.10/day"):
        for n in range(2, 10):
            await daily.run(n)
    with pytest.raises(BudgetExceeded):
        await ask("alone again")
    spent, sent = till.charged, len(till.arrived)
    assert Decimal("0.02") < spent <= Decimal("0.05")
    stopped = agentflow.runs.list(status="interrupted")
    assert len(stopped) == 1
    settings.clock = at("2026-03-02 00:00")
    assert await stopped[0] == answer_to(f"n {sent - 1}"), "a new day"
    agentflow.configure(budget="0.04/month")
    with pytest.raises(BudgetExceeded, match="a month"):
        await ask("again")
    agentflow.configure(budget=None)
    await ask("again")


async def test_a_run_within_its_own_budget_is_stopped_by_that_of_the_day_and_the_other_way_round(till: Till) -> None:
    @workflow("both", budget="1")
    async def both(ctx: Any) -> str:
        return await ask("x")

    agentflow.configure(budget="0/hour")
    with pytest.raises(BudgetExceeded, match="everything"):
        await both.run()
    agentflow.configure(budget="5/week")
    with pytest.raises(BudgetExceeded, match="run both"):
        await both.options(budget=0).run()
    assert till.arrived == []
    assert await both.options(budget="1").run() == answer_to("x")


def test_processes_that_run_at_once_share_the_budget_of_the_day(tmp_path: Path) -> None:
    program = """
        from agentflow import ledger
        ledger.set_price("priced", 100, 1000)
        configure(budget="0.20/day")

        @workflow("shared")
        async def shared(ctx, who):
            calls = [generate_content(f"{who} {n}", model="openai:priced", max_tokens=20) for n in range(25)]
            return await parallel(calls)

        shared.run_sync(sys.argv[1])
    """
    with Till(latency=0.02) as server:
        started = [start_program(program, tmp_path, f"p{n}", env=server.environment) for n in range(3)]
        errors = [process.communicate(timeout=120)[1] for process in started]
    assert all("BudgetExceeded" in error for error in errors), errors
    assert Decimal("0.15") < server.charged <= Decimal("0.20")
    line = costlines.summary(scratch.open_journal())[0]
    assert line.paid == server.charged and line.in_doubt == 0


def test_what_a_killed_process_had_in_flight_counts_for_the_day(tmp_path: Path) -> None:
    program = """
        from agentflow import ledger
        ledger.set_price("priced", 100, 1000)
        configure(budget="0.03/day")
        print(asyncio.run(generate_content("hello", model="openai:priced", max_tokens=20)))
    """

    class Kills(Till):
        def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
            found = super().arrive(asked, path)
            process.kill()
            return found[0], "hang"

    with Kills() as server:
        process = start_program(program, tmp_path, env=server.environment)
        process.communicate(timeout=60)
        ended = run_program(program, tmp_path, env=server.environment, expect_failure=True)
        assert "BudgetExceeded" in ended.err and len(server.arrived) == 1


async def test_a_note_that_stayed_behind_in_this_process_counts_and_holds_nobody_up(
    till: Till, journal: Journal
) -> None:
    facts = {"run": "r", "workflow": "w", "step": "s", "call": "s", "model": MODEL, "at_most": "0.04"}
    row = json.dumps({**facts, "owner": lease.this_process(journal)})
    journal.commit([Add(f"lr/{int(time.time() * 1000):014d}/r/s/1", row)])
    agentflow.configure(budget="0.05/month")
    with pytest.raises(BudgetExceeded, match=r"\$0\.04 of it is spent"):
        await asyncio.wait_for(ask("x"), 30)
    agentflow.configure(budget="0.07/month")
    assert await ask("x") == answer_to("x")


@pytest.mark.parametrize("bad", ["5", 5, "5/year", "/day", "much/day", "-1/day", "5/day/day", True])
def test_what_is_no_budget_of_a_period_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match=r"budget"):
        agentflow.configure(budget=bad)


async def test_a_reply_of_unknown_price_takes_all_that_was_set_aside_for_it(
    loopback: Callable[..., Loopback], journal: Journal
) -> None:
    words = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]}
    loopback({"status": 200, "body": {"id": "r", "status": "completed", "model": "priced", "output": [words]}})

    @workflow("no-usage", budget="0.03")
    async def no_usage(ctx: Any) -> list[str]:
        return [await ask("one"), await ask("two")]

    for _ in range(2):
        with pytest.raises(BudgetExceeded) as caught:
            await no_usage.run()
        assert caught.value.spent == caught.value.needed
    line = costlines.summary(journal)[0]
    assert (line.calls, line.unknown, line.paid) == (1, 1, None)


# -- what waits is not sent --------------------------------------------------------------------------------------------


class Slow(Till):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
        found = super().arrive(asked, path)
        self.release.wait(30)
        return found


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Slow() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        yield server
        server.release.set()


async def test_a_call_that_waits_for_its_turn_and_is_cancelled_is_never_sent(slow: Slow) -> None:
    @workflow("cancel", budget="0.035")
    async def cancel(ctx: Any) -> str:
        first = asyncio.ensure_future(ask("first"))
        await until(lambda: slow.arrived)
        second = asyncio.ensure_future(ask("second"))
        await until(lambda: ctx._ex.budget.line._places)
        second.cancel()
        await asyncio.wait([second])
        assert second.cancelled()
        slow.release.set()
        return await first

    assert await cancel.run() == answer_to("first")
    assert [event["text"] for event in slow.arrived] == ["first"]


@pytest.mark.parametrize("form", ["async", "plain"])
def test_ctrl_c_sends_nothing_that_waited_and_keeps_the_reply_that_was_in_flight(
    tmp_path: Path, slow: Slow, form: str
) -> None:
    program = """
        from agentflow import ledger, sync
        from agentflow.line import Line
        ledger.set_price("priced", 100, 1000)
        wait = Line.wait

        async def noted(self, admit):
            note("waits")
            await wait(self, admit)

        Line.wait = noted

        @workflow("async")
        async def by_tasks(ctx):
            words = ["first", "second"]
            return await parallel([generate_content(w, model="openai:priced", max_tokens=20) for w in words])

        @sync.workflow("plain")
        def plain(ctx):
            def ask(word):
                return sync.generate_content(word, model="openai:priced", max_tokens=20)
            return sync.parallel.map(ask, ["first", "second"])

        print({"async": by_tasks, "plain": plain}[sys.argv[1]].options(budget=sys.argv[2]).run_sync())
    """
    process = start_program(program, tmp_path, form, "0.035", env=slow.environment)
    while not slow.arrived or "waits" not in notes(tmp_path):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "waiting for a paid model call" not in process.stderr.readline():
        assert process.poll() is None
    slow.release.set()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert len(slow.arrived) == 1
    ended = run_program(program, tmp_path, form, "1", env=slow.environment)
    assert ended.out == f"{[answer_to('first'), answer_to('second')]}\n" and "doubt" not in ended.err
    assert sorted(event["text"] for event in slow.arrived) == ["first", "second"], "what was in flight was kept"


async def test_a_line_is_first_come_first_served_over_loops_and_threads() -> None:
    line, free, order = Line(), [0], []

    def admit() -> float | None:
        if free[0] <= 0:
            return float("inf")
        free[0] -= 1
        return None

    async def wait(name: str) -> None:
        await line.wait(admit)
        order.append(name)

    def on_another_loop(name: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: asyncio.run(wait(name)), daemon=True)
        thread.start()
        return thread

    tasks, threads = [], []
    for n in range(0, 6, 2):
        threads.append(on_another_loop(f"{n}"))
        await until(lambda: len(line._places) == n + 1)
        tasks.append(asyncio.ensure_future(wait(f"{n + 1}")))
        await until(lambda: len(line._places) == n + 2)
    assert not line.at_once(lambda: None), "nobody overtakes"
    tasks[1].cancel()
    await until(lambda: len(line._places) == 5)
    for n in range(5):
        with line.lock:
            free[0] += 1
        line.changed()
        await until(lambda: len(order) > n)
    assert order == ["0", "1", "2", "4", "5"]
    for thread in threads:
        thread.join(5)
    assert line.at_once(lambda: None)


def test_a_run_has_spent_what_is_paid_in_doubt_and_left_behind_also_inside_of_it(journal: Journal) -> None:
    now = f"{int(time.time() * 1000):014d}"
    rows = {
        f"l/{now}/mine/s/0": {"cost": "1"},
        f"l/{now}/mine/s/1": {"cost": None, "at_most": "20"},
        f"l/{now}/mine/s/doubt": {"doubt": "timeout", "at_most": "300"},
        f"l/{now}/mine/s/unknown": {"doubt": "timeout", "at_most": None},
        f"l/{now}/mine/saved": {"saved": [["s", MODEL, "9"]]},
        f"lr/{now}/mine/s/2": {"at_most": "4000"},
        f"l/{now}/child/s/0": {"cost": "50000", "within": ["mine"]},
        f"lr/{now}/child/s/1": {"at_most": "600000", "within": ["other", "mine"]},
        f"l/{now}/other/s/0": {"cost": "9"},
        f"l/{now}/other/s/1": {"cost": "9", "within": ["mine2"]},
        f"lr/{now}/other/s/2": {"at_most": "9"},
        "l/00000000000001/mine/s/0": {"cost": "9"},
    }
    journal.commit([Add(key, orjson.dumps(row).decode()) for key, row in rows.items()])
    assert budgets.spent(journal, "mine", time.time() - 60) == Decimal("654321")
