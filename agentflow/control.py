"""Cancelling a run, from any process: one transaction ends it, and refuses whatever its owner commits afterwards."""

from __future__ import annotations

from typing import Any

import orjson

from agentflow import human, rundocs
from agentflow.errors import UsageError
from agentflow.index import in_key
from agentflow.journal import Journal, Txn
from agentflow.lease import lost, revoke
from agentflow.settings import now


def cancel(journal: Journal, run_id: str, *, compensate: bool) -> dict[str, Any]:
    """End a run and those that its body has started, children after their parent. Gives the run's new document.

    With ``compensate`` the run is left to be undone, and is cancelled once that is done: it is for the caller to
    execute its body for that.

    Raises:
        UsageError: it has completed or failed; nothing was changed.
    """

    def end(txn: Txn) -> dict[str, Any]:
        document: dict[str, Any] = orjson.loads(txn.get(f"r/{in_key(run_id)}") or "{}")
        if document["status"] == "cancelled":
            return document
        if document["status"] in ("completed", "failed") and not document.get("undoing"):
            raise UsageError(f"run {run_id} has {document['status']}: there is nothing to cancel.")
        revoke(txn, rundocs.lease_key(run_id))
        document.pop("waiting_on", None)
        document.pop("due", None)
        if compensate:
            document["cancelling"] = True
        else:
            document["ended_at"] = now()
        txn.apply(rundocs.write(document, "interrupted" if compensate else "cancelled"))
        # Nobody else commits while this transaction is open: what is read here is what there is.
        txn.apply(human.withdrawn(journal, run_id, now()))
        if any(txn.scan(f"{family}/{in_key(run_id)}/") for family in ("i", "b")):
            # A provider may have something of it: leftover.py cancels that.
            txn.put(f"ab/{in_key(run_id)}", orjson.dumps({"run": run_id, "at": now()}).decode())
        return document

    document = journal.guarded(end)
    lost(journal, rundocs.lease_key(run_id))
    for _, child in journal.scan(f"ch/{in_key(run_id)}/"):
        other = rundocs.read(journal, child)
        if other is not None and other["status"] not in ("completed", "failed", "cancelled"):
            cancel(journal, child, compensate=compensate)
    if not compensate:
        journal.clear_marks(run_id)
    return document
