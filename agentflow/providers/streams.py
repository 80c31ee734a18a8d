"""Server-sent events, and the reply they add up to, in the shape it has when it is not streamed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class Events:
    """Cuts bytes into events as they arrive. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of each event that is complete now. Lines end at CR and LF only: U+2028 is part of a text."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        for raw in lines:
            line = raw.rstrip(b"\r").decode("utf-8", "replace")
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                data, self._data = "\n".join(self._data), []
                yield data


class Whole(ABC):
    """A reply being put together.

    Attributes:
        done: the event that ends a reply has come.
        error: what the provider reported in the middle of the stream, None for nothing.
    """

    def __init__(self) -> None:
        self.done = False
        self.error: dict[str, Any] | None = None

    def take(self, data: str) -> str:
        """Takes one event in; gives the text it adds to the answer, ``""`` for none.

        Raises:
            ValueError: the event is no JSON object.
        """
        if data.strip() == "[DONE]":
            self.finish()
            return ""
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event that is no object")
        if event.get("type") == "error" or event.get("error"):
            error = event.get("error")
            self.error = error if isinstance(error, dict) else {**event, "type": None, "code": event.get("code")}
            if isinstance(error, str):
                self.error["message"] = error
            return ""
        return self.event(event)

    @abstractmethod
    def event(self, event: dict[str, Any]) -> str:
        """Takes an event in that reports no error; gives the text it adds."""

    def finish(self) -> None:  # noqa: B027, most APIs have an event for it
        """The stream says that nothing more comes."""

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The reply so far."""


class Responses(Whole):
    """https://platform.openai.com/docs/api-reference/responses-streaming"""

    def __init__(self) -> None:
        super().__init__()
        self._base: dict[str, Any] = {}
        self._items: dict[int, Any] = {}
        self._text: list[str] = []

    def event(self, event: dict[str, Any]) -> str:
        kind = str(event.get("type") or "")
        if isinstance(event.get("response"), dict):
            self._base = event["response"]
            self.done = kind in ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
        elif kind == "response.output_item.done":
            self._items[int(event.get("output_index") or 0)] = event.get("item")
        elif kind == "response.output_text.delta":
            self._text.append(str(event.get("delta") or ""))
            return self._text[-1]
        return ""

    def body(self) -> dict[str, Any]:
        if self.done:
            if not self._base.get("output") and self._items:
                return {**self._base, "output": [self._items[index] for index in sorted(self._items)]}
            return self._base
        content = [{"type": "output_text", "text": "".join(self._text), "annotations": []}]
        message = {"type": "message", "role": "assistant", "status": "in_progress", "content": content}
        return {**self._base, "status": "in_progress", "output": [message]}


class Chat(Whole):
    """https://platform.openai.com/docs/api-reference/chat-streaming"""

    def __init__(self) -> None:
        super().__init__()
        self._base: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: Any = None

    def event(self, event: dict[str, Any]) -> str:
        for key, value in event.items():
            if key not in ("choices", "usage", "object", "obfuscation") and (
                value is not None or key not in self._base
            ):
                self._base[key] = value
        self._usage = event.get("usage") or self._usage
        said = ""
        for piece in event.get("choices") or []:
            index = int(piece.get("index") or 0)
            choice = self._choices.setdefault(
                index,
                {
                    "index": index,
                    "message": {"role": "assistant", "content": None},
                    "logprobs": None,
                    "finish_reason": None,
                },
            )
            choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
            delta = piece.get("delta") or {}
            if piece.get("logprobs"):
                choice["logprobs"] = choice["logprobs"] or {}
                _merge(choice["logprobs"], piece["logprobs"])
            _merge(choice["message"], delta)
            if index == 0 and isinstance(delta.get("content"), str):
                said += delta["content"]
        return said

    def finish(self) -> None:
        self.done = bool(self._choices) and all(choice["finish_reason"] for choice in self._choices.values())

    def body(self) -> dict[str, Any]:
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            for call in choice["message"].get("tool_calls") or []:
                call.pop("index", None)
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": self._usage}


def _merge(into: dict[str, Any], delta: dict[str, Any]) -> None:
    """A delta of Chat Completions: text is appended, lists are joined by ``index``, the rest is set."""
    for key, value in delta.items():
        if value is None:
            into.setdefault(key, None)
        elif isinstance(value, str) and isinstance(into.get(key), str) and key not in ("role", "id", "type", "name"):
            into[key] += value
        elif isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        elif isinstance(value, list):
            if not isinstance(into.get(key), list):
                into[key] = []
            known: list[Any] = into[key]
            for item in value:
                index = item.get("index") if isinstance(item, dict) else None
                same = next((one for one in known if index is not None and one.get("index") == index), None)
                if same is None:
                    known.append({} if isinstance(item, dict) else item)
                    same = known[-1]
                if isinstance(item, dict):
                    _merge(same, item)
        else:
            into[key] = value


class Messages(Whole):
    """https://platform.claude.com/docs/en/build-with-claude/streaming"""

    def __init__(self) -> None:
        super().__init__()
        self._message: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._json: dict[int, str] = {}

    def event(self, event: dict[str, Any]) -> str:
        kind = event.get("type")
        index = int(event.get("index") or 0)
        if kind == "message_start":
            self._message = dict(event.get("message") or {})
            self._blocks = {number: dict(one) for number, one in enumerate(self._message.get("content") or [])}
        elif kind == "content_block_start":
            self._blocks[index] = dict(event.get("content_block") or {})
        elif kind == "content_block_delta":
            return self._delta(index, event.get("delta") or {})
        elif kind == "content_block_stop" and index in self._json:
            text = self._json.pop(index) or "{}"
            try:
                self._blocks[index]["input"] = json.loads(text)
            except ValueError:  # cut off by max_tokens: no reason to throw away a reply that is paid for
                self._blocks[index]["input"] = text
        elif kind == "message_delta":
            self._message.update(event.get("delta") or {})
            usage = {name: value for name, value in (event.get("usage") or {}).items() if value is not None}
            self._message["usage"] = {**(self._message.get("usage") or {}), **usage}
            if event.get("context_management") is not None:
                self._message["context_management"] = event["context_management"]
        elif kind == "message_stop":
            self.done = bool(self._message.get("stop_reason"))
        return ""

    def _delta(self, index: int, delta: dict[str, Any]) -> str:
        block = self._blocks.setdefault(index, {"type": "text", "text": ""})
        kind = delta.get("type")
        if kind == "input_json_delta":
            self._json[index] = self._json.get(index, "") + str(delta.get("partial_json") or "")
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or []), delta.get("citation")]
        elif kind == "text_delta":
            block["text"] = str(block.get("text") or "") + str(delta.get("text") or "")
            return str(delta.get("text") or "")
        else:
            for key, value in delta.items():
                if key != "type":
                    known = block.get(key)
                    block[key] = known + value if isinstance(known, str) and isinstance(value, str) else value
        return ""

    def body(self) -> dict[str, Any]:
        return {**self._message, "content": [self._blocks[index] for index in sorted(self._blocks)]}
