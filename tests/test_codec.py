"""What a step returned comes back as the same value of the same type, or is refused by name."""

import asyncio
import collections
import dataclasses
import datetime as dt
import enum
import functools
import json
import math
import socket
import subprocess
import sys
import textwrap
import time
import types
import typing
import uuid
import weakref
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentflow.codec import (
    TAG,
    UnknownType,
    decode,
    decode_exception,
    encode,
    encode_exception,
    rebuild_exception,
    register_type,
    roundtrip,
)
from agentflow.errors import NotRecordable, StepFailed, StepTimeout, UsageError


def back(value):
    """The value as a replay sees it; the first run must see the same."""
    text, first = roundtrip(value, where="result")
    assert text == encode(value)
    json.loads(text)
    assert_same(first, decode(text))
    return first


def assert_same(one, two):
    """Equal, of equal types, all the way down, NaN and signs of zero included."""
    assert type(one) is type(two)
    if isinstance(one, float):
        assert (one == two and math.copysign(1, one) == math.copysign(1, two)) or (one != one and two != two)
    elif isinstance(one, complex):
        assert_same([one.real, one.imag], [two.real, two.imag])
    elif isinstance(one, dict):
        assert_same(list(one.items()), list(two.items()))
    elif isinstance(one, (list, tuple, collections.deque)):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert_same(a, b)
    elif isinstance(one, (set, frozenset)):
        assert sorted(map(encode, one)) == sorted(map(encode, two))
    elif isinstance(one, Decimal):
        assert one.as_tuple() == two.as_tuple()
    elif isinstance(one, (dt.datetime, dt.time)):
        assert (one.replace(tzinfo=None), one.fold, one.tzinfo, str(one)) == (
            two.replace(tzinfo=None),
            two.fold,
            two.tzinfo,
            str(two),
        )
    else:
        assert one == two


T = typing.TypeVar("T")


class Color(enum.Enum):
    RED = 1
    BLUE = (1, 2)


class Level(enum.StrEnum):
    LOW = "low"


class Number(enum.IntEnum):
    ONE = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Bits(enum.IntFlag, boundary=enum.KEEP):
    A = 1


class Point(typing.NamedTuple):
    x: int
    y: typing.Any = None


class Text(str):
    pass


class Whole(int):
    pass


class Pile(list):
    pass


class Box(dict):
    pass


class Pair(tuple):
    pass


class Raw(bytes):
    pass


@dataclasses.dataclass
class Order:
    id: str
    lines: list = dataclasses.field(default_factory=list)
    total: Decimal = Decimal(0)
    checked: bool = dataclasses.field(init=False, compare=True)

    def __post_init__(self):
        self.checked = True
        self.beside = ("not", "a field")

    @functools.cached_property
    def expensive(self):
        return socket.socket


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell(typing.Generic[T]):
    value: T


@dataclasses.dataclass
class Holder(typing.Generic[T]):
    value: T


class Money(pydantic.BaseModel):
    amount: Decimal
    currency: str = "EUR"


class Euro(Money):
    cents: bool = True


