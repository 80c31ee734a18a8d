"""Ending an execution: undo what has to be undone, write the outcome and release the lease in one commit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import orjson

from agentflow import children, codec, rundocs
from agentflow.calls import PLAIN, Call, Options, Suspend
from agentflow.errors import (
    BudgetExceeded,
    JournalError,
    LeaseLost,
    RunCancelled,
    StepFailed,
    StepNotAwaited,
    Waiting,
)
from agentflow.handles import waiting, workflows
from agentflow.journal import Add, Drop, Journal, Put
from agentflow.observing import tell
from agentflow.opening import Opened, code_digest
from agentflow.run import Execution
from agentflow.settings import log
from agentflow.steps import make_call
from agentflow.waits import PENDING, Wait
from agentflow.words import moment, money


def result(ex: Execution, value: Any) -> tuple[str, Any]:
    if isinstance(value, Call):
        raise value.unawaited()
    if ex.not_awaited:
        name = ex.not_awaited[0]
        raise StepNotAwaited(
            f"step {name!r} was called and never awaited, so it did not run. Write: await step({name!r}, ...)"
        )
    if (ex.totals.ran or ex.cancelling) and ex.overdue():
        raise ex.too_late()
    return codec.roundtrip(value, where="result")


def in_time(ex: Execution, body: Callable[[], Any]) -> Any:
    """The plain body's value. Plain code cannot be stopped: when its time is over, it ends at its next step."""
    try:
        return body()
    except (Suspend, Exception):
        if ex.timed_out:
            raise ex.too_late() from None
        raise


def before_undoing(opened: Opened) -> None:
    ex = opened.ex
    ex.deadline, ex.timed_out, ex.cancelling = None, False, False  # what is to be undone takes the time it takes
    if opened.ex.compensations:
        opened.document["undoing"] = True
        opened.ex.journal.commit(
            [Put(f"r/{opened.ex.key}", orjson.dumps(opened.document).decode())], fence=opened.ex.fence
        )


def children_to_undo(opened: Opened) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Workflow and document of each run inside a cancelled one that is to be undone before it, the last one first."""
    ex = opened.ex
    if not opened.document.get("cancelling"):
        return
    for child in list(children.children(ex.journal, ex.run_id))[::-1]:
        document = rundocs.read(ex.journal, child)
        if document is None or document["status"] in ("completed", "failed", "cancelled"):
            continue
        from agentflow import control

        document = control.cancel(ex.journal, child, compensate=True)
        if (flow := workflows.get(document["workflow"])) is None:
            ex.warn(f"run {child} is to be undone by a program that defines {document['workflow']!r}")
        else:
            yield flow, document


def replayed_with_undo(ex: Execution) -> tuple[Call, dict[str, Any]] | None:
    """The next replayed step inside which there is something to undo; what is found takes its place."""
    for index, (call, slot, head) in enumerate(ex.compensations):
        if slot is None:
            del ex.compensations[index]
            return call, head
    return None


def undoing(ex: Execution, call: Call, slot: Any, value: Any) -> Call:
    """The durable step that undoes one; its record and the mark that voids the undone one are one commit."""
    # The key tells the undoing of this very version from that of an equal result before or after it.
    undone = Options(idempotency_key=f"{slot.id}.{slot.n}")
    undo = make_call(f"undo {call.name}", call.options.compensate, (value,), {}, undone)
    ops: list[Any] = [Add(f"{ex.records.key(slot, slot.n)}!void", "")]
    named = ex.records.row(slot, slot.n).head.get("named")
    if named:
        ops.append(Add(f"{named}!void", ""))
    undo.kind = "compensation"
    undo.options = PLAIN.but(on_change="reuse")
    undo.policy = "reuse"
    undo.extra_ops = tuple(ops)
    return undo


async def undo(ex: Execution) -> None:
    from agentflow.drive import collect

    while (inside := replayed_with_undo(ex)) is not None:
        try:
            await collect(ex, *inside)
        except Exception as failure:
            not_undone(ex, inside[0], failure)
    for call, slot, value in ex.compensations[::-1]:
        try:
            await undoing(ex, call, slot, value)
        except Exception as failure:
            not_undone(ex, call, failure)


def not_undone(ex: Execution, call: Call, failure: Exception) -> None:
    """The others are undone all the same; the run's document says that one is missing."""
    if isinstance(failure, JournalError):
        raise failure
    ex.warn(f"{call.name}: its compensation failed ({type(failure).__name__}: {failure})")
    ex.undo_failed = True


