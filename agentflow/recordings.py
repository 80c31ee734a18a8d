"""Recorded replies: real answers of providers, kept in a readable file and given again without a network.

A recording is found by content: the body of the request, without what only says that it is streamed, files by their
digest, secrets masked. Never by position, so a fan-out may ask in any order. Each recorded reply answers one request;
a program that asks twice what it had asked once is told so. Secrets are masked in requests and replies before they are
written, and the program gets the masked reply when it is recorded too, so that both runs see the same.

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

from agentflow import rundocs
from agentflow.errors import UsageError
from agentflow.files import shortened
from agentflow.index import in_key
from agentflow.providers import streams
from agentflow.providers.common import asking, use_transport
from agentflow.redact import redact_value
from agentflow.scratch import open_journal
from agentflow.testing import request_of, sse

MODES = ("none", "once", "all")
_VERSION = 1
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
        body = json.loads(request.content) if request.content else {}
        endpoint = _endpoint(request.method, request.url.path)
        streamed = bool(body.get("stream"))
        key = _key(endpoint, body)
        for number in range(self._old, len(self.calls)):
            if number not in self._used and self._keys[number] == key:
                self._used.add(number)
                return _response(self.calls[number], body, streamed)
        if self.mode == "none":
            self.missing.append(self._not_found(endpoint, body, key))
            raise NotRecorded(self.missing[-1])
        return await self._record(request, endpoint, body, streamed)

    async def _record(self, request: Any, endpoint: str, body: dict[str, Any], streamed: bool) -> Any:
        import httpx2

        provider = asking.get()
        async with httpx2.AsyncClient(follow_redirects=True) as client:
            answer = await client.send(request)
        content = _content(answer, endpoint)
        if answer.status_code >= 400 or content is None:
            kept = [(k, v) for k, v in answer.headers.items() if k not in ("content-encoding", "content-length")]
            return httpx2.Response(answer.status_code, headers=kept, content=answer.content)
        call = {
            "provider": provider,
            "endpoint": endpoint,
            "request": _plain(body),
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

    def _not_found(self, endpoint: str, body: dict[str, Any], key: str) -> str:
        asked = _words({"endpoint": endpoint, "request": _plain(body), "provider": asking.get()})
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


def write(path: Path, calls: list[dict[str, Any]]) -> None:
    """Write a recording, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"agentflow_recording": _VERSION, "calls": calls}, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def export_recording(run_id: str, path: str | os.PathLike[str]) -> int:
    """Write the model calls of a recorded run as a recording for tests; how many there are.

    Args:
        run_id: the run's id or an unambiguous part of it; ``"scratch"`` for what stands outside workflows
            (cells of a notebook, lines of a script).
        path: the file, which must not exist yet.

    Replies that an edit has superseded are in it too; a test reports them as unused, and
    ``--agentflow-record=once`` removes them. Secrets are masked. Embeddings are left out.

    Raises:
        RunNotFound: there is no such run.
        UsageError: the file exists, or the run has no model calls.
    """
    file = Path(path)
    if file.exists():
        raise UsageError(f"{file} exists already. Remove it, or name another file.")
    journal = open_journal()
    known = run_id if run_id == "scratch" else str(rundocs.find(journal, run_id)["id"])
    found = [json.loads(text) for _, text in journal.scan(f"m/{in_key(known)}/")]
    # Texts and vectors of embeddings stand elsewhere in the journal: these records do not hold what was sent.
    found = [raw for raw in found if not (isinstance(raw["body"], dict) and isinstance(raw["body"].get("data"), int))]
    calls = [_exported(raw) for raw in sorted(found, key=lambda raw: str(raw["at"]))]
    if not calls:
        raise UsageError(f"run {known} in {journal.path} has no model calls, so there is nothing to record.")
    write(file, calls)
    return len(calls)


def _exported(raw: dict[str, Any]) -> dict[str, Any]:
    body = raw["request"]
    if "input" in body:
        endpoint = "responses"
    else:
        endpoint = "messages" if isinstance(raw["body"], dict) and raw["body"].get("type") == "message" else ""
        endpoint = endpoint or "chat/completions"
    return {
        "provider": raw["provider"],
        "endpoint": endpoint,
        "request": _plain(body),
        "status": raw["status"],
        "request_id": raw["request_id"],
        "reply": redact_value(raw["body"]),
    }


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    """A request as it is written: what is asked, not how the answer travels."""
    kept = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    made: dict[str, Any] = redact_value(shortened(kept))
    return made


def _key(endpoint: str, body: dict[str, Any]) -> str:
    return endpoint + json.dumps(_plain(body), sort_keys=True, ensure_ascii=False)


def _endpoint(method: str, path: str) -> str:
    """What a request asks for, whoever serves it: ``responses``, ``chat/completions``, ``GET responses/resp_1``."""
    parts = path.strip("/").split("/")
    start = next((at for at, part in enumerate(parts) if part in _STARTS), 0)
    where = "/".join(parts[start:])
    return where if method == "POST" else f"{method} {where}"


def _lines(endpoint: str, body: dict[str, Any]) -> list[str]:
    """A request as lines for people: texts of several lines are several lines."""
    text = json.dumps(_plain(body), indent=2, ensure_ascii=False, sort_keys=True)
    return [endpoint, *text.replace("\\n", "\n        ").splitlines()]


def _words(call: dict[str, Any]) -> str:
    body = call["request"]
    path = f"/{call['endpoint'].removeprefix('GET ')}"
    text = request_of(path, body)["text"]
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
    if not isinstance(data, dict) or data.get("agentflow_recording") != _VERSION:
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
