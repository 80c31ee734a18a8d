"""The scope of steps that stand outside a workflow: cells of a notebook, lines of a script."""

from __future__ import annotations

from agentflow.drive import drive
from agentflow.journal import Journal
from agentflow.layout import default_path
from agentflow.run import Execution
from agentflow.settings import only_looking, settings

_scopes: dict[str, Execution] = {}


def open_journal() -> Journal:
    """The project's journal: ``configure(path=)``, ``AGENTFLOW_PATH``, or ``.agentflow`` at its root."""
    return Journal.open(settings.path or default_path())


def scratch() -> Execution:
    """The scratch scope of the project's journal in this process."""
    only_looking()
    journal = open_journal()
    scope = _scopes.get(journal.id)
    if scope is None or scope.journal is not journal:
        scope = Execution(journal, "scratch", "scratch", drive, on_change="rerun", scratch=True)
        scope.number = int(scope.session)
        _scopes[journal.id] = scope
    return scope
