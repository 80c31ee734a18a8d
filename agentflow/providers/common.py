"""What the providers share: the neutral question, the parts of an answer, clients, errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Protocol

from agentflow import ledger, network
from agentflow.errors import ModelError, UsageError
from agentflow.files import File
from agentflow.models import Raw, Usage
from agentflow.providers import streams

DEFAULT_TIMEOUT = 600.0
OnText = Callable[[str], Awaitable[None]]
_NEVER_RETRIED = {400, 401, 402, 403, 404, 413, 422}
_RETRIED = {408, 409, 425, 429}
_RETRIED_CODES = {"server_error", "rate_limit_exceeded", "overloaded_error", "api_error", "rate_limit_error", "timeout"}
_KEY = re.compile(r"\b(sk-[A-Za-z0-9_*-]{6,})")


class Offered(Protocol):
    """A tool as a provider is told of it; ``strict``: whether ``parameters`` has OpenAI's strict form."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def parameters(self) -> dict[str, Any]: ...
    @property
    def strict(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Ask:
    """One question, in no provider's words. ``messages`` hold no system message; it is in ``system``."""

    model: str
    messages: list[dict[str, Any]]
    system: str | None = None
    output: Any = None  # schema.Output: None asks for text
    max_tokens: int | None = None
    temperature: float | None = None
    reasoning: str | dict[str, Any] | None = None
    files: tuple[File, ...] = ()
    tools: tuple[Offered, ...] = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """An answer, in no provider's words.

    ``items`` are the provider's own, to be sent back word for word in the next turn. ``calls`` are the
    tools it asks for: ``id``, ``name`` and ``arguments``, JSON text or an object. ``failure`` is
    set when the provider reports, under a status of 200, that the call failed. ``searches`` is what the
    provider searched by itself and charges for; without ``standard_price`` no published price holds.
    """

    text: str
    refusal: str | None
    finish_reason: str
    usage: Usage
    model: str
    items: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    failure: ModelError | None = None
    standard_price: bool = True
    searches: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Server:
    """Where a call goes: the name it is recorded under, and how to make an SDK client for it.

    ``prices`` is the name its published prices are found under, ``""`` where none are. ``key`` is what
    tells one client from another besides the environment of the provider's own SDK.
    """

    name: str
    make: Callable[[Any], Any]
    prices: str
    key: Any = None


asking: ContextVar[str | None] = ContextVar("asking", default=None)  # the provider a POST is made for


class Spanned:
    """A request that has a span of ours. ``first_chunk``: when a streamed answer began, by ``time.perf_counter``."""

    __slots__ = ("first_chunk",)

    def __init__(self) -> None:
        self.first_chunk: float | None = None


# The request that is made here, if it has a span: an SDK that makes spans by itself then makes none beside it.
spanned: ContextVar[Spanned | None] = ContextVar("spanned", default=None)

_addresses: dict[str, str] = {}

_transport: Any = None


def use_transport(transport: Any) -> Any:
    """Sends all model calls of this process through ``transport``, below the SDKs.

    Args:
        transport: an ``httpx2.AsyncBaseTransport`` such as ``httpx2.MockTransport``; None goes back
            to the network. With a transport in place no API key is needed.

    Returns:
        The transport that was in place before, to be put back.
    """
    global _transport
    before, _transport = _transport, transport
    return before


def transport() -> Any:
    """The transport that :func:`use_transport` put in place, or None."""
    return _transport


_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, tuple[Any, AsyncGenerator[None]]]]
_clients = weakref.WeakKeyDictionary()
_clients_lock = threading.Lock()


async def client(server: Server) -> Any:
    """The SDK client of this event loop, made by ``server.make(transport)`` when there is none yet.

    One client serves all calls of a loop as long as transport and environment stay the same. It is
    closed when the loop shuts its asynchronous generators down, as ``asyncio.run`` does.

    Raises:
        UsageError: no key, or a host that ``AGENTFLOW_MODEL_HOSTS`` does not allow.
    """
    prefix = server.name.split("-")[0].upper() + "_"
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(prefix)))
    key = (server.name, server.key, _transport, environment, spanned.get() is not None)
    loop = asyncio.get_running_loop()
    with _clients_lock:
        known = _clients.setdefault(loop, {})
    if key not in known:
        made = server.make(_transport)
        closer = _close_with_loop(known, key, made)
        known[key] = (made, closer)
        await anext(closer)
    found = known[key][0]
    _addresses[server.name] = str(found.base_url)
    if _transport is None:
        network.check(server.name, str(found.base_url))
    return found


