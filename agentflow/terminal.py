"""Asking people in the terminal that a run was started from: ``.options(wait=True)``, where there is one.

One thread asks one task after another and records what is decided as ``tasks.approve`` and the others do; the run
finds the decision in the journal, like one that came from elsewhere. The terminal is never switched to another mode:
lines are read when they are complete, so nothing has to be put back when the program is stopped. Between lines the
thread also waits for the news that a task is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any

import orjson

from agentflow import answers, tasks
from agentflow.errors import AgentflowError, UsageError
from agentflow.records import UNSET, HumanTask
from agentflow.redact import redact
from agentflow.settings import settings
from agentflow.shown import clean, shown

_WIDTH = 80
_LINES = 200  # of data; the rest is looked at with `agentflow tasks show`


class _Later(Exception):
    """The person leaves the task open."""


class _Gone(Exception):
    """The task is not waited for any more: it was decided elsewhere, or its run has ended."""


def prompter() -> Prompter | None:
    """Who asks in this process's terminal; None where nobody can be asked there, or should not."""
    if not settings.ask or os.environ.get("AGENTFLOW_ASK") == "0":
        return None
    if "_pytest" in sys.modules or "ipykernel" in sys.modules:
        return None
    try:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return None
        import termios  # noqa: F401
    except (AttributeError, ValueError, ImportError):  # no streams at all, closed ones, no terminals of this kind
        return None
    return _prompter


