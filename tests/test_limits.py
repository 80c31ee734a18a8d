"""Limits of a model are kept by all steps of a process, in the order in which they came."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentflow import configure, current_step, generate_content, limits, parallel, step, sync, workflow
from agentflow.errors import ModelError, UsageError
from agentflow.limits import Limit, Meter, Use
from tests.loopback import Loopback, answer_to
from tests.programs import run_program, start_program

MODEL = "openai:gpt-4o-mini"


class Counting(Loopback):
    """A server that knows how many requests it has at the same time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.now = self.most = 0
        self.release = threading.Event()
        self.release.set()

    def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
        found = super().arrive(asked, path)
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.release.wait(30)
        return found

    def answer(self, number: int, asked: Any, status: int) -> None:
        with self._lock:
            self.now -= 1
            self._note({"event": "answered", "n": number, "status": status, "digest": ""})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Counting() as started:
        for key, value in started.environment.items():
            monkeypatch.setenv(key, value)
        yield started
        started.release.set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(limits, "clock", lambda: now[0])
    return now


async def until(happened: Callable[[], Any]) -> None:
    while not happened():  # noqa: ASYNC110 - it happens in other threads
        await asyncio.sleep(0.002)


def meter() -> Meter:
    found = limits.meter(MODEL)
    assert found is not None
    return found


# -- at the same time --------------------------------------------------------------------------------------------------


async def test_no_more_calls_than_allowed_are_under_way_at_once(server: Counting) -> None:
    configure(limits={MODEL: {"concurrency": 3}})
    server.release.clear()

    @workflow("fan")
    async def fan(ctx: Any) -> list[str]:
        return await parallel([generate_content(f"q {n}", model=MODEL) for n in range(20)])

    run = asyncio.ensure_future(fan.run())
    await until(lambda: len(server.arrived) == 3 and len(meter().line._places) == 17)
    server.release.set()
    assert await run == [answer_to(f"q {n}") for n in range(20)]
    assert len(server.arrived) == 20 and server.most == 3


