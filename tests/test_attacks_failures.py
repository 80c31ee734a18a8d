"""Programs that broke a draft of the rules, part two: failures, AI steps, scope."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import agentflow
from agentflow import InvalidReply, NondeterministicStep, Waiting, runs, tasks
from agentflow.testing import FakeModel
from tests.loopback import Loopback
from tests.programs import notes, run_program, write_program

Edition = Callable[[str], ModuleType]
_numbers = itertools.count()

HEAD = """
import asyncio, os
from pathlib import Path
from typing import Any
from pydantic import BaseModel
from agentflow import *

def note(word):
    fd = os.open(Path(os.environ["NOTES"]) / "notes.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{word}\\n".encode())
    os.close(fd)

def on(name):
    return (Path(os.environ["NOTES"]) / f"{name}.flag").exists()

def fail_if(name):
    if on(name):
        raise RuntimeError(f"{name} is out")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    agentflow.configure(model="openai:gpt-5-mini")
    return tmp_path


def flag(name: str, on: bool = True) -> None:
    file = Path(os.environ["NOTES"]) / f"{name}.flag"
    file.touch() if on else file.unlink(missing_ok=True)


@pytest.fixture
def edition(tmp_path: Path, again: Any) -> Iterator[Edition]:
    """Loads a program as its next edition: another module object with the same name, and nothing remembered."""
    name = f"edited_app_{next(_numbers)}"

    def load(source: str) -> ModuleType:
        again()
        file = tmp_path / f"{name}.py"
        file.write_text(HEAD + source)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
        return module

    yield load
    sys.modules.pop(name, None)


def count(folder: Path, word: str) -> int:
    return sum(line.split()[0] == word for line in notes(folder))


# -- failures --------------------------------------------------------------------------------------------------------


def test_30_only_the_failed_step_is_tried_again(folder: Path, edition: Edition) -> None:
    source = """
@workflow
async def flow(ctx):
    topic = await generate_content("a topic")
    await step("check", lambda: note("check") or fail_if("check"))
    return await generate_content(f"about {topic}")
"""
    flag("check")
    with FakeModel(["rivers"]), pytest.raises(RuntimeError):
        edition(source).flow.run_sync()
    flag("check", False)
    with FakeModel(["They flow."]) as model:
        assert edition(source).flow.run_sync() == "They flow."
    assert len(model.calls) == 1 and count(folder, "check") == 2


def test_31_a_swallowed_failure_is_replayed_after_a_crash_and_refunded_once(folder: Path) -> None:
    source = """
    def ship():
        note("ship")
        raise RuntimeError("no stock")

    @workflow
    async def order(ctx):
        await step("charge", lambda: note("charge"))
        try:
            await step("ship", ship)
        except RuntimeError as error:
            if sys.argv[1] == "die":
                die()
            await step("refund", lambda: note("refund"))
            return f"refunded: {error}"

    print(order.run_sync())
    """
    run_program(source, folder, "die", expect_kill=True)
    for _ in range(2):
        assert "refunded: no stock" in run_program(source, folder, "through").out
    assert notes(folder) == ["charge", "ship", "refund"]


def test_32_a_charge_that_was_undone_is_not_shown_as_paid(folder: Path, edition: Edition) -> None:
    source = """
@workflow
async def order(ctx):
    await step("charge", lambda: note("charge") or "paid", compensate=lambda _: note("refund"))
    await step("ship", lambda: fail_if("ship"))
"""
    flag("ship")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            edition(source).order.run_sync()
        steps = runs.list()[0].steps
        assert [s.name for s in steps if s.status == "completed"] == ["undo charge"]
    assert notes(folder) == ["charge", "refund"]


def test_33_what_was_refunded_is_not_shipped_afterwards(folder: Path, edition: Edition) -> None:
    source = """
@workflow
async def order(ctx):
    await step("charge", lambda: note("charge"))
    try:
        await step("ship", lambda: note("ship") or fail_if("ship"))
    except Exception:
        await step("refund", lambda: note("refund"))
        raise
"""
    flag("ship")
    with pytest.raises(RuntimeError):
        edition(source).order.run_sync()
    flag("ship", False)
    with pytest.raises(RuntimeError):
        edition(source).order.run_sync()
    assert notes(folder) == ["charge", "ship", "refund"]


