"""OpenAI Chat Completions, and servers that speak it. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentflow.files import File, attach
from agentflow.models import Raw, Usage
from agentflow.providers import streams
from agentflow.providers.common import (
    Ask,
    Offered,
    OnText,
    Parts,
    Server,
    client,
    count,
    create,
    effort,
    holds,
    refuse_foreign,
    reported_failure,
)
from agentflow.providers.openai import PRICED_TIERS, connect, embed, make_client

NAME = "openai-chat"
SURFACE = "chat"
__all__ = ["NAME", "SURFACE", "body", "connect", "embed", "messages", "next_turn", "read", "send", "tool_results"]


def body(ask: Ask) -> dict[str, Any]:
    """The JSON body of one Chat Completions call, exactly as it is sent."""
    refuse_foreign(NAME, ask.messages, _own)
    system = [] if ask.system is None else [{"role": "system", "content": ask.system}]
    asked = attach(ask.messages, [_file(file) for file in ask.files], "text")
    made: dict[str, Any] = {"model": ask.model, "messages": [*system, *asked]}
    if ask.output is not None:
        made["response_format"] = {"type": "json_schema", "json_schema": {**ask.output.named, "strict": True}}
    if ask.max_tokens is not None:
        made["max_completion_tokens"] = ask.max_tokens
    if ask.temperature is not None:
        made["temperature"] = ask.temperature
    if ask.reasoning is not None:
        made["reasoning_effort"] = effort(NAME, ask.reasoning)
    if ask.tools:
        made["tools"] = [{"type": "function", "function": _tool(one)} for one in ask.tools]
    return made


def _tool(offered: Offered) -> dict[str, Any]:
    """https://platform.openai.com/docs/guides/function-calling; not every server with this API knows ``strict``."""
    described = {"description": offered.description} if offered.description else {}
    return {"name": offered.name, **described, "parameters": offered.parameters}


def tool_results(results: Sequence[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """What is added to the conversation for calls of tools: id, text, and whether it failed."""
    return [{"role": "tool", "tool_call_id": ident, "content": text} for ident, text, _ in results]


def _file(file: File) -> dict[str, Any]:
    """https://platform.openai.com/docs/guides/images-vision, https://platform.openai.com/docs/guides/pdf-files"""
    if file.kind == "image":
        return {"type": "image_url", "image_url": {"url": file.url}}
    if file.kind == "pdf":
        return {"type": "file", "file": {"filename": file.name, "file_data": file.url}}
    return {"type": "text", "text": file.shown}


def _own(message: dict[str, Any]) -> bool:
    return "role" in message and "type" not in message and not holds(message, "thinking", "tool_use", "tool_result")


def messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation a body holds, its system message first."""
    return list(body["messages"])


def next_turn(body: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """The body that goes on with the conversation."""
    return {**body, "messages": [*body["messages"], *added]}


async def send(
    body: dict[str, Any],
    timeout: float | None,
    *,
    on_text: OnText | None = None,
    server: Server | None = None,
) -> Raw:
    """One POST. ``timeout``: seconds; None allows ten minutes."""
    server = server or Server(NAME, make_client, "openai")
    api = (await client(server)).chat.completions
    required = {"model": body["model"], "messages": body["messages"]}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return await create(server, api, required, body, timeout, read, streams.Chat, streamed, on_text)


def read(body: dict[str, Any], name: str = NAME) -> Parts:
    """The parts of a reply. Older and newer shapes are read alike; nothing is validated."""
    choices = body.get("choices") or []
    choice = choices[0] if choices and isinstance(choices[0], dict) else {}
    message = choice.get("message") or {}
    refusal = message.get("refusal")
    finish = str(choice.get("finish_reason") or "")
    usage = body.get("usage")
    failure = None
    if not choice:
        failure = reported_failure(name, body.get("error") or {"message": "the reply holds no choices"})
    return Parts(
        text=str(message.get("content") or ""),
        refusal=str(refusal) if refusal else None,
        finish_reason="refusal" if refusal else {"function_call": "tool_calls"}.get(finish, finish),
        usage=Usage(
            input_tokens=count(usage, "prompt_tokens"),
            output_tokens=count(usage, "completion_tokens"),
            cached_tokens=count(usage, "prompt_tokens_details", "cached_tokens"),
            reasoning_tokens=count(usage, "completion_tokens_details", "reasoning_tokens"),
            cache_write_tokens=count(usage, "prompt_tokens_details", "cache_write_tokens"),
        ),
        model=str(body.get("model") or ""),
        items=[{key: value for key, value in message.items() if value is not None}] if message else [],
        calls=[_called(one) for one in message.get("tool_calls") or [] if isinstance(one, dict)],
        failure=failure,
        standard_price=body.get("service_tier") in PRICED_TIERS,
    )


def _called(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    return {"id": call.get("id"), "name": function.get("name"), "arguments": function.get("arguments") or ""}
