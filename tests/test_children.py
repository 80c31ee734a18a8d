"""Workflows that run others: in their body and inside their steps."""

from __future__ import annotations

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
