"""One model call: everything that can be wrong is found before it is sent, every reply is saved before it is read.

``prepare`` makes the call from what the user wrote and spends nothing. ``converse`` makes one attempt:
it takes the replies that were paid for already, posts what is missing, saves each reply before it
looks at it, and asks again where a reply does not validate. ``finish`` makes the value from what
``converse`` gave, the first time and on replay. Retrying is the caller's: see ``is_transient``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol, get_args, get_origin

from agentflow import background as in_background
from agentflow import outputtypes, providers, schema
from agentflow import tools as tools_
from agentflow.calls import Unanswered
from agentflow.durations import Duration, seconds
from agentflow.errors import ContentFiltered, InvalidReply, ModelError, Refused, Truncated, UsageError
from agentflow.files import load as load_files
from agentflow.files import shortened
from agentflow.models import Reply, Usage
from agentflow.prompts import Prompt
from agentflow.providers.common import Ask, Parts, digest

RETRY_ATTEMPTS = 3


@dataclass(slots=True)
class Call:
    """A call, ready to be made.

    Attributes:
        request: ``provider``, ``model``, ``body`` and for repeated draws ``sample``: canonical plain
            JSON; ``identity`` is its recorded form, whose digest tells one call from another.
        output_type: the type asked for, ``Reply`` and ``Reply[T]`` as they were written.
        reask: how many times a reply that does not validate is asked about again.
        timeout: seconds for one POST, or for all the waiting in the background; None leaves it to the provider's file.
        name: the name of the step.
        tools: what the model may call; a call with tools is made turn by turn, by ``agent.py``.
        max_turns: how many turns such a call may take; no part of what is asked.
        background: whether the provider is left with the call and asked for its reply later; no part of what is asked.
        batch: whether the reply is to come with a batch; no part of what is asked.
        max_tokens: the limit of output tokens that the caller named; None for none.
    """

    request: dict[str, Any]
    output_type: Any
    reask: int
    timeout: float | None
    name: str
    tools: tuple[tools_.Spec, ...] = ()
    max_turns: int = 10
    background: bool = False
    batch: bool = False
    max_tokens: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The request as it is recorded and told from others: files stand as the digest of their content."""
        made: dict[str, Any] = shortened(self.request)
        return made


class Recorder(Protocol):
    """Where replies are kept; the engine's side of :func:`converse`. ``flight`` keeps the ids of background calls."""

    flight: in_background.Flight

    def later(self, provider: str, body: dict[str, Any]) -> Unanswered:
        """What leaves this attempt until a batch has brought the reply to ``body``."""

    def replies(self) -> list[dict[str, Any]]:
        """Replies that were paid for this call already and may be used now, oldest first."""

    def sending(self, body: dict[str, Any], max_tokens: int | None) -> AbstractAsyncContextManager[Any]:
        """Stands around one POST and the saving of its reply; may wait, or refuse, before it is entered.

        ``max_tokens`` is the limit of output tokens that the caller named, None for none.
        """

    async def save(self, raw: dict[str, Any], *, body: dict[str, Any]) -> None:
        """Keeps a reply with the body that it answers; durable when it returns."""


