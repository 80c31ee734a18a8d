"""One execution of a run: where its calls stand, what it replayed, ran, paid and saved.

Facts and bookkeeping only. What follows from them for a step is decided in ``engine.py``; how it is
carried out, with asyncio or without, in ``drive.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import orjson

from agentflow import codec, costs
from agentflow.budgets import RunBudget
from agentflow.calls import Call, Current, Here, current_task, here
from agentflow.errors import LeaseLost, RunCancelled, StepFailed, WorkflowTimeout
from agentflow.index import BRANCH, GIVEN, NS, PRED, Records, Row, Slot, in_key, short
from agentflow.journal import Add, Drop, Fence, Journal, Op
from agentflow.lease import holder, is_me, lease_seconds
from agentflow.records import PlanStep, moment
from agentflow.settings import log, now

_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?4[0-9a-f]{3}-?[89ab][0-9a-f]{3}-?[0-9a-f]{12}", re.IGNORECASE)
PROCESS_START = time.time()


def _plain(found: str) -> str:
    return found.replace("-", "").lower()


@dataclass(slots=True)
class Attempts:
    """What is known of a step that has no record yet."""

    failed: int = 0
    sample: int = 0
    since: float | None = None
    started: bool = False
    doubts: int = 0
    paid: bool = False


@dataclass(slots=True)
class Totals:
    """Counts of one execution; money in dollars."""

    replayed: int = 0
    ran: int = 0
    failed: int = 0
    paid: Decimal = Decimal(0)
    saved: Decimal = Decimal(0)
    unpriced: int = 0
    doubts: int = 0


@dataclass(eq=False, repr=False)
class Execution:
    """The state of one run while this process executes it."""

    journal: Journal
    run_id: str
    workflow: str
    driver: Callable[[Call], Any]
    on_change: str = "auto"
    scratch: bool = False
    plan: bool = False
    fence: Fence | None = None
    lease: Any = None
    asked: int = 0
    number: int = 1
    retried: list[int] = field(default_factory=list)
    undoing: bool = False
    prior: str | None = None
    budget: RunBudget | None = None
    around: Execution | None = None
    same_code: bool = False
    input_text: str = ""
    stay: bool = False
    suspended: bool = False
    halted: bool = False
    closed: bool = False
    stopping: bool = False
    deadline: float | None = None
    timed_out: bool = False
    cancelling: bool = False
    cancelled: bool = False
    ask: Any = None
    terminal: Any = None
    session: float = field(default_factory=time.time)
    totals: Totals = field(default_factory=Totals)
    saved_by: dict[tuple[str, str], Decimal] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    plan_steps: list[PlanStep] = field(default_factory=list)
    compensations: list[tuple[Call, Slot | None, Any]] = field(default_factory=list)
    collecting: bool = False
    left_branches: list[tuple[str, str]] = field(default_factory=list)
    abandoned: set[Any] = field(default_factory=set)
    records: Records = field(init=False)
    key: str = field(init=False)
    marks: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    tasks: dict[Any, str] = field(default_factory=dict)
    around_tasks: dict[Any, Current] = field(default_factory=dict)  # the attempt that has started each task
    parked: dict[Any, Any] = field(default_factory=dict)
    stragglers: set[Any] = field(default_factory=set)
    paying: dict[Any, Call] = field(default_factory=dict)
    threads: int = 0
    going: int = 1
    turn: threading.Condition = field(default_factory=threading.Condition)
    held_up: dict[Any, Any] = field(default_factory=dict)
    seen: dict[str, list[Slot]] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    not_awaited: list[str] = field(default_factory=list)
    undo_failed: bool = False
    waits: list[Any] = field(default_factory=list)
    asked_tasks: set[str] = field(default_factory=set)
    results: dict[str, str] = field(default_factory=dict)
    results_used: set[str] = field(default_factory=set)
    unstarted: list[str] = field(default_factory=list)
    batches: Any = None
    counted: dict[str, Any] = field(default_factory=dict)  # replies: the attempt their cost is counted for
    loop: Any = None
    watcher: Any = None
    watch: Any = None
    _ns: dict[tuple[str, str], str] = field(default_factory=dict)
    _asks: dict[str, int] = field(default_factory=dict)
    _orders: Any = field(default_factory=itertools.count)
    _codes: set[str] = field(default_factory=set)
    _ids: dict[str, set[str]] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)
    _shown: set[Slot] = field(default_factory=set)
    _missed: dict[str, str] = field(default_factory=dict)
    _uuids: dict[str, list[int]] | None = None
    _starts: list[tuple[str, list[int]]] | None = None
    _late: dict[str, tuple[str, Any]] = field(default_factory=dict)
    _live_branches: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    _patient: Counter[str] = field(default_factory=Counter)
    _waited_for: set[str] = field(default_factory=set)
    _labels: dict[tuple[str, str, str], int] = field(default_factory=dict)
    naming: str | None = None
    _cell: Any = None
    _held: float = field(default_factory=time.time)
    _prompts: dict[int, dict[str, str]] = field(default_factory=dict)
    root: Here = field(init=False)

    def __post_init__(self) -> None:
        self.key = in_key(self.run_id)
        self.records = Records(self.journal, self.run_id)
        self.root = Here(self, "", "0", "", "", None, None)
        if self.scratch:
            self.session = PROCESS_START

    def within(self) -> list[Execution]:
        """The runs in whose bodies or steps this one was started, the nearest first."""
        found, at = [], self.around
        while at is not None:
            found.append(at)
            at = at.around
        return found

    def budgets(self) -> list[RunBudget]:
        """The budgets that a call of this run has to fit into."""
        return [ex.budget for ex in (self, *self.within()) if ex.budget is not None]

    # -- where a call stands ---------------------------------------------------------------

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
        ident = self.records.same(ident)
        repeat = place.repeats.get(ident, 0)
        place.repeats[ident] = repeat + 1
        if not place.key:
            place.key = short(place.branch, BRANCH)
        call.place = f"{place.key}{short(place.pred, PRED)}-{repeat:x}"
        slot = self.records.at(ident, call.place)
        if slot is not None and not slot.claimed and call.code is not None and self.records.repeated(ident):
            # Code goes before place within a branch. Between branches it does not: code that differs may be no more
            # than a counter, and the others ask for their own.
            branch = slot.branch
            others = (s for s in self.records.slots(ident) if not s.claimed and s.branch == branch and s is not slot)
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
            if slot.n >= 0:  # one without a record may still be running
                self.records.release(slot)
        for counts, key in failed.asked:
            counts.pop(key, None)

    def own_slot(self, call: Call) -> Slot:
        """The slot to which this call's next version is added; fixes the call's id with it."""
        slot = call.slot
        if slot is None:
            place = call.place
            suffix = 0
            while self.records.at(call.ident, place) is not None:
                suffix += 1
                place = f"{call.place}x{suffix:x}"
            if suffix or self.records.slots(call.ident):
                self._name_apart(call)
            slot = call.slot = self.records.add(Slot(call.ident, place))
            self.take(call, slot)
        elif slot.n >= 0 and not self.scratch:
            # What was recorded and paid for inside the version before is found under its id, wherever it stood.
            call.occ = self.records.row(slot, slot.n).head["occ"]
        elif slot.occ:
            call.occ = slot.occ
        return slot

    def _name_apart(self, call: Call) -> None:
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

    # -- failures --------------------------------------------------------------------------

    def again(self, call: Call, head: dict[str, Any]) -> str | None:
        """Why a recorded failure is tried again; None replays it."""
        limit = head["error"]["data"].get("max_turns") if call.max_turns else None
        if isinstance(limit, int) and limit < call.max_turns:
            return f"max_turns was {limit}"
        if self.scratch and call.kind != "tool":  # what failed in a tool was told to the model, which went on with it
            return "it failed last time"
        outer = call.here.outer
        if outer is not None and head.get("around", outer.around) != outer.around:
            return f"{outer.name} is tried again"
        if call.kind == "compensation":
            return "it failed last time"
        if not self._failed_with(head):
            return None
        if self._handled(head):
            self.say_once(
                f"{call.name}: its failure was handled by your code and is replayed; to try it again: "
                f"rerun=[{call.name!r}]"
            )
            return None
        return "it failed last time"

    def tried_again(self, failure: dict[str, Any]) -> bool:
        """Whether what failed (it has ``s1`` and ``branch``, as a record's head) is tried again, and not history."""
        return self._failed_with(failure) > 0 and not self._handled(failure)

    def retries(self, slot: Slot, n: int) -> bool:
        """Whether a late result may stand in for the failure recorded before it."""
        if self.scratch or n == 0:
            return True
        head = self.records.row(slot, n - 1).head
        return head["status"] != "failed" or self.tried_again(head)

    def _failed_with(self, head: dict[str, Any]) -> int:
        """The first execution after this failure that failed and is run again, or 0: so long, code may handle it."""
        return min((number for number in self.retried if number >= head["s1"][0]), default=0)

    def _handled(self, head: dict[str, Any]) -> bool:
        """Whether a step of the same or an enclosing branch was started after the failure, before the run failed."""
        if self._starts is None:
            rows = (Row(key, text).head for key, text in self.journal.scan(self.records.prefix) if "!" not in key)
            self._starts = [(row["branch"], row["s0"]) for row in rows if not row.get("late")]
            children = (orjson.loads(text) for _, text in self.journal.scan(f"cs/{self.key}/"))
            self._starts += [(child["branch"], child["s0"]) for child in children]
        branch, end, last = head["branch"], head["s1"], self._failed_with(head)
        return any(
            end < start < [last + 1] and (branch == other or branch.startswith((f"{other}/", f"{other}>")))
            for other, start in self._starts
        )

    def failure(self, call: Call, head: dict[str, Any], *, replayed: bool) -> BaseException:
        """The exception a caller gets: of the original type, and a ``StepFailed``."""
        if not replayed and not call.here.scope:
            self.totals.failed += 1
        data = head["error"]
        self._note(call)
        return codec.rebuild_exception(
            data,
            StepFailed,
            {
                "step": call.name,
                "run_id": self.run_id,
                "attempts": head["attempts"],
                "error_type": data["name"],
                "data": data.get("data", {}),
                "replayed": replayed,
            },
        )

    # -- results ---------------------------------------------------------------------------

    def deliver(self, call: Call, row: Row) -> Any:
        """Hand out a record: the value, or the failure again."""
        head = row.head
        self.enter(call)
        if not call.here.scope:
            self.totals.replayed += 1
        cost = head.get("cost")
        outer = call.here.outer
        split: dict[str, Decimal] = {}
        if cost is not None:
            split = {model: Decimal(part) for model, part in head.get("by_model", {}).items()}
            split = split or {costs.model_of(call.request): Decimal(cost)}
            self.saved(call.name if outer is None else costs.outermost(outer), split)
        # What another run did, or nobody, is not undone here.
        own = "from" not in head and "supplied" not in head
        undoes = head.get("undoes") and own
        compensates = call.options.compensate is not None and own
        if compensates or undoes:
            self._undoes(outer)
        if head.get("ai"):
            lent = not self.scratch and head["s0"][0] < self.number
            while outer is not None:
                outer.used_model = True
                outer.lent += lent
                outer.spent(split)
                outer = outer.parent
        if self.plan:
            self.plan_steps.append(PlanStep(call.name, "reused"))
        if head["status"] == "failed":
            raise self.failure(call, head, replayed=True)
        value = codec.decode(row.output)
        if call.finish is not None:
            value = call.finish(value)
        if undoes:
            self.compensations.append((call, None, head))
        if compensates and call.slot is not None:
            self.compensations.append((call, call.slot, value))
        return value

    def given_result(self, call: Call) -> str | None:
        """The result that somebody gave for a step, by its name or id, when the run was retried or forked."""
        for name in (call.name, call.occ):
            if name in self.results:
                self.results_used.add(name)
                return self.results[name]
        return None

    def finished(self, call: Call, slot: Slot, head: dict[str, Any], value: Any) -> Any:
        """After the record is durable: count it and hand out the value."""
        self.enter(call)
        self.live.add(slot.id)
        if not call.here.scope:
            self.totals.ran += 1
        if call.finish is not None:
            value = call.finish(value)
        if call.options.compensate is not None and "supplied" not in head:
            self._undoes(call.here.outer)
            self.compensations.append((call, slot, value))
        return value

    def _undoes(self, outer: Current | None) -> None:
        """The enclosing steps hold something to undo: replaying them alone would not show it."""
        while outer is not None:
            outer.undoes = True
            outer = outer.parent

    def enter(self, call: Call) -> None:
        slot = call.slot
        assert slot is not None
        at = here.get()
        if at is not None and at.ex is self and at.scope == call.here.scope and at.branch == call.here.branch:
            here.set(at.after(slot.id))
        known = self.seen.get(call.name)
        if known is None:
            self.seen[call.name] = [slot]
        else:
            known.append(slot)

    def _note(self, call: Call) -> None:
        if call.slot is not None:
            self.enter(call)

    def committed(self, slot: Slot) -> None:
        slot.n += 1
        self.records.claim(slot)

    def paid(self, current: Current, cost: Decimal | None, entry: costs.Entry) -> None:
        """Count one paid reply, with its row in the ledger, for the step and all that enclose it."""
        if cost is None:
            self.totals.unpriced += 1
        else:
            self.totals.paid += cost
        current.stands_on(entry)
        step: Current | None = current
        while step is not None:
            step.used_model = True
            if cost is None:
                step.unknown += 1
            else:
                step.spent({entry[1]["model"]: cost})
            step = step.parent

    def saved(self, step: str, split: dict[str, Decimal]) -> None:
        """Count what was not paid again for a step of the body, by model."""
        for model, amount in split.items():
            self.totals.saved += amount
            self.saved_by[step, model] = self.saved_by.get((step, model), Decimal(0)) + amount

    def saved_row(self) -> list[Op]:
        """The ledger's row of what was saved since the last one."""
        what, self.saved_by = self.saved_by, {}
        return costs.saved(self.run_id, self.workflow, self.clock(), what)

    # -- attempts --------------------------------------------------------------------------

    def attempts_of(self, call: Call, slot: Slot) -> Attempts:
        state = Attempts()
        if slot.n >= 0:
            head = self.records.row(slot, slot.n).head
            old = call.options.max_age is not None and self.clock() - head["t1"] > call.options.max_age
            state.sample = head["sample"] + (1 if old or (slot.gone and slot.gone.get(slot.n, "open") != "open") else 0)
        if self.prior is None and not self.scratch:
            return state
        for _, text in self.journal.scan(f"a/{self.key}/{call.occ}.{slot.n + 1}/"):
            facts = orjson.loads(text)
            state.failed = facts["attempt"] - (1 if facts["free"] else 0)
            state.sample = facts["sample"]
            state.since = state.since or facts["t0"]
            state.doubts += facts.get("doubt", 0)
        *place, times = self.marks.get(call.occ, (0, 0, 0))
        state.started = place == [slot.n + 1, state.failed + 1]
        if call.options.in_doubt != "rerun":
            row = f"d/{self.key}/{call.occ}.{slot.n + 1}.{state.failed + 1}"
            state.started = self.journal.get(row) is not None
        state.doubts += max(times, 1) if state.started else 0
        if state.started and call.request is not None:
            # Replies, ids of calls in the background, places in batches.
            places = (f"{row}/{self.key}/{call.occ}/" for row in ("m", "i", "bm"))
            state.paid = any(True for place in places for _ in self.journal.keys(place, limit=1))
        return state

    def started(self, call: Call, slot: Slot, current: Current) -> None:
        """Mark that an attempt starts, and where the call stands: edited code may ask for it elsewhere."""
        if self.scratch:
            return
        line = {"o": call.occ, "v": slot.n + 1, "n": call.name, "i": slot.ident, "p": slot.place, "a": current.attempt}
        if call.wait is not None or call.kind == "agent":  # is never in doubt; what is inside has marks of its own
            line["v"] = -1
        self.journal.mark(self.run_id, orjson.dumps(line).decode())

    def unstart(self, call: Call, slot: Slot, current: Current) -> None:
        """The attempt was left because its run suspends: waiting inside it leaves nothing in doubt."""
        if self.scratch or call.wait is not None or call.kind == "agent":
            return
        self.journal.mark(self.run_id, orjson.dumps({"o": call.occ, "v": -1, "n": call.name}).decode())
        if call.options.in_doubt != "rerun":
            self.unstarted.append(f"d/{self.key}/{call.occ}.{slot.n + 1}.{current.attempt}")

    def only_waits(self, steps: list[Current]) -> list[Op]:
        """What takes back, durably, that these steps are in flight: someone is waited for inside them."""
        for step in steps:
            self.unstart(step.call, step.facts[0], step)
        ops: list[Op] = [Drop(key) for key in self.unstarted]
        self.unstarted.clear()
        return ops

    def goes_on(self, steps: list[Current]) -> list[Op]:
        """What says again that these steps are in flight."""
        for step in steps:
            self.started(step.call, step.facts[0], step)
        return [
            Add(f"d/{self.key}/{step.id}.{step.version}.{step.attempt}", step.name)
            for step in steps
            if step.call.options.in_doubt != "rerun"
        ]

    def load_marks(self) -> None:
        """What was started before: it may be in doubt, and what is recorded inside it is for whoever asks for it."""
        places: dict[str, dict[str, Any]] = {}
        for line in self.journal.marks(self.run_id):
            facts = orjson.loads(line)
            place = (facts["v"], facts.get("a", 0))
            *before, times = self.marks.get(facts["o"], (0, 0, 0))
            self.marks[facts["o"]] = (*place, times + 1 if tuple(before) == place else 1)
            if "p" in facts:
                places[facts["o"]] = facts
        for occ, facts in places.items():
            if self.records.at(facts["i"], facts["p"]) is None:
                self.records.add(Slot(facts["i"], facts["p"], occ))

    def settle_marks(self) -> None:
        """The run has ended, and nothing is in doubt. If it failed, what a cancelled step holds is not forgotten."""
        kept = {}
        for line in self.journal.marks(self.run_id):
            facts = orjson.loads(line)
            slot = self.records.at(facts["i"], facts["p"]) if "p" in facts else None
            if slot is not None and slot.n < 0:
                kept[facts["o"]] = {**facts, "v": -1}
        self.journal.clear_marks(self.run_id)
        for facts in kept.values():
            self.journal.mark(self.run_id, orjson.dumps(facts).decode())

    def doubt(self, call: Call) -> None:
        self.totals.doubts += 1
        what = "asked again" if call.request is not None else "run again"
        self.warn(f"{call.name}: in doubt: it was in flight when its process ended; {what}")

    def keep_for_retry(self, call: Call, text: str, value: Any) -> None:
        """A result that came while the step waits for its next attempt, which then is not needed."""
        self._late[call.occ] = (text, value)

    def late_result(self, call: Call) -> tuple[str, Any] | None:
        return self._late.pop(call.occ, None)

    def key_of(self, call: Call, undone: int) -> str:
        key = call.options.idempotency_key or f"{self.run_id}:{call.name}:{call.occ[:12]}"
        return f"{key}~{undone + 1}" if undone else key

    def hold(self) -> None:
        """Make sure, before a function is called, that the run still belongs to this process.

        The heartbeat says so in general; after a pause that outlasted it (a stopped process, a sleeping
        machine) the journal itself is asked.
        """
        lease = self.lease
        if lease is None:
            return
        now = time.time()
        if not lease.lost and now - self._held > lease_seconds() / 2:
            owner = holder(self.journal, lease.key)
            lease.lost = owner is None or owner.token != lease.token
            self._held = now
        if lease.lost:
            raise LeaseLost(f"run {self.run_id} was taken over by another process; nothing more is run here.")

    def own_fence(self) -> Fence | None:
        """The fence of this process, also when it has begun another execution of the run since."""
        if self.lease is None:
            return self.fence
        owner = holder(self.journal, self.lease.key)
        return Fence(self.lease.key, owner.token) if owner is not None and is_me(owner) else self.fence

    def next(self) -> list[int]:
        return [self.number, next(self._orders)]

    def new_code(self, digest: str) -> bool:
        if digest in self._codes:
            return False
        self._codes.add(digest)
        return True

    # -- facts about the moment --------------------------------------------------------------

    def clock(self) -> float:
        return now()

    def overdue(self) -> bool:
        """Whether the run's deadline has passed: from then on no step starts that is not recorded."""
        if not self.timed_out and not self.suspended:
            self.timed_out = self.cancelling or (self.deadline is not None and self.clock() >= self.deadline)
        return self.timed_out

    def too_late(self) -> WorkflowTimeout | RunCancelled:
        if self.cancelling:
            return RunCancelled(f"run {self.run_id} was cancelled.")
        when = moment(self.deadline)
        error = WorkflowTimeout(
            f"run {self.run_id} did not finish before its deadline, {when:%Y-%m-%d %H:%M:%S} UTC (the workflow's "
            "timeout, recorded when the run began). What was finished is kept; run again, it goes on with a new one."
        )
        error.run_id, error.deadline = self.run_id, when
        return error

    def model(self) -> str:
        from agentflow.providers import default_model

        return default_model() or ""

    def prompt_digest(self, path: str) -> str:
        from agentflow.prompts import file_digest

        return file_digest(path)

    def prompts_read(self, current: Current) -> dict[str, str]:
        return self._prompts.pop(id(current), {})

    def read_prompt(self, current: Current, path: str, digest: str) -> None:
        step: Current | None = current
        while step is not None:
            self._prompts.setdefault(id(step), {})[path] = digest
            step = step.parent

    def keep_prompts(self, read: dict[str, str]) -> list[Op]:
        """What keeps the texts of prompt files that a step had read, so that a plan can show what was edited."""
        from agentflow.prompts import digest, file_text

        ops: list[Op] = []
        for path, known in read.items():
            text = file_text(path) if self.new_code(f"prompt-{known}") else None
            if text is not None and digest(text) == known:
                ops.append(Add(f"c/prompt-{known}", orjson.dumps(text).decode()))
        return ops

    def prompt_text(self, known: str) -> str | None:
        """What a prompt file of this digest said; None where no step that had read it is recorded."""
        text = self.journal.get(f"c/prompt-{known}")
        return None if text is None else str(orjson.loads(text))

    def known(self, text: str, before: list[int] | None = None) -> bool:
        """Whether a uuid stands in the run's input or in a recorded output: then it is data.

        ``before``: only outputs recorded before that moment count; a payment that echoes the uuid it was
        given does not make it data.
        """
        if self._uuids is None:
            self._uuids = {_plain(u): [0, 0] for u in _UUID.findall(self.input_text)}
            for key, row in self.journal.scan(self.records.prefix):
                if "!" in key:
                    continue
                ended = Row(key, row).head["s1"]
                for found in map(_plain, _UUID.findall(Row(key, row).output)):
                    self._uuids[found] = min(self._uuids.get(found, ended), ended)
        ended = self._uuids.get(_plain(text))
        return ended is not None and (before is None or ended < before)

    # -- words -------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if not self.plan:
            log.info("%s · %s", self.run_id, text)

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.warnings.append(text)
            if not self.plan:
                log.warning("%s · %s", self.run_id, text)

    def missed(self, call: Call) -> None:
        """Remember what was asked for while a record of that name lay unused: the end says so."""
        self._missed[call.ident[:NS]] = call.given

    def unused(self) -> list[str]:
        """The ids of recorded steps of the body that a finished execution never asked for: of earlier code, say."""
        slots = (s for s in self.records if not s.claimed and s.ident.startswith("r") and self.newest(s) is not None)
        return [slot.id for slot in itertools.islice(slots, 10_000)]

    def unasked(self) -> list[str]:
        """Lines on recorded steps of the body that this execution never asked for."""
        lines = []
        for slot in self.records:
            if slot.claimed or not slot.ident.startswith("r") or self.newest(slot) is None:
                continue
            row = self.records.row(slot, slot.n)
            if row.head["kind"] in ("value", "compensation"):
                continue
            asked = self._missed.get(slot.ident[:NS])
            why = "the code does not ask for it any more"
            if asked is not None:
                from agentflow.compare import differences, unified

                shown = unified(differences(row.given, asked)) if row.given and asked else "other data"
                why = f"it was asked for with other data:\n{shown}"
            lines.append(f"{row.head['name']}: a recorded result was not used; {why}")
            if len(lines) == 20:
                break
        return lines

    def would_run(self, call: Call) -> None:
        """A line of the plan for a step that has no record to reuse."""
        from agentflow import plans

        old = call.slot if call.slot is not None and call.slot.n >= 0 else None
        if old is None:
            free = [slot for slot in self.unclaimed(call) if slot.n >= 0]
            old = next((slot for slot in free if slot not in self._shown), free[0] if free else None)
        if old is not None:
            self._shown.add(old)
        row = None if old is None else self.records.row(old, old.n)
        read = {} if row is None else plans.prompts_edited(row.head.get("prompts", {}), self.prompt_text)
        self.plan_steps.append(plans.would_run(call, row, read))

    def forgotten(self, name: str) -> None:
        if not self.suspended and not self.closed:
            self.not_awaited.append(name)
        elif not self.suspended:
            log.warning("step %r was never awaited. Write: await step(%r, ...)", name, name)