def address(provider: str) -> str | None:
    """Where the last request to a provider went: the base URL of its client; None before there was one."""
    return _addresses.get(provider)


async def _close_with_loop(known: dict[Any, Any], key: Any, made: Any) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        known.pop(key, None)
        await made.close()


def now() -> str:
    """This moment as it is recorded."""
    return datetime.now(UTC).isoformat()


def digest(body: dict[str, Any]) -> str:
    """What tells one body from another."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


async def post(
    server: Server,
    call: Callable[[], Any],
    read: Callable[[dict[str, Any]], Parts],
    body: dict[str, Any],
    timeout: float | None,
    *,
    whole: streams.Whole | None = None,
    on_text: OnText | None = None,
) -> Raw:
    """Makes one request through the SDK and gives the reply as it is to be recorded.

    Args:
        server: whom to ask.
        call: makes the request (a POST, but for a call in the background that is looked at): the SDK's raw
            response, or with ``whole`` its context manager of a stream.
        read: the provider's ``read``.
        body: what is asked, without what only says that it is streamed.
        timeout: seconds for the request and all of its answer, without those that ``on_text`` takes.
        whole: puts a streamed reply together.
        on_text: given each piece of text as it arrives.

    Raises:
        ModelError: no answer came, or one with an error status.
    """
    import httpx2

    provider = server.name
    token = asking.set(provider)
    answer: Any = None
    try:
        async with asyncio.timeout(timeout) as limit:
            if whole is None:
                answer = (await call()).http_response
            else:
                opened: Any = call()
                async with opened as response:
                    answer = response.http_response
                    await _listen(provider, answer, whole, _untimed(on_text or _ignore, limit))
    except TimeoutError as exc:
        if not _complete(whole):
            raise _partly(
                ModelError(
                    f"{provider}: no answer within {timeout or DEFAULT_TIMEOUT:g} s (timeout=); the provider may have "
                    "charged for it.",
                    code="timeout",
                    retryable=True,
                ),
                whole,
            ) from exc
    except Exception as exc:
        if not _complete(whole):
            error = _partly(_failed(provider, exc, httpx2), whole)
            if error is exc:
                raise
            raise error from exc
    finally:
        asking.reset(token)
    content: Any
    if whole is not None and whole.done:
        content = whole.body()
    else:
        try:
            content = json.loads(answer.content)
        except ValueError:
            content = answer.text
    parts = read(content) if isinstance(content, dict) else None
    usage = parts.usage if parts else Usage()
    model = (parts.model if parts else "") or body["model"]
    cost: Decimal | None = None
    facts: dict[str, Any] = {}
    if parts and parts.standard_price and (usage.input_tokens or usage.output_tokens):
        cost, facts = ledger.price(server.prices, model, usage, asked=body["model"], searches=parts.searches)
    return {
        "provider": provider,
        "status": answer.status_code,
        "body": content,
        "request_id": _request_id(answer.headers),
        "usage": asdict(usage),
        "cost": None if cost is None else str(cost),
        "price": facts,
        "model": model,
        "at": now(),
        "asked": digest(body),
    }


async def fetch(server: Server, call: Callable[[], Awaitable[Any]], timeout: float) -> Any:
    """Makes one request that brings no model's reply, through the SDK: its HTTP response.

    Args:
        server: whom to ask.
        call: makes the request: the SDK's raw response, or the HTTP response itself.
        timeout: seconds for the request and all of its answer.

    Raises:
        ModelError: no answer came, or one with an error status.
    """
    import httpx2

    token = asking.set(server.name)
    try:
        async with asyncio.timeout(timeout):
            answer = await call()
        return getattr(answer, "http_response", answer)
    except TimeoutError as exc:
        raise ModelError(f"{server.name}: no answer within {timeout:g} s", code="timeout", retryable=True) from exc
    except Exception as exc:
        error = _failed(server.name, exc, httpx2)
        if error is exc:
            raise
        raise error from exc
    finally:
        asking.reset(token)


async def create(
    server: Server,
    api: Any,
    required: dict[str, Any],
    body: dict[str, Any],
    timeout: float | None,
    read: Callable[[dict[str, Any], str], Parts],
    whole: type[streams.Whole],
    streamed: dict[str, Any],
    on_text: OnText | None,
    allowed: float | None = None,
) -> Raw:
    """One POST to an API of the SDK that generates, streamed where someone listens.

    Args:
        server: whom to ask.
        api: the SDK's resource, such as ``sdk.responses``.
        required: what its ``create`` wants by name; the body is sent as it is all the same.
        body: what is asked.
        timeout: seconds for the POST and all of its answer; None for ``allowed``.
        read: the provider's ``read``.
        whole: puts a streamed reply together.
        streamed: what in a body says that it is streamed.
        on_text: given each piece of text; None does not stream.
        allowed: seconds that the SDK waits without a ``timeout``; None for ten minutes.
    """
    listening = on_text is not None
    methods = api.with_streaming_response if listening else api.with_raw_response
    sent = {**body, **streamed} if listening else body

    def call() -> Any:
        return methods.create(**required, extra_body=sent, timeout=timeout or allowed or DEFAULT_TIMEOUT)

    return await post(
        server,
        call,
        lambda content: read(content, server.name),
        body,
        timeout,
        whole=whole() if listening else None,
        on_text=on_text,
    )


async def _ignore(text: str) -> None:
    pass


def _untimed(on_text: OnText, limit: asyncio.Timeout) -> OnText:
    """``on_text`` with the clock stopped: a slow listener must not fail a call that is being paid for."""
    clock = asyncio.get_running_loop().time

    async def heard(text: str) -> None:
        due, began = limit.when(), clock()
        limit.reschedule(None)
        await on_text(text)
        if due is not None:
            limit.reschedule(due + clock() - began)

    return heard


async def _listen(provider: str, answer: Any, whole: streams.Whole, on_text: OnText) -> None:
    """Reads a stream to the event that ends it; a server that does not stream is read as it answers."""
    if "text/event-stream" not in answer.headers.get("content-type", ""):
        await answer.aread()
        return
    events = streams.Events()
    request = spanned.get()
    async for chunk in answer.aiter_bytes():
        for data in events.feed(chunk):
            if request is not None and request.first_chunk is None:
                request.first_chunk = time.perf_counter()
            try:
                text = whole.take(data)
            except (ValueError, TypeError, AttributeError) as exc:
                raise ModelError(
                    f"{provider}: an event of the stream cannot be read: {data[:200]!r}",
                    status=answer.status_code,
                    code="broken_stream",
                    retryable=True,
                ) from exc
            if text:
                await on_text(text)
            if whole.error is not None:
                raise reported_failure(provider, whole.error)
            if whole.done:
                return
    whole.finish()
    if not whole.done:
        raise ModelError(
            f"{provider}: the stream ended before the reply was complete.",
            status=answer.status_code,
            code="incomplete_stream",
            retryable=True,
            request_id=_request_id(answer.headers),
        )


def _complete(whole: streams.Whole | None) -> bool:
    """Whether the answer had come whole before its connection broke or hung: it is paid for, so it is kept."""
    if whole is None or whole.error is not None:
        return False
    whole.finish()
    return whole.done


def _partly(error: Any, whole: streams.Whole | None) -> Any:
    """The error with what a broken stream had brought, for the record."""
    if whole is not None and isinstance(error, ModelError):
        error.__dict__["came"] = whole.body()
    return error


def _failed(provider: str, exc: Exception, httpx2: Any) -> Exception:
    """The SDK's exception as a ModelError. What is no answer and no broken connection stays what it is."""
    if isinstance(exc, ModelError):
        return exc
    response = getattr(exc, "response", None)
    if response is not None:
        body = getattr(exc, "body", None)
        return status_error(provider, response.status_code, response.headers, body, response.text)
    cause: Any = exc if isinstance(exc, httpx2.HTTPError) else exc.__cause__
    if not isinstance(cause, httpx2.HTTPError | OSError):
        # The SDKs call everything a connection error, a bug in a transport included.
        return cause if isinstance(cause, Exception) else exc
    late = isinstance(cause, httpx2.TimeoutException | TimeoutError)
    what = "no answer in time" if late else "no connection, or it broke"
    detail = f": {cause}" if str(cause) else ""
    return ModelError(f"{provider}: {what}{detail}", code="timeout" if late else "connection_error", retryable=True)


