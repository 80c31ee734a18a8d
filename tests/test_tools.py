"""Tools: typed functions that a model calls, each turn and each call a record of its own."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

import agentflow
from agentflow import (
    Context,
    ModelError,
    Reply,
    Retry,
    StepChanged,
    TooManyTurns,
    Truncated,
    UsageError,
    Waiting,
    configure,
    current_step,
    generate_content,
    human_task,
    providers,
    runs,
    step,
    sync,
    tasks,
    tool,
    workflow,
)
from agentflow.generate import prepare
from agentflow.testing import FakeModel, ToolCall

MODELS = ["openai:gpt-5-mini", "openai-chat:gpt-5-mini", "anthropic:claude-haiku-4-5"]
OPENAI = MODELS[0]
ran: list[Any] = []


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    ran.clear()


def weather(city: str, days: int = 1) -> dict[str, Any]:
    """Tell the weather.

    Args:
        city: a town's name
        days: how many days ahead
    """
    ran.append(("weather", city, days))
    return {"city": city, "degrees": 5}


async def double(n: int) -> int:
    """Double a number."""
    ran.append(("double", n))
    return 2 * n


def records(run_id: str | None = None) -> list[tuple[str, str, str]]:
    run = runs.get(run_id) if run_id else runs.list()[0]
    return [(record.name, record.kind, record.status) for record in run.steps]


def told(body: dict[str, Any]) -> list[str]:
    """What the tools' results in a request say, in any of the three forms."""
    found = []
    for item in body.get("input") or body["messages"]:
        if item.get("type") == "function_call_output":
            found.append(item["output"])
        elif item.get("role") == "tool":
            found.append(item["content"])
        elif item.get("role") == "user" and isinstance(item["content"], list):
            found += [part["content"] for part in item["content"] if part["type"] == "tool_result"]
    return found


def describe(model: str, *tools: Any) -> list[dict[str, Any]]:
    body = prepare("Hi", model=model, tools=list(tools)).request["body"]
    made: list[dict[str, Any]] = body["tools"]
    return made


# -- what the model is told of a tool


def test_a_typed_function_becomes_a_tool_by_its_annotations_and_docstring() -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "a town's name"},
            "days": {"type": "integer", "description": "how many days ahead", "default": 1},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    text = "Tell the weather."
    assert describe(MODELS[0], weather) == [
        {"type": "function", "name": "weather", "description": text, "parameters": schema, "strict": False}
    ]
    assert describe(MODELS[1], weather) == [
        {"type": "function", "function": {"name": "weather", "description": text, "parameters": schema}}
    ]
    assert describe(MODELS[2], weather) == [{"name": "weather", "description": text, "input_schema": schema}]
    (strict,) = describe(OPENAI, double)
    assert strict["strict"] is True and strict["parameters"]["required"] == ["n"]


class Guest(BaseModel):
    name: str
    age: int = 30


def test_types_of_all_kinds_are_parameters_and_arrive_as_such() -> None:
    @tool(name="book-table", description="Book it.")
    def book(
        guests: list[Guest], day: Literal["today", "tomorrow"], *, note: Annotated[str, Field(description="why")] = ""
    ) -> str:
        ran.append((guests, day, note))
        return "booked"

    (made,) = describe(MODELS[2], book)
    assert made["name"] == "book-table" and made["description"] == "Book it."
    assert made["input_schema"]["properties"]["note"] == {"type": "string", "description": "why", "default": ""}
    assert made["input_schema"]["required"] == ["guests", "day"]
    call = ToolCall("book-table", guests=[{"name": "Ada"}], day="today")
    with FakeModel([call, "done"]):
        asyncio.run(_ask(book))
    assert ran == [([Guest(name="Ada", age=30)], "today", "")]
    assert book([], "today") == "booked"


async def _ask(*tools: Any, prompt: str = "Go", **options: Any) -> Any:
    return await generate_content(prompt, tools=list(tools), model=options.pop("model", OPENAI), **options)


@pytest.mark.parametrize(
    "text",
    ["Find it.\n\n:param city: a town", "Find it.\n\nParameters\n----------\ncity : str\n    a town\n"],
    ids=["rest", "numpy"],
)
def test_other_docstring_styles_describe_parameters_too(text: str) -> None:
    def find(city: str) -> str:
        return city

    find.__doc__ = text
    (made,) = describe(MODELS[2], find)
    assert made["description"] == "Find it."
    assert made["input_schema"]["properties"]["city"]["description"] == "a town"


