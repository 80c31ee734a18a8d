"""What other durable-execution systems promise in their suites, promised here: one row after the other.

Written against the public names alone, as somebody would who has read the contract and no code. The ideas are credited
in each docstring: A = aws-durable-execution-conformance-tests, B = Absurd, D = DBOS, L = LangGraph, R = Restate's
sdk-test-suite, T = Temporal. What needs real processes stands in ``test_scenarios_processes.py``.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import agentflow
from agentflow import (
    Context,
    EventTimeout,
    HumanTaskExpired,
    ModelError,
    NotRecordable,
    Retry,
    RunBusy,
    StepChanged,
    StepFailed,
    StepTimeout,
    TaskClosed,
    UsageError,
    Waiting,
    WorkflowTimeout,
    current_step,
    generate_content,
    human_task,
    parallel,
    runs,
    send_event,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.cli.app import run as cli
from agentflow.testing import FakeClock, FakeModel, export_history, replay_histories

MODEL = "openai:gpt-5-mini"
CHAT = "openai-chat:gpt-4o-mini"
CLAUDE = "anthropic:claude-haiku-4-5"
NO_DELAY = {"initial_delay": 0, "jitter": False}

# What the functions of steps have done, in order, and what fails at the moment.
done: list[Any] = []
broken: set[Any] = set()


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    done.clear()
    broken.clear()


def do(what: Any) -> Any:
    done.append(what)
    return what


async def do_later(what: Any) -> Any:
    await asyncio.sleep(0)
    done.append(what)
    return what


class OutOfStock(Exception):
    """An error whose constructor takes something else than a message."""

    def __init__(self, item: str, *, left: int) -> None:
        super().__init__(f"{left} of {item} left")
        self.item = item
        self.left = left


def sold_out(item: str) -> None:
    done.append(f"try {item}")
    raise OutOfStock(item, left=0)


# -- ways to do several things at once ------------------------------------------------------------


async def by_gather(calls: list[Callable[[], Any]]) -> list[Any]:
    return list(await asyncio.gather(*(call() for call in calls)))


async def by_group(calls: list[Callable[[], Any]]) -> list[Any]:
    async with asyncio.TaskGroup() as group:
        made = [group.create_task(call()) for call in calls]
    return [task.result() for task in made]


async def by_parallel(calls: list[Callable[[], Any]]) -> list[Any]:
    return await parallel([call() for call in calls])


async def by_names(calls: list[Callable[[], Any]]) -> list[Any]:
    return list((await parallel({f"call {i}": call() for i, call in enumerate(calls)})).values())


async def by_map(calls: list[Callable[[], Any]]) -> list[Any]:
    return await parallel.map(lambda i: calls[i](), range(len(calls)))


FORMS = [by_gather, by_group, by_parallel, by_names, by_map]
forms = pytest.mark.parametrize("fan_out", FORMS, ids=lambda form: form.__name__)


def failure_of(error: BaseException) -> BaseException:
    """The failure itself, where a task group has put it into a group."""
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


def answered(*, by: str = "Mia") -> int:
    """All open tasks approved."""
    return len([tasks.approve(task.id, by=by) for task in tasks.list()])


# -- 1: replay skips a finished step --------------------------------------------------------------


async def test_replay_skips_a_finished_step() -> None:
    """A run that is run again calls no finished step and pays for no finished call. (Idea: A step/1-9)"""

    @workflow
    async def report(ctx: Context, topic: str) -> list[Any]:
        facts = await step("facts", do, f"facts on {topic}")
        draft = await generate_content(f"Write about {facts}", model=MODEL)
        checked = await step("check", lambda: do_later(draft + "!"))
        return [facts, draft, checked]

    with FakeModel(["a draft"]) as model:
        first = await report.run("tea")
        assert [await report.run("tea") for _ in range(3)] == [first] * 3 == [["facts on tea", "a draft", "a draft!"]] * 3
        assert len(model.billed) == 1
    assert done == ["facts on tea", "a draft!"]
    (run,) = runs.list()
    assert run.status == "completed" and run.cost == model.billed[0].cost and run.saved == 3 * run.cost


def test_replay_skips_a_finished_step_in_plain_code() -> None:
    """The same for plain functions. (Idea: A step/1-9)"""

    @sync.workflow
    def report(ctx: Context, topic: str) -> list[Any]:
        facts = sync.step("facts", do, f"facts on {topic}")
        draft = sync.generate_content(f"Write about {facts}", model=CLAUDE)
        later = sync.step("later", do_later, "later")
        return [facts, draft, later, *sync.parallel.map(lambda n: sync.step("each", do, n), [1, 2])]

    with FakeModel(["a draft"]) as model:
        first = report.run("tea")
        assert report.run("tea") == first == ["facts on tea", "a draft", "later", 1, 2]
        assert len(model.billed) == 1
    assert sorted(map(str, done)) == ["1", "2", "facts on tea", "later"]


@pytest.mark.parametrize("where", ["body", "step", "branch"])
async def test_replay_skips_a_finished_child_workflow(where: str) -> None:
    """A child that has finished is replayed wherever it was started. (Idea: A child/3-12)"""

    @workflow
    async def child(ctx: Context, n: int) -> str:
        return f"{await step('work', do, n)} {await generate_content(f'About {n}', model=MODEL)}"

    @workflow(f"parent-{where}")
    async def parent(ctx: Context) -> str:
        if where == "body":
            return await child.run(1)
        if where == "step":
            return await step("child", child.run, 1)
        return (await parallel([child.run(1), step("beside", do, "beside")]))[0]

    with FakeModel(["one"]) as model:
        assert [await parent.run() for _ in range(3)] == ["1 one"] * 3
        assert len(model.billed) == 1
    assert done.count(1) == 1


@forms
async def test_replay_skips_the_finished_steps_of_a_fan_out(fan_out: Any) -> None:
    """Each branch finds its own record, whatever way it was started. (Idea: A step/1-9)"""

    @workflow
    async def all_of_them(ctx: Context) -> list[Any]:
        return await fan_out([lambda n=n: step("each", do_later, n) for n in range(4)])

    assert [await all_of_them.run() for _ in range(2)] == [[0, 1, 2, 3]] * 2
    assert sorted(done) == [0, 1, 2, 3]


# -- 2: replay raises a handled failure again -----------------------------------------------------


async def wait_by(ctx: Context, how: str) -> Any:
    if how == "person":
        return await human_task(assign_to="manager", data="go on?")
    if how == "event":
        return await ctx.wait_for_event("go on")
    return await ctx.sleep("1d")


def let_go_on(how: str, clock: FakeClock) -> None:
    if how == "person":
        answered()
    elif how == "event":
        send_event("go on")
    else:
        clock.advance("1d")


@pytest.mark.parametrize("how", ["person", "event", "time"])
async def test_replay_raises_a_handled_failure_again(how: str) -> None:
    """A failure that was caught before a wait is raised again after it, with all it carried, and nothing is called.

    (Idea: A step/1-10)
    """
    seen: list[tuple[Any, ...]] = []

    @workflow(f"sell-by-{how}")
    async def sell(ctx: Context) -> str:
        try:
            await step("reserve", sold_out, "cup", retry=Retry(max_attempts=2, **NO_DELAY))
        except OutOfStock as error:
            seen.append((str(error), error.item, error.left, error.step, error.attempts, error.error_type, error.run_id))  # type: ignore[attr-defined]
            note = await step("note", do, "no cup")
        await wait_by(ctx, how)
        return note

    with FakeClock() as clock:
        with pytest.raises(Waiting):
            await sell.run()
        let_go_on(how, clock)
        assert await sell.run() == "no cup"
        assert await sell.run() == "no cup"
    (run,) = runs.list()
    assert seen == [("0 of cup left", "cup", 0, "reserve", 2, "OutOfStock", run.id)] * 3
    assert done == ["try cup", "try cup", "no cup"]


async def test_replay_raises_a_handled_failure_of_a_model_call_again() -> None:
    """A model's refusal to serve that was caught is not asked about again after a wait. (Idea: A step/1-10)"""
    seen: list[tuple[Any, ...]] = []

    @workflow
    async def ask(ctx: Context) -> str:
        try:
            return await generate_content("Hello", model=MODEL)
        except ModelError as error:
            seen.append((type(error).__mro__[1].__name__, error.status, isinstance(error, StepFailed)))
        return f"fallback, {bool(await human_task(data='the fallback?'))}"

    with FakeModel([400]) as model:
        with pytest.raises(Waiting):
            await ask.run()
        answered()
        assert await ask.run() == "fallback, True"
        assert len(model.calls) == 1
    assert len(set(seen)) == 1 and len(seen) == 2 and seen[0][1:] == (400, True)


