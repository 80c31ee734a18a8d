"""The providers' batch APIs as a server has them, in memory: for ``FakeModel`` and for servers in tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

Answer = Callable[[str, str, dict[str, Any]], tuple[int, dict[str, Any]]]
EXPIRED: tuple[int, dict[str, Any]] = (0, {})  # instead of a status and a body: the request was not answered in time
CANCELLED: tuple[int, dict[str, Any]] = (0, {"cancelled": True})
_MESSAGES = "/v1/messages/batches"


class BatchServer:
    """Takes files and batches and gives their results, in another order than they were asked in.

    Attributes:
        polls: how often a batch is looked at before it has ended; None never ends.
        done: how many requests of a batch are answered by the time it is cancelled.
        files: id and content of each file that was uploaded.
        batches: id and state of each batch, in the order of their creation.
    """

    def __init__(self, polls: int | None = 0) -> None:
        self.polls = polls
        self.done = 0
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    def requests(self, method: str, path: str, content: bytes) -> list[tuple[str, str, dict[str, Any]]]:
        """Custom id, address and body of each request, if this creates a batch."""
        if method != "POST":
            return []
        if path == _MESSAGES:
            return [(each["custom_id"], "/v1/messages", each["params"]) for each in json.loads(content)["requests"]]
        if path.endswith("/batches"):
            lines = self.files.get(json.loads(content)["input_file_id"], "").splitlines()
            return [(each["custom_id"], each["url"], each["body"]) for each in map(json.loads, lines)]
        return []

    def handle(
        self, method: str, path: str, content_type: str, content: bytes, answer: Answer
    ) -> tuple[int, Any] | None:
        """Status and body (JSON, or text) for a request about files or batches; None for any other.

        ``answer`` is called for each request of a new batch and gives a status and a body, or ``EXPIRED``.
        """
        *_, parent, last = f"/{path}".rsplit("/", 2)
        if method == "POST" and path.endswith("/files"):
            return 200, self._upload(content_type, content)
        if method == "POST" and (path == _MESSAGES or path.endswith("/batches")):
            results = [(custom_id, *answer(custom_id, url, body))
                       for custom_id, url, body in self.requests(method, path, content)]  # fmt: skip
            made = self._anthropic(results) if path == _MESSAGES else self._openai(json.loads(content), results)
            self.batches[made["id"]] = {"body": made, "results": results[::-1], "left": self.polls}
            return 200, made
        if method == "POST" and last == "cancel" and path.split("/")[-3] == "batches":
            return self._cancel(parent)
        if method != "GET":
            return None
        if path == _MESSAGES or path.endswith("/batches"):
            found = [self._seen(ident, look=False) for ident, each in list(self.batches.items())[::-1]
                     if ("processing_status" in each["body"]) == (path == _MESSAGES)]  # fmt: skip
            return 200, {"object": "list", "data": found, "has_more": False, "first_id": None, "last_id": None}
        if last == "content" and parent in self.files:
            return 200, self.files[parent]
        if last == "results" and parent in self.batches:
            return 200, "".join(json.dumps(_line(*each)) + "\n" for each in self.batches[parent]["results"])
        if parent == "batches":
            return (200, self._seen(last)) if last in self.batches else (404, {"error": {"message": f"no {last}"}})
        return None

    def _upload(self, content_type: str, content: bytes) -> dict[str, Any]:
        head = f"content-type: {content_type}\r\n\r\n".encode()
        parts = BytesParser(policy=HTTP).parsebytes(head + content).get_payload()
        ident = f"file-{len(self.files) + 1}"
        for part in parts:
            if part.get_filename():  # type: ignore[union-attr]
                self.files[ident] = part.get_payload(decode=True).decode()  # type: ignore[union-attr]
        return {"id": ident, "object": "file", "purpose": "batch", "bytes": len(content), "status": "processed"}

    def _openai(self, asked: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        number = len(self.batches) + 1
        made = {
            "id": f"batch_{number}", "object": "batch", "status": "validating", "created_at": int(time.time()),
            "endpoint": asked["endpoint"], "input_file_id": asked["input_file_id"],
            "completion_window": asked["completion_window"], "metadata": asked.get("metadata"),
        }  # fmt: skip
        good = [each for each in results if each[1] == 200]
        bad = [each for each in results if each[1] != 200]
        ended: dict[str, Any] = {"status": "expired" if EXPIRED[0] in [each[1] for each in bad] else "completed"}
        for name, lines in (("output", good), ("error", bad)):
            if lines:
                ended[f"{name}_file_id"] = f"file-{name}-{number}"
                text = "".join(json.dumps(_openai_line(*each)) + "\n" for each in lines[::-1])
                self.files[f"file-{name}-{number}"] = text
        return {**made, "ended": ended}

    def _anthropic(self, results: list[Any]) -> dict[str, Any]:
        ident = f"msgbatch_{len(self.batches) + 1}"
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        return {
            "id": ident, "type": "message_batch", "processing_status": "in_progress",
            "created_at": datetime.now(UTC).isoformat(), "expires_at": datetime.now(UTC).isoformat(),
            "request_counts": {**counts, "processing": len(results)}, "results_url": None,
            "ended": {"processing_status": "ended", "results_url": f"{_MESSAGES}/{ident}/results"},
        }  # fmt: skip

    def _cancel(self, ident: str) -> tuple[int, Any]:
        """Leaves the first requests answered; the batch has ended when it is looked at the time after next."""
        batch = self.batches.get(ident)
        if batch is None:
            return 404, {"error": {"message": f"no {ident}"}}
        if batch["left"] == 0:
            return 400, {"error": {"message": f"{ident} has ended", "type": "invalid_request_error"}}
        first = len(batch["results"]) - self.done
        kept = batch["results"][first:]
        ended = batch["body"]["ended"]
        if "status" in batch["body"]:
            ended |= {"status": "cancelled"}
            for name in ("output_file_id", "error_file_id"):
                if name in ended:
                    lines = [_openai_line(*each) for each in kept if (each[1] == 200) == name.startswith("output")]
                    self.files[ended[name]] = "".join(json.dumps(line) + "\n" for line in lines)
        batch["results"] = [(each[0], *CANCELLED) for each in batch["results"][:first]] + kept
        batch |= {"left": 1, "cancelling": True}
        return 200, self._seen(ident, look=False)

    def _seen(self, ident: str, look: bool = True) -> dict[str, Any]:
        batch = self.batches[ident]
        body = {name: value for name, value in batch["body"].items() if name != "ended"}
        if batch["left"] == 0:
            return {**body, **batch["body"]["ended"]}
        if look and batch["left"] is not None:
            batch["left"] -= 1
        word = {True: "cancelling", False: "in_progress"}[batch.get("cancelling", False)]
        if "status" in body:
            return {**body, "status": word}
        return {**body, "processing_status": "canceling"} if word == "cancelling" else body


def _openai_line(custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": None, "error": None}
    if status:
        line["response"] = {"status_code": status, "request_id": f"req_{custom_id}", "body": body}
    else:
        line["error"] = {"code": "batch_expired", "message": "This request could not be executed in time."}
    return line


def _line(custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    if status == 200:
        result: dict[str, Any] = {"type": "succeeded", "message": body}
    elif status:
        result = {"type": "errored", "error": {"type": "error", **body}}
    else:
        result = {"type": "expired" if body == EXPIRED[1] else "canceled"}
    return {"custom_id": custom_id, "result": result}
