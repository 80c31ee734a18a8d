"""Random programs, killed, edited and reordered at random, against a simple model of what is reused.

A program is a list of nodes: plain steps, retried ones that fail at first, ones that fail for good (the body catches
that), keyed ones, model calls, steps around other nodes, and branches. Each leaf notes in a file that it ran. The model:

- what a finished life returns is what the program says, computed without agentflow; a keyed step returns what was
  recorded first under its key;
- a leaf whose result (or failure) is recorded in its scope does not run;
- a leaf that is recorded nowhere runs, as often as the program asks for it;
- a life that was killed runs nothing that was recorded before;
- what a finished life returned is recorded.

What is recorded is read from the journal between two lives.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from agentflow import Retry, current_step, generate_content, parallel, rundocs, step, workflow
from agentflow.crashes import _Watch
from agentflow.journal import Journal
from agentflow.scratch import forget
from agentflow.settings import settings as own
from agentflow.testing import FakeModel

NOTES: Path
PROGRAM: list[Any] = []
KEYED_BEFORE: dict[str, str] = {}
PHASES = tuple(Phase)
RETRY = Retry(max_attempts=3, initial_delay=0, jitter=False)


def note(word: str) -> str:
    descriptor = os.open(NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, word.encode() + b"\n")
    os.close(descriptor)
    return word


def plain(value: int) -> str:
    return note(f"plain{value}")


def flaky(value: int, failures: int) -> str:
    note(f"flaky{value}.{failures}")
    if current_step().attempt <= failures:
        raise ConnectionError("not yet")
    return f"flaky{value}.{failures}"


def failing(value: int) -> str:
    note(f"failing{value}")
    raise ValueError(f"failing{value}")


def keyed(name: str, value: int) -> str:
    return note(f"keyed{name}.{value}")


async def nest(name: str, value: int, inner: list[Any]) -> dict[str, Any]:
    return {"nest": tag(name, value, inner), "inner": await run_nodes(inner)}


def tag(name: str, value: int, inner: list[Any]) -> str:
    return hashlib.sha256(repr((name, value, inner)).encode()).hexdigest()[:12]


async def run_node(node: tuple[Any, ...]) -> Any:
    kind, name, value, *more = node
    if kind == "plain":
        return await step(f"plain-{name}", plain, value)
    if kind == "flaky":
        return await step(f"flaky-{name}", flaky, value, more[0], retry=RETRY)
    if kind == "failing":
        try:
            return await step(f"failing-{name}", failing, value)
        except ValueError as error:
            return str(error)
    if kind == "keyed":
        return await step("keyed", keyed, name, value, idempotency_key=name)
    if kind == "model":
        return await generate_content(f"model{value}", model="openai:priced", name=f"model-{name}")
    if kind == "nest":
        return await step(f"nest-{name}", nest, name, value, more[0])
    return await parallel({key: run_nodes(branch) for key, branch in value})


async def run_nodes(nodes: list[Any]) -> list[Any]:
    return [await run_node(node) for node in nodes]


@workflow("property")
async def program(ctx: Any) -> list[Any]:
    return await run_nodes(PROGRAM)


# -- the model -----------------------------------------------------------------------------------------


def value_of(node: tuple[Any, ...]) -> Any:
    """What a node returns, computed without agentflow."""
    kind, name, value, *more = node
    if kind == "flaky":
        return f"flaky{value}.{more[0]}"
    if kind == "keyed":
        return KEYED_BEFORE.get(name, f"keyed{name}.{value}")
    if kind == "nest":
        return {"nest": tag(name, value, more[0]), "inner": [value_of(each) for each in more[0]]}
    if kind == "parallel":
        return {key: [value_of(each) for each in branch] for key, branch in value}
    return f"{kind}{value}"


def word_of(node: tuple[Any, ...]) -> str:
    """What a leaf notes when it runs, and what its record holds."""
    kind, name, value, *more = node
    if kind == "nested":
        return value
    if kind == "keyed":
        return f"keyed{name}."
    return f"flaky{value}.{more[0]}" if kind == "flaky" else f"{kind}{value}"


Place = tuple[str, ...]  # the steps and branches around a leaf, outermost first


def leaves(nodes: list[Any], place: Place, done: Counter[Any]) -> list[tuple[Any, Place]]:
    """The leaves a life comes to, each with its place: not into steps that are recorded there themselves."""
    found: list[Any] = []
    for node in nodes:
        if node[0] == "nest":
            word = tag(*node[1:])
            if not done[word, place]:
                found += leaves(node[3], (*place, word), done)
            found.append((("nested", node[1], word), place))
        elif node[0] == "parallel":
            for key, branch in node[2]:
                found += leaves(branch, (*place, key), done)
        else:
            found.append((node, place))
    return found


# -- programs --------------------------------------------------------------------------------------------

NAMES = st.sampled_from("abc")
VALUES = st.integers(0, 40)
LEAF = st.one_of(
    st.tuples(st.just("plain"), NAMES, VALUES),
    st.tuples(st.just("flaky"), NAMES, VALUES, st.integers(0, 2)),
    st.tuples(st.just("failing"), NAMES, VALUES),
    st.tuples(st.just("model"), NAMES, VALUES),
    st.tuples(st.just("keyed"), st.text("xyz", min_size=3, max_size=3), VALUES),
)
NODE = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.tuples(st.just("nest"), NAMES, VALUES, st.lists(inner, min_size=1, max_size=3)),
        st.tuples(
            st.just("parallel"),
            NAMES,
            st.lists(st.tuples(st.text("pq", min_size=4, max_size=4), st.lists(inner, min_size=1, max_size=2)), min_size=1, max_size=2),
        ),
    ),
    max_leaves=4,
)


def distinct(nodes: list[Any], known: set[Any]) -> list[Any]:
    """The nodes, each leaf, step and branch name once: repeats have rules of their own, tested elsewhere."""
    kept: list[Any] = []
    for node in nodes:
        kind, name, value, *more = node
        if kind == "nest":
            inner = distinct(more[0], known)
            node = (kind, name, value, inner)
        elif kind == "parallel":
            branches = []
            for key, branch in value:
                if key not in known:
                    known.add(key)
                    branches.append((key, distinct(branch, known)))
            node = (kind, name, branches)
        word = tag(*node[1:]) if kind == "nest" else repr(node) if kind == "parallel" else word_of(node)
        if word not in known:
            known.add(word)
            kept.append(node)
    return kept


class Lives(RuleBasedStateMachine):
    """One run: its program changes between lives, its journal stays."""

    @initialize(nodes=st.lists(NODE, min_size=1, max_size=4))
    def begin(self, nodes: list[Any]) -> None:
        global NOTES
        self.home = Path(tempfile.mkdtemp(prefix="property-", dir=Path(os.environ["AGENTFLOW_PATH"]).parent))
        NOTES = self.home / "notes"
        self.nodes = distinct(nodes, set())
        KEYED_BEFORE.clear()
        self.known: Counter[str] = Counter()  # records by word
        self.placed: Counter[Any] = Counter()  # records by word and place

    def teardown(self) -> None:
        if hasattr(self, "home"):
            forget(self.home)
            shutil.rmtree(self.home)

    # -- edits ---------------------------------------------------------------------------------------

    @rule(node=NODE, at=st.integers(0, 9))
    def insert(self, node: Any, at: int) -> None:
        at %= len(self.nodes) + 1
        self.nodes = distinct([*self.nodes[:at], node, *self.nodes[at:]], set())

    @precondition(lambda self: len(self.nodes) > 1)
    @rule(at=st.integers(0, 9))
    def remove(self, at: int) -> None:
        del self.nodes[at % len(self.nodes)]

    @rule(order=st.randoms(use_true_random=False))
    def reorder(self, order: Any) -> None:
        order.shuffle(self.nodes)

    @rule(at=st.integers(0, 9), value=VALUES)
    def edit(self, at: int, value: int) -> None:
        at %= len(self.nodes)
        kind, name, _, *more = self.nodes[at]
        if kind != "parallel":
            self.nodes = distinct([*self.nodes[:at], (kind, name, value, *more), *self.nodes[at + 1 :]], set())

    # -- lives ---------------------------------------------------------------------------------------

    @rule(point=st.integers(1, 25))
    def killed(self, point: int) -> None:
        self.live(point)

    @rule(point=st.integers(1, 25))
    def killed_and_resumed(self, point: int) -> None:
        self.live(point)
        self.live(0)

    @rule()
    def finished(self) -> None:
        self.live(0)

    def live(self, point: int) -> None:
        global PROGRAM
        PROGRAM = self.nodes
        NOTES.unlink(missing_ok=True)
        result = self.home / "result"
        result.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            in_child(self.home, point, result)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"the life ended with {status}"
        ran = Counter(NOTES.read_text().split()) if NOTES.exists() else Counter()
        asked = leaves(self.nodes, (), self.placed)
        for node, place in asked:
            if node[0] == "nested":
                continue
            word = word_of(node)
            times = sum(count for noted, count in ran.items() if is_of(noted, word))
            once = node[3] + 1 if node[0] == "flaky" else 1
            most = 0 if self.placed[word, place] or (node[0] == "keyed" and self.known[word]) else once
            assert times <= most, f"{word} in {place} ran {times} times, not {most}"
            if status == 0 and not self.known[word]:
                assert times >= 1, f"{word} in {place} did not run, and is recorded nowhere"
        words = [word_of(node) for node, _ in asked]
        strays = [noted for noted in ran if not any(is_of(noted, word) for word in words)]
        assert not strays, f"{strays} ran, and the program does not come to them"
        if status == 0:
            right = repr([value_of(node) for node in self.nodes])
            assert result.read_text() == right, f"{result.read_text()} is not {right}"
        now = self.recorded()
        for node, place in asked:
            word = word_of(node)
            assert status or now[word], f"{word} in {place} was given out, and is not recorded"
            self.placed[word, place] += now[word] - self.known[word]
        self.known = now

    def recorded(self) -> Counter[str]:
        """How many records, or paid replies without one, the journal holds for each word."""
        journal = Journal.open(self.home / "journal")
        found: Counter[str] = Counter()
        for row in rundocs.rows(journal, "property"):
            kind, output = row.head["name"].partition("-")[0], json.loads(row.output)
            if kind == "nest":
                found[output["nest"]] += 1
            elif kind == "keyed":
                found[output.partition(".")[0] + "."] += 1
                KEYED_BEFORE.setdefault(output.removeprefix("keyed").partition(".")[0], output)
            elif kind == "failing":
                found[row.head["error"]["message"]] += 1
            elif kind != "model":
                found[output] += 1
        for _, text in journal.scan("m/property/"):
            found[json.loads(text)["body"]["output"][0]["content"][0]["text"]] += 1
        return found


def is_of(noted: str, word: str) -> bool:
    """Whether a note is of the leaf with this word; a keyed one may note another value."""
    return noted == word or (word.startswith("keyed") and noted.startswith(word))


def in_child(home: Path, point: int, result: Path) -> None:
    code = 1
    try:
        own.path = home / "journal"
        watch = _Watch(home / "log", point)
        watch.patch()
        with FakeModel(lambda request: note(request["text"])):
            value = program.options(run_id="property").run_sync()
        result.write_text(repr(value))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def run_machine(examples: int, steps: int, derandomize: bool) -> None:
    # A process of its own for each life, and no time limit: machines differ.
    found = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=PHASES,
    )
    run_state_machine_as_test(Lives, settings=found)


def test_a_program_killed_at_each_of_its_points_keeps_to_the_rules() -> None:
    nodes = [("plain", "a", 1), ("nest", "b", 2, [("model", "c", 3), ("flaky", "d", 4, 1)]), ("failing", "e", 5)]
    for point in range(1, 30):
        machine = Lives()
        machine.begin([*nodes, ("keyed", "f", 6)])
        machine.live(point)
        machine.live(0)
        machine.teardown()


def test_random_programs_killed_edited_and_reordered_keep_to_the_rules() -> None:
    run_machine(examples=10, steps=10, derandomize=True)


@pytest.mark.torture
def test_many_more_random_programs() -> None:
    run_machine(examples=80, steps=25, derandomize=True)
