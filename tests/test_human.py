"""Questions to people: nothing blocks, the first decision wins, an answer holds for what was shown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

import agentflow
from agentflow import (
    Context,
    Decision,
    HumanTask,
    HumanTaskExpired,
    StepChanged,
    StepTimeout,
    TaskClosed,
    TaskRejected,
    UsageError,
    Waiting,
    human,
    human_task,
    parallel,
    runs,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow import schema as schema_
from agentflow.settings import settings
from tests.programs import notes, run_program

DAY = 86_400.0


class Clock:
    """Seconds since 1970 that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, tzinfo=UTC).timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    settings.clock = made = Clock()
    return made


class Form(BaseModel):
    amount: int
    reason: str = ""


def asking(name: str, **options: Any) -> Any:
    @workflow(name)
    async def flow(ctx: Context, draft: str) -> Any:
        decision = await human_task(type="approve", assign_to="manager", data={"draft": draft}, **options)
        return decision

    return flow


def only_task(**wanted: Any) -> HumanTask:
    (task,) = tasks.list(**wanted)
    return task


async def opened() -> None:
    """Until a task is open."""
    async with asyncio.timeout(10):
        while not tasks.list():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# -- asking --------------------------------------------------------------------------------------


async def test_run_waits_and_the_error_names_task_assignee_and_command() -> None:
    flow = asking("asks", title="Send this?")
    with pytest.raises(Waiting) as waits:
        await flow.run("hello")
    task = only_task()
    assert waits.value.run_id == flow.runs()[0].id == task.run_id
    (wait,) = waits.value.waiting_on
    assert (wait["kind"], wait["id"], wait["assign_to"], wait["title"]) == ("task", task.id, "manager", "Send this?")
    for word in (task.id, "manager", "Send this?", f"agentflow tasks approve {task.id}"):
        assert word in str(waits.value)
    run = flow.runs()[0]
    assert run.status == "waiting" and run.waiting_on == waits.value.waiting_on
    with pytest.raises(Waiting):
        run.result()
    assert (task.status, task.type, task.workflow, task.data) == ("open", "approve", "asks", {"draft": "hello"})


async def test_start_returns_the_waiting_run_and_awaiting_it_goes_on() -> None:
    flow = asking("starts")
    run = await flow.start("hello")
    assert run.status == "waiting"
    tasks.approve(only_task().id, by="Ann", comment="good")
    decision = await run
    assert decision.approved and decision and (decision.by, decision.comment) == ("Ann", "good")
    assert isinstance(decision, Decision) and decision.at is not None and decision.at.tzinfo is not None
    assert flow.get(run.id).status == "completed"


async def test_asking_again_while_waiting_opens_no_second_task(again: Callable[[], None]) -> None:
    flow = asking("patient")
    for _ in range(3):
        again()
        assert (await flow.start("hello")).status == "waiting"
    assert len(tasks.list(status=None)) == 1


async def test_rejection_is_a_decision_whose_truth_is_false() -> None:
    flow = asking("rejects")
    await flow.start("hello")
    tasks.reject(only_task().id, by="Bob", comment="too short")
    decision = await flow.run("hello")
    assert not decision and (decision.approved, decision.by, decision.comment) == (False, "Bob", "too short")


async def test_answer_is_recorded_and_replayed(again: Callable[[], None]) -> None:
    flow = asking("replays")
    await flow.start("hello")
    tasks.approve(only_task().id, by="Ann")
    first = await flow.run("hello")
    again()
    assert await flow.run("hello") == first
    assert tasks.list() == []
    (record,) = flow.runs()[0].steps
    assert (record.name, record.kind, record.status) == ("approve", "human", "completed")


async def test_workflow_in_which_except_exception_surrounds_the_question_still_waits() -> None:
    @workflow("broad-except")
    async def flow(ctx: Context) -> str:
        try:
            decision = await human_task(data=1)
        except Exception:
            return "swallowed"
        return f"{decision.approved}"

    assert (await flow.start()).status == "waiting"
    tasks.approve(only_task().id)
    assert await flow.run() == "True"


# -- deciding ------------------------------------------------------------------------------------


async def test_first_decision_wins_and_a_later_one_is_told_who_decided() -> None:
    flow = asking("first-wins")
    await flow.start("hello")
    task = only_task()
    decided = tasks.approve(task.id, by="Ann")
    assert decided.status == "approved" and decided.decision is not None and decided.decision.by == "Ann"
    for late in (tasks.approve, tasks.reject):
        with pytest.raises(TaskClosed, match="approved already, by Ann") as refused:
            late(task.id, by="Bob")
        assert refused.value.task_id == task.id
    assert (await flow.run("hello")).by == "Ann"


