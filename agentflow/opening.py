"""Taking a run up: which one it is, its lease, its document, its records.

A crash anywhere leaves a run whose lease is dead: the next start takes it over, here.
"""

from __future__ import annotations

import inspect
import sys
import time
import weakref
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from agentflow import codec, rundocs, typecheck
from agentflow.calls import Call, Suspend
from agentflow.capture import data_digest
from agentflow.childcalls import ChildCall
from agentflow.children import note_caller
from agentflow.codedigest import code_of
from agentflow.digests import blake2b
from agentflow.errors import (
    LeaseLost,
    RunCancelled,
    UsageError,
)
from agentflow.handles import stored_error
from agentflow.index import in_key
from agentflow.journal import Add, Drop, Journal, Put
from agentflow.lease import Lease, acquire
from agentflow.observers import begin as begin_observing
from agentflow.observing import Observer
from agentflow.plain import Plain
from agentflow.run import Execution
from agentflow.scratch import driver, open_journal
from agentflow.settings import log, now, only_looking, settings
from agentflow.waits import Wait

if TYPE_CHECKING:
    from agentflow.budgets import RunBudget

# The runs that this process executes; those that have ended are in it until they are collected.
executing: weakref.WeakSet[Execution] = weakref.WeakSet()


class RunOptions(Plain):
    """What ``options(...)`` of a workflow says of its next runs."""

    __slots__ = ("budget", "busy", "fresh", "rerun", "run_id", "wait")

    def __init__(
        self,
        run_id: str | None = None,
        fresh: bool = False,
        rerun: tuple[str, ...] = (),
        wait: bool = False,
        busy: str = "raise",
        budget: Decimal | None = None,
    ) -> None:
        self.run_id = run_id
        self.fresh = fresh
        self.rerun = rerun
        self.wait = wait
        self.busy = busy
        self.budget = budget


class Definition:
    """A workflow as its runs need it: the function, its name and signature, and the options of the next runs."""

    __slots__ = ("blocking", "budget", "fn", "name", "on_change", "options", "run_id", "signature", "timeout")

    def __init__(
        self,
        *,
        fn: Callable[..., Any],
        name: str,
        budget: Decimal | None,
        on_change: str,
        run_id: Callable[..., str] | None,
        blocking: bool,
        signature: inspect.Signature,
        options: RunOptions,
        timeout: float | None,
    ) -> None:
        self.fn = fn
        self.name = name
        self.budget = budget
        self.on_change = on_change
        self.run_id = run_id
        self.blocking = blocking
        self.signature = signature
        self.options = options
        self.timeout = timeout


class Opened:
    """A run that this process owns, and what its document said before."""

    __slots__ = ("arguments", "call", "document", "ex", "flow", "lease", "started")

    def __init__(
        self, flow: Definition, ex: Execution, document: dict[str, Any], lease: Lease | None, arguments: dict[str, Any]
    ) -> None:
        self.call: ChildCall | None = None
        self.flow = flow
        self.ex = ex
        self.document = document
        self.lease = lease
        self.arguments = arguments
        self.started = time.perf_counter()


def arguments(flow: Definition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = flow.signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"workflow {flow.name!r}: {error}. It takes {flow.signature}.") from None
    return typecheck.arguments(flow.fn, flow.name, dict(bound.arguments))


