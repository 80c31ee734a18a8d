"""PostgreSQL's transactions for the commits of one process (commits.py).

Everybody's transactions run side by side, under rules that make of them what one writer at a time is in files:

- all hold one advisory lock to their end: plain commits share it, a guarded function has it alone. So nothing that a
  guarded function reads changes before it has written, and a lease cannot be taken over while a commit under it is on
  its way;
- a commit also locks the row of its lease (FOR SHARE), so that whoever changes that row by other means waits too. The
  row is read by that very statement: under READ COMMITTED it waits for a change that is on its way, and then sees it;
- each notes its number in the row of its process, so that one that was broken off in its COMMIT is looked up before
  anything is done again: nothing is written twice, and nothing acknowledged that is not there. (``pg_xact_status``
  would not do: a server that has crashed may give the same number to another transaction.)
- one that stands still (a stopped process) is ended by the server after ten seconds, so that it holds up nobody.

A commit is durable when it returns: ``synchronous_commit`` is on in each of these transactions. Marks are not synced.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from agentflow.commits import Commits, Job, NotNow
from agentflow.errors import JournalBusy, JournalError, LeaseLost, UsageError
from agentflow.ops import Add, Drop, Fence, Op, Put, Txn, check
from agentflow.pgsql import BEGIN, CLOCK, LOCK_ALONE, LOCK_SHARED, SETTINGS, Clock, Sql
from agentflow.pgurl import PostgresURL
from agentflow.postgres import (
    LOCK_NOT_AVAILABLE,
    LONGEST_PAUSE,
    Connection,
    DataError,
    Error,
    Link,
    Unreachable,
    together,
)
from agentflow.reads import prefix_end
from agentflow.voice import log


class PgTxn(Txn):
    """A transaction that holds the journal's lock. ``changes``: how many rows it has changed."""

    __slots__ = ("_clock", "_con", "_sql", "changes")

    def __init__(self, con: Connection, sql: Sql, clock: Clock) -> None:
        self._con = con
        self._sql = sql
        self._clock = clock
        self.changes = 0

    def get(self, key: str) -> str | None:
        row = self._con.execute(self._sql.get, (key,)).fetchone()
        return None if row is None else str(row[0])

    def scan(self, prefix: str, after: str = "") -> list[tuple[str, str]]:
        rows = self._con.execute(self._sql.scan, (max(prefix, after), prefix_end(prefix))).fetchall()
        return [(key, value) for key, value in rows]

    def add(self, key: str, value: str) -> bool:
        return self.apply([Add(key, value)])[0]

    def put(self, key: str, value: str) -> None:
        self.apply([Put(key, value)])

    def drop(self, key: str) -> None:
        self.apply([Drop(key)])

    def apply(self, ops: Sequence[Op]) -> list[bool]:
        if not ops:
            return []
        statements = [self._sql.of(op) for op in ops]
        if len(statements) == 1:
            counts = [self._con.execute(*statements[0]).rowcount]
        else:
            counts = [found.changed for found in together(self._con, statements)]
        self.changes += sum(counts)
        return [count > 0 or not isinstance(op, Add) for op, count in zip(ops, counts, strict=True)]

    def now(self) -> float:
        return self._clock()