@pytest.mark.parametrize("where", ["body", "step"])
async def test_replay_raises_a_handled_failure_of_a_child_again(where: str) -> None:
    """A child that failed, and whose failure its parent handled, has failed for good: it is not tried again on resume.

    (Idea: A step/1-10, child)
    """

    @workflow
    async def buy(ctx: Context, item: str) -> str:
        await step("reserve", sold_out, item)
        return "bought"

    @workflow(f"order-{where}")
    async def order(ctx: Context) -> str:
        try:
            outcome = await (buy.run("cup") if where == "body" else step("buy", buy.run, "cup"))
        except OutOfStock as error:
            outcome = await step("refund", do, f"refund: {error}")
        await human_task(data="tell the customer?")
        return outcome

    with pytest.raises(Waiting):
        await order.run()
    assert done == ["try cup", "refund: 0 of cup left"]
    answered()
    assert await order.run() == "refund: 0 of cup left"
    assert done == ["try cup", "refund: 0 of cup left"], "the child was tried again although its failure was handled"


def test_replay_raises_a_handled_failure_again_in_plain_code() -> None:
    """The same for plain functions, in a child and in branches. (Idea: A step/1-10)"""

    @sync.workflow
    def buy(ctx: Context, item: str) -> str:
        sync.step("reserve", sold_out, item)
        return "bought"

    @sync.workflow
    def order(ctx: Context) -> list[Any]:
        try:
            buy.run("cup")
        except OutOfStock as error:
            first = sync.step("refund", do, f"refund: {error}")
        lost = sync.parallel([lambda: sync.step("other", sold_out, "pot")], settle=True)
        sync.human_task(data="tell the customer?")
        return [first, [str(each) for each in lost]]

    with pytest.raises(Waiting):
        order.run()
    answered()
    assert order.run() == ["refund: 0 of cup left", ["0 of pot left"]]
    assert done == ["try cup", "refund: 0 of cup left", "try pot"]


# -- 5: non-retryable error -----------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401])
@pytest.mark.parametrize("model_name", [MODEL, CHAT, CLAUDE])
@pytest.mark.parametrize("how", ["default", "retry", "step"])
async def test_an_error_that_no_retry_can_cure_is_one_attempt(
    loopback: Any, status: int, model_name: str, how: str
) -> None:
    """A bad request and a refused key are asked exactly once, and the error says which it was. (Idea: A step/1-16)"""
    server = loopback(*[{"status": status, "body": {"error": {"message": "no", "type": "invalid_request_error"}}}] * 9)

    retry = Retry(max_attempts=4, **NO_DELAY)

    async def inside() -> str:
        return await generate_content("Hello", model=model_name)

    @workflow
    async def ask(ctx: Context) -> str:
        if how == "step":
            return await step("ask", inside, retry=retry)
        return await generate_content("Hello", model=model_name, retry=retry if how == "retry" else None)

    with pytest.raises(ModelError) as failed:
        await ask.run()
    assert failed.value.status == status and failed.value.attempts == 1  # type: ignore[attr-defined]
    assert len(server.arrived) == 1
    assert {(each.status, each.attempts) for each in runs.list()[0].steps} == {("failed", 1)}


async def test_an_error_that_retry_if_refuses_is_one_attempt() -> None:
    """A step whose policy says that an error is final makes one attempt. (Idea: A step/1-16)"""

    @workflow
    async def sell(ctx: Context) -> None:
        await step("reserve", sold_out, "cup", retry=Retry(5, retry_if=lambda error: not isinstance(error, OutOfStock)))

    with pytest.raises(OutOfStock) as failed:
        await sell.run()
    assert done == ["try cup"] and failed.value.attempts == 1  # type: ignore[attr-defined]


# -- 6: retries exhausted -------------------------------------------------------------------------


@pytest.mark.parametrize("retry", [Retry(3, **NO_DELAY), {"max_attempts": 3, **NO_DELAY}], ids=["Retry", "dict"])
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_exhausted_retries_made_exactly_max_attempts_and_raise_the_last_error(retry: Any, plain: bool) -> None:
    """Exactly so many attempts as allowed, and the error that surfaces is the last one. (Idea: R RunRetry; T retry)"""

    def fail() -> None:
        done.append(current_step().attempt)
        raise ConnectionError(f"attempt {current_step().attempt}")

    async def fail_later() -> None:
        fail()

    @workflow
    async def tries(ctx: Context) -> None:
        await step("fail", fail if plain else fail_later, retry=retry)

    with pytest.raises(ConnectionError, match="attempt 3") as failed:
        await tries.run()
    assert done == [1, 2, 3] and failed.value.attempts == 3  # type: ignore[attr-defined]
    (record,) = runs.list()[0].steps
    assert (record.attempts, record.status) == (3, "failed") and "attempt 3" in str(record.error)


