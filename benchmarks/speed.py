"""Speed against raw SQLite, as ratios measured in one run; prints a Markdown table.

    python benchmarks/speed.py            # all
    python benchmarks/speed.py --quick    # smaller, for a look

The yardstick is a table in SQLite with WAL and synchronous FULL, written with the same 2 KB values, one
synced commit each. Rounds of ours and of the yardstick alternate, so that a machine that slows down slows
both; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import agentflow
from agentflow import workflow


def value(i: int) -> dict[str, object]:
    return {"text": "x" * 2000, "n": i}


class Raw:
    """The yardstick: one table, one synced commit per write."""

    def __init__(self, folder: Path) -> None:
        self.con = sqlite3.connect(folder / "raw.db", isolation_level=None)
        self.con.execute("pragma journal_mode=wal")
        self.con.execute("pragma synchronous=full")
        self.con.execute("create table if not exists t (k text primary key, v text)")
        self.count = self.con.execute("select count(*) from t").fetchone()[0]

    def write(self, n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            self.count += 1
            text = json.dumps(value(self.count))
            self.con.execute("insert into t values (?, ?)", (f"key-{self.count:09d}", text))
        return (time.perf_counter() - start) / n

    def read(self, n: int) -> float:
        """Reading a record so that its value can be used: the row and its JSON."""
        start = time.perf_counter()
        for i in range(n):
            json.loads(
                self.con.execute("select v from t where k = ?", (f"key-{i % self.count + 1:09d}",)).fetchone()[0]
            )
        return (time.perf_counter() - start) / n


async def produce(i: int) -> dict[str, object]:
    return value(i)


def produce_sync(i: int) -> dict[str, object]:
    return value(i)


timings: dict[str, float] = {}


@workflow("bench-async")
async def bench_async(ctx: agentflow.Context, n: int, tag: str) -> None:
    start = time.perf_counter()
    for i in range(n):
        await agentflow.step("produce", produce, i)
    timings["async"] = (time.perf_counter() - start) / n


@workflow("bench-sync")
async def bench_sync(ctx: agentflow.Context, n: int, tag: str) -> None:
    start = time.perf_counter()
    for i in range(n):
        await agentflow.step("produce", produce_sync, i)
    timings["sync"] = (time.perf_counter() - start) / n


async def fifty_ms(i: int) -> int:
    await asyncio.sleep(0.05)
    return i


@workflow("bench-fan-out")
async def bench_fan_out(ctx: agentflow.Context, n: int, tag: str) -> None:
    start = time.perf_counter()
    await asyncio.gather(*(agentflow.step("wait", fifty_ms, i) for i in range(n)))
    timings["fan-out"] = time.perf_counter() - start


async def tiny(i: int) -> int:
    return i


@workflow("bench-long")
async def bench_long(ctx: agentflow.Context, n: int) -> None:
    width = 500
    for start in range(0, n, width):
        await asyncio.gather(*(agentflow.step("tiny", tiny, i) for i in range(start, min(n, start + width))))


def long_run(n: int, folder: str) -> dict[str, float]:
    """Replay of a run of n steps in this process: process time of the replay and growth of memory."""
    agentflow.configure(path=folder, quiet=True)
    bench_long.run_sync(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    bench_long.run_sync(n)
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def in_process(*args: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *args], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def median_of(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """The measures in turn, ``rounds`` times, after one turn that does not count."""
    for measure in measures:
        measure()
    results: list[list[float]] = [[] for _ in measures]
    for _ in range(rounds):
        for result, measure in zip(results, measures, strict=True):
            result.append(measure())
    return results


def ratio(ours: list[float], raw: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, raw, strict=True))


def once(code: str) -> float:
    """Seconds of a whole process that executes this code."""
    return process("-c", code)


def process(*arguments: str) -> float:
    """Seconds of a whole process of Python, with compiled modules as an installed package has them."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), env.get("PYTHONPATH")]))
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--long", type=int)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.long:
        print(json.dumps(long_run(args.long, args.folder)))
        return
    rounds, n = (3, 100) if args.quick else (9, 300)
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["AGENTFLOW_PATH"] = str(folder / "journal")
        agentflow.configure(path=folder / "journal", quiet=True)
        raw = Raw(folder)
        tags = iter(range(10**9))

        def fresh(which: str, flow: object) -> Callable[[], float]:
            def measure() -> float:
                flow.run_sync(n, f"t{next(tags)}")  # type: ignore[attr-defined]
                return timings[which]

            return measure

        ours_async, ours_sync, writes = median_of(
            rounds, fresh("async", bench_async), fresh("sync", bench_sync), lambda: raw.write(n)
        )
        per = statistics.median(writes) * 1e6
        rows.append(
            (
                "fresh durable step, async function",
                f"{ratio(ours_async, writes):.2f}x a raw write ({per:.0f} µs)",
                "1.4x",
            )
        )
        rows.append(
            ("fresh durable step, sync function in its thread", f"{ratio(ours_sync, writes):.2f}x a raw write", "2x")
        )

        bench_async.run_sync(n, "replayed")

        def replay() -> float:
            bench_async.run_sync(n, "replayed")
            return timings["async"]

        replays, reads = median_of(rounds, replay, lambda: raw.read(n))
        per = statistics.median(reads) * 1e6
        rows.append(("replayed step", f"{ratio(replays, reads):.2f}x a raw read ({per:.1f} µs)", "3x"))

        def fan() -> float:
            bench_fan_out.run_sync(200, f"t{next(tags)}")
            return timings["fan-out"]

        fans = median_of(rounds, fan)[0]
        rows.append(
            ("200 concurrent 50 ms steps, done and durable", f"{statistics.median(fans) * 1000:.0f} ms", "70 ms")
        )

        sizes = (2_000, 20_000) if args.quick else (10_000, 100_000)
        results = []
        for size in sizes:
            where = str(folder / f"long-{size}")
            in_process("--long", str(size), "--folder", where)
            runs = [in_process("--long", str(size), "--folder", where) for _ in range(1 if args.quick else 3)]
            results.append(min(runs, key=lambda r: r["cpu"]))
        small, large = results
        rows.append((f"{sizes[0]:,} steps replayed, process time", f"{small['cpu']:.2f} s", "0.8 s"))
        per_step = (large["cpu"] / sizes[1]) / (small["cpu"] / sizes[0])
        rows.append((f"{sizes[1]:,} steps: cost per step against {sizes[0]:,}", f"{per_step:.2f}x", "1.2x"))
        rows.append((f"{sizes[1]:,} steps: growth of memory", f"{large['mb']:.0f} MB", "64 MB"))

        names = "agentflow.step, agentflow.workflow, agentflow.generate_content, agentflow.human_task, agentflow.runs"
        bare, imported, loaded = median_of(
            rounds,
            lambda: once("import asyncio"),
            lambda: once("import asyncio, agentflow"),
            lambda: once(f"import asyncio, agentflow; {names}"),
        )
        for what, times in (("import agentflow", imported), ("import agentflow and use its main names", loaded)):
            extra = statistics.median(b - a for a, b in zip(bare, times, strict=True))
            rows.append((f"{what}, beyond asyncio", f"{extra * 1000:.0f} ms", "60 ms"))
        plain, on_loop = folder / "plain.py", folder / "on_loop.py"
        plain.write_text(
            "from agentflow.sync import step, workflow\n@workflow\ndef w(ctx, x: int):\n    return step('a', f, x)\n"
            "def f(x):\n    return x\nprint(w.options(fresh=True).run(1))\n"
        )
        on_loop.write_text(
            "from agentflow import step, workflow\n@workflow\nasync def w(ctx, x: int):\n"
            "    return await step('a', f, x)\n"
            "async def f(x):\n    return x\nprint(w.options(fresh=True).run_sync(1))\n"
        )
        sqlite = (
            f"import sqlite3; c = sqlite3.connect({str(folder / 'bare.db')!r}, isolation_level=None);"
            "c.execute('pragma journal_mode=wal'); c.execute('pragma synchronous=full');"
            "c.execute('create table if not exists t (k, v)'); c.execute('insert into t values (1, 2)')"
        )
        ours, theirs, with_json, ours_on_loop, with_loop = median_of(
            rounds,
            lambda: process(str(plain)),
            lambda: once(sqlite),
            lambda: once(f"{sqlite}; import orjson"),
            lambda: process(str(on_loop)),
            lambda: once("import asyncio"),
        )
        opening = "a bare process opening SQLite"
        for what, mine, other, against, goal in (
            ("one-step script of plain code (`agentflow.sync`), start to result", ours, theirs, opening, "2.2x"),
            ("of that, opening SQLite and importing orjson", with_json, theirs, opening, ""),
            ("one-step async script, start to result", ours_on_loop, with_loop, "a bare process importing asyncio", ""),
        ):
            ms = f"{statistics.median(mine) * 1000:.0f} ms against {statistics.median(other) * 1000:.0f} ms"
            rows.append((what, f"{ratio(mine, other):.2f}x {against} ({ms})", goal))
    print("| what | measured | goal |\n|---|---|---|")
    for what, measured, goal in rows:
        print(f"| {what} | {measured} | {goal} |")


if __name__ == "__main__":
    main()
