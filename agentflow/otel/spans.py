"""The spans of one run: what the engine tells its observers, as OpenTelemetry."""

from __future__ import annotations

import json
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from opentelemetry import context, trace
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agentflow.calls import Call, Current, Suspend
from agentflow.errors import RunCancelled, Waiting
from agentflow.observing import Observer
from agentflow.otel import content, genai
from agentflow.otel.meters import Meters, of_a_request
from agentflow.providers.common import Spanned, spanned
from agentflow.redact import redact
from agentflow.settings import settings

if TYPE_CHECKING:
    from agentflow.run import Execution
    from agentflow.sending import Ticket

NOTE = "trace"  # the key of a run's document under which its last execution is named
_NO_SPANS = ("value",)  # kinds of steps that make none
_w3c = TraceContextTextMapPropagator()


class _Open:
    """A span that has not ended; current in the context where it began."""

    __slots__ = (
        "_before",
        "_mark",
        "_spanned",
        "attributes",
        "current",
        "operation",
        "request",
        "since",
        "span",
        "wall",
    )

    def __init__(
        self, span: Span, operation: str | None = None, attributes: dict[str, Any] | None = None, request: bool = False
    ) -> None:
        self.span = span
        self.operation = operation
        self.attributes = attributes or {}
        self.since = time.perf_counter()
        self.wall = time.time_ns()
        self.current: Current | None = None
        self._before = context.attach(trace.set_span_in_context(span))
        self._mark = _innermost.set(self)
        self.request = Spanned() if request else None
        self._spanned = spanned.set(self.request) if request else None

    def leave(self) -> None:
        """Make the span before it current again, whatever the code inside has left behind.

        In another context, as where a coroutine is thrown away, there is nothing to do.
        """
        if _innermost.get() is not self:
            return
        _innermost.reset(self._mark)
        context.detach(self._before)
        if self._spanned is not None:
            spanned.reset(self._spanned)

    def seconds(self) -> float:
        return time.perf_counter() - self.since


_innermost: ContextVar[_Open | None] = ContextVar("agentflow_span", default=None)


