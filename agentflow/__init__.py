"""Durable AI workflows from plain Python functions.

Finished steps and paid model calls are recorded in files beside the project: a crash, a kernel restart or
a second run never pays for the same answer twice, and an edited prompt runs again only what it changed.

    from agentflow import workflow, step, generate_content
"""

from __future__ import annotations

from agentflow import errors, runs, tasks
from agentflow.aicall import generate_content
from agentflow.calls import current_step
from agentflow.codec import register_type
from agentflow.context import Context
from agentflow.errors import *  # noqa: F403
from agentflow.flow import Workflow, workflow
from agentflow.handles import Plan, Run
from agentflow.humantask import human_task
from agentflow.models import Reply
from agentflow.prompts import Prompt, load_prompt
from agentflow.records import Decision, HumanTask, Retry, StepRecord
from agentflow.settings import configure
from agentflow.steps import parallel, step

generateContent = generate_content
humanTask = human_task

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Decision",
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
    "errors",
    "generateContent",
    "generate_content",
    "humanTask",
    "human_task",
    "load_prompt",
    "parallel",
    "register_type",
    "runs",
    "step",
    "tasks",
    "workflow",
    *errors.__all__,
]
