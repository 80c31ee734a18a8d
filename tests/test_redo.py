"""Retry from a step, fork, results that are given: what is done anew is exactly what was asked for."""

from __future__ import annotations

import asyncio
import os
from decimal import Decimal

import pytest
from pydantic import BaseModel

import agentflow
from agentflow import Decision, Waiting, generate_content, human_task, ledger, parallel, runs, step, tasks, workflow
from agentflow.sync import step as plain_step
from agentflow.sync import workflow as plain_workflow
from agentflow.testing import FakeModel

calls: list[str] = []


@pytest.fixture(autouse=True)
def nothing_called():
    calls.clear()


def note(name: str, result=None):
    calls.append(name)
    return name if result is None else result


@workflow("line")
async def line(ctx, word: str, times: int = 1) -> str:
    a = await step("a", note, "a", f"a:{word}")
    b = await step("b", note, "b", f"{a}/b")
    return await step("c", note, "c", f"{b}/c")


async def test_retry_from_a_step_does_it_and_what_follows_anew():
    run = await line.start("x")
    calls.clear()
    assert await run.retry(from_step="b") == "a:x/b/c"
    assert calls == ["b", "c"]
    assert runs.get(run.id).status == "completed"
    calls.clear()
    assert await line.run("x") == "a:x/b/c" and calls == []


async def test_a_retried_run_is_interrupted_until_somebody_goes_on_with_it():
    run = (await line.start("x")).retry(from_step="c")
    stored = runs.get(run.id)
    assert (run.status, stored.status, stored.output, stored.completed_at) == ("interrupted", "interrupted", None, None)
    assert [r.id for r in runs.list(status="interrupted")] == [run.id] and runs.list(status="completed") == []
    calls.clear()
    assert await line.run("x") == "a:x/b/c" and calls == ["c"]


async def test_retry_by_id_takes_that_one_of_several_steps_of_one_name():
    @workflow("loop")
    async def loop(ctx) -> list[int]:
        return [await step("s", note, f"s{i}", i) for i in range(4)]

    run = await loop.start()
    third = run.steps[2].id
    calls.clear()
    assert await run.retry(from_step=third) == [0, 1, 2, 3]
    assert calls == ["s2", "s3"]


async def test_branches_that_had_started_by_then_are_kept():
    @workflow("fan")
    async def fan(ctx) -> str:
        async def branch(name: str) -> str:
            first = await step(f"{name}1", note, f"{name}1")
            return await step(f"{name}2", note, f"{first}{name}2")

        gate = asyncio.Event()

        async def slow() -> str:
            first = await step("slow1", note, "slow1")
            gate.set()
            return first

        async def fast() -> str:
            return await step("fast1", note, "fast1")

        return await step("join", note, "".join(await parallel([slow(), fast()])))

    run = await fan.start()
    calls.clear()
    await run.retry(from_step="slow1")
    assert calls == ["slow1", "slow1fast1"]


async def test_a_step_that_an_edit_made_run_later_stays_before_the_one_behind_it():
    version = 1

    def make():
        @workflow("edited")
        async def edited(ctx) -> str:
            await step("draft", note, f"draft{version}")
            return await step("send", note, "send")

        return edited

    await make().run()
    version = 2
    run = await make().start()
    assert calls == ["draft1", "send", "draft2"]
    calls.clear()
    await run.retry(from_step="send")
    assert calls == ["send"]


async def test_steps_inside_others_are_gone_back_to_through_the_outer_one():
    @workflow("nested")
    async def nested(ctx) -> str:
        async def outer() -> str:
            await step("one", note, "one")
            await step("two", note, "two")
            return note("outer")

        await step("outer", outer)
        return await step("after", note, "after")

    run = await nested.start()
    calls.clear()
    await run.retry(from_step="two")
    assert calls == ["two", "outer", "after"]
    calls.clear()
    await run.retry(from_step="outer")
    assert calls == ["one", "two", "outer", "after"]


async def test_retry_without_a_step_tries_what_failed_again(monkeypatch):
    monkeypatch.setenv("BROKEN", "yes")

    @workflow("breaks")
    async def breaks(ctx) -> str:
        await step("a", note, "a")

        def fails() -> str:
            note("b")
            if os.environ.get("BROKEN"):
                raise ValueError("no")
            return "b"

        return await step("b", fails)

    run = await breaks.start()
    assert run.status == "failed" and calls == ["a", "b"]
    monkeypatch.delenv("BROKEN")
    assert run.retry().error is None
    assert await run == "b" and calls == ["a", "b", "b"]
    with pytest.raises(agentflow.UsageError, match="name the step"):
        runs.get(run.id).retry()


