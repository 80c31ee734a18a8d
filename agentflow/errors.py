"""Every error agentflow raises on purpose.

    AgentflowError
    ├── UsageError              the call itself is wrong (also a TypeError and a ValueError)
    │   ├── NotRecordable       a value has no recorded form; names the path to it
    │   ├── UnknownModel        no model, or one that no provider here knows
    │   └── StepNotAwaited      a step was called and never awaited
    ├── JournalError            the journal cannot be used as it is
    │   ├── JournalVersionError written by an unknown version of agentflow
    │   ├── JournalForeign      the directory belongs to something else
    │   ├── JournalIncomplete   files are missing or were copied apart
    │   ├── JournalReadOnly     nothing can be written there
    │   ├── JournalFull         the disk is full
    │   ├── JournalBusy         another process kept the write lock for too long
    │   └── LeaseLost           another process took this run over; nothing more is committed
    ├── RunNotFound, TaskNotFound
    ├── RunBusy                 another process owns the run
    ├── Waiting                 the run can only go on when a person, an event or a time comes
    ├── RunCancelled
    ├── BudgetExceeded          the next call could cost more than the budget still allows
    ├── WorkflowTimeout         the run's own deadline has passed (also a TimeoutError)
    ├── EventTimeout            no event came before the deadline of its wait (also a TimeoutError)
    ├── StepError
    │   ├── StepFailed          mixed into every exception that a step failed with
    │   ├── StepTimeout         one attempt took too long (also a TimeoutError)
    │   ├── StepInDoubt         started, no result, its process is gone
    │   ├── StepChanged         a recorded step was given something else, or was edited
    │   ├── CapturedChanged     a captured variable was rebound before the step started
    │   ├── NondeterministicStep  records cannot be told apart by anything reproducible
    │   └── IdempotencyConflict   one key, two different operations
    ├── TaskError
    │   ├── TaskClosed          the task is decided, withdrawn or expired already
    │   ├── TaskRejected        a person said no where data was asked for
    │   └── HumanTaskExpired    nobody answered before the deadline
    └── ModelError              a model call failed; carries ``.reply`` and ``.status``
        ├── Truncated           the reply was cut off by a token limit
        ├── Refused             the model refused
        ├── ContentFiltered     the provider's filter stopped the reply
        ├── InvalidReply        the reply does not validate against ``output_type``
        └── TooManyTurns        the model still asks for tools after ``max_turns`` turns
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from agentflow.rich import Rich


class AgentflowError(Exception):
    """Base of all errors raised by agentflow."""


class UsageError(AgentflowError, TypeError, ValueError):
    """A call that cannot mean anything: what is wrong, where, and the right form."""


class NotRecordable(UsageError):
    """A value has no recorded form. ``path`` says where it sits (``result.items[3].client``)."""

    def __init__(self, message: str, path: str = "value") -> None:
        super().__init__(message)
        self.path = path


class UnknownModel(UsageError):
    """No model was named, or nothing here knows the one that was."""


class StepNotAwaited(UsageError):
    """``step(...)`` was called and its result thrown away: write ``await step(...)``."""


class JournalError(AgentflowError):
    """The journal cannot be used as it is; nothing was changed in it."""


class JournalVersionError(JournalError):
    """The journal was written with a layout or digest version this agentflow does not know."""


class JournalForeign(JournalError):
    """The directory holds something else than an agentflow journal."""


class JournalIncomplete(JournalError):
    """Parts of the journal are missing: running on could pay again for what they held."""


class JournalReadOnly(JournalError):
    """The journal's directory cannot be written."""


class JournalFull(JournalError):
    """The disk is full; what was recorded before is intact."""


class JournalBusy(JournalError):
    """The write lock could not be had within the time limit."""


class LeaseLost(JournalError):
    """Another process took over what this one owned; its commits are refused."""


class RunNotFound(AgentflowError, LookupError):
    """No run, or more than one, answers to this id."""


class TaskNotFound(AgentflowError, LookupError):
    """No human task, or more than one, answers to this id."""


