"""Human tasks, looked at and answered from outside. These functions record; they resume nothing."""

from __future__ import annotations

import builtins
from typing import Any

import orjson

from agentflow import human, rundocs, taskdocs
from agentflow.durations import words
from agentflow.errors import TaskClosed, TaskNotFound, UsageError
from agentflow.journal import Journal
from agentflow.records import UNSET, HumanTask, moment
from agentflow.rich import Listed
from agentflow.scratch import open_journal
from agentflow.settings import now, settings

STATUSES = ("open", "approved", "rejected", "answered", "expired", "withdrawn")


def list(
    *,
    status: str | None = "open",
    run_id: str | None = None,
    assign_to: str | None = None,
    limit: int | None = None,
) -> builtins.list[HumanTask]:
    """Tasks, oldest first.

    Args:
        status: open, approved, rejected, answered, expired or withdrawn; None: all.
        run_id: only those of one run.
        assign_to: only those that are for this person now. None: for whomever.
        limit: at most so many. None: all.
    """
    if status is not None and status not in STATUSES:
        raise UsageError(f"status={status!r} is none of {', '.join(STATUSES)}.")
    journal, moment_ = open_journal(), now()
    found: builtins.list[HumanTask] = Listed()
    if status == "open":
        documents = (journal.get(f"h/{ident}") for _, ident in journal.scan("xt/open/"))
    else:
        documents = (text for _, text in journal.scan("h/"))
    for text in documents:
        document = orjson.loads(text) if text else {}
        if not document or (status is not None and document["status"] != status):
            continue
        if run_id is not None and document["run_id"] != run_id:
            continue
        document = taskdocs.escalated(document, moment_)
        names = document["assign_to"]
        if assign_to is not None and assign_to not in ([names] if isinstance(names, str) else names or ()):
            continue
        found.append(human.task_of(document))
    found.sort(key=lambda task: (task.created_at, task.id))
    return found[:limit]


def get(task_id: str) -> HumanTask:
    """One task, by its id or by an unambiguous beginning of it."""
    return human.task_of(taskdocs.escalated(_find(open_journal(), task_id), now()))


def approve(task_id: str, *, by: str | None = None, comment: str | None = None) -> HumanTask:
    """Approve what the task shows. The first decision wins.

    Args:
        task_id: the task's id, or an unambiguous beginning of it.
        by: who decides; a claim, unless ``configure(authorize=)`` checks it.
        comment: kept with the decision.

    Raises:
        TaskClosed: decided, expired or withdrawn already; the message says by whom.
        TaskNotFound: no such task.
    """
    return _decide(task_id, True, by, comment, UNSET)


def reject(task_id: str, *, by: str | None = None, comment: str | None = None) -> HumanTask:
    """Reject what the task shows; as ``approve``."""
    return _decide(task_id, False, by, comment, UNSET)


def answer(task_id: str, data: Any, by: str | None = None, comment: str | None = None) -> HumanTask:
    """Answer with data, which is checked here; as ``approve``.

    The schema's type checks it where this process has asked the question, elsewhere its JSON schema does. Where the
    data shown is itself such a form, filled in, the fields given here replace those shown, and ``approve`` takes it as
    it is.
    """
    return _decide(task_id, True, by, comment, data)


def _find(journal: Journal, task_id: str) -> dict[str, Any]:
    if not isinstance(task_id, str) or not task_id:
        raise UsageError(f"task id {task_id!r} is not text.")
    text = journal.get(f"h/{task_id}")
    if text is not None:
        return dict(orjson.loads(text))
    start = task_id if task_id.startswith("t-") else f"t-{task_id}"
    matches = [(key[2:], text) for key, text in journal.scan(f"h/{start}", limit=6)]
    if not matches:
        raise TaskNotFound(f"no task {task_id!r} in {journal.path}. `agentflow tasks list` shows what is open.")
    if len(matches) > 1:
        raise TaskNotFound(f"{task_id!r} is short for several tasks: {', '.join(key for key, _ in matches)}.")
    return dict(orjson.loads(matches[0][1]))


def _decide(task_id: str, approved: bool, by: str | None, comment: str | None, data: Any) -> HumanTask:
    for name, value in (("by", by), ("comment", comment)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{name}={value!r} is not text.")
    journal = open_journal()
    at = now()
    found = taskdocs.escalated(_find(journal, task_id), at)
    if settings.authorize is not None and not settings.authorize(human.task_of(found), by):
        raise _closed(found, f"{by or 'nobody named'} may not decide task {found['id']}.")
    _refuse_closed(found, at)
    # Before the transaction, which everybody's commits wait for: the schema's own validators run here.
    answered = human.answered(journal, found, approved, by, at, comment, data)

    def decide(txn: Any) -> dict[str, Any]:
        document = taskdocs.escalated(orjson.loads(txn.get(f"h/{found['id']}")), at)
        _refuse_closed(document, at)
        more = {"by": by, "comment": comment, "digest": document["digest"]}
        decided: dict[str, Any] = taskdocs.noted(document | answered, answered["status"], at, **more)
        txn.put(f"h/{document['id']}", orjson.dumps(decided).decode())
        txn.drop(human.open_key(document))
        txn.put(rundocs.wake_key(document["run_id"]), document["run_id"])
        return decided

    return human.task_of(journal.guarded(decide))


def _refuse_closed(document: dict[str, Any], at: float) -> None:
    if document["status"] == "open" and document["deadline"] is not None and at >= document["deadline"]:
        raise _closed(
            document,
            f"task {document['id']} expired {words(at - document['deadline'])} ago: its deadline has passed.",
        )
    if document["status"] != "open":
        raise _closed(document, _why_closed(document))


def _why_closed(document: dict[str, Any]) -> str:
    status, outcome = document["status"], document["outcome"] or {}
    if status == "withdrawn":
        return f"task {document['id']} was withdrawn: its run does not ask for it any more."
    if status == "expired":
        return f"task {document['id']} has expired: its deadline passed before an answer came."
    who = outcome.get("by") or "somebody"
    when = moment(outcome.get("at"))
    return f"task {document['id']} was {status} already, by {who}" + (
        f" at {when:%Y-%m-%d %H:%M:%S} UTC." if when else "."
    )


def _closed(document: dict[str, Any], message: str) -> TaskClosed:
    error = TaskClosed(message)
    error.task_id = document["id"]
    return error
