"""What a trace holds: spans collected in memory, read as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentflow import observers
from agentflow.otel.meters import Meters
from agentflow.otel.spans import Trace


class Traced:
    """The spans and metrics that runs have made so far."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self.reader])
        self.tracer = self.provider.get_tracer("test")

    def add(self, processor: SpanProcessor) -> None:
        self.provider.add_span_processor(processor)

    def source(self) -> Trace:
        return Trace(self.tracer, Meters(self.meter_provider.get_meter("test")))

    @property
    def spans(self) -> list[ReadableSpan]:
        """In the order in which they began."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        found = self.named(name)
        assert len(found) == 1, f"{len(found)} spans {name!r}; there are:\n{self.tree()}"
        return found[0]

    def parent(self, span: ReadableSpan) -> ReadableSpan | None:
        return next((one for one in self.spans if span.parent and one.context.span_id == span.parent.span_id), None)

    def path(self, span: ReadableSpan) -> list[str]:
        """Names from the outermost span to this one."""
        above = self.parent(span)
        return [*(self.path(above) if above else []), span.name]

    def tree(self) -> str:
        return "\n".join("  " * (len(self.path(span)) - 1) + span.name for span in self.spans)

    def everything(self) -> str:
        """All that the spans say, as one text."""
        said = [(span.name, dict(span.attributes or {}), span.status.description) for span in self.spans]
        events = [(event.name, dict(event.attributes or {})) for span in self.spans for event in span.events]
        return repr((said, events, self.points()))

    def points(self) -> dict[str, list[Any]]:
        """The points of each metric."""
        data = self.reader.get_metrics_data()
        found: dict[str, list[Any]] = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    found.setdefault(metric.name, []).extend(metric.data.data_points)
        return found

    def close(self) -> None:
        self.provider.shutdown()
        self.meter_provider.shutdown()


@contextmanager
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    """Traces every run of this process, without providers that are the whole process's."""
    made = Traced()
    monkeypatch.setattr(observers, "sources", [made.source])
    yield made
    made.close()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})
