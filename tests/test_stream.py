"""Streaming: text as it is written, one recorded reply as if it had not been streamed, and no half answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

import agentflow.sync
from agentflow import (
    Context,
    ModelError,
    Refused,
    Reply,
    Retry,
    Truncated,
    UsageError,
    generate_content,
    step,
    workflow,
)
from agentflow.journal import Journal
from agentflow.providers import common, openai, streams
from agentflow.testing import FakeModel, reply_body, request_of, sse

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
each_model = pytest.mark.parametrize("model_name", MODELS)
PATHS = {"openai": "/v1/responses", "openai-chat": "/v1/chat/completions", "anthropic": "/v1/messages"}
LONG = "Zeile eins – ünïcödé\u2028and more\nwords, quite a few of them"
ONCE = Retry(max_attempts=1)


class City(BaseModel):
    name: str


def stream_of(model_name: str, text: str = LONG, **options: Any) -> str:
    provider, _, model = model_name.partition(":")
    asked = request_of(
        PATHS[provider], {"model": model, "input": "Hi", "messages": [{"role": "user", "content": "Hi"}]}
    )
    return sse(asked, reply_body(asked, text, **options))


def sent(text: str, *, cut: int | None = None) -> dict[str, Any]:
    """A scripted stream; ``cut`` breaks the connection after so many bytes."""
    fault: dict[str, Any] = {"status": 200, "headers": {"content-type": "text/event-stream"}, "body": text}
    return fault if cut is None else {**fault, "cut": cut}


def recorded_replies(journal: Journal) -> list[dict[str, Any]]:
    return [orjson.loads(text) for _, text in journal.scan("m/")]


# -- text as it is written -----------------------------------------------------------------------


@each_model
async def test_text_is_handed_over_in_pieces_and_returned_whole(model_name: str, loopback: Any) -> None:
    server = loopback({"text": LONG})
    heard: list[str] = []
    assert await generate_content("Hi", model=model_name, on_text=heard.append) == LONG
    assert "".join(heard) == LONG and len(heard) > 3
    assert len(server.arrived) == 1


@each_model
async def test_text_is_heard_before_the_reply_is_recorded(model_name: str, journal: Journal) -> None:
    recorded: list[int] = []
    with FakeModel([LONG]):
        await generate_content(
            "Hi", model=model_name, on_text=lambda text: recorded.append(len(recorded_replies(journal)))
        )
    assert len(recorded) > 3 and set(recorded) == {0} and len(recorded_replies(journal)) == 1


@each_model
async def test_a_streamed_reply_is_recorded_as_an_unstreamed_one(model_name: str, journal: Journal) -> None:
    with FakeModel([LONG, LONG]) as model:
        one = await generate_content("Hi", model=model_name, output_type=Reply, sample=1)
        two = await generate_content("Hi", model=model_name, output_type=Reply, sample=2, on_text=lambda text: None)
    plain, streamed = recorded_replies(journal)
    assert [call["body"].get("stream") for call in model.calls] == [None, True]
    for raw in (plain, streamed):
        raw["body"].pop("id"), raw.pop("at"), raw.pop("request_id"), raw.pop("ledger")
        for item in raw["body"].get("output", []):
            item.pop("id")
        raw.pop("usage"), raw.pop("cost"), raw["body"].pop("usage")  # made up from the length of what was asked
    assert streamed == plain and "stream" not in streamed["request"]
    assert two.text == one.text == LONG and two.usage.output_tokens == one.usage.output_tokens
    assert two.cost is not None and two.cost > Decimal(0)


@each_model
async def test_output_types_can_be_streamed(model_name: str) -> None:
    heard: list[str] = []
    with FakeModel([City(name="Oslo")]):
        city = await generate_content("A city", model=model_name, output_type=City, on_text=heard.append)
    assert city == City(name="Oslo") and json.loads("".join(heard)) == {"name": "Oslo"}


async def test_chat_asks_for_the_usage_of_a_stream() -> None:
    with FakeModel(["Hi"]) as model:
        await generate_content("Hi", model=MODELS[1], on_text=lambda text: None)
    assert model.calls[0]["body"]["stream_options"] == {"include_usage": True}


@each_model
async def test_each_turn_of_a_reask_is_heard(model_name: str) -> None:
    heard: list[str] = []
    with FakeModel(["no json", '{"name": "Oslo"}']):
        await generate_content("A city", model=model_name, output_type=City, on_text=heard.append)
    assert "".join(heard) == 'no json{"name": "Oslo"}'


@each_model
async def test_a_server_that_does_not_stream_is_read_all_the_same(model_name: str, loopback: Any) -> None:
    provider, _, name = model_name.partition(":")
    asked = request_of(PATHS[provider], {"model": name})
    loopback({"status": 200, "body": reply_body(asked, "whole")})
    heard: list[str] = []
    assert await generate_content("Hi", model=model_name, on_text=heard.append) == "whole"
    assert heard == ["whole"]


# -- replay and identity -------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_replay_hands_over_the_whole_text_at_once(
    kind: str, model_name: str, again: Callable[[], None]
) -> None:
    heard: list[str] = []

    async def later(text: str) -> None:
        await asyncio.sleep(0)
        heard.append(text)

    @workflow("streams")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content("Hi", model=model_name, on_text=heard.append if kind == "sync" else later)

    with FakeModel([LONG]) as model:
        assert await flow.run(1) == LONG
        assert "".join(heard) == LONG
        heard.clear()
        again()
        assert await flow.run(1) == LONG
    assert heard == [LONG] and len(model.calls) == 1


@each_model
@pytest.mark.parametrize("first", [True, False])
async def test_streamed_and_unstreamed_are_the_same_call(
    first: bool, model_name: str, again: Callable[[], None]
) -> None:
    streamed = {"now": first}

    @workflow("either")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content("Hi", model=model_name, on_text=print if streamed["now"] else None)

    with FakeModel(["fine"]) as model:
        assert await flow.run(1) == "fine"
        streamed["now"] = not first
        again()
        assert await flow.run(1) == "fine"
    assert len(model.calls) == 1


async def test_plan_hands_over_nothing() -> None:
    heard: list[str] = []

    @workflow("planned")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content("Hi", model=MODELS[0], on_text=heard.append)

    with FakeModel(["fine"]):
        await flow.run(1)
        heard.clear()
        await flow.plan(1)
    assert heard == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_plain_code_streams_and_replays_too(kind: str, again: Callable[[], None]) -> None:
    heard: list[str] = []

    async def later(text: str) -> None:
        await asyncio.sleep(0)
        heard.append(text)

    @agentflow.sync.workflow("plain-streams")
    def flow(ctx: Any, n: int) -> str:
        text: str = agentflow.sync.generate_content(
            "Hi", model=MODELS[0], on_text=heard.append if kind == "sync" else later
        )
        return text

    with FakeModel([LONG]):
        assert flow.run(1) == LONG and "".join(heard) == LONG
        heard.clear()
        again()
        assert flow.run(1) == LONG
    assert heard == [LONG]


# -- what on_text does wrong ---------------------------------------------------------------------


@each_model
async def test_what_on_text_raises_comes_after_the_paid_reply_is_recorded(
    model_name: str, journal: Journal, again: Callable[[], None]
) -> None:
    broken = {"now": True}

    def on_text(text: str) -> None:
        if broken["now"]:
            raise ZeroDivisionError("in on_text")

    @workflow("breaks")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content("Hi", model=model_name, on_text=on_text)

    with FakeModel([LONG]) as model:
        with pytest.raises(ZeroDivisionError, match="in on_text"):
            await flow.run(1)
        assert len(recorded_replies(journal)) == 1
        broken["now"] = False
        again()
        assert await flow.run(1) == LONG
    assert len(model.calls) == 1


async def test_on_text_that_cannot_be_called_is_an_error_before_anything_is_sent() -> None:
    with FakeModel([]), pytest.raises(UsageError, match="on_text="):
        await generate_content("Hi", model=MODELS[0], on_text="print")  # type: ignore[call-overload]


# -- streams that break --------------------------------------------------------------------------

TERMINAL = {
    "openai": "event: response.completed",
    "openai-chat": '"finish_reason": "stop"',
    "anthropic": "event: message_stop",
}


def before_the_end(model_name: str) -> str:
    text = stream_of(model_name)
    at = text.index(TERMINAL[model_name.partition(":")[0]])
    return text[: text.rindex("\n\n", 0, at) + 2]


@each_model
async def test_a_stream_that_ends_too_early_is_a_failed_attempt_and_no_answer(model_name: str, loopback: Any) -> None:
    server = loopback(sent(before_the_end(model_name)))
    heard: list[str] = []
    with pytest.raises(ModelError, match="ended before the reply was complete") as caught:
        await generate_content("Hi", model=model_name, on_text=heard.append, retry=ONCE)
    assert caught.value.retryable and caught.value.code == "incomplete_stream"
    assert caught.value.reply is not None and caught.value.reply.text == LONG == "".join(heard)
    assert len(server.arrived) == 1


@each_model
async def test_a_connection_lost_in_a_stream_is_transient_and_keeps_what_came(
    model_name: str, loopback: Any, journal: Journal
) -> None:
    whole = stream_of(model_name)
    server = loopback(sent(whole, cut=len(whole) // 2))
    heard: list[str] = []
    with pytest.raises(ModelError) as caught:
        await generate_content("Hi", model=model_name, on_text=heard.append, retry=ONCE)
    assert caught.value.retryable and len(server.arrived) == 1
    said = "".join(heard)
    assert said and LONG.startswith(said) and said != LONG
    assert caught.value.reply is not None and caught.value.reply.text == said
    assert json.dumps(said, ensure_ascii=False)[1:-1] in "\n".join(text for _, text in journal.scan(""))


@each_model
async def test_a_broken_stream_is_asked_again_and_heard_from_its_beginning(model_name: str, loopback: Any) -> None:
    server = loopback(sent(before_the_end(model_name)), {"text": "second"})
    heard: list[str] = []
    retry = Retry(max_attempts=2, initial_delay=0)
    assert await generate_content("Hi", model=model_name, on_text=heard.append, retry=retry) == "second"
    assert "".join(heard) == LONG + "second" and len(server.arrived) == 2


@pytest.mark.parametrize(
    "kind, code, retryable",
    [
        ("overloaded_error", None, True),
        ("rate_limit_error", "rate_limit_exceeded", True),
        ("server_error", "server_error", True),
        ("api_error", 502, True),
        ("invalid_request_error", "bad_thing", False),
        ("insufficient_quota", "insufficient_quota", False),
    ],
)
@each_model
async def test_an_error_inside_a_stream_is_judged_by_its_type(
    model_name: str, kind: str, code: Any, retryable: bool, loopback: Any
) -> None:
    error = {"type": kind, "message": "sk-secretsecret broke", **({"code": code} if code else {})}
    event = {"error": error} if model_name.startswith("openai-chat") else {"type": "error", "error": error}
    server = loopback(sent(before_the_end(model_name) + f"data: {json.dumps(event)}\n\n"))
    with pytest.raises(ModelError) as caught:
        await generate_content("Hi", model=model_name, on_text=lambda text: None, retry=ONCE)
    assert caught.value.retryable is retryable and caught.value.code == str(code or kind)
    assert caught.value.status == 200 and "sk-secret" not in str(caught.value)
    assert caught.value.reply is not None and caught.value.reply.text == LONG
    assert len(server.arrived) == 1


async def test_openais_flat_error_event_is_read(loopback: Any) -> None:
    event = {"type": "error", "code": "server_error", "message": "broke", "param": None, "sequence_number": 3}
    loopback(sent(before_the_end(MODELS[0]) + f"event: error\ndata: {json.dumps(event)}\n\n"))
    with pytest.raises(ModelError, match="server_error broke") as caught:
        await generate_content("Hi", model=MODELS[0], on_text=lambda text: None, retry=ONCE)
    assert caught.value.retryable


@each_model
async def test_an_event_that_is_no_json_is_a_transient_failure(model_name: str, loopback: Any) -> None:
    loopback(sent(before_the_end(model_name) + 'data: {"type": "x", \n\n'))
    with pytest.raises(ModelError, match="cannot be read") as caught:
        await generate_content("Hi", model=model_name, on_text=lambda text: None, retry=ONCE)
    assert caught.value.retryable


@each_model
@pytest.mark.parametrize("status, retryable", [(429, True), (529, True), (400, False), (401, False)])
async def test_an_error_status_is_the_same_streamed_or_not(
    model_name: str, status: int, retryable: bool, loopback: Any
) -> None:
    server = loopback(
        {"status": status, "headers": {"retry-after": "7"}, "body": {"error": {"message": "no", "type": "t"}}}
    )
    with pytest.raises(ModelError, match=f"{status} t no") as caught:
        await generate_content("Hi", model=model_name, on_text=lambda text: None, retry=ONCE)
    assert (caught.value.retryable, caught.value.retry_after) == (retryable, 7)
    assert len(server.arrived) == 1


@each_model
async def test_a_stream_that_stops_talking_ends_at_the_timeout(model_name: str, loopback: Any) -> None:
    server = loopback("hang")
    with pytest.raises(ModelError, match=r"within 2 s") as caught:
        await generate_content("Hi", model=model_name, on_text=lambda text: None, timeout=2, retry=ONCE)
    assert caught.value.retryable and len(server.arrived) == 1


async def test_a_chat_stream_broken_off_after_its_last_word_is_whole(loopback: Any) -> None:
    text = stream_of(MODELS[1])
    at = text.index("\n\n", text.index('"finish_reason": "stop"')) + 2
    server = loopback(sent(text, cut=len(text[:at].encode())))
    reply = await generate_content("Hi", model=MODELS[1], on_text=lambda text: None, output_type=Reply)
    assert reply.text == LONG and reply.cost is None and len(server.arrived) == 1


@each_model
async def test_truncated_and_refused_streams_are_what_they_are_unstreamed(model_name: str) -> None:
    with FakeModel([Truncated("half a"), Refused("I will not")]):
        with pytest.raises(Truncated) as cut:
            await generate_content("Hi", model=model_name, on_text=lambda text: None)
        with pytest.raises(Refused) as refused:
            await generate_content("Ho", model=model_name, on_text=lambda text: None)
    assert cut.value.reply.text == "half a" and refused.value.reply is not None


# -- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_events_are_cut_at_their_ends_wherever_the_network_cut_them(size: int, newline: str) -> None:
    text = f": comment\n\nevent: a\ndata: ü\u2028{'x' * 5}\n\ndata:1\ndata: 2\n\ndata: half".replace("\n", newline)
    raw, events, got = text.encode(), streams.Events(), []
    for at in range(0, len(raw), size):
        got += events.feed(raw[at : at + size])
    assert got == ["ü\u2028xxxxx", "1\n2"]


def test_tool_calls_and_thinking_are_put_together_as_they_would_have_come_whole() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "Oslo"}'}}
    chat = {
        "id": "x", "object": "chat.completion", "model": "m", "usage": {"prompt_tokens": 1},
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "tool_calls", "message": {"role": "assistant", "content": None, "tool_calls": [call]}}],
    }  # fmt: skip
    message = {
        "id": "m", "type": "message", "role": "assistant", "model": "m", "stop_reason": "tool_use", "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 9},
        "content": [
            {"type": "thinking", "thinking": "a long thought", "signature": "sig"},
            {"type": "tool_use", "id": "t", "name": "look", "input": {"at": ["Oslo", {"n": 1}]}},
        ],
    }  # fmt: skip
    for path, body, whole in (
        ("/v1/chat/completions", chat, streams.Chat()),
        ("/v1/messages", message, streams.Messages()),
    ):
        events = streams.Events()
        for data in events.feed(sse(request_of(path, {"model": "m"}), body).encode()):
            whole.take(data)
        assert whole.done
        got = whole.body()
        assert got == body


async def test_a_stream_inside_a_step_replays_with_the_step() -> None:
    heard: list[str] = []

    async def draft() -> str:
        return await generate_content("Hi", model=MODELS[0], on_text=heard.append)

    with FakeModel(["fine"]) as model:
        assert await step("draft", draft) == "fine"
    assert "".join(heard) == "fine" and len(model.calls) == 1


# -- what was paid for is kept, whatever happens around it ---------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("model_name", MODELS)
def test_a_bug_in_on_text_never_buys_the_answer_again(kind: str, model_name: str) -> None:
    broken = True
    heard: list[str] = []

    def hear(text: str) -> None:
        if broken:
            raise ZeroDivisionError("in on_text")
        heard.append(text)

    async def later(text: str) -> None:
        hear(text)

    @workflow("deaf")
    async def deaf(ctx: Any) -> str:
        return await generate_content("Hi", model=model_name, on_text=hear if kind == "sync" else later)

    with FakeModel(["an answer", "bought again"], all_used=False) as model:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError, match="in on_text"):
                deaf.run_sync()
        broken = False
        assert deaf.run_sync() == "an answer"
    assert len(model.calls) == 1
    assert heard == ["an answer"]


@pytest.mark.parametrize("then", ["close", "reset", "hang"])
async def test_an_answer_that_came_whole_is_not_bought_again_for_what_its_connection_does(
    then: str, loopback: Any
) -> None:
    asked = request_of("/v1/chat/completions", {"model": "gpt-4o-mini"})
    text = sse(asked, reply_body(asked, "whole"))
    server = loopback({**sent(text, cut=text.index("data: [DONE]")), "then": then})
    heard: list[str] = []
    assert await generate_content("Hi", model=MODELS[1], on_text=heard.append, timeout=2, retry=ONCE) == "whole"
    assert "".join(heard) == "whole"
    assert len(server.arrived) == 1


async def test_an_error_reported_after_the_last_word_is_no_answer(loopback: Any) -> None:
    asked = request_of("/v1/chat/completions", {"model": "gpt-4o-mini"})
    text = sse(asked, reply_body(asked, "whole"))
    error = 'data: {"error": {"type": "server_error", "message": "broke"}}\n\n'
    server = loopback(sent(text.replace("data: [DONE]\n\n", error)))
    with pytest.raises(ModelError, match="server_error broke"):
        await generate_content("Hi", model=MODELS[1], on_text=lambda text: None, retry=ONCE)
    assert len(server.arrived) == 1


def test_arguments_of_a_tool_that_were_cut_off_by_max_tokens_do_not_break_the_stream() -> None:
    reply = streams.Messages()
    for event in (
        {"type": "message_start", "message": {"id": "msg_1", "content": [], "usage": {"input_tokens": 9}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "name": "f", "input": {}}},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "input_json_delta", "partial_json": '{"a": 1, "b'},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ):
        reply.take(json.dumps(event))
    assert reply.done
    assert reply.body()["content"] == [{"type": "tool_use", "name": "f", "input": '{"a": 1, "b'}]
    assert reply.body()["usage"] == {"input_tokens": 9, "output_tokens": 5}


class Clock:
    """The event loop's clock, which can be put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real, self.ahead = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self.ahead)

    async def forward(self, seconds: float) -> None:
        self.ahead += seconds
        for _ in range(3):  # what is due now gets its turn
            await asyncio.sleep(0)


