"""The one writer of a journal: jobs that share transactions, and so fsyncs.

How a commit travels: a *job* (ops with a fence, or a guarded function) runs at once in the thread that
asks when nothing else is under way and SQLite's lock is free; otherwise it goes to one writer thread,
which takes one job, drains what else is waiting into the same transaction, and so shares one fsync.
There is no timer: a lone job is never delayed. A single new record, where nothing else is under way, is
committed by a statement of its own (``add``). Refused jobs (a lost lease, a guarded function that
raised) do not touch their neighbours; when the shared transaction itself fails, each job is tried alone.

A crash before COMMIT returns loses the whole transaction; after it, nothing (WAL, synchronous FULL).
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from agentflow.calls import current_task
from agentflow.errors import JournalBusy, LeaseLost, UsageError
from agentflow.store import SEQUENCE, Add, Fence, Txn, add_alone, code_of, connect, translate

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_CROWD_SECONDS = 0.005
_BUMP = "UPDATE Agentflow SET value = value + 1 WHERE key = 'commits'"


class Job(Generic[T]):
    """One group of writes that happens entirely or not at all."""

    __slots__ = ("body", "committed", "done", "error", "fence", "future", "guarded", "on_orphan", "patience", "result")

    def __init__(self, body: Callable[[Txn], T], *, fence: Fence | None = None, guarded: bool = False) -> None:
        self.body = body
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


class LockHeld(Exception):
    """Another process holds SQLite's write lock."""


class Writer:
    """All writes of one process to one journal.

    ``busy_seconds``: how long a commit waits for another process's write lock before JournalBusy.
    ``transactions``: how many were committed, each one fsync.
    """

    def __init__(
        self, path: Path, check: Callable[[], None], mark: Callable[[int, bool], None], *, busy_seconds: float = 30.0
    ) -> None:
        self.path = path
        self.busy_seconds = busy_seconds
        self.transactions = 0
        self.sequence = 0  # a lower bound of the store's, see SEQUENCE
        self.before: Callable[[Txn], Callable[[], None]] | None = None  # imports spilled replies when there are any
        self._check = check
        self._mark = mark
        self._con: sqlite3.Connection | None = None
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

    def forked(self) -> sqlite3.Connection | None:
        """Begin anew in a child process; the parent's connection is returned, to be kept and never closed."""
        con, self._con = self._con, None
        self._reset()
        return con

    # -- doing it ---------------------------------------------------------------------------------

    def run(self, job: Job[T]) -> T:
        """Do one job and return its result once it is fsynced."""
        self._refuse_nesting()
        if self._queue.empty() and not self._lock.locked():
            try:
                return self._alone(job)
            except LockHeld:
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
            except LockHeld:
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
            raise UsageError(f"The journal {self.path.parent} is closed: open it again with Journal.open().")

    def _alone(self, job: Job[T]) -> T:
        self._transact([job], drain=False)
        if job.error is not None:
            raise job.error
        return cast(T, job.result)

    def add(self, op: Add, fence: Fence) -> bool:
        """Commit one new record in a statement of its own, which is most of what steps commit.

        False, and nothing is done, where it takes a transaction to find out what is the matter, or others are at work.
        """
        self._refuse_nesting()
        if not self._queue.empty() or self._lock.locked():
            return False
        with self._lock:
            if self.before is not None:
                return False
            self._check()
            try:
                if not add_alone(self._ready(), op, fence):
                    return False
            except sqlite3.Error:
                return False  # a held lock, a full disk: the transaction meets it too, and deals with it
            self._committed(self.sequence + 1, exact=False)
            return True

    def _transact(self, jobs: list[Job[Any]], *, drain: bool) -> None:
        """One transaction for ``jobs`` and, with ``drain``, for all that wait behind them.

        Raises LockHeld when another process holds the write lock; a job's own refusal is left in the job.
        """
        # A plain `with` on a C lock is the one form that Ctrl-C cannot leave locked. Callers that must not
        # wait look at the lock first: at worst this waits for one transaction of another thread.
        with self._lock:
            self._check()
            con = self._begin()
            try:
                if drain:
                    self._drain(jobs)
                txn = Txn(con)
                changes = con.total_changes
                done = self.before(txn) if self.before is not None else None
                for job in jobs:
                    self._perform(job, txn, con)
                if con.total_changes == changes:
                    con.execute("ROLLBACK")
                else:
                    con.execute(_BUMP)
                    sequence = con.execute(SEQUENCE).fetchone()[0]
                    con.execute("COMMIT")
                    for job in jobs:
                        job.committed = True
                    self._committed(sequence)
            except BaseException as error:
                if con.in_transaction:
                    con.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise translate(error, self.path) from error
                raise
        if done is not None:
            done()

    def _committed(self, sequence: int, *, exact: bool = True) -> None:
        self.sequence = sequence
        self.transactions += 1
        self._mark(sequence, exact)

    def _ready(self) -> sqlite3.Connection:
        con = self._con
        if con is None:
            con = self._con = connect(self.path, readonly=False)
            con.execute("PRAGMA busy_timeout = 0")
        if con.in_transaction:  # an earlier one was interrupted in its own clean-up
            con.execute("ROLLBACK")
        return con

    def _begin(self) -> sqlite3.Connection:
        con = self._ready()
        try:
            con.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if code_of(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise LockHeld from None
            raise translate(error, self.path) from error
        except BaseException:
            if con.in_transaction:
                con.execute("ROLLBACK")
            raise
        return con

    def _perform(self, job: Job[Any], txn: Txn, con: sqlite3.Connection) -> None:
        job.error = None
        if not job.guarded:
            # Ops write nothing before their fence was checked, so a refusal needs no savepoint.
            try:
                job.result = job.run(txn)
            except LeaseLost as error:
                job.error = error
            return
        con.execute("SAVEPOINT job")
        self._inside = threading.get_ident()
        try:
            job.result = job.run(txn)
        except (sqlite3.Error, KeyboardInterrupt):
            raise
        except BaseException as error:
            con.execute("ROLLBACK TO job")
            job.error = error
        finally:
            self._inside = 0
        con.execute("RELEASE job")

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
            except LockHeld:
                waited = time.monotonic() - started
                late = [job for job in jobs if waited >= self._patience(job)]
                for job in late:
                    jobs.remove(job)
                    job.error = self._busy(self._patience(job))
                self._deliver(late)
                if drain:
                    self._drain(jobs)
                time.sleep(pause)
                pause = min(pause * 2, 0.02)
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

    def _busy(self, waited: float) -> JournalBusy:
        return JournalBusy(
            f"{self.path.parent}: another process kept the journal's write lock for more than {waited:g} s. "
            f"Find it with `fuser {self.path}`, end it, and run this again."
        )

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
            con, self._con = self._con, None
            if con is not None:
                con.close()


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
