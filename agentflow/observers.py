"""Who observes a run: decided when it starts, so that it may be set up before or after ``import agentflow``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from agentflow.observing import Observer, complain, tell
from agentflow.settings import settings


def tracer() -> Observer | None:
    """The trace of a run; None where nobody collects it.

    OpenTelemetry is looked at only where the program has loaded it: nothing is imported for a program that has not.
    """
    loaded = "opentelemetry.trace" in sys.modules or "opentelemetry.metrics" in sys.modules
    if settings.tracing is False or not (settings.tracing or loaded):
        return None
    from agentflow import otel

    return otel.trace_of_a_run(always=settings.tracing is True)


# Each is asked when a run starts, and for each step outside a workflow; None listens to nothing.
sources: list[Callable[[], Observer | None]] = [tracer]


def begin(document: dict[str, Any] | None = None, prior: str | None = None) -> tuple[Observer, ...]:
    """The observers of a run that is taken up; of a step outside workflows, without a document.

    Args:
        document: the run's, about to be written.
        prior: how the last execution of the run ended; None for a new one.
    """
    found: tuple[Observer, ...] = ()
    for source in sources:
        try:
            observer = source()
        except Exception as error:
            complain(getattr(source, "__name__", "an observer"), error)
            continue
        if observer is not None:
            found = (*found, observer)
    if found and document is not None:
        taken_up = document
        tell(found, lambda each: each.run_started(taken_up, prior))
    return found
