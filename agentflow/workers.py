"""Daemon threads for the functions of steps."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future


class Work:
    """A function for a thread, and what it came back with: ``error``, or ``value`` where that is None.

    ``took`` is the seconds between.
    """

    __slots__ = ("_args", "_context", "_fn", "_kwargs", "_lock", "_tell", "error", "is_back", "took", "value")

    def __init__(
        self, context: contextvars.Context, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._context = context
        self._fn = fn
        self._args = args
        self._kwargs = kwargs
        self._lock = threading.Lock()
        self._tell: Callable[[], Any] | None = None
        self.is_back = False
        self.took = 0.0
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call the function; in the thread."""
        start = time.perf_counter()
        try:
            self.value = self._context.run(self._fn, *self._args, **self._kwargs)
        except StopIteration as error:  # cannot be raised into a future or a coroutine
            self.error = RuntimeError(f"{getattr(self._fn, '__qualname__', self._fn)} raised StopIteration")
            self.error.__cause__ = error
        except BaseException as error:
            self.error = error
        self.took = time.perf_counter() - start
        with self._lock:
            self.is_back = True
            tell, self._tell = self._tell, None
        if tell is not None:
            tell()

    def tell(self, tell: Callable[[], Any]) -> bool:
        """Have ``tell`` called in the thread when the function is back, instead of what was to be called before.

        False: it is back already, and nothing is called.
        """
        with self._lock:
            if self.is_back:
                return False
            self._tell = tell
        return True

    def wait(self, seconds: float) -> bool:
        """Hold up the calling thread until the function is back; False if it is not in that time."""
        back = threading.Lock()
        back.acquire()
        return not self.tell(back.release) or back.acquire(timeout=seconds)

    def result(self) -> Any:
        """What the function returned; raises what it raised. Only when it is back."""
        if self.error is not None:
            raise self.error
        return self.value

    def future(self) -> Future[Any]:
        """A future of the function, told instead of whoever was to be told before; done if the function is back."""
        from concurrent.futures import Future  # with logging, which programs that use no threads need not load

        future: Future[Any] = Future()

        def resolve() -> None:
            if self.error is not None:
                future.set_exception(self.error)
            else:
                future.set_result(self.value)

        if not self.tell(resolve):
            resolve()
        return future


class _Worker:
    """One thread, which waits for its next job."""

    __slots__ = ("go", "job")

    def __init__(self) -> None:
        self.go = threading.Lock()  # free while there is a job to begin
        self.go.acquire()
        self.job: Work | None = None


class _Threads:
    """Daemon threads, reused: one that never comes back must not keep the process from ending."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin without threads, as in a child process, where those of its parent are not."""
        self._idle: list[_Worker] = []

    def start(self, work: Work) -> None:
        try:
            worker = self._idle.pop()  # the one that came back last: its memory is warm
        except IndexError:
            worker = _Worker()
            threading.Thread(target=self._loop, args=(worker,), name="agentflow-step", daemon=True).start()
        worker.job = work
        worker.go.release()

    def submit(
        self, context: contextvars.Context, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[Any]:
        work = Work(context, fn, args, kwargs)
        future = work.future()
        self.start(work)
        return future

    def _loop(self, worker: _Worker) -> None:
        while True:
            worker.go.acquire()
            work, worker.job = worker.job, None
            assert work is not None
            work.run()
            del work
            self._idle.append(worker)


threads = _Threads()

# Functions whose callers were cancelled while they ran on, by (journal, run, occurrence): done once what
# they returned is recorded. Whoever asks for the step meanwhile waits instead of calling it twice.
in_flight: dict[tuple[str, str, str], Future[Any]] = {}


def _after_fork() -> None:
    threads.begin()
    in_flight.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
