"""Workers: due runs go on by themselves, each step once, whatever happens to the workers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import agentflow
from agentflow import Waiting, closing, human_task, lease, rundocs, runs, tasks, worker, workflow
from agentflow.journal import Put
from agentflow.settings import settings
from agentflow.testing import FakeClock
from tests.programs import environment, notes, run_program, running, write_program

APP = """
    import time
    from agentflow.settings import settings
    from agentflow.sync import step as plain_step
    from agentflow.sync import workflow as plain_workflow

    if os.environ.get("LATER"):
        settings.clock = lambda: time.time() + float(os.environ["LATER"])

    def until(what):
        while not what():
            time.sleep(0.01)

    def noted(word):
        file = HERE / "notes.txt"
        return file.exists() and word in file.read_text().split("\\n")

    @workflow("job")
    async def job(ctx, n: int):
        await step("first", note, f"first {n}")
        await step("second", lambda: die() if os.environ.get("KILL") else note(f"second {n}"))

    @workflow("ask")
    async def ask(ctx, n: int):
        await step("before", note, f"before {n}")
        await human_task("approve", title="Go on?", data=n)
        await step("after", note, f"after {n}")

    @workflow("nap")
    async def nap(ctx, length: str):
        if os.environ.get("DIE"):
            die()
        await step("before", note, "before")
        await ctx.sleep(length)
        await step("after", note, "after")

    @workflow("long")
    async def long(ctx):
        if os.environ.get("DIE"):
            die()

        def work():
            note("begins")
            until((HERE / "go").exists)
            note("ends")
            return "worked"

        async def outer():
            note("outer")
            worked = await step("work", work)
            await step("more", note, "more")
            return worked

        await step("outer", outer, in_doubt=os.environ.get("IN_DOUBT", "raise"))
        await step("next", note, "next")
        return "done"

    @plain_workflow("plain")
    def plain(ctx):
        if os.environ.get("DIE"):
            die()

        def work():
            note("begins")
            until((HERE / "go").exists)
            note("ends")

        plain_step("work", work)
        plain_step("next", note, "next")

    @workflow("apart")
    async def apart(ctx, n: int):
        def work():
            note(f"{n} {os.getpid()}")
            until(lambda: len({line.split()[1] for line in (HERE / "notes.txt").read_text().splitlines()}) > 1)

        await human_task("approve", data=n)
        await step("work", work)

    @workflow("narrow")
    async def narrow(ctx, n: int):
        async def work():
            note("+")
            await asyncio.sleep(0.05)
            note("-")

        await human_task("approve", data=n)
        await step("work", work)

    @workflow("child")
    async def child(ctx, n: int):
        await step("c", note, f"child {n}")
        await human_task("approve", data=n)
        return n

    @workflow("parent")
    async def parent(ctx, n: int):
        got = await child.run(n)
        await step("p", note, f"parent {got}")

    def begin(flow, *args):
        try:
            flow.run_sync(*args)
        except Waiting:
            pass

    if __name__ == "__main__":
        for n in range(int(sys.argv[2])):
            begin(globals()[sys.argv[1]], *([n] if sys.argv[1] not in ("nap", "long", "plain") else sys.argv[3:]))
