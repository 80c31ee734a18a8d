"""How one step is decided: replayed, run, retried, or refused.

Theory of operation
-------------------
``step(...)`` captures what the function is given and *locates* the call: its ident (scope, name, given)
and its place among exact repeats. If the journal has a record at exactly that place, the call claims it
there and then. Awaiting the call runs ``process``, a generator without I/O of its own: it yields
*effects* (run an attempt, commit, sleep, let siblings go first, wait for a person) which a driver
performs, an asyncio one or a blocking one (``drive.py``). A hit yields nothing.

What is written around one attempt, and what a crash at each point means:

1. *started mark* (side file; a synced row where ``in_doubt`` is "raise" or "ask"). A crash after it leaves
   a step in doubt: started, no result.
2. the function runs. A paid model reply is committed inside it, raw, before anything validates it: a crash
   after that finds the reply again and pays nothing.
3. a failed attempt that will be tried again is committed as an attempt, so that counting goes on.
4. *the record*: output and what was given, in one synced commit. Only then does the caller get the value,
   which has been through the codec. A crash after it replays.

States of a step: (nothing) -> started -> completed | failed; a completed one may become void (undone by
its compensation) or dropped (``rerun=``); both keep their record and get a newer version when asked again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from agentflow import codec, costs
from agentflow.calls import Call, Current, Suspend, enclosing
from agentflow.codedigest import changed_data
from agentflow.errors import (
    BudgetExceeded,
    CapturedChanged,
    IdempotencyConflict,
    JournalError,
    LeaseLost,
    ModelError,
    NondeterministicStep,
    RunBusy,
    RunCancelled,
    StepChanged,
    StepError,
    StepInDoubt,
    StepTimeout,
    UsageError,
    Waiting,
)
from agentflow.index import Row, Slot, short
from agentflow.journal import Add
from agentflow.lease import acquire
from agentflow.observing import watched
from agentflow.reuse import Effect, doubt_rows, find, given_same, judge, like, located
from agentflow.run import Attempts
from agentflow.workers import in_flight

if TYPE_CHECKING:
    from agentflow.records import Retry

Process = Generator[Effect, Any, Any]


# A step in doubt is to be run; any other value, None too, is the result it had.
_RUN: Any = object()


class Overtaken(BaseException):
    """The record lost to one of another process, which took this step's claim over while this one was stopped."""


# Not failures of the step: these leave it as it is and the run resumable.
NOT_RECORDED = (JournalError, RunCancelled, BudgetExceeded, RunBusy, Waiting)


def _not_recorded(error: BaseException) -> bool:
    """Whether an error is one of these, or a task group's that holds one."""
    return isinstance(error, NOT_RECORDED) or (
        isinstance(error, BaseExceptionGroup) and error.subgroup(NOT_RECORDED) is not None
    )


def over_budget(error: BaseException) -> BudgetExceeded | None:
    """The error of a budget that this one is, or that a task group's holds; None if it is neither."""
    while isinstance(error, BaseExceptionGroup):
        found = error.subgroup(BudgetExceeded)
        if found is None:
            return None
        error = found.exceptions[0]
    return error if isinstance(error, BudgetExceeded) else None


def process(call: Call) -> Process:
    """Everything between ``await step(...)`` and its value."""
    row = at_hand(call)
    if row is not None:
        return call.ex.deliver(call, row)
    return (yield from not_at_hand(call))


def at_hand(call: Call) -> Row | None:
    """What comes first: the record that a call has claimed where it stands, if it may be used, or None.

    No generator, so that a driver which is one itself can hand out a record without a second one.
    """
    ex = call.ex
    if ex.suspended or (ex.left_branches and ex.is_left(call.here)):
        raise Suspend
    if call.capture is not None and (name := call.capture.rebound()) is not None:
        raise located(
            CapturedChanged(
                f"step {call.name!r} captured the variable {name!r}, which was given another value before the step "
                f"started. Pass it instead: step({call.name!r}, f, {name})."
            ),
            call,
        )
    if call.slot is None or ex.results or ex.scratch or call.options.idempotency_key is not None:
        return None
    return judge(call, call.slot)


