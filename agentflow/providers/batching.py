"""The providers' batch APIs: many requests handed over at once, for half the price, answered within a day.

https://developers.openai.com/api/docs/guides/batch and https://platform.claude.com/docs/en/build-with-claude/batch-processing
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from agentflow.errors import ModelError
from agentflow.providers import anthropic, openai
from agentflow.providers.common import Server, client, fetch, reported_failure, status_error

UPLOAD_TIMEOUT = 600.0  # seconds; a file of requests may have 200 MB
LOOK_TIMEOUT = 60.0
MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000  # in one batch; below the limits of both providers
SLACK = 3600.0  # seconds by which the clocks of this machine and a provider may differ


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch as it is now: its id, the provider's word for its state, whether it has ended, and its JSON."""

    id: str
    status: str
    ended: bool
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What came for one request of a batch: ``reply``, the model's JSON, or the ``error`` that it ended with."""

    custom_id: str
    reply: dict[str, Any] | None = None
    error: ModelError | None = None
    status: int = 200
    request_id: str | None = None


class Api(Protocol):
    """A provider's batch API."""

    async def create(self, requests: Sequence[tuple[str, dict[str, Any]]], *, run_id: str, mark: str) -> str:
        """Hands requests (custom id, body) over; the id of the batch."""

    async def find(self, mark: str, count: int, since: float, known: set[str]) -> Seen | None:
        """The batch that was created with this mark, if it was; one that may be it has not ``ended``."""

    async def look(self, ident: str) -> Seen:
        """The batch as it is now."""

    async def cancel(self, ident: str) -> None:
        """Asks for a batch to be cancelled; what is answered by then stays answered."""

    async def results(self, seen: Seen) -> list[Result]:
        """What came, in any order; a request that is missing here got no answer."""


def of(provider: str) -> Api | None:
    """The batch API of a provider, or None."""
    if provider == "openai":
        return OpenAI(Server(provider, openai.make_client, "openai"), "/v1/responses")
    if provider == "openai-chat":
        return OpenAI(Server(provider, openai.make_client, "openai"), "/v1/chat/completions")
    if provider == "anthropic":
        return Anthropic(Server(provider, anthropic.make_client, "anthropic"))
    return None


class OpenAI:
    """A file of requests, and a batch that names it. Batches carry metadata, by which a lost one is found again."""

    def __init__(self, server: Server, endpoint: str) -> None:
        self._server = server
        self._endpoint = endpoint

    async def create(self, requests: Sequence[tuple[str, dict[str, Any]]], *, run_id: str, mark: str) -> str:
        lines = [
            {"custom_id": custom_id, "method": "POST", "url": self._endpoint, "body": body}
            for custom_id, body in requests
        ]
        file = ("agentflow.jsonl", _jsonl(lines), "application/jsonl")
        sdk = await client(self._server)
        upload = sdk.files.with_raw_response.create
        answer = await fetch(
            self._server, lambda: upload(file=file, purpose="batch", timeout=UPLOAD_TIMEOUT), UPLOAD_TIMEOUT
        )
        uploaded = self._read(answer)
        make = sdk.batches.with_raw_response.create
        answer = await fetch(
            self._server,
            lambda: make(
                input_file_id=uploaded["id"],
                endpoint=self._endpoint,
                completion_window="24h",
                metadata={"agentflow_run": run_id[:500], "agentflow_batch": mark},
                timeout=LOOK_TIMEOUT,
            ),
            LOOK_TIMEOUT,
        )
        return str(self._read(answer)["id"])

    async def find(self, mark: str, count: int, since: float, known: set[str]) -> Seen | None:
        async for batch in self._listed():
            if (batch.get("metadata") or {}).get("agentflow_batch") == mark:
                return self._seen(batch)
            if (batch.get("created_at") or 0) < since - SLACK:
                break
        return None

    async def _listed(self) -> AsyncIterator[dict[str, Any]]:
        """The account's batches, newest first."""
        page = (await client(self._server)).batches.with_raw_response.list
        more: dict[str, Any] = {}
        while True:
            body = self._read(await fetch(self._server, lambda: page(limit=100, **more), LOOK_TIMEOUT))  # noqa: B023
            for batch in body["data"]:
                yield batch
            if not body.get("has_more") or not body["data"]:
                return
            more = {"after": body["data"][-1]["id"]}

    async def look(self, ident: str) -> Seen:
        retrieve = (await client(self._server)).batches.with_raw_response.retrieve
        answer = await fetch(self._server, lambda: retrieve(ident, timeout=LOOK_TIMEOUT), LOOK_TIMEOUT)
        return self._seen(self._read(answer))

    async def cancel(self, ident: str) -> None:
        ask = (await client(self._server)).batches.with_raw_response.cancel
        await fetch(self._server, lambda: ask(ident, timeout=LOOK_TIMEOUT), LOOK_TIMEOUT)

    def _seen(self, body: dict[str, Any]) -> Seen:
        status = str(body.get("status"))
        return Seen(body["id"], status, status in ("completed", "failed", "expired", "cancelled"), body)

    async def results(self, seen: Seen) -> list[Result]:
        content = (await client(self._server)).files.with_raw_response.content
        found = []
        for name in ("output_file_id", "error_file_id"):
            ident = seen.body.get(name)
            if not ident:
                continue
            answer = await fetch(
                self._server,
                lambda ident=ident: content(ident, timeout=UPLOAD_TIMEOUT),  # type: ignore[misc]
                UPLOAD_TIMEOUT,
            )
            found += [self._result(line) for line in _lines(self._server, answer)]
        return found

    def _result(self, line: dict[str, Any]) -> Result:
        custom_id = str(line.get("custom_id"))
        response = line.get("response") or {}
        body, status = response.get("body"), response.get("status_code")
        if line.get("error"):
            error = reported_failure(self._server.name, line["error"])
            error.retryable = error.retryable or error.code == "batch_expired"
            return Result(custom_id, error=error)
        if status != 200 or not isinstance(body, dict):
            error = status_error(self._server.name, status or 500, {}, body, str(body))
            return Result(custom_id, error=error)
        return Result(custom_id, body, request_id=response.get("request_id"))

    def _read(self, answer: Any) -> dict[str, Any]:
        return _object(self._server, answer)


