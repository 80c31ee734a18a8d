"""A process killed anywhere in a conversation with tools pays, after a restart, for what was in flight and no more."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentflow import runs
from tests.loopback import Loopback
from tests.programs import notes, run_program, start_program

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
TURNS = [["I look.", ["look_up", {"n": 1}], ["look_up", {"n": 1}]], [["wait_for", {"n": 5}]], "done"]

PROGRAM = """
from agentflow import aicall, sync
from agentflow.providers import anthropic, openai, openai_chat

MODEL = os.environ["AGENTFLOW_MODEL"]

def last_words(where):
    if os.environ.get("DIE") == where:
        die()

def look_up(n: int) -> int:
    last_words("in tool 1")
    note("look_up")
    return 10 * n

@step("wait", retry=Retry(max_attempts=3, initial_delay=0.001))
async def wait_for(n: int) -> int:
    attempt = current_step().attempt
    note(f"wait {attempt}")
    last_words(f"in attempt {attempt}")
    if attempt < 3:
        raise ConnectionError("not yet")
    return n

save = aicall._Recorder.save
count = 0

async def saved(self, raw, *, body):
    global count
    await save(self, raw, body=body)
    count += 1
    last_words(f"reply {count} recorded")

aicall._Recorder.save = saved
module = {"openai": openai, "openai-chat": openai_chat, "anthropic": anthropic}[MODEL.partition(":")[0]]
send = module.send
sent = 0

async def before(*args, **kwargs):
    global sent
    sent += 1
    last_words(f"before turn {sent}")
    return await send(*args, **kwargs)

module.send = before

if os.environ["FORM"] == "workflow":
    @workflow("talk")
    async def talk(ctx, prompt: str):
        return await generate_content(prompt, tools=[look_up, wait_for])
    print(talk.run_sync("Go"))
elif os.environ["FORM"] == "sync":
    @sync.workflow("talk")
    def talk(ctx, prompt: str):
        return sync.generate_content(prompt, tools=[look_up, wait_for])
    print(talk.run("Go"))
else:
    print(asyncio.run(generate_content("Go", tools=[look_up, wait_for])))
"""

# Where the process dies: at none of these points is a request under way.
POINTS = [
    "before turn 1",
    "reply 1 recorded",
    "in tool 1",
    "in attempt 2",
    "before turn 2",
    "reply 2 recorded",
    "before turn 3",
    "reply 3 recorded",
]


def environment(server: Loopback, model: str, form: str) -> dict[str, str]:
    return {**server.environment, "AGENTFLOW_MODEL": model, "FORM": form}


def check(folder: Path, server: Loopback, in_flight: int | None, where: str) -> None:
    times = Counter(event["digest"] for event in server.arrived)
    order = list(dict.fromkeys(event["digest"] for event in server.arrived))
    assert len(order) == 3, "every turn asked what it had asked before"
    assert [times[one] for one in order] == [2 if at == in_flight else 1 for at in (1, 2, 3)]
    ran = Counter(notes(folder))
    if where == "in tool 1":  # the other call was under way: it may have run without having ended
        assert ran["look_up"] in (2, 3)
    else:
        assert ran["look_up"] == 2
    # Attempts that ended are not made again; the one in flight is.
    assert (ran["wait 1"], ran["wait 3"]) == (1, 1) and ran["wait 2"] == (2 if where == "in attempt 2" else 1)


@pytest.mark.parametrize(
    ("where", "form"),
    [
        *[(where, "workflow") for where in POINTS],
        *[("in tool 1", form) for form in ("sync", "scratch")],
        *[
            pytest.param(where, form, marks=pytest.mark.torture)
            for form in ("sync", "scratch") for where in ("before turn 2", "reply 2 recorded", "before turn 3")
        ],
    ],
)
def test_killed_between_two_posts_nothing_is_bought_again(where: str, form: str, tmp_path: Path) -> None:
    model = MODELS[(POINTS.index(where) + len(form)) % 3]
    with Loopback(turns=TURNS) as server:
        env = environment(server, model, form)
        run_program(PROGRAM, tmp_path, env={**env, "DIE": where}, expect_kill=True)
        ended = run_program(PROGRAM, tmp_path, env=env)
        assert ended.out.strip() == "done"
        check(tmp_path, server, None, where)
    if form != "scratch":
        (run,) = runs.list()
        costs = [one.cost for one in run.steps if one.kind == "ai"]
        (talk,) = [one for one in run.steps if one.kind == "agent"]
        assert talk.cost == run.cost == sum(filter(None, costs)) > 0


@pytest.mark.parametrize(
    ("turn", "model"), [(1, MODELS[0]), (2, MODELS[0]), *(pytest.param(*each, marks=pytest.mark.torture) for each in ((2, MODELS[1]), (2, MODELS[2]), (3, MODELS[2])))]
)
def test_killed_in_a_turn_that_turn_alone_is_bought_again(turn: int, model: str, tmp_path: Path) -> None:
    script: list[Any] = [None] * (turn - 1) + ["hang"]
    with Loopback(turns=TURNS, script=script) as server:
        env = environment(server, model, "workflow")
        process = start_program(PROGRAM, tmp_path, env=env)
        deadline = time.monotonic() + 60
        while len(server.arrived) < turn:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        ended = run_program(PROGRAM, tmp_path, env=env)
        assert ended.out.strip() == "done"
        # The conversation around the turn does nothing itself that could be in doubt.
        assert ended.err.count("in doubt: it was") == 1 and f"turn {turn}: in doubt" in ended.err
        check(tmp_path, server, turn, "nowhere")
