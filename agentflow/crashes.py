"""Crashes on demand: a workflow killed at every point at which something is written or asked, and resumed each time.

Each life of a run is a forked process of its own, killed with SIGKILL, so what is tried is what a crash does. The first
life runs through and says what is right. What its model calls were answered is given to the later lives by what they
ask, so nothing real is asked twice. A kill "before" a commit happens inside its transaction, with everything written
and nothing durable; "after" it, with the commit on disk and nobody told.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentflow import codec, ledger, rundocs, scratch
from agentflow.clock import FakeClock
from agentflow.errors import UsageError, Waiting
from agentflow.handles import stored_error
from agentflow.index import Row
from agentflow.journal import Journal, place
from agentflow.models import Usage
from agentflow.people import FakePeople
from agentflow.providers.common import digest, transport, use_transport
from agentflow.settings import settings
from agentflow.store import FileTxn
from agentflow.writer import Writer

_SECONDS = 60.0
_HEAVY = {"agentflow", "anthropic", "diskcache", "genai_prices", "httpx2", "openai", "orjson", "pydantic"}
_WORDS = {"m/": "a model's reply", "r/": "the run's document", "h/": "a human task", "a/": "a failed attempt"}


@dataclass(frozen=True, slots=True)
class Crashes:
    """What ``crash_points`` did.

    Attributes:
        points: each point that the run was killed at, in words.
        value: the run's result; None where it failed or waits.
        error: type and message of what it failed with, or what it waits for; None where it has a result.
    """

    points: list[str]
    value: Any
    error: str | None = None

    def __len__(self) -> int:
        return len(self.points)


@dataclass(slots=True)
class _Life:
    """What one process did, from its log."""

    killed_at: str = ""
    clock: float | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    texts: dict[str, str] = field(default_factory=dict)
    paid: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    replies: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    started: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    records: list[list[str]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def crash_points(
    workflow: Any,
    *args: Any,
    people: FakePeople | None = None,
    same: Callable[[Any, Any], bool] | None = None,
    seconds: float = _SECONDS,
    **kwargs: Any,
) -> Crashes:
    """Kill a run at every point, resume it, and check that nobody can tell.

    The run is killed before and after each write to its journal, when each attempt of a step has been started, and
    while each model call is on its way; then it is run again. Each time this has to hold:

    - the outcome is that of a run that was never killed: the same value, the same error or the same wait;
    - the same steps, with as many records each, compensations among them: each is done exactly once;
    - a model call whose reply was recorded is not asked again, and one that was on its way at most once more;
    - a step whose result was recorded is not started again, and one that was in flight at most once more.

    Args:
        workflow: what to run; ``args`` and ``kwargs`` are its input.
        people: who answers human tasks. None: nobody, the run may end waiting.
        same: compares two results, the right one first. None: their recorded forms have to be equal, so take clocks
            from ``ctx.now()`` under a ``FakeClock``, and no result from chance.
        seconds: how long one life may take.

    Enter a ``FakeModel`` around it if models are asked. What steps do outside the journal really happens, in each life.
    Needs ``os.fork``. Other programs cannot see the journals, which are temporary.

    Raises:
        AssertionError: names the point, and what was different.
        UsageError: a model is asked and no ``FakeModel`` is there; no fork here; the first life did not end.
    """
    if not hasattr(workflow, "run_sync"):
        raise UsageError(f"crash_points({workflow!r}, ...): the first argument is a workflow.")
    if not hasattr(os, "fork"):
        raise UsageError("crash_points forks a process for each life, which this system cannot do.")
    home = Path(tempfile.mkdtemp(prefix="crashes-", dir=_near_journal()))
    lives = _Lives(workflow, args, kwargs, people, home, seconds)
    if people is not None:
        people.copied()
    points: list[str] = []
    try:
        right = lives.live(home / "0", 0, {}, Counter())
        if not right.outcome:
            raise UsageError("crash_points: the run that was to show what is right was killed itself.")
        _load(right.modules)
        while True:
            folder = home / str(len(points) + 1)
            first = lives.live(folder, len(points) + 1, right.replies, Counter())
            if not first.killed_at:
                _compare(right, first, None, "without being killed", same)
                break
            points.append(first.killed_at)
            second = lives.live(folder, 0, right.replies, first.paid + first.refused, first.clock)
            _compare(right, first, second, first.killed_at, same)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if "value" in right.outcome:
        return Crashes(points, codec.look(right.outcome["value"]))
    return Crashes(points, None, _shown(right.outcome))


def _load(modules: list[str]) -> None:
    """Import here what the first life needed, so that not every other one has to: that takes longer than a life."""
    for name in modules:
        with contextlib.suppress(ImportError):  # some are made by others, and have no file
            importlib.import_module(name)
    if "genai_prices" in modules:
        ledger.price("openai", "gpt-4o-mini", Usage(1))  # reads its tables


def _near_journal() -> Path | None:
    """Where the journal of the test is, which is in memory under the plugin; None: the temporary directory."""
    there = settings.path or place(os.environ.get("AGENTFLOW_PATH") or "")
    folder = there.parent if isinstance(there, Path) and os.environ.get("AGENTFLOW_PATH") else None
    return folder if folder is not None and folder.is_dir() and os.access(folder, os.W_OK) else None


class _Lives:
    """Runs one life after the other, each in a process of its own."""

    def __init__(
        self, workflow: Any, args: Any, kwargs: Any, people: FakePeople | None, home: Path, seconds: float
    ) -> None:
        self.workflow, self.args, self.kwargs, self.people = workflow, args, kwargs, people
        self.home, self.seconds = home, seconds
        self.number = 0

    def live(
        self,
        folder: Path,
        kill_at: int,
        replies: dict[str, list[Any]],
        used: Counter[str],
        clock: float | None = None,
    ) -> _Life:
        """One life; ``kill_at`` counts points from 1, and 0 never kills. ``clock``: what the last one showed."""
        self.number += 1
        log = self.home / f"log-{self.number}"
        read, write = os.pipe()
        with warnings.catch_warnings():
            # The child uses no thread of its parent: what holds threads here begins anew in it.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.close(read)
            if clock is not None and isinstance(settings.clock, FakeClock):
                settings.clock.move_to(clock)
            _in_child(self, folder, log, kill_at, replies, used)
        os.close(write)
        try:
            with selectors.DefaultSelector() as selector:  # select() itself refuses descriptors from 1024 on
                selector.register(read, selectors.EVENT_READ)
                ended = selector.select(self.seconds)  # readable once the child's end is closed
            if not ended:
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        finally:
            os.close(read)
        life = _read(log)
        if not ended:
            raise AssertionError(f"crash_points: a life did not end within {self.seconds:g} s (seconds=).")
        if not life.killed_at and not life.outcome:
            raise AssertionError("crash_points: a life ended without an outcome; what it said is on stderr.")
        return life


def _in_child(
    lives: _Lives, folder: Path, log: Path, kill_at: int, replies: dict[str, list[Any]], used: Counter[str]
) -> None:
    """Never returns: what this process would do next is its parent's business."""
    code = 1
    try:
        asyncio.events._set_running_loop(None)  # the loop is the parent's, and so are its tasks
        settings.path = folder
        watch = _Watch(log, kill_at)
        watch.patch()
        inner = transport()
        if replies or inner is not None:
            import httpx2

            use_transport(httpx2.MockTransport(_Answers(watch, inner, replies, used)))
        watch.note({"e": "end", **_outcome(lives)})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _outcome(lives: _Lives) -> dict[str, Any]:
    """Runs the workflow as far as it goes; how that ended, and the records it left."""
    found: dict[str, Any] = {}
    journal = scratch.open_journal()
    try:
        # What had failed for good before the kill is not tried again: a program would see this error.
        failed = next(rundocs.listed(journal, status="failed", workflow=lives.workflow.name), None)
        if failed is not None:
            raise stored_error(failed)
        people = lives.people or FakePeople({})
        value = people.run(lives.workflow, *lives.args, **lives.kwargs)
        found["value"] = codec.encode(value)
    except Waiting as waiting:
        found["waits"] = sorted(str(wait["kind"]) for wait in waiting.waiting_on)
    except Exception as error:
        found["error"] = [type(error).__name__, str(error)]
    records = [
        [row.head["name"], row.head["kind"], "undone" if row.undone else row.head["status"]]
        for document in rundocs.listed(journal)
        for row in rundocs.rows(journal, document["id"], undone=True)
    ]
    modules = [name for name in sys.modules if name.partition(".")[0] in _HEAVY]
    return {"outcome": found, "records": sorted(records), "modules": modules}