@pytest.mark.parametrize("model_name", [MODEL, CHAT, CLAUDE])
async def test_exhausted_retries_of_a_model_call_are_three_and_never_multiply(loopback: Any, model_name: str) -> None:
    """A provider that is down is asked three times; inside a step that retries, as often as the step says.

    (Idea: R RunRetry)
    """
    server = loopback(*[{"status": 503, "headers": {"retry-after": "0"}, "body": {"error": {"message": "down"}}}] * 20)

    async def inside() -> str:
        return await generate_content("Hello", model=model_name)

    @workflow
    async def ask(ctx: Context) -> str:
        return await generate_content("Hello", model=model_name, retry=Retry(3, **NO_DELAY))

    @workflow
    async def ask_inside(ctx: Context) -> str:
        return await step("ask", inside, retry=Retry(2, **NO_DELAY))

    with pytest.raises(ModelError) as failed:
        await ask.run()
    assert failed.value.status == 503 and len(server.arrived) == 3
    with pytest.raises(ModelError):
        await ask_inside.run()
    assert len(server.arrived) == 5


def test_exhausted_retries_in_plain_branches_are_counted_for_each() -> None:
    """Branches of plain code count their own attempts. (Idea: R RunRetry)"""

    def fail(name: str) -> None:
        done.append((name, current_step().attempt))
        raise ConnectionError(name)

    @sync.workflow
    def tries(ctx: Context) -> list[str]:
        calls = [lambda name=name: sync.step(name, fail, name, retry=Retry(2, **NO_DELAY)) for name in "ab"]
        return [str(each) for each in sync.parallel(calls, settle=True)]

    assert tries.run() == ["a", "b"] == tries.run()
    assert sorted(done) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


# -- 8: step timeout is history -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "thread", "plain"])
async def test_a_handled_timeout_is_raised_again_at_once_on_replay(kind: str) -> None:
    """A step that took too long, and whose timeout was handled, is not called again. (Idea: D test_failures)"""
    released = threading.Event()

    def slow() -> str:
        done.append("slow")
        released.wait(60)
        return "late"

    async def slow_async() -> str:
        done.append("slow")
        await asyncio.sleep(60)
        return "late"

    if kind == "plain":

        @sync.workflow("hurry-plain")
        def hurry(ctx: Context) -> str:
            try:
                return sync.step("slow", slow, timeout=0.05)
            except TimeoutError as error:
                assert isinstance(error, StepTimeout | StepFailed)
                text = sync.step("instead", do, "instead")
            sync.human_task(data=text)
            return text

        async def go() -> str:
            return await asyncio.to_thread(hurry.run)

    else:

        @workflow(f"hurry-{kind}")
        async def hurry_async(ctx: Context) -> str:
            try:
                return await step("slow", slow if kind == "thread" else slow_async, timeout=0.05)
            except StepTimeout as error:
                assert isinstance(error, TimeoutError) and error.step == "slow"
                text = await step("instead", do, "instead")
            await human_task(data=text)
            return text

        async def go() -> str:
            return await hurry_async.run()

    try:
        with pytest.raises(Waiting):
            await go()
        answered()
        assert await go() == "instead"
        assert await go() == "instead"
    finally:
        released.set()
    assert done == ["slow", "instead"]


# -- 10: deadline is recorded ---------------------------------------------------------------------


async def test_a_persons_deadline_is_recorded_and_every_resume_keeps_the_first() -> None:
    """However often the run is looked at, the deadline of the first asking holds. (Idea: B test_checkpoints)"""

    @workflow
    async def ask(ctx: Context) -> str:
        return "yes" if await human_task(data="?", timeout="2d", on_timeout=False) else "no"

    with FakeClock() as clock:
        begun = clock.now.timestamp()
        deadlines = set()
        for _ in range(4):
            with pytest.raises(Waiting) as waiting:
                await ask.run()
            deadlines |= {waiting.value.waiting_on[0]["deadline"], tasks.list()[0].deadline.timestamp()}  # type: ignore[union-attr]
            clock.advance("10h")
        assert deadlines == {begun + 2 * 86400}
        clock.advance("8h")
        assert await ask.run() == "no" == await ask.run()


async def test_an_events_deadline_is_recorded_and_every_resume_keeps_the_first() -> None:
    """The same for events. (Idea: B test_checkpoints)"""

    @workflow
    async def listen(ctx: Context) -> Any:
        return await ctx.wait_for_event("paid", timeout="2d", default="nobody paid")

    with FakeClock() as clock:
        begun = clock.now.timestamp()
        deadlines = set()
        for _ in range(4):
            run = await listen.start()
            assert run.status == "waiting"
            deadlines.add(run.waiting_on[0]["deadline"])
            clock.advance("10h")
        assert deadlines == {begun + 2 * 86400}
        clock.advance("8h")
        assert await listen.run() == "nobody paid"
        send_event("paid", "late")
        assert await listen.run() == "nobody paid"


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_a_workflows_deadline_is_recorded_and_every_resume_keeps_the_first(plain: bool) -> None:
    """The time that a run spends waiting counts, and no restart gives it more. (Idea: B test_checkpoints)"""

    async def late(ctx: Context) -> Any:
        await step("begin", do, "begin")
        return await ctx.wait_for_event("paid")

    def late_plain(ctx: Context) -> Any:
        sync.step("begin", do, "begin")
        return ctx.wait_for_event("paid")

    flow = sync.workflow("late-plain", timeout="2d", execute=late_plain) if plain else workflow("late", timeout="2d", execute=late)
    with FakeClock() as clock:
        for _ in range(3):
            with pytest.raises(Waiting):
                await asyncio.to_thread(flow.run_sync)
            clock.advance("15h")
        clock.advance("3h")
        with pytest.raises(WorkflowTimeout) as over:
            await asyncio.to_thread(flow.run_sync)
        assert over.value.deadline == datetime(2026, 1, 3, 9, tzinfo=UTC)
    assert done == ["begin"]


# -- 11: answer arrives while suspended -----------------------------------------------------------