@each_model
async def test_the_time_of_on_text_does_not_count_against_the_timeout(
    model_name: str, loopback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = loopback({"text": LONG})
    clock = Clock(monkeypatch)
    heard: list[str] = []

    async def slow(text: str) -> None:
        heard.append(text)
        await clock.forward(1000)

    assert await generate_content("Hi", model=model_name, on_text=slow, timeout=60) == LONG
    assert "".join(heard) == LONG and len(heard) > 3
    assert len(server.arrived) == 1


@pytest.mark.parametrize("before", [0, 40])
async def test_a_server_that_falls_silent_after_a_slow_on_text_has_what_was_left_of_the_timeout(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    silent = asyncio.Event()

    class Answer:
        status_code, headers = 200, {"content-type": "text/event-stream"}

        async def aiter_bytes(self) -> AsyncIterator[bytes]:
            await clock.forward(before)
            yield b'data: {"type": "response.output_text.delta", "delta": "Hi"}\n\n'
            silent.set()
            await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        yield SimpleNamespace(http_response=Answer())

    async def slow(text: str) -> None:
        await clock.forward(1000)

    server = common.Server("openai", lambda transport: None, "openai")
    whole = streams.Responses()
    body = {"model": "gpt-4o-mini"}
    posting = asyncio.ensure_future(common.post(server, opened, openai.read, body, 60, whole=whole, on_text=slow))
    await silent.wait()
    await clock.forward(59 - before)
    assert not posting.done()
    await clock.forward(2)
    assert posting.done()
    with pytest.raises(ModelError, match="no answer within 60 s") as caught:
        await posting
    assert (caught.value.code, caught.value.retryable) == ("timeout", True)
