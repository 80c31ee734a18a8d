"""The cards of agentflow's objects: HTML for notebooks, and the same in words for everything else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from agentflow import cardparts as part
from agentflow import runcards
from agentflow.context import Steps
from agentflow.errors import Waiting
from agentflow.handles import Plan, Run
from agentflow.models import Reply
from agentflow.prompts import Prompt
from agentflow.records import HumanTask, StepRecord, money
from agentflow.rich import Listed
from agentflow.runcards import ROWS, bar_of, names_of, step_words


def html(value: Any) -> str:
    """The card of one of agentflow's objects."""
    return part.card(_content(value), _kind(value))


def text(value: Any) -> str:
    """The same in words, for where no HTML is shown."""
    return "\n".join(_words(value))


def _kind(value: Any) -> str:
    return "waiting" if isinstance(value, Waiting) else str(getattr(value, "status", ""))


def _content(value: Any) -> Iterator[str]:
    if isinstance(value, Waiting):
        run = runcards.run_of(value)
        return iter([part.safe(value, 2000)]) if run is None else runcards.run(run)
    if isinstance(value, Run):
        return runcards.run(value)
    if isinstance(value, Plan):
        return _plan(value)
    if isinstance(value, HumanTask):
        return runcards.task(value)
    if isinstance(value, StepRecord):
        return _step(value)
    if isinstance(value, Steps):
        return _steps([record for name in value for record in value.all(name)], "steps so far")
    if isinstance(value, Reply):
        return _reply(value)
    if isinstance(value, Prompt):
        return _prompt(value)
    return _list(value)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Waiting):
        yield part.text(value, 2000)
    elif isinstance(value, Run):
        yield from runcards.run_words(value)
    elif isinstance(value, Plan):
        yield part.text(value, 10 * part.LONG)
    elif isinstance(value, HumanTask):
        yield part.text(f"task {value.id} · {value.status} · {value.title or value.type} · for {names_of(value)}")
        yield from _indented(part.shown_text(value.data))
        yield from (f"  {line}" for line in runcards.answers(value)) if value.status == "open" else ()
    elif isinstance(value, StepRecord):
        yield step_words(value)
        yield from _indented(part.text(value.error) if value.error else part.shown_text(value.output))
    elif isinstance(value, Steps):
        yield from (step_words(record) for name in value for record in value.all(name))
    elif isinstance(value, Reply):
        yield part.shown_text(value.output)
        yield f"({' · '.join(_reply_facts(value))})"
    elif isinstance(value, Prompt):
        yield part.text(value.text, part.LONG)
    else:
        yield from (_facts(each) for each in value[:ROWS])
        if len(value) > ROWS:
            yield f"… {len(value) - ROWS} more"
        elif not value:
            yield "none"


def _indented(of: str) -> Iterator[str]:
    return (f"  {line}" for line in of.splitlines())


# -- the other objects -----------------------------------------------------------------------


def _plan(value: Plan) -> Iterator[str]:
    total = "unknown" if value.dollars is None else money(value.dollars)
    yield part.head(part.title("plan"), part.code(value.run_id, 80), "", part.span("dim", f"estimated {total}"))
    for step in value.steps[: 4 * ROWS]:
        cost = f"costs {money(step.cost)}" if step.state in ("changed", "unknown") else ""
        facts = part.span("dim", " · ".join(fact for fact in (step.reason, cost) if fact))
        yield part.head(
            f'<span class="af-{part.word(step.state)}">● {part.line(step.name, 80)}</span>', step.state, facts
        )
        yield part.diff(step.diff)
    if len(value.steps) > 4 * ROWS:
        yield part.dim(f"… {len(value.steps) - 4 * ROWS} more steps")


def _step(value: StepRecord) -> Iterator[str]:
    facts = part.span("dim", " · ".join(bar_of(value).facts))
    yield part.head(part.status(value.status), part.title(value.name), part.code(value.id, 40), "", facts)
    if value.error:
        yield f'<div class="af-box af-failed">{part.safe(value.error, 1000)}</div>'
    yield part.value("output", value.output, opened=True)


def _steps(records: Sequence[StepRecord], what: str) -> Iterator[str]:
    yield part.dim(f"{len(records)} {what}")
    yield part.waterfall([bar_of(record, 0 if record.parent is None else 1) for record in records], time.time())


def _reply(value: Reply[Any]) -> Iterator[str]:
    yield part.head(part.title("reply"), "", part.span("dim", " · ".join(_reply_facts(value))))
    yield part.pre(part.shown_text(value.output))
    yield part.value("messages", value.messages)


def _reply_facts(value: Reply[Any]) -> list[str]:
    used = f"{value.usage.input_tokens:,} tokens in, {value.usage.output_tokens:,} out"
    return [part.text(value.model), used, money(value.cost), part.text(value.finish_reason)]


def _prompt(value: Prompt) -> Iterator[str]:
    facts = [value.path, value.model, value.output and f"output: {value.output}"]
    facts += [
        f"{name}: {got}"
        for name in ("max_tokens", "temperature", "reasoning")
        if (got := getattr(value, name)) is not None
    ]
    yield part.head(
        part.title(value.name or "prompt"), "", part.span("dim", " · ".join(fact for fact in facts if fact))
    )
    said = [("system", value.system)] if value.system else []
    said += [(turn["role"], turn["content"]) for turn in value.earlier]
    for role, content in [*said, ("user", value.text)]:
        yield f"{part.span('dim', role)}{part.pre(content)}"


def _list(values: Listed[Any]) -> Iterator[str]:
    if values and isinstance(values[0], StepRecord):
        yield from _steps(values, "steps")
        return
    what = "task" if values and isinstance(values[0], HumanTask) else "run"
    yield part.dim(f"{len(values)} {what}{'' if len(values) == 1 else 's'}" if values else "none")
    rows = [_cells(each) for each in values[:ROWS]]
    if rows:
        columns = f"repeat({len(rows[0])},fit-content(28em))"
        cells = "".join(f"<div>{cell}</div>" for row in rows for cell in row)
        yield f'<div class="af-table" style="grid-template-columns:{columns}">{cells}</div>'
    if len(values) > ROWS:
        yield part.dim(f"… {len(values) - ROWS} more")


def _cells(each: Any) -> list[str]:
    if isinstance(each, HumanTask):
        asked = part.line(each.title or each.type, 80)
        return [
            part.status(each.status),
            asked,
            part.code(each.id),
            part.dim(f"for {names_of(each)}"),
            part.code(each.run_id, 60),
        ]
    cost = f"paid {money(each.cost)} · saved {money(each.saved)}"
    return [
        part.status(each.status),
        part.line(each.workflow, 60),
        part.code(each.id, 60),
        runcards.took(each),
        part.dim(cost),
    ]


def _facts(each: Any) -> str:
    """One line of words for an item of a list."""
    if isinstance(each, Run):
        return part.text(
            f"{each.id} · {each.status} · {each.started_at:%Y-%m-%d %H:%M:%S} UTC · paid {money(each.cost)}"
        )
    if isinstance(each, HumanTask):
        return part.text(
            f"{each.id} · {each.status} · {each.title or each.type} · for {names_of(each)} · run {each.run_id}"
        )
    return step_words(each)