def test_runs_in_several_threads_and_loops_share_the_limit(server: Counting) -> None:
    server.latency = 0.01
    configure(limits={"openai:*": Limit(concurrency=2)})

    @workflow("one")
    async def one(ctx: Any, n: int) -> list[str]:
        return await parallel([generate_content(f"a {n} {i}", model=MODEL) for i in range(3)])

    @sync.workflow("two")
    def two(ctx: Any, n: int) -> list[str]:
        return sync.parallel.map(lambda i: sync.generate_content(f"b {n} {i}", model=MODEL), range(3))

    threads = [threading.Thread(target=flow.run_sync, args=(n,)) for n in range(2) for flow in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(server.answered) == 12 and server.most <= 2


async def test_a_limit_is_for_each_model_by_itself_and_the_nearest_name_counts(server: Counting) -> None:
    configure(limits={"openai:*": {"concurrency": 1}, "*": {"concurrency": 7}, MODEL: {}})
    assert limits.limit_of(MODEL) == Limit()
    assert limits.limit_of("openai:gpt-5") == Limit(concurrency=1)
    assert limits.limit_of("anthropic:claude-haiku-4-5") == Limit(concurrency=7)
    assert limits.meter("openai:gpt-5") is not limits.meter("openai:gpt-5-mini")
    configure(limits=None)
    assert limits.meter("openai:gpt-5") is None


# -- in a minute -------------------------------------------------------------------------------------------------------


def test_requests_of_any_sixty_seconds_are_counted(clock: list[float]) -> None:
    counted = Meter(Limit(rpm=2))
    assert counted.admit(Use(0)) is None
    clock[0] += 10
    assert counted.admit(Use(0)) is None
    assert counted.admit(Use(0)) == 50
    clock[0] += 49.5
    assert counted.admit(Use(0)) == 0.5
    clock[0] += 0.5
    assert counted.admit(Use(0)) is None
    assert counted.admit(Use(0)) == 10


def test_tokens_count_as_they_may_be_until_they_are_known(clock: list[float]) -> None:
    counted = Meter(Limit(tpm=1000))
    first, second = Use(600), Use(300)
    assert counted.admit(first) is None
    clock[0] += 1
    assert counted.admit(second) is None
    assert counted.admit(Use(200)) == 59
    counted.done(first, 150)
    assert counted.admit(Use(200)) is None
    assert counted.admit(Use(5000)) == 60, "more than all: when nothing else counts"
    clock[0] += 60
    assert counted.admit(Use(5000)) is None


def test_what_was_not_sent_after_all_does_not_count(clock: list[float]) -> None:
    counted = Meter(Limit(rpm=1, concurrency=1))
    use = Use(0)
    assert counted.admit(use) is None
    counted.done(use, None, sent=False)
    assert counted.admit(Use(0)) is None


async def test_calls_beyond_the_rate_are_sent_when_a_minute_has_passed_in_order(
    server: Counting, clock: list[float]
) -> None:
    configure(limits={MODEL: {"rpm": 2}})
    tasks = [asyncio.ensure_future(generate_content(f"q {n}", model=MODEL)) for n in range(5)]
    for sent in (2, 4, 5):
        await until(lambda: len(server.answered) == sent and len(meter().line._places) == 5 - sent)  # noqa: B023
        clock[0] += 60
        meter().line.changed()
    await asyncio.gather(*tasks)
    assert sorted(event["text"] for event in server.arrived[:2]) == ["q 0", "q 1"]
    assert sorted(event["text"] for event in server.arrived[2:4]) == ["q 2", "q 3"]


async def test_tokens_a_minute_hold_up_a_call_that_may_use_too_many(server: Counting, clock: list[float]) -> None:
    configure(limits={MODEL: {"tpm": 500}})
    server.release.clear()
    first = asyncio.ensure_future(generate_content("one", model=MODEL, max_tokens=300))
    await until(lambda: server.arrived)
    second = asyncio.ensure_future(generate_content("two", model=MODEL, max_tokens=300))
    await until(lambda: meter().line._places)
    server.release.set()
    await first
    assert await second == answer_to("two"), "the first one had used less"


# -- Retry-After -------------------------------------------------------------------------------------------------------


async def test_a_retry_after_holds_up_all_calls_of_the_model(server: Counting, clock: list[float]) -> None:
    server.script = [{"status": 429, "headers": {"retry-after": "20"}, "body": {"error": {"message": "slow down"}}}]
    configure(limits={MODEL: {}})
    with pytest.raises(ModelError):
        await generate_content("first", model=MODEL, retry={"max_attempts": 1})
    second = asyncio.ensure_future(generate_content("second", model=MODEL))
    await until(lambda: meter().line._places)
    assert meter().admit(Use(0)) == 20
    other = await generate_content("other", model="openai:gpt-5-mini")
    assert other == answer_to("other") and len(server.arrived) == 2
    clock[0] += 20
    meter().line.changed()
    assert await second == answer_to("second")


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_a_call_that_waits_for_a_limit_and_is_cancelled_is_never_sent_nor_in_doubt(
    server: Counting, said: Callable[[], str], again: Callable[[], None]
) -> None:
    configure(limits={MODEL: {"concurrency": 1}})
    server.release.clear()

    @workflow("cancel")
    async def cancel(ctx: Any) -> list[str]:
        first = asyncio.ensure_future(generate_content("first", model=MODEL))
        await until(lambda: server.arrived)
        second = asyncio.ensure_future(generate_content("second", model=MODEL))
        if not server.release.is_set():
            await until(lambda: meter().line._places)
            second.cancel()
            await asyncio.wait([second])
            server.release.set()
            return [await first]
        return [await first, await second]

    assert await cancel.options(run_id="c").run() == [answer_to("first")]
    assert [event["text"] for event in server.arrived] == ["first"]
    again()
    assert await cancel.options(run_id="c").run() == [answer_to("first"), answer_to("second")]
    assert "doubt" not in said()


async def test_a_failing_sibling_takes_back_what_was_not_sent(server: Counting) -> None:
    configure(limits={MODEL: {"concurrency": 1}})
    server.release.clear()

    async def fail() -> None:
        await until(lambda: server.arrived and len(meter().line._places) == 5)
        asyncio.get_running_loop().call_later(0.05, server.release.set)
        raise ValueError("no")

    @workflow("sibling")
    async def sibling(ctx: Any) -> Any:
        return await parallel([step("fail", fail), *(generate_content(f"q {n}", model=MODEL) for n in range(6))])

    with pytest.raises(ValueError):
        await sibling.run()
    assert len(server.arrived) == 1


async def test_a_run_that_is_stopped_sends_nothing_more_while_its_body_tidies_up(server: Counting) -> None:
    configure(limits={MODEL: {"concurrency": 1}})
    server.release.clear()
    tidied = asyncio.Event()

    @workflow("tidy")
    async def tidy(ctx: Any) -> None:
        first = asyncio.ensure_future(generate_content("first", model=MODEL))
        await until(lambda: server.arrived)
        second = asyncio.ensure_future(generate_content("second", model=MODEL))
        try:
            await asyncio.Event().wait()
        finally:
            server.release.set()
            await until(lambda: meter()._under_way == 0 or len(server.arrived) > 1)
            tidied.set()
            first.cancel()
            second.cancel()

    run = asyncio.ensure_future(tidy.run())
    await until(lambda: limits.meter(MODEL) is not None and meter().line._places)
    run.cancel()
    await asyncio.wait([run])
    assert tidied.is_set() and [event["text"] for event in server.arrived] == ["first"]


async def test_a_call_whose_caller_went_asks_no_second_time(server: Counting) -> None:
    server.script = [{"text": "no json"}]
    server.release.clear()

    @workflow("gone")
    async def gone(ctx: Any) -> str:
        first = asyncio.ensure_future(generate_content("first", model=MODEL, output_type=list[int], reask=3))
        await until(lambda: server.arrived)
        first.cancel()
        await asyncio.wait([first])
        server.release.set()
        await until(lambda: not ctx._ex.stragglers or len(server.arrived) > 1)
        return "done"

    assert await gone.run() == "done"
    assert len(server.arrived) == len(server.answered) == 1
    assert gone.runs()[0].cost > 0, "the reply that was in flight is kept"


async def test_waiting_for_a_limit_does_not_count_against_the_timeout_of_the_step(server: Counting) -> None:
    configure(limits={MODEL: {"concurrency": 1}})
    server.release.clear()
    held = asyncio.ensure_future(generate_content("held", model=MODEL))
    await until(lambda: server.arrived)

    clocks: list[Any] = []

    async def work() -> list[Any]:
        clock = current_step().clock
        clocks.append(clock)
        answer = await generate_content("timed", model=MODEL)
        return [answer, clock.when() is not None]

    @workflow("timed")
    async def timed(ctx: Any) -> list[Any]:
        return await step("timed", work, timeout="10m")

    run = asyncio.ensure_future(timed.run())
    await until(lambda: meter().line._places)
    assert clocks[0].when() is None, "it stands still"
    server.release.set()
    await held
    assert await run == [answer_to("timed"), True]


def test_a_kill_while_a_call_waits_leaves_it_not_in_doubt(tmp_path: Path, server: Counting) -> None:
    program = """
        from agentflow import limits
        configure(limits={"*": {"concurrency": 1}})

        @workflow("queue")
        async def queue(ctx):
            calls = [generate_content(word, model="openai:gpt-4o-mini", name=word) for word in ("first", "second")]
            if "begin" in sys.argv:
                async def watch():
                    while not (HERE / "go").exists():
                        await asyncio.sleep(0.005)
                    assert limits.meter("openai:gpt-4o-mini").line._places
                    die()
                calls.append(watch())
            return await asyncio.gather(*calls)

        print(queue.run_sync())
    """
    server.release.clear()
    process = start_program(program, tmp_path, "begin", env=server.environment)
    while not server.arrived:
        assert process.poll() is None
        time.sleep(0.01)
    (tmp_path / "go").touch()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    server.release.set()
    ended = run_program(program, tmp_path, env=server.environment)
    assert "first: in doubt" in ended.err and "second: in doubt" not in ended.err
    assert [event["text"] for event in server.arrived].count("second") == 1


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, says",
    [
        (["openai:x"], "no dict of models"),
        ({"gpt-4o-mini": {"rpm": 1}}, 'Write "openai:gpt-4o-mini"'),
        ({5: {"rpm": 1}}, "5 is no model"),
        ({MODEL: 8}, "neither a dict nor a Limit"),
        ({MODEL: {"rps": 1}}, "unknown 'rps'; known are concurrency, rpm, tpm"),
        ({MODEL: {"rpm": 0}}, "rpm=0 is not a whole number"),
        ({MODEL: {"tpm": 1.5}}, "tpm=1.5 is not a whole number"),
        ({MODEL: {"concurrency": True}}, "concurrency=True is not"),
        ({MODEL: Limit(rpm=-1)}, "rpm=-1 is not"),
    ],
)
def test_bad_limits_are_refused_and_those_before_stay(bad: Any, says: str) -> None:
    configure(limits={MODEL: {"rpm": 5}})
    with pytest.raises(UsageError, match=says):
        configure(limits=bad)
    assert limits.limit_of(MODEL) == Limit(rpm=5)