@pytest.mark.parametrize("given_by", ["python", "command line"])
@pytest.mark.parametrize("what", ["approve", "reject", "answer", "event"])
async def test_an_answer_that_arrives_while_the_run_is_suspended_is_not_lost(
    given_by: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that nobody executes gets the answer when it goes on. (Idea: A callback/4-9, 4-12)"""

    @workflow(f"ask-{what}")
    async def ask(ctx: Context) -> Any:
        await step("before", do, "before")
        if what == "event":
            got = await ctx.wait_for_event("paid")
        elif what == "answer":
            got = await human_task("input", schema=dict[str, int], data="How many?")
        else:
            decision = await human_task("approve", data="Go?")
            got = [bool(decision), decision.by, decision.comment]
        return [got, await step("after", do, "after")]

    with pytest.raises(Waiting):
        await ask.run()
    if what == "event":
        send_event("paid", {"n": 3}, run_id=runs.list()[0].id)
    elif given_by == "python":
        task = tasks.list()[0].id
        if what == "answer":
            tasks.answer(task, {"n": 3}, by="Mia", comment="so many")
        else:
            getattr(tasks, what)(task, by="Mia", comment="so be it")
    else:
        more = ['{"n": 3}'] if what == "answer" else []
        assert cli(["tasks", what, tasks.list()[0].id, *more, "--by", "Mia", "--comment", "so be it"]) == 0
    got = {"approve": [True, "Mia", "so be it"], "reject": [False, "Mia", "so be it"]}.get(what, {"n": 3})
    assert await ask.run() == [got, "after"] == await ask.run()
    assert done == ["before", "after"]


async def test_an_event_that_arrives_while_several_runs_are_suspended_is_delivered_to_one_wait() -> None:
    """What was sent once is received once; the next one sent goes to the next wait. (Idea: A callback/4-9)"""

    @workflow
    async def listen(ctx: Context, n: int) -> list[Any]:
        return [await ctx.wait_for_event("paid"), await ctx.wait_for_event("paid", timeout="1h", default=None)]

    with FakeClock() as clock:
        for n in (1, 2):
            await listen.start(n)
        send_event("paid", "first")
        assert [(await listen.start(n)).status for n in (1, 2)] == ["waiting"] * 2
        send_event("paid", "second", run_id=listen.runs()[0].id)
        assert [(await listen.start(n)).status for n in (1, 2)] == ["waiting"] * 2
        clock.advance("2h")
        assert [await listen.run(n) for n in (1, 2)] == [["first", None], ["second", None]]


# -- 12: wait times out, handled, late answer -----------------------------------------------------


@pytest.mark.parametrize("handled", ["on_timeout", "except"])
@pytest.mark.parametrize("given_by", ["python", "command line"])
@pytest.mark.parametrize("first", ["answer", "resume"])
async def test_an_answer_after_a_handled_timeout_is_refused_and_replay_takes_the_same_branch(
    handled: str, given_by: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fallback was taken: a late answer is told so, and changes nothing. (Idea: A callback/4-14, 7-14)"""

    @workflow(f"ask-{handled}")
    async def ask(ctx: Context) -> str:
        if handled == "on_timeout":
            decision: Any = await human_task(data="Go?", timeout="1h", on_timeout=None)
        else:
            try:
                decision = await human_task(data="Go?", timeout="1h")
            except HumanTaskExpired as error:
                assert error.deadline == datetime(2026, 1, 1, 10, tzinfo=UTC)
                decision = None
        branch = await step("fallback" if decision is None else "go", do, "fallback" if decision is None else "go")
        await ctx.wait_for_event("end")
        return branch

    with FakeClock() as clock:
        with pytest.raises(Waiting):
            await ask.run()
        (task,) = tasks.list()
        clock.advance("2h")
        if first == "resume":
            with pytest.raises(Waiting):
                await ask.run()
        if given_by == "python":
            with pytest.raises(TaskClosed, match="expired") as refused:
                tasks.approve(task.id, by="Mia")
            assert refused.value.task_id == task.id
        else:
            assert cli(["tasks", "approve", task.id, "--by", "Mia"]) == 1
            assert "expired" in capsys.readouterr().err
        send_event("end")
        assert await ask.run() == "fallback" == await ask.run()
    assert tasks.get(task.id).status == "expired" and tasks.list() == []
    assert done == ["fallback"]


async def test_an_event_after_a_handled_timeout_changes_nothing() -> None:
    """A wait for an event that was given up stays given up. (Idea: A callback/4-14)"""

    @workflow
    async def listen(ctx: Context) -> list[Any]:
        try:
            first = await ctx.wait_for_event("paid", timeout="1h")
        except EventTimeout as error:
            first = await step("fallback", do, f"no {error.event}")
        return [first, await ctx.wait_for_event("end")]

    with FakeClock() as clock:
        await listen.start()
        clock.advance("2h")
        await listen.start()
        run = runs.list()[0]
        send_event("paid", 7, run_id=run.id)
        assert (await listen.start()).status == "waiting"
        send_event("end", "end", run_id=run.id)
        assert await listen.run() == ["no paid", "end"] == await listen.run()
    assert done == ["no paid"]


# -- 13: the notifier of a wait fails -------------------------------------------------------------


@pytest.mark.parametrize("form", ["before", *FORMS], ids=lambda form: getattr(form, "__name__", form))
async def test_a_notifier_that_fails_for_good_fails_the_operation_and_nothing_hangs(form: Any) -> None:
    """Who was to be told cannot be: after the last attempt the run fails instead of waiting. (Idea: A callback/7-7)"""

    def tell() -> None:
        done.append("tell")
        raise ConnectionError("mail is down")

    @workflow
    async def ask(ctx: Context) -> bool:
        def told() -> Any:
            return step("tell", tell, retry=Retry(3, **NO_DELAY))

        if form == "before":
            await told()
            return bool(await human_task(data="Go?"))
        return bool((await form([lambda: human_task(data="Go?"), told]))[0])

    async with asyncio.timeout(30):
        run = await ask.start()
    assert run.status == "failed" and "mail is down" in str(run.error)
    assert done == ["tell"] * 3
    with pytest.raises(Exception) as failed:
        await ask.run()
    assert isinstance(failure_of(failed.value), ConnectionError)
    assert done == ["tell"] * 6, "run again, a failed run tries its failed step again, with new attempts"


async def test_a_hook_that_hears_of_tasks_and_fails_loses_no_task() -> None:
    """``configure(notify=)`` is told once; when it fails, the task is there all the same. (Idea: A callback/7-7)"""

    def hear(task: Any) -> None:
        done.append(task.id)
        raise ConnectionError("mail is down")

    agentflow.configure(notify=hear)

    @workflow
    async def ask(ctx: Context) -> bool:
        return bool(await human_task(data="Go?"))

    with pytest.raises(Waiting):
        await ask.run()
    with pytest.raises(Waiting):
        await ask.run()
    assert done == [task.id for task in tasks.list()] and len(done) == 1
    answered()
    assert await ask.run() is True


# -- 14: lost wake-up race ------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["task", "event"])
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_no_wake_up_is_lost_when_a_run_waits_and_is_answered_at_the_same_moment(what: str, plain: bool) -> None:
    """Whichever comes first, a run that stays never hangs, round after round. (Idea: B test_events)"""

    @workflow("race")
    async def race(ctx: Context, number: int) -> Any:
        if what == "task":
            return bool(await human_task(data=number))
        return await ctx.wait_for_event("go", match={"number": number})

    @sync.workflow("race-plain")
    def race_plain(ctx: Context, number: int) -> Any:
        if what == "task":
            return bool(sync.human_task(data=number))
        return ctx.wait_for_event("go", match={"number": number})

    flow = (race_plain if plain else race).options(wait=True)

    def answer(number: int, gate: threading.Barrier) -> None:
        gate.wait(30)
        if what == "event":
            return send_event("go", {"number": number})
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if found := [task for task in tasks.list() if task.data == number]:
                tasks.approve(found[0].id)
                return
        raise TimeoutError("no task appeared")

    def wait(number: int, gate: threading.Barrier) -> Any:
        gate.wait(30)
        return flow.run_sync(number)

    for number in range(10):
        gate = threading.Barrier(2)
        both = asyncio.gather(asyncio.to_thread(wait, number, gate), asyncio.to_thread(answer, number, gate))
        got, _ = await asyncio.wait_for(both, 60)
        assert got == (True if what == "task" else {"number": number})


# -- 15: parallel questions to people -------------------------------------------------------------


@forms
async def test_questions_in_several_branches_are_answered_by_id_and_each_branch_gets_its_own(fan_out: Any) -> None:
    """Asked at once, answered in any order, one at a time, with a restart between each. (Idea: L multi_resume)"""

    @workflow
    async def ask(ctx: Context) -> list[Any]:
        async def one(n: int) -> list[Any]:
            before = await step("before", do, n)
            decision = await human_task(data={"n": n}, title=f"question {n}")
            return [before, bool(decision), decision.comment, await step("after", do, -n)]

        return await fan_out([lambda n=n: one(n) for n in range(1, 5)])

    with pytest.raises(Waiting) as waiting:
        await ask.run()
    assert len(waiting.value.waiting_on) == 4
    by_data = {task.data["n"]: task.id for task in tasks.list()}
    for n in (3, 1, 4, 2):
        (tasks.approve if n % 2 else tasks.reject)(by_data[n], comment=f"answer {n}")
        if n != 2:
            with pytest.raises(Waiting) as waiting:
                await ask.run()
            assert by_data[n] not in {wait["id"] for wait in waiting.value.waiting_on}
    assert await ask.run() == [[n, n % 2 == 1, f"answer {n}", -n] for n in range(1, 5)]
    assert sorted(done) == [-4, -3, -2, -1, 1, 2, 3, 4]


def test_questions_in_several_plain_branches_are_answered_by_id_and_each_branch_gets_its_own() -> None:
    """The same in threads. (Idea: L multi_resume)"""

    @sync.workflow
    def ask(ctx: Context) -> list[Any]:
        def one(n: int) -> list[Any]:
            before = sync.step("before", do, n)
            decision = sync.human_task(data={"n": n})
            return [before, bool(decision), decision.comment, sync.step("after", do, -n)]

        return sync.parallel.map(one, range(1, 5))

    with pytest.raises(Waiting):
        ask.run()
    by_data = {task.data["n"]: task.id for task in tasks.list()}
    for n in (3, 1, 4, 2):
        (tasks.approve if n % 2 else tasks.reject)(by_data[n], comment=f"answer {n}")
        if n != 2:
            with pytest.raises(Waiting):
                ask.run()
    assert ask.run() == [[n, n % 2 == 1, f"answer {n}", -n] for n in range(1, 5)]
    assert sorted(done) == [-4, -3, -2, -1, 1, 2, 3, 4]


async def test_equal_questions_in_several_branches_are_tasks_of_their_own() -> None:
    """Two branches that show the same ask twice; who answers one has not answered the other. (Idea: L multi_resume)"""

    @workflow
    async def ask(ctx: Context) -> list[str | None]:
        async def one(name: str) -> str | None:
            return (await human_task(data="the same")).comment

        return list((await parallel({"a": one("a"), "b": one("b"), "c": one("c")})).values())

    for left in (3, 2, 1):
        with pytest.raises(Waiting):
            await ask.run()
        opened = tasks.list()
        assert len(opened) == left
        tasks.approve(opened[-1].id, comment=opened[-1].id)
    found = await ask.run()
    assert len(set(found)) == 3 and set(found) == {task.id for task in tasks.list(status=None)}
    assert await ask.run() == found


async def test_questions_of_several_children_are_answered_by_id_and_each_gets_its_own() -> None:
    """Children that ask at the same time. (Idea: L multi_resume)"""

    @workflow
    async def child(ctx: Context, n: int) -> list[Any]:
        return [n, (await human_task(data=n)).comment]

    @workflow
    async def parent(ctx: Context) -> list[Any]:
        return await parallel([child.run(n) for n in range(3)])

    with pytest.raises(Waiting) as waiting:
        await parent.run()
    assert len(waiting.value.waiting_on) == 3
    for n in (2, 0, 1):
        (task,) = [task for task in tasks.list() if task.data == n]
        tasks.approve(task.id, comment=f"answer {n}")
        run = await parent.start()
    assert run.status == "completed" and run.output == [[n, f"answer {n}"] for n in range(3)]


# -- 16: siblings kept on failure -----------------------------------------------------------------


@forms
async def test_a_branch_that_succeeded_is_never_called_again_after_a_siblings_failure(fan_out: Any) -> None:
    """Of two branches one fails: run again, only that one is called. (Idea: L pending_writes_resume; T one_success)"""
    broken.add("bad")

    async def good() -> str:
        done.append("good")
        return "good"

    async def bad() -> str:
        done.append("bad")
        while "good" not in done:  # noqa: ASYNC110
            await asyncio.sleep(0)
        if broken:
            raise ConnectionError("bad")
        return "better"

    @workflow
    async def two(ctx: Context) -> list[Any]:
        return await fan_out(
            [lambda: step("good", good), lambda: generate_content("Hello", model=MODEL), lambda: step("bad", fails)]
        )

    async def fails() -> str:
        while not any(each.name == "generate_content" for each in runs.list()[0].steps):  # noqa: ASYNC110
            await asyncio.sleep(0)
        return await bad()

    with FakeModel(["hello"]) as model:
        with pytest.raises(Exception) as failed:
            await two.run()
        assert isinstance(failure_of(failed.value), ConnectionError)
        broken.clear()
        assert await two.run() == ["good", "hello", "better"] == await two.run()
        assert len(model.billed) == 1
    assert done == ["good", "bad", "bad"]


def test_a_plain_branch_that_succeeded_is_never_called_again_after_a_siblings_failure() -> None:
    """The same in threads; the one that was still at work when its sibling failed is kept too. (Idea: L, T)"""
    broken.add("bad")
    failed = threading.Event()

    def good() -> str:
        done.append("good")
        failed.wait(30)
        return "good"

    def bad() -> str:
        done.append("bad")
        failed.set()
        if broken:
            raise ConnectionError("bad")
        return "better"

    @sync.workflow
    def two(ctx: Context) -> list[Any]:
        return sync.parallel([lambda: sync.step("good", good), lambda: sync.step("bad", bad)])

    with pytest.raises(ConnectionError):
        two.run()
    broken.clear()
    assert two.run() == ["good", "better"] == two.run()
    assert sorted(done) == ["bad", "bad", "good"]


# -- 17: map order --------------------------------------------------------------------------------


@forms
async def test_results_are_in_item_order_whatever_finishes_first(fan_out: Any) -> None:
    """The last item finishes first, the first one last. (Idea: A map/9-11)"""

    @workflow
    async def squares(ctx: Context) -> list[int]:
        gates = [asyncio.Event() for _ in range(6)]
        gates[5].set()

        async def square(n: int) -> int:
            await gates[n].wait()
            if n:
                gates[n - 1].set()
            done.append(n)
            return n * n

        return await fan_out([lambda n=n: step(f"square {n}", lambda: square(n)) for n in range(6)])

    assert await squares.run() == [0, 1, 4, 9, 16, 25]
    assert done == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("concurrency", [None, 1, 2, 6])
async def test_map_keeps_item_order_under_every_limit(concurrency: int | None) -> None:
    """Items in order whatever the limit, first and replayed, plain and not. (Idea: A map/9-11)"""

    @workflow(f"map-{concurrency}")
    async def mapped(ctx: Context) -> list[int]:
        return await parallel.map(lambda n: step("double", lambda: do_later(2 * n)), range(6), concurrency=concurrency)

    @sync.workflow(f"map-plain-{concurrency}")
    def mapped_plain(ctx: Context) -> list[int]:
        return sync.parallel.map(lambda n: sync.step("double", lambda: do(2 * n)), range(6), concurrency=concurrency)

    assert await mapped.run() == [0, 2, 4, 6, 8, 10] == await mapped.run()
    assert await asyncio.to_thread(mapped_plain.run) == [0, 2, 4, 6, 8, 10] == await asyncio.to_thread(mapped_plain.run)
    assert sorted(done) == sorted([0, 2, 4, 6, 8, 10] * 2)


# -- 18: fail fast and limits ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "dict", "map"])
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_branches_after_a_failed_one_never_start(form: str, plain: bool) -> None:
    """With one at a time, what stands behind the failed branch is not begun. (Idea: A parallel/8-5, 8-6)"""

    def some(n: int) -> int:
        done.append(n)
        if n == 2:
            raise ConnectionError("two")
        return n

    def fanned(at_once: Any, make: Callable[[int], Any]) -> Any:
        if form == "map":
            return at_once.map(make, range(6), concurrency=1)
        made = [make(n) if not plain else (lambda n=n: make(n)) for n in range(6)]
        return at_once(made if form == "list" else dict(enumerate(made)), concurrency=1)

    @workflow
    async def one_by_one(ctx: Context) -> Any:
        return await fanned(parallel, lambda n: step("some", some, n))

    @sync.workflow
    def one_by_one_plain(ctx: Context) -> Any:
        return fanned(sync.parallel, lambda n: sync.step("some", some, n))

    flow = one_by_one_plain if plain else one_by_one
    with pytest.raises(ConnectionError, match="two"):
        await asyncio.to_thread(flow.run_sync)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "2"])
