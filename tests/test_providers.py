"""What goes over the wire, and how what comes back is read: real SDKs against a server on the loopback interface."""

from __future__ import annotations

import asyncio
import gc
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agentflow import ledger, providers
from agentflow.errors import ModelError, UnknownModel, UsageError
from agentflow.models import Usage
from agentflow.providers import common
from agentflow.testing import FakeModel
from tests.loopback import Loopback, answer_to

RECORDINGS = Path(__file__).parent / "recordings"
MODELS = {"openai": "gpt-5-mini", "openai-chat": "gpt-4o", "anthropic": "claude-haiku-4-5"}
PATHS = {"openai": "/v1/responses", "openai-chat": "/v1/chat/completions", "anthropic": "/v1/messages"}
SURFACES = {"responses": "openai", "chat": "openai-chat", "messages": "anthropic"}
each_provider = pytest.mark.parametrize("name", MODELS)


def recordings(file: str = "interactions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDINGS / file).read_text().splitlines()]


def recorded(part: str) -> dict[str, Any]:
    return next(one for one in recordings() if part in one["id"])


def body_of(name: str, **options: Any) -> dict[str, Any]:
    ask = common.Ask(model=MODELS[name], messages=[{"role": "user", "content": "Hi"}], **options)
    return providers.get(name).body(ask)


async def send(name: str, body: dict[str, Any] | None = None, timeout: float | None = 5) -> Any:
    return await providers.get(name).send(body or body_of(name), timeout)


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Any:
    def start(*script: Any, **options: Any) -> Loopback:
        server = Loopback(script=list(script), **options)
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        started.append(server.__enter__())
        return server

    started: list[Loopback] = []
    yield start
    for server in started:
        server.__exit__(None, None, None)


@each_provider
async def test_one_call_is_one_post_of_exactly_the_body(name: str, loopback: Any) -> None:
    server = loopback()
    body = {**body_of(name, system="Be brief."), "metadata": {"a": None, "b": 1}}
    raw = await send(name, body)
    (arrived,) = server.arrived
    assert arrived["path"] == PATHS[name]
    assert arrived["digest"] == common.digest(body) == raw["asked"]
    assert providers.get(name).read(raw["body"]).text == answer_to("Hi")
    assert raw["request_id"] == "req_1"
    assert json.loads(json.dumps(raw)) == raw


@each_provider
@pytest.mark.parametrize("status", [429, 500, 529, 408, 409])
async def test_a_transient_error_is_reported_after_one_post(name: str, status: int, loopback: Any) -> None:
    server = loopback({"status": status, "headers": {"retry-after": "7"}, "body": {"error": {"message": "busy"}}})
    with pytest.raises(ModelError, match="busy") as caught:
        await send(name)
    assert (caught.value.status, caught.value.retryable, caught.value.retry_after) == (status, True, 7.0)
    assert caught.value.request_id == "req_1"
    assert len(server.arrived) == 1


@each_provider
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413])
async def test_an_error_of_the_request_is_not_worth_a_retry(name: str, status: int, loopback: Any) -> None:
    loopback({"status": status, "body": {"error": {"message": "wrong", "type": "some_error"}}})
    with pytest.raises(ModelError) as caught:
        await send(name)
    assert (caught.value.status, caught.value.retryable, caught.value.code) == (status, False, "some_error")


@each_provider
async def test_an_exhausted_quota_is_not_retried_although_it_is_a_429(name: str, loopback: Any) -> None:
    loopback({"status": 429, "body": {"error": {"message": "quota", "code": "insufficient_quota"}}})
    with pytest.raises(ModelError) as caught:
        await send(name)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("status", "said", "retryable"), [(400, "true", True), (429, "false", False), (503, "maybe", True)]
)
async def test_the_server_has_the_last_word_on_retrying(status: int, said: str, retryable: bool, loopback: Any) -> None:
    loopback({"status": status, "headers": {"x-should-retry": said}, "body": {}})
    with pytest.raises(ModelError) as caught:
        await send("openai")
    assert caught.value.retryable is retryable


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_both_spellings_of_retry_after_are_seconds(headers: dict[str, str], wait: float | None) -> None:
    assert common.retry_after(httpx2.Headers(headers)) == wait


@each_provider
async def test_a_timeout_is_one_post_and_says_that_it_may_have_been_paid(name: str, loopback: Any) -> None:
    server = loopback("hang")
    with pytest.raises(ModelError, match=r"0\.2|in time") as caught:
        await send(name, timeout=0.2)
    assert (caught.value.status, caught.value.code, caught.value.retryable) == (None, "timeout", True)
    assert len(server.arrived) == 1


