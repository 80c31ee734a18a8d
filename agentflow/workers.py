"""Daemon threads for the functions of steps."""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future


class _Threads:
    """Daemon threads, reused: one that never comes back must not keep the process from ending."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin without threads, as in a child process, where those of its parent are not."""
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = 0
        self._lock = threading.Lock()

    def submit(
        self, context: contextvars.Context, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[Any]:
        from concurrent.futures import Future  # with logging, which programs that use no threads need not load

        future: Future[Any] = Future()
        with self._lock:
            start = self._idle == 0
            if not start:
                self._idle -= 1
        if start:
            threading.Thread(target=self._loop, name="agentflow-step", daemon=True).start()
        self._work.put((future, context, fn, args, kwargs))
        return future

    def _loop(self) -> None:
        while True:
            future, context, fn, args, kwargs = self._work.get()
            try:
                result = context.run(fn, *args, **kwargs)
            except StopIteration as error:  # cannot be raised into a future: its waiter would wait for ever
                stopped = RuntimeError(f"{getattr(fn, '__qualname__', fn)} raised StopIteration")
                stopped.__cause__ = error
                future.set_exception(stopped)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, context, fn, args, kwargs
            with self._lock:
                self._idle += 1


threads = _Threads()

# Functions whose callers were cancelled while they ran on, by (journal, run, occurrence): done once what
# they returned is recorded. Whoever asks for the step meanwhile waits instead of calling it twice.
in_flight: dict[tuple[str, str, str], Future[Any]] = {}


def _after_fork() -> None:
    threads.begin()
    in_flight.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
