"""What cards in notebooks are made of: text made safe, statuses, values, the bars of a waterfall.

Cards have no scripts and fetch nothing. Their colours are those of the frontend (JupyterLab, VS Code); where it names
none they fit a light page and a dark one, since what they do not colour has the page's own colours. Without the style
sheet, as in a notebook that is not trusted, they are still in order. Everything is masked (redact.py), then cut, then
escaped: in this order, so that no half of a key is left.
"""

from __future__ import annotations

import html
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import accumulate, pairwise
from typing import Any

from agentflow.durations import words
from agentflow.records import money
from agentflow.redact import redact
from agentflow.shown import clean, json_text, shown

LONG = 2000  # characters of a value
_ITEMS = 40  # of a list or dict
_FIELDS = 12  # of a dict that is shown field by field
_DEPTH = 6
_WHOLE = 20_000  # characters of a text that are looked at
_NO_MATH = "tex2jax_ignore mathjax_ignore"  # classes: what stands between two dollar signs is no formula

STYLE = """<style>
.agentflow{--ok:var(--jp-success-color1,var(--vscode-charts-green,#2f9e53));
--bad:var(--jp-error-color1,var(--vscode-charts-red,#e0484e));--wait:var(--jp-warn-color1,var(--vscode-charts-orange,#d28400));
--run:var(--jp-brand-color1,var(--vscode-charts-blue,#3d86e0));--undone:var(--vscode-charts-purple,#9a6be0);
--line:var(--jp-border-color2,var(--vscode-widget-border,rgba(128,128,128,.35)));--soft:rgba(128,128,128,.13);
--mono:var(--jp-code-font-family,var(--vscode-editor-font-family,ui-monospace,Menlo,Consolas,monospace));
font:13px/1.5 var(--jp-ui-font-family,var(--vscode-font-family,system-ui,sans-serif));color:inherit;text-align:left;
border:1px solid var(--line);border-left:3px solid var(--line);border-radius:6px;padding:8px 12px;margin:2px 0 6px;
max-width:960px;overflow-wrap:anywhere}
.agentflow.completed,.agentflow.approved,.agentflow.answered{border-left-color:var(--ok)}
.agentflow.failed,.agentflow.rejected{border-left-color:var(--bad)}
.agentflow.waiting,.agentflow.open{border-left-color:var(--wait)}.agentflow.running{border-left-color:var(--run)}
.agentflow .af-head{display:flex;flex-wrap:wrap;gap:0 10px;align-items:baseline}
.agentflow .af-title{font-weight:600;font-size:14px}.agentflow .af-grow{flex:1}
.agentflow .af-dim{opacity:.68}
.agentflow .af-code{font-family:var(--mono);font-size:12px;background:var(--soft);color:inherit;border:0;
border-radius:3px;padding:1px 4px}
.agentflow .af-completed,.agentflow .af-approved,.agentflow .af-answered,.agentflow .af-reused{color:var(--ok)}
.agentflow .af-failed,.agentflow .af-rejected,.agentflow .af-fails,.agentflow .af-minus{color:var(--bad)}
.agentflow .af-waiting,.agentflow .af-open,.agentflow .af-retrying,.agentflow .af-changed,
.agentflow .af-warn{color:var(--wait)}
.agentflow .af-running,.agentflow .af-unknown{color:var(--run)}.agentflow .af-undone{color:var(--undone)}
.agentflow .af-plus{color:var(--ok)}
.agentflow .af-box{border-radius:4px;background:var(--soft);padding:5px 9px;margin:6px 0 0}
.agentflow .af-pre{font-family:var(--mono);font-size:12px;line-height:1.45;white-space:pre-wrap;overflow-wrap:anywhere;
background:var(--soft);color:inherit;border:0;border-radius:4px;padding:5px 9px;margin:3px 0;
max-height:26em;overflow:auto}
.agentflow .af-steps{display:grid;grid-template-columns:fit-content(18em) minmax(5em,1fr) fit-content(24em);
gap:1px 12px;margin:6px 0 0;align-items:center}
.agentflow .af-wide{grid-column:1/-1}.agentflow .af-facts{text-align:right;font-size:12px}
.agentflow .af-track{position:relative;height:8px;border-radius:4px;background:var(--soft);overflow:hidden}
.agentflow .af-bar{position:absolute;top:0;bottom:0;min-width:3px;border-radius:4px;background:currentColor}
.agentflow .af-bar.af-replayed{opacity:.45}.agentflow .af-bar.af-wait{opacity:.35}
.agentflow details{margin:4px 0 0}.agentflow summary{cursor:pointer;opacity:.85}
.agentflow .af-table{display:grid;gap:2px 14px;margin:6px 0 0;align-items:baseline}
.agentflow .af-fields{display:grid;grid-template-columns:fit-content(14em) 1fr;gap:1px 12px;background:var(--soft);
border-radius:4px;padding:5px 9px;margin:3px 0}.agentflow .af-text{white-space:pre-wrap}
.agentflow .af-inner{border-top:1px solid var(--line);padding-top:5px;margin-top:6px}
</style>"""


