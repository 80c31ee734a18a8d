"""Cards, progress and buttons in notebooks: in real kernels, by the messages that a frontend gets and sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentflow import (
    Plan,
    Prompt,
    Reply,
    Retry,
    Waiting,
    configure,
    embed,
    generate_content,
    human_task,
    runs,
    step,
    tasks,
    tool,
    workflow,
)
from agentflow.models import Usage
from agentflow.records import PlanStep
from agentflow.rich import Listed
from agentflow.testing import FakeModel, ToolCall
from tests.kernels import SECONDS, Kernel, Output
from tests.programs import ROOT, environment

KEY = "sk-ant-api03-abcdefghijklmnop1234567890"
HOSTILE = "<script>alert(1)</script><img src=http://evil/x onerror=alert(2)>\"'&\u202e\x1b[31m"
PRELUDE = """
import asyncio, threading, time
from pathlib import Path
from typing import Literal
import agentflow
from agentflow import *
from pydantic import BaseModel, field_validator

async def file(name):
    while not Path(name).exists():
        await asyncio.sleep(0.005)
    return name
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("notebook")
    (made / "pyproject.toml").touch()
    return made


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[Kernel]:
    with Kernel(folder, {"LOGNAME": "grace"}) as made:
        assert not made.run(PRELUDE).error
        yield made


@pytest.fixture(autouse=True)
def no_widgets(request: pytest.FixtureRequest) -> None:
    """Each test sees the widgets that it has displayed itself."""
    if "kernel" in request.fixturenames:
        request.getfixturevalue("kernel").widgets.clear()


@pytest.fixture
def outside(folder: Path) -> Path:
    """The kernel's journal, opened by the process of the test."""
    path = Path(environment(folder)["AGENTFLOW_PATH"])
    configure(path=path)
    return path


def clean(output: Output) -> Output:
    """A cell that ended well and said nothing on stderr."""
    assert (output.error, output.said) == ("", ""), output
    return output


def types(output: Output) -> list[str]:
    return [message["msg_type"] for message in output.messages]


def few(output: Output) -> None:
    """Updates come a while after the one before. The last one does not wait: the cell ends."""
    times = [message["header"]["date"].timestamp() for message in output.messages]
    assert all(later - earlier > 0.19 for earlier, later in zip(times, times[1:-1])), times


class Tags(HTMLParser):
    """The elements and attributes of a card."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def said(kernel: Kernel) -> str:
    """What the forms say that have been displayed in this test."""
    kernel.refresh()
    return "\n".join(Tags(each["value"]).text for each in kernel.widgets.values() if each.get("_model_name") == "HTMLModel")


# -- a run while it executes -----------------------------------------------------------------------------


def test_a_running_workflow_is_one_display_updated_in_place_that_ends_as_the_card_of_the_run(kernel: Kernel, folder: Path) -> None:
    seen: list[str] = []

    def let_it_go_on(message: dict[str, Any]) -> None:
        html = message["content"].get("data", {}).get("text/html", "")
        seen.append(html)
        text = Tags(html).text if html else ""
        if "running" in text and "slow" in text and "2 attempts" in text:
            (folder / "go").touch()

    output = kernel.run(
        """
tries = []
async def slow():
    tries.append(1)
    if len(tries) == 1:
        raise ConnectionError("the server hung up")
    return await file("go")

@workflow("progress")
async def progress(ctx, n: int):
    await step("quick", lambda: n)
    return await step("slow", slow, retry=Retry(max_attempts=2, initial_delay="1ms"))

await progress.run(1);
""",
        let_it_go_on,
    )
    clean(output)
    assert types(output)[0] == "display_data" and set(types(output)[1:]) == {"update_display_data"}, types(output)
    assert len(output.displays) == 1
    live = [Tags(html).text for html in seen if html and "● running" in html]
    assert any("attempt 1: ConnectionError: the server hung up" in text for text in live)
    final = Tags(output.displays[0]["text/html"]).text
    assert "● completed" in final and "progress-" in final and "2 steps: 0 replayed, 2 run" in final
    assert "quick" in final and "2 attempts" in final and "attempt 1: ConnectionError: the server hung up" in final
    assert output.displays[0]["text/plain"].startswith("progress-") and "· completed · 2 steps: 0 replayed, 2 run" in output.shown


def test_updates_come_at_most_five_times_a_second(kernel: Kernel) -> None:
    output = clean(kernel.run("""
