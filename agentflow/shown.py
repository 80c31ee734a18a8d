"""Values as JSON for people and programs: no type tags, no secrets."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import orjson

from agentflow.redact import redact_value

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text without what could steer a terminal."""
    return _CONTROL.sub("\ufffd", text)


def shown(value: Any) -> Any:
    """A tree of plain JSON data with secrets masked; what has no such form is its text."""
    tree = orjson.loads(orjson.dumps(_plain(value), option=orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATETIME))
    return redact_value(tree)


def json_text(value: Any, *, indent: bool = False) -> str:
    """JSON text of ``shown(value)``."""
    return orjson.dumps(shown(value), option=orjson.OPT_INDENT_2 if indent else 0).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump())
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return str(value)
