"""Who owns a run: leases with fencing tokens, kept alive by one thread, taken over when their owner is gone.

A lease is one row. Taking it raises its token; every commit of the owner carries the token (``Lease.fence``)
and is refused once somebody else has raised it. So an owner that was paused past its lease, taken over and
woken again can commit nothing more, whatever it believes. Expiry alone takes nothing away: an owner that was
merely slow goes on as long as nobody took over.

Whether a lease has run out is told by the clock that all who use the journal go by (``Journal.clock``): in a database,
the server's. How far the clocks of the machines are apart does not matter.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from agentflow.durations import words
from agentflow.errors import LeaseLost, RunBusy
from agentflow.journal import Drop, Fence, Journal, Op, Txn
from agentflow.plain import Plain

_PROCESS = "lease-process/"
_FORGET = 86400.0  # seconds after which nobody asks any more whether a process runs


class Owner(Plain):
    """The process that holds, or last held, a lease.

    Attributes:
        token: raised by every acquisition; the current one is in force.
        pid, start: the process and when it started (clock ticks since boot, or epoch seconds; only compared).
        host, boot: the machine, and which of its boots and process namespaces.
        owner: an id of the process, made up when it took its first lease.
        since, expires: epoch seconds.
        released: given back; nobody holds it.
    """

    __slots__ = ("token", "pid", "start", "host", "boot", "owner", "since", "expires", "released")  # noqa: RUF023

    def __init__(
        self,
        token: int,
        pid: int,
        start: str,
        host: str,
        boot: str,
        owner: str,
        since: float,
        expires: float,
        released: bool = False,
    ) -> None:
        self.token = token
        self.pid = pid
        self.start = start
        self.host = host
        self.boot = boot
        self.owner = owner
        self.since = since
        self.expires = expires
        self.released = released

    def as_dict(self) -> dict[str, Any]:
        """For people and JSON: pid, host, since (aware UTC datetime), and the rest."""
        since = datetime.fromtimestamp(self.since, UTC)
        return {"pid": self.pid, "host": self.host, "since": since, "token": self.token, "expires": self.expires}


def _dump(owner: Owner) -> str:
    # The token comes first: Txn.check reads no further.
    data = {name: getattr(owner, name) for name in Owner.__slots__}
    return json.dumps(data, separators=(",", ":"))


def _load(text: str | None) -> Owner | None:
    if text is None:
        return None
    data = json.loads(text)
    return Owner(**{name: data[name] for name in Owner.__slots__ if name in data})


def lease_seconds() -> float:
    """How long a lease lasts without a sign of life: ``AGENTFLOW_LEASE_SECONDS``, default 30."""
    return float(os.environ.get("AGENTFLOW_LEASE_SECONDS") or 30)


# -- processes -------------------------------------------------------------------------------------


@cache
def _boot() -> str:
    """This boot of this machine, and the namespace in which its process ids mean something."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        pass
    try:
        import psutil
    except ImportError:
        return ""
    return f"{psutil.boot_time():.0f}"


def _start_of(pid: int) -> str | None:
    """When the process started; None when there is none, or only what is left of one (a zombie)."""
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The name in parentheses may hold anything, so count from the last one.
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in (b"Z", b"X", b"x") else fields[19].decode()
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


@cache
def _myself() -> tuple[int, str, str, str, str]:
    pid = os.getpid()
    return pid, _start_of(pid) or "", platform.node(), _boot(), os.urandom(16).hex()


def alive(owner: Owner, *, now: float | None = None) -> bool:
    """Whether the lease is held: not released, not run out, and its process not known to be gone.

    Args:
        owner: what ``holder`` returned.
        now: epoch seconds by the journal's clock; None asks that of this machine.
    """
    if owner.released or (time.time() if now is None else now) >= owner.expires:
        return False
    _, _, host, boot, _ = _myself()
    if owner.host != host or owner.boot != boot:
        return True  # nothing can be known about it before its lease has run out
    return _start_of(owner.pid) == owner.start


def gone(journal: Journal, owner: Owner) -> bool:
    """Whether the process is known to have ended; one on another machine is not."""
    _, _, host, boot, _ = _myself()
    if owner.host != host or owner.boot == boot:
        return owner.host == host and _start_of(owner.pid) != owner.start
    # In another process namespace of the same boot it may well be there. Another boot is an earlier one of this machine
    # where all use one machine; elsewhere it can be another machine of the same name.
    return not journal.many_hosts and owner.boot.partition("/")[0] != boot.partition("/")[0]


def holder(journal: Journal, key: str) -> Owner | None:
    """Who holds the lease, or held it last; None when nobody ever did. Ask ``alive`` which it is."""
    return _load(journal.get(key))


