"""``agentflow runs``: what ran."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from agentflow import replies, runs, shapes
from agentflow.cli import output
from agentflow.cli.complete import complete_run
from agentflow.cli.watch import follow, waits
from agentflow.durations import words
from agentflow.errors import BudgetExceeded, JournalError, RunBusy, RunCancelled, RunNotFound, UsageError, Waiting
from agentflow.handles import Run
from agentflow.loading import load
from agentflow.purge import Purged
from agentflow.records import StepRecord, money
from agentflow.rundiff import StepDifference

app = typer.Typer(help="What ran, and what its steps did.", no_args_is_help=True, rich_markup_mode=None)
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RUN = Annotated[
    str,
    typer.Argument(metavar="RUN", help="The run's id, or enough of its beginning or end.", autocompletion=complete_run),
]
OTHER = Annotated[str, typer.Argument(metavar="OTHER", help="The run to compare with.", autocompletion=complete_run)]
MODULE = Annotated[
    str | None,
    typer.Option("--module", "-m", metavar="MODULE:NAME", help="Your code: app:flow, app.py:flow or app."),
]
FROM = Annotated[str | None, typer.Option("--from", metavar="STEP", help="Name or id of the first step to do anew.")]
RESULT = Annotated[
    list[str] | None,
    typer.Option("--result", metavar="STEP=JSON", help="Go on with this result instead of running the step."),
]
# How a command that runs something ends.
EXIT = {"completed": 0, "failed": 1, "waiting": 3}


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
        return output.data([shapes.summary(run) for run in found])
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
def show(run_id: RUN, json: JSON = False) -> None:
    """One run and its steps."""
    run = _found(run_id)
    steps = run.steps
    if json:
        return output.data(shapes.full(run))
    took = (run.completed_at - run.started_at).total_seconds() if run.completed_at else None
    output.fields(
        (
            ("run", run.id),
            ("workflow", run.workflow),
            ("status", run.status),
            ("fork of", run.parent and run.parent + (f", from {run.forked_at} on" if run.forked_at else "")),
            ("tick", output.when(run.tick)),
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
def resume(run_id: RUN, module: MODULE = None, json: JSON = False) -> None:
    """Go on with a run that failed, was interrupted or has been answered."""
    run = _found(run_id)
    if run.status != "completed":
        return _go_on(run, module, json)
    output.words(f"{run.id} is completed; there is nothing to go on with. `runs retry --from STEP` does steps anew.")
    _told(run, json)


@app.command()
def retry(
    run_id: RUN,
    from_: FROM = None,
    result: RESULT = None,
    module: MODULE = None,
    json: JSON = False,
) -> None:
    """Do a step and what followed it anew; earlier steps are replayed."""
    run = _found(run_id) if module is None else _with_code(_found(run_id), module)
    _go_on(run.retry(from_, results=_results(result)), module, json, needed=False)


@app.command()
def fork(
    run_id: RUN,
    from_: FROM = None,
    input_: Annotated[
        str | None, typer.Option("--input", metavar="JSON", help="The fork's input, or the arguments to change.")
    ] = None,
    result: RESULT = None,
    module: MODULE = None,
    json: JSON = False,
) -> None:
    """Begin a new run with the records that a run has before a step."""
    run = _found(run_id) if module is None else _with_code(_found(run_id), module)
    given = {} if input_ is None else {"input": _json(input_, "--input")}
    _go_on(run.fork(from_, results=_results(result), **given), module, json, needed=False)


@app.command()
def diff(run_id: RUN, other: OTHER, json: JSON = False) -> None:
    """Where two runs part: the first step that differs, prompts, outputs, costs."""
    found = _found(run_id).diff(_found(other))
    if json:
        return output.data(
            {name: getattr(found, name) for name in ("left", "right", "same", "input", "output")}
            | {"first": found.first.name if found.first else None}
            | {name: shapes.dollars(getattr(found, name)) for name in ("left_cost", "right_cost", "cost")}
            | {"steps": [_step_difference(each) for each in found.steps]}
        )
    for line in str(found).splitlines():
        output.console().print(output.clean(line), soft_wrap=True)


def _step_difference(each: StepDifference) -> dict[str, Any]:
    names = ("name", "state", "what", "given", "output")
    costs = {name: shapes.dollars(getattr(each, name)) for name in ("left_cost", "right_cost")}
    return {name: getattr(each, name) for name in names} | costs


@app.command()
def export(
    run_id: RUN,
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The file; .html makes a page. None: JSON on stdout.")
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what models were asked and answered, for tests marked recorded. The run may be `scratch`: "
            "all that cells of notebooks and lines of scripts asked outside workflows.",
        ),
    ] = None,
    json: JSON = False,
) -> None:
    """One run in one file, JSON or a page, without secrets; or its model calls as a recording for tests."""
    if run_id == replies.SCRATCH and (recording is None or path is not None):
        raise UsageError("what stands outside workflows is exported as a recording only: --recording FILE.")
    run = _found(run_id) if run_id != replies.SCRATCH else None
    if run is not None and path is not None:
        output.words(f"{run.id} written to {run.export(path)}.")
    if recording is not None:
        if not output.has_journal():
            raise RunNotFound("nothing was asked here outside workflows.")
        known = run_id if run is None else run.id
        count = replies.export_recording(known, recording)
        if json:
            return output.data({"run": known, "recording": str(recording), "calls": count})
        calls = "1 model call" if count == 1 else f"{count} model calls"
        return output.words(f"{calls} of {known} written to {recording}.")
    if run is not None and path is None:
        output.data(run.as_tree())


@app.command()
def purge(
    older_than: Annotated[str, typer.Option("--older-than", metavar="AGE", help="Such as 30d or 12h; 0 takes all.")],
    status: Annotated[
        list[str] | None, typer.Option(help="completed, failed, cancelled (these by default), waiting, interrupted.")
    ] = None,
    workflow: Annotated[str | None, typer.Option(help="Only runs of this workflow.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would go, and remove nothing.")] = False,
    json: JSON = False,
) -> None:
    """Remove the records of runs that ended long ago. Results that runs share stay."""
    age = float(older_than) if older_than.isdigit() else older_than
    done = Purged(dry_run=dry_run)
    if output.has_journal():
        done = runs.purge(older_than=age, status=status or None, workflow=workflow, dry_run=dry_run)
    if json:
        return output.data({name: getattr(done, name) for name in ("runs", "rows", "kept", "dry_run")})
    for run_id in done.runs:
        output.console().print(output.cell(run_id))
    for run_id, why in done.kept.items():
        output.words(f"{run_id} stays: {why}.")
    output.words(f"{done}.")


@app.command()
def watch(
    run_id: Annotated[
        str | None, typer.Argument(metavar="RUN", help="None: all runs.", autocompletion=complete_run)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Follow a run live until it has ended, or all runs until Ctrl-C."""
    run = None if run_id is None else _found(run_id)
    if run is None and not output.has_journal():
        return
    follow(run, json)
    if run is not None:
        raise typer.Exit(EXIT.get(runs.get(run.id).status, 1))


