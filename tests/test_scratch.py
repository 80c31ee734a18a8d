"""Steps outside a workflow: lines of a script and cells of a notebook, durable in the project's scratch scope."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import Retry, runs, step
from agentflow.testing import FakeModel
from tests.kernels import Kernel
from tests.loopback import Loopback
from tests.programs import notes, run_program, start_program

MODEL = "openai:gpt-4o-mini"


# -- scripts -------------------------------------------------------------------------------------


def test_step_of_a_script_is_not_run_again_by_the_next_process(tmp_path: Path) -> None:
    program = """
        async def main():
            first = await step("load", lambda: note("load") or [1, 2, 3])
            second = await step("sum", lambda first: note("sum") or sum(first), first)
            print(first, second)
            if "die" in sys.argv:
                die()
        asyncio.run(main())
    """
    run_program(program, tmp_path, "die", expect_kill=True)
    assert run_program(program, tmp_path).out == "[1, 2, 3] 6\n"
    assert notes(tmp_path) == ["load", "sum"]


def test_exact_repeats_are_counted_within_a_process_so_a_polling_loop_ends(tmp_path: Path) -> None:
    program = """
        async def main():
            seen = []
            for n in range(4):
                seen.append(await step("poll", lambda: note("poll") or len(Path(HERE / "notes.txt").read_text().split())))
            print(seen)
        asyncio.run(main())
    """
    assert run_program(program, tmp_path).out == "[1, 2, 3, 4]\n"
    assert run_program(program, tmp_path).out == "[1, 2, 3, 4]\n", "the next process replays each poll"
    assert notes(tmp_path) == ["poll"] * 4


def test_edited_plain_function_gives_the_new_result_and_going_back_the_old_one(tmp_path: Path) -> None:
    program = """
        def price(n):
            note("price")
            return n * %d
        print(asyncio.run(step("price", price, 7)))
    """
    assert run_program(program % 2, tmp_path).out == "14\n"
    ended = run_program(program % 3, tmp_path)
    assert ended.out == "21\n" and "price ran again" in ended.err
    assert run_program(program % 2, tmp_path).out == "14\n"
    assert notes(tmp_path) == ["price", "price"]


def test_two_processes_that_ask_for_the_same_step_run_it_once(tmp_path: Path) -> None:
    program = """
        import time
        def slow(n):
            note("slow")
            (HERE / "started").touch()
            while not (HERE / "free").exists():
                time.sleep(0.005)
            return n
        note("ready")
        print(asyncio.run(step("slow", slow, 5)))
    """
    processes = [start_program(program, tmp_path) for _ in range(3)]
    deadline = time.monotonic() + 30
    while not (notes(tmp_path).count("ready") == 3 and (tmp_path / "started").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "free").touch()
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (out, process.returncode) == ("5\n", 0), err
    assert notes(tmp_path).count("slow") == 1


def test_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    program = """
        def slow():
            note("slow")
            if "die" in sys.argv:
                die()
            return 1
        print(asyncio.run(step("slow", slow)))
    """
    run_program(program, tmp_path, "die", expect_kill=True)
    start = time.monotonic()
    assert run_program(program, tmp_path).out == "1\n"
    assert time.monotonic() - start < 25


def test_failed_step_of_a_script_is_tried_again_by_the_next_process(tmp_path: Path) -> None:
    program = """
        def flaky():
            note("try")
            if not (HERE / "up").exists():
                raise ConnectionError("down")
            return "up"
        try:
            print(asyncio.run(step("flaky", flaky)))
        except ConnectionError as error:
            print(type(error).__name__, error.attempts)
    """
    assert run_program(program, tmp_path).out == "ConnectionError 1\n"
    (tmp_path / "up").touch()
    assert run_program(program, tmp_path).out == "up\n"
    assert run_program(program, tmp_path).out == "up\n"
    assert notes(tmp_path) == ["try", "try"]


def test_model_call_of_a_script_is_paid_once(tmp_path: Path) -> None:
    program = """
        async def main():
            print(await generate_content("Name a river.", model="openai:gpt-4o-mini"))
            if "die" in sys.argv:
                die()
        asyncio.run(main())
    """
    with Loopback() as server:
        run_program(program, tmp_path, "die", env=server.environment, expect_kill=True)
        first = run_program(program, tmp_path, env=server.environment).out
        assert run_program(program, tmp_path, env=server.environment).out == first
        assert len(server.arrived) == 1
        run_program(program.replace("river", "lake"), tmp_path, env=server.environment)
        assert len(server.arrived) == 2


async def test_global_client_filled_on_first_use_does_not_charge_twice() -> None:
    """Case 19: state that the step fills itself is no edit."""
    space: dict[str, Any] = {"charged": []}
    exec(
        "_client = None\n"
        "def charge(order):\n"
        "    global _client\n"
        "    if _client is None:\n"
        "        _client = object()\n"
        "    charged.append(order)\n"
        "    return order\n",
        space,
    )
    for _ in range(3):
        agentflow.scratch._scopes.clear()  # type: ignore[attr-defined]
        assert await step("charge", space["charge"], 7) == 7
    assert space["charged"] == [7]


async def test_counter_in_a_module_dict_does_not_run_the_step_again() -> None:
    """Case 19, the counter."""
    space: dict[str, Any] = {}
    exec(
        "stats = {'n': 0}\ndef work(x):\n    stats['n'] += 1\n    return x\n",
        space,
    )
    for _ in range(3):
        agentflow.scratch._scopes.clear()  # type: ignore[attr-defined]
        assert await step("work", space["work"], 1) == 1
    assert space["stats"] == {"n": 1}


async def test_decorated_steps_keys_and_retries_work_outside_a_workflow(again: Callable[[], None]) -> None:
    calls = []

    @step("charge", retry=Retry(max_attempts=2, initial_delay=0.001))
    async def charge(order: str) -> str:
        calls.append(order)
        if len(calls) == 1:
            raise ConnectionError
        return f"paid {order}"

    keyed = charge.options(idempotency_key="order-1")
    assert await keyed("a") == "paid a"
    again()
    assert await keyed("b") == "paid a", "the key names the operation"
    assert calls == ["a", "a"]


async def test_gather_of_steps_runs_them_side_by_side_and_replays(again: Callable[[], None]) -> None:
    meet = asyncio.Barrier(3)
    calls = []

    async def fetch(n: int) -> int:
        calls.append(n)
        await meet.wait()
        return n * n

    assert await asyncio.gather(*(step("fetch", fetch, n) for n in range(3))) == [0, 1, 4]
    again()
    assert await asyncio.gather(*(step("fetch", fetch, n) for n in (2, 0, 1))) == [4, 0, 1]
    assert sorted(calls) == [0, 1, 2]


async def test_step_outside_a_workflow_leaves_no_run(again: Callable[[], None]) -> None:
    await step("s", lambda: 1)
    assert runs.list() == []


def test_prompt_edit_in_a_script_asks_again_and_only_for_that_prompt() -> None:
    async def main(question: str) -> list[str]:
        return [
            await agentflow.generate_content("first", model=MODEL),
            await agentflow.generate_content(question, model=MODEL),
        ]

    with FakeModel(lambda asked: f"re: {asked['text']}") as model:
        for question, calls in (("second", 2), ("second", 2), ("other", 3), ("second", 3)):
            agentflow.scratch._scopes.clear()  # type: ignore[attr-defined]
            assert asyncio.run(main(question)) == ["re: first", f"re: {question}"]
            assert len(model.calls) == calls


def test_threads_of_one_process_that_ask_for_the_same_step_run_it_once() -> None:
    calls: list[int] = []
    free = threading.Event()

    def slow(n: int) -> int:
        calls.append(n)
        free.wait(10)
        return n

    results: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(asyncio.run(step("slow", slow, 1, idempotency_key="one")))  # type: ignore[arg-type]
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while not calls:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    free.set()
    for thread in threads:
        thread.join(20)
    assert results == [1, 1, 1] and calls == [1]


async def test_the_same_call_in_another_spelling_is_not_charged_twice(again: Callable[[], None]) -> None:
    """A step that asks for the same thing is the same step, however its arguments are written."""
    charged = []

    def charge(order: str, amount: int = 5, *, cur: str = "EUR") -> str:
        charged.append((order, amount, cur))
        return f"{order} {amount} {cur}"

    ask = step("charge")(charge)
    for args, kwargs in [(("n",), {}), ((), {"order": "n"}), (("n", 5), {}), (("n",), {"cur": "EUR", "amount": 5})]:
        # Each in a process of its own, as far as repeats are counted.
        again()
        assert await ask(*args, **kwargs) == "n 5 EUR"  # type: ignore[arg-type]
    assert charged == [("n", 5, "EUR")]
    assert await ask("n", 6) == "n 6 EUR"
    assert len(charged) == 2


def test_no_run_can_have_the_id_under_which_the_steps_outside_workflows_are_kept() -> None:
    @agentflow.workflow
    async def flow(ctx: Any, n: int) -> int:
        return n

    @agentflow.workflow("named", run_id=lambda n: "scratch")
    async def named(ctx: Any, n: int) -> int:
        return n

    for run in (flow.options(run_id="scratch"), flow.options(run_id="scratch", fresh=True), named):
        with pytest.raises(agentflow.UsageError, match="outside workflows"):
            run.run_sync(1)
    assert runs.list() == []


# -- cells of a notebook -------------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    with Kernel(tmp_path) as made:
        yield made


PREPARE = """
import os, sys
from agentflow import *
def note(word):
    with open("notes.txt", "a") as file:
        file.write(f"{word}\\n")
