"""What all configurations share: reading values as meant, presets, one-sentence errors."""

from __future__ import annotations

import ast
import contextlib
import html
import json
import re
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PRESETS = ("demo", "cifar10", "paper")

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# The default of a field that a preset governs: left out or None, it takes the preset's value.
PRESET: Any = Field(default=None)


class UserError(Exception):
    """An error whose text is one sentence for the user; notebooks show it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError, ValueError):
    """A value that no run can be made from."""


class Config(BaseModel):
    """What all stages share. Build it with keyword arguments; see the subclasses for the fields.

    Raises:
        ConfigError: one sentence naming the field, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stage: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    # Where and how it runs, not what comes out: these stay out of a run's identity.
    circumstances: ClassVar[frozenset[str]] = frozenset({"preset", "device", "tracker"})
    # Named by content instead (fingerprints and digests), so that a moved folder is the same run.
    pointers: ClassVar[frozenset[str]] = frozenset({"dataset", "vae", "run", "continue_from"})
    # Named in every run id, whether the preset sets them or not.
    principal: ClassVar[tuple[str, ...]] = ()

    preset: Literal["demo", "cifar10", "paper"] = "demo"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_sentence(type(self), error)) from None

    @model_validator(mode="before")
    @classmethod
    def _before(cls, values: dict[str, Any]) -> dict[str, Any]:
        return cls._resolve(values)

    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> dict[str, Any]:
        read = {name: cls._read(name, value) for name, value in values.items()}
        chosen = read.get("preset") or "demo"
        if chosen not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, and is {chosen!r}.")
        preset = dict(cls.presets.get(chosen, {}))
        given = {name: value for name, value in read.items() if value is not None}
        if (unknown := given.keys() - cls.model_fields.keys()) and (name := min(unknown)):
            raise ConfigError(f"{cls.__name__} has no field {name!r}{_closest(cls, name)}.")
        return cls._derive(preset | given, given)

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in what follows from other fields; `given` is what the caller set himself."""
        return values

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        """papermill and YAML hand over '8/255', '1e-3' and 'true' as text: read them as meant."""
        kinds = _kinds(cls, name)
        if tuple in kinds:
            return _numbers(value)
        if dict in kinds and isinstance(value, str):
            with contextlib.suppress(ValueError):
                return json.loads(value)
        if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
            return float(value)
        # A run or folder named 2024 comes from papermill as a number.
        if isinstance(value, int) and not isinstance(value, bool) and kinds == {str}:
            return str(value)
        if not isinstance(value, str) or str in kinds:
            return value
        text = value.strip()
        if text.lower() in ("none", "null", ""):
            return None
        if bool in kinds and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if int in kinds and re.fullmatch(r"[+-]?\d+", text):
            return int(text)  # not by way of a float, which holds 53 bits
        try:
            number = float(Fraction(text)) if "/" in text else float(text)
        except (ValueError, ZeroDivisionError):
            return value
        if int in kinds and number.is_integer():
            return int(number)
        return number if float in kinds else value

    @classmethod
    def from_notebook(cls, names: Mapping[str, Any]) -> typing.Self:
        """The configuration that a notebook's parameters describe; pass it `globals()`.

        papermill only warns about a name it does not know, so a misspelt `-p epsilom 0.1` would
        train with the default. The names assigned in the kernel's parameter cells (their first
        line starts with `# Parameters`, as papermill's own does) are checked here instead; names
        that later cells made are no parameters, so running the cell again still works.
        """
        for name in _parameter_names(names.get("In", [])):
            if name not in cls.model_fields:
                raise ConfigError(
                    f"This notebook has no parameter {name!r}{_closest(cls, name)}; "
                    f"its parameters are {', '.join(cls.model_fields)}."
                )
        return cls(**{name: names[name] for name in cls.model_fields if name in names})

    def changed(self) -> dict[str, Any]:
        """The fields whose values differ from what the preset gives beside `principal` ones."""
        principal = {name: getattr(self, name) for name in self.principal}
        plain = type(self)._resolve({"preset": self.preset, **principal})
        base = {
            name: plain.get(name, field.get_default(call_default_factory=True))
            for name, field in type(self).model_fields.items()
        }
        return {name: value for name, value in self if value != base[name]}

    def _repr_html_(self) -> str:
        """For notebooks: what differs from the preset, and all fields behind a click."""
        told = ", ".join(f"{name} = {value}" for name, value in self.changed().items())
        rows = "".join(f"<tr><td>{k}</td><td>{html.escape(str(v))}</td></tr>" for k, v in self)
        return (
            f"<details><summary>{type(self).__name__}, preset {self.preset}"
            f"{': ' + html.escape(told) if told else ''}</summary><table>{rows}</table></details>"
        )

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result and differ from their defaults, as JSON values: a field
        that is added later changes no id where it says what was done before."""
        values = self.model_dump(mode="json", exclude=set(self.circumstances | self.pointers))
        defaults = type(self).model_fields
        return {k: v for k, v in values.items() if getattr(self, k) != defaults[k].default}


def _kinds(config: type[Config], name: str) -> set[type]:
    """The plain types that a field accepts (None and the containers of its annotation apart)."""
    if name not in config.model_fields:
        return set()

    def unfold(kind: Any) -> set[type]:
        origin = typing.get_origin(kind)
        if origin in (typing.Union, types.UnionType):
            return set().union(*map(unfold, typing.get_args(kind)))
        if origin is Annotated:
            return unfold(typing.get_args(kind)[0])
        if origin is Literal:
            return {type(value) for value in typing.get_args(kind)}
        return {origin or kind} - {types.NoneType}

    return unfold(config.model_fields[name].annotation)


def _numbers(value: Any) -> Any:
    """A list as a tuple; so are '0.03, 8/255' and 0.1, as papermill hands lists over."""
    if isinstance(value, str):
        value = [part for part in re.split(r"[,\s]+", value.strip("()[] ")) if part]
        with contextlib.suppress(ValueError, ZeroDivisionError):
            fractions = [Fraction(part) for part in value]
            whole = all(f.denominator == 1 for f in fractions)
            return tuple(int(f) if whole else float(f) for f in fractions)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list | tuple) else value


def _sentence(config: type[Config], error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence with the field, the value and the rule."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else config.__name__
    rule = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if first["type"] == "value_error":  # raised by our own code: a sentence already
        return str(first["ctx"]["error"])
    if first["type"] in ("float_type", "int_type"):
        kind = "a whole number" if first["type"] == "int_type" else "a number (8/255 will do)"
        rule = kind
    return f"{field} must be {rule}, and is {first['input']!r}."


def _closest(config: type[Config], name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, config.model_fields, n=1)
    return f"; did you mean {near[0]!r}" if near else ""


def _parameter_names(cells: list[str]) -> list[str]:
    """Names assigned in the parameter cells among a kernel's executed `cells` (IPython's `In`)."""
    latest = {}  # by first line: a corrected cell that ran again replaces the one before
    for cell in cells:
        first = cell.split("\n", 1)[0]
        if first.startswith("# Parameters"):
            latest[first] = cell
    names = []
    for cell in latest.values():
        for node in ast.parse(cell).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names