class _Shop:
    def __init__(self, name: str) -> None:
        self.name = name

    def stock(self, item: str) -> str:
        """What is there."""
        ran.append((self.name, item))
        return f"{self.name} has {item}"

    @tool(name="price_of")
    def price(self, item: str) -> str:
        ran.append((self.name, "price", item))
        return "3"


def test_methods_and_partials_are_tools() -> None:
    shop = _Shop("north")
    near = tool(name="near", description="Near.")(functools.partial(weather, days=2))
    calls = [ToolCall("stock", item="tea"), ToolCall("price_of", item="tea"), ToolCall("near", city="Oslo")]
    with FakeModel([calls, "done"]) as model:
        assert asyncio.run(_ask(shop.stock, shop.price, near)) == "done"
    assert sorted(map(str, ran)) == sorted(map(str, [("north", "tea"), ("north", "price", "tea"), ("weather", "Oslo", 2)]))
    assert told(model.calls[1]["body"])[0] == "north has tea"


class _NotCallable:
    pass


def _spread(*names: str) -> None: ...
def _kinds(**names: str) -> None: ...
def _nameless(a: str, /) -> None: ...
def _untyped(a) -> None: ...  # type: ignore[no-untyped-def]
def _opaque(a: _NotCallable) -> None: ...
def _items() -> Any:
    yield 1


@step("secret", secret=True)
async def _secret(a: str) -> str:
    return a


