"""The evaluation stage: an SSL run in, a run directory with accuracies and features out."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, EvalConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.crops import EPOCHS, CropProbe, crop_probe, enlarged
from idaa_lib.evaluate.encoders import features, load_encoder, pixels, random_encoder
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.metrics import accuracy, effective_rank, embedding_std
from idaa_lib.evaluate.probe import linear_probe, official_probe
from idaa_lib.methods import OfficialProtocol
from idaa_lib.runs import Run, checkpoints
from idaa_lib.runs.machine import describe, open_images, settled, torch_device, uses_bf16

# What stands in one table beside the run's own encoder.
SUBJECTS = ("encoder", "random", "pixels")
LAYERS = {"backbone": "backbone features", "projector": "projected z"}


def locate(config: EvalConfig) -> Run:
    """The run directory that `config` leads to, whether it was evaluated yet or not."""
    return _plan(config).run


def evaluate(config: EvalConfig) -> Run:
    """Evaluate a finished SSL run under `config`; a finished evaluation is given back as it is.

    The run's `summary.json` has, for the trained encoder and (with `references`) for the same
    encoder before training and for raw pixels, kNN and linear top-1 in percent with n, the 95 %
    interval and the protocol. Under `official`, of a run with snapshots, `knn_epoch` and
    `linear_epoch` say which epoch each looks at (null: the final one), and `knn_top1_last` what
    the final one has.

    Raises:
        RunError: the SSL run is missing or unfinished. ConfigError: the images have no labels.
        Stopped: on a request to stop or pause a classifier on crops, after its state was saved.
    """
    plan = _plan(config)
    config, run, source, splits = plan.config, plan.run, plan.source, plan.splits
    if run.finished:
        print(f"{run.id} is finished: showing its result.")
        return run
    device = torch_device(config.device)
    precision = "bf16" if uses_bf16(config.precision, device) else "no"
    large = _large(plan)
    with run.writing(config, describe(device, precision, splits["test"])) as writer:
        began = time.monotonic()
        labels = {s: split.labels for s, split in splits.items()}
        classes = len(splits["train"].classes)
        official, on_crops = plan.official, None
        if official and large:
            on_crops = partial(
                crop_probe, load_encoder(source, official.linear), *large, writer,
                device=device, bf16=precision == "bf16", batch_size=official.batch_size,
                seed=config.seed,
            )  # fmt: skip
        final = {
            "knn": _Look(official.knn if official else "backbone"),
            "linear": _Look(official.linear if official else "backbone"),
        }
        summary: dict[str, Any] = {"protocol": config.protocol}
        kept: dict[str, Tensor] = {"labels": labels["test"]}
        for subject in SUBJECTS if config.references else SUBJECTS[:1]:
            looks = final
            if subject == "encoder" and plan.epochs:
                assert official is not None
                looks, summary["knn_top1_last"] = _best(plan, labels, classes, device)
                summary |= {f"{probe}_epoch": look.epoch for probe, look in looks.items()}
            layers = _encode(subject, source, splits, device, config, looks)
            of = {
                probe: "raw pixels" if subject == "pixels" else LAYERS[look.layer]
                for probe, look in looks.items()
            }
            rows, predictions = _judge(layers, labels, classes, config, of, official, on_crops)
            if subject != "pixels":
                for probe in looks:
                    rows[f"{probe}_protocol"] += f", {_which(plan, subject, probe)}"
            prefix = "" if subject == "encoder" else f"{subject}_"
            summary |= {f"{prefix}{key}": value for key, value in rows.items()}
            kept |= {f"{subject}.{key}": value for key, value in predictions.items()}
            if subject == "encoder":
                kept["features"] = layers["linear"]["test"]
                summary["embedding_std"] = embedding_std(kept["features"]).item()
                summary["effective_rank"] = effective_rank(kept["features"])
            print(
                f"{subject}: kNN {rows['knn_top1']:.2f} %, linear {rows['linear_top1']:.2f} % "
                f"({config.protocol}, n = {rows['knn_n']:,})"
            )
        save_file({k: v.contiguous() for k, v in kept.items()}, run.path / "results.safetensors")
        writer.finish(summary | {"seconds": time.monotonic() - began})
    return run


class _Look(NamedTuple):
    """What a probe looks at: a layer, of the snapshot of an epoch (None: of the final weights)."""

    layer: str
    epoch: int | None = None


class _Plan(NamedTuple):
    """epochs: of the snapshots that the official protocol chooses among, beside the final one."""

    config: EvalConfig
    run: Run
    source: Run
    splits: dict[str, ImageSet]
    official: OfficialProtocol | None
    epochs: list[int]


def _plan(config: EvalConfig) -> _Plan:
    source = runs.encoder(config.run)
    trained, official, snapshots = source.config, None, {}
    if config.protocol == "official":
        if source.stage == "semi":
            raise ConfigError(
                f"protocol='official' is of self-supervised runs, and run={source.id!r} is "
                f"semi-supervised: take 'clean'."
            )
        official = trained.chosen("method").official_protocol(trained)
        snapshots = {} if official.crops else checkpoints.kept(source)
    dataset = settled(config.dataset or trained.dataset)
    config = config.model_copy(update={"run": source.reference, "dataset": dataset})
    if official and official.crops:
        # An untrained encoder would take as long, and crops' pixels are more than a probe can take.
        config = config.model_copy(update={"references": False})
    splits = {
        split: open_images(dataset, split, trained.size, config.limit)
        for split in ("train", "val", "test")
    }
    if not splits["train"].labelled:
        raise ConfigError(f"dataset={dataset!r} has no labels to evaluate against.")
    run = runs.run_for(
        config,
        splits["test"].fingerprint,
        encoder=checkpoints.digest(source),
        snapshots=" ".join(snapshots.values()) or None,
    )
    return _Plan(config, run, source, splits, official, list(snapshots))


def _large(plan: _Plan) -> tuple[ImageSet, ImageSet] | None:
    """All training images and the test images in a size to take crops of, where they are wanted."""
    if not (plan.official and plan.official.crops):
        return None
    assert plan.config.dataset is not None
    size, limit = enlarged(plan.source.config.size), plan.config.limit
    trainval, test = (
        open_images(plan.config.dataset, split, size, limit) for split in ("trainval", "test")
    )
    return trainval, test


def results(run: Run) -> dict[str, Tensor]:
    """Tensors of a finished evaluation: `labels` and `features` of the test images, and predictions
    `<subject>.knn`, `<subject>.linear` of encoder, random, pixels."""
    return load_file(run.path / "results.safetensors")


def _best(
    plan: _Plan, labels: dict[str, Tensor], classes: int, device: torch.device
) -> tuple[dict[str, _Look], float]:
    """What each probe looks at where a run kept snapshots, and the final epoch's kNN top-1.

    The earliest epoch of the best kNN on test, as published: it is chosen on test data.
    """
    official = plan.official
    assert official is not None
    found: dict[int | None, float] = {}
    for epoch in (*plan.epochs, None):
        look = _Look(official.knn, epoch)
        z = _encode("encoder", plan.source, plan.splits, device, plan.config, {"knn": look})["knn"]
        guess, _ = _nearest(z, labels, classes, plan.config, official)
        found[epoch] = accuracy(guess, labels["test"]).top1
    best = max(found, key=lambda epoch: found[epoch])
    linear = best if official.linear_epoch == "best" else None
    return {"knn": _Look(official.knn, best), "linear": _Look(official.linear, linear)}, found[None]


def _which(plan: _Plan, subject: str, probe: str) -> str:
    """The epoch that a probe's encoder is of, in words."""
    if subject != "encoder":
        return "untrained"
    if plan.official is None:
        return "last weights"
    if plan.epochs:
        if probe == "knn":
            return f"best of {len(plan.epochs) + 1} epochs on test"
        if plan.official.linear_epoch == "best":
            return f"encoder of the best of {len(plan.epochs) + 1} epochs by kNN on test"
    return "epoch of the file" if "imported" in plan.source.environment else "final epoch"