def locate(flow: Definition, journal: Journal, arguments: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    run_id = flow.options.run_id
    if run_id is None and flow.run_id is not None:
        run_id = _own_id(flow, arguments)
        if not isinstance(run_id, str) or not run_id:
            raise UsageError(f"workflow {flow.name!r}: run_id= gave {run_id!r}; it has to give non-empty text.")
    if run_id == "scratch":
        raise UsageError("run_id 'scratch' names what stands outside workflows, whose records are kept under it.")
    if run_id is not None and flow.options.fresh:
        return None, _next_id(journal, run_id)
    if run_id is not None:
        if flow.options.run_id is None:
            run_id = journal.get(f"p/{in_key(flow.name)}/={in_key(run_id)}") or run_id
        return rundocs.read(journal, run_id), run_id
    digest = input_digest(flow, arguments)
    latest = journal.get(f"p/{in_key(flow.name)}/{digest}")
    if latest is not None and not flow.options.fresh:
        return rundocs.read(journal, latest), latest
    base = _short_id(journal, rundocs.slug(flow.name), digest)
    return None, base if latest is None else _next_id(journal, base)


def input_digest(flow: Definition, arguments: dict[str, Any]) -> str:
    defaults = {name: p.default for name, p in flow.signature.parameters.items() if p.default is not p.empty}
    given = {k: v for k, v in arguments.items() if not (k in defaults and _equal(defaults[k], v))}
    return data_digest(given)


def open_run(
    flow: Definition, given: dict[str, Any], call: ChildCall | None = None, ids: list[str] | None = None
) -> Opened:
    """Take the run: its lease, its document, its records.

    ``call``: where another run asks for it; if it has failed there and that is history, its failure is raised.
    ``ids``: gets the run's id.
    """
    only_looking()
    journal = open_journal()
    text = codec.encode(given, where="input")
    arguments = codec.decode(text)
    document, run_id = locate(flow, journal, given)
    if document is not None and document["workflow"] != flow.name:
        raise UsageError(f"run_id {run_id!r} belongs to workflow {document['workflow']!r}, not to {flow.name!r}.")
    if document is not None and flow.options.rerun:
        known_steps(flow, journal, run_id)
    elif flow.options.rerun:
        raise UsageError(f"rerun={list(flow.options.rerun)}: there is no run {run_id} of this input yet.")
    new = document is None
    if call is not None and (failure := call.failed_before(run_id)) is not None:
        if ids is not None:
            ids.append(run_id)
        raise failure
    parent = None if call is None else call.ex
    ended = document is not None and document["status"] in ("completed", "cancelled")
    if parent is not None and not ended and parent.overdue():
        raise Suspend
    ops: list[Any] = []
    observers: tuple[Observer, ...] = ()
    if document is None:
        document = {
            "id": run_id,
            "workflow": flow.name,
            "created_at": time.time(),
            "epoch": 1,
            "digest": input_digest(flow, given),
        }
        document |= {"input": text, "code": code_digest(flow), "status": None}
        note_budget(flow, document)
        set_deadline(flow, document, None)
        observers = begin_observing(document)
        ops = rundocs.write(document, "running")
        own = f"={in_key(named(flow, arguments))}" if flow.run_id or flow.options.run_id else document["digest"]
        ops.append(Put(f"p/{in_key(flow.name)}/{own}", run_id))
        if parent is not None:
            ops.append(Put(f"ch/{parent.key}/{in_key(run_id)}", run_id))
    lease = acquire(
        journal,
        rundocs.lease_key(run_id),
        ops=ops,
        unless=f"r/{in_key(run_id)}",  # another process may have made the run, and ended it, in the meantime
        what=f"run {run_id}",
        run_id=run_id,
    )
    try:
        note_caller(journal, run_id, lease, None if call is None else call.started)
        stored = rundocs.read(journal, run_id)
        if new and stored is not None and stored["created_at"] == document["created_at"]:
            prior = None
        elif flow.options.fresh:
            # Another process has taken this number for its own fresh run; there is a next one.
            lease.release()
            return open_run(flow, given, call, ids)
        else:
            assert stored is not None
            document, prior = stored, ended_as(stored)
        opened = take_up(flow, journal, document, lease, prior, text, arguments, observers)
    except LeaseLost:
        taken = rundocs.read(journal, run_id)
        if taken is None or not (taken["status"] == "cancelled" or taken.get("cancelling")):
            raise
        raise RunCancelled(f"run {run_id} was cancelled.") from None
    except BaseException:
        lease.release()
        raise
    opened.call = call
    if ids is not None:
        ids.append(run_id)
    return opened


def named(flow: Definition, arguments: dict[str, Any]) -> str:
    return flow.options.run_id or str(_own_id(flow, arguments) or "")


def _own_id(flow: Definition, arguments: dict[str, Any]) -> Any:
    if flow.run_id is None:
        return None
    try:
        return flow.run_id(*arguments.values())
    except Exception as error:
        raise UsageError(
            f"workflow {flow.name!r}: run_id= failed for this input: {type(error).__name__}: {error}"
        ) from error


def take_up(
    flow: Definition,
    journal: Journal,
    document: dict[str, Any],
    lease: Lease,
    prior: str | None,
    text: str,
    arguments: dict[str, Any],
    observers: tuple[Observer, ...],
) -> Opened:
    run_id, options = document["id"], flow.options
    if prior == "cancelled":
        raise RunCancelled(f"run {run_id} was cancelled. Begin a new one: .options(fresh=True).")
    if prior == "failed" and document.get("compensated") == "done" and not options.rerun:
        error = stored_error(document)
        log.warning(
            "%s · failed before and was compensated: nothing is repeated. To try again, undone steps anew: "
            "rerun=[%r], or fresh=True for a new run",
            run_id,
            getattr(error, "step", "") or "step",
        )
        error.add_note(
            f"Run {run_id} failed and was compensated; nothing was repeated. Again: rerun=[...] or fresh=True."
        )
        raise error
    ops: list[Any] = []
    if prior is not None:
        if options.rerun:
            ops += drops(flow, journal, run_id)
            document.pop("undoing", None)
            document.pop("compensated", None)
        if prior == "failed" and not document.get("undoing"):
            rundocs.note_retry(document)
        document["epoch"] += 1
        if text != document["input"]:
            document["input"] = text
        document.pop("waiting_on", None)
        if prior == "interrupted":
            document.pop("error", None)
        note_budget(flow, document)
        set_deadline(flow, document, prior)
        if document.get("results") and options.rerun:
            document["results"] = {k: v for k, v in document["results"].items() if k not in options.rerun}
        observers = begin_observing(document, prior)
        ops += [*rundocs.write(document, "running"), Drop(rundocs.wake_key(run_id))]
        journal.commit(ops, fence=lease.fence)
    ex = execution(flow, journal, run_id, document, arguments, prior, _kind())
    ex.fence, ex.lease, ex.observers = lease.fence, lease, observers
    ex.deadline = document.get("deadline")
    ex.cancelling = bool(document.get("cancelling"))
    executing.add(ex)
    if prior is not None:
        ex.load_marks()
    ex.begins()
    return Opened(flow, ex, document, lease, arguments)


def set_deadline(flow: Definition, document: dict[str, Any], prior: str | None) -> None:
    """The recorded deadline holds until the run has ended; one that is run again after that gets a new one."""
    if flow.timeout is None:
        document.pop("deadline", None)
    elif document.get("deadline") is None or (prior in ("completed", "failed") and not document.get("undoing")):
        document["deadline"] = now() + flow.timeout


def execution(
    flow: Definition,
    journal: Journal,
    run_id: str,
    document: dict[str, Any] | None,
    arguments: dict[str, Any],
    prior: str | None,
    kind: type[Execution] = Execution,
) -> Execution:
    ex = kind(journal, run_id, flow.name, driver, on_change=flow.on_change)
    ex.ask = _ask_in_doubt
    ex.stay = flow.options.wait
    if ex.stay:
        from agentflow import terminal

        ex.terminal = terminal.prompter()
    if document is not None:
        ex.budget = _budget(flow, document)
        ex.number = document["epoch"]
        ex.retried = rundocs.retried(document)
        ex.undoing = bool(document.get("undoing"))
        ex.same_code = document.get("code") == code_digest(flow)
        ex.input_text = document["input"]
        ex.results = document.get("results", {})
        ex.prior = prior
        ex.records.load()
    return ex


def _kind() -> type[Execution]:
    """What executes a run in this process: in a kernel, an execution that shows what it does."""
    if "ipykernel" not in sys.modules:
        return Execution
    from agentflow import notebook

    return notebook.execution()


def _ask_in_doubt(call: Call) -> Wait:
    from agentflow import human

    return human.ask_in_doubt(call)


def note_budget(flow: Definition, document: dict[str, Any]) -> None:
    """A budget that was given for this run alone stays with it, whoever resumes it."""
    if flow.options.budget is not None:
        document["budget"] = str(flow.options.budget)


def _budget(flow: Definition, document: dict[str, Any]) -> RunBudget | None:
    own = document.get("budget")
    limit = flow.budget if own is None else Decimal(own)
    if limit is None:
        return None
    from agentflow.budgets import RunBudget

    # A clock that was injected says nothing about when the run was created.
    return RunBudget(document["id"], limit, document["created_at"] - 60 if settings.clock is None else None)


def code_digest(flow: Definition) -> str:
    return code_of(flow.fn).digest


def known_steps(flow: Definition, journal: Journal, run_id: str) -> None:
    rows = rundocs.rows(journal, run_id)
    known = {row.head["name"] for row in rows} | {row.head["occ"] for row in rows}
    known |= {name for _, name in journal.scan(f"d/{in_key(run_id)}/")}
    for name in flow.options.rerun:
        if name not in known and journal.get(f"r/{in_key(run_id)}") is not None:
            names = ", ".join(sorted({repr(row.head["name"]) for row in rows})) or "none"
            raise UsageError(f"rerun=[{name!r}]: run {run_id} has no step of that name. It has: {names}.")


def drops(flow: Definition, journal: Journal, run_id: str) -> list[Any]:
    """Marks that drop the newest records of the steps to do anew, keyed ones for all runs."""
    ops: list[Any] = []
    rows = rundocs.rows(journal, run_id)
    by_occ = {row.head["occ"]: row for row in rows}
    marks: dict[str, str] = {}
    for row in rows:
        if row.head["name"] not in flow.options.rerun and row.head["occ"] not in flow.options.rerun:
            continue
        marks[row.key] = "drop"
        # An enclosing step has to be gone through again to get there; what else is inside it is replayed.
        around = by_occ.get(row.head["scope"])
        while around is not None:
            marks.setdefault(around.key, "open")
            around = by_occ.get(around.head["scope"])
    for row in rows:
        if row.key in marks:
            ops.append(Add(f"{row.key}!{marks[row.key]}", ""))
            if "named" in row.head:
                ops.append(Add(f"{row.head['named']}!{marks[row.key]}", ""))
    # A step in doubt has no record yet: what is dropped is the note that it was started.
    doubts = journal.scan(f"d/{in_key(run_id)}/")
    ops += [Drop(key) for key, name in doubts if name in flow.options.rerun]
    return ops


def ended_as(document: dict[str, Any]) -> str:
    """How the last execution ended; one that says running died."""
    status = str(document["status"])
    return "interrupted" if status == "running" else status


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one is other or (type(one) is type(other) and one == other))
    except Exception:  # arrays and the like have no plain truth: they count as given
        return False


def _short_id(journal: Journal, name: str, digest: str) -> str:
    """The shortest id that no other input has."""
    letters = blake2b(digest.encode(), digest_size=16).hexdigest()
    for length in range(6, 33, 2):
        run_id = f"{name}-{letters[:length]}"
        document = rundocs.read(journal, run_id)
        if document is None or document.get("digest") == digest:
            return run_id
    return f"{name}-{letters}"


def _next_id(journal: Journal, base: str) -> str:
    """An id that no run has: ``base``, ``base-2``, ``base-3``... found in steps that double, then halve."""

    def taken(number: int) -> bool:
        return rundocs.read(journal, base if number == 1 else f"{base}-{number}") is not None

    if not taken(1):
        return base
    low, high = 1, 2
    while taken(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle) else (low, middle)
    return f"{base}-{high}"
