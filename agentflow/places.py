"""Where the calls of a run stand: which branch, after what, in which step; and which records are theirs to take.

Facts only. Which record a call may use is decided in ``reuse.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from agentflow.calls import Call, Current, Here, current_task, here
from agentflow.index import BRANCH, GIVEN, NS, PRED, Records, Slot, short
from agentflow.journal import Journal


class Places:
    """The branches of one execution of a run, and what of its records they have claimed."""

    def __init__(
        self, journal: Journal, run_id: str, workflow: str, driver: Callable[[Call], Any], scratch: bool = False
    ) -> None:
        self.journal = journal
        self.run_id = run_id
        self.workflow = workflow
        self.driver = driver
        self.scratch = scratch
        self.asked = 0
        self.undoing = False
        self.records = Records(journal, run_id)
        self.root = Here(self, "", "0", "", "", None, None)  # type: ignore[arg-type]
        self.tasks: dict[Any, str] = {}
        self.naming: str | None = None
        self.left_branches: list[tuple[str, str]] = []
        self._ns: dict[tuple[str, str], str] = {}
        self._asks: dict[str, int] = {}
        self._ids: dict[str, set[str]] = {}
        self._given_back: set[Slot] = set()
        self.on_way: dict[Slot, Any] = {}  # model calls that were sent and whose caller was cancelled
        self._live_branches: dict[str, set[tuple[str, str]]] = {}
        self._patient: Counter[str] = Counter()
        self._waited_for: set[str] = set()
        self._labels: dict[tuple[str, str, str], int] = {}
        self._cell: Any = None

    def locate(self, call: Call, given: str, inside: str | None = None) -> None:
        """Fix ident and place of a call at the moment it is made, and claim an exact record.

        ``inside``: what names the scope of the steps inside the call; None: what it was given.
        """
        place, task = self.stand()
        call.here, call.task = place, task
        self.asked += 1
        ns = self._ns.get((place.scope, call.name))
        if ns is None:
            if len(self._ns) > 20_000:
                self._ns.clear()
            ns = ("n" if place.scope else "r") + short(f"{place.scope}\0{call.name}", NS - 1)
            self._ns[place.scope, call.name] = ns
        call.ident = ident = ns + given[:GIVEN]
        scope = ident if inside is None else ns + inside[:GIVEN]
        if self.scratch and not place.scope:
            call.place = f"{self._in_cell(scope):x}"
            call.counted = f"{scope}{call.place}"
            return
        known = self.records.places(ident)
        if isinstance(known, Slot):
            ident = known.ident  # one string for all who keep it, in runs of many steps
        if place.repeats is None:
            place.repeats, repeat = {ident: 1}, 0
        else:
            repeat = place.repeats.get(ident, 0)
            place.repeats[ident] = repeat + 1
        if not place.key:
            place.key = short(place.branch, BRANCH)
        at = call.place = f"{place.key}{short(place.pred, PRED)}-{repeat:x}"
        slot: Slot | None = None
        if isinstance(known, Slot):
            slot = known if known.place == at else None
        elif known is not None:
            slot = known.get(at)
            if slot is not None and not slot.claimed and call.code is not None:
                # Code goes before place within a branch. Between branches it does not: code that differs may be no
                # more than a counter, and the others ask for their own.
                of_ident, branch, first = self.records.slots(ident), slot.branch, slot
                others = (s for s in of_ident if not s.claimed and s.branch == branch and s is not first)
                slot = self._own_code(call, itertools.chain([slot], others))
        if slot is not None and not slot.claimed:
            self.take(call, slot)
            call.slot = slot
            ident = slot.ident
        scope = ident if inside is None else scope
        counted = scope if place.branch == "0" else f"{place.branch}{scope}"
        count = self._asks.get(counted, 0)
        self._asks[counted] = count + 1
        call.counted = f"{counted}#{count}"
        if place.outer is not None:
            self._asked(place.outer, self._asks, counted)

    def stand(self) -> tuple[Here, Any]:
        """Where the running code stands, and its task; a task that asks for the first time becomes a branch."""
        place = here.get()
        if place is None or place.ex is not self:
            place = self.root
        task = current_task()
        if task is not None and task is not place.task:
            place = self._arrive(place, task)
        return place, task

    def _own_code(self, call: Call, slots: Iterable[Slot]) -> Slot | None:
        """Among exact repeats that this call could take, the first one recorded with this very code, else the first."""
        found = list(itertools.islice(slots, 100))
        if call.code is None or len(found) < 2:
            return found[0] if found else None

        def same(slot: Slot) -> bool:
            return slot.n >= 0 and self.records.row(slot, slot.n).head["code"] == call.code.digest

        return next((slot for slot in found if same(slot)), found[0])

    def _in_cell(self, ident: str) -> int:
        """How often this ident was asked for in the running notebook cell, or in this process."""
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        cell = getattr(shell, "execution_count", None)
        if cell != self._cell:
            self._cell = cell
            self._asks.clear()
            self.records.release_all()
        count = self._asks.get(ident, 0)
        self._asks[ident] = count + 1
        return count

    def _arrive(self, place: Here, task: Any) -> Here:
        """The first call in a task: from here on it is a branch of its own, named by what it was given."""
        if place.task is None and place is self.root and task not in self.tasks:
            place.task = task
            return place
        label = self.tasks.get(task)
        if label is None:
            label = self.label("task", place)
        arrived = place.branching(label, task)
        self.expect_branches(place, [label])
        if task not in self.tasks:
            task.add_done_callback(lambda _: self.branches_ended(place, [label]))
        here.set(arrived)
        return arrived

    def label(self, text: str, place: Here) -> str:
        """A branch name, numbered among equal ones of the branch it leaves."""
        within = (place.scope, place.branch, text)
        count = self._labels.get(within, 0)
        self._labels[within] = count + 1
        if place.outer is not None:
            self._asked(place.outer, self._labels, within)
        return f"{text}#{count:x}"

    def expect_branches(self, place: Here, labels: list[str]) -> None:
        """Branches that will come: their records are theirs even before they ask."""
        for label in labels:
            branch = f"{place.branch}/{label}"
            self._live_branches.setdefault(short(branch, BRANCH), set()).add((place.scope, branch))

    def branches_ended(self, place: Here, labels: list[str]) -> None:
        """Branches that ask for nothing any more: what is left of their records may be used elsewhere."""
        for label in labels:
            branch = f"{place.branch}/{label}"
            name = short(branch, BRANCH)
            alive = self._live_branches.get(name)
            if alive is not None:
                alive.discard((place.scope, branch))
                if not alive:
                    del self._live_branches[name]

    def is_left(self, place: Here) -> bool:
        """Whether a sibling's failure has ended the branch that stands here (plain code, which nothing can cancel)."""
        at: Here | None = place
        while at is not None:
            branch = f"{at.branch}/"
            if any(at.scope == scope and branch.startswith(f"{left}/") for scope, left in self.left_branches):
                return True
            at = at.outer.call.here if at.outer is not None else None
        return False

    def branch_of(self, call: Call) -> str:
        """The branch in which the call executes, enclosing steps included."""
        path = f"{call.here.scope}:{call.here.branch}"
        task = current_task()
        if task is not None and call.task is not None and task is not call.task:
            path += f"/={call.occ}"
        outer = call.here.outer
        return f"{self.branch_path(outer)}>{path}" if outer else path

    def branch_path(self, current: Current) -> str:
        return f"{self.branch_of(current.call)}>@{current.id}"

    def in_branch(self, call: Call) -> Slot | None:
        """An unclaimed record of the same ident in the same branch: steps were inserted, moved or removed."""
        if self.records.places(call.ident) is None:
            return None
        branch = short(call.here.branch, BRANCH)
        return self._own_code(call, (s for s in self.records.slots(call.ident) if not s.claimed and s.branch == branch))

    def elsewhere(self, call: Call) -> Slot | None:
        """One from a branch that is not there any more; a branch that is there asks for its own.

        One that waits for a sibling's record itself may lack its own because the two were exchanged.
        """
        live, patient = self._live_branches, self._patient
        found = (s for s in self.records.slots(call.ident) if not s.claimed)
        return self._own_code(call, (s for s in found if s.branch not in live or s.branch in patient))

    def kept_by_sibling(self, call: Call) -> bool:
        """Whether a sibling that is still there has a record of this ident that it has not asked for yet.

        Once it was waited for in vain, as by a poll in a loop, the answer is no.
        """
        if call.ident in self._waited_for:
            return False
        live, patient = self._live_branches, self._patient
        kept = (s.branch for s in self.records.slots(call.ident) if s.n >= 0 and not s.claimed)
        return any(branch in live and branch not in patient for branch in kept)

    @contextlib.contextmanager
    def patience(self, call: Call) -> Iterator[None]:
        """While a call waits for what a sibling may leave to it, or stands where its plan ends."""
        name = short(call.here.branch, BRANCH)
        self._patient[name] += 1
        try:
            yield
            if self.kept_by_sibling(call):
                self._waited_for.add(call.ident)
        finally:
            self._patient[name] -= 1
            if not self._patient[name]:
                del self._patient[name]

    def others(self, call: Call) -> bool:
        return self.records.free(call.ident[:NS]) > 0

    def unclaimed(self, call: Call) -> list[Slot]:
        return [slot for slot in self.records.named(call.ident[:NS]) if not slot.claimed]

    def near(self, call: Call) -> list[Slot]:
        """Unclaimed records of that name, but for those of other branches that are there."""
        others = self.siblings(call)
        return [slot for slot in self.unclaimed(call) if slot.branch not in others]

    def siblings(self, call: Call) -> set[str]:
        """The branches that are there, but for the call's own."""
        return self._live_branches.keys() - {short(call.here.branch, BRANCH)}

    def take(self, call: Call, slot: Slot, how: bool | str = True) -> None:
        """Claim a slot for a call, and with it for the attempts of the steps around it."""
        self.records.claim(slot, how)
        step = call.here.outer
        while step is not None:
            step.taken.append(slot)
            step = step.parent

    def _asked(self, step: Current | None, counts: dict[Any, int], key: Any) -> None:
        while step is not None:
            step.asked.append((counts, key))
            step = step.parent

    def give_back(self, failed: Current) -> None:
        """A new attempt asks for the steps inside it again: what they recorded is theirs, under the same names."""
        for slot in failed.taken:
            # One without a record may still be running, and is waited for. A model call on its way is that where it is
            # made; and what an attempt out of time has left running is not waited for, but records beside the next.
            self._given_back.add(slot)
            if slot.n >= 0 or failed.over or slot in self.on_way:
                self.came_back(slot)
        for counts, key in failed.asked:
            counts.pop(key, None)

    def came_back(self, slot: Slot) -> None:
        """What a failed attempt had left running has a record now: the next attempt may ask for it. In any thread."""
        with contextlib.suppress(KeyError):
            self._given_back.remove(slot)  # by one alone
            self.records.release(slot)

    def own_slot(self, call: Call) -> Slot:
        """The slot to which this call's next version is added; fixes the call's id with it."""
        slot = call.slot
        if slot is None:
            place = call.place
            if self.records.places(call.ident) is not None:
                suffix = 0
                while self.records.at(call.ident, place) is not None:
                    suffix += 1
                    place = f"{call.place}x{suffix:x}"
                self.name_apart(call)
            slot = call.slot = self.records.add(Slot(call.ident, place))
            self.take(call, slot)
        elif slot.n >= 0 and not self.scratch:
            # What was recorded and paid for inside the version before is found under its id, wherever it stood.
            call.occ = self.records.row(slot, slot.n).head["occ"]
        elif slot.occ:
            call.occ = slot.occ
        return slot

    def name_apart(self, call: Call) -> None:
        """Give a call that runs another id than the records of equal calls have.

        One of them may have been taken by a call that stands elsewhere now, and with it what belongs to its id.
        """
        taken = self._ids.get(call.ident)
        if taken is None:
            slots = self.records.slots(call.ident)
            taken = {self.records.row(slot, slot.n).head["occ"] for slot in slots if slot.n >= 0}
            taken |= {slot.occ for slot in slots if slot.n < 0}
            self._ids[call.ident] = taken
        counted, number = call.counted, 0
        while call.occ in taken:
            number += 1
            call.counted, call.occ = f"{counted}~{number}", ""

    def counts(self, slot: Slot, n: int) -> bool:
        """Whether a version is neither dropped nor undone; while undoing goes on, an undone one still counts."""
        gone = slot.gone.get(n) if slot.gone is not None else None
        return gone is None or (self.undoing and gone == "void")

    def newest(self, slot: Slot) -> int | None:
        """The newest version of a slot, or None if there is none, or it is dropped or undone."""
        return slot.n if slot.n >= 0 and self.counts(slot, slot.n) else None
