"""Programs that broke a draft of the reuse rules or another engine; each shows what must hold instead.

A restart is a real one: the first process kills itself (``first()``), the second one goes on.
"""

from __future__ import annotations

import asyncio
import functools
import json
import textwrap
import types
import uuid

import numpy as np
import pytest

from agentflow import CapturedChanged, NondeterministicStep, UsageError, generate_content, parallel, step, workflow
from agentflow.testing import FakeModel
from tests.programs import notes, run_program

HEAD = """
import json, random, threading, time, uuid
from datetime import datetime

def first():
    return "first" in sys.argv

def show(value):
    print(json.dumps(value))
"""


def killed_then_restarted(source, folder, *, between=lambda: None, env=None):
    """What the second process showed and said, after the first one killed itself."""
    program = HEAD + textwrap.dedent(source)
    run_program(program, folder, "first", expect_kill=True, env=env)
    between()
    ended = run_program(program, folder, env=env)
    return json.loads(ended.out), ended.err


def run_twice(source, folder, *, env=(None, None)):
    """What two processes showed, and what the second one said."""
    program = HEAD + textwrap.dedent(source)
    one = run_program(program, folder, "first", env=env[0])
    two = run_program(program, folder, env=env[1])
    return json.loads(one.out), json.loads(two.out), two.err


def echo(asked):
    return f"answer to {asked['text']}"


# -- loops and fan-outs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["lambda i=i: work(i)", "work, i", "partial(work, i)", "work_default(i)"])
def test_loop_killed_after_two_goes_on_with_the_third(tmp_path, call):
    """1: a loop over the same step name; after two of three the process dies."""
    got, _ = killed_then_restarted(
        f"""
        from functools import partial

        def work(i):
            note(i)
            return i

        def work_default(i):
            def inner(i=i):
                return work(i)
            return inner

        @workflow
        async def flow(ctx, n: int):
            out = []
            for i in range(n):
                out.append(await step("s", {call}))
                if i == 1 and first():
                    die()
            return out

        show(flow.run_sync(3))
        """,
        tmp_path,
    )
    assert got == [0, 1, 2]
    assert notes(tmp_path) == ["0", "1", "2"]


def test_gather_of_which_only_the_last_had_finished_gives_each_its_own_result(tmp_path):
    """2: at the kill, the last branch is recorded, the first two are in flight."""
    got, _ = killed_then_restarted(
        """
        async def work(i):
            if first() and i < 2:
                await asyncio.sleep(60)
            note(i)
            return f"result {i}"

        async def branch(i):
            out = await step("s", work, i)
            if first():
                die()
            return out

        @workflow
        async def flow(ctx, n: int):
            return await asyncio.gather(*(branch(i) for i in range(n)))

        show(flow.run_sync(3))
        """,
        tmp_path,
    )
    assert got == ["result 0", "result 1", "result 2"]
    assert sorted(notes(tmp_path)) == ["0", "1", "2"]


@pytest.mark.parametrize("call", ["lambda order=order: charge(order)", "charge, order"])
def test_order_that_appears_in_front_after_a_crash_takes_nobodys_answer(tmp_path, call):
    """3: the list is read in the body; after order A the process dies and X stands in front."""
    orders = tmp_path / "orders.txt"
    orders.write_text("A B")
    got, _ = killed_then_restarted(
        f"""
        def charge(order):
            note(order)
            return f"paid {{order}}"

        @workflow
        async def flow(ctx, n: int):
            out = []
            for order in (HERE / "orders.txt").read_text().split():
                out.append(await step("charge", {call}))
                if first():
                    die()
            return out

        show(flow.run_sync(1))
        """,
        tmp_path,
        between=lambda: orders.write_text("X A B"),
    )
    assert got == ["paid X", "paid A", "paid B"]
    assert sorted(notes(tmp_path)) == ["A", "B", "X"]


