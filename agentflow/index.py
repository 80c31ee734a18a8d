"""The step records of one run, found by what a step was given and never by position.

A record's key is ``s/<run>/<ns><given>/<branch><predecessor>-<ordinal>.<n>``:

- *ns*: scope and name; *given*: digest of what the function was given; both together are the ``ident``;
- *branch*, *predecessor*, *ordinal*: the ``place``, which only tells exact repeats of one ident apart;
- *n*: the version: later versions stand beside earlier ones, nothing is overwritten.

``<key>!void`` marks a version as undone by its compensation, ``<key>!drop`` as dropped by ``rerun=``,
``<key>!open`` as to be gone through again because a step inside it was dropped.
A ``Slot`` is one (ident, place) with its versions; a program that asks for a step *claims* a slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from agentflow.digests import blake2b
from agentflow.errors import JournalIncomplete
from agentflow.journal import Add, Journal

NS, GIVEN, BRANCH, PRED = 10, 20, 6, 10


def short(text: str, length: int) -> str:
    """The first characters of a digest that is safe in keys."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()[:length]


_UNSAFE = re.compile(r"[^A-Za-z0-9 :@+,=~._-]")


def in_key(text: str) -> str:
    """Text as one component of a key: what could end it is written as hex."""
    return _UNSAFE.sub(lambda m: "".join(f"%{byte:02X}" for byte in m[0].encode("utf-8", "surrogatepass")), text)


class Row:
    """One stored record: a small head, the output's JSON text, what was given."""

    __slots__ = ("_head", "key", "text", "undone")

    def __init__(self, key: str, text: str) -> None:
        self.key = key
        self.text = text
        self.undone = False
        self._head: dict[str, Any] | None = None

    @property
    def head(self) -> dict[str, Any]:
        head = self._head
        if head is None:
            head = self._head = orjson.loads(self.text[: self.text.index("\n")])
        return head

    @property
    def output(self) -> str:
        text = self.text
        start = text.index("\n") + 1
        return text[start : text.index("\n", start)]

    @property
    def given(self) -> str:
        return self.text[self.text.index("\n", self.text.index("\n") + 1) + 1 :]

    @staticmethod
    def compose(head: dict[str, Any], output: str, given: str) -> str:
        return f"{orjson.dumps(head).decode()}\n{output}\n{given}"


class Slot:
    """One place of one ident. ``n`` is the newest version; -1 while there is none.

    ``occ``: the id of a call that was started here and left no record, and with it what is recorded inside; else "".
    """

    __slots__ = ("claimed", "gone", "ident", "n", "occ", "place", "rowid")

    def __init__(self, ident: str, place: str, occ: str = "") -> None:
        self.ident = ident
        self.place = place
        self.occ = occ
        self.n = -1
        self.rowid = 0
        self.claimed: bool | str = False
        self.gone: dict[int, str] | None = None

    @property
    def id(self) -> str:
        return f"{self.ident}/{self.place}"

    @property
    def branch(self) -> str:
        return self.place[:BRANCH]

    def voids(self) -> int:
        """How many versions a compensation has undone."""
        return 0 if self.gone is None else sum(1 for why in self.gone.values() if why == "void")


