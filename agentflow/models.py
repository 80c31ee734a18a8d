"""What a model call is asked, what comes back, and what it used."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Generic, NotRequired, TypedDict, TypeVar

from agentflow.rich import Rich

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a call, counted alike for every provider.

    Attributes:
        input_tokens: all tokens that were read, cached ones included (Anthropic leaves those out of
            its own count; they are added here).
        output_tokens: all tokens that were written, reasoning included.
        cached_tokens: the part of ``input_tokens`` that was read from the provider's cache.
        reasoning_tokens: the part of ``output_tokens`` that was reasoning.
        cache_write_tokens: the part of ``input_tokens`` that was written to the provider's cache.
        cache_write_1h_tokens: the part of ``cache_write_tokens`` that is kept for an hour and not for minutes.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Both calls together."""
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.cache_write_1h_tokens + other.cache_write_1h_tokens,
        )


@dataclass(frozen=True, slots=True)
class Reply(Rich, Generic[T]):
    """A model's answer with everything that came with it: ``output_type=Reply`` or ``Reply[T]``.

    Attributes:
        output: the answer as the type that was asked for.
        text: the answer as the model wrote it.
        messages: the conversation so far, the system message first if there was one; the provider's
            own items stand in it word for word, so ``[*reply.messages, {"role": "user", ...}]`` can
            be the next prompt for the same provider.
        usage: tokens of all turns of this call.
        cost: dollars for all turns, None where the price is not known.
        model: the model that answered, as the provider names it.
        finish_reason: ``stop``, ``length``, ``content_filter``, ``refusal``, ``tool_calls``, or the
            provider's own word where none of these fits.
    """

    output: T
    text: str
    messages: list[dict[str, Any]]
    usage: Usage
    cost: Decimal | None
    model: str
    finish_reason: str


class Request(TypedDict):
    """One request as it was sent; what ``FakeModel`` lists and hands to a function.

    ``surface`` is ``responses``, ``chat`` or ``messages``; ``text`` is the last user message as text.
    ``status`` and ``reply`` (the provider's JSON) are there once it was answered.
    """

    provider: str
    model: str
    surface: str
    body: dict[str, Any]
    text: str
    status: NotRequired[int]
    reply: NotRequired[dict[str, Any]]


class Raw(TypedDict):
    """A reply as it is recorded, before anything validates it.

    ``body`` is the provider's JSON (text where it was none), ``usage`` the fields of :class:`Usage`,
    ``cost`` dollars as text or None for unknown, ``price`` the rates they were computed with, ``at``
    when it came (UTC, ISO 8601), ``asked`` the digest of the body it answers.
    """

    provider: str
    status: int
    body: Any
    request_id: str | None
    usage: dict[str, int]
    cost: str | None
    price: dict[str, Any]
    model: str
    at: str
    asked: str
