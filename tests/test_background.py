"""``background=True``: submitted once, whatever dies afterwards. Real SDKs, a server that counts, real kills."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pydantic
import pytest

from agentflow import (
    Context,
    ModelError,
    Reply,
    Retry,
    StepTimeout,
    Truncated,
    UsageError,
    aicall,
    background,
    generate_content,
    providers,
    runs,
    step,
    sync,
    workflow,
)
from tests.loopback import Loopback, answer_to
from tests.programs import run_program, start_program, write_program

MODEL = "openai:gpt-4o-mini"
QUICK = {"AGENTFLOW_POLL_SECONDS": "0.001", "AGENTFLOW_MODEL": MODEL}
ERROR = {"error": {"message": "no", "type": "server_error", "code": "server_error"}}


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between looks, noted and not slept."""
    noted: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float) -> None:
        noted.append(seconds)
        await sleep(0.001)

    monkeypatch.setattr(background, "sleep", short)
    return noted


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    with Loopback() as started:
        for key, value in started.environment.items():
            monkeypatch.setenv(key, value)
        yield started


def ends_now(server: Loopback) -> None:
    """All calls have ended when they are looked at next, also one that is being submitted at this moment."""
    server.polls = 0
    for flight in list(server.flights.values()):
        flight["left"] = 0


async def ask(text: str = "Hi", **options: Any) -> Any:
    return await generate_content(text, model=MODEL, background=True, **options)


@workflow("research")
async def research(ctx: Context, text: str) -> str:
    return str(await ask(text))


# -- one call, looked at until it has ended --------------------------------------------------------


async def test_call_is_submitted_once_and_looked_at_until_it_has_ended(
    server: Loopback, pauses: list[float], journal: Any
) -> None:
    server.polls = 4
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 1 and len(server.looked) == 5
    assert {look["path"] for look in server.looked} == {"/v1/responses/resp_fake_1"}
    assert pauses == [1.0, 1.5, 2.25, 3.375, 5.0625]
    rows = [json.loads(text) for _, text in journal.scan("m/")]
    assert len(rows) == 1 and rows[0]["body"]["status"] == "completed" and rows[0]["usage"]["output_tokens"] > 0
    assert Decimal(rows[0]["cost"]) > 0 and rows[0]["price"]["source"] == "genai-prices"
    run = runs.list()[0]
    assert run.cost == Decimal(rows[0]["cost"]) and run.steps[0].cost == run.cost
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 1 and len(server.looked) == 5


async def test_pauses_grow_to_half_a_minute(server: Loopback, pauses: list[float]) -> None:
    server.polls = 14
    await research.run("Hi")
    assert pauses[:3] == [1.0, 1.5, 2.25] and pauses[-1] == 30.0 and pauses == sorted(pauses)


async def test_what_is_sent_says_background_and_what_is_recorded_does_not(server: Loopback, journal: Any) -> None:
    sent: list[Any] = []
    take = server.take
    server.take = lambda body, whole: sent.append(body) or take(body, whole)  # type: ignore[method-assign,func-returns-value]
    await research.run("Hi")
    assert sent[0]["background"] is True and sent[0]["store"] is True
    row = json.loads(next(text for _, text in journal.scan("m/")))
    assert "background" not in row["request"] and "store" not in row["request"]


async def test_answer_of_the_foreground_is_the_answer_of_the_background_and_the_other_way_round(
    server: Loopback,
) -> None:
    for first, second in ((False, True), (True, False)):
        for in_background in (first, second):

            @workflow(f"same-{first}")
            async def same(ctx: Context) -> Any:
                return await generate_content(f"Hi {first}", model=MODEL, background=in_background)

            await same.run()
    assert len(server.arrived) == 2


async def test_outside_a_workflow_the_same_holds(server: Loopback, again: Callable[[], None]) -> None:
    assert await ask() == answer_to("Hi")
    again()
    assert await ask() == answer_to("Hi")
    assert len(server.arrived) == 1


