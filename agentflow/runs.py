"""Runs, looked at from outside. These functions read; they resume nothing."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentflow import rundocs
from agentflow.durations import Duration
from agentflow.handles import Run
from agentflow.rich import Listed
from agentflow.scratch import open_journal

if TYPE_CHECKING:
    from agentflow.purge import Purged


def list(*, status: str | None = None, workflow: str | None = None, limit: int | None = None) -> builtins.list[Run]:
    """Runs, newest first.

    Args:
        status: running, waiting, completed, failed, cancelled or interrupted; None: all.
        workflow: only those of the workflow of this name.
        limit: at most so many. None: all.
    """
    journal = open_journal()
    return Listed(Run(journal, d) for d in rundocs.listed(journal, status=status, workflow=workflow, limit=limit))


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


def purge(
    *,
    older_than: Duration,
    status: str | Sequence[str] | None = None,
    workflow: str | None = None,
    dry_run: bool = False,
) -> Purged:
    """Remove the records of runs that have ended long ago. What they paid for is forgotten with them.

    Results that an ``idempotency_key`` names and the vectors of ``embed`` stay, whichever run made them. Runs that a
    process is executing stay, and so do runs started inside one that stays. The files do not shrink; the space is
    used again.

    Args:
        older_than: seconds or a duration such as ``"30d"``, since the run ended (or began, if it has not ended).
        status: a status or several of completed, failed, cancelled, waiting and interrupted. None: completed, failed
            and cancelled ones.
        workflow: only runs of the workflow of this name. None: all.
        dry_run: True removes nothing and tells what would be removed.

    Returns:
        ``Purged``: ``runs`` (ids), ``rows``, ``kept`` (ids that stay although they are old enough, with the reason).
    """
    from agentflow import purge as purge_

    return purge_.purge(open_journal(), older_than=older_than, status=status, workflow=workflow, dry_run=dry_run)
