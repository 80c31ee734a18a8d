"""Values and types as a model sees them: plain JSON in, a strict JSON schema for what comes back."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import inspect
import ipaddress
import json
import math
import pathlib
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from agentflow.errors import UsageError

_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
_NUMBERS = {"multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_SILENT = {"title", "discriminator", "deprecated", "readOnly", "writeOnly", "$defs", "required", "additionalProperties"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Mismatch(ValueError):
    """A reply does not validate; the message lists what is wrong, for a person or a model."""


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """The JSON schema of an output type, an object at its root.

    ``named`` has a ``name`` and the ``schema`` with every constraint that OpenAI's strict mode knows,
    ``plain`` is the schema with those alone that Anthropic knows; what is left out stands in the
    descriptions. ``wrapped``: the value is the ``value`` of that object.
    """

    named: dict[str, Any]
    plain: dict[str, Any]
    wrapped: bool


def output(output_type: Any) -> Output:
    """The schema for ``output_type``.

    Raises:
        UsageError: a part of it has no form in a strict schema; the message names the field.
    """
    return _cached(_output, output_type)  # type: ignore[no-any-return]


def validate(text: str, output_type: Any) -> Any:
    """The value that ``text`` stands for. ``str`` takes it as it is, all else reads JSON.

    Raises:
        Mismatch: it is no JSON, or not of that type.
    """
    if output_type is str:
        return text
    from pydantic import ValidationError

    adapter, wrapper, _ = _cached(_adapter, output_type)
    text = _unfenced(text)
    try:
        if wrapper is None:
            return adapter.validate_json(text)
        form = _form_of(text)
        if form == "wrapped":
            return wrapper.validate_json(text)["value"]
        return adapter.validate_json(json.dumps(text.strip()) if form == "word" else text)
    except ValidationError as exc:
        lines = []
        for error in exc.errors(include_url=False, include_context=False):
            where = ".".join(str(part) for part in error["loc"])
            got = "" if error["type"] in ("missing", "json_invalid") else f" (got {_short(error['input'])})"
            lines.append(f"- {where + ': ' if where else ''}{error['msg']}{got}")
        raise Mismatch(_ADDRESS.sub("", "\n".join(lines))) from exc


def plain(value: Any, path: str = "data") -> Any:
    """``value`` as plain JSON data: what a model is shown.

    Models, dataclasses and named tuples become objects in the order of their fields, sets are sorted.

    Raises:
        UsageError: something in it has no such form; the message says where.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:  # most values end here
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value, path)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        raise UsageError(f"{path} is {value!r}, which JSON cannot hold.")
    if isinstance(value, Mapping):
        made = {_key(key, path): plain(item, f"{path}.{key}") for key, item in value.items()}
        if len(made) != len(value):
            raise UsageError(f"{path} has keys that JSON cannot tell apart, such as 1 and '1'.")
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: plain(item, f"{path}.{name}") for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        items = [plain(item, f"{path}{{}}") for item in value]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID | pathlib.PurePath):
        return str(value)
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name), f"{path}.{name}") for name in names}
    return _foreign(value, path)


def show(value: Any, path: str = "data") -> str:
    """``value`` as indented JSON text."""
    return json.dumps(plain(value, path), ensure_ascii=False, indent=2)


def _foreign(value: Any, path: str) -> Any:
    """Values of libraries that may not even be installed."""
    pydantic, numpy, pandas = (sys.modules.get(name) for name in ("pydantic", "numpy", "pandas"))
    if pydantic and isinstance(value, pydantic.BaseModel):
        # In Python mode sets stay sets, to be sorted; excluded fields and serialisers are honoured.
        return plain(value.model_dump(mode="python", by_alias=True), path)
    if numpy and isinstance(value, numpy.ndarray | numpy.generic):
        return plain(value.tolist(), path)
    if pandas and isinstance(value, pandas.DataFrame):
        return json.loads(value.to_json(orient="records", date_format="iso"))
    if pandas and isinstance(value, pandas.Series):
        return json.loads(value.to_json(orient="index", date_format="iso"))
    raise UsageError(
        f"{path} is a {type(value).__name__}, which has no plain JSON form. Pass the fields that the model is to see."
    )


def _key(key: Any, path: str) -> str:
    if type(key) is str:
        return key
    key = key.value if isinstance(key, enum.Enum) else key
    if isinstance(key, str | int | float | bool | dt.date | uuid.UUID | decimal.Decimal) or key is None:
        return str(key)
    raise UsageError(f"{path} has the key {key!r}, which JSON cannot hold as a name.")


