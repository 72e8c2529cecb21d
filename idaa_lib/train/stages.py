"""The training stages: a configuration in, a finished run directory out."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.adversaries import Adversary, VAEOptions, build_adversary
from idaa_lib.configs import (
    ConfigError,
    EncoderConfig,
    SemiConfig,
    SSLConfig,
    TrainingConfig,
    VAEConfig,
)
from idaa_lib.configs.lookups import once
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import features, load_vae
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.metrics import Accuracy, accuracy, effective_rank, embedding_std
from idaa_lib.methods import About, Method, build_method
from idaa_lib.methods.fixmatch import labelled_subset
from idaa_lib.methods.vae import VAETraining, vae_figures
from idaa_lib.registry import source
from idaa_lib.runs import Run, Writer, checkpoints
from idaa_lib.runs.choice import has_images
from idaa_lib.runs.directory import explain_memory
from idaa_lib.runs.machine import (
    describe,
    drop_unlabelled,
    open_images,
    resolve_paths,
    uses_bf16,
)
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.train.accelerator import check_tracker, make_accelerator, start_trackers
from idaa_lib.train.limits import check_disk, check_memory
from idaa_lib.train.loop import Fit, Pulse, Validation
from idaa_lib.views import recipe


@dataclass(frozen=True)
class TrainingPlan(Plan):
    """A `Plan` with what a training reads: its images, and the runs that it starts from."""

    data: ImageSet
    vae: Run | None
    start: Run | None


def _units(config: TrainingConfig, data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std that images are normalised with."""
    return config.mean or data.mean, config.std or data.std


def _about(config: TrainingConfig, data: ImageSet, labels: Tensor | None = None) -> About:
    """What a method may know; labels: those of the images where they were not read."""
    return About(
        recipe(config.augmentation, config.size, *_units(config, data)),
        data.labels if labels is None else labels,
        len(data.classes),
        config.epochs,
        config.batch_size,
        config.seed,
    )


def check_start(config: TrainingConfig, data: ImageSet | None = None) -> None:
    """Look whether a training can begin here, whatever runs it will start from.

    data: its images, where they are to be read now; else they are described, and none is decoded.

    Raises:
        ConfigError: images that cannot be read, a batch of more than there are, a tracker that is
            not installed, too little memory.
    """
    images = _open_own(config) if data is None else data
    labels = torch.full((len(images),), -1) if data is None else data.labels
    # Of a grid's thousand configurations most have the same networks.
    sizes = [(k, v) for k, v in config if not isinstance(v, float) and k not in ("seed", "limit")]
    once(("memory", repr(sizes)), lambda: check_memory(config, _about(config, images, labels)))
    if config.batch_size > len(images):
        raise ConfigError(
            f"batch_size={config.batch_size} is more than the {len(images)} training images."
        )
    check_tracker(config)


def _open_own(config: TrainingConfig) -> ImageSet:
    """The images that a training learns from, at the size that they are kept at."""
    size = config.source_size or config.size
    return open_images(config.dataset, config.split, size, config.limit, **config.reading)


def settle(config: TrainingConfig) -> tuple[TrainingConfig, Run]:
    """What will be stored as `config.json` (paths and runs named in full), and the run directory
    that it leads to, whether it was trained yet or not.

    Raises: as `train`.
    """
    plan = _plan(config)
    return plan.config, plan.run


def locate(config: TrainingConfig) -> Run:
    """The run directory alone."""
    return settle(config)[1]


def train(config: TrainingConfig) -> Run:
    """The finished run of `config`: trained, resumed, or shown if it is finished.

    Raises:
        ConfigError, RunError: one sentence, before work starts where it can be known then.
        Stopped: on Ctrl-C or a stop request, after the state was saved.
    """
    return {"vae": train_vae, "ssl": train_ssl, "semi": train_semi}[config.stage](config)  # type: ignore[operator]


