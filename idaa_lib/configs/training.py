"""The two training stages: the VAE and the encoder (docs/spec/idaa.md §1–4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from idaa_lib.configs.base import (
    PRESET,
    Config,
    ConfigError,
    NonNegative,
    Positive,
    Rate,
    Seed,
)


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
