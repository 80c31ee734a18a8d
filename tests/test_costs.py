"""The ledger: every paid reply has one row in it, written with the reply; ``agentflow cost`` adds them up."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

from agentflow import costlines, costs, embed, generate_content, ledger, step, workflow
from agentflow.cli.app import run
from agentflow.errors import InvalidReply, ModelError
from agentflow.journal import Journal
from agentflow.settings import settings
from agentflow.testing import FakeModel
from tests.loopback import Loopback
from tests.programs import run_program

FIRST, SECOND = "openai:first", "anthropic:second"


@pytest.fixture(autouse=True)
def prices() -> None:
    ledger.set_price("first", "0.1", "0.3")
    ledger.set_price("second", "3", "15")


@pytest.fixture
def cost(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``agentflow cost --json``, each line under its name."""

    def call(by: str) -> dict[str, dict[str, Any]]:
        capsys.readouterr()
        assert run(["cost", "--by", by, "--json"]) == 0
        return {line[by]: line for line in json.loads(capsys.readouterr().out)}

    return call


def rows(journal: Journal) -> list[dict[str, Any]]:
    return [facts for _, _, facts in costs.entries(journal)]


def dollars(journal: Journal) -> Decimal:
    """What the recorded replies themselves say that they cost."""
    texts = [orjson.loads(text) for _, text in journal.scan("m/")]
    return sum((Decimal(raw["cost"]) for raw in texts if raw["cost"] is not None), Decimal(0))


@workflow("report")
async def report(ctx: Any, topic: str) -> list[str]:
    async def assess() -> str:
        return await generate_content(f"assess {topic}", model=SECOND)

    return [await generate_content(f"draft {topic}", model=FIRST, name="draft"), await step("assess", assess)]


def test_each_reply_is_in_the_ledger_once_by_model_workflow_step_and_day(
    cost: Callable[..., Any], journal: Journal, again: Callable[[], None]
) -> None:
    settings.clock = lambda: datetime(2026, 3, 1, 23, 59, tzinfo=UTC).timestamp()
    with FakeModel(["one " * 40, "two " * 40]):
        report.run_sync("tea")
    settings.clock = lambda: datetime(2026, 3, 2, 0, 1, tzinfo=UTC).timestamp()
    with FakeModel(["three"]):
        asyncio.run(_scratch())
        again()
        report.run_sync("tea")
    by_model = cost("model")
    by_key = {key: Decimal(orjson.loads(text)["cost"]) for key, text in journal.scan("m/")}
    assert len(by_key) == 3 and sum(by_key.values()) == dollars(journal)
    of_run = sorted(value for key, value in by_key.items() if "/scratch/" not in key)
    of_scratch = next(value for key, value in by_key.items() if "/scratch/" in key)
    assert by_model[FIRST]["paid"] == float(of_run[0] + of_scratch) and by_model[FIRST]["calls"] == 2
    assert by_model[SECOND]["paid"] == by_model[SECOND]["saved"] == float(of_run[1])
    assert by_model[FIRST]["saved"] == float(of_run[0])
    by_workflow = cost("workflow")
    assert {name: (line["calls"], line["paid"]) for name, line in by_workflow.items()} == {
        "report": (2, float(sum(of_run))),
        "scratch": (1, float(of_scratch)),
    }
    by_step = cost("step")
    assert {name: (line["workflow"], line["paid"], line["saved"]) for name, line in by_step.items()} == {
        "draft": ("report", float(of_run[0]), float(of_run[0])),
        "assess": ("report", float(of_run[1]), float(of_run[1])),
        "alone": ("scratch", float(of_scratch), 0.0),
    }
    by_day = cost("day")
    assert list(by_day) == ["2026-03-01", "2026-03-02"]
    assert by_day["2026-03-01"]["paid"] == float(sum(of_run)) and by_day["2026-03-01"]["saved"] == 0
    assert by_day["2026-03-02"]["paid"] == float(of_scratch) and by_day["2026-03-02"]["saved"] == float(sum(of_run))


async def _scratch() -> None:
    await generate_content("by itself", model=FIRST, name="alone")


