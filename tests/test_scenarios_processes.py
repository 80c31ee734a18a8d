"""What other durable-execution systems promise in their suites, shown with real processes that are killed.

The rows are those of ``test_scenarios.py``, which names the suites behind the letters. A life is a process that is
killed with SIGKILL, most of them at a moment that nobody chose; what the outside world has seen is in ``notes.txt``
and in the log of a server on the loopback interface.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentflow import RunCancelled, TaskClosed, UsageError, runs, tasks
from tests.lives import Lives
from tests.loopback import Loopback, answer_to
from tests.programs import notes

MODEL = {"AGENTFLOW_MODEL": "openai:gpt-4o-mini"}

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def server_of_lives() -> Iterator[Lives]:
    made = Lives()
    yield made
    made.close()


@pytest.fixture
def lives(server_of_lives: Lives, here: Path) -> Iterator[Lives]:
    """Programs of this test; none outlives it."""
    server_of_lives.folder, server_of_lives.env = here, {}
    server_of_lives.all.clear()
    yield server_of_lives
    for life in server_of_lives.all:
        life.kill()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the test's programs, whose journal this process looks into too."""
    monkeypatch.setenv("AGENTFLOW_PATH", str(tmp_path / "journal"))
    return tmp_path


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("KILLS_SEED") or random.randrange(10**6))
    print("KILLS_SEED", seed)
    return random.Random(seed)


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What a condition gives once it holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.002)
    return found


def count(folder: Path) -> Counter[str]:
    return Counter(notes(folder))


# -- 1, 2: replay in another process --------------------------------------------------------------

REPLAYED = """
class OutOfStock(Exception):
    def __init__(self, item, *, left):
        super().__init__(f"{left} of {item} left")
        self.item, self.left = item, left

def reserve(item):
    note("reserve")
    raise OutOfStock(item, left=0)

def charge(order):
    note("charge")
    return {"order": order, "total": (1, 2)}

@workflow
async def order(ctx, number: int):
    charged = await step("charge", charge, number)
    text = await generate_content(f"Thank for {number}", name="thank")
    try:
        await step("reserve", reserve, "cup", retry=Retry(max_attempts=2, initial_delay=0))
    except OutOfStock as error:
        note(f"caught {error} {error.item} {error.left} {error.attempts}")
    if "die" in sys.argv:
        die()
    return [charged, text]

print(order.run_sync(7))
"""


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_another_process_replays_what_is_finished_and_raises_a_handled_failure_again(plain: bool, here: Path, lives: Lives) -> None:
    """After a kill and after a plain end: nothing runs or is billed twice, the error is the same. (Idea: A step/1-9, 1-10)"""
    source = REPLAYED
    if plain:
        source = "from agentflow.sync import workflow, step, generate_content\n" + REPLAYED.replace("async def order", "def order").replace("await ", "")
    with Loopback() as server:
        env = {**server.environment, **MODEL}
        lives.run(source, "die", env=env, code=KILLED)
        outs = [lives.run(source, env=env).out for _ in range(3)]
        assert set(outs) == {f"{[{'order': 7, 'total': (1, 2)}, answer_to('Thank for 7')]}\n"}
        assert len(server.arrived) == 1
    assert count(here) == {"charge": 1, "reserve": 2, "caught 0 of cup left cup 0 2": 4}


# -- 3: crash mid-step, never twice ---------------------------------------------------------------

DOUBTFUL = """
def charge(order):
    note("charge")
    if "die" in sys.argv:
        die()
    return "charged"

async def charge_later(order):
    return charge(order)

async def around():
    return await step("charge", charge_later, 7, in_doubt=policy)

where, policy = sys.argv[1:3]

@workflow
async def child(ctx):
    return await step("charge", charge, 7, in_doubt=policy)

@workflow
async def order(ctx):
    if where == "thread":
        return await step("charge", charge, 7, in_doubt=policy)
    if where == "async":
        return await step("charge", charge_later, 7, in_doubt=policy)
    if where == "retry":
        return await step("charge", charge, 7, in_doubt=policy, retry=Retry(3, initial_delay=0))
    if where == "keyed":
        return await step("charge", charge, 7, in_doubt=policy, idempotency_key="order-7")
    if where == "nested":
        return await step("around", around)
    if where == "child":
        return await child.run()
    return (await parallel([step("charge", charge, 7, in_doubt=policy), step("beside", charge_later, 8)]))[0]

def plain(ctx):
    import agentflow.sync
    return agentflow.sync.step("charge", charge, 7, in_doubt=policy)

if where == "plain":
    import agentflow.sync
    order = agentflow.sync.workflow("order", execute=plain)

rerun = [word.partition("=")[2] for word in sys.argv if word.startswith("rerun=")]
try:
    print(order.options(rerun=rerun).run_sync())
except Waiting as waiting:
    print("waits for", waiting.waiting_on[0]["id"])
except StepInDoubt as doubt:
    print("in doubt:", doubt.step, doubt)
"""
PLACES = ["thread", "async", "retry", "keyed", "nested", "child", "plain"]


@pytest.mark.parametrize("where", PLACES)
def test_a_step_that_a_crash_left_in_doubt_is_not_run_again_until_somebody_says_so(where: str, here: Path, lives: Lives) -> None:
    """``in_doubt="raise"``: it fails as in doubt, however often it is tried; ``rerun=`` does it. (Idea: A step/1-17)"""
    lives.run(DOUBTFUL, where, "raise", "die", code=KILLED)
    for _ in range(2):
        assert lives.run(DOUBTFUL, where, "raise").out.startswith("in doubt: ")
    assert count(here) == {"charge": 1}
    if where != "child":
        assert lives.run(DOUBTFUL, where, "raise", "rerun=charge").out == "charged\n"
        assert lives.run(DOUBTFUL, where, "raise").out == "charged\n"
        assert count(here) == {"charge": 2}


@pytest.mark.parametrize("where", ["thread", "nested", "child", "plain"])
@pytest.mark.parametrize("happened", [True, False])
def test_a_person_says_whether_a_step_in_doubt_has_happened(where: str, happened: bool, here: Path, lives: Lives) -> None:
    """``in_doubt="ask"``: a yes brings the result along, a no runs it. (Idea: A step/1-17)"""
    lives.run(DOUBTFUL, where, "ask", "die", code=KILLED)
    assert lives.run(DOUBTFUL, where, "ask").out.startswith("waits for ")
    (task,) = tasks.list()
    if happened:
        tasks.answer(task.id, "charged by hand")
    else:
        tasks.reject(task.id)
    expected = "charged by hand\n" if happened else "charged\n"
    assert [lives.run(DOUBTFUL, where, "ask").out for _ in range(2)] == [expected] * 2
    assert count(here) == {"charge": 1 if happened else 2}


