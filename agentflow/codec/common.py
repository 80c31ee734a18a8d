"""What all parts of the codec share: the tag, its limits, the error of reading, and checks of text."""

from __future__ import annotations

import base64
import sys
from typing import Any

from agentflow.errors import NotRecordable

Where = tuple[Any, ...]  # (outer Where or None, ".name" or (key,) or a set's (item,), id of the value)
TAG = "$af"
FLOAT_MAX = sys.float_info.max
# Levels of JSON (a tagged value takes two or three); orjson stops at 254, Python's stack at some 300 of ours.
MAX_DEPTH = 200
UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<unset>"})()


class UnknownType(NotRecordable):
    """A recorded type is not loaded, is ambiguous, or no longer fits what was recorded. ``path`` names the type."""

    __module__ = "agentflow.codec"  # as tracebacks and records name it


def tagged(tag: str, value: Any) -> dict[str, Any]:
    return {TAG: tag, "v": value}


def b64(raw: bytes | bytearray) -> str:
    return base64.b64encode(raw).decode("ascii")


def is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str) -> str:
    return text if is_unicode(text) else text.encode("utf-8", "backslashreplace").decode()


def short_repr(value: Any, limit: int = 60) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def loaded(name: str) -> Any:
    """The module if it is imported completely. While another thread still imports it, no value of its types exists."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module
