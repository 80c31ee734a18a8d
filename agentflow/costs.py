"""The ledger: one small row for each paid reply, for what replays saved, and for calls whose outcome nobody knows.

A row's key is ``l/<milliseconds>/<reply key>``: rows lie in the order of time, and one reply has one row however often
its commit is repeated. It is written in the commit that records the reply. A replay writes nothing here but what it
avoided, once for each execution of a run. All amounts are decimal dollars as text; None is an unknown price.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson

from agentflow.calls import Call, Current
from agentflow.errors import UsageError
from agentflow.index import in_key
from agentflow.journal import Add, Journal, Op, Put
from agentflow.lease import Owner, alive

BY = ("model", "workflow", "step", "day")
Entry = tuple[str, dict[str, Any]]


def reply(call: Call, current: Current, raw: dict[str, Any], model: str, key: str, at_most: Decimal | None) -> Entry:
    """The ledger's row for a reply that is recorded under ``key``.

    Args:
        call, current: the step that asked, and its attempt.
        raw: the reply.
        model: the model that was asked.
        key: the reply's key, ``m/...``.
        at_most: what was set aside for it; counts against budgets where the price turned out unknown.
    """
    what = facts(call, current, f"{raw['provider']}:{model}") | _used(raw)
    if raw["cost"] is None and at_most is not None:
        what["at_most"] = str(at_most)
    return _key(call.ex.clock(), key[2:]), what


def batched(ex: Any, step: str, name: str, raw: dict[str, Any], model: str, key: str) -> Entry:
    """The row for a reply that came with a batch, possibly for a call that nobody makes any more.

    Args:
        ex: the execution of the run.
        step, name: the step of the body under which the call is counted, and the call's own name.
        raw, model, key: as for ``reply``.
    """
    return _key(ex.clock(), key[2:]), _facts(ex, step, name, f"{raw['provider']}:{model}") | _used(raw)


def _used(raw: dict[str, Any]) -> dict[str, Any]:
    usage = raw["usage"]
    return {"cost": raw["cost"], "price": raw["price"], "in": usage["input_tokens"], "out": usage["output_tokens"]}


def in_doubt(call: Call, current: Current, model: str, at_most: Decimal | None, why: str) -> Op:
    """A row for a call that was sent and whose answer never came: the provider may have charged for it."""
    what = facts(call, current, model) | {"doubt": why, "at_most": None if at_most is None else str(at_most)}
    around = f"{call.here.epoch}.{current.sample}.{current.attempt}"
    return add((_key(call.ex.clock(), f"{call.ex.key}/{call.occ}/{around}/doubt"), what))


def saved(run_id: str, workflow: str, at: float, what: dict[tuple[str, str], Decimal]) -> list[Op]:
    """One row for all that an execution did not pay again, by step and model."""
    split = [[step, model, str(amount)] for (step, model), amount in what.items()]
    if not split:
        return []
    row = {"run": run_id, "workflow": workflow, "saved": split}
    return [add((_key(at, f"{in_key(run_id)}/saved/{os.urandom(4).hex()}"), row))]


def add(entry: Entry) -> Op:
    """What records a row."""
    return Add(entry[0], orjson.dumps(entry[1]).decode())


def judged(current: Current, *, wasted: bool) -> list[Op]:
    """What notes that the replies an attempt stood on were for nothing, or that they were of use after all."""
    ops: list[Op] = []
    for key, row in current.entries:
        if row.get("wasted", False) != wasted:
            row["wasted"] = wasted
            ops.append(Put(key, orjson.dumps(row).decode()))
    return ops


def _key(at: float, rest: str) -> str:
    return f"l/{int(at * 1000):014d}/{rest}"


def facts(call: Call, current: Current, model: str) -> dict[str, Any]:
    """Who asks whom, for what."""
    return _facts(call.ex, outermost(current), call.name, model)


def _facts(ex: Any, step: str, name: str, model: str) -> dict[str, Any]:
    row = {"run": ex.run_id, "workflow": ex.workflow, "step": step, "call": name, "model": model}
    return row | ({"within": [around.key for around in ex.within()]} if ex.around is not None else {})


def model_of(request: Any) -> str:
    """A recorded request's model with its provider, as people write it."""
    return "" if request is None else f"{request['provider']}:{request['model']}"


