"""``agentflow ui``, the page: in real Chromium, over the real server, with runs of this and of other processes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pydantic import BaseModel, Field

import agentflow
from agentflow import Retry, generate_content, human_task, ledger, runs, step, tasks, workflow
from agentflow.scratch import open_journal
from agentflow.testing import FakeModel
from agentflow.worker import enrolled
from tests.debian import installed
from tests.programs import run_program, start_program, write_program
from tests.ui_server import Served, serve, until

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
NASTY = "<script>alert(1)</script>\"><img src=x onerror=alert(2)>'"

expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def chromium() -> Path:
    return installed("chromium", lambda: CHROMIUM if CHROMIUM.exists() else None)


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=str(chromium), args=FLAGS)
        yield made
        made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the tests of this file; each test has workflows of its own."""
    folder = tmp_path_factory.mktemp("page")
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


@pytest.fixture
def page(browser: Browser, ui: Served) -> Iterator[Page]:
    """A page that fails its test for any error, warning, dialog, refused script or request to elsewhere."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, locale="en-US", timezone_id="Europe/Berlin")
    made = context.new_page()
    trouble: list[str] = []
    # A refused answer (409, 422) is an error to Chromium's console, and none here.
    made.on("console", lambda said: trouble.append(said.text) if said.type in ("error", "warning") and "status of 4" not in said.text else None)
    made.on("pageerror", lambda error: trouble.append(str(error)))
    made.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    made.on("request", lambda asked: trouble.append(asked.url) if not asked.url.startswith(f"http://127.0.0.1:{ui.port}/") else None)
    yield made
    context.close()
    assert trouble == []


def ran(flow: Any, *args: Any) -> str:
    """Runs it; the run's id. In a loop of its own: playwright has one in this thread."""
    with ThreadPoolExecutor(1) as thread:
        return str(thread.submit(lambda: asyncio.run(flow.start(*args)).id).result())


def open_tasks(run_id: str) -> list[str]:
    return [task.id for task in tasks.list(run_id=run_id)]


def visit(page: Page, ui: Served, place: str) -> None:
    """Goes to a place of a page that is open already, without loading it again."""
    page.goto(f"http://127.0.0.1:{ui.port}/#/{place}")


def row(page: Page, name: str) -> Any:
    """The row of a step by its name."""
    return page.locator(".row", has=page.get_by_text(name, exact=True))


# -- runs ------------------------------------------------------------------------------------------


@workflow("page-order")
async def order(ctx, name: str) -> str:
    tried = iter((True, True, False))

    async def charge() -> str:
        if next(tried):
            raise ConnectionError("the bank is away")
        return await step("book", lambda: "booked")

    async def bad() -> None:
        raise ValueError("nobody is there")

    await step("charge", charge, retry=Retry(max_attempts=3, initial_delay=0.1, jitter=False))
    try:
        await step("bad", bad)
    except ValueError:
        await step("noted", lambda: None)
    text = await generate_content(f"Greet {name}.", system="Be brief.", model="openai:priced", name="greet")
    decision = await human_task("approve", assign_to="boss", title=f"Ship to {name}?", data={"text": text, "n": 2**53 + 1})
    return f"shipped: {decision.approved}"


def ordered(name: str) -> str:
    ledger.set_price("priced", 1, 10)
    with FakeModel([f"Hello, {name}!"]):
        return ran(order, name)


