"""Server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html: something changed, look again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from agentflow.journal import Journal

PAUSE = 0.1
LOOK = 2.0  # seconds after which to look though nobody has committed: a process may have died, a time may have come


async def changes(
    open_journal: Callable[[], Journal], run_id: str | None, stopped: Callable[[], bool]
) -> AsyncIterator[str]:
    """An event for each change of the journal, or of what a run has in flight, until the server stops.

    Args:
        open_journal: gives the journal, or raises when it is gone, which ends the stream.
        run_id: the run that is looked at. None: none.
        stopped: whether the server is about to end.

    Yields:
        ``change`` when somebody has committed or a step was started, ``look`` when nobody has for ``LOOK`` seconds;
        both with the journal's version as data.
    """
    yield "retry: 1000\n\n"
    before, told = None, time.monotonic()
    while not stopped():
        journal = open_journal()
        state = (journal.version(), journal.marked(run_id) if run_id is not None else 0)
        if state != before or time.monotonic() - told >= LOOK:
            yield f"event: {'look' if state == before else 'change'}\ndata: {state[0]}\n\n"
            before, told = state, time.monotonic()
        await asyncio.sleep(PAUSE)