def text(value: Any, limit: int = 300) -> str:
    """A value as text that may be shown: masked, without what could steer a terminal, at most so many characters."""
    whole = str(value)[:_WHOLE].encode("utf-8", "replace").decode()
    plain = clean(redact(whole))
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def safe(value: Any, limit: int = 300) -> str:
    """``text`` as HTML."""
    return html.escape(text(value, limit))


def line(value: Any, limit: int = 300) -> str:
    """``safe`` in one line."""
    return html.escape(" ".join(text(value, limit).split()))


def span(kind: str, value: Any, limit: int = 300) -> str:
    """A piece of text of a kind that the style sheet knows."""
    return f'<span class="af-{kind}">{line(value, limit)}</span>'


def word(status: str) -> str:
    """A status as a part of the name of a class, empty where it is no plain word."""
    return status if status.isascii() and status.isalpha() else ""


def dot(value: str) -> str:
    """A status as its colour."""
    return f'<span class="af-{word(value)}">●</span>'


def status(value: str) -> str:
    """A status in its colour."""
    return f'<span class="af-{word(value)}">● {line(value)}</span>'


def code(value: Any, limit: int = 500) -> str:
    """Something to type, or an id."""
    return f'<code class="af-code">{line(value, limit)}</code>'


def title(name: Any) -> str:
    """What a card is about."""
    return f'<span class="af-title">{line(name, 80)}</span>'


def dim(said: Any) -> str:
    """A line that is less important."""
    return f'<div class="af-dim">{line(said, 400)}</div>'


def card(content: Iterable[str], kind: str = "", *, style: bool = True) -> str:
    """The frame of a card. ``kind``: a status, for its colour."""
    return f'{STYLE if style else ""}<div class="agentflow {word(kind)} {_NO_MATH}">{"".join(content)}</div>'


def head(*parts: str) -> str:
    """The first line of a card; an empty part pushes what follows to the right."""
    return f'<div class="af-head">{" ".join(part or GROW for part in parts)}</div>'


GROW = '<span class="af-grow"></span>'


def details(title: str, content: str, *, opened: bool = False) -> str:
    """Something that is unfolded by a click; ``title`` is HTML."""
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{content}</details>"


def pre(value: str, limit: int = LONG) -> str:
    """Text in the lines that it has."""
    return f'<pre class="af-pre">{safe(value, limit)}</pre>'


def shown_text(value: Any, limit: int = LONG) -> str:
    """A value of any kind as masked text: text as it is, everything else as indented JSON, long ones cut."""
    return text(value, limit) if isinstance(value, str) else text(json_text(_pruned(value), indent=True), limit)


