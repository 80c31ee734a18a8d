"""How two canonical texts differ, and whether only by accidents of the moment.

Needed on a miss and for words to people, never on the way of a hit.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import math
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import orjson

from agentflow.canonical import _MISSING, LONG, dumps


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One place where two texts differ.

    ``accident``: "clock", "uuid" or "address" when nothing but such a reading differs, else None.
    """

    path: str
    old: str
    new: str
    accident: str | None


_Window = tuple[float, float]
_NEVER: _Window = (math.inf, -math.inf)
_NAMED = {"~obj", "~sub", "~exc", "~method", "~frame", "~fn"}
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def _tagged(v: Any) -> tuple[str, Any] | None:
    if type(v) is dict and len(v) == 1:
        ((key, inner),) = v.items()
        if key[:1] == "~":
            return key, inner
    return None


def _children(v: Any) -> dict[str, Any] | None:
    """Parts of a tree by path suffix; None for a leaf."""
    if (tag := _tagged(v)) is not None:
        kind, inner = tag
        if kind in ("~tuple", "~deque"):
            return {f"[{i}]": x for i, x in enumerate(inner)}
        if kind == "~dict":
            return {f"[{render(k)}]": x for k, x in inner}
        if kind in ("~obj", "~sub", "~exc", "~method"):
            return _children(inner[1])
        if kind == "~fn":
            free = {f".free[{i}]": x for i, x in enumerate(inner[1])}
            return {**free, **{f".defaults[{i}]": x for i, x in enumerate(inner[2])}, **(_children(inner[3]) or {})}
        if kind == "~partial":
            parts = {".func": inner[0], **{f".args[{i}]": x for i, x in enumerate(inner[1])}}
            return {**parts, **(_children(inner[2]) or {})}
        return None
    if type(v) is dict:
        return {f".{k}" if _WORD.match(k) else f"[{k!r}]": x for k, x in v.items()}
    return {f"[{i}]": x for i, x in enumerate(v)} if type(v) is list else None


def _kind(v: Any) -> Any:
    if (tag := _tagged(v)) is None:
        return type(v)
    return (tag[0], tag[1][0]) if tag[0] in _NAMED else tag[0]


def _changes(path: str, old: Any, new: Any, whole: bool) -> Iterator[tuple[str, Any, Any]]:
    """Leaves that differ; with ``whole`` a sequence of another length is one change."""
    there = old is not _MISSING and new is not _MISSING
    if there and dumps(old) == dumps(new):
        return
    a, b = _children(old), _children(new)
    resized = a is not None and b is not None and len(a) != len(b) and any(k[:1] == "[" for k in (*a, *b))
    if a is None or b is None or not there or _kind(old) != _kind(new) or (whole and resized):
        yield path.removeprefix("."), old, new
        return
    inner = [c for key in {**a, **b} for c in _changes(path + key, a.get(key, _MISSING), b.get(key, _MISSING), whole)]
    yield from inner or [(path.removeprefix("."), old, new)]


def changed_paths(old_text: str, new_text: str) -> list[str]:
    """Paths whose content differs; a list, set or dict that grew or shrank is one path."""
    return [path for path, _, _ in _changes("", orjson.loads(old_text), orjson.loads(new_text), True)]


def opaque_paths(text: str) -> list[str]:
    """Paths of the values in ``text`` that are not compared."""

    def walk(path: str, v: Any) -> Iterator[str]:
        if type(v) is dict and "~opaque" in v:
            yield path.removeprefix(".")
            return
        tag = _tagged(v)
        inner = _children(v)
        if inner is None and tag is not None and tag[0] in ("~set", "~frozenset", "~array", "~frame"):
            inner = _children(tag[1] if tag[0] in ("~set", "~frozenset") else tag[1][-1])
        for key, x in (inner or {}).items():
            yield from walk(path + key, x)

    return list(walk("", orjson.loads(text)))


