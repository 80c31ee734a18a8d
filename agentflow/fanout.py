"""``parallel``: several branches at once, on an event loop."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from agentflow.calls import here
from agentflow.durations import Duration, seconds
from agentflow.errors import BudgetExceeded, StepTimeout, UsageError
from agentflow.run import Execution
from agentflow.waits import branch_label, coroutine_label


class _Parallel:
    """``await parallel([step(...), step(...)])`` and ``await parallel.map(fn, items)``."""

    async def __call__(
        self,
        branches: Iterable[Awaitable[Any]] | Mapping[Any, Awaitable[Any]],
        *,
        concurrency: int | None = None,
        settle: bool = False,
        timeout: Duration | None = None,
    ) -> Any:
        """Run several branches at once; results in the order given, or in a dict with the same keys.

        Args:
            branches: what ``step(...)`` returns, or coroutines; a list or a dict.
            concurrency: how many run at the same time; None: all.
            settle: False cancels the others when one fails and raises its error; True waits for all and
                puts the exception in the place of its result.
            timeout: seconds or a duration for all together; None: no limit.
        """
        named = isinstance(branches, Mapping)
        keys = list(branches) if isinstance(branches, Mapping) else None
        items = list(branches.values() if isinstance(branches, Mapping) else branches)
        for index, item in enumerate(items):
            if not inspect.isawaitable(item):
                where = keys[index] if keys is not None else index
                _close(items)
                raise UsageError(
                    f"parallel: branch {where!r} is {item!r}; give what step(...) returns, or a coroutine."
                )
        labels = [f"{key}" for key in keys] if keys is not None else [_name_of(item) for item in items]
        starts: list[Callable[[], Any]] = [functools.partial(_same, item) for item in items]
        results = await _fan_out(starts, labels, concurrency, settle, timeout, items)
        return dict(zip(keys, results, strict=True)) if named and keys is not None else results

    async def map(
        self,
        fn: Callable[[Any], Any],
        items: Iterable[Any],
        *,
        concurrency: int | None = None,
        key: Callable[[Any], Any] | None = None,
        settle: bool = False,
        timeout: Duration | None = None,
    ) -> list[Any]:
        """``fn`` of each item, each in a branch of its own; results in the items' order.

        Args:
            fn: an async function of one item (or one that returns what ``step(...)`` returns).
            items: what to go over.
            concurrency: how many run at the same time; None: all.
            key: names an item's branch; None: its content does.
            settle: as in ``parallel``.
            timeout: as in ``parallel``.
        """
        if not callable(fn):
            raise UsageError(f"parallel.map({fn!r}, ...): the first argument is a function of one item.")
        given = list(items)
        labels = [branch_label("map", item if key is None else key(item)) for item in given]
        return await _fan_out(
            [functools.partial(_apply, fn, item) for item in given], labels, concurrency, settle, timeout, []
        )


def _name_of(item: Any) -> str | None:
    """The branch name of a coroutine that has not started; what ``step(...)`` returns has its place already."""
    return coroutine_label(item) if inspect.iscoroutine(item) else None


async def _apply(fn: Callable[[Any], Any], item: Any) -> Any:
    result = fn(item)
    return await result if inspect.isawaitable(result) else result


def _same(item: Any) -> Any:
    return item


async def _wrap(item: Awaitable[Any]) -> Any:
    return await item


def _close(items: list[Any]) -> None:
    """Of a fan-out that is refused nothing starts, and nothing was forgotten either."""
    for item in items:
        if hasattr(item, "close"):
            item.close()


def _limits(concurrency: int | None, timeout: Duration | None) -> float | None:
    if concurrency is not None and (
        isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1
    ):
        raise UsageError(f"parallel(concurrency={concurrency!r}): 1 or more, or None for all at once.")
    return seconds(timeout, what="timeout")


async def _fan_out(
    starts: list[Callable[[], Any]],
    labels: list[Any],
    concurrency: int | None,
    settle: bool,
    timeout: Duration | None,
    made: list[Any],
) -> list[Any]:
    try:
        limit = _limits(concurrency, timeout)
    except UsageError:
        _close(made)
        raise
    place = here.get()
    ex: Execution | None = place.ex if place is not None and not place.ex.scratch else None
    if ex is not None:
        place, _ = ex.stand()
    names = [
        ex.label(label, place) if ex is not None and place is not None and label is not None else None
        for label in labels
    ]
    if ex is not None and place is not None:
        ex.expect_branches(place, [name for name in names if name is not None])
    loop = asyncio.get_running_loop()
    results: list[Any] = [None] * len(starts)
    running: dict[Any, int] = {}
    waiting = list(range(len(starts)))[::-1]
    try:
        async with asyncio.timeout(limit):
            while waiting or running:
                while waiting and (concurrency is None or len(running) < concurrency):
                    index = waiting.pop()
                    branch = starts[index]()
                    if ex is not None:
                        ex.naming = names[index]
                    try:
                        task = (
                            branch
                            if isinstance(branch, asyncio.Task)
                            else loop.create_task(branch if asyncio.iscoroutine(branch) else _wrap(branch))
                        )
                    finally:
                        if ex is not None:
                            ex.naming = None
                    running[task] = index
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=running.__getitem__):
                    index = running.pop(task)
                    error = asyncio.CancelledError() if task.cancelled() else task.exception()
                    if error is None:
                        results[index] = task.result()
                    elif settle and isinstance(error, Exception) and not isinstance(error, BudgetExceeded):
                        results[index] = error
                    else:
                        raise error
    except TimeoutError as error:
        if limit is not None and not isinstance(error, StepTimeout):
            raise StepTimeout(f"parallel took longer than {limit:g}s") from error
        raise
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
            for task in running:
                task.cancelled() or task.exception()
        if ex is not None and place is not None:
            ex.branches_ended(place, [name for name in names if name is not None])
        for index in waiting:
            if index < len(made) and hasattr(made[index], "close"):
                made[index].close()
    return results


parallel = _Parallel()
