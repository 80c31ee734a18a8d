"""One call of a step: what was asked, by whom and from where."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from agentflow.digests import blake2b
from agentflow.errors import StepNotAwaited, UsageError
from agentflow.plain import Plain

if TYPE_CHECKING:
    import asyncio

    from agentflow.capture import Capture
    from agentflow.index import Slot
    from agentflow.records import Retry
    from agentflow.run import Execution


class Suspend(BaseException):
    """Leaves a run that can only wait. Not an ``Exception``: ``except Exception`` must not hold it."""


class Unanswered(BaseException):
    """Leaves an attempt of a model call until its reply has come: its driver parks on ``wait()`` and makes it again.

    Replies that came are on record, so nothing is asked twice. ``forget`` takes the wait back when nobody waits for it.
    """

    def __init__(self, wait: Callable[[], Any], forget: Callable[[Any], None]) -> None:
        super().__init__("a reply that comes later")
        self.wait = wait
        self.forget = forget


ON_CHANGE = ("auto", "rerun", "reuse", "error")


class Options(Plain):
    """The options of one step, checked."""

    __slots__ = (
        "compensate",
        "effect",
        "idempotency_key",
        "in_doubt",
        "max_age",
        "on_change",
        "retry",
        "secret",
        "thread",
        "timeout",
    )

    def __init__(
        self,
        *,
        retry: Retry | None = None,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        compensate: Callable[[Any], Any] | None = None,
        effect: bool = False,
        secret: bool = False,
        on_change: str | None = None,
        in_doubt: str = "rerun",
        max_age: float | None = None,
        thread: bool = True,
    ) -> None:
        self.retry = retry
        self.timeout = timeout
        self.idempotency_key = idempotency_key
        self.compensate = compensate
        self.effect = effect
        self.secret = secret
        self.on_change = on_change
        self.in_doubt = in_doubt
        self.max_age = max_age
        self.thread = thread


PLAIN = Options()
UNSET: Any = object()  # an argument that was not given, where None means something


class Here:
    """Where in a run code is executing: held in a context variable, replaced and never changed.

    ``pred`` is the id of the record before this one in the same branch; ``epoch`` names the attempts
    of the enclosing steps, so that a new attempt does not meet an old attempt's model replies.
    """

    __slots__ = ("branch", "epoch", "ex", "key", "outer", "pred", "repeats", "scope", "task")

    def __init__(
        self, ex: Execution, scope: str, branch: str, pred: str, epoch: str, outer: Current | None, task: Any
    ) -> None:
        self.ex = ex
        self.scope = scope
        self.branch = branch
        self.pred = pred
        self.epoch = epoch
        self.outer = outer
        self.task = task
        self.repeats: dict[str, int] | None = None
        self.key = ""

    def after(self, pred: str) -> Here:
        following = Here(self.ex, self.scope, self.branch, pred, self.epoch, self.outer, self.task)
        following.key = self.key
        return following

    def branching(self, label: str, task: Any) -> Here:
        return Here(self.ex, self.scope, f"{self.branch}/{label}", self.pred, self.epoch, self.outer, task)


here: ContextVar[Here | None] = ContextVar("agentflow_here", default=None)


class Current:
    """The step that is executing, as ``current_step()`` gives it.

    Attributes: ``name``; ``run_id``; ``attempt`` (from 1); ``idempotency_key`` (always set, the same in
    every attempt and after a restart: hand it to payment APIs); ``id``.
    """

    __slots__ = (
        "asked",
        "attempt",
        "by_model",
        "call",
        "clock",
        "cost",
        "entries",
        "facts",
        "id",
        "idempotency_key",
        "left",
        "lent",
        "name",
        "over",
        "parent",
        "run_id",
        "sample",
        "stop",
        "taken",
        "undoes",
        "unknown",
        "used_model",
        "version",
    )

    def __init__(self, call: Call, key: str, attempt: int, sample: int) -> None:
        self.call = call
        self.name = call.name
        self.run_id = call.ex.run_id
        self.id = call.occ
        self.idempotency_key = key
        self.attempt = attempt
        self.sample = sample
        self.parent = call.here.outer
        self.lent = 0
        self.left = False
        self.over = False  # its time is up: plain code, which cannot be stopped, starts no further step in it
        self.stop: Callable[[], Any] | None = None  # ends a wait for what goes on elsewhere
        self.undoes = False
        self.version = call.slot.n + 1 if call.slot is not None else 0
        self.facts: Any = None
        self.used_model = False
        self.cost: Any = None
        self.by_model: dict[str, Any] = {}
        self.unknown = 0
        # The ledger's rows of the replies that this attempt stands on, paid for here or before.
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self.clock: Any = None
        # What the steps inside have claimed and counted, to be given back to a next attempt.
        self.taken: list[Slot] = []
        self.asked: list[tuple[dict[Any, int], Any]] = []

    def stands_on(self, entry: tuple[str, dict[str, Any]]) -> None:
        """Notes the ledger's row of a reply that this attempt uses, here and in the steps around."""
        step: Current | None = self
        while step is not None:
            step.entries.append(entry)
            step = step.parent

    def spent(self, split: dict[str, Any]) -> None:
        """Dollars that this step's result rests on, by model; paid now or by an earlier execution."""
        for model, amount in split.items():
            self.cost = (self.cost or 0) + amount
            self.by_model[model] = self.by_model.get(model, 0) + amount

    @property
    def around(self) -> str:
        """Which attempts a step inside this one belongs to."""
        own = f"{self.attempt}:{self.sample}"
        return own if self.parent is None else f"{self.parent.around}/{own}"

    def __repr__(self) -> str:
        return f"<step {self.name!r} attempt {self.attempt} of {self.run_id}>"


