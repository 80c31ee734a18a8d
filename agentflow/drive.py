"""The driver of ``engine.process`` on an asyncio loop; ``blocking.py`` is the other one.

Both perform the same effects; what happens next is decided in the engine alone. This file also knows the
tasks of a run: which branch each is, and whether anything in the run can still go on.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary

from agentflow import rundocs
from agentflow.calls import Call, Current, Here, Suspend, Unanswered, enclosing, here
from agentflow.cancelled import CancelledAfterCommit
from agentflow.clock import FakeClock, pass_time
from agentflow.clocks import start_clocks, stop_clocks
from agentflow.engine import at_hand, keep_late, not_at_hand
from agentflow.errors import JournalError, NotRecordable, RunCancelled, StepTimeout
from agentflow.reuse import located
from agentflow.run import Execution
from agentflow.settings import log, settings
from agentflow.waits import PENDING, Wait, coroutine_label, inside, pauses
from agentflow.workers import Work, in_flight, threads

BRIEF = 50e-6  # seconds: a sync function that took less the last time is waited for on the spot the next time


def drive(call: Call) -> Generator[Any, Any, Any]:
    """Run ``process`` on the loop. A hit needs no coroutine and never leaves the caller's turn."""
    row = at_hand(call)
    if row is not None:
        return call.ex.deliver(call, row)
    steps = not_at_hand(call)
    try:
        effect = steps.send(None)
    except StopIteration as stop:
        return stop.value
    return (yield from _perform(call, steps, effect).__await__())


async def _perform(call: Call, steps: Generator[Any, Any, Any], effect: Any) -> Any:
    ex = call.ex
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            if cancelled is not None:
                raise cancelled
            kind = effect[0]
            result: Any = None
            if kind == "attempt":
                result = await _attempt(call, effect[1], effect[2])
            elif kind == "commit":
                result = await ex.journal.acommit(effect[1], fence=ex.fence, paid=effect[2])
            elif kind == "sleep":
                await asyncio.sleep(effect[1])
            elif kind == "settle":
                await _settle(ex)
            elif kind == "let_siblings":
                await _let_siblings(call)
            elif kind == "park":
                result = await park(ex, effect[1])
            elif kind == "join":
                await asyncio.wrap_future(effect[1])
            else:
                result = await park(ex, ex.ask(effect[1]))
        except CancelledAfterCommit as error:
            # What is recorded has happened: it is to be counted, and undone if the run fails.
            cancelled = asyncio.CancelledError()
            send, value = steps.send, error.result
        except BaseException as error:
            send, value = steps.throw, error
        else:
            send, value = steps.send, result
        try:
            effect = send(value)
        except StopIteration as stop:
            if cancelled is not None:
                raise cancelled from None
            return stop.value


async def _settle(ex: Execution) -> None:
    """Let the siblings that are ready make their calls, and so claim their own records."""
    quiet, seen = 0, -1
    while quiet < 5:
        await asyncio.sleep(0)
        quiet = quiet + 1 if ex.asked == seen else 0
        seen = ex.asked


async def _let_siblings(call: Call) -> None:
    with call.ex.patience(call):
        for pause in pauses(call):
            await asyncio.sleep(pause)


async def _attempt(call: Call, current: Current, timeout: float | None) -> Any:
    token = here.set(inside(call, current))
    try:
        if timeout is None:
            return await _invoke(call, current)
        try:
            async with asyncio.timeout(timeout) as clock:
                current.clock = clock
                return await _invoke(call, current)
        except TimeoutError as error:
            if clock.expired():
                current.over = True
                raise located(StepTimeout(f"step {call.name!r} took longer than {timeout:g}s"), call) from error
            raise
    except Exception:
        await _end_branches(call.ex, current)
        raise
    finally:
        here.reset(token)


async def _end_branches(ex: Execution, failed: Current) -> None:
    """What a failed attempt has left at work is ended, as at the end of a run: a new attempt begins it anew.

    ``asyncio.gather``, other than a TaskGroup, does not cancel the siblings of what fails.
    """
    left = [task for task, around in ex.around_tasks.items() if _is_inside(around, failed) and not task.done()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=30)


