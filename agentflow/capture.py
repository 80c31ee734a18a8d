"""What a step was given: the identity of a call, independent of who calls it and when.

``capture(fn, args, kwargs)`` writes everything that flows into a call besides its code as one canonical text:
arguments, defaults, captured variables, partial arguments, the attributes of ``self`` that the code names, and for a
lambda typed in a notebook cell the plain data it takes from other cells. Code is digested separately, by
``agentflow.codedigest``.

Arguments stand by the parameter that takes them, passed or default, so ``charge(n)``, ``charge(order=n)`` and
``charge(n, 5)`` are one text where 5 is the default. A default is a value like any other: editing it gives something
else, and ``lambda i=i: ...`` is given its own ``i``. Only None in a parameter that has a default is not written, as if
the parameter did not exist: a parameter added at the end, or by keyword only, with the default None changes nothing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

from agentflow.bytecode import free_values, shape_of
from agentflow.canonical import UNSET, Encoder, atoms_text, cell_value, dumps, marked, short_digest
from agentflow.codedigest import Code, code_of, in_notebook, is_data, is_own_class, is_own_file
from agentflow.errors import UsageError

__all__ = ["Capture", "capture", "data_digest", "data_text"]

_ASYNC = 0x80 | 0x100  # coroutine, generator-based coroutine
_ASYNC_GENERATOR = 0x200
_NONE: dict[str, Any] = {}  # of calls without keyword arguments; never changed


def data_text(value: Any) -> str:
    """Canonical text of plain data: equal values give equal text in every process and on every version.

    Raises:
        UsageError: the value holds a generator or a coroutine.
    """
    return dumps(Encoder(is_own_class, free=free_values).encode(value)).decode()


def data_digest(value: Any) -> str:
    """Digest of ``data_text(value)``: 22 characters ``[A-Za-z0-9_-]``."""
    return short_digest(dumps(Encoder(is_own_class, free=free_values).encode(value)))


_Variable = tuple[str, Any, Any]  # its name; its cell, or the globals that hold it; its value when the call was made


class Capture:
    """What one call was given.

    Attributes:
        text: canonical JSON with the parts that are not empty: ``args`` by position, ``kwargs`` (keyword-only
            parameters and ``**kwargs``), ``free``, ``self``, ``globals``.
        digest: 22 characters ``[A-Za-z0-9_-]`` of ``text``.
        opaque: paths of values without data form (clients, locks, files): not compared.
        is_async: whether calling the function gives an awaitable. A plain function that returns one is not known here.
    """

    __slots__ = (
        "_args", "_by_name", "_by_position", "_cells", "_code", "_fn", "_function", "_globals", "_kwargs", "_mutable",
        "_other", "_owner", "_variables", "digest", "is_async", "opaque", "text",
    )  # fmt: skip

    def __init__(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._fn, self._args, self._kwargs = fn, args, kwargs
        self._code: Code | None = None
        self._owner: Any = None
        self._other: Any = None
        self._function: types.FunctionType | None = None
        self._cells: Sequence[tuple[str, types.CellType]] = ()
        self._globals: Sequence[_Variable] = ()
        self.is_async = False
        self._take_apart(fn, args, kwargs)
        out, opaque, self._mutable = self._encode()
        self.text = out.decode()
        self.digest = short_digest(out)
        self.opaque: tuple[str, ...] = _opaque(self.text) if opaque else ()
        self._variables: tuple[_Variable, ...] = ()
        if self._cells or self._globals:
            self._variables = (*((name, cell, cell_value(cell)) for name, cell in self._cells), *self._globals)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the captured variables, in the order of ``free``; renaming them changes nothing."""
        return tuple(name for name, _ in self._cells)

    @property
    def code(self) -> Code:
        """The function's code when the call was taken down, where that had to look at it; else when first asked for."""
        code = self._code
        if code is None:
            code = self._code = code_of(self._fn, self._args, self._kwargs)
        return code

    def rebound(self) -> str | None:
        """Name of a captured variable that holds something else now than when the call was made, or None."""
        for name, place, then in self._variables:
            now = cell_value(place) if type(place) is types.CellType else place.get(name, UNSET)
            if now is then:
                continue
            old, new = (
                Encoder(is_own_class, free=free_values, lenient=True),
                Encoder(is_own_class, free=free_values, lenient=True),
            )
            if dumps(old.encode(then)) != dumps(new.encode(now)) or old.opaque:
                return name
        return None

    def mutated(self) -> tuple[str, ...]:
        """Paths of given values whose content differs now from when the call was made."""
        if not self._mutable:
            return ()
        try:
            out = self._encode(lenient=True)[0]
        except Exception:  # the step is done and may have been paid for: what it left behind must not undo that
            return ()
        if short_digest(out) == self.digest:
            return ()
        from agentflow.compare import changed_paths

        return tuple(changed_paths(self.text, out.decode()))

    def _take_apart(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Partials flattened, wrappers of libraries unwrapped, ``self`` set aside."""
        while type(fn) is not types.FunctionType:
            if isinstance(fn, functools.partial):
                args, kwargs, fn = (*fn.args, *args), {**fn.keywords, **kwargs}, fn.func
            elif type(fn) is types.MethodType:
                self._owner, fn = fn.__self__, fn.__func__
            elif isinstance(fn, (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)):
                fn.close() if not isinstance(fn, types.AsyncGeneratorType) else None
                name = fn.__name__
                raise UsageError(
                    f'{name}(...) was called already: pass the function and its arguments: step("{name}", {name}, ...)'
                )
            elif not callable(fn):
                raise UsageError(f'a step runs a function, not {type(fn).__name__}: step("x", f, d)')
            elif (marked(fn, "__agentflow_step__") or marked(fn, "__agentflow_tool__")) and hasattr(fn, "fn"):
                fn = fn.fn
            elif "__wrapped__" in getattr(fn, "__dict__", ()):
                fn = fn.__wrapped__
            elif not isinstance(fn, type) and is_own_class(type(fn)):
                call = type(fn).__call__
                if type(call) is not types.FunctionType:
                    break
                self._owner, fn = fn, call
            else:
                break
        self._by_position, self._by_name = args, kwargs
        if type(fn) is not types.FunctionType:
            bound = getattr(fn, "__self__", None)
            self._other = None if isinstance(fn, type) or isinstance(bound, types.ModuleType) else bound
            self.is_async = bool(getattr(getattr(fn, "__code__", None), "co_flags", 0) & _ASYNC)
            if not self.is_async and type(fn).__module__ == "unittest.mock":
                self.is_async = bool(getattr(type(fn).__call__, "__code__", None)) and "Async" in type(fn).__name__
            return
        flags = fn.__code__.co_flags
        if flags & _ASYNC_GENERATOR:
            raise UsageError(
                f"{fn.__name__} is an async generator: a step returns one value; collect the items and return a list"
            )
        self.is_async = bool(flags & _ASYNC)
        if fn.__dict__:
            self.is_async = self.is_async or "_is_coroutine_mark" in fn.__dict__  # inspect.markcoroutinefunction
            while hasattr(fn, "__wrapped__") and not is_own_file(fn.__code__.co_filename):
                fn = fn.__wrapped__
                if type(fn) is not types.FunctionType:
                    return
        self._function = fn
        if kwargs or fn.__defaults__ or fn.__kwdefaults__ or len(args) < fn.__code__.co_argcount:
            self._by_position, self._by_name = _by_parameter(fn, self._owner is not None, args, kwargs)
        if fn.__name__ == "<lambda>" and in_notebook(fn):
            known = fn.__globals__
            names = {c.names[0]: 0 for c in shape_of(fn.__code__).chains if not c.captured and c.names[0] in known}
            self._globals = [(n, known, known[n]) for n in names if is_data(known[n])]
        if fn.__closure__:
            by_name = dict(zip(fn.__code__.co_freevars, fn.__closure__, strict=True))
            self._cells = [
                (n, by_name[n]) for n in shape_of(fn.__code__).free
                if not marked(cell_value(by_name[n]), "__agentflow_context__")
            ]  # fmt: skip

    def _encode(self, lenient: bool = False) -> tuple[bytes, bool, bool]:
        """The canonical text; whether something in it has no data form; whether anything can change in place."""
        alone = not (self._by_name or self._cells or self._globals) and self._owner is None and self._other is None
        if alone and self._by_position and (text := atoms_text("args", self._by_position)) is not None:
            return text, False, False
        encoder = Encoder(is_own_class, self._attrs, free_values, lenient)
        fn, enc = self._function, encoder.encode
        parts: dict[str, Any] = {}
        if self._by_position:
            parts["args"] = [enc(a) for a in self._by_position if not marked(a, "__agentflow_context__")]
        if self._by_name:
            parts["kwargs"] = {k: enc(v) for k, v in self._by_name.items() if not marked(v, "__agentflow_context__")}
        if self._owner is not None:
            parts["self"] = enc(self._owner)
        elif self._other is not None:
            parts["self"] = enc(self._other)
        if fn is not None:
            if self._cells:
                parts["free"] = [enc(cell_value(c)) for _, c in self._cells]
            if self._globals:
                parts["globals"] = {n: enc(known.get(n, UNSET)) for n, known, _ in self._globals}
        text = dumps({k: v for k, v in parts.items() if v})
        return text, encoder.opaque, encoder.mutable

    def _attrs(self) -> frozenset[str] | None:
        code = code_of(self._fn, self._args, self._kwargs)
        if self._code is None:
            self._code = code
        return code.attrs


def _opaque(text: str) -> tuple[str, ...]:
    from agentflow.compare import opaque_paths

    return tuple(opaque_paths(text))


def capture(fn: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Capture:
    """Takes down what ``fn(*args, **kwargs)`` is given.

    Raises:
        UsageError: ``fn`` is a coroutine, an async generator function or not callable; a generator or coroutine is
            among what is given.
    """
    return Capture(fn, tuple(args), dict(kwargs) if kwargs else _NONE)


def _by_parameter(
    fn: types.FunctionType, owned: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position, then what only goes by name, both with the defaults of what was not passed.

    Args:
        owned: the first parameter is ``self``, which ``args`` does not hold.
    """
    code, usual, named = fn.__code__, fn.__defaults__ or (), fn.__kwdefaults__
    count = code.co_argcount - owned
    first = count - len(usual)  # the first parameter with a default
    if len(args) < count:
        if kwargs:
            names, nameless = code.co_varnames[owned : code.co_argcount], code.co_posonlyargcount - owned
            kwargs, full = dict(kwargs), list(args)
            for at in range(len(args), count):
                if at >= nameless and names[at] in kwargs:
                    full.append(kwargs.pop(names[at]))
                else:  # UNSET: the call will fail, or a library's wrapper passes it
                    full.append(usual[at - first] if at >= first else UNSET)
            args = tuple(full)
        else:
            args = (*args, *[UNSET] * (first - len(args)), *usual[max(0, len(args) - first) :])
    if len(args) == count:
        end = count
        while end > max(first, 0) and args[end - 1] is None:
            end -= 1
        args = args[:end]
    if named:
        kwargs = {k: v for k, v in {**named, **kwargs}.items() if v is not None or k not in named}
    return args, kwargs