class Invoice(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", frozen=True, arbitrary_types_allowed=True)
    to: Money
    anything: typing.Any = None
    lines: list[Money] = []
    at: dt.datetime | None = None
    _cache: dict = pydantic.PrivateAttr(default_factory=dict)

    @functools.cached_property
    def cached(self):
        return lambda: None


class Page(pydantic.BaseModel, typing.Generic[T]):
    items: list[T]


class Names(pydantic.RootModel[list[str]]):
    pass


class Strict(pydantic.BaseModel):
    n: int = pydantic.Field(gt=0)


class Link(pydantic.BaseModel):
    url: pydantic.HttpUrl


def turned():
    order = collections.OrderedDict(a=1, b=2)
    order.move_to_end("a")
    return order


EXAMPLES = [
    None, True, 0, -1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**5000, 0.1, -0.0, 1e-320, 1e22, math.nan, math.inf, -math.inf,
    "", "ümläut 🎉", "\ud800 alone", "\ud83c\udf89", "\x00\x7f\u2028", '{"$af":"tuple"}', "$af",
    b"", b"\x00\xff", bytearray(b"ab"), [], (), (1,), [(), [()]], {1, 2}, set(), frozenset({"a", 1, (2,)}), {"a": {"b": (1,)}},
    {1: "a", "1": "b", None: 0, (1, 2): [3], 1.5: 1}, {True: 1}, {TAG: "tuple", "v": [1]}, {"x": [{TAG: 1}]}, {"\udcff": 1}, {"b": 1, "a": 2},
    dt.datetime(2026, 3, 29, 2, 30), dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    dt.datetime(2026, 1, 1, 0, 0, 0, 1, dt.UTC), dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(seconds=-3601, microseconds=5), "odd")),
    dt.datetime.max, dt.date(1, 1, 1), dt.time(23, 59, 59, 999999, fold=1), dt.time(1, tzinfo=dt.timezone(dt.timedelta(hours=5))),
    dt.timedelta(days=-1, microseconds=1), dt.timedelta.max,
    Decimal("1.10"), Decimal("-0"), Decimal("1E+400"), Decimal("sNaN12"), Decimal("-Infinity"), uuid.UUID(int=5), Fraction(10**30, 7),
    Path("a/ü"), Path("/"), PurePosixPath("x/\udcff"), PureWindowsPath("C:/x"), complex(-0.0, math.nan), range(1, 10, 2), range(10**30),
    Color.RED, Color.BLUE, Level.LOW, Number.ONE, Access.READ, Access.READ | Access.WRITE, Access(0), Bits(9), {Level.LOW: Number.ONE}, [Level.LOW],
    Point(1), Point(1, (2, Level.LOW)), Text("t"), Whole(2**70), Pile([1, (2,)]), Box({1: 2}), Pair((1, 2)), Raw(b"x"), {Text("k"): 1}, [Whole(3)],
    collections.OrderedDict(a=1, b=2), turned(), collections.Counter("aab"), collections.Counter(a=-1), collections.defaultdict(list, {"a": [1]}),
    collections.defaultdict(None, {1: 2}), collections.deque([1, (2,)], maxlen=3), collections.deque(),
    Order("a", [(1, 2)], Decimal("1.0")), Cell(value=Cell(value=(1,))), Holder[int](value=(3,)),
    Money(amount=Decimal("1.20")), Invoice(to=Euro(amount=Decimal(1)), anything=(1, {2}), lines=[Euro(amount=Decimal(2))], more=Text("x")),
    Page[int](items=[1]), Page[Money](items=[Money(amount=Decimal(1))]), Page[list[int]](items=[[1]]), Page(items=[(1,)]), Page[Page[int]](items=[Page[int](items=[1])]),
    Names(["a"]), Link(url="https://example.org/a?b=c"), Strict.model_construct(n=-1),
]  # fmt: skip


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: f"{type(value).__name__}")
def test_a_value_comes_back_equal_and_of_the_same_type(value):
    assert_same(back(value), value)
    assert_same(back([{"deep": (value,)}]), [{"deep": (value,)}])


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE00F, categories=None), max_size=4),
    st.binary(), st.decimals(), st.fractions(), st.complex_numbers(), st.uuids(), st.datetimes(timezones=st.none() | st.timezones()),
    st.times(), st.dates(), st.timedeltas(), st.sampled_from([*Color, *Level, *Number, *Access, TAG]),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=3),
    st.integers(),
    st.booleans(),
    st.none(),
    st.tuples(st.integers(), st.text()),
    st.sampled_from([*Level, TAG]),
)


def trees(inner):
    return st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4), st.sets(KEYS, max_size=4), st.frozensets(KEYS, max_size=3), st.builds(Point, st.integers(), inner),
        st.builds(Order, st.text(), st.lists(inner, max_size=2)), st.builds(lambda v: Cell(value=v), inner), st.lists(inner, max_size=3).map(Pile),
        st.builds(lambda v: Invoice(to=Money(amount=Decimal(1)), anything=v), inner), st.lists(inner, max_size=3).map(collections.deque),
    )  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(st.recursive(SCALARS, trees, max_leaves=12))
def test_any_tree_comes_back_equal_and_of_the_same_type(value):
    # objects holding NaN or sNaN are compared by their text: one text means one value
    assert encode(decode(encode(value))) == encode(value)
    if type(value) in (list, tuple, dict, float, str, Decimal, dt.datetime):
        text = encode(value)
        if not any(mark in text for mark in ("NaN", "nan", '"object"', '"model"', '"namedtuple"')):
            assert_same(back(value), value)


