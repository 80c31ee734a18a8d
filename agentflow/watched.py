"""An execution that can be watched: what its steps do is kept in memory, for a display to look at now and then.

Its class is chosen when a run is taken up. Where nobody watches, nothing of this is loaded, and no step asks for it.
"""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

from agentflow.calls import Call, Current, enclosing
from agentflow.cardparts import Bar
from agentflow.index import Row, Slot
from agentflow.run import Execution
from agentflow.settings import log
from agentflow.voice import SHOWN

WAITS = ("human", "event", "sleep")  # kinds of steps that are no work
_FIRST, _BARS = 20, 500  # of the steps that have ended the first and the newest are kept for the display
_NOTES = 50


class Watched(Execution):
    """What a run does, step by step.

    Attributes: ``bars`` (its steps in the order in which they started, by id; of very many the first and the newest),
    ``dropped`` (how many of them are not kept), ``notes`` (what was said: level and text), ``open`` (what it waits for
    now, by id), ``changes`` (grows whenever something happens).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.bars: dict[str, Bar] = {}
        self.notes: list[tuple[str, str]] = []
        self.open: dict[str, dict[str, Any]] = {}
        self.dropped = 0
        self.changes = 0
        self.began = time.time()

    def started(self, call: Call, slot: Slot, current: Current) -> None:
        super().started(call, slot, current)
        bar = self._bar(call, call.occ)
        bar.status = "waiting" if call.wait is not None else "running"
        bar.attempts = current.attempt
        bar.start = bar.start or current.facts[3]
        bar.how, bar.error, bar.end = "", None, None
        self.changes += 1

    def tries_again(self, call: Call, attempt: int, attempts: int, why: str, delay: float) -> None:
        bar = self._bar(call, call.occ)
        bar.cut.append((self.clock(), f"{why}; next in {delay:.2g}s"))
        bar.status = "retrying"
        self.changes += 1
        self._log("info", f"{call.name}: attempt {attempt} of {attempts} failed ({why}); next in {delay:.2g}s")

    def finished(self, call: Call, slot: Slot, head: dict[str, Any], value: Any) -> Any:
        self._ended(call, head)
        return super().finished(call, slot, head, value)

    def failure(self, call: Call, head: dict[str, Any], *, replayed: bool) -> BaseException:
        bar = self._ended(call, head)
        bar.error = f"{head['error']['name']}: {head['error']['message']}"
        return super().failure(call, head, replayed=replayed)

    def deliver(self, call: Call, row: Row) -> Any:
        bar = self._ended(call, row.head)
        bar.start, bar.how = row.head["t0"], "replayed"
        return super().deliver(call, row)

    def tell(self, level: str, text: str) -> None:
        if len(self.notes) < _NOTES:
            self.notes.append((level, text))
        self.changes += 1
        self._log(level, text)

    def add(self, wait: Any) -> None:
        """A branch waits for this from now on (the place of a terminal that asks people)."""
        if wait is not None:
            self.open |= {str(info["id"]): info for info in (wait.info, *wait.more)}
            self.changes += 1

    def drop(self, wait: Any) -> None:
        """It waits for it no more."""
        if wait is not None:
            for info in (wait.info, *wait.more):
                self.open.pop(str(info["id"]), None)
            self.changes += 1

    def _log(self, level: str, text: str) -> None:
        """For handlers of the program's own; on stderr it would stand beside the card that says it."""
        say = log.warning if level == "warning" else log.info
        say("%s · %s", self.run_id, text, extra={SHOWN: self.shown})

    @property
    def state(self) -> str:
        """waiting, where nothing is done but that; else running."""
        works = any(bar.status == "running" for bar in list(self.bars.values()))
        return "waiting" if self.open and not works else "running"

    @property
    def shown(self) -> bool:
        """Whether people see what is kept here."""
        return True

    def _ended(self, call: Call, head: dict[str, Any]) -> Bar:
        bar = self._bar(call, head["occ"])
        bar.status, bar.end, bar.attempts = head["status"], head["t1"], head["attempts"]
        bar.start = bar.start or head["t0"]
        bar.model = head.get("model")
        bar.cost = None if head.get("cost") is None or head.get("unpriced") else Decimal(head["cost"])
        self.changes += 1
        return bar

    def _bar(self, call: Call, ident: str) -> Bar:
        bar = self.bars.get(ident)
        if bar is None:
            bar = self.bars[ident] = Bar(call.name, "", depth=len(enclosing(call)), waits=call.kind in WAITS)
            if len(self.bars) > 2 * _BARS:
                ended = [key for key, each in self.bars.items() if each.end is not None][_FIRST:]
                for key in ended[: max(0, len(ended) - _BARS)]:
                    del self.bars[key]
                    self.dropped += 1
        return bar
