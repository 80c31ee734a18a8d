"""A run as its waterfall: each step with its attempts, what is in flight, what is waited for, runs started inside."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import orjson

from agentflow import children, rundocs, shapes
from agentflow.context import view
from agentflow.errors import RunNotFound
from agentflow.handles import Run
from agentflow.human import id_of_task
from agentflow.index import Row, in_key
from agentflow.journal import Journal
from agentflow.records import moment
from agentflow.shown import shown
from agentflow.ui.values import with_texts

Document = dict[str, Any]
Step = dict[str, Any]

WAITS = ("human", "event", "sleep")
_WRITTEN = ("name", "error", "idempotency_key", "model", "parent", "reused_from")
ENDED = ("completed", "failed", "cancelled")
MOST_STEPS = 10_000
_KEPT_RUNS, _KEPT_STEPS = 4, 150_000  # at most so many of both, but for the run that is looked at


class _Kept:
    """What a run's records look like here. Records are never overwritten, so each is read once while it is looked at.

    Attributes: ``steps``, ``failed``: by key, the steps that are recorded and the attempts that failed; ``keys``: the
    key of each step's record, by the step's id.
    """

    def __init__(self, created_at: float) -> None:
        self.created_at = created_at
        self.steps: dict[str, Step] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.lock = threading.Lock()


_kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
_lock = threading.Lock()


def _kept_of(journal: Journal, document: Document) -> _Kept:
    key = (journal.id, document["id"])
    with _lock:
        kept = _kept.get(key)
        if kept is None or kept.created_at != document["created_at"]:  # purged, and begun anew under its id
            kept = _kept[key] = _Kept(document["created_at"])
        _kept.move_to_end(key)
        while len(_kept) > _KEPT_RUNS or (len(_kept) > 1 and sum(len(k.steps) for k in _kept.values()) > _KEPT_STEPS):
            _kept.popitem(last=False)
    return kept


def run(journal: Journal, document: Document, first: int | None = None) -> dict[str, Any]:
    """A run as in ``runs show --json``, with what the waterfall needs of its steps in place of their outputs.

    Args:
        journal, document: the run, with its status as it is now.
        first: the first step wanted. None: so that the last ones are among those that are given.

    Returns:
        ``steps``: at most ``MOST_STEPS``, in the order in which they started, each as ``steps`` describes;
        ``steps_first`` and ``steps_total``: which these are, of how many; ``executions``: how often the run was taken
        up; ``texts``: see ``with_texts``.
    """
    found = steps(journal, document)
    begin = max(0, len(found) - MOST_STEPS) if first is None else max(0, first)
    whole = with_texts(shapes.whole(Run(journal, document)), ("input", "output"))
    return whole | {
        "executions": document["epoch"],
        "deadline": shown(moment(document.get("deadline"))),
        "steps": found[begin : begin + MOST_STEPS],
        "steps_first": begin,
        "steps_total": len(found),
    }


def steps(journal: Journal, document: Document) -> list[Step]:
    """All steps of a run, in the order in which they started.

    Each is as in ``runs show --json`` without ``output`` and ``usage``, and with ``parent_id`` (the step that it is
    inside), ``tries`` (its attempts: ``attempt, status, started_at, ended_at, error, delay``), ``replayed`` (recorded
    by an earlier execution than the newest), ``reused_from`` (another run that has done it), ``supplied`` (its result
    was given), ``task`` (of a human step). Besides completed, failed and undone, a step may be running, waiting,
    retrying (the next attempt comes), or in doubt (its process died).
    """
    kept = _kept_of(journal, document)
    run_id, epoch = document["id"], document["epoch"]
    with kept.lock:
        newest, gone = _read_new(journal, run_id, kept)
        kept.keys = {}
        tasks = {slot: key.rpartition("/")[2] for key, slot in journal.scan(f"hu/{in_key(run_id)}/")}
        failed = _failed_attempts(kept)
        found = []
        for slot, version in newest.items():
            key = f"s/{in_key(run_id)}/{slot}.{version}"
            mark = gone.get(key)
            if mark is None or mark == "void":
                known = kept.steps[key]
                kept.keys[known["id"]] = key
                own = {"status": "undone"} if mark else {}
                tries = _tries(known, failed.get((known["id"], version), []))
                _since(journal, tasks.get(slot), tries)
                replayed = known["epoch"] < epoch and known["reused_from"] is None
                found.append(known | own | {"tries": tries, "replayed": replayed, "task": tasks.get(slot)})
        current = {s: n for s, n in newest.items() if f"s/{in_key(run_id)}/{s}.{n}" not in gone}
        found += _in_flight(journal, document, newest, current, failed)
    found += _started_runs(journal, run_id)
    return sorted(found, key=lambda step: step["started_at"] or "")


def one(journal: Journal, document: Document, step_id: str) -> tuple[Step, Row | None]:
    """A step by its id, as ``steps`` has it, and its record, if there is one by now.

    Raises:
        RunNotFound: the run has no such step.
    """
    found = next((step for step in steps(journal, document) if step["id"] == step_id), None)
    if found is None:
        raise RunNotFound(f"run {document['id']} has no step {step_id!r} (any more).")
    key = _kept_of(journal, document).keys.get(step_id)
    text = None if key is None else journal.get(key)
    return found, None if key is None or text is None else Row(key, text)


def _read_new(journal: Journal, run_id: str, kept: _Kept) -> tuple[dict[str, int], dict[str, str]]:
    """Reads what is new; the newest version of each slot, and what became of versions that do not count any more."""
    prefix = f"s/{in_key(run_id)}/"
    newest: dict[str, int] = {}
    gone: dict[str, str] = {}
    for key, _ in journal.keys(prefix):
        key, _, mark = key.partition("!")
        if mark:
            gone[key] = mark
            continue
        slot, _, version = key[len(prefix) :].rpartition(".")
        newest[slot] = max(newest.get(slot, 0), int(version))
    keys = {slot: f"{prefix}{slot}.{version}" for slot, version in newest.items()}
    came: dict[str, Step] = {}
    for slot, key in keys.items():
        if key not in kept.steps:
            text = journal.get(key)
            if text is None:  # purged at this moment, or no record of ours
                del newest[slot]
            else:
                came[key] = _recorded(Row(key, text), run_id)
    kept.steps.update(_masked(came))
    for key, _ in journal.keys(f"a/{in_key(run_id)}/"):
        if key not in kept.failed and (text := journal.get(key)) is not None:
            kept.failed[key] = orjson.loads(text)
    return newest, gone


def _recorded(row: Row, run_id: str) -> Step:
    head = row.head
    made = shapes.step(view(row, with_output=False))
    del made["output"], made["usage"]
    other = head.get("from") or (head["run"] if head["run"] != run_id else None)
    made |= {
        "parent_id": head["scope"] or None,
        "supplied": bool(head.get("supplied")),
        "reused_from": other,
        "late": bool(head.get("late")),
        "secret": bool(head.get("secret")),
        "epoch": head["s0"][0],
        "began": moment(head.get("began")),
    }
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in made.items()}


def _masked(steps: dict[str, Step]) -> dict[str, Step]:
    """With secrets masked in the texts that people have written: a run has thousands of steps, and few such texts."""
    texts = list({step[name] for step in steps.values() for name in _WRITTEN if step[name]})
    masked = dict(zip(texts, shown(texts), strict=True))
    return {key: step | {name: masked[step[name]] for name in _WRITTEN if step[name]} for key, step in steps.items()}


def _failed_attempts(kept: _Kept) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The attempts that failed and were followed by another, by step and version, in their order."""
    found = defaultdict(list)
    for key in sorted(kept.failed):
        step_id, _, version = key.split("/")[-2].rpartition(".")
        found[step_id, int(version)].append(kept.failed[key])
    return found