@pytest.mark.parametrize(
    "call", ['step("ask", ask, prompt)', 'step("ask", lambda: ask(prompt))', "generate_content(prompt)"]
)
def test_prompts_with_a_clock_in_a_gather_are_not_bought_again(tmp_path, call):
    """4: each prompt holds the time; two of three are answered when the process dies."""
    got, err = killed_then_restarted(
        f"""
        from agentflow.testing import FakeModel

        answered = 0

        async def reply(asked):
            question = asked["text"].rpartition(" ")[2]
            if first() and question == "c":
                await asyncio.sleep(60)
            note(question)
            return f"answer to {{question}}"

        async def ask(prompt):
            return await generate_content(prompt)

        async def branch(now, question):
            global answered
            prompt = f"{{now}} {{question}}"
            out = await {call}
            answered += 1
            if first() and answered == 2:
                die()
            return out

        @workflow
        async def flow(ctx, n: int):
            now = datetime.now().isoformat()
            return await asyncio.gather(*(branch(now, q) for q in "abc"))

        configure(model="openai:gpt-5-mini")
        os.environ["OPENAI_API_KEY"] = "none"
        with FakeModel(reply):
            show(flow.run_sync(1))
        """,
        tmp_path,
    )
    assert got == ["answer to a", "answer to b", "answer to c"]
    assert sorted(notes(tmp_path)) == ["a", "b", "c"]
    assert "ctx.now()" in err


@pytest.mark.parametrize("client", ["Client()", "threading.Lock()", "None"])
def test_polling_loop_replays_each_poll_and_makes_no_extra_one(tmp_path, client):
    """5: same name, same input, other answers; a captured client that has no data form is not refused."""
    got, _ = killed_then_restarted(
        f"""
        class Client:
            def __init__(self):
                self.lock = threading.Lock()

        def poll(client):
            note("poll")
            return len((HERE / "notes.txt").read_text().split())

        @workflow
        async def flow(ctx, n: int):
            client, seen = {client}, []
            while not seen or seen[-1] < 5:
                seen.append(await step("poll", lambda: poll(client)))
                if first() and len(seen) == 3:
                    die()
            return seen

        show(flow.run_sync(1))
        """,
        tmp_path,
    )
    assert got == [1, 2, 3, 4, 5]
    assert len(notes(tmp_path)) == 5


@pytest.mark.parametrize(
    "fan_out",
    [
        'await asyncio.gather(branch("a"), branch("b"))',
        'await parallel([branch("a"), branch("b")])',
        'await parallel.map(branch, ["a", "b"])',
        '[await t for t in [asyncio.create_task(branch("a")), asyncio.create_task(branch("b"))]]',
    ],
)
def test_exact_repeats_in_two_branches_keep_their_branch(tmp_path, fan_out):
    """6: the same call in both branches; the branch that was slow is the fast one after the restart."""
    got, _ = killed_then_restarted(
        f"""
        picked = {{}}

        def pick():
            note("run")
            return random.random()

        async def branch(label):
            slow = "a" if first() else "b"
            other = "b" if slow == "a" else "a"
            deadline = time.monotonic() + 20
            while label == slow and other not in picked and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            value = picked[label] = await step("pick", pick)
            if first():
                note(f"{{label}} {{value}}")
                if len(picked) == 2:
                    die()
            return value

        @workflow
        async def flow(ctx, n: int):
            return {fan_out}

        show(flow.run_sync(1))
        """,
        tmp_path,
    )
    said = notes(tmp_path)
    assert said.count("run") == 2
    assert {f"a {got[0]}", f"b {got[1]}"} <= set(said)


async def test_inserted_moved_and_removed_steps_run_nothing_else_again(said):
    """7: a finished run; then x is new, a and b change places, c is gone."""
    ran = []

    def work(name):
        ran.append(name)
        return f"did {name}"

    order = ["a", "b", "c"]

    @workflow
    async def flow(ctx, n: int):
        return [await step(name, work, name) for name in order]

    assert await flow.run(1) == ["did a", "did b", "did c"]
    order[:] = ["x", "b", "a"]
    assert await flow.run(1) == ["did x", "did b", "did a"]
    assert ran == ["a", "b", "c", "x"]
    assert "c: a recorded result was not used; the code does not ask for it any more" in said()