def test_plain_json_values_are_their_own_text():
    value = {"b": [1, 2.5, None, True, "ü"], "a": {}}
    assert encode(value) == '{"b":[1,2.5,null,true,"ü"],"a":{}}'
    assert roundtrip("x") == ('"x"', "x")


def test_the_text_of_a_set_does_not_depend_on_the_process():
    program = "from agentflow.codec import encode; print(encode([{'a', 'b', 'c', (1, 'd')}, frozenset('xyz')]))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def test_the_first_run_gets_a_copy_as_a_replay_would():
    inner = [1]
    value = {"a": inner, "b": inner}
    _, first = roundtrip(value)
    first["a"].append(2)
    assert value == {"a": [1], "b": [1]} and first["b"] == [1]


def test_what_stands_beside_the_fields_of_a_dataclass_comes_back_and_cached_properties_do_not():
    order = Order("x")
    order.expensive
    assert back(order).beside == ("not", "a field")
    assert "expensive" not in vars(back(order))
    half = object.__new__(Order)
    half.id, half.lines, half.total = "y", [], Decimal(0)
    assert vars(roundtrip(half)[1]) == {"id": "y", "lines": [], "total": 0}


def test_models_come_back_without_validation_with_their_set_fields_and_extras():
    invoice = Invoice(to=Euro(amount=Decimal(1)), more=(1,))
    invoice._cache["x"] = 1
    invoice.cached
    again = back(invoice)
    assert type(again.to) is Euro and again.model_fields_set == {"to", "more"} and again.model_extra == {"more": (1,)}
    assert again._cache == {} and again.model_dump() == invoice.model_dump()
    assert back(Strict.model_construct(n="no number")).n == "no number"
    assert back(Money.model_construct(currency="x")).model_fields_set == {"currency"}
    assert type(back(Page[int](items=[1]))) is Page[int]


def test_sdk_responses_come_back():
    from openai.types.responses import Response

    data = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1.0,
        "output": [{"type": "message", "id": "m", "content": [], "role": "assistant"}],
        "new_field": [1],
    }
    response = Response.construct(**data)
    again = back(response)
    assert (
        again == response
        and again.model_dump() == response.model_dump()
        and type(again.output[0]) is type(response.output[0])
    )


ARRAYS = [
    np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(5), np.zeros((0, 3), "f4"), np.array([1, 2], ">i2"),
    np.array([math.nan, -0.0]), np.array(["a", "bcd"]), np.array([b"a"]), np.array(["2026-01-01", "NaT"], "M8[ns]"), np.array([1 + 2j]),
    np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8", (1,))]), np.arange(10)[::2], np.array([True]), np.float16([1.5]),
    np.float64(1.5), np.float64("nan"), np.int8(-3), np.bool_(True), np.str_("x"), np.datetime64("2026-01-01"), np.complex64(1j), np.longdouble("0.1"),
    np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])[0], np.timedelta64(5, "s"),
]  # fmt: skip


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: f"{value.dtype}{value.shape}")
def test_numpy_values_come_back_to_the_bit(value):
    again = back_bits(value)
    assert type(again) is type(value) and again.dtype == value.dtype and again.shape == value.shape
    assert again.tobytes() == value.tobytes() and again.flags.writeable == value.flags.writeable
    assert again.flags.f_contiguous == np.array(value, copy=True).flags.f_contiguous


@pytest.mark.parametrize(
    "value",
    [pd.Timestamp("2026-01-01 00:00:00.000000001"), pd.Timestamp("2026-10-25 01:30", tz="UTC").tz_convert("Europe/Berlin"), pd.Timestamp(1, unit="s", tz="UTC"),
     pd.Timedelta(5, "ns"), pd.NaT, pd.NA],
    ids=repr,
)  # fmt: skip
def test_pandas_scalars_come_back_exactly(value):
    again = decode(encode([value]))[0]
    assert type(again) is type(value) and repr(again) == repr(value)
    assert again is value or (
        again == value and again.unit == value.unit and getattr(again, "fold", 0) == getattr(value, "fold", 0)
    )