def train_vae(config: VAEConfig) -> Run:
    """The finished run of a VAE, as `train` makes it."""
    plan, val = _begin(config, VAEConfig)

    def validate(method: Method, pulse: Pulse) -> dict[str, float]:
        return vae_figures(method.network, method.recipe, val.images, pulse)

    def summarise(figures: dict[str, float]) -> dict[str, Any]:
        final = {name.removesuffix("_val"): value for name, value in figures.items()}
        return final | {"kappa": config.kappa, "beta": config.beta, "dim": config.dim}

    return _train(
        plan, lambda: VAETraining(plan.config, _about(plan.config, plan.data)), validate, summarise
    )


def train_ssl(config: SSLConfig) -> Run:
    """The finished run of an encoder that needs no labels, as `train` makes it."""
    plan, val = _begin(config, SSLConfig)
    bank = plan.data
    # `trainval` holds `val` itself: an image would find itself.
    if config.split == "trainval" or bank.size != config.size:
        bank = _open(config, "train", config.limit)

    @functools.cache
    def validation_sets() -> tuple[ImageSet, ImageSet]:
        return drop_unlabelled(bank), drop_unlabelled(val)

    def validate(method: Method, pulse: Pulse) -> dict[str, float]:
        z = _features(plan, method, "backbone", val, pulse).to(next(method.parameters()).device)
        figures = {"effective_rank": effective_rank(z), "feature_std": embedding_std(z).item()}
        neighbours, queries = validation_sets()
        if len(neighbours) and len(queries):
            features_ = _features(plan, method, "backbone", neighbours, pulse)
            rows = z[(val.labels >= 0).to(z.device)]
            guess = knn(features_, neighbours.labels, rows, classes=len(bank.classes))
            top1, low, high, _ = accuracy(guess.cpu(), queries.labels)
            figures |= {"knn_top1_val": top1, "knn_low_val": low, "knn_high_val": high}
        return figures

    def summarise(figures: dict[str, float]) -> dict[str, Any]:
        if "knn_top1_val" not in figures:
            return figures | {"n_val": len(val)}
        neighbours, queries = validation_sets()
        k = min(200, len(neighbours))
        protocol = f"clean: backbone features, k={k}, τ=0.5, last epoch, validation split"
        if config.split == "trainval":
            protocol += ", whose images were trained on without their labels"
        return figures | {"knn_protocol": protocol, "n_val": len(queries)}

    return _train(
        plan, lambda: build_method(plan.config, _about(plan.config, plan.data)), validate, summarise
    )


def train_semi(config: SemiConfig) -> Run:
    """The finished run of a classifier from few labels, as `train` makes it.

    `summary.json` has the accuracy of the averaged weights on all test images, which are read once,
    after the last step: `ema_top1` in percent with `ema_n`, the 95 % interval `ema_low`, `ema_high`
    and `ema_protocol`; `ema_top1_val` is the last of those on validation.
    """
    plan, val = _begin(config, SemiConfig)
    if plan.run.finished:
        return perform(plan, lambda writer: {})
    classes, per_class = len(plan.data.classes), config.labels_per_class
    if not classes:
        raise ConfigError(f"dataset={config.dataset!r} has no labels to learn from.")
    labelled_subset(plan.data.labels, per_class, classes, config.seed)  # raises if it cannot
    method = build_method(plan.config, _about(plan.config, plan.data))
    test = drop_unlabelled(_open(config, "test", None))
    if not (len(val := drop_unlabelled(val)) and len(test)):
        raise ConfigError(f"dataset={config.dataset!r} has no labels to validate and test against.")

    def judge(method: Method, split: ImageSet, pulse: Pulse) -> Accuracy:
        logits = _features(plan, method, "classifier", split, pulse)
        return accuracy(logits.argmax(1), split.labels)

    def validate(method: Method, pulse: Pulse) -> dict[str, float]:
        top1, low, high, _ = judge(method, val, pulse)
        return {"ema_top1_val": top1, "ema_low_val": low, "ema_high_val": high}

    def summarise(figures: dict[str, float]) -> dict[str, Any]:
        values = judge(method, test, lambda done: None)._asdict()
        protocol = (
            f"clean: averaged weights, last epoch, all test images; {per_class} labels a class of "
            f"{len(plan.data):,} training images"
        )
        if config.split == "trainval":
            protocol += ", those of validation among them"
        figures |= {f"ema_{name}": value for name, value in values.items()}
        return figures | {"ema_protocol": protocol, "n_val": len(val)}

    return _train(plan, lambda: method, validate, summarise)


