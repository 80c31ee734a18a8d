"""What a failure leaves behind: what is tried again, what is history, what is undone, and what a stop does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import (
    ModelError,
    Retry,
    StepFailed,
    StepTimeout,
    Waiting,
    current_step,
    generate_content,
    parallel,
    runs,
    step,
    sync,
    tasks,
    workflow,
)
from agentflow.testing import FakeModel
from tests.loopback import Loopback
from tests.programs import notes, run_program, start_program, write_program

QUICK = {"initial_delay": 0.001, "jitter": False}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NOTES", str(tmp_path))
    return tmp_path


def note(word: object) -> None:
    fd = os.open(Path(os.environ["NOTES"]) / "notes.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{word}\n".encode())
    os.close(fd)


def flag(name: str, on: bool = True) -> None:
    file = Path(os.environ["NOTES"]) / f"{name}.flag"
    file.touch() if on else file.unlink(missing_ok=True)


def is_set(name: str) -> bool:
    return (Path(os.environ["NOTES"]) / f"{name}.flag").exists()


def fail_while(name: str) -> None:
    if is_set(name):
        raise PaymentError(f"{name} is out", 402)


class PaymentError(Exception):
    """A constructor of its own, which a replay has no arguments for."""

    def __init__(self, reason: str, code: int, *, hint: str = "none") -> None:
        super().__init__(f"payment: {reason}")
        self.code = code
        self.hint = hint


def until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "it") -> Any:
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true in {seconds} s")
        time.sleep(0.005)


def counts(folder: Path) -> Counter[str]:
    return Counter(notes(folder))


# -- outages, and running again ------------------------------------------------------------------------------------


def outage_work(number: int) -> int:
    note(f"step {number}")
    if number == 5:
        fail_while("outage")
    return number * 10


@workflow
async def outage(ctx: Any) -> list[int]:
    return [await step(f"s{number}", outage_work, number) for number in range(1, 7)]


def test_after_an_outage_only_the_failed_step_and_what_follows_are_run(folder: Path, again: Any) -> None:
    flag("outage")
    with pytest.raises(PaymentError):
        outage.run_sync()
    assert outage.runs()[0].status == "failed"
    flag("outage", False)
    again()
    assert outage.run_sync() == [10, 20, 30, 40, 50, 60]
    assert counts(folder) == {**{f"step {n}": 1 for n in (1, 2, 3, 4, 6)}, "step 5": 2}
    assert outage.runs()[0].status == "completed"
    assert outage.run_sync() == [10, 20, 30, 40, 50, 60]
    assert sum(counts(folder).values()) == 7


def test_an_outage_that_goes_on_is_tried_once_for_each_run(folder: Path, again: Any) -> None:
    flag("outage")
    for _ in range(3):
        with pytest.raises(PaymentError):
            outage.run_sync()
        again()
    assert counts(folder) == {**{f"step {n}": 1 for n in (1, 2, 3, 4)}, "step 5": 3}


def branch_work(name: str) -> str:
    note(name)
    fail_while(name)
    return name.upper()


@pytest.mark.parametrize("form", ["gather", "parallel", "settle"])
def test_of_a_fan_out_only_the_failed_branch_is_tried_again(folder: Path, again: Any, form: str) -> None:
    @workflow(f"fan-{form}")
    async def fan(ctx: Any) -> list[str]:
        steps = [step("work", branch_work, name) for name in "abc"]
        if form == "gather":
            done = await asyncio.gather(*steps, return_exceptions=True)
        else:
            done = await parallel(steps, settle=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return list(done)

    flag("b")
    with pytest.raises(PaymentError):
        fan.run_sync()
    flag("b", False)
    again()
    assert fan.run_sync() == ["A", "B", "C"]
    assert counts(folder) == {"a": 1, "b": 2, "c": 1}


def test_a_failure_in_a_task_group_reaches_except_star_the_first_time_and_again(folder: Path, again: Any) -> None:
    @workflow
    async def grouped(ctx: Any) -> str:
        found = "fine"
        try:
            async with asyncio.TaskGroup() as group:
                for name in "ab":
                    group.create_task(step("work", branch_work, name))
        except* PaymentError as caught:
            error = caught.exceptions[0]
            await step("refund", branch_work, "refund")
            found = f"{len(caught.exceptions)} {error}"
        return found

    flag("b")
    first = grouped.run_sync()
    assert first == "1 payment: b is out"
    again()
    assert grouped.run_sync() == first
    assert counts(folder)["b"] == 1 and counts(folder)["refund"] == 1


def test_a_step_that_raises_a_group_gives_the_same_group_on_replay(again: Any) -> None:
    def broken() -> None:
        raise ExceptionGroup("two", [PaymentError("one", 1), KeyError("k")])

    @workflow
    async def groups(ctx: Any) -> list[str]:
        try:
            await step("broken", broken)
        except* PaymentError as caught:
            found = [f"{type(e).__name__} {e} {e.code}" for e in caught.exceptions]
        except* KeyError:
            pass
        await step("after", lambda: None)
        return found

    first = groups.run_sync()
    assert first == ["PaymentError payment: one 1"]
    again()
    assert groups.run_sync() == first


# -- what the workflow catches ----------------------------------------------------------------------------------------


def pay(amount: int) -> str:
    note("pay")
    error = PaymentError("declined", 402, hint="use another card")
    error.amount = amount  # type: ignore[attr-defined]
    raise error


async def pay_async(amount: int) -> str:
    return pay(amount)


@pytest.mark.parametrize("fn", [pay, pay_async], ids=["sync", "async"])
@pytest.mark.parametrize("catch", [PaymentError, StepFailed])
def test_except_works_the_first_time_and_on_replay_with_all_that_the_error_carried(
    folder: Path, again: Any, fn: Any, catch: Any
) -> None:
    @workflow
    async def caught(ctx: Any) -> dict[str, Any]:
        try:
            await step("pay", fn, 7, retry={"max_attempts": 2, **QUICK})
        except catch as error:
            assert isinstance(error, PaymentError) and isinstance(error, StepFailed)
            found = {
                "text": str(error),
                "code": error.code,
                "hint": error.hint,
                "amount": error.amount,  # type: ignore[attr-defined]
                "step": error.step,
                "run": error.run_id == ctx.run_id,
                "attempts": error.attempts,
                "type": error.error_type,
                "name": type(error).__name__,
            }
            await step("note it", note, "handled")
            return found
        raise AssertionError("was not raised")

    first = caught.run_sync()
    assert first == {
        "text": "payment: declined",
        "code": 402,
        "hint": "use another card",
        "amount": 7,
        "step": "pay",
        "run": True,
        "attempts": 2,
        "type": "PaymentError",
        "name": "PaymentError",
    }
    again()
    assert caught.run_sync() == first
    assert counts(folder) == {"pay": 2, "handled": 1}


def test_the_run_and_its_result_hold_the_error_in_words(again: Any) -> None:
    @workflow
    async def fails(ctx: Any) -> None:
        await step("pay", pay, 1)

    run = asyncio.run(fails.start())
    assert run.status == "failed" and run.error == "PaymentError: payment: declined"
    again()
    with pytest.raises(PaymentError) as caught:
        fails.get(run.id).result()
    assert caught.value.step == "pay" and caught.value.code == 402  # type: ignore[attr-defined]
    assert [s.status for s in run.steps] == ["failed"]


def test_a_handled_failure_is_history_and_the_line_names_rerun(folder: Path, again: Any, said: Any) -> None:
    def ship() -> str:
        note("ship")
        fail_while("ship")
        return "shipped"

    @workflow
    async def order(ctx: Any) -> str:
        try:
            return await step("ship", ship)
        except PaymentError:
            await step("refund", note, "refund")
            raise

    flag("ship")
    with pytest.raises(PaymentError):
        order.run_sync()
    flag("ship", False)
    again()
    with pytest.raises(PaymentError):
        order.run_sync()
    assert counts(folder) == {"ship": 1, "refund": 1}
    assert "rerun=['ship']" in said()
    assert order.options(rerun=["ship"]).run_sync() == "shipped"
    assert counts(folder) == {"ship": 2, "refund": 1}


@pytest.mark.parametrize("where", ["in the body", "in a branch", "inside a step", "around it"])
def test_a_step_inserted_in_front_of_a_failed_one_does_not_count_as_having_handled_it(
    where: str, folder: Path, again: Any
) -> None:
    async def unsteady() -> str:
        note("unsteady")
        fail_while("unsteady")
        return "done"

    async def part() -> str:
        if is_set("edited"):
            await step("new", note, "new")
        return await step("unsteady", unsteady)

    @workflow
    async def flow(ctx: Any) -> str:
        await step("first", note, "first")
        if where == "in a branch":
            return (await asyncio.gather(part()))[0]
        if where == "inside a step":
            return await step("outer", part)
        if where == "around it":
            if is_set("edited"):
                await step("new", note, "new")
            return (await parallel([step("unsteady", unsteady)]))[0]
        return await part()

    flag("unsteady")
    with pytest.raises(PaymentError):
        flow.run_sync()
    flag("edited")
    again()
    with pytest.raises(PaymentError):
        flow.run_sync()  # tried again, and it fails again
    assert counts(folder) == {"first": 1, "unsteady": 2, "new": 1}
    flag("unsteady", False)
    again()
    assert flow.run_sync() == "done"
    assert counts(folder) == {"first": 1, "unsteady": 3, "new": 1}


def test_a_failure_handled_after_a_crash_stays_handled_when_the_run_fails_later(folder: Path, tmp_path: Path) -> None:
    """The failure, its handling and the run's own failure fall into three executions."""
    source = """
    flags = HERE
    def ship():
        note("ship")
        raise ValueError("no ship")
    def refund():
        note("refund")
        if (flags / "die").exists():
            die()
    def report():
        note("report")
        if not (flags / "fixed").exists():
            raise ValueError("no report")
    @workflow
    async def order(ctx):
        try:
            await step("ship", ship)
        except ValueError:
            await step("refund", refund)
        if (flags / "edited").exists():
            await step("new", note, "new")
        await step("report", report)
    order.run_sync()
    """
    file = write_program(source, tmp_path)
    (tmp_path / "die").touch()
    run_program(file, tmp_path, expect_kill=True)
    (tmp_path / "die").unlink()
    assert "no report" in run_program(file, tmp_path, expect_failure=True).err
    (tmp_path / "edited").touch()
    assert "no report" in run_program(file, tmp_path, expect_failure=True).err
    (tmp_path / "fixed").touch()
    run_program(file, tmp_path)
    assert Counter(notes(tmp_path)) == {"ship": 1, "refund": 2, "report": 3, "new": 1}


