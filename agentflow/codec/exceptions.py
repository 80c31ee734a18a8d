"""Exceptions as plain data, and the exception that a first run and a replay both raise from it."""

from __future__ import annotations

import functools
from typing import Any, cast

import orjson

from agentflow.codec.classes import find_class, name_of
from agentflow.codec.common import MAX_DEPTH, UNSET, UnknownType, escaped, is_unicode, short_repr
from agentflow.codec.tree import read, write

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
    return describe(exc, MAX_DEPTH)


def describe(exc: BaseException, depth: int) -> dict[str, Any]:
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
    ref = original if isinstance(original, str) else name_of(original)
    out: dict[str, Any] = {"type": ref, "name": ref.rpartition(":")[2].rpartition(".")[2]}
    out["message"] = message if is_unicode(message) else message.encode("utf-8", "backslashreplace").decode()
    out["args"] = []
    if not isinstance(exc, BaseExceptionGroup):
        for i, arg in enumerate(exc.args):
            tree = _write_or_drop(arg, f"args[{i}]", dropped, inner_depth)
            out["args"].append(escaped(short_repr(arg, 500)) if tree is UNSET else tree)
    for key, values in (
        ("data", [(k, v) for k, v in exc.__dict__.items() if k not in given and not k.startswith("__")]),
        ("members", [(k, getattr(exc, k, None)) for base, ks in _MEMBERS.items() if isinstance(exc, base) for k in ks]),
    ):
        trees = {escaped(name): _write_or_drop(item, name, dropped, inner_depth) for name, item in values}
        out[key] = {name: tree for name, tree in trees.items() if tree is not UNSET}
    out["notes"] = [escaped(str(note)) for note in getattr(exc, "__notes__", ())]
    out["dropped"] = dropped
    if isinstance(exc, BaseExceptionGroup):
        out["group"] = escaped(exc.message)
        out["exceptions"] = [describe(inner, depth - 3) for inner in exc.exceptions]
    return out


def decode_exception(data: dict[str, Any]) -> tuple[type[BaseException] | None, tuple[Any, ...], dict[str, Any]]:
    """What :func:`encode_exception` wrote: ``(type, args, attributes)``; the type is None where it is not loaded.

    An attribute whose own type is not loaded is left out, an argument is given as text.
    """
    try:
        cls: Any = find_class(data["type"], lambda c: issubclass(c, BaseException), "exception")
    except UnknownType:
        cls = None
    args = tuple("(not loaded)" if a is UNSET else a for a in map(_read_or_unset, data["args"]))
    attributes = {name: _read_or_unset(item) for name, item in data["data"].items()}
    return cls, args, {name: item for name, item in attributes.items() if item is not UNSET}


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
        exc: BaseException = maker.__new__(cls, data["group"], [read_exception({"v": e}) for e in data["exceptions"]])
    else:
        exc = maker.__new__(cls)
        exc.args = args
    for name, item in data["members"].items():
        value = _read_or_unset(item)
        if hasattr(cls, name) and value is not UNSET and value is not None:
            setattr(exc, name, value)
    for note in data["notes"]:
        exc.add_note(note)
    return exc


def read_exception(node: dict[str, Any]) -> BaseException:
    """An exception that was a value, or part of a group: of its own type, else a plain one that says what it was."""
    data = node["v"]
    cls, args, attributes = decode_exception(data)
    lost = f"{data['name']}: {data['message']}"
    exc = Exception(lost) if cls is None else _make_exception(cls, args, data)
    exc.__dict__.update(attributes)
    return exc


def _write_or_drop(value: Any, name: str, dropped: list[str], depth: int) -> Any:
    try:
        tree = write(value, (None, name, id(value)), depth)
        orjson.dumps(tree)
        return tree
    except Exception:
        dropped.append(escaped(name))
        return UNSET


def _read_or_unset(node: Any) -> Any:
    try:
        return read(node)
    except UnknownType:
        return UNSET