def close_completed(opened: Opened, text: str, value: Any) -> Any:
    ex, document = opened.ex, opened.document
    for line in ex.unasked():
        ex.warn(line)
    for name in ex.results.keys() - ex.results_used:
        ex.warn(f"results: no step of the name or id {name!r} was asked for, so its result was not used")
    replayed_only = ex.totals.ran == 0 and document.get("output") == text and document.get("ended_at")
    when = moment(document.get("ended_at"))
    document["output"] = text
    document.pop("error", None)
    if not replayed_only:
        document["ended_at"] = time.time()
    document["code"] = code_digest(opened.flow)
    document["unused"] = ex.unused()
    close(opened, "completed")
    summary(ex, "completed" if not replayed_only else f"completed before, {when:%Y-%m-%d %H:%M:%S} UTC")
    return value


def close_failed(opened: Opened, error: Exception) -> None:
    ex, document = opened.ex, opened.document
    document["error"] = codec.encode_exception(error)
    document["ended_at"] = time.time()
    if isinstance(error, StepFailed):
        document["error_step"] = {
            "step": error.step, "run_id": ex.run_id, "attempts": error.attempts, "error_type": error.error_type
        }  # fmt: skip
    if ex.compensations:
        document["compensated"] = "partly" if ex.undo_failed else "done"
        document.pop("undoing", None)
        if ex.undo_failed:
            document["undoing"] = True
    undone = f", {len(ex.compensations)} undone" if ex.compensations else ""
    if document.pop("cancelling", False):
        document.pop("error")
        close(opened, "cancelled")
        summary(ex, f"cancelled{undone}")
        return
    close(opened, "failed", error)
    summary(ex, f"failed ({type(error).__name__}){undone}")


def childs_wait(ex: Execution, error: Waiting) -> Wait:
    """A run that was started in this one waits: so does the branch that asked for it, until there is something for it.

    Args:
        ex: the run that started it.
        error: what it waits for.
    """
    first, *more = error.waiting_on
    dues = [due for info in error.waiting_on if (due := info.get("until", info.get("deadline"))) is not None]
    document = rundocs.read(ex.journal, error.run_id)
    if document is not None and document.get("due") is not None:
        dues.append(document["due"])
    due = min(dues, default=None)

    def check() -> Any:
        late = due is not None and ex.clock() >= due
        return True if late or _stirs(ex, error.run_id) else PENDING

    return Wait(check, first, due, more)


def _stirs(ex: Execution, run_id: str) -> bool:
    """Whether something has come for a waiting run, or for one that it has started; or somebody goes on with it."""
    if ex.journal.get(rundocs.wake_key(run_id)) is not None:
        return True
    document = rundocs.read(ex.journal, run_id)
    if document is None or document["status"] != "waiting":
        return True
    below = [child for child in children.children(ex.journal, run_id) if _waits(ex, child)]
    return any(_stirs(ex, child) for child in below)


def _waits(ex: Execution, run_id: str) -> bool:
    document = rundocs.read(ex.journal, run_id)
    return document is not None and document["status"] == "waiting"


def close_waiting(opened: Opened) -> Waiting | Suspend:
    ex, document = opened.ex, opened.document
    if ex.halted:
        give_up(opened)
        return Suspend()
    waits = ex.waits
    unique = {info["id"]: info for wait in waits for info in (wait.info, *wait.more)}
    document["waiting_on"] = list(unique.values())
    dues = [ex.deadline, *(wait.due for wait in waits), *(wait.info.get("remind_at") for wait in waits)]
    document["due"] = min((due for due in dues if due is not None), default=None)
    close(opened, "waiting")
    summary(ex, "waiting")
    return waiting(document)