def test_a_run_is_found_in_the_list_and_its_waterfall_tells_attempts_nesting_failures_and_waiting(page, ui):
    run_id = ordered("Ada")
    page.goto(ui.url)
    expect(page).to_have_url(f"http://127.0.0.1:{ui.port}/")  # the token is not left in the address
    page.get_by_role("link", name=run_id).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("waiting")
    expect(page.locator(".waits")).to_contain_text("Ship to Ada?")
    names = page.locator(".row .text")
    expect(names).to_have_text(["charge", "book", "bad", "noted", "greet", "Ship to Ada?"])
    charge = row(page, "charge")
    kinds = [bar.get_attribute("class") for bar in charge.locator(".track > *").all()]
    assert kinds == ["try s-failed", "pause", "try s-failed", "pause", "try s-completed"]
    boxes = [bar.bounding_box() for bar in charge.locator(".try").all()]
    assert all(left["x"] + left["width"] <= right["x"] for left, right in zip(boxes, boxes[1:], strict=False))
    assert "the bank is away" in (charge.locator(".try").first.get_attribute("title") or "")
    expect(charge).to_contain_text("×3")
    assert row(page, "book").get_attribute("aria-level") == "2" and charge.get_attribute("aria-level") == "1"
    inner, outer = row(page, "book").locator(".try").bounding_box(), boxes[-1]
    assert outer["x"] - 3 <= inner["x"] <= outer["x"] + outer["width"] + 3
    expect(row(page, "bad")).to_have_class(re.compile("s-failed"))
    expect(row(page, "Ship to Ada?").locator(".try")).to_have_class("try s-waiting")
    # What nothing worked in is folded, so that the rest can be seen.
    expect(page.locator(".axis .fold")).not_to_have_count(0)
    charge.locator(".twisty").click()
    expect(names).to_have_text(["charge", "bad", "noted", "greet", "Ship to Ada?"])
    page.get_by_label("problems only").check()
    expect(names).to_have_text(["charge", "bad"])
    page.get_by_label("problems only").uncheck()
    page.get_by_label("Find steps").fill("book")
    expect(names).to_have_text(["charge", "book"])
    expect(page.locator(".count-steps")).to_have_text("2 of 6 steps shown")


def test_a_model_calls_detail_has_prompt_reply_tokens_and_cost_and_an_address_of_its_own(page, ui):
    run_id = ordered("Grace")
    page.goto(f"{ui.url}#/runs/{run_id}")
    row(page, "greet").click()
    panel = page.locator(".step")
    expect(panel.locator(".message pre")).to_have_text(["Be brief.", "Greet Grace."])
    expect(panel.locator("details", has=page.get_by_text("reply", exact=True)).locator("pre")).to_have_text("Hello, Grace!")
    detail = ui.step(run_id, "greet")
    facts = panel.locator(".pairs").inner_text()
    assert f"{detail['usage']['input_tokens']} in · {detail['usage']['output_tokens']} out" in facts
    assert f"${detail['cost']:.4f}"[:5] in facts and "priced" in facts
    panel.get_by_text("request as sent").click()
    expect(panel.locator("pre.json", has_text="Be brief.").first).to_be_visible()
    address = page.url
    assert address.endswith(f"#/runs/{run_id}/steps/{detail['id']}")
    page.goto("about:blank")
    page.goto(address)  # by its cookie
    expect(panel.locator(".message pre").first).to_have_text("Be brief.")
    row(page, "charge").click()
    expect(panel.locator(".tries tbody tr")).to_have_count(3)
    expect(panel.locator(".tries")).to_contain_text("ConnectionError: the bank is away")
    panel.get_by_label("Close the step").click()
    expect(panel).to_be_hidden()


def test_the_waterfall_is_used_with_the_keyboard(page, ui):
    run_id = ordered("Kay")
    page.goto(f"{ui.url}#/runs/{run_id}")
    grid = page.get_by_role("treegrid")
    expect(grid.get_by_role("row")).to_have_count(6)
    grid.focus()
    active = lambda: page.locator(f"#{grid.get_attribute('aria-activedescendant')} .text").inner_text()  # noqa: E731
    assert active() == "charge"
    grid.press("ArrowDown")
    assert active() == "book"
    grid.press("ArrowLeft")
    assert active() == "charge"
    grid.press("ArrowLeft")
    expect(grid.get_by_role("row")).to_have_count(5)
    grid.press("ArrowRight")
    grid.press("End")
    assert active() == "Ship to Kay?"
    grid.press("Enter")
    expect(page.locator(".step h2")).to_contain_text("Ship to Kay?")
    grid.press("Escape")
    expect(page.locator(".step")).to_be_hidden()


