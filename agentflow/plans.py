"""What a plan says of a step that would run: how its request or its prompt file differs, and what it would cost."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import orjson

from agentflow import ledger, prompts, providers, sending
from agentflow.calls import Call
from agentflow.compare import differences, unified
from agentflow.index import Row
from agentflow.models import Usage
from agentflow.records import PlanStep, money
from agentflow.redact import redact, redact_value

WIDTH = 80
CHARACTERS_PER_TOKEN = 4
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_FILE = re.compile(r"sha256:[0-9a-f]{64}")


def would_run(call: Call, row: Row | None, read: dict[str, tuple[str, str]]) -> PlanStep:
    """The line of a step that has no record to reuse.

    Args:
        call: the step.
        row: the record that it has under other data or other code, None for none.
        read: of prompt files that the record had read and that were edited since, the text then and now.
    """
    asks = call.kind == "ai" and "body" in call.request
    if row is None:
        planned = PlanStep(call.name, "unknown", "not recorded yet")
        if asks:
            planned.cost, planned.tokens = sending.estimate(call.request, None)
            planned.reason += f", {planned.tokens}"
        elif call.wait is not None:
            planned.cost = Decimal(0)  # a person, an event or a time is waited for
        return planned
    if (before := _request(call, row)) is not None:
        shown = _changed_lines(_as_lines(before), _as_lines(call.request))
        reason = call.why or "its request changed"
    else:
        old, new = (_masked(text) for text in (row.given, call.given))
        shown = unified(differences(old, new)) if old and new else ""
        reason = call.why or "given other data"
    for path, (then, now) in read.items():
        changed = _changed_lines(redact(then).splitlines(), redact(now).splitlines())
        shown = "\n".join(part for part in (shown, f"{path}:", changed) if part)
    planned = PlanStep(call.name, "changed", reason, shown, _cost(call, row))
    if asks:
        planned.tokens = sending.estimate(call.request, None)[1]
    return planned


def prompts_edited(heads: dict[str, str], texts: Any) -> dict[str, tuple[str, str]]:
    """Of the prompt files that a record had read, those that say something else now: the text then and now.

    Args:
        heads: path and digest of each, as the record has them.
        texts: gives the text of a digest, or None where it is not kept.
    """
    found = {}
    for path, digest in heads.items():
        now = prompts.file_text(path)
        then = texts(digest) if prompts.digest(now or "") != digest else None
        if then is not None:
            found[path] = (then, now or "")
    return found


def total(steps: Sequence[PlanStep]) -> tuple[Decimal, int]:
    """Estimated dollars of the steps that would run, and how many more have no estimate."""
    costs = [step.cost for step in steps if step.state in ("changed", "unknown")]
    return sum((cost for cost in costs if cost is not None), Decimal(0)), sum(cost is None for cost in costs)


def render(run_id: str, steps: Sequence[PlanStep]) -> str:
    """A plan for people to read, in lines of at most 80 characters, secrets masked."""
    lines = [f"{run_id} · plan"]
    for step in steps:
        words = [f"{step.state:<8} {step.name}", step.reason]
        if step.state in ("changed", "unknown"):
            words.append(f"costs {_dollars(step.cost)}")
        first, *rest = redact(" · ".join(word for word in words if word)).splitlines()
        lines += _folded(first, "  ", "           ")
        for line in rest:
            lines += _folded(line, "           ", "           ")
        for line in step.diff.splitlines():
            sign = line.lstrip()[:1]
            lines += _folded(line, "      ", f"      {sign} " if sign in "+-" and sign else "        ")
    dollars, unknown = total(steps)
    if any(step.state in ("changed", "unknown") for step in steps):
        priced = any(step.cost is not None for step in steps if step.state in ("changed", "unknown"))
        sums = [_dollars(dollars)] if priced else []
        sums += [f"{unknown} unknown" if priced else "unknown"] if unknown else []
        lines += _folded(
            f"estimated cost of the steps shown: {' and '.join(sums)}; what follows them is not known", "  ", "  "
        )
    return "\n".join(lines)


def _dollars(cost: Decimal | None) -> str:
    """An estimate; one that rounds to nothing does not say that it is nothing."""
    if not cost:
        return "an unknown amount" if cost is None else "nothing"
    return f"about {money(cost)}" if cost >= Decimal("0.00005") else "under $0.0001"


def _characters(request: dict[str, Any]) -> int:
    body = {key: value for key, value in request["body"].items() if key != "model"}
    return len(json.dumps(body, ensure_ascii=False))


def _request(call: Call, row: Row) -> dict[str, Any] | None:
    """The recorded request of a model call; None for other steps, and for one that was too long to be kept."""
    if call.kind != "ai" or row.head["kind"] != "ai" or not row.given:
        return None
    made: dict[str, Any] = orjson.loads(row.given)
    return made


def _cost(call: Call, row: Row) -> Decimal | None:
    head = row.head
    before = _request(call, row)
    if before is not None and head["status"] == "completed":
        return _call_cost(call.request, before, orjson.loads(row.output))
    if head.get("unpriced"):
        return None
    if head.get("cost"):
        return Decimal(head["cost"])
    reaches = call.kind == "ai" or head.get("ai") or (call.code is not None and call.code.reaches_model)
    return None if reaches else Decimal(0)


def _call_cost(new: dict[str, Any], old: dict[str, Any], final: dict[str, Any]) -> Decimal | None:
    """What a changed request would cost if it were answered at the length of the recorded answer."""
    if sorted(_FILE.findall(str(new))) != sorted(_FILE.findall(str(old))):
        return None  # a file is read by its content, of which a record keeps the digest
    longer = (_characters(new) - _characters(old)) // CHARACTERS_PER_TOKEN
    used = Usage(**final["usage"])
    usage = Usage(input_tokens=max(1, used.input_tokens + longer), output_tokens=used.output_tokens)
    return ledger.price(providers.prices(new["provider"]), new["model"], usage)[0]


def _as_lines(request: dict[str, Any]) -> list[str]:
    """A request as lines of text: how it is asked, then who says what. Secrets are masked."""
    masked = redact_value(request)
    body = dict(masked["body"])
    lines = [f"model: {masked['provider']}:{masked['model']}"]
    system = body.pop("instructions", None) or body.pop("system", None)
    conversation = body.pop("input", None) or body.pop("messages", None) or []
    body.pop("model", None)
    if "sample" in masked:
        lines.append(f"sample: {masked['sample']}")
    for key in sorted(body):
        text = json.dumps(body[key], ensure_ascii=False, indent=None if len(str(body[key])) < 60 else 2)
        lines += f"{key}: {text}".splitlines()
    if system is not None:
        lines += _said("system", system)
    for message in conversation:
        who = message.get("role") or message.get("type")
        lines += _said(str(who), message.get("content", {k: v for k, v in message.items() if k != "type"}))
    return lines


def _said(who: str, content: Any) -> list[str]:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2)
    return [f"[{who}]", *text.splitlines()]


def _changed_lines(old: Sequence[str], new: Sequence[str]) -> str:
    """The lines that differ, each with what stands beside it."""
    if list(old) == list(new):
        return "(differs only where secrets are masked, or not at all)"
    lines: list[str] = []
    for line in list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]:
        if not line.startswith("@@"):
            lines.append(f"{line[0]} {line[1:]}")
        elif lines:
            lines.append("…")
    return "\n".join(lines)


def _masked(text: str) -> str:
    return orjson.dumps(redact_value(orjson.loads(text))).decode() if text else ""


def _folded(text: str, first: str, more: str) -> Iterable[str]:
    """A line cut to the width at its spaces where it has any, without what could steer a terminal."""
    text = _CONTROL.sub("�", text)
    lead = first
    while len(lead + text) > WIDTH:
        room = WIDTH - len(lead)
        at = text.rfind(" ", room // 2, room + 1)
        cut = at if at > 0 else room
        yield f"{lead}{text[:cut]}"
        text, lead = text[cut:].removeprefix(" "), more
    yield f"{lead}{text}".rstrip()
