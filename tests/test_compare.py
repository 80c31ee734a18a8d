"""Differences between two captures: where, how shown, and whether they are accidents of the moment."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from agentflow.capture import data_text
from agentflow.compare import changed_paths, differences, opaque_paths, unified

OLD, NEW = 1_790_000_000.0, 1_790_086_400.0
OLD_WINDOW, NEW_WINDOW = (OLD, OLD + 60), (NEW, NEW + 60)


def diff(old, new, **kw):
    kw.setdefault("old_window", OLD_WINDOW)
    kw.setdefault("new_window", NEW_WINDOW)
    return differences(data_text(old), data_text(new), **kw)


def accident(old, new, **kw):
    found = diff(old, new, **kw)
    assert len(found) == 1, found
    return found[0].accident


def utc(t):
    return datetime.fromtimestamp(t, UTC)


def test_equal_values_have_no_differences():
    assert diff({"a": [1, (2, {3})]}, {"a": [1, (2, {3})]}) == []


def test_a_difference_names_its_path_and_both_sides():
    (d,) = diff({"items": [{"price": 1}, {"price": 2}]}, {"items": [{"price": 1}, {"price": 3}]})
    assert (d.path, d.old, d.new, d.accident) == ("items[1].price", "2", "3", None)


@pytest.mark.parametrize(
    ("old", "new"), [(1, 1.0), (1, True), ((1,), [1]), ({"a": None}, {}), ([1], [1, 2]), ({1: 2}, {"1": 2}), ({1}, {2})]
)
def test_values_that_only_look_alike_differ(old, new):
    assert diff(old, new)


def test_ignored_paths_cover_what_is_below_them_and_nothing_beside():
    old, new = {"a": {"b": 1}, "ab": 1}, {"a": {"b": 2}, "ab": 2}
    assert [d.path for d in diff(old, new, ignore=["a"])] == ["ab"]


@pytest.mark.parametrize(
    "form",
    [
        utc,
        lambda t: datetime.fromtimestamp(t),
        lambda t: utc(t).replace(tzinfo=None),
        lambda t: utc(t).astimezone(timezone(timedelta(hours=9))),
        lambda t: t,
        lambda t: int(t),
        lambda t: int(t * 1e3),
        lambda t: int(t * 1e9),
        lambda t: f"Now: {utc(t).isoformat()}. Write a report.",
        lambda t: f"Now: {utc(t)}",
        lambda t: f"{utc(t):%Y-%m-%d %H:%M}",
        lambda t: f"{utc(t):%Y-%m-%dT%H:%M:%SZ} and again {utc(t).isoformat()}",
        lambda t: f"order-{uuid.uuid4()} at {utc(t)}",
        lambda t: f"at {t:.3f} s",
        lambda t: f"on {time.ctime(t)}",
        lambda t: f"report-{utc(t):%Y%m%dT%H%M%S}.txt",
    ],
)
def test_a_clock_reading_of_its_own_session_is_an_accident(form):
    assert accident(form(OLD + 5.25), form(NEW + 5.5)) in ("clock", "uuid")
    before = form(OLD - 86400 * 3)
    assert accident(before, form(NEW + 5.5)) is None, "the old value was not read in the old session"
    assert accident(form(OLD + 5.25), form(NEW + 86400)) is None, "the new value was not read in this session"


def test_a_date_is_data():
    assert accident(date(2026, 9, 21), date(2026, 9, 22)) is None
    assert accident("report for 2026-09-21", "report for 2026-09-22") is None
    assert accident(utc(OLD).time(), utc(OLD + 5).time()) is None


def test_text_around_a_clock_reading_counts():
    assert accident(f"{utc(OLD)} hello", f"{utc(NEW)} hullo") is None


def test_without_windows_no_clock_reading_is_an_accident():
    (d,) = differences(data_text(utc(OLD)), data_text(utc(NEW)))
    assert d.accident is None


@pytest.mark.parametrize("form", [lambda u: u, str, lambda u: u.hex, lambda u: f"order {u}!", lambda u: f"req_{u.hex}"])
def test_a_fresh_uuid_is_an_accident_unless_it_is_known_data(form):
    a, b = uuid.uuid4(), uuid.uuid4()
    assert accident(form(a), form(b)) == "uuid"
    assert accident(form(a), form(b), known=lambda s: s in (str(a), a.hex)) is None
    assert accident(form(a), form(b), known=lambda s: s in (str(b), b.hex)) is None


def test_a_uuid_of_another_version_is_data():
    a, b = uuid.uuid5(uuid.NAMESPACE_URL, "a"), uuid.uuid5(uuid.NAMESPACE_URL, "b")
    assert accident(a, b) is None
    assert accident(str(a), str(b)) is None


def test_a_memory_address_is_an_accident():
    assert accident("<app.Client object at 0x7f0000000001>", "<app.Client object at 0x7f00000000ff>") == "address"
    assert accident("color 0xff0000", "color 0x00ff00") is None


def test_large_texts_are_compared_whole():
    pad = "x" * 70_000
    assert accident(f"{utc(OLD)}{pad}", f"{utc(NEW)}{pad}") is None


def test_one_accident_and_one_change_are_told_apart():
    found = {d.path: d.accident for d in diff({"at": utc(OLD), "n": 1}, {"at": utc(NEW), "n": 2})}
    assert found == {"at": "clock", "n": None}


def test_a_long_text_is_shown_as_the_lines_that_changed():
    old = "\n".join(f"line {i}" for i in range(100))
    shown = unified(diff({"prompt": old}, {"prompt": old.replace("line 50", "row 50")}))
    assert "-line 50" in shown and "+row 50" in shown and "line 10\n" not in shown and shown.startswith("prompt:")


def test_a_long_line_is_shown_around_its_change():
    shown = unified(diff("x" * 500 + "a" + "x" * 500, "x" * 500 + "b" + "x" * 500))
    assert "a" in shown and "b" in shown and len(shown) < 500


def test_short_differences_stand_on_one_line():
    assert unified(diff({"n": 1}, {"n": 2})) == "n: 1 -> 2"


def test_a_list_that_grew_is_one_changed_path():
    assert changed_paths(data_text({"log": [1], "n": 1}), data_text({"log": [1, 2], "n": 1})) == ["log"]
    assert changed_paths(data_text({"log": [1, 2]}), data_text({"log": [1, 3]})) == ["log[1]"]


def test_differing_texts_always_have_a_difference():
    class Name(str):
        pass

    for old, new in [
        (Name("a"), Name("b")),
        (b"a", b"b"),
        ({1: Name("x")}, {1: Name("y")}),
        (1j, 2j),
        ({(1,)}, {(2,)}),
    ]:
        assert diff(old, new), (old, new)


def test_values_without_data_form_are_listed_by_path():
    import threading

    assert opaque_paths(data_text({"a": [1, threading.Lock()], "b": (open,)})) == ["a[1]"]