LIVE = """
    def gate(name):
        async def wait():
            while not (HERE / name).exists():
                await asyncio.sleep(0.01)
        return wait

    @workflow("page-live")
    async def live(ctx):
        await step("first", gate("gate-1"))
        await step("second", gate("gate-2"))

    live.run_sync()
"""


# Nothing is asked of the server until it is released.
HOLD = """() => {
  const [own, held] = [window.fetch, []];
  window.fetch = (...given) => new Promise((done) => held.push(() => done(own(...given))));
  window.release = () => { window.fetch = own; for (const each of held) each(); };
}"""


def test_what_another_process_does_appears_without_a_reload(page, ui):
    page.goto(ui.url)
    expect(page.locator("#live")).to_have_text("live")
    page.evaluate("window.same = true")
    process = start_program(write_program(LIVE, ui.folder, "live.py"), ui.folder)
    entry = page.locator(".items a", has_text="page-live")
    expect(entry).to_contain_text("running")
    entry.click()
    running = row(page, "first").locator(".try.s-running")
    expect(running).to_have_count(1)
    expect(row(page, "second")).to_have_count(0)
    took = lambda: row(page, "first").locator(".took").inner_text()  # noqa: E731
    page.evaluate(HOLD)
    before = took()
    until(lambda: took() != before)  # it grows by itself, whatever the server says
    page.evaluate("window.release()")
    (ui.folder / "gate-1").touch()
    expect(row(page, "second").locator(".try.s-running")).to_have_count(1)
    expect(row(page, "first").locator(".try")).to_have_class("try s-completed")
    (ui.folder / "gate-2").touch()
    expect(page.get_by_role("heading", level=1)).to_contain_text("completed")
    expect(entry).to_contain_text("completed")
    process.communicate(timeout=60)
    assert page.evaluate("window.same") is True


@pytest.mark.torture
def test_a_run_of_five_thousand_steps_is_shown_with_few_elements(page, ui):
    source = """
    from agentflow.sync import step, workflow

    @workflow("page-many")
    def many(ctx):
        for i in range(500):
            def outer(i=i):
                for j in range(9):
                    step(f"inner {i}-{j}", lambda: j)
            step(f"outer {i}", outer)

    many.run()
    """
    process = start_program(write_program(source, ui.folder, "many.py"), ui.folder)
    process.communicate(timeout=120)
    run_id = runs.list(workflow="page-many")[0].id
    page.goto(f"{ui.url}#/runs/{run_id}")
    expect(page.locator(".count-steps")).to_have_text("5,000 steps")
    rows = page.locator(".row")
    expect(rows.first).to_contain_text("outer 0")
    assert 20 < rows.count() < 100
    grid = page.get_by_role("treegrid")
    grid.press("End")
    expect(row(page, "inner 499-8")).to_be_visible()
    assert rows.count() < 100 and grid.get_attribute("aria-rowcount") == "5000"
    row(page, "inner 499-8").click()
    expect(page.locator(".step h2")).to_contain_text("inner 499-8")
    page.get_by_label("Find steps").fill("inner 250-4")
    expect(rows).to_have_count(2)


def test_a_large_value_says_its_size_and_is_shown_in_full_when_asked_for(page, ui):
    @workflow("page-large")
    async def large(ctx) -> str:
        return await step("load", lambda: "x" * 100_000 + "the end")

    run_id = ran(large)
    page.goto(f"{ui.url}#/runs/{run_id}/steps/{ui.steps(run_id)['load']['id']}")
    panel = page.locator(".step")
    expect(panel.locator(".cut")).to_contain_text("The first 32.8 K characters of 100.0 K characters.")
    assert "the end" not in panel.inner_text()
    panel.get_by_role("button", name="Show all").click()
    expect(panel.locator("pre", has_text="the end")).to_be_visible()
    expect(panel.locator(".cut")).to_have_count(0)


