"""Ways from plain code into an event loop: a loop in a thread of its own, and coroutines run to their end."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

from agentflow.calls import Call, Current
from agentflow.drive import keep
from agentflow.settings import log

T = TypeVar("T")


class _Portal:
    """One loop in a daemon thread, for async functions that plain code calls."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin without a loop, as in a child process, where the thread of its parent's is not."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or not self._loop.is_running():
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="agentflow-loop", daemon=True).start()
                while not self._loop.is_running():
                    time.sleep(0.0005)
            return self._loop

    def start(
        self, context: contextvars.Context, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[Any]:
        loop = self.loop()
        future: Future[Any] = Future()

        def begin() -> None:
            try:
                task = context.run(loop.create_task, _await_call(fn, args, kwargs))
            except BaseException as error:
                future.set_exception(error)
                return
            task.add_done_callback(lambda done: _copy(done, future))
            future.add_done_callback(lambda f: f.cancelled() and loop.call_soon_threadsafe(task.cancel))

        loop.call_soon_threadsafe(begin)
        return future

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Run an async function there and wait; Ctrl-C cancels it."""
        future = self.start(contextvars.copy_context(), fn, args, {})
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


async def _await_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return await fn(*args, **kwargs)


def _copy(task: asyncio.Task[Any], future: Future[Any]) -> None:
    if future.cancelled():
        task.cancelled() or task.exception()
    elif task.cancelled():
        future.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


portal = _Portal()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=portal.begin)


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from plain code, in a thread of its own where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        running = False
    else:
        running = True
    if not running:
        return asyncio.run(coroutine)
    context = contextvars.copy_context()
    box: list[Any] = []
    ready = threading.Event()

    async def main() -> T:
        box.append((asyncio.get_running_loop(), asyncio.current_task()))
        ready.set()
        return await coroutine

    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append((True, context.run(asyncio.run, main())))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=target, name="agentflow-run", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        ready.wait(5)
        if box:
            box[0][0].call_soon_threadsafe(box[0][1].cancel)
        thread.join(30)
        raise
    ok, value = outcome[0]
    if not ok:
        raise value
    result: T = value
    return result


async def result_of(value: Awaitable[Any]) -> Any:
    """What an awaitable gives, as a coroutine."""
    return await value


# -- model calls of plain code ---------------------------------------------------------------


def paid(call: Call, current: Current) -> Any:
    """``drive._paid`` in the calling thread."""
    ex = call.ex
    future = portal.start(contextvars.copy_context(), call.fn, call.args, call.kwargs)
    ex.paying[future] = call
    future.add_done_callback(lambda done: ex.paying.pop(done, None))
    try:
        return future.result()
    except CancelledError as error:  # an Exception here, and no failure of the step
        raise asyncio.CancelledError from error
    except BaseException as error:
        if current.stop is not None:  # what goes on at the provider is not waited for here
            current.stop()
        if not isinstance(error, Exception):  # Ctrl-C
            if not future.done():
                stop_paying({future: call})
            current.left = True
            if future.done():
                keep(future, current)
        raise


def stop_paying(calls: dict[Future[Any], Call]) -> None:
    """Model calls whose callers go: those not sent yet are not sent, the others are paid for and waited for."""
    for future, call in list(calls.items()):
        if call.withdraw():
            future.cancel()
    if sent := [future for future in list(calls) if not future.done()]:
        log.info("waiting for a paid model call in flight, so that its reply is recorded")
        wait(sent, timeout=120)
