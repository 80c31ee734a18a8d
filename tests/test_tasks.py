"""Questions to people over time: edits, escalation, reminders, who did what and when, and kills around an answer."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

import agentflow
from agentflow import (
    Context,
    Escalate,
    HumanTask,
    HumanTaskExpired,
    TaskClosed,
    UsageError,
    Waiting,
    human,
    human_task,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.cli.app import run as command
from agentflow.testing import FakeClock
from tests.programs import notes, run_program, start_program


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with FakeClock() as made:
        yield made


@pytest.fixture
def heard() -> list[tuple[str | None, Any]]:
    """What the notifier hears: why, and for whom."""
    told: list[tuple[str | None, Any]] = []
    agentflow.configure(notify=lambda task: told.append((task.event, task.assign_to)))
    return told


def only_task(**wanted: Any) -> HumanTask:
    (task,) = tasks.list(**wanted)
    return task


def asking(**options: Any) -> Any:
    @workflow("asks")
    async def flow(ctx: Context) -> Any:
        return await human_task(**{"assign_to": "manager", "data": "draft", **options})

    return flow


class Offer(BaseModel):
    customer: str
    amount: int = Field(ge=0)
    note: str = ""


# -- types and edits -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["approve", "review", "input", "legal check"])
async def test_types_of_tasks_are_words_and_name_the_step(kind: str) -> None:
    flow = asking(type=kind)
    with pytest.raises(Waiting) as waits:
        await flow.run()
    assert waits.value.waiting_on[0]["type"] == only_task().type == kind
    if kind == "input":
        assert f"agentflow tasks answer {only_task().id}" in str(waits.value)
        tasks.answer(only_task().id, {"any": "data"}, by="Ann")
    else:
        tasks.approve(only_task().id, by="Ann")
    decision = await flow.run()
    assert decision.by == "Ann" and decision.data == ({"any": "data"} if kind == "input" else None)
    assert flow.runs()[0].steps[0].name == kind


@pytest.mark.parametrize("known", [True, False], ids=["type", "json-schema"])
async def test_form_that_is_filled_in_already_is_approved_as_it_is_or_edited(known: bool) -> None:
    @workflow("reviews")
    async def flow(ctx: Context, customer: str) -> Offer:
        shown = await step("write", lambda: Offer(customer=customer, amount=10, note="hello"))
        return await human_task("review", data=shown, schema=Offer)

    def forget() -> None:
        if not known:
            human._types.clear()  # as in another process

    await flow.start("Ada")
    forget()
    assert tasks.approve(only_task().id, by="Ann").status == "answered"
    assert await flow.run("Ada") == Offer(customer="Ada", amount=10, note="hello")
    await flow.start("Bob")
    forget()
    for wrong in ({"amount": -1}, {"amount": "many"}):
        with pytest.raises(UsageError, match="amount"):
            tasks.answer(only_task().id, wrong)
    tasks.answer(only_task().id, {"amount": 30}, by="Ann")
    assert await flow.run("Bob") == Offer(customer="Bob", amount=30, note="hello")


async def test_data_that_is_no_filled_in_form_is_not_taken_for_one() -> None:
    flow = asking(data={"amount": 3, "other": 1}, schema=Offer)
    await flow.start()
    with pytest.raises(UsageError, match=r"tasks\.answer"):
        tasks.approve(only_task().id)
    with pytest.raises(UsageError, match="customer"):
        tasks.answer(only_task().id, {"amount": 4})


# -- deadlines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [False, True], ids=["looked-at", "nobody-looks"])
async def test_task_that_nobody_answers_in_time_goes_to_the_next_and_its_time_counts_from_the_recorded_end(
    clock: FakeClock, again: Callable[[], None], heard: list[Any], absent: bool
) -> None:
    flow = asking(timeout="1d", on_timeout=Escalate("director", "2d", Escalate(["board", "owner"])))
    await flow.start()
    first = only_task()
    assert first.created_at is not None and first.deadline == first.created_at + timedelta(days=1)
    clock.advance("25h")
    if not absent:
        again()
        assert (await flow.start()).waiting_on[0]["assign_to"] == "director"
    assert (only_task().id, only_task().assign_to) == (first.id, "director")
    assert only_task().deadline == first.deadline + timedelta(days=2)
    clock.advance("2d")
    run = await flow.start()
    assert run.waiting_on[0]["assign_to"] == ["board", "owner"] and run.waiting_on[0]["deadline"] is None
    assert heard == [("opened", "manager"), *[("escalated", "director")] * (not absent), ("escalated", ["board", "owner"])]
    assert tasks.list(assign_to="manager") == [] and only_task(assign_to="owner").id == first.id
    clock.advance("99d")
    tasks.approve(first.id, by="owner")
    decision = await flow.run()
    assert decision.by == "owner"
    moves = [(e["what"], e["at"], e.get("assign_to")) for e in tasks.get(first.id).trail if e["what"] == "escalated"]
    assert moves == [
        ("escalated", first.deadline, "director"),
        ("escalated", first.deadline + timedelta(days=2), ["board", "owner"]),
    ]


async def test_answer_of_the_next_is_taken_though_no_process_has_seen_the_first_deadline(clock: FakeClock) -> None:
    flow = asking(timeout="1d", on_timeout=Escalate("director", timeout="1d"))
    await flow.start()
    agentflow.configure(authorize=lambda task, by: by == task.assign_to)
    clock.advance("25h")
    with pytest.raises(TaskClosed, match="may not decide"):
        tasks.approve(only_task().id, by="manager")
    assert tasks.approve(only_task().id, by="director").assign_to == "director"
    assert (await flow.run()).by == "director"


@pytest.mark.parametrize("last", ["value", "raise", "class", "nothing"])
async def test_end_of_the_last_deadline_gives_what_on_timeout_says(
    clock: FakeClock, again: Callable[[], None], last: str
) -> None:
    end: dict[str, Any] = {"value": {"on_timeout": "nobody"}, "raise": {"on_timeout": PermissionError("nobody")}}
    end |= {"class": {"on_timeout": PermissionError}, "nothing": {}}
    direct = asking(type=f"direct-{last}", timeout="1d", **end[last])
    escalated = asking(type=f"escalated-{last}", timeout="1d", on_timeout=Escalate("director", timeout="1d", **end[last]))
    for flow, days in ((direct, 1), (escalated, 2)):
        flow = flow.options(run_id=f"{last}{days}")
        await flow.start()
        clock.advance(days * 86400)
        with pytest.raises(TaskClosed, match="expired"):
            tasks.approve(only_task().id)
        for _ in range(2):
            again()
            if last == "value":
                assert await flow.run() == "nobody"
            else:
                with pytest.raises(HumanTaskExpired if last == "nothing" else PermissionError):
                    await flow.run()
        assert tasks.list() == []


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Escalate(""), "Escalate"),
        (lambda: Escalate([]), "Escalate"),
        (lambda: Escalate("a", timeout=-1), "timeout"),
        (lambda: Escalate("a", on_timeout=Escalate("b")), "timeout"),
        (lambda: asking(on_timeout=Escalate("a")).run_sync(), "timeout"),
        (lambda: asking(remind=0).run_sync(), "remind"),
    ],
)
def test_escalation_and_reminders_that_cannot_be_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()
    assert tasks.list() == []


def test_plain_workflow_escalates_too(clock: FakeClock) -> None:
    @sync.workflow("plain")
    def flow(ctx: Context) -> Any:
        return sync.human_task(assign_to="manager", timeout="1d", on_timeout=Escalate("director", "1d", "nobody"))

    flow.start()
    clock.advance("1d")
    assert flow.start().waiting_on[0]["assign_to"] == "director"
    clock.advance("1d")
    assert flow.run() == "nobody"


# -- reminders -----------------------------------------------------------------------------------


async def test_reminders_are_told_once_each_when_their_time_has_come(
    clock: FakeClock, again: Callable[[], None], heard: list[Any]
) -> None:
    flow = asking(remind="1d", timeout="30d")
    run = await flow.start()
    assert run._document["due"] == clock() + 86400
    for _ in range(2):
        clock.advance("12h")
        again()
        await flow.start()
    assert heard == [("opened", "manager"), ("reminded", "manager")]
    clock.advance("5d")  # nobody was there: one reminder for all that were missed
    for _ in range(2):
        again()
        run = await flow.start()
    assert heard == [("opened", "manager"), *[("reminded", "manager")] * 2]
    assert run._document["due"] == clock() + 86400
    tasks.approve(only_task().id)
    clock.advance("5d")
    await flow.run()
    assert len(heard) == 3
    assert [e["what"] for e in only_task(status=None).trail] == ["opened", "reminded", "reminded", "approved"]


async def test_reminders_come_while_a_run_stays(clock: FakeClock) -> None:
    loop, reminded = asyncio.get_running_loop(), asyncio.Event()

    def notify(task: HumanTask) -> None:
        if task.event == "reminded":
            loop.call_soon_threadsafe(reminded.set)

    agentflow.configure(notify=notify)
    flow = asking(remind="1h")
    running = asyncio.create_task(flow.options(wait=True).run())
    async with asyncio.timeout(20):
        while not tasks.list():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        clock.advance("2h")
        await reminded.wait()
        tasks.approve(only_task().id, by="Ann")
        assert (await running).by == "Ann"


# -- who, when, comment, digest --------------------------------------------------------------------


async def test_trail_keeps_who_decided_when_with_which_comment_and_on_what(clock: FakeClock) -> None:
    flow = asking(data={"draft": 1})
    await flow.start()
    opened = clock.now
    clock.advance("1h")
    tasks.reject(only_task().id, by="Ann", comment="too long")
    with pytest.raises(TaskClosed, match="rejected already, by Ann"):
        tasks.approve(only_task(status=None).id, by="Bob")
    task = only_task(status=None)
    assert task.digest and task.trail == (
        {"at": opened, "what": "opened", "assign_to": "manager", "digest": task.digest},
        {"at": clock.now, "what": "rejected", "by": "Ann", "comment": "too long", "digest": task.digest},
    )
    other = asking(data={"draft": 2})
    await other.options(fresh=True).start()
    assert only_task().digest != task.digest


async def test_task_that_is_withdrawn_and_asked_again_keeps_its_trail(again: Callable[[], None]) -> None:
    asks = [True]

    @workflow("withdrawn")
    async def flow(ctx: Context) -> None:
        if asks[-1]:
            await human_task(data=1)

    for asked in (True, False, True):
        asks.append(asked)
        again()
        await flow.start()
    assert [e["what"] for e in only_task().trail] == ["opened", "withdrawn", "opened"]


async def test_task_that_is_open_when_its_run_completes_is_withdrawn() -> None:
    @workflow("first-wins")
    async def flow(ctx: Context) -> str:
        both = [asyncio.ensure_future(human_task(assign_to=who)) for who in ("Ann", "Bob")]
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return str(done.pop().result().by)

    await flow.start()
    ann, bob = sorted(tasks.list(), key=lambda task: task.assign_to)
    tasks.approve(bob.id, by="Bob")
    assert await flow.run() == "Bob"
    assert tasks.get(ann.id).status == "withdrawn"
    with pytest.raises(TaskClosed, match="withdrawn"):
        tasks.approve(ann.id, by="Ann")


async def test_tasks_show_prints_the_trail_and_its_json_holds_it(
    clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = asking(timeout="1d", on_timeout=Escalate("director"))
    await flow.start()
    clock.advance("2d")
    task = only_task(assign_to="director")
    assert command(["tasks", "list", "--for", "manager", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert command(["tasks", "approve", task.id, "--by", "Ann", "--comment", "key sk-proj-abcdefghijklmnop1234567890"]) == 0
    capsys.readouterr()
    assert command(["tasks", "show", task.id]) == 0
    shown = capsys.readouterr().out
    for word in ("opened", "escalated", "approved", "Ann", "for director", task.digest):
        assert word in shown
    assert "sk-proj-abcdefghijklmnop" not in shown
    assert command(["tasks", "show", task.id, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [e["what"] for e in found["trail"]] == ["opened", "escalated", "approved"]
    assert found["digest"] == task.digest and found["trail"][2]["by"] == "Ann"


# -- kills around an answer ------------------------------------------------------------------------

ASKS = """
    @workflow("asks")
    async def flow(ctx, n: int):
        decision = await human_task(data=n, assign_to="Ann", timeout="1h", on_timeout=Escalate("Bob"))
        await step("after", lambda: note(f"{n} {decision.by} {decision.comment}"))
        return decision.comment
    print("ready", flush=True)
    for n in range(int(sys.argv[1]), int(sys.argv[2])):
        print(n, flow.options(wait=True).run_sync(n), flush=True)
