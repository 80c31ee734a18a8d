"""Recorded conversations with tools, gone through again as loops: the real SDKs, a server with the recorded replies."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentflow import Context, Reply, TooManyTurns, generate_content, runs, workflow

Session = list[dict[str, Any]]
PROVIDERS = {"chat": "openai-chat", "responses": "openai", "messages": "anthropic"}
# What generate_content has an argument for, or what says only how the reply is to be sent.
OWN = {"model", "messages", "input", "instructions", "system", "max_tokens", "stream", "stream_options", "tools"}


def sessions() -> list[Session]:
    found: dict[str, Session] = {}
    for line in (Path(__file__).parent / "recordings" / "sessions.jsonl").read_text().splitlines():
        one = json.loads(line)
        found.setdefault(one["session"], []).append(one)
    return list(found.values())


def items(body: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = body["input"] if "input" in body else body["messages"]
    return found


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def exchanged(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The calls that a request holds (name and arguments by id), and what was answered to each."""
    calls: dict[str, Any] = {}
    results: dict[str, str] = {}
    for item in items(body):
        parts = [part for part in item.get("content") or [] if isinstance(part, dict)]
        if item.get("type") == "function_call":
            calls[item["call_id"]] = [item["name"], json.loads(item["arguments"])]
        elif item.get("type") == "function_call_output":
            results[item["call_id"]] = item["output"]
        elif item.get("role") == "tool":
            results[item["tool_call_id"]] = item["content"]
        for call in item.get("tool_calls") or []:
            calls[call["id"]] = [call["function"]["name"], json.loads(call["function"]["arguments"])]
        for part in parts:
            if part["type"] == "tool_use":
                calls[part["id"]] = [part["name"], part["input"]]
            elif part["type"] == "tool_result":
                results[part["tool_use_id"]] = text_of(part["content"])
    return calls, results


def function(described: dict[str, Any], answer: Callable[[str, dict[str, Any]], str]) -> Any:
    """A typed function with the name and the parameters of a recorded tool."""
    described = described.get("function", described)
    schema = described.get("parameters") or described.get("input_schema") or {}
    kinds = {name: {"integer": int, "string": str}.get(part.get("type"), Any) for name, part in schema.get("properties", {}).items()}

    def recorded(**values: Any) -> str:
        return answer(described["name"], values)

    recorded.__name__, recorded.__doc__ = described["name"], described.get("description")
    recorded.__annotations__ = dict(kinds)
    recorded.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in kinds.items()]
    )
    return recorded


def verbatim(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's own items of a reply that was not streamed, as they have to stand in the next request."""
    if "output" in reply:
        return list(reply["output"])
    if "choices" in reply:
        return [{key: value for key, value in reply["choices"][0]["message"].items() if value is not None}]
    return [{"role": "assistant", "content": reply["content"]}]


@pytest.mark.filterwarnings("ignore:.*deprecated")  # said by the SDK about models of older recordings
@pytest.mark.parametrize("session", sessions(), ids=lambda session: session[0]["session"].rpartition(".")[2][:40])
async def test_a_recorded_conversation_takes_the_turns_it_took(session: Session, loopback: Any, again: Any) -> None:
    first = session[0]["request_body"]
    streamed = isinstance(session[0]["response_body"], str)
    kind = {"content-type": "text/event-stream"} if streamed else {}
    server = loopback(*[{"status": 200, "headers": kind, "body": one["response_body"]} for one in session])
    calls, results = exchanged(session[-1]["request_body"])
    asked: list[Any] = []

    def answer(name: str, values: dict[str, Any]) -> str:
        asked.append([name, values])
        return next(results[ident] for ident, call in calls.items() if call == [name, values])

    made = [function(described, answer) for described in first["tools"]]
    heard: list[str] = []

    @workflow("recorded")
    async def flow(ctx: Context) -> Reply[str]:
        prompt = [message for message in items(first) if message.get("role") != "system"]
        return await generate_content(
            prompt,
            model=f"{PROVIDERS[session[0]['surface']]}:{first['model']}",
            tools=made,
            output_type=Reply,
            max_tokens=first.get("max_tokens"),
            max_turns=len(session),
            on_text=heard.append if streamed else None,
            extra={key: value for key, value in first.items() if key not in OWN},
        )

    try:
        reply = await flow.run()
    except TooManyTurns as exc:  # the recording ends with a call of a tool
        reply = exc.reply
    assert len(server.arrived) == len(session)
    for turn, (ours, one) in enumerate(zip(server.bodies, session, strict=True)):
        assert exchanged(ours) == exchanged(one["request_body"])
        if turn and not streamed:
            for item in verbatim(session[turn - 1]["response_body"]):
                assert item in items(ours)
    assert sorted(map(str, asked)) == sorted(map(str, calls.values()))
    turns = [one for one in runs.list()[0].steps if one.kind == "ai"]
    assert [one.name for one in turns] == [f"turn {number}" for number in range(1, len(session) + 1)]
    assert reply.usage.input_tokens == sum(one.usage.input_tokens for one in turns) > 0
    assert reply.cost is not None and reply.cost == sum(one.cost for one in turns if one.cost is not None)
    if streamed:
        assert reply.text in "".join(heard)
    if reply.finish_reason == "stop":
        again()
        assert (await flow.run()).text == reply.text
        assert len(server.arrived) == len(session)


THINKING = [
    {"type": "thinking", "thinking": "The town is Oslo.", "signature": "c2lnbmF0dXJl"},
    {"type": "redacted_thinking", "data": "b3BhcXVl"},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}, "caller": {"type": "direct"}},
]


@pytest.mark.parametrize("streamed", [False, True])
async def test_thinking_blocks_and_signatures_go_back_word_for_word(streamed: bool, loopback: Any) -> None:
    def weather(city: str) -> str:
        return "5 degrees"

    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-haiku-4-5", "stop_sequence": None}
    usage = {"input_tokens": 10, "output_tokens": 5}
    blocks = [block for block in THINKING if not (streamed and block["type"] == "redacted_thinking")]
    first = {**head, "content": blocks, "stop_reason": "tool_use", "usage": usage}
    server = loopback(turns=[first, "5 degrees in Oslo."])
    reply = await generate_content(
        "How warm?",
        tools=[weather],
        model="anthropic:claude-haiku-4-5",
        output_type=Reply,
        reasoning={"type": "enabled", "budget_tokens": 1024},
        on_text=(lambda text: None) if streamed else None,
    )
    said = {"role": "assistant", "content": blocks}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "5 degrees"}
    assert server.bodies[1]["messages"] == [server.bodies[0]["messages"][0], said, {"role": "user", "content": [result]}]
    assert reply.messages[1] == said and reply.text == "5 degrees in Oslo."
