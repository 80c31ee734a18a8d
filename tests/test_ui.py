"""``agentflow ui``, the server: real requests to the real process, beside processes that run workflows."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

import agentflow
from agentflow import (
    Retry,
    Waiting,
    generate_content,
    human_task,
    ledger,
    parallel,
    rundocs,
    runs,
    step,
    tasks,
    tool,
    workflow,
)
from agentflow.scratch import open_journal
from agentflow.testing import FakeModel, ToolCall
from agentflow.ui.prompts import answer, conversation
from tests.programs import ROOT, environment, run_program, start_program, write_program
from tests.test_cli import RUN_FIELDS, STEP_FIELDS, TASK_FIELDS
from tests.ui_server import Served, opened_files, serve, until

KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCD"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the tests of this file; each test has workflows of its own."""
    folder = tmp_path_factory.mktemp("ui")
    agentflow.journal.Journal.open(folder / "journal")
    served = serve(folder, "--port", "0", shared=True)
    yield served
    assert served.stop() == 0
    assert served.err.read_text().count("Traceback") == 0, served.err.read_text()


@pytest.fixture
def ui(shared: Served) -> Served:
    """The server, and this process working in its journal."""
    agentflow.configure(path=shared.folder / "journal")
    return shared


class Line(BaseModel):
    what: str
    price: int = Field(ge=1)


class Form(BaseModel):
    amount: int = Field(ge=1)
    day: date
    lines: list[Line] = []


def waits(flow: Any, *args: Any) -> str:
    """Starts a run that waits; its task's id."""
    with pytest.raises(Waiting) as caught:
        flow.run_sync(*args)
    return str(caught.value.waiting_on[0]["id"])


def ran(flow: Any, *args: Any) -> str:
    """Runs it; the run's id."""
    return str(asyncio.run(flow.start(*args)).id)


# -- runs and steps --------------------------------------------------------------------------------


@workflow("ui-small")
async def small(ctx, n: int) -> int:
    return await step("one", lambda: n)


def test_runs_come_in_pages_newest_first_each_once_in_the_shape_of_the_command_line(ui):
    for n in range(7):
        small.run_sync(n)
    pages, before = [], ""
    while before is not None and len(pages) < 5:
        page = ui.get("runs", workflow="UI-small", limit=3, before=before)
        pages.append([run["id"] for run in page["runs"]])
        before = page["next"]
    assert [len(page) for page in pages] in ([3, 3, 1], [3, 3, 1, 0])
    assert list(itertools.chain(*pages)) == [run.id for run in runs.list(workflow="ui-small")]
    assert set(page["runs"][0] if page["runs"] else ui.get("runs")["runs"][0]) == RUN_FIELDS
    assert all(run["status"] == "completed" for run in ui.get("runs", status="completed")["runs"])
    refused = ui.ask("GET", "/api/runs?status=wating")
    assert refused.status == 422 and "running, waiting, completed" in refused.json["error"]


def test_a_page_of_runs_reads_no_more_documents_than_it_gives(monkeypatch):
    for n in range(40):
        small.run_sync(n)
    read, asked = rundocs.read, []
    monkeypatch.setattr(rundocs, "read", lambda journal, run_id: asked.append(run_id) or read(journal, run_id))
    found = list(itertools.islice(rundocs.newest(open_journal()), 5))
    assert len(asked) == 5 and [document["input"] for _, document in found] == [f'{{"n":{n}}}' for n in (39, 38, 37, 36, 35)]
    after = next(rundocs.newest(open_journal(), before=found[-1][0]))[1]
    assert after["input"] == '{"n":34}' and len(runs.list(workflow="ui-small", limit=3)) == 3
    assert len(asked) == 9


@workflow("ui-order")
async def order(ctx, name: str) -> str:
    tried = itertools.count(1)

    def charge() -> str:
        if next(tried) < 3:
            raise ConnectionError("the bank is away")
        return "charged"

    async def outer() -> str:
        return await step("charge", charge, retry=Retry(max_attempts=3, initial_delay=0.05, jitter=False))

    async def bad() -> None:
        raise ValueError("nobody is there")

    await step("outer", outer)
    try:
        await step("bad", bad)
    except ValueError:
        await step("noted", lambda: None)
    decision = await human_task("approve", assign_to="boss", title="Ship?", data={"name": name})
    return f"shipped: {decision.approved}"


