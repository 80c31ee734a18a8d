"""Where a run asks for another one, and how that ended there.

``cf/<caller>/<child>/<call>`` says that a child failed where its caller had asked for it. It stands for that call as a
failed record stands for a step: a caller that goes on after a wait or a crash gets the same failure again; one that has
failed itself and is run again tries the child again, unless its code had handled the failure. ``cs/<caller>/<child>``
says when the caller first started the child: that too can be how it handles a failure.
"""

from __future__ import annotations

from typing import Any

import orjson

from agentflow.calls import Here
from agentflow.handles import stored_error
from agentflow.index import in_key, short
from agentflow.journal import Add, Drop, Op, Put
from agentflow.run import Execution


class ChildCall:
    """One place in a run, the caller, where another run is asked for."""

    def __init__(self, place: Here) -> None:
        self.ex: Execution = place.ex
        self._place, _ = self.ex.stand()
        self._key = ""

    def failed_before(self, run_id: str) -> BaseException | None:
        """The failure that this very call had, where it is history; None: the child is to be run."""
        ex, place = self.ex, self._place
        if not self._key:
            call = ex.label(f"run {run_id}", place)
            self._key = f"cf/{ex.key}/{in_key(run_id)}/{short(f'{place.scope} {place.branch} {call}', 20)}"
        text = None if ex.prior is None else ex.journal.get(self._key)
        if text is None:
            return None
        facts = orjson.loads(text)
        if facts["around"] == self._around() and not ex.tried_again(facts):
            return stored_error(facts)
        if not ex.plan:
            ex.journal.commit([Drop(self._key)], fence=ex.fence)
        return None

    def started(self, run_id: str) -> Op:
        """What says that the child was started, and where."""
        facts = {"s0": self.ex.next(), "branch": self._branch()}
        return Add(f"cs/{self.ex.key}/{in_key(run_id)}", orjson.dumps(facts).decode())

    def failed(self, document: dict[str, Any]) -> Op:
        """What keeps for this call that the child has failed."""
        facts = {"s1": self.ex.next(), "branch": self._branch(), "around": self._around()}
        facts |= {name: document[name] for name in ("id", "error", "error_step") if name in document}
        return Put(self._key, orjson.dumps(facts).decode())

    def _branch(self) -> str:
        path = f"{self._place.scope}:{self._place.branch}"
        return path if self._place.outer is None else f"{self.ex.branch_path(self._place.outer)}>{path}"

    def _around(self) -> str:
        return "" if self._place.outer is None else self._place.outer.around