def _is_inside(current: Current | None, outer: Current) -> bool:
    while current is not None and current is not outer:
        current = current.parent
    return current is outer


async def _invoke(call: Call, current: Current) -> Any:
    if call.kind == "ai":
        return await _answered(call, current)
    if call.wait is not None:
        return await park(call.ex, call.wait())
    capture = call.capture
    if (capture is not None and capture.is_async) or not call.options.thread or call.kind == "human":
        result = call.fn(*call.args, **call.kwargs)
    else:
        result = await _in_thread(call, current)
    if inspect.isawaitable(result):
        result = await result
    return result


async def _answered(call: Call, current: Current) -> Any:
    """A model call whose reply may come later: it waits as for a person, and takes up what has come."""
    while True:
        try:
            return await _paid(call, current)
        except Unanswered as unanswered:
            later = unanswered
        wait = later.wait()
        try:
            await park(call.ex, wait)
        finally:
            later.forget(wait)
        if ops := call.ex.goes_on([current]):
            await call.ex.journal.acommit(ops, fence=call.ex.fence)


async def _paid(call: Call, current: Current) -> Any:
    """A model call goes on when its caller is cancelled: the reply is paid for, so it is recorded, and so is the step.

    One that was not sent yet is not sent any more.
    """
    ex, slot = call.ex, current.facts[0]
    if (before := ex.on_way.get(slot)) is not None:
        await asyncio.wait([before])  # sent by an attempt of the steps around that has failed; it is paid for
    task = asyncio.get_running_loop().create_task(call.fn())
    ex.tasks.pop(task, None)
    ex.around_tasks.pop(task, None)
    ex.stragglers.add(task)
    task.add_done_callback(ex.stragglers.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if call.withdraw():
            task.cancel()
        elif not _timed_out(current):  # or it may be one that never ends
            ex.on_way[slot] = task
            task.add_done_callback(lambda _: ex.on_way.pop(slot, None))
        task.add_done_callback(lambda done: keep(done, current))
        raise


async def _in_thread(call: Call, current: Current) -> Any:
    ex, loop = call.ex, asyncio.get_running_loop()
    waiter = loop.create_future()
    work = Work(contextvars.copy_context(), call.fn, call.args, call.kwargs)
    kept: Future[Any] | None = None  # what comes back after the caller was released

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def back() -> None:
        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the loop was closed
            if kept is None:  # and this task was not cancelled before
                current.left = True
                keep(work.future(), current)

    threads.start(work)
    try:
        # Being woken through the loop costs more than a brief function does: that holds up the loop for less.
        if (call.name in ex.brief and work.wait(2 * BRIEF)) or not work.tell(back):
            await asyncio.sleep(0)  # other tasks get their turn all the same
        else:
            await waiter
    except (asyncio.CancelledError, KeyboardInterrupt):
        if current.clock is None or not current.clock.expired():
            current.left = True  # for good: there will be no other attempt of this call to take what comes
        kept = when_back(work.future(), current)
        if not _timed_out(current):
            key = (ex.journal.id, ex.run_id, call.occ)
            in_flight[key] = kept
            kept.add_done_callback(lambda _: in_flight.pop(key, None))
            ex.abandoned.add(kept)
        raise
    (ex.brief.add if work.took < BRIEF else ex.brief.discard)(call.name)
    return work.result()


def when_back(future: Future[Any], current: Current) -> Future[Any]:
    """A thread cannot be stopped: what it returns after its caller was released is kept. Gives its slot then."""
    kept: Future[Any] = Future()

    def came_back(done: Future[Any]) -> None:
        try:
            keep(done, current)
        finally:
            kept.set_result(current.facts[0])

    future.add_done_callback(came_back)
    return kept


def keep(done: Future[Any] | asyncio.Future[Any], current: Current) -> None:
    """Record what came back after its caller was released, if anything did."""
    if done.cancelled() or done.exception() is not None:
        return
    try:
        keep_late(current, done.result())
    except (JournalError, NotRecordable) as error:
        lost = "its reply alone is recorded" if current.call.kind == "ai" else "its result is lost"
        log.warning("%s · %s came back late; %s: %s", current.run_id, current.name, lost, error)


def _timed_out(current: Current | None) -> bool:
    while current is not None:
        if current.clock is not None and current.clock.expired():
            return True
        current = current.parent
    return False


# -- the tasks of a run --------------------------------------------------------------------

_factories: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def _watch_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """While runs are active, each task they create is known, with the branch it is."""
    entry = _factories.get(loop)
    if entry is not None:
        entry[0] += 1
        return
    before = loop.get_task_factory()

    def factory(loop: Any, coro: Any, **kwargs: Any) -> Any:
        at, label = here.get(), ""
        known = (
            at is not None
            and at.ex.loop is loop
            and getattr(coro, "cr_code", None) is not _body.__code__
            # What an SDK starts to connect or to read is no branch of the run: it ends with its call, not with the run.
            and not (at.outer is not None and at.outer.call.kind == "ai")
        )
        if at is not None and known:
            # The parent becomes a branch first, so that the child's name and path start from it.
            place, _ = at.ex.stand()
            if not isinstance(coro, Call):
                label = at.ex.naming or at.ex.label(coroutine_label(coro), place)
                at.ex.expect_branches(place, [label])
        task = before(loop, coro, **kwargs) if before is not None else asyncio.Task(coro, loop=loop, **kwargs)
        if at is not None and known:
            ex = at.ex
            if not task.done():
                ex.tasks[task] = label
                if at.outer is not None:
                    ex.around_tasks[task] = at.outer
            task.add_done_callback(functools.partial(ended, ex, place, label))
        return task

    def ended(ex: Execution, place: Here, label: str, task: Any) -> None:
        ex.tasks.pop(task, None)
        ex.around_tasks.pop(task, None)
        if label:
            ex.branches_ended(place, [label])

    _factories[loop] = [1, before, factory]
    loop.set_task_factory(factory)


def _unwatch_tasks(loop: asyncio.AbstractEventLoop) -> None:
    entry = _factories[loop]
    entry[0] -= 1
    if entry[0] == 0:
        if loop.get_task_factory() is entry[2]:
            loop.set_task_factory(entry[1])
        del _factories[loop]


async def park(ex: Execution, wait: Wait | None) -> Any:
    """Wait for a person, an event or a time; leaves by ``Suspend`` when nothing else can go on."""
    place = here.get()
    waiting = enclosing(place.outer.call) if place is not None and place.outer is not None else []
    if wait is not None:
        result = wait.check()
        if result is not PENDING:
            if ops := ex.goes_on(waiting):
                await ex.journal.acommit(ops, fence=ex.fence)
            return result
    if ex.halted:
        raise Suspend
    future = asyncio.get_running_loop().create_future()
    ex.parked[future] = (wait, asyncio.current_task())
    if ex.watcher is None or ex.watcher.done():
        ex.watcher = contextvars.Context().run(asyncio.ensure_future, _watch(ex))
    clocks = stop_clocks()
    if ex.stay and (ops := ex.only_waits(waiting)):
        await ex.journal.acommit(ops, fence=ex.fence)
    if ex.terminal is not None:
        ex.terminal.add(wait)
    try:
        result = await future
        # Asking has taken back, durably, that the steps around were in flight: from here on they are again.
        if ops := ex.goes_on(waiting):
            await ex.journal.acommit(ops, fence=ex.fence)
        return result
    finally:
        if ex.terminal is not None:
            ex.terminal.drop(wait)
        ex.parked.pop(future, None)
        start_clocks(clocks)


async def _watch(ex: Execution) -> None:
    pause = 0.0
    while ex.parked:
        await asyncio.sleep(pause)
        for future, (wait, _) in list(ex.parked.items()):
            if wait is None or future.done():
                continue
            try:
                result = wait.check()
            except BaseException as error:
                future.set_exception(error)
                pause = 0.0
            else:
                if result is not PENDING:
                    future.set_result(result)
                    pause = 0.0
        if any(future.done() for future in ex.parked):
            continue
        if not ex.parked:
            return
        try:
            ex.hold()
        except JournalError as error:
            for future in ex.parked:
                if not future.done():
                    future.set_exception(error)
            return
        if ex.batches is not None and ex.batches.due() and await _still_idle(ex) and await _look(ex):
            pause = 0.0
            continue
        now = ex.clock()
        due = [wait.due - now for wait, _ in ex.parked.values() if wait is not None and wait.due is not None]
        if ex.deadline is not None:
            due.append(ex.deadline - now)
        soon = any(left <= 60 for left in due)
        if not ex.stay and not soon and await _still_idle(ex):
            ex.suspended = True
            ex.waits = [wait for wait, _ in ex.parked.values() if wait is not None]
            for future in ex.parked:
                if not future.done():
                    future.set_exception(Suspend())
            return
        waits = [wait for wait, _ in ex.parked.values()]
        if isinstance(settings.clock, FakeClock) and await _still_idle(ex) and pass_time(waits, now):
            pause = 0.0
            continue
        pause = min([max(pause * 2, 0.001), 0.25, *(max(d, 0.0) for d in due)])


async def _look(ex: Execution) -> bool:
    """A look at the run's batches, which goes on when the run is stopped: what is handed over is paid for."""
    task = asyncio.get_running_loop().create_task(ex.batches.look())
    ex.stragglers.add(task)
    task.add_done_callback(ex.stragglers.discard)
    came: bool = await asyncio.shield(task)
    return came


def halt(ex: Execution) -> None:
    """Let a run stop before its next step: what is in flight is finished and recorded, the run is interrupted.

    Called in the thread of the run's loop.
    """
    ex.halted = ex.suspended = True
    for future in ex.parked:
        if not future.done():
            future.set_exception(Suspend())
    with ex.turn:
        ex.turn.notify_all()


async def _still_idle(ex: Execution) -> bool:
    """Idle for some turns of the loop: one that waits for a task that has just ended is not woken in the same turn."""
    for _ in range(5):
        if not ex.parked or any(future.done() for future in ex.parked) or not _idle(ex):
            return False
        await asyncio.sleep(0)
    return True


def _idle(ex: Execution) -> bool:
    """Whether every task of the run waits for what is parked, or for another task that does."""
    parked = {task for _, task in ex.parked.values()}
    if ex.stragglers:
        return False
    tasks = [task for task in ex.tasks if not task.done()]
    if ex.root.task is not None and not ex.root.task.done():
        tasks.append(ex.root.task)
    return all(task in parked or _waits_for_tasks(task, ex) for task in tasks)


def _waits_for_tasks(task: Any, ex: Execution) -> bool:
    waiter = getattr(task, "_fut_waiter", None)
    if waiter is None or waiter.done():
        return False
    if isinstance(waiter, asyncio.Task):
        return waiter in ex.tasks
    if hasattr(waiter, "_children"):
        return True
    innermost = _innermost(task.get_coro())
    name = innermost.co_filename.replace("\\", "/") if innermost is not None else ""
    return (
        "/asyncio/" in name
        and not name.endswith(("streams.py", "events.py", "subprocess.py"))
        and (innermost is None or innermost.co_name != "sleep")
    )


def _innermost(coro: Any) -> Any:
    code = None
    while coro is not None:
        if isinstance(coro, Call):
            coro = coro._it
            continue
        if type(coro).__name__ == "coroutine_wrapper":  # what __await__ gives has no attribute for its coroutine
            coro = next(iter(gc.get_referents(coro)), None)
            continue
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None) or getattr(coro, "ag_frame", None)
        if frame is not None:
            code = frame.f_code
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None) or getattr(coro, "ag_await", None)
    return code


