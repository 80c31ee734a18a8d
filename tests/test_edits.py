"""What an edit makes run again, and what it does not: rules 2 to 4, keys, plans and ``rerun=``."""

from __future__ import annotations

import asyncio
import json
import linecache
import sys
import textwrap
import types
from decimal import Decimal

import pytest

import agentflow
from agentflow import (
    IdempotencyConflict,
    StepChanged,
    UsageError,
    Waiting,
    current_step,
    generate_content,
    human_task,
    parallel,
    runs,
    scratch,
    step,
    tasks,
    workflow,
)
from agentflow.ledger import set_price
from agentflow.settings import settings
from agentflow.testing import FakeModel
from tests.programs import notes, run_program

MODEL = "openai:gpt-5-mini"


def echo(asked):
    return f"<{asked['text']}>"


@pytest.fixture
def model():
    """Answers with the question, so that an edited question changes what follows; ``calls`` counts."""
    agentflow.configure(model=MODEL)
    with FakeModel(echo) as fake:
        yield fake


@pytest.fixture
def program(tmp_path):
    """Loads one version of a program file: ``program(source)`` is its module."""
    count = 0

    def load(source):
        nonlocal count
        count += 1
        file = tmp_path / "program.py"
        file.write_text(textwrap.dedent(source))
        linecache.checkcache(str(file))
        module = types.ModuleType("edited_program")
        module.__file__ = str(file)
        sys.modules["edited_program"] = module
        exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
        return module

    yield load
    sys.modules.pop("edited_program", None)


class Asked:
    """The questions since the last look."""

    def __init__(self, model):
        self.model = model
        self.seen = 0

    def __call__(self):
        fresh = [call["text"] for call in self.model.calls[self.seen :]]
        self.seen = len(self.model.calls)
        return fresh


@pytest.fixture
def asked(model):
    return Asked(model)


def everything():
    """All that is stored, to show that nothing was written."""
    journal = scratch.open_journal()
    return dict(journal.scan(""))


# -- one prompt of four ------------------------------------------------------------------------------------------------

IMPORTS = """
from agentflow import workflow, step, generate_content, human_task, load_prompt
"""

NAMED = """
@workflow
async def essay(ctx, topic: str):
    outline = await generate_content(f"Outline {topic}", name="outline")
    draft = await generate_content(f"Draft of {outline}", name="draft")
    title = await generate_content(f"Title for {topic}", name="title")
    review = await generate_content(f"Review {draft}", name="review")
    END
    return [outline, draft, title, review]
"""

STEPS = """
async def write_outline(topic):
    return await generate_content(f"Outline {topic}")

async def write_draft(outline):
    return await generate_content(f"Draft of {outline}")

@workflow
async def essay(ctx, topic: str):
    outline = await step("outline", write_outline, topic)
    draft = await step("draft", write_draft, outline)
    title = await step("title", lambda: generate_content(f"Title for {topic}"))
    review = await step("review", lambda: generate_content(f"Review {draft}"))
    END
    return [outline, draft, title, review]
"""

DECORATED = """
def prompt_of(outline):
    return f"Draft of {outline}"

@step
async def outline(topic):
    return await generate_content(f"Outline {topic}")

@step
async def draft(outline):
    return await generate_content(prompt_of(outline))

@step("title")
async def entitle(topic):
    return await generate_content(f"Title for {topic}")

class Reviewer:
    async def review(self, draft):
        return await generate_content(f"Review {draft}")

@workflow
async def essay(ctx, topic: str):
    first = await outline(topic)
    second = await draft(first)
    third = await entitle(topic)
    fourth = await step("review", Reviewer().review, second)
    END
    return [first, second, third, fourth]
"""

ENDS = {
    "finished": "",
    "failed": 'await step("publish", lambda: 1 / 0)',
    "waiting": 'await human_task(type="approve", data=topic)',
}
FORMS = {"named": NAMED, "steps": STEPS, "decorated": DECORATED}
EXPECTED = ["Outline tea", "Draft of <Outline tea>", "Title for tea", "Review <Draft of <Outline tea>>"]


async def run_to(end, module, topic="tea"):
    """Run it; it has to end as ``end`` says."""
    try:
        await module.essay.run(topic)
    except (ZeroDivisionError, Waiting):
        pass
    [run] = runs.list(workflow="essay")
    assert run.status == {"finished": "completed"}.get(end, end)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", FORMS)
async def test_edited_prompt_asks_exactly_that_call_and_those_whose_request_it_changed(program, asked, form, end):
    """The second of four: its answer goes into the fourth; the first and the third are not touched."""
    source = IMPORTS + FORMS[form].replace("END", ENDS[end])
    await run_to(end, program(source))
    assert asked() == EXPECTED
    await run_to(end, program(source))
    assert asked() == []
    edited = source.replace("Draft of", "A better draft of")
    await run_to(end, program(edited))
    assert asked() == ["A better draft of <Outline tea>", "Review <A better draft of <Outline tea>>"]
    await run_to(end, program(edited))
    assert asked() == []
    await run_to(end, program(source))
    assert asked() == [], "an edit that was undone finds its records again"
    await run_to(end, program(edited))
    assert asked() == []
    assert len(tasks.list(status=None)) == (end == "waiting"), "nobody was asked twice"


