"""The replies of models that a run stands on, and the file that they make for tests.

A recording is one JSON document, ``{"agentflow_recording": 1, "calls": [...]}``, each call with the ``request`` that
was asked and the ``reply`` that came, in the provider's own words. ``recordings.py`` plays it.

A run stands on the replies that it bought, on those of the runs that it started, and on those that other runs bought
for it: a fork's parent, the run that did a step of the same ``idempotency_key``, whoever embedded a text first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from agentflow import children, rundocs
from agentflow.errors import UsageError
from agentflow.files import shortened
from agentflow.index import Row, in_key
from agentflow.journal import Journal
from agentflow.redact import redact_value
from agentflow.scratch import open_journal
from agentflow.settings import log

VERSION = 1
SCRATCH = "scratch"
_NUMBERS = re.compile(r"\[\n\s+(-?[\d.eE+-]+(?:,\n\s+-?[\d.eE+-]+)*)\n\s+\]")


def export_recording(run_id: str, path: str | os.PathLike[str], *, journal: Journal | None = None) -> int:
    """Write the model calls of a recorded run as a recording for tests; how many there are.

    The run's own calls are in it, embeddings included, and those of the runs it has started. Replies that ``rerun=``,
    ``retry`` or an edit has superseded are left out as far as the run's last execution tells; a test reports what it
    does not ask for, and ``--agentflow-record=once`` removes that. Secrets are masked.

    Args:
        run_id: the run's id or an unambiguous part of it; ``"scratch"`` for all that was asked outside workflows in
            this project (cells of a notebook, lines of a script).
        path: the file, which must not exist yet.
        journal: where the run is. None: the project's journal.

    Raises:
        RunNotFound: there is no such run.
        UsageError: the file exists, or the run has no model calls.
    """
    file = Path(path).expanduser()
    if file.exists():
        raise UsageError(f"{file} exists already. Remove it, or name another file.")
    journal = journal or open_journal()
    known = run_id if run_id == SCRATCH else str(rundocs.find(journal, run_id)["id"])
    calls = [_call(raw) for raw in of_run(journal, known)]
    if not calls:
        raise UsageError(f"run {known} in {journal.path} has no model calls, so there is nothing to record.")
    write(file, calls)
    return len(calls)


def write(path: Path, calls: list[dict[str, Any]]) -> None:
    """Write a recording, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"agentflow_recording": VERSION, "calls": calls}, indent=2, ensure_ascii=False) + "\n"
    # A vector is one line. Texts cannot be meant by this: in JSON they hold no line breaks.
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def plain_request(body: dict[str, Any]) -> dict[str, Any]:
    """A request as it is written: what is asked, not how the answer travels; secrets masked, files by their digests."""
    travels = ["stream", "stream_options", *(("background", "store") if body.get("background") else ())]
    kept = {name: value for name, value in body.items() if name not in travels}
    made: dict[str, Any] = redact_value(shortened(kept))
    return made


def _call(raw: dict[str, Any]) -> dict[str, Any]:
    body = raw["body"]
    if isinstance(body, dict) and body.get("object") == "list" and "data" in body:
        endpoint = "embeddings"
    elif "input" in raw["request"]:
        endpoint = "responses"
    else:
        endpoint = "messages" if isinstance(body, dict) and body.get("type") == "message" else "chat/completions"
    return {
        "provider": raw["provider"],
        "endpoint": endpoint,
        "request": plain_request(raw["request"]),
        "status": raw["status"],
        "request_id": raw["request_id"],
        "reply": redact_value(body),
    }


def of_run(journal: Journal, run_id: str) -> list[dict[str, Any]]:
    """The replies that a run stands on, in the order in which they came, each with its request."""
    found: dict[str, dict[str, Any]] = {}
    vectors: set[str] = set()
    todo, seen = [run_id], set()
    while todo:
        run = todo.pop()
        if run in seen:
            continue
        seen.add(run)
        todo += children.children(journal, run)
        records = _Records(journal, run)
        found |= records.replies(run, None)
        for other, within in records.elsewhere.items():
            found |= records.replies(other, within)
        vectors |= records.vectors
    bought = {key for raw in found.values() if _embeds(raw) for key in raw["request"]["input"]}
    left: dict[str, list[str]] = {}  # what somebody else has embedded before, by the key of that reply
    for key in sorted(vectors - bought):
        row = _vector(journal, key)
        left.setdefault(row.get("reply") or "", []).append(key)
    for reply, keys in left.items():
        text = journal.get(reply) if reply else None
        found[reply or "-"] = orjson.loads(text) if text is not None else _made_up(journal, keys)
    ordered = sorted(found.values(), key=lambda raw: str(raw["at"]))
    return [made for raw in ordered if (made := _whole(journal, raw)) is not None]


