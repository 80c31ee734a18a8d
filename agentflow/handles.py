"""What a program holds of a run: ``Run`` (what the journal has) and ``Plan`` (what a run would do)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator
from decimal import Decimal
from typing import Any

from agentflow import codec, control, rundocs
from agentflow.blocking import run_coroutine
from agentflow.calls import here
from agentflow.context import view
from agentflow.errors import AgentflowError, RunCancelled, StepFailed, UsageError, Waiting
from agentflow.journal import Journal
from agentflow.records import StepRecord, moment, money
from agentflow.run import PlanStep

# The workflows defined in this process, by name: a run finds its code here when it is awaited.
workflows: dict[str, Any] = {}


class Plan:
    """What a run would do now: one line a step, nothing spent.

    Attributes: ``steps`` (``PlanStep``: name, state, reason, diff, cost, tokens); ``dollars`` (what the steps that
    would run cost: model calls by their tokens, with an answer as long as the one before or an assumed one, other
    steps what they had cost before; None when that is unknown).
    """

    def __init__(self, run_id: str, steps: list[PlanStep]) -> None:
        self.run_id = run_id
        self.steps = steps
        open_ = [step for step in steps if step.state in ("changed", "unknown")]
        costs = [step.cost for step in open_]
        self.dollars: Decimal | None = (
            None if any(c is None for c in costs) else sum((c for c in costs if c), Decimal(0))
        )

    def __str__(self) -> str:
        lines = [f"{self.run_id} · plan"]
        for step in self.steps:
            lines.append(f"  {step.state:<8} {step.name}" + (f" · {step.reason}" if step.reason else ""))
            if step.tokens is not None:
                lines.append(f"             {step.tokens}, about {money(step.cost)}")
            lines += [f"             {line}" for line in step.diff.splitlines()]
        if any(step.state in ("changed", "unknown") for step in self.steps):
            lines.append(f"  estimated cost of the steps shown: {money(self.dollars)}; what follows them is not known")
        return "\n".join(lines)


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
        if self.status == "cancelled":
            raise RunCancelled(f"run {self.id} was cancelled.")
        raise AgentflowError(f"run {self.id} is {self.status}: it has no result yet. Run it again to go on.")

    def cancel(self, *, compensate: bool = False) -> Run:
        """End the run, wherever it executes, and the runs that its body has started; open tasks are withdrawn.

        From here on nothing more is committed for it: a process that executes it is refused, and stops at its next
        commit or sign of life. A model call in flight is paid for, and its answer is not kept.

        Args:
            compensate: undo its steps that have a ``compensate=``, in reverse order, before it counts as cancelled. Its
                workflow has to be defined in this program; otherwise that is done when it is next run.

        Returns:
            The cancelled run; awaiting it gives it at once.

        Raises:
            UsageError: it has completed or failed.
        """
        self._document = control.cancel(self._journal, self.id, compensate=compensate)
        if compensate and self._workflow is not None and self.status != "cancelled":
            with contextlib.suppress(RunCancelled):
                context = contextvars.copy_context()
                context.run(here.set, None)
                context.run(run_coroutine, self._workflow.again(self._document))
        return _Cancelled(self._journal, rundocs.find(self._journal, self.id), self._workflow)

    def retry(self, *, from_step: str | None = None) -> Any:
        """Go on with the run and give its result: ``await run.retry(from_step="draft")``; in plain code without await.

        Args:
            from_step: a step's name or id: its record and those of all steps that were started after it are dropped,
                and done anew where the code asks for them. Of several of that name the first counts. None: as
                ``await run``, what is recorded stays, and a failed step is tried again.

        Raises:
            UsageError: there is no such step, or the workflow is not defined in this program.
        """
        rerun: tuple[str, ...] = ()
        if from_step is not None:
            rows = rundocs.rows(self._journal, self.id, undone=True)
            first = next((row for row in rows if from_step in (row.head["name"], row.head["occ"])), None)
            if first is None:
                names = ", ".join(dict.fromkeys(repr(row.head["name"]) for row in rows)) or "none"
                raise UsageError(f"retry(from_step={from_step!r}): run {self.id} has no such step. It has: {names}.")
            rerun = tuple(row.head["occ"] for row in rows if row.head["s0"] >= first.head["s0"] and not row.undone)
        resumed = self._code().again(rundocs.find(self._journal, self.id), rerun)
        return run_coroutine(resumed) if self._code().blocking else resumed

    def _code(self) -> Any:
        if self._workflow is None:
            raise UsageError(
                f"run {self.id}: its workflow {self.workflow!r} is not defined in this program; import it first."
            )
        return self._workflow

    def __await__(self) -> Generator[Any, Any, Any]:
        resumed: Generator[Any, Any, Any] = self._code().again(self._document).__await__()
        return resumed

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.status}>"


class _Cancelled(Run):
    def __await__(self) -> Generator[Any, Any, Any]:
        return self
        yield  # a generator, which gives the run at once


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
        elif wait["kind"] == "batch":
            lines.append(f"batch {wait['id']} ({wait['requests']} requests to {wait['model']}, {wait['status']})")
        elif "command" in wait:
            end = f" until {moment(wait['deadline']):%Y-%m-%d %H:%M:%S} UTC" if wait.get("deadline") else ""
            lines.append(f"{wait['kind']} {wait['name']!r}{end}: {wait['command']}")
        else:
            lines.append(f"{wait['kind']} until {moment(wait['until'])}" if "until" in wait else wait["kind"])
    return Waiting(f"run {run_id} waits for {'; '.join(lines)}. Run it again afterwards.", run_id, waits)
