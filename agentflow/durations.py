"""Durations as people write them: ``30``, ``"30s"``, ``"1h30m"``, ``timedelta(days=2)``."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from agentflow.errors import UsageError

Duration = float | int | str | timedelta

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)")


def seconds(value: Duration | None, *, what: str = "duration") -> float | None:
    """Seconds as a float; None stays None.

    Args:
        value: a number of seconds, text such as ``"30s"``, ``"1h30m"``, ``"2d"``, ``"250ms"``, or a
            timedelta. None means that there is no limit.
        what: the option's name, for the error.

    Raises:
        UsageError: not a duration, negative, or not finite.

    >>> seconds("1h30m"), seconds(5), seconds("250ms"), seconds(None)
    (5400.0, 5.0, 0.25, None)
    """
    if value is None:
        return None
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UsageError(
            f'{what}={value!r} is not a duration. Write seconds (30), text ("30s", "1h30m") or a timedelta.'
        )
    elif isinstance(value, str):
        text = value.strip().lower()
        parts = _PART.findall(text)
        if not parts or _PART.sub("", text).strip():
            raise UsageError(
                f'{what}={value!r} is not a duration. Use numbers with ms, s, m, h, d or w, such as "30s" or "1h30m".'
            )
        result = math.fsum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        result = float(value)
    if not math.isfinite(result) or result < 0:
        raise UsageError(f"{what}={value!r} is not a duration: it has to be zero or more, and finite.")
    return result


def exact(value: float) -> str:
    """A duration as ``seconds`` reads it, whole: equal durations have equal text.

    >>> exact(2592000.0), exact(5400), exact(0.25), exact(0)
    ('30d', '1h30m', '0.25s', '0s')
    """
    rest, text = value, ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        count, rest = divmod(rest, size)
        text += f"{int(count)}{unit}" if count else ""
    return text + f"{rest:.6g}s" if rest or not text else text


def words(value: float) -> str:
    """A duration for people, at most two units.

    >>> words(0.0123), words(75), words(93784)
    ('12ms', '1m 15s', '1d 2h')
    """
    if value < 1:
        return f"{round(value * 1000)}ms"
    if value < 60:
        return f"{value:.1f}s"
    parts = []
    rest = int(value)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
