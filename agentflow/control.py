"""Cancelling a run, from any process: one transaction ends it, and refuses whatever its owner commits afterwards."""

from __future__ import annotations

from typing import Any

import orjson

from agentflow import children, human, rundocs
from agentflow.errors import UsageError
from agentflow.index import in_key
from agentflow.journal import Journal, Txn
from agentflow.lease import lost, revoke
from agentflow.settings import now

_ENDED = ("completed", "failed", "cancelled")


def cancel(journal: Journal, run_id: str, *, compensate: bool) -> dict[str, Any]:
    """End a run and those that its body has started, all in one transaction. Gives the run's new document.

    With ``compensate`` the run is left to be undone, and is cancelled once that is done: it is for the caller to
    execute its body for that, and with it those of the runs inside.

    Raises:
        UsageError: it has completed or failed; nothing was changed.
    """

    def end(txn: Txn) -> tuple[dict[str, Any], list[str]]:
        # Nobody else commits while this transaction is open: what is read here is what there is.
        asked, ended, at = _document(journal, run_id), list[str](), now()
        if asked["status"] in ("completed", "failed") and not asked.get("undoing"):
            raise UsageError(f"run {run_id} has {asked['status']}: there is nothing to cancel.")
        left = [asked]
        while left:
            document = left.pop()
            if document["status"] != "cancelled":
                revoke(txn, rundocs.lease_key(document["id"]))
                document.pop("waiting_on", None)
                document.pop("due", None)
                if compensate:
                    document["cancelling"] = True
                else:
                    document["ended_at"] = at
                txn.apply(rundocs.write(document, "interrupted" if compensate else "cancelled"))
                txn.apply(human.withdrawn(journal, document["id"], at))
                if any(txn.scan(f"{family}/{in_key(document['id'])}/") for family in ("i", "b")):
                    # A provider may have something of it: leftover.py cancels that.
                    row = orjson.dumps({"run": document["id"], "at": at}).decode()
                    txn.put(f"ab/{in_key(document['id'])}", row)
                ended.append(document["id"])
            inside = (_document(journal, child) for child in children.children(journal, document["id"]))
            left += [child for child in inside if child and child["id"] not in ended and child["status"] not in _ENDED]
        return asked, ended

    document, ended = journal.guarded(end)
    for each in ended:
        lost(journal, rundocs.lease_key(each))
        if not compensate:
            journal.clear_marks(each)
    return document


def _document(journal: Journal, run_id: str) -> dict[str, Any]:
    return rundocs.read(journal, run_id) or {}