class _Watch:
    """Counts the points of a life, notes what happens in a file that survives it, and kills it when it is time."""

    def __init__(self, log: Path, kill_at: int) -> None:
        self._file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._left = kill_at
        self._count = 0
        self._ops: list[Any] = []

    def note(self, facts: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(facts).encode() + b"\n")

    def point(self, words: str) -> None:
        self._count += 1
        if self._count == self._left:
            clock = settings.clock() if settings.clock is not None else None
            self.note({"e": "kill", "at": f"point {self._count}: {words}", "clock": clock})
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(_SECONDS)  # the signal may reach another thread first

    def patch(self) -> None:
        """Only this process is changed, and it ends soon."""
        watch = self
        apply, perform, transact, mark = FileTxn.apply, Writer._perform, Writer._transact, Journal.mark

        def applied(txn: FileTxn, ops: Any) -> list[bool]:
            watch._ops += ops
            return apply(txn, ops)

        def performed(writer: Writer, job: Any, txn: FileTxn, con: Any) -> None:
            perform(writer, job, txn, con)
            watch.point(f"before the commit of {_named(watch._ops)}")

        def transacted(writer: Writer, jobs: Any, *, drain: bool) -> None:
            watch._ops = []
            transact(writer, jobs, drain=drain)
            ops, watch._ops = watch._ops, []
            watch.durable(ops)
            watch.point(f"after the commit of {_named(ops)}")

        def marked(journal: Journal, run_id: str, line: str) -> None:
            mark(journal, run_id, line)
            facts = json.loads(line)
            if facts["v"] >= 0:
                watch.note({"e": "start", "name": facts["n"]})
                watch.point(f"when {facts['n']!r} was started")
            else:
                watch.note({"e": "stop", "name": facts["n"]})

        changes: list[tuple[Any, str, Any]] = [
            (FileTxn, "apply", applied),
            (Writer, "_perform", performed),
            (Writer, "_transact", transacted),
            (Writer, "add", lambda *_: False),  # each commit is a transaction, so that one can be killed inside it
            (Journal, "mark", marked),
        ]
        for owner, name, function in changes:
            setattr(owner, name, function)

    def durable(self, ops: list[Any]) -> None:
        for op in ops:
            if op.key.startswith("m/"):
                self.note({"e": "paid", "key": json.loads(op.value).get("asked")})
            elif (name := _step(op)) is not None:
                self.note({"e": "stop", "name": name})


