"""The arguments of a workflow, checked against its annotations when they are given."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

from agentflow.errors import UsageError

_PLAIN = (str, int, float, bool, bytes, dict, list, tuple, set, type(None))


@functools.lru_cache(maxsize=256)
def _annotations(fn: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(fn)
    except Exception:  # names that only a type checker sees: nothing to check against
        return {}


def arguments(fn: Callable[..., Any], workflow: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, coerced where pydantic can (a dict for a model), or a UsageError that names the one."""
    hints = _annotations(fn)
    checked = {}
    for name, value in given.items():
        hint = hints.get(name, Any)
        checked[name] = value if _fits(hint, value) else _validated(workflow, name, hint, value)
    return checked


def annotated(fn: Callable[..., Any], workflow: str, name: str, value: Any) -> None:
    """Refuse a function whose annotation does not take a value that it will be given, as far as that can be told.

    Asked while the function is defined: names that its annotations use may not be there yet, so nothing is kept.
    """
    try:
        hint = typing.get_type_hints(fn).get(name, Any)
    except Exception:  # names that are not there yet, or that only a type checker sees
        return
    if not _fits(hint, value):
        _validated(workflow, name, hint, value)


def _fits(hint: Any, value: Any) -> bool:
    """Whether no further look is needed: unannotated, a plain type, or an instance of the class asked for."""
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        if hint in (int, float, str) and isinstance(value, bool):
            return False
        return isinstance(value, hint) and (hint in _PLAIN or dataclasses.is_dataclass(hint) or type(value) is hint)
    return False


@functools.lru_cache(maxsize=256)
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        return TypeAdapter(hint)


def _validated(workflow: str, name: str, hint: Any, value: Any) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(value, strict=None)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        shown = getattr(hint, "__name__", str(hint))
        raise UsageError(
            f"workflow {workflow!r}: argument {where} does not fit {shown}: {first['msg']}, "
            f"got {str(first['input'])[:80]!r}."
        ) from None
