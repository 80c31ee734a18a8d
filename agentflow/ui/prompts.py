"""Requests and replies of the three APIs as conversations that people can read. What has no such form is its JSON.

The shapes follow OpenAI's Responses and Chat Completions and Anthropic's Messages, as their SDKs send and return them.
"""

from __future__ import annotations

from typing import Any

from agentflow.ui.values import text_of


def conversation(request: Any) -> list[dict[str, str]]:
    """What a model was shown: ``role`` and ``text`` of each message, the system's first."""
    if not isinstance(request, dict):
        return []
    system = [request[name] for name in ("instructions", "system") if request.get(name)]
    found: list[tuple[str, Any]] = [("system", text) for text in system]
    asked: Any = request.get("input", request.get("messages")) or []
    for message in [asked] if isinstance(asked, str) else asked:
        if isinstance(message, str):
            found.append(("user", message))
        elif isinstance(message, dict) and message.get("role"):
            parts = [message.get("content") or "", *(message.get("tool_calls") or ())]
            found.append((str(message["role"]), parts))
        else:
            found.append((_kind(message), message))
    return [{"role": role, "text": _text(content)} for role, content in found]


def answer(body: Any) -> str:
    """What a model answered, tools that it asks for included."""
    if not isinstance(body, dict):
        return text_of(body) if body else ""
    if isinstance(body.get("choices"), list):
        messages = [choice.get("message") or {} for choice in body["choices"]]
        parts = [[m.get("content") or m.get("refusal") or "", *(m.get("tool_calls") or ())] for m in messages]
    else:
        items = body.get("output") or body.get("content") or []
        parts = [item.get("content", item) if isinstance(item, dict) and item.get("role") else item for item in items]
    return "\n".join(filter(None, map(_text, parts)))


def _kind(item: Any) -> str:
    kind = str(item.get("type", "")) if isinstance(item, dict) else ""
    known = {"function_call": "assistant", "reasoning": "assistant", "function_call_output": "tool"}
    return known.get(kind, kind or "user")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(filter(None, map(_text, content)))
    if not isinstance(content, dict):
        return text_of(content)
    kind = content.get("type")
    if kind in ("function_call", "tool_use", "function"):
        call = content.get("function", content)
        return f"→ {call.get('name')}({text_of(call.get('arguments', call.get('input')))})"
    if kind == "function_call_output":
        return f"← {_text(content.get('output'))}"
    if kind == "tool_result":
        return f"← {_text(content.get('content'))}"
    if kind == "reasoning":
        return _text(content.get("summary") or [])
    for name in ("text", "refusal", "thinking"):
        if isinstance(content.get(name), str):
            return str(content[name])
    return text_of(content)
