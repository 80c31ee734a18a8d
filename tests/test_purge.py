"""Purging: what runs share stays, what is needed stays, and nothing else does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

import agentflow
from agentflow import Waiting, embed, generate_content, human_task, purge, rundocs, runs, step, tasks, workflow
from agentflow.settings import settings
from agentflow.testing import FakeModel
from tests.programs import environment, notes, run_program, write_program

calls: list[str] = []


def note(name: str) -> str:
    calls.append(name)
    return name


@pytest.fixture(autouse=True)
def nothing_called():
    calls.clear()


@workflow("job")
async def job(ctx, n: int) -> str:
    text = await generate_content(f"n {n}", model="openai:m", name="ask")
    await step("keyed", note, "keyed", idempotency_key="once")
    return text


def days(count: float) -> None:
    """As if so many days had gone by."""
    settings.clock = lambda: time.time() + count * 86400


def keys(journal) -> list[str]:
    return [key for key, _ in journal.keys("")]


def test_old_runs_go_and_young_ones_stay(journal):
    with FakeModel(["A", "B"]):
        job.run_sync(1)
        job.run_sync(2)
    first = runs.list()[-1].id
    assert runs.purge(older_than="30d").runs == []
    days(31)
    assert set(runs.purge(older_than="30d", dry_run=True).runs) == {r.id for r in runs.list()} and len(runs.list()) == 2
    gone = runs.purge(older_than="30d")
    assert first in gone.runs and gone.rows > 4 and runs.list() == []
    left = {key.split("/")[0] for key in keys(journal)}
    assert left <= {"k", "c", "l", "lease", "claim"}, left
    with FakeModel(["A again"]):
        assert job.run_sync(1) == "A again"
    assert calls == ["keyed"]


def test_a_dry_run_tells_what_would_go_and_changes_nothing(journal):
    with FakeModel(["A"]):
        job.run_sync(1)
    before = keys(journal)
    told = runs.purge(older_than=0, dry_run=True)
    assert told.dry_run and len(told.runs) == 1 and "would be removed" in str(told)
    assert keys(journal) == before
    done = runs.purge(older_than=0)
    assert (done.runs, done.rows) == (told.runs, told.rows)


def test_only_the_named_status_and_workflow_go():
    @workflow("fails")
    async def fails(ctx) -> None:
        raise ValueError("no")

    with FakeModel(["A"]):
        job.run_sync(1)
    with pytest.raises(ValueError):
        fails.run_sync()
    assert runs.purge(older_than=0, workflow="nope").runs == []
    assert [r.startswith("fails") for r in runs.purge(older_than=0, status="failed").runs] == [True]
    assert [r.workflow for r in runs.list()] == ["job"]
    with pytest.raises(agentflow.UsageError, match="can be purged"):
        runs.purge(older_than=0, status="running")
    with pytest.raises(agentflow.UsageError, match="older_than"):
        runs.purge(older_than=None)


def test_waiting_and_interrupted_runs_stay_unless_they_are_named(journal):
    @workflow("asks")
    async def asks(ctx) -> None:
        await human_task("approve", data=1, timeout="2d")

    with pytest.raises(Waiting):
        asks.run_sync()
    (task,) = tasks.list()
    assert runs.purge(older_than=0).runs == [] and len(tasks.list()) == 1
    assert len(runs.purge(older_than=0, status="waiting").runs) == 1
    assert tasks.list() == [] and runs.list() == []
    with pytest.raises(agentflow.TaskNotFound):
        tasks.get(task.id)
    assert {key.split("/")[0] for key in keys(journal)} <= {"lease", "c"}


async def test_vectors_are_shared_and_stay():
    @workflow("vectors")
    async def vectors(ctx, n: int) -> list:
        return await embed(["one", "two"], model="openai:text-embedding-3-small", name=f"embed{n}")

    with FakeModel([]) as model:
        first = await vectors.run(1)
        assert len(runs.purge(older_than=0).runs) == 1
        assert await vectors.run(2) == first
    assert len(model.embedded) == 1


async def test_a_run_started_in_another_goes_with_that_one_only():
    @workflow("child")
    async def child(ctx) -> str:
        return await step("c", note, "child")

    @workflow("parent")
    async def parent(ctx) -> str:
        return await step("call", child.run)

    assert await parent.run() == "child"
    inner, outer = (next(r for r in runs.list() if r.workflow == name).id for name in ("child", "parent"))
    kept = runs.purge(older_than=0, workflow="child")
    assert kept.runs == [] and outer in kept.kept[inner]
    assert await parent.options(rerun=["call"]).run() == "child" and calls == ["child"]
    assert set(runs.purge(older_than=0).runs) == {inner, outer}


async def test_a_run_that_is_running_stays():
    gate, started = asyncio.Event(), asyncio.Event()

    @workflow("going")
    async def going(ctx) -> str:
        await step("a", note, "a")
        started.set()
        await gate.wait()
        return await step("b", note, "b")

    task = asyncio.create_task(going.run())
    await started.wait()
    for status in (None, "interrupted"):
        assert runs.purge(older_than=0, status=status).runs == []
    gate.set()
    assert await task == "b" and calls == ["a", "b"]


async def test_a_fork_needs_nothing_of_its_parent(monkeypatch):
    with FakeModel(["A"]):
        run = await job.start(1)
        made = run.fork()
        assert runs.purge(older_than=0).runs == [run.id]
        assert await made == "A" and calls == ["keyed"]


def test_a_pointer_to_a_newer_run_is_not_taken_away(journal, monkeypatch):
    @workflow("again")
    async def flow(ctx) -> str:
        return await step("s", note, "s")

    flow.run_sync()
    old = runs.list()[0].id
    document = rundocs.read(journal, old)
    document["ended_at"] -= 31 * 86400
    journal.commit(rundocs.write(document, "completed"))
    find = purge._pointers

    def and_a_newer_run_starts(journal):
        found = find(journal)
        flow.options(fresh=True).run_sync()
        return found

    monkeypatch.setattr(purge, "_pointers", and_a_newer_run_starts)
    assert runs.purge(older_than="30d").runs == [old]
    flow.run_sync()
    assert calls == ["s", "s"] and len(runs.list()) == 1


def test_a_killed_purge_is_finished_by_the_next_one(tmp_path):
    source = """
        from agentflow import purge, runs
        purge._CHUNK = 3

        @workflow("many")
        async def many(ctx):
            for i in range(10):
                await step("s", note, i)

        if "make" in sys.argv:
            many.run_sync()
        if "kill" in sys.argv:
            from agentflow.journal import Journal
            commit, count = Journal.commit, [0]
            def counted(self, *args, **kwargs):
                result = commit(self, *args, **kwargs)
                count[0] += 1
                if count[0] == 2:
                    die()
                return result
            Journal.commit = counted
        if "make" not in sys.argv:
            print(len(runs.purge(older_than=0).runs), len(runs.list()))
    """
    run_program(source, tmp_path, "make")
    run_program(source, tmp_path, "kill", expect_kill=True)
    assert run_program(source, tmp_path).out == "1 0\n"
    assert len(notes(tmp_path)) == 10


def test_a_late_commit_of_a_purged_run_is_refused(tmp_path, journal):
    source = """
        from agentflow.lease import acquire
        from agentflow.journal import Add, Journal
        from agentflow.scratch import open_journal
        from agentflow import runs

        @workflow("w")
        async def w(ctx):
            return 1

        w.run_sync()
        journal = open_journal()
        run_id = runs.list()[0].id
        lease = acquire(journal, f"lease/{run_id}", what="run", run_id=run_id)
        fence = lease.fence
        lease.release()
        print(run_id, flush=True)
        sys.stdin.readline()
        try:
            journal.commit([Add(f"s/{run_id}/late", "x")], fence=fence)
        except LeaseLost:
            print("refused")
    """
    file = write_program(source, tmp_path)
    process = subprocess.Popen(
        [sys.executable, str(file)], cwd=tmp_path, env=environment(tmp_path, None), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    run_id = process.stdout.readline().strip()
    assert runs.purge(older_than=0).runs == [run_id]
    assert runs.purge(older_than=0).runs == []
    out, _ = process.communicate("go\n", timeout=60)
    assert out == "refused\n"
    assert journal.get(f"lease/{run_id}") is not None


# -- events ------------------------------------------------------------------------------------------


@workflow("hears")
async def hears(ctx, names: list[str]) -> str:
    return await ctx.wait_for_event(names)


def left_over(journal) -> list[str]:
    return [key for key, _ in journal.keys("ev/")]


async def test_events_sent_to_a_purged_run_go_with_it_and_others_stay(journal):
    first, second = [await hears.start([name]) for name in ("a", "b")]
    for run in (first, second):
        agentflow.send_event("paid", 1, run_id=run.id)
        agentflow.send_event("sh/ipped", 2, run_id=run.id)
    agentflow.send_event("paid", 3)
    first.cancel()
    told = runs.purge(older_than=0, dry_run=True)
    assert len(left_over(journal)) == 5
    assert runs.purge(older_than=0).rows == told.rows and told.rows > 3
    assert len(left_over(journal)) == 3
    assert not any(f"/{first.id}/" in key for key in left_over(journal))
    again = await hears.start(["a"])
    assert again.id == first.id and again.status == "waiting"
    second.cancel()
    runs.purge(older_than=0)
    assert [key.split("/")[1:3] for key in left_over(journal)] == [["paid", "*"]]


async def test_an_event_that_is_sent_while_its_run_is_purged_is_refused_or_goes_too(journal, monkeypatch):
    run = await hears.start(["a"])
    run.cancel()
    agentflow.send_event("paid", 1, run_id=run.id)
    remove = purge._remove

    def late(*args):
        agentflow.send_event("paid", 2, run_id=run.id)  # after the purge has looked for events
        remove(*args)

    monkeypatch.setattr(purge, "_remove", late)
    runs.purge(older_than=0)
    assert left_over(journal) == []
    other = await hears.start(["b"])
    other.cancel()
    find = rundocs.find

    def found(journal, run_id):
        document = find(journal, run_id)
        monkeypatch.setattr(rundocs, "find", find)
        monkeypatch.setattr(purge, "_remove", remove)
        runs.purge(older_than=0)  # after the sender has looked for the run
        return document

    monkeypatch.setattr(rundocs, "find", found)
    with pytest.raises(agentflow.RunNotFound, match="purged in the meantime"):
        agentflow.send_event("paid", 3, run_id=other.id)
    assert left_over(journal) == []
