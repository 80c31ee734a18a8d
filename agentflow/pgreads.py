"""Reads and marks of one process in a journal in PostgreSQL: one connection, one query after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from agentflow.errors import UsageError
from agentflow.pgsql import SNAPSHOT, Clock, Sql
from agentflow.postgres import Link
from agentflow.reads import PAGE_ROWS, Reads, prefix_end
from agentflow.spill import Spill

_MANY_KEYS = 10_000


class PgReads(Reads):
    """Reads through one connection, one after the other; a server that is away is waited for."""

    def __init__(self, link: Link, sql: Sql, clock: Clock, spill: Spill) -> None:
        super().__init__(spill)
        self._link = link
        self._sql = sql
        self._clock = clock
        self._closed = False
        self._version = 0
        self._snapshot = ""

    def _ask(self, query: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if self._closed:
            raise UsageError(f"The journal {self._link.url} is closed: open it again with Journal.open().")
        return self._link.ask(query, args)

    def version(self) -> int:
        # Each transaction that has ended since is missing in this list of those that go on, or before its end.
        ((snapshot, now),) = self._ask(SNAPSHOT)
        self._clock.seen(now)
        if snapshot != self._snapshot:
            self._snapshot = snapshot
            self._version += 1
        return self._version

    def get(self, key: str) -> str | None:
        rows = self._ask(self._sql.get, (key,))
        value = str(rows[0][0]) if rows else None
        return self._spill.see(key, value) if self._spill else value

    def _pages(
        self, values: bool, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[list[tuple[str, Any]]]:
        low, least, high = prefix, ">=", prefix_end(prefix)
        if after is not None and after >= low:
            low, least = after, ">"
        if before is not None and (high is None or before < high):
            high = before
        left = -1 if limit is None else limit
        direction = "DESC" if reverse else "ASC"
        size = PAGE_ROWS
        while left != 0:
            want = size if left < 0 else min(size, left)
            upto = "" if high is None else " AND key < %s"
            given = [low, want] if high is None else [low, high, want]
            if values:
                rows = self._ask(self._sql.values.format(least, upto, direction), given)
                found = rows[0][2] if rows else 0
                page = [(key, value) for key, value, _ in rows]
            else:
                keys = f"{self._sql.keys.format(least)}{upto} ORDER BY key {direction} LIMIT %s"
                page = [(key, rowid) for key, rowid in self._ask(keys, given)]
                found = len(page)
            if page:
                yield page
            if len(page) == found < want:
                return
            left -= len(page) if left > 0 else 0
            if reverse:
                high = page[-1][0]
            else:
                low, least = page[-1][0], ">"
            size = PAGE_ROWS if values else _MANY_KEYS

    def _rowids(self, prefix: str) -> Iterable[int]:
        end = prefix_end(prefix)
        rows = self._ask(
            self._sql.rowids + ("" if end is None else " AND key < %s"), [prefix] if end is None else [prefix, end]
        )
        return (rowid for (rowid,) in rows)

    def _at(self, rowids: Sequence[int]) -> Iterable[tuple[int, str, str]]:
        return ((rowid, key, value) for rowid, key, value in self._ask(self._sql.at, (list(rowids),)))

    def close(self) -> None:
        self._closed = True
        with self._link.lock:
            self._link.drop()

    def forked(self) -> list[object]:
        return [self._link.forked()]


class PgMarks:
    """Marks as rows: others see them at once. A server that crashes may lose those of its last second."""

    def __init__(self, link: Link, schema: str) -> None:
        self._link = link
        self._add = f'INSERT INTO "{schema}".marks (run, line) VALUES (%s, %s)'
        self._get = f'SELECT line FROM "{schema}".marks WHERE run = %s ORDER BY id'
        self._size = f'SELECT coalesce(sum(octet_length(line)), 0)::bigint FROM "{schema}".marks WHERE run = %s'
        self._drop = f'DELETE FROM "{schema}".marks WHERE run = %s'

    def append(self, run_id: str, line: str) -> None:
        if "\n" in line:
            raise UsageError("A mark is one line: it cannot contain a line break.")
        self._link.ask(self._add, (run_id, line))

    def read(self, run_id: str) -> list[str]:
        return [line for (line,) in self._link.ask(self._get, (run_id,))]

    def size(self, run_id: str) -> int:
        return int(self._link.ask(self._size, (run_id,))[0][0])

    def clear(self, run_id: str) -> None:
        self._link.ask(self._drop, (run_id,))
