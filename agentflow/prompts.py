"""Prompts kept in files: ``prompts/<name>.md`` beside the project, with ``{{name}}`` for what changes.

A file may begin with a head between two lines ``---`` that says how to ask, and may say whose words follow
in lines ``--- system ---``, ``--- user ---`` and ``--- assistant ---``::

    ---
    model: openai:gpt-5-mini
    output: Ticket
    max_tokens: 500
    ---
    --- system ---
    You sort support mail.
    --- user ---
    {{message}}
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentflow.errors import UsageError
from agentflow.rich import Rich
from agentflow.schema import plain, show

_VARIABLE = re.compile(r"\{\{([^{}\n]*)\}\}")
_HEAD = ("model", "system", "output", "max_tokens", "temperature", "reasoning", "extra")
_ROLE = re.compile(r"^---[ \t]+(system|user|assistant)[ \t]+---[ \t]*(?:\n|\Z)", re.MULTILINE)

on_read: Callable[[str, str], None] | None = None
"""Told of each file that ``load_prompt`` reads: its path relative to the project, and its digest."""


@dataclass(frozen=True, slots=True)
class Prompt(Rich):
    """Text for a model, with what its file says about how to ask.

    Attributes:
        text: what is sent.
        name: names the call's step; None leaves that to the call.
        system: the system message; None for none.
        model: the model to ask; None for the default.
        path: the file it came from, relative to the project; None when it came from no file.
        output: the type of the answer as it is written in the file; None for text. It is found when the call is
            made, among the classes of loaded modules; nothing is imported for it.
        max_tokens, temperature, reasoning, extra: as for ``generate_content``; None leaves them to the call.
        earlier: turns of the user and the model that are shown before ``text``, as messages.

    What the call itself says goes before what the prompt says.
    """

    text: str
    name: str | None = None
    system: str | None = None
    model: str | None = None
    path: str | None = None
    output: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    reasoning: str | dict[str, Any] | None = None
    extra: Mapping[str, Any] | None = None
    earlier: tuple[dict[str, str], ...] = ()

    def __str__(self) -> str:
        return self.text


def load_prompt(name: str, /, **variables: Any) -> Prompt:
    """Reads ``prompts/<name>.md`` and fills in its ``{{variables}}``.

    The file is looked for in the nearest directory called ``prompts`` beside or above the main
    script, then beside or above the working directory. Text goes in as it is, all other values as JSON;
    what was filled in is not looked through again, neither for variables nor for roles.

    Between two lines ``---`` at its top may stand ``model: …``, ``system: …``, ``output: …`` (a class that is
    loaded, by its name or ``module.Name``, ``list[…]``, ``… | None``, ``Literal[…]`` or a plain type),
    ``max_tokens: …``, ``temperature: …``, ``reasoning: …`` (a word or JSON) and ``extra: …`` (JSON), each
    on one line. Below, lines ``--- system ---``, ``--- user ---`` and ``--- assistant ---`` say whose words follow;
    without them all is the user's.

    Args:
        name: the file's name without ``.md``; ``"support/triage"`` is in a subdirectory.
        **variables: a value for each variable of the file, no more and no fewer.

    Raises:
        UsageError: there is no such file, it is not UTF-8, its head or its roles make no sense, or variables are
            missing or left over.
    """
    path, root = _find(name)
    text = _text(path)
    relative = path.relative_to(root).as_posix()
    if on_read is not None:
        on_read(relative, digest(text))
    head, text = _split(text, path)
    turns = _turns(head.pop("system", None), text, path)
    wanted = {found for _, said in turns for found in _names(said, path)}
    missing, unused = sorted(wanted - set(variables)), sorted(set(variables) - wanted)
    if missing or unused:
        wrong = (("missing", missing), ("not in the file", unused))
        words = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong if names)
        raise UsageError(f"load_prompt({name!r}): {words}. {path} has: {', '.join(sorted(wanted)) or 'none'}.")
    shown = {key: _shown(key, value) for key, value in variables.items()}
    filled = [(role, _fill(said, shown)) for role, said in turns]
    system = [said for role, said in filled if role == "system"]
    *earlier, last = [{"role": role, "content": said.strip()} for role, said in filled if role != "system"]
    return Prompt(
        text=last["content"],
        name=name.removesuffix(".md"),
        system="\n\n".join(system) if system else None,
        path=relative,
        earlier=tuple(earlier),
        **head,
    )


load_prompt.__agentflow_prompt_loader__ = True  # type: ignore[attr-defined]


def file_digest(name: str) -> str:
    """The digest of the prompt file that ``name`` stands for, empty when there is none.

    Args:
        name: as for :func:`load_prompt`, or a ``Prompt.path``.
    """
    try:
        return digest(_text(_find(name)[0]))
    except UsageError:
        return ""


def file_text(name: str) -> str | None:
    """The text of the prompt file that ``name`` stands for, None when there is none."""
    try:
        return _text(_find(name)[0])
    except UsageError:
        return None


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


def digest(text: str) -> str:
    """What tells one text of a prompt file from another."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _split(text: str, path: Path) -> tuple[dict[str, Any], str]:
    match = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text
    head: dict[str, Any] = {}
    for line in match.group(1).splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or key not in _HEAD or key in head:
            raise UsageError(
                f"{path}: {line.strip()!r} at its top is not understood. There may be, once each: {', '.join(_HEAD)}."
            )
        head[key] = _setting(key, value, path)
    return head, text[match.end() :]


def _setting(key: str, value: str, path: Path) -> Any:
    """One line of the head: text as it is, numbers and JSON as what they are."""
    if key == "system":
        return value
    if not value or _VARIABLE.search(value):
        raise UsageError(
            f"{path}: {key}: {value or 'nothing'!r}. A value is needed, and variables stand below the head."
        )
    if key in ("model", "output") or (key == "reasoning" and not value.startswith("{")):
        return value
    form: Any = {"max_tokens": int, "temperature": (int, float)}.get(key, dict)
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if isinstance(found, bool) or not isinstance(found, form):
        words = {"max_tokens": "a whole number", "temperature": "a number"}.get(key, "a JSON object on one line")
        raise UsageError(f"{path}: {key}: {value!r} is not {words}.")
    return found


def _turns(system: str | None, text: str, path: Path) -> list[tuple[str, str]]:
    """Who says what, in the file's order, before anything is filled in."""
    turns = [] if system is None else [("system", system)]
    pieces = _ROLE.split(text)  # what stands before the first role, then each role and its words
    if len(pieces) == 1:
        return [*turns, ("user", text)]
    if pieces[0].strip():
        raise UsageError(
            f"{path}: {pieces[0].strip()[:60]!r} stands before the first line of a role. Whose words are it?"
        )
    rest = zip(pieces[1::2], pieces[2::2], strict=True)
    turns += [(role, said.strip() if role == "system" else said) for role, said in rest]
    if turns[-1][0] != "user":
        raise UsageError(
            f"{path}: the last words are the {turns[-1][0]}'s. End with --- user ---, whom the model answers."
        )
    return turns


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
