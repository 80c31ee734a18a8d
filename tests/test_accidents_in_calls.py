"""A clock reading in the prompt of a call that had not ended: what was paid, or is in flight, is found again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from agentflow import Context, ModelError, Waiting, generate_content, parallel, runs, tasks, tool, workflow
from tests.loopback import Loopback
from tests.programs import notes, run_program, start_program

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
TURNS = [[["look_up", {"n": 1}]], [["look_up", {"n": 2}]], "done"]

PROGRAM = """
from datetime import datetime
from uuid import uuid4
from agentflow import aicall, background

when, seen = os.environ.get("DIE", ""), 0
record, save = background.Flight.record, aicall._Recorder.save

def last_words(where):
    if when == where:
        die()

async def recording(self, *args):
    await record(self, *args)
    last_words(f"id {seen + 1} recorded")

async def saving(self, raw, *, body):
    global seen
    seen += 1
    await save(self, raw, body=body)
    last_words(f"reply {seen} saved")

background.Flight.record, aicall._Recorder.save = recording, saving

def look_up(n: int) -> int:
    note(n)
    last_words(f"in tool {n}")
    return 10 * n

options = {"background": True} if os.environ.get("BACKGROUND") else {}
if os.environ.get("TOOLS"):
    options["tools"] = [look_up]

if os.environ.get("SYNC"):
    from agentflow import sync

    @sync.workflow("talk")
    def talk(ctx):
        return sync.generate_content(f"It is {datetime.now()}, request {uuid4()}. Go", **options)
    print(talk.run())
else:
    @workflow("talk")
    async def talk(ctx):
        return await generate_content(f"It is {datetime.now()}, request {uuid4()}. Go", **options)
    print(talk.run_sync())
