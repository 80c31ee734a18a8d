"""OpenAI Responses: request out, reply in. https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
    holds,
    post,
    refuse_foreign,
    reported_failure,
)

NAME = "openai"
SURFACE = "responses"
PRICED_TIERS = (None, "auto", "default", "standard")
# Charged by the container or the picture, which a reply does not count.
_PRICED_APART = ("code_interpreter_call", "image_generation_call")


def body(ask: Ask) -> dict[str, Any]:
    """The JSON body of one Responses call, exactly as it is sent."""
    refuse_foreign(NAME, ask.messages, _own)
    asked = attach(ask.messages, [_file(file) for file in ask.files], "input_text")
    made: dict[str, Any] = {"model": ask.model, "input": asked}
    if ask.system is not None:
        made["instructions"] = ask.system
    if ask.output is not None:
        made["text"] = {"format": {"type": "json_schema", **ask.output.named, "strict": True}}
    if ask.max_tokens is not None:
        made["max_output_tokens"] = ask.max_tokens
    if ask.temperature is not None:
        made["temperature"] = ask.temperature
    if ask.reasoning is not None:
        made["reasoning"] = {"effort": ask.reasoning} if isinstance(ask.reasoning, str) else ask.reasoning
    if ask.tools:
        made["tools"] = [_tool(one) for one in ask.tools]
    return made


def _tool(offered: Offered) -> dict[str, Any]:
    """https://platform.openai.com/docs/guides/function-calling"""
    described = {"description": offered.description} if offered.description else {}
    form = {"parameters": offered.parameters, "strict": offered.strict}
    return {"type": "function", "name": offered.name, **described, **form}


