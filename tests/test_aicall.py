"""Model calls as steps: recorded raw before anything validates them, and never bought twice."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

import agentflow
from agentflow import (
    Context,
    InvalidReply,
    ModelError,
    Refused,
    Reply,
    Retry,
    StepFailed,
    Truncated,
    aicall,
    generate_content,
    load_prompt,
    runs,
    step,
    sync,
    workflow,
)
from agentflow.journal import Journal
from agentflow.ledger import set_price
from agentflow.testing import FakeModel
from tests.loopback import Loopback, answer_to
from tests.programs import notes, run_program

MODEL = "openai:gpt-4o-mini"
MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]


class City(BaseModel):
    name: str
    people: int


class Town(BaseModel):
    name: str
    people: str


@pytest.fixture(autouse=True)
def _price() -> None:
    set_price("test-model", input=1, output=2)


# -- where a call stands -------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", MODELS)
async def test_call_in_a_workflow_is_paid_once_with_every_provider(
    model_name: str, again: Callable[[], None]
) -> None:
    @workflow("asks")
    async def flow(ctx: Context, topic: str) -> str:
        return await generate_content(f"About {topic}", model=model_name, system="Be brief.")

    with FakeModel(["a fine answer"]) as model:
        assert await flow.run("rivers") == "a fine answer"
        again()
        assert await flow.run("rivers") == "a fine answer"
    assert [c["text"] for c in model.calls] == ["About rivers"]
    (record,) = flow.runs()[0].steps
    assert (record.kind, record.name, record.status) == ("ai", "generate_content", "completed")
    assert record.model == model_name.partition(":")[2] and record.usage.output_tokens > 0


async def test_calls_stand_in_a_workflow_in_a_step_and_outside_both(again: Callable[[], None]) -> None:
    async def draft(topic: str) -> str:
        return (await generate_content(f"draft {topic}", model=MODEL, name="draft-call")).upper()

    @workflow("places")
    async def flow(ctx: Context, topic: str) -> list[str]:
        return [await step("draft", draft, topic), await generate_content("title", model=MODEL, name="title")]

    with FakeModel(lambda asked: asked["text"]) as model:
        for _ in range(2):
            assert await flow.run("x") == ["DRAFT X", "title"]
            assert await generate_content("alone", model=MODEL) == "alone"
            again()
    assert sorted(c["text"] for c in model.calls) == ["alone", "draft x", "title"]
    assert [(s.name, s.parent, s.kind) for s in runs.list()[0].steps] == [
        ("draft", None, "step"),
        ("draft-call", "draft", "ai"),
        ("title", None, "ai"),
    ]


async def test_gather_of_calls_in_any_order_gives_each_its_own(again: Callable[[], None]) -> None:
    @workflow("gather")
    async def flow(ctx: Context, topics: list[str]) -> list[str]:
        return list(await asyncio.gather(*(generate_content(t, model=MODEL) for t in topics)))

    async def slow(asked: Any) -> str:
        await asyncio.sleep(0.002 * (5 - int(asked["text"][1:])))
        return str(asked["text"])

    topics = [f"t{n}" for n in range(5)]
    with FakeModel(slow) as model:
        assert await flow.run(topics) == topics
        again()
        assert await flow.run(topics) == topics
    assert len(model.calls) == 5


async def test_sample_asks_the_same_question_again_on_purpose(again: Callable[[], None]) -> None:
    @workflow("samples")
    async def flow(ctx: Context) -> list[str]:
        return [await generate_content("roll", model=MODEL, sample=n) for n in range(3)]

    with FakeModel(["1", "2", "3"]):
        assert await flow.run() == ["1", "2", "3"]
        again()
        assert await flow.run() == ["1", "2", "3"]


# -- recorded before it is validated -------------------------------------------------------------


def test_reply_saved_before_a_kill_is_not_bought_again(tmp_path: Path) -> None:
    program = """
        import agentflow.aicall as aicall
        if "die" in sys.argv:
            save = aicall._Recorder.save
            async def save_and_die(self, raw, **more):
                await save(self, raw, **more)
                die()
            aicall._Recorder.save = save_and_die

        @workflow("ask")
        async def flow(ctx):
            inside = await step("inside", lambda: generate_content("in a step", model="openai:gpt-4o-mini"))
            return [inside, await generate_content("by itself", model="anthropic:claude-haiku-4-5")]
        print(flow.run_sync())
    """
    with Loopback() as server:
        run_program(program, tmp_path, "die", env=server.environment, expect_kill=True)
        assert len(server.arrived) == 1
        run_program(program, tmp_path, "die", env=server.environment, expect_kill=True)
        assert len(server.arrived) == 2
        ended = run_program(program, tmp_path, env=server.environment)
        assert len(server.arrived) == 2, "nothing was bought again"
    assert answer_to("in a step") in ended.out and answer_to("by itself") in ended.out
    assert "doubt" not in ended.err, "a reply that is there leaves nothing in doubt"


def test_call_in_flight_at_a_kill_is_reported_as_in_doubt_and_asked_again(tmp_path: Path) -> None:
    program = """
        import threading, time
        @workflow("ask")
        async def flow(ctx):
            return await generate_content("slow", model="openai:gpt-4o-mini")
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

    with Marks(script=["hang", None]) as server:
        run_program(program, tmp_path, "die", env=server.environment, expect_kill=True)
        ended = run_program(program, tmp_path, env=server.environment)
        assert len(server.arrived) == 2
    assert "in doubt" in ended.err and "asked again" in ended.err


