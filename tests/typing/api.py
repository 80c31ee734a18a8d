"""What type checkers see of agentflow. This file is checked by tests/test_typing.py and never run."""

from __future__ import annotations

import asyncio
from datetime import datetime
from decimal import Decimal
from typing import Any, assert_type
from uuid import UUID

from pydantic import BaseModel

from agentflow import (
    Context,
    Decision,
    HumanTask,
    Plan,
    Reply,
    Retry,
    Run,
    StepRecord,
    configure,
    current_step,
    generate_content,
    human_task,
    load_prompt,
    parallel,
    runs,
    step,
    tasks,
    tool,
    workflow,
)
from agentflow.models import Usage


class Order(BaseModel):
    id: str
    total: int


class Analysis(BaseModel):
    needs_review: bool


def validate(order: Order) -> Order:
    return order


async def charge(order: Order, currency: str = "EUR") -> int:
    return order.total


class Shop:
    def price(self, order: Order) -> Decimal:
        return Decimal(order.total)

    async def ship(self, order: Order) -> bool:
        return True


@step
async def decorated(order: Order, times: int = 1) -> str:
    return order.id * times


@step
def decorated_plain(order: Order) -> int:
    return order.total


@step("named", retry=Retry(max_attempts=3), timeout="30s")
async def named(order: Order) -> list[str]:
    return [order.id]


@step("named-plain", idempotency_key="k")
def named_plain(order: Order) -> dict[str, int]:
    return {order.id: order.total}


