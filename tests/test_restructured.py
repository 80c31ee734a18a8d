"""The same steps in another structure: a loop that becomes a fan-out, a gather that becomes a map, and back.

Each program asks for the same; only how its branches are made is edited. So nothing may run or be paid again,
whichever structure made the records and whichever asks for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agentflow import generate_content, human_task, parallel, step, tasks, workflow
from agentflow.errors import ModelError
from agentflow.scratch import open_journal
from agentflow.testing import FakeModel
from tests.programs import notes, run_program, write_program

ITEMS = [1, 2, 3, 4]
MODEL = "openai:gpt-5-mini"
Call = Callable[[int], Awaitable[Any]]
FORM: list[str] = [""]
KIND: list[str] = [""]
RAN: list[Any] = []


async def in_a_loop(call: Call) -> list[Any]:
    return [await call(i) for i in ITEMS]


async def gathered_calls(call: Call) -> list[Any]:
    return list(await asyncio.gather(*(call(i) for i in ITEMS)))


async def gathered_functions(call: Call) -> list[Any]:
    async def one(i: int) -> Any:
        return await call(i)

    return list(await asyncio.gather(*(one(i) for i in ITEMS)))


async def grouped(call: Call) -> list[Any]:
    async def one(i: int) -> Any:
        return await call(i)

    async with asyncio.TaskGroup() as group:
        made = [group.create_task(one(i)) for i in ITEMS]
    return [each.result() for each in made]


async def parallel_list(call: Call) -> list[Any]:
    return list(await parallel([call(i) for i in ITEMS]))


async def parallel_dict(call: Call) -> list[Any]:
    return list((await parallel({str(i): call(i) for i in ITEMS})).values())


async def mapped(call: Call) -> list[Any]:
    return await parallel.map(call, ITEMS)


async def mapped_by_key_two_at_a_time(call: Call) -> list[Any]:
    return await parallel.map(call, ITEMS, key=lambda i: f"item {i}", concurrency=2)


async def nested(call: Call) -> list[Any]:
    async def half(items: list[int]) -> list[Any]:
        return list(await parallel([call(i) for i in items]))

    one, two = await asyncio.gather(half(ITEMS[:2]), half(ITEMS[2:]))
    return one + two


FORMS: dict[str, Callable[[Call], Awaitable[list[Any]]]] = {
    form.__name__: form
    for form in (
        in_a_loop, gathered_calls, gathered_functions, grouped, parallel_list, parallel_dict, mapped,
        mapped_by_key_two_at_a_time, nested,
    )
}  # fmt: skip


async def work(i: int) -> str:
    RAN.append(i)
    return f"{i} in {len(RAN)}"


async def same_for_all() -> str:
    RAN.append("same")
    return "the same"


async def ask(i: int) -> str:
    return await generate_content(f"question {i}", model=MODEL)


CALLS: dict[str, Call] = {
    "a step": lambda i: step("work", work, i),
    "exact repeats": lambda i: step("same", same_for_all),
    "a model call": lambda i: generate_content(f"question {i}", model=MODEL),
    "a model call in a step": lambda i: step("ask", ask, i),
}


@workflow("restructured")
async def flow(ctx: Any) -> list[Any]:
    return await FORMS[FORM[0]](CALLS[KIND[0]])


@pytest.mark.parametrize("kind", list(CALLS))
@pytest.mark.parametrize("before", FORMS)
async def test_another_structure_of_the_same_steps_runs_and_pays_nothing_again(kind: str, before: str) -> None:
    RAN.clear()
    for after in FORMS:
        KIND[0], FORM[0] = kind, before
        with FakeModel(lambda request: f"{request['text']}: {len(RAN)}") as model:
            first = await flow.options(fresh=True).run()
            calls = len(RAN), len(model.calls)
            FORM[0] = after
            assert await flow.run() == first, after
            assert (len(RAN), len(model.calls)) == calls, after
            FORM[0] = before
            assert await flow.run() == first, after
            assert (len(RAN), len(model.calls)) == calls, after


@pytest.mark.parametrize("before", FORMS)
async def test_what_was_paid_before_a_failure_is_used_in_another_structure(before: str) -> None:
    KIND[0] = "a model call"
    for after in FORMS:
        FORM[0] = before

        def answers(request: Any) -> Any:
            return ModelError("no", status=400) if request["text"] == "question 3" else f"{request['text']}!"

        with FakeModel(answers) as model, pytest.raises((ModelError, ExceptionGroup)):
            await flow.options(fresh=True).run()
        answered = {call["text"] for call in model.calls} - {"question 3"}
        FORM[0] = after
        with FakeModel(lambda request: f"{request['text']}!") as model:
            assert await flow.run() == [f"question {i}!" for i in ITEMS]
        assert sorted(call["text"] for call in model.calls) == sorted({f"question {i}" for i in ITEMS} - answered)


async def ask_twice(i: int) -> str:
    one = await generate_content(f"one {i}", model=MODEL)
    return one + await generate_content(f"two {i}", model=MODEL)


async def ask_and_show(i: int) -> str:
    draft = await generate_content(f"draft {i}", model=MODEL)
    return f"{draft} {bool(await human_task(type='approve', assign_to='ann', data=draft))}"


CALLS |= {
    "two model calls in a step": lambda i: step("twice", ask_twice, i),
    "a person asked in a step": lambda i: step("shown", ask_and_show, i),
    "a call in a batch": lambda i: generate_content(f"batched {i}", model=MODEL, batch=True),
    "a batch in a step": lambda i: step("in a step", ask_in_batch, i),
}


async def ask_in_batch(i: int) -> str:
    return await generate_content(f"inside {i}", model=MODEL, batch=True)


@pytest.mark.parametrize("before", FORMS)
async def test_what_cancelled_steps_had_paid_for_is_used_in_another_structure(before: str) -> None:
    KIND[0] = "two model calls in a step"
    for after in FORMS:
        FORM[0] = before

        def answers(request: Any) -> Any:
            return ModelError("no", status=400) if request["text"] == "two 1" else f"{request['text']}!"

        with FakeModel(answers) as model, pytest.raises((ModelError, ExceptionGroup)):
            await flow.options(fresh=True).run()
        answered = {call["text"] for call in model.calls} - {"two 1"}
        assert "one 1" in answered
        FORM[0] = after
        with FakeModel(lambda request: f"{request['text']}!") as model:
            assert await flow.run() == [f"one {i}!two {i}!" for i in ITEMS]
        wanted = {f"{which} {i}" for which in ("one", "two") for i in ITEMS}
        assert sorted(call["text"] for call in model.calls) == sorted(wanted - answered), after


@pytest.mark.parametrize("before", ["gathered_functions", "parallel_list", "mapped", "nested"])
async def test_what_was_paid_in_steps_that_wait_is_used_in_another_structure(before: str) -> None:
    KIND[0] = "a person asked in a step"
    for after in FORMS:
        FORM[0] = before
        with FakeModel(lambda request: f"{request['text']}!") as model:
            run = await flow.options(fresh=True).start()
            asked = tasks.list(status="open", run_id=run.id)
            for task in asked:
                tasks.approve(task.id, by="ann")
            FORM[0] = after
            while run.status == "waiting":
                run = await flow.start()
                for task in tasks.list(status="open", run_id=run.id):
                    asked.append(tasks.approve(task.id, by="ann") or task)
            assert run.output == [f"draft {i}! True" for i in ITEMS]
        assert sorted(call["text"] for call in model.calls) == [f"draft {i}" for i in ITEMS], after
        assert len(asked) == 4, after


@pytest.mark.parametrize("kind", ["a call in a batch", "a batch in a step"])
@pytest.mark.parametrize("before", ["gathered_calls", "grouped", "parallel_dict", "mapped"])
async def test_a_batch_under_way_is_collected_in_another_structure(before: str, kind: str) -> None:
    KIND[0] = kind
    for after in ("in_a_loop", "gathered_functions", "mapped", "nested"):
        FORM[0] = before
        with FakeModel(lambda request: f"{request['text']}!", polls=1) as model:
            run = await flow.options(fresh=True).start()
            assert len(model.calls) == 4
            FORM[0] = after
            while run.status == "waiting":
                run = await flow.start()
            word = "batched" if kind == "a call in a batch" else "inside"
            assert run.output == [f"{word} {i}!" for i in ITEMS]
        assert len(model.calls) == 4, after


PROGRAM = """
from agentflow.testing import FakeModel

