"""The end of a commit whose caller was cancelled."""

from __future__ import annotations

import asyncio
from typing import Any


class CancelledAfterCommit(asyncio.CancelledError):
    """Whoever waited for a commit was cancelled, and it has happened; ``result`` is what it gave."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result
