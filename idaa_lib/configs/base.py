"""What all configurations share: reading values as meant, recipes, knobs of a choice, errors."""

from __future__ import annotations

import ast
import contextlib
import html
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from idaa_lib.registry import CHOICES

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # what torch's generators take
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

UNKNOWN = "unknown"
# What the published code calls a field, and what to write here (docs/official.md).
OFFICIAL = {
    "adv": "adversary=idaa",
    "amp": "precision=bf16",
    "batch_t": "temperature",
    "eps": "epsilon",
    "gpu": "device",
    "kl": "kappa",
    "low_dim": "projection_dim",
    "lr": "learning_rate",
    "mode": "augmentation",
    "resnet": "backbone",
    "vae_path": "vae=<id of the run that `python -m idaa_lib import` makes of the file>",
}

# The default of a field that a recipe governs: left out or None, it takes the recipe's value.
RECIPE: Any = Field(default=None)


class UserError(Exception):
    """An error whose text is one sentence for the user; notebooks show it without a traceback."""

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


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Field → what it means: the sentences behind `field:` in the docstring of its class, or of a
    base. Fields before one colon, as in `mean, std: …`, share them."""
    texts: dict[str, str] = {}
    name = f"(?:{'|'.join(model.model_fields)})"
    heads = re.compile(rf"(?:^|(?<=[.):] ))({name}(?:, {name})*): ")
    for kind in reversed(model.__mro__):
        about = " ".join((vars(kind).get("__doc__") or "").partition("Raises:")[0].split())
        _, *parts = heads.split(about)
        for head, text in zip(parts[::2], parts[1::2], strict=True):
            texts |= dict.fromkeys(head.split(", "), text.strip())
    return texts


class Options(Values):
    """The knobs of one method or one adversary: annotated fields with defaults, as in `power: float
    = 1.0`, with a range `Annotated[float, Field(ge=0)]` (pydantic's). Their names must not be those
    of the stage's fields."""


class Config(Values):
    """What all stages share. Build it with keyword arguments; see the subclasses for the fields.

    A name is looked up in the stage's fields, then in the knobs (`Options`) of the chosen method,
    then of the chosen adversary; all of them are attributes of the configuration.

    Fields:
        preset: the recipe, by its name or the path of a TOML file, whose values fields take that
            are left out or None. device: auto, cpu, cuda or mps.

    Raises:
        ConfigError: one sentence naming the field, the value and what is allowed.
    """

    model_config = ConfigDict(validate_default=True)

    stage: ClassVar[str]
    choices: ClassVar[tuple[str, ...]] = ()  # of CHOICES, those that the stage has
    # Where and how it runs, not what comes out: these stay out of a run's identity.
    circumstances: ClassVar[frozenset[str]] = frozenset({"preset", "device", "tracker"})
    # Named by content instead (fingerprints and digests), so that a moved folder is the same run.
    pointers: ClassVar[frozenset[str]] = frozenset(
        {"dataset", "classes", "on_error", "gray_bits", "vae", "run", "continue_from"}
    )
    # Where recipes named `preset` lie.
    recipes: ClassVar[Path] = Path(__file__).resolve().parent.parent / "recipes"
    # Named in every run id, whether the recipe sets them or not.
    principal: ClassVar[tuple[str, ...]] = ()
    # Of a run that was imported: names whose values neither its file nor the user states.
    unknown: ClassVar[frozenset[str]] = frozenset()

    preset: str = "demo"

    _options: tuple[Options, ...] = PrivateAttr(default=())

    def __init__(self, **values: Any) -> None:
        from idaa_lib.configs.recipes import recipe_values

        explicit = {name: self._read(name, value) for name, value in values.items()}
        explicit = {name: value for name, value in explicit.items() if value is not None}
        merged = recipe_values(type(self), explicit) | explicit
        chosen = {c: merged.get(c, type(self).model_fields[c].default) for c in self.choices}
        models = [self._choose(*choice).Options for choice in chosen.items()]
        self._check_names(explicit, chosen, models)
        self._fill(merged, models)
        self.__dict__.update(self._derive(explicit))

    @classmethod
    def restore(cls, values: Mapping[str, Any], unknown: Iterable[str] = ()) -> typing.Self:
        """The configuration that `model_dump` gave as JSON, whatever became of its recipe since.

        Of a method or adversary that this process has not imported, the knobs are left out.
        unknown: names whose values are the recipe's because nobody knows them (`stated`).

        Raises:
            ConfigError: a name that there is no longer.
        """
        values = {name: cls._read(name, value) for name, value in values.items()}
        chosen = {choice: values.get(choice) for choice in cls.choices}
        kinds = [cls.registered(choice).get(str(name)) for choice, name in chosen.items()]
        models = [kind.Options if kind else Options for kind in kinds]
        if all(kinds):
            cls._check_names(values, chosen, models)
        config = cls.__new__(cls)
        config._fill(values, models)
        config.__dict__["unknown"] = frozenset(unknown)  # no field: it is of no run's identity
        return config

    def _fill(self, values: Mapping[str, Any], models: Iterable[type[Options]]) -> None:
        def of(model: type[Values]) -> dict[str, Any]:
            return {name: values[name] for name in model.model_fields if name in values}

        super().__init__(**of(type(self)))
        self._options = tuple(model(**of(model)) for model in models)

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        """Values that follow from other fields; `explicit` is what the caller set himself."""
        return {}

    @classmethod
    def registered(cls, choice: str) -> dict[str, Any]:
        """The classes that a stage's `method` or `adversary` may name."""
        kinds = CHOICES[choice].items()
        return {
            name: kind for name, kind in kinds if getattr(kind, "stage", cls.stage) == cls.stage
        }

    @classmethod
    def _choose(cls, choice: str, name: str) -> Any:
        kinds = cls.registered(choice)
        if name not in kinds:
            raise ConfigError(
                f"{choice} must be one of {', '.join(kinds)}, and is {name!r} (your own: import "
                f"the module that registers it first)."
            )
        return kinds[name]

    @classmethod
    def _check_names(
        cls, explicit: Mapping[str, Any], chosen: Mapping[str, Any], models: Iterable[type[Options]]
    ) -> None:
        """Each name has one owner: the stage, the method or the adversary."""
        owners = dict.fromkeys(cls.model_fields, cls.__name__)
        for (choice, value), model in zip(chosen.items(), models, strict=True):
            for name in model.model_fields:
                if name in owners:
                    raise ConfigError(
                        f"{choice}={value!r} has a knob {name!r}, which is a name of "
                        f"{owners[name]} too: rename the knob."
                    )
            owners |= dict.fromkeys(model.model_fields, f"{choice}={value!r}")
        for name in sorted(explicit.keys() - owners.keys()):
            for choice, value in chosen.items():
                kinds = cls.registered(choice).items()
                others = [repr(k) for k, kind in kinds if name in kind.Options.model_fields]
                if others:
                    raise ConfigError(
                        f"{name} is a knob of {choice}={' or '.join(others)}, and {choice} is "
                        f"{value!r}: leave it out."
                    )
            raise ConfigError(f"{cls.__name__} has no field {name!r}{cls._closest(name)}.")

    @classmethod
    def _owner(cls, name: str) -> type[Values] | None:
        """The first model that has this name: the stage's own, or a registered choice's options."""
        if name in cls.model_fields:
            return cls
        kinds = (kind for choice in cls.choices for kind in cls.registered(choice).values())
        return next((kind.Options for kind in kinds if name in kind.Options.model_fields), None)

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        model = cls._owner(name)
        return read(model, name, value) if model else value

    @classmethod
    def _closest(cls, name: str) -> str:
        ours = OFFICIAL.get(name, "")
        if ours and cls._owner(ours.partition("=")[0]):
            return f"; the published code's {name} is {ours} here"
        near = get_close_matches(name, cls._names(), n=1)
        return f"; did you mean {near[0]!r}" if near else ""

    @classmethod
    def _names(cls) -> list[str]:
        return [row["name"] for row in cls.fields()]

    @classmethod
    def fields(cls) -> list[dict[str, Any]]:
        """A row for each name that a configuration of the stage may set: its fields, then its
        knobs. Each has the default (None: the recipe's) and what the name means."""
        own, texts = cls.model_fields.items(), meanings(cls)
        rows = [
            {"name": name, "of": "all", "default": field.default, "meaning": texts.get(name, "")}
            for name, field in own
        ]
        return rows + [{"name": row.pop("knob")} | row for row in cls.knobs()]

    @classmethod
    def knobs(cls) -> list[dict[str, Any]]:
        """A row for each knob of each registered choice: of what it is, its default and meaning."""
        return [
            {"knob": name, "of": f"{choice} = {value}", "default": field.default}
            | {"meaning": meanings(kind.Options).get(name, "")}
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
        return self._choose(choice, getattr(self, choice))

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
        that later cells assigned are no parameters, so running the cell again still works. In a
        script, or without such a cell, each name that is a field or a knob counts.
        """
        cells = [cell for cell in names.get("In", []) if cell.startswith("# Parameters")]
        latest = {cell.partition("\n")[0]: cell for cell in cells}  # of a cell that ran again
        nodes = [node for cell in latest.values() for node in ast.walk(ast.parse(cell))]
        variables = [node for node in nodes if isinstance(node, ast.Name)]
        parameters = [node.id for node in variables if isinstance(node.ctx, ast.Store)]
        for name in parameters:
            if cls._owner(name) is None:
                also = f", and the knobs of the chosen {' and '.join(cls.choices)}"
                raise ConfigError(
                    f"This notebook has no parameter {name!r}{cls._closest(name)}; its parameters "
                    f"are {', '.join(cls.model_fields)}{also if cls.choices else ''}."
                )
        if not cells:
            parameters = cls._names()
        return cls(**{name: names[name] for name in parameters if name in names})

    def changed(self) -> dict[str, Any]:
        """The names whose values differ from what the recipe gives beside `principal` ones."""
        principal = {name: getattr(self, name) for name in self.principal}
        plain: dict[str, Any] = {}
        with contextlib.suppress(ConfigError):  # the recipe is gone
            plain = dict(type(self)(preset=self.preset, **principal))
        return {
            name: value
            for name, value in self
            if name not in self.unknown and value != plain.get(name)
        }

    def stated(self) -> dict[str, Any]:
        """Name → value, or UNKNOWN where nobody knows it: for people."""
        return {name: UNKNOWN if name in self.unknown else value for name, value in self}

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values: names whose values are not their defaults.

        A field that is added later with a neutral default changes nothing here. Device and pointers
        are left out: what they name is named by its content.
        """
        values = self.model_dump(mode="json")
        models = [type(model).model_fields for model in (self, *self._options)]
        defaults = {name: field.default for fields in models for name, field in fields.items()}
        silent = self.circumstances | self.pointers
        return {
            name: values[name]
            for name, value in self
            if name not in silent and value != defaults[name]
        }

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.stated().items())

    def _repr_html_(self) -> str:
        """For notebooks: what differs from the recipe; behind a click all values and meanings."""
        changes = ", ".join(f"{name} = {value}" for name, value in self.changed().items())
        texts = {k: v for model in (self, *self._options) for k, v in meanings(type(model)).items()}
        values = self.stated().items()
        lines = ((k, html.escape(str(v)), html.escape(texts.get(k, ""))) for k, v in values)
        rows = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in lines)
        return (
            f"<details><summary>{type(self).__name__}, preset {html.escape(self.preset)}"
            f"{': ' + html.escape(changes) if changes else ''}</summary><table>{rows}</table>"
            f"</details>"
        )


