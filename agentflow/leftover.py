"""What a cancelled run still has at its providers: batches, and calls in the background.

The transaction that cancels a run notes it (``ab/<run>``). From then on, at once and whenever a worker looks, the
providers are asked to cancel what they have, until all of it has ended. What they answer nevertheless has been paid
for: each reply is recorded with its row in the ledger, as if the run had gone on. Nothing here changes what the run is.

One process at a time looks after a run, by a lease of its own: the run's lease was revoked.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from typing import Any

import orjson

from agentflow import batches, budgets, costs, providers, rundocs
from agentflow.background import ENDED, LOOK_TIMEOUT
from agentflow.calls import here
from agentflow.drive import drive
from agentflow.errors import ModelError, RunBusy
from agentflow.index import in_key
from agentflow.journal import Add, Drop, Journal
from agentflow.lease import acquire
from agentflow.portal import run_coroutine
from agentflow.providers.common import now as now_text
from agentflow.redact import redact
from agentflow.run import Execution
from agentflow.settings import log, now

AT_ONCE = 20.0  # seconds that cancelling a run takes at most for this; a worker goes on
AGAIN = 60.0  # seconds between two looks of a worker
GIVE_UP = 2 * 86400.0  # a batch ends within a day, a call in the background sooner


def left(journal: Journal) -> Iterator[tuple[str, float]]:
    """The cancelled runs that may have something at a provider, and when they were cancelled."""
    for _, text in journal.scan("ab/"):
        row = orjson.loads(text)
        yield row["run"], row["at"]


def cancel(journal: Journal, run_id: str) -> None:
    """Ask providers to cancel what a cancelled run, and those that it has started, have there. Never raises."""
    for each in _with_children(journal, run_id):
        if journal.get(f"ab/{in_key(each)}") is None:
            continue

        async def ask(each: str = each) -> None:
            async with asyncio.timeout(AT_ONCE):
                await settle(journal, each)

        context = contextvars.copy_context()
        context.run(here.set, None)
        try:
            context.run(run_coroutine, ask())
        except Exception as error:  # the run is cancelled, whatever the provider says
            _not_yet(each, error)


async def collect(journal: Journal) -> None:
    """Look after all cancelled runs once, as a worker does. Never raises."""
    for run_id, at in list(left(journal)):
        try:
            if await settle(journal, run_id):
                continue
        except RunBusy:  # another process looks after it
            continue
        except Exception as error:
            _not_yet(run_id, error)
        if now() - at > GIVE_UP:
            log.warning("%s · what it has at its providers has not ended in two days: it is given up", run_id)
            journal.commit([Drop(f"ab/{in_key(run_id)}")])


def _not_yet(run_id: str, error: BaseException) -> None:
    why = redact(f"{type(error).__name__}: {error}")
    log.warning("%s · is cancelled; what it has at its provider could not be (%s); a worker tries again", run_id, why)


def _with_children(journal: Journal, run_id: str) -> Iterator[str]:
    yield run_id
    for _, child in journal.scan(f"ch/{in_key(run_id)}/"):
        yield from _with_children(journal, child)


async def settle(journal: Journal, run_id: str) -> bool:
    """Cancel what a cancelled run has at its providers, record what they answered; whether all of it has ended.

    Raises:
        RunBusy: another process is at it.
        ModelError, UsageError: a provider cannot be asked now.
    """
    note, document = f"ab/{in_key(run_id)}", rundocs.read(journal, run_id)
    if document is None:
        journal.commit([Drop(note)])
        return True
    lease = acquire(journal, f"lease-{note}", what=f"what run {run_id} has left at its providers", run_id=run_id)
    done = False
    try:
        ex = Execution(journal, run_id, document["workflow"], drive)
        ex.fence = lease.fence
        calls = await _calls(ex)
        done = await batches.Batches(ex).leave() and calls
    finally:
        lease.release([Drop(note)] if done else [])
        if done:
            journal.commit([Drop(lease.key)])
    return done


async def _calls(ex: Execution) -> bool:
    """Cancel the run's calls in the background; whether all have ended."""
    rows = dict(ex.journal.scan(f"i/{ex.key}/"))
    done = True
    for key, text in rows.items():
        row, occ = orjson.loads(text) if "!" not in key else {}, key.split("/")[2]
        if not row or f"{key}!lost" in rows or row["id"] in _answered(ex, occ):
            continue
        try:
            raw = await _cancelled(row)
        except ModelError as error:
            if error.status not in (404, 410):
                raise
            await ex.journal.acommit([Add(f"{key}!lost", now_text())], fence=ex.fence)
            continue
        if raw["body"].get("status") not in ENDED:
            done = False
            continue
        await _record(ex, occ, row, raw)
        ex.say(f"{row['step']}: call {row['id']} is {raw['body'].get('status')} at the provider")
    return done


def _answered(ex: Execution, occ: str) -> set[Any]:
    """The ids of a step's calls whose replies are recorded."""
    bodies = [orjson.loads(text)["body"] for _, text in ex.journal.scan(f"m/{ex.key}/{occ}/")]
    return {body.get("id") for body in bodies if isinstance(body, dict)}


async def _cancelled(row: dict[str, Any]) -> dict[str, Any]:
    """A call in the background after the provider was asked to cancel it."""
    provider = providers.get(row["provider"])
    asked = row.get("body") or {"model": ""}
    try:
        raw: dict[str, Any] = await provider.cancel(row["id"], asked, LOOK_TIMEOUT)
    except ModelError as error:
        if error.status is None or not 400 <= error.status < 500 or error.status in (401, 403, 404, 410, 429):
            raise
        raw = await provider.retrieve(row["id"], asked, LOOK_TIMEOUT)  # it has ended already, say
    if not isinstance(raw["body"], dict) or raw["body"].get("id") != row["id"]:
        raise ModelError(f"{row['provider']}: no call came, but {str(raw['body'])[:80]!r}", retryable=True)
    return raw


async def _record(ex: Execution, occ: str, row: dict[str, Any], raw: dict[str, Any]) -> None:
    """Keep what a call has answered, with its row in the ledger, in place of what was set aside for it."""
    place = f"m/{ex.key}/{occ}/left/{in_key(row['id'])}"
    entry = costs.batched(ex, row["step"], row["step"], raw, raw["model"], place)
    facts = {"step": row["step"], "asked": row["asked"], "request": row.get("body", {}), "ledger": entry[0]}
    kept = orjson.dumps({**raw, **facts}).decode()
    back = [Drop(key) for key, _ in budgets.left_behind(ex.journal, ex.key, occ)]
    await ex.journal.acommit([Add(place, kept), costs.add(entry), *back], fence=ex.fence, paid=True)