async def test_many_answers_at_the_same_moment_leave_one_decision() -> None:
    flow = asking("race")
    await flow.start("hello")
    task = only_task()

    def decide(n: int) -> str | None:
        try:
            tasks.approve(task.id, by=f"person {n}")
        except TaskClosed:
            return None
        return f"person {n}"

    outcomes = await asyncio.gather(*(asyncio.to_thread(decide, n) for n in range(8)))
    (winner,) = [who for who in outcomes if who]
    assert (await flow.run("hello")).by == winner


async def test_task_is_found_by_the_beginning_of_its_id() -> None:
    await asking("short").start("hello")
    task = only_task()
    assert tasks.get(task.id[:6]).id == task.id == tasks.get(task.id.removeprefix("t-")[:6]).id


async def test_task_of_nobody_in_particular_and_of_several() -> None:
    @workflow("assignees")
    async def flow(ctx: Context) -> None:
        await parallel([human_task(title="a"), human_task(title="b", assign_to=["Ann", "Bob"])])

    with pytest.raises(Waiting) as waits:
        await flow.run()
    assert "anybody" in str(waits.value) and "Ann, Bob" in str(waits.value)


async def test_people_waited_for_in_branches_inside_a_step_suspend_the_run(again: Callable[[], None]) -> None:
    async def both() -> list[bool]:
        return [bool(one) for one in await parallel([human_task(title="a"), human_task(title="b")])]

    @workflow("inside")
    async def flow(ctx: Context) -> list[bool]:
        return await step("both", both)

    with pytest.raises(Waiting) as waits:
        await asyncio.wait_for(flow.run(), 60)
    for wait in waits.value.waiting_on:
        tasks.approve(wait["id"])
    again()
    assert await flow.run() == [True, True] and len(waits.value.waiting_on) == 2


# -- an answer holds for what was shown ----------------------------------------------------------


async def test_other_data_opens_a_new_task_and_withdraws_the_open_one(again: Callable[[], None]) -> None:
    draft = "first"

    @workflow("other-data")
    async def flow(ctx: Context) -> str:
        written = await step("write", lambda: drafts[-1])
        decision = await human_task(data={"draft": written}, assign_to="editor")
        return f"{written}: {decision.approved}"

    drafts = [draft]
    await flow.start()
    old = only_task()
    drafts.append("second")
    again()
    await flow.options(rerun=["write"]).start()
    new = only_task()
    assert new.id != old.id and new.data == {"draft": "second"}
    assert tasks.get(old.id).status == "withdrawn"
    with pytest.raises(TaskClosed, match="withdrawn"):
        tasks.approve(old.id, by="Ann")
    tasks.approve(new.id, by="Ann")
    assert await flow.run() == "second: True"


async def test_approval_of_other_data_is_not_used(again: Callable[[], None]) -> None:
    @workflow("approved-other")
    async def flow(ctx: Context) -> str:
        written = await step("write", lambda: drafts[-1])
        await human_task(data=written)
        return written

    drafts = ["first"]
    await flow.start()
    tasks.approve(only_task().id, by="Ann")
    assert await flow.run() == "first"
    drafts.append("second")
    again()
    assert (await flow.options(rerun=["write"]).start()).status == "waiting"
    assert only_task().data == "second"


@pytest.mark.parametrize("policy", ["auto", "rerun", "reuse", "error"])
def test_human_decisions_follow_the_data_shown_whatever_on_change_says(tmp_path: Path, policy: str) -> None:
    program = f"""
        @workflow("policy", on_change="{policy}")
        async def flow(ctx):
            return (await human_task(data={{"draft": %r}})).by
        run = asyncio.run(flow.start())
        print(run.status, [(t.status, t.data["draft"]) for t in tasks.list(status=None)])
        if run.status == "waiting":
            tasks.approve(tasks.list()[0].id, by="Ann")
        print(flow.run_sync() if "finish" in sys.argv else "")
    """
    ended = run_program(program % "first", tmp_path, "finish")
    assert ended.out == "waiting [('open', 'first')]\nAnn\n"
    ended = run_program(program % "second", tmp_path)
    assert ended.out.startswith("waiting [('approved', 'first'), ('open', 'second')]"), ended.out


def test_clock_in_the_data_is_refused_by_name_instead_of_asking_for_ever(tmp_path: Path) -> None:
    program = """
        import time
        @workflow("endless")
        async def flow(ctx):
            return (await human_task(data={"draft": "hello", "read_at": time.time()})).approved
        try:
            print(flow.run_sync())
        except Waiting:
            print("waiting")
            tasks.approve(tasks.list()[0].id, by="Ann")
        except NondeterministicStep as error:
            print("refused:", error)
    """
    assert run_program(program, tmp_path).out == "waiting\n"
    ended = run_program(program, tmp_path)
    assert ended.out.startswith("refused:"), ended.out
    assert (
        "read_at" in ended.out and "ctx.now()" in ended.out and "draft" not in ended.out.split("Take what differs")[1]
    )


