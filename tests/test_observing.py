"""Who observes a run hears what the engine does, in order, and changes nothing of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentflow import Context, Retry, StepFailed, Waiting, generate_content, human_task, observers, step, sync, workflow
from agentflow.journal import Journal
from agentflow.observing import Observer
from agentflow.testing import FakeModel


class Notes(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def run_started(self, document: dict[str, Any], prior: str | None) -> None:
        self.heard.append(f"run {prior}")

    def body_entered(self, ex: Any) -> None:
        self.heard.append("body")

    def step_started(self, call: Any) -> None:
        self.heard.append(f"step {call.name}")

    def attempt_started(self, call: Any, current: Any) -> None:
        self.heard.append(f"attempt {current.attempt}")

    def attempt_failed(self, call: Any, current: Any, error: BaseException) -> None:
        self.heard.append(f"failed {type(error).__name__}")

    def step_ended(self, call: Any, error: BaseException | None) -> None:
        self.heard.append(f"ended {call.name} {type(error).__name__ if error else 'well'}")

    def step_replayed(self, call: Any, head: dict[str, Any]) -> None:
        self.heard.append(f"replayed {call.name}")

    def request_started(self, ticket: Any) -> None:
        self.heard.append(f"asked {ticket.name}")

    def request_ended(self, ticket: Any, error: BaseException | None) -> None:
        self.heard.append(f"answered {ticket.record is not None}")

    def body_left(self, ex: Any) -> None:
        self.heard.append("left")

    def run_ended(self, ex: Any, document: dict[str, Any], status: str, error: BaseException | None) -> None:
        self.heard.append(f"{status} {type(error).__name__ if error else 'well'}")


class Raises(Observer):
    """Fails at everything that it is told."""

    def __init__(self) -> None:
        self.calls = 0


def _raise(self: Raises, *args: Any) -> None:
    self.calls += 1
    raise RuntimeError("a careless observer")


for _name in [name for name in vars(Observer) if not name.startswith("_")]:
    setattr(Raises, _name, _raise)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    made = Notes()
    monkeypatch.setattr(observers, "sources", [lambda: made])
    return made


async def flaky() -> str:
    from agentflow import current_step

    if current_step().attempt == 1:
        raise ConnectionError("once")
    return "fine"


@workflow("observed")
async def observed(ctx: Context, n: int) -> str:
    await step("flaky", flaky, retry=Retry(max_attempts=2, initial_delay=0))
    await generate_content("Hello", model="openai:gpt-4o-mini", name="ask")
    return "yes" if await human_task("approve", data=n) else "no"


@sync.workflow("plainly")
def plainly(ctx: Any, n: int) -> None:
    sync.step("broken", lambda: 1 / 0)


async def test_an_observer_hears_of_everything_in_order(notes: Notes) -> None:
    with FakeModel(["Hi"]), pytest.raises(Waiting):
        await observed.run(1)
    assert notes.heard == [
        "run None", "body",
        "step flaky", "attempt 1", "failed ConnectionError", "attempt 2", "ended flaky well",
        "step ask", "attempt 1", "asked openai:gpt-4o-mini", "answered True", "ended ask well",
        "step approve", "attempt 1", "failed Suspend", "ended approve Suspend",
        "waiting well", "left",
    ]  # fmt: skip
    notes.heard.clear()
    with pytest.raises(Waiting):
        await observed.run(1)
    assert notes.heard[:4] == ["run waiting", "body", "replayed flaky", "replayed ask"]


def test_plain_code_tells_the_same(notes: Notes) -> None:
    with pytest.raises(ZeroDivisionError):
        plainly.run(1)
    assert notes.heard == [
        "run None", "body", "step broken", "attempt 1", "failed ZeroDivisionError", "ended broken ZeroDivisionError",
        "failed ZeroDivisionError", "left",
    ]  # fmt: skip


async def test_a_step_that_is_cancelled_has_ended_for_its_observers(notes: Notes) -> None:
    begun = asyncio.Event()

    async def endless() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(step("endless", endless))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notes.heard == ["step endless", "attempt 1", "failed CancelledError", "ended endless CancelledError"]


async def test_an_observer_that_raises_is_told_of_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    careless = Raises()
    monkeypatch.setattr("agentflow.observing._said", set())
    monkeypatch.setattr(observers, "sources", [lambda: careless, lambda: 1 / 0])
    with FakeModel(["Hi"]) as fake:
        for _ in range(2):
            with pytest.raises(Waiting):
                await observed.run(1)
    assert len(fake.calls) == 1 and careless.calls > 20
    with pytest.raises(ZeroDivisionError):
        plainly.run(1)
    assert said().count("Raises failed; the run goes on without it: RuntimeError: a careless observer") == 1


async def test_observing_commits_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[int] = []
    alone, later = Journal.commit, Journal.acommit

    def commit(self: Journal, *args: Any, **options: Any) -> Any:
        commits.append(1)
        return alone(self, *args, **options)

    async def acommit(self: Journal, *args: Any, **options: Any) -> Any:
        commits.append(1)
        return await later(self, *args, **options)

    monkeypatch.setattr(Journal, "commit", commit)
    monkeypatch.setattr(Journal, "acommit", acommit)
    counts = []
    for sources in ([], [Notes]):
        monkeypatch.setattr(observers, "sources", sources)
        commits.clear()
        with FakeModel(["Hi"]), pytest.raises(Waiting):
            await observed.options(fresh=True).run(1)
        with pytest.raises(Waiting):
            await observed.run(1)
        counts.append(len(commits))
    assert counts[0] == counts[1] > 3


def test_without_sources_nobody_observes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "sources", [lambda: None])
    assert observers.begin({"workflow": "w"}) == ()
    with pytest.raises(StepFailed):
        plainly.run(1)