async def test_raw_reply_request_and_usage_are_in_the_journal_even_if_it_does_not_validate(journal: Journal) -> None:
    @workflow("invalid")
    async def flow(ctx: Context) -> City:
        return await generate_content("city", model=MODEL, output_type=City, reask=0)

    with FakeModel(["no json at all"]):
        with pytest.raises(InvalidReply) as caught:
            await flow.run()
    assert caught.value.reply.text == "no json at all"
    records = [orjson.loads(text) for _, text in journal.scan("m/")]
    (record,) = records
    assert "no json at all" in json.dumps(record["body"]) and record["request"]["model"] == "gpt-4o-mini"
    assert record["usage"]["output_tokens"] > 0 and record["request_id"] == "req_fake_1"
    assert record["status"] == 200


async def test_no_api_key_is_recorded_anywhere(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-very-secret-0123456789abcdef")
    with FakeModel(["hello"]):
        await generate_content("hi", model=MODEL)
    everything = "\n".join(f"{key} {text}" for key, text in journal.scan(""))
    assert "hello" in everything and "very-secret" not in everything


# -- output types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output_type, reply, expected",
    [
        (str, "text", "text"),
        (City, City(name="Rome", people=3), City(name="Rome", people=3)),
        (list[str], ["a", "b"], ["a", "b"]),
        (int, 7, 7),
        (bool, True, True),
        (list[City], [City(name="a", people=1)], [City(name="a", people=1)]),
    ],
)
async def test_output_types_are_the_same_the_first_time_and_on_replay(
    output_type: Any, reply: Any, expected: Any, again: Callable[[], None]
) -> None:
    @workflow("types")
    async def flow(ctx: Context) -> Any:
        value = await generate_content("x", model=MODEL, output_type=output_type)
        seen.append(value)
        return value

    seen: list[Any] = []
    with FakeModel([reply]):
        await flow.run()
        again()
        await flow.run()
    assert seen == [expected, expected] and type(seen[1]) is type(expected)


