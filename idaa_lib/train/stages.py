"""The training stages: a configuration in, a finished run directory out."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from idaa_lib import adversaries, runs
from idaa_lib.configs import (
    ConfigError,
    EncoderConfig,
    SemiConfig,
    SSLConfig,
    TrainingConfig,
    VAEConfig,
)
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import features, load_vae
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.metrics import Accuracy, accuracy, effective_rank, embedding_std
from idaa_lib.methods import METHODS, Method, build_method
from idaa_lib.methods.fixmatch import CIFAR100, build_fixmatch
from idaa_lib.methods.semi_supervised import labelled_subset
from idaa_lib.methods.vae import VAETraining
from idaa_lib.nets import BACKBONES, evaluating
from idaa_lib.nets.vae import rate
from idaa_lib.runs import Run, RunError, Writer, checkpoints
from idaa_lib.runs.machine import describe, open_images, settled, uses_bf16
from idaa_lib.train.accelerator import make_accelerator, start_trackers
from idaa_lib.train.loop import Fit
from idaa_lib.views import recipe


@dataclass(frozen=True)
class _Plan:
    """All that a run depends on, found before any work starts."""

    config: Any
    run: Run
    data: ImageSet
    vae: Run | None
    start: Run | None


def settle(config: TrainingConfig) -> tuple[TrainingConfig, Run]:
    """What will be stored as `config.json` (paths and runs named in full), and the run directory
    that it leads to, whether it was trained yet or not.

    Raises: as `train_vae`.
    """
    plan = _plan(config)
    return plan.config, plan.run


def locate(config: TrainingConfig) -> Run:
    """The run directory alone."""
    return settle(config)[1]


def train(config: TrainingConfig) -> Run:
    """Train what `config` describes: see `train_vae`, `train_ssl` and `train_semi`."""
    by_kind: dict[type, Callable[[Any], Run]] = {
        VAEConfig: train_vae, SSLConfig: train_ssl, SemiConfig: train_semi,
    }  # fmt: skip
    return by_kind[type(config)](config)


def train_vae(config: VAEConfig) -> Run:
    """Train a VAE, or resume it, or show it if it is finished.

    Raises:
        ConfigError, RunError: one sentence, before work starts where it can be known then.
        Stopped: on Ctrl-C or a stop request, after the state was saved.
    """
    if not isinstance(config, VAEConfig):
        raise ConfigError(f"train_vae takes a VAEConfig, not a {type(config).__name__}.")
    plan = _plan(config)
    method = VAETraining(config, recipe(config.augmentation, config.size, *_units(plan.data)))

    val = _validation(config)

    def validate(method: Method, device: torch.device) -> dict[str, float]:
        return vae_figures(method.network, method.recipe, val.images, device)

    def summarise(figures: dict[str, float]) -> dict[str, Any]:
        final = {name.removesuffix("_val"): value for name, value in figures.items()}
        return final | {"kappa": config.kappa, "beta": config.beta, "dim": config.dim}

    return _train(plan, method, None, validate, 1, summarise)


def train_ssl(config: SSLConfig) -> Run:
    """Train an encoder, or resume it, or show it if it is finished.

    Raises: as `train_vae`.
    """
    if not isinstance(config, SSLConfig):
        raise ConfigError(f"train_ssl takes an SSLConfig, not a {type(config).__name__}.")
    plan = _plan(config)
    units = _units(plan.data)
    method = build_method(config, recipe(config.augmentation, config.size, *units))
    val, bank = _validation(config), plan.data
    if config.split == "trainval":  # which holds `val` itself: an image would find itself
        bank = open_images(config.dataset, "train", config.size, config.limit)

    def validate(method: Method, device: torch.device) -> dict[str, float]:
        def encode(split: ImageSet) -> Tensor:
            encoder = method.encoder("backbone")
            bf16 = uses_bf16(config.precision, device)
            return features(encoder, split.images, config.size, *units, device=device, bf16=bf16)

        z = encode(val)
        figures = {"effective_rank": effective_rank(z), "feature_std": embedding_std(z).item()}
        if val.labelled:
            guess = knn(encode(bank), bank.labels, z, classes=len(bank.classes))
            top1, low, high, _ = accuracy(guess, val.labels)
            figures |= {"knn_top1_val": top1, "knn_low_val": low, "knn_high_val": high}
        return figures

    def summarise(figures: dict[str, float]) -> dict[str, Any]:
        if not val.labelled:
            return figures | {"n_val": len(val)}
        k = min(200, len(bank))
        protocol = f"clean: backbone features, k={k}, τ=0.5, last epoch, validation split"
        if config.split == "trainval":
            protocol += ", whose images were trained on without their labels"
        return figures | {"knn_protocol": protocol, "n_val": len(val)}

    return _train(plan, method, _adversary(config, plan), validate, config.knn_every, summarise)


def train_semi(config: SemiConfig) -> Run:
    """Train a classifier from few labels, or resume it, or show it if it is finished.

    `summary.json` has the accuracy of the averaged weights on all test images, which are read once,
    after the last step: `ema_top1` in percent with `ema_n`, the 95 % interval `ema_low`, `ema_high`
    and `ema_protocol`; `ema_top1_val` is the last of those on validation.

    Raises: as `train_vae`.
    """
    if not isinstance(config, SemiConfig):
        raise ConfigError(f"train_semi takes a SemiConfig, not a {type(config).__name__}.")
    plan = _plan(config)
    if config.dataset == "cifar100":
        plan = replace(plan, data=replace(plan.data, mean=CIFAR100[0], std=CIFAR100[1]))
    units, classes = _units(plan.data), len(plan.data.classes)
    if not classes:
        raise ConfigError(f"dataset={config.dataset!r} has no labels to learn from.")
    labelled_subset(plan.data.labels, config.labels_per_class, classes, config.seed)  # if it can
    method = build_fixmatch(config, *units, classes)
    val, test = _validation(config), open_images(config.dataset, "test", config.size, None)
    if not (val.labelled and test.labelled):
        raise ConfigError(f"dataset={config.dataset!r} has no labels to validate and test against.")

    def judge(method: Method, split: ImageSet, device: torch.device) -> Accuracy:
        classifier, bf16 = method.encoder("classifier"), uses_bf16(config.precision, device)
        logits = features(classifier, split.images, config.size, *units, device=device, bf16=bf16)
        return accuracy(logits.argmax(1), split.labels)

    def validate(method: Method, device: torch.device) -> dict[str, float]:
        top1, low, high, _ = judge(method, val, device)
        return {"ema_top1_val": top1, "ema_low_val": low, "ema_high_val": high}

    def summarise(figures: dict[str, float]) -> dict[str, Any]:
        judged = judge(method, test, next(method.parameters()).device)._asdict()
        protocol = (
            f"clean: averaged weights, last epoch, all test images; {config.labels_per_class} "
            f"labels a class of {len(plan.data):,} training images"
        )
        if config.split == "trainval":
            protocol += ", those of validation among them"
        figures |= {f"ema_{name}": value for name, value in judged.items()}
        return figures | {"ema_protocol": protocol, "n_val": len(val)}

    return _train(plan, method, _adversary(config, plan), validate, 1, summarise)


def _adversary(config: EncoderConfig, plan: _Plan) -> Any:
    """The adversary that `config` names, for images normalised as those of the plan."""
    attack: dict[str, Any] = dict(
        epsilon=config.epsilon,
        steps=config.steps,
        step_size=config.step_size,
        norm=config.norm,
        random_start=config.random_start,
    )
    if config.adversary == "clae":
        return adversaries.CLAE(**attack)
    if plan.vae is None:
        return adversaries.NoAdversary()
    kind: Any = adversaries.RandomSign if config.adversary == "random_sign" else adversaries.IDAA
    mean, std = _units(plan.data)
    return kind(load_vae(plan.vae), **attack, mean=mean, std=std)


def _plan(config: TrainingConfig) -> _Plan:
    config = config.model_copy(update={"dataset": settled(config.dataset)})
    data = open_images(config.dataset, config.split, config.size, config.limit)
    vae = start = None
    if isinstance(config, EncoderConfig) and config.needs_vae:
        vae = _choose_vae(config)
        config = config.model_copy(update={"vae": vae.reference})
    if config.continue_from:
        start = runs.get(config.stage, config.continue_from)
        config = config.model_copy(update={"continue_from": start.reference})
    run = runs.run_for(
        config,
        data.fingerprint,
        vae=checkpoints.digest(vae) if vae else None,
        start=checkpoints.digest(start) if start else None,
        code=_own_code(config),
    )
    return _Plan(config, run, data, vae, start)


def _own_code(config: TrainingConfig) -> str | None:
    """Digest of the source of a method or backbone that is not ours: edited, it is another run.

    Our own is covered by `runs.RESULTS_VERSION`.
    """
    sources = []
    for made in foreign(config).values():
        with contextlib.suppress(OSError, TypeError):  # typed at a prompt: no source to read
            sources.append(inspect.getsource(made))
    return hashlib.sha256("".join(sources).encode()).hexdigest() if sources else None


def foreign(config: TrainingConfig) -> dict[str, Any]:
    """The method and backbone of `config` that are not ours, by name: only a process that imports
    the module that registers them knows them."""
    if not isinstance(config, EncoderConfig):
        return {}
    known: dict[str, Any] = {config.backbone: BACKBONES.get(config.backbone)}
    if isinstance(config, SSLConfig):
        known[config.method] = METHODS.get(config.method)
    ours = ("idaa_lib", "functools")
    return {
        name: made
        for name, made in known.items()
        if not getattr(made, "__module__", "idaa_lib").startswith(ours)
    }


def _choose_vae(config: EncoderConfig) -> Run:
    """The VAE run asked for, or the newest that fits the data and size; which one is printed."""
    wanted: dict[str, Any] = {"size": config.size}
    if config.dim is not None:
        wanted["dim"] = config.dim
    if config.vae is None:
        run = runs.get("vae", None, dataset=config.dataset, **wanted)
        print(f"vae: {run.id} (the newest that fits)")
        return run
    run = runs.get("vae", config.vae)
    if run.config.dataset != config.dataset:
        print(f"vae: {run.id} was trained on {run.config.dataset}, not on {config.dataset}.")
    for name, value in wanted.items():
        if (found := getattr(run.config, name)) != value:
            raise ConfigError(f"vae={run.id!r} has {name}={found}, and this run needs {value}.")
    return run


def _validation(config: TrainingConfig) -> ImageSet:
    # limit bounds the cost of a demo, and a quarter of it is enough to see a curve.
    limit = None if config.limit is None else max(1, config.limit // 4)
    return open_images(config.dataset, "val", config.size, limit)


def _units(data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return data.mean, data.std


def _train(
    plan: _Plan,
    method: Method,
    adversary: Any,
    validate: Callable[[Method, torch.device], dict[str, float]],
    validate_every: int,
    summarise: Callable[[dict[str, float]], dict[str, Any]],
) -> Run:
    """What the stages share: lock, room on the disk, resume, loop, summary."""
    config, run = plan.config, plan.run
    if run.finished:
        print(f"{run.id} is finished: showing its result.")
        return run
    begun = _begun(plan, method)
    accelerator = make_accelerator(config, run.path)
    _check_disk(config, run, method)
    if isinstance(adversary, adversaries.IDAA):
        adversary.vae.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit = Fit(
        accelerator,
        method,
        plan.data.images,
        plan.data.labels,
        config,
        adversary,
        getattr(config, "alpha", 1.0),
        lambda method: validate(method, accelerator.device),
        validate_every,
        getattr(config, "keep_every", None),
    )
    with _writer(plan, accelerator) as fit.writer:
        if run.finished:  # another process was faster between the look and the lock
            return run
        resumed = checkpoints.load(run)
        if resumed is not None:
            fit.load(*resumed, anew=False)
            print(f"{run.id}: going on after step {fit.step} of {fit.total}.")
        elif begun is not None:
            fit.load(*begun, anew=True)
        if fit.writer is not None:
            fit.writer.rewind(fit.step)
        start_trackers(accelerator, config, run)
        try:
            figures = fit.run()
        finally:
            accelerator.end_training()
        if fit.writer is not None:
            done = fit.step * method.images_per_step(config.batch_size)
            speed = {"seconds": fit.seconds, "images_per_second": done / max(fit.seconds, 1e-9)}
            fit.writer.finish(summarise(figures) | speed)
    return run


@contextlib.contextmanager
def _writer(plan: _Plan, accelerator: Accelerator) -> Iterator[Writer | None]:
    """The writer in the first process, None in the others."""
    if not accelerator.is_main_process:
        yield None
        return
    about = describe(accelerator.device, accelerator.mixed_precision, plan.data)
    mean, std = _units(plan.data)
    model = {
        "size": plan.config.size,
        "mean": list(mean),
        "std": list(std),
        "classes": len(plan.data.classes),
    }
    with plan.run.writing(plan.config, about, model) as writer:
        yield writer


def _begun(plan: _Plan, method: Method) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint that `continue_from` names, if its weights are this method's."""
    if plan.start is None or (found := checkpoints.load(plan.start)) is None:
        return None
    theirs = {k.removeprefix("method."): v.shape for k, v in found[0].items() if "method." in k}
    ours = {k: v.shape for k, v in method.state_dict().items()}
    if theirs != ours:
        names = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
        raise ConfigError(
            f"continue_from={plan.start.id!r} has other weights: {len(names)} differ in name or "
            f"shape, the first {names[0]} (other width, dim, method, or norms of an adversary)."
        )
    return found


