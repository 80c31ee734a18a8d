"""``agentflow plan``, also ``agentflow runs plan``."""

from __future__ import annotations

import asyncio
import inspect
from typing import Annotated, Any

import orjson
import typer

from agentflow import codec, loading, rundocs, shapes
from agentflow.cli import output
from agentflow.errors import RunNotFound, UsageError
from agentflow.scratch import open_journal

JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def plan(
    workflow: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:ATTRIBUTE", help="The workflow, such as app:triage or app.py:triage; with --module, a run."
        ),
    ],
    input: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="The workflow's argument, or an object with its arguments by name."),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Plan this run, with the input it has.")] = None,
    module: Annotated[
        str | None,
        typer.Option("--module", "-m", metavar="MODULE:NAME", help="Your code: runs plan RUN -m app:flow."),
    ] = None,
    json: JSON = False,
) -> None:
    """What a run would do now: each step reused, changed (with the difference) or unknown, and what it may cost.

    Imports the module named, runs the workflow's function against the records, and spends nothing.
    """
    if module is not None:
        if run is not None:
            raise UsageError("name the run once: runs plan RUN --module app:flow, or runs plan app:flow --run RUN.")
        workflow, run = module, workflow
    flow = loading.workflow(workflow)
    if run is not None:
        if input is not None:
            raise UsageError("--run has its own input. Leave out --input, or --run.")
        if not output.has_journal():
            raise RunNotFound(f"no run {run!r}.")
        flow, arguments = _taken_up(flow, run)
    else:
        arguments = _arguments(flow, input)
    with loading.looking():
        planned = flow.plan(**arguments)
        found = asyncio.run(planned) if inspect.isawaitable(planned) else planned
    if not json:
        return print(found)
    steps = [
        {"name": s.name, "state": s.state, "reason": s.reason, "diff": s.diff, "cost": shapes.dollars(s.cost)}
        for s in found.steps
    ]
    output.data({"id": found.run_id, "workflow": flow.name, "steps": steps, "cost": shapes.dollars(found.dollars)})


def _arguments(flow: Any, text: str | None) -> dict[str, Any]:
    """The workflow's arguments by name, from JSON."""
    if text is None:
        return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise UsageError(f"--input is no JSON ({exc}). Text stands in quotes: --input '\"Ada\"'.") from exc
    names = list(inspect.signature(flow.fn).parameters)[1:]
    if len(names) == 1:
        return {names[0]: value} if not _by_name(flow, names[0], value) else value
    if isinstance(value, dict) and names:
        return value
    raise UsageError(
        f"--input: workflow {flow.name!r} takes "
        + (f"an object with {', '.join(names)}." if names else "no input. Leave it out.")
    )


def _by_name(flow: Any, name: str, value: Any) -> bool:
    """Whether an object means the one argument by its name: it has that key alone and is no such argument itself."""
    if not isinstance(value, dict) or list(value) != [name]:
        return False
    try:
        flow.accepted({name: value})
    except UsageError:
        return True
    return False


def _taken_up(flow: Any, run_id: str) -> tuple[Any, dict[str, Any]]:
    """The workflow as that run, and the arguments that the run was given."""
    document = rundocs.find(open_journal(), run_id)
    if document["workflow"] != flow.name:
        raise RunNotFound(f"run {document['id']} belongs to workflow {document['workflow']!r}, not to {flow.name!r}.")
    return flow.options(run_id=document["id"]), codec.decode(document["input"])
