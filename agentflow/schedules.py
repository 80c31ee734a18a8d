"""Ticks of scheduled workflows: each becomes one run, whichever worker is the first to notice it.

``sc/<workflow>`` holds the schedule, the instant up to which its ticks are dealt with (``cursor``), and the newest tick
with its run. One transaction makes the run of a tick, as one that was interrupted before its first step, and moves the
cursor: a worker that is killed has done both or nothing, and of several workers all but one find the cursor moved. From
then on it is a run like any other, and any worker goes on with it.

A worker knows when each of its schedules ticks next, so a look costs nothing until then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from agentflow import codec, cron, rundocs
from agentflow.codedigest import code_of
from agentflow.cron import Schedule
from agentflow.errors import UsageError
from agentflow.flow import Workflow
from agentflow.index import in_key, short
from agentflow.journal import Journal, Txn
from agentflow.settings import log

LATE = 60.0  # seconds after which a tick that nobody has noticed counts as missed
MOST = 1000  # missed ticks that catch_up="all" makes up for, the newest
_AT_ONCE = 100  # runs that one transaction makes

Flow = Workflow[..., Any]


class Ticker:
    """The schedules of some workflows, as one worker keeps them.

    Making one records those that the journal does not know yet: their first tick is the first from now on. The same for
    one whose expression or time zone was edited. One that a workflow has no more is forgotten.
    """

    def __init__(self, journal: Journal, flows: Iterable[Flow], now: float) -> None:
        self._journal = journal
        self._flows = {flow.name: flow for flow in flows if flow.schedule is not None}
        self._next: dict[str, float] = {}
        for flow in flows:
            journal.guarded(lambda txn, flow=flow: _enrol(txn, flow, now))  # type: ignore[misc]
        for name in self._flows:
            if (row := self._row(name)) is not None:
                self._reckon(name, row)

    def lines(self) -> Iterator[str]:
        """One line for each schedule: when it ticks next."""
        for name, tick in sorted(self._next.items()):
            if tick == math.inf:
                continue
            schedule = _schedule(self._flows[name])
            yield f"{name} · scheduled {schedule}, next tick {_when(schedule, tick)}"

    def tick(self, now: float) -> int:
        """Make the runs of the ticks that have come; how many.

        Called at every look: until the next tick that costs no access to the journal.
        """
        made = 0
        for name, at in list(self._next.items()):
            if at <= now:
                made += self._due(name, now)
        return made

    def _row(self, name: str) -> dict[str, Any] | None:
        """The schedule's row; None if another worker, which was started later, has another schedule or none."""
        text = self._journal.get(_key(name))
        row = None if text is None else orjson.loads(text)
        schedule = _schedule(self._flows[name])
        if row is None or (row["schedule"], row["timezone"]) != (schedule.text, schedule.timezone):
            log.warning(
                "%s · a worker that was started later has another schedule than %s: its ticks are left to that one",
                name,
                schedule,
            )
            self._next.pop(name, None)
            return None
        return dict(row)

    def _reckon(self, name: str, row: dict[str, Any]) -> None:
        tick = _schedule(self._flows[name]).next(row["cursor"])
        self._next[name] = math.inf if tick is None else tick

    def _due(self, name: str, now: float) -> int:
        flow, journal = self._flows[name], self._journal
        schedule = _schedule(flow)
        while (row := self._row(name)) is not None:
            ticks, more = schedule.between(row["cursor"], now, MOST)
            if not ticks:
                self._reckon(name, row)
                return 0
            chosen = _chosen(schedule.catch_up, ticks, now)
            batch = chosen[:_AT_ONCE]
            after = row | {"cursor": batch[-1] if len(batch) < len(chosen) else ticks[-1]}
            made = journal.guarded(
                lambda txn, row=row, after=after, batch=batch: _begin(txn, flow, row, after, batch)  # type: ignore[misc]
            )
            if made is None:
                continue  # another worker was faster
            for tick, run_id in zip(batch, made, strict=True):
                log.info("%s · begins: tick %s of %s", run_id, _when(schedule, tick), schedule)
            if left := len(ticks) - len(chosen):
                log.warning(
                    "%s · %s%d %s missed while no worker ran, and not run (catch_up=%r)", name,
                    "more than " if more else "", left, "tick was" if left == 1 else "ticks were", schedule.catch_up,
                )  # fmt: skip
            elif more:
                log.warning("%s · more than %d ticks were missed: only the newest of them are run", name, MOST)
            self._reckon(name, after)
            return len(made)
        return 0


