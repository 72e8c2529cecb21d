"""The evaluation stage: an SSL run in, a run directory with accuracies and features out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, EvalConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.crops import EPOCHS, crop_probe, enlarged
from idaa_lib.evaluate.encoders import (
    features,
    load_encoder,
    open_splits,
    pixels,
    random_encoder,
)
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.metrics import accuracy, effective_rank, embedding_std, top1
from idaa_lib.evaluate.probe import linear_probe, official_probe
from idaa_lib.methods import OfficialProtocol
from idaa_lib.runs import Run, Writer, checkpoints, stage
from idaa_lib.runs.machine import describe, open_images, settled, torch_device, uses_bf16

# What stands in one table beside the run's own encoder.
SUBJECTS = ("encoder", "random", "pixels")
LAYERS = {"backbone": "backbone features", "projector": "projected z"}


def locate(config: EvalConfig) -> Run:
    """The run directory that `config` leads to, whether it was evaluated yet or not."""
    return _plan(config).run


def evaluate(config: EvalConfig) -> Run:
    """The evaluation of a finished SSL run under `config`; a finished one is given back as it is.

    The run's `summary.json` has, for the trained encoder and (with `references`) for the same
    encoder before training and for raw pixels, kNN and linear top-1 in percent with n, the 95 %
    interval and the protocol. Under `official`, of a run with snapshots, `knn_epoch` and
    `linear_epoch` say which epoch each looks at (null: the final one), and `knn_top1_last` what
    the final one has.

    Raises:
        RunError: the SSL run is missing or unfinished. ConfigError: the images have no labels.
        Stopped: on a request to stop a classifier on crops, after its state was saved.
    """
    plan = _plan(config)
    return stage.perform(plan, partial(_evaluate, plan))


def results(run: Run) -> dict[str, Tensor]:
    """Tensors of a finished evaluation: `labels` and `features` of the test images, and predictions
    `<subject>.knn`, `<subject>.linear` of encoder, random, pixels."""
    return load_file(run.path / "results.safetensors")


class _Look(NamedTuple):
    """What a probe looks at: a layer, of the snapshot of an epoch (None: of the final weights)."""

    layer: str
    epoch: int | None = None


class _Verdict(NamedTuple):
    """A probe's predictions (Q,) of the first Q test images, how they came in words, the likeliest
    classes (Q, 5) where it ranks them, and further values of the summary."""

    predictions: Tensor
    words: str
    likeliest: Tensor | None = None
    values: dict[str, float] = {}  # noqa: RUF012


@dataclass(frozen=True)
class _Plan(stage.Plan):
    """source: the run that is judged. splits: labelled images. official: the protocol, if asked.
    epochs: of the snapshots that it chooses among, beside the final weights."""

    config: EvalConfig
    source: Run
    splits: dict[str, ImageSet]
    official: OfficialProtocol | None
    epochs: list[int]
    device: torch.device
    bf16: bool

    def labels(self, *splits: str) -> Tensor:
        return torch.cat([self.splits[name].labels for name in splits])

    @property
    def classes(self) -> int:
        return len(self.splits["train"].classes)


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
        snapshots = {} if official.crops else checkpoints.snapshots(source)
    dataset = settled(config.dataset or trained.dataset)
    config = config.replace(run=source.reference, dataset=dataset)
    if official and official.crops:
        # An untrained encoder would take as long, and crops' pixels are more than a probe can take.
        config = config.replace(references=False)
    splits = open_splits(dataset, trained.size, config.limit)
    run = runs.run_for(
        config,
        splits["test"].fingerprint,
        encoder=checkpoints.digest(source),
        snapshots=" ".join(snapshots.values()) or None,
    )
    device = torch_device(config.device)
    bf16 = uses_bf16(config.precision, device)
    return _Plan(
        config, run, source, splits, official, [*snapshots], device, bf16,
        environment=describe(device, "bf16" if bf16 else "no", splits["test"]),
    )  # fmt: skip


def _evaluate(plan: _Plan, writer: Writer) -> dict[str, Any]:
    config, official = plan.config, plan.official
    summary: dict[str, Any] = {"protocol": config.protocol}
    tensors = {"labels": plan.labels("test")}
    final = {
        "knn": _Look(official.knn if official else "backbone"),
        "linear": _Look(official.linear if official else "backbone"),
    }
    for subject in SUBJECTS if config.references else SUBJECTS[:1]:
        looks, prefix = final, "" if subject == "encoder" else f"{subject}_"
        if subject == "encoder" and plan.epochs:
            looks, summary["knn_top1_last"] = _choose_epochs(plan)
            summary |= {f"{probe}_epoch": look.epoch for probe, look in looks.items()}
        encoded = {look: _encode(plan, subject, look) for look in set(looks.values())}
        for probe, look in looks.items():
            z = encoded[look]
            verdict = _nearest(plan, z) if probe == "knn" else _linear(plan, z, writer)
            rows = _rows(plan, verdict)
            rows["protocol"] = _protocol(plan, subject, probe, look, verdict.words)
            summary |= {f"{prefix}{probe}_{key}": value for key, value in rows.items()}
            tensors[f"{subject}.{probe}"] = verdict.predictions
        if subject == "encoder":
            tensors["features"] = z["test"]
            summary["embedding_std"] = embedding_std(z["test"]).item()
            summary["effective_rank"] = effective_rank(z["test"])
        print(
            f"{subject}: kNN {summary[f'{prefix}knn_top1']:.2f} %, linear "
            f"{summary[f'{prefix}linear_top1']:.2f} % ({config.protocol}, n = "
            f"{summary[f'{prefix}knn_n']:,})"
        )
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, plan.run.path / "results.safetensors")
    return summary


def _encode(plan: _Plan, subject: str, look: _Look) -> dict[str, Tensor]:
    """Features of each split (N, D), on the CPU."""
    if subject == "pixels":
        return {name: pixels(split.images) for name, split in plan.splits.items()}
    trained = subject == "encoder"
    encoder = load_encoder(plan.source, *look) if trained else random_encoder(plan.source, look[0])
    module, size, mean, std = encoder.to(plan.device)
    return {
        name: features(module, split.images, size, mean, std, device=plan.device, bf16=plan.bf16)
        for name, split in plan.splits.items()
    }


def _choose_epochs(plan: _Plan) -> tuple[dict[str, _Look], float]:
    """What each probe looks at where a run kept snapshots, and the final epoch's kNN top-1.

    The best kNN on test, as published: it is chosen on test data. Of equals the latest wins.
    """
    official = plan.official
    assert official is not None
    scores: dict[int | None, float] = {}
    for epoch in (*plan.epochs, None):
        z = _encode(plan, "encoder", _Look(official.knn, epoch))
        scores[epoch] = top1(_nearest(plan, z).predictions, plan.labels("test"))
    best = max(reversed(scores), key=lambda epoch: scores[epoch])
    linear = best if official.linear_epoch == "best" else None
    looks = {"knn": _Look(official.knn, best), "linear": _Look(official.linear, linear)}
    return looks, scores[None]


def _nearest(plan: _Plan, z: dict[str, Tensor]) -> _Verdict:
    """kNN from a bank of train and val together."""
    bank, config = torch.cat([z["train"], z["val"]]), plan.config
    temperature = plan.official.temperature if plan.official else config.temperature
    predictions = knn(
        bank, plan.labels("train", "val"), z["test"],
        classes=plan.classes, k=config.k, temperature=temperature,
    )  # fmt: skip
    return _Verdict(predictions, f"k={min(config.k, len(bank))}, τ={temperature:g}")


def _linear(plan: _Plan, z: dict[str, Tensor], writer: Writer) -> _Verdict:
    """The linear classifier of the protocol; its final fit uses train and val together."""
    config, official, source = plan.config, plan.official, plan.source
    if official is None:
        fit = linear_probe(
            (z["train"], plan.labels("train")), (z["val"], plan.labels("val")), z["test"],
            classes=plan.classes,
        )  # fmt: skip
        words = "L-BFGS, penalty chosen on val, refit, test read once"
        values = {"penalty": fit.penalty, "top1_val": fit.score_val}
        return _Verdict(fit.predictions, words, fit.likeliest, values)
    if official.crops:
        assert config.dataset is not None
        size = enlarged(source.config.size)
        trainval, test = (
            open_images(config.dataset, split, size, config.limit).with_labels()
            for split in ("trainval", "test")
        )
        crops = crop_probe(
            load_encoder(source, official.linear), trainval, test, writer, device=plan.device,
            bf16=plan.bf16, batch_size=official.batch_size, seed=config.seed,
        )  # fmt: skip
        words = f"LARS on random crops of central squares, {EPOCHS} epochs, the last"
        return _Verdict(crops.predictions, words, crops.likeliest)
    published = official_probe(
        (torch.cat([z["train"], z["val"]]), plan.labels("train", "val")),
        (z["test"], plan.labels("test")),
        classes=plan.classes, batch_size=official.batch_size, seed=config.seed,
    )  # fmt: skip
    words = "Adam, 1000 epochs, best test epoch of the classifier, partial batch dropped"
    return _Verdict(published.predictions, words, values={"top1_last": published.top1_last})


def _rows(plan: _Plan, verdict: _Verdict) -> dict[str, Any]:
    """Accuracies of a verdict and what it says of itself."""
    labels = plan.labels("test")[: len(verdict.predictions)]
    rows = accuracy(verdict.predictions, labels)._asdict() | verdict.values
    if verdict.likeliest is not None and plan.classes > 5:
        hit = (verdict.likeliest == labels[:, None]).any(1)
        rows["top5"] = 100 * hit.double().mean().item()
    return rows


def _protocol(plan: _Plan, subject: str, probe: str, look: _Look, words: str) -> str:
    """Protocol, layer, probe and epoch, in words.

    Official kNN has all training images in its bank, each under its own label: the release's bank
    is faulty, and SimSiam's authors have another.
    """
    official, name = plan.official, "clean"
    if official:
        name = f"official of {official.of}"
        name += " (bank without the release's fault)" if probe == "knn" else ""
    if subject == "pixels":
        return f"{name}: raw pixels, {words}"
    n = len(plan.epochs) + 1
    if subject == "random":
        epoch = "untrained"
    elif official is None:
        epoch = "last weights"
    elif n > 1 and probe == "knn":
        epoch = f"best of {n} epochs on test"
    elif n > 1 and official.linear_epoch == "best":
        epoch = f"encoder of the best of {n} epochs by kNN on test"
    else:
        epoch = "epoch of the file" if "imported" in plan.source.environment else "final epoch"
    return f"{name}: {LAYERS[look.layer]}, {words}, {epoch}"