def value(title: str, of: Any, *, opened: bool = False) -> str:
    """A value behind its title; nothing for None. ``opened``: it is there to be read, field by field if it has some."""
    if of is None:
        return ""
    whole = shown_text(of)
    name = f'<span class="af-dim">{line(title)}</span>'
    if "\n" not in whole and len(whole) <= 100:
        return f"<div>{name} {code(whole)}</div>"
    if not opened:
        return details(f"{name} {line(whole, 80)}", pre(whole))
    return details(name, _fields(of) if isinstance(of, dict) and len(of) <= _FIELDS else pre(whole), opened=True)


def _fields(of: dict[Any, Any]) -> str:
    """A dict as people read one: each key with its value, texts in the lines that they have."""
    cells = ""
    for key, item in shown(_pruned(of)).items():
        read = item if isinstance(item, str) else json_text(item, indent=isinstance(item, dict | list))
        cells += f'<div class="af-dim">{line(key, 60)}</div><div class="af-text">{safe(read, LONG)}</div>'
    return f'<div class="af-fields">{cells}</div>'


def _pruned(of: Any, depth: int = _DEPTH) -> Any:
    """The beginnings of what is large: a card shows a part, and looks at no more."""
    if isinstance(of, str):
        return of[:_WHOLE].encode("utf-8", "replace").decode()
    if isinstance(of, dict | list | tuple) and depth == 0:
        return f"… {len(of)} items"
    if isinstance(of, dict):
        kept = {str(key): _pruned(item, depth - 1) for key, item in list(of.items())[:_ITEMS]}
        return kept if len(of) <= _ITEMS else kept | {"…": f"{len(of) - _ITEMS} more"}
    if isinstance(of, list | tuple):
        items = [_pruned(item, depth - 1) for item in of[:_ITEMS]]
        return items if len(of) <= _ITEMS else [*items, f"… {len(of) - _ITEMS} more"]
    return of


def diff(lines: str) -> str:
    """A difference, line by line in its colours."""
    made = []
    for each in text(lines, 2 * LONG).rstrip().splitlines():
        sign = {"+": "plus", "-": "minus"}.get(each.lstrip()[:1], "dim")
        made.append(f'<span class="af-{sign}">{html.escape(each)}</span>')
    return f'<pre class="af-pre">{chr(10).join(made)}</pre>' if made else ""


# -- the waterfall ---------------------------------------------------------------------------


@dataclass(slots=True)
class Bar:
    """One step in a waterfall.

    Attributes: ``depth`` (inside how many steps it stands); ``start`` and ``end`` (seconds since 1970, None: not
    known, or not over); ``how`` (replayed, or empty); ``cut`` (ends and errors of the attempts that failed before the
    last one); ``waits`` (True: it is a wait, not work).
    """

    name: str
    status: str
    depth: int = 0
    start: float | None = None
    end: float | None = None
    attempts: int = 1
    how: str = ""
    cost: Decimal | None = None
    model: str | None = None
    tokens: int = 0
    error: str | None = None
    cut: list[tuple[float, str]] = field(default_factory=list)
    waits: bool = False

    @property
    def facts(self) -> Iterator[str]:
        """What stands beside it."""
        if self.how:
            yield self.how
        if self.start is not None and self.end is not None and self.end - self.start >= 0.001:
            yield words(self.end - self.start)
        if self.attempts > 1:
            yield f"{self.attempts} attempts"
        if self.cost:
            yield money(self.cost)
        if self.tokens:
            yield f"{self.tokens:,} tokens"
        if self.model:
            yield self.model
        if self.status not in ("completed", ""):
            yield self.status


def waterfall(bars: Sequence[Bar], now: float, said: str | None = None, dropped: int = 0) -> str:
    """The steps of a run, one below the other, each with a bar where it stands in time.

    Args:
        bars: in the order in which they started; of very many a part is shown.
        now: where the bars of those end that have not ended; seconds since 1970.
        said: an error that stands on the card already. Each error is said once.
        dropped: how many more there are, after the first ones.
    """
    kept = _kept(bars, dropped)
    place = _axis([bar for bar in kept if isinstance(bar, Bar)], now)
    return f'<div class="af-steps">{"".join(_rows(kept, place, now, {None, said}))}</div>' if kept else ""