class ImagesConfig(Config):
    """What the stages share that read images.

    Fields:
        on_error: `skip` leaves images that cannot be read out, and counts them (None: `raise`).
        gray_bits: that grey images in 16-bit files use, such as 12 of many microscopes (None: 16).
    """

    on_error: Literal["raise", "skip"] | None = None
    gray_bits: Annotated[int, Field(ge=1, le=16)] | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """The fields that say how images are read, where they are set: arguments of `load`."""
        values = {name: getattr(self, name, None) for name in ("classes", "on_error", "gray_bits")}
        return {name: value for name, value in values.items() if value is not None}


WORDS = {"none": None, "true": True, "yes": True, "on": True, "false": False, "no": False}
WORDS |= {"off": False}


def read(model: type[BaseModel], name: str, value: Any) -> Any:
    """A value as meant. Shells send text, papermill and YAML make of some of it a number, a list or
    None: one spelling means the same by all three ('8/255', 1e2, '[32 64]', 'null', 'true')."""
    field = model.model_fields.get(name)
    return _read(field.annotation, value) if field else value


def _read(annotation: Any, value: Any) -> Any:
    if value == "" and Literal[""] in typing.get_args(annotation):  # which says something else
        return value
    kinds, text = _kinds(annotation), isinstance(value, str)
    word = value.strip() if text else ""
    empty = not word and (types.NoneType in kinds or not kinds & {str, tuple, dict})
    none = {"none"} if types.NoneType in kinds else set()  # else it may be a name: no adversary
    if text and (empty or word == "None" or word.lower() in {"null", *none}):
        return None
    if tuple in kinds:
        parts, item = _list(value), _item(annotation)
        return tuple(_read(item, part) for part in parts) if isinstance(parts, tuple) else parts
    if dict in kinds:
        with contextlib.suppress(ValueError):
            return json.loads(value) if text else value
        return _pairs(value)
    if text and str in kinds and int not in kinds:
        return value
    if text:
        value = _number(WORDS.get(word.lower(), value))
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and not kinds & {int, float}:  # a run named 2024
        return str(value) if str in kinds else value
    with contextlib.suppress(OverflowError):
        if whole and float in kinds:
            return float(value)
    if isinstance(value, float) and int in kinds and value.is_integer():  # 1e2
        return int(value)
    return value


