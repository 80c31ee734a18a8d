"""Journals kept as text, so that a later version can show that it still replays them, or refuses them plainly."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentflow import codec, handles, layout
from agentflow.errors import AgentflowError, JournalVersionError, UsageError, Waiting
from agentflow.index import Row, in_key
from agentflow.journal import Add, Journal
from agentflow.providers.common import use_transport
from agentflow.redact import redact
from agentflow.scratch import forget, open_journal
from agentflow.settings import settings

_FORMAT = 1
_LEFT_OUT = ("lease/", "claim/")


@dataclass(frozen=True, slots=True)
class History:
    """What became of one file of ``replay_histories``.

    Attributes:
        file: which one.
        replayed: ids of the runs that were run again and gave what was recorded.
        refused: why its version was refused, None where it was not.
    """

    file: Path
    replayed: list[str]
    refused: str | None = None


def export_history(path: str | os.PathLike[str]) -> int:
    """Write the project's journal as text, one record a line, for ``replay_histories``; how many there are.

    Secrets are masked. Records of which process owned what are left out.

    Raises:
        UsageError: the file exists.
    """
    file = Path(path)
    if file.exists():
        raise UsageError(f"{file} exists already. Remove it, or name another file.")
    journal = open_journal()
    rows = [(key, redact(text)) for key, text in journal.scan("") if not key.startswith(_LEFT_OUT)]
    head = {"agentflow_history": _FORMAT, "layout": layout.LAYOUT_VERSION, "digest": layout.DIGEST_VERSION}
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(head), *(json.dumps(row, ensure_ascii=False) for row in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(rows)


def replay_histories(folder: str | os.PathLike[str], *, workflows: Mapping[str, Any] | None = None) -> list[History]:
    """Run again what is recorded in each ``*.jsonl`` of a folder, with today's code of agentflow and of the workflows.

    Each file is a journal that ``export_history`` wrote, perhaps in an earlier version. Completed runs have to give the
    recorded result, waiting ones to wait for the same; no model is asked, and no step that asks none runs again.
    A journal of a version that is not known has to be refused by ``JournalVersionError``, before anything is read.

    Args:
        folder: where the files are.
        workflows: by name, what the runs were made by. None: the workflows defined in this process.

    Raises:
        AssertionError: names the file, the run and what was different.
        UsageError: there are no files, a file is no history, or the workflow of a run is not defined.
    """
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise UsageError(
            f"{folder} holds no histories (*.jsonl). Write one with agentflow.testing.export_history(path)."
        )
    return [_replay(file, handles.workflows if workflows is None else workflows) for file in files]


def _replay(file: Path, workflows: Mapping[str, Any]) -> History:
    head, rows = _read(file)
    home = Path(tempfile.mkdtemp(prefix="history-"))
    before = settings.path
    transport = use_transport(_Nobody())
    try:
        settings.path = home / "journal"
        if (head["layout"], head["digest"]) != (layout.LAYOUT_VERSION, layout.DIGEST_VERSION):
            return History(file, [], _refusal(file, settings.path, head))
        journal = Journal.open(settings.path)
        journal.commit([Add(key, value) for key, value in rows])
        # Taken before anything is run: a run that fails to replay writes to its document.
        documents = [json.loads(value) for key, value in rows if key.startswith("r/")]
        return History(file, [_again(file, journal, d, workflows) for d in documents if d["status"] in _REPLAYED])
    finally:
        use_transport(transport)
        settings.path = before
        forget(home)
        shutil.rmtree(home, ignore_errors=True)


_REPLAYED = ("completed", "waiting")


def _read(file: Path) -> tuple[dict[str, Any], list[list[str]]]:
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        head: dict[str, Any] = lines[0]
        known = head["agentflow_history"] == _FORMAT and {"layout", "digest"} <= head.keys()
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{file} is no history: {error!r}.") from error
    if not known:
        raise UsageError(f"{file} is a history of a format that this version does not read.")
    return head, lines[1:]


def _refusal(file: Path, path: Path, head: dict[str, Any]) -> str:
    """Opens a journal that says it is of that version, which has to be refused."""
    path.mkdir(parents=True)
    about = {"layout": head["layout"], "digest": head["digest"], "store": "0" * 32, "commits": "0" * 20}
    (path / layout.SIBLING).write_text(json.dumps(about, separators=(",", ":")), encoding="ascii")
    try:
        Journal.open(path)
    except JournalVersionError as error:
        return str(error)
    except AgentflowError as error:
        raise AssertionError(f"{file}: an unknown version is not refused as one, but: {error}") from error
    raise AssertionError(f"{file}: a journal of version {head} was opened; it has to be refused.")


def _again(file: Path, journal: Journal, document: dict[str, Any], workflows: Mapping[str, Any]) -> str:
    run_id: str = document["id"]
    workflow = workflows.get(document["workflow"])
    if workflow is None:
        raise UsageError(f"{file}: run {run_id} is of workflow {document['workflow']!r}, which is not defined here.")
    where = f"{file}: run {run_id} of workflow {document['workflow']!r}"
    before = _steps(journal, run_id)
    found: tuple[str, Any]
    right: tuple[str, Any]
    try:
        given = codec.decode(document["input"])
        value = codec.encode(workflow.options(run_id=run_id).run_sync(**given))
        found, right = ("completed", value), (document["status"], document.get("output"))
    except Waiting as waiting:
        found = ("waiting", sorted(str(wait["id"]) for wait in waiting.waiting_on))
        right = (document["status"], sorted(str(wait["id"]) for wait in document.get("waiting_on", ())))
    except Exception as error:
        raise AssertionError(f"{where} is not replayed: {type(error).__name__}: {error}") from error
    if found != right:
        raise AssertionError(f"{where} is not replayed: it is {found}, and was {right}.")
    if more := _steps(journal, run_id) - before:
        names = sorted(Row(key, journal.get(key) or "").head["name"] for key in more)
        raise AssertionError(f"{where} is not replayed: it ran {', '.join(names)} again.")
    return run_id


def _steps(journal: Journal, run_id: str) -> set[str]:
    """Keys of the records of steps that ask no model: those that do may run again, on the replies they have."""
    found = (Row(key, text) for key, text in journal.scan(f"s/{in_key(run_id)}/") if "!" not in key)
    return {row.key for row in found if not row.head.get("ai")}


class _Nobody:
    """A transport that answers nobody: a replay asks no model."""

    async def handle_async_request(self, request: Any) -> Any:
        raise AssertionError(f"the replay asks a model: POST {request.url}")

    async def aclose(self) -> None:
        """There is nothing to close."""
