"""Branches: each keeps its own results, whatever finishes first, dies, moves or waits for a person."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import generate_content, human_task, parallel, runs, step, tasks, workflow
from agentflow.errors import StepTimeout, UsageError, Waiting
from agentflow.sync import human_task as human_task_sync
from agentflow.sync import parallel as parallel_sync
from agentflow.sync import step as step_sync
from agentflow.sync import workflow as workflow_sync
from agentflow.testing import FakeModel
from tests.programs import notes, run_program, write_program

# Fifty branches of three steps with the same names everywhere. ``pick`` is given nothing: all of them are
# exact repeats, told apart by their branch alone. Results are random, so that a swapped one shows.
SOURCE = """
import json, random, threading, time
from agentflow import sync

MODE, COUNT, DIE_AT, ORDER, FRONT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5] == "front"
acks, lock = [], threading.Lock()

def ack(what, value):
    note(f"ack {what} {value}")
    with lock:
        acks.append(what)
        if len(acks) == DIE_AT:
            die()

async def pick():
    note("ran pick")
    await asyncio.sleep(random.random() * 0.02)
    return os.urandom(6).hex()

async def draw(i):
    note(f"ran draw {i}")
    await asyncio.sleep(random.random() * 0.02)
    return f"{i}:{os.urandom(6).hex()}"

def join(i, one, two):
    note(f"ran join {i}")
    time.sleep(random.random() * 0.005)
    return f"{i}={one}+{two}"

def front(i):
    return f"front {i}"

async def branch(i):
    if FRONT:
        assert await step("front", front, i) == f"front {i}"
    one = await step("pick", pick)
    ack(f"pick {i}", one)
    two = await step("draw", draw, i)
    ack(f"draw {i}", two)
    both = await step("join", join, i, one, two)
    ack(f"join {i}", both)
    return both

def branch_sync(i):
    if FRONT:
        assert sync.step("front", front, i) == f"front {i}"
    one = sync.step("pick", pick)
    ack(f"pick {i}", one)
    two = sync.step("draw", draw, i)
    ack(f"draw {i}", two)
    both = sync.step("join", join, i, one, two)
    ack(f"join {i}", both)
    return both

def order():
    items = list(range(COUNT))
    if ORDER == "reversed":
        items.reverse()
    if ORDER == "shuffled":
        random.Random(len(notes_so_far())).shuffle(items)
    return items

def notes_so_far():
    file = HERE / "notes.txt"
    return file.read_text() if file.exists() else ""

@workflow
async def many(ctx):
    items = order()
    if FRONT:
        await step("before", front, "all")
    if MODE == "gather":
        found = await asyncio.gather(*[branch(i) for i in items])
    elif MODE == "group":
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(branch(i)) for i in items]
        found = [task.result() for task in made]
    elif MODE == "parallel":
        found = await parallel([branch(i) for i in items])
    elif MODE == "limited":
        found = await parallel([branch(i) for i in items], concurrency=7)
    elif MODE == "dict":
        found = list((await parallel({f"item {i}": branch(i) for i in items})).values())
    elif MODE == "map":
        found = await parallel.map(branch, items)
    return dict(zip(items, found, strict=True))

@sync.workflow
def many_sync(ctx):
    items = order()
    if FRONT:
        sync.step("before", front, "all")
    return dict(zip(items, sync.parallel.map(branch_sync, items, concurrency=12), strict=True))