async def test_step_inserted_between_exact_repeats_leaves_them_their_answers():
    """7: repeats have only their order to be told apart by."""
    numbers, insert = iter(range(9)), False

    def pick():
        return next(numbers)

    @workflow
    async def flow(ctx, n: int):
        out = []
        for i in range(3):
            if insert and i == 1:
                await step("between", int)
            out.append(await step("pick", pick))
        return out

    assert await flow.run(1) == [0, 1, 2]
    insert = True
    assert await flow.run(1) == [0, 1, 2]
    assert next(numbers) == 3


async def test_step_inserted_in_front_of_equal_steps_in_branches_runs_nothing_again():
    """7: both branches make the same calls; a new one stands before them, and the branches change places."""
    numbers, insert, labels = iter(range(99)), False, ["a", "b"]

    def pick():
        return next(numbers)

    async def branch(label):
        if insert:
            await step("check", str, label)
        return label, [await step("pick", pick), await step("pick", pick)]

    @workflow
    async def flow(ctx, n: int):
        return dict(await asyncio.gather(*(branch(label) for label in labels)))

    before = await flow.run(1)
    insert = True
    labels.reverse()
    assert await flow.run(1) == before
    assert next(numbers) == 4


@pytest.mark.parametrize("insert", [False, True])
async def test_repeats_that_change_what_they_were_given_keep_their_order(insert):
    """7, 22: no two of them were given the same, and after the run they all are."""
    ran = []

    def pick():
        ran.append(len(ran))
        return ran[-1]

    inserted = False

    @workflow
    async def flow(ctx, n: int):
        out = []
        for i in range(4):
            if inserted and i == 1:
                await step("between", int)
            out.append(await step("pick", pick))
        return out

    assert await flow.run(1) == [0, 1, 2, 3]
    inserted = insert
    assert await flow.run(1) == [0, 1, 2, 3]
    assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize("call", ["lambda item=item: work(item)", "work, item"])
def test_list_that_shrinks_to_one_new_item_runs_that_item(tmp_path, call):
    """8: an unfinished run; the list that is read in the body holds something else after the kill."""
    items = tmp_path / "items.txt"
    items.write_text("A B")
    got, _ = killed_then_restarted(
        f"""
        def work(item):
            note(item)
            return f"did {{item}}"

        @workflow
        async def flow(ctx, n: int):
            out = []
            for item in (HERE / "items.txt").read_text().split():
                out.append(await step("work", {call}))
                if first():
                    die()
            return out

        show(flow.run_sync(1))
        """,
        tmp_path,
        between=lambda: items.write_text("C"),
    )
    assert got == ["did C"]
    assert notes(tmp_path) == ["A", "C"]


@pytest.mark.parametrize("policy", ["reuse", "auto", "rerun"])
async def test_new_item_of_a_finished_loop_is_not_given_a_neighbours_answer(policy):
    """9: on_change is about code; other data is another call under each of its settings."""
    items, ran = ["A", "B"], []

    def work(item):
        ran.append(item)
        return f"did {item}"

    @workflow(on_change=policy)
    async def flow(ctx, n: int):
        return [await step("work", work, item) for item in items]

    assert await flow.run(1) == ["did A", "did B"]
    items[1] = "C"
    assert await flow.run(1) == ["did A", "did C"]
    assert ran == ["A", "B", "C"]


async def test_recursion_fifty_deep_replays(said):
    """10: steps nested in steps of the same name."""
    ran = []

    async def down(n):
        ran.append(n)
        return 1 + await step("down", down, n - 1) if n else 0

    @workflow
    async def flow(ctx, n: int):
        return await step("down", down, n)

    assert await flow.run(50) == 50
    assert len(ran) == 51
    assert await flow.run(50) == 50
    assert len(ran) == 51
    assert "1 replayed, 0 run" in said()