FORM, KILL = sys.argv[1], int(sys.argv[2])
asked = 0

def answer(request):
    global asked
    asked += 1
    note(request["text"])
    if asked == KILL:
        die()
    return request["text"] + "!"

async def twice(i):
    one = await generate_content(f"one {i}", model="openai:gpt-5-mini")
    return one + await generate_content(f"two {i}", model="openai:gpt-5-mini")

async def charge(i):
    note(f"charge {i}")
    if i == 3 and KILL == -1:
        die()
    return i

def call(i):
    return step("charge", charge, i, in_doubt="raise") if KILL < 0 else step("twice", twice, i)

@workflow("killed")
async def killed(ctx):
    if FORM == "in a loop":
        return [await call(i) for i in range(4)]
    if FORM == "gathered":
        return list(await asyncio.gather(*(call(i) for i in range(4))))
    return await parallel.map(call, range(4))

with FakeModel(answer):
    print(killed.run_sync())
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [("in a loop", "gathered"), ("gathered", "mapped"), ("mapped", "in a loop"), ("gathered", "gathered")],
)
def test_what_was_paid_before_a_kill_is_used_in_another_structure(before: str, after: str, tmp_path: Path) -> None:
    file = write_program(PROGRAM, tmp_path)
    run_program(file, tmp_path, before, "4", expect_kill=True)
    there = notes(tmp_path)
    # Those whose reply had come before the last were finished; the others were in flight, and have to be asked again.
    with contextlib.closing(sqlite3.connect(tmp_path / "journal" / "cache.db")) as con:
        rows = [value for (value,) in con.execute("SELECT value FROM Cache WHERE key LIKE 'm/%'")]
    paid = {text for text in there if any(f'"{text}"' in row or f"{text}!" in row for row in rows)}
    assert len(there) == 4 and len(paid) >= 1
    done = run_program(file, tmp_path, after, "0")
    assert done.out.strip() == str([f"one {i}!two {i}!" for i in range(4)])
    count = Counter(notes(tmp_path))
    assert {text for text in count if count[text] > 1} == set(there) - paid
    assert all(times <= 2 for times in count.values()) and len(count) == 8