@each_provider
async def test_a_broken_connection_is_one_post_and_transient(name: str, loopback: Any) -> None:
    server = loopback("reset")
    with pytest.raises(ModelError) as caught:
        await send(name)
    assert (caught.value.code, caught.value.retryable) == ("connection_error", True)
    assert len(server.arrived) == 1


@each_provider
async def test_a_reply_cut_off_on_the_wire_is_an_error(name: str, loopback: Any) -> None:
    loopback({"status": 200, "body": {"id": "x" * 500}, "cut": 100})
    with pytest.raises(ModelError) as caught:
        await send(name)
    assert caught.value.retryable


@each_provider
async def test_a_200_that_is_no_json_is_kept_as_text(name: str, loopback: Any) -> None:
    loopback({"status": 200, "headers": {"content-type": "text/html"}, "body": "<html>login</html>"})
    raw = await send(name)
    assert (raw["body"], raw["cost"], raw["status"]) == ("<html>login</html>", None, 200)


@each_provider
async def test_a_key_in_a_providers_message_is_not_repeated(name: str, loopback: Any) -> None:
    loopback({"status": 401, "body": {"error": {"message": "Incorrect API key provided: sk-abc1234567890."}}})
    with pytest.raises(ModelError) as caught:
        await send(name)
    assert "sk-abc" not in str(caught.value)


@pytest.mark.parametrize(("name", "variable"), [("openai", "OPENAI_API_KEY"), ("anthropic", "ANTHROPIC_API_KEY")])
async def test_a_missing_key_is_named_before_anything_is_sent(
    name: str, variable: str, loopback: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = loopback()
    monkeypatch.delenv(variable)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=variable):
        await send(name)
    assert server.arrived == []


def test_clients_are_closed_with_their_loop_and_made_anew_for_the_next(loopback: Any) -> None:
    server = loopback()
    kept = []

    async def twice() -> None:
        await asyncio.gather(send("openai"), send("openai"), send("anthropic"))
        clients = common._clients[asyncio.get_running_loop()]
        kept.extend(made for made, _ in clients.values())

    asyncio.run(twice())
    asyncio.run(twice())
    assert [client.is_closed() for client in kept] == [True] * 4  # one for each SDK and loop
    assert len(server.arrived) == 6
    gc.collect()  # unclosed sockets would warn here, and warnings are errors


async def test_an_environment_changed_in_between_reaches_the_next_call(loopback: Any) -> None:
    first = loopback()
    await send("openai")
    second = loopback()
    await send("openai")
    assert (len(first.arrived), len(second.arrived)) == (1, 1)