@pytest.mark.parametrize("model_name", MODELS)
async def test_reply_carries_text_usage_and_messages_that_continue_the_conversation(
    model_name: str, again: Callable[[], None]
) -> None:
    @workflow("talks")
    async def flow(ctx: Context) -> list[Any]:
        first = await generate_content("Hi", model=model_name, system="Be kind.", output_type=Reply)
        second = await generate_content(
            [*first.messages, {"role": "user", "content": "And you?"}], model=model_name, output_type=Reply[City]
        )
        seen.append((first, second))
        return [first.text, second.output]

    seen: list[Any] = []
    with FakeModel(["Hello", City(name="Rome", people=3)]) as model:
        for _ in range(2):
            assert await flow.run() == ["Hello", City(name="Rome", people=3)]
            again()
    first, second = seen[0]
    assert seen[1] == seen[0]
    assert first.output == first.text == "Hello" and first.finish_reason == "stop"
    assert first.usage.input_tokens > 0 and first.model
    assert second.output == City(name="Rome", people=3) and json.loads(second.text)["name"] == "Rome"
    assert len(second.messages) == len(first.messages) + 2
    assert "Hi" in json.dumps(model.calls[1]["body"]) and "Hello" in json.dumps(model.calls[1]["body"])


async def test_reply_that_does_not_validate_is_asked_about_again_and_each_turn_recorded(
    journal: Journal, again: Callable[[], None]
) -> None:
    @workflow("reask")
    async def flow(ctx: Context) -> City:
        return await generate_content("city", model=MODEL, output_type=City)

    with FakeModel(['{"name": "Rome"}', City(name="Rome", people=3)]) as model:
        assert await flow.run() == City(name="Rome", people=3)
        again()
        assert await flow.run() == City(name="Rome", people=3)
    assert len(model.calls) == 2 and "people" in model.calls[1]["text"]
    assert len(list(journal.scan("m/"))) == 2
    (record,) = flow.runs()[0].steps
    assert record.attempts == 1 and record.usage.output_tokens >= 2


def test_kill_between_the_turns_of_a_reask_pays_for_the_second_turn_only(tmp_path: Path) -> None:
    program = """
        import agentflow.aicall as aicall
        from pydantic import BaseModel
        class City(BaseModel):
            name: str
        if "die" in sys.argv:
            save = aicall._Recorder.save
            async def save_and_die(self, raw, **more):
                await save(self, raw, **more)
                die()
            aicall._Recorder.save = save_and_die
        @workflow("reask")
        async def flow(ctx):
            return (await generate_content("city", model="openai:gpt-4o-mini", output_type=City)).name
        print(flow.run_sync())
    """
    script = [{"text": "no json"}, {"text": '{"name": "Rome"}'}]
    with Loopback(script=script) as server:
        run_program(program, tmp_path, "die", env=server.environment, expect_kill=True)
        assert run_program(program, tmp_path, env=server.environment).out == "Rome\n"
        assert len(server.arrived) == 2


async def test_edited_schema_tries_the_paid_reply_first(again: Callable[[], None], tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    source = """
from pydantic import BaseModel
from agentflow import workflow, generate_content
class Answer(BaseModel):
    name: str
    people: {kind}
@workflow("schema-edit")
async def flow(ctx):
    return (await generate_content("city", model="openai:gpt-4o-mini", output_type=Answer, reask=0)).people
"""
    with FakeModel(['{"name": "Rome", "people": "three million"}'] * 2, all_used=False) as model:
        exec(source.format(kind="int"), space)
        with pytest.raises(InvalidReply):
            await space["flow"].run()
        assert len(model.calls) == 1
        again()
        exec(source.format(kind="str"), space)
        assert await space["flow"].run() == "three million"
    assert len(model.calls) == 1, "the reply that was paid for is tried first"


@pytest.mark.parametrize(
    "scripted, error",
    [(Truncated("half an ans"), Truncated), (Refused("I will not"), Refused)],
)
async def test_reply_that_is_no_answer_raises_with_the_reply_and_is_not_asked_again_by_itself(
    scripted: Exception, error: type[ModelError]
) -> None:
    @workflow("no-answer")
    async def flow(ctx: Context) -> str:
        return await generate_content("x", model=MODEL)

    with FakeModel([scripted]) as model:
        with pytest.raises(error) as caught:
            await flow.run()
    assert isinstance(caught.value, StepFailed) and caught.value.step == "generate_content"
    assert caught.value.reply.text == str(scripted) and caught.value.status == 200
    assert len(model.calls) == 1


# -- retries -------------------------------------------------------------------------------------


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    delays: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float, result: Any = None) -> Any:
        if seconds > 0.2:
            delays.append(seconds)
            seconds = 0
        return await sleep(seconds, result)

    monkeypatch.setattr("agentflow.drive.asyncio.sleep", noted)
    return delays


