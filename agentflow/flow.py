"""``workflow``: a function whose steps persist; starting, resuming and ending its runs.

A run goes through *open* (take the lease, read what is there), *execute* (the body, from its beginning,
against the records) and *close* (compensate if it failed, write the outcome and release the lease in
one commit). A crash anywhere leaves a run whose lease is dead: the next start takes it over.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import orjson

from agentflow import codec, human, rundocs, typecheck
from agentflow.blocking import collect_blocking, drive_blocking, run_coroutine
from agentflow.calls import ON_CHANGE, PLAIN, Call, Options, Suspend, here
from agentflow.capture import data_digest
from agentflow.codedigest import code_of
from agentflow.context import Context
from agentflow.drive import Wait, collect, drive, execute
from agentflow.durations import Duration, seconds
from agentflow.errors import (
    JournalError,
    LeaseLost,
    RunBusy,
    RunCancelled,
    RunNotFound,
    StepFailed,
    StepNotAwaited,
    UsageError,
    Waiting,
)
from agentflow.handles import Plan, Run, single, stored_error, waiting, workflows
from agentflow.index import in_key
from agentflow.journal import Add, Drop, Journal, Put
from agentflow.lease import Lease, acquire
from agentflow.records import moment, money
from agentflow.run import Execution, PlanStep
from agentflow.scratch import open_journal
from agentflow.settings import log
from agentflow.steps import make_call

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunOptions:
    run_id: str | None = None
    fresh: bool = False
    rerun: tuple[str, ...] = ()
    wait: bool = False
    busy: str = "raise"


class _Opened:
    """A run that this process owns, and what its document said before."""

    __slots__ = ("arguments", "document", "ex", "lease", "started")

    def __init__(self, ex: Execution, document: dict[str, Any], lease: Lease | None, arguments: dict[str, Any]) -> None:
        self.ex = ex
        self.document = document
        self.lease = lease
        self.arguments = arguments
        self.started = time.perf_counter()


class Workflow(Generic[P, T]):
    """A named function whose runs persist. Made by ``workflow``."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        *,
        timeout: Duration | None = None,
        on_change: str = "auto",
        run_id: Callable[..., str] | None = None,
        blocking: bool = False,
        options: RunOptions | None = None,
    ) -> None:
        self.fn = fn
        self.name = name
        self.on_change = on_change
        self.timeout = seconds(timeout, what="workflow timeout")
        self._run_id = run_id
        self._blocking = blocking or not inspect.iscoroutinefunction(fn)
        self._run_options = options or RunOptions()
        parameters = list(inspect.signature(fn).parameters.values())
        if not parameters:
            raise UsageError(
                f"workflow {name!r}: its function needs a first parameter for the context: def {fn.__name__}(ctx, ...)."
            )
        self._signature = inspect.Signature(parameters[1:])
        self.__name__ = getattr(fn, "__name__", name)
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def __repr__(self) -> str:
        return f"<workflow {self.name!r}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(f"a workflow is not called: await {self.__name__}.run(...), or {self.__name__}.run_sync(...).")

    def options(
        self,
        *,
        run_id: str | None = None,
        fresh: bool = False,
        rerun: Iterable[str] = (),
        wait: bool = False,
        busy: str = "raise",
    ) -> Workflow[P, T]:
        """The same workflow with options for its next runs.

        Args:
            run_id: the run's id. None: it comes from the input.
            fresh: True begins a new run for the same input, which is the current one from then on.
            rerun: names (or ids) of steps whose records are dropped and which are done anew.
            wait: True stays until people and long sleeps are through, instead of suspending.
            busy: what if another process owns the run: "raise" (``RunBusy``) or "wait".
        """
        if isinstance(rerun, str):
            raise UsageError(f"rerun={rerun!r}: a list of step names, rerun=[{rerun!r}].")
        names = tuple(rerun)
        if not all(isinstance(name, str) and name for name in names):
            raise UsageError(f"rerun={names!r}: a list of step names.")
        if busy not in ("raise", "wait"):
            raise UsageError(f'busy={busy!r}: "raise" or "wait".')
        if run_id is not None and (not isinstance(run_id, str) or not run_id.strip() or len(run_id) > 200):
            raise UsageError(f"run_id={run_id!r} has to be text of 1 to 200 characters.")
        if fresh and names:
            raise UsageError("fresh=True begins a new run, which has nothing to rerun. Use one of them.")
        return self._copy(RunOptions(run_id, fresh, names, wait, busy))

    def _copy(self, options: RunOptions) -> Workflow[P, T]:
        return type(self)(
            self.fn, self.name, timeout=self.timeout, on_change=self.on_change, run_id=self._run_id,
            blocking=self._blocking, options=options,
        )  # fmt: skip

    # -- running -----------------------------------------------------------------------------

    async def run(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result; finished steps are replayed from their records.

        Raises:
            Waiting: it can only go on when a person answers or a time comes; run it again then.
            RunBusy: another process owns the run.
            UsageError: the arguments do not fit the function's annotations.
        """
        return await self._run(self._arguments(args, kwargs))  # type: ignore[no-any-return]

    async def start(self, *args: P.args, **kwargs: P.kwargs) -> Run:
        """The ``Run``, once it has finished or waits. A failure is in its ``status`` and ``error``."""
        arguments = self._arguments(args, kwargs)
        ids: list[str] = []
        try:
            await self._run(arguments, ids)
        except (UsageError, JournalError, RunBusy):
            raise
        except Exception:
            if not ids:
                raise
        journal = open_journal()
        document = rundocs.find(journal, ids[0])
        return Run(journal, document, self)

    def run_sync(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """``run`` for plain code; also works in a cell of a kernel whose loop is running."""
        arguments = self._arguments(args, kwargs)
        if self._blocking:
            return self._run_blocking(arguments)  # type: ignore[no-any-return]
        return run_coroutine(self._run(arguments))  # type: ignore[no-any-return]

    async def plan(self, *args: P.args, **kwargs: P.kwargs) -> Plan:
        """What ``run`` would do: reused, changed with the difference, or new. Writes and spends nothing."""
        if self._blocking:
            return await asyncio.to_thread(self.plan_blocking, *args, **kwargs)
        ex, context, arguments = self._planned(args, kwargs)
        try:
            await execute(ex, lambda: self._body(context, arguments))
        except (Suspend, Exception) as error:
            self._plan_ends(ex, error)
        return Plan(ex.run_id, ex.plan_steps)

    def plan_blocking(self, *args: Any, **kwargs: Any) -> Plan:
        """``plan`` for plain code."""
        ex, context, arguments = self._planned(args, kwargs)
        outer = here.set(ex.root)
        try:
            self._body(context, arguments)
        except (Suspend, Exception) as error:
            self._plan_ends(ex, error)
        finally:
            here.reset(outer)
        return Plan(ex.run_id, ex.plan_steps)

    def _planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Execution, Context, dict[str, Any]]:
        arguments = self._arguments(args, kwargs)
        journal = open_journal()
        document, run_id = self._locate(journal, arguments)
        prior = rundocs_prior(document) if document is not None else None
        if document is not None and prior == "failed":
            document["retry_upto"] = document["epoch"]
        ex = self._execution(journal, run_id, document, arguments, prior)
        ex.plan = True
        return ex, Context(ex, single(arguments), self._blocking), arguments

    def _plan_ends(self, ex: Execution, error: BaseException) -> None:
        """A body that is stopped on the way may fail in any way; a wrong call is still told."""
        if isinstance(error, UsageError) and not ex.suspended:
            raise error
        if isinstance(error, Exception) and not ex.suspended:
            ex.plan_steps.append(PlanStep("(end)", "fails", f"{type(error).__name__}: {error}"))

    def get(self, run_id: str) -> Run:
        """A run of this workflow by its id."""
        journal = open_journal()
        document = rundocs.find(journal, run_id)
        if document["workflow"] != self.name:
            raise RunNotFound(
                f"run {document['id']} belongs to workflow {document['workflow']!r}, not to {self.name!r}."
            )
        return Run(journal, document, self)

    def runs(self, *, status: str | None = None, limit: int | None = None) -> list[Run]:
        """The runs of this workflow, newest first."""
        journal = open_journal()
        return [Run(journal, d, self) for d in rundocs.listed(journal, status=status, workflow=self.name, limit=limit)]

    def again(self, document: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        named = self._copy(replace(self._run_options, run_id=document["id"], fresh=False))
        return named._run(codec.decode(document["input"]))

    async def _run(self, arguments: dict[str, Any], ids: list[str] | None = None) -> Any:
        if self._blocking:
            context = contextvars.copy_context()
            return await asyncio.to_thread(context.run, self._run_blocking, arguments, ids)
        delay = 0.05
        while True:
            try:
                opened = self._open(arguments)
                break
            except RunBusy:
                if self._run_options.busy != "wait":
                    raise
                await asyncio.sleep(delay)
                delay = min(delay * 1.5, 1.0)
        if ids is not None:
            ids.append(opened.ex.run_id)
        ex = opened.ex
        context_ = Context(ex, single(opened.arguments), False)
        outer = here.set(None)
        try:
            value = await execute(ex, lambda: self._body(context_, opened.arguments))
            result = self._result(ex, value)
        except Suspend:
            raise self._close_waiting(opened) from None
        except Exception as error:
            if isinstance(error, JournalError):
                self._give_up(opened)
                raise
            if isinstance(error, Waiting):
                raise self._wait_for_child(opened, error) from None
            ex.closed = ex.suspended = False
            try:
                self._before_undoing(opened)
                if ex.compensations:
                    await execute(ex, lambda: self._undo(ex))
            except Suspend:
                raise self._close_waiting(opened) from None
            except BaseException:
                self._give_up(opened)
                raise
            self._close_failed(opened, error)
            raise
        except BaseException:
            self._give_up(opened)
            raise
        finally:
            here.reset(outer)
        return self._close_completed(opened, *result)

    def _body(self, context: Context, arguments: dict[str, Any]) -> Awaitable[Any]:
        bound = self._signature.bind_partial()
        bound.arguments.update(arguments)
        result: Awaitable[Any] = self.fn(context, *bound.args, **bound.kwargs)
        return result

    def _run_blocking(self, arguments: dict[str, Any], ids: list[str] | None = None) -> Any:
        delay = 0.05
        while True:
            try:
                opened = self._open(arguments)
                break
            except RunBusy:
                if self._run_options.busy != "wait":
                    raise
                time.sleep(delay)
                delay = min(delay * 1.5, 1.0)
        ex = opened.ex
        if ids is not None:
            ids.append(ex.run_id)
        context = Context(ex, single(opened.arguments), True)
        outer = here.set(ex.root)
        try:
            result = self._result(ex, self._body(context, opened.arguments))
            if ex.suspended:
                raise Suspend
        except Suspend:
            ex.closed = True
            raise self._close_waiting(opened) from None
        except Exception as error:
            if ex.suspended:
                raise self._close_waiting(opened) from None
            if isinstance(error, JournalError):
                self._give_up(opened)
                raise
            if isinstance(error, Waiting):
                raise self._wait_for_child(opened, error) from None
            try:
                self._before_undoing(opened)
                while (inside := self._replayed_with_undo(ex)) is not None:
                    try:
                        collect_blocking(ex, *inside)
                    except Exception as failure:
                        self._not_undone(ex, inside[0], failure)
                for call, slot, value in ex.compensations[::-1]:
                    try:
                        drive_blocking(self._undoing(ex, call, slot, value))
                    except Exception as failure:
                        self._not_undone(ex, call, failure)
            except Suspend:
                ex.closed = True
                raise self._close_waiting(opened) from None
            except BaseException:
                self._give_up(opened)
                raise
            self._close_failed(opened, error)
            raise
        except BaseException:
            self._give_up(opened)
            raise
        finally:
            here.reset(outer)
        return self._close_completed(opened, *result)

    # -- opening -----------------------------------------------------------------------------

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"workflow {self.name!r}: {error}. It takes {self._signature}.") from None
        return typecheck.arguments(self.fn, self.name, dict(bound.arguments))

    def _locate(self, journal: Journal, arguments: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        run_id = self._run_options.run_id
        if run_id is None and self._run_id is not None:
            run_id = self._run_id(*arguments.values())
            if not isinstance(run_id, str) or not run_id:
                raise UsageError(f"workflow {self.name!r}: run_id= gave {run_id!r}; it has to give non-empty text.")
        if run_id is not None and self._run_options.fresh:
            return None, _next_id(journal, run_id)
        if run_id is not None:
            if self._run_options.run_id is None:
                run_id = journal.get(f"p/{in_key(self.name)}/={in_key(run_id)}") or run_id
            return rundocs.read(journal, run_id), run_id
        digest = self._input_digest(arguments)
        latest = journal.get(f"p/{in_key(self.name)}/{digest}")
        if latest is not None and not self._run_options.fresh:
            return rundocs.read(journal, latest), latest
        base = _short_id(journal, rundocs.slug(self.name), digest)
        return None, base if latest is None else _next_id(journal, base)

    def _input_digest(self, arguments: dict[str, Any]) -> str:
        defaults = {name: p.default for name, p in self._signature.parameters.items() if p.default is not p.empty}
        given = {k: v for k, v in arguments.items() if not (k in defaults and _equal(defaults[k], v))}
        return data_digest(given)

    def _open(self, given: dict[str, Any]) -> _Opened:
        """Take the run: its lease, its document, its records."""
        journal = open_journal()
        text = codec.encode(given, where="input")
        arguments = codec.decode(text)
        document, run_id = self._locate(journal, given)
        if document is not None and document["workflow"] != self.name:
            raise UsageError(f"run_id {run_id!r} belongs to workflow {document['workflow']!r}, not to {self.name!r}.")
        if document is not None and self._run_options.rerun:
            self._known_steps(journal, run_id)
        elif self._run_options.rerun:
            raise UsageError(f"rerun={list(self._run_options.rerun)}: there is no run {run_id} of this input yet.")
        new = document is None
        ops: list[Any] = []
        if document is None:
            document = {
                "id": run_id,
                "workflow": self.name,
                "created_at": time.time(),
                "epoch": 1,
                "digest": self._input_digest(given),
            }
            document |= {"input": text, "code": self._code(), "status": None}
            ops = rundocs.write(document, "running")
            named = (
                f"={in_key(self._named(arguments))}" if self._run_id or self._run_options.run_id else document["digest"]
            )
            ops.append(Put(f"p/{in_key(self.name)}/{named}", run_id))
        lease = acquire(
            journal,
            rundocs.lease_key(run_id),
            ops=ops,
            unless=f"r/{in_key(run_id)}",  # another process may have made the run, and ended it, in the meantime
            what=f"run {run_id}",
            run_id=run_id,
        )
        try:
            stored = rundocs.read(journal, run_id)
            if new and stored is not None and stored["created_at"] == document["created_at"]:
                prior = None
            elif self._run_options.fresh:
                # Another process has taken this number for its own fresh run; there is a next one.
                lease.release()
                return self._open(given)
            else:
                assert stored is not None
                document, prior = stored, rundocs_prior(stored)
            return self._opened(journal, document, lease, prior, text, arguments)
        except BaseException:
            lease.release()
            raise

    def _named(self, arguments: dict[str, Any]) -> str:
        return self._run_options.run_id or str(self._run_id(*arguments.values()) if self._run_id else "")

    def _opened(
        self,
        journal: Journal,
        document: dict[str, Any],
        lease: Lease,
        prior: str | None,
        text: str,
        arguments: dict[str, Any],
    ) -> _Opened:
        run_id, options = document["id"], self._run_options
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
                ops += self._drops(journal, run_id)
                document.pop("undoing", None)
                document.pop("compensated", None)
            if prior == "failed" and not document.get("undoing"):
                document["retry_upto"] = document["epoch"]
            document["epoch"] += 1
            if text != document["input"]:
                document["input"] = text
            document.pop("waiting_on", None)
            ops += rundocs.write(document, "running")
            journal.commit(ops, fence=lease.fence)
        ex = self._execution(journal, run_id, document, arguments, prior)
        ex.fence, ex.lease = lease.fence, lease
        if prior is not None:
            ex.load_marks()
        return _Opened(ex, document, lease, arguments)

    def _execution(
        self,
        journal: Journal,
        run_id: str,
        document: dict[str, Any] | None,
        arguments: dict[str, Any],
        prior: str | None,
    ) -> Execution:
        ex = Execution(journal, run_id, self.name, drive, on_change=self.on_change)
        ex.ask = human.ask_in_doubt
        ex.stay = self._run_options.wait
        if document is not None:
            ex.number = document["epoch"]
            ex.retry_upto = document.get("retry_upto", 0)
            ex.undoing = bool(document.get("undoing"))
            ex.same_code = document.get("code") == self._code()
            ex.input_text = document["input"]
            ex.prior = prior
            ex.records.load()
        return ex

    def _code(self) -> str:
        return code_of(self.fn).digest

    def _known_steps(self, journal: Journal, run_id: str) -> None:
        rows = rundocs.rows(journal, run_id)
        known = {row.head["name"] for row in rows} | {row.head["occ"] for row in rows}
        known |= {name for _, name in journal.scan(f"d/{in_key(run_id)}/")}
        for name in self._run_options.rerun:
            if name not in known and journal.get(f"r/{in_key(run_id)}") is not None:
                names = ", ".join(sorted({repr(row.head["name"]) for row in rows})) or "none"
                raise UsageError(f"rerun=[{name!r}]: run {run_id} has no step of that name. It has: {names}.")

    def _drops(self, journal: Journal, run_id: str) -> list[Any]:
        """Marks that drop the newest records of the steps to do anew, keyed ones for all runs."""
        ops: list[Any] = []
        rows = rundocs.rows(journal, run_id)
        by_occ = {row.head["occ"]: row for row in rows}
        marks: dict[str, str] = {}
        for row in rows:
            if row.head["name"] not in self._run_options.rerun and row.head["occ"] not in self._run_options.rerun:
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
        ops += [Drop(key) for key, name in doubts if name in self._run_options.rerun]
        return ops

    # -- closing -----------------------------------------------------------------------------

    def _result(self, ex: Execution, value: Any) -> tuple[str, Any]:
        if isinstance(value, Call):
            raise value.unawaited()
        if ex.not_awaited:
            name = ex.not_awaited[0]
            raise StepNotAwaited(
                f"step {name!r} was called and never awaited, so it did not run. Write: await step({name!r}, ...)"
            )
        return codec.roundtrip(value, where="result")

    def _before_undoing(self, opened: _Opened) -> None:
        if opened.ex.compensations:
            opened.document["undoing"] = True
            opened.ex.journal.commit(
                [Put(f"r/{opened.ex.key}", orjson.dumps(opened.document).decode())], fence=opened.ex.fence
            )

    def _replayed_with_undo(self, ex: Execution) -> tuple[Call, dict[str, Any]] | None:
        """The next replayed step inside which there is something to undo; what is found takes its place."""
        for index, (call, slot, head) in enumerate(ex.compensations):
            if slot is None:
                del ex.compensations[index]
                return call, head
        return None

    def _undoing(self, ex: Execution, call: Call, slot: Any, value: Any) -> Call:
        """The durable step that undoes one; its record and the mark that voids the undone one are one commit."""
        # The key tells the undoing of this very version from that of an equal result before or after it.
        undone = Options(idempotency_key=f"{slot.id}.{slot.n}")
        undo = make_call(f"undo {call.name}", call.options.compensate, (value,), {}, undone)
        ops: list[Any] = [Add(f"{ex.records.key(slot, slot.n)}!void", "")]
        named = ex.records.row(slot, slot.n).head.get("named")
        if named:
            ops.append(Add(f"{named}!void", ""))
        undo.kind = "compensation"
        undo.options = replace(PLAIN, on_change="reuse")
        undo.policy = "reuse"
        undo.extra_ops = tuple(ops)
        return undo

    async def _undo(self, ex: Execution) -> None:
        while (inside := self._replayed_with_undo(ex)) is not None:
            try:
                await collect(ex, *inside)
            except Exception as failure:
                self._not_undone(ex, inside[0], failure)
        for call, slot, value in ex.compensations[::-1]:
            try:
                await self._undoing(ex, call, slot, value)
            except Exception as failure:
                self._not_undone(ex, call, failure)

    def _not_undone(self, ex: Execution, call: Call, failure: Exception) -> None:
        """The others are undone all the same; the run's document says that one is missing."""
        if isinstance(failure, JournalError):
            raise failure
        ex.warn(f"{call.name}: its compensation failed ({type(failure).__name__}: {failure})")
        ex.undo_failed = True

    def _close_completed(self, opened: _Opened, text: str, value: Any) -> Any:
        ex, document = opened.ex, opened.document
        for line in ex.unasked():
            ex.warn(line)
        replayed_only = ex.totals.ran == 0 and document.get("output") == text and document.get("ended_at")
        when = moment(document.get("ended_at"))
        document["output"] = text
        document.pop("error", None)
        if not replayed_only:
            document["ended_at"] = time.time()
        document["code"] = self._code()
        self._close(opened, "completed")
        self._summary(ex, "completed" if not replayed_only else f"completed before, {when:%Y-%m-%d %H:%M:%S} UTC")
        return value

    def _close_failed(self, opened: _Opened, error: Exception) -> None:
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
        self._close(opened, "failed")
        undone = f", {len(ex.compensations)} undone" if ex.compensations else ""
        self._summary(ex, f"failed ({type(error).__name__}){undone}")

    def _wait_for_child(self, opened: _Opened, error: Waiting) -> Waiting:
        """A run started in the body waits: this one waits for the same."""
        dues = [(info, info.get("until", info.get("deadline"))) for info in error.waiting_on]
        opened.ex.waits = [Wait(lambda: None, info, due) for info, due in dues]
        return self._close_waiting(opened)

    def _close_waiting(self, opened: _Opened) -> Waiting:
        ex, document = opened.ex, opened.document
        waits = ex.waits
        unique = {wait.info["id"]: wait.info for wait in waits}
        document["waiting_on"] = list(unique.values())
        document["due"] = min((wait.due for wait in waits if wait.due is not None), default=None)
        self._close(opened, "waiting")
        self._summary(ex, "waiting")
        return waiting(document)

    def _close(self, opened: _Opened, status: str) -> None:
        ex, document = opened.ex, opened.document
        ex.closed = True
        if ex.prior == "interrupted":
            document["paid"] = str(rundocs.paid(ex.journal, ex.run_id))
        else:
            document["paid"] = str(Decimal(document.get("paid", "0")) + ex.totals.paid)
        document["saved"] = str(Decimal(document.get("saved", "0")) + ex.totals.saved)
        ops = human.withdraw(ex) if ex.prior is not None or ex.asked_tasks else []
        ops += [Drop(key) for key in ex.unstarted] + rundocs.write(document, status)
        assert opened.lease is not None
        opened.lease.release(ops)
        if status != "waiting":
            ex.journal.clear_marks(ex.run_id)

    def _give_up(self, opened: _Opened) -> None:
        """Stopped from outside, or the journal failed: leave the run as it is, free for the next start."""
        opened.ex.closed = True
        assert opened.lease is not None
        try:
            opened.lease.release(rundocs.write(opened.document, "interrupted"))
        except LeaseLost:
            log.warning(
                "%s · another process has taken this run over; nothing more is committed here", opened.ex.run_id
            )
        except JournalError as error:
            log.warning("%s · could not note that the run was interrupted: %s", opened.ex.run_id, error)
        else:
            self._summary(opened.ex, "interrupted")

    def _summary(self, ex: Execution, status: str) -> None:
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
        log.info("%s · %s", ex.run_id, line)


def rundocs_prior(document: dict[str, Any]) -> str:
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
    from hashlib import blake2b

    letters = blake2b(digest.encode(), digest_size=16).hexdigest()
    for length in range(6, 33, 2):
        run_id = f"{name}-{letters[:length]}"
        document = rundocs.read(journal, run_id)
        if document is None or document.get("digest") == digest:
            return run_id
    return f"{name}-{letters}"


def _next_id(journal: Journal, base: str) -> str:
    number = 2
    while rundocs.read(journal, f"{base}-{number}") is not None:
        number += 1
    return f"{base}-{number}" if rundocs.read(journal, base) is not None else base


class _Decorator:
    def __init__(self, **options: Any) -> None:
        self._options = options

    def __call__(self, fn: Callable[Concatenate[Context, P], Coroutine[Any, Any, T]]) -> Workflow[P, T]:
        made: Workflow[P, T] = define(fn, **self._options)
        return made


@overload
def workflow(name: Callable[Concatenate[Context, P], Coroutine[Any, Any, T]], /) -> Workflow[P, T]: ...
@overload
def workflow(
    name: str,
    *,
    execute: Callable[Concatenate[Context, P], Coroutine[Any, Any, T]],
    timeout: Duration | None = ...,
    budget: str | Decimal | None = ...,
    on_change: str = ...,
    run_id: Callable[..., str] | None = ...,
) -> Workflow[P, T]: ...
@overload
def workflow(
    name: str | None = ...,
    *,
    timeout: Duration | None = ...,
    budget: str | Decimal | None = ...,
    on_change: str = ...,
    run_id: Callable[..., str] | None = ...,
) -> _Decorator: ...
def workflow(
    name: Any = None,
    *,
    execute: Any = None,
    timeout: Duration | None = None,
    budget: str | Decimal | None = None,
    on_change: str = "auto",
    run_id: Callable[..., str] | None = None,
) -> Any:
    """A function whose steps persist: ``@workflow``, ``@workflow("name", ...)`` or ``workflow(name=..., execute=fn)``.

    The function's first parameter is the ``Context``, the others are the run's input. Its body runs again
    on every resume, so effects belong in steps.

    Args:
        name: names the workflow in ids and listings. None: the function's name.
        execute: the function, in the form that is not a decorator.
        timeout: not built yet; anything but None is refused.
        budget: not built yet; anything but None is refused.
        on_change: what an edit of a step's code means for its steps: "auto", "rerun", "reuse" or "error".
        run_id: a function of the input that gives the run's id. None: the id comes from the input's content.
    """
    options: dict[str, Any] = {"timeout": timeout, "budget": budget, "on_change": on_change, "run_id": run_id}
    if callable(name) and not isinstance(name, str):
        return define(name, None, **options)
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise UsageError(f'workflow name {name!r} is not text. Write @workflow("process-order").')
    if execute is not None:
        return define(execute, name, **options)
    return _Decorator(name=name, **options)


def define(
    fn: Callable[..., Any],
    name: str | None = None,
    *,
    timeout: Duration | None = None,
    budget: Any = None,
    on_change: str = "auto",
    run_id: Callable[..., str] | None = None,
    blocking: bool = False,
    kind: Any = None,
) -> Any:
    """A workflow of a function, known by its name in this process."""
    if not callable(fn):
        raise UsageError(f"workflow(execute={fn!r}): give an async function of (ctx, ...).")
    if on_change not in ON_CHANGE:
        raise UsageError(f"on_change={on_change!r} is none of {', '.join(map(repr, ON_CHANGE))}.")
    for option, value in (("timeout", timeout), ("budget", budget)):
        if value is not None:
            raise UsageError(f"workflow({option}=...) is not supported yet.")
    if run_id is not None and not callable(run_id):
        raise UsageError("workflow(run_id=...): a function of the input, such as lambda order: order.id.")
    made: Workflow[..., Any] = (kind or Workflow)(
        fn, name or str(getattr(fn, "__name__", "workflow")), on_change=on_change, run_id=run_id, blocking=blocking
    )
    workflows[made.name] = made
    return made


def known(name: str) -> Workflow[..., Any] | None:
    return workflows.get(name)


__all__ = ["Context", "Plan", "Run", "Workflow", "define", "known", "run_coroutine", "workflow"]
