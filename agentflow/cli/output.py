"""What commands print: data on stdout, words on stderr, secrets nowhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentflow.redact import redact
from agentflow.scratch import open_journal
from agentflow.settings import settings
from agentflow.shown import clean, json_text

__all__ = [
    "cell", "clean", "console", "data", "fields", "has_journal", "json_text", "table", "when", "words",
]  # fmt: skip

STYLES = {
    **{"completed": "green", "approved": "green", "answered": "green", "running": "cyan", "waiting": "yellow"},
    **{"open": "yellow", "failed": "red", "rejected": "red", "interrupted": "magenta", "cancelled": "dim"},
}


def console(*, stderr: bool = False) -> Console:
    """A console that has no colour when it is piped or ``NO_COLOR`` is set, and cuts nothing off when piped."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if os.environ.get("NO_COLOR"):
        made = Console(
            stderr=stderr, highlight=False, markup=False, emoji=False, color_system=None, width=made.size.width
        )
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 10_000
    return made


def cell(value: Any, style: str = "") -> Text:
    return Text(clean(redact("-" if value is None else str(value))), style=style or STYLES.get(str(value), ""))


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Columns named with a leading ``>`` are numbers, set to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name.lstrip(">").upper(), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(cell, row))
    _print(made)


def fields(pairs: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one a line; values that are None are left out."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None:
            made.add_row(name, cell(value))
    _print(made)


def _print(made: Table) -> None:
    """Without the spaces that fill up lines when there is no terminal."""
    screen = console()
    if screen.is_terminal:
        return screen.print(made)
    with screen.capture() as captured:
        screen.print(made)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def words(text: str) -> None:
    """A remark on stderr."""
    print(clean(redact(text)), file=sys.stderr)


def data(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json_text(value, indent=True) + "\n")


def when(moment: datetime | None) -> str | None:
    """A moment for people, in their time zone."""
    if moment is None:
        return None
    local = moment.astimezone()
    return f"{local:%H:%M:%S}" if local.date() == datetime.now(UTC).astimezone().date() else f"{local:%Y-%m-%d %H:%M}"


def has_journal() -> bool:
    """Whether there is one to look at; looking creates none."""
    from agentflow.journal import default_path, exists

    where = settings.path or default_path()
    if exists(where):
        open_journal()
        return True
    words(f"No journal in {where}. AGENTFLOW_PATH=... or another directory looks elsewhere.")
    return False
