"""Processes killed at random moments, again and again: nothing acknowledged is lost, nothing finished is repeated.

One process imports everything and then forks a life for each kill, so that a kill hits the work and
not the start of an interpreter. Each life runs the workflow from wherever the last one died; when a run is through, the
next one begins. Every word below is written to a file before anything else happens:

- ``ran X``      X's function was called;
- ``ask X``      a model is about to be asked X (or X is about to be replayed);
- ``ack X v``    the program has been given X's result.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from agentflow import runs
from tests.loopback import Loopback, answer_to
from tests.programs import environment, notes, run_program, write_program

SOURCE = """
import time

def token():
    return os.urandom(5).hex()

def plain(number, i):
    note(f"ran plain.{number}.{i}")
    time.sleep(0.001)
    return token()

async def check(number, i, draft):
    note(f"ran check.{number}.{i}")
    await asyncio.sleep(0.002)
    return token()

def flaky(number):
    attempt = current_step().attempt
    note(f"ran flaky.{number} {attempt}")
    time.sleep(0.001)
    if attempt < 3:
        raise ConnectionError(f"attempt {attempt}")
    return token()

async def ask(what):
    note(f"ask {what}")
    answer = await generate_content(what, name="model")
    note(f"ack {what} {answer.replace(' ', '_')}")
    return answer

async def compose(number):
    note(f"ran compose.{number}")
    first = await ask(f"compose.{number}.first")
    second = await ask(f"compose.{number}.second")
    return token()

async def got(what, awaitable):
    value = await awaitable
    note(f"ack {what} {value}")
    return value

@workflow
async def mixed(ctx, number: int):
    for i in range(3):
        await got(f"plain.{number}.{i}", step("plain", plain, number, i))
    await ask(f"outline.{number}")

    async def branch(i):
        draft = await ask(f"draft.{number}.{i}")
        return await got(f"check.{number}.{i}", step("check", check, number, i, draft))

    checked = await parallel.map(branch, range(4))
    retry = Retry(max_attempts=3, backoff="fixed", initial_delay=0.004, jitter=False)
    await got(f"flaky.{number}", step("flaky", flaky, number, retry=retry))
    await got(f"compose.{number}", step("compose", compose, number))
    return checked

def life():
    done = HERE / "done.txt"
    number = int(done.read_text()) if done.exists() else 0
    while True:
        note(f"begin {number}")
        mixed.options(run_id=f"mixed-{number}").run_sync(number)
        note(f"end {number}")
        new = HERE / f"done.{os.getpid()}"
        new.write_text(str(number + 1))
        new.replace(done)
        if sys.argv[1:] == ["once"]:
            return
        number += 1

if sys.argv[1:] == ["once"]:
    life()
else:
    import openai, pydantic, diskcache  # what the first call would import, before the first life
    import agentflow.providers.openai, agentflow.journal, agentflow.flow, agentflow.generate
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            note(f"life {os.getpid()}")
            try:
                life()
            finally:
                os._exit(1)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