def prepare(
    prompt: str | Prompt | Sequence[Mapping[str, Any]],
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
    max_turns: int = 10,
    reask: int = 1,
    sample: int = 0,
    background: bool = False,
    batch: bool = False,
    on_text: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Call:
    """The call that these arguments describe; sends nothing. The arguments are ``generate_content``'s.

    Raises:
        UsageError: an argument cannot mean anything, or has no form in the provider's API.
        UnknownModel: no model is named anywhere, or no provider knows it.
    """
    if isinstance(prompt, Prompt):
        max_tokens = prompt.max_tokens if max_tokens is None else max_tokens
        temperature = prompt.temperature if temperature is None else temperature
        reasoning = prompt.reasoning if reasoning is None else reasoning
        extra = {**(prompt.extra or {}), **(extra or {})}
        output_type = _output_of(prompt, output_type)
    box = tools_.toolbox(tools)
    if on_text is not None and not callable(on_text):
        raise UsageError(f"on_text={on_text!r}: a function of one text, sync or async.")
    _counts(max_tokens=max_tokens, reask=reask, sample=sample, max_turns=max_turns)
    if temperature is not None and (isinstance(temperature, bool) or not isinstance(temperature, int | float)):
        raise UsageError(f"temperature={temperature!r} is not a number.")
    if reasoning is not None and not isinstance(reasoning, str | dict):
        raise UsageError(
            f'reasoning={reasoning!r}: write a word such as "low", or the provider\'s own settings as a dict.'
        )
    limit = seconds(timeout, what="timeout")
    if limit == 0:
        raise UsageError("timeout=0 leaves no time for an answer. Write seconds, or None for the default.")
    if system is not None and not isinstance(system, str):
        raise UsageError(f"system={str(system)[:80]!r} is not text.")
    if isinstance(prompt, Prompt):
        system = prompt.system if system is None else system
        model = prompt.model if model is None else model
        name = prompt.name if name is None else name
        prompt = [*prompt.earlier, {"role": "user", "content": prompt.text}] if prompt.earlier else prompt.text
    provider_name, model_name = providers.resolve(model)
    own_system, messages = _messages(prompt, data)
    shown = load_files(files)
    provider = providers.get(provider_name)
    in_background.check(background, provider_name, provider, extra)
    _check_batch(batch, background, tools, provider_name)
    wanted = _wanted(output_type)
    body = provider.body(
        Ask(
            model=model_name,
            messages=messages,
            system=own_system if system is None else system,
            output=None if wanted is str else schema.output(wanted),
            max_tokens=max_tokens,
            temperature=temperature,
            reasoning=reasoning,
            files=shown,
            tools=box,
        )
    )
    request: dict[str, Any] = {"provider": provider_name, "model": model_name, "body": _with_extra(body, extra or {})}
    if sample:
        request["sample"] = sample
    return Call(
        request=_canonical(request),
        output_type=output_type,
        reask=reask,
        timeout=limit,
        name=name or "generate_content",
        tools=box,
        max_turns=max_turns,
        background=background,
        batch=batch,
        max_tokens=max_tokens,
    )


async def converse(call: Call, recorder: Recorder, listener: Listener | None = None) -> dict[str, Any]:
    """One attempt. Replies of the recorder first, then one POST for each that is missing.

    ``listener`` hears the text as it is written; None does not stream.

    Every reply that arrives is saved before anything looks at it. The first recorded reply is used as
    it is; one that answers a question about an earlier reply only where that question is the same.

    Returns:
        Plain JSON data for :func:`finish`, to be recorded as the call's outcome. Where the model asks for tools
        that it was given, ``calls`` lists what it asks for: ``id``, ``name`` and ``arguments`` of each.

    Raises:
        Truncated, Refused, ContentFiltered, InvalidReply: what came is in ``.reply``.
        ModelError: no usable answer came.
    """
    provider = providers.get(call.request["provider"])
    body = call.request["body"]
    paid = recorder.replies()
    added: list[dict[str, Any]] = []
    usage, cost = Usage(), Decimal(0)
    known = True
    turn = 0
    while True:
        found = paid[:1] if turn == 0 else [raw for raw in paid if raw.get("asked") == digest(body)]
        if found:
            raw = found[0]
        else:
            paid = []
            if call.batch:  # nothing is sent here, so nothing is set aside, nor in doubt
                raise recorder.later(call.request["provider"], body)
            async with recorder.sending(body, call.max_tokens):
                raw = await _ask(call, provider, body, recorder, listener, added)
        usage += Usage(**raw["usage"])
        known = known and raw["cost"] is not None
        cost += Decimal(raw["cost"] or 0)
        parts = _read(provider, raw)
        if listener is not None:
            await listener.end(parts.text)
        added = [*added, *parts.items]
        final = {
            "text": parts.text,
            "finish_reason": parts.finish_reason,
            "model": raw["model"],
            "usage": {name: getattr(usage, name) for name in Usage.__slots__},
            "cost": str(cost) if known else None,
            "added": added,
        }
        _stop_unless_answered(call, raw, parts, final)
        if call.tools and parts.calls:
            return {**final, "calls": parts.calls}
        try:
            schema.validate(parts.text, _wanted(call.output_type))
            return final
        except schema.Mismatch as exc:
            if turn >= call.reask:
                raise _invalid(call, final, exc, raw) from exc
            question = f"Your reply does not have the form that was asked for:\n{exc}\nReply again, corrected, in full."
        added = [*added, {"role": "user", "content": question}]
        body = provider.next_turn(call.request["body"], added)
        turn += 1


async def _ask(
    call: Call,
    provider: Any,
    body: dict[str, Any],
    recorder: Recorder,
    listener: Listener | None,
    added: list[dict[str, Any]],
) -> dict[str, Any]:
    """One POST; its reply is saved before anybody looks at it."""
    try:
        raw: dict[str, Any] = await (
            in_background.answer(provider, body, call.timeout, recorder.flight)
            if call.background
            else provider.send(body, call.timeout)
            if listener is None
            else provider.send(body, call.timeout, on_text=listener)
        )
    except ModelError as exc:
        _keep_partial(call, provider, exc, added)
        raise
    await recorder.save(raw, body=body)
    return raw


def fits(call: Call, raw: dict[str, Any]) -> bool:
    """Whether a reply is one that the call could be answered with, or asks for its tools."""
    try:
        parts = _read(providers.get(call.request["provider"]), raw)
        if call.tools and parts.calls:
            return True
        schema.validate(parts.text, _wanted(call.output_type))
    except (ModelError, schema.Mismatch):
        return False
    return True


class Listener:
    """Hands text to the user's function, in one attempt.

    What that raises is kept in ``error`` and never breaks the attempt: the answer is good and paid for, so it is
    recorded as such before the caller sees the error.
    """

    def __init__(self, on_text: Any) -> None:
        self.error: Exception | None = None
        self._on_text = on_text
        self._heard = False

    async def __call__(self, text: str) -> None:
        self._heard = True
        if self.error is not None:
            return
        try:
            waiting = self._on_text(text)
            if inspect.isawaitable(waiting):
                await waiting
        except Exception as exc:
            self.error = exc

    async def end(self, text: str) -> None:
        """A turn is recorded: hands over what was not streamed."""
        if not self._heard and text:
            await self(text)
        self._heard = False


def _keep_partial(call: Call, provider: Any, error: ModelError, added: list[dict[str, Any]]) -> None:
    """What a broken stream had brought goes into the error as its ``reply``, and so into the record."""
    came = error.__dict__.pop("came", None)
    if came is None:
        return
    parts: Parts = provider.read(came)
    if not parts.text:
        return
    error.reply = _reply(
        call,
        {
            "text": parts.text,
            "usage": {name: getattr(parts.usage, name) for name in Usage.__slots__},
            "cost": None,
            "model": parts.model or call.request["model"],
            "finish_reason": "interrupted",
            "added": added,
        },
        None,
    )


def finish(call: Call, final: dict[str, Any]) -> Any:
    """The value of the call: text, an instance of the type, or a ``Reply``.

    Raises:
        InvalidReply: the text does not validate, as when the type was edited since.
    """
    wanted = _wanted(call.output_type)
    try:
        value = schema.validate(final["text"], wanted)
    except schema.Mismatch as exc:
        raise _invalid(call, final, exc) from exc
    if call.output_type is Reply or get_origin(call.output_type) is Reply:
        return _reply(call, final, value)
    return value


def is_transient(exc: BaseException) -> bool:
    """Whether a new attempt may help: overload, rate limits, broken connections, timeouts."""
    return isinstance(exc, ModelError) and exc.retryable


def retry_after(exc: BaseException) -> float | None:
    """Seconds the provider asked to wait before the next attempt; None where it did not say."""
    return exc.retry_after if isinstance(exc, ModelError) else None


def _check_batch(batch: bool, background: bool, tools: Sequence[Any], provider: str) -> None:
    if not isinstance(batch, bool):
        raise UsageError(f"batch={batch!r} is not True or False.")
    if batch and background:
        raise UsageError("batch=True and background=True are two ways to wait for a reply. Use one of them.")
    if batch and tools:
        raise UsageError("batch=True with tools= would take a batch for each turn. Use one of them. Nothing was sent.")
    if batch and provider not in providers.BATCHING:
        raise UsageError(
            f"batch=True needs the batch API of OpenAI or Anthropic; {provider} can only be asked at once. Nothing was "
            "sent."
        )


def _counts(**counts: int | None) -> None:
    for name, value in counts.items():
        least = 0 if name in ("reask", "sample") else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{name}={value!r} is not a whole number of {least} or more.")


def _wanted(output_type: Any) -> Any:
    """The type of the answer itself: ``Reply`` asks for text, ``Reply[T]`` for a T."""
    if output_type is Reply:
        return str
    if get_origin(output_type) is Reply:
        return get_args(output_type)[0]
    return output_type


def _output_of(prompt: Prompt, output_type: Any) -> Any:
    """The type to ask for: the prompt's where the call asks for text, which is what it says by saying nothing."""
    if prompt.output is None or output_type not in (str, Reply):
        return output_type
    found = outputtypes.named(prompt.output, prompt.path or "Prompt")
    reply_of: Any = Reply
    return found if output_type is str else reply_of[found]


def _messages(prompt: Any, data: Any) -> tuple[str | None, list[dict[str, Any]]]:
    """The system message and the others, ``data`` shown after the last one."""
    block = "" if data is None else "<data>\n" + schema.show(data).replace("</data", "<\\/data") + "\n</data>"
    if isinstance(prompt, str):
        text = "\n\n".join(part for part in (prompt, block) if part)
        if not text.strip():
            raise UsageError("The prompt is empty. Nothing was sent.")
        return None, [{"role": "user", "content": text}]
    if isinstance(prompt, Reply):
        raise UsageError('The prompt is a Reply. Write [*reply.messages, {"role": "user", "content": "..."}].')
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        raise UsageError(f"prompt={str(prompt)[:80]!r}: write text, a Prompt, or a list of messages.")
    messages = []
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not ("role" in message or "type" in message):
            raise UsageError(
                f'prompt[{index}] is no message: {str(message)[:80]!r}. Write {{"role": "user", "content": "..."}}.'
            )
        messages.append(dict(message))
    system = []
    while messages and messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str):
        system.append(messages.pop(0)["content"])
    if not messages:
        raise UsageError("The prompt holds no message but the system's. Nothing was sent.")
    if block:
        last = messages[-1]
        if last.get("role") == "user" and isinstance(last.get("content"), str):
            messages[-1] = {**last, "content": f"{last['content']}\n\n{block}"}
        else:
            messages.append({"role": "user", "content": block})
    return "\n\n".join(system) if system else None, messages


