"""An approval of a tool's call may have a title and a deadline, as a question of ``human_task`` may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentflow import (
    Context,
    Escalate,
    HumanTaskExpired,
    UsageError,
    Waiting,
    Workflow,
    generate_content,
    tasks,
    tool,
    workflow,
)
from agentflow.settings import settings
from agentflow.testing import FakeClock
from tests.loopback import Loopback

MODEL = "openai:gpt-4o-mini"


@pytest.fixture
def clock() -> FakeClock:
    settings.clock = FakeClock()
    return settings.clock


@pytest.fixture
def server(loopback: Callable[..., Loopback]) -> Loopback:
    return loopback(turns=[[["pay", {"amount": 5}]], "done"])


def flow(paid: list[int], **options: Any) -> Workflow:
    @tool(approval="manager", title="Pay a bill", timeout="2h", **options)
    def pay(amount: int) -> str:
        paid.append(amount)
        return "paid"

    @workflow("bills")
    async def bills(ctx: Context) -> str:
        return str(await generate_content("Pay", model=MODEL, tools=[pay]))

    return bills


def told(server: Loopback) -> str:
    return str(server.bodies[-1]["input"][-1]["output"])


@pytest.mark.parametrize(("on_timeout", "says", "made"), [(False, "not approved in time", []), (True, "paid", [5])])
async def test_nobody_decided_in_time(
    server: Loopback, clock: FakeClock, again: Callable[[], None], on_timeout: bool, says: str, made: list[int]
) -> None:
    paid: list[int] = []
    bills = flow(paid, on_timeout=on_timeout)
    with pytest.raises(Waiting):
        await bills.run()
    (task,) = tasks.list()
    assert (task.title, task.assign_to) == ("Pay a bill", "manager")
    clock.advance("1h")
    again()
    with pytest.raises(Waiting):  # a restart does not extend the deadline
        await bills.run()
    clock.advance("61m")
    again()
    assert await bills.run() == "done"
    assert says in told(server) and paid == made and len(server.arrived) == 2
    again()
    assert await bills.run() == "done" and paid == made and len(server.arrived) == 2


async def test_without_a_word_for_it_a_deadline_is_an_error_and_calls_nothing(server: Loopback, clock: FakeClock) -> None:
    paid: list[int] = []
    bills = flow(paid)
    with pytest.raises(Waiting):
        await bills.run()
    clock.advance("3h")
    with pytest.raises(HumanTaskExpired):
        await bills.run()
    assert paid == [] and len(server.arrived) == 1


async def test_somebody_else_is_asked_when_the_first_did_not_answer(server: Loopback, clock: FakeClock) -> None:
    paid: list[int] = []
    bills = flow(paid, on_timeout=Escalate("director", timeout="1d", on_timeout=False))
    with pytest.raises(Waiting):
        await bills.run()
    clock.advance("3h")
    with pytest.raises(Waiting):
        await bills.run()
    (task,) = tasks.list()
    assert task.assign_to == "director"
    tasks.approve(task.id, by="director")
    assert await bills.run() == "done" and paid == [5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout": "1h"}, "approval="),
        ({"title": "Pay"}, "approval="),
        ({"approval": True, "on_timeout": False}, "needs a timeout="),
        ({"approval": True, "timeout": "1h", "on_timeout": "no"}, "on_timeout='no'"),
        ({"approval": True, "timeout": "soon"}, "timeout"),
        ({"approval": True, "title": " "}, "title"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_written(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tool(**options)
