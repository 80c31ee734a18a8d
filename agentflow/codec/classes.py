"""Finding the class that a record means among the modules that are loaded; nothing is imported for it."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from agentflow.codec.common import UNSET, UnknownType

written_classes: WeakValueDictionary[str, type] = (
    WeakValueDictionary()
)  # classes written by this process, local ones included
moved_classes: WeakValueDictionary[str, type] = WeakValueDictionary()  # found elsewhere than recorded


def name_of(cls: type) -> str:
    ref = f"{cls.__module__}:{cls.__qualname__}"
    if written_classes.get(ref) is not cls:
        written_classes[ref] = cls
    return ref


def find_class(ref: str, fits: Callable[[Any], bool], kind: str, names: set[str] | None = None) -> type:
    """The loaded class a record means: where it was, in ``__main__``, or the only one of that name anywhere else."""
    module, _, qualname = ref.partition(":")
    here = _lookup(module, qualname) or written_classes.get(ref)
    if here is not None:
        if not fits(here):
            raise UnknownType(f"{ref} was recorded as a {kind} and is none any more: run with fresh=True", ref)
        return here
    moved = moved_classes.get(ref)
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
        moved_classes[ref] = found[0]
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


def find_loaded(name: str) -> list[type]:
    """The classes called ``name``, or ``module.name``, in the loaded modules of users and their packages."""
    found: list[type] = []
    for module in list(sys.modules):
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names or (top == "agentflow" and not module.startswith("agentflow.demo")):
            continue
        for qualname in {name, name.removeprefix(f"{module}.")}:
            cls = _lookup(module, qualname)
            if cls is not None and cls not in found:
                found.append(cls)
    return found


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
        own = fields_of(cls) or {}
        fields, required = set(own), {name for name, default in own.items() if default is None}
    return fields == names if exactly else required <= names


def fields_of(cls: Any) -> dict[str, Any] | None:
    """Field name -> maker of its default; None where a value is required, UNSET where it may be absent."""
    if dataclasses.is_dataclass(cls):
        out: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                out[field.name] = lambda own, default=field.default: default
            elif field.default_factory is not dataclasses.MISSING:
                out[field.name] = lambda own, factory=field.default_factory: factory()
            else:
                out[field.name] = None if field.init else UNSET
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
