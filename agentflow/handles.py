"""What a program holds of a run: ``Run`` (what the journal has) and ``Plan`` (what a run would do)."""

from __future__ import annotations

from collections.abc import Generator
from decimal import Decimal
from typing import Any

from agentflow import codec, plans, rundocs
from agentflow.context import view
from agentflow.errors import AgentflowError, StepFailed, UsageError, Waiting
from agentflow.journal import Journal
from agentflow.records import PlanStep, StepRecord, moment

# The workflows defined in this process, by name: a run finds its code here when it is awaited.
workflows: dict[str, Any] = {}


class Plan:
    """What a run would do now: one line a step, nothing spent.

    ``print(plan)`` shows each step with its state, what differs from its record, and an estimate of its cost.

    Attributes: ``steps`` (``PlanStep``: name, state, reason, diff, cost); ``dollars`` (estimated, for the steps
    that would run as far as they are known; None when the cost of one is unknown).
    """

    def __init__(self, run_id: str, steps: list[PlanStep]) -> None:
        self.run_id = run_id
        self.steps = steps
        dollars, unknown = plans.total(steps)
        self.dollars: Decimal | None = None if unknown else dollars

    def __str__(self) -> str:
        return plans.render(self.run_id, self.steps)


class Run:
    """One run as the journal has it now. ``await run`` goes on with it and gives its result."""

    def __init__(self, journal: Journal, document: dict[str, Any], workflow: Any = None) -> None:
        self._journal = journal
        self._document = document
        self._workflow = workflow or workflows.get(document["workflow"])

    @property
    def id(self) -> str:
        return str(self._document["id"])

    @property
    def workflow(self) -> str:
        return str(self._document["workflow"])

    @property
    def status(self) -> str:
        """running, waiting, completed, failed, cancelled, or interrupted."""
        return str(self._document["status"])

    @property
    def input(self) -> Any:
        """The arguments, by name; a single argument by itself."""
        return single(codec.look(self._document["input"]))

    @property
    def output(self) -> Any:
        """The result of a completed run, else None."""
        text = self._document.get("output")
        return None if text is None else codec.look(text)

    @property
    def error(self) -> str | None:
        """Type and message of what failed, else None."""
        error = self._document.get("error")
        return f"{error['name']}: {error['message']}" if error else None

    @property
    def steps(self) -> list[StepRecord]:
        """The recorded steps, in the order in which they started; ``status`` is completed, failed or undone."""
        return [view(row) for row in rundocs.rows(self._journal, self.id, undone=True)]

    @property
    def waiting_on(self) -> list[dict[str, Any]]:
        return list(self._document.get("waiting_on", ()))

    @property
    def cost(self) -> Decimal:
        """Dollars paid for this run's model calls in all its executions; calls of unknown price not counted."""
        if self.status in ("running", "interrupted"):
            return rundocs.paid(self._journal, self.id)
        return Decimal(self._document.get("paid", "0"))

    @property
    def saved(self) -> Decimal:
        """Dollars that replays of this run did not pay again."""
        return Decimal(self._document.get("saved", "0"))

    @property
    def started_at(self) -> Any:
        return moment(self._document["created_at"])

    @property
    def completed_at(self) -> Any:
        return moment(self._document.get("ended_at"))

    def result(self) -> Any:
        """The recorded result. Raises the recorded error, or ``Waiting``."""
        if self.status == "completed":
            text = self._document.get("output")
            return None if text is None else codec.decode(text)
        if self.status == "failed":
            raise stored_error(self._document)
        if self.status == "waiting":
            raise waiting(self._document)
        raise AgentflowError(f"run {self.id} is {self.status}: it has no result yet. Run it again to go on.")

    def __await__(self) -> Generator[Any, Any, Any]:
        if self._workflow is None:
            raise UsageError(
                f"run {self.id}: its workflow {self.workflow!r} is not defined in this program; import it first."
            )
        resumed: Generator[Any, Any, Any] = self._workflow.again(self._document).__await__()
        return resumed

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.status}>"


def single(arguments: dict[str, Any]) -> Any:
    return next(iter(arguments.values())) if len(arguments) == 1 else arguments


def stored_error(document: dict[str, Any]) -> BaseException:
    data = document["error"]
    attrs = document.get("error_step") or {
        "step": "",
        "run_id": document["id"],
        "attempts": 0,
        "error_type": data["name"],
    }
    return codec.rebuild_exception(data, StepFailed, {**attrs, "data": data.get("data", {}), "replayed": True})


def waiting(document: dict[str, Any]) -> Waiting:
    run_id, waits = document["id"], document.get("waiting_on", [])
    lines = []
    for wait in waits:
        if wait["kind"] == "task":
            who = (
                wait["assign_to"]
                if isinstance(wait["assign_to"], str)
                else ", ".join(wait["assign_to"] or ()) or "anybody"
            )
            answer = wait.get("command") or f"agentflow tasks approve {wait['id']}"
            lines.append(f"task {wait['id']} ({wait['title'] or wait['type']}, for {who}): {answer}")
        else:
            lines.append(f"{wait['kind']} until {moment(wait['until'])}" if "until" in wait else wait["kind"])
    return Waiting(f"run {run_id} waits for {'; '.join(lines)}. Run it again afterwards.", run_id, waits)
