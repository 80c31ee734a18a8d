"""``Context``: what a workflow's body is handed besides its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from agentflow import codec
from agentflow.blocking import drive_blocking
from agentflow.calls import PLAIN, UNSET, Call, here
from agentflow.durations import Duration, exact, seconds
from agentflow.errors import UsageError
from agentflow.index import Row, Slot
from agentflow.journal import Add
from agentflow.rich import Rich
from agentflow.run import Execution
from agentflow.settings import log
from agentflow.values import in_ident, once
from agentflow.waits import PENDING, Wait
from agentflow.words import moment

if TYPE_CHECKING:
    import uuid
    from logging import Logger, LoggerAdapter

    from agentflow.records import StepRecord


def view(row: Row, *, replayed: bool = False, with_output: bool = True) -> StepRecord:
    """A stored row as the record people see; without its output, and the usage that stands in it, it is read faster."""
    head = row.head
    output, usage, cost = None, None, head.get("cost")
    if with_output and head["status"] == "completed" and not head.get("secret"):
        try:
            output = codec.look(row.output)
        except Exception as error:  # a type that is gone must not hide the rest of the record
            output = f"<{error}>"
    if head["kind"] in ("ai", "agent") and isinstance(output, dict):
        from agentflow.models import Usage

        usage, output = Usage(**output["usage"]), output.get("calls") or output["text"]
    elif head["kind"] in ("human", "event") and isinstance(output, dict):
        output = _came(output)
    failed = head.get("error")
    from agentflow.records import StepRecord

    return StepRecord(
        name=head["name"],
        id=head["occ"],
        kind=head["kind"],
        status="undone" if row.undone else head["status"],
        started_at=moment(head["t0"]),
        completed_at=moment(head["t1"]),
        attempts=head["attempts"],
        replayed=replayed,
        idempotency_key=head["key"],
        output=output,
        error=f"{failed['name']}: {failed['message']}" if failed else None,
        usage=usage,
        cost=Decimal(cost) if cost is not None and not head.get("unpriced") else None,
        model=head.get("model"),
        parent=head.get("parent"),
        in_doubt=head.get("in_doubt", 0),
    )


def _came(outcome: dict[str, Any]) -> Any:
    """What a wait was given: the decision of a person, the payload of an event, None where its time was over."""
    if outcome.get("expired"):
        return None
    if "approved" not in outcome:
        return outcome.get("payload")
    from agentflow.human import decision_of

    return decision_of(outcome, codec.look)


class Steps(Rich):
    """The steps of this execution so far, by name: ``ctx.steps["charge"].duration``."""

    def __init__(self, ex: Execution) -> None:
        self._ex = ex

    def _view(self, slot: Slot) -> StepRecord:
        return view(self._ex.records.row(slot, slot.n), replayed=slot.id not in self._ex.live)

    def __getitem__(self, name: str) -> StepRecord:
        slots = self._ex.seen.get(name)
        if not slots:
            known = ", ".join(map(repr, self._ex.seen)) or "none yet"
            raise KeyError(f"no step named {name!r} has ended in this run; there are: {known}")
        return self._view(slots[-1])

    def get(self, name: str) -> StepRecord | None:
        """The last step of that name, or None."""
        slots = self._ex.seen.get(name)
        return self._view(slots[-1]) if slots else None

    def all(self, name: str) -> list[StepRecord]:
        """All steps of that name, in the order in which they ended."""
        return [self._view(slot) for slot in self._ex.seen.get(name, ())]

    def __contains__(self, name: object) -> bool:
        return bool(self._ex.seen.get(name))  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ex.seen)

    def __len__(self) -> int:
        return len(self._ex.seen)


class Context:
    """Handed to the body of a workflow as its first argument.

    Attributes: ``run_id``; ``workflow`` (its name); ``input`` (the arguments, by name; a single argument
    by itself); ``steps`` (what has ended so far); ``log`` (a logger that names the run).
    """

    __agentflow_context__ = True

    def __init__(self, ex: Execution, given: Any, blocking: bool) -> None:
        self._ex = ex
        self._blocking = blocking
        self.run_id = ex.run_id
        self.workflow = ex.workflow
        self.input = given
        self.steps = Steps(ex)

    @property
    def log(self) -> LoggerAdapter[Logger]:
        """The logger ``agentflow``, with the run's id in each record as ``run_id``."""
        from logging import LoggerAdapter

        return LoggerAdapter(log.logger(), {"run_id": self.run_id})

    def now(self, name: str = "") -> datetime:
        """The time, as an aware UTC datetime; recorded, so that a restart reads the same."""
        return self._value("now", name, lambda: datetime.fromtimestamp(self._ex.clock(), UTC))  # type: ignore[no-any-return]

    def uuid4(self, name: str = "") -> uuid.UUID:
        """A random UUID; recorded, so that a restart reads the same."""
        import uuid

        return self._value("uuid4", name, uuid.uuid4)  # type: ignore[no-any-return]

    def random(self, name: str = "") -> float:
        """A random number in [0, 1); recorded, so that a restart reads the same."""
        from random import random

        return self._value("random", name, random)  # type: ignore[no-any-return]

    def sleep(self, duration: Duration) -> Any:
        """Wait; the end is recorded, so that neither a restart nor an edit elsewhere begins anew. ``await`` it.

        With more than 60 s to go, and when nothing else in the run can go on, the run is suspended: ``run()`` raises
        ``Waiting``, and it goes on when it is run again after that time. Shorter sleeps are waited for on the spot.
        Another duration is another sleep, which begins when it is asked for.
        """
        length = seconds(duration, what="ctx.sleep")
        if length is None:
            raise UsageError('ctx.sleep(None): give seconds or a duration such as "30d".')
        ex = self._ex
        call = Call(ex, f"sleep {exact(length)}", None, (), {}, PLAIN, "sleep")
        call.started = True
        call.given = call.digest = f"sleep{length!r}"
        ex.locate(call, in_ident(call.digest))
        call.wait = lambda: self._sleeping(call, length)
        call.started = False
        return drive_blocking(call) if self._blocking else call

    def wait_for_event(
        self,
        name: str | Sequence[str],
        *,
        match: Callable[[Any], Any] | Mapping[str, Any] | None = None,
        timeout: Duration | None = None,
        default: Any = UNSET,
    ) -> Any:
        """Wait for an event and return its payload. ``await`` it. An event that was sent before is there at once.

        When nothing else in the run can go on, the run is suspended: ``run()`` raises ``Waiting``, and it goes on when
        it is run again after the event was sent. What came is recorded, and a replay gets the same.

        Args:
            name: the event's name, or several, of which the first to come is taken: then the result is an ``Event``
                with ``name`` and ``payload``.
            match: takes only an event that fits: a function of the payload, or a dict of fields that have to be equal.
                Others are left for other waits. Waits of one name that differ in nothing but the code of this
                function are told apart like exact repeats of a step, by their order.
            timeout: seconds or a duration from the first asking on, recorded: a restart does not extend it. An event
                counts that was sent before its end, however late the run goes on. None: no end.
            default: returned when the time is over. Not given: ``EventTimeout`` is raised, a ``TimeoutError``.
        """
        from agentflow.events import wait_call

        call = wait_call(self._ex, name, match, timeout, default)
        return drive_blocking(call) if self._blocking else call

    def _sleeping(self, call: Call, length: float) -> Wait:
        ex = self._ex
        key = f"z/{ex.key}/{call.occ}" + (f".{version}" if (version := ex.own_slot(call).n + 1) else "")
        stored = ex.journal.get(key)
        due = float(stored) if stored is not None else ex.clock() + length
        if stored is None:
            ex.journal.commit([Add(key, repr(due))], fence=ex.fence)
        return Wait(
            lambda: None if ex.clock() >= due else PENDING, {"kind": "sleep", "id": call.occ, "until": due}, due
        )

    def _value(self, kind: str, name: str, make: Callable[[], Any]) -> Any:
        if not isinstance(name, str):
            raise UsageError(f"ctx.{kind}({name!r}): the name is text.")
        ex = self._ex
        at = here.get()
        if at is None or at.ex is not ex:
            raise UsageError(f"ctx.{kind}() was called outside the run {ex.run_id} that ctx belongs to.")
        return once(ex, kind, name, kind, make)
