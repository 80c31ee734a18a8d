"""The journal: what is recorded, in diskcache files beside the project. The one file that imports diskcache.

diskcache creates the directory and its table, with the settings without which it loses records and with
a Disk class that knows text only; any row can be read through it. The journal's own reads and writes go
to that table through SQLite directly: one write connection (store.py) and a read-only one per thread, so
readers never wait for the writer. All values are text; what does not look like a row written here (another
mode, a side file, a pickle) is never decoded, only reported.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sqlite3
import threading
import time
import weakref
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agentflow import layout
from agentflow.errors import (
    JournalError,
    JournalForeign,
    JournalIncomplete,
    JournalReadOnly,
    LeaseLost,
    UsageError,
)
from agentflow.layout import DIGEST_VERSION, LAYOUT_VERSION, default_path
from agentflow.marks import Marks
from agentflow.spill import Spill
from agentflow.store import DB_NAME, Add, Drop, Fence, Job, Op, Put, Txn, Writer, connect, translate

__all__ = ["DIGEST_VERSION", "LAYOUT_VERSION", "Add", "Drop", "Fence", "Journal", "Op", "Put", "Txn", "default_path"]

T = TypeVar("T")
log = logging.getLogger("agentflow")

_PAGE_ROWS = 256
_PAGE_CHARS = 4_000_000
_SPILLED = 2**62
_journals: dict[str, Journal] = {}
_journals_lock = threading.Lock()
_parents_connections: list[object] = []


class _Reader:
    """A thread's read connection, closed with its thread."""

    __slots__ = ("__weakref__", "con")

    def __init__(self, con: sqlite3.Connection) -> None:
        self.con = con

    def __del__(self) -> None:
        self.con.close()


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
        self._inode = _inode(self._file)
        self._writer = Writer(self._file, self._still_there, self._note_commits)
        self._spill = Spill(path, self.id)
        self._readers: weakref.WeakSet[_Reader] = weakref.WeakSet()
        self._local = threading.local()
        self._marks = Marks(path / "started")
        self._windows: OrderedDict[str, array[int]] = OrderedDict()
        self._problems: dict[str, str] = {}

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
        for reader in list(self._readers):
            reader.con.close()
        self._local = threading.local()
        self._writer.close()
        os.close(self._sibling)
        self._marks.close()
        if _journals.get(str(self.path)) is self:
            del _journals[str(self.path)]

    def _forked(self) -> None:
        # SQLite connections must not be used, nor closed, across a fork: the child leaves its parent's alone.
        _parents_connections.extend([self._writer.forked(), *self._readers])
        self._readers = weakref.WeakSet()
        self._local = threading.local()
        self._marks.forked()
        self._spill.forked()

    def _still_there(self) -> None:
        # SQLite would go on writing, and acknowledging, to files that somebody has deleted.
        if os.fstat(self._sibling).st_nlink == 0:
            raise JournalIncomplete(
                f"{self.path}: the journal was deleted while it was in use; nothing more is recorded in it. Run again "
                "to begin an empty journal."
            )

    def _note_commits(self, count: int) -> None:
        # After the fsync of the commit, so that it is never ahead of it.
        try:
            os.pwrite(self._sibling, b"%020d" % count, self._offset)
        except OSError:  # a lower bound may lag behind
            log.debug("%s could not be updated", layout.SIBLING, exc_info=True)

    # -- reading ----------------------------------------------------------------------------------

    def _read(self) -> sqlite3.Connection:
        reader: _Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            if self.closed:
                raise UsageError(f"The journal {self.path} is closed: open it again with Journal.open().")
            try:
                reader = _Reader(connect(self._file, readonly=True))
            except sqlite3.Error as error:
                raise translate(error, self._file) from error
            self._readers.add(reader)
            self._local.reader = reader
        return reader.con

    def get(self, key: str) -> str | None:
        """The value recorded under ``key``; None when there is none."""
        row = self._read().execute("SELECT mode, value FROM Cache WHERE key = ? AND raw = 1", (key,)).fetchone()
        value = None if row is None else self._text(key, row[0], row[1])
        return self._spill.see(key, value) if self._spill else value

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
        if self._spill:
            for key, _ in self.keys(prefix, after=after, before=before, limit=limit, reverse=reverse):
                text = self.get(key)
                if text is not None:
                    yield key, text
            return
        for page in self._pages("key, mode, value", prefix, after, before, limit, reverse):
            for key, mode, value in page:
                text = self._text(key, mode, value)
                if text is not None:
                    yield key, text

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
        if self._spill:
            yield from self._keys_with_spilled(prefix, after, before, limit, reverse)
            return
        for page in self._pages("key, rowid", prefix, after, before, limit, reverse):
            yield from page

    def _keys_with_spilled(
        self, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[tuple[str, int]]:
        # Rare and few, so nothing is merged page by page. Their row ids lie beyond all real ones.
        found = {key: _SPILLED + position for position, key in enumerate(self._spill.keys(prefix))}
        found.update(row for page in self._pages("key, rowid", prefix, None, None, None, False) for row in page)
        chosen = sorted(
            (
                (key, rowid)
                for key, rowid in found.items()
                if (after is None or key > after) and (before is None or key < before)
            ),
            reverse=reverse,
        )
        yield from chosen if limit is None else chosen[:limit]

    def _pages(
        self, columns: str, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[list[Any]]:
        low, high = prefix, _prefix_end(prefix)
        low_operator = ">="
        if after is not None and after >= low:
            low, low_operator = after, ">"
        if before is not None and (isinstance(high, bytes) or before < high):
            high = before
        left = -1 if limit is None else limit
        direction = "DESC" if reverse else "ASC"
        size = 16  # the first page is small: most scans are over one run's few steps
        while left != 0:
            sql = (
                f"SELECT {columns} FROM Cache WHERE raw = 1 AND key {low_operator} ? AND key < ? "
                f"ORDER BY key {direction} LIMIT ?"
            )
            page, chars = [], 0
            want = size if left < 0 else min(size, left)
            cursor = self._read().execute(sql, (low, high, want))
            for row in cursor:
                page.append(row)
                value = row[-1]
                chars += len(value) if type(value) is str else 0
                if chars > _PAGE_CHARS:
                    break
            cursor.close()
            if page:
                yield page
            if len(page) < want and chars <= _PAGE_CHARS:
                return
            left -= len(page) if left > 0 else 0
            if reverse:
                high = page[-1][0]
            else:
                low, low_operator = page[-1][0], ">"
            size = _PAGE_ROWS

    def rows(self, prefix: str, *, from_rowid: int, limit: int) -> list[tuple[int, str, str]]:
        """A window of the records under ``prefix`` in the order they were written: (row id, key, value).

        Args:
            prefix: text that the keys begin with.
            from_rowid: the first row id wanted; go on with the last one of a window plus one.
            limit: at most so many; fewer come only when there are no more.
        """
        # The row ids are kept between windows: asking the index again for each window would be quadratic,
        # walking the table slow for a run whose few records lie far apart.
        ids = self._windows.get(prefix)
        position = 0 if ids is None else bisect_left(ids, from_rowid)
        if ids is None or len(ids) - position < limit:
            ids = array("q", sorted(rowid for _, rowid in self.keys(prefix)))
            self._windows[prefix] = ids
            while len(self._windows) > 4:
                self._windows.popitem(last=False)
            position = bisect_left(ids, from_rowid)
        if self._spill:
            wanted = {rowid: key for key, rowid in self.keys(prefix)}
            texts = ((rowid, wanted[rowid], self.get(wanted[rowid])) for rowid in ids[position:] if rowid in wanted)
            return [(rowid, key, text) for rowid, key, text in texts if text is not None][:limit]
        found: list[tuple[int, str, str]] = []
        while len(found) < limit and position < len(ids):
            some = ids[position : position + min(limit - len(found), _PAGE_ROWS)]
            position += len(some)
            sql = (
                f"SELECT rowid, key, mode, value FROM Cache WHERE rowid IN ({','.join('?' * len(some))}) ORDER BY rowid"
            )
            for rowid, key, mode, value in self._read().execute(sql, some.tolist()).fetchall():
                # A dropped row's id can have gone to another key since.
                if isinstance(key, str) and key.startswith(prefix):
                    text = self._text(key, mode, value)
                    if text is not None:
                        found.append((rowid, key, text))
        return found

    def _text(self, key: str, mode: int, value: object) -> str | None:
        if mode == 1 and type(value) is str:
            return value
        if key not in self._problems:
            kind = {2: "a side file", 3: "a side file", 4: "a pickle"}.get(mode, f"a {type(value).__name__} value")
            self._problems[key] = f"{key}: {kind}, which no journal writes; it was not read"
            log.warning("%s: ignored a row that agentflow did not write: %s", self.path, self._problems[key])
        return None

    def problems(self) -> list[str]:
        """Rows met so far that no journal has written. They are never decoded and count as absent."""
        return list(self._problems.values())

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

    def clear_marks(self, run_id: str) -> None:
        """Remove the run's side file."""
        self._marks.clear(run_id)


# -- opening ---------------------------------------------------------------------------------------


def _inode(file: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _prefix_end(prefix: str) -> str | bytes:
    """The first text after all that begin with ``prefix``."""
    while prefix:
        last = ord(prefix[-1]) + 1
        if last == 0xD800:  # surrogates cannot be stored
            last = 0xE000
        if last <= 0x10FFFF:
            return prefix[:-1] + chr(last)
        prefix = prefix[:-1]
    return b""  # in SQLite every blob comes after every text


def _open(cls: type[Journal], path: Path) -> Journal:
    layout.check_place(path)
    try:
        sibling = layout.read_sibling(path) if path.is_dir() else None
    except PermissionError as error:
        raise _read_only(path, error) from error
    if sibling is None:
        sibling = _create(path)
    if not os.access(path, os.W_OK | os.X_OK) or not os.access(path / DB_NAME, os.F_OK | os.W_OK):
        if not (path / DB_NAME).exists():
            raise layout.missing_store(path)
        raise _read_only(path, None)
    journal = cls(path, sibling)
    try:
        with journal._writer._lock:
            con = journal._writer._con = connect(journal._file, readonly=False)
            changed = layout.check_store(path, con, sibling)
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


def _read_only(path: Path, error: OSError | None) -> JournalReadOnly:
    reason = f" ({error.strerror})" if error is not None and error.strerror else ""
    return JournalReadOnly(
        f"{path}: the journal cannot be written here{reason}. Set AGENTFLOW_PATH to a directory that can be."
    )


def _repair(journal: Journal, changed: str) -> None:
    def put_back(txn: Txn) -> None:
        txn._con.executemany("INSERT OR REPLACE INTO Settings VALUES (?, ?)", list(layout.SETTINGS.items()))

    journal.guarded(put_back)
    log.warning("%s: somebody changed the settings of the journal (%s); they were put back", journal.path, changed)


def _create(path: Path) -> layout.Sibling:
    """Create the journal; of several processes one does it and the others find it done."""
    import fcntl

    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise JournalForeign(f"{path} is a file. Set AGENTFLOW_PATH to a directory.") from error
    except OSError as error:
        raise _read_only(path, error) from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        sibling = layout.read_sibling(path)
        if sibling is None:
            layout.check_new(path)
            try:
                (path / ".gitignore").write_text("*\n", encoding="ascii")
                store = _build(path)
                layout.write_sibling(path, store, 0)
                os.fsync(descriptor)
            except OSError as error:
                raise _read_only(path, error) from error
            sibling = layout.read_sibling(path)
    finally:
        os.close(descriptor)
    if sibling is None:
        raise JournalIncomplete(f"{path}: {layout.SIBLING} vanished while the journal was created.")
    return sibling


def _build(path: Path) -> str:
    """Have diskcache build the database beside its place, then move it there complete. Returns the store id."""
    file = path / DB_NAME
    if file.exists():  # a creator died between the two files; its database holds nothing yet
        con = connect(file, readonly=True)
        try:
            found = dict(con.execute("SELECT key, value FROM Agentflow").fetchall())
        finally:
            con.close()
        if found.get("commits") != 0:
            raise layout.lost_sibling(path)
        return str(found["store"])
    import shutil

    temporary = path / f"new-{os.getpid()}-{os.urandom(4).hex()}"
    temporary.mkdir(mode=0o700)
    try:
        store = _build_store(temporary)
        os.replace(temporary / DB_NAME, file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return store


def _build_store(folder: Path) -> str:
    import diskcache

    # Nothing reads it before it is complete and synced, so that building needs neither log nor syncs.
    settings = {**layout.SETTINGS, "sqlite_journal_mode": "memory", "sqlite_synchronous": 0, "sqlite_auto_vacuum": 0}
    diskcache.Cache(str(folder), disk=record_disk(), **settings).close()
    store = os.urandom(16).hex()
    con = sqlite3.connect(folder / DB_NAME, isolation_level=None)
    try:
        con.executescript(_OWN_SCHEMA)
        con.executemany("INSERT OR REPLACE INTO Settings VALUES (?, ?)", list(layout.SETTINGS.items()))
        about = [("store", store), ("layout", LAYOUT_VERSION), ("digest", DIGEST_VERSION), ("commits", 0)]
        con.executemany("INSERT INTO Agentflow VALUES (?, ?)", about)
        con.execute("COMMIT")
        con.execute("PRAGMA journal_mode = WAL")
    finally:
        con.close()
    descriptor = os.open(folder / DB_NAME, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return store


# diskcache's triggers name texts in double quotes, which SQLite builds without DQS refuse, and its index of expiry
# times holds every row; under the same names it takes these for its own.
_OWN_SCHEMA = """
PRAGMA synchronous = OFF;
BEGIN;
CREATE TABLE Agentflow (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
DROP INDEX Cache_expire_time;
CREATE INDEX Cache_expire_time ON Cache (expire_time) WHERE expire_time IS NOT NULL;
DROP TRIGGER Settings_count_insert;
CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value + 1 WHERE key = 'count'; END;
DROP TRIGGER Settings_count_delete;
CREATE TRIGGER Settings_count_delete AFTER DELETE ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value - 1 WHERE key = 'count'; END;
DROP TRIGGER Settings_size_insert;
CREATE TRIGGER Settings_size_insert AFTER INSERT ON Cache FOR EACH ROW WHEN NEW.size <> 0 BEGIN
    UPDATE Settings SET value = value + NEW.size WHERE key = 'size'; END;
DROP TRIGGER Settings_size_update;
CREATE TRIGGER Settings_size_update AFTER UPDATE OF size ON Cache FOR EACH ROW WHEN NEW.size <> OLD.size BEGIN
    UPDATE Settings SET value = value + NEW.size - OLD.size WHERE key = 'size'; END;
DROP TRIGGER Settings_size_delete;
CREATE TRIGGER Settings_size_delete AFTER DELETE ON Cache FOR EACH ROW WHEN OLD.size <> 0 BEGIN
    UPDATE Settings SET value = value - OLD.size WHERE key = 'size'; END;
"""


def record_disk() -> Any:
    """The diskcache Disk class of a journal: text keys, text values in rows, everything else refused.

    Its required argument is stored among diskcache's settings, so that a plain ``diskcache.Cache(directory)``
    fails before it rewrites any of them.
    """
    import diskcache

    class RecordDisk(diskcache.Disk):  # type: ignore[misc]
        def __init__(self, directory: str, *, agentflow_layout: int, **kwargs: Any) -> None:
            layout.check_versions(Path(directory), agentflow_layout, DIGEST_VERSION)
            super().__init__(directory, **kwargs)

        def put(self, key: object) -> tuple[str, bool]:
            if type(key) is not str:
                raise UsageError(f"A journal's keys are text, not {type(key).__name__}.")
            return key, True

        def get(self, key: object, raw: object) -> object:
            if type(key) is not str or not raw:
                raise JournalError("This key was not written by agentflow; it is not decoded.")
            return key

        def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
            if type(value) is not str or read:
                raise UsageError(f"A journal's values are text, not {type(value).__name__}.")
            return 0, 1, None, value

        def fetch(self, mode: int, filename: object, value: object, read: bool) -> str:
            if mode != 1 or filename is not None or type(value) is not str or read:
                raise JournalError("This row was not written by agentflow; it is not decoded.")
            return value

    return RecordDisk


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