class Prompter:
    """Asks the open tasks that runs of this process wait for, one at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: dict[str, int] = {}
        self._left: set[str] = set()
        self._thread: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._typed = b""

    def add(self, wait: Any) -> None:
        """Ask the tasks that a branch waits for from now on."""
        with self._lock:
            for ident in _tasks(wait):
                self._wanted[ident] = self._wanted.get(ident, 0) + 1
            if self._thread is None and self._next() is not None:
                if self._wake is None:
                    self._wake = os.pipe()
                self._thread = threading.Thread(target=self._ask_all, name="agentflow-terminal", daemon=True)
                self._thread.start()

    def drop(self, wait: Any) -> None:
        """The branch waits for them no more."""
        with self._lock:
            for ident in _tasks(wait):
                self._wanted[ident] -= 1
                if not self._wanted[ident]:
                    del self._wanted[ident]
                    self._left.discard(ident)
            if self._wake is not None:
                os.write(self._wake[1], b"!")

    def _next(self) -> str | None:
        return next((ident for ident in self._wanted if ident not in self._left), None)

    def _ask_all(self) -> None:
        while True:
            with self._lock:
                ident = self._next()
                if ident is None:
                    self._thread = None
                    return
            try:
                try:
                    self._ask(tasks.get(ident))
                except _Gone:
                    self._say("\n" + _gone(ident))
                except _Later:
                    self._say("\n" + _left_open(ident))
            except AgentflowError as error:  # decided by another person at this moment, say
                self._say(f"{redact(str(error))}\n")
            with self._lock:
                self._left.add(ident)  # asked once, while it is waited for

    def _ask(self, task: HumanTask) -> None:
        if task.status != "open":
            raise _Gone
        self._begin(task)
        self._say("\n".join(["", *_described(task), ""]))
        while True:
            data: Any = UNSET
            approved = self._decision(task)
            if approved and answers.asks_for_data(task):
                data = self._data(task)
            comment = self._line(task, "Comment (Enter: none) > ").strip() or None
            try:
                if not approved:
                    done = tasks.reject(task.id, by=answers.user(), comment=comment)
                elif data is UNSET:
                    done = tasks.approve(task.id, by=answers.user(), comment=comment)
                else:
                    done = tasks.answer(task.id, data, by=answers.user(), comment=comment)
            except UsageError as error:
                self._say(f"{redact(str(error))}\n")
                continue
            self._say(f"Recorded: {done.status}.\n")
            return

    def _decision(self, task: HumanTask) -> bool:
        words = {"input": "Answer", "in_doubt": "Did it happen"}
        what = words.get(task.type, "Approve" if task.schema is None else "Fill it in")
        while True:
            word = self._line(task, f"{what}? [y]es, [n]o, Enter: later > ").strip().lower()
            if not word:
                raise _Later
            if word in answers.YES + answers.NO:
                return word in answers.YES
            self._say("Please answer y or n, or press Enter to leave it open.\n")

    def _data(self, task: HumanTask) -> Any:
        form = task.schema
        if form is None:
            text = self._line(task, "The answer (JSON, or else text; Enter: none) > ")
            return UNSET if not text.strip() else answers.parsed(text, text)
        fields = form.get("properties")
        if not fields:
            return self._value(task, "The answer", form, required=True)
        before = answers.filled(task, form)
        found = {}
        for name, field in fields.items():
            required = name in form.get("required", ()) and name not in before
            default = before.get(name, field.get("default", UNSET))
            value = self._value(task, name, field, required=required, default=default)
            if value is not UNSET:
                found[name] = value
        return found

    def _value(
        self, task: HumanTask, name: str, form: dict[str, Any], *, required: bool, default: Any = UNSET
    ) -> Any:
        """What somebody types for one field, read as the form has it; UNSET for one that is left as it is."""
        kind = answers.kind(form)
        hint = f" [{_scalar(default)}]" if default is not UNSET else "" if required else " (Enter: none)"
        while True:
            text = self._line(task, f"  {clean(name)}{f' ({kind})' if kind else ''}{hint} > ").strip()
            if not text and not required:
                return UNSET
            if not text:
                self._say(f"{clean(name)} needs an answer.\n")
                continue
            value, wrong = answers.read(text, form, name, task.schema)
            if wrong is None:
                return value
            self._say(f"{redact(str(wrong))}.\n")

    # -- the terminal ------------------------------------------------------------------------

    def _begin(self, task: HumanTask) -> None:
        """What was typed before a task is shown is no answer to it."""
        import termios

        self._in_front(task)
        self._typed = b""
        with contextlib.suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)

    def _in_front(self, task: HumanTask) -> None:
        """Wait until the process has the terminal: reading from the background would stop it."""
        assert self._wake is not None
        while not _foreground():
            self._check(task)
            if select.select([self._wake[0]], [], [], 1.0)[0]:
                os.read(self._wake[0], 4096)

    def _check(self, task: HumanTask) -> None:
        with self._lock:
            if task.id not in self._wanted:
                raise _Gone

    def _line(self, task: HumanTask, prompt: str) -> str:
        """One line that somebody types, without its end."""
        assert self._wake is not None
        self._check(task)
        self._say(prompt)
        source = sys.stdin.fileno()
        while b"\n" not in self._typed:
            ready, _, _ = select.select([source, self._wake[0]], [], [])
            if self._wake[0] in ready:
                os.read(self._wake[0], 4096)
                self._check(task)
                continue
            self._in_front(task)
            try:
                more = os.read(source, 4096)
            except OSError:  # the terminal was closed
                more = b""
            if not more:
                raise _Later
            self._typed += more
        line, _, self._typed = self._typed.partition(b"\n")
        self._check(task)
        return line.decode(sys.stdin.encoding or "utf-8", "replace")

    def _say(self, text: str) -> None:
        # Past the stream's lock: the interpreter may end at any moment in this daemon thread.
        data = clean(text).encode(sys.stderr.encoding or "utf-8", "replace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(sys.stderr.fileno(), data) :]


_prompter = Prompter()


def _after_fork() -> None:
    global _prompter
    _prompter = Prompter()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _tasks(wait: Any) -> list[str]:
    return [] if wait is None else [info["id"] for info in (wait.info, *wait.more) if info.get("kind") == "task"]


def _foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:  # not this process's own terminal: nothing can stop it for reading there
        return True


def _gone(ident: str) -> str:
    """What has become of a task that somebody was just being asked."""
    task = tasks.get(ident)
    if task.decision is not None:
        return f"Meanwhile {ident} was {task.status} by {task.decision.by or 'somebody'}.\n"
    return _left_open(ident) if task.status == "open" else f"Meanwhile {ident} was {task.status}.\n"


def _left_open(ident: str) -> str:
    return f"Left open. Later: agentflow tasks show {ident}\n"


def _described(task: HumanTask) -> Iterator[str]:
    names = [task.assign_to] if isinstance(task.assign_to, str) else task.assign_to
    yield from _wrapped(f"{task.title or task.type}", "")
    yield from _wrapped(f"task {task.id} for {', '.join(names or ()) or 'anybody'}, run {task.run_id}", "")
    lines = list(_lines(shown(task.data), "  ")) if task.data is not None else []
    yield from lines[:_LINES]
    if len(lines) > _LINES:
        yield f"  ... {len(lines) - _LINES} more lines: agentflow tasks show {task.id}"


def _lines(value: Any, indent: str) -> Iterator[str]:
    """Plain data as people read it, within the width of a terminal."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _entry(f"{key}:", item, indent)
    elif isinstance(value, list) and value:
        for item in value:
            yield from _entry("-", item, indent)
    else:
        yield from _wrapped(_scalar(value), indent)


def _entry(label: str, item: Any, indent: str) -> Iterator[str]:
    long = isinstance(item, str) and (len(item) > _WIDTH // 2 or "\n" in item)
    if (isinstance(item, dict | list) and item) or long:
        yield from _wrapped(label, indent)
        yield from _lines(item, indent + "  ")
    else:
        yield from _wrapped(f"{label} {_scalar(item)}", indent)


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(shown(value)).decode()


def _wrapped(text: str, indent: str) -> Iterator[str]:
    import textwrap

    width = _WIDTH
    with contextlib.suppress(OSError):
        width = max(20, min(_WIDTH, os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH))
    for line in redact(text).splitlines() or [""]:
        yield from textwrap.wrap(
            line, width, initial_indent=indent, subsequent_indent=indent, replace_whitespace=False
        ) or [""]
