"""Programs that once made it pay twice, answer wrongly, or get stuck; each stays here as a promise."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import Waiting, parallel, rundocs, step, sync, tasks, workflow
from agentflow.errors import StepFailed, StepTimeout, UsageError
from tests.programs import notes, run_program


def test_a_step_in_doubt_that_a_person_says_has_happened_is_not_run_again(tmp_path: Path) -> None:
    source = """
    def pay():
        note("pay")
        if "die" in sys.argv:
            die()

    @workflow("order", run_id=lambda: "order-1")
    async def order(ctx):
        return await step("pay", pay, in_doubt="ask")

    try:
        print("result", order.run_sync())
    except Waiting as error:
        tasks.approve(error.waiting_on[0]["id"], by="boss")
    """
    run_program(source, tmp_path, "die", expect_kill=True)
    run_program(source, tmp_path, "ask")
    assert run_program(source, tmp_path, "go").out == "result None\n"
    assert notes(tmp_path) == ["pay"]


def test_a_uuid_that_the_payment_echoes_is_still_an_accident_of_the_moment(tmp_path: Path) -> None:
    source = """
    import uuid

    def charge(key):
        note("charge")
        return {"key": key, "ok": True}

    def ship(key):
        note("ship")
        if "die" in sys.argv:
            die()
        return f"shipped {key}"

    @workflow("order", run_id=lambda: "order-1")
    async def order(ctx):
        key = str(uuid.uuid4())
        paid = await step("charge", charge, key)
        return await step("ship", ship, paid["key"])

    print(order.run_sync())
    """
    run_program(source, tmp_path, "die", expect_kill=True)
    ended = run_program(source, tmp_path)
    assert notes(tmp_path) == ["charge", "ship", "ship"]
    assert "uuid4" in ended.err


async def test_rerun_of_a_step_that_had_failed_before_does_it_anew() -> None:
    ran: list[str] = []

    def fetch() -> int:
        ran.append("fetch")
        if len(ran) == 1:
            raise ConnectionError("down")
        return len(ran)

    @workflow("fetching")
    async def fetching(ctx: Any) -> int:
        return await step("fetch", fetch)

    with pytest.raises(ConnectionError):
        await fetching.run()
    assert await fetching.run() == 2
    assert await fetching.options(rerun=["fetch"]).run() == 3
    assert await fetching.run() == 3


async def test_an_undone_step_is_listed_as_undone() -> None:
    @workflow("order")
    async def order(ctx: Any) -> None:
        await step("charge", lambda: "paid", compensate=lambda paid: None)
        raise ValueError("no stock")

    run = await order.start()
    assert run.status == "failed"
    assert [(s.name, s.status) for s in run.steps] == [("charge", "undone"), ("undo charge", "completed")]


async def test_start_gives_the_failed_run_also_when_a_result_could_not_be_recorded() -> None:
    @workflow("order")
    async def order(ctx: Any) -> None:
        await step("numbers", lambda: threading.Lock())

    run = await order.start()
    assert run.status == "failed" and "Lock" in str(run.error) or "lock" in str(run.error)


async def test_a_run_id_that_cannot_be_made_says_for_which_workflow() -> None:
    @workflow("order", run_id=lambda order: order["id"])
    async def order(ctx: Any, order: dict[str, int]) -> None: ...

    with pytest.raises(UsageError, match=r"workflow 'order': run_id= failed .*KeyError"):
        await order.run({"number": 1})


def test_the_timeout_of_plain_parallel_counts_for_all_its_branches_together() -> None:
    release = threading.Event()
    try:
        with pytest.raises(StepTimeout):
            sync.parallel([lambda: time.sleep(0.05)] * 8 + [release.wait], concurrency=1, timeout="200ms")
    finally:
        release.set()


def test_a_failed_plain_branch_ends_its_siblings_that_wait_for_people() -> None:
    def boom() -> None:
        raise ValueError("no")

    @sync.workflow("both")
    def both(ctx: Any) -> Any:
        return sync.parallel([lambda: sync.human_task("approve", data=1), lambda: sync.step("boom", boom)])

    for _ in range(2):
        with pytest.raises(ValueError, match="no") as caught:
            both.run()
        assert isinstance(caught.value, StepFailed)


async def test_a_run_whose_child_waits_waits_too_and_undoes_nothing() -> None:
    undone: list[str] = []

    @workflow("child")
    async def child(ctx: Any, n: int) -> bool:
        return bool(await agentflow.human_task("approve", data=n))

    @workflow("parent")
    async def parent(ctx: Any, n: int) -> Any:
        await step("charge", lambda: "paid", compensate=undone.append)
        return await child.run(n)

    with pytest.raises(Waiting) as waiting:
        await parent.run(1)
    assert parent.runs()[0].status == "waiting" and undone == []
    tasks.approve(waiting.value.waiting_on[0]["id"])
    assert await parent.run(1) is True
    assert undone == []


async def test_two_fresh_runs_started_together_are_two_runs() -> None:
    @workflow("order")
    async def order(ctx: Any, n: int) -> str:
        await asyncio.sleep(0)
        return ctx.run_id

    await order.run(1)
    first, second = await asyncio.gather(*(order.options(fresh=True, busy="wait").run(1) for _ in range(2)))
    assert first != second
    assert len(order.runs()) == 3


async def test_plan_of_an_unrecorded_step_is_unknown_and_runs_nothing() -> None:
    ran: list[uuid.UUID] = []

    @workflow("order")
    async def order(ctx: Any) -> Any:
        return await parallel(
            [step("a", lambda: ran.append(uuid.uuid4())), step("b", lambda: ran.append(uuid.uuid4()))]
        )

    plan = await order.plan()
    assert [(s.name, s.state) for s in plan.steps] == [("a", "unknown"), ("b", "unknown")]
    assert ran == [] and "unknown" in str(plan)


async def test_each_fresh_run_gets_the_next_number_and_looks_at_few_of_those_before() -> None:
    @workflow(run_id=lambda n: f"n{n}")
    async def counts(ctx: Any, n: int) -> str:
        return ctx.run_id

    reads: list[str] = []
    read = rundocs.read

    def counted(journal: Any, run_id: str) -> Any:
        reads.append(run_id)
        return read(journal, run_id)

    ids = [await counts.options(fresh=True).run(1) for _ in range(40)]
    assert ids == ["n1", *(f"n1-{number}" for number in range(2, 41))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rundocs, "read", counted)
        assert await counts.options(fresh=True).run(1) == "n1-41"
    assert len([one for one in reads if one.startswith("n1")]) < 16
    assert await counts.run(1) == "n1-41", "the newest is the current one"
