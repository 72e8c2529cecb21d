"""Values as they are meant, whoever sends them, and what is refused of them as one sentence."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import os
import re
import types
import typing
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

LARGEST = 1e30  # of numbers: squares of larger ones have no place in 32 bits


class UserError(Exception):
    """An error whose text is one sentence for the user; notebooks show it without a traceback.

    A word of more than 200 characters, such as a path, loses its middle.
    """

    def __init__(self, text: str) -> None:
        text = text.encode("utf-8", "backslashreplace").decode()  # of names that are no UTF-8
        text = re.sub(r"(\S{30})\S{160,}(\S{10})", r"\1…\2", text)
        super().__init__(text)

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError, ValueError):
    """A value that no run can be made from."""


class Values(BaseModel):
    """Frozen fields that are read as meant (`read`); what is refused is one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**{name: read(type(self), name, v) for name, v in values.items()})
        except ValidationError as error:
            raise ConfigError(_sentence(type(self), error)) from None


def quote(value: Any) -> str:
    """A value as Python writes it, its middle left out where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= 100 else f"{text[:70]} … {text[-20:]}"


def expand(path: str | Path) -> Path:
    """The path with the home folder for `~`; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


WORDS = {"none": None, "true": True, "yes": True, "on": True, "false": False, "no": False}
WORDS |= {"off": False}


# Digits with commas alone: a decimal comma, as in 0,05, or a list of two.
COMMA = re.compile(r"[+-]?\d+(,\d+)+(e[+-]?\d+)?", re.IGNORECASE)


def read(model: type[BaseModel], name: str, value: Any) -> Any:
    """A value as meant. Shells send text, papermill and YAML make of some of it a number, a list or
    None: one spelling means the same by all three ('8/255', 1e2, '[32 64]', 'null', 'true')."""
    plain = isinstance(value, str | int | float | None)
    return (_read_plain if plain else _read_value)(model, name, value)


def _read_value(model: type[BaseModel], name: str, value: Any) -> Any:
    field = model.model_fields.get(name)
    annotation: Any = field and field.annotation
    kinds = _kinds(annotation)
    items = _kinds(kinds[tuple][0]) if kinds.get(tuple) else kinds  # of what it has one or more
    is_list = isinstance(value, str) and tuple in kinds and float in items
    if is_list and any(map(COMMA.fullmatch, value.split())):
        raise ConfigError(
            f"{name} must be a list of numbers, and of {quote(value)} it is unclear whether the "
            f"comma is a decimal point: write 0.05 for one number, and '0, 5' for two."
        )
    value = _read(annotation, value) if field else value
    try:
        to_json(value)
    except (ValueError, RecursionError):  # other kinds, lone surrogates, hundreds of levels
        raise ConfigError(
            f"{name} must be text of Unicode, a number, or lists and pairs of them that JSON can "
            f"hold, and is {quote(value)}."
        ) from None
    if isinstance(value, str) and (len(value) > 1000 or {*value} & {"\0", "\n", "\r"}):
        raise ConfigError(
            f"{name} must be text of 1,000 characters at most, in one line, without NUL, and is "
            f"{quote(value)}."
        )
    numeric = not field or items.keys() & {int, float}  # else papermill made a number of a name
    for number in value if isinstance(value, tuple) else (value,):
        if numeric and isinstance(number, int | float) and LARGEST < abs(number) < math.inf:
            raise ConfigError(
                f"{name} must be between -{LARGEST:g} and {LARGEST:g}, and is {quote(number)}."
            )
    return value


# Of a grid's thousand configurations most values are the same.
_read_plain = functools.lru_cache(10_000, typed=True)(_read_value)