def _with_extra(body: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for key in extra:
        if key in body:
            raise UsageError(f"extra[{key!r}] is set by the call itself already. Use the argument of generate_content.")
        if key in ("stream", "background") and extra[key]:
            hint = "write background=True" if key == "background" else "the reply has to arrive whole to be recorded"
            raise UsageError(f"extra[{key!r}] is not possible: {hint}.")
    return {**body, **extra}


def _canonical(request: dict[str, Any]) -> dict[str, Any]:
    """A copy in plain JSON, so that nothing the caller still holds can change what was asked."""
    try:
        text = json.dumps(request, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError) as exc:
        raise UsageError(f"The request cannot be written as JSON: {exc}. Look at prompt= and extra=.") from exc
    copied: dict[str, Any] = json.loads(text)
    return copied


def _read(provider: Any, raw: dict[str, Any]) -> Parts:
    if not isinstance(raw["body"], dict):
        raise ModelError(
            f"{raw['provider']}: status {raw['status']}, but no JSON object came: {str(raw['body'])[:200]!r}",
            status=raw["status"],
            code="not_json",
            retryable=str(raw["body"]).lstrip().startswith("{"),  # JSON that was cut off; a page stays a page
            request_id=raw.get("request_id"),
        )
    parts: Parts = provider.read(raw["body"])
    return parts


def _stop_unless_answered(call: Call, raw: dict[str, Any], parts: Parts, final: dict[str, Any]) -> None:
    """Raises for a reply that is none; it is kept as ``.reply``."""
    error: ModelError
    reason = parts.finish_reason
    if parts.failure is not None:
        error = parts.failure
    elif parts.refusal is not None:
        error = Refused(f"{raw['model']} refused: {parts.refusal[:300]}", code="refusal")
    elif reason == "length":
        error = Truncated(
            f"{raw['model']} was cut off after {raw['usage']['output_tokens']} output tokens: raise max_tokens=, "
            "or ask for less.",
            code="length",
        )
    elif reason == "content_filter":
        error = ContentFiltered(f"{raw['model']}: the provider's content filter stopped the reply.", code=reason)
    elif reason in ("", "pause_turn"):
        # A reply without a reason to stop was cut off on its way; it only looks complete.
        error = ModelError(
            f"{raw['model']}: the reply is not complete ({reason or 'no reason to stop'}).", code="incomplete"
        )
    else:
        return
    error.reply = _reply(call, {**final, "text": parts.text or parts.refusal or ""}, None)
    error.status = raw["status"]
    error.request_id = raw.get("request_id")
    raise error


def _invalid(call: Call, final: dict[str, Any], exc: Exception, raw: dict[str, Any] | None = None) -> InvalidReply:
    wanted = _wanted(call.output_type)
    return InvalidReply(
        f"The reply does not validate against {getattr(wanted, '__name__', wanted)}:\n{exc}",
        reply=_reply(call, final, None),
        status=raw["status"] if raw else 200,
        code="invalid_reply",
        request_id=raw.get("request_id") if raw else None,
    )


def reply_of(call: Call, final: dict[str, Any]) -> Reply[Any]:
    """What came so far, for an error to carry."""
    return _reply(call, final, None)


def _reply(call: Call, final: dict[str, Any], value: Any) -> Reply[Any]:
    provider = providers.get(call.request["provider"])
    return Reply(
        output=value,
        text=final["text"],
        messages=[*provider.messages(call.request["body"]), *final["added"]],
        usage=Usage(**final["usage"]),
        cost=None if final["cost"] is None else Decimal(final["cost"]),
        model=final["model"],
        finish_reason=final["finish_reason"],
    )