def _kept(bars: Sequence[Bar], dropped: int) -> Sequence[Bar | int]:
    """Of many bars the first, the last, and some that run or failed; a number stands for as many left out."""
    if len(bars) <= 48:
        return bars
    found: list[Bar | int] = [*bars[:20], dropped]
    more = {"failed": 8, "running": 12}
    for index, bar in enumerate(bars[20:], 20):
        if index >= len(bars) - 12:
            found.append(bar)
        elif more.get(bar.status, 0):
            more[bar.status] -= 1
            found.append(bar)
        elif isinstance(found[-1], int):
            found[-1] += 1
        else:
            found.append(1)
    return found


def _rows(
    bars: Iterable[Bar | int], place: Callable[[float], float], now: float, said: set[str | None]
) -> Iterator[str]:
    for bar in bars:
        if isinstance(bar, int):
            yield f'<div class="af-wide af-dim">… {bar} more {"step" if bar == 1 else "steps"}</div>' if bar else ""
            continue
        inset = f' style="padding-left:{1.1 * min(bar.depth, 6):.1f}em"' if bar.depth else ""
        yield f"<div{inset}>{dot(bar.status)} {line(bar.name, 60)}</div>"
        yield f'<div class="af-track">{"".join(_pieces(bar, place, now))}</div>'
        yield f'<div class="af-facts af-dim">{line(" · ".join(bar.facts), 120)}</div>'
        notes = [f"attempt {number}: {error}" for number, (_, error) in enumerate(bar.cut[:5], 1)]
        if bar.error not in said:
            notes.append(f"{bar.error}")
        said.add(bar.error)
        for note in notes:
            yield f'<div class="af-wide"><span class="af-failed">{line(note, 300)}</span></div>'


def _pieces(bar: Bar, place: Callable[[float], float], now: float) -> Iterator[str]:
    """Its time in pieces: one for each attempt."""
    if bar.start is None:
        return
    look = " af-replayed" if bar.how else " af-wait" if bar.waits else ""
    begin = bar.start
    for end, _ in bar.cut:
        yield _piece("failed" + look, place(begin), place(end))
        begin = end
    yield _piece(word(bar.status) + look, place(begin), place(bar.end if bar.end is not None else now))


def _piece(kind: str, left: float, right: float) -> str:
    return f'<span class="af-bar af-{kind}" style="left:{left:.2f}%;width:{max(right - left, 0.0):.2f}%"></span>'


def _axis(bars: Sequence[Bar], now: float) -> Callable[[float], float]:
    """From an instant to a place in per cent. Times in which nothing ran are shown short, however long they were."""
    spans = [(bar.start, now if bar.end is None else bar.end, bar.waits) for bar in bars if bar.start is not None]
    points = sorted({point for start, end, _ in spans for point in (start, end)})
    gaps = list(pairwise(points))
    works = [any(start <= a and b <= end and not waits for start, end, waits in spans) for a, b in gaps]
    longest = 0.08 * sum(b - a for (a, b), work in zip(gaps, works, strict=True) if work) or 1.0
    lengths = [b - a if work else min(b - a, longest) for (a, b), work in zip(gaps, works, strict=True)]
    places = [0.0, *accumulate(lengths)]
    whole = places[-1] or 1.0

    def place(moment: float) -> float:
        after = bisect_right(points, moment)
        if after == 0 or after == len(points):
            return 100.0 if after else 0.0
        a, b = points[after - 1 : after + 1]
        part = (moment - a) / (b - a) * lengths[after - 1]
        return 100 * (places[after - 1] + part) / whole

    return place
