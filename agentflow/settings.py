"""What ``configure`` sets for this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from agentflow.errors import UsageError
from agentflow.pgurl import Place, PostgresURL, place
from agentflow.voice import log as log


class Settings:
    """The values ``configure`` has set; None means the default."""

    __slots__ = (
        "ask", "authorize", "budget", "clock", "looking", "model", "notify", "path", "progress", "trace_content",
        "trace_replayed", "tracing",
    )  # fmt: skip

    def __init__(self) -> None:
        self.path: Place | None = None
        self.model: str | None = None
        self.notify: Callable[[Any], object] | None = None
        self.authorize: Callable[[Any, str | None], bool] | None = None
        self.ask = True
        self.progress = True
        self.clock: Callable[[], float] | None = None
        self.budget: Any = None  # a budgets.Period
        self.tracing: bool | None = None
        self.trace_content: bool | None = None
        self.trace_replayed = False
        self.looking = False  # a command imports the user's module to look at it: nothing may be run


def only_looking() -> None:
    """Refuses what would run or pay while a module is imported only to be looked at.

    Raises:
        UsageError: it is.
    """
    if settings.looking:
        raise UsageError(
            "a step or a run was started while the module was imported only to be looked at. Put what starts it "
            'below if __name__ == "__main__". Nothing was run.'
        )


settings = Settings()

_UNSET: Any = object()


def now() -> float:
    """Seconds since 1970, as recorded instants are compared with: the wall's clock, or a test's."""
    return settings.clock() if settings.clock else time.time()


def configure(
    *,
    path: str | os.PathLike[str] | PostgresURL | None = _UNSET,
    model: str | None = _UNSET,
    notify: Callable[[Any], object] | None = _UNSET,
    authorize: Callable[[Any, str | None], bool] | None = _UNSET,
    redact: Any = _UNSET,
    budget: str | None = _UNSET,
    limits: Mapping[str, Any] | None = _UNSET,
    quiet: bool = _UNSET,
    ask: bool | None = _UNSET,
    tracing: bool | None = _UNSET,
    trace_content: bool | None = _UNSET,
    trace_replayed: bool | None = _UNSET,
    progress: bool | None = _UNSET,
) -> None:
    """Set defaults for this process. What is not named stays as it is; None restores the default.

    Args:
        path: the journal's directory, or a database that several machines share: ``"postgresql://user@host/db"``,
            with ``?schema=`` for another schema than ``agentflow``. Default: ``AGENTFLOW_PATH``, else ``.agentflow`` at
            the project root.
        model: the model of calls that name none, such as ``"openai:gpt-4o-mini"``. Default: ``AGENTFLOW_MODEL``.
        notify: called with a ``HumanTask`` that is new, or of which people are reminded; its ``event`` says which.
        authorize: called with a task and the name given as ``by``; False refuses the answer.
        redact: patterns (or a function of text) masked in everything that leaves the journal, besides known keys.
        budget: dollars that all model calls in the journal may cost within a period, scratch included: "5/day", or
            per hour, week (from Monday) or month, by UTC. A call that could go beyond it is not sent: BudgetExceeded.
        limits: what models allow in this process, ``{"openai:gpt-4o-mini": {"concurrency": 8, "rpm": 500, "tpm":
            200_000}, "anthropic:*": {"concurrency": 4}}``: requests at once, requests and tokens within any sixty
            seconds, for each model that is named so. Calls beyond wait, first come, first served, and a Retry-After
            of the provider holds up all calls of such a model.
        quiet: True says nothing on stderr; logging through ``logging.getLogger("agentflow")`` stays.
        ask: False never asks people in the terminal. Else a run with ``options(wait=True)`` does, where stdin and
            stderr are a terminal, but in tests and notebooks. ``AGENTFLOW_ASK=0`` says the same as False.
        tracing: OpenTelemetry spans and metrics of runs. None: where the program has set a provider for them by the
            time a run starts. True: always, which loads OpenTelemetry, and with it the provider that
            ``OTEL_PYTHON_TRACER_PROVIDER`` may name. False: never.
        trace_content: whether spans hold prompts, replies, what tools, steps and runs are given and return, and the
            messages of errors, all redacted. None: as ``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`` says,
            which is no unless it is set to ``SPAN_ONLY``, ``SPAN_AND_EVENT`` or ``true``.
        trace_replayed: True makes a span for each replayed step too; else they are only counted.
        progress: False shows no card of a run while it executes in a cell of a notebook, and says on stderr what
            other programs say there. Else what stands on the card is not said on stderr as well.
            ``AGENTFLOW_PROGRESS=0`` says the same as False. Outside a kernel it has no meaning.

    Raises:
        UsageError: a value of the wrong kind; ``tracing=True`` without the package ``opentelemetry-api``.
    """
    if path is not _UNSET:
        settings.path = None if path is None else place(path)
    if model is not _UNSET:
        if model is not None:
            if not isinstance(model, str):
                raise UsageError(f'configure(model={model!r}): a text such as "openai:gpt-4o-mini".')
            from agentflow.providers import resolve

            resolve(model)
        settings.model = model
        from agentflow.providers import set_default_model

        set_default_model(model)
    for name, value in (("notify", notify), ("authorize", authorize)):
        if value is not _UNSET:
            if value is not None and not callable(value):
                raise UsageError(f"configure({name}={value!r}): a function, or None.")
            setattr(settings, name, value)
    if budget is not _UNSET:
        from agentflow.budgets import period

        settings.budget = None if budget is None else period(budget)
    if limits is not _UNSET:
        from agentflow.limits import parsed, set_limits

        set_limits({} if limits is None else parsed(limits))
    if redact is not _UNSET:
        from agentflow.redact import set_extra

        set_extra(redact if redact is not None else ())
    if quiet is not _UNSET:
        log.quiet = bool(quiet)
    if ask is not _UNSET:
        settings.ask = ask is None or bool(ask)
    if progress is not _UNSET:
        settings.progress = progress is None or bool(progress)
    for name, wanted in (("tracing", tracing), ("trace_content", trace_content), ("trace_replayed", trace_replayed)):
        if wanted is not _UNSET:
            if wanted is not None and not isinstance(wanted, bool):
                raise UsageError(f"configure({name}={wanted!r}): True, False, or None for the default.")
            if name == "tracing" and wanted:
                _find_opentelemetry()
            setattr(settings, name, bool(wanted) if name == "trace_replayed" else wanted)


def _find_opentelemetry() -> None:
    from importlib.util import find_spec

    try:
        found = find_spec("opentelemetry.trace") is not None
    except ModuleNotFoundError:  # there is nothing of it at all
        found = False
    if not found:
        raise UsageError(
            "configure(tracing=True) needs the package opentelemetry-api: install agentflow with its extra otel, "
            'pip install ".[otel]" in a checkout. What collects the spans is yours to choose.'
        )
