"""What a step was given: what makes two calls the same and what does not."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import enum
import functools
import os
import subprocess
import sys
import threading
import types
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agentflow import Context, workflow
from agentflow.canonical import _is_plain, _is_plain_large
from agentflow.capture import capture, data_digest, data_text
from agentflow.errors import UsageError


def digest(fn, *args, **kwargs):
    return capture(fn, args, kwargs).digest


def use(*args, **kwargs):
    return args, kwargs


def compute(order):
    return order["total"] * 2


@dataclasses.dataclass
class Order:
    id: str
    total: float = 0.0
    items: list = dataclasses.field(default_factory=list)


class Model(BaseModel):
    name: str
    n: int = 0


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Agent:
    def __init__(self, topic):
        self.topic = topic
        self.calls = 0
        self.unrelated = 0
        self.lock = threading.Lock()

    def plan(self):
        self.calls += 1
        return self._prompt()

    def _prompt(self):
        return f"plan {self.topic}"

    def reflect(self):
        return getattr(self, "topic")  # noqa: B009

    def everything(self):
        return vars(self)

    def __call__(self, x):
        return self.topic, x


Point = collections.namedtuple("Point", "x y", defaults=[0])


def test_the_digest_is_22_safe_characters():
    d = digest(use, 1)
    assert len(d) == 22 and set(d) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


VALUES = [
    None, True, False, 0, 1, 1.0, float("nan"), float("inf"), 2**70, -(2**70), "", "1", "ä", "\ud800", b"1", bytearray(b"1"),
    (), [], {}, set(), frozenset(), (1,), [1], {1}, {"a": 1}, {1: "a"}, {"1": "a"}, {"~set": [1]}, {"~tuple": [1]}, 1j,
    datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1), datetime(2026, 1, 1).date(), Decimal("1"), Decimal("1.0"),
    uuid.UUID(int=1), Path("a"), Color.RED, Color.BLUE, Point(1), Point(1, 2), Order("a"), Order("b"), Model(name="a"), range(3), ...,
    Order, Model, np.arange(3), np.arange(3.0), np.arange(6).reshape(2, 3), np.float64(1.5), [[1], 2], [[1, 2]], "x" * 70_000, ["x" * 70_001],
    pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [1, 3]}), pd.DataFrame({"b": [1, 2]}), pd.DataFrame({"a": ["x", None]}), pd.Series([1, 2]),
    ["\\" * 70_000], ['"' * 70_000], [float("nan")], [None], ValueError("a"), ValueError("b"), len, use, compute,
]  # fmt: skip


def test_different_values_have_different_digests():
    seen = {}
    for v in VALUES:
        text = data_text(v)
        assert text not in seen, (v, seen[text])
        seen[text] = v
        assert "~opaque" not in text, v


def test_equal_values_have_equal_digests():
    assert data_digest({"a": 1, "b": 2}) == data_digest({"b": 2, "a": 1})
    assert data_digest({3, 1, 2}) == data_digest({2, 3, 1})
    assert data_digest(np.arange(3)) == data_digest(np.array([0, 1, 2]))
    assert data_digest(pd.DataFrame({"a": ["x", "y"]})) == data_digest(pd.DataFrame({"a": ["x", "y"]}))
    assert data_digest(float("nan")) == data_digest(float("nan"))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    "value",
    [["x" * 65_535], ["x" * 65_536], ["x" * 65_537], ["ä" * 65_537], ['a"' * 40_000], ['"' * 40_000], ["\\" * 70_000],
     ['\\"' * 40_000], {"x" * 70_000: 1}, ["\x00" * 20_000], list(range(30_000)), ["a" * 40_000] * 3, [[["x" * 70_000]]]],
)  # fmt: skip
def test_long_strings_are_written_alike_the_fast_and_the_slow_way(value, monkeypatch):
    import agentflow.canonical as compare

    fast = data_text(value)
    monkeypatch.setattr(compare, "_is_plain", lambda v: False)
    assert data_text(value) == fast


@given(json_like, json_like)
def test_the_fast_way_and_the_slow_way_write_the_same_text(a, b):
    import agentflow.canonical as compare

    fast = data_text([a])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_is_plain", lambda v: False)
        assert data_text([a]) == fast
    if repr(a) != repr(b) and a != b:
        assert data_text([b]) != fast


def test_the_same_text_comes_from_every_process():
    code = (
        "from agentflow.capture import data_text, capture\n"
        "s = {'b', 'a', 'c', 'd', 'e'}\n"
        "print(data_text([s, {'k': frozenset(s)}]), capture(lambda: (s, len), ()).text)"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(out) == 1


def test_the_type_of_a_script_and_of_its_module_is_the_same_type():
    as_main = type("Order", (Order,), {"__module__": "__main__", "__qualname__": "Order"})
    assert data_text(dataclasses.dataclass(as_main)("a")) == data_text(Order("a"))


def test_a_field_added_with_a_default_changes_nothing():
    @dataclasses.dataclass
    class Order2(Order):
        currency: str = "EUR"
        tags: list = dataclasses.field(default_factory=list)

    class Model2(Model):
        note: str | None = None

    Order2.__qualname__, Model2.__qualname__ = "Order", "Model"
    assert data_text(Order2("a", 1.0)) == data_text(Order("a", 1.0))
    assert data_text(Order2("a", 1.0, currency="USD")) != data_text(Order("a", 1.0))
    assert data_text(Model2(name="a")) == data_text(Model(name="a"))
    assert data_text(Order("a", total=False)) != data_text(Order("a", total=0.0))


def test_attrs_classes_and_namespaces_count_by_their_fields():
    attrs = pytest.importorskip("attrs")

    @attrs.define
    class Item:
        sku: str
        n: int = 1
        tags: list = attrs.field(factory=list)

    assert data_text(Item("a")) == data_text(Item("a", 1, [])) != data_text(Item("b"))
    assert '"n"' not in data_text(Item("a")) and '"n"' in data_text(Item("a", 2))
    assert (
        data_text(types.SimpleNamespace(a=1))
        == data_text(types.SimpleNamespace(a=1))
        != data_text(types.SimpleNamespace(a=2))
    )


def test_no_memory_address_enters_the_text():
    assert "0x" not in capture(use, (object(), use, lambda: 1, Agent("x"), threading.Lock(), Order)).text


def test_cycles_and_deep_values_have_a_text():
    a = []
    a.append(a)
    b = {}
    b["self"] = [b]
    deep, other = 1, 2
    for _ in range(100):
        deep, other = [deep], [other]
    assert data_text(a) and data_text(b) and data_text(a) != data_text([[]])
    assert data_text(deep) != data_text(other)
    for _ in range(5000):
        deep, other = [deep], [other]
    assert data_text(deep) != data_text(other)


# -- functions


def test_a_loop_lambda_with_a_default_is_given_its_own_value():
    assert len({digest(lambda i=i: i) for i in range(3)}) == 3


def test_an_argument_counts_the_same_however_it_is_bound():
    assert digest(use, 1, b=2) == digest(functools.partial(use, 1), b=2) == digest(functools.partial(use, 1, b=2))
    assert digest(use, 1) != digest(use, 2)


def test_an_argument_counts_the_same_by_position_by_name_and_as_default():
    def charge(order, amount=5, *, cur="EUR"):
        return order, amount, cur

    class Till:
        def charge(self, order, amount=5):
            return order, amount

    c = capture(charge, ("n",))
    assert c.text == '{"args":["n",5],"kwargs":{"cur":"EUR"}}'
    for args, kwargs in [
        ((), {"order": "n"}),
        (("n", 5), {}),
        (("n",), {"amount": 5}),
        ((), {"cur": "EUR", "amount": 5, "order": "n"}),
    ]:
        assert capture(charge, args, kwargs).text == c.text, (args, kwargs)
    assert digest(functools.partial(charge, amount=5), "n") == c.digest
    others = [digest(charge, "n", 6), digest(charge, "n", cur="USD"), digest(charge, 5, "n"), digest(charge, "m")]
    assert len({c.digest, *others}) == 5
    bound = digest(Till().charge, "n")
    assert bound == digest(Till().charge, order="n") == digest(Till().charge, "n", amount=5)
    assert bound != digest(Till().charge, "n", 6)
    assert digest(Till.charge, Till(), "n") == digest(Till.charge, order="n", self=Till())


def test_arguments_that_no_parameter_names_rest_as_they_are():
    def f(a, /, b=2, *rest, c=3, **more):
        return a, b, rest, c, more

    assert capture(f, (1,), {"a": 9}).text == '{"args":[1,2],"kwargs":{"a":9,"c":3}}'
    assert capture(f, (1, 2, None), {"x": None}).text == '{"args":[1,2,null],"kwargs":{"c":3,"x":null}}'
    assert digest(use) != digest(use, None) != digest(use, None, None) != digest(use, x=None)


@pytest.mark.parametrize("args, kwargs", [((), {}), ((), {"amount": 1}), ((1, 2, 3), {}), ((1,), {"order": 2})])
def test_a_call_that_will_fail_is_still_written_whole(args, kwargs):
    def charge(order, amount=5):
        return order, amount

    text = capture(charge, args, kwargs).text
    assert ("~unset" in text) == (not args)
    assert all(str(v) in text for v in (*args, *kwargs.values()))


def test_an_edited_default_is_given_as_another_value_and_an_explicit_argument_is_not_touched_by_it():
    def old(order, amount=5):
        return order, amount

    def new(order, amount=6):
        return order, amount

    assert digest(old, "n") != digest(new, "n")
    assert digest(old, "n", 5) == digest(new, "n", 5) and digest(old, "n", 6) == digest(new, "n")


def test_a_parameter_added_with_the_default_none_changes_nothing():
    def old(order, amount=5, *, cur="EUR"):
        return order, amount, cur

    def new(order, amount=5, note=None, *, cur="EUR", when=None):
        return order, amount, cur, note, when

    assert digest(old, "n") == digest(new, "n") == digest(new, "n", note=None, when=None)
    assert len({digest(new, "n"), digest(new, "n", note=1), digest(new, "n", when=1), digest(new, None)}) == 4
    assert len({digest(lambda i=i: i) for i in (None, 0, 1)}) == 3


def test_an_optional_context_is_not_given_however_it_is_passed():
    class Context:
        __agentflow_context__ = True

    def f(order, ctx=None):
        return order

    assert digest(f, "n") == digest(f, "n", Context()) == digest(f, "n", ctx=Context())


def test_renaming_captured_variables_changes_nothing_and_swapping_them_does():
    def one(a, b):
        return lambda: a - b

    def renamed(z, y):
        return lambda: z - y

    def swapped(a, b):
        return lambda: b - a

    assert digest(one(1, 2)) == digest(renamed(1, 2)) != digest(swapped(1, 2))
    assert capture(renamed(1, 2)).names == ("z", "y")


def test_values_captured_by_a_captured_function_count():
    def outer(n):
        def inner():
            return n

        return lambda: inner()

    assert digest(outer(1)) == digest(outer(1)) != digest(outer(2))


def test_instances_count_by_the_attributes_the_code_names():
    cats, dogs, other = Agent("cats"), Agent("dogs"), Agent("cats")
    other.unrelated = 5
    assert digest(cats.plan) != digest(dogs.plan)
    assert digest(cats.plan) == digest(other.plan)
    assert digest(lambda: cats.plan()) == digest(lambda: other.plan()) != digest(lambda: dogs.plan())
    assert digest(cats, 1) != digest(dogs, 1) and digest(cats, 1) == digest(other, 1)
    assert digest(cats.reflect) != digest(dogs.reflect)
    assert digest(cats.everything) != digest(other.everything)


def test_instances_as_arguments_count_too():
    def run(agent):
        return agent.plan()

    assert digest(run, Agent("cats")) != digest(run, Agent("dogs"))


def test_a_client_is_not_compared_and_listed():
    lock, client = threading.Lock(), types.SimpleNamespace
    c = capture(lambda: (lock, client), (threading.Lock(), {"a": threading.Lock()}))
    assert c.opaque == ("args[0]", "args[1].a", "free[0]")


def test_a_context_is_neither_given_nor_opaque():
    class Context:
        __agentflow_context__ = True

    ctx, x = Context(), 1
    c = capture(lambda: (ctx, x))
    assert c.digest == digest(lambda: x) and c.opaque == () and c.names == ("x",)
    assert digest(use, Context(), 1) == digest(use, 1)


def test_globals_are_code_except_plain_data_named_by_a_cell_lambda():
    def cell(url, **more):
        names = {"url": url, "len": len, **more}
        exec(compile("f = lambda: (url, other)", "<ipython-input-1-abc>", "exec"), names)
        return names["f"]

    assert digest(cell("a")) != digest(cell("b"))
    assert digest(cell("a", other=threading.Lock())) == digest(cell("a"))
    assert digest(cell("a", other=1)) != digest(cell("a", other=2))
    names = {"url": "a"}
    exec(compile("f = lambda: url", "app.py", "exec"), names)
    before = digest(names["f"])
    names["url"] = "b"
    assert digest(names["f"]) == before


def test_functions_wrapped_by_a_library_are_given_what_their_function_is():
    @functools.lru_cache
    def cached(x, n=1):
        return x + n

    @functools.wraps(compute)
    def wrapper(order):
        return compute(order)

    assert digest(cached, 1) != digest(cached, 2)
    assert capture(wrapper, ({"total": 1},)).text


@pytest.mark.parametrize("fn", [len, str.upper, "a".upper, int, print, Order, functools.partial(int, base=2)])
def test_builtins_and_classes_can_be_steps(fn):
    assert capture(fn, ("1",)).digest


def test_methods_of_builtins_are_given_their_object():
    assert digest("a".upper) != digest("b".upper)


# -- refused


def test_a_coroutine_is_refused_with_the_right_form():
    async def fetch(x): ...

    with pytest.raises(UsageError, match=r'step\("fetch", fetch'):
        capture(fetch(1))


def test_a_generator_is_refused_wherever_it_is():
    g = (i for i in range(3))
    for fn, args in [
        (lambda: list(g), ()),
        (use, (g,)),
        (use, ([g],)),
        (use, (map(str, [1]),)),
        (functools.partial(use, g), ()),
    ]:
        with pytest.raises(UsageError, match="list"):
            capture(fn, args)


def test_a_generator_held_by_an_object_is_not_compared():
    agent = Agent(i for i in "a")
    assert capture(agent.plan).opaque == ("self.topic",)


def test_what_is_no_function_is_refused():
    async def items():
        yield 1

    for fn in (1, None, items):
        with pytest.raises(UsageError):
            capture(fn)


# -- async, rebound, mutated


def test_async_functions_are_recognised_through_their_wrappers():
    async def f(): ...

    class A:
        async def m(self): ...

        async def __call__(self): ...

    for fn in (
        f,
        functools.partial(f),
        A().m,
        A(),
        functools.partial(A().m),
        functools.partial(functools.partial(A())),
    ):
        assert capture(fn).is_async, fn
    for fn in (use, lambda: f(), len, A):
        assert not capture(fn).is_async, fn


def test_the_loop_lambda_trap_names_the_variable():
    captured = []
    for d in range(2):
        captured.append(capture(lambda: d))
    assert [c.rebound() for c in captured] == ["d", None]


def test_a_variable_rebound_to_an_equal_value_is_not_rebound():
    d = [1]
    c = capture(lambda: d)
    d = [1]
    assert c.rebound() is None
    d = [2]
    assert c.rebound() == "d"


def cell_lambda(source, names, file="<ipython-input-1-abc>"):
    exec(compile(f"f = {source}", file, "exec"), names)
    return names["f"]


def test_a_global_of_a_cell_lambda_that_was_rebound_is_named():
    names = {"i": 0, "rows": [1], "lock": threading.Lock(), "k": 5}
    captured = []
    for names["i"] in range(3):
        captured.append(capture(functools.partial(cell_lambda("lambda x: [i * x, rows, lock, len]", names), 10)))
    assert [c.rebound() for c in captured] == ["i", "i", None]
    last = captured[-1]
    names["rows"] = [1]
    assert last.rebound() is None, "an equal value"
    names["rows"].append(2)
    assert last.rebound() == "rows"
    names["rows"], names["lock"], names["k"] = [1], threading.Lock(), 6
    assert last.rebound() is None, "neither given: no data, not named"
    del names["rows"]
    assert last.rebound() == "rows"
    names["rows"] = len
    assert last.rebound() == "rows"


def test_a_global_changed_in_place_or_taken_by_other_code_is_not_rebound():
    names = {"rows": [1], "n": 1}
    c = capture(cell_lambda("lambda: rows", names))
    names["rows"].append(2)
    assert c.rebound() is None and c.mutated() == ("globals.rows",)
    exec(compile("def g(): return n", "<ipython-input-1-abc>", "exec"), names)
    in_file, in_def = capture(cell_lambda("lambda: n", names, "app.py")), capture(names["g"])
    names["n"] = 2
    assert in_file.rebound() is None and in_def.rebound() is None, "code"


def test_a_client_rebound_to_another_is_rebound():
    client = threading.Lock()
    c = capture(lambda: client)
    client = threading.Lock()
    assert c.rebound() == "client"


def test_what_the_step_changed_is_named_by_path():
    agent, log, order = Agent("cats"), [], {"n": 1, "m": 1}

    def run(order):
        agent.plan()
        log.append(1)
        order["n"] += 1

    c = capture(run, (order,))
    assert c.mutated() == ()
    run(order)
    assert c.mutated() == ("args[0].n", "free[0].calls", "free[1]")


def test_a_bound_method_that_counts_its_calls_changes_only_that():
    agent = Agent("cats")
    c = capture(agent.plan)
    agent.plan()
    assert c.mutated() == ("self.calls",)


def test_what_a_step_leaves_behind_never_makes_it_fail():
    box = [1]
    c = capture(lambda: box)
    box[0] = (i for i in "a")
    assert c.mutated() == ("free[0][0]",)


def test_nothing_mutable_given_means_nothing_to_compare(monkeypatch):
    c = capture(use, (1, "a", (2, None)))
    monkeypatch.setattr(type(c), "_encode", lambda *_, **__: pytest.fail("compared"))
    assert c.mutated() == ()


@pytest.mark.parametrize(
    "value",
    [
        "", "~tuple", 'a"b\\c\n', "é", "\ud800", "x" * 65_536, "x" * 65_537, "é" * 40_000, "é" * 65_537, True, None, 0, -1,
        2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 1.5, float("nan"), float("inf"), [1], {"a": None},
    ],
    ids=lambda value: repr(value)[:12],
)  # fmt: skip
def test_a_plain_argument_is_written_as_anywhere_else(value):
    for args in ((value, 1), ("a", value, 1), (2.5, value, 1)):
        written = ",".join(data_text(v) for v in args)
        assert capture(lambda *a: a, args).text == f'{{"args":[{written}]}}'


def _nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value, 1]
    return value


def test_few_and_many_values_are_looked_at_alike():
    cycle, shared = [1], {"a": [2.5, None]}
    cycle.append(cycle)
    values = [
        [], {}, [1], ["a", True, None], [1.5], [float("nan")], [[float("inf")]], {"a": [1, {"b": "c"}]}, [(1,)], [[b"x"]],
        {"a": {1, 2}}, {"a": {"b": Order}}, [shared, shared], {"x": shared, "y": [shared]}, cycle, {"c": cycle},
        *(_nested(depth) for depth in (38, 39, 40, 41, 42, 60)), [1] * 50, [[1]] * 50, [[(1,)]] * 50, [[{}] * 39] * 39,
    ]  # fmt: skip
    for value in values:
        assert _is_plain(value) == _is_plain_large(value), repr(value)[:200]
    for value in ({1: 2}, [{None: 1}], {Order: 1}):
        assert not _is_plain(value)


def test_a_field_that_is_equal_to_its_default_but_of_another_type_counts():
    @dataclasses.dataclass
    class Flags:
        on: object = True
        n: object = 1
        text: object = "a"

    assert data_text(Flags(True, 1, "".join("a"))) == '{"~obj":["Flags",{}]}'
    assert data_text(Flags(on=1)) == '{"~obj":["Flags",{"on":1}]}'
    assert data_text(Flags(n=True)) == '{"~obj":["Flags",{"n":true}]}'
    assert data_text(Flags(n=1.0, text=None)) == '{"~obj":["Flags",{"n":1.0,"text":null}]}'


def test_what_a_class_is_written_as_does_not_depend_on_which_instance_came_first():
    @dataclasses.dataclass
    class Point:
        x: int = 0

    class Model(BaseModel):
        x: int = 0

    for kind, name in ((Point, "Point"), (Model, "Model")):
        for _ in range(2):
            assert data_text(kind(x=1)) == f'{{"~obj":["{name}",{{"x":1}}]}}'
    point = Point(2)
    point.__agentflow_context__ = True
    assert data_text(point) == '{"~ctx":0}' and data_text(Point(2)) != '{"~ctx":0}'


def test_many_dicts_are_captured_in_c():
    import gc as collector
    import time

    rows = [{"id": i, "name": "x" * 20, "price": 1.5, "tags": ["a", "b"], "n": None} for i in range(20_000)]
    collector.collect()
    best = min(_timed(lambda: capture(use, (rows,)), time.process_time) for _ in range(3))
    walked = min(
        _timed(lambda: [{k: (type(v), str(v)) for k, v in r.items()} for r in rows], time.process_time)
        for _ in range(3)
    )
    assert best < walked * 2, (best, walked)


def _timed(fn, clock):
    start = clock()
    fn()
    return clock() - start


def test_a_coroutine_function_is_not_started_by_capturing_it():
    started = []

    async def f():
        started.append(1)

    capture(f)
    assert started == []
    asyncio.run(f())
    assert started == [1]


def test_a_workflow_counts_by_its_name_and_the_run_that_was_chosen() -> None:
    @workflow("first")
    async def first(ctx: Context, x: int) -> int:
        return x

    @workflow("second")
    async def second(ctx: Context, x: int) -> int:
        return x

    given = [capture(each.run, (1,)) for each in (first, second, first.options(run_id="r"), first.options(wait=True))]
    assert len({each.digest for each in given}) == 3 and given[0].digest == given[3].digest
    assert not any(each.opaque for each in given)
