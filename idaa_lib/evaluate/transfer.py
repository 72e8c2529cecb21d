"""Transfer: frozen features on other data by the protocol of Kornblith et al. 2019
(arXiv:1805.08974), inferred to be the paper's too (docs/spec/idaa.md §5); and few labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, TransferConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import (
    Encoder,
    features,
    load_encoder,
    open_splits,
    random_encoder,
)
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
from idaa_lib.runs import Run, Writer, checkpoints, stage
from idaa_lib.runs.machine import describe, settled, torch_device, uses_bf16
from idaa_lib.runs.steps import Steps
from idaa_lib.views import keyed_generator

IMAGENET_SIZE = 224
# By convention judged by the mean of the classes' accuracies, since their classes differ in size.
PER_CLASS = frozenset({"fgvcaircraft", "oxfordiiitpet", "flowers102", "caltech101"})
# The encoders of the rows: the run's own, and the same before training.
ENCODERS: dict[str, Callable[[Run], Encoder]] = {"encoder": load_encoder, "random": random_encoder}


def transfer(config: TransferConfig) -> Run:
    """A finished SSL run's encoder judged on other data; a finished transfer is given back as it
    is, an interrupted one continues after the last encoder that was judged on a data set.

    `rows` of the run's `summary.json` hold, for each data set and encoder, accuracies in percent
    with their 95 % interval: `linear` on all labels, one for each share of the labels, one for each
    number of shots. `left_out` says why a data set, or its episodes, have none.

    Raises:
        RunError: the SSL run is missing or unfinished. ConfigError: no data set can be used.
        Stopped: on a request to stop, between two encoders.
    """
    plan = _plan(config)
    for name, reason in plan.left_out.items():
        print(f"{name} is left out: {reason}")
    return stage.perform(plan, partial(_transfer, plan))


@dataclass(frozen=True)
class _Plan(stage.Plan):
    """source: the run whose encoder is judged. size: pixels a side. targets: the splits of each
    data set. left_out: name → why it has no rows."""

    source: Run
    size: int
    targets: list[dict[str, ImageSet]]
    left_out: dict[str, str]
    device: torch.device
    bf16: bool


def _plan(config: TransferConfig) -> _Plan:
    source = runs.get("ssl", config.run)
    trained = source.config
    size = config.size or (IMAGENET_SIZE if trained.stem == "imagenet" else trained.size)
    names = tuple(map(settled, config.datasets or (trained.dataset,)))
    config = config.replace(run=source.reference, datasets=names)
    targets, left_out = [], {}
    for name in dict.fromkeys(names):
        try:
            targets.append(open_splits(name, size, config.limit))
        except ConfigError as error:
            left_out[name] = str(error)
    if not targets:
        first, more = next(iter(left_out.values())), len(left_out) - 1
        others = f" (and neither can {more} more)" if more else ""
        raise ConfigError(f"No data set can be transferred to{others}: {first}")
    fingerprints = " ".join(splits["test"].fingerprint for splits in targets)
    run = runs.run_for(config, fingerprints, encoder=checkpoints.digest(source))
    device = torch_device(config.device)
    bf16 = uses_bf16(config.precision, device)
    about = [describe(device, "bf16" if bf16 else "no", splits["test"]) for splits in targets]
    environment = about[0] | {"datasets": [each["dataset"] for each in about]}
    return _Plan(
        config, run, source, size, targets, left_out, device, bf16, environment=environment
    )


def _transfer(plan: _Plan, writer: Writer) -> dict[str, Any]:
    config, left_out = plan.config, dict(plan.left_out)
    rows: list[dict[str, Any]] = []
    episodes = [_episodes(splits["test"], config, left_out) for splits in plan.targets]
    encoders = list(ENCODERS)[: 2 if config.references else 1]
    total = len(plan.targets) * len(encoders)
    images = sum(len(split) for splits in plan.targets for split in splits.values())
    steps = Steps(
        plan.run, writer, total, per_epoch=total, checkpoint_every=1,
        images=images // len(plan.targets), state=lambda: ({}, {"rows": rows}),
        restore=lambda tensors, values: rows.extend(values["rows"]),
    )  # fmt: skip
    steps.resume()
    for step in steps:
        target, encoder = divmod(step, len(encoders))
        splits, name = plan.targets[target], encoders[encoder]
        z = _encode(ENCODERS[name](plan.source), splits, plan)
        judged = _judge(z, splits, episodes[target], config, plan.size)
        rows += [{"features": name, **row} for row in judged]
        values = ", ".join(f"{row['probe']} {row['value']:.1f}" for row in judged)
        print(f"{splits['test'].name}, {name}: {values} (%)")
    summary = {"rows": rows, "left_out": left_out, "size": plan.size}
    return summary | {"seconds": steps.seconds}


def _encode(encoder: Encoder, splits: Mapping[str, ImageSet], plan: _Plan) -> dict[str, Tensor]:
    """Features of each split, encoded once, on the device."""
    module, _, mean, std = encoder.to(plan.device)
    return {
        name: features(
            module, split.images, plan.size, mean, std,
            device=plan.device, output_device=plan.device, bf16=plan.bf16,
        )
        for name, split in splits.items()
    }  # fmt: skip


def _episodes(
    test: ImageSet, config: TransferConfig, left_out: dict[str, str]
) -> dict[int, Tensor]:
    """Episodes of each number of shots, the same for every encoder."""
    episodes = {}
    for shots in config.shots:
        try:
            episodes[shots] = draw_episodes(
                test.labels, config.ways, shots, config.queries, config.episodes, config.seed
            )
        except ValueError as error:
            left_out[f"{test.name}, {config.ways}-way {shots}-shot"] = f"only {error}."
    return episodes


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
