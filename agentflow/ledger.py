"""What a call cost, in dollars; unknown is None and never zero."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from agentflow.errors import UsageError
from agentflow.models import Usage

_MILLION = Decimal(1_000_000)
_PRICES: dict[str, dict[str, Decimal]] = {}


def set_price(
    model: str,
    input: float | str | Decimal,
    output: float | str | Decimal,
    cached: float | str | Decimal | None = None,
    *,
    cache_write: float | str | Decimal | None = None,
    cache_write_1h: float | str | Decimal | None = None,
) -> None:
    """Sets the price of a model by name; it wins over the built-in tables.

    Args:
        model: the name, without a provider in front.
        input: dollars per million input tokens.
        output: dollars per million output tokens.
        cached: dollars per million input tokens read from the cache; None charges them as ``input``.
        cache_write: dollars per million input tokens written to the cache; None charges them as ``input``.
        cache_write_1h: the same for those kept for an hour; None charges them as ``cache_write``.

    Raises:
        UsageError: a price is negative or not a number.
    """
    rates = {"input": input, "output": output, "cached": input if cached is None else cached}
    if cache_write is not None:
        rates["cache_write"] = cache_write
    if cache_write_1h is not None:
        rates["cache_write_1h"] = cache_write_1h
    _PRICES[model.rpartition(":")[2]] = {what: _rate(model, what, rate) for what, rate in rates.items()}


def price(
    provider: str,
    model: str,
    usage: Usage,
    *,
    asked: str | None = None,
    searches: Mapping[str, int] | None = None,
    batch: bool = False,
) -> tuple[Decimal | None, dict[str, Any]]:
    """Dollars for ``usage``, and the rates they come from.

    Args:
        provider: ``openai``, ``openai-chat`` or ``anthropic``.
        model: the model that answered, as the provider names it.
        usage: what it used.
        asked: the model that was asked for, tried when ``model`` has no known price.
        searches: how often the provider searched for the call, which it charges for by the search: ``"web"``, and
            ``"storage"`` for files.
        batch: True for a reply that came through a batch: the published batch price, or half of the standard one.

    Returns:
        The cost, None where no price is known, and the facts to keep beside the call: ``source`` and
        dollars per million tokens as text, and per thousand searches where there were any. The facts of an
        unknown price are empty.
    """
    names = [name for name in dict.fromkeys((model, asked)) if name]
    searched = {what: number for what, number in (searches or {}).items() if number}
    for name in names:
        if name in _PRICES:
            # What a search costs was not said with set_price.
            own = (None, {}) if searched else _own(_PRICES[name], usage)
            return _halved(*own) if batch else own
    for name in names:
        found = _published(provider, name, usage, searched)
        if found is not None and batch:
            cheaper = _published(provider, name, usage, searched, batch=True)
            if cheaper is not None and cheaper[0] < found[0]:
                return cheaper[0], {**cheaper[1], "discount": "batch, as published"}
            return _halved(*found)
        if found is not None:
            return found
    return None, {}


def _halved(cost: Decimal | None, facts: dict[str, Any]) -> tuple[Decimal | None, dict[str, Any]]:
    if cost is None:
        return None, {}
    return cost / 2, {**facts, "discount": "batch: half of the price per million"}


def _rate(model: str, what: str, value: float | str | Decimal) -> Decimal:
    try:
        rate = Decimal(str(value))
    except ArithmeticError:
        rate = Decimal(-1)
    if not rate.is_finite() or rate < 0:
        raise UsageError(f"set_price({model!r}): {what}={value!r} is not a price. Write dollars per million tokens.")
    return rate


def _own(rates: dict[str, Decimal], usage: Usage) -> tuple[Decimal, dict[str, Any]]:
    long = usage.cache_write_1h_tokens
    short = usage.cache_write_tokens - long
    written = rates.get("cache_write", rates["input"])
    fresh = usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens
    total = fresh * rates["input"] + usage.cached_tokens * rates["cached"] + usage.output_tokens * rates["output"]
    total += short * written + long * rates.get("cache_write_1h", written)
    return total / _MILLION, {"source": "set_price", "per_million": {what: str(rate) for what, rate in rates.items()}}


def _published(
    provider: str, model: str, usage: Usage, searches: Mapping[str, int], *, batch: bool = False
) -> tuple[Decimal, dict[str, Any]] | None:
    import genai_prices  # 0.2 s: only when a live call is to be priced

    counts = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        **{f"{what}_searches": number for what, number in searches.items()},
    )
    try:
        found = genai_prices.calc_price(
            counts,
            model,
            provider_id=provider.removesuffix("-chat"),
            price_context={"processing": "batch"} if batch else None,
        )
    except (LookupError, ValueError):
        return None
    rates = {}
    for what in ("input", "output", "cache_read", "cache_write", "cache_write_1h"):
        rate = getattr(found.model_price, f"{what}_mtok", None)
        if rate is not None:
            rates["cached" if what == "cache_read" else what] = str(_tier(rate, usage.input_tokens))
    facts: dict[str, Any] = {"source": "genai-prices", "model": found.model.id, "per_million": rates}
    for what in searches:
        rate = getattr(found.model_price, f"{what}_searches_kcount", None)
        if rate is None:  # charged for, but nobody says how much
            return None
        facts.setdefault("per_thousand", {})[f"{what}_searches"] = str(rate)
    return found.total_price, facts


def _tier(rate: Any, input_tokens: int) -> Any:
    """The rate of a call of that length: long ones can cost more a token."""
    tiers = [tier.price for tier in getattr(rate, "tiers", ()) if input_tokens > tier.start]
    return tiers[-1] if tiers else getattr(rate, "base", rate)