async def test_recorded_clock_in_the_data_is_asked_once(again: Callable[[], None]) -> None:
    @workflow("recorded-clock")
    async def flow(ctx: Context) -> bool:
        return bool((await human_task(data={"read_at": ctx.now()})).approved)

    await flow.start()
    again()
    await flow.start()
    tasks.approve(only_task(status=None).id)
    assert await flow.run()


# -- schema --------------------------------------------------------------------------------------


async def test_schema_gives_an_instance_that_a_person_filled_in(again: Callable[[], None]) -> None:
    flow = asking("form", schema=Form)
    await flow.start("hello")
    task = only_task()
    assert task.schema is not None and set(task.schema["properties"]) == {"amount", "reason"}
    answered = tasks.answer(task.id, {"amount": 3, "reason": "fair"}, by="Ann", comment="ok")
    assert answered.status == "answered"
    assert await flow.run("hello") == Form(amount=3, reason="fair")
    again()
    assert await flow.run("hello") == Form(amount=3, reason="fair")


@pytest.mark.parametrize(
    "data, words", [({"reason": "x"}, "amount"), ({"amount": "three"}, "amount"), ("text", "amount"), (None, "amount")]
)
async def test_answer_that_does_not_fit_the_schema_is_refused_where_it_is_given(data: Any, words: str) -> None:
    flow = asking("form", schema=Form)
    await flow.start("hello")
    with pytest.raises(UsageError, match=words):
        tasks.answer(only_task().id, data, by="Ann")
    assert only_task().status == "open"
    with pytest.raises(UsageError, match=r"tasks\.answer"):
        tasks.approve(only_task().id, by="Ann")
    tasks.answer(only_task().id, Form(amount=1), by="Ann")
    assert await flow.run("hello") == Form(amount=1)


async def test_rejection_of_a_form_raises_task_rejected_with_the_decision(again: Callable[[], None]) -> None:
    flow = asking("form-rejected", schema=Form)
    await flow.start("hello")
    tasks.reject(only_task().id, by="Bob", comment="no idea")
    for _ in range(2):
        with pytest.raises(TaskRejected, match=r"Bob.*no idea") as rejected:
            await flow.options(rerun=[]).run("hello")
        assert rejected.value.decision.by == "Bob" and not rejected.value.decision
        again()


@pytest.mark.parametrize(
    "schema, bad, good",
    [(int, "x", 4), (list[str], "x", ["a"]), (bool, "maybe", True), (dict[str, int], [1], {"a": 1})],
)
async def test_any_type_can_be_the_schema(schema: Any, bad: Any, good: Any) -> None:
    flow = asking("plain-form", schema=schema)
    await flow.start("hello")
    with pytest.raises(UsageError):
        tasks.answer(only_task().id, bad)
    tasks.answer(only_task().id, good)
    assert await flow.run("hello") == good


class Nested(BaseModel):
    items: list[Form]
    level: int = 0


@pytest.mark.parametrize(
    "bad", [{"items": [{"amount": "x"}]}, {"items": [{}]}, {"items": [{"amount": 1}], "level": "high"}, {"items": 3}]
)
async def test_wrong_field_deep_in_a_form_is_refused_where_it_is_given(bad: Any) -> None:
    flow = asking("nested-form", schema=Nested)
    await flow.start("hello")
    with pytest.raises(UsageError):
        tasks.answer(only_task().id, bad)
    tasks.answer(only_task().id, {"items": [{"amount": 1}]})
    assert await flow.run("hello") == Nested(items=[Form(amount=1)])


async def test_answer_without_a_recorded_form_is_refused_and_the_task_stays_open() -> None:
    flow = asking("unrecordable")
    await flow.start("hello")
    with pytest.raises(UsageError, match="data"):
        tasks.answer(only_task().id, {"lock": asyncio.Lock()})
    assert only_task().status == "open"


def odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


class Odd(BaseModel):
    amount: Annotated[int, AfterValidator(odd)]
    on: date | None = None


