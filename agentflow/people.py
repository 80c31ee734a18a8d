"""Scripted people and events: who decides what, what comes when, and going on until nothing is waited for any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from agentflow import codec, tasks
from agentflow.clock import FakeClock
from agentflow.durations import Duration, seconds, words
from agentflow.errors import UsageError, Waiting
from agentflow.events import not_received, send_event
from agentflow.records import HumanTask
from agentflow.settings import now, settings

_ROUNDS = 1000


class Reject:
    """A scripted "no": ``FakePeople({"approve": Reject("too dear")})``."""

    def __init__(self, comment: str | None = None) -> None:
        self.comment = comment

    def __repr__(self) -> str:
        return f"Reject({self.comment!r})"


@dataclass(slots=True)
class ScriptedEvent:
    """An event that comes when a run waits for it. Made by ``event``."""

    name: str
    payload: Any
    after: float
    due: float | None = None
    sent: bool = False

    def __str__(self) -> str:
        later = f", after={words(self.after)!r}" if self.after else ""
        return f"event({self.name!r}, {str(self.payload)[:80]!r}{later})"


def event(name: str, payload: Any = None, *, after: Duration = 0) -> ScriptedEvent:
    """An event for ``FakePeople``, sent when a run waits for one of its name: ``event("paid", {"order": 7})``.

    Args:
        name, payload: as in ``send_event``.
        after: seconds or a duration such as ``"3d"`` between the beginning of that wait and the event. It needs a
            ``FakeClock``, which is moved; a wait that has a shorter timeout is over before.
    """
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f'event({name!r}): an event has a name, such as "paid".')
    return ScriptedEvent(name, payload, seconds(after, what="after") or 0.0)


class FakePeople:
    """People who answer human tasks as scripted, events that come, and the time that passes until they do.

    Args:
        answers: one function of the task, or a dict of what names a task (its title, else its type, else whom it
            is assigned to; ``""`` all others) to an answer. An answer is True, False or ``Reject("why")``, data for
            a task that asks for some, None for nobody answering, or a function of the task that gives one of these.
            None: nobody answers anything.
        events: what ``ctx.wait_for_event`` gets: a dict from names to payloads, or a list of ``event(...)``. Each comes
            once, when a run waits for its name; those of one name come in their order.
        by: the name they decide under.

    ``decided`` lists the tasks with their decisions, as they were given; ``sent`` the events that have come. Used with
    ``with``, it fails at the end for an event that nobody waited for or received; ``check()`` does so at once.
    """

    def __init__(
        self,
        answers: Mapping[str, Any] | Callable[[HumanTask], Any] | None = None,
        *,
        events: Mapping[str, Any] | Sequence[ScriptedEvent] = (),
        by: str = "test",
    ) -> None:
        answers = {} if answers is None else answers
        if not (callable(answers) or isinstance(answers, Mapping)):
            raise UsageError('FakePeople takes a dict or a function of the task: FakePeople({"approve": True}).')
        listed = [event(*pair) for pair in events.items()] if isinstance(events, Mapping) else list(events)
        if isinstance(events, str) or not all(isinstance(one, ScriptedEvent) for one in listed):
            raise UsageError(f'FakePeople(events={events!r}): a dict, or a list of event("paid", {{"order": 7}}).')
        self.answers = answers
        self.by = by
        self.decided: list[HumanTask] = []
        self._copied = False
        self._events = [event(one.name, one.payload, after=one.after) for one in listed]  # each use counts by itself

    def __enter__(self) -> FakePeople:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.check()

    def copied(self) -> None:
        """Say that copies of this, in other processes, are used in its place: what they sent is not known here."""
        self._copied = True

    @property
    def sent(self) -> list[ScriptedEvent]:
        """The scripted events that have come, in the order of the script."""
        return [one for one in self._events if one.sent]

    def check(self) -> None:
        """Fail if a scripted event never came, because nobody waited for it, or came and was not received.

        Leaving a ``with`` block does this, and so does the end of a test with the fixture ``fake_people``.

        Raises:
            AssertionError: names the events.
        """
        if self._copied:
            return
        lines = [f"  nobody waited for it: {one}" for one in self._events if not one.sent]
        left = {one.name: not_received(one.name) for one in self.sent}
        for one in self.sent:
            payload = codec.encode(one.payload)
            if payload in left[one.name]:
                left[one.name].remove(payload)
                lines.append(f"  it came, and no wait took it (what does it match?): {one}")
        if lines:
            raise AssertionError("\n".join([f"FakePeople: {len(lines)} of its events were not received:", *lines]))

    def decide(self) -> int:
        """Answer all open tasks that there is an answer for; how many that were."""
        count = 0
        for task in tasks.list():
            answer = self._answer(task)
            if answer is None:
                continue
            if isinstance(answer, Reject) or answer is False:
                comment = answer.comment if isinstance(answer, Reject) else None
                self.decided.append(tasks.reject(task.id, by=self.by, comment=comment))
            elif answer is True and task.schema is None:
                self.decided.append(tasks.approve(task.id, by=self.by))
            else:
                self.decided.append(tasks.answer(task.id, answer, by=self.by))
            count += 1
        return count

    def _answer(self, task: HumanTask) -> Any:
        answer: Any = self.answers
        if isinstance(answer, Mapping):
            who = [task.assign_to] if isinstance(task.assign_to, str) else list(task.assign_to or ())
            names = [task.title, task.type, *who, ""]
            answer = next((answer[name] for name in names if name in answer), None)
        return answer(task) if callable(answer) else answer

    def run(self, workflow: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a run, with everybody asked on the way answering and every wait over at once.

        Waits for a time need a ``FakeClock``, which is moved.

        Raises:
            Waiting: somebody is asked for whom there is no answer, or an event is not scripted.
        """
        for _ in range(_ROUNDS):
            try:
                return workflow.run_sync(*args, **kwargs)
            except Waiting as waiting:
                self._go_on(waiting)
        raise self._endless(workflow)

    async def arun(self, workflow: Any, *args: Any, **kwargs: Any) -> Any:
        """``run`` for coroutines."""
        for _ in range(_ROUNDS):
            try:
                return await workflow.run(*args, **kwargs)
            except Waiting as waiting:
                self._go_on(waiting)
        raise self._endless(workflow)

    def _go_on(self, waiting: Waiting) -> None:
        coming = self._coming(waiting)
        answered = self.decide()
        for one in coming:
            if one.due is not None and one.due <= now():
                send_event(one.name, one.payload)
                one.sent = True
                answered += 1
        if not answered and not _let_time_pass(waiting, coming):
            raise waiting

    def _coming(self, waiting: Waiting) -> list[ScriptedEvent]:
        """The next event of each name that is waited for."""
        names = [name for wait in waiting.waiting_on for name in wait.get("names", ())]
        found = []
        for name in dict.fromkeys(names):
            one = next((one for one in self._events if one.name == name and not one.sent), None)
            if one is None:
                continue
            if one.after and not isinstance(settings.clock, FakeClock):
                raise UsageError(f"{one}: enter a FakeClock around the test, for this is to come later.")
            one.due = now() + one.after if one.due is None else one.due
            found.append(one)
        return found

    def _endless(self, workflow: Any) -> UsageError:
        return UsageError(f"{workflow!r} still waits after {_ROUNDS} rounds of answers: does it ask in a loop?")


def _let_time_pass(waiting: Waiting, coming: Sequence[ScriptedEvent]) -> bool:
    """Moves a ``FakeClock`` to the first moment at which a wait is over or an event comes."""
    clock = settings.clock
    ends = [wait.get("until") or wait.get("deadline") for wait in waiting.waiting_on]
    times = [float(end) for end in [*ends, *(one.due for one in coming)] if end is not None]
    if not times or not isinstance(clock, FakeClock):
        return False
    clock.move_to(min(times))
    return True
