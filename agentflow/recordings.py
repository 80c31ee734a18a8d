"""Recorded replies: real answers of providers, kept in a readable file and given again without a network.

A recording is found by content: the body of the request, without what only says that it is streamed, files by their
digest, secrets masked. Never by position, so a fan-out may ask in any order. Each recorded reply answers one request;
a program that asks twice what it had asked once is told so. Embeddings are found text by text, for which texts are sent
depends on what has been embedded before. What is asked in a batch is recorded, and found, call by call.

Secrets are masked in requests and replies before they are written, and the program gets the masked reply when it is
recorded too, so that both runs see the same.

Cassettes of vcrpy and pytest-recording are read as well (YAML needs PyYAML), never written.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from agentflow.background import ENDED
from agentflow.batchserver import BatchServer
from agentflow.errors import UsageError
from agentflow.providers import streams
from agentflow.providers.common import asking, use_transport
from agentflow.redact import redact, redact_value
from agentflow.replies import VERSION, plain_request, write
from agentflow.testing import request_of, sse

MODES = ("none", "once", "all")
_STARTS = ("responses", "chat", "messages", "embeddings")
_WHOLE: dict[str, Callable[[], streams.Whole]] = {
    "responses": streams.Responses,
    "chat/completions": streams.Chat,
    "messages": streams.Messages,
}
_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")
_LINES = 120


class NotRecorded(UsageError):
    """A request that no recording fits. Nothing was sent; the message shows the nearest one."""


class Recording:
    """Answers all model calls of the process from a file while it is entered.

    Args:
        path: the file; a ``.yaml``, or a ``.json`` with ``interactions``, is a cassette of vcrpy.
        mode: ``"none"`` asks nobody: a request that is not recorded is an error. ``"once"`` asks the providers what
            is not recorded yet, and pays for nothing else. ``"all"`` asks everything anew. What is asked is
            written at once, so a test that fails later has not lost it; error replies are not recorded.
        command: what to type to record what is missing; shown in errors.

    ``calls`` are the recorded calls, ``missing`` says what was asked and not found.
    """

    def __init__(self, path: str | os.PathLike[str], mode: str = "none", *, command: str | None = None) -> None:
        if mode not in MODES:
            raise UsageError(f"mode={mode!r}: one of {', '.join(MODES)}.")
        self.path = Path(path)
        self.mode = mode
        self.calls: list[dict[str, Any]] = []
        self.missing: list[str] = []
        self._command = command or f"with Recording({str(self.path)!r}, 'once'): ..."
        self._cassette = False
        self._used: set[int] = set()
        self._before: Any = None
        self._batches = BatchServer()
        if self.path.exists():
            self.calls, self._cassette = _load(self.path)
        if self._cassette and mode != "none":
            raise UsageError(
                f"{self.path} is a cassette of vcrpy: it is only read here. Record it with vcrpy, or export."
            )
        self._keys = [_key(call["endpoint"], call["request"]) for call in self.calls]
        self._old = len(self.calls) if mode == "all" else 0

    def __enter__(self) -> Recording:
        import httpx2

        self._before = use_transport(httpx2.MockTransport(self._answer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(complete=kind is None)

    def close(self, *, complete: bool) -> None:
        """Give the calls back to whom they went before.

        Args:
            complete: everything was asked that will be: where recording is allowed, replies that nobody
                asked for are removed from the file.
        """
        use_transport(self._before)
        if complete and not self.missing and self.mode != "none" and self.unused():
            self.calls = [call for number, call in enumerate(self.calls) if number in self._used]
            self._used = set(range(len(self.calls)))
            self._write()

    def unused(self) -> list[str]:
        """The recorded calls that nobody asked for, in words."""
        return [_words(call) for number, call in enumerate(self.calls) if number not in self._used]

    async def _answer(self, request: Any) -> Any:
        import httpx2

        content = await request.aread()
        if (about_batches := await self._batch(request, content)) is not None:
            status, reply = about_batches
            sent = {"text": reply} if isinstance(reply, str) else {"json": reply}
            return httpx2.Response(status, **sent)
        body = json.loads(content) if content else {}
        endpoint = _endpoint(request.method, request.url.path)
        streamed = bool(body.get("stream"))
        call = self._take(endpoint, body)
        if call is not None:
            return _response(call, body, streamed)
        flight = self._flight(endpoint)
        if flight is not None and flight["reply"].get("status") in ENDED:
            return _response(flight, body, streamed)
        if self.mode == "none":
            self.missing.append(self._not_found(endpoint, body))
            raise NotRecorded(self.missing[-1])
        if flight is not None:
            return await self._look(request, flight)
        return await self._record(request, endpoint, body, streamed)

    def _flight(self, endpoint: str) -> dict[str, Any] | None:
        """The recorded call in the background that a request looks at."""
        ident = endpoint.removeprefix("GET responses/") if endpoint.startswith("GET responses/") else ""
        replies = [call for call in self.calls if ident and isinstance(call["reply"], dict)]
        return next((call for call in replies[::-1] if call["reply"].get("id") == ident), None)

    async def _look(self, request: Any, flight: dict[str, Any]) -> Any:
        """Asks for a call in the background; once it has ended its reply is that of the request that submitted it."""
        import httpx2

        async with httpx2.AsyncClient(follow_redirects=True) as client:
            answer = await client.send(request)
        found = _content(answer, "responses") if answer.status_code == 200 else None
        if isinstance(found, dict) and found.get("status") in ENDED:
            flight["reply"] = redact_value(found)
            self._write()
            return _response(flight, {}, False)
        return _passed_on(answer)

    def _take(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The recorded call that answers a request, used up with this."""
        key = _key(endpoint, body)
        for number in range(self._old, len(self.calls)):
            if number not in self._used and self._keys[number] == key:
                self._used.add(number)
                return self.calls[number]
        if endpoint != "embeddings" or not isinstance(body.get("input"), list):
            return None
        known = self._vectors(body)
        if any(redact(str(text)) not in known for text in body["input"]):
            return None
        used = [known[redact(str(text))] for text in body["input"]]
        self._used |= {number for number, _ in used}
        return _embedded(self.calls, body, used)

    def _vectors(self, body: dict[str, Any]) -> dict[str, tuple[int, Any]]:
        """By its text, each vector of the model that is asked, and the number of the call that brought it."""
        kind = _key("embeddings", {**body, "input": []})
        found: dict[str, tuple[int, Any]] = {}
        for number in range(self._old, len(self.calls)):
            call = self.calls[number]
            texts = call["request"].get("input")
            if call["endpoint"] != "embeddings" or call["status"] != 200 or not isinstance(texts, list):
                continue
            if _key("embeddings", {**call["request"], "input": []}) == kind:
                entries = call["reply"]["data"]
                by_index = {entry.get("index", at): entry["embedding"] for at, entry in enumerate(entries)}
                found |= {text: (number, by_index[at]) for at, text in enumerate(texts) if text not in found}
        return found

    async def _batch(self, request: Any, content: bytes) -> tuple[int, Any] | None:
        """The answer to a request about batches; each request inside one is a call like any other."""
        method, path = request.method, request.url.path
        replies: dict[str, tuple[int, dict[str, Any]]] = {}
        used = set(self._used)
        try:
            for custom_id, address, body in self._batches.requests(method, path, content):
                replies[custom_id] = await self._one_of_batch(request, _endpoint("POST", address), body)
        except BaseException:
            self._used = used  # nobody got them: who hands the batch over again finds all that is recorded by now
            raise
        kind = request.headers.get("content-type", "")
        return self._batches.handle(method, path, kind, content, lambda custom_id, *_: replies[custom_id])

    async def _one_of_batch(self, request: Any, endpoint: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        call = self._take(endpoint, body)
        if call is not None:
            return call["status"], call["reply"]
        if self.mode == "none":
            self.missing.append(self._not_found(endpoint, body))
            raise NotRecorded(self.missing[-1])
        answer = await self._record(_alone(request, endpoint, body), endpoint, body, False)
        found = _content(answer, endpoint)
        return answer.status_code, found if isinstance(found, dict) else {"error": {"message": answer.text}}

    async def _record(self, request: Any, endpoint: str, body: dict[str, Any], streamed: bool) -> Any:
        import httpx2

        if endpoint == "embeddings" and isinstance(body.get("input"), list):
            known = self._vectors(body)
            missing = [text for text in body["input"] if redact(str(text)) not in known]
            if len(missing) < len(body["input"]):
                asked = {**body, "input": missing}
                answer = await self._record(_with_body(request, asked), endpoint, asked, False)
                call = self._take(endpoint, body)
                return answer if call is None else _response(call, body, False)
        provider = asking.get()
        async with httpx2.AsyncClient(follow_redirects=True) as client:
            answer = await client.send(request)
        content = _content(answer, endpoint)
        if answer.status_code >= 400 or content is None:
            return _passed_on(answer)
        call = {
            "provider": provider,
            "endpoint": endpoint,
            "request": plain_request(body),
            "status": answer.status_code,
            "request_id": answer.headers.get("x-request-id") or answer.headers.get("request-id"),
            "reply": redact_value(content),
        }
        self.calls.append(call)
        self._keys.append(_key(endpoint, call["request"]))
        self._used.add(len(self.calls) - 1)
        self._write()
        return _response(call, body, streamed)

    def _write(self) -> None:
        write(self.path, self.calls)

    def _not_found(self, endpoint: str, body: dict[str, Any]) -> str:
        key = _key(endpoint, body)
        asked = _words({"endpoint": endpoint, "request": plain_request(body), "provider": asking.get()})
        head = f"No recording fits this request: {asked}. Nothing was sent.\n"
        tail = f"To ask the model and record its answer (this costs money): {self._command}"
        if key in self._keys:
            times = self._keys.count(key)
            return f"{head}{self.path} holds this request {times} times, and it is asked once more.\n{tail}"
        if not self.calls:
            there = "is empty" if self.path.exists() else "does not exist"
            return f"{head}{self.path} {there}.\n{tail}"
        wanted = _lines(endpoint, body)
        matcher = difflib.SequenceMatcher(autojunk=False)
        matcher.set_seq2(wanted)

        def likeness(call: dict[str, Any]) -> float:
            matcher.set_seq1(_lines(call["endpoint"], call["request"]))
            return matcher.ratio()

        # One that something else has taken is the recording of that; look among the others first.
        free = [call for number, call in enumerate(self.calls) if number not in self._used]
        nearest = max(free or self.calls, key=likeness)
        diff = list(
            difflib.unified_diff(
                _lines(nearest["endpoint"], nearest["request"]), wanted, "recorded", "asked", lineterm="", n=2
            )
        )
        if len(diff) > _LINES:
            diff[_LINES:] = [f"... ({len(diff) - _LINES} more lines)"]
        return (
            f"{head}{self.path} holds {len(self.calls)} calls; the nearest differs:\n" + "\n".join(diff) + f"\n{tail}"
        )


def _key(endpoint: str, body: dict[str, Any]) -> str:
    return endpoint + json.dumps(plain_request(body), sort_keys=True, ensure_ascii=False)


def _passed_on(answer: Any) -> Any:
    """An answer as it came, without what it was wrapped in."""
    import httpx2

    kept = [(k, v) for k, v in answer.headers.items() if k not in ("content-encoding", "content-length")]
    return httpx2.Response(answer.status_code, headers=kept, content=answer.content)


def _with_body(request: Any, body: dict[str, Any]) -> Any:
    import httpx2

    return httpx2.Request("POST", request.url, headers=_headers_of(request), json=body)


def _headers_of(request: Any) -> list[tuple[str, str]]:
    """Without what describes its body."""
    own = ("content-length", "content-type", "transfer-encoding")
    return [(name, value) for name, value in request.headers.items() if name.lower() not in own]


def _alone(request: Any, endpoint: str, body: dict[str, Any]) -> Any:
    """One request of a batch as a call of its own, to the server that the batch was for."""
    import httpx2

    root = request.url.path.removesuffix("/batches").removesuffix("/messages")
    url = request.url.copy_with(path=f"{root}/{endpoint}")
    return httpx2.Request("POST", url, headers=_headers_of(request), json=body)


def _embedded(calls: list[dict[str, Any]], body: dict[str, Any], used: list[tuple[int, Any]]) -> dict[str, Any]:
    """A reply made of vectors that came with others; its usage is their share, by characters, of what those cost."""
    data = [{"object": "embedding", "index": at, "embedding": vector} for at, (_, vector) in enumerate(used)]
    shares: dict[int, int] = {}
    for (number, _), text in zip(used, body["input"], strict=True):
        shares[number] = shares.get(number, 0) + len(text)
    tokens = 0
    for number, length in shares.items():
        whole = sum(map(len, calls[number]["request"]["input"])) or 1
        tokens += -(-(calls[number]["reply"].get("usage") or {}).get("prompt_tokens", 0) * length // whole)
    first = calls[used[0][0]]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {**first, "request_id": None, "reply": {**first["reply"], "data": data, "usage": usage}}


def _endpoint(method: str, path: str) -> str:
    """What a request asks for, whoever serves it: ``responses``, ``chat/completions``, ``GET responses/resp_1``."""
    parts = path.strip("/").split("/")
    start = next((at for at, part in enumerate(parts) if part in _STARTS), 0)
    where = "/".join(parts[start:])
    return where if method == "POST" else f"{method} {where}"


def _lines(endpoint: str, body: dict[str, Any]) -> list[str]:
    """A request as lines for people: texts of several lines are several lines."""
    text = json.dumps(plain_request(body), indent=2, ensure_ascii=False, sort_keys=True)
    return [endpoint, *text.replace("\\n", "\n        ").splitlines()]


def _words(call: dict[str, Any]) -> str:
    body = call["request"]
    path = f"/{call['endpoint'].removeprefix('GET ')}"
    texts = body.get("input") if call["endpoint"] == "embeddings" else None
    text = " | ".join(map(str, texts)) if isinstance(texts, list) else request_of(path, body)["text"]
    return f"{call.get('provider') or call['endpoint']}:{body.get('model')} {text[:80]!r}"


def _content(answer: Any, endpoint: str) -> Any:
    """What a provider answered, as JSON; None where it is none, or a stream that broke off."""
    if "text/event-stream" in answer.headers.get("content-type", ""):
        return _from_stream(answer.content, endpoint)
    try:
        return json.loads(answer.content)
    except ValueError:
        return None


def _from_stream(content: bytes, endpoint: str) -> Any:
    whole = _WHOLE[endpoint]()
    for data in streams.Events().feed(content + b"\n\n"):
        whole.take(data)
    whole.finish()
    return whole.body() if whole.done and whole.error is None else None


def _response(call: dict[str, Any], body: dict[str, Any], streamed: bool) -> Any:
    import httpx2

    headers = {**call.get("headers", {})}
    if call.get("request_id"):
        headers["x-request-id"] = call["request_id"]
    if streamed and call["status"] == 200:
        asked = request_of(f"/{call['endpoint']}", body)
        headers["content-type"] = "text/event-stream"
        return httpx2.Response(200, headers=headers, text=sse(asked, call["reply"]))
    if isinstance(call["reply"], str):
        return httpx2.Response(call["status"], headers=headers, text=call["reply"])
    return httpx2.Response(call["status"], headers=headers, json=call["reply"])


# -- reading files ---------------------------------------------------------------------------------


def _load(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The calls of a file, and whether it is a cassette."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml  # type: ignore[import-untyped]
        except ImportError as error:
            raise UsageError(f"{path}: cassettes in YAML need PyYAML: pip install pyyaml") from error
        return _cassette(path, yaml.safe_load(text)), True
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is no recording: it is not JSON ({error}). Remove it and record anew.") from error
    if isinstance(data, dict) and "interactions" in data:
        return _cassette(path, data), True
    if not isinstance(data, dict) or data.get("agentflow_recording") != VERSION:
        raise UsageError(f"{path} is no recording that this version reads. Remove it and record anew.")
    calls = data["calls"]
    for number, call in enumerate(calls):
        if not isinstance(call, dict) or not {"endpoint", "request", "status", "reply"} <= call.keys():
            raise UsageError(f"{path}: call {number + 1} lacks endpoint, request, status or reply. Record it anew.")
    return calls, False


def _cassette(path: Path, data: Any) -> list[dict[str, Any]]:
    """https://vcrpy.readthedocs.io/en/latest/usage.html: interactions of a request and a response each."""
    interactions = data.get("interactions") if isinstance(data, dict) else None
    if not isinstance(interactions, list):
        raise UsageError(f"{path} is no cassette: it has no list of interactions.")
    calls = []
    for each in interactions:
        request, response = each["request"], each["response"]
        endpoint = _endpoint(request["method"], urlsplit(request["uri"]).path)
        headers = {name.lower(): _first(value) for name, value in (response.get("headers") or {}).items()}
        raw = response["body"].get("string") or b""
        content = raw.encode() if isinstance(raw, str) else raw
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        reply: Any
        if "text/event-stream" in headers.get("content-type", ""):
            reply = _from_stream(content, endpoint)
        else:
            try:
                reply = json.loads(content)
            except ValueError:
                reply = content.decode("utf-8", "replace")
        if reply is None:  # a stream that had broken off when it was recorded
            continue
        sent = request.get("body")
        sent = sent.decode() if isinstance(sent, bytes) else sent
        calls.append(
            {
                "provider": None,
                "endpoint": endpoint,
                "request": json.loads(sent) if sent else {},
                "status": response["status"]["code"],
                "request_id": headers.get("x-request-id") or headers.get("request-id"),
                "headers": {name: value for name, value in headers.items() if name in _HEADERS},
                "reply": reply,
            }
        )
    return calls


def _first(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and value else value)
