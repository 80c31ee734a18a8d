"""Connections to PostgreSQL, and what its errors mean for a journal. The one file that imports psycopg."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from agentflow.errors import (
    JournalBusy,
    JournalError,
    JournalFull,
    JournalIncomplete,
    JournalReadOnly,
    UsageError,
)
from agentflow.pgurl import PostgresURL
from agentflow.voice import log

try:
    import psycopg
    from psycopg import conninfo
    from psycopg.pq import TransactionStatus
except ImportError as error:
    raise UsageError(
        f"a journal in PostgreSQL needs psycopg, which cannot be imported ({' '.join(str(error).split())}): "
        "pip install 'agentflow[postgres]', from the checkout pip install '.[postgres]'."
    ) from error

# It tells of connections that break, as the errors do: to those who listen, and not to stderr.
logging.getLogger("psycopg").addHandler(logging.NullHandler())

Connection = psycopg.Connection[tuple[Any, ...]]
Error = psycopg.Error
DataError = psycopg.DataError

# Without these a server that vanishes without a word is noticed after hours.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
    "target_session_attrs": "read-write",
}
PATIENCE = 30.0
_FIRST_PAUSE = 0.02
LONGEST_PAUSE = 0.5
_REPEAT = ("40001", "40P01")  # serialization_failure, deadlock_detected
LOCK_NOT_AVAILABLE = "55P03"
_HINTS = (
    ("password authentication failed", "Check the user and the password: PGPASSWORD, ~/.pgpass, or the URL."),
    ("no password supplied", "Give the password by PGPASSWORD, ~/.pgpass, or in the URL."),
    ("no pg_hba.conf entry", "The server's pg_hba.conf does not let this user in from here."),
    ("database", "Create it first: createdb."),
    ("role", "Create it first: createuser."),
    ("resolve host", "Check the host's name in the URL."),
    ("translate host name", "Check the host's name in the URL."),
    ("session is read-only", "It is a standby, or made read-only: name the server that can be written."),
    ("too many", "Close some connections, or raise max_connections; a process that uses a journal has two."),
    ("", "Check that the server runs, and host and port in the URL."),
)


class Link:
    """A connection that is made again after it was broken. Use it under its ``lock``.

    Args:
        url: the database.
        setup: a statement that each new connection begins with; "" is none.

    Attributes:
        patience: seconds that a server is waited for, from when it was found to be away.
    """

    def __init__(self, url: PostgresURL, setup: str = "") -> None:
        self.url = url
        self.lock = threading.RLock()
        self.patience = PATIENCE
        self._away: float | None = None
        self._setup = setup
        self._con: Connection | None = None

    def ready(self) -> Connection:
        """The connection, outside of any transaction.

        Raises:
            JournalError: the server cannot be reached, or refuses.
        """
        con = self._con
        if con is not None and (con.closed or con.info.transaction_status != TransactionStatus.IDLE):
            self.drop()
            con = None
        if con is None:
            con = self._con = connect(self.url)
            if self._setup:
                con.execute(self._setup)
            self._away = None
        return con

    def hopeless(self, failure: JournalError, what: str) -> bool:
        """Whether the server has been away for long enough; says so, the first time that it is found to be away."""
        now = time.monotonic()
        if self._away is None:
            self._away = now
            log.warning("%s %s wait up to %g s for it.", failure, what, self.patience)
        return now - self._away >= self.patience

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._con is not None and not self._con.closed

    def settle(self) -> None:
        """End a transaction that was left open."""
        con = self._con
        try:
            if con is not None and not con.closed:
                con.execute("ROLLBACK")
        except Error:
            self.drop()

    def drop(self) -> None:
        """Close the connection, if there is one."""
        con, self._con = self._con, None
        if con is not None:
            con.close()

    def forked(self) -> object:
        """Begin anew in a child process; the parent's connection is returned, to be kept and never closed."""
        con, self._con = self._con, None
        self.lock = threading.RLock()
        return con

    def ask(self, query: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """A query, or a change that may be made twice. While the server is away it is waited for.

        Args:
            query: one statement, with %s for each of the args.
            args: the values.

        Raises:
            JournalError: it stayed away, or refuses.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                with self.lock:
                    cursor = self.ready().execute(query, args)
                    return cursor.fetchall() if cursor.description else []
            except Error as error:
                failure, again = self.failed(error)
            except Unreachable as error:
                failure, again = error, True
            if not again or self.hopeless(failure, "Reads"):
                raise failure
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    def failed(self, error: Error) -> tuple[JournalError, bool]:
        """What an error means, and whether the same may succeed in a moment. A broken connection is let go."""
        con = self._con
        if con is not None and con.closed:
            with self.lock:
                self.drop()
            return unreachable(self.url, error), True
        return translate(error, self.url), error.sqlstate in _REPEAT


class Unreachable(JournalError):
    """No connection to the server could be made, or it broke."""


def connect(url: PostgresURL) -> Connection:
    """A connection in which each statement is a transaction of its own.

    Raises:
        UsageError: libpq does not understand the URL.
        Unreachable: the server cannot be reached, or refuses.
    """
    try:
        given = conninfo.conninfo_to_dict(url.conninfo)
    except Error:
        # libpq shows the whole URL, and with it the password.
        raise UsageError(
            f"{url}: PostgreSQL does not understand this URL. Write postgresql://user@host:5432/database, with %40 for "
            "an @ in a password, and with parameters that libpq knows."
        ) from None
    known: dict[str, Any] = {name: value for name, value in _DEFAULTS.items() if name not in given}
    if "connect_timeout" in known and "PGCONNECT_TIMEOUT" in os.environ:
        del known["connect_timeout"]
    known.setdefault("application_name", given.get("application_name") or f"agentflow {os.getpid()}")
    try:
        return psycopg.connect(url.conninfo, autocommit=True, client_encoding="utf8", **known)
    except Error as error:
        raise unreachable(url, error) from error


class Found(NamedTuple):
    """What one statement has found or changed."""

    rows: list[tuple[Any, ...]]
    changed: int


def together(con: Connection, statements: Sequence[tuple[str, Sequence[Any]]]) -> list[Found]:
    """Several statements with their values, sent at once; what each has done."""
    # Not as a pipeline: what psycopg sends at the end of one has the server forget that it was to end a transaction in
    # which nothing happens (idle_in_transaction_session_timeout).
    with psycopg.ClientCursor(con) as cursor:
        cursor.execute(
            "; ".join(query for query, _ in statements), [value for _, given in statements for value in given]
        )
        found = []
        while True:
            found.append(Found(cursor.fetchall() if cursor.description else [], cursor.rowcount))
            if not cursor.nextset():
                return found


def unreachable(url: PostgresURL, error: Error) -> Unreachable:
    """The error for a connection that could not be made, or broke."""
    text = url.without_secrets(" ".join(str(error).split()))
    low = text.lower()
    if "does not exist" not in low:
        hints = [hint for hint in _HINTS if hint[0] not in ("database", "role")]
    else:
        hints = [hint for hint in _HINTS if hint[0] in ("database", "role")]
    hint = next((words for part, words in hints if part in low), _HINTS[-1][1])
    return Unreachable(f"{url}: no connection to the journal's server ({text}). {hint}")


def translate(error: Error, url: PostgresURL) -> JournalError:
    """The agentflow error for one of PostgreSQL's: what happened to which journal, and what to do."""
    state = error.sqlstate or ""
    text = url.without_secrets(" ".join(str(error).split()))
    if state == "53100":
        return JournalFull(f"{url}: the server's disk is full; everything recorded before is intact. Free some space.")
    if state in ("53300", LOCK_NOT_AVAILABLE, *_REPEAT):
        return JournalBusy(f"{url}: the server is busy ({text}). Try again.")
    if state == "42501":
        return JournalReadOnly(
            f"{url}: the user has not the rights it takes ({text}). Let the owner grant them: GRANT USAGE, CREATE ON "
            f"SCHEMA {url.schema}, and SELECT, INSERT, UPDATE, DELETE ON ALL TABLES in it; or GRANT CREATE ON DATABASE "
            "to make the schema itself."
        )
    if state == "25006":
        return JournalReadOnly(f"{url}: the server takes no changes ({text}). Name the one that does: not a standby.")
    if state in ("42P01", "3F000"):
        return JournalIncomplete(
            f"{url}: the journal is not there any more ({text}): somebody has dropped it. Restore it from a dump; to "
            "begin an empty one, start the process anew."
        )
    if state == "54000":
        return JournalError(f"{url}: a key is longer than PostgreSQL's index takes ({text}). Use a shorter name or id.")
    return JournalError(f"{url}: {type(error).__name__}: {text}")
