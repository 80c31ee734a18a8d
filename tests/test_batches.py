"""``batch=True``: a fan-out becomes one batch, which outlives every process. Real SDKs, a server that counts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agentflow import (
    BudgetExceeded,
    Context,
    JournalFull,
    ModelError,
    Reply,
    Retry,
    UsageError,
    Waiting,
    batches,
    configure,
    generate_content,
    human_task,
    ledger,
    parallel,
    runs,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.batchserver import EXPIRED
from agentflow.cli.app import run as cli
from agentflow.models import Usage
from agentflow.providers import batching
from agentflow.testing import FakeModel, reply_body, request_of
from tests.loopback import Loopback, answer_to
from tests.programs import run_program

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
each_model = pytest.mark.parametrize("model", MODELS)
ERROR = {"error": {"message": "no", "type": "server_error", "code": "server_error"}}
BAD = {"error": {"message": "no such thing", "type": "invalid_request_error"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    with Loopback(polls=0) as started:
        for key, value in started.environment.items():
            monkeypatch.setenv(key, value)
        yield started


def created(server: Loopback) -> int:
    """How many batches were created."""
    return sum(1 for method, path in server.batching_events if method == "POST" and path.endswith("/batches"))


def uploads(server: Loopback) -> int:
    return sum(1 for method, path in server.batching_events if (method, path) == ("POST", "/v1/files"))


def fan_out(model: str, count: int = 20, name: str = "fan", **options: Any) -> Any:
    @workflow(name)
    async def fan(ctx: Context) -> list[str]:
        return await parallel(
            [generate_content(f"Hi {n}", model=model, batch=True, **options) for n in range(count)], settle=True
        )

    return fan


# -- one batch --------------------------------------------------------------------------------------


@each_model
async def test_fan_out_is_one_batch_and_each_step_gets_its_own_result(
    server: Loopback, model: str, journal: Any
) -> None:
    fan = fan_out(model)
    with pytest.raises(Waiting, match=r"waits for batch .* \(20 requests to .*\)") as waiting:
        await fan.run()
    assert [wait["kind"] for wait in waiting.value.waiting_on] == ["batch"]
    ident = waiting.value.waiting_on[0]["id"]
    assert ident in server.batching.batches and waiting.value.waiting_on[0]["requests"] == 20
    assert len(server.batched) == 20 and created(server) == 1 and server.arrived == []
    run = runs.list()[0]
    assert run.status == "waiting" and run.waiting_on == waiting.value.waiting_on and run.cost == 0

    assert await fan.run() == [answer_to(f"Hi {n}") for n in range(20)]  # the server gives them backwards
    assert created(server) == 1 and server.arrived == []
    rows = [json.loads(text) for _, text in journal.scan("m/")]
    assert len(rows) == 20 and {row["batch"] for row in rows} == {ident}
    assert all("batch" in row["price"]["discount"] for row in rows)
    run = runs.list()[0]
    assert run.cost == sum(Decimal(row["cost"]) for row in rows) > 0
    assert [each.cost for each in run.steps] == [Decimal(row["cost"]) for row in _in_order(rows)]
    assert run.saved == 0

    requests = len(server.batching_events)
    assert await fan.run() == [answer_to(f"Hi {n}") for n in range(20)]
    assert len(server.batching_events) == requests


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def number(row: dict[str, Any]) -> int:
        body = row["request"]
        return int((body.get("input") or body["messages"])[-1]["content"].split()[-1])

    return sorted(rows, key=number)


@each_model
async def test_batch_costs_half(server: Loopback, model: str) -> None:
    fan = fan_out(model, 1, output_type=Reply)
    with pytest.raises(Waiting):
        await fan.run()
    reply = (await fan.run())[0]
    whole, _ = ledger.price(model.partition(":")[0], reply.model, reply.usage)
    assert whole is not None and reply.cost == whole / 2


def test_price_of_a_batch_is_half_of_ones_own_price_and_of_one_without_a_published_discount() -> None:
    usage = Usage(input_tokens=1000, output_tokens=1000)
    old = "claude-3-5-haiku-latest"
    whole, half = ledger.price("anthropic", old, usage), ledger.price("anthropic", old, usage, batch=True)
    assert whole[0] is not None and half[0] == whole[0] / 2 and "batch" in half[1]["discount"]
    ledger.set_price("mine", input=10, output=20)
    own = ledger.price("openai", "mine", usage, batch=True)
    assert own[0] == Decimal("0.015") and own[1]["source"] == "set_price"
    assert ledger.price("openai", "who-knows", usage, batch=True) == (None, {})


async def test_command_line_names_the_batch(server: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    run = await fan_out(MODELS[0], 3).start()
    capsys.readouterr()
    assert cli(["runs", "show", run.id]) == 0
    assert re.search(r"batch batch_1: 3 requests to gpt-4o-mini, submitted", capsys.readouterr().out)
    assert cli(["runs", "show", run.id, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == "waiting" and shown["waiting_on"][0]["id"] == "batch_1"


async def test_start_gives_a_run_that_waits_and_awaiting_it_goes_on(server: Loopback) -> None:
    run = await fan_out(MODELS[0], 3).start()
    assert run.status == "waiting" and run.waiting_on[0]["kind"] == "batch"
    assert await run == [answer_to(f"Hi {n}") for n in range(3)]


@each_model
async def test_run_that_stays_looks_until_the_batch_has_ended(
    server: Loopback, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_POLL_SECONDS", "0.001")
    server.batching.polls = 4
    assert await fan_out(model).options(wait=True).run() == [answer_to(f"Hi {n}") for n in range(20)]
    assert created(server) == 1 and len(server.batched) == 20


async def test_batch_that_has_not_ended_is_looked_at_and_waited_for_again(server: Loopback) -> None:
    server.batching.polls = 2
    fan = fan_out(MODELS[0])
    for _ in range(3):
        with pytest.raises(Waiting):
            await fan.run()
    assert await fan.run() == [answer_to(f"Hi {n}") for n in range(20)]
    assert created(server) == 1 and uploads(server) == 1


def test_plain_code_has_it_too(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    @sync.workflow("plain")
    def plain(ctx: Context) -> Any:
        return sync.parallel.map(lambda n: sync.generate_content(f"Hi {n}", model=MODELS[0], batch=True), range(8))

    with pytest.raises(Waiting):
        plain.run()
    assert len(server.batched) == 8 and created(server) == 1
    assert plain.run() == [answer_to(f"Hi {n}") for n in range(8)]
    assert created(server) == 1
    monkeypatch.setenv("AGENTFLOW_POLL_SECONDS", "0.001")
    server.batching.polls = 3
    assert plain.options(fresh=True, wait=True).run() == [answer_to(f"Hi {n}") for n in range(8)]
    assert created(server) == 2 and len(server.batched) == 16


async def test_models_and_providers_get_batches_of_their_own(server: Loopback) -> None:
    @workflow("many")
    async def many(ctx: Context) -> Any:
        models = [*MODELS, "openai:gpt-4o"]
        calls = [(model, n) for model in models for n in range(3)]
        return await parallel([generate_content(f"{model} {n}", model=model, batch=True) for model, n in calls])

    run = await many.start()
    assert created(server) == 4 and len(server.batched) == 12 and len(run.waiting_on) == 4
    assert len(await many.run()) == 12


async def test_large_fan_out_is_split_by_what_a_batch_may_hold(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MOST_REQUESTS", 8)
    fan = fan_out(MODELS[2])
    await fan.start()
    assert created(server) == 3 and len(server.batched) == 20
    monkeypatch.setattr(batches, "TOGETHER", 3)
    assert await fan.run() == [answer_to(f"Hi {n}") for n in range(20)]
    monkeypatch.setattr(batching, "MOST_BYTES", 700)
    await fan_out(MODELS[2], 9, "bytes").start()
    assert 3 <= created(server) - 3 <= 9


async def test_only_what_can_wait_waits(server: Loopback) -> None:
    @workflow("mixed")
    async def mixed(ctx: Context) -> Any:
        now, later = await parallel(
            [generate_content("now", model=MODELS[0]), generate_content("later", model=MODELS[0], batch=True)]
        )
        after = await generate_content(f"after {later}", model=MODELS[0], batch=True)
        return now, later, after

    for count in (1, 2):
        with pytest.raises(Waiting):
            await mixed.run()
        assert created(server) == count and len(server.arrived) == 1
    later = answer_to("later")
    assert await mixed.run() == (answer_to("now"), later, answer_to(f"after {later}"))
    assert created(server) == 2


async def test_person_and_batch_are_waited_for_together(server: Loopback) -> None:
    @workflow("both")
    async def both(ctx: Context) -> Any:
        return await parallel([human_task("approve", data=1), generate_content("Hi", model=MODELS[0], batch=True)])

    run = await both.start()
    assert sorted(wait["kind"] for wait in run.waiting_on) == ["batch", "task"]
    tasks.approve(next(wait["id"] for wait in run.waiting_on if wait["kind"] == "task"))
    decision, answer = await both.run()
    assert decision.approved and answer == answer_to("Hi")


async def test_waiting_inside_steps_is_no_attempt_and_not_in_doubt(server: Loopback, said: Callable[[], str]) -> None:
    async def inner(n: int) -> Any:
        return await generate_content(f"Hi {n}", model=MODELS[0], batch=True)

    @workflow("nested")
    async def nested(ctx: Context) -> Any:
        return await parallel([step("inner", inner, n, in_doubt="raise", timeout=30) for n in range(3)])

    run = await nested.start()
    assert run.status == "waiting" and created(server) == 1
    assert await nested.run() == [answer_to(f"Hi {n}") for n in range(3)]
    assert [each.attempts for each in runs.list()[0].steps] == [1] * 6
    assert "in doubt" not in said() and created(server) == 1


async def test_reply_that_does_not_validate_is_asked_about_in_a_second_batch(
    server: Loopback, journal: Any
) -> None:
    texts = iter(["many", "3"])
    server.outcomes = _Texts(texts)  # type: ignore[assignment]

    @workflow("count")
    async def count(ctx: Context) -> int:
        return await generate_content("How many?", model=MODELS[2], batch=True, output_type=int)

    for number in (1, 2):
        run = await count.start()
        assert run.status == "waiting" and created(server) == number
    assert await count.run() == 3
    run = runs.list()[0]
    assert sum(1 for _ in journal.scan("m/")) == 2 and created(server) == 2
    assert run.steps[0].cost == run.cost > 0


class _Texts(dict[str, Any]):
    """Answers with these texts, one after the other."""

    def __init__(self, texts: Any) -> None:
        self.texts = texts

    def get(self, text: str, default: Any = None) -> Any:
        return 200, reply_body(request_of("/v1/messages", {"model": "claude-haiku-4-5"}), next(self.texts))


async def test_text_is_heard_once_when_it_has_come(server: Loopback) -> None:
    heard: list[str] = []
    fan = fan_out(MODELS[0], 1, on_text=heard.append)
    await fan.start()
    assert heard == []
    await fan.run()
    assert heard == [answer_to("Hi 0")]


async def test_batch_and_foreground_give_the_same_record(server: Loopback) -> None:
    wanted = True

    @workflow("same")
    async def same(ctx: Context) -> Any:
        return await generate_content("Hi", model=MODELS[0], batch=wanted)

    await same.start()
    await same.run()
    wanted = False
    assert await same.run() == answer_to("Hi")
    assert server.arrived == [] and created(server) == 1


async def test_call_in_a_batch_is_waited_for_when_the_code_asks_at_once_now(server: Loopback) -> None:
    wanted = True
    server.batching.polls = 1

    @workflow("edited")
    async def edited(ctx: Context) -> Any:
        return await generate_content("Hi", model=MODELS[0], batch=wanted)

    await edited.start()
    wanted = False
    assert (await edited.start()).status == "waiting"
    assert await edited.run() == answer_to("Hi")
    assert server.arrived == [] and created(server) == 1


async def test_batch_nobody_waits_for_any_more_is_collected_with_the_next_one(server: Loopback, journal: Any) -> None:
    text = "first"

    @workflow("other")
    async def other(ctx: Context) -> Any:
        return await generate_content(text, model=MODELS[2], batch=True)

    await other.start()
    text = "second"
    await other.start()
    assert await other.run() == answer_to("second")
    rows = [json.loads(row) for _, row in journal.scan("m/")]
    assert len(rows) == 2 and runs.list()[0].cost == sum(Decimal(row["cost"]) for row in rows)
    text = "first"
    assert await other.run() == answer_to("first")
    assert created(server) == 2


async def test_replies_nobody_waits_for_any_more_are_recorded_and_counted(server: Loopback, journal: Any) -> None:
    count = 3

    @workflow("fewer")
    async def fewer(ctx: Context) -> Any:
        return await parallel([generate_content(f"Hi {n}", model=MODELS[0], batch=True) for n in range(count)])

    await fewer.start()
    count = 2
    assert len(await fewer.run()) == 2
    rows = [json.loads(text) for _, text in journal.scan("m/")]
    assert len(rows) == 3 and runs.list()[0].cost == sum(Decimal(row["cost"]) for row in rows)
    count = 3
    assert len(await fewer.run()) == 3
    assert created(server) == 1


def test_outside_a_workflow_it_is_refused_before_anything_is_sent(server: Loopback) -> None:
    with pytest.raises(UsageError, match=r"batch=True needs a workflow.* Nothing was sent"):
        generate_content("Hi", model=MODELS[0], batch=True)
    assert server.batching_events == []


async def test_missing_key_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    results = await fan_out(MODELS[0], 2).run()
    assert all(isinstance(result, UsageError) and "OPENAI_API_KEY" in str(result) for result in results)


async def test_call_whose_branch_was_cancelled_before_it_was_handed_over_is_not_sent(server: Loopback) -> None:
    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("no")

    @workflow("handled")
    async def handled(ctx: Context) -> Any:
        try:
            await parallel([generate_content("unsent", model=MODELS[0], batch=True), step("fails", fails)])
        except ValueError:
            return await generate_content("sent", model=MODELS[0], batch=True)

    await handled.start()
    assert [asked["text"] for asked in server.batched] == ["sent"]
    assert await handled.run() == answer_to("sent")
    assert created(server) == 1


async def test_full_journal_while_handing_over_is_told_and_nothing_is_sent(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise JournalFull("the disk is full")

    @workflow("one")
    async def one(ctx: Context) -> Any:
        return await generate_content("Hi", model=MODELS[0], batch=True)

    monkeypatch.setattr(batches, "Add", full)
    with pytest.raises(JournalFull):
        await one.run()
    assert server.batching_events == []


# -- what fails -------------------------------------------------------------------------------------


@each_model
async def test_errored_and_expired_requests_fail_and_are_tried_again_in_a_new_batch(
    server: Loopback, model: str
) -> None:
    server.outcomes = {"Hi 3": (400, BAD), "Hi 5": EXPIRED}
    fan = fan_out(model)
    await fan.start()
    server.outcomes = {}
    run = await fan.start()  # all others have come; the expired one is tried again, the refused one is not
    assert created(server) == 2 and len(server.batched) == 21
    assert run.status == "waiting" and run.waiting_on[0]["requests"] == 1
    results = await fan.run()
    assert isinstance(results[3], ModelError) and "no such thing" in str(results[3])
    assert [results[n] for n in range(20) if n != 3] == [answer_to(f"Hi {n}") for n in range(20) if n != 3]
    assert created(server) == 2
    assert {each.attempts for each in runs.list()[0].steps} == {1, 2}


async def test_expired_request_fails_for_good_when_attempts_are_used_up(server: Loopback) -> None:
    server.outcomes = {"Hi 0": EXPIRED}
    fan = fan_out(MODELS[0], 1, retry=Retry(max_attempts=1))
    await fan.start()
    result = (await fan.run())[0]
    assert isinstance(result, ModelError) and result.code == "batch_expired"
    assert created(server) == 1


@each_model
async def test_failed_creation_is_told_to_each_step_and_tried_again_once_for_all(
    server: Loopback, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.batch_faults = [
        ("POST", "/batches", {"status": 429, "headers": {"retry-after-ms": "1"}, "body": ERROR}),
        ("POST", "/batches", {"status": 500, "body": ERROR}),
    ]
    fan = fan_out(model, retry=Retry(max_attempts=3, initial_delay=0.001, max_delay=0.002))
    run = await fan.start()
    assert run.status == "waiting" and len(server.batched) == 20 and created(server) == 3
    assert await fan.run() == [answer_to(f"Hi {n}") for n in range(20)]


@each_model
async def test_batch_whose_creation_was_not_answered_is_found_and_not_created_again(
    server: Loopback, model: str
) -> None:
    server.batch_faults = [("POST", "/batches", "lost")]
    fan = fan_out(model, retry=Retry(max_attempts=3, initial_delay=0.001, max_delay=0.002))
    results = await fan.run()  # found, and it has ended
    assert results == [answer_to(f"Hi {n}") for n in range(20)]
    assert created(server) == 1 and len(server.batched) == 20


async def test_refused_batch_fails_each_step(server: Loopback) -> None:
    server.batch_faults = [("POST", "/batches", {"status": 400, "body": BAD})]
    results = await fan_out(MODELS[2]).run()
    assert all(isinstance(result, ModelError) and result.status == 400 for result in results)
    assert created(server) == 1 and server.batched == []


@each_model
async def test_answer_that_cannot_be_read_leaves_the_outcome_unknown_and_the_batch_is_looked_for(
    server: Loopback, model: str
) -> None:
    server.batch_faults = [("POST", "/batches", {"status": 200, "body": {"what": "is this"}})]
    fan = fan_out(model, 2, retry=Retry(max_attempts=2, initial_delay=0.001))
    assert (await fan.start()).status == "waiting"
    path = "/v1/messages/batches" if model.startswith("anthropic") else "/v1/batches"
    assert ("GET", path) in server.batching_events  # the list was read in between
    assert len(server.batching.batches) == 1


@each_model
@pytest.mark.parametrize("fault", ["reset", {"status": 500, "body": ERROR}, {"status": 200, "body": "<html>"}])
async def test_failed_look_costs_nothing_and_waits_on(server: Loopback, model: str, fault: Any) -> None:
    fan = fan_out(model)
    await fan.start()
    results = "/content" if model.startswith("openai") else "/results"
    ident = next(iter(server.batching.batches))
    server.batch_faults = [("GET", ident, fault)]
    assert (await fan.start()).status == "waiting"
    server.batch_faults = [("GET", results, fault)]
    assert (await fan.start()).status == "waiting"
    assert await fan.run() == [answer_to(f"Hi {n}") for n in range(20)]
    assert created(server) == 1


async def test_batch_that_is_gone_fails_and_the_next_run_makes_a_new_one(server: Loopback) -> None:
    fan = fan_out(MODELS[0], 2)
    await fan.start()
    server.batching.batches.clear()
    results = await fan.run()
    assert all(isinstance(result, ModelError) and result.status == 404 for result in results)
    assert created(server) == 1
    assert (await fan.options(rerun=["generate_content"]).start()).status == "waiting"
    assert created(server) == 2


async def test_file_that_does_not_validate_fails_all_its_requests_with_the_reason(server: Loopback) -> None:
    fan = fan_out(MODELS[0], 2)
    await fan.start()
    batch = server.batching.batches["batch_1"]
    errors = {"object": "list", "data": [{"code": "invalid", "line": 1, "message": "model has no batches"}]}
    batch["body"]["ended"] = {"status": "failed", "errors": errors}
    results = await fan.run()
    assert all("model has no batches" in str(result) for result in results) and created(server) == 1


@each_model
async def test_fake_model_answers_batches_and_calls_in_the_background(model: str) -> None:
    replies = ["a", TimeoutError(), 400, "b again"]
    fan = fan_out(model, 3)
    with FakeModel(replies, polls=1) as fake:
        assert (await fan.start()).status == "waiting" and len(fake.calls) == 3
        assert (await fan.start()).status == "waiting"  # looked at once
        assert (await fan.start()).status == "waiting" and len(fake.calls) == 4  # what expired, once more
        assert (await fan.start()).status == "waiting"
        results = await fan.run()
    assert [results[0], results[1]] == ["a", "b again"] and isinstance(results[2], ModelError)
    with FakeModel(["c"], polls=3) as fake:
        assert await generate_content("Hi", model=MODELS[0], background=True) == "c"
        assert len(fake.calls) == 1
    with FakeModel(["d", "e"], polls=2):
        assert await fan_out(model, 2, "stays").options(wait=True).run() == ["d", "e"]


# -- killed -----------------------------------------------------------------------------------------

PROGRAM = """
from agentflow import batches
from agentflow.providers import batching

