"""Durable AI workflows from plain Python functions.

Finished steps and paid model calls are recorded in files beside the project: a crash, a kernel restart or
a second run never pays for the same answer twice, and an edited prompt runs again only what it changed.

    from agentflow import workflow, step, generate_content

Names are loaded from their modules when they are first used, so that importing the package costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentflow.errors import *  # noqa: F403
from agentflow.errors import __all__ as _errors

if TYPE_CHECKING:
    from agentflow import errors, providers, runs, tasks  # noqa: F401
    from agentflow.aicall import generate_content
    from agentflow.calls import current_step
    from agentflow.codec import register_type
    from agentflow.context import Context
    from agentflow.embeddings import embed
    from agentflow.events import send_event
    from agentflow.fanout import parallel
    from agentflow.flow import Workflow, workflow
    from agentflow.handles import Plan, Run
    from agentflow.humantask import human_task
    from agentflow.models import Reply
    from agentflow.prompts import Prompt, load_prompt
    from agentflow.records import Decision, Escalate, HumanTask, Retry, StepRecord
    from agentflow.settings import configure
    from agentflow.steps import step
    from agentflow.tools import tool

    generateContent = generate_content
    humanTask = human_task

__version__ = "0.1.0"

_HOME = {
    "Context": "context",
    "Decision": "records",
    "Escalate": "records",
    "HumanTask": "records",
    "Plan": "handles",
    "Prompt": "prompts",
    "Reply": "models",
    "Retry": "records",
    "Run": "handles",
    "StepRecord": "records",
    "Workflow": "flow",
    "configure": "settings",
    "current_step": "calls",
    "embed": "embeddings",
    "generateContent": "aicall",
    "generate_content": "aicall",
    "humanTask": "humantask",
    "human_task": "humantask",
    "load_prompt": "prompts",
    "parallel": "fanout",
    "register_type": "codec",
    "send_event": "events",
    "step": "steps",
    "tool": "tools",
    "workflow": "flow",
}
_MODULES = ("errors", "providers", "runs", "tasks")
_ALIASES = {"generateContent": "generate_content", "humanTask": "human_task"}

__all__ = [
    "Context",
    "Decision",
    "Escalate",
    "HumanTask",
    "Plan",
    "Prompt",
    "Reply",
    "Retry",
    "Run",
    "StepRecord",
    "Workflow",
    "configure",
    "current_step",
    "embed",
    "errors",
    "generateContent",
    "generate_content",
    "humanTask",
    "human_task",
    "load_prompt",
    "parallel",
    "register_type",
    "runs",
    "send_event",
    "step",
    "tasks",
    "tool",
    "workflow",
    *_errors,
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"agentflow.{_HOME[name]}"), _ALIASES.get(name, name))
    elif name in _MODULES:
        value = import_module(f"agentflow.{name}")
    else:
        raise AttributeError(f"module 'agentflow' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
