"""Questions to people: opened by a run, answered from anywhere, first decision wins.

A task is a document ``h/<task>``; ``ht/<run>/<name>/<task>`` finds a run's tasks, ``xt/open/...`` the open ones.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import orjson

from agentflow import codec, taskdocs
from agentflow import schema as schema_
from agentflow.calls import PLAIN, Call, enclosing, here
from agentflow.capture import data_digest, data_text
from agentflow.durations import Duration, seconds
from agentflow.errors import (
    HumanTaskExpired,
    NondeterministicStep,
    NotRecordable,
    StepChanged,
    TaskRejected,
    UsageError,
)
from agentflow.index import NS, in_key, short
from agentflow.journal import Drop, Journal, Put
from agentflow.records import UNSET, Decision, Escalate, HumanTask, moment
from agentflow.run import Execution
from agentflow.settings import log, settings
from agentflow.waits import PENDING, Wait

# The schema types of open tasks that this process asks for, by journal and task: answers given here are read with them.
_types: dict[tuple[str, str], Any] = {}
_TYPES = 4096


def human_call(
    type: str,
    assign_to: Any,
    data: Any,
    title: str | None,
    schema: Any,
    timeout: Duration | None,
    on_timeout: Any,
    remind: Duration | None = None,
    *,
    key: str | None = None,
) -> Call:
    """The call behind ``human_task``; checks everything before a task is opened.

    ``key`` tells apart tasks that show the same; it is not shown.
    """
    if not isinstance(type, str) or not type.strip():
        raise UsageError(f'human_task(type={type!r}): a word such as "approve", "review" or "input".')
    names = [assign_to] if isinstance(assign_to, str) or assign_to is None else assign_to
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str) and name for name in names if name is not None
    ):
        raise UsageError(f"human_task(assign_to={assign_to!r}): a name, a list of names, or None for anybody.")
    if title is not None and not isinstance(title, str):
        raise UsageError(f"human_task(title={title!r}) is not text.")
    limit = seconds(timeout, what="timeout")
    if isinstance(on_timeout, Escalate) and limit is None:
        raise UsageError("human_task(on_timeout=Escalate(...)) needs a timeout= that can be over.")
    if (every := seconds(remind, what="remind")) == 0:
        raise UsageError('human_task(remind=0): how often, such as "1d". None reminds nobody.')
    place = here.get()
    if place is None or place.ex.scratch:
        raise UsageError(
            "human_task needs a workflow, which can wait for the answer: put it into a function under @workflow."
        )
    shown = codec.encode(data, where="data")
    form = _form(schema)
    fields = {"type": type, "assign_to": assign_to, "title": title, "data": data, "schema": form}
    if key is not None:
        fields["key"] = key
    ex = place.ex
    call = Call(ex, title or type, None, (), {}, PLAIN, "human")
    call.started = True
    call.given = data_text(fields)
    call.digest = data_digest(fields)
    facts = {
        "type": type,
        "assign_to": assign_to,
        "title": title,
        "schema": form,
        "data": shown,
        "digest": data_digest(data),
        "escalate": taskdocs.ladder(on_timeout),
        "remind": every,
    }
    call.wait = lambda: _wait(call, facts, limit, schema=schema, keyed=key is not None)
    call.finish = lambda outcome: _outcome(call, outcome, schema, on_timeout)
    ex.locate(call, call.digest)
    call.started = False
    return call


def _form(schema: Any) -> dict[str, Any] | None:
    if schema is None:
        return None
    try:
        return schema_.form(schema)
    except Exception as error:
        raise UsageError(f"human_task(schema={schema!r}) is no type that can be filled in: {error}") from error


def task_id(call: Call, again: int = 0) -> str:
    slot = call.ex.own_slot(call)
    return id_of_task(call.ex.run_id, slot.id, slot.n + 1, again)


def id_of_task(run_id: str, slot: str, version: int, again: int = 0) -> str:
    """The id of the task that is asked for at a slot, for the record of this version."""
    return "t-" + short(f"{run_id}/{slot}.{version}" + (f"~{again}" if again else ""), 10)


def command(ident: str, form: dict[str, Any] | None, kind: str = "") -> str:
    """What to type to answer a task."""
    if form is None and kind != "input":
        return f"agentflow tasks approve {ident}"
    if form is None:
        return f"agentflow tasks answer {ident} '...'"
    return f"agentflow tasks answer {ident} {shlex.quote(schema_.sketch(form))}"


def _wait(
    call: Call, facts: dict[str, Any], limit: float | None, again: int = 0, schema: Any = None, keyed: bool = False
) -> Wait:
    ex = call.ex
    ident = task_id(call, again)
    found = read(ex, ident)
    if (found is None or found["status"] == "withdrawn") and (same := _same_question(call)) is not None:
        ident, found = same["id"], same
    if found is None or found["status"] == "withdrawn":
        if not keyed:  # one with a key shows what a model wrote, which is recorded: no clock can be in it
            _refuse_endless(call)
        found = _open(call, ident, facts, limit)
    ex.asked_tasks.add(ident)
    call.extra_ops = (*call.extra_ops, Put(_used(ex, ident), ex.own_slot(call).id))
    info = {
        "kind": "task",
        "id": ident,
        "type": facts["type"],
        "title": facts["title"],
        "assign_to": facts["assign_to"],
        "deadline": found["deadline"],
        "command": command(ident, facts["schema"], facts["type"]),
    }
    if schema is not None:
        _types[ex.journal.id, ident] = schema
        while len(_types) > _TYPES:
            _types.pop(next(iter(_types)), None)

    def check() -> Any:
        document = _tended(ex, ident)
        if document is not None and document["outcome"] is not None:
            if schema is None or (why := _unfit(document["outcome"], schema)) is None:
                _types.pop((ex.journal.id, ident), None)
                return document["outcome"]
            document = _reopen(call, document, why)
        if document is not None:
            info.update({name: document[name] for name in ("assign_to", "deadline")})
            if document.get("remind_at") is not None:
                info["remind_at"] = document["remind_at"]
            wait.due = document["deadline"]
            # Withdrawn: the run was cancelled, which its lease tells.
            if wait.due is not None and ex.clock() >= wait.due and document["status"] == "open":
                return expire(ex, ident)
        return PENDING

    wait = Wait(check, info, found["deadline"])
    return wait


def read(ex: Execution, ident: str) -> dict[str, Any] | None:
    text = ex.journal.get(f"h/{ident}")
    return None if text is None else dict(orjson.loads(text))


def _tended(ex: Execution, ident: str) -> dict[str, Any] | None:
    """The task as it stands now; what its time has brought is recorded and told."""
    document = read(ex, ident)
    if document is None or taskdocs.reminded(taskdocs.escalated(document, ex.clock()), ex.clock()) is document:
        return document

    def tend(txn: Any) -> tuple[dict[str, Any], list[str]]:
        if ex.fence is not None:
            txn.check(ex.fence)
        before = orjson.loads(txn.get(f"h/{ident}"))
        after = taskdocs.reminded(taskdocs.escalated(before, ex.clock()), ex.clock())
        if after is not before:
            txn.put(f"h/{ident}", orjson.dumps(after).decode())
        return after, [entry["what"] for entry in after.get("trail", ())[len(before.get("trail", ())) :]]

    document, news = ex.journal.guarded(tend)
    for what in dict.fromkeys(news):
        names = document["assign_to"]
        who = names if isinstance(names, str) else ", ".join(names or ()) or "anybody"
        ex.say(f"{document['title'] or document['type']}: task {ident} {what} ({who})")
        _notify(document, what)
    return document


def _open(call: Call, ident: str, facts: dict[str, Any], limit: float | None) -> dict[str, Any]:
    ex, now = call.ex, call.ex.clock()
    document = {
        "id": ident,
        "run_id": ex.run_id,
        "workflow": ex.workflow,
        "step": call.name,
        "status": "open",
        "created_at": now,
        "deadline": None if limit is None else now + limit,
        "given": call.given,
        "outcome": None,
        **facts,
    }
    document["remind_at"] = None if facts.get("remind") is None else now + facts["remind"]
    earlier = read(ex, ident)  # withdrawn before: what happened to it then stays in the trail
    document["trail"] = list(earlier.get("trail", ())) if earlier else []
    document = taskdocs.noted(document, "opened", now, assign_to=facts["assign_to"], digest=facts["digest"])
    ex.journal.commit(
        [
            Put(f"h/{ident}", orjson.dumps(document).decode()),
            Put(f"ht/{ex.key}/{call.ident[:NS]}/{ident}", ""),
            Put(open_key(document), ident),
            *ex.only_waits(enclosing(call)),
        ],
        fence=ex.fence,
    )
    _notify(document, "opened")
    return document


def _notify(document: dict[str, Any], event: str) -> None:
    if settings.notify is not None:
        try:
            settings.notify(task_of(document, event))
        except Exception:  # a notifier that fails must not lose the task, which is open and listed
            log.exception("configure(notify=...) failed for task %s", document["id"])


def _unfit(outcome: dict[str, Any], schema: Any) -> str | None:
    """Why an answer that was taken elsewhere, by its JSON schema alone, is none for the type itself."""
    if outcome.get("expired") or not outcome["approved"]:
        return None
    try:
        schema_.fit(decision_of(outcome).data, schema)
    except (schema_.Mismatch, NotRecordable) as error:
        return str(error)
    return None


def _reopen(call: Call, refused: dict[str, Any], why: str) -> dict[str, Any]:
    """Ask again, keeping the answer that does not fit; the deadline stays."""
    ex, outcome = call.ex, refused["outcome"]

    def reopen(txn: Any) -> dict[str, Any] | None:
        document: dict[str, Any] = orjson.loads(txn.get(f"h/{refused['id']}"))
        if document["outcome"] != outcome:  # another thread of this run was faster
            return None
        document["refused"] = [*document.get("refused", ()), outcome | {"why": why}]
        document |= {"status": "open", "outcome": None}
        document = taskdocs.noted(document, "reopened", ex.clock(), by=outcome.get("by"), why=why)
        txn.put(f"h/{document['id']}", orjson.dumps(document).decode())
        txn.put(open_key(document), document["id"])
        return document

    document = ex.journal.guarded(reopen)
    if document is None:
        return refused | {"deadline": None}  # looked at again in a moment
    by = outcome.get("by") or "somebody"
    ex.warn(f"{call.name}: the answer by {by} to task {refused['id']} does not fit, so the task is open again: {why}")
    _notify(document, "reopened")
    return document


def open_key(document: dict[str, Any]) -> str:
    return f"xt/open/{int(document['created_at'] * 1000):014d}-{document['id']}"


def _used(ex: Execution, ident: str) -> str:
    """Where it stands which record holds a task's outcome; nothing there while none does."""
    return f"hu/{ex.key}/{ident}"