note("started")
ask = many_sync.run if MODE == "sync" else many.run_sync
result = ask()
note("replaying")
assert ask() == result, "run again it gave something else"
print(json.dumps(sorted(result.items())))
"""


def lives(folder: Path) -> list[list[str]]:
    """The notes of each process."""
    found: list[list[str]] = []
    for line in notes(folder):
        if line == "started":
            found.append([])
        else:
            found[-1].append(line)
    return found


def check(folder: Path, count: int) -> None:
    """No acknowledged step ran again, and none was given another one's result."""
    acknowledged: dict[str, str] = {}
    for life in lives(folder):
        before = dict(acknowledged)
        ran: Counter[str] = Counter()
        replaying = False
        for line in life:
            kind, _, rest = line.partition(" ")
            if kind == "replaying":
                replaying = True
            elif kind == "ran":
                assert not replaying, f"{rest} ran in a run that had completed"
                ran[rest] += 1
            else:
                what, _, value = rest.rpartition(" ")
                assert acknowledged.setdefault(what, value) == value, f"{what} was {acknowledged[what]}, now {value}"
        for name in ("draw", "join"):
            for i in range(count):
                most = 0 if f"{name} {i}" in before else 1
                assert ran[f"{name} {i}"] <= most, f"{name} {i} ran {ran[f'{name} {i}']} times in one process"
        assert ran["pick"] <= count - sum(1 for what in before if what.startswith("pick"))
    for i in range(count):
        one, two = acknowledged[f"pick {i}"], acknowledged[f"draw {i}"]
        assert two.startswith(f"{i}:")
        assert acknowledged[f"join {i}"] == f"{i}={one}+{two}"
    picks = [value for what, value in acknowledged.items() if what.startswith("pick")]
    assert len(picks) == len(set(picks)) == count


def live_and_die(folder: Path, mode: str, plan: list[tuple[str, str]], count: int = 50, seed: int | None = None) -> None:
    """A process for each entry of the plan (order, front); all but the last are killed on the way."""
    seed = random.randrange(10**6) if seed is None else seed
    print("seed", seed)
    chance = random.Random(seed)
    file = write_program(SOURCE, folder)
    done = 0
    for number, (order, front) in enumerate(plan):
        last = number == len(plan) - 1
        # Replayed steps are acknowledged again: the death comes after some new ones, if there are any left.
        new = (3 * count - done) // 2
        die_at = 0 if last else done + (chance.randrange(min(10, new), new + 1) if new > 0 else 0)
        run_program(file, folder, mode, str(count), str(die_at), order, front, expect_kill=not last)
        done = len({line.rpartition(" ")[0] for line in notes(folder) if line.startswith("ack")})
    check(folder, count)


MODES = ["gather", "group", "parallel", "limited", "dict", "map", "sync"]


@pytest.mark.parametrize("mode", MODES)
def test_fifty_killed_branches_keep_their_own_results_and_run_nothing_twice(mode: str, tmp_path: Path) -> None:
    live_and_die(tmp_path, mode, [("same", ""), ("same", "")])


@pytest.mark.parametrize("mode", [pytest.param(each, marks=pytest.mark.torture) if each == "limited" else each for each in MODES])
def test_branches_keep_their_results_when_steps_are_inserted_in_front_and_branches_reordered(
    mode: str, tmp_path: Path
) -> None:
    live_and_die(tmp_path, mode, [("same", ""), ("reversed", "front")])


@pytest.mark.torture
@pytest.mark.parametrize("mode", MODES)
def test_branches_survive_many_deaths_with_an_order_of_their_own_each_time(mode: str, tmp_path: Path) -> None:
    plan = [("same", ""), ("shuffled", ""), ("reversed", "front"), ("shuffled", "front"), ("shuffled", "")]
    live_and_die(tmp_path, mode, plan, count=80)


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    """Globals are code, not data: what tests count and switch in them changes no step's given values."""
    RAN.clear()
    SWITCH.clear()


RAN: Counter[str] = Counter()
SWITCH: set[str] = set()
LOCK = threading.Lock()
THREE = threading.Barrier(3)


def then() -> str:
    """A step that fails until the switch is thrown."""
    return "repaired" if "repaired" in SWITCH else str(1 / 0)


# -- the forms ------------------------------------------------------------------------------------


async def test_results_stand_in_the_order_of_the_items_whatever_finishes_first() -> None:
    finished: list[int] = []

    async def slow_first(i: int) -> int:
        await asyncio.sleep((5 - i) * 0.004)
        finished.append(i)
        return i * 10

    @workflow
    async def ordered(ctx: Any) -> Any:
        mapped = await parallel.map(lambda i: step("a", slow_first, i), range(5))
        listed = await parallel([step("b", slow_first, i) for i in range(5)])
        keyed = await parallel({f"k{i}": step("c", slow_first, i) for i in range(5)})
        return mapped, listed, keyed

    mapped, listed, keyed = await ordered.run()
    assert mapped == listed == [0, 10, 20, 30, 40]
    assert list(keyed.items()) == [(f"k{i}", i * 10) for i in range(5)]
    assert finished[:5] != [0, 1, 2, 3, 4]
    assert await ordered.run() == (mapped, listed, keyed)
    assert len(finished) == 15


