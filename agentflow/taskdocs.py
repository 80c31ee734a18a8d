"""What happens to a task's document while nobody answers: it is escalated, people are reminded, a trail is kept.

Plain functions of the document and the time: everybody who looks at a task, its run or somebody at a terminal, sees it
as it stands at that moment, whether or not a process was there when the moment came.
"""

from __future__ import annotations

from typing import Any

from agentflow.records import Escalate

Document = dict[str, Any]


def noted(document: Document, what: str, at: float, **more: Any) -> Document:
    """The document with one more line in its trail."""
    entry = {"at": at, "what": what, **{name: value for name, value in more.items() if value is not None}}
    return document | {"trail": [*document.get("trail", ()), entry]}


def ladder(on_timeout: Any) -> list[Document]:
    """The assignees after the first, each with the seconds that it has, as ``on_timeout=Escalate(...)`` names them."""
    found = []
    while isinstance(on_timeout, Escalate):
        found.append({"assign_to": on_timeout.assign_to, "seconds": on_timeout.timeout})
        on_timeout = on_timeout.on_timeout
    return found


def escalated(document: Document, now: float) -> Document:
    """With each assignee's time from the recorded end of the one before, however late somebody looks."""
    while document["status"] == "open" and document.get("escalate") and now >= document["deadline"]:
        step, *rest = document["escalate"]
        at = document["deadline"]
        document = noted(document, "escalated", at, assign_to=step["assign_to"], before=document["assign_to"])
        document |= {"assign_to": step["assign_to"], "escalate": rest}
        document["deadline"] = None if step["seconds"] is None else at + step["seconds"]
    return document


def reminded(document: Document, now: float) -> Document:
    """With one reminder for all whose time has come."""
    due = document.get("remind_at")
    if document["status"] != "open" or due is None or now < due:
        return document
    if document["deadline"] is not None and now >= document["deadline"]:
        return document
    every = document["remind"]
    document = noted(document, "reminded", now, assign_to=document["assign_to"])
    return document | {"remind_at": due + every * (1 + (now - due) // every)}


def closed(document: Document, status: str, at: float) -> Document:
    """Expired or withdrawn: nobody has answered, and nobody can any more."""
    return noted(document | {"status": status}, status, at)
