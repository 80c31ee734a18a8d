"""Journals of this and earlier versions, kept as files: they replay with today's code, or are refused plainly.

A new file is made by ``python -m tests.test_histories NAME``, when a version changes what is recorded.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pydantic
import pytest

from agentflow import (
    Context,
    Reply,
    Retry,
    current_step,
    embed,
    generate_content,
    human_task,
    parallel,
    step,
    tasks,
    tool,
    workflow,
)
from agentflow.errors import UsageError, Waiting
from agentflow.testing import FakeClock, FakeModel, FakePeople, ToolCall, event, export_history, replay_histories, when

FOLDER = Path(__file__).parent / "histories"
RUNS = {"agentflow-0.1.0.jsonl": 2, "agentflow-0.1.0.more.jsonl": 4}


class Item(pydantic.BaseModel):
    name: str
    price: Decimal


class Order(pydantic.BaseModel):
    id: int
    items: list[Item]


@step("charge", idempotency_key="order-7")
async def charge(order: Order) -> Decimal:
    return sum((item.price for item in order.items), Decimal(0))


def fetch(page: int) -> dict[str, Any]:
    if current_step().attempt == 1 and page == 1:
        raise ConnectionError("first attempt")
    return {"page": page, "at": datetime(2026, 1, 2, 3, 4, 5), "raw": b"\x00\xff", "pair": (1, {2, 3})}


async def compose(topic: str) -> str:
    outline = await generate_content(f"Outline {topic}", model="anthropic:claude-haiku-4-5")
    return await generate_content(f"Write {topic} by {outline}", model="openai-chat:gpt-4o-mini")


@workflow("history-of-everything")
async def everything(ctx: Context, order: Order) -> dict[str, Any]:
    begun = ctx.now("begun")
    pages = await parallel.map(
        lambda page: step("fetch", fetch, page, retry=Retry(max_attempts=2, initial_delay=0.001)), range(3)
    )
    paid = await charge(order)
    reply = await generate_content("Name it.", data=order, model="openai:gpt-5-mini", output_type=Reply)
    town = await generate_content("Which item?", model="openai:gpt-5-mini", output_type=Item)
    text = await step("compose", compose, "tea")
    decision = await human_task("approve", assign_to="manager", data={"paid": paid})
    return {
        "begun": begun, "pages": pages, "paid": paid, "reply": reply.text, "tokens": reply.usage.input_tokens,
        "town": town, "text": text, "by": decision.by, "id": ctx.uuid4("id"), "luck": ctx.random("luck"),
    }  # fmt: skip


@workflow("history-that-waits")
async def waits(ctx: Context, n: int) -> int:
    await step("before", lambda: n)
    return await human_task("count", data=n, schema=int)


@workflow("history-part")
async def part(ctx: Context, town: str) -> str:
    return await generate_content(f"A word for {town}?", model="anthropic:claude-haiku-4-5")


@tool
def people_in(town: str) -> int:
    """How many people live there."""
    return len(town) * 1000


def pay(town: str) -> dict[str, Any]:
    return {"town": town, "amount": Decimal("12.50")}


def land(town: str) -> str:
    if os.environ.get("AGENTFLOW_HISTORY_STORM"):
        raise ConnectionError("storm")
    return f"landed in {town}"


@workflow("history-of-more")
async def more(ctx: Context, town: str) -> dict[str, Any]:
    begun = ctx.now("begun")
    paid = await step("pay", pay, town, compensate=lambda paid: f"given back {paid['amount']}")
    people = await generate_content("How many live there?", data=town, model="openai:gpt-5-mini", tools=[people_in])
    vectors = await embed([town, "sea"], model="openai:text-embedding-3-small")
    words = await parallel([part.run(town), step("look", lambda: [town, None])])
    form = await human_task("fill", assign_to="clerk", data={"town": town}, schema=Item, timeout="2d")
    came = await ctx.wait_for_event(["ship", "plane"], match={"town": town}, timeout="9d", default=None)
    late = await ctx.wait_for_event("late", timeout="1d", default="never")
    await ctx.sleep("30d")
    landed = await step("land", land, town)
    return {
        "paid": paid, "people": people, "vectors": vectors, "words": words, "form": form, "came": came, "late": late,
        "landed": landed, "days": (ctx.now("end") - begun).days,
    }  # fmt: skip


def make_more() -> None:
    """A run that fails, gives back what it paid, and completes when it is run again."""
    replies = [
        when("How many", ToolCall("people_in", town="Rome")), when("How many", "4,000"), when("A word", "Old"),
    ]  # fmt: skip
    people = FakePeople(
        {"clerk": Item(name="boat", price=Decimal("3"))}, events=[event("plane", {"town": "Rome"}, after="3d")], by="grace"
    )
    with FakeClock(), FakeModel(replies), people:
        os.environ["AGENTFLOW_HISTORY_STORM"] = "1"
        try:
            people.run(more, "Rome")
        except ConnectionError:
            del os.environ["AGENTFLOW_HISTORY_STORM"]
        found = people.run(more.options(rerun=["land"]), "Rome")
    assert (found["landed"], found["days"], found["late"]) == ("landed in Rome", 34, "never")


def make() -> None:
    """The runs of a history, in the project's journal."""
    make_more()
    order = Order(id=7, items=[Item(name="tea", price=Decimal("3.20")), Item(name="cup", price=Decimal("12"))])
    replies = {
        "Name it": "Tea and a cup", "Which item": Item(name="tea", price=Decimal("3.20")),
        "Outline": "outline", "Write": "text",
    }  # fmt: skip
    with FakeModel(replies):
        try:
            everything.run_sync(order)
        except Waiting:
            tasks.approve(tasks.list()[0].id, by="grace")
        everything.run_sync(order)
    try:
        waits.run_sync(3)
    except Waiting:
        pass


