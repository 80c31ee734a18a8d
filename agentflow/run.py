"""One execution of a run: what it replayed, ran, paid and saved; where its calls stand is in ``places.py``.

Facts and bookkeeping only. What follows from them for a step is decided in ``engine.py``; how it is
carried out, with asyncio or without, in ``drive.py``.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson

from agentflow import codec, costs
from agentflow.calls import Call, Current, here
from agentflow.errors import LeaseLost, RunCancelled, StepFailed, WorkflowTimeout
from agentflow.index import NS, Row, Slot, in_key
from agentflow.journal import Add, Drop, Fence, Journal, Op
from agentflow.lease import holder, is_me
from agentflow.observing import Observer, tell
from agentflow.places import Places
from agentflow.settings import log, now
from agentflow.words import moment

if TYPE_CHECKING:
    from agentflow.budgets import RunBudget
    from agentflow.records import PlanStep

_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?4[0-9a-f]{3}-?[89ab][0-9a-f]{3}-?[0-9a-f]{12}", re.IGNORECASE)
PROCESS_START = time.time()


def _plain(found: str) -> str:
    return found.replace("-", "").lower()


class Attempts:
    """What is known of a step that has no record yet."""

    __slots__ = ("doubts", "failed", "paid", "sample", "since", "started")

    def __init__(self) -> None:
        self.failed = 0
        self.sample = 0
        self.since: float | None = None
        self.started = False
        self.doubts = 0
        self.paid = False


class Totals:
    """Counts of one execution; money in dollars."""

    __slots__ = ("doubts", "failed", "paid", "ran", "replayed", "saved", "unpriced")

    def __init__(self) -> None:
        self.replayed = 0
        self.ran = 0
        self.failed = 0
        self.paid = Decimal(0)
        self.saved = Decimal(0)
        self.unpriced = 0
        self.doubts = 0


class Execution(Places):
    """The state of one run while this process executes it."""

    def __init__(
        self,
        journal: Journal,
        run_id: str,
        workflow: str,
        driver: Callable[[Call], Any],
        *,
        on_change: str = "auto",
        scratch: bool = False,
    ) -> None:
        super().__init__(journal, run_id, workflow, driver, scratch)
        self.on_change = on_change
        self.plan = False
        self.fence: Fence | None = None
        self.lease: Any = None
        self.number = 1
        self.retried: list[int] = []
        self.prior: str | None = None
        self.budget: RunBudget | None = None
        self.around: Execution | None = None
        self.same_code = False
        self.input_text = ""
        self.stay = False
        self.suspended = False
        self.halted = False
        self.closed = False
        self.stopping = False
        self.deadline: float | None = None
        self.timed_out = False
        self.cancelling = False
        self.cancelled = False
        self.ask: Any = None
        self.terminal: Any = None
        self.session = PROCESS_START if scratch else time.time()
        self.totals = Totals()
        self.saved_by: dict[tuple[str, str], Decimal] = {}
        self.warnings: list[str] = []
        self.plan_steps: list[PlanStep] = []
        self.compensations: list[tuple[Call, Slot | None, Any]] = []
        self.collecting = False
        self.abandoned: set[Any] = set()
        self.key = in_key(run_id)
        self.marks: dict[str, tuple[int, int, int]] = {}
        self.around_tasks: dict[Any, Current] = {}  # the attempt that has started each task
        self.parked: dict[Any, Any] = {}
        self.stragglers: set[Any] = set()
        self.paying: dict[Any, Call] = {}
        self.brief: set[str] = set()  # steps whose sync function took no time to speak of, the last time
        self.going = 1
        self.turn = threading.Condition()
        self.held_up: dict[Any, Any] = {}
        self.seen: dict[str, list[Slot]] = {}
        self.live: set[str] = set()
        self.pending: set[str] = set()
        self.not_awaited: list[str] = []
        self.undo_failed = False
        self.waits: list[Any] = []
        self.asked_tasks: set[str] = set()
        self.results: dict[str, str] = {}
        self.results_used: set[str] = set()
        self.unstarted: list[str] = []
        self.batches: Any = None
        self.entered: set[str] = set()  # the ledger's rows of the replies that this execution has paid for
        self.counted: dict[str, Any] = {}  # replies: the attempt their cost is counted for
        self.loop: Any = None
        self.watcher: Any = None
        self.watch: Any = None
        self.observers: tuple[Observer, ...] = ()
        self._orders = itertools.count()
        self._codes: set[str] = set()
        self._said: set[str] = set()
        self._shown: set[Slot] = set()
        self._missed: dict[str, str] = {}
        self._uuids: dict[str, list[int]] | None = None
        self._starts: list[tuple[str, list[int]]] | None = None
        self._late: dict[str, tuple[str, Any]] = {}
        self._replies: dict[str, int] = {}  # the number of the newest reply, by what names its call
        self._held = time.time()
        self._prompts: dict[int, dict[str, str]] = {}

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
        heads = (self.records.row(slot, below).head for below in range(n - 1, -1, -1))
        head = next((head for head in heads if not head.get("late")), None)
        return head is None or head["status"] != "failed" or self.tried_again(head)

    def answered_since(self, current: Current) -> bool:
        """Whether another attempt of a step has completed since this one, which was given up, had begun."""
        call, slot = current.call, current.facts[0]
        for n in range(current.version, slot.n + 1):
            head = self.records.row(slot, n).head
            completed = head["status"] == "completed" and not head.get("late") and self.counts(slot, n)
            if completed and (not head.get("ai") or head["epoch"] == call.here.epoch):
                return True
        return False

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
        if self.observers:
            tell(self.observers, lambda each: each.step_replayed(call, head))
        self.enter(call)
        place = call.here
        if not place.scope:
            self.totals.replayed += 1
        cost = head.get("cost")
        outer = place.outer
        split: dict[str, Decimal] = {}
        # A retried step uses again what an attempt of this very execution has made: that is no replay.
        earlier = self.scratch or head["s0"][0] < self.number or call.options.idempotency_key is not None
        if cost is not None:
            split = {model: Decimal(part) for model, part in head.get("by_model", {}).items()}
            split = split or {costs.model_of(call.request): Decimal(cost)}
            if earlier:
                self.saved(call.name if outer is None else costs.outermost(outer), split)
        undoes, compensates = head.get("undoes"), call.options.compensate is not None
        if undoes or compensates:
            # What another run did, or nobody, is not undone here.
            own = "from" not in head and "supplied" not in head
            undoes, compensates = undoes and own, compensates and own
            if own:
                self._undoes(outer)
        if head.get("ai"):
            lent = not self.scratch and head["s0"][0] < self.number
            while outer is not None:
                outer.used_model = True
                outer.lent += lent
                outer.spent(split)
                outer = outer.parent
        if self.plan:
            from agentflow.records import PlanStep

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
        slot, place = call.slot, call.here
        assert slot is not None
        at = here.get()
        if at is place or (
            at is not None and at.ex is self and at.scope == place.scope and at.branch == place.branch
        ):
            here.set(at.after(f"{slot.ident}/{slot.place}"))
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
        self.entered.add(entry[0])
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
        # For people who look at the run meanwhile: when, in which execution, what, and inside which step.
        line |= {"t": round(self.clock(), 3), "e": self.number, "k": call.kind, "s": call.here.scope}
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

    def reply_key(self, prefix: str, count: int) -> str:
        """A key of its own for a reply to the call that ``prefix`` names, of which ``count`` were found on record.

        An attempt that was given up may still be bringing a reply of its own to the same call.
        """
        number = self._replies[prefix] = max(count, self._replies.get(prefix, -1) + 1)
        return f"{prefix}{number:04d}"

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
        if not lease.lost and now - self._held > lease.seconds / 2:
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

    def begins(self) -> None:
        """This process has taken the run up, and is about to execute its body."""

    def ends(self, line: str) -> bool:
        """The outcome is committed; ``line`` says it. Gives whether people have been told."""
        return False

    def tries_again(self, call: Call, attempt: int, attempts: int, why: str, delay: float) -> None:
        """An attempt of a step failed, and the next one comes after ``delay`` seconds."""
        self.say(f"{call.name}: attempt {attempt} of {attempts} failed ({why}); next in {delay:.2g}s")

    def say(self, text: str) -> None:
        if not self.plan:
            self.tell("info", text)

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.warnings.append(text)
            if not self.plan:
                self.tell("warning", text)

    def tell(self, level: str, text: str) -> None:
        """Say something of this run; ``level`` is info or warning."""
        (log.warning if level == "warning" else log.info)("%s · %s", self.run_id, text)

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
