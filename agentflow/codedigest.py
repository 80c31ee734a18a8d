"""A digest of a function's code and of everything of yours that it reaches.

Theory. A code object is digested from its normalised bytecode (bytecode.py): what it computes, without line numbers,
names of locals, docstrings and annotations. Its shape also lists the names it loads. ``_Reach`` follows those names, as
they are bound now, through your modules, classes and functions; everything found is one named part. Names are resolved,
never guessed, and what each resolution saw is kept, so that the next call only checks that the same names still hold
the same objects. Bytecode differs between Python versions, and so does the digest.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from agentflow.bytecode import MOST, Chain, Shape, free_values, shape_of
from agentflow.canonical import UNSET, Encoder, bare_name, cell_value, dumps, marked, short_digest, unmarked

# run without being named, or when nothing that was given is read: they select no attributes of given objects
_CONSTRUCTORS = {"__init__", "__new__", "__post_init__"}
_UNNAMED = {"__del__", "__eq__", "__ne__", "__hash__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"}
_UNNAMED |= {"__annotate__", "__annotate_func__"}
_ABSENT: Any = object()
_SIMPLE = (str, int, float, bool, bytes, complex, type(None))
_SIMPLE_TYPES = frozenset(_SIMPLE)


def _no_prompt(name: str) -> str | None:
    return None


prompt_part: Callable[[str], str | None] = _no_prompt
"""Hook: the digest of prompt file ``name``, or None when there is none. Set by the module that loads prompts."""


class Code(NamedTuple):
    """What a function's code is: equal digests mean equal behaviour for equal values."""

    digest: str
    """22 characters over all parts."""
    parts: tuple[tuple[str, str], ...]
    """(``module.qualname``, ``module.NAME`` or ``prompts/x.md``; short digest), sorted."""
    reaches_model: bool
    """Whether a model call is reached."""
    prompts: tuple[str, ...]
    """Names of the prompt files reached by a constant name."""
    attrs: frozenset[str] | None = frozenset()
    """Attribute names loaded anywhere in the reached code; None when they cannot be known (``vars``, ``__dict__``)."""
    mutable: frozenset[str] = frozenset()
    """Bare names of the parts that are data which can change in place."""


# -- whose code --------------------------------------------------------------------------------------------------------

_STDLIB = os.path.dirname(os.path.realpath(os.__file__)) + os.sep
_HERE = os.path.dirname(os.path.realpath(__file__)) + os.sep
_DEMO = _HERE + "demo" + os.sep  # the bundled example is written as a user would write it
_GENERATED = ("<frozen", "<attrs", "<decorator-gen", "<__array", "<makefun")


@functools.lru_cache(maxsize=MOST)
def is_own_file(filename: str) -> bool:
    """Whether code from this file is the user's: not installed, not the standard library, not agentflow."""
    if filename.startswith("<"):
        return not filename.startswith(_GENERATED)
    path = os.path.realpath(filename)
    if f"{os.sep}site-packages{os.sep}" in path or f"{os.sep}dist-packages{os.sep}" in path:
        return False
    return path.startswith(_DEMO) or not path.startswith((_HERE, _STDLIB))


def is_own_module(module: types.ModuleType) -> bool:
    """Whether a module is the user's."""
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__ == "__main__" or (
            module.__name__.partition(".")[0] not in sys.stdlib_module_names and not hasattr(module, "__path__")
            and getattr(module, "__spec__", None) is None
        )  # fmt: skip
    return is_own_file(file)


_own_classes: dict[type, bool] = {}


def is_own_class(cls: type) -> bool:
    """Whether a class is the user's."""
    found = _own_classes.get(cls)
    if found is None:
        module = sys.modules.get(cls.__module__)
        known = cls.__module__ != "__main__" and cls.__module__.partition(".")[0] in sys.stdlib_module_names
        found = not known and (is_own_module(module) if module is not None else cls.__flags__ & (1 << 9) != 0)
        if len(_own_classes) >= MOST:
            _own_classes.clear()
        _own_classes[cls] = found
    return found


