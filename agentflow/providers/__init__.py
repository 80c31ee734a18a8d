"""Which provider answers a model's name; everything else about a provider is in its own file."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any

from agentflow.errors import UnknownModel, UsageError
from agentflow.providers import registry
from agentflow.providers.common import transport, use_transport
from agentflow.providers.registry import known, register

__all__ = ["default_model", "get", "known", "register", "resolve", "set_default_model", "transport", "use_transport"]

_WELL_KNOWN = (
    (re.compile(r"(gpt-|chatgpt-|o[134](-|$)|codex-|text-embedding-)"), "openai"),
    (re.compile(r"claude-"), "anthropic"),
)
_default: str | None = None


def set_default_model(model: str | None) -> None:
    """Sets the model of calls that name none; None forgets it.

    Raises:
        UnknownModel: no provider here knows it.
    """
    global _default
    if model is not None:
        resolve(model)
    _default = model


def default_model() -> str | None:
    """The model of calls that name none: the configured one, else ``AGENTFLOW_MODEL``, else None."""
    return _default or os.environ.get("AGENTFLOW_MODEL") or None


def resolve(model: str | None) -> tuple[str, str]:
    """Provider and model name: ``"openai:gpt-5-mini"`` is ``("openai", "gpt-5-mini")``.

    Args:
        model: ``provider:name``, or the bare name of a well-known model (``gpt-…``, ``o3``,
            ``claude-…``). None stands for :func:`default_model`.

    Raises:
        UnknownModel: no model, or no provider of that name.

    >>> resolve("anthropic:claude-haiku-4-5"), resolve("gpt-5-mini")
    (('anthropic', 'claude-haiku-4-5'), ('openai', 'gpt-5-mini'))
    """
    if model is None:
        model = default_model()
    if model is None:
        raise UnknownModel(
            "No model is set, and nothing was sent. Name one in the call (generate_content(..., "
            'model="openai:gpt-5-mini")), for the program (configure(model="openai:gpt-5-mini")), or in the '
            "environment (AGENTFLOW_MODEL=openai:gpt-5-mini)."
        )
    if not isinstance(model, str):
        raise UsageError(f'model={model!r} is not text. Write model="openai:gpt-5-mini".')
    provider, colon, name = model.strip().partition(":")
    if provider in known() and name:
        return provider, name
    if provider == "ft" and name:  # fine-tuned models: ft:gpt-4o-mini:org::id
        return "openai", model.strip()
    if not colon:
        for pattern, owner in _WELL_KNOWN:
            if pattern.match(provider):
                return owner, provider
    near = difflib.get_close_matches(provider.lower(), known(), n=1, cutoff=0.7) if colon else []
    hint = f' Did you mean "{near[0]}:{name}"?' if near and name else ""
    raise UnknownModel(
        f"model={model!r}: no provider here knows it.{hint} Known providers: {', '.join(known())}; "
        'write "provider:name", such as "openai:gpt-5-mini"; agentflow.providers.register adds others. '
        "Nothing was sent."
    )


def priced_as(provider: str) -> str:
    """The name under which published prices of a provider are found, ``""`` where there are none."""
    if provider in registry.BUILT_IN:
        return provider.removesuffix("-chat")
    found = registry.find(provider)
    return (found.entry.prices or "") if found is not None else ""


def get(provider: str) -> Any:
    """A provider's module or a registered server: ``body``, ``send``, ``read``, ``messages``, ``next_turn``."""
    if provider == "openai":
        from agentflow.providers import openai

        return openai
    if provider == "openai-chat":
        from agentflow.providers import openai_chat

        return openai_chat
    if provider == "anthropic":
        from agentflow.providers import anthropic

        return anthropic
    found = registry.find(provider)
    if found is not None:
        return found
    raise UnknownModel(f"No provider is called {provider!r}. Known: {', '.join(known())}.")
