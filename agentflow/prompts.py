"""Prompts kept in files: ``prompts/<name>.md`` beside the project, with ``{{name}}`` for what changes."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentflow.errors import UsageError
from agentflow.schema import plain, show

_VARIABLE = re.compile(r"\{\{([^{}\n]*)\}\}")
_HEAD = ("model", "system")

on_read: Callable[[str, str], None] | None = None
"""Told of each file that ``load_prompt`` reads: its path relative to the project, and its digest."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text for a model, with what its file says about how to ask.

    Attributes:
        text: what is sent.
        name: names the call's step; None leaves that to the call.
        system: the system message; None for none.
        model: the model to ask; None for the default.
        path: the file it came from, relative to the project; None when it came from no file.
    """

    text: str
    name: str | None = None
    system: str | None = None
    model: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        return self.text


def load_prompt(name: str, /, **variables: Any) -> Prompt:
    """Reads ``prompts/<name>.md`` and fills in its ``{{variables}}``.

    The file is looked for in the nearest directory called ``prompts`` beside or above the main
    script, then beside or above the working directory. It may begin with lines ``model: …`` and
    ``system: …`` between two lines ``---``. Text goes in as it is, all other values as JSON; what was
    filled in is not looked through again.

    Args:
        name: the file's name without ``.md``; ``"support/triage"`` is in a subdirectory.
        **variables: a value for each variable of the file, no more and no fewer.

    Raises:
        UsageError: there is no such file, it is not UTF-8, or variables are missing or left over.
    """
    path, root = _find(name)
    text = _text(path)
    relative = path.relative_to(root).as_posix()
    if on_read is not None:
        on_read(relative, _digest(text))
    head, text = _split(text, path)
    wanted = set(_names(text, path)) | set(_names(head.get("system", ""), path))
    missing, unused = sorted(wanted - set(variables)), sorted(set(variables) - wanted)
    if missing or unused:
        wrong = (("missing", missing), ("not in the file", unused))
        words = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong if names)
        raise UsageError(f"load_prompt({name!r}): {words}. {path} has: {', '.join(sorted(wanted)) or 'none'}.")
    shown = {key: _shown(key, value) for key, value in variables.items()}
    system = head.get("system")
    return Prompt(
        text=_fill(text, shown).strip(),
        name=name.removesuffix(".md"),
        system=None if system is None else _fill(system, shown),
        model=head.get("model"),
        path=relative,
    )


load_prompt.__agentflow_prompt_loader__ = True  # type: ignore[attr-defined]


def file_digest(name: str) -> str:
    """The digest of the prompt file that ``name`` stands for, empty when there is none.

    Args:
        name: as for :func:`load_prompt`, or a ``Prompt.path``.
    """
    try:
        return _digest(_text(_find(name)[0]))
    except UsageError:
        return ""


def directories() -> list[Path]:
    """The ``prompts`` directories that :func:`load_prompt` looks into, the first one first."""
    starts = []
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script:
        starts.append(Path(script).resolve().parent)
    starts.append(Path.cwd())
    found = []
    for start in starts:
        nearest = next((place / "prompts" for place in (start, *start.parents) if (place / "prompts").is_dir()), None)
        if nearest is not None and nearest not in found:
            found.append(nearest)
    return found


def _find(name: str) -> tuple[Path, Path]:
    """The file, and the directory of the project it is in."""
    if not isinstance(name, str) or not name or name.startswith(("/", "~")) or ".." in Path(name).parts or "\\" in name:
        raise UsageError(f"load_prompt({name!r}): write the name of a file below prompts/, without .md.")
    places = directories()
    for place in places:
        for below in (name, name.removeprefix("prompts/")):
            path = place / (below.removesuffix(".md") + ".md")
            if path.is_file():
                return path, place.parent
    known = sorted({path.relative_to(place).as_posix()[:-3] for place in places for path in place.rglob("*.md")})
    looked = ", ".join(str(place) for place in places) or "no directory called prompts beside or above the script"
    raise UsageError(
        f"load_prompt({name!r}): no such file. Looked in: {looked}. There are: {', '.join(known[:20]) or 'none'}."
    )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not UTF-8 (byte {exc.start}). Save it as UTF-8.") from exc


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _split(text: str, path: Path) -> tuple[dict[str, str], str]:
    match = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text
    head: dict[str, str] = {}
    for line in match.group(1).splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, colon, value = line.partition(":")
        key = key.strip()
        if not colon or key not in _HEAD or key in head:
            raise UsageError(
                f"{path}: {line.strip()!r} at its top is not understood. There may be: {', '.join(_HEAD)}."
            )
        head[key] = value.strip()
    return head, text[match.end() :]


def _names(text: str, path: Path) -> list[str]:
    names = []
    for match in _VARIABLE.finditer(text):
        inner = match.group(1).strip()
        if inner.isidentifier():
            names.append(inner)
        elif re.fullmatch(r"[\w.|\[\]() -]*", inner):
            raise UsageError(f"{path}: {match.group(0)} is not a variable. Between the braces stands a plain name.")
    return names


def _fill(text: str, shown: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: shown.get(match.group(1).strip(), match.group(0)), text)


def _shown(name: str, value: Any) -> str:
    if value is None:
        raise UsageError(
            f"load_prompt: {name}=None would read as nothing. Pass text, or a file without {{{{{name}}}}}."
        )
    return str(plain(value)) if isinstance(value, str) else show(value, name)
