"""OpenTelemetry: spans and metrics of runs, steps, tools and model calls.

What it follows
---------------
The GenAI semantic conventions, version 0.1.0, https://github.com/open-telemetry/semantic-conventions-genai/tree/v0.1.0
(``docs/gen-ai/client-inference.md``, ``client-embeddings.md``, ``execute-tool.md``, ``gen-ai-agent-spans.md``,
``gen-ai-token-metrics.md``): the first release since they left
https://github.com/open-telemetry/semantic-conventions/blob/v1.41.0/docs/gen-ai, whose names still hold where 0.1.0 has
not replaced them. All of them are in development and may change. Of 0.1.0 alone are ``gen_ai.agent.name`` on workflows
(before: ``gen_ai.workflow.name``), ``gen_ai.usage.cache_write.input_tokens`` (``cache_creation``),
``gen_ai.request.reasoning.level`` and the metrics.

When a run is traced
--------------------
Decided when it starts: if the program has loaded OpenTelemetry's API and set a tracer or meter provider, in code,
before or after ``import agentflow``, or through ``opentelemetry-instrument``. ``configure(tracing=True)`` traces always
and ``False`` never. Without a provider nothing is imported and nothing is done. A step outside workflows is traced by
itself. The SDK of Anthropic makes spans of its own; it makes none for a request that has one here, so that no token is
counted twice.

Spans
-----
============================  ========  =========================================================================
name                          kind      of what
============================  ========  =========================================================================
``invoke_workflow {name}``    INTERNAL  one execution of a run: each restart, resume or replay is one, with a link
                                        to the one before
``step {name}``               INTERNAL  a step that has no record yet: all its attempts and the pauses between
                                        them. A failed attempt is an event ``agentflow.attempt.failed``
``invoke_agent {name}``       INTERNAL  a call with tools, around its turns (steps ``turn 1``...) and tools
``execute_tool {tool}``       INTERNAL  one call of a tool
``human_task {type}``,        INTERNAL  a wait, as long as this execution waits
``event {name}``, ``sleep {length}``
``chat {model}``,             CLIENT    one request to a model, with its reply: from the moment it is sent (not
``embeddings {model}``                  while it waits for a limit or a budget) until the reply is recorded
============================  ========  =========================================================================

A *replayed* step makes no span: the run's span counts them, so that a run of ten thousand replayed steps is one span.
``configure(trace_replayed=True)`` makes one for each, of no duration, with ``agentflow.replayed``. What ``ctx.now()``,
``ctx.uuid4()`` and ``ctx.random()`` record makes none.

*Retries* of a model call are attempts of its step: each has a request span of its own, with its own error, tokens and
price; the step's span covers them all. A question about a reply that did not validate is one more request in the same
attempt.

*In the background* (``background=True``) the request's span covers what this process sees of the call: from the
submission, or in a process that takes a call up from the moment it does (``agentflow.taken_up``), to the reply.
*In a batch*, whose one POST is many calls, a span ``chat {model}`` stands for each call in the execution that gets its
reply, from the moment it began to wait (``agentflow.batch.id``); its tokens are counted, its duration is not.

*Context* is the process's own: spans are children of the span that was current where the run or step was started, and
are current themselves in the code inside, also in threads and branches, so that instrumentations of HTTP clients and
databases nest. A process that is killed never ends its spans, and exports none of those that were open.

Attributes of ours
------------------
On all spans of a run: ``agentflow.run.id`` and ``agentflow.workflow`` (text).

On runs: ``agentflow.execution`` (int, 1 for the first), ``agentflow.resumed`` (bool: there was one before),
``agentflow.run.status`` (``completed``, ``failed``, ``cancelled``, ``waiting``, ``interrupted``),
``agentflow.steps.replayed``, ``agentflow.steps.run``, ``agentflow.steps.failed`` (ints, steps of the body),
``agentflow.in_doubt`` (int: steps that had been in flight when a process ended), ``agentflow.cost.paid`` and
``agentflow.cost.saved`` (double, dollars, of this execution). A run that waits has an event ``agentflow.waiting`` for
each thing it waits for, with ``agentflow.wait.kind`` (``task``, ``event``, ``sleep``, ``batch``) and
``agentflow.wait.id``.

On steps: ``agentflow.step.name`` (of a human task its type: the title is content), ``agentflow.step.kind`` (``step``,
``ai``, ``agent``, ``tool``, ``human``, ``event``, ``sleep``, ``compensation``), ``agentflow.step.id``,
``agentflow.step.status`` (``completed``, ``failed``, ``waiting``, ``cancelled``), ``agentflow.attempt`` (int: the last
one, counted over all processes), ``agentflow.idempotency_key`` (of a human task only with content, being made of the
title), ``agentflow.replayed`` (bool), ``agentflow.cost`` (double, dollars that its result rests on, paid now or before)
and ``agentflow.in_doubt`` (int, if not 0).

On requests: ``agentflow.step.name``, ``agentflow.attempt``, ``agentflow.cost`` (double, dollars; absent where no price
is known), ``agentflow.request.id`` (the provider's), ``agentflow.background`` (bool), ``agentflow.taken_up`` (bool),
``agentflow.batch.id``.

``error.type`` is on what failed. On requests: the provider's error code, else the status, else ``timeout``,
``connection_error`` and the other codes of ``ModelError``, ``cancelled``, or the exception's name; elsewhere the name
of the exception.

Content
-------
Prompts, replies, what tools, steps and runs are given and return, and the messages of errors are left out, unless
``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`` is ``SPAN_ONLY`` or ``SPAN_AND_EVENT`` (the values of
``opentelemetry-util-genai``; ``true`` means the first) or ``configure(trace_content=True)`` says so. Then requests have
``gen_ai.system_instructions``, ``gen_ai.input.messages``, ``gen_ai.output.messages`` and ``gen_ai.tool.definitions``,
tools ``gen_ai.tool.call.arguments`` and ``gen_ai.tool.call.result``, other steps ``agentflow.step.input`` and
``agentflow.step.output``, runs ``agentflow.run.input`` and ``agentflow.run.output``: JSON text, files as digests.

All of it is redacted as ``configure(redact=)`` and the known patterns say; so are names, ids and keys of steps, always.
Nothing of a step with ``secret=True`` or of what is inside it is ever shown, nor what errors say once such a step has
failed. Events of the logs signal (``EVENT_ONLY``) are not made.

Metrics
-------
``gen_ai.client.inference.duration``, ``gen_ai.client.inference.time_to_first_chunk`` (where somebody listens),
``gen_ai.client.embeddings.duration``, ``gen_ai.invoke_agent.duration`` (workflows and agents),
``gen_ai.execute_tool.duration`` (histograms, s); ``gen_ai.client.inference.usage.input_tokens``,
``.output_tokens``, ``.cache_read.input_tokens``, ``.cache_write.input_tokens`` and ``.reasoning.output_tokens``
(counters), ``gen_ai.client.inference.operation.input_tokens`` and ``.output_tokens``,
``gen_ai.client.embeddings.operation.input_tokens`` (histograms). Replays count nothing.
0.1.0 has put these in the place of ``gen_ai.client.token.usage`` and ``gen_ai.client.operation.duration``, which are
not reported.
"""

from __future__ import annotations

from typing import Any

from opentelemetry import metrics, trace

from agentflow.otel.meters import Meters
from agentflow.otel.spans import Trace

SCOPE = "agentflow"
_made: tuple[Any, Any, trace.Tracer, Meters] | None = None


def trace_of_a_run(*, always: bool) -> Trace | None:
    """What observes the next run; None where the program has set no provider, unless it is to be observed always."""
    global _made
    spans, measures = trace.get_tracer_provider(), metrics.get_meter_provider()
    if not always and _does_nothing(spans) and _does_nothing(measures):
        return None
    if _made is None or _made[0] is not spans or _made[1] is not measures:
        tracer = trace.get_tracer(SCOPE, tracer_provider=spans)
        _made = (spans, measures, tracer, Meters(metrics.get_meter(SCOPE, meter_provider=measures)))
    return Trace(_made[2], _made[3])


def _does_nothing(provider: Any) -> bool:
    """Whether it stands for a provider that was never set, or for none. That of meters has no public name."""
    return type(provider).__name__ in (
        "ProxyTracerProvider", "NoOpTracerProvider", "_ProxyMeterProvider", "NoOpMeterProvider",
    )  # fmt: skip