async def test_transient_errors_are_retried_three_attempts_in_all(no_delay: list[float]) -> None:
    @workflow("transient")
    async def flow(ctx: Context, n: int) -> str:
        return await generate_content(f"x{n}", model=MODEL)

    with FakeModel([503, ConnectionError("reset"), "at last"]) as model:
        assert await flow.run(1) == "at last"
    assert len(model.calls) == 3 and flow.runs()[0].steps[0].attempts == 3
    with FakeModel([500, 529, TimeoutError("slow"), "never"], all_used=False) as model:
        with pytest.raises(ModelError):
            await flow.run(2)
        assert len(model.calls) == 3


async def test_retry_after_of_the_server_is_honoured(no_delay: list[float]) -> None:
    with FakeModel([ModelError("slow down", status=429, retry_after=7), "ok"]):
        assert await generate_content("x", model=MODEL) == "ok"
    assert max(no_delay) == 7


@pytest.mark.parametrize("status", [400, 401, 404])
async def test_errors_that_stay_are_not_retried(status: int) -> None:
    with FakeModel([status]) as model:
        with pytest.raises(ModelError) as caught:
            await generate_content("x", model=MODEL)
    assert caught.value.status == status and len(model.calls) == 1


async def test_call_in_a_step_with_its_own_retry_makes_one_attempt_each(no_delay: list[float]) -> None:
    async def ask() -> str:
        return await generate_content("x", model=MODEL)

    @workflow("no-product")
    async def flow(ctx: Context) -> str:
        return await step("ask", ask, retry=Retry(max_attempts=2, initial_delay=0.001))

    with FakeModel([503] * 6, all_used=False) as model:
        with pytest.raises(ModelError):
            await flow.run()
    assert len(model.calls) == 2


async def test_own_retry_of_a_call_says_how_often(no_delay: list[float]) -> None:
    with FakeModel([503, 503, 503, 503, "fifth"]) as model:
        answer = await generate_content("x", model=MODEL, retry={"max_attempts": 5, "initial_delay": 0.001})
    assert answer == "fifth" and len(model.calls) == 5


async def test_retry_of_a_step_asks_the_model_anew_or_reuses_by_resample(no_delay: list[float]) -> None:
    def body(retry: Retry, n: int) -> Any:
        async def ask() -> str:
            text = await generate_content(f"number {n}", model=MODEL)
            if text == "bad":
                raise ValueError("bad")
            return text

        return step("ask", ask, retry=retry)

    @workflow("resample")
    async def flow(ctx: Context, n: int, resample: bool) -> str:
        return str(await body(Retry(max_attempts=2, initial_delay=0.001, resample=resample), n))

    with FakeModel(["bad", "good"]) as model:
        assert await flow.run(1, True) == "good"
        assert len(model.calls) == 2
    with FakeModel(["bad"]) as model:
        with pytest.raises(ValueError):
            await flow.run(2, False)
        assert len(model.calls) == 1


async def test_attempt_that_ran_out_of_time_leaves_what_it_has_paid_for_to_the_next(no_delay: list[float]) -> None:
    tried: list[str] = []

    async def research() -> str:
        text = await generate_content("Look it up", model=MODEL)
        tried.append(text)
        if len(tried) == 1:
            await asyncio.Event().wait()  # what comes after the call never ends
        return text

    @workflow("slow-after-the-call")
    async def flow(ctx: Context) -> str:
        return await step("research", research, timeout=2, retry=Retry(max_attempts=9, initial_delay=0.001))

    with FakeModel(["found"]) as model:
        assert await flow.run() == "found"
    assert tried == ["found", "found"] and len(model.calls) == 1


