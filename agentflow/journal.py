"""The journal: what is recorded, in diskcache files beside the project.

diskcache creates the directory and its table (create.py), with the settings without which it loses records and with
a Disk class that knows text only; any row can be read through it. The journal's own reads and writes go
to that table through SQLite directly: one write connection (writer.py) and a read-only one per thread (reads.py), so
readers never wait for the writer. All values are text; what does not look like a row written here (another
mode, a side file, a pickle) is never decoded, only reported.
"""

from __future__ import annotations

import atexit
import mmap
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from agentflow import layout
from agentflow.create import create, read_only
from agentflow.errors import JournalError, JournalIncomplete, LeaseLost
from agentflow.layout import DIGEST_VERSION, LAYOUT_VERSION, default_path
from agentflow.marks import Marks
from agentflow.reads import Reads
from agentflow.spill import Spill
from agentflow.store import DB_NAME, Add, Drop, Fence, Op, Put, Txn, connect, translate
from agentflow.voice import log
from agentflow.writer import Job, Writer

__all__ = ["DIGEST_VERSION", "LAYOUT_VERSION", "Add", "Drop", "Fence", "Journal", "Op", "Put", "Txn", "default_path"]

T = TypeVar("T")

_journals: dict[str, Journal] = {}
_journals_lock = threading.Lock()
_parents_connections: list[object] = []


class Journal:
    """One journal directory as seen by this process. Open it with ``Journal.open``.

    Attributes:
        path: the directory.
        id: the store's own id, the same for everybody who opens it.
        paid_retry_seconds: how long a commit with ``paid=True`` is retried before its records are spilled.
    """

    path: Path
    id: str

    def __init__(self, path: Path, sibling: layout.Sibling) -> None:
        self.path = path
        self.id = sibling.store
        self.paid_retry_seconds = float(os.environ.get("AGENTFLOW_PAID_RETRY_SECONDS") or 10)
        self._file = path / DB_NAME
        self._offset = sibling.offset
        self._sibling = os.open(path / layout.SIBLING, os.O_RDWR)
        self._counter = mmap.mmap(self._sibling, 0) if layout.can_map(path) else None
        self._inode = _inode(self._file)
        self._writer = Writer(self._file, self._still_there, self._note_commits)
        self._spill = Spill(path, self.id)
        self._reads = Reads(self._file, self._spill)
        self._marks = Marks(path / "started")

    # -- opening and closing ----------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path | str) -> Journal:
        """The journal in this directory, created if there is nothing yet.

        One object per directory and process; it may be used from any thread, and after a fork.

        Raises:
            JournalIncomplete: parts are missing (no database, or one copied without its -wal).
            JournalVersionError: written by a version of agentflow that this one does not know.
            JournalForeign: the directory holds something else.
            JournalReadOnly: nothing can be written there.
            JournalError: a network file system or a synchronised folder.
        """
        real = os.path.realpath(os.path.expanduser(path))
        with _journals_lock:
            known = _journals.get(real)
            if known is not None:
                if not known.closed and known._inode == _inode(known._file):
                    return known
                del _journals[real]
                known.close()
            journal = _journals[real] = _open(cls, Path(real))
        return journal

    @property
    def closed(self) -> bool:
        """True after ``close``."""
        return self._writer._closed

    def close(self) -> None:
        """Finish queued commits and close all files. ``Journal.open`` gives a new object afterwards."""
        if self.closed:
            return
        self._reads.close()
        self._writer.close()
        if self._counter is not None:
            self._counter.close()
        os.close(self._sibling)
        self._marks.close()
        if _journals.get(str(self.path)) is self:
            del _journals[str(self.path)]

    def _forked(self) -> None:
        # SQLite connections must not be used, nor closed, across a fork: the child leaves its parent's alone.
        _parents_connections.extend([self._writer.forked(), *self._reads.forked()])
        self._marks.forked()
        self._spill.forked()

    def _still_there(self) -> None:
        # SQLite would go on writing, and acknowledging, to files that somebody has deleted.
        if os.fstat(self._sibling).st_nlink == 0:
            raise JournalIncomplete(
                f"{self.path}: the journal was deleted while it was in use; nothing more is recorded in it. Run again "
                "to begin an empty journal."
            )

    def _note_commits(self, count: int, exact: bool) -> None:
        # After the fsync of the commit, so that it is never ahead of it. Through memory where that is safe: a
        # write() changes the file's times, which the next commit's fsync would have to bring to the disk too.
        # One that is not exact leaves out what other processes have committed: it replaces no higher one.
        digits, place = b"%020d" % count, slice(self._offset, self._offset + 20)
        try:
            if self._counter is not None:
                if exact or self._counter[place] < digits:
                    self._counter[place] = digits
            elif exact or os.pread(self._sibling, 20, self._offset) < digits:
                os.pwrite(self._sibling, digits, self._offset)
        except OSError:  # a lower bound may lag behind
            log.debug("%s could not be updated", layout.SIBLING, exc_info=True)

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
        """Do all ops in one transaction, or none of them; returns when it is fsynced.

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
        """
        if not paid and fence is not None and (one := _single(ops)) and self._writer.add(one, fence):
            return [True]
        job = Job(lambda txn: txn.apply(ops), fence=fence)
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
        job = Job(lambda txn: txn.apply(ops), fence=fence)
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
        done = [not isinstance(op, Add) or self.get(op.key) is None for op in ops]
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
        """The size of the run's side file in bytes: it changes with each mark. 0 when there is none."""
        return self._marks.size(run_id)

    def clear_marks(self, run_id: str) -> None:
        """Remove the run's side file."""
        self._marks.clear(run_id)


def _single(ops: Sequence[Op]) -> Add | None:
    """The only op, if it adds a record."""
    return op if len(ops) == 1 and isinstance(op := ops[0], Add) else None


# -- opening ---------------------------------------------------------------------------------------


def _inode(file: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _open(cls: type[Journal], path: Path) -> Journal:
    layout.check_place(path)
    try:
        sibling = layout.read_sibling(path) if path.is_dir() else None
    except PermissionError as error:
        raise read_only(path, error) from error
    if sibling is None:
        sibling = create(path)
    if not os.access(path, os.W_OK | os.X_OK) or not os.access(path / DB_NAME, os.F_OK | os.W_OK):
        if not (path / DB_NAME).exists():
            raise layout.missing_store(path)
        raise read_only(path, None)
    journal = cls(path, sibling)
    try:
        with journal._writer._lock:
            con = journal._writer._con = connect(journal._file, readonly=False)
            journal._writer.sequence, changed = layout.check_store(path, con, sibling)
            if con.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                con.execute("PRAGMA journal_mode = WAL")
            con.execute("PRAGMA busy_timeout = 0")
        if changed:
            _repair(journal, changed)
        journal._take_in_earlier()
    except sqlite3.Error as error:
        journal.close()
        raise translate(error, journal._file) from error
    except BaseException:
        journal.close()
        raise
    return journal


def _repair(journal: Journal, changed: str) -> None:
    def put_back(txn: Txn) -> None:
        txn._con.execute("DROP TRIGGER IF EXISTS Settings_count_delete")
        txn._con.execute(layout.COUNT_DELETE)
        txn._con.executemany("INSERT OR REPLACE INTO Settings VALUES (?, ?)", list(layout.SETTINGS.items()))

    journal.guarded(put_back)
    if changed != "Settings_count_delete":  # alone, it is that of an earlier version
        log.warning("%s: somebody changed the settings of the journal (%s); they were put back", journal.path, changed)


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
