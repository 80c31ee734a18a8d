"""The records people see: retry policies, steps, decisions, human tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from agentflow.calls import UNSET as UNSET
from agentflow.durations import Duration, seconds
from agentflow.errors import UsageError
from agentflow.rich import Rich
from agentflow.words import moment as moment
from agentflow.words import money as money

_BACKOFFS = ("exponential", "linear", "fixed")
_SPELLINGS = {
    "maxAttempts": "max_attempts",
    "initialDelay": "initial_delay",
    "maxDelay": "max_delay",
    "retryIf": "retry_if",
    "attempts": "max_attempts",
    "max_retries": "max_attempts",
    "retries": "max_attempts",
    "delay": "initial_delay",
    "backoff_factor": "factor",
}


@dataclass(frozen=True, slots=True)
class Retry:
    """When and how often a failed step is tried again.

    Args:
        max_attempts: attempts in all, the first one included; at least 1.
        backoff: how the delay grows: ``"exponential"``, ``"linear"`` or ``"fixed"``.
        initial_delay: seconds (or a duration such as ``"2s"``) before the second attempt.
        max_delay: no delay is longer than this, in seconds or as a duration.
        factor: what an exponential delay is multiplied with each time.
        jitter: draw each delay evenly between half and all of it, so that many do not come at once.
        retry_if: called with the exception; False gives up at once. None retries every ``Exception`` but the
            ``ModelError`` of a request that its provider refuses for good, such as one with status 400 or 401.
        resample: True asks the model again in a new attempt; False reuses what an attempt had paid for. An attempt that
            ran out of time has found nothing wrong with its answers: what it had paid for is used in either case.

    >>> [Retry(jitter=False, initial_delay=1, max_delay=5).delay(n) for n in (1, 2, 3, 4)]
    [1.0, 2.0, 4.0, 5.0]
    """

    max_attempts: int = 3
    backoff: Literal["exponential", "linear", "fixed"] = "exponential"
    initial_delay: Duration = 1.0
    max_delay: Duration = 30.0
    factor: float = 2
    jitter: bool = True
    retry_if: Callable[[BaseException], bool] | None = None
    resample: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise UsageError(f"Retry(max_attempts={self.max_attempts!r}): at least 1, the first attempt included.")
        if self.backoff not in _BACKOFFS:
            raise UsageError(f"Retry(backoff={self.backoff!r}): one of {', '.join(map(repr, _BACKOFFS))}.")
        for name in ("initial_delay", "max_delay"):
            value = getattr(self, name)
            number = seconds(value, what=f"Retry({name})")
            if number is None:
                raise UsageError(f"Retry({name}=None): give seconds or a duration.")
            if isinstance(value, int) and number >= 1000:
                raise UsageError(
                    f"Retry({name}={value!r}) looks like milliseconds; delays are seconds here: "
                    f'{name}={number / 1000:g}, or a duration such as "{number / 1000:g}s" or "20m".'
                )
            object.__setattr__(self, name, number)
        if isinstance(self.factor, bool) or not isinstance(self.factor, int | float) or not self.factor >= 1:
            raise UsageError(f"Retry(factor={self.factor!r}): 1 or more.")
        if self.retry_if is not None and not callable(self.retry_if):
            raise UsageError("Retry(retry_if=...): a function of the exception that returns True to try again.")

    def delay(self, failed: int, *, uniform: Callable[[float, float], float] = random.uniform) -> float:
        """Seconds to wait after ``failed`` failed attempts."""
        initial, longest = float(self.initial_delay), float(self.max_delay)  # type: ignore[arg-type]
        if self.backoff == "exponential":
            value = initial * float(self.factor) ** min(failed - 1, 512)
        elif self.backoff == "linear":
            value = initial * failed
        else:
            value = initial
        value = min(value, longest)
        return uniform(value / 2, value) if self.jitter else value


ONCE = Retry(max_attempts=1)


def retry_of(value: Retry | Mapping[str, Any] | int | None) -> Retry | None:
    """A ``Retry`` from what a caller wrote: a Retry, a dict with its keys, or None."""
    if value is None or isinstance(value, Retry):
        return value
    if not isinstance(value, Mapping):
        raise UsageError(f"retry={value!r}: write Retry(max_attempts=3) or a dict with its keys.")
    known = [f.name for f in fields(Retry)]
    for key in value:
        if key not in known:
            right = _SPELLINGS.get(str(key))
            hint = f'write "{right}"' if right else f"known are {', '.join(known)}"
            raise UsageError(f"retry={{{key!r}: ...}}: there is no such key; {hint}.")
    return Retry(**value)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person decided. Its truth is ``approved``.

    Attributes: ``approved``; ``by`` (a claim, None when nobody was named); ``at`` (aware UTC);
    ``comment``; ``data`` (what was filled in or changed, else None).
    """

    approved: bool
    by: str | None = None
    at: datetime | None = None
    comment: str | None = None
    data: Any = None

    def __bool__(self) -> bool:
        return self.approved