async def test_loop_lambda_that_would_see_the_last_value_is_refused_by_name():
    """11: all lambdas of the comprehension share one variable."""
    ran = []

    @workflow
    async def flow(ctx, n: int):
        return await parallel([step("s", lambda: ran.append(d)) for d in ["a", "b"]])

    with pytest.raises(CapturedChanged, match=r"(?s)'s'.*'d'.*step\('s', f, d\)") as caught:
        await flow.run(1)
    assert caught.value.step == "s"
    assert ran in ([], ["b"])  # the last one does see its own value


async def test_loop_lambda_that_is_awaited_in_its_turn_sees_its_own_value(again):
    """11: the same lambda without a default argument is right where each is awaited before the next."""
    ran = []

    def work(d):
        ran.append(d)
        return d

    @workflow
    async def flow(ctx, n: int):
        out = []
        for d in ["a", "b"]:
            out.append(await step("s", lambda: work(d)))
        return out

    assert await flow.run(1) == ["a", "b"]
    assert await flow.run(1) == ["a", "b"]
    assert ran == ["a", "b"]


async def test_failed_task_whose_parent_went_on_stays_failed_until_rerun(tmp_path, said):
    """12: the parent did a step after its child's failure and only then awaited it: that is history."""
    tried, repaired = [], tmp_path / "repaired"

    def shaky():
        tried.append("shaky")
        if not repaired.exists():
            raise OSError("down")
        return "up"

    async def child():
        return await step("shaky", shaky)

    @workflow
    async def flow(ctx, n: int):
        task = asyncio.create_task(child())
        await asyncio.wait([task])
        await step("go on", int)
        return await task

    with pytest.raises(OSError):
        await flow.run(1)
    repaired.touch()
    with pytest.raises(OSError, match="down"):
        await flow.run(1)
    assert tried == ["shaky"]
    assert "rerun=['shaky']" in said()
    assert await flow.options(rerun=["shaky"]).run(1) == "up"
    assert tried == ["shaky", "shaky"]


# -- accidents of the moment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "advice"),
    [
        ("uuid.uuid4()", "ctx.uuid4()"),
        ("str(uuid.uuid4())", "ctx.uuid4()"),
        ("uuid.uuid4().hex", "ctx.uuid4()"),
        ("{'order': order, 'ref': f'ref-{uuid.uuid4()}'}", "ctx.uuid4()"),
        ("datetime.now()", "ctx.now()"),
        ("time.time()", "ctx.now()"),
        ("time.time_ns()", "ctx.now()"),
        ("f'{order} at {datetime.now():%Y-%m-%d %H:%M:%S.%f}'", "ctx.now()"),
    ],
)
def test_accident_of_the_moment_handed_to_a_charge_charges_once(tmp_path, reading, advice):
    """13, 14: a uuid or a clock reading made in the body; the process dies after the charge."""
    got, err = killed_then_restarted(
        f"""
        def charge(what):
            note("charged")
            return "receipt"

        @workflow
        async def flow(ctx, order: str):
            receipt = await step("charge", charge, {reading})
            if first():
                die()
            return receipt

        show(flow.run_sync("o1"))
        """,
        tmp_path,
    )
    assert got == "receipt"
    assert notes(tmp_path) == ["charged"]
    assert advice in err and "charge" in err


@pytest.mark.parametrize(
    "call", ["charge, datetime.now()", "lambda: charge(now)", "lambda now=datetime.now(): charge(now)"]
)
def test_finished_run_with_a_clock_in_its_body_charges_once(tmp_path, call):
    """14: the run had completed; it is run again by another process."""
    _, got, err = run_twice(
        f"""
        def charge(when):
            note("charged")
            return "receipt"

        @workflow
        async def flow(ctx, order: str):
            now = datetime.now()
            return await step("charge", {call})

        show(flow.run_sync("o1"))
        """,
        tmp_path,
    )
    assert got == "receipt"
    assert notes(tmp_path) == ["charged"]
    assert "ctx.now()" in err


