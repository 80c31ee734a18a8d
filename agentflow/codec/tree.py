"""The walk over a value that makes a tree for JSON of it, and the walk back.

``write`` and ``read`` know JSON's own types and classes given to ``register_type``; for the rest they look into WRITERS
and READERS, whose entries call them again for what is inside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import orjson

from agentflow.codec.common import FLOAT_MAX, TAG, UnknownType, Where, b64, is_unicode, short_repr, tagged
from agentflow.errors import NotRecordable

# Filled in agentflow/codec/__init__.py, so that the modules of the single forms can import this one.
WRITERS: dict[type, Callable[[Any, Where, int], Any]] = {}  # by exact type; under object, what all others take
READERS: dict[str, Callable[[dict[str, Any]], Any]] = {}  # by tag
registered: dict[type, tuple[str, Callable[[Any], Any]]] = {}
registered_names: dict[str, tuple[type, Callable[[Any], Any]]] = {}


# -- writing ----------------------------------------------------------------------------------------------------------


def write(value: Any, at: Where, depth: int) -> Any:
    """The value as a tree that orjson writes exactly. ``at`` is for messages, ``depth`` what may still be nested."""
    kind = type(value)
    if kind is str:
        return value if is_unicode(value) else tagged("str", b64(value.encode("utf-8", "surrogatepass")))
    if kind is bool or value is None:
        return value
    if kind is int:
        # hex: decimal conversion of huge integers is slow and limited to 4300 digits
        return value if -(2**63) <= value < 2**64 else tagged("int", hex(value))
    if kind is float:
        return value if -FLOAT_MAX <= value <= FLOAT_MAX else tagged("float", repr(value))
    if depth <= 0:
        _refuse_depth(at)
    if kind in registered:
        name, encoder = registered[kind]
        try:
            plain = encoder(value)
        except Exception as exc:
            refuse(at, value, f"its registered encoder failed: {type(exc).__name__}: {exc}")
        return {TAG: "reg", "n": name, "v": write(plain, at, depth - 1)}
    if kind is dict:
        return _write_dict(value, at, depth)
    if kind is list:
        return write_items(value, at, depth)
    return (WRITERS.get(kind) or WRITERS[object])(value, at, depth - 1)


def write_items(values: Iterable[Any], at: Where, depth: int) -> list[Any]:
    return [write(item, (at, (i,), id(item)), depth - 1) for i, item in enumerate(values)]


def write_attributes(values: Iterable[tuple[str, Any]], at: Where, depth: int) -> dict[str, Any]:
    return {name: write(item, (at, f".{name}", id(item)), depth - 1) for name, item in values}


def write_pairs(value: Any, at: Where, depth: int) -> list[Any]:
    return [
        [
            write(key, (at, (key,), id(key)), depth - 2),
            write(item, (at, (key,), id(item)), depth - 2),
        ]
        # dict.items knows nothing of an OrderedDict's order; a subclass's own items() may show something else
        for key, item in (OrderedDict if isinstance(value, OrderedDict) else dict).items(value)
    ]


def _write_dict(value: dict[Any, Any], at: Where, depth: int) -> dict[str, Any]:
    if TAG not in value and all(type(key) is str and is_unicode(key) for key in value):
        return {key: write(item, (at, (key,), id(item)), depth - 1) for key, item in value.items()}
    return tagged("dict", write_pairs(value, at, depth - 1))


def write_set(value: Any, at: Where, depth: int) -> list[Any]:
    return sorted((write(item, (at, (item,), id(item)), depth - 1) for item in value), key=orjson.dumps)


def refuse(at: Where, value: Any, why: str) -> NoReturn:
    path = _path(at)
    raise NotRecordable(f"{path}: {type(value).__name__} cannot be recorded: {why}", path)


def _refuse_depth(at: Where) -> NoReturn:
    chain: list[Where] = []
    node: Where | None = at
    while node is not None:
        chain.append(node)
        node = node[0]
    met: set[int] = set()
    for node in reversed(chain):
        if node[2] in met:
            path = _path(node)
            raise NotRecordable(f"{path}: refers back to a value that contains it; record an id in its place", path)
        met.add(node[2])
    path = str(chain[-1][1])
    raise NotRecordable(f"{path}: nested too deeply to be recorded; flatten it", path)


def _path(at: Where | None) -> str:
    parts: list[str] = []
    while at is not None:
        parts.append(at[1] if isinstance(at[1], str) else f"[{short_repr(at[1][0])}]")
        at = at[0]
    return "".join(reversed(parts))


# -- reading ----------------------------------------------------------------------------------------------------------


def read(node: Any) -> Any:
    kind = type(node)
    if kind is list:
        return [read(item) if type(item) in (dict, list) else item for item in node]
    if kind is not dict:
        return node
    tag = node.get(TAG)
    if tag is None:
        return {key: read(item) if type(item) in (dict, list) else item for key, item in node.items()}
    reader = READERS.get(tag) if type(tag) is str else None
    if reader is None:
        raise UnknownType(f"the record holds a {tag!r}, which this version of agentflow cannot read", str(tag))
    try:
        return reader(node)
    except (NotRecordable, RecursionError):
        raise
    except Exception as exc:
        what = str(node.get("t") or node.get("n") or tag)
        raise UnknownType(f"a recorded {what} cannot be rebuilt: {type(exc).__name__}: {exc}", what) from exc


def read_registered(node: dict[str, Any]) -> Any:
    if node["n"] not in registered_names:
        raise UnknownType(f"{node['n']} is not registered: call agentflow.codec.register_type for it first", node["n"])
    return registered_names[node["n"]][1](read(node["v"]))
