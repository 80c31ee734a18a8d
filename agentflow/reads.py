"""All reads of one process from one journal: single records, ranges of keys in pages, windows in the order of writing.

No lock or snapshot is held between two pages. In files every thread has a read-only connection of its own, so that
readers never wait for the writer; a row that does not look like one written here is never decoded, only reported.
Replies that were spilled (spill.py) and not yet taken in count as if they were in the database.
"""

from __future__ import annotations

import sqlite3
import threading
import weakref
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agentflow.errors import UsageError
from agentflow.spill import Spill
from agentflow.store import connect, translate
from agentflow.voice import log

PAGE_ROWS = 256
PAGE_CHARS = 4_000_000
_SPILLED = 2**62


class Reads(ABC):
    """What ``Journal.get``, ``scan``, ``keys`` and ``rows`` do; they are described there.

    Attributes:
        problems: by key, rows met so far that no journal has written.
    """

    def __init__(self, spill: Spill) -> None:
        self.problems: dict[str, str] = {}
        self._spill = spill
        self._windows: OrderedDict[str, array[int]] = OrderedDict()

    # -- what a kind of journal supplies ----------------------------------------------------------

    @abstractmethod
    def version(self) -> int:
        """Changes whenever anybody commits; compare within one thread."""

    @abstractmethod
    def get(self, key: str) -> str | None:
        """The value of a key, spilled ones included."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections of all threads."""

    @abstractmethod
    def forked(self) -> list[object]:
        """Begin anew in a child process; the parent's connections are returned, to be kept and never closed."""

    @abstractmethod
    def _pages(
        self, values: bool, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[list[tuple[str, Any]]]:
        """What the database holds, page by page: keys with their values, or with their row ids."""

    @abstractmethod
    def _rowids(self, prefix: str) -> Iterable[int]:
        """The row ids of all keys that begin so."""

    @abstractmethod
    def _at(self, rowids: Sequence[int]) -> Iterable[tuple[int, str, str]]:
        """What stands in these rows, in their order: row id, key, value."""

    # -- the rest is the same everywhere ----------------------------------------------------------

    def scan(
        self, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[tuple[str, str]]:
        if self._spill:
            for key, _ in self.keys(prefix, after, before, limit, reverse):
                text = self.get(key)
                if text is not None:
                    yield key, text
            return
        for page in self._pages(True, prefix, after, before, limit, reverse):
            yield from page

    def keys(
        self, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[tuple[str, int]]:
        if self._spill:
            yield from self._keys_with_spilled(prefix, after, before, limit, reverse)
            return
        for page in self._pages(False, prefix, after, before, limit, reverse):
            yield from page

    def _keys_with_spilled(
        self, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[tuple[str, int]]:
        # Rare and few, so nothing is merged page by page. Their row ids lie beyond all real ones.
        found = {key: _SPILLED + position for position, key in enumerate(self._spill.keys(prefix))}
        found.update(row for page in self._pages(False, prefix, None, None, None, False) for row in page)
        chosen = sorted(
            (
                (key, rowid)
                for key, rowid in found.items()
                if (after is None or key > after) and (before is None or key < before)
            ),
            reverse=reverse,
        )
        yield from chosen if limit is None else chosen[:limit]

    def rows(self, prefix: str, from_rowid: int, limit: int) -> list[tuple[int, str, str]]:
        # The row ids are kept between windows: asking the index again for each window would be quadratic,
        # walking the table slow for a run whose few records lie far apart.
        ids = self._windows.get(prefix)
        position = 0 if ids is None else bisect_left(ids, from_rowid)
        if ids is None or len(ids) - position < limit:
            ids = self._windows[prefix] = array("q", sorted(self._known(prefix)))
            while len(self._windows) > 4:
                self._windows.popitem(last=False)
            position = bisect_left(ids, from_rowid)
        if self._spill:
            wanted = {rowid: key for key, rowid in self.keys(prefix, None, None, None, False)}
            texts = ((rowid, wanted[rowid], self.get(wanted[rowid])) for rowid in ids[position:] if rowid in wanted)
            return [(rowid, key, text) for rowid, key, text in texts if text is not None][:limit]
        found: list[tuple[int, str, str]] = []
        while len(found) < limit and position < len(ids):
            some = ids[position : position + min(limit - len(found), PAGE_ROWS)]
            position += len(some)
            # A dropped row's id can have gone to another key since.
            found += [row for row in self._at(some) if row[1].startswith(prefix)]
        return found

    def _known(self, prefix: str) -> Iterable[int]:
        if self._spill:
            return (rowid for _, rowid in self.keys(prefix, None, None, None, False))
        return self._rowids(prefix)


class _Reader:
    """A thread's read connection, closed with its thread. A context around each use of it by that thread."""

    __slots__ = ("__weakref__", "_reads", "busy", "con")

    def __init__(self, con: sqlite3.Connection, reads: FileReads) -> None:
        self.con = con
        self.busy = False
        self._reads = reads

    def __enter__(self) -> sqlite3.Connection:
        self.busy = True  # before the question: whoever closes says so before it looks who is busy
        if self._reads.closed:
            self.busy = False
            raise self._reads.closed_error()
        return self.con

    def __exit__(self, *exc: object) -> None:
        self.busy = False

    def __del__(self) -> None:
        self.con.close()


class FileReads(Reads):
    """Reads from SQLite, one read-only connection a thread."""

    def __init__(self, file: Path, spill: Spill) -> None:
        super().__init__(spill)
        self.closed = False
        self._file = file
        self._readers: weakref.WeakSet[_Reader] = weakref.WeakSet()
        self._local = threading.local()

    def close(self) -> None:
        self.closed = True
        for reader in list(self._readers):
            # Closed while its thread is inside SQLite, it would take the process down. That one goes with its thread.
            if not reader.busy:
                reader.con.close()

    def closed_error(self) -> UsageError:
        return UsageError(f"The journal {self._file.parent} is closed: open it again with Journal.open().")

    def forked(self) -> list[object]:
        readers = list[object](self._readers)
        self._readers = weakref.WeakSet()
        self._local = threading.local()
        return readers

    def _reader(self) -> _Reader:
        reader: _Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            if self.closed:
                raise self.closed_error()
            try:
                reader = _Reader(connect(self._file, readonly=True), self)
            except sqlite3.Error as error:
                raise translate(error, self._file) from error
            self._readers.add(reader)
            self._local.reader = reader
        return reader

    def version(self) -> int:
        # This reads shared memory, and no disk.
        with self._reader() as con:
            return int(con.execute("PRAGMA data_version").fetchone()[0])

    def get(self, key: str) -> str | None:
        with self._reader() as con:
            row = con.execute("SELECT mode, value FROM Cache WHERE key = ? AND raw = 1", (key,)).fetchone()
        value = None if row is None else self._text(key, row[0], row[1])
        return self._spill.see(key, value) if self._spill else value

    def _pages(
        self, values: bool, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Iterator[list[tuple[str, Any]]]:
        columns = "key, mode, value" if values else "key, rowid"
        low, high = prefix, prefix_end(prefix) or b""  # in SQLite every blob comes after every text
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
            want = size if left < 0 else min(size, left)
            page: list[Any]
            page, chars = [], 0
            with self._reader() as con:
                cursor = con.execute(sql, (low, high, want))
                if values:
                    for row in cursor:
                        page.append(row)
                        value = row[-1]
                        chars += len(value) if type(value) is str else 0
                        if chars > PAGE_CHARS:
                            break
                else:
                    page = cursor.fetchall()
                cursor.close()
            if page:
                yield self._decoded(page) if values else page
            if len(page) < want and chars <= PAGE_CHARS:
                return
            left -= len(page) if left > 0 else 0
            if reverse:
                high = page[-1][0]
            else:
                low, low_operator = page[-1][0], ">"
            size = PAGE_ROWS

    def _decoded(self, page: list[Any]) -> list[tuple[str, Any]]:
        return [(key, text) for key, mode, value in page if (text := self._text(key, mode, value)) is not None]

    def _rowids(self, prefix: str) -> Iterator[int]:
        sql = "SELECT rowid FROM Cache WHERE raw = 1 AND key >= ? AND key < ?"
        with self._reader() as con:
            yield from (rowid for (rowid,) in con.execute(sql, (prefix, prefix_end(prefix) or b"")))

    def _at(self, rowids: Sequence[int]) -> Iterator[tuple[int, str, str]]:
        among, which = f"IN ({','.join('?' * len(rowids))})", list(rowids)
        if rowids[-1] - rowids[0] == len(rowids) - 1:  # one after the other, as a run alone writes them
            among, which = "BETWEEN ? AND ?", [rowids[0], rowids[-1]]
        sql = f"SELECT rowid, key, mode, value FROM Cache WHERE rowid {among} ORDER BY rowid"
        with self._reader() as con:
            found = con.execute(sql, which).fetchall()
        for rowid, key, mode, value in found:
            if isinstance(key, str):
                text = value if mode == 1 and type(value) is str else self._text(key, mode, value)
                if text is not None:
                    yield rowid, key, text

    def _text(self, key: str, mode: int, value: object) -> str | None:
        if mode == 1 and type(value) is str:
            return value
        if key not in self.problems:
            kind = {2: "a side file", 3: "a side file", 4: "a pickle"}.get(mode, f"a {type(value).__name__} value")
            self.problems[key] = f"{key}: {kind}, which no journal writes; it was not read"
            log.warning("%s: ignored a row that agentflow did not write: %s", self._file.parent, self.problems[key])
        return None


def prefix_end(prefix: str) -> str | None:
    """The first text after all that begin with ``prefix``; None when there is none."""
    while prefix:
        last = ord(prefix[-1]) + 1
        if last == 0xD800:  # surrogates cannot be stored
            last = 0xE000
        if last <= 0x10FFFF:
            return prefix[:-1] + chr(last)
        prefix = prefix[:-1]
    return None