async def test_validator_of_the_type_refuses_an_answer_where_it_is_given(again: Callable[[], None]) -> None:
    flow = asking("validated", schema=Odd)
    await flow.start("hello")
    for wrong in ({"amount": 2}, {"amount": 1, "on": "31.12.2026"}):
        with pytest.raises(UsageError, match=r"must be odd|amount|on.*date"):
            tasks.answer(only_task().id, wrong, by="Ann")
        assert only_task().status == "open"
    tasks.answer(only_task().id, {"amount": 3, "on": "2026-12-31"}, by="Ann")
    again()
    assert await flow.run("hello") == Odd(amount=3, on=date(2026, 12, 31))


async def test_validators_that_raise_anything_refuse_the_answer_and_two_runs_keep_their_own_types() -> None:
    @workflow("own-limit")
    async def flow(ctx: Context, limit: int) -> int:
        def under(value: int) -> int:
            return value if value <= limit else {}["limit"]  # type: ignore[no-any-return]

        return await human_task("input", schema=Annotated[int, AfterValidator(under)], data=limit)  # type: ignore[no-any-return, call-overload]

    await flow.start(5)
    await flow.start(10)
    small, large = sorted(tasks.list(), key=lambda task: task.data)
    with pytest.raises(UsageError, match="limit"):
        tasks.answer(small.id, 7)
    tasks.answer(large.id, 7)
    tasks.answer(small.id, 4)
    assert (await flow.run(5), await flow.run(10)) == (4, 7)


class Exact(BaseModel):
    model_config = ConfigDict(strict=True)
    on: date
    tags: set[str] = set()
    who: str = Field("", alias="by-whom")


async def test_strict_types_with_aliases_take_an_answer_as_json_and_as_an_instance() -> None:
    flow = asking("strict", schema=Exact)
    for draft, given in (
        ("json", {"on": "2026-01-31", "tags": ["a"], "by-whom": "Ann"}),
        ("instance", Exact.model_validate({"on": date(2026, 1, 31), "tags": {"a"}, "by-whom": "Ann"})),
    ):
        await flow.start(draft)
        tasks.answer(only_task().id, given)
        found = await flow.run(draft)
        assert (found.on, found.tags, found.who) == (date(2026, 1, 31), {"a"}, "Ann")


UNKNOWN_TYPE = """
    from pydantic import BaseModel, field_validator

    class Odd(BaseModel):
        amount: int

        @field_validator("amount")
        @classmethod
        def odd(cls, value):
            if value % 2 == 0:
                raise ValueError("must be odd")
            return value

    {decorator}("elsewhere")
    {define} flow(ctx):
        answer = {ask}("input", schema=Odd, data=1, assign_to="Ann"{options})
        return answer if isinstance(answer, str) else answer.amount

    run = {start}
    print(run.status, run.output)
"""
ASYNC = {
    "decorator": "@workflow",
    "define": "async def",
    "ask": "await human_task",
    "start": "asyncio.run(flow.start())",
}
PLAIN = {
    "decorator": "from agentflow import sync\n    @sync.workflow", "define": "def", "ask": "sync.human_task",
    "start": "flow.start()",
}  # fmt: skip


@pytest.mark.parametrize("words", [ASYNC, PLAIN], ids=["async", "plain"])
def test_answer_that_only_the_runs_own_process_can_refuse_reopens_the_task(tmp_path: Path, words: Any) -> None:
    source = UNKNOWN_TYPE.format(**words, options="")
    assert run_program(source, tmp_path).out == "waiting None\n"
    task = only_task()
    tasks.answer(task.id, {"amount": 2}, by="Bob", comment="sure")
    for n in range(2):
        ended = run_program(source, tmp_path)
        assert ended.out == "waiting None\n"
        warned = [line for line in ended.err.splitlines() if "must be odd" in line]
        assert len(warned) == (n == 0) and all("Bob" in line and task.id in line for line in warned), ended.err
    again = only_task()
    assert (again.id, again.status, again.decision, again.deadline) == (task.id, "open", None, None)
    (refused,) = again.extra["refused"]
    assert (refused["by"], refused["comment"], refused["data"]) == ("Bob", "sure", {"amount": 2})
    assert "must be odd" in refused["why"] and refused["at"] is not None
    tasks.answer(task.id, {"amount": 3}, by="Ann")
    for _ in range(2):
        assert run_program(source, tmp_path).out == "completed 3\n"
    assert [each["by"] for each in tasks.get(task.id).extra["refused"]] == ["Bob"]
    assert tasks.list() == []


def test_reopened_task_keeps_its_deadline(tmp_path: Path) -> None:
    source = UNKNOWN_TYPE.format(**ASYNC, options=', timeout="70s", on_timeout="late"')
    run_program(source, tmp_path)
    task = only_task()
    tasks.answer(task.id, {"amount": 2}, by="Bob")
    later = source.replace("run = ", "settings.clock = lambda: time.time() + 100\n    run = ").replace(
        "    from pydantic", "    import time\n    from agentflow.settings import settings\n    from pydantic", 1
    )
    assert run_program(later, tmp_path, name="later.py").out == "completed late\n"
    found = tasks.get(task.id)
    assert (found.status, found.deadline) == ("expired", task.deadline) and found.extra["refused"]