def test_the_table_shows_the_same_with_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeModel(["one", "two"]):
        report.run_sync("tea")
    capsys.readouterr()
    assert run(["cost", "--by", "step"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["WORKFLOW", "STEP", "CALLS", "IN", "OUT", "PAID", "SAVED", "IN", "DOUBT", "WASTED"]
    assert [line.split()[:3] for line in lines[1:3]] == [["report", "assess", "1"], ["report", "draft", "1"]]
    assert lines[3].split()[:2] == ["total", "2"]


def test_cost_says_what_it_cannot_group_by_and_makes_no_journal(
    capsys: pytest.CaptureFixture[str], journal_path: Path
) -> None:
    assert run(["cost", "--by", "colour"]) == 2
    assert "model, workflow, step, day" in capsys.readouterr().err
    assert run(["cost", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [] and not journal_path.exists()


async def test_amounts_are_exact_decimals_and_the_price_stands_beside_each_call(journal: Journal) -> None:
    with FakeModel(["x" * 4] * 30):
        for n in range(30):
            await generate_content("a", model=FIRST, sample=n + 1)
    for facts in rows(journal):
        assert facts["price"]["per_million"] == {"input": "0.1", "output": "0.3", "cached": "0.1"}
        exact = (facts["in"] * Decimal("0.1") + facts["out"] * Decimal("0.3")) / 1_000_000
        assert Decimal(facts["cost"]) == exact
    ledger.set_price("first", 1000, 1000)
    line = costlines.summary(journal)[0]
    assert line.paid == sum(Decimal(facts["cost"]) for facts in rows(journal)) == dollars(journal)


async def test_an_unknown_price_is_unknown_and_never_zero(
    cost: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with FakeModel(["1", "2", "3"]):
        await generate_content("x", model="openai:never-heard-of")
        await generate_content("x", model=FIRST, name="other")
        await generate_content("y", model="openai:never-heard-of", name="other")
    lines = cost("model")
    assert lines["openai:never-heard-of"]["paid"] is None and lines["openai:never-heard-of"]["unknown"] == 2
    assert lines[FIRST]["unknown"] == 0
    mixed = cost("step")["other"]
    assert mixed["paid"] == lines[FIRST]["paid"] and mixed["unknown"] == 1
    assert run(["cost"]) == 0
    out = capsys.readouterr().out
    assert [line.count("unknown") for line in out.splitlines()] == [0, 0, 1, 1], out
    assert "+ 2 unknown" in out.splitlines()[-1], out


async def test_embeddings_are_in_the_ledger_too(cost: Callable[..., Any], journal: Journal) -> None:
    ledger.set_price("vectors", 1, 0)
    with FakeModel([]):
        await embed(["a" * 400, "b"], model="openai:vectors")
        await embed(["b", "c"], model="openai:vectors")
    line = cost("model")["openai:vectors"]
    assert line["calls"] == 2 and line["paid"] == float(dollars(journal)) > 0


# -- wasted ------------------------------------------------------------------------------------------------------------


async def test_what_failed_attempts_paid_is_wasted_until_it_is_of_use(
    journal: Journal, again: Callable[[], None]
) -> None:
    class Count(BaseModel):
        wrong: int

    class Word(BaseModel):
        wrong: str

    kind: list[Any] = [Count]

    @workflow("parse")
    async def parse(ctx: Any) -> Any:
        return await generate_content("a number", model=FIRST, output_type=kind[0], reask=0)

    with FakeModel(['{"wrong": "not a number"}']):
        with pytest.raises(InvalidReply):
            await parse.run()
        assert costlines.summary(journal)[0].wasted == dollars(journal) > 0
        again()
        kind[0] = Word
        assert await parse.run() == Word(wrong="not a number")
    line = costlines.summary(journal)[0]
    assert line.calls == 1 and line.wasted == 0 and line.paid == dollars(journal)


async def test_a_retry_that_asks_anew_wastes_what_the_attempt_before_had_paid_inside(journal: Journal) -> None:
    tries: list[str] = []

    async def work() -> str:
        text = await generate_content("inside", model=FIRST)
        tries.append(text)
        if len(tries) == 1:
            raise ValueError("not good enough")
        return text

    @workflow("work")
    async def flow(ctx: Any) -> str:
        return await step("work", work, retry={"max_attempts": 2, "initial_delay": 0})

    with FakeModel(["first " * 20, "second"]):
        assert await flow.run() == "second"
    first, second = (Decimal(orjson.loads(text)["cost"]) for _, text in journal.scan("m/"))
    line = costlines.summary(journal)[0]
    assert line.paid == first + second and line.wasted == max(first, second)


async def test_a_step_that_failed_for_good_has_not_wasted_the_calls_that_it_will_reuse(
    journal: Journal, again: Callable[[], None]
) -> None:
    works = threading.Event()  # not compared: what the step is given stays the same

    async def work() -> str:
        text = await generate_content("inside", model=FIRST)
        if not works.is_set():
            raise ValueError("later")
        return text

    @workflow("work")
    async def flow(ctx: Any) -> str:
        return await step("work", work)

    with FakeModel(["answer"]):
        with pytest.raises(ValueError):
            await flow.run()
        works.set()
        again()
        assert await flow.run() == "answer"
    line = costlines.summary(journal)[0]
    assert line.calls == 1 and line.wasted == 0


# -- in doubt ----------------------------------------------------------------------------------------------------------


def test_a_call_in_flight_at_a_kill_is_in_doubt_with_what_it_may_have_cost(tmp_path: Path) -> None:
    program = """
        import threading, time
        from agentflow import ledger
        ledger.set_price("first", 1, 2)
        @workflow("ask")
        async def flow(ctx):
            return await generate_content("slow", model="openai:first", max_tokens=1000)
        if "die" in sys.argv:
            def watch():
                while not (HERE / "arrived").exists():
                    time.sleep(0.005)
                die()
            threading.Thread(target=watch).start()
        print(flow.run_sync())
    """

    class Marks(Loopback):
        def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
            (tmp_path / "arrived").touch()
            return super().arrive(asked, path)

    with Marks(script=["hang"]) as server:
        run_program(program, tmp_path, "die", env=server.environment, expect_kill=True)
        run_program(program, tmp_path, env=server.environment)
        run_program(program, tmp_path, env=server.environment)
        assert len(server.arrived) == 2
    line = costlines.summary(Journal.open(tmp_path / "journal"))[0]
    assert (line.calls, line.in_doubt) == (1, 1)
    assert line.in_doubt_at_most is not None and Decimal("0.002") < line.in_doubt_at_most < Decimal("0.0021")


async def test_a_call_that_timed_out_or_whose_connection_broke_is_in_doubt_and_a_refused_one_is_not(
    loopback: Callable[..., Loopback], journal: Journal
) -> None:
    server = loopback("hang", "reset", {"status": 500, "body": {"error": {"message": "down"}}}, None)
    for timeout in (0.2, 30, 30):
        with pytest.raises(ModelError):
            await generate_content("hi", model=FIRST, timeout=timeout, retry={"max_attempts": 1})
    await generate_content("hi", model=FIRST)
    line = costlines.summary(journal)[0]
    assert (line.calls, line.in_doubt, len(server.arrived)) == (1, 2, 4)


async def test_a_server_that_is_not_there_leaves_nothing_in_doubt(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(ModelError):
        await generate_content("hi", model=FIRST, retry={"max_attempts": 1})
    assert costlines.summary(journal) == []


# -- saved -------------------------------------------------------------------------------------------------------------


def test_what_a_script_did_not_pay_again_is_noted_when_its_process_ends(tmp_path: Path) -> None:
    program = """
        import asyncio
        from agentflow import ledger
        ledger.set_price("first", 1, 2)
        print(asyncio.run(generate_content("hi", model="openai:first", name="greet")))
    """
    with Loopback() as server:
        for _ in range(3):
            run_program(program, tmp_path, env=server.environment)
        assert len(server.arrived) == 1
    line = costlines.summary(Journal.open(tmp_path / "journal"), "step")[0]
    assert (line.name, line.workflow, line.calls) == ("greet", "scratch", 1)
    assert line.paid is not None and line.saved == 2 * line.paid


async def test_a_run_without_model_calls_writes_no_row(journal: Journal) -> None:
    @workflow("plain")
    async def flow(ctx: Any) -> int:
        return await step("one", lambda: 1)

    await flow.run()
    await flow.run()
    assert rows(journal) == []
