"""What a plan shows: the difference of a request or a prompt file, and an estimate of what it would cost."""

from __future__ import annotations

import asyncio
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agentflow import Context, generate_content, ledger, load_prompt, runs, step, workflow
from agentflow.plans import WIDTH
from agentflow.testing import FakeModel, reply_body

MODEL = "openai:planned"
SECRET = "sk-abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(autouse=True)
def prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_PRICES", {})
    ledger.set_price("planned", 1000, 2000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "prompts").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "main.py"), raising=False)
    return tmp_path / "prompts"


def counted(read: int, wrote: int) -> Any:
    """Answers as if so many tokens had been read and written."""

    def answer(request: Any) -> dict[str, Any]:
        body = reply_body(request, "Fine.")
        body["usage"] = {"input_tokens": read, "output_tokens": wrote, "total_tokens": read + wrote}
        return body

    return answer


def lines(plan: Any) -> list[str]:
    found = str(plan).splitlines()
    assert max(map(len, found)) <= WIDTH
    return [line.strip() for line in found]


async def test_a_changed_prompt_file_is_shown_as_a_diff_with_what_it_would_cost(folder: Path) -> None:
    file = folder / "triage.md"
    file.write_text("---\nsystem: You sort mail.\n---\nWho answers?\nBe brief.\n\n{{message}}")

    @workflow("triage-flow")
    async def flow(ctx: Context, message: str) -> str:
        return await generate_content(load_prompt("triage", message=message), model=MODEL)

    with FakeModel(counted(100, 10)):
        await flow.run("Hello")
    file.write_text(
        "---\nsystem: You sort mail.\n---\nWho answers, and when, and in which words?\nBe brief.\n\n{{message}}"
    )
    plan = await flow.plan("Hello")
    (only,) = plan.steps
    assert (only.state, only.reason) == ("changed", "its request changed")
    assert only.diff.splitlines() == [
        "  [user]",
        "- Who answers?",
        "+ Who answers, and when, and in which words?",
        "  Be brief.",
    ]
    # 100 tokens were read, 30 characters more are 7 more tokens, and 10 were written
    assert only.cost == Decimal(107) * 1000 / 1_000_000 + Decimal(10) * 2000 / 1_000_000
    assert plan.dollars == only.cost
    assert "changed  triage · its request changed · costs about $0.1270" in lines(plan)
    assert "+ Who answers, and when, and in which words?" in lines(plan)
    assert "estimated cost of the steps shown: about $0.1270; what follows" in " ".join(lines(plan))


async def test_a_prompt_file_that_a_step_reads_is_shown_as_it_was_and_is(folder: Path) -> None:
    file = folder / "draft.md"
    file.write_text("Draft of {{topic}}.\nShort.")

    async def draft(topic: str) -> str:
        return str(await generate_content(load_prompt("draft", topic=topic), model=MODEL))

    @workflow("step-flow")
    async def flow(ctx: Context, topic: str) -> str:
        return await step("draft", draft, topic)

    with FakeModel(counted(100, 10)):
        await flow.run("tea")
    file.write_text("A fine draft of {{topic}}.\nShort.")
    (only,) = (await flow.plan("tea")).steps
    assert only.diff.splitlines() == [
        "prompts/draft.md:",
        "- Draft of {{topic}}.",
        "+ A fine draft of {{topic}}.",
        "  Short.",
    ]
    assert "prompts/draft.md edited" in only.reason
    assert only.cost == Decimal("0.12")  # what it had cost
    file.write_text("Draft of {{topic}}.\nShort.")
    assert [one.state for one in (await flow.plan("tea")).steps] == ["reused"]


async def test_a_changed_model_and_other_settings_are_lines_of_the_diff() -> None:
    model, limit = MODEL, 50

    @workflow("settings-flow")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content("Hi", model=model, max_tokens=limit)

    with FakeModel(counted(100, 10)):
        await flow.run(1)
    model, limit = "openai:no-such-model", 60
    plan = await flow.plan(1)
    assert {"- model: openai:planned", "+ model: openai:no-such-model"} <= set(lines(plan))
    assert {"- max_output_tokens: 50", "+ max_output_tokens: 60"} <= set(lines(plan))
    assert plan.steps[0].cost is None and plan.dollars is None
    assert "costs an unknown amount" in str(plan)
    assert "estimated cost of the steps shown: unknown; what follows" in " ".join(lines(plan))


async def test_known_and_unknown_costs_are_not_mixed_up_and_plain_steps_cost_nothing() -> None:
    word = "x"

    @workflow("mixed-flow")
    async def flow(ctx: Context, n: int) -> list[Any]:
        async def one() -> str:
            return await generate_content(f"One {word}", model=MODEL, name="one")

        async def two() -> str:
            return await generate_content(f"Two {word}", model="openai:no-such-model", name="two")

        async def three() -> str:
            return await step("three", lambda word: word, word)

        async def new() -> str:
            return await generate_content("New " * 400, model=MODEL, name="new") if word == "y" else ""

        return await asyncio.gather(one(), two(), three(), new())

    with FakeModel(counted(100, 10)):
        await flow.run(1)
    word = "y"
    plan = await flow.plan(1)
    costs = {each.name: each.cost for each in plan.steps}
    new = next(each for each in plan.steps if each.name == "new")
    assert new.cost == (new.tokens.tokens * Decimal(1) + 2_000 * Decimal(2)) / 1000  # an assumed answer
    assert costs == {"one": Decimal("0.12"), "two": None, "three": Decimal(0), "new": new.cost}
    assert plan.dollars is None
    assert (new.state, new.reason) == ("unknown", f"not recorded yet, {new.tokens}")
    assert "and 1 unknown;" in " ".join(lines(plan))
    assert "three · given other data · costs nothing" in " ".join(lines(plan))


