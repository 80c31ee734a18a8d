"""The forms of the first page, one test each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from agentflow import Context, Retry, StepFailed, Waiting, generate_content, human_task, runs, step, tasks, workflow
from agentflow import Workflow as FlowType
from agentflow.testing import FakeModel
from tests.programs import notes, run_program

MODEL = "openai:gpt-4o-mini"


class Order(BaseModel):
    id: str
    total: int


class PaymentError(Exception):
    pass


class Calls(list[str]):
    """What was called, in order; handed to no step, so it is code and not compared."""


calls = Calls()


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def validate(order: Order) -> Order:
    calls.append("validate")
    return order


async def charge(order: Order) -> dict[str, Any]:
    calls.append("charge")
    return {"receipt": f"r-{order.id}", "amount": order.total}


async def test_workflow_by_name_and_execute_function_keeps_its_steps(again: Callable[[], None]) -> None:
    async def execute(ctx: Context, order: Order) -> str:
        checked = await step("validate", validate, order)
        paid = await step("charge", charge, checked)
        return str(paid["receipt"])

    process_order: FlowType[..., str] = workflow(name="process-order", execute=execute)
    assert await process_order.run(Order(id="7", total=100)) == "r-7"
    again()
    assert await process_order.run(Order(id="7", total=100)) == "r-7"
    assert calls == ["validate", "charge"]
    (run,) = process_order.runs()
    assert run.status == "completed" and run.workflow == "process-order" and run.output == "r-7"
    assert [s.name for s in run.steps] == ["validate", "charge"]
    assert run.input == Order(id="7", total=100)


async def test_bare_decorator_takes_the_name_of_the_function() -> None:
    @workflow
    async def greet(ctx: Context, name: str) -> str:
        return await step("greet", lambda: f"hello {name}")

    assert greet.name == "greet"
    assert await greet.run("Ann") == "hello Ann"
    assert runs.list()[0].workflow == "greet"


async def test_step_is_retried_with_exponential_backoff_up_to_max_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float, result: Any = None) -> Any:
        if seconds >= 0.9:
            delays.append(seconds)
            seconds = 0
        return await sleep(seconds, result)

    monkeypatch.setattr("agentflow.drive.asyncio.sleep", noted)
    attempts = []

    async def flaky() -> str:
        attempts.append(1)
        if len(attempts) < 5:
            raise PaymentError("card reader is busy")
        return "paid"

    @workflow("retries")
    async def flow(ctx: Context) -> str:
        paid = await step(
            "charge",
            flaky,
            retry={"max_attempts": 5, "backoff": "exponential", "initial_delay": 1, "max_delay": "5s", "jitter": False},
        )
        assert ctx.steps["charge"].attempts == 5
        return paid

    assert await flow.run() == "paid"
    assert delays == [1, 2, 4, 5]


async def test_step_that_keeps_failing_is_tried_exactly_max_attempts_times() -> None:
    attempts = []

    def broken() -> None:
        attempts.append(1)
        raise PaymentError("no")

    @workflow("broken")
    async def flow(ctx: Context) -> None:
        await step("charge", broken, retry=Retry(max_attempts=3, initial_delay=0.001))

    with pytest.raises(PaymentError) as failed:
        await flow.run()
    assert len(attempts) == 3
    assert isinstance(failed.value, StepFailed)
    assert failed.value.step == "charge" and failed.value.attempts == 3 and failed.value.error_type == "PaymentError"
    assert failed.value.run_id == flow.runs()[0].id


async def test_timeout_in_words_ends_an_attempt_that_takes_longer() -> None:
    @workflow("slow")
    async def flow(ctx: Context) -> str:
        quick = await step("quick", charge, Order(id="1", total=1), timeout="30s")
        try:
            await step("slow", lambda: asyncio.sleep(30), timeout="20ms")
        except TimeoutError as error:
            return f"{quick['receipt']} {error}"
        return "not reached"

    assert await flow.run() == "r-1 step 'slow' took longer than 0.02s"


async def test_idempotency_key_made_from_the_data_is_charged_once_across_runs() -> None:
    @workflow("by-key")
    async def flow(ctx: Context, order: Order, note: str) -> str:
        paid = await step("charge", charge, order, idempotency_key=f"charge-{order.id}")
        return str(paid["receipt"])

    assert await flow.run(Order(id="9", total=5), "first") == "r-9"
    assert await flow.run(Order(id="9", total=5), "second") == "r-9"
    assert calls == ["charge"]
    assert len(flow.runs()) == 2
    assert {run.steps[0].idempotency_key for run in flow.runs()} == {"charge-9"}


def test_restart_returns_the_cached_result(tmp_path: Path) -> None:
    program = """
        def charge(order):
            note("charge")
            return {"amount": order["total"]}

        @workflow("cached")
        async def flow(ctx, order):
            paid = await step("charge", charge, order)
            if "die" in sys.argv:
                die()
            return paid["amount"]

        print(flow.run_sync({"total": 3}))
    """
    run_program(program, tmp_path, "die", expect_kill=True)
    ended = run_program(program, tmp_path)
    assert ended.out == "3\n"
    assert notes(tmp_path) == ["charge"]
    assert "completed · 1 step: 1 replayed, 0 run" in ended.err


@pytest.mark.parametrize("amount, asks", [(5, False), (5000, True)])
async def test_person_is_asked_only_where_review_is_needed(amount: int, asks: bool) -> None:
    @workflow("review")
    async def flow(ctx: Context, order: Order) -> str:
        analysis = await step("analyse", lambda: {"needs_review": order.total > 1000})
        if analysis["needs_review"]:
            decision = await human_task(type="approve", assign_to="manager", data={"order": order})
            if not decision.approved:
                return "rejected"
            return f"approved by {decision.by}"
        return "automatic"

    run = await flow.start(Order(id="1", total=amount))
    if not asks:
        assert run.result() == "automatic" and not tasks.list()
        return
    assert run.status == "waiting"
    (task,) = tasks.list()
    assert (task.type, task.assign_to, task.data) == ("approve", "manager", {"order": Order(id="1", total=amount)})
    with pytest.raises(Waiting):
        await run
    tasks.approve(task.id, by="Maria", comment="fine")
    assert await run == "approved by Maria"


async def test_metadata_of_a_step_is_in_ctx_steps(again: Callable[[], None]) -> None:
    @workflow("metadata")
    async def flow(ctx: Context, order: Order) -> dict[str, Any]:
        await step("process", charge, order)
        record = ctx.steps["process"]
        seen.append(record)
        return {"attempts": record.attempts, "duration": record.duration, "status": record.status}

    seen: list[Any] = []
    before = datetime.now(UTC)
    first = await flow.run(Order(id="1", total=1))
    record = seen[0]
    assert record.started_at is not None and record.completed_at is not None
    assert before <= record.started_at <= record.completed_at <= datetime.now(UTC)
    assert record.duration == (record.completed_at - record.started_at).total_seconds()
    assert (record.attempts, record.status, record.kind, record.replayed) == (1, "completed", "step", False)
    assert record.output == {"receipt": "r-1", "amount": 1} and record.error is None
    again()
    assert await flow.run(Order(id="1", total=1)) == first
    assert seen[1].replayed and seen[1].started_at == record.started_at and seen[1].duration == record.duration


async def test_refund_step_compensates_and_the_error_goes_on(again: Callable[[], None]) -> None:
    def ship(order: Order) -> None:
        calls.append("ship")
        raise RuntimeError("no carrier")

    async def refund(paid: dict[str, Any]) -> str:
        calls.append("refund")
        return f"refunded {paid['receipt']}"

    @workflow("order-with-refund")
    async def flow(ctx: Context, order: Order) -> None:
        paid = await step("charge", charge, order)
        try:
            await step("ship", ship, order)
        except Exception:
            await step("refund", refund, paid)
            raise

    with pytest.raises(RuntimeError, match="no carrier"):
        await flow.run(Order(id="3", total=1))
    assert calls == ["charge", "ship", "refund"]
    again()
    with pytest.raises(RuntimeError, match="no carrier"):
        await flow.run(Order(id="3", total=1))
    assert calls == ["charge", "ship", "refund"], "a handled failure is history"
    assert flow.runs()[0].status == "failed"
    assert [(s.name, s.status) for s in flow.runs()[0].steps] == [
        ("charge", "completed"),
        ("ship", "failed"),
        ("refund", "completed"),
    ]


async def test_sync_step_async_step_and_lambda_of_a_coroutine_give_their_results() -> None:
    def plain(n: int) -> int:
        return n + 1

    async def waits(n: int) -> int:
        await asyncio.sleep(0)
        return n * 10

    @workflow("kinds")
    async def flow(ctx: Context, n: int) -> list[int]:
        return [
            await step("plain", plain, n),
            await step("async", waits, n),
            await step("lambda", lambda: waits(n + 2)),
            await step("value", lambda: n),
        ]

    assert await flow.run(4) == [5, 40, 60, 4]


@step
async def decorated(order: Order) -> str:
    calls.append("decorated")
    return order.id


@step("charge-card", retry=Retry(max_attempts=3))
def named(order: Order) -> int:
    calls.append("named")
    return order.total


async def test_calling_a_decorated_function_is_a_durable_step(again: Callable[[], None]) -> None:
    @workflow("decorators")
    async def flow(ctx: Context, order: Order) -> list[Any]:
        return [await decorated(order), await named.options(idempotency_key=f"n-{order.id}")(order)]

    assert await flow.run(Order(id="a", total=2)) == ["a", 2]
    again()
    assert await flow.run(Order(id="a", total=2)) == ["a", 2]
    assert calls == ["decorated", "named"]
    assert [s.name for s in flow.runs()[0].steps] == ["decorated", "charge-card"]
    assert named.fn(Order(id="b", total=8)) == 8


async def test_human_step_with_type_assign_to_and_data_waits_and_names_the_command() -> None:
    @workflow("human")
    async def flow(ctx: Context) -> str:
        decision = await human_task(type="approve", assign_to="manager", data={"amount": 12})
        return "yes" if decision else "no"

    with pytest.raises(Waiting) as waits:
        await flow.run()
    (task,) = tasks.list()
    message = str(waits.value)
    assert task.id in message and "manager" in message and f"agentflow tasks approve {task.id}" in message
    tasks.reject(task.id, by="Ann")
    assert await flow.run() == "no"


class Analysis(BaseModel):
    risk: str
    needs_review: bool


async def test_ai_step_shows_prompt_and_data_and_is_paid_once(again: Callable[[], None]) -> None:
    @workflow("ai")
    async def flow(ctx: Context, order: Order) -> Analysis:
        return await generate_content(
            prompt="How risky is this order?", data=order, model=MODEL, output_type=Analysis, name="analyse"
        )

    with FakeModel([Analysis(risk="low", needs_review=False)]) as model:
        assert await flow.run(Order(id="5", total=1)) == Analysis(risk="low", needs_review=False)
        again()
        assert await flow.run(Order(id="5", total=1)) == Analysis(risk="low", needs_review=False)
    assert len(model.calls) == 1
    assert "How risky is this order?" in model.calls[0]["text"] and '"id": "5"' in model.calls[0]["text"]
    (record,) = flow.runs()[0].steps
    assert (record.name, record.kind, record.model) == ("analyse", "ai", "gpt-4o-mini")
    assert record.usage.input_tokens > 0


async def test_step_names_stand_in_the_run_and_in_the_log(said: Callable[[], str]) -> None:
    attempts = []

    def flaky() -> int:
        attempts.append(1)
        if len(attempts) == 1:
            raise PaymentError("busy")
        return 1

    @workflow("names")
    async def flow(ctx: Context, order: Order) -> None:
        await step("validate", validate, order)
        await step("charge the card", flaky, retry=Retry(max_attempts=2, initial_delay=0.001))
        ctx.log.info("shipping %s", order.id)

    await flow.run(Order(id="1", total=1))
    assert [s.name for s in runs.list()[0].steps] == ["validate", "charge the card"]
    log = said()
    assert "charge the card: attempt 1 of 2 failed (PaymentError: busy)" in log
    assert "shipping 1" in log
    assert f"{runs.list()[0].id} · completed · 2 steps: 0 replayed, 2 run" in log
