"""What is done with trained runs: evaluation, pictures, studies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

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

# Fields that `axes` may not vary: they have their own axis, or changing them would change other
# fields too.
FIXED = frozenset(
    {"preset", "dataset", "seed", "device", "processes", "tracker", "vae", "dim", "epsilon", "size"}
    | {"continue_from", "adversary"}
)


class EvalConfig(ImagesConfig):
    """Evaluation of a trained encoder on labelled images (docs/spec/idaa.md §5).

    Fields (besides `on_error`, `gray_bits`, `streamed`, None: the training's, of its own images):
        run: id or path of an SSL run (None: the last that a person started, else a sweep's).
        dataset: None for the one that the run was trained on (of `stl10-all` its labelled images,
            `stl10`). limit: at most so many images of each split.
        classes: as in a training (None: the run's, where the dataset is its own; "": all).
        protocol: `clean` (penalty chosen on validation, all test images, test read once) or
            `official` (the published one of the run's method: its layers, τ and batch size, best
            test epoch of the linear classifier, partial batches dropped, and of a run with
            `keep_every` the best kept epoch on test; of IP-IRM, of RSA and of SimSiam's ImageNet
            pairing a classifier trained on fresh random views, without references).
        k: neighbours of kNN (capped by the size of the bank). temperature: τ of kNN (`clean`).
        precision: of the encoding: fp32, bf16, or auto (bf16 where it is native).
        references: also judge the encoder before training and raw pixels (not streamed ones), as
            rows to stand beside.
        seed: of the official protocol's classifier.
    """

    stage = "eval"
    principal = ("run",)

    run: str | None = None
    dataset: str | None = None
    classes: str | Literal[""] | None = None
    limit: Positive | None = None
    protocol: Literal["clean", "official"] = "clean"
    k: Positive = 200
    temperature: Rate = 0.5
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    references: bool = True
    seed: Seed = 0
    device: str = "auto"

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        # The official protocol has its own.
        official = self.protocol == "official"
        return {"temperature": type(self).model_fields["temperature"].default} if official else {}


class DecomposeConfig(ImagesConfig):
    """Pictures of what a VAE splits and what an attack moves (notebook 02).

    Fields (besides `on_error`, `gray_bits`, `streamed`, None: the training's, of its own images):
        vae: id or path of a VAE run (None: the last that a person started, else a sweep's, else the
            `starter` that ships).
        run: id or path of the SSL run whose encoder is attacked (None: one on the same
            images and size, an untrained encoder where there is none; `untrained`: that one).
        dataset: None for the VAE's own, of the starter the images that ship. split: which part of
            it. images: how many are attacked together and judged (pictures show the first of them).
        only: images of this class alone. indices: these images come first. own: image file that
            comes before all.
        epsilon: the largest radius, in units of z. norm: of the attack. steps: of the attack.
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


class TheoryConfig(ImagesConfig):
    """How much identity the latent and the images hold (docs/spec/idaa.md §6, notebook 08).

    Fields (besides `on_error`, `gray_bits`, `streamed`, None: the training's, of its own images):
        vae, run: id or path of the VAE and of the SSL run whose encoder is attacked, chosen as
            `DecomposeConfig` does where they are None; `untrained` is an encoder too.
        witness: id or path of the SSL run that judges identity, never the attacked one (None: the
            latest other, one without an adversary first; `untrained` where there is none).
        dataset: None for the VAE's own, of the starter the images that ship. split: which part of
            it the images come from.
        images: N, as many candidates; the most that an observer can know is log N.
        limit: labelled training images of the class probes.
        augmentation: recipe of the candidates, other views of the same images. It is `mild` (crops
            of 80 % and more, weak colours), or one that encoders are trained with.
        epsilons: radii, in units of z for IDAA and random sign, of normalised pixels for CLAE.
        seed: which images, their views, the signs and the noise.
    """

    stage = "theory"
    principal = ("dataset",)
    pointers = Config.pointers | {"witness"}

    vae: str | None = None
    run: str | None = None
    witness: str | None = None
    dataset: str | None = None
    split: Literal["val", "test"] = "val"
    images: Annotated[int, Field(ge=10, le=2000)] = RECIPE
    limit: Positive = RECIPE
    augmentation: Literal["mild", "simclr", "simsiam", "normal"] = "mild"
    epsilons: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.03, 0.1, 0.3, 1.0, 3.0)
    seed: Seed = 0
    device: str = "auto"


class TransferConfig(ImagesConfig):
    """Frozen features on other data: linear, few labels, few shots (docs/spec/idaa.md §5).

    Fields (besides `on_error`, `gray_bits`, `streamed`, None: the training's, of its own images):
        run: id or path of an SSL run (None: the last that a person started, else a sweep's).
        datasets: names, or paths of folders or zips (None: the one that the run was trained on);
            docs/transfer-data.md says how to lay out those that nobody can download for you.
        classes: as in a training, of each data set (None: the run's, of its own images; "": all).
        limit: at most so many images of each split, of each data set.
        size: pixels a side (None: what the run was trained at; 224 where its stem is ImageNet's).
        precision: of the encoding: fp32, bf16, or auto (bf16 where it is native).
        iterations: of the L-BFGS of each of the 45 penalties, at most. tolerance: at which it ends;
            below 1e-7 it works in float64 (AugSelf's and CASSLE's own: 5000 and 1e-10).
        penalize_bias: AugSelf's and CASSLE's penalty, which counts the bias; its 45 strengths are
            then tried from the weakest on (docs/spec/siblings.md §1.7).
        fractions: shares of the training labels for the few-label probes. draws: random draws of
            each share.
        ways: classes of an episode. shots: labelled images of each class.
        queries: images to classify of each class.
        episodes: how many, of each number of shots. few_shot: `centroid` or `ridge`.
        references: also judge the encoder before training, as rows to stand beside.
        seed: of the drawn labels and of the episodes.
    """

    stage = "transfer"
    principal = ("run",)
    pointers = Config.pointers | {"datasets"}

    run: str | None = None
    datasets: tuple[str, ...] = ()
    classes: str | Literal[""] | None = None
    limit: Positive | None = None
    size: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    iterations: Positive = 50
    tolerance: Rate = 1e-5
    penalize_bias: bool = False
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.01, 0.1)
    draws: Annotated[int, Field(ge=2)] = 5
    ways: Annotated[int, Field(ge=2)] = 5
    shots: tuple[Positive, ...] = (1, 5)
    queries: Positive = 15
    episodes: Annotated[int, Field(ge=2)] = 600
    few_shot: Literal["centroid", "ridge"] = "centroid"
    references: bool = True
    seed: Seed = 0
    device: str = "auto"

    @property
    def dataset(self) -> str:
        """What was transferred to, as tables name it."""
        return ", ".join(Path(name).name for name in self.datasets)

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        if name == "datasets" and isinstance(value, str):  # a path may hold spaces
            parts = [part.strip(" '\"") for part in value.strip("()[] ").split(",")]
            value = parts[0] if parts in (["None"], ["null"]) else [part for part in parts if part]
        return super()._read(name, value)


class _Study(Config):
    """What studies share: they make many runs of the three stages.

    Fields:
        dataset: of every run of the study.
        seeds: each gives a run; several give error bars.
        jobs: notebooks that run at a time; they share the processor's threads.
        vae, ssl, eval: further fields of that stage, as a dict or as JSON text; not those that the
            study sets itself.
    """

    sets: ClassVar[frozenset[str]]  # fields of SSLConfig that the study sets itself

    dataset: str = RECIPE
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    jobs: Positive = RECIPE
    device: str = "auto"
    vae: dict[str, Any] = Field(default_factory=dict)
    ssl: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        for stage in ("vae", "ssl", "eval"):
            self._check_free(stage, getattr(self, stage), stage)
        return {}

    def _check_free(self, name: str, fields: dict[str, Any], stage: str) -> None:
        further: dict[str, set[str]] = {"vae": set(), "ssl": {"vae", *self.sets}, "eval": {"run"}}
        own = {"preset", "dataset", "seed", "device"} | further[stage]
        if clash := sorted(fields.keys() & own):
            raise ConfigError(f"{name} cannot set {clash[0]!r}: the study sets it itself.")


class SweepConfig(_Study):
    """A sensitivity study: one field at a time around the middle (notebook 05).

    Fields (besides those of every study):
        figure: of the paper, whose axes the recipe gives values of: 6, ε, β and dim; 5, batch size,
            backbone and epochs. Its own values were not to be had: these are ours.
        adversary: of every run of the study.
        epsilons, betas, dims: values of each axis (an empty one is left out). A run that differs
            from the middle in one axis only is made for each value and each seed.
        axes: further fields of SSLConfig with their values, as a dict or as JSON text; each value
            with the adversary and without one.
        grid: a study of your own in place of these axes, as `idaa_lib.grids.Grid` describes it: a
            YAML file or a dict. What it leaves open is as the fields of every study say.
    """

    stage = "sweep"
    sets = frozenset({"adversary"})

    figure: Literal[6, 5] = 6
    adversary: Literal["idaa", "random_sign"] = "idaa"
    epsilons: tuple[NonNegative, ...] = ()
    betas: tuple[NonNegative, ...] = ()
    dims: tuple[Positive, ...] = ()
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    grid: dict[str, Any] | str | None = None

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        if clash := sorted(self.axes.keys() & FIXED):
            raise ConfigError(f"axes cannot vary {clash[0]!r}: the study sets it itself.")
        super()._derive(explicit)
        # Of the recipe's axes those of the figure; the user's own stand beside them.
        of_6: dict[str, Any] = {"epsilons": (), "betas": (), "dims": ()}
        others = of_6 if self.figure == 5 else {"axes": {}}
        return {name: value for name, value in others.items() if name not in explicit}


class CompareConfig(_Study):
    """The paper's main table: method × adversary, kNN and linear (notebook 06).

    Fields (besides those of every study):
        methods: the table's rows, registered methods or names in `systems`. adversaries: of each.
        launch: make what is missing; else the table is of the finished runs alone.
        elsewhere: another data set, a row more for each method: IDAA with a VAE that was trained
            there (does what it holds transfer?).
        systems: name → the fields of SSLConfig that a row of this name has, its method among them.
        ssl_of: method → further fields of SSLConfig for it alone, over `ssl`: such as a longer
            training where it learns more slowly than others.
    """

    stage = "compare"
    sets = frozenset({"method", "adversary"})

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "plain", "uel", "simsiam", "simclr", "moco", "byol",
    )  # fmt: skip
    adversaries: Annotated[tuple[str, ...], Field(min_length=1)] = ("none", "clae", "idaa")
    elsewhere: str | None = None
    launch: bool = False
    systems: dict[str, dict[str, Any]] = Field(default_factory=dict)
    ssl_of: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        for method, fields in self.ssl_of.items():
            if method not in self.methods:
                raise ConfigError(f"ssl_of has fields of {method!r}, which methods does not name.")
            self._check_free(f"ssl_of[{method!r}]", fields, "ssl")
        return super()._derive(explicit)


class SystemsConfig(CompareConfig):
    """Systems that fight augmentations, side by side (notebook 11).

    Fields (besides those of a comparison):
        transfer_to: another data set, on which the encoders are judged too.
    """

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "simclr_heads", "cassle", "augself", "ipirm", "byol_rsa", "rsa",
    )  # fmt: skip
    adversaries: Annotated[tuple[str, ...], Field(min_length=1)] = ("none", "idaa")
    transfer_to: str | None = None
