"""Who commits when: jobs that share transactions, and so syncs, whatever a transaction is (writer.py, pgjournal.py).

How a commit travels: a *job* (ops with a fence, or a guarded function) runs at once in the thread that
asks when nothing else is under way and the journal is free; otherwise it goes to one writer thread,
which takes one job, drains what else is waiting into the same transaction, and so shares one sync.
There is no timer: a lone job is never delayed. Refused jobs (a lost lease, a guarded function that
raised) do not touch their neighbours; when the shared transaction itself fails, each job is tried alone.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from agentflow.calls import current_task
from agentflow.errors import JournalError, UsageError
from agentflow.ops import Add, Fence, Op, Txn

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_CROWD_SECONDS = 0.005


class Job(Generic[T]):
    """One group of writes that happens entirely or not at all; ``ops`` where it is known to be no more than these."""

    __slots__ = (
        "body", "committed", "done", "error", "fence", "future", "guarded", "on_orphan", "ops", "patience", "result",
    )  # fmt: skip

    def __init__(
        self, body: Callable[[Txn], T], *, fence: Fence | None = None, guarded: bool = False, ops: Sequence[Op] = ()
    ) -> None:
        self.body = body
        self.ops = ops
        self.fence = fence
        self.guarded = guarded
        self.committed = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.future: asyncio.Future[T] | None = None
        self.done: threading.Event | None = None
        self.on_orphan: Callable[[], None] | None = None  # called when it failed and nobody waits any more
        self.patience: float | None = None  # seconds to wait for another process's lock; None: the writer's own

    def run(self, txn: Txn) -> T:
        if self.fence is not None:
            txn.check(self.fence)
        return self.body(txn)


class NotNow(Exception):
    """The transaction could not be begun, or has to be repeated: another process is at work, or the server away.

    ``error``: what it is for those who do not want to wait any longer; None: that the journal was busy. ``hopeless``:
    nobody is to wait any longer.
    """

    def __init__(self, error: JournalError | None = None, *, hopeless: bool = False) -> None:
        super().__init__()
        self.error = error
        self.hopeless = hopeless


class Commits(ABC):
    """All writes of one process to one journal.

    ``busy_seconds``: how long a commit waits for its turn before it fails.
    ``transactions``: how many were committed, each one sync.
    """

    at_once = True  # a transaction takes no longer than handing it to another thread, and never waits
    longest_pause = 0.02

    def __init__(self, place: object, *, busy_seconds: float = 30.0) -> None:
        self.busy_seconds = busy_seconds
        self.transactions = 0
        self.before: Callable[[Txn], Callable[[], None]] | None = None  # imports spilled replies when there are any
        self._place = place
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopping = False
        self._inside = 0
        self._turn: tuple[Any, Any] = (None, None)
        self._crowded = 0.0

    @property
    def closed(self) -> bool:
        """True after ``close``."""
        return self._closed

    # -- what a kind of journal supplies ----------------------------------------------------------

    @abstractmethod
    def _transact(self, jobs: list[Job[Any]], *, drain: bool) -> None:
        """One transaction for ``jobs`` and, with ``drain``, for all that wait behind them.

        Raises NotNow when it has to wait; a job's own refusal is left in the job.
        """

    @abstractmethod
    def add(self, op: Add, fence: Fence) -> bool:
        """Commit one new record in a statement of its own, which is most of what steps commit.

        False, and nothing is done, where it takes a transaction to find out what is the matter, or others are at work.
        """

    @abstractmethod
    def _busy(self, waited: float) -> JournalError:
        """The error for having waited too long for another process."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close the connection."""

    # -- doing it ---------------------------------------------------------------------------------

    def run(self, job: Job[T]) -> T:
        """Do one job and return its result once it is fsynced."""
        self._refuse_nesting()
        if self.at_once and self._queue.empty() and not self._lock.locked():
            try:
                return self._alone(job)
            except NotNow:
                pass  # the writer thread waits for it, so that Ctrl-C and the loop stay responsive
        job.done = threading.Event()
        self._submit(job)
        job.done.wait()
        if job.error is not None:
            raise job.error
        return cast(T, job.result)

    async def arun(self, job: Job[T]) -> T:
        """Do one job without keeping the loop waiting for other commits or processes.

        When the caller is cancelled it waits for the end of the job all the same, for only then is it known what is
        recorded.

        Raises:
            CancelledAfterCommit: it was cancelled, and the job is done.
        """
        import asyncio

        from agentflow.cancelled import CancelledAfterCommit

        self._refuse_nesting()
        loop = asyncio.get_running_loop()
        if self.may_inline(loop):
            try:
                return self._alone(job)
            except NotNow:
                pass
        job.future = loop.create_future()
        self._submit(job)
        try:
            return await asyncio.shield(job.future)
        except asyncio.CancelledError:
            await _to_its_end(job.future)
            if job.error is not None:
                _orphan(job)
                raise
            raise CancelledAfterCommit(job.result) from None

    def may_inline(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether a coroutine's commit is best done in this very turn of its loop."""
        # Commits of several tasks in one turn of the loop are worth one shared fsync; commits that one
        # task makes one after the other cannot share any, and a thread hand-off would only cost time.
        task = current_task()
        if self._turn[0] is loop:
            if self._turn[1] is not task:
                self._crowded = time.monotonic()
                return False
            return self._queue.empty() and not self._lock.locked()
        if not self._queue.empty() or self._lock.locked():
            self._crowded = time.monotonic()
            return False
        if time.monotonic() - self._crowded < _CROWD_SECONDS:
            return False
        self._turn = (loop, task)
        loop.call_soon(self._next_turn)
        return True

    def _next_turn(self) -> None:
        self._turn = (None, None)

    def _refuse_nesting(self) -> None:
        if self._inside and self._inside == threading.get_ident():
            raise UsageError("commit() and guarded() cannot be called inside guarded(): use the Txn it was given.")
        if self._closed:
            raise UsageError(f"The journal {self._place} is closed: open it again with Journal.open().")

    def _alone(self, job: Job[T]) -> T:
        self._transact([job], drain=False)
        if job.error is not None:
            raise job.error
        return cast(T, job.result)

    # -- the writer thread ------------------------------------------------------------------------

    def _submit(self, job: Job[Any]) -> None:
        self._queue.put(job)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="agentflow-writer", daemon=True)
                    self._thread.start()

    def _work(self) -> None:
        while not self._stopping and (first := self._queue.get()) is not None:
            jobs: list[Job[Any]] = [first]
            self._patiently(jobs, drain=True)
            self._deliver(jobs)

    def _drain(self, jobs: list[Job[Any]]) -> None:
        while not self._queue.empty():
            job = self._queue.get_nowait()
            if job is None:
                self._stopping = True
            else:
                jobs.append(job)

    def _patiently(self, jobs: list[Job[Any]], *, drain: bool) -> None:
        """Commit the jobs, waiting for other processes within their patience; errors are left in the jobs."""
        started = time.monotonic()
        pause = 0.0005
        while jobs:
            try:
                self._transact(jobs, drain=drain)
                return
            except NotNow as now:
                waited = time.monotonic() - started
                late = [job for job in jobs if now.hopeless or waited >= self._patience(job)]
                for job in late:
                    jobs.remove(job)
                    job.error = now.error or self._busy(self._patience(job))
                self._deliver(late)
                if drain:
                    self._drain(jobs)
                time.sleep(pause)
                pause = min(pause * 2, self.longest_pause)
            except BaseException as error:
                if len(jobs) == 1:
                    jobs[0].error = error
                    return
                for job in jobs:  # one of them may be the culprit: the others shall not suffer
                    alone = [job]
                    self._patiently(alone, drain=False)
                    self._deliver(alone)
                jobs.clear()

    def _patience(self, job: Job[Any]) -> float:
        return self.busy_seconds if job.patience is None else job.patience

    def _deliver(self, jobs: list[Job[Any]]) -> None:
        loops: dict[asyncio.AbstractEventLoop, list[Job[Any]]] = {}
        for job in jobs:
            if job.done is not None:
                job.done.set()
                _orphan(job)
            elif job.future is not None:
                loops.setdefault(job.future.get_loop(), []).append(job)
        for loop, group in loops.items():
            try:
                loop.call_soon_threadsafe(_resolve, group)
            except RuntimeError:  # the loop was closed meanwhile
                for job in group:
                    _orphan(job)

    def close(self) -> None:
        """Finish what is queued, then close the connection. The writer can be used no more."""
        self._closed = True
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._queue.put(None)
            thread.join(timeout=self.busy_seconds + 5)
        with self._lock:
            self._disconnect()


async def _to_its_end(future: asyncio.Future[Any]) -> None:
    import asyncio

    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):  # one is enough: it is raised at the end
            await asyncio.wait({future})
    future.exception()


def _resolve(jobs: list[Job[Any]]) -> None:
    for job in jobs:
        future = job.future
        if future is None or future.done():  # cancelled while it waited; the writes happened all the same
            _orphan(job)
        elif job.error is not None:
            future.set_exception(job.error)
        else:
            future.set_result(job.result)


def _orphan(job: Job[Any]) -> None:
    if job.error is not None and job.on_orphan is not None:
        job.on_orphan()
