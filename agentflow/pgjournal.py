"""A journal in a schema of a PostgreSQL database, for several machines.

Four tables: ``about`` (the journal's id and versions), ``records`` (keys, values, and numbers in the order of writing),
``marks``, and ``writers`` (the number of each process's last transaction). Each process has two connections: one for
its writer thread (pgwriter.py), one for reads and marks (pgreads.py).
"""

from __future__ import annotations

import os

from agentflow import layout
from agentflow.digests import blake2b
from agentflow.errors import (
    JournalError,
    JournalForeign,
    JournalIncomplete,
    JournalReadOnly,
    JournalVersionError,
)
from agentflow.pgreads import PgMarks, PgReads
from agentflow.pgsql import CLOCK, LOCK_ALONE, SETTINGS, Clock, Sql
from agentflow.pgurl import PostgresURL
from agentflow.pgwriter import PgWriter
from agentflow.postgres import Connection, Error, Link, connect, translate
from agentflow.spill import Spill
from agentflow.voice import log

TABLES_VERSION = 1
_OLDEST = 130000


class Schema:
    """What ``journal.Journal`` needs of a schema; described there, as ``Backend``."""

    many_hosts = True

    def __init__(self, url: PostgresURL, store: str) -> None:
        self.path = url
        self.id = store
        self.clock = Clock()
        sql = Sql(url.schema)
        # Nothing that goes through this connection has to be durable: reads, and marks.
        self._link = Link(url, "SET synchronous_commit = off")
        self.spill = Spill(url, store, None, "See to the server")
        self.reads = PgReads(self._link, sql, self.clock, self.spill)
        self.writer = PgWriter(url, sql, int(store[:15], 16), self.clock)
        self.marks = PgMarks(self._link, url.schema)

    def is_current(self) -> bool:
        """Always: the server knows no other journal by this name, until it is restarted with other data."""
        return True

    def close(self) -> None:
        """Finish queued commits and close the connections."""
        self.writer.close()
        self.reads.close()

    def forked(self) -> list[object]:
        """Begin anew in a child process; the parent's connections are returned, to be kept and never closed."""
        self.spill.forked()
        return [self.writer.forked(), *self.reads.forked()]


_NAMES = ("about", "records", "marks", "writers")
_TABLES = """
CREATE TABLE {0}.about (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE {0}.records (
    key text COLLATE "C" PRIMARY KEY, id bigint GENERATED ALWAYS AS IDENTITY, value text NOT NULL);
CREATE UNIQUE INDEX records_id ON {0}.records (id);
CREATE TABLE {0}.marks (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, run text NOT NULL, line text NOT NULL);
CREATE INDEX marks_run ON {0}.marks (run);
CREATE TABLE {0}.writers (id text PRIMARY KEY, number bigint NOT NULL, seen timestamptz NOT NULL DEFAULT now());
"""


def open_schema(url: PostgresURL) -> Schema:
    """The journal in this schema, created if there is nothing yet; see ``Journal.open``."""
    con = connect(url)
    try:
        _check_server(con, url)
        backend = Schema(url, _store(con, url))
        ((now,),) = con.execute(CLOCK).fetchall()
        backend.clock.seen(now)
        con.execute(f"DELETE FROM \"{url.schema}\".writers WHERE seen < now() - interval '30 days'")
        return backend
    except Error as error:
        raise translate(error, url) from error
    finally:
        con.close()


def exists_schema(url: PostgresURL) -> bool:
    """Whether there is a journal in this schema. Nothing is created."""
    con = connect(url)
    try:
        return _is_there(con, url.schema)
    except Error as error:
        raise translate(error, url) from error
    finally:
        con.close()


def sizes(url: PostgresURL) -> tuple[dict[str, int], list[tuple[str, int, int]], dict[str, int]]:
    """How large a journal is: bytes by table; by family of keys how many rows and bytes; how many runs by status."""
    con = connect(url)
    try:
        tables = {
            name: int(con.execute("SELECT pg_total_relation_size(%s)", (f'"{url.schema}".{name}',)).fetchall()[0][0])
            for name in _NAMES
        }
        families = con.execute(
            "SELECT split_part(key, '/', 1) COLLATE \"C\", count(*), sum(octet_length(value))::bigint "
            f"FROM \"{url.schema}\".records WHERE key LIKE '%/%' GROUP BY 1 ORDER BY 1"
        ).fetchall()
        statuses = con.execute(
            f"SELECT split_part(key, '/', 2), count(*) FROM \"{url.schema}\".records "
            "WHERE key >= 'x/' AND key < 'x0' GROUP BY 1"
        ).fetchall()
    except Error as error:
        raise translate(error, url) from error
    finally:
        con.close()
    return (
        tables,
        [(name, rows, size) for name, rows, size in families],
        dict([(name, rows) for name, rows in statuses]),
    )