def test_a_run_shows_nesting_each_attempt_failures_and_what_is_waited_for(ui):
    task = waits(order, "Ada")
    found = ui.run(tasks.get(task).run_id)
    assert RUN_FIELDS <= set(found) and found["status"] == "waiting" and found["waiting_on"][0]["id"] == task
    by_name = {each["name"]: each for each in found["steps"]}
    assert [each["name"] for each in found["steps"]] == ["outer", "charge", "bad", "noted", "Ship?"]
    assert all(STEP_FIELDS - {"output", "usage"} <= set(each) for each in found["steps"])
    charge = by_name["charge"]
    assert charge["parent_id"] == by_name["outer"]["id"] and by_name["outer"]["parent_id"] is None
    tries = charge["tries"]
    assert [(each["attempt"], each["status"]) for each in tries] == [(1, "failed"), (2, "failed"), (3, "completed")]
    assert tries[0]["error"] == "ConnectionError: the bank is away" and tries[0]["delay"] == 0.05
    # Each attempt has its own time, after the one before and its pause.
    times = [moment for each in tries for moment in (each["started_at"], each["ended_at"])]
    assert times == sorted(times) and times[0] == charge["started_at"] and times[-1] == charge["completed_at"]
    assert len(set(times)) == 6
    assert by_name["bad"]["status"] == "failed" and by_name["bad"]["error"] == "ValueError: nobody is there"
    ship = by_name["Ship?"]
    assert (ship["kind"], ship["status"], ship["task"], ship["completed_at"]) == ("human", "waiting", task, None)
    assert ship["tries"][0]["status"] == "waiting" and ship["tries"][0]["started_at"] and not ship["tries"][0]["ended_at"]
    assert found["tasks"][0]["id"] == task and found["texts"]["input"]["text"] == "Ada"


def test_after_an_answer_the_step_is_waited_and_what_was_recorded_before_is_replayed(ui):
    task = waits(order, "Bob")
    run_id = tasks.get(task).run_id
    assert not any(each["replayed"] for each in ui.run(run_id)["steps"])
    assert ui.decide("approve", id=task, by="grace").status == 200
    assert order.run_sync("Bob") == "shipped: True"
    found = ui.steps(run_id)
    (waited,) = found["Ship?"]["tries"]
    assert found["Ship?"]["task"] == task and waited["status"] == "waited"
    assert waited["started_at"] == tasks.get(task).created_at.isoformat() < found["Ship?"]["started_at"]  # since it was opened
    assert found["charge"]["replayed"] and not found["Ship?"]["replayed"] and ui.run(run_id)["executions"] == 2


@workflow("ui-pending")
async def pending(ctx) -> None:
    async def outer() -> None:
        await step("within", lambda: 1)
        await human_task("approve", title="Now?")

    await parallel([step("outer", outer), ctx.sleep("1h"), ctx.wait_for_event("ui-never", timeout="2h")])


def test_sleeps_events_and_steps_inside_which_somebody_is_waited_for_are_waiting(ui):
    found = ui.run(ran(pending))
    assert found["status"] == "waiting" and {wait["kind"] for wait in found["waiting_on"]} == {"task", "sleep", "event"}
    rows = {each["name"]: each for each in found["steps"]}
    kinds = {each["kind"]: each["status"] for each in found["steps"] if each["name"] != "within"}
    assert kinds == {"step": "waiting", "human": "waiting", "sleep": "waiting", "event": "waiting"}
    assert rows["within"]["status"] == "completed" and rows["within"]["parent_id"] == rows["outer"]["id"]
    assert rows["Now?"]["parent_id"] == rows["outer"]["id"] and rows["Now?"]["task"] == found["tasks"][0]["id"]


@workflow("ui-undone")
async def undone(ctx, n: int) -> None:
    await step("charge", lambda: "paid", compensate=lambda result: None)
    await step("keyed", lambda: n, idempotency_key="ui-the-one")

    def fail() -> None:
        raise ValueError("no stock")

    await step("ship", fail)