async def test_each_of_several_changed_calls_is_compared_with_a_record_of_its_own() -> None:
    greeting = "Hello"

    @workflow("many-flow")
    async def flow(ctx: Context, names: list[str]) -> list[str]:
        return await asyncio.gather(
            *(generate_content(f"{greeting} {name}", model=MODEL, name="greet") for name in names)
        )

    with FakeModel(counted(100, 10)):
        await flow.run(["Al", "Bo"])
    greeting = "Moin"
    text = str(await flow.plan(["Al", "Bo"]))
    for name in ("Al", "Bo"):
        assert f"- Hello {name}" in text and f"+ Moin {name}" in text


async def test_nothing_secret_and_nothing_that_steers_a_terminal_is_shown_in_80_columns() -> None:
    end = "first"

    @workflow("secret-flow")
    async def flow(ctx: Context, n: int) -> list[str]:
        long = f"{'word ' * 13}{SECRET} \x1b[31m\u202e{'unbroken' * 30} {end}"
        return [
            await generate_content(long, model=MODEL, system=f"password: hunter2hunter2 {end}"),
            await step("plain", lambda text: text, long),
        ]

    with FakeModel(counted(100, 10)):
        await flow.run(1)
    end = "second"
    plan = await flow.plan(1)
    shown = "".join(lines(plan))
    assert "second" in shown and "redacted" in shown
    for hidden in (SECRET, SECRET[:12], SECRET[-12:], "hunter2", "\x1b", "\u202e"):
        assert hidden not in shown
    assert SECRET not in plan.steps[0].diff and "hunter2" not in plan.steps[0].diff


async def test_a_secret_cut_by_the_excerpt_of_a_step_is_not_shown_in_part() -> None:
    token = SECRET + "A"

    @workflow("cut-flow")
    async def flow(ctx: Context, n: int) -> str:
        return await step("send", lambda text: text, f"{'x' * 200} {token} {'y' * 200}")

    await flow.run(1)
    token = SECRET + "B"
    plan = await flow.plan(1)
    assert plan.steps[0].state == "changed"
    assert SECRET[-12:] not in str(plan) and SECRET[-12:] not in plan.steps[0].diff


async def test_a_changed_file_makes_the_cost_unknown_and_an_equal_one_does_not() -> None:
    word, picture = "x", b"\x89PNG\r\n\x1a\n" + b"1" * 600

    @workflow("file-flow")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content(f"See {word}", model=MODEL, files=[picture])

    with FakeModel(counted(100, 10)):
        await flow.run(1)
    word = "y"
    assert (await flow.plan(1)).dollars == Decimal("0.12")
    picture = b"\x89PNG\r\n\x1a\n" + b"2" * 600
    assert (await flow.plan(1)).dollars is None


async def test_an_amount_too_small_to_show_is_not_shown_as_nothing() -> None:
    ledger.set_price("planned", "0.1", "0.1")
    word = "x"

    @workflow("small-flow")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content(f"Hi {word}", model=MODEL)

    with FakeModel(counted(100, 10)):
        await flow.run(1)
    word = "y"
    text = str(await flow.plan(1))
    assert "costs under $0.0001" in text and "$0.0000" not in text


async def test_a_plan_writes_no_prompt_and_a_record_keeps_each_text_once(folder: Path) -> None:
    from agentflow.scratch import open_journal

    (folder / "p.md").write_text("Text {{n}}")

    async def ask(n: int) -> str:
        return str(await generate_content(load_prompt("p", n=n), model=MODEL))

    @workflow("kept-flow")
    async def flow(ctx: Context, n: int) -> list[str]:
        return [await step("one", ask, 1), await step("two", ask, 2)]

    def kept() -> list[str]:
        return [text for key, text in open_journal().scan("c/prompt-")]

    await flow.plan(1)
    assert kept() == [] and runs.list() == []
    with FakeModel(counted(100, 10)):
        await flow.run(1)
    assert kept() == ['"Text {{n}}"']
    (folder / "p.md").write_text("Other {{n}}")
    await flow.plan(1)
    assert kept() == ['"Text {{n}}"']


async def test_a_step_that_becomes_a_model_call_of_the_same_name_is_planned() -> None:
    asks = False

    @workflow("becomes-flow")
    async def flow(ctx: Context, n: int) -> str:
        if asks:
            return await generate_content("Hi", model=MODEL, name="greet")
        return await step("greet", lambda: "Hi")

    await flow.run(1)
    asks = True
    (only,) = (await flow.plan(1)).steps
    assert (only.name, only.state, only.cost) == ("greet", "changed", None)
