"""What a run is asked to do: one frozen, validated configuration per stage.

A notebook's `parameters` cell has exactly these names, so `papermill -p epsilon 0.1` sets
`SSLConfig.epsilon`. Fields that a preset governs may be left out or None ("the preset's value");
the object itself, and the `config.json` made from it, hold resolved values only.

Constants: docs/architecture.md, docs/spec/idaa.md §1 (VAE), §2 (ε), §4 (SimCLR), §5 (evaluation).
"""

from __future__ import annotations

import ast
import contextlib
import html
import json
import math
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
        """The fields that decide the result, as JSON values (device and pointers left out)."""
        return self.model_dump(mode="json", exclude=set(self.circumstances | self.pointers))


class TrainingConfig(Config):
    """What the two training stages share.

    Fields:
        dataset: `photos`, a torchvision name (`cifar10`, …), or the path of a folder or zip.
        size: side of the square images, pixels. limit: train on so many images at most
            (None: as the preset says, which is all but in `demo`).
        split: `train` (a validation part held out) or `trainval` (all, as the papers do).
        augmentation: recipe of random views: simclr, simsiam, normal, none.
        epochs, batch_size (global, over all processes), learning_rate (at the first step).
        precision: fp32, bf16, or auto (bf16 where the device computes it natively).
        log_every: steps between two lines of metrics.jsonl.
        checkpoint_every: epochs between two checkpoints (the last two are kept).
        tracker: none, tensorboard, wandb, mlflow.
        continue_from: a finished run of the same shape to start from, as a run of its own.
        device: auto, cpu, cuda, mps. seed: of initial weights, batches, views and noise.
    """

    circumstances = Config.circumstances | {"log_every", "checkpoint_every"}

    dataset: str = PRESET
    size: Positive = PRESET
    limit: Positive | None = None
    split: Literal["train", "trainval"] = "train"
    augmentation: Literal["simclr", "simsiam", "normal", "none"] = "simclr"
    seed: Seed = 0
    device: str = "auto"
    epochs: Positive = PRESET
    batch_size: Annotated[int, Field(gt=1)] = PRESET
    learning_rate: Rate = PRESET
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: Positive = 10
    checkpoint_every: Positive = 1
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    continue_from: str | None = None


class VAEConfig(TrainingConfig):
    """Training of the VAE that splits x into G(x) and R(x) (docs/spec/idaa.md §1).

    Fields (besides those of every training stage):
        dim: bottleneck dimension m.
        width: half the channels of the innermost feature map (paper: 64; at least 8 at 224 px).
        kappa: weight of the KL term divided by B·3·m, the official knob.
        beta: the same weight as KL per image in nats against the NLL at unit variance,
            β = κ·H·W / (2·m). Give one of the two; both are recorded.
    """

    stage = "vae"
    principal = ("dataset",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "demo": dict(dataset="photos", limit=2000, size=32, dim=128, width=16, epochs=12,
                     batch_size=64, learning_rate=5e-4),
        "cifar10": dict(dataset="cifar10", size=32, dim=512, width=64, epochs=100,
                        batch_size=128, learning_rate=5e-4, checkpoint_every=10),
        "paper": dict(dataset="cifar10", size=32, dim=512, width=64, epochs=300, batch_size=128,
                      learning_rate=5e-4, split="trainval", checkpoint_every=10),
    }  # fmt: skip

    dim: Positive = PRESET
    width: Annotated[int, Field(gt=1, multiple_of=2)] = PRESET
    kappa: NonNegative = PRESET
    beta: NonNegative = PRESET

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        size, dim = values["size"], values["dim"]
        small = isinstance(size, int) and 0 < size <= 60 and size % 4 == 0
        if isinstance(size, int) and not small and size not in (64, 84, 224):
            raise ConfigError(
                f"size must be 64, 84, 224 or a multiple of 4 up to 60 (the VAE halves it at "
                f"least twice), and is {size}."
            )
        if size == 224 and isinstance(values["width"], int) and values["width"] < 8:
            raise ConfigError(f"width must be at least 8 at size=224, and is {values['width']}.")
        ok = all(isinstance(value, int) and value > 0 for value in (size, dim))
        per_kappa = size * size / (2 * dim) if ok else math.nan
        kappa, beta = given.get("kappa"), given.get("beta")
        if isinstance(kappa, float) and isinstance(beta, float):
            if not math.isclose(beta, kappa * per_kappa, rel_tol=1e-6):
                raise ConfigError(
                    f"kappa={kappa:g} means beta={kappa * per_kappa:g} at size={size} and "
                    f"dim={dim}, but beta={beta:g} was given too: give one of the two."
                )
        elif isinstance(beta, float):
            values["kappa"] = beta / per_kappa
        elif beta is None:
            values["kappa"] = 0.1 if kappa is None else kappa
            if isinstance(values["kappa"], float):
                values["beta"] = values["kappa"] * per_kappa
        return values


