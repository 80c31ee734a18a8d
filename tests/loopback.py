"""A provider on the loopback interface that counts: what arrived, what was answered.

In its own process (``python -m tests.loopback --port-file F --log F``) it outlives the program under
test, so that a test can kill that program and then count what it had asked for. As a context manager
(``with Loopback() as server``) it runs in a thread. It answers the three surfaces with text that is
derived from the request alone. A script can make it fail, hang or hang up.

The log has one line of JSON when a request has arrived and one when it was fully answered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from agentflow.batchserver import BatchServer
from agentflow.models import Request
from agentflow.providers.common import digest
from agentflow.testing import FakeModel, ToolCall, reply_body, request_of, sse


def answer_to(text: str) -> str:
    """The answer that is given to a last user message."""
    return f"answer to {hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Loopback:
    """The server. ``environment`` points both SDKs to it.

    Args:
        log: a file to append to; None keeps the lines in ``events`` only.
        latency: seconds before each answer; a query ``?latency=`` of a request wins.
        polls: how often a call in the background is looked at before it has ended; ``None`` never ends.
        looks: for the first looks at calls in the background, one entry each: None is as ``polls`` says, ``"reset"``,
            ``"hang"`` and ``{"status", "headers", "body"}`` are as in ``script``, where ``{"ended": status}`` ends the
            call so (``failed``, ``cancelled``, ``incomplete``).
        batching: the batch APIs; their requests are in ``batching_events`` and use up no entry of ``script``.
        batch_faults: method, end of the path, and what the first such request about batches meets: ``"reset"``,
            ``"lost"`` (done, and then the connection breaks), or ``{"status", "headers", "body"}``.
        outcomes: for requests in batches, by their last user text: a status and a body, or ``EXPIRED``.
        script: for the first requests, one entry each: None answers, ``"hang"`` never does, ``"reset"``
            breaks the connection, ``{"status", "headers", "body"}`` is sent as it is (``body`` may be
            text, or a dict; ``cut`` sends only so many bytes of it, and then closes the connection, with
            ``"then": "reset"`` by a reset, with ``"then": "hang"`` never), ``{"text": ...}`` is the answer.
        turns: a conversation with tools, whatever arrives how often: the answer is the entry after as many turns as
            the request holds. An entry is text, a list of ``[tool's name, arguments]`` and texts, or a provider's
            body as a dict.
    """

    def __init__(
        self,
        *,
        log: Path | str | None = None,
        latency: float = 0.0,
        script: list[Any] | None = None,
        looks: list[Any] | None = None,
        polls: int | None = 1,
        port: int = 0,
        turns: list[Any] | None = None,
    ) -> None:
        self.log = Path(log) if log else None
        self.latency = latency
        self.script = list(script or [])
        self.turns = turns
        self.bodies: list[dict[str, Any]] = []
        self.looks = list(looks or [])
        self.polls = polls
        self.flights: dict[str, dict[str, Any]] = {}
        self.cancelled_usage: dict[str, Any] | None = None
        self.batching = BatchServer(polls)
        self.batching_events: list[tuple[str, str]] = []
        self.batch_faults: list[tuple[str, str, Any]] = []
        self.outcomes: dict[str, tuple[int, Any]] = {}
        self.batched: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.loopback = self
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": "none",
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": "none",
        }

    @property
    def arrived(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "arrived"]

    @property
    def answered(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "answered"]

    @property
    def looked(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "looked"]

    def __enter__(self) -> Loopback:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def arrive(self, asked: Request, path: str) -> tuple[int, Any]:
        """Notes a request; its number, and what the script has for it."""
        with self._lock:
            number = len(self.arrived) + 1
            self.bodies.append(asked["body"])
            event = {"path": path, "model": asked["model"], "text": asked["text"], "digest": digest(asked["body"])}
            self._note({"event": "arrived", "n": number, **event})
            return number, self.script[number - 1] if number <= len(self.script) else None

    def answer(self, number: int, asked: Request, status: int) -> None:
        with self._lock:
            self._note({"event": "answered", "n": number, "status": status, "digest": digest(asked["body"])})

    def take(self, body: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
        """Keeps a call in the background, whose reply will be ``whole``; what the POST is answered with."""
        with self._lock:
            self.flights[whole["id"]] = {"whole": whole, "left": self.polls}
        return {**whole, "status": "queued", "background": True, "output": [], "usage": None}

    def look(self, path: str) -> tuple[Any, dict[str, Any] | None]:
        """Notes a look at a call in the background: what the script has for it, and the call as it is now."""
        with self._lock:
            number = len(self.looked)
            fault = self.looks[number] if number < len(self.looks) else None
            flight = self.flights.get(path.rpartition("/")[2])
            seen = None if flight is None else flight["whole"]
            if isinstance(fault, dict) and "ended" in fault and flight is not None:
                flight["left"] = 0
                flight["whole"] = {**flight["whole"], "status": fault["ended"], **fault.get("with", {})}
                fault, seen = None, flight["whole"]
            elif flight is not None and fault is None and flight["left"] != 0:
                flight["left"] = flight["left"] and flight["left"] - 1
                seen = {**flight["whole"], "status": "in_progress", "output": [], "usage": None}
            self._note({"event": "looked", "n": number + 1, "path": path, "status": seen and seen["status"]})
            return fault, seen

    def cancel(self, path: str) -> dict[str, Any] | None:
        """A call in the background is cancelled, with what it has cost so far; one that has ended stays as it is."""
        with self._lock:
            self._note({"event": "cancelled", "path": path})
            flight = self.flights.get(path.split("/")[-2])
            if flight is None:
                return None
            if flight["left"] != 0:
                flight["left"] = 0
                flight["whole"] = {**flight["whole"], "status": "cancelled", "output": [], "usage": self.cancelled_usage}
            return flight["whole"]

    def batch(self, method: str, path: str, kind: str, content: bytes, text: Any) -> tuple[Any, Any]:
        """What meets a request about batches, and its answer; two times None for any other request."""
        if not any(word in path for word in ("/batches", "/files")):
            return None, None
        with self._lock:
            self.batching_events.append((method, path))
            for entry in self.batch_faults:
                if entry[0] == method and path.endswith(entry[1]):
                    self.batch_faults.remove(entry)
                    fault = entry[2]
                    break
            else:
                fault = None
            if fault is not None and fault != "lost":
                return fault, None

            def answer(custom_id: str, address: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
                asked = request_of(address, body)
                self.batched.append({**asked, "custom_id": custom_id})
                known = self.outcomes.get(asked["text"])
                return known or (200, reply_body(asked, text(asked), number=len(self.batched)))

            return fault, self.batching.handle(method, path, kind, content, answer)

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if self.log:
            with self.log.open("ab", buffering=0) as file:
                file.write(json.dumps(event).encode() + b"\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    loopback: Loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients are killed here on purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _batch(self, content: bytes) -> bool:
        """Answers a request about batches; False for any other."""
        path = urlsplit(self.path).path
        kind = self.headers.get("content-type", "")
        fault, answer = self.server.loopback.batch(self.command, path, kind, content, self._text)
        if fault in ("reset", "lost"):
            self._reset()
        elif fault is not None:
            self._write(fault["status"], fault.get("headers", {}), fault.get("body", {}))
        elif answer is not None:
            self._write(answer[0], {}, answer[1])
        return fault is not None or answer is not None

    def do_GET(self) -> None:
        if self._batch(b""):
            return
        fault, seen = self.server.loopback.look(urlsplit(self.path).path)
        if fault == "hang":
            self.server.loopback.closing.wait()
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault is not None:
            self._write(fault["status"], fault.get("headers", {}), fault.get("body", {}), fault.get("cut"))
        elif seen is None:
            self._write(404, {}, {"error": {"message": "no such thing", "type": "invalid_request_error"}})
        else:
            self._write(200, {}, seen)

    def do_POST(self) -> None:
        server = self.server.loopback
        address = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self._batch(content):
            return
        if address.path.endswith("/cancel"):
            seen = server.cancel(address.path)
            missing = {"error": {"message": "no such thing", "type": "invalid_request_error"}}
            return self._write(*((404, {}, missing) if seen is None else (200, {}, seen)))
        body = json.loads(content)
        asked = request_of(address.path, body)
        number, fault = server.arrive(asked, address.path)
        latency = float(parse_qs(address.query).get("latency", [server.latency])[0])
        if latency:
            server.closing.wait(latency)
        if fault == "hang":
            server.closing.wait()
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault is None and address.path.endswith("/embeddings"):
            self._send(number, asked, 200, {}, FakeModel([])._embedded(body), None)
        elif fault is None or "text" in fault:
            if fault is None and server.turns is not None:
                whole: Any = _turn(asked, server.turns)
            else:
                whole = reply_body(asked, fault["text"] if fault else self._text(asked), number=number)
            head = {}
            if body.get("background"):
                whole = server.take(body, whole)
            if body.get("stream"):
                whole, head = sse(asked, whole), {"content-type": "text/event-stream"}
            self._send(number, asked, 200, head, whole, None)
        else:
            self._send(
                number, asked, fault["status"], fault.get("headers", {}), fault.get("body", {}), fault.get("cut")
            )
            if fault.get("then") == "hang":
                server.closing.wait()
            elif fault.get("then") == "reset":
                self._reset()

    def _reset(self) -> None:
        # Zero linger turns the close into a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _text(self, asked: Request) -> str:
        """The answer; where JSON was asked for, an object with the answer in each text field."""
        body = asked["body"]
        form: Any = (body.get("text") or body.get("output_config") or {}).get("format")
        form = form or (body.get("response_format") or {}).get("json_schema")
        if not form:
            return answer_to(asked["text"])
        return json.dumps(_instance(form["schema"], form["schema"], answer_to(asked["text"])))

    def _send(
        self, number: int, asked: Request, status: int, headers: dict[str, str], body: Any, cut: int | None
    ) -> None:
        self._write(status, {"x-request-id": f"req_{number}", **headers}, body, cut)
        if cut is None:
            self.server.loopback.answer(number, asked, status)

    def _write(self, status: int, headers: dict[str, str], body: Any, cut: int | None = None) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        head = {"content-type": "application/json", **headers}
        head["content-length"] = str(len(content))
        lines = [f"HTTP/1.1 {status} Scripted", *(f"{name}: {value}" for name, value in head.items())]
        self.wfile.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content[:cut])
        self.wfile.flush()
        if cut is not None:
            self.close_connection = True


def _turn(asked: Request, turns: list[Any]) -> dict[str, Any]:
    """The reply of a conversation that follows the turns that the request holds."""
    body, before = asked["body"], 0
    if asked["surface"] == "responses":
        given = [item.get("type") == "function_call_output" for item in body["input"]]
        before = sum(now and not then for then, now in zip([False, *given], given, strict=False))
    else:
        before = sum(message["role"] == "assistant" for message in body["messages"])
    entry = turns[before]
    if isinstance(entry, dict):
        return entry
    parts = [entry] if isinstance(entry, str) else entry
    calls = [ToolCall(part[0], part[1]) for part in parts if not isinstance(part, str)]
    text = "".join(part for part in parts if isinstance(part, str))
    return reply_body(asked, text, number=before + 1, calls=calls)


def _instance(node: dict[str, Any], root: dict[str, Any], text: str) -> Any:
    """Some value of a strict schema."""
    if "$ref" in node:
        return _instance(root["$defs"][node["$ref"].rpartition("/")[2]], root, text)
    if "anyOf" in node:
        return _instance(node["anyOf"][0], root, text)
    if "enum" in node:
        return node["enum"][0]
    if "const" in node:
        return node["const"]
    if node["type"] == "object":
        return {name: _instance(part, root, text) for name, part in node["properties"].items()}
    if node["type"] == "array":
        return [_instance(node["items"], root, text) for _ in range(node.get("minItems", 1))]
    return {"string": text, "integer": len(text), "number": 0.5, "boolean": True, "null": None}[node["type"]]


def main() -> None:
    """Serves until it is killed. The port file appears once requests are taken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--latency", type=float, default=float(os.environ.get("LOOPBACK_LATENCY", "0")))
    parser.add_argument("--script", type=Path, help="a JSON file with the list of faults")
    parser.add_argument("--looks", type=Path, help="a JSON file with the list of what looks meet")
    parser.add_argument("--polls", type=int, default=1)
    options = parser.parse_args()
    script, looks = (json.loads(file.read_text()) if file else [] for file in (options.script, options.looks))
    server = Loopback(log=options.log, latency=options.latency, script=script, looks=looks, polls=options.polls)
    temporary = options.port_file.with_suffix(".new")
    temporary.write_text(str(server.port))
    temporary.replace(options.port_file)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What arrived and what was answered, from a log file."""
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e for e in events if e["event"] == "arrived"], [e for e in events if e["event"] == "answered"]


def wait_for_port(path: Path, seconds: float = 15.0) -> int:
    """The port of a server in another process, once it has written it."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.005)
    return int(path.read_text())


if __name__ == "__main__":
    main()
