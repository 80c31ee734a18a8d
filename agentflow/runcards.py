"""The cards of runs, of what they wait for and of tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import orjson

from agentflow import cardparts as part
from agentflow import human, rundocs, tasks
from agentflow.cardparts import Bar
from agentflow.durations import words
from agentflow.errors import RunNotFound, TaskNotFound, Waiting
from agentflow.handles import Run
from agentflow.index import in_key
from agentflow.journal import Journal
from agentflow.records import HumanTask, StepRecord, moment, money
from agentflow.scratch import open_journal
from agentflow.watched import WAITS, Watched

ROWS = 50  # of a list
_TASKS = 5  # of a run, shown with their data


def run_of(waiting: Waiting) -> Run | None:
    """The run that waits, as the journal has it; None where it is in another journal than the one that is open."""
    journal = open_journal()
    try:
        return Run(journal, rundocs.find(journal, waiting.run_id))
    except RunNotFound:
        return None


def run(value: Run) -> Iterator[str]:
    """The card of a run as the journal has it."""
    bars = bars_of(value)
    yield from _run(value, _summary(value, bars), part.waterfall(bars, time.time(), value.error), ())


def ended(value: Run, ex: Watched, line: str) -> Iterator[str]:
    """The card of a run that was executed here until a moment ago; ``line`` is what was said at its end.

    Its steps are those that ``ex`` has noted, of very many a part: what is recorded is not read again for a card.
    """
    for bar in ex.bars.values():
        if bar.end is None and bar.status in ("running", "retrying"):
            bar.status, bar.end = "", ex.clock()
    bars = part.waterfall(list(ex.bars.values()), ex.clock(), value.error, ex.dropped)
    yield from _run(value, line.partition(" · ")[2] or line, bars, ex.notes)


def _run(value: Run, summary: str, bars: str, said: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield part.head(part.status(value.status), part.title(value.workflow), part.code(value.id, 80), "", took(value))
    yield part.dim(summary)
    yield from _trouble(value)
    yield from _waits(value.waiting_on)
    yield bars
    yield from notes(said)
    yield part.value("input", value.input)
    yield part.value("output", value.output)


def _summary(value: Run, bars: Sequence[Bar]) -> str:
    count = len([bar for bar in bars if bar.depth == 0])
    paid = f"paid {money(value.cost)}, saved {money(value.saved)}"
    return f"{count} {'step' if count == 1 else 'steps'} · {paid}"


def run_words(value: Run) -> Iterator[str]:
    """A run in words, with its steps."""
    bars = bars_of(value)
    yield from ended_words(value, f"{value.status} · {_summary(value, bars)}")
    yield from (f"  {bar_words(bar)}" for bar in bars[:ROWS])
    if len(bars) > ROWS:
        yield f"  … {len(bars) - ROWS} more"


def ended_words(value: Run, line: str, said: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
    """The line at the end of a run, what was said of it, what it failed with, what it waits for."""
    yield part.text(f"{value.id} · {line}")
    yield from (f"  {part.text(each, part.LONG)}" for _, each in said)
    if value.error:
        yield f"  {part.text(value.error)}"
    for wait in value.waiting_on:
        yield f"  waits for {part.text(' · '.join(_wait_words(wait)))}"


def running(ex: Watched) -> Iterator[str]:
    """The card of a run while it executes."""
    now, totals, state = ex.clock(), ex.totals, ex.state
    took = part.span("dim", words(time.time() - ex.began))
    yield part.head(part.status(state), part.title(ex.workflow), part.code(ex.run_id, 80), "", took)
    yield part.dim(progress(ex))
    yield from _waits(list(ex.open.values()), here=True)
    yield part.waterfall(list(ex.bars.values()), now, None, ex.dropped)
    yield from notes(list(ex.notes))
    if totals.doubts:
        yield part.dim(f"{totals.doubts} in doubt before")


def progress(ex: Watched) -> str:
    """How far a run has come, in one line."""
    totals = ex.totals
    done = f"{totals.replayed} replayed, {totals.ran} run" + (f", {totals.failed} failed" if totals.failed else "")
    return f"{done} · paid {money(totals.paid)}, saved {money(totals.saved)}"


def notes(said: Sequence[tuple[str, str]]) -> Iterator[str]:
    """What was said of a run while it executed."""
    for level, each in said:
        first, _, rest = each.partition("\n")
        mark = "⚠ " if level == "warning" else "· "
        yield f'<div class="af-{"warn" if level == "warning" else "dim"}">{mark}{part.line(first, 400)}</div>'
        yield part.diff(rest)


def took(value: Run) -> str:
    begun = f"{value.started_at:%Y-%m-%d %H:%M:%S} UTC"
    if value.completed_at is None:
        return part.span("dim", begun)
    return part.span("dim", f"{begun} · {words((value.completed_at - value.started_at).total_seconds())}")


def _trouble(value: Run) -> Iterator[str]:
    """What went wrong, in which step, and what to do."""
    document = value._document
    step = (document.get("error_step") or {}).get("step")
    what = ""
    if value.status == "failed" and document.get("compensated"):
        what = "Its steps were undone, and nothing is repeated. A new run: .options(fresh=True)."
    elif value.status == "failed":
        again = f"; {step} is tried again" if step else ""
        what = f"Mend it and run it again: what is finished is replayed{again}."
    elif value.status == "interrupted":
        what = "Run it again, and it goes on where it was."
    elif value.status == "cancelled":
        what = "It was cancelled. A new run: .options(fresh=True)."
    if not what and not value.error:
        return
    error = ""
    if value.error:
        where = f"<b>{part.line(step, 80)}</b> · " if step else ""
        error = f'<div class="af-failed">{where}{part.safe(value.error, 1000)}</div>'
    yield f'<div class="af-box">{error}{part.line(what)}</div>'


def _waits(waiting_on: Sequence[dict[str, Any]], *, here: bool = False) -> Iterator[str]:
    """What a run waits for, and what to type. ``here``: it is waiting in this process."""
    shown = 0
    for wait in waiting_on:
        asked = None
        if wait["kind"] == "task" and (shown := shown + 1) <= _TASKS:
            asked = _asked(wait["id"])
        if asked is not None:
            yield f'<div class="af-box">{"".join(task(asked, inner=True))}</div>'
        else:
            yield f'<div class="af-box">waits for {part.line(" · ".join(_wait_words(wait)))}</div>'
    if waiting_on and not here:
        yield part.dim("Afterwards run it again: it goes on from there.")


def _asked(ident: str) -> HumanTask | None:
    try:
        return tasks.get(ident)
    except TaskNotFound:  # of a run in another journal than the one that is open here
        return None


def _wait_words(wait: dict[str, Any]) -> Iterator[str]:
    if wait["kind"] == "batch":
        yield f"batch {wait['id'] or '(not handed over yet)'} of {wait['requests']} requests to {wait['model']}"
        yield str(wait["status"])
        return
    yield f"{wait['kind']} {wait.get('title') or wait.get('type') or wait.get('name') or ''}".strip()
    if (end := wait.get("until") or wait.get("deadline")) is not None:
        yield f"until {moment(end):%Y-%m-%d %H:%M:%S} UTC"
    if wait.get("command"):
        yield str(wait["command"])


def bars_of(value: Run) -> list[Bar]:
    """The recorded steps of a run for its waterfall. Their outputs are not read, but for the tokens of model calls."""
    journal, base = value._journal, in_key(value.id)
    depths: dict[str, int] = {}
    found = []
    for row in rundocs.rows(journal, value.id, undone=True):
        head = row.head
        depth = depths.get(head["scope"], 0 if head.get("parent") else -1) + 1
        depths[head["occ"]] = depth
        if head["kind"] == "value":
            continue
        bar = Bar(head["name"], "undone" if row.undone else head["status"], depth, head["t0"], head["t1"])
        bar.attempts, bar.model, bar.waits = head["attempts"], head.get("model"), head["kind"] in WAITS
        bar.cost = None if head.get("cost") is None or head.get("unpriced") else Decimal(head["cost"])
        if head["status"] == "failed":
            bar.error = f"{head['error']['name']}: {head['error']['message']}"
        elif head["kind"] in ("ai", "agent") and not head.get("secret"):
            answer = orjson.loads(row.output)
            if isinstance(answer, dict):  # and not the vectors of an embedding
                bar.tokens = answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"]
        bar.cut = _failures(journal, f"a/{base}/{head['occ']}.") if bar.attempts > 1 else []
        found.append(bar)
    return found


def bar_words(bar: Bar) -> str:
    """A step in one line of words."""
    return part.text(" · ".join((bar.name, *bar.facts)))


def step_words(record: StepRecord) -> str:
    """A recorded step in one line of words."""
    return bar_words(bar_of(record))


def bar_of(record: StepRecord, depth: int = 0) -> Bar:
    """A recorded step as a line of a waterfall."""
    start, end = record.started_at, record.completed_at
    return Bar(
        record.name,
        record.status,
        depth,
        None if start is None else start.timestamp(),
        None if end is None else end.timestamp(),
        record.attempts,
        "replayed" if record.replayed else "",
        record.cost,
        record.model,
        0 if record.usage is None else record.usage.input_tokens + record.usage.output_tokens,
        record.error,
        waits=record.kind in WAITS,
    )


def _failures(journal: Journal, prefix: str) -> list[tuple[float, str]]:
    """When and why earlier attempts of a step failed."""
    facts = [orjson.loads(row) for _, row in journal.scan(prefix, limit=20)]
    return [(fact["t1"], f"{fact['error']['name']}: {fact['error']['message']}") for fact in facts]


def task(value: HumanTask, *, inner: bool = False) -> Iterator[str]:
    """What a person is asked, what was decided, and what to type. ``inner``: as a part of another card."""
    due = "" if value.deadline is None else part.span("dim", f"until {value.deadline:%Y-%m-%d %H:%M:%S} UTC")
    who = part.span("dim", f"for {names_of(value)}")
    yield part.head(part.status(value.status), part.title(value.title or value.type), part.code(value.id), who, "", due)
    if not inner:
        yield part.dim(f"asked by {value.run_id}")
    yield part.value("data", value.data, opened=True)
    if value.decision is not None:
        by = f"by {value.decision.by or 'somebody'}" + _when(value.decision.at)
        yield part.dim(" · ".join(word for word in (by, value.decision.comment) if word))
        yield part.value("answer", value.decision.data)
    if value.status == "open":
        yield "".join(f"<div>{part.code(line)}</div>" for line in answers(value))


def answers(value: HumanTask) -> list[str]:
    """What to type to answer a task: in a cell, and in a terminal."""
    command = human.command(value.id, value.schema, value.type)
    if command.startswith("agentflow tasks approve"):
        return [f'tasks.approve("{value.id}", by="...", comment="...")   # or tasks.reject', command]
    return [f'tasks.answer("{value.id}", ..., by="...")   # or tasks.reject', command]


def names_of(value: HumanTask) -> str:
    names = [value.assign_to] if isinstance(value.assign_to, str) else value.assign_to
    return ", ".join(names or ()) or "anybody"


def _when(at: datetime | None) -> str:
    return "" if at is None else f", {at:%Y-%m-%d %H:%M:%S} UTC"
