"""A paid reply that did not validate is tried first when nothing but the form of its answer has been edited since.

The form is all that says which type is wanted: the strict schema, or for servers without one the words in the system
message. Of a conversation with tools the turns before the invalid one are used as well: the call that was edited takes
the place of the one that failed, and so finds what that one had inside.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from weakref import WeakKeyDictionary

import orjson

from agentflow.calls import Call
from agentflow.capture import data_digest
from agentflow.index import NS, Row, Slot
from agentflow.providers.registry import without_words

# The records of an execution by name, and by the digest of their request without its form.
_by_form: WeakKeyDictionary[Any, dict[str, dict[str, list[Slot]]]] = WeakKeyDictionary()


def without_form(request: dict[str, Any]) -> dict[str, Any]:
    """A request without what says how it is to be answered; the request itself stays as it is."""
    made: dict[str, Any] = {**request, "body": dict(request["body"])}
    body = made["body"]
    body.pop("response_format", None)
    for key in ("text", "output_config"):
        if isinstance(body.get(key), dict) and "format" in body[key]:
            body[key] = {name: value for name, value in body[key].items() if name != "format"}
            if not body[key]:
                del body[key]
    without_words(body)
    return made


def replies(call: Call, turn: bool) -> list[dict[str, Any]]:
    """What an invalid call of the same request, but for its form, had been answered, oldest first.

    Args:
        call: a model call of which nothing is on record.
        turn: whether it is a turn of a conversation with tools, in which a valid turn may be used too.
    """
    ex = call.ex
    for slot, row in _alike(call, orjson.loads(call.given)):
        head = row.head
        if not (_invalid(row) or (turn and head["status"] == "completed")):
            continue
        prefix = f"m/{ex.key}/{head['occ']}/{head['epoch']}.{head['sample']}/"
        found = [orjson.loads(text) for _, text in ex.journal.scan(prefix)]
        # The whole of a large request stands with its reply alone.
        if found and (row.given or _asked(call, found[0], head["given"]) == without_form(call.request)):
            ex.records.claim(slot)
            return found
    return []


def adopt(call: Call) -> bool:
    """Lets a conversation with tools go on where an invalid one of the same request, but for its form, had ended.

    False where there is none.
    """
    for slot, row in _alike(call, _request(call.given)):
        if _invalid(row) and row.given and row.head["epoch"] == call.here.epoch:
            call.ex.records.claim(slot)
            call.occ = row.head["occ"]
            return True
    return False


def _request(given: str) -> dict[str, Any]:
    request: dict[str, Any] = orjson.loads(given)["kwargs"]["request"]
    return request


def _alike(call: Call, request: dict[str, Any]) -> list[tuple[Slot, Row]]:
    """Unclaimed records of that name whose request is this one but for its form, or too large to stand with them.

    They are gone through once in an execution, so that a fan-out does not read all of them for each of its calls.
    """
    ex, name = call.ex, call.ident[:NS]
    known = {} if ex.scratch else _by_form.setdefault(ex, {})
    if name not in known:
        known[name] = defaultdict(list)
        for slot in ex.unclaimed(call):
            if (n := ex.newest(slot)) is None or (row := ex.records.row(slot, n)).head["kind"] != call.kind:
                continue
            asked = orjson.loads(row.given) if row.given else None
            asked = asked["kwargs"]["request"] if asked and call.kind == "agent" else asked
            known[name][data_digest(without_form(asked)) if asked else ""].append(slot)
    slots = [*known[name].get(data_digest(without_form(request)), ()), *known[name].get("", ())]
    newest = [(slot, n) for slot in slots if not slot.claimed and (n := ex.newest(slot)) is not None]
    return [(slot, ex.records.row(slot, n)) for slot, n in newest]


def _invalid(row: Row) -> bool:
    head = row.head
    return bool(head["status"] == "failed" and head["error"]["name"] == "InvalidReply")


def _asked(call: Call, reply: dict[str, Any], given: str) -> dict[str, Any] | None:
    """The request that a reply answers, if it is the whole of what its step was given, but for its form."""
    asked = {**call.request, "body": reply["request"]}
    return without_form(asked) if data_digest(asked) == given else None
