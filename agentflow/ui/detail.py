"""One step with all that is recorded of it: what it was given and gave, its model calls, its attempts."""

from __future__ import annotations

from typing import Any

import orjson

from agentflow import shapes
from agentflow.context import view
from agentflow.errors import RunNotFound
from agentflow.handles import Run
from agentflow.index import Row, in_key
from agentflow.journal import Journal
from agentflow.shown import shown
from agentflow.ui import board
from agentflow.ui.prompts import answer, conversation
from agentflow.ui.values import cut, text_of, with_texts

Document = dict[str, Any]


def step(journal: Journal, document: Document, step_id: str) -> dict[str, Any]:
    """One step: as in a run's ``steps``, with ``output``, ``usage``, ``given`` and ``calls``, the model calls.

    Each call has ``provider, model, at, status, request_id, usage, cost, price``, the ``prompt`` as messages (``role``
    and ``text``), the ``reply`` as text, and ``texts``: the ``request`` and the reply's ``body`` as JSON text.

    Raises:
        RunNotFound: the run has no such step.
    """
    found, row = board.one(journal, document, step_id)
    made = with_texts(found | _recorded(row), ("output", "given"))
    made["calls"] = []
    for each in _calls(journal, document, step_id, row):
        request, body = each.pop("request"), each.pop("body")
        prompt = [{"role": message["role"], **cut(message["text"])} for message in conversation(request)]
        texts = {name: cut(value) for name, value in (("request", request), ("body", body))}
        made["calls"].append(each | {"prompt": prompt, "reply": cut(answer(body)), "texts": texts})
    return made


def text(journal: Journal, document: Document, step_id: str | None, name: str) -> str:
    """One value in full, as text.

    Args:
        journal, document: the run.
        step_id: the step; None: the run itself, which has ``input`` and ``output``.
        name: ``output``, ``given``, or of model call 0 ``calls.0.request``, ``calls.0.body``, ``calls.0.reply``,
            and ``calls.0.prompt.1`` for its second message.

    Raises:
        RunNotFound: there is no such value.
    """
    if step_id is None:
        tree: Any = shown(shapes.whole(Run(journal, document)))
    else:
        _, row = board.one(journal, document, step_id)
        tree = shown(_recorded(row))
        tree["calls"] = [
            each | {"reply": answer(each["body"]), "prompt": [m["text"] for m in conversation(each["request"])]}
            for each in _calls(journal, document, step_id, row)
        ]
    for part in name.split("."):
        if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            raise RunNotFound(f"there is no {name!r} of {step_id or document['id']}.")
    return text_of(tree)


def _recorded(row: Row | None) -> dict[str, Any]:
    if row is None:
        return {"output": None, "usage": None, "given": None}
    record = view(row)
    return {"output": record.output, "usage": record.usage, "given": orjson.loads(row.given) if row.given else None}


def _calls(journal: Journal, document: Document, step_id: str, row: Row | None) -> list[dict[str, Any]]:
    """Its model calls, in the order of their replies, without secrets."""
    run_id = document["id"] if row is None else row.head["run"]  # a fork's records came with the replies of its parent
    names = ("provider", "model", "at", "status", "request_id", "usage", "price", "request", "body")
    found = []
    for _, raw in journal.scan(f"m/{in_key(run_id)}/{step_id}/"):
        facts = orjson.loads(raw)
        cost = None if facts.get("cost") is None else float(facts["cost"])
        found.append({name: facts.get(name) for name in names} | {"cost": cost})
    return sorted(shown(found), key=lambda call: str(call["at"]))