@pytest.mark.parametrize("form", FORMS)
async def test_edited_prompt_with_the_same_answer_asks_one_call(program, form):
    """What follows is given the same as before."""
    agentflow.configure(model=MODEL)
    source = IMPORTS + FORMS[form].replace("END", "")
    with FakeModel(lambda asked: "the draft" if "raft of" in asked["text"] else echo(asked)) as model:
        await run_to("finished", program(source))
        await run_to("finished", program(source.replace("Draft of", "A better draft of")))
    assert [call["text"] for call in model.calls[4:]] == ["A better draft of <Outline tea>"]


def _with_helper(source):
    source = source.replace('generate_content(f"Draft of {outline}"', "generate_content(drafting(outline)")
    source = source.replace("generate_content(prompt_of(outline)", "generate_content(drafting(outline)")
    helper = 'def drafting(outline):\n    return "Draft of " + str(outline)\n'
    return source.replace("\n@workflow", f"\n{helper}\n@workflow", 1)


HARMLESS = {
    "comment": lambda s: s.replace("    return [", "    # nothing to see here\n    return [").replace(
        "\nasync def", "\n# about it\nasync def"
    ),
    "blank line": lambda s: "\n\n\n" + s.replace("    return [", "\n\n    return ["),
    "variable name": lambda s: (
        s.replace("outline", "plan")
        .replace('"plan"', '"outline"')
        .replace("def plan", "def outline")
        .replace("await plan(", "await outline(")
    ),
    "docstring": lambda s: s.replace("topic: str):\n", 'topic: str):\n    """Of a topic."""\n'),
    "annotation": lambda s: s.replace("(outline):", "(outline: str) -> str:"),
    "quotes": lambda s: s.replace('"title"', "'title'"),
    "helper that makes the same request": _with_helper,
    "helper function around": lambda s: s.replace("    return [", "    len(str(topic))\n    return ["),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edit", HARMLESS)
async def test_edit_that_changes_no_request_makes_no_call(program, asked, edit, form, end):
    """Comments, blank lines, names of variables, helpers: the requests are equal."""
    source = IMPORTS + FORMS[form].replace("END", ENDS[end])
    await run_to(end, program(source))
    assert asked() == EXPECTED
    await run_to(end, program(HARMLESS[edit](source)))
    assert asked() == []
    await run_to(end, program(source))
    assert asked() == []


async def test_edit_inside_a_step_of_two_calls_asks_the_one_whose_request_it_changed(program, asked):
    source = IMPORTS + textwrap.dedent(
        """
        async def both(topic):
            one = await generate_content(f"First of {topic}")
            two = await generate_content(f"Second of {topic}")
            return [one, two]

        @workflow
        async def essay(ctx, topic: str):
            return await step("both", both, topic)
        """
    )
    await program(source).essay.run("tea")
    assert asked() == ["First of tea", "Second of tea"]
    assert await program(source.replace("Second", "Last")).essay.run("tea") == ["<First of tea>", "<Last of tea>"]
    assert asked() == ["Last of tea"]
    swapped = source.replace("[one, two]", "[two, one]")
    assert await program(swapped).essay.run("tea") == ["<Second of tea>", "<First of tea>"]
    assert asked() == []


async def test_options_of_a_step_are_no_reason_to_ask_again(program, asked):
    source = IMPORTS + STEPS.replace("END", "")
    await program(source).essay.run("tea")
    asked()
    options = 'write_draft, outline, retry={"max_attempts": 4}, timeout="1m", thread=False'
    await program(source.replace("write_draft, outline", options)).essay.run("tea")
    assert asked() == []


async def test_failed_ai_step_is_asked_with_its_edited_prompt_only(program):
    """The second of four is refused by the provider; its prompt is edited, the first is not asked again."""
    agentflow.configure(model=MODEL)
    source = IMPORTS + STEPS.replace("END", "")
    with FakeModel(lambda asked: 400 if asked["text"].startswith("Draft") else echo(asked)) as model:
        asked = Asked(model)
        for _ in range(2):
            with pytest.raises(agentflow.errors.ModelError):
                await program(source).essay.run("tea")
        assert asked() == ["Outline tea", "Draft of <Outline tea>", "Draft of <Outline tea>"]
        await program(source.replace("Draft of", "A draft of")).essay.run("tea")
        assert asked() == ["A draft of <Outline tea>", "Title for tea", "Review <A draft of <Outline tea>>"]


def test_kill_in_the_middle_of_an_edited_run_asks_nothing_twice(tmp_path):
    """The edited step was answered when the process died."""
    source = """
    from agentflow.testing import FakeModel

    @workflow
    async def essay(ctx, topic: str):
        one = await step("outline", lambda: generate_content(f"Outline {topic}"))
        two = await step("draft", lambda: generate_content(f"Draft of {one}"))
        if "die" in sys.argv:
            die()
        return await step("review", lambda: generate_content(f"Review {two}"))

    def reply(asked):
        note(asked["text"])
        return "answer to " + asked["text"].split()[0]

    configure(model="openai:gpt-5-mini")
    os.environ["OPENAI_API_KEY"] = "none"
    with FakeModel(reply):
        essay.run_sync("tea")
    """
    run_program(source, tmp_path)
    edited = source.replace("Draft of", "Better draft of")
    run_program(edited, tmp_path, "die", expect_kill=True)
    run_program(edited, tmp_path)
    asked = ["Outline tea", "Draft of answer to Outline", "Review answer to Draft"]
    assert notes(tmp_path) == [*asked, "Better draft of answer to Outline", "Review answer to Better"]


async def test_edited_helper_two_levels_down_asks_again(program, asked, said):
    source = (
        IMPORTS
        + """
    STYLE = "short"

    def words():
        return f"{STYLE} words"

    def prompt(topic):
        return f"{topic} in {words()}"

    async def write(topic):
        return await generate_content(prompt(topic))

    @workflow
    async def essay(ctx, topic: str):
        return await step("write", write, topic)
    """.replace("\n    ", "\n")
    )
    await program(source).essay.run("tea")
    await program(source.replace("short", "long")).essay.run("tea")
    assert asked() == ["tea in short words", "tea in long words"]
    assert "write ran again" in said() and "STYLE" in said()
    await program(source.replace('f"{STYLE} words"', 'f"very {STYLE} words"')).essay.run("tea")
    assert asked() == ["tea in very short words"]


@pytest.mark.parametrize("inside", [True, False])
async def test_edited_prompt_file_asks_again_and_its_undoing_does_not(
    program, asked, tmp_path, monkeypatch, inside, said
):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    body = 'await step("triage", triage, topic)' if inside else "await triage(topic)"
    source = IMPORTS + textwrap.dedent(
        f"""
        async def triage(topic):
            return await generate_content(load_prompt("triage", topic=topic))

        @workflow
        async def essay(ctx, topic: str):
            other = await step("other", lambda: generate_content("Other"))
            return {body}
        """
    )

    async def run_with(text):
        (folder / "triage.md").write_text(text)
        await program(source).essay.run("tea")
        return asked()

    assert await run_with("Triage {{topic}}") == ["Other", "Triage tea"]
    assert await run_with("Triage {{topic}}") == []
    assert await run_with("Sort {{topic}}") == ["Sort tea"]
    if inside:
        assert "triage ran again" in said() and "triage.md" in said()
    assert await run_with("Triage {{topic}}") == []
    assert await run_with("Sort {{topic}}") == []


def test_edit_between_two_processes_asks_one_call(tmp_path):
    """The same with a file that two processes run as a script."""
    source = """
    from agentflow.testing import FakeModel

    @workflow
    async def essay(ctx, topic: str):
        one = await generate_content(f"Outline {topic}", name="outline")
        two = await step("draft", lambda: generate_content(f"Draft of {one}"))
        return await generate_content(f"Review {topic}", name="review")

    def reply(asked):
        note(asked["text"])
        return "answer"

    configure(model="openai:gpt-5-mini")
    os.environ["OPENAI_API_KEY"] = "none"
    with FakeModel(reply):
        essay.run_sync("tea")
    """
    run_program(source, tmp_path)
    ended = run_program(source.replace("Draft of", "Better draft of"), tmp_path)
    assert notes(tmp_path) == ["Outline tea", "Draft of answer", "Review tea", "Better draft of answer"]
    assert "3 steps: 2 replayed, 1 run" in ended.err
    assert "draft ran again" in ended.err


# -- steps that ask no model -------------------------------------------------------------------------------------------

CHARGE = (
    IMPORTS
    + """
def charge(order):
    DONE.append(order)
    return f"paid {order}"

@workflowOPTIONS
async def shop(ctx, order: str):
    return await step("charge", charge, orderSTEP)
"""
)


def shop(program, *, source=CHARGE, options="", step_options="", done):
    module = program(source.replace("OPTIONS", options).replace("STEP", step_options))
    module.DONE = done
    return module.shop


EDITED = CHARGE.replace('f"paid {order}"', 'f"charged {order}"')


async def test_edited_charge_keeps_its_record_and_one_line_says_so(program, said):
    done = []
    assert await shop(program, done=done).run("o1") == "paid o1"
    assert await shop(program, source=EDITED, done=done).run("o1") == "paid o1"
    assert done == ["o1"]
    kept = [line for line in said().splitlines() if "record kept" in line]
    assert len(kept) == 1
    assert "charge" in kept[0] and "edited" in kept[0]


POLICY = {
    # policy: (result after the edit, runs in all)
    "auto": ("paid o1", 1),
    "rerun": ("charged o1", 2),
    "reuse": ("paid o1", 1),
    "error": (StepChanged, 1),
}


@pytest.mark.parametrize("place", ["workflow", "step", "step against workflow"])
@pytest.mark.parametrize("policy", POLICY)
async def test_on_change_decides_about_an_edited_plain_step(program, said, policy, place):
    """The step's setting wins over its workflow's."""
    other = "reuse" if policy != "reuse" else "rerun"
    options = {"workflow": f'(on_change="{policy}")', "step": "", "step against workflow": f'(on_change="{other}")'}[
        place
    ]
    step_options = "" if place == "workflow" else f', on_change="{policy}"'
    expected, count = POLICY[policy]
    done = []

    def version(source):
        return shop(program, source=source, options=options, step_options=step_options, done=done)

    assert await version(CHARGE).run("o1") == "paid o1"
    assert await version(CHARGE).run("o1") == "paid o1"
    if expected is StepChanged:
        with pytest.raises(StepChanged, match=r"charge.*rerun=\['charge'\]") as caught:
            await version(EDITED).run("o1")
        assert caught.value.step == "charge"
    else:
        assert await version(EDITED).run("o1") == expected
        assert await version(EDITED).run("o1") == expected
    assert len(done) == count
    assert ("record kept" in said()) == (policy == "auto")
    assert await version(CHARGE).run("o1") == "paid o1", "going back finds the first record"
    assert len(done) == count


AI = (
    IMPORTS
    + """
async def write(topic):
    return await generate_content(f"Write about {topic}")

@workflowOPTIONS
async def essay(ctx, topic: str):
    return await step("write", write, topic)
"""
)


@pytest.mark.parametrize(
    ("policy", "questions"),
    [("auto", ["Poem about tea"]), ("rerun", ["Poem about tea"]), ("reuse", []), ("error", StepChanged)],
)
async def test_on_change_decides_about_an_edited_ai_step(program, asked, policy, questions):
    source = AI.replace("OPTIONS", f'(on_change="{policy}")')
    await program(source).essay.run("tea")
    assert asked() == ["Write about tea"]
    edited = program(source.replace("Write", "Poem"))
    if questions is StepChanged:
        with pytest.raises(StepChanged):
            await edited.essay.run("tea")
        questions = []
    else:
        await edited.essay.run("tea")
    assert asked() == questions


async def test_error_refuses_an_edited_prompt_of_a_call_in_the_body_before_anything_is_spent(program, asked):
    """A model call outside a step is its own step."""
    source = IMPORTS + NAMED.replace("END", "").replace("@workflow", '@workflow(on_change="error")')
    await program(source).essay.run("tea")
    await program(source).essay.run("tea")
    asked()
    with pytest.raises(StepChanged, match=r"(?s)'draft'.*rerun=\['draft'\]"):
        await program(source.replace("Draft of", "A better draft of")).essay.run("tea")
    assert asked() == []


async def test_reuse_ignores_a_changed_model(program, asked):
    module = program(AI.replace("OPTIONS", '(on_change="reuse")'))
    await module.essay.run("tea")
    agentflow.configure(model="openai:gpt-5-nano")
    await module.essay.run("tea")
    assert asked() == ["Write about tea"]


async def test_error_refuses_a_changed_model_before_anything_is_spent(program, asked):
    source = AI.replace("OPTIONS", '(on_change="error")')
    module = program(source)
    await module.essay.run("tea")
    agentflow.configure(model="openai:gpt-5-nano")
    with pytest.raises(StepChanged, match="gpt-5-nano"):
        await module.essay.run("tea")
    assert asked() == ["Write about tea"]


async def test_error_refuses_a_recorded_step_that_is_given_something_else():
    """The setting is about recorded steps: edited ones and those given other data."""
    number, ran = 1, []

    @workflow(on_change="error")
    async def flow(ctx, n: int):
        return await step("work", lambda k: ran.append(k), number)

    await flow.run(1)
    await flow.run(1)
    number = 2
    with pytest.raises(StepChanged, match=r"(?s)work.*args\[0\]: 1 -> 2.*rerun=\['work'\]"):
        await flow.run(1)
    assert ran == [1]


async def test_error_allows_a_step_that_is_new():
    names, ran = ["a"], []

    @workflow(on_change="error")
    async def flow(ctx, n: int):
        return [await step(name, ran.append, name) for name in names]

    await flow.run(1)
    names.append("b")
    await flow.run(1)
    assert ran == ["a", "b"]


ASK = (
    IMPORTS
    + """
@workflow
async def flow(ctx, n: int):
    draft = await generate_content("Draft", name="draft")
    one = await human_task(type="approve", data={"amount": 100})
    again = await human_task(type="approve", data={"amount": 100})
    return [one.comment, again.comment]
"""
)


@pytest.mark.parametrize("answered", [True, False])
async def test_edit_before_a_question_that_shows_the_same_asks_nobody_again(program, asked, answered):
    """The step before it has another record; the task, open or answered, is the same one."""
    with pytest.raises(Waiting):
        await program(ASK).flow.run(1)
    [task] = tasks.list()
    if answered:
        tasks.approve(task.id, comment="first")
    edited = program(ASK.replace('"Draft"', '"A better draft"')).flow
    with pytest.raises(Waiting):
        await edited.run(1)
    if not answered:
        assert [each.id for each in tasks.list(status=None)] == [task.id]
        tasks.approve(task.id, comment="first")
        with pytest.raises(Waiting):
            await edited.run(1)
    [second] = tasks.list()
    assert second.id != task.id, "one approval does not answer the same question asked a second time"
    tasks.approve(second.id, comment="second")
    assert await edited.run(1) == ["first", "second"]
    assert await program(ASK).flow.run(1) == ["first", "second"]
    assert len(tasks.list(status=None)) == 2
    assert asked() == ["Draft", "A better draft"]


async def test_approval_that_was_used_does_not_answer_the_same_question_later(tmp_path):
    """The first approval is replayed, not asked for, when the second question comes."""
    gate = tmp_path / "gate"

    def check():
        gate.stat()

    @workflow
    async def flow(ctx, n: int):
        one = await human_task(type="approve", data=100)
        await step("check", check)
        two = await human_task(type="approve", data=100)
        return [one.comment, two.comment]

    with pytest.raises(Waiting):
        await flow.run(1)
    tasks.approve(tasks.list()[0].id, comment="first")
    with pytest.raises(FileNotFoundError):
        await flow.run(1)
    gate.touch()
    with pytest.raises(Waiting):
        await flow.run(1)
    [second] = tasks.list()
    tasks.approve(second.id, comment="second")
    assert await flow.run(1) == ["first", "second"]


@pytest.mark.parametrize("policy", ["auto", "rerun", "reuse", "error"])
async def test_person_is_asked_again_for_other_data_under_every_setting(program, policy):
    """An approval covers exactly what was shown; an edit around it asks nobody."""
    source = IMPORTS + textwrap.dedent(
        f"""
        @workflow(on_change="{policy}")
        async def flow(ctx, n: int):
            amount = 100
            return (await human_task(type="approve", data={{"amount": amount}})).approved
        """
    )
    with pytest.raises(Waiting):
        await program(source).flow.run(1)
    [task] = tasks.list()
    tasks.approve(task.id)
    assert await program(source).flow.run(1) is True
    assert await program(source.replace("amount = 100", "amount = 100  # dollars\n    len('x')")).flow.run(1) is True
    with pytest.raises(Waiting):
        await program(source.replace("100", "200")).flow.run(1)
    [task] = tasks.list()
    assert task.data == {"amount": 200}


# -- effects -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"effect": True}, {"compensate": lambda result: None}])
async def test_effect_whose_input_changed_is_refused_with_the_difference_and_the_way_out(option):
    amount, charged = 100, []

    def charge(order):
        charged.append(order["amount"])
        return f"paid {order['amount']}"

    @workflow
    async def shop(ctx, order: str):
        return await step("charge", charge, {"id": order, "amount": amount}, **option)

    assert await shop.run("o1") == "paid 100"
    amount = 120
    with pytest.raises(StepChanged, match=r"(?s)'charge'.*amount: 100 -> 120.*rerun=\['charge'\]") as caught:
        await shop.run("o1")
    assert caught.value.step == "charge" and caught.value.run_id
    assert charged == [100]
    assert await shop.options(rerun=["charge"]).run("o1") == "paid 120"
    assert charged == [100, 120]


async def test_effects_of_a_loop_are_different_operations():
    """A second effect of the same name is no changed one, while the first is asked for as well."""
    orders, charged = ["a", "b"], []

    @workflow
    async def shop(ctx, n: int):
        for order in orders:
            await step("charge", charged.append, order, effect=True)

    await shop.run(1)
    orders.append("c")
    await shop.run(1)
    assert charged == ["a", "b", "c"]


async def test_effect_with_a_clock_in_its_input_is_not_refused():
    from datetime import datetime

    charged = []

    @workflow
    async def shop(ctx, n: int):
        return await step("charge", charged.append, datetime.now(), effect=True)

    await shop.run(1)
    await shop.run(1)
    assert len(charged) == 1


# -- keys --------------------------------------------------------------------------------------------------------------


async def test_key_gives_the_recorded_output_across_runs(said):
    charged = []

    def charge(order):
        charged.append(order)
        return f"receipt {len(charged)}"

    @workflow
    async def shop(ctx, customer: str):
        return await step("charge", charge, "o1", idempotency_key="charge-o1")

    assert await shop.run("ada") == "receipt 1"
    assert await shop.run("bob") == "receipt 1"
    assert await shop.options(fresh=True).run("ada") == "receipt 1"
    assert charged == ["o1"]
    assert "given something else" not in said()


async def test_key_of_another_step_name_is_another_operation():
    @workflow
    async def shop(ctx, n: int):
        return [await step(name, lambda: name, idempotency_key="k") for name in ("charge", "refund")]

    assert await shop.run(1) == ["charge", "refund"]


async def test_key_wins_over_other_data_with_one_warning(said):
    charged = []

    def charge(order, amount):
        charged.append(amount)
        return f"paid {amount}"

    @workflow
    async def shop(ctx, amount: int):
        first = await step("charge", charge, "o1", amount, idempotency_key="charge-o1")
        second = await step("charge", charge, "o1", amount + 5, idempotency_key="charge-o1")
        return [first, second]

    assert await shop.run(100) == ["paid 100", "paid 100"]
    assert await shop.run(200) == ["paid 100", "paid 100"]
    assert charged == [100]
    for run_id in {run.id for run in runs.list()}:
        warned = [line for line in said().splitlines() if line.startswith(run_id) and "given something else" in line]
        assert len(warned) == 1, "one warning a run"
        assert "charge-o1" in warned[0]


@pytest.mark.parametrize("same", [True, False])
async def test_key_of_another_workflow_is_shared_for_the_same_input_and_refused_for_another(same):
    charged = []

    def charge(amount):
        charged.append(amount)
        return f"paid {amount}"

    @workflow
    async def shop(ctx, n: int):
        return await step("charge", charge, 100, idempotency_key="k1")

    @workflow
    async def club(ctx, n: int):
        return await step("charge", charge, 100 if same else 7, idempotency_key="k1")

    await shop.run(1)
    if same:
        assert await club.run(1) == "paid 100"
    else:
        with pytest.raises(IdempotencyConflict, match=r"(?s)'k1'.*'charge'.*'shop'"):
            await club.run(1)
    assert charged == [100]


@pytest.mark.parametrize("policy", ["auto", "rerun", "reuse", "error"])
async def test_key_wins_over_edited_code(program, policy):
    done, options, key = [], f'(on_change="{policy}")', ', idempotency_key="charge-" + order'
    assert await shop(program, options=options, step_options=key, done=done).run("o1") == "paid o1"
    assert await shop(program, source=EDITED, options=options, step_options=key, done=done).run("o1") == "paid o1"
    assert done == ["o1"]


async def test_key_of_an_ai_step_wins_over_an_edited_prompt(program, asked):
    source = AI.replace("OPTIONS", "").replace("write, topic", 'write, topic, idempotency_key="essay"')
    await program(source).essay.run("tea")
    await program(source.replace("Write", "Poem")).essay.run("tea")
    assert asked() == ["Write about tea"]


async def test_key_of_a_failed_step_is_free_to_be_tried_again():
    tried = []

    def charge():
        tried.append(1)
        if len(tried) == 1:
            raise OSError("down")
        return "paid"

    @workflow
    async def shop(ctx, n: int):
        return await step("charge", charge, idempotency_key="k")

    with pytest.raises(OSError):
        await shop.run(1)
    assert await shop.run(2) == "paid"
    assert len(tried) == 2


async def test_two_calls_with_one_key_at_the_same_time_run_once():
    ran = []

    async def charge():
        ran.append(1)
        await asyncio.sleep(0.02)
        return len(ran)

    @workflow
    async def shop(ctx, n: int):
        return await parallel([step("charge", charge, idempotency_key="k") for _ in range(3)])

    assert await shop.run(1) == [1, 1, 1]


async def test_current_step_always_has_a_key_that_stays_and_a_given_one_is_it():
    keys = []

    def charge(fail):
        keys.append(current_step().idempotency_key)
        if fail and len(keys) < 3:
            raise OSError

    @workflow
    async def shop(ctx, n: int):
        await step("charge", charge, True, retry={"max_attempts": 3, "initial_delay": 0})
        await step("charge", charge, False)
        await step("charge", charge, False, idempotency_key="mine")

    await shop.run(1)
    assert len(keys) == 5
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert all(keys)
    assert keys[4] == "mine"


# -- max_age and secret ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock():
    now = [1_800_000_000.0]
    settings.clock = lambda: now[0]
    return now


async def test_record_older_than_max_age_is_made_anew(clock, said):
    fetched = []

    def fetch():
        fetched.append(1)
        return len(fetched)

    @workflow
    async def flow(ctx, n: int):
        return await step("fetch", fetch, max_age="1h")

    assert await flow.run(1) == 1
    clock[0] += 3599
    assert await flow.run(1) == 1
    clock[0] += 2
    assert await flow.run(1) == 2
    assert "fetch ran again: its record is older than max_age" in said()
    clock[0] += 3000
    assert await flow.run(1) == 2, "its age counts from the newer record"


async def test_ai_step_older_than_max_age_asks_anew(clock, asked):
    @workflow
    async def flow(ctx, n: int):
        return await step("news", lambda: generate_content("What is new?"), max_age="1h")

    await flow.run(1)
    clock[0] += 1800
    await flow.run(1)
    assert asked() == ["What is new?"]
    clock[0] += 3600
    await flow.run(1)
    assert asked() == ["What is new?"]
    await flow.run(1)
    assert asked() == []


async def test_secret_output_is_not_recorded_and_runs_again_on_replay(said):
    ran = []

    def login():
        ran.append(1)
        return f"token-sesame-{len(ran)}"

    @workflow
    async def flow(ctx, n: int):
        token = await step("login", login, secret=True)
        return len(token)

    await flow.run(1)
    assert await flow.run(1) == len("token-sesame-2")
    assert len(ran) == 2
    assert "sesame" not in json.dumps(everything())
    [run] = runs.list()
    assert [(s.name, s.status, s.output) for s in run.steps] == [("login", "completed", None)]


async def test_model_call_in_a_secret_step_is_paid_once(asked):
    @workflow
    async def flow(ctx, n: int):
        return len(await step("ask", lambda: generate_content("Secret?"), secret=True))

    assert await flow.run(1) == await flow.run(1)
    assert asked() == ["Secret?"]


# -- plan --------------------------------------------------------------------------------------------------------------


def states(plan):
    return [(each.name, each.state) for each in plan.steps]


async def test_plan_of_a_finished_run_reuses_everything(program, asked):
    module = program(IMPORTS + NAMED.replace("END", ""))
    await module.essay.run("tea")
    asked()
    plan = await module.essay.plan("tea")
    assert states(plan) == [(name, "reused") for name in ("outline", "draft", "title", "review")]
    assert plan.dollars == 0


@pytest.mark.parametrize("form", FORMS)
async def test_plan_of_an_edit_stops_at_the_first_step_that_would_run(program, asked, form):
    """Nothing is spent, nothing is written, no status changes."""
    set_price(MODEL, 1000, 1000)
    source = IMPORTS + FORMS[form].replace("END", "")
    await program(source).essay.run("tea")
    asked()
    before = everything()
    plan = await program(source.replace("Draft of", "A better draft of")).essay.plan("tea")
    assert states(plan) == [("outline", "reused"), ("draft", "changed")]
    assert everything() == before
    assert asked() == []
    text = str(plan)
    assert "outline" in text and "draft" in text
    assert "etter" in text or "edited" in text
    assert plan.steps[1].cost is not None and plan.dollars == plan.steps[1].cost > Decimal(0)
    await program(source).essay.run("tea")
    assert asked() == []


async def test_plan_shows_the_difference_of_what_a_step_would_be_given():
    amount = 100

    @workflow
    async def shop(ctx, n: int):
        return await step("total", lambda order: order["amount"], {"amount": amount})

    await shop.run(1)
    amount = 120
    plan = await shop.plan(1)
    assert states(plan) == [("total", "changed")]
    assert "amount: 100 -> 120" in plan.steps[0].diff
    assert "amount: 100 -> 120" in str(plan)


async def test_plan_of_a_first_run_is_new_and_leaves_no_trace():
    ran = []

    @workflow
    async def flow(ctx, n: int):
        await step("a", ran.append, 1)
        await step("b", ran.append, 2)

    plan = await flow.plan(1)
    assert states(plan) == [("a", "unknown")]
    assert plan.dollars is None
    assert ran == [] and runs.list() == []


async def test_plan_stops_each_branch_at_its_own_first_step():
    prefix, ran = "x", []

    async def branch(name):
        first = await step("first", lambda n: ran.append(n) or n, f"{prefix if name == 'b' else 'x'}{name}")
        return await step("second", lambda f: ran.append(f) or f, first)

    @workflow
    async def flow(ctx, n: int):
        return await asyncio.gather(branch("a"), branch("b"))

    await flow.run(1)
    prefix = "y"
    count = len(ran)
    plan = await flow.plan(1)
    assert sorted(states(plan)) == [("first", "changed"), ("first", "reused"), ("second", "reused")]
    assert len(ran) == count


async def test_plan_of_a_failed_run_names_the_step_that_would_be_tried():
    ran = []

    def fail():
        ran.append(1)
        raise OSError("down")

    @workflow
    async def flow(ctx, n: int):
        await step("a", int)
        await step("b", fail)

    with pytest.raises(OSError):
        await flow.run(1)
    before = everything()
    plan = await flow.plan(1)
    assert [name for name, _ in states(plan)] == ["a", "b"]
    assert plan.steps[0].state == "reused" and plan.steps[1].state == "changed"
    assert "failed" in plan.steps[1].reason
    assert ran == [1] and everything() == before


async def test_plan_asks_nobody_and_shows_a_kept_edit(program):
    done = []
    await shop(program, done=done).run("o1")
    plan = await shop(program, source=EDITED, done=done).plan("o1")
    assert states(plan) == [("charge", "reused")]

    @workflow
    async def flow(ctx, n: int):
        return await human_task(type="approve", data=n)

    plan = await flow.plan(1)
    assert [state for _, state in states(plan)] in (["unknown"], ["waiting"])
    assert tasks.list() == []


async def test_plan_with_a_key_runs_nothing_and_knows_the_record():
    charged = []

    @workflow
    async def flow(ctx, n: int):
        return await step("charge", charged.append, "o1", idempotency_key="k")

    assert states(await flow.plan(1)) == [("charge", "unknown")]
    await flow.run(1)
    before = everything()
    assert states(await flow.plan(2)) == [("charge", "reused")]
    assert charged == ["o1"] and everything() == before


async def test_plan_tells_that_an_effect_would_be_refused():
    amount, charged = 100, []

    @workflow
    async def flow(ctx, n: int):
        return await step("charge", charged.append, amount, effect=True)

    await flow.run(1)
    amount = 120
    plan = await flow.plan(1)
    assert "StepChanged" in str(plan) and "100 -> 120" in str(plan)
    assert charged == [100]


def test_plan_of_plain_code_is_the_same(tmp_path):
    from agentflow import sync

    prefix, ran = "x", []

    @sync.workflow
    def flow(ctx, n: int):
        one = sync.step("one", lambda: ran.append(1) or "one")
        return sync.step("two", lambda o, p: ran.append(2) or o + p, one, prefix)

    assert flow.run(1) == "onex"
    prefix = "y"
    before = everything()
    assert states(flow.plan(1)) == [("one", "reused"), ("two", "changed")]
    assert ran == [1, 2] and everything() == before


# -- rerun -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
async def test_rerun_asks_anew_and_what_follows_only_if_it_changed(program, form):
    agentflow.configure(model=MODEL)
    count = 0

    def answer(asked):
        nonlocal count
        count += 1
        return f"answer {count}" if "Draft" in asked["text"][:5] else f"about {asked['text'][:6]}"

    module = program(IMPORTS + FORMS[form].replace("END", ""))
    with FakeModel(answer) as model:
        asked = Asked(model)
        first = await module.essay.run("tea")
        asked()
        second = await module.essay.options(rerun=["draft"]).run("tea")
        assert asked() == ["Draft of about Outlin", "Review answer 5"]
        assert second[1] == "answer 5" != first[1]
        assert await module.essay.run("tea") == second, "the new answer stays"
        assert asked() == []


async def test_rerun_of_a_plain_step_does_it_anew_and_keeps_the_others(said):
    ran = []

    def work(name):
        ran.append(name)
        return len(ran)

    @workflow
    async def flow(ctx, n: int):
        return [await step(name, work, name) for name in "abc"]

    assert await flow.run(1) == [1, 2, 3]
    assert await flow.options(rerun=["b"]).run(1) == [1, 4, 3]
    assert "b ran again: asked for by rerun" in said()
    assert await flow.run(1) == [1, 4, 3]
    assert await flow.options(rerun=["a", "c"]).run(1) == [5, 4, 6]
    [run] = runs.list()
    chosen = next(s for s in run.steps if s.name == "b")
    assert await flow.options(rerun=[chosen.id]).run(1) == [5, 7, 6]


async def test_rerun_of_a_name_takes_all_steps_of_that_name():
    ran = []

    @workflow
    async def flow(ctx, n: int):
        for i in range(3):
            await step("s", ran.append, i)

    await flow.run(1)
    await flow.options(rerun=["s"]).run(1)
    assert ran == [0, 1, 2, 0, 1, 2]


async def test_rerun_of_an_inner_step_does_it_anew():
    ran = []

    def inner():
        ran.append("inner")
        return len(ran)

    async def outer():
        return await step("inner", inner)

    @workflow
    async def flow(ctx, n: int):
        return await step("outer", outer)

    assert await flow.run(1) == 1
    assert await flow.options(rerun=["inner"]).run(1) == 2
    assert await flow.run(1) == 2


async def test_rerun_of_a_keyed_step_counts_for_all_runs():
    ran = []

    def charge():
        ran.append(1)
        return len(ran)

    @workflow
    async def flow(ctx, n: int):
        return await step("charge", charge, idempotency_key="k")

    assert await flow.run(1) == await flow.run(2) == 1
    assert await flow.options(rerun=["charge"]).run(1) == 2
    assert await flow.run(1) == 2
    assert await flow.run(3) == 2


@pytest.mark.parametrize("names", [["nonsense"], ["a", "nonsense"]])
async def test_rerun_of_an_unknown_step_is_refused_with_the_known_names(names):
    ran = []

    @workflow
    async def flow(ctx, n: int):
        await step("a", ran.append, 1)

    await flow.run(1)
    with pytest.raises(UsageError, match=r"(?s)'nonsense'.*'a'"):
        await flow.options(rerun=names).run(1)
    assert ran == [1]
    assert runs.list()[0].status == "completed"
    await flow.run(1)
    assert ran == [1]


def test_rerun_of_a_text_and_of_a_fresh_run_is_refused():
    @workflow
    async def flow(ctx, n: int):
        return n

    with pytest.raises(UsageError, match=r"rerun=\['draft'\]"):
        flow.options(rerun="draft")
    with pytest.raises(UsageError, match="fresh"):
        flow.options(rerun=["draft"], fresh=True)
    with pytest.raises(UsageError, match="no run"):
        flow.options(rerun=["draft"]).run_sync(1)


# -- what is said ------------------------------------------------------------------------------------------------------


async def test_every_run_ends_with_a_line_of_steps_and_money(program, asked, said):
    set_price(MODEL, 1000, 1000)
    source = IMPORTS + NAMED.replace("END", "")
    await program(source).essay.run("tea")
    await program(source.replace("Title for", "A title for")).essay.run("tea")
    last = said().splitlines()[-1]
    assert "completed · 4 steps: 3 replayed, 1 run · paid $" in last and "saved $" in last
    run = runs.list()[0]
    assert run.cost > 0 and run.saved > 0


async def test_branch_taken_after_an_edit_and_back_finds_its_records(program, asked):
    source = IMPORTS + textwrap.dedent(
        """
        @workflow
        async def essay(ctx, topic: str):
            if GATE:
                return await generate_content("One way", name="one")
            return await generate_content("The other way", name="other")
        """
    )
    for gate, questions in ((1, ["One way"]), (0, ["The other way"]), (1, []), (0, [])):
        await program(source.replace("GATE", str(gate))).essay.run("tea")
        assert asked() == questions