def _same_question(call: Call) -> dict[str, Any] | None:
    """A task of this run that shows the very same and that no record holds: an edit elsewhere asks nobody again."""
    ex = call.ex
    if ex.prior is None or call.kind != "human":
        return None
    base = f"ht/{ex.key}/{call.ident[:NS]}/"
    idents = [key[len(base) :] for key, _ in ex.journal.scan(base)]
    found = [read(ex, ident) for ident in idents if ident not in ex.asked_tasks]
    same = [
        other for other in found
        if other is not None and other["given"] == call.given and other["status"] != "withdrawn"
        and ex.journal.get(_used(ex, other["id"])) is None
    ]  # fmt: skip
    return min(same, key=lambda other: float(other["created_at"]), default=None)


def _refuse_endless(call: Call) -> None:
    """A clock in the data would ask again after every answer: refuse, naming the field."""
    from agentflow.compare import differences, unified

    ex = call.ex
    if ex.prior in (None, "completed", "failed") or not ex.same_code or ex.totals.ran > 0:
        return
    base = f"ht/{ex.key}/{call.ident[:NS]}/"
    for key, _ in ex.journal.scan(base):
        other = read(ex, key[len(base) :])
        if other is None or other["id"] in ex.asked_tasks or other["status"] in ("open", "withdrawn", "expired"):
            continue
        holder = ex.journal.get(_used(ex, other["id"]))
        if any(slot.claimed and slot.id == holder for slot in ex.records.named(call.ident[:NS])):
            continue
        found = differences(other["given"], call.given)
        error = NondeterministicStep(
            f"task {other['id']} ({call.name!r}) of {ex.run_id} is decided already, and now it is asked for with other "
            f"data although nothing was edited:\n{unified(found)}\nTake what differs ("
            f"{', '.join(d.path for d in found[:3])}) from a step, ctx.now() or ctx.uuid4(), so that it stays the same."
        )
        error.step, error.run_id = call.name, ex.run_id
        raise error