def in_notebook(fn: types.FunctionType) -> bool:
    """Whether ``fn`` was typed in a notebook cell."""
    file, names = fn.__code__.co_filename, fn.__globals__
    if file.startswith("<ipython-input-") or "ipykernel_" in file:
        return True
    return "get_ipython" in names and names.get("__name__") == "__main__"


def is_data(value: Any) -> bool:
    """Whether a global counts by its content: not code, not a module, not an object without data form."""
    if isinstance(value, _SIMPLE):
        return True
    if callable(value) or isinstance(value, (type, types.ModuleType)):
        return False
    e = Encoder(is_own_class, lenient=True)
    e.encode(value)
    return not e.opaque


# -- everything reached ------------------------------------------------------------------------------------------------


def roots_of(fn: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
    """Functions and classes of the user that are given: ``fn`` unwrapped, what it captured, and function arguments."""
    out: list[Any] = []
    seen: set[int] = set()
    todo: list[Any] = [*(kwargs or {}).values(), *args, fn]
    while todo:
        v = todo.pop()
        t = type(v)
        if t in _SIMPLE or id(v) in seen:
            continue
        seen.add(id(v))
        if t is types.FunctionType:
            if v is fn or is_own_file(v.__code__.co_filename) or marked(v, "__agentflow_model_call__"):
                out.append(v)
            if hasattr(v, "__wrapped__"):
                todo.append(v.__wrapped__)
            if v.__closure__:
                todo += [cell_value(c) for c in v.__closure__]
            todo += v.__defaults__ or ()
        elif t is types.MethodType:
            todo += (v.__self__, v.__func__)
        elif t is functools.partial:
            todo += (*v.keywords.values(), *v.args, v.func)
        elif t is list or t is tuple:
            todo += [x for x in v[:64] if callable(x)]
        elif t is dict:
            todo += [x for x in list(v.values())[:64] if callable(x)] if len(v) <= 64 else []
        elif t is types.ModuleType or ((ours := not unmarked(v)) and marked(v, "__agentflow_model_call__")):
            out.append(v)
        elif isinstance(v, type):
            if is_own_class(v):
                out.append(v)
        elif ours and marked(v, "__agentflow_context__"):
            continue
        elif hasattr(t, "__wrapped__") or "__wrapped__" in getattr(v, "__dict__", ()):
            todo.append(v.__wrapped__)
        elif ours and (inner := _inner(v)) is not None:
            todo.append(inner)
        elif is_own_class(t):
            out.append(t)
            todo += [x for x in getattr(v, "__dict__", {}).values() if callable(x)]
    return out


def _inner(v: Any) -> Any:
    """The user's function inside an object that agentflow made of it."""
    if marked(v, "__agentflow_step__") or marked(v, "__agentflow_tool__") or marked(v, "__agentflow_workflow__"):
        return getattr(v, "fn", None)
    return None


class _Reach:
    """Follows names from the roots until nothing new is found."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self.deps: list[tuple[Any, str, Any]] = []  # (namespace, name, what it held)
        self.live: list[tuple[Any, str]] = []  # (mutable data, its digest)
        self.codes: list[tuple[types.FunctionType, types.CodeType]] = []
        self.attrs: set[str] = set()
        self.stored: set[str] = set()
        self.everything = False
        self.state: set[str] = set()  # labels of globals that reached code assigns
        self.made: set[type] = set()  # classes reached by name: their constructors may run
        self.model = False
        self.prompts: dict[str, str | None] = {}
        self.described: list[types.FunctionType] = []  # handed on as values: a model may be shown their descriptions
        self.classes: dict[type, set[str]] = {}
        self.values: set[str] = set()  # labels of parts that are plain values
        self.mutable: set[str] = set()  # bare names of parts that are data and can change in place
        self._names: dict[int, str] = {}
        self._objects: list[tuple[str, Any]] = []

    def run(self, roots: Sequence[Any]) -> None:
        given = [r for r in roots if not isinstance(r, types.ModuleType)]
        for r in given:
            self.follow(r, "", root=True)
        while True:  # a newly loaded name can select another method of a class reached before
            before = self._size()
            for cls in list(self.classes):
                self._members(cls)
            if before == self._size():
                break
        if self.model:
            for fn in self.described:
                words = [fn.__doc__, _annotations(fn)]
                self._part(_label(fn) + " (description)", short_digest(dumps(words)))
        for label in self.state & self.values:
            self.parts.pop(label, None)
        for label, obj in self._objects:
            if label in self.state:
                continue
            digest = self._digest(obj)
            self.live.append((obj, digest))
            self.mutable.add(_bare(self._part(label, digest)))

    def _size(self) -> tuple[int, ...]:
        return tuple(map(len, (self.attrs, self.stored, self.parts, self.classes, self.made)))

    def follow(self, v: Any, label: str, root: bool = False, called: bool = True) -> None:
        """Adds what ``v`` stands for. ``label``: the name it was found under."""
        t = type(v)
        if id(v) in self._names and t not in _SIMPLE:
            if isinstance(v, type) and not root:
                self._class(v, made=True)
            return
        if t not in _SIMPLE:
            self._names[id(v)] = label
        if t is types.FunctionType:
            self._function(v, root, called)
        elif marked(v, "__agentflow_model_call__"):
            self.model = True
        elif t is types.ModuleType:
            return
        elif t is types.MethodType:
            self.follow(v.__func__, label)
            self._instance(v.__self__, label)
        elif t is functools.partial:
            self.follow(v.func, label)
            self._data([v.args, v.keywords], label)
        elif isinstance(v, type):
            self._class(v, made=not root)
        elif (inner := _inner(v)) is not None:
            self.follow(inner, label)
        elif not isinstance(v, type) and callable(v) and "__wrapped__" in getattr(v, "__dict__", ()):
            self.follow(v.__wrapped__, label)
        elif isinstance(v, (staticmethod, classmethod)):
            self.follow(v.__func__, label)
        elif isinstance(v, property):
            for f in (v.fget, v.fset, v.fdel):
                if f is not None:
                    self.follow(f, label)
        elif isinstance(v, functools.cached_property):
            self.follow(v.func, label)
        elif isinstance(v, types.BuiltinFunctionType):
            return
        else:
            self._instance(v, label)

    def _part(self, label: str, digest: str) -> str:
        at, name = 1, label
        while self.parts.get(name, digest) != digest:
            at += 1
            name = f"{label}#{at}"
        self.parts[name] = digest
        return name

    def _function(self, fn: types.FunctionType, root: bool, called: bool) -> None:
        if marked(fn, "__agentflow_model_call__"):
            self.model = True
            return
        inner = getattr(fn, "__wrapped__", None)
        own = root or is_own_file(fn.__code__.co_filename)
        if inner is not None:
            self.follow(inner, _label(fn), root)
        if not own:  # a library's wrapper: only what of yours it holds
            for v in _contents(fn):
                if isinstance(v, types.FunctionType) and is_own_file(v.__code__.co_filename):
                    self.follow(v, _label(v))
            return
        code = fn.__code__
        shape = shape_of(code)
        if not root:  # a root is looked up by its code
            self.codes.append((fn, code))
        self._part(_label(fn), shape.digest)
        if not called:
            self.described.append(fn)
        if not root:  # of what is given, values count as given; here they were fixed when the module was written
            usual = [fn.__defaults__ or (), fn.__kwdefaults__ or {}]
            held = [v for v in _contents(fn) if not _is_code(v)]
            if any(usual) or held:
                self._data([usual, held], _label(fn) + " (held values)")
            for v in _contents(fn):
                if _is_code(v):
                    self.follow(v, _label(fn))
        self.attrs |= shape.attrs
        self.stored |= shape.stored
        self.state |= {f"{fn.__globals__.get('__name__', '?')}.{name}" for name in shape.filled}
        self.everything |= shape.everything
        notebook = root and fn.__name__ == "<lambda>" and in_notebook(fn)
        held_by = dict(zip(code.co_freevars, fn.__closure__ or (), strict=True))
        for chain in shape.chains:
            self._chain(fn, chain, held_by, notebook)
        for name, wanted, level in shape.imports:
            self._import(fn, shape, name, wanted, level)

    def _chain(self, fn: types.FunctionType, chain: Chain, held: dict[str, types.CellType], notebook: bool) -> None:
        first = chain.names[0]
        if chain.captured:
            if first not in held:
                return
            v = cell_value(held[first])
            label = first
            if not isinstance(v, (types.ModuleType, type)):
                self._marks(v, chain)
                return
        else:
            v = fn.__globals__.get(first, _ABSENT)
            self.deps.append((fn.__globals__, first, v))
            label = f"{fn.__globals__.get('__name__', '?')}.{first}"
            if v is _ABSENT or (notebook and len(chain.names) == 1 and not _is_code(v) and is_data(v)):
                return
        self._resolve(v, chain, chain.names[1:], label)

    def _resolve(self, v: Any, chain: Chain, rest: Sequence[str], label: str) -> None:
        """Walks attributes through modules and classes and follows where that ends."""
        while rest and isinstance(v, types.ModuleType):
            following = v.__dict__.get(rest[0], _ABSENT)
            if following is _ABSENT:
                lazy = getattr(type(v), "__getattr__", None) is None and v.__name__.startswith("agentflow")
                following = getattr(v, rest[0], _ABSENT) if lazy else _ABSENT
            else:
                self.deps.append((v.__dict__, rest[0], following))
            label, v, rest = f"{v.__name__}.{rest[0]}", following, rest[1:]
        if v is _ABSENT or isinstance(v, types.ModuleType):
            return
        called = chain.called or bool(rest)
        self._marks(v, chain)
        self.follow(v, label, called=called)

    def _marks(self, v: Any, chain: Chain) -> None:
        if marked(v, "__agentflow_model_call__"):
            self.model = True
        if chain.first is not None and marked(v, "__agentflow_prompt_loader__"):
            digest = prompt_part(chain.first)
            self.prompts[chain.first] = digest
            if digest is not None:
                self._part(f"prompts/{chain.first.removesuffix('.md')}.md", digest)

    def _import(
        self, fn: types.FunctionType, shape: Shape, name: str, wanted: tuple[str, ...] | None, level: int
    ) -> None:
        """An import inside a function: only of modules that are loaded already, never a reason to import."""
        if level:
            package = (fn.__globals__.get("__package__") or "").split(".")
            name = ".".join(x for x in [*package[: len(package) - level + 1], name] if x)
        module = sys.modules.get(name)
        self.deps.append((sys.modules, name, _ABSENT if module is None else module))
        if module is None:
            return
        ours = is_own_module(module) or name.partition(".")[0] == "agentflow"
        for attr in wanted or (shape.attrs if ours else ()):
            v = module.__dict__.get(attr, _ABSENT)
            if v is _ABSENT and wanted and name.partition(".")[0] == "agentflow":
                v = getattr(module, attr, _ABSENT)  # loads names when they are first used
            if v is not _ABSENT:
                chains = [c for c in shape.chains if c.names[0] == attr]
                self.deps.append((module.__dict__, attr, v))
                if not isinstance(v, types.ModuleType):
                    self._marks(v, chains[0] if chains else Chain((attr,), True, None, False))
                    self.follow(v, f"{name}.{attr}")

    def _class(self, cls: type, made: bool = False) -> None:
        if not is_own_class(cls):
            return
        if made:
            self.made.update(c for c in cls.__mro__ if is_own_class(c))
        if cls in self.classes:
            return
        self.classes[cls] = set()
        head: list[Any] = [[bare_name(b) for b in cls.__bases__]]
        fields = getattr(cls, "__dataclass_fields__", None) or getattr(cls, "__pydantic_fields__", None)
        if isinstance(fields, dict):
            for name, f in fields.items():
                annotation = getattr(f, "type", None) or getattr(f, "annotation", None)
                described = getattr(f, "description", None)
                head.append([name, _type_text(annotation), described, self._digest(getattr(f, "default", None))])
                self._annotation(annotation, cls)
            if hasattr(cls, "__pydantic_fields__"):
                head.append(cls.__doc__)  # part of the schema that a model is shown
        else:
            head.append(_annotations(cls))
        if isinstance(members := cls.__dict__.get("_member_map_"), dict):
            head.append([[n, self._digest(m.value)] for n, m in members.items()])
        self._part(_label(cls), short_digest(dumps(head)))
        for base in cls.__mro__[1:]:
            self._class(base)
        self._members(cls)

    def _annotation(self, annotation: Any, owner: type) -> None:
        if isinstance(annotation, type):
            self._class(annotation)
        elif isinstance(annotation, str):  # postponed: its words are looked up, nothing is evaluated
            names = getattr(sys.modules.get(owner.__module__), "__dict__", {})
            for word in re.findall(r"[A-Za-z_]\w*", annotation):
                if isinstance(found := names.get(word), type):
                    self._class(found)
        for inner in typing.get_args(annotation):
            self._annotation(inner, owner)

    def _members(self, cls: type) -> None:
        done = self.classes[cls]
        for name, v in list(cls.__dict__.items()):
            special = name.startswith("__") and name.endswith("__")
            if name in done or not (special or name in self.attrs or name in self.stored):
                continue
            if name in _UNNAMED or (name in _CONSTRUCTORS and cls not in self.made):
                continue
            done.add(name)
            if special and type(v) is not types.FunctionType:
                continue
            if type(v) is types.FunctionType and v.__code__.co_filename == "<string>" and special:
                continue  # written by dataclass from the fields, which count already
            self.deps.append((cls.__dict__, name, v))
            if not isinstance(v, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                self.follow(v, f"{_label(cls)}.{name}")

    def _instance(self, v: Any, label: str) -> None:
        """A global that is neither code nor module: by content, or by type name where it has none."""
        t = type(v)
        if is_own_class(t):
            self._class(t)
        for x in v.values() if t is dict and len(v) <= 64 else v if t in (list, tuple) and len(v) <= 64 else ():
            if _is_code(x):
                self.follow(x, label)
        self._data(v, label)

    def _data(self, v: Any, label: str) -> None:
        if type(v) in _SIMPLE:
            self.values.add(label)
            self._part(label, short_digest(dumps(Encoder(is_own_class).encode(v))))
        else:
            self._objects.append((label, v))

    def _digest(self, v: Any) -> str:
        return _digest(v, None if self.everything else frozenset(self.attrs))


def _digest(v: Any, attrs: frozenset[str] | None) -> str:
    e = Encoder(is_own_class, lambda: attrs, free_values, lenient=True)
    tree = e.encode(v)
    if type(tree) is dict and "~opaque" in tree:
        tree = {"~opaque": type(v).__name__}
    return short_digest(dumps(tree))


def _contents(fn: types.FunctionType) -> list[Any]:
    return [v for c in fn.__closure__ or () if (v := cell_value(c)) is not UNSET]


def _is_code(v: Any) -> bool:
    return isinstance(v, (types.FunctionType, types.MethodType, type, functools.partial)) or _inner(v) is not None


def _label(v: Any) -> str:
    return f"{getattr(v, '__module__', None) or '?'}.{v.__qualname__}"


def _annotations(obj: Any) -> dict[str, str]:
    try:
        found = obj.__annotations__
    except Exception:  # evaluated only now on newer Pythons, where names may be missing
        return {}
    return {k: _type_text(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _type_text(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return bare_name(annotation)
    text = str(annotation)
    return text if " at 0x" not in text else bare_name(type(annotation))


# -- the function asked for --------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    held: list[Any]  # the objects whose ids make the key; code objects weakly, so that this goes when they go
    reach: _Reach
    attrs: frozenset[str] | None
    code: Code

    def still(self) -> bool:
        r = self.reach
        for namespace, name, v in r.deps:
            if namespace.get(name, _ABSENT) is not v:
                return False
        for fn, code in r.codes:  # autoreload replaces the code inside a function
            if fn.__code__ is not code and fn.__code__ != code:
                return False
        if r.prompts and any(prompt_part(name) != digest for name, digest in r.prompts.items()):
            return False
        return not r.live or all(_digest(v, self.attrs) == digest for v, digest in r.live)


_known: dict[tuple[int, ...], _Known] = {}


def code_of(fn: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Code:
    """The code of ``fn`` and of everything of yours it reaches, as bound at this moment.

    Functions among ``args`` and ``kwargs``, in partials and captured variables are reached too. Their values are not
    part of the code: they are given. What was resolved is remembered and only checked the next time.
    """
    if (
        type(fn) is types.FunctionType
        and not (kwargs or fn.__defaults__ or fn.__closure__ or fn.__dict__)
        and _SIMPLE_TYPES.issuperset(map(type, args))
    ):
        roots: list[Any] = [fn]  # what roots_of finds: nothing else is given that could be code
        index: tuple[int, ...] = (id(fn.__code__), id(fn.__globals__))
    else:
        roots = roots_of(fn, args, kwargs)
        key: list[int] = []
        for r in roots:
            key += (id(r.__code__), id(r.__globals__)) if type(r) is types.FunctionType else (id(r),)
        index = tuple(key)
    known = _known.get(index)
    if known is not None and known.still():
        return known.code
    held: list[Any] = []
    for r in roots:
        held += (r, r.__globals__) if type(r) is types.FunctionType else (r,)
    forget = _known.pop
    held = [
        weakref.ref(h.__code__, lambda _: forget(index, None)) if type(h) is types.FunctionType else h for h in held
    ]
    reach = _Reach()
    reach.run(roots)
    parts = tuple(sorted(reach.parts.items()))
    attrs = None if reach.everything else frozenset(reach.attrs)
    # under bare digests: the same code as __main__ and as an imported module is the same code
    text = dumps(sorted([_bare(name), digest] for name, digest in parts))
    code = Code(short_digest(text), parts, reach.model, tuple(sorted(reach.prompts)), attrs, frozenset(reach.mutable))
    if len(_known) >= MOST:
        _known.clear()
    _known[index] = _Known(held, reach, attrs, code)
    return code


def _bare(name: str) -> str:
    return name.rpartition(".")[2]


def changed_names(old: Sequence[Sequence[str]], new: Sequence[Sequence[str]]) -> set[str]:
    """Bare names of the parts in which two codes differ."""
    before, after = ({(_bare(name), digest) for name, digest in parts} for parts in (old, new))
    return {name for name, _ in before ^ after}


def changed_data(code: Code, fn: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[str]:
    """Data that the code reaches and that holds something else now than in ``code``: the call changed it itself."""
    if not code.mutable:
        return []
    try:
        now = code_of(fn, args, kwargs)
    except Exception:  # the step is done and may have been paid for: what it left behind must not undo that
        return []
    return sorted(changed_names(code.parts, now.parts) & code.mutable) if now is not code else []


def changed_parts(old: Sequence[tuple[str, str]], new: Sequence[tuple[str, str]]) -> list[str]:
    """What differs between two ``Code.parts``, in words: ``["app.charge edited", "app.RATE changed"]``."""
    return list(_changes(dict(old), dict(new)))


def _changes(old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            yield f"{name} added"
        elif name not in new:
            yield f"{name} removed"
        elif old[name] != new[name]:
            last = name.rpartition(".")[2]
            constant = last.isupper() or name.endswith((")", ".md"))
            yield f"{name} {'changed' if constant else 'edited'}"
