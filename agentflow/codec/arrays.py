"""numpy arrays and pandas frames; neither package is imported unless a value or a record needs it."""

from __future__ import annotations

import base64
from typing import Any

from agentflow.codec.common import MAX_DEPTH, TAG, UnknownType, Where, b64
from agentflow.codec.tree import read, refuse, write, write_items
from agentflow.codec.values import read_zone, write_zone
from agentflow.errors import NotRecordable


def write_numpy(numpy: Any, value: Any, kind: type, at: Where) -> dict[str, Any]:
    if isinstance(value, numpy.ndarray) and kind is not numpy.ndarray:
        refuse(at, value, "only plain numpy arrays have a recorded form; use numpy.asarray")
    if value.dtype.hasobject or value.dtype.kind in "OT":
        refuse(at, value, f"an array of dtype {value.dtype} holds Python objects; use .tolist()")
    # a plain dtype is written as its string; a structured one as numpy's own .npy header does
    descr = numpy.lib.format.dtype_to_descr(value.dtype)
    out = {TAG: "numpy", "d": write(descr, at, MAX_DEPTH)}
    if isinstance(value, numpy.ndarray):
        out["s"] = list(value.shape)
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            out["o"] = "F"
    out["v"] = b64(value.tobytes(order=out.get("o", "C")))
    return out


def write_pandas(pandas: Any, value: Any, at: Where, depth: int) -> dict[str, Any]:
    kind = type(value).__name__
    if type(value) is pandas.DataFrame:
        columns = [_write_column(pandas, value.iloc[:, i].array, at, depth) for i in range(value.shape[1])]
        body: Any = [
            _write_index(pandas, value.columns, at, depth),
            columns,
            _write_index(pandas, value.index, at, depth),
        ]
    elif type(value) is pandas.Series:
        body = [write(value.name, at, depth - 1), _write_column(pandas, value.array, at, depth)]
        body.append(_write_index(pandas, value.index, at, depth))
    elif isinstance(value, pandas.Index):
        kind, body = "Index", _write_index(pandas, value, at, depth)
    else:
        refuse(at, value, "subclasses of pandas types have no recorded form")
    out = {TAG: "pandas", "k": kind, "v": body}
    if kind != "Index" and value.attrs:
        out["a"] = write(value.attrs, (at, ".attrs", 0), depth - 1)
    try:
        exact = _same_pandas(value, read_pandas(out))
    except NotRecordable:
        raise
    except Exception as exc:  # whatever pandas objects to, the value has no exact form
        refuse(at, value, f"pandas cannot rebuild it exactly ({type(exc).__name__}: {exc})")
    if not exact:
        refuse(at, value, "it cannot be rebuilt exactly; use plain columns, or .to_dict()")
    return out


def write_pandas_scalar(pandas: Any, value: Any, kind: type, at: Where) -> dict[str, Any]:
    if value is pandas.NA or value is pandas.NaT:
        return {TAG: "pandas", "k": "NA" if value is pandas.NA else "NaT"}
    zone = getattr(value, "tzinfo", None)
    out = {TAG: "pandas", "k": kind.__name__, "v": write(value.asm8, at, 9)}  # asm8 is UTC
    if zone is not None:
        out["z"] = write_zone(zone, (at, ".tzinfo", 0))
    return out


