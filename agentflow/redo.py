"""Going back in a run: what a retry from a step does anew, what a fork takes along, results that are given.

These functions record and return; nothing is run. What they leave is an interrupted run, which goes on when somebody
awaits it, or a worker takes it up.

*From a step on* means: the step, and what started after it had ended. Steps of other branches that had started by
then do not depend on it and stay. Among steps of one branch those that stand before it in the code stay too, also
when an edit made them run later.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from agentflow import codec, rundocs
from agentflow.errors import RunCancelled, UsageError
from agentflow.index import BRANCH, PRED, Row, in_key, short
from agentflow.journal import Add, Drop, Journal, Op
from agentflow.lease import acquire

_CHUNK = 2000
_ENDING = ("output", "error", "error_step", "ended_at", "waiting_on")


def retry(
    journal: Journal, document: dict[str, Any], from_step: str | None, results: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Let a run go on from a step; gives the run's new document."""
    run_id = document["id"]
    given = _encoded(results)
    lease = acquire(journal, rundocs.lease_key(run_id), what=f"run {run_id}", run_id=run_id)
    try:
        stored = rundocs.read(journal, run_id)
        assert stored is not None
        document = stored
        if document["status"] == "cancelled":
            raise RunCancelled(f"run {run_id} was cancelled and cannot go on. fork() makes a new run of its records.")
        if document["status"] == "completed" and from_step is None and not given:
            raise UsageError(f'run {run_id} is completed: name the step to begin with, retry(from_step="...").')
        rows = rundocs.rows(journal, run_id, undone=True)
        doubts = [(key, name) for key, name in journal.scan(f"d/{in_key(run_id)}/") if name == from_step]
        target = None if from_step is None else _find(rows, from_step, run_id, needed=not doubts)
        ops: list[Op] = [Drop(key) for key, _ in doubts]
        gone = set() if target is None else {row.key for row in redone(rows, target)}
        gone |= {row.key for row in rows if _is_named(row, given)}
        ops += _drops(run_id, rows, gone, target)
        if document["status"] in ("completed", "failed"):
            document.pop("deadline", None)  # that of the execution that has ended
        failed = document["status"] == "failed"
        if from_step is not None or given or not document.get("undoing"):
            for name in ("undoing", "compensated"):
                document.pop(name, None)
            if failed:
                rundocs.note_retry(document)
        kept = {name: text for name, text in document.get("results", {}).items() if not _names(rows, gone, name)}
        document["results"] = kept | given
        if target is not None:  # a child that failed after that step is asked for anew
            children = journal.scan(f"cf/{in_key(run_id)}/")
            ops += [Drop(key) for key, text in children if orjson.loads(text)["s1"] > target.head["s1"]]
        for name in _ENDING:
            document.pop(name, None)
        ops += rundocs.write(document, "interrupted")
    except BaseException:
        lease.release()
        raise
    lease.release(ops)
    return document


