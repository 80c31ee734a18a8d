"""One code object, normalised: what its bytecode computes, without line numbers, names of locals and docstrings.

The instructions that only prepare the interpreter are dropped, locals are numbered in the order of their use, jumps go
to positions among what is left, and nested code objects stand where they are loaded. On the way all names that the code
loads are noted, for ``agentflow.codedigest`` to follow.
"""

from __future__ import annotations

import dis
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from agentflow.canonical import cell_value, marked, short_digest

MOST = 4096  # entries kept in each cache; beyond that it starts anew (a long notebook session makes many code objects)
_DROPPED = {
    "CACHE", "RESUME", "NOP", "EXTENDED_ARG", "PRECALL", "MAKE_CELL", "COPY_FREE_VARS", "LOAD_CLOSURE", "NOT_TAKEN"
}  # fmt: skip
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_KINDS = (
    0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200
)  # *args, **kwargs, generator, coroutine, awaitable generator, async gen


class Chain(NamedTuple):
    """``app.helpers.charge`` as loaded: its names, whether it is called, a constant first argument if there is one."""

    names: tuple[str, ...]
    called: bool
    first: str | None
    captured: bool
    """The first name is a captured variable, not a global."""


class Shape(NamedTuple):
    """What one code object computes (``digest``) and which names it uses for it."""

    code: weakref.ref[types.CodeType]  # forgets the shape when the code object goes, before its id is used again
    digest: str
    free: tuple[str, ...]
    chains: tuple[Chain, ...]
    attrs: frozenset[str]
    stored: frozenset[str]
    filled: frozenset[str]  # globals that the code itself assigns: state, not code
    everything: bool  # __dict__ or vars: any attribute may be read
    imports: tuple[tuple[str, tuple[str, ...] | None, int], ...]


