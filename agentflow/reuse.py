"""Which record a call may reuse: the rules for exact repeats, accidents, edited code and failures.

Nothing here runs a step. The order of the questions is the order of ``find``: a record at exactly this
place; one of the same branch; after siblings had their turn, one from elsewhere, or one that was given the
same but for accidents of the moment; one that a sibling has not asked for when it ends. Then ``judge``: may
this record be used as it is?
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Generator
from typing import Any

import orjson

from agentflow.calls import Call
from agentflow.errors import NondeterministicStep, StepChanged
from agentflow.index import BRANCH, NS, Row, Slot
from agentflow.journal import Add

Effect = tuple[Any, ...]

# What any clock reading, uuid or address has: digits enough. Without it there is nothing to look for.
_MOMENT = re.compile(r"\d\d:\d\d|\d{8}[T_-]\d{6}|\d{10}|[0-9a-f]{12}|0x[0-9a-f]", re.IGNORECASE)


def located(error: Any, call: Call) -> Any:
    """The error, with the step and the run it speaks of."""
    error.step, error.run_id = call.name, call.ex.run_id
    return error


def find(call: Call) -> Generator[Effect, Any, Row | None]:
    """The record to reuse, or None to run; ``call.slot`` is the slot to use either way."""
    ex = call.ex
    slot = call.slot
    if slot is None:
        slot = ex.in_branch(call)
        if slot is None and ex.others(call):
            # Siblings that have this record in their own place get the chance to claim it first.
            yield ("settle",)
            slot = ex.elsewhere(call) or like(call)
            if slot is None and ex.kept_by_sibling(call):
                yield ("let_siblings",)
                slot = ex.elsewhere(call)
        if slot is None:
            if ex.records.lent(call.ident):
                raise located(
                    NondeterministicStep(
                        f"step {call.name!r} was recorded once, was reused for a call that differs from it only by a "
                        "clock reading, uuid or address, and is now asked for exactly. Use ctx.now() or ctx.uuid4(), "
                        "or give the step an idempotency_key."
                    ),
                    call,
                )
            if ex.others(call):
                _refuse_changed(call)
                ex.missed(call)
            slot = _started_before(call)
            if slot is None:
                return None
        call.slot = slot
        ex.take(call, slot)
    return judge(call, slot)


def judge(call: Call, slot: Slot) -> Row | None:
    """The version of a slot that may be reused, by the rules for edited code and for failures."""
    ex, options = call.ex, call.options
    policy = call.policy
    why = None
    dropped: set[str] = set()
    for n in range(slot.n, -1, -1):
        row = ex.records.row(slot, n)
        head = row.head
        if slot.gone is not None and not ex.counts(slot, n):
            dropped.add(head["code"])
            continue
        # Below a dropped version only what other code had made counts: that code finds its record again.
        if dropped and (head["status"] == "failed" or head["code"] in dropped):
            continue
        late = head.get("late", False)
        if head.get("ai") and head["epoch"] != call.here.epoch:
            continue
        if late and not ex.retries(slot, n):
            continue
        edited = _edited(call, head)
        if edited and policy == "error":
            raise located(
                StepChanged(
                    f"step {call.name!r} of {ex.run_id} was recorded with other code ({_parts(call, head)}) and "
                    f'on_change="error" refuses that. Go back, or rerun=[{call.name!r}], or on_change="auto".'
                ),
                call,
            )
        model_step = head.get("ai") or (call.code is not None and call.code.reaches_model)
        if edited and (policy == "rerun" or (policy == "auto" and model_step)):
            why = why or _parts(call, head)
            continue
        if dropped and (edited or not (model_step or policy == "rerun")):
            continue
        if head["status"] == "failed":
            again = ex.again(call, head)
            if again is None:
                return row
            why = why or again
            break
        if options.secret or head.get("secret"):
            why = "its output is not recorded"
            break
        if options.max_age is not None and ex.clock() - head["t1"] > options.max_age:
            why = "its record is older than max_age"
            break
        if edited:
            ex.say_once(f"{call.name}: record kept although code changed ({_parts(call, head)})")
        return row
    if why is None and slot.n >= 0 and slot.gone:
        opened = slot.gone.get(slot.n) == "open"
        why = "undone before" if slot.voids() else "a step inside it is done anew" if opened else "asked for by rerun"
    call.why = why
    if why is not None:
        ex.say(f"{call.name} ran again: {why}")
    return None


def _edited(call: Call, head: dict[str, Any]) -> bool:
    if call.code is None or call.policy == "reuse":
        return False
    if head["code"] != call.code.digest and not _only_state(call, head):
        return True
    if (call.code.reaches_model or head.get("ai")) and head.get("model_default") != call.ex.model():
        return True
    prompts = head.get("prompts")
    return prompts is not None and any(call.ex.prompt_digest(path) != digest for path, digest in prompts.items())


def _only_state(call: Call, head: dict[str, Any]) -> bool:
    """Whether the code differs in nothing but data that the step had changed itself while it ran."""
    from agentflow.codedigest import changed_names

    old = call.ex.journal.get(f"c/{head['code']}") if "state" in head else None
    return old is not None and changed_names(orjson.loads(old), call.code.parts) <= set(head["state"])


def _parts(call: Call, head: dict[str, Any]) -> str:
    from agentflow.codedigest import changed_parts

    old = call.ex.journal.get(f"c/{head['code']}")
    names = changed_parts(orjson.loads(old) if old else (), call.code.parts)
    names += [
        f"{path} edited" for path, digest in head.get("prompts", {}).items() if call.ex.prompt_digest(path) != digest
    ]
    if not names and head.get("model_default") != call.ex.model():
        names = [f"model changed from {head.get('model_default')} to {call.ex.model()}"]
    return ", ".join(names[:4]) or "code changed"


def given_same(call: Call, row: Row) -> bool:
    """Whether a record was given the same, but for what its step changed itself."""
    if row.head["given"] == call.digest:
        return True
    from agentflow.compare import differences

    changed = tuple(row.head.get("vol", ()))
    return bool(changed and row.given and call.given and not differences(row.given, call.given, ignore=changed))


def like(call: Call) -> Slot | None:
    """A record that was given the same but for what the step changed itself, or accidents of the moment."""
    ex = call.ex
    if call.kind not in ("step", "ai", "agent", "tool") or not call.given:
        return None
    lent: list[tuple[Slot, list[Any]]] = []
    moment = _MOMENT.search(call.given) is not None
    # Those that were given the same but for what they changed are repeats: the one after the same record goes first.
    for slot in sorted(ex.near(call), key=lambda slot: (slot.place != call.place, slot.rowid))[:500]:
        counts = ex.newest(slot)
        n = slot.n if counts is None else counts
        if n < 0:
            continue
        row = ex.records.row(slot, n)
        head = row.head
        if not row.given or not (moment or "vol" in head):
            continue
        if call.kind == "ai" and head["epoch"] != call.here.epoch:
            continue
        from agentflow.compare import differences

        diffs = differences(
            row.given,
            call.given,
            ignore=tuple(head.get("vol", ())),
            old_window=(head["w0"], head["asked"]),
            new_window=(ex.session, time.time()),
            known=functools.partial(_known, ex, row),
        )
        if not diffs:
            return slot
        if counts is not None and all(d.accident for d in diffs):
            lent.append((slot, diffs))
    if not lent:
        return None
    slot, diffs = lent[0]
    if len({ex.records.row(s, s.n).output for s, _ in lent}) > 1:
        raise located(
            NondeterministicStep(
                f"step {call.name!r}: {len(lent)} records differ from this call only by {_accidents(diffs)} and have "
                "different results, so that none can be chosen. Use ctx.now() or ctx.uuid4(), or an idempotency_key."
            ),
            call,
        )
    ex.take(call, slot, "lent")
    ex.warn(
        f"{call.name}: reused although {_accidents(diffs)} differs from the recorded one. Read it with "
        f"{'ctx.uuid4()' if diffs[0].accident == 'uuid' else 'ctx.now()'}, which is recorded."
    )
    return slot


def doubt_rows(call: Call, slot: Slot, attempt: int, order: list[int]) -> list[Add]:
    """What says durably that an attempt starts, where that must not go unnoticed (``in_doubt`` is "raise" or "ask").

    A call whose given holds what could be an accident of the moment is kept with it: the next process will ask for it
    with another clock reading or uuid, and has to learn that it was in flight all the same.
    """
    ex = call.ex
    key = f"{ex.key}/{call.occ}.{slot.n + 1}.{attempt}"
    rows = [Add(f"d/{key}", call.name)]
    if slot.n < 0 and len(call.given) <= 65536 and _MOMENT.search(call.given):
        head = {"ident": slot.ident, "place": slot.place, "s0": order, "w0": ex.session}
        rows.append(Add(f"dg/{key}", Row.compose(head | {"asked": time.time()}, "null", call.given)))
    return rows


def _started_before(call: Call) -> Slot | None:
    """A call that was in flight and differs only by accidents of the moment: this is the same call, and in doubt."""
    ex = call.ex
    if call.options.in_doubt == "rerun" or ex.prior is None or ex.scratch or not _MOMENT.search(call.given):
        return None
    from agentflow.compare import differences

    prefix, others = f"dg/{ex.key}/", ex.siblings(call)
    for key, text in ex.journal.scan(prefix):
        row, number = Row(key, text), key[len(prefix) :]
        head = row.head
        if head["ident"][:NS] != call.ident[:NS] or head["place"][:BRANCH] in others:
            continue
        slot = ex.records.at(head["ident"], head["place"])
        if (slot is not None and (slot.claimed or slot.n >= 0)) or ex.journal.get(f"d/{ex.key}/{number}") is None:
            continue
        diffs = differences(
            row.given,
            call.given,
            old_window=(head["w0"], head["asked"]),
            new_window=(ex.session, time.time()),
            known=functools.partial(_known, ex, row),
        )
        if diffs and all(d.accident for d in diffs):
            ex.warn(f"{call.name}: was started before, and {_accidents(diffs)} differs: it is the same call, in doubt")
            return slot or ex.records.add(Slot(head["ident"], head["place"], number.partition(".")[0]))
    return None


def _known(ex: Any, row: Row, text: str) -> bool:
    """Whether a uuid is data: found in the input or an output, for a recorded call in one from before it."""
    recorded = text.replace("-", "").lower() in row.given.replace("-", "").lower()
    return bool(ex.known(text, row.head["s0"] if recorded else None))


def _accidents(diffs: list[Any]) -> str:
    words = {"clock": "a clock reading", "uuid": "a uuid4", "address": "a memory address"}
    return ", ".join(sorted({f"{words[d.accident]} in {d.path}" for d in diffs}))


def _refuse_changed(call: Call) -> None:
    """A step that must not run a second time with other data: an effect, or under ``on_change="error"``."""
    ex = call.ex
    effect = call.options.effect or call.options.compensate is not None
    if not effect and call.policy != "error":
        return
    for slot in ex.unclaimed(call):
        n = ex.newest(slot)
        if n is None:
            continue
        row = ex.records.row(slot, n)
        if row.head["status"] != "completed" or row.head["kind"] != call.kind:
            continue
        from agentflow.compare import differences, unified

        difference = unified(differences(row.given, call.given)) if row.given and call.given else "(values not kept)"
        reason = "is an effect and does not run twice" if effect else 'has on_change="error"'
        raise located(
            StepChanged(
                f"step {call.name!r} of {ex.run_id} {reason}, but it is recorded with other data:\n{difference}\n"
                f"To run it with the new data as well: rerun=[{call.name!r}]. If these are different operations, "
                "give each its idempotency_key."
            ),
            call,
        )
