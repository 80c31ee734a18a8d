"""Functions that a model may call: their schema, what a call's arguments are, what the model is told of the result.

Nothing here runs a tool. ``toolbox`` checks all tools of a call before anything is sent; ``agent.py`` holds the loop.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import types
import typing
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, overload

from agentflow import schema
from agentflow.calls import PLAIN, Options
from agentflow.canonical import marked
from agentflow.durations import Duration, seconds
from agentflow.errors import UsageError
from agentflow.records import UNSET, Escalate

P = ParamSpec("P")
T = TypeVar("T")

# https://platform.openai.com/docs/api-reference/responses/create#responses-create-tools; Anthropic takes 64 as well.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_EMPTY = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True, slots=True)
class Approval:
    """Who is asked before each call of a tool, and how: as for ``human_task``.

    Attributes:
        who: a name, names, or None for anybody.
        title: what the task is called; None: "approve <tool>".
        timeout: how long it may take, None without end.
        on_timeout: whether the call goes ahead then, or an ``Escalate``; not given, the deadline is an error.
    """

    who: Any
    title: str | None = None
    timeout: Duration | None = None
    on_timeout: Any = UNSET


class Tool(Generic[P, T]):
    """A function with what a model is told of it; made by ``tool``. Called by your code it is the function itself."""

    __agentflow_tool__ = True

    def __init__(
        self, fn: Callable[P, T], name: str | None, description: str | None, approval: Approval | None
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.tool_name = name
        self.description = description
        self.approval = approval

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.fn(*args, **kwargs)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None:
            return self
        bound: Any = self.fn
        return Tool(bound.__get__(owner, kind), self.tool_name, self.description, self.approval)

    def __repr__(self) -> str:
        return f"<tool {self.tool_name or getattr(self.fn, '__name__', self.fn)!r}>"


class _Decorating:
    """What ``tool(...)`` without a function is: a decorator."""

    def __init__(self, name: str | None, description: str | None, approval: Approval | None) -> None:
        self._options = (name, description, approval)

    def __call__(self, fn: Callable[P, T]) -> Tool[P, T]:
        if not callable(fn):
            raise UsageError(f"@tool(...) decorates a function, not {fn!r}.")
        return Tool(fn, *self._options)


@overload
def tool(fn: Callable[P, T], /) -> Tool[P, T]: ...
@overload
def tool(
    *,
    name: str | None = ...,
    description: str | None = ...,
    approval: str | Sequence[str] | bool | None = ...,
    title: str | None = ...,
    timeout: Duration | None = ...,
    on_timeout: bool | Escalate = ...,
) -> _Decorating: ...
def tool(
    fn: Any = None,
    /,
    *,
    name: Any = None,
    description: Any = None,
    approval: Any = None,
    title: Any = None,
    timeout: Any = None,
    on_timeout: Any = UNSET,
) -> Any:
    """A function that a model may call, with more than its signature says: ``@tool`` or ``@tool(approval="manager")``.

    Any typed function can stand in ``generate_content(tools=[...])`` as it is; this says more about one. It stays
    callable as a plain function. A tool that is to be tried again, or needs a timeout, an idempotency key or a
    compensation, is a step: write ``@step(retry=...)`` beneath ``@tool``.

    Args:
        name: what the model calls it. None: the function's name. Records of a ``@step`` keep the step's name.
        description: what the model is told it is for. None: the docstring, without its list of parameters.
        approval: who has to agree to each call before it runs: a name or a list of names, True for anybody. The
            person is shown the tool and the arguments of this one call; the run waits as for ``human_task``. A "no"
            and its comment are told to the model. None: nobody is asked.
        title: what the approval's task is called. None: "approve" and the tool's name.
        timeout: how long the approval may take, such as ``"2h"``. The deadline is recorded: a restart does not extend
            it. None: without end.
        on_timeout: what happens when nobody has decided by then: False tells the model so, True lets the call go
            ahead, ``Escalate("director", timeout="1d", on_timeout=False)`` asks somebody else. Not given:
            ``HumanTaskExpired`` ends the conversation.

    Raises:
        UsageError: an argument cannot mean anything.
    """
    if name is not None and (not isinstance(name, str) or not _NAME.fullmatch(name)):
        raise UsageError(f"tool(name={name!r}): 1 to 64 letters, digits, '_' and '-'.")
    if description is not None and (not isinstance(description, str) or not description.strip()):
        raise UsageError(f"tool(description={description!r}): text that tells the model what the tool is for.")
    who = [approval] if isinstance(approval, str) else approval
    named = isinstance(who, list | tuple) and who and all(isinstance(one, str) and one.strip() for one in who)
    if approval is not None and approval is not True and not named:
        raise UsageError(f"tool(approval={approval!r}): a name, a list of names, or True for anybody.")
    limit = seconds(timeout, what="tool(timeout=...)")
    if title is not None and (not isinstance(title, str) or not title.strip()):
        raise UsageError(f"tool(title={title!r}) is not text.")
    if on_timeout is not UNSET and not isinstance(on_timeout, bool | Escalate):
        raise UsageError(
            f"tool(on_timeout={on_timeout!r}): True lets the call go ahead, False tells the model no, Escalate(...) "
            "asks somebody else."
        )
    if approval is None and not (title is None and limit is None and on_timeout is UNSET):
        raise UsageError("tool(title=, timeout=, on_timeout=) are about an approval: name who gives it with approval=.")
    if limit is None and on_timeout is not UNSET:
        raise UsageError("tool(on_timeout=) needs a timeout= that can be over.")
    asking = None if approval is None else Approval(None if approval is True else approval, title, limit, on_timeout)
    made = _Decorating(name, description, asking)
    if fn is None:
        return made
    if isinstance(fn, str):
        raise UsageError(f"tool({fn!r}): write @tool(name={fn!r}).")
    return made(fn)


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """A tool of a call, checked.

    Attributes:
        name: as the model calls it; ``step``: as its records are called.
        description: what the model is told.
        fn: the function itself; ``options``: those of the step it was, if it was one.
        approval: whom to ask before each call; None for nobody.
        arguments: a TypedDict of the parameters, which reads what the model sends.
        usual: the default of each parameter that has one.
        parameters: the JSON schema of the arguments; ``strict``: whether it is one of OpenAI's strict form.
    """

    name: str
    step: str
    description: str
    fn: Any
    options: Options
    approval: Approval | None
    arguments: Any
    usual: dict[str, Any]
    parameters: dict[str, Any]
    strict: bool

    def read(self, arguments: Any) -> dict[str, Any]:
        """The values that the function is called with.

        Raises:
            schema.Mismatch: they do not fit; the message is for the model.
        """
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        values: dict[str, Any] = schema.validate(text.strip() or "{}", self.arguments)
        return values

    def shown(self, values: dict[str, Any]) -> dict[str, Any]:
        """All that the function gets, defaults too, as plain data for a person."""
        made = {}
        for name, value in {**self.usual, **values}.items():
            try:
                made[name] = schema.plain(value)
            except UsageError:
                made[name] = f"<{type(value).__name__}>"
        return made


def told(spec: Spec, value: Any) -> str:
    """What the model is told of a result: text as it is, all else as JSON.

    Raises:
        UsageError: the result has no such form.
    """
    if isinstance(value, str):
        return str(value)
    try:
        return json.dumps(schema.plain(value, "result"), ensure_ascii=False)
    except UsageError as exc:
        raise UsageError(
            f"tool {spec.name!r}: {exc} Let it return text or plain data; its result is recorded already, so to call "
            f"it again: rerun=[{spec.step!r}]."
        ) from exc


def toolbox(tools: Sequence[Any]) -> tuple[Spec, ...]:
    """The tools of a call, each with its schema; calls none of them.

    Raises:
        UsageError: something in the list is no function that a model could call; says which and why.
    """
    if isinstance(tools, Mapping | str) or not isinstance(tools, Sequence):
        raise UsageError(f"tools={str(tools)[:80]!r}: a list of typed functions, tools=[look_up]. Nothing was sent.")
    made = tuple(_spec(item, f"tools[{index}]") for index, item in enumerate(tools))
    names = [spec.name for spec in made]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"tools: two of them are called {name!r}. Give one another name: @tool(name=...). Nothing was sent."
            )
    return made


def _spec(item: Any, where: str) -> Spec:
    fn: Any = item
    name, description, approval = None, None, None
    if isinstance(item, Tool):
        fn, name, description, approval = item.fn, item.tool_name, item.description, item.approval
    options, step = PLAIN, None
    if marked(fn, "__agentflow_step__") and not isinstance(fn, type):
        fn, step, options = fn.fn, fn.name, fn._options
    bare = fn.func if isinstance(fn, functools.partial) else fn
    if name is None:
        name = None if isinstance(fn, functools.partial) else getattr(fn, "__name__", None)
    where = f"{where} ({name or getattr(fn, '__name__', None) or type(fn).__name__})"
    _check_function(fn, bare, name, options, where)
    assert name is not None
    signature, hints = _signature(fn, bare, where)
    holder = getattr(fn, "__func__", fn)
    facts = (name, inspect.getdoc(fn), hints, *((one.name, one.kind) for one in signature.parameters.values()))
    usual = {one.name: one.default for one in signature.parameters.values() if one.default is not _EMPTY}
    known = _known.get(holder) if type(holder) is types.FunctionType else None
    if known is not None and known[0] == facts and all(known[1].usual.get(one, _EMPTY) is usual[one] for one in usual):
        described = known[1]
    else:
        described = _describe(fn, bare, name, signature, hints, where)
        if type(holder) is types.FunctionType:
            _known[holder] = (facts, described)
    return Spec(
        name=name,
        step=step or name,
        description=description or described.summary,
        fn=fn,
        options=options,
        approval=approval,
        arguments=described.arguments,
        usual=described.usual,
        parameters=described.parameters,
        strict=described.strict,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Described:
    """What a function's signature and docstring say; see ``Spec``."""

    summary: str
    arguments: Any
    usual: dict[str, Any]
    parameters: dict[str, Any]
    strict: bool