async def test_no_more_branches_run_at_a_time_than_concurrency_says() -> None:
    async def busy(i: int) -> int:
        RAN["now"] += 1
        RAN["most"] = max(RAN["most"], RAN["now"])
        await asyncio.sleep(0.003)
        RAN["now"] -= 1
        return i

    @workflow
    async def limited(ctx: Any, form: str) -> Any:
        if form == "map":
            return await parallel.map(lambda i: step("s", busy, i), range(12), concurrency=3)
        if form == "coroutines":

            async def two(i: int) -> int:
                await step("s", busy, i)
                return await step("t", busy, i)

            return await parallel([two(i) for i in range(12)], concurrency=3)
        return await parallel([step("s", busy, i) for i in range(12)], concurrency=3)

    for form in ("map", "list", "coroutines"):
        RAN.clear()
        assert await limited.run(form) == list(range(12))
        assert RAN["most"] == 3, form


def test_plain_code_keeps_to_concurrency_too() -> None:
    def busy(i: int) -> int:
        with LOCK:
            RAN["now"] += 1
            RAN["most"] = max(RAN["most"], RAN["now"])
        THREE.wait(60)  # fewer at once would never get on
        with LOCK:
            RAN["now"] -= 1
        return i

    @workflow_sync
    def limited(ctx: Any) -> Any:
        return parallel_sync.map(lambda i: step_sync("s", busy, i), range(12), concurrency=3)

    assert limited.run() == list(range(12))
    assert RAN["most"] == 3


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "3"])
async def test_a_concurrency_that_lets_nothing_run_is_refused(bad: Any) -> None:
    ran: list[int] = []

    @workflow
    async def refused(ctx: Any) -> Any:
        return await parallel.map(lambda i: step("s", ran.append, i), [1, 2], concurrency=bad)

    with pytest.raises(UsageError, match="concurrency"):
        await refused.run()
    with pytest.raises(UsageError, match="concurrency"):
        parallel_sync.map(ran.append, [1, 2], concurrency=bad)
    assert ran == []


async def test_empty_fan_outs_return_at_once() -> None:
    @workflow
    async def empty(ctx: Any) -> Any:
        return [await parallel([]), await parallel({}), await parallel.map(asyncio.sleep, [])]

    assert await empty.run() == [[], {}, []]
    assert parallel_sync([]) == parallel_sync.map(print, []) == []
    assert parallel_sync({}) == {}


async def test_settle_waits_for_all_and_puts_exceptions_in_their_places() -> None:
    ran: list[int] = []

    async def odd_fails(i: int) -> int:
        ran.append(i)
        if i % 2:
            raise ValueError(f"odd {i}")
        return i

    @workflow
    async def settled(ctx: Any) -> Any:
        found = await parallel.map(lambda i: step("s", odd_fails, i), range(5), settle=True)
        named = await parallel({i: step("t", odd_fails, i) for i in range(2)}, settle=True)
        assert isinstance(found[1], ValueError) and isinstance(named[1], ValueError)
        await step("after", lambda: 1)
        return [str(x) for x in [*found, *named.values()]]

    assert await settled.run() == ["0", "odd 1", "2", "odd 3", "4", "0", "odd 1"]
    assert await settled.run() == ["0", "odd 1", "2", "odd 3", "4", "0", "odd 1"]
    assert sorted(ran) == [0, 0, 1, 1, 2, 3, 4], "failures that the code handled are history"