def expire(ex: Execution, ident: str) -> dict[str, Any]:
    """Close a task whose deadline has passed, unless a decision came first."""

    def close(txn: Any) -> dict[str, Any]:
        if ex.fence is not None:
            txn.check(ex.fence)
        document = orjson.loads(txn.get(f"h/{ident}"))
        if document["status"] == "open":
            document = taskdocs.closed(document, "expired", document["deadline"])
            document["outcome"] = {"expired": True, "deadline": document["deadline"]}
            txn.put(f"h/{ident}", orjson.dumps(document).decode())
            txn.drop(open_key(document))
        return dict(document["outcome"])

    return ex.journal.guarded(close)


def withdraw(ex: Execution, status: str) -> list[Any]:
    """Operations that withdraw the run's open tasks which its code does not ask for any more; all, once it is over."""
    ops: list[Any] = []
    for key, _ in ex.journal.scan(f"ht/{ex.key}/"):
        ident = key.rpartition("/")[2]
        if ident in ex.asked_tasks and status not in ("completed", "cancelled"):
            continue
        document = read(ex, ident)
        if document is not None and document["status"] == "open":
            ops += [
                Put(f"h/{ident}", orjson.dumps(taskdocs.closed(document, "withdrawn", ex.clock())).decode()),
                Drop(open_key(document)),
            ]
    return ops