def test_what_was_undone_says_so_and_what_a_key_found_in_another_run_names_it(ui):
    first, second = ran(undone, 1), ran(undone, 2)
    rows = ui.steps(first)
    assert rows["charge"]["status"] == "undone" and rows["ship"]["status"] == "failed"
    assert any(each["kind"] == "compensation" for each in rows.values())
    assert rows["keyed"]["reused_from"] is None
    assert ui.steps(second)["keyed"]["reused_from"] == first and ui.step(second, "keyed")["output"] == 1


@workflow("ui-child")
async def child(ctx, n: int) -> int:
    return await step("inner", lambda: n)


@workflow("ui-parent")
async def parent(ctx, n: int) -> int:
    await step("first", lambda: n)
    return await child.run(n)


def test_a_fork_names_the_run_it_took_steps_from_and_a_run_started_inside_is_a_row(ui):
    parent.run_sync(1)
    run = runs.list(workflow="ui-parent")[0]
    rows = ui.run(run.id)["steps"]
    inner = runs.list(workflow="ui-child")[0].id
    assert [(row["kind"], row["name"], row.get("run")) for row in rows] == [("step", "first", None), ("run", "ui-child", inner)]
    fork = run.fork(results={})
    found = ui.steps(fork.id)["first"]
    assert found["reused_from"] == run.id and not found["replayed"] and ui.run(fork.id)["parent"] == run.id
    detail = ui.step(fork.id, "first")
    assert detail["output"] == 1


def test_a_step_shows_its_output_what_it_was_given_and_that_there_is_none_of_another_id(ui):
    run_id = ran(small, 5)
    found = ui.step(run_id, "one")
    assert STEP_FIELDS <= set(found) and found["output"] == 5 and found["given"] == {"free": [5]} and found["calls"] == []
    for target in (f"step?run={run_id}&id=nothing", "run?id=nothing", f"value?run={run_id}&name=nothing", "task?id=t-nothing"):
        came = ui.ask("GET", f"/api/{target}")
        assert came.status == 404 and "nothing" in came.json["error"], target


@workflow("ui-model")
async def asks_model(ctx, name: str) -> str:
    return await generate_content(f"Greet {name}.", system="Be brief.", data={"n": 1}, model="openai:priced", name="greet")


def test_a_model_call_shows_prompt_reply_tokens_cost_and_what_went_over_the_wire(ui):
    ledger.set_price("priced", 1, 10)
    with FakeModel(["Hello, Ada!"]):
        asks_model.run_sync("Ada")
    run_id = runs.list(workflow="ui-model")[0].id
    found = ui.step(run_id, "greet")
    (call,) = found["calls"]
    assert [message["role"] for message in call["prompt"]] == ["system", "user"]
    assert call["prompt"][0]["text"] == "Be brief." and call["prompt"][1]["text"].startswith("Greet Ada.\n\n<data>")
    assert call["reply"]["text"] == "Hello, Ada!" and found["output"] == "Hello, Ada!"
    assert found["usage"] == call["usage"] and call["usage"]["input_tokens"] > 0 and call["usage"]["output_tokens"] > 0
    assert found["cost"] == call["cost"] == pytest.approx(call["usage"]["input_tokens"] / 1e6 + call["usage"]["output_tokens"] / 1e5)
    assert (found["model"], call["provider"], call["request_id"]) == ("priced", "openai", "req_fake_1")
    assert json.loads(call["texts"]["request"]["text"])["instructions"] == "Be brief."
    assert json.loads(call["texts"]["body"]["text"])["object"] == "response"
    costs = ui.get("costs", by="workflow")
    line = next(line for line in costs["lines"] if line["workflow"] == "ui-model")
    assert line["calls"] == 1 and line["paid"] == found["cost"] and costs["total"]["calls"] >= 1
    assert ui.ask("GET", "/api/costs?by=moon").status == 422


@tool
def look_up(order: int) -> str:
    """Find an order."""
    return "paid"