# -- 4: crash inside a child workflow -------------------------------------------------------------

CHILDREN = """
where, moment = sys.argv[1:3]

def work(what):
    note(what)
    if what == moment:
        die()
    return what

@workflow
async def child(ctx, name: str):
    first = await step("first", work, f"{name} first")
    text = await generate_content(f"About {name}", name="ask")
    last = await step("last", work, f"{name} last")
    return [first, text, last]

@workflow
async def parent(ctx):
    before = await step("before", work, "before")
    if where == "body":
        got = [await child.run("a")]
    elif where == "step":
        got = [await step("child", child.run, "a")]
    elif where == "gather":
        got = await asyncio.gather(child.run("a"), child.run("b"))
    else:
        got = await parallel.map(child.run, ["a", "b"])
    return [before, got, await step("after", work, "after")]

@workflow
async def grand(ctx):
    return await parent.run()

print(grand.run_sync())
"""


@pytest.mark.parametrize("where", ["body", "step", "gather", "map"])
@pytest.mark.parametrize("moment", ["a first", "a last", "after"])
def test_of_a_child_in_which_a_process_died_only_the_interrupted_step_runs_again(where: str, moment: str, here: Path, lives: Lives) -> None:
    """The child's result is right, its finished steps and its call are not repeated. (Idea: A child/3-12)"""
    names = ["a", "b"] if where in ("gather", "map") else ["a"]
    with Loopback() as server:
        env = {**server.environment, **MODEL}
        lives.run(CHILDREN, where, moment, env=env, code=KILLED)
        before = count(here)
        outs = [lives.run(CHILDREN, where, "never", env=env).out for _ in range(2)]
        expected = ["before", [[f"{name} first", answer_to(f"About {name}"), f"{name} last"] for name in names], "after"]
        assert set(outs) == {f"{expected}\n"}
        bought = Counter(event["text"] for event in server.arrived)
    # The other child's call may have been in flight when the process died.
    assert bought["About a"] == 1 and bought["About b"] <= 2
    again = count(here)
    assert again[moment] == 2 and before[moment] == 1
    # So may the other child's step have been.
    assert {word for word, times in again.items() if times > 1} - {"b first", "b last"} == {moment}
    assert {run.status for run in runs.list()} == {"completed"}


# -- 7: interrupt during retries ------------------------------------------------------------------

