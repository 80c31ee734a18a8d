"""Results that somebody gives for a step instead of running it, in the form in which such a step is recorded."""

from __future__ import annotations

from typing import Any

import orjson

from agentflow import codec, schema
from agentflow.calls import Call
from agentflow.errors import UsageError
from agentflow.models import Usage
from agentflow.records import Decision


def as_recorded(call: Call, value: Any) -> Any:
    """What the record of a step holds for a value that its caller is to get.

    Raises:
        UsageError: a step of this kind has no result that could be given.
    """
    if call.kind == "ai":
        if "body" not in call.request:
            raise UsageError(f"results[{call.name!r}]: the vectors of embed() cannot be given by hand.")
        return _answer(call.request["model"], value)
    if call.kind == "human":
        return _outcome(value, call.ex.clock())
    if call.kind == "sleep":
        return None
    return value


def _answer(model: str, value: Any) -> dict[str, Any]:
    text = value if isinstance(value, str) else orjson.dumps(schema.plain(value, "result")).decode()
    return {
        "text": text,
        "finish_reason": "stop",
        "model": model,
        "usage": {name: 0 for name in Usage.__slots__},
        "cost": None,
        "added": [{"role": "assistant", "content": text}],
    }


def _outcome(value: Any, now: float) -> dict[str, Any]:
    if isinstance(value, bool):
        value = Decision(value)
    elif not isinstance(value, Decision):
        value = Decision(True, data=value)
    at = now if value.at is None else value.at.timestamp()
    data = None if value.data is None else codec.encode(value.data, where="result")
    return {"approved": value.approved, "by": value.by, "at": at, "comment": value.comment, "data": data}