@pytest.mark.parametrize("model", ["openai:gpt-5-mini", "openai-chat:gpt-5-mini", "anthropic:claude-haiku-4-5"])
def test_a_conversation_with_tools_reads_the_same_for_all_apis(model):
    @workflow(f"talk-{model}")
    async def talk(ctx) -> str:
        return await generate_content("Is order 7 paid?", system="Be brief.", model=model, tools=[look_up])

    with FakeModel([["Let me see.", ToolCall("look_up", order=7)], "It is."]) as fake:
        talk.run_sync()
    first, second = fake.calls
    shown = [(message["role"], message["text"]) for message in conversation(second["body"])]
    assert shown[:2] == [("system", "Be brief."), ("user", "Is order 7 paid?")]
    told = "\n".join(text for _, text in shown[2:])
    assert "Let me see." in told and "→ look_up(" in told and '"order"' in told and "paid" in told.splitlines()[-1]
    assert "Let me see." in answer(first["reply"]) and "→ look_up(" in answer(first["reply"])
    assert answer(second["reply"]) == "It is."


# -- what is in flight -----------------------------------------------------------------------------

GATED = """
    @workflow("ui-gated")
    async def gated(ctx, n: int):
        await step("before", lambda: 1)
        async def long():
            await step("inside", lambda: 2)
            while not (HERE / "gate").exists():
                await asyncio.sleep(0.01)
        await step("long", long)
        await step("after", lambda: 3)

    if __name__ == "__main__":
        gated.run_sync(1)
"""


def events(ui: Served, run_id: str) -> Iterator[str]:
    """The names of the server's events, as they come."""
    con = http.client.HTTPConnection("127.0.0.1", ui.port, timeout=60)
    con.request("GET", f"/api/events?run={run_id}", headers={"Authorization": f"Bearer {ui.token}"})
    came = con.getresponse()
    assert came.headers["Content-Type"].startswith("text/event-stream")
    try:
        while line := came.readline().decode():
            if line.startswith("event: "):
                yield line.removeprefix("event: ").strip()
    finally:
        con.close()


def test_a_step_that_runs_in_another_process_is_shown_growing_and_the_stream_tells_when_it_ends(ui):
    process = start_program(GATED, ui.folder)
    run_id = until(lambda: next((run.id for run in runs.list(workflow="ui-gated")), None))
    found = until(lambda: (steps := ui.steps(run_id)).get("long", {}).get("status") == "running" and "inside" in steps and steps)
    long = found["long"]
    assert long["started_at"] and long["completed_at"] is None and long["tries"][0]["ended_at"] is None
    assert found["inside"]["parent_id"] == long["id"] and found["before"]["status"] == "completed"
    assert ui.step(run_id, "long")["status"] == "running"
    told = events(ui, run_id)
    assert next(told) == "change"  # how it is now
    (ui.folder / "gate").touch()
    assert "change" in itertools.islice(told, 3)
    told.close()
    process.communicate(timeout=60)
    assert process.returncode == 0
    ended = ui.steps(run_id)
    assert {each["status"] for each in ended.values()} == {"completed"} and ended["after"]
    noted, recorded = (datetime.fromisoformat(each["started_at"]) for each in (long, ended["long"]))
    assert abs(noted - recorded) < timedelta(seconds=5)


def test_a_step_whose_start_alone_was_noted_wakes_the_stream(ui, journal_path):
    run_id, journal = ran(small, 77), open_journal()
    told = events(ui, run_id)
    assert next(told) == "change" and next(told) == "look"  # nobody commits
    version = journal.version()
    journal.mark(run_id, "{}")
    assert next(told) == "change" and journal.version() == version
    told.close()
    journal.clear_marks(run_id)


def test_a_killed_process_leaves_its_step_in_doubt_and_the_run_interrupted(ui):
    source = """
    @workflow("ui-killed")
    async def killed(ctx):
        await step("fine", lambda: 1)
        await step("dies", die)

    killed.run_sync()
    """
    run_program(source, ui.folder, expect_kill=True, name="killed.py")
    run = runs.list(workflow="ui-killed")[0]
    found = ui.run(run.id)
    assert found["status"] == "interrupted"
    assert [(each["name"], each["status"]) for each in found["steps"]] == [("fine", "completed"), ("dies", "in doubt")]


