"""Every recorded interaction, served from the loopback interface, through the real SDK and agentflow's reading of it.

What has to come out is read here from the recorded bytes, by code that shares nothing with the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import genai_prices
import pytest

from agentflow import generate, providers
from agentflow.errors import ModelError, Refused, Truncated
from agentflow.models import Reply
from agentflow.providers import anthropic, common, openai
from tests.loopback import Loopback
from tests.test_providers import SURFACES, recordings

ALL = recordings()
# What agentflow speaks beside the POSTs of SURFACES: a background response is asked for by GET.
POLLS = [one for one in ALL if one["surface"] == "responses_get"]
# What it does not speak: its SDK clients and its way to send a POST take these all the same.
NOT_SPOKEN = {
    "messages_count_tokens": "counts a prompt's tokens and generates nothing: no call of agentflow's asks for it",
    "responses_input_tokens": "counts a prompt's tokens and generates nothing: no call of agentflow's asks for it",
    "responses_compact": "shortens a conversation into an opaque item; callers send conversations as they are",
}
BESIDE = [one for one in ALL if one["surface"] in NOT_SPOKEN]
POSTS = [one for one in ALL if one["surface"] in SURFACES]
named = {"ids": lambda one: one["id"][-70:]}
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")  # said by the SDK about models of older recordings


def test_all_116_recordings_are_played() -> None:
    parts = [*POSTS, *POLLS, *BESIDE]
    assert sorted(one["id"] for one in parts) == sorted({one["id"] for one in ALL})
    assert (len(ALL), len(POSTS), len(POLLS), len(BESIDE)) == (116, 106, 5, 5)
    assert sum(isinstance(one["response_body"], str) for one in POSTS) == 27  # streamed
    assert Counter(one["status"] for one in POSTS) == {200: 93, 400: 4, 401: 3, 404: 6}


@dataclass
class Recorded:
    """A reply as it was recorded, in agentflow's words for the reasons to stop."""

    text: str = ""
    refused: bool = False
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    finish: str = ""
    model: str = ""
    read: int = 0
    wrote: int = 0
    cached: int = 0
    reasoned: int = 0
    kept: int = 0
    kept_1h: int = 0
    web: int = 0
    items: list[Any] = field(default_factory=list)
    priced: bool = True


def recorded(one: dict[str, Any]) -> Recorded:
    body = one["response_body"]
    whole = {"chat": chat, "responses": responses, "messages": messages}
    if isinstance(body, dict):
        return whole[one["surface"].partition("_")[0]](body)
    events = [json.loads(line[6:]) for line in body.replace("\r\n", "\n").split("\n") if line.startswith("data: {")]
    return {"chat": chat_stream, "responses": responses_stream, "messages": messages_stream}[one["surface"]](events)


def chat(body: dict[str, Any]) -> Recorded:
    first = body["choices"][0]
    said = first["message"]
    found = Recorded(text=said["content"] or "", model=body["model"], finish=first["finish_reason"])
    for call in said.get("tool_calls") or []:
        found.calls.append((call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])))
    found.items = [{name: value for name, value in said.items() if value is not None}]
    if said.get("refusal"):
        found.refused, found.finish = True, "refusal"
    chat_usage(found, body["usage"])
    return found


def chat_usage(found: Recorded, usage: dict[str, Any]) -> None:
    found.read, found.wrote = usage["prompt_tokens"], usage["completion_tokens"]
    given = usage.get("prompt_tokens_details") or {}
    found.cached, found.kept = given.get("cached_tokens", 0), given.get("cache_write_tokens", 0)
    found.reasoned = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)


def chat_stream(events: list[dict[str, Any]]) -> Recorded:
    found = Recorded(model=events[-1]["model"])
    names: dict[int, list[str]] = {}
    for event in events:
        if event.get("usage"):
            chat_usage(found, event["usage"])
        for choice in event["choices"]:
            found.text += choice["delta"].get("content") or ""
            found.finish = choice["finish_reason"] or found.finish
            for call in choice["delta"].get("tool_calls") or []:
                known = names.setdefault(call["index"], ["", "", ""])
                known[0] += call.get("id") or ""
                known[1] += call["function"].get("name") or ""
                known[2] += call["function"].get("arguments") or ""
    found.calls = [(key, name, json.loads(arguments)) for key, name, arguments in names.values()]
    said = any(choice["delta"].get("content") is not None for event in events for choice in event["choices"])
    item: dict[str, Any] = {"role": "assistant", **({"content": found.text} if said else {})}
    if names:
        item["tool_calls"] = [
            {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}
            for key, name, arguments in names.values()
        ]
    found.items = [item]
    found.priced = found.read > 0
    return found