def _kinds(annotation: Any) -> set[type]:
    """The plain types that an annotation allows: tuple and NoneType of `tuple[int, ...] | None`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {type(value) for value in parts}
    if origin is Annotated:
        return _kinds(parts[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, parts))
    return {origin or annotation}


def _item(annotation: Any) -> Any:
    """What a list's annotation says of its items: int of `tuple[int, ...] | None`."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return parts[0]
    return next((item for part in parts if (item := _item(part)) is not None), None)


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
    """A dict of 'crop=0.5, color=1/2', or of one as Python prints it; the text itself where it is
    none."""
    with contextlib.suppress(ValueError, SyntaxError):
        if isinstance(value := ast.literal_eval(text), dict):
            return value
    pairs = [part.partition("=") for part in re.split(r"[,\s]+", text.strip()) if part]
    if not all(equals for _, equals, _ in pairs):
        return text
    return {name: _number(value) for name, _, value in pairs}


# What pydantic says in words of its own, by the type of its error.
RULES = {
    "list_type": "a list of values",
    "int_type": "a whole number",
    "float_type": "a number (8/255 will do)",
    "too_short": "one value or more",
    "dict_type": "pairs of name and value, as 'crop=0.5, color=0.5'",
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
        return f"{owner} has no knob {field!r}; its knobs are {names}."
    # Behind the field stands an entry's key or number; of a union the name of each kind.
    keyed = field in model.model_fields and dict in _kinds(model.model_fields[field].annotation)
    depth = 2 if keyed or any(isinstance(part, int) for part in first["loc"][1:2]) else 1
    own = [e for e in errors if e["loc"][:depth] == first["loc"][:depth]]
    rules = [
        RULES.get(e["type"], e["msg"].removeprefix("Input should be ").removeprefix("a valid "))
        for e in own
    ]
    place = "".join(f"[{part!r}]" for part in first["loc"][1:2] if keyed)
    rule = " or ".join(dict.fromkeys(rules))
    return f"{field}{place} must be {rule}, and is {first['input']!r}."
