"""Canonical text of data: how it is written. ``compare.py`` says how two texts differ.

One encoder for ever: the text of a value decides whether a paid step is found again, so a change here is a new digest
version. Text is JSON with sorted keys; what JSON cannot say is an object with one key that begins with ``~``::

    (1, 2)              {"~tuple": [1, 2]}
    Order(id=7)         {"~obj": ["Order", {"id": 7}]}      bare type name, fields equal to their default left out
    datetime(...)       {"~datetime": "2026-11-22T21:00:00+00:00"}
    a client, a lock    {"~opaque": 0}                      not compared

Paths (``args[0].items[3].price``) are derived from the text, never stored.
"""

from __future__ import annotations

import binascii
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import gc
import math
import pathlib
import re
import types
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import orjson

from agentflow.digests import blake2b
from agentflow.errors import UsageError
from agentflow.rich import Listed

LONG = 64 * 1024
"""Strings above this many characters, and bytes above 1 KB, stand in the text as length and hash."""

_CHUNK, _DEEPEST = 40, 120  # orjson nests 254 deep and one level takes up to three; Python's own stack ends near 1000
_ATOMS = {str, int, bool, type(None)}
_TEXT = {str}
_PLAIN = _ATOMS | {float, list, dict}
_CONSUMED = (
    types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, map, filter, zip, enumerate, reversed
)  # fmt: skip
_MISSING: Any = object()
_URL_SAFE = bytes.maketrans(b"+/", b"-_")


def short_digest(data: bytes) -> str:
    """22 characters ``[A-Za-z0-9_-]``: BLAKE2b, 16 bytes."""
    raw = blake2b(data, digest_size=16).digest()
    return binascii.b2a_base64(raw, newline=False)[:22].translate(_URL_SAFE).decode()


def bare_name(obj: Any) -> str:
    """A type's or function's qualified name without module and enclosing functions."""
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None) or type(obj).__name__
    return cast(str, name).rpartition("<locals>.")[2]


_KINDS = ("model_call", "prompt_loader", "context", "step", "tool", "workflow")
MARKS = frozenset(f"__agentflow_{kind}__" for kind in _KINDS)
"""What agentflow's own objects carry, so that modules below can tell them without knowing them."""
_marks: dict[type, frozenset[str]] = {}


def _marks_of(cls: type) -> frozenset[str]:
    """The marks that a class, with those it is derived from, was written with. Kept: it is asked for at every call."""
    names = MARKS.intersection(name for c in cls.__mro__ for name in c.__dict__)
    if len(_marks) >= 4096:
        _marks.clear()
    _marks[cls] = found = frozenset(name for name in names if getattr(cls, name, None) is True)
    return found


def unmarked(obj: Any) -> bool:
    """Whether ``obj`` and its type carry none of ``MARKS``."""
    marks = _marks.get(type(obj))
    if _marks_of(type(obj)) if marks is None else marks:
        return False
    d = getattr(obj, "__dict__", None)
    return not d or not isinstance(d, (dict, types.MappingProxyType)) or MARKS.isdisjoint(d)


def marked(obj: Any, mark: str) -> bool:
    """Whether ``obj`` or its type carries ``mark = True``, without triggering ``__getattr__``."""
    marks = _marks.get(type(obj))
    if mark in (_marks_of(type(obj)) if marks is None else marks):
        return True
    d = getattr(obj, "__dict__", None)
    return d is not None and isinstance(d, (dict, types.MappingProxyType)) and d.get(mark) is True


def dumps(tree: Any) -> bytes:
    return orjson.dumps(tree, option=orjson.OPT_SORT_KEYS)


def atoms_text(name: str, values: Sequence[Any]) -> bytes | None:
    """The text of ``{name: [...]}`` where the values are text, numbers, booleans and None as JSON has them, or None."""
    if not _ATOMS.issuperset(map(type, values)):
        return None
    try:
        out = orjson.dumps({name: values})
    except TypeError:  # big integers, lone surrogates
        return None
    return out if len(out) <= LONG else None