def responses(body: dict[str, Any]) -> Recorded:
    output = body["output"]
    said = [part for item in output if item["type"] == "message" for part in item["content"]]
    found = Recorded(
        text="".join(part["text"] for part in said if part["type"] == "output_text"),
        refused=any(part["type"] == "refusal" for part in said),
        calls=[
            (item["call_id"], item["name"], json.loads(item["arguments"]))
            for item in output
            if item["type"] == "function_call"
        ],
        finish=body.get("status", "completed"),
        model=body.get("model", ""),
        items=output,
    )
    if found.finish == "incomplete":
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        found.finish = "length"
    elif found.finish == "completed":
        found.finish = "refusal" if found.refused else "tool_calls" if found.calls else "stop"
    if body["usage"]:
        found.read, found.wrote = body["usage"]["input_tokens"], body["usage"]["output_tokens"]
        found.cached = body["usage"]["input_tokens_details"]["cached_tokens"]
        found.reasoned = body["usage"]["output_tokens_details"]["reasoning_tokens"]
    found.web = sum(item["type"] == "web_search_call" and item["action"]["type"] == "search" for item in output)
    # A container of the code interpreter is charged for by the hour, and no list of prices says so.
    found.priced = found.read > 0 and not any(item["type"] == "code_interpreter_call" for item in output)
    return found


def responses_stream(events: list[dict[str, Any]]) -> Recorded:
    last = events[-1]
    assert last["type"] in ("response.completed", "response.incomplete")
    found = responses({**last["response"], "output": []})
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    found.items = last["response"]["output"] or done
    found.text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    found.calls = [
        (item["call_id"], item["name"], json.loads(item["arguments"]))
        for item in done
        if item["type"] == "function_call"
    ]
    if found.calls and found.finish == "stop":
        found.finish = "tool_calls"
    return found


STOPS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