async def test_a_limit_that_means_nothing_is_refused_before_anything_starts(wrong: Any) -> None:
    """Nothing at a time is no way to do something. (Idea: A parallel/8-19)"""

    @workflow
    async def limited(ctx: Context) -> None:
        for start in (
            lambda: parallel([step("a", do, 1)], concurrency=wrong),
            lambda: parallel.map(lambda n: step("b", do, n), [1], concurrency=wrong),
        ):
            with pytest.raises(UsageError, match="concurrency"):
                await start()
        for start_plain in (
            lambda: sync.parallel([lambda: sync.step("a", do, 1)], concurrency=wrong),
            lambda: sync.parallel.map(lambda n: sync.step("b", do, n), [1], concurrency=wrong),
        ):
            with pytest.raises(UsageError, match="concurrency"):
                start_plain()

    await limited.run()
    assert done == []


async def test_nothing_to_do_is_done_at_once() -> None:
    """An empty fan-out has an empty result. (Idea: A parallel/8-19)"""

    @workflow
    async def empty(ctx: Context) -> list[Any]:
        return [await parallel([]), await parallel({}), await parallel.map(do_later, []), await parallel([], concurrency=2)]

    @sync.workflow
    def empty_plain(ctx: Context) -> list[Any]:
        return [sync.parallel([]), sync.parallel({}), sync.parallel.map(do, []), sync.parallel([], settle=True)]

    assert await empty.run() == [[], {}, [], []] == await empty.run()
    assert await asyncio.to_thread(empty_plain.run) == [[], {}, [], []]