def _begin(config: TrainingConfig, kind: type[TrainingConfig]) -> tuple[TrainingPlan, ImageSet]:
    """The plan of a training, and its validation images."""
    if not isinstance(config, kind):
        name = type(config).__name__
        raise ConfigError(f"train_{kind.stage} takes a {kind.__name__}, not a {name}.")
    # limit bounds the cost of a demo, and a quarter of it is enough to see a curve.
    limit = None if config.limit is None else max(1, config.limit // 4)
    plan = _plan(config)
    if plan.vae and not getattr(config, "vae", None):
        print(f"vae: {plan.vae.id} (none was named, and it fits)")
    if not plan.run.finished:  # whose images, perhaps a million, need no look
        check_start(plan.config, plan.data)
    return plan, _open(config, "val", limit)


def _open(config: TrainingConfig, split: str, limit: int | None) -> ImageSet:
    """Images to judge with: of `size` pixels, at whatever size those to train on are kept."""
    return open_images(config.dataset, split, config.size, limit, **config.reading)


def _features(
    plan: TrainingPlan, method: Method, layer: str, split: ImageSet, pulse: Pulse
) -> Tensor:
    device = next(method.parameters()).device
    return features(
        method.encoder(layer),
        split.images,
        plan.config.size,
        *_units(plan.config, plan.data),
        device=device,
        bf16=uses_bf16(plan.config.precision, device),
        pulse=pulse,
    )


def _plan(config: TrainingConfig) -> TrainingPlan:
    config = resolve_paths(config)
    data = _open_own(config)
    vae = start = None
    if isinstance(config, EncoderConfig) and config.needs_vae:
        vae = _choose_vae(config)
        config = config.replace(vae=vae.reference)
    if config.continue_from:
        start = runs.get(config.stage, config.continue_from)
        config = config.replace(continue_from=start.reference)
    run = runs.run_for(
        config,
        data.fingerprint,
        vae=checkpoints.digest(vae) if vae else None,
        start=checkpoints.digest(start) if start else None,
        code=_own_code(config),
    )
    return TrainingPlan(config, run, data, vae, start)


def _own_code(config: TrainingConfig) -> str | None:
    """Digest of the files that register classes that are not ours: edited, it is another run.

    Our own are covered by `runs.RESULTS_VERSION`.
    """
    try:
        texts = sorted({text for kind in config.foreign().values() if (text := source(kind))})
    except ValueError as error:  # edited, and not imported again
        raise ConfigError(str(error)) from None
    return hashlib.sha256("".join(texts).encode()).hexdigest() if texts else None


def _choose_vae(config: EncoderConfig) -> Run:
    """The VAE run asked for, or one that fits the data and size."""
    if not isinstance(config.options("adversary"), VAEOptions):
        raise ConfigError(
            f"adversary={config.adversary!r} needs a VAE, so its Options must be a subclass of "
            f"idaa_lib.VAEOptions, which has the knobs vae and dim."
        )
    if config.vae is None:
        needs = _needs_of_vae(config)
        return runs.get("vae", None, dataset=config.dataset, classes=config.classes, **needs)
    run = runs.get("vae", config.vae)
    if not has_images(run, config.dataset, config.classes):
        print(f"vae: {run.id} was trained on {run.config.dataset}, not on {config.dataset}.")
    check_vae(config, run.config, f"vae={run.id!r}")
    return run


def check_vae(config: EncoderConfig, vae: VAEConfig, name: str) -> None:
    """Raises a ConfigError where an encoder cannot be trained with this VAE, called `name`."""
    for field, value in _needs_of_vae(config).items():
        if (other := getattr(vae, field)) != value:
            raise ConfigError(f"{name} has {field}={other}, and this run needs {value}.")


def _needs_of_vae(config: EncoderConfig) -> dict[str, Any]:
    return {"size": config.size} | ({} if config.dim is None else {"dim": config.dim})


def _train(
    plan: TrainingPlan,
    build: Callable[[], Method],
    validate: Validation,
    summarise: Callable[[dict[str, float]], dict[str, Any]],
) -> Run:
    """What the stages share: room on the disk, the loop, the summary."""
    config, run = plan.config, plan.run
    if run.finished:  # no look at the images, which may be a million
        return perform(plan, lambda writer: {})
    method = build()
    weights = _weights_of(plan, method)
    accelerator = make_accelerator(config, run.path)
    check_disk(config, run, method)
    adversary: Adversary | None = None
    mean, std = _units(config, plan.data)
    if isinstance(config, EncoderConfig):
        vae = load_vae(plan.vae) if plan.vae else None
        adversary = build_adversary(config, vae, mean=mean, std=std)
    with explain_memory(run, config):  # of the GPU, where the network goes there
        fit = Fit(accelerator, method, plan.data.images, config, adversary, validate)
    if weights is not None and checkpoints.load(run) is None:
        fit.restore(weights, None)

    def body(writer: Writer | None) -> dict[str, Any]:
        start_trackers(accelerator, config, run)
        try:
            figures = fit.run(run, writer)
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
        total, seconds = fit.total * method.images_per_step(), fit.steps.seconds
        speed = {"seconds": seconds, "images_per_second": total / max(seconds, 1e-9)}
        return summarise(figures) | speed

    about = describe(accelerator.device, accelerator.mixed_precision, plan.data)
    model = {"size": config.size, "mean": mean, "std": std, "classes": len(plan.data.classes)}
    return perform(replace(plan, environment=about, model=model), body)


def _weights_of(plan: TrainingPlan, method: Method) -> dict[str, Tensor] | None:
    """The tensors of the checkpoint that `continue_from` names, if they are this method's.

    The method's own buffers (a queue, partitions of the data) are those of a new run where the
    other run's have other names or shapes, are missing, or are of other images.
    """
    if plan.start is None or (checkpoint := checkpoints.load(plan.start)) is None:
        return None
    tensors, state = checkpoint
    stored = method.state_dict()  # a buffer that is not persistent is made anew in any case
    buffers = {k: b for k, b in method.named_buffers(recurse=False) if k in stored}
    fresh = {f"method.{name}": buffer for name, buffer in buffers.items()}
    lacks = state.get("lacks", [])
    other = plan.start.environment.get("dataset", {}).get("fingerprint") != plan.data.fingerprint
    parameters = {f"method.{name}" for name, _ in method.named_parameters(recurse=False)}
    own = re.compile(r"method\.\w+")  # a tensor of a module inside it has a further dot in its name
    old = {k: v for k, v in tensors.items() if own.fullmatch(k) and k not in parameters}
    shapes = [{k: v.shape for k, v in buffers.items()} for buffers in (old, fresh)]
    if lacks or shapes[0] != shapes[1] or (other and fresh):
        if names := lacks or [name.removeprefix("method.") for name in fresh]:
            print(f"{plan.start.id} lacks {', '.join(names)} for this run: new ones are made.")
        tensors = {k: v for k, v in tensors.items() if k not in old} | fresh
    theirs = {k: v.shape for k, v in checkpoints.under("method.", tensors).items()}
    ours = {k: v.shape for k, v in stored.items()}
    if theirs != ours:
        names = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
        raise ConfigError(
            f"continue_from={plan.start.id!r} has other weights: {len(names)} differ in name or "
            f"shape, the first {names[0]} (other width, dim, method, or norms of an adversary)."
        )
    before, now = plan.start.config, plan.config
    if any(getattr(before, k, None) != getattr(now, k, None) for k in ("method", "optimizer")):
        # Its moments mean something else, or are of other parameters.
        print(f"{plan.start.id} was trained by another optimiser or method: moments start at 0.")
        tensors = {k: v for k, v in tensors.items() if k.startswith("method.")}
    return tensors