def back_bits(value):
    text, first = roundtrip({"v": value})
    assert encode({"v": first["v"]}) == text == encode(decode(text))
    return first["v"]


FRAMES = [
    pd.DataFrame({"a": [1, 2], "b": [1.5, math.nan], "c": ["x", None], "d": [True, False]}),
    pd.DataFrame({"o": pd.Series([(1,), None], dtype=object), 3: pd.to_datetime(["2026-01-01", None])}, index=pd.Index(["r1", "r2"], name="row")),
    pd.DataFrame({"i": pd.array([1, None], "Int64"), "s": pd.array(["a", None], "string"), "b": pd.array([True, None], "boolean"), "f": np.float32([1, 2])}),
    pd.DataFrame({"cat": pd.Categorical(["b", "a", None], categories=["b", "a"], ordered=True)}),
    pd.DataFrame({"t": pd.date_range("2026-03-28", periods=3, freq="D", tz="Europe/Berlin")}),
    pd.DataFrame([[1, 2]], columns=["same", "same"]), pd.DataFrame(), pd.DataFrame(index=[1, 2]), pd.DataFrame({"a": [1]}).iloc[:0],
    pd.DataFrame({"v": [1, 2]}, index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["k", None])),
    pd.Series([1, 2], name=("a", 1)), pd.Series([1.0], index=pd.date_range("2026-01-01", periods=1, freq="h")), pd.Series(["a"], dtype="str"),
    pd.Index([1, 2]), pd.RangeIndex(3), pd.date_range("2026-01-01", periods=3, freq="MS"),
]  # fmt: skip


@pytest.mark.parametrize("value", FRAMES, ids=range(len(FRAMES)))
def test_pandas_values_come_back_exactly(value):
    again = back_bits(value)
    kind = type(value).__mro__
    check = (
        pd.testing.assert_frame_equal
        if pd.DataFrame in kind
        else pd.testing.assert_series_equal
        if pd.Series in kind
        else pd.testing.assert_index_equal
    )
    check(again, value, check_exact=True)
    assert type(again) is type(value)


class Money2:
    def __init__(self, cents):
        self.cents = cents


class Session:
    def close(self):
        pass


class Odd(tuple):
    __slots__ = ()

    def __new__(cls, a):
        return tuple.__new__(cls, (a,))


async def waits():
    pass


def numbers():
    yield 1


def refused():
    coroutine = waits()
    coroutine.close()
    return [
        (Session(), "alive only in this process"), (lambda: 1, "a function is code"), (len, "a function is code"), (int, "a class is code"),
        (numbers(), r"record list\(\.\.\.\)"), (map(str, []), r"record list\(\.\.\.\)"), (coroutine, "await it"), (json, "a module is code"),
        ({}.keys(), "view"), (memoryview(b""), "view"), (object(), "register_type"), (Money2(1), "register_type"), (asyncio.Lock(), "alive only"),
        (pydantic.SecretStr("x"), "secrets"), (time.gmtime(), "NamedTuple|register_type|named"), (weakref.ref(Session), "register_type|function"),
        (np.array([object()]), "tolist"), (np.ma.array([1]), "asarray"), (pd.Series([object()]), "register_type"), (pd.Series([1], dtype="category").dtype, "register_type"),
        (dt.datetime(2026, 1, 1, tzinfo=pytz_like()), "zoneinfo"), (collections.defaultdict(lambda: 1), "built-in"), (types.SimpleNamespace(a=1), "register_type"),
    ]  # fmt: skip


class pytz_like(dt.tzinfo):
    def utcoffset(self, when):
        return dt.timedelta(0)


@pytest.mark.parametrize(("value", "words"), refused(), ids=lambda v: type(v).__name__)
def test_what_has_no_recorded_form_is_refused_with_its_path_and_a_way_out(value, words):
    with pytest.raises(NotRecordable, match=words) as caught:
        encode({"items": [0, {"k": value}]}, where="result")
    assert caught.value.path.startswith("result['items'][1]['k']")
    assert str(caught.value).startswith(caught.value.path + ": ")


