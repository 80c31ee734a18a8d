"""SQLite's transactions for the commits of one process (commits.py).

A single new record, where nothing else is under way, is committed by a statement of its own (``add``). A crash before
COMMIT returns loses the whole transaction; after it, nothing (WAL, synchronous FULL).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentflow.commits import Commits, Job, NotNow
from agentflow.errors import JournalBusy, LeaseLost
from agentflow.ops import Add, Fence, Txn
from agentflow.store import SEQUENCE, FileTxn, add_alone, code_of, connect, translate

_BUMP = "UPDATE Agentflow SET value = value + 1 WHERE key = 'commits'"


class Writer(Commits):
    """The one write connection of this process to a journal's database."""

    def __init__(
        self, path: Path, check: Callable[[], None], mark: Callable[[int, bool], None], *, busy_seconds: float = 30.0
    ) -> None:
        super().__init__(path.parent, busy_seconds=busy_seconds)
        self.path = path
        self.sequence = 0  # a lower bound of the store's, see SEQUENCE
        self._check = check
        self._mark = mark
        self._con: sqlite3.Connection | None = None

    def forked(self) -> sqlite3.Connection | None:
        """Begin anew in a child process; the parent's connection is returned, to be kept and never closed."""
        con, self._con = self._con, None
        self._reset()
        return con

    def _disconnect(self) -> None:
        con, self._con = self._con, None
        if con is not None:
            con.close()

    def add(self, op: Add, fence: Fence) -> bool:
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
        # A plain `with` on a C lock is the one form that Ctrl-C cannot leave locked. Callers that must not
        # wait look at the lock first: at worst this waits for one transaction of another thread.
        with self._lock:
            self._check()
            con = self._begin()
            try:
                if drain:
                    self._drain(jobs)
                txn = FileTxn(con)
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
                raise NotNow from None
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

    def _busy(self, waited: float) -> JournalBusy:
        return JournalBusy(
            f"{self.path.parent}: another process kept the journal's write lock for more than {waited:g} s. "
            f"Find it with `fuser {self.path}`, end it, and run this again."
        )