# Making a schema takes milliseconds, and a replay asks for it as often as the first run did.
_known: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], _Described]] = weakref.WeakKeyDictionary()


def _describe(
    fn: Any, bare: Any, name: str, signature: inspect.Signature, hints: dict[str, Any], where: str
) -> _Described:
    summary, about = _docstring(bare)
    arguments, usual = _arguments(fn, name, signature, hints, about, where)
    parameters, strict = _schema(arguments, usual, where)
    return _Described(summary, arguments, usual, parameters, strict)


def _check_function(fn: Any, bare: Any, name: str | None, options: Options, where: str) -> None:
    why = None
    if inspect.iscoroutine(fn) or inspect.isgenerator(fn):
        why = "was called already; pass the function itself"
    elif isinstance(fn, type):
        why = "is a class; write a function that makes one"
    elif marked(fn, "__agentflow_model_call__"):
        why = "is a model call; write a typed function that makes it"
    elif hasattr(fn, "run") and hasattr(fn, "run_sync"):
        why = "is a workflow; write a typed function that awaits its run()"
    elif not callable(fn):
        why = "is no function"
    elif inspect.isgeneratorfunction(bare) or inspect.isasyncgenfunction(bare):
        why = "is a generator; collect the items and return a list"
    elif name is None or name == "<lambda>":
        why = "has no name and no types; write def with annotations, or tool(name=...) around a partial"
    elif not _NAME.fullmatch(name):
        why = f"has the name {name!r}; models take letters, digits, '_' and '-': @tool(name=...)"
    elif options.secret:
        why = "is a step with secret=True: its result is not recorded, and so could not be told to the model again"
    if why is not None:
        raise UsageError(f"{where} {why}. Nothing was sent.")