def _cached(build: Any, output_type: Any) -> Any:
    try:
        # The text is part of the key because int | str equals str | int, and their schemas differ.
        return _build(build, output_type, repr(output_type))
    except TypeError:  # not hashable, as Annotated with a list in it
        return build(output_type)


@functools.lru_cache(maxsize=256)
def _build(build: Any, output_type: Any, text: str) -> Any:
    return build(output_type)


def _adapter(output_type: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The adapter, the one for the wrapping object (None where the type is an object), the schema."""
    from pydantic import PydanticUserError, TypeAdapter
    from typing_extensions import TypedDict

    if isinstance(output_type, str):
        raise _no_type(output_type, "write the type itself, not its name as text")
    if inspect.isroutine(output_type):  # pydantic would take it for a description of its arguments
        raise _no_type(output_type, "it is a function, not a type")
    try:
        adapter = TypeAdapter(output_type)
        root = adapter.json_schema()
        if _root(root).get("type") == "object":
            return adapter, None, root
        wrapper = TypeAdapter(TypedDict("Wrapped", {"value": output_type}))  # type: ignore[operator]
        return adapter, wrapper, root
    except (PydanticUserError, NameError, AttributeError) as exc:
        raise _no_type(output_type, str(exc).split("\n")[0]) from exc


def _no_type(output_type: Any, why: str) -> UsageError:
    return UsageError(f"output_type={output_type!r} has no JSON schema: {why}. Nothing was sent.")


def _output(output_type: Any) -> Output:
    _, wrapper, root = _cached(_adapter, output_type)
    name = output_type.__name__ if wrapper is None and isinstance(output_type, type) else ""
    forms = []
    for openai in (True, False):
        strict = _Strict(root, openai)
        label = name or "output_type"
        defs = {key: strict.form(node, key) for key, node in root.get("$defs", {}).items()}
        made = strict.form({key: value for key, value in _root(root).items() if key != "$defs"}, label)
        if wrapper is not None:
            made = {
                "type": "object",
                "properties": {"value": made},
                "required": ["value"],
                "additionalProperties": False,
            }
        text = json.dumps([made, defs])
        used = {key: node for key, node in defs.items() if f'"#/$defs/{key}"' in text}
        forms.append({**made, "$defs": used} if used else made)
    return Output(
        {"name": re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] or "reply", "schema": forms[0]},
        forms[1],
        wrapper is not None,
    )


def _root(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema's root, with a reference at the root followed: the providers want an object there."""
    seen = 0
    node = schema
    while "$ref" in node and seen < 20:
        node, seen = schema["$defs"][node["$ref"].rpartition("/")[2]], seen + 1
    return node


class _Strict:
    """Rewrites pydantic's schema into the form that strict structured output takes."""

    def __init__(self, root: dict[str, Any], openai: bool) -> None:
        self.defs: dict[str, Any] = root.get("$defs", {})
        self.openai = openai
        self.inlining: list[str] = []

    def form(self, node: Any, path: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            raise _cannot(path, "may be anything")
        if "$ref" in node:
            return self.reference(node, path)
        if "allOf" in node:
            if len(node["allOf"]) != 1:
                raise _cannot(path, "has to be several things at once")
            rest = {key: value for key, value in node.items() if key != "allOf"}
            return self.form({**node["allOf"][0], **rest}, path)
        made: dict[str, Any] = {}
        used = {"type"}
        variants = node.get("anyOf") or node.get("oneOf")
        if variants:
            made["anyOf"] = [self.form(variant, path) for variant in variants]
            used |= {"anyOf", "oneOf"}
        elif "enum" in node or "const" in node:
            made.update({key: node[key] for key in ("type", "enum", "const") if key in node})
            used |= {"enum", "const"}
        elif "type" not in node:
            raise _cannot(path, "may be anything")
        else:
            made["type"] = node["type"]
            used |= self.kind(node, made, path)
        self.describe(node, made, used)
        return made

    def kind(self, node: dict[str, Any], made: dict[str, Any], path: str) -> set[str]:
        """Fills in what belongs to the type; gives the keywords that are dealt with."""
        if node["type"] == "object":
            properties = node.get("properties", {})
            free = node.get("additionalProperties", "properties" not in node)
            if "patternProperties" in node or (free is not False and not properties and "properties" not in node):
                raise _cannot(path, "is a dict with free keys")
            made["properties"] = {key: self.form(value, f"{path}.{key}") for key, value in properties.items()}
            made["required"] = list(properties)
            made["additionalProperties"] = False
            return {"properties", "patternProperties"}
        if node["type"] == "array":
            return self.array(node, made, path)
        used: set[str] = set()
        if node.get("format") in _FORMATS:
            used.add("format")
        if self.openai:
            used |= _NUMBERS
            if "pattern" in node and "(?" not in node["pattern"]:  # lookarounds are refused there
                used.add("pattern")
        made.update({key: node[key] for key in node if key in used})
        return used

    def array(self, node: dict[str, Any], made: dict[str, Any], path: str) -> set[str]:
        places = node.get("prefixItems")
        if places:
            forms = [self.form(place, f"{path}[{index}]") for index, place in enumerate(places)]
            distinct = [form for index, form in enumerate(forms) if form not in forms[:index]]
            made["items"] = distinct[0] if len(distinct) == 1 else {"anyOf": distinct}
        else:
            made["items"] = self.form(node.get("items"), f"{path}[]")
        used = {"items", "prefixItems"}
        for key in ("minItems", "maxItems"):
            if key in node and (self.openai or (key == "minItems" and node[key] in (0, 1))):
                made[key] = node[key]
                used.add(key)
        return used

    def describe(self, node: dict[str, Any], made: dict[str, Any], used: set[str]) -> None:
        """What the provider would refuse as a keyword is told in words; the reply is validated anyway."""
        notes = [
            f"{key}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in node.items()
            if key not in used | _SILENT | {"description"} and not (key == "default" and value is None)
        ]
        parts = [node.get("description", ""), "{" + ", ".join(notes) + "}" if notes else ""]
        if any(parts):
            made["description"] = "\n\n".join(part for part in parts if part)

    def reference(self, node: dict[str, Any], path: str) -> dict[str, Any]:
        """A reference stands alone in strict mode, so one with a description of its own is written out."""
        name = node["$ref"].rpartition("/")[2]
        rest = {key: value for key, value in node.items() if key != "$ref" and key not in _SILENT}
        if not rest or name in self.inlining:
            return {"$ref": node["$ref"]}
        self.inlining.append(name)
        try:
            return self.form({**self.defs[name], **rest}, path)
        finally:
            self.inlining.pop()


def _cannot(path: str, why: str) -> UsageError:
    return UsageError(
        f"output_type: {path} {why}, which strict structured output cannot express. Name its fields in a model, "
        "or ask for a list of key/value models. Nothing was sent."
    )


def _form_of(text: str) -> str:
    """How a value that is no object was written: wrapped as asked for, bare, or as a mere word."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return "bare" if text.lstrip()[:1] in '{["' else "word"
    return "wrapped" if isinstance(parsed, dict) and list(parsed) == ["value"] else "bare"


def _unfenced(text: str) -> str:
    """Without the Markdown fence that servers without structured output like to put around JSON."""
    match = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return match.group(1) if match else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -- forms that people fill in ---------------------------------------------------------------------


def form(kind: Any) -> dict[str, Any]:
    """The JSON schema of a type that a person fills in; the text form of a Decimal is checked like the number."""
    return _cached(_reader, kind).json_schema(schema_generator=_generator())  # type: ignore[no-any-return]


def _reader(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


@functools.cache
def _generator() -> Any:
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            made = super().decimal_schema(schema)
            bounds: dict[str, Any] = {}
            for variant in made.get("anyOf", ()):
                if variant.get("type") == "number":
                    bounds = {key: variant[key] for key in _NUMBERS if key in variant}
                elif variant.get("type") == "string":
                    variant |= {"format": "decimal", **bounds}
            return made

    return Generator


def fit(value: Any, kind: Any) -> Any:
    """The instance of a type that recorded data stands for, read as Python values or else as JSON.

    Raises:
        Mismatch: it is none; the message is one line. Whatever a validator raises becomes one.
    """
    from pydantic import ValidationError

    reader = _cached(_reader, kind)
    try:
        try:
            return reader.validate_python(value)
        except ValidationError as first:  # strict types take a date from JSON that they do not take from text
            try:
                return reader.validate_json(json.dumps(plain(value)))
            except (UsageError, ValidationError):
                raise first from None
    except ValidationError as error:
        lines = []
        for each in error.errors(include_url=False, include_context=False):
            where = ".".join(map(str, each["loc"]))
            got = "" if each["type"] == "missing" else f" (got {_short(each['input'])})"
            lines.append(f"{where + ': ' if where else ''}{each['msg']}{got}")
        raise Mismatch(" ".join(_ADDRESS.sub("", "; ".join(lines)).split())) from error
    except Exception as error:
        raise Mismatch(" ".join(f"{type(error).__name__}: {error}".split())) from error


def sketch(form: Mapping[str, Any]) -> str:
    """What an answer looks like: ``{"amount": ..., "reason": ...}``."""
    form = referred(form, form)
    if "properties" in form:
        names = form.get("required") or list(form["properties"])
        return "{" + ", ".join(f"{json.dumps(name, ensure_ascii=False)}: ..." for name in names) + "}"
    return {"object": "{...}", "array": "[...]", "string": '"..."'}.get(str(form.get("type")), "...")


def referred(form: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A reference with what it refers to."""
    seen = 0
    while "$ref" in form and (seen := seen + 1) < 100:
        rest = {key: value for key, value in form.items() if key != "$ref"}
        form = {**root.get("$defs", {}).get(form["$ref"].rpartition("/")[2], {}), **rest}
    return form


# What the kinds of a JSON schema are in Python, and in words.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "string": (lambda v: isinstance(v, str), "text"),
    "integer": (lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v == int(v), "a whole number"),
    "number": (lambda v: isinstance(v, int | float) and not isinstance(v, bool), "a number"),
    "boolean": (lambda v: isinstance(v, bool), "true or false"),
    "array": (lambda v: isinstance(v, list), "a list"),
    "object": (lambda v: isinstance(v, dict), "an object"),
    "null": (lambda v: v is None, "nothing"),
}


def misfit(
    value: Any, form: Mapping[str, Any], path: str = "answer", root: Mapping[str, Any] | None = None
) -> str | None:
    """What keeps plain JSON data from fitting a pydantic JSON schema, in words; None where nothing does.

    What only the type knows, such as its own validators, is left to it: it reads the data in the end.

    >>> misfit({"age": "old"}, {"type": "object", "properties": {"age": {"type": "integer"}}})
    "answer.age='old' has to be a whole number"
    """
    root = form if root is None else root
    form = referred(form, root)
    if choices := form.get("anyOf") or form.get("oneOf"):
        found = [misfit(value, choice, path, root) for choice in choices]
        if None not in found:
            return " or ".join(dict.fromkeys(text for text in found if text))
    for part in form.get("allOf", ()):
        if wrong := misfit(value, part, path, root):
            return wrong
    allowed = [form["const"]] if "const" in form else form.get("enum")
    if allowed is not None and not any(value == each and _alike(value, each) for each in allowed):
        return f"{path}={value!r} has to be one of {', '.join(map(repr, allowed))}"
    named = form.get("type", [])
    kinds = [_KINDS[name] for name in ([named] if isinstance(named, str) else named) if name in _KINDS]
    if kinds and not any(fits(value) for fits, _ in kinds):
        missing = f", with {', '.join(form['required'])}" if form.get("required") else ""
        return f"{path}={value!r} has to be {' or '.join(words for _, words in kinds)}{missing}"
    if isinstance(value, dict):
        return _misfit_object(value, form, path, root)
    if isinstance(value, list):
        return _misfit_list(value, form, path, root)
    if isinstance(value, str) and (wrong := _misfit_text(value, form, path)):
        return wrong
    return _misfit_size(value, form, path)


def _alike(value: Any, other: Any) -> bool:
    """Python takes True for 1, JSON does not."""
    return isinstance(value, bool) == isinstance(other, bool)


def _misfit_object(value: dict[str, Any], form: Mapping[str, Any], path: str, root: Mapping[str, Any]) -> str | None:
    properties, others = form.get("properties", {}), form.get("additionalProperties", {})
    patterns, names = form.get("patternProperties", {}), form.get("propertyNames")
    missing = [name for name in form.get("required", ()) if name not in value]
    if missing:
        return f"{path} lacks {', '.join(missing)}"
    if wrong := _misfit_count(len(value), form, path, "Properties"):
        return wrong
    for name, item in value.items():
        if isinstance(names, dict) and (wrong := misfit(name, names, f"{path}: the name ", root)):
            return wrong
        inner = properties.get(name)
        if inner is None:
            inner = next((each for pattern, each in patterns.items() if _matches(name, pattern)), others)
        if inner is False:
            return f"{path}.{name} is not asked for"
        if isinstance(inner, dict) and (wrong := misfit(item, inner, f"{path}.{name}", root)):
            return wrong
    return None


def _misfit_list(value: list[Any], form: Mapping[str, Any], path: str, root: Mapping[str, Any]) -> str | None:
    before, rest = form.get("prefixItems", []), form.get("items", {})
    # A set may be given with repetitions; what counts are its different items.
    count = len({json.dumps(item, sort_keys=True) for item in value}) if form.get("uniqueItems") else len(value)
    if wrong := _misfit_count(count, form, path, "Items"):
        return wrong
    for index, item in enumerate(value):
        inner = before[index] if index < len(before) else rest
        if isinstance(inner, dict) and (wrong := misfit(item, inner, f"{path}[{index}]", root)):
            return wrong
    return None


def _misfit_count(count: int, form: Mapping[str, Any], path: str, what: str) -> str | None:
    low, high = form.get(f"min{what}", 0), form.get(f"max{what}", count)
    words = "items" if what == "Items" else "entries"
    if count < low:
        return f"{path} has {count} {words} and needs at least {low}"
    if count > high:
        return f"{path} has {count} {words} and takes at most {high}"
    return None


# Texts that are read as something else, and what they are in words. The types themselves say what they take.
_READ: dict[str, tuple[Any, str]] = {
    "date": (dt.date, "a date such as 2026-01-31"),
    "date-time": (dt.datetime, "a date and time such as 2026-01-31T12:00:00Z"),
    "time": (dt.time, "a time such as 12:00:00"),
    "duration": (dt.timedelta, "a duration such as PT1H30M"),
    "uuid": (uuid.UUID, "a UUID"),
    "decimal": (decimal.Decimal, "a decimal number"),
    "ipv4": (ipaddress.IPv4Address, "an IPv4 address"),
    "ipv6": (ipaddress.IPv6Address, "an IPv6 address"),
}


def _misfit_text(value: str, form: Mapping[str, Any], path: str) -> str | None:
    known = _READ.get(str(form.get("format")))
    if known is not None:
        try:
            _cached(_reader, known[0]).validate_python(value)
        except ValueError:
            return f"{path}={value!r} has to be {known[1]}"
    pattern = form.get("pattern")
    if isinstance(pattern, str) and not _matches(value, pattern):
        return f"{path}={value!r} has to match {pattern}"
    return None


def _matches(value: str, pattern: str) -> bool:
    """By the engine that pydantic has; what only Python's knows (lookarounds) by that; what neither knows matches."""
    from pydantic import ValidationError
    from pydantic_core import SchemaError

    try:
        _pattern(pattern).validate_python(value)
    except ValidationError:
        return False
    except SchemaError:
        try:
            return re.search(pattern, value) is not None
        except re.error:
            return True
    return True


@functools.lru_cache(maxsize=256)
def _pattern(pattern: str) -> Any:
    from pydantic_core import SchemaValidator, core_schema

    return SchemaValidator(core_schema.str_schema(pattern=pattern))


def _misfit_size(value: Any, form: Mapping[str, Any], path: str) -> str | None:
    size: Any = value
    low, high, unit = "minimum", "maximum", ""
    if isinstance(value, str) and form.get("format") == "decimal":
        size = decimal.Decimal(value.strip())
    elif isinstance(value, str):
        size, low, high, unit = len(value), "minLength", "maxLength", " characters"
    if isinstance(size, bool) or not isinstance(size, int | float | decimal.Decimal):
        return None
    what = f"{path}={value!r} has to be"
    if low in form and size < form[low]:
        return f"{what} at least {form[low]}{unit}"
    if high in form and size > form[high]:
        return f"{what} at most {form[high]}{unit}"
    if unit:
        return None
    if "exclusiveMinimum" in form and not size > form["exclusiveMinimum"]:
        return f"{what} more than {form['exclusiveMinimum']}"
    if "exclusiveMaximum" in form and not size < form["exclusiveMaximum"]:
        return f"{what} less than {form['exclusiveMaximum']}"
    if form.get("multipleOf") and decimal.Decimal(str(size)) % decimal.Decimal(str(form["multipleOf"])):
        return f"{what} a multiple of {form['multipleOf']}"
    return None