class PgWriter(Commits):
    """The one write connection of this process, used by its writer thread alone."""

    at_once = False  # a server that is slow or away shall not keep the caller's loop waiting, nor swallow Ctrl-C
    longest_pause = LONGEST_PAUSE

    def __init__(self, url: PostgresURL, sql: Sql, lock: int, clock: Clock) -> None:
        self._link = Link(url)
        super().__init__(url, busy_seconds=self._link.patience)
        self._url = url
        self._sql = sql
        self._number = lock
        self._clock = clock
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._id = os.urandom(12).hex()
        self._count = 0
        # The jobs of a transaction that may be committed, and what is to be called if it is.
        self._unsure: tuple[list[Job[Any]], Callable[[], None] | None] | None = None

    def may_inline(self, loop: object) -> bool:
        return False

    def add(self, op: Add, fence: Fence) -> bool:
        return False

    def forked(self) -> object:
        """Begin anew in a child process; the parent's connection is returned, to be kept and never closed."""
        self._reset()
        self._begin_anew()
        return self._link.forked()

    def _disconnect(self) -> None:
        if self._count and self._link.is_open:
            try:
                self._link.ready().execute(self._sql.leave, (self._id,))
            except (Error, Unreachable) as error:
                log.debug("%s: the row of this writer stays: %s", self._url, error)
        self._link.drop()

    def _busy(self, waited: float) -> JournalBusy:
        return JournalBusy(
            f"{self._url}: another process kept the journal's lock for more than {waited:g} s. Find it with SELECT "
            "pid, application_name, client_addr, state FROM pg_stat_activity, end it, and run this again."
        )

    def _transact(self, jobs: list[Job[Any]], *, drain: bool) -> None:
        with self._lock, self._link.lock:
            try:
                con = self._link.ready()
                if self._unsure is not None:
                    self._find_out(con)
                if drain:
                    self._drain(jobs)
                if left := [job for job in jobs if not job.committed]:
                    self._commit(con, left)
            except Unreachable as error:
                raise self._not_now(error) from error
            except Error as error:
                raise self._failed(error) from error
            except BaseException:
                self._link.drop()  # and with it whatever was left open
                raise

    def _commit(self, con: Connection, jobs: list[Job[Any]]) -> None:
        """One transaction for all jobs."""
        alone = self.before is not None or any(job.guarded for job in jobs)
        leases = self._begin(con, jobs, alone)
        txn = PgTxn(con, self._sql, self._clock)
        done = None
        if alone:
            done = self.before(txn) if self.before is not None else None
            for job in jobs:
                self._perform(job, txn, con, only=len(jobs) == 1 and done is None)
        else:
            self._apply(txn, jobs, leases)
        if not txn.changes:
            con.execute("ROLLBACK")
            if done is not None:
                done()
            return
        self._count += 1
        self._unsure = [job for job in jobs if job.error is None], done
        together(con, ((self._sql.number, (self._id, self._count)), ("COMMIT", ())))
        self._is_committed()

    def _is_committed(self) -> None:
        assert self._unsure is not None
        jobs, done = self._unsure
        self._unsure = None
        self.transactions += 1
        for job in jobs:
            job.committed, job.error = True, None
        if done is not None:
            done()

    def _begin(self, con: Connection, jobs: list[Job[Any]], alone: bool) -> dict[str, str]:
        """Begins, and waits for the lock; the rows of the jobs' leases, which are locked, unless it is had alone."""
        patience = max(1, int(min(self._patience(job) for job in jobs) * 1000))
        fences = sorted({job.fence.key for job in jobs if job.fence is not None and not alone})
        statements: list[tuple[str, Sequence[Any]]] = [
            (BEGIN, ()),
            (SETTINGS, (f"{patience}ms",)),
            (LOCK_ALONE if alone else LOCK_SHARED, (self._number,)),
            (CLOCK, ()),
        ]
        if fences:
            statements.append((self._sql.leases, (fences,)))
        _, _, _, clock, *leases = together(con, statements)
        self._clock.seen(clock.rows[0][0])
        return {key: value for found in leases for key, value in found.rows}

    def _apply(self, txn: PgTxn, jobs: list[Job[Any]], leases: dict[str, str]) -> None:
        """Jobs that are ops alone: those whose lease is held, all at once."""
        held = []
        for job in jobs:
            job.error = None
            try:
                if job.fence is not None:
                    check(job.fence, leases.get(job.fence.key))
                held.append(job)
            except LeaseLost as error:
                job.error = error
        done = iter(txn.apply([op for job in held for op in job.ops]))
        for job in held:
            job.result = [next(done) for _ in job.ops]

    def _perform(self, job: Job[Any], txn: PgTxn, con: Connection, *, only: bool) -> None:
        job.error = None
        changes = txn.changes
        if not only:
            con.execute("SAVEPOINT job")
        self._inside = threading.get_ident()
        try:
            job.result = job.run(txn)
        except Error:
            raise
        except BaseException as error:
            job.error = error
            txn.changes = changes
            if not only:  # else there is nothing to commit, and all of it is rolled back
                con.execute("ROLLBACK TO job")
        finally:
            self._inside = 0
        if not only:
            con.execute("RELEASE job")

    def _find_out(self, con: Connection) -> None:
        """Whether the transaction whose COMMIT was broken off is committed."""
        # It held the lock: to have that alone is to know that it has ended, if the server was still at it.
        statements = (
            (BEGIN, ()),
            (SETTINGS, ("5s",)),
            (LOCK_ALONE, (self._number,)),
            (self._sql.numbered, (self._id,)),
            ("ROLLBACK", ()),
        )
        if together(con, statements)[3].rows == [(self._count,)]:
            self._is_committed()
        self._unsure = None

    def _failed(self, error: Error) -> BaseException:
        failure, again = self._link.failed(error)
        if isinstance(failure, Unreachable):
            return self._not_now(failure)
        self._link.settle()
        if error.sqlstate == LOCK_NOT_AVAILABLE:
            return NotNow()
        self._unsure = None  # the server has answered: it is not committed
        if again:
            return NotNow(failure)
        if isinstance(error, DataError) and error.sqlstate is None:
            return UsageError(f"a journal in PostgreSQL cannot hold this text: {error}.")
        return failure

    def _not_now(self, failure: JournalError) -> NotNow:
        if self._unsure is not None:
            failure = Unreachable(f"{failure} Whether the last commit was recorded is not known; run it again to see.")
        return NotNow(failure, hopeless=self._link.hopeless(failure, "Commits"))