def test_the_path_goes_through_fields_keys_and_items():
    with pytest.raises(NotRecordable) as caught:
        encode(Invoice(to=Money(amount=Decimal(1)), anything=[Order("x", [{(1, 2): Session()}])]), where="result")
    assert caught.value.path == "result.anything[0].lines[0][(1, 2)]"
    assert str(caught.value).startswith("result.anything[0].lines[0][(1, 2)]: Session cannot be recorded")


def test_a_cycle_and_deep_nesting_are_refused_not_crashed_on():
    ring: dict = {"a": [1]}
    ring["a"].append(ring)
    with pytest.raises(NotRecordable, match=r"refers back") as caught:
        encode(ring, where="r")
    assert caught.value.path == "r['a'][1]"
    order = Order("x")
    order.lines.append(order)
    with pytest.raises(NotRecordable, match=r"r\.lines\[0\]: refers back"):
        encode(order, where="r")
    for wrap in (lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: {1: v}, lambda v: Cell(value=v)):
        for depth in (200, 5000):
            deep: object = 1
            for _ in range(depth):
                deep = wrap(deep)
            try:
                assert encode(decode(encode(deep))) == encode(deep)
            except NotRecordable as exc:
                assert "too deeply" in str(exc)
            else:
                assert depth < 5000
            while isinstance(deep, Cell):  # a frozen chain is taken apart by hand: its own destructor would recurse
                deep = deep.value


def test_a_registered_type_comes_first_and_is_found_by_its_name():
    register_type(Money2, encode=lambda m: {"c": (m.cents,)}, decode=lambda d: Money2(d["c"][0]), name="test.money")
    assert back_money(Money2(5)).cents == 5
    assert '"test.money"' in encode(Money2(5))
    with pytest.raises(UsageError, match="already belongs"):
        register_type(Session, encode=lambda s: 1, decode=lambda d: Session(), name="test.money")
    with pytest.raises(UsageError, match="own form"):
        register_type(str, encode=str, decode=str)
    with pytest.raises(UnknownType, match="register_type"):
        decode('{"$af":"reg","n":"test.unknown","v":1}')
    register_type(Money2, encode=lambda m: 1 / 0, decode=lambda d: d, name="test.money")
    with pytest.raises(NotRecordable, match=r"v: Money2 .*ZeroDivisionError"):
        encode(Money2(1), where="v")
    from agentflow import codec

    codec.registered.pop(Money2), codec.registered_names.pop("test.money")


def back_money(value):
    return roundtrip([value])[1][0]


# -- finding types ----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """Make modules from source, as importing would; each test sees only its own."""

    def load(name, source):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(textwrap.dedent(source), module.__dict__)
        return module

    return load


ORDER = "import dataclasses\n@dataclasses.dataclass\nclass Basket:\n    id: str\n    n: int = 1\n"


def test_a_class_recorded_by_a_script_is_found_when_imported_and_the_other_way_round(tmp_path):
    (tmp_path / "app.py").write_text(
        "import sys, dataclasses, pydantic, enum, typing\nfrom agentflow.codec import encode, decode\n"
        "@dataclasses.dataclass\nclass Order:\n    id: str\n"
        "class M(pydantic.BaseModel):\n    a: int\n"
        "class E(enum.Enum):\n    A = 1\n"
        "T = typing.TypeVar('T')\nclass P(pydantic.BaseModel, typing.Generic[T]):\n    x: T\n"
        "class Oops(Exception): pass\n"
        "if __name__ == '__main__':\n    print(encode([Order('x'), M(a=1), E.A, Oops('y'), P[list[int]](x=[1]), P[M | None](x=None), P[P[M]](x=P[M](x=M(a=2)))]) if len(sys.argv) == 1 else decode(sys.argv[1]))\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}:."}

    def python(*args):
        done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    by_script = python(str(tmp_path / "app.py"))
    assert "__main__:Order" in by_script
    assert (
        python("-c", "import sys, app; print(app.decode(sys.argv[1]))", by_script)
        == "[Order(id='x'), M(a=1), <E.A: 1>, Oops('y'), P[list[int]](x=[1]), P[Union[M, NoneType]](x=None), P[P[M]](x=P[M](x=M(a=2)))]"
    )
    by_import = by_script.replace("__main__:", "app:")
    assert (
        python(str(tmp_path / "app.py"), by_import)
        == "[Order(id='x'), M(a=1), <E.A: 1>, Oops('y'), P[list[int]](x=[1]), P[Union[M, NoneType]](x=None), P[P[M]](x=P[M](x=M(a=2)))]"
    )


