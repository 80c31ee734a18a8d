"""A clock that a test moves: waits of thirty days take no time."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from agentflow.durations import Duration, seconds
from agentflow.errors import UsageError
from agentflow.settings import settings

_START = datetime(2026, 1, 1, 9, tzinfo=UTC)


class FakeClock:
    """The time that runs go by while this is entered: it stands still until it is moved.

    ``ctx.now()``, ``ctx.sleep``, deadlines of tasks, schedules and ``max_age`` read it. Where nothing in a run can go
    on but a wait, the clock moves to its end by itself if that is 60 s away or less (or the run was told to stay, with
    ``.options(wait=True)``); otherwise the run is suspended, and ``advance`` is what lets it go on.
    Timeouts of attempts and pauses between attempts are real time: they guard against what really happens.

    Args:
        start: an aware datetime to begin with. None: 2026-01-01 09:00 UTC.

    >>> with FakeClock() as clock:
    ...     before = clock.now
    ...     clock.advance("30d")
    >>> (clock.now - before).days
    30
    """

    def __init__(self, start: datetime | None = None) -> None:
        start = start or _START
        if start.tzinfo is None:
            raise UsageError(f"FakeClock({start!r}): an aware datetime, such as datetime(2026, 1, 1, tzinfo=UTC).")
        self._time = start.timestamp()
        self._before: object = None
        self._lock = threading.Lock()

    @property
    def now(self) -> datetime:
        """What the clock shows, UTC."""
        return datetime.fromtimestamp(self._time, UTC)

    def advance(self, by: Duration) -> None:
        """Move the clock on by seconds or a duration such as ``"30d"``."""
        length = seconds(by, what="advance")
        if length is None:
            raise UsageError('advance(None): give seconds or a duration such as "30d".')
        with self._lock:
            self._time += length

    def move_to(self, when: float) -> None:
        """Move the clock to an epoch second; it never goes back."""
        with self._lock:
            self._time = max(self._time, when)

    def __call__(self) -> float:
        return self._time

    def __enter__(self) -> FakeClock:
        self._before, settings.clock = settings.clock, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        settings.clock = self._before  # type: ignore[assignment]


def pass_time(waits: Iterable[Any], now: float) -> bool:
    """Moves a ``FakeClock`` to the end of the wait that ends first, if that is a sleep; whether it did.

    People may still answer before a deadline, so no deadline is reached by itself.
    """
    clock = settings.clock
    timed = [wait for wait in waits if wait is not None and wait.due is not None]
    if not timed or not isinstance(clock, FakeClock):
        return False
    first = min(timed, key=lambda wait: float(wait.due))
    if first.info.get("kind") != "sleep" or first.due <= now:
        return False
    clock.move_to(first.due)
    return True
