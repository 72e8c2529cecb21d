"""The training stages: VAEs, encoders without labels or with a few (docs/spec/idaa.md §1–5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from idaa_lib.configs.base import (
    RECIPE,
    Config,
    ImagesConfig,
    NonNegative,
    Positive,
    Rate,
    Seed,
)
from idaa_lib.configs.reading import ConfigError
from idaa_lib.configs.recipes import recipe_values
from idaa_lib.nets.vae import halvings
from idaa_lib.registry import SOURCES

# Recipes of random views (`views.RECIPES`).
Augmentation = Literal["simclr", "simsiam", "normal", "byol", "cassle", "ipirm", "rsa", "none"]
Shift = Annotated[float, Field(allow_inf_nan=False)]
# The default of a field that may follow from another.
FOLLOWS: Any = Field(default=None, validate_default=False)


class TrainingConfig(ImagesConfig):
    """What the training stages share.

    Fields (besides `on_error`, `gray_bits` and `streamed`):
        dataset: `photos`, a torchvision name (`cifar10`, …), or the path of a folder or zip, or of
            a folder of tar shards.
        classes: a text file that names the class folders to take, one a line, as `imagenet100.txt`
            does, which ships here (empty: all); a label is the place in it.
        size: side of the square views, pixels. limit: train on so many images at most.
        source_size: side at which images are kept, of which views are cropped (None: `size`). The
            papers crop the originals: 96 for STL-10, 256 or more for photographs at 224; all of
            them are cropped with `streamed`.
        split: `train` (a validation part held out) or `trainval` (all, as the papers do).
        mean, std: that images are normalised with, per channel in [0, 1] (None: the data set's).
        epochs: passes over the images. batch_size: images a step, of all processes together.
        learning_rate: the highest of the schedule. warmup: epochs of a rising rate (a recipe's is a
            tenth of all epochs at most). weight_decay: as torch's optimisers take it.
        optimizer: adam, adam_b0 (Adam with β₁ 0), sgd, nesterov or lars.
        schedule: of the rate, one of `methods.schedules`: constant, linear, cosine, delayed_cosine
            (from the 13th epoch), cosine_by_step, drops (Plain's), drops_60_80, drops_15_30 or
            seven_sixteenths (FixMatch's).
        augmentation: recipe of random views: simclr, simsiam, normal, byol, cassle, ipirm, rsa or
            none.
        precision: fp32 (on a GPU without TF32), bf16, or auto (bf16 where it is native).
        processes: how many train together, on a GPU each (`python -m idaa_lib.train` and the panel
            start them); the result is that of one.
        compile: views and networks by torch.compile: a warm-up of a minute or two, then shorter
            steps. Without a C++ compiler the run goes on without.
        log_every: steps between two lines of metrics.jsonl.
        checkpoint_every: epochs between two checkpoints (the last two are kept).
        checkpoint_minutes: minutes after which there is one besides, within an epoch (None: never).
        tracker: none, tensorboard, wandb, mlflow.
        continue_from: a finished run of the same shape to start from, as a run of its own.
        seed: of initial weights, batches, views and noise.
    """

    circumstances = Config.circumstances | {
        *("compile", "log_every", "checkpoint_every", "checkpoint_minutes", "precision"),
        "processes",
    }

    dataset: str = RECIPE
    classes: str = ""
    size: Positive = RECIPE
    source_size: Positive | None = None
    limit: Positive | None = None
    split: Literal["train", "trainval"] = "train"
    mean: tuple[Shift, Shift, Shift] | None = None
    std: tuple[Rate, Rate, Rate] | None = None
    seed: Seed = 0
    device: str = "auto"
    epochs: Positive = RECIPE
    batch_size: Annotated[int, Field(gt=1)] = RECIPE
    learning_rate: Rate = RECIPE
    optimizer: Literal["adam", "adam_b0", "sgd", "nesterov", "lars"] = RECIPE
    schedule: str = RECIPE
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    augmentation: Augmentation = "simclr"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    processes: Positive = 1
    compile: bool = False
    log_every: Positive = 10
    checkpoint_every: Positive = 1
    checkpoint_minutes: Rate | None = None
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    continue_from: str | None = None

    def replace(self, **values: Any) -> Self:
        """As `Config.replace`; a recipe's warm-up follows the number of epochs."""
        if values.get("epochs", self.epochs) != self.epochs and "warmup" not in values:
            others = {name: value for name, value in self if name != "warmup"}
            if self.warmup == self._shorten(recipe_values(type(self), others).get("warmup", 0)):
                values["warmup"] = None
        return super().replace(**values)

    def _shorten(self, warmup: int) -> int:
        """A recipe's warm-up in a short training: a tenth of the epochs at most."""
        return min(warmup, self.epochs // 10)

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if "warmup" not in explicit:
            values["warmup"] = self._shorten(self.warmup)
        elif self.warmup >= self.epochs:
            raise ConfigError(
                f"warmup={self.warmup} must be less than epochs={self.epochs}: take a shorter "
                f"warm-up, or leave it out."
            )
        if self.batch_size % self.processes:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be shared by processes={self.processes}: "
                f"take a multiple of it."
            )
        # No recipe's images are of ImageNet's size, and enlarged ones would train for days.
        small = self.dataset in ("cifar10", "cifar100") and "dataset" not in explicit
        if self.size == 224 and small:
            raise ConfigError(
                f"dataset must be given at size=224: that of preset={self.preset!r}, "
                f"{self.dataset}, has 32 pixels, and nobody can download ImageNet for you (a "
                f"folder of class folders will do)."
            )
        if self.streamed:
            self._check_streamed(explicit)
            return values | {"source_size": None}
        if self.source_size is not None and self.source_size < self.size:
            raise ConfigError(
                f"source_size={self.source_size} is less than size={self.size}: views are cropped "
                f"of images that are as large or larger."
            )
        return values

    def foreign(self) -> dict[str, Any]:
        """The method, adversary and backbone that are not ours, by name: only a process that runs
        the file that registers them knows them.

        Raises:
            ConfigError: this one does not.
        """
        choices = (*self.choices, "backbone") if self.choices else ()
        kinds = {getattr(self, choice): self.get_chosen(choice) for choice in choices}
        return {name: kind for name, kind in kinds.items() if kind in SOURCES}

    def _check_streamed(self, explicit: Mapping[str, Any]) -> None:
        if self.stage == "semi":
            raise ConfigError(
                "streamed=True is of trainings without labels: leave it out with stage semi."
            )
        if explicit.get("source_size"):
            raise ConfigError(
                f"source_size={self.source_size} is of images that are kept decoded, and "
                f"streamed=True crops the originals: leave one of them out."
            )
        if self.augmentation == "none":
            raise ConfigError(
                "streamed=True crops photographs at random, and augmentation='none' crops nothing: "
                "take other views, or leave streamed out."
            )

    def identity(self) -> dict[str, Any]:
        """As everywhere; a `source_size` of `size` is none."""
        values = super().identity()
        if self.source_size == self.size:
            del values["source_size"]
        return values


class VAEConfig(TrainingConfig):
    """Training of the VAE that splits x into G(x) and R(x) (docs/spec/idaa.md §1).

    Fields (besides those of every training stage):
        dim: bottleneck dimension m (`paper` at 224 px: 3072, and MoCo v2's views, those of
            `simsiam`, as the authors' development code has them).
        width: half the channels of the innermost feature map (paper: 64; at least 8 at 224 px).
        kappa: weight of the KL term divided by B·3·m, the official knob.
        beta: the same weight as KL per image in nats against the NLL at unit variance,
            β = κ·H·W / (2·m). Give one of the two; both are recorded.
    """

    stage = "vae"
    principal = ("dataset",)

    dim: Positive = RECIPE
    width: Annotated[int, Field(gt=1, multiple_of=2)] = RECIPE
    kappa: NonNegative = FOLLOWS
    beta: NonNegative = FOLLOWS

    def replace(self, **values: Any) -> Self:
        """As `Config.replace`; κ is held where `dim` or `size` changes and no weight is given."""
        if values.get("beta") is not None and "kappa" not in values:
            values["kappa"] = None
        elif {"dim", "size", "kappa"} & values.keys():
            values.setdefault("beta", None)
        return super().replace(**values)

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._derive(explicit)
        try:
            halvings(self.size, self.width)
        except ValueError as error:  # there is no such VAE
            raise ConfigError(str(error)) from None
        per_kappa = self.size * self.size / (2 * self.dim)
        if {"kappa", "beta"} <= explicit.keys():
            if not math.isclose(self.beta, self.kappa * per_kappa, rel_tol=1e-6):
                raise ConfigError(
                    f"kappa={self.kappa:g} means beta={self.kappa * per_kappa:g} at "
                    f"size={self.size} and dim={self.dim}, but beta={self.beta:g} was given too: "
                    f"give one of the two."
                )
            return values
        if self.beta is not None and "kappa" not in explicit:
            return values | {"kappa": self.beta / per_kappa}
        return values | {"beta": self.kappa * per_kappa}


class EncoderConfig(TrainingConfig):
    """What the trainings of an encoder share: its network, and its adversary or none.

    Fields (besides those of every training stage):
        method, adversary: by name, such as simclr and idaa. Each has knobs of its own (`Options`),
            which are set by name as fields are.
        backbone: by name, such as resnet18. width: channels of its first stage.
        stem: `cifar` (3×3), `mini` (3×3 and max-pooling) or `imagenet` (7×7 and max-pooling).
    """

    choices: ClassVar[tuple[str, ...]] = ("method", "adversary")

    method: str = RECIPE
    adversary: str = "none"
    backbone: str = RECIPE
    width: Positive = RECIPE
    stem: Literal["cifar", "mini", "imagenet"] = "cifar"

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        self.get_chosen("method").check(self)
        self.get_chosen("backbone")  # raises where there is none
        return super()._derive(explicit)

    @property
    def needs_vae(self) -> bool:
        return self.get_chosen("adversary").needs_vae


class SSLConfig(EncoderConfig):
    """Self-supervised training of an encoder, with an adversary or none (docs/spec/idaa.md §2–4).

    Fields (besides those of every training of an encoder; the papers' width is 64):
        knn_every: epochs between two kNN readings on the validation split.
        keep_every: epochs between two snapshots of the weights, which all stay on the disk: the
            official protocol takes the best of them on test (None: there are none). A finished run
            that has as many as `epochs` keeps none.
    """

    stage = "ssl"
    principal = ("dataset", "method", "adversary")
    circumstances = TrainingConfig.circumstances | {"knn_every", "keep_every"}

    method: str = "simclr"
    knn_every: Positive = 1
    keep_every: Positive | None = None


class SemiConfig(EncoderConfig):
    """Semi-supervised training of a classifier by FixMatch (docs/spec/idaa.md §2, §5).

    Fields (besides those of every training of an encoder, and FixMatch's knobs):
        width: channels of the first stage, 16·k of WRN-28-k. batch_size: labelled images a step.
        epochs: passes over the unlabelled images, or of `steps_per_epoch` steps.
    """

    stage = "semi"
    principal = ("dataset", "adversary")

    method: Literal["fixmatch"] = "fixmatch"