def test_a_step_between_two_attempts_is_retrying_with_its_failed_ones(ui):
    source = """
    @workflow("ui-retrying")
    async def retrying(ctx):
        def bad():
            raise OSError("no luck")
        def good():
            if current_step().attempt == 1:
                raise OSError("no luck yet")
        patient = Retry(max_attempts=2, initial_delay=600, jitter=False, max_delay=600)
        await parallel([step("bad", bad, retry=patient), step("good", good, retry=patient)])

    retrying.run_sync()
    """
    process = start_program(write_program(source, ui.folder, "retrying.py"), ui.folder)
    run_id = until(lambda: next((run.id for run in runs.list(workflow="ui-retrying")), None))

    def both() -> Any:
        steps = ui.steps(run_id)
        return {"bad", "good"} <= set(steps) and {each["status"] for each in steps.values()} == {"retrying"} and steps

    found = until(both)["bad"]
    assert [each["status"] for each in found["tries"]] == ["failed"] and found["tries"][0]["delay"] == 600
    process.kill()
    process.communicate(timeout=60)
    assert until(lambda: ui.run(run_id)["status"] == "interrupted")
    # The next attempt, by another process, did not begin when the pause would have been over.
    run_program(ui.folder / "retrying.py", ui.folder, expect_failure=True)
    for name, status in (("bad", "failed"), ("good", "completed")):
        first, second = ui.steps(run_id)[name]["tries"]
        assert second["status"] == status and first["ended_at"] < second["started_at"] <= second["ended_at"]


def test_reads_do_not_wait_for_whoever_writes(ui):
    run_id = ran(small, 6)
    con = sqlite3.connect(ui.folder / "journal" / "cache.db", isolation_level=None)
    con.execute("BEGIN IMMEDIATE")
    try:
        assert ui.get("runs", workflow="ui-small")["runs"] and ui.steps(run_id)["one"]["status"] == "completed" and ui.get("tasks")["open"] >= 0
    finally:
        con.execute("ROLLBACK")
        con.close()


# -- deciding --------------------------------------------------------------------------------------


@workflow("ui-ask")
async def ask(ctx, n: int) -> Any:
    return await human_task("approve", assign_to=["ada", "grace"], title=f"Number {n}?", data={"n": n, "big": 2**63 + 1})


@workflow("ui-fill")
async def fill(ctx, n: int) -> Any:
    return await human_task("input", assign_to="ada", schema=Form, data=f"Receipt {n}")


def test_tasks_are_listed_decided_once_and_a_later_decision_is_refused_with_who(ui):
    task = waits(ask, 1)
    found = next(each for each in ui.get("tasks", **{"for": "grace"})["tasks"] if each["id"] == task)
    assert TASK_FIELDS <= set(found) and found["status"] == "open" and found["command"] == f"agentflow tasks approve {task}"
    assert '"big": 9223372036854775809' in found["texts"]["data"]["text"]  # not as a browser would round it
    assert not any(each["id"] == task for each in ui.get("tasks", **{"for": "bob"})["tasks"])
    first = ui.decide("reject", id=task, by=" ada ", comment="too dear")
    assert first.status == 200 and first.json["task"]["status"] == "rejected"
    assert (first.json["task"]["decision"]["by"], first.json["task"]["decision"]["comment"]) == ("ada", "too dear")
    later = ui.decide("approve", id=task, by="grace")
    assert later.status == 409 and "was rejected already, by ada" in later.json["error"] and later.json["task"]["status"] == "rejected"
    assert not any(each["id"] == task for each in ui.get("tasks")["tasks"])
    assert ui.get("tasks", status="all", run=tasks.get(task).run_id)["tasks"][0]["decision"]["by"] == "ada"
    assert not ask.run_sync(1).approved


def test_after_a_decision_it_is_said_who_goes_on_with_the_run(ui):
    task = waits(ask, 2)
    said = ui.decide("approve", id=task, by="ada").json["goes_on"]
    assert not said["running"] and said["workers"] == []
    assert said["command"] == f"agentflow runs resume {tasks.get(task).run_id} --module app:flow"


