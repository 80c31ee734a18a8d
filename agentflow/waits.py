"""What both drivers know: what a branch waits for, where the code inside a step stands, what names a branch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentflow.calls import Call, Current, Here, current_task

PENDING: Any = object()
PATIENCE = 5.0  # seconds that a step waits for siblings that may leave it their record


class Wait:
    """Something a branch waits for. ``check`` gives the result, or ``PENDING``; it may raise.

    ``due`` is the epoch second at which checking makes sense by itself; None: only from outside. ``more`` is what
    else is waited for, any of which will do.
    """

    __slots__ = ("check", "due", "info", "more")

    def __init__(
        self,
        check: Callable[[], Any],
        info: dict[str, Any],
        due: float | None = None,
        more: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.check = check
        self.info = info
        self.due = due
        self.more = more


def pauses(call: Call) -> Iterator[float]:
    """Seconds to sleep, again and again, while a sibling has not asked yet for what this call could use.

    It may never ask: the step was moved from there to here. That shows when it ends; one that goes on for long is not
    waited for, since it might wait for this one.
    """
    start = time.monotonic()
    pause, end = 0.0, start + (0.2 if call.ex.plan else PATIENCE)  # a plan's branches stay where they stop
    while call.ex.kept_by_sibling(call) and (now := time.monotonic()) < end:
        if now - start > 0.5:
            call.ex.say_once(f"{call.name}: waits a moment for a branch that may leave it its record")
        yield pause
        pause = min(max(pause * 2, 0.0005), 0.02)


def inside(call: Call, current: Current) -> Here:
    """The place of code inside the step's function."""
    task = current_task()
    return Here(call.ex, call.occ, "0", "", f"{call.here.epoch}.{current.sample}", current, task)


def coroutine_label(coro: Any) -> str:
    """What names a branch: its function and what that was given."""
    frame = getattr(coro, "cr_frame", None)
    name = getattr(coro, "__qualname__", type(coro).__name__)
    if frame is None:
        return str(name)
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    return branch_label(str(name), [frame.f_locals.get(arg) for arg in code.co_varnames[:count]])


def branch_label(name: str, given: Any) -> str:
    from agentflow.capture import data_digest

    try:
        return f"{name}({data_digest(given)[:12]})".replace("/", "|")
    except Exception:  # an argument of any kind may be there; the name alone then tells the branch
        return name.replace("/", "|")