def this_process(journal: Journal) -> dict[str, Any]:
    """This process as the owner of something that is no lease and does not run out; ``process_alive`` reads it.

    Where processes of other machines have to know whether it still runs, it has a lease from then on that says so. Not
    to be called inside ``guarded``.
    """
    names = ("pid", "start", "host", "boot", "owner")
    if journal.many_hosts:
        _heart(journal).show()
    return {"token": 0, **dict(zip(names, _myself(), strict=True)), "since": 0.0, "expires": float(2**53)}


def process_alive(journal: Journal, facts: Mapping[str, Any], get: Callable[[str], str | None]) -> bool:
    """Whether the process that ``this_process`` has described still runs.

    Args:
        journal: where it is noted.
        facts: what ``this_process`` gave.
        get: reads a row: ``journal.get``, or that of a Txn inside ``guarded``.
    """
    owner = Owner(**facts)
    _, _, host, boot, _ = _myself()
    if not journal.many_hosts or (owner.host == host and owner.boot == boot):
        return alive(owner)
    shown = _load(get(f"{_PROCESS}{owner.owner}"))
    return shown is not None and alive(shown, now=journal.clock())


def is_me(owner: Owner) -> bool:
    """Whether this process is the owner."""
    return owner.owner == _myself()[4]


# -- leases ----------------------------------------------------------------------------------------


class Lease:
    """A lease that this process holds. Made by ``acquire``.

    Attributes:
        key: the lease's row.
        token: its fencing token, higher than all before it.
        seconds: how long it lasts without a sign of life, as it was when the lease was taken.
        lost: True once it is known that another process took over.
        on_lost: called, in whatever thread, when that becomes known; None calls nothing.
    """

    __slots__ = ("_journal", "_row", "key", "lost", "on_lost", "seconds", "token")

    def __init__(self, journal: Journal, key: str, row: Owner) -> None:
        self._journal = journal
        self._row = row
        self.key = key
        self.token = row.token
        self.seconds = lease_seconds()
        self.lost = False
        self.on_lost: Callable[[], object] | None = None

    @property
    def fence(self) -> Fence:
        """To hand to commits: they are refused once the lease is lost."""
        return Fence(self.key, self.token)

    def release(self, ops: Sequence[Op] = ()) -> None:
        """Give the lease back and commit ``ops`` in the same transaction.

        Raises:
            LeaseLost: another process took over and there were ops; nothing was committed.
        """
        try:
            self._journal.guarded(lambda txn: self._give_back(txn, ops))
        finally:
            _heart(self._journal).forget(self)

    async def arelease(self, ops: Sequence[Op] = ()) -> None:
        """``release`` for coroutines."""
        try:
            await self._journal.aguarded(lambda txn: self._give_back(txn, ops))
        finally:
            _heart(self._journal).forget(self)

    def _give_back(self, txn: Txn, ops: Sequence[Op]) -> None:
        try:
            txn.check(self.fence)
        except LeaseLost:
            self.lost = True
            if ops:
                raise
            return
        txn.apply(ops)
        txn.put(self.key, _dump(self._row.but(released=True)))

    def _renew(self, txn: Txn, expires: float) -> bool:
        try:
            txn.check(self.fence)
        except LeaseLost:
            return False
        txn.put(self.key, _dump(self._row.but(expires=expires)))
        return True


def revoke(txn: Txn, key: str) -> None:
    """Take a lease away from whoever holds it: its commits are refused from here on."""
    before = _load(txn.get(key))
    at = txn.now()
    token = 1 if before is None else before.token + 1
    txn.put(key, _dump(Owner(token, *_myself()[:-1], owner="", since=at, expires=at, released=True)))


def lost(journal: Journal, key: str) -> None:
    """Tell a holder in this process that its lease was revoked; others notice at their next sign of life."""
    _heart(journal).forget_all(key)


def acquire(
    journal: Journal, key: str, *, ops: Sequence[Op] = (), unless: str | None = None, what: str, run_id: str = ""
) -> Lease:
    """Take a lease and commit ``ops`` in the same transaction. Returns when both are fsynced.

    A lease is free when it was released, when its process on this machine is gone, or when it has run out.

    Args:
        journal: where the lease is kept.
        key: its row, such as ``"lease/<run>"``.
        ops: committed together with the acquisition, or not at all.
        unless: a key; when it is taken by then, the ops are left out.
        what: what is being taken, for the error ("run process-order-3f9a").
        run_id: for the error's attribute.

    Raises:
        RunBusy: somebody holds it; the message says who and how to stop it.
    """
    lease = journal.guarded(
        lambda txn: _take(journal, txn, key, () if unless and txn.get(unless) is not None else ops, what, run_id)
    )
    _heart(journal).keep(lease)
    return lease