def test_an_answer_is_checked_where_it_is_given_and_the_field_is_named(ui):
    task = waits(fill, 1)
    bad = ui.decide("answer", id=task, data={"amount": "many", "day": "2026-01-31"})
    assert bad.status == 422 and "answer.amount='many' has to be a whole number" in bad.json["error"]
    inner = {"amount": 3, "day": "2026-01-31", "lines": [{"what": "tea", "price": 0}]}
    assert "answer.lines[0].price=0 has to be at least 1" in ui.decide("answer", id=task, data=inner).json["error"]
    assert "answer lacks amount, day" in ui.decide("answer", id=task, data={}).json["error"]
    assert "asks for data" in ui.decide("approve", id=task).json["error"]
    assert tasks.get(task).status == "open"
    inner["lines"][0]["price"] = 2
    good = ui.decide("answer", id=task, data=inner, by="ada")
    assert good.status == 200 and good.json["task"]["answer"] == inner
    assert fill.run_sync(1) == Form(amount=3, day=date(2026, 1, 31), lines=[Line(what="tea", price=2)])


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"by": "ada"}', b'{"id": 7}'])
def test_a_body_that_is_no_decision_is_refused(ui, body):
    came = ui.ask("POST", "/api/task/approve", body)
    assert came.status == 422 and "the body" in came.json["error"]


# -- secrets and sizes -----------------------------------------------------------------------------


@workflow("ui-secret")
async def secret(ctx, given: str) -> Any:
    await step(f"name {KEY}", lambda: {"api_key": "hunter2222", "text": f"out {KEY}"})
    await generate_content(f"Prompt {KEY}", model="openai:priced")

    def fail() -> None:
        raise ValueError(f"because of {KEY}")

    try:
        await step("fails", fail, retry={"max_attempts": 2, "initial_delay": 0}, idempotency_key=f"k {KEY}")
    except ValueError:
        await step("after", lambda: None)
    return await human_task("approve", title=f"May {KEY}?", data={"password": "hunter2222", "text": KEY})


def test_no_key_leaves_the_journal_by_any_route(ui):
    with FakeModel([f"Reply {KEY}"]):
        task = waits(secret, f"input {KEY}")
    run_id = tasks.get(task).run_id
    targets = [f"/api/run?id={run_id}", "/api/runs", "/api/tasks", f"/api/task?id={task}", "/api/costs?by=step"]
    targets += [f"/api/value?run={run_id}&name=input", f"/api/value?task={task}"]
    for each in ui.run(run_id)["steps"]:
        targets.append(f"/api/step?run={run_id}&id={each['id']}")
    call = next(each["id"] for each in ui.run(run_id)["steps"] if each["kind"] == "ai")
    targets += [f"/api/value?run={run_id}&step={call}&name=calls.0.{name}" for name in ("request", "body", "reply", "prompt.0")]
    texts = [ui.ask("GET", target) for target in targets]
    assert [came.status for came in texts] == [200] * len(texts)
    texts += [ui.decide("approve", id=task, by=f"by {KEY}", comment=f"comment {KEY}"), ui.decide("approve", id=task)]
    for came in texts:
        assert KEY not in came.text and KEY[8:30] not in came.text and "hunter2222" not in came.text
    assert "[redacted:" in "".join(came.text for came in texts[:3])
    assert "[redacted:" in texts[-1].json["error"] and texts[-1].status == 409


@workflow("ui-large")
async def large(ctx) -> str:
    return await step("load", lambda: "x" * 32_750 + f" {KEY} " + "y" * 100_000)


def test_a_large_value_is_cut_with_its_size_named_and_comes_in_full_on_demand(ui):
    large.run_sync()
    run_id = runs.list(workflow="ui-large")[0].id
    found = ui.step(run_id, "load")
    text = found["texts"]["output"]
    assert found["output"] is None and text["cut"] and len(text["text"]) == 32_768 and text["size"] > 130_000
    assert "sk-proj" not in text["text"] and "[redacted" in text["text"]  # masked before it was cut
    whole = ui.ask("GET", f"/api/value?run={run_id}&step={found['id']}&name=output")
    assert len(whole.text) == text["size"] and whole.text.endswith("yyy") and KEY not in whole.text
    assert whole.headers["Content-Type"].startswith("text/plain")


