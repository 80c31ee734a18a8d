"""A model call that goes on at the provider: submitted once, its id recorded, then looked at until it has ended.

What is written, and what a crash at each point means:

1. the POST is answered with an id, and the id is committed and synced before anything else. A crash before that leaves
   an unknown outcome: the step was in flight, which its enclosing step's ``in_doubt`` decides about. A crash after it
   finds the id again, in whatever attempt or process comes next, and looks at the same call: no second POST.
2. the ended reply is saved as a foreground one is. It names its id, so that the id is settled by the same commit.
3. an id that the provider does not know any more is marked as lost. Only then, or after a reply that says failed or
   cancelled, does a new attempt submit again.

Rows: ``i/<run>/<step>/<number>`` holds an id and the digest of the body it answers; ``...!lost`` marks it lost.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import orjson

from agentflow.errors import LeaseLost, ModelError, UsageError
from agentflow.journal import Add
from agentflow.providers.common import digest, now, transport

FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 1.0, 30.0, 1.5  # seconds between two looks
SUBMIT_TIMEOUT = 60.0  # seconds that a submission gets, however short the timeout is
LOOK_TIMEOUT = 60.0  # seconds for one look
MISSING = 3  # 404s in a row before a call counts as gone: one alone may come from a server that lags behind
FAILED_LOOKS = 20  # in a row, about nine minutes, before an attempt gives up looking
ENDED = (None, "completed", "incomplete", "failed", "cancelled", "expired")

_COUNTED = {"cost": "0", "price": {"source": "counted before"}}

sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

# Submissions under way in this process, by the rows of their step and the digest of the body.
_submitting: dict[tuple[str, str], Future[None]] = {}


def check(background: bool, provider_name: str, provider: Any, extra: Any) -> None:
    """Refuses ``background=True`` where no call can be fetched later; nothing was sent."""
    if not isinstance(background, bool):
        raise UsageError(f"background={background!r} is not True or False.")
    if not background:
        return
    if getattr(provider, "submit", None) is None:
        raise UsageError(
            f"background=True needs the OpenAI Responses API; {provider_name} has no call that can be fetched later. "
            'Use an "openai:..." model, or leave background out. Nothing was sent.'
        )
    if extra and extra.get("store", True) is not True:
        raise UsageError("background=True needs store: the reply is fetched later. Leave it out of extra=.")


def pauses() -> Any:
    """Seconds before each look: growing, or as ``AGENTFLOW_POLL_SECONDS`` says."""
    fixed = fixed_pause()
    pause = FIRST_PAUSE if fixed is None else fixed
    while True:
        yield pause
        if fixed is None:
            pause = min(pause * GROWTH, LONGEST_PAUSE)


def fixed_pause() -> float | None:
    """Seconds between all looks: ``AGENTFLOW_POLL_SECONDS``, or hardly any with a fake model; None lets them grow."""
    named = os.environ.get("AGENTFLOW_POLL_SECONDS")
    if not named:
        return 0.01 if transport() is not None else None
    try:
        return float(named)
    except ValueError:
        raise UsageError(f"AGENTFLOW_POLL_SECONDS={named!r} is no number of seconds.") from None


class Flight:
    """The background calls of one step: their ids, in all attempts and processes."""

    def __init__(self, ex: Any, occ: str, name: str, current: Any) -> None:
        self._ex = ex
        self._name = name
        self._prefix = f"i/{ex.key}/{occ}/"
        self._replies = f"m/{ex.key}/{occ}/"
        self._own = f"{self._replies}{current.call.here.epoch}.{current.sample}/"
        self.current = current
        self.place = f"{ex.journal.id}/{self._prefix}"

    def settled(self) -> set[Any]:
        """The ids whose replies are saved."""
        replies = [orjson.loads(text)["body"] for _, text in self._ex.journal.scan(self._replies)]
        return {body.get("id") for body in replies if isinstance(body, dict)}

    def came(self, asked: str) -> dict[str, Any] | None:
        """A reply to this body which this attempt may use, and which another one that was given up has counted."""
        rows = [orjson.loads(text) for _, text in self._ex.journal.scan(self._own)]
        return next(({**row, **_COUNTED} for row in rows if row["asked"] == asked), None)

    def open(self, asked: str | None = None) -> str | None:
        """The id of a call for this body (None: for any) whose reply is not saved yet, or None."""
        rows = dict(self._ex.journal.scan(self._prefix))
        found = [orjson.loads(text) for key, text in rows.items() if "!" not in key and f"{key}!lost" not in rows]
        found = [row for row in found if asked is None or row["asked"] == asked]
        if not found:
            return None
        settled = self.settled()
        ids: list[str] = [row["id"] for row in found if row["id"] not in settled]
        return ids[-1] if ids else None

    async def record(self, ident: str, asked: str, provider: str, body: dict[str, Any]) -> None:
        """Keeps an id, and what the price of its answer depends on; durable when it returns."""
        count = sum(1 for key, _ in self._ex.journal.keys(self._prefix) if "!" not in key)
        row: dict[str, Any] = {"id": ident, "asked": asked, "provider": provider, "step": self._name, "at": now()}
        row["body"] = {name: body[name] for name in ("model", "background_options") if name in body}
        add = Add(f"{self._prefix}{count:04d}", orjson.dumps(row).decode())
        await self._ex.journal.acommit([add], fence=self._ex.fence, paid=True)

    async def lost(self, ident: str) -> None:
        """Marks an id that the provider does not know any more."""
        rows = [(key, text) for key, text in self._ex.journal.scan(self._prefix) if "!" not in key]
        marks = [Add(f"{key}!lost", now()) for key, text in rows if orjson.loads(text)["id"] == ident]
        await self._ex.journal.acommit(marks, fence=self._ex.fence)

    def say(self, text: str) -> None:
        self._ex.say_once(f"{self._name}: {text}")


async def answer(provider: Any, body: dict[str, Any], timeout: float | None, flight: Flight) -> dict[str, Any]:
    """The reply of a call in the background; submits it unless one for this very body is in flight already.

    Args:
        provider: has ``submit`` and ``retrieve``.
        body: what is asked.
        timeout: seconds for the submission and all the waiting of this attempt; None waits until the call ends. A
            submission gets a minute all the same.
        flight: where its id is kept.

    Raises:
        ModelError: the submission failed; the time is over or the provider cannot be reached, and ``in_flight`` names
            the call, which goes on; or the provider does not know the call any more.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    asked = digest(body)
    place = (flight.place, asked)
    while (other := _submitting.get(place)) is not None:
        # An attempt that was given up is still submitting this call: its id will be there in a moment.
        await asyncio.shield(asyncio.wrap_future(other))
    ident = flight.open(asked)
    # Since this attempt looked for replies, one that was given up may have saved the call's.
    if ident is None and (came := flight.came(asked)) is not None:
        return came
    submitted = ident is None
    if ident is None:
        done = _submitting[place] = Future()
        try:
            # Cut short, a submission would leave a call that nobody knows of.
            raw: dict[str, Any] = await provider.submit(body, timeout and max(timeout, SUBMIT_TIMEOUT))
            ident = _running(raw)
            if ident is None:
                return raw
            try:
                await flight.record(ident, asked, raw["provider"], body)
            except LeaseLost:  # the run was cancelled at this moment: nobody else knows of the call
                flight.say(f"call {ident} was submitted while the run was ended; it is cancelled at the provider")
                await provider.cancel(ident, body, LOOK_TIMEOUT)
                raise
        finally:
            del _submitting[place]
            done.set_result(None)
    else:
        flight.say(f"call {ident} is in flight at the provider; waiting for it")
    left = None if timeout is None else max(0.0, began + timeout - loop.time())
    current, task = flight.current, asyncio.current_task()
    assert task is not None
    # Whoever waits for this may leave (Ctrl-C, a timeout around it): the id is kept, so nothing needs to be finished.
    current.stop = lambda: loop.call_soon_threadsafe(task.cancel)
    try:
        if current.left:
            raise asyncio.CancelledError
        async with asyncio.timeout(left) as clock:
            raw = await _look(provider, body, ident, flight, rest=submitted)
        if ident in flight.settled():
            # Plain code cannot be stopped: an attempt that was given up has waited for the same call, and counted it.
            raw = {**raw, **_COUNTED}
        return raw
    except TimeoutError as exc:
        if not clock.expired():
            raise
        raise _goes_on(
            ModelError(
                f"{provider.NAME}: the background call {ident} has not ended within {timeout:g} s (timeout=). It goes "
                "on at the provider and is not submitted again: another attempt, or run, waits for the same call.",
                code="timeout",
                retryable=True,
            ),
            ident,
        ) from exc
    finally:
        current.stop = None


