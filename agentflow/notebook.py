"""Runs in notebooks: a card that follows a run while it executes in a cell, cards of all objects, buttons for people.

This file is loaded when a notebook asks for a card, or when a run begins in an IPython kernel, and by nothing else.

The runs of one cell share one *board*: one display, which is updated in place, at most five times a second, from a
thread that only looks at what the runs have noted (watched.py). The end of a cell waits for the last update. What a
board shows is not said on stderr as well; a program's own log handlers get it all the same.
"""

from __future__ import annotations

import contextvars
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from agentflow import cardparts as part
from agentflow import cards, forms, runcards, rundocs, tasks
from agentflow.errors import TaskNotFound, Waiting
from agentflow.handles import Run
from agentflow.kernels import cell, kernel
from agentflow.records import HumanTask
from agentflow.rich import Listed
from agentflow.run import Execution
from agentflow.settings import log, settings
from agentflow.watched import Watched

PAUSE = 0.2  # seconds between two updates of a display
_SECOND = 1.0  # seconds after which the times on a card are brought up to date
_CARDS = 20  # runs of a cell that are shown; of more, the newest
_FORMS = 5  # tasks below one card
_LEFT = 3.0  # seconds that the end of a run may take to be committed


# -- cards of objects ------------------------------------------------------------------------


def html(value: Any) -> str:
    """The card of one of agentflow's objects."""
    return cards.html(value)


def words(value: Any) -> str:
    """The same in words."""
    return cards.text(value)


def bundle(value: Any) -> dict[str, Any]:
    """Its display, by MIME types: HTML and text; in a kernel with ipywidgets, with forms for its open tasks."""
    card = html(value)
    made = {"text/plain": words(value), "text/html": card}
    if (shell := kernel()) is None:
        return made
    if isinstance(value, Run) and (board := _boards.get(_name(shell))) is not None:
        board.fold(value.id)
    if forms.available() and (asked := _asked(value)):
        made = forms.under(card, asked) | made
    return made


def _asked(value: Any) -> list[HumanTask]:
    """The open tasks of what is displayed."""
    if isinstance(value, HumanTask):
        found = [value]
    elif isinstance(value, Listed):
        found = [each for each in value if isinstance(each, HumanTask)]
    elif isinstance(value, Run | Waiting):
        found = list(_tasks(value.waiting_on))
    else:
        found = []
    return [task for task in found if task.status == "open"][:_FORMS]


def _tasks(waiting_on: list[dict[str, Any]]) -> Iterator[HumanTask]:
    for wait in waiting_on:
        if wait.get("kind") == "task":
            try:
                yield tasks.get(wait["id"])
            except TaskNotFound:  # of another journal than the one that is open now
                continue


# -- runs in cells ---------------------------------------------------------------------------


def execution() -> type[Execution]:
    """What a run is executed by in this process."""
    if not settings.progress or os.environ.get("AGENTFLOW_PROGRESS") == "0" or kernel() is None:
        return Execution
    return Shown


class Shown(Watched):
    """An execution that stands on the board of the cell in which it was started."""

    board: Board | None = None

    @property
    def shown(self) -> bool:
        return self.board is not None and not self.board.broken

    def begins(self) -> None:
        shell = kernel()
        if shell is not None:
            self.terminal = self
            self.board = _board(shell)
            self.board.join(self)

    def ends(self, line: str) -> bool:
        if self.board is None:
            return False
        self.board.ended(self, line)
        if self.shown:
            self._log("info", line)
        return self.shown

    def add(self, wait: Any) -> None:
        super().add(wait)
        if self.board is not None and self.stay and wait is not None and not _blocks():
            self.board.ask(self, [wait.info, *wait.more])

    def drop(self, wait: Any) -> None:
        super().drop(wait)
        if self.stay and wait is not None and forms.available():
            for info in (wait.info, *wait.more):
                forms.closed(str(info["id"]))