# -- who may ask -----------------------------------------------------------------------------------


def everywhere() -> list[str]:
    return ["/", "/static/app.js", "/api/about", "/api/runs", "/api/events", "/nothing"]


@pytest.mark.parametrize("target", everywhere())
def test_without_the_token_nothing_is_answered(ui, target):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"agentflow-ui-{ui.port}=wrong"}, {"Authorization": "Bearer é"}):
        assert ui.ask("GET", target, trusted=False, **headers).status == 403
    assert ui.ask("GET", f"{target}?token=wrong", trusted=False).status == 403


def test_the_address_gives_a_cookie_that_scripts_and_other_sites_cannot_use(ui):
    page = ui.ask("GET", f"/?token={ui.token}", trusted=False)
    cookie = page.headers["Set-Cookie"]
    assert page.status == 200 and "<title>agentflow</title>" in page.text
    assert cookie == f"agentflow-ui-{ui.port}={ui.token}; Path=/; HttpOnly; SameSite=Strict"
    assert ui.ask("GET", "/api/about", trusted=False, Cookie=cookie.partition(";")[0]).status == 200
    # The token in the address opens the page, and nothing else.
    assert ui.ask("GET", f"/api/about?token={ui.token}", trusted=False).status == 403


@pytest.mark.parametrize("target", everywhere())
@pytest.mark.parametrize("trusted", [True, False])
def test_every_answer_carries_the_headers_that_keep_a_browser_from_mischief(ui, target, trusted):
    if target == "/api/events" and trusted:
        return  # it has no end
    headers = ui.ask("GET", target, trusted=trusted).headers
    policy = headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "form-action 'none'"):
        assert part in policy
    assert "unsafe" not in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store" and headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.5", "", "[::1"])
def test_a_name_that_is_not_ours_is_refused_with_the_right_token_too(ui, host):
    assert ui.ask("GET", "/api/about", Host=host).status == 421
    assert ui.ask("GET", f"/?token={ui.token}", Host=host).status == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1", "[::1]:8765", "LOCALHOST:1"])