async def test_reopened_task_is_told_to_the_notifier(again: Callable[[], None], said: Callable[[], str]) -> None:
    flow = asking("told-again", schema=Odd)
    await flow.start("hello")
    heard: list[HumanTask] = []
    agentflow.configure(notify=heard.append)
    human._types.clear()  # as in another process
    tasks.answer(only_task().id, {"amount": 2}, by="Bob")
    again()
    with pytest.raises(Waiting):
        await flow.run("hello")
    assert [task.id for task in heard] == [only_task().id] and said().count("must be odd") == 1


async def test_recorded_answer_that_a_changed_validator_refuses_says_how_to_ask_again(
    again: Callable[[], None],
) -> None:
    allowed = [1, 2]

    def known(value: int) -> int:
        if value not in allowed:
            raise ValueError("not allowed")
        return value

    flow = asking("stricter", schema=Annotated[int, AfterValidator(known)])
    await flow.start("hello")
    tasks.answer(only_task().id, 2, by="Bob")
    assert await flow.run("hello") == 2
    allowed.remove(2)
    again()
    with pytest.raises(StepChanged, match=r"Bob.*not allowed.*rerun=\['approve'\]"):
        await flow.run("hello")
    assert (await flow.options(rerun=["approve"]).start("hello")).status == "waiting"
    tasks.answer(only_task().id, 1)
    assert await flow.run("hello") == 1


class Wide(BaseModel):
    day: date | None = None
    at: datetime | None = None
    hour: time | None = None
    pause: timedelta | None = None
    id: UUID | None = None
    code: str = Field("A-1", pattern=r"^[A-Z]-\d+$")
    ahead: str = Field("ab", pattern=r"^\w+$")
    money: Decimal = Field(Decimal(5), ge=1)
    share: float = Field(0.5, gt=0, lt=1)
    dozen: int = Field(12, multiple_of=12)
    kind: Literal["a", "b"] = "a"
    one: Literal[1] = 1
    either: int | date = 3
    names: set[str] = Field({"a", "b"}, min_length=2)
    days: dict[date, int] = {}
    few: dict[str, int] = Field({}, max_length=1)


