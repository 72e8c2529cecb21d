"""What all configurations share: reading values as meant, recipes, knobs of a choice, errors."""

from __future__ import annotations

import ast
import contextlib
import html
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from idaa_lib.registry import CHOICES

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

# The default of a field that a recipe governs: left out or None, it takes the recipe's value.
RECIPE: Any = Field(default=None)


class UserError(Exception):
    """An error whose text is one sentence for the user; notebooks show it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError, ValueError):
    """A value that no run can be made from."""


class Options(BaseModel):
    """The knobs of one method or one adversary: annotated fields with defaults, as in `power: float
    = 1.0`, with a range `Annotated[float, Field(ge=0)]` (pydantic's). Their names must not be those
    of the stage's fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**{name: read(type(self), name, v) for name, v in values.items()})
        except ValidationError as error:
            raise ConfigError(_sentence(type(self), error)) from None


class Config(BaseModel):
    """What all stages share. Build it with keyword arguments; see the subclasses for the fields.

    A name is looked up in the stage's fields, then in the knobs (`Options`) of the chosen method,
    then of the chosen adversary; all of them are attributes of the configuration. Fields that are
    left out or None take the value of the recipe `preset` (a name, or the path of a TOML file).

    Raises:
        ConfigError: one sentence naming the field, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stage: ClassVar[str]
    choices: ClassVar[tuple[str, ...]] = ()  # of CHOICES, those that the stage has
    # Where and how it runs, not what comes out: these stay out of a run's identity.
    circumstances: ClassVar[frozenset[str]] = frozenset({"preset", "device", "tracker"})
    # Named by content instead (fingerprints and digests), so that a moved folder is the same run.
    pointers: ClassVar[frozenset[str]] = frozenset({"dataset", "vae", "run", "continue_from"})
    # Where recipes named `preset` lie.
    recipes: ClassVar[Path] = Path(__file__).resolve().parent.parent / "recipes"
    # Named in every run id, whether the recipe sets them or not.
    principal: ClassVar[tuple[str, ...]] = ()

    preset: str = "demo"

    _options: tuple[Options, ...] = PrivateAttr(default=())

    def __init__(self, **values: Any) -> None:
        fields, options = self._resolve(values)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_sentence(type(self), error)) from None
        self._options = options

    @classmethod
    def _resolve(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Options, ...]]:
        """Values of the fields, and the options of each choice, from what the caller gives."""
        from idaa_lib.configs.recipes import recipe_values

        explicit = {name: cls._read(name, value) for name, value in values.items()}
        explicit = {name: value for name, value in explicit.items() if value is not None}
        preset = explicit.setdefault("preset", "demo")
        merged = recipe_values(cls, preset, explicit) | explicit
        kinds = {choice: cls._choose(choice, merged) for choice in cls.choices}
        models = {choice: kind.Options for choice, kind in kinds.items()}
        cls._refuse_clash(models, merged)
        cls._refuse_unknown(explicit, models)
        merged = cls._derive(merged, explicit)
        own = cls.model_fields.keys()
        options = tuple(
            model(**{k: v for k, v in merged.items() if k in model.model_fields.keys() - own})
            for model in models.values()
        )
        return {name: value for name, value in merged.items() if name in own}, options

    @classmethod
    def restore(cls, values: Mapping[str, Any]) -> typing.Self:
        """The configuration that `model_dump` gave as JSON, whatever became of its recipe since.

        Of a method or adversary that this process has not imported, the knobs are left out.

        Raises:
            ConfigError: a name that there is no longer.
        """
        values = {name: cls._read(name, value) for name, value in values.items()}
        kinds = {
            choice: cls.registered(choice).get(str(values.get(choice))) for choice in cls.choices
        }
        models = {choice: kind.Options if kind else Options for choice, kind in kinds.items()}
        if all(kinds.values()):
            cls._refuse_unknown(values, models)
        own = cls.model_fields.keys()
        config = cls.model_construct(**{k: v for k, v in values.items() if k in own})
        config._options = tuple(
            model(**{k: v for k, v in values.items() if k in model.model_fields.keys() - own})
            for model in models.values()
        )
        return config

    @classmethod
    def registered(cls, choice: str) -> dict[str, Any]:
        """The classes that a stage's `method` or `adversary` may name."""
        kinds = CHOICES[choice].items()
        return {
            name: kind for name, kind in kinds if getattr(kind, "stage", cls.stage) == cls.stage
        }

    @classmethod
    def _choose(cls, choice: str, values: Mapping[str, Any]) -> Any:
        name, kinds = values.get(choice, cls.model_fields[choice].default), cls.registered(choice)
        if name not in kinds:
            raise ConfigError(
                f"{choice} must be one of {', '.join(kinds)}, and is {name!r} (your own: import "
                f"the module that registers it first)."
            )
        return kinds[name]

    @classmethod
    def _refuse_clash(cls, models: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Each name has one owner: the stage, the method or the adversary."""
        owners = dict.fromkeys(cls.model_fields, cls.__name__)
        for choice, model in models.items():
            for name in model.model_fields:
                if name in owners:
                    raise ConfigError(
                        f"{choice}={values.get(choice)!r} has a knob {name!r}, which is a name of "
                        f"{owners[name]} too: rename the knob."
                    )
            owners |= dict.fromkeys(model.model_fields, f"{choice}={values.get(choice)!r}")

    @classmethod
    def _refuse_unknown(cls, explicit: Mapping[str, Any], models: Mapping[str, Any]) -> None:
        names = cls.model_fields.keys() | {n for m in models.values() for n in m.model_fields}
        for name in sorted(explicit.keys() - names):
            for choice in cls.choices:
                kinds = cls.registered(choice).items()
                owners = [repr(k) for k, kind in kinds if name in kind.Options.model_fields]
                if owners:
                    value = explicit.get(choice, cls.model_fields[choice].default)
                    raise ConfigError(
                        f"{name} is a knob of {choice}={' or '.join(owners)}, and {choice} is "
                        f"{value!r}: leave it out."
                    )
            near = _closest(names | {row["knob"] for row in cls.knobs()}, name)
            raise ConfigError(f"{cls.__name__} has no field {name!r}{near}.")

    @classmethod
    def _derive(cls, values: dict[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in what follows from other fields; `explicit` is what the caller set himself."""
        return values

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        for model in (cls, *cls._knobs(name)):
            if name in model.model_fields:
                return read(model, name, value)
        return value

    @classmethod
    def _knobs(cls, name: str) -> list[type[Options]]:
        """The options of all registered choices of this stage that have a knob of this name."""
        kinds = (kind for choice in cls.choices for kind in cls.registered(choice).values())
        return [kind.Options for kind in kinds if name in kind.Options.model_fields]

    @classmethod
    def knobs(cls) -> list[dict[str, Any]]:
        """A row for each knob of each registered choice: its name, what it is of, its default."""
        return [
            {"knob": name, "of": f"{choice} = {value}", "default": field.default}
            for choice in cls.choices
            for value, kind in cls.registered(choice).items()
            for name, field in kind.Options.model_fields.items()
        ]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for options in self._options:
                if name in type(options).model_fields:
                    return getattr(options, name)
        return super().__getattr__(name)  # type: ignore[misc]

    def __iter__(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        """All names with their values: fields, then the knobs of each choice."""
        for model in (self, *self._options):
            for name in type(model).model_fields:
                yield name, getattr(model, name)

    def options(self, choice: str) -> Any:
        """The options of the chosen `method` or `adversary`."""
        return self._options[self.choices.index(choice)]

    def chosen(self, choice: str) -> Any:
        """The registered class that `method` or `adversary` names."""
        return self._choose(choice, dict(self))

    def replace(self, **values: Any) -> typing.Self:
        """The same configuration with other values; knobs of a choice that changes are dropped."""
        kept = dict(self)
        for choice, options in zip(self.choices, self._options, strict=True):
            if values.get(choice, getattr(self, choice)) != getattr(self, choice):
                kept = {k: v for k, v in kept.items() if k not in type(options).model_fields}
        return type(self)(**kept | values)

    def model_copy(self, *, update: Any = None, deep: bool = False) -> typing.Self:
        return self.replace(**update) if update else super().model_copy(deep=deep)

    def model_dump(self, **how: Any) -> dict[str, Any]:
        """The flat values, fields and knobs alike; arguments as pydantic's."""
        values = super().model_dump(**how)
        for options in self._options:
            values |= options.model_dump(**how)
        return values

    @classmethod
    def from_notebook(cls, names: Mapping[str, Any]) -> typing.Self:
        """The configuration that a notebook's parameters describe; pass it `globals()`.

        papermill only warns about a name it does not know, so a misspelt `-p epsilom 0.1` would
        train with the default. The names assigned in the kernel's parameter cells (their first
        line starts with `# Parameters`, as papermill's own does) are checked here instead; names
        that later cells assigned are no parameters, so running the cell again still works.
        """
        parameters = _parameter_names(names.get("In", []))
        knobs = {row["knob"] for row in cls.knobs()}
        for name in parameters:
            if name not in cls.model_fields and name not in knobs:
                near = _closest({*cls.model_fields, *knobs}, name)
                also = f", and the knobs of the chosen {' and '.join(cls.choices)}" if knobs else ""
                raise ConfigError(
                    f"This notebook has no parameter {name!r}{near}; its parameters are "
                    f"{', '.join(cls.model_fields)}{also}."
                )
        names = {name: names[name] for name in {*cls.model_fields, *parameters} if name in names}
        return cls(**names)

    def changed(self) -> dict[str, Any]:
        """The names whose values differ from what the recipe gives beside `principal` ones."""
        principal = {name: getattr(self, name) for name in self.principal}
        plain: dict[str, Any] = {}
        with contextlib.suppress(ConfigError):  # the recipe is gone
            plain = dict(type(self)(preset=self.preset, **principal))
        return {name: value for name, value in self if value != plain.get(name)}

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values: names whose values are not their defaults.

        A field that is added later with a neutral default changes nothing here. Device and pointers
        are left out: what they name is named by its content.
        """
        values = self.model_dump(mode="json")
        fields = [(type(m).model_fields, m) for m in (self, *self._options)]
        defaults = {n: f.get_default() for names, _ in fields for n, f in names.items()}
        silent = self.circumstances | self.pointers
        return {
            name: values[name]
            for name, value in self
            if name not in silent and value != defaults[name]
        }

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        return iter(self)

    def _repr_html_(self) -> str:
        """For notebooks: what differs from the recipe, and all values behind a click."""
        changes = ", ".join(f"{name} = {value}" for name, value in self.changed().items())
        rows = "".join(f"<tr><td>{k}</td><td>{html.escape(str(v))}</td></tr>" for k, v in self)
        return (
            f"<details><summary>{type(self).__name__}, preset {html.escape(self.preset)}"
            f"{': ' + html.escape(changes) if changes else ''}</summary><table>{rows}</table>"
            f"</details>"
        )


def read(model: type[BaseModel], name: str, value: Any) -> Any:
    """A value as meant: papermill and YAML send '8/255', '1e-3' and 'true' as text."""
    kinds = _kinds(model, name)
    if tuple in kinds:
        # "" is an empty list, and "none" the name of an adversary.
        return None if value in ("None", None) else _numbers(value)
    if dict in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if float in kinds:
            return float(value)
        return str(value) if kinds == {str} else value  # a run named 2024 comes as a number
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("none", "null", "") and str not in kinds:
        return None
    if str in kinds:
        return value
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


def _kinds(model: type[BaseModel], name: str) -> set[type]:
    """The plain types that a field accepts (None and the containers of its annotation apart)."""

    def unfold(kind: Any) -> set[type]:
        origin = typing.get_origin(kind)
        if origin in (typing.Union, types.UnionType):
            return set().union(*map(unfold, typing.get_args(kind)))
        if origin is Annotated:
            return unfold(typing.get_args(kind)[0])
        if origin is Literal:
            return {type(value) for value in typing.get_args(kind)}
        return {origin or kind} - {types.NoneType}

    field = model.model_fields.get(name)
    return unfold(field.annotation) if field else set()


def _numbers(value: Any) -> Any:
    """A list as a tuple; so are '0.03, 8/255' and 0.1, as papermill sends lists."""
    if isinstance(value, str):
        value = [part for part in re.split(r"[,\s]+", value.strip("()[] ")) if part]
        with contextlib.suppress(ValueError, ZeroDivisionError):
            fractions = [Fraction(part) for part in value]
            whole = all(f.denominator == 1 for f in fractions)
            return tuple(int(f) if whole else float(f) for f in fractions)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list | tuple) else value


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence with the field, the value and the rule."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else model.__name__
    rule = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if first["type"] == "value_error":  # raised by our own code: a sentence already
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        owner, names = model.__qualname__.split(".")[0], ", ".join(model.model_fields)
        return f"{owner} has no knob {field!r}; its knobs are {names}."
    if first["type"] == "int_type":
        rule = "a whole number"
    if first["type"] == "float_type":
        rule = "a number (8/255 will do)"
    return f"{field} must be {rule}, and is {first['input']!r}."


def _closest(names: typing.Iterable[str], name: str) -> str:
    near = get_close_matches(name, names, n=1)
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