def not_at_hand(call: Call) -> Process:
    """The rest of ``process``, after ``at_hand`` gave None."""
    ex = call.ex
    if ex.results and (given := ex.given_result(call)) is not None:
        return (yield from _supplied(call, given))
    if call.options.idempotency_key is not None:
        return (yield from _keyed(call))
    if ex.scratch:
        return (yield from _claimed(call))
    # Asked first: what comes back after its record was looked for is not run again.
    still = in_flight.get((ex.journal.id, ex.run_id, call.occ)) if in_flight else None
    # What the call had claimed was judged by at_hand, but for a run with results of its own.
    row = (yield from find(call)) if call.slot is None or ex.results else None
    if row is not None:
        return ex.deliver(call, row)
    return (yield from _run(call, still=still))


def _supplied(call: Call, given: str) -> Process:
    """A step that is not run: somebody gave its result when the run was retried or forked."""
    from agentflow.supplied import as_recorded

    ex = call.ex
    row = yield from find(call)
    if row is not None:
        return ex.deliver(call, row)
    text, value = codec.roundtrip(as_recorded(call, codec.decode(given)), where=f"results[{call.name!r}]")
    if ex.plan:
        from agentflow.records import PlanStep

        ex.plan_steps.append(PlanStep(call.name, "reused", "its result is given"))
        return value if call.finish is None else call.finish(value)
    slot = ex.own_slot(call)
    current = Current(call, ex.key_of(call, slot.voids()), 1, 0)
    head = _head(call, current, slot, ex.next(), time.time(), ex.clock(), 1, 0, 0) | {"supplied": True}
    yield from _record(call, slot, head, text)
    ex.say(f"{call.name}: not run; its result is given")
    return ex.finished(call, slot, head, value)


def _keyed(call: Call) -> Process:
    """A step named by its idempotency key: one record for all runs, one execution at a time."""
    ex = call.ex
    key = call.options.idempotency_key
    assert key is not None
    base = f"k/{short(call.name + chr(0) + key, 32)}/"
    delay = 0.01
    while True:
        row, version = _keyed_row(call, base)
        if row is None:
            own = judge(call, call.slot) if call.slot is not None else None
            if own is not None and own.head["status"] == "failed":
                return ex.deliver(call, own)
        else:
            head = row.head
            if not given_same(call, row):
                if head["workflow"] != ex.workflow and not ex.scratch:
                    raise located(
                        IdempotencyConflict(
                            f"idempotency_key {key!r} of step {call.name!r} already names an operation of workflow "
                            f"{head['workflow']!r} (run {head['run']}) that was given something else. Make the key "
                            f'more specific, such as f"{ex.workflow}:{{...}}".'
                        ),
                        call,
                    )
                ex.warn(f"{call.name}: reused by its idempotency_key {key!r}, although it was given something else")
            if call.slot is None or call.slot.n < 0 or ex.newest(call.slot) is None:
                slot = ex.own_slot(call)
                if not ex.plan:
                    yield ("commit", [ex.records.record(slot, row.text)], False)
                ex.committed(slot)
            return ex.deliver(call, row)
        if ex.plan:
            return (yield from _run(call))
        try:
            claim = acquire(ex.journal, f"claim/{base}", what=f"step {call.name!r} with key {key!r}", run_id=ex.run_id)
        except RunBusy:
            yield ("sleep", delay)
            delay = min(delay * 1.5, 0.25)
            continue
        try:
            if _keyed_row(call, base)[0] is not None:
                continue
            call.extra_ops = (f"{base}{version:06d}",)
            return (yield from _run(call, again=version))
        except Overtaken:
            # What the step returned here stands beside it as an older version: it happened.
            row, _ = _keyed_row(call, base)
            if row is None:
                continue
            ex.warn(f"{call.name}: its key {key!r} was taken over while this process was stopped; that result is used")
            own_slot = ex.own_slot(call)
            yield ("commit", [ex.records.record(own_slot, row.text)], False)
            ex.committed(own_slot)
            return ex.deliver(call, row)
        finally:
            claim.release()


