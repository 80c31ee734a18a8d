"""What the ledger says in groups: by model, workflow, step or day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson

from agentflow.costs import entries
from agentflow.errors import UsageError
from agentflow.journal import Journal
from agentflow.lease import process_alive

BY = ("model", "workflow", "step", "day")


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
        if not process_alive(journal, row["owner"], journal.get):
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