async def test_clock_in_the_body_and_a_fixed_later_step_charge_once():
    """15: the step after the charge failed, its code is fixed, the run is run again."""
    from datetime import datetime

    charged = []

    def charge(when):
        charged.append(when)
        return "receipt"

    def ship_badly(receipt):
        raise ZeroDivisionError

    def ship_well(receipt):
        return f"shipped {receipt}"

    ship = ship_badly

    @workflow
    async def flow(ctx, order: str):
        receipt = await step("charge", charge, datetime.now())
        return await step("ship", ship, receipt)

    with pytest.raises(ZeroDivisionError):
        await flow.run("o1")
    ship = ship_well
    assert await flow.run("o1") == "shipped receipt"
    assert len(charged) == 1


@pytest.mark.parametrize("form", ["step", "direct"])
async def test_edited_date_constant_is_no_accident(form):
    """16: a date that stands in the body is data, whatever it looks like."""
    day = "2026-03-01T10:00:00"

    async def report(when):
        return await generate_content(f"Report of {when}", model="openai:gpt-5-mini")

    @workflow
    async def flow(ctx, n: int):
        return await (step("report", report, day) if form == "step" else report(day))

    with FakeModel(echo) as model:
        assert await flow.run(1) == "answer to Report of 2026-03-01T10:00:00"
        day = "2026-03-02T10:00:00"
        assert await flow.run(1) == "answer to Report of 2026-03-02T10:00:00"
    assert len(model.calls) == 2


def test_file_corrected_before_the_restart_is_not_answered_with_the_old_result(tmp_path):
    """17: other data is another call, also in a run that a crash had interrupted."""
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("1 2")
    got, err = killed_then_restarted(
        """
        def total(text):
            note(text)
            return sum(map(int, text.split()))

        @workflow
        async def flow(ctx, n: int):
            out = await step("total", total, (HERE / "numbers.txt").read_text())
            if first():
                die()
            return out

        show(flow.run_sync(1))
        """,
        tmp_path,
        between=lambda: numbers.write_text("1 3"),
    )
    assert got == 4
    assert "total: a recorded result was not used" in err


def test_random_choice_in_the_body_is_said(tmp_path):
    """18: nothing tells a random number from data: it runs, and the end names the record and the difference."""
    got, err = killed_then_restarted(
        """
        def use(number):
            note(number)
            return number

        @workflow
        async def flow(ctx, n: int):
            out = await step("use", use, random.choice(range(10**12)))
            if first():
                die()
            return out

        show(flow.run_sync(1))
        """,
        tmp_path,
    )
    before, after = notes(tmp_path)
    assert got == int(after)
    assert "use: a recorded result was not used; it was asked for with other data" in err
    assert before in err and after in err


async def test_records_that_differ_only_by_accident_and_have_other_results_are_not_guessed():
    """13: two charges with a fresh uuid each are recorded; the next run cannot know which is which."""
    charged = []

    @workflow
    async def flow(ctx, n: int):
        return [await step("charge", charge, str(uuid.uuid4())) for _ in range(2)]

    def charge(ref):
        charged.append(ref)
        return f"receipt {len(charged)}"

    assert await flow.run(1) == ["receipt 1", "receipt 2"]
    with pytest.raises(NondeterministicStep, match=r"(?s)'charge'.*uuid4.*ctx\.uuid4\(\).*idempotency_key"):
        await flow.run(1)
    assert len(charged) == 2


async def test_record_that_was_lent_and_is_then_asked_for_exactly_is_refused(tmp_path):
    """13: the first call takes the record of another uuid; then that very uuid comes."""
    recorded, folder = str(uuid.uuid4()), tmp_path / "charged"
    folder.mkdir()
    refs = [recorded]

    @workflow
    async def flow(ctx, n: int):
        for ref in refs:
            await step("charge", charge, ref)

    def charge(ref):
        (folder / ref).touch(exist_ok=False)

    await flow.run(1)
    refs[:] = [str(uuid.uuid4()), recorded]
    with pytest.raises(NondeterministicStep, match="asked for exactly"):
        await flow.run(1)
    assert [file.name for file in folder.iterdir()] == [recorded]


