"""The driver of ``engine.process`` in the calling thread.

It needs no event loop, and imports what has to do with one (``portal.py``, ``drive.py``) when a step is async, asks a
model or is given up: a program of plain code does not wait for asyncio to be loaded.
"""

from __future__ import annotations

import contextvars
import inspect
import time
from typing import Any

from agentflow.calls import Call, Current, Suspend, Unanswered, enclosing, here
from agentflow.clock import pass_time
from agentflow.engine import process
from agentflow.errors import StepTimeout
from agentflow.reuse import located
from agentflow.run import Execution
from agentflow.waits import PENDING, Wait, inside, pauses


def drive_blocking(call: Any) -> Any:
    """Run ``process`` in the calling thread."""
    call.started = True
    if any(current.over for current in enclosing(call)):
        raise Suspend  # the next attempt does what is left, and may be at it
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
            return _awaited(result) if inspect.isawaitable(result) else result
        context = contextvars.copy_context()
        clock = current.clock = None if timeout is None else _Clock(timeout)
        if is_async:
            from agentflow.portal import portal

            future = portal.start(context, call.fn, call.args, call.kwargs)
        else:
            from agentflow.workers import threads

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
            current.over = True
            if is_async:
                future.cancel()
            else:
                from agentflow.drive import when_back

                when_back(future, current)
            raise located(StepTimeout(f"step {call.name!r} took longer than {timeout:g}s"), call) from late
    finally:
        here.reset(token)


def _answered(call: Call, current: Current) -> Any:
    """``drive._answered`` in the calling thread."""
    from agentflow.portal import paid

    ex = call.ex
    while True:
        try:
            return paid(call, current)
        except Unanswered as unanswered:
            later = unanswered
        wait = later.wait()
        try:
            park_blocking(ex, wait)
        finally:
            later.forget(wait)
        if ops := ex.goes_on([current]):
            ex.journal.commit(ops, fence=ex.fence)


def _awaited(value: Any) -> Any:
    """What an awaitable gives that a plain function has returned."""
    from agentflow.portal import portal, result_of

    return portal.call(result_of, value)


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
                from agentflow.portal import portal

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


def collect_blocking(ex: Execution, call: Call, head: dict[str, Any]) -> None:
    """``drive.collect`` for plain code."""
    current = Current(call, head["key"], head["attempts"], head["sample"])
    ex.collecting = True
    token = here.set(inside(call, current))
    try:
        result = call.fn(*call.args, **call.kwargs)
        if inspect.isawaitable(result):
            _awaited(result)
    finally:
        here.reset(token)
        ex.collecting = False
