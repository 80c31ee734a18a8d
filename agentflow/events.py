"""Events: sent from anywhere, each delivered to one wait, whether the wait or the event comes first.

``ev/<name>/<run>/<number>`` is an event that nobody has received yet; the run is ``*`` when any may. The number comes
from ``en/events``, which grows with each event in the same transaction: who has seen it unchanged has seen all events.
``w/<run>/<wait>`` is an open wait with its deadline. An event is received by moving it into the row of the wait, in one
transaction with the fence of the run; when the step's record is written the row goes. A crash in between loses nothing.
``wn/<name>/<run>/<wait>`` says which runs wait for that name: they are woken in the transaction that sends.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from agentflow import codec, rundocs
from agentflow.calls import PLAIN, Call, enclosing, here
from agentflow.capture import capture, data_digest, data_text
from agentflow.codedigest import code_of
from agentflow.durations import Duration, seconds
from agentflow.errors import EventTimeout, RunNotFound, UsageError
from agentflow.index import in_key, short
from agentflow.journal import Drop, Journal, Op, Put, Txn
from agentflow.records import UNSET, moment
from agentflow.run import Execution
from agentflow.scratch import open_journal
from agentflow.settings import log, now
from agentflow.values import once
from agentflow.waits import PENDING, Wait

_COUNT = "en/events"
ANY = "*"

Match = Callable[[Any], Any] | Mapping[str, Any] | None


class Event(NamedTuple):
    """What ``ctx.wait_for_event`` gives for a list of names: which event came, and what it carried."""

    name: str
    payload: Any


# -- sending -------------------------------------------------------------------------------------


def send_event(name: str, payload: Any = None, run_id: str | None = None) -> None:
    """Tell a run that something has happened. It is recorded when this returns, and resumes nothing by itself.

    An event waits until a ``ctx.wait_for_event`` of its name takes it, and exactly one does: without ``run_id`` the
    first that asks, in whatever run, so give the run or have the waits say what they ``match``. To tell several runs,
    send each its own: ``for run in runs.list(status="waiting"): send_event("open", run_id=run.id)``.
    Sent by a workflow's own code, in a step or outside, it is sent once, however often that code runs.

    Args:
        name: which event.
        payload: what it carries; anything that can be recorded.
        run_id: only this run may receive it; an id, or an unambiguous beginning or end of one. None: any run, also one
            that is started later.

    Raises:
        RunNotFound: there is no such run.
        UsageError: no name, or a payload that cannot be recorded.
    """
    _check_name(name, "send_event")
    text = codec.encode(payload, where="payload")
    journal = open_journal()
    target = ANY
    if run_id is not None:
        document = rundocs.find(journal, run_id)
        target = in_key(document["id"])
        if document["status"] in ("completed", "cancelled"):
            log.warning("%s · is %s: nobody waits there for event %r", document["id"], document["status"], name)
    place = here.get()
    if place is None or place.ex.scratch:
        journal.guarded(lambda txn: _send(txn, name, target, text))
        return
    ex = place.ex

    def commit(record: Op) -> None:
        def both(txn: Txn) -> None:
            if ex.fence is not None:
                txn.check(ex.fence)
            txn.apply([record])
            _send(txn, name, target, text)

        ex.journal.guarded(both)

    once(ex, "send", name, short(f"{target}\0{text}", 20), lambda: None, commit)


def _send(txn: Txn, name: str, target: str, payload: str) -> None:
    if target != ANY and txn.get(f"r/{target}") is None:
        raise RunNotFound(f"event {name!r} was not sent: its run has been purged in the meantime.")
    # The time is taken inside the transaction: events are in the order of their numbers and of their times.
    number = int(txn.get(_COUNT) or 0) + 1
    at = now()
    txn.put(_COUNT, str(number))
    txn.put(
        f"ev/{in_key(name)}/{target}/{number:016d}",
        orjson.dumps({"name": name, "payload": payload, "at": at}).decode(),
    )
    carried = codec.decode(payload)
    for _, text in list(txn.scan(f"wn/{in_key(name)}/" if target == ANY else f"wn/{in_key(name)}/{target}/")):
        row = orjson.loads(text)
        if row["match"] is None or _has(carried, codec.decode(row["match"])):
            txn.put(rundocs.wake_key(row["run"]), row["run"])


def not_received(name: str) -> list[str]:
    """The encoded payloads of the events of a name that were sent and that no wait has received yet."""
    return [orjson.loads(text)["payload"] for _, text in open_journal().scan(f"ev/{in_key(name)}/")]


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f'{what}({name!r}): an event has a name, such as "paid".')


# -- waiting -------------------------------------------------------------------------------------


def wait_call(ex: Execution, name: Any, match: Match, timeout: Duration | None, default: Any) -> Call:
    """The call behind ``ctx.wait_for_event``; checks everything before anything is waited for."""
    several = not isinstance(name, str)
    if several and (not isinstance(name, Sequence | set | frozenset) or not name):
        raise UsageError(f'ctx.wait_for_event({name!r}): a name such as "paid", or a list of names.')
    names = sorted(set(name)) if several else [name]
    for each in names:
        _check_name(each, "ctx.wait_for_event")
    limit = seconds(timeout, what="timeout")
    call = Call(ex, f"event {' | '.join(names)}", None, (), {}, PLAIN, "event")
    call.started = True
    fields: dict[str, Any] = {"names": names}
    if isinstance(match, Mapping):
        codec.encode(dict(match), where="match")
        fields["match"] = dict(match)
    elif match is not None:
        if not callable(match) or inspect.iscoroutinefunction(match):
            raise UsageError(f"ctx.wait_for_event(match={match!r}): a plain function of the payload, or a dict.")
        call.fn = match
        call.capture = capture(match)
        call.code = code_of(match)
        fields["match"] = call.capture.text
    call.given, call.digest = data_text(fields), data_digest(fields)
    call.policy = "reuse"  # it has happened, whatever the code asks for now
    call.wait = lambda: _wait(call, names, match, limit)
    call.finish = lambda outcome: _outcome(call, outcome, several, default)
    ex.locate(call, call.digest)
    call.started = False
    return call


def _wait(call: Call, names: list[str], match: Match, limit: float | None) -> Wait:
    ex = call.ex
    version = ex.own_slot(call).n + 1
    key = f"w/{ex.key}/{call.occ}.{version}"
    text = ex.journal.get(key)
    if text is None:
        at = ex.clock()
        facts = {"names": names, "at": at, "deadline": None if limit is None else at + limit, "outcome": None}
        text = orjson.dumps(facts).decode()
        # A function is asked by the run itself: it is woken whatever comes.
        own = codec.encode(dict(match), where="match") if isinstance(match, Mapping) else None
        row = orjson.dumps({"run": ex.run_id, "match": own}).decode()
        places = [Put(place, row) for place in waiting_for(key, names)]
        ex.journal.commit([Put(key, text), *places, *ex.only_waits(enclosing(call))], fence=ex.fence)
    document = orjson.loads(text)
    ex.asked_tasks.add(key)
    call.extra_ops = (*call.extra_ops, Drop(key), *(Drop(place) for place in waiting_for(key, names)))
    deadline = document["deadline"]
    info = {"kind": "event", "id": call.occ, "name": ", ".join(names), "names": names, "deadline": deadline}
    info["command"] = f"send_event({names[0]!r}, ..., run_id={ex.run_id!r})"
    receiver = _Receiver(ex, key, names, match, deadline)
    return Wait(receiver.check, info, deadline)


def waiting_for(key: str, names: list[str]) -> list[str]:
    """Where it stands that a wait (its row's key) is open, for each name that it waits for."""
    return [f"wn/{in_key(name)}/{key.removeprefix('w/')}" for name in names]


class _Receiver:
    """One wait: looks for its event, and takes it so that nobody else gets it."""

    def __init__(self, ex: Execution, key: str, names: list[str], match: Match, deadline: float | None) -> None:
        self._ex = ex
        self._key = key
        self._prefixes = [f"ev/{in_key(name)}/{target}/" for name in names for target in (ex.key, ANY)]
        self._match = match
        self._deadline = deadline
        self._seen: str | None = "?"
        self._not_mine: set[str] = set()
        self._outcome: Any = None
        # In plain code another branch's thread looks too, before it lets the run suspend.
        self._lock = threading.Lock()

    def check(self) -> Any:
        with self._lock:
            if self._outcome is None:
                self._outcome = self._look()
            if self._outcome is None:
                return PENDING
            if self._outcome.get("expired"):
                return self._outcome
            return self._outcome | {"payload": codec.decode(self._outcome["payload"])}

    def _look(self) -> dict[str, Any] | None:
        journal = self._ex.journal
        while True:
            late = self._deadline is not None and self._ex.clock() >= self._deadline
            count = journal.get(_COUNT)
            if count == self._seen and not late:
                return None
            if self._seen == "?" and (before := self._received(journal)) is not None:
                return before
            for number, key, event in self._events():
                if key in self._not_mine:
                    continue
                if (self._deadline is not None and event["at"] > self._deadline) or not self._fits(event):
                    self._not_mine.add(key)
                    continue
                found = journal.guarded(lambda txn, key=key, n=number: self._take(txn, key, n))  # type: ignore[misc]
                if found is not None:
                    return dict(found)
            self._seen = count
            if not late:
                return None
            expired = journal.guarded(lambda txn, count=count: self._expire(txn, count))  # type: ignore[misc]
            if expired is not None:
                return dict(expired)

    def _received(self, journal: Journal) -> dict[str, Any] | None:
        text = journal.get(self._key)
        outcome: dict[str, Any] | None = orjson.loads(text)["outcome"] if text is not None else None
        return outcome

    def _events(self) -> list[tuple[str, str, dict[str, Any]]]:
        found = []
        for prefix in self._prefixes:
            found += [(key.rpartition("/")[2], key, orjson.loads(text)) for key, text in self._ex.journal.scan(prefix)]
        return sorted(found, key=lambda each: each[0])

    def _fits(self, event: dict[str, Any]) -> bool:
        if self._match is None:
            return True
        payload = codec.decode(event["payload"])
        if callable(self._match):
            return bool(self._match(payload))
        return _has(payload, self._match)

    def _take(self, txn: Txn, key: str, number: str) -> dict[str, Any] | None:
        document = self._mine(txn)
        if document["outcome"] is None:
            text = txn.get(key)
            if text is None:  # another wait was faster
                return None
            document["outcome"] = orjson.loads(text) | {"number": number, "key": key}
            txn.put(self._key, orjson.dumps(document).decode())
            txn.drop(key)
        outcome: dict[str, Any] = document["outcome"]
        return outcome

    def _expire(self, txn: Txn, count: str | None) -> dict[str, Any] | None:
        document = self._mine(txn)
        if document["outcome"] is None:
            if txn.get(_COUNT) != count:  # one was sent since we looked, perhaps in time
                return None
            document["outcome"] = {"expired": True, "deadline": self._deadline}
            txn.put(self._key, orjson.dumps(document).decode())
        outcome: dict[str, Any] = document["outcome"]
        return outcome

    def _mine(self, txn: Txn) -> dict[str, Any]:
        if self._ex.fence is not None:
            txn.check(self._ex.fence)
        return dict(orjson.loads(txn.get(self._key) or '{"outcome":null}'))


def _has(payload: Any, fields: Mapping[str, Any]) -> bool:
    return all(_field(payload, name) == value for name, value in fields.items())


def _field(payload: Any, name: str) -> Any:
    if isinstance(payload, Mapping):
        return payload.get(name, UNSET)
    return getattr(payload, name, UNSET)


def _outcome(call: Call, outcome: dict[str, Any], several: bool, default: Any) -> Any:
    """What the workflow gets for a recorded outcome, the first time and on replay."""
    if not outcome.get("expired"):
        return Event(outcome["name"], outcome["payload"]) if several else outcome["payload"]
    if default is not UNSET:
        return default
    when = moment(outcome["deadline"])
    error = EventTimeout(
        f"{call.name} did not come to {call.ex.run_id} before its deadline, {when:%Y-%m-%d %H:%M:%S} UTC. "
        "default= would have been returned instead."
    )
    error.event, error.run_id, error.deadline = call.name.removeprefix("event "), call.ex.run_id, when
    raise error


def give_back(ex: Execution) -> list[Op]:
    """Operations that free what waits of the completed run had received and never handed out.

    A row that is there still has no record: its wait was cancelled, or the code does not ask for it any more.
    """
    ops: list[Op] = []
    for key, text in ex.journal.scan(f"w/{ex.key}/"):
        document = orjson.loads(text)
        outcome = document["outcome"]
        ops += [Drop(key), *(Drop(place) for place in waiting_for(key, document["names"]))]
        if outcome is not None and not outcome.get("expired"):
            event = {name: outcome[name] for name in ("name", "payload", "at")}
            ops.append(Put(outcome["key"], orjson.dumps(event).decode()))
    return ops
