"""Two runs compared: the first step that differs, the prompts, the outputs, the cost."""

from __future__ import annotations

from decimal import Decimal

import pytest

from agentflow import generate_content, ledger, parallel, runs, step, workflow
from agentflow.testing import FakeModel

KEY = "sk-proj-abcdefghij0123456789abcdefghij"


@workflow("write")
async def write(ctx, topic: str, model: str = "openai:cheap") -> str:
    facts = await step("facts", lambda: {"topic": "rivers", "count": 3})
    draft = await generate_content(
        f"You write.\nTell about {topic}.\nUse {facts['count']} facts.", model=model, name="draft"
    )
    return await step("send", lambda: f"sent: {draft}")


@pytest.fixture
def two():
    ledger.set_price("cheap", 100, 100)
    with FakeModel(["Rivers flow.", "Lakes do not.\nThey lie."]):
        write.run_sync("rivers")
        write.run_sync("lakes")
    right, left = runs.list()
    return left, right


def test_the_first_step_that_differs_is_named_with_prompt_and_output(two):
    left, right = two
    diff = left.diff(right)
    assert diff and diff.first.name == "draft" and diff.same == 1
    assert [(s.name, s.what) for s in diff.steps] == [("draft", ("prompt", "output")), ("send", ("given", "output"))]
    assert "-Tell about rivers." in diff.first.given and "+Tell about lakes." in diff.first.given
    assert "- Rivers flow." in diff.first.output and "+ Lakes do not." in diff.first.output
    assert '"rivers"' in diff.input and '"lakes"' in diff.input
    assert diff.left_cost == left.cost and diff.cost == right.cost - left.cost != 0
    assert left.diff(right.id) == diff


def test_equal_runs_do_not_differ(two):
    left, _ = two
    same = left.diff(left)
    assert not same and same.first is None and same.same == 3 and same.cost == 0
    assert "no step differs" in str(same)


def test_the_text_is_readable_at_80_columns(two, monkeypatch):
    left, right = two
    text = str(left.diff(right))
    assert max(map(len, text.splitlines())) <= 80
    assert f"{left.id} -> {right.id}" in text and "first difference: draft" in text
    assert "draft · changed · prompt, output" in text and "paid $" in text

    @workflow("long")
    async def long(ctx, n: int) -> str:
        return await step("long", lambda: " ".join(f"word{n + i}" for i in range(200)))

    long.run_sync(1)
    long.run_sync(50)
    b, a = runs.list(workflow="long")
    assert max(map(len, str(a.diff(b)).splitlines())) <= 80


async def test_steps_that_one_run_does_not_have_are_told_and_others_still_belong_together():
    @workflow("more")
    async def more(ctx, extra: bool) -> list:
        if extra:
            await step("extra", lambda: 1)
        return await parallel([step("s", lambda i: i, i) for i in ((2, 1, 0) if extra else (0, 1, 2))])

    left, right = await more.start(False), await more.start(True)
    diff = left.diff(right)
    assert [(s.name, s.state) for s in diff.steps] == [("extra", "only in right")] and diff.same == 3
    assert diff.first.name == "extra"
    assert right.diff(left).first.state == "only in left"


async def test_a_difference_inside_a_step_is_told_too():
    @workflow("inner-diff")
    async def flow(ctx, n: int) -> int:
        async def outer() -> int:
            return await step("inner", lambda: n % 2)

        return await step("outer", outer)

    left, right = await flow.start(1), await flow.start(2)
    assert [s.name for s in left.diff(right).steps] == ["outer", "inner"]


async def test_a_fork_is_compared_with_its_parent(two):
    left, _ = two
    made = left.fork(results={"draft": "Given."})
    await made
    diff = left.diff(made)
    assert diff.first.name == "draft" and diff.first.what == ("output",) and diff.same == 1
    assert [s.name for s in diff.steps] == ["draft", "send"] and len(diff.steps[1].given) > 0
    assert diff.right_cost == Decimal(0)


async def test_secrets_are_masked_before_anything_is_cut_out():
    @workflow("secretive")
    async def flow(ctx, word: str) -> str:
        return await step("send", lambda text: text, f"{'x' * 300} {KEY} {word} {'y' * 300}")

    left, right = await flow.start("one"), await flow.start("two")
    text = str(left.diff(right))
    assert "one" in text and "two" in text
    for part in (KEY, KEY[8:20], KEY[-12:]):
        assert part not in text
