"""For tests: a model with scripted replies in the providers' own JSON, answered below the real SDKs, and a clock."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agentflow import schema
from agentflow.batchserver import EXPIRED, BatchServer
from agentflow.errors import ContentFiltered, ModelError, Refused, Truncated, UsageError
from agentflow.models import Request
from agentflow.providers.common import asking, digest, transport, use_transport
from agentflow.redact import redact
from agentflow.scripted import NOTHING, Billed, Script, When, bill, shown, when

if TYPE_CHECKING:
    from agentflow.clock import FakeClock
    from agentflow.crashes import crash_points
    from agentflow.histories import export_history, replay_histories
    from agentflow.people import FakePeople, Reject, event
    from agentflow.recordings import NotRecorded, Recording
    from agentflow.replies import export_recording

__all__ = [
    "Billed",
    "FakeClock",
    "FakeModel",
    "FakePeople",
    "NotRecorded",
    "Recording",
    "Reject",
    "ToolCall",
    "When",
    "crash_points",
    "event",
    "export_history",
    "export_recording",
    "replay_histories",
    "reply_body",
    "request_of",
    "sse",
    "when",
]

# Found here, kept in modules of their own, loaded when they are first used.
_HOME = {
    "FakeClock": "clock",
    "FakePeople": "people",
    "NotRecorded": "recordings",
    "Recording": "recordings",
    "Reject": "people",
    "crash_points": "crashes",
    "event": "people",
    "export_history": "histories",
    "export_recording": "replies",
    "replay_histories": "histories",
}

_SURFACES = {"/responses": ("openai", "responses"), "/completions": ("openai-chat", "chat")}
_LENGTH = {"responses": "max_output_tokens", "chat": "length", "messages": "max_tokens"}

# https://platform.claude.com/docs/en/api/errors
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class ToolCall:
    """A call of a tool that the model asks for: ``ToolCall("look_up", city="Oslo")``.

    Args:
        name: the tool's name.
        arguments: a dict, or text that is sent as it is, such as broken JSON (which Anthropic's API cannot hold).
            None: the keyword arguments.
        call_id: the provider's id of the call. None: one made from the request and the call's place in the reply, so
            that it is the same after a restart.
        named: the arguments, by name.
    """

    def __init__(self, name: str, arguments: Any = None, /, *, call_id: str | None = None, **named: Any) -> None:
        self.name = name
        self.arguments = named if arguments is None else arguments
        self.call_id = call_id

    @property
    def text(self) -> str:
        """The arguments as the model writes them."""
        arguments = self.arguments
        return arguments if isinstance(arguments, str) else json.dumps(schema.plain(arguments, "arguments"))

    def __repr__(self) -> str:
        return f"ToolCall({self.name!r}, {self.arguments!r})"


class FakeModel:
    """Answers all model calls of the process while it is entered; no key and no network is needed.

    The real SDKs run and the replies have the providers' shape, so what is tested is what runs.

    Args:
        replies: one for each call, in the order in which they arrive; among them ``when(condition, reply)`` for
            the requests that fit the condition, whenever they come (branches of a fan-out have no order). Or a
            dict from a text to the reply for all requests whose last message holds it. Or one function that
            answers all of them. A reply is text; a value (model, dict, list, number), sent as JSON text; a
            provider's reply as a dict, sent as it is; an HTTP status or a ``ModelError`` to fail
            with; a ``ToolCall``, or a list of texts and tool calls made at once;
            ``Truncated("text so far")``, ``Refused(...)``, ``ContentFiltered(...)``; a
            ``ConnectionError`` or ``TimeoutError``; or a function, also async, that is given the
            request and returns any of these.
        delay: seconds before each answer.
        all_used: False lets replies be left over, as in a test that a second call never comes.
        polls: how often a call in the background, or a batch, is looked at before it has ended. None: it never ends.

    A batch uses one reply for each of its requests; an error among them fails that request, and ``TimeoutError`` lets
    it expire. What is in flight is known to this FakeModel alone: start and go on within one ``with`` block.
    ``embed`` needs no replies: vectors are made from the texts, and ``embedded`` lists what each request asked.
    ``calls`` lists the requests that arrived, each with the ``status`` and ``reply`` it was answered with;
    ``billed`` those that a provider would have charged for, with usage and cost. A call without a reply left
    fails with status 400, and leaving the block fails too, so that it is seen even if the code under test
    swallowed it; so does a reply that nobody asked for. Both show what it was about.

    >>> import asyncio
    >>> from agentflow.providers import openai
    >>> with FakeModel(["Hello!"]) as model:
    ...     raw = asyncio.run(openai.send({"model": "gpt-5-mini", "input": "Hi"}, timeout=None))
    >>> openai.read(raw["body"]).text, model.calls[0]["text"]
    ('Hello!', 'Hi')
    """

    def __init__(
        self,
        replies: Sequence[Any] | Mapping[str, Any] | Callable[[Request], Any],
        *,
        delay: float = 0,
        all_used: bool = True,
        polls: int | None = 1,
    ) -> None:
        if isinstance(replies, str | bytes) or not (callable(replies) or isinstance(replies, Sequence | Mapping)):
            raise UsageError('FakeModel takes a list of replies, a dict or a function: FakeModel(["Hello!"]).')
        self.replies = replies if callable(replies) or isinstance(replies, Mapping) else list(replies)
        self.delay = delay
        self.all_used = all_used
        self.polls = polls
        self.calls: list[Request] = []
        self.embedded: list[list[str]] = []
        self.unexpected: list[Request] = []
        self._script = Script(replies)
        self._before: Any = None
        self._mock: Any = None
        self._flights: dict[str, list[Any]] = {}  # id of a call in the background: its reply, and looks that are left
        self._batches = BatchServer(polls)

    def __enter__(self) -> FakeModel:
        import httpx2

        self._mock = httpx2.MockTransport(self._answer)
        self._before = use_transport(self._mock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None:
            self.check()

    def start(self) -> FakeModel:
        """Answer from here on until ``stop()``, where a ``with`` block cannot stand: in the cells of a notebook."""
        return self if self._mock is not None and transport() is self._mock else self.__enter__()

    def stop(self) -> None:
        """Undo ``start()``: calls go where they went before. ``check()`` tells whether they were those expected."""
        if self._mock is not None:
            use_transport(self._before)
            self._mock = None

    def check(self) -> None:
        """Fail if a call came that no reply was given for, or a reply was given that no call came for.

        Leaving the ``with`` block does this.

        Raises:
            AssertionError: shows the request, or the replies.
        """
        if self.unexpected:
            raise AssertionError(self._too_many(self.unexpected[0]))
        if self.all_used and (unused := self._script.unused()):
            asked = (
                "\n".join(f"  asked: {redact(call['text'])[:80]!r}" for call in self.calls[-5:])
                or "  nothing was asked"
            )
            raise AssertionError(
                f"FakeModel: {len(unused)} of its replies were not asked for, "
                f"{len(self.calls)} calls came:\n" + "".join(f"  not used: {one}\n" for one in unused[:5]) + asked
            )

    @property
    def remaining(self) -> int:
        """How many scripted replies were not asked for."""
        return len(self._script.unused())

    @property
    def billed(self) -> list[Billed]:
        """The calls a provider would have charged for, in the order they arrived: request, usage, cost in dollars."""
        return [found for call in self.calls if (found := bill(call)) is not None]

    async def _answer(self, request: Any) -> Any:
        import httpx2

        path, content = request.url.path, await request.aread()
        if path.endswith("/embeddings"):
            return httpx2.Response(200, json=self._embedded(json.loads(content)))
        if (about_batches := await self._batch(request, content)) is not None:
            status, body = about_batches
            return httpx2.Response(status, text=body) if isinstance(body, str) else httpx2.Response(status, json=body)
        if request.method == "GET":
            return self._look(path.rpartition("/")[2])
        if path.endswith("/cancel"):
            return self._cancel(path.split("/")[-2])
        asked = request_of(path, json.loads(content))
        try:
            status, headers, body = await self._reply(asked)
        except TimeoutError as late:
            raise httpx2.ReadTimeout(str(late) or "timed out", request=request) from None
        except ConnectionError as broken:
            raise httpx2.ConnectError(str(broken) or "connection refused", request=request) from None
        headers = {"x-request-id": f"req_fake_{len(self.calls)}", **headers}
        if status == 200 and asked["body"].get("background"):
            self._flights[body["id"]] = [body, self.polls]
            body = {**body, "status": "queued", "background": True, "output": [], "usage": None}
        if status == 200 and asked["body"].get("stream"):
            text = sse(asked, body)
            return httpx2.Response(status, headers={"content-type": "text/event-stream", **headers}, text=text)
        return httpx2.Response(status, headers=headers, json=body)

    async def _reply(self, asked: Request) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Status, headers and body for the next request; raises what breaks its connection."""
        asked["provider"] = asking.get() or asked["provider"]
        self.calls.append(asked)
        number = len(self.calls)
        reply: Any = self._script.take(asked)
        if reply is NOTHING:
            self.unexpected.append(asked)
            reply = ModelError(self._too_many(asked), status=400, code="unexpected_call")
        if self.delay:
            await asyncio.sleep(self.delay)
        if callable(reply) and not isinstance(reply, type):
            reply = reply(asked)
            if inspect.isawaitable(reply):
                reply = await reply
        if isinstance(reply, TimeoutError | ConnectionError):
            raise reply
        status, headers, answer = _response(asked, reply, number)
        asked |= {"status": status, "reply": answer}
        return status, headers, answer

    def _look(self, ident: str) -> Any:
        """A call in the background as it is now."""
        import httpx2

        flight = self._flights.get(ident)
        if flight is None:
            return httpx2.Response(404, json={"error": {"message": f"no response {ident!r}", "code": "not_found"}})
        body, left = flight
        if left == 0:
            return httpx2.Response(200, json=body)
        flight[1] = left and left - 1
        return httpx2.Response(200, json={**body, "status": "in_progress", "output": [], "usage": None})

    def _cancel(self, ident: str) -> Any:
        """A call in the background that is cancelled; one that has ended stays as it is."""
        flight = self._flights.get(ident)
        if flight is not None and flight[1] != 0:
            flight[:] = [{**flight[0], "status": "cancelled", "output": [], "usage": None}, 0]
        return self._look(ident)

    async def _batch(self, request: Any, content: bytes) -> tuple[int, Any] | None:
        """The answer to a request about batches, each request inside one answered by a reply of its own."""
        method, path = request.method, request.url.path
        results: dict[str, tuple[int, dict[str, Any]]] = {}
        for custom_id, address, body in self._batches.requests(method, path, content):
            try:
                status, _, answer = await self._reply(request_of(address, body))
                results[custom_id] = status, answer
            except TimeoutError:
                results[custom_id] = EXPIRED
            except ConnectionError as broken:
                results[custom_id] = 500, {"error": {"type": "api_error", "message": str(broken)}}
        kind = request.headers.get("content-type", "")
        return self._batches.handle(method, path, kind, content, lambda custom_id, *_: results[custom_id])

    def _embedded(self, body: dict[str, Any]) -> dict[str, Any]:
        """Vectors made from the texts: equal texts get equal ones. They use up no reply."""
        self.embedded.append(list(body["input"]))
        vectors = [_made_up_vector(text, body.get("dimensions") or 8) for text in body["input"]]
        data = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
        tokens = max(1, sum(map(len, body["input"])) // 4)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": body["model"], "data": data[::-1], "usage": usage}

    def _too_many(self, asked: Request) -> str:
        return (
            f"FakeModel: unexpected call {len(self.calls)}, only {self._script.count} replies were given "
            f"({asked['provider']}:{asked['model']}, {redact(asked['text'])[:80]!r}). The request:\n{shown(asked)}"
        )


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"agentflow.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _made_up_vector(text: str, dimensions: int) -> list[float]:
    return [hashlib.sha256(f"{at}:{text}".encode()).digest()[0] / 255 for at in range(dimensions)]


def request_of(path: str, body: dict[str, Any]) -> Request:
    """The request that a POST to ``path`` makes."""
    provider, surface = _SURFACES.get("/" + path.rpartition("/")[2], ("anthropic", "messages"))
    messages = body.get("input" if surface == "responses" else "messages")
    return {
        "provider": provider,
        "model": str(body.get("model")),
        "surface": surface,
        "body": body,
        "text": _last_text(messages),
    }


def reply_body(
    asked: Request,
    text: str,
    *,
    finish: str = "stop",
    refusal: str | None = None,
    number: int = 1,
    calls: Sequence[ToolCall] = (),
) -> dict[str, Any]:
    """A reply in the JSON of the provider that was asked.

    Args:
        asked: the request.
        text: the model's answer.
        finish: ``stop``, ``length`` or ``content_filter``.
        refusal: words of a refusal, instead of an answer.
        number: makes the ids differ.
        calls: tools that the model asks for.

    Usage is made up: a token for every four characters.
    """
    read = max(1, len(json.dumps(asked["body"])) // 4)
    wrote = max(1, (len(text or refusal or "") + sum(len(call.text) for call in calls)) // 4)
    make = {"responses": _responses, "chat": _chat}.get(asked["surface"], _anthropic)
    reason = _LENGTH[asked["surface"]] if finish == "length" else finish
    body = make(asked["model"], text, reason, refusal, number, read, wrote)
    if calls:
        _add_calls(asked, body, text, calls)
    return body


def _add_calls(asked: Request, body: dict[str, Any], text: str, calls: Sequence[ToolCall]) -> None:
    """Puts calls of tools into a reply, in the provider's own form."""
    mark = digest(asked["body"])[:16]
    ids = [call.call_id if call.call_id is not None else f"call_{mark}_{at}" for at, call in enumerate(calls)]
    if asked["surface"] == "responses":
        items = [
            {"id": f"fc_{ident}", "type": "function_call", "status": "completed", "call_id": ident, "name": call.name,
             "arguments": call.text}
            for ident, call in zip(ids, calls, strict=True)
        ]  # fmt: skip
        body["output"] = [*(body["output"] if text else []), *items]
    elif asked["surface"] == "chat":
        choice = body["choices"][0]
        choice["finish_reason"] = "tool_calls"
        choice["message"]["content"] = text or None
        choice["message"]["tool_calls"] = [
            {"id": ident, "type": "function", "function": {"name": call.name, "arguments": call.text}}
            for ident, call in zip(ids, calls, strict=True)
        ]
    else:
        body["stop_reason"] = "tool_use"
        body["content"] = [*(body["content"] if text else [])] + [
            {"type": "tool_use", "id": ident.replace("call_", "toolu_", 1), "name": call.name,
             "input": json.loads(call.text)}
            for ident, call in zip(ids, calls, strict=True)
        ]  # fmt: skip


def sse(asked: Request, body: dict[str, Any]) -> str:
    """A reply as the provider streams it: server-sent events, text in pieces of a few characters."""
    events = {"responses": _responses_events, "chat": _chat_events}.get(asked["surface"], _anthropic_events)(body)
    lines = []
    for event in events:
        if "type" in event:
            lines.append(f"event: {event['type']}\n")
        lines.append(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")
    return "".join(lines) + ("data: [DONE]\n\n" if asked["surface"] == "chat" else "")


def _pieces(text: Any) -> list[str]:
    text = str(text or "")
    return [text[at : at + 5] for at in range(0, len(text), 5)]


def _responses_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    started = {**body, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": started}]
    for number, item in enumerate(body.get("output") or []):
        place = {"output_index": number, "item_id": item.get("id")}
        events.append({"type": "response.output_item.added", "output_index": number, "item": {**item, "content": []}})
        for index, part in enumerate(item.get("content") or []):
            where = {**place, "content_index": index}
            word = "output_text" if part.get("type") == "output_text" else "refusal"
            for piece in _pieces(part.get("text") or part.get("refusal")):
                events.append({"type": f"response.{word}.delta", **where, "delta": piece})
        events.append({"type": "response.output_item.done", "output_index": number, "item": item})
    events.append({"type": f"response.{body.get('status') or 'completed'}", "response": body})
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _chat_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    head = {name: value for name, value in body.items() if name not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    events: list[dict[str, Any]] = []
    for choice in body.get("choices") or []:
        message = choice["message"]
        rest = {name: value for name, value in message.items() if name != "content"}
        if rest.get("tool_calls"):
            rest["tool_calls"] = [{"index": number, **one} for number, one in enumerate(rest["tool_calls"])]
        deltas = [{**rest, "content": None if message.get("content") is None else ""}]
        deltas += [{"content": piece} for piece in _pieces(message.get("content"))]
        for delta in deltas:
            piece = {"index": choice["index"], "delta": delta, "finish_reason": None}
            events.append({**head, "choices": [piece], "usage": None})
        last = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
        events.append({**head, "choices": [last], "usage": None})
    return [*events, {**head, "choices": [], "usage": body.get("usage")}]


def _anthropic_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    usage = body.get("usage") or {}
    started = {**body, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": started}, {"type": "ping"}]
    for index, block in enumerate(body.get("content") or []):
        empty = dict(block)
        deltas: list[dict[str, Any]] = []
        if block.get("type") == "text":
            empty["text"] = ""
            deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(block["text"])]
        elif block.get("type") == "tool_use":
            empty["input"] = {}
            deltas = [{"type": "input_json_delta", "partial_json": one} for one in _pieces(json.dumps(block["input"]))]
        elif block.get("type") == "thinking":
            empty.update(thinking="", signature="")
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _pieces(block["thinking"])]
            deltas.append({"type": "signature_delta", "signature": block.get("signature") or ""})
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    ended = {name: body[name] for name in ("stop_reason", "stop_sequence", "stop_details") if name in body}
    events.append({"type": "message_delta", "delta": ended, "usage": {"output_tokens": usage.get("output_tokens")}})
    return [*events, {"type": "message_stop"}]


def _responses(
    model: str, text: str, finish: str, refusal: str | None, number: int, read: int, wrote: int
) -> dict[str, Any]:
    content = {"type": "refusal", "refusal": refusal} if refusal else {"type": "output_text", "text": text}
    if not refusal:
        content["annotations"] = []  # type: ignore[assignment]
    return {
        "id": f"resp_fake_{number}",
        "object": "response",
        "created_at": 1_750_000_000,
        "status": "completed" if finish == "stop" else "incomplete",
        "incomplete_details": None if finish == "stop" else {"reason": finish},
        "error": None,
        "model": model,
        "output": [
            {
                "id": f"msg_fake_{number}",
                "type": "message",
                "role": "assistant",
                "status": "completed" if finish == "stop" else "incomplete",
                "content": [content],
            }
        ],
        "usage": {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": wrote,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + wrote,
        },
    }


def _chat(
    model: str, text: str, finish: str, refusal: str | None, number: int, read: int, wrote: int
) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if refusal else text,
        "refusal": refusal,
        "annotations": [],
    }
    return {
        "id": f"chatcmpl-fake-{number}",
        "object": "chat.completion",
        "created": 1_750_000_000,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": wrote,
            "total_tokens": read + wrote,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def _anthropic(
    model: str, text: str, finish: str, refusal: str | None, number: int, read: int, wrote: int
) -> dict[str, Any]:
    refused = refusal is not None or finish == "content_filter"
    stop = "refusal" if refused else {"stop": "end_turn"}.get(finish, finish)
    return {
        "id": f"msg_fake_{number}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text or refusal or ""}],
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {
            "input_tokens": read,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": wrote,
            "service_tier": "standard",
        },
    }


def _response(asked: Request, reply: Any, number: int) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body that stand for a scripted reply."""
    if isinstance(reply, Truncated):
        return 200, {}, reply_body(asked, str(reply), finish="length", number=number)
    if isinstance(reply, ContentFiltered):
        return 200, {}, reply_body(asked, str(reply), finish="content_filter", number=number)
    if isinstance(reply, Refused):
        return 200, {}, reply_body(asked, "", refusal=str(reply) or "I cannot help with that.", number=number)
    if isinstance(reply, ModelError):
        headers = {} if reply.retry_after is None else {"retry-after": f"{reply.retry_after:g}"}
        return _error(asked, reply.status or 500, str(reply), reply.code, headers)
    if isinstance(reply, int) and not isinstance(reply, bool) and 400 <= reply <= 599:
        return _error(asked, reply, f"scripted status {reply}", None, {})
    if isinstance(reply, BaseException | type):
        raise TypeError(f"FakeModel cannot answer with {reply!r}")
    if isinstance(reply, dict) and (reply.get("object") in ("response", "chat.completion") or "stop_reason" in reply):
        return 200, {}, reply
    parts = [reply] if isinstance(reply, ToolCall) else reply
    if isinstance(parts, list) and any(isinstance(part, ToolCall) for part in parts):
        calls = [part for part in parts if isinstance(part, ToolCall)]
        said = "".join(part for part in parts if isinstance(part, str))
        return 200, {}, reply_body(asked, said, number=number, calls=calls)
    return 200, {}, reply_body(asked, _text(asked, reply), number=number)


def _error(
    asked: Request, status: int, message: str, code: str | None, headers: dict[str, str]
) -> tuple[int, dict[str, str], dict[str, Any]]:
    if asked["surface"] == "messages":
        kind = code or _ERRORS.get(status, "api_error")
        return status, headers, {"type": "error", "error": {"type": kind, "message": message}}
    return status, headers, {"error": {"message": message, "type": code or "server_error", "param": None, "code": code}}


def _text(asked: Request, reply: Any) -> str:
    """What the model would have written: text as it is, a value as the JSON that was asked for."""
    if isinstance(reply, str):
        return reply
    value = schema.plain(reply, "reply")
    body = asked["body"]
    form = (body.get("text") or body.get("response_format") or body.get("output_config") or {}).get("format") or {}
    form = form or (body.get("response_format") or {}).get("json_schema") or {}
    properties = (form.get("schema") or {}).get("properties") or {}
    if list(properties) == ["value"] and not (isinstance(value, dict) and list(value) == ["value"]):
        value = {"value": value}
    return json.dumps(value, ensure_ascii=False)


def _last_text(messages: Any) -> str:
    if isinstance(messages, str):
        return messages
    for message in reversed(messages or []):
        if message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            return content
        parts = [part for part in content or [] if isinstance(part, dict)]
        if parts and all(part.get("type") == "tool_result" for part in parts):
            continue  # what tools gave, which one of the APIs puts into a message of the user's
        return "".join(str(part.get("text") or "") for part in parts)
    return ""