def test_an_empty_journal_says_what_to_type(browser, page, tmp_path):
    agentflow.journal.Journal.open(tmp_path / "journal").close()
    served = serve(tmp_path, "--port", "0")
    context = browser.new_context()
    empty = context.new_page()
    empty.goto(served.url)
    expect(empty.locator(".run")).to_contain_text("python your_program.py")
    empty.get_by_role("link", name="Inbox").click()
    expect(empty.locator(".task")).to_contain_text("agentflow tasks list")
    empty.get_by_role("link", name="Costs").click()
    expect(empty.locator(".costs")).to_contain_text("Nothing was paid or saved yet")
    assert served.stop() == 0
    expect(empty.locator("#live")).to_have_text("not connected")
    context.close()


# -- the inbox -------------------------------------------------------------------------------------

APP = """
@workflow("page-expenses")
async def expenses(ctx, who: str, amount: int) -> str:
    decision = await human_task("approve", assign_to="manager", title=f"Pay {who}?", data={"who": who, "amount": amount})
    return await step("pay", lambda: f"paid {amount} to {who}") if decision else f"not paid: {decision.comment}"
"""


def test_an_approval_on_the_page_lets_a_worker_in_another_process_complete_the_run(page, ui):
    app = ui.folder / "page_app.py"
    app.write_text(f"from agentflow import *\n{APP}")
    scope: dict[str, Any] = {}
    exec(f"from agentflow import *\n{APP}", scope)
    run_id = ran(scope["expenses"], "Ada", 120)
    worker = write_program("import runpy\nsys.argv = ['agentflow', 'worker', 'page_app.py']\nrunpy.run_module('agentflow', run_name='__main__')", ui.folder, "worker.py")
    process = start_program(worker, ui.folder)
    until(lambda: any(each["alive"] for each in enrolled(open_journal())))
    page.goto(f"{ui.url}#/tasks")
    task = page.locator(".items a", has_text="Pay Ada?")
    expect(task).to_contain_text("for manager")
    expect(page.locator("#open-tasks")).to_be_visible()
    task.click()
    expect(page.locator(".shown .pairs")).to_contain_text("120")
    page.get_by_label("By your name").fill("grace")
    page.get_by_label("Comment").fill("fine")
    page.get_by_role("button", name="Approve").click()
    expect(page.locator(".pane h1")).to_contain_text("approved")
    expect(page.locator(".next")).to_contain_text("goes on with worker")
    expect(task).to_have_count(0)  # it has left the inbox
    until(lambda: runs.get(run_id).status == "completed")
    assert runs.get(run_id).output == "paid 120 to Ada"
    decision = runs.get(run_id).steps[0].output
    assert (decision.approved, decision.by, decision.comment) == (True, "grace", "fine")
    process.terminate()
    process.communicate(timeout=60)
    # The name is there the next time; a rejection says the command where nobody goes on.
    second = ran(scope["expenses"], "Bob", 7)
    page.goto(f"{ui.url}#/tasks/{open_tasks(second)[0]}")
    expect(page.get_by_label("By your name")).to_have_value("grace")
    page.get_by_role("button", name="Reject").click()
    expect(page.locator(".next")).to_contain_text(f"agentflow runs resume {second} --module app:flow")
    expect(page.locator(".next")).to_contain_text("agentflow worker app:flow")
    assert ran(scope["expenses"], "Bob", 7) == second and runs.get(second).output == "not paid: None"


def test_a_decision_after_another_one_is_refused_with_who_decided(page, ui):
    scope: dict[str, Any] = {}
    exec(f"from agentflow import *\n{APP.replace('page-expenses', 'page-late')}", scope)
    (task,) = open_tasks(ran(scope["expenses"], "Ada", 1))
    page.goto(f"{ui.url}#/tasks/{task}")
    expect(page.get_by_role("button", name="Approve")).to_be_visible()
    # As seen before the page hears of the other decision.
    page.route("**/api/task?*", lambda route: None)
    tasks.reject(task, by="grace")
    page.get_by_role("button", name="Approve").click()
    expect(page.locator(".decide > .error")).to_contain_text("was rejected already, by grace")
    expect(page.locator(".decide > .error")).to_be_visible()
    assert tasks.get(task).status == "rejected"


