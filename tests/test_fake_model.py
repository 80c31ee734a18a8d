"""``FakeModel``: who gets which reply, and what a test is told when replies and calls do not meet."""

from __future__ import annotations

import asyncio
import itertools
import re
from decimal import Decimal
from typing import Any

import pydantic
import pytest

from agentflow import generate_content, parallel, sync, workflow
from agentflow.errors import ContentFiltered, ModelError, Refused, Truncated, UsageError
from agentflow.providers.common import transport
from agentflow.testing import FakeModel, ToolCall, reply_body, when

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
each_model = pytest.mark.parametrize("model", MODELS)


class City(pydantic.BaseModel):
    name: str
    people: int


def ask(prompt: str, model: str = MODELS[0], **options: Any) -> Any:
    return asyncio.run(_ask(prompt, model, options))


async def _ask(prompt: str, model: str, options: dict[str, Any]) -> Any:
    return await generate_content(prompt, model=model, **options)


@each_model
def test_a_fan_out_gets_its_replies_by_condition_whatever_the_order(model: str) -> None:
    @workflow
    async def tour(ctx: Any, cities: list[str]) -> list[str]:
        async def about(city: str) -> str:
            await asyncio.sleep(0.001 * len(city))
            return await generate_content(f"Where is {city}?", model=model)

        return await parallel.map(about, cities)

    replies = [
        when("Rome", "Lazio"),
        when(re.compile(r"is Par[a-z]+"), "Seine"),
        when(lambda request: "Ur" in request["text"], "Sumer"),
        "anywhere",
    ]
    with FakeModel(replies) as fake:
        assert tour.run_sync(["Berlin", "Paris", "Ur", "Rome"]) == ["anywhere", "Seine", "Sumer", "Lazio"]
    assert len(fake.calls) == 4


def test_a_dict_answers_all_requests_that_hold_its_text() -> None:
    with FakeModel({"Rome": "Lazio", "Paris": City(name="Paris", people=2)}) as fake:
        assert [ask("Rome?"), ask("Again: Rome?")] == ["Lazio", "Lazio"]
        assert ask("Paris?", output_type=City) == City(name="Paris", people=2)
    assert len(fake.calls) == 3


def test_a_condition_holds_for_one_request_unless_it_says_for_how_many() -> None:
    with FakeModel([when("Rome", "first"), when("Rome", "then", times=2), "other"]):
        assert [ask(f"Rome {n}?") for n in range(4)] == ["first", "then", "then", "other"]


@each_model
def test_an_unexpected_call_shows_its_whole_request_without_its_secrets(model: str) -> None:
    key = "sk-proj-abcdefghij0123456789XYZ"
    with pytest.raises(AssertionError) as caught, FakeModel([when("Rome", "Lazio", times=None), when("Rome", 1)], all_used=False):
        ask("Rome?", model=model)
        with pytest.raises(ModelError, match="unexpected call 2"):
            ask(f"Paris? {key}", model=model, system="Be brief.")
    text = str(caught.value)
    assert "unexpected call 2, only 2 replies" in text and "Be brief." in text and '"Paris? [redacted:openai-key]"' in text
    assert key not in text


def test_a_reply_that_nobody_asked_for_fails_the_test_and_is_named() -> None:
    with pytest.raises(AssertionError) as caught, FakeModel(["Lazio", "Seine", when("Ur", "Sumer"), when("R", "x", times=2)]):
        ask("Where is Rome?")
    text = str(caught.value)
    assert "4 of its replies were not asked for, 1 calls came" in text
    assert "not used: 'Lazio'" in text and "not used: 'Seine'" in text and "not used: when('Ur', 'Sumer')" in text
    assert "not used: when('R', 'x') (1 of 2 times used)" in text and "asked: 'Where is Rome?'" in text


def test_replies_may_be_left_over_where_a_test_says_so_and_where_it_fails_anyway() -> None:
    with FakeModel(["Lazio", "bought again"], all_used=False) as fake:
        ask("Where is Rome?")
    assert fake.remaining == 1
    with pytest.raises(ZeroDivisionError), FakeModel(["Lazio"]):
        raise ZeroDivisionError


@each_model
def test_calls_say_what_was_asked_and_answered_and_what_was_billed(model: str) -> None:
    def run(reply: Any, **options: Any) -> Any:
        try:
            return ask("Where is Rome?", model=model, **options)
        except ModelError as error:
            return type(error).__name__

    script = ["Lazio", Truncated("Laz"), Refused("no"), ContentFiltered(""), 400]
    with FakeModel(script) as fake:
        outcomes = [run(each) for each in script]
    assert outcomes == ["Lazio", "Truncated", "Refused", "Refused" if "claude" in model else "ContentFiltered", "ModelError"]
    assert [call["status"] for call in fake.calls] == [200, 200, 200, 200, 400]
    assert "Lazio" in str(fake.calls[0]["reply"]) and fake.calls[0]["body"]["model"] == model.partition(":")[2]
    assert len(fake.billed) == 4
    first = fake.billed[0]
    assert first.request is fake.calls[0] and first.usage.input_tokens > 0 and first.usage.output_tokens > 0
    assert isinstance(first.cost, Decimal) and first.cost > 0



class Town(pydantic.BaseModel):
    name: str


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_reply_comes_to_the_caller_as_a_providers_would(model: str) -> None:
    def ask(reply: Any, **options: Any) -> Any:
        with FakeModel(reply if isinstance(reply, list) else [reply]):
            return sync.generate_content(f"Hi {next(numbers)}", model=model, **options)

    numbers = itertools.count()

    async def later(request: Any) -> str:
        return f"later: {request['text'][:2]}"

    def double(n: int) -> int:
        """Twice a number."""
        return 2 * n

    once = {"max_attempts": 1}
    assert ask("text") == "text"
    assert ask(Town(name="Rome"), output_type=Town) == ask({"name": "Rome"}, output_type=Town) == Town(name="Rome")
    assert ask([[1, 2]], output_type=list[int]) == [1, 2]
    assert ask([ToolCall("double", n=4), "It is 8."], tools=[double]) == "It is 8."
    assert ask([["Let me see.", ToolCall("double", n=4)], "8"], tools=[double]) == "8"
    assert ask(lambda request: reply_body(request, "raw")) == "raw"
    assert ask(later) == "later: Hi"
    for reply, error in ((Refused("no"), Refused), (Truncated("so f"), Truncated), (ContentFiltered("so"), (ContentFiltered, Refused))):
        with pytest.raises(error) as caught:
            ask(reply)
        assert caught.value.reply.usage.output_tokens > 0
    for reply, status in ((429, 429), (ModelError("no money", status=402, code="insufficient_quota"), 402), (ConnectionError("gone"), None), (TimeoutError(), None)):
        with pytest.raises(ModelError) as failed:
            ask(reply, retry=once)
        assert failed.value.status == status


def test_wrong_scripts_are_refused_at_once() -> None:
    for wrong in ("text", b"bytes", 3, None):
        with pytest.raises(UsageError, match="list of replies"):
            FakeModel(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a text, a regular expression or a function"):
        when(3, "x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="times=0"):
        when("x", "y", times=0)


def test_it_can_be_started_and_stopped_in_cells_any_number_of_times() -> None:
    model = FakeModel({"Hi": "Hello!"})
    model.stop()  # of one that was not started means nothing
    for _ in range(3):
        assert model.start() is model
    assert sync.generate_content("Hi", model="openai:gpt-5-mini") == "Hello!"
    model.stop()
    model.stop()
    assert transport() is None and len(model.calls) == 1
