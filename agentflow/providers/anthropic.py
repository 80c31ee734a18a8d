"""Anthropic Messages: request out, reply in. https://platform.claude.com/docs/en/api/messages"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentflow.errors import UsageError
from agentflow.files import File, attach
from agentflow.models import Raw, Usage
from agentflow.providers import streams
from agentflow.providers.common import (
    DEFAULT_TIMEOUT,
    Ask,
    Offered,
    OnText,
    Parts,
    Server,
    client,
    count,
    create,
    refuse_foreign,
    reported_failure,
    spanned,
)

NAME = "anthropic"
SURFACE = "messages"
DEFAULT_MAX_TOKENS = 16_000  # the API demands a number; a reply that hits it raises Truncated
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}


def body(ask: Ask) -> dict[str, Any]:
    """The JSON body of one Messages call, exactly as it is sent."""
    if ask.temperature is not None:
        raise UsageError(
            "temperature= is no parameter of Anthropic's Messages API any more. "
            'Leave it out, or for a model that still takes it write extra={"temperature": ...}.'
        )
    refuse_foreign(NAME, ask.messages, _own)
    system, asked = _system(ask)
    made: dict[str, Any] = {
        "model": ask.model,
        "max_tokens": DEFAULT_MAX_TOKENS if ask.max_tokens is None else ask.max_tokens,
        "messages": attach(asked, [_file(file) for file in ask.files], "text"),
    }
    if system is not None:
        made["system"] = system
    effort, thinking = _reasoning(ask.reasoning, made["max_tokens"])
    config: dict[str, Any] = {}
    if effort is not None:
        config["effort"] = effort
    if thinking is not None:
        made["thinking"] = thinking
    if ask.output is not None:
        config["format"] = {"type": "json_schema", "schema": ask.output.plain}
    if config:
        made["output_config"] = config
    if ask.tools:
        made["tools"] = [_tool(one) for one in ask.tools]
    return made


def _tool(offered: Offered) -> dict[str, Any]:
    """https://platform.claude.com/docs/en/agents-and-tools/tool-use/implement-tool-use"""
    described = {"description": offered.description} if offered.description else {}
    return {"name": offered.name, **described, "input_schema": offered.parameters}


