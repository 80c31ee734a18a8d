"""The same names for plain ``def`` code: nothing is awaited.

Steps run in the calling thread, unless they have a timeout, are async, or run in ``parallel``.

    from agentflow.sync import workflow, step

    @workflow
    def report(ctx, topic: str) -> str:
        facts = step("facts", gather_facts, topic)
        return step("write", write, facts)

    report.run("rivers")

Names are loaded from their modules when they are first used, as in ``agentflow``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentflow.blocking import drive_blocking
from agentflow.steps import entry

if TYPE_CHECKING:
    from agentflow import runs, tasks
    from agentflow.calls import current_step
    from agentflow.context import Context
    from agentflow.events import send_event
    from agentflow.handles import Run
    from agentflow.models import Reply
    from agentflow.prompts import Prompt, load_prompt
    from agentflow.records import Decision, Escalate, Retry
    from agentflow.settings import configure
    from agentflow.sync.calls import embed, generate_content, human_task
    from agentflow.sync.fanout import parallel
    from agentflow.sync.flow import Workflow, workflow
    from agentflow.tools import tool

    generateContent = generate_content
    humanTask = human_task

_HOME = {
    "Context": "context",
    "Decision": "records",
    "Escalate": "records",
    "Prompt": "prompts",
    "Reply": "models",
    "Retry": "records",
    "Run": "handles",
    "Workflow": "sync.flow",
    "configure": "settings",
    "current_step": "calls",
    "embed": "sync.calls",
    "generateContent": "sync.calls",
    "generate_content": "sync.calls",
    "humanTask": "sync.calls",
    "human_task": "sync.calls",
    "load_prompt": "prompts",
    "parallel": "sync.fanout",
    "send_event": "events",
    "tool": "tools",
    "workflow": "sync.flow",
}
_MODULES = ("runs", "tasks")


def step(name: Any = None, fn: Any = None, /, *args: Any, **options: Any) -> Any:
    """``agentflow.step`` for plain code: runs at once and returns the result."""
    return entry(name, fn, args, options, drive_blocking)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"agentflow.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"agentflow.{name}")
    else:
        raise AttributeError(f"module 'agentflow.sync' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "Context", "Decision", "Escalate", "Prompt", "Reply", "Retry", "Run", "Workflow", "configure", "current_step",
    "embed", "generateContent", "generate_content", "humanTask", "human_task", "load_prompt", "parallel", "runs",
    "send_event", "step", "tasks", "tool", "workflow",
]  # fmt: skip
