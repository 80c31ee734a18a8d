"""Where two runs part: the first step that differs, what it was given and gave in each, and what they cost."""

from __future__ import annotations

import difflib
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import orjson

from agentflow import codec, rundocs
from agentflow.compare import differences, unified
from agentflow.index import Row
from agentflow.journal import Journal
from agentflow.records import money
from agentflow.redact import redact, redact_value
from agentflow.shown import json_text

WIDTH = 80
_MOST_LINES = 40


@dataclass(frozen=True, slots=True)
class StepDifference:
    """One step that is not the same in both runs.

    Attributes:
        name: the step's name.
        state: ``"changed"``, ``"only in left"`` or ``"only in right"``.
        what: of ``"given"``, ``"prompt"``, ``"output"``, ``"status"`` and ``"model"`` those that differ.
        given: how what it was given differs (for a model call: the prompt), for people; "" when it does not.
        output: how what came of it differs.
        left_cost, right_cost: dollars of its model calls, None without any.
    """

    name: str
    state: str
    what: tuple[str, ...] = ()
    given: str = ""
    output: str = ""
    left_cost: Decimal | None = None
    right_cost: Decimal | None = None


@dataclass(frozen=True, slots=True)
class RunDiff:
    """How one run (left) differs from another (right). True when they differ; ``str`` of it is for people.

    Attributes:
        left, right: the ids.
        first: the first step that differs, None when all are the same.
        steps: all that differ, in the order of the left run.
        same: how many steps are the same.
        input: how the inputs differ, "" when they do not.
        output: how the outputs or errors differ.
        left_cost, right_cost: dollars paid in each run.
    """

    left: str
    right: str
    first: StepDifference | None
    steps: list[StepDifference]
    same: int
    input: str
    output: str
    left_cost: Decimal
    right_cost: Decimal

    @property
    def cost(self) -> Decimal:
        """Dollars that the right run paid more than the left one."""
        return self.right_cost - self.left_cost

    def __bool__(self) -> bool:
        return bool(self.steps or self.input or self.output)

    def __str__(self) -> str:
        return "\n".join(line for text in self._lines() for line in _wrapped(text))

    def _lines(self) -> Iterator[str]:
        yield redact(f"{self.left} -> {self.right}")
        first = "no step differs" if self.first is None else f"first difference: {redact(self.first.name)}"
        yield f"{first} · {self.same} {'step is' if self.same == 1 else 'steps are'} the same"
        yield from _block("input", self.input)
        for step in self.steps:
            yield ""
            what = f" · {', '.join(step.what)}" if step.what else ""
            cost = ""
            if step.state == "changed" and step.left_cost != step.right_cost:
                cost = f" · {_money(step.left_cost)} -> {_money(step.right_cost)}"
            yield f"{redact(step.name)} · {step.state}{what}{cost}"
            yield from _block("prompt" if "prompt" in step.what else "given", step.given)
            yield from _block("output", step.output)
        yield from _block("output of the run", self.output)
        yield ""
        sign = "-" if self.cost < 0 else "+"
        yield f"paid {money(self.left_cost)} -> {money(self.right_cost)} ({sign}{money(abs(self.cost))})"


def diff(journal: Journal, left: dict[str, Any], right: dict[str, Any], cost: Callable[[Any], Decimal]) -> RunDiff:
    """The difference of two runs, given their documents; ``cost`` tells what one of them has paid."""
    steps: list[StepDifference] = []
    mine, others = (_tree(journal, each) for each in (left, right))
    same = _compare(mine, others, "", "", steps)
    return RunDiff(
        left=left["id"],
        right=right["id"],
        first=steps[0] if steps else None,
        steps=steps,
        same=same,
        input=_lines_between(_shown(left["input"]), _shown(right["input"])),
        output=_lines_between(_outcome(left), _outcome(right)),
        left_cost=cost(left),
        right_cost=cost(right),
    )