@workflow("many-steps")
async def many_steps(ctx, n: int):
    async def tick(i):
        await asyncio.sleep(0.004)
        return i
    for i in range(n):
        await step("tick", tick, i)
await many_steps.run(150)
"""))
    assert len(output.messages) > 2
    few(output)
    final = Tags(output.html).text
    assert "150 steps: 0 replayed, 150 run" in final and "… 118 more steps" in final


@pytest.mark.parametrize(
    "body",
    [
        "import agentflow.sync as plain\n@plain.workflow('plain-{n}')\ndef flow(ctx, n: int):\n    return plain.step('add', lambda: n + 1)\nassert flow.run({n}) == {n} + 1",
        "@workflow('async-{n}')\nasync def flow(ctx, n: int):\n    return await step('add', lambda: n + 1)\nassert flow.run_sync({n}) == {n} + 1",
        "@workflow('threaded-{n}')\nasync def flow(ctx, n: int):\n    return await step('add', lambda: n + 1)\nthread = threading.Thread(target=flow.run_sync, args=({n},))\nthread.start()\nthread.join()",
    ],
    ids=["plain code", "run_sync", "a thread in the background"],
)
def test_plain_code_run_sync_and_threads_show_their_runs_too(kernel: Kernel, body: str) -> None:
    output = clean(kernel.run(body.format(n=1)))
    assert "● completed" in output.html and "1 step: 0 replayed, 1 run" in output.shown
    assert types(output)[0] == "display_data" and len(output.displays) == 1
    again = clean(kernel.run(body.format(n=1)))
    assert "1 step: 1 replayed, 0 run" in again.shown and "completed before" in again.shown
    assert "af-bar af-completed af-replayed" in again.html


def test_runs_at_once_in_one_cell_share_a_display_with_the_failed_one_unfolded(kernel: Kernel) -> None:
    output = kernel.run("""