def _same_pandas(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if not hasattr(one, "index"):
        return bool(one.identical(two) and getattr(one, "freq", None) == getattr(two, "freq", None))
    same = _same_pandas(one.index, two.index) and one.equals(two) and one.attrs == two.attrs
    if one.ndim == 1:
        return bool(same and one.dtype == two.dtype and type(one.name) is type(two.name) and one.name == two.name)
    return bool(same and list(one.dtypes) == list(two.dtypes) and _same_pandas(one.columns, two.columns))


def _write_index(pandas: Any, index: Any, at: Where, depth: int) -> dict[str, Any]:
    names = write_items(index.names, (at, ".names", 0), depth)
    if type(index) is pandas.RangeIndex:
        return {"r": [index.start, index.stop, index.step], "n": names}
    if type(index) is pandas.MultiIndex:
        levels = [index.get_level_values(i).array for i in range(index.nlevels)]
        return {"m": [_write_column(pandas, level, at, depth) for level in levels], "n": names}
    return {"c": _write_column(pandas, index.array, at, depth), "q": getattr(index, "freqstr", None), "n": names}


def _write_column(pandas: Any, array: Any, at: Where, depth: int) -> dict[str, Any]:
    dtype = array.dtype
    if isinstance(dtype, pandas.CategoricalDtype):
        categories = _write_index(pandas, dtype.categories, at, depth)
        return {"d": "category", "v": write(array.codes, at, depth), "c": categories, "o": bool(dtype.ordered)}
    if isinstance(dtype, pandas.DatetimeTZDtype):
        utc = array.tz_convert("UTC").tz_localize(None).to_numpy()
        return {"d": "zone", "v": write(utc, at, depth), "z": write_zone(dtype.tz, at)}
    if str(dtype) == "object":
        return {"d": "object", "v": write_items(array, at, depth)}
    if hasattr(dtype, "hasobject"):
        return {"d": "numpy", "v": write(array.to_numpy(), at, depth)}
    return {
        "d": str(dtype),
        "v": write_items([None if pandas.isna(item) else item for item in array.tolist()], at, depth),
    }


def read_numpy(node: dict[str, Any]) -> Any:
    numpy = _package("numpy")
    dtype = numpy.lib.format.descr_to_dtype(read(node["d"]))
    if dtype.hasobject:
        raise UnknownType("a recorded array claims to hold Python objects", "numpy")
    raw = base64.b64decode(node["v"])
    if "s" not in node:
        return numpy.ndarray((1,), dtype, raw).copy()[0]
    return numpy.ndarray(tuple(node["s"]), dtype, raw, order=node.get("o", "C")).copy(order="K")


def read_pandas(node: dict[str, Any]) -> Any:
    pandas = _package("pandas")
    if node["k"] in ("NA", "NaT"):
        return getattr(pandas, node["k"])
    body = node["v"]
    if node["k"] in ("Timestamp", "Timedelta"):
        scalar = getattr(pandas, node["k"])(read(body))
        return scalar.tz_localize("UTC").tz_convert(read_zone(node["z"])) if "z" in node else scalar
    if node["k"] == "Index":
        return _read_index(pandas, body)
    if node["k"] == "Series":
        out = pandas.Series(_read_column(pandas, body[1]), index=_read_index(pandas, body[2]), name=read(body[0]))
    else:
        columns = {i: _read_column(pandas, column) for i, column in enumerate(body[1])}
        out = pandas.DataFrame(columns, index=_read_index(pandas, body[2]))
        out.columns = _read_index(pandas, body[0])
    out.attrs = read(node.get("a", {}))
    return out


def _read_index(pandas: Any, node: dict[str, Any]) -> Any:
    names = read(node["n"])
    if "r" in node:
        return pandas.RangeIndex(*node["r"], name=names[0])
    if "m" in node:
        return pandas.MultiIndex.from_arrays([_read_column(pandas, level) for level in node["m"]], names=names)
    column = _read_column(pandas, node["c"])
    index = pandas.Index(column, name=names[0], dtype=column.dtype)
    if node["q"] is not None:
        index.freq = node["q"]
    return index


def _read_column(pandas: Any, node: dict[str, Any]) -> Any:
    kind = node["d"]
    if kind == "category":
        categories = _read_index(pandas, node["c"])
        return pandas.Categorical.from_codes(read(node["v"]), categories=categories, ordered=node["o"])
    if kind == "zone":
        return pandas.DatetimeIndex(read(node["v"])).tz_localize("UTC").tz_convert(read_zone(node["z"])).array
    if kind == "object":
        values = pandas.Series([None] * len(node["v"]), dtype=object).to_numpy(copy=True)
        for i, item in enumerate(node["v"]):
            values[i] = read(item)
        return values
    return read(node["v"]) if kind == "numpy" else pandas.array(read(node["v"]), dtype=kind)


def _package(name: str) -> Any:
    """numpy or pandas: fixed names, so no record chooses what is imported."""
    try:
        if name == "numpy":
            import numpy

            return numpy
        import pandas  # type: ignore[import-untyped,unused-ignore]

        return pandas
    except ImportError as exc:
        raise UnknownType(f"the record holds a {name} value: install {name} to read it", name) from exc
