"""Model calls and human tasks of plain code."""

from __future__ import annotations

import functools
from typing import Any

from agentflow import agent, aicall, embeddings, human
from agentflow.blocking import drive_blocking
from agentflow.durations import Duration
from agentflow.records import UNSET
from agentflow.sync.fanout import parallel


def generate_content(prompt: Any, **options: Any) -> Any:
    """``agentflow.generate_content`` for plain code: returns the answer."""
    call = aicall.generate_content(prompt, **options)
    if isinstance(call, aicall.AgentCall):
        call.agent.driver = _perform
    return drive_blocking(call)


def _perform(script: agent.Script) -> Any:
    """``agent.perform`` in plain code."""
    send: Any = script.send
    value: Any = None
    while True:
        try:
            effect = send(value)
        except StopIteration as stop:
            return stop.value
        try:
            if isinstance(effect, agent.Branches):
                value = parallel({label: functools.partial(_perform, one) for label, one in effect.scripts.items()})
            else:
                value = drive_blocking(effect)
            send = script.send
        except BaseException as error:
            send, value = script.throw, error


generate_content.__agentflow_model_call__ = True  # type: ignore[attr-defined]
generateContent = generate_content


def embed(texts: Any, **options: Any) -> Any:
    """``agentflow.embed`` for plain code: returns the vectors."""
    return drive_blocking(embeddings.embed(texts, **options))


embed.__agentflow_model_call__ = True  # type: ignore[attr-defined]


def human_task(
    type: str = "approve",
    assign_to: Any = None,
    data: Any = None,
    *,
    title: str | None = None,
    schema: Any = None,
    timeout: Duration | None = None,
    on_timeout: Any = UNSET,
    remind: Duration | None = None,
) -> Any:
    """``agentflow.human_task`` for plain code."""
    return drive_blocking(human.human_call(type, assign_to, data, title, schema, timeout, on_timeout, remind))


humanTask = human_task
