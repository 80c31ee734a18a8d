"""A worker: goes on with the runs that are due, without anybody running their script again.

Due is a run that was interrupted (its process is gone), that somebody has answered, or whose time has come; a tick of
a schedule makes one (``schedules.py``). Each is
found in an index of its own (``x/interrupted/``, ``x/running/``, ``wake/``, ``due/``), so what it costs to look does
not depend on how many runs have ended or wait. Between two looks the worker asks the journal whether anybody has
committed, which reads no disk.

Several workers share a journal: who takes a run's lease has it. A run that was started inside another one is gone on
with by way of that one.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from agentflow import children, leftover, rundocs
from agentflow.calls import Suspend
from agentflow.drive import halt
from agentflow.errors import RunBusy, RunCancelled, UsageError, Waiting
from agentflow.flow import Workflow
from agentflow.index import in_key
from agentflow.journal import Drop, Journal, Put, Txn
from agentflow.lease import Lease, acquire, alive, gone, holder
from agentflow.opening import executing
from agentflow.redact import redact
from agentflow.schedules import Ticker
from agentflow.scratch import open_journal
from agentflow.settings import log, now

LOOK = 1.0  # seconds between two looks when nobody commits: a process may have died, a time may have come
PAUSE = 0.05
_ENDED = ("completed", "failed", "cancelled")
_MOST_BACKOFF = 300.0


def due(journal: Journal, at: float) -> Iterator[dict[str, Any]]:
    """The documents of all runs that could go on now, each once; ``at`` in epoch seconds."""
    seen: set[str] = set()
    for run_id in _candidates(journal, at):
        document = _outermost(journal, run_id)
        if document is None or document["id"] in seen:
            continue
        seen.add(document["id"])
        owner = holder(journal, rundocs.lease_key(document["id"]))
        if owner is None or not alive(owner, now=journal.clock()):
            yield document


def _candidates(journal: Journal, at: float) -> Iterator[str]:
    for status in ("interrupted", "running"):
        yield from (run_id for _, run_id in journal.scan(f"x/{status}/"))
    for prefix, before in (("wake/", None), ("due/", f"due/{int(at * 1000) + 1:014d}")):
        for key, run_id in journal.scan(prefix, before=before):
            document = rundocs.read(journal, run_id)
            if document is None or document["status"] in _ENDED:
                journal.guarded(functools.partial(_forget, key, run_id))
            elif document["status"] == "waiting":
                yield run_id


def _forget(key: str, run_id: str, txn: Txn) -> None:
    """An answer, or a time, came for a run that has ended in the meantime."""
    text = txn.get(f"r/{in_key(run_id)}")
    if text is None or orjson.loads(text)["status"] in _ENDED:
        txn.drop(key)


def _outermost(journal: Journal, run_id: str) -> dict[str, Any] | None:
    """The run itself, or the unfinished one that has started it: only there does its result count."""
    document = rundocs.read(journal, run_id)
    passed = {run_id}
    while document is not None:
        outer = None
        for caller in children.callers(journal, document["id"]):
            found = rundocs.read(journal, caller)
            if found is not None and found["status"] not in _ENDED and caller not in passed:
                outer = found
                break
        if outer is None:
            return document
        document = outer
        passed.add(outer["id"])
    return None


class Worker:
    """Goes on with due runs of some workflows until it is stopped.

    Args:
        flows: the workflows it knows, by name. Runs of others are left to others.
        concurrency: runs at a time.
        grace: seconds that steps in flight get to end after ``stop``; then they are cancelled and are in doubt.
        once: end when nothing is due any more.
    """

    def __init__(
        self, flows: Mapping[str, Workflow[..., Any]], *, concurrency: int = 10, grace: float = 30.0, once: bool = False
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise UsageError(f"worker: concurrency={concurrency!r} is not a whole number of 1 or more.")
        self.flows = dict(flows)
        self.concurrency = concurrency
        self.grace = grace
        self.once = once
        self.id = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._retry_at: dict[str, tuple[int, float]] = {}
        self._stops = 0
        self._news = asyncio.Event()
        self._collect_at = 0.0

    async def run(self) -> None:
        """Work until ``stop``, SIGTERM or Ctrl-C."""
        journal = open_journal()
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for each in signals:
            loop.add_signal_handler(each, self.stop)
        lease = self._enrol(journal)
        try:
            ticker = Ticker(journal, self.flows.values(), now())
            for line in ticker.lines():
                log.info("%s", line)
            await self._work(journal, ticker)
            await self._drain()
        finally:
            for each in signals:
                loop.remove_signal_handler(each)
            lease.release([Drop(f"worker/{self.id}")])
            journal.commit([Drop(lease.key)])

    def stop(self) -> None:
        """Take nothing up any more, let the steps in flight end, release the leases. Twice: do not wait for them."""
        self._stops += 1
        self._news.set()

    async def _work(self, journal: Journal, ticker: Ticker) -> None:
        while not self._stops:
            self._news.clear()
            version = journal.version()
            started = ticker.tick(now()) + self._collect(journal)
            for document in due(journal, now()):
                if len(self._tasks) >= self.concurrency or self._stops:
                    break
                started += self._take(document)
            if self.once and not self._tasks and not started:
                return
            await self._wait(journal, version)

    def _take(self, document: dict[str, Any]) -> bool:
        run_id = document["id"]
        flow = self.flows.get(document["workflow"])
        _, at = self._retry_at.get(run_id, (0, 0.0))
        if flow is None or run_id in self._tasks.values() or time.monotonic() < at:
            return False
        task = asyncio.get_running_loop().create_task(self._go_on(flow, document))
        self._tasks[task] = run_id
        task.add_done_callback(self._done)
        return True

    def _collect(self, journal: Journal) -> int:
        """Now and then, look after what cancelled runs have left at providers, beside the runs."""
        if time.monotonic() < self._collect_at or not any(leftover.left(journal)):
            return 0
        self._collect_at = time.monotonic() + leftover.AGAIN
        task = asyncio.get_running_loop().create_task(leftover.collect(journal))
        self._tasks[task] = ""
        task.add_done_callback(self._done)
        return 1

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._news.set()

    async def _wait(self, journal: Journal, version: int) -> None:
        """Until somebody has committed, a run has ended here, or it is time to look anyway."""
        until = time.monotonic() + LOOK
        while not self._news.is_set() and time.monotonic() < until:
            if journal.version() != version and len(self._tasks) < self.concurrency:
                return
            try:
                await asyncio.wait_for(self._news.wait(), PAUSE)
            except TimeoutError:
                continue

    async def _go_on(self, flow: Workflow[..., Any], document: dict[str, Any]) -> None:
        run_id = document["id"]
        try:
            await flow.again(document)
        except (Suspend, Waiting, RunBusy, RunCancelled):
            return
        except Exception as error:
            # One that has failed says so itself; others were not even begun, and are not tried in a busy loop.
            after = rundocs.read(open_journal(), run_id)
            if after is not None and after["status"] not in _ENDED:
                count, _ = self._retry_at.get(run_id, (0, 0.0))
                delay = min(2.0**count, _MOST_BACKOFF)
                self._retry_at[run_id] = (count + 1, time.monotonic() + delay)
                why = redact(f"{type(error).__name__}: {error}")
                log.warning("%s · could not go on (%s); next try in %g s", run_id, why, delay)
                return
        self._retry_at.pop(run_id, None)

    async def _drain(self) -> None:
        until = time.monotonic() + self.grace
        if self._tasks:
            log.info("worker · stopping: %d runs stop before their next step", len(self._tasks))
        while self._tasks and self._stops < 2 and time.monotonic() < until:
            for ex in list(executing):
                if not ex.closed and not ex.halted:
                    halt(ex)
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), 0.25)
            except TimeoutError:
                continue
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def _enrol(self, journal: Journal) -> Lease:
        """Say that this worker is there, for ``agentflow doctor``; forget those that are gone."""
        dead = [each["id"] for each in enrolled(journal) if not each["alive"]]
        journal.commit([Drop(f"{family}/{ident}") for ident in dead for family in ("worker", "lease-worker")])
        facts = {
            "id": self.id, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time(),
            "workflows": sorted(self.flows), "concurrency": self.concurrency,
        }  # fmt: skip
        put = Put(f"worker/{self.id}", orjson.dumps(facts).decode())
        return acquire(journal, f"lease-worker/{self.id}", ops=[put], what=f"worker {self.id}")


def enrolled(journal: Journal) -> list[dict[str, Any]]:
    """The workers of a journal: id, pid, host, since (epoch seconds), workflows, concurrency, alive."""
    found = []
    for key, text in journal.scan("worker/"):
        owner = holder(journal, f"lease-{key}")
        facts: dict[str, Any] = orjson.loads(text)
        there = owner is not None and alive(owner, now=journal.clock()) and not gone(journal, owner)
        found.append(facts | {"alive": there})
    return found


def work(flows: Iterable[Workflow[..., Any]], **options: Any) -> None:
    """Run a worker in this process until it is stopped; options as for ``Worker``."""
    named = {flow.name: flow for flow in flows}

    async def main() -> None:
        await Worker(named, **options).run()

    asyncio.run(main())
