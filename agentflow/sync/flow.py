"""Workflows of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentflow import flow
from agentflow.durations import Duration


class Workflow(flow.Workflow[..., Any]):
    """A workflow of a plain function; ``run`` is a plain call."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result; finished steps are replayed from their records."""
        return self.run_sync(*args, **kwargs)

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """The ``Run``, once it has finished or waits."""
        from agentflow.portal import run_coroutine

        return run_coroutine(super().start(*args, **kwargs))

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        """What ``run`` would do; writes and spends nothing."""
        return self.plan_blocking(*args, **kwargs)


def workflow(
    name: Any = None,
    *,
    execute: Any = None,
    timeout: Duration | None = None,
    budget: Any = None,
    on_change: str = "auto",
    run_id: Any = None,
    schedule: str | None = None,
    timezone: str | None = None,
    catch_up: str = "latest",
) -> Any:
    """``agentflow.workflow`` for plain ``def`` functions. After its ``timeout`` the function ends at its next step."""
    options = {"timeout": timeout, "budget": budget, "on_change": on_change, "run_id": run_id}
    options |= {"schedule": schedule, "timezone": timezone, "catch_up": catch_up}
    options |= {"blocking": True, "kind": Workflow}
    if callable(name):
        return flow.define(name, None, **options)
    if execute is not None:
        return flow.define(execute, name, **options)

    def decorate(fn: Callable[..., Any]) -> Any:
        return flow.define(fn, name, **options)

    return decorate
