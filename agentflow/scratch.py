"""The scope of steps that stand outside a workflow: cells of a notebook, lines of a script."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from agentflow import journal as journals
from agentflow.calls import Call
from agentflow.errors import JournalError
from agentflow.journal import Journal
from agentflow.layout import default_path
from agentflow.observers import begin as begin_observing
from agentflow.run import Execution
from agentflow.settings import log, only_looking, settings

_scopes: dict[str, Execution] = {}
_at_exit: list[Any] = []


def driver(call: Call) -> Any:
    """``drive.drive``, loaded when a step is awaited: plain code never does that, and needs no event loop."""
    from agentflow.drive import drive

    call.ex.driver = drive
    return drive(call)


def open_journal() -> Journal:
    """The project's journal: ``configure(path=)``, ``AGENTFLOW_PATH``, or ``.agentflow`` at its root."""
    return Journal.open(settings.path or default_path())


def scratch() -> Execution:
    """The scratch scope of the project's journal in this process."""
    only_looking()
    journal = open_journal()
    scope = _scopes.get(journal.id)
    if scope is None or scope.journal is not journal:
        scope = Execution(journal, "scratch", "scratch", driver, on_change="rerun", scratch=True)
        scope.number = int(scope.session)
        _scopes[journal.id] = scope
        if not _at_exit:
            _at_exit.append(atexit.register(_note_saved))
    scope.observers = begin_observing()
    return scope


def _note_saved() -> None:
    """A scratch scope has no end but that of its process: only then is known what it did not pay again."""
    for scope in _scopes.values():
        if not scope.journal.closed and (ops := scope.saved_row()):
            try:
                scope.journal.commit(ops)
            except JournalError as error:
                log.warning("what replays saved could not be noted in the ledger: %s", error)


def forget(folder: Path) -> None:
    """Close this process's journals in a directory and below it, which then can be removed."""
    for journal in list(journals._journals.values()):
        if isinstance(journal.path, Path) and journal.path.is_relative_to(folder):
            _scopes.pop(journal.id, None)
            journal.close()
