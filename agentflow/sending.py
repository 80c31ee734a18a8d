"""What stands around the POST of a model call: what it may cost, and what becomes of it in the ledger.

``sending`` is entered before a request is sent and left when its reply is recorded, or when none came. A call that was
sent and brought no answer (a timeout, a broken connection, a killed process) may have been charged for: it is *in
doubt*, and the ledger says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any

import orjson

from agentflow import costs, ledger, providers, tokens
from agentflow.calls import Call, Current
from agentflow.errors import JournalError, ModelError
from agentflow.journal import Add, Op
from agentflow.models import Usage

ASSUMED_OUTPUT = 2_000
_OUTPUT_LIMITS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
_IN_DOUBT = ("timeout", "connection_error", "incomplete_stream", "broken_stream")
_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
_written: dict[tuple[str, str], int] = {}  # by provider and model: the longest answer that this process has seen


class Ticket:
    """One POST on its way.

    Attributes:
        at_most: dollars that it may cost; None if that is not known, or nobody has asked.
    """

    def __init__(self, call: Call, current: Current, provider: str, body: dict[str, Any]) -> None:
        self.call = call
        self.current = current
        self.provider = provider
        self.body = body
        self.model = str(body["model"])
        self.at_most: Decimal | None = None
        self.saved = False

    async def save(self, key: str, record: dict[str, Any], more: Sequence[Op] = ()) -> None:
        """Records the reply, its row in the ledger, and ``more``, in one commit; durable when it returns."""
        ex = self.call.ex
        entry = costs.reply(self.call, self.current, record, self.model, key, self.at_most)
        kept = orjson.dumps({**record, "ledger": entry[0]}).decode()
        ops = [Add(key, kept), costs.add(entry), *more, *(ex.saved_row() if ex.scratch else ())]
        self.saved = True
        await ex.journal.acommit(ops, fence=ex.fence, paid=True)
        ex.paid(self.current, None if record["cost"] is None else Decimal(record["cost"]), entry)
        seen = self.provider, self.model
        _written[seen] = max(_written.get(seen, 0), record["usage"]["output_tokens"])

    async def failed(self, error: BaseException) -> None:
        """No reply came: says in the ledger whether the provider may have charged for one all the same."""
        if self.saved or not _may_have_charged(error):
            return
        ex = self.call.ex
        why = error.code if isinstance(error, ModelError) else "cancelled"
        at_most = self.at_most
        if at_most is None:
            at_most = most(self.provider, self.body, None, load=False)[0]
        ops = [costs.in_doubt(self.call, self.current, f"{self.provider}:{self.model}", at_most, why or "")]
        if isinstance(error, Exception):
            await ex.journal.acommit(ops, fence=ex.fence)
        else:  # cancelled: whatever is awaited here would be cancelled too
            ex.journal.commit(ops, fence=ex.fence)


@contextlib.asynccontextmanager
async def sending(
    call: Call, current: Current, provider: str, body: dict[str, Any], max_tokens: int | None
) -> AsyncIterator[Ticket]:
    """Stands around one POST and the saving of its reply.

    Args:
        call, current: the step that asks, and its attempt.
        provider: who is asked.
        body: what is asked, as it is sent.
        max_tokens: the limit of output tokens that the caller named; None for none.
    """
    ticket = Ticket(call, current, provider, body)
    try:
        yield ticket
    except BaseException as error:
        if not isinstance(error, JournalError):
            await ticket.failed(error)
        raise


def doubt(call: Call, current: Current, request: dict[str, Any]) -> list[Op]:
    """The ledger's row for a call that was in flight when its process ended."""
    body = request.get("body") or {"model": request["model"], "input": request.get("texts", [])}
    at_most = most(request["provider"], body, None if "body" in request else 0, load=False)[0]
    return [costs.in_doubt(call, current, costs.model_of(request), at_most, "process ended")]


def most(
    provider: str, body: dict[str, Any], max_tokens: int | None, *, load: bool = True
) -> tuple[Decimal | None, tokens.Count, int]:
    """What a request may cost: its input tokens and the most it may answer, at the known price.

    Where the caller named no limit, an answer of 2,000 tokens is assumed, or the longest that this process has had
    from the model if that is longer.

    Args:
        provider: who is asked.
        body: the request as it is sent.
        max_tokens: the limit of output tokens that the caller named; None for none.
        load: as in ``tokens.count``.

    Returns:
        Dollars, None where no price is known; the input tokens; the output tokens.
    """
    model = str(body["model"])
    counted = tokens.count(provider, model, body, load=load)
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
