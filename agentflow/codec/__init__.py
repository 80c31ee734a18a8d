"""Values to JSON text and back, with their exact types.

A tree of plain str, int, float, bool, None, list and dict (str keys) is its own JSON. Everything else becomes an object
whose first key is the tag: ``{"$af":"tuple","v":[1,2]}``. A dict of the user's that holds the tag key is itself tagged,
and quotes inside strings are escaped, so the text contains ``{"$af":`` exactly when it needs more than a JSON parser.

Reading a record imports nothing and calls nothing but classes of the recorded kind: types are looked up by name in the
namespaces of modules that are loaded already, and what is found must be a dataclass where a dataclass was recorded, and
so on. Objects are rebuilt without ``__init__`` and without validation, so that code which became stricter can still be
replayed: new fields get their defaults, removed fields are ignored.

Here is what other modules use; ``tree`` holds the recursion, ``values``, ``objects``, ``arrays`` and ``exceptions`` one
family of types each, and ``classes`` finds a recorded class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import orjson

from agentflow.codec import objects, values
from agentflow.codec.arrays import read_numpy, read_pandas
from agentflow.codec.common import FLOAT_MAX, MAX_DEPTH, TAG, UnknownType
from agentflow.codec.exceptions import decode_exception, encode_exception, read_exception, rebuild_exception
from agentflow.codec.tree import READERS, WRITERS, read, read_registered, registered, registered_names, write
from agentflow.errors import NotRecordable, UsageError

__all__ = [
    "UnknownType",
    "decode",
    "decode_exception",
    "encode",
    "encode_exception",
    "look",
    "rebuild_exception",
    "register_type",
    "roundtrip",
]

T = TypeVar("T")
_MARK = '{"' + TAG + '":'
_AS_IS = frozenset({str, int, bool, type(None)})

WRITERS.update({**values.WRITERS, object: objects.write_object})
READERS.update({**values.READERS, **objects.READERS})
READERS.update({"reg": read_registered, "numpy": read_numpy, "pandas": read_pandas, "exc": read_exception})


def encode(value: Any, *, where: str = "value") -> str:
    """Write a value as JSON text that :func:`decode` turns back into an equal value of the same type.

    Args:
        value: what to record. Shared references are written twice; private attributes of pydantic models are left out
            (they come back with their defaults), as ``model_dump`` does.
        where: what to call the value in an error, such as ``result``.

    Returns:
        One line of JSON. The same value gives the same text in every process; sets are sorted by their items' text.

    Raises:
        NotRecordable: something inside has no recorded form; the message and ``.path`` name it
            (``result.items[3].client: Session ...``).

    >>> encode({"a": [1, (2, 3)]})
    '{"a":[1,{"$af":"tuple","v":[2,3]}]}'
    """
    text = _encode_plain(value)
    return _encode_tagged(value, where) if text is None else text


def decode(text: str) -> Any:
    """Read what :func:`encode` wrote.

    Raises:
        UnknownType: a class of the value is not loaded, or no longer fits the record; says which and what to do.
        ValueError: the text is no JSON.

    >>> decode('{"a":[1,{"$af":"tuple","v":[2,3]}]}')
    {'a': [1, (2, 3)]}
    """
    tree = orjson.loads(text)
    # One character is looked for first: that is many times faster where there is none, as in most texts.
    return read(tree) if "$" in text and _MARK in text else tree


def look(text: str) -> Any:
    """``decode`` for looking on from outside: an object whose class is not loaded here becomes a dict of its fields.

    >>> look('{"$af":"model","t":"nowhere:Order","v":{"id":"A-1","lines":{"$af":"tuple","v":[1]}}}')
    {'id': 'A-1', 'lines': (1,)}
    """
    return _look(orjson.loads(text))


def roundtrip(value: Any, *, where: str = "value") -> tuple[str, Any]:
    """Encode a value and give it back as a later replay will see it: ``(text, decoded)``."""
    text = _encode_plain(value)
    if text is None:
        text = _encode_tagged(value, where)
        return text, decode(text)
    return text, orjson.loads(text) if type(value) in (dict, list) else value


def register_type(
    cls: type[T], *, encode: Callable[[T], Any], decode: Callable[[Any], T], name: str | None = None
) -> None:
    """Teach the codec a class it does not know; comes before every built-in rule. Subclasses are not covered.

    Args:
        cls: the class, matched exactly.
        encode: gives a value that can be recorded.
        decode: makes an instance from what ``encode`` gave.
        name: what records call the class; ``module:qualname`` when None. Keep it when the class moves.

    Raises:
        UsageError: the class is one of JSON's own, or the name belongs to another class.
    """
    name = name or f"{cls.__module__}:{cls.__qualname__}"
    if cls in _AS_IS or cls in (float, list, dict):
        raise UsageError(f"{cls.__name__} has its own form in JSON and cannot be registered")
    other = registered_names.get(name)
    if other is not None and f"{other[0].__module__}:{other[0].__qualname__}" != f"{cls.__module__}:{cls.__qualname__}":
        raise UsageError(f"register_type: the name {name!r} already belongs to {other[0].__qualname__}; pass name=")
    registered[cls] = (name, encode)
    registered_names[name] = (cls, decode)


def _encode_plain(value: Any) -> str | None:
    """The JSON of a value that needs no tag, or None."""
    kind = type(value)
    if not (kind in _AS_IS or (kind is float and -FLOAT_MAX <= value <= FLOAT_MAX) or _is_plain(value, MAX_DEPTH)):
        return None
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer over 64 bits, or a lone surrogate
        return None


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind is dict:
        if TAG in value:
            return False
        for key in value:
            if type(key) is not str:
                return False
        items: Iterable[Any] = value.values()
    elif kind is list:
        items = value
    else:
        return False
    for item in items:
        kind = type(item)
        if kind is str or kind in _AS_IS:
            continue
        if kind is float:
            if not -FLOAT_MAX <= item <= FLOAT_MAX:
                return False
        elif depth == 0 or not _is_plain(item, depth - 1):
            return False
    return True


def _encode_tagged(value: Any, where: str) -> str:
    try:
        return orjson.dumps(write(value, (None, where, id(value)), MAX_DEPTH)).decode()
    except (RecursionError, TypeError) as exc:
        if isinstance(exc, NotRecordable):
            raise
        if isinstance(exc, TypeError) and "ecursion" not in str(exc):
            raise
        raise NotRecordable(f"{where}: nested too deeply to be recorded; flatten it", where) from None


def _look(node: Any) -> Any:
    try:
        return read(node)
    except NotRecordable:
        inner = node.get("v") if isinstance(node, dict) and TAG in node else node
    if isinstance(inner, dict):
        return {key: _look(item) for key, item in inner.items()}
    return [_look(item) for item in inner] if isinstance(inner, list) else inner
