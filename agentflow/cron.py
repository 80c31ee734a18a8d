"""When a schedule ticks: a cron expression in a time zone, read and reckoned with the library cronsim.

A local time runs once a day, whatever the clocks do: one that is left out in spring runs at the first moment after the
gap, one that comes twice in autumn runs the first time. Schedules of every hour (``*`` as the hour) go by real time.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from agentflow.errors import UsageError

CATCH_UP = ("latest", "all", "skip")
_FORM = 'Write five fields, minute hour day-of-month month day-of-week: "0 9 * * MON" is Mondays at nine'
_NAMED = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * SUN",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A cron expression, the name of its time zone, and what becomes of missed ticks. Instants are epoch seconds."""

    text: str
    timezone: str
    catch_up: str
    zone: tzinfo

    def __str__(self) -> str:
        return f"{self.text} ({self.timezone})"

    def local(self, tick: float) -> datetime:
        """A tick as its workflow gets it: an aware datetime in the schedule's time zone."""
        return datetime.fromtimestamp(tick, self.zone)

    def after(self, at: float) -> Iterator[float]:
        """The ticks after an instant, in order, without end."""
        from cronsim import CronSim

        fields = _NAMED.get(self.text.lower(), self.text).split()
        start, last = self.local(at), at
        if len(CronSim(" ".join(fields), start).hours) == 24:
            fields[1] = "*"
            yield from (tick.timestamp() for tick in CronSim(" ".join(fields), start))
            return
        for local in CronSim(" ".join(fields), start.replace(tzinfo=None)):
            tick = _instant(local, self.zone)
            if tick > last:
                yield tick
                last = tick

    def next(self, at: float) -> float | None:
        """The first tick after an instant; None if there is none in the next fifty years."""
        return next(self.after(at), None)

    def between(self, after: float, until: float, most: int) -> tuple[list[float], bool]:
        """The newest ticks after one instant and up to another, in order, and whether there are more than ``most``.

        What that costs depends on ``most``, not on how long ago ``after`` is.
        """
        span = _HOUR
        while True:
            start = max(after, until - span)
            found = []
            for tick in self.after(start):
                if tick > until:
                    break
                found.append(tick)
            if start == after or len(found) > most:
                return found[-most:], len(found) > most
            span *= 8


def _instant(local: datetime, zone: tzinfo) -> float:
    """When the clocks of a zone show a local time for the first time; where they leave it out, what they show next."""
    while True:
        tick = local.replace(tzinfo=zone, fold=0)
        if tick.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == local:
            return tick.timestamp()
        local += timedelta(minutes=1)


def parsed(schedule: Any, timezone: Any, catch_up: Any) -> Schedule | None:
    """What ``workflow(schedule=, timezone=, catch_up=)`` asks for; None without a schedule.

    Raises:
        UsageError: no cron expression of five fields, one that never comes, an unknown time zone or policy.
    """
    if catch_up not in CATCH_UP:
        raise UsageError(f"catch_up={catch_up!r} is none of {', '.join(map(repr, CATCH_UP))}.")
    if schedule is None:
        if timezone is not None or catch_up != "latest":
            raise UsageError('timezone= and catch_up= belong to a schedule: schedule="0 9 * * MON".')
        return None
    if not isinstance(schedule, str):
        raise UsageError(f"schedule={schedule!r} is no text. {_FORM}.")
    made = Schedule(" ".join(schedule.split()), "UTC" if timezone is None else timezone, catch_up, _zone(timezone))
    count = len(_NAMED.get(made.text.lower(), made.text).split())
    if count != 5:
        raise UsageError(f"schedule={schedule!r} has {count} field{'' if count == 1 else 's'}. {_FORM}.")
    from cronsim import CronSimError

    try:
        first = made.next(time.time())
    except CronSimError as error:
        raise UsageError(f"schedule={schedule!r}: {str(error).lower()}. {_FORM}.") from error
    if first is None:
        raise UsageError(f"schedule={schedule!r} never comes. {_FORM}.")
    return made


def _zone(name: Any) -> tzinfo:
    if name is None:
        return UTC
    if not isinstance(name, str) or not name:
        raise UsageError(f'timezone={name!r}: the name of a time zone, such as "Europe/Berlin". None: UTC.')
    from zoneinfo import ZoneInfo, available_timezones

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        import difflib

        near = difflib.get_close_matches(name, sorted(available_timezones()), 1)
        hint = f"Did you mean {near[0]!r}?" if near else 'Names look like "Europe/Berlin" or "UTC".'
        raise UsageError(f"timezone={name!r} is not known. {hint}") from error


def argument(signature: inspect.Signature, workflow: str) -> str | None:
    """The parameter after the context that gets the instant of the tick; None where there is none.

    Raises:
        UsageError: the workflow takes anything else.
    """
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(signature.parameters) > 1 or len(names) != len(signature.parameters):
        raise UsageError(
            f"workflow {workflow!r} has a schedule, so it takes the context and nothing more, or one parameter that "
            f"gets the instant of its tick, when: datetime. It takes {signature}."
        )
    return names[0] if names else None
