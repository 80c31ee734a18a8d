"""Instants and dollars as people read them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Decimal


def moment(epoch: float | None) -> datetime | None:
    """An aware UTC datetime from seconds since 1970."""
    return None if epoch is None else datetime.fromtimestamp(epoch, UTC)


def money(dollars: Decimal | None) -> str:
    """Dollars for people: four decimals below ten dollars, two above.

    >>> from decimal import Decimal
    >>> money(Decimal("0.00213")), money(Decimal(12)), money(None)
    ('$0.0021', '$12.00', 'unknown')
    """
    if dollars is None:
        return "unknown"
    return f"${dollars:.4f}" if abs(dollars) < 10 else f"${dollars:.2f}"