class Trace(Observer):
    """Makes the spans of one run, or of one step outside workflows."""

    def __init__(self, tracer: Tracer, meters: Meters) -> None:
        self._tracer = tracer
        self._meters = meters
        self._content = content.wanted()
        self._run: Span | None = None
        self._body: _Open | None = None
        self._began = time.perf_counter()
        self._own: dict[str, Any] = {}  # on every span of the run
        self._steps: dict[Call, _Open] = {}
        self._requests: dict[Any, _Open] = {}
        self._names: dict[str, str] = {}  # as they are shown
        self._secret_failed = False  # what is raised from then on may say what a secret step has said

    def _shown(self, name: str) -> str:
        """A name, redacted. Names come again and again, and looking for secrets takes longer than making a span."""
        shown = self._names.get(name)
        if shown is None:
            if len(self._names) >= 1000:
                self._names.clear()
            shown = self._names[name] = redact(name)
        return shown

    def _key(self, current: Current) -> str:
        """The idempotency key, redacted; one that was not given by the user is made of the run's id and the name."""
        call, key = current.call, current.idempotency_key
        made = call.options.idempotency_key is None
        plain = made and self._shown(call.name) == call.name and self._shown(call.ex.run_id) == call.ex.run_id
        return key if plain else redact(key)

    # -- runs ------------------------------------------------------------------------------

    def run_started(self, document: dict[str, Any], prior: str | None) -> None:
        name = redact(document["workflow"])
        self._own = {"agentflow.run.id": redact(document["id"]), "agentflow.workflow": name}
        attributes = {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.agent.name": name,
            **self._own,
            "agentflow.execution": document["epoch"],
            "agentflow.resumed": document["epoch"] > 1,
        }
        links = []
        if (noted := document.get(NOTE)) is not None:
            before = trace.get_current_span(_w3c.extract(noted, context.Context())).get_span_context()
            links = [Link(before)] if before.is_valid else []
        self._began = time.perf_counter()
        self._run = self._tracer.start_span(f"invoke_workflow {name}", attributes=attributes, links=links)
        carrier: dict[str, str] = {}
        _w3c.inject(carrier, trace.set_span_in_context(self._run, context.Context()))
        if carrier:
            document[NOTE] = carrier

    def body_entered(self, ex: Execution) -> None:
        if self._run is not None:
            self._body = _Open(self._run)

    def body_left(self, ex: Execution) -> None:
        if self._body is not None:
            self._body.leave()

    def run_ended(self, ex: Execution, document: dict[str, Any], status: str, error: BaseException | None) -> None:
        span, self._run = self._run, None
        if span is None:
            return
        totals = ex.totals
        span.set_attributes(
            {
                "agentflow.run.status": status,
                "agentflow.steps.replayed": totals.replayed,
                "agentflow.steps.run": totals.ran,
                "agentflow.steps.failed": totals.failed,
                "agentflow.in_doubt": totals.doubts,
                "agentflow.cost.paid": float(totals.paid),
                "agentflow.cost.saved": float(totals.saved),
            }
        )
        if status == "waiting":
            for info in document.get("waiting_on", ()):
                told = {"agentflow.wait.kind": info.get("kind"), "agentflow.wait.id": info.get("id")}
                span.add_event("agentflow.waiting", {key: redact(str(said)) for key, said in told.items() if said})
        counted = {"gen_ai.operation.name": "invoke_workflow", "gen_ai.agent.name": self._own["agentflow.workflow"]}
        if status == "failed" or (status == "interrupted" and isinstance(error, Exception)):
            counted["error.type"] = self._failed(span, error, _type_of(error))
        if self._content and span.is_recording():
            span.set_attribute("agentflow.run.input", content.recorded(document["input"]))
            if status == "completed":
                span.set_attribute("agentflow.run.output", content.recorded(document["output"]))
        span.end()
        self._meters.took("invoke_workflow", time.perf_counter() - self._began, counted)

    # -- steps -----------------------------------------------------------------------------

    def step_started(self, call: Call) -> None:
        if call.kind in _NO_SPANS:
            return
        name, operation, attributes = self._step(call)
        span = self._tracer.start_span(name, attributes=attributes)
        self._steps[call] = _Open(span, operation, attributes)

    def attempt_started(self, call: Call, current: Current) -> None:
        if (opened := self._steps.get(call)) is not None:
            opened.current = current

    def attempt_failed(self, call: Call, current: Current, error: BaseException) -> None:
        opened = self._steps.get(call)
        if opened is not None and isinstance(error, Exception) and not isinstance(error, Waiting):
            told: dict[str, Any] = {"agentflow.attempt": current.attempt, "error.type": _type_of(error)}
            opened.span.add_event("agentflow.attempt.failed", told)

    def step_ended(self, call: Call, error: BaseException | None) -> None:
        opened = self._steps.pop(call, None)
        if opened is None:
            return
        opened.leave()  # first: what follows must not keep what is next in this context below this span
        span, current = opened.span, opened.current
        seconds = opened.seconds()
        counted: dict[str, Any] = {
            name: opened.attributes[name]
            for name in ("gen_ai.operation.name", "gen_ai.agent.name", "gen_ai.tool.name", "gen_ai.tool.type")
            if name in opened.attributes
        }
        if span.is_recording():
            self._tell(span, call, current, error)
        status = _status(error)
        span.set_attribute("agentflow.step.status", status)
        if error is not None and status in ("failed", "cancelled"):
            self._secret_failed = self._secret_failed or content.secret(call)
            counted["error.type"] = self._failed(span, error, _type_of(error))
        span.end()
        if opened.operation is not None and status != "waiting":
            self._meters.took(opened.operation, seconds, counted)

    def step_replayed(self, call: Call, head: dict[str, Any]) -> None:
        if head["status"] == "failed":
            self._secret_failed = self._secret_failed or content.secret(call)
        if not settings.trace_replayed or call.kind in _NO_SPANS:
            return
        name, _, attributes = self._step(call)
        told = {
            "agentflow.replayed": True,
            "agentflow.step.id": head["occ"],
            "agentflow.step.status": head["status"],
            "agentflow.attempt": head["attempts"],
        }
        if head.get("cost") is not None:
            told["agentflow.cost"] = float(head["cost"])
        span = self._tracer.start_span(name, attributes=attributes | told)
        if head["status"] == "failed":
            span.set_attribute("error.type", head["error"]["name"])
            span.set_status(StatusCode.ERROR)
        span.end()

    def _step(self, call: Call) -> tuple[str, str | None, dict[str, Any]]:
        """Name, operation and first attributes of a step's span."""
        kind = call.kind
        # The title of a task is written for a person, with what it is about in it.
        name = self._shown(call.name if kind != "human" or self._content else json.loads(call.given)["type"])
        attributes: dict[str, Any] = {
            **self._own,
            "agentflow.step.name": name,
            "agentflow.step.kind": kind,
            "agentflow.replayed": False,
        }
        operation: str | None = None
        if kind == "agent":
            operation = "invoke_agent"
            attributes |= {"gen_ai.agent.name": name, "gen_ai.request.model": call.request["model"]}
            title = f"invoke_agent {name}"
        elif kind == "tool":
            operation = "execute_tool"
            tool, description, ident = getattr(call, "tool", (call.name, "", None))
            attributes |= {"gen_ai.tool.name": self._shown(tool), "gen_ai.tool.type": "function"}
            if description:
                attributes["gen_ai.tool.description"] = self._shown(description)
            if ident:
                attributes["gen_ai.tool.call.id"] = str(ident)
            if (around := call.here.outer) is not None and around.call.kind == "agent":
                attributes["gen_ai.agent.name"] = self._shown(around.name)
            title = f"execute_tool {self._shown(tool)}"
        elif kind == "human":
            title = f"human_task {json.loads(call.given)['type']}"
        else:
            title = name if kind in ("event", "sleep") else f"step {name}"
        if operation is not None:
            attributes["gen_ai.operation.name"] = operation
        return title, operation, attributes

    def _tell(self, span: Span, call: Call, current: Current | None, error: BaseException | None) -> None:
        """What is known of a step when it has ended."""
        span.set_attribute("agentflow.step.id", call.occ)
        if current is not None:
            span.set_attribute("agentflow.attempt", current.attempt)
            if call.kind != "human" or self._content:  # made of its title
                span.set_attribute("agentflow.idempotency_key", self._key(current))
            if current.cost is not None:
                span.set_attribute("agentflow.cost", float(current.cost))
        slot = call.slot
        row = call.ex.records.row(slot, slot.n) if error is None and slot is not None and slot.n >= 0 else None
        if row is not None and (doubts := row.head.get("in_doubt")):
            span.set_attribute("agentflow.in_doubt", doubts)
        if self._content and call.kind not in ("ai", "agent") and not content.secret(call):
            tool = call.kind == "tool"
            given = "gen_ai.tool.call.arguments" if tool else "agentflow.step.input"
            if tool:
                span.set_attribute(given, content.text(call.kwargs))
            elif call.given.startswith(("{", "[")):
                span.set_attribute(given, content.recorded(call.given))
            if row is not None:
                gave = "gen_ai.tool.call.result" if tool else "agentflow.step.output"
                span.set_attribute(gave, content.recorded(row.output))

    # -- requests --------------------------------------------------------------------------

    def request_started(self, ticket: Ticket) -> None:
        kind = genai.operation(ticket.call)
        attributes = genai.asked(kind, ticket.provider, ticket.body) | self._of_request(ticket.call, ticket.current)
        if ticket.background or not ticket.sent:
            attributes["agentflow.background"] = True
        elif ticket.call.streams:
            attributes["gen_ai.request.stream"] = True
        if not ticket.sent:
            attributes["agentflow.taken_up"] = True
        span = self._tracer.start_span(f"{kind} {ticket.model}", kind=SpanKind.CLIENT, attributes=attributes)
        self._requests[ticket] = _Open(span, kind, attributes, request=True)

    def request_ended(self, ticket: Ticket, error: BaseException | None) -> None:
        opened = self._requests.pop(ticket, None)
        if opened is not None:
            opened.leave()
            self._replied(opened, ticket.call, ticket.body, ticket.record, error, timed=True)

    def reply_came(self, call: Call, current: Current, body: dict[str, Any], record: dict[str, Any]) -> None:
        step = self._steps.get(call)
        if step is None:
            return
        kind = genai.operation(call)
        attributes = genai.asked(kind, record["provider"], body) | self._of_request(call, current)
        span = self._tracer.start_span(
            f"{kind} {body['model']}",
            trace.set_span_in_context(step.span),
            SpanKind.CLIENT,
            attributes,
            start_time=step.wall,
        )
        opened = _Open(span, kind, attributes)
        opened.leave()
        self._replied(opened, call, body, record, None, timed=False)

    def _of_request(self, call: Call, current: Current) -> dict[str, Any]:
        told: dict[str, Any] = {"agentflow.step.name": self._shown(call.name), "agentflow.attempt": current.attempt}
        return self._own | told

    def _replied(
        self,
        opened: _Open,
        call: Call,
        body: dict[str, Any],
        record: dict[str, Any] | None,
        error: BaseException | None,
        *,
        timed: bool,
    ) -> None:
        span, kind, hidden = opened.span, opened.operation, content.secret(call)
        assert kind is not None
        told = dict(opened.attributes) | genai.where(record["provider"] if record else call.request["provider"])
        failed: str | None = None
        if record is not None:
            told |= genai.answered(kind, record)
            failed = genai.failed_inside(record) if kind == "chat" else None
        elif kind == "chat":
            told["gen_ai.response.finish_reasons"] = ["error"]
        if error is not None and record is None:
            failed = genai.error_type(error)
        first = None if opened.request is None else opened.request.first_chunk
        if first is not None:
            told["gen_ai.response.time_to_first_chunk"] = first - opened.since
        if failed is not None:
            told["error.type"] = self._failed(span, error, failed, hidden)
        if self._content and not hidden and kind == "chat" and span.is_recording():
            told |= content.said(body) | (content.replied(record["body"]) if record is not None else {})
        span.set_attributes(told)
        span.end()
        counted = of_a_request(told)
        if timed:
            self._meters.took(kind, opened.seconds(), counted)
        if first is not None:
            self._meters.began(first - opened.since, counted)
        self._meters.used(kind, None if record is None else record["usage"], genai.modality(body), counted)

    # -- errors ----------------------------------------------------------------------------

    def _failed(self, span: Span, error: BaseException | None, kind: str, hidden: bool = False) -> str:
        """Mark a span as failed. What an error says may hold what was said to a model, or by it."""
        span.set_attribute("error.type", kind)
        shown = self._content and not (hidden or self._secret_failed)
        said = content.message_of(error) if error is not None and shown else None
        span.set_status(StatusCode.ERROR, said)
        return kind


def _type_of(error: BaseException | None) -> str:
    """The name of an exception, of the original one where a step has failed by it."""
    if error is None:
        return "_OTHER"
    return getattr(error, "error_type", "") or type(error).__name__


def _status(error: BaseException | None) -> str:
    if error is None:
        return "completed"
    if isinstance(error, Suspend | Waiting):
        return "waiting"
    return "failed" if isinstance(error, Exception) and not isinstance(error, RunCancelled) else "cancelled"
