"""The world outside: a payment service and a warehouse that write down whatever is asked of them.

They stand for servers, so what they keep survives any death of the program that calls them.
"""

from __future__ import annotations

import os
import signal
from decimal import Decimal
from pathlib import Path

UNREACHABLE = ("02",)
"""Orders whose first charge meets a payment service that does not answer."""


def charge(order_id: str, total: Decimal, *, key: str) -> str:
    if order_id.endswith(UNREACHABLE) and not happened("unreachable", order_id):
        note("unreachable", order_id)
        raise ConnectionError("the payment service did not answer")
    note("charge", order_id, f"{total}", key)
    return f"pay-{order_id}"


def refund(payment: str) -> None:
    note("refund", payment.removeprefix("pay-"))


def ship(order_id: str, *, key: str) -> str:
    if order_id == os.environ.get("AGENTFLOW_DEMO_KILL"):  # what the demo is about
        os.kill(os.getpid(), signal.SIGKILL)
    note("ship", order_id, key)
    return f"parcel-{order_id}"


def book() -> Path:
    """One line for each thing that happened, of all processes together."""
    return Path(os.environ.get("AGENTFLOW_DEMO_BOOK", os.devnull))


def note(*words: str) -> None:
    descriptor = os.open(book(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, (" ".join(words) + "\n").encode())
    finally:
        os.close(descriptor)


def read() -> list[list[str]]:
    """What happened so far, in order, as words."""
    return [line.split() for line in book().read_text().splitlines()] if book().is_file() else []


def happened(what: str, order_id: str) -> bool:
    return any(words[:2] == [what, order_id] for words in read())
