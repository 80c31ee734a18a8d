"""What a person types for a field of a form, read as the form has it: in a terminal, in a notebook."""

from __future__ import annotations

from typing import Any

import orjson

from agentflow import schema
from agentflow.errors import UsageError
from agentflow.records import UNSET, HumanTask

YES, NO = ("y", "yes"), ("n", "no")


def asks_for_data(task: HumanTask) -> bool:
    """Whether a yes to this task may come with data."""
    return task.schema is not None or task.type in ("input", "in_doubt")


def kind(form: dict[str, Any]) -> str:
    """What may be typed for a field, in a word or two."""
    if "enum" in form:
        return " | ".join(map(str, form["enum"]))
    if choices := form.get("anyOf") or form.get("oneOf"):
        return " or ".join(dict.fromkeys(word for word in map(kind, choices) if word and word != "null"))
    words = {"string": "text", "integer": "whole number", "boolean": "yes or no", "array": "JSON", "object": "JSON"}
    named = str(form.get("type", "JSON"))
    return words.get(named, named)


def filled(task: HumanTask, form: dict[str, Any]) -> dict[str, Any]:
    """The data shown, where it is the form filled in already: what is typed changes it."""
    try:
        before = schema.plain(task.data)
    except UsageError:  # no plain form
        return {}
    fits = isinstance(before, dict) and set(before) <= set(form["properties"])
    return before if fits and schema.misfit(before, form) is None else {}


def read(text: str, form: dict[str, Any], name: str, root: dict[str, Any] | None) -> tuple[Any, str | None]:
    """The value that a text stands for, and None; or UNSET, and why it is none.

    >>> read("7", {"type": "integer"}, "count", None), read("yes", {"type": "boolean"}, "paid", None)
    ((7, None), (True, None))
    """
    wrong = None
    for value in (text, parsed(text, UNSET), text.lower() in YES if text.lower() in YES + NO else UNSET):
        if value is not UNSET:
            wrong = schema.misfit(value, form, name, root)
            if wrong is None:
                return value, None
    return UNSET, wrong


def parsed(text: str, default: Any) -> Any:
    """The JSON that a text is, or the default where it is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return default


def user() -> str | None:
    """Who answers in this process: the name that somebody is logged in with."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name
        return None