class _Records:
    """What the records of a run say of its replies: inside what each call was made, and what is superseded."""

    def __init__(self, journal: Journal, run_id: str) -> None:
        self._journal = journal
        self._outer: dict[str, str] = {}
        self._dropped: dict[str, list[tuple[str, int]]] = {}
        self._unused: set[str] = set()
        self.elsewhere: dict[str, set[str]] = {}
        self.vectors: set[str] = set()
        prefix = f"s/{in_key(run_id)}/"
        rows, marks = {}, {}
        for key, text in journal.scan(prefix):
            key, _, mark = key.partition("!")
            if mark:
                marks[key] = mark
            else:
                rows[key] = Row(key, text)
        document = rundocs.read(journal, run_id) or {}
        unused = set(document.get("unused", ())) if document.get("status") == "completed" else set()
        for key, row in rows.items():
            head = row.head
            self._outer[head["occ"]] = head["scope"]
            if marks.get(key) == "drop":
                self._dropped.setdefault(head["occ"], []).append((head["epoch"], head["sample"]))
            if key[len(prefix) :].rpartition(".")[0] in unused:
                self._unused.add(head["occ"])
            if head["run"] != run_id:
                self.elsewhere.setdefault(head["run"], set()).add(head["occ"])
        for row in rows.values():
            head = row.head
            if head["kind"] == "ai" and row.output.startswith("[") and not self._gone(head["occ"], _path(head)):
                self.vectors |= {each for each in orjson.loads(row.output) if str(each).startswith("e/")}

    def replies(self, run_id: str, within: set[str] | None) -> dict[str, dict[str, Any]]:
        """By their keys: those of a run, or those that it bought within some of its steps."""
        if within is None:
            prefixes = [f"m/{in_key(run_id)}/"]
        else:
            inside = _Records(self._journal, run_id)._outer
            occs = [occ for occ in inside if within & set(_chain(inside, occ))]
            prefixes = [f"m/{in_key(run_id)}/{occ}/" for occ in occs]
        found = {}
        for prefix in prefixes:
            for key, text in self._journal.scan(prefix):
                occ, path, _ = key.rsplit("/", 3)[1:]
                if not self._gone(occ, path):
                    found[key] = orjson.loads(text)
        return found

    def _gone(self, occ: str, path: str) -> bool:
        """Whether the call, or what it was made in, was asked anew or is not asked for any more.

        ``path`` names the sample of each step around the call, the outermost first, and its own.
        """
        chain = list(_chain(self._outer, occ))[::-1]
        samples = path.split(".")[1:]
        if len(chain) != len(samples):  # what is around it has no record, because it failed
            chain, samples = [occ], [path]
            around = [path.rpartition(".")[0]]
            numbers = [int(path.rpartition(".")[2])]
        else:
            around = ["".join(f".{each}" for each in samples[:at]) for at in range(len(samples))]
            numbers = [int(each) for each in samples]
        for step, at, number in zip(chain, around, numbers, strict=True):
            dropped = self._dropped.get(step, ())
            if step in self._unused or any(epoch == at and sample >= number for epoch, sample in dropped):
                return True
        return False


def _path(head: dict[str, Any]) -> str:
    return f"{head['epoch']}.{head['sample']}"


def _chain(outer: dict[str, str], occ: str) -> Iterator[str]:
    """The call itself and what is around it, the nearest first."""
    while occ:
        yield occ
        occ = outer.get(occ, "")


# -- embeddings: their texts and vectors are records of their own -----------------------------------


def _embeds(raw: dict[str, Any]) -> bool:
    return isinstance(raw["body"], dict) and isinstance(raw["body"].get("data"), int)


def _vector(journal: Journal, key: str) -> dict[str, Any]:
    found = orjson.loads(journal.get(key) or "[]")
    return found if isinstance(found, dict) else {}


def _made_up(journal: Journal, keys: list[str]) -> dict[str, Any]:
    """A reply for vectors whose own one was purged: what it was asked with is not known any more."""
    row = next((row for key in keys if (row := _vector(journal, key))), {})
    return {
        "at": "", "provider": row.get("provider"), "status": 200, "request_id": None,
        "request": {**row.get("asked", {}), "input": keys},
        "body": {"object": "list", "model": row.get("asked", {}).get("model"), "data": len(keys),
                 "usage": {"prompt_tokens": 0, "total_tokens": 0}},
    }  # fmt: skip


def _whole(journal: Journal, raw: dict[str, Any]) -> dict[str, Any] | None:
    """A reply with the texts that were sent and the vectors that came, None if nothing is known of them."""
    if not _embeds(raw):
        return raw
    rows = [_vector(journal, key) for key in raw["request"]["input"]]
    known = [row for row in rows if row]
    if len(known) < len(rows):
        log.warning(
            "%d embedded texts are left out of the recording: an earlier version did not record them.",
            len(rows) - len(known),
        )
    data = [{"object": "embedding", "index": at, "embedding": row["vector"]} for at, row in enumerate(known)]
    made = {
        **raw,
        "request": {**raw["request"], "input": [row["text"] for row in known]},
        "body": {"object": "list", **raw["body"], "data": data},
    }
    return made if known else None
