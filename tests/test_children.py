"""Workflows that run others: in their body and inside their steps."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentflow import Context, human_task, runs, step, tasks, workflow
from agentflow.errors import Waiting
from tests.programs import notes, run_program, write_program

MODEL = "openai:gpt-5-mini"
ran: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


async def work(what: Any) -> Any:
    ran.append(what)
    return what


@workflow("child")
async def child(ctx: Context, number: int) -> str:
    await step("work", work, number)
    decision = await human_task(type="approve", assign_to="manager", data=number)
    return f"{number} {'approved' if decision else 'rejected'}"


def approve_all() -> None:
    for task in tasks.list(status="open"):
        tasks.approve(task.id, by="Mia")


@pytest.mark.parametrize("in_doubt", ["rerun", "raise"])
def test_a_step_inside_which_a_run_waits_is_not_in_doubt(in_doubt: str, caplog: pytest.LogCaptureFixture) -> None:
    @workflow(f"parent-{in_doubt}")
    async def parent(ctx: Context) -> list[Any]:
        before = await step("before", work, "before")
        got = await step("child", child.run, 1, in_doubt=in_doubt)
        return [before, got, await step("after", work, "after")]

    with pytest.raises(Waiting, match="manager"):
        parent.run_sync()
    assert [run.status for run in runs.list()] == ["waiting", "waiting"]
    approve_all()
    assert parent.run_sync() == ["before", "1 approved", "after"]
    assert ran == ["before", 1, "after"]
    assert "in doubt" not in caplog.text


def test_two_children_that_are_given_the_same_are_told_apart_by_their_names() -> None:
    @workflow("one")
    async def one(ctx: Context, number: int) -> str:
        return "one"

    @workflow("other")
    async def other(ctx: Context, number: int) -> str:
        return "other"

    order = [one, other]

    @workflow("parent")
    async def parent(ctx: Context) -> list[str]:
        return [await step("child", each.run, 1) for each in order]

    assert parent.run_sync() == ["one", "other"]
    order.reverse()
    assert parent.run_sync() == ["other", "one"]
    order.remove(one)
    assert parent.run_sync() == ["other"]


EDITED = """
    from agentflow.testing import FakeModel

    @workflow("child")
    async def child(ctx, number: int) -> str:
        return await generate_content(f"PROMPT {number}", model="openai:gpt-5-mini")

    @workflow("parent")
    async def parent(ctx) -> list:
        first = await step("first", child.run, 1)
        second = await asyncio.gather(step("second", lambda: child.run(2)), child.run(3))
        if DIE:
            die()
        return [first, *second]

    def answer(request):
        note(request["text"])
        return request["text"].lower()

    with FakeModel(answer):
        print(parent.run_sync())
"""


def test_a_killed_parent_pays_for_no_child_again_and_an_edited_childs_prompt_is_asked_anew(tmp_path: Path) -> None:
    run_program(EDITED.replace("DIE", "True").replace("PROMPT", "tell"), tmp_path, expect_kill=True)
    asked = ["tell 1", "tell 2", "tell 3"]
    assert sorted(notes(tmp_path)) == asked
    again = write_program(EDITED.replace("DIE", "False").replace("PROMPT", "tell"), tmp_path)
    assert run_program(again, tmp_path).out.strip() == str(asked)
    assert sorted(notes(tmp_path)) == asked, "paid again"
    edited = write_program(EDITED.replace("DIE", "False").replace("PROMPT", "say"), tmp_path)
    assert run_program(edited, tmp_path).out.strip() == "['say 1', 'say 2', 'say 3']"
    assert sorted(notes(tmp_path)) == ["say 1", "say 2", "say 3", *asked]


async def test_what_runs_beside_a_child_that_waits_is_finished_and_recorded_before_the_run_suspends() -> None:
    waiting = asyncio.Event()

    async def slow() -> str:
        await waiting.wait()
        await asyncio.sleep(0.05)  # long enough for a run that does not wait for this to be suspended
        return await work("slow")

    @workflow("inner")
    async def inner(ctx: Context) -> bool:
        waiting.set()
        return bool(await human_task(type="approve", assign_to="manager", data="inner"))

    @workflow("beside")
    async def beside(ctx: Context) -> list[Any]:
        return list(await asyncio.gather(step("child", inner.run), step("slow", slow)))

    run = await beside.start()
    assert run.status == "waiting" and ran == ["slow"]
    assert [each.output for each in run.steps] == ["slow"]
    approve_all()
    assert await beside.run() == [True, "slow"] and ran == ["slow"]


async def test_a_run_that_stays_goes_on_when_its_childs_child_is_answered() -> None:
    @workflow("lowest")
    async def lowest(ctx: Context) -> bool:
        return bool(await human_task(type="approve", assign_to="manager", data="lowest"))

    @workflow("middle")
    async def middle(ctx: Context) -> bool:
        return await lowest.run()

    @workflow("top")
    async def top(ctx: Context) -> list[bool]:
        return list(await asyncio.gather(middle.run(), step("child", lowest.options(run_id="other").run)))

    running = asyncio.create_task(top.options(wait=True).run())
    while [run.status for run in runs.list(status="waiting")] != ["waiting"] * 3:  # noqa: ASYNC110, all but the top
        await asyncio.sleep(0.005)
    assert not running.done()
    approve_all()
    assert await asyncio.wait_for(running, 60) == [True, True]


def test_plain_code_waits_for_what_its_child_waits_for() -> None:
    from agentflow import sync

    @sync.workflow("plain-child")
    def plain_child(ctx: sync.Context, number: int) -> str:
        sync.step("work", lambda n: ran.append(n) or n, number)
        return f"{number} {bool(sync.human_task(type='approve', assign_to='manager', data=number))}"

    @sync.workflow("plain-parent")
    def plain_parent(ctx: sync.Context) -> list[Any]:
        return sync.parallel([lambda: plain_child.run(1), lambda: sync.step("two", plain_child.run, 2)])

    with pytest.raises(Waiting) as waits:
        plain_parent.run()
    assert len(waits.value.waiting_on) == 2
    approve_all()
    assert plain_parent.run() == ["1 True", "2 True"] and sorted(ran) == [1, 2]