def _tree(journal: Journal, document: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows by the step they are inside of, without those that the run did not ask for in the end."""
    found: dict[str, list[Row]] = defaultdict(list)
    unused = set(document.get("unused", ()))
    for row in rundocs.rows(journal, document["id"], undone=True):
        if row.key.split("/", 2)[2].rpartition(".")[0] not in unused:
            found[row.head["scope"]].append(row)
    return found


def _compare(
    mine: dict[str, list[Row]], others: dict[str, list[Row]], scope: str, other: str, found: list[StepDifference]
) -> int:
    """Add what differs inside two steps that belong together; gives how many are the same."""
    same = 0
    for left, right in _paired(mine.get(scope, []), others.get(other, [])):
        if left is None or right is None:
            row = left or right
            assert row is not None
            sides = (_cost(row), None) if left is not None else (None, _cost(row))
            state = "only in left" if left is not None else "only in right"
            found.append(StepDifference(row.head["name"], state, (), "", "", *sides))
            continue
        difference = _difference(left, right)
        if difference is None:
            same += 1
        else:
            found.append(difference)
        same += _compare(mine, others, left.head["occ"], right.head["occ"], found)
    return same


def _paired(mine: list[Row], others: list[Row]) -> list[tuple[Row | None, Row | None]]:
    """Steps that belong together: equal ones first, then those that were given the same, then by name, in order."""
    left, right = list(range(len(mine))), list(range(len(others)))
    partner: dict[int, int] = {}
    keys: tuple[Callable[[Row], Any], ...] = (
        lambda row: (row.head["name"], row.head["given"], row.output),
        lambda row: (row.head["name"], row.head["given"]),
        lambda row: row.head["name"],
    )
    for key in keys:
        free: dict[Any, list[int]] = defaultdict(list)
        for at in right[::-1]:
            free[key(others[at])].append(at)
        for at in left:
            if candidates := free[key(mine[at])]:
                partner[at] = candidates.pop()
        taken = set(partner.values())
        left, right = [at for at in left if at not in partner], [at for at in right if at not in taken]
    back = {there: here for here, there in partner.items()}
    placed: list[tuple[tuple[int, int, int], Row | None, Row | None]] = []
    for at, row in enumerate(mine):
        placed.append(((at, 0, 0), row, others[partner[at]] if at in partner else None))
    before = -1
    for at, row in enumerate(others):
        if at in back:
            before = back[at]
        else:
            placed.append(((before, 1, at), None, row))
    return [(a, b) for _, a, b in sorted(placed, key=lambda each: each[0])]


def _difference(left: Row, right: Row) -> StepDifference | None:
    what = []
    given = output = ""
    if left.head["given"] != right.head["given"]:
        what.append("prompt" if left.head["kind"] == "ai" else "given")
        given = _given(left, right)
    if left.output != right.output or left.head.get("error") != right.head.get("error"):
        what.append("output")
        output = _lines_between(_result(left), _result(right))
    for name in ("status", "model"):
        if left.head.get(name) != right.head.get(name):
            what.append(name)
            output += f"{name}: {left.head.get(name)} -> {right.head.get(name)}\n"
    if not what:
        return None
    return StepDifference(
        left.head["name"], "changed", tuple(what), given, output.rstrip("\n"), _cost(left), _cost(right)
    )


def _given(left: Row, right: Row) -> str:
    if not left.given or not right.given:
        return "(too large to be kept)"
    # Masked first: what is cut to an excerpt later could hide a part of a secret from the masks.
    old, new = (orjson.dumps(redact_value(orjson.loads(row.given))).decode() for row in (left, right))
    return unified(differences(old, new)) or "(differs in what is not shown)"


def _result(row: Row) -> str:
    error = row.head.get("error")
    if error:
        return redact(f"{error['name']}: {error['message']}")
    if row.head.get("secret"):
        return "(not recorded)"
    if row.head["kind"] == "ai":
        final = codec.look(row.output)
        return redact(final["text"]) if isinstance(final, dict) and "text" in final else _shown(row.output)
    return _shown(row.output)


def _shown(text: str) -> str:
    value = codec.look(text)
    return redact(value) if isinstance(value, str) else json_text(value, indent=True)


def _outcome(document: dict[str, Any]) -> str:
    if document.get("error"):
        return redact(f"{document['error']['name']}: {document['error']['message']}")
    return _shown(document["output"]) if document.get("output") is not None else ""


def _lines_between(old: str, new: str) -> str:
    """The lines that differ, with a minus or a plus; "" for equal texts."""
    if old == new:
        return ""
    lines = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[:1] in "-+"]
    return "\n".join(lines) or "(only line breaks differ)"


def _cost(row: Row) -> Decimal | None:
    cost = row.head.get("cost")
    return None if cost is None else Decimal(cost)


def _money(cost: Decimal | None) -> str:
    return "-" if cost is None else money(cost)


def _block(title: str, text: str) -> Iterator[str]:
    if not text:
        return
    lines = text.splitlines()
    yield f"  {title}"
    yield from (f"    {line}" for line in lines[:_MOST_LINES])
    if len(lines) > _MOST_LINES:
        yield f"    … {len(lines) - _MOST_LINES} more lines"


def _wrapped(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=f"{indent}  ", break_on_hyphens=False, drop_whitespace=True,
        replace_whitespace=False,
    )  # fmt: skip
