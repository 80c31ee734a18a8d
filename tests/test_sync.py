"""The same names for plain code: steps in the calling thread, the same records, the same rules."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from agentflow import Context, Retry, RunBusy, StepFailed, StepTimeout, UsageError, Waiting, runs, sync, tasks
from agentflow import step as async_step
from agentflow import workflow as async_workflow
from agentflow.sync import generate_content, human_task, parallel, step, workflow
from agentflow.testing import FakeModel

MODEL = "openai:gpt-4o-mini"
calls: list[Any] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def double(n: int) -> int:
    calls.append(n)
    return n * 2


async def later(n: int) -> int:
    await asyncio.sleep(0)
    calls.append(threading.get_ident())
    return n + 1


def test_all_forms_of_a_step_give_their_result_at_once(again: Callable[[], None]) -> None:
    @step
    def bare(n: int) -> int:
        calls.append("bare")
        return n

    @step("named", retry=Retry(max_attempts=2))
    def named(n: int) -> int:
        calls.append("named")
        return n

    @workflow("forms")
    def flow(ctx: Context, n: int) -> list[Any]:
        return [
            step("double", double, n),
            step("lambda", lambda: double(n + 1)),
            bare(n),
            named.options(idempotency_key=f"k{n}")(n),
        ]

    assert flow.run(4) == [8, 10, 4, 4]
    again()
    assert flow.run(4) == [8, 10, 4, 4]
    assert calls == [4, 5, "bare", "named"]
    assert [s.name for s in runs.list()[0].steps] == ["double", "lambda", "bare", "named"]


def test_workflow_by_name_and_execute_function() -> None:
    def execute(ctx: Context, n: int) -> int:
        return int(step("double", double, n))

    flow = workflow(name="by-name", execute=execute)
    assert flow.run(3) == 6
    run = flow.start(3)
    assert run.status == "completed" and run.result() == 6 and run.workflow == "by-name"
    plan = flow.plan(3)
    assert [(s.name, s.state) for s in plan.steps] == [("double", "reused")]
    assert [(s.name, s.state) for s in flow.plan(4).steps] == [("double", "unknown")]
    assert calls == [3]


def test_step_runs_in_the_calling_thread_unless_it_has_a_timeout() -> None:
    @workflow("threads")
    def flow(ctx: Context) -> list[int]:
        return [step("here", threading.get_ident), step("there", threading.get_ident, timeout="10s")]

    here, there = flow.run()
    assert here == threading.get_ident() != there


def test_step_that_takes_longer_than_its_timeout_is_left_and_its_late_result_is_used_next_time() -> None:
    free = threading.Event()

    def slow() -> str:
        calls.append("slow")
        free.wait(60)
        return "late"

    @workflow("timeout")
    def flow(ctx: Context) -> str:
        return str(step("slow", slow, timeout="50ms"))

    start = time.monotonic()
    with pytest.raises(StepTimeout) as caught:
        flow.run()
    assert time.monotonic() - start < 30 and isinstance(caught.value, TimeoutError)
    free.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert flow.run() == "late"
            break
        except StepTimeout:
            assert time.monotonic() < deadline
    assert calls.count("slow") >= 1


def test_async_function_of_a_step_runs_on_a_loop_of_its_own() -> None:
    @workflow("async-step")
    def flow(ctx: Context, n: int) -> list[int]:
        return [step("later", later, n), step("lambda", lambda: later(n + 1)), step("limited", later, 9, timeout=5)]

    assert flow.run(1) == [2, 3, 10]
    assert threading.get_ident() not in calls and len(set(calls)) == 1


def test_async_step_that_takes_too_long_is_cancelled() -> None:
    cancelled = threading.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @workflow("async-timeout")
    def flow(ctx: Context) -> None:
        step("slow", slow, timeout="30ms")

    with pytest.raises(StepTimeout):
        flow.run()
    assert cancelled.wait(5)


def test_plain_steps_nest_and_replay(again: Callable[[], None]) -> None:
    def outer(n: int) -> int:
        return int(step("inner", double, n)) + int(step("inner", double, n + 1))

    @workflow("nested")
    def flow(ctx: Context) -> int:
        return int(step("outer", outer, 1)) + int(step("inner", double, 1))

    assert flow.run() == 8
    again()
    assert flow.run() == 8
    assert calls == [1, 2, 1]
    assert [(s.name, s.parent) for s in runs.list()[0].steps] == [
        ("outer", None),
        ("inner", "outer"),
        ("inner", "outer"),
        ("inner", None),
    ]


def test_retries_and_failures_are_those_of_async_code(again: Callable[[], None]) -> None:
    def fails() -> None:
        calls.append("try")
        raise KeyError("k")

    @workflow("retries")
    def flow(ctx: Context) -> None:
        step("fails", fails, retry={"max_attempts": 3, "initial_delay": 0.001})

    with pytest.raises(KeyError) as failed:
        flow.run()
    assert isinstance(failed.value, StepFailed) and failed.value.attempts == 3
    assert calls == ["try"] * 3
    assert runs.list()[0].status == "failed"


def test_compensation_undoes_in_reverse_order() -> None:
    @workflow("undo")
    def flow(ctx: Context) -> None:
        step("a", lambda: "a", compensate=lambda made: calls.append(f"undo {made}"))
        step("b", lambda: "b", compensate=lambda made: calls.append(f"undo {made}"))
        raise ValueError("no")

    with pytest.raises(ValueError):
        flow.run()
    assert calls == ["undo b", "undo a"]


def test_parallel_of_functions_keeps_the_order_and_each_its_own_records(again: Callable[[], None]) -> None:
    @workflow("parallel")
    def flow(ctx: Context, ns: list[int]) -> Any:
        def one(n: int) -> int:
            time.sleep(0.002 * (5 - n))
            return int(step("double", double, n)) + int(step("same", lambda: 0))

        return [
            parallel([lambda: step("a", double, 10), lambda: step("b", double, 20)]),
            parallel({"x": lambda: step("x", double, 30)}),
            parallel.map(one, ns, concurrency=2),
            parallel([]),
        ]

    expected = [[20, 40], {"x": 60}, [2, 4, 6, 8], []]
    assert flow.run([1, 2, 3, 4]) == expected
    again()
    assert flow.run([1, 2, 3, 4]) == expected
    assert sorted(calls) == [1, 2, 3, 4, 10, 20, 30]


def test_parallel_branches_run_at_the_same_time_in_threads_of_their_own() -> None:
    meet = threading.Barrier(3, timeout=60)

    @workflow("at-once")
    def flow(ctx: Context) -> list[int]:
        return list(parallel([lambda n=n: step("meet", lambda n: meet.wait() * 0 + n, n) for n in range(3)]))

    assert flow.run() == [0, 1, 2]


def test_parallel_fails_fast_or_settles() -> None:
    @workflow("settles")
    def flow(ctx: Context, settle: bool) -> Any:
        branches = [lambda n=n: step("s", lambda n: calls.append(n) or 1 // n, n) for n in (1, 0, 2, 4)]
        return [repr(r) for r in parallel(branches, settle=settle, concurrency=1)]

    with pytest.raises(ZeroDivisionError):
        flow.run(False)
    assert calls == [1, 0], "later branches never start"
    results = flow.run(True)
    assert results[0] == "1" and "ZeroDivisionError" in results[1] and results[2:] == ["0", "0"]


def test_parallel_that_takes_too_long_is_left() -> None:
    free = threading.Event()
    with pytest.raises(StepTimeout):
        parallel([lambda: free.wait(10)], timeout="20ms")
    free.set()


def test_human_task_waits_and_several_are_asked_in_parallel() -> None:
    @workflow("asks")
    def flow(ctx: Context) -> list[str]:
        def ask(name: str) -> str:
            return str(human_task(data=name, assign_to=name).comment)

        return list(parallel.map(ask, ["ann", "bob"]))

    with pytest.raises(Waiting) as waits:
        flow.run()
    assert {task.assign_to for task in tasks.list()} == {"ann", "bob"}
    assert {w["assign_to"] for w in waits.value.waiting_on} == {"ann", "bob"}
    for task in tasks.list():
        tasks.approve(task.id, comment=f"from {task.data}")
    assert flow.run() == ["from ann", "from bob"]


def test_wait_true_blocks_until_the_answer_comes() -> None:
    @workflow("stays")
    def flow(ctx: Context) -> str | None:
        return human_task(data=1).by  # type: ignore[no-any-return]

    def answer() -> None:
        deadline = time.monotonic() + 10
        while not tasks.list() and time.monotonic() < deadline:
            time.sleep(0.005)
        tasks.approve(tasks.list()[0].id, by="Ann")

    thread = threading.Thread(target=answer)
    thread.start()
    assert flow.options(wait=True).run() == "Ann"
    thread.join()


class Answer(BaseModel):
    city: str


def test_model_call_is_a_step_and_paid_once(again: Callable[[], None]) -> None:
    @workflow("ai")
    def flow(ctx: Context) -> Any:
        first = generate_content("Capital of France?", model=MODEL, output_type=Answer)
        return [first, step("inside", lambda: generate_content("And Italy?", model=MODEL))]

    with FakeModel([Answer(city="Paris"), "Rome"]) as model:
        assert flow.run() == [Answer(city="Paris"), "Rome"]
        again()
        assert flow.run() == [Answer(city="Paris"), "Rome"]
    assert len(model.calls) == 2


def test_steps_outside_a_workflow_are_durable_too(again: Callable[[], None]) -> None:
    assert step("double", double, 3) == 6
    again()
    assert step("double", double, 3) == 6
    assert calls == [3]


async def test_run_sync_works_where_a_loop_is_running_already(again: Callable[[], None]) -> None:
    @async_workflow("in-a-loop")
    async def flow(ctx: Context, n: int) -> int:
        return await async_step("double", double, n)

    assert flow.run_sync(2) == 4
    again()
    assert flow.run_sync(2) == 4
    assert await flow.run(2) == 4
    assert calls == [2]

    @workflow("plain-in-a-loop")
    def plain(ctx: Context, n: int) -> int:
        return int(step("double", double, n)) + int(step("later", later, n))

    assert plain.run(5) == 16
    run = plain.start(5)
    assert run.status == "completed"


async def test_plain_workflow_can_be_awaited_through_async_names() -> None:
    @async_workflow("plain-body")
    def flow(ctx: Context, n: int) -> int:  # type: ignore[misc]
        return int(step("double", double, n))

    assert await flow.run(4) == 8
    assert flow.run_sync(4) == 8


def test_run_sync_raises_what_the_workflow_raises() -> None:
    @async_workflow("raises")
    async def flow(ctx: Context) -> None:
        raise LookupError("nothing")

    with pytest.raises(LookupError, match="nothing"):
        flow.run_sync()


def test_names_are_those_of_the_async_module() -> None:
    assert sync.generateContent is sync.generate_content and sync.humanTask is sync.human_task
    assert set(sync.__all__) >= {"workflow", "step", "parallel", "generate_content", "human_task", "Retry", "Context"}


def test_running_the_same_run_twice_at_once_is_refused() -> None:
    inside, free = threading.Event(), threading.Event()

    def hold() -> int:
        inside.set()
        free.wait(60)
        return 1

    @workflow("busy")
    def flow(ctx: Context) -> int:
        return int(step("hold", hold))

    thread = threading.Thread(target=flow.run)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RunBusy, match="busy"):
        flow.run()
    free.set()
    thread.join()
    assert flow.run() == 1


def test_unknown_branch_is_told_what_plain_code_gives() -> None:
    with pytest.raises(UsageError, match="lambda: step"):
        parallel([step("double", double, 1)])  # type: ignore[list-item]
