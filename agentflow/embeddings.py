"""``embed``: texts as vectors, each text paid for once in a journal, whichever list or run it stands in.

The step of a call records which texts it asked about; the vectors themselves are records of their own, found by
provider, model, dimensions and text. A list that grew by ten texts sends those ten.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import orjson

from agentflow import providers, sending
from agentflow.aicall import _RETRY, _retrying
from agentflow.calls import PLAIN, Call, Current, Options, here
from agentflow.capture import data_digest, data_text
from agentflow.durations import Duration, seconds
from agentflow.errors import JournalIncomplete, ModelError, UsageError
from agentflow.journal import Add, Drop, Op
from agentflow.lease import process_alive, this_process
from agentflow.records import Retry, retry_of
from agentflow.scratch import scratch

_PAUSE = 0.05  # seconds between two looks for vectors that another process is paying for
MOST_TEXTS = 2048  # per request: https://platform.openai.com/docs/api-reference/embeddings/create
MOST_CHARACTERS = 600_000  # the same page allows 300,000 tokens; text of two characters a token still fits


def embed(
    texts: Sequence[str],
    *,
    model: str,
    name: str = "embed",
    dimensions: int | None = None,
    timeout: Duration | None = None,
    retry: Retry | Mapping[str, Any] | None = None,
) -> Coroutine[None, None, list[list[float]]]:
    """The vector of each text; only texts that this journal has no vector for are sent and paid.

    Vectors are recorded one by one, with the reply that brought them and before anything else happens, so ten
    texts more cost ten texts, in another list, run or workflow too. ``rerun=["embed"]`` does not ask anew for
    what is recorded: the same model gives the same text the same vector.

    Args:
        texts: non-empty texts. An empty list gives an empty list and sends nothing.
        model: such as ``"openai:text-embedding-3-small"``, or ``"ollama:nomic-embed-text"``.
        name: the name of the step.
        dimensions: length of the vectors, for models that can shorten them. None: the model's own.
        timeout: for each request; ``30``, ``"30s"``. None: the provider's ten minutes.
        retry: a ``Retry`` or its dict. None: transient errors are tried again, 3 attempts, as for
            ``generate_content``.

    Returns:
        One list of floats per text, in the order of ``texts``.

    Raises:
        UsageError: an argument cannot mean anything, or the provider has no embeddings. Nothing was sent.
        ModelError: no usable answer came; what came is recorded.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise UsageError('embed(texts) takes a list: embed(["a text"], model="openai:text-embedding-3-small").')
    for at, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise UsageError(f"embed: texts[{at}] is {text!r:.40}; every text has to be non-empty. Nothing was sent.")
    if dimensions is not None and (isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1):
        raise UsageError(f"embed: dimensions={dimensions!r} is not a number of 1 or more.")
    limit = seconds(timeout, what="timeout")
    if limit == 0:
        raise UsageError("timeout=0 leaves no time for an answer. Write seconds, or None for the default.")
    if model is None:
        raise UsageError('embed needs model=, such as "openai:text-embedding-3-small". Nothing was sent.')
    provider_name, model_name = providers.resolve(model)
    provider = providers.get(provider_name)
    if getattr(provider, "embed", None) is None:
        raise UsageError(f"{provider_name} has no embeddings; openai and servers compatible with it have.")
    kind = {"provider": provider_name, "model": model_name, "dimensions": dimensions}
    keys = [f"e/{data_digest({**kind, 'text': text})}" for text in texts]
    request = {**kind, "texts": keys}

    place = here.get()
    ex = place.ex if place is not None else scratch()
    policy = retry_of(retry)
    if policy is None:
        policy = None if _retrying(place.outer if place is not None else None) else _RETRY
    call = Call(ex, name, None, (), {}, Options(retry=policy) if policy else PLAIN, "ai")
    call.started = True
    call.request, call.given, call.digest = request, data_text(request), data_digest(request)
    call.policy = "error" if ex.on_change == "error" and place is not None and place.outer is None else "auto"

    async def ask() -> list[str]:
        at = here.get()
        assert at is not None and at.outer is not None
        body: dict[str, Any] = {"model": model_name, "encoding_format": "float"}
        if dimensions is not None:
            body["dimensions"] = dimensions
        while wanted := {key: text for key, text in zip(keys, texts, strict=True) if ex.journal.get(key) is None}:
            async with _claimed(ex.journal.id, wanted) as mine, _claimed_from_others(call, mine) as free:
                for part in _requests(free):
                    asked = {**body, "input": list(part.values())}
                    await _pay(call, at.outer, provider.embed, asked, list(part), limit)
        at.outer.used_model = True
        return keys

    call.fn = ask
    call.finish = lambda found: [_vector(ex.journal, key) for key in found]
    ex.locate(call, call.digest)
    call.started = False
    return call


embed.__agentflow_model_call__ = True  # type: ignore[attr-defined]


_asked: dict[tuple[str, str], Future[None]] = {}  # texts that this process is paying for at the moment
_asked_lock = threading.Lock()