DOUBTFUL = """
import datetime, uuid

def charge(order, reference, at):
    note(f"charge {order}")
    if (HERE / "die").exists():
        die()
    return f"paid {order}"

@workflow("doubtful")
async def flow(ctx, orders: list[int], policy: str):
    async def one(order):
        # A clock reading and a uuid of the body: other ones in each process.
        return await step("charge", charge, order, str(uuid.uuid4()), datetime.datetime.now(), in_doubt=policy)
    if sys.argv[1] == "gathered":
        return list(await asyncio.gather(*(one(order) for order in orders)))
    return [await one(order) for order in orders]

orders = [int(each) for each in sys.argv[3:]]
print(flow.options(run_id="r").run_sync(orders, sys.argv[2]))
"""


@pytest.mark.parametrize("before", ["one by one", "gathered"])
@pytest.mark.parametrize("after", ["one by one", "gathered"])
def test_a_step_in_doubt_stays_so_although_a_uuid_or_the_clock_in_its_input_differs(
    before: str, after: str, tmp_path: Path
) -> None:
    file = write_program(DOUBTFUL, tmp_path)
    (tmp_path / "die").touch()
    run_program(file, tmp_path, before, "raise", "1", expect_kill=True)
    (tmp_path / "die").unlink()
    ended = run_program(file, tmp_path, after, "raise", "1", expect_failure=True)
    assert "StepInDoubt" in ended.err and "it is the same call, in doubt" in ended.err
    assert notes(tmp_path) == ["charge 1"]
    # Another order is another call, which is in no doubt.
    ended = run_program(file, tmp_path, after, "raise", "2", "1", expect_failure=True)
    assert "StepInDoubt" in ended.err
    assert Counter(notes(tmp_path)) == {"charge 1": 1, "charge 2": 1}


def test_a_person_asked_about_a_step_in_doubt_is_asked_once_although_a_uuid_differs(tmp_path: Path) -> None:
    file = write_program(DOUBTFUL, tmp_path)
    (tmp_path / "die").touch()
    run_program(file, tmp_path, "one by one", "ask", "1", expect_kill=True)
    (tmp_path / "die").unlink()
    for _ in range(2):
        assert "Did charge happen?" in run_program(file, tmp_path, "one by one", "ask", "1", expect_failure=True).err
    agentflow.configure(path=tmp_path / "journal")
    (task,) = tasks.list(status="open")
    tasks.answer(task.id, "paid by hand", by="ann")
    for _ in range(2):
        assert run_program(file, tmp_path, "one by one", "ask", "1").out.strip() == "['paid by hand']"
    assert notes(tmp_path) == ["charge 1"]


# -- cancelled while a commit is under way -----------------------------------------------------------------------------


