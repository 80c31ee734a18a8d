"""What was said, for traces that may hold it: messages in the form of the conventions' JSON schemas, redacted.

``gen-ai-input-messages.json``, ``gen-ai-output-messages.json`` and ``gen-ai-system-instructions.json`` of 0.1.0.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from agentflow.calls import Call, enclosing
from agentflow.files import shortened
from agentflow.redact import redact, redact_value
from agentflow.settings import log, settings

VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_SHOWN = ("SPAN_ONLY", "SPAN_AND_EVENT", "TRUE")
_HIDDEN = ("", "NO_CONTENT", "EVENT_ONLY", "FALSE")
_TEXTS = ("text", "input_text", "output_text")
_said: set[str] = set()


def wanted() -> bool:
    """Whether spans are to hold what was said."""
    if settings.trace_content is not None:
        return settings.trace_content
    said = os.environ.get(VARIABLE, "").strip().upper()
    if said not in (*_SHOWN, *_HIDDEN) and said not in _said:
        _said.add(said)
        log.warning("%s=%s is none of NO_CONTENT, SPAN_ONLY, EVENT_ONLY, SPAN_AND_EVENT: no content", VARIABLE, said)
    return said in _SHOWN


def secret(call: Call) -> bool:
    """Whether a step, or one around it, keeps to itself what it is given and returns."""
    return call.options.secret or any(current.call.options.secret for current in enclosing(call))


def text(value: Any) -> str:
    """A value as redacted JSON text."""
    return json.dumps(redact_value(value), ensure_ascii=False, default=str)


def recorded(value: str) -> str:
    """JSON text that is recorded, redacted."""
    return text(json.loads(value)) if value else value


def message_of(error: BaseException) -> str:
    return redact(str(error))


def said(body: Mapping[str, Any]) -> dict[str, str]:
    """What a request holds, as attributes."""
    shown: dict[str, Any] = shortened(dict(body))
    system = shown.get("instructions", shown.get("system"))
    found: dict[str, Any] = {"gen_ai.input.messages": _messages(shown.get("input", shown.get("messages", [])))}
    if system:
        found["gen_ai.system_instructions"] = _parts(system)
    if shown.get("tools"):
        found["gen_ai.tool.definitions"] = [_definition(one) for one in shown["tools"]]
    return {name: text(value) for name, value in found.items()}


def replied(body: Any) -> dict[str, str]:
    """What a reply holds, as attributes: a message for each choice."""
    if not isinstance(body, dict):
        return {}
    choices = body.get("choices")
    if isinstance(choices, list):
        made = [_message(one.get("message") or {}, one.get("finish_reason")) for one in choices]
    elif isinstance(body.get("output"), list):
        parts = [part for one in _messages(body["output"]) for part in one["parts"]]
        made = [{"role": "assistant", "parts": parts}]
    else:
        made = [_message({"role": "assistant", "content": body.get("content")}, body.get("stop_reason"))]
    return {"gen_ai.output.messages": text(made)}


def _messages(items: Any) -> list[dict[str, Any]]:
    if isinstance(items, str):
        return [{"role": "user", "parts": _parts(items)}]
    return [_message(item) for item in items if isinstance(item, dict)]


def _message(item: dict[str, Any], finished: Any = None) -> dict[str, Any]:
    """One message, or an item of the Responses API, which has calls of tools and reasoning as items of their own."""
    kind = item.get("type", "message")
    role = str(item.get("role") or "assistant")
    if kind == "function_call":
        parts = [_call(item.get("call_id"), item.get("name"), item.get("arguments"))]
    elif kind == "function_call_output":
        role, parts = "tool", [_response(item.get("call_id"), item.get("output"))]
    elif kind == "reasoning":
        parts = [{"type": "reasoning", "content": _joined(item.get("summary"))}]
    elif role == "tool":
        parts = [_response(item.get("tool_call_id"), item.get("content"))]
    else:
        parts = _parts(item.get("content"))
        for one in item.get("tool_calls") or []:
            function = one.get("function") or {}
            parts.append(_call(one.get("id"), function.get("name"), function.get("arguments")))
    made: dict[str, Any] = {"role": role, "parts": parts}
    return made if finished is None else {**made, "finish_reason": str(finished)}


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "content": content}] if content else []
    return [_part(block) for block in content or [] if isinstance(block, dict)]


def _part(block: dict[str, Any]) -> dict[str, Any]:
    kind = str(block.get("type") or "text")
    if kind in _TEXTS:
        return {"type": "text", "content": str(block.get("text") or "")}
    if kind == "refusal":
        return {"type": "refusal", "content": str(block.get("refusal") or "")}
    if kind == "thinking":
        return {"type": "reasoning", "content": str(block.get("thinking") or "")}
    if kind == "tool_use":
        return _call(block.get("id"), block.get("name"), block.get("input"))
    if kind == "tool_result":
        return _response(block.get("tool_use_id"), block.get("content"))
    return {"type": kind}  # a file: what is in it is not for a trace


def _call(ident: Any, name: Any, arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # a model may write what is no JSON; it is shown as it is
            arguments = json.loads(arguments)
    return {"type": "tool_call", "id": ident, "name": str(name), "arguments": arguments}


def _response(ident: Any, response: Any) -> dict[str, Any]:
    return {"type": "tool_call_response", "id": ident, "response": response}


def _joined(summary: Any) -> str:
    return "\n".join(str(one.get("text") or "") for one in summary or [] if isinstance(one, dict))


def _definition(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    assert isinstance(function, dict)
    return {"type": "function", "name": str(function.get("name") or tool.get("type"))}
