"""The statements of a journal in PostgreSQL, and the server's clock."""

from __future__ import annotations

import time

from agentflow.ops import Add, Op, Put
from agentflow.reads import PAGE_CHARS

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
SETTINGS = """SELECT set_config('lock_timeout', %s, true),
    set_config('idle_in_transaction_session_timeout', '10s', true),
    set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"""
LOCK_SHARED = "SELECT pg_advisory_xact_lock_shared(%s)"
LOCK_ALONE = "SELECT pg_advisory_xact_lock(%s)"
CLOCK = "SELECT extract(epoch FROM clock_timestamp())::float8"
SNAPSHOT = "SELECT pg_current_snapshot()::text, extract(epoch FROM clock_timestamp())::float8"


class Clock:
    """The server's clock, as it was seen last, going on with this machine's."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def seen(self, epoch: float) -> None:
        """The server has just said so."""
        self._ahead = epoch - time.monotonic()

    def __call__(self) -> float:
        return self._ahead + time.monotonic()


class Sql:
    """The statements, for one schema."""

    def __init__(self, schema: str) -> None:
        table = f'"{schema}".records'
        self.get = f"SELECT value FROM {table} WHERE key = %s"
        self.scan = f"SELECT key, value FROM {table} WHERE key > %s AND key < %s ORDER BY key"
        self.leases = f"SELECT key, value FROM {table} WHERE key = ANY(%s) ORDER BY key FOR SHARE"
        self.add = f"INSERT INTO {table} (key, value) VALUES (%s, %s) ON CONFLICT (key) DO NOTHING"
        self.put = (
            f"INSERT INTO {table} (key, value) VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        )
        self.drop = f"DELETE FROM {table} WHERE key = %s"
        self.number = (
            f'INSERT INTO "{schema}".writers (id, number) VALUES (%s, %s) '
            "ON CONFLICT (id) DO UPDATE SET number = excluded.number, seen = now()"
        )
        self.numbered = f'SELECT number FROM "{schema}".writers WHERE id = %s'
        self.leave = f'DELETE FROM "{schema}".writers WHERE id = %s'
        self.rowids = f"SELECT id FROM {table} WHERE key >= %s"
        self.at = f"SELECT id, key, value FROM {table} WHERE id = ANY(%s) ORDER BY id"
        self.keys = f"SELECT key, id FROM {table} WHERE key {{}} %s"
        # A page ends with the value that makes it large. The length of a value is known without reading it.
        self.values = (
            "SELECT key, value, found FROM (SELECT key, value, count(*) OVER () AS found, "
            "sum(octet_length(value)) OVER (ORDER BY key {2}) - octet_length(value) AS ahead "
            f"FROM (SELECT key, value FROM {table} WHERE key {{0}} %s{{1}} ORDER BY key {{2}} LIMIT %s) AS page) "
            f"AS sized WHERE ahead <= {PAGE_CHARS} ORDER BY key {{2}}"
        )

    def of(self, op: Op) -> tuple[str, tuple[str, ...]]:
        """The statement of an op, and what it is given."""
        if isinstance(op, Add):
            return self.add, (op.key, op.value)
        return (self.put, (op.key, op.value)) if isinstance(op, Put) else (self.drop, (op.key,))