async def test_uuids_that_a_step_returned_are_data():
    """13: a uuid found in a recorded output is no accident: each order is charged once, none gets another's."""
    orders, charged, wanted = [str(uuid.uuid4()) for _ in range(3)], [], 1

    def charge(order):
        charged.append(order)
        return f"receipt for {order}"

    @workflow
    async def flow(ctx, n: int):
        found = await step("orders", lambda: orders)
        return [await step("charge", charge, order) for order in found[::-1][:wanted]]

    await flow.run(1)
    wanted = 3
    assert await flow.run(1) == [f"receipt for {order}" for order in orders[::-1]]
    assert charged == orders[::-1]
    wanted = 1
    orders_again = await flow.run(1)
    assert orders_again == [f"receipt for {orders[-1]}"]
    assert len(charged) == 3


async def test_values_of_the_context_are_the_same_after_a_restart(said):
    """13, 14, 18: what the warnings point to."""
    charged = []

    @workflow
    async def flow(ctx, n: int):
        await step("charge", lambda *given: charged.append(given), ctx.now(), ctx.uuid4(), ctx.random())

    await flow.run(1)
    await flow.run(1)
    assert len(charged) == 1
    assert "differs" not in said()


# -- globals, objects, aliasing ----------------------------------------------------------------------------------------

_client = None
COUNTS: dict[str, int] = {}
SEEN: list[int] = []


class _Client:
    def __init__(self):
        self.lock = asyncio.Lock()

    async def send(self, text):
        return await generate_content(text, model="openai:gpt-5-mini")


def _connected():
    global _client
    if _client is None:
        _client = _Client()
    return _client


@pytest.mark.parametrize("policy", ["auto", "rerun", "error"])
async def test_global_filled_on_first_use_is_no_edit(monkeypatch, policy):
    """19: a lazily made client and a counter in a module: the same kernel runs the finished run again."""
    monkeypatch.setitem(globals(), "_client", None)
    monkeypatch.setitem(globals(), "COUNTS", {})
    charged = []

    async def charge(order):
        COUNTS[order] = COUNTS.get(order, 0) + 1
        charged.append(order)
        return await _connected().send(f"charge {order}")

    @workflow(on_change=policy)
    async def flow(ctx, order: str):
        return await step("charge", charge, order)

    with FakeModel(echo) as model:
        assert await flow.run("o1") == await flow.run("o1")
    assert charged == ["o1"]
    assert len(model.calls) == 1


RATE = 2


def compute(order):
    return order * RATE


@pytest.mark.parametrize("policy", ["auto", "rerun", "reuse"])
async def test_function_and_lambda_treat_a_changed_constant_alike(monkeypatch, said, policy):
    """20: ``step("c", compute, o)`` and ``step("c", lambda: compute(o))``, a constant of compute edited."""

    @workflow(on_change=policy)
    async def plain(ctx, o: int):
        return await step("plain", compute, o)

    @workflow(on_change=policy)
    async def wrapped(ctx, o: int):
        return await step("wrapped", lambda: compute(o))

    assert [await plain.run(10), await wrapped.run(10)] == [20, 20]
    monkeypatch.setitem(globals(), "RATE", 3)
    expected = 30 if policy == "rerun" else 20
    assert [await plain.run(10), await wrapped.run(10)] == [expected, expected]
    words = {"auto": "record kept although code changed", "rerun": "ran again", "reuse": None}[policy]
    for name in ("plain", "wrapped"):
        lines = [line for line in said().splitlines() if f"{name}" in line and "RATE" in line]
        assert len(lines) == (words is not None)
        assert words is None or words in lines[0]