def _keyed_row(call: Call, base: str) -> tuple[Row | None, int]:
    """The newest valid record of a key, and the number that the next one would have."""
    rows: dict[str, str] = {}
    gone: set[str] = set()
    for full, text in call.ex.journal.scan(base):
        number, _, marker = full[len(base) :].partition("!")
        if not marker:
            rows[number] = text
        elif not (marker == "void" and call.ex.undoing):
            gone.add(number)
    valid = [number for number in rows if number not in gone]
    if not valid:
        return None, len(rows)
    return Row(f"{base}{valid[-1]}", rows[valid[-1]]), len(rows)


def _claimed(call: Call) -> Process:
    """A step outside a workflow: no owner, only a claim while it runs."""
    ex = call.ex
    ex.records.load(call.ident)
    delay = 0.01
    while True:
        call.slot = ex.records.at(call.ident, call.place)
        if call.slot is None:
            ex.records.load(call.ident[:10])
            call.slot = like(call)
        row = judge(call, call.slot) if call.slot is not None else None
        if row is not None:
            return ex.deliver(call, row)
        if ex.plan:
            return (yield from _run(call))
        try:
            claim = acquire(ex.journal, f"claim/{call.occ}", what=f"step {call.name!r}", run_id=ex.run_id)
        except RunBusy:
            yield ("sleep", delay)
            delay = min(delay * 1.5, 0.25)
            ex.records.load(call.ident)
            continue
        try:
            before = call.slot.n if call.slot else -1
            ex.records.load(call.ident)
            fresh = ex.records.at(call.ident, call.place)
            if fresh is not None and fresh.n > before:
                continue
            return (yield from _run(call))
        except Overtaken:
            ex.warn(f"{call.name}: was taken over while this process was stopped; that result is used")
            continue
        finally:
            claim.release()


def _run(call: Call, again: int = 0, still: Any = None) -> Process:
    """``_attempts``; whoever observes the run hears of them."""
    steps = _attempts(call, again, still)
    return watched(call, steps) if call.ex.observers else steps