def messages(body: dict[str, Any]) -> Recorded:
    blocks = body["content"]
    found = Recorded(
        text="".join(block["text"] for block in blocks if block["type"] == "text"),
        calls=[(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"],
        finish=STOPS.get(body["stop_reason"], body["stop_reason"]),
        model=body["model"],
        items=[{"role": "assistant", "content": blocks}],
    )
    usage = body["usage"]
    found.cached, found.kept = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    found.kept_1h = usage.get("cache_creation", {}).get("ephemeral_1h_input_tokens", 0)
    found.read, found.wrote = usage["input_tokens"] + found.cached + found.kept, usage["output_tokens"]
    found.reasoned = usage.get("output_tokens_details", {}).get("thinking_tokens", 0)
    found.web = usage.get("server_tool_use", {}).get("web_search_requests", 0)
    return found


def messages_stream(events: list[dict[str, Any]]) -> Recorded:
    start = next(event["message"] for event in events if event["type"] == "message_start")
    end = next(event for event in events if event["type"] == "message_delta")
    usage = {**start["usage"], **end["usage"]}
    usage = {"cache_read_input_tokens": 0, "cache_creation_input_tokens": 0, **usage}
    found = messages({**start, "content": [], "stop_reason": end["delta"]["stop_reason"], "usage": usage})
    blocks = []
    for number, block in ((e["index"], e["content_block"]) for e in events if e["type"] == "content_block_start"):
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta" and e["index"] == number]
        made = "".join(delta.get("partial_json", "") for delta in deltas)
        block = dict(block, **({"input": json.loads(made)} if made else {}))
        for name in ("text", "thinking", "signature"):
            if any(name in delta for delta in deltas):
                block[name] = block.get(name, "") + "".join(delta.get(name, "") for delta in deltas)
        blocks.append(block)
        found.text += block["text"] if block["type"] == "text" else ""
        if block["type"] == "tool_use":
            found.calls.append((block["id"], block["name"], block["input"]))
    found.items = [{"role": "assistant", "content": blocks}]
    return found


def calls_of(surface: str, items: list[dict[str, Any]]) -> list[tuple[str, str, Any]]:
    """Tool calls among the provider's own items, which the next turn sends back."""
    if surface == "responses":
        return [(i["call_id"], i["name"], json.loads(i["arguments"])) for i in items if i["type"] == "function_call"]
    if surface == "messages":
        return [(b["id"], b["name"], b["input"]) for i in items for b in i["content"] if b["type"] == "tool_use"]
    return [
        (c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
        for i in items
        for c in i.get("tool_calls", [])
    ]


def asked_of(one: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The body as agentflow is given it, and whether the reply was streamed."""
    body = dict(one["request_body"])
    streamed = bool(body.pop("stream", False))
    if streamed:
        body.pop("stream_options", None)
    return body, streamed


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], Loopback]]:
    """A server that answers with a recorded reply."""

    def start(one: dict[str, Any]) -> Loopback:
        server.script = [{"status": one["status"], "headers": one["response_headers"], "body": one["response_body"]}]
        return server

    with Loopback() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield start


def sent(one: dict[str, Any], body: dict[str, Any], streamed: bool) -> dict[str, Any]:
    """What has to have arrived."""
    if not streamed:
        return body
    more = {"stream_options": {"include_usage": True}} if one["surface"] == "chat" else {}
    return {**body, "stream": True, **more}


@pytest.mark.parametrize("one", [one for one in POSTS if one["status"] == 200], **named)
async def test_a_recorded_reply_is_read_as_it_was_recorded(one: dict[str, Any], serve: Any) -> None:
    server = serve(one)
    provider = providers.get(SURFACES[one["surface"]])
    body, streamed = asked_of(one)
    heard: list[str] = []

    async def hear(text: str) -> None:
        heard.append(text)

    raw = await provider.send(body, 20, on_text=hear) if streamed else await provider.send(body, 20)
    (arrived,) = server.arrived
    assert arrived["digest"] == common.digest(sent(one, body, streamed))

    was = recorded(one)
    parts = provider.read(raw["body"])
    assert (parts.text, parts.refusal is not None, parts.finish_reason) == (was.text, was.refused, was.finish)
    assert "".join(heard) == (was.text if streamed else "")
    assert not streamed or len(was.text) < 30 or len(heard) > 1
    assert calls_of(one["surface"], parts.items) == was.calls
    assert parts.items == was.items
    assert dataclasses.astuple(parts.usage) == (
        was.read,
        was.wrote,
        was.cached,
        was.reasoned,
        was.kept,
        was.kept_1h,
    )
    assert raw["usage"] == dataclasses.asdict(parts.usage)
    assert (raw["model"], raw["status"]) == (was.model or body["model"], 200)
    if not streamed:
        assert raw["body"] == one["response_body"]
    if "x-request-id" in one["response_headers"]:
        assert raw["request_id"] == one["response_headers"]["x-request-id"]
    assert raw["cost"] == (str(published(one, was)) if was.priced else None)


def published(one: dict[str, Any], was: Recorded) -> Decimal:
    usage = genai_prices.Usage(
        input_tokens=was.read,
        output_tokens=was.wrote,
        cache_read_tokens=was.cached,
        cache_write_tokens=was.kept,
        cache_write_1h_tokens=was.kept_1h,
        web_searches=was.web,
    )
    return genai_prices.calc_price(usage, was.model, provider_id=one["provider"]).total_price


ENDED = {"length": Truncated, "refusal": Refused, "pause_turn": ModelError}


class Kept:
    """A recorder that has nothing yet."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Any]] = []

    def replies(self) -> list[dict[str, Any]]:
        return []

    def sending(self, body: dict[str, Any], max_tokens: int | None) -> Any:
        return contextlib.nullcontext()

    async def save(self, raw: dict[str, Any], *, body: dict[str, Any]) -> None:
        self.saved.append(raw)


def answered() -> Iterator[dict[str, Any]]:
    for one in POSTS:
        if one["status"] == 200 and recorded(one).finish in ("stop", *ENDED):
            yield one


@pytest.mark.parametrize("one", list(answered()), **named)
async def test_a_recorded_answer_is_what_the_caller_gets(one: dict[str, Any], serve: Any) -> None:
    serve(one)
    body, streamed = asked_of(one)
    name = SURFACES[one["surface"]]
    call = generate.prepare("x", model=f"{name}:{body['model']}", output_type=Reply, reask=0)
    call = dataclasses.replace(call, request={"provider": name, "model": body["model"], "body": body})
    heard: list[str] = []
    kept = Kept()
    listener = generate.Listener(heard.append) if streamed else None
    was = recorded(one)
    if was.finish == "stop":
        reply = generate.finish(call, await generate.converse(call, kept, listener))
    else:
        with pytest.raises(ENDED[was.finish]) as caught:
            await generate.converse(call, kept, listener)
        assert caught.value.status == 200
        reply = caught.value.reply
    if not was.refused:
        assert reply.text == was.text
        assert reply.output == (was.text if was.finish == "stop" else None)
    assert (reply.finish_reason, reply.model) == (was.finish, was.model)
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (was.read, was.wrote)
    assert (reply.usage.cached_tokens, reply.usage.reasoning_tokens) == (was.cached, was.reasoned)
    assert reply.cost == (published(one, was) if was.priced else None)
    assert "".join(heard) == (was.text if streamed else "")
    assert [raw["body"] for raw in kept.saved] == [one["response_body"]] or streamed
    assert reply.messages[-len(was.items) :] == was.items


@pytest.mark.parametrize("one", [one for one in POSTS if one["status"] != 200], **named)
async def test_a_recorded_error_is_reported_as_it_was(one: dict[str, Any], serve: Any) -> None:
    server = serve(one)
    body, streamed = asked_of(one)
    heard: list[str] = []

    async def hear(text: str) -> None:
        heard.append(text)

    provider = providers.get(SURFACES[one["surface"]])
    with pytest.raises(ModelError) as caught:
        await (provider.send(body, 20, on_text=hear) if streamed else provider.send(body, 20))
    error = one["response_body"]["error"]
    assert caught.value.status == one["status"]
    assert caught.value.code == (error.get("code") or error["type"])
    assert caught.value.retryable is False
    assert caught.value.retry_after is None
    assert error["message"].split("sk-")[0] in str(caught.value)
    assert len(server.arrived) == 1 and heard == []
    assert server.arrived[0]["digest"] == common.digest(sent(one, body, streamed))
    if "x-request-id" in one["response_headers"]:
        assert caught.value.request_id == one["response_headers"]["x-request-id"]


class _Poll(BaseHTTPRequestHandler):
    """Answers a GET with what was recorded for it."""

    one: dict[str, Any]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = json.dumps(self.one["response_body"]).encode()
        self.send_response(self.one["status"])
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("one", POLLS, **named)
async def test_a_recorded_poll_is_read_as_it_was_recorded(one: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    handler = type("Handler", (_Poll,), {"one": one, "asked": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        sdk = await common.client(common.Server("openai", openai.make_client, "openai"))
        key = one["endpoint"].rpartition("/")[2].partition("?")[0]
        answer = await sdk.responses.with_raw_response.retrieve(key, stream=False)
        parts = openai.read(json.loads(answer.http_response.content))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert handler.asked == [one["endpoint"]]
    was = recorded(one)
    assert (parts.text, parts.finish_reason, parts.items) == (was.text, was.finish, was.items)
    assert calls_of("responses", parts.items) == was.calls
    assert dataclasses.astuple(parts.usage)[:4] == (was.read, was.wrote, was.cached, was.reasoned)
    assert (parts.failure is not None) == (was.finish in ("queued", "in_progress"))


@pytest.mark.parametrize("one", BESIDE, **named)
async def test_an_api_that_agentflow_does_not_speak_passes_its_clients_and_its_one_way_to_post(
    one: dict[str, Any],
    serve: Any,
) -> None:
    served = serve(one)
    body = one["request_body"]
    if one["provider"] == "anthropic":
        server = common.Server("anthropic", anthropic.make_client, "anthropic")
        sdk = await common.client(server)
        create = sdk.messages.with_raw_response.count_tokens
        more = {"model": body["model"], "messages": body["messages"]}
    else:
        server = common.Server("openai", openai.make_client, "openai")
        sdk = await common.client(server)
        compact = one["surface"] == "responses_compact"
        create = (
            sdk.responses.with_raw_response.compact if compact else sdk.responses.input_tokens.with_raw_response.count
        )
        more = {"model": body["model"]}
    read = providers.get(one["provider"]).read
    raw = await common.post(server, lambda: create(**more, extra_body=body), read, body, 20)
    assert raw["body"] == one["response_body"]
    assert served.arrived[0]["digest"] == common.digest(body)
    if one["surface"] == "responses_compact":
        usage = one["response_body"]["usage"]
        assert (raw["usage"]["input_tokens"], raw["usage"]["output_tokens"]) == (
            usage["input_tokens"],
            usage["output_tokens"],
        )
        assert read(raw["body"]).items == one["response_body"]["output"]
    else:
        assert isinstance(raw["body"]["input_tokens"], int)
        assert raw["cost"] is None


def test_the_reading_of_this_file_gives_the_sums_of_the_recordings() -> None:
    """So that expected and actual cannot be empty together; those of the replies in one piece were counted with jq."""
    found = {one["id"]: recorded(one) for one in POSTS if one["status"] == 200}
    assert Counter(one.finish for one in found.values()) == {
        **{"stop": 54, "tool_calls": 27, "length": 4, "refusal": 4},
        **{"queued": 3, "pause_turn": 1},
    }
    whole = [found[one["id"]] for one in POSTS if one["id"] in found and isinstance(one["response_body"], dict)]
    assert (sum(len(one.calls) for one in whole), sum(len(one.text) for one in whole)) == (29, 14083)
    assert (sum(one.read for one in whole), sum(one.wrote for one in whole)) == (443474, 7110)
    assert (sum(one.cached for one in whole), sum(one.reasoned for one in whole)) == (19439, 2262)
    streamed = [one for one in found.values() if one not in whole]
    assert (sum(len(one.calls) for one in streamed), sum(len(one.text) for one in streamed)) == (11, 3444)
    assert (sum(one.read for one in streamed), sum(one.wrote for one in streamed)) == (9787, 1617)
    assert (sum(one.cached for one in streamed), sum(one.kept for one in streamed)) == (1165, 1165)