def test_all_histories_of_this_project_replay_or_are_refused() -> None:
    found = replay_histories(FOLDER)
    assert {history.file.name: len(history.replayed) for history in found if history.refused is None} == RUNS


def test_the_histories_hold_each_kind_of_record() -> None:
    """A new kind of record gets a history: what is listed here is what the journal's rows begin with."""
    rows = [json.loads(line) for file in FOLDER.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    families = {key.partition("/")[0] for key, _ in rows}
    assert {"s", "r", "m", "h", "e", "l", "k", "ch", "a"} <= families, families
    heads = [json.loads(text.partition("\n")[0]) for key, text in rows if key.startswith("s/") and "!" not in key]
    assert {"ai", "agent", "tool", "human", "event", "sleep", "value", "step", "compensation"} <= {head["kind"] for head in heads}, {head["kind"] for head in heads}
    assert any(key.endswith("!void") for key, _ in rows), "something was undone"


def test_a_history_made_now_replays_and_asks_nobody(tmp_path: Path) -> None:
    make()
    assert export_history(tmp_path / "now.jsonl") > 40
    (found,) = replay_histories(tmp_path)
    assert len(found.replayed) == 4 and found.refused is None
    with pytest.raises(UsageError, match="exists already"):
        export_history(tmp_path / "now.jsonl")


def edited(tmp_path: Path, change: Any) -> Path:
    source = sorted(FOLDER.glob("*.jsonl"))[0]
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "edited.jsonl").write_text("\n".join(json.dumps(line) for line in change(lines)) + "\n")
    return tmp_path


def test_a_history_that_does_not_replay_is_found(tmp_path: Path) -> None:
    def without_steps(lines: list[Any]) -> list[Any]:
        return [line for line in lines if not (isinstance(line, list) and line[0].startswith("s/") and '"name":"before"' in line[1])]

    with pytest.raises(AssertionError, match="'history-that-waits' is not replayed: it ran before again"):
        replay_histories(edited(tmp_path, without_steps))

    def without_replies(lines: list[Any]) -> list[Any]:
        return [line for line in lines if not (isinstance(line, list) and line[0].startswith(("s/", "m/")))]

    with pytest.raises(AssertionError, match="is not replayed"):
        replay_histories(edited(tmp_path, without_replies))

    def another_result(lines: list[Any]) -> list[Any]:
        return [[key, value.replace("Tea and a cup", "Coffee")] if (key := line[0] if isinstance(line, list) else "").startswith("r/") and (value := line[1]) else line for line in lines]

    with pytest.raises(AssertionError, match="is not replayed: it is .*Tea and a cup.* and was .*Coffee"):
        replay_histories(edited(tmp_path, another_result))


@pytest.mark.parametrize("what", ["layout", "digest"])
def test_an_unknown_version_is_refused_plainly(tmp_path: Path, what: str) -> None:
    (found,) = replay_histories(edited(tmp_path, lambda lines: [{**lines[0], what: 99}, *lines[1:]]))
    assert found.replayed == [] and f"{what} version 99" in str(found.refused)


def test_wrong_calls_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no histories"):
        replay_histories(tmp_path)
    with pytest.raises(UsageError, match="not defined here"):
        replay_histories(FOLDER, workflows={})
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="is no history"):
        replay_histories(tmp_path)


if __name__ == "__main__":
    import agentflow
    from tests import test_histories  # as the suite imports it, so that types have the names they have there

    agentflow.configure(path=FOLDER / ".making", quiet=True)
    test_histories.make()
    export_history(FOLDER / f"{sys.argv[1]}.jsonl")
