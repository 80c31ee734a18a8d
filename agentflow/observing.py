"""What happens in a run, told to whoever listens: a trace, a display of its progress.

An ``Observer`` hears of one run, or of one step that stands outside workflows. ``observers.py`` decides who that is
when the run starts, and ``Execution.observers`` holds them; where nobody listens it is empty, and no step or request
calls anything here.

Observers hear what the engine *does* and decide nothing: they change no value and no record, they are called in the
thread and context of the code that goes on (so one may set context variables for the code inside), nothing is awaited,
and what one raises is said and goes no further.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

from agentflow.voice import log

if TYPE_CHECKING:
    from agentflow.calls import Call, Current
    from agentflow.run import Execution
    from agentflow.sending import Ticket


class Observer:
    """Hears of one run. Each method may be left as it is; they are listed in the order in which they are called."""

    def run_started(self, document: dict[str, Any], prior: str | None) -> None:
        """A run is taken up, and its document is about to be written: a key of the observer's own may be put there.

        ``prior``: how the last execution ended; None for a new run. If the run turns out to be another process's,
        nothing more is heard.
        """

    def body_entered(self, ex: Execution) -> None:
        """What this context executes from now on is the run's body."""

    def step_started(self, call: Call) -> None:
        """A step has no record that could be used: it will run, or wait. Always followed by ``step_ended``."""

    def attempt_started(self, call: Call, current: Current) -> None:
        """Its function is about to be called, or what it waits for to be waited for."""

    def request_started(self, ticket: Ticket) -> None:
        """A model is asked, in the attempt ``ticket.current``. Always followed by ``request_ended``."""

    def request_ended(self, ticket: Ticket, error: BaseException | None) -> None:
        """The reply is recorded and stands in ``ticket.record``; or none came."""

    def reply_came(self, call: Call, current: Current, body: dict[str, Any], record: dict[str, Any]) -> None:
        """A batch has brought the reply that this attempt waited for; it is recorded."""

    def attempt_failed(self, call: Call, current: Current, error: BaseException) -> None:
        """It raised, was cancelled or has left because the run suspends. A next attempt may follow."""

    def step_ended(self, call: Call, error: BaseException | None) -> None:
        """The record is durable, or the step was left by ``error``."""

    def step_replayed(self, call: Call, head: dict[str, Any]) -> None:
        """A record is handed out instead of running the step; ``head`` is its head."""

    def body_left(self, ex: Execution) -> None:
        """This context goes back to what it did before; compensations have run."""

    def run_ended(self, ex: Execution, document: dict[str, Any], status: str, error: BaseException | None) -> None:
        """The execution has ended: completed, failed, cancelled, waiting or interrupted. Comes after or before
        ``body_left``."""


_said: set[tuple[str, str]] = set()


def tell(observers: Iterable[Any], what: Callable[[Any], None]) -> None:
    """Tell each observer; what one raises harms nobody."""
    for observer in observers:
        try:
            what(observer)
        except Exception as error:
            complain(type(observer).__name__, error)


def complain(name: str, error: Exception) -> None:
    """Say what an observer has raised, once for each kind of error."""
    kind = (name, type(error).__name__)
    if kind not in _said:
        _said.add(kind)
        log.warning("%s failed; the run goes on without it: %s: %s", *kind, error)


def watched(call: Call, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """The engine's process of one step, with its observers told of what it does.

    Everything that the engine decides about a step passes here as an effect, and so does what came of it.
    """
    observers = call.ex.observers
    failure: BaseException | None = None
    tell(observers, lambda each: each.step_started(call))
    send: Any = steps.send
    value: Any = None
    try:
        while True:
            try:
                effect = send(value)
            except StopIteration as stop:
                return stop.value
            attempt: Current | None = effect[1] if effect[0] == "attempt" else None
            if attempt is not None:
                _began(observers, call, attempt)
            try:
                value = yield effect
                send = steps.send
            except BaseException as error:
                if attempt is not None:
                    _failed(observers, call, attempt, error)
                send, value = steps.throw, error
    except BaseException as error:
        failure = error
        raise
    finally:
        _ended(observers, call, failure)


def _began(observers: Iterable[Any], call: Call, current: Current) -> None:
    tell(observers, lambda each: each.attempt_started(call, current))


def _failed(observers: Iterable[Any], call: Call, current: Current, error: BaseException) -> None:
    tell(observers, lambda each: each.attempt_failed(call, current, error))


def _ended(observers: Iterable[Any], call: Call, error: BaseException | None) -> None:
    tell(observers, lambda each: each.step_ended(call, error))
