"""The training stages: VAEs, encoders without labels or with a few (docs/spec/idaa.md §1–5)."""

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
from idaa_lib.nets.vae import halvings

# Recipes of random views (`views.RECIPES`).
Augmentation = Literal["simclr", "simsiam", "normal", "byol", "none"]
Adversary = Literal["none", "clae", "idaa", "random_sign"]


# What each method's paper, or its public CIFAR-10 code, trains with (docs/spec/idaa.md §4) over the
# presets `cifar10` and `paper`, which are SimCLR's; `epochs` is of `paper` alone. A method of the
# user's own has SimCLR's values.
_INSTANCE = dict(augmentation="normal", projection_dim=128, temperature=0.1, weight_decay=5e-4,
                 batch_size=128, learning_rate=0.03, epochs=301)  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "simclr": {},
    "plain": _INSTANCE,
    "uel": _INSTANCE,
    "simsiam": dict(augmentation="simsiam", projection_dim=2048, weight_decay=5e-4, batch_size=256,
                    learning_rate=0.03, epochs=300),
    "moco": dict(augmentation="simsiam", projection_dim=128, temperature=0.1, weight_decay=5e-4,
                 batch_size=512, learning_rate=0.06, epochs=200),
    "byol": dict(augmentation="byol", projection_dim=256, weight_decay=5e-4, batch_size=128,
                 learning_rate=0.06, epochs=200),
}  # fmt: skip
# SimSiam's ImageNet variant (spec §4); network and size are of `paper` alone.
IMAGENET_SIMSIAM = dict(
    learning_rate=0.05,
    weight_decay=1e-4,
    epochs=100,
    backbone="resnet50",
    stem="imagenet",
    size=224,
)
# What learns in the few epochs of `demo`: of .01, .03 and .1 (BYOL: up to .3) the best kNN there.
DEMO: dict[str, dict[str, Any]] = {
    "simclr": {},
    "plain": dict(learning_rate=0.01),
    "uel": dict(learning_rate=0.01),
    "simsiam": dict(learning_rate=0.01, projection_dim=512),
    "moco": dict(learning_rate=0.01, queue=1024),  # of 2,000 images
    "byol": dict(learning_rate=0.2, momentum=0.98),
}
# Fields that only some of them have.
OWNERS: dict[str, tuple[str, ...]] = {
    "temperature": ("simclr", "plain", "uel", "moco"),
    "reuse_anchor": ("simclr", "plain", "uel", "simsiam"),
    "pairing": ("simsiam",),
    "queue": ("moco",),
    "momentum": ("moco", "byol"),
}


class TrainingConfig(Config):
    """What the training stages share.

    Fields:
        dataset: `photos`, a torchvision name (`cifar10`, …), or the path of a folder or zip.
        size: side of the square images, pixels. limit: train on so many images at most
            (None: as the preset says, which is all but in `demo`).
        split: `train` (a validation part held out) or `trainval` (all, as the papers do).
        epochs, batch_size (global, over all processes), learning_rate (at its highest).
        precision: fp32, bf16, or auto (bf16 where the device computes it natively).
        compile: views and networks by torch.compile, on one GPU the step as a CUDA graph: a
            warm-up of a minute or two, then shorter steps. Needs a C++ compiler on a CPU.
        log_every: steps between two lines of metrics.jsonl.
        checkpoint_every: epochs between two checkpoints (the last two are kept).
        tracker: none, tensorboard, wandb, mlflow.
        continue_from: a finished run of the same shape to start from, as a run of its own.
        device: auto, cpu, cuda, mps. seed: of initial weights, batches, views and noise.
    """

    circumstances = Config.circumstances | {"compile", "log_every", "checkpoint_every"}

    dataset: str = PRESET
    size: Positive = PRESET
    limit: Positive | None = None
    split: Literal["train", "trainval"] = "train"
    seed: Seed = 0
    device: str = "auto"
    epochs: Positive = PRESET
    batch_size: Annotated[int, Field(gt=1)] = PRESET
    learning_rate: Rate = PRESET
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    log_every: Positive = 10
    checkpoint_every: Positive = 1
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    continue_from: str | None = None