class SSLConfig(TrainingConfig):
    """Self-supervised training of an encoder, with an adversary or none (docs/spec/idaa.md §2–4).

    Fields (besides those of every training stage):
        method: a registered SSL method. backbone: a registered backbone; width: channels of its
            first stage (paper: 64). stem: `cifar` (3×3) or `imagenet` (7×7 and max-pooling).
        projection_dim, temperature: of the projector and of the contrastive loss.
        adversary: none, clae, idaa, random_sign. epsilon: radius of the perturbation, in units of
            the latent z for idaa and random_sign, of normalised pixels for clae.
        norm: linf or l2. steps, step_size (None: ε for one step, 2.5·ε/steps for more),
            random_start: of the attack. alpha: weight of the adversarial loss.
        attack: where IDAA's gradient comes from: `full` as published; cheaper ones of ours
            (docs/cheaper-attacks.md): `prefix`, through the first `attack_stages` stages of the
            backbone alone; `carried`, at every `attack_every`-th step, with each image's δ carried
            over in between; `free`, from the training backward pass of the image's last visit.
        reuse_anchor: the attacked embedding serves as its own anchor where it equals it exactly;
            False lets the adversarial BatchNorm statistics see a step 3 times, as the official
            code does.
        vae: id or path of a VAE run (None: the newest that fits); dim: its bottleneck dimension
            (None: any).
        knn_every: epochs between two kNN readings on the validation split.
    """

    stage = "ssl"
    principal = ("dataset", "method", "adversary")
    circumstances = TrainingConfig.circumstances | {"knn_every"}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "demo": dict(dataset="photos", limit=2000, size=32, width=16, epochs=3, batch_size=128,
                     learning_rate=1e-3),
        "cifar10": dict(dataset="cifar10", size=32, width=64, epochs=100, batch_size=256,
                        learning_rate=3e-4, knn_every=5, checkpoint_every=5),
        "paper": dict(dataset="cifar10", size=32, width=64, epochs=300, batch_size=256,
                      learning_rate=3e-4, split="trainval", reuse_anchor=False, knn_every=10,
                      checkpoint_every=10),
    }  # fmt: skip
    # README of the official release for IDAA, CLAE's own for CLAE (spec §2, §3).
    epsilons: ClassVar[dict[str, float]] = {
        "none": 0.0, "clae": 0.03, "idaa": 0.1, "random_sign": 0.1,
    }  # fmt: skip

    method: str = "simclr"
    backbone: str = "resnet18"
    width: Positive = PRESET
    stem: Literal["cifar", "imagenet"] = "cifar"
    projection_dim: Positive = 64
    temperature: Rate = 0.5
    adversary: Literal["none", "clae", "idaa", "random_sign"] = "none"
    epsilon: NonNegative = PRESET
    norm: Literal["linf", "l2"] = "linf"
    steps: Positive = 1
    step_size: Rate | None = None
    random_start: bool = False
    alpha: NonNegative = 1.0
    attack: Literal["full", "prefix", "carried", "free"] = "full"
    attack_stages: Annotated[int, Field(ge=1, le=4)] = 2
    attack_every: Annotated[int, Field(ge=2)] = 2
    reuse_anchor: bool = True
    vae: str | None = None
    dim: Positive | None = None
    knn_every: Positive = 1

    @property
    def needs_vae(self) -> bool:
        return self.adversary in ("idaa", "random_sign")

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        adversary = values.get("adversary", "none")
        if adversary == "none":
            # Knobs of an attack that does not happen would give one run many names.
            attack = ("norm", "steps", "step_size", "random_start", "alpha", "reuse_anchor",
                      "attack", "attack_stages", "attack_every")  # fmt: skip
            cls._check_unused(values, ("epsilon", "vae", "dim", *attack))
            values = {k: v for k, v in values.items() if k not in attack} | {"epsilon": 0.0}
        elif isinstance(adversary, str):
            values.setdefault("epsilon", cls.epsilons.get(adversary, 0.0))
        if adversary == "random_sign":  # one draw, whatever they say
            values = {
                k: v for k, v in values.items() if k not in ("steps", "step_size", "random_start")
            }
        if adversary == "clae":
            cls._check_unused(values, ("vae", "dim"))
        if adversary in ("none", "clae"):
            values = {k: v for k, v in values.items() if k not in ("vae", "dim")}
        if values.get("attack") != "prefix":
            cls._check_unused(values, ("attack_stages",), attack="prefix")
            values = {k: v for k, v in values.items() if k != "attack_stages"}
        if values.get("attack") != "carried":
            cls._check_unused(values, ("attack_every",), attack="carried")
            values = {k: v for k, v in values.items() if k != "attack_every"}
        if values.get("attack", "full") != "full" and adversary != "idaa":
            raise ConfigError(
                f"attack={values['attack']!r} is IDAA's alone, and adversary is {adversary!r}."
            )
        one = values.get("steps", 1) == 1 and not values.get("random_start")
        if values.get("attack") in ("carried", "free") and not one:
            raise ConfigError(
                f"attack={values['attack']!r} is of one step from the image itself: leave out "
                f"steps and random_start."
            )
        return values

    @classmethod
    def _check_unused(
        cls, values: Mapping[str, Any], names: tuple[str, ...], **beside: Any
    ) -> None:
        """Values that will be dropped are validated all the same: a typing error is told."""
        for name in names:
            if name in values:
                cls(preset="demo", adversary="idaa", **beside, **{name: values[name]})


