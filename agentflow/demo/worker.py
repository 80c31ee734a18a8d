"""The process that `agentflow demo` starts, kills and starts again: it processes all orders of a batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from importlib.resources import files

from agentflow.demo.model import scripted
from agentflow.demo.orders import Order, process_order


def orders(batch: int) -> list[Order]:
    """The orders of the bundled file, under ids that no earlier demo used."""
    rows = json.loads(files("agentflow.demo").joinpath("orders.json").read_text(encoding="utf-8"))
    return [Order.model_validate(row | {"id": f"demo-{batch}{row['id']}"}) for row in rows]


async def work(batch: int) -> None:
    for order in orders(batch):
        await process_order.start(order)


if __name__ == "__main__":
    with scripted() if "--live" not in sys.argv else contextlib.nullcontext():
        asyncio.run(work(int(sys.argv[1])))
