"""``step``: any function, durable. Call form and decorator form."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

import orjson

from agentflow.calls import ON_CHANGE, PLAIN, Call, Options, here
from agentflow.canonical import dumps, short_digest
from agentflow.capture import capture
from agentflow.durations import Duration, seconds
from agentflow.errors import UsageError
from agentflow.index import short
from agentflow.scratch import scratch

if TYPE_CHECKING:
    from agentflow.records import Retry

P = ParamSpec("P")
T = TypeVar("T")
OnChange = Literal["auto", "rerun", "reuse", "error"]

_OPTIONS = (
    "retry",
    "timeout",
    "idempotency_key",
    "compensate",
    "effect",
    "secret",
    "on_change",
    "in_doubt",
    "max_age",
    "thread",
)
_NO_KWARGS: dict[str, Any] = {}  # one for all calls, never changed
_HINTS = {
    "retries": "retry=Retry(max_attempts=3)",
    "maxAttempts": "retry=Retry(max_attempts=3)",
    "idempotencyKey": "idempotency_key",
    "timeoutMs": 'timeout="30s"',
    "timeout_ms": 'timeout="30s"',
    "maxAge": "max_age",
    "onChange": "on_change",
    "inDoubt": "in_doubt",
    "key": "idempotency_key",
}


def options_of(given: Mapping[str, Any], where: str) -> Options:
    """The options of a step, checked before anything runs."""
    if not given:
        return PLAIN
    for name in given:
        if name not in _OPTIONS:
            hint = f"write {_HINTS[name]}" if name in _HINTS else f"known are {', '.join(_OPTIONS)}"
            raise UsageError(
                f"{where}: unknown option {name!r}; {hint}. Arguments of the function go by position after it, or "
                "through a lambda."
            )
    values = {name: value for name, value in given.items() if value is not None}
    if "retry" in values:
        from agentflow.records import retry_of

        values["retry"] = retry_of(values["retry"])
    for name in ("timeout", "max_age"):
        if name in values:
            values[name] = seconds(values[name], what=name)
    if values.get("timeout") == 0:
        raise UsageError(f"{where}: timeout=0 leaves no time at all. None waits without end.")
    key = values.get("idempotency_key")
    if key is not None and (not isinstance(key, str) or not key):
        raise UsageError(f'{where}: idempotency_key={key!r} has to be non-empty text, such as f"charge-{{order.id}}".')
    if "compensate" in values and not callable(values["compensate"]):
        raise UsageError(f"{where}: compensate has to be a function of the step's result.")
    for name, allowed in (("on_change", ON_CHANGE), ("in_doubt", ("rerun", "raise", "ask"))):
        if name in values and values[name] not in allowed:
            raise UsageError(f"{where}: {name}={values[name]!r} is none of {', '.join(map(repr, allowed))}.")
    for name in ("effect", "secret", "thread"):
        if name in values and not isinstance(values[name], bool):
            raise UsageError(f"{where}: {name}={values[name]!r} is not True or False.")
    return Options(**values)


def make_call(
    name: Any,
    fn: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    kind: str = "step",
    *,
    also: dict[str, Any] | None = None,
) -> Call:
    """A located call in the run that is executing here, or in the project's scratch scope.

    ``also``: more that counts as given, beside what the function is given.
    """
    if not isinstance(name, str):
        raise UsageError(f'step name {name!r} is not text. Write step("name", fn, ...).')
    if not name.strip():
        raise UsageError('A step needs a name: step("fetch", fn, ...).')
    place = here.get()
    ex = place.ex if place is not None else scratch()
    if ex.scratch and options.compensate is not None:
        raise UsageError(
            f"step {name!r}: compensate= undoes a step when its workflow fails; there is no workflow here."
        )
    captured = capture(fn, args, kwargs)
    call = Call(ex, name, fn, args, kwargs, options, kind)
    call.started = True
    call.capture = captured
    call.code = captured.code
    call.given, call.digest = captured.text, captured.digest
    if also is not None:
        given = dumps({**orjson.loads(captured.text), **also})
        call.given, call.digest = given.decode(), short_digest(given)
    call.policy = options.on_change or ex.on_change
    key = options.idempotency_key
    ex.locate(call, call.digest if key is None else short(f"key:{key}", 20))
    if captured.opaque:
        ex.say_once(f"{name}: not compared, having no data form: {', '.join(captured.opaque[:4])}")
    call.started = False
    return call


class Step(Generic[P, T]):
    """A decorated function: calling it is a durable step; ``.fn`` is the function itself."""

    __agentflow_step__ = True

    def __init__(self, fn: Callable[..., Any], name: str, options: Options, start: Callable[[Call], Any]) -> None:
        self.fn = fn
        self.name = name
        self._options = options
        self._start = start
        functools.update_wrapper(self, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, T]:
        result: Coroutine[None, None, T] = self._start(make_call(self.name, self.fn, args, kwargs, self._options))
        return result

    def options(self, **options: Any) -> Step[P, T]:
        """The same step with other options: ``charge.options(idempotency_key=order.id)(order)``."""
        now = {
            name: getattr(self._options, name)
            for name in _OPTIONS
            if getattr(self._options, name) != getattr(PLAIN, name)
        }
        return Step(self.fn, self.name, options_of({**now, **options}, f"step {self.name!r}"), self._start)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None:
            return self
        return Step(self.fn.__get__(owner, kind), self.name, self._options, self._start)

    def __repr__(self) -> str:
        return f"<step {self.name!r}>"


def _awaited(call: Call) -> Any:
    return call


class Decorating:
    """What ``step("name", **options)`` without a function is: a decorator."""

    def __init__(self, name: str | None, options: Options, start: Callable[[Call], Any]) -> None:
        self._name = name
        self._options = options
        self._start = start

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]]) -> Step[P, T]: ...
    @overload
    def __call__(self, fn: Callable[P, T]) -> Step[P, T]: ...
    def __call__(self, fn: Callable[..., Any]) -> Step[Any, Any]:
        if not callable(fn):
            raise UsageError(f"@step(...) decorates a function, not {fn!r}.")
        return Step(fn, self._name or str(getattr(fn, "__name__", "step")), self._options, self._start)


@overload
def step(name: Callable[P, Coroutine[Any, Any, T]], /) -> Step[P, T]: ...
@overload
def step(name: Callable[P, T], /) -> Step[P, T]: ...
@overload
def step(
    name: str,
    /,
    *,
    retry: Retry | Mapping[str, Any] | None = ...,
    timeout: Duration | None = ...,
    idempotency_key: str | None = ...,
    compensate: Callable[[Any], Any] | None = ...,
    effect: bool = ...,
    secret: bool = ...,
    on_change: OnChange | None = ...,
    in_doubt: Literal["rerun", "raise", "ask"] = ...,
    max_age: Duration | None = ...,
    thread: bool = ...,
) -> Decorating: ...
@overload
def step(
    name: str,
    fn: Callable[..., Awaitable[T]],
    /,
    *args: Any,
    retry: Retry | Mapping[str, Any] | None = ...,
    timeout: Duration | None = ...,
    idempotency_key: str | None = ...,
    compensate: Callable[[Any], Any] | None = ...,
    effect: bool = ...,
    secret: bool = ...,
    on_change: OnChange | None = ...,
    in_doubt: Literal["rerun", "raise", "ask"] = ...,
    max_age: Duration | None = ...,
    thread: bool = ...,
) -> Coroutine[None, None, T]: ...
@overload
def step(
    name: str,
    fn: Callable[..., T],
    /,
    *args: Any,
    retry: Retry | Mapping[str, Any] | None = ...,
    timeout: Duration | None = ...,
    idempotency_key: str | None = ...,
    compensate: Callable[[Any], Any] | None = ...,
    effect: bool = ...,
    secret: bool = ...,
    on_change: OnChange | None = ...,
    in_doubt: Literal["rerun", "raise", "ask"] = ...,
    max_age: Duration | None = ...,
    thread: bool = ...,
) -> Coroutine[None, None, T]: ...
def step(name: Any = None, fn: Any = None, /, *args: Any, **options: Any) -> Any:
    """Run a function once and keep its result: ``await step("fetch", fetch, url)``.

    The result is recorded, synced to disk, before it is returned. Asked again with the same name and
    the same given values (arguments, defaults, captured variables), in this run or after a restart, the
    recorded result is returned and the function is not called. Also a decorator: ``@step`` or
    ``@step("charge", retry=...)``.

    Args:
        name: names the step in the journal, in the log and in ``runs show``; together with its enclosing step.
        fn: a sync or async function; sync ones run in a worker thread unless ``thread=False``.
        *args: passed to ``fn``; keyword arguments need a lambda or the decorator.
        retry: a ``Retry`` or a dict with its keys. None: one attempt.
        timeout: seconds or a duration for one attempt, then ``StepTimeout``. None: no limit.
        idempotency_key: names the operation itself, across runs: same name and key, same recorded result.
        compensate: called with the result if the workflow fails later. Implies ``effect``.
        effect: True never runs it twice in one run because its input changed; raises ``StepChanged`` instead.
        secret: True records that it ran, not its output; it runs again on replay.
        on_change: what an edit of its code means: "auto", "rerun", "reuse" or "error". None: the workflow's.
        in_doubt: started, no result, process gone: "rerun", "raise" (``StepInDoubt``) or "ask" a person.
        max_age: a record older than this is not reused. None: reused for ever.
        thread: False calls a sync function on the event loop's own thread.

    Returns:
        Something to await once, or to give to ``asyncio.gather``, a TaskGroup or ``parallel``.

    Raises:
        UsageError: a coroutine instead of a function, an unknown option, a bad name or duration.
    """
    if fn is not None and not options:
        return make_call(name, fn, args, _NO_KWARGS, PLAIN)
    return entry(name, fn, args, options, _awaited)


# What help() and editors show: the options by name, though an unknown one is answered with a hint.
step.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("name", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter("fn", inspect.Parameter.POSITIONAL_ONLY, default=None),
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        *(inspect.Parameter(o, inspect.Parameter.KEYWORD_ONLY, default=getattr(PLAIN, o)) for o in _OPTIONS),
    ]
)


def entry(name: Any, fn: Any, args: tuple[Any, ...], options: dict[str, Any], start: Callable[[Call], Any]) -> Any:
    """The forms of ``step``; ``start`` is what is done with a call."""
    if fn is None and not args:
        if isinstance(name, str) and not name.strip():
            raise UsageError('A step needs a name: step("fetch", fn, ...).')
        if isinstance(name, str) or name is None:
            return Decorating(name, options_of(options, f"step {name!r}"), start)
        if callable(name) and not options and not inspect.iscoroutine(name):
            return Decorating(None, PLAIN, start)(name)
    if fn is None:
        raise UsageError(f'step({name!r}, ...): give a name and a function: step("fetch", fetch, url).')
    return start(make_call(name, fn, args, _NO_KWARGS, options_of(options, f"step {name!r}") if options else PLAIN))