def test_plain_code_settles_too() -> None:
    def odd_fails(i: int) -> int:
        if i % 2:
            raise ValueError(f"odd {i}")
        return i

    @workflow_sync
    def settled(ctx: Any) -> Any:
        found = parallel_sync([lambda i=i: step_sync("s", odd_fails, i) for i in range(4)], settle=True)
        return [str(x) for x in found]

    assert settled.run() == ["0", "odd 1", "2", "odd 3"]
    assert settled.run() == ["0", "odd 1", "2", "odd 3"]


@pytest.mark.parametrize("form", ["map", "steps", "coroutines", "dict"])
async def test_branches_after_a_failed_one_never_start(form: str) -> None:
    started: list[int] = []
    cancelled: list[int] = []

    async def work(i: int) -> int:
        started.append(i)
        if i == 1:
            raise ValueError("second")
        try:
            await asyncio.sleep(30 if i == 0 else 0)
        except asyncio.CancelledError:
            cancelled.append(i)
            raise
        return i

    async def branch(i: int) -> int:
        return await step("work", work, i)

    @workflow
    async def failing(ctx: Any) -> Any:
        if form == "map":
            return await parallel.map(branch, range(6), concurrency=2)
        if form == "steps":
            return await parallel([step("work", work, i) for i in range(6)], concurrency=2)
        if form == "dict":
            return await parallel({i: step("work", work, i) for i in range(6)}, concurrency=2)
        return await parallel([branch(i) for i in range(6)], concurrency=2)

    with pytest.raises(ValueError, match="second"):
        await failing.run()
    assert started == [0, 1]
    assert cancelled == [0]


def test_plain_branches_after_a_failed_one_never_start() -> None:
    started: list[int] = []

    def work(i: int) -> int:
        started.append(i)
        if i == 1:
            raise ValueError("second")
        time.sleep(0.01)
        return i

    @workflow_sync
    def failing(ctx: Any) -> Any:
        return parallel_sync.map(lambda i: step_sync("work", work, i), range(6), concurrency=1)

    with pytest.raises(ValueError, match="second"):
        failing.run()
    assert started == [0, 1]


async def test_a_sibling_that_had_finished_is_kept_when_another_branch_fails() -> None:
    async def work(i: int) -> int:
        RAN[f"work {i}"] += 1
        return i

    async def late(i: int) -> int:
        RAN[f"late {i}"] += 1
        if "repaired" not in SWITCH:
            raise ValueError("late")
        return i

    async def branch(i: int) -> int:
        await step("work", work, i)
        return await step("late", late, i) if i == 2 else i

    @workflow
    async def failing(ctx: Any) -> Any:
        return await parallel.map(branch, range(4))

    with pytest.raises(ValueError, match="late"):
        await failing.run()
    SWITCH.add("repaired")
    assert await failing.run() == [0, 1, 2, 3]
    assert RAN == {"late 2": 2, "work 0": 1, "work 1": 1, "work 2": 1, "work 3": 1}


async def test_both_failed_branches_are_tried_again_when_the_run_is() -> None:
    async def work(i: int) -> int:
        RAN[str(i)] += 1
        await asyncio.sleep(0.001 * i)
        if "repaired" not in SWITCH and i in (2, 3):
            raise ValueError(f"no {i}")
        return i

    @workflow
    async def failing(ctx: Any) -> Any:
        found = await asyncio.gather(*[step("work", work, i) for i in range(4)], return_exceptions=True)
        for error in found:
            if isinstance(error, Exception):
                raise error
        return found

    with pytest.raises(ValueError):
        await failing.run()
    SWITCH.add("repaired")
    assert await failing.run() == [0, 1, 2, 3]
    assert RAN == {"0": 1, "1": 1, "2": 2, "3": 2}


async def test_a_fan_out_that_takes_too_long_is_stopped() -> None:
    cancelled: list[int] = []

    async def slow(i: int) -> int:
        try:
            await asyncio.sleep(30 if i else 0)
        except asyncio.CancelledError:
            cancelled.append(i)
            raise
        return i

    @workflow
    async def late(ctx: Any) -> Any:
        return await parallel([step("s", slow, i) for i in range(3)], timeout=0.05)

    with pytest.raises(StepTimeout):
        await late.run()
    assert sorted(cancelled) == [1, 2]