def test_importing_agentflow_providers_imports_no_sdk() -> None:
    import subprocess
    import sys

    code = (
        "import sys, agentflow.generate, agentflow.testing\n"
        "heavy = {'openai', 'anthropic', 'pydantic', 'httpx2', 'genai_prices', 'tiktoken', 'numpy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("one", recordings("quoted_errors.jsonl"), ids=lambda one: one["id"])
async def test_overload_and_rate_limits_as_they_were_seen_are_transient(one: dict[str, Any], loopback: Any) -> None:
    loopback({"status": one["status"], "body": one["response_body"]})
    with pytest.raises(ModelError) as caught:
        await send(SURFACES[one["surface"]])
    error = one["response_body"]["error"]
    assert (caught.value.retryable, caught.value.code) == (True, error.get("code") or error["type"])


@pytest.mark.parametrize(
    ("part", "finish", "refusal", "text"),
    [
        ("decimal_strict", "stop", None, '{"amount":12.34}'),
        ("test_refusal.openai_gpt_4o_responses", "refusal", "I'm very sorry", ""),
        ("test_max_tokens.openai_gpt_5", "length", None, ""),
        ("parsed_refused_completion", "refusal", "I'm very sorry", ""),
        ("thinking_part_redacted", "stop", None, "I notice that"),
        ("background_mode_vcr", "queued", None, ""),
        ("interleaved_reasoning", "tool_calls", None, ""),
    ],
)
def test_recorded_replies_finish_as_they_did(part: str, finish: str, refusal: str | None, text: str) -> None:
    one = recorded(part)
    parts = providers.get(SURFACES[one["surface"]]).read(one["response_body"])
    assert parts.finish_reason == finish
    assert parts.text.startswith(text) and bool(parts.text) == bool(text)
    assert (parts.refusal or "").startswith(refusal or "") and (parts.refusal is None) == (refusal is None)


def test_cached_tokens_are_part_of_the_input_for_every_provider() -> None:
    usage = recorded("cache_prefix_is_reused.1")["response_body"]["usage"]
    parts = providers.get("anthropic").read({"usage": usage})
    assert usage["cache_read_input_tokens"] > 0
    assert parts.usage.cached_tokens == usage["cache_read_input_tokens"]
    assert parts.usage.input_tokens == (
        usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    )


def test_reasoning_and_thinking_items_go_back_word_for_word() -> None:
    for part in ("interleaved_reasoning", "thinking_part_redacted"):
        one = recorded(part)
        provider = providers.get(SURFACES[one["surface"]])
        items = provider.read(one["response_body"]).items
        sent = provider.next_turn(one["request_body"], items)
        wire = one["response_body"].get("output") or [{"role": "assistant", "content": one["response_body"]["content"]}]
        assert (sent.get("input") or sent["messages"])[-len(wire) :] == wire


@pytest.mark.parametrize(
    ("model", "resolved"),
    [
        ("openai:gpt-5-mini", ("openai", "gpt-5-mini")),
        ("openai-chat:llama3:8b", ("openai-chat", "llama3:8b")),
        ("anthropic:claude-haiku-4-5", ("anthropic", "claude-haiku-4-5")),
        ("gpt-4o", ("openai", "gpt-4o")),
        ("o3", ("openai", "o3")),
        ("o4-mini", ("openai", "o4-mini")),
        ("claude-opus-4-5", ("anthropic", "claude-opus-4-5")),
        ("ft:gpt-4o-mini:org::id", ("openai", "ft:gpt-4o-mini:org::id")),
    ],
)
def test_models_are_found_by_prefix_or_by_a_well_known_name(model: str, resolved: tuple[str, str]) -> None:
    assert providers.resolve(model) == resolved


@pytest.mark.parametrize("model", ["", "openai:", "gemini:pro", "o", "mistral-large", "openal:gpt-4o", "ftx:y"])
def test_an_unknown_model_is_an_error_that_lists_the_providers(model: str) -> None:
    with pytest.raises(UnknownModel, match="openai, openai-chat, anthropic"):
        providers.resolve(model)


def test_no_model_names_the_three_ways_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTFLOW_MODEL", raising=False)
    with pytest.raises(UnknownModel, match=r"(?s)model=.*configure\(.*AGENTFLOW_MODEL"):
        providers.resolve(None)
    monkeypatch.setenv("AGENTFLOW_MODEL", "anthropic:a")
    assert providers.resolve(None) == ("anthropic", "a")
    providers.set_default_model("openai:b")
    try:
        assert providers.resolve(None) == ("openai", "b")
    finally:
        providers.set_default_model(None)


def test_a_published_price_counts_cached_tokens_at_their_own_rate() -> None:
    cost, facts = ledger.price("openai", "gpt-5-mini", Usage(1000, 100, cached_tokens=500))
    assert cost == Decimal("0.0003375")
    assert facts["per_million"] == {"input": "0.25", "output": "2", "cached": "0.025"}
    assert ledger.price("anthropic", "claude-sonnet-4-5", Usage(1000, 100, 500, 0, 100))[0] == Decimal("0.003225")


def test_an_unknown_price_is_unknown_and_not_zero() -> None:
    assert ledger.price("openai", "no-such-model", Usage(1000, 100)) == (None, {})


def test_a_price_of_ones_own_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_PRICES", {})
    ledger.set_price("openai:demo", 1, "2.5", cached="0.1")
    cost, facts = ledger.price("openai", "demo-2026", Usage(2000, 1000, cached_tokens=1000), asked="demo")
    assert cost == Decimal("0.0036")
    assert facts["source"] == "set_price"
    with pytest.raises(UsageError):
        ledger.set_price("demo", -1, 1)


@each_provider
async def test_a_tier_with_another_price_is_unknown(name: str) -> None:
    usage = {"input_tokens": 5, "output_tokens": 5, "prompt_tokens": 5, "service_tier": "priority"}
    body = {"object": "response", "stop_reason": "end_turn", "service_tier": "flex", "usage": usage, "content": []}
    with FakeModel([body]):
        raw = await send(name)
    assert raw["usage"]["input_tokens"] == 5
    assert raw["cost"] is None