def _attempts(call: Call, again: int, still: Any) -> Process:
    """Attempts until one succeeds or no more are allowed; then the record."""
    ex, options = call.ex, call.options
    if ex.plan:
        ex.would_run(call)
        with ex.patience(call):
            yield ("park", None)
    if ex.collecting:
        raise located(StepError(f"step {call.name!r} has no record"), call)
    if ex.overdue():
        raise Suspend
    if call.adopt is not None:
        if call.slot is not None:
            ex.own_slot(call)  # with its id
        else:
            ex.name_apart(call)
        if ops := call.adopt(call):
            yield ("commit", ops, False)
    slot = ex.own_slot(call)
    still = still or in_flight.get((ex.journal.id, ex.run_id, call.occ))
    if still is not None:
        ex.say(f"{call.name}: is still running from before; waiting for it")
        yield ("join", still)
        ex.records.load(f"{slot.ident}/")
        held: Slot = still.result()
        if held is not slot and held.n >= 0 and ex.records.at(held.ident, held.place) is held:
            slot = call.slot = held  # a failed attempt of the step around it had begun this one
            ex.take(call, slot)
        row = judge(call, slot)
        if row is not None:
            return ex.deliver(call, row)
    state = ex.attempts_of(call, slot)
    if state.started and call.wait is None:
        settled = yield from _in_doubt(call, slot, state)
        if settled is not _RUN:
            return settled
    attempt, sample, free = state.failed + 1, state.sample, 0
    doubt = int(state.started)  # kept with the attempt that was in doubt: the record may be another process's
    asked = time.time()
    began = ex.clock()
    started = state.since or began
    order = ex.next()
    while True:
        if ex.suspended or ex.overdue():
            raise Suspend
        ex.hold()
        undone = max(slot.voids(), again)
        current = Current(call, ex.key_of(call, undone), attempt, sample)
        current.facts = (slot, order, asked, started)
        ex.started(call, slot, current)
        if options.in_doubt != "rerun":
            yield ("commit", doubt_rows(call, slot, attempt, order), False)
        try:
            result = yield ("attempt", current, options.timeout)
            text, value = codec.roundtrip(result, where="result")
            if _given_up(call):
                current.left = True
                keep_late(current, result)
                raise Suspend
        except Exception as exc:
            if _given_up(call):
                raise Suspend from exc
            if _not_recorded(exc):
                # A run inside it can only wait, or nothing was sent: it leaves nothing in doubt.
                if isinstance(exc, Waiting | RunBusy) or over_budget(exc) is not None:
                    ex.unstart(call, slot, current)
                raise
            failure = exc
        except BaseException as stopped:
            current.left = True
            if current.stop is not None:
                current.stop()
            # Cut off in the middle by a worker that has to end, it is in doubt.
            cut_off = ex.halted and not isinstance(stopped, Suspend)
            if (ex.suspended and not cut_off) or (call.kind == "ai" and not call.on_way):
                ex.unstart(call, slot, current)
            raise
        else:
            break
        ended, retry = ex.clock(), options.retry or _once()
        if late := ex.late_result(call):
            text, value = late
            break
        resample = retry.resample and not _out_of_time(failure)
        lent = current.lent > 0 and resample and not (isinstance(failure, ModelError) and failure.retryable)
        if lent or _retries(retry, attempt, failure):
            delay = 0.0 if lent else _delay(retry, attempt, failure)
            sample += 1 if resample else 0
            data = codec.encode_exception(failure)
            facts = {
                "attempt": attempt,
                "free": lent,
                "sample": sample,
                "t0": started,
                "began": began,
                "t1": ended,
                "delay": delay,
                "error": data,
                "doubt": doubt,
            }
            doubt = 0
            tried = Add(f"a/{ex.key}/{call.occ}.{slot.n + 1}/{attempt + free:04d}", orjson.dumps(facts).decode())
            yield ("commit", [tried, *(costs.judged(current, wasted=True) if resample else ())], False)
            if lent:
                free += 1
                ex.say(f"{call.name}: what had been paid for before fails again ({_brief(failure)}); asking anew")
            else:
                ex.tries_again(call, attempt, retry.max_attempts, _brief(failure), delay)
            yield ("sleep", delay)
            if late := ex.late_result(call):
                text, value = late
                break
            attempt += 0 if lent else 1
            ex.give_back(current)
            began = ex.clock()
            continue
        head = _head(call, current, slot, order, asked, started, attempt, sample, state.doubts)
        if began != started:
            head["began"] = began
        head |= {"status": "failed", "error": codec.encode_exception(failure)}
        if call.kind == "ai":
            call.extra_ops = (*call.extra_ops, *costs.judged(current, wasted=True))
        yield from _record(call, slot, head, "null")
        if late := ex.late_result(call):
            kept = _row(call, head | {"status": "completed", "late": True}, late[0])
            yield ("commit", [ex.records.record(slot, kept)], False)
            slot.n += 1
        raise ex.failure(call, head, replayed=False) from failure
    head = _head(call, current, slot, order, asked, started, attempt, sample, state.doubts)
    if began != started:  # the last of several attempts, for the page
        head["began"] = began
    if call.kind == "ai":
        call.extra_ops = (*call.extra_ops, *costs.judged(current, wasted=False))
    yield from _record(call, slot, head, text)
    return ex.finished(call, slot, head, value)


def _given_up(call: Call) -> bool:
    """Whether the attempt that this step was part of is over, and another one may do the same by now.

    Plain code cannot be stopped. What has a key, or stands outside a workflow, is done by one at a time all the same.
    """
    if call.here.outer is None or call.ex.scratch or call.options.idempotency_key is not None:
        return False
    return any(current.over for current in enclosing(call))


