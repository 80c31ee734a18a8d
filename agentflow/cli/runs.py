"""``agentflow runs``: what ran."""

from __future__ import annotations

import asyncio
import inspect
from typing import Annotated, Any

import orjson
import typer

from agentflow import codec, rundocs, runs
from agentflow.cli import load, output
from agentflow.durations import words
from agentflow.errors import RunNotFound, UsageError
from agentflow.handles import Run
from agentflow.records import StepRecord, moment, money
from agentflow.scratch import open_journal

app = typer.Typer(help="What ran, and what its steps did.", no_args_is_help=True, rich_markup_mode=None)
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="running, waiting, completed, failed, ...")] = None,
    workflow: Annotated[str | None, typer.Option(help="Only runs of this workflow.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    json: JSON = False,
) -> None:
    """Runs, newest first."""
    found = runs.list(status=status, workflow=workflow, limit=limit) if output.has_journal() else []
    if json:
        return output.data([summary(run) for run in found])
    if not found:
        return output.words("No runs.")
    output.table(
        ("run", "workflow", "status", "started", ">paid", ">saved"),
        (
            (r.id, r.workflow, r.status, output.when(r.started_at), money(r.cost), money(r.saved))
            for r in found
        ),
    )  # fmt: skip


@app.command()
def show(run_id: Annotated[str, typer.Argument(metavar="RUN")], json: JSON = False) -> None:
    """One run and its steps. RUN is its id, or enough of its beginning or end."""
    if not output.has_journal():
        raise RunNotFound(f"no run {run_id!r}.")
    run = runs.get(run_id)
    steps = run.steps
    if json:
        more = {"input": run.input, "output": run.output, "error": run.error, "steps": [step(s) for s in steps]}
        return output.data(summary(run) | more)
    took = (run.completed_at - run.started_at).total_seconds() if run.completed_at else None
    output.fields(
        (
            ("run", run.id),
            ("workflow", run.workflow),
            ("status", run.status),
            ("started", output.when(run.started_at)),
            ("took", None if took is None else words(took)),
            ("paid", f"{money(run.cost)}, saved {money(run.saved)}"),
            ("input", output.json_text(run.input)),
            ("output", output.json_text(run.output) if run.status == "completed" else None),
            ("error", run.error),
            *(("waits for", waits(wait)) for wait in run.waiting_on),
        )
    )
    if steps:
        output.console().print()
        output.table(("step", "status", ">attempts", ">took", ">cost", "model"), (_row(s) for s in steps))
    for each in steps:
        if each.error:
            output.console().print(output.cell(f"{each.name}: {each.error}", "red"))


@app.command()
def plan(
    workflow: Annotated[
        str, typer.Argument(metavar="MODULE:ATTRIBUTE", help="The workflow, such as app:triage or app.py:triage.")
    ],
    input: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="The workflow's argument, or an object with its arguments by name."),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Plan this run, with the input it has.")] = None,
    json: JSON = False,
) -> None:
    """What a run would do now: each step reused, changed (with the difference) or unknown, and what it may cost.

    Imports the module named, runs the workflow's function against the records, and spends nothing.
    """
    flow = load.workflow(workflow)
    if run is not None:
        if input is not None:
            raise UsageError("--run has its own input. Leave out --input, or --run.")
        if not output.has_journal():
            raise RunNotFound(f"no run {run!r}.")
        flow, arguments = _taken_up(flow, run)
    else:
        arguments = _arguments(flow, input)
    with load.looking():
        planned = flow.plan(**arguments)
        found = asyncio.run(planned) if inspect.isawaitable(planned) else planned
    if not json:
        return print(found)
    steps = [
        {"name": s.name, "state": s.state, "reason": s.reason, "diff": s.diff, "cost": output.dollars(s.cost)}
        for s in found.steps
    ]
    output.data({"id": found.run_id, "workflow": flow.name, "steps": steps, "cost": output.dollars(found.dollars)})


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
        return {names[0]: value}
    if isinstance(value, dict) and names:
        return value
    raise UsageError(
        f"--input: workflow {flow.name!r} takes "
        + (f"an object with {', '.join(names)}." if names else "no input. Leave it out.")
    )


def _taken_up(flow: Any, run_id: str) -> tuple[Any, dict[str, Any]]:
    """The workflow as that run, and the arguments that the run was given."""
    document = rundocs.find(open_journal(), run_id)
    if document["workflow"] != flow.name:
        raise RunNotFound(f"run {document['id']} belongs to workflow {document['workflow']!r}, not to {flow.name!r}.")
    return flow.options(run_id=document["id"]), codec.decode(document["input"])


def _row(record: StepRecord) -> tuple[Any, ...]:
    took = record.duration
    return (
        f"{'  ' if record.parent else ''}{record.name}",
        record.status,
        record.attempts,
        None if took is None else words(took),
        money(record.cost) if record.cost is not None or record.model else None,
        record.model,
    )


def waits(wait: dict[str, Any]) -> str:
    if wait["kind"] == "task":
        answer = wait.get("command") or f"agentflow tasks approve {wait['id']}"
        return f"{wait['title'] or wait['type']}: {answer}"
    return str(wait["kind"])


def _with_moments(wait: dict[str, Any]) -> dict[str, Any]:
    """Times as in all other JSON here, not as seconds since 1970."""
    return wait | {name: moment(wait[name]) for name in ("deadline", "until") if name in wait}


def summary(run: Run) -> dict[str, Any]:
    """One run in the JSON of ``runs list``."""
    return {
        "id": run.id,
        "workflow": run.workflow,
        "status": run.status,
        "started_at": run.started_at,
        "completed_at": run.completed_at,
        "cost": output.dollars(run.cost),
        "saved": output.dollars(run.saved),
        "waiting_on": [_with_moments(wait) for wait in run.waiting_on],
        "error": run.error,
    }


def step(record: StepRecord) -> dict[str, Any]:
    """One step in the JSON of ``runs show``."""
    names = (
        "name", "id", "kind", "status", "started_at", "completed_at", "duration", "attempts", "idempotency_key",
        "output", "error", "usage", "model", "parent", "in_doubt",
    )  # fmt: skip
    return {name: getattr(record, name) for name in names} | {"cost": output.dollars(record.cost)}