@asynccontextmanager
async def _claimed(journal: str, wanted: dict[str, str]) -> AsyncGenerator[dict[str, str]]:
    """Those of the texts that nobody else in this process is asking about, to be asked about within the block.

    Leaves when the others have been answered too, or given up: what is still missing then is to be claimed again.
    """
    done: Future[None] = Future()
    with _asked_lock:
        mine = {key: text for key, text in wanted.items() if (journal, key) not in _asked}
        theirs = {_asked[journal, key] for key in wanted if key not in mine}
        _asked.update({(journal, key): done for key in mine})
    try:
        yield mine
    finally:
        with _asked_lock:
            for key in mine:
                del _asked[journal, key]
        done.set_result(None)
    for other in theirs:
        # Shielded: a caller that is cancelled must not cancel what others wait for.
        await asyncio.shield(asyncio.wrap_future(other))


@asynccontextmanager
async def _claimed_from_others(call: Call, wanted: dict[str, str]) -> AsyncGenerator[dict[str, str]]:
    """Those of the texts that no other living process is asking about; with none left it waits a moment for theirs.

    A claim is a row that names its process, so one that a killed process left behind holds up nobody.
    """
    journal = call.ex.journal
    me = this_process(journal)
    taken: list[str] = []
    theirs: list[str] = []

    def claim(txn: Any) -> None:
        living = cache(lambda owner: process_alive(journal, dict(owner), txn.get))
        taken.clear()
        theirs.clear()
        for key in wanted:
            owner = orjson.loads(txn.get(_claim(key)) or "null")
            if txn.get(key) is not None:
                continue
            if owner is not None and owner != me and living(tuple(owner.items())):
                theirs.append(key)
            else:
                txn.put(_claim(key), orjson.dumps(me).decode())
                taken.append(key)

    if wanted:
        await journal.aguarded(claim)
    if theirs:
        call.ex.say_once(f"{call.name}: waits for vectors that another process has asked for")
    try:
        yield {key: wanted[key] for key in taken}
    finally:
        if taken:
            # Cancelled, nothing may be awaited here.
            journal.commit([Drop(_claim(key)) for key in taken if journal.get(_claim(key)) is not None])
    if theirs and not taken:
        await asyncio.sleep(_PAUSE)


def _claim(key: str) -> str:
    return f"ec/{key[2:]}"


def _requests(wanted: dict[str, str]) -> Iterator[dict[str, str]]:
    part: dict[str, str] = {}
    size = 0
    for key, text in wanted.items():
        if part and (len(part) == MOST_TEXTS or size + len(text) > MOST_CHARACTERS):
            yield part
            part, size = {}, 0
        part[key] = text
        size += len(text)
    if part:
        yield part


async def _pay(
    call: Call,
    current: Current,
    send: Callable[..., Any],
    body: dict[str, Any],
    keys: list[str],
    timeout: float | None,
) -> None:
    """One POST; its vectors are recorded with it, in one commit."""
    async with sending.sending(call, current, call.request["provider"], body, 0) as ticket:
        raw = await send(body, timeout)
        vectors = _vectors(raw["body"], len(keys))
        await _keep(call, current, ticket, raw, vectors, body, keys)
    if vectors is None:
        raise ModelError(
            f"{raw['provider']}: the answer does not hold {len(keys)} vectors, one for each text; it is recorded.",
            status=raw["status"],
            code="invalid_reply",
        )


async def _keep(
    call: Call,
    current: Current,
    ticket: sending.Ticket,
    raw: dict[str, Any],
    vectors: list[list[float]] | None,
    body: dict[str, Any],
    keys: list[str],
) -> None:
    ex = call.ex
    # What was sent and came stands in the vectors' own rows; an answer that does not fit is kept as it came.
    kept = {**raw, "step": call.name, "request": {**body, "input": keys}}
    if vectors is not None:
        kept["body"] = {**raw["body"], "data": len(keys)}
    prefix = f"m/{ex.key}/{call.occ}/{call.here.epoch}.{current.sample}/"
    place = ex.reply_key(prefix, sum(1 for _ in ex.journal.keys(prefix)))
    asked = {name: value for name, value in body.items() if name != "input"}
    about = {"provider": raw["provider"], "asked": asked, "reply": place}
    found = zip(keys, body["input"], vectors or (), strict=False)
    ops: list[Op] = [Add(key, orjson.dumps({**about, "text": text, "vector": it}).decode()) for key, text, it in found]
    await ticket.save(place, kept, [*ops, *(Drop(_claim(key)) for key in keys)])


def _vectors(body: Any, count: int) -> list[list[float]] | None:
    """The vectors in the order of the texts, which is not always that of the answer; None when some are missing."""
    data = body.get("data") if isinstance(body, dict) else None
    if not isinstance(data, list) or len(data) != count:
        return None
    found: dict[Any, list[float]] = {}
    for at, entry in enumerate(data):
        vector = entry.get("embedding") if isinstance(entry, dict) else None
        if not isinstance(vector, list) or not vector:
            return None
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in vector):
            return None
        found[entry.get("index", at)] = [float(x) for x in vector]
    return [found[at] for at in range(count)] if set(found) == set(range(count)) else None


def _vector(journal: Any, key: str) -> list[float]:
    text = journal.get(key)
    if text is None:
        raise JournalIncomplete(
            f"{journal.path}: the vector {key} is missing. Restore the journal from a copy, or ask in a new run "
            "with fresh=True."
        )
    row = orjson.loads(text)
    vector: list[float] = row["vector"] if isinstance(row, dict) else row  # a list is what was recorded at first
    return vector