# -- 19: code changed -----------------------------------------------------------------------------


async def test_changed_code_runs_again_only_what_asks_a_model() -> None:
    """A payment is not repeated because of a refactoring; a prompt that was edited asks again. (Idea: D, R)"""

    def flow(charge: Any, prompt: str) -> Any:
        @workflow("changing")
        async def changing(ctx: Context) -> list[Any]:
            return [await step("charge", charge), await generate_content(prompt, model=MODEL)]

        return changing

    def first() -> str:
        return do("charged")

    def refactored() -> str:
        amount = "charged"
        return do(amount + "")

    with FakeModel(["one", "two"]) as model:
        assert await flow(first, "Hello").run() == ["charged", "one"]
        assert await flow(refactored, "Hello").run() == ["charged", "one"]
        assert await flow(refactored, "Good morning").run() == ["charged", "two"]
        assert await flow(first, "Hello").run() == ["charged", "one"]
        assert len(model.billed) == 2
    assert done == ["charged"]


@pytest.mark.parametrize("where", ["workflow", "step"])
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_changed_code_under_error_is_refused_clearly_before_anything_is_done_or_billed(where: str, plain: bool) -> None:
    """The error names step and way out; no step is called, no model is asked. (Idea: D test_nondeterministic_workflow)"""
    options: Any = {"on_change": "error"}

    def first(n: int) -> int:
        return do(n)

    def second(n: int) -> int:
        return do(n) + 1

    def flow(fn: Any, question: str, n: int) -> Any:
        on_step = options if where == "step" else {}

        @workflow("strict", **(options if where == "workflow" else {}))
        async def strict(ctx: Context) -> list[Any]:
            return [await step("first", fn, n, **on_step), await generate_content(question, model=MODEL)]

        @sync.workflow("strict-plain", **(options if where == "workflow" else {}))
        def strict_plain(ctx: Context) -> list[Any]:
            return [sync.step("first", fn, n, **on_step), sync.generate_content(question, model=MODEL)]

        return strict_plain if plain else strict

    def go(flow: Any) -> Any:
        return asyncio.to_thread(flow.run_sync)

    with FakeModel(["hello"]) as model:
        assert await go(flow(first, "Hello", 1)) == [1, "hello"]
        with pytest.raises(StepChanged, match=r"first.*other code.*rerun=\['first'\]"):
            await go(flow(second, "Hello", 1))
        with pytest.raises(StepChanged, match="other data") as changed:
            await go(flow(first, "Hello", 2))
        assert changed.value.step == "first" and "2" in str(changed.value)
        if where == "workflow":
            with pytest.raises(StepChanged, match="generate_content"):
                await go(flow(first, "Good morning", 1))
        assert await go(flow(first, "Hello", 1)) == [1, "hello"]
        assert len(model.calls) == 1
    assert done == [1]