async def test_answer_that_an_attempt_out_of_time_has_left_gives_no_attempt_for_nothing(no_delay: list[float]) -> None:
    begun, tried = 0, []

    async def research() -> str:
        nonlocal begun
        begun += 1
        text = await generate_content("Look it up", model=MODEL)
        tried.append(text)
        if len(tried) == 1:
            await asyncio.Event().wait()
        raise ValueError("a bad answer")

    @workflow("bad-and-late")
    async def flow(ctx: Context) -> str:
        return await step("research", research, timeout=2, retry=Retry(max_attempts=3, initial_delay=0.001))

    with FakeModel(["bad", "worse", "worst"], all_used=False):
        run = await flow.start()
    assert run.status == "failed" and run.steps[0].attempts == begun == 3
    assert tried[:2] == ["bad", "bad"] and run.saved == 0


async def test_reply_that_an_attempt_out_of_time_had_saved_gives_no_attempt_for_nothing(
    monkeypatch: pytest.MonkeyPatch, no_delay: list[float]
) -> None:
    begun = saves = 0
    tried_all = asyncio.Event()
    save = aicall._Recorder.save

    async def saves_and_waits(self: Any, raw: Any, **how: Any) -> None:
        nonlocal saves
        saves += 1
        first = saves == 1
        await save(self, raw, **how)
        if first:  # its attempt is given up meanwhile
            await tried_all.wait()

    monkeypatch.setattr(aicall._Recorder, "save", saves_and_waits)

    async def count() -> int:
        nonlocal begun
        begun += 1
        await generate_content("How many?", model=MODEL, output_type=int)
        tried_all.set()
        raise ValueError("a bad answer")

    @workflow("half-and-late")
    async def flow(ctx: Context) -> int:
        return await step("count", count, timeout=2, retry=Retry(max_attempts=2, initial_delay=0.001))

    with FakeModel(["many", "3", "4"], all_used=False):
        run = await flow.start()
    assert run.status == "failed" and run.steps[0].attempts == begun == 2
    assert run.saved == 0


def test_attempt_of_plain_code_that_ran_out_of_time_leaves_what_it_has_paid_for_to_the_next() -> None:
    tried: list[str] = []
    go = threading.Event()

    def research() -> str:
        text = sync.generate_content("Look it up", model=MODEL)
        tried.append(text)
        if len(tried) == 1:
            go.wait()  # what comes after the call does not end in time
            raise ValueError("too late")
        return text

    @sync.workflow("slow-after-the-call-plain")
    def flow(ctx: Context) -> str:
        return sync.step("research", research, timeout=2, retry=Retry(max_attempts=9, initial_delay=0.001))

    with FakeModel(["found"]) as model:
        assert flow.run() == "found"
        go.set()
    assert tried == ["found", "found"] and len(model.calls) == 1


