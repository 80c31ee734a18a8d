"""The ledger: one small row for each paid reply, for what replays saved, and for calls whose outcome nobody knows.

A row's key is ``l/<milliseconds>/<reply key>``: rows lie in the order of time, and one reply has one row however often
its commit is repeated. It is written in the commit that records the reply. A replay writes nothing here but what it
avoided, once for each execution of a run. All amounts are decimal dollars as text; None is an unknown price.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import orjson

from agentflow.calls import Call, Current
from agentflow.index import in_key
from agentflow.journal import Add, Journal, Op, Put

Entry = tuple[str, dict[str, Any]]


def reply(call: Call, current: Current, raw: dict[str, Any], model: str, key: str, at_most: Decimal | None) -> Entry:
    """The ledger's row for a reply that is recorded under ``key``.

    Args:
        call, current: the step that asked, and its attempt.
        raw: the reply.
        model: the model that was asked.
        key: the reply's key, ``m/...``.
        at_most: what was set aside for it; counts against budgets where the price turned out unknown.
    """
    what = facts(call, current, f"{raw['provider']}:{model}") | _used(raw)
    if raw["cost"] is None and at_most is not None:
        what["at_most"] = str(at_most)
    return _key(call.ex.clock(), key[2:]), what


def batched(ex: Any, step: str, name: str, raw: dict[str, Any], model: str, key: str) -> Entry:
    """The row for a reply that came with a batch, possibly for a call that nobody makes any more.

    Args:
        ex: the execution of the run.
        step, name: the step of the body under which the call is counted, and the call's own name.
        raw, model, key: as for ``reply``.
    """
    return _key(ex.clock(), key[2:]), _facts(ex, step, name, f"{raw['provider']}:{model}") | _used(raw)


def _used(raw: dict[str, Any]) -> dict[str, Any]:
    usage = raw["usage"]
    return {"cost": raw["cost"], "price": raw["price"], "in": usage["input_tokens"], "out": usage["output_tokens"]}


def in_doubt(call: Call, current: Current, model: str, at_most: Decimal | None, why: str) -> Op:
    """A row for a call that was sent and whose answer never came: the provider may have charged for it."""
    what = facts(call, current, model) | {"doubt": why, "at_most": None if at_most is None else str(at_most)}
    around = f"{call.here.epoch}.{current.sample}.{current.attempt}"
    return add((_key(call.ex.clock(), f"{call.ex.key}/{call.occ}/{around}/doubt"), what))


def saved(run_id: str, workflow: str, at: float, what: dict[tuple[str, str], Decimal]) -> list[Op]:
    """One row for all that an execution did not pay again, by step and model."""
    split = [[step, model, str(amount)] for (step, model), amount in what.items()]
    if not split:
        return []
    row = {"run": run_id, "workflow": workflow, "saved": split}
    return [add((_key(at, f"{in_key(run_id)}/saved/{os.urandom(4).hex()}"), row))]


def add(entry: Entry) -> Op:
    """What records a row."""
    return Add(entry[0], orjson.dumps(entry[1]).decode())


def judged(current: Current, *, wasted: bool) -> list[Op]:
    """What notes that the replies an attempt stood on were for nothing, or that they were of use after all."""
    ops: list[Op] = []
    for key, row in current.entries:
        if row.get("wasted", False) != wasted:
            row["wasted"] = wasted
            ops.append(Put(key, orjson.dumps(row).decode()))
    return ops


def _key(at: float, rest: str) -> str:
    return f"l/{int(at * 1000):014d}/{rest}"


def facts(call: Call, current: Current, model: str) -> dict[str, Any]:
    """Who asks whom, for what."""
    return _facts(call.ex, outermost(current), call.name, model)


def _facts(ex: Any, step: str, name: str, model: str) -> dict[str, Any]:
    row = {"run": ex.run_id, "workflow": ex.workflow, "step": step, "call": name, "model": model}
    return row | ({"within": [around.key for around in ex.within()]} if ex.around is not None else {})


def model_of(request: Any) -> str:
    """A recorded request's model with its provider, as people write it."""
    return "" if request is None else f"{request['provider']}:{request['model']}"


def outermost(current: Current) -> str:
    """The step of the body, under which a call inside it is counted."""
    while current.parent is not None:
        current = current.parent
    return current.name


def texts(journal: Journal, since: float | None = None) -> Iterator[tuple[float, str, str]]:
    """All rows from ``since`` (seconds since 1970; None: all): when, key, facts as text."""
    for key, text in journal.scan("l/", after=None if since is None else _key(max(since, 0), "")):
        yield int(key[2:16]) / 1000, key, text


def entries(journal: Journal) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """All rows: when, key, facts."""
    for at, key, text in texts(journal):
        yield at, key, orjson.loads(text)