"""


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., object]:
    """Runs ``app.py``, which begins some runs of a workflow."""
    file = write_program(APP, tmp_path, "app.py")
    return lambda *args, **options: run_program(file, tmp_path, *map(str, args), **options)


def start(folder: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "agentflow", "worker", *args],
        cwd=folder, env=environment(folder, env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    running.append(process)
    return process


def ended(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return err


def once(folder: Path, *args: str, **env: str) -> str:
    return ended(start(folder, *args, "--once", **env))


def until(what: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    while not what():
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def statuses() -> list[str]:
    return sorted(run.status for run in runs.list())


def approve_all() -> None:
    for task in tasks.list():
        tasks.approve(task.id)


def test_an_interrupted_run_goes_on_without_its_script(app, tmp_path):
    app("job", 1, env={"KILL": "1"}, expect_kill=True)
    assert statuses() == ["interrupted"]
    err = once(tmp_path, "app:job")
    assert notes(tmp_path) == ["first 0", "second 0"] and statuses() == ["completed"] and "completed" in err
    assert once(tmp_path, "app") and notes(tmp_path) == ["first 0", "second 0"]


def test_an_answer_wakes_the_run_in_a_worker_that_is_there(app, tmp_path):
    app("ask", 2)
    process = start(tmp_path, "app:ask")
    approve_all()
    until(lambda: statuses() == ["completed", "completed"], process)
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert sorted(notes(tmp_path)) == ["after 0", "after 1", "before 0", "before 1"]


def test_an_answer_given_while_no_worker_was_there_is_found_and_open_ones_are_left(app, tmp_path):
    app("ask", 2)
    tasks.approve(tasks.list()[0].id)
    once(tmp_path, "app:ask")
    assert statuses() == ["completed", "waiting"]
    assert sorted(notes(tmp_path)) == ["after 0", "before 0", "before 1"]


def test_a_sleep_ends_when_its_time_has_come_and_not_before(app, tmp_path):
    app("nap", 1, "2h")
    once(tmp_path, "app:nap", LATER="3600")
    assert statuses() == ["waiting"]
    once(tmp_path, "app:nap", LATER="7300")
    assert statuses() == ["completed"] and notes(tmp_path) == ["before", "after"]


def test_runs_of_workflows_that_a_worker_does_not_know_are_left_alone(app, tmp_path):
    app("job", 1, env={"KILL": "1"}, expect_kill=True)
    once(tmp_path, "app:ask")
    assert statuses() == ["interrupted"]


def begin_long(app) -> None:
    """A run of ``long`` that has not begun its first step."""
    app("long", 1, env={"DIE": "1"}, expect_kill=True)


def test_sigterm_lets_the_step_in_flight_end_and_loses_none(app, tmp_path, journal):
    begin_long(app)
    process = start(tmp_path, "app:long")
    until(lambda: notes(tmp_path) == ["outer", "begins"], process)
    process.send_signal(signal.SIGTERM)
    while "stopping" not in process.stderr.readline():
        assert process.poll() is None
    (tmp_path / "go").touch()
    ended(process)
    (run,) = runs.list()
    assert run.status == "interrupted" and notes(tmp_path) == ["outer", "begins", "ends"]
    assert [each.name for each in run.steps] == ["work"]
    assert lease.holder(journal, rundocs.lease_key(run.id)).released and not list(journal.keys("worker/"))
    once(tmp_path, "app:long")
    assert notes(tmp_path) == ["outer", "begins", "ends", "outer", "more", "next"]
    assert statuses() == ["completed"]


@pytest.mark.parametrize("how", ["twice", "no grace"])
def test_a_step_that_is_not_waited_for_is_in_doubt(app, tmp_path, how):
    begin_long(app)
    process = start(tmp_path, "app:long", *(["--grace", "0s"] if how == "no grace" else []))
    until(lambda: notes(tmp_path) == ["outer", "begins"], process)
    process.send_signal(signal.SIGTERM)
    if how == "twice":
        while "stopping" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    ended(process)
    assert statuses() == ["interrupted"]
    (tmp_path / "go").touch()
    assert "StepInDoubt" in once(tmp_path, "app:long")
    assert statuses() == ["failed"] and notes(tmp_path)[:2] == ["outer", "begins"] and "next" not in notes(tmp_path)


def test_a_run_that_only_sleeps_does_not_keep_a_worker_from_stopping(app, tmp_path):
    app("nap", 1, "50s", env={"DIE": "1"}, expect_kill=True)
    process = start(tmp_path, "app:nap", "--grace", "10h")
    until(lambda: notes(tmp_path) == ["before"], process)
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert statuses() == ["interrupted"] and [each.name for each in runs.list()[0].steps] == ["before"]


def test_a_plain_workflow_stops_before_its_next_step_too(app, tmp_path):
    app("plain", 1, env={"DIE": "1"}, expect_kill=True)
    process = start(tmp_path, "app:plain")
    until(lambda: notes(tmp_path) == ["begins"], process)
    process.send_signal(signal.SIGTERM)
    while "stopping" not in process.stderr.readline():
        assert process.poll() is None
    (tmp_path / "go").touch()
    ended(process)
    assert statuses() == ["interrupted"] and notes(tmp_path) == ["begins", "ends"]
    once(tmp_path, "app:plain")
    assert statuses() == ["completed"] and notes(tmp_path) == ["begins", "ends", "next"]


def test_two_workers_share_the_runs_and_no_step_runs_twice(app, tmp_path):
    app("apart", 6)
    approve_all()
    one, two = (start(tmp_path, "app:apart", "--once", "--concurrency", "1") for _ in range(2))
    ended(one)
    ended(two)
    assert statuses() == ["completed"] * 6
    assert sorted(line.split()[0] for line in notes(tmp_path)) == list("012345")
    assert {line.split()[1] for line in notes(tmp_path)} == {str(one.pid), str(two.pid)}


def test_no_more_runs_than_allowed_go_on_at_a_time(app, tmp_path):
    app("narrow", 7)
    approve_all()
    once(tmp_path, "app:narrow", "--concurrency", "2")
    going = [0]
    for word in notes(tmp_path):
        going.append(going[-1] + (1 if word == "+" else -1))
    assert len(going) == 15 and max(going) == 2


def test_the_runs_of_a_killed_worker_are_taken_over_by_another(app, tmp_path):
    begin_long(app)
    first = start(tmp_path, "app:long", IN_DOUBT="rerun")
    until(lambda: notes(tmp_path) == ["outer", "begins"], first)
    second = start(tmp_path, "app:long", IN_DOUBT="rerun")
    first.kill()
    first.communicate()
    (tmp_path / "go").touch()
    until(lambda: statuses() == ["completed"], second)
    second.send_signal(signal.SIGTERM)
    ended(second)
    assert notes(tmp_path)[-3:] == ["ends", "more", "next"] and len(runs.list()[0].steps) == 4


def test_a_run_inside_another_one_goes_on_by_way_of_that_one(app, tmp_path):
    app("parent", 2)
    approve_all()
    once(tmp_path, "app:parent", "app:child")
    assert statuses() == ["completed"] * 4
    assert sorted(notes(tmp_path)) == ["child 0", "child 1", "parent 0", "parent 1"]


def test_a_worker_that_is_there_is_known_and_one_that_was_killed_is_forgotten(app, tmp_path, journal):
    process = start(tmp_path, "app:job", "app:ask", "--concurrency", "3")
    until(lambda: bool(worker.enrolled(journal)), process)
    (facts,) = worker.enrolled(journal)
    assert facts["alive"] and facts["pid"] == process.pid
    assert (facts["workflows"], facts["concurrency"]) == (["ask", "job"], 3)
    process.kill()
    process.communicate()
    assert [each["alive"] for each in worker.enrolled(journal)] == [False]
    once(tmp_path, "app:job")
    assert worker.enrolled(journal) == [] and not list(journal.keys("lease-worker/"))


def test_wrong_usage_is_told_before_anything_runs(app, tmp_path):
    for wrong in (["nowhere"], ["app:job", "--concurrency", "0"], ["app:job", "--grace", "long"], []):
        process = start(tmp_path, *wrong)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and out == "" and "Traceback" not in err, err


# -- what is due, looked at in this process ----------------------------------------------------------


@workflow("asks")
async def asks(ctx, n: int) -> int:
    await human_task("approve", data=n)
    return n


def begin(count: int) -> None:
    for n in range(count):
        with pytest.raises(Waiting):
            asks.run_sync(n)


def due_ids(journal) -> list[str]:
    return [document["id"] for document in worker.due(journal, time.time())]


def test_looking_costs_the_same_however_many_runs_have_ended_or_wait(journal, monkeypatch):
    @workflow("quick")
    async def quick(ctx, n: int) -> int:
        return n

    reads = []
    get = journal._reads.get
    monkeypatch.setattr(journal._reads, "get", lambda key: reads.append(key) or get(key))
    pages = journal._reads._pages
    seen = []

    def counted(*args):
        for page in pages(*args):
            seen.extend(page)
            yield page

    monkeypatch.setattr(journal._reads, "_pages", counted)

    def cost() -> int:
        reads.clear()
        seen.clear()
        assert len(due_ids(journal)) == 1
        return len(reads) + len(seen)

    begin(1)
    tasks.approve(tasks.list()[0].id)
    few = cost()
    for n in range(40):
        quick.run_sync(n)
    for n in range(1, 30):
        with pytest.raises(Waiting):
            asks.run_sync(n)
    assert cost() == few > 0


def test_an_answered_run_is_due_once_and_not_after_it_went_on(journal):
    begin(1)
    assert due_ids(journal) == []
    task = tasks.list()[0]
    tasks.approve(task.id)
    assert due_ids(journal) == [task.run_id] == due_ids(journal)
    assert asks.run_sync(0) == 0
    assert due_ids(journal) == [] and list(journal.keys("wake/")) == []


def test_a_run_that_waits_again_is_not_due_for_the_answer_it_has_seen(journal):
    @workflow("two-questions")
    async def two(ctx) -> None:
        await human_task("approve", title="one")
        await human_task("approve", title="two")

    with pytest.raises(Waiting):
        two.run_sync()
    tasks.approve(tasks.list()[0].id)
    assert len(due_ids(journal)) == 1
    with pytest.raises(Waiting):
        two.run_sync()
    assert due_ids(journal) == []


def test_an_answer_that_comes_while_the_run_is_taken_up_is_not_lost(journal, monkeypatch):
    begin(1)
    task = tasks.list()[0]
    close = closing.close

    def late(opened, status):
        tasks.approve(task.id)  # after the run has looked for it, and before it is closed as waiting
        close(opened, status)

    monkeypatch.setattr(closing, "close", late)
    with pytest.raises(Waiting):
        asks.run_sync(0)
    monkeypatch.setattr(closing, "close", close)
    assert due_ids(journal) == [task.run_id]
    assert asks.run_sync(0) == 0


def test_an_answer_and_a_time_that_come_for_a_run_that_has_ended_are_forgotten(journal):
    begin(1)
    journal.commit([Put(f"due/{0:014d}-x", tasks.list()[0].run_id)])
    run_id = tasks.list()[0].run_id
    tasks.approve(tasks.list()[0].id)
    document = rundocs.read(journal, run_id)
    journal.commit(rundocs.write(document, "cancelled"))
    assert due_ids(journal) == [] and [*journal.keys("wake/"), *journal.keys("due/")] == []


def test_a_deadline_makes_a_run_due(journal):
    @workflow("with-deadline")
    async def flow(ctx) -> int:
        return await human_task("approve", data=1, timeout="2h", on_timeout=7)

    with pytest.raises(Waiting):
        flow.run_sync()
    (run,) = runs.list()
    now = time.time()
    assert list(worker.due(journal, now + 7100)) == []
    assert [d["id"] for d in worker.due(journal, now + 7300)] == [run.id]
    settings.clock = lambda: now + 7300
    assert flow.run_sync() == 7
    assert list(worker.due(journal, now + 7300)) == [] and list(journal.keys("due/")) == []


async def test_a_run_that_cannot_be_begun_is_tried_again_later_and_not_in_a_circle(journal, said):
    begun = []

    @workflow("typed-later")
    async def flow(ctx, n: int) -> int:
        begun.append(n)
        await human_task("approve", data=1)
        return n

    with pytest.raises(Waiting):
        await flow.run(3)
    document = rundocs.read(journal, runs.list()[0].id)
    document["input"] = '{"n":"no number"}'
    journal.commit(rundocs.write(document, "waiting"))
    tasks.approve(tasks.list()[0].id)
    tried = worker.Worker({flow.name: flow})
    await tried._go_on(flow, document)
    assert said().count("could not go on") == 1 and begun == [3]
    assert not tried._take(document) and runs.list()[0].status == "waiting"
    tried._retry_at[document["id"]] = (1, 0.0)
    assert tried._take(document)
    await asyncio.wait(list(tried._tasks))
    assert said().count("could not go on") == 2 and "next try in 2 s" in said()


def test_a_worker_needs_a_number_of_runs():
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(agentflow.UsageError):
            worker.Worker({}, concurrency=wrong)


async def test_a_run_is_due_when_an_event_comes_that_it_waits_for_and_not_for_others(journal):
    @workflow("waits")
    async def waits(ctx, order: int):
        return await ctx.wait_for_event("paid", match={"order": order}, default=None)

    first, second = [await waits.start(order) for order in (1, 2)]
    assert first.status == second.status == "waiting"
    agentflow.send_event("shipped", {"order": 1})
    agentflow.send_event("paid", {"order": 3})
    assert list(worker.due(journal, time.time())) == []
    agentflow.send_event("paid", {"order": 2})
    assert [document["id"] for document in worker.due(journal, time.time())] == [second.id]
    assert await waits.run(2) == {"order": 2}
    assert list(worker.due(journal, time.time())) == []
    agentflow.send_event("paid", {"order": 1}, run_id=first.id)
    assert [document["id"] for document in worker.due(journal, time.time())] == [first.id]
    assert await waits.run(1) == {"order": 1}
    assert list(journal.scan("wn/")) == [] and list(journal.scan("wake/")) == []


# -- reminders ---------------------------------------------------------------------------------------


@pytest.fixture
def heard():
    """What the notifier hears: why, and for whom."""
    told = []
    agentflow.configure(notify=lambda task: told.append((task.event, task.assign_to)))
    return told


@workflow("reminded")
async def reminded(ctx, n: int = 0) -> bool:
    later = agentflow.Escalate("director", timeout="10d")
    return bool(await human_task("approve", "manager", data=n, remind="1d", timeout="3d", on_timeout=later))


@workflow("around")
async def around(ctx) -> bool:
    return await reminded.run(7)


@pytest.mark.parametrize("flow", [reminded, around])
def test_a_worker_tells_reminders_and_escalates_when_their_time_has_come(journal, heard, flow):
    flows = [reminded, around]
    with FakeClock() as clock:
        with pytest.raises(Waiting):
            flow.run_sync()
        told = [("opened", "manager")]
        for hours, news in (
            (23, []), (1, [("reminded", "manager")]), (12, []), (12, [("reminded", "manager")]),
            (24, [("escalated", "director"), ("reminded", "director")]), (23, []), (72, [("reminded", "director")]),
        ):  # fmt: skip
            clock.advance(f"{hours}h")
            for _ in range(2):  # told once, however often a worker looks
                worker.work(flows, once=True)
            told += news
            assert heard == told, hours
        tasks.approve(tasks.list()[0].id)
        worker.work(flows, once=True)
        clock.advance("5d")
        worker.work(flows, once=True)
        assert heard == told and {run.status for run in runs.list()} == {"completed"}
        assert list(journal.keys("due/")) == []


async def test_a_worker_that_stays_tells_a_reminder_without_anybody_committing(journal, heard):
    with FakeClock() as clock:
        await reminded.start()
        staying = worker.Worker({"reminded": reminded})
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        agentflow.configure(notify=lambda task: loop.call_soon_threadsafe(told.set))
        task = asyncio.ensure_future(staying.run())
        while not worker.enrolled(journal):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        clock.advance("1d")
        await told.wait()
        staying.stop()
        await task
        assert [entry["what"] for entry in tasks.list()[0].trail] == ["opened", "reminded"]