def withdrawn(journal: Journal, run_id: str, at: float) -> list[Any]:
    """Operations that withdraw all open tasks of a run that is cancelled."""
    ops: list[Any] = []
    for key, _ in journal.scan(f"ht/{in_key(run_id)}/"):
        document = orjson.loads(journal.get(f"h/{key.rpartition('/')[2]}") or "{}")
        if document.get("status") == "open":
            gone = taskdocs.closed(document, "withdrawn", at)
            ops += [Put(f"h/{document['id']}", orjson.dumps(gone).decode()), Drop(open_key(document))]
    return ops


def _outcome(call: Call, outcome: dict[str, Any], schema: Any, on_timeout: Any) -> Any:
    """What the workflow gets for a recorded outcome, the first time and on replay."""
    if outcome.get("expired"):
        while isinstance(on_timeout, Escalate):
            on_timeout = on_timeout.on_timeout
        if isinstance(on_timeout, BaseException) or (
            isinstance(on_timeout, type) and issubclass(on_timeout, BaseException)
        ):
            raise on_timeout
        if on_timeout is not UNSET:
            return on_timeout
        error = HumanTaskExpired(
            f"task {call.name!r} of {call.ex.run_id} was not answered before its deadline.", moment(outcome["deadline"])
        )
        raise error
    decision = decision_of(outcome)
    if schema is None:
        return decision
    if not decision.approved:
        rejected = TaskRejected(
            f"task {call.name!r} was rejected by {decision.by or 'somebody'}: {decision.comment or ''}"
        )
        rejected.decision = decision
        raise rejected
    try:
        return schema_.fit(decision.data, schema)
    except schema_.Mismatch as error:
        changed = StepChanged(
            f"task {call.name!r} of {call.ex.run_id} was answered by {decision.by or 'somebody'}, and its schema does "
            f"not take that answer any more: {error}. To ask again: .options(rerun=[{call.name!r}])"
        )
        changed.step, changed.run_id = call.name, call.ex.run_id
        raise changed from error


def decision_of(outcome: dict[str, Any], read: Callable[[str], Any] = codec.decode) -> Decision:
    data = read(outcome["data"]) if outcome.get("data") is not None else None
    return Decision(
        bool(outcome["approved"]), outcome.get("by"), moment(outcome.get("at")), outcome.get("comment"), data
    )


