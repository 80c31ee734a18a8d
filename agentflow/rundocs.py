"""The document of a run (``r/<run>``) and its place in the indexes; what stands in the journal, not what runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import orjson

from agentflow.errors import RunNotFound, UsageError
from agentflow.index import Row, in_key
from agentflow.journal import Drop, Journal, Put
from agentflow.lease import alive, holder

STATUSES = ("running", "waiting", "completed", "failed", "cancelled", "interrupted")


def read(journal: Journal, run_id: str) -> dict[str, Any] | None:
    text = journal.get(f"r/{in_key(run_id)}")
    return None if text is None else dict(orjson.loads(text))


def write(document: dict[str, Any], status: str) -> list[Any]:
    """Operations that store a document under a new status."""
    ops: list[Any] = []
    before = document.get("status")
    if before is not None and before != status:
        ops.append(Drop(_index(document, before)))
    if before == "waiting" and status != "waiting" and (due := document.pop("due", None)) is not None:
        ops.append(Drop(_due_key(document, due)))
    if status == "waiting" and document.get("due") is not None:
        ops.append(Put(_due_key(document, document["due"]), document["id"]))
    document["status"] = status
    ops += [
        Put(f"r/{in_key(document['id'])}", orjson.dumps(document).decode()),
        Put(_index(document, status), document["id"]),
    ]
    return ops


def _index(document: dict[str, Any], status: str) -> str:
    return f"x/{status}/{int(document['created_at'] * 1000):014d}-{in_key(document['id'])}"


def index_key(document: dict[str, Any]) -> str:
    """Where a run stands among those of its status."""
    return _index(document, document["status"])


def erase(document: dict[str, Any]) -> list[Any]:
    """Operations that remove a document from the journal and its indexes."""
    ops = [Drop(f"r/{in_key(document['id'])}"), Drop(_index(document, document["status"]))]
    return ops if document.get("due") is None else [*ops, Drop(_due_key(document, document["due"]))]


def _due_key(document: dict[str, Any], due: float) -> str:
    return f"due/{int(due * 1000):014d}-{in_key(document['id'])}"


def wake_key(run_id: str) -> str:
    """Where it stands that something has come for a waiting run; taken away when the run is taken up or ends.

    Whoever records an answer or an event puts the run's id there in the same transaction.
    """
    return f"wake/{in_key(run_id)}"


def status_of(journal: Journal, document: dict[str, Any]) -> str:
    """A run that says running while nobody holds its lease was interrupted."""
    status: str = document["status"]
    if status == "running":
        owner = holder(journal, lease_key(document["id"]))
        return "running" if owner is not None and alive(owner, now=journal.clock()) else "interrupted"
    return status


def lease_key(run_id: str) -> str:
    return f"lease/{in_key(run_id)}"


def listed(
    journal: Journal, *, status: str | None = None, workflow: str | None = None, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """Documents, newest first; only those that are asked for are read."""
    count = 0
    for _, document in newest(journal, status=status):
        if document is None or (workflow is not None and document["workflow"] != workflow):
            continue
        yield document
        count += 1
        if limit is not None and count >= limit:
            return


def newest(
    journal: Journal, *, status: str | None = None, before: str | None = None
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """All runs, newest first, as places to go on from and documents; read one by one, as they are asked for.

    Args:
        status: only runs of this status: a run of another one that had to be looked at is given as None.
        before: go on after this place. None: from the newest run.
    """
    if status is not None and status not in STATUSES:
        raise UsageError(f"status={status!r} is none of {', '.join(STATUSES)}.")
    wanted = (
        STATUSES
        if status is None
        else ("running", "interrupted")
        if status in ("running", "interrupted")
        else (status,)
    )

    def of(each: str) -> Iterator[tuple[str, str]]:
        prefix = f"x/{each}/"
        end = None if before is None else prefix + before
        return ((key[len(prefix) :], run) for key, run in journal.scan(prefix, before=end, reverse=True))

    import heapq  # a program that runs a workflow lists nothing

    last = ""
    for place, run_id in heapq.merge(*map(of, wanted), reverse=True):
        document = None if place == last else read(journal, run_id)  # it may take on another status meanwhile
        last = place
        if document is not None:
            document["status"] = status_of(journal, document)
            if status is not None and document["status"] != status:
                document = None
        yield place, document


def find(journal: Journal, run_id: str) -> dict[str, Any]:
    """The document of a run named by its id or by an unambiguous beginning or end of it."""
    if not isinstance(run_id, str) or not run_id:
        raise UsageError(f"run id {run_id!r} is not text.")
    document = read(journal, run_id)
    if document is None:
        ids = [text for status in STATUSES for _, text in journal.scan(f"x/{status}/")]
        matches = sorted(i for i in ids if i.startswith(run_id) or i.endswith(f"-{run_id}"))
        if not matches:
            raise RunNotFound(f"no run {run_id!r} in {journal.path}. `agentflow runs list` shows what there is.")
        if len(matches) > 1:
            raise RunNotFound(f"{run_id!r} is short for {len(matches)} runs: {', '.join(matches[:5])}.")
        document = read(journal, matches[0])
        assert document is not None
    document["status"] = status_of(journal, document)
    return document


def rows(journal: Journal, run_id: str, *, undone: bool = False) -> list[Row]:
    """The newest rows of a run, in the order in which their steps started.

    Dropped ones are left out, and those that a compensation has undone unless ``undone`` asks for them.
    """
    prefix = f"s/{in_key(run_id)}/"
    gone: dict[str, str] = {}
    newest: dict[str, tuple[int, Row]] = {}
    for key, text in journal.scan(prefix):
        key, _, mark = key.partition("!")
        if mark:
            gone[key] = mark
            continue
        slot, _, version = key.rpartition(".")
        if slot not in newest or int(version) > newest[slot][0]:
            newest[slot] = (int(version), Row(key, text))
    found = []
    for _, row in newest.values():
        row.undone = gone.get(row.key) == "void"
        if row.key not in gone or (row.undone and undone):
            found.append(row)
    return sorted(found, key=lambda row: row.head["s0"])


def paid(journal: Journal, run_id: str) -> Decimal:
    """Dollars for all replies of a run, also of executions that died and could not add them up."""
    costs = (orjson.loads(text)["cost"] for _, text in journal.scan(f"m/{in_key(run_id)}/"))
    return sum((Decimal(cost) for cost in costs if cost is not None), Decimal(0))


_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


def slug(name: str) -> str:
    return _UNSAFE.sub("-", name).strip("-") or "run"


def note_retry(document: dict[str, Any]) -> None:
    """The run failed in its last execution and is run again: what failed in it is tried again."""
    document["retried"] = [*retried(document), document["epoch"]]


def retried(document: dict[str, Any]) -> list[int]:
    """The executions at whose ends the run had failed before it was run again, oldest first."""
    earlier = document.get("retry_upto")  # of a version that kept the last one only
    return list(document.get("retried", [] if earlier is None else [earlier]))
