"""The attributes of a request to a model and of its reply: ``client-inference.md`` and ``openai.md`` of 0.1.0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from agentflow import providers
from agentflow.calls import Call
from agentflow.errors import ModelError
from agentflow.providers import common

# The conventions' names of providers that are called otherwise here; others are passed on as they are.
_PROVIDERS = {
    "openai-chat": "openai",
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "google": "gcp.gemini",
    "vertex": "gcp.vertex_ai",
    "mistral": "mistral_ai",
    "moonshot": "moonshot_ai",
    "xai": "x_ai",
}
_API_TYPES = {"openai": "responses", "openai-chat": "chat_completions"}
_PORTS = {"http": 80, "https": 443}


def operation(call: Call) -> str:
    """What a model call is for: ``chat`` or ``embeddings``."""
    return "embeddings" if "texts" in (call.request or {}) else "chat"


def provider_name(provider: str) -> str:
    """The conventions' name of a provider.

    >>> provider_name("openai-chat"), provider_name("anthropic"), provider_name("vllm")
    ('openai', 'anthropic', 'vllm')
    """
    return _PROVIDERS.get(provider, provider)


def asked(kind: str, provider: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a request, from its body as it is sent."""
    found: dict[str, Any] = {
        "gen_ai.operation.name": kind,
        "gen_ai.provider.name": provider_name(provider),
        "gen_ai.request.model": str(body["model"]),
        **where(provider),
    }
    if kind == "embeddings":
        numbers: dict[str, Any] = {"gen_ai.embeddings.dimension.count": _whole(body.get("dimensions"))}
        if isinstance(encoding := body.get("encoding_format"), str):
            numbers["gen_ai.request.encoding_formats"] = [encoding]
        return {**found, **_given(numbers)}
    stop = body.get("stop_sequences", body.get("stop"))
    if body.get("n") not in (None, 1):
        found["gen_ai.request.choice.count"] = _whole(body["n"])
    found |= {
        "gen_ai.output.type": _output_type(body),
        "gen_ai.request.max_tokens": _whole(
            body.get("max_output_tokens", body.get("max_completion_tokens", body.get("max_tokens")))
        ),
        "gen_ai.request.temperature": _number(body.get("temperature")),
        "gen_ai.request.top_p": _number(body.get("top_p")),
        "gen_ai.request.top_k": _whole(body.get("top_k")),
        "gen_ai.request.frequency_penalty": _number(body.get("frequency_penalty")),
        "gen_ai.request.presence_penalty": _number(body.get("presence_penalty")),
        "gen_ai.request.seed": _whole(body.get("seed")),
        "gen_ai.request.stop_sequences": [stop] if isinstance(stop, str) else _texts(stop),
        "gen_ai.request.reasoning.level": _reasoning(body),
        "gen_ai.request.previous_response.id": _text(body.get("previous_response_id")),
    }
    if provider in _API_TYPES:
        found["openai.api.type"] = _API_TYPES[provider]
        tier = _text(body.get("service_tier"))
        found["openai.request.service_tier"] = None if tier == "auto" else tier
    return _given(found)


def where(provider: str) -> dict[str, Any]:
    """``server.address`` and ``server.port``, known once a client of the provider was made."""
    address = common.address(provider)
    if address is None:
        return {}
    parts = urlsplit(address)
    return _given({"server.address": parts.hostname, "server.port": parts.port or _PORTS.get(parts.scheme)})


def answered(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a reply, from its record."""
    usage, body = record["usage"], record["body"]
    found: dict[str, Any] = {
        "gen_ai.response.model": record["model"],
        "gen_ai.usage.input_tokens": usage["input_tokens"],
        "agentflow.request.id": record.get("request_id"),
        "agentflow.cost": None if record["cost"] is None else float(record["cost"]),
        "agentflow.batch.id": record.get("batch"),
        **where(record["provider"]),
    }
    if kind == "embeddings" or not isinstance(body, dict):
        return _given(found)
    found |= {
        "gen_ai.response.id": _text(body.get("id")),
        "gen_ai.response.finish_reasons": list(_finish_reasons(record["provider"], body)),
        "gen_ai.usage.output_tokens": usage["output_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["cached_tokens"] or None,
        "gen_ai.usage.cache_write.input_tokens": usage["cache_write_tokens"] or None,
        "gen_ai.usage.reasoning.output_tokens": usage["reasoning_tokens"] or None,
    }
    if record["provider"] in _API_TYPES:
        found["openai.response.service_tier"] = _text(body.get("service_tier"))
        found["openai.response.system_fingerprint"] = _text(body.get("system_fingerprint"))
    return _given(found)


def failed_inside(record: Mapping[str, Any]) -> str | None:
    """The type of the error that a reply of status 200 reports; None where it is an answer."""
    body = record["body"]
    if not isinstance(body, dict):
        return "not_json"
    failure: ModelError | None = providers.get(record["provider"]).read(body).failure
    return None if failure is None else error_type(failure)


def error_type(error: BaseException) -> str:
    """What ``error.type`` of a request is: the provider's code, the status, or the exception's name."""
    if isinstance(error, ModelError):
        return error.code or (str(error.status) if error.status else type(error).__name__)
    if not isinstance(error, Exception):
        return "cancelled"
    return type(error).__name__


def modality(body: Mapping[str, Any]) -> str:
    """``text`` where a request is nothing but text; else tokens of several kinds are counted together."""
    shown = str(body.get("input") or body.get("messages") or "")
    return (
        "unknown" if any(kind in shown for kind in ("input_image", "image_url", "'base64'", "input_file")) else "text"
    )


def _finish_reasons(provider: str, body: dict[str, Any]) -> Iterator[str]:
    choices = body.get("choices")
    if isinstance(choices, list) and len(choices) > 1:
        for choice in choices:
            yield str((choice if isinstance(choice, dict) else {}).get("finish_reason") or "error")
        return
    yield providers.get(provider).read(body).finish_reason or "error"


def _output_type(body: Mapping[str, Any]) -> str:
    said = [
        (body.get("text") or {}).get("format") if isinstance(body.get("text"), dict) else None,
        body.get("response_format"),
        (body.get("output_config") or {}).get("format") if isinstance(body.get("output_config"), dict) else None,
        body.get("output_format"),
    ]
    kinds = {str(one.get("type")) for one in said if isinstance(one, dict)}
    return "json" if kinds & {"json_schema", "json_object"} else "text"


def _reasoning(body: Mapping[str, Any]) -> str | None:
    for holder in (body.get("reasoning"), body.get("output_config")):
        if isinstance(holder, dict) and isinstance(holder.get("effort"), str):
            effort: str = holder["effort"]
            return effort
    return _text(body.get("reasoning_effort"))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: Any) -> list[str] | None:
    return [str(one) for one in value] if isinstance(value, list) and value else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _given(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