@pytest.mark.parametrize("where", ["scratch", "workflow"])
async def test_lambda_of_a_cell_fetches_again_when_its_data_changes_in_another_cell(again, where):
    """21: ``url = "..."`` is edited in another cell of a notebook."""
    fetched = []
    kernel = {"fetch": lambda url: fetched.append(url) or f"page {url}"}

    def cell(number, text):
        exec(compile(text, f"<ipython-input-{number}-abcdef>", "exec"), kernel)

    @workflow
    async def flow(ctx, n: int):
        return await step("get", kernel["get"])

    async def get():
        again()
        return await (flow.run(1) if where == "workflow" else step("get", kernel["get"]))

    cell(1, 'url = "one"')
    cell(2, "get = lambda: fetch(url)")
    assert [await get(), await get()] == ["page one", "page one"]
    cell(3, 'url = "two"')
    assert await get() == "page two"
    assert fetched == ["one", "two"]


async def test_list_that_a_step_changes_is_noticed_on_the_first_run(said):
    """22: the body shares a list with a step that fills it, which a replay would not."""

    @workflow
    async def flow(ctx, n: int):
        items = []
        await step("fill", lambda: items.append(1))
        return await step("use", lambda: sum(items))

    await flow.run(1)
    assert "fill: changes" in said()


@pytest.mark.parametrize("call", ["work, i", "work, i, SEEN", "lambda i=i: work(i, SEEN)"])
def test_step_that_appends_to_a_list_is_not_run_again(tmp_path, call, monkeypatch):
    """22: what a step changes itself does not count when it is looked for."""
    monkeypatch.delenv("AGENTFLOW_STRICT")
    got, _ = killed_then_restarted(
        f"""
        SEEN = []

        def work(i, seen=None):
            (SEEN if seen is None else seen).append(i)
            note(i)
            return i

        @workflow
        async def flow(ctx, n: int):
            out = []
            for i in range(n):
                out.append(await step("work", {call}))
                if first() and i == 1:
                    die()
            return out

        show(flow.run_sync(3))
        """,
        tmp_path,
    )
    assert got == [0, 1, 2]
    assert sorted(notes(tmp_path)) == ["0", "1", "2"]


class Agent:
    def __init__(self, topic, style="short"):
        self.topic = topic
        self.style = style
        self.calls = 0

    def plan(self):
        self.calls += 1
        PLANNED.append(self.topic)
        return f"plan for {self.topic}"

    async def ask(self):
        return await generate_content(f"{self.style} plan for {self.topic}", model="openai:gpt-5-mini")

    async def __call__(self, question):
        return await generate_content(f"{self.style}: {question}", model="openai:gpt-5-mini")


PLANNED: list[str] = []


@pytest.mark.parametrize("together", [True, False])
async def test_bound_methods_of_different_instances_keep_their_answers(monkeypatch, together):
    """23: two agents, the second run has them in another order."""
    monkeypatch.setitem(globals(), "PLANNED", [])
    topics = ["cats", "dogs"]

    @workflow
    async def flow(ctx, n: int):
        calls = (step("plan", Agent(topic).plan) for topic in topics)
        return list(await asyncio.gather(*calls)) if together else [await call for call in calls]

    assert await flow.run(1) == ["plan for cats", "plan for dogs"]
    topics.reverse()
    assert await flow.run(1) == ["plan for dogs", "plan for cats"]
    assert sorted(PLANNED) == ["cats", "dogs"]


async def test_counter_that_a_step_raises_on_its_own_object_does_not_run_it_again(monkeypatch):
    """24: the same object in the second run, which the first run had changed."""
    monkeypatch.setitem(globals(), "PLANNED", [])
    agent = Agent("cats")

    @workflow
    async def flow(ctx, n: int):
        return await step("plan", agent.plan)

    assert await flow.run(1) == await flow.run(1)
    assert agent.calls == 1