def task_of(document: dict[str, Any], event: str | None = None) -> HumanTask:
    """The task as people see it."""
    outcome = document["outcome"]
    return HumanTask(
        id=document["id"],
        run_id=document["run_id"],
        workflow=document["workflow"],
        type=document["type"],
        assign_to=document["assign_to"],
        status=document["status"],
        data=codec.look(document["data"]),
        title=document["title"],
        created_at=moment(document["created_at"]),
        deadline=moment(document["deadline"]),
        schema=document["schema"],
        decision=decision_of(outcome, codec.look) if outcome and not outcome.get("expired") else None,
        digest=document["digest"],
        trail=tuple(entry | {"at": moment(entry["at"])} for entry in document.get("trail", ())),
        event=event,
        extra={
            "step": document["step"],
            "digest": document["digest"],
            "refused": [_refused(each) for each in document.get("refused", ())],
        },
    )


def _refused(outcome: dict[str, Any]) -> dict[str, Any]:
    decision = decision_of(outcome, codec.look)
    return {"by": decision.by, "at": decision.at, "comment": decision.comment, "data": decision.data} | {
        "why": outcome["why"]
    }


def ask_in_doubt(call: Call) -> Wait:
    """The task of ``in_doubt="ask"``: did it happen, and with what result?"""
    ex = call.ex
    facts = {
        "type": "in_doubt",
        "assign_to": None,
        "title": f"Did {call.name} happen? Approve with its result as data, or reject to run it again.",
        "schema": None,
        "data": codec.encode({"step": call.name, "run_id": ex.run_id, "idempotency_key": ex.key_of(call, 0)}),
        "digest": call.digest,
    }
    # A "no" allowed one more attempt: if that is in doubt as well, people are asked anew.
    slot = ex.own_slot(call)
    asked = sum(1 for _ in ex.journal.scan(f"d/{ex.key}/{call.occ}.{slot.n + 1}.no/"))
    ex.asked_tasks.update(task_id(call, again) for again in range(asked))
    wait = _wait(call, facts, None, asked)
    inner = wait.check

    def check() -> Any:
        outcome = inner()
        return outcome if outcome is PENDING else decision_of(outcome)

    wait.check = check
    return wait


def answered(
    journal: Journal,
    document: dict[str, Any],
    approved: bool,
    by: str | None,
    at: float,
    comment: str | None,
    data: Any,
) -> dict[str, Any]:
    """What an answer changes in a task's document. Raises if the data cannot be recorded or does not fit the schema."""
    form = document["schema"]
    if form is not None and approved:
        data = _edited(document, data)
    if form is not None and approved and data is UNSET:
        raise UsageError(
            f"task {document['id']} asks for data: tasks.answer({document['id']!r}, {{...}}, by=...) or "
            f"{command(document['id'], form)}. Its form: "
            f"{', '.join(form.get('properties', {})) or form.get('type', 'any')}"
        )
    try:
        text = None if data is UNSET or data is None else codec.encode(data, where="data")
    except NotRecordable as error:
        raise UsageError(f"The answer cannot be recorded: {error}") from error
    if form is not None and approved:
        _check_form(journal, document, data, text)
    status = "rejected" if not approved else ("answered" if text is not None else "approved")
    outcome = {"approved": approved, "by": by, "at": at, "comment": comment, "data": text}
    return {"status": status, "outcome": outcome | {"digest": document["digest"]}}


def _edited(document: dict[str, Any], data: Any) -> Any:
    """An answer to a task whose data is a form filled in already: what the person changed, over what was shown."""
    form = document["schema"]
    if "properties" not in form or not (data is UNSET or isinstance(data, dict)):
        return data
    try:
        shown = schema_.plain(codec.look(document["data"]))
    except UsageError:  # no plain form: not a form that was filled in
        return data
    if not isinstance(shown, dict) or not shown or not set(shown) <= set(form["properties"]):
        return data
    if schema_.misfit(shown, form) is not None:
        return data
    return shown if data is UNSET else shown | data


def _check_form(journal: Journal, document: dict[str, Any], data: Any, text: str | None) -> None:
    """Refuse data that does not fit, where it is given: by the type, or by its JSON schema where that is not known."""
    schema = _types.get((journal.id, document["id"]))
    error = None
    if schema is not None:
        try:
            schema_.fit(None if text is None else codec.decode(text), schema)
            return
        except schema_.Mismatch as refused:
            error = refused
    # Its words are the plainer ones where both refuse.
    wrong = schema_.misfit(schema_.plain(data, "answer"), document["schema"]) or error
    if wrong is not None:
        raise UsageError(f"task {document['id']}: {wrong}.") from error
