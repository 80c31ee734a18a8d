"""``parallel`` for plain code: branches in threads."""

from __future__ import annotations

import contextvars
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from typing import Any

from agentflow.blocking import all_left, count_going, leave
from agentflow.calls import Here, here
from agentflow.durations import Duration, seconds
from agentflow.errors import BudgetExceeded, StepTimeout, UsageError
from agentflow.waits import branch_label
from agentflow.workers import threads


class _Parallel:
    """``parallel([f, g])`` with functions of no argument, and ``parallel.map(fn, items)``."""

    def __call__(
        self,
        branches: Iterable[Callable[[], Any]] | Mapping[Any, Callable[[], Any]],
        *,
        concurrency: int | None = None,
        settle: bool = False,
        timeout: Duration | None = None,
    ) -> Any:
        keys = list(branches) if isinstance(branches, Mapping) else None
        items = list(branches.values() if isinstance(branches, Mapping) else branches)
        for index, item in enumerate(items):
            if not callable(item):
                raise UsageError(
                    f"parallel: branch {index} is {item!r}; plain code gives functions: lambda: step(...)."
                )
        labels = [str(key) for key in keys] if keys is not None else [f"branch {i}" for i in range(len(items))]
        results = _fan_out(items, labels, concurrency, settle, timeout)
        return dict(zip(keys, results, strict=True)) if keys is not None else results

    def map(
        self,
        fn: Callable[[Any], Any],
        items: Iterable[Any],
        *,
        concurrency: int | None = None,
        key: Callable[[Any], Any] | None = None,
        settle: bool = False,
        timeout: Duration | None = None,
    ) -> list[Any]:
        given = list(items)
        labels = [branch_label("map", item if key is None else key(item)) for item in given]
        return _fan_out([functools.partial(fn, item) for item in given], labels, concurrency, settle, timeout)


def _fan_out(
    fns: list[Callable[[], Any]], labels: list[str], concurrency: int | None, settle: bool, timeout: Duration | None
) -> list[Any]:
    if concurrency is not None and (
        isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1
    ):
        raise UsageError(f"parallel(concurrency={concurrency!r}): 1 or more, or None for all at once.")
    limit = seconds(timeout, what="timeout")
    deadline = None if limit is None else time.monotonic() + limit
    place = here.get()
    ex = place.ex if place is not None and not place.ex.scratch else None
    names = [ex.label(label, place) if ex is not None and place is not None else label for label in labels]
    if ex is not None and place is not None:
        ex.expect_branches(place, names)
    results: list[Any] = [None] * len(fns)
    running: dict[Future[Any], int] = {}
    waiting = list(range(len(fns)))[::-1]
    first: BaseException | None = None
    given_up: list[tuple[str, str]] = []
    # This thread waits for its branches; one that has ended counts until the next has taken its turn.
    ended = 1
    try:
        while (waiting and first is None) or running:
            while waiting and first is None and (concurrency is None or len(running) < concurrency):
                index = waiting.pop()
                context = contextvars.copy_context()
                if place is not None and ex is not None:
                    branch = f"{place.branch}/{names[index]}"
                    context.run(
                        here.set, Here(ex, place.scope, branch, place.pred, place.epoch, place.outer, None)
                    )
                count_going(ex, 1)
                running[threads.submit(context, fns[index], (), {})] = index
            count_going(ex, -ended)
            ended = 0
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED if first is None else ALL_COMPLETED)
            if not done and limit is not None:
                raise StepTimeout(f"parallel took longer than {limit:g}s")
            for future in done:
                index = running.pop(future)
                ended += 1
                if ex is not None and place is not None:
                    ex.branches_ended(place, [names[index]])
                error = future.exception()
                if error is None:
                    results[index] = future.result()
                elif settle and isinstance(error, Exception) and not isinstance(error, BudgetExceeded):
                    results[index] = error
                elif first is None:
                    first = error
                    if ex is not None and place is not None and isinstance(error, Exception):
                        given_up = [(place.scope, f"{place.branch}/{names[i]}") for i in running.values()]
                        leave(ex, given_up)
    finally:
        for future in running:
            future.add_done_callback(lambda _: count_going(ex, -1))
        if ex is not None and place is not None:
            ex.branches_ended(place, [names[index] for index in (*running.values(), *waiting)])
        count_going(ex, 1 - ended)
    if first is not None:
        if ex is not None:
            all_left(ex, given_up)
        raise first
    return results


parallel = _Parallel()