async def test_arrays_in_a_fan_out_keep_their_results_in_another_order():
    """25: arrays count by content."""
    arrays, ran = [np.arange(3), np.arange(3) * 10, np.zeros(3)], []

    def total(array):
        ran.append(float(array.sum()))
        return ran[-1]

    @workflow
    async def flow(ctx, n: int):
        return list(await asyncio.gather(*(step("total", total, array) for array in arrays)))

    assert await flow.run(1) == [3.0, 30.0, 0.0]
    arrays.reverse()
    assert await flow.run(1) == [0.0, 30.0, 3.0]
    assert len(ran) == 3


@pytest.mark.parametrize("form", ["list(names)", "names"])
def test_set_under_another_hash_seed_is_equal_or_said(tmp_path, form):
    """26: a set has no order; a list made of it has another one in each process."""
    _, _, err = run_twice(
        f"""
        def join(names):
            note("joined")
            return sorted(names)

        @workflow
        async def flow(ctx, n: int):
            names = {{"ada", "bob", "cyd", "dan", "eve", "fay"}}
            return await step("join", join, {form})

        show(flow.run_sync(1))
        """,
        tmp_path,
        env=({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"}),
    )
    if form == "names":
        assert notes(tmp_path) == ["joined"]
    else:
        assert "join: a recorded result was not used" in err


async def test_edited_objects_partials_and_methods_ask_again(monkeypatch):
    """27: an attribute of a callable instance, an argument of a partial, the code of a bound method."""
    agent, tone = Agent("cats"), "kind"

    async def greet(tone, name):
        return await generate_content(f"Be {tone} to {name}", model="openai:gpt-5-mini")

    @workflow
    async def flow(ctx, n: int):
        return [
            await step("call", agent, "why"),
            await step("greet", functools.partial(greet, tone), "Ada"),
            await step("ask", agent.ask),
        ]

    async def asked():
        with FakeModel(echo) as model:
            await flow.run(1)
        return [call["text"] for call in model.calls]

    assert await asked() == ["short: why", "Be kind to Ada", "short plan for cats"]
    assert await asked() == []
    tone = "stern"
    assert await asked() == ["Be stern to Ada"]
    agent.style = "long"
    assert await asked() == ["long: why", "long plan for cats"]

    async def edited(self):
        return await generate_content(f"a better plan for {self.topic}", model="openai:gpt-5-mini")

    monkeypatch.setattr(Agent, "ask", edited)
    assert await asked() == ["a better plan for cats"]
    assert await asked() == []


@pytest.mark.parametrize("form", ["captured", "argument", "default"])
async def test_generator_given_to_a_step_is_refused(form):
    """28: it would be used up by the first attempt and cannot be compared."""
    ran = []

    @workflow
    async def flow(ctx, n: int):
        numbers = (i for i in range(3))
        if form == "captured":
            return await step("sum", lambda: ran.append(sum(numbers)))
        if form == "argument":
            return await step("sum", sum, numbers)
        return await step("sum", lambda numbers=numbers: ran.append(sum(numbers)))

    with pytest.raises(UsageError, match="generator"):
        await flow.run(1)
    assert ran == []


async def test_same_code_object_with_other_globals_is_not_confused():
    """29: one compiled lambda, executed in two modules whose helper of that name differs."""
    text = compile("get = lambda: helper()", "shared.py", "exec")
    modules = []
    for number in (1, 2):
        module = types.ModuleType(f"shared{number}")
        exec(compile(f"def helper():\n    return {number}", f"shared{number}.py", "exec"), module.__dict__)
        exec(text, module.__dict__)
        modules.append(module)
    assert modules[0].get.__code__ is modules[1].get.__code__

    chosen = modules

    @workflow(on_change="rerun")
    async def flow(ctx, n: int):
        return [await step("get", module.get) for module in chosen]

    assert await flow.run(1) == [1, 2]
    assert await flow.run(1) == [1, 2]
    chosen = modules[::-1]
    assert await flow.run(1) == [2, 1]
    chosen = modules[1:]
    assert await flow.run(1) == [2]