@pytest.fixture
def slow_commit(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The commit of the record of ``charge`` begins (first event), and goes on when it may (second event)."""
    from agentflow.writer import Writer

    under_way, go_on = threading.Event(), threading.Event()
    submit, transact = Writer._submit, Writer._transact
    held: list[Any] = []

    def submitting(self: Writer, job: Any) -> None:
        place = agentflow.calls.here.get()
        if place is not None and is_set("hold") and "charge" in words(Path(os.environ["NOTES"])) and not held:
            held.append(job)
        submit(self, job)

    def transacting(self: Writer, jobs: Any, *, drain: bool) -> None:
        if any(job in held for job in jobs) and not under_way.is_set():
            under_way.set()
            assert go_on.wait(30)
        transact(self, jobs, drain=drain)

    monkeypatch.setattr(Writer, "_submit", submitting)
    monkeypatch.setattr(Writer, "_transact", transacting)
    monkeypatch.setattr(Writer, "may_inline", lambda self, loop: False)
    return under_way, go_on


@pytest.mark.parametrize("form", ["group", "gather", "parallel"])
@pytest.mark.parametrize("where", ["in the body", "in a retried step"])
def test_a_step_whose_sibling_fails_while_it_is_recorded_is_undone_or_kept(
    where: str, form: str, folder: Path, slow_commit: tuple[threading.Event, threading.Event]
) -> None:
    under_way, go_on = slow_commit

    async def charge() -> str:
        note("charge")
        flag("hold")
        return "paid"

    async def breaks() -> str:
        while not under_way.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        if where == "in the body" or current_step().parent.attempt == 1:
            raise ConnectionError("no")
        return "ok"

    async def both() -> Any:
        undo = (lambda result: note("refund")) if where == "in the body" else None
        one, two = step("charge", charge, compensate=undo), step("breaks", breaks)
        if form == "gather":
            return list(await asyncio.gather(one, two))
        if form == "parallel":
            return await parallel([one, two])
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(one), group.create_task(two)]
        return [each.result() for each in made]

    @workflow
    async def trip(ctx: Any) -> Any:
        if where == "in the body":
            return await both()
        return await step("outer", both, retry={"max_attempts": 2, **QUICK})

    if where == "in the body":
        with pytest.raises((ConnectionError, ExceptionGroup)):
            trip.run_sync()
        assert words(folder) == ["charge", "refund"]
    else:
        assert trip.run_sync() == ["paid", "ok"]
        assert words(folder) == ["charge"]


def test_a_failure_is_tried_again_although_the_run_failed_elsewhere_in_between(folder: Path, again: Any) -> None:
    """The second execution starts and records steps after the failure, and never comes to the failed one."""

    def unsteady(name: str) -> str:
        note(name)
        fail_while(name)
        return name

    @workflow
    async def flow(ctx: Any) -> str:
        if is_set("edited"):
            await step("new", note, "new")
            await step("other", unsteady, "other")
        return await step("last", unsteady, "last")

    flag("last")
    with pytest.raises(PaymentError, match="last"):
        flow.run_sync()
    flag("edited")
    flag("other")
    again()
    with pytest.raises(PaymentError, match="other"):
        flow.run_sync()
    flag("other", False)
    flag("last", False)
    again()
    assert flow.run_sync() == "last"
    assert counts(folder) == {"last": 2, "new": 1, "other": 2}


def test_what_a_thread_had_returned_when_its_step_was_cancelled_is_not_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function has come back, and the loop does not know it yet, when a sibling fails."""
    from agentflow.workers import threads

    start, works = threads.start, []

    def starting(work: Any) -> None:
        works.append(work)
        start(work)

    monkeypatch.setattr(threads, "start", starting)

    async def breaks() -> str:
        while not works:  # noqa: ASYNC110
            await asyncio.sleep(0)
        until(lambda: works[0].is_back)  # holds up the loop
        if current_step().parent.attempt == 1:
            raise ConnectionError("no")
        return "ok"

    async def outer() -> Any:
        return list(await asyncio.gather(step("charge", note, "charge"), step("breaks", breaks)))

    @workflow
    async def trip(ctx: Any) -> Any:
        return await step("outer", outer, retry={"max_attempts": 2, **QUICK})

    assert trip.run_sync() == [None, "ok"]
    assert words(folder) == ["charge"]


def test_ctrl_c_in_a_paid_call_of_plain_code_records_its_step(tmp_path: Path) -> None:
    source = """
    from agentflow import sync
    @sync.workflow("plain")
    def plain(ctx):
        return sync.generate_content("Hi", model="openai:gpt-5-mini")
    plain.run()
    """
    release = threading.Event()

    class Slow(Loopback):
        def arrive(self, asked: Any, path: str) -> tuple[int, Any]:
            found = super().arrive(asked, path)
            release.wait(30)
            return found

    with Slow() as server:
        process = start_program(source, tmp_path, env=server.environment)
        until(lambda: server.arrived or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        until(lambda: "waiting for a paid model call" in process.stderr.readline())  # type: ignore[union-attr]
        release.set()
        _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err and len(server.arrived) == 1
    agentflow.configure(path=tmp_path / "journal")
    (run,) = runs.list()
    assert [each.status for each in run.steps] == ["completed"]


# -- compensation -----------------------------------------------------------------------------------------------------


def charge() -> str:
    note(f"charge {current_step().idempotency_key}")
    return "paid"


def refund(result: str) -> None:
    note(f"refund {result}")
    fail_while("refund")


def ship() -> str:
    note("ship")
    fail_while("ship")
    return "shipped"


@workflow
async def purchase(ctx: Any) -> str:
    await step("reserve", lambda: note("reserve"), compensate=lambda _: note("release"))
    await step("charge", charge, compensate=refund)
    return await step("ship", ship)


def words(folder: Path) -> list[str]:
    return [word.partition(" ")[0] for word in notes(folder)]


def test_a_failed_workflow_is_undone_in_reverse_order(folder: Path) -> None:
    flag("ship")
    with pytest.raises(PaymentError):
        purchase.run_sync()
    assert words(folder) == ["reserve", "charge", "ship", "refund", "release"]


def test_a_compensated_failure_run_again_repeats_nothing_and_says_why_and_how(
    folder: Path, again: Any, said: Any
) -> None:
    flag("ship")
    with pytest.raises(PaymentError):
        purchase.run_sync()
    before = notes(folder)
    flag("ship", False)
    again()
    with pytest.raises(PaymentError) as caught:
        purchase.run_sync()
    assert notes(folder) == before
    text = said() + "\n".join(caught.value.__notes__)
    assert "compensated" in text and "rerun=['ship']" in text and "fresh=True" in text


def test_a_charge_that_was_undone_is_not_shown_as_paid(folder: Path) -> None:
    flag("ship")
    with pytest.raises(PaymentError):
        purchase.run_sync()
    run = purchase.runs()[0]
    assert not any(s.name == "charge" and s.status == "completed" for s in run.steps)


def test_an_undone_charge_asked_for_again_charges_again_under_a_new_key(folder: Path, again: Any) -> None:
    flag("ship")
    with pytest.raises(PaymentError):
        purchase.run_sync()
    flag("ship", False)
    again()
    assert purchase.options(rerun=["ship"]).run_sync() == "shipped"
    assert words(folder).count("charge") == 2 and words(folder).count("refund") == 1
    keys = [word for word in notes(folder) if word.startswith("charge ")]
    assert len(set(keys)) == 2
    assert purchase.run_sync() == "shipped"
    assert words(folder).count("charge") == 2


def test_an_undone_keyed_charge_charges_again_under_a_new_key_in_any_run(folder: Path, again: Any) -> None:
    @workflow
    async def keyed(ctx: Any, place: str) -> str:
        await step("charge", charge, idempotency_key="order-7", compensate=refund)
        return await step("ship", ship)

    flag("ship")
    with pytest.raises(PaymentError):
        keyed.run_sync("here")
    flag("ship", False)
    again()
    assert keyed.run_sync("there") == "shipped"
    keys = [word for word in notes(folder) if word.startswith("charge ")]
    assert keys == ["charge order-7", "charge order-7~2"]
    again()
    assert keyed.run_sync("elsewhere") == "shipped"
    assert len([word for word in notes(folder) if word.startswith("charge ")]) == 2


def test_a_second_failure_after_a_second_charge_refunds_a_second_time(folder: Path, again: Any) -> None:
    flag("ship")
    for rerun in ((), ("ship",), ("ship",)):
        with pytest.raises(PaymentError):
            purchase.options(rerun=rerun).run_sync()
        again()
    assert Counter(words(folder)) == {"reserve": 3, "charge": 3, "ship": 3, "refund": 3, "release": 3}


@pytest.mark.parametrize("form", ["async", "sync"])
def test_a_compensation_that_fails_stops_no_other_and_is_tried_again(folder: Path, again: Any, form: str) -> None:
    if form == "async":
        flow: Any = purchase
    else:

        @sync.workflow("purchase-sync")
        def flow(ctx: Any) -> str:
            sync.step("reserve", lambda: note("reserve"), compensate=lambda _: note("release"))
            sync.step("charge", charge, compensate=refund)
            return sync.step("ship", ship)

    flag("ship")
    flag("refund")
    with pytest.raises(PaymentError, match="ship is out"):
        flow.run_sync()
    assert words(folder) == ["reserve", "charge", "ship", "refund", "release"]
    assert flow.runs()[0].status == "failed"
    flag("refund", False)
    flag("ship", False)
    again()
    with pytest.raises(PaymentError, match="ship is out"):
        flow.run_sync()
    assert words(folder) == ["reserve", "charge", "ship", "refund", "release", "refund"]
    again()
    with pytest.raises(PaymentError):
        flow.run_sync()
    assert len(notes(folder)) == 6


@pytest.mark.parametrize("replayed", [False, True])
def test_what_a_nested_step_did_is_undone_too_even_if_its_outer_step_was_replayed(
    folder: Path, again: Any, replayed: bool
) -> None:
    async def booking() -> str:
        return await step("charge", charge, compensate=refund)

    @workflow
    async def trip(ctx: Any) -> str:
        await step("booking", booking)
        if is_set("stop"):
            raise KeyboardInterrupt
        return await step("ship", ship)

    flag("ship")
    if replayed:
        flag("stop")
        with pytest.raises(KeyboardInterrupt):
            trip.run_sync()
        flag("stop", False)
        again()
    with pytest.raises(PaymentError):
        trip.run_sync()
    assert words(folder) == ["charge", "ship", "refund"]


def test_a_retried_outer_step_does_not_charge_twice_inside(folder: Path) -> None:
    async def booking() -> str:
        await step("charge", charge)
        note("confirm")
        if current_step().attempt == 1:
            raise ConnectionError("later")
        return "booked"

    @workflow
    async def trip(ctx: Any) -> str:
        return await step("booking", booking, retry={"max_attempts": 2, **QUICK})

    assert trip.run_sync() == "booked"
    assert Counter(words(folder)) == {"charge": 1, "confirm": 2}


def test_a_retried_outer_step_tries_a_failed_inner_step_again_and_keeps_the_others(folder: Path) -> None:
    def flaky(name: str) -> str:
        note(name)
        if name == "b" and current_step().parent.attempt < 3:
            raise ConnectionError("later")
        return name.upper()

    async def one(name: str) -> str:
        return await step("flaky", flaky, name)

    async def outer() -> list[str]:
        return list(await asyncio.gather(*(one(name) for name in "abc")))

    @workflow
    async def trip(ctx: Any) -> list[str]:
        return await step("outer", outer, retry={"max_attempts": 3, **QUICK})

    assert trip.run_sync() == ["A", "B", "C"]
    assert counts(folder) == {"a": 1, "b": 3, "c": 1}


def test_what_comes_back_between_a_failed_attempt_and_the_next_one_is_not_run_again(folder: Path) -> None:
    def slow() -> str:
        note("slow")
        until(lambda: is_set("go"), what="the flag")
        return "slow"

    async def fail() -> str:
        await asyncio.to_thread(until, lambda: counts(folder)["slow"], what="its sibling")
        if current_step().attempt == 1:
            raise ConnectionError("later")
        return "fine"

    async def outer() -> list[str]:
        if current_step().attempt == 2:
            flag("go")
            await asyncio.to_thread(until, lambda: list(_rows(folder, "s/")), what="the result of the first attempt")
        return list(await asyncio.gather(step("slow", slow), fail()))

    @workflow
    async def trip(ctx: Any) -> list[str]:
        return await step("outer", outer, retry={"max_attempts": 2, **QUICK})

    assert trip.run_sync() == ["slow", "fine"]
    assert notes(folder) == ["slow"]


NESTED = """
def charge():
    note("charge " + current_step().idempotency_key)
    return "paid"

def confirm():
    note("confirm " + current_step().idempotency_key)
    if current_step().parent.attempt == 2 and sys.argv[1] == "die":
        die()
    if current_step().parent.attempt < 3:
        raise OSError("not yet")
    return "confirmed"

async def booking():
    await step("charge", charge)
    return await step("confirm", confirm)

@workflow
async def trip(ctx):
    return await step("booking", booking, retry={"max_attempts": 3, "initial_delay": 0.001, "jitter": False})

print(trip.run_sync())
"""


def test_attempts_of_an_outer_step_ask_again_inside_under_the_same_keys_after_a_kill(folder: Path) -> None:
    run_program(NESTED, folder, "die", expect_kill=True)
    assert "confirmed" in run_program(NESTED, folder, "through").out
    assert words(folder) == ["charge", "confirm", "confirm", "confirm", "confirm"]
    assert len(set(notes(folder))) == 2


COMPENSATE = """
def ship():
    note("ship")
    raise RuntimeError("no stock")

def refund(result):
    note("refund " + result)

@workflow
async def order(ctx):
    await step("reserve", lambda: note("reserve"), compensate=lambda _: note("release"))
    await step("charge", lambda: note("charge") or "paid", compensate=refund)
    await step("ship", ship)

import agentflow.closing as closing
if sys.argv[1] == "before":
    closing.before_undoing = lambda opened: die()
elif sys.argv[1] == "between":
    undoing = closing.undoing
    def dying(ex, call, slot, value):
        if call.name == "reserve":
            die()
        return undoing(ex, call, slot, value)
    closing.undoing = dying
elif sys.argv[1] == "end":
    closing.close_failed = lambda *a: die()
try:
    order.run_sync()
except RuntimeError as error:
    print("failed:", error)
"""


@pytest.mark.parametrize("point", ["before", "between", "end"])
def test_a_kill_while_undoing_undoes_each_step_once(folder: Path, point: str) -> None:
    run_program(COMPENSATE, folder, point, expect_kill=True)
    ended = run_program(COMPENSATE, folder, "through")
    assert "failed: no stock" in ended.out
    assert notes(folder) == ["reserve", "charge", "ship", "refund paid", "release"]
    run_program(COMPENSATE, folder, "through")
    assert len(notes(folder)) == 5
    assert runs.list()[0].status == "failed"


REFUND = """
@workflow
async def order(ctx):
    await step("charge", lambda: note("charge"))
    try:
        await step("ship", ship)
    except RuntimeError:
        if sys.argv[1] == "die":
            die()
        await step("refund", lambda: note("refund"))
        raise

def ship():
    note("ship")
    raise RuntimeError("no stock")

try:
    order.run_sync()
except RuntimeError as error:
    print("failed:", error)
"""


def test_a_kill_between_failure_and_refund_step_refunds_once(folder: Path) -> None:
    run_program(REFUND, folder, "die", expect_kill=True)
    for _ in range(2):
        assert "failed: no stock" in run_program(REFUND, folder, "through").out
    assert notes(folder) == ["charge", "ship", "refund"]


@pytest.mark.parametrize("form", ["async", "sync"])
def test_a_compensation_may_wait_for_a_person(folder: Path, again: Any, form: str) -> None:
    if form == "async":

        @workflow("careful-async")
        async def flow(ctx: Any) -> None:
            await step(
                "charge",
                lambda: note("charge"),
                compensate=lambda _: agentflow.human_task("refund", "boss", title="Pay"),
            )
            await step("ship", ship)
    else:

        @sync.workflow("careful-sync")
        def flow(ctx: Any) -> None:
            sync.step("charge", lambda: note("charge"), compensate=lambda _: sync.human_task("refund", "boss"))
            sync.step("ship", ship)

    flag("ship")
    for _ in range(2):
        with pytest.raises(Waiting) as waits:
            flow.run_sync()
        assert flow.runs()[0].status == "waiting"
        again()
    flag("ship", False)
    tasks.approve(waits.value.waiting_on[0]["id"])
    with pytest.raises(PaymentError):
        flow.run_sync()
    assert flow.runs()[0].status == "failed"
    assert notes(folder) == ["charge", "ship"]


# -- retries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_exactly_max_attempts_are_made(folder: Path, again: Any, attempts: int) -> None:
    @workflow
    async def tried(ctx: Any) -> None:
        await step("pay", pay, 1, retry={"max_attempts": attempts, **QUICK})

    for time_ in (1, 2):
        with pytest.raises(StepFailed) as caught:
            tried.run_sync()
        assert caught.value.attempts == attempts
        assert counts(folder)["pay"] == attempts * time_
        again()


def test_retry_if_gives_up_at_once(folder: Path) -> None:
    @workflow
    async def tried(ctx: Any) -> None:
        await step("pay", pay, 1, retry=Retry(max_attempts=5, retry_if=lambda e: isinstance(e, OSError)))

    with pytest.raises(PaymentError):
        tried.run_sync()
    assert counts(folder)["pay"] == 1


def test_a_step_succeeds_in_a_later_attempt_and_says_in_which(folder: Path) -> None:
    def flaky() -> int:
        note("flaky")
        if current_step().attempt < 3:
            raise OSError("not yet")
        return current_step().attempt

    @workflow
    async def tried(ctx: Any) -> Any:
        value = await step("flaky", flaky, retry={"max_attempts": 4, **QUICK})
        return value, ctx.steps["flaky"].attempts

    assert tried.run_sync() == (3, 3)
    assert counts(folder)["flaky"] == 3


RETRIES = """
def flaky():
    attempt = current_step().attempt
    note(f"attempt {attempt}")
    if sys.argv[1] == f"die{attempt}":
        die()
    raise OSError("not yet")

@workflow
async def tried(ctx):
    await step("flaky", flaky, retry={"max_attempts": 3, "initial_delay": 0.001, "jitter": False})

try:
    tried.run_sync()
except OSError as error:
    print("attempts", error.attempts)
"""


def test_attempts_go_on_counting_after_a_kill(folder: Path) -> None:
    run_program(RETRIES, folder, "die3", expect_kill=True)
    assert notes(folder) == ["attempt 1", "attempt 2", "attempt 3"]
    ended = run_program(RETRIES, folder, "through")
    # The third attempt was in flight: it is made again, the two before it are not.
    assert notes(folder) == ["attempt 1", "attempt 2", "attempt 3", "attempt 3"]
    assert "attempts 3" in ended.out


class Busy(Exception):
    def __init__(self, retry_after: float) -> None:
        super().__init__("busy")
        self.retry_after = retry_after


def test_the_servers_retry_after_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def recorded(delay: float, *rest: Any) -> Any:
        if delay > 1:
            slept.append(delay)
            delay = 0
        return await sleep(delay, *rest)

    monkeypatch.setattr("agentflow.drive.asyncio.sleep", recorded)

    async def ask() -> str:
        return await generate_content("hello", model="openai:gpt-5-mini")

    @workflow
    async def plain(ctx: Any) -> str:
        return await generate_content("hello", model="openai:gpt-5-mini")

    @workflow
    async def wrapped(ctx: Any) -> str:
        return await step("ask", ask, retry={"max_attempts": 3, **QUICK})

    for flow in (plain, wrapped):
        slept.clear()
        busy = ModelError("slow down", status=429, code="rate_limit", retryable=True, retry_after=17)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        with FakeModel([busy, "hi"]) as model:
            assert flow.run_sync() == "hi"
        assert len(model.calls) == 2
        assert slept == [17]


@pytest.mark.parametrize("inner", [None, 1])
def test_retries_do_not_multiply(monkeypatch: pytest.MonkeyPatch, inner: int | None) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    async def ask() -> str:
        return await generate_content("hello", model="openai:gpt-5-mini")

    async def outer() -> str:
        return await step("ask", ask, retry=inner and Retry(max_attempts=inner))

    @workflow(f"multiply-{inner}")
    async def wrapped(ctx: Any) -> str:
        return await step("outer", outer, retry={"max_attempts": 3, **QUICK})

    with FakeModel([500] * 20, all_used=False) as model, pytest.raises(ModelError) as caught:
        wrapped.run_sync()
    assert len(model.calls) == 3
    assert isinstance(caught.value, StepFailed) and caught.value.status == 500


def test_a_call_with_no_retrying_step_around_it_makes_three_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr("agentflow.aicall._RETRY", Retry(**{**_defaults(), **QUICK}))

    async def ask() -> str:
        return await generate_content("hello", model="openai:gpt-5-mini")

    @workflow
    async def plain(ctx: Any) -> str:
        return await step("ask", ask)

    with FakeModel([503] * 20, all_used=False) as model, pytest.raises(ModelError):
        plain.run_sync()
    assert len(model.calls) == 3


def _defaults() -> dict[str, Any]:
    from agentflow import aicall

    return {"max_attempts": aicall._RETRY.max_attempts, "retry_if": aicall._RETRY.retry_if}


@pytest.mark.parametrize(("resample", "asked"), [(True, 3), (False, 1)])
def test_a_new_attempt_asks_the_model_again_unless_resample_is_off(
    monkeypatch: pytest.MonkeyPatch, resample: bool, asked: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    async def ask() -> str:
        answer = await generate_content("a number", model="openai:gpt-5-mini")
        if current_step().attempt < 3:
            raise ValueError(answer)
        return answer

    @workflow(f"resample-{resample}")
    async def sampled(ctx: Any) -> str:
        return await step("ask", ask, retry=Retry(max_attempts=3, resample=resample, **QUICK))

    with FakeModel(["1", "2", "3"][:asked]) as model:
        assert sampled.run_sync() == str(asked)
    assert len(model.calls) == asked


@pytest.mark.parametrize("inner_fails", [True, False])
def test_a_failed_outer_step_run_again_keeps_what_is_done_inside(folder: Path, again: Any, inner_fails: bool) -> None:
    def confirm() -> str:
        note("confirm")
        fail_while("inner")
        return "ok"

    async def outer() -> str:
        await step("charge", charge)
        result = await step("confirm", confirm)
        fail_while("outer")
        return result

    @workflow
    async def flow(ctx: Any) -> str:
        return await step("outer", outer, retry={"max_attempts": 2, **QUICK})

    flag("inner" if inner_fails else "outer")
    with pytest.raises(PaymentError) as caught:
        flow.run_sync()
    assert caught.value.step == "outer"  # type: ignore[attr-defined]
    flag("inner", False)
    flag("outer", False)
    again()
    assert flow.run_sync() == "ok"
    assert Counter(words(folder)) == {"charge": 1, "confirm": 3 if inner_fails else 1}


def test_an_outer_step_that_timed_out_asks_again_only_for_what_was_not_done(folder: Path) -> None:
    async def slow() -> str:
        note("slow")
        if current_step().parent.attempt == 1:
            await asyncio.Event().wait()
        return "done"

    async def outer() -> str:
        await step("quick", note, "quick")
        return await step("slow", slow)

    @workflow
    async def flow(ctx: Any) -> str:
        return await step("outer", outer, timeout=0.3, retry={"max_attempts": 2, **QUICK})

    assert flow.run_sync() == "done"
    assert counts(folder) == {"quick": 1, "slow": 2}


@pytest.mark.parametrize("form", ["sync", "scratch"])
def test_a_retried_outer_step_charges_once_in_plain_code_and_outside_a_workflow(folder: Path, form: str) -> None:
    def outer() -> str:
        sync.step("charge", charge)
        if current_step().attempt == 1:
            raise OSError("later")
        return "done"

    @sync.workflow
    def flow(ctx: Any) -> str:
        return sync.step("outer", outer, retry={"max_attempts": 2, **QUICK})

    assert (flow.run() if form == "sync" else sync.step("outer", outer, retry={"max_attempts": 2, **QUICK})) == "done"
    assert words(folder) == ["charge"]


@pytest.mark.parametrize("form", ["thread", "inline", "sync"])
def test_a_stopiteration_of_a_step_is_a_failure_and_holds_up_nothing(folder: Path, again: Any, form: str) -> None:
    def first() -> Any:
        return next(iter([]))

    if form == "sync":

        @sync.workflow("stops-sync")
        def flow(ctx: Any) -> str:
            try:
                return str(sync.step("first", first))
            except Exception as error:
                sync.step("none", note, "none")
                return type(error).__name__
    else:

        @workflow(f"stops-{form}")
        async def flow(ctx: Any) -> str:
            try:
                async with asyncio.timeout(10):
                    return str(await step("first", first, thread=form == "thread"))
            except Exception as error:
                await step("none", note, "none")
                return type(error).__name__

    result = flow.run_sync()
    assert result == "RuntimeError"
    again()
    assert flow.run_sync() == result
    assert notes(folder) == ["none"]


# -- timeouts -------------------------------------------------------------------------------------------------------------


async def never() -> None:
    note("never")
    await asyncio.Event().wait()


def test_a_timeout_of_an_async_step_cancels_it_and_is_a_timeouterror(folder: Path, again: Any) -> None:
    @workflow
    async def slow(ctx: Any) -> str:
        try:
            await step("never", never, timeout=0.02, retry={"max_attempts": 2, **QUICK})
        except TimeoutError as error:
            assert isinstance(error, StepTimeout) and isinstance(error, StepFailed)
            found = f"{error.step} {error.attempts} {error}"
            await step("go on", note, "on")
            return found
        return "?"

    first = slow.run_sync()
    assert first.startswith("never 2 ") and "0.02s" in first
    again()
    assert slow.run_sync() == first
    assert counts(folder) == {"never": 2, "on": 1}


def blocked() -> str:
    note("begun")
    until(lambda: is_set("go"), what="the flag")
    note("done")
    return "late"


def test_a_late_result_of_a_sync_function_is_recorded_and_used_by_the_next_run(
    folder: Path, again: Any, journal_path: Path
) -> None:
    @workflow
    async def slow(ctx: Any) -> str:
        return await step("blocked", blocked, timeout=0.05)

    started = time.monotonic()
    with pytest.raises(StepTimeout):
        slow.run_sync()
    assert time.monotonic() - started < 30
    run = slow.runs()[0]
    assert run.status == "failed"
    flag("go")
    until(lambda: [s.output for s in slow.get(run.id).steps] == ["late"], what="the late result")
    again()
    assert slow.run_sync() == "late"
    assert notes(folder) == ["begun", "done"]


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_late_result_of_a_secret_step_is_not_recorded_either(attempts: int, folder: Path) -> None:
    def blocked() -> str:
        until(lambda: is_set("go"), what="the flag")
        return "hush-hush"

    def release() -> None:
        until(lambda: list(_rows(folder, "a/")), what="the failed attempt")
        flag("go")

    @workflow
    async def slow(ctx: Any) -> int:
        retry = Retry(max_attempts=attempts, initial_delay=0.5, jitter=False)
        return len(await step("blocked", blocked, timeout=0.05, retry=retry, secret=True))

    if attempts == 1:
        with pytest.raises(StepTimeout):
            slow.run_sync()
        flag("go")
        until(lambda: len(list(_rows(folder, "s/"))) == 2, what="the late result")
    else:  # it comes during the delay
        helper = threading.Thread(target=release)
        helper.start()
        assert slow.run_sync() == 9
        helper.join()
    from agentflow.scratch import open_journal

    texts = [text for _, text in open_journal().scan("")]
    assert texts and not any("hush" in text for text in texts)


def test_a_timeout_that_was_handled_is_history_whatever_comes_late(folder: Path, again: Any) -> None:
    @workflow
    async def slow(ctx: Any) -> str:
        try:
            return await step("blocked", blocked, timeout=0.05)
        except StepTimeout:
            return await step("instead", lambda: "instead")

    assert slow.run_sync() == "instead"
    flag("go")
    until(lambda: "done" in notes(folder))
    until(lambda: any(s.output == "late" for s in slow.runs()[0].steps), what="the late result")
    again()
    assert slow.run_sync() == "instead"
    assert notes(folder) == ["begun", "done"]


def test_a_result_that_comes_during_the_retry_delay_is_taken_instead_of_a_second_try(folder: Path) -> None:
    @workflow
    async def slow(ctx: Any) -> str:
        return await step(
            "blocked", blocked, timeout=0.05, retry=Retry(max_attempts=2, initial_delay=0.5, jitter=False)
        )

    def release() -> None:
        until(lambda: list(_rows(folder, "a/")), what="the failed attempt")
        flag("go")

    helper = threading.Thread(target=release)
    helper.start()
    assert slow.run_sync() == "late"
    helper.join()
    assert notes(folder) == ["begun", "done"]


def test_a_result_that_comes_after_another_attempt_completed_does_not_take_its_place(folder: Path, again: Any) -> None:
    came = threading.Event()

    def twice() -> str:
        note("begun")
        if len(notes(folder)) == 1:
            until(lambda: is_set("go"), what="the flag")
            came.set()
            return "first"
        return "second"

    @workflow
    async def slow(ctx: Any) -> str:
        got = await step("twice", twice, timeout=0.5, retry=Retry(max_attempts=2, initial_delay=0.001))
        if not came.is_set():
            flag("go")
            await asyncio.to_thread(until, lambda: "came back after" in "".join(said), what="the late result")
        return got

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agentflow").addHandler(handler)
    try:
        assert slow.run_sync() == "second"
    finally:
        logging.getLogger("agentflow").removeHandler(handler)
    assert [step.output for step in slow.runs()[0].steps] == ["second"]
    again()
    assert slow.run_sync() == "second"


@pytest.mark.parametrize("form", ["plain", "nested", "branches", "thread of an async workflow"])
def test_an_attempt_of_plain_code_that_was_given_up_starts_no_further_step(form: str, folder: Path) -> None:
    """Its thread goes on, and would do what the next attempt does as well."""
    go, over = threading.Event(), threading.Event()

    def inside() -> str:
        attempt = notes(folder).count("attempt")
        sync.step("first", note, "first")
        if attempt == 1:
            go.wait(60)
        got = sync.step("charge", note, "charged")
        go.set()
        assert attempt == 2 or over.wait(60)
        return str(got)

    def pay() -> Any:
        note("attempt")
        attempt = notes(folder).count("attempt")
        try:
            if form == "nested":
                return sync.step("nested", inside)
            if form == "branches":
                return sync.parallel([inside])
            return inside()
        finally:
            if attempt == 1:
                over.set()

    retry = Retry(max_attempts=2, initial_delay=0.001)

    @sync.workflow("given-up")
    def plain(ctx: Any) -> Any:
        got = sync.step("pay", pay, timeout=0.5, retry=retry)
        assert over.wait(60)
        return got

    @workflow("given-up-async")
    async def threads(ctx: Any) -> Any:
        got = await step("pay", pay, timeout=0.5, retry=retry)
        await asyncio.to_thread(over.wait, 60)
        return got

    run = (threads if form.startswith("thread") else plain).run_sync()
    assert run in ("None", ["None"])
    assert notes(folder) == ["attempt", "first", "attempt", "charged"]


GIVEN_UP = """
import logging, time
import agentflow.sync as sync
from agentflow import aicall
from agentflow.testing import FakeModel

form, order = sys.argv[1:]
first_process = not (HERE / "began").exists()
(HERE / "began").touch()
said, went_on = [], []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("agentflow").addHandler(handler)

def gets():
    return (HERE / "notes.txt").read_text().count("get")

def came_back():
    return any("came back" in text for text in said)

def ready(attempt):
    if attempt == 1:  # comes back after its attempt was given up: when the next one has what it asked for, or before
        return went_on if order == "after" else gets() > 1
    return order == "after" or came_back() or not first_process

def wait(ready, *args):
    while not ready(*args):
        time.sleep(0.002)

def get():
    note("get")
    attempt = gets()
    wait(ready, attempt)
    return "AB"[attempt > 1]

save = aicall._Recorder.save

async def saves(self, raw, **how):
    note("get")
    attempt = gets()
    while not ready(attempt):
        await asyncio.sleep(0.002)
    await save(self, raw, **how)

aicall._Recorder.save = saves

def charge(what):
    note(f"charge {what}")

def end():
    went_on.append(1)
    wait(came_back)
    if first_process:
        die()

retry = Retry(max_attempts=9, initial_delay=0.001)

async def pay():
    got = await (generate_content("A or B?", model="openai:gpt-4o-mini") if form == "ai" else step("get", get))
    await step("charge", charge, got)
    await asyncio.to_thread(end) if first_process else None
    return got

def pay_plain():
    got = sync.step("get", get)
    sync.step("charge", charge, got)
    if first_process:
        end()
    return got

@workflow("given-up", run_id=lambda: "given-up")
async def flow(ctx):
    return await step("pay", pay, timeout=1.5, retry=retry)

@sync.workflow("given-up-plain", run_id=lambda: "given-up-plain")
def plain(ctx):
    return sync.step("pay", pay_plain, timeout=1.5, retry=retry)

with FakeModel(["A", "B"], all_used=False):
    print("result", (plain if form == "plain" else flow).run_sync())
"""


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("form", ["thread", "plain", "ai"])
def test_what_an_attempt_that_was_given_up_brings_is_not_what_the_next_one_had(form: str, order: str, folder: Path) -> None:
    """The process dies when both have come: what was done with the one answer must not be done with the other."""
    program = write_program(GIVEN_UP, folder)
    run_program(program, folder, form, order, expect_kill=True)
    ended = run_program(program, folder, form, order)
    assert "result B" in ended.out
    assert notes(folder) == ["get", "get", "charge B"]


def test_a_record_whose_place_a_late_result_takes_at_that_moment_is_added_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentflow.journal import Add, Journal

    commit = Journal.acommit

    async def slow_commit(self: Any, ops: Any, **how: Any) -> Any:
        if isinstance(ops[0], Add) and ops[0].key.startswith("s/") and "second" in ops[0].value and not is_set("go"):
            flag("go")
            await asyncio.to_thread(until, lambda: list(_rows(folder, "s/")), what="the late result")
        return await commit(self, ops, **how)

    monkeypatch.setattr(Journal, "acommit", slow_commit)

    def get() -> str:
        note("get")
        if counts(folder)["get"] > 1:
            return "second"
        until(lambda: is_set("go"), what="the flag")
        return "first"

    async def outer() -> str:
        return await step("get", get)

    @workflow
    async def flow(ctx: Any) -> str:
        return await step("outer", outer, timeout=1, retry=Retry(max_attempts=9, initial_delay=0.001))

    assert flow.run_sync() == "second"
    from agentflow.scratch import open_journal

    found = [text for _, text in open_journal().scan("s/") if '"name":"get"' in text]
    assert ["first" in text for text in found] == [True, False] and "second" in found[1]


def test_two_results_that_come_late_leave_a_handled_failure_as_it_was(folder: Path, again: Any) -> None:
    def twice() -> str:
        note("begun")
        own = f"go-{len(notes(folder))}"
        until(lambda: is_set(own), what="the flag")
        return own

    @workflow
    async def slow(ctx: Any) -> str:
        try:
            return await step("twice", twice, timeout=0.3, retry=Retry(max_attempts=2, initial_delay=0.001))
        except StepTimeout:
            return await step("instead", lambda: "instead")

    assert slow.run_sync() == "instead"
    for n in (1, 2):
        flag(f"go-{n}")
        until(lambda: len(list(_rows(folder, "s/"))) == 2 + n, what="the late result")
    again()
    assert slow.run_sync() == "instead"


def _rows(folder: Path, prefix: str) -> Iterator[str]:
    from agentflow.scratch import open_journal

    for key, _ in open_journal().scan(prefix):
        yield key


def test_what_a_cancelled_siblings_thread_returns_is_recorded(folder: Path, again: Any) -> None:
    def bad() -> str:
        until(lambda: "begun" in notes(folder))
        fail_while("bad")
        return "fine"

    @workflow
    async def flow(ctx: Any) -> list[str]:
        return await asyncio.gather(step("blocked", blocked), step("bad", bad))

    flag("bad")
    with pytest.raises(PaymentError):
        flow.run_sync()
    flag("bad", False)
    flag("go")
    until(lambda: "done" in notes(folder))
    again()
    assert flow.run_sync() == ["late", "fine"]
    assert notes(folder) == ["begun", "done"]


# -- in doubt ---------------------------------------------------------------------------------------------------------------

DOUBT = """
def charge():
    note("charge " + current_step().idempotency_key)
    if sys.argv[2] == "die":
        die()
    return "paid"

@workflow("order", run_id=lambda: "order-1")
async def order(ctx):
    return await step("charge", charge, in_doubt=sys.argv[1]), ctx.steps["charge"].in_doubt

flow = order.options(rerun=sys.argv[3:])
try:
    print("result", flow.run_sync())
except StepInDoubt as error:
    print("in doubt", error.step, error.run_id, error)
except Waiting as error:
    print("waits", error.waiting_on[0]["id"])
"""


def test_a_step_in_doubt_is_run_again_under_the_same_key_and_says_so(folder: Path) -> None:
    run_program(DOUBT, folder, "rerun", "die", expect_kill=True)
    ended = run_program(DOUBT, folder, "rerun", "live")
    assert "result ('paid', 1)" in ended.out
    assert len(notes(folder)) == 2 and len(set(notes(folder))) == 1
    assert "in doubt" in ended.err


def test_a_step_in_doubt_is_refused_until_rerun_allows_it(folder: Path) -> None:
    run_program(DOUBT, folder, "raise", "die", expect_kill=True)
    for _ in range(2):
        ended = run_program(DOUBT, folder, "raise", "live")
        assert "in doubt charge order-1" in ended.out and "rerun=['charge']" in ended.out
    assert len(notes(folder)) == 1
    ended = run_program(DOUBT, folder, "raise", "live", "charge")
    assert "result ('paid'" in ended.out
    assert len(notes(folder)) == 2


@pytest.mark.parametrize("happened", [True, False])
def test_a_person_says_whether_a_step_in_doubt_happened(folder: Path, happened: bool) -> None:
    run_program(DOUBT, folder, "ask", "die", expect_kill=True)
    ended = run_program(DOUBT, folder, "ask", "live")
    assert "waits" in ended.out
    (task,) = tasks.list()
    assert task.id in ended.out and task.data["step"] == "charge"
    assert task.data["idempotency_key"] == notes(folder)[0].split()[1]
    if happened:
        tasks.answer(task.id, "paid by hand", by="ann")
    else:
        tasks.reject(task.id, by="ann")
    for _ in range(2):
        ended = run_program(DOUBT, folder, "ask", "live")
        assert ("result ('paid by hand'" if happened else "result ('paid'") in ended.out
    assert len(notes(folder)) == (1 if happened else 2)


def test_a_second_doubt_after_a_no_is_asked_about_again(folder: Path) -> None:
    run_program(DOUBT, folder, "ask", "die", expect_kill=True)
    run_program(DOUBT, folder, "ask", "live")
    first = tasks.list()[0].id
    tasks.reject(first)
    run_program(DOUBT, folder, "ask", "die", expect_kill=True)
    assert len(notes(folder)) == 2
    assert "waits" in run_program(DOUBT, folder, "ask", "live").out
    (second,) = tasks.list()
    assert second.id != first
    tasks.answer(second.id, "paid by hand")
    assert "result ('paid by hand'" in run_program(DOUBT, folder, "ask", "live").out
    assert len(notes(folder)) == 2


@pytest.mark.parametrize("policy", ["rerun", "raise", "ask"])
def test_a_step_that_only_waited_for_a_person_is_never_in_doubt(again: Any, said: Any, policy: Any) -> None:
    async def reviewed() -> bool:
        return bool(await agentflow.human_task("approve", "boss", {"x": 1}))

    @workflow(f"reviewed-{policy}")
    async def flow(ctx: Any) -> bool:
        return await step("reviewed", reviewed, in_doubt=policy)

    for _ in range(2):
        with pytest.raises(Waiting) as caught:
            flow.run_sync()
        again()
        assert [wait["type"] for wait in caught.value.waiting_on] == ["approve"]
    tasks.approve(caught.value.waiting_on[0]["id"])
    assert flow.run_sync() is True
    assert "in doubt" not in said()


def test_a_step_that_was_killed_while_it_only_waited_is_not_in_doubt(folder: Path) -> None:
    source = """
    async def reviewed():
        return bool(await human_task("approve", "boss"))

    @workflow("order", run_id=lambda: "order-1")
    async def order(ctx):
        return await step("reviewed", reviewed, in_doubt="raise")

    if sys.argv[1] == "die":
        configure(notify=lambda task: die())
    try:
        order.options(wait=sys.argv[1] == "die").run_sync()
    except Waiting as error:
        print("waits", error.waiting_on[0]["type"])
    """
    run_program(source, folder, "die", expect_kill=True)
    assert "waits approve" in run_program(source, folder, "live").out


@pytest.mark.parametrize("policy", ["raise", "ask"])
def test_a_step_that_failed_is_not_in_doubt(folder: Path, again: Any, policy: Any) -> None:
    @workflow(f"failing-{policy}")
    async def flow(ctx: Any) -> str:
        return await step("ship", ship, in_doubt=policy, retry={"max_attempts": 2, **QUICK})

    flag("ship")
    with pytest.raises(PaymentError):
        flow.run_sync()
    flag("ship", False)
    again()
    assert flow.run_sync() == "shipped"
    assert counts(folder)["ship"] == 3


# -- stopped with Ctrl-C -----------------------------------------------------------------------------------------------------

STOPPED = """
import time, agentflow.sync as sync

def wait():
    note("begun")
    if sys.argv[2] == "first":
        time.sleep(30)
    return "done"

async def await_():
    note("begun")
    if sys.argv[2] == "first":
        await asyncio.sleep(30)
    return "done"

def failing():
    note("begun")
    if sys.argv[2] == "first":
        raise OSError("not yet")
    return "done"

@workflow("order", run_id=lambda: "order-1")
async def order(ctx):
    await step("before", lambda: note("before"))
    if sys.argv[1] == "retry":
        return await step("s", failing, retry={"max_attempts": 5, "initial_delay": 30, "jitter": False})
    return await step("s", await_ if sys.argv[1] == "async" else wait, thread=sys.argv[1] != "inline")

@sync.workflow("order", run_id=lambda: "order-1")
def plain(ctx):
    sync.step("before", lambda: note("before"))
    if sys.argv[1] == "sync-retry":
        return sync.step("s", failing, retry={"max_attempts": 5, "initial_delay": 30, "jitter": False})
    return sync.step("s", await_ if sys.argv[1] == "sync-async" else wait, timeout=60 if "timeout" in sys.argv[1] else None)

flow = plain if sys.argv[1].startswith("sync") else order
try:
    print("result", flow.run_sync())
except KeyboardInterrupt:
    print("stopped", runs.get("order-1").status)
    raise
"""

WAYS = ["thread", "inline", "async", "retry", "sync", "sync-retry", "sync-async", "sync-timeout"]


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_leaves_a_run_that_goes_on_where_it_was(folder: Path, way: str) -> None:
    program = write_program(STOPPED, folder)
    process = start_program(program, folder, way, "first")
    until(lambda: "begun" in notes(folder) and (not way.endswith("retry") or list(_rows_quietly(folder))))
    process.send_signal(signal.SIGINT)
    if way == "inline":  # the loop itself is blocked: as with any asyncio program, the second Ctrl-C gets through
        until(lambda: not _pending(process.pid, signal.SIGINT), what="the first signal")
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "stopped interrupted" in out, err
    run = runs.get("order-1")
    assert run.status == "interrupted" and run.error is None
    assert [s.status for s in run.steps] == ["completed"]
    assert not list(_rows(folder, "lease/")) or _free(folder)
    ended = run_program(program, folder, way, "second")
    assert "result done" in ended.out
    assert counts(folder) == {"before": 1, "begun": 2}
    assert runs.get("order-1").status == "completed"


def _pending(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask & 1 << (number - 1) for mask in masks)


def _rows_quietly(folder: Path) -> Iterator[str]:
    if (folder / "journal").exists():
        with contextlib.suppress(agentflow.JournalError):
            yield from _rows(folder, "a/")


def _free(folder: Path) -> bool:
    from agentflow.lease import alive, holder
    from agentflow.rundocs import lease_key
    from agentflow.scratch import open_journal

    owner = holder(open_journal(), lease_key("order-1"))
    return owner is None or not alive(owner)


LOCKED = """
def work():
    note("work")
    return "done"

@workflow("order", run_id=lambda: "order-1")
async def order(ctx):
    await step("before", lambda: note("before"))
    (HERE / "ready").touch()
    while sys.argv[1] == "first" and not (HERE / "locked").exists():
        await asyncio.sleep(0.005)
    return await step("s", work)

print("result", order.run_sync())
"""


def test_ctrl_c_while_waiting_for_the_write_lock_leaks_neither_lock_nor_run(folder: Path) -> None:
    program = write_program(LOCKED, folder)
    process = start_program(program, folder, "first")
    until(lambda: (folder / "ready").exists())
    store = next((folder / "journal").rglob("cache.db"))
    held = sqlite3.connect(store, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    (folder / "locked").touch()
    until(lambda: "work" in notes(folder))
    process.send_signal(signal.SIGINT)
    time_given = time.monotonic() + 0.3
    until(lambda: time.monotonic() > time_given)
    held.execute("ROLLBACK")
    process.communicate(timeout=120)
    held.execute("BEGIN IMMEDIATE")
    held.execute("ROLLBACK")
    held.close()
    run = runs.get("order-1")
    assert run.status == "interrupted" and run.error is None and _free(folder)
    assert "result done" in run_program(program, folder, "second").out
    assert counts(folder)["before"] == 1 and counts(folder)["work"] <= 2
    assert [s.status for s in runs.get("order-1").steps] == ["completed", "completed"]


@pytest.mark.parametrize("way", ["thread", "inline", "async", "sync"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_raised_by_a_step_is_no_failure_of_it(folder: Path, again: Any, way: str, kind: Any) -> None:
    def work() -> str:
        note("work")
        if is_set("stop"):
            raise kind
        return "done"

    async def work_async() -> str:
        return work()

    if way == "sync":

        @sync.workflow(f"stop-{way}-{kind.__name__}")
        def flow(ctx: Any) -> str:
            return sync.step("s", work)
    else:

        @workflow(f"stop-{way}-{kind.__name__}")
        async def flow(ctx: Any) -> str:
            return await step("s", work_async if way == "async" else work, thread=way != "inline")

    flag("stop")
    with pytest.raises(kind):
        flow.run_sync()
    run = flow.runs()[0]
    assert run.status == "interrupted" and run.steps == [] and run.error is None
    flag("stop", False)
    again()
    assert flow.run_sync() == "done"
    assert counts(folder)["work"] == 2


# -- paid calls in flight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gather", "group", "parallel", "timeout"])
def test_a_cancelled_sibling_lets_its_paid_call_finish_and_be_recorded(
    folder: Path, again: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    with Loopback(latency=3 if form == "timeout" else 0.3) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

        async def fail() -> str:
            note("fail")
            await asyncio.to_thread(until, lambda: server.arrived)
            fail_while("fail")
            return "fine"

        async def ask() -> str:
            return await generate_content("What is it?", model="openai:gpt-5-mini")

        async def hang() -> None:
            if is_set("fail"):
                await asyncio.Event().wait()

        @workflow(f"cancelled-{form}")
        async def flow(ctx: Any) -> Any:
            if form == "gather":
                return (await asyncio.gather(step("ask", ask), step("fail", fail)))[0]
            if form == "group":
                async with asyncio.TaskGroup() as group:
                    asked = group.create_task(step("ask", ask))
                    group.create_task(step("fail", fail))
                return asked.result()
            if form == "parallel":
                return (await parallel([step("ask", ask), step("fail", fail)]))[0]
            return (await parallel([step("ask", ask), step("hang", hang)], timeout=1.5 if is_set("fail") else None))[0]

        flag("fail")
        with pytest.raises((PaymentError, StepTimeout, ExceptionGroup)):
            flow.run_sync()
        assert len(server.arrived) == len(server.answered) == 1
        flag("fail", False)
        again()
        assert flow.run_sync().startswith("answer to ")
        assert len(server.arrived) == 1


@pytest.mark.parametrize("form", ["gather", "group", "parallel", "in a step"])
@pytest.mark.parametrize("delay", [0.001, pytest.param(1.0, marks=pytest.mark.torture)])
def test_the_next_attempt_uses_the_answer_to_a_call_that_was_in_flight_when_its_sibling_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, delay: float
) -> None:
    """No code has seen it, so nothing was found wrong with it. It comes after the next attempt has begun, or before."""
    with Loopback(latency=0.5) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

        async def fail() -> str:
            await asyncio.to_thread(until, lambda: server.arrived)
            if not counts(folder)["fail"]:
                note("fail")
                raise PaymentError("once")
            return "fine"

        def ask() -> Any:
            return generate_content("What is it?", model="openai:gpt-5-mini")

        async def both() -> Any:
            if form == "group":
                async with asyncio.TaskGroup() as group:
                    asked = group.create_task(ask())
                    group.create_task(fail())
                return asked.result()
            if form == "parallel":
                return (await parallel([ask(), step("fail", fail)]))[0]
            return (await asyncio.gather(step("ask", ask) if form == "in a step" else ask(), fail()))[0]

        @workflow("tried-again")
        async def flow(ctx: Any) -> Any:
            return await step("both", both, retry=Retry(max_attempts=2, initial_delay=delay, jitter=False))

        run = asyncio.run(_start(flow))
        assert run.result().startswith("answer to ")
        assert len(server.arrived) == 1 and run.steps[0].cost == run.cost


async def _start(flow: Any) -> Any:
    return await flow.start()


def test_a_call_that_is_still_connecting_when_its_sibling_fails_is_answered_and_recorded(
    folder: Path, again: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To connect, the HTTP client starts tasks of its own, which are no branches of the run."""
    from agentflow.providers import common, openai

    connecting = threading.Event()

    async def connect() -> None:
        connecting.set()
        # By then all that the run cancels is cancelled.
        await asyncio.to_thread(until, lambda: "waiting for a paid model call in flight" in caplog.text)

    async def client(server: Any) -> Any:
        if is_set("fail"):
            await asyncio.create_task(connect())
        return await common.client(server)

    async def fail() -> str:
        note("fail")
        if is_set("fail"):
            await asyncio.to_thread(connecting.wait)
        fail_while("fail")
        return "fine"

    @workflow("connecting")
    async def flow(ctx: Any) -> Any:
        return await asyncio.gather(generate_content("What is it?", model="openai:gpt-5-mini"), step("fail", fail))

    monkeypatch.setattr(openai, "client", client)
    with Loopback() as server, caplog.at_level("INFO", logger="agentflow"):
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        flag("fail")
        with pytest.raises(PaymentError):
            flow.run_sync()
        assert len(server.arrived) == 1
        flag("fail", False)
        again()
        assert flow.run_sync()[0].startswith("answer to ")
        assert len(server.arrived) == 1


def test_ctrl_c_lets_a_paid_call_in_flight_be_recorded(folder: Path) -> None:
    source = """
    @workflow("order", run_id=lambda: "order-1")
    async def order(ctx):
        return await generate_content("What is it?", model="openai:gpt-5-mini")

    print("result", order.run_sync())
    """
    with Loopback(latency=0.4) as server:
        program = write_program(source, folder)
        process = start_program(program, folder, env=server.environment)
        until(lambda: server.arrived)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        assert runs.get("order-1").status == "interrupted"
        ended = run_program(program, folder, env=server.environment)
        assert "result answer to" in ended.out
        assert len(server.arrived) == 1


# -- attempts of an outer step and what the one before had left at work ---------------------------


@pytest.mark.parametrize("form", ["parallel", "group"])
def test_a_thread_that_a_failed_attempt_left_at_work_is_waited_for_by_the_next(form: str, folder: Path) -> None:
    failed = threading.Event()

    def slow() -> str:
        note("charge")
        failed.wait(30)
        return "paid"

    async def breaks() -> str:
        while "charge" not in words(folder):  # noqa: ASYNC110
            await asyncio.sleep(0)
        if current_step().parent.attempt < 2:
            asyncio.get_running_loop().call_later(0.05, failed.set)
            raise ConnectionError("once more")
        return "ok"

    async def outer() -> list[str]:
        calls = [step("charge", slow), step("breaks", breaks)]
        if form == "parallel":
            return list(await parallel(calls))
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(call) for call in calls]
        return [task.result() for task in made]

    @workflow
    async def trip(ctx: Any) -> list[str]:
        return await step("outer", outer, retry={"max_attempts": 2, **QUICK})

    assert trip.run_sync() == ["paid", "ok"] == trip.run_sync()
    assert words(folder) == ["charge"]


def test_a_branch_of_gather_that_a_failed_attempt_left_at_work_is_waited_for_by_the_next(folder: Path) -> None:
    failed = threading.Event()

    def slow() -> str:
        note("charge")
        failed.wait(30)
        return "paid"

    async def breaks() -> str:
        while "charge" not in words(folder):  # noqa: ASYNC110
            await asyncio.sleep(0)
        if current_step().parent.attempt < 2:
            asyncio.get_running_loop().call_later(0.5, failed.set)
            raise ConnectionError("once more")
        return "ok"

    async def outer() -> list[str]:
        return list(await asyncio.gather(step("charge", slow), step("breaks", breaks)))

    @workflow
    async def trip(ctx: Any) -> list[str]:
        return await step("outer", outer, retry={"max_attempts": 2, **QUICK})

    assert trip.run_sync() == ["paid", "ok"]
    assert words(folder) == ["charge"]


def test_plain_branches_of_a_new_attempt_are_not_those_that_the_failed_one_gave_up(folder: Path) -> None:
    started = threading.Event()

    def slow() -> str:
        note("charge")
        started.set()
        return "paid"

    def breaks() -> str:
        started.wait(30)
        if current_step().parent.attempt < 2:
            raise ConnectionError("once more")
        return "ok"

    def branch() -> str:
        sync.step("charge", slow)
        time.sleep(0.05)
        return sync.step("more", lambda: "more")

    def outer() -> list[str]:
        return sync.parallel([branch, lambda: sync.step("breaks", breaks)])

    @sync.workflow
    def trip(ctx: Any) -> list[str]:
        return sync.step("outer", outer, retry={"max_attempts": 2, **QUICK})

    assert trip.run() == ["more", "ok"] == trip.run()
    assert words(folder) == ["charge"]


def test_plain_branches_inside_a_step_are_not_those_that_the_body_gave_up(folder: Path) -> None:
    started, failed = threading.Event(), threading.Event()

    def breaks() -> None:
        started.wait(30)
        raise ConnectionError("down")

    def branch() -> str:
        sync.step("first", started.set)
        failed.wait(0.1)
        return sync.step("given up", lambda: "never")

    def inside() -> list[int]:
        return sync.parallel([lambda: sync.step("one", lambda: 1), lambda: sync.step("two", lambda: 2)])

    @sync.workflow
    def trip(ctx: Any) -> list[int]:
        try:
            sync.parallel([lambda: sync.step("breaks", breaks), branch])
        except ConnectionError:
            failed.set()
        return sync.step("inside", inside)

    assert trip.run() == [1, 2]