def _chosen(catch_up: str, ticks: list[float], now: float) -> list[float]:
    """The ticks that get a run, of those that have come."""
    if now - ticks[0] <= LATE or catch_up == "all":
        return ticks
    if catch_up == "latest":
        return ticks[-1:]
    return [tick for tick in ticks if now - tick <= LATE]


def _key(name: str) -> str:
    return f"sc/{in_key(name)}"


def _schedule(flow: Flow) -> Schedule:
    assert flow.schedule is not None
    return flow.schedule


def _when(schedule: Schedule, tick: float) -> str:
    return f"{schedule.local(tick):%Y-%m-%d %H:%M %Z}"


def _enrol(txn: Txn, flow: Flow, now: float) -> None:
    text = txn.get(_key(flow.name))
    row = None if text is None else orjson.loads(text)
    schedule = flow.schedule
    if schedule is None:
        if row is not None:
            txn.drop(_key(flow.name))
            log.warning("%s · has no schedule any more; it was %s (%s)", flow.name, row["schedule"], row["timezone"])
        return
    asked = {"schedule": schedule.text, "timezone": schedule.timezone, "catch_up": schedule.catch_up}
    if row is None:
        row = {"workflow": flow.name, "last": None, "last_run": None, "since": now, "cursor": now}
    elif (row["schedule"], row["timezone"]) != (schedule.text, schedule.timezone):
        before = f"{row['schedule']} ({row['timezone']})"
        log.warning("%s · its schedule was %s and is %s: ticks count from now on", flow.name, before, schedule)
        row |= {"since": now, "cursor": now}
    elif row["catch_up"] == schedule.catch_up:
        return
    txn.put(_key(flow.name), orjson.dumps(row | asked).decode())


def _begin(txn: Txn, flow: Flow, row: dict[str, Any], after: dict[str, Any], ticks: list[float]) -> list[str] | None:
    """Make the runs of some ticks and move the cursor; None, and nothing, if the row is not as it was looked at."""
    text = txn.get(_key(flow.name))
    if text is None or orjson.loads(text) != row:
        return None
    made = []
    for tick in ticks:
        run_id, there = _run_id(txn, flow.name, tick)
        made.append(run_id)
        if not there:
            txn.apply(rundocs.write(_document(flow, run_id, tick), "interrupted"))
        after |= {"last": tick, "last_run": run_id}
    txn.put(_key(flow.name), orjson.dumps(after).decode())
    return made


def _run_id(txn: Txn, name: str, tick: float) -> tuple[str, bool]:
    """The id of a tick's run, which anybody can tell beforehand, and whether there is such a run."""
    run_id = f"{rundocs.slug(name)}-{datetime.fromtimestamp(tick, UTC):%Y%m%dT%H%M%SZ}"
    for found in (run_id, f"{run_id}-{short(name, 6)}"):  # the second where a workflow of another name has the first
        text = txn.get(f"r/{in_key(found)}")
        if text is None or orjson.loads(text)["workflow"] == name:
            return found, text is not None
    raise UsageError(f"the ids {run_id} and {found} of workflow {name!r} belong to other workflows' runs.")


def _document(flow: Flow, run_id: str, tick: float) -> dict[str, Any]:
    """A run that has not begun: the one who takes it up finds it interrupted before its first step."""
    argument = flow.tick_argument
    given = {} if argument is None else {argument: _schedule(flow).local(tick)}
    return {
        "id": run_id, "workflow": flow.name, "created_at": time.time(), "epoch": 0, "digest": None, "tick": tick,
        "input": codec.encode(given, where="input"), "code": code_of(flow.fn).digest, "status": None,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """A schedule that a journal knows.

    Attributes:
        workflow: the name of its workflow.
        text: the cron expression and its time zone.
        next: the first tick that is not dealt with yet; None where it cannot be told.
        last: the newest tick that was run, None before the first.
        last_run: the id of its run.
    """

    workflow: str
    text: str
    next: datetime | None
    last: datetime | None
    last_run: str | None


def known(journal: Journal) -> list[Known]:
    """The schedules that workers have recorded, by the names of their workflows."""
    found = []
    for _, text in journal.scan("sc/"):
        row: Mapping[str, Any] = orjson.loads(text)
        try:
            schedule = cron.parsed(row["schedule"], row["timezone"], row["catch_up"])
        except UsageError:  # a zone that is known where the worker runs
            schedule = None
        tick = None if schedule is None else schedule.next(row["cursor"])
        zone = UTC if schedule is None else schedule.zone
        upcoming, last = (None if at is None else datetime.fromtimestamp(at, zone) for at in (tick, row["last"]))
        shown = f"{row['schedule']} ({row['timezone']})"
        found.append(Known(row["workflow"], shown, upcoming, last, row["last_run"]))
    return found
