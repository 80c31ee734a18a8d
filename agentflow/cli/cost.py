"""``agentflow cost``: what model calls came to."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

import typer

from agentflow import costlines, shapes
from agentflow.cli import output
from agentflow.records import money
from agentflow.scratch import open_journal


def cost(
    by: Annotated[str, typer.Option("--by", help="model, workflow, step, or day (UTC).")] = "model",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What model calls cost: paid, saved by replays, in doubt, and wasted on attempts that failed.

    Wasted is a part of what was paid. In doubt are calls that were sent and brought no answer: the provider may have
    charged for them, at most what is shown.
    """
    if by not in costlines.BY:
        raise typer.BadParameter(f"{by!r} is none of {', '.join(costlines.BY)}.", param_hint="--by")
    found = costlines.summary(open_journal(), by) if output.has_journal() else []
    if json:
        return output.data([shapes.cost(line, by) for line in found])
    if not found:
        return output.words("Nothing was paid or saved yet.")
    rows = [_row(line, by) for line in found]
    if len(found) > 1:
        rows.append(_row(costlines.total(found), by))
    first = ("workflow", "step") if by == "step" else (by,)
    output.table((*first, ">calls", ">in", ">out", ">paid", ">saved", ">in doubt", ">wasted"), rows)


def _row(line: costlines.Line, by: str) -> tuple[Any, ...]:
    return (
        *((line.workflow or "", line.name) if by == "step" else (line.name,)),
        line.calls,
        f"{line.input_tokens:,}",
        f"{line.output_tokens:,}",
        _paid(line),
        money(line.saved),
        _in_doubt(line),
        money(line.wasted),
    )


def _paid(line: costlines.Line) -> str:
    if line.paid is None:
        return money(None if line.unknown else Decimal(0))
    return money(line.paid) + (f" + {line.unknown} unknown" if line.unknown else "")


def _in_doubt(line: costlines.Line) -> str:
    if not line.in_doubt:
        return "-"
    calls = f"{line.in_doubt} {'call' if line.in_doubt == 1 else 'calls'}"
    return f"{calls}, unknown" if line.in_doubt_at_most is None else f"{calls}, up to {money(line.in_doubt_at_most)}"