def ask_for_images(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """No preset's images are of ImageNet's size, and enlarged ones would train for days.

    Raises:
        ConfigError: `dataset` was left to a preset that means 32 px.
    """
    small = values.get("preset") in ("cifar10", "paper") and "dataset" not in given
    if values.get("size") == 224 and small:
        raise ConfigError(
            f"dataset must be given at size=224: that of preset={values['preset']!r}, "
            f"{values['dataset']}, has 32 pixels, and nobody can download ImageNet for you (a "
            f"folder of class folders will do)."
        )


class VAEConfig(TrainingConfig):
    """Training of the VAE that splits x into G(x) and R(x) (docs/spec/idaa.md §1).

    Fields (besides those of every training stage):
        augmentation: recipe of random views: simclr, simsiam, normal, byol, none.
        dim: bottleneck dimension m (`paper` at 224 px: 3072, and MoCo v2's views, those of
            `simsiam`, as the authors' development code has them).
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

    augmentation: Augmentation = "simclr"
    dim: Positive = PRESET
    width: Annotated[int, Field(gt=1, multiple_of=2)] = PRESET
    kappa: NonNegative = PRESET
    beta: NonNegative = PRESET

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        ask_for_images(values, given)
        if values["size"] == 224 and values.get("preset") == "paper":
            values = {**values, "dim": 3072, "augmentation": "simsiam", **given}  # spec §1
        size, dim = values["size"], values["dim"]
        if isinstance(size, int) and isinstance(values["width"], int):
            halvings(size, values["width"])  # raises where there is no such VAE
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


class EncoderConfig(TrainingConfig):
    """What the trainings of an encoder share: its network, and its adversary or none.

    Fields (besides those of every training stage):
        backbone: a registered backbone; width: channels of its first stage. stem: `cifar` (3×3),
            `mini` (3×3 and max-pooling) or `imagenet` (7×7 and max-pooling).
        adversary: none, clae, idaa, random_sign. epsilon: radius of the perturbation, in units of
            the latent z for idaa and random_sign, of normalised pixels for clae.
        norm: linf or l2. steps, step_size (None: ε for one step, 2.5·ε/steps for more),
            random_start: of the attack. alpha: weight of the adversarial loss.
        vae: id or path of a VAE run (None: the newest that fits); dim: its bottleneck dimension
            (None: any).
    """

    # ε where none is given, and the fields that say nothing without an adversary.
    epsilons: ClassVar[dict[str, float]]
    knobs: ClassVar[tuple[str, ...]] = ("norm", "steps", "step_size", "random_start", "alpha")

    backbone: str = PRESET
    width: Positive = PRESET
    stem: Literal["cifar", "mini", "imagenet"] = "cifar"
    adversary: Adversary = "none"
    epsilon: NonNegative = PRESET
    norm: Literal["linf", "l2"] = "linf"
    steps: Positive = 1
    step_size: Rate | None = None
    random_start: bool = False
    alpha: NonNegative = 1.0
    vae: str | None = None
    dim: Positive | None = None

    @property
    def needs_vae(self) -> bool:
        return self.adversary in ("idaa", "random_sign")

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        ask_for_images(values, given)
        adversary = values.get("adversary", "none")
        if adversary == "none":
            # Knobs of an attack that does not happen would give one run many names.
            cls._check_unused(values, ("epsilon", "vae", "dim", *cls.knobs))
            values = {k: v for k, v in values.items() if k not in cls.knobs} | {"epsilon": 0.0}
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
        return values

    @classmethod
    def _check_unused(
        cls, values: Mapping[str, Any], names: tuple[str, ...], **beside: Any
    ) -> None:
        """Values that will be dropped are validated all the same: a typing error is told."""
        for name in names:
            if name in values:
                cls(preset="demo", adversary="idaa", **beside, **{name: values[name]})


class SSLConfig(EncoderConfig):
    """Self-supervised training of an encoder, with an adversary or none (docs/spec/idaa.md §2–4).

    Fields (besides those of every training of an encoder; the papers' width is 64):
        method: a registered SSL method (simclr, plain, uel, simsiam, moco, byol); its published
            recipe goes over the preset. augmentation: recipe of random views: simclr, simsiam,
            normal, byol, none.
        projection_dim, temperature: of the projector and of the contrastive loss.
        weight_decay: L2, of all parameters.
        pairing: SimSiam as IDAA's authors developed it for CIFAR, or for ImageNet (`imagenet`; in
            `paper` a ResNet-50 at 224 px); but in `demo` its rate scales with batch_size/256.
        queue: keys that MoCo holds.
        momentum: of the moving average that MoCo's key encoder and BYOL's target are, in [0, 1].
        reuse_anchor: the attacked embedding serves as its own anchor where it equals it exactly;
            False lets the adversarial BatchNorm statistics see a step 3 times, as the official
            code does.
        knn_every: epochs between two kNN readings on the validation split.
        keep_every: epochs between two snapshots of the weights, which all stay on the disk: the
            official protocol takes the best of them on test. None: as the preset says, which is
            none but in `paper`; as many as `epochs`: none. A finished run keeps none afterwards.
    """

    stage = "ssl"
    principal = ("dataset", "method", "adversary")
    circumstances = TrainingConfig.circumstances | {"knn_every", "keep_every"}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "demo": dict(dataset="photos", limit=2000, size=32, width=16, epochs=3, batch_size=128,
                     learning_rate=1e-3),
        "cifar10": dict(dataset="cifar10", size=32, width=64, epochs=100, batch_size=256,
                        learning_rate=3e-4, knn_every=5, checkpoint_every=5),
        "paper": dict(dataset="cifar10", size=32, width=64, epochs=300, batch_size=256,
                      learning_rate=3e-4, split="trainval", reuse_anchor=False, knn_every=10,
                      keep_every=10, checkpoint_every=10),
    }  # fmt: skip
    # IDAA's of SimCLR in the official README; that of Plain, UEL and SimSiam was not published, and
    # MoCo and BYOL have none: the same. CLAE's own for CLAE (spec §2, §3).
    epsilons: ClassVar[dict[str, float]] = {
        "none": 0.0, "clae": 0.03, "idaa": 0.1, "random_sign": 0.1,
    }  # fmt: skip

    knobs: ClassVar[tuple[str, ...]] = (
        *EncoderConfig.knobs, "reuse_anchor",
    )  # fmt: skip

    method: str = "simclr"
    backbone: str = "resnet18"
    augmentation: Augmentation = "simclr"
    projection_dim: Positive = 64
    temperature: Rate = 0.5
    weight_decay: NonNegative = 0.0
    pairing: Literal["cifar", "imagenet"] = "cifar"
    queue: Positive = 4096
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.99
    reuse_anchor: bool = True
    knn_every: Positive = 1
    keep_every: Positive | None = None

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        values = values | cls._recipe(values) | dict(given)
        method = values.get("method", "simclr")
        for name, owners in OWNERS.items():
            if method in [*RECIPES] and method not in owners:
                cls._check_unused(values, (name,), method=owners[0])
                values = {k: v for k, v in values.items() if k != name}
        return super()._derive(values, given)

    @classmethod
    def _recipe(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the method has over the preset's values."""
        method, preset = values.get("method", "simclr"), values.get("preset") or "demo"
        if method not in [*RECIPES]:
            return {}
        recipe = RECIPES[method]
        if method == "simsiam" and values.get("pairing") == "imagenet":
            recipe = recipe | IMAGENET_SIMSIAM
            if values.get("adversary") in ("idaa", "random_sign"):
                recipe |= {"epsilon": 0.01}  # unpublished: the default of its code (spec §4)
        batch = values.get("batch_size")
        if method == "simsiam" and isinstance(batch, int):  # linear scaling
            recipe = recipe | {"learning_rate": recipe["learning_rate"] * batch / 256}
        if preset == "demo":
            recipe = recipe | DEMO[method]
        cifar = ("epochs", "backbone", "stem", "size")
        left = {"paper": (), "cifar10": cifar, "demo": (*cifar, "batch_size")}[preset]
        return {k: v for k, v in recipe.items() if k not in left}


class SemiConfig(EncoderConfig):
    """Semi-supervised training of a classifier by FixMatch (docs/spec/idaa.md §2, §5).

    Fields (besides those of every training of an encoder; width: 16·k of WRN-28-k):
        labels_per_class: so many training images of each class keep their label, drawn by `seed`;
            every image, these too, is trained on without it.
        batch_size: labelled images a step; mu: unlabelled ones for each of them.
        steps_per_epoch: where no preset says otherwise, one pass over the unlabelled images.
        threshold: probability from which a pseudo-label is believed. lambda_u: weight of the loss
            of strong views; 0 is training on the labels alone.
        weight_decay: of all but BatchNorms and biases. ema_decay: of the averaged weights, which
            are what is evaluated; BatchNorm's running statistics move by 1 − ema_decay a step.
        contrast: what x′ of a weak view is held to: `infonce`, the features of its view among those
            of the batch, at `temperature`; `ce`, its pseudo-label.
    """

    stage = "semi"
    method: ClassVar[str] = "FixMatch"  # the only one of its stage
    principal = ("dataset", "adversary")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "demo": dict(dataset="photos", limit=2000, size=32, backbone="wrn10", width=16, epochs=10,
                     batch_size=16, mu=4, learning_rate=0.03, labels_per_class=4,
                     threshold=0.95, weight_decay=5e-4, ema_decay=0.95),
        "cifar10": dict(dataset="cifar10", size=32, backbone="wrn28", width=32, epochs=64,
                        steps_per_epoch=1024, batch_size=64, mu=7, learning_rate=0.03,
                        labels_per_class=25, threshold=0.95, weight_decay=5e-4, ema_decay=0.999),
        "paper": dict(dataset="cifar100", size=32, backbone="wrn28", width=128, epochs=1024,
                      steps_per_epoch=1024, batch_size=64, mu=7, learning_rate=0.03,
                      labels_per_class=25, threshold=0.95, weight_decay=1e-3, ema_decay=0.999,
                      split="trainval", checkpoint_every=8),
    }  # fmt: skip
    # That of FixMatch + CLAE; for IDAA none was published, and it takes the same (spec §2).
    epsilons: ClassVar[dict[str, float]] = {
        "none": 0.0, "clae": 0.5, "idaa": 0.5, "random_sign": 0.5,
    }  # fmt: skip
    knobs: ClassVar[tuple[str, ...]] = (*EncoderConfig.knobs, "contrast", "temperature")

    labels_per_class: Positive = PRESET
    mu: Positive = PRESET
    steps_per_epoch: Positive | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = PRESET
    lambda_u: NonNegative = 1.0
    weight_decay: NonNegative = PRESET
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = PRESET
    contrast: Literal["infonce", "ce"] = "infonce"
    temperature: Rate = 0.1

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._derive(values, given)
        if values.get("contrast") == "ce":
            cls._check_unused(values, ("temperature",))
            values = {k: v for k, v in values.items() if k != "temperature"}
        return values
