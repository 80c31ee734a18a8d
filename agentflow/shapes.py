"""What runs, steps, tasks and costs look like in JSON: the same on the command line (``--json``) and on the page."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from agentflow.words import moment

if TYPE_CHECKING:
    from agentflow.costlines import Line
    from agentflow.handles import Run
    from agentflow.records import HumanTask, StepRecord

_STEP = (
    "name", "id", "kind", "status", "started_at", "completed_at", "duration", "attempts", "idempotency_key", "output",
    "error", "usage", "model", "parent", "in_doubt",
)  # fmt: skip
_TASK = (
    "id", "run_id", "workflow", "type", "assign_to", "status", "title", "data", "schema", "created_at", "deadline",
    "decision", "digest", "trail",
)  # fmt: skip


def dollars(value: Decimal | None) -> float | None:
    """Money in JSON: a number of dollars, null when unknown."""
    return None if value is None else float(value)


def summary(run: Run) -> dict[str, Any]:
    """One run as in ``runs list``."""
    return {
        "id": run.id,
        "workflow": run.workflow,
        "status": run.status,
        "started_at": run.started_at,
        "completed_at": run.completed_at,
        "cost": dollars(run.cost),
        "saved": dollars(run.saved),
        "waiting_on": [_with_moments(wait) for wait in run.waiting_on],
        "error": run.error,
    }


def whole(run: Run) -> dict[str, Any]:
    """One run as in ``runs show``, but for its steps."""
    more = {name: getattr(run, name) for name in ("parent", "forked_at", "tick", "input", "output")}
    return summary(run) | more


def full(run: Run) -> dict[str, Any]:
    """One run as in ``runs show``, and for the commands that go on with one."""
    return whole(run) | {"steps": [step(each) for each in run.steps]}


def step(record: StepRecord) -> dict[str, Any]:
    """One step as in ``runs show``."""
    return {name: getattr(record, name) for name in _STEP} | {"cost": dollars(record.cost)}


def task(found: HumanTask) -> dict[str, Any]:
    """One task as in ``tasks list``."""
    return {name: getattr(found, name) for name in _TASK} | {"refused": found.extra["refused"]}


def cost(line: Line, by: str) -> dict[str, Any]:
    """One group as in ``cost``: dollars are numbers, null where no price is known."""
    names = {"workflow": line.workflow, "step": line.name} if by == "step" else {by: line.name}
    paid = Decimal(0) if line.paid is None and not line.unknown else line.paid
    return names | {
        "calls": line.calls,
        "input_tokens": line.input_tokens,
        "output_tokens": line.output_tokens,
        "paid": dollars(paid),
        "unknown": line.unknown,
        "saved": dollars(line.saved),
        "in_doubt": line.in_doubt,
        "in_doubt_at_most": dollars(line.in_doubt_at_most),
        "wasted": dollars(line.wasted),
    }


def _with_moments(wait: dict[str, Any]) -> dict[str, Any]:
    """Times as in all other JSON here, not as seconds since 1970."""
    return wait | {name: moment(wait[name]) for name in ("deadline", "until", "remind_at") if name in wait}
