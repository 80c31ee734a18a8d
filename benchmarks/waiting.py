"""What a worker and a listing cost with many waiting and very many finished runs; prints a Markdown table.

    python benchmarks/waiting.py            # 1,000 waiting runs; 0, 10,000 and 100,000 finished ones
    python benchmarks/waiting.py --quick    # smaller, for a look

The runs are documents as a journal holds them; ten of the waiting ones have been answered. Each figure is the median of
seven looks in a process that has looked before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agentflow
from agentflow import rundocs, runs, worker
from agentflow.journal import Journal, Put

START = 1_700_000_000.0


def fill(journal: Journal, status: str, count: int, first: int) -> list[str]:
    """Documents of so many runs of one status; their ids."""
    ids = [f"{status}-{number:06d}" for number in range(first, first + count)]
    for begin in range(0, count, 2000):
        ops: list[Any] = []
        for number, run_id in enumerate(ids[begin : begin + 2000], begin):
            document = {
                "id": run_id, "workflow": "job", "created_at": START + first + number, "epoch": 1, "input": '{"n":1}',
                "status": None, "waiting_on": [], "paid": "0.01",
            }  # fmt: skip
            if status == "waiting":
                document["due"] = START * 2 + number
            ops += rundocs.write(document, status)
        journal.commit(ops)
    return ids


def median(what: Callable[[], object]) -> float:
    """Milliseconds."""
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        what()
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    steps = (0, 500, 5_000) if quick else (0, 10_000, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        agentflow.configure(path=Path(folder) / "journal", quiet=True)
        journal = Journal.open(Path(folder) / "journal")
        waiting = fill(journal, "waiting", 100 if quick else 1_000, 0)
        journal.commit([Put(rundocs.wake_key(run_id), run_id) for run_id in waiting[:10]])
        print("| finished runs | list the waiting ones (ms) | a worker's look, 10 due (ms) |\n|--:|--:|--:|")
        done = 0
        for count in steps:
            fill(journal, "completed", count - done, 1_000_000 + done)
            done = count
            listed = median(lambda: runs.list(status="waiting"))
            looked = median(lambda: list(worker.due(journal, time.time())))
            assert len(runs.list(status="waiting")) == len(waiting)
            assert len(list(worker.due(journal, time.time()))) == 10
            print(f"| {count:,} | {listed:.1f} | {looked:.2f} |", flush=True)


if __name__ == "__main__":
    main()
