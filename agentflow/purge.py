"""Removing the records of runs that nobody needs any more.

What belongs to one run goes with it: its document, steps, attempts, paid replies, sleeps, tasks, and the events sent to
it that it has not received: a later run of the same id must not find them. What runs share
stays: results named by an ``idempotency_key``, vectors of ``embed``, and the code they were made with. A run that was
started inside another one goes with that one only, because a replay of the other asks for its result. Forks have
records of their own and need nothing of their parent. What a run has cost stays in the ledger.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from agentflow import children, events, leftover, rundocs
from agentflow.durations import Duration, seconds
from agentflow.errors import RunBusy, UsageError
from agentflow.index import in_key
from agentflow.journal import Drop, Journal, Op, Txn
from agentflow.lease import acquire, alive, gone, holder
from agentflow.settings import settings

ENDED = ("completed", "failed", "cancelled")
_CHUNK = 5000
_FAMILIES = ("s", "a", "d", "dg", "g", "m", "w", "z", "b", "be", "bm", "bq", "i", "ht", "hu", "ch", "cp", "cf", "cs")


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge has removed, or with ``dry_run`` would remove.

    Attributes:
        runs: the ids, oldest first.
        rows: how many records of the journal that is.
        kept: runs that were old enough and stay, each with the reason.
        dry_run: nothing was removed.
    """

    runs: list[str] = field(default_factory=list)
    rows: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    def __str__(self) -> str:
        verb = "would be removed" if self.dry_run else "removed"
        count = f"{len(self.runs)} {'run' if len(self.runs) == 1 else 'runs'}"
        return f"{count} ({self.rows} records) {verb}" + (f", {len(self.kept)} kept" if self.kept else "")


def purge(
    journal: Journal,
    *,
    older_than: Duration,
    status: str | Sequence[str] | None,
    workflow: str | None,
    dry_run: bool,
) -> Purged:
    """See ``runs.purge``."""
    age = seconds(older_than, what="older_than")
    if age is None:
        raise UsageError('older_than=None: give an age such as "30d"; 0 takes all.')
    wanted = ENDED if status is None else (status,) if isinstance(status, str) else tuple(status)
    for each in wanted:
        if each not in (*ENDED, "waiting", "interrupted"):
            known = ", ".join((*ENDED, "waiting", "interrupted"))
            raise UsageError(f"status={each!r}: only runs that are {known} can be purged.")
    now = settings.clock() if settings.clock else time.time()
    chosen: dict[str, str] = {}
    for each in wanted:
        for document in rundocs.listed(journal, status=each, workflow=workflow):
            since = document.get("ended_at") or document["created_at"]
            if now - since >= age:
                chosen[document["id"]] = each
    kept = {
        run: "what it has at its provider may not have ended"
        for run, at in leftover.left(journal)
        if chosen.get(run) and now - at < leftover.GIVE_UP
    }
    for run in kept:
        del chosen[run]
    while needed := {run: why for run in chosen if (why := _needed(journal, run, chosen)) is not None}:
        kept |= needed
        for run in needed:
            del chosen[run]
    pointers, sent = _pointers(journal), _sent(journal)
    done, rows = [], 0
    for run_id, state in sorted(chosen.items()):
        keys = keys_of(journal, run_id) + sent.get(in_key(run_id), [])
        if not dry_run:
            try:
                _remove(journal, run_id, state, keys, pointers.get(run_id, []))
            except RunBusy:
                kept[run_id] = "a process is running it"
                continue
        done.append(run_id)
        rows += len(keys) + 1
    if not dry_run:
        _sweep_events(journal)
        _sweep_leases(journal)
    return Purged(done, rows, kept, dry_run)


def _needed(journal: Journal, run_id: str, chosen: dict[str, str]) -> str | None:
    for caller in children.callers(journal, run_id):
        if caller not in chosen and rundocs.read(journal, caller) is not None:
            return f"it belongs to {caller}, which stays"
    owner = holder(journal, rundocs.lease_key(run_id))
    return "a process is running it" if owner is not None and alive(owner, now=journal.clock()) else None


def keys_of(journal: Journal, run_id: str) -> list[str]:
    """The rows of a run but for its document and its places in the indexes of runs, which go last."""
    name = in_key(run_id)
    linked = [f"cp/{in_key(child)}/{name}" for child in children.children(journal, run_id)]
    linked += [f"ch/{in_key(caller)}/{name}" for caller in children.callers(journal, run_id)]
    for key, _ in journal.scan(f"ht/{name}/"):
        task = key.rpartition("/")[2]
        if (text := journal.get(f"h/{task}")) is not None:
            linked += [f"xt/open/{int(orjson.loads(text)['created_at'] * 1000):014d}-{task}", f"h/{task}"]
    for key, text in journal.scan(f"w/{name}/"):
        linked += events.waiting_for(key, orjson.loads(text)["names"])
    linked += [rundocs.wake_key(run_id), f"ab/{name}"]
    found = [key for key in linked if journal.get(key) is not None]
    return found + [key for family in _FAMILIES for key, _ in journal.keys(f"{family}/{name}/")]


def _pointers(journal: Journal) -> dict[str, list[str]]:
    found = defaultdict(list)
    for key, run_id in journal.scan("p/"):
        found[run_id].append(key)
    return found


def _sent(journal: Journal) -> dict[str, list[str]]:
    """The events that wait for one run alone, by the run as it stands in keys."""
    found = defaultdict(list)
    for key, _ in journal.keys("ev/"):
        target = key.split("/")[2]
        if target != events.ANY:
            found[target].append(key)
    return found


def _remove(journal: Journal, run_id: str, state: str, keys: list[str], pointers: list[str]) -> None:
    lease = acquire(journal, rundocs.lease_key(run_id), what=f"run {run_id}", run_id=run_id)
    try:
        document = rundocs.read(journal, run_id)
        if document is None or document["status"] not in (state, "running"):
            raise RunBusy(f"run {run_id} has been taken up in the meantime.", run_id)
        # The document goes last: a purge that is cut off before can be taken up again.
        for start in range(0, len(keys), _CHUNK):
            journal.commit([Drop(key) for key in keys[start : start + _CHUNK]], fence=lease.fence)

        def forget(txn: Txn) -> None:
            txn.check(lease.fence)
            for key in pointers:
                if txn.get(key) == run_id:  # it may point to a newer run by now
                    txn.drop(key)
            txn.apply(rundocs.erase(document))

        journal.guarded(forget)
    finally:
        lease.release()
    journal.clear_marks(run_id)


def _sweep_events(journal: Journal) -> None:
    """Events of runs that are gone: sent while a purge was at work, or left by one that was cut off."""
    ops = [Drop(key) for run, keys in _sent(journal).items() if journal.get(f"r/{run}") is None for key in keys]
    for start in range(0, len(ops), _CHUNK):
        journal.commit(ops[start : start + _CHUNK])


def _sweep_leases(journal: Journal) -> None:
    """Leases of purged runs whose last owner is gone. Before that its row is what refuses that owner's late commits."""
    ops: list[Op] = []
    for key, _ in journal.scan("lease/"):
        owner = holder(journal, key)
        if owner is not None and gone(journal, owner) and journal.get(f"r/{key.removeprefix('lease/')}") is None:
            ops.append(Drop(key))
    for start in range(0, len(ops), _CHUNK):
        journal.commit(ops[start : start + _CHUNK])
