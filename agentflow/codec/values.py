"""The standard library's value types: containers, bytes, numbers, times and paths, each written and read."""

from __future__ import annotations

import base64
import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from uuid import UUID

from agentflow.codec.common import TAG, Where, b64, tagged
from agentflow.codec.tree import read, refuse, write, write_items, write_pairs, write_set
from agentflow.rich import Listed

BUILTINS: dict[str, type] = {
    cls.__name__: cls
    for cls in (str, int, float, complex, bool, bytes, bytearray, tuple, list, set, frozenset, dict)
}  # fmt: skip
_PATHS: dict[str, type[PurePath]] = {
    cls.__name__: cls for cls in (PurePath, PurePosixPath, PureWindowsPath, Path, PosixPath, WindowsPath)
}


def _write_text(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return tagged(type(value).__name__, str(value))


def _write_path(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return {TAG: "path", "t": type(value).__name__, "v": write(str(value), at, depth)}


def _write_bytes(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return tagged(type(value).__name__, b64(value))


def _write_sequence(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return tagged(type(value).__name__, write_items(value, at, depth))


def _write_mapping(value: Any, at: Where, depth: int) -> dict[str, Any]:
    return tagged(type(value).__name__, write_pairs(value, at, depth))


def _write_defaultdict(value: Any, at: Where, depth: int) -> dict[str, Any]:
    factory = value.default_factory
    if factory is not None and BUILTINS.get(getattr(factory, "__name__", "")) is not factory:
        refuse((at, ".default_factory", 0), factory, "only built-in types such as list or int can be recorded there")
    return {TAG: "defaultdict", "t": factory and factory.__name__, "v": write_pairs(value, at, depth)}


def _write_moment(value: Any, at: Where, depth: int) -> dict[str, Any]:
    out = tagged(type(value).__name__, value.replace(tzinfo=None, fold=0).isoformat())
    if value.tzinfo is not None:
        out["z"] = write_zone(value.tzinfo, (at, ".tzinfo", 0))
    if value.fold:
        out["f"] = 1
    return out


def write_zone(zone: tzinfo | None, at: Where) -> Any:
    if zone is None:
        return None
    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [offset.days, offset.seconds, offset.microseconds, *name]
    zoneinfo: Any = sys.modules.get("zoneinfo")
    if zoneinfo is not None and type(zone) is zoneinfo.ZoneInfo:
        key = getattr(zone, "key", None)
        if key is not None:
            return key
    if type(zone).__name__ == "TzInfo" and type(zone).__module__.startswith("pydantic_core"):
        # What pydantic reads from text: a fixed offset of its own class. It comes back as the library's one.
        offset = zone.utcoffset(None)
        if offset is not None:
            return [offset.days, offset.seconds, offset.microseconds]
    refuse(at, zone, "use zoneinfo.ZoneInfo or datetime.timezone")


WRITERS: dict[type, Callable[[Any, Where, int], Any]] = {
    Listed: write_items,
    tuple: _write_sequence,
    set: lambda v, at, depth: tagged("set", write_set(v, at, depth)),
    frozenset: lambda v, at, depth: tagged("frozenset", write_set(v, at, depth)),
    bytes: _write_bytes,
    bytearray: _write_bytes,
    datetime: _write_moment,
    time: _write_moment,
    date: lambda v, at, depth: tagged("date", v.isoformat()),
    timedelta: lambda v, at, depth: tagged("timedelta", [v.days, v.seconds, v.microseconds]),
    Decimal: _write_text,
    UUID: _write_text,
    complex: lambda v, at, depth: tagged("complex", write_items((v.real, v.imag), at, depth)),
    range: lambda v, at, depth: tagged("range", write_items((v.start, v.stop, v.step), at, depth)),
    Fraction: lambda v, at, depth: tagged("Fraction", write_items((v.numerator, v.denominator), at, depth)),
    OrderedDict: _write_mapping,
    Counter: _write_mapping,
    defaultdict: _write_defaultdict,
    deque: lambda v, at, depth: {TAG: "deque", "v": write_items(v, at, depth), "m": v.maxlen},
    **dict.fromkeys(_PATHS.values(), _write_path),
}


def _read_pairs(node: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((read(key), read(item)) for key, item in node["v"])


def _read_counter(node: dict[str, Any]) -> Any:
    counter: Counter[Any] = Counter()
    dict.update(counter, _read_pairs(node))
    return counter


def _read_defaultdict(node: dict[str, Any]) -> Any:
    factory: Any = None if node["t"] is None else BUILTINS[node["t"]]
    return defaultdict(factory, ((read(k), read(v)) for k, v in node["v"]))


def _read_moment(cls: Any, node: dict[str, Any]) -> Any:
    return cls.fromisoformat(node["v"]).replace(tzinfo=read_zone(node.get("z")), fold=node.get("f", 0))


def read_zone(zone: Any) -> tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        from zoneinfo import ZoneInfo

        return ZoneInfo(zone)
    return timezone(timedelta(*zone[:3]), *zone[3:])


READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "str": lambda n: base64.b64decode(n["v"]).decode("utf-8", "surrogatepass"),
    "int": lambda n: int(n["v"], 16),
    "float": lambda n: float(n["v"]),
    "dict": lambda n: dict(_read_pairs(n)),
    "tuple": lambda n: tuple(read(n["v"])),
    "set": lambda n: set(read(n["v"])),
    "frozenset": lambda n: frozenset(read(n["v"])),
    "bytes": lambda n: base64.b64decode(n["v"]),
    "bytearray": lambda n: bytearray(base64.b64decode(n["v"])),
    "datetime": functools.partial(_read_moment, datetime),
    "time": functools.partial(_read_moment, time),
    "date": lambda n: date.fromisoformat(n["v"]),
    "timedelta": lambda n: timedelta(*n["v"]),
    "Decimal": lambda n: Decimal(n["v"]),
    "UUID": lambda n: UUID(n["v"]),
    "complex": lambda n: complex(*read(n["v"])),
    "range": lambda n: range(*read(n["v"])),
    "Fraction": lambda n: Fraction(*read(n["v"])),
    "OrderedDict": lambda n: OrderedDict(_read_pairs(n)),
    "Counter": _read_counter,
    "defaultdict": _read_defaultdict,
    "deque": lambda n: deque(read(n["v"]), n["m"]),
    "path": lambda n: _PATHS[n["t"]](read(n["v"])),
}
