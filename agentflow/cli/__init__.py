"""The command line. Everything it needs is imported when it is called, not with the package."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 ok, 1 failed, 2 usage, 3 waiting for a person, 4 not found, 5 over budget.

    Args:
        args: the words after ``agentflow``. None: those of this process.
    """
    from agentflow.cli.app import run

    raise SystemExit(run(args))