async def steps(ctx: Context, order: Order, shop: Shop) -> None:
    assert_type(await step("validate", validate, order), Order)
    assert_type(await step("charge", charge, order), int)
    assert_type(await step("lambda", lambda: order.total), int)
    assert_type(await step("lambda-async", lambda: charge(order)), int)
    assert_type(await step("method", shop.price, order), Decimal)
    assert_type(await step("async-method", shop.ship, order), bool)
    assert_type(
        await step("options", charge, order, retry={"max_attempts": 3}, timeout=30, in_doubt="ask", on_change="error"),
        int,
    )
    assert_type(await step("undone", charge, order, compensate=lambda paid: None), int)
    assert_type(await step("ask", lambda: generate_content("x", output_type=Analysis)), Analysis)
    assert_type(await step("ask-text", lambda: generate_content("x")), str)
    assert_type(await step("review", lambda: human_task(data=order, schema=Analysis)), Analysis)
    assert_type(await step("outer", lambda: decorated(order)), str)
    assert_type(await step("outer-plain", lambda: step("inner", validate, order)), Order)

    assert_type(await decorated(order, times=2), str)
    assert_type(await decorated_plain(order), int)
    assert_type(await named(order), list[str])
    assert_type(await named_plain(order), dict[str, int])
    assert_type(await decorated.options(idempotency_key=order.id)(order), str)
    assert_type(decorated.name, str)
    assert_type(current_step().idempotency_key, str)
    assert_type(current_step().attempt, int)

    await decorated("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await step("s", validate, order, retrys=3)  # type: ignore[call-overload]  # pyright: ignore
    await step("s", validate, order, on_change="always")  # type: ignore[call-overload]  # pyright: ignore


async def context(ctx: Context) -> None:
    assert_type(ctx.now(), datetime)
    assert_type(ctx.uuid4("order"), UUID)
    assert_type(ctx.random(), float)
    assert_type(ctx.run_id, str)
    record = ctx.steps["charge"]
    assert_type(record, StepRecord)
    assert_type(record.started_at, datetime | None)
    assert_type(record.duration, float | None)
    assert_type(record.attempts, int)
    assert_type(record.cost, Decimal | None)
    assert_type(ctx.steps.all("charge"), list[StepRecord])
    await ctx.sleep("30d")


async def model(data: Order) -> None:
    assert_type(await generate_content("Hello"), str)
    assert_type(await generate_content("Hello", data=data, model="openai:gpt-4o-mini"), str)
    assert_type(await generate_content("Hello", output_type=Analysis), Analysis)
    assert_type(await generate_content("Hello", output_type=list[str]), list[str])
    assert_type(await generate_content(load_prompt("triage", order=data), output_type=int), int)
    reply = await generate_content("Hello", output_type=Reply[Analysis])
    assert_type(reply, Reply[Analysis])
    assert_type(reply.output, Analysis)
    assert_type(reply.text, str)
    assert_type(reply.cost, Decimal | None)
    assert_type(reply.usage, Usage)
    assert_type(await generate_content([*reply.messages, {"role": "user", "content": "And?"}]), str)


async def people(data: Order) -> None:
    decision = await human_task(type="approve", assign_to="manager", data=data, timeout="2d")
    assert_type(decision, Decision)
    assert_type(decision.approved, bool)
    assert_type(decision.by, str | None)
    assert_type(await human_task(data=data, schema=Analysis), Analysis)
    assert_type(await human_task("input", ["Ann", "Bob"], schema=list[str]), list[str])
    assert_type(tasks.list(), list[HumanTask])
    assert_type(tasks.approve("t-1", by="Ann"), HumanTask)
    assert_type(tasks.answer("t-1", {"a": 1}), HumanTask)


@workflow
async def bare(ctx: Context, order: Order) -> str:
    return order.id


@workflow("weekly", schedule="0 9 * * MON", timezone="Europe/Berlin", catch_up="all")
async def weekly(ctx: Context, when: datetime) -> str:
    return when.isoformat()


@workflow("process-order", on_change="auto", run_id=lambda order: str(order.id))
async def process_order(ctx: Context, order: Order, *, urgent: bool = False) -> list[int]:
    return [await step("charge", charge, order)]


async def execute(ctx: Context, topic: str) -> Analysis:
    return Analysis(needs_review=bool(topic))


by_name = workflow(name="by-name", execute=execute)


async def running(order: Order) -> None:
    assert_type(await bare.run(order), str)
    assert_type(await process_order.run(order, urgent=True), list[int])
    assert_type(await by_name.run("rivers"), Analysis)
    assert_type(process_order.run_sync(order), list[int])
    assert_type(await process_order.options(run_id="o-1", wait=True).run(order), list[int])
    assert_type(await process_order.plan(order), Plan)
    run = await process_order.start(order)
    assert_type(run, Run)
    assert_type(run.status, str)
    assert_type(run.cost, Decimal)
    assert_type(run.steps, list[StepRecord])
    assert_type(process_order.runs(), list[Run])
    assert_type(runs.get("process-order-3f9a"), Run)
    assert_type(runs.list(status="waiting"), list[Run])

    await process_order.run("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await process_order.run(order, color="red")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def fan_out(orders: list[Order]) -> None:
    first, second = await asyncio.gather(step("a", charge, orders[0]), generate_content("x", output_type=Analysis))
    assert_type(first, int)
    assert_type(second, Analysis)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(step("a", charge, orders[0]))
        other = group.create_task(decorated(orders[0]))
    assert_type(task.result(), int)
    assert_type(other.result(), str)
    assert_type(await asyncio.wait_for(step("a", validate, orders[0]), 5), Order)
    results: list[Any] = await parallel([step("charge", charge, order) for order in orders])
    named_results: dict[str, Any] = await parallel({order.id: step("c", charge, order) for order in orders})
    mapped: list[Any] = await parallel.map(charge, orders, concurrency=5, key=lambda order: order.id)
    assert results and named_results and mapped


def settings() -> None:
    configure(path=".agentflow", model="openai:gpt-4o-mini", notify=print, quiet=True)


@tool
def plain_tool(city: str) -> int:
    return len(city)


@tool(approval="manager", description="Pay.")
async def approved_tool(amount: int) -> str:
    return str(amount)


async def agents() -> None:
    assert_type(plain_tool("Oslo"), int)
    assert_type(await approved_tool(3), str)
    assert_type(await generate_content("x", tools=[plain_tool, approved_tool, charge], max_turns=3), str)
    plain_tool(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
