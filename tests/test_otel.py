"""Traces of runs: the real SDK of OpenTelemetry collects them in memory, below them the real SDKs of the providers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, openai_attributes
from opentelemetry.semconv.attributes import error_attributes, server_attributes
from opentelemetry.trace import SpanKind, StatusCode

from agentflow import (
    BudgetExceeded,
    Context,
    ModelError,
    Retry,
    StepFailed,
    UsageError,
    Waiting,
    configure,
    embed,
    generate_content,
    human_task,
    parallel,
    runs,
    send_event,
    step,
    sync,
    tasks,
    tool,
    workflow,
)
from agentflow.otel.content import VARIABLE
from agentflow.testing import FakeModel, ToolCall
from tests.loopback import Loopback
from tests.traces import Traced, attributes, tracing

MODEL = "openai:gpt-4o-mini"
KEY = "sk-proj-abcdefghij0123456789abcdefghij"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    monkeypatch.delenv(VARIABLE, raising=False)
    configure(model=MODEL)
    with tracing(monkeypatch) as made:
        yield made


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    with Loopback(polls=0) as started:
        monkeypatch.setenv("AGENTFLOW_POLL_SECONDS", "0.001")
        for key, value in started.environment.items():
            monkeypatch.setenv(key, value)
        yield started


def current() -> str:
    return trace.get_current_span().name  # type: ignore[attr-defined, no-any-return]


# -- runs and steps ------------------------------------------------------------------------


async def test_a_run_is_a_span_and_its_steps_are_inside(traced: Traced) -> None:
    async def outer() -> str:
        return await step("inner", lambda: "done")

    @workflow("letters")
    async def letters(ctx: Context, name: str) -> str:
        await step("first", lambda: name)
        return await step("outer", outer)

    run = await letters.start("Ada")
    assert traced.tree() == "invoke_workflow letters\n  step first\n  step outer\n    step inner"
    span = traced.one("invoke_workflow letters")
    assert span.kind is SpanKind.INTERNAL and span.status.status_code is StatusCode.UNSET
    assert attributes(span) == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.agent.name": "letters",
        "agentflow.run.id": run.id,
        "agentflow.workflow": "letters",
        "agentflow.execution": 1,
        "agentflow.resumed": False,
        "agentflow.run.status": "completed",
        "agentflow.steps.replayed": 0,
        "agentflow.steps.run": 2,
        "agentflow.steps.failed": 0,
        "agentflow.in_doubt": 0,
        "agentflow.cost.paid": 0.0,
        "agentflow.cost.saved": 0.0,
    }
    first = run.steps[0]
    assert attributes(traced.one("step first")) == {
        "agentflow.run.id": run.id,
        "agentflow.workflow": "letters",
        "agentflow.step.name": "first",
        "agentflow.step.kind": "step",
        "agentflow.step.id": first.id,
        "agentflow.step.status": "completed",
        "agentflow.replayed": False,
        "agentflow.attempt": 1,
        "agentflow.idempotency_key": first.idempotency_key,
    }
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_replayed_steps_are_counted_and_make_spans_only_on_request(traced: Traced) -> None:
    @workflow("many")
    async def many(ctx: Context, n: int) -> int:
        return sum([await step("count", lambda i=i: i) for i in range(n)])

    await many.run(40)
    traced.exporter.clear()
    await many.run(40)
    (span,) = traced.spans
    assert attributes(span)["agentflow.steps.replayed"] == 40 and attributes(span)["agentflow.resumed"] is True
    traced.exporter.clear()
    configure(trace_replayed=True)
    await many.run(40)
    replayed = traced.named("step count")
    assert len(replayed) == 40 and {traced.parent(one).name for one in replayed} == {"invoke_workflow many"}  # type: ignore[union-attr]
    assert {attributes(one)["agentflow.replayed"] for one in replayed} == {True}


async def test_the_span_of_a_step_is_current_in_its_function(traced: Traced) -> None:
    async def slow() -> str:
        await asyncio.sleep(0)
        return current()

    @workflow("where")
    async def where(ctx: Context, n: int) -> dict[str, Any]:
        found = {"body": current()}
        assert ctx.now() and ctx.uuid4()  # recorded, and no steps of the trace
        found["async"] = await step("async", slow)
        found["thread"] = await step("thread", lambda: [current(), threading.current_thread().name])
        found["timed"] = await step("timed", current, timeout=30)
        found["here"] = await step("here", current, thread=False)
        found["gather"] = await asyncio.gather(*(step(f"g{i}", slow) for i in range(2)))
        found["parallel"] = await parallel([step(f"p{i}", current) for i in range(2)])
        async with asyncio.TaskGroup() as group:
            task = group.create_task(step("grouped", slow))
        found["group"] = task.result()
        found["after"] = current()
        return found

    found = await where.run(1)
    name, thread = found.pop("thread")
    assert name == "step thread" and thread.startswith("agentflow-step")
    assert found == {
        "body": "invoke_workflow where",
        "async": "step async",
        "timed": "step timed",
        "here": "step here",
        "gather": ["step g0", "step g1"],
        "parallel": ["step p0", "step p1"],
        "group": "step grouped",
        "after": "invoke_workflow where",
    }
    assert {span.name for span in traced.spans if traced.path(span)[:-1] != ["invoke_workflow where"]} == {
        "invoke_workflow where"
    }


def test_plain_code_is_traced_alike_in_threads_too(traced: Traced) -> None:
    @sync.workflow("plain")
    def plain(ctx: Any, n: int) -> list[str]:
        timed = sync.step("timed", current, timeout=30)
        return [sync.step("a", current), timed, *sync.parallel([lambda: sync.step("b", current), lambda: sync.step("c", current)])]

    outside = traced.tracer.start_span("request")
    with trace.use_span(outside):
        assert plain.run(1) == ["step a", "step timed", "step b", "step c"]
        assert current() == "request"
    outside.end()
    assert sorted(traced.tree().split("\n")) == sorted(
        ["request", "  invoke_workflow plain", *(f"    step {name}" for name in ("timed", "a", "b", "c"))]
    )


async def test_a_run_inside_a_run_is_inside_its_span(traced: Traced) -> None:
    @workflow("child")
    async def child(ctx: Context, n: int) -> int:
        return await step("work", lambda: n + 1)

    @workflow("parent")
    async def parent(ctx: Context, n: int) -> int:
        return await child.run(n)

    assert await parent.run(1) == 2
    assert traced.tree() == "invoke_workflow parent\n  invoke_workflow child\n    step work"
    assert attributes(traced.one("step work"))["agentflow.workflow"] == "child"


async def test_failed_attempts_are_events_of_the_steps_span(traced: Traced) -> None:
    async def shaky() -> str:
        from agentflow import current_step

        if current_step().attempt < 3:
            raise ConnectionError("the line to 10.0.0.7 is down")
        return "through"

    @workflow("calls")
    async def calls(ctx: Context, n: int) -> str:
        return await step("dial", shaky, retry=Retry(max_attempts=3, initial_delay=0))

    assert await calls.run(1) == "through"
    span = traced.one("step dial")
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        ("agentflow.attempt.failed", {"agentflow.attempt": number, "error.type": "ConnectionError"}) for number in (1, 2)
    ]
    assert attributes(span)["agentflow.attempt"] == 3 and span.status.status_code is StatusCode.UNSET


async def test_a_failed_step_and_its_run_name_the_error_and_not_its_message(traced: Traced) -> None:
    undone: list[str] = []

    def broken() -> None:
        raise ValueError("the account of Ada is empty")

    @workflow("orders")
    async def orders(ctx: Context, n: int) -> None:
        await step("charge", lambda: "ch_1", compensate=undone.append)
        await step("ship", broken)

    with pytest.raises(StepFailed):
        await orders.run(1)
    assert undone == ["ch_1"]
    for name in ("step ship", "invoke_workflow orders"):
        span = traced.one(name)
        assert attributes(span)["error.type"] == "ValueError"
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
    assert traced.path(traced.one("step undo charge")) == ["invoke_workflow orders", "step undo charge"]
    assert attributes(traced.one("invoke_workflow orders"))["agentflow.run.status"] == "failed"
    assert "Ada" not in traced.everything()
    points = traced.points()["gen_ai.invoke_agent.duration"]
    assert [dict(point.attributes)["error.type"] for point in points] == ["ValueError"]


async def test_a_cancelled_sibling_says_so(traced: Traced) -> None:
    begun = asyncio.Event()

    async def endless() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def fails() -> None:
        await begun.wait()
        raise ValueError("no")

    @workflow("pair")
    async def pair(ctx: Context, n: int) -> None:
        await parallel([step("endless", endless), step("fails", fails)])

    with pytest.raises(StepFailed):
        await pair.run(1)
    span = traced.one("step endless")
    assert attributes(span)["agentflow.step.status"] == "cancelled"
    assert attributes(span)["error.type"] == "CancelledError"


async def test_a_run_that_is_cancelled_ends_its_spans(traced: Traced) -> None:
    begun = asyncio.Event()

    async def endless() -> None:
        begun.set()
        await asyncio.Event().wait()

    @workflow("long")
    async def long(ctx: Context, n: int) -> None:
        await step("endless", endless)

    task = asyncio.create_task(long.run(1))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert attributes(traced.one("invoke_workflow long"))["agentflow.run.status"] == "interrupted"
    assert attributes(traced.one("step endless"))["agentflow.step.status"] == "cancelled"


async def test_waits_are_spans_and_the_next_execution_links_to_the_one_before(traced: Traced) -> None:
    @workflow("expenses")
    async def expenses(ctx: Context, n: int) -> bool:
        await ctx.wait_for_event("filed", timeout="1d")
        decision = await human_task("approve", assign_to="grace", data={"amount": n}, title="Pay Ada?")
        await ctx.sleep(0.001)
        return bool(decision)

    with pytest.raises(Waiting):
        await expenses.run(120)
    assert attributes(traced.one("event filed"))["agentflow.step.status"] == "waiting"
    send_event("filed", {"by": "Ada"})
    with pytest.raises(Waiting) as waiting:
        await expenses.run(120)
    task = waiting.value.waiting_on[0]["id"]
    tasks.approve(task, by="grace")
    assert await expenses.run(120) is True
    executions = traced.named("invoke_workflow expenses")
    assert [attributes(span)["agentflow.run.status"] for span in executions] == ["waiting", "waiting", "completed"]
    assert [attributes(span)["agentflow.execution"] for span in executions] == [1, 2, 3]
    waited = [(event.name, dict(event.attributes or {})) for event in executions[1].events]
    assert waited == [("agentflow.waiting", {"agentflow.wait.kind": "task", "agentflow.wait.id": task})]
    assert not executions[0].links
    for before, after in zip(executions, executions[1:], strict=False):
        (link,) = after.links
        assert (link.context.trace_id, link.context.span_id) == (before.context.trace_id, before.context.span_id)
        assert after.context.trace_id != before.context.trace_id
    kinds = [(span.name, attributes(span)["agentflow.step.status"]) for span in traced.spans if span not in executions]
    assert kinds == [
        ("event filed", "waiting"), ("event filed", "completed"), ("human_task approve", "waiting"),
        ("human_task approve", "completed"), ("sleep 0.001s", "completed"),
    ]  # fmt: skip
    assert "grace" not in traced.everything() and "Ada" not in traced.everything()


async def test_a_span_that_a_step_leaves_open_holds_nothing_of_the_next_one(traced: Traced) -> None:
    async def careless() -> None:
        context.attach(trace.set_span_in_context(traced.tracer.start_span("mine")))

    @workflow("careful")
    async def careful(ctx: Context, n: int) -> None:
        await step("careless", careless)
        await step("next", lambda: None)

    await careful.run(1)
    assert traced.path(traced.one("step next")) == ["invoke_workflow careful", "step next"]
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_a_step_outside_workflows_is_a_span_by_itself(traced: Traced) -> None:
    assert await step("alone", current) == "step alone"
    assert "agentflow.run.id" not in attributes(traced.one("step alone"))
    assert sync.step("plain", current) == "step plain"


# -- models --------------------------------------------------------------------------------


REQUESTS = {
    "openai:gpt-4o-mini": ("openai", {"openai.api.type": "responses"}),
    "openai-chat:gpt-4o-mini": ("openai", {"openai.api.type": "chat_completions"}),
    "anthropic:claude-haiku-4-5": ("anthropic", {}),
}


@pytest.mark.parametrize("model", REQUESTS)
async def test_a_model_call_is_a_client_span_with_what_was_asked_and_used(model: str, traced: Traced) -> None:
    @workflow("asks")
    async def asks(ctx: Context, n: int) -> str:
        temperature = None if model.startswith("anthropic") else 0.5
        return await generate_content("Hello", model=model, max_tokens=300, temperature=temperature, name="greet")

    with FakeModel(["Hi there!"]) as fake:
        run = await asks.start(1)
    assert run.output == "Hi there!"
    name, more = REQUESTS[model]
    span = traced.one(f"chat {model.split(':')[1]}")
    assert traced.path(span)[:-1] == ["invoke_workflow asks", "step greet"]
    assert span.kind is SpanKind.CLIENT and span.status.status_code is StatusCode.UNSET
    usage = run.steps[0].usage
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": name,
        "gen_ai.request.model": model.split(":")[1],
        "gen_ai.request.max_tokens": 300,
        "gen_ai.output.type": "text",
        "gen_ai.response.id": fake.calls[0]["reply"]["id"],
        "gen_ai.response.model": fake.calls[0]["reply"]["model"],
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "server.address": f"api.{name}.com",
        "server.port": 443,
        "agentflow.run.id": run.id,
        "agentflow.workflow": "asks",
        "agentflow.step.name": "greet",
        "agentflow.attempt": 1,
        "agentflow.cost": float(run.cost),
        "agentflow.request.id": "req_fake_1",
        **more,
    }
    if not model.startswith("anthropic"):
        expected["gen_ai.request.temperature"] = 0.5
    assert attributes(span) == expected
    assert attributes(traced.one("step greet"))["agentflow.cost"] == float(run.cost) > 0
    assert attributes(traced.one("invoke_workflow asks"))["agentflow.cost.paid"] == float(run.cost)
    counted = {metric: point.value for metric, (point,) in traced.points().items() if hasattr(point, "value")}
    assert counted == {
        "gen_ai.client.inference.usage.input_tokens": usage.input_tokens,
        "gen_ai.client.inference.usage.output_tokens": usage.output_tokens,
        "gen_ai.client.inference.usage.cache_read.input_tokens": 0,
        "gen_ai.client.inference.usage.cache_write.input_tokens": 0,
        "gen_ai.client.inference.usage.reasoning.output_tokens": 0,
    }
    (took,) = traced.points()["gen_ai.client.inference.duration"]
    assert took.count == 1 and dict(took.attributes)["gen_ai.request.model"] == model.split(":")[1]
    with FakeModel([]):
        await asks.run(1)
    assert traced.one(span.name) is not None  # a replay asks nobody
    assert attributes(traced.named("invoke_workflow asks")[1])["agentflow.cost.saved"] == float(run.cost)
    assert traced.points()["gen_ai.client.inference.usage.input_tokens"][0].value == usage.input_tokens


async def test_cached_and_reasoning_tokens_settings_and_type_of_the_answer_are_told(traced: Traced) -> None:
    class Answer(pydantic.BaseModel):
        n: int

    usage = {
        "input_tokens": 100, "output_tokens": 50, "total_tokens": 150,
        "input_tokens_details": {"cached_tokens": 60}, "output_tokens_details": {"reasoning_tokens": 40},
    }  # fmt: skip
    reply = {
        "id": "resp_7", "object": "response", "status": "completed", "model": "gpt-5-mini-2025-08-07", "usage": usage,
        "service_tier": "default",
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": '{"n": 1}'}]}],
    }  # fmt: skip
    extra = {"top_p": 0.9, "service_tier": "default"}
    with FakeModel([reply]):
        await generate_content("x", model="openai:gpt-5-mini", output_type=Answer, reasoning="low", extra=extra)
    told = attributes(traced.one("chat gpt-5-mini"))
    assert told.items() >= {
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.cache_read.input_tokens": 60,
        "gen_ai.usage.output_tokens": 50,
        "gen_ai.usage.reasoning.output_tokens": 40,
        "gen_ai.request.reasoning.level": "low",
        "gen_ai.request.top_p": 0.9,
        "gen_ai.output.type": "json",
        "gen_ai.response.model": "gpt-5-mini-2025-08-07",
        "openai.request.service_tier": "default",
        "openai.response.service_tier": "default",
    }.items()
    assert traced.points()["gen_ai.client.inference.usage.cache_read.input_tokens"][0].value == 60


async def test_a_question_about_a_reply_is_one_more_request_of_the_same_attempt(traced: Traced) -> None:
    with FakeModel(["no number", "7"]):
        assert await generate_content("A number.", output_type=int) == 7
    first, second = traced.named("chat gpt-4o-mini")
    assert traced.parent(first) is traced.parent(second)
    assert attributes(first)["agentflow.attempt"] == attributes(second)["agentflow.attempt"] == 1
    assert attributes(first)["gen_ai.response.id"] != attributes(second)["gen_ai.response.id"]


async def test_a_providers_error_is_on_its_request_and_the_retry_has_a_span_of_its_own(
    traced: Traced, server: Loopback
) -> None:
    busy = {"error": {"message": f"too busy for {KEY}", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
    server.script = [{"status": 429, "headers": {"retry-after": "0"}, "body": busy}, "reset", None]

    @workflow("asks")
    async def asks(ctx: Context, n: int) -> str:
        return await generate_content("Hello", retry=Retry(max_attempts=3, initial_delay=0))

    await asks.run(1)
    requests = traced.named("chat gpt-4o-mini")
    assert [attributes(span).get("error.type") for span in requests] == ["rate_limit_exceeded", "connection_error", None]
    assert [attributes(span)["agentflow.attempt"] for span in requests] == [1, 2, 3]
    assert [span.status.status_code for span in requests] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert attributes(requests[0])["gen_ai.response.finish_reasons"] == ("error",)
    assert attributes(requests[2])["server.address"] == "127.0.0.1"
    assert attributes(requests[2])["server.port"] == int(server.url.rpartition(":")[2])
    assert attributes(traced.one("step generate_content"))["agentflow.attempt"] == 3
    assert KEY not in traced.everything() and "too busy" not in traced.everything()
    by_error = {dict(point.attributes).get("error.type"): point.count for point in traced.points()["gen_ai.client.inference.duration"]}
    assert by_error == {"rate_limit_exceeded": 1, "connection_error": 1, None: 1}


async def test_the_requests_span_is_current_below_the_sdks(traced: Traced) -> None:
    seen: list[str] = []

    def answers(request: Any) -> str:
        seen.append(current())
        return "yes"

    with FakeModel(answers):
        await generate_content("Hello")
        sync.generate_content("Hello there")
        await generate_content("Hello", model="anthropic:claude-haiku-4-5")
    assert seen == ["chat gpt-4o-mini", "chat gpt-4o-mini", "chat claude-haiku-4-5"]


async def test_a_call_that_waits_for_its_turn_is_no_request_yet(traced: Traced) -> None:
    configure(limits={MODEL: {"concurrency": 1}})

    @workflow("turns")
    async def turns(ctx: Context, n: int) -> None:
        await parallel([generate_content(f"Hello {i}", name=f"ask {i}") for i in range(2)])

    with FakeModel({"Hello": "Hi"}, delay=0.02):
        await turns.run(1)
    first, second = traced.named("chat gpt-4o-mini")
    asked = sorted(span.start_time or 0 for span in traced.spans if span.name.startswith("step ask"))
    assert asked[1] < (first.end_time or 0) <= (second.start_time or 0)


async def test_a_call_that_no_budget_allows_is_no_request_at_all(traced: Traced) -> None:
    @workflow("poor", budget="0.000001")
    async def poor(ctx: Context, n: int) -> None:
        await generate_content("Hello", name="ask")

    with FakeModel([]), pytest.raises(BudgetExceeded):
        await poor.run(1)
    assert traced.tree() == "invoke_workflow poor\n  step ask"
    assert {attributes(span)["error.type"] for span in traced.spans} == {"BudgetExceeded"}
    assert attributes(traced.one("invoke_workflow poor"))["agentflow.run.status"] == "interrupted"


async def test_what_is_not_sampled_is_counted_all_the_same(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    traced.tracer = TracerProvider(ALWAYS_OFF).get_tracer("test")
    with FakeModel(["Hi"]):
        await generate_content("Hello")
    assert traced.spans == [] and traced.points()["gen_ai.client.inference.duration"][0].count == 1


async def test_a_streamed_answer_says_so(traced: Traced, server: Loopback) -> None:
    heard: list[str] = []
    text = await generate_content("Hello", on_text=heard.append)
    assert "".join(heard) == text
    told = attributes(traced.one("chat gpt-4o-mini"))
    assert told["gen_ai.request.stream"] is True and told["gen_ai.usage.output_tokens"] > 0
    span = traced.one("chat gpt-4o-mini")
    took = (span.end_time - span.start_time) / 1e9  # type: ignore[operator]
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < took
    (began,) = traced.points()["gen_ai.client.inference.time_to_first_chunk"]
    assert began.count == 1 and began.sum == told["gen_ai.response.time_to_first_chunk"]
    await generate_content("Hello again")
    assert traced.points()["gen_ai.client.inference.time_to_first_chunk"][0].count == 1


async def test_vectors_are_an_operation_of_their_own(traced: Traced) -> None:
    with FakeModel([]):
        await embed(["one", "two"], model="openai:text-embedding-3-small")
    told = attributes(traced.one("embeddings text-embedding-3-small"))
    assert told["gen_ai.operation.name"] == "embeddings" and told["gen_ai.usage.input_tokens"] > 0
    assert told["gen_ai.request.encoding_formats"] == ("float",)
    assert "gen_ai.usage.output_tokens" not in told and "gen_ai.output.type" not in told
    assert set(traced.points()) == {
        "gen_ai.client.embeddings.duration", "gen_ai.client.embeddings.operation.input_tokens",
    }  # fmt: skip


async def test_an_agent_holds_its_turns_and_tools(traced: Traced) -> None:
    @tool
    def look_up(order: int) -> str:
        """Find an order."""
        if order == 8:
            raise LookupError("there is no order 8")
        return f"order {order} of Ada"

    @workflow("support")
    async def support(ctx: Context, n: int) -> str:
        return await generate_content("Where is it?", tools=[look_up], name="helper")

    with FakeModel([[ToolCall("look_up", order=7), ToolCall("look_up", order=8)], "Found it."]):
        assert await support.run(1) == "Found it."
    agent = traced.one("invoke_agent helper")
    assert attributes(agent).items() >= {
        "gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "helper", "gen_ai.request.model": "gpt-4o-mini",
    }.items()  # fmt: skip
    inside = [span for span in traced.spans if traced.parent(span) is agent]
    assert [span.name for span in inside] == ["step turn 1", "execute_tool look_up", "execute_tool look_up", "step turn 2"]
    good, bad = inside[1:3]
    assert attributes(good).items() >= {
        "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "look_up", "gen_ai.tool.type": "function",
        "gen_ai.tool.description": "Find an order.", "gen_ai.agent.name": "helper",
    }.items()  # fmt: skip
    assert attributes(good)["gen_ai.tool.call.id"] != attributes(bad)["gen_ai.tool.call.id"]
    assert attributes(bad)["error.type"] == "LookupError" and bad.status.status_code is StatusCode.ERROR
    first, second = traced.named("chat gpt-4o-mini")
    assert attributes(first)["gen_ai.response.finish_reasons"] == ("tool_calls",)
    assert traced.path(second)[1:] == ["invoke_agent helper", "step turn 2", "chat gpt-4o-mini"]
    assert "Ada" not in traced.everything()
    took = traced.points()["gen_ai.execute_tool.duration"]
    assert sorted((point.count, dict(point.attributes).get("error.type", "")) for point in took) == [(1, ""), (1, "LookupError")]


async def test_a_call_in_the_background_is_one_span_from_submission_to_reply(traced: Traced, server: Loopback) -> None:
    server.polls = 2
    await generate_content("Hello", background=True)
    told = attributes(traced.one("chat gpt-4o-mini"))
    assert told["agentflow.background"] is True and "agentflow.taken_up" not in told
    assert told["gen_ai.usage.output_tokens"] > 0


async def test_a_call_that_is_taken_up_again_is_a_span_that_says_so(traced: Traced, server: Loopback) -> None:
    server.polls = None

    @workflow("long")
    async def long(ctx: Context, n: int) -> str:
        return await generate_content("Hello", background=True, timeout=0.05, retry=Retry(max_attempts=1), name="ask")

    with pytest.raises(ModelError):
        await long.run(1)
    first = traced.one("chat gpt-4o-mini")
    assert attributes(first)["error.type"] == "timeout" and "agentflow.taken_up" not in attributes(first)
    server.polls = 0
    for flight in server.flights.values():
        flight["left"] = 0
    await long.run(1)
    second = traced.named("chat gpt-4o-mini")[1]
    assert attributes(second)["agentflow.taken_up"] is True and attributes(second)["gen_ai.usage.output_tokens"] > 0


async def test_each_call_of_a_batch_is_a_span_where_its_reply_comes(traced: Traced) -> None:
    @workflow("labels")
    async def labels(ctx: Context, texts: list[str]) -> list[str]:
        return await parallel([generate_content(text, batch=True, name=f"label {text}") for text in texts])

    with FakeModel({"a": "A", "b": "B"}, polls=1):
        with pytest.raises(Waiting) as waiting:
            await labels.run(["a", "b"])
        assert traced.named("chat gpt-4o-mini") == []
        assert attributes(traced.one("step label a"))["agentflow.step.status"] == "waiting"
        while True:
            try:
                assert await labels.run(["a", "b"]) == ["A", "B"]
                break
            except Waiting:
                continue
    batch = waiting.value.waiting_on[0]["id"]
    spans = traced.named("chat gpt-4o-mini")
    assert {attributes(span)["agentflow.batch.id"] for span in spans} == {batch}
    assert sorted(traced.parent(span).name for span in spans) == ["step label a", "step label b"]  # type: ignore[union-attr]
    run = runs.list()[0]
    assert sum(attributes(span)["agentflow.cost"] for span in spans) == pytest.approx(float(run.cost))
    counted = traced.points()
    assert counted["gen_ai.client.inference.usage.input_tokens"][0].value == sum(
        attributes(span)["gen_ai.usage.input_tokens"] for span in spans
    )
    assert "gen_ai.client.inference.duration" not in counted


# -- content -------------------------------------------------------------------------------


async def converse() -> None:
    @tool
    def mail(to: str) -> dict[str, str]:
        """Send a mail."""
        return {"sent": f"to {to} with {KEY}"}

    @workflow("chat")
    async def chat(ctx: Context, who: str) -> str:
        await step("read", lambda: {"letter": f"dear {who}, {KEY}"})
        return await generate_content(f"Answer {who}, my key is {KEY}.", system="Be brief.", tools=[mail], name="agent")

    with FakeModel(["Thinking", ToolCall("mail", to="Grace"), "Dear Ada"][1:]):
        await chat.run("Ada")


async def test_nothing_that_was_said_is_in_a_trace_by_default(traced: Traced) -> None:
    await converse()
    for word in ("Ada", "Grace", "brief", "dear", KEY):
        assert word not in traced.everything(), word


@pytest.mark.parametrize("value", ["SPAN_ONLY", "span_and_event", "true", None])
async def test_what_was_said_is_there_on_request_redacted_and_in_the_conventions_form(
    value: str | None, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        configure(trace_content=True)
    else:
        monkeypatch.setenv(VARIABLE, value)
    await converse()
    first, second = (attributes(span) for span in traced.named("chat gpt-4o-mini"))
    masked = "[redacted:openai-key]"
    assert json.loads(first["gen_ai.system_instructions"]) == [{"type": "text", "content": "Be brief."}]
    asked = {"role": "user", "parts": [{"type": "text", "content": f"Answer Ada, my key is {masked}."}]}
    assert json.loads(first["gen_ai.input.messages"]) == [asked]
    assert json.loads(first["gen_ai.tool.definitions"]) == [{"type": "function", "name": "mail"}]
    ((call,),) = [one["parts"] for one in json.loads(first["gen_ai.output.messages"])]
    assert (call["type"], call["name"], call["arguments"]) == ("tool_call", "mail", {"to": "Grace"})
    question, wanted, result = json.loads(second["gen_ai.input.messages"])
    assert question == asked and wanted["parts"] == [call]
    assert result["role"] == "tool" and result["parts"][0]["id"] == call["id"] and masked in str(result)
    (said,) = json.loads(second["gen_ai.output.messages"])
    assert said["role"] == "assistant" and said["parts"] == [{"type": "text", "content": "Dear Ada"}]
    used = attributes(traced.one("execute_tool mail"))
    assert json.loads(used["gen_ai.tool.call.arguments"]) == {"to": "Grace"}
    assert json.loads(used["gen_ai.tool.call.result"]) == {"sent": f"to Grace with {masked}"}
    assert json.loads(attributes(traced.one("step read"))["agentflow.step.output"]) == {"letter": f"dear Ada, {masked}"}
    run = attributes(traced.one("invoke_workflow chat"))
    assert json.loads(run["agentflow.run.input"]) == {"who": "Ada"} and json.loads(run["agentflow.run.output"]) == "Dear Ada"
    assert KEY not in traced.everything()


@pytest.mark.parametrize("value", ["NO_CONTENT", "EVENT_ONLY", "false", "yes please"])
async def test_other_values_show_nothing(value: str, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    await converse()
    assert "Ada" not in traced.everything()


async def test_configure_wins_over_the_environment(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "SPAN_ONLY")
    configure(trace_content=False)
    await converse()
    assert "Ada" not in traced.everything()


@pytest.mark.parametrize("model", ["openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"])
async def test_messages_of_the_other_apis_have_the_same_form(model: str, traced: Traced) -> None:
    configure(trace_content=True)

    @tool
    def look(n: int) -> int:
        """Look."""
        return n + 1

    with FakeModel([ToolCall("look", n=1), "two"]):
        await generate_content("Count.", system="Be brief.", model=model, tools=[look])
    second = attributes(traced.named(f"chat {model.split(':')[1]}")[1])
    messages = json.loads(second["gen_ai.input.messages"])
    if model.startswith("openai-chat"):
        assert messages.pop(0) == {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]}
    else:
        assert json.loads(second["gen_ai.system_instructions"]) == [{"type": "text", "content": "Be brief."}]
    question, wanted, result = messages
    assert question == {"role": "user", "parts": [{"type": "text", "content": "Count."}]}
    assert wanted["parts"][-1] | {"id": ""} == {"type": "tool_call", "id": "", "name": "look", "arguments": {"n": 1}}
    assert result["parts"][0]["type"] == "tool_call_response" and result["parts"][0]["id"] == wanted["parts"][-1]["id"]
    (said,) = json.loads(second["gen_ai.output.messages"])
    assert said["parts"] == [{"type": "text", "content": "two"}]


async def test_a_secret_step_and_all_inside_it_is_never_shown(traced: Traced) -> None:
    configure(trace_content=True)

    async def inside(word: str) -> str:
        await step("deeper", lambda: f"{word} again")
        answer = await generate_content(f"About {word}.")
        if answer != "fine":
            raise ValueError(f"{word} is wrong")
        return word

    @workflow("vault")
    async def vault(ctx: Context, n: int) -> None:
        await step("open", inside, "Rosebud", secret=True)
        await step("broken", inside, "Tulip", secret=True)

    with FakeModel({"Rosebud": "fine", "Tulip": "wrong Tulip"}), pytest.raises(StepFailed, match="Tulip is wrong"):
        await vault.run(1)
    assert len(traced.named("step deeper")) == len(traced.named("chat gpt-4o-mini")) == 2
    assert attributes(traced.one("invoke_workflow vault"))["error.type"] == "ValueError"
    assert "Rosebud" not in traced.everything() and "Tulip" not in traced.everything()


async def test_a_replayed_failure_of_a_secret_step_is_not_shown_either(traced: Traced) -> None:
    configure(trace_content=True)

    def broken() -> None:
        raise ValueError("Tulip is wrong")

    @workflow("vault")
    async def vault(ctx: Context, n: int) -> None:
        try:
            await step("open", broken, secret=True)
        except ValueError as error:
            await step("note", lambda: None)
            raise RuntimeError(f"could not: {error}") from error

    for _ in range(2):
        with pytest.raises(RuntimeError, match="Tulip"):
            await vault.run(1)
    assert attributes(traced.named("invoke_workflow vault")[1])["agentflow.steps.replayed"] == 2
    assert "Tulip" not in traced.everything()


async def test_messages_of_errors_are_content(traced: Traced) -> None:
    configure(trace_content=True)

    def broken() -> None:
        raise ValueError(f"no entry with {KEY}")

    @workflow("fails")
    async def fails(ctx: Context, n: int) -> None:
        await step("enter", broken)

    with pytest.raises(StepFailed):
        await fails.run(1)
    assert traced.one("step enter").status.description == "no entry with [redacted:openai-key]"


async def test_keys_in_names_are_masked_whatever_is_captured(traced: Traced) -> None:
    @workflow("named")
    async def named(ctx: Context, n: int) -> None:
        await step(f"use {KEY}", lambda: 1, idempotency_key=f"with {KEY}")
        await step(f"use {KEY} plainly", lambda: 1)

    await named.run(1)
    assert KEY not in traced.everything() and "step use [redacted:openai-key]" in traced.tree()


# -- the conventions -----------------------------------------------------------------------

# Attributes of 0.1.0 that the package of the core conventions does not have: it stopped at 1.41.
SINCE = {
    "gen_ai.request.reasoning.level", "gen_ai.request.previous_response.id", "gen_ai.usage.cache_write.input_tokens",
    "gen_ai.token.modality",
}  # fmt: skip
TYPES = {
    "gen_ai.request.max_tokens": int, "gen_ai.request.temperature": float, "gen_ai.request.top_p": float,
    "gen_ai.response.time_to_first_chunk": float,
    "gen_ai.response.finish_reasons": tuple, "gen_ai.usage.input_tokens": int, "gen_ai.usage.output_tokens": int,
    "gen_ai.usage.cache_write.input_tokens": int, "gen_ai.request.stream": bool, "server.port": int,
    "gen_ai.request.stop_sequences": tuple, "gen_ai.request.seed": int, "gen_ai.request.top_k": int,
    "gen_ai.request.encoding_formats": tuple, "gen_ai.embeddings.dimension.count": int,
    "gen_ai.usage.cache_read.input_tokens": int, "gen_ai.usage.reasoning.output_tokens": int,
}  # fmt: skip


async def test_names_and_types_are_those_of_the_conventions(traced: Traced) -> None:
    configure(trace_content=True)
    cached = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-haiku-4-5", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "yes"}],
        "usage": {"input_tokens": 3, "output_tokens": 4, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 6, "output_tokens_details": {"thinking_tokens": 2}},
    }  # fmt: skip
    extra = {"stop_sequences": ["END"], "top_k": 5}
    with FakeModel([cached, "streamed", "chatted"]):
        await generate_content("a", model="anthropic:claude-haiku-4-5", extra=extra, max_tokens=9)
        await generate_content("b", on_text=lambda text: None, temperature=1, extra={"top_p": 1})
        await generate_content("c", model="openai-chat:gpt-4o-mini", extra={"seed": 3, "stop": "END"})
        await embed(["x"], model="openai:text-embedding-3-small", dimensions=8)
    await converse()
    told = attributes(traced.one("chat claude-haiku-4-5"))
    assert told["gen_ai.usage.input_tokens"] == 14 and told["gen_ai.usage.cache_write.input_tokens"] == 5
    modules = (gen_ai_attributes, openai_attributes, server_attributes, error_attributes)
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)} | SINCE
    used: dict[str, set[type]] = {}
    for span in traced.spans:
        for name, value in attributes(span).items():
            used.setdefault(name, set()).add(type(value))
    for points in traced.points().values():
        for point in points:
            used |= {name: used.get(name, {type(value)}) for name, value in dict(point.attributes).items()}
    ours = {name for name in used if name.startswith("agentflow.")}
    assert set(used) - ours <= known
    assert {name: used.get(name) for name in TYPES} == {name: {kind} for name, kind in TYPES.items()}
    operations = {one.value for one in gen_ai_attributes.GenAiOperationNameValues}
    assert {attributes(span)["gen_ai.operation.name"] for span in traced.spans if "gen_ai.operation.name" in attributes(span)} <= operations
    documented = __import__("agentflow.otel", fromlist=["otel"]).__doc__
    assert [name for name in ours if f"``{name}``" not in documented] == []


# -- trouble -------------------------------------------------------------------------------


class Broken(SpanProcessor):
    """What a careless processor does."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("on_start is broken")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on_end is broken")


async def test_a_broken_processor_breaks_nothing_and_loses_nothing(traced: Traced, said: Any) -> None:
    @workflow("sturdy")
    async def sturdy(ctx: Context, n: int) -> list[str]:
        first = await step("first", lambda: "one")
        return [first, await generate_content("Hello")]

    traced.add(Broken())
    with FakeModel(["Hi"]):
        assert await sturdy.run(1) == ["one", "Hi"]
    with FakeModel([]):
        assert await sturdy.run(1) == ["one", "Hi"]
    assert said().count("2 replayed, 0 run") == 1
    assert "Trace failed; the run goes on without it: RuntimeError" in said()


@pytest.mark.parametrize("name", ["tracing", "trace_content", "trace_replayed"])
def test_configure_refuses_what_is_no_yes_or_no(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        configure(**{name: "on"})
