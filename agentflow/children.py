"""Which run was started in which: ``ch/<caller>/<child>`` and, for the way back, ``cp/<child>/<caller>``.

A caller that is run again asks its children for their results, so they go with it: they are cancelled, woken and
purged by way of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from agentflow.calls import here
from agentflow.index import in_key
from agentflow.journal import Add, Journal, Op
from agentflow.lease import Lease


def note_caller(journal: Journal, run_id: str, lease: Lease, started: Callable[[str], Op] | None) -> None:
    """Record in which run this one is being started, if it is in one. ``started`` gives what says so there."""
    place = here.get()
    if place is None or place.ex.scratch or place.ex.plan or place.ex.run_id == run_id:
        return
    caller = place.ex.run_id
    down, up = f"ch/{in_key(caller)}/{in_key(run_id)}", f"cp/{in_key(run_id)}/{in_key(caller)}"
    if journal.get(up) is None:
        more = [] if started is None else [started(run_id)]
        journal.commit([Add(down, run_id), Add(up, caller), *more], fence=lease.fence)


def callers(journal: Journal, run_id: str) -> Iterator[str]:
    """The runs that have started this one."""
    return (caller for _, caller in journal.scan(f"cp/{in_key(run_id)}/"))


def children(journal: Journal, run_id: str) -> Iterator[str]:
    """The runs that this one has started."""
    return (child for _, child in journal.scan(f"ch/{in_key(run_id)}/"))
