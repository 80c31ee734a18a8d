"""Workflows that run others: in their body and inside their steps."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentflow import Context, human_task, runs, step, sync, tasks, workflow
from agentflow.errors import Waiting
from tests.programs import notes, run_program, write_program

MODEL = "openai:gpt-5-mini"
ran: list[Any] = []
broken: set[Any] = set()


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()
    broken.clear()


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


# -- a child that has failed where it was asked for -----------------------------------------------

async def breaks(what: Any) -> Any:
    ran.append(what)
    if what in broken:
        raise ConnectionError(f"{what} is down")
    return what


@workflow("fragile")
async def fragile(ctx: Context, what: str) -> str:
    return await step("breaks", breaks, what)


def test_a_failed_child_of_a_failed_run_is_tried_again_and_then_stays_done() -> None:
    @workflow("needs-it")
    async def needs_it(ctx: Context) -> list[str]:
        first = await fragile.run("tea")
        await step("after", work, "after")
        await human_task(data="go on?")
        return [first]

    broken.add("tea")
    for _ in range(2):
        with pytest.raises(ConnectionError, match="tea is down"):
            needs_it.run_sync()
    broken.clear()
    with pytest.raises(Waiting):
        needs_it.run_sync()
    approve_all()
    assert needs_it.run_sync() == ["tea"] == needs_it.run_sync()
    assert ran == ["tea", "tea", "tea", "after"]


def test_a_body_that_tries_its_child_again_gets_each_failure_once_more_on_replay() -> None:
    @workflow("stubborn")
    async def stubborn(ctx: Context) -> list[str]:
        seen = []
        for attempt in range(3):
            if attempt == 2:
                broken.clear()
            try:
                seen.append(await fragile.run("tea"))
                break
            except ConnectionError as error:
                seen.append(str(error))
        await human_task(data="go on?")
        return seen

    broken.add("tea")
    with pytest.raises(Waiting):
        stubborn.run_sync()
    approve_all()
    assert stubborn.run_sync() == ["tea is down", "tea is down", "tea"] == stubborn.run_sync()
    assert ran == ["tea"] * 3


@pytest.mark.parametrize("handled_by", ["step", "child"])
def test_a_childs_failure_that_was_handled_is_history_when_its_caller_fails_later(handled_by: str) -> None:
    @workflow("refund")
    async def refund(ctx: Context, what: str) -> str:
        return await step("refund", work, f"refund {what}")

    @workflow(f"sells-by-{handled_by}")
    async def sells(ctx: Context) -> str:
        try:
            await fragile.run("tea")
        except ConnectionError:
            await (step("refund", work, "refund tea") if handled_by == "step" else refund.run("tea"))
        return await step("then", breaks, "cup")

    broken.update({"tea", "cup"})
    with pytest.raises(ConnectionError, match="cup"):
        sells.run_sync()
    broken.clear()
    assert sells.run_sync() == "cup" == sells.run_sync()
    assert ran == ["tea", "refund tea", "cup", "cup"], "sold after the refund"


def test_a_new_attempt_of_a_step_tries_the_child_inside_again() -> None:
    async def around() -> str:
        if ran.count("tea") == 2:
            broken.clear()
        return await fragile.run("tea")

    @workflow("around")
    async def flow(ctx: Context) -> str:
        return await step("around", around, retry={"max_attempts": 3, "initial_delay": 0})

    broken.add("tea")
    assert flow.run_sync() == "tea" == flow.run_sync()
    assert ran == ["tea"] * 3


async def test_start_of_a_child_whose_failure_is_history_gives_the_failed_run() -> None:
    @workflow("starts")
    async def starts(ctx: Context) -> str:
        run = await fragile.start("tea")
        await step("note", work, run.status)
        await human_task(data="go on?")
        return run.status

    broken.add("tea")
    with pytest.raises(Waiting):
        await starts.run()
    broken.clear()
    approve_all()
    assert await starts.run() == "failed" and ran == ["tea", "failed"]


def test_a_failure_of_a_child_is_history_in_a_process_that_takes_over(tmp_path: Path) -> None:
    source = """
    def fail():
        note("tried")
        raise ConnectionError("down")

    @workflow
    async def fragile(ctx):
        await step("fail", fail)

    @workflow
    async def parent(ctx):
        try:
            await fragile.run()
        except ConnectionError as error:
            text = str(error)
        if sys.argv[1:] == ["die"]:
            die()
        return await step("after", lambda: f"after {text}")

    print(parent.run_sync())
    """
    run_program(source, tmp_path, "die", expect_kill=True)
    assert run_program(source, tmp_path).out == "after down\n"
    assert notes(tmp_path) == ["tried"]


def test_a_retry_from_a_step_before_it_asks_the_child_anew() -> None:
    @workflow("again")
    async def again(ctx: Context) -> str:
        await step("before", work, "before")
        try:
            return await fragile.run("tea")
        except ConnectionError:
            return await step("instead", work, "instead")

    broken.add("tea")
    assert again.run_sync() == "instead"
    broken.clear()
    (run,) = [run for run in runs.list() if run.workflow == "again"]
    assert run.retry(from_step="before").run_sync() == "tea" == again.run_sync()


def test_a_fork_has_the_failures_of_children_that_were_handled_before_it() -> None:
    @workflow("forked")
    async def forked(ctx: Context) -> list[str]:
        try:
            first = await fragile.run("tea")
        except ConnectionError as error:
            first = str(error)
        return [await step("after", work, first), await step("last", work, "last")]

    broken.add("tea")
    assert forked.run_sync() == ["tea is down", "last"]
    broken.clear()
    (run,) = [run for run in runs.list() if run.workflow == "forked"]
    assert run.fork(from_step="last").run_sync() == ["tea is down", "last"]
    assert ran == ["tea", "tea is down", "last", "last"]


# -- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["async", "plain", "plain in async", "async in plain"])
def test_a_plan_runs_nothing_of_a_child_either(how: str) -> None:
    async def child_body(ctx: Context, n: int) -> Any:
        return [await step("work", work, n), await step("more", work, -n)]

    def child_plain(ctx: Context, n: int) -> Any:
        return [sync.step("work", work, n), sync.step("more", work, -n)]

    inner: Any = sync.workflow("inner", execute=child_plain) if how.startswith("plain") else workflow("inner", execute=child_body)

    async def parent_body(ctx: Context) -> Any:
        return [await step("before", work, "before"), await inner.run(1), await step("after", work, "after")]

    async def parent_of_plain(ctx: Context) -> Any:
        got = await asyncio.to_thread(inner.run, 1)
        return [await step("before", work, "before"), got, await step("after", work, "after")]

    def parent_plain(ctx: Context) -> Any:
        return [sync.step("before", work, "before"), inner.run_sync(1), sync.step("after", work, "after")]

    if how == "plain in async":
        outer: Any = workflow("outer", execute=parent_of_plain)
    else:
        outer = workflow("outer", execute=parent_body) if how == "async" else sync.workflow("outer", execute=parent_plain)

    def plan() -> list[tuple[str, str]]:
        made = outer.plan() if isinstance(outer, sync.Workflow) else asyncio.run(outer.plan())
        return [(each.name, each.state) for each in made.steps]

    first = "work" if how == "plain in async" else "before"
    assert plan() == [(first, "unknown")] and ran == [] and runs.list() == []
    assert outer.run_sync() == ["before", [1, -1], "after"]
    before = len(ran)
    assert sorted(plan()) == sorted((name, "reused") for name in ("before", "work", "more", "after"))
    assert len(ran) == before and {run.status for run in runs.list()} == {"completed"}


def test_a_plan_shows_the_first_step_of_a_child_that_would_run() -> None:
    @workflow("inner")
    async def inner(ctx: Context, n: int) -> Any:
        await step("work", work, n)
        await human_task(data=n)
        return await step("more", work, -n)

    @workflow("outer")
    async def outer(ctx: Context) -> Any:
        return await asyncio.gather(inner.run(1), inner.run(2))

    with pytest.raises(Waiting):
        outer.run_sync()
    tasks.approve(tasks.list()[0].id)
    before = [(run.id, run.status) for run in runs.list()], ran.copy()
    plan = asyncio.run(outer.plan())
    assert [each.name for each in plan.steps if each.state == "reused"] == ["work", "work"]
    assert len(plan.steps) > 2
    assert ([(run.id, run.status) for run in runs.list()], ran) == before