def test_a_moved_class_is_found_where_it_is_unless_two_could_be_meant(loaded):
    first = loaded("shop_one", ORDER)
    text = encode(first.Basket("x")).replace("shop_one:", "gone_away:")
    assert type(decode(text)) is first.Basket
    loaded("shop_three", ORDER.replace("n: int", "m: int"))
    assert type(decode(text)) is first.Basket
    loaded("shop_two", ORDER)
    from agentflow.codec import classes

    classes.moved_classes.clear()
    with pytest.raises(UnknownType, match=r"several modules have a Basket \(shop_one, shop_two\): import gone_away"):
        decode(text)


def test_looking_for_a_type_never_imports_or_runs_a_module(loaded):
    loaded("lazy_pkg", "def __getattr__(name):\n    raise SystemError('ran')\n")
    for ref in ("lazy_pkg:Order", "json.tool:main", "this:Zen", "os:system"):
        with pytest.raises(UnknownType, match="is not loaded"):
            decode(f'{{"$af":"object","t":"{ref}","v":{{}}}}')
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        '{"$af":"object","t":"subprocess:Popen","v":{"args":"true"}}',
        '{"$af":"enum","t":"builtins:int","n":"x","v":5}',
        '{"$af":"model","t":"builtins:dict","v":{}}',
        '{"$af":"sub","t":"subprocess:Popen","b":"list","v":[]}',
        '{"$af":"sub","t":"test","b":"eval","v":[]}',
        '{"$af":"namedtuple","t":"builtins:tuple","v":{}}',
        '{"$af":"url","t":"subprocess:Popen","v":"true"}',
        '{"$af":"defaultdict","t":"eval","v":[]}',
        '{"$af":"path","t":"eval","v":"1"}',
        '{"$af":"numpy","d":"|O","s":[1],"v":"AAAAAAAAAAA="}',
        '{"$af":"os.system","v":"true"}',
        '{"$af":["tuple"],"v":1}',
        '{"$af":"tuple"}',
        '{"$af":"datetime","v":"soon"}',
        '{"$af":"int","v":"zz"}',
    ],
)
def test_a_crafted_record_calls_nothing(text):
    with pytest.raises(UnknownType):
        decode(text)


def test_a_module_that_is_still_being_imported_elsewhere_does_no_harm(loaded):
    half = loaded("numpy", "")
    half.__spec__ = types.SimpleNamespace(_initializing=True)
    assert back(Order("x")) == Order("x")


def test_recognising_a_value_imports_nothing():
    program = "import sys, dataclasses\nfrom agentflow.codec import *\n@dataclasses.dataclass\nclass A: x: tuple\nroundtrip(A((1,)))\nprint({'pydantic', 'numpy', 'pandas', 'openai'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": "."}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_class_made_inside_a_function_works_in_its_process_and_is_explained_in_another():
    @dataclasses.dataclass
    class Local:
        n: int

    text, value = roundtrip(Local(1))
    assert value == Local(1)
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom agentflow.codec import *\ntry: decode(sys.argv[1])\nexcept UnknownType as e: print(e)", text],
        env={"PYTHONPATH": "."}, capture_output=True, text=True,
    )  # fmt: skip
    assert "defined inside a function" in done.stdout


@pytest.mark.parametrize("base", ["dataclass", "model", "namedtuple", "attrs"])
def test_new_fields_get_defaults_removed_ones_are_ignored_and_required_ones_are_named(loaded, base):
    head = {
        "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass V:\n",
        "model": "import pydantic\nclass V(pydantic.BaseModel):\n",
        "namedtuple": "import typing\nclass V(typing.NamedTuple):\n",
        "attrs": "import attrs\n@attrs.define\nclass V:\n",
    }[base]
    one = loaded("versioned", head + "    a: int\n    b: int = 2\n")
    text = encode(one.V(a=1))
    assert decode(text) == one.V(a=1)
    two = loaded("versioned", head + "    a: int\n    c: int = 3\n")
    assert (decode(text).a, decode(text).c) == (1, 3) and type(decode(text)) is two.V
    loaded("versioned", head + "    a: int\n    must: int\n")
    with pytest.raises(UnknownType, match=r"versioned:V now requires must"):
        decode(text)
    loaded("versioned", "class V: pass")
    with pytest.raises(UnknownType, match="is none any more"):
        decode(text)