def test_names_of_this_machine_are_taken_whatever_the_port_that_was_forwarded(ui, host):
    assert ui.ask("GET", "/api/about", Host=host).status == 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({}, 403),  # a browser always names the origin of a POST
        ({"Origin": "http://127.0.0.1:{port}", "Sec_Fetch_Site": "cross-site"}, 403),
        ({"Origin": "http://127.0.0.1:{port}", "Sec_Fetch_Site": "same-site"}, 403),
        ({"Origin": "http://127.0.0.1:{port}", "Content_Type": "text/plain"}, 415),
        ({"Origin": "http://127.0.0.1:{port}", "Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://127.0.0.1:{port}", "Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_only_the_page_itself_may_decide(ui, headers, status):
    task = waits(ask, 1000 + abs(hash(str(headers))) % 10**6)
    sent = {name: value.format(port=ui.port) for name, value in headers.items()}
    cookie = f"agentflow-ui-{ui.port}={ui.token}"
    came = ui.ask("POST", "/api/task/approve", {"id": task}, trusted=False, Cookie=cookie, Host=f"127.0.0.1:{ui.port}", **sent)
    assert came.status == status
    assert tasks.get(task).status == ("approved" if status == 200 else "open")


def test_other_pages_cannot_read_and_other_methods_and_large_bodies_are_refused(ui):
    for site in ("cross-site", "same-site"):
        assert ui.ask("GET", "/api/about", Sec_Fetch_Site=site).status == 403
        assert ui.ask("GET", "/static/app.js", Sec_Fetch_Site=site).status == 403
    assert ui.ask("GET", f"/?token={ui.token}", trusted=False, Sec_Fetch_Site="cross-site").status == 200  # a link to it
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert ui.ask(method, "/api/task/approve").status == 405
    assert ui.ask("GET", "/api/task/approve").status == 405
    assert ui.ask("POST", "/api/task/approve", b" " * 4_000_001).status == 413
    for target in ("/static/../guard.py", "/static/%2e%2e/guard.py", "/static//etc/passwd", "/static/"):
        assert ui.ask("GET", target).status == 404


# -- the command -----------------------------------------------------------------------------------


def test_the_command_needs_a_journal_and_makes_none(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "agentflow", "ui"], env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 4 and done.stdout == "" and "no journal in" in done.stderr
    assert not (tmp_path / "journal").exists()


def test_the_address_alone_is_on_stdout(tmp_path):
    small.run_sync(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "agentflow", "ui", "--port", "0"],
        cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    address = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert address.startswith("http://127.0.0.1:") and "/?token=" in address and rest == ""
    assert process.returncode == 0 and str(tmp_path / "journal") in err


def test_a_journal_that_is_gone_is_said_to_be_and_not_made_anew(tmp_path):
    small.run_sync(1)
    open_journal().close()
    served = serve(tmp_path, "--port", "0")
    (tmp_path / "journal").rename(tmp_path / "moved")
    came = served.ask("GET", "/api/runs")
    assert came.status == 503 and "not there any more" in came.json["error"] and not (tmp_path / "journal").exists()
    assert served.stop(signal.SIGTERM) == 0


def test_a_taken_port_is_passed_over_a_named_one_is_not_and_ctrl_c_ends_an_open_stream(tmp_path):
    small.run_sync(1)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8765))
            taken.listen()
        except OSError:  # somebody else has it, which serves as well
            assert taken.fileno() >= 0
        first = serve(tmp_path)
        assert 8765 < first.port < 8815
        with pytest.raises(AssertionError, match=f"port {first.port} of 127.0.0.1 cannot be had"):
            serve(tmp_path, "--port", str(first.port))
    second = serve(tmp_path, "--host", "localhost")
    assert second.port != first.port and second.url.startswith("http://localhost:") and second.token != first.token
    assert first.ask("GET", "/api/about", trusted=False, Authorization=f"Bearer {second.token}").status == 403
    told = events(first, "x")
    assert next(told) == "change"
    assert first.stop() == 0 and second.stop(signal.SIGTERM) == 0
    (line,) = first.err.read_text().splitlines()  # nothing had to be cut off
    assert first.token not in line and "Ctrl-C ends it" in line
    assert list(told) in ([], ["look"])


def test_beyond_this_machine_it_warns_and_addresses_are_taken_but_no_strange_names(tmp_path):
    small.run_sync(1)
    served = serve(tmp_path, "--host", "0.0.0.0", "--port", "0")
    assert "Warning" in served.err.read_text() and f"ssh -L {served.port}" in served.err.read_text()
    assert served.ask("GET", "/api/about", Host="192.168.1.5:80").status == 200
    assert served.ask("GET", "/api/about", Host="192.168.1.5:80", trusted=False).status == 403
    assert served.ask("GET", "/api/about", Host="evil.example").status == 421
    assert served.stop() == 0


def test_the_browser_is_opened_without_the_token_among_its_arguments(tmp_path):
    small.run_sync(1)
    opened, script = tmp_path / "opened", tmp_path / "browser"
    script.write_text(f'#!/bin/sh\nprintf "%s" "$1" > {opened}.part\nmv {opened}.part {opened}\n')
    script.chmod(0o755)
    served = serve(tmp_path, "--open", "--port", "0", env={"BROWSER": f"{script} %s"})
    address = until(lambda: opened.exists() and opened.read_text())
    assert served.token not in address and address.startswith("file://")
    file = Path(address.removeprefix("file://"))
    assert served.url in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert opened_files(tmp_path / "journal") == [file.name]
    assert served.stop() == 0 and opened_files(tmp_path / "journal") == []


def test_the_page_needs_nothing_that_the_package_does_not_hold():
    static = Path(agentflow.__file__).parent / "ui" / "static"
    texts = {file.name: file.read_text() for file in static.iterdir()}
    assert {"index.html", "app.css", "app.js"} <= set(texts)
    for name, text in texts.items():
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text, name
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
            assert sink not in text, f"{name}: {sink}"
        for line in text.splitlines():
            if line.startswith("import ") and " from " in line:
                assert line.rpartition('"./')[2].removesuffix('";') in texts, line
    assert os.path.exists(static / "icon.svg")