@pytest.mark.parametrize("resample", [True, False])
async def test_reply_that_comes_after_its_attempt_ran_out_of_time_is_used_by_the_next(
    resample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, save = asyncio.Event(), aicall._Recorder.save
    tried = 0

    async def saves_late(self: Any, raw: Any, **how: Any) -> None:
        await given_up.wait()
        await save(self, raw, **how)

    def rows() -> list[str]:
        return [key for key, _ in Journal.open(os.environ["AGENTFLOW_PATH"]).scan("m/")]

    async def research() -> str:
        nonlocal tried
        tried += 1
        if tried > 1:
            given_up.set()
            while not rows():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return await generate_content("Hi", model=MODEL)

    monkeypatch.setattr(aicall._Recorder, "save", saves_late)

    @workflow("late-reply")
    async def flow(ctx: Context) -> str:
        retry = Retry(max_attempts=9, initial_delay=0.001, resample=resample)
        return await step("research", research, timeout=2, retry=retry)

    with FakeModel(["found", "again"], all_used=False) as model:
        assert await flow.run() == "found"
    assert len(model.calls) == len(rows()) == 1 and tried > 1


@pytest.mark.parametrize("resample", [True, False])
async def test_replies_to_several_attempts_that_ran_out_of_time_are_all_recorded(
    resample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow("late-replies")
    async def flow(ctx: Context) -> str:
        retry = Retry(max_attempts=99, initial_delay=0.001, backoff="fixed", resample=resample)
        return await step("ask", lambda: generate_content("Hi", model=MODEL), timeout=0.4, retry=retry)

    with Loopback(latency=1) as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        run = await flow.start()
        assert await run == answer_to("Hi")
        journal = Journal.open(os.environ["AGENTFLOW_PATH"])
        kept = [key for key, _ in journal.scan("m/")]
        assert len(server.arrived) == len(kept) > 1
        assert runs.get(run.id).cost == len(kept) * Decimal("0.00000555")


# -- what an edit means --------------------------------------------------------------------------


async def test_other_default_model_asks_again_and_back_reuses(
    again: Callable[[], None], said: Callable[[], str]
) -> None:
    @workflow("default-model")
    async def flow(ctx: Context) -> str:
        return await step("ask", ask)

    async def ask() -> str:
        return await generate_content("who?")

    with FakeModel(lambda asked: asked["model"]) as model:
        for name, calls in (("gpt-4o-mini", 1), ("gpt-4o", 2), ("gpt-4o-mini", 2)):
            agentflow.configure(model=f"openai:{name}")
            again()
            assert await flow.run() == name
            assert len(model.calls) == calls
    assert "ask ran again: model changed from openai:gpt-4o-mini to openai:gpt-4o" in said()


async def test_edited_prompt_file_is_noticed_and_names_the_call(
    again: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    file = folder / "triage.md"

    @workflow("prompt-file")
    async def flow(ctx: Context, topic: str) -> list[str]:
        direct = await generate_content(load_prompt("triage", topic=topic), model=MODEL)
        nested = await step("nested", nested_ask, topic)
        return [direct, nested]

    async def nested_ask(topic: str) -> str:
        return await generate_content(load_prompt("triage", topic=topic), model=MODEL)

    with FakeModel(lambda asked: asked["text"]) as model:
        for text, calls in (("One {{topic}}", 2), ("One {{topic}}", 2), ("Two {{topic}}", 4), ("One {{topic}}", 4)):
            file.write_text(text)
            again()
            expected = text.replace("{{topic}}", "x")
            assert await flow.run("x") == [expected, expected]
            assert len(model.calls) == calls, text
    assert {s.name for s in flow.runs()[0].steps} == {"triage", "nested"}


async def test_edit_that_changes_no_request_costs_nothing(again: Callable[[], None]) -> None:
    source = """
from agentflow import workflow, step, generate_content
async def ask(topic):
    text = await generate_content(f"about {{topic}}", model="openai:gpt-4o-mini")
    return {after}
@workflow("post-processing")
async def flow(ctx, topic):
    return await step("ask", ask, topic)
"""
    space: dict[str, Any] = {}
    with FakeModel(["Rome"]) as model:
        for after, expected in (("text", "Rome"), ("text.upper()", "ROME"), ("text * 2", "RomeRome")):
            exec(source.format(after=after), space)
            again()
            assert await space["flow"].run("x") == expected
    assert len(model.calls) == 1


# -- money ---------------------------------------------------------------------------------------


async def test_cost_is_paid_once_and_what_replays_avoid_is_reported_as_saved(
    again: Callable[[], None], said: Callable[[], str]
) -> None:
    @workflow("costs")
    async def flow(ctx: Context) -> list[str]:
        return [
            await generate_content("a" * 4000, model="openai:test-model"),
            await step("in", lambda: generate_content("b" * 8000, model="openai:test-model")),
        ]

    with FakeModel(["x" * 400, "y" * 400]):
        await flow.run()
    run = flow.runs()[0]
    calls = [s for s in run.steps if s.kind == "ai"]
    expected = sum(
        (Decimal(s.usage.input_tokens) * 1 + Decimal(s.usage.output_tokens) * 2) / 1_000_000 for s in calls
    )
    assert run.cost == expected > 0 and run.saved == 0
    assert [s.cost for s in run.steps if s.name == "in"] == [calls[1].cost]
    assert f"paid ${expected:.4f}, saved $0.0000" in said()
    again()
    await flow.run()
    run = flow.runs()[0]
    assert run.cost == expected and run.saved == expected
    assert f"paid $0.0000, saved ${expected:.4f}" in said()


async def test_unknown_price_is_said_and_never_zero(said: Callable[[], str], again: Callable[[], None]) -> None:
    @workflow("unpriced")
    async def flow(ctx: Context) -> str:
        return await generate_content("x", model="openai:never-heard-of")

    with FakeModel(["y"]):
        await flow.run()
    assert "1 of unknown price" in said()
    run = flow.runs()[0]
    assert run.cost == 0 and run.steps[0].cost is None


async def test_failed_call_was_paid_for_all_the_same(said: Callable[[], str]) -> None:
    @workflow("failed-paid")
    async def flow(ctx: Context) -> City:
        return await generate_content("x" * 4000, model="openai:test-model", output_type=City, reask=0)

    with FakeModel(["no json"]):
        with pytest.raises(InvalidReply):
            await flow.run()
    assert flow.runs()[0].cost > 0


async def test_reply_reports_its_own_cost() -> None:
    with FakeModel(["x"]):
        reply = await generate_content("a" * 4000, model="openai:test-model", output_type=Reply)
    assert reply.cost == (Decimal(reply.usage.input_tokens) + 2 * Decimal(reply.usage.output_tokens)) / 1_000_000


def test_cancelled_sibling_lets_a_paid_call_in_flight_finish_and_be_recorded(tmp_path: Path) -> None:
    program = """
        @workflow("siblings")
        async def flow(ctx):
            async def fails():
                while not (HERE / "arrived").exists():
                    await asyncio.sleep(0.005)
                if "fail" in sys.argv:
                    raise ValueError("no")
                return 1
            async with asyncio.TaskGroup() as group:
                group.create_task(step("fails", fails))
                answer = group.create_task(generate_content("slow", model="openai:gpt-4o-mini"))
            return answer.result()
        try:
            print(flow.run_sync())
        except* ValueError:
            print("failed")
    """

    class Marks(Loopback):
        def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
            (tmp_path / "arrived").touch()
            return super().arrive(asked, path)

    with Marks(latency=0.4) as server:
        assert run_program(program, tmp_path, "fail", env=server.environment).out == "failed\n"
        assert run_program(program, tmp_path, env=server.environment).out == f"{answer_to('slow')}\n"
        assert len(server.arrived) == 1
    assert notes(tmp_path) == []


async def test_what_the_sdk_starts_for_a_request_is_not_cancelled_with_the_run(journal: Journal) -> None:
    asked = asyncio.Event()

    async def reply(request: Any) -> str:
        asked.set()
        await asyncio.create_task(asyncio.sleep(0.05))  # as a connection is made, in a task of its own
        return "paid"

    async def fails() -> None:
        await asked.wait()
        raise ValueError("no")

    @workflow("siblings")
    async def siblings(ctx: Context) -> Any:
        calls = [generate_content("Hi", model="openai:gpt-4o-mini"), step("fails", fails)]
        return await agentflow.parallel(calls)

    with FakeModel(reply), pytest.raises(ValueError, match="no"):
        await siblings.run()
    assert sum(1 for _ in journal.scan("m/")) == 1