async def execute(ex: Execution, main: Callable[[], Awaitable[Any]]) -> Any:
    """Run the body until it ends or can only wait. Returns its value; raises what it raised, or Suspend."""
    loop = asyncio.get_running_loop()
    ex.loop = loop
    _watch_tasks(loop)
    token = here.set(ex.root)
    try:
        body = loop.create_task(_body(main))
    finally:
        here.reset(token)
    ex.tasks.pop(body, None)
    ex.root.task = body
    stopped = ex.stopping = False
    alarm = None
    if ex.deadline is not None:
        alarm = contextvars.Context().run(asyncio.ensure_future, _stop_at_deadline(ex, body))
    if ex.lease is not None:
        ex.lease.on_lost = lambda: _from_any_thread(loop, lambda: _stop_if_cancelled(ex, body))
    try:
        try:
            await asyncio.wait({body})
        except asyncio.CancelledError:
            stopped = ex.stopping = True
            body.cancel()
            await asyncio.wait({body}, timeout=30)
            raise
        if ex.suspended or ex.timed_out or ex.cancelled:
            body.cancelled() or body.exception()
            if ex.cancelled:
                raise RunCancelled(f"run {ex.run_id} was cancelled.")
            if ex.timed_out:
                raise ex.too_late()
            raise Suspend
        return body.result()
    finally:
        if ex.lease is not None:
            ex.lease.on_lost = None
        if alarm is not None:
            alarm.cancel()
        await _clean_up(ex, stopped)
        _unwatch_tasks(loop)