def _signature(fn: Any, bare: Any, where: str) -> tuple[inspect.Signature, dict[str, Any]]:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError) as exc:
        raise UsageError(
            f"{where} tells no parameters ({exc}); wrap it in a typed function. Nothing was sent."
        ) from exc
    holder = bare
    if not isinstance(bare, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        holder = type(bare).__call__
    try:
        hints = typing.get_type_hints(inspect.unwrap(holder), include_extras=True)
    except NameError as exc:
        raise UsageError(
            f"{where}: an annotation cannot be read ({exc}). Define that type where the module can see it. "
            "Nothing was sent."
        ) from exc
    except TypeError:  # builtins have none
        hints = {}
    return signature, hints


def _arguments(
    fn: Any, name: str, signature: inspect.Signature, hints: dict[str, Any], about: dict[str, str], where: str
) -> tuple[Any, dict[str, Any]]:
    """A TypedDict of the parameters, and the default of each that has one."""
    from typing import NotRequired

    from pydantic import ConfigDict, Field
    from typing_extensions import TypedDict

    fixed = fn.keywords if isinstance(fn, functools.partial) else {}
    fields: dict[str, Any] = {}
    usual: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.name in fixed:
            continue
        what = f"{where}: parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UsageError(f"{what} takes any number of values (* or **); name each one. Nothing was sent.")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UsageError(f"{what} is positional only; a model passes arguments by name. Nothing was sent.")
        if parameter.name not in hints:
            raise UsageError(f"{what} has no type; write {parameter.name}: str, or what it is. Nothing was sent.")
        kind = hints[parameter.name]
        if parameter.name in about:
            kind = Annotated[kind, Field(description=about[parameter.name])]
        if parameter.default is not _EMPTY:
            usual[parameter.name] = parameter.default
            kind = NotRequired[kind]
        fields[parameter.name] = kind
    make: Any = TypedDict
    made = make(name, fields)
    made.__pydantic_config__ = ConfigDict(extra="forbid")
    return made, usual


def _schema(arguments: Any, usual: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """The JSON schema of the arguments: of the strict form where it has one, in which every parameter is required."""
    from pydantic import PydanticUserError, TypeAdapter

    try:
        loose = TypeAdapter(arguments).json_schema()
    except (PydanticUserError, NameError, AttributeError) as exc:
        raise UsageError(
            f"{where}: a parameter's type has no JSON schema: {str(exc).splitlines()[0]} Nothing was sent."
        ) from exc
    if not usual:
        try:
            strict: dict[str, Any] = schema.output(arguments).named["schema"]
            return strict, True
        except UsageError:  # something in it may be anything: no strict form, and none is needed
            pass
    loose.pop("title", None)
    loose.setdefault("properties", {})
    for name, part in loose["properties"].items():
        part.pop("title", None)
        if usual.get(name) is not None:
            try:
                part["default"] = schema.plain(usual[name])
            except UsageError:  # a default that a model could not write either
                continue
    return loose, False


def _docstring(fn: Any) -> tuple[str, dict[str, str]]:
    """What a docstring says the function is for, and what it says of each parameter."""
    text = inspect.getdoc(fn) if inspect.isroutine(fn) else inspect.getdoc(type(fn).__call__)
    if not text:
        return "", {}
    from docstring_parser import ParseError, parse

    try:
        parsed = parse(text)
    except ParseError:  # a docstring is free text: all of it is the description then
        return text, {}
    about = {one.arg_name: " ".join(one.description.split()) for one in parsed.params if one.description}
    summary = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    return summary, about