@pytest.mark.parametrize("form", ["gather", "tasks"])
def test_34_both_failed_branches_are_tried_again(folder: Path, edition: Edition, form: str) -> None:
    source = f"""
def work(name):
    note(name)
    if name != "b":
        fail_if("work")
    return name

async def branch(name):
    await step("prepare", lambda: note("prepare"))
    return await step("work", work, name)

@workflow
async def fan(ctx):
    if {form!r} == "gather":
        done = await asyncio.gather(*(branch(name) for name in "abc"), return_exceptions=True)
    else:
        made = [asyncio.create_task(branch(name)) for name in "abc"]
        await asyncio.wait(made)
        done = [task.exception() or task.result() for task in made]
    for one in done:
        if isinstance(one, BaseException):
            raise one
    return done
"""
    flag("work")
    with pytest.raises(RuntimeError):
        edition(source).fan.run_sync()
    flag("work", False)
    assert edition(source).fan.run_sync() == ["a", "b", "c"]
    assert {name: count(folder, name) for name in ("a", "b", "c", "prepare")} == {"a": 2, "b": 1, "c": 2, "prepare": 3}


def test_35_a_crash_in_attempt_2_reuses_what_attempt_2_had_paid_for_and_only_that(folder: Path) -> None:
    source = """
    async def ask():
        answer = await generate_content("a number", model="openai:gpt-5-mini")
        note(f"{current_step().attempt} {answer}")
        if current_step().attempt == 1:
            raise ValueError(answer)
        if sys.argv[1] == "die":
            die()
        return answer

    @workflow
    async def flow(ctx):
        return await step("ask", ask, retry={"max_attempts": 3, "initial_delay": 0.001})

    print("result", flow.run_sync())
    """
    with Loopback(script=[{"text": "one"}, {"text": "two"}, {"text": "three"}]) as server:
        run_program(source, folder, "die", env=server.environment, expect_kill=True)
        assert notes(folder) == ["1 one", "2 two"]
        assert "result two" in run_program(source, folder, "through", env=server.environment).out
        assert len(server.arrived) == 2
    assert notes(folder) == ["1 one", "2 two", "2 two"]


# -- AI steps -----------------------------------------------------------------------------------------------------------


def test_36_a_reply_that_does_not_parse_holds_nobody_up_for_ever(edition: Edition) -> None:
    source = """
@workflow
async def flow(ctx):
    return await generate_content("How many?", output_type=int, reask=0)
"""
    with FakeModel(["many"]) as model, pytest.raises(InvalidReply):
        edition(source).flow.run_sync()
    with FakeModel([7]) as model:
        assert edition(source).flow.run_sync() == 7
    assert len(model.calls) == 1


def test_36_the_same_where_a_step_parses(edition: Edition) -> None:
    source = """
async def ask():
    return int(await generate_content("How many?"))

@workflow
async def flow(ctx):
    return await step("ask", ask)
"""
    with FakeModel(["many"]), pytest.raises(ValueError):
        edition(source).flow.run_sync()
    with FakeModel(["7"]) as model:
        assert edition(source).flow.run_sync() == 7
    assert len(model.calls) == 1


def test_37_a_fixed_parser_uses_the_paid_reply(edition: Edition) -> None:
    source = """
async def ask():
    answer = await generate_content("How many?")
    return int(answer)

@workflow
async def flow(ctx):
    return await step("ask", ask)
"""
    with FakeModel(["n=7"]), pytest.raises(ValueError):
        edition(source).flow.run_sync()
    with FakeModel([]):
        assert edition(source.replace("int(answer)", 'int(answer.removeprefix("n="))')).flow.run_sync() == 7


def test_37_an_edited_schema_tries_the_paid_reply_first(edition: Edition) -> None:
    source = """
class Count(BaseModel):
    number: int

@workflow
async def flow(ctx):
    return (await generate_content("How many?", output_type=Count, reask=0)).number
"""
    with FakeModel(['{"number": "many"}']), pytest.raises(InvalidReply):
        edition(source).flow.run_sync()
    with FakeModel([]):
        assert edition(source.replace("number: int", "number: str")).flow.run_sync() == "many"


def test_37_edited_post_processing_gives_a_new_result_and_buys_nothing(edition: Edition) -> None:
    source = """
async def ask():
    return (await generate_content("How many?")).upper()

@workflow
async def flow(ctx):
    return await step("ask", ask)
"""
    with FakeModel(["seven"]):
        assert edition(source).flow.run_sync() == "SEVEN"
    with FakeModel([]):
        assert edition(source.replace("upper", "title")).flow.run_sync() == "Seven"
        assert edition(source).flow.run_sync() == "SEVEN"