async def _stop_at_deadline(ex: Execution, body: asyncio.Task[Any]) -> None:
    """The clock is looked at now and then: it is the wall's, which may be set, or a test's."""
    assert ex.deadline is not None
    while not ex.overdue():  # noqa: ASYNC110
        await asyncio.sleep(min(max(ex.deadline - ex.clock(), 0.001), 0.25))
    body.cancel()


def _from_any_thread(loop: asyncio.AbstractEventLoop, fn: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(fn)
    except RuntimeError:  # the loop was closed meanwhile: the run is over
        log.debug("a lease was lost after its run had ended")


def _stop_if_cancelled(ex: Execution, body: asyncio.Task[Any]) -> None:
    document = rundocs.read(ex.journal, ex.run_id)
    if document is not None and (document["status"] == "cancelled" or document.get("cancelling")):
        ex.cancelled = True
        body.cancel()


async def _body(main: Callable[[], Awaitable[Any]]) -> Any:
    return await main()


async def _clean_up(ex: Execution, stopped: bool) -> None:
    """Nothing of a run goes on after it: branches are cancelled, paid calls in flight are waited for."""
    ex.stopping = True  # what waits to be sent is not sent any more
    left = [task for task in ex.tasks if not task.done()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=30)
        for task in left:
            task.cancelled() or (task.done() and task.exception())
    if ex.watcher is not None and not ex.watcher.done():
        ex.watcher.cancel()
        await asyncio.wait({ex.watcher})
    if ex.stragglers:
        ex.say("waiting for a paid model call in flight, so that its reply is recorded")
        await asyncio.wait(set(ex.stragglers), timeout=120)
    if not stopped and (late := [kept for kept in ex.abandoned if not kept.done()]):
        ex.say("waiting for functions in flight, so that their results are recorded")
        await asyncio.wait([asyncio.ensure_future(asyncio.wrap_future(kept)) for kept in late], timeout=5)
    ex.closed = True


async def collect(ex: Execution, call: Call, head: dict[str, Any]) -> None:
    """Find what a replayed step had done inside that is to be undone.

    Its function is called once more, with every step inside replayed: only that tells how to undo them.
    """
    current = Current(call, head["key"], head["attempts"], head["sample"])
    ex.collecting = True
    token = here.set(inside(call, current))
    try:
        await _invoke(call, current)
    finally:
        here.reset(token)
        ex.collecting = False