def status_error(provider: str, status: int, headers: Any, body: Any, text: str = "") -> ModelError:
    """The error for an answer with an error status: says what the provider said, and whether to retry."""
    error = body.get("error", body) if isinstance(body, dict) else {}
    error = error if isinstance(error, dict) else {"message": str(error)}
    code = error.get("code") or error.get("type")
    code = None if code is None else str(code)
    message = str(error.get("message") or text[:500] or "no message")
    retryable = status in _RETRIED or (status >= 500 and status not in _NEVER_RETRIED)
    wanted = headers.get("x-should-retry")
    if wanted in ("true", "false"):
        retryable = wanted == "true"
    if "insufficient_quota" in (code, error.get("type")):
        retryable = False
    return ModelError(
        _KEY.sub("[key]", f"{provider}: {status} {code or ''} {message}".replace("  ", " ")),
        status=status,
        code=code,
        retryable=retryable,
        retry_after=retry_after(headers),
        request_id=_request_id(headers),
    )


def _request_id(headers: Any) -> str | None:
    found: str | None = headers.get("x-request-id") or headers.get("request-id")
    return found


def reported_failure(provider: str, error: Any) -> ModelError:
    """The error for a failure that the provider reported with a status of 200."""
    error = error if isinstance(error, dict) else {}
    code = str(error.get("code") or error.get("type") or "failed")
    message = _KEY.sub("[key]", str(error.get("message") or "the provider reported a failure"))
    names = {code, str(error.get("type"))}
    # OpenRouter writes the status that the call would have had.
    status = int(code) if code.isdecimal() and len(code) == 3 else 0
    retryable = bool(names & _RETRIED_CODES) or status in _RETRIED or status >= 500
    if "insufficient_quota" in names:
        retryable = False
    return ModelError(f"{provider}: {code} {message}", status=200, code=code, retryable=retryable)