def _step(op: Any) -> str | None:
    """The step whose record an op writes."""
    if not op.key.startswith("s/") or "!" in op.key:
        return None
    return str(Row(op.key, op.value).head["name"])


def _named(ops: list[Any]) -> str:
    names = [f"{name!r}" for op in ops if (name := _step(op)) is not None]
    names += [words for op in ops for start, words in _WORDS.items() if op.key.startswith(start)]
    return ", ".join(dict.fromkeys(names)) or "what guards the run"


class _Answers:
    """Below the SDKs: the first life asks whoever is there, the later ones get what that one got."""

    def __init__(self, watch: _Watch, inner: Any, replies: dict[str, list[Any]], used: Counter[str]) -> None:
        self._watch, self._inner, self._replies = watch, inner, replies
        self._next = Counter(used)

    async def __call__(self, request: Any) -> Any:
        import httpx2

        body = json.loads(request.content) if request.content else {}
        key = digest({name: value for name, value in body.items() if name not in ("stream", "stream_options")})
        self._watch.note({"e": "ask", "key": key, "text": json.dumps(body)[:200]})
        self._watch.point("while a model call was on its way")
        known = self._replies.get(key)
        if known:
            status, headers, content = known[min(self._next[key], len(known) - 1)]
            self._next[key] += 1
            response = httpx2.Response(status, headers=headers, content=base64.b64decode(content))
        elif self._replies or self._inner is None:
            raise UsageError(
                "crash_points: a life asks the model something that the run without a crash did not ask: "
                f"{json.dumps(body)[:300]}. Does the request hold a clock, or chance?"
            )
        else:
            response = await self._inner.handle_async_request(request)
            await response.aread()
        kept = [(k, v) for k, v in response.headers.items() if k not in ("content-encoding", "content-length")]
        content = base64.b64encode(response.content).decode()
        self._watch.note({"e": "reply", "key": key, "reply": [response.status_code, kept, content]})
        return response


