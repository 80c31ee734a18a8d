"""Looking at every record of a journal: of the kind that is written here, readable, and with what it refers to."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from agentflow import rundocs
from agentflow.index import Row, in_key
from agentflow.journal import Journal

_JSON = ("a", "m", "h", "e", "c", "lease", "claim")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about a journal that is not as it should be.

    Attributes:
        kind: ``"missing"`` (a part is not there), ``"damaged"`` (it is there and cannot be read), ``"foreign"`` (no
            journal writes such rows; they are never read) or ``"leftover"`` (of something that was cut off; harmless).
        where: the key or file.
        what: in words.
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


class Table(Protocol):
    """Where the records are. ``foreign``: what no journal writes, as it is met."""

    foreign: list[Problem]

    def rows(self, prefix: str) -> Iterator[tuple[str, str]]: ...

    def has(self, key: str) -> bool: ...


class FileTable:
    """The table of a database that may be damaged, or hold what others have written."""

    def __init__(self, con: sqlite3.Connection) -> None:
        self.con = con
        self.foreign: list[Problem] = []

    def rows(self, prefix: str) -> Iterator[tuple[str, str]]:
        sql = "SELECT key, raw, mode, typeof(value), filename, value FROM Cache WHERE key >= ?"
        given = (prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else ("",)
        found = self.con.execute(sql + (" AND key < ?" if prefix else "") + " ORDER BY key", given)
        for key, raw, mode, kind, filename, value in found:
            if type(key) is not str or raw != 1 or mode != 1 or kind != "text" or filename is not None:
                if not prefix:
                    form = {2: "a side file", 3: "a side file", 4: "a pickle"}.get(mode, f"a {kind} value")
                    self._is_foreign(str(key)[:200], f"{form}, which no journal writes; it is not read")
            else:
                yield key, value
        if not prefix:
            for (key,) in self.con.execute("SELECT key FROM Cache WHERE typeof(key) <> 'text'").fetchall():
                self._is_foreign(str(key)[:80], "its key is no text, which no journal writes; it is not read")

    def _is_foreign(self, where: str, what: str) -> None:
        self.foreign.append(Problem("foreign", where, what))

    def has(self, key: str) -> bool:
        found = self.con.execute("SELECT 1 FROM Cache WHERE key = ? AND raw = 1 AND mode = 1", (key,)).fetchone()
        return found is not None


class JournalTable:
    """The records of a journal that is open. There is nothing foreign in a database that takes texts alone."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.foreign: list[Problem] = []

    def rows(self, prefix: str) -> Iterator[tuple[str, str]]:
        return self._journal.scan(prefix)

    def has(self, key: str) -> bool:
        return self._journal.get(key) is not None


class Rows:
    """Every row of a table, and what is the matter with it."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.problems: list[Problem] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.codes = {key for key, _ in table.rows("c/")}
        self.slot = ""
        self.versions: set[int] = set()

    def look(self) -> int:
        """Look at all rows; their number."""
        count = 0
        for key, text in self.table.rows("r/"):
            self._run(key, text)
        for key, text in self.table.rows(""):
            count += 1
            family = key.partition("/")[0]
            if family == "s":
                self._step(key, text)
            elif family == "x":
                self._index(key, text)
            elif family == "xt":
                if not self.table.has(f"h/{text}"):
                    self._add("missing", key, f"the task {text} that it lists is not there")
            elif family == "k" and "!" not in key:
                self._record(key, text)
            elif family in _JSON:
                self._json(key, text)
        self._end_of_slot()
        self.problems += self.table.foreign
        return count

    def _add(self, kind: str, where: str, what: str) -> None:
        self.problems.append(Problem(kind, where, what))

    def _json(self, key: str, text: str) -> Any:
        try:
            return orjson.loads(text)
        except ValueError:
            self._add("damaged", key, "it cannot be read")
            return None

    def _run(self, key: str, text: str) -> None:
        document = self._json(key, text)
        needed = {"id", "workflow", "status", "created_at", "input", "epoch"}
        if not isinstance(document, dict) or not needed <= set(document):
            if document is not None:
                self._add("damaged", key, "it is no document of a run")
            return
        self.runs[key.removeprefix("r/")] = document
        if not self.table.has(rundocs.index_key(document)):
            self._add("missing", rundocs.index_key(document), f"run {document['id']} is not in its index")

    def _index(self, key: str, text: str) -> None:
        document = self.runs.get(in_key(text))
        if document is None:
            self._add("missing", f"r/{in_key(text)}", f"the run that {key} lists is not there")
        elif rundocs.index_key(document) != key:
            self._add("damaged", key, f"it lists run {text} under another status than {document['status']}")

    def _step(self, key: str, text: str) -> None:
        base, _, mark = key.partition("!")
        slot, _, version = base.rpartition(".")
        if slot != self.slot:
            self._end_of_slot()
            self.slot, self.versions = slot, set()
        if mark:
            if not self.table.has(base):
                self._add("missing", base, f"the record that {key} marks is not there")
            return
        if version.isdigit():
            self.versions.add(int(version))
        run = key.split("/")[1]
        if run not in self.runs and run != "scratch":
            self._add("leftover", key, f"there is no run {run}")
        self._record(key, text)

    def _end_of_slot(self) -> None:
        if self.versions and (gaps := set(range(max(self.versions))) - self.versions):
            self._add("missing", f"{self.slot}.{min(gaps)}", "an earlier version of a step's record is not there")

    def _record(self, key: str, text: str) -> None:
        try:
            row = Row(key, text)
            head, output = row.head, orjson.loads(row.output)
            if row.given:
                orjson.loads(row.given)
            name, code = head["name"], head["code"]
        except (ValueError, KeyError, TypeError):
            self._add("damaged", key, "a step's record that cannot be read")
            return
        if code and f"c/{code}" not in self.codes:
            self._add("missing", f"c/{code}", f"the code of step {name!r} is not there")
            self.codes.add(f"c/{code}")
        if (named := head.get("named")) and head["status"] == "completed" and not self.table.has(named):
            self._add("missing", named, f"the result of step {name!r} under its key is not there")
        if head["kind"] == "ai" and isinstance(output, list):
            for vector in output:
                if isinstance(vector, str) and vector.startswith("e/") and not self.table.has(vector):
                    self._add("missing", vector, f"a vector of step {name!r} is not there")
