"""``human_task``: a step that a person does."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, overload

from agentflow.durations import Duration
from agentflow.human import human_call
from agentflow.records import UNSET, Decision

T = TypeVar("T")


@overload
def human_task(
    type: str = ...,
    assign_to: str | Sequence[str] | None = ...,
    data: Any = ...,
    *,
    title: str | None = ...,
    schema: None = ...,
    timeout: Duration | None = ...,
    on_timeout: Any = ...,
    remind: Duration | None = ...,
) -> Coroutine[None, None, Decision]: ...
@overload
def human_task(
    type: str = ...,
    assign_to: str | Sequence[str] | None = ...,
    data: Any = ...,
    *,
    title: str | None = ...,
    schema: type[T],
    timeout: Duration | None = ...,
    on_timeout: Any = ...,
    remind: Duration | None = ...,
) -> Coroutine[None, None, T]: ...
def human_task(
    type: str = "approve",
    assign_to: Any = None,
    data: Any = None,
    *,
    title: str | None = None,
    schema: Any = None,
    timeout: Duration | None = None,
    on_timeout: Any = UNSET,
    remind: Duration | None = None,
) -> Any:
    """Ask a person, and wait without blocking: ``decision = await human_task(assign_to="manager", data=draft)``.

    Until the answer comes the run is suspended and ``run()`` raises ``Waiting``, which names the task and
    the command to answer; run it again afterwards. An answer holds for exactly the data shown.

    Args:
        type: "approve", "review", "input" or a word of your own.
        assign_to: whom it is for, a name or a list of names. None: anybody.
        data: what the person is shown.
        title: one line for people; names the step. None: the type.
        schema: a pydantic model or other type that the person fills in. None: yes or no. Where ``data`` is itself such
            a form, filled in, the person may approve it as it is or change some of its fields.
        timeout: seconds or a duration from the opening of the task on; a restart does not extend it. None: no end.
        on_timeout: returned when the time is over; an exception is raised; ``Escalate("director", timeout="1d")`` asks
            somebody else. Not given: ``HumanTaskExpired`` is raised.
        remind: how often ``configure(notify=)`` hears of it again while it is open; seconds or a duration. A worker
            tells it on time, without one it is told when the run is run again. None: never.

    Returns:
        A ``Decision``, true when approved; with ``schema`` an instance of it.

    Raises:
        TaskRejected: with ``schema``, when the person said no.
        HumanTaskExpired: nobody answered in time and there is no ``on_timeout``.
    """
    return human_call(type, assign_to, data, title, schema, timeout, on_timeout, remind)
