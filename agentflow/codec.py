"""Values to JSON text and back, with their exact types.

A tree of plain str, int, float, bool, None, list and dict (str keys) is its own JSON. Everything else becomes an object
whose first key is the tag: ``{"$af":"tuple","v":[1,2]}``. A dict of the user's that holds the tag key is itself tagged,
and quotes inside strings are escaped, so the text contains ``{"$af":`` exactly when it needs more than a JSON parser.

Reading a record imports nothing and calls nothing but classes of the recorded kind: types are looked up by name in the
namespaces of modules that are loaded already, and what is found must be a dataclass where a dataclass was recorded, and
so on. Objects are rebuilt without ``__init__`` and without validation, so that code which became stricter can still be
replayed: new fields get their defaults, removed fields are ignored.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any, NoReturn, TypeVar, Union, cast
from uuid import UUID
from weakref import WeakValueDictionary

import orjson

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
Where = tuple[Any, ...]  # (outer Where or None, ".name" or (key,) or a set's (item,), id of the value)

TAG = "$af"
_MARK = '{"' + TAG + '":'
_FLOAT_MAX = sys.float_info.max
_AS_IS = frozenset({str, int, bool, type(None)})
# Levels of JSON (a tagged value takes two or three); orjson stops at 254, Python's stack at some 300 of ours.
_MAX_DEPTH = 200
_C_TYPE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE


class UnknownType(NotRecordable):
    """A recorded type is not loaded, is ambiguous, or no longer fits what was recorded. ``path`` names the type."""


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
    return _decode(tree) if _MARK in text else tree


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
    other = _registered_names.get(name)
    if other is not None and f"{other[0].__module__}:{other[0].__qualname__}" != f"{cls.__module__}:{cls.__qualname__}":
        raise UsageError(f"register_type: the name {name!r} already belongs to {other[0].__qualname__}; pass name=")
    _registered[cls] = (name, encode)
    _registered_names[name] = (cls, decode)


# -- writing ----------------------------------------------------------------------------------------------------------


def _encode_plain(value: Any) -> str | None:
    """The JSON of a value that needs no tag, or None."""
    kind = type(value)
    if not (kind in _AS_IS or (kind is float and -_FLOAT_MAX <= value <= _FLOAT_MAX) or _is_plain(value, _MAX_DEPTH)):
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
            if not -_FLOAT_MAX <= item <= _FLOAT_MAX:
                return False
        elif depth == 0 or not _is_plain(item, depth - 1):
            return False
    return True


def _encode_tagged(value: Any, where: str) -> str:
    try:
        return orjson.dumps(_tree(value, (None, where, id(value)), _MAX_DEPTH)).decode()
    except (RecursionError, TypeError) as exc:
        if isinstance(exc, NotRecordable):
            raise
        if isinstance(exc, TypeError) and "ecursion" not in str(exc):
            raise
        raise NotRecordable(f"{where}: nested too deeply to be recorded; flatten it", where) from None


def _tree(value: Any, at: Where, depth: int) -> Any:
    """The value as a tree that orjson writes exactly. ``at`` is for messages, ``depth`` what may still be nested."""
    kind = type(value)
    if kind is str:
        return value if _is_unicode(value) else _tag("str", _b64(value.encode("utf-8", "surrogatepass")))
    if kind is bool or value is None:
        return value
    if kind is int:
        # hex: decimal conversion of huge integers is slow and limited to 4300 digits
        return value if -(2**63) <= value < 2**64 else _tag("int", hex(value))
    if kind is float:
        return value if -_FLOAT_MAX <= value <= _FLOAT_MAX else _tag("float", repr(value))
    if depth <= 0:
        _refuse_depth(at)
    if kind in _registered:
        name, encoder = _registered[kind]
        try:
            plain = encoder(value)
        except Exception as exc:
            _refuse(at, value, f"its registered encoder failed: {type(exc).__name__}: {exc}")
        return {TAG: "reg", "n": name, "v": _tree(plain, at, depth - 1)}
    if kind is dict:
        return _tree_dict(value, at, depth)
    if kind is list:
        return _items(value, at, depth)
    known = _WRITERS.get(kind)
    return known(value, at, depth - 1) if known else _tree_of_object(value, kind, at, depth - 1)


def _items(values: Iterable[Any], at: Where, depth: int) -> list[Any]:
    return [_tree(item, (at, (i,), id(item)), depth - 1) for i, item in enumerate(values)]


def _attributes(values: Iterable[tuple[str, Any]], at: Where, depth: int) -> dict[str, Any]:
    return {name: _tree(item, (at, f".{name}", id(item)), depth - 1) for name, item in values}


def _pairs(value: Any, at: Where, depth: int) -> list[Any]:
    return [
        [
            _tree(key, (at, (key,), id(key)), depth - 2),
            _tree(item, (at, (key,), id(item)), depth - 2),
        ]
        # dict.items knows nothing of an OrderedDict's order; a subclass's own items() may show something else
        for key, item in (OrderedDict if isinstance(value, OrderedDict) else dict).items(value)
    ]


def _tree_dict(value: dict[Any, Any], at: Where, depth: int) -> dict[str, Any]:
    if TAG not in value and all(type(key) is str and _is_unicode(key) for key in value):
        return {key: _tree(item, (at, (key,), id(item)), depth - 1) for key, item in value.items()}
    return _tag("dict", _pairs(value, at, depth - 1))


def _tree_set(value: Any, at: Where, depth: int) -> list[Any]:
    return sorted((_tree(item, (at, (item,), id(item)), depth - 1) for item in value), key=orjson.dumps)


def _tree_zone(zone: tzinfo | None, at: Where) -> Any:
    if zone is None:
        return None
    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [offset.days, offset.seconds, offset.microseconds, *name]
    zoneinfo: Any = sys.modules.get("zoneinfo")
    if zoneinfo is not None and type(zone) is zoneinfo.ZoneInfo:
        key = getattr(zone, "key", None)
        if key is not None:
            return key
    _refuse(at, zone, "use zoneinfo.ZoneInfo or datetime.timezone")


def _tree_moment(value: Any, at: Where, depth: int) -> dict[str, Any]:
    out = _tag(type(value).__name__, value.replace(tzinfo=None, fold=0).isoformat())
    if value.tzinfo is not None:
        out["z"] = _tree_zone(value.tzinfo, (at, ".tzinfo", 0))
    if value.fold:
        out["f"] = 1
    return out


def _tree_defaultdict(value: Any, at: Where, depth: int) -> dict[str, Any]:
    factory = value.default_factory
    if factory is not None and _BUILTINS.get(getattr(factory, "__name__", "")) is not factory:
        _refuse((at, ".default_factory", 0), factory, "only built-in types such as list or int can be recorded there")
    return {TAG: "defaultdict", "t": factory and factory.__name__, "v": _pairs(value, at, depth)}


def _tree_of_object(value: Any, kind: type, at: Where, depth: int) -> dict[str, Any]:
    if isinstance(value, Enum):
        out: dict[str, Any] = {TAG: "enum", "t": _ref(kind), "n": value.name}
        plain = value.value
        if type(plain) is int or (type(plain) is str and _is_unicode(plain)):
            out["v"] = _tree(plain, at, depth)
        elif isinstance(value, Flag):
            out["v"] = _tree(int(plain), at, depth)
        return out
    if isinstance(value, BaseException):
        return {TAG: "exc", "v": _describe(value, depth)}
    numpy = _loaded("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _tree_numpy(numpy, value, kind, at)
    pandas = _loaded("pandas")
    if pandas is not None:
        if isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index)):
            return _tree_pandas(pandas, value, at, depth)
        if value is pandas.NA or value is pandas.NaT or kind in (pandas.Timestamp, pandas.Timedelta):
            return _tree_pandas_scalar(pandas, value, kind, at)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        if len(value) != len(kind._fields):
            _refuse(at, value, "its length differs from its _fields")
        return {TAG: "namedtuple", "t": _ref(kind), "v": _attributes(zip(kind._fields, value, strict=True), at, depth)}
    if _is_model(kind):
        return _tree_model(value, at, depth)
    if kind.__module__ == "pydantic.types" and kind.__name__.startswith("Secret"):
        _refuse(at, value, "secrets are not recorded; leave it out, or use step(..., secret=True)")
    if _is_url(kind):
        return {TAG: "url", "t": _ref(kind), "v": str(value)}
    fields = _fields(kind)
    base = _builtin_base(kind)
    if fields is not None and base is None:
        return _tree_fields(value, kind, list(fields), at, depth)
    if base is not None and _is_plain_subclass(kind, base):
        out = {TAG: "sub", "t": _ref(kind), "b": base.__name__, "v": _base_tree(base, value, at, depth)}
        extra = _extra_attributes(value, kind, ())
        if extra:
            out["x"] = _attributes(extra, at, depth)
        return out
    _refuse(at, value, _hint(value, kind))


def _tree_fields(value: Any, kind: type, names: list[str], at: Where, depth: int) -> dict[str, Any]:
    """A dataclass or attrs instance: its fields, and whatever else ``__post_init__`` put beside them."""
    unset = [name for name in names if not hasattr(value, name)]
    out: dict[str, Any] = {TAG: "object", "t": _ref(kind)}
    out["v"] = _attributes(((name, getattr(value, name)) for name in names if name not in unset), at, depth)
    extra = _extra_attributes(value, kind, names)
    if extra:
        out["x"] = _attributes(extra, at, depth)
    if unset:
        out["u"] = unset
    return out


def _extra_attributes(value: Any, kind: type, names: Iterable[str]) -> list[tuple[str, Any]]:
    own = getattr(value, "__dict__", None) or {}
    return [
        (name, item)
        for name, item in own.items()
        # typing leaves __orig_class__ on generic instances; a cached property is computed again
        if name not in names
        and name != "__orig_class__"
        and not isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)
    ]


def _tree_model(value: Any, at: Where, depth: int) -> dict[str, Any]:
    kind = type(value)
    own = vars(value)
    out: dict[str, Any] = {TAG: "model", "t": _ref(kind)}
    generic = kind.__pydantic_generic_metadata__
    if generic["origin"] is not None:
        out["t"] = _ref(generic["origin"])
        out["g"] = [kind.__qualname__, [_tree_type(arg) for arg in generic["args"]]]
        _seen[f"{kind.__module__}:{kind.__qualname__}"] = kind
    fields = kind.__pydantic_fields__
    out["v"] = _attributes(((name, own[name]) for name in fields if name in own), at, depth)
    unset = [name for name in fields if name not in own]
    if unset:
        out["u"] = unset
    given = value.__pydantic_fields_set__
    if given != set(out["v"]):
        out["s"] = sorted(given)
    if value.__pydantic_extra__ is not None:
        out["x"] = _tree(value.__pydantic_extra__, at, depth)
    return out


def _tree_type(arg: Any) -> Any:
    """A type argument of a generic model, or None where it has no recorded form."""
    if arg is Any:
        return "any"
    if isinstance(arg, types.GenericAlias):
        origin: Any = arg.__origin__
        return {"o": _ref(origin), "a": [_tree_type(a) for a in arg.__args__]}
    if isinstance(arg, type):
        generic = getattr(arg, "__pydantic_generic_metadata__", None)
        if generic and generic["origin"] is not None:
            return {"o": _ref(generic["origin"]), "a": [_tree_type(a) for a in generic["args"]]}
        return _ref(arg)
    if isinstance(arg, types.UnionType) or getattr(arg, "__origin__", None) is Union:
        return {"u": [_tree_type(a) for a in arg.__args__]}
    return None


def _builtin_base(kind: type) -> Any:
    """Which built-in value type a class extends, or None."""
    for base in (str, int, float, complex, bytes, bytearray, tuple, list, set, frozenset, dict):
        if issubclass(kind, base):
            return base
    return None


def _is_plain_subclass(kind: type, base: type) -> bool:
    """Whether ``__dict__`` and the base's own value are all the state there is."""
    added = [cls for cls in kind.__mro__ if cls not in base.__mro__]
    return not any(
        vars(cls).get("__slots__")
        # written in C, as struct_time and defaultdict are: they keep state of their own
        or cls.__flags__ & _C_TYPE
        or isinstance(vars(cls).get("__new__"), types.BuiltinFunctionType)
        for cls in added
    )