def weather_again(city: str) -> None: ...


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([lambda: 1], "has no name and no types"),
        ([_spread], "parameter 'names' takes any number"),
        ([_kinds], "parameter 'names' takes any number"),
        ([_nameless], "parameter 'a' is positional only"),
        ([_untyped], "parameter 'a' has no type"),
        ([_opaque], "has no JSON schema"),
        ([_items], "is a generator"),
        ([Guest], "is a class"),
        ([_secret], "secret=True"),
        ([3], "is no function"),
        ([generate_content], "is a model call"),
        ([weather, tool(name="weather")(weather_again)], "two of them are called 'weather'"),
        ([functools.partial(weather, days=2)], "has no name"),
        ([step("a step")(weather_again), tool(name="weather_again")(weather)], "two of them"),
        ({"weather": weather}, "a list of typed functions"),
        ("weather", "a list of typed functions"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_before_anything_is_sent(tools: Any, says: str) -> None:
    with FakeModel([]) as model:
        with pytest.raises(UsageError, match=says):
            generate_content("Go", tools=tools, model=OPENAI)
    assert model.calls == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "a b"}, "name='a b'"),
        ({"description": " "}, "description="),
        ({"approval": ""}, "approval="),
        ({"approval": []}, "approval="),
        ({"approval": False}, "approval=False"),
    ],
)
def test_wrong_options_of_a_tool_are_refused(options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tool(**options)
    with pytest.raises(UsageError, match="write @tool"):
        tool("look_up")  # type: ignore[call-overload]


def test_a_decorated_tool_stays_the_function_it_was() -> None:
    plain, named = tool(weather), tool(approval="manager")(double)
    assert plain("Oslo") == {"city": "Oslo", "degrees": 5}
    assert asyncio.run(named(4)) == 8  # type: ignore[arg-type]
    assert plain.__name__ == "weather" and plain.__doc__ == weather.__doc__
    assert sync.tool is agentflow.tool


def test_a_tool_that_was_edited_in_place_is_described_anew() -> None:
    def find(city: str, days: int = 1) -> str:
        """Find it."""
        return city

    (before,) = describe(MODELS[2], find)
    assert describe(MODELS[2], find) == [before]
    find.__doc__ = "Find it soon."
    find.__defaults__ = (2,)
    find.__annotations__["city"] = list[str]
    (after,) = describe(MODELS[2], find)
    assert after["description"] == "Find it soon."
    assert after["input_schema"]["properties"]["days"]["default"] == 2
    assert after["input_schema"]["properties"]["city"]["type"] == "array"


# -- the loop


@pytest.mark.parametrize("model", MODELS)
async def test_the_model_is_asked_again_with_the_results_until_it_answers(model: str, again: Callable[[], None]) -> None:
    @workflow("loop")
    async def flow(ctx: Context) -> Reply[str]:
        return await _ask(weather, double, model=model, output_type=Reply, prompt="How warm?")

    first = ["Let me look.", ToolCall("weather", city="Oslo"), ToolCall("double", n=4)]
    with FakeModel([first, ToolCall("double", n=5), "5 degrees"]) as fake:
        reply = await flow.run()
        again()
        assert await flow.run() == reply
    assert reply.text == reply.output == "5 degrees" and reply.finish_reason == "stop"
    assert ran.count(("weather", "Oslo", 1)) == ran.count(("double", 4)) == ran.count(("double", 5)) == 1
    assert told(fake.calls[1]["body"]) == ['{"city": "Oslo", "degrees": 5}', "8"]
    assert told(fake.calls[2]["body"]) == ['{"city": "Oslo", "degrees": 5}', "8", "10"]
    assert len(fake.calls) == 3
    steps = runs.list()[0].steps
    assert sorted((one.name, one.kind, one.parent) for one in steps) == sorted([
        ("generate_content", "agent", None),
        ("turn 1", "ai", "generate_content"),
        ("weather", "tool", "generate_content"),
        ("double", "tool", "generate_content"),
        ("turn 2", "ai", "generate_content"),
        ("double", "tool", "generate_content"),
        ("turn 3", "ai", "generate_content"),
    ])
    turns = [one for one in steps if one.kind == "ai"]
    assert reply.cost == sum(one.cost for one in turns) == steps[0].cost == runs.list()[0].cost
    assert reply.usage.input_tokens == sum(one.usage.input_tokens for one in turns) == steps[0].usage.input_tokens


@pytest.mark.parametrize("model", MODELS)
async def test_the_messages_of_the_reply_go_on_with_the_conversation(model: str) -> None:
    with FakeModel([ToolCall("double", n=4), "8", "As I said: 8"]) as fake:
        reply = await _ask(double, model=model, output_type=Reply, system="Be short.")
        more = [*reply.messages, {"role": "user", "content": "Again?"}]
        assert await generate_content(more, tools=[double], model=model) == "As I said: 8"
    assert told(fake.calls[2]["body"]) == ["8"]
    before, after = (json.dumps(call["body"]) for call in fake.calls[1:])
    assert "Be short." in after
    ours, earlier = (call["body"].get("input") or call["body"]["messages"] for call in (fake.calls[2], fake.calls[1]))
    assert ours[: len(earlier)] == earlier and before != after


async def test_calls_of_one_turn_run_at_the_same_time_and_equal_ones_are_two_records(said: Callable[[], str]) -> None:
    met = asyncio.Barrier(3)

    async def meet(name: str) -> str:
        await met.wait()
        ran.append(name)
        return f"{name} {current_step().id}"

    @workflow("parallel")
    async def flow(ctx: Context) -> str:
        return await _ask(meet)

    with FakeModel([[ToolCall("meet", name="a"), ToolCall("meet", name="a"), ToolCall("meet", name="b")], "met"]) as fake:
        assert await flow.run() == "met"
    results = told(fake.calls[1]["body"])
    assert [one[0] for one in results] == ["a", "a", "b"] and len(set(results)) == 3
    assert [name for name, kind, _ in records() if kind == "tool"] == ["meet"] * 3


async def test_sync_functions_run_in_threads_and_the_sync_names_do_the_same(again: Callable[[], None]) -> None:
    @sync.workflow("plain")
    def flow(ctx: Context) -> str:
        return sync.generate_content("Go", tools=[weather, double], model=OPENAI)  # type: ignore[no-any-return]

    first = [ToolCall("weather", city="Oslo"), ToolCall("double", n=4), ToolCall("double", n=4)]
    with FakeModel([first, "done"]) as fake:
        assert await asyncio.to_thread(flow.run) == "done"
        again()
        assert await asyncio.to_thread(flow.run) == "done"
    assert told(fake.calls[1]["body"]) == ['{"city": "Oslo", "degrees": 5}', "8", "8"]
    assert len(ran) == 3 and len(fake.calls) == 2


class Answered(BaseModel):
    text: str


def test_a_registered_server_has_tools_too() -> None:
    providers.register("lab", base_url="http://localhost:9/v1", key_env=None, api="chat", structured="json")
    with FakeModel([ToolCall("double", n=4), {"text": "x"}]) as fake:
        assert asyncio.run(_ask(double, model="lab:m", output_type=Answered)) == Answered(text="x")
    assert [call["provider"] for call in fake.calls] == ["lab", "lab"] and told(fake.calls[1]["body"]) == ["8"]
    assert fake.calls[0]["body"]["response_format"] == {"type": "json_object"} and fake.calls[0]["body"]["tools"]


def test_servers_that_give_every_call_the_same_id_do_not_mix_calls_up(again: Callable[[], None]) -> None:
    def fake() -> FakeModel:
        calls = [ToolCall("double", n=1, call_id="call"), ToolCall("double", n=2, call_id="call")]
        return FakeModel([calls, ToolCall("double", n=1, call_id="call"), "done"])

    with fake() as model:
        assert asyncio.run(_ask(double, model=MODELS[1])) == "done"
    assert told(model.calls[2]["body"]) == ["2", "4", "2"]
    assert ran.count(("double", 1)) == 2


async def test_on_text_hears_every_turn_and_a_replay_hands_it_over_at_once(again: Callable[[], None]) -> None:
    heard: list[str] = []

    @workflow("heard")
    async def flow(ctx: Context) -> str:
        return await _ask(double, on_text=heard.append)

    with FakeModel([["Let me see. ", ToolCall("double", n=4)], "It is 8."]) as fake:
        assert await flow.run() == "It is 8."
        assert "".join(heard) == "Let me see. It is 8." and len(heard) > 2
        heard.clear()
        again()
        assert await flow.run() == "It is 8."
    assert heard == ["Let me see. ", "It is 8."] and len(fake.calls) == 2


class Answer(BaseModel):
    degrees: int


@pytest.mark.parametrize("model", MODELS)
async def test_the_final_answer_has_the_type_that_was_asked_for(model: str) -> None:
    @workflow("typed")
    async def flow(ctx: Context) -> Answer:
        return await _ask(weather, model=model, output_type=Answer)

    call = ToolCall("weather", city="Oslo")
    with FakeModel([call, "warm", ["Once more.", call], {"degrees": 5}]) as fake:
        assert await flow.run() == Answer(degrees=5)
    # The reply that does not validate is asked about within its turn; what then comes may be a call again.
    assert [name for name, kind, _ in records() if kind == "ai"] == ["turn 1", "turn 2", "turn 3"]
    assert "does not have the form" in json.dumps(fake.calls[2]["body"])
    assert "does not have the form" in json.dumps(fake.calls[3]["body"]) and len(told(fake.calls[3]["body"])) == 2


async def test_a_turn_that_is_cut_off_fails_with_what_came() -> None:
    with FakeModel([ToolCall("double", n=4), Truncated("It is")]):
        with pytest.raises(Truncated) as caught:
            await _ask(double)
    assert caught.value.reply.text == "It is" and "function_call_output" in json.dumps(caught.value.reply.messages)


# -- what goes wrong in a tool


async def test_what_a_tool_raises_is_told_to_the_model_without_secrets() -> None:
    def pay(amount: int) -> str:
        ran.append(amount)
        raise ConnectionError("refused for key sk-abcdefghijklmnopqrstuvwxyz123456")

    @workflow("failing")
    async def flow(ctx: Context) -> str:
        return await _ask(pay, model=MODELS[2])

    with FakeModel([ToolCall("pay", amount=3), "no luck"]) as fake:
        assert await flow.run() == "no luck"
        assert await flow.run() == "no luck"
    (text,) = told(fake.calls[1]["body"])
    assert text.startswith("ConnectionError: refused for key") and "abcdefghij" not in text
    assert fake.calls[1]["body"]["messages"][-1]["content"][0]["is_error"] is True
    assert ran == [3] and ("pay", "tool", "failed") in records()


@pytest.mark.parametrize("model", MODELS)
async def test_a_call_that_cannot_be_made_is_told_to_the_model(model: str) -> None:
    calls = [ToolCall("weather", town="Oslo"), ToolCall("double", n="many"), ToolCall("guess", x=1)]
    if "anthropic" not in model:
        calls.append(ToolCall("double", '{"n": '))
    with FakeModel([calls, "sorry"]) as fake:
        assert await _ask(weather, double, model=model) == "sorry"
    texts = told(fake.calls[1]["body"])
    assert "city: Field required" in texts[0] and "town: Extra inputs" in texts[0]
    assert "n: Input should be a valid integer" in texts[1]
    assert texts[2] == "There is no tool named 'guess'. There are: weather, double."
    assert len(texts) == len(calls) and ran == []


async def test_a_result_that_cannot_be_told_is_an_error_for_the_programs_author() -> None:
    def odd() -> Any:
        return {"items": [complex(1, 2)]}

    with FakeModel([ToolCall("odd")]):
        with pytest.raises(UsageError, match=r"items"):
            await _ask(odd)


async def test_an_effect_that_would_run_twice_is_refused_and_not_told_to_the_model() -> None:
    @step("refund", effect=True)
    async def refund(amount: int) -> str:
        ran.append(amount)
        return "refunded"

    @workflow("effect")
    async def flow(ctx: Context) -> str:
        return await _ask(refund)

    with FakeModel([ToolCall("refund", amount=5), "done"]) as fake:
        assert await flow.run() == "done"
    with FakeModel([ToolCall("refund", amount=5, call_id="another")]) as fake:
        with pytest.raises(StepChanged, match="refund"):
            await flow.options(rerun=["turn 1"]).run()
    assert ran == [5] and len(fake.calls) == 1


# -- a tool that is a step


async def test_a_step_as_tool_is_tried_again_as_it_says() -> None:
    @step("a flaky step", retry=Retry(max_attempts=3, initial_delay=0.001))
    async def flaky(n: int) -> int:
        """Flaky."""
        ran.append(current_step().attempt)
        if len(ran) < 3:
            raise ConnectionError("busy")
        return n

    @workflow("retries")
    async def flow(ctx: Context) -> str:
        return await _ask(flaky)

    with FakeModel([ToolCall("flaky", n=4), "4"]) as fake:
        assert await flow.run() == "4"
    (record,) = [one for one in runs.list()[0].steps if one.name == "a flaky step"]
    assert ran == [1, 2, 3] and record.attempts == 3 and told(fake.calls[1]["body"]) == ["4"]


async def test_a_model_call_in_a_tool_that_is_tried_again_leaves_retrying_to_it() -> None:
    @step(retry=Retry(max_attempts=2, initial_delay=0.001))
    async def explain(what: str) -> str:
        return await generate_content(f"Explain {what}", model=OPENAI)

    @workflow("one-attempt")
    async def flow(ctx: Context) -> str:
        return await _ask(explain)

    with FakeModel([ToolCall("explain", what="tea"), 500, "a drink", "done"]) as fake:
        assert await flow.run() == "done"
    (record,) = [one for one in runs.list()[0].steps if one.name == "explain"]
    assert record.attempts == 2 and told(fake.calls[3]["body"]) == ["a drink"]


async def test_a_step_under_tool_keeps_both_and_is_undone_when_the_workflow_fails(again: Callable[[], None]) -> None:
    fail = [False]

    @tool(name="pay_now")
    @step("charge", compensate=lambda result: ran.append(f"undo {result}"))
    async def charge(amount: int) -> str:
        ran.append(amount)
        return f"paid {amount}"

    @workflow("undone")
    async def flow(ctx: Context) -> str:
        text: str = await _ask(charge)
        await step("check", lambda: 1 / (0 if fail[0] else 1))
        return text

    with FakeModel([ToolCall("pay_now", amount=3), "done"]):
        assert await flow.run() == "done"
        assert ("charge", "tool", "completed") in records()
        again()
        fail[0] = True
        with pytest.raises(ZeroDivisionError):
            await flow.options(rerun=["check"]).run()
    assert ran == [3, "undo paid 3"]
    with FakeModel([]) as fake:
        with pytest.raises(UsageError, match=r"compensate= undoes .* no workflow here"):
            await _ask(charge)
    assert fake.calls == []


async def test_a_tool_may_ask_a_model_a_person_or_run_steps_itself(again: Callable[[], None]) -> None:
    async def inquire(what: str) -> str:
        inner = await generate_content(f"Explain {what}", model=OPENAI)
        decision = await human_task("approve", data={"what": what})
        noted = await step("note", lambda: ran.append(what))
        return f"{inner} {decision.comment} {noted}"

    @workflow("nested")
    async def flow(ctx: Context) -> str:
        return await _ask(inquire)

    with FakeModel([ToolCall("inquire", what="tea"), "a drink"]) as fake:
        with pytest.raises(Waiting) as caught:
            await flow.run()
    tasks.approve(caught.value.waiting_on[0]["id"], comment="good")
    again()
    with FakeModel(["fine"]) as fake:
        assert await flow.run() == "fine"
    assert told(fake.calls[0]["body"]) == ["a drink good None"] and ran == ["tea"]


# -- approvals


@tool(approval="manager")
async def refund(order: int, amount: int = 10) -> str:
    """Pay back."""
    ran.append((order, amount))
    return f"refunded {amount}"


@workflow("approved")
async def approved(ctx: Context, model: str) -> str:
    return await _ask(refund, double, model=model)


@pytest.mark.parametrize("model", MODELS)
async def test_a_tool_waits_for_its_approval_and_no_turn_is_bought_again(model: str, again: Callable[[], None]) -> None:
    with FakeModel([[ToolCall("refund", order=7), ToolCall("double", n=4)], "done"]) as fake:
        with pytest.raises(Waiting) as caught:
            await approved.run(model)
        assert len(fake.calls) == 1 and ran == [("double", 4)]
        (task,) = tasks.list()
        assert task.data == {"tool": "refund", "arguments": {"order": 7, "amount": 10}}
        assert task.assign_to == "manager" and task.type == "approve" and caught.value.waiting_on[0]["id"] == task.id
        again()
        with pytest.raises(Waiting):
            await approved.run(model)
        assert [one.id for one in tasks.list()] == [task.id]
        tasks.approve(task.id, by="Ann")
        again()
        assert await approved.run(model) == "done"
        assert len(fake.calls) == 2 and ran == [("double", 4), (7, 10)]
    assert told(fake.calls[1]["body"]) == ["refunded 10", "8"]
    assert ("approve refund", "human", "completed") in records()


@pytest.mark.parametrize("model", MODELS)
async def test_a_rejection_is_told_to_the_model_with_its_comment(model: str, again: Callable[[], None]) -> None:
    with FakeModel([ToolCall("refund", order=7), "Sorry."]) as fake:
        with pytest.raises(Waiting):
            await approved.run(model)
        tasks.reject(tasks.list()[0].id, by="Ann", comment="too much")
        again()
        assert await approved.run(model) == "Sorry."
    assert told(fake.calls[1]["body"]) == ["This call was rejected by Ann: too much"] and ran == []


async def test_equal_calls_need_an_approval_each_and_the_second_turns_too(again: Callable[[], None]) -> None:
    equal = [ToolCall("refund", order=7), ToolCall("refund", order=7)]
    with FakeModel([equal, ToolCall("refund", order=8), "done"]) as fake:
        with pytest.raises(Waiting) as caught:
            await approved.run(OPENAI)
        first, second = (wait["id"] for wait in caught.value.waiting_on)
        assert first != second
        tasks.approve(first)
        again()
        with pytest.raises(Waiting) as caught:
            await approved.run(OPENAI)
        assert [wait["id"] for wait in caught.value.waiting_on] == [second] and ran == [(7, 10)]
        tasks.reject(second)
        again()
        with pytest.raises(Waiting) as caught:
            await approved.run(OPENAI)
        (third,) = (wait["id"] for wait in caught.value.waiting_on)
        assert tasks.get(third).data["arguments"] == {"order": 8, "amount": 10} and len(fake.calls) == 2
        tasks.approve(third)
        again()
        assert await approved.run(OPENAI) == "done"
    assert ran == [(7, 10), (8, 10)] and len(fake.calls) == 3


async def test_a_turn_asked_anew_while_an_approval_waits_asks_for_what_it_now_wants(again: Callable[[], None]) -> None:
    with FakeModel([[ToolCall("refund", order=7), ToolCall("refund", order=8)]]):
        with pytest.raises(Waiting) as caught:
            await approved.run(OPENAI)
    tasks.approve(caught.value.waiting_on[0]["id"])
    again()
    with FakeModel([ToolCall("refund", order=9, call_id="new"), "done"]):
        with pytest.raises(Waiting) as caught:
            await approved.options(rerun=["turn 1"]).run(OPENAI)
        (wait,) = caught.value.waiting_on
        assert tasks.get(wait["id"]).data["arguments"]["order"] == 9
        assert [task.id for task in tasks.list() if task.status == "open"] == [wait["id"]]
        tasks.approve(wait["id"])
        again()
        assert await approved.run(OPENAI) == "done"
    assert ran == [(9, 10)]


def test_plain_code_waits_for_approvals_as_well(again: Callable[[], None]) -> None:
    @tool(approval=["Ann", "Bob"])
    def pay(order: int) -> str:
        ran.append(order)
        return "paid"

    @sync.workflow("plain-approved")
    def flow(ctx: Context) -> str:
        return sync.generate_content("Go", tools=[pay], model=OPENAI)  # type: ignore[no-any-return]

    with FakeModel([[ToolCall("pay", order=7), ToolCall("pay", order=7)], "done"]) as fake:
        with pytest.raises(Waiting) as caught:
            flow.run()
        assert ran == [] and len(fake.calls) == 1
        for wait in caught.value.waiting_on:
            tasks.approve(wait["id"], by="Bob")
        again()
        assert flow.run() == "done"
    assert ran == [7, 7] and len(fake.calls) == 2


async def test_an_approval_outside_a_workflow_is_refused_before_anything_is_sent() -> None:
    with FakeModel([]) as fake:
        with pytest.raises(UsageError, match=r"'refund' needs an approval, and only a workflow"):
            await _ask(refund)
    assert fake.calls == []


# -- max_turns


@pytest.mark.parametrize("handled", [False, True])
async def test_a_larger_max_turns_pays_for_further_turns_only(handled: bool, again: Callable[[], None]) -> None:
    limit = [2]

    @workflow("limited")
    async def flow(ctx: Context) -> str:
        try:
            return await _ask(double, max_turns=limit[0])
        except TooManyTurns:
            if not handled:
                raise
            await step("give up", lambda: ran.append("gave up"))
            return "gave up"

    with FakeModel([ToolCall("double", n=1), ToolCall("double", n=2)]) as fake:
        if handled:
            assert await flow.run() == "gave up"
        else:
            with pytest.raises(TooManyTurns, match=r"after 2 turns \(max_turns=2\).*double") as caught:
                await flow.run()
            assert "function_call" in json.dumps(caught.value.reply.messages[-1])
        assert len(fake.calls) == 2 and ("double", 2) not in ran
    limit[0] = 5
    again()
    with FakeModel([ToolCall("double", n=3), "done"]) as fake:
        assert await flow.run() == "done"
    assert [one for one in ran if one[0] == "double"] == [("double", 1), ("double", 2), ("double", 3)]
    assert len(fake.calls) == 2 and told(fake.calls[1]["body"]) == ["2", "4", "6"]


# -- reuse


async def test_a_failed_turn_is_bought_again_alone_also_when_a_tool_has_changed_what_it_holds() -> None:
    class Notes:
        def __init__(self) -> None:
            self.kept: list[int] = []

        def keep(self, n: int) -> int:
            self.kept.append(n)
            return len(self.kept)

    notes = Notes()

    @workflow("kept")
    async def flow(ctx: Context) -> str:
        return await _ask(notes.keep, retry={"max_attempts": 1})

    with FakeModel([ToolCall("keep", n=1), ToolCall("keep", n=2), 500]) as fake:
        with pytest.raises(ModelError):
            await flow.run()
    with FakeModel(["done"]) as fake:
        assert await flow.run() == "done"
    assert len(fake.calls) == 1 and told(fake.calls[0]["body"]) == ["1", "2"] and notes.kept == [1, 2]


@pytest.mark.parametrize("policy", ["auto", "rerun", "reuse", "error"])
async def test_an_edited_tool_costs_nothing_unless_its_new_result_does(policy: Any, again: Callable[[], None]) -> None:
    def old(n: int) -> int:
        ran.append("old")
        return 2 * n

    def new(n: int) -> int:
        ran.append("new")
        return 2 * n + 0

    body: list[Any] = [old]

    @workflow("edited", on_change=policy)
    async def flow(ctx: Context) -> str:
        calc: Any = tool(name="calc", description="Calc.")(body[0])
        return await _ask(calc)

    with FakeModel([ToolCall("calc", n=4), "8"]) as fake:
        assert await flow.run() == "8"
        new.__name__, new.__qualname__ = old.__name__, old.__qualname__
        body[0] = new
        again()
        if policy == "error":
            with pytest.raises(StepChanged):
                await flow.run()
        else:
            assert await flow.run() == "8"
    assert len(fake.calls) == 2
    assert ran == (["old", "new"] if policy == "rerun" else ["old"])


async def test_two_calls_with_one_request_and_other_tools_keep_their_own_answers(again: Callable[[], None]) -> None:
    crash = [True]

    @workflow("two-shops")
    async def flow(ctx: Context) -> list[str]:
        found = [await _ask(_Shop(name).stock) for name in ("north", "south")]
        await step("end", lambda: 1 / (0 if crash[0] else 1))
        return found

    call = ToolCall("stock", item="tea")
    with FakeModel([call, "n", call, "s"]) as fake:
        with pytest.raises(ZeroDivisionError):
            await flow.run()
        crash[0] = False
        again()
        assert await flow.run() == ["n", "s"]
    assert ran == [("north", "tea"), ("south", "tea")] and len(fake.calls) == 4


async def test_a_tool_that_holds_something_else_runs_again_and_its_paid_turn_is_reused(again: Callable[[], None]) -> None:
    where = ["north"]

    @workflow("moved")
    async def flow(ctx: Context) -> str:
        return await _ask(_Shop(where[0]).stock)

    with FakeModel([ToolCall("stock", item="tea"), "north"]):
        assert await flow.run() == "north"
    where[0] = "south"
    again()
    with FakeModel(["south"]) as fake:
        assert await flow.run() == "south"
    assert told(fake.calls[0]["body"]) == ["south has tea"] and ran == [("north", "tea"), ("south", "tea")]


async def test_one_turn_or_one_tool_can_be_done_anew(again: Callable[[], None]) -> None:
    @workflow("anew")
    async def flow(ctx: Context) -> str:
        return await _ask(double, weather)

    with FakeModel([ToolCall("double", n=4), ToolCall("weather", city="Oslo"), "a"]):
        assert await flow.run() == "a"
    again()
    with FakeModel(["b"]):
        assert await flow.options(rerun=["turn 3"]).run() == "b"
    again()
    with FakeModel([]):
        assert await flow.options(rerun=["double"]).run() == "b"
    assert ran == [("double", 4), ("weather", "Oslo", 1), ("double", 4)]
    again()
    with FakeModel([ToolCall("weather", city="Rome"), "c"]) as fake:
        assert await flow.options(rerun=["generate_content"]).run() == "c"
    assert len(fake.calls) == 2


async def test_inside_a_step_that_is_tried_again_turns_are_not_and_a_new_attempt_asks_anew() -> None:
    @step("draft", retry=Retry(max_attempts=2, initial_delay=0.001))
    async def draft() -> str:
        return await _ask(double)  # type: ignore[no-any-return]

    @workflow("in-step")
    async def flow(ctx: Context) -> str:
        return await draft()

    with FakeModel([ToolCall("double", n=4), 500, ToolCall("double", n=5), "done"]) as fake:
        assert await flow.run() == "done"
    assert len(fake.calls) == 4 and told(fake.calls[3]["body"]) == ["10"]


async def test_outside_a_workflow_a_broken_off_conversation_goes_on(again: Callable[[], None]) -> None:
    def broken(n: int) -> int:
        ran.append(n)
        raise ValueError(f"no {n}")

    calls = [ToolCall("double", n=4), ToolCall("double", n=4), ToolCall("broken", n=1)]
    with FakeModel([calls, 500]):
        with pytest.raises(ModelError):
            await _ask(double, broken, retry={"max_attempts": 1})
    again()
    with FakeModel(["done"]) as fake:
        assert await _ask(double, broken, retry={"max_attempts": 1}) == "done"
        again()
        assert await _ask(double, broken) == "done"
    assert told(fake.calls[0]["body"]) == ["8", "8", "ValueError: no 1"]
    assert sorted(map(str, ran)) == ["('double', 4)", "('double', 4)", "1"] and len(fake.calls) == 1


async def test_plan_says_what_an_agent_call_would_do() -> None:
    @workflow("planned")
    async def flow(ctx: Context, prompt: str) -> str:
        return await _ask(double, prompt=prompt)

    with FakeModel([ToolCall("double", n=4), "8"]):
        assert [one.state for one in (await flow.plan("a")).steps] == ["unknown"]
        await flow.options(run_id="r").run("a")
        assert [one.state for one in (await flow.options(run_id="r").plan("a")).steps] == ["reused"]
        assert [one.state for one in (await flow.options(run_id="r").plan("b")).steps] == ["changed"]


async def test_the_steps_of_a_run_show_calls_and_texts() -> None:
    configure(model=OPENAI)

    @workflow("shown")
    async def flow(ctx: Context) -> Any:
        await generate_content("Go", tools=[double], name="ask")
        record = ctx.steps["ask"]
        return [record.kind, record.output, record.model, record.attempts]

    with FakeModel([ToolCall("double", n=4), "8"]):
        assert await flow.run() == ["agent", "8", "gpt-5-mini", 1]
    first = next(one for one in runs.list()[0].steps if one.name == "turn 1")
    assert first.output[0]["name"] == "double" and first.output[0]["arguments"] == '{"n": 4}'