def _read(log: Path) -> _Life:
    life = _Life()
    for line in log.read_text().splitlines() if log.exists() else ():
        facts = json.loads(line)
        kind = facts["e"]
        if kind == "ask":
            life.asked[facts["key"]] += 1
            life.texts[facts["key"]] = facts["text"]
        elif kind == "reply":
            life.replies[facts["key"]].append(facts["reply"])
            life.refused[facts["key"]] += facts["reply"][0] >= 400
        elif kind == "paid":
            life.paid[facts["key"]] += 1
        elif kind == "start":
            life.started[facts["name"]] += 1
        elif kind == "stop":
            life.ended[facts["name"]] += 1
        elif kind == "kill":
            life.killed_at, life.clock = facts["at"], facts["clock"]
        else:
            life.outcome, life.records, life.modules = facts["outcome"], facts["records"], facts["modules"]
    log.unlink(missing_ok=True)
    return life


def _compare(
    right: _Life, first: _Life, second: _Life | None, where: str, same: Callable[[Any, Any], bool] | None
) -> None:
    """Hold a run that was killed and resumed against the one that never was."""
    last = second or first
    problems = []
    # A policy that says so, in_doubt="raise", stops a step whose attempt was in flight, and everything after it.
    doubt = second is not None and last.outcome.get("error", [""])[0] == "StepInDoubt"
    if not doubt:
        if not _equal(right.outcome, last.outcome, same):
            problems.append(f"the outcome is {_shown(last.outcome)}, not {_shown(right.outcome)}")
        if right.records != last.records:
            lost = Counter(map(tuple, right.records)) - Counter(map(tuple, last.records))
            more = Counter(map(tuple, last.records)) - Counter(map(tuple, right.records))
            words = [f"{n} x {' '.join(r)} missing" for r, n in lost.items()]
            words += [f"{n} x {' '.join(r)} too many" for r, n in more.items()]
            problems.append(f"the records differ: {', '.join(words)}")
    if second is not None:
        open_calls = first.asked - first.paid - first.refused
        for key, count in (first.asked + second.asked).items():
            if count > right.asked[key] + min(open_calls[key], 1):
                problems.append(
                    f"a model call was paid for {count} times, not {right.asked[key]}: {right.texts.get(key)}"
                )
        in_flight = first.started - first.ended
        for name, count in (first.started + second.started).items():
            if count > right.started[name] + in_flight[name]:
                problems.append(f"step {name!r} was started {count} times, not {right.started[name]}")
    if problems:
        raise AssertionError(f"Killed {where}, and run again: " + "; ".join(problems))


def _equal(right: dict[str, Any], found: dict[str, Any], same: Callable[[Any, Any], bool] | None) -> bool:
    if same is not None and "value" in right and "value" in found:
        return bool(same(codec.decode(right["value"]), codec.decode(found["value"])))
    return right == found


def _shown(outcome: dict[str, Any]) -> str:
    ((kind, what),) = outcome.items()
    return f"{kind} {str(what)[:300]}"
