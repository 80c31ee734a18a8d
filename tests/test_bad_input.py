"""What is wrong is told before anything is spent: what, where, and the right form."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import agentflow
from agentflow import (
    Context,
    NotRecordable,
    Retry,
    RunNotFound,
    StepNotAwaited,
    TaskNotFound,
    UsageError,
    generate_content,
    human_task,
    parallel,
    runs,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.errors import JournalError, JournalReadOnly, UnknownModel
from agentflow.testing import FakeModel
from tests.programs import notes, run_program


def never(*args: Any) -> None:
    raise AssertionError("must not run")


def never_typed(city: str) -> None:
    raise AssertionError("must not run")


def refused(make: Any, *words: str, error: type[Exception] = UsageError) -> str:
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


# -- options of a step ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, hint",
    [
        ({"retrys": 3}, "known are"),
        ({"maxAttempts": 3}, "retry=Retry(max_attempts=3)"),
        ({"idempotencyKey": "a"}, "idempotency_key"),
        ({"timeoutMs": 3000}, 'timeout="30s"'),
        ({"timeout_ms": 3000}, 'timeout="30s"'),
        ({"onChange": "rerun"}, "on_change"),
        ({"inDoubt": "ask"}, "in_doubt"),
        ({"key": "a"}, "idempotency_key"),
    ],
)
@pytest.mark.parametrize("form", ["call", "decorator", "options", "sync"])
def test_unknown_option_is_named_with_the_right_form(option: dict[str, Any], hint: str, form: str) -> None:
    make = {
        "call": lambda: step("s", never, **option),
        "decorator": lambda: step("s", **option)(never),
        "options": lambda: step("s")(never).options(**option),
        "sync": lambda: sync.step("s", never, **option),
    }[form]
    refused(make, "'s'", next(iter(option)), hint)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"timeout": "half an hour"}, ("timeout='half an hour'", '"30s"')),
        ({"timeout": -1}, ("timeout=-1", "zero or more")),
        ({"timeout": float("nan")}, ("timeout=nan", "finite")),
        ({"timeout": "10"}, ("timeout='10'", '"30s"')),
        ({"timeout": True}, ("timeout=True",)),
        ({"timeout": 0}, ("timeout=0", "'s'")),
        ({"timeout": [1]}, ("timeout=[1]",)),
        ({"max_age": "yesterday"}, ("max_age='yesterday'",)),
        ({"idempotency_key": ""}, ("idempotency_key=''", "'s'")),
        ({"idempotency_key": 7}, ("idempotency_key=7", "'s'")),
        ({"compensate": "refund"}, ("compensate", "'s'")),
        ({"on_change": "always"}, ("on_change='always'", "'rerun'")),
        ({"in_doubt": "skip"}, ("in_doubt='skip'", "'ask'")),
        ({"effect": "yes"}, ("effect='yes'",)),
        ({"secret": 1}, ("secret=1",)),
        ({"thread": "no"}, ("thread='no'",)),
        ({"retry": 3}, ("retry=3", "Retry(max_attempts=3)")),
        ({"retry": {"maxAttempts": 3}}, ("maxAttempts", '"max_attempts"')),
        ({"retry": {"initialDelay": 1}}, ("initialDelay", '"initial_delay"')),
        ({"retry": {"maxDelay": 1}}, ("maxDelay", '"max_delay"')),
        ({"retry": {"max_retries": 1}}, ("max_retries", '"max_attempts"')),
        ({"retry": {"tries": 1}}, ("tries", "known are")),
        ({"retry": {"initial_delay": 1000}}, ("initial_delay=1000", "milliseconds", "initial_delay=1")),
        ({"retry": {"max_delay": 30000}}, ("max_delay=30000", "milliseconds", '"30s"')),
        ({"retry": {"max_attempts": 0}}, ("max_attempts=0", "at least 1")),
        ({"retry": {"max_attempts": 2.5}}, ("max_attempts=2.5",)),
        ({"retry": {"max_attempts": True}}, ("max_attempts=True",)),
        ({"retry": {"backoff": "random"}}, ("backoff='random'", "'exponential'")),
        ({"retry": {"factor": 0.5}}, ("factor=0.5",)),
        ({"retry": {"retry_if": "always"}}, ("retry_if",)),
        ({"retry": {"initial_delay": "soon"}}, ("initial_delay", "soon")),
        ({"retry": {"initial_delay": None}}, ("initial_delay=None",)),
    ],
)
def test_bad_value_of_an_option_is_named_with_the_right_form(options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: step("s", never, **options), *words)


@pytest.mark.parametrize("name", ["", "   ", 7, None, b"s", ["s"]])
@pytest.mark.parametrize("entry", [step, sync.step])
def test_step_name_has_to_be_text(name: Any, entry: Any) -> None:
    refused(lambda: entry(name, never), 'step("')


async def test_coroutine_instead_of_a_function_is_refused_with_the_form_to_write() -> None:
    async def fetch(url: str) -> str:
        return url

    coroutine = fetch("x")
    refused(lambda: step("fetch", coroutine), "called already", 'step("fetch", fetch, ...)', error=TypeError)
    with pytest.raises(TypeError, match="called already"):
        sync.step("fetch", coroutine)
    coroutine.close()


@pytest.mark.parametrize("what", ["text", 7, {"a": 1}])
def test_what_is_no_function_is_refused(what: Any) -> None:
    refused(lambda: step("fetch", what), "function")


async def test_step_that_is_never_awaited_fails_the_run_by_name() -> None:
    ran = []

    @workflow("forgets")
    async def flow(ctx: Context) -> int:
        step("mail", lambda: ran.append(1))
        return 1

    with pytest.raises(StepNotAwaited, match="'mail'.*await step"):
        await flow.run()
    assert not ran


async def test_workflow_that_returns_a_step_instead_of_its_result_is_told() -> None:
    @workflow("returns-step")
    async def flow(ctx: Context) -> Any:
        return step("mail", lambda: 1)

    with pytest.raises(StepNotAwaited, match="'mail'.*await step"):
        await flow.run()


async def test_step_awaited_twice_is_told() -> None:
    @workflow("twice")
    async def flow(ctx: Context) -> int:
        call = step("once", lambda: 1)
        await call
        return await call

    with pytest.raises(UsageError, match="'once' was awaited twice"):
        await flow.run()


# -- values --------------------------------------------------------------------------------------


class Holder:
    def __init__(self) -> None:
        self.items = [{"name": "a"}, {"name": "b", "lock": threading.Lock()}]


async def test_result_without_a_recorded_form_names_the_path_to_it() -> None:
    @workflow("unserialisable")
    async def flow(ctx: Context) -> Any:
        return await step("connect", lambda: {"items": [1, {"client": threading.Lock()}]})

    with pytest.raises(NotRecordable) as caught:
        await flow.run()
    assert "result" in str(caught.value) and "items" in str(caught.value) and "client" in str(caught.value)
    assert "lock" in str(caught.value)


async def test_generator_as_a_result_is_refused_at_record_time() -> None:
    @workflow("generator")
    async def flow(ctx: Context) -> Any:
        return await step("numbers", lambda: (n for n in range(3)))

    with pytest.raises(NotRecordable, match="result: generator"):
        await flow.run()


async def test_input_without_a_recorded_form_is_refused_before_the_run_exists() -> None:
    @workflow("input")
    async def flow(ctx: Context, config: dict[str, Any]) -> None:
        never()

    with pytest.raises(NotRecordable, match=r"client"):
        await flow.run({"client": threading.Lock()})
    assert runs.list() == []


async def test_captured_generator_is_refused() -> None:
    numbers = iter([1, 2])

    @workflow("captured-generator")
    async def flow(ctx: Context) -> Any:
        return await step("sum", lambda: sum(n for n in gen))

    gen = (n for n in numbers)
    with pytest.raises(UsageError, match="gen"):
        await flow.run()


async def test_workflow_result_without_a_recorded_form_names_the_path() -> None:
    @workflow("result")
    async def flow(ctx: Context) -> Any:
        return {"session": threading.Lock()}

    with pytest.raises(NotRecordable, match="session"):
        await flow.run()


# -- workflows -----------------------------------------------------------------------------------


class Order(BaseModel):
    id: str
    total: int


@workflow("typed")
async def typed(ctx: Context, order: Order, count: int = 1, tags: list[str] | None = None) -> str:
    return f"{type(order).__name__} {order.id} {count} {tags}"


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        (("text",), {}, ("'typed'", "order", "Order")),
        (({"id": "1", "total": "many"},), {}, ("order.total", "many")),
        (({"id": "1"},), {}, ("order.total",)),
        ((Order(id="1", total=1), "three"), {}, ("count", "int", "three")),
        ((Order(id="1", total=1),), {"tags": "red"}, ("tags", "red")),
        ((Order(id="1", total=1),), {"color": "red"}, ("color", "It takes")),
        ((), {}, ("order", "It takes")),
        ((Order(id="1", total=1), 1, [], 4), {}, ("It takes",)),
    ],
)
async def test_wrong_arguments_of_a_workflow_are_named_before_anything_runs(
    args: Any, kwargs: Any, words: tuple[str, ...]
) -> None:
    for start in (typed.run, typed.start, typed.plan):
        with pytest.raises(UsageError) as caught:
            await start(*args, **kwargs)
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    with pytest.raises(UsageError):
        typed.run_sync(*args, **kwargs)
    assert runs.list() == []


async def test_dict_is_taken_for_a_model_where_it_fits() -> None:
    assert await typed.run({"id": "1", "total": 1}) == "Order 1 1 None"  # type: ignore[arg-type]


async def test_workflow_is_not_called() -> None:
    refused(lambda: typed(Order(id="1", total=1)), "typed.run(")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: workflow(""), ("name",)),
        (lambda: workflow(7), ("7",)),
        (lambda: workflow(name="x", execute="fn"), ("'fn'",)),
        (lambda: workflow("x", on_change="always")(typed.fn), ("on_change='always'", "'auto'")),
        (lambda: workflow("x", run_id="id")(typed.fn), ("run_id", "lambda")),
        (lambda: workflow("x")(lambda: 1), ("context", "'x'")),
        (lambda: workflow("x", retries=3), ("retries",)),
    ],
)
def test_wrong_definition_of_a_workflow_is_named(make: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        make()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"run_id": 7}, ("run_id=7", "text")),
        ({"run_id": ""}, ("run_id=''",)),
        ({"run_id": "x" * 201}, ("200",)),
        ({"rerun": "draft"}, ("rerun=['draft']",)),
        ({"rerun": [7]}, ("rerun",)),
        ({"rerun": [""]}, ("rerun",)),
        ({"busy": "kill"}, ("busy='kill'", '"wait"')),
        ({"fresh": True, "rerun": ["a"]}, ("fresh",)),
    ],
)
def test_wrong_options_of_a_run_are_named(options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: typed.options(**options), *words)


async def test_rerun_of_a_name_that_the_run_does_not_have_lists_those_it_has() -> None:
    @workflow("rerun")
    async def flow(ctx: Context) -> int:
        return await step("draft", lambda: 1)

    with pytest.raises(UsageError, match="no run"):
        await flow.options(rerun=["draft"]).run()
    await flow.run()
    with pytest.raises(UsageError, match=r"'drafft'.*no step of that name.*'draft'"):
        await flow.options(rerun=["drafft"]).run()
    assert flow.runs()[0].status == "completed"


async def test_run_id_function_has_to_give_text() -> None:
    @workflow("ids", run_id=lambda order: order.total)
    async def flow(ctx: Context, order: Order) -> None:
        never()

    with pytest.raises(UsageError, match=r"'ids'.*run_id= gave 5"):
        await flow.run(Order(id="1", total=5))


async def test_run_id_of_another_workflow_is_refused() -> None:
    await typed.options(run_id="one").run(Order(id="1", total=1))

    @workflow("other")
    async def other(ctx: Context) -> None:
        never()

    with pytest.raises(UsageError, match="'one' belongs to workflow 'typed'"):
        await other.options(run_id="one").run()
    with pytest.raises(RunNotFound, match="typed"):
        other.get("one")


# -- model and people ----------------------------------------------------------------------------


async def test_model_call_without_a_model_says_where_to_name_one_and_sends_nothing() -> None:
    with FakeModel([]) as model:
        with pytest.raises(UnknownModel) as caught:
            await generate_content("Hello")
    for word in ("model=", "configure(model=", "AGENTFLOW_MODEL"):
        assert word in str(caught.value)
    assert model.calls == []


@pytest.mark.parametrize("name", ["unheard-of", "nobody:gpt", "openai:", ""])
async def test_model_that_no_provider_knows_is_refused(name: str) -> None:
    with FakeModel([]):
        with pytest.raises(UsageError):
            await generate_content("Hello", model=name)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tools": [never]}, ("tools[0] (never)", "*", "name each one")),
        ({"tools": [never_typed], "batch": True}, ("batch=True with tools=",)),
        ({"tools": "look_up"}, ("tools='look_up'", "a list of typed functions")),
        ({"tools": [lambda: 1]}, ("tools[0]", "has no name and no types")),
        ({"tools": [never_typed], "max_turns": 0}, ("max_turns=0",)),
        ({"max_tokens": 0}, ("max_tokens=0",)),
        ({"max_tokens": "many"}, ("max_tokens",)),
        ({"temperature": "hot"}, ("temperature='hot'",)),
        ({"timeout": "soon"}, ("timeout='soon'",)),
        ({"retry": {"maxAttempts": 2}}, ("max_attempts",)),
        ({"reask": -1}, ("reask=-1",)),
        ({"data": threading.Lock()}, ("data",)),
        ({"data": {"client": threading.Lock()}}, ("client",)),
    ],
)
async def test_wrong_options_of_a_model_call_are_named_and_nothing_is_sent(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with FakeModel([]) as model:
        refused(lambda: generate_content("Hello", model="openai:gpt-4o-mini", **options), *words)
    assert model.calls == []


async def test_unknown_option_of_a_model_call_is_named() -> None:
    with FakeModel([]), pytest.raises(TypeError, match="temprature"):
        generate_content("Hello", model="openai:gpt-4o-mini", temprature=1)  # type: ignore[call-overload]


@pytest.mark.parametrize("prompt", ["", "  ", [], None, 7, [{"content": "x"}], ["hi"]])
async def test_prompt_that_says_nothing_is_refused(prompt: Any) -> None:
    with FakeModel([]):
        refused(lambda: generate_content(prompt, model="openai:gpt-4o-mini"), "rompt")


def test_human_task_outside_a_workflow_says_where_to_put_it() -> None:
    refused(lambda: human_task(data=1), "workflow")
    refused(lambda: sync.human_task(data=1), "workflow")
    assert tasks.list(status=None) == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"type": ""}, ("type=''",)),
        ({"type": 7}, ("type=7",)),
        ({"assign_to": 7}, ("assign_to=7",)),
        ({"assign_to": [""]}, ("assign_to",)),
        ({"title": 7}, ("title=7",)),
        ({"timeout": "later"}, ("timeout='later'",)),
        ({"schema": "yes or no"}, ("schema",)),
        ({"data": {"client": threading.Lock()}}, ("data", "client")),
    ],
)
async def test_wrong_options_of_a_human_task_are_named_and_no_task_is_opened(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    @workflow("asks")
    async def flow(ctx: Context) -> None:
        await human_task(**options)

    with pytest.raises(UsageError) as caught:
        await flow.run()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert tasks.list(status=None) == []


def test_unknown_task_and_run_say_where_they_were_looked_for(journal_path: Path) -> None:
    with pytest.raises(TaskNotFound, match=r"t-nope.*agentflow tasks list"):
        tasks.approve("t-nope")
    with pytest.raises(RunNotFound, match=r"nope.*agentflow runs list"):
        runs.get("nope")
    for bad in ("", None, 7):
        with pytest.raises(UsageError):
            tasks.get(bad)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            runs.get(bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="status='done'.*completed"):
        runs.list(status="done")
    with pytest.raises(UsageError, match="status='done'.*approved"):
        tasks.list(status="done")


# -- fan-outs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [0, -1, 2.5, "all", True])
async def test_concurrency_has_to_be_one_or_more(concurrency: Any) -> None:
    with pytest.raises(UsageError, match="concurrency"):
        await parallel([], concurrency=concurrency)
    with pytest.raises(UsageError, match="concurrency"):
        await parallel.map(never, [1], concurrency=concurrency)
    with pytest.raises(UsageError, match="concurrency"):
        sync.parallel([], concurrency=concurrency)


async def test_branch_that_is_nothing_to_await_is_named() -> None:
    @workflow("branches")
    async def flow(ctx: Context) -> None:
        await parallel({"a": step("a", lambda: 1), "b": 7})  # type: ignore[dict-item]

    with pytest.raises(UsageError, match="branch 'b' is 7"):
        await flow.run()
    with pytest.raises(UsageError, match="branch 0 is 7"):
        sync.parallel([7])  # type: ignore[list-item]


# -- context -------------------------------------------------------------------------------------


async def test_context_refuses_what_is_no_duration_and_no_name() -> None:
    errors = []

    @workflow("context")
    async def flow(ctx: Context) -> None:
        for make in (lambda: ctx.sleep("soon"), lambda: ctx.sleep(None), lambda: ctx.sleep(-1), lambda: ctx.now(7)):  # type: ignore[arg-type]
            try:
                make()
            except UsageError as error:
                errors.append(str(error))

    await flow.run()
    assert len(errors) == 4


async def test_context_outside_its_run_is_refused() -> None:
    kept: list[Context] = []

    @workflow("leaks")
    async def flow(ctx: Context) -> None:
        kept.append(ctx)

    await flow.run()
    with pytest.raises(UsageError, match="outside the run"):
        kept[0].now()


async def test_current_step_outside_a_step_is_refused() -> None:
    refused(agentflow.current_step, "inside a step")


def test_compensation_outside_a_workflow_is_refused() -> None:
    refused(lambda: step("s", lambda: 1, compensate=never), "'s'", "workflow")


# -- settings and places -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": 7}, ("model=7",)),
        ({"model": "gpt"}, ("gpt",)),
        ({"notify": "me"}, ("notify='me'",)),
        ({"authorize": True}, ("authorize=True",)),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: agentflow.configure(**options), *words)


def test_place_that_cannot_be_written_is_named_and_no_step_runs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    ran = []

    async def main() -> None:
        await step("s", lambda: ran.append(1))

    for path in (file / "journal", file):
        agentflow.configure(path=path)
        with pytest.raises(JournalError) as caught:
            asyncio.run(main())
        assert str(file) in str(caught.value)
    assert not ran


@pytest.mark.skipif(os.geteuid() != 0, reason="drops its rights, which needs to have them")
def test_directory_without_the_right_to_write_is_named_with_what_to_do(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    ended = run_program(
        """
        import agentflow.errors
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            asyncio.run(step("s", lambda: note("ran")))
        except agentflow.errors.JournalReadOnly as error:
            print(error)
        """,
        _open_to_all(tmp_path),
        env={"AGENTFLOW_PATH": str(closed / "journal"), "PYTHONDONTWRITEBYTECODE": "1"},
        expect_failure=True,
    )
    assert str(closed) in ended.out, ended.err
    assert "AGENTFLOW_PATH" in ended.out or "configure(path=" in ended.out
    assert notes(tmp_path) == []


def _open_to_all(folder: Path) -> Path:
    place = folder
    while place != place.parent and place.stat().st_uid == os.geteuid() and place != Path("/tmp"):
        place.chmod(place.stat().st_mode | 0o055)
        place = place.parent
    return folder


def test_retry_object_refuses_what_the_dict_refuses() -> None:
    refused(lambda: Retry(initial_delay=2000), "milliseconds", "2s")
    refused(lambda: Retry(max_attempts=-1), "max_attempts=-1")
    with pytest.raises(TypeError):
        Retry(maxAttempts=3)  # type: ignore[call-arg]
    assert issubclass(JournalReadOnly, JournalError)