class Kind(Enum):
    TRAVEL = "travel"
    FOOD = "food"


class Line(BaseModel):
    what: str
    price: int = Field(ge=1)


class Receipt(BaseModel):
    amount: int = Field(ge=1, description="In whole euros")
    urgent: bool
    kind: Kind
    how: Literal["bank", "cash"] = "bank"
    day: date
    shop: Line
    lines: list[Line]
    note: str | None = None
    number: int | None = None
    fee: Decimal | None = None
    at: datetime | None = None
    more: dict[str, int] = {}


@workflow("page-receipt")
async def receipt(ctx, n: int) -> Receipt:
    return await human_task("input", assign_to="ada", title="What was it?", data="a receipt", schema=Receipt)


def test_a_form_is_made_from_the_schema_and_refused_values_are_told_at_their_fields(page, ui):
    run_id = ran(receipt, 1)
    (task,) = open_tasks(run_id)
    page.goto(f"{ui.url}#/tasks/{task}")
    field = lambda path: page.locator(f'[data-path="answer{path}"]')  # noqa: E731
    expect(field(".amount")).to_contain_text("In whole euros")
    answer = page.get_by_role("button", name="Answer")
    answer.click()
    for path in (".amount", ".urgent", ".kind", ".day"):
        expect(field(path).locator("> .error")).to_have_text("This is needed.")
    field(".amount").locator("input").fill("many")
    field(".urgent").get_by_label("yes").check()
    field(".kind").locator("select").select_option("food")
    expect(field(".how").locator("select")).to_have_value("0")
    field(".day").locator("input").fill("2026-01-31")
    field(".shop.what").locator("textarea").fill("the corner")
    field(".shop.price").locator("input").fill("3")
    for at in (0, 1, 2):
        field(".lines").get_by_role("button", name="Add an item").click()
        field(f".lines[{at}].what").locator("textarea").fill(f"thing {at}")
        field(f".lines[{at}].price").locator("input").fill(str(at))
    field(".more").locator("textarea").fill("{")
    answer.click()
    expect(field(".more").locator(".error")).to_contain_text("This is not JSON")
    field(".more").locator("textarea").fill('{"a": 1}')
    field(".fee").locator("input").fill("0.10")
    field(".at").locator("input").fill("2026-01-31T12:30")
    answer.click()
    expect(field(".amount").locator(".error")).to_contain_text("'many' has to be a whole number")
    expect(field(".amount").locator("input")).to_have_attribute("aria-invalid", "true")
    assert tasks.get(task).status == "open"
    field(".amount").locator("input").fill("9007199254740993")  # more than a browser's numbers hold
    answer.click()
    expect(field(".lines[0].price").locator(".error")).to_contain_text("has to be at least 1")
    expect(field(".amount").locator(".error")).to_be_hidden()
    field(".lines").get_by_label("Remove item 1").click()
    expect(field(".lines[0].what").locator("textarea")).to_have_value("thing 1")
    answer.click()
    expect(page.locator(".pane h1")).to_contain_text("answered")
    assert ran(receipt, 1) == run_id
    lines = [{"what": "thing 1", "price": 1}, {"what": "thing 2", "price": 2}]
    assert runs.get(run_id).result() == Receipt(
        amount=9007199254740993, urgent=True, kind=Kind.FOOD, day=date(2026, 1, 31), shop={"what": "the corner", "price": 3},
        lines=lines, more={"a": 1}, fee=Decimal("0.10"), at=datetime.fromisoformat("2026-01-31T12:30:00+01:00"),
    )  # fmt: skip


def test_what_is_being_typed_stays_while_the_journal_changes_and_a_filled_in_form_is_an_edit(page, ui):
    @workflow("page-edit")
    async def edit(ctx) -> Line:
        return await human_task("review", title="Right?", data=Line(what="tea", price=2), schema=Line)

    @workflow("page-noise")
    async def noise(ctx, n: int) -> int:
        return await step("noise", lambda: n)

    run_id = ran(edit)
    page.goto(f"{ui.url}#/tasks/{open_tasks(run_id)[0]}")
    what = page.locator('[data-path="answer.what"] textarea')
    expect(what).to_have_value("tea")
    what.fill("green tea")
    with page.expect_response(re.compile("/api/task\\?")):  # the page looks again
        ran(noise, 1)
    expect(what).to_have_value("green tea")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator(".pane h1")).to_contain_text("answered")
    ran(edit)
    assert runs.get(run_id).result() == Line(what="green tea", price=2)