def _is_plain(value: Any) -> bool:
    """Whether everything in a list or dict is what JSON keeps as it is."""
    todo = [value]
    for v in todo:  # which grows on the way
        if type(v) is dict:
            if not _TEXT.issuperset(map(type, v)):
                return False
            items = v.values()
        else:
            items = v
        if _ATOMS.issuperset(map(type, items)):
            continue
        if len(v) > _CHUNK:
            return _is_plain_large(value)
        for x in list(items):
            t = type(x)
            if t is list or t is dict:
                todo.append(x)
            elif not (t in _ATOMS or (t is float and math.isfinite(x))):
                return False
        if len(todo) > _CHUNK:  # which also ends what is nested deeper than that, or for ever
            return _is_plain_large(value)
    return True


def _is_plain_large(value: Any) -> bool:
    """The same, walked by the garbage collector's C code: faster where there is much."""
    level, seen = [value], set[int]()
    for _ in range(_CHUNK):
        level = gc.get_referents(*level)
        kinds = set(map(type, level))
        if not kinds <= _PLAIN:
            return False
        if kinds <= _ATOMS:
            return True
        rest = [x for x in level if type(x) not in _ATOMS]
        if float in kinds and not all(math.isfinite(x) for x in rest if type(x) is float):
            return False
        nested = {id(x): x for x in rest if type(x) is not float}  # each once: shared and cyclic ones would multiply
        level = [x for i, x in nested.items() if i not in seen]
        seen.update(nested)
    return False


def _may_hold_long(out: bytes) -> bool:
    """Whether a string in this JSON may be longer than ``LONG``: no quote for so long. Errs on the side of yes."""
    if len(out) <= LONG:
        return False
    if b'\\"' in out:
        out = out.replace(b'\\"', b"  ")
    at = 0
    while at <= len(out) - LONG:
        quote = out.rfind(b'"', at, at + LONG)
        if quote < 0:
            return True
        at = quote + 1
    return False


_Form = Callable[["Encoder", Any, type], Any]
_forms: dict[type, _Form] = {}


def _form(cls: type, form: _Form) -> _Form:
    """Notes how instances of a class are written where nothing but the class decides that."""
    if len(_forms) >= 4096:
        _forms.clear()
    _forms[cls] = form
    return form


