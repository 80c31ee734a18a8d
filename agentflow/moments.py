"""A model call that had not ended when its process did is found again although its prompt holds another moment now.

A clock reading or a uuid in a prompt makes another request of each start. For what is recorded ``reuse.like`` sees to
that. What has no record yet may have cost as much: the turns of a conversation, a call in the background, a request in
a batch. So a call whose prompt could hold such an accident notes what it was given before anything is sent; one that
resembles it takes its place, with the prompt as it was, and so finds all that belongs to it.

Rows: ``g/<run>/<name in its scope>/<step>`` what an unfinished call was given; its record takes it away.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import orjson

from agentflow.calls import Call
from agentflow.capture import data_digest
from agentflow.digests import blake2b
from agentflow.files import shortened
from agentflow.index import GIVEN, NS, Row, short
from agentflow.journal import Add, Drop, Op
from agentflow.reuse import _MOMENT, _accidents, _known

if TYPE_CHECKING:
    from agentflow.compare import Difference

_LONGEST = 65_536  # characters, as for records: what was given beyond that is not kept

_taken: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # rows that calls of an execution stand for by now


def resume(call: Call, request: dict[str, Any]) -> tuple[dict[str, Any], list[Op]]:
    """Lets a call that is about to run take the place of an unfinished one that it resembles.

    Args:
        call: an AI call or a conversation in a workflow; it is given the id of what it takes the place of.
        request: what it asks.

    Returns:
        What it has to ask: the request itself, or with the accidents of the moment as they were. And what is to be
        committed before anything is sent.
    """
    ex, slot = call.ex, call.slot
    if ex.scratch or len(call.given) > _LONGEST or _MOMENT.search(call.given) is None:
        return request, []
    if slot is not None and slot.n >= 0:
        row = ex.records.row(slot, slot.n)
        lent = slot.claimed == "lent" and bool(row.given)
        return (as_before(request, _request(call.given), _request(row.given)) if lent else request), []
    prefix = f"g/{ex.key}/{call.ident[:NS]}/"
    taken = _taken.setdefault(ex, set())
    noted = [] if ex.prior is None else ex.journal.scan(prefix)
    rows = {key: Row(key, text) for key, text in noted if key not in taken}
    own = f"{prefix}{call.occ}"
    if own not in rows and (found := _like(call, request, rows)) is not None:
        row, diffs, request = found
        own, call.occ = row.key, row.head["occ"]
        ex.warn(
            f"{call.name}: goes on although {_accidents(diffs)} differs from when it was begun; what it was asked then "
            f"holds. Read it with {'ctx.uuid4()' if diffs[0].accident == 'uuid' else 'ctx.now()'}, which is recorded."
        )
    taken.add(own)
    call.extra_ops = (*call.extra_ops, Drop(own))
    head: dict[str, Any] = {"occ": call.occ, "epoch": call.here.epoch, "branch": ex.branch_of(call), "s0": ex.next()}
    head |= {"w0": ex.session, "asked": time.time()}
    return request, [] if own in rows else [Add(own, Row.compose(head, "null", call.given))]


def _like(
    call: Call, request: dict[str, Any], rows: dict[str, Row]
) -> tuple[Row, list[Difference], dict[str, Any]] | None:
    """An unfinished call that was given the same but for accidents of the moment; one of the same branch goes first.

    And the differences, and what was asked then. One that has left nothing is none: nobody needs its old moment.
    """
    ex = call.ex
    branch = ex.branch_of(call)
    for row in sorted(rows.values(), key=lambda row: (row.head["branch"] != branch, row.head["s0"])):
        if row.head["epoch"] != call.here.epoch:
            continue
        from agentflow.compare import differences

        diffs = differences(
            # What the tools of a conversation hold may have been edited since; its turns are named by its request too.
            orjson.dumps(_request(row.given)).decode(),
            orjson.dumps(_request(call.given)).decode(),
            old_window=(row.head["w0"], row.head["asked"]),
            new_window=(ex.session, time.time()),
            known=functools.partial(_known, ex, row),
        )
        if diffs and all(one.accident for one in diffs):
            then: dict[str, Any] = as_before(request, _request(call.given), _request(row.given))
            if _has_left_something(call, row.head["occ"], then):
                return row, diffs, then
    return None


def _has_left_something(call: Call, occ: str, request: dict[str, Any]) -> bool:
    """Whether a reply, or a call in flight, belongs to an unfinished call."""
    ex = call.ex
    if call.kind == "agent":
        name = f"n{short(f'{occ}{chr(0)}turn 1', NS - 1)}"
        if any(slot.n >= 0 for slot in ex.records.named(name)):
            return True
        counted = f"{name}{data_digest(shortened(request))[:GIVEN]}#0"
        occ = blake2b(counted.encode(), digest_size=10).hexdigest()
    return any(any(ex.journal.keys(f"{kind}/{ex.key}/{occ}/", limit=1)) for kind in ("m", "i", "bm"))


def as_before(request: Any, now: Any, then: Any) -> Any:
    """The request with each leaf that was another one then as it was then; all three are plain JSON of one shape."""
    if type(now) is dict and type(then) is dict and now.keys() == then.keys() and type(request) is dict:
        return {key: as_before(part, now[key], then[key]) if key in now else part for key, part in request.items()}
    if type(now) is list and type(then) is list and type(request) is list and len(now) == len(then) == len(request):
        return [as_before(*parts) for parts in zip(request, now, then, strict=True)]
    return request if now == then else then


def _request(given: str) -> Any:
    """The request in what a call was given; that of a conversation stands beside its tools."""
    found = orjson.loads(given)
    return found if "body" in found else found["kwargs"]["request"]