@dataclass(frozen=True, slots=True)
class StepRecord(Rich):
    """One step of a run, as the journal has it.

    Times are aware UTC datetimes, ``duration`` is in seconds, ``cost`` in dollars (None: unknown or
    no model call). ``replayed`` tells whether this execution reused the record.
    ``output`` is of a human task its ``Decision``, of a wait for an event the payload, None where the time was over.
    ``in_doubt`` counts the processes that found it started and without a result, and went on with it.
    """

    name: str
    id: str
    kind: str
    status: str
    started_at: datetime | None
    completed_at: datetime | None
    attempts: int
    replayed: bool = False
    idempotency_key: str | None = None
    output: Any = None
    error: str | None = None
    usage: Any = None
    cost: Decimal | None = None
    model: str | None = None
    parent: str | None = None
    warnings: tuple[str, ...] = ()
    in_doubt: int = 0

    @property
    def duration(self) -> float | None:
        """Seconds from start to end, waiting between attempts included; None while unfinished."""
        if self.started_at is None or self.completed_at is None:
            return None
        return (self.completed_at - self.started_at).total_seconds()


@dataclass(frozen=True, slots=True)
class Escalate:
    """``human_task(on_timeout=Escalate("director", timeout="1d"))``: if nobody answers in time, somebody else is asked.

    The task stays the same one, with a new assignee and a deadline counted from the end of the first.

    Args:
        assign_to: whom it is for then, a name or a list of names.
        timeout: how long they have, seconds or a duration. None: no end.
        on_timeout: what follows then: a value, an exception, another ``Escalate``; not given: ``HumanTaskExpired``.
    """

    assign_to: str | Sequence[str]
    timeout: Duration | None = None
    on_timeout: Any = UNSET

    def __post_init__(self) -> None:
        names = [self.assign_to] if isinstance(self.assign_to, str) else self.assign_to
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) and n for n in names):
            raise UsageError(f"Escalate({self.assign_to!r}): a name or a list of names.")
        object.__setattr__(self, "timeout", seconds(self.timeout, what="Escalate(timeout)"))
        if isinstance(self.on_timeout, Escalate) and self.timeout is None:
            raise UsageError("Escalate(on_timeout=Escalate(...)) needs a timeout= that can be over.")


@dataclass(frozen=True, slots=True)
class HumanTask(Rich):
    """A question to a person: open, or decided (approved, rejected, answered, expired, withdrawn).

    Attributes: ``digest`` (of exactly the data that is shown; an answer holds for that); ``trail`` (what happened to
    it, oldest first: dicts with ``at``, ``what`` and, where it applies, ``by``, ``comment``, ``assign_to`` and
    ``digest``); ``event`` (for ``configure(notify=)``: opened, reminded, escalated or reopened; else None).
    """

    id: str
    run_id: str
    workflow: str
    type: str
    assign_to: Any
    status: str
    data: Any
    title: str | None = None
    created_at: datetime | None = None
    deadline: datetime | None = None
    schema: dict[str, Any] | None = None
    decision: Decision | None = None
    digest: str = ""
    trail: tuple[dict[str, Any], ...] = ()
    event: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class PlanStep:
    """One line of a plan.

    Attributes:
        name: the step's.
        state: ``reused``, ``changed``, or ``unknown`` (not recorded yet); the end of a body that fails is ``fails``.
        reason: why it would run.
        diff: what differs from the record, line by line, secrets masked.
        cost: estimated dollars, None when they are not known. A model call is taken to read what its request
            is longer or shorter by, and to write what it wrote before, an unrecorded one what a budget assumes;
            other steps to cost what they had cost.
        tokens: of a model call's request, and whether they are exact, assumed or estimated (``tokens.Count``); None
            for other steps.
    """

    name: str
    state: str
    reason: str = ""
    diff: str = ""
    cost: Decimal | None = None
    tokens: Any = None