async def test_retry_of_a_compensated_run_does_what_was_undone_again():
    broken = True

    @workflow("shop")
    async def shop(ctx) -> str:
        await step("charge", note, "charge", compensate=lambda charged: note("refund"))

        def ship() -> str:
            note("ship")
            if broken:
                raise ValueError("no")
            return "shipped"

        return await step("ship", ship)

    run = await shop.start()
    assert calls == ["charge", "ship", "refund"]
    broken = False
    calls.clear()
    assert await run.retry(from_step="ship") == "shipped"
    assert calls == ["charge", "ship"]


async def test_what_a_key_names_is_not_done_again_unless_it_is_asked_for_itself():
    @workflow("keyed")
    async def keyed(ctx) -> str:
        await step("a", note, "a")
        return await step("pay", note, "pay", idempotency_key="pay-1")

    run = await keyed.start()
    calls.clear()
    await run.retry(from_step="a")
    assert calls == ["a"]
    calls.clear()
    await run.retry(from_step="pay")
    assert calls == ["pay"]


async def test_a_wrong_step_names_those_there_are_and_changes_nothing():
    run = await line.start("x")
    for act in (run.retry, run.fork):
        with pytest.raises(agentflow.UsageError, match="It has: 'a', 'b', 'c'"):
            act(from_step="d")
    assert runs.get(run.id).status == "completed" and len(runs.list()) == 1


async def test_a_retried_model_call_is_asked_and_paid_anew_and_the_earlier_ones_are_not():
    @workflow("ask")
    async def ask(ctx) -> str:
        one = await generate_content("one", model="openai:m", name="one")
        return await generate_content(f"two {one}", model="openai:m", name="two")

    with FakeModel(["A", "B", "C"]) as model:
        run = await ask.start()
        assert await run.retry(from_step="two") == "C"
    assert len(model.calls) == 3


# -- given results -----------------------------------------------------------------------------------


async def test_a_step_whose_result_is_given_is_not_run_and_what_depends_on_it_is():
    run = await line.start("x")
    calls.clear()
    assert await run.retry(results={"b": "given"}) == "given/c"
    assert calls == ["c"]
    calls.clear()
    assert await line.run("x") == "given/c" and calls == []
    assert await line.options(rerun=["b"]).run("x") == "a:x/b/c" and calls == ["b"]


async def test_that_a_result_is_given_is_said_once(caplog):
    run = await line.start("x")
    caplog.clear()
    with caplog.at_level("INFO", logger="agentflow"):
        await run.retry(results={"b": "given"})
    said = [message.partition(" · ")[2] for message in caplog.messages if " · b" in message]
    assert said == ["b ran again: asked for by rerun", "b: not run; its result is given"]


async def test_a_failing_step_is_skipped_with_a_result():
    @workflow("stuck")
    async def stuck(ctx) -> str:
        def fails() -> str:
            raise ValueError("no")

        return await step("end", note, await step("look", fails))

    run = await stuck.start()
    assert run.status == "failed"
    assert await run.retry(results={"look": "seen"}) == "seen"


async def test_results_of_models_and_people_are_given_in_their_own_form():
    class Form(BaseModel):
        amount: int

    @workflow("mixed")
    async def mixed(ctx) -> tuple:
        text = await generate_content("Hi", model="openai:m", name="text")
        form = await generate_content("Form", model="openai:m", name="form", output_type=Form)
        boss = await human_task("approve", title="boss", data=text)
        filled = await human_task("input", title="filled", schema=Form)
        return text, form, boss.approved, boss.by, filled

    with FakeModel(["hello", '{"amount": 1}']), pytest.raises(Waiting) as caught:
        await mixed.run()
    (task,) = tasks.list()
    run = runs.get(caught.value.run_id)
    given = {
        "text": "hi there", "form": Form(amount=2), "boss": Decision(True, by="kim"), "filled": Form(amount=3),
    }  # fmt: skip
    with FakeModel([]):
        assert await run.retry(results=given) == ("hi there", Form(amount=2), True, "kim", Form(amount=3))
    assert tasks.get(task.id).status == "withdrawn"


async def test_a_result_for_a_step_that_is_never_asked_for_is_said(said):
    run = await line.start("x")
    await run.fork(results={"z": 1})
    assert "no step of the name or id 'z'" in said()


async def test_a_skipped_step_is_not_undone():
    @workflow("undo-skip")
    async def flow(ctx) -> None:
        await step("charge", note, "charge", compensate=lambda charged: note("refund"))

        def ship() -> None:
            raise ValueError("no")

        await step("ship", ship)

    first = await flow.start()
    calls.clear()
    with pytest.raises(ValueError):
        await first.retry(results={"charge": "by hand"})
    assert calls == []


# -- fork --------------------------------------------------------------------------------------------