def _read(annotation: Any, value: Any) -> Any:
    if value == "" and Literal[""] in typing.get_args(annotation):  # which says something else
        return value
    kinds, text = _kinds(annotation), isinstance(value, str)
    word = value.strip() if text else ""
    empty = not word and (types.NoneType in kinds or not kinds.keys() & {str, tuple, dict})
    none = {"none"} if types.NoneType in kinds else set()  # else it may be a name: no adversary
    if text and (empty or word == "None" or word.lower() in {"null", *none}):
        return None
    if tuple in kinds:
        parts, item = _list(value), (*kinds[tuple], Any)[0]
        return tuple(_read(item, part) for part in parts) if isinstance(parts, tuple) else parts
    if dict in kinds:
        path = str in kinds and word.endswith((".yaml", ".yml"))  # which may hold a `=`
        return _pairs(value) if text and not path else value
    if text and str in kinds and int not in kinds:
        return value
    if text:
        value = _number(WORDS.get(word.lower(), value))
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and not kinds.keys() & {int, float}:  # a run named 2024
        return str(value) if str in kinds else value
    with contextlib.suppress(OverflowError):
        if whole and float in kinds:
            return float(value)
    if isinstance(value, float) and int in kinds and value.is_integer():  # 1e2
        return int(value)
    return value


@functools.cache
def _kinds(annotation: Any) -> dict[type, tuple[Any, ...]]:
    """The plain types that an annotation allows, with what it says of their parts: of
    `tuple[int, ...] | None` tuple with (int, ...), and NoneType."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {type(value): () for value in parts}
    if origin is Annotated:
        return _kinds(parts[0])
    if origin in (typing.Union, types.UnionType):
        return {kind: own for part in parts for kind, own in _kinds(part).items()}
    return {origin or annotation: parts}


def _number(value: Any) -> Any:
    """The number that a text stands for, else the value itself."""
    for kind in (int, float, lambda text: float(Fraction(text))):
        with contextlib.suppress(ValueError, ArithmeticError):
            return kind(value) if isinstance(value, str) else value
    return value


def _list(value: Any) -> Any:
    """A list as a tuple; so are '0.03, 8/255' and 0.1, as papermill sends lists."""
    if isinstance(value, str):
        parts = re.split(r"[,\s]+", value.strip("()[], "))
        return tuple(part.strip("'\"") for part in parts if part)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list | tuple) else value


def _pairs(text: str) -> dict[str, Any] | str:
    """A dict of JSON, of 'crop=0.5, color=1/2', or as Python prints it; else the text itself."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if isinstance(value := parse(text), dict):
                return value
    pairs = [part.partition("=") for part in re.split(r"[,\s]+", text.strip()) if part]
    values = {name: _number(value) for name, equals, value in pairs if equals}
    return values if len(values) == len(pairs) else text  # each name once


# What pydantic says in words of its own, by the type of its error.
RULES = {
    "list_type": "a list of values",
    "tuple_type": "a list of values",
    "int_type": "a whole number",
    "float_type": "a number (8/255 will do)",
    "too_short": "one value or more",
    "too_long": "a list of fewer values",
    "missing": "given in full",
    "dict_type": "pairs of name and value, each name once, as 'crop=0.5, color=0.5'",
    "bool_type": "True or False",
    "string_type": "text (papermill's -r keeps as text what looks like a number)",
}


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence with the field, the value and the rule."""
    errors = error.errors(include_url=False)
    first = errors[0]
    field = str(first["loc"][0]) if first["loc"] else model.__name__
    if first["type"] == "value_error":  # raised by our own code: a sentence already
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        owner, names = model.__qualname__.split(".")[0], ", ".join(model.model_fields)
        kind = "knob" if model.__qualname__.endswith(".Options") else "field"
        return f"{owner} has no {kind} {field!r}; its {kind}s are {names}."
    # Behind the field stands an entry's key or number; of a union the name of each kind.
    annotations: dict[str, Any] = {name: f.annotation for name, f in model.model_fields.items()}
    keyed = field in annotations and dict in _kinds(annotations[field])
    depth = 2 if keyed or any(isinstance(part, int) for part in first["loc"][1:2]) else 1
    own = [e for e in errors if e["loc"][:depth] == first["loc"][:depth]]
    rules = [
        RULES.get(e["type"], e["msg"].removeprefix("Input should be ").removeprefix("a valid "))
        for e in own
    ]
    place = "".join(f"[{part!r}]" for part in first["loc"][1:2] if keyed)
    rule = " or ".join(dict.fromkeys(rules))
    return f"{field}{place} must be {rule}, and is {quote(first['input'])}."
