"""What all configurations share: reading values as meant, recipes, knobs of a choice, errors."""

from __future__ import annotations

import ast
import contextlib
import html
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from idaa_lib.configs.lookups import once
from idaa_lib.configs.reading import ConfigError, Values, quote, read
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
    "model_dir": "the variable IDAA_OUTPUTS",
    "resnet": "backbone",
    "save_dir": "the variable IDAA_OUTPUTS",
    "vae_path": "vae=<id of the run that `python -m idaa_lib import` makes of the file>",
}

# The default of a field that a recipe governs: left out or None, it takes the recipe's value.
RECIPE: Any = Field(default=None)


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
    # A run's id has a hash of what these point to, not the path: a moved folder is the same run.
    pointers: ClassVar[frozenset[str]] = frozenset(
        {"dataset", "classes", "on_error", "gray_bits", "streamed", "vae", "run", "continue_from"}
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
        choices = {c: merged.get(c, type(self).model_fields[c].default) for c in self.choices}
        models = [self._choose(*choice).Options for choice in choices.items()]
        self._check_names(explicit, choices, models)
        self._fill(merged, models)
        self.__dict__.update(self._derive(explicit))

    @classmethod
    def restore(cls, values: Mapping[str, Any], unknown: Iterable[str] = ()) -> typing.Self:
        """The configuration that `model_dump` gave as JSON, whatever became of its recipe since.

        Of a method or adversary that this process has not imported, the knobs are left out.
        unknown: names whose values are the recipe's because nobody knows them (`list_stated`).

        Raises:
            ConfigError: a name that there is no longer.
        """
        choices = {choice: values.get(choice) for choice in cls.choices}
        kinds = [cls.list_kinds(choice).get(str(name)) for choice, name in choices.items()]
        models = [kind.Options if kind else Options for kind in kinds]
        if all(kinds):
            cls._check_names(values, choices, models)
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
    def list_kinds(cls, choice: str) -> dict[str, Any]:
        """The classes that a stage's `method`, `adversary` or `backbone` may name."""
        kinds = CHOICES[choice].items()
        return {
            name: kind for name, kind in kinds if getattr(kind, "stage", cls.stage) == cls.stage
        }

    @classmethod
    def _choose(cls, choice: str, name: str) -> Any:
        kinds = cls.list_kinds(choice)
        if not isinstance(name, str) or name not in kinds:
            raise ConfigError(
                f"{choice} must be one of {', '.join(kinds)}, and is {quote(name)} (your own: "
                f"import the module that registers it first)."
            )
        return kinds[name]

    @classmethod
    def _check_names(
        cls,
        explicit: Mapping[str, Any],
        choices: Mapping[str, Any],
        models: Iterable[type[Options]],
    ) -> None:
        """Each name has one owner: the stage, the method or the adversary."""
        owners = dict.fromkeys(cls.model_fields, cls.__name__)
        for (choice, value), model in zip(choices.items(), models, strict=True):
            for name in model.model_fields:
                if name in owners:
                    raise ConfigError(
                        f"{choice}={value!r} has a knob {name!r}, which is a name of "
                        f"{owners[name]} too: rename the knob."
                    )
            owners |= dict.fromkeys(model.model_fields, f"{choice}={value!r}")
        for name in sorted(explicit.keys() - owners.keys()):
            for choice, value in choices.items():
                kinds = cls.list_kinds(choice).items()
                others = [repr(k) for k, kind in kinds if name in kind.Options.model_fields]
                if others:
                    raise ConfigError(
                        f"{name} is a knob of {choice}={' or '.join(others)}, and {choice} is "
                        f"{value!r}: leave it out."
                    )
            raise ConfigError(f"{cls.__name__} has no field {quote(name)}{cls._closest(name)}.")

    @classmethod
    def _owner(cls, name: str) -> type[Values] | None:
        """The first model that has this name: the stage's own, or a registered choice's options."""
        if name in cls.model_fields:
            return cls
        kinds = (kind for choice in cls.choices for kind in cls.list_kinds(choice).values())
        return next((kind.Options for kind in kinds if name in kind.Options.model_fields), None)

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        model = cls._owner(name)
        return read(model, name, value) if model else value

    @classmethod
    def _closest(cls, name: str) -> str:
        ours = OFFICIAL.get(name.replace("-", "_"), "")
        if ours.startswith("the ") or cls._owner(ours.partition("=")[0]):
            return f"; the published code's {name} is {ours} here"
        near = get_close_matches(name, [row["name"] for row in cls.fields()], n=1)
        return f"; did you mean {near[0]!r}" if near else ""

    @classmethod
    def fields(cls) -> list[dict[str, Any]]:
        """A row for each name that a configuration of the stage may set: its fields, then its
        knobs. Each has the default (None: the recipe's) and what the name means."""
        kinds = {(c, name): kind for c in cls.choices for name, kind in cls.list_kinds(c).items()}
        models = {f"{c} = {name}": kind.Options for (c, name), kind in kinds.items()}
        return [
            {"name": name, "of": of, "default": field.default, "meaning": texts.get(name, "")}
            for of, model in ({"all": cls} | models).items()
            for texts in [meanings(model)]
            for name, field in model.model_fields.items()
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

    def get_chosen(self, choice: str) -> Any:
        """The registered class that `method`, `adversary` or `backbone` names."""
        return self._choose(choice, getattr(self, choice))

    def replace(self, **values: Any) -> typing.Self:
        """The same configuration with other values; knobs of a choice that changes are dropped."""
        new = object()  # of a knob that only the new choice has
        if all(value == getattr(self, name, new) for name, value in values.items()):
            return self  # frozen, and to read all values again takes half a millisecond
        fields = dict(self)
        for choice, options in zip(self.choices, self._options, strict=True):
            if values.get(choice, getattr(self, choice)) != getattr(self, choice):
                fields = {k: v for k, v in fields.items() if k not in type(options).model_fields}
        return type(self)(**fields | values)

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
            parameters = [row["name"] for row in cls.fields()]
        return cls(**{name: names[name] for name in parameters if name in names})

    def list_changes(self) -> dict[str, Any]:
        """The names whose values differ from what the recipe gives beside `principal` ones."""
        principal = {name: getattr(self, name) for name in ("preset", *self.principal)}
        plain: dict[str, Any] = {}
        with contextlib.suppress(ConfigError):  # the recipe is gone
            key = (type(self), *principal.values())
            plain = once(key, lambda: dict(type(self)(**principal)))
        return {
            name: value
            for name, value in self
            if name not in self.unknown and value != plain.get(name)
        }

    def list_stated(self) -> dict[str, Any]:
        """Name → value, or UNKNOWN where nobody knows it: for people."""
        return {name: UNKNOWN if name in self.unknown else value for name, value in self}

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values: names whose values are not their defaults.

        A field that is added later with a neutral default changes nothing here. Device and pointers
        are left out: what they name is named by its content.
        """
        silent = {*self.circumstances, *self.pointers}
        return self.model_dump(mode="json", exclude_defaults=True, exclude=silent)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.list_stated().items())

    def _repr_html_(self) -> str:
        """For notebooks: what differs from the recipe; behind a click all values and meanings."""
        changes = ", ".join(f"{name} = {value}" for name, value in self.list_changes().items())
        texts = {k: v for model in (self, *self._options) for k, v in meanings(type(model)).items()}
        values = self.list_stated().items()
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
        streamed: read photographs from where they lie, a folder or tar shards, whenever they are
            needed, and crop the originals in workers: for more than the disk holds decoded.
    """

    on_error: Literal["raise", "skip"] | None = None
    gray_bits: Annotated[int, Field(ge=1, le=16)] | None = None
    streamed: bool | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """The fields that say how images are read, where they are set: arguments of `load`."""
        names = {"classes", "on_error", "gray_bits", "streamed"}
        return self.model_dump(include=names, exclude_none=True)
