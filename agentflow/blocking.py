"""The driver of ``engine.process`` in the calling thread, and the ways from plain code into a loop."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

from agentflow.calls import Call, Current, Suspend, Unanswered, enclosing, here
from agentflow.clock import pass_time
from agentflow.drive import PENDING, Wait, inside, keep, pauses, when_back
from agentflow.engine import process
from agentflow.errors import StepTimeout
from agentflow.reuse import located
from agentflow.run import Execution
from agentflow.settings import log
from agentflow.workers import threads

T = TypeVar("T")


def drive_blocking(call: Any) -> Any:
    """Run ``process`` in the calling thread."""
    call.started = True
    ex = call.ex
    steps = process(call)
    send: Any = steps.send
    value: Any = None
    while True:
        try:
            effect = send(value)
        except StopIteration as stop:
            return stop.value
        try:
            kind = effect[0]
            value = None
            if kind == "attempt":
                value = _attempt_blocking(call, effect[1], effect[2])
            elif kind == "commit":
                value = ex.journal.commit(effect[1], fence=ex.fence, paid=effect[2])
            elif kind == "sleep":
                time.sleep(effect[1])
            elif kind == "settle":
                time.sleep(0)
            elif kind == "let_siblings":
                with ex.patience(call):
                    for pause in pauses(call):
                        time.sleep(pause)
            elif kind == "join":
                effect[1].result()
            else:
                value = park_blocking(ex, effect[1] if kind == "park" else ex.ask(effect[1]))
            send = steps.send
        except BaseException as error:
            send, value = steps.throw, error


def _attempt_blocking(call: Call, current: Current, timeout: float | None) -> Any:
    ex = call.ex
    token = here.set(inside(call, current))
    try:
        if call.wait is not None:
            return park_blocking(ex, call.wait())
        if call.kind == "ai":
            return _answered(call, current)
        is_async = call.capture is not None and call.capture.is_async
        if not is_async and timeout is None:
            result = call.fn(*call.args, **call.kwargs)
            if not inspect.isawaitable(result):
                return result
            return portal.call(_await, result)
        context = contextvars.copy_context()
        clock = current.clock = None if timeout is None else _Clock(timeout)
        if is_async:
            future = portal.start(context, call.fn, call.args, call.kwargs)
        else:
            future = threads.submit(context, call.fn, call.args, call.kwargs)
        while True:
            try:
                return future.result(None if clock is None else clock.left())
            except TimeoutError as error:
                if future.done():
                    raise
                if clock is None or not clock.expired():
                    continue
                late = error
            if is_async:
                future.cancel()
            else:
                when_back(future, current)
            raise located(StepTimeout(f"step {call.name!r} took longer than {timeout:g}s"), call) from late
    finally:
        here.reset(token)


def _answered(call: Call, current: Current) -> Any:
    """``drive._answered`` in the calling thread."""
    ex = call.ex
    while True:
        try:
            return _paid(call, current)
        except Unanswered as unanswered:
            later = unanswered
        wait = later.wait()
        try:
            park_blocking(ex, wait)
        finally:
            later.forget(wait)
        if ops := ex.goes_on([current]):
            ex.journal.commit(ops, fence=ex.fence)


def _paid(call: Call, current: Current) -> Any:
    """``drive._paid`` in the calling thread."""
    ex = call.ex
    future = portal.start(contextvars.copy_context(), call.fn, call.args, call.kwargs)
    ex.paying[future] = call
    future.add_done_callback(lambda done: ex.paying.pop(done, None))
    try:
        return future.result()
    except CancelledError as error:  # an Exception here, and no failure of the step
        raise asyncio.CancelledError from error
    except BaseException as error:
        if current.stop is not None:  # what goes on at the provider is not waited for here
            current.stop()
        if not isinstance(error, Exception):  # Ctrl-C
            if not future.done():
                stop_paying({future: call})
            current.left = True
            if future.done():
                keep(future, current)
        raise


def stop_paying(calls: dict[Future[Any], Call]) -> None:
    """Model calls whose callers go: those not sent yet are not sent, the others are paid for and waited for."""
    for future, call in list(calls.items()):
        if call.withdraw():
            future.cancel()
    if sent := [future for future in list(calls) if not future.done()]:
        log.info("waiting for a paid model call in flight, so that its reply is recorded")
        wait(sent, timeout=120)


async def _await(value: Any) -> Any:
    return await value


class _Clock:
    """What one attempt of plain code has left; as ``asyncio.Timeout``, it can be stopped and set going again."""

    def __init__(self, timeout: float) -> None:
        self._when: float | None = time.monotonic() + timeout

    def when(self) -> float | None:
        return self._when

    def reschedule(self, when: float | None) -> None:
        self._when = when

    def expired(self) -> bool:
        return self._when is not None and time.monotonic() >= self._when

    def left(self) -> float:
        """Seconds after which to look again."""
        return 0.05 if (when := self._when) is None else max(0.0, when - time.monotonic())


def _stop_clocks() -> list[tuple[Any, float]]:
    """Waiting does not count against the timeouts of the enclosing steps."""
    place, stopped = here.get(), []
    current = place.outer if place is not None else None
    while current is not None:
        if current.clock is not None and (when := current.clock.when()) is not None:
            stopped.append((current.clock, when - time.monotonic()))
            current.clock.reschedule(None)
        current = current.parent
    return stopped


def park_blocking(ex: Execution, wait: Wait | None) -> Any:
    """Wait in the calling thread; leaves by ``Suspend`` when no branch can go on and no time is near."""
    pause, me = 0.001, object()
    asked = None
    clocks = _stop_clocks()
    place = here.get()
    around = enclosing(place.outer.call) if place is not None and place.outer is not None else []
    with ex.turn:
        ex.held_up[me] = wait
        ex.going -= 1
        ex.turn.notify_all()
    try:
        while True:
            ex.hold()
            if wait is not None:
                result = wait.check()
                if result is not PENDING:
                    if ops := ex.goes_on(around):
                        ex.journal.commit(ops, fence=ex.fence)
                    return result
            if ex.terminal is not None and asked is None:
                ex.terminal.add(wait)
                asked = wait
            with ex.turn:
                place = here.get()
                if ex.left_branches and place is not None and ex.is_left(place):
                    raise Suspend
                if ex.overdue():
                    raise Suspend
                now = ex.clock()
                waits = [each for each in ex.held_up.values() if each is not None]
                dues = [ex.deadline, *(each.due for each in waits)]
                near = any(due is not None and due - now <= 60 for due in dues)
                looking = ex.batches is not None and ex.batches.looking
                look = ex.batches is not None and ex.going <= 0 and not ex.suspended and ex.batches.due()
                stuck = ex.going <= 0 and not ex.suspended and not ex.stay and not near and not looking
                # An answer may have come that its branch, in another thread, has not seen yet.
                if (stuck or look) and any(_ready(each) for each in waits):
                    look = False
                elif look:
                    ex.batches.looking = True  # this thread does, for all of them
                elif stuck:
                    ex.suspended = True
                    ex.waits = waits
                    ex.turn.notify_all()
                if ex.suspended:
                    raise Suspend
                if ex.going <= 0 and pass_time(waits, now):
                    ex.turn.notify_all()
                    continue
                left = wait.due - now if wait is not None and wait.due is not None else pause
                if not look:
                    ex.turn.wait(max(0.0, min(pause, left)))
            if look:
                portal.start(contextvars.copy_context(), ex.batches.look, (), {}).result()
                pause = 0.0005
            pause = min(pause * 2, 0.25)
    finally:
        if asked is not None:
            ex.terminal.drop(asked)
        with ex.turn:
            del ex.held_up[me]
            ex.going += 1
        for clock, left in clocks:
            clock.reschedule(time.monotonic() + left)


def _ready(wait: Wait) -> bool:
    try:
        return wait.check() is not PENDING
    except Exception:  # its own branch will raise it
        return True


def count_going(ex: Execution | None, change: int) -> None:
    """More, or fewer, branches of plain code can go on; the run suspends when none can."""
    if ex is not None and change:
        with ex.turn:
            ex.going += change
            ex.turn.notify_all()


def leave(ex: Execution, branches: list[tuple[str, str]]) -> None:
    """A branch of plain code has failed: its siblings (scope and branch) start no further step and wait for nobody."""
    with ex.turn:
        ex.left_branches += branches
        ex.turn.notify_all()


def all_left(ex: Execution, branches: list[tuple[str, str]]) -> None:
    """They have ended: a new attempt of the step around them may have branches of the same names."""
    with ex.turn:
        for each in branches:
            ex.left_branches.remove(each)


class _Portal:
    """One loop in a daemon thread, for async functions that plain code calls."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin without a loop, as in a child process, where the thread of its parent's is not."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or not self._loop.is_running():
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="agentflow-loop", daemon=True).start()
                while not self._loop.is_running():
                    time.sleep(0.0005)
            return self._loop

    def start(
        self, context: contextvars.Context, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[Any]:
        loop = self.loop()
        future: Future[Any] = Future()

        def begin() -> None:
            try:
                task = context.run(loop.create_task, _await_call(fn, args, kwargs))
            except BaseException as error:
                future.set_exception(error)
                return
            task.add_done_callback(lambda done: _copy(done, future))
            future.add_done_callback(lambda f: f.cancelled() and loop.call_soon_threadsafe(task.cancel))

        loop.call_soon_threadsafe(begin)
        return future

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Run an async function there and wait; Ctrl-C cancels it."""
        future = self.start(contextvars.copy_context(), fn, args, {})
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


async def _await_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return await fn(*args, **kwargs)


def _copy(task: asyncio.Task[Any], future: Future[Any]) -> None:
    if future.cancelled():
        task.cancelled() or task.exception()
    elif task.cancelled():
        future.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


portal = _Portal()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=portal.begin)


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from plain code, in a thread of its own where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        running = False
    else:
        running = True
    if not running:
        return asyncio.run(coroutine)
    context = contextvars.copy_context()
    box: list[Any] = []
    ready = threading.Event()

    async def main() -> T:
        box.append((asyncio.get_running_loop(), asyncio.current_task()))
        ready.set()
        return await coroutine

    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append((True, context.run(asyncio.run, main())))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=target, name="agentflow-run", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        ready.wait(5)
        if box:
            box[0][0].call_soon_threadsafe(box[0][1].cancel)
        thread.join(30)
        raise
    ok, value = outcome[0]
    if not ok:
        raise value
    result: T = value
    return result


def collect_blocking(ex: Execution, call: Call, head: dict[str, Any]) -> None:
    """``drive.collect`` for plain code."""
    current = Current(call, head["key"], head["attempts"], head["sample"])
    ex.collecting = True
    token = here.set(inside(call, current))
    try:
        result = call.fn(*call.args, **call.kwargs)
        if inspect.isawaitable(result):
            portal.call(_await, result)
    finally:
        here.reset(token)
        ex.collecting = False