def outermost(current: Current) -> str:
    """The step of the body, under which a call inside it is counted."""
    while current.parent is not None:
        current = current.parent
    return current.name


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Line:
    """What the calls of one model, workflow, step or day came to.

    Attributes:
        name: the model, the step, the day (UTC) or the workflow.
        workflow: the step's workflow; None for other groups.
        calls: replies that were paid for.
        input_tokens, output_tokens: of these.
        paid: dollars for all of known price; None if there were calls, and no price is known.
        unknown: how many replies have no known price.
        saved: dollars that replays did not pay again.
        in_doubt: how many calls were sent and brought no answer, so that the provider may have charged for them.
        in_doubt_at_most: dollars that they may have cost; None if that is not known for any.
        wasted: the part of ``paid`` that attempts which failed had paid.
    """

    name: str
    workflow: str | None = None
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    paid: Decimal | None = None
    unknown: int = 0
    saved: Decimal = Decimal(0)
    in_doubt: int = 0
    in_doubt_at_most: Decimal | None = None
    wasted: Decimal = Decimal(0)


def texts(journal: Journal, since: float | None = None) -> Iterator[tuple[float, str, str]]:
    """All rows from ``since`` (seconds since 1970; None: all): when, key, facts as text."""
    for key, text in journal.scan("l/", after=None if since is None else _key(max(since, 0), "")):
        yield int(key[2:16]) / 1000, key, text


def entries(journal: Journal) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """All rows: when, key, facts."""
    for at, key, text in texts(journal):
        yield at, key, orjson.loads(text)


def summary(journal: Journal, by: str | None = None) -> list[Line]:
    """What was paid, saved, in doubt and wasted, in groups; the dearest first, days in order.

    Args:
        journal: whose ledger.
        by: model, workflow, step or day (UTC). None: everything in one line.

    Raises:
        UsageError: no such grouping.
    """
    if by is not None and by not in BY:
        raise UsageError(f"by={by!r} is none of {', '.join(BY)}.")
    lines: dict[tuple[str, str | None], Line] = {}

    def line(at: float, row: dict[str, Any], step: str, model: str) -> Line:
        day = datetime.fromtimestamp(at, UTC).date().isoformat()
        name = {"model": model, "workflow": row["workflow"], "step": step, "day": day}.get(by or "", "all")
        key = (name, row["workflow"] if by == "step" else None)
        if key not in lines:
            lines[key] = Line(*key)
        return lines[key]

    for at, _, row in entries(journal):
        if "saved" in row:
            for step, model, amount in row["saved"]:
                line(at, row, step, model).saved += Decimal(amount)
            continue
        _count(line(at, row, row["step"], row["model"]), row)
    # What a killed process had set aside for a call is all that is known of that call.
    for key, text in journal.scan("lr/"):
        row = orjson.loads(text)
        if not alive(Owner(**row["owner"])):
            _count(line(int(key[3:17]) / 1000, row, row["step"], row["model"]), row | {"doubt": "process ended"})
    if by == "day":
        return sorted(lines.values(), key=lambda one: one.name)
    return sorted(lines.values(), key=lambda one: (-(one.paid or 0), -one.saved, one.name))


def total(lines: Sequence[Line]) -> Line:
    """All groups together."""
    whole = Line("total")
    for line in lines:
        for name in ("calls", "input_tokens", "output_tokens", "unknown", "saved", "in_doubt", "wasted"):
            setattr(whole, name, getattr(whole, name) + getattr(line, name))
        for name in ("paid", "in_doubt_at_most"):
            if (amount := getattr(line, name)) is not None:
                setattr(whole, name, (getattr(whole, name) or Decimal(0)) + amount)
    return whole


def _count(line: Line, row: dict[str, Any]) -> None:
    if "doubt" in row:
        line.in_doubt += 1
        if row["at_most"] is not None:
            line.in_doubt_at_most = (line.in_doubt_at_most or Decimal(0)) + Decimal(row["at_most"])
        return
    line.calls += 1
    line.input_tokens += row["in"]
    line.output_tokens += row["out"]
    if row["cost"] is None:
        line.unknown += 1
        return
    cost = Decimal(row["cost"])
    line.paid = (line.paid or Decimal(0)) + cost
    if row.get("wasted"):
        line.wasted += cost
