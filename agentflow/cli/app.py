"""The commands, the place of the journal, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import agentflow
from agentflow import errors, layout
from agentflow.cli import cost, demo, doctor, journal, output, plan, runs, tasks, ui, worker
from agentflow.redact import redact
from agentflow.settings import configure, settings

app = typer.Typer(
    help="Durable AI workflows: look at runs, go on with them, answer what they ask people.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(runs.app, name="runs")
app.add_typer(tasks.app, name="tasks")
app.command("cost")(cost.cost)
app.command("demo")(demo.demo)
app.add_typer(journal.app, name="journal")
app.command("worker")(worker.worker)
app.command("ui")(ui.ui)
app.command("doctor")(doctor.doctor)
runs.app.command("plan")(plan.plan)
app.command("plan")(plan.plan)

# The first that fits; whatever else agentflow raises on purpose is a plain failure.
_CODES = (
    (errors.Waiting, 3),
    ((errors.RunNotFound, errors.TaskNotFound), 4),
    (errors.BudgetExceeded, 5),
    (errors.UsageError, 2),
)


def _version(asked: bool) -> None:
    if asked:
        print(f"agentflow {agentflow.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run(args: Sequence[str] | None = None) -> int:
    """One command; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if settings.path is None and not os.environ.get("AGENTFLOW_PATH"):
        configure(path=layout.default_path(Path.cwd()))
    try:
        app(args=None if args is None else list(args), prog_name="agentflow")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 1
    except errors.AgentflowError as error:
        print(f"agentflow: {output.clean(redact(' '.join(str(error).split())))}", file=sys.stderr)
        return next((code for kinds, code in _CODES if isinstance(error, kinds)), 1)
    return 0
