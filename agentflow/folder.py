"""A journal in a directory: diskcache's files, opened and held open.

diskcache creates the directory and its table (create.py), with the settings without which it loses records and with
a Disk class that knows text only; any row can be read through it. The journal's own reads and writes go
to that table through SQLite directly: one write connection (writer.py) and a read-only one per thread (reads.py), so
readers never wait for the writer. All values are text; what does not look like a row written here (another
mode, a side file, a pickle) is never decoded, only reported.
"""

from __future__ import annotations

import mmap
import os
import sqlite3
import time
from pathlib import Path

from agentflow import layout
from agentflow.commits import Job
from agentflow.create import create, read_only
from agentflow.errors import JournalIncomplete
from agentflow.marks import Marks
from agentflow.ops import Txn
from agentflow.reads import FileReads
from agentflow.spill import Spill
from agentflow.store import DB_NAME, FileTxn, connect, translate
from agentflow.voice import log
from agentflow.writer import Writer


class Folder:
    """What ``journal.Journal`` needs of a directory; described there, as ``Backend``."""

    many_hosts = False

    def __init__(self, path: Path, sibling: layout.Sibling) -> None:
        self.path = path
        self.id = sibling.store
        self._file = path / DB_NAME
        self._offset = sibling.offset
        self._sibling = os.open(path / layout.SIBLING, os.O_RDWR)
        self._counter = mmap.mmap(self._sibling, 0) if layout.can_map(path) else None
        self._inode = _inode(self._file)
        self.writer = Writer(self._file, self._still_there, self._note_commits)
        self.spill = Spill(path, self.id, path, "Free some space")
        self.reads = FileReads(self._file, self.spill)
        self.marks = Marks(path / "started")

    def is_current(self) -> bool:
        """Whether the files that are open are the ones that stand there now."""
        return self._inode == _inode(self._file)

    def clock(self) -> float:
        """Epoch seconds: all who share files share a machine, and its clock."""
        return time.time()

    def close(self) -> None:
        """Finish queued commits and close all files."""
        self.reads.close()
        self.writer.close()
        if self._counter is not None:
            self._counter.close()
        os.close(self._sibling)
        self.marks.close()

    def forked(self) -> list[object]:
        """Begin anew in a child process; the parent's connections are returned, to be kept and never closed."""
        # SQLite connections must not be used, nor closed, across a fork: the child leaves its parent's alone.
        parents = [self.writer.forked(), *self.reads.forked()]
        self.marks.forked()
        self.spill.forked()
        return parents

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

    def check(self, sibling: layout.Sibling) -> None:
        """Compare the database with its sibling, and put back what somebody has changed in its settings."""
        with self.writer._lock:
            con = self.writer._con = connect(self._file, readonly=False)
            self.writer.sequence, changed = layout.check_store(self.path, con, sibling)
            if con.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                con.execute("PRAGMA journal_mode = WAL")
            con.execute("PRAGMA busy_timeout = 0")
        if changed:
            self.writer.run(Job(_put_back, guarded=True))
        if changed not in ("", "Settings_count_delete"):  # alone, this is that of an earlier version
            log.warning("%s: somebody changed the settings of the journal (%s); they were put back", self.path, changed)


def _put_back(txn: Txn) -> None:
    assert isinstance(txn, FileTxn)
    txn._con.execute("DROP TRIGGER IF EXISTS Settings_count_delete")
    txn._con.execute(layout.COUNT_DELETE)
    txn._con.executemany("INSERT OR REPLACE INTO Settings VALUES (?, ?)", list(layout.SETTINGS.items()))


def exists(path: Path) -> bool:
    """Whether there is a journal in this directory, or what is left of one."""
    return (path / DB_NAME).exists() or (path / layout.SIBLING).exists()


def open_folder(path: Path) -> Folder:
    """The journal in this directory, created if there is nothing yet; see ``Journal.open``."""
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
    folder = Folder(path, sibling)
    try:
        folder.check(sibling)
    except sqlite3.Error as error:
        folder.close()
        raise translate(error, path / DB_NAME) from error
    except BaseException:
        folder.close()
        raise
    return folder


def _inode(file: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