def tool_results(results: Sequence[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """What is added to the conversation for calls of tools: id, text, and whether it failed."""
    return [{"type": "function_call_output", "call_id": ident, "output": text} for ident, text, _ in results]


def _file(file: File) -> dict[str, Any]:
    """https://platform.openai.com/docs/guides/images-vision, https://platform.openai.com/docs/guides/pdf-files"""
    if file.kind == "image":
        return {"type": "input_image", "image_url": file.url, "detail": "auto"}
    if file.kind == "pdf":
        return {"type": "input_file", "filename": file.name, "file_data": file.url}
    return {"type": "input_text", "text": file.shown}


def _own(message: dict[str, Any]) -> bool:
    return not holds(message, "text", "thinking", "redacted_thinking", "tool_use", "tool_result")


def messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation a body holds, its system message first."""
    system = [{"role": "system", "content": body["instructions"]}] if "instructions" in body else []
    return [*system, *body["input"]]


def next_turn(body: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """The body that goes on with the conversation."""
    return {**body, "input": [*body["input"], *added]}


async def send(
    body: dict[str, Any],
    timeout: float | None,
    *,
    on_text: OnText | None = None,
    server: Server | None = None,
) -> Raw:
    """One POST. ``timeout``: seconds; None allows ten minutes."""
    server = server or Server(NAME, make_client, "openai")
    api = (await client(server)).responses
    required = {"model": body["model"]}
    return await create(server, api, required, body, timeout, read, streams.Responses, {"stream": True}, on_text)


async def submit(body: dict[str, Any], timeout: float | None, *, server: Server | None = None) -> Raw:
    """One POST that leaves the call with the provider: https://platform.openai.com/docs/guides/background"""
    server = server or Server(NAME, make_client, "openai")
    sdk = await client(server)
    sent = {**body, "background": True, "store": True}

    def call() -> Any:
        return sdk.responses.with_raw_response.create(
            model=body["model"], extra_body=sent, timeout=timeout or DEFAULT_TIMEOUT
        )

    return await post(server, call, lambda content: _discounted(body, read(content, server.name)), body, timeout)


async def retrieve(ident: str, body: dict[str, Any], timeout: float, *, server: Server | None = None) -> Raw:
    """One GET of a call in the background; ``body`` is what it was asked. ``timeout``: seconds."""
    server = server or Server(NAME, make_client, "openai")
    sdk = await client(server)

    def call() -> Any:
        return sdk.responses.with_raw_response.retrieve(ident, timeout=timeout)

    return await post(server, call, lambda content: _discounted(body, read(content, server.name)), body, timeout)


async def cancel(ident: str, body: dict[str, Any], timeout: float, *, server: Server | None = None) -> Raw:
    """Cancel a call in the background; gives it as it is then. ``body``, ``timeout``: as for ``retrieve``."""
    server = server or Server(NAME, make_client, "openai")
    sdk = await client(server)

    def call() -> Any:
        return sdk.responses.with_raw_response.cancel(ident, timeout=timeout)

    return await post(server, call, lambda content: _discounted(body, read(content, server.name)), body, timeout)


def _discounted(body: dict[str, Any], parts: Parts) -> Parts:
    """A call that may take hours costs less than the published prices say: its price is unknown."""
    window = (body.get("background_options") or {}).get("completion_window", "soonest")
    return parts if window == "soonest" else replace(parts, standard_price=False)


async def embed(body: dict[str, Any], timeout: float | None, *, server: Server | None = None) -> Raw:
    """One POST for vectors. ``timeout``: seconds; None allows ten minutes."""
    server = server or Server(NAME, make_client, "openai")
    sdk = await client(server)

    async def call() -> Any:
        return await sdk.embeddings.with_raw_response.create(
            model=body["model"], input=body["input"], extra_body=body, timeout=timeout or DEFAULT_TIMEOUT
        )

    return await post(server, call, _embedded, body, timeout)


def _embedded(body: dict[str, Any]) -> Parts:
    usage = Usage(input_tokens=count(body.get("usage"), "prompt_tokens"))
    return Parts("", None, "stop", usage, str(body.get("model") or ""))


def make_client(transport: Any) -> Any:
    """An SDK client that never repeats a POST by itself."""
    import os

    import openai

    settings: dict[str, Any] = {"max_retries": 0}
    if transport is not None:
        import httpx2

        settings["http_client"] = httpx2.AsyncClient(transport=transport)
        settings["api_key"] = os.environ.get("OPENAI_API_KEY") or "none-needed"
    try:
        return openai.AsyncOpenAI(**settings)
    except openai.OpenAIError as exc:
        raise UsageError(
            f"OpenAI cannot be asked: set OPENAI_API_KEY in the environment. Nothing was sent. ({exc})"
        ) from exc


def connect(*, url: str, key: str, http_client: Any, api_version: str = "") -> Any:
    """A client for a compatible server; with ``api_version`` Azure's dated API instead of its v1."""
    import openai

    settings: dict[str, Any] = {"max_retries": 0, "api_key": key, "http_client": http_client}
    if api_version:
        return openai.AsyncAzureOpenAI(
            azure_endpoint=url.removesuffix("/openai/v1"), api_version=api_version, **settings
        )
    return openai.AsyncOpenAI(base_url=url, **settings)


def read(body: dict[str, Any], name: str = NAME) -> Parts:
    """The parts of a reply. Older and newer shapes are read alike; nothing is validated."""
    text, refusal = [], []
    items = [item for item in body.get("output") or [] if isinstance(item, dict)]
    for item in items:
        for content in item.get("content") or [] if item.get("type") == "message" else []:
            if content.get("type") == "output_text":
                text.append(str(content.get("text") or ""))
            elif content.get("type") == "refusal":
                refusal.append(str(content.get("refusal") or ""))
    status = body.get("status") or "completed"
    reason = (body.get("incomplete_details") or {}).get("reason") or "incomplete"
    if refusal:
        finish = "refusal"
    elif status == "completed":
        finish = "tool_calls" if any(item.get("type") == "function_call" for item in items) else "stop"
    else:
        finish = {"max_output_tokens": "length"}.get(reason, reason) if status == "incomplete" else status
    failure = None
    if status not in ("completed", "incomplete"):
        failure = reported_failure(name, body.get("error") or {"code": status})
    usage = body.get("usage")
    return Parts(
        text="".join(text),
        refusal="".join(refusal) if refusal else None,
        finish_reason=finish,
        usage=Usage(
            input_tokens=count(usage, "input_tokens"),
            output_tokens=count(usage, "output_tokens"),
            cached_tokens=count(usage, "input_tokens_details", "cached_tokens"),
            reasoning_tokens=count(usage, "output_tokens_details", "reasoning_tokens"),
            cache_write_tokens=count(usage, "input_tokens_details", "cache_write_tokens"),
        ),
        model=str(body.get("model") or ""),
        items=items,
        calls=[
            {"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments") or ""}
            for item in items
            if item.get("type") == "function_call"
        ],
        failure=failure,
        standard_price=body.get("service_tier") in PRICED_TIERS
        and not any(item.get("type") in _PRICED_APART for item in items),
        searches={
            "web": sum(1 for item in items if item.get("type") == "web_search_call" and _searched(item)),
            "storage": sum(1 for item in items if item.get("type") == "file_search_call"),
        },
    )


def _searched(item: dict[str, Any]) -> bool:
    """Opening a page that a search had found is no search."""
    return (item.get("action") or {}).get("type") in (None, "search")
