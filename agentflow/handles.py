"""What a program holds of a run: ``Run`` (what the journal has) and ``Plan`` (what a run would do)."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Coroutine, Generator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentflow import codec, rundocs
from agentflow.calls import here
from agentflow.context import view
from agentflow.errors import AgentflowError, RunCancelled, StepFailed, UsageError, Waiting
from agentflow.journal import Journal
from agentflow.rich import Listed, Rich
from agentflow.words import moment

if TYPE_CHECKING:
    from agentflow.records import PlanStep, StepRecord
    from agentflow.rundiff import RunDiff

# The workflows defined in this process, by name: a run finds its code here when it is awaited.
workflows: dict[str, Any] = {}


_UNSET: Any = object()


class Plan(Rich):
    """What a run would do now: one line a step, nothing spent.

    ``print(plan)`` shows each step with its state, what differs from its record, and an estimate of its cost.

    Attributes: ``steps`` (``PlanStep``: name, state, reason, diff, cost, tokens); ``dollars`` (estimated, for the steps
    that would run as far as they are known; None when the cost of one is unknown).
    """

    def __init__(self, run_id: str, steps: list[PlanStep]) -> None:
        self.run_id = run_id
        self.steps = steps
        from agentflow import plans

        dollars, unknown = plans.total(steps)
        self.dollars: Decimal | None = None if unknown else dollars

    def __str__(self) -> str:
        from agentflow import plans

        return plans.render(self.run_id, self.steps)


class Run(Rich):
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
        return _in_words(error) if error else None

    @property
    def steps(self) -> list[StepRecord]:
        """The recorded steps, in the order in which they started; ``status`` is completed, failed or undone."""
        return Listed(view(row) for row in rundocs.rows(self._journal, self.id, undone=True))

    @property
    def waiting_on(self) -> list[dict[str, Any]]:
        return list(self._document.get("waiting_on", ()))

    @property
    def cost(self) -> Decimal:
        """Dollars paid for this run's model calls in all its executions; calls of unknown price not counted."""
        if self.status in ("running", "interrupted", "cancelled"):
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

    @property
    def tick(self) -> Any:
        """The instant of the schedule's tick whose run this is; None for a run that somebody started."""
        return moment(self._document.get("tick"))

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
        commit or sign of life. A model call in flight is paid for, and its answer is not kept. Batches and calls in the
        background are cancelled at their providers, within seconds or else by a worker; what they answer nevertheless
        has been paid for and is recorded.

        Args:
            compensate: undo its steps that have a ``compensate=``, in reverse order, before it counts as cancelled. Its
                workflow has to be defined in this program; otherwise that is done when it is next run.

        Returns:
            The cancelled run; awaiting it gives it at once.

        Raises:
            UsageError: it has completed or failed.
        """
        from agentflow import control, leftover

        self._document = control.cancel(self._journal, self.id, compensate=compensate)
        leftover.cancel(self._journal, self.id)
        if compensate and self._workflow is not None and self.status != "cancelled":
            with contextlib.suppress(RunCancelled):
                run_apart(self._workflow.again(self._document))
        return _Cancelled(self._journal, rundocs.find(self._journal, self.id), self._workflow)

    @property
    def parent(self) -> str | None:
        """The id of the run that this one is a fork of, else None."""
        return self._document.get("parent")

    @property
    def forked_at(self) -> str | None:
        """The step from which on a fork does everything anew; None where it took along all records."""
        return self._document.get("forked_at")

    def retry(self, from_step: str | None = None, *, results: Mapping[str, Any] | None = None) -> Run:
        """Let the run go on from a step: ``result = await run.retry(from_step="draft")``.

        That step and those that started after it had ended are done anew, earlier ones are replayed; steps with an
        ``idempotency_key`` keep their result unless it is ``from_step`` itself. Nothing is run before the run is
        awaited (or ``run_sync()`` is called, or a worker takes it up): until then its status is interrupted.

        Args:
            from_step: name or id of a recorded step; of several of one name the first. None: where the run failed.
            results: for steps, by name or id, the result to go on with instead of running them: the answer of a model
                call, a ``Decision`` (or True or False) of a human task. A step that is skipped so is not undone either.

        Returns:
            This run.

        Raises:
            UsageError: no such step, or there is nothing to retry.
            RunBusy: a process is running it.
            RunCancelled: it was cancelled.
        """
        from agentflow import redo

        self._document = redo.retry(self._journal, self._document, from_step, results)
        return self

    def fork(
        self, from_step: str | None = None, *, input: Any = _UNSET, results: Mapping[str, Any] | None = None
    ) -> Run:
        """A new run that begins with this one's records: ``result = await run.fork(from_step="draft", input=other)``.

        The records before ``from_step`` are copied and cost nothing; what this run did is never undone by the fork.
        The fork has an id of its own and remembers this run as its ``parent``. Nothing runs before it is awaited.

        Args:
            from_step: name or id of the first step to do anew, as in ``retry``. None: all records are taken along, and
                what is reused follows from what the steps are given.
            input: the fork's input: the only argument, or a dict of the arguments to change. Not given: the same.
            results: as in ``retry``.

        Raises:
            UsageError: no such step, or an input that the workflow does not take.
        """
        from agentflow import redo

        arguments = None
        if input is not _UNSET:
            flow = self._workflow
            arguments = redo.arguments_of(self._document, input, None if flow is None else flow.parameters)
            arguments = arguments if flow is None else flow.accepted(arguments)
        made = redo.fork(self._journal, self._document, from_step, arguments, results)
        return Run(self._journal, made, self._workflow)

    def diff(self, other: Run | str) -> RunDiff:
        """Where this run and another part; ``print(run.diff(other))`` is readable at 80 columns.

        Steps are compared by what they were given and gave, wherever they stand; equal ones belong together first.

        Args:
            other: a run, or an id.

        Returns:
            ``RunDiff``, true when they differ: ``first`` (the first step that differs), ``steps`` (each with ``name``,
            ``state``, ``given`` or prompt and ``output`` as differences), ``input``, ``output``, ``cost``.
        """
        from agentflow import rundiff

        if not isinstance(other, Run):
            other = Run(self._journal, rundocs.find(self._journal, other))
        costs = {self.id: self.cost, other.id: other.cost}
        return rundiff.diff(self._journal, self._document, other._document, lambda document: costs[document["id"]])

    def export(self, path: str | os.PathLike[str], *, recording: bool = False) -> Path:
        """Write the run to one file: JSON, or with the ending ``.html`` a page that needs nothing else.

        It holds inputs, outputs, prompts, replies and decisions; known key patterns and what ``configure(redact=)``
        names are masked. The file is readable by you alone. An existing one is replaced.

        Args:
            path: the file. Its directory has to exist.
            recording: True writes what models were asked and answered, and nothing else, for a test marked
                ``recorded`` to play; see ``agentflow.testing.export_recording``. The file must not exist yet.

        Returns:
            The file's path.
        """
        from agentflow import export, replies

        if recording:
            replies.export_recording(self.id, path, journal=self._journal)
            return Path(path).expanduser()
        return export.export(self._journal, self._document, self.summary(), path)

    def as_tree(self) -> dict[str, Any]:
        """What ``export`` writes as JSON."""
        from agentflow import export

        return export.tree(self._journal, self._document, self.summary())

    def summary(self) -> dict[str, Any]:
        """The run as plain data: id, workflow, status, parent, times, costs, input, output and error."""
        names = (
            "id", "workflow", "status", "parent", "forked_at", "started_at", "completed_at", "cost", "saved", "input",
            "output", "error", "waiting_on",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def run_sync(self) -> Any:
        """``await run`` for plain code."""

        async def go_on() -> Any:
            return await self

        from agentflow.portal import run_coroutine

        return run_coroutine(go_on())

    def __await__(self) -> Generator[Any, Any, Any]:
        if self._workflow is None:
            raise UsageError(
                f"run {self.id}: its workflow {self.workflow!r} is not defined in this program; import it first."
            )
        return self._go_on(self._workflow).__await__()

    async def _go_on(self, workflow: Any) -> Any:
        try:
            return await workflow.again(self._document)
        finally:
            self._document = rundocs.find(self._journal, self.id)

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.status}>"


def run_apart(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end from plain code, as if it stood in no run."""
    from agentflow.portal import run_coroutine

    context = contextvars.copy_context()
    context.run(here.set, None)
    return context.run(run_coroutine, coroutine)


class _Cancelled(Run):
    def __await__(self) -> Generator[Any, Any, Any]:
        return self
        yield  # a generator, which gives the run at once


def _in_words(error: dict[str, Any]) -> str:
    """Type and message; of a group with those of the first failures in it."""
    text = f"{error['name']}: {error['message']}"
    inner = "; ".join(map(_in_words, error.get("exceptions", ())[:3]))
    return f"{text}: {inner}" if inner else text


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
