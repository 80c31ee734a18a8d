"""Instances of classes: dataclasses, attrs, pydantic models, named tuples, enums and subclasses of built-in types."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, Flag
from typing import Any, Union

from agentflow.codec.arrays import write_numpy, write_pandas, write_pandas_scalar
from agentflow.codec.classes import fields_of, find_class, name_of, written_classes
from agentflow.codec.common import TAG, UNSET, UnknownType, Where, is_unicode, loaded
from agentflow.codec.exceptions import describe
from agentflow.codec.tree import read, refuse, write, write_attributes, write_items, write_pairs, write_set
from agentflow.codec.values import BUILTINS

# -- writing ----------------------------------------------------------------------------------------------------------


def write_object(value: Any, at: Where, depth: int) -> dict[str, Any]:
    """Any value whose exact type has no writer of its own; refused with a hint when it has no recorded form."""
    kind: Any = type(value)
    if isinstance(value, Enum):
        out: dict[str, Any] = {TAG: "enum", "t": name_of(kind), "n": value.name}
        plain = value.value
        if type(plain) is int or (type(plain) is str and is_unicode(plain)):
            out["v"] = write(plain, at, depth)
        elif isinstance(value, Flag):
            out["v"] = write(int(plain), at, depth)
        return out
    if isinstance(value, BaseException):
        return {TAG: "exc", "v": describe(value, depth)}
    numpy = loaded("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return write_numpy(numpy, value, kind, at)
    pandas = loaded("pandas")
    if pandas is not None:
        if isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index)):
            return write_pandas(pandas, value, at, depth)
        if value is pandas.NA or value is pandas.NaT or kind in (pandas.Timestamp, pandas.Timedelta):
            return write_pandas_scalar(pandas, value, kind, at)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        if len(value) != len(kind._fields):
            refuse(at, value, "its length differs from its _fields")
        return {
            TAG: "namedtuple",
            "t": name_of(kind),
            "v": write_attributes(zip(kind._fields, value, strict=True), at, depth),
        }
    if _is_model(kind):
        return _write_model(value, at, depth)
    if kind.__module__ == "pydantic.types" and kind.__name__.startswith("Secret"):
        refuse(at, value, "secrets are not recorded; leave it out, or use step(..., secret=True)")
    if _is_url(kind):
        return {TAG: "url", "t": name_of(kind), "v": str(value)}
    fields = fields_of(kind)
    base = _builtin_base(kind)
    if fields is not None and base is None:
        return _write_fields(value, kind, list(fields), at, depth)
    if base is not None and _is_plain_subclass(kind, base):
        out = {TAG: "sub", "t": name_of(kind), "b": base.__name__, "v": _write_base(base, value, at, depth)}
        extra = _extra_attributes(value, kind, ())
        if extra:
            out["x"] = write_attributes(extra, at, depth)
        return out
    refuse(at, value, _hint(value, kind))


def _write_fields(value: Any, kind: type, names: list[str], at: Where, depth: int) -> dict[str, Any]:
    """A dataclass or attrs instance: its fields, and whatever else ``__post_init__`` put beside them."""
    unset = [name for name in names if not hasattr(value, name)]
    out: dict[str, Any] = {TAG: "object", "t": name_of(kind)}
    out["v"] = write_attributes(((name, getattr(value, name)) for name in names if name not in unset), at, depth)
    extra = _extra_attributes(value, kind, names)
    if extra:
        out["x"] = write_attributes(extra, at, depth)
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


def _write_model(value: Any, at: Where, depth: int) -> dict[str, Any]:
    kind = type(value)
    own = vars(value)
    out: dict[str, Any] = {TAG: "model", "t": name_of(kind)}
    generic = kind.__pydantic_generic_metadata__
    if generic["origin"] is not None:
        out["t"] = name_of(generic["origin"])
        out["g"] = [kind.__qualname__, [_write_type(arg) for arg in generic["args"]]]
        written_classes[f"{kind.__module__}:{kind.__qualname__}"] = kind
    fields = kind.__pydantic_fields__
    out["v"] = write_attributes(((name, own[name]) for name in fields if name in own), at, depth)
    unset = [name for name in fields if name not in own]
    if unset:
        out["u"] = unset
    given = value.__pydantic_fields_set__
    if given != set(out["v"]):
        out["s"] = sorted(given)
    if value.__pydantic_extra__ is not None:
        out["x"] = write(value.__pydantic_extra__, at, depth)
    return out


def _write_type(arg: Any) -> Any:
    """A type argument of a generic model, or None where it has no recorded form."""
    if arg is Any:
        return "any"
    if isinstance(arg, types.GenericAlias):
        origin: Any = arg.__origin__
        return {"o": name_of(origin), "a": [_write_type(a) for a in arg.__args__]}
    if isinstance(arg, type):
        generic = getattr(arg, "__pydantic_generic_metadata__", None)
        if generic and generic["origin"] is not None:
            return {"o": name_of(generic["origin"]), "a": [_write_type(a) for a in generic["args"]]}
        return name_of(arg)
    if isinstance(arg, types.UnionType) or getattr(arg, "__origin__", None) is Union:
        return {"u": [_write_type(a) for a in arg.__args__]}
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


def _write_base(base: Any, value: Any, at: Where, depth: int) -> Any:
    if base is dict:
        return write_pairs(value, at, depth)
    if base in (list, tuple):
        return write_items(base.__iter__(value), at, depth)
    if base in (set, frozenset):
        return write_set(base.__iter__(value), at, depth)
    exact = base.__add__(value, base()) if base in (str, bytes, bytearray) else base.__pos__(value)
    return write(exact, at, depth)


def _is_model(cls: type) -> bool:
    main = loaded("pydantic.main")  # pydantic itself imports its parts when asked for a name
    return main is not None and issubclass(cls, main.BaseModel)


def _is_url(cls: type) -> bool:
    return any(base.__module__.startswith("pydantic") and base.__name__.endswith("Url") for base in cls.__mro__)


_C_TYPE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE


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


def _fill(cls: type, fields: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Recorded values for the fields the class has today, defaults for those added since."""
    recorded, unset = node["v"], node.get("u", ())
    out: dict[str, Any] = {}
    missing = []
    for name, default in fields.items():
        if name in recorded:
            out[name] = read(recorded[name])
        elif name in unset or default is UNSET:
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
    cls = find_class(
        node["t"], lambda c: fields_of(c) is not None and _builtin_base(c) is None, "dataclass", set(node["v"])
    )
    fields = fields_of(cls)
    assert fields is not None
    value: Any = object.__new__(cls)
    for name, item in _fill(cls, fields, node).items():
        object.__setattr__(value, name, item)
    if "x" in node:
        vars(value).update({name: read(item) for name, item in node["x"].items()})
    return value


