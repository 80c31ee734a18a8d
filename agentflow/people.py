"""Scripted people: who decides what, and going on with a run until nobody is asked any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from agentflow import tasks
from agentflow.clock import FakeClock
from agentflow.errors import UsageError, Waiting
from agentflow.records import HumanTask
from agentflow.settings import settings

_ROUNDS = 1000


class Reject:
    """A scripted "no": ``FakePeople({"approve": Reject("too dear")})``."""

    def __init__(self, comment: str | None = None) -> None:
        self.comment = comment

    def __repr__(self) -> str:
        return f"Reject({self.comment!r})"


class FakePeople:
    """People who answer human tasks as scripted, and the time that passes until they do.

    Args:
        answers: one function of the task, or a dict of what names a task (its title, else its type, else whom it
            is assigned to; ``""`` all others) to an answer. An answer is True, False or ``Reject("why")``, data for
            a task that asks for some, None for nobody answering, or a function of the task that gives one of these.
        by: the name they decide under.

    ``decided`` lists the tasks with their decisions, as they were given.
    """

    def __init__(self, answers: Mapping[str, Any] | Callable[[HumanTask], Any], *, by: str = "test") -> None:
        if not (callable(answers) or isinstance(answers, Mapping)):
            raise UsageError('FakePeople takes a dict or a function of the task: FakePeople({"approve": True}).')
        self.answers = answers
        self.by = by
        self.decided: list[HumanTask] = []

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
            Waiting: somebody is asked for whom there is no answer, or an event is missing.
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
        if not self.decide() and not _let_time_pass(waiting):
            raise waiting

    def _endless(self, workflow: Any) -> UsageError:
        return UsageError(f"{workflow!r} still waits after {_ROUNDS} rounds of answers: does it ask in a loop?")


def _let_time_pass(waiting: Waiting) -> bool:
    """Moves a ``FakeClock`` to the first moment at which one of the waits is over."""
    clock = settings.clock
    ends = [wait.get("until") or wait.get("deadline") for wait in waiting.waiting_on]
    times = [float(end) for end in ends if end is not None]
    if not times or not isinstance(clock, FakeClock):
        return False
    clock.move_to(min(times))
    return True
