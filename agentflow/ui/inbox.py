"""What people are asked, and their answers. Deciding is ``agentflow.tasks``: the first decision wins."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import orjson

from agentflow import human, rundocs, shapes, taskdocs, tasks, worker
from agentflow.errors import UsageError
from agentflow.index import in_key
from agentflow.journal import Journal
from agentflow.records import HumanTask
from agentflow.settings import now
from agentflow.shown import shown as without_secrets
from agentflow.ui.values import text_of, with_texts

MOST = 200


def listed(journal: Journal, which: str, run_id: str | None, assign_to: str | None) -> dict[str, Any]:
    """Tasks as in ``tasks list --json``, at most ``MOST`` of them.

    Args:
        journal: where they are.
        which: ``open``, oldest first, or ``all``, newest first.
        run_id: only those of one run. None: of all.
        assign_to: only those that are for this person now. None: for whomever.

    Returns:
        ``tasks``; ``more``, whether there are others; ``open``, how many are open in the whole journal.
    """
    if which not in ("open", "all"):
        raise UsageError(f"status={which!r}: open or all.")
    found = (task for task in _documents(journal, which, run_id) if assign_to is None or assign_to in _names(task))
    if which == "open":
        some = [task for task, _ in zip(found, range(MOST + 1), strict=False)]
    else:
        some = heapq.nlargest(MOST + 1, found, key=lambda task: float(task["created_at"]))
    return {
        "tasks": [shown(human.task_of(task)) for task in some[:MOST]],
        "more": len(some) > MOST,
        "open": sum(1 for _ in journal.keys("xt/open/")),
    }


def shown(task: HumanTask) -> dict[str, Any]:
    """A task as in ``tasks show --json``, with ``step``, ``command`` (answers it in a terminal) and ``answer``."""
    more: dict[str, Any] = {"step": task.extra["step"], "command": human.command(task.id, task.schema, task.type)}
    more["answer"] = None if task.decision is None else task.decision.data
    return with_texts(shapes.task(task) | more, ("data", "answer"))


def in_full(task: HumanTask, name: str) -> str:
    """What a task shows (``data``), or was answered with (``answer``), in full."""
    return text_of(without_secrets(task.data if name == "data" else task.decision and task.decision.data))


def goes_on(journal: Journal, task: HumanTask) -> dict[str, Any]:
    """Who goes on with the run of a task that was decided.

    Returns:
        ``running``: whether a process has the run in hand at this moment; ``workers``: the live workers that know its
        workflow; ``command``: what else goes on with it.
    """
    document = rundocs.read(journal, task.run_id)
    running = document is not None and rundocs.status_of(journal, document) == "running"
    workers = [each for each in worker.enrolled(journal) if each["alive"] and task.workflow in each["workflows"]]
    return {
        "running": running,
        "workers": [f"{each['id']} (process {each['pid']})" for each in workers],
        "command": f"agentflow runs resume {task.run_id} --module app:flow",
        "worker": "agentflow worker app:flow",
    }


def decide(task_id: str, how: str, given: dict[str, Any]) -> HumanTask:
    """Approve, reject or answer.

    Args:
        task_id: the whole id.
        how: ``approve``, ``reject`` or ``answer``.
        given: ``by`` and ``comment``, text or None; for an answer ``data``.

    Raises:
        TaskClosed: decided, expired or withdrawn already; the message says by whom.
        UsageError: the answer does not fit; the message names the field.
        TaskNotFound: no such task.
    """
    by, comment = (word.strip() or None if isinstance(word := given.get(n), str) else word for n in ("by", "comment"))
    if how == "answer":
        if "data" not in given:
            raise UsageError("an answer needs data.")
        return tasks.answer(task_id, given["data"], by=by, comment=comment)
    return (tasks.approve if how == "approve" else tasks.reject)(task_id, by=by, comment=comment)


def _documents(journal: Journal, which: str, run_id: str | None) -> Iterator[dict[str, Any]]:
    moment = now()
    if run_id is not None:
        idents = (key.rpartition("/")[2] for key, _ in journal.scan(f"ht/{in_key(run_id)}/"))
        texts = (journal.get(f"h/{ident}") for ident in idents)
    elif which == "open":
        texts = (journal.get(f"h/{ident}") for _, ident in journal.scan("xt/open/"))
    else:
        texts = (text for _, text in journal.scan("h/"))
    for text in texts:
        document = taskdocs.escalated(orjson.loads(text), moment) if text else None
        if document is not None and (which == "all" or document["status"] == "open"):
            yield document


def _names(task: dict[str, Any]) -> list[str]:
    names = task["assign_to"]
    return [names] if isinstance(names, str) else list(names or ())
