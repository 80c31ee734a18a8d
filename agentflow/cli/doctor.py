"""``agentflow doctor``: whether everything that agentflow needs is there."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import agentflow
from agentflow import layout, leftover, rundocs, schedules, tasks, upkeep, worker
from agentflow.cli import output
from agentflow.cli.journal import size
from agentflow.durations import words
from agentflow.errors import JournalError, UsageError
from agentflow.journal import Journal, PostgresURL, default_path, exists
from agentflow.providers import resolve
from agentflow.scratch import open_journal
from agentflow.settings import settings

_PACKAGES = (
    "openai", "anthropic", "pydantic", "diskcache", "tiktoken", "genai-prices", "cronsim", "starlette", "uvicorn",
)  # fmt: skip
_KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY", "AZURE_OPENAI_API_KEY")
_LITTLE_SPACE = 200_000_000
Check = tuple[str, bool | None, str]


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at the installation, the journal, the model and the workers. Exit code 1 when something is wrong.

    Nothing is changed, and no model is asked.
    """
    found = list(_checks())
    if json:
        output.data([{"check": name, "ok": ok, "detail": detail} for name, ok, detail in found])
    else:
        signs = {True: "ok", False: "wrong", None: "note"}
        output.table(("check", "", "detail"), ((name, signs[ok], detail) for name, ok, detail in found))
    if any(ok is False for _, ok, _ in found):
        raise typer.Exit(1)


def _checks() -> Iterator[Check]:
    yield "agentflow", True, f"{agentflow.__version__} in {Path(agentflow.__file__).parent}"
    yield "python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.system()}"
    for name in _PACKAGES:
        try:
            yield name, True, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, False, "not installed: pip install agentflow's requirements again"
    yield from _model()
    yield from _journal()


def _model() -> Iterator[Check]:
    try:
        provider, model = resolve(None)
        yield "model", True, f"{provider}:{model}"
    except UsageError:
        yield "model", None, "no default: set AGENTFLOW_MODEL or configure(model=), or name one in each call"
    there = [name for name in _KEYS if os.environ.get(name)]
    yield "keys", True if there else None, ", ".join(there) or f"none of {', '.join(_KEYS[:2])} is set"


def _journal() -> Iterator[Check]:
    folder = settings.path or default_path()
    if isinstance(folder, PostgresURL):
        yield from _database(folder)
        return
    if not exists(folder):
        try:
            layout.check_place(Path(os.path.abspath(folder)))
            yield "journal", None, f"none yet; it will be in {folder}"
        except JournalError as error:
            yield "journal", False, str(error)
        return
    verified = upkeep.verify(folder.resolve(), rows=False)
    wrong = [str(problem) for problem in verified.problems if problem.kind != "leftover"]
    yield "journal", not wrong, "; ".join(wrong) or str(folder)
    yield from (("journal", None, str(each)) for each in verified.problems if each.kind == "leftover")
    free = shutil.disk_usage(folder).free
    yield "disk", free >= _LITTLE_SPACE, f"{size(free)} free"
    if not os.access(folder, os.W_OK):
        yield "journal", False, f"{folder} cannot be written"
    if wrong:
        return
    yield from _runs(open_journal())


def _database(url: PostgresURL) -> Iterator[Check]:
    try:
        if not exists(url):
            yield "journal", None, f"none yet; the schema {url.schema} will be made in {url}"
            return
        journal = open_journal()
    except (JournalError, UsageError) as error:
        yield "journal", False, str(error)
        return
    yield "psycopg", True, metadata.version("psycopg")
    yield "journal", True, str(url)
    from agentflow.pgjournal import about_server

    yield from about_server(url)
    yield from _runs(journal)


def _runs(journal: Journal) -> Iterator[Check]:
    counts: dict[str, Any] = upkeep.stats(journal.path)["runs"]
    yield "runs", True, ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "none"
    open_ = tasks.list()
    yield "tasks", None if open_ else True, f"{len(open_)} wait for an answer" if open_ else "none is open"
    due = sum(1 for _ in worker.due(journal, time.time()))
    workers = worker.enrolled(journal)
    for each in workers:
        about = f"{each['id']}, process {each['pid']}, since {words(max(0.0, time.time() - each['since']))}, serves "
        about += ", ".join(each["workflows"])
        yield "worker", True if each["alive"] else None, about if each["alive"] else f"{about}; it was killed"
    served = {name for each in workers if each["alive"] for name in each["workflows"]}
    yield from (_schedule(journal, each, each.workflow in served) for each in schedules.known(journal))
    if left := sum(1 for _ in leftover.left(journal)):
        yield "cancelled", None, f"{left} cancelled runs may have something at a provider; a worker collects it"
    if due and not any(each["alive"] for each in workers):
        yield "due", None, f"{due} could go on and there is no worker: agentflow worker app:flows"
    else:
        yield "due", True, f"{due} could go on now"


def _schedule(journal: Journal, known: schedules.Known, served: bool) -> Check:
    about = f"{known.workflow}: {known.text}"
    if known.next is None:
        about += ", no next tick can be told: its time zone is not known here"
    else:
        about += f", next tick {known.next:%Y-%m-%d %H:%M %Z}"
    if known.last is not None and known.last_run is not None:
        document = rundocs.read(journal, known.last_run)
        status = "purged" if document is None else rundocs.status_of(journal, document)
        about += f", last tick {known.last:%Y-%m-%d %H:%M %Z} ({known.last_run}, {status})"
    else:
        about += ", no tick yet"
    return "schedule", True if served else None, about if served else f"{about}; no worker runs it"