def test_plain_code_has_it_too(server: Loopback) -> None:
    server.polls = 3

    @sync.workflow("plain")
    def plain(ctx: Context) -> Any:
        return sync.parallel.map(lambda n: sync.generate_content(f"Hi {n}", model=MODEL, background=True), range(3))

    assert plain.run() == [answer_to(f"Hi {n}") for n in range(3)]
    assert sync.generate_content("Hi", model=MODEL, background=True) == answer_to("Hi")
    assert plain.run() == [answer_to(f"Hi {n}") for n in range(3)]
    assert len(server.arrived) == 4


async def test_text_is_heard_whole_at_the_end(server: Loopback) -> None:
    heard: list[str] = []
    await ask(on_text=heard.append)
    assert heard == [answer_to("Hi")]


async def test_server_that_answers_at_once_is_taken_at_its_word(server: Loopback) -> None:
    server.take = lambda body, whole: whole  # type: ignore[method-assign]
    assert await research.run("Hi") == answer_to("Hi")
    assert server.looked == [] and len(server.arrived) == 1


async def test_reply_that_does_not_validate_is_asked_about_in_the_background_too(server: Loopback) -> None:
    class Count(pydantic.BaseModel):
        count: int

    server.script = [{"text": '{"count": "many"}'}, {"text": '{"count": 3}'}]
    assert await ask(output_type=Count) == Count(count=3)
    assert len(server.arrived) == 2
    assert [look["path"][-1] for look in server.looked] == ["1", "1", "2", "2"]


async def test_registered_responses_server_has_it(server: Loopback) -> None:
    providers.register("lab", base_url=f"{server.url}/v1", api="responses")
    assert await generate_content("Hi", model="lab:big", background=True) == answer_to("Hi")
    assert len(server.arrived) == 1 and len(server.looked) == 2


@pytest.mark.parametrize("model", ["openai-chat:gpt-4o", "anthropic:claude-haiku-4-5", "ollama:llama", "mine:some"])
async def test_provider_without_it_refuses_before_anything_is_sent(server: Loopback, model: str) -> None:
    providers.register("mine", base_url=server.url, api="messages")
    with pytest.raises(UsageError, match=r"background=True needs the OpenAI Responses API; .* Nothing was sent"):
        generate_content("Hi", model=model, background=True)
    assert server.arrived == []


