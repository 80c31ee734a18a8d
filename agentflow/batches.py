"""``batch=True``: the calls of a run that wait at the same moment become one batch of the provider.

A call that has no reply yet parks, as a question to a person does. When nothing else in the run can go on, ``look``
asks about the batches under way and hands over what is not in one yet; then the run suspends, or with ``wait=True``
looks again. What is written, and what a crash at each point means:

1. *intended*: which calls a batch will hold, and its random mark, synced before anything is sent. After a crash the
   provider is asked whether a batch with this mark exists. OpenAI's batches carry it as metadata. Anthropic's do not,
   but each custom id ends with it, and ids are in the results: a batch of the same size that has not ended is waited
   for until they can be read. So nothing is handed over twice, and nothing is ever in doubt. If there is none,
   nobody is bound by what was intended: what waits by then is handed over, and nothing else.
2. *created*: the batch's id, synced before anything else.
3. the replies, each a record like any other, joined by custom id, and last that the batch has *ended*.

Rows: ``b/<run>/<number>`` the batch, ``bm/<run>/<step>/<number>`` a call in it, ``bq/<run>/<number>/<step>`` its
request, ``be/<run>/<step>/<version>.<attempt>`` the error that it ended with.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

import orjson

from agentflow import background, budgets, costs, files, ledger, providers, sending
from agentflow.calls import Call, Current, enclosing
from agentflow.errors import LeaseLost, ModelError, UsageError
from agentflow.journal import Add, Drop, Put
from agentflow.observing import tell
from agentflow.providers import batching
from agentflow.providers.common import digest, now
from agentflow.run import Execution
from agentflow.settings import settings
from agentflow.waits import PENDING, Wait

FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 10.0, 300.0, 1.5  # seconds between two looks of a run that stays
DUE = 300.0  # seconds after which a suspended run may look again
TOGETHER = 500  # replies in one commit
_TIERS = (None, "auto", "default", "standard", "batch")


@dataclass(slots=True)
class _Waiter:
    """A call of this execution that has no reply yet."""

    call: Call
    current: Current
    provider: str
    model: str
    body: dict[str, Any]
    asked: str
    key: str
    info: dict[str, Any]
    batch: str | None = None  # the key of the batch that holds it
    looked: bool = False
    outcome: Any = PENDING
    wait: Wait | None = None

    @property
    def attempt(self) -> str:
        return f"{self.current.version}.{self.current.attempt}"


@dataclass(slots=True)
class _Batch:
    """A batch under way. ``requests``: for each step's occurrence the digest of its body, and its row's key."""

    row: dict[str, Any]
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        return self.row["state"] in ("intended", "created")


def of(ex: Execution) -> Batches:
    """The batches of an execution."""
    if ex.batches is None:
        ex.batches = Batches(ex)
    made: Batches = ex.batches
    return made


class Batches:
    """The batches of one run while this process executes it."""

    def __init__(self, ex: Execution) -> None:
        self._ex = ex
        self._prefix = f"b/{ex.key}/"
        self._waiting: dict[str, _Waiter] = {}
        self._next_look = 0.0
        self._pause = 0.0
        self._fixed = background.fixed_pause()
        self.looking = False
        rows = {key: orjson.loads(text) for key, text in ex.journal.scan(self._prefix)}
        self._count = len(rows)
        self._known = {row["batch"] for row in rows.values() if row.get("batch")}
        self._batches = {key: made for key, row in rows.items() if (made := _Batch(row)).open}
        if self._batches:
            for key, text in ex.journal.scan(f"bm/{ex.key}/"):
                _, _, occ, number = key.rsplit("/", 3)
                if (batch := self._batches.get(f"{self._prefix}{number}")) is not None:
                    batch.requests[occ] = orjson.loads(text)

    # -- what waits ------------------------------------------------------------------------------

    def holds(self, occ: str) -> bool:
        """Whether a batch under way answers this step."""
        return any(occ in batch.requests for batch in self._batches.values() if batch.open)

    def wait(self, call: Call, current: Current, provider: str, body: dict[str, Any], key: str) -> Wait:
        """The wait for a reply to ``body``, which will be recorded as ``key``."""
        model, asked = body["model"], digest(body)
        info = {"kind": "batch", "id": None, "provider": provider, "model": model, "requests": 1, "status": "new"}
        waiter = _Waiter(call, current, provider, model, body, asked, key, info)
        for name, batch in self._batches.items():
            if batch.open and batch.requests.get(call.occ, {}).get("asked") == asked:
                waiter.batch = name
                info |= {"id": batch.row["batch"], "status": "submitted", "requests": len(batch.requests)}
        error = self._ex.journal.get(self._error_key(call.occ, waiter.attempt))
        if error is not None and (facts := orjson.loads(error)).pop("asked") == asked:
            waiter.outcome = ModelError(**facts)
        self._waiting[call.occ] = waiter
        waiter.wait = Wait(lambda: self._check(waiter), info)
        return waiter.wait

    def forget(self, wait: Wait) -> None:
        """Nobody waits for this any more: what was not handed over yet will not be."""
        for occ, waiter in list(self._waiting.items()):
            if waiter.wait is wait:
                del self._waiting[occ]

    def _check(self, waiter: _Waiter) -> Any:
        if waiter.outcome is PENDING:
            return PENDING
        if isinstance(waiter.outcome, Exception):
            raise waiter.outcome
        return waiter.outcome

    def _error_key(self, occ: str, attempt: str) -> str:
        return f"be/{self._ex.key}/{occ}/{attempt}"

    def _waiters(self) -> list[_Waiter]:
        return [waiter for waiter in list(self._waiting.values()) if waiter.outcome is PENDING]

    # -- looking ---------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether a look makes sense, once nothing else in the run can go on."""
        waiters = self._waiters()
        if self.looking or not waiters:
            return False
        return not all(waiter.looked for waiter in waiters) or time.monotonic() >= self._next_look

    async def look(self) -> bool:
        """Asks about the batches under way and hands over what is in none; True if a step can go on."""
        self.looking = True
        try:
            await self._only_wait()
            for key, batch in list(self._batches.items()):
                if batch.open:  # also one that nobody waits for any more: its replies are paid for
                    waiters = [waiter for waiter in self._waiters() if waiter.batch == key]
                    await self._guarded(self._look(key, batch), waiters)
            if not self._came():
                for group in self._groups():
                    await self._guarded(self._hand_over(group), group)
        except Exception as error:  # whoever looks has nobody to tell; those who wait have
            for waiter in self._waiters():
                waiter.outcome = error
        finally:
            self.looking = False
            growing = min(max(self._pause * GROWTH, FIRST_PAUSE), LONGEST_PAUSE)
            self._pause = growing if self._fixed is None else self._fixed
            self._next_look = time.monotonic() + self._pause
            for waiter in self._waiters():
                assert waiter.wait is not None
                waiter.wait.due = self._ex.clock() + DUE
                waiter.looked = True
        return self._came()

    async def _only_wait(self) -> None:
        """What waits is not in flight: after a crash its batch is looked for, and none of these steps is in doubt."""
        waiters = [waiter for waiter in self._waiters() if not waiter.looked]
        steps = {step.id: step for waiter in waiters for step in (waiter.current, *enclosing(waiter.call))}
        if ops := self._ex.only_waits(list(steps.values())):
            await self._ex.journal.acommit(ops, fence=self._ex.fence)

    def _came(self) -> bool:
        return any(waiter.outcome is not PENDING for waiter in list(self._waiting.values()))

    async def _guarded(self, work: Any, waiters: list[_Waiter]) -> None:
        """What fails is raised where it is waited for."""
        try:
            await work
        except Exception as error:
            if not waiters:
                self._ex.say(f"a batch cannot be looked for now: {error}")
            for waiter in waiters if isinstance(error, ModelError) else self._waiters():
                waiter.outcome = error

    async def _look(self, key: str, batch: _Batch) -> None:
        row, api = batch.row, batching.of(batch.row["provider"])
        assert api is not None
        try:
            if row["state"] == "intended":
                seen = await api.find(row["mark"], len(batch.requests), row["since"], self._known)
                if seen is None:
                    await self._end(key, batch, "none")
                    return
                if not seen.ended and row["provider"] == "anthropic":
                    self._tell(key, row["batch"] or seen.id, "in doubt", len(batch.requests))
                    return
                await self._created(key, batch, seen.id)
            else:
                seen = await api.look(row["batch"])
            self._tell(key, seen.id, seen.status, len(batch.requests))
            results = await api.results(seen) if seen.ended else []
        except ModelError as error:
            if error.status == 404 and row["state"] == "created":
                error.retryable = False
                await self._end(key, batch, "gone")
                raise
            if not error.retryable or row["state"] == "intended":
                raise
            self._ex.say(f"batch {row['batch']} cannot be looked at now: {error}")
            return
        if seen.ended:
            await self._collect(key, batch, seen, results)

    def _tell(self, key: str, ident: str, status: str, count: int) -> None:
        for waiter in self._waiters():
            if waiter.batch == key:
                waiter.info |= {"id": ident, "status": status, "requests": count}

    async def _created(self, key: str, batch: _Batch, ident: str) -> None:
        self._known.add(ident)
        batch.row |= {"state": "created", "batch": ident}
        await self._ex.journal.acommit([self._put(key, batch)], fence=self._ex.fence, paid=True)

    async def _end(self, key: str, batch: _Batch, state: str, ops: tuple[Any, ...] = ()) -> None:
        """Ends what is known of a batch; calls that wait for it still are in none."""
        batch.row["state"] = state
        given_back = self._given_back(batch)
        await self._ex.journal.acommit([*ops, *given_back, self._put(key, batch)], fence=self._ex.fence)
        for waiter in self._waiters():
            if waiter.batch == key:
                waiter.batch = None

    def _put(self, key: str, batch: _Batch) -> Put:
        return Put(key, orjson.dumps(batch.row).decode())

    # -- handing over ----------------------------------------------------------------------------

    def _groups(self) -> list[list[_Waiter]]:
        """The calls that are in no batch, by provider and model, as many together as a batch may hold."""
        by_model: defaultdict[tuple[str, str], list[list[_Waiter]]] = defaultdict(list)
        sizes: dict[int, int] = {}
        for waiter in self._waiters():
            if waiter.batch is not None:
                continue
            groups = by_model[waiter.provider, waiter.model]
            size = batching.size(waiter.call.occ, waiter.body)
            if not groups or len(groups[-1]) == batching.MOST_REQUESTS or (
                sizes[id(groups[-1])] + size > batching.MOST_BYTES
            ):  # fmt: skip
                groups.append([])
                sizes[id(groups[-1])] = 0
            groups[-1].append(waiter)
            sizes[id(groups[-1])] += size
        return [group for groups in by_model.values() for group in groups]

    async def _hand_over(self, group: list[_Waiter]) -> None:
        ex, first = self._ex, group[0]
        mark = secrets.token_hex(12)
        number = f"{self._count:06d}{mark[:6]}"
        self._count += 1
        key = f"{self._prefix}{number}"
        row = {"provider": first.provider, "model": first.model, "mark": mark, "state": "intended", "batch": None}
        held = await self._set_aside(group)
        row |= {"held": held.key, "at_most": str(held.at_most)} if held is not None else {}
        batch = _Batch({**row, "requests": len(group), "since": time.time(), "at": now()})
        ops: list[Any] = []
        for waiter in group:
            occ = waiter.call.occ
            member = {"asked": waiter.asked, "key": waiter.key, "attempt": waiter.attempt}
            request = {"step": waiter.call.name, "request": files.shortened(waiter.body)}
            ops.append(Add(f"bm/{ex.key}/{occ}/{number}", orjson.dumps(member).decode()))
            ops.append(Add(f"bq/{ex.key}/{number}/{occ}", orjson.dumps(request).decode()))
            batch.requests[occ] = member
        # The batch's own row comes last: without it the others say nothing.
        ops.append(Add(key, orjson.dumps(batch.row).decode()))
        for at in range(0, len(ops), TOGETHER):
            await ex.journal.acommit(ops[at : at + TOGETHER], fence=ex.fence)
        self._batches[key] = batch
        for waiter in group:
            waiter.batch = key
        api = batching.of(first.provider)
        assert api is not None
        try:
            requests = [(f"{waiter.call.occ}-{mark}", waiter.body) for waiter in group]
            ident = await api.create(requests, run_id=ex.run_id, mark=mark)
        except UsageError:
            await self._end(key, batch, "none")
            raise
        except ModelError as error:
            if error.status is not None and 400 <= error.status < 500 and error.status != 408:
                await self._end(key, batch, "none")  # the provider said no; after anything else it is looked for
            raise
        try:
            await self._created(key, batch, ident)
        except LeaseLost:  # the run was cancelled at this moment
            ex.say(f"batch {ident} was handed over while the run was ended; it is cancelled at the provider")
            await api.cancel(ident)
            raise
        self._tell(key, ident, "submitted", len(group))
        ex.say(f"batch {ident}: {len(group)} requests to {first.model} handed over")

    async def _set_aside(self, group: list[_Waiter]) -> budgets.Held | None:
        """Sets aside in the budgets what a batch may cost, for as long as it is under way; None where there are none.

        Raises:
            BudgetExceeded: it may cost more than a budget still allows. Nothing was handed over.
        """
        ex, first = self._ex, group[0]
        own = ex.budgets()
        if not own and settings.budget is None:
            return None
        at_most = Decimal(0)
        name = f"{first.provider}:{first.model}"
        for waiter in group:
            cost, counted, output = sending.most(waiter.provider, waiter.body, None)
            if cost is None:
                raise budgets.unpriced(waiter.call, name, "A budget is set")
            at_most += cost / 2  # the price of a batch
        held = budgets.Held(first.call, first.current, name, at_most, counted, output)
        held.what = f"a batch of {len(group)} requests"
        counted_in = []
        try:
            for budget in own:
                budget.load(ex.journal)
                if not budget.line.at_once(partial(budget.admit, held)):
                    await budget.line.wait(partial(budget.admit, held))
                # From here on the note in the journal says it, to this process and to others.
                budget.settle(held, at_most)
                counted_in.append(budget)
            if settings.budget is None:
                await ex.journal.acommit([held.row()], fence=ex.fence)
            else:
                period, pause = budgets.period_of(ex.journal, settings.budget), 0.02
                while not await period.admit(held):
                    await asyncio.sleep(pause)
                    pause = min(pause * 1.5, 0.5)
        except BaseException:
            for budget in counted_in:
                budget.count(-at_most)
            raise
        return held

    def _given_back(self, batch: _Batch) -> list[Any]:
        """What takes back that something was set aside for a batch, which has ended or never began."""
        if not batch.row.get("held"):
            return []
        for budget in self._ex.budgets():
            budget.count(-Decimal(batch.row["at_most"]))
        return [Drop(batch.row.pop("held"))]

    # -- leaving ---------------------------------------------------------------------------------

    async def leave(self) -> bool:
        """Cancel the batches of a cancelled run, and record what they have answered; whether all have ended."""
        for key, batch in list(self._batches.items()):
            if batch.open:
                await self._guarded(self._leave(key, batch), [])
        return not any(batch.open for batch in self._batches.values())

    async def _leave(self, key: str, batch: _Batch) -> None:
        if batch.row["state"] == "intended":
            await self._look(key, batch)  # was it created at all?
        if batch.row["state"] == "created":
            await self._cancel(key, batch)
            await self._look(key, batch)

    async def _cancel(self, key: str, batch: _Batch) -> None:
        api = batching.of(batch.row["provider"])
        assert api is not None
        if "cancelled" in batch.row:
            return
        try:
            await api.cancel(batch.row["batch"])
            self._ex.say(f"batch {batch.row['batch']}: the provider was asked to cancel it")
        except ModelError as error:
            if error.status is None or not 400 <= error.status < 500 or error.status in (401, 403, 429):
                raise
            return  # it has ended, or is not there: the look tells
        batch.row["cancelled"] = now()
        await self._ex.journal.acommit([self._put(key, batch)], fence=self._ex.fence)

    # -- collecting ------------------------------------------------------------------------------

    async def _collect(self, key: str, batch: _Batch, seen: batching.Seen, results: list[batching.Result]) -> None:
        """Records each result; the commit that records the last ones says that the batch has ended."""
        ex, mark = self._ex, batch.row["mark"]
        by_occ = {result.custom_id.removesuffix(f"-{mark}"): result for result in results}
        waiting = {waiter.call.occ: waiter for waiter in self._waiters() if waiter.batch == key}
        ops: list[Any] = []
        paid: list[tuple[str, _Waiter | None, dict[str, Any], costs.Entry]] = []
        outcomes: list[tuple[_Waiter, Any]] = []

        async def record(*more: Any) -> None:
            recorded = await ex.journal.acommit([*ops, *more], fence=ex.fence, paid=True)
            fresh = {op.key for op, new in zip(ops, recorded, strict=False) if new}
            for place, waiter, raw, entry in paid:
                if place in fresh:
                    self._pay(place, waiter, None if raw["cost"] is None else Decimal(raw["cost"]), entry)
                    if waiter is not None:
                        self._tell_observers(waiter, raw)
            for waiter, outcome in outcomes:
                waiter.outcome = outcome
            for each in (ops, paid, outcomes):
                each.clear()

        for occ, member in batch.requests.items():
            waiter = waiting.get(occ)
            result = by_occ.get(occ) or batching.Result(occ, error=_unanswered(batch.row, seen))
            if result.reply is not None:
                raw, place = self._raw(batch.row, member, result), waiter.key if waiter else self._place(member, mark)
                asked = orjson.loads(ex.journal.get(f"bq/{ex.key}/{key.rpartition('/')[2]}/{occ}") or "{}")
                name = str(asked.get("step", ""))
                step = costs.outermost(waiter.current) if waiter else name
                entry = costs.batched(ex, step, name, raw, batch.row["model"], place)
                ops += [Add(place, orjson.dumps({**raw, **asked, "ledger": entry[0]}).decode()), costs.add(entry)]
                paid.append((place, waiter, raw, entry))
            else:
                assert result.error is not None
                attempt = waiter.attempt if waiter else member["attempt"]
                facts = {"message": str(result.error), "asked": member["asked"], **_facts(result.error)}
                ops.append(Add(self._error_key(occ, attempt), orjson.dumps(facts).decode()))
            if waiter is not None:
                outcomes.append((waiter, None if result.reply is not None else result.error))
            if len(ops) >= TOGETHER:
                await record()
        batch.row["state"] = "ended"
        await record(*self._given_back(batch), self._put(key, batch))
        answered = sum(result.reply is not None for result in results)
        ex.say(f"batch {seen.id}: {seen.status}, {answered} of {len(batch.requests)} requests answered")

    def _place(self, member: dict[str, Any], mark: str) -> str:
        """Where a reply that nobody waits for is recorded: where it was to be, or beside what stands there by now."""
        place: str = member["key"]
        return place if self._ex.journal.get(place) is None else f"{place}.{mark}"

    def _pay(self, place: str, waiter: _Waiter | None, cost: Decimal | None, entry: costs.Entry) -> None:
        totals = self._ex.totals
        self._ex.counted[place] = waiter.current if waiter is not None else None
        for budget in self._ex.budgets():
            budget.count(budgets.counts(entry[1]))
        if waiter is not None:
            self._ex.paid(waiter.current, cost, entry)
        elif cost is None:
            totals.unpriced += 1
        else:
            totals.paid += cost

    def _tell_observers(self, waiter: _Waiter, raw: dict[str, Any]) -> None:
        tell(
            self._ex.observers,
            lambda each: each.reply_came(waiter.call, waiter.current, waiter.body, raw),
        )

    def _raw(self, row: dict[str, Any], member: dict[str, Any], result: batching.Result) -> dict[str, Any]:
        """A reply as it is recorded; priced as a batch's."""
        body = result.reply
        assert body is not None
        parts = providers.get(row["provider"]).read(body)
        usage, model = parts.usage, parts.model or row["model"]
        tier = body.get("service_tier") or (body.get("usage") or {}).get("service_tier")
        cost: Decimal | None = None
        facts: dict[str, Any] = {}
        if tier in _TIERS and (usage.input_tokens or usage.output_tokens):
            cost, facts = ledger.price(row["provider"], model, usage, asked=row["model"], batch=True)
        return {
            "provider": row["provider"],
            "status": result.status,
            "body": body,
            "request_id": result.request_id,
            "usage": asdict(usage),
            "cost": None if cost is None else str(cost),
            "price": facts,
            "model": model,
            "at": now(),
            "asked": member["asked"],
            "batch": row["batch"],
        }


def _facts(error: ModelError) -> dict[str, Any]:
    names = ("status", "code", "retryable", "retry_after", "request_id")
    return {name: getattr(error, name) for name in names}


def _unanswered(row: dict[str, Any], seen: batching.Seen) -> ModelError:
    """The error of a request that the results of its batch do not name."""
    told = ((seen.body.get("errors") or {}).get("data") or [{}])[0].get("message")
    return ModelError(
        f"{row['provider']}: batch {seen.id} is {seen.status} and holds no answer to this request"
        + (f": {told}" if told else "."),
        code=f"batch_{seen.status}",
        retryable=seen.status == "expired",
    )

