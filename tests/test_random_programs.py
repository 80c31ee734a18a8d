"""Random programs, killed, edited and run again, against a simple model of the reuse rules.

The model: a step's identity is its enclosing steps, name and given. Whatever was recorded for an identity is used as
often as the program asks for it, each record once; only what is asked for more often runs. A step whose record was
committed before a kill is there after it. Where a step stands (order, branch) never decides what it gets.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import random
import signal
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st

from agentflow import Retry, configure, generate_content, parallel, step, workflow
from agentflow.testing import FakeModel
from agentflow.writer import Writer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

Node = list[Any]  # [kind, name, given or children]
PROGRAM: list[Node] = []
LOG = ""
_number = 0


def ran(what: str) -> str:
    """Notes in a file that outlives the process that a function ran; gives what tells this execution from all others."""
    global _number
    _number += 1
    serial = f"<{os.getpid()}.{_number}>"
    with open(LOG, "a") as log:
        log.write(f"{serial} {what}\n")
    return serial


async def leaf(name: str, given: int) -> list[Any]:
    await asyncio.sleep(random.random() * 0.002)
    return [name, given, ran(f"{name} {given}")]


def plain_leaf(name: str, given: int) -> list[Any]:
    return [name, given, ran(f"{name} {given}")]


async def flaky(name: str, given: int) -> list[Any]:
    """Fails the first time in each process. That is noted in a file: data that others change would be edited code."""
    failed = Path(f"{LOG}-{os.getpid()}-{name}-{given}")
    if not failed.exists():
        failed.touch()
        raise ConnectionError("not yet")
    return [name, given, ran(f"{name} {given}")]


async def nested(children: list[Node]) -> list[Any]:
    return await play(children)


async def play(nodes: list[Node]) -> list[Any]:
    return [await play_one(node) for node in nodes]


async def play_one(node: Node) -> Any:
    kind, name, given = node
    if kind == "step":
        return await step(name, leaf, name, given)
    if kind == "sync":
        return await step(name, plain_leaf, name, given)
    if kind == "flaky":
        return await step(name, flaky, name, given, retry=Retry(max_attempts=3, initial_delay=0.0))
    if kind == "keyed":
        return await step(name, leaf, name, given, idempotency_key=f"key {given}")
    if kind == "ai":
        return [name, given, await generate_content(f"{name} {given}", model="openai:gpt-5-mini", name=name)]
    if kind == "outer":
        return await step(name, nested, given)
    if name == "gather":
        return list(await asyncio.gather(*(play(branch) for branch in given)))
    if name == "group":
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(play(branch)) for branch in given]
        return [task.result() for task in tasks]
    return await parallel.map(play, given)


@workflow("random-program")
async def body(ctx: Any) -> list[Any]:
    return await play(PROGRAM)


# -- what the model says ---------------------------------------------------------------------------

Identity = tuple[Any, ...]


def asked(nodes: list[Node], results: list[Any], within: Identity = ()) -> Iterator[tuple[Identity, Any]]:
    """Each leaf of the program with what it got."""
    for (kind, name, given), result in zip(nodes, results, strict=True):
        if kind == "parallel":
            for branch, got in zip(given, result, strict=True):
                yield from asked(branch, got, within)
        elif kind == "outer":
            yield from asked(given, result, (*within, name, json.dumps(given)))
        elif kind == "keyed":
            yield (kind, name, given), result
        else:
            yield (*within, kind, name, given), result


def run(folder: Path, program: list[Node], kill: tuple[int, bool] | None = None) -> list[Any] | None:
    """Runs the program in a process of its own; None when it was killed. ``kill``: at which commit, before or after it."""
    pid = os.fork()
    if pid == 0:
        _child(folder, program, kill)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, (folder / "error").read_text()
    result: list[Any] = json.loads((folder / "result").read_text())
    return result


def _child(folder: Path, program: list[Node], kill: tuple[int, bool] | None) -> None:
    global LOG
    code = 1
    try:
        random.seed(len(json.dumps(program)))
        LOG = str(folder / "log")
        PROGRAM[:] = program
        if kill is not None:
            _kill_at(*kill)
        configure(path=folder / "journal", quiet=True)
        with FakeModel(lambda request: ran(request["text"])):
            result = body.options(run_id="r").run_sync()
        (folder / "result").write_text(json.dumps(result))
        code = 0
    except BaseException:
        import traceback

        (folder / "error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _kill_at(number: int, after: bool) -> None:
    transact, left = Writer._transact, number

    def counted(self: Writer, *args: Any, **kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        transact(self, *args, **kwargs)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Writer._transact = counted  # type: ignore[method-assign]


def executions(folder: Path) -> dict[str, str]:
    """Every execution so far: what tells it from others, and what it was."""
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return dict(line.split(" ", 1) for line in lines)


def committed(folder: Path) -> set[str]:
    """The executions whose result stands in a record."""
    file = folder / "journal" / "cache.db"
    if not file.exists():
        return set()
    con = sqlite3.connect(file)
    texts = [row[0] for row in con.execute("SELECT value FROM Cache WHERE key LIKE 's/%' OR key LIKE 'm/%'")]
    con.close()
    return {serial for serial in executions(folder) if any(serial in text for text in texts)}


class Checked:
    """Runs, each checked against the model and against the runs before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[Identity, set[str]] = {}

    def killed(self, program: list[Node], kill: tuple[int, bool]) -> None:
        if (result := run(self.folder, program, kill)) is not None:
            event("ended before it was killed")
            self.check(program, result, set(), Counter())
            return
        event("killed")
        there = committed(self.folder)
        before = set(executions(self.folder))
        result = run(self.folder, program)
        assert result is not None
        got = {value[2] for _, value in asked(program, result)}
        assert there <= got, f"committed before the kill and run again: {there - got}"
        lost = Counter(self._what(serial) for serial in before - there - self.known())
        self.check(program, result, before, lost)

    def known(self) -> set[str]:
        return set().union(*self.records.values()) if self.records else set()

    def _what(self, serial: str) -> str:
        return executions(self.folder)[serial]

    def again(self, program: list[Node]) -> None:
        before = set(executions(self.folder))
        result = run(self.folder, program)
        assert result is not None
        self.check(program, result, before, Counter())
        fresh = set(executions(self.folder)) - before
        assert len(fresh) == self.wanted, f"{self.wanted} had no record, and {len(fresh)} ran"

    def check(self, program: list[Node], result: list[Any], before: set[str], lost: Counter[str]) -> None:
        used: dict[Identity, list[str]] = {}
        for identity, (name, given, serial) in asked(program, result):
            assert identity[-2:] == (name, given), "a neighbour's result"
            assert self._what(serial) == f"{name} {given}"
            used.setdefault(identity, []).append(serial)
        self.wanted = 0
        for identity, serials in used.items():
            old = self.records.setdefault(identity, set())
            if identity[0] == "keyed":
                assert len(set(serials)) == 1, "two results under one key"
                self.wanted += not old
                assert not old or set(serials) == old
            else:
                assert len(set(serials)) == len(serials), "one record for two calls"
                self.wanted += max(0, len(serials) - len(old))
                assert len(set(serials) & old) == min(len(serials), len(old)), "run again although it was recorded"
            old |= set(serials)