def current_step() -> Current:
    """The step that is executing: its ``name``, ``attempt``, ``idempotency_key`` and ``run_id``.

    Raises:
        UsageError: no step is executing here.
    """
    place = here.get()
    if place is None or place.outer is None:
        raise UsageError("current_step() has a meaning only inside a step's function.")
    return place.outer


_sending = threading.Lock()


class Call(Coroutine[Any, Any, Any]):
    """What ``step(...)`` returns: captured at once, started when it is awaited.

    It is a coroutine, so that gather, TaskGroup and create_task take it. Await it once.
    """

    __slots__ = (
        "__weakref__",
        "_it",
        "_occ",
        "_withdrawn",
        "adopt",
        "args",
        "capture",
        "code",
        "counted",
        "digest",
        "ex",
        "extra_ops",
        "finish",
        "fn",
        "given",
        "here",
        "ident",
        "kind",
        "kwargs",
        "max_turns",
        "name",
        "on_way",
        "options",
        "place",
        "policy",
        "request",
        "slot",
        "started",
        "task",
        "tool",
        "wait",
        "why",
    )
    streams = False  # whether somebody hears the answer as it is written

    def __init__(
        self,
        ex: Execution,
        name: str,
        fn: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        kind: str,
    ) -> None:
        self.ex = ex
        self.name = name
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.options = options
        self.kind = kind
        self.started = False
        self._it: Generator[Any, Any, Any] | None = None
        self.capture: Capture | None = None
        self.code: Any = None
        self.slot: Slot | None = None
        self.finish: Callable[[Any], Any] | None = None
        self.request: Any = None
        self.extra_ops: tuple[Any, ...] = ()
        self.policy = "auto"
        self.wait: Callable[[], Any] | None = None
        self.why: str | None = None
        self.max_turns = 0
        self.adopt: Callable[[Call], list[Any]] | None = None  # takes the place of an unfinished call; what to commit
        self.on_way = False
        self._withdrawn = False
        # Set by the engine when it locates the call.
        self.here: Here
        self.ident = self.place = self.counted = self.given = self.digest = ""
        self._occ = ""
        self.task: Any = None
        # Set where a model asks for it: the tool's name and description, and the id of its call.
        self.tool: tuple[str, str, str | None]

    @property
    def __name__(self) -> str:
        return f"step {self.name}"

    @property
    def occ(self) -> str:
        """What names this occurrence in nested scopes, attempts, marks and replies; not needed for a hit."""
        if not self._occ:
            self._occ = blake2b(self.counted.encode(), digest_size=10).hexdigest()
        return self._occ

    @occ.setter
    def occ(self, value: str) -> None:
        self._occ = value

    def __await__(self) -> Generator[Any, Any, Any]:
        if self.started:
            raise UsageError(f"step {self.name!r} was awaited twice. Keep its result in a variable.")
        self.started = True
        driven: Generator[Any, Any, Any] = self.ex.driver(self)
        return driven

    def send(self, value: Any) -> Any:
        if self._it is None:
            self._it = self.__await__()
        return self._it.send(value)

    def throw(self, *exc: Any) -> Any:
        if self._it is None:
            self.started = True
            raise exc[0] if isinstance(exc[0], BaseException) else exc[1] or exc[0]()
        return self._it.throw(exc[0] if len(exc) == 1 else exc[1] or exc[0]())

    def send_off(self) -> bool:
        """A request is about to be sent: from now on its answer is waited for. False: nothing may be sent any more."""
        with _sending:
            self.on_way = not self._withdrawn
            return self.on_way

    def withdraw(self) -> bool:
        """Nothing more is sent for this call. True if nothing is on its way, so that it can be dropped."""
        with _sending:
            self._withdrawn = True
            return not self.on_way

    def close(self) -> None:
        self.started = True
        if self._it is not None:
            self._it.close()

    def __del__(self) -> None:
        if not self.started:
            self.ex.forgotten(self.name)

    def __repr__(self) -> str:
        return f"<step {self.name!r}, {'started' if self.started else 'not awaited yet'}>"

    def unawaited(self) -> StepNotAwaited:
        return StepNotAwaited(f"step {self.name!r} was not awaited. Write: await step({self.name!r}, ...)")


_asyncio: Any = None  # the module, once somebody has loaded it: before that nobody has a loop


def current_task() -> asyncio.Task[Any] | None:
    """The running asyncio task, or None outside an event loop."""
    global _asyncio
    if _asyncio is None:
        if "asyncio" not in sys.modules:
            return None
        import asyncio

        _asyncio = asyncio
    loop = _asyncio._get_running_loop()  # None where there is none, and no exception made for nothing
    return None if loop is None else _asyncio.current_task(loop)


def enclosing(call: Call) -> list[Current]:
    """The steps inside which a call was made, the nearest first."""
    found = []
    current = call.here.outer
    while current is not None:
        found.append(current)
        current = current.parent
    return found