"""


def kill_many(folder: Path, kills: int, server: Loopback) -> str:
    """So many lives, each killed at a random moment, and a last one that ends; all that they said."""
    seed = int(os.environ.get("KILLS_SEED") or random.randrange(10**6))
    print("seed", seed)
    chance = random.Random(seed)
    env = {**server.environment, "AGENTFLOW_MODEL": "openai:gpt-4o-mini"}
    file = write_program(SOURCE, folder)
    with (folder / "said.txt").open("wb") as said:
        parent = subprocess.Popen(
            [sys.executable, str(file)],
            cwd=folder,
            env=environment(folder, env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert parent.stdin is not None and parent.stdout is not None
        try:
            assert parent.stdout.readline() == "ready\n", (folder / "said.txt").read_text()
            for _ in range(kills):
                parent.stdin.write("\n")
                parent.stdin.flush()
                child = int(parent.stdout.readline())
                time.sleep(chance.choice([0.02, 0.1, 0.3]) + chance.random() * 0.1)
                os.kill(child, signal.SIGKILL)
                code = int(parent.stdout.readline())
                assert code == -signal.SIGKILL, f"ended with {code}\n{(folder / 'said.txt').read_text()}"
        finally:
            parent.stdin.close()
            parent.wait(30)
            parent.stdout.close()
    last = run_program(file, folder, "once", env=env)
    return (folder / "said.txt").read_text() + last.err


def check(folder: Path, server: Loopback, said: str, kills: int) -> None:
    acknowledged: dict[str, str] = {}
    asking: defaultdict[str, int] = defaultdict(int)
    ran: Counter[str] = Counter()
    attempts: defaultdict[str, list[int]] = defaultdict(list)
    lines = notes(folder)
    lives = sum(line.startswith("life ") for line in lines)  # on a busy machine a kill may come before the first word
    assert kills * 0.7 <= lives <= kills
    for line in lines:
        kind, _, rest = line.partition(" ")
        what, _, value = rest.partition(" ")
        if kind == "ran":
            assert what not in acknowledged, f"{what} had been acknowledged and ran again"
            ran[what] += 1
            if value:
                attempts[what].append(int(value))
        elif kind == "ask" and what not in acknowledged:
            asking[what] += 1
        elif kind == "ack":
            assert acknowledged.setdefault(what, value) == value, f"{what} was {acknowledged[what]}, is {value}"
    # A model was asked again only where a process had died between asking and being told.
    bought = Counter(event["text"] for event in server.arrived)
    assert set(bought) <= set(asking)
    for what, times in bought.items():
        assert times <= asking[what], f"{what} was bought {times} times, {asking[what]} of them could be in flight"
        if what in acknowledged:
            assert acknowledged[what] == answer_to(what).replace(" ", "_")
    # An attempt that has failed is not made again: counting went on.
    for what, numbers in attempts.items():
        assert numbers == sorted(numbers) and set(numbers) <= {1, 2, 3}, f"{what}: {numbers}"
    # Everything is on record.
    again = {what for what, times in ran.items() if times > len(set(attempts[what]) or {1})}
    for number in range(int((folder / "done.txt").read_text())):
        run = runs.get(f"mixed-{number}")
        assert run.status == "completed"
        steps = Counter(step.name for step in run.steps)
        assert steps == {"plain": 3, "model": 7, "check": 4, "flaky": 1, "compose": 1}
        outputs = {step.output for step in run.steps if isinstance(step.output, str)}
        for what, value in acknowledged.items():
            if what.split(".")[1] == str(number):
                assert value in outputs or value.replace("_", " ") in outputs, f"{what} is not recorded"
        # What was in flight at a kill is said to have been in doubt, and so is its record.
        for what in again:
            name, of, *_ = what.split(".")
            if int(of) == number:
                assert any(step.in_doubt for step in run.steps if step.name == name), f"{what} is not marked"
                assert re.search(rf"mixed-{number} · {name}: in doubt", said), f"{what} was not said to be in doubt"
    twice = sum(times - 1 for times in bought.values())
    print(f"{kills} kills, {len(acknowledged)} results, {sum(bought.values())} calls, {twice} bought again, {len(again)} steps run again")
    assert sum(bought.values()) - len(bought) <= 4 * kills, "more was bought again than four branches can have in flight"


def killed(tmp_path: Path, kills: int) -> None:
    with Loopback(latency=0.004) as server:
        said = kill_many(tmp_path, kills, server)
        check(tmp_path, server, said, kills)


def test_kills_at_random_moments_lose_nothing_acknowledged_and_repeat_nothing_finished(tmp_path: Path) -> None:
    killed(tmp_path, 15)


@pytest.mark.torture
def test_two_hundred_kills_lose_nothing_acknowledged_and_repeat_nothing_finished(tmp_path: Path) -> None:
    killed(tmp_path, 220)


# -- chosen moments -------------------------------------------------------------------------------

MOMENTS = """
import time

def at(where):  # read from the environment: a constant would be code that the two lives do not share
    return os.environ.get("WHERE") == where

async def compose(topic):
    note("ran compose")
    first = await generate_content(f"first {topic}", name="first")
    note("got first")
    if at("after first"):
        die()
    second = await generate_content(f"second {topic}", name="second")
    note("got second")
    if at("after second"):
        die()
    return first + second

def flaky():
    note(f"attempt {current_step().attempt}")
    if current_step().attempt < 3:
        raise ConnectionError("down")
    if at("third attempt"):
        die()
    return "up"

def backing_off(error):
    if at("between attempts") and current_attempt() == 2:
        asyncio.get_running_loop().call_later(0.05, die)
    return True

def current_attempt():
    return sum(line.startswith("attempt") for line in (HERE / "notes.txt").read_text().splitlines())

@workflow
async def chosen(ctx):
    text = await step("compose", compose, "tea")
    note("got compose")
    if at("after compose"):
        die()
    delay = 0.2 if at("between attempts") else 0.01
    retry = Retry(max_attempts=3, backoff="fixed", initial_delay=delay, jitter=False, retry_if=backing_off)
    return [text, await step("flaky", flaky, retry=retry)]

