"""The journal: what is recorded, and the one way to it.

``Journal`` is what everybody reads and writes through: first record wins, all or nothing, refused once the lease is
lost, durable when it returns, a paid reply never dropped. What keeps the records is a ``Backend``: diskcache files
beside the project (folder.py), or a schema in PostgreSQL that several machines share (pgjournal.py).
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from agentflow import folder
from agentflow.commits import Commits, Job
from agentflow.errors import JournalError, LeaseLost
from agentflow.layout import DIGEST_VERSION, LAYOUT_VERSION, default_path
from agentflow.ops import Add, Drop, Fence, Op, Put, Txn
from agentflow.pgurl import Place, PostgresURL, place
from agentflow.reads import Reads
from agentflow.spill import Spill
from agentflow.voice import log

__all__ = [
    "DIGEST_VERSION", "LAYOUT_VERSION", "Add", "Drop", "Fence", "Journal", "Op", "Place", "PostgresURL", "Put", "Txn",
    "default_path", "exists", "place",
]  # fmt: skip

T = TypeVar("T")

_journals: dict[str | PostgresURL, Journal] = {}
_journals_lock = threading.Lock()
_parents_connections: list[object] = []


class NotedMarks(Protocol):
    """Lines beside the records of a run; they survive the process."""

    def append(self, run_id: str, line: str) -> None: ...

    def read(self, run_id: str) -> list[str]: ...

    def size(self, run_id: str) -> int: ...

    def clear(self, run_id: str) -> None: ...


class Backend(Protocol):
    """What keeps the records of one journal.

    - ``writer`` does jobs (commits.py): each in a transaction, alone or with others, that is durable when it returns. A
      fenced job writes nothing unless the lease is held at that moment and until its commit; a guarded one has the
      journal to itself. Keys and values are text; an ``Add`` of a taken key changes nothing.
    - ``reads`` (reads.py) sees what is committed, in pages, by key in the order of code points.
    - ``marks`` survive the process, and the host too where others can take over from there.
    - ``spill`` (spill.py) takes paid replies while the writer cannot.
    """

    @property
    def path(self) -> Place: ...

    @property
    def id(self) -> str: ...

    @property
    def many_hosts(self) -> bool: ...

    @property
    def writer(self) -> Commits: ...

    @property
    def reads(self) -> Reads: ...

    @property
    def marks(self) -> NotedMarks: ...

    @property
    def spill(self) -> Spill: ...

    def clock(self) -> float: ...

    def is_current(self) -> bool: ...

    def close(self) -> None: ...

    def forked(self) -> list[object]: ...


class Journal:
    """One journal as seen by this process. Open it with ``Journal.open``.

    Attributes:
        path: the directory, or the URL of the database, which as text holds no password.
        id: the journal's own id, the same for everybody who opens it.
        many_hosts: processes on other machines may use it too.
        clock: gives epoch seconds by the clock that all who use this journal go by: this machine's, or the server's.
        paid_retry_seconds: how long a commit with ``paid=True`` is retried before its records are spilled.
    """

    def __init__(self, backend: Backend) -> None:
        self.path = backend.path
        self.id = backend.id
        self.many_hosts = backend.many_hosts
        self.clock: Callable[[], float] = backend.clock
        self.paid_retry_seconds = float(os.environ.get("AGENTFLOW_PAID_RETRY_SECONDS") or 10)
        self._backend = backend
        self._writer = backend.writer
        self._spill = backend.spill
        self._reads = backend.reads
        self._marks = backend.marks

    # -- opening and closing ----------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str] | PostgresURL) -> Journal:
        """The journal in this directory or database, created if there is nothing yet.

        One object per place and process; it may be used from any thread, and after a fork.

        Raises:
            JournalIncomplete: parts are missing (no database, or one copied without its -wal).
            JournalVersionError: written by a version of agentflow that this one does not know.
            JournalForeign: the directory or schema holds something else.
            JournalReadOnly: nothing can be written there.
            JournalError: a network file system or a synchronised folder; a server that cannot be reached, or refuses.
            UsageError: a URL, and the package that speaks to PostgreSQL is not installed.
        """
        where = place(path)
        real = os.path.realpath(where) if isinstance(where, Path) else where
        with _journals_lock:
            known = _journals.get(real)
            if known is not None:
                if not known.closed and known._backend.is_current():
                    return known
                del _journals[real]
                known.close()
            journal = cls(_backend(real))
            try:
                journal._take_in_earlier()
            except BaseException:
                journal.close()
                raise
            _journals[real] = journal
        return journal

    @property
    def closed(self) -> bool:
        """True after ``close``."""
        return self._writer.closed

    def close(self) -> None:
        """Finish queued commits and close all files. ``Journal.open`` gives a new object afterwards."""
        if self.closed:
            return
        self._backend.close()
        known = self.path if isinstance(self.path, PostgresURL) else str(self.path)
        if _journals.get(known) is self:
            del _journals[known]

    def _forked(self) -> None:
        _parents_connections.extend(self._backend.forked())

    # -- reading ----------------------------------------------------------------------------------

    def get(self, key: str) -> str | None:
        """The value recorded under ``key``; None when there is none."""
        return self._reads.get(key)

    def scan(
        self,
        prefix: str,
        *,
        after: str | None = None,
        before: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[str, str]]:
        """Keys that begin with ``prefix`` and their values, in the order of the keys.

        Read in pages: memory is constant, and no lock or snapshot is held between them.

        Args:
            prefix: text that the keys begin with; "" means all.
            after: only keys after this one; None begins at the start.
            before: only keys before this one; None goes on to the end.
            limit: at most so many; None gives all.
            reverse: from the last key to the first.
        """
        return self._reads.scan(prefix, after, before, limit, reverse)

    def keys(
        self,
        prefix: str,
        *,
        after: str | None = None,
        before: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[str, int]]:
        """Like ``scan``, with each key's row id in place of its value; values are not read."""
        return self._reads.keys(prefix, after, before, limit, reverse)

    def rows(self, prefix: str, *, from_rowid: int, limit: int) -> list[tuple[int, str, str]]:
        """A window of the records under ``prefix`` in the order they were written: (row id, key, value).

        A record that another process writes at this moment may get its place before ones that are seen already, so
        windows are for what this process alone writes, or has stopped; ``version`` tells of news.

        Args:
            prefix: text that the keys begin with.
            from_rowid: the first row id wanted; go on with the last one of a window plus one.
            limit: at most so many; fewer come only when there are no more.
        """
        return self._reads.rows(prefix, from_rowid, limit)

    def version(self) -> int:
        """A number that changes whenever anybody commits, to be compared within one thread. Costs no disk access."""
        return self._reads.version()

    def problems(self) -> list[str]:
        """Rows met so far that no journal has written. They are never decoded and count as absent."""
        return list(self._reads.problems.values())

    # -- writing ----------------------------------------------------------------------------------

    def commit(self, ops: Sequence[Op], *, fence: Fence | None = None, paid: bool = False) -> list[bool]:
        """Do all ops in one transaction, or none of them; returns when it is durable.

        Args:
            ops: Add (first wins), Put, Drop, done in order.
            fence: refuse with LeaseLost unless this lease is still held; None does not ask.
            paid: the ops hold a reply that was paid for: they are never dropped. On a full disk or a lock
                that cannot be had they are retried, then spilled to a file that the next open imports.

        Returns:
            Per Add, True if it was recorded; True for Put and Drop.

        Raises:
            LeaseLost: another process owns the lease; nothing was committed.
            JournalFull: the disk is full; earlier records are intact (not with ``paid``).
            JournalBusy: another process kept the write lock too long (not with ``paid``).
            JournalError: the server cannot be reached (not with ``paid``).
        """
        if not paid and fence is not None and (one := _single(ops)) and self._writer.add(one, fence):
            return [True]
        job = Job(lambda txn: txn.apply(ops), fence=fence, ops=ops)
        if not paid:
            return self._writer.run(job)
        pauses = self._insist(job)
        try:
            while True:
                try:
                    return self._writer.run(job)
                except LeaseLost:
                    raise
                except (JournalError, OSError) as error:
                    pause = next(pauses, None)
                    if pause is None:
                        log.warning("%s", error)
                        return self._keep(ops, fence)
                time.sleep(pause)
        except Exception:
            raise
        except BaseException:  # Ctrl-C
            if job.done is not None and not job.done.is_set():
                job.on_orphan = lambda: self._orphaned(job, ops)
            elif not job.committed:
                self._keep(ops, fence)
            raise

    async def acommit(self, ops: Sequence[Op], *, fence: Fence | None = None, paid: bool = False) -> list[bool]:
        """``commit`` for coroutines: commits that are ready together share one fsync.

        When the caller is cancelled while it waits, the commit still happens.
        """
        import asyncio

        if not paid and fence is not None and (one := _single(ops)):
            writer = self._writer
            if writer.may_inline(asyncio.get_running_loop()) and writer.add(one, fence):
                return [True]
        job = Job(lambda txn: txn.apply(ops), fence=fence, ops=ops)
        if not paid:
            return await self._writer.arun(job)
        pauses = self._insist(job)
        job.on_orphan = lambda: self._orphaned(job, ops)
        while True:
            try:
                return await self._writer.arun(job)
            except LeaseLost:
                raise
            except (JournalError, OSError) as error:
                pause = next(pauses, None)
                if pause is None:
                    log.warning("%s", error)
                    return self._keep(ops, fence)
            try:
                await asyncio.sleep(pause)
            except BaseException:
                self._keep(ops, fence)
                raise

    def _insist(self, job: Job[list[bool]]) -> Iterator[float]:
        """Pauses between the attempts of a paid commit, until its time is up."""
        job.patience = self.paid_retry_seconds
        return self._pauses(job, time.monotonic() + self.paid_retry_seconds)

    @staticmethod
    def _pauses(job: Job[list[bool]], deadline: float) -> Iterator[float]:
        pause = 0.02
        while (left := deadline - time.monotonic()) > 0:
            job.patience = left
            yield min(pause, left)
            pause = min(pause * 2, 1.0)

    def _orphaned(self, job: Job[list[bool]], ops: Sequence[Op]) -> None:
        if not isinstance(job.error, LeaseLost):
            self._keep(ops, job.fence)

    def _keep(self, ops: Sequence[Op], fence: Fence | None) -> list[bool]:
        # A server that is away cannot be asked what is there: what was paid for counts as new.
        done = [self.many_hosts or not isinstance(op, Add) or self.get(op.key) is None for op in ops]
        self._spill.add(ops, fence)
        self._writer.before = self._take_in
        return done

    def _take_in(self, txn: Txn) -> Callable[[], None]:
        done = self._spill.take_in(txn)

        def finished() -> None:
            done()
            if not self._spill:
                self._writer.before = None
            if self._spill:  # one more came at that moment
                self._writer.before = self._take_in

        return finished

    def _take_in_earlier(self) -> None:
        self._spill.load()
        if self._spill:
            self._writer.before = self._take_in
            try:
                self.guarded(lambda txn: None)
            except JournalError as error:
                log.warning("%s: spilled replies could not be taken in yet: %s", self.path, error)

    def guarded(self, fn: Callable[[Txn], T]) -> T:
        """Run ``fn`` inside one write transaction: what it reads cannot change before it has written.

        If ``fn`` raises, nothing is written. It has to be quick and do nothing but use the Txn: everybody
        else's commits wait for it, and it is called again when the transaction has to be repeated.
        """
        return self._writer.run(Job(fn, guarded=True))

    async def aguarded(self, fn: Callable[[Txn], T]) -> T:
        """``guarded`` for coroutines."""
        return await self._writer.arun(Job(fn, guarded=True))

    # -- side files -------------------------------------------------------------------------------

    def mark(self, run_id: str, line: str) -> None:
        """Append a line to the run's side file: survives the process, not a power loss; not synced."""
        self._marks.append(run_id, line)

    def marks(self, run_id: str) -> list[str]:
        """The run's marks, oldest first. A line that was torn by a power loss is left out."""
        return self._marks.read(run_id)

    def marked(self, run_id: str) -> int:
        """How much is marked for the run, in bytes: it changes with each mark. 0 when there is nothing."""
        return self._marks.size(run_id)

    def clear_marks(self, run_id: str) -> None:
        """Remove the run's side file."""
        self._marks.clear(run_id)


def _single(ops: Sequence[Op]) -> Add | None:
    """The only op, if it adds a record."""
    return op if len(ops) == 1 and isinstance(op := ops[0], Add) else None


# -- opening ---------------------------------------------------------------------------------------


def _backend(where: str | PostgresURL) -> Backend:
    if isinstance(where, str):
        return folder.open_folder(Path(where))
    from agentflow.pgjournal import open_schema

    return open_schema(where)


def exists(where: Place) -> bool:
    """Whether there is a journal at this place. Nothing is created.

    Raises:
        JournalError: a server that cannot be asked.
    """
    if isinstance(where, Path):
        return folder.exists(where)
    from agentflow.pgjournal import exists_schema

    return exists_schema(where)


def _after_fork() -> None:
    global _journals_lock
    _journals_lock = threading.Lock()
    for journal in _journals.values():
        journal._forked()


def _close_all() -> None:
    for journal in list(_journals.values()):
        journal.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)