def test_38_a_helper_two_levels_down_that_changes_the_request_asks_again(edition: Edition) -> None:
    source = """
TONE = "friendly"

def tone():
    return TONE

def prompt_for(topic):
    return f"{tone()}: {topic}"

async def ask(topic):
    return await generate_content(prompt_for(topic))

@workflow
async def flow(ctx):
    return await step("ask", ask, "rivers")
"""
    with FakeModel(["Hi!"]):
        assert edition(source).flow.run_sync() == "Hi!"
    with FakeModel(["Well."]) as model:
        assert edition(source.replace("friendly", "formal")).flow.run_sync() == "Well."
        assert len(model.calls) == 1
    with FakeModel([]):
        assert edition(source).flow.run_sync() == "Hi!"


def test_38_an_inner_prompt_is_noticed_inside_a_step_that_does_not_look_like_ai(edition: Edition) -> None:
    source = """
class Tools:
    def __init__(self):
        self.ask = lambda topic: generate_content("Tell me about " + topic)

def pick(tools, name):
    return getattr(tools, name)

async def work(topic):
    return await pick(Tools(), "a" + "sk")(topic)

@workflow
async def flow(ctx):
    return await step("work", work, "rivers")
"""
    with FakeModel(["one"]):
        assert edition(source).flow.run_sync() == "one"
    with FakeModel(["two"]) as model:
        assert edition(source.replace("Tell me", "Sing to me")).flow.run_sync() == "two"
        assert len(model.calls) == 1


@pytest.mark.parametrize("form", ["call", "step"])
def test_39_another_default_model_is_asked(edition: Edition, form: str) -> None:
    source = f"""
async def ask():
    return await generate_content("How many?")

@workflow
async def flow(ctx):
    return await (ask() if {form!r} == "call" else step("ask", ask))
"""
    with FakeModel(["seven"]):
        assert edition(source).flow.run_sync() == "seven"
    agentflow.configure(model="openai:gpt-5")
    with FakeModel(["eight"]) as model:
        assert edition(source).flow.run_sync() == "eight"
    assert [call["model"] for call in model.calls] == ["gpt-5"]
    agentflow.configure(model="openai:gpt-5-mini")
    with FakeModel([]):
        assert edition(source).flow.run_sync() == "seven"


@pytest.mark.parametrize("form", ["call", "step"])
def test_40_rerun_asks_anew_and_the_new_answer_stays(edition: Edition, form: str) -> None:
    source = f"""
async def ask():
    return await generate_content("A draft", name="draft" if {form!r} == "call" else "inner")

@workflow
async def flow(ctx):
    draft = await (ask() if {form!r} == "call" else step("draft", ask))
    return await step("finish", lambda d=draft: note("finish") or d + "!")
"""
    with FakeModel(["one"]):
        assert edition(source).flow.run_sync() == "one!"
    with FakeModel(["two"]) as model:
        assert edition(source).flow.options(rerun=["draft"]).run_sync() == "two!"
        assert len(model.calls) == 1
    with FakeModel([]):
        assert edition(source).flow.run_sync() == "two!"


def test_41_the_first_branchs_record_is_still_there_after_an_edit_and_back(folder: Path, edition: Edition) -> None:
    source = """
@workflow
async def flow(ctx):
    kind = await generate_content("Bug or wish?")
    if kind == "bug":
        return await step("bug", lambda: note("bug") or "fixed")
    return await step("wish", lambda: note("wish") or "granted")
"""
    with FakeModel(["bug"]):
        assert edition(source).flow.run_sync() == "fixed"
    with FakeModel(["wish"]):
        assert edition(source.replace("Bug or", "Complaint or")).flow.run_sync() == "granted"
    with FakeModel([]):
        assert edition(source).flow.run_sync() == "fixed"
    assert notes(folder) == ["bug", "wish"]


def test_42_an_edited_ai_step_sends_its_mail_once_where_the_mail_is_a_step(folder: Path, edition: Edition) -> None:
    source = """
def mail(text):
    note("mail")

async def answer():
    text = await generate_content("Answer the letter")
    await step("mail", mail, text)
    return text.upper()

@workflow
async def flow(ctx):
    return await step("answer", answer)
"""
    with FakeModel(["Dear"]):
        assert edition(source).flow.run_sync() == "DEAR"
    with FakeModel([]):
        assert edition(source.replace("upper", "lower")).flow.run_sync() == "dear"
    assert notes(folder) == ["mail"]


# -- scope ----------------------------------------------------------------------------------------------------------------


def test_43_a_nested_charge_with_a_key_is_charged_once_whatever_its_outer_step_was_given(
    folder: Path, edition: Edition
) -> None:
    source = """
async def book(label):
    return await step("charge", lambda: note("charge") or "paid", idempotency_key="order-7")

@workflow
async def flow(ctx):
    return await step("book", book, "Trip")
"""
    assert edition(source).flow.run_sync() == "paid"
    assert edition(source.replace('"Trip"', '"trip"')).flow.run_sync() == "paid"
    assert notes(folder) == ["charge"]