def fork(
    journal: Journal,
    document: dict[str, Any],
    from_step: str | None,
    arguments: dict[str, Any] | None,
    results: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A new run with the parent's records up to a step; gives its document."""
    parent = document["id"]
    given = _encoded(results)
    text = document["input"] if arguments is None else codec.encode(arguments, where="input")
    rows = rundocs.rows(journal, parent, undone=True)
    target = None if from_step is None else _find(rows, from_step, parent)
    left = set() if target is None else {row.key for row in redone(rows, target)}
    left |= {row.key for row in rows if _is_named(row, given) or row.head["kind"] == "compensation"}
    opened = _enclosing(rows, left)
    run_id = _free_id(journal, re.sub(r"-fork(-\d+)?$", "", parent) + "-fork")
    lease = acquire(journal, rundocs.lease_key(run_id), what=f"run {run_id}", run_id=run_id)
    try:
        ops: list[Op] = []
        for op in _copied(journal, parent, run_id, left, opened):
            ops.append(op)
            if len(ops) >= _CHUNK:
                journal.commit(ops, fence=lease.fence)
                ops = []
        # What failed inside runs that were asked for before is history of the fork as well.
        for key, text in journal.scan(f"cf/{in_key(parent)}/"):
            if target is None or orjson.loads(text)["s1"] < target.head["s0"]:
                ops.append(Add(f"cf/{in_key(run_id)}/{key.split('/', 2)[2]}", text))
        made: dict[str, Any] = {name: document[name] for name in ("workflow", "epoch", "code") if name in document}
        kept = {name: value for name, value in document.get("results", {}).items() if not _names(rows, left, name)}
        made |= {"id": run_id, "created_at": time.time(), "input": text, "parent": parent, "results": kept | given}
        made |= {"forked_at": from_step, "retried": rundocs.retried(document), "digest": None, "status": None}
        rundocs.note_retry(made)
        # The document comes last: a fork that was cut off is no run.
        ops += rundocs.write(made, "interrupted")
    except BaseException:
        lease.release()
        raise
    lease.release(ops)
    return made


def redone(rows: list[Row], target: Row) -> list[Row]:
    """The rows of a step, of what is inside it, and of what started after it had ended."""
    by_occ = {row.head["occ"]: row for row in rows}
    around = {row.head["occ"] for row in _around(target, by_occ)}
    level = {row.head["scope"]: row for row in (target, *_around(target, by_occ))}
    depth = _depths(rows)
    decided: dict[str, bool] = {}

    def is_redone(row: Row) -> bool:
        # The outermost step around it decides, unless that is around the target too.
        for each in (row, *_around(row, by_occ))[::-1]:
            occ = each.head["occ"]
            if occ in around:
                continue
            if occ not in decided:
                decided[occ] = each is target or _follows(each, level.get(each.head["scope"], target), depth)
            return decided[occ]
        return False

    return [row for row in rows if is_redone(row)]


def _follows(row: Row, target: Row, depth: dict[str, int]) -> bool:
    if not row.head["s0"] > target.head["s1"]:
        return False
    same_branch = row.head["branch"] == target.head["branch"]
    return not (same_branch and depth[_slot(row)] < depth[_slot(target)])


def _around(row: Row, by_occ: dict[str, Row]) -> list[Row]:
    """The recorded steps around one, innermost first."""
    found: list[Row] = []
    outer = by_occ.get(row.head["scope"])
    while outer is not None and len(found) < 1000:
        found.append(outer)
        outer = by_occ.get(outer.head["scope"])
    return found


def _slot(row: Row) -> str:
    return row.key.split("/", 2)[2].rpartition(".")[0]


def _depths(rows: list[Row]) -> dict[str, int]:
    """How many recorded steps stand before each in its branch, by the predecessors kept in the places."""
    slots = [_slot(row) for row in rows]
    by_short = {short(slot, PRED): slot for slot in slots}
    depth: dict[str, int] = {}
    for slot in slots:
        path = []
        at: str | None = slot
        while at is not None and at not in depth:
            path.append(at)
            at = by_short.get(at.partition("/")[2][BRANCH : BRANCH + PRED])
        base = depth[at] if at is not None and at in depth else -1
        for position, each in enumerate(reversed(path)):
            depth[each] = base + 1 + position
    return depth


def _find(rows: list[Row], name: str, run_id: str, *, needed: bool = True) -> Row | None:
    found = next((row for row in rows if name in (row.head["name"], row.head["occ"])), None)
    if found is None and needed:
        known = ", ".join(dict.fromkeys(repr(row.head["name"]) for row in rows)) or "none"
        raise UsageError(f"from_step={name!r}: run {run_id} has no step of that name or id. It has: {known}.")
    return found


def _is_named(row: Row, given: Iterable[str]) -> bool:
    return row.head["name"] in given or row.head["occ"] in given


def _names(rows: list[Row], keys: set[str], name: str) -> bool:
    return any(row.key in keys and name in (row.head["name"], row.head["occ"]) for row in rows)


def _enclosing(rows: list[Row], gone: set[str]) -> set[str]:
    """Keys of kept steps around ones that are gone: they have to be gone through again to get there."""
    by_occ = {row.head["occ"]: row for row in rows}
    return {outer.key for row in rows if row.key in gone for outer in _around(row, by_occ)} - gone


def _drops(run_id: str, rows: list[Row], gone: set[str], target: Row | None) -> list[Op]:
    ops: list[Op] = []
    opened = _enclosing(rows, gone)
    for row in rows:
        if row.key in gone and not row.undone and row.head["kind"] != "compensation":
            ops.append(Add(f"{row.key}!drop", ""))
            if row.head["kind"] == "sleep":
                ops.append(Drop(f"z/{in_key(run_id)}/{row.head['occ']}"))
            # What a key names is done anew only where that very step was asked for.
            if "named" in row.head and row is target:
                ops.append(Add(f"{row.head['named']}!drop", ""))
        elif row.key in opened:
            ops.append(Add(f"{row.key}!open", ""))
    return ops


def _copied(journal: Journal, parent: str, run_id: str, left: set[str], opened: set[str]) -> Iterable[Op]:
    """All versions of the records that a fork takes along; what is inside a step says that the parent did it."""
    prefix = f"s/{in_key(parent)}/"
    not_copied = {key.rpartition(".")[0] for key in left}
    for key, text in journal.scan(prefix):
        slot, _, version = key.rpartition(".")
        if slot in not_copied:
            continue
        copy = f"s/{in_key(run_id)}/{key[len(prefix) :]}"
        if "!" not in version:
            row = Row(key, text)
            text = Row.compose({"from": parent, **row.head}, row.output, row.given)
        yield Add(copy, text)
        if key in opened:
            yield Add(f"{copy}!open", "")


def _free_id(journal: Journal, base: str) -> str:
    """An id under which nothing is recorded, records of a fork that was cut off included."""
    number = 1
    while True:
        run_id = base if number == 1 else f"{base}-{number}"
        taken = rundocs.read(journal, run_id) is not None or any(journal.keys(f"s/{in_key(run_id)}/", limit=1))
        if not taken:
            return run_id
        number += 1


def _encoded(results: Mapping[str, Any] | None) -> dict[str, str]:
    if results is None:
        return {}
    if not isinstance(results, Mapping) or not all(isinstance(name, str) and name for name in results):
        raise UsageError(f'results={results!r}: a dict from a step\'s name (or id) to its result, {{"draft": "..."}}.')
    return {name: codec.encode(value, where=f"results[{name!r}]") for name, value in results.items()}


def arguments_of(document: dict[str, Any], given: Any, names: list[str] | None) -> dict[str, Any]:
    """A run's arguments with a new input: the value of its only argument, or a dict of some of them by name.

    ``names``: what the workflow takes, None where its code is not at hand.
    """
    now = codec.look(document["input"])
    names = list(now) if names is None else names
    by_name = isinstance(given, dict) and given and set(given) <= set(names)
    if by_name and (len(names) > 1 or not isinstance(now.get(names[0]), dict)):
        return {**codec.decode(document["input"]), **given}
    if len(names) == 1:
        return {names[0]: given}
    raise UsageError(
        f"input={given!r}: the workflow {document['workflow']!r} takes {', '.join(names) or 'no input'}; "
        "give a dict with the arguments to change, by name."
    )