def _check_disk(config: TrainingConfig, run: Run, method: nn.Module) -> None:
    """Room for the checkpoints that are kept and the one being written, and for snapshots, before
    work starts."""
    weights = sum(p.numel() * p.element_size() for p in method.state_dict().values())
    need = 3 * weights * (checkpoints.KEEP + 1)  # Adam's two moments beside the weights
    if every := getattr(config, "keep_every", None):
        # Those that an interrupted run has already take their room.
        need += weights * max(0, (config.epochs - 1) // every - len(checkpoints.snapshots(run)))
    folder = runs.outputs_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RunError(
            f"{folder} cannot hold runs ({error}): set IDAA_OUTPUTS elsewhere."
        ) from error
    if free < need:
        raise RunError(
            f"No space for {run.id}: its checkpoints need {need / 2**20:.0f} MiB, and the disk of "
            f"{folder} has {free / 2**20:.0f} MiB free."
        )


@torch.no_grad()
def vae_figures(
    vae: nn.Module, recipe_: Any, data: Tensor, device: torch.device
) -> dict[str, float]:
    """On un-augmented validation images: reconstruction (MSE), kl (the loss's term), rate in nats,
    and the official acc_gx = 1 − mean ‖x−G‖²/‖x‖², acc_rx = 1 − mean ‖G‖²/‖x‖² (spec §1)."""
    transform = recipe("none", recipe_.size, recipe_.mean, recipe_.std)
    error, nats, gx, rx = 0.0, 0.0, 0.0, 0.0
    with evaluating(vae):
        for batch in data.split(500):
            x = transform(batch.to(device), None).images
            _, G, mu, logvar = vae.forward(x)  # a compiled one would be compiled anew, for these
            energy = x.square().flatten(1).sum(1)
            missed = (x - G).square().flatten(1).sum(1)
            error += missed.sum().item()
            nats += rate(mu.float(), logvar.float()).sum().item()
            gx += (missed / energy).sum().item()
            rx += (G.float().square().flatten(1).sum(1) / energy).sum().item()
    n = len(data)
    rate_nats = nats / n
    return {
        "reconstruction_val": error / (n * 3 * recipe_.size**2),
        "kl_val": rate_nats / (3 * mu.shape[1]),
        "rate_nats_val": rate_nats,
        "acc_gx_val": 1 - gx / n,
        "acc_rx_val": 1 - rx / n,
    }
