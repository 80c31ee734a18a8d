"""What stands around the POST of a model call: whether it may be sent, what it may cost, its row in the ledger.

``sending`` is entered before a request is sent and left when its reply is recorded, or when none came. A call that was
sent and brought no answer (a timeout, a broken connection, a killed process) may have been charged for: it is *in
doubt*, and the ledger says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import orjson

from agentflow import budgets, costs, ledger, limits, providers, tokens
from agentflow.calls import Call, Current, Suspend
from agentflow.clocks import start_clocks, stop_clocks
from agentflow.errors import ModelError
from agentflow.journal import Add, Drop, Op
from agentflow.line import Admit, Line
from agentflow.models import Usage
from agentflow.observing import tell
from agentflow.settings import settings

ASSUMED_OUTPUT = 2_000
_OUTPUT_LIMITS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
_IN_DOUBT = ("timeout", "connection_error", "incomplete_stream", "broken_stream")
_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
_BUSY = (429, 503, 529)
_written: dict[tuple[str, str], int] = {}  # by provider and model: the longest answer that this process has seen


class Ticket:
    """One POST on its way.

    Attributes:
        at_most: dollars that it may cost; None if that is not known, or nobody has asked.
        tokens: that it may use at most, 0 if nobody has asked; ``used`` is what it did use, None while unknown.
        sent: it is on its way, or was.
        held: what is set aside for it; None where there is no budget.
        in_flight: whether the provider has this very call in the background, so that nothing is to be sent.
        background: whether the provider is left with the call and asked for its reply later.
        record: the reply as it is recorded, once it is.
    """

    def __init__(
        self, call: Call, current: Current, provider: str, body: dict[str, Any], in_flight: Callable[[], bool]
    ) -> None:
        self.call = call
        self.current = current
        self.provider = provider
        self.body = body
        self.in_flight = in_flight
        self.model = str(body["model"])
        self.at_most: Decimal | None = None
        self.held: budgets.Held | None = None
        self.saved = self.sent = False
        self.background = False
        self.record: dict[str, Any] | None = None
        self.tokens = 0
        self.used: int | None = None
        # What it takes from the run's budget: all that was set aside, until it is known to be less.
        self.cost: Decimal | None = None

    @property
    def name(self) -> str:
        return f"{self.provider}:{self.model}"

    async def save(self, key: str, record: dict[str, Any], more: Sequence[Op] = ()) -> None:
        """Records the reply, its row in the ledger, and ``more``, in one commit; durable when it returns."""
        ex = self.call.ex
        entry = costs.reply(self.call, self.current, record, self.model, key, self.at_most if self.held else None)
        kept = orjson.dumps({**record, "ledger": entry[0]}).decode()
        ops = [Add(key, kept), costs.add(entry), *more, *self.given_back(), *(ex.saved_row() if ex.scratch else ())]
        # What an earlier attempt or process had set aside, when it submitted this call to the background.
        before = [] if self.sent else budgets.left_behind(ex.journal, ex.key, self.call.occ)
        ops += [Drop(note) for note, _ in before]
        self.saved = True
        await ex.journal.acommit(ops, fence=ex.fence, paid=True)
        self.record = record
        if not self.sent:
            for budget in ex.budgets():
                budget.count(budgets.counts(entry[1]) - sum(budgets.counts(facts) for _, facts in before))
        self.cost = budgets.counts(entry[1])
        ex.paid(self.current, None if record["cost"] is None else Decimal(record["cost"]), entry)
        seen, usage = (self.provider, self.model), record["usage"]
        self.used = usage["input_tokens"] + usage["output_tokens"]
        _written[seen] = max(_written.get(seen, 0), usage["output_tokens"])

    async def failed(self, error: BaseException) -> None:
        """No reply came: says in the ledger whether the provider may have charged for one all the same."""
        ex = self.call.ex
        if self.in_flight():
            return  # it goes on, and so does what is set aside for it
        ops = self.given_back()
        if _may_have_charged(error):
            why = error.code if isinstance(error, ModelError) else "cancelled"
            at_most = self.at_most
            if at_most is None:
                at_most = most(self.provider, self.body, None)[0]
            ops.append(costs.in_doubt(self.call, self.current, self.name, at_most, why or ""))
        else:
            self.cost = Decimal(0)
        if not ops:
            return
        if isinstance(error, Exception):
            await ex.journal.acommit(ops, fence=ex.fence)
        else:  # cancelled: whatever is awaited here would be cancelled too
            ex.journal.commit(ops, fence=ex.fence)

    def given_back(self) -> list[Op]:
        """What takes away the note of what was set aside."""
        return [] if self.held is None else self.held.given_back()


@contextlib.asynccontextmanager
async def sending(
    call: Call,
    current: Current,
    provider: str,
    body: dict[str, Any],
    max_tokens: int | None,
    in_flight: Callable[[], bool] = lambda: False,
    background: bool = False,
) -> AsyncIterator[Ticket]:
    """Stands around one POST and the saving of its reply.

    Waits for the limits of the model, and while the budget is held by calls in flight. A call that is cancelled
    while it waits is never sent.

    Args:
        call, current: the step that asks, and its attempt.
        provider: who is asked.
        body: what is asked, as it is sent.
        max_tokens: the limit of output tokens that the caller named; None for none.
        in_flight: whether the provider has this very call in the background: it is paid for, so nothing holds up
            its reply.
        background: whether it is to be sent as such a call.

    Raises:
        BudgetExceeded: the request could cost more than a budget still allows. Nothing was sent.
    """
    ticket = Ticket(call, current, provider, body, in_flight)
    ticket.background = background
    if in_flight():
        _send_off(call)
        try:
            with _observed(ticket):
                yield ticket
        finally:
            call.on_way = False
        return
    async with contextlib.AsyncExitStack() as stack:
        meter = limits.meter(ticket.name)
        own = call.ex.budgets()
        budgeted = bool(own) or settings.budget is not None
        if budgeted or (meter is not None and meter.limit.tpm is not None):
            await _look(ticket, max_tokens, budgeted)
        if meter is not None:
            await stack.enter_async_context(_within_limits(ticket, meter))
        for budget in own:
            await stack.enter_async_context(_within_run(ticket, budget))
        try:
            await _set_aside(ticket)
            _send_off(call)
            ticket.sent = True
        except BaseException:
            if ticket.held is not None and (ops := ticket.given_back()):
                call.ex.journal.commit(ops)
                ticket.held.over()
            raise
        try:
            with _observed(ticket):
                yield ticket
        except BaseException as error:
            if not ticket.saved:
                await ticket.failed(error)
            raise
        finally:
            call.on_way = False
            if ticket.held is not None:
                ticket.held.over()


@contextlib.contextmanager
def _observed(ticket: Ticket) -> Iterator[None]:
    """Tells whoever observes the run that the model is asked, and what came of it."""
    observers = ticket.call.ex.observers
    failure: BaseException | None = None
    tell(observers, lambda each: each.request_started(ticket))
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        tell(observers, lambda each: each.request_ended(ticket, failure))


def _send_off(call: Call) -> None:
    """Leaves instead, if the call was withdrawn or its run has ended while it waited."""
    ex = call.ex
    if ex.closed or ex.stopping or (ex.left_branches and ex.is_left(call.here)):
        raise Suspend
    if not call.send_off():
        raise asyncio.CancelledError


async def _look(ticket: Ticket, max_tokens: int | None, budgeted: bool) -> None:
    """Finds out how many tokens a call may use, and under a budget what that may cost."""
    await tokens.warm(ticket.provider, ticket.model)
    cost, counted, output = most(ticket.provider, ticket.body, max_tokens)
    ticket.tokens = counted.tokens + output
    if not budgeted:
        return
    if cost is None:
        raise budgets.unpriced(ticket.call, ticket.name, "A budget is set")
    ticket.at_most = cost
    ticket.held = budgets.Held(ticket.call, ticket.current, ticket.name, cost, counted, output)


@contextlib.asynccontextmanager
async def _within_limits(ticket: Ticket, meter: limits.Meter) -> AsyncIterator[None]:
    """Waits for the limits of the model, and counts the call in them."""
    use = limits.Use(ticket.tokens)
    await _turn(ticket, meter.line, lambda: meter.admit(use), f"limits of {ticket.name}")
    try:
        yield
    except ModelError as error:
        if error.status in _BUSY and error.retry_after is not None:
            meter.pause(error.retry_after)
        raise
    finally:
        meter.done(use, ticket.used, sent=ticket.sent)


@contextlib.asynccontextmanager
async def _within_run(ticket: Ticket, budget: budgets.RunBudget) -> AsyncIterator[None]:
    """Sets aside what a call may cost, until it is known what it did cost."""
    held = ticket.held
    assert held is not None
    budget.load(ticket.call.ex.journal)
    await _turn(ticket, budget.line, lambda: budget.admit(held), f"budget of {budget.run_id}")
    try:
        yield
    finally:
        cost = held.at_most if ticket.cost is None else ticket.cost
        budget.settle(held, cost if ticket.sent else Decimal(0))


async def _set_aside(ticket: Ticket) -> None:
    """Notes in the journal what may be spent; waits where the budget of everything is held by calls in flight."""
    ex, held = ticket.call.ex, ticket.held
    if held is None:
        return
    if settings.budget is None:
        await ex.journal.acommit([held.row()], fence=ex.fence)
        return
    period = budgets.period_of(ex.journal, settings.budget)
    if not await period.admit(held):
        pause = 0.02
        with _waiting(ticket, "budget of everything"):
            while not await period.admit(held):
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 0.5)


@contextlib.contextmanager
def _waiting(ticket: Ticket, what: str) -> Iterator[None]:
    """Waiting leaves nothing in doubt, and does not count against the timeouts of the steps around."""
    ticket.call.ex.say_once(f"{ticket.call.name}: waits for the {what}, held by calls before it")
    call, current = ticket.call, ticket.current
    slot = current.facts[0]
    stopped = stop_clocks()
    call.ex.unstart(call, slot, current)
    try:
        yield
    finally:
        start_clocks(stopped)
    call.ex.started(call, slot, current)


async def _turn(ticket: Ticket, line: Line, admit: Admit, what: str) -> None:
    """Waits for its turn in a line."""
    if not line.at_once(admit):
        with _waiting(ticket, what):
            await line.wait(admit)


def doubt(call: Call, current: Current, request: dict[str, Any]) -> list[Op]:
    """The ledger's row for a call that was in flight when its process ended."""
    ex, model = call.ex, costs.model_of(request)
    ops: list[Op] = []
    for key, facts in budgets.left_behind(ex.journal, ex.key, call.occ):
        ops += [Drop(key), costs.in_doubt(call, current, model, Decimal(facts["at_most"]), "process ended")]
    if not ops:
        body = request.get("body") or {"model": request["model"], "input": request.get("texts", [])}
        at_most = most(request["provider"], body, None if "body" in request else 0)[0]
        ops = [costs.in_doubt(call, current, model, at_most, "process ended")]
        for budget in ex.budgets():
            budget.count(at_most or Decimal(0))
    return ops