"""


def test_run_killed_at_any_moment_around_the_answer_gets_it_once(tmp_path: Path) -> None:
    rounds, chance = 8, random.Random(7)
    for n in range(rounds):
        process = start_program(ASKS, tmp_path, str(n), str(n + 1))
        while not tasks.list():
            assert process.poll() is None
            time.sleep(0.002)
        task = only_task()
        if n % 2:
            tasks.approve(task.id, by="Ann", comment=f"c{n}")
            time.sleep(chance.random() * 0.3)
            process.kill()
        else:
            process.kill()
            tasks.approve(task.id, by="Ann", comment=f"c{n}")
        process.communicate()
        with pytest.raises(TaskClosed, match="by Ann"):
            tasks.reject(task.id, by="Bob")
        ended = run_program(ASKS, tmp_path, str(n), str(n + 1))
        assert f"{n} c{n}\n" in ended.out and tasks.list() == []
    # Killed between what the step did and its record, the step is done again; with the same answer.
    assert list(dict.fromkeys(notes(tmp_path))) == [f"{n} Ann c{n}" for n in range(rounds)]


def test_answer_whose_process_is_killed_is_given_or_not_and_never_half(tmp_path: Path) -> None:
    @workflow("answered")
    async def flow(ctx: Context, n: int) -> Any:
        return (await human_task(data=n)).by

    answer = """
        print("ready", flush=True)
        for task in tasks.list():
            tasks.approve(task.id, by=f"person {task.data}")
    """
    count = 60
    for n in range(count):
        asyncio.run(flow.options(run_id=f"r{n}").start(n))
    process = start_program(answer, tmp_path)
    while len(tasks.list()) > count // 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    done, open_ = tasks.list(status="approved"), tasks.list()
    assert len(done) + len(open_) == count
    for task in done:
        assert task.decision is not None and task.decision.by == f"person {task.data}"
        assert [e["what"] for e in task.trail] == ["opened", "approved"]
        with pytest.raises(TaskClosed, match=f"person {task.data}"):
            tasks.approve(task.id)
    for task in open_:
        tasks.approve(task.id, by="the second")
    for n in range(count):
        assert asyncio.run(flow.options(run_id=f"r{n}").run(n)) in (f"person {n}", "the second")


# -- steps around a question -----------------------------------------------------------------------

AROUND = """
    import time
    if "at once" in sys.argv:
        configure(notify=lambda task: tasks.approve(task.id, by="Ann"))
    WAY
    def answers():
        while not any(task.status == "approved" for task in tasks.list(status=None)):
            for task in tasks.list():
                tasks.approve(task.id, by="Ann")
            time.sleep(0.01)
    @workflow("around")
    DEF flow(ctx):
        DEF inner():
            WAIT human_task(data=1)
            note("effect")
            if "die" in sys.argv:
                die()
        return BOTH
    try:
        print(flow.run_sync())
    except StepInDoubt as doubt:
        print("in doubt", doubt.step)
