"""Transfer: frozen features on other data, the protocol of Kornblith et al. 2019
(arXiv:1805.08974), inferred to be the paper's too (docs/spec/idaa.md §5); and probes from few
labels.

Features are taken as they are, not standardised. The penalty λ multiplies ‖W‖² beside the summed
cross-entropy, bias free, as in Kornblith's own code; per image of the mean that is 2λ/N of ½‖W‖²,
so the refit on more images is penalised less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, TransferConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import Encoder, features, load_encoder, random_encoder
from idaa_lib.evaluate.few_shot import balanced, draw_episodes, few_shot
from idaa_lib.evaluate.metrics import (
    accuracy,
    mean_per_class,
    mean_per_class_interval,
    student_interval,
    top1,
)
from idaa_lib.evaluate.probe import (
    LAMBDAS,
    TRANSFER,
    Probe,
    Protocol,
    linear_probe,
    principal_axes,
)
from idaa_lib.runs import Run, Stopped, checkpoints
from idaa_lib.runs.machine import describe, open_images, settled, torch_device, uses_bf16
from idaa_lib.views import keyed_generator

IMAGENET_SIZE = 224
# By convention judged by the mean of the classes' accuracies, since their classes differ in size.
PER_CLASS = frozenset({"fgvcaircraft", "oxfordiiitpet", "flowers102", "caltech101"})
# The encoders of the rows: the run's own, and the same before training.
ENCODERS: dict[str, Callable[[Run], Encoder]] = {"encoder": load_encoder, "random": random_encoder}


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


def _judge(
    z: Mapping[str, Tensor],
    splits: Mapping[str, ImageSet],
    episodes: Mapping[int, Tensor],
    config: TransferConfig,
    size: int,
) -> list[dict[str, Any]]:
    """The rows of one encoder on one data set: all labels, few labels, few shots."""
    test = splits["test"]
    y = {name: split.labels.to(z[name].device) for name, split in splits.items()}
    by_class = test.name in PER_CLASS
    score, metric = (mean_per_class, "mean per class") if by_class else (top1, "top-1")
    axes = principal_axes(z["train"])
    protocol = TRANSFER._replace(iterations=config.iterations, tolerance=config.tolerance)
    words = (
        f"{size} px, frozen features as they are; L-BFGS on Σ cross-entropy + λ‖W‖², one of "
        f"{len(LAMBDAS)} λ chosen on val"
    )

    def probe(index: Tensor | slice, protocol: Protocol) -> Probe:
        train, val = (z["train"][index], y["train"][index]), (z["val"], y["val"])
        classes = len(test.classes)
        return linear_probe(
            train, val, z["test"], classes=classes, protocol=protocol, score=score, axes=axes
        )

    def row(probe: str, interval: Sequence[float], **values: Any) -> dict[str, Any]:
        value, low, high = interval
        about = {"dataset": test.name, "probe": probe, "metric": metric}
        return about | {"value": value, "low": low, "high": high} | values

    whole = probe(slice(None), protocol)
    labels = y["test"].cpu()
    of_images = accuracy(whole.predictions.cpu(), labels)
    of_classes = mean_per_class_interval(whole.predictions.cpu(), labels)
    rows = [
        row(
            "linear", of_classes if by_class else of_images[:3], n=len(labels), of="test images",
            labels=len(y["train"]) + len(y["val"]), top1=of_images.top1,
            mean_per_class=of_classes.value, penalty=whole.penalty, score_val=whole.score_val,
            protocol=f"{words}, refit on train + val, test read once",
        )
    ]  # fmt: skip
    for fraction in dict.fromkeys(config.fractions):
        values = []
        for draw in range(config.draws):
            index = balanced(y["train"].cpu(), fraction, keyed_generator(config.seed, draw))
            few = probe(index.to(z["train"].device), protocol._replace(refit=False))
            values.append(score(few.predictions, y["test"]))
        rows.append(
            row(
                f"{100 * fraction:g} % of labels", student_interval(values), n=len(values),
                of="draws", labels=len(index),
                protocol=f"{words} (all of it), labels drawn by class, no refit",
            )
        )  # fmt: skip
    for shots, part in episodes.items():
        accuracies = few_shot(z["test"], part, shots, config.few_shot)
        rows.append(
            row(
                f"{config.ways}-way {shots}-shot", student_interval(accuracies.cpu()), n=len(part),
                of="episodes", labels=config.ways * shots, metric="top-1",
                protocol=f"{size} px, frozen features, L2-normalised; {config.few_shot}, "
                f"{config.queries} queries a class, all images from test",
            )
        )  # fmt: skip
    return rows