def _base_tree(base: Any, value: Any, at: Where, depth: int) -> Any:
    if base is dict:
        return _pairs(value, at, depth)
    if base in (list, tuple):
        return _items(base.__iter__(value), at, depth)
    if base in (set, frozenset):
        return _tree_set(base.__iter__(value), at, depth)
    exact = base.__add__(value, base()) if base in (str, bytes, bytearray) else base.__pos__(value)
    return _tree(exact, at, depth)


def _refuse(at: Where, value: Any, why: str) -> NoReturn:
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
        parts.append(at[1] if isinstance(at[1], str) else f"[{_repr(at[1][0])}]")
        at = at[0]
    return "".join(reversed(parts))


def _hint(value: Any, kind: type) -> str:
    if isinstance(value, type):
        return "a class is code; record its name"
    if inspect.isawaitable(value) or inspect.isasyncgen(value):
        return "it was not awaited; await it and record what it gives"
    if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)):
        return "a function is code; record what it returns, or its name"
    if isinstance(value, types.ModuleType):
        return "a module is code"
    if isinstance(value, Iterator) and not hasattr(value, "read"):
        return "it is used up by reading it; record list(...) of it"
    if isinstance(value, (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()), memoryview)):
        return "it is a view of another value; record a dict, list or bytes made from it"
    if re.search(r"client|session|connection|socket|lock|pool|thread|engine|cursor", kind.__name__, re.I) or any(
        hasattr(kind, name) for name in ("close", "aclose", "fileno", "acquire")
    ):
        return "it is alive only in this process; make it where it is used and record plain data"
    return "make it a dataclass or a pydantic model, or teach the codec with agentflow.codec.register_type"


