"""The timeouts of the steps that enclose a wait: they stand still meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

from agentflow.calls import here


def stop_clocks() -> list[tuple[Any, float]]:
    """Waiting does not count against the timeouts of the enclosing steps: what is left of each."""
    place, stopped = here.get(), []
    now = asyncio.get_running_loop().time()
    current = place.outer if place is not None else None
    while current is not None:
        if current.clock is not None and (when := current.clock.when()) is not None:
            stopped.append((current.clock, when - now))
            current.clock.reschedule(None)
        current = current.parent
    return stopped


def start_clocks(stopped: list[tuple[Any, float]]) -> None:
    """Goes on with what ``stop_clocks`` has stopped."""
    now = asyncio.get_running_loop().time()
    for clock, left in stopped:
        clock.reschedule(now + left)