@workflow("page-words")
async def words(ctx, n: int) -> Any:
    return (await human_task("input", title="How was it?")).data


def test_an_answer_is_given_in_words_or_as_json(page, ui):
    for n, (typed, as_json, got) in enumerate([('so "so"', False, 'so "so"'), ("[1, 2]", True, [1, 2])]):
        run_id = ran(words, n)
        page.goto(f"{ui.url}#/tasks/{open_tasks(run_id)[0]}")
        field = page.get_by_label("Answer", exact=True).locator("visible=true")
        if as_json:
            page.get_by_label("it is JSON").check()
            field.fill("[1,")
            page.get_by_role("button", name="Answer").click()
            expect(page.locator("#answer-error")).to_contain_text("This is not JSON")
        field.fill(typed)
        page.get_by_role("button", name="Answer").click()
        expect(page.locator(".pane h1")).to_contain_text("answered")
        assert ran(words, n) == run_id and runs.get(run_id).output == got


def test_the_result_of_a_step_in_doubt_is_given_by_a_person(page, ui):
    source = """
    @workflow("page-doubt")
    async def doubt(ctx):
        return await step("pay", die, in_doubt="ask")

    try:
        print(doubt.run_sync())
    except Waiting:
        print("waits")
    """
    file = write_program(source, ui.folder, "doubt.py")
    run_program(file, ui.folder, expect_kill=True)
    assert run_program(file, ui.folder).out == "waits\n"
    run_id = runs.list(workflow="page-doubt")[0].id
    page.goto(f"{ui.url}#/runs/{run_id}")
    page.locator(".waits a").click()
    expect(page.locator(".pane h1")).to_contain_text("Did pay happen?")
    page.get_by_label("Data as JSON").fill('{"paid": 3}')
    page.get_by_role("button", name="Approve").click()
    expect(page.locator(".pane h1")).to_contain_text("answered")
    assert run_program(file, ui.folder).out == "{'paid': 3}\n"


# -- nothing that is shown is run ------------------------------------------------------------------


def test_markup_in_everything_that_is_shown_stays_text(page, ui):
    @workflow(f"page-nasty {NASTY}")
    async def nasty(ctx, given: str) -> Any:
        await step(NASTY, lambda: {NASTY: NASTY})
        await generate_content(NASTY, system=NASTY, model="openai:priced", name="ask")

        def fail() -> None:
            raise ValueError(NASTY)

        try:
            await step("fails", fail, retry={"max_attempts": 2, "initial_delay": 0})
        except ValueError:
            await step("after", lambda: None)
        await human_task("approve", title=f"one {NASTY}", data={NASTY: [NASTY]}, assign_to=NASTY)
        return await human_task("approve", title=f"two {NASTY}", data=NASTY)

    with FakeModel([NASTY]):
        run_id = ran(nasty, NASTY)
    page.goto(f"{ui.url}#/runs/{run_id}")
    expect(page.locator(".run .facts")).to_contain_text(NASTY)
    page.locator("summary", has_text="input").click()
    expect(page.locator(".values pre")).to_have_text(NASTY)
    for name, said in ((NASTY, NASTY), ("ask", NASTY), ("fails", f"ValueError: {NASTY}")):
        row(page, name).click()
        expect(page.locator(".step h2")).to_contain_text(name)
        page.eval_on_selector_all(".step details", "all => all.forEach((each) => { each.open = true; })")
        expect(page.locator(".step .panel")).to_contain_text(said)
    (first,) = open_tasks(run_id)
    visit(page, ui, f"tasks/{first}")
    expect(page.locator(".shown")).to_contain_text(NASTY)
    expect(page.locator(".pane .facts")).to_contain_text(NASTY)
    page.get_by_label("By your name").fill(NASTY)
    page.get_by_label("Comment").fill(NASTY)
    page.get_by_role("button", name="Approve").click()
    expect(page.locator(".pane .note")).to_contain_text(NASTY)
    ran(nasty, NASTY)
    (second,) = open_tasks(run_id)
    visit(page, ui, f"tasks/{second}")
    expect(page.locator(".shown pre")).to_have_text(NASTY)
    visit(page, ui, "costs/step")
    expect(page.locator(".costs table")).to_contain_text(NASTY)
    visit(page, ui, f"runs/{NASTY}")
    expect(page.locator("main [role=alert]")).to_contain_text("no run")
    assert page.locator("main img, main script").count() == 0


