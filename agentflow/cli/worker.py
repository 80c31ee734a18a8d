"""``agentflow worker``: goes on with runs that are due."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from agentflow.cli import output
from agentflow.durations import seconds
from agentflow.loading import load
from agentflow.worker import work


def worker(
    modules: Annotated[
        list[str], typer.Argument(metavar="MODULE:NAME...", help="Your workflows: app:flow, app.py:flow or app.")
    ],
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 10,
    grace: Annotated[str, typer.Option(help="How long steps in flight may take to end when it is stopped.")] = "30s",
    once: Annotated[bool, typer.Option("--once", help="End when nothing is due any more.")] = False,
) -> None:
    """Go on with runs that were interrupted, answered, or whose time has come.

    Stop it with Ctrl-C or SIGTERM: steps in flight are finished and recorded, and the runs are left to the next
    worker. A second time does not wait for the steps. Several workers may share a journal.
    """
    limit = seconds(grace, what="--grace")
    flows = load(modules)
    output.words(f"worker {os.getpid()} · {', '.join(sorted(flows))} · {concurrency} at a time")
    work(flows.values(), concurrency=concurrency, grace=30.0 if limit is None else limit, once=once)