@pytest.mark.parametrize(("before", "after"), [("in a loop", "gathered"), ("gathered", "mapped"), ("mapped", "in a loop")])
def test_a_step_in_doubt_is_in_doubt_in_another_structure(before: str, after: str, tmp_path: Path) -> None:
    file = write_program(PROGRAM, tmp_path)
    run_program(file, tmp_path, before, "-1", expect_kill=True)
    ended = run_program(file, tmp_path, after, "-2", expect_failure=True)
    assert "StepInDoubt" in ended.err
    assert Counter(notes(tmp_path))["charge 3"] == 1


def test_every_structure_is_tried_after_every_other() -> None:
    assert len(list(itertools.permutations(FORMS, 2))) == 72


# -- what equal steps of several branches are to each other ------------------------------------------------------------

PLAN: dict[str, list[str]] = {}


@workflow("two-fan-outs")
async def two_fan_outs(ctx: Any) -> list[Any]:
    async def first() -> list[Any]:
        return [await each(word) for word in PLAN["first"]]

    async def second() -> list[Any]:
        return [await each(word) for word in PLAN["second"]]

    async def each(word: str) -> Any:
        return await generate_content(word, model=MODEL, batch=True)

    if not PLAN.get("overlapping"):
        return [*await asyncio.gather(first()), *await asyncio.gather(second())]
    one = asyncio.ensure_future(first())
    while not ctx._ex.parked and not one.done():  # noqa: ASYNC110  the first waits before the second begins
        await asyncio.sleep(0)
    return list(await asyncio.gather(one, second()))


async def test_a_started_call_that_moved_leaves_no_note_behind() -> None:
    PLAN.clear()
    PLAN.update(first=[], second=["at 12:34"])
    with FakeModel(["one"], polls=1):
        run = await two_fan_outs.start()
        assert list(open_journal().scan("g/")) != []
        PLAN.update(first=["at 12:34"], second=[])
        while run.status == "waiting":
            run = await two_fan_outs.start()
        assert run.output == [["one"], []]
    assert list(open_journal().scan("g/")) == []


@pytest.mark.parametrize("overlapping", [[], ["yes"]])
async def test_a_started_call_that_another_took_over_is_not_shared_by_its_old_branch(overlapping: list[str]) -> None:
    """The branch that begins later asks for the same: for a call, and an answer, of its own."""
    PLAN.clear()
    PLAN.update(first=[], second=["at 12:34"], overlapping=overlapping)
    replies = iter(["one", "two", "three"])
    with FakeModel(lambda request: next(replies), polls=1) as model:
        run = await two_fan_outs.start()
        assert run.status == "waiting" and len(model.calls) == 1
        PLAN.update(first=["at 12:34"], second=["at 12:34"])
        while run.status == "waiting":
            run = await two_fan_outs.start()
        assert run.output == [["one"], ["two"]]
    assert len(model.calls) == 2
    # Nothing is left of the notes on unfinished calls, also where one was found in another branch.
    assert list(open_journal().scan("g/")) == []


async def pick() -> str:
    RAN.append("pick")
    return f"pick {len(RAN)}"


async def never() -> str:
    RAN.append("started")
    await asyncio.Event().wait()
    return "never"


HANGS: list[bool] = []


async def unsteady_pick() -> str:
    return await (never() if HANGS and HANGS.pop() else pick())


@workflow("started-and-recorded")
async def started_and_recorded(ctx: Any) -> Any:
    async def one() -> str:
        return await step("pick", unsteady_pick)

    async def two() -> str:
        return await step("pick", unsteady_pick)

    async def fails() -> None:
        while RAN != ["started", "pick"]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await step("last", lambda: None)
        raise ValueError("not today")

    if FORM[0] == "once":
        return await step("pick", unsteady_pick)
    return await asyncio.gather(one(), two(), fails())


async def test_a_recorded_step_goes_before_an_equal_one_that_was_only_started() -> None:
    RAN.clear()
    HANGS[:] = [False, True]  # the first that starts hangs
    FORM[0] = "twice and failing"
    with pytest.raises(ValueError):
        await started_and_recorded.run()
    FORM[0] = "once"
    assert await started_and_recorded.run() == "pick 2"
    assert RAN == ["started", "pick"]
