"""Budgets: how many dollars a run, or everything in a journal within a day, may spend on model calls.

A call is let through only if what was paid, what calls in flight may still cost, and what this one may cost fit into
the budget together. What may be spent is set aside under ``lr/`` in the journal before the call is sent, and given back
in the commit that records its reply. A process that is killed leaves it there: then nobody knows whether the call was
charged for, and it goes on to count. Calls in doubt count with what they may have cost, replays not at all.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import TYPE_CHECKING, Any

import orjson

from agentflow import costs
from agentflow.calls import Call, Current
from agentflow.errors import BudgetExceeded, UsageError
from agentflow.index import in_key
from agentflow.journal import Add, Drop, Journal, Op, Txn
from agentflow.lease import process_alive, this_process
from agentflow.line import Line

if TYPE_CHECKING:
    from agentflow.tokens import Count

UNITS = ("hour", "day", "week", "month")


def amount(value: Any, where: str) -> Decimal:
    """Dollars as an exact decimal: ``"2.50"``, a Decimal, an int, or a float as it is written.

    Raises:
        UsageError: no such amount.
    """
    text = str(value).strip().removeprefix("$")
    try:
        found = Decimal(text) if isinstance(value, str | int | float | Decimal) else Decimal("NaN")
    except InvalidOperation:
        found = Decimal("NaN")
    if isinstance(value, bool) or not found.is_finite() or found < 0:
        raise UsageError(f'{where}={value!r} is no amount of dollars. Write {where}="2.50".')
    return found


def dollars(value: Decimal) -> str:
    """Dollars for people, with as many decimals as small amounts need.

    >>> dollars(Decimal("2.5")), dollars(Decimal("0.00001234567")), dollars(Decimal(0))
    ('$2.50', '$0.000012', '$0.00')
    """
    text = f"{value:.6f}".rstrip("0")
    return f"${text}{'0' * max(0, 2 - len(text.partition('.')[2]))}"


_held: set[str] = set()  # the notes of calls that this process has in flight


class Held:
    """What is set aside for one call: ``key`` is its row in the journal, empty while there is none."""

    __slots__ = ("at_most", "call", "current", "key", "model", "what")

    def __init__(self, call: Call, current: Current, model: str, at_most: Decimal, counted: Count, output: int) -> None:
        self.call = call
        self.current = current
        self.model = model
        self.at_most = at_most
        self.key = ""
        self.what = f"{counted} and up to {output:,} output tokens"

    def row(self) -> Add:
        """What notes it in the journal."""
        ex = self.call.ex
        self.key = f"lr/{int(ex.clock() * 1000):014d}/{ex.key}/{self.call.occ}/{os.urandom(4).hex()}"
        facts = costs.facts(self.call, self.current, self.model)
        facts |= {"at_most": str(self.at_most), "owner": this_process(ex.journal)}
        _held.add(self.key)
        return Add(self.key, orjson.dumps(facts).decode())

    def given_back(self) -> list[Op]:
        """What takes the note away again."""
        return [Drop(self.key)] if self.key else []

    def over(self) -> None:
        """The call has ended, or was refused: a note that is still there all the same holds up nobody here."""
        _held.discard(self.key)
        self.key = ""


class RunBudget:
    """The budget of one execution of a run, all of whose calls this process makes, those of runs inside it included.

    Args:
        run_id: the run.
        limit: dollars for all executions of the run together.
        since: epoch seconds; the run has paid nothing before. None: look through the whole ledger.
    """

    def __init__(self, run_id: str, limit: Decimal, since: float | None) -> None:
        self.run_id = run_id
        self.limit = limit
        self._since = since
        self._line = Line()
        self._spent: Decimal | None = None
        self._in_flight: dict[Held, Decimal] = {}

    @property
    def line(self) -> Line:
        """Where calls wait for others that are in flight."""
        return self._line

    def load(self, journal: Journal) -> None:
        """Adds up what earlier executions have spent, once."""
        with self._line.lock:
            if self._spent is None:
                self._spent = spent(journal, in_key(self.run_id), self._since)

    def admit(self, held: Held) -> float | None:
        """Sets the amount aside if it fits. Infinite where it may fit when others have come back.

        Raises:
            BudgetExceeded: it does not fit, and nothing in flight could change that.
        """
        assert self._spent is not None
        taken = self._spent + sum(self._in_flight.values(), Decimal(0))
        if taken + held.at_most <= self.limit:
            self._in_flight[held] = held.at_most
            return None
        if self._in_flight:
            return math.inf
        raise exceeded(
            f"run {self.run_id} has a budget of {dollars(self.limit)}, and {dollars(self._spent)} of it is spent",
            held,
            f'Go on with a higher one: .options(budget="{higher(self.limit, self._spent + held.at_most)}").run(...)',
            budget=self.limit,
            spent=self._spent,
        )

    def settle(self, held: Held, cost: Decimal) -> None:
        """The call is over and cost so much."""
        with self._line.lock:
            del self._in_flight[held]
            self.count(cost)
        self._line.changed()

    def count(self, cost: Decimal) -> None:
        """Something was spent that was not set aside."""
        with self._line.lock:
            if self._spent is not None:
                self._spent += cost


@dataclass(frozen=True, slots=True)
class Period:
    """So many dollars within an hour, a day, a week (from Monday) or a month, each by UTC."""

    limit: Decimal
    unit: str

    def start(self, now: float) -> datetime:
        """When the period of a moment has begun."""
        moment = datetime.fromtimestamp(now, UTC).replace(minute=0, second=0, microsecond=0)
        if self.unit == "hour":
            return moment
        moment = moment.replace(hour=0)
        if self.unit == "week":
            return moment - timedelta(days=moment.weekday())
        return moment.replace(day=1) if self.unit == "month" else moment


def period(value: Any) -> Period:
    """``"5/day"``: a budget for everything within a period.

    Raises:
        UsageError: no such budget.
    """
    dollars_, slash, unit = str(value).strip().partition("/")
    unit = unit.strip().lower()
    if not isinstance(value, str) or not slash or unit not in UNITS:
        raise UsageError(f'configure(budget={value!r}): write dollars and a period, "5/day" ({", ".join(UNITS)}).')
    return Period(amount(dollars_, "configure(budget=...)"), unit)


class PeriodBudget:
    """The budget of everything that all processes do with one journal within a period.

    What was spent is in the ledger, what is in flight beside it, whoever wrote it. The rows of the ledger are added
    up once: only those of the last minute are looked at again, as replies are recorded some time after they came.
    """

    def __init__(self, journal: Journal, period: Period) -> None:
        self._journal = journal
        self._period = period
        self._lock = threading.Lock()
        self._start: datetime | None = None
        self._upto = ""
        self._before = Decimal(0)

    async def admit(self, held: Held) -> bool:
        """Sets the amount aside if it fits. False where it may fit when calls in flight have come back.

        Raises:
            BudgetExceeded: it does not fit, and nothing in flight could change that.
        """
        ex = held.call.ex
        now = ex.clock()
        start = self._period.start(now)
        after, before = self._added_up(start, now)
        row, me, journal = held.row(), this_process(self._journal), self._journal

        def attempt(txn: Txn) -> bool:
            if ex.fence is not None:
                txn.check(ex.fence)
            spent = before + sum((counts(orjson.loads(text)) for _, text in txn.scan("l/", after)), Decimal(0))
            in_flight = Decimal(0)
            living = cache(lambda owner: process_alive(journal, dict(owner), txn.get))
            for key, text in txn.scan("lr/"):
                facts = orjson.loads(text)
                if facts["owner"] == me and key not in _held:
                    spent += counts(facts)
                elif living(tuple(facts["owner"].items())):
                    in_flight += counts(facts)
                elif key >= f"lr/{_milliseconds(start)}":
                    spent += counts(facts)
            fits = spent + in_flight + held.at_most <= self._period.limit
            if fits:
                txn.add(row.key, row.value)
            elif not in_flight:
                raise self._exceeded(held, spent, start)
            return fits

        fits = await self._journal.aguarded(attempt)
        if not fits:
            held.over()
        return fits

    def _added_up(self, start: datetime, now: float) -> tuple[str, Decimal]:
        """The key up to which rows are added up, and what they come to."""
        with self._lock:
            if start != self._start:
                self._start, self._upto, self._before = start, f"l/{_milliseconds(start)}", Decimal(0)
            settled = f"l/{int((now - 60) * 1000):014d}"
            for key, text in self._journal.scan("l/", after=self._upto, before=settled):
                self._upto = key
                self._before += counts(orjson.loads(text))
            return self._upto, self._before

    def _exceeded(self, held: Held, spent: Decimal, start: datetime) -> BudgetExceeded:
        limit, unit = self._period.limit, self._period.unit
        held.over()
        return exceeded(
            f"everything together has a budget of {dollars(limit)} a {unit} here, and {dollars(spent)} of it is spent "
            f"since {start:%Y-%m-%d %H:%M} UTC",
            held,
            f'Go on when the {unit} is over, or with a higher one: configure(budget="{higher(limit, spent)}/{unit}")',
            budget=limit,
            spent=spent,
        )


_periods: dict[tuple[str, Period], PeriodBudget] = {}


def period_of(journal: Journal, period: Period) -> PeriodBudget:
    """The budget of a period in a journal, one object for this process."""
    key = (f"{journal.path}:{journal.id}", period)
    found = _periods.get(key)
    if found is None or found._journal is not journal:
        found = _periods[key] = PeriodBudget(journal, period)
    return found


def _milliseconds(moment: datetime) -> str:
    return f"{int(moment.timestamp() * 1000):014d}"


def exceeded(what: str, held: Held, go_on: str, *, budget: Decimal, spent: Decimal) -> BudgetExceeded:
    """The error, which says what was to be asked and how to go on."""
    return BudgetExceeded(
        f"{what}. The next call ({held.call.name!r}, {held.model}) may cost up to {dollars(held.at_most)} "
        f"({held.what}; max_tokens= lowers it). Nothing was sent. {go_on}.",
        budget=budget,
        spent=spent,
        needed=held.at_most,
        run_id=held.call.ex.run_id,
    )


def unpriced(call: Call, model: str, what: str) -> BudgetExceeded:
    """The error for a call whose price is not known: a budget that cannot be kept is none."""
    name = model.partition(":")[2]
    return BudgetExceeded(
        f"{what}, and the price of {model} is not known: step {call.name!r} was not sent. Name its price in dollars "
        f"per million tokens: agentflow.ledger.set_price({name!r}, input=..., output=...); 0 where it is free.",
        run_id=call.ex.run_id,
    )


def higher(limit: Decimal, needed: Decimal) -> str:
    """A budget to propose: twice as much, or what is needed at least, in whole cents."""
    return str(max(limit * 2, needed, Decimal("0.01")).quantize(Decimal("0.01"), rounding="ROUND_UP"))


def counts(facts: dict[str, Any]) -> Decimal:
    """What a row of the ledger takes from a budget: its cost, or what it may have cost where that is not known."""
    return Decimal(facts.get("cost") or facts.get("at_most") or 0)


def spent(journal: Journal, run_key: str, since: float | None) -> Decimal:
    """What a run has spent so far, calls in doubt and what a killed process had set aside included."""
    total = Decimal(0)
    rows = ((key, text) for _, key, text in costs.texts(journal, since))
    for key, text in (*rows, *journal.scan("lr/")):
        own = key.split("/", 3)[2] == run_key
        if own or '"within":' in text:
            row = orjson.loads(text)
            total += counts(row) if own or run_key in row.get("within", ()) else 0
    return total


def left_behind(journal: Journal, run_key: str, occ: str) -> list[tuple[str, dict[str, Any]]]:
    """What killed processes had set aside for a step."""
    found = ((key, text) for key, text in journal.scan("lr/") if key.split("/")[2:4] == [run_key, occ])
    return [(key, orjson.loads(text)) for key, text in found]