def _blocks() -> bool:
    """Whether the cell holds up the kernel while it waits: then no click arrives before it has ended."""
    thread = threading.current_thread()
    if thread.name == "agentflow-run":  # run_sync in a cell, which waits for this thread
        return True
    if thread is not threading.main_thread():
        return False
    asyncio = sys.modules.get("asyncio")
    return asyncio is None or asyncio._get_running_loop() is None


_boards: dict[str, Board] = {}
_boards_lock = threading.Lock()


def _name(shell: Any) -> str:
    """What names the cell whose code is running."""
    return str(cell(shell).get("msg_id", ""))


def _board(shell: Any) -> Board:
    name = _name(shell)
    with _boards_lock:
        for known in [each for each, board in _boards.items() if each != name and not board.open]:
            del _boards[known]
        if name not in _boards:
            _boards[name] = Board(shell)
        return _boards[name]


class _Entry:
    """A run on a board: what executes it, and once it has ended its card and the words that say the same."""

    def __init__(self, ex: Shown) -> None:
        self.ex: Shown | None = ex
        self.run_id = ex.run_id
        self.status = "running"
        self.title = ""
        self.content = ""
        self.words = ""
        self.nested = False
        self.folded = False
        self._closed: float | None = None

    def left(self) -> bool:
        """Whether its end could not be committed: it is over, and nobody says so."""
        if self.ex is not None and self.ex.closed and self._closed is None:
            self._closed = time.monotonic()
        return self._closed is not None and time.monotonic() - self._closed > _LEFT

    def end(self, ex: Shown, line: str) -> None:
        run = Run(ex.journal, rundocs.find(ex.journal, ex.run_id))
        self.status, self.nested = run.status, ex.around is not None
        self.title = f"{part.dot(run.status)} {part.line(f'{run.id} · {line}', 200)}"
        self.content = "".join(runcards.ended(run, ex, line))
        self.words = "\n".join(runcards.ended_words(run, line, ex.notes))
        self.ex = None

    def look(self) -> None:
        """Bring a running one up to date."""
        if self.ex is not None:
            self.status, self.nested = self.ex.state, self.ex.around is not None
            line = f"{self.run_id} · {self.status} · {runcards.progress(self.ex)}"
            self.title = f"{part.dot(self.status)} {part.line(line, 200)}"
            self.content, self.words = "".join(runcards.running(self.ex)), part.text(line)

    def html(self, alone: bool) -> str:
        if self.folded:
            return f"<div>{self.title}</div>"
        if alone:
            return self.content
        inner = f'<div class="af-inner">{self.content}</div>'
        return part.details(
            self.title, inner, opened=self.status in ("running", "failed", "waiting") and not self.nested
        )