async def aacquire(journal: Journal, key: str, *, ops: Sequence[Op] = (), what: str, run_id: str = "") -> Lease:
    """``acquire`` for coroutines."""
    lease = await journal.aguarded(lambda txn: _take(journal, txn, key, ops, what, run_id))
    _heart(journal).keep(lease)
    return lease


def _take(journal: Journal, txn: Txn, key: str, ops: Sequence[Op], what: str, run_id: str) -> Lease:
    before = _load(txn.get(key))
    now = txn.now()
    if before is not None and alive(before, now=now):
        raise RunBusy(_busy(before, what, now), run_id, before.as_dict())
    token = 1 if before is None else before.token + 1
    row = Owner(token, *_myself(), since=now, expires=now + lease_seconds())
    txn.put(key, _dump(row))
    txn.apply(ops)
    return Lease(journal, key, row)


def _busy(owner: Owner, what: str, now: float) -> str:
    pid, _, host, boot, me = _myself()
    age = words(max(0.0, now - owner.since))
    since = f"{datetime.fromtimestamp(owner.since).astimezone():%Y-%m-%d %H:%M:%S} ({age} ago)"
    if owner.owner == me:
        return (
            f"{what} is already running in this process ({pid}), since {since}. Await that one, or give it another "
            'run_id; busy="wait" waits for it.'
        )
    left = words(max(0.0, owner.expires - now))
    if owner.host == host and owner.boot == boot:
        return (
            f"{what} is running in process {owner.pid} on this machine ({host}), since {since}. "
            f'Stop it with `kill {owner.pid}`, or wait for it with busy="wait".'
        )
    return (
        f"{what} is running in process {owner.pid} on {owner.host}, since {since}. Stop it there with "
        f'`kill {owner.pid}`, or wait for it with busy="wait"; without a sign of life it can be taken over in {left}.'
    )


# -- staying alive ---------------------------------------------------------------------------------


class _Heart:
    """Renews all leases of one journal in one commit, each third of a lease; stops when there are none."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._held: dict[tuple[str, int], Lease] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._shown: Lease | None = None

    def show(self) -> None:
        """Have a lease for the process itself, which others see running out once it has ended."""
        with self._lock:
            if self._shown is not None and not self._shown.lost:
                return
        now = self._journal.clock()
        old = [
            Drop(key)
            for key, text in self._journal.scan(_PROCESS)
            if (owner := _load(text)) is not None and owner.expires < now - _FORGET
        ]
        lease = acquire(
            self._journal, f"{_PROCESS}{_myself()[4]}", ops=old, what=f"what shows that process {os.getpid()} runs"
        )
        with self._lock:
            self._shown = lease

    def keep(self, lease: Lease) -> None:
        with self._lock:
            self._held[lease.key, lease.token] = lease
            if self._thread is None:
                # Starting it costs less than a commit; it first wakes after a third of a lease, and outlives short
                # leases till then, so that taking many of them starts one thread.
                self._thread = threading.Thread(target=self._beat, name="agentflow-heartbeat", daemon=True)
                self._thread.start()

    def forget(self, lease: Lease) -> None:
        with self._lock:
            self._held.pop((lease.key, lease.token), None)

    def forget_all(self, key: str) -> None:
        with self._lock:
            gone = [lease for (name, _), lease in self._held.items() if name == key]
        for lease in gone:
            self._lose(lease)

    def _lose(self, lease: Lease) -> None:
        lease.lost = True
        self.forget(lease)
        if lease.on_lost is not None:
            lease.on_lost()

    def _beat(self) -> None:
        while True:
            time.sleep(lease_seconds() / 3)
            with self._lock:
                if not self._held or self._journal.closed:
                    self._thread = None
                    return
                held = list(self._held.values())
            self.renew(held)

    def renew(self, held: Sequence[Lease]) -> None:
        """One sign of life for these leases; those that were taken over are marked lost and let go."""

        def renew(txn: Txn) -> list[bool]:
            expires = txn.now() + lease_seconds()
            return [lease._renew(txn, expires) for lease in held]

        try:
            kept = self._journal.guarded(renew)
        except Exception:
            # A full disk or a held lock: the next beat tries again, and fences decide in the meantime.
            return
        for lease, is_kept in zip(held, kept, strict=True):
            if not is_kept:
                self._lose(lease)


_hearts: weakref.WeakKeyDictionary[Journal, _Heart] = weakref.WeakKeyDictionary()
_hearts_lock = threading.Lock()


def _heart(journal: Journal) -> _Heart:
    heart = _hearts.get(journal)
    if heart is None:
        with _hearts_lock:
            heart = _hearts.setdefault(journal, _Heart(journal))
    return heart


def _after_fork() -> None:
    # The child owns none of its parent's leases and has none of its threads.
    global _hearts_lock
    _hearts_lock = threading.Lock()
    _hearts.clear()
    _myself.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