@pytest.mark.parametrize(
    "field, bad, good",
    [
        ("day", "2026-02-30", "2026-02-28"),
        ("day", "tomorrow", None),
        ("at", "2026-01-31 25:00", "2026-01-31T12:00:00"),
        ("at", "noon", "2026-01-31"),
        ("hour", "25:00", "12:30"),
        ("pause", "an hour", "PT1H"),
        ("id", "123", "6f1c2d52-8a3b-4d0c-9c3e-0a4a6f7e5b11"),
        ("code", "a-1", "B-22"),
        ("money", "much", "30.50"),
        ("money", "0.5", "1e3"),
        ("money", 0, 7),
        ("share", 1, 0.25),
        ("dozen", 13, 24),
        ("kind", "c", "b"),
        ("one", 2, 1),
        ("either", "soon", "2026-01-31"),
        ("names", ["a", "a"], ["a", "b"]),
        ("days", {"monday": 1}, {"2026-01-31": 1}),
        ("few", {"a": 1, "b": 2}, {"a": 1}),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["type", "json-schema"])
async def test_format_or_bound_is_checked_where_the_answer_is_given(
    field: str, bad: Any, good: Any, known: bool
) -> None:
    flow = asking("wide", schema=Wide)
    await flow.start("hello")
    task = only_task()
    if not known:
        human._types.clear()  # as in another process
    with pytest.raises(UsageError, match=field):
        tasks.answer(task.id, {field: bad})
    assert only_task().status == "open"
    tasks.answer(task.id, {field: good})
    assert await flow.run("hello") == Wide.model_validate({field: good})


def test_json_schema_check_knows_patterns_of_both_engines_lists_of_kinds_and_recursion() -> None:
    assert schema_.misfit("a1", {"type": "string", "pattern": r"^(?=.*\d)\w+$"}) is None
    assert "match" in (schema_.misfit("ab", {"type": "string", "pattern": r"^(?=.*\d)\w+$"}) or "")
    assert schema_.misfit("é", {"type": "string", "pattern": r"^\p{L}$"}) is None
    assert schema_.misfit("x", {"type": "string", "pattern": "("}) is None
    assert schema_.misfit("x\n", {"type": "string", "pattern": "^x$"}) is not None
    assert schema_.misfit(True, {"const": 1}) is not None and schema_.misfit(1.0, {"const": 1}) is None
    assert schema_.misfit(None, {"type": ["string", "null"]}) is None
    assert schema_.misfit(1, {"type": ["string", "null"]}) == "answer=1 has to be text or nothing"
    tree = {"$defs": {"T": {"type": "object", "properties": {"next": {"$ref": "#/$defs/T"}, "on": {"format": "date"}}}},
            "$ref": "#/$defs/T"}  # fmt: skip
    assert schema_.misfit({"next": {"on": "2026-01-31"}}, tree) is None
    assert "answer.next.on" in (schema_.misfit({"next": {"on": "x"}}, tree) or "")
    assert schema_.misfit("e@x", {"type": "string", "format": "email"}) is None
    assert schema_.misfit("abc", {"anyOf": [{"type": "string"}, {"type": "null"}], "pattern": "^b"}) is not None


@pytest.mark.parametrize(
    "schema, shown",
    [(Form, '\'{"amount": ...}\''), (Exact, '\'{"on": ...}\''), (int, "..."), (list[int], "'[...]'"),
     (Wide, '\'{"day": ..., "at": ..., ')],
)  # fmt: skip
async def test_error_of_a_run_that_waits_for_a_form_names_the_command_that_takes_it(schema: Any, shown: str) -> None:
    flow = asking("commands", schema=schema)
    with pytest.raises(Waiting) as waits:
        await flow.run("hello")
    command = f"agentflow tasks answer {only_task().id} {shown}"
    assert command in str(waits.value) and "approve t-" not in str(waits.value)
    assert waits.value.waiting_on[0]["command"].startswith(command)
    with pytest.raises(UsageError, match=r"agentflow tasks answer"):
        tasks.approve(only_task().id)


# -- deadlines -----------------------------------------------------------------------------------


async def test_deadline_is_recorded_and_a_restart_does_not_extend_it(clock: Clock, again: Callable[[], None]) -> None:
    flow = asking("deadline", timeout="2d", on_timeout="nobody")
    await flow.start("hello")
    opened, deadline = only_task().created_at, only_task().deadline
    assert opened is not None and deadline == opened + timedelta(days=2)
    clock.now += 1.5 * DAY
    again()
    assert (await flow.start("hello")).status == "waiting"
    assert only_task().deadline == deadline
    assert flow.runs()[0].waiting_on[0]["deadline"] == deadline.timestamp()
    clock.now += 0.6 * DAY
    again()
    assert await flow.run("hello") == "nobody"
    assert only_task(status=None).status == "expired"


async def test_deadline_without_on_timeout_raises_human_task_expired(clock: Clock, again: Callable[[], None]) -> None:
    flow = asking("expires", timeout="1h")
    await flow.start("hello")
    clock.now += 3601
    for _ in range(2):
        with pytest.raises(HumanTaskExpired) as expired:
            await flow.run("hello")
        assert expired.value.deadline == only_task(status=None).deadline
        again()
    assert flow.runs()[0].status == "failed"


async def test_on_timeout_none_is_a_value(clock: Clock) -> None:
    flow = asking("none", timeout="1h", on_timeout=None)
    await flow.start("hello")
    clock.now += 3601
    assert await flow.run("hello") is None


async def test_late_answer_is_refused_and_replay_takes_the_same_branch(clock: Clock, again: Callable[[], None]) -> None:
    flow = asking("late", timeout="1h", on_timeout="fallback")
    await flow.start("hello")
    task = only_task()
    clock.now += 3601
    with pytest.raises(TaskClosed, match="expired"):
        tasks.approve(task.id, by="Ann")
    assert await flow.run("hello") == "fallback"
    with pytest.raises(TaskClosed, match="expired"):
        tasks.approve(task.id, by="Ann")
    again()
    assert await flow.run("hello") == "fallback"


async def test_answer_in_time_counts_however_late_the_run_goes_on(clock: Clock) -> None:
    flow = asking("in-time", timeout="1h", on_timeout="fallback")
    await flow.start("hello")
    clock.now += 3000
    tasks.approve(only_task().id, by="Ann")
    clock.now += 9000
    assert (await flow.run("hello")).by == "Ann"


# -- several -------------------------------------------------------------------------------------


async def test_several_tasks_are_open_at_once_and_each_branch_gets_its_own_answer(again: Callable[[], None]) -> None:
    @workflow("several")
    async def flow(ctx: Context, names: list[str]) -> list[str]:
        async def ask(name: str) -> str:
            drafted = await step("draft", drafting, name)
            decision = await human_task(data=drafted, assign_to=name)
            return f"{name}: {decision.comment}"

        return list(await parallel.map(ask, names))

    names = ["ann", "bob", "cid"]
    run = await flow.start(names)
    assert sorted(w["assign_to"] for w in run.waiting_on) == names
    by_name = {task.assign_to: task for task in tasks.list()}
    assert len(by_name) == 3
    for name in ("cid", "ann"):
        tasks.approve(by_name[name].id, by=name, comment=f"from {name}")
        again()
        run = await flow.start(names)
    assert run.status == "waiting" and [w["assign_to"] for w in run.waiting_on] == ["bob"]
    tasks.reject(by_name["bob"].id, by="bob", comment="from bob")
    again()
    assert await run == [f"{n}: from {n}" for n in names]
    assert sorted(drafted) == names


drafted: list[str] = []


def drafting(name: str) -> str:
    drafted.append(name)
    return f"for {name}"


async def test_equal_questions_one_after_the_other_are_two_tasks(again: Callable[[], None]) -> None:
    @workflow("twice")
    async def flow(ctx: Context) -> list[str | None]:
        return [(await human_task(data="sure?")).by, (await human_task(data="sure?")).by]

    await flow.start()
    first = only_task()
    tasks.approve(first.id, by="Ann")
    again()
    await flow.start()
    second = only_task()
    assert second.id != first.id
    tasks.approve(second.id, by="Bob")
    again()
    assert await flow.run() == ["Ann", "Bob"]


async def test_question_that_is_not_asked_any_more_is_withdrawn(again: Callable[[], None]) -> None:
    @workflow("withdrawn")
    async def flow(ctx: Context) -> str:
        amount = await step("price", lambda: prices[-1])
        if amount > 100:
            await human_task(data=amount)
        return "ok"

    prices = [500]
    await flow.start()
    old = only_task()
    prices.append(5)
    assert await flow.options(rerun=["price"]).run() == "ok"
    assert tasks.list() == [] and tasks.get(old.id).status == "withdrawn"


# -- answers before, during and after ------------------------------------------------------------

RESTARTS = """
    @workflow("restarts")
    async def flow(ctx):
        draft = await step("draft", lambda: note("draft") or "text")
        decision = await human_task(data=draft)
        if "die" in sys.argv:
            die()
        await step("send", lambda: note(f"send for {decision.by}"))
        return decision.by
    if "answer" in sys.argv:
        tasks.approve(tasks.list()[0].id, by="Ann")
    elif "look" in sys.argv:
        print(flow.runs()[0].status)
    else:
        run = asyncio.run(flow.start())
        print(run.status, run.output)
"""


def test_answer_given_while_no_process_runs_is_not_lost(tmp_path: Path) -> None:
    assert run_program(RESTARTS, tmp_path).out == "waiting None\n"
    run_program(RESTARTS, tmp_path, "answer")
    run_program(RESTARTS, tmp_path, "die", expect_kill=True)
    assert run_program(RESTARTS, tmp_path, "look").out == "interrupted\n"
    assert run_program(RESTARTS, tmp_path).out == "completed Ann\n"
    assert notes(tmp_path) == ["draft", "send for Ann"]


async def test_wait_true_stays_until_the_answer_comes() -> None:
    flow = asking("stays")
    running = asyncio.create_task(flow.options(wait=True).run("hello"))
    await opened()
    assert flow.runs()[0].status == "running" and not running.done()
    tasks.approve(only_task().id, by="Ann")
    async with asyncio.timeout(10):
        assert (await running).by == "Ann"


async def test_answer_that_comes_while_another_branch_still_works_is_used_in_the_same_run() -> None:
    @workflow("during")
    async def flow(ctx: Context) -> list[Any]:
        async def slow() -> str:
            await opened()
            tasks.approve(only_task().id, by="Ann")
            return "answered"

        return list(await parallel([human_task(data=1), step("slow", slow)]))

    decision, other = await flow.run()
    assert decision.by == "Ann" and other == "answered"


async def test_branch_that_can_go_on_is_finished_before_the_run_suspends() -> None:
    done = []

    @workflow("finishes")
    async def flow(ctx: Context) -> None:
        async def works() -> None:
            for n in range(3):
                await step("work", lambda n: done.append(n), n)
                await asyncio.sleep(0.01)

        await asyncio.gather(human_task(data=1), works())

    assert (await flow.start()).status == "waiting"
    assert done == [0, 1, 2]


async def test_answer_and_wait_at_the_same_moment_never_hang() -> None:
    @workflow("moment")
    async def flow(ctx: Context, n: int) -> str | None:
        return (await human_task(data=n)).by

    def notify(task: HumanTask) -> None:
        def answer() -> None:
            for _ in range(task.data * 40):
                pass
            tasks.approve(task.id, by="Ann")

        threads.append(threading.Thread(target=answer))
        threads[-1].start()

    threads: list[threading.Thread] = []
    agentflow.configure(notify=notify)
    for n in range(30):
        async with asyncio.timeout(10):
            try:
                assert await flow.run(n) == "Ann"
            except Waiting:
                threads[-1].join()
                assert await flow.run(n) == "Ann"
        threads[-1].join()


# -- what surrounds a question -------------------------------------------------------------------


async def test_notify_hears_of_each_new_task_once_and_its_failure_loses_nothing(again: Callable[[], None]) -> None:
    heard: list[HumanTask] = []

    def notify(task: HumanTask) -> None:
        heard.append(task)
        raise RuntimeError("mail server is down")

    agentflow.configure(notify=notify)
    flow = asking("notifies")
    for _ in range(2):
        assert (await flow.start("hello")).status == "waiting"
        again()
    assert [task.id for task in heard] == [only_task().id]


async def test_authorize_decides_who_may_answer() -> None:
    agentflow.configure(authorize=lambda task, by: by == task.assign_to)
    flow = asking("authorized")
    await flow.start("hello")
    for who in ("Bob", None):
        with pytest.raises(TaskClosed, match="may not decide"):
            tasks.approve(only_task().id, by=who)
    tasks.approve(only_task().id, by="manager")
    assert (await flow.run("hello")).by == "manager"


async def test_waiting_does_not_count_against_the_timeout_of_a_step_around_it(again: Callable[[], None]) -> None:
    @workflow("in-a-step")
    async def flow(ctx: Context) -> str | None:
        async def review() -> str | None:
            return (await human_task(data=1)).by

        return await step("review", review, timeout="150ms")

    running = asyncio.create_task(flow.options(wait=True).run())
    await opened()
    await asyncio.sleep(0.3)
    assert not running.done()
    tasks.approve(only_task().id, by="Ann")
    assert await running == "Ann"


async def test_step_around_a_question_still_times_out_by_its_own_work() -> None:
    @workflow("own-work")
    async def flow(ctx: Context) -> None:
        async def review() -> None:
            await human_task(data=1)
            await asyncio.sleep(30)

        await step("review", review, timeout="50ms")

    await flow.start()
    tasks.approve(only_task().id)
    with pytest.raises(StepTimeout):
        await flow.run()


async def test_waiting_is_no_attempt_and_never_in_doubt(again: Callable[[], None], said: Callable[[], str]) -> None:
    @workflow("no-attempt")
    async def flow(ctx: Context) -> str | None:
        async def review() -> str | None:
            return (await human_task(data=1)).by

        return await step("review", review, retry={"max_attempts": 2, "initial_delay": 0.001}, in_doubt="raise")

    for _ in range(3):
        assert (await flow.start()).status == "waiting"
        again()
    tasks.approve(only_task().id, by="Ann")
    assert await flow.run() == "Ann"
    assert [s.attempts for s in flow.runs()[0].steps if s.name == "review"] == [1]
    assert "doubt" not in said()


async def test_no_compensation_and_no_further_step_while_the_run_suspends() -> None:
    done: list[str] = []

    @workflow("suspends")
    async def flow(ctx: Context) -> str:
        await step("charge", lambda: done.append("charge"), compensate=lambda paid: done.append("refund"))
        try:
            await human_task(data=1)
        finally:
            done.append("finally")
            await step("after", lambda: done.append("after"))
        return "ok"

    assert (await flow.start()).status == "waiting"
    assert done == ["charge", "finally"]
    done.clear()
    tasks.approve(only_task().id)
    assert await flow.run() == "ok"
    assert done == ["finally", "after"]


async def test_branch_that_fails_while_another_asks_fails_the_run() -> None:
    @workflow("fails")
    async def flow(ctx: Context) -> None:
        async def fails() -> None:
            await opened()
            raise ValueError("no")

        await asyncio.gather(human_task(data=1), step("fails", fails))

    with pytest.raises(ValueError):
        await flow.run()
    assert runs.list()[0].status == "failed"


def test_sync_workflow_waits_and_goes_on() -> None:
    @sync.workflow("plain")
    def flow(ctx: Context, draft: str) -> str:
        decision = sync.human_task(data=draft, assign_to="editor")
        return f"{decision.by}"

    run = flow.start("hello")
    assert run.status == "waiting"
    with pytest.raises(Waiting, match="editor"):
        flow.run("hello")
    tasks.approve(only_task().id, by="Ann")
    assert flow.run("hello") == "Ann"