def _running(raw: dict[str, Any]) -> str | None:
    """The id of a call that was taken and has not ended; None where the answer is there already."""
    body = raw["body"]
    if not isinstance(body, dict) or body.get("status") in ENDED or not isinstance(body.get("id"), str):
        return None
    ident: str = body["id"]
    return ident


async def _look(provider: Any, body: dict[str, Any], ident: str, flight: Flight, rest: bool) -> dict[str, Any]:
    """Looks at a call until it has ended. Failed looks are repeated; the POST never is."""
    missing = failed = 0
    asked: float = 0
    for pause in pauses():
        if rest:
            await sleep(max(pause, asked))
        rest, asked = True, 0
        try:
            raw: dict[str, Any] = await provider.retrieve(ident, body, LOOK_TIMEOUT)
            if isinstance(raw["body"], dict) and raw["body"].get("id") == ident:
                missing = failed = 0
                if raw["body"].get("status") in ENDED:
                    return raw
                continue
            problem = ModelError(f"{provider.NAME}: no reply came, but {str(raw['body'])[:80]!r}", retryable=True)
        except ModelError as exc:
            problem = exc
        if problem.status in (404, 410):
            missing += 1
            if missing == MISSING:
                await flight.lost(ident)
                raise ModelError(
                    f"{provider.NAME}: the background call {ident} is not there any more ({problem.status}): it "
                    "expired or was deleted. A new attempt submits it again.",
                    status=problem.status,
                    code="not_found",
                    request_id=problem.request_id,
                ) from problem
            continue
        failed += 1
        if not problem.retryable or failed == FAILED_LOOKS:
            error = ModelError(
                f"{provider.NAME}: the background call {ident} cannot be looked at ({problem}). It goes on at the "
                "provider and is not submitted again.",
                status=problem.status,
                code=problem.code,
                retryable=problem.retryable,
                request_id=problem.request_id,
            )
            raise _goes_on(error, ident) from problem
        asked = problem.retry_after or 0
    raise AssertionError("pauses() has no end")


def _goes_on(error: ModelError, ident: str) -> ModelError:
    error.in_flight = ident
    return error
