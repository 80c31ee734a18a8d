"""The loop in which a model calls tools: every turn and every call is a record of its own.

Theory. An agent call is a step of kind "agent" around others. What it does itself is decided here from records alone,
so that after a crash it is gone through again and only what was in flight is done anew:

- *turn n* is a model call whose request holds everything before it, the provider's own items word for word;
- *a tool's call* is a step in a branch of its own, named by turn and call id, so that two equal calls are two records;
- *an approval* is a human task in front of it, for exactly this call and its arguments.

``converse`` and ``_use`` are generators without I/O: they yield steps, or several generators to be gone through at
once; a driver performs them (``perform`` on a loop, ``agentflow.sync`` in plain code).

The scope of what is inside is named by the request and not by what the tools hold, so that an edited or changed tool
finds the turns that were paid already. ``max_turns`` is in neither: more turns pay for those turns only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from agentflow import generate, providers, schema, tools
from agentflow.calls import Call, current_task, here
from agentflow.errors import (
    BudgetExceeded,
    CapturedChanged,
    IdempotencyConflict,
    JournalError,
    NondeterministicStep,
    RunBusy,
    RunCancelled,
    StepChanged,
    StepInDoubt,
    TooManyTurns,
    UsageError,
    Waiting,
)
from agentflow.fanout import parallel
from agentflow.human import human_call
from agentflow.index import short
from agentflow.models import Usage
from agentflow.records import Decision
from agentflow.redact import redact
from agentflow.steps import make_call

Script = Generator[Any, Any, Any]

# These say that the program or its journal is not as it should be: for its author, not for the model.
_FOR_THE_CALLER = (
    JournalError, RunCancelled, BudgetExceeded, RunBusy, Waiting, UsageError, StepInDoubt, StepChanged,
    CapturedChanged, NondeterministicStep, IdempotencyConflict,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Branches:
    """Scripts to be gone through at once, each in a branch of that name."""

    scripts: dict[str, Script]


class Agent:
    """One agent call. ``ask`` makes the model call of one turn: of its request, under its name."""

    def __init__(
        self, prepared: generate.Call, ask: Callable[[generate.Call], Call], driver: Callable[[Script], Any]
    ) -> None:
        self.prepared = prepared
        self.ask = ask
        self.driver = driver
        self.ran = False

    def run(self, *functions: Any) -> Any:
        """The function of the step. It is given the tools' functions so that their code counts as its code."""
        self.ran = True
        return self.driver(converse(self.prepared, self.ask))


def refuse_outside(prepared: generate.Call) -> None:
    """What only a workflow can do is refused where there is none, before anything is sent."""
    place = here.get()
    if place is not None and not place.ex.scratch:
        return
    for spec in prepared.tools:
        if spec.approval is not None:
            raise UsageError(
                f"tool {spec.name!r} needs an approval, and only a workflow can wait for one: call generate_content "
                "in a function under @workflow. Nothing was sent."
            )
        if spec.options.compensate is not None:
            raise UsageError(
                f"tool {spec.name!r}: compensate= undoes a step when its workflow fails; there is no workflow here. "
                "Nothing was sent."
            )