def test_the_page_cannot_be_made_to_run_what_it_is_given(browser, ui):
    context = browser.new_context()
    page = context.new_page()
    page.goto(ui.url)
    expect(page.locator("#live")).to_have_text("live")
    # Even a mistake in the page's own scripts could not: the browser refuses.
    refused = page.evaluate("(() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (error) { return error.name; } })()")
    assert refused == "TypeError"
    ran_inline = page.evaluate(
        "() => { const s = document.createElement('script'); try { s.text = 'window.hit = 1'; } catch { return 'refused'; }"
        " document.body.append(s); return String(window.hit); }"
    )
    assert ran_inline in ("refused", "undefined")
    context.close()


@pytest.mark.torture
def test_after_a_new_start_the_page_says_to_open_the_new_address(browser, page, tmp_path):
    agentflow.journal.Journal.open(tmp_path / "journal").close()
    first = serve(tmp_path, "--port", "0")
    context = browser.new_context()
    old = context.new_page()
    old.goto(first.url)
    expect(old.locator("#live")).to_have_text("live")
    assert first.stop() == 0
    second = serve(tmp_path, "--port", str(first.port))
    expect(old.locator("main")).to_contain_text("its address has changed")
    assert second.stop() == 0
    context.close()


# -- how it looks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, scheme",
    [
        (400, "light"),
        *(
            pytest.param(*each, marks=pytest.mark.torture)
            for each in ((400, "dark"), (1000, "light"), (1000, "dark"), (1400, "light"), (1400, "dark"))
        ),
    ],
)
def test_text_is_legible_and_nothing_runs_out_of_the_page(browser, ui, width, scheme):
    run_id = ordered(f"Eve {scheme} {width}")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    (task,) = open_tasks(run_id)
    greet = ui.steps(run_id)["greet"]["id"]
    page.goto(ui.url)
    for place in ("runs", f"runs/{run_id}", f"runs/{run_id}/steps/{greet}", "tasks", f"tasks/{task}", "costs"):
        visit(page, ui, place)
        page.locator({"runs": ".items a", "tasks": ".inbox", "costs": ".costs table"}[place.partition("/")[0]]).first.wait_for(state="attached")
        page.locator("main > *").wait_for()
        if place.endswith(greet):
            page.locator(".message pre").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place
        assert json.loads(page.evaluate(CONTRAST)) == [], place
    context.close()


# The WCAG contrast of each text that is in sight with the nearest background that is not transparent.
CONTRAST = """() => {
  const rgb = (text) => { const found = text.match(/[\\d.]+/g).map(Number); return text.startsWith('color(srgb') ? [...found.slice(0, 3).map((x) => x * 255), found[3] ?? 1] : found; };
  const light = (c) => { const [r, g, b] = c.map((x) => { x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility() || node.closest('option, noscript, .skip, .aside')) continue;
    let at = node;
    let back = null;
    while (at && !back) { const c = rgb(getComputedStyle(at).backgroundColor); if ((c[3] ?? 1) > 0.5) back = c; at = at.parentElement; }
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(back ?? [255, 255, 255])];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${walker.currentNode.textContent.trim().slice(0, 30)} (${node.className}): ${ratio.toFixed(2)}`);
  }
  return JSON.stringify(poor);
}"""