def keep_late(current: Current, result: Any) -> None:
    """A function came back after its caller had been released: record what it returned.

    While the step is still being tried the next attempt takes it; otherwise it becomes a version of its
    own, beside the failure if one was recorded, which the next execution may use. Where another attempt has completed,
    the caller has that result, and so must every replay.
    """
    call = current.call
    ex = call.ex
    slot, order, asked, started = current.facts
    text, value = codec.roundtrip(result, where="result")
    if not (current.left or ex.closed or slot.n >= current.version):
        ex.keep_for_retry(call, text, value)
        return
    if ex.answered_since(current):
        ex.say(f"{call.name}: came back after another attempt had completed, whose result stands")
        return
    head = _head(call, current, slot, order, asked, started, current.attempt, current.sample, 0)
    n, row = slot.n + 1, ex.records.record(slot, _row(call, head | {"late": True}, text))
    try:
        kept = ex.journal.commit([row], fence=ex.own_fence())[0]
    except LeaseLost:
        # This process itself may have begun another execution of the run at this very moment.
        kept = ex.journal.commit([row], fence=ex.own_fence())[0]
    if kept:
        slot.n = max(slot.n, n)
        ex.came_back(slot)
        ex.say(f"{call.name}: came back after it had been given up; its result is recorded")


def _in_doubt(call: Call, slot: Slot, state: Attempts) -> Process:
    """A step that was started and has no result: the policy decides, or a person."""
    ex = call.ex
    if call.options.in_doubt == "rerun":
        if not state.paid:
            ex.doubt(call)
            if call.request is not None:
                from agentflow import sending

                current = Current(call, "", state.failed + 1, state.sample)
                yield ("commit", sending.doubt(call, current, call.request), False)
        return _RUN
    if call.options.in_doubt == "raise":
        raise located(
            StepInDoubt(
                f"step {call.name!r} of {ex.run_id} was started and its process ended before a result was recorded: it "
                f"may have happened. Look, then rerun=[{call.name!r}] to do it (again)."
            ),
            call,
        )
    decision = yield ("ask", call)
    if not decision.approved:
        refused = f"d/{ex.key}/{call.occ}.{slot.n + 1}.no/"
        count = sum(1 for _ in ex.journal.scan(refused))
        yield ("commit", [Add(f"{refused}{count:04d}", call.name)], False)
        return _RUN
    text, value = codec.roundtrip(decision.data, where="result")
    current = Current(call, ex.key_of(call, slot.voids()), state.failed + 1, state.sample)
    started = state.since or ex.clock()
    head = _head(call, current, slot, ex.next(), time.time(), started, current.attempt, state.sample, state.doubts)
    yield from _record(call, slot, head, text)
    return ex.finished(call, slot, head, value)


def _row(call: Call, head: dict[str, Any], output: str) -> str:
    """The text of a record; the output of a secret step is in none."""
    given = call.given if len(call.given) <= 65536 else ""
    return Row.compose(head, "null" if call.options.secret else output, given)


def _record(call: Call, slot: Slot, head: dict[str, Any], output: str) -> Generator[Effect, Any, None]:
    ex = call.ex
    completed = head["status"] == "completed"
    named: tuple[str, ...] = ()
    if call.extra_ops and (named := tuple(extra for extra in call.extra_ops if isinstance(extra, str))):
        head["named"] = named[0]
    text = _row(call, head, output)
    ops: list[Any] = [ex.records.record(slot, text)]
    for extra in call.extra_ops:
        if not isinstance(extra, str):
            ops.append(extra)
        elif completed:
            ops.append(Add(extra, text))
    if call.code is not None and ex.new_code(call.code.digest):
        ops.append(Add(f"c/{call.code.digest}", orjson.dumps(call.code.parts).decode()))
    if "prompts" in head:
        ops += ex.keep_prompts(head["prompts"])
    tried = slot.n + 1
    recorded = yield ("commit", ops, head.get("ai", False))
    while not recorded[0] and not named and not ex.scratch:
        # What an attempt that was given up has brought was recorded in its place at this moment. This is what counts.
        slot.n, tried = tried, tried + 1
        recorded = yield ("commit", [ex.records.record(slot, text)], head.get("ai", False))
    slot.n = tried - 1
    ex.committed(slot)
    if (named or ex.scratch) and not all(recorded[: 1 + (len(named) if completed else 0)]):
        raise Overtaken


