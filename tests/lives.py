"""Processes that begin at once: a server whose imports are done forks one for each program that it is told to run.

What runs in them is what ``python program.py words`` would run, in a process of its own that can be killed at any
moment. Only the imports are done before.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.programs import ROOT, Ended, environment, write_program

_SERVER = """
import json, os, runpy, sys, traceback
import openai, pydantic, diskcache, asyncio, logging
import agentflow.providers.openai, agentflow.flow, agentflow.generate, agentflow.tasks, agentflow.sync, agentflow.cli.app
import agentflow.aicall, agentflow.human, agentflow.events, agentflow.humantask
from agentflow import *

def live(order):
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.close(0)
    sys.argv[:] = [order["file"], *order["words"]]
    sys.path[0] = order["cwd"]
    code = 0
    try:
        if order["file"]:
            runpy.run_path(order["file"], run_name="__main__")
        else:
            runpy.run_module("agentflow", run_name="__main__", alter_sys=False)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    if "poll" in order:
        print(int(os.waitid(os.P_PID, order["poll"], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        live(order)
    print(pid, flush=True)
"""


class Life:
    """One process. It is a zombie until ``end`` is called, so that its id is nobody else's."""

    def __init__(self, lives: Lives, pid: int, out: Path, err: Path) -> None:
        self._lives = lives
        self.pid = pid
        self._out, self._err = out, err
        self._code: int | None = None

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def alive(self) -> bool:
        return self._code is None and not int(self._lives.ask({"poll": self.pid}))

    def end(self, seconds: float = 120) -> Ended:
        """How it ended, once it has; one that does not end in time fails the test."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                self._wait()
                raise TimeoutError(f"did not end within {seconds:g} s\n{self._out.read_text()}\n{self._err.read_text()}")
            time.sleep(0.003)
        self._wait()
        assert self._code is not None
        return Ended(self._code, self._out.read_text(), self._err.read_text())

    def kill(self) -> Ended:
        """Kill it, unless it is over; how it ended."""
        self.signal(signal.SIGKILL)
        return self.end()

    def _wait(self) -> None:
        if self._code is None:
            self._code = int(self._lives.ask({"wait": self.pid}))


class Lives:
    """The server, and what is run by it."""

    def __init__(self) -> None:
        self.folder = Path()
        self.env: dict[str, str] = {}
        self._count = 0
        self.all: list[Life] = []
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._line() == "ready"

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def ask(self, order: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._line()

    def start(self, source: str | None, *words: str, env: dict[str, str] | None = None, name: str = "program.py") -> Life:
        """Begin a program (None: the command line) with ``env`` beside the test's own."""
        file = "" if source is None else str(write_program(source, self.folder, name))
        self._count += 1
        out, err = (self.folder / f"{self._count}.{stream}" for stream in ("out", "err"))
        order = {
            "file": file, "words": words, "env": environment(self.folder, {**self.env, **(env or {})}),
            "cwd": str(self.folder), "out": str(out), "err": str(err),
        }  # fmt: skip
        out.touch()
        err.touch()
        life = Life(self, int(self.ask(order)), out, err)
        self.all.append(life)
        return life

    def run(
        self, source: str | None, *words: str, env: dict[str, str] | None = None, name: str = "program.py", code: int = 0
    ) -> Ended:
        """A program's whole life; -9 is the code of one that was killed."""
        ended = self.start(source, *words, env=env, name=name).end()
        assert ended.code == code, f"ended with {ended.code}\n{ended.out}\n{ended.err}"
        return ended

    def killed_after(self, seconds: float, source: str, *words: str) -> bool:
        """A life that is killed after some time, unless it was over before: then False."""
        life = self.start(source, *words)
        time.sleep(seconds)
        ended = life.kill()
        assert ended.killed or ended.code == 0, f"ended with {ended.code}\n{ended.out}\n{ended.err}"
        return ended.killed

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()