def close(opened: Opened, status: str, error: Exception | None = None) -> None:
    ex, document = opened.ex, opened.document
    ex.closed = True
    if ex.prior == "interrupted":
        document["paid"] = str(rundocs.paid(ex.journal, ex.run_id))
    else:
        document["paid"] = str(Decimal(document.get("paid", "0")) + ex.totals.paid)
    document["saved"] = str(Decimal(document.get("saved", "0")) + ex.totals.saved)
    ops: list[Any] = []
    if ex.prior is not None or ex.asked_tasks:
        ops += _not_waited_for(ex, status)
    ops += [Drop(key) for key in ex.unstarted] + rundocs.write(document, status) + ex.saved_row()
    if status == "failed" and opened.call is not None:
        ops.append(opened.call.failed(document))
    if status != "waiting":
        ops.append(Drop(rundocs.wake_key(ex.run_id)))
    assert opened.lease is not None
    try:
        opened.lease.release(ops)
    except JournalError as lost:
        if not isinstance(lost, LeaseLost) or not was_cancelled(ex.journal, ex.run_id):
            _tell(opened, "interrupted", lost)
            raise
        _tell(opened, "cancelled", None)
        raise RunCancelled(f"run {ex.run_id} was cancelled.") from None
    _tell(opened, status, error)
    if status == "failed":
        ex.settle_marks()
    elif status != "waiting":
        ex.journal.clear_marks(ex.run_id)


def _tell(opened: Opened, status: str, error: BaseException | None) -> None:
    """Tell whoever observes the run that this execution has ended."""
    ex, document = opened.ex, opened.document
    if ex.observers:
        tell(ex.observers, lambda each: each.run_ended(ex, document, status, error))


def _not_waited_for(ex: Execution, status: str) -> list[Any]:
    """Operations that end what the run had waited for and does not any more; most runs never wait."""
    ops: list[Any] = []
    if any(ex.journal.keys(f"ht/{ex.key}/", limit=1)):
        from agentflow import human

        ops += human.withdraw(ex, status)
    if status == "completed" and any(ex.journal.keys(f"w/{ex.key}/", limit=1)):
        from agentflow import events

        ops += events.give_back(ex)
    return ops


def was_cancelled(journal: Journal, run_id: str) -> bool:
    """Whether somebody has ended the run, which takes it from its owner."""
    document = rundocs.read(journal, run_id)
    return document is not None and (document["status"] == "cancelled" or bool(document.get("cancelling")))


def give_up(opened: Opened, over: BudgetExceeded | None = None) -> None:
    """Stopped from outside or by its budget, or the journal failed: leave the run as it is, free for the next start."""
    opened.ex.closed = True
    why = over or sys.exception()
    status = "interrupted"
    if over is not None:
        opened.document["error"] = codec.encode_exception(over)
    assert opened.lease is not None
    try:
        opened.document["saved"] = str(Decimal(opened.document.get("saved", "0")) + opened.ex.totals.saved)
        ops: list[Any] = [Drop(key) for key in opened.ex.unstarted]
        opened.lease.release(ops + rundocs.write(opened.document, "interrupted") + opened.ex.saved_row())
    except LeaseLost:
        if was_cancelled(opened.ex.journal, opened.ex.run_id):
            opened.ex.cancelled = True
            status = "cancelled"
            _left(opened.ex, "was cancelled; nothing more is committed here")
            return
        _left(opened.ex, "another process has taken this run over; nothing more is committed here")
    except JournalError as error:
        _left(opened.ex, f"could not note that the run was interrupted: {error}")
    else:
        summary(opened.ex, "interrupted" if over is None else "stopped by its budget")
    finally:
        _tell(opened, status, why)


def _left(ex: Execution, why: str) -> None:
    """Say that this process has nothing more to say of the run."""
    if not ex.ends(why):
        log.warning("%s · %s", ex.run_id, why)


def summary(ex: Execution, status: str) -> None:
    totals = ex.totals
    count = totals.replayed + totals.ran + totals.failed
    line = f"{status} · {count} {'step' if count == 1 else 'steps'}: {totals.replayed} replayed, {totals.ran} run"
    if totals.failed:
        line += f", {totals.failed} failed"
    if totals.doubts:
        line += f", {totals.doubts} in doubt before"
    if totals.paid or totals.saved or totals.unpriced:
        unknown = f" and {totals.unpriced} of unknown price" if totals.unpriced else ""
        line += f" · paid {money(totals.paid)}{unknown}, saved {money(totals.saved)}"
    if not ex.ends(line):
        log.info("%s · %s", ex.run_id, line)