def about_server(url: PostgresURL) -> list[tuple[str, bool, str]]:
    """What there is to say of the server: what it is about, whether it is well, and how it is."""
    con = connect(url)
    try:
        number = con.info.parameter_status("server_version")
        ((fsync, connections, most),) = con.execute(
            "SELECT current_setting('fsync'), (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client "
            "backend'), current_setting('max_connections')"
        ).fetchall()
    except Error as error:
        raise translate(error, url) from error
    finally:
        con.close()
    return [
        ("server", True, f"PostgreSQL {number}, {connections} of {most} connections in use"),
        ("fsync", fsync == "on", "on" if fsync == "on" else "off: a power loss can take away what was recorded"),
    ]


def _is_there(con: Connection, schema: str) -> bool:
    return "about" in (_tables(con, schema) or ())


def _tables(con: Connection, schema: str) -> list[str] | None:
    """What a schema holds; None when there is no such schema."""
    # Asked of the catalogue itself: to_regclass may go by what this session saw before it waited for its lock.
    rows = con.execute(
        "SELECT relname FROM pg_catalog.pg_namespace AS n LEFT JOIN pg_catalog.pg_class ON relnamespace = n.oid "
        "WHERE nspname = %s ORDER BY relname",
        (schema,),
    ).fetchall()
    return [name for (name,) in rows if name is not None] if rows else None


def _check_server(con: Connection, url: PostgresURL) -> None:
    """Refuse a server on which the journal would not be sound."""
    if con.info.server_version < _OLDEST:
        raise JournalError(f"{url}: PostgreSQL {con.info.server_version // 10000} is too old; it takes 13 or later.")
    encoding = con.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise JournalError(
            f"{url}: the database holds text as {encoding}, which has no place for every character. Use one that was "
            "made with createdb --encoding=UTF8 --template=template0."
        )
    if con.execute("SELECT pg_is_in_recovery()").fetchone() == (True,):
        raise JournalReadOnly(f"{url}: this server is a standby. Name the one that can be written.")
    if con.execute("SHOW fsync").fetchone() == ("off",):
        log.warning(
            "%s: the server runs with fsync=off: a power loss can take away what was recorded, which is then paid for "
            "again. Set fsync=on in postgresql.conf.",
            url,
        )


def _store(con: Connection, url: PostgresURL) -> str:
    """The journal's id; of several processes that find none, one creates it and the others find it done."""
    schema = url.schema
    if not _is_there(con, schema):
        number = int(blake2b(f"agentflow schema {schema}".encode(), digest_size=7).hexdigest(), 16)
        with con.transaction():
            con.execute(SETTINGS, ("30s",))
            con.execute(LOCK_ALONE, (number,))
            if not _is_there(con, schema):
                _create(con, url)
    about = {key: value for key, value in con.execute(f'SELECT key, value FROM "{schema}".about').fetchall()}
    layout.check_versions(url, about.get("layout"), about.get("digest"))
    if about.get("tables") != str(TABLES_VERSION):
        raise JournalVersionError(
            f"{url}: its tables have version {about.get('tables')}; this agentflow knows {TABLES_VERSION}. Use the "
            "agentflow that made them, or another ?schema=. Nothing was changed."
        )
    if not about.get("store"):
        raise JournalIncomplete(f'{url}: "{schema}".about names no journal. Restore it from a dump.')
    return str(about["store"])


def _create(con: Connection, url: PostgresURL) -> None:
    schema = url.schema
    strange = _tables(con, schema)
    if strange:
        raise JournalForeign(
            f"{url}: the schema {schema} holds something else than a journal ({', '.join(strange[:3])}). Name another "
            "one: ?schema=... Nothing was changed."
        )
    if strange is None:
        con.execute(f'CREATE SCHEMA "{schema}"')
    con.execute(_TABLES.format(f'"{schema}"'))
    about = {
        "store": os.urandom(16).hex(), "layout": layout.LAYOUT_VERSION, "digest": layout.DIGEST_VERSION,
        "tables": TABLES_VERSION,
    }  # fmt: skip
    for key, value in about.items():
        con.execute(f'INSERT INTO "{schema}".about VALUES (%s, %s)', (key, str(value)))
