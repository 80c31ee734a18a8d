"""A cancelled run leaves nothing going on at its providers, and no reply that was paid for is lost to the ledger."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from agentflow import (
    Context,
    RunCancelled,
    Waiting,
    costs,
    generate_content,
    human_task,
    leftover,
    parallel,
    runs,
    worker,
    workflow,
)
from agentflow.cli.app import run as command
from agentflow.settings import settings
from agentflow.testing import FakeModel
from tests.loopback import Loopback, answer_to

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
each_model = pytest.mark.parametrize("model", MODELS)
MODEL = MODELS[0]


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("AGENTFLOW_POLL_SECONDS", "0.001")
    with Loopback(polls=None) as started:
        for key, value in started.environment.items():
            monkeypatch.setenv(key, value)
        yield started


@workflow("research")
async def research(ctx: Context, text: str) -> str:
    return str(await generate_content(text, model=MODEL, background=True))


def fan(model: str, count: int = 5) -> Any:
    @workflow("fan")
    async def flow(ctx: Context) -> list[str]:
        return await parallel([generate_content(f"Hi {n}", model=model, batch=True) for n in range(count)])

    return flow


def cancels(server: Loopback) -> list[str]:
    """The paths of all requests to cancel something."""
    calls = [event["path"] for event in server.events if event["event"] == "cancelled"]
    return calls + [path for method, path in server.batching_events if method == "POST" and path.endswith("/cancel")]


def ledger(journal: Any) -> list[dict[str, Any]]:
    return [row for _, _, row in costs.entries(journal) if "saved" not in row]


def replies(journal: Any) -> list[dict[str, Any]]:
    return [json.loads(text) for _, text in journal.scan("m/")]


async def in_flight(server: Loopback, text: str = "Hi") -> asyncio.Task[str]:
    """A run whose call is in the background, and looked at."""
    task = asyncio.create_task(research.run(text))
    while not server.looked:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    return task


async def interrupted(server: Loopback) -> str:
    """The id of a run that nobody executes and whose call is in the background."""
    task = await in_flight(server)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (run,) = runs.list()
    assert run.status == "interrupted"
    return run.id


# -- calls in the background ---------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [None, {"input_tokens": 1000, "output_tokens": 50, "total_tokens": 1050}])
async def test_a_call_in_the_background_is_cancelled_and_what_it_cost_is_in_the_ledger_once(
    server: Loopback, journal: Any, usage: Any, said: Any
) -> None:
    server.cancelled_usage = usage
    task = await in_flight(server)
    (run,) = runs.list()
    assert runs.cancel(run.id).status == "cancelled"
    with pytest.raises(RunCancelled):
        await task
    assert cancels(server) == ["/v1/responses/resp_fake_1/cancel"] and len(server.arrived) == 1
    assert "call resp_fake_1 is cancelled at the provider" in said()
    (entry,) = ledger(journal)
    (reply,) = replies(journal)
    assert reply["body"]["status"] == "cancelled" and entry["in"] == (1000 if usage else 0)
    assert (entry["cost"] is not None) == (usage is not None)
    assert runs.get(run.id).cost == Decimal(entry["cost"] or 0)
    assert list(leftover.left(journal)) == [] and list(journal.keys("lease-ab/")) == []


async def test_a_reply_that_was_there_already_is_paid_for_and_kept(server: Loopback, journal: Any) -> None:
    run_id = await interrupted(server)
    server.flights["resp_fake_1"]["left"] = 0
    runs.cancel(run_id)
    (reply,) = replies(journal)
    assert reply["body"]["status"] == "completed" and answer_to("Hi") in json.dumps(reply["body"])
    assert runs.get(run_id).cost == Decimal(reply["cost"]) == Decimal(ledger(journal)[0]["cost"]) > 0
    runs.cancel(run_id)
    await leftover.collect(journal)
    assert len(ledger(journal)) == 1 and list(leftover.left(journal)) == []


async def test_what_was_set_aside_in_a_budget_is_given_back(server: Loopback, journal: Any) -> None:
    @workflow("dear", budget="5")
    async def dear(ctx: Context) -> Any:
        return await generate_content("Hi", model=MODEL, background=True)

    task = asyncio.create_task(dear.run())
    while not server.looked:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(list(journal.keys("lr/"))) == 1
    runs.cancel(runs.list()[0].id)
    assert list(journal.keys("lr/")) == [] and len(ledger(journal)) == 1


async def test_a_call_that_the_provider_does_not_know_is_over(server: Loopback, journal: Any) -> None:
    run_id = await interrupted(server)
    server.flights.clear()
    runs.cancel(run_id)
    assert list(leftover.left(journal)) == [] and replies(journal) == []
    assert any(key.endswith("!lost") for key, _ in journal.keys("i/"))


async def test_a_call_that_is_submitted_while_its_run_is_cancelled_is_cancelled_too(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = server.take

    def late(body: Any, whole: Any) -> Any:
        runs.cancel(runs.list()[0].id)
        return take(body, whole)

    monkeypatch.setattr(server, "take", late)
    with pytest.raises(RunCancelled):
        await research.run("Hi")
    assert cancels(server) == ["/v1/responses/resp_fake_1/cancel"]


async def test_nothing_is_asked_for_a_run_that_has_nothing_at_a_provider(server: Loopback, journal: Any) -> None:
    server.polls = 0

    @workflow("asks")
    async def asks(ctx: Context) -> None:
        await generate_content("Hi", model=MODEL, background=True)
        await human_task("approve")

    with pytest.raises(Waiting):
        await asks.run()
    runs.cancel(runs.list()[0].id)
    assert cancels(server) == [] and list(leftover.left(journal)) == [] and len(ledger(journal)) == 1


# -- batches -------------------------------------------------------------------------------------------


def waiting(flow: Any) -> str:
    with pytest.raises(Waiting):
        flow.run_sync()
    return runs.list()[0].id


@each_model
def test_a_batch_is_cancelled_and_the_replies_it_had_are_collected_by_a_worker(
    server: Loopback, journal: Any, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.batching.done = 3
    run_id = waiting(fan(model))
    assert runs.cancel(run_id).status == "cancelled"
    assert len(cancels(server)) == 1 and [run for run, _ in leftover.left(journal)] == [run_id]
    command(["doctor", "--json"])
    assert "1 cancelled runs may have something at a provider; a worker collects it" in capsys.readouterr().out
    worker.work([fan(model)], once=True)
    assert list(leftover.left(journal)) == [] and len(cancels(server)) == 1
    assert len(replies(journal)) == len(ledger(journal)) == 3
    run = runs.get(run_id)
    assert run.status == "cancelled" and run.cost == sum(Decimal(row["cost"]) for row in ledger(journal)) > 0
    requests = len(server.batching_events)
    worker.work([fan(model)], once=True)
    assert len(server.batching_events) == requests


@each_model
def test_a_batch_that_has_ended_already_is_collected_at_once(server: Loopback, journal: Any, model: str) -> None:
    run_id = waiting(fan(model))
    for batch in server.batching.batches.values():
        batch["left"] = 0
    runs.cancel(run_id)
    assert len(replies(journal)) == 5 and list(leftover.left(journal)) == [] and runs.get(run_id).cost > 0


def test_a_batch_whose_id_was_lost_is_found_and_cancelled(server: Loopback, journal: Any) -> None:
    server.batch_faults.append(("POST", "/batches", "lost"))
    with pytest.raises(Exception):
        fan(MODEL).run_sync()
    run = runs.list()[0]
    assert len(server.batching.batches) == 1
    run.retry()  # a failed run is not cancelled; one that goes on is
    runs.cancel(run.id)
    assert cancels(server) == ["/v1/batches/batch_1/cancel"]


def test_a_batch_that_is_handed_over_while_its_run_is_cancelled_is_cancelled_too(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = server.batching._openai

    def late(*args: Any) -> Any:
        # The provider, which stands still while it makes the batch, is not asked by the one who cancels.
        monkeypatch.setattr(leftover, "cancel", lambda *_: None)
        runs.cancel(runs.list()[0].id)
        return made(*args)

    monkeypatch.setattr(server.batching, "_openai", late)
    with pytest.raises(RunCancelled):
        fan(MODEL).run_sync()
    assert cancels(server) == ["/v1/batches/batch_1/cancel"]


def test_batches_of_runs_inside_the_cancelled_one_are_cancelled(server: Loopback, journal: Any) -> None:
    inner = fan(MODEL)

    @workflow("outer")
    async def outer(ctx: Context) -> Any:
        return await inner.run()

    with pytest.raises(Waiting):
        outer.run_sync()
    (run,) = [run for run in runs.list() if run.workflow == "outer"]
    run.cancel()
    assert len(cancels(server)) == 1 and {run.status for run in runs.list()} == {"cancelled"}


# -- trouble -------------------------------------------------------------------------------------------


async def test_a_provider_that_cannot_be_asked_fails_no_cancelling_and_a_worker_tries_again(
    server: Loopback, journal: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await interrupted(server)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert runs.cancel(run_id).status == "cancelled"
    assert said().count("a worker tries again") == 1 and [run for run, _ in leftover.left(journal)] == [run_id]
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    await leftover.collect(journal)
    assert len(cancels(server)) == 1 and list(leftover.left(journal)) == [] and len(ledger(journal)) == 1


def test_a_process_that_dies_after_the_cancelling_leaves_the_rest_to_a_worker(
    server: Loopback, journal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = waiting(fan(MODEL))
    with monkeypatch.context() as patch:
        patch.setattr(leftover, "cancel", lambda *_: None)  # it is killed here
        runs.cancel(run_id)
    assert cancels(server) == []
    worker.work([], once=True)
    assert len(cancels(server)) == 1


def test_a_run_is_not_purged_before_its_batch_has_ended_or_is_given_up(server: Loopback, journal: Any) -> None:
    run_id = waiting(fan(MODEL))
    runs.cancel(run_id)
    kept = runs.purge(older_than=0).kept
    assert kept == {run_id: "what it has at its provider may not have ended"}
    settings.clock = lambda: time.time() + leftover.GIVE_UP + 60
    assert runs.purge(older_than=0).runs == [run_id] and list(journal.keys("ab/")) == []


async def test_what_never_ends_is_given_up(server: Loopback, journal: Any, said: Any, monkeypatch: Any) -> None:
    run_id = await interrupted(server)
    monkeypatch.setattr(server, "cancel", lambda path: {**server.flights["resp_fake_1"]["whole"], "status": "in_progress"})
    runs.cancel(run_id)
    await leftover.collect(journal)
    assert [run for run, _ in leftover.left(journal)] == [run_id] and replies(journal) == []
    settings.clock = lambda: time.time() + leftover.GIVE_UP + 60
    await leftover.collect(journal)
    assert list(leftover.left(journal)) == [] and "it is given up" in said()


@pytest.mark.parametrize("batch", [True, False])
async def test_a_fake_model_can_be_asked_to_cancel(journal: Any, batch: bool) -> None:
    @workflow("faked")
    async def faked(ctx: Context) -> Any:
        return await generate_content("Hi", model=MODEL, batch=batch, background=not batch)

    with FakeModel(["Hello"], polls=None):
        task = asyncio.create_task(faked.run())
        while not (list(journal.keys("i/")) or runs.list(status="waiting")):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        runs.cancel(runs.list()[0].id)
        with pytest.raises((RunCancelled, Waiting)):
            await task
        await leftover.collect(journal)
    assert list(leftover.left(journal)) == []