# -- reading ----------------------------------------------------------------------------------------------------------


def _decode(node: Any) -> Any:
    kind = type(node)
    if kind is list:
        return [_decode(item) if type(item) in (dict, list) else item for item in node]
    if kind is not dict:
        return node
    tag = node.get(TAG)
    if tag is None:
        return {key: _decode(item) if type(item) in (dict, list) else item for key, item in node.items()}
    reader = _READERS.get(tag) if type(tag) is str else None
    if reader is None:
        raise UnknownType(f"the record holds a {tag!r}, which this version of agentflow cannot read", str(tag))
    try:
        return reader(node)
    except (NotRecordable, RecursionError):
        raise
    except Exception as exc:
        what = str(node.get("t") or node.get("n") or tag)
        raise UnknownType(f"a recorded {what} cannot be rebuilt: {type(exc).__name__}: {exc}", what) from exc


def _look(node: Any) -> Any:
    try:
        return _decode(node)
    except NotRecordable:
        inner = node.get("v") if isinstance(node, dict) and TAG in node else node
    if isinstance(inner, dict):
        return {key: _look(item) for key, item in inner.items()}
    return [_look(item) for item in inner] if isinstance(inner, list) else inner


def _fill(cls: type, fields: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Recorded values for the fields the class has today, defaults for those added since."""
    recorded, unset = node["v"], node.get("u", ())
    out: dict[str, Any] = {}
    missing = []
    for name, default in fields.items():
        if name in recorded:
            out[name] = _decode(recorded[name])
        elif name in unset or default is _UNSET:
            continue
        elif default is None:
            missing.append(name)
        else:
            out[name] = default(out)
    if missing:
        raise UnknownType(
            f"{node['t']} now requires {', '.join(missing)}, which the record does not have: "
            "give the field a default, or run with fresh=True",
            node["t"],
        )
    return out


def _read_object(node: dict[str, Any]) -> Any:
    cls = _find(node["t"], lambda c: _fields(c) is not None and _builtin_base(c) is None, "dataclass", set(node["v"]))
    fields = _fields(cls)
    assert fields is not None
    value: Any = object.__new__(cls)
    for name, item in _fill(cls, fields, node).items():
        object.__setattr__(value, name, item)
    if "x" in node:
        vars(value).update({name: _decode(item) for name, item in node["x"].items()})
    return value


def _read_model(node: dict[str, Any]) -> Any:
    cls: Any = _find(node["t"], _is_model, "pydantic model", set(node["v"]))
    if "g" in node:
        cls = _parametrised(cls, *node["g"])
    fields: dict[str, Any] = {name: _model_default(info) for name, info in cls.__pydantic_fields__.items()}
    own = _fill(cls, fields, node)
    value = cls.__new__(cls)
    extra = _decode(node["x"]) if "x" in node else None
    if cls.model_config.get("extra") != "allow":
        extra = None
    elif extra is None:
        extra = {}
    private: dict[str, Any] | None = None
    if cls.__private_attributes__:
        private = {}
        for name, attribute in cls.__private_attributes__.items():
            # a factory may need what a replay has not (a key, a server): the attribute is then absent
            with contextlib.suppress(Exception):
                private[name] = attribute.get_default(call_default_factory=True, validated_data={**own, **private})
        private = {name: item for name, item in private.items() if repr(item) != "PydanticUndefined"}
    given = node["s"] if "s" in node else node["v"]
    object.__setattr__(value, "__dict__", own)
    object.__setattr__(value, "__pydantic_fields_set__", {n for n in given if n in own or (extra and n in extra)})
    object.__setattr__(value, "__pydantic_extra__", extra)
    object.__setattr__(value, "__pydantic_private__", private)
    return value


def _is_model(cls: type) -> bool:
    main = _loaded("pydantic.main")  # pydantic itself imports its parts when asked for a name
    return main is not None and issubclass(cls, main.BaseModel)


def _model_default(info: Any) -> Any:
    return None if info.is_required() else lambda own: info.get_default(call_default_factory=True, validated_data=own)


def _parametrised(cls: Any, qualname: str, args: list[Any]) -> Any:
    seen = _seen.get(f"{cls.__module__}:{qualname}")
    if seen is not None and seen.__pydantic_generic_metadata__["origin"] is cls:  # type: ignore[attr-defined]
        return seen
    for sub in cls.__subclasses__():
        if sub.__qualname__ == qualname and sub.__pydantic_generic_metadata__["origin"] is cls:
            return sub
    return cls[tuple(_read_type(arg) for arg in args)]


def _read_type(arg: Any) -> Any:
    if arg is None:
        raise UnknownType("the type argument of a generic model has no recorded form: name it in an annotation", "type")
    if arg == "any":
        return Any
    if isinstance(arg, str):
        return _find(arg, lambda c: True, "class")
    if "u" in arg:
        return Union[tuple(_read_type(a) for a in arg["u"])]  # noqa: UP007
    origin: Any = _find(arg["o"], lambda c: c in (list, dict, tuple, set, frozenset) or _is_model(c), "generic class")
    return origin[tuple(_read_type(a) for a in arg["a"])]


def _read_namedtuple(node: dict[str, Any]) -> Any:
    names = set(node["v"])
    cls: Any = _find(node["t"], lambda c: issubclass(c, tuple) and hasattr(c, "_fields"), "named tuple", names)
    defaults = cls._field_defaults
    fields = {name: (lambda own, name=name: defaults[name]) if name in defaults else None for name in cls._fields}
    return tuple.__new__(cls, _fill(cls, fields, node).values())


def _read_enum(node: dict[str, Any]) -> Any:
    cls: Any = _find(node["t"], lambda c: issubclass(c, Enum), "enum")
    value = _decode(node["v"]) if "v" in node else None
    member = cls.__members__.get(node["n"])
    if member is not None and (not issubclass(cls, Flag) or member.value == value):
        return member
    if "v" in node and (issubclass(cls, Flag) or value in cls._value2member_map_):
        return cls(value)
    raise UnknownType(f"{node['t']} has no member {node['n']} any more: put it back, or run with fresh=True", node["t"])


def _read_subclass(node: dict[str, Any]) -> Any:
    base: Any = _BUILTINS[node["b"]]
    cls = _find(
        node["t"], lambda c: issubclass(c, base) and _is_plain_subclass(c, base), f"subclass of {base.__name__}"
    )
    value: Any
    if base is dict:
        value = dict.__new__(cls)
        dict.update(value, ((_decode(k), _decode(v)) for k, v in node["v"]))
    elif base is list or base is set or base is bytearray:
        value = base.__new__(cls)
        base.__init__(value, _decode(node["v"]))
    else:
        value = base.__new__(cls, _decode(node["v"]))
    if "x" in node:
        vars(value).update({name: _decode(item) for name, item in node["x"].items()})
    return value


def _read_registered(node: dict[str, Any]) -> Any:
    if node["n"] not in _registered_names:
        raise UnknownType(f"{node['n']} is not registered: call agentflow.codec.register_type for it first", node["n"])
    return _registered_names[node["n"]][1](_decode(node["v"]))


def _read_moment(cls: Any, node: dict[str, Any]) -> Any:
    return cls.fromisoformat(node["v"]).replace(tzinfo=_read_zone(node.get("z")), fold=node.get("f", 0))


def _read_zone(zone: Any) -> tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        from zoneinfo import ZoneInfo

        return ZoneInfo(zone)
    return timezone(timedelta(*zone[:3]), *zone[3:])


def _read_defaultdict(node: dict[str, Any]) -> Any:
    factory: Any = None if node["t"] is None else _BUILTINS[node["t"]]
    return defaultdict(factory, ((_decode(k), _decode(v)) for k, v in node["v"]))


def _read_url(node: dict[str, Any]) -> Any:
    cls: Any = _find(node["t"], _is_url, "URL type")
    return cls(node["v"])


# -- finding types ----------------------------------------------------------------------------------------------------

_seen: WeakValueDictionary[str, type] = WeakValueDictionary()  # classes written by this process, local ones included
_moved: WeakValueDictionary[str, type] = WeakValueDictionary()  # found elsewhere than recorded
_registered: dict[type, tuple[str, Callable[[Any], Any]]] = {}
_registered_names: dict[str, tuple[type, Callable[[Any], Any]]] = {}


def _ref(cls: type) -> str:
    ref = f"{cls.__module__}:{cls.__qualname__}"
    if _seen.get(ref) is not cls:
        _seen[ref] = cls
    return ref


def _find(ref: str, fits: Callable[[Any], bool], kind: str, names: set[str] | None = None) -> type:
    """The loaded class a record means: where it was, in ``__main__``, or the only one of that name anywhere else."""
    module, _, qualname = ref.partition(":")
    here = _lookup(module, qualname) or _seen.get(ref)
    if here is not None:
        if not fits(here):
            raise UnknownType(f"{ref} was recorded as a {kind} and is none any more: run with fresh=True", ref)
        return here
    moved = _moved.get(ref)
    if moved is not None and _lookup(moved.__module__, qualname) is moved and fits(moved):
        return moved
    main = _lookup("__main__", qualname)
    found = [main] if main is not None and fits(main) and _could_hold(main, names, exactly=False) else []
    if not found:
        for name in list(sys.modules):
            if name.partition(".")[0] in sys.stdlib_module_names:
                continue
            cls = _lookup(name, qualname)
            if cls is not None and cls not in found and fits(cls) and _could_hold(cls, names, exactly=True):
                found.append(cls)
    if len(found) == 1:
        _moved[ref] = found[0]
        return found[0]
    if found:
        places = ", ".join(sorted(cls.__module__ for cls in found))
        raise UnknownType(
            f"{ref} is not loaded, and several modules have a {qualname} ({places}): import {module}", ref
        )
    advice = (
        "it was defined inside a function; define it at the top level of a module"
        if "<locals>" in qualname
        else f"import {module} before resuming; records never import code"
    )
    raise UnknownType(f"{ref}, a recorded {kind}, is not loaded: {advice}", ref)


def _lookup(module: str, qualname: str) -> type | None:
    """Walk namespaces without getattr, which could run a module's ``__getattr__`` and import."""
    node: Any = sys.modules.get(module)
    for part in qualname.split("."):
        if isinstance(node, type):
            space: Any = type.__getattribute__(node, "__dict__")
        else:
            try:
                space = object.__getattribute__(node, "__dict__")
            except AttributeError:
                return None
        node = space.get(part)
        if node is None:
            return None
    return node if isinstance(node, type) else None


def _could_hold(cls: Any, names: set[str] | None, *, exactly: bool) -> bool:
    if names is None:
        return True
    if "__pydantic_fields__" in cls.__dict__:
        required = {n for n, info in cls.__pydantic_fields__.items() if info.is_required()}
        fields = set(cls.__pydantic_fields__)
    elif issubclass(cls, tuple):
        fields = set(cls._fields)
        required = fields - set(cls._field_defaults)
    else:
        own = _fields(cls) or {}
        fields, required = set(own), {name for name, default in own.items() if default is None}
    return fields == names if exactly else required <= names


def _fields(cls: Any) -> dict[str, Any] | None:
    """Field name -> maker of its default; None where a value is required, _UNSET where it may be absent."""
    if dataclasses.is_dataclass(cls):
        out: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                out[field.name] = lambda own, default=field.default: default
            elif field.default_factory is not dataclasses.MISSING:
                out[field.name] = lambda own, factory=field.default_factory: factory()
            else:
                out[field.name] = None if field.init else _UNSET
        return out
    attributes = getattr(cls, "__attrs_attrs__", None)
    if attributes is None:
        return None
    nothing = sys.modules["attr"].NOTHING
    return {a.name: None if a.default is nothing else functools.partial(_attrs_default, a.default) for a in attributes}


def _attrs_default(default: Any, own: dict[str, Any]) -> Any:
    if not isinstance(default, sys.modules["attr"].Factory):
        return default
    return default.factory(types.SimpleNamespace(**own)) if default.takes_self else default.factory()


# -- arrays and frames ------------------------------------------------------------------------------------------------


def _tree_numpy(numpy: Any, value: Any, kind: type, at: Where) -> dict[str, Any]:
    if isinstance(value, numpy.ndarray) and kind is not numpy.ndarray:
        _refuse(at, value, "only plain numpy arrays have a recorded form; use numpy.asarray")
    if value.dtype.hasobject or value.dtype.kind in "OT":
        _refuse(at, value, f"an array of dtype {value.dtype} holds Python objects; use .tolist()")
    # a plain dtype is written as its string; a structured one as numpy's own .npy header does
    descr = numpy.lib.format.dtype_to_descr(value.dtype)
    out = {TAG: "numpy", "d": _tree(descr, at, _MAX_DEPTH)}
    if isinstance(value, numpy.ndarray):
        out["s"] = list(value.shape)
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            out["o"] = "F"
    out["v"] = _b64(value.tobytes(order=out.get("o", "C")))
    return out


def _read_numpy(node: dict[str, Any]) -> Any:
    numpy = _package("numpy")
    dtype = numpy.lib.format.descr_to_dtype(_decode(node["d"]))
    if dtype.hasobject:
        raise UnknownType("a recorded array claims to hold Python objects", "numpy")
    raw = base64.b64decode(node["v"])
    if "s" not in node:
        return numpy.ndarray((1,), dtype, raw).copy()[0]
    return numpy.ndarray(tuple(node["s"]), dtype, raw, order=node.get("o", "C")).copy(order="K")


def _tree_pandas(pandas: Any, value: Any, at: Where, depth: int) -> dict[str, Any]:
    kind = type(value).__name__
    if type(value) is pandas.DataFrame:
        columns = [_tree_column(pandas, value.iloc[:, i].array, at, depth) for i in range(value.shape[1])]
        body: Any = [
            _tree_index(pandas, value.columns, at, depth),
            columns,
            _tree_index(pandas, value.index, at, depth),
        ]
    elif type(value) is pandas.Series:
        body = [_tree(value.name, at, depth - 1), _tree_column(pandas, value.array, at, depth)]
        body.append(_tree_index(pandas, value.index, at, depth))
    elif isinstance(value, pandas.Index):
        kind, body = "Index", _tree_index(pandas, value, at, depth)
    else:
        _refuse(at, value, "subclasses of pandas types have no recorded form")
    out = {TAG: "pandas", "k": kind, "v": body}
    if kind != "Index" and value.attrs:
        out["a"] = _tree(value.attrs, (at, ".attrs", 0), depth - 1)
    try:
        exact = _same_pandas(value, _read_pandas(out))
    except NotRecordable:
        raise
    except Exception as exc:  # whatever pandas objects to, the value has no exact form
        _refuse(at, value, f"pandas cannot rebuild it exactly ({type(exc).__name__}: {exc})")
    if not exact:
        _refuse(at, value, "it cannot be rebuilt exactly; use plain columns, or .to_dict()")
    return out


def _tree_pandas_scalar(pandas: Any, value: Any, kind: type, at: Where) -> dict[str, Any]:
    if value is pandas.NA or value is pandas.NaT:
        return {TAG: "pandas", "k": "NA" if value is pandas.NA else "NaT"}
    zone = getattr(value, "tzinfo", None)
    out = {TAG: "pandas", "k": kind.__name__, "v": _tree(value.asm8, at, 9)}  # asm8 is UTC
    if zone is not None:
        out["z"] = _tree_zone(zone, (at, ".tzinfo", 0))
    return out


def _same_pandas(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if not hasattr(one, "index"):
        return bool(one.identical(two) and getattr(one, "freq", None) == getattr(two, "freq", None))
    same = _same_pandas(one.index, two.index) and one.equals(two) and one.attrs == two.attrs
    if one.ndim == 1:
        return bool(same and one.dtype == two.dtype and type(one.name) is type(two.name) and one.name == two.name)
    return bool(same and list(one.dtypes) == list(two.dtypes) and _same_pandas(one.columns, two.columns))


def _tree_index(pandas: Any, index: Any, at: Where, depth: int) -> dict[str, Any]:
    names = _items(index.names, (at, ".names", 0), depth)
    if type(index) is pandas.RangeIndex:
        return {"r": [index.start, index.stop, index.step], "n": names}
    if type(index) is pandas.MultiIndex:
        levels = [index.get_level_values(i).array for i in range(index.nlevels)]
        return {"m": [_tree_column(pandas, level, at, depth) for level in levels], "n": names}
    return {"c": _tree_column(pandas, index.array, at, depth), "q": getattr(index, "freqstr", None), "n": names}


def _tree_column(pandas: Any, array: Any, at: Where, depth: int) -> dict[str, Any]:
    dtype = array.dtype
    if isinstance(dtype, pandas.CategoricalDtype):
        categories = _tree_index(pandas, dtype.categories, at, depth)
        return {"d": "category", "v": _tree(array.codes, at, depth), "c": categories, "o": bool(dtype.ordered)}
    if isinstance(dtype, pandas.DatetimeTZDtype):
        utc = array.tz_convert("UTC").tz_localize(None).to_numpy()
        return {"d": "zone", "v": _tree(utc, at, depth), "z": _tree_zone(dtype.tz, at)}
    if str(dtype) == "object":
        return {"d": "object", "v": _items(array, at, depth)}
    if hasattr(dtype, "hasobject"):
        return {"d": "numpy", "v": _tree(array.to_numpy(), at, depth)}
    return {"d": str(dtype), "v": _items([None if pandas.isna(item) else item for item in array.tolist()], at, depth)}


def _read_pandas(node: dict[str, Any]) -> Any:
    pandas = _package("pandas")
    if node["k"] in ("NA", "NaT"):
        return getattr(pandas, node["k"])
    body = node["v"]
    if node["k"] in ("Timestamp", "Timedelta"):
        scalar = getattr(pandas, node["k"])(_decode(body))
        return scalar.tz_localize("UTC").tz_convert(_read_zone(node["z"])) if "z" in node else scalar
    if node["k"] == "Index":
        return _read_index(pandas, body)
    if node["k"] == "Series":
        out = pandas.Series(_read_column(pandas, body[1]), index=_read_index(pandas, body[2]), name=_decode(body[0]))
    else:
        columns = {i: _read_column(pandas, column) for i, column in enumerate(body[1])}
        out = pandas.DataFrame(columns, index=_read_index(pandas, body[2]))
        out.columns = _read_index(pandas, body[0])
    out.attrs = _decode(node.get("a", {}))
    return out


def _read_index(pandas: Any, node: dict[str, Any]) -> Any:
    names = _decode(node["n"])
    if "r" in node:
        return pandas.RangeIndex(*node["r"], name=names[0])
    if "m" in node:
        return pandas.MultiIndex.from_arrays([_read_column(pandas, level) for level in node["m"]], names=names)
    column = _read_column(pandas, node["c"])
    index = pandas.Index(column, name=names[0], dtype=column.dtype)
    if node["q"] is not None:
        index.freq = node["q"]
    return index


def _read_column(pandas: Any, node: dict[str, Any]) -> Any:
    kind = node["d"]
    if kind == "category":
        categories = _read_index(pandas, node["c"])
        return pandas.Categorical.from_codes(_decode(node["v"]), categories=categories, ordered=node["o"])
    if kind == "zone":
        return pandas.DatetimeIndex(_decode(node["v"])).tz_localize("UTC").tz_convert(_read_zone(node["z"])).array
    if kind == "object":
        values = pandas.Series([None] * len(node["v"]), dtype=object).to_numpy(copy=True)
        for i, item in enumerate(node["v"]):
            values[i] = _decode(item)
        return values
    return _decode(node["v"]) if kind == "numpy" else pandas.array(_decode(node["v"]), dtype=kind)


def _loaded(name: str) -> Any:
    """The module if it is imported completely. While another thread still imports it, no value of its types exists."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def _package(name: str) -> Any:
    """numpy or pandas: fixed names, so no record chooses what is imported."""
    try:
        if name == "numpy":
            import numpy

            return numpy
        import pandas  # type: ignore[import-untyped,unused-ignore]

        return pandas
    except ImportError as exc:
        raise UnknownType(f"the record holds a {name} value: install {name} to read it", name) from exc


# -- exceptions -------------------------------------------------------------------------------------------------------

# State that built-in exceptions keep outside ``args`` and ``__dict__``.
_MEMBERS: dict[type[BaseException], tuple[str, ...]] = {
    OSError: ("errno", "strerror", "filename", "filename2"),
    UnicodeEncodeError: ("encoding", "object", "start", "end", "reason"),
    UnicodeDecodeError: ("encoding", "object", "start", "end", "reason"),
    UnicodeTranslateError: ("object", "start", "end", "reason"),
    ImportError: ("msg", "name", "path"),
    AttributeError: ("name",),
    NameError: ("name",),
    StopIteration: ("value",),
    SystemExit: ("code",),
    SyntaxError: ("msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset", "print_file_and_line"),
}


def encode_exception(exc: BaseException) -> dict[str, Any]:
    """Describe an exception as plain JSON data. Never fails: what cannot be recorded is left out and listed.

    Returns:
        ``type`` (``module:qualname``), ``name`` (bare), ``message`` (``str(exc)``), ``args`` (one that cannot be
        recorded is replaced by its repr), ``data`` (attributes), ``members`` (such as ``errno``), ``notes``,
        ``dropped`` (names of what was left out) and for groups ``exceptions``. Values inside carry type tags:
        read them with :func:`decode_exception`.
    """
    return _describe(exc, _MAX_DEPTH)


def _describe(exc: BaseException, depth: int) -> dict[str, Any]:
    # a third for what is inside: an exception that holds itself ends after four rounds
    inner_depth = depth // 3
    kind: Any = type(exc)
    original = kind.__dict__.get("__agentflow_original__", kind)
    dropped: list[str] = []
    given = exc.__dict__.get("__agentflow_attrs__", ())
    try:
        message = str(exc)
    except Exception:
        message = kind.__name__
    ref = original if isinstance(original, str) else _ref(original)
    out: dict[str, Any] = {"type": ref, "name": ref.rpartition(":")[2].rpartition(".")[2]}
    out["message"] = message if _is_unicode(message) else message.encode("utf-8", "backslashreplace").decode()
    out["args"] = []
    if not isinstance(exc, BaseExceptionGroup):
        for i, arg in enumerate(exc.args):
            tree = _tree_or_drop(arg, f"args[{i}]", dropped, inner_depth)
            out["args"].append(_ascii(_repr(arg, 500)) if tree is _UNSET else tree)
    for key, values in (
        ("data", [(k, v) for k, v in exc.__dict__.items() if k not in given and not k.startswith("__")]),
        ("members", [(k, getattr(exc, k, None)) for base, ks in _MEMBERS.items() if isinstance(exc, base) for k in ks]),
    ):
        trees = {_ascii(name): _tree_or_drop(item, name, dropped, inner_depth) for name, item in values}
        out[key] = {name: tree for name, tree in trees.items() if tree is not _UNSET}
    out["notes"] = [_ascii(str(note)) for note in getattr(exc, "__notes__", ())]
    out["dropped"] = dropped
    if isinstance(exc, BaseExceptionGroup):
        out["group"] = _ascii(exc.message)
        out["exceptions"] = [_describe(inner, depth - 3) for inner in exc.exceptions]
    return out


def decode_exception(data: dict[str, Any]) -> tuple[type[BaseException] | None, tuple[Any, ...], dict[str, Any]]:
    """What :func:`encode_exception` wrote: ``(type, args, attributes)``; the type is None where it is not loaded.

    An attribute whose own type is not loaded is left out, an argument is given as text.
    """
    try:
        cls: Any = _find(data["type"], lambda c: issubclass(c, BaseException), "exception")
    except UnknownType:
        cls = None
    args = tuple("(not loaded)" if a is _UNSET else a for a in map(_decode_or_unset, data["args"]))
    attributes = {name: _decode_or_unset(item) for name, item in data["data"].items()}
    return cls, args, {name: item for name, item in attributes.items() if item is not _UNSET}


def rebuild_exception(data: dict[str, Any], extra_base: type[BaseException], attrs: dict[str, Any]) -> BaseException:
    """Make the exception that both a first run and a replay raise.

    Args:
        data: what :func:`encode_exception` gave.
        extra_base: mixed into the class, so that ``except StepFailed`` catches it beside the original type.
        attrs: set on the instance. An attribute of the same name that the original exception carried is the user's
            and stays.

    Returns:
        An instance of the original type and of ``extra_base``; of ``extra_base`` alone when the original type is not
        loaded or cannot be combined. ``str()`` of it is the original's. The original's ``__init__`` is not called.
    """
    cls, args, attributes = decode_exception(data)
    originals: tuple[Any, ...] = (cls, None)
    for original in originals:
        try:
            kind = _mixed(data["type"] if original is None else original, cast(Any, extra_base))
            exc = _make_exception(kind, args, data)
            break
        except Exception:  # final classes, layouts that do not combine, hooks of the user's
            if original is None:
                raise
    own = {} if data["type"].startswith("agentflow.") else attributes
    exc.__dict__.update({**attributes, **attrs, **own})
    exc.__dict__["__agentflow_message__"] = data["message"]
    exc.__dict__["__agentflow_attrs__"] = frozenset(attrs.keys() - own.keys())
    return exc


@functools.lru_cache(maxsize=512)
def _mixed(original: Any, extra_base: Any) -> Any:
    def __str__(self: BaseException) -> str:
        return str(self.__dict__.get("__agentflow_message__", ""))

    if isinstance(original, str):
        module, _, qualname = original.partition(":")
        bases: tuple[type, ...] = (extra_base,)
    else:
        module, qualname = original.__module__, original.__qualname__
        bases = (extra_base,) if issubclass(extra_base, original) else (original, extra_base)
    space = {"__str__": __str__, "__module__": module, "__qualname__": qualname, "__agentflow_original__": original}
    return type(qualname.rpartition(".")[2], bases, space)


def _make_exception(cls: type[BaseException], args: tuple[Any, ...], data: dict[str, Any]) -> BaseException:
    """An instance without the class's own ``__new__`` and ``__init__``."""
    maker: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    if issubclass(cls, BaseExceptionGroup):
        exc: BaseException = maker.__new__(cls, data["group"], [_read_exception({"v": e}) for e in data["exceptions"]])
    else:
        exc = maker.__new__(cls)
        exc.args = args
    for name, item in data["members"].items():
        value = _decode_or_unset(item)
        if hasattr(cls, name) and value is not _UNSET and value is not None:
            setattr(exc, name, value)
    for note in data["notes"]:
        exc.add_note(note)
    return exc


def _read_exception(node: dict[str, Any]) -> BaseException:
    """An exception that was a value, or part of a group: of its own type, else a plain one that says what it was."""
    data = node["v"]
    cls, args, attributes = decode_exception(data)
    lost = f"{data['name']}: {data['message']}"
    exc = Exception(lost) if cls is None else _make_exception(cls, args, data)
    exc.__dict__.update(attributes)
    return exc


def _tree_or_drop(value: Any, name: str, dropped: list[str], depth: int) -> Any:
    try:
        tree = _tree(value, (None, name, id(value)), depth)
        orjson.dumps(tree)
        return tree
    except Exception:
        dropped.append(_ascii(name))
        return _UNSET


def _decode_or_unset(node: Any) -> Any:
    try:
        return _decode(node)
    except UnknownType:
        return _UNSET


# -- small helpers and tables -----------------------------------------------------------------------------------------

_UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<unset>"})()


def _tag(tag: str, value: Any) -> dict[str, Any]:
    return {TAG: tag, "v": value}


def _b64(raw: bytes | bytearray) -> str:
    return base64.b64encode(raw).decode("ascii")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ascii(text: str) -> str:
    return text if _is_unicode(text) else text.encode("utf-8", "backslashreplace").decode()


def _repr(value: Any, limit: int = 60) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_url(cls: type) -> bool:
    return any(base.__module__.startswith("pydantic") and base.__name__.endswith("Url") for base in cls.__mro__)


_BUILTINS: dict[str, type] = {
    cls.__name__: cls
    for cls in (str, int, float, complex, bool, bytes, bytearray, tuple, list, set, frozenset, dict)
}  # fmt: skip
_PATHS: dict[str, type[PurePath]] = {
    cls.__name__: cls for cls in (PurePath, PurePosixPath, PureWindowsPath, Path, PosixPath, WindowsPath)
}


def _tree_text(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return _tag(type(value).__name__, str(value))


def _tree_path(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return {TAG: "path", "t": type(value).__name__, "v": _tree(str(value), at, depth)}


def _tree_bytes(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return _tag(type(value).__name__, _b64(value))


def _tree_sequence(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return _tag(type(value).__name__, _items(value, at, depth))


def _tree_mapping(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return _tag(type(value).__name__, _pairs(value, at, depth))


_WRITERS: dict[type, Callable[[Any, Where, int], Any]] = {
    tuple: _tree_sequence,
    set: lambda v, at, depth: _tag("set", _tree_set(v, at, depth)),
    frozenset: lambda v, at, depth: _tag("frozenset", _tree_set(v, at, depth)),
    bytes: _tree_bytes,
    bytearray: _tree_bytes,
    datetime: _tree_moment,
    time: _tree_moment,
    date: lambda v, at, depth: _tag("date", v.isoformat()),
    timedelta: lambda v, at, depth: _tag("timedelta", [v.days, v.seconds, v.microseconds]),
    Decimal: _tree_text,
    UUID: _tree_text,
    complex: lambda v, at, depth: _tag("complex", _items((v.real, v.imag), at, depth)),
    range: lambda v, at, depth: _tag("range", _items((v.start, v.stop, v.step), at, depth)),
    Fraction: lambda v, at, depth: _tag("Fraction", _items((v.numerator, v.denominator), at, depth)),
    OrderedDict: _tree_mapping,
    Counter: _tree_mapping,
    defaultdict: _tree_defaultdict,
    deque: lambda v, at, depth: {TAG: "deque", "v": _items(v, at, depth), "m": v.maxlen},
    **dict.fromkeys(_PATHS.values(), _tree_path),
}


def _read_pairs(node: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((_decode(key), _decode(item)) for key, item in node["v"])


def _read_counter(node: dict[str, Any]) -> Any:
    counter: Counter[Any] = Counter()
    dict.update(counter, _read_pairs(node))
    return counter


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "str": lambda n: base64.b64decode(n["v"]).decode("utf-8", "surrogatepass"),
    "int": lambda n: int(n["v"], 16),
    "float": lambda n: float(n["v"]),
    "dict": lambda n: dict(_read_pairs(n)),
    "tuple": lambda n: tuple(_decode(n["v"])),
    "set": lambda n: set(_decode(n["v"])),
    "frozenset": lambda n: frozenset(_decode(n["v"])),
    "bytes": lambda n: base64.b64decode(n["v"]),
    "bytearray": lambda n: bytearray(base64.b64decode(n["v"])),
    "datetime": functools.partial(_read_moment, datetime),
    "time": functools.partial(_read_moment, time),
    "date": lambda n: date.fromisoformat(n["v"]),
    "timedelta": lambda n: timedelta(*n["v"]),
    "Decimal": lambda n: Decimal(n["v"]),
    "UUID": lambda n: UUID(n["v"]),
    "complex": lambda n: complex(*_decode(n["v"])),
    "range": lambda n: range(*_decode(n["v"])),
    "Fraction": lambda n: Fraction(*_decode(n["v"])),
    "OrderedDict": lambda n: OrderedDict(_read_pairs(n)),
    "Counter": _read_counter,
    "defaultdict": _read_defaultdict,
    "deque": lambda n: deque(_decode(n["v"]), n["m"]),
    "path": lambda n: _PATHS[n["t"]](_decode(n["v"])),
    "namedtuple": _read_namedtuple,
    "enum": _read_enum,
    "object": _read_object,
    "model": _read_model,
    "sub": _read_subclass,
    "reg": _read_registered,
    "url": _read_url,
    "numpy": _read_numpy,
    "pandas": _read_pandas,
    "exc": _read_exception,
}