class _Normaliser:
    """Collects the tokens of one code object and, recursively, of those nested in it."""

    def __init__(self) -> None:
        self.chains: dict[Chain, None] = {}
        self.attrs: set[str] = set()
        self.stored: set[str] = set()
        self.filled: set[str] = set()
        self.everything = False
        self.imports: dict[tuple[str, tuple[str, ...] | None, int], None] = {}
        self.free: dict[str, int] = {}

    def outer_number(self, name: str) -> str:
        return f"f{self.free.setdefault(name, len(self.free))}"

    def tokens(self, code: types.CodeType, outer: Callable[[str], str]) -> list[Any]:
        arguments = code.co_argcount + code.co_kwonlyargcount
        arguments += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
        numbers = {name: i for i, name in enumerate(code.co_varnames[:arguments])}
        captured = set(code.co_freevars)
        cells = captured.union(code.co_cellvars)

        def number(name: str) -> str:
            return outer(name) if name in captured else f"v{numbers.setdefault(name, len(numbers))}"

        kept, where = list[dis.Instruction](), dict[int, int]()
        for i in dis.get_instructions(code, adaptive=False):
            where[i.offset] = len(kept)
            if i.opname not in _DROPPED:
                kept.append(i)
        self._names(kept, captured, set(code.co_cellvars))
        out: list[Any] = []
        for i in kept:
            op, arg = i.opcode, i.argval
            if op in dis.hasconst:
                known = code.co_consts[i.arg or 0] if i.opname == "KW_NAMES" else arg  # 3.11 does not look these up
                value: Any = self.constant(known, number)
            elif op in dis.hasfree:
                value = number(arg)
            elif op in dis.haslocal:
                # a plain load of a cell only builds the closure of a nested function, whose own use is what counts
                several = (arg,) if isinstance(arg, str) else arg
                value = [number(n) for n in several if n not in cells or "LOAD_FAST" not in i.opname]
                if not value:
                    continue
            elif op in dis.hasjrel or op in dis.hasjabs:
                value = ["to", where.get(arg, -1)]
            elif op in dis.hasname:
                value = [arg, (i.arg or 0) & 1] if i.opname == "LOAD_GLOBAL" else arg
            elif op in dis.hascompare:
                value = arg
            else:
                value = i.arg
            out.append([i.opname, value])
        table = [
            [where.get(e.start, -1), where.get(e.end, len(kept)), where.get(e.target, -1), e.depth, e.lasti]
            for e in dis._parse_exception_table(code)  # type: ignore[attr-defined]
        ]
        kwonly = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        head = [code.co_argcount, code.co_posonlyargcount, list(kwonly), code.co_flags & _KINDS]
        return [head, out, table]

    def constant(self, value: Any, number: Callable[[str], str]) -> Any:
        if isinstance(value, types.CodeType):
            return self.tokens(value, number)
        if isinstance(value, tuple):
            return ["tuple", [self.constant(x, number) for x in value]]
        if isinstance(value, frozenset):
            return ["frozenset", sorted((self.constant(x, number) for x in value), key=repr)]
        return [type(value).__name__, repr(value)]

    def _names(self, code: list[dis.Instruction], captured: set[str], cells: set[str]) -> None:
        """Notes every chain of names that is loaded, every attribute and every import."""
        for at, i in enumerate(code):
            if i.opname in _ATTRIBUTE or i.opname == "LOAD_SUPER_ATTR":
                self.attrs.add(i.argval)
            elif i.opname in ("STORE_ATTR", "DELETE_ATTR"):
                self.stored.add(i.argval)
            elif i.opname == "STORE_GLOBAL":
                self.filled.add(i.argval)
            elif i.opname == "IMPORT_NAME":
                wanted = code[at - 1].argval if at else None
                level = code[at - 2].argval if at > 1 else 0
                self.imports[(i.argval, wanted, level if isinstance(level, int) else 0)] = None
            free = i.opname == "LOAD_DEREF" and i.argval in captured
            if i.opname not in _GLOBAL and not free:
                continue
            names, called, end = [i.argval], i.opname == "LOAD_GLOBAL" and bool((i.arg or 0) & 1), at + 1
            while end < len(code) and code[end].opname in _ATTRIBUTE:
                names.append(code[end].argval)
                called = code[end].opname == "LOAD_METHOD" or "NULL|self" in code[end].argrepr
                end += 1
            if end < len(code) and code[end].opname == "PUSH_NULL":
                called, end = True, end + 1
            called = called or (at > 0 and code[at - 1].opname == "PUSH_NULL")
            first = code[end].argval if end < len(code) and code[end].opname == "LOAD_CONST" else None
            self.chains[Chain(tuple(names), called, first if isinstance(first, str) else None, free)] = None
            if names[0] in ("vars", "asdict", "astuple", "deepcopy", "copy") or "__dict__" in names:
                self.everything = True
            if names[0] in ("getattr", "setattr", "hasattr", "attrgetter"):
                constants = {c.argval for c in code if c.opname == "LOAD_CONST" and isinstance(c.argval, str)}
                self.attrs |= {c for c in constants if c.isidentifier()}
        if any(i.opname in _ATTRIBUTE and i.argval == "__dict__" for i in code):
            self.everything = True


_shapes: dict[int, Shape] = {}


def shape_of(code: types.CodeType) -> Shape:
    """The normalised form of one code object with all nested in it; computed once."""
    found = _shapes.get(id(code))
    if found is None:
        n = _Normaliser()
        text = repr(n.tokens(code, n.outer_number))
        for name in code.co_freevars:  # captured for a nested function that never uses it
            n.outer_number(name)
        key, forget = id(code), _shapes.pop
        found = Shape(
            code=weakref.ref(code, lambda _: forget(key, None)),
            digest=short_digest(text.encode()),
            free=tuple(x for x in n.free if x in code.co_freevars),
            chains=tuple(n.chains),
            attrs=frozenset(n.attrs),
            stored=frozenset(n.stored),
            filled=frozenset(n.filled),
            everything=n.everything,
            imports=tuple(n.imports),
        )
        if len(_shapes) >= MOST:
            _shapes.clear()
        _shapes[id(code)] = found
    return found


def free_values(fn: types.FunctionType) -> list[Any]:
    """Captured values of ``fn`` in the order its code first uses them, without agentflow contexts."""
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    values = [cell_value(cells[name]) for name in shape_of(fn.__code__).free]
    return [v for v in values if not marked(v, "__agentflow_context__")]