def test_an_enum_member_is_found_by_name_then_by_value(loaded):
    one = loaded("colors", "import enum\nclass C(enum.Enum):\n    A = 1\n    B = 2\n")
    a, b = encode(one.C.A), encode(one.C.B)
    two = loaded("colors", "import enum\nclass C(enum.Enum):\n    A = 10\n    NEW = 2\n")
    assert decode(a) is two.C.A and decode(b) is two.C.NEW
    loaded("colors", "import enum\nclass C(enum.Enum):\n    X = 7\n")
    with pytest.raises(UnknownType, match="no member A any more"):
        decode(a)


# -- exceptions -------------------------------------------------------------------------------------------------------


class PaymentError(Exception):
    def __init__(self, order, *, code):
        super().__init__(f"order {order} declined")
        self.order, self.code, self.socket = order, code, Session()


class Shouting(Exception):
    def __str__(self):
        return "!" + str(self.args[0])


class Slotted(ValueError):
    __slots__ = ("x",)


class Picky(Exception):
    def __new__(cls, a, b):
        return super().__new__(cls, a, b)

    def __init_subclass__(cls, **kwargs):
        raise RuntimeError("no subclasses")


def raised(make):
    try:
        make()
    except BaseException as exc:
        return exc
    raise AssertionError("nothing was raised")


ERRORS = [
    PaymentError("x", code=3), Shouting("a"), Slotted("s"), KeyError("k"), KeyError(), ValueError(), ValueError("a", 1, (2,)), StepTimeout("late"),
    OSError(2, "No such file", "f"), FileNotFoundError(2, "No such file", "f"), OSError("bare"), ConnectionResetError(104, "reset"),
    raised(lambda: b"\xff".decode()), raised(lambda: "\udcff".encode()), raised(lambda: json.loads("{")), raised(lambda: Decimal("x")),
    raised(lambda: __import__("no_such_module_here")), raised(lambda: compile("a b", "f", "exec")), raised(lambda: 1 / 0), raised(lambda: [].x),
    SystemExit(3), KeyboardInterrupt(), StopIteration(5), asyncio.CancelledError("c"), TimeoutError("t"), UnicodeError("bad \udcff"),
    ExceptionGroup("several", [ValueError(1), PaymentError("y", code=1)]), ValueError(Session()),
]  # fmt: skip


@pytest.mark.parametrize("exc", ERRORS, ids=lambda e: type(e).__name__)
def test_a_rebuilt_exception_is_caught_as_its_type_and_as_step_failed_with_the_same_text(exc):
    data = json.loads(json.dumps(encode_exception(exc)))
    first = rebuild_exception(encode_exception(exc), StepFailed, {"step": "charge", "attempts": 2})
    again = rebuild_exception(data, StepFailed, {"step": "charge", "attempts": 2})
    for made in (first, again, rebuild_exception(decode(encode(data)), StepFailed, {"step": "charge", "attempts": 2})):
        assert isinstance(made, type(exc)) and isinstance(made, StepFailed)
        assert type(made).__name__ == type(exc).__name__ and type(made).__module__ == type(exc).__module__
        assert str(made) == str(exc).encode("utf-8", "backslashreplace").decode()
        assert (made.step, made.attempts) == ("charge", 2)
        for name in ("errno", "filename", "start", "object", "code", "value", "name", "lineno", "order"):
            assert getattr(made, name, None) == getattr(exc, name, None)
    assert type(first) is type(again) and repr(first.args) == repr(again.args)


def test_attributes_and_notes_of_an_exception_survive_and_what_cannot_is_listed():
    exc = PaymentError("x", code=(1, 2))
    exc.add_note("while charging")
    data = encode_exception(exc)
    made = rebuild_exception(data, StepFailed, {"step": "s"})
    assert (data["name"], data["message"], data["dropped"]) == ("PaymentError", "order x declined", ["socket"])
    assert (
        made.code == (1, 2)
        and made.order == "x"
        and made.__notes__ == ["while charging"]
        and not hasattr(made, "socket")
    )
    assert decode_exception(data) == (PaymentError, ("order x declined",), {"order": "x", "code": (1, 2)})


