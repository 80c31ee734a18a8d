"""The provider's prompt cache: what marks a prompt for it, and what reading and writing it costs."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from agentflow import Reply, UsageError, generate_content, ledger
from agentflow.models import Usage
from agentflow.providers import anthropic, openai, openai_chat
from agentflow.testing import FakeModel
from tests.test_providers import recorded

CLAUDE = "anthropic:claude-opus-4-8"
MARK = {"type": "ephemeral", "ttl": "1h"}


def message(text: str = "Yes", **usage: Any) -> dict[str, Any]:
    return {
        **{"id": "m", "type": "message", "role": "assistant", "model": "claude-opus-4-8", "stop_reason": "end_turn"},
        "content": [{"type": "text", "text": text}],
        "usage": {"input_tokens": 300, "output_tokens": 50, "service_tier": "standard", **usage},
    }


WRITTEN = {
    "cache_read_input_tokens": 300,
    "cache_creation_input_tokens": 400,
    "cache_creation": {"ephemeral_5m_input_tokens": 300, "ephemeral_1h_input_tokens": 100},
}


async def test_extra_marks_a_whole_prompt_and_what_was_read_and_written_is_paid_at_its_own_price() -> None:
    with FakeModel([message(**WRITTEN)]) as model:
        reply = await generate_content("Hi", model=CLAUDE, extra={"cache_control": MARK}, output_type=Reply)
    assert model.calls[0]["body"]["cache_control"] == MARK
    assert reply.usage == Usage(1000, 50, 300, 0, 400, 100)
    # 300 x $5, 300 read x $0.50, 300 written for 5 minutes x $6.25, 100 for an hour x $10, 50 out x $25, a million
    assert reply.cost == Decimal("0.005775")


async def test_every_turn_of_a_call_is_marked_and_counted() -> None:
    with FakeModel([message("no number", **WRITTEN), message("7", **WRITTEN)]) as model:
        reply = await generate_content("Hi", model=CLAUDE, extra={"cache_control": MARK}, output_type=Reply[int])
    assert [call["body"]["cache_control"] for call in model.calls] == [MARK, MARK]
    assert (reply.output, reply.usage.cache_write_tokens, reply.cost) == (7, 800, Decimal("0.01155"))


async def test_marks_in_messages_are_sent_word_for_word_and_go_on_in_the_conversation() -> None:
    rules = {"type": "text", "text": "Rules", "cache_control": {"type": "ephemeral"}}
    asked = {"role": "user", "content": [{"type": "text", "text": "Long", "cache_control": MARK}]}
    with FakeModel([message(), message()]) as model:
        reply = await generate_content([{"role": "system", "content": [rules]}, asked], model=CLAUDE, output_type=Reply)
        await generate_content([*reply.messages, {"role": "user", "content": "More"}], model=CLAUDE)
    first, second = (call["body"] for call in model.calls)
    assert (first["system"], first["messages"]) == ([rules], [asked])
    assert second["system"] == [rules]
    assert second["messages"][0] == asked and len(second["messages"]) == 3


def test_a_system_argument_stands_before_system_blocks() -> None:
    from agentflow import generate

    rules = {"type": "text", "text": "Rules", "cache_control": {"type": "ephemeral"}}
    prompt = [{"role": "system", "content": [rules]}, {"role": "user", "content": "Hi"}]
    body = generate.prepare(prompt, model=CLAUDE, system="First").request["body"]
    assert body["system"] == [{"type": "text", "text": "First"}, rules]


async def test_openais_cache_has_its_own_fields() -> None:
    usage = {
        "input_tokens": 4020,
        "output_tokens": 4,
        "total_tokens": 4024,
        "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 4000},
    }
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "OK"}]}
    body = {"object": "response", "status": "completed", "model": "gpt-5.6-sol", "output": [said], "usage": usage}
    more = {"prompt_cache_key": "k", "prompt_cache_options": {"mode": "explicit"}}
    with FakeModel([body]) as model:
        reply = await generate_content("Hi", model="openai:gpt-5.6-sol", extra=more, output_type=Reply)
    assert {name: model.calls[0]["body"][name] for name in more} == more
    assert (reply.usage.cached_tokens, reply.usage.cache_write_tokens) == (8, 4000)
    # 12 x $4, 8 read x $0.40, 4000 written x $5, 4 out x $20, a million
    assert reply.cost == Decimal("0.0201312")


def test_recorded_cache_traffic_costs_what_the_lists_say() -> None:
    def cost(part: str, provider: Any, name: str) -> tuple[Usage, Decimal | None]:
        parts = provider.read(recorded(part)["response_body"])
        return parts.usage, ledger.price(name, parts.model, parts.usage)[0]

    usage, paid = cost("openai_chat_prompt_cache_e2e.0", openai_chat, "openai-chat")
    assert (usage.cache_write_tokens, usage.cached_tokens) == (4012, 0)
    assert paid == Decimal("0.020172")  # 8 x $4 + 4012 x $5 + 4 x $20
    usage, paid = cost("openai_chat_prompt_cache_e2e.1", openai_chat, "openai-chat")
    assert (usage.cache_write_tokens, usage.cached_tokens) == (0, 4012)
    assert paid == Decimal("0.0017168")  # 8 x $4 + 4012 x $0.40 + 4 x $20
    usage, paid = cost("cache_prefix_is_reused.0", anthropic, "anthropic")
    assert (usage.input_tokens, usage.cache_write_tokens, usage.cached_tokens) == (1592, 1590, 0)
    assert paid == Decimal("0.0100475")  # 2 x $5 + 1590 x $6.25 + 4 x $25
    usage, paid = cost("cache_prefix_is_reused.1", anthropic, "anthropic")
    assert (usage.input_tokens, usage.cache_write_tokens, usage.cached_tokens) == (1592, 0, 1590)
    assert paid == Decimal("0.000905")  # 2 x $5 + 1590 x $0.50 + 4 x $25


def test_searches_of_the_provider_are_paid_and_long_prompts_have_the_rates_of_their_length() -> None:
    parts = anthropic.read(recorded("pause_turn_web_search")["response_body"])
    cost, facts = ledger.price("anthropic", parts.model, parts.usage, searches=parts.searches)
    assert cost == Decimal("2.526628")  # 401468 x $6 + 792 x $22.50 a million, 10 searches at $10 a thousand
    assert (facts["per_million"]["input"], facts["per_million"]["output"]) == ("6", "22.5")
    assert facts["per_thousand"] == {"web_searches": "10"}
    assert ledger.price("openai", "gpt-3.5-turbo", Usage(10, 1), searches={"web": 1}) == (None, {})


def test_only_searches_count_as_searches_and_a_container_makes_the_price_unknown() -> None:
    def item(kind: str, action: str = "") -> dict[str, Any]:
        return {"type": kind, **({"action": {"type": action}} if action else {})}

    found = openai.read(
        {"output": [item("web_search_call", "search"), item("web_search_call", "open_page"), item("file_search_call")]}
    )
    assert (found.searches, found.standard_price) == ({"web": 1, "storage": 1}, True)
    assert not openai.read({"output": [item("code_interpreter_call")]}).standard_price


def test_a_price_of_ones_own_knows_nothing_of_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_PRICES", {})
    ledger.set_price("mine", 1, 2)
    assert ledger.price("anthropic", "mine", Usage(1000, 0))[0] == Decimal("0.001")
    assert ledger.price("anthropic", "mine", Usage(1000, 0), searches={"web": 2}) == (None, {})
    assert ledger.price("anthropic", "mine", Usage(1000, 0), searches={"web": 0})[0] == Decimal("0.001")


def test_old_records_without_the_newer_counts_are_read() -> None:
    before = {"input_tokens": 1, "output_tokens": 2, "cached_tokens": 0, "reasoning_tokens": 0, "cache_write_tokens": 0}
    assert Usage(**json.loads(json.dumps(before))) == Usage(1, 2)


async def test_a_mark_set_twice_is_refused_before_anything_is_sent() -> None:
    with FakeModel([]) as model, pytest.raises(UsageError, match="system"):
        await generate_content("Hi", model=CLAUDE, system="S", extra={"system": [{"type": "text", "text": "S"}]})
    assert model.calls == []


def test_a_price_of_ones_own_may_have_rates_for_what_is_written_to_the_cache() -> None:
    usage = Usage(1000, 10, cached_tokens=100, cache_write_tokens=700, cache_write_1h_tokens=200)
    ledger.set_price("mine", input=1, output=2, cached="0.1")
    cost, _ = ledger.price("anthropic", "mine", usage)
    assert cost == (900 * Decimal(1) + 100 * Decimal("0.1") + 10 * Decimal(2)) / 1_000_000
    ledger.set_price("mine", input=1, output=2, cached="0.1", cache_write="1.25")
    cost, _ = ledger.price("anthropic", "mine", usage)
    assert cost == (200 + 100 * Decimal("0.1") + 700 * Decimal("1.25") + 20) / 1_000_000
    ledger.set_price("mine", input=1, output=2, cached="0.1", cache_write="1.25", cache_write_1h=2)
    cost, facts = ledger.price("anthropic", "mine", usage)
    assert cost == (200 + 100 * Decimal("0.1") + 500 * Decimal("1.25") + 200 * 2 + 20) / 1_000_000
    assert facts["per_million"] == {
        "input": "1", "output": "2", "cached": "0.1", "cache_write": "1.25", "cache_write_1h": "2"
    }  # fmt: skip
    with pytest.raises(UsageError, match="cache_write=-1"):
        ledger.set_price("mine", input=1, output=2, cache_write=-1)