"""


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_step_that_went_on_after_its_answer_is_in_doubt_after_a_kill(tmp_path: Path, plain: bool, when: str) -> None:
    words = {"WAY": "from agentflow.sync import *" if plain else "", "DEF": "def" if plain else "async def"}
    both = ['step("outer", inner, in_doubt="raise")', 'step("answers", answers)']
    words["BOTH"] = f"WAIT parallel([{', '.join('lambda: ' * plain + each for each in both)}])"
    source = AROUND
    for name, word in {**words, "WAIT ": "" if plain else "await "}.items():
        source = source.replace(name, word)
    run_program(source, tmp_path, "die", when, expect_kill=True)
    assert run_program(source, tmp_path, when).out == "in doubt outer\n"
    assert notes(tmp_path) == ["effect"]


def test_waiting_does_not_count_against_the_timeout_of_a_plain_step_around_it() -> None:
    @sync.workflow("plain-timeout")
    def flow(ctx: Context) -> Any:
        return sync.step("review", lambda: sync.human_task(data=1).by, timeout="1s")

    def notify(task: HumanTask) -> None:
        def later() -> None:
            time.sleep(1.5)
            tasks.approve(task.id, by="Ann")

        threading.Thread(target=later).start()

    agentflow.configure(notify=notify)
    assert flow.options(wait=True).run() == "Ann"
