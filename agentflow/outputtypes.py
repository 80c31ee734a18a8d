"""The type that a prompt file names as its ``output``, found among what is loaded; nothing is imported or evaluated."""

from __future__ import annotations

import ast
import datetime
import decimal
import sys
import uuid
from typing import Any, Literal, Union

from agentflow.codec.classes import find_loaded
from agentflow.errors import UsageError

_PLAIN: dict[str, Any] = {
    **{"str": str, "int": int, "float": float, "bool": bool, "list": list, "tuple": tuple, "None": None},
    **{"date": datetime.date, "datetime": datetime.datetime, "Decimal": decimal.Decimal, "UUID": uuid.UUID},
}


def named(text: str, where: str) -> Any:
    """The type that is written ``Ticket``, ``app.models.Ticket``, ``list[Ticket]``, ``Ticket | None`` or
    ``Literal["yes", "no"]``.

    Args:
        text: as it stands in the prompt file.
        where: the file, for errors.

    Raises:
        UsageError: it is written in another way, or names no class, or several, of the loaded modules.

    >>> named('list[Literal["yes", "no"]] | None', "prompts/x.md")
    typing.Optional[list[typing.Literal['yes', 'no']]]
    """
    try:
        return _made(ast.parse(text.strip(), mode="eval").body, f"{where}: output: {text}")
    except SyntaxError as exc:
        raise UsageError(_unknown(f"{where}: output: {text}")) from exc


def _unknown(what: str) -> str:
    return (
        f'{what}: is no type. Write a class such as Ticket, list[Ticket], Ticket | None, Literal["yes", "no"], or a '
        f"plain {', '.join(name for name in _PLAIN if name != 'None')}; pass other types with output_type=."
    )


def _made(node: ast.expr, what: str) -> Any:
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_made(node.left, what), _made(node.right, what)]  # noqa: UP007, a union of values, not of words
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if isinstance(node.value, ast.Name) and node.value.id == "Literal":
            if all(isinstance(one, ast.Constant) and isinstance(one.value, str | int | None) for one in inner):
                return Literal[tuple(one.value for one in inner)]  # type: ignore[attr-defined]
        elif isinstance(node.value, ast.Name) and node.value.id in ("list", "tuple"):
            parts = tuple(
                ... if isinstance(one, ast.Constant) and one.value is ... else _made(one, what) for one in inner
            )
            return _PLAIN[node.value.id][parts]
        raise UsageError(_unknown(what))
    if isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        return _PLAIN[name] if name in _PLAIN else _class(name, what)
    raise UsageError(_unknown(what))


def _class(name: str, what: str) -> type:
    """The one class of that name in the loaded modules; the program's own go before those of packages."""
    found = find_loaded(name)
    found = [cls for cls in found if not _installed(cls.__module__)] or found
    # The main script can be imported a second time under its own name, with classes that only look the same.
    found = [cls for cls in found if cls.__module__ == "__main__"] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"{what}: no class of that name is loaded. Import it where the prompt is used, or pass output_type=; a "
            "prompt file imports nothing."
        )
    places = ", ".join(sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in found))
    raise UsageError(f"{what}: several classes have that name: {places}. Write one of these, or pass output_type=.")


def _installed(module: str) -> bool:
    file = str(getattr(sys.modules.get(module), "__file__", None) or "")
    return "site-packages" in file or "dist-packages" in file