async def test_pause_that_is_no_number_is_said(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFLOW_POLL_SECONDS", "soon")
    with pytest.raises(UsageError, match="AGENTFLOW_POLL_SECONDS='soon'"):
        await ask()


def test_what_would_not_be_kept_cannot_be_fetched_and_is_refused() -> None:
    with pytest.raises(UsageError, match="needs store"):
        generate_content("Hi", model=MODEL, background=True, extra={"store": False})
    with pytest.raises(UsageError, match="background=1 is not True or False"):
        generate_content("Hi", model=MODEL, background=1)  # type: ignore[call-overload]


async def test_price_of_a_discounted_window_is_unknown_and_never_wrong(server: Loopback) -> None:
    slow = {"background_options": {"completion_window": "8h"}}
    assert (await ask(output_type=Reply, extra=slow)).cost is None


# -- how it can end -------------------------------------------------------------------------------


async def test_incomplete_reply_is_recorded_and_truncated(server: Loopback, journal: Any) -> None:
    server.looks = [{"ended": "incomplete", "with": {"incomplete_details": {"reason": "max_output_tokens"}}}]
    with pytest.raises(Truncated) as caught:
        await research.run("Hi")
    assert caught.value.reply.text == answer_to("Hi")
    assert sum(1 for _ in journal.scan("m/")) == 1 and len(server.arrived) == 1


async def test_failed_call_is_submitted_again_under_retry(server: Loopback) -> None:
    server.looks = [{"ended": "failed", "with": {"error": ERROR["error"]}}]
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 2
    assert [look["path"][-1] for look in server.looked] == ["1", "2", "2"]


@pytest.mark.parametrize("status", ["cancelled", "expired"])
async def test_cancelled_or_expired_call_fails_and_the_next_run_submits_again(server: Loopback, status: str) -> None:
    server.looks = [{"ended": status}]
    with pytest.raises(ModelError, match=status):
        await research.run("Hi")
    assert len(server.arrived) == 1
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 2


async def test_call_that_is_gone_fails_and_the_next_run_submits_again(server: Loopback) -> None:
    server.looks = [{"status": 404, "body": ERROR}] * 3
    with pytest.raises(ModelError, match="is not there any more") as caught:
        await research.run("Hi")
    assert caught.value.status == 404 and caught.value.in_flight is None and len(server.arrived) == 1
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 2


async def test_single_not_found_is_not_believed(server: Loopback) -> None:
    server.looks = [{"status": 404, "body": ERROR}, {"status": 404, "body": ERROR}]
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 1


async def test_failed_looks_never_repeat_the_post(server: Loopback, pauses: list[float]) -> None:
    server.looks = [
        {"status": 500, "body": ERROR},
        {"status": 429, "headers": {"retry-after": "77"}, "body": ERROR},
        "reset",
        {"status": 503, "headers": {"retry-after-ms": "1500"}, "body": "busy"},
        {"status": 200, "body": '{"id": "resp_fake_1", "status": "comp', "cut": 30},
        {"status": 200, "body": "<html>"},
        {"status": 200, "body": {"id": "another", "status": "completed"}},
    ]
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 1 and len(server.looked) == 9
    assert 77.0 in pauses and pauses[2] == 77.0


async def test_provider_that_stays_away_ends_the_attempt_and_not_the_call(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "FAILED_LOOKS", 3)
    server.looks = [{"status": 500, "body": ERROR}] * 9  # three attempts
    with pytest.raises(ModelError, match="500") as caught:
        await research.run("Hi")
    assert caught.value.in_flight == "resp_fake_1" and len(server.looked) == 9
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 1


async def test_wrong_key_while_looking_leaves_the_call_in_flight(server: Loopback) -> None:
    server.looks = [{"status": 401, "body": ERROR}]
    with pytest.raises(ModelError, match="401"):
        await research.run("Hi")
    assert await research.run("Hi") == answer_to("Hi")
    assert len(server.arrived) == 1


async def test_refused_submission_is_a_failed_attempt(server: Loopback) -> None:
    server.script = [{"status": 429, "headers": {"retry-after-ms": "1"}, "body": ERROR}, {"status": 400, "body": ERROR}]
    with pytest.raises(ModelError, match="400"):
        await research.run("Hi")
    assert len(server.arrived) == 2 and server.looked == []


# -- time is over ---------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that only the end of the time ends."""
    monkeypatch.setattr(background, "sleep", lambda seconds: asyncio.Event().wait())


async def test_call_that_takes_too_long_is_waited_for_again_and_not_bought_again(
    server: Loopback, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 0.05

    @workflow("late")
    async def late(ctx: Context) -> str:
        return str(await ask(timeout=limit, retry=Retry(max_attempts=2, initial_delay=0.001)))

    server.polls = 2
    with pytest.raises(ModelError, match=r"resp_fake_1 has not ended within 0.05 s") as caught:
        await late.run()
    assert caught.value.code == "timeout" and caught.value.in_flight == "resp_fake_1" and caught.value.attempts == 2
    assert len(server.arrived) == 1
    monkeypatch.setattr(background, "sleep", lambda seconds: asyncio.sleep(0))
    limit = 60
    assert await late.run() == answer_to("Hi")
    assert len(server.arrived) == 1


async def test_turn_that_is_in_flight_does_not_buy_the_turns_before_it_again(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "FAILED_LOOKS", 1)
    server.script = [{"text": "many"}, {"text": "3"}]
    server.polls = 0
    server.looks = [None, {"status": 500, "body": ERROR}]  # the second turn cannot be looked at in the first attempt

    @workflow("turns")
    async def turns(ctx: Context) -> int:
        return int(await ask(output_type=int, retry=Retry(max_attempts=2, initial_delay=0.001)))

    assert await turns.run() == 3
    assert len(server.arrived) == 2


async def test_timeout_of_the_enclosing_step_leaves_the_call_to_its_next_attempt(server: Loopback) -> None:
    server.polls = None
    tried = 0

    async def patient() -> Any:
        nonlocal tried
        tried += 1
        if tried > 1:
            ends_now(server)
        return await ask()

    @workflow("outer")
    async def outer(ctx: Context) -> Any:
        # As many attempts as a slow machine needs; each of them waits for the same call.
        return await step("patient", patient, timeout=0.3, retry=Retry(max_attempts=99, initial_delay=0.001))

    assert await outer.run() == answer_to("Hi")
    assert tried > 1 and len(server.arrived) == 1


async def test_attempt_given_up_while_it_submits_leaves_its_call_to_the_next(server: Loopback) -> None:
    server.latency = 0.5
    server.polls = 0

    @workflow("early")
    async def early(ctx: Context) -> Any:
        return await step("patient", ask, timeout=0.05, retry=Retry(max_attempts=999, initial_delay=0.001))

    assert await early.run() == answer_to("Hi")
    assert len(server.arrived) == 1


async def test_reply_saved_by_an_attempt_that_was_given_up_while_the_next_begins_is_not_submitted_again(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.polls = 0
    went_on, saves = asyncio.Event(), 0
    save, answer = aicall._Recorder.save, background.answer

    async def saves_late(self: Any, raw: Any, **how: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 1:  # its attempt is given up meanwhile
            await went_on.wait()
        await save(self, raw, **how)
        saved.set()

    saved = asyncio.Event()

    async def begins(*args: Any) -> Any:
        if saves:
            went_on.set()
            await saved.wait()
        return await answer(*args)

    monkeypatch.setattr(aicall._Recorder, "save", saves_late)
    monkeypatch.setattr(background, "answer", begins)

    @workflow("both")
    async def both(ctx: Context) -> Any:
        return await step("patient", ask, timeout=1, retry=Retry(max_attempts=99, initial_delay=0.001))

    run = await both.start()
    assert await run == answer_to("Hi")
    assert len(server.arrived) == 1
    (paid, found) = (run.cost, runs.get(run.id))
    assert found.steps[0].attempts == 2 and found.cost == paid


async def test_enclosing_step_that_may_not_retry_raises_and_the_next_run_waits_for_the_same_call(
    server: Loopback,
) -> None:
    server.polls = None
    limit = 0.2

    @workflow("outer-once")
    async def outer(ctx: Context) -> Any:
        return await step("patient", lambda: ask(), timeout=limit)

    with pytest.raises(StepTimeout):
        await outer.run()
    looks = len(server.looked)
    limit = 60
    ends_now(server)
    assert await outer.run() == answer_to("Hi")
    assert len(server.arrived) == 1 and len(server.looked) == looks + 1  # nobody else looks any more


def test_plain_code_that_was_given_up_and_waits_on_is_not_counted_twice(server: Loopback, journal: Any) -> None:
    server.polls = None
    tried: list[int] = []
    ended: list[int] = []

    def patient() -> Any:
        tried.append(1)
        try:
            if len(tried) > 1:
                _until(lambda: "resp_fake_1" in server.flights)
                server.flights["resp_fake_1"]["left"] = 0
            return sync.generate_content("Hi", model=MODEL, background=True)
        finally:
            ended.append(1)

    @sync.workflow("given-up")
    def given_up(ctx: Context) -> Any:
        return sync.step("patient", patient, timeout=0.3, retry=Retry(max_attempts=99, initial_delay=0.001))

    assert given_up.run() == answer_to("Hi")
    _until(lambda: len(ended) == len(tried))
    assert len(tried) > 1 and len(server.arrived) == 1
    rows = [json.loads(text) for _, text in journal.scan("m/")]
    assert sum(row["cost"] != "0" for row in rows) == 1


async def test_a_new_attempt_after_an_answer_asks_anew(server: Loopback) -> None:
    server.script = [{"text": "many"}, {"text": "3"}]
    retry = Retry(max_attempts=2, initial_delay=0.001)
    assert await ask(output_type=int, reask=0, retry=retry) == 3
    assert len(server.arrived) == 2


async def test_call_in_flight_is_waited_for_when_the_code_asks_in_the_foreground_now(server: Loopback) -> None:
    in_background, limit = True, 0.05
    server.polls = None

    @workflow("edited")
    async def edited(ctx: Context) -> Any:
        return await generate_content(
            "Hi", model=MODEL, background=in_background, timeout=limit, retry=Retry(max_attempts=1)
        )

    with pytest.raises(ModelError):
        await edited.run()
    in_background, limit = False, 20
    server.flights["resp_fake_1"]["left"] = 0
    assert await edited.run() == answer_to("Hi")
    assert len(server.arrived) == 1


async def test_equal_calls_in_flight_at_once_are_calls_of_their_own(server: Loopback) -> None:
    @workflow("twins")
    async def twins(ctx: Context) -> Any:
        return await asyncio.gather(*(ask() for _ in range(3)))

    server.script = [{"text": text} for text in "abc"]
    assert sorted(await twins.run()) == ["a", "b", "c"]
    assert len(server.arrived) == 3 and runs.list()[0].cost > 0


async def test_cancelled_sibling_does_not_wait_for_its_call_which_goes_on(server: Loopback) -> None:
    server.polls = None
    fails = True

    async def other() -> str:
        while not server.looked:  # noqa: ASYNC110 (another thread is looked at)
            await asyncio.sleep(0.001)
        if fails:
            raise ValueError("no")
        return "fine"

    @workflow("siblings")
    async def siblings(ctx: Context) -> Any:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask())
            second = group.create_task(step("other", other))
        return [await first, await second]

    with pytest.raises(ExceptionGroup):
        await siblings.run()
    fails = False
    server.flights["resp_fake_1"]["left"] = 0
    assert await siblings.run() == [answer_to("Hi"), "fine"]
    assert len(server.arrived) == 1


# -- killed, interrupted ----------------------------------------------------------------------------

PROGRAM = """
from agentflow import background, aicall

when = sys.argv[1]
record, save, retrieve = background.Flight.record, aicall._Recorder.save, None
slept = 0

async def recording(self, *args):
    if when == "before the id":
        die()
    await record(self, *args)
    if when == "after the id":
        die()

async def sleeping(seconds):
    global slept
    slept += 1
    if when == "polling" and slept == 3:
        die()

async def saving(self, raw, *, body):
    if when == "before saving":
        die()
    await save(self, raw, body=body)
    if when == "after saving":
        die()

background.Flight.record, background.sleep, aicall._Recorder.save = recording, sleeping, saving

async def asks():
    note("ran")
    return await generate_content("Hi", background=True)

@workflow
async def research(ctx):
    return await step("outer", asks, in_doubt=os.environ.get("IN_DOUBT", "rerun"))

@workflow
async def bare(ctx):
    return await generate_content("Hi", background=True)

def in_plain_code(ctx):
    from agentflow import sync
    return sync.step("outer", lambda: sync.generate_content("Hi", background=True))

def go(form):
    if form == "scratch":
        return asyncio.run(asks())
    if form == "sync":
        from agentflow import sync
        return sync.workflow(in_plain_code).run()
    return (bare if form == "bare" else research).run_sync()

print(go(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("when", "form"),
    [
        *((when, "workflow") for when in ("after the id", "polling", "before saving", "after saving")),
        *(("polling", form) for form in ("bare", "sync", "scratch")),
    ],
)
def test_killed_after_the_id_is_recorded_the_same_call_is_finished(
    server: Loopback, tmp_path: Path, when: str, form: str
) -> None:
    server.polls = 4
    env = {**server.environment, **QUICK}
    run_program(PROGRAM, tmp_path, when, form, env=env, expect_kill=True)
    assert len(server.arrived) == 1
    ended = run_program(PROGRAM, tmp_path, "never", form, env=env)
    assert ended.out.split("\n")[0] == answer_to("Hi")
    assert "asked again" not in ended.err
    assert len(server.arrived) == 1
    assert len(server.looked) == (5 if when in ("after the id", "polling", "after saving") else 6)


@pytest.mark.torture
def test_killed_many_times_on_the_way_it_is_still_one_call(server: Loopback, tmp_path: Path) -> None:
    server.polls = 9
    env = {**server.environment, **QUICK}
    for when in ("after the id", "polling", "polling", "before saving"):
        run_program(PROGRAM, tmp_path, when, "workflow", env=env, expect_kill=True)
    assert run_program(PROGRAM, tmp_path, "never", "workflow", env=env).out.split("\n")[0] == answer_to("Hi")
    assert len(server.arrived) == 1


def test_killed_before_the_post_is_answered_the_outcome_is_unknown_and_said(server: Loopback, tmp_path: Path) -> None:
    server.script = ["hang"]
    env = {**server.environment, **QUICK}
    process = start_program(program_file(tmp_path), tmp_path, "never", "bare", env=env)
    _until(lambda: len(server.arrived) == 1)
    process.kill()
    process.communicate()
    ended = run_program(PROGRAM, tmp_path, "never", "bare", env=env)
    assert "in doubt: it was in flight when its process ended; asked again" in ended.err
    assert len(server.arrived) == 2


def test_killed_between_answer_and_id_the_enclosing_step_decides(server: Loopback, tmp_path: Path) -> None:
    env = {**server.environment, **QUICK, "IN_DOUBT": "raise"}
    run_program(PROGRAM, tmp_path, "before the id", "workflow", env=env, expect_kill=True)
    refused = run_program(PROGRAM, tmp_path, "never", "workflow", env=env, expect_failure=True)
    assert "StepInDoubt" in refused.err and len(server.arrived) == 1
    asked = run_program(PROGRAM, tmp_path, "never", "workflow", env={**env, "IN_DOUBT": "rerun"})
    assert asked.out.split("\n")[0] == answer_to("Hi") and len(server.arrived) == 2


@pytest.mark.parametrize("form", ["workflow", "sync", "scratch"])
def test_ctrl_c_while_polling_leaves_at_once_and_the_run_resumable(
    server: Loopback, tmp_path: Path, form: str
) -> None:
    server.polls = None
    env = {**server.environment, **QUICK}
    file = program_file(tmp_path, "background.sleep = background.asyncio.sleep")
    process = start_program(file, tmp_path, "never", form, env=env)
    _until(lambda: len(server.looked) > 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGKILL) and "KeyboardInterrupt" in err, err
    if form != "scratch":
        assert "interrupted" in err, err
    server.flights["resp_fake_1"]["left"] = 0
    assert run_program(PROGRAM, tmp_path, "never", form, env=env).out.split("\n")[0] == answer_to("Hi")
    assert len(server.arrived) == 1


def program_file(folder: Path, *more: str) -> Path:
    head, _, last = PROGRAM.rpartition("print(")
    return write_program(head + "\n".join(more) + "\nprint(" + last, folder, "other.py" if more else "program.py")


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_call_in_the_background_is_set_aside_once_and_its_reply_is_never_refused_by_the_budget(
    server: Loopback,
) -> None:
    from agentflow import costlines
    from agentflow.scratch import open_journal

    limit, patience = "0.01", [0.05]

    @workflow("budgeted", budget=limit)
    async def flow(ctx: Context) -> str:
        return str(await ask("Hi", timeout=patience[0], max_tokens=10_000, retry=Retry(max_attempts=1)))

    server.polls = None
    with pytest.raises(ModelError) as late:
        flow.run_sync()
    assert late.value.in_flight is not None
    journal = open_journal()
    assert len(list(journal.scan("lr/"))) == 1, "what it may cost is set aside for as long as it goes on"
    server.polls = 0
    patience[0] = 60
    ends_now(server)
    assert flow.run_sync() == answer_to("Hi")
    assert len(server.arrived) == 1 and list(journal.scan("lr/")) == []
    (line,) = costlines.summary(journal)
    assert line.calls == 1 and line.in_doubt == 0 and line.paid == flow.runs()[0].cost