_PIECES = re.compile(
    r"(?P<iso>\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?P<second>:\d\d(?:[.,]\d{1,9})?)? ?(?:Z|[+-]\d\d:?\d\d)?)"
    r"|(?P<compact>(?<!\w)20\d{6}[T_-]?\d{6}(?!\w))"
    r"|(?P<ctime>[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4})"
    r"|(?P<uuid>(?<!\w)[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}(?!\w))"
    r"|(?P<hex>(?<![0-9a-zA-Z])[0-9a-fA-F]{12}4[0-9a-fA-F]{3}[89abAB][0-9a-fA-F]{15}(?![0-9a-zA-Z]))"
    r"|(?P<address>(?<= at )0x[0-9a-fA-F]+)"
    r"|(?P<epoch>(?<![\w.-])[12]\d{9}(?:\.\d+|\d{3}|\d{6}|\d{9})?(?![\w]))"
)


class _Judge:
    """Decides whether a difference is an accident of the moment."""

    def __init__(self, old_window: _Window, new_window: _Window, known: Callable[[str], bool]) -> None:
        self.windows = (old_window, new_window)
        self.known = known

    def accident(self, old: Any, new: Any) -> str | None:
        a, b = _tagged(old), _tagged(new)
        if a and b and a[0] == b[0]:
            if a[0] == "~datetime":
                return "clock" if self._times(_iso(a[1]), _iso(b[1])) else None
            if a[0] == "~uuid":
                return "uuid" if self._uuids(a[1], b[1]) else None
            return None
        if type(old) in (int, float) and type(new) in (int, float):
            return "clock" if type(old) is type(new) and self._epochs(old, new) else None
        if type(old) is str and type(new) is str and max(len(old), len(new)) <= LONG:
            return self._strings(old, new)
        return None

    def _strings(self, old: str, new: str) -> str | None:
        left, right = list(_PIECES.finditer(old)), list(_PIECES.finditer(new))
        if not left or len(left) != len(right) or _between(old, left) != _between(new, right):
            return None
        found: str | None = None
        for m, n in zip(left, right, strict=True):
            if m[0] == n[0]:
                continue
            kind = _group(m)
            if kind != _group(n):
                return None
            accident = self._piece(kind, m, n)
            if accident is None:
                return None
            found = found or accident
        return found

    def _piece(self, kind: str, m: re.Match[str], n: re.Match[str]) -> str | None:
        if kind == "address":
            return "address"
        if kind in ("uuid", "hex"):
            return "uuid" if self._uuids(m[0], n[0]) else None
        if kind == "epoch":
            return "clock" if self._epochs(float(m[0]), float(n[0])) else None
        coarse = 60.0 if kind == "iso" and m["second"] is None else 1.0
        if kind == "iso":
            old, new = _iso(m[0]), _iso(n[0])
        else:
            form = "%a %b %d %H:%M:%S %Y" if kind == "ctime" else "%Y%m%d%H%M%S"
            clean = (lambda s: s) if kind == "ctime" else (lambda s: re.sub(r"\D", "", s))
            old, new = _strptime(clean(m[0]), form), _strptime(clean(n[0]), form)
        return "clock" if self._times(old, new, coarse) else None

    def _times(self, old: list[float], new: list[float], coarse: float = 1.0) -> bool:
        return all(
            any(w[0] - coarse <= t <= w[1] + 1.0 for t in times)
            for w, times in zip(self.windows, (old, new), strict=True)
        )

    def _epochs(self, old: float, new: float) -> bool:
        return any(self._times([old / unit], [new / unit]) for unit in (1, 1e3, 1e6, 1e9))

    def _uuids(self, old: str, new: str) -> bool:
        for text in (old, new):
            try:
                u = uuid.UUID(text)
            except ValueError:
                return False
            if u.version != 4 or any(self.known(form) for form in {text, str(u), u.hex}):
                return False
        return True


def _group(m: re.Match[str]) -> str:
    return next(k for k in ("iso", "compact", "ctime", "uuid", "hex", "address", "epoch") if m[k] is not None)