class Records:
    """All slots of a run. Keys are held in memory, rows are read in windows and let go."""

    WINDOW = 200

    def __init__(self, journal: Journal, run_id: str) -> None:
        self.journal = journal
        self.run_id = run_id
        self.prefix = f"s/{in_key(run_id)}/"
        self._by_ident: dict[str, Slot | dict[str, Slot]] = {}
        self._by_ns: dict[str, list[Slot]] = {}
        self._free: dict[str, int] = {}
        self._lent: set[str] = set()
        self._window: dict[str, str] = {}
        self._used = self._reads = 0

    def load(self, under: str = "") -> None:
        """Read the keys below ``under`` (an ns, or an ident); all of the run by default."""
        begin = len(self.prefix)
        for key, rowid in self.journal.keys(self.prefix + under):
            ident, _, rest = key[begin:].partition("/")
            place, _, version = rest.rpartition(".")
            slot = self.at(ident, place)
            if slot is None:
                slot = self.add(Slot(ident, place))
            if "!" not in version:
                slot.n = max(slot.n, int(version))
                slot.rowid = rowid
            else:
                version, _, gone = version.partition("!")
                if slot.gone is None:
                    slot.gone = {}
                slot.gone[int(version)] = gone

    def add(self, slot: Slot) -> Slot:
        ident = slot.ident
        known = self._by_ident.get(ident)
        if known is None:
            self._by_ident[ident] = slot
        elif isinstance(known, dict):
            known[slot.place] = slot
        else:
            self._by_ident[ident] = {known.place: known, slot.place: slot}
        ns = ident[:NS]
        named = self._by_ns.get(ns)
        if named is None:
            self._by_ns[ns], self._free[ns] = [slot], 1
        else:
            named.append(slot)
            self._free[ns] += 1
        return slot

    def claim(self, slot: Slot, how: bool | str = True) -> None:
        """The slot belongs to a call of this execution; "lent" if the call only resembles it."""
        if not slot.claimed:
            self._free[slot.ident[:NS]] -= 1
            slot.claimed = how
            if how == "lent":
                self._lent.add(slot.ident)

    def lent(self, ident: str) -> bool:
        """Whether a record of this very ident was handed to a call that only resembles it."""
        return ident in self._lent and any(slot.claimed == "lent" for slot in self.slots(ident))

    def release(self, slot: Slot) -> None:
        """Nobody's again: the attempt in which it was claimed has failed."""
        if slot.claimed:
            self._free[slot.ident[:NS]] += 1
            slot.claimed = False

    def release_all(self) -> None:
        """Nobody has claimed anything: another cell may ask for the same."""
        for slot in self:
            if slot.claimed:
                slot.claimed = False
                self._free[slot.ident[:NS]] += 1

    def free(self, ns: str) -> int:
        """How many slots of one name in one scope nobody has claimed."""
        return self._free.get(ns, 0)

    def slots(self, ident: str) -> list[Slot]:
        """All places of an ident, oldest record first, then those that were only started."""
        known = self._by_ident.get(ident)
        if known is None:
            return []
        return sorted(known.values(), key=lambda slot: (slot.n < 0, slot.rowid)) if isinstance(known, dict) else [known]

    def at(self, ident: str, place: str) -> Slot | None:
        known = self._by_ident.get(ident)
        if known is None:
            return None
        if isinstance(known, dict):
            return known.get(place)
        return known if known.place == place else None

    def places(self, ident: str) -> Slot | dict[str, Slot] | None:
        """The slot of an ident; where more than one place has it, the slots by place."""
        return self._by_ident.get(ident)

    def named(self, ns: str) -> list[Slot]:
        """All slots of one name in one scope."""
        return self._by_ns.get(ns, [])

    def __iter__(self) -> Iterator[Slot]:
        for slots in self._by_ns.values():
            yield from slots

    def key(self, slot: Slot, n: int) -> str:
        return f"{self.prefix}{slot.ident}/{slot.place}.{n}"

    def row(self, slot: Slot, n: int) -> Row:
        """One version of a slot."""
        key = self.key(slot, n)
        text = self._window.pop(key, None)
        if text is None:
            text = self._read(key, slot.rowid if n == slot.n else 0)
        else:
            self._used += 1
        return Row(key, text)

    def _read(self, key: str, rowid: int) -> str:
        # Rows are mostly asked for in the order in which they were written: one query then serves a
        # whole window. Where that does not pay, single reads are cheaper.
        self._reads += 1
        if rowid and self._used * 4 >= self._reads:
            self._window = {
                k: v for _, k, v in self.journal.rows(self.prefix, from_rowid=rowid, limit=self.WINDOW) if "!" not in k
            }
            text = self._window.pop(key, None)
            if text is not None:
                return text
        text = self.journal.get(key)
        if text is None:
            raise JournalIncomplete(
                f"{self.journal.path}: record {key} of run {self.run_id} cannot be read: something else stands in its "
                "place. Running on could pay again for what it held. Restore the journal from a copy, or begin a new "
                "run with fresh=True."
            )
        self._used += 1
        return text

    def record(self, slot: Slot, text: str) -> Add:
        """The operation that adds the next version of a slot."""
        return Add(f"{self.prefix}{slot.ident}/{slot.place}.{slot.n + 1}", text)