def _encode(
    subject: str,
    source: Run,
    splits: dict[str, ImageSet],
    device: torch.device,
    config: EvalConfig,
    looks: dict[str, _Look],
) -> dict[str, dict[str, Tensor]]:
    """Features of each split for each probe, encoded once where they agree."""
    if subject == "pixels":
        found = {s: pixels(split.images) for s, split in splits.items()}
        return dict.fromkeys(looks, found)
    bf16, encoded = uses_bf16(config.precision, device), {}
    for look in set(looks.values()):
        trained = subject == "encoder"
        made = load_encoder(source, *look) if trained else random_encoder(source, look.layer)
        module, size, mean, std = made.to(device)
        encoded[look] = {
            s: features(module, split.images, size, mean, std, device=device, bf16=bf16)
            for s, split in splits.items()
        }
    return {probe: encoded[look] for probe, look in looks.items()}


def _nearest(
    z: dict[str, Tensor],
    labels: dict[str, Tensor],
    classes: int,
    config: EvalConfig,
    official: OfficialProtocol | None,
) -> tuple[Tensor, str]:
    """kNN's predictions on test from a bank of train and val together; k and τ in words."""
    bank = torch.cat([z["train"], z["val"]])
    temperature = official.temperature if official else config.temperature
    said = f"k={min(config.k, len(bank))}, τ={temperature:g}"
    guess = knn(
        bank, torch.cat([labels["train"], labels["val"]]), z["test"],
        classes=classes, k=config.k, temperature=temperature,
    )  # fmt: skip
    return guess, said


