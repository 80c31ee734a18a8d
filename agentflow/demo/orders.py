"""The order workflow of `agentflow demo`, written as you would write your own.

A step is done once and its result is kept; a model's answer is paid once; a person is waited for without
a process that waits. Everything between the steps is plain Python and runs again on every resume.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import BaseModel

from agentflow import Context, Retry, current_step, generate_content, human_task, load_prompt, step, workflow
from agentflow.demo import shop


class Item(BaseModel):
    name: str
    quantity: int
    price: Decimal


class Order(BaseModel):
    id: str
    customer: str
    note: str
    items: list[Item]


class Assessment(BaseModel):
    risk: Literal["low", "high"]
    reason: str


class Rejected(Exception):
    """The manager said no."""


def validate(order: Order) -> Decimal:
    """The total in dollars."""
    if not order.items or any(item.quantity < 1 for item in order.items):
        raise ValueError(f"order {order.id} has nothing to ship")
    return sum((item.quantity * item.price for item in order.items), Decimal(0))


def charge(order_id: str, total: Decimal) -> str:
    return shop.charge(order_id, total, key=current_step().idempotency_key)


def refund(payment: str) -> None:
    shop.refund(payment)


def ship(order_id: str) -> str:
    return shop.ship(order_id, key=current_step().idempotency_key)


@workflow("process-order", run_id=lambda order: order.id)
async def process_order(ctx: Context, order: Order) -> str:
    total = await step("validate", validate, order)

    await step(
        "charge", charge, order.id, total,
        idempotency_key=f"charge-{order.id}",
        retry=Retry(max_attempts=3, initial_delay=0.1),
        compensate=refund,  # done if anything below fails
    )  # fmt: skip

    assessment = await generate_content(load_prompt("assess-order", order=order), output_type=Assessment)

    if total > 500 or assessment.risk == "high":
        decision = await human_task(
            "approve", assign_to="manager", title=f"Ship {order.id}?",
            data={"customer": order.customer, "total": total, "risk": assessment.reason},
        )  # fmt: skip
        if not decision.approved:
            raise Rejected(f"{order.id}: {decision.comment}")

    return await step("ship", ship, order.id)
