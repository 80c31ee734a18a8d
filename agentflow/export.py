"""A run as one file, to send or to keep: JSON, or a page that needs nothing else. Secrets are masked in both."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from agentflow import human, rundocs
from agentflow.context import view
from agentflow.errors import UsageError
from agentflow.index import Row, in_key
from agentflow.journal import Journal
from agentflow.records import moment
from agentflow.shown import json_text, shown

FORMAT = 1
_STEP = (
    "name", "id", "kind", "status", "started_at", "completed_at", "duration", "attempts", "idempotency_key", "output",
    "error", "usage", "cost", "model", "parent", "in_doubt",
)  # fmt: skip


def export(journal: Journal, document: dict[str, Any], summary: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a run to a file; the ending ``.html`` makes a page, every other one JSON."""
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        why = "is a directory" if target.is_dir() else f"lies in {target.parent}, which does not exist"
        raise UsageError(f"export({str(path)!r}): it {why}. Name a file, such as run.json or run.html.")
    data = tree(journal, document, summary)
    if target.suffix.lower() in (".html", ".htm"):
        text = page(data)
    else:
        text = orjson.dumps(data, option=orjson.OPT_INDENT_2).decode() + "\n"
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def tree(journal: Journal, document: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """A run as plain JSON data with secrets masked.

    ``format`` is 1; ``run`` has what ``runs list --json`` shows, and ``parent``, ``forked_at``, ``input``, ``output``;
    ``steps`` what ``runs show --json`` shows of each, and ``given`` (what its function was given), ``failures`` (of its
    earlier attempts) and ``calls`` (each paid request and its reply, as they were sent and received); ``tasks`` what
    people were asked, with their decisions.
    """
    run_id = document["id"]
    rows = rundocs.rows(journal, run_id, undone=True)
    tasks = []
    for key, _ in journal.scan(f"ht/{in_key(run_id)}/"):
        if (text := journal.get(f"h/{key.rpartition('/')[2]}")) is not None:
            tasks.append(human.task_of(orjson.loads(text)))
    masked = shown({"format": FORMAT, "run": summary, "steps": [_step(journal, row) for row in rows], "tasks": tasks})
    return dict(masked)


def _step(journal: Journal, row: Row) -> dict[str, Any]:
    record, head = view(row), row.head
    base = f"{in_key(head['run'])}/{head['occ']}"
    calls = [orjson.loads(text) for _, text in journal.scan(f"m/{base}/")] if head["kind"] == "ai" else []
    facts = [orjson.loads(text) for _, text in journal.scan(f"a/{base}.")]
    return {name: getattr(record, name) for name in _STEP} | {
        "supplied": bool(head.get("supplied")),
        "given": orjson.loads(row.given) if row.given else None,
        "failures": [
            {
                "attempt": fact["attempt"],
                "at": moment(fact["t1"]),
                "error": f"{fact['error']['name']}: {fact['error']['message']}",
            }
            for fact in facts
        ],
        "calls": calls,
    }


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem;margin:0 0 .2rem} h2{font-size:1.05rem;margin:2rem 0 .5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.5rem 0}dt{color:#57606a}dd{margin:0}
details{border:1px solid #d0d7de;border-radius:6px;margin:.4rem 0;padding:.4rem .7rem}
summary{cursor:pointer;display:flex;gap:.8rem;align-items:baseline}
summary b{flex:1} .bar{position:relative;height:6px;background:#eaeef2;border-radius:3px;margin:.3rem 0}
.bar i{position:absolute;top:0;bottom:0;min-width:2px;border-radius:3px;background:#0969da}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.6rem;border-radius:6px;margin:.3rem 0}
.completed{color:#1a7f37}.failed,.rejected{color:#cf222e}.waiting,.open{color:#9a6700}.undone{color:#8250df}
.inner{margin-left:1.5rem}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}pre,.bar{background:#161b22}
details{border-color:#30363d}dt{color:#8d96a0}}
"""


def page(data: dict[str, Any]) -> str:
    """One page of what ``tree`` gives: no script, nothing fetched, everything escaped."""
    return "".join(_page(data))


def _page(data: dict[str, Any]) -> Iterator[str]:
    run = data["run"]
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_e(run['id'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_e(run['id'])}</h1><p>{_e(run['workflow'])} · {_status(run['status'])}</p><dl>"
    )
    for name in ("started_at", "completed_at", "cost", "saved", "parent", "forked_at", "error"):
        if run.get(name) is not None:
            yield f"<dt>{_e(name.replace('_', ' '))}</dt><dd>{_e(run[name])}</dd>"
    yield "</dl>"
    yield from _value("input", run.get("input"))
    yield from _value("output", run.get("output"))
    yield f"<h2>{len(data['steps'])} steps</h2>"
    spans = [_span(step) for step in data["steps"]]
    begin, end = min((a for a, _ in spans), default=0.0), max((b for _, b in spans), default=0.0)
    for step, (start, stop) in zip(data["steps"], spans, strict=True):
        yield from _step_html(step, begin, max(end - begin, 1e-9), start, stop)
    if data["tasks"]:
        yield f"<h2>{len(data['tasks'])} tasks</h2>"
    for task in data["tasks"]:
        yield (
            f"<details><summary><b>{_e(task['title'] or task['type'])}</b><span>{_e(task['assign_to'])}</span>"
            f"{_status(task['status'])}</summary>"
        )
        yield from _value("data", task["data"])
        yield from _value("decision", task["decision"])
        yield "</details>"
    yield "</body></html>\n"


def _step_html(step: dict[str, Any], begin: float, width: float, start: float, stop: float) -> Iterator[str]:
    facts = [f"{step['duration']:.3g} s" if step["duration"] is not None else "", step["model"], step["cost"]]
    facts += [
        f"{step['attempts']} attempts" if step["attempts"] > 1 else "",
        "given result" if step["supplied"] else "",
    ]
    left, length = (start - begin) / width * 99, (stop - start) / width * 99
    yield (
        f"<details{' class=inner' if step['parent'] else ''}><summary><b>{_e(step['name'])}</b>"
        f"{''.join(f'<span>{_e(fact)}</span>' for fact in facts if fact)}{_status(step['status'])}</summary>"
        f'<div class="bar"><i style="left:{left:.2f}%;width:{length:.2f}%">'
        "</i></div>"
    )
    for failure in step["failures"]:
        yield f'<p class="failed">attempt {_e(failure["attempt"])}: {_e(failure["error"])}</p>'
    if step["error"]:
        yield f'<p class="failed">{_e(step["error"])}</p>'
    yield from _value("output", step["output"])
    yield from _value("given", step["given"])
    for number, call in enumerate(step["calls"], 1):
        yield from _value(f"call {number}: request", call.get("request"))
        yield from _value(f"call {number}: reply", call.get("body"))
    yield "</details>"


def _value(title: str, value: Any) -> Iterator[str]:
    if value is not None:
        text = value if isinstance(value, str) else json_text(value, indent=True)
        yield f"<details><summary>{_e(title)}</summary><pre>{_e(text)}</pre></details>"


def _span(step: dict[str, Any]) -> tuple[float, float]:

    times = [datetime.fromisoformat(step[name]).timestamp() for name in ("started_at", "completed_at") if step[name]]
    return (times[0], times[-1]) if times else (0.0, 0.0)


def _status(status: str) -> str:
    known = status if status.isalpha() else ""
    return f'<span class="{known}">{_e(status)}</span>'


def _e(value: Any) -> str:
    return html.escape(str(value))