"""


def test_cells_of_a_kernel_replay_notice_edits_and_survive_a_restart(kernel: Kernel, tmp_path: Path) -> None:
    """Cases 21, 45 and 46 in a real kernel, in one session to keep it quick."""
    assert kernel.printed(PREPARE) == ""
    load = "def load(n):\n    note('load')\n    return n * 2\nprint(await step('load', load, 4))"
    assert kernel.printed(load) == "8\n"
    assert kernel.printed(load) == "8\n", "the same cell again"
    assert notes(tmp_path) == ["load"]

    edited = load.replace("n * 2", "n * 3")
    assert kernel.printed(edited) == "12\n", "an edited plain function gives the new result"
    assert notes(tmp_path) == ["load", "load"]

    # Case 21: a variable set in another cell and named by a lambda is given, not code.
    fetch = "print(await step('fetch', lambda: note('fetch ' + url) or url.upper()))"
    kernel.printed("url = 'a'")
    assert kernel.printed(fetch) == "A\n"
    kernel.printed("url = 'b'")
    assert kernel.printed(fetch) == "B\n"
    kernel.printed("url = 'a'")
    assert kernel.printed(fetch) == "A\n"
    assert notes(tmp_path)[2:] == ["fetch a", "fetch b"]

    # Case 11: in a cell the variable of the loop is a global, and the trap is the same.
    trap = (
        "import asyncio\n"
        "out = []\n"
        "for i in range(3):\n"
        "    out.append(step('t', lambda%s: note('trap') or i * 10))\n"
        "try:\n"
        "    print(await asyncio.gather(*out))\n"
        "except CapturedChanged as error:\n"
        "    print(type(error).__name__, \"'i'\" in str(error))"
    )
    assert kernel.printed(trap % "") == "CapturedChanged True\n"
    assert kernel.printed(trap % " i=i") == "[0, 10, 20]\n"
    turns = "print([await step('turn', lambda: i * 10) for i in range(3)], i)"
    assert kernel.printed(turns) == "[0, 10, 20] 2\n"

    # Case 45: repeats are counted within one execution of a cell.
    poll = (
        "seen = []\n"
        "for n in range(3):\n"
        "    seen.append(await step('poll', lambda: note('poll') or len(open('notes.txt').read().split('poll')) - 1))\n"
        "print(seen)"
    )
    assert kernel.printed(poll) == "[1, 2, 3]\n"
    assert kernel.printed(poll) == "[1, 2, 3]\n", "the second execution of the cell replays and ends"
    assert notes(tmp_path).count("poll") == 3

    # A workflow defined in a cell, run there, and run_sync where the kernel's loop is running.
    flow = (
        "@workflow('cell-flow')\n"
        "async def flow(ctx, n):\n"
        "    return await step('load', load, n)\n"
        "print(await flow.run(5), flow.run_sync(5))"
    )
    assert kernel.printed(flow) == "15 15\n"
    assert notes(tmp_path).count("load") == 3

    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(timeout=120)
    assert kernel.printed(PREPARE) == ""
    assert kernel.printed(edited) == "12\n"
    assert kernel.printed(flow) == "15 15\n"
    assert kernel.printed(poll) == "[1, 2, 3]\n"
    assert notes(tmp_path).count("load") == 3 and notes(tmp_path).count("poll") == 3, "nothing runs after a restart"


def test_script_killed_as_main_is_not_charged_again_when_imported_as_a_module(tmp_path: Path) -> None:
    """Case 46: bare type names make ``__main__.Order`` and ``app.Order`` one type."""
    program = """
        from dataclasses import dataclass

        @dataclass
        class Order:
            id: str

        def charge(order):
            note(f"charge {order.id}")
            return order.id

        @workflow("pay")
        async def pay(ctx, order: Order):
            paid = await step("charge", charge, order)
            if "die" in sys.argv:
                die()
            return paid

        async def scratch():
            return await step("scratch charge", charge, Order("s"))

        if __name__ == "__main__":
            asyncio.run(scratch())
            asyncio.run(pay.run(Order("1")))
    """
    run_program(program, tmp_path, "die", expect_kill=True, name="app.py")
    worker = """
        sys.path.insert(0, str(HERE))
        import app
        print(asyncio.run(app.scratch()), asyncio.run(app.pay.run(app.Order("1"))))
    """
    ended = run_program(worker, tmp_path, name="worker.py", env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert ended.out == "s 1\n"
    assert notes(tmp_path) == ["charge s", "charge 1"]


def test_scratch_journal_is_the_projects(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    folder = tmp_path / "src"
    folder.mkdir()
    env = {key: value for key, value in os.environ.items() if key == "AGENTFLOW_PATH"}
    program = """
        del os.environ["AGENTFLOW_PATH"]
        print(asyncio.run(step("s", lambda: 1)))
    """
    run_program(program, folder, env=env)
    assert (tmp_path / ".agentflow").is_dir() and not (folder / ".agentflow").exists()