def _head(
    call: Call,
    current: Current,
    slot: Slot,
    order: list[int],
    asked: float,
    started: float,
    attempt: int,
    sample: int,
    doubt: int,
) -> dict[str, Any]:
    ex = call.ex
    head: dict[str, Any] = {
        "name": call.name,
        "kind": call.kind,
        "status": "completed",
        "run": ex.run_id,
        "workflow": ex.workflow,
        "occ": call.occ,
        "scope": call.here.scope,
        "branch": ex.branch_of(call),
        "epoch": call.here.epoch,
        "given": call.digest,
        "t0": started,
        "t1": ex.clock(),
        "asked": asked,
        "w0": ex.session,
        "s0": order,
        "s1": ex.next(),
        "attempts": attempt,
        "sample": sample,
        "key": current.idempotency_key,
        "code": call.code.digest if call.code is not None else "",
    }
    if current.undoes:
        head["undoes"] = True
    if call.options.secret:
        head["secret"] = True
    if current.used_model:
        head["ai"] = True
    if current.used_model or (call.code is not None and call.code.reaches_model):
        head["model_default"] = ex.model()
    if current.cost is not None:
        head["cost"] = str(current.cost)
    if current.by_model and call.request is None:
        head["by_model"] = {model: str(part) for model, part in current.by_model.items()}
    if current.unknown:
        head["unpriced"] = current.unknown
    if current.parent is not None:
        head["parent"] = current.parent.name
        head["around"] = current.parent.around
    if doubt:
        head["in_doubt"] = doubt
    capture = call.capture
    if capture is not None:
        if changed := capture.mutated():
            _refuse_changes(call, changed)
            head["vol"] = list(changed)
            ex.say_once(f"{call.name}: changes {', '.join(changed[:3])} itself; that will not be compared")
        if capture.opaque:
            head["opaque"] = list(capture.opaque)
    if call.code is not None and (state := changed_data(call.code, call.fn, call.args, call.kwargs)):
        head["state"] = state
        ex.say_once(f"{call.name}: changes {', '.join(state[:3])} itself; that will not be compared")
    prompts = ex.prompts_read(current)
    if prompts:
        head["prompts"] = prompts
    if call.request is not None:
        head["model"] = call.request["model"]
    return head


def _refuse_changes(call: Call, changed: Sequence[str]) -> None:
    """Under AGENTFLOW_STRICT, as in tests, a step leaves its arguments as they are.

    Captured variables and ``self`` may change: a list or a counter that notes how often a step ran is how tests
    watch one. What a model's tools hold may change for the same reason.
    """
    if call.kind == "agent":
        return
    passed = [path for path in changed if path.startswith(("args", "kwargs"))]
    if passed and os.environ.get("AGENTFLOW_STRICT"):
        raise located(
            UsageError(
                f"step {call.name!r} changes {', '.join(passed[:3])}, which it was given; a replay will not. Let it "
                "work on a copy and return what is new. (An error because AGENTFLOW_STRICT is set, as in tests.)"
            ),
            call,
        )


def _once() -> Retry:
    """The policy of a step that has none."""
    from agentflow.records import ONCE

    return ONCE


def _retries(retry: Retry, attempt: int, failure: Exception) -> bool:
    if attempt >= retry.max_attempts or isinstance(
        failure, UsageError | StepChanged | NondeterministicStep | CapturedChanged
    ):
        return False
    if retry.retry_if is not None:
        return bool(retry.retry_if(failure))
    # A request that the provider refuses for good is refused again.
    return not (isinstance(failure, ModelError) and (failure.status or 0) >= 400 and not failure.retryable)


def _out_of_time(failure: Exception) -> bool:
    """Whether an attempt ended before it could find anything wrong with the answers it has paid for."""
    return isinstance(failure, StepTimeout) or (isinstance(failure, ModelError) and failure.in_flight is not None)


def _delay(retry: Retry, attempt: int, failure: Exception) -> float:
    asked = getattr(failure, "retry_after", None)
    return max(retry.delay(attempt), float(asked) if isinstance(asked, int | float) else 0.0)


def _brief(failure: BaseException) -> str:
    from agentflow.redact import redact

    text = str(failure).splitlines()[0][:120] if str(failure) else ""
    return redact(f"{type(failure).__name__}: {text}" if text else type(failure).__name__)
