"""Runs, looked at from outside. These functions read; they resume nothing."""

from __future__ import annotations

import builtins

from agentflow import rundocs
from agentflow.handles import Run
from agentflow.scratch import open_journal


def list(*, status: str | None = None, workflow: str | None = None, limit: int | None = None) -> builtins.list[Run]:
    """Runs, newest first.

    Args:
        status: running, waiting, completed, failed, cancelled or interrupted; None: all.
        workflow: only those of the workflow of this name.
        limit: at most so many. None: all.
    """
    journal = open_journal()
    return [Run(journal, d) for d in rundocs.listed(journal, status=status, workflow=workflow, limit=limit)]


def cancel(run_id: str, *, compensate: bool = False) -> Run:
    """End a run wherever it executes, and the runs that its body has started; see ``Run.cancel``.

    Raises:
        RunNotFound: there is none, or more than one.
        UsageError: it has completed or failed.
    """
    return get(run_id).cancel(compensate=compensate)


def get(run_id: str) -> Run:
    """One run, by its id or by an unambiguous beginning or end of it.

    Raises:
        RunNotFound: there is none, or more than one.
    """
    journal = open_journal()
    return Run(journal, rundocs.find(journal, run_id))
