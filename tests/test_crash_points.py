"""``crash_points``: workflows killed at every point; and workflows with a fault, which it has to find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agentflow import Retry, current_step, generate_content, human_task, parallel, step, sync, workflow
from agentflow.errors import UsageError
from agentflow.testing import FakeClock, FakeModel, FakePeople, crash_points

MODEL = "openai:gpt-4o-mini"


def note(file: Path, word: str) -> str:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, word.encode() + b"\n")
    os.close(descriptor)
    return word


def test_a_workflow_of_everything_survives_a_kill_at_every_point(tmp_path: Path) -> None:
    async def compose(topic: str) -> str:
        first = await generate_content(f"Outline {topic}", model=MODEL)
        return await generate_content(f"Write {topic} by {first}", model="anthropic:claude-haiku-4-5")

    def flaky() -> str:
        if current_step().attempt < 2:
            raise ConnectionError("first attempt")
        return "second attempt"

    @workflow
    async def everything(ctx: Any, topic: str) -> list[Any]:
        begin = ctx.now("begin")
        plain = await step("plain", lambda: topic.upper())
        retried = await step("flaky", flaky, retry=Retry(max_attempts=3, initial_delay=0.001))
        text = await step("compose", compose, topic)
        both = await parallel([step("one", lambda: 1), generate_content(f"Two {topic}", model=MODEL)])
        await ctx.sleep("30d")
        decision = await human_task("approve", data=text)
        key = await step("charge", lambda: "charged", idempotency_key=f"order-{topic}")
        return [plain, retried, text, both, decision.by, key, (ctx.now("end") - begin).days]

    with FakeClock(), FakeModel({"Outline": "outline", "Write": "text", "Two": "two"}, all_used=False):
        found = crash_points(everything, "tea", people=FakePeople({"": True}, by="grace"))
    assert found.value == ["TEA", "second attempt", "text", [1, "two"], "grace", "charged", 30]
    words = "\n".join(found.points)
    assert len(found) > 40, words
    for point in ("before the commit of 'plain'", "after the commit of a model's reply", "when 'flaky' was started", "while a model call"):
        assert point in words, words


def test_compensation_happens_once_whenever_the_process_dies(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    @workflow
    async def order(ctx: Any, n: int) -> None:
        for i in range(2):
            await step("charge", lambda i=i: note(notes, f"charge {i}"), compensate=lambda done: note(notes, f"refund {done}"))
        await step("ship", lambda: 1 / 0)

    found = crash_points(order, 1)
    assert "ZeroDivisionError" in str(found.error) and any("'undo charge'" in point for point in found.points)
    assert notes.read_text().count("refund charge 1") >= len(found)


def test_plain_code_and_errors_of_the_provider_are_survived_too() -> None:
    @sync.workflow
    def ask(ctx: Any, n: int) -> list[str]:
        return [sync.generate_content(f"Ask {i}", model=MODEL, retry={"initial_delay": 0.001}) for i in range(n)]

    with FakeModel([503, "first", "second"], all_used=False):
        assert crash_points(ask, 2).value == ["first", "second"]


def test_a_step_that_stops_when_in_doubt_is_no_difference() -> None:
    @workflow
    async def careful(ctx: Any) -> int:
        return await step("pay", lambda: 1, in_doubt="raise")

    assert crash_points(careful).value == 1


def test_a_result_from_chance_is_found_and_a_comparison_can_allow_it() -> None:
    @workflow
    async def chance(ctx: Any) -> int:
        await step("one", lambda: 1)
        return os.getpid()

    with pytest.raises(AssertionError, match=r"Killed point 1: .*the outcome is value \d+, not value \d+"):
        crash_points(chance)
    assert len(crash_points(chance, same=lambda right, found: right > 0 and found > 0)) > 5


def test_a_reply_that_is_paid_for_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentflow.aicall._Recorder.replies", lambda recorder: [])

    @workflow
    async def ask(ctx: Any) -> str:
        return await generate_content("Hello?", model=MODEL)

    with FakeModel({"Hello?": "Hi"}, all_used=False), pytest.raises(AssertionError, match="paid for 2 times, not 1.*Hello"):
        crash_points(ask)


def test_an_effect_that_happens_again_under_another_input_is_found(tmp_path: Path) -> None:
    lives = tmp_path / "lives"

    @workflow
    async def forgets(ctx: Any) -> str:
        number = len(note(lives, "life")) + lives.read_text().count("life")
        return await step("pay", lambda: f"paid {number}"[:4])

    with pytest.raises(AssertionError, match="step 'pay' was started 2 times, not 1|records differ"):
        crash_points(forgets)


def test_a_life_that_hangs_is_ended_and_told() -> None:
    parent = os.getpid()

    @workflow
    async def hangs(ctx: Any) -> None:
        import asyncio

        assert os.getpid() != parent
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="did not end within 1.5 s"):
        crash_points(hangs, seconds=1.5)


def test_a_model_without_a_script_is_refused() -> None:
    @workflow
    async def asks(ctx: Any) -> str:
        return await generate_content("Hello?", model=MODEL)

    found = crash_points(asks)  # refused alike in each life
    assert found.value is None and "OPENAI_API_KEY" in str(found.error)


async def test_it_works_inside_a_running_loop_and_after_threads_were_used() -> None:
    @workflow
    async def plain(ctx: Any, n: int) -> int:
        for name in ("first", "double"):
            result = await step(name, lambda: 2 * n)
        return result

    assert await plain.run(2) == 4  # leaves an idle worker thread behind, which no child has
    found = crash_points(plain, 21)
    assert found.value == 42
    for moment in ("before", "after"):  # the record of a plain step, which is committed in a way of its own elsewhere
        assert any(f"{moment} the commit of 'double'" in point for point in found.points), found.points
    assert await plain.run(3) == 6


def test_a_wrong_call_is_told() -> None:
    with pytest.raises(UsageError, match="is a workflow"):
        crash_points(lambda: 1)
