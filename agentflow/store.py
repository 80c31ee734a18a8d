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
    LeaseLost,
)
from agentflow.plain import Plain

DB_NAME = "cache.db"


class Add(Plain):
    """Record ``value`` under ``key`` unless the key is taken: the first one wins."""

    __slots__ = ("key", "value")

    def __init__(self, key: str, value: str) -> None:
        self.key = key
        self.value = value


class Put(Plain):
    """Write ``value`` under ``key``, replacing what was there (for documents that change)."""

    __slots__ = ("key", "value")

    def __init__(self, key: str, value: str) -> None:
        self.key = key
        self.value = value


class Drop(Plain):
    """Remove ``key``; nothing happens when it is not there."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key


Op = Add | Put | Drop


class Fence(Plain):
    """A commit carrying it is refused with LeaseLost unless lease row ``key`` still has this ``token``."""

    __slots__ = ("key", "token")

    def __init__(self, key: str, token: int) -> None:
        self.key = key
        self.token = token


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
    lease = _lease_starts(fence)
    now = time.time()
    given = (fence.key, len(lease), lease, op.key, now, now, op.value)
    try:
        return con.execute(_ADD_ALONE, given).rowcount > 0
    except sqlite3.IntegrityError as error:
        if code_of(error) == sqlite3.SQLITE_MISMATCH:
            return False
        raise


def _lease_starts(fence: Fence) -> str:
    # Lease rows are written with the token first (lease.py), so no JSON needs to be parsed here.
    return f'{{"token":{fence.token},'


class Txn:
    """What a guarded function reads and writes: one IMMEDIATE transaction, valid only during the call."""

    __slots__ = ("_con", "_now")

    def __init__(self, con: sqlite3.Connection) -> None:
        self._con = con
        self._now = time.time()

    def get(self, key: str) -> str | None:
        """The value of ``key``, None when there is none."""
        row = self._con.execute(_GET, (key,)).fetchone()
        return row[1] if row is not None and row[0] == 1 and type(row[1]) is str else None

    def scan(self, prefix: str, after: str = "") -> list[tuple[str, str]]:
        """The rows whose keys begin with ``prefix``, a text of ASCII, and come after ``after``. They should be few."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        rows: list[tuple[str, str]] = self._con.execute(_SCAN, (max(prefix, after), end)).fetchall()
        return rows

    def add(self, key: str, value: str) -> bool:
        """Record unless the key is taken. True if it was recorded."""
        return self._con.execute(_ADD, (key, self._now, self._now, value)).rowcount > 0

    def put(self, key: str, value: str) -> None:
        """Write, replacing what was there."""
        self._con.execute(_PUT, (key, self._now, self._now, value))

    def drop(self, key: str) -> None:
        """Remove the key if it is there."""
        self._con.execute(_DROP, (key,))

    def apply(self, ops: Sequence[Op]) -> list[bool]:
        """Do all ops in order. Per Add: True if it was recorded; Put and Drop: True."""
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

    def check(self, fence: Fence) -> None:
        """Raise LeaseLost unless the lease row still carries the fence's token."""
        value = self.get(fence.key)
        if value is None or not value.startswith(_lease_starts(fence)):
            raise LeaseLost(
                f"{fence.key}: this process no longer owns it (token {fence.token} was replaced): another process "
                "took over after the lease had run out. Nothing was committed; run it again to go on from its records."
            )


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