"""


@pytest.mark.parametrize(
    ("when", "background", "plain"),
    [
        ("in tool 1", "", ""),
        ("id 2 recorded", "1", "sync"),
        *(
            pytest.param(*each, marks=pytest.mark.torture)
            for each in (
                ("reply 2 saved", "", ""), ("in tool 2", "", "sync"), ("id 1 recorded", "1", ""),
                ("id 3 recorded", "1", ""),
            )
        ),
    ],
)
def test_killed_conversation_goes_on_where_it_was(tmp_path: Path, when: str, background: str, plain: str) -> None:
    model = MODELS[0] if background else MODELS[len(when) % 3]
    with Loopback(turns=TURNS) as server:
        env = {**server.environment, "AGENTFLOW_MODEL": model, "AGENTFLOW_POLL_SECONDS": "0.001"}
        env |= {"TOOLS": "1", "BACKGROUND": background, "SYNC": plain}
        run_program(PROGRAM, tmp_path, env={**env, "DIE": when}, expect_kill=True)
        ended = run_program(PROGRAM, tmp_path, env=env)
        assert ended.out.strip() == "done"
        assert len(server.arrived) == 3
        assert "generate_content: goes on although" in ended.err and "ctx.now()" in ended.err
        again = run_program(PROGRAM, tmp_path, env=env)
        assert again.out.strip() == "done" and len(server.arrived) == 3
    assert sorted(notes(tmp_path)) == sorted(["1", "2", *([when[-1]] if "tool" in when else [])])


@pytest.mark.parametrize("tools", ["", "1"])
def test_call_that_left_nothing_is_asked_with_the_moment_of_now(tmp_path: Path, tools: str) -> None:
    with Loopback(turns=TURNS if tools else None, script=["hang"]) as server:
        env = {**server.environment, "AGENTFLOW_MODEL": MODELS[0], "TOOLS": tools}
        process = start_program(PROGRAM, tmp_path, env=env)
        deadline = time.monotonic() + 60
        while not server.arrived:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
        ended = run_program(PROGRAM, tmp_path, env=env)
    assert "goes on although" not in ended.err
    assert server.arrived[0]["digest"] != server.arrived[1]["digest"]


@pytest.mark.parametrize("when", ["id 1 recorded", "reply 1 saved"])
def test_call_in_flight_in_the_background_is_waited_for(tmp_path: Path, when: str) -> None:
    with Loopback() as server:
        env = {**server.environment, "AGENTFLOW_MODEL": MODELS[0], "AGENTFLOW_POLL_SECONDS": "0.001"}
        env |= {"BACKGROUND": "1"}
        run_program(PROGRAM, tmp_path, env={**env, "DIE": when}, expect_kill=True)
        ended = run_program(PROGRAM, tmp_path, env=env)
        assert ended.out.strip().startswith("answer to")
        assert len(server.arrived) == 1 and "ctx.now()" in ended.err


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFLOW_POLL_SECONDS", "0.001")


@pytest.mark.parametrize("model", MODELS)
async def test_conversation_that_waits_for_a_person_asks_once(
    loopback: Callable[..., Loopback], again: Callable[[], None], model: str
) -> None:
    server = loopback(turns=[[["pay", {"amount": 5}]], "done"])
    paid: list[int] = []

    @tool(approval="manager")
    def pay(amount: int) -> int:
        paid.append(amount)
        return amount

    @workflow("bills")
    async def bills(ctx: Context) -> str:
        return str(await generate_content(f"It is {datetime.now()}. Pay.", model=model, tools=[pay]))

    for _ in range(3):
        with pytest.raises(Waiting):
            await bills.run()
        again()
    (task,) = tasks.list()
    tasks.approve(task.id, by="manager")
    assert await bills.run() == "done"
    again()
    assert await bills.run() == "done"
    assert len(server.arrived) == 2 and paid == [5]


@pytest.mark.parametrize("model", [MODELS[0], MODELS[2]])
async def test_requests_in_a_batch_are_waited_for(
    loopback: Callable[..., Loopback], again: Callable[[], None], model: str
) -> None:
    server = loopback()

    @workflow("many")
    async def many(ctx: Context) -> list[str]:
        return list(
            await parallel.map(
                lambda n: generate_content(f"It is {datetime.now()}. Question {n}", model=model, batch=True), [1, 2, 3]
            )
        )

    server.batching.polls = 2
    for _ in range(2):
        with pytest.raises(Waiting):
            await many.run()
        again()
    answers = await many.options(wait=True).run()
    assert len(set(answers)) == 3 and len(server.batched) == 3
    assert [event for event in server.batching_events if event == ("POST", server.batching_events[0][1])]
    again()
    assert await many.run() == answers and len(server.batched) == 3


async def test_turn_in_flight_after_a_failed_look_is_waited_for(
    loopback: Callable[..., Loopback], again: Callable[[], None]
) -> None:
    server = loopback(turns=[[["look_up", {"n": 1}]], "done"])
    refused = {"status": 401, "body": {"error": {"message": "no", "type": "invalid_request_error"}}}
    server.looks = [None, None, refused]  # the first turn ends, the second cannot be looked at

    def look_up(n: int) -> int:
        return n

    @workflow("talk")
    async def talk(ctx: Context) -> str:
        prompt = f"It is {datetime.now()}. Go"
        return str(await generate_content(prompt, model=MODELS[0], tools=[look_up], background=True))

    with pytest.raises(ModelError) as late:
        await talk.run()
    assert late.value.in_flight is not None and len(server.arrived) == 2
    again()
    assert await talk.run() == "done"
    assert len(server.arrived) == 2


async def test_another_question_is_not_taken_for_the_unfinished_one(
    loopback: Callable[..., Loopback], again: Callable[[], None]
) -> None:
    server = loopback(turns=[[["pay", {"amount": 1}]], "done"])

    @tool(approval=True)
    def pay(amount: int) -> int:
        return amount

    def flow(question: str) -> Any:
        @workflow("talk")
        async def talk(ctx: Context) -> str:
            return str(await generate_content(f"It is {datetime.now()}. {question}", model=MODELS[0], tools=[pay]))

        return talk

    for question in ("Go", "Stay", "Go", "Stay"):
        with pytest.raises(Waiting):
            await flow(question).run()
        again()
    assert len(server.arrived) == 2, "each of them is asked once"


async def test_unfinished_calls_leave_no_note_behind(loopback: Callable[..., Loopback], journal: Any) -> None:
    server = loopback(None, {"status": 400, "body": {"error": {"message": "no", "type": "invalid_request_error"}}})

    @workflow("one")
    async def one(ctx: Context) -> None:
        await generate_content(f"It is {datetime.now()}.", model=MODELS[0])
        await generate_content(f"And now {uuid4()}?", model=MODELS[0])

    with pytest.raises(ModelError):
        await one.run()
    assert len(server.arrived) == 2 and list(journal.scan("g/")) == []


async def test_equal_branches_each_take_their_own(loopback: Callable[..., Loopback], again: Callable[[], None]) -> None:
    server = loopback()
    server.polls = None
    patience: list[float | None] = [0.2]

    @workflow("pair")
    async def pair(ctx: Context) -> list[str]:
        async def one(name: str) -> str:
            options: dict[str, Any] = {"timeout": patience[0], "retry": {"max_attempts": 1}}
            return str(await generate_content(f"It is {datetime.now()}.", model=MODELS[0], background=True, **options))

        return list(await asyncio.gather(one("a"), one("b"), return_exceptions=True))  # type: ignore[arg-type]

    await pair.run()
    again()
    patience[0] = None
    server.polls = 0
    for flight in server.flights.values():
        flight["left"] = 0
    await pair.options(run_id=runs.list()[0].id).run()
    assert len(server.arrived) == 2