RETRIED = """
import time
moment = sys.argv[1] if len(sys.argv) > 1 else ""

def flaky():
    attempt = current_step().attempt
    note(f"attempt {attempt}")
    if moment == "inside" and attempt == 2:
        note("there")
        time.sleep(60)
    if attempt < 3:
        raise ConnectionError(f"attempt {attempt}")
    return attempt

async def flaky_later():
    attempt = current_step().attempt
    note(f"attempt {attempt}")
    if moment == "inside" and attempt == 2:
        note("there")
        await asyncio.sleep(60)
    if attempt < 3:
        raise ConnectionError(f"attempt {attempt}")
    return attempt

import logging

class Waits(logging.Handler):
    def emit(self, record):
        if "attempt 2 of 4 failed" in record.getMessage():
            note("there")

logging.getLogger("agentflow").addHandler(Waits())
retry = Retry(4, backoff="fixed", initial_delay=60 if moment == "between" else 0, max_delay=60, jitter=False)

@workflow("retried")
async def retried(ctx):
    return await step("flaky", flaky_later, retry=retry)

def body(ctx):
    return agentflow.sync.step("flaky", flaky, retry=retry)

if "plain" in sys.argv:
    import agentflow.sync
    retried = agentflow.sync.workflow("retried", execute=body)

print(retried.run_sync())
"""


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("moment", ["inside", "between"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupt_during_retries_is_no_failure_of_the_step(plain: bool, moment: str, stop: int, here: Path, lives: Lives) -> None:
    """Ctrl-C is not recorded as an error; the run can be resumed and goes on counting. (Idea: D test_failures)"""
    more = ["plain"] if plain else []
    if moment == "between":  # the first pause must not be the long one
        more.append("x")
    source = RETRIED.replace('initial_delay=60 if moment == "between" else 0', 'initial_delay=0.01 if moment != "between" else 0.5')
    life = lives.start(source, moment, *more)
    until(lambda: "there" in notes(here), "the program is where it is to be stopped")
    life.signal(stop)
    ended = life.end()
    assert ended.killed if stop == signal.SIGKILL else ended.code == 1 and "KeyboardInterrupt" in ended.err
    (run,) = runs.list()
    assert run.status == "interrupted" and run.error is None and run.steps == []
    assert lives.run(source, "", *more).out == "3\n"
    attempts = [word for word in notes(here) if word.startswith("attempt")]
    expected = ["attempt 1", "attempt 2", "attempt 2", "attempt 3"] if moment == "inside" else ["attempt 1", "attempt 2", "attempt 3"]
    assert attempts == expected
    (record,) = runs.list()[0].steps
    assert (record.status, record.attempts, record.output) == ("completed", 3, 3)


# -- 9: sleep across a kill -----------------------------------------------------------------------

SLEEPER = """
import time
from agentflow.testing import FakeClock

@workflow("sleeper")
async def sleeper(ctx):
    await step("before", lambda: note("before"))
    note(f"asks {time.time()!r}")
    await ctx.sleep("40s")
    return await step("after", lambda: note("after"))

def body(ctx):
    import agentflow.sync
    agentflow.sync.step("before", lambda: note("before"))
    note(f"asks {time.time()!r}")
    ctx.sleep("40s")
    return agentflow.sync.step("after", lambda: note("after"))

if sys.argv[1] == "plain":
    import agentflow.sync
    sleeper = agentflow.sync.workflow("sleeper", execute=body)

if sys.argv[2:]:
    from datetime import datetime, timedelta, UTC
    with FakeClock(datetime.now(UTC) + timedelta(seconds=float(sys.argv[2]))) as clock:
        sleeper.run_sync()
        print(repr(clock.now.timestamp()))
else:
    sleeper.run_sync()
"""


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_a_sleep_across_kills_ends_at_the_instant_that_was_planned_first(plain: bool, here: Path, lives: Lives) -> None:
    """Killed several times before its middle, it does not start from zero. (Idea: R SleepWithFailures)"""
    how = "plain" if plain else "async"
    between = []
    for life in range(3):
        sleeper = lives.start(SLEEPER, how)
        until(lambda: sum(word.startswith("asks") for word in notes(here)) > life, "it sleeps")
        if life == 0:
            # The end is planned when it is asked for; nothing outside shows the very moment at which that was recorded.
            until(lambda: b"z/" in b"".join(file.read_bytes() for file in (here / "journal").glob("cache.db*")), "its end is recorded")
        between.append(time.time())
        assert sleeper.kill().killed
    first = float(next(word for word in notes(here) if word.startswith("asks")).split()[1])
    # A clock that is 15 s ahead: it moves on to the end of the sleep by itself.
    end = float(lives.run(SLEEPER, how, "15").out)
    assert first + 40 <= end <= between[0] + 40
    assert [word for word in notes(here) if not word.startswith("asks")] == ["before", "after"]


# -- 10: deadline is recorded ---------------------------------------------------------------------

DEADLINES = """
@workflow(timeout="3d")
async def patient(ctx, how: str):
    await step("before", lambda: note("before"))
    if how == "person":
        got = await human_task(data="?", timeout="2d", on_timeout="nobody")
    elif how == "event":
        got = await ctx.wait_for_event("paid", timeout="2d", default="nobody")
    else:
        got = await ctx.wait_for_event("paid")
    if "die" in sys.argv:
        die()
    return got

from datetime import datetime, timedelta, UTC
from agentflow.testing import FakeClock
with FakeClock(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=float(sys.argv[2]))):
    try:
        print(patient.run_sync(sys.argv[1]))
    except Waiting as waiting:
        print("waits", waiting.waiting_on[0].get("deadline"))
    except WorkflowTimeout as late:
        print("late", late.deadline.timestamp())
"""


@pytest.mark.parametrize("how", ["person", "event", "workflow"])
def test_a_deadline_is_the_first_one_in_every_process(how: str, here: Path, lives: Lives) -> None:
    """Other processes, at other times, after a kill: the deadline stays. (Idea: B test_checkpoints)"""
    begun = 1767225600.0
    for hours in (0, 20, 40):
        out = lives.run(DEADLINES, how, str(hours)).out
        assert out == ("waits None\n" if how == "workflow" else f"waits {begun + 2 * 86400}\n")
    if how == "workflow":
        assert lives.run(DEADLINES, how, "73").out == f"late {begun + 3 * 86400}\n"
    else:
        lives.run(DEADLINES, how, "49", "die", code=KILLED)
        assert lives.run(DEADLINES, how, "50").out == "nobody\n"
        assert lives.run(DEADLINES, how, "60").out == "nobody\n"
    assert count(here) == {"before": 1}


# -- 11, 12: answers while nobody runs ------------------------------------------------------------

WAITING = """
from pydantic import BaseModel

class Form(BaseModel):
    amount: int
    reason: str = ""

@workflow
async def asks(ctx, number: int):
    text = await generate_content(f"Draft {number}", name="draft")
    await step("before", lambda: note(f"before {number}"))
    decision = await human_task("approve", assign_to="manager", data=text)
    form = await human_task("input", data=number, schema=Form)
    event = await ctx.wait_for_event("paid", match={"number": number})
    after = await step("after", lambda: note(f"after {number}"))
    return [text, bool(decision), decision.by, decision.comment, form.amount, event["number"]]

stays = "stays" in sys.argv
try:
    print(asks.options(run_id="asks", wait=stays).run_sync(7))
except Waiting as waiting:
    print("waits for", waiting.waiting_on[0]["kind"])
"""
ANSWERED = f"{[answer_to('Draft 7'), True, 'Mia', 'well', 30, 7]}\n"


@pytest.mark.parametrize("stays", [False, True], ids=["suspended", "killed while it stays"])
@pytest.mark.parametrize("given_by", ["python", "command line"])
def test_answers_that_arrive_while_no_process_runs_are_not_lost(stays: bool, given_by: str, here: Path, lives: Lives) -> None:
    """Each wait is answered while nobody executes the run; the paid call is made once. (Idea: A callback/4-9, 4-12)"""
    with Loopback() as server:
        env = {**server.environment, **MODEL}

        def one_life() -> None:
            if not stays:
                assert lives.run(WAITING, env=env).out.startswith("waits for")
                return
            asked = {task.id for task in tasks.list(status=None)}
            life = lives.start(WAITING, "stays", env=env)
            until(lambda: runs.list() and (before == 2 or {t.id for t in tasks.list(status=None)} - asked), "it waits")
            if before == 2:
                until(lambda: b"wn/paid" in b"".join(file.read_bytes() for file in (here / "journal").glob("cache.db*")), "it listens")
            assert life.kill().killed

        for before in range(3):
            one_life()
            if before == 2:
                lives.run('send_event("paid", {"number": 8})\nsend_event("paid", {"number": 7}, run_id="asks")', name="send.py")
            elif given_by == "python":
                (task,) = tasks.list()
                if before == 0:
                    tasks.approve(task.id, by="Mia", comment="well")
                else:
                    tasks.answer(task.id, {"amount": 30})
            else:
                (shown,) = json.loads(lives.run(None, "tasks", "list", "--json").out)
                if before == 0:
                    lives.run(None, "tasks", "approve", shown["id"], "--by", "Mia", "--comment", "well")
                else:
                    lives.run(None, "tasks", "answer", shown["id"], '{"amount": 30}')
        assert [lives.run(WAITING, env=env).out for _ in range(2)] == [ANSWERED] * 2
        assert len(server.arrived) == 1
    assert count(here) == {"before 7": 1, "after 7": 1}


# -- 16, 23: branches across a kill ---------------------------------------------------------------

BRANCHES = """
form = sys.argv[1]
HELD = set(sys.argv[2].split(",")) if len(sys.argv) > 2 else set()

async def work(n):
    note(f"work {n}")
    if str(n) in HELD:
        await asyncio.sleep(600)
    return n

async def branch(n):
    text = await generate_content(f"About {n}", name="ask")
    value = await step("work", work, n)
    if n == 1:
        await human_task(data=n)
    return [value, text]

async def by_group(ns):
    async with asyncio.TaskGroup() as group:
        made = [group.create_task(branch(n)) for n in ns]
    return [task.result() for task in made]

@workflow
async def wide(ctx):
    if form == "gather":
        return await asyncio.gather(*(branch(n) for n in range(4)))
    if form == "group":
        return await by_group(range(4))
    if form == "parallel":
        return await parallel([branch(n) for n in range(4)])
    return await parallel.map(branch, range(4), concurrency=3)

try:
    print(wide.run_sync())
except Waiting:
    print("waits")
"""


@pytest.mark.parametrize("form", ["gather", "group", "parallel", "map"])
def test_branches_that_had_finished_before_a_kill_or_a_suspension_are_never_called_again(form: str, here: Path, lives: Lives) -> None:
    """Some branches were through, one was at work, one asks: the ordered result is rebuilt. (Idea: L; T; A map/9-15)"""
    with Loopback() as server:
        env = {**server.environment, **MODEL}
        life = lives.start(BRANCHES, form, "2", env=env)
        ended = lambda: sum(each.name == "work" for run in runs.list() for each in run.steps)  # noqa: E731
        until(lambda: ended() == 3 and "work 2" in notes(here) and tasks.list(), "all but one are through")
        assert life.kill().killed
        assert lives.run(BRANCHES, form, env=env).out == "waits\n"
        tasks.approve(tasks.list()[0].id)
        expected = [[n, answer_to(f"About {n}")] for n in range(4)]
        assert [lives.run(BRANCHES, form, env=env).out for _ in range(2)] == [f"{expected}\n"] * 2
        assert Counter(event["text"] for event in server.arrived) == {f"About {n}": 1 for n in range(4)}
    assert count(here) == {"work 0": 1, "work 1": 1, "work 2": 2, "work 3": 1}


# -- 19: code changed -----------------------------------------------------------------------------

STRICT = """
def charge(order):
    note("charge")
    return order

@workflow("strict", on_change="error")
async def strict(ctx):
    charged = await step("charge", charge, 7)
    text = await generate_content("Thank them", name="thank")
    if "die" in sys.argv:
        die()
    return [charged, text, await step("last", lambda: note("last"))]

try:
    print(strict.run_sync())
except StepChanged as changed:
    print("changed:", changed.step, changed)
"""


@pytest.mark.parametrize(
    ("old", "new", "step"),
    [
        ("return order", "return order + 1", "charge"),
        ("charge, 7", "charge, 8", "charge"),
        ('"Thank them"', '"Thank them kindly"', "thank"),
    ],
)
def test_edited_code_under_error_is_refused_in_the_next_process_without_side_effect_or_bill(old: str, new: str, step: str, here: Path, lives: Lives) -> None:
    """The file is edited between the crash and the restart; the old file then goes on. (Idea: D; R NonDeterminismErrors)"""
    with Loopback() as server:
        env = {**server.environment, **MODEL}
        lives.run(STRICT, "die", env=env, code=KILLED)
        assert old in STRICT
        out = lives.run(STRICT.replace(old, new), env=env).out
        assert out.startswith(f"changed: {step} ") and f"rerun=['{step}']" in out
        assert len(server.arrived) == 1 and count(here) == {"charge": 1}
        assert lives.run(STRICT, env=env).out == f"{[7, answer_to('Thank them'), None]}\n"
        assert len(server.arrived) == 1 and count(here) == {"charge": 1, "last": 1}


# -- 21: started twice with one id ----------------------------------------------------------------

ONCE = """
import time

def charge(number):
    note(f"charge {number}")
    time.sleep(0.05)
    return number

@workflow(run_id=lambda number: f"order-{number}")
async def order(ctx, number: int):
    text = await generate_content(f"Thank {number}", name="thank")
    return [await step("charge", charge, number), text, ctx.run_id]

while not (HERE / "go").exists():
    time.sleep(0.002)
print(order.options(busy="wait").run_sync(int(sys.argv[1])))
"""


def test_started_by_many_processes_with_one_id_it_is_one_run_also_when_one_of_them_is_killed(here: Path, lives: Lives) -> None:
    """One run and one result for all, also for those that come after its end. (Idea: B idempotent_spawn; T deduplication)"""
    with Loopback(latency=0.05) as server:
        env = {**server.environment, **MODEL}
        started = [lives.start(ONCE, "1", env=env) for _ in range(4)]
        other = lives.start(ONCE, "2", env=env)
        (here / "go").touch()
        until(lambda: server.arrived, "somebody asks")
        started.pop().kill()
        outs = {life.end().out for life in started}
        assert outs == {f"{[1, answer_to('Thank 1'), 'order-1']}\n"}
        assert other.end().out == f"{[2, answer_to('Thank 2'), 'order-2']}\n"
        assert lives.run(ONCE, "1", env=env).out in outs
        bought = Counter(event["text"] for event in server.arrived)
    # The one that was killed may have been the one that asked.
    assert bought["Thank 1"] <= 2 and bought["Thank 2"] == 1
    assert count(here)["charge 2"] == 1 and count(here)["charge 1"] <= 2
    assert sorted(run.id for run in runs.list()) == ["order-1", "order-2"]


# -- 14: lost wake-up race, many processes --------------------------------------------------------

RACERS = """
import random, time
from agentflow.errors import TaskClosed

@workflow("racer")
async def racer(ctx, number: int, rounds: int):
    got = []
    for i in range(rounds):
        decision = await human_task(data=[number, i])
        event = await ctx.wait_for_event("go", match={"number": number, "round": i})
        got.append([decision.comment, event["word"]])
    return got

role, number, total, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if role == "stays":
    print(racer.options(wait=True).run_sync(number, rounds))
elif role == "looks":  # suspends each time, and is run again at once
    while True:
        try:
            print(racer.run_sync(number, rounds))
            break
        except Waiting:
            pass
else:  # answers whatever is asked, at the moment it appears; of several the first decision wins
    done = set()
    while len(done) < total * rounds:
        for task in tasks.list():
            n, i = task.data
            try:
                tasks.approve(task.id, by=f"answerer {number}", comment=f"{n}.{i}")
                note(f"approved {n}.{i}")
                send_event("go", {"number": n, "round": i, "word": f"event {n}.{i}"})
            except TaskClosed:
                note(f"refused {n}.{i}")
        done = {word.partition(" ")[2] for word in (HERE / "notes.txt").read_text().splitlines() if word.startswith("approved")} if (HERE / "notes.txt").exists() else set()
"""


def race(here: Path, lives: Lives, waiters: int, answerers: int, rounds: int, seconds: float) -> None:
    lives.run("print(runs.list())", name="first.py")  # the journal is there before all open it at once
    sizes = [str(waiters), str(rounds)]
    roles = [("stays" if n % 2 else "looks", n) for n in range(waiters)] + [("answers", n) for n in range(answerers)]
    started = [lives.start(RACERS, role, str(n), *sizes) for role, n in roles]
    outs = []
    for life in started:
        ended = life.end(seconds)
        assert ended.code == 0, ended.err
        outs.append(ended.out)
    for n, out in enumerate(outs[:waiters]):
        assert out == f"{[[f'{n}.{i}', f'event {n}.{i}'] for i in range(rounds)]}\n"
    said = count(here)
    for n in range(waiters):
        for i in range(rounds):
            assert said[f"approved {n}.{i}"] == 1, "two decisions were taken for one task"
    assert {task.status for task in tasks.list(status=None)} == {"approved"}
    assert len(tasks.list(status=None)) == waiters * rounds


def test_no_wake_up_is_lost_between_processes_that_wait_and_processes_that_answer(here: Path, lives: Lives) -> None:
    """Tasks and events answered at the very moment they are asked for: nobody hangs. (Idea: B test_events)"""
    race(here, lives, waiters=2, answerers=2, rounds=8, seconds=120)


@pytest.mark.torture
def test_no_wake_up_is_lost_between_many_processes_in_many_rounds(here: Path, lives: Lives) -> None:
    """The same with more of everything. (Idea: B test_events)"""
    race(here, lives, waiters=6, answerers=4, rounds=60, seconds=600)


# -- 25: stress on one store ----------------------------------------------------------------------

STRESS = """
import random

async def work(process, i, j):
    note(f"ran {process}.{i}.{j}")
    await asyncio.sleep(random.random() / 500)
    return f"{process}.{i}.{j}"

def shared(key):
    note(f"ran shared {key}")
    return f"{key} by {os.getpid()}"

@workflow("stress")
async def stress(ctx, process: int, i: int):
    note(f"body {process}.{i}")
    parts = await parallel.map(lambda j: step("work", work, process, i, j), range(5))
    text = await generate_content(f"Say {process}.{i}", name="say")
    one = await step("shared", shared, i % 7, idempotency_key=f"key {i % 7}")
    for part in parts:
        note(f"ack work {part}")
    note(f"ack say {process}.{i} {text.replace(' ', '_')}")
    note(f"ack shared {i % 7} {one.replace(' ', '_')}")
    return [parts, text, one]

process, count = int(sys.argv[1]), int(sys.argv[2])
for i in range(count):
    assert stress.options(run_id=f"stress-{process}-{i}").run_sync(process, i)[0] == [f"{process}.{i}.{j}" for j in range(5)]
"""


def stress(here: Path, lives: Lives, processes: int, count_: int, kills: int, chance: random.Random, seconds: float) -> None:
    lives.run("print(runs.list())", name="first.py")
    with Loopback(latency=0.002) as server:
        env = {**server.environment, **MODEL}
        started = {n: lives.start(STRESS, str(n), str(count_), env=env) for n in range(processes)}
        for _ in range(kills):
            time.sleep(chance.random() * (0.3 if count_ < 10 else 1.5))
            n = chance.randrange(processes)
            started[n].kill()
            started[n] = lives.start(STRESS, str(n), str(count_), env=env)
            runs.list(status="running")
        for life in started.values():
            ended = life.end(seconds)
            assert ended.code == 0, ended.err
        bought = Counter(event["text"] for event in server.arrived)
    lines = notes(here)
    ran = Counter(line[4:] for line in lines if line.startswith("ran "))
    acknowledged: dict[str, str] = {}
    for line in lines:
        if line.startswith("ack "):
            _, what, which, *value = line.split()
            key, text = f"{what} {which}", value[0] if value else which
            assert acknowledged.setdefault(key, text) == text, f"{key}: two results were handed out"
    found = runs.list()
    assert {run.id for run in found} == {f"stress-{n}-{i}" for n in range(processes) for i in range(count_)}
    assert {run.status for run in found} == {"completed"} and len(found) == processes * count_
    for run in found:
        steps = Counter(each.name for each in run.steps)
        assert steps == {"work": 5, "say": 1, "shared": 1}, f"{run.id}: {steps}"
        _, n, i = run.id.split("-")
        for each in run.steps:
            if each.name == "work":
                assert acknowledged[f"work {each.output}"] == each.output
            if each.name == "shared":
                assert acknowledged[f"shared {int(i) % 7}"] == each.output.replace(" ", "_")
    # Nothing ran twice but what a kill had cut off, at most five branches each time.
    twice = sum(times - 1 for times in ran.values()), sum(bought.values()) - len(bought)
    assert twice[0] <= 5 * kills and twice[1] <= kills, f"{twice} with {kills} kills"
    assert set(bought) == {f"Say {n}.{i}" for n in range(processes) for i in range(count_)}
    lives.run(None, "journal", "verify")


def test_many_processes_on_one_journal_lose_no_record_and_double_none(here: Path, lives: Lives, chance: random.Random) -> None:
    """Each run, step, call and key is on record exactly once. (Idea: diskcache stress tests)"""
    stress(here, lives, processes=4, count_=6, kills=2, chance=chance, seconds=120)


@pytest.mark.torture
def test_many_processes_that_are_killed_on_one_journal_lose_no_record_and_double_none(here: Path, lives: Lives, chance: random.Random) -> None:
    """The same with more processes, more runs and many kills. (Idea: diskcache stress tests)"""
    stress(here, lives, processes=8, count_=60, kills=40, chance=chance, seconds=600)


# -- killed while waiting -------------------------------------------------------------------------

STAYS = """
@workflow("stays")
async def stays(ctx, number: int):
    text = await generate_content(f"Draft {number}", name="draft")
    await step("before", lambda: note(f"before {number}"))
    first, second = await parallel([human_task(title="first", data=[number, text]), human_task(title="second", data=number)])
    await step("after", lambda: note(f"after {number}"))
    return [text, first.comment, second.comment]

def life(number):
    result = stays.options(run_id=f"stays-{number}", wait=True).run_sync(int(number))
    note(f"result {number} {result}")

life(*sys.argv[1:])
"""


def killed_while_waiting(here: Path, lives: Lives, rounds: int, chance: random.Random) -> None:
    with Loopback(latency=0.01) as server:
        lives.env = {**server.environment, **MODEL}
        for number in range(rounds):
            run_id = f"stays-{number}"
            for _ in range(3):  # nobody answers: each of these lives is killed
                assert lives.killed_after(0.02 + chance.random() * 0.15, STAYS, str(number))
            life = lives.start(STAYS, str(number))
            asked = until(lambda: {t.title: t for t in tasks.list(run_id=run_id)} if len(tasks.list(run_id=run_id)) == 2 else None, "both are asked")
            tasks.approve(asked["second"].id, comment="two")
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.05)
                assert life.kill().killed
                life = lives.start(STAYS, str(number))
            tasks.approve(asked["first"].id, comment="one")
            time.sleep(chance.random() * 0.05)
            life.kill()
            lives.run(STAYS, str(number))
            assert f"result {number} {[answer_to(f'Draft {number}'), 'one', 'two']}" in notes(here)
            assert len(tasks.list(status=None, run_id=run_id)) == 2, "a question was asked again"
        bought = Counter(event["text"] for event in server.arrived)
    said = count(here)
    for number in range(rounds):
        # A kill may fall within the call or the step: three lives, and two more that had both behind them.
        assert bought[f"Draft {number}"] <= 3 and said[f"before {number}"] <= 3
        assert 1 <= said[f"after {number}"] <= 2
        record = {each.name: each for each in runs.get(f"stays-{number}").steps}
        assert bought[f"Draft {number}"] - 1 <= record["draft"].in_doubt
        assert said[f"before {number}"] - 1 <= record["before"].in_doubt and said[f"after {number}"] - 1 <= record["after"].in_doubt


def test_a_run_killed_while_it_waits_for_people_asks_once_and_loses_no_answer(here: Path, lives: Lives, chance: random.Random) -> None:
    """Kills at any moment of a wait: the same two tasks, their answers, one paid draft."""
    killed_while_waiting(here, lives, 4, chance)


@pytest.mark.torture
def test_a_run_killed_while_it_waits_for_people_asks_once_and_loses_no_answer_in_many_rounds(here: Path, lives: Lives, chance: random.Random) -> None:
    """The same many times."""
    killed_while_waiting(here, lives, 60, chance)


# -- killed while sleeping ------------------------------------------------------------------------

SLEEPS = """
@workflow("sleeps")
async def sleeps(ctx, number: int):
    begun = ctx.now("begun")
    await step("before", lambda: note(f"before {number}"))
    await ctx.sleep(0.6)
    await step("after", lambda: note(f"after {number}"))
    return (ctx.now("end") - begun).total_seconds()

def life(number):
    note(f"slept {number} {sleeps.options(run_id=f'sleeps-{number}').run_sync(int(number))}")

life(*sys.argv[1:])
"""


def killed_while_sleeping(here: Path, lives: Lives, rounds: int, chance: random.Random) -> None:
    for number in range(rounds):
        for _ in range(3):
            lives.killed_after(0.05 + chance.random() * 0.1, SLEEPS, str(number))
        lives.run(SLEEPS, str(number))
    said = count(here)
    for number in range(rounds):
        (slept,) = {float(word.split()[2]) for word in said if word.startswith(f"slept {number} ")}
        assert slept >= 0.6, "it woke before its time"
        for name in ("before", "after"):
            record = {each.name: each for each in runs.get(f"sleeps-{number}").steps}[name]
            assert 1 <= said[f"{name} {number}"] <= 1 + record.in_doubt
        assert sum(each.kind == "sleep" for each in runs.get(f"sleeps-{number}").steps) == 1


def test_a_run_killed_while_it_sleeps_wakes_once_and_not_before_its_time(here: Path, lives: Lives, chance: random.Random) -> None:
    """Kills at any moment of a sleep, and then it goes on where it was."""
    killed_while_sleeping(here, lives, 4, chance)


# -- killed while a child works -------------------------------------------------------------------

WORKING = """
@workflow("worker-child")
async def child(ctx, number: int, name: str):
    first = await generate_content(f"First {number} {name}", name="first")
    await step("work", lambda: note(f"work {number} {name}"))
    second = await generate_content(f"Second {number} {name}", name="second")
    return [first, second]

async def around(number):
    return await child.run(number, "c")

@workflow("worker-parent")
async def parent(ctx, number: int):
    beside, a, b = await asyncio.gather(generate_content(f"Beside {number}", name="beside"), child.run(number, "a"), child.run(number, "b"))
    c = await step("around", around, number)
    last = await step("last", lambda: note(f"last {number}"))
    return [beside, a, b, c]

def life(number):
    note(f"result {number} {parent.options(run_id=f'parent-{number}').run_sync(int(number))}")

life(*sys.argv[1:])
"""


def killed_while_a_child_works(here: Path, lives: Lives, rounds: int, chance: random.Random) -> None:
    kills: Counter[int] = Counter()
    with Loopback(latency=0.01) as server:
        lives.env = {**server.environment, **MODEL}
        for number in range(rounds):
            for _ in range(4):
                kills[number] += lives.killed_after(0.02 + chance.random() * 0.12, WORKING, str(number))
            lives.run(WORKING, str(number))
            expected = [answer_to(f"Beside {number}")] + [[answer_to(f"First {number} {n}"), answer_to(f"Second {number} {n}")] for n in "abc"]
            assert {word for word in notes(here) if word.startswith(f"result {number} ")} == {f"result {number} {expected}"}
        bought = Counter(event["text"] for event in server.arrived)
    doubts = Counter[str]()
    for run in runs.list():
        assert run.status == "completed"
        names = Counter(each.name for each in run.steps)
        number = run.input["number"] if isinstance(run.input, dict) else run.input
        if run.workflow == "worker-child":
            assert names == {"first": 1, "work": 1, "second": 1}
            for each in run.steps:
                if each.kind == "ai":
                    doubts[f"{each.name.title()} {number} {run.input['name']}"] += each.in_doubt
        else:
            assert names == {"beside": 1, "around": 1, "last": 1}
            doubts[f"Beside {number}"] += next(each.in_doubt for each in run.steps if each.name == "beside")
    assert len(bought) == rounds * 7
    for text, times in bought.items():
        assert times - 1 <= doubts[text], f"{text} was bought {times} times and was in doubt {doubts[text]} times"


def test_a_run_killed_while_its_children_work_pays_for_nothing_that_had_come_back(here: Path, lives: Lives, chance: random.Random) -> None:
    """Children in branches and in a step, killed at any moment: the right result, and no finished call again."""
    killed_while_a_child_works(here, lives, 4, chance)


@pytest.mark.torture
def test_a_run_killed_while_its_children_work_pays_for_nothing_that_had_come_back_in_many_rounds(here: Path, lives: Lives, chance: random.Random) -> None:
    """The same many times."""
    killed_while_a_child_works(here, lives, 60, chance)


# -- killed while answering -----------------------------------------------------------------------

ANSWERS = """
from pydantic import BaseModel

class Form(BaseModel):
    amount: int
    words: list[str]

@workflow("answered")
async def answered(ctx, number: int):
    decision = await human_task(title="go", data=number)
    form = await human_task(title="form", data=number, schema=Form)
    event = await ctx.wait_for_event("paid", match={"number": number}, timeout="30d")
    await step("after", lambda: note(f"after {number}"))
    return [decision.approved, decision.by, decision.comment, form.amount, len(form.words), event["word"]]

def life(what, number, who, task=""):
    if what == "run":
        try:
            note(f"result {number} {answered.options(run_id=f'answered-{number}').run_sync(int(number))}")
        except Waiting:
            note(f"waits {number}")
    elif what == "event":
        note(f"sends {number}")
        send_event("paid", {"number": int(number), "word": who * 50}, run_id=f"answered-{number}")
        note(f"sent {number}")
    else:
        note(f"answers {task}")
        if what == "reject":
            tasks.reject(task, by=who, comment=who * 50)
        elif what == "go":
            tasks.approve(task, by=who, comment=who * 50)
        else:
            tasks.answer(task, {"amount": 30, "words": [who] * 50}, by=who)
        note(f"answered {task}")

life(*sys.argv[1:])
"""


def killed_while_answering(here: Path, lives: Lives, rounds: int, chance: random.Random) -> Counter[str]:
    """How often an answer was there after its process was killed, and how often not."""
    fell: Counter[str] = Counter()
    for number in range(rounds):
        lives.run(ANSWERS, "run", str(number), "x")
        for what in ("go", "form"):
            (task,) = tasks.list(run_id=f"answered-{number}")
            lives.killed_after(chance.random() * 0.03, ANSWERS, what, str(number), "one", task.id)
            found = tasks.get(task.id)
            if f"answered {task.id}" in notes(here):
                assert found.status != "open", "an answer that was acknowledged is lost"
            fell["there" if found.status != "open" else "not there"] += 1
            if found.status == "open":
                assert found.decision is None and [entry["what"] for entry in found.trail] == ["opened"]
                lives.run(ANSWERS, what, str(number), "two", task.id)
                found = tasks.get(task.id)
            else:
                with pytest.raises(TaskClosed, match="one"):
                    tasks.approve(task.id, by="three") if what == "go" else tasks.answer(task.id, {"amount": 1, "words": []})
            decision = found.decision
            assert decision is not None and decision.approved and decision.by in ("one", "two") and decision.at is not None
            assert [entry["what"] for entry in found.trail] == ["opened", found.status] and found.trail[1]["by"] == decision.by
            if what == "go":
                assert decision.comment == decision.by * 50
            else:
                assert decision.data == {"amount": 30, "words": [decision.by] * 50} or decision.data.words == [decision.by] * 50
            lives.run(ANSWERS, "run", str(number), "x")
        lives.killed_after(chance.random() * 0.03, ANSWERS, "event", str(number), "one")
        lives.run(ANSWERS, "run", str(number), "x")
        there = runs.get(f"answered-{number}").status == "completed"
        assert there or f"sent {number}" not in notes(here), "an event that was acknowledged is lost"
        fell["sent" if there else "not sent"] += 1
        if not there:
            lives.run(ANSWERS, "event", str(number), "two")
            lives.run(ANSWERS, "run", str(number), "x")
        go, form = (task.decision.by for task in tasks.list(status=None, run_id=f"answered-{number}"))  # type: ignore[union-attr]
        result = runs.get(f"answered-{number}").result()
        assert result == [True, go, go * 50, 30, 50, ("one" if there else "two") * 50]
        assert count(here)[f"after {number}"] == 1
        assert tasks.list() == []
    return fell


def test_an_answer_whose_process_is_killed_is_wholly_there_or_not_at_all(here: Path, lives: Lives, chance: random.Random) -> None:
    """Approvals, forms and events given by processes that are killed at any moment."""
    print(killed_while_answering(here, lives, 5, chance))


@pytest.mark.torture
def test_an_answer_whose_process_is_killed_is_wholly_there_or_not_at_all_in_many_rounds(here: Path, lives: Lives, chance: random.Random) -> None:
    """The same many times; some kills have to fall before and some after the answer."""
    fell = killed_while_answering(here, lives, 80, chance)
    assert min(fell[name] for name in ("there", "not there", "sent", "not sent")) > 0, fell


# -- killed while cancelling ----------------------------------------------------------------------

CANCELLED = """
where = os.environ.get("WHERE", "")

def book(what):
    note(f"book {what}")
    return what

def undo(what):
    note(f"undo {what} {current_step().idempotency_key}")
    if where == f"inside {what}":
        die()
    return f"undone {what}"

@workflow("cancelled-child")
async def child(ctx, number: int):
    await step("room", book, f"room {number}", compensate=undo)
    await human_task(title="child", data=number)

@workflow("cancelled")
async def cancelled(ctx, number: int):
    await step("flight", book, f"flight {number}", compensate=undo)
    await step("hotel", book, f"hotel {number}", compensate=undo)
    await step("car", book, f"car {number}", compensate=undo)
    if ctx.input == number and number % 2:
        await parallel([child.run(number), human_task(title="parent", data=number)])
    await human_task(title="go", data=number)
    await step("after", book, f"after {number}")

def life(what, number, how=""):
    run_id = f"cancelled-{number}"
    try:
        if what == "run":
            cancelled.options(run_id=run_id).run_sync(int(number))
        elif what == "stays":
            cancelled.options(run_id=run_id, wait=True).run_sync(int(number))
        elif what == "cancel":
            note(f"cancels {number}")
            runs.cancel(run_id, compensate=how == "compensate")
            note(f"cancelled {number}")
    except Waiting:
        note(f"waits {number}")
    except RunCancelled:
        note(f"stopped {number}")

life(*sys.argv[1:])
"""


def statuses(number: int) -> dict[str, str]:
    return {run.id: run.status for run in runs.list() if run.input == number}


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensate"])
def test_a_run_whose_cancelling_process_is_killed_is_cancelled_or_can_be_cancelled(compensate: bool, here: Path, lives: Lives, chance: random.Random) -> None:
    """Whatever the moment: cancelling again ends it and its children, tasks are withdrawn, each is undone once."""
    how = "compensate" if compensate else "plain"
    for number in range(1, 9):
        lives.run(CANCELLED, "run", str(number))
        lives.killed_after(chance.random() * 0.04, CANCELLED, "cancel", str(number), how)
        if f"cancelled {number}" in notes(here):
            assert runs.get(f"cancelled-{number}").status == "cancelled"
        for _ in range(2):
            with contextlib.suppress(UsageError):
                lives.killed_after(chance.random() * 0.04, CANCELLED, "cancel", str(number), how)
        lives.run(CANCELLED, "cancel", str(number), how)
        assert set(statuses(number).values()) == {"cancelled"}, statuses(number)
        lives.run(CANCELLED, "run", str(number))
    said = count(here)
    assert tasks.list() == []
    assert {task.status for task in tasks.list(status=None)} == {"withdrawn"}
    for number in range(1, 9):
        for what in ("flight", "hotel", "car"):
            keys = {word for word in said if word.startswith(f"undo {what} {number} ")}
            assert len(keys) == (1 if compensate else 0), f"{what} {number}: {keys}"
            assert said[f"book {what} {number}"] == 1
        assert f"after {number}" not in said and f"stopped {number}" in said


STEPS = ["car", "hotel", "flight"]


@pytest.mark.parametrize("owner", ["asleep", "alive"])
def test_a_run_whose_owner_is_killed_during_its_compensations_undoes_each_step_once(owner: str, here: Path, lives: Lives) -> None:
    """Killed inside each compensation in turn: those that were done are not done again, and the order is kept."""
    lives.env = {"AGENTFLOW_LEASE_SECONDS": "2"}  # how soon a process that only waits hears that it was cancelled
    life = None
    if owner == "alive":
        life = lives.start(CANCELLED, "stays", "2")
        until(lambda: tasks.list(), "it waits")
    else:
        lives.run(CANCELLED, "run", "2")
    # This program does not know the workflow: what is to be undone waits for one that does.
    lives.run(None, "runs", "cancel", "cancelled-2", "--compensate")
    if life is not None:
        assert life.end().code == 0 and "stopped 2" in notes(here)
    for what in STEPS:
        lives.run(CANCELLED, "run", "2", env={"WHERE": f"inside {what} 2"}, code=KILLED)
    for _ in range(2):
        lives.run(CANCELLED, "run", "2")
    assert runs.get("cancelled-2").status == "cancelled" and tasks.list() == []
    undone = [word for word in notes(here) if word.startswith("undo")]
    # Each was in doubt once, under the same key; none after the next had begun.
    assert [word.split()[1] for word in undone] == ["car", "car", "hotel", "hotel", "flight", "flight"]
    assert len(set(undone)) == 3
    assert not any(word.startswith("book after") for word in notes(here))
    compensations = [each for each in runs.get("cancelled-2").steps if each.kind == "compensation"]
    assert [each.output for each in compensations] == [f"undone {what} 2" for what in STEPS]


UNDOING = """
def book(what):
    note(f"book {what}")
    return what

async def undo(what):
    await asyncio.sleep(0.01)
    note(f"undo {what} {current_step().idempotency_key}")
    await asyncio.sleep(0.01)

@workflow("undoing")
async def undoing(ctx, number: int):
    for what in ("a", "b", "c", "d"):
        await step(what, book, f"{what} {number}", compensate=undo)
    await human_task(data=number)

def life(what, number):
    run_id = f"undoing-{number}"
    try:
        if what == "run":
            undoing.options(run_id=run_id).run_sync(int(number))
        else:
            undoing.get(run_id).cancel(compensate=True)
            note(f"cancelled {number}")
    except (Waiting, RunCancelled):
        pass

life(*sys.argv[1:])
"""


def killed_while_undoing(here: Path, lives: Lives, rounds: int, chance: random.Random) -> None:
    for number in range(rounds):
        lives.run(UNDOING, "run", str(number))
        lives.killed_after(chance.random() * 0.1, UNDOING, "cancel", str(number))
        for _ in range(3):
            if runs.get(f"undoing-{number}").status == "waiting":
                lives.killed_after(chance.random() * 0.1, UNDOING, "cancel", str(number))
            else:
                lives.killed_after(chance.random() * 0.1, UNDOING, "run", str(number))
        if runs.get(f"undoing-{number}").status == "waiting":
            lives.run(UNDOING, "cancel", str(number))
        lives.run(UNDOING, "run", str(number))
        run = runs.get(f"undoing-{number}")
        assert run.status == "cancelled"
        with pytest.raises(RunCancelled):
            run.result()
        undone = [word for word in notes(here) if word.startswith("undo ") and word.split()[2] == str(number)]
        assert len(set(undone)) == 4, "a compensation ran under two keys, or not at all"
        order = [word.split()[1] for word in undone]
        assert order == sorted(order, reverse=True), f"out of order: {order}"
        compensations = {each.name: each for each in run.steps if each.kind == "compensation"}
        for name, times in Counter(order).items():
            assert times - 1 <= compensations[f"undo {name}"].in_doubt, f"{name} was undone again though it was done"
        assert {each.status for each in run.steps if each.kind == "step"} == {"undone"}


def test_a_run_killed_while_it_is_cancelled_undoes_each_step_once_and_in_order(here: Path, lives: Lives, chance: random.Random) -> None:
    """Kills at any moment of a cancel with compensations, by the process that cancels and by those that go on."""
    killed_while_undoing(here, lives, 4, chance)


@pytest.mark.torture
def test_a_run_killed_while_it_is_cancelled_undoes_each_step_once_and_in_order_in_many_rounds(here: Path, lives: Lives, chance: random.Random) -> None:
    """The same many times."""
    killed_while_undoing(here, lives, 60, chance)