def _found(run_id: str) -> Run:
    if not output.has_journal():
        raise RunNotFound(f"no run {run_id!r}.")
    return runs.get(run_id)


def _with_code(run: Run, module: str) -> Run:
    flow = load([module]).get(run.workflow)
    if flow is None:
        raise UsageError(f"{module!r} has no workflow {run.workflow!r}, to which run {run.id} belongs.")
    return flow.get(run.id)


def _go_on(run: Run, module: str | None, json: bool, *, needed: bool = True) -> None:
    """Run it with the user's code, where that was named; the exit code tells how it ended."""
    if module is None and needed:
        raise UsageError(
            f"run {run.id} needs its code: agentflow runs resume {run.id} --module app:flow, where app.py defines "
            f"{run.workflow!r}."
        )
    if module is None:
        output.words(f"{run.id} goes on with: agentflow runs resume {run.id} --module app:flow, or with a worker.")
        return _told(run, json)
    with_code = _with_code(run, module)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is not the data
            with_code.run_sync()
    except (RunBusy, JournalError, RunCancelled, BudgetExceeded):
        raise
    except Exception as error:
        if runs.get(run.id).status not in ("failed", "waiting"):
            raise
        if not isinstance(error, Waiting):
            output.words(f"{type(error).__name__}: {error}")
    ended = runs.get(run.id)
    _told(ended, json)
    if code := EXIT.get(ended.status, 1):
        raise typer.Exit(code)


def _told(run: Run, json: bool) -> None:
    if json:
        return output.data(shapes.full(run))
    output.console().print(output.cell(f"{run.id} {run.status}"))
    if run.status == "completed" and run.output is not None:
        output.console().print(output.cell(output.json_text(run.output)))
    for wait in run.waiting_on:
        output.words(f"It waits for {waits(wait)}")


def _json(text: str, what: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"{what} is not JSON ({error}); text needs its quotes: '\"text\"'.") from None


def _results(given: list[str] | None) -> dict[str, Any] | None:
    if not given:
        return None
    found = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--result {each}: write STEP=JSON, such as draft='\"a text\"'.")
        found[name] = _json(text, f"--result {name}")
    return found


@app.command()
def cancel(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    compensate: Annotated[bool, typer.Option("--compensate", help="Undo its steps when it is next run.")] = False,
    json: JSON = False,
) -> None:
    """End a run wherever it executes, and the runs it has started. Its open tasks are withdrawn."""
    if not output.has_journal():
        raise RunNotFound(f"no run {run_id!r}.")
    run = runs.cancel(run_id, compensate=compensate)
    if json:
        return output.data(shapes.summary(run))
    output.console().print(output.cell(f"{run.id} {run.status}"))
    if run.status != "cancelled":
        output.words("Its compensations run, and it is cancelled, when its program runs it again.")


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