print(chosen.run_sync())
"""


@pytest.mark.parametrize(
    ("where", "asked", "composed", "attempts", "doubts"),
    [
        ("after first", 2, 2, [1, 2, 3], ["compose"]),
        ("after second", 2, 2, [1, 2, 3], ["compose"]),
        ("after compose", 2, 1, [1, 2, 3], []),
        ("third attempt", 2, 1, [1, 2, 3, 3], ["flaky"]),
        ("between attempts", 2, 1, [1, 2, 3], []),
    ],
)
def test_a_kill_at_a_chosen_moment_repeats_only_what_was_in_flight(
    where: str, asked: int, composed: int, attempts: list[int], doubts: list[str], tmp_path: Path
) -> None:
    with Loopback() as server:
        env = {**server.environment, "AGENTFLOW_MODEL": "openai:gpt-4o-mini"}
        file = write_program(MOMENTS, tmp_path)
        run_program(file, tmp_path, env={**env, "WHERE": where}, expect_kill=True)
        ended = run_program(file, tmp_path, env=env)
        expected = [answer_to("first tea") + answer_to("second tea"), "up"]
        assert ended.out.strip() == str(expected)
        assert len(server.arrived) == asked
        lines = notes(tmp_path)
        assert lines.count("ran compose") == composed
        assert [int(line[8:]) for line in lines if line.startswith("attempt")] == attempts
        said = re.findall(r"· (\w+): in doubt", ended.err)
        assert said == doubts


def test_a_call_that_was_in_flight_at_the_kill_is_bought_again_and_said_to_be_in_doubt(tmp_path: Path) -> None:
    source = """
    @workflow
    async def once(ctx):
        return await generate_content("hello", name="greet")

    print(once.run_sync())
    """
    with Loopback(script=["hang"]) as server:
        env = {**server.environment, "AGENTFLOW_MODEL": "openai:gpt-4o-mini"}
        file = write_program(source, tmp_path)
        process = subprocess.Popen([sys.executable, str(file)], cwd=tmp_path, env=environment(tmp_path, env))
        try:
            deadline = time.monotonic() + 20
            while not server.arrived:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        ended = run_program(file, tmp_path, env=env)
        assert ended.out.strip() == answer_to("hello")
        assert "greet: in doubt: it was in flight when its process ended; asked again" in ended.err
        assert len(server.arrived) == 2
        assert run_program(file, tmp_path, env=env).out.strip() == answer_to("hello")
        assert len(server.arrived) == 2


def test_a_reply_that_arrived_is_kept_when_the_process_dies_while_validating_it(tmp_path: Path) -> None:
    source = """
    from pydantic import BaseModel, field_validator

    class Note(BaseModel):
        text: str

        @field_validator("text")
        @classmethod
        def seen(cls, value):
            if os.environ.get("DIES"):
                die()
            return value

    @workflow
    async def once(ctx):
        return (await generate_content("hello", output_type=Note)).text

    print(once.run_sync())
    """
    with Loopback() as server:
        env = {**server.environment, "AGENTFLOW_MODEL": "openai:gpt-4o-mini"}
        file = write_program(source, tmp_path)
        run_program(file, tmp_path, env={**env, "DIES": "1"}, expect_kill=True)
        assert len(server.arrived) == 1
        ended = run_program(file, tmp_path, env=env)
        assert ended.out.strip() == answer_to("hello")
        assert len(server.arrived) == 1, "a paid reply was bought again"
        assert "in doubt" not in ended.err


def test_a_doubt_is_still_on_record_when_a_later_kill_falls_between_two_attempts(tmp_path: Path) -> None:
    source = """
import logging

moment = sys.argv[1]

def flaky():
    attempt = current_step().attempt
    note(f"ran {attempt}")
    if moment == "inside":
        die()
    if attempt == 1:
        raise ConnectionError("once more")
    return attempt

class Waits(logging.Handler):
    def emit(self, record):
        if moment == "between" and "attempt 1 of 3 failed" in record.getMessage():
            die()

logging.getLogger("agentflow").addHandler(Waits())

@workflow("doubtful")
async def doubtful(ctx):
    return await step("flaky", flaky, retry=Retry(max_attempts=3, initial_delay=0.001))

doubtful.options(run_id="doubtful").run_sync()
"""
    for moment in ("inside", "between"):
        run_program(source, tmp_path, moment, expect_kill=True)
    run_program(source, tmp_path, "not at all")
    assert [line for line in notes(tmp_path) if line.startswith("ran")] == ["ran 1", "ran 1", "ran 2"]
    (flaky,) = runs.get("doubtful").steps
    assert (flaky.output, flaky.attempts, flaky.in_doubt) == (2, 2, 1)


def test_each_process_that_died_within_a_step_counts_as_a_doubt(tmp_path: Path) -> None:
    source = """
def charge():
    note("charge")
    if sys.argv[1:] == ["die"]:
        die()

@workflow("doubtful")
async def doubtful(ctx):
    await step("charge", charge)

doubtful.options(run_id="doubtful").run_sync()
"""
    for _ in range(3):
        run_program(source, tmp_path, "die", expect_kill=True)
    run_program(source, tmp_path)
    assert notes(tmp_path) == ["charge"] * 4
    (charge,) = runs.get("doubtful").steps
    assert (charge.attempts, charge.in_doubt) == (1, 3)