def _judge(
    layers: dict[str, dict[str, Tensor]],
    labels: dict[str, Tensor],
    classes: int,
    config: EvalConfig,
    of: dict[str, str],
    official: OfficialProtocol | None,
    on_crops: Callable[[], CropProbe] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Accuracies and predictions. The bank and the final fit use train and val together."""
    linear = layers["linear"]
    guess, said = _nearest(layers["knn"], labels, classes, config, official)
    rows: dict[str, Any] = {
        f"knn_{k}": v for k, v in accuracy(guess, labels["test"])._asdict().items()
    }
    name = f"official of {official.of}" if official else config.protocol
    rows["knn_protocol"] = f"{name}: {of['knn']}, {said}"
    likeliest = None
    if on_crops:
        found, likeliest = on_crops()
        rows["linear_protocol"] = (
            f"{name}: {of['linear']}, LARS on random crops of central squares, {EPOCHS} epochs, "
            "the last"
        )
    elif official:
        both = torch.cat([labels["train"], labels["val"]])
        train = (torch.cat([linear["train"], linear["val"]]), both)
        test = (linear["test"], labels["test"])
        probe = official_probe(
            train, test, classes=classes, batch_size=official.batch_size, seed=config.seed
        )
        found = probe.predictions
        rows["linear_top1_last"] = probe.top1_last
        rows["linear_protocol"] = (
            f"{name}: {of['linear']}, Adam, 1000 epochs, best test epoch of the classifier, "
            "partial batch dropped"
        )
    else:
        fit = linear_probe(
            (linear["train"], labels["train"]),
            (linear["val"], labels["val"]),
            linear["test"],
            classes=classes,
        )
        found, likeliest = fit.predictions, fit.likeliest
        rows["linear_penalty"], rows["linear_top1_val"] = fit.penalty, fit.score_val
        rows["linear_protocol"] = "clean: L-BFGS, penalty chosen on val, refit, test read once"
    if likeliest is not None and classes > 5:
        hit = (likeliest == labels["test"][:, None]).any(1)
        rows["linear_top5"] = 100 * hit.double().mean().item()
    judged = accuracy(found, labels["test"][: len(found)])._asdict()
    return rows | {f"linear_{k}": v for k, v in judged.items()}, {"knn": guess, "linear": found}