@workflow("at-once")
async def at_once(ctx, n: int):
    return await step("divide", lambda: 6 // n)
found = await asyncio.gather(at_once.start(1), at_once.start(0), at_once.start(2))
print([run.status for run in found])
""")
    clean(output)
    assert output.printed == "['completed', 'failed', 'completed']\n" and len(output.displays) == 1
    html = output.displays[0]["text/html"]
    assert html.count("<details") >= 3 and html.count("<details open>") == 1 and html.count("<style>") == 1
    assert "ZeroDivisionError" in html.partition("<details open>")[2]
    assert output.shown.count("at-once-") == 3


def test_of_many_runs_in_a_cell_the_newest_are_shown_and_the_others_counted(kernel: Kernel) -> None:
    output = clean(kernel.run("""
@workflow("one-of-many")
async def one_of_many(ctx, n: int):
    return n
for n in range(35):
    await one_of_many.run(n)
"""))
    assert len(output.displays) == 1 and "15 earlier runs of this cell" in output.shown and output.shown.count("completed") == 20
    few(output)


def test_a_child_run_stands_below_the_run_that_started_it(kernel: Kernel) -> None:
    output = clean(kernel.run("""
@workflow("inner-run")
async def inner_run(ctx, n: int):
    return await step("inside", lambda: n)
@workflow("outer-run")
async def outer_run(ctx, n: int):
    return await inner_run.run(n)
await outer_run.run(1);
"""))
    html = output.displays[0]["text/html"]
    assert html.index("outer-run") < html.index("<details") < html.index("inner-run")


def test_a_run_that_fails_says_in_which_step_and_what_to_do(kernel: Kernel) -> None:
    output = kernel.run("""
@workflow("fails")
async def fails(ctx, n: int):
    await step("before", lambda: n)
    return await step("charge", lambda: 1 // 0)
await fails.run(1)
""")
    assert "ZeroDivisionError" in output.error and output.said == ""
    text = Tags(output.html).text
    assert "● failed" in text and "charge · ZeroDivisionError: integer division or modulo by zero" in text
    assert "what is finished is replayed; charge is tried again" in text
    assert text.count("integer division") == 1, "said once"


def test_an_interrupted_run_says_that_it_goes_on(kernel: Kernel) -> None:
    def interrupt(message: dict[str, Any]) -> None:
        if "hangs" in message["content"].get("data", {}).get("text/html", "") and not interrupted:
            interrupted.append(True)
            kernel.manager.interrupt_kernel()

    interrupted: list[bool] = []

    output = kernel.run(
        """
import agentflow.sync
@agentflow.sync.workflow("interrupted")
def interrupted(ctx, n: int):
    return agentflow.sync.step("hangs", lambda: time.sleep(3600))
interrupted.run(1)
""",
        interrupt,
    )
    assert output.error and "● interrupted" in output.html and "Run it again, and it goes on where it was." in Tags(output.html).text


def test_a_run_that_waits_prints_one_line_and_no_traceback_and_shows_what_would_be_approved(kernel: Kernel) -> None:
    output = kernel.run("""
@workflow("mails")
async def mails(ctx, to: str):
    return (await human_task("approve", assign_to="ada", title="Send it?", data={"to": to, "text": "Dear all,\\nhello"})).approved
await mails.run("everybody")
""")
    (line,) = output.error.splitlines()
    assert line.startswith("Waiting: run mails-") and "agentflow tasks approve t-" in line
    text = Tags(output.html).text
    assert "● waiting" in text and "Send it?" in text and "for ada" in text and "Dear all,\nhello" in text
    assert 'tasks.approve("t-' in text and "agentflow tasks approve t-" in text


def test_a_run_that_is_the_result_of_its_cell_has_one_card_and_one_line(kernel: Kernel) -> None:
    output = clean(kernel.run("""
@workflow("returned")
async def returned(ctx, n: int):
    return await step("add", lambda: n + 1)
await returned.start(1)
"""))
    board, result = output.displays
    assert "add" in Tags(result["text/html"]).text and "● completed" in result["text/html"]
    assert "add" not in Tags(board["text/html"]).text and "1 step: 0 replayed, 1 run" in Tags(board["text/html"]).text


def test_what_is_said_of_a_run_stands_on_its_card_and_reaches_the_programs_own_log(kernel: Kernel) -> None:
    output = clean(kernel.run("""
import logging
heard = []
class Keep(logging.Handler):
    def emit(self, record): heard.append(record.getMessage())
keep = Keep()
logging.getLogger("agentflow").addHandler(keep)
counts = []
@workflow("talks")
async def talks(ctx, n: int):
    return await step("count", lambda: counts.append(n))
await talks.run(1)
logging.getLogger("agentflow").removeHandler(keep)
print(*heard, sep="\\n")
"""))
    assert "count: changes counts itself; that will not be compared" in output.html
    assert "count: changes counts itself" in output.printed and "· completed · 1 step" in output.printed


@pytest.mark.parametrize("how", ["configure(progress=False)", "import os; os.environ['AGENTFLOW_PROGRESS'] = '0'"])
def test_progress_can_be_turned_off_and_is_then_said_on_stderr_as_elsewhere(kernel: Kernel, how: str) -> None:
    body = f"""
{how}
@workflow("quiet-{len(how)}")
async def quietly(ctx, n: int):
    return await step("add", lambda: n + 1)
await quietly.run(1);
"""
    output = kernel.run(body)
    kernel.run("configure(progress=None); import os; os.environ.pop('AGENTFLOW_PROGRESS', None)")
    assert output.messages == [] and "completed · 1 step: 0 replayed, 1 run" in output.said
    assert "completed before" in kernel.run("await quietly.run(1);").shown


def test_a_display_that_fails_stops_no_run_and_what_it_did_is_said(kernel: Kernel) -> None:
    output = kernel.run("""
from agentflow import runcards
kept, runcards.ended = runcards.ended, None
try:
    @workflow("no-display")
    async def no_display(ctx, n: int):
        return await step("add", lambda: n + 1)
    print(await no_display.run(1))
finally:
    runcards.ended = kept
""")
    assert output.printed == "2\n" and output.error == ""
    assert "the display of runs in this cell failed" in output.said and "completed · 1 step" in output.said


# -- buttons ---------------------------------------------------------------------------------------------

ASKS = """
@workflow("asks-{name}")
async def asks(ctx, n: int):
    decision = await human_task("approve", assign_to="ada", title="Pay {name}?", data={{"amount": n}})
    return await step("pay", lambda: f"{{decision.approved}} {{decision.by}} {{decision.comment}}")
"""


def test_approve_goes_through_tasks_and_says_how_to_go_on(kernel: Kernel, outside: Path) -> None:
    output = kernel.run(ASKS.format(name="approve") + "await asks.run(1)")
    assert any("application/vnd.jupyter.widget-view+json" in each for each in output.displays)
    kernel.fill(kernel.find("TextModel", placeholder="comment (may be empty)"), "fine")
    kernel.click("Approve")
    (task,) = [each for each in tasks.list(status=None) if each.title == "Pay approve?"]
    assert task.status == "approved" and task.decision is not None
    assert (task.decision.by, task.decision.comment) == ("grace", "fine")
    told = said(kernel)
    assert "approved by grace. Run the cell again, and the run goes on." in told
    assert kernel.widgets[kernel.find("ButtonModel", description="Approve")]["disabled"]
    assert kernel.printed("print(await asks.run(1))") == "True grace fine\n"


def test_a_second_decision_is_refused_and_the_first_is_shown(kernel: Kernel) -> None:
    kernel.run(ASKS.format(name="second") + "await asks.run(2)")
    kernel.run('[found] = [t for t in tasks.list() if t.title == "Pay second?"]; tasks.reject(found.id, by="bob", comment="too dear")')
    kernel.click("Approve")
    told = said(kernel)
    assert "was rejected already, by bob" in told
    assert kernel.printed("print(await asks.run(2))") == "False bob too dear\n"


FORM = """
class Refund(BaseModel):
    amount: int
    reason: Literal["late", "broken"]
    notify: bool
    note: str | None = None
    parts: list[str] = []
    @field_validator("amount")
    @classmethod
    def small(cls, value):
        assert value < 1000, "ask the director"
        return value

@workflow("form")
async def form(ctx, who: str):
    return await human_task("fill in", assign_to="ada", title=f"Refund for {who}", schema=Refund)
"""


def test_a_form_has_the_fields_of_the_schema_says_what_does_not_fit_and_takes_what_does(kernel: Kernel) -> None:
    kernel.run(FORM + 'await form.run("Bob")')
    amount, note = kernel.find("TextModel", placeholder="whole number"), kernel.find("TextModel", placeholder="text")
    parts, reason = kernel.find("TextareaModel", placeholder="JSON"), kernel.find("DropdownModel")
    assert kernel.widgets[reason]["_options_labels"] == ["late", "broken"]
    notify = kernel.find("CheckboxModel")

    kernel.click("Send")
    assert "amount needs an answer" in said(kernel)
    kernel.fill(amount, "many")
    kernel.click("Send")
    assert "amount='many' has to be a whole number" in said(kernel)
    kernel.fill(amount, "2000")
    kernel.click("Send")
    assert "ask the director" in said(kernel), "by the type's own validator"
    for field, value in ((amount, "30"), (note, "the parcel was wet"), (parts, '["box", "tape"]'), (reason, 1), (notify, True)):
        kernel.fill(field, value)
    kernel.click("Send")
    assert "answered by grace" in said(kernel)
    got = kernel.printed('print(await form.run("Bob"))')
    assert got == "amount=30 reason='broken' notify=True note='the parcel was wet' parts=['box', 'tape']\n"


def test_a_form_that_is_filled_in_by_the_data_shown_keeps_what_is_not_changed(kernel: Kernel) -> None:
    kernel.run(FORM.replace('"form"', '"filled"').replace("schema=Refund", 'schema=Refund, data=Refund(amount=5, reason="broken", notify=True, note="so far")'))
    kernel.run('await form.run("Eve")')
    assert kernel.widgets[kernel.find("TextModel", placeholder="whole number")]["value"] == "5"
    kernel.fill(kernel.find("TextModel", placeholder="whole number"), "6")
    kernel.click("Send")
    assert kernel.printed('print(await form.run("Eve"))') == "amount=6 reason='broken' notify=True note='so far' parts=[]\n"


def test_a_field_holds_no_masked_secret_and_one_that_is_emptied_is_empty(kernel: Kernel) -> None:
    kernel.run(f"KEY = {KEY!r}" + """
class Access(BaseModel):
    key: str
    note: str | None
    count: int = 3
    text: str = "so far"
@workflow("access")
async def access(ctx, who: str):
    return await human_task("fill in", title=who, schema=Access, data=Access(key=KEY, note="a note"))
await access.run("Dan")
""")
    assert "abcdefghijklmnop" not in json.dumps(kernel.widgets)
    count, text = (kernel.find("TextModel", value=value) for value in ("3", "so far"))
    kernel.fill(count, "")
    kernel.click("Send")
    assert "count needs an answer" in said(kernel)
    for field, value in ((count, "4"), (text, ""), (kernel.find("TextModel", value="a note"), "")):
        kernel.fill(field, value)
    kernel.click("Send")
    assert "abcdefghijklmnop" not in json.dumps(kernel.widgets)
    assert kernel.printed('made = await access.run("Dan"); print(made.key == KEY, repr(made.note), made.count, repr(made.text))') == "True '' 4 ''\n"


def test_a_task_for_data_without_a_schema_takes_json_or_text(kernel: Kernel) -> None:
    kernel.run("""
@workflow("free")
async def free(ctx, n: int):
    return (await human_task("input", title=f"What is {n}?")).data
await free.run(1)
""")
    kernel.fill(kernel.find("TextareaModel"), '{"a": [1]}')
    kernel.click("Answer")
    assert kernel.printed("print(await free.run(1))") == "{'a': [1]}\n"


def test_a_cell_that_waits_goes_on_when_the_button_is_pressed(kernel: Kernel) -> None:
    pressed: list[str] = []

    def press(message: dict[str, Any]) -> None:
        if "application/vnd.jupyter.widget-view+json" in message["content"].get("data", {}) and not pressed:
            pressed.append(kernel.press("Approve"))

    output = kernel.run(ASKS.format(name="waits") + "print(await asks.options(wait=True).run(3))", press)
    assert pressed and output.printed == "True grace None\n" and output.error == "" and output.said == ""
    assert "● completed" in output.html
    kernel.run("1")
    assert "approved by grace" in said(kernel)


def test_a_form_takes_the_last_of_several_changes_while_its_cell_waits(kernel: Kernel) -> None:
    cell = kernel.begin(FORM.replace('"form"', '"form-waits"') + 'print(await form.options(wait=True).run("Ida"))')
    amount = kernel.wait_for("TextModel", placeholder="whole number")
    # A frontend sends the next change of a field when the kernel has said that it has dealt with the one before.
    for typed in ("many", "4", "42"):
        kernel.fill(amount, typed)
        if typed == "many":
            kernel.click("Send")
            assert "has to be a whole number" in str(kernel.widgets)
    kernel.press("Send")
    assert kernel.end(cell) == "amount=42 reason='late' notify=False note=None parts=[]\n"
    assert "answered by grace" in said(kernel) and '"amount": 42' in said(kernel)


def test_while_a_cell_waits_a_decision_from_elsewhere_closes_its_form(kernel: Kernel, outside: Path) -> None:
    def decide(message: dict[str, Any]) -> None:
        if "application/vnd.jupyter.widget-view+json" in message["content"].get("data", {}):
            (task,) = [each for each in tasks.list() if each.title == "Pay elsewhere?"]
            tasks.approve(task.id, by="heidi")

    output = kernel.run(ASKS.format(name="elsewhere") + "print(await asks.options(wait=True).run(4))", decide)
    assert output.printed == "True heidi None\n"
    assert "approved by heidi." in said(kernel)


def test_a_cell_that_holds_up_the_kernel_shows_no_buttons_but_what_to_type(kernel: Kernel, outside: Path) -> None:
    def decide(message: dict[str, Any]) -> None:
        if "agentflow tasks approve t-" in message["content"].get("data", {}).get("text/html", ""):
            for task in tasks.list():
                if task.title == "Pay blocked?":
                    tasks.approve(task.id, by="heidi")

    output = kernel.run(ASKS.format(name="blocked") + "print(asks.options(wait=True).run_sync(5))", decide)
    assert output.printed == "True heidi None\n" and len(output.displays) == 1


def test_a_waiting_run_a_task_and_the_list_of_tasks_have_buttons_wherever_they_are_displayed(kernel: Kernel) -> None:
    kernel.run(ASKS.format(name="lists") + "await asks.run(6)")
    for shown in ("asks.runs()[0]", "tasks.list()[-1]", "tasks.list()", "runs.get(asks.runs()[0].id)"):
        kernel.widgets.clear()
        (display,) = clean(kernel.run(shown)).displays
        assert {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"} <= set(display)
        assert kernel.find("ButtonModel", description="Approve") and "Pay lists?" in display["text/plain"]


def test_without_ipywidgets_the_card_shows_the_line_to_type(kernel: Kernel) -> None:
    output = kernel.run(ASKS.format(name="bare") + """
import sys
hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "ipywidgets"}
sys.modules["ipywidgets"] = None
try:
    await asks.run(7)
finally:
    sys.modules.update(hidden)
""")
    (display,) = output.displays
    assert set(display) == {"text/plain", "text/html"} and "Waiting: run asks-bare-" in output.error
    assert 'tasks.approve("t-' in Tags(display["text/html"]).text and "agentflow tasks approve t-" in display["text/plain"]


def test_hostile_titles_and_fields_are_text_in_a_form(kernel: Kernel) -> None:
    kernel.run(f"HOSTILE = {HOSTILE!r}\n" + """
Hostile = type("Hostile", (BaseModel,), {"__annotations__": {"x": Literal[HOSTILE, "b"], "y": str}, "y": HOSTILE})
@workflow("hostile-form")
async def hostile_form(ctx, n: int):
    return await human_task(HOSTILE, assign_to=HOSTILE, title=HOSTILE, schema=Hostile, data={"x": HOSTILE})
await hostile_form.run(1)
""")
    for state in kernel.widgets.values():
        if state["_model_name"] == "HTMLModel":
            assert not {"script", "img"} & Tags(state["value"]).found
        assert not state.get("description_allow_html")


# -- cards of objects ------------------------------------------------------------------------------------


async def everything(word: str) -> list[Any]:
    """One of each object that has a card, with ``word`` wherever a program puts words."""

    @workflow(word[:60])
    async def flow(ctx: Any, text: str) -> str:
        ctx_steps.append(ctx.steps)
        await step(word, lambda: {"text": word, "list": [word]})
        await generate_content(word, model="openai:scripted")
        await human_task(word, assign_to=word, title=word, data={"text": word})
        return text

    @workflow("boom")
    async def boom(ctx: Any, text: str) -> None:
        def fail() -> None:
            raise ValueError(word)

        await step("boom", fail, retry=Retry(max_attempts=2, initial_delay=0))

    ctx_steps: list[Any] = []
    with FakeModel(lambda request: word):
        with pytest.raises(Waiting) as waiting:
            await flow.run(word)
        open_task = tasks.list()[0]
        open_tasks = tasks.list()
        waits = runs.list()[0]
        tasks.approve(open_task.id, by=word, comment=word)
        await flow.run(word)
    plan = await flow.plan(word + "!")
    plan.steps.append(PlanStep(word, "changed", word, f"- {word}\n+ {word}"))
    failed = await boom.start(word)
    reply = Reply(word, word, [{"role": "user", "content": word}], Usage(1, 2), Decimal("0.1"), word, word)
    prompt = Prompt(word, name=word, system=word, model=word, earlier=({"role": "user", "content": word},))
    done = runs.list(workflow=word[:60])[0]
    return [
        waiting.value, waits, open_task, open_tasks, done, failed, plan, reply, prompt, runs.list(), done.steps, failed.steps[0],
        done.steps[0], tasks.get(open_task.id), tasks.list(status=None), ctx_steps[0],
    ]  # fmt: skip


async def test_whatever_an_object_holds_its_card_is_text_between_a_few_harmless_elements() -> None:
    for value in await everything(HOSTILE):
        html = value._repr_html_()
        tags = Tags(html)
        assert tags.found <= {"style", "div", "span", "code", "pre", "b", "details", "summary"}, (type(value), tags.found)
        assert tags.attributes <= {"class", "style", "open"}, (type(value), tags.attributes)
        assert "alert(1)" in tags.text, type(value)
        assert "\u202e" not in html and "\x1b" not in html
        assert "mathjax_ignore" in html, "what stands between two dollar signs is no formula"
        assert "url(" not in html and "@import" not in html, "nothing is fetched"


async def test_keys_are_masked_on_every_card_and_in_its_words() -> None:
    for value in await everything(f"use {KEY} here"):
        made = value._repr_mimebundle_()
        assert set(made) == {"text/plain", "text/html"}
        for text in made.values():
            assert "[redacted:anthropic-key]" in text and "abcdefghijklmnop" not in text, (type(value), text)


async def test_what_configure_names_is_masked_too() -> None:
    configure(redact={"customer": r"CUST-\d+"})
    for value in await everything("about CUST-1234"):
        assert "CUST-1234" not in "".join(value._repr_mimebundle_().values()), type(value)


async def test_long_values_are_cut_and_huge_ones_not_looked_at_to_their_end() -> None:
    @workflow
    async def large(ctx: Any, text: str) -> Any:
        return await step("make", lambda: {"rows": [{"cells": ["x" * 500] * 100}] * 100, "deep": [[[[[[[[[1]]]]]]]]], "odd": "\ud800"})

    run = await large.start("y" * 100_000)
    made = run._repr_mimebundle_()
    assert all(len(text) < 30_000 for text in made.values()) and "…" in made["text/html"]
    json.dumps(made).encode()


async def test_what_is_masked_is_masked_before_it_is_cut() -> None:
    from agentflow import cardparts

    for length in range(150, 200):
        assert "abcdef" not in cardparts.text("x" * length + " " + KEY, 200)


async def test_the_waterfall_shows_a_wait_of_days_short_and_the_work_around_it_long() -> None:
    from agentflow.cardparts import Bar, waterfall

    day = 86400.0
    bars = [Bar("a", "completed", 0, 0.0, 1.0), Bar("ask", "completed", 0, 1.0, 2 * day, waits=True), Bar("b", "completed", 0, 2 * day, 2 * day + 1)]
    widths = [float(piece.partition("%")[0]) for piece in waterfall(bars, 3 * day).split("width:")[1:]]
    assert widths[0] > 40 and widths[2] > 40 and widths[1] < 10


async def test_a_plan_a_run_and_their_lists_say_what_they_are_in_words() -> None:
    @workflow("wordy")
    async def wordy(ctx: Any, n: int) -> int:
        return await step("add", lambda: n + 1)

    plan = await wordy.plan(1)
    assert isinstance(plan, Plan) and plan._repr_mimebundle_()["text/plain"] == str(plan)
    run = await wordy.start(1)
    words = run._repr_mimebundle_()["text/plain"]
    assert words.startswith(f"{run.id} · completed · 1 step · paid") and "\n  add" in words
    assert runs.list()._repr_mimebundle_()["text/plain"].startswith(f"{run.id} · completed")
    assert runs.list(status="failed")._repr_mimebundle_()["text/plain"] == "none"


async def test_steps_of_every_kind_stand_on_the_card_of_their_run() -> None:
    @tool
    def look_up(order: int) -> str:
        """Find."""
        return "ok"

    @workflow
    async def kinds(ctx: Any, n: int) -> Any:
        await step("hidden", lambda: "not to be seen", secret=True)
        await generate_content("x", tools=[look_up], name="ask", model="openai:scripted")
        await embed(["a", "b"], model="openai:text-embedding-3-small")
        ctx.now()
        await ctx.sleep("1ms")
        return await ctx.wait_for_event("paid", timeout=0, default="late")

    with FakeModel([ToolCall("look_up", order=7), "done"]):
        run = await kinds.start(1)
    for value in (run, run.steps, *run.steps):
        made = value._repr_mimebundle_()
        assert "not to be seen" not in "".join(made.values())
    words = run._repr_mimebundle_()["text/plain"]
    assert [line.split(" · ")[0].strip() for line in words.splitlines()[1:]] == [
        "hidden", "ask", "turn 1", "look_up", "turn 2", "embed", "sleep 0.001s", "event paid",
    ]  # fmt: skip
    assert "tokens" in words


async def test_lists_with_a_card_are_lists_to_steps_and_records() -> None:
    seen: list[int] = []

    @workflow
    async def listing(ctx: Any, made: list[int]) -> Any:
        given = Listed(made) if seen else made
        seen.append(1)
        return await step("keep", lambda items: Listed(items), given)

    assert type(await listing.run([1, 2])) is list
    run = await listing.start([1, 2])
    assert run.output == [1, 2] and len(run.steps) == 1, "a Listed is given as a list is: replayed"
    assert type(runs.list()[:1]) is Listed and [each.id for each in runs.list()[:1]] == [run.id]


# -- not in a kernel -------------------------------------------------------------------------------------

SCRIPT = """
import sys
from agentflow import step, workflow, runs
@workflow
async def flow(ctx, n: int):
    return await step("add", lambda: n + 1)
assert flow.run_sync(1) == 2
known = {"agentflow.notebook", "agentflow.watched", "agentflow.cards", "agentflow.forms", "IPython", "ipykernel", "ipywidgets"}
assert not known & set(sys.modules), known & set(sys.modules)
html = runs.list()[0]._repr_html_()
assert "completed" in html and not {"IPython", "ipykernel", "ipywidgets"} & set(sys.modules)
"""
EMBEDDED = """
import ipykernel.zmqshell
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
result = shell.run_cell('''
from agentflow import step, workflow
@workflow
async def flow(ctx, n: int):
    return await step("add", lambda: n + 1)
print(await flow.run(1))
''')
result.raise_error()
"""
FORKED = """
import os, multiprocessing
def child():
    assert agentflow.notebook.kernel() is None
    flow.run_sync(2)
@workflow("forked")
async def flow(ctx, n: int):
    return await step("add", lambda: n + 1)
await flow.run(1)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
print(process.exitcode)
"""


def outputs(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment(folder) | {"IPYTHONDIR": str(folder / "ipython")}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=env)


def test_a_script_shows_nothing_and_loads_nothing_of_notebooks(tmp_path: Path) -> None:
    done = outputs(SCRIPT, tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count("completed · 1 step: 0 replayed, 1 run") == 1


def test_a_terminal_of_ipython_is_no_kernel(tmp_path: Path) -> None:
    done = outputs(EMBEDDED, tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith("2") and "agentflow" not in done.stdout, done
    assert done.stderr.count("completed · 1 step: 0 replayed, 1 run") == 1


def test_a_process_forked_from_a_kernel_is_none(kernel: Kernel) -> None:
    output = kernel.run(FORKED)
    assert output.printed.strip().endswith("0"), output
    assert len(output.displays) == 1 and output.shown.count("forked-") == 1


def test_a_notebook_that_is_executed_as_a_whole_keeps_the_last_state_of_each_card(tmp_path: Path) -> None:
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    cells = [PRELUDE, ASKS.format(name="whole") + "try:\n    await asks.run(1)\nexcept Waiting as waiting:\n    print(len(waiting.waiting_on))", "for task in tasks.list():\n    tasks.approve(task.id, by='ada')\nawait asks.run(1)"]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    (tmp_path / "pyproject.toml").touch()
    names = {"AGENTFLOW_PATH": str(tmp_path / "journal"), "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        done, _ = ExecutePreprocessor(timeout=SECONDS).preprocess(made, {"metadata": {"path": str(tmp_path)}})
    waited, ended = ([each for each in cell.outputs if "text/html" in each.get("data", {}) and "agentflow" in each.data["text/html"]] for cell in done.cells[1:])
    assert len(waited) == 1 and "● waiting" in waited[0].data["text/html"]
    assert len(ended) == 1 and "● completed" in ended[0].data["text/html"] and "True ada" in ended[0].data["text/html"]
    page, _ = HTMLExporter().from_notebook_node(done)
    assert "● completed" in page