def test_an_exception_rebuilt_twice_over_keeps_one_type_and_takes_the_outer_step():
    inner = rebuild_exception(encode_exception(PaymentError("x", code=1)), StepFailed, {"step": "inner", "attempts": 3})
    data = encode_exception(inner)
    outer = rebuild_exception(data, StepFailed, {"step": "outer"})
    assert type(outer) is type(inner) and outer.step == "outer" and outer.attempts == 0 and "step" not in data["data"]
    assert str(outer) == "order x declined"


def test_an_attribute_the_original_exception_owns_is_not_overwritten():
    exc = ValueError("v")
    exc.step = "the user's own"
    made = rebuild_exception(encode_exception(exc), StepFailed, {"step": "charge", "run_id": "r"})
    assert made.step == "the user's own" and made.run_id == "r"


def test_an_exception_whose_type_is_not_loaded_or_not_combinable_is_the_base_alone_and_reads_the_same():
    data = {**encode_exception(PaymentError("x", code=1)), "type": "gone.module:Vanished"}
    for exc in (
        rebuild_exception(data, StepFailed, {}),
        rebuild_exception(encode_exception(Picky(1, 2)), StepFailed, {}),
    ):
        assert isinstance(exc, StepFailed) and str(exc) in ("order x declined", "(1, 2)")
    assert type(rebuild_exception(data, StepFailed, {})).__name__ == "Vanished"
    again = encode_exception(rebuild_exception(data, StepFailed, {}))
    assert again["type"] == "gone.module:Vanished"
    error = raised(lambda: Strict(n=0))
    made = rebuild_exception(encode_exception(error), StepFailed, {})
    assert str(made) == str(error) and isinstance(made, StepFailed)


def test_a_nasty_exception_never_breaks_the_recording_of_its_failure():
    class Nasty(Exception):
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    data = encode_exception(Nasty(Nasty(), "\ud800", {"self": object()}))
    json.dumps(data)
    made = rebuild_exception(data, StepFailed, {})
    assert str(made) == "Nasty" and made.args[1] == "\ud800" and len(made.args) == 3


def test_status_errors_of_the_sdks_keep_status_and_body():
    import anthropic
    import httpx2
    import openai

    for sdk in (openai, anthropic):
        response = httpx2.Response(
            429, request=httpx2.Request("POST", "https://example.org"), headers={"request-id": "r1"}
        )
        exc = sdk.RateLimitError("slow down", response=response, body={"type": "rate", "n": 1})
        data = encode_exception(exc)
        made = rebuild_exception(data, StepFailed, {"step": "ask"})
        assert isinstance(made, sdk.RateLimitError) and isinstance(made, StepFailed)
        assert (made.status_code, made.body, made.message, str(made)) == (
            429,
            {"type": "rate", "n": 1},
            "slow down",
            "slow down",
        )
        assert {"response", "request"} <= set(data["dropped"])


def test_exceptions_are_values_too():
    exc = back_exception(PaymentError2("a", 1))
    assert type(exc) is PaymentError2 and exc.args == ("a", 1)
    group = back_exception(ExceptionGroup("g", [ValueError(1), KeyError("k")]))
    assert [type(e) for e in group.exceptions] == [ValueError, KeyError] and group.message == "g"


class PaymentError2(Exception):
    pass


def back_exception(exc):
    return roundtrip([exc])[1][0]


def test_an_exception_that_holds_itself_is_recorded_in_bounded_space():
    exc = ValueError("v")
    exc.args = (exc, exc)
    exc.one = exc.two = exc
    assert len(json.dumps(encode_exception(exc))) < 1_000_000
    assert isinstance(rebuild_exception(encode_exception(exc), StepFailed, {}), ValueError)


def test_a_time_that_pydantic_has_read_from_text_is_recorded() -> None:
    class Seen(pydantic.BaseModel):
        at: dt.datetime

    seen = Seen.model_validate_json('{"at": "2026-11-22T10:00:00+02:00"}')
    back = roundtrip(seen)[1]
    assert back == seen and back.at.utcoffset() == dt.timedelta(hours=2)