class Encoder:
    """Turns values into trees for ``dumps``; one instance per text.

    Args:
        own: whether a class is the user's: its instances count by attributes; others without data form are opaque.
        attrs: names of the attributes that count for such instances; None: all of them.
        free: the captured values of a function, in an order that renaming does not change.

    After encoding, ``opaque`` says whether something had no data form, ``mutable`` whether anything can change in
    place.
    """

    __slots__ = ("_attrs", "_free", "_lenient", "_own", "_stack", "mutable", "opaque")

    def __init__(
        self,
        own: Callable[[type], bool],
        attrs: Callable[[], frozenset[str] | None] = lambda: None,
        free: Callable[[types.FunctionType], Sequence[Any]] | None = None,
        lenient: bool = False,
    ) -> None:
        self._own, self._attrs, self._free, self._lenient = own, attrs, free or _cells, lenient
        self._stack: dict[int, int] = {}
        self.opaque = self.mutable = False

    def encode(self, v: Any) -> Any:
        """The tree of ``v``. Raises UsageError for generators and coroutines, which a call would use up."""
        t = type(v)
        if t is str:
            return v if len(v) < 1000 and v.isascii() else _text(v)
        if t is int:
            return v if -(2**63) <= v < 2**64 else {"~int": str(v)}
        if t is float:
            return v if math.isfinite(v) else {"~float": repr(v)}
        if v is None or t is bool:
            return v
        scalar = _SCALARS.get(t)
        if scalar is not None:
            return scalar(v)
        depth = len(self._stack)
        if depth >= _DEEPEST:
            return self._deep(v)
        if (key := id(v)) in self._stack:
            return {"~cycle": depth - self._stack[key]}
        self._stack[key] = depth
        try:
            tree = self._container(v, t) if t in _CONTAINERS else self._object(v, t)
            if depth and depth % _CHUNK == 0:
                return {"~deep": short_digest(dumps(tree))}
            return tree
        finally:
            del self._stack[key]

    def _deep(self, v: Any) -> Any:
        """Digest of a value nested too deeply to recurse into: lists, tuples and dicts of scalars."""
        tokens, todo, seen = list[bytes](), [v], set[int]()
        while todo:
            x = todo.pop()
            t = type(x)
            if t in _PLAIN - {list, dict} or t in _SCALARS:
                tokens.append(dumps(self.encode(x)))
            elif id(x) in seen or t not in (list, tuple, dict):
                self.opaque |= id(x) not in seen
                tokens.append(b"?")
            else:
                seen.add(id(x))
                tokens.append(f"{t.__name__}{len(x)}".encode())
                todo += [y for k in sorted(x, key=repr) for y in (x[k], k)] if t is dict else x
        return {"~deep": short_digest(b" ".join(tokens))}

    def _container(self, v: Any, t: type) -> Any:
        if t is tuple:
            return {"~tuple": [self.encode(x) for x in v]}
        if t is set or t is frozenset:
            self.mutable |= t is set
            return {f"~{t.__name__}": sorted((self.encode(x) for x in v), key=dumps)}
        self.mutable = True
        if t is deque:
            return {"~deque": [self.encode(x) for x in v]}
        if _is_plain(v):
            try:
                out = dumps(v)
            except (TypeError, ValueError):  # other keys, big integers, lone surrogates: the slow way says them all
                pass
            else:
                if b'"~' not in out and not _may_hold_long(out):
                    return orjson.Fragment(out)
        return self._mapping(v) if t is dict else [self.encode(x) for x in v]

    def _mapping(self, v: Mapping[Any, Any]) -> Any:
        items = list(v.items())
        if all(type(k) is str and k[:1] != "~" and len(k) <= LONG and _text(k) is k for k, _ in items):
            return {k: self.encode(x) for k, x in items}
        pairs = [(self.encode(k), self.encode(x)) for k, x in items]
        return {"~dict": sorted(pairs, key=lambda p: dumps(p[0]))}

    def _fields(self, name: str, values: Mapping[str, Any], default: Callable[[str], Any]) -> Any:
        """An object by its fields, without those that hold their default."""
        self.mutable = True
        fields = {}
        for key, value in values.items():
            tree, usual = self.encode(value), default(key)
            if usual is not _MISSING and (value is usual or self._same(value, tree, usual)):
                continue
            fields[key] = tree
        return {"~obj": [name, fields]}

    def _same(self, value: Any, tree: Any, usual: Any) -> bool:
        t = type(usual)
        if t in _ATOMS and type(value) in _ATOMS:
            return type(value) is t and bool(value == usual)
        return dumps(tree) == dumps(self._default_tree(usual))

    def _default_tree(self, usual: Any) -> Any:
        return Encoder(self._own, self._attrs, self._free, lenient=True).encode(usual)

    def _object(self, v: Any, t: type) -> Any:
        form = _forms.get(t)
        if form is not None and not marked(v, "__agentflow_context__"):
            return form(self, v, t)
        if isinstance(v, _CONSUMED):
            if self._lenient:
                return self._none()
            raise UsageError(
                f"a step cannot be given a {t.__name__}: running it uses it up, and it cannot be compared. "
                + ("Pass the function and its arguments." if t is types.CoroutineType else "Pass list(...) of it.")
            )
        if marked(v, "__agentflow_context__"):
            return {"~ctx": 0}
        if isinstance(v, enum.Enum):
            return {"~enum": [bare_name(t), v.name if v.name is not None else self.encode(v.value)]}
        if isinstance(v, type):
            return {"~type": bare_name(v)}
        if t is types.ModuleType:
            return {"~module": v.__name__}
        if isinstance(v, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)):
            return self._function(v)
        if dataclasses.is_dataclass(v):
            return _form(t, Encoder._dataclass)(self, v, t)
        if isinstance(getattr(t, "__pydantic_fields__", None), dict) and isinstance(getattr(v, "__dict__", None), dict):
            return _form(t, Encoder._model)(self, v, t)
        if isinstance(fields := getattr(t, "__attrs_attrs__", None), tuple):
            usual = {a.name: a.default for a in fields}
            values = {a.name: getattr(v, a.name) for a in fields if hasattr(v, a.name)}
            return self._fields(bare_name(t), values, lambda n: _attrs_default(usual[n]))
        if isinstance(v, tuple) and isinstance(names := getattr(t, "_fields", None), tuple):
            usual = getattr(t, "_field_defaults", {})
            return self._fields(bare_name(t), dict(zip(names, v, strict=False)), lambda n: usual.get(n, _MISSING))
        for kind, base in _BASES.items():
            if isinstance(v, kind):
                return {"~sub": [bare_name(t), base(self, v)]}
        if t.__name__ in ("SimpleNamespace", "Namespace") and isinstance(held := getattr(v, "__dict__", None), dict):
            self.mutable = True
            return {"~sub": [t.__name__, self._mapping(held)]}
        root = t.__module__.partition(".")[0]
        if root == "ipaddress":
            return {"~sub": [t.__name__, str(v)]}
        if root in ("numpy", "pandas", "polars") and (tree := self._array(v, t, root)) is not None:
            return tree
        if isinstance(v, Mapping) and t.__name__ != "_Environ":
            self.mutable = True
            return {"~sub": [bare_name(t), self._mapping(v)]}
        if isinstance(v, BaseException):
            return {"~exc": [bare_name(t), [self.encode(x) for x in v.args]]}
        if (marked(v, "__agentflow_step__") or marked(v, "__agentflow_tool__")) and hasattr(v, "fn"):
            return self.encode(v.fn)
        if marked(v, "__agentflow_workflow__"):
            return {"~sub": ["workflow", self.encode(v.__agentflow_given__())]}
        return self._own_instance(v, t) if self._own(t) else self._none()

    def _dataclass(self, v: Any, t: type) -> Any:
        known = {f.name: f for f in dataclasses.fields(v)}
        values = {n: x for n in known if (x := getattr(v, n, _MISSING)) is not _MISSING}
        return self._fields(bare_name(t), values, lambda n: _default(known[n].default, known[n].default_factory))

    def _model(self, v: Any, t: Any) -> Any:
        model, values = t.__pydantic_fields__, {**v.__dict__, **(getattr(v, "__pydantic_extra__", None) or {})}
        return self._fields(
            bare_name(t),
            values,
            lambda n: _default(model[n].default, model[n].default_factory) if n in model else _MISSING,
        )

    def _none(self) -> Any:
        self.opaque = True
        return {"~opaque": 0}

    def _own_instance(self, v: Any, t: type) -> Any:
        self.mutable = True
        values = dict(getattr(v, "__dict__", ()))
        for c in t.__mro__:
            slots = c.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if slot not in ("__dict__", "__weakref__") and hasattr(v, slot):
                    values[slot] = getattr(v, slot)
        attrs = self._attrs()
        lenient, self._lenient = self._lenient, True
        try:
            chosen = {k: self.encode(x) for k, x in values.items() if attrs is None or k in attrs}
        finally:
            self._lenient = lenient
        return {"~obj": [bare_name(t), chosen]}

    def _function(self, v: Any) -> Any:
        if isinstance(v, functools.partial):
            return {"~partial": [self.encode(v.func), [self.encode(x) for x in v.args], self._mapping(v.keywords)]}
        if isinstance(v, types.MethodType):
            return {"~method": [bare_name(v.__func__), self.encode(v.__self__)]}
        if isinstance(v, types.BuiltinFunctionType):
            inner = v.__self__
            bound = None if inner is None or isinstance(inner, types.ModuleType) else self.encode(inner)
            return {"~method": [v.__name__, bound]}
        given = [self.encode(x) for x in self._free(v)]
        defaults = [self.encode(x) for x in v.__defaults__ or ()]
        return {"~fn": [bare_name(v), given, defaults, self._mapping(v.__kwdefaults__ or {})]}

    def _array(self, v: Any, t: type, root: str) -> Any:
        self.mutable = True
        name = t.__name__
        if root == "numpy":
            if name == "ndarray" or hasattr(v, "__array_interface__"):
                if v.dtype.hasobject:
                    return {"~array": [v.dtype.str, list(v.shape), self.encode(v.tolist())]}
                return {"~array": [str(v.dtype.descr), list(v.shape), short_digest(v.tobytes())]}
            return None
        if root == "polars" and hasattr(v, "write_ipc"):
            return {"~frame": [name, [str(x) for x in v.dtypes], self.encode(v.to_dict(as_series=False))]}
        if name == "DataFrame":
            columns = [self._array_of(v.iloc[:, i]) for i in range(v.shape[1])]
            return {"~frame": [name, self.encode(v.columns.tolist()), columns, self._array_of(v.index)]}
        if name == "Series":
            return {"~frame": [name, self.encode(v.name), self._array_of(v), self._array_of(v.index)]}
        if hasattr(v, "to_numpy"):
            return {"~frame": [name, self.encode(getattr(v, "name", None)), self._array_of(v)]}
        return {"~na": name} if name in ("NAType", "NaTType") else None

    def _array_of(self, column: Any) -> Any:
        values = column.to_numpy()
        if values.dtype.hasobject:
            return [str(column.dtype), [self.encode(x) for x in values.tolist()]]
        return [str(column.dtype), short_digest(values.tobytes())]