def tool_results(results: Sequence[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """What is added to the conversation for calls of tools: id, text, and whether it failed. One message for all."""
    blocks = []
    for ident, text, failed in results:
        block: dict[str, Any] = {"type": "tool_result", "tool_use_id": ident, "content": text}
        blocks.append({**block, "is_error": True} if failed else block)
    return [{"role": "user", "content": blocks}]


def _system(ask: Ask) -> tuple[Any, list[dict[str, Any]]]:
    """The system prompt and the other messages: one in blocks, as for a mark of the prompt cache, stays in blocks."""
    blocks: list[dict[str, Any]] = []
    rest = list(ask.messages)
    while rest and rest[0].get("role") == "system" and isinstance(rest[0].get("content"), list):
        blocks += rest.pop(0)["content"]
    if not blocks:
        return ask.system, rest
    if not rest:
        raise UsageError("The prompt holds no message but the system's. Nothing was sent.")
    return [*([] if ask.system is None else [{"type": "text", "text": ask.system}]), *blocks], rest


def _reasoning(reasoning: str | dict[str, Any] | None, max_tokens: int) -> tuple[Any, dict[str, Any] | None]:
    """``output_config.effort`` and ``thinking``. https://platform.claude.com/docs/en/build-with-claude/thinking"""
    if reasoning is None or isinstance(reasoning, str):
        return (None, {"type": "disabled"}) if reasoning == "none" else (reasoning, None)
    thinking = dict(reasoning)
    effort = thinking.pop("effort", None)
    budget = thinking.get("budget_tokens")
    if isinstance(budget, int) and not 1024 <= budget < max_tokens:
        raise UsageError(
            f"reasoning={reasoning!r}: budget_tokens is at least 1024 and less than max_tokens={max_tokens}, which "
            "limits thinking and answer together. Lower it, or raise max_tokens=. Nothing was sent."
        )
    return effort, thinking or None


def _file(file: File) -> dict[str, Any]:
    """https://platform.claude.com/docs/en/build-with-claude/vision and .../pdf-support"""
    if file.kind == "text":
        return {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": file.data}}
    source = {"type": "base64", "media_type": file.media_type, "data": file.data}
    return {"type": "document" if file.kind == "pdf" else "image", "source": source}


def _own(message: dict[str, Any]) -> bool:
    return message.get("role") in ("user", "assistant", "system") and "type" not in message


def messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation a body holds, its system message first."""
    system = [{"role": "system", "content": body["system"]}] if "system" in body else []
    return [*system, *body["messages"]]


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
    """One POST. ``timeout``: seconds; None allows ten minutes, more for a large ``max_tokens``."""
    server = server or Server(NAME, make_client, "anthropic")
    api = (await client(server)).messages
    required = {name: body[name] for name in ("model", "max_tokens", "messages")}
    # The SDK refuses a large max_tokens without a timeout of one's own, for it would take too long.
    allowed = max(DEFAULT_TIMEOUT, 3600 * body["max_tokens"] / 128_000)
    return await create(
        server, api, required, body, timeout, read, streams.Messages, {"stream": True}, on_text, allowed
    )


def make_client(transport: Any) -> Any:
    """An SDK client that never repeats a POST by itself."""
    import os

    import anthropic

    settings: dict[str, Any] = {"max_retries": 0, **_quiet()}
    if transport is not None:
        import httpx2

        settings["http_client"] = httpx2.AsyncClient(transport=transport)
        settings["api_key"] = os.environ.get("ANTHROPIC_API_KEY") or "none-needed"
    missing = "Anthropic cannot be asked: set ANTHROPIC_API_KEY in the environment. Nothing was sent."
    try:
        made = anthropic.AsyncAnthropic(**settings)
    except anthropic.AnthropicError as exc:
        raise UsageError(f"{missing} ({exc})") from exc
    if made.api_key is None and made.auth_token is None and made.credentials is None:
        raise UsageError(missing)
    return made


def connect(*, url: str, key: str, http_client: Any, api_version: str = "") -> Any:
    """A client for a compatible server."""
    import anthropic

    return anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0, http_client=http_client, **_quiet())


def _quiet() -> dict[str, Any]:
    """The SDK makes a span of each request by itself; tokens would be counted twice where ours has one."""
    return {"open_telemetry": False} if spanned.get() is not None else {}


def read(body: dict[str, Any], name: str = NAME) -> Parts:
    """The parts of a reply. Older and newer shapes are read alike; nothing is validated."""
    blocks = [block for block in body.get("content") or [] if isinstance(block, dict)]
    text = "".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")
    stop = str(body.get("stop_reason") or "")
    refused = stop == "refusal"
    why = (body.get("stop_details") or {}).get("explanation")
    usage = body.get("usage")
    cached, written = count(usage, "cache_read_input_tokens"), count(usage, "cache_creation_input_tokens")
    failure = reported_failure(name, body.get("error")) if body.get("type") == "error" else None
    return Parts(
        text=text,
        refusal=str(why or text or "no reason was given") if refused else None,
        finish_reason=_FINISH.get(stop, stop),
        usage=Usage(
            input_tokens=count(usage, "input_tokens") + cached + written,
            output_tokens=count(usage, "output_tokens"),
            cached_tokens=cached,
            reasoning_tokens=count(usage, "output_tokens_details", "thinking_tokens"),
            cache_write_tokens=written,
            cache_write_1h_tokens=count(usage, "cache_creation", "ephemeral_1h_input_tokens"),
        ),
        model=str(body.get("model") or ""),
        items=[{"role": "assistant", "content": blocks}] if blocks else [],
        calls=[
            {"id": block.get("id"), "name": block.get("name"), "arguments": block.get("input") or {}}
            for block in blocks
            if block.get("type") == "tool_use"
        ],
        failure=failure,
        standard_price=isinstance(usage, dict)
        and usage.get("service_tier") in (None, "standard")
        and usage.get("speed") in (None, "standard"),
        searches={"web": count(usage, "server_tool_use", "web_search_requests")},
    )
