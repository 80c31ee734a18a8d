"""The journal's table in SQLite: connections, the operations of one transaction, fencing, and what errors mean."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from agentflow.errors import (
    JournalBusy,
    JournalError,
    JournalFull,
    JournalIncomplete,
    JournalReadOnly,
)
from agentflow.ops import Add, Fence, Op, Put, Txn, lease_starts

DB_NAME = "cache.db"

_GET = "SELECT mode, value FROM Cache WHERE key = ? AND raw = 1"
_SCAN = """SELECT key, value FROM Cache WHERE raw = 1 AND key > ? AND key < ? AND mode = 1 AND typeof(value) = 'text'
    ORDER BY key"""
# A row that no journal wrote (another mode, another type) holds no record, so a record may replace it.
_PUT = """INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES (?, 1, ?, ?, 1, ?)
    ON CONFLICT (key, raw) DO UPDATE SET store_time = excluded.store_time, expire_time = NULL, size = 0, mode = 1,
    filename = NULL, value = excluded.value"""
_ADD = f"{_PUT} WHERE mode <> 1 OR typeof(value) <> 'text'"
_DROP = "DELETE FROM Cache WHERE key = ? AND raw = 1"
# One statement that is a transaction of its own, for the commit of one new record under a lease: begin, the look at the
# lease and commit as statements of their own cost as much as the record itself. A text is no row id, so that a lost
# lease is an error; a condition on the whole (INSERT ... SELECT ... WHERE) would make SQLite build a table in between.
_ADD_ALONE = """INSERT INTO Cache (rowid, key, raw, store_time, access_time, mode, value) VALUES (
    CASE WHEN EXISTS (SELECT 1 FROM Cache WHERE key = ? AND raw = 1 AND substr(value, 1, ?) = ?) THEN NULL
    ELSE 'lost' END, ?, 1, ?, ?, 1, ?) ON CONFLICT (key, raw) DO NOTHING"""
# How many commits a journal has seen, at least: rows that were added, and transactions that did anything else.
SEQUENCE = """SELECT coalesce((SELECT value FROM Agentflow WHERE key = 'commits'), 0)
    + coalesce((SELECT value FROM Settings WHERE key = 'count'), 0)"""


def add_alone(con: sqlite3.Connection, op: Add, fence: Fence) -> bool:
    """Commit one new record, outside a transaction. False: the lease is lost or the key taken, and nothing was done."""
    lease = lease_starts(fence)
    now = time.time()
    given = (fence.key, len(lease), lease, op.key, now, now, op.value)
    try:
        return con.execute(_ADD_ALONE, given).rowcount > 0
    except sqlite3.IntegrityError as error:
        if code_of(error) == sqlite3.SQLITE_MISMATCH:
            return False
        raise


class FileTxn(Txn):
    """One IMMEDIATE transaction of SQLite."""

    __slots__ = ("_con", "_now")

    def __init__(self, con: sqlite3.Connection) -> None:
        self._con = con
        self._now = time.time()

    def get(self, key: str) -> str | None:
        row = self._con.execute(_GET, (key,)).fetchone()
        return row[1] if row is not None and row[0] == 1 and type(row[1]) is str else None

    def scan(self, prefix: str, after: str = "") -> list[tuple[str, str]]:
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        rows: list[tuple[str, str]] = self._con.execute(_SCAN, (max(prefix, after), end)).fetchall()
        return rows

    def add(self, key: str, value: str) -> bool:
        return self._con.execute(_ADD, (key, self._now, self._now, value)).rowcount > 0

    def put(self, key: str, value: str) -> None:
        self._con.execute(_PUT, (key, self._now, self._now, value))

    def drop(self, key: str) -> None:
        self._con.execute(_DROP, (key,))

    def apply(self, ops: Sequence[Op]) -> list[bool]:
        done = []
        execute, now = self._con.execute, self._now
        for op in ops:
            kind = type(op)
            if kind is Add:
                done.append(execute(_ADD, (op.key, now, now, op.value)).rowcount > 0)  # type: ignore[union-attr]
                continue
            if kind is Put:
                execute(_PUT, (op.key, now, now, op.value))  # type: ignore[union-attr]
            else:
                execute(_DROP, (op.key,))
            done.append(True)
        return done

    def now(self) -> float:
        return time.time()


def connect(path: Path, *, readonly: bool) -> sqlite3.Connection:
    """A connection with the journal's own pragmas, whatever the file says. Never creates a file."""
    name = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    con = sqlite3.connect(
        f"file:{name}?mode={'ro' if readonly else 'rw'}",
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=64,
    )
    try:
        # Recovering the log after a crash takes a lock for a moment, which the first look has to wait for.
        con.execute("PRAGMA busy_timeout = 5000")
        if readonly:
            # Mapped pages count as this process's memory: enough for the hot part, no more.
            con.execute("PRAGMA mmap_size = 8388608")
        else:
            con.execute("PRAGMA synchronous = FULL")
            con.execute("PRAGMA wal_autocheckpoint = 2000")  # 4 MB of log
    except BaseException:
        con.close()
        raise
    return con


def code_of(error: BaseException) -> int:
    """SQLite's primary result code, 0 when the error has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def translate(error: sqlite3.Error, path: Path) -> JournalError:
    """The agentflow error for an SQLite error: what happened to which journal, and what to do."""
    code = code_of(error)
    folder = path.parent
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return JournalBusy(f"{folder}: another process holds the journal's write lock. Try again when it is done.")
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _no_space(folder)):
        return JournalFull(
            f"{folder}: the disk is full; everything recorded before is intact. Free some space and run it again."
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return JournalReadOnly(
            f"{folder}: the journal cannot be written ({error}). Set AGENTFLOW_PATH to a directory that can."
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN):
        return JournalIncomplete(
            f"{folder}: {DB_NAME} cannot be read ({error}). Restore the whole directory from a backup, or move it "
            "away to begin an empty journal."
        )
    return JournalError(f"{folder}: {type(error).__name__}: {error}")


def _no_space(folder: Path) -> bool:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return False
    return stat.f_bavail * stat.f_frsize < 65536