async def test_changed_code_never_hands_a_step_its_neighbours_result() -> None:
    """A call of the same name inserted before finished ones gets an answer of its own. (Idea: D, R)"""

    def flow(names: str) -> Any:
        @workflow("letters")
        async def letters(ctx: Context) -> list[Any]:
            return [await step("letter", do, name) for name in names]

        return letters

    assert await flow("bcd").run() == list("bcd")
    assert await flow("abcd").run() == list("abcd")
    assert await flow("dcxab").run() == list("dcxab")
    assert done == list("bcdax")


# -- 20: old histories still replay ---------------------------------------------------------------


@workflow("scenario-history")
async def with_history(ctx: Context, n: int) -> list[Any]:
    parts = await parallel.map(lambda i: step("part", do, i), range(n))
    text = await generate_content("Say it", model=MODEL)
    decision = await human_task(data=parts)
    return [parts, text, decision.by, ctx.now("end")]


def test_histories_of_a_run_replay_with_todays_code_and_a_changed_code_is_found(tmp_path: Path) -> None:
    """A frozen run replays without calling anything; one that would run a step anew is found. (Idea: test_replayer)"""
    with FakeModel(["said", "said"]):
        for n in (2, 3):
            with pytest.raises(Waiting):
                with_history.run_sync(n)
        tasks.approve(next(task.id for task in tasks.list() if len(task.data) == 2), by="Mia")
        with_history.run_sync(2)
    file = tmp_path / "histories" / "all.jsonl"
    file.parent.mkdir()
    export_history(file)
    replayed = done.copy()
    with FakeModel([]):
        (history,) = replay_histories(file.parent)
    assert sorted(history.replayed) == sorted(run.id for run in runs.list())
    assert done == replayed, "replaying a history called a step"

    @workflow("scenario-history")
    async def changed(ctx: Context, n: int) -> list[Any]:
        await step("new", do, "new")
        return []

    with pytest.raises(AssertionError, match="is not replayed"):
        replay_histories(file.parent)
    workflow("scenario-history", execute=with_history.fn)
    with FakeModel([]):
        replay_histories(file.parent)


def test_a_history_of_a_version_that_nobody_knows_is_refused_plainly(tmp_path: Path) -> None:
    """What cannot be read is said to be so, before anything is read from it. (Idea: temporal sdk-python test_replayer)"""

    @workflow("scenario-small")
    async def small(ctx: Context) -> int:
        return await step("one", do, 1)

    small.run_sync()
    file = tmp_path / "histories" / "future.jsonl"
    export_history(file)
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(head) | {"layout": 99}), *rows]) + "\n")
    (history,) = replay_histories(file.parent)
    assert history.replayed == [] and "99" in str(history.refused)
    assert done == [1]


# -- 21: started twice with one id ----------------------------------------------------------------


@pytest.mark.parametrize("named_by", ["input", "option", "function"])
async def test_started_twice_with_one_id_it_is_one_run_with_one_result(named_by: str) -> None:
    """At once, one after the other, and after it has ended: one run. (Idea: B idempotent_spawn; T deduplication)"""

    async def order(ctx: Context, number: int, note: str = "") -> list[Any]:
        await asyncio.sleep(0.01)
        return [await step("charge", do_later, number), ctx.run_id]

    flow = workflow(f"order-by-{named_by}", execute=order, run_id=(lambda number, note="": f"order-{number}") if named_by == "function" else None)

    def start(number: int) -> Any:
        return flow.options(busy="wait", run_id=f"order-{number}" if named_by == "option" else None).run(number)

    first = await asyncio.gather(*(start(1) for _ in range(5)))
    later = [await start(1) for _ in range(2)]
    assert len({json.dumps(each) for each in first + later}) == 1
    assert len(runs.list()) == 1 and done == [1]
    other = await start(2)
    assert other[0] == 2 and other[1] != first[0][1] and len(runs.list()) == 2
    assert done == [1, 2]
    if named_by != "input":
        assert first[0][1] == "order-1"


async def test_started_twice_at_once_the_second_is_told_who_owns_the_run() -> None:
    """Without patience the second one gets an error that names the owner, and nothing runs twice. (Idea: B)"""
    going = asyncio.Event()

    async def hold() -> int:
        done.append("hold")
        await going.wait()
        return 1

    @workflow
    async def order(ctx: Context) -> int:
        return await step("hold", hold)

    first = asyncio.create_task(order.options(run_id="one").run())
    while not done:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(RunBusy, match="one") as busy:
        await order.options(run_id="one").run()
    assert busy.value.run_id == "one"
    going.set()
    assert await first == 1 == await order.options(run_id="one").run()
    assert done == ["hold"]


async def test_another_workflows_run_id_is_refused() -> None:
    """An id belongs to one workflow. (Idea: B test_idempotent_spawn)"""

    @workflow
    async def one(ctx: Context) -> str:
        return "one"

    @workflow
    async def two(ctx: Context) -> str:
        return await step("two", do, "two")

    assert await one.options(run_id="x").run() == "one"
    with pytest.raises(UsageError, match="'x' belongs to workflow 'one'"):
        await two.options(run_id="x").run()
    assert done == []


# -- 22: values and errors survive ----------------------------------------------------------------


class Purchase(BaseModel):
    number: int
    total: Decimal


@dataclass
class Point:
    x: int
    y: tuple[int, ...]


VALUES = [
    None, "", 0, False, [], {}, (1, (2,)), {1, 2}, {"a": None}, b"\x00", Decimal("1.10"), float("inf"),
    datetime(2026, 1, 2, tzinfo=UTC), Purchase(number=1, total=Decimal("2.50")), Point(1, (2, 3)), {(1, 2): "pair"}, 2**80,
]  # fmt: skip


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_values_survive_as_what_they_were(plain: bool) -> None:
    """None, too, is a result; the first run gets the same as a replay. (Idea: T data_converter/empty)"""

    @workflow
    async def give(ctx: Context, i: int) -> Any:
        return await step("give", lambda: do_value(i))

    @sync.workflow
    def give_plain(ctx: Context, i: int) -> Any:
        return sync.step("give", lambda: do_value(i))

    def do_value(i: int) -> Any:
        done.append(i)
        return VALUES[i]

    flow = give_plain if plain else give
    for i, value in enumerate(VALUES):
        for _ in range(2):
            got = await asyncio.to_thread(flow.run_sync, i)
            assert got == value and type(got) is type(value)
    assert done == list(range(len(VALUES)))
    assert runs.list()[-1].output is None and runs.list()[-1].result() is None


@pytest.mark.parametrize("what", ["step", "run"])
async def test_a_generator_as_result_fails_clearly_where_it_would_be_recorded(what: str) -> None:
    """What has no recorded form is refused with the path to it, and not kept half. (Idea: D nonserializable_return)"""

    def numbers() -> Any:
        done.append("numbers")
        return {"all": [1, (n for n in range(3))]}

    @workflow
    async def give(ctx: Context) -> Any:
        return await step("numbers", numbers) if what == "step" else numbers()

    for _ in range(2):
        with pytest.raises(NotRecordable, match=r"result\['?all'?\]\[1\]|result\.all\[1\]") as refused:
            await give.run()
        assert "generator" in str(refused.value)
    assert runs.list()[0].status == "failed" and "generator" in str(runs.list()[0].error)