class Anthropic:
    """One request that holds all others. Batches carry no metadata: a lost one is told by the ids in its results."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def create(self, requests: Sequence[tuple[str, dict[str, Any]]], *, run_id: str, mark: str) -> str:
        asked = [{"custom_id": custom_id, "params": body} for custom_id, body in requests]
        make = (await client(self._server)).messages.batches.with_raw_response.create
        answer = await fetch(
            self._server,
            lambda: make(requests=[], extra_body={"requests": asked}, timeout=UPLOAD_TIMEOUT),
            UPLOAD_TIMEOUT,
        )
        return str(_object(self._server, answer)["id"])

    async def find(self, mark: str, count: int, since: float, known: set[str]) -> Seen | None:
        """One of the same size that has not ended may be it: its ids cannot be read before."""
        maybe = None
        async for body in self._listed():
            seen = self._seen(body)
            if _epoch(body.get("created_at")) < since - SLACK:
                break
            if seen.id in known or sum((body.get("request_counts") or {}).values()) != count:
                continue
            if not seen.ended:
                maybe = seen
            elif any(result.custom_id.endswith(mark) for result in await self.results(seen)):
                return seen
        return maybe

    async def _listed(self) -> AsyncIterator[dict[str, Any]]:
        """The workspace's batches, newest first."""
        page = (await client(self._server)).messages.batches.with_raw_response.list
        more: dict[str, Any] = {}
        while True:
            answer = await fetch(self._server, lambda: page(limit=100, **more), LOOK_TIMEOUT)  # noqa: B023
            body = _object(self._server, answer)
            for batch in body["data"]:
                yield batch
            if not body.get("has_more") or not body["data"]:
                return
            more = {"after_id": body["data"][-1]["id"]}

    async def look(self, ident: str) -> Seen:
        retrieve = (await client(self._server)).messages.batches.with_raw_response.retrieve
        answer = await fetch(self._server, lambda: retrieve(ident, timeout=LOOK_TIMEOUT), LOOK_TIMEOUT)
        return self._seen(_object(self._server, answer))

    async def cancel(self, ident: str) -> None:
        ask = (await client(self._server)).messages.batches.with_raw_response.cancel
        await fetch(self._server, lambda: ask(ident, timeout=LOOK_TIMEOUT), LOOK_TIMEOUT)

    def _seen(self, body: dict[str, Any]) -> Seen:
        status = str(body.get("processing_status"))
        return Seen(body["id"], status, status == "ended", body)

    async def results(self, seen: Seen) -> list[Result]:
        import httpx2

        sdk = await client(self._server)
        # The SDK's own method needs one request more, and gives typed objects where the raw JSON is to be recorded.
        answer = await fetch(
            self._server,
            lambda: sdk.get(f"/v1/messages/batches/{seen.id}/results", cast_to=httpx2.Response),
            UPLOAD_TIMEOUT,
        )
        return [self._result(line) for line in _lines(self._server, answer)]

    def _result(self, line: dict[str, Any]) -> Result:
        custom_id = str(line.get("custom_id"))
        result = line.get("result") or {}
        kind = result.get("type")
        if kind == "succeeded" and isinstance(result.get("message"), dict):
            return Result(custom_id, result["message"])
        reported = result.get("error") or {}
        if kind in ("expired", "canceled"):
            reported = {"type": f"batch_{kind}", "message": f"the request was {kind}, and is not charged"}
        error = reported_failure(self._server.name, reported.get("error", reported))
        error.retryable = error.retryable or kind == "expired"
        error.request_id = reported.get("request_id")
        return Result(custom_id, error=error)


def size(custom_id: str, body: dict[str, Any]) -> int:
    """About how many bytes a request takes in a batch."""
    return len(_jsonl([body])) + len(custom_id) + 100


def _jsonl(lines: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "surrogatepass")


def _lines(server: Server, answer: Any) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in answer.content.splitlines() if line.strip()]
    except ValueError as exc:
        raise ModelError(
            f"{server.name}: the results of a batch cannot be read: {exc}", code="not_json", retryable=True
        ) from exc


def _object(server: Server, answer: Any) -> dict[str, Any]:
    """The JSON of an answer about files and batches."""
    try:
        body = json.loads(answer.content)
    except ValueError:
        body = None
    if not isinstance(body, dict) or not ("id" in body or isinstance(body.get("data"), list)):
        raise ModelError(
            f"{server.name}: what came about a batch is none: {answer.text[:200]!r}",
            status=answer.status_code,
            code="not_json",
            retryable=True,
        )
    return body


def _epoch(text: Any) -> float:
    return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else 0.0
