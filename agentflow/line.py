"""A queue that works over event loops and threads: first come, first served, and leaving it is always possible."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable

# What a waiter is told: None, it may go; else the seconds after which to ask again (infinite: when something changed).
Admit = Callable[[], float | None]


class _Place:
    """One waiter. Its future belongs to its own loop."""

    __slots__ = ("future", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()

    def wake(self) -> bool:
        """False when its loop is gone."""
        try:
            self.loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return False
        return True

    def _wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Line:
    """Waiters in the order in which they came. Only the first is asked whether it may go.

    ``lock`` guards what the waiters wait for: ``Admit`` functions are called with it held, and whoever changes what
    they look at takes it and calls ``changed`` afterwards.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._places: deque[_Place] = deque()

    def at_once(self, admit: Admit) -> bool:
        """Whether the caller may go without waiting: nobody waits, and ``admit``, whose errors are raised, lets it."""
        with self.lock:
            return not self._places and admit() is None

    async def wait(self, admit: Admit) -> None:
        """Returns when it is the caller's turn and ``admit`` lets it go; what that raises is raised.

        Cancelled, the caller leaves its place and has been let through nowhere.
        """
        place = _Place()
        with self.lock:
            self._places.append(place)
        try:
            while True:
                with self.lock:
                    seconds: float | None = math.inf
                    if self._places[0] is place:
                        seconds = admit()
                    if seconds is None:
                        return
                    place.future = place.loop.create_future()
                timer = None if seconds == math.inf else place.loop.call_later(seconds, place._wake)
                try:
                    await place.future
                finally:
                    if timer is not None:
                        timer.cancel()
        finally:
            with self.lock:
                with contextlib.suppress(ValueError):
                    self._places.remove(place)
                self.changed()

    def changed(self) -> None:
        """Something that waiters wait for has changed: the first of them is asked again."""
        with self.lock:
            while self._places and not self._places[0].wake():
                self._places.popleft()