when = sys.argv[1]
model = sys.argv[2]
fetch, create, made, collect, commit = batching.fetch, None, batches.Batches._created, batches.Batches._collect, None
fetched = 0

async def fetching(*args):
    global fetched
    fetched += 1
    if when == f"before request {fetched}":
        die()
    answer = await fetch(*args)
    if when == f"after request {fetched}":
        die()
    return answer

async def making(self, *args):
    if when == "before the id":
        die()
    await made(self, *args)
    if when == "after the id":
        die()

async def collecting(self, *args):
    if when == "before collecting":
        die()
    await collect(self, *args)
    if when == "after collecting":
        die()

batching.fetch, batches.Batches._created, batches.Batches._collect = fetching, making, collecting

async def outer(n):
    return await generate_content(f"Hi {n}", model=model, batch=True)

@workflow
async def fan(ctx):
    inside = [step("outer", outer, n, in_doubt="raise") for n in range(2)]
    return await parallel([*inside, *(generate_content(f"Hi {n}", model=model, batch=True) for n in range(2, 5))])

try:
    print(" ".join(fan.run_sync()))
except Waiting as waiting:
    print("waiting", waiting.waiting_on)
    sys.exit(3)
"""

STAGES = ["before request 1", "after request 1", "before request 2", "before the id", "after the id"]


@pytest.mark.parametrize(
    ("when", "model"),
    [
        *((when, MODELS[0]) for when in STAGES),
        *(
            pytest.param(when, MODELS[2], marks=pytest.mark.torture)
            for when in ("before request 1", "before the id", "after the id")
        ),
    ],
)
def test_killed_while_handing_over_there_is_one_batch(
    server: Loopback, tmp_path: Path, when: str, model: str
) -> None:
    run_program(PROGRAM, tmp_path, when, model, env=server.environment, expect_kill=True)
    waited = run_program(PROGRAM, tmp_path, "never", model, env=server.environment, expect_failure=True)
    last = waited
    if waited.code == 3:
        last = run_program(PROGRAM, tmp_path, "never", model, env=server.environment)
    assert last.out.split("\n")[0] == " ".join(answer_to(f"Hi {n}") for n in range(5)), last.err
    assert len(server.batched) == 5 and len(server.batching.batches) == 1
    assert "in doubt" not in waited.err + last.err


@pytest.mark.parametrize(
    ("when", "model"),
    [
        ("before request 1", MODELS[0]),
        ("before collecting", MODELS[0]),
        ("after collecting", MODELS[0]),
        pytest.param("before collecting", MODELS[2], marks=pytest.mark.torture),
        pytest.param("after collecting", MODELS[2], marks=pytest.mark.torture),
    ],
)
def test_killed_while_looking_nothing_is_lost(server: Loopback, tmp_path: Path, when: str, model: str) -> None:
    waited = run_program(PROGRAM, tmp_path, "never", model, env=server.environment, expect_failure=True)
    assert waited.code == 3, waited.err
    run_program(PROGRAM, tmp_path, when, model, env=server.environment, expect_kill=True)
    env = {**server.environment, "PYTHONHASHSEED": "7"}
    last = run_program(PROGRAM, tmp_path, "never", model, env=env)
    assert last.out.split("\n")[0] == " ".join(answer_to(f"Hi {n}") for n in range(5))
    assert len(server.batched) == 5 and len(server.batching.batches) == 1
    looks = len(server.batching_events)
    run_program(PROGRAM, tmp_path, "never", model, env=env)
    assert len(server.batching_events) == looks


def test_error_that_came_with_a_batch_is_not_forgotten_by_a_kill(server: Loopback, tmp_path: Path) -> None:
    server.outcomes = {"Hi 3": (400, BAD)}
    waited = run_program(PROGRAM, tmp_path, "never", MODELS[0], env=server.environment, expect_failure=True)
    assert waited.code == 3, waited.err
    run_program(PROGRAM, tmp_path, "after collecting", MODELS[0], env=server.environment, expect_kill=True)
    failed = run_program(PROGRAM, tmp_path, "never", MODELS[0], env=server.environment, expect_failure=True)
    assert failed.code == 1 and "no such thing" in failed.err, failed.err
    assert len(server.batching.batches) == 1


@pytest.mark.torture
def test_batch_of_unknown_outcome_that_has_not_ended_is_waited_for_and_then_told_by_its_ids(
    server: Loopback, tmp_path: Path
) -> None:
    model = MODELS[2]
    server.batching.polls = None
    run_program(PROGRAM, tmp_path, "before the id", model, env=server.environment, expect_kill=True)
    waited = run_program(PROGRAM, tmp_path, "never", model, env=server.environment, expect_failure=True)
    assert waited.code == 3 and "in doubt" in waited.out and len(server.batching.batches) == 1
    server.batching.batches["msgbatch_1"]["left"] = 0
    last = run_program(PROGRAM, tmp_path, "never", model, env=server.environment)
    assert last.out.split("\n")[0] == " ".join(answer_to(f"Hi {n}") for n in range(5))
    assert len(server.batching.batches) == 1


@pytest.mark.torture
def test_foreign_batch_of_the_same_size_is_not_taken_for_ones_own(server: Loopback, tmp_path: Path) -> None:
    model = MODELS[2]
    run_program(PROGRAM, tmp_path, "before request 1", model, env=server.environment, expect_kill=True)
    asked = [{"custom_id": f"other-{n}", "params": {"model": "m", "messages": []}} for n in range(5)]
    content = json.dumps({"requests": asked}).encode()
    server.batching.handle("POST", "/v1/messages/batches", "", content, lambda *_: (200, {}))
    waited = run_program(PROGRAM, tmp_path, "never", model, env=server.environment, expect_failure=True)
    assert waited.code == 3 and len(server.batched) == 5 and len(server.batching.batches) == 2


@each_model
async def test_batch_is_set_aside_in_the_budget_while_it_is_under_way_and_has_its_rows_in_the_ledger(
    server: Loopback, model: str, journal: Any
) -> None:
    from agentflow import costlines

    fan = fan_out(model, 4, max_tokens=1000)
    with pytest.raises(BudgetExceeded, match="a batch of 4 requests"):
        await fan.options(budget="0.000001").run()
    assert server.batching_events == [] and list(journal.scan("lr/")) == []

    with pytest.raises(Waiting):
        await fan.options(budget="1").run()
    ((_, held),) = journal.scan("lr/")
    at_most = Decimal(json.loads(held)["at_most"])
    assert at_most > 0 and created(server) == 1
    assert await fan.run() == [answer_to(f"Hi {n}") for n in range(4)]
    assert list(journal.scan("lr/")) == []
    (line,) = costlines.summary(journal)
    assert (line.calls, line.in_doubt, line.paid) == (4, 0, runs.list()[0].cost)
    assert 0 < line.paid < at_most


async def test_what_a_batch_may_cost_counts_for_others_until_it_has_ended(server: Loopback, journal: Any) -> None:
    fan = fan_out(MODELS[0], 4, max_tokens=1000)
    with pytest.raises(Waiting):
        await fan.options(budget="1").run()
    ((_, held),) = journal.scan("lr/")
    at_most = Decimal(json.loads(held)["at_most"])
    configure(budget=f"{at_most + Decimal('0.0001')}/day")
    try:

        @workflow("other")
        async def other(ctx: Context) -> str:
            return await generate_content("Hi", model=MODELS[0], max_tokens=1000)

        running = asyncio.create_task(other.run())
        with pytest.raises(TimeoutError):  # it waits: what is set aside may come back
            await asyncio.wait_for(asyncio.shield(running), 0.3)
        assert server.arrived == []
        await fan.run()
        assert await running == answer_to("Hi")
    finally:
        configure(budget=None)
