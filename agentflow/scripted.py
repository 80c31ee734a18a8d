"""What a scripted model says, and to whom: replies by order and by condition; who used which, and what it cost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from agentflow import ledger, providers
from agentflow.errors import UsageError
from agentflow.files import shortened
from agentflow.models import Request, Usage
from agentflow.redact import redact_value

NOTHING: Any = object()
_READERS = {"responses": "openai", "chat": "openai-chat", "messages": "anthropic"}
_SHOWN = 4000


@dataclass(slots=True)
class When:
    """A reply for the requests that fit a condition. Made by ``when``."""

    condition: str | re.Pattern[str] | Callable[[Request], Any]
    reply: Any
    times: int | None
    used: int = 0

    def takes(self, asked: Request) -> bool:
        """Whether this is the reply for a request."""
        if self.times is not None and self.used >= self.times:
            return False
        if isinstance(self.condition, str):
            return self.condition in asked["text"]
        if isinstance(self.condition, re.Pattern):
            return self.condition.search(asked["text"]) is not None
        return bool(self.condition(asked))

    def __str__(self) -> str:
        least = 1 if self.times is None else self.times
        left = f" ({self.used} of {least} times used)" if least > 1 else ""
        return f"when({self.condition!r}, {str(self.reply)[:80]!r}){left}"


def when(condition: str | re.Pattern[str] | Callable[[Request], Any], reply: Any, *, times: int | None = 1) -> When:
    """A reply of a ``FakeModel`` for certain requests, whenever they come: ``when("Rome", "Lazio")``.

    Args:
        condition: text or a regular expression that the last user message holds, or a function of the request.
        reply: as in ``FakeModel``.
        times: for so many requests. None: for all of them, one at least.
    """
    if not (isinstance(condition, str | re.Pattern) or callable(condition)):
        raise UsageError(f"when({condition!r}, ...): a text, a regular expression or a function of the request.")
    if times is not None and (isinstance(times, bool) or not isinstance(times, int) or times < 1):
        raise UsageError(f"when(..., times={times!r}): 1 or more, or None for any number.")
    return When(condition, reply, times)


class Script:
    """Replies in stock. Conditions are tried first, in the order they were given; then comes the next reply.

    Attributes:
        count: how many replies were given; None for a function, which has any number.
    """

    def __init__(self, replies: Any) -> None:
        self.count: int | None = None if callable(replies) else len(replies)
        self._function = replies if callable(replies) else None
        if isinstance(replies, Mapping):
            replies = [when(condition, reply, times=None) for condition, reply in replies.items()]
        # Each use of a script counts by itself, also where one list of when(...) serves several.
        listed = [] if self._function else replies
        self._rules = [when(one.condition, one.reply, times=one.times) for one in listed if isinstance(one, When)]
        self._plain = [one for one in listed if not isinstance(one, When)]
        self._next = 0

    def take(self, asked: Request) -> Any:
        """The reply for a request, used up with this; ``NOTHING`` where there is none."""
        if self._function is not None:
            return self._function
        for rule in self._rules:
            if rule.takes(asked):
                rule.used += 1
                return rule.reply
        if self._next >= len(self._plain):
            return NOTHING
        self._next += 1
        return self._plain[self._next - 1]

    def unused(self) -> list[str]:
        """The replies that nobody asked for, in words."""
        rules = [str(rule) for rule in self._rules if rule.used < (rule.times or 1)]
        return [*rules, *(repr(one)[:120] for one in self._plain[self._next :])]


@dataclass(frozen=True, slots=True)
class Billed:
    """One call that a provider would have charged for. ``cost``: dollars, None where no price is known."""

    request: Request
    usage: Usage
    cost: Decimal | None


def bill(asked: Request) -> Billed | None:
    """What an answered call would have cost; None where nothing was charged."""
    reply = asked.get("reply")
    if asked.get("status") != 200 or not isinstance(reply, dict):
        return None
    own = _READERS[asked["surface"]]
    parts = providers.get(own).read(reply)
    model = parts.model or asked["model"]
    return Billed(asked, parts.usage, ledger.price(own, model, parts.usage, asked=asked["model"])[0])


def shown(asked: Request) -> str:
    """A request for people: secrets masked, files as digests, not longer than a screen or two."""
    text = json.dumps(redact_value(shortened(asked["body"])), indent=2, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}\n... ({len(text)} characters)"