def retry_after(headers: Any) -> float | None:
    """Seconds the server asks to wait, from either spelling; None where it does not say."""
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            value = float(headers.get(name, "")) / divisor
        except ValueError:
            continue
        if 0 <= value < float("inf"):
            return value
    import email.utils

    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    if date is None:
        return None
    return max(0.0, email.utils.mktime_tz(date) - time.time())


def count(usage: Any, *path: str) -> int:
    """The number at ``path`` in a provider's usage, 0 where there is none."""
    for name in path:
        usage = usage.get(name) if isinstance(usage, dict) else None
    return usage if isinstance(usage, int) else 0


def refuse_foreign(provider: str, messages: list[dict[str, Any]], own: Callable[[dict[str, Any]], bool]) -> None:
    """Refuses messages in another provider's words, which the API would refuse less clearly.

    Raises:
        UsageError: names the first of them.
    """
    for index, message in enumerate(messages):
        if not own(message):
            raise UsageError(
                f"prompt[{index}] is no message that {provider} takes: {str(message)[:80]}. Messages of another "
                'provider cannot be sent on word for word; use {"role": "assistant", "content": reply.text}.'
            )


def holds(message: dict[str, Any], *kinds: str) -> bool:
    """Whether the content has a part of one of these types."""
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(part, dict) and part.get("type") in kinds for part in content)


def effort(provider: str, reasoning: Any) -> str:
    """``reasoning`` where only a word is possible."""
    if not isinstance(reasoning, str):
        raise UsageError(f'reasoning={reasoning!r}: {provider} takes a word here, such as reasoning="low".')
    return reasoning