def _read_model(node: dict[str, Any]) -> Any:
    cls: Any = find_class(node["t"], _is_model, "pydantic model", set(node["v"]))
    if "g" in node:
        cls = _parametrised(cls, *node["g"])
    fields: dict[str, Any] = {name: _model_default(info) for name, info in cls.__pydantic_fields__.items()}
    own = _fill(cls, fields, node)
    value = cls.__new__(cls)
    extra = read(node["x"]) if "x" in node else None
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


def _model_default(info: Any) -> Any:
    return None if info.is_required() else lambda own: info.get_default(call_default_factory=True, validated_data=own)


def _parametrised(cls: Any, qualname: str, args: list[Any]) -> Any:
    seen = written_classes.get(f"{cls.__module__}:{qualname}")
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
        return find_class(arg, lambda c: True, "class")
    if "u" in arg:
        return Union[tuple(_read_type(a) for a in arg["u"])]  # noqa: UP007
    origin: Any = find_class(
        arg["o"], lambda c: c in (list, dict, tuple, set, frozenset) or _is_model(c), "generic class"
    )
    return origin[tuple(_read_type(a) for a in arg["a"])]


def _read_namedtuple(node: dict[str, Any]) -> Any:
    names = set(node["v"])
    cls: Any = find_class(node["t"], lambda c: issubclass(c, tuple) and hasattr(c, "_fields"), "named tuple", names)
    defaults = cls._field_defaults
    fields = {name: (lambda own, name=name: defaults[name]) if name in defaults else None for name in cls._fields}
    return tuple.__new__(cls, _fill(cls, fields, node).values())


def _read_enum(node: dict[str, Any]) -> Any:
    cls: Any = find_class(node["t"], lambda c: issubclass(c, Enum), "enum")
    value = read(node["v"]) if "v" in node else None
    member = cls.__members__.get(node["n"])
    if member is not None and (not issubclass(cls, Flag) or member.value == value):
        return member
    if "v" in node and (issubclass(cls, Flag) or value in cls._value2member_map_):
        return cls(value)
    raise UnknownType(f"{node['t']} has no member {node['n']} any more: put it back, or run with fresh=True", node["t"])


def _read_subclass(node: dict[str, Any]) -> Any:
    base: Any = BUILTINS[node["b"]]
    cls = find_class(
        node["t"], lambda c: issubclass(c, base) and _is_plain_subclass(c, base), f"subclass of {base.__name__}"
    )
    value: Any
    if base is dict:
        value = dict.__new__(cls)
        dict.update(value, ((read(k), read(v)) for k, v in node["v"]))
    elif base is list or base is set or base is bytearray:
        value = base.__new__(cls)
        base.__init__(value, read(node["v"]))
    else:
        value = base.__new__(cls, read(node["v"]))
    if "x" in node:
        vars(value).update({name: read(item) for name, item in node["x"].items()})
    return value


def _read_url(node: dict[str, Any]) -> Any:
    cls: Any = find_class(node["t"], _is_url, "URL type")
    return cls(node["v"])


READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "namedtuple": _read_namedtuple,
    "enum": _read_enum,
    "object": _read_object,
    "model": _read_model,
    "sub": _read_subclass,
    "url": _read_url,
}