class EvalConfig(Config):
    """Evaluation of a trained encoder on labelled images (docs/spec/idaa.md §5).

    Fields:
        run: id or path of an SSL run (None: the newest finished one).
        dataset: None for the one that the run was trained on; limit: of train and of test images.
        protocol: `clean` (penalty chosen on validation, all test images, test read once) or
            `official` (the published one: projected features in kNN, best test epoch of the
            linear classifier, partial batches dropped).
        k: neighbours of kNN (capped by the size of the bank). temperature: its τ.
        references: also judge the encoder before training and raw pixels, as rows to stand beside.
        seed: of the official protocol's classifier.
    """

    stage = "eval"
    principal = ("run",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "demo": dict(limit=2000),
        "cifar10": {},
        "paper": dict(protocol="official"),
    }

    run: str | None = None
    dataset: str | None = None
    limit: Positive | None = None
    protocol: Literal["clean", "official"] = "clean"
    k: Positive = 200
    temperature: Rate = 0.5
    references: bool = True
    seed: Seed = 0
    device: str = "auto"


class DecomposeConfig(Config):
    """Pictures of what a VAE splits and what an attack moves (notebook 02).

    Fields:
        vae: id or path of a VAE run (None: the newest finished one).
        run: id or path of the SSL run whose encoder is attacked (None: the newest on the same
            images and size, an untrained encoder where there is none; `untrained`: that one).
        dataset: None for the VAE's own. split, images: which part of it, and how many images are
            attacked together and judged (pictures show the first of them).
        only: of one class. indices: these come first. own: image file that comes before all.
        epsilon: the largest radius, in units of z. norm, steps: of the attack.
        seed: which images, where they are not named, and the random signs.
    """

    stage = "decompose"
    vae: str | None = None
    run: str | None = None
    dataset: str | None = None
    split: Literal["train", "val", "test"] = "val"
    images: Annotated[int, Field(gt=1, le=256)] = 12
    only: str | None = None
    indices: tuple[Seed, ...] = ()
    own: str | None = None
    epsilon: Rate = 1.0
    norm: Literal["linf", "l2"] = "linf"
    steps: Positive = 1
    seed: Seed = 0


class SweepConfig(Config):
    """A sensitivity study: ε, β and dim, one at a time around the middle (notebook 05).

    Fields:
        adversary, dataset: of every run of the study.
        epsilons, betas, dims: values of each axis (an empty one is left out). A run that differs
            from the middle in one axis only is made for each value and each seed.
        seeds: each gives a run; several give error bars.
        jobs: notebooks that run at a time; they share the processor's threads.
        vae, ssl, eval: further fields of the three stages, as a dict or as JSON text; not those
            that the study sets itself.
    """

    stage = "sweep"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "demo": dict(dataset="photos", epsilons=(0.03, 0.1, 0.3), betas=(0.04, 0.4, 4.0),
                     dims=(32, 128, 512), jobs=2),
        "cifar10": dict(dataset="cifar10", epsilons=(0.03, 0.1, 0.3, 1.0),
                        betas=(0.01, 0.1, 1.0), dims=(128, 512, 1024), jobs=1),
        "paper": dict(dataset="cifar10", epsilons=(0.03, 0.1, 0.3, 1.0),
                      betas=(0.01, 0.1, 1.0), dims=(128, 512, 1024), jobs=1),
    }  # fmt: skip

    dataset: str = PRESET
    adversary: Literal["idaa", "random_sign"] = "idaa"
    epsilons: tuple[NonNegative, ...] = PRESET
    betas: tuple[NonNegative, ...] = PRESET
    dims: tuple[Positive, ...] = PRESET
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    jobs: Positive = PRESET
    device: str = "auto"
    vae: dict[str, Any] = Field(default_factory=dict)
    ssl: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        own = {"preset", "dataset", "seed", "device"}
        own_of = {"vae": own, "ssl": own | {"adversary", "vae"}, "eval": own | {"run"}}
        for stage, taken in own_of.items():
            fields = given.get(stage)
            if isinstance(fields, dict) and (clash := sorted(fields.keys() & taken)):
                raise ConfigError(f"{stage} cannot set {clash[0]!r}: the study sets it itself.")
        return values


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
