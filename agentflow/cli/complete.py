"""What the shell completes: ids of runs and tasks. Says nothing, whatever is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from agentflow.errors import JournalError
from agentflow.journal import Journal, default_path, exists
from agentflow.scratch import open_journal
from agentflow.settings import settings

_MOST = 100


def complete_run(incomplete: str) -> list[str]:
    """Ids of runs that begin so."""
    return list(_keys("r/", incomplete))


def complete_task(incomplete: str) -> list[str]:
    """Ids of tasks that begin so."""
    return list(_keys("h/", incomplete))


def _keys(prefix: str, incomplete: str) -> Iterator[str]:
    journal = _journal()
    if journal is None:
        return iter(())
    return (key.removeprefix(prefix) for key, _ in islice(journal.keys(prefix + incomplete), _MOST))


def _journal() -> Journal | None:
    try:
        return open_journal() if exists(settings.path or default_path()) else None
    except JournalError:
        return None