def converse(prepared: generate.Call, ask: Callable[[generate.Call], Call]) -> Script:
    """Turns until the model answers without asking for a tool; gives what ``generate.finish`` takes.

    Raises:
        TooManyTurns: it still asks for tools in the last turn that is allowed.
    """
    provider = providers.get(prepared.request["provider"])
    first = prepared.request["body"]
    specs = {spec.name: spec for spec in prepared.tools}
    body: dict[str, Any] = first
    added: list[dict[str, Any]] = []
    said: list[str] = []
    usage, cost, known = Usage(), Decimal(0), True
    turn = 1
    while True:
        final = yield ask(replace(prepared, request={**prepared.request, "body": body}, name=f"turn {turn}"))
        usage += Usage(**final["usage"])
        known = known and final["cost"] is not None
        cost += Decimal(final["cost"] or 0)
        added = [*added, *final["added"]]
        said += [final["text"]] if final["text"] else []
        wanted = final.get("calls", [])
        whole = {
            **final,
            "usage": {name: getattr(usage, name) for name in Usage.__slots__},
            "cost": str(cost) if known else None,
            "added": added,
            "said": said,
            "turns": turn,
        }
        if not wanted:
            return whole
        if turn >= prepared.max_turns:
            raise TooManyTurns(
                f"{prepared.name}: after {turn} turns (max_turns={prepared.max_turns}) the model still asks for tools: "
                f"{', '.join(dict.fromkeys(str(one['name']) for one in wanted))}. None of these was called. Raise "
                "max_turns=; the turns made are recorded and not paid again.",
                reply=generate.reply_of(prepared, whole),
                status=200,
                max_turns=prepared.max_turns,
            )
        labels = _labels(turn, wanted)
        results = yield Branches({label: _use(specs, label, one) for label, one in zip(labels, wanted, strict=True)})
        answers = [(one["id"], *results[label]) for label, one in zip(labels, wanted, strict=True)]
        added = [*added, *provider.tool_results(answers)]
        body = provider.next_turn(first, added)
        turn += 1


def _labels(turn: int, wanted: list[dict[str, Any]]) -> list[str]:
    """A name for each call of a turn; some servers give the same id in every turn, or none at all."""
    ids = [re.sub("[/>]", "|", str(one["id"] or "")) for one in wanted]
    return [f"{turn}:{name}" if ids.count(name) == 1 and name else f"{turn}:{name}:{at}" for at, name in enumerate(ids)]


_LETTERS = str.maketrans("0123456789abcdef", "ghijklmnopqrstuv")


def _mark(label: str) -> str:
    """What tells a call from an equal one, in letters that nobody takes for a uuid or a clock reading."""
    return short(label, 16).translate(_LETTERS)


def _use(specs: dict[str, tools.Spec], label: str, wanted: dict[str, Any]) -> Script:
    """One call of a tool: what the model is told, and whether that is a failure."""
    spec = specs.get(wanted["name"])
    if spec is None:
        return f"There is no tool named {wanted['name']!r}. There are: {', '.join(specs)}.", True
    place = here.get()
    if place is not None and place.ex.scratch:
        # There a task's branch would be named by its order of arrival, which differs from time to time.
        here.set(place.branching(label, current_task()))
    try:
        values = spec.read(wanted["arguments"])
    except schema.Mismatch as exc:
        return f"The arguments do not fit {spec.name}:\n{exc}\nCall it again with arguments that fit.", True
    mark = _mark(label)
    if spec.approval is not None:
        shown = {"tool": spec.name, "arguments": spec.shown(values)}
        asking = spec.approval
        title = asking.title or f"approve {spec.name}"
        decision = yield human_call(
            "approve", asking.who, shown, title, None, asking.timeout, asking.on_timeout, key=mark
        )
        if not decision:
            if not isinstance(decision, Decision):
                return "This call was not approved in time.", True
            comment = f": {decision.comment}" if decision.comment else "."
            return f"This call was rejected by {decision.by or 'a person'}{comment}", True
    try:
        call = make_call(spec.step, spec.fn, (), values, spec.options, "tool", also={"call": mark})
        call.tool = (spec.name, spec.description, wanted["id"])
        value = yield call
    except _FOR_THE_CALLER:
        raise
    except Exception as exc:
        name = getattr(exc, "error_type", "") or type(exc).__name__
        return redact(f"{name}: {exc}" if str(exc) else name), True
    return tools.told(spec, value), False


async def perform(script: Script) -> Any:
    """Goes through a script on the running loop."""
    send: Any = script.send
    value: Any = None
    while True:
        try:
            effect = send(value)
        except StopIteration as stop:
            return stop.value
        try:
            if isinstance(effect, Branches):
                value = await parallel({label: perform(one) for label, one in effect.scripts.items()})
            else:
                value = await effect
            send = script.send
        except BaseException as error:
            send, value = script.throw, error
