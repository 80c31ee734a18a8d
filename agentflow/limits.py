"""Limits of requests at once, requests and tokens a minute, for each model: shared by all steps of a process.

A call that has to wait stands in its model's line (``line.py``), first come, first served, on whatever loop or thread
it runs. "A minute" is any sixty seconds, not a minute of the clock. An answer with status 429 and Retry-After holds up
all calls of a model that has limits.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agentflow.errors import UsageError
from agentflow.line import Line

MINUTE = 60.0
clock: Callable[[], float] = time.monotonic  # tests put their own in its place


@dataclass(frozen=True, slots=True)
class Limit:
    """What a model allows; None: no limit.

    Attributes:
        concurrency: requests at the same time.
        rpm: requests within any sixty seconds.
        tpm: tokens within any sixty seconds, input and output: what a request may use at most until its answer says
            what it did use. One that needs more than all of it waits until nothing else counts, and is sent then.
    """

    concurrency: int | None = None
    rpm: int | None = None
    tpm: int | None = None


class Meter:
    """What is under way and what was used in the last minute, for one model."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.line = Line()
        self._under_way = 0
        self._used: deque[Use] = deque()
        self._paused = 0.0

    def admit(self, use: Use) -> float | None:
        """Counts a request in if it may be sent now; else the seconds after which to ask again. Lock held."""
        now = clock()
        while self._used and self._used[0].at <= now - MINUTE:
            self._used.popleft()
        if now < self._paused:
            return self._paused - now
        limit = self.limit
        if limit.concurrency is not None and self._under_way >= limit.concurrency:
            return math.inf
        if limit.rpm is not None and len(self._used) >= limit.rpm:
            return self._used[len(self._used) - limit.rpm].at + MINUTE - now
        if limit.tpm is not None and self._used:
            over = sum(earlier.tokens for earlier in self._used) + use.tokens - limit.tpm
            for earlier in self._used:
                if over <= 0:
                    break
                over -= earlier.tokens
                free = earlier.at + MINUTE - now
                if over <= 0 or earlier is self._used[-1]:
                    return free
        use.at = now
        self._used.append(use)
        self._under_way += 1
        return None

    def done(self, use: Use, tokens: int | None, *, sent: bool = True) -> None:
        """A request is over.

        Args:
            use: what ``admit`` had counted.
            tokens: what it did use; None if that is not known.
            sent: False if it was not sent after all, so that it counts for nothing.
        """
        with self.line.lock:
            self._under_way -= 1
            if not sent and use in self._used:
                self._used.remove(use)
            elif tokens is not None:
                use.tokens = tokens
        self.line.changed()

    def pause(self, seconds: float) -> None:
        """Nothing is sent for so long."""
        with self.line.lock:
            self._paused = max(self._paused, clock() + seconds)
        self.line.changed()


class Use:
    """One request in the count of a minute."""

    __slots__ = ("at", "tokens")

    def __init__(self, tokens: int) -> None:
        self.at = 0.0
        self.tokens = tokens


_limits: dict[str, Limit] = {}
_meters: dict[str, Meter] = {}
_lock = threading.Lock()


def parsed(given: Any) -> dict[str, Limit]:
    """The limits of ``configure``, by model.

    Raises:
        UsageError: says what is wrong, and where.
    """
    form = 'configure(limits={"openai:gpt-4o-mini": {"concurrency": 8, "rpm": 500, "tpm": 200_000}, "*": {...}})'
    if not isinstance(given, Mapping):
        raise UsageError(f"limits={given!r} is no dict of models. Write {form}.")
    found = {}
    for name, limit in given.items():
        if not isinstance(name, str) or not (name == "*" or (name.partition(":")[0] and name.partition(":")[2])):
            raise UsageError(f'limits: {name!r} is no model. Write "openai:gpt-4o-mini", "openai:*", or "*".')
        if isinstance(limit, Limit):
            limit = {one: getattr(limit, one) for one in Limit.__slots__}
        if not isinstance(limit, Mapping):
            raise UsageError(f"limits[{name!r}]={limit!r} is neither a dict nor a Limit. Write {form}.")
        for word, value in limit.items():
            if word not in Limit.__slots__:
                raise UsageError(f"limits[{name!r}]: unknown {word!r}; known are {', '.join(Limit.__slots__)}.")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"limits[{name!r}]: {word}={value!r} is not a whole number of 1 or more.")
        found[name] = Limit(**limit)
    return found


def set_limits(limits: dict[str, Limit]) -> None:
    """Puts limits in the place of those before. What is under way goes on to count where a model's stay the same."""
    with _lock:
        _limits.clear()
        _limits.update(limits)
        for name in list(_meters):
            if _meters[name].limit != limit_of(name):
                del _meters[name]


def limit_of(model: str) -> Limit | None:
    """The limit of a model: its own, else that of its provider (``openai:*``), else that of all (``*``)."""
    for name in (model, f"{model.partition(':')[0]}:*", "*"):
        if name in _limits:
            return _limits[name]
    return None


def meter(model: str) -> Meter | None:
    """What counts a model's requests; None where it has no limit. Each model that ``openai:*`` names has its own."""
    if not _limits:
        return None
    with _lock:
        limit = limit_of(model)
        if limit is None:
            return None
        if model not in _meters:
            _meters[model] = Meter(limit)
        return _meters[model]