def test_43_without_a_key_an_inner_step_belongs_to_what_its_outer_step_was_given(
    folder: Path, edition: Edition
) -> None:
    source = """
async def book(label):
    return await step("charge", lambda: note("charge") or "paid")

@workflow
async def flow(ctx):
    return await step("book", book, "Trip")
"""
    assert edition(source).flow.run_sync() == "paid"
    assert edition(source.replace('"Trip"', '"trip"')).flow.run_sync() == "paid"
    assert notes(folder) == ["charge", "charge"]


def test_44_other_data_is_another_task(edition: Edition) -> None:
    source = """
@workflow
async def flow(ctx):
    return bool(await human_task("approve", "manager", {"amount": 100}))
"""
    with pytest.raises(Waiting) as first:
        edition(source).flow.run_sync()
    with pytest.raises(Waiting) as second:
        edition(source.replace("100", "900")).flow.run_sync()
    one, two = first.value.waiting_on[0]["id"], second.value.waiting_on[0]["id"]
    assert one != two
    assert tasks.get(one).status == "withdrawn"
    assert [task.id for task in tasks.list()] == [two]
    tasks.approve(two, by="ann")
    assert edition(source.replace("100", "900")).flow.run_sync() is True


def test_44_an_approval_does_not_cover_what_was_edited_afterwards(edition: Edition) -> None:
    source = """
@workflow
async def flow(ctx):
    return bool(await human_task("approve", "manager", {"amount": 100}))
"""
    with pytest.raises(Waiting) as waits:
        edition(source).flow.run_sync()
    tasks.approve(waits.value.waiting_on[0]["id"])
    with pytest.raises(Waiting):
        edition(source.replace("100", "900")).flow.run_sync()


def test_44_a_clock_in_the_data_is_named_and_not_asked_about_for_ever(edition: Edition) -> None:
    source = """
import time

@workflow
async def flow(ctx):
    return bool(await human_task("approve", "manager", {"amount": 100, "at": time.time()}))
"""
    app = edition(source)
    with pytest.raises(Waiting) as waits:
        app.flow.run_sync()
    tasks.approve(waits.value.waiting_on[0]["id"])
    with pytest.raises(NondeterministicStep, match="at"):
        edition(source).flow.run_sync()


def test_45_a_polling_loop_in_a_script_ends_and_is_replayed_by_the_next_process(folder: Path) -> None:
    source = """
    def poll():
        note("poll")
        return (HERE / "notes.txt").read_text().count("poll")

    async def main():
        for asked in range(1, 10):
            if await step("poll", poll) == 3:
                return asked

    print("asked", asyncio.run(main()))
    """
    for _ in range(2):
        assert "asked 3" in run_program(source, folder).out
    assert notes(folder) == ["poll"] * 3


def test_45_an_edited_plain_function_gives_the_new_result_outside_a_workflow(edition: Edition) -> None:
    source = """
def double(x):
    return x * 2

def cell():
    return asyncio.run(run())

async def run():
    return await step("double", double, 21)
"""
    assert edition(source).cell() == 42
    assert edition(source).cell() == 42
    assert edition(source.replace("x * 2", "x * 3")).cell() == 63
    assert edition(source).cell() == 42


def test_46_what_crashed_as_main_is_resumed_by_one_that_imports_it(folder: Path) -> None:
    source = """
    from dataclasses import dataclass

    @dataclass
    class Order:
        id: str
        amount: int

    @dataclass
    class Receipt:
        order: Order

    def charge(order):
        note("charge")
        return Receipt(order)

    @workflow
    async def purchase(ctx, order: Order) -> str:
        receipt = await step("charge", charge, order)
        if sys.argv[1:] == ["die"]:
            die()
        return await step("thank", lambda: f"thanks for {receipt.order.amount}")

    if __name__ == "__main__":
        purchase.run_sync(Order("7", 100))
    """
    program = write_program(source, folder, "app.py")
    run_program(program, folder, "die", expect_kill=True)
    worker = folder / "worker.py"
    worker.write_text("import app\nprint(app.purchase.run_sync(app.Order('7', 100)))\n")
    assert "thanks for 100" in run_program(worker, folder).out
    assert notes(folder) == ["charge"]
    assert len(runs.list()) == 1
    resumed = folder / "resumed.py"
    resumed.write_text(
        "import app, asyncio\nfrom agentflow import runs\nprint(asyncio.run(again()))\n".replace(
            "print(", "async def again():\n    return await runs.list()[0]\nprint("
        )
    )
    assert "thanks for 100" in run_program(resumed, folder).out
    assert notes(folder) == ["charge"]
