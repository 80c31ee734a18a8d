"""``agentflow ui`` as a process of its own, and requests to it with whatever headers a test wants."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from tests.programs import ROOT, environment, running


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    port: int
    err: Path
    folder: Path
    token: str = field(init=False)

    def __post_init__(self) -> None:
        self.token = urlsplit(self.url).query.removeprefix("token=")

    def ask(self, method: str, target: str, body: Any = None, *, trusted: bool = True, **headers: str) -> Answer:
        """One request; ``trusted`` sends the token as programs do. Header names with ``_`` for ``-``."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if trusted:
            sent["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        con = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            con.request(method, target, data, sent)
            came = con.getresponse()
            return Answer(came.status, came.headers, came.read().decode())
        finally:
            con.close()

    def get(self, path: str, **query: Any) -> Any:
        """The JSON of a route; anything but success fails the test."""
        came = self.ask("GET", f"/api/{path}?{urlencode(query)}")
        assert came.status == 200, came.text
        return came.json

    def run(self, run_id: str) -> dict[str, Any]:
        return self.get("run", id=run_id)

    def steps(self, run_id: str) -> dict[str, dict[str, Any]]:
        """The steps of a run by name."""
        return {step["name"]: step for step in self.run(run_id)["steps"]}

    def step(self, run_id: str, name: str) -> dict[str, Any]:
        return self.get("step", run=run_id, id=self.steps(run_id)[name]["id"])

    def decide(self, how: str, **given: Any) -> Answer:
        return self.ask("POST", f"/api/task/{how}", given)

    def stop(self, number: int = signal.SIGINT) -> int:
        """How it ended after a signal."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def serve(folder: Path, *args: str, env: dict[str, str] | None = None, shared: bool = False) -> Served:
    """Start ``agentflow ui`` over the journal ``folder / "journal"`` and wait until it has said where it is.

    What a failed test leaves running is killed after it, unless it is ``shared`` by others.
    """
    err = folder / f"ui-{time.monotonic_ns()}.err"
    with err.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "agentflow", "ui", "--json", "--no-open", *args],
            cwd=ROOT, env=environment(folder, env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    if not shared:
        running.append(process)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait(60)
        process.stdout.close()
        raise AssertionError(f"no server: {err.read_text()}")
    said = json.loads(line)
    return Served(process, said["url"], said["port"], err, folder)


def until(found: Any, seconds: float = 60) -> Any:
    """What a function gives, once that is true."""
    deadline = time.monotonic() + seconds
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {value!r}"
        time.sleep(0.02)


def opened_files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("new-ui-"))