async def test_a_wrong_branch_is_named_before_anything_starts() -> None:
    ran: list[int] = []

    @workflow
    async def wrong(ctx: Any) -> Any:
        return await parallel({"good": step("s", ran.append, 1), "bad": 3})

    with pytest.raises(UsageError, match="'bad'"):
        await wrong.run()
    assert ran == []


async def test_equal_items_are_branches_of_their_own() -> None:
    async def draw() -> int:
        RAN["draw"] += 1
        number = RAN["draw"]
        await asyncio.sleep((5 - number) * 0.002)
        return number

    async def branch(_: str) -> int:
        return await step("draw", draw)

    seen: list[Any] = []

    @workflow
    async def equal(ctx: Any) -> Any:
        seen.append(await parallel.map(branch, ["same"] * 4))
        await step("then", then)
        return seen[-1]

    with pytest.raises(ZeroDivisionError):
        await equal.run()
    SWITCH.add("repaired")
    assert await equal.run() == seen[0]
    assert sorted(seen[0]) == [1, 2, 3, 4] and RAN["draw"] == 4


async def test_fan_outs_nest_and_replay() -> None:
    """No outer branch has a step of its own before it fans out, and the second time they come in another order."""

    async def leaf(b: int) -> str:
        RAN["leaf"] += 1
        number = RAN["leaf"]
        await asyncio.sleep(((number * 7) % 5) * 0.001)
        return f"{b}.{number}"

    async def outer(a: int) -> list[Any]:
        await asyncio.sleep(random.random() * 0.01)

        async def inner(b: int) -> list[Any]:
            return [await step("leaf", leaf, b), await step("leaf", leaf, b)]

        return await parallel.map(inner, range(4))

    seen: list[Any] = []

    @workflow
    async def nested(ctx: Any) -> Any:
        order = [3, 1, 0, 2] if seen else [0, 1, 2, 3]
        found = await asyncio.gather(*[outer(a) for a in order])
        seen.append(dict(zip(order, found, strict=True)))
        await step("then", then)
        return seen[-1]

    with pytest.raises(ZeroDivisionError):
        await nested.run()
    SWITCH.add("repaired")
    assert await nested.run() == seen[0]
    assert RAN["leaf"] == 32
    assert len({leaf for rows in seen[0].values() for pair in rows for leaf in pair}) == 32


async def test_branches_that_differ_by_a_clock_reading_only_are_lent_their_own_records() -> None:
    async def ask(now: datetime) -> int:
        RAN["ask"] += 1
        number = RAN["ask"]
        await asyncio.sleep(0.002 * (5 - number))
        return number

    async def branch(item: str) -> int:
        await asyncio.sleep(random.random() * 0.01)
        return await step("ask", ask, datetime.now(UTC))

    seen: list[dict[str, int]] = []

    @workflow
    async def clocked(ctx: Any) -> Any:
        order = "abcde" if not seen else "cebad"
        seen.append(dict(zip(order, await parallel.map(branch, order), strict=True)))
        await step("then", then)
        return seen[-1]

    with pytest.raises(ZeroDivisionError):
        await clocked.run()
    SWITCH.add("repaired")
    assert await clocked.run() == seen[0]
    assert RAN["ask"] == 5


async def test_a_list_that_shrinks_to_one_new_item_gives_it_no_neighbours_answer() -> None:
    async def ask(item: str) -> str:
        RAN[item] += 1
        return f"about {item}"

    @workflow
    async def listed(ctx: Any) -> Any:
        found = await parallel.map(lambda item: step("ask", ask, item), items)
        await step("then", then)
        return found

    items = ["a", "b", "c"]
    with pytest.raises(ZeroDivisionError):
        await listed.run()
    items = ["new"]
    SWITCH.add("repaired")
    assert await listed.run() == ["about new"]
    assert RAN == {"a": 1, "b": 1, "c": 1, "new": 1}