async def test_a_generator_function_as_step_is_refused_or_fails_clearly() -> None:
    """A function that yields has no result to keep. (Idea: D nonserializable_return)"""

    def numbers() -> Any:
        yield from range(3)

    async def numbers_async() -> Any:
        yield 1

    for fn in (numbers, numbers_async):

        @workflow(f"give-{fn.__name__}")
        async def give(ctx: Context) -> Any:
            return await step("numbers", fn)

        with pytest.raises(UsageError, match="generator"):
            await give.run()


async def test_an_exception_with_its_own_constructor_survives() -> None:
    """Caught by its own type first and on replay, with what it carried; the run's error is readable. (Idea: D)"""

    @workflow
    async def sell(ctx: Context) -> None:
        await step("reserve", sold_out, "cup")

    with pytest.raises(OutOfStock, match="0 of cup left") as first:
        await sell.run()
    run = runs.list()[0]
    assert run.error == "OutOfStock: 0 of cup left" and run.status == "failed"
    with pytest.raises(OutOfStock) as again:
        run.result()
    for error in (first.value, again.value):
        assert isinstance(error, StepFailed) and isinstance(error, OutOfStock)
        assert (error.item, error.left, error.step, error.error_type) == ("cup", 0, "reserve", "OutOfStock")


# -- 23: suspend inside a fan-out -----------------------------------------------------------------


@forms
async def test_what_had_finished_in_a_fan_out_that_suspends_is_not_run_again_and_the_order_is_rebuilt(fan_out: Any) -> None:
    """Some items wait, some are through: on resume only the waiting ones go on. (Idea: A map/9-15, parallel/8-14)"""

    @workflow
    async def some_wait(ctx: Context) -> list[Any]:
        async def one(n: int) -> Any:
            value = await step("work", do_later, n)
            if n == 1:
                await human_task(data=n)
            if n == 3:
                await ctx.sleep("1d")
            return await step("end", do_later, value * 10)

        return await fan_out([lambda n=n: one(n) for n in range(5)])

    with FakeClock() as clock:
        with pytest.raises(Waiting) as waiting:
            await some_wait.run()
        assert {wait["kind"] for wait in waiting.value.waiting_on} == {"task", "sleep"}
        assert sorted(done) == sorted([0, 1, 2, 3, 4, 0, 20, 40])
        answered()
        with pytest.raises(Waiting):
            await some_wait.run()
        clock.advance("1d")
        assert await some_wait.run() == [0, 10, 20, 30, 40]
    assert sorted(done) == sorted([0, 1, 2, 3, 4, 0, 10, 20, 30, 40])


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_a_limited_fan_out_that_suspends_is_rebuilt_in_order(plain: bool) -> None:
    """With fewer places than items all questions get asked in the end, and nothing runs twice. (Idea: A map/9-15)"""

    @workflow
    async def limited(ctx: Context) -> list[Any]:
        async def one(n: int) -> Any:
            value = await step("work", do, n)
            return [value, (await human_task(data=n)).comment]

        return await parallel.map(one, range(5), concurrency=2)

    @sync.workflow
    def limited_plain(ctx: Context) -> list[Any]:
        def one(n: int) -> Any:
            value = sync.step("work", do, n)
            return [value, sync.human_task(data=n).comment]

        return sync.parallel.map(one, range(5), concurrency=2)

    flow = limited_plain if plain else limited
    for _ in range(10):
        run = await asyncio.to_thread(flow.start) if plain else await flow.start()
        if run.status != "waiting":
            break
        for task in tasks.list():
            tasks.approve(task.id, comment=f"answer {task.data}")
    assert run.status == "completed" and run.output == [[n, f"answer {n}"] for n in range(5)]
    assert sorted(done) == list(range(5))


# -- 24: tolerated failures -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "dict", "map", "plain", "plain map"])
async def test_a_fan_out_that_may_lose_items_reports_which_and_reruns_only_those(form: str) -> None:
    """What failed stands in its place; asked to, the run tries those again and no other. (Idea: A map completion)"""
    broken.update({1, 4})

    def some(n: int) -> int:
        done.append(n)
        if n in broken:
            raise OutOfStock(f"item {n}", left=n)
        return n

    def told(results: Any) -> list[Any]:
        values = results.values() if isinstance(results, dict) else results
        return [f"lost {each.item}" if isinstance(each, OutOfStock) else each for each in values]

    @workflow(f"tolerant-{form}")
    async def tolerant(ctx: Context) -> list[Any]:
        made = {n: step("some", some, n) for n in range(6)} if form != "map" else {}
        if form == "list":
            return told(await parallel(list(made.values()), settle=True))
        if form == "dict":
            return told(await parallel(made, settle=True))
        return told(await parallel.map(lambda n: step("some", some, n), range(6), settle=True))

    @sync.workflow(f"tolerant-{form}-plain")
    def tolerant_plain(ctx: Context) -> list[Any]:
        if form == "plain":
            return told(sync.parallel([lambda n=n: sync.step("some", some, n) for n in range(6)], settle=True))
        return told(sync.parallel.map(lambda n: sync.step("some", some, n), range(6), settle=True))

    flow = tolerant_plain if form.startswith("plain") else tolerant

    def go(**options: Any) -> Any:
        return asyncio.to_thread(flow.options(**options).run_sync)

    assert await go() == [0, "lost item 1", 2, 3, "lost item 4", 5] == await go()
    assert sorted(done) == list(range(6))
    done.clear()
    broken.discard(4)
    lost = [each.id for each in runs.list()[0].steps if each.status == "failed"]
    assert len(lost) == 2
    assert await go(rerun=lost) == [0, "lost item 1", 2, 3, 4, 5]
    assert sorted(done) == [1, 4]


async def test_a_fan_out_that_lost_too_many_fails_the_run_and_tries_only_those_again() -> None:
    """The body decides that too much was lost; run again, what had succeeded is kept. (Idea: A map completion)"""
    broken.update({1, 4})

    def some(n: int) -> int:
        done.append(n)
        if n in broken:
            raise ConnectionError(f"item {n}")
        return n

    @workflow
    async def strict(ctx: Context) -> list[Any]:
        got = await parallel.map(lambda n: step("some", some, n), range(6), settle=True)
        lost = [each for each in got if isinstance(each, Exception)]
        if len(lost) > 1:
            raise ExceptionGroup("too many", lost)
        return [str(each) for each in got]

    with pytest.raises(ExceptionGroup):
        await strict.run()
    done.clear()
    broken.discard(4)
    assert await strict.run() == ["0", "item 1", "2", "3", "4", "5"]
    assert sorted(done) == [1, 4]
