"""Transfer: frozen features on other data, the protocol of Kornblith et al. 2019
(arXiv:1805.08974), inferred to be the paper's too (docs/spec/idaa.md §5); and probes from few
labels.

Features are taken as they are, not standardised. The penalty λ multiplies ‖W‖² beside the summed
cross-entropy, bias free, as in Kornblith's own code; per image of the mean that is 2λ/N of ½‖W‖²,
so the refit on more images is penalised less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, TransferConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import Encoder, features, load_encoder, random_encoder
from idaa_lib.evaluate.few_shot import balanced, draw_episodes, few_shot
from idaa_lib.evaluate.linear import (
    Axes,
    choose,
    logistic_regression,
    predict,
    principal_axes,
)
from idaa_lib.evaluate.metrics import (
    accuracy,
    mean_per_class,
    mean_per_class_interval,
    student_interval,
    top1,
)
from idaa_lib.runs import Run, Stopped, checkpoints
from idaa_lib.runs.machine import describe, open_images, settled, torch_device, uses_bf16
from idaa_lib.views import keyed_generator

LAMBDAS = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))
IMAGENET_SIZE = 224
# By convention judged by the mean of the classes' accuracies, since their classes differ in size.
PER_CLASS = frozenset({"fgvcaircraft", "oxfordiiitpet", "flowers102", "caltech101"})
# The encoders of the rows: the run's own, and the same before training.
ENCODERS: dict[str, Callable[[Run], Encoder]] = {"encoder": load_encoder, "random": random_encoder}


class Probe(NamedTuple):
    """Predictions (Q,) int64 on the device; the λ that validation chose, and its score there."""

    predictions: Tensor
    penalty: float
    score_val: float


def transfer(config: TransferConfig) -> Run:
    """Judge a finished SSL run's encoder on other data; a finished transfer is given back as is, an
    interrupted one goes on after the last encoder that was judged on a data set.

    `rows` of the run's `summary.json` hold, for each data set and encoder, accuracies in percent
    with their 95 % interval: `linear` on all labels, one for each share of the labels, one for each
    number of shots. `left_out` says why a data set, or its episodes, have none.

    Raises:
        RunError: the SSL run is missing or unfinished. ConfigError: no data set can be used.
        Stopped: on a request to stop or pause, between two encoders.
    """
    plan = _plan(config)
    config, run = plan.config, plan.run
    for name, reason in plan.left_out.items():
        print(f"{name} is left out: {reason}")
    if run.finished:
        print(f"{run.id} is finished: showing its result.")
        return run
    device = torch_device(config.device)
    bf16 = uses_bf16(config.precision, device)
    about = [describe(device, "bf16" if bf16 else "no", s["test"]) for s in plan.targets]
    environment = about[0] | {"datasets": [each["dataset"] for each in about]}
    with run.writing(config, environment) as writer:
        began = time.monotonic()
        # What was judged before an interruption, by data set and encoder.
        _, before = checkpoints.load(run) or ({}, {"rows": {}, "seconds": 0.0})
        judged, seconds = before["rows"], before["seconds"]
        left_out = dict(plan.left_out)
        for splits in plan.targets:
            episodes = _episodes(splits["test"], config, left_out)
            for name in list(ENCODERS)[: 2 if config.references else 1]:
                key = f"{name} on {splits['test'].fingerprint}"
                if key in judged:
                    continue
                encoded = _encode(ENCODERS[name](plan.source), splits, plan.size, device, bf16)
                found = _judge(encoded, splits, episodes, config, plan.size)
                judged[key] = [{"features": name, **row} for row in found]
                told = ", ".join(f"{row['probe']} {row['value']:.1f}" for row in found)
                print(f"{splits['test'].name}, {name}: {told} (%)")
                now = seconds + time.monotonic() - began
                checkpoints.save(run, len(judged), {}, {"rows": judged, "seconds": now})
                if writer.request() is not None:
                    raise Stopped(
                        f"Stopped after the {name} row of {splits['test'].name} and saved: start "
                        f"the same transfer again to go on."
                    )
        rows = [row for found in judged.values() for row in found]
        result = {"rows": rows, "left_out": left_out, "size": plan.size}
        writer.finish(result | {"seconds": seconds + time.monotonic() - began})
    return run


def kornblith_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: Tensor,
    *,
    classes: int,
    score: Callable[[Tensor, Tensor], float] = top1,
    refit: bool = True,
    iterations: int = 50,
    tolerance: float = 1e-5,
    axes: Axes | None = None,
) -> Probe:
    """Multinomial logistic regression: one of 45 λ by validation, refit on both, predict once.

    Args:
        train, val: (features (N, D), labels (N,)). test: features (Q, D).
        score: of predictions and labels, by which λ is chosen.
        refit: on train and val together; else the chosen weights of `train` are kept.
        iterations, tolerance, axes: as in `linear.logistic_regression`, for each λ. Below 1e-7 it
            works in float64: in float32 such a gradient is rounding.
    """
    (x, y), (x_val, y_val) = train, val
    if tolerance < 1e-7:
        x, x_val, test = x.double(), x_val.double(), test.double()
        axes = None if axes is None else Axes(*(part.double() for part in axes))
    axes = axes or principal_axes(x)
    solver: dict[str, Any] = dict(iterations=iterations, tolerance=tolerance, axes=axes)
    of_mean = {2 * decay / len(y): decay for decay in LAMBDAS}
    best = choose((x, y), (x_val, y_val), classes, tuple(of_mean), score=score, **solver)
    decay, weights = of_mean[best.penalty], best.weights
    if refit:
        x, y = torch.cat([x, x_val]), torch.cat([y, y_val])
        weights = logistic_regression(x, y, classes, 2 * decay / len(y), start=weights, **solver)
    return Probe(predict(weights, test), decay, best.score)


class _Plan(NamedTuple):
    config: TransferConfig
    run: Run
    source: Run
    size: int
    targets: list[dict[str, ImageSet]]
    left_out: dict[str, str]


def _plan(config: TransferConfig) -> _Plan:
    source = runs.get("ssl", config.run)
    trained = source.config
    size = config.size or (IMAGENET_SIZE if trained.stem == "imagenet" else trained.size)
    names = tuple(map(settled, config.datasets or (trained.dataset,)))
    config = config.model_copy(update={"run": source.reference, "datasets": names})
    targets, left_out = [], {}
    for name in dict.fromkeys(names):
        try:
            targets.append(_open(name, size, config.limit))
        except ConfigError as error:
            left_out[name] = str(error)
    if not targets:
        first, more = next(iter(left_out.values())), len(left_out) - 1
        others = f" (and neither can {more} more)" if more else ""
        raise ConfigError(f"No data set can be transferred to{others}: {first}")
    fingerprints = " ".join(splits["test"].fingerprint for splits in targets)
    run = runs.run_for(config, fingerprints, encoder=checkpoints.digest(source))
    return _Plan(config, run, source, size, targets, left_out)


def _open(name: str, size: int, limit: int | None) -> dict[str, ImageSet]:
    splits = {s: open_images(name, s, size, limit) for s in ("train", "val", "test")}
    if not splits["train"].labelled:
        raise ConfigError(f"dataset={name!r} has no labels to evaluate against.")
    return splits


def _encode(
    encoder: Encoder, splits: Mapping[str, ImageSet], size: int, device: torch.device, bf16: bool
) -> dict[str, Tensor]:
    """Features of each split, encoded once, on the device."""
    module, _, mean, std = encoder.to(device)
    return {
        name: features(module, split.images, size, mean, std, device=device, bf16=bf16).to(device)
        for name, split in splits.items()
    }


def _episodes(
    test: ImageSet, config: TransferConfig, left_out: dict[str, str]
) -> dict[int, Tensor]:
    """Episodes of each number of shots, the same for every encoder."""
    found = {}
    for shots in config.shots:
        try:
            found[shots] = draw_episodes(
                test.labels, config.ways, shots, config.queries, config.episodes, config.seed
            )
        except ValueError as error:
            left_out[f"{test.name}, {config.ways}-way {shots}-shot"] = f"only {error}."
    return found


class _Target(NamedTuple):
    """One encoder on one data set: features and labels by split on the device, and how to judge."""

    z: dict[str, Tensor]
    y: dict[str, Tensor]
    name: str
    size: int
    score: Callable[[Tensor, Tensor], float]
    solver: dict[str, Any]

    def row(self, probe: str, **figures: Any) -> dict[str, Any]:
        metric = "mean per class" if self.score is mean_per_class else "top-1"
        return {"dataset": self.name, "probe": probe, "metric": metric, **figures}

    @property
    def protocol(self) -> str:
        return (
            f"{self.size} px, frozen features as they are; L-BFGS on Σ cross-entropy + λ‖W‖², one "
            f"of {len(LAMBDAS)} λ chosen on val"
        )


def _judge(
    z: dict[str, Tensor],
    splits: Mapping[str, ImageSet],
    episodes: Mapping[int, Tensor],
    config: TransferConfig,
    size: int,
) -> list[dict[str, Any]]:
    """The rows of one encoder on one data set."""
    test = splits["test"]
    score = mean_per_class if test.name in PER_CLASS else top1
    solver: dict[str, Any] = dict(
        classes=len(test.classes), score=score, iterations=config.iterations,
        tolerance=config.tolerance, axes=principal_axes(z["train"]),
    )  # fmt: skip
    y = {name: split.labels.to(z[name].device) for name, split in splits.items()}
    target = _Target(z, y, test.name, size, score, solver)
    return [
        _linear(target),
        *(_few_labels(target, fraction, config) for fraction in dict.fromkeys(config.fractions)),
        *(_few_shots(target, part, shots, config) for shots, part in episodes.items()),
    ]


def _linear(target: _Target) -> dict[str, Any]:
    (z, y) = target.z, target.y
    probe = kornblith_probe(
        (z["train"], y["train"]), (z["val"], y["val"]), z["test"], **target.solver
    )
    found, labels = probe.predictions.cpu(), y["test"].cpu()
    of_images = accuracy(found, labels)
    low, high = of_images.low, of_images.high
    if target.score is mean_per_class:
        _, low, high = mean_per_class_interval(found, labels)
    return target.row(
        "linear", value=target.score(found, labels), low=low, high=high, n=len(labels),
        of="test images", labels=len(y["train"]) + len(y["val"]), top1=of_images.top1,
        mean_per_class=mean_per_class(found, labels), penalty=probe.penalty,
        score_val=probe.score_val,
        protocol=f"{target.protocol}, refit on train + val, test read once",
    )  # fmt: skip


def _few_labels(target: _Target, fraction: float, config: TransferConfig) -> dict[str, Any]:
    z, y = target.z, target.y
    labels = y["train"].cpu()
    found = []
    for draw in range(config.draws):
        index = balanced(labels, fraction, keyed_generator(config.seed, draw)).to(y["train"].device)
        few = z["train"][index], y["train"][index]
        probe = kornblith_probe(few, (z["val"], y["val"]), z["test"], refit=False, **target.solver)
        found.append(target.score(probe.predictions, y["test"]))
    return target.row(
        f"{100 * fraction:g} % of labels", **student_interval(found)._asdict(), n=len(found),
        of="draws", labels=len(index),
        protocol=f"{target.protocol} (all of it), labels drawn by class, no refit",
    )  # fmt: skip


def _few_shots(
    target: _Target, episodes: Tensor, shots: int, config: TransferConfig
) -> dict[str, Any]:
    found = few_shot(target.z["test"], episodes, shots, config.few_shot).cpu()
    about = target.row(
        f"{config.ways}-way {shots}-shot", **student_interval(found)._asdict(), n=len(found),
        of="episodes", labels=config.ways * shots,
        protocol=f"{target.size} px, frozen features, L2-normalised; {config.few_shot}, "
        f"{config.queries} queries a class, all images from test",
    )  # fmt: skip
    return about | {"metric": "top-1"}
