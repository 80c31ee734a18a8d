"""Values on their way to the page: without secrets, cut where they are large, as text that is exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from agentflow.shown import shown

LARGE = 32_768  # characters of a value that are sent without being asked for


def text_of(value: Any) -> str:
    """A plain value as people read it: text as it is, all else as indented JSON."""
    return value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()


def cut(value: Any) -> dict[str, Any]:
    """A plain value as text: ``text`` (at most its beginning), ``size`` (characters in all), ``cut``, ``json``."""
    text = text_of(value)
    return {"text": text[:LARGE], "size": len(text), "cut": len(text) > LARGE, "json": not isinstance(value, str)}


def with_texts(tree: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A tree without secrets, and under ``texts`` its named values as text: a browser's numbers are not exact.

    One that is large is null in the tree, and in ``texts`` its beginning. The masks are set before anything is cut.
    """
    made: dict[str, Any] = shown(tree)
    made["texts"] = {name: cut(made[name]) for name in names if made.get(name) is not None}
    for name, text in made["texts"].items():
        if text["cut"]:
            made[name] = None
    return made