class Board:
    """The display of the runs of one cell. Attributes: ``broken`` (True: it failed, and shows nothing any more)."""

    def __init__(self, shell: Any) -> None:
        self.broken = False
        self._shell = shell
        self._context = contextvars.copy_context()  # with the message that the display answers
        self._ident = f"agentflow-{os.urandom(8).hex()}"
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._count = 0
        self._asked: set[str] = set()
        self._dirty = False  # something has changed besides what running executions count themselves
        self._seen = 0  # changes that they had counted when they were shown
        self._at = 0.0
        self._there = False
        self._thread: threading.Thread | None = None
        shell.events.register("post_run_cell", self._cell_ends)

    @property
    def open(self) -> bool:
        """Whether a run on it has not ended, or how one ended is not shown yet."""
        with self._lock:
            return self._dirty or any(entry.ex is not None for entry in self._entries.values())

    def join(self, ex: Shown) -> None:
        """A run begins."""
        with self._lock:
            self._count += self._entries.pop(ex.run_id, None) is None
            self._entries[ex.run_id] = _Entry(ex)
            ended = [name for name, entry in self._entries.items() if entry.ex is None]
            for name in ended[: max(0, len(self._entries) - _CARDS)]:
                del self._entries[name]
            self._dirty = True
            self._show()
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="agentflow-notebook", daemon=True)
                self._thread.start()

    def ended(self, ex: Shown, line: str) -> None:
        """A run has ended, waits or was interrupted; ``line`` says so."""
        with self._lock:
            entry = self._entries.get(ex.run_id)
            if entry is None or entry.ex is not ex:
                return
            self._safely(lambda: entry.end(ex, line))
            self._dirty = True
            self._show()
        if entry.status == "waiting" and not entry.nested:
            self.ask(ex, _waits(ex))

    def fold(self, run_id: str) -> None:
        """The run is displayed by itself in this cell: a line is enough here."""
        with self._lock:
            entry = self._entries.get(run_id)
            if entry is not None and entry.ex is None and not entry.folded:
                entry.folded = self._dirty = True
                self._show(now=True)

    def ask(self, ex: Shown, waits: list[dict[str, Any]]) -> None:
        """Show the forms of the tasks that are waited for, each once in a cell."""
        if self.broken or not forms.available():
            return
        held = weakref.ref(ex)  # widgets live as long as their kernel

        def goes_on() -> bool:
            return (still := held()) is not None and not still.closed

        with self._lock:
            for task in _tasks([wait for wait in waits if wait["id"] not in self._asked][:_FORMS]):
                self._asked.add(task.id)
                if task.status == "open":
                    self._safely(functools.partial(self._publish_form, task, goes_on))

    # -- the display ---------------------------------------------------------------------------

    def _follow(self) -> None:
        """Bring the display up to date now and then, until no run is open."""
        while True:
            time.sleep(PAUSE)
            with self._lock:
                for entry in list(self._entries.values()):
                    if entry.ex is not None and entry.left():
                        self.ended(entry.ex, "ended")
                if not any(entry.ex is not None for entry in self._entries.values()):
                    self._show(now=True)
                    self._thread = None
                    return
                self._show()

    def _cell_ends(self, result: Any) -> None:
        self._shell.events.unregister("post_run_cell", self._cell_ends)
        with self._lock:
            self._show(now=True)

    def _show(self, *, now: bool = False) -> None:
        """Publish what has changed, unless it is too early; then the thread does, or the end of the cell."""
        running = [entry.ex for entry in self._entries.values() if entry.ex is not None]
        seen = sum(ex.changes for ex in running)
        since = time.monotonic() - self._at
        if self.broken or not (self._dirty or seen != self._seen or (running and since >= _SECOND)):
            return
        if now or since >= PAUSE or not self._there:
            self._dirty, self._seen = False, seen
            self._safely(self._publish_all)

    def _publish_all(self) -> None:
        entries = list(self._entries.values())
        for entry in entries:
            entry.look()
        first = [entry for entry in entries if not entry.nested]
        alone = first[0] if len(first) == 1 else None
        earlier = self._count - len(entries)
        content = [entry.html(entry is alone) for entry in entries]
        plain = [entry.words for entry in entries]
        if earlier > 0:
            content.insert(0, f'<div class="af-dim">{earlier} earlier runs of this cell</div>')
            plain.insert(0, f"{earlier} earlier runs of this cell")
        card = part.card(content, alone.status if alone else "")
        self._publish(
            {"text/html": card, "text/plain": "\n".join(plain)}, {"display_id": self._ident}, update=self._there
        )
        self._there, self._at = True, time.monotonic()

    def _publish_form(self, task: HumanTask, goes_on: Callable[[], bool]) -> None:
        self._publish(forms.form(task, goes_on), {}, update=False)

    def _publish(self, data: dict[str, Any], transient: dict[str, Any], *, update: bool) -> None:
        publish = self._shell.display_pub.publish
        self._context.copy().run(publish, data, {}, transient=transient, update=update)

    def _safely(self, do: Callable[[], None]) -> None:
        """A display that cannot be drawn or sent must not stop the run."""
        try:
            do()
        except Exception:
            self.broken = True
            log.exception("the display of runs in this cell failed; what they do is said here from now on")


def _waits(ex: Shown) -> list[dict[str, Any]]:
    return Run(ex.journal, rundocs.find(ex.journal, ex.run_id)).waiting_on