class RunBusy(AgentflowError):
    """Another process owns the run. ``owner`` describes it (pid, host, since)."""

    def __init__(self, message: str, run_id: str = "", owner: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.owner = owner or {}


class Waiting(Rich, AgentflowError):
    """The run is suspended: it goes on when what it waits for has come.

    ``waiting_on`` lists the open waits, each a dict with ``kind`` (task, event, sleep or batch), ``id``,
    for tasks ``assign_to``, ``type`` and ``title``, and for batches ``model``, ``requests`` and ``status``.
    """

    def __init__(self, message: str, run_id: str, waiting_on: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.waiting_on = waiting_on

    def _render_traceback_(self) -> list[str]:
        """What IPython prints if nobody catches it: that a run waits is no mistake somewhere in the code."""
        return [f"{type(self).__name__}: {self}"]


class RunCancelled(AgentflowError):
    """The run was cancelled; it commits nothing more."""


class BudgetExceeded(AgentflowError):
    """The next call could cost more than the budget still allows; it was not sent. The run stays resumable.

    Attributes, in dollars or None: ``budget``, ``spent`` (calls in doubt included), ``needed`` (what the next call
    may cost at most); ``run_id``.
    """

    def __init__(
        self,
        message: str,
        *,
        budget: Decimal | None = None,
        spent: Decimal | None = None,
        needed: Decimal | None = None,
        run_id: str = "",
    ) -> None:
        super().__init__(message)
        self.budget = budget
        self.spent = spent
        self.needed = needed
        self.run_id = run_id


class WorkflowTimeout(AgentflowError, TimeoutError):
    """The run did not finish within its workflow's ``timeout``.

    Attributes: ``run_id``; ``deadline`` (aware UTC), as recorded when the run began.
    """

    run_id: str = ""
    deadline: datetime | None = None


class EventTimeout(AgentflowError, TimeoutError):
    """No event came before the recorded deadline of ``ctx.wait_for_event``.

    Attributes: ``event`` (the names waited for); ``run_id``; ``deadline`` (aware UTC).
    """

    event: str = ""
    run_id: str = ""
    deadline: datetime | None = None


class StepError(AgentflowError):
    """Base of errors about one step."""

    step: str = ""
    run_id: str = ""


class StepFailed(StepError):
    """A step failed for good.

    What a workflow catches is an exception of the original type that is a ``StepFailed`` too, the
    first time and on replay, so both ``except PaymentError`` and ``except StepFailed`` work.

    Attributes: ``step``, ``run_id``, ``attempts`` (how many were made), ``error_type`` (bare name
    of the original exception's type), ``data`` (its recordable attributes), ``replayed``.
    """

    attempts: int = 0
    error_type: str = ""
    data: dict[str, Any]
    replayed: bool = False


class StepTimeout(StepError, TimeoutError):
    """One attempt of a step took longer than its ``timeout``."""


class StepInDoubt(StepError):
    """The step was started, has no result, and its process is gone: it may have happened."""


class StepChanged(StepError):
    """A recorded step was asked for with other data or other code, and may not run again."""


class CapturedChanged(StepError):
    """A variable captured by the step's function was rebound between the call and the start."""


class NondeterministicStep(StepError):
    """What identifies a step differs between two executions of the same code."""


class IdempotencyConflict(StepError):
    """An idempotency key already names another operation."""


class TaskError(AgentflowError):
    """Base of errors about human tasks."""

    task_id: str = ""


class TaskClosed(TaskError):
    """The task takes no answer any more; the message says who decided, or why."""


class TaskRejected(TaskError):
    """A person rejected a task that was to be filled in. ``decision`` holds who, when and why."""

    decision: Any = None


class HumanTaskExpired(TaskError):
    """The recorded deadline of a human task has passed."""

    def __init__(self, message: str, deadline: datetime | None = None) -> None:
        super().__init__(message)
        self.deadline = deadline


class ModelError(AgentflowError):
    """A model call failed.

    Attributes: ``reply`` (a ``Reply`` with what came, or None), ``status`` (HTTP status, or None
    when no answer came), ``code`` (the provider's error code or type), ``retryable``,
    ``retry_after`` (seconds, or None), ``request_id``, ``in_flight`` (the provider's id of a background
    call that goes on, or None).
    """

    in_flight: str | None = None

    def __init__(
        self,
        message: str,
        *,
        reply: Any = None,
        status: int | None = None,
        code: str | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.reply = reply
        self.status = status
        self.code = code
        self.retryable = retryable
        self.retry_after = retry_after
        self.request_id = request_id


class Truncated(ModelError):
    """The reply hit a token limit. ``reply.text`` holds what came; raise ``max_tokens=``."""


class Refused(ModelError):
    """The model refused to answer; its words are in ``reply.text``."""


class ContentFiltered(ModelError):
    """The provider's content filter stopped the reply."""


class InvalidReply(ModelError):
    """The reply does not validate against ``output_type``; ``reply.text`` is what came."""


class TooManyTurns(ModelError):
    """The model still asks for tools in the last turn that ``max_turns`` allows; these were not called.

    ``reply`` holds the conversation. With a larger ``max_turns`` the call goes on and pays for further turns only.
    """

    def __init__(self, message: str, *, max_turns: int = 0, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.max_turns = max_turns


__all__ = [
    name
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == __name__
]
