"""``agentflow journal``: looked after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentflow import upkeep
from agentflow.cli import output
from agentflow.errors import RunNotFound
from agentflow.journal import Journal, Place, default_path, exists
from agentflow.scratch import open_journal
from agentflow.settings import settings

app = typer.Typer(help="The journal: check, measure, copy.", no_args_is_help=True, rich_markup_mode=None)
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SHOWN = 50


def place() -> Place:
    """Where the journal is; that there is none is an error."""
    where = settings.path or default_path()
    if not exists(where):
        raise RunNotFound(f"no journal in {where}. AGENTFLOW_PATH=... or another directory looks elsewhere.")
    return where.resolve() if isinstance(where, Path) else where


@app.command()
def verify(json: JSON = False) -> None:
    """Whether all of it is there and can be read. Changes nothing; exit code 1 when something is wrong."""
    found = upkeep.verify(place())
    if json:
        output.data({"path": str(found.path), "ok": bool(found), "rows": found.rows, "problems": found.problems})
    else:
        for problem in found.problems[:_SHOWN]:
            output.console().print(output.cell(problem), soft_wrap=True)
        if len(found.problems) > _SHOWN:
            output.words(f"... and {len(found.problems) - _SHOWN} more; --json shows all.")
        output.words(f"{found.path}: {found.rows} records, " + ("all well." if found else "not all well."))
    if not found:
        raise typer.Exit(1)


@app.command()
def stats(json: JSON = False) -> None:
    """How large it is, and what it holds."""
    found = upkeep.stats(place())
    if json:
        return output.data(found)
    runs = ", ".join(f"{count} {status}" for status, count in sorted(found["runs"].items())) or "none"
    free = "" if found["free_bytes"] is None else f", {size(found['free_bytes'])} of it free"
    output.fields(
        (
            ("journal", found["path"]),
            ("size", size(found["bytes"]) + free),
            ("commits", found["commits"]),
            ("runs", runs),
        )
    )
    output.console().print()
    output.table(
        ("records", ">number", ">size"),
        ((name, each["rows"], size(each["bytes"])) for name, each in found["records"].items()),
    )


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that does not exist yet.")],
    json: JSON = False,
) -> None:
    """Make a complete copy, also while programs write to the journal."""
    made = upkeep.backup(place(), target)
    found = upkeep.stats(made)
    if json:
        return output.data({"path": made, "bytes": found["bytes"], "commits": found["commits"]})
    output.console().print(output.cell(made))
    output.words(f"{size(found['bytes'])}. To look into it: AGENTFLOW_PATH={made} agentflow runs list")


@app.command()
def copy(
    target: Annotated[
        str, typer.Argument(metavar="PLACE", help="Another journal, a directory or a URL; made if it is not there.")
    ],
    run: Annotated[list[str] | None, typer.Option("--run", help="Only this run; may be given several times.")] = None,
    json: JSON = False,
) -> None:
    """Copy runs into another journal. Nothing there is replaced."""
    place()
    made = Journal.open(target)
    done = upkeep.copy(open_journal(), made, run or None)
    if json:
        return output.data({name: getattr(done, name) for name in ("runs", "rows", "skipped")})
    for run_id in done.runs:
        output.console().print(output.cell(run_id))
    for run_id, why in done.skipped.items():
        output.words(f"{run_id} was not copied: {why}.")
    output.words(f"{len(done.runs)} runs, {done.rows} records copied to {made.path}.")


def size(count: int) -> str:
    """Bytes for people."""
    number = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return ""
