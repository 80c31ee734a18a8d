"""Things that a run does once and at once, without being awaited: clock readings, random numbers, events it sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentflow import codec
from agentflow.calls import PLAIN, Call, Suspend
from agentflow.index import Row
from agentflow.journal import Op
from agentflow.run import Execution


def once(ex: Execution, kind: str, name: str, given: str, make: Callable[[], Any], commit: Any = None) -> Any:
    """The recorded value of the call that stands here, or what ``make`` gives, recorded.

    Args:
        ex: the run, which the calling code stands in.
        kind: what is recorded, such as "now".
        name: tells several of one kind apart; "" is fine.
        given: text of at most 20 characters that tells whether a record is for the same.
        make: called when there is no record.
        commit: records the operation it is given, together with what else has to happen at that moment, and is not
            called while the run suspends or is too late. None: the record alone.
    """
    call = Call(ex, f"{kind} {name}".strip(), None, (), {}, PLAIN, "value")
    call.started = True
    ex.locate(call, in_ident(given))
    slot = call.slot = call.slot or ex.in_branch(call)
    if slot is not None and (n := ex.newest(slot)) is not None:
        ex.take(call, slot)
        ex.enter(call)
        return codec.decode(ex.records.row(slot, n).output)
    text, value = codec.roundtrip(make(), where=f"ctx.{kind}()")
    if ex.plan:
        return value
    if commit is not None and (ex.suspended or ex.overdue()):
        raise Suspend
    slot, now = ex.own_slot(call), ex.clock()
    head = {
        "name": call.name, "kind": "value", "status": "completed", "run": ex.run_id, "workflow": ex.workflow,
        "occ": call.occ, "scope": call.here.scope, "branch": ex.branch_of(call), "epoch": call.here.epoch,
        "given": kind, "t0": now, "t1": now, "asked": now, "w0": ex.session, "s0": ex.next(), "s1": ex.next(),
        "attempts": 1, "sample": 0, "key": "", "code": "",
    }  # fmt: skip
    record: Op = ex.records.record(slot, Row.compose(head, text, ""))
    if commit is None:
        ex.journal.commit([record], fence=ex.fence)
    else:
        commit(record)
    ex.committed(slot)
    ex.enter(call)
    return value


def in_ident(text: str) -> str:
    """Text as the part of a record's key that says what was given."""
    return text.ljust(20, "_")[:20].replace("/", "_").replace(".", "_").replace("+", "_")