def _between(text: str, pieces: Sequence[re.Match[str]]) -> list[str]:
    edges = [0, *(x for m in pieces for x in m.span()), len(text)]
    return [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _readings(t: dt.datetime) -> list[float]:
    """Epoch seconds; a naive time may be local or UTC."""
    try:
        return [t.timestamp()] if t.tzinfo else [t.timestamp(), t.replace(tzinfo=dt.UTC).timestamp()]
    except (OverflowError, ValueError, OSError):
        return []


def _iso(text: str) -> list[float]:
    text = re.sub(r" (?=Z|[+-]\d\d:?\d\d$)", "", text.strip())
    try:
        return _readings(dt.datetime.fromisoformat(text))
    except ValueError:
        return []


def _strptime(text: str, form: str) -> list[float]:
    try:
        return _readings(dt.datetime.strptime(text, form))
    except ValueError:
        return []


def differences(
    old_text: str,
    new_text: str,
    *,
    ignore: Collection[str] = (),
    old_window: _Window = _NEVER,
    new_window: _Window = _NEVER,
    known: Callable[[str], bool] = lambda s: False,
) -> list[Difference]:
    """Where two captures differ, each place judged.

    Args:
        ignore: paths that do not count, with everything below them.
        old_window: when the recorded session ran, (start, asked) in epoch seconds; a clock reading is an accident only
            if the old value lies in here and the new one in ``new_window``.
        known: whether a uuid was found in the run's input or in a recorded output: then it is data, no accident.

    Returns:
        One entry per differing leaf, in the order of the old text; empty for equal texts.
    """
    if old_text == new_text:
        return []
    judge = _Judge(old_window, new_window, known)
    out = []
    for path, old, new in _changes("", orjson.loads(old_text), orjson.loads(new_text), False):
        if any(path == p or path.startswith((p + ".", p + "[")) for p in ignore):
            continue
        out.append(Difference(path, *_excerpts(old, new), judge.accident(old, new)))
    return out


def render(v: Any) -> str:
    """A tree as a person would write it: tags undone."""
    if v is _MISSING:
        return "(absent)"
    if (tag := _tagged(v)) is None:
        if type(v) is dict:
            return "{" + ", ".join(f"{k!r}: {render(x)}" for k, x in v.items()) + "}"
        return "[" + ", ".join(map(render, v)) + "]" if type(v) is list else repr(v)
    kind, inner = tag
    if kind == "~tuple":
        return "(" + ", ".join(map(render, inner)) + ")"
    if kind == "~obj":
        return f"{inner[0]}(" + ", ".join(f"{k}={render(x)}" for k, x in inner[1].items()) + ")"
    if kind == "~enum":
        return f"{inner[0]}.{inner[1] if type(inner[1]) is str else render(inner[1])}"
    if kind == "~sub":
        return f"{inner[0]}({render(inner[1])})"
    if kind == "~str" and type(inner) is list:
        return f"(text of {inner[0]} characters)"
    return f"{kind[1:]}({inner if type(inner) is str else render(inner)})"


def _excerpts(old: Any, new: Any, width: int = 160) -> tuple[str, str]:
    """Both sides, shortened to what differs."""
    if type(old) is str and type(new) is str and ("\n" in old or "\n" in new):
        a, b = old.splitlines(), new.splitlines()
        left: list[str] = []
        right: list[str] = []
        for group in difflib.SequenceMatcher(None, a, b, autojunk=len(a) > 2000).get_grouped_opcodes(1):
            left += (["…"] if left else []) + a[group[0][1] : group[-1][2]]
            right += (["…"] if right else []) + b[group[0][3] : group[-1][4]]
        return "\n".join(left), "\n".join(right)
    x, y = render(old), render(new)
    if max(len(x), len(y)) <= width:
        return x, y
    at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
    start = max(0, at - width // 4)
    return tuple(  # type: ignore[return-value]
        ("…" if start else "") + s[start : start + width] + ("…" if len(s) > start + width else "") for s in (x, y)
    )


def unified(differences: Sequence[Difference]) -> str:
    """The differences for a person to read, one block per path; texts of several lines as a unified diff."""
    out = []
    for d in differences:
        note = f"  ({d.accident})" if d.accident else ""
        if "\n" in d.old or "\n" in d.new:
            lines = list(difflib.unified_diff(d.old.splitlines(), d.new.splitlines(), lineterm="", n=1))[2:]
            out.append("\n".join([f"{d.path}:{note}", *("  " + line for line in lines)]))
        elif len(d.old) + len(d.new) > 80:
            out.append(f"{d.path}:{note}\n  - {d.old}\n  + {d.new}")
        else:
            out.append(f"{d.path}: {d.old} -> {d.new}{note}")
    return "\n".join(out)