def most(provider: str, body: dict[str, Any], max_tokens: int | None) -> tuple[Decimal | None, tokens.Count, int]:
    """What a request may cost: its input tokens and the most it may answer, at the known price.

    Where the caller named no limit, an answer of 2,000 tokens is assumed, or the longest that this process has had
    from the model if that is longer.

    Args:
        provider: who is asked.
        body: the request as it is sent.
        max_tokens: the limit of output tokens that the caller named; None for none.

    Returns:
        Dollars, None where no price is known; the input tokens; the output tokens.
    """
    model = str(body["model"])
    counted = tokens.count(provider, model, body)
    output = max_tokens
    if output is None:
        output = max(ASSUMED_OUTPUT, _written.get((provider, model), 0))
        limits = [body[name] for name in _OUTPUT_LIMITS if isinstance(body.get(name), int)]
        output = min([output, *limits])
    if isinstance(several := body.get("n"), int):
        output *= several
    if body.get("service_tier") not in (None, "auto", "default", "standard", "standard_only"):
        return None, counted, output
    cached = counted.tokens if "cache_control" in str(body) else 0
    usage = Usage(counted.tokens, output, cache_write_tokens=cached)
    cost, _ = ledger.price(providers.prices(provider), model, usage)
    return cost, counted, output


def estimate(request: dict[str, Any], before: dict[str, Any] | None) -> tuple[Decimal | None, tokens.Count]:
    """What a recorded request would cost now: counted as for a budget, with an answer as long as the one before.

    Args:
        request: what ``generate_content`` was asked.
        before: the usage of the answer before; None where there was none, and an assumed length is taken.
    """
    provider, model = request["provider"], request["model"]
    name, _ = tokens.encoding_of(provider, model)
    if name is not None:
        tokens.load(name)
    cost, counted, _ = most(provider, request["body"], None if before is None else before["output_tokens"])
    return cost, counted


def _may_have_charged(error: BaseException) -> bool:
    if not isinstance(error, ModelError):
        return not isinstance(error, Exception)
    if error.code not in _IN_DOUBT:
        return False
    cause: BaseException | None = error.__cause__
    while cause is not None:
        if type(cause).__name__ in _NOT_SENT:
            return False
        cause = cause.__cause__
    return True