# -- people in branches ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gather", "map", "group"])
async def test_people_asked_in_three_of_five_branches_each_answer_their_own(form: str) -> None:
    async def prepare(i: int) -> str:
        RAN[f"prepare {i}"] += 1
        await asyncio.sleep(0.001 * (5 - i))
        return f"draft {i}"

    def publish(i: int, comment: str | None) -> str:
        RAN[f"publish {i}"] += 1
        return f"{i}:{comment}"

    async def branch(i: int) -> str:
        draft = await step("prepare", prepare, i)
        comment = None
        if i % 2 == 0:
            decision = await human_task("approve", "boss", data={"draft": draft})
            comment = decision.comment
        return await step("publish", publish, i, comment)

    @workflow
    async def asking(ctx: Any) -> Any:
        if form == "map":
            return await parallel.map(branch, range(5))
        if form == "group":
            async with asyncio.TaskGroup() as group:
                made = [group.create_task(branch(i)) for i in range(5)]
            return [task.result() for task in made]
        return await asyncio.gather(*[branch(i) for i in range(5)])

    with pytest.raises(Waiting):
        await asking.run()
    run = runs.list()[0]
    assert run.status == "waiting" and len(run.waiting_on) == 3
    assert {k for k in RAN if k.startswith("publish")} == {"publish 1", "publish 3"}, "the others went on"
    open_ = {task.data["draft"]: task.id for task in tasks.list()}
    assert sorted(open_) == ["draft 0", "draft 2", "draft 4"]
    for left, i in ((2, 4), (1, 0)):
        tasks.approve(open_[f"draft {i}"], by="boss", comment=f"ok {i}")
        with pytest.raises(Waiting):
            await asking.run()
        assert len(runs.get(run.id).waiting_on) == left
        assert RAN[f"publish {i}"] == 1
    tasks.reject(open_["draft 2"], by="boss", comment="no 2")
    assert await asking.run() == ["0:ok 0", "1:None", "2:no 2", "3:None", "4:ok 4"]
    assert set(RAN.values()) == {1}
    assert len(tasks.list(status=None)) == 3


def test_people_asked_in_plain_branches_each_answer_their_own() -> None:
    def publish(i: int, comment: str | None) -> str:
        RAN[f"publish {i}"] += 1
        return f"{i}:{comment}"

    def branch(i: int) -> str:
        comment = None
        if i % 2 == 0:
            comment = human_task_sync("approve", "boss", data={"item": i}).comment
        return step_sync("publish", publish, i, comment)

    @workflow_sync
    def asking(ctx: Any) -> Any:
        return parallel_sync.map(branch, range(5))

    with pytest.raises(Waiting):
        asking.run()
    assert set(RAN) == {"publish 1", "publish 3"}, "the others went on"
    open_ = {task.data["item"]: task.id for task in tasks.list()}
    assert sorted(open_) == [0, 2, 4]
    for i in (4, 0):
        tasks.approve(open_[i], comment=f"ok {i}")
        with pytest.raises(Waiting):
            asking.run()
        assert RAN[f"publish {i}"] == 1
    tasks.reject(open_[2], comment="no 2")
    assert asking.run() == ["0:ok 0", "1:None", "2:no 2", "3:None", "4:ok 4"]
    assert set(RAN.values()) == {1}


async def test_a_question_in_one_branch_does_not_stop_a_slow_sibling() -> None:
    ran: list[str] = []

    async def slow(i: int) -> int:
        await asyncio.sleep(0.05)
        ran.append(f"slow {i}")
        return i

    async def working() -> int:
        for i in range(3):
            await step("slow", slow, i)
        return 3

    @workflow
    async def mixed(ctx: Any) -> Any:
        decision, count = await asyncio.gather(human_task("approve", data=1), working())
        return [bool(decision), count]

    with pytest.raises(Waiting):
        await mixed.run()
    assert ran == ["slow 0", "slow 1", "slow 2"]
    tasks.approve(tasks.list()[0].id)
    assert await mixed.run() == [True, 3]
    assert len(ran) == 3


async def test_limited_branches_that_wait_for_people_do_not_starve_the_run() -> None:
    """With two places taken by questions nothing else can start: the run waits, and ends when all are answered."""

    async def branch(i: int) -> int:
        return i if await human_task("approve", data=i) else -i

    @workflow
    async def limited(ctx: Any) -> Any:
        return await parallel.map(branch, range(1, 5), concurrency=2)

    for _ in range(4):
        with pytest.raises(Waiting):
            await limited.run()
        for task in tasks.list()[:1]:
            tasks.approve(task.id)
    assert await limited.run() == [1, 2, 3, 4]


