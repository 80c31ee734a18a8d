"""A cancelled run commits nothing more, wherever it executes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentflow import (
    Context,
    RunCancelled,
    TaskClosed,
    UsageError,
    Waiting,
    WorkflowTimeout,
    human_task,
    opening,
    parallel,
    runs,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.cli.app import run as command
from agentflow.testing import FakeClock
from tests.programs import notes, run_program, start_program


async def test_cancelled_run_withdraws_its_tasks_and_cannot_be_run_again() -> None:
    @workflow("waits")
    async def flow(ctx: Context) -> None:
        await human_task(data=1)

    run = await flow.start()
    task = tasks.list()[0]
    cancelled = run.cancel()
    assert run.status == cancelled.status == "cancelled" and (await cancelled).id == run.id
    assert tasks.list() == [] and run.waiting_on == [] and cancelled.completed_at is not None
    with pytest.raises(TaskClosed, match="withdrawn"):
        tasks.approve(task.id)
    for again in (flow.run, lambda: run):
        with pytest.raises(RunCancelled):
            await again()
    with pytest.raises(RunCancelled):
        cancelled.result()
    assert run.cancel().status == "cancelled"
    assert (await flow.options(fresh=True).start()).status == "waiting"


async def test_run_that_has_ended_is_not_cancelled() -> None:
    @workflow("ends")
    async def flow(ctx: Context, fails: bool) -> None:
        assert not fails

    for fails in (False, True):
        run = await flow.start(fails)
        with pytest.raises(UsageError, match=f"{run.status}.*nothing to cancel"):
            runs.cancel(run.id)
        assert runs.get(run.id).status == run.status


async def test_run_that_executes_in_this_process_is_stopped_and_records_nothing_more() -> None:
    begun, seen = asyncio.Event(), []

    @workflow("executes")
    async def flow(ctx: Context) -> None:
        async def slow() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                seen.append("stopped")

        await step("before", lambda: 1)
        try:
            await step("slow", slow)
        finally:
            await step("after", lambda: seen.append("after"))

    running = asyncio.create_task(flow.run())
    await begun.wait()
    run = flow.runs()[0].cancel()
    async with asyncio.timeout(20):
        with pytest.raises(RunCancelled):
            await running
    assert seen == ["stopped"] and [s.name for s in runs.get(run.id).steps] == ["before"]
    assert runs.get(run.id).status == "cancelled"


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_run_that_stays_for_an_answer_is_stopped(plain: bool) -> None:
    if plain:

        @sync.workflow("stays")
        def flow(ctx: Context) -> None:
            sync.human_task(data=1)
    else:

        @workflow("stays")
        async def flow(ctx: Context) -> None:
            await human_task(data=1)

    failed: list[BaseException] = []

    def stay() -> None:
        try:
            flow.options(wait=True).run_sync()
        except RunCancelled as error:
            failed.append(error)

    thread = threading.Thread(target=stay)
    thread.start()
    while not tasks.list():
        time.sleep(0.005)
    runs.cancel(flow.runs()[0].id)
    thread.join(20)
    assert not thread.is_alive() and len(failed) == 1 and flow.runs()[0].status == "cancelled"


def test_process_whose_run_is_cancelled_from_outside_commits_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """
        @workflow("outside")
        async def flow(ctx):
            await step("first", lambda: note("first"))
            while not (HERE / "go").exists():
                await asyncio.sleep(0.005)
            await step("second", lambda: note("second"))
            await step("third", lambda: note("third"))
        try:
            flow.run_sync()
        except RunCancelled as error:
            print("cancelled")
    """
    process = start_program(program, tmp_path)
    while not any(run.steps for run in runs.list()):
        assert process.poll() is None
        time.sleep(0.005)
    (run,) = runs.list()
    assert command(["runs", "cancel", run.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "cancelled"
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=60)
    assert out == "cancelled\n", err
    # It may have begun the second step before it noticed; it cannot have recorded it, nor begun the third.
    assert "third" not in notes(tmp_path) and [s.name for s in runs.get(run.id).steps] == ["first"]
    assert runs.get(run.id).status == "cancelled"
    assert command(["runs", "cancel", "nothing"]) == 4


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_compensations_run_if_asked_and_nothing_else_does(plain: bool) -> None:
    done: list[str] = []
    undo: dict[str, Any] = {"compensate": lambda result: done.append(f"undo {result}")}
    if plain:

        @sync.workflow("undone")
        def flow(ctx: Context) -> None:
            sync.step("one", lambda: done.append("one") or 1, **undo)
            sync.step("two", lambda: done.append("two") or 2, **undo)
            sync.human_task(data=1)
            sync.step("three", lambda: done.append("three"))
    else:

        @workflow("undone")
        async def flow(ctx: Context) -> None:
            await step("one", lambda: done.append("one") or 1, **undo)
            await step("two", lambda: done.append("two") or 2, **undo)
            await human_task(data=1)
            await step("three", lambda: done.append("three"))

    async def start(key: str) -> Any:
        return await asyncio.to_thread(flow.options(run_id=key).start) if plain else await flow.options(run_id=key).start()

    run = asyncio.run(start("kept"))
    assert run.cancel().status == "cancelled" and done == ["one", "two"]
    done.clear()
    run = asyncio.run(start("undone"))
    assert run.cancel(compensate=True).status == "cancelled"
    assert done == ["one", "two", "undo 2", "undo 1"] and tasks.list() == []
    with pytest.raises(RunCancelled):
        flow.options(run_id="undone").run_sync()
    assert len(done) == 4


async def test_compensations_of_a_run_whose_code_is_elsewhere_wait_for_it(again: Callable[[], None]) -> None:
    done: list[str] = []

    @workflow("elsewhere")
    async def flow(ctx: Context) -> None:
        await step("one", lambda: done.append("one"), compensate=lambda _: done.append("undo"))
        await human_task(data=1)

    run = await flow.start()
    from agentflow.handles import Run, workflows

    del workflows["elsewhere"]
    assert Run(run._journal, run._document).cancel(compensate=True).status == "interrupted"
    assert done == ["one"] and tasks.list() == []
    with pytest.raises(RunCancelled):
        await flow.run()
    assert done == ["one", "undo"] and runs.get(run.id).status == "cancelled"


async def test_runs_started_by_the_body_are_cancelled_with_it() -> None:
    @workflow("child")
    async def child(ctx: Context, n: int) -> None:
        if n:
            await human_task(data=n)

    @workflow("parent")
    async def parent(ctx: Context) -> None:
        await child.run(0)
        await child.run(1)

    run = await parent.start()
    assert run.status == "waiting"
    await child.start(2)
    run.cancel()
    assert {r.input: r.status for r in child.runs()} == {0: "completed", 1: "cancelled", 2: "waiting"}
    assert [task.data for task in tasks.list()] == [2]


async def test_run_that_is_too_late_starts_no_child() -> None:
    done: list[int] = []

    @workflow("late-child")
    async def child(ctx: Context, n: int) -> int:
        await step("work", lambda: done.append(n))
        return n

    with FakeClock() as clock:

        @workflow("late-parent", timeout="1h")
        async def parent(ctx: Context) -> None:
            await child.run(1)
            clock.advance("2h")
            await child.run(2)

        with pytest.raises(WorkflowTimeout):
            await parent.run()
    assert done == [1]


def test_run_that_was_killed_after_its_last_step_is_undone_all_the_same(tmp_path: Path) -> None:
    program = """
        @workflow("last")
        async def flow(ctx):
            await step("one", lambda: note("one"), compensate=lambda _: note("undo"))
            if "die" in sys.argv:
                die()
            return "done"
        print(flow.runs()[0].cancel(compensate=True).status if "cancel" in sys.argv else flow.run_sync())
    """
    run_program(program, tmp_path, "die", expect_kill=True)
    assert run_program(program, tmp_path, "cancel").out == "cancelled\n"
    assert notes(tmp_path) == ["one", "undo"]


# -- retry -----------------------------------------------------------------------------------------


done: list[str] = []
broken: list[bool] = []


def work(name: str) -> str:
    done.append(name)
    if name == "d" and broken:
        raise ValueError("broken")
    return name


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_retry_from_a_step_does_it_and_what_was_started_after_it_anew(plain: bool) -> None:
    done.clear()
    broken[:] = [True]
    if plain:

        @sync.workflow("retried")
        def flow(ctx: Context) -> str:
            return "".join(sync.step(name, work, name) for name in "abcd")
    else:

        @workflow("retried")
        async def flow(ctx: Context) -> str:
            return "".join([await step(name, work, name) for name in "abcd"])

    def retry(**options: Any) -> Any:
        found = flow.runs()[0].retry(**options)
        return found.run_sync() if plain else asyncio.run(_awaited(found))

    with pytest.raises(ValueError):
        flow.run_sync()
    broken.clear()
    done.clear()
    assert retry() == "abcd" and done == ["d"]
    done.clear()
    assert retry(from_step="b") == "abcd" and done == ["b", "c", "d"]
    done.clear()
    assert retry(from_step=flow.runs()[0].steps[2].id) == "abcd" and done == ["c", "d"]
    with pytest.raises(UsageError, match="no step.*'a'"):
        retry(from_step="x")
    assert flow.run_sync() == "abcd" and len(done) == 2


async def _awaited(it: Any) -> Any:
    return await it


async def test_person_is_asked_again_when_a_run_is_retried_from_before_the_question() -> None:
    @workflow("asked-again")
    async def flow(ctx: Context) -> Any:
        await step("write", lambda: 1)
        return (await human_task(data=1)).by

    await flow.start()
    tasks.approve(tasks.list()[0].id, by="Ann")
    assert await flow.run() == "Ann"
    with pytest.raises(Waiting):
        await flow.runs()[0].retry(from_step="write")
    tasks.approve(tasks.list()[0].id, by="Bob")
    assert await flow.run() == "Bob"


def test_a_cancelled_run_undoes_what_the_runs_inside_it_did_before_its_own_steps() -> None:
    undone: list[str] = []

    @workflow("inner-plain")
    async def inner(ctx: Context, name: str) -> None:
        await step("book", lambda: f"{name} room", compensate=undone.append)
        await human_task(data=name)

    @workflow("outer-plain")
    async def outer(ctx: Context) -> None:
        await step("book", lambda: "flight", compensate=undone.append)
        await parallel([inner.run("a"), inner.run("b"), human_task(data="outer")])

    with pytest.raises(Waiting):
        outer.run_sync()
    (run,) = outer.runs()
    assert run.cancel(compensate=True).status == "cancelled"
    assert sorted(undone[:2]) == ["a room", "b room"] and undone[2:] == ["flight"]
    assert {each.status for each in runs.list()} == {"cancelled"}
    assert tasks.list() == []
    assert run.cancel(compensate=True).status == "cancelled" and len(undone) == 3


def test_a_cancelled_plain_run_undoes_what_the_plain_runs_inside_it_did() -> None:
    undone: list[str] = []

    @sync.workflow("inner-of-plain")
    def inner(ctx: Context, name: str) -> None:
        sync.step("book", lambda: f"{name} room", compensate=undone.append)
        sync.human_task(data=name)

    @sync.workflow("outer-of-plain")
    def outer(ctx: Context) -> None:
        sync.step("book", lambda: "flight", compensate=undone.append)
        inner.run("a")

    with pytest.raises(Waiting):
        outer.run()
    (run,) = outer.runs()
    assert run.cancel(compensate=True).status == "cancelled"
    assert undone == ["a room", "flight"]
    assert {each.status for each in runs.list()} == {"cancelled"}


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("moment", ["the end", "a wait", "a failure"])
def test_a_run_that_is_cancelled_after_its_last_step_says_that_it_was_cancelled(plain: bool, moment: str) -> None:
    def last(ctx: Context) -> None:
        runs.cancel(ctx.run_id)
        if moment == "a failure":
            raise ValueError("late")

    @workflow("ends-late")
    async def flow(ctx: Context) -> None:
        await step("one", lambda: 1)
        last(ctx)
        if moment == "a wait":
            await human_task(data=1)

    @sync.workflow("ends-late-plain")
    def flow_plain(ctx: Context) -> None:
        sync.step("one", lambda: 1)
        last(ctx)
        if moment == "a wait":
            sync.human_task(data=1)

    with pytest.raises(RunCancelled, match="was cancelled"):
        (flow_plain if plain else flow).run_sync()
    assert [run.status for run in runs.list()] == ["cancelled"] and tasks.list() == []


def test_a_run_that_is_cancelled_while_it_is_taken_up_says_that_it_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    @workflow("taken-up")
    async def flow(ctx: Context) -> None:
        await human_task(data=1)

    with pytest.raises(Waiting):
        flow.run_sync()
    take_up = opening.take_up

    def cancelled_first(*args: Any) -> Any:
        runs.cancel(runs.list()[0].id)
        return take_up(*args)

    monkeypatch.setattr(opening, "take_up", cancelled_first)
    with pytest.raises(RunCancelled, match="was cancelled"):
        flow.run_sync()
    assert runs.list()[0].status == "cancelled"
