"""A conversation with tools in the background: each turn is submitted, its id recorded, and finished after a kill."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from agentflow import Context, ModelError, UsageError, generate_content, runs, sync, workflow
from tests.loopback import Loopback
from tests.programs import notes, run_program

MODEL = "openai:gpt-4o-mini"
TURNS = [["I look.", ["look_up", {"n": 1}], ["look_up", {"n": 1}]], [["look_up", {"n": 2}]], "done"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFLOW_POLL_SECONDS", "0.001")


def look_up(n: int) -> int:
    return 10 * n


async def test_each_turn_is_a_call_in_the_background(loopback: Callable[..., Loopback], again: Callable[[], None]) -> None:
    server = loopback(turns=TURNS)
    heard: list[str] = []

    @workflow("talk")
    async def talk(ctx: Context, background: bool) -> str:
        return str(
            await generate_content("Go", model=MODEL, tools=[look_up], background=background, on_text=heard.append)
        )

    assert await talk.run(True) == "done"
    assert [bool(body.get("background")) for body in server.bodies] == [True, True, True]
    assert len(server.looked) == 6 and heard == ["I look.", "done"]
    again()
    assert await talk.options(run_id=runs.list()[0].id).run(True) == "done"
    assert len(server.arrived) == 3, "a replay asks nobody"


async def test_it_is_no_part_of_what_is_asked(loopback: Callable[..., Loopback], again: Callable[[], None]) -> None:
    server = loopback(turns=TURNS)

    def talk(background: bool) -> Any:
        @workflow("talk")
        async def talk(ctx: Context) -> str:
            return str(await generate_content("Go", model=MODEL, tools=[look_up], background=background))

        return talk

    assert await talk(True).run() == "done"
    again()
    assert await talk(False).run() == "done"
    assert len(server.arrived) == 3


def test_plain_code_has_it_too(loopback: Callable[..., Loopback]) -> None:
    server = loopback(turns=TURNS)

    @sync.workflow("talk")
    def talk(ctx: Any) -> str:
        return str(sync.generate_content("Go", model=MODEL, tools=[look_up], background=True))

    assert talk.run() == "done" and len(server.looked) == 6


async def test_a_turn_that_takes_too_long_is_waited_for_by_the_next_run(loopback: Callable[..., Loopback]) -> None:
    server = loopback(turns=TURNS)
    patience: list[float | None] = [0.05, None]

    @workflow("talk")
    async def talk(ctx: Context) -> str:
        options = {"timeout": patience.pop(0), "retry": {"max_attempts": 1}}
        return str(await generate_content("Go", model=MODEL, tools=[look_up], background=True, **options))

    server.polls = None
    with pytest.raises(ModelError) as late:
        await talk.run()
    assert late.value.in_flight is not None
    server.polls = 0
    for flight in server.flights.values():
        flight["left"] = 0
    assert await talk.run() == "done"
    assert len(server.arrived) == 3


async def test_a_turn_that_does_not_validate_is_asked_about_in_the_background(loopback: Callable[..., Loopback]) -> None:
    class Found(pydantic.BaseModel):
        n: int

    server = loopback(None, {"text": "well"}, {"text": '{"n": 7}'}, turns=[[["look_up", {"n": 1}]]])

    @workflow("talk")
    async def talk(ctx: Context) -> Found:
        return await generate_content("Go", model=MODEL, tools=[look_up], background=True, output_type=Found)

    assert await talk.run() == Found(n=7)
    assert len(server.arrived) == 3 and all(body["background"] for body in server.bodies)


@pytest.mark.parametrize("model", ["anthropic:claude-haiku-4-5", "openai-chat:gpt-4o-mini"])
def test_what_has_no_background_refuses_before_anything_is_sent(model: str) -> None:
    with pytest.raises(UsageError, match="background=True needs"):
        generate_content("Go", model=model, tools=[look_up], background=True)


PROGRAM = """
from agentflow import aicall, background

when, seen = os.environ.get("DIE", ""), 0
record, save = background.Flight.record, aicall._Recorder.save

def last_words(where):
    if when == where:
        die()

async def recording(self, *args):
    global seen
    await record(self, *args)
    seen += 1
    last_words(f"id {seen} recorded")

async def saving(self, raw, *, body):
    last_words(f"before reply {seen}")
    await save(self, raw, body=body)
    last_words(f"reply {seen} saved")

background.Flight.record, aicall._Recorder.save = recording, saving

def look_up(n: int) -> int:
    last_words(f"in tool {n}")
    note(n)
    return 10 * n

@workflow("talk")
async def talk(ctx):
    return await generate_content("Go", tools=[look_up], background=True)

print(talk.run_sync())
"""


@pytest.mark.parametrize(
    "when", ["id 1 recorded", "reply 1 saved", "in tool 2", "id 2 recorded", "before reply 2", "id 3 recorded"]
)
def test_killed_at_any_moment_each_turn_is_bought_once(tmp_path: Path, when: str) -> None:
    with Loopback(turns=TURNS) as server:
        env = {**server.environment, "AGENTFLOW_MODEL": MODEL, "AGENTFLOW_POLL_SECONDS": "0.001"}
        run_program(PROGRAM, tmp_path, env={**env, "DIE": when}, expect_kill=True)
        ended = run_program(PROGRAM, tmp_path, env=env)
        assert ended.out.strip() == "done"
        assert len(server.arrived) == len({event["digest"] for event in server.arrived}) == 3
    assert Counter(notes(tmp_path)) == {"1": 2, "2": 1}
    assert not re.search(r"turn \d: in doubt", ended.err)
