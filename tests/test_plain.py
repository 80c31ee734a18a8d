"""Small classes without a dataclass behind them behave like one."""

from __future__ import annotations

import pytest

from agentflow.calls import PLAIN, Options
from agentflow.lease import Owner
from agentflow.ops import Add, Drop, Fence, Put


def test_they_are_equal_by_class_and_fields() -> None:
    assert Add("k", "v") == Add("k", "v") != Add("k", "w")
    assert Add("k", "v") != Put("k", "v") and Drop("k") != "k"
    assert len({Add("k", "v"), Add("k", "v"), Put("k", "v"), Fence("k", 1)}) == 3


def test_they_show_their_fields() -> None:
    assert repr(Fence("lease/r", 3)) == "Fence(key='lease/r', token=3)"


def test_a_copy_has_some_fields_changed_and_the_rest_as_they_were() -> None:
    owner = Owner(3, 17, "s", "host", "boot", "me", 1.0, 2.0)
    assert owner.but(released=True) == Owner(3, 17, "s", "host", "boot", "me", 1.0, 2.0, released=True)
    assert not owner.released
    assert PLAIN.but(on_change="reuse").on_change == "reuse" and PLAIN.on_change is None
    with pytest.raises(TypeError):
        PLAIN.but(onchange="reuse")
    with pytest.raises(AttributeError):
        Options().onchange = "reuse"  # type: ignore[attr-defined]