def test_outside_a_workflow_a_fan_out_is_remembered_too(again: Any) -> None:
    ran: list[int] = []

    async def double(i: int) -> int:
        ran.append(i)
        await asyncio.sleep(0.001 * (3 - i))
        return 2 * i

    async def main() -> Any:
        return await parallel([step("double", double, i) for i in range(4)])

    assert asyncio.run(main()) == [0, 2, 4, 6]
    again()
    assert asyncio.run(main()) == [0, 2, 4, 6]
    assert sorted(ran) == [0, 1, 2, 3]
    assert agentflow.runs.list() == []


def test_a_branch_keeps_its_record_when_branches_are_reordered_and_the_code_holds_a_counter(tmp_path: Path) -> None:
    """The counter differs for each record, which makes their code differ: that gives no branch another one's record."""
    source = """
    ORDER = sys.argv[1].split()
    count = []

    async def work(n):
        count.append(n)
        note("ran")
        return f"result {len(count)}"

    async def branch(name):
        return [await step("work", work, 1) for _ in range(int(name[1]))]

    @workflow("reordered")
    async def flow(ctx):
        return dict(zip(ORDER, await parallel.map(branch, ORDER)))

    result = flow.options(run_id="r").run_sync()
    print([result[name] for name in sorted(result)])
    """
    program = write_program(source, tmp_path)
    first = run_program(program, tmp_path, "a2 b1").out
    assert run_program(program, tmp_path, "b1 a2").out == first
    assert run_program(program, tmp_path, "b1 c1 a2").out != first
    assert len(notes(tmp_path)) == 4


def test_steps_that_differ_in_their_function_alone_keep_their_own_records_when_moved(tmp_path: Path) -> None:
    source = """
    async def first(): note("first"); return "first"
    async def second(): note("second"); return "second"

    async def branch(given, functions):
        return [await step("pick", fn) for fn in functions]

    @workflow("moved")
    async def flow(ctx):
        found = []
        for word in sys.argv[1].split():
            if word == "front":
                await step("front", lambda: None)
            elif word == "branch":
                found += (await asyncio.gather(branch(word, [second, first])))[0]
            else:
                found.append(await step("pick", {"first": first, "second": second}[word]))
        return found

    print(flow.options(run_id="r").run_sync())
    """
    program = write_program(source, tmp_path)
    assert run_program(program, tmp_path, "first second").out.strip() == "['first', 'second']"
    assert run_program(program, tmp_path, "front second first").out.strip() == "['second', 'first']"
    assert run_program(program, tmp_path, "branch").out.strip() == "['second', 'first']"
    assert sorted(notes(tmp_path)) == ["first", "second"]


def test_a_call_asked_for_once_more_in_front_of_a_branch_is_paid_for_and_gets_an_answer_of_its_own() -> None:
    """The one in front takes the record; the one in the branch must not get the same reply a second time."""
    asked: list[str] = []

    def answer(request: Any) -> str:
        asked.append(request["text"])
        return f"answer {len(asked)}"

    async def branch(kind: str) -> str:
        return await generate_content("Name a river.", model="openai:gpt-5-mini")

    async def outer(kind: str) -> str:
        return await step("outer", branch, "inner")

    front: list[Any] = []

    @workflow("in-front")
    async def flow(ctx: Any) -> list[str]:
        before = [await one("inner") for one in front]
        return [*before, *await asyncio.gather(branch("inner"), outer("outer"))]

    with FakeModel(answer):
        first = flow.run_sync()
        assert sorted(first) == ["answer 1", "answer 2"]
        front[:] = [branch, outer]
        second = flow.run_sync()
        assert len(set(second)) == len(second) == 4 and len(asked) == 4
        assert set(first) <= set(second)
        front.clear()
        assert set(flow.run_sync()) == set(first) and len(asked) == 4
