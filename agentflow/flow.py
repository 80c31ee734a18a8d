"""``workflow``: a function whose steps persist; starting, resuming and ending its runs.

A run goes through *open* (take the lease, read what is there), *execute* (the body, from its beginning,
against the records) and *close* (compensate if it failed, write the outcome and release the lease in
one commit). A crash anywhere leaves a run whose lease is dead: the next start takes it over.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from agentflow import closing, codec, opening, rundocs, typecheck
from agentflow.blocking import collect_blocking, drive_blocking, park_blocking
from agentflow.calls import ON_CHANGE, Suspend, here
from agentflow.childcalls import ChildCall
from agentflow.context import Context
from agentflow.durations import Duration, seconds
from agentflow.engine import over_budget
from agentflow.errors import (
    BudgetExceeded,
    JournalError,
    RunBusy,
    RunCancelled,
    RunNotFound,
    UsageError,
    Waiting,
)
from agentflow.handles import Plan, Run, run_apart, single, stored_error, workflows
from agentflow.observing import tell
from agentflow.rich import Listed
from agentflow.run import Execution
from agentflow.scratch import open_journal

if TYPE_CHECKING:
    from agentflow.cron import Schedule

P = ParamSpec("P")
T = TypeVar("T")
Dollars = str | int | float | Decimal
_A_TICK = 1_000_000_000.0  # any instant that is no midnight


class Workflow(Generic[P, T]):
    """A named function whose runs persist. Made by ``workflow``."""

    __agentflow_workflow__ = True

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        *,
        timeout: Duration | None = None,
        budget: Decimal | None = None,
        on_change: str = "auto",
        run_id: Callable[..., str] | None = None,
        blocking: bool = False,
        schedule: Schedule | None = None,
        options: opening.RunOptions | None = None,
    ) -> None:
        parameters = list(inspect.signature(fn).parameters.values())
        if not parameters:
            raise UsageError(
                f"workflow {name!r}: its function needs a first parameter for the context: def {fn.__name__}(ctx, ...)."
            )
        self.fn = fn
        self.name = name
        self.timeout = seconds(timeout, what="workflow timeout")
        self.schedule = schedule
        self._definition = opening.Definition(
            fn=fn,
            name=name,
            budget=budget,
            on_change=on_change,
            run_id=run_id,
            blocking=blocking or not inspect.iscoroutinefunction(fn),
            signature=inspect.Signature(parameters[1:]),
            options=options or opening.RunOptions(),
            timeout=self.timeout,
        )
        self.__name__ = getattr(fn, "__name__", name)
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def __repr__(self) -> str:
        return f"<workflow {self.name!r}>"

    def __agentflow_given__(self) -> dict[str, Any]:
        """What counts of a workflow that a step is given: which one, and which run of it. Its function is code."""
        return {"name": self.name, "run_id": self._definition.options.run_id}

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
        budget: Dollars | None = None,
    ) -> Workflow[P, T]:
        """The same workflow with options for its next runs.

        Args:
            run_id: the run's id. None: it comes from the input.
            fresh: True begins a new run for the same input, which is the current one from then on.
            rerun: names (or ids) of steps whose records are dropped and which are done anew.
            wait: True stays until people and long sleeps are through, instead of suspending. In a terminal people are
                asked right there, unless ``configure(ask=False)`` says otherwise; in a notebook with ipywidgets by
                buttons below the card, while a cell awaits the run.
            busy: what if another process owns the run: "raise" (``RunBusy``) or "wait".
            budget: dollars for the run, in place of the workflow's; kept with the run, for whoever resumes it.
                None: the run's own, else the workflow's.
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
        limit = None if budget is None else _dollars(budget, "budget")
        return self._copy(opening.RunOptions(run_id, fresh, names, wait, busy, limit))

    def _copy(self, options: opening.RunOptions) -> Workflow[P, T]:
        now = self._definition
        return type(self)(
            self.fn, self.name, timeout=self.timeout, budget=now.budget, on_change=now.on_change, run_id=now.run_id,
            blocking=now.blocking, schedule=self.schedule, options=options,
        )  # fmt: skip

    # -- running -----------------------------------------------------------------------------

    async def run(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result; finished steps are replayed from their records.

        Raises:
            Waiting: it can only go on when a person answers or a time comes; run it again then.
            RunBusy: another process owns the run.
            BudgetExceeded: the next call could cost more than the budget still allows; it goes on with a higher one.
            UsageError: the arguments do not fit the function's annotations.
        """
        return await self._run(opening.arguments(self._definition, args, kwargs))  # type: ignore[no-any-return]

    async def start(self, *args: P.args, **kwargs: P.kwargs) -> Run:
        """The ``Run``, once it has finished or waits. A failure is in its ``status`` and ``error``.

        Raises:
            BudgetExceeded: it is neither finished nor waiting; it goes on with a higher budget.
        """
        arguments = opening.arguments(self._definition, args, kwargs)
        ids: list[str] = []
        try:
            await self._run(arguments, ids)
        except Exception as error:
            if not ids or isinstance(error, JournalError | BudgetExceeded):
                raise
        journal = open_journal()
        document = rundocs.find(journal, ids[0])
        return Run(journal, document, self)

    def run_sync(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """``run`` for plain code; also works in a cell of a kernel whose loop is running."""
        arguments = opening.arguments(self._definition, args, kwargs)
        if self._definition.blocking:
            return self._run_blocking(arguments)  # type: ignore[no-any-return]
        from agentflow.portal import run_coroutine

        return run_coroutine(self._run(arguments))  # type: ignore[no-any-return]

    async def plan(self, *args: P.args, **kwargs: P.kwargs) -> Plan:
        """What ``run`` would do: reused, changed with the difference, or new. Writes and spends nothing."""
        import asyncio

        from agentflow.drive import execute

        if self._definition.blocking:
            return await asyncio.to_thread(self.plan_blocking, *args, **kwargs)
        ex, context, arguments = self._planned(opening.arguments(self._definition, args, kwargs))
        try:
            await execute(ex, lambda: self._body(context, arguments))
        except (Suspend, Exception) as error:
            self._plan_ends(ex, error)
        return Plan(ex.run_id, ex.plan_steps)

    def plan_blocking(self, *args: Any, **kwargs: Any) -> Plan:
        """``plan`` for plain code."""
        ex, context, arguments = self._planned(opening.arguments(self._definition, args, kwargs))
        outer = here.set(ex.root)
        try:
            self._body(context, arguments)
        except (Suspend, Exception) as error:
            self._plan_ends(ex, error)
        finally:
            here.reset(outer)
        return Plan(ex.run_id, ex.plan_steps)

    def _planned(
        self, arguments: dict[str, Any], call: ChildCall | None = None
    ) -> tuple[Execution, Context, dict[str, Any]]:
        """An execution that only looks. ``call``: where the run that is planned asks for this one."""
        journal = open_journal()
        document, run_id = opening.locate(self._definition, journal, arguments)
        prior = opening.ended_as(document) if document is not None else None
        if call is not None:
            if (failure := call.failed_before(run_id)) is not None:
                raise failure
            if document is not None and prior == "cancelled":
                raise RunCancelled(f"run {run_id} was cancelled.")
            if document is not None and prior == "failed" and document.get("compensated") == "done":
                raise stored_error(document)
        if document is not None and prior == "failed":
            rundocs.note_retry(document)
        ex = opening.execution(self._definition, journal, run_id, document, arguments, prior)
        ex.plan = True
        if call is not None:
            ex.plan_steps = call.ex.plan_steps
        return ex, Context(ex, single(arguments), self._definition.blocking), arguments

    def _plan_ends(self, ex: Execution, error: BaseException) -> None:
        """A body that is stopped on the way may fail in any way; a wrong call is still told."""
        if isinstance(error, UsageError) and not ex.suspended:
            raise error
        if isinstance(error, Exception) and not ex.suspended:
            from agentflow.records import PlanStep

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
        documents = rundocs.listed(journal, status=status, workflow=self.name, limit=limit)
        return Listed(Run(journal, document, self) for document in documents)

    def again(self, document: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        named = self._copy(self._definition.options.but(run_id=document["id"], fresh=False))
        return named._run(self.accepted(codec.decode(document["input"])))

    def accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, checked against the function's annotations."""
        return typecheck.arguments(self.fn, self.name, arguments)

    @property
    def tick_argument(self) -> str | None:
        """The parameter that gets the instant of a schedule's tick; None where there is none."""
        from agentflow import cron

        return cron.argument(self._definition.signature, self.name)

    @property
    def parameters(self) -> list[str]:
        """The names of the function's arguments after the context."""
        return list(self._definition.signature.parameters)

    async def _recorded(self, call: ChildCall, arguments: dict[str, Any], ids: list[str] | None) -> Any:
        """This run as a part of a plan: its result, if all of it is recorded; it is stopped where it would run."""
        import asyncio

        from agentflow.drive import execute, park

        try:
            if self._definition.blocking:
                context = contextvars.copy_context()
                return await asyncio.to_thread(context.run, self._recorded_blocking, call, arguments, ids)
            ex, context_, arguments = self._planned(arguments, call)
            outer = here.set(None)
            try:
                value = await execute(ex, lambda: self._body(context_, arguments))
            finally:
                here.reset(outer)
            return _looked_at(ex, value, ids)
        except Suspend:
            await park(call.ex, None)

    def _recorded_blocking(self, call: ChildCall, arguments: dict[str, Any], ids: list[str] | None) -> Any:
        ex, context, arguments = self._planned(arguments, call)
        outer = here.set(ex.root)
        try:
            return _looked_at(ex, self._body(context, arguments), ids)
        finally:
            here.reset(outer)

    async def _run(self, arguments: dict[str, Any], ids: list[str] | None = None) -> Any:
        """Run it; inside another run, which waits for what this one waits for, until it has ended."""
        call = _asked_for()
        if call is not None and call.ex.plan:
            return await self._recorded(call, arguments, ids)
        caller = call.ex if call is not None and ids is None else None
        while True:
            try:
                return await self._once(arguments, ids, call)
            except Waiting as error:
                if caller is None:
                    raise
                wait = closing.childs_wait(caller, error)
            from agentflow.drive import park

            await park(caller, wait)

    async def _once(self, arguments: dict[str, Any], ids: list[str] | None, call: ChildCall | None) -> Any:
        import asyncio

        from agentflow.drive import execute

        if self._definition.blocking:
            context = contextvars.copy_context()
            return await asyncio.to_thread(context.run, self._once_blocking, arguments, ids, call)
        delay = 0.05
        while True:
            try:
                opened = opening.open_run(self._definition, arguments, call, ids)
                break
            except RunBusy:
                if self._definition.options.busy != "wait":
                    raise
                await asyncio.sleep(delay)
                delay = min(delay * 1.5, 1.0)
        ex = opened.ex
        ex.around = None if call is None else call.ex
        context_ = Context(ex, single(opened.arguments), False)
        outer = here.set(None)
        tell(ex.observers, lambda each: each.body_entered(ex))
        try:
            value = await execute(ex, lambda: self._body(context_, opened.arguments))
            result = closing.result(ex, value)
        except Suspend:
            raise closing.close_waiting(opened) from None
        except Exception as error:
            if isinstance(error, JournalError) or ex.cancelled:
                closing.give_up(opened)
                if ex.cancelled and not isinstance(error, RunCancelled):
                    raise RunCancelled(f"run {ex.run_id} was cancelled.") from None
                raise
            if (over := over_budget(error)) is not None:
                closing.give_up(opened, over)
                raise over from (None if over is error else error)
            ex.closed = ex.suspended = False
            try:
                closing.before_undoing(opened)
                for child, document in closing.children_to_undo(opened):
                    with contextlib.suppress(RunCancelled, Waiting):
                        await child.again(document)
                if ex.compensations:
                    await execute(ex, lambda: closing.undo(ex))
            except Suspend:
                raise closing.close_waiting(opened) from None
            except BaseException:
                closing.give_up(opened)
                raise
            closing.close_failed(opened, error)
            raise
        except BaseException:
            closing.give_up(opened)
            raise
        finally:
            tell(ex.observers, lambda each: each.body_left(ex))
            here.reset(outer)
        return closing.close_completed(opened, *result)

    def _body(self, context: Context, arguments: dict[str, Any]) -> Awaitable[Any]:
        bound = self._definition.signature.bind_partial()
        bound.arguments.update(arguments)
        result: Awaitable[Any] = self.fn(context, *bound.args, **bound.kwargs)
        return result

    def _run_blocking(self, arguments: dict[str, Any], ids: list[str] | None = None) -> Any:
        """``_run`` for plain code."""
        call = _asked_for()
        if call is not None and call.ex.plan:
            try:
                return self._recorded_blocking(call, arguments, ids)
            except Suspend:
                park_blocking(call.ex, None)
        caller = call.ex if call is not None and ids is None else None
        while True:
            try:
                return self._once_blocking(arguments, ids, call)
            except Waiting as error:
                if caller is None:
                    raise
                wait = closing.childs_wait(caller, error)
            park_blocking(caller, wait)

    def _once_blocking(self, arguments: dict[str, Any], ids: list[str] | None, call: ChildCall | None) -> Any:
        delay = 0.05
        while True:
            try:
                opened = opening.open_run(self._definition, arguments, call, ids)
                break
            except RunBusy:
                if self._definition.options.busy != "wait":
                    raise
                time.sleep(delay)
                delay = min(delay * 1.5, 1.0)
        ex = opened.ex
        ex.around = None if call is None else call.ex
        context = Context(ex, single(opened.arguments), True)
        outer = here.set(ex.root)
        tell(ex.observers, lambda each: each.body_entered(ex))
        try:
            result = closing.result(ex, closing.in_time(ex, lambda: self._body(context, opened.arguments)))
            if ex.suspended:
                raise Suspend
        except Suspend:
            ex.closed = True
            raise closing.close_waiting(opened) from None
        except Exception as error:
            if ex.suspended:
                raise closing.close_waiting(opened) from None
            if isinstance(error, JournalError) or ex.cancelled:
                closing.give_up(opened)
                if ex.cancelled and not isinstance(error, RunCancelled):
                    raise RunCancelled(f"run {ex.run_id} was cancelled.") from None
                raise
            if (over := over_budget(error)) is not None:
                closing.give_up(opened, over)
                raise over from (None if over is error else error)
            try:
                closing.before_undoing(opened)
                for child, document in closing.children_to_undo(opened):
                    with contextlib.suppress(RunCancelled, Waiting):
                        run_apart(child.again(document))
                while (inside := closing.replayed_with_undo(ex)) is not None:
                    try:
                        collect_blocking(ex, *inside)
                    except Exception as failure:
                        closing.not_undone(ex, inside[0], failure)
                for done, slot, value in ex.compensations[::-1]:
                    try:
                        drive_blocking(closing.undoing(ex, done, slot, value))
                    except Exception as failure:
                        closing.not_undone(ex, done, failure)
            except Suspend:
                ex.closed = True
                raise closing.close_waiting(opened) from None
            except BaseException:
                closing.give_up(opened)
                raise
            closing.close_failed(opened, error)
            raise
        except BaseException:  # Ctrl-C, while other threads may be asking models
            if ex.paying:
                from agentflow.portal import stop_paying

                stop_paying(ex.paying)
            closing.give_up(opened)
            raise
        finally:
            tell(ex.observers, lambda each: each.body_left(ex))
            here.reset(outer)
        return closing.close_completed(opened, *result)


def _asked_for() -> ChildCall | None:
    """The place in the run in whose body or step this code stands."""
    place = here.get()
    return None if place is None or place.ex.scratch else ChildCall(place)


def _looked_at(ex: Execution, value: Any, ids: list[str] | None) -> Any:
    if ids is not None:
        ids.append(ex.run_id)
    return closing.result(ex, value)[1]


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
    budget: Dollars | None = ...,
    on_change: str = ...,
    run_id: Callable[..., str] | None = ...,
    schedule: str | None = ...,
    timezone: str | None = ...,
    catch_up: str = ...,
) -> Workflow[P, T]: ...
@overload
def workflow(
    name: str | None = ...,
    *,
    timeout: Duration | None = ...,
    budget: Dollars | None = ...,
    on_change: str = ...,
    run_id: Callable[..., str] | None = ...,
    schedule: str | None = ...,
    timezone: str | None = ...,
    catch_up: str = ...,
) -> _Decorator: ...
def workflow(
    name: Any = None,
    *,
    execute: Any = None,
    timeout: Duration | None = None,
    budget: Dollars | None = None,
    on_change: str = "auto",
    run_id: Callable[..., str] | None = None,
    schedule: str | None = None,
    timezone: str | None = None,
    catch_up: str = "latest",
) -> Any:
    """A function whose steps persist: ``@workflow``, ``@workflow("name", ...)`` or ``workflow(name=..., execute=fn)``.

    The function's first parameter is the ``Context``, the others are the run's input. Its body runs again
    on every resume, so effects belong in steps.

    Args:
        name: names the workflow in ids and listings. None: the function's name.
        execute: the function, in the form that is not a decorator.
        timeout: seconds or a duration from the start of the run to its deadline, which is recorded: restarts and edits
            do not move it, and time spent waiting counts. When it passes, what is in flight is stopped (a paid model
            call is finished and recorded), nothing new starts, and the run fails with ``WorkflowTimeout``. A run that
            has ended and is run again gets a new one. None: no limit.
        budget: dollars that the model calls of one run may cost in all its executions, such as "2.50". A call that
            could go beyond it is not sent: BudgetExceeded is raised, and the run goes on with a higher budget
            (``.options(budget="5.00").run(...)``). Runs started inside count too, replays not. None: no limit.
        on_change: what an edit of a step's code means for its steps: "auto", "rerun", "reuse" or "error".
        run_id: a function of the input that gives the run's id. None: the id comes from the input's content.
        schedule: when ``agentflow worker`` runs it by itself: a cron expression of five fields (minute hour
            day-of-month month day-of-week), such as "0 9 * * MON", Mondays at nine, or "@daily". Such a workflow takes
            the context and nothing more, or one parameter that gets the tick's instant, an aware datetime in the time
            zone. Each tick is one run, ``report-20261130T080000Z`` by the tick in UTC, however many workers there are;
            it starts also while the run before is going on. A local time that daylight saving leaves out runs at the
            end of the gap, one that comes twice runs once. The first tick is the first after a worker has seen the
            schedule, or an edit of it. None: it runs when it is told to.
        timezone: the name of the schedule's time zone, such as "Europe/Berlin". None: UTC.
        catch_up: what becomes of ticks that no worker noticed within a minute: "latest" (one run, for the newest),
            "all" (a run for each, for the newest thousand of more) or "skip" (no run).

    Raises:
        UsageError: an option that cannot be; a function that does not take what its schedule gives it.
    """
    options: dict[str, Any] = {"timeout": timeout, "budget": budget, "on_change": on_change, "run_id": run_id}
    options |= {"schedule": schedule, "timezone": timezone, "catch_up": catch_up}
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
    budget: Dollars | None = None,
    on_change: str = "auto",
    run_id: Callable[..., str] | None = None,
    schedule: str | None = None,
    timezone: str | None = None,
    catch_up: str = "latest",
    blocking: bool = False,
    kind: Any = None,
) -> Any:
    """A workflow of a function, known by its name in this process."""
    if not callable(fn):
        raise UsageError(f"workflow(execute={fn!r}): give an async function of (ctx, ...).")
    if on_change not in ON_CHANGE:
        raise UsageError(f"on_change={on_change!r} is none of {', '.join(map(repr, ON_CHANGE))}.")
    most = None if budget is None else _dollars(budget, "workflow(budget=...)")
    limit = seconds(timeout, what="workflow timeout")
    if limit == 0:
        raise UsageError("workflow(timeout=0) leaves no time at all. None waits without end.")
    if run_id is not None and not callable(run_id):
        raise UsageError("workflow(run_id=...): a function of the input, such as lambda order: order.id.")
    made: Workflow[..., Any] = (kind or Workflow)(
        fn,
        name or str(getattr(fn, "__name__", "workflow")),
        timeout=limit,
        budget=most,
        on_change=on_change,
        run_id=run_id,
        blocking=blocking,
        schedule=_schedule(schedule, timezone, catch_up),
    )
    if made.schedule is not None and (argument := made.tick_argument) is not None:
        typecheck.annotated(fn, made.name, argument, made.schedule.local(_A_TICK))
    workflows[made.name] = made
    return made


def _dollars(value: Any, where: str) -> Decimal:
    from agentflow.budgets import amount

    return amount(value, where)


def _schedule(schedule: Any, timezone: Any, catch_up: Any) -> Schedule | None:
    if (schedule, timezone, catch_up) == (None, None, "latest"):
        return None
    from agentflow.cron import parsed

    return parsed(schedule, timezone, catch_up)


def known(name: str) -> Workflow[..., Any] | None:
    return workflows.get(name)


__all__ = ["Context", "Plan", "Run", "Workflow", "define", "known", "workflow"]