# -- programs --------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b"])
givens = st.integers(0, 2)
leaves = st.tuples(st.sampled_from(["step", "step", "sync", "flaky", "keyed", "ai"]), names, givens).map(
    # One kind to a name, as in programs that people write; a key belongs to one name and given.
    lambda leaf: [leaf[0], f"{leaf[0]}-{leaf[1]}", leaf[2]]
)


def _containers(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    several = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("outer"), st.sampled_from(["o", "p"]), several).map(list),
        st.tuples(
            st.just("parallel"), st.sampled_from(["gather", "group", "map"]), st.lists(several, min_size=1, max_size=3)
        ).map(list),
    )


programs = st.lists(st.recursive(leaves, _containers, max_leaves=6), min_size=1, max_size=4)
edits = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99), leaves), min_size=1, max_size=4)


def edited(program: list[Node], changes: list[tuple[int, int, Node]]) -> list[Node]:
    """The program after some edits: steps inserted, removed, moved, given something else; branches reordered."""
    new = copy.deepcopy(program)
    for what, where, node in changes:
        blocks = list(_blocks(new))
        block = blocks[where % len(blocks)]
        at = where % (len(block) + 1)
        if what == 0:
            block.insert(at, copy.deepcopy(node))
        elif what == 1 and len(block) > 1:
            del block[at % len(block)]
        elif what == 2:
            block.reverse()
        elif what == 5 and len(block) > 1:
            moved = block.pop(at % len(block))
            places = [each for each in _blocks(new) if not any(each is inner for inner in _blocks([moved]))]
            to = places[(where // 7) % len(places)]
            to.insert(where % (len(to) + 1), moved)
        elif what == 3:
            branches = [each[2] for each in _nodes(new) if each[0] == "parallel"]
            if branches:
                branches[where % len(branches)].reverse()
        elif block[at % len(block)][0] not in ("outer", "parallel"):
            block[at % len(block)] = [*block[at % len(block)][:2], node[2]]
    return new


def restructured(nodes: list[Node], choices: Iterator[int]) -> list[Node]:
    """The same leaves in the same enclosing steps, with other branches: made, dissolved, reordered, of another form."""
    new: list[Node] = []
    for kind, name, given in nodes:
        choice = next(choices)
        if kind == "outer":
            # What it is given names it, so what is inside stays as it is.
            new.append([kind, name, given])
        elif kind != "parallel":
            new.append([kind, name, given] if choice % 3 else ["parallel", "gather", [[[kind, name, given]]]])
        else:
            branches = [restructured(branch, choices) for branch in given]
            if choice % 2:
                branches.reverse()
            if choice % 4 == 0:
                new += [node for branch in branches for node in branch]
            else:
                new.append([kind, ["gather", "group", "map"][choice % 3], branches])
    if next(choices) % 3 == 0 and len(new) > 1:
        new = [["parallel", "map", [[node] for node in new]]]
    return new


def _blocks(nodes: list[Node]) -> Iterator[list[Node]]:
    yield nodes
    for kind, _, given in nodes:
        for block in [given] if kind == "outer" else given if kind == "parallel" else []:
            yield from _blocks(block)


def _nodes(nodes: list[Node]) -> Iterator[Node]:
    for block in _blocks(nodes):
        yield from block


@hypothesis.given(programs, st.tuples(st.integers(0, 25), st.booleans()), edits)
def killed_and_edited(program: list[Node], kill: tuple[int, bool], changes: list[tuple[int, int, Node]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        runs = Checked(Path(name))
        runs.killed(program, kill)
        runs.again(program)
        runs.again(edited(program, changes))
        runs.again(program)


@hypothesis.given(programs, st.tuples(st.integers(0, 25), st.booleans()), st.lists(st.integers(0, 11), min_size=40, max_size=40))
def killed_and_restructured(program: list[Node], kill: tuple[int, bool], choices: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        runs, other = Checked(Path(name)), restructured(program, itertools.cycle(choices))
        if run(runs.folder, program, kill) is None:
            event("killed")
        there = committed(runs.folder)
        before = set(executions(runs.folder))
        result = run(runs.folder, other)
        assert result is not None
        got = {value[2] for _, value in asked(other, result)}
        assert there <= got, f"committed before the kill and run again: {[runs._what(each) for each in there - got]}"
        runs.check(other, result, before, Counter())
        runs.again(program)
        runs.again(other)


@hypothesis.given(programs, edits, edits)
def edited_half_way(program: list[Node], one: list[Any], other: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        runs = Checked(Path(name))
        for each in (program, edited(program, one), edited(program, other), program):
            runs.again(each)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What a model call imports is imported once, not in each process that is forked."""
    from agentflow.providers import openai

    with FakeModel(["Hello!"]):
        asyncio.run(openai.send({"model": "gpt-5-mini", "input": "Hi"}, timeout=None))


_settings = settings(deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None, print_blob=True)


@pytest.mark.parametrize("examples", [15])
def test_a_killed_and_edited_program_runs_again_only_what_has_no_record(examples: int) -> None:
    settings(_settings, max_examples=examples)(killed_and_edited)()


@pytest.mark.parametrize("examples", [15])
def test_a_killed_and_restructured_program_uses_all_that_was_committed(examples: int) -> None:
    settings(_settings, max_examples=examples)(killed_and_restructured)()


@pytest.mark.parametrize("examples", [15])
def test_edits_there_and_back_run_only_what_is_asked_for_more_often(examples: int) -> None:
    settings(_settings, max_examples=examples)(edited_half_way)()
