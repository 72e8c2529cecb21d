"""What is done with trained runs: evaluation, pictures, studies."""

from __future__ import annotations

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