async def test_a_fork_takes_the_records_before_the_step_and_leaves_its_parent_alone():
    run = await line.start("x")
    calls.clear()
    made = run.fork(from_step="b", results={"b": "other"})
    assert (made.parent, made.forked_at, made.status) == (run.id, "b", "interrupted")
    assert await made == "other/c" and calls == ["c"]
    assert runs.get(run.id).output == "a:x/b/c" and runs.get(made.id).output == "other/c"
    calls.clear()
    assert await line.run("x") == "a:x/b/c" and calls == []


async def test_a_fork_with_other_input_reuses_what_is_given_the_same():
    run = await line.start("x")
    calls.clear()
    made = run.fork(input={"word": "y"})
    assert made.input == "y"
    assert await made == "a:y/b/c"
    assert calls == ["a", "b", "c"]
    assert made.id != run.id and runs.get(made.id).parent == run.id
    calls.clear()
    assert await run.fork(input={"times": 2}) == "a:x/b/c"
    assert calls == []


async def test_the_input_of_a_fork_is_checked_when_it_is_given():
    run = await line.start("x")
    for wrong in ({"times": "many"}, {"nope": 1}, 3):
        with pytest.raises(agentflow.UsageError):
            run.fork(input=wrong)
    assert len(runs.list()) == 1


async def test_a_fork_costs_only_what_it_asks_anew():
    ledger.set_price("m", 1000, 1000)

    @workflow("paid")
    async def paid(ctx) -> str:
        one = await generate_content("one", model="openai:m", name="one")
        return await generate_content(f"two {one}", model="openai:m", name="two")

    with FakeModel(["A", "B", "C"]) as model:
        run = await paid.start()
        made = run.fork(from_step="two")
        assert made.cost == 0
        assert await made == "C"
    assert len(model.calls) == 3
    one, two = runs.get(run.id).steps
    after = runs.get(made.id)
    assert after.cost == after.steps[1].cost and after.saved == one.cost and Decimal(0) < after.cost < run.cost


async def test_a_fork_that_fails_does_not_undo_what_its_parent_did():
    @workflow("forked-shop")
    async def shop(ctx, fails: bool = False) -> str:
        await step("charge", note, "charge", compensate=lambda charged: note("refund"))
        await step("pack", note, "pack", compensate=lambda packed: note("unpack"))
        if fails:
            raise ValueError("no")
        return "ok"

    run = await shop.start(fails=False)
    calls.clear()
    with pytest.raises(ValueError):
        await run.fork(from_step="pack", input={"fails": True})
    assert calls == ["pack", "unpack"]


async def test_a_fork_of_a_failed_run_tries_what_failed_again(monkeypatch):
    monkeypatch.setenv("BROKEN", "yes")

    @workflow("fork-fails")
    async def flow(ctx) -> str:
        def fails() -> str:
            note("b")
            if os.environ.get("BROKEN"):
                raise ValueError("no")
            return "b"

        await step("a", note, "a")
        return await step("b", fails)

    run = await flow.start()
    monkeypatch.delenv("BROKEN")
    calls.clear()
    assert await run.fork() == "b" and calls == ["b"]
    assert runs.get(run.id).status == "failed"


async def test_forks_of_forks_have_short_ids_and_know_their_parents():
    run = await line.start("x")
    one = run.fork()
    two = one.fork()
    assert (one.id, two.id) == (f"{run.id}-fork", f"{run.id}-fork-2")
    assert (two.parent, one.parent) == (one.id, run.id)
    assert await two == "a:x/b/c" and calls == ["a", "b", "c"]


async def test_a_nested_step_is_forked_from_inside_its_outer_one():
    @workflow("fork-nested")
    async def nested(ctx) -> str:
        async def outer() -> str:
            await step("one", note, "one")
            return await step("two", note, "two")

        return await step("outer", outer)

    run = await nested.start()
    calls.clear()
    assert await run.fork(from_step="two", results={"two": "2"}) == "2"
    assert calls == []


async def test_a_run_that_is_running_is_not_retried():
    gate, started = asyncio.Event(), asyncio.Event()

    @workflow("busy")
    async def busy(ctx) -> str:
        await step("a", note, "a")
        started.set()
        await gate.wait()
        return "done"

    going = asyncio.create_task(busy.run())
    await started.wait()
    (run,) = runs.list()
    with pytest.raises(agentflow.RunBusy):
        run.retry(from_step="a")
    gate.set()
    assert await going == "done"


def test_plain_code_goes_on_without_await():
    @plain_workflow("plain")
    def plain(ctx) -> str:
        plain_step("a", note, "a")
        return plain_step("b", note, "b")

    run = plain.start()
    calls.clear()
    assert run.retry(from_step="b").run_sync() == "b" and calls == ["b"]
    assert run.fork(from_step="b", results={"b": "B"}).run_sync() == "B"