def _cells(fn: types.FunctionType) -> list[Any]:
    return [cell_value(c) for c in fn.__closure__ or ()]


class _Unset:
    """Stands for a captured variable that has no value yet."""


UNSET = _Unset()


def cell_value(cell: types.CellType) -> Any:
    """What a closure cell holds now; ``UNSET`` when nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return UNSET


def _text(v: str) -> Any:
    if len(v) > LONG:
        return {"~str": [len(v), short_digest(v.encode("utf-8", "surrogatepass"))]}
    if v.isascii():
        return v
    try:
        v.encode()
    except UnicodeEncodeError:
        return {"~str": v.encode("utf-8", "surrogatepass").hex()}
    return v


def _bytes(v: Any) -> Any:
    raw = bytes(v)
    return {f"~{type(v).__name__}": raw.hex() if len(raw) <= 1024 else [len(raw), short_digest(raw)]}


def _default(value: Any, factory: Any) -> Any:
    if factory is not None and factory is not dataclasses.MISSING:
        # Other factories may read a clock: their fields always count.
        return factory() if factory in (list, dict, set, tuple, str, int, float, bool, frozenset) else _MISSING
    return _MISSING if value is dataclasses.MISSING or type(value).__name__ == "PydanticUndefinedType" else value


def _attrs_default(value: Any) -> Any:
    if type(value).__name__ == "Factory":
        return _default(dataclasses.MISSING, value.factory)
    return _MISSING if type(value).__name__ == "_Nothing" else value


def _tag(tag: str, form: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda v: {tag: form(v)}


_SCALARS: dict[type, Callable[[Any], Any]] = {
    dt.datetime: _tag("~datetime", dt.datetime.isoformat),
    dt.date: _tag("~date", dt.date.isoformat),
    dt.time: _tag("~time", dt.time.isoformat),
    dt.timedelta: _tag("~timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
    dt.timezone: _tag("~zone", str),
    decimal.Decimal: _tag("~decimal", str),
    fractions.Fraction: _tag("~fraction", str),
    complex: _tag("~complex", repr),
    uuid.UUID: _tag("~uuid", str),
    range: _tag("~range", lambda v: [str(v.start), str(v.stop), str(v.step)]),
    re.Pattern: _tag("~re", lambda v: [str(v.pattern), v.flags]),
    bytes: _bytes,
    type(...): _tag("~const", repr),
    type(NotImplemented): _tag("~const", repr),
    _Unset: _tag("~unset", lambda v: 0),
    **dict.fromkeys((pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath),
                    _tag("~path", lambda v: v.as_posix())),
}  # fmt: skip
_CONTAINERS = {tuple, list, Listed, dict, set, frozenset, deque}


def _items(cls: type) -> Callable[[Encoder, Any], Any]:
    def items(e: Encoder, v: Any) -> Any:
        e.mutable = True
        return e.encode(cls(v))

    return items


_BASES: dict[type, Callable[[Encoder, Any], Any]] = {
    bytearray: lambda e, v: _items(bytes)(e, v),
    memoryview: lambda e, v: _items(bytes)(e, v),
    str: lambda e, v: _text(str.__str__(v)),
    bytes: lambda e, v: _bytes(bytes(v)),
    int: lambda e, v: e.encode(int(v)),
    float: lambda e, v: e.encode(float(v)),
    dt.datetime: lambda e, v: {"~datetime": v.isoformat()},
    dt.tzinfo: lambda e, v: str(v) if " at 0x" not in repr(v) else type(v).__name__,
    decimal.Decimal: lambda e, v: str(v),
    pathlib.PurePath: lambda e, v: v.as_posix(),
    dict: lambda e, v: _items(dict)(e, v),
    list: lambda e, v: _items(list)(e, v),
    tuple: lambda e, v: [e.encode(x) for x in v],
    set: lambda e, v: _items(set)(e, v),
    frozenset: lambda e, v: e.encode(frozenset(v)),
}
