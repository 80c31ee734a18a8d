"""The contract, statement by statement: names, signatures, defaults, attributes, what errors name, exit codes, JSON.

What a statement means in depth is tested elsewhere; here it is held to the letter, from outside.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import re
import sys
import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import agentflow
from agentflow import (
    BudgetExceeded,
    CapturedChanged,
    ContentFiltered,
    Context,
    Decision,
    HumanTaskExpired,
    InvalidReply,
    ModelError,
    Refused,
    Reply,
    Retry,
    Run,
    StepChanged,
    StepFailed,
    StepTimeout,
    TaskClosed,
    TaskRejected,
    Truncated,
    UsageError,
    Waiting,
    Workflow,
    configure,
    current_step,
    generate_content,
    human_task,
    load_prompt,
    parallel,
    runs,
    send_event,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.cli.app import run as cli
from agentflow.testing import FakeClock, FakeModel

MODEL = "openai:gpt-5-mini"
done: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    done.clear()


def do(what: Any) -> Any:
    done.append(what)
    return what


class Purchase(BaseModel):
    id: str
    total: Decimal = Decimal(0)


class Form(BaseModel):
    amount: int


# -- names and signatures -------------------------------------------------------------------------


def test_the_names_that_a_program_imports_are_there_for_async_and_for_plain_code() -> None:
    names = """workflow Workflow Context Run step current_step parallel Retry generate_content Reply tool Prompt load_prompt
    human_task Decision runs tasks send_event configure generateContent humanTask""".split()
    for name in names:
        assert name in agentflow.__all__ and hasattr(agentflow, name)
        assert name in sync.__all__ and hasattr(sync, name)
    assert agentflow.generateContent is generate_content and agentflow.humanTask is human_task
    assert sync.generateContent is sync.generate_content and sync.humanTask is sync.human_task
    for name in agentflow.errors.__all__:
        assert getattr(agentflow, name) is getattr(agentflow.errors, name)


def defaults(fn: Any, *kinds: Any) -> dict[str, Any]:
    found = inspect.signature(fn).parameters.values()
    return {each.name: each.default for each in found if each.kind in (kinds or (inspect.Parameter.KEYWORD_ONLY,))}


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (
            step,
            dict(retry=None, timeout=None, idempotency_key=None, compensate=None, effect=False, secret=False, on_change=None,
                 in_doubt="rerun", max_age=None, thread=True),
        ),
        (
            generate_content,
            dict(data=None, model=None, system=None, output_type=str, tools=(), files=(), name=None, max_tokens=None,
                 temperature=None, reasoning=None, timeout=None, retry=None, max_turns=10, reask=1, sample=0,
                 background=False, batch=False, on_text=None, extra=None),
        ),
        (parallel, dict(concurrency=None, settle=False, timeout=None)),
        (sync.parallel, dict(concurrency=None, settle=False, timeout=None)),
        (parallel.map, dict(concurrency=None, key=None)),
        (sync.parallel.map, dict(concurrency=None, key=None)),
        (Workflow.options, dict(run_id=None, fresh=False, rerun=(), wait=False, busy="raise")),
        (human_task, dict(title=None, schema=None, timeout=None)),
        (sync.human_task, dict(title=None, schema=None, timeout=None)),
        (workflow, dict(timeout=None, budget=None, on_change="auto", run_id=None, execute=None)),
        (sync.workflow, dict(timeout=None, budget=None, on_change="auto", run_id=None, execute=None)),
    ],
)  # fmt: skip
def test_options_have_the_names_and_defaults_that_are_promised(fn: Any, expected: dict[str, Any]) -> None:
    found = defaults(fn)
    assert {name: found[name] for name in expected} == expected


def test_retry_has_the_fields_and_defaults_that_are_promised() -> None:
    retry = Retry()
    found = {name: getattr(retry, name) for name in inspect.signature(Retry).parameters}
    assert found == dict(
        max_attempts=3, backoff="exponential", initial_delay=1.0, max_delay=30.0, factor=2, jitter=True, retry_if=None, resample=True
    )
    for fn, names in (
        (send_event, ["name", "payload", "run_id"]),
        (tasks.answer, ["task_id", "data", "by", "comment"]),
        (human_task, ["type", "assign_to", "data"]),
    ):
        assert list(inspect.signature(fn).parameters)[: len(names)] == names
    assert Retry(initial_delay="1h30m").initial_delay == 5400 == Retry(initial_delay=timedelta(minutes=90)).initial_delay


# -- workflow and run -----------------------------------------------------------------------------


async def test_the_forms_of_a_workflow_and_of_its_run_give_one_result() -> None:
    async def fn(ctx: Context, order: Purchase) -> Decimal:
        return await step("total", lambda: do(order.total))

    flow = workflow(name="process-order", execute=fn)
    order = Purchase(id="a", total=Decimal("2.5"))
    assert isinstance(flow, Workflow) and flow.name == "process-order"
    assert await flow.run(order) == Decimal("2.5") == await asyncio.to_thread(flow.run_sync, order) == flow.run_sync(order)
    run = await flow.start(order)
    assert isinstance(run, Run) and await run == run.result() == Decimal("2.5")
    assert flow.get(run.id).id == run.id == flow.runs()[0].id == runs.get(run.id).id == runs.list()[0].id
    assert done == [Decimal("2.5")]
    named = {
        "id": run.id, "workflow": "process-order", "status": "completed", "input": order, "output": Decimal("2.5"),
        "error": None, "waiting_on": [], "cost": 0, "saved": 0,
    }  # fmt: skip
    assert {name: getattr(run, name) for name in named} == named
    assert run.started_at.tzinfo is not None and run.started_at <= run.completed_at
    for name in ("result", "cancel", "retry", "fork", "diff", "export"):
        assert callable(getattr(run, name))


async def test_arguments_are_validated_when_they_are_given_and_the_error_says_what_is_wrong() -> None:
    @workflow
    async def takes(ctx: Context, order: Purchase) -> str:
        return type(order).__name__

    with pytest.raises(UsageError, match=r"takes.*order\.total|takes.*order"):
        await takes.run({"total": "x"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="missing a required argument: 'order'"):
        await takes.run()  # type: ignore[call-arg]
    assert await takes.run({"id": "a"}) == "Purchase"  # type: ignore[arg-type]
    assert [run.status for run in runs.list()] == ["completed"]


async def test_fresh_begins_a_run_that_is_the_current_one_from_then_on() -> None:
    @workflow(run_id=lambda order: order.id)
    async def takes(ctx: Context, order: Purchase) -> str:
        return ctx.run_id

    assert await takes.run(Purchase(id="o")) == "o" == await takes.run(Purchase(id="o", total=Decimal(1)))
    second = await takes.options(fresh=True).run(Purchase(id="o"))
    assert second != "o" and await takes.run(Purchase(id="o")) == second


async def test_a_run_ends_with_a_line_and_one_that_only_replayed_says_when_it_had_finished(said: Any) -> None:
    @workflow("process-order")
    async def flow(ctx: Context) -> str:
        await step("one", do, 1)
        return await generate_content("Hello", model=MODEL)

    with FakeModel(["hi"]):
        await flow.run()
        await flow.run()
    run = runs.list()[0]
    first, second = [line for line in said().splitlines() if line.startswith(f"{run.id} · completed")]
    assert re.fullmatch(rf"{run.id} · completed · 2 steps: 0 replayed, 2 run · paid \$0\.\d{{4}}, saved \$0\.0000", first)
    assert re.fullmatch(rf"{run.id} · completed before, \d{{4}}-.* UTC · 2 steps: 2 replayed, 0 run · paid \$0\.0000, saved \$0\.\d{{4}}", second)


async def test_a_waiting_run_raises_waiting_from_run_and_is_returned_by_start() -> None:
    @workflow
    async def asks(ctx: Context) -> Decision:
        return await human_task(type="approve", assign_to="manager", data="draft", title="Send it?")

    with pytest.raises(Waiting) as waiting:
        await asks.run()
    (task,) = tasks.list()
    for word in (task.id, "Send it?", "manager", f"agentflow tasks approve {task.id}"):
        assert word in str(waiting.value)
    run = await asks.start()
    assert run.status == "waiting" and run.waiting_on[0]["id"] == task.id and waiting.value.run_id == run.id
    tasks.approve(task.id, by="Mia", comment="fine")
    decision = await run
    assert (decision.approved, bool(decision), decision.by, decision.comment, decision.data) == (True, True, "Mia", "fine", None)
    assert decision.at.tzinfo is not None and run.status == "completed"


def test_the_outside_modules_record_and_resume_nothing() -> None:
    @workflow
    async def asks(ctx: Context) -> list[Any]:
        await human_task(data=1)
        await step("after", do, "after")
        return [await ctx.wait_for_event("paid")]

    with pytest.raises(Waiting):
        asks.run_sync()
    tasks.approve(tasks.list()[0].id)
    send_event("paid", 7)
    assert done == [] and runs.list()[0].status == "waiting"
    assert asks.run_sync() == [7] and done == ["after"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda flow: flow.options(rerun="draft"), r"rerun=\['draft'\]"),
        (lambda flow: flow.options(busy="later"), '"raise" or "wait"'),
        (lambda flow: flow.options(run_id=""), "run_id"),
        (lambda flow: flow.options(fresh=True, rerun=["a"]), "fresh"),
        (lambda flow: workflow("x", on_change="never"), "'auto', 'rerun', 'reuse', 'error'"),
        (lambda flow: flow(), r"await flow\.run\(\.\.\.\)"),
    ],
)
def test_a_wrong_option_of_a_workflow_is_refused_with_the_right_form(wrong: Any, says: str) -> None:
    @workflow
    async def flow(ctx: Context) -> None: ...

    with pytest.raises(UsageError, match=says):
        made = wrong(flow)
        made(flow.fn)


# -- step -----------------------------------------------------------------------------------------


async def coroutine() -> None: ...


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: step("a", do, retry={"maxAttempts": 3}), 'write "max_attempts"'),
        (lambda: step("a", do, retry={"initialDelay": 1}), 'write "initial_delay"'),
        (lambda: Retry(initial_delay=2000), "initial_delay=2"),
        (lambda: step("a", do, retry={"max_attempts": 0}), "at least 1"),
        (lambda: step("a", do, timeout="soon"), "1h30m"),
        (lambda: step("a", do, in_doubt="maybe"), "'rerun', 'raise', 'ask'"),
        (lambda: step("a", do, on_change="maybe"), "'auto', 'rerun', 'reuse', 'error'"),
        (lambda: step("", do), "needs a name"),
        (lambda: step("a", do, retries=3), "retry=Retry"),
    ],
)
def test_a_wrong_option_of_a_step_is_refused_with_the_right_form(wrong: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        wrong()


def test_a_coroutine_instead_of_a_function_is_a_type_error_that_says_to_pass_the_function() -> None:
    made = coroutine()
    with pytest.raises(TypeError, match=r'pass the function.*step\("coroutine", coroutine'):
        step("a", made)


async def test_a_captured_variable_that_was_rebound_is_named_with_the_way_out() -> None:
    @workflow
    async def loops(ctx: Context) -> list[int]:
        calls = []
        for i in range(3):
            calls.append(step("s", lambda: i))
        return await parallel(calls)

    with pytest.raises(CapturedChanged, match=r"'i'.*step\('s', f, i\)"):
        await loops.run()


async def test_what_the_context_tells_of_a_step() -> None:
    @step("charge", retry=Retry(max_attempts=3, initial_delay=0, jitter=False))
    async def charge(order: str) -> str:
        current = current_step()
        done.append((current.name, current.attempt, current.idempotency_key, current.run_id))
        if current.attempt == 1:
            raise ConnectionError("once more")
        return f"{order} charged"

    seen: list[Any] = []

    @workflow
    async def flow(ctx: Context, number: int) -> None:
        await charge("a")
        await charge.options(idempotency_key="key-b")("b")
        await generate_content("Hello", model=MODEL, name="draft")
        first, second = ctx.steps.all("charge")
        seen.append([first, second, ctx.steps["charge"], ctx.steps["draft"], ctx.run_id, ctx.workflow, ctx.input])
        values = [ctx.now(), ctx.uuid4(), ctx.random(), ctx.now("later")]
        ctx.log.info("said")
        seen.append(values)

    with FakeModel(["hi"]) as model:
        await flow.run(7)
        await flow.run(7)
        cost = model.billed[0].cost
    (first, second, last, draft, run_id, name, given), values, again, values_again = seen
    assert values == values_again and values[0].tzinfo is not None and 0 <= values[2] < 1
    assert (run_id, name, given) == (runs.list()[0].id, "flow", 7)
    assert last == second and (first.name, first.kind, first.status, first.attempts) == ("charge", "step", "completed", 2)
    assert (first.output, second.output, first.error, first.replayed) == ("a charged", "b charged", None, False)
    assert second.idempotency_key == "key-b" and first.idempotency_key and again[0].replayed
    assert first.duration == (first.completed_at - first.started_at).total_seconds()
    assert (draft.output, draft.model, draft.cost, draft.usage.input_tokens > 0) == ("hi", "gpt-5-mini", cost, True)
    assert [(each[0], each[1], each[3]) for each in done] == [("charge", 1, run_id), ("charge", 2, run_id)] * 2
    assert done[0][2] == done[1][2] == first.idempotency_key
    assert charge.fn.__name__ == "charge" and inspect.iscoroutinefunction(charge.fn)


async def test_the_record_of_a_wait_shows_what_came() -> None:
    @workflow
    async def waits(ctx: Context) -> None:
        await human_task(title="go", data=1)
        await human_task(title="form", data=1, schema=Form)
        await ctx.wait_for_event("paid")
        await human_task(title="late", data=1, timeout="1h", on_timeout=None)
        await ctx.wait_for_event("late", timeout="1h", default=None)

    with FakeClock() as clock:
        await waits.start()
        tasks.approve(tasks.list()[0].id, by="Mia", comment="fine")
        await waits.start()
        tasks.answer(tasks.list()[0].id, {"amount": 3}, by="Bo")
        send_event("paid", {"n": 7})
        await waits.start()
        clock.advance("2h")
        await waits.start()
        clock.advance("2h")
        run = await waits.start()
    go, form, paid, late, event = (each.output for each in run.steps)
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)
    assert go == Decision(True, "Mia", at, "fine", None)
    assert form == Decision(True, "Bo", at, None, {"amount": 3})
    assert (paid, late, event) == ({"n": 7}, None, None)


async def test_an_effect_that_would_run_with_other_data_shows_the_difference_and_how_to_allow_it() -> None:
    def flow(amount: int, **options: Any) -> Any:
        @workflow("charges")
        async def charges(ctx: Context) -> int:
            return await step("charge", do, amount, **options)

        return charges

    undo = {"compensate": lambda result: None}
    for options in ({"effect": True}, undo):
        await flow(1, **options).run()
        with pytest.raises(StepChanged, match=r"(?s)1 -> 2.*rerun=\['charge'\]"):
            await flow(2, **options).run()
    assert done == [1]


async def test_a_step_timeout_is_a_timeout_error_and_a_slash_in_a_name_is_just_a_letter() -> None:
    @workflow
    async def flow(ctx: Context) -> str:
        try:
            await step("a/b", lambda: asyncio.sleep(30), timeout="20ms")
        except TimeoutError as error:
            assert isinstance(error, StepTimeout) and isinstance(error, StepFailed)
        return await step("a", do, 1) and ctx.steps["a/b"].status

    assert await flow.run() == "failed"
    assert [each.name for each in runs.list()[0].steps] == ["a/b", "a"]


async def test_a_secret_output_is_not_recorded_and_a_thread_is_used_unless_told_otherwise() -> None:
    @workflow
    async def flow(ctx: Context) -> list[bool]:
        here = threading.get_ident()
        assert await step("token", lambda: do("tok-secret"), secret=True) == "tok-secret"
        elsewhere = await step("elsewhere", lambda: threading.get_ident())
        on_loop = await step("on loop", lambda: threading.get_ident(), thread=False)
        return [elsewhere == here, on_loop == here]

    assert await flow.run() == [False, True]
    assert done == ["tok-secret"] and runs.list()[0].steps[0].output is None
    await flow.run()
    assert done == ["tok-secret"] * 2
    assert b"tok-secret" not in b"".join(file.read_bytes() for file in Path(str(agentflow.settings.settings.path or "")).glob("*") if file.is_file())


async def test_parallel_keeps_keys_settles_and_is_refused_with_words() -> None:
    def fail() -> None:
        raise ValueError("no")

    @workflow
    async def flow(ctx: Context) -> Any:
        got = await parallel({"a": step("a", do, 1), "b": step("b", fail)}, settle=True)
        listed = await parallel([step("c", do, 2), coroutine()], concurrency=1)
        with pytest.raises(UsageError, match="what step"):
            await parallel([1])
        with pytest.raises(StepTimeout):
            await parallel([asyncio.sleep(30)], timeout="20ms")
        return [got["a"], str(got["b"]), listed]

    assert await flow.run() == [1, "no", [2, None]]


async def test_a_refused_fan_out_can_be_caught_and_its_steps_count_as_neither_run_nor_forgotten() -> None:
    @workflow
    async def flow(ctx: Context) -> str:
        for wrong in (lambda: parallel([step("a", do, 1)], concurrency=0), lambda: parallel([step("a", do, 1), 7]), lambda: parallel([step("a", do, 1)], timeout="soon")):  # type: ignore[list-item]
            with pytest.raises(UsageError):
                await wrong()
        return "went on"

    assert await flow.run() == "went on" and done == []


async def test_the_error_of_a_run_that_failed_in_a_task_group_names_what_failed() -> None:
    async def fail() -> None:
        raise ConnectionError("mail is down")

    @workflow
    async def flow(ctx: Context) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(step("mail", fail))

    run = await flow.start()
    assert run.status == "failed" and str(run.error).endswith("ConnectionError: mail is down")


# -- generate_content -----------------------------------------------------------------------------


async def test_a_reply_has_what_is_promised_and_can_be_the_next_prompt() -> None:
    with FakeModel(['{"amount": 3}', "two"]) as model:
        reply = await generate_content("How many?", data={"k": [1, 2]}, model=MODEL, output_type=Reply[Form], system="Be brief.")
        assert reply.output == Form(amount=3) and reply.text == '{"amount": 3}' and reply.finish_reason == "stop"
        assert reply.cost == model.billed[0].cost and reply.model == "gpt-5-mini"
        assert {"input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"} <= set(dir(reply.usage))
        assert await generate_content([*reply.messages, {"role": "user", "content": "And now?"}], model=MODEL) == "two"
        assert '"k"' in model.calls[0]["text"]
        assert "How many?" in json.dumps(model.calls[1]["body"]) and model.calls[1]["text"] == "And now?"


@pytest.mark.parametrize("error", [Truncated("so far"), Refused("no"), ContentFiltered("filtered")])
async def test_a_reply_that_is_none_is_an_error_that_carries_what_came(error: ModelError) -> None:
    with FakeModel([error]):
        with pytest.raises(type(error)) as failed:
            await generate_content("Hello", model=MODEL)
    assert isinstance(failed.value, ModelError) and failed.value.status == 200 and failed.value.reply.text == str(error)


async def test_a_reply_that_does_not_validate_is_asked_about_again_as_often_as_said() -> None:
    with FakeModel(["x", "y", "z"], all_used=False) as model:
        with pytest.raises(InvalidReply) as failed:
            await generate_content("Hello", model=MODEL, output_type=Form)
        assert len(model.calls) == 2 and failed.value.reply.text == "y" and failed.value.status == 200
        with pytest.raises(InvalidReply):
            await generate_content("Hello again", model=MODEL, output_type=Form, reask=0)
        assert len(model.calls) == 3


async def test_without_a_model_nothing_is_sent_and_the_error_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeModel(["one", "two"]) as model:
        with pytest.raises(UsageError, match=r"configure\(model=.*AGENTFLOW_MODEL"):
            await generate_content("Hello")
        assert model.calls == []
        monkeypatch.setenv("AGENTFLOW_MODEL", MODEL)
        assert await generate_content("Hello") == "one"
        configure(model="anthropic:claude-haiku-4-5")
        assert await generate_content("Hello") == "two"
        assert [call["provider"] for call in model.calls] == ["openai", "anthropic"]


async def test_a_replay_delivers_its_text_at_once_to_who_streams() -> None:
    pieces: list[str] = []

    @workflow
    async def flow(ctx: Context) -> str:
        return await generate_content("Hello", model=MODEL, on_text=pieces.append)

    with FakeModel(["hello world"]):
        await flow.run()
        assert len(pieces) > 1 and "".join(pieces) == "hello world"
        pieces.clear()
        await flow.run()
    assert pieces == ["hello world"]


async def test_a_call_outside_a_step_is_a_step_of_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "triage.md").write_text("Sort {{what}}")
    monkeypatch.chdir(tmp_path)

    @workflow
    async def flow(ctx: Context) -> None:
        await generate_content("Hello", model=MODEL)
        await generate_content("Hello", model=MODEL, name="greet")
        await generate_content(load_prompt("triage", what="mail"), model=MODEL)

    with FakeModel(["1", "2", "3"]) as model:
        await flow.run()
        assert model.calls[2]["text"] == "Sort mail"
    assert [each.name for each in runs.list()[0].steps] == ["generate_content", "greet", "triage"]


# -- people ---------------------------------------------------------------------------------------


async def test_a_form_gives_an_instance_and_a_rejection_raises() -> None:
    @workflow
    async def asks(ctx: Context, n: int) -> Form:
        return await human_task("input", assign_to=["Mia", "Bo"], data=n, schema=Form)

    for n in (1, 2):
        with pytest.raises(Waiting, match=r"Mia, Bo.*agentflow tasks answer"):
            await asks.run(n)
    first, second = tasks.list()
    with pytest.raises(UsageError, match="amount"):
        tasks.answer(first.id, {"amount": "many"})
    tasks.answer(first.id, {"amount": 3}, by="Bo", comment="c")
    tasks.reject(second.id, by="Mia", comment="no")
    assert await asks.run(1) == Form(amount=3)
    with pytest.raises(TaskRejected, match="Mia: no") as rejected:
        await asks.run(2)
    assert rejected.value.decision.by == "Mia"
    with pytest.raises(TaskClosed, match="answered already, by Bo"):
        tasks.reject(first.id)


async def test_other_data_withdraws_the_open_task_and_opens_a_new_one() -> None:
    def flow(data: Any) -> Any:
        @workflow("asks")
        async def asks(ctx: Context) -> str | None:
            return (await human_task(data=data)).by

        return asks

    await flow({"draft": 1}).start()
    (first,) = tasks.list()
    await flow({"draft": 2}).start()
    (second,) = tasks.list()
    assert second.data == {"draft": 2} and tasks.get(first.id).status == "withdrawn"
    with pytest.raises(TaskClosed, match="withdrawn"):
        tasks.approve(first.id)


async def test_what_follows_when_nobody_answers() -> None:
    @workflow
    async def asks(ctx: Context, how: str) -> Any:
        more: dict[str, Any] = {"value": {"on_timeout": "later"}, "error": {"on_timeout": LookupError("nobody")}}.get(how, {})
        return await human_task(data=how, timeout="1d", **more)

    with FakeClock() as clock:
        for how in ("value", "error", "nothing"):
            await asks.start(how)
        clock.advance("1d")
        assert await asks.run("value") == "later"
        with pytest.raises(LookupError, match="nobody"):
            await asks.run("error")
        with pytest.raises(HumanTaskExpired):
            await asks.run("nothing")


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shop", raising=False)

    def call(*args: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = cli(list(args))
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in args and out else out, err

    return call


def test_the_commands_that_are_promised_are_there(command: Any) -> None:
    for group, names in {
        "runs": "list show watch resume retry cancel fork diff plan export purge",
        "tasks": "list show approve reject answer",
        "journal": "verify stats backup copy",
        "": "cost worker doctor demo",
    }.items():
        for name in names.split():
            assert command(*group.split(), name, "--help")[0] == 0, f"{group} {name}"


def test_exit_codes_tell_how_it_ended_and_json_has_the_names_of_the_api(command: Any, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from agentflow import *\n"
        "@workflow('good')\n"
        "async def good(ctx, n: int = 1): return await step('double', lambda: n * 2)\n"
        "@workflow('bad')\n"
        "async def bad(ctx):\n"
        "    def fail(): raise ValueError('no')\n"
        "    await step('fail', fail)\n"
        "@workflow('asks')\n"
        "async def asks(ctx): return (await human_task('approve', assign_to='boss', data={'a': 1})).by\n"
        "@workflow('dear', budget='0.0000001')\n"
        f"async def dear(ctx): return await generate_content('Hello', model='{MODEL}')\n"
    )
    flows = {name: getattr(importlib.import_module("shop"), name) for name in ("good", "bad", "asks", "dear")}
    assert flows["good"].run_sync(1) == 2
    for name, error in (("bad", ValueError), ("asks", Waiting), ("dear", BudgetExceeded)):
        with pytest.raises(error):
            flows[name].run_sync()
    ids = {run.workflow: run.id for run in runs.list()}
    (task,) = tasks.list()
    for name, code in (("good", 0), ("bad", 1), ("asks", 3), ("dear", 5)):
        assert command("runs", "resume", ids[name], "-m", f"shop:{name}")[0] == code
    assert command("runs", "list", "--status", "no")[0] == 2 and command("runs", "nothing")[0] == 2
    for args in (("runs", "show"), ("runs", "cancel"), ("tasks", "show"), ("tasks", "approve")):
        code, out, err = command(*args, "nowhere")
        assert code == 4 and out == "" and "nowhere" in err
    code, listed, _ = command("runs", "list", "--json")
    assert code == 0 and isinstance(listed, list)
    for each in listed:
        assert {"id", "workflow", "status", "error", "waiting_on", "cost", "saved", "started_at", "completed_at"} <= set(each)
    code, shown, _ = command("runs", "show", ids["good"], "--json")
    assert (shown["input"], shown["output"], shown["status"]) == (1, 2, "completed")
    names = {"name", "id", "kind", "status", "started_at", "completed_at", "duration", "attempts", "idempotency_key", "output", "error", "usage", "cost", "model"}
    assert names <= set(shown["steps"][0])
    code, (open_task,), _ = command("tasks", "list", "--json")
    wanted = {"id": task.id, "run_id": ids["asks"], "type": "approve", "assign_to": "boss", "status": "open", "data": {"a": 1}}
    assert {name: open_task[name] for name in wanted} == wanted
    code, out, err = command("tasks", "approve", task.id[:8], "--by", "Mia", "--json")
    assert code == 0 and out["decision"]["by"] == "Mia" and out["status"] == "approved"
    assert command("tasks", "reject", task.id)[0] == 1
    code, out, _ = command("runs", "resume", ids["asks"], "-m", "shop:asks", "--json")
    assert (code, out["output"]) == (0, "Mia")
    decided = out["steps"][0]["output"]
    assert decided["by"] == "Mia" and datetime.fromisoformat(decided["at"]).tzinfo is not None
    for by in ("model", "workflow", "step", "day"):
        assert command("cost", "--by", by, "--json")[0] == 0


async def test_a_plan_as_text_has_each_step_with_its_state_and_the_difference() -> None:
    def flow(question: str) -> Any:
        @workflow("planned")
        async def planned(ctx: Context) -> str:
            await step("charge", do, 1)
            return await generate_content(question, model=MODEL, name="draft")

        return planned

    with FakeModel(["hi"]):
        await flow("Hello").run()
        plan = await flow("Good morning").plan()
        text = str(plan)
        assert [(each.name, each.state) for each in plan.steps] == [("charge", "reused"), ("draft", "changed")]
        assert re.search(r"reused +charge", text) and re.search(r"changed +draft", text)
        assert "- Hello" in text and "+ Good morning" in text and plan.dollars is not None
    assert done == [1]


@pytest.mark.parametrize("what", ["person", "event", "time"])
async def test_a_plan_says_that_waiting_costs_nothing(what: str) -> None:
    @workflow("waits")
    async def waits(ctx: Context) -> Any:
        if what == "person":
            return await human_task(data=1)
        return await (ctx.wait_for_event("paid") if what == "event" else ctx.sleep("3d"))

    for _ in range(2):
        plan = await waits.plan()
        assert [(each.state, each.cost) for each in plan.steps] == [("unknown", 0)] and plan.dollars == 0
        await waits.start()
    assert [run.status for run in runs.list()] == ["waiting"]
