"""Steps moved from one branch to another: what is recorded goes along, and the branches stay what they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentflow import configure, drive, generate_content, parallel, step, waits, workflow
from agentflow.sync import parallel as parallel_sync
from agentflow.sync import step as step_sync
from agentflow.sync import workflow as workflow_sync
from agentflow.testing import FakeModel

# What the branches do stands in a list that the test edits, as a person edits their code.
BRANCHES: dict[str, list[str]] = {}
RAN: list[str] = []
GATES: dict[str, asyncio.Event] = {}


@pytest.fixture(autouse=True)
def clean() -> None:
    BRANCHES.clear()
    RAN.clear()
    GATES.clear()
    configure(model="openai:gpt-5-mini")


async def work(name: str) -> str:
    RAN.append(name)
    await asyncio.sleep(0)
    return f"{name} {len(RAN)}"


async def play(branch: str) -> list[str]:
    results = []
    for name in BRANCHES[branch]:
        if name.startswith("ask"):
            results.append(await generate_content(name, name=name))
        elif name.startswith("gate"):
            await GATES[name].wait()
        elif name.startswith("open"):
            GATES[f"gate{name[4:]}"].set()
        else:
            results.append(await step(name, work, name))
    return results


async def as_gather() -> list[list[str]]:
    return list(await asyncio.gather(*(play(each) for each in BRANCHES)))


async def as_group() -> list[list[str]]:
    async with asyncio.TaskGroup() as group:
        made = [group.create_task(play(each)) for each in BRANCHES]
    return [each.result() for each in made]


async def as_parallel() -> list[list[str]]:
    return list(await parallel([play(each) for each in BRANCHES]))


async def as_map() -> list[list[str]]:
    return await parallel.map(play, list(BRANCHES))


FORMS = {"gather": as_gather, "group": as_group, "parallel": as_parallel, "map": as_map}


@workflow("moves")
async def moves(ctx: Any, form: str) -> list[list[str]]:
    return await FORMS[form]()


@pytest.mark.parametrize("form", FORMS)
async def test_a_step_moved_to_a_sibling_branch_keeps_its_record(form: str) -> None:
    BRANCHES.update(a=["one", "x"], b=["two"])
    first = await moves.run(form)
    RAN.clear()
    BRANCHES.update(a=["one", "new"], b=["two", "x"])  # the sibling goes on with something of its own
    assert (await moves.run(form))[1] == [first[1][0], first[0][1]]
    assert RAN == ["new"]
    BRANCHES.update(a=["one", "x"], b=["two"])
    assert await moves.run(form) == first
    assert RAN == ["new"]


@pytest.mark.parametrize("form", FORMS)
async def test_a_paid_call_moved_to_a_sibling_branch_is_not_paid_again(form: str) -> None:
    BRANCHES.update(a=["one", "ask x"], b=["two"])
    with FakeModel(["the answer"]):
        await moves.run(form)
    BRANCHES.update(a=["one", "ask y"], b=["ask x", "two"])
    with FakeModel(["another"]) as model:
        assert [each[0] for each in await moves.run(form)][1] == "the answer"
        assert [call["text"] for call in model.calls] == ["ask y"]


@pytest.mark.parametrize("form", FORMS)
async def test_steps_that_two_branches_exchange_run_in_neither(form: str) -> None:
    BRANCHES.update(a=["one", "x"], b=["two", "y"])
    first = await moves.run(form)
    RAN.clear()
    BRANCHES.update(a=["one", "y"], b=["two", "x"])
    assert await moves.run(form) == [[first[0][0], first[1][1]], [first[1][0], first[0][1]]]
    assert RAN == []


async def test_branches_that_are_still_there_keep_their_own_records_of_equal_steps() -> None:
    BRANCHES.update(a=["one", "x"], b=["two", "x"])
    first = await moves.run("gather")
    RAN.clear()
    # A third branch asks for the same at once, while the two others come to it later.
    BRANCHES.update(a=["one", "slow", "x"], b=["two", "slow", "x"], c=["x"])
    second = await moves.run("gather")
    assert [second[0][2], second[1][2]] == [first[0][1], first[1][1]]
    assert sorted(RAN) == ["slow", "slow", "x"]


async def test_a_sibling_that_waits_for_the_step_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "PATIENCE", 0.05)
    BRANCHES.update(a=["x"], b=["two"])
    first = await moves.run("gather")
    RAN.clear()
    GATES["gate"] = asyncio.Event()
    # What the first branch has to wait for comes after the step in the second.
    BRANCHES.update(a=["gate", "x"], b=["two", "x", "open"])
    second = await asyncio.wait_for(moves.run("gather"), 30)
    assert second[0] == first[0]
    assert RAN == ["x"]


async def test_who_waits_long_for_a_sibling_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "PATIENCE", 0.7)
    BRANCHES.update(a=["x"], b=["two"])
    await moves.run("gather")
    GATES["gate"] = asyncio.Event()
    BRANCHES.update(a=["gate", "x"], b=["two", "x", "open"])
    await asyncio.wait_for(moves.run("gather"), 30)
    assert "x: waits a moment for a branch that may leave it its record" in caplog.text


async def test_a_sibling_is_waited_for_once_and_not_by_each_call_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0
    pauses = drive.pauses

    def counted(call: Any) -> Any:
        nonlocal waited
        waited += 1
        return pauses(call)

    monkeypatch.setattr(drive, "pauses", counted)
    monkeypatch.setattr(waits, "PATIENCE", 0.05)
    BRANCHES.update(a=["x"], b=["two"])
    await moves.run("gather")
    RAN.clear()
    GATES["gate"] = asyncio.Event()
    BRANCHES.update(a=["gate", "x"], b=["two", *["x"] * 20, "open"])
    await asyncio.wait_for(moves.run("gather"), 30)
    assert RAN == ["x"] * 20
    assert waited == 1


def test_a_branch_that_never_started_leaves_its_records_to_others() -> None:
    @workflow("stopped-early")
    async def flow(ctx: Any) -> str:
        async def failing() -> None:
            raise ValueError("not today")

        first = failing() if BRANCHES["a"] == ["fail"] else play("a")
        try:
            await parallel([first, play("b")], concurrency=1)
        except ValueError:
            pass
        return "".join(await play("c"))

    BRANCHES.update(a=[], b=["x"], c=[])
    flow.run_sync()
    RAN.clear()
    BRANCHES.update(a=["fail"], b=["x"], c=["x"])
    assert flow.run_sync() == "x 1"
    assert RAN == []


def plain_work(name: str) -> str:
    RAN.append(name)
    return f"{name} {len(RAN)}"


def plain(branch: str) -> list[str]:
    return [step_sync(name, plain_work, name) for name in BRANCHES[branch]]


@workflow_sync("plain-moves")
def plain_moves(ctx: Any) -> list[list[str]]:
    return list(parallel_sync.map(plain, list(BRANCHES)))


@pytest.mark.parametrize("after", [["new"], []])
def test_a_step_moved_to_a_sibling_branch_of_plain_code_keeps_its_record(after: list[str]) -> None:
    BRANCHES.update(a=["one", "x"], b=["two"])
    first = plain_moves.run()
    RAN.clear()
    BRANCHES.update(a=["one", *after], b=["two", "x"])
    assert plain_moves.run()[1] == [first[1][0], first[0][1]]
    assert RAN == after


def test_steps_that_two_branches_of_plain_code_exchange_run_in_neither() -> None:
    BRANCHES.update(a=["x"], b=["y"])
    first = plain_moves.run()
    RAN.clear()
    BRANCHES.update(a=["y"], b=["x"])
    assert plain_moves.run() == [first[1], first[0]]
    assert RAN == []


async def test_a_plan_knows_that_a_moved_step_is_reused() -> None:
    BRANCHES.update(a=["one", "x"], b=["two"])
    await moves.run("gather")
    BRANCHES.update(a=["one", "new"], b=["two", "x"])
    plan = await asyncio.wait_for(moves.plan("gather"), 60)
    assert {each.name: each.state for each in plan.steps} == {
        "one": "reused", "two": "reused", "new": "unknown", "x": "reused"
    }  # fmt: skip
    assert RAN == ["one", "two", "x"]