def _tries(step: Step, failed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The attempts of a recorded step."""
    tries, begin = _before(failed, step["started_at"]) if failed else ([], step["started_at"])
    last = "waited" if step["kind"] in WAITS and step["status"] == "completed" else step["status"]
    tries.append(
        {
            "attempt": step["attempts"],
            "status": last,
            "started_at": step["began"] or begin,
            "ended_at": step["completed_at"],
            "error": step["error"],
            "delay": None,
        }
    )
    return tries


def _since(journal: Journal, task: str | None, tries: list[dict[str, Any]]) -> None:
    """A person was waited for since the task was opened, however often the run was taken up in between."""
    text = journal.get(f"h/{task}") if task is not None and tries else None
    if text is not None:
        opened = shown(moment(orjson.loads(text)["created_at"]))
        tries[0]["started_at"] = min(tries[0]["started_at"], opened)


def _before(failed: list[dict[str, Any]], began: Any) -> tuple[list[dict[str, Any]], Any]:
    """Failed attempts as they are shown, and when the one after them began at the earliest."""
    tries = []
    for facts in failed:
        error = facts["error"]
        tries.append(
            {
                "attempt": facts["attempt"],
                "status": "failed",
                "started_at": moment(facts["began"]) if "began" in facts else began,
                "ended_at": moment(facts["t1"]),
                "error": f"{error['name']}: {error['message']}",
                "delay": facts["delay"],
            }
        )
        began = moment(facts["t1"] + facts["delay"])
    return shown(tries), shown(began)


# -- what is not recorded yet ----------------------------------------------------------------------


def _in_flight(
    journal: Journal,
    document: Document,
    newest: dict[str, int],
    current: dict[str, int],
    failed: dict[tuple[str, int], list[dict[str, Any]]],
) -> Iterator[Step]:
    """Steps that the newest execution has started and that have no record."""
    if document["status"] in ENDED:
        return
    for facts in _started(journal, document):
        slot = f"{facts['i']}/{facts['p']}"
        version = newest.get(slot, -1) + 1
        if slot in current and (facts["v"] < 0 or current[slot] >= facts["v"]):
            continue
        tried = failed.get((facts["o"], version), [])
        tries, _ = _before(tried, moment(facts["t"]))
        status = _status(document, facts, tried)
        task = id_of_task(document["id"], slot, version) if facts["k"] == "human" else None
        task = task if task is not None and journal.get(f"h/{task}") is not None else None
        began = shown(moment(facts["t"]))
        if status != "retrying":
            tries.append(
                {"attempt": facts["a"], "status": status, "started_at": began, "ended_at": None, "error": None}
                | {"delay": None}
            )
        _since(journal, task, tries)
        first = tries[0]["started_at"]
        yield dict.fromkeys(
            ("completed_at", "duration", "idempotency_key", "error", "model", "parent", "cost", "reused_from", "began")
        ) | shown(
            {
                "name": facts["n"],
                "id": facts["o"],
                "kind": facts["k"],
                "status": status,
                "started_at": first,
                "attempts": facts["a"],
                "in_doubt": 0,
                "parent_id": facts["s"] or None,
                "supplied": False,
                "late": False,
                "secret": False,
                "epoch": document["epoch"],
                "replayed": False,
                "tries": tries,
                "task": task,
            }
        )


def _started(journal: Journal, document: Document) -> list[dict[str, Any]]:
    """The newest start of each step in the newest execution, ``t`` being the attempt's first."""
    found: dict[str, dict[str, Any]] = {}
    for line in journal.marks(document["id"]):
        facts = orjson.loads(line)
        known = found.get(facts["o"])
        if "p" not in facts:  # taken back: somebody is waited for inside it
            if known is not None:
                known["waits"] = True
        elif facts.get("e") == document["epoch"]:
            again = known is not None and (known["v"], known["a"]) == (facts["v"], facts["a"])
            facts["waits"] = facts["k"] in WAITS
            facts["t"] = known["t"] if known is not None and again else facts["t"]
            found[facts["o"]] = facts
    return list(found.values())


def _status(document: Document, facts: dict[str, Any], tried: list[dict[str, Any]]) -> str:
    if facts["waits"] or document["status"] == "waiting":
        return "waiting"
    if document["status"] == "interrupted":
        return "in doubt"
    return "retrying" if tried and tried[-1]["attempt"] >= facts["a"] else "running"


def _started_runs(journal: Journal, run_id: str) -> Iterator[Step]:
    """The runs that this one has started, as steps of kind ``run``."""
    for child in children.children(journal, run_id):
        document = rundocs.read(journal, child)
        if document is None:
            continue
        document["status"] = rundocs.status_of(journal, document)
        summary = shown(shapes.summary(Run(journal, document)))
        place = orjson.loads(journal.get(f"cs/{in_key(run_id)}/{in_key(child)}") or "{}").get("branch", "")
        last = {"attempt": 1, "status": summary["status"], "started_at": summary["started_at"], "delay": None}
        last |= {"ended_at": summary["completed_at"], "error": summary["error"]}
        yield dict.fromkeys(("duration", "idempotency_key", "model", "parent", "reused_from", "began", "task")) | {
            "name": summary["workflow"],
            "id": f"run:{child}",
            "run": child,
            "kind": "run",
            "status": summary["status"],
            "started_at": summary["started_at"],
            "completed_at": summary["completed_at"],
            "error": summary["error"],
            "attempts": document["epoch"],
            "cost": summary["cost"],
            "in_doubt": 0,
            "parent_id": place.rpartition(">")[2].partition(":")[0] or None,
            "supplied": False,
            "late": False,
            "secret": False,
            "epoch": 0,
            "replayed": False,
            "tries": [last],
        }
