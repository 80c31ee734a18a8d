"""What a commit is made of: operations on rows, the fence that it carries, and what a guarded function may do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from agentflow.errors import LeaseLost
from agentflow.plain import Plain


class Add(Plain):
    """Record ``value`` under ``key`` unless the key is taken: the first one wins."""

    __slots__ = ("key", "value")

    def __init__(self, key: str, value: str) -> None:
        self.key = key
        self.value = value


class Put(Plain):
    """Write ``value`` under ``key``, replacing what was there (for documents that change)."""

    __slots__ = ("key", "value")

    def __init__(self, key: str, value: str) -> None:
        self.key = key
        self.value = value


class Drop(Plain):
    """Remove ``key``; nothing happens when it is not there."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key


Op = Add | Put | Drop


class Fence(Plain):
    """A commit carrying it is refused with LeaseLost unless lease row ``key`` still has this ``token``."""

    __slots__ = ("key", "token")

    def __init__(self, key: str, token: int) -> None:
        self.key = key
        self.token = token


def lease_starts(fence: Fence) -> str:
    """What the lease row of the fence begins with while the lease is held."""
    # Lease rows are written with the token first (lease.py), so no JSON needs to be parsed here.
    return f'{{"token":{fence.token},'


def check(fence: Fence, lease: str | None) -> None:
    """Raise LeaseLost unless the lease row, as it stands there, carries the fence's token."""
    if lease is None or not lease.startswith(lease_starts(fence)):
        raise LeaseLost(
            f"{fence.key}: this process no longer owns it (token {fence.token} was replaced): another process "
            "took over after the lease had run out. Nothing was committed; run it again to go on from its records."
        )


class Txn(ABC):
    """What a guarded function reads and writes: a transaction that has the journal to itself, only during the call."""

    __slots__ = ()

    @abstractmethod
    def get(self, key: str) -> str | None:
        """The value of ``key``, None when there is none."""

    @abstractmethod
    def scan(self, prefix: str, after: str = "") -> list[tuple[str, str]]:
        """The rows whose keys begin with ``prefix``, a text of ASCII, and come after ``after``. They should be few."""

    @abstractmethod
    def add(self, key: str, value: str) -> bool:
        """Record unless the key is taken. True if it was recorded."""

    @abstractmethod
    def put(self, key: str, value: str) -> None:
        """Write, replacing what was there."""

    @abstractmethod
    def drop(self, key: str) -> None:
        """Remove the key if it is there."""

    @abstractmethod
    def apply(self, ops: Sequence[Op]) -> list[bool]:
        """Do all ops in order. Per Add: True if it was recorded; Put and Drop: True."""

    @abstractmethod
    def now(self) -> float:
        """Epoch seconds by the clock that everybody who shares the journal goes by."""

    def check(self, fence: Fence) -> None:
        """Raise LeaseLost unless the lease row still carries the fence's token."""
        check(fence, self.get(fence.key))
