"""``generate_content``: a model call as a step of its own. Its request is what it was given.

With tools it is a step around others: what the tools hold counts as given too, see ``agent.py``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, TypeVar, overload

import orjson

from agentflow import agent, batches, codedigest, costs, generate, moments, otherform, prompts, sending
from agentflow import files as files_in_records
from agentflow.background import Flight
from agentflow.calls import PLAIN, Call, Current, Options, Unanswered, enclosing, here
from agentflow.capture import capture, data_digest, data_text
from agentflow.codedigest import code_of
from agentflow.durations import Duration
from agentflow.errors import UsageError
from agentflow.portal import portal, result_of
from agentflow.providers.common import digest
from agentflow.records import Retry, retry_of
from agentflow.scratch import scratch

T = TypeVar("T")


class _Recorder:
    """Keeps each reply the moment it arrives, and finds what an earlier attempt had paid for."""

    def __init__(self, call: Call, current: Current, prepared: generate.Call) -> None:
        self._call = call
        self._current = current
        self._prepared = prepared
        ex = call.ex
        self._epoch = f"{call.here.epoch}.{current.sample}"
        self._prefix = f"m/{ex.key}/{call.occ}/{self._epoch}/"
        self._count = 0
        self.flight = Flight(ex, call.occ, call.name, current)
        self._ticket: sending.Ticket | None = None

    def replies(self) -> list[dict[str, Any]]:
        ex = self._call.ex
        if self._new() and not ex.counted:
            return []
        rows = [(key, orjson.loads(text)) for key, text in ex.journal.scan(self._prefix)]
        self._count = len(rows)
        found = [raw for _, raw in rows] or self._unseen() or self._of_another_form()
        # What a batch has brought to this very attempt is counted already.
        lent = [raw for key, raw in rows if ex.counted.get(key) is not self._current] if rows else found
        ex.counted |= {key: self._current for key, _ in rows}
        # What an earlier attempt of this execution has paid for is no replay.
        paid_now = [raw["ledger"] in ex.entered for raw in lent]
        for step in self._around() if lent else ():
            step.lent += paid_now.count(False)
            step.used_model = True
        for raw, now in zip(lent, paid_now, strict=True):
            text = ex.journal.get(raw["ledger"])
            if text is not None:
                self._current.stands_on((raw["ledger"], orjson.loads(text)))
            if raw["cost"] is not None:
                split = {costs.model_of(self._call.request): Decimal(raw["cost"])}
                if not now:
                    ex.saved(costs.outermost(self._current), split)
                for step in self._around():
                    step.spent(split)
        return found

    def _around(self) -> list[Current]:
        return [self._current, *enclosing(self._call)]

    def _unseen(self) -> list[dict[str, Any]]:
        """Replies to an attempt of the steps around that had ended while its call was in flight: nobody saw them."""
        ex, slot = self._call.ex, self._call.slot
        if slot is None or (n := ex.newest(slot)) is None:
            return []
        head = ex.records.row(slot, n).head
        if not head.get("late") or head["epoch"] == self._call.here.epoch:
            return []
        prefix = f"m/{ex.key}/{self._call.occ}/{head['epoch']}.{head['sample']}/"
        return [orjson.loads(text) for _, text in ex.journal.scan(prefix)]

    def _of_another_form(self) -> list[dict[str, Any]]:
        """The one reply to try: the newest that fits the type as it is now, or the newest."""
        found = otherform.replies(self._call, bool(self._prepared.tools))
        return [raw for raw in found if generate.fits(self._prepared, raw)][-1:] or found[-1:]

    def _new(self) -> bool:
        """Whether nothing can be on record for this call: it is first asked in a run that has just begun."""
        ex, slot = self._call.ex, self._call.slot
        if ex.prior is not None or ex.scratch or slot is None or slot.n >= 0:
            return False
        return all(step.attempt == 1 for step in self._around())

    def as_sent(self, prepared: generate.Call) -> generate.Call:
        """The call, waited for the way it was sent by an earlier attempt or process, if the provider is still at it.

        So it is not bought again, even if the code asks for it another way by now.
        """
        if self._new():
            return prepared
        if self.flight.open() is not None:
            return replace(prepared, background=True, batch=False)
        ex = self._call.ex
        if not prepared.batch and not ex.scratch and batches.of(ex).holds(self._call.occ):
            return replace(prepared, background=False, batch=True)
        return prepared

    def later(self, provider: str, body: dict[str, Any]) -> Unanswered:
        """What leaves this attempt until a batch has brought the reply to ``body``."""
        made = batches.of(self._call.ex)
        key = f"{self._prefix}{self._count:04d}"
        return Unanswered(lambda: made.wait(self._call, self._current, provider, body, key), made.forget)

    async def save(self, raw: dict[str, Any], *, body: dict[str, Any]) -> None:
        key = self._call.ex.reply_key(self._prefix, self._count)
        record = {**raw, "request": files_in_records.shortened(body), "step": self._call.name}
        assert self._ticket is not None
        await self._ticket.save(key, record)
        self._count += 1

    @contextlib.asynccontextmanager
    async def sending(self, body: dict[str, Any], max_tokens: int | None) -> AsyncIterator[None]:
        request = self._call.request
        asked = digest(body)
        async with sending.sending(
            self._call,
            self._current,
            request["provider"],
            body,
            max_tokens,
            lambda: self.flight.open(asked) is not None,
            self._prepared.background,
        ) as self._ticket:
            yield


def _transient(exc: BaseException) -> bool:
    return generate.is_transient(exc)


_RETRY = Retry(max_attempts=generate.RETRY_ATTEMPTS, initial_delay=0.5, max_delay=30, retry_if=_transient)

# A conversation is not tried again as a whole: each turn is, and what a failed one has brought is used.
_AGENT = Options(thread=False, retry=Retry(max_attempts=1, resample=False))


@overload
def generate_content(
    prompt: str | prompts.Prompt | Sequence[Mapping[str, Any]],
    *,
    output_type: type[T],
    data: Any = ...,
    model: str | None = ...,
    system: str | None = ...,
    tools: Sequence[Any] = ...,
    files: Sequence[Any] = ...,
    name: str | None = ...,
    max_tokens: int | None = ...,
    temperature: float | None = ...,
    reasoning: str | dict[str, Any] | None = ...,
    timeout: Duration | None = ...,
    retry: Retry | Mapping[str, Any] | None = ...,
    max_turns: int = ...,
    reask: int = ...,
    sample: int = ...,
    background: bool = ...,
    batch: bool = ...,
    on_text: Callable[[str], Any] | None = ...,
    extra: Mapping[str, Any] | None = ...,
) -> Coroutine[None, None, T]: ...
@overload
def generate_content(
    prompt: str | prompts.Prompt | Sequence[Mapping[str, Any]],
    *,
    data: Any = ...,
    model: str | None = ...,
    system: str | None = ...,
    tools: Sequence[Any] = ...,
    files: Sequence[Any] = ...,
    name: str | None = ...,
    max_tokens: int | None = ...,
    temperature: float | None = ...,
    reasoning: str | dict[str, Any] | None = ...,
    timeout: Duration | None = ...,
    retry: Retry | Mapping[str, Any] | None = ...,
    max_turns: int = ...,
    reask: int = ...,
    sample: int = ...,
    background: bool = ...,
    batch: bool = ...,
    on_text: Callable[[str], Any] | None = ...,
    extra: Mapping[str, Any] | None = ...,
) -> Coroutine[None, None, str]: ...
@overload
def generate_content(
    prompt: str | prompts.Prompt | Sequence[Mapping[str, Any]],
    *,
    output_type: Any,
    data: Any = ...,
    model: str | None = ...,
    system: str | None = ...,
    tools: Sequence[Any] = ...,
    files: Sequence[Any] = ...,
    name: str | None = ...,
    max_tokens: int | None = ...,
    temperature: float | None = ...,
    reasoning: str | dict[str, Any] | None = ...,
    timeout: Duration | None = ...,
    retry: Retry | Mapping[str, Any] | None = ...,
    max_turns: int = ...,
    reask: int = ...,
    sample: int = ...,
    background: bool = ...,
    batch: bool = ...,
    on_text: Callable[[str], Any] | None = ...,
    extra: Mapping[str, Any] | None = ...,
) -> Coroutine[None, None, Any]: ...
def generate_content(
    prompt: Any,
    *,
    data: Any = None,
    model: str | None = None,
    system: str | None = None,
    output_type: Any = str,
    tools: Sequence[Any] = (),
    files: Sequence[Any] = (),
    name: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    reasoning: str | dict[str, Any] | None = None,
    timeout: Duration | None = None,
    retry: Retry | Mapping[str, Any] | None = None,
    max_turns: int = 10,
    reask: int = 1,
    sample: int = 0,
    background: bool = False,
    batch: bool = False,
    on_text: Callable[[str], Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Any:
    """Ask a model, once: ``answer = await generate_content("Name three rivers.")``.

    The reply is recorded raw, synced to disk, before anything validates it. The same request in the same
    place is never paid again: after a restart, in a second run, or when only code around it was edited.

    Args:
        prompt: text, a ``Prompt``, or a list of messages (``Reply.messages`` continues a conversation). What a
            ``Prompt`` says of model, system message, output type, ``max_tokens``, ``temperature``, ``reasoning`` and
            ``extra`` holds where the call says nothing (for ``output_type``: ``str`` or ``Reply``).
        data: shown to the model after the prompt, as plain JSON. None: nothing.
        model: ``"openai:..."`` (Responses), ``"openai-chat:..."`` (Chat Completions), ``"anthropic:..."`` (Messages).
            None: ``configure(model=)`` or ``AGENTFLOW_MODEL``.
        system: the system message. None: none.
        output_type: ``str``, a pydantic model, any type a TypeAdapter takes, ``Reply`` or ``Reply[T]``.
        files: paths or bytes of images (png, jpeg, gif, webp), PDF and UTF-8 text, shown before the prompt. They
            count by content: a renamed file is the same file, and its name is not sent.
        tools: typed functions that the model may call, sync or async; ``@tool`` says more about one, and a ``@step``
            keeps its options. The model is asked again with their results until it answers. Each turn (``turn 1``,
            ``turn 2``...) and each call of a tool is a record of its own, found again after a crash. What a tool
            raises is told to the model, and so are arguments that do not fit. With ``background`` each turn is a call
            in the background. Not together with ``batch``.
        name: the step's name. None: the prompt file's, or ``generate_content``.
        max_tokens: a limit of output tokens. None: the provider's (16,000 for Anthropic, which requires one).
        temperature: only where the API takes it: Anthropic's Messages does not, which is an error before anything
            is sent; OpenAI's reasoning models answer it with an error 400, which costs nothing.
        reasoning: a word such as ``"low"``, or the provider's settings as a dict: OpenAI's ``reasoning``
            (``{"effort": "high", "summary": "auto"}``; Chat Completions takes a word only), Anthropic's ``thinking``
            (``{"type": "enabled", "budget_tokens": 4096}``) with ``"effort"`` beside it where the model has that.
            ``"none"`` turns it off.
        timeout: seconds or a duration for one POST. None: ten minutes or more. In the background: for all the waiting
            of an attempt, None without end; a call that takes longer goes on, and is waited for by the next attempt.
        retry: None: 3 attempts for transient errors, Retry-After honoured; 1 inside a step with its own retry.
        max_turns: how many turns a call with tools may take, then ``TooManyTurns``; a larger number goes on from there.
        reask: how often a reply that does not validate is asked about again.
        sample: a number that asks for a deliberate repeat of the same request.
        background: True submits the call (OpenAI Responses), records its id and looks until it has ended; after a kill
            or Ctrl-C the same call is waited for. For calls that take minutes or hours. It is no part of what is asked.
        batch: True, in a workflow: for half the price, within a day (OpenAI, Anthropic). All calls of the run that wait
            when nothing else can go on are handed over as one batch for each model, and the run is suspended: run it
            again later. A request that failed or expired is a failed attempt; ``timeout`` does not count. It is no part
            of what is asked.
        on_text: a function, sync or async, given the answer's text piece by piece as it is written, each turn and
            each new attempt from its beginning; a replay hands it the whole text at once. It is no part of what is
            asked. What it raises is raised once the answer is recorded; run again, the answer is replayed to it.
        extra: more fields of the provider's request body, such as ``top_p``. They are part of what is asked.
            ``{"cache_control": {"type": "ephemeral"}}`` marks an Anthropic prompt for the provider's cache (OpenAI
            caches by itself); to mark other places, write messages with ``cache_control`` in their blocks, which
            are sent on word for word. ``Reply.usage`` and costs tell what was written and read.

    Raises:
        UsageError, UnknownModel: before anything is sent.
        Truncated, Refused, ContentFiltered, InvalidReply, TooManyTurns, ModelError: with ``.reply`` and ``.status``.
    """
    prepared = generate.prepare(
        prompt,
        data=data,
        model=model,
        system=system,
        output_type=output_type,
        tools=tools,
        files=files,
        name=name,
        max_tokens=max_tokens,
        temperature=temperature,
        reasoning=reasoning,
        timeout=timeout,
        max_turns=max_turns,
        reask=reask,
        sample=sample,
        background=background,
        batch=batch,
        on_text=on_text,
        extra=extra,
    )
    policy = retry_of(retry)
    return _turns(prepared, policy, on_text) if prepared.tools else _once(prepared, policy, on_text)


def _once(prepared: generate.Call, policy: Retry | None, on_text: Callable[[str], Any] | None) -> Call:
    """The step of one model call, or of one turn."""
    place = here.get()
    ex = place.ex if place is not None else scratch()
    if prepared.batch and ex.scratch:
        raise UsageError(
            "batch=True needs a workflow, which can wait for the batch: put the call into a function under @workflow. "
            "Nothing was sent."
        )
    if policy is None:
        policy = None if _retrying(place.outer if place is not None else None) else _RETRY
    kind = Call if on_text is None else _Streamed
    call = kind(ex, prepared.name, None, (), {}, Options(retry=policy) if policy else PLAIN, "ai")
    call.started = True
    identity = prepared.identity
    call.request = identity
    call.given = data_text(identity)
    call.digest = data_digest(identity)
    call.policy = "error" if ex.on_change == "error" and place is not None and place.outer is None else "auto"

    listener: generate.Listener | None = None

    def adopt(call: Call) -> list[Any]:
        nonlocal prepared
        request, ops = moments.resume(call, prepared.request)
        prepared = replace(prepared, request=request)
        return ops

    if not prepared.tools:  # for its turns a conversation does that
        call.adopt = adopt

    async def ask() -> Any:
        nonlocal listener
        listener = None if on_text is None else generate.Listener(on_text)
        at = here.get()
        assert at is not None and at.outer is not None
        current = at.outer
        recorder = _Recorder(call, current, prepared)
        asked = recorder.as_sent(prepared)
        # A batch comes back here for each turn: its text is handed over once, at the end.
        final = await generate.converse(asked, recorder, None if asked.batch else listener)
        if asked.batch and listener is not None:
            await listener.end(final["text"])
        current.used_model = True
        return final

    call.fn = ask

    def finish(final: Any) -> Any:
        value = final if prepared.tools else generate.finish(prepared, final)
        if listener is not None:
            if listener.error is not None:
                raise listener.error
        elif on_text is not None and isinstance(call, _Streamed) and not ex.plan and final["text"]:
            call.tell(on_text, final["text"])
        return value

    call.finish = finish
    ex.locate(call, call.digest)
    call.started = False
    return call


def _no_function(**given: Any) -> None:
    """What stands for the loop where it is written down what an agent call was given."""


def _turns(prepared: generate.Call, policy: Retry | None, on_text: Callable[[str], Any] | None) -> Call:
    """The step of a call with tools, around its turns and their calls of tools."""
    agent.refuse_outside(prepared)
    place = here.get()
    ex = place.ex if place is not None else scratch()
    functions = tuple(spec.fn for spec in prepared.tools)
    identity = prepared.identity
    made = agent.Agent(prepared, lambda turn: _once(turn, policy, on_text), agent.perform)
    captured = capture(_no_function, (), {"request": identity, "tools": list(functions)})
    call = AgentCall(ex, prepared.name, made.run, functions, {}, _AGENT, "agent")
    call.started = True
    call.agent = made
    call.capture, call.code = captured, code_of(made.run, functions)
    call.request, call.max_turns = identity, prepared.max_turns

    def adopt(call: Call) -> list[Any]:
        nonlocal prepared
        if call.slot is None and otherform.adopt(call):
            return []
        request, ops = moments.resume(call, prepared.request)
        prepared = made.prepared = replace(prepared, request=request)
        return ops

    call.adopt = adopt
    call.given, call.digest = captured.text, captured.digest
    call.policy = "auto" if ex.on_change == "error" and place is not None and place.outer is not None else ex.on_change

    def finish(final: Any) -> Any:
        value = generate.finish(prepared, final)
        if on_text is not None and not made.ran and not ex.plan:
            for text in final["said"]:
                call.tell(on_text, text)
        return value

    call.finish = finish
    ex.locate(call, call.digest, inside=data_digest(identity))
    if captured.opaque:
        ex.say_once(f"{call.name}: not compared, having no data form: {', '.join(captured.opaque[:4])}")
    call.started = False
    return call


class _Streamed(Call):
    """A call with ``on_text``: a replay hands it the whole text before the value is given out."""

    __slots__ = ("_waiting",)
    _waiting: list[Any]
    streams = True

    def tell(self, on_text: Callable[[str], Any], text: str) -> None:
        """Hands over a text, once; what has to be awaited is, before the call returns."""
        waiting = on_text(text)
        if not inspect.isawaitable(waiting):
            return
        if hasattr(self, "_waiting"):
            self._waiting.append(waiting)
        else:  # driven by plain code
            portal.call(result_of, waiting)

    def __await__(self) -> Generator[Any, Any, Any]:
        self._waiting = []
        value = yield from super().__await__()
        for waiting in self._waiting:
            yield from waiting.__await__()
        return value


class AgentCall(_Streamed):
    """A call with tools. ``agent`` knows who performs its turns."""

    __slots__ = ("agent",)
    agent: agent.Agent


def _retrying(current: Current | None) -> bool:
    while current is not None:
        retry = current.call.options.retry
        if retry is not None and retry.max_attempts > 1 and current.call.kind in ("step", "tool"):
            return True
        current = current.parent
    return False


generate_content.__agentflow_model_call__ = True  # type: ignore[attr-defined]


def _note_prompt(path: str, digest: str) -> None:
    """A prompt file read inside a step counts as that step's code."""
    place = here.get()
    if place is not None and place.outer is not None:
        place.ex.read_prompt(place.outer, path, digest)


prompts.on_read = _note_prompt
codedigest.prompt_part = lambda name: prompts.file_digest(name) or None
