"""The evaluation stage: an SSL run in, a run directory with accuracies and features out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, EvalConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate import crops
from idaa_lib.evaluate.encoders import (
    encode_splits,
    judged_on,
    load_encoder,
    open_splits,
    pixels,
    random_encoder,
)
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.metrics import accuracy, effective_rank, embedding_std, top1
from idaa_lib.evaluate.probe import linear_probe, official_probe
from idaa_lib.methods import OfficialProtocol
from idaa_lib.runs import Run, Writer, checkpoints
from idaa_lib.runs.choice import images_of, reading_of
from idaa_lib.runs.files import replace
from idaa_lib.runs.machine import (
    describe,
    open_images,
    resolve_path,
    resolve_paths,
    torch_device,
    uses_bf16,
)
from idaa_lib.runs.stage import Plan, perform

# What stands in one table beside the run's own encoder.
SUBJECTS = ("encoder", "random", "pixels")
LAYERS = {"backbone": "backbone features", "projector": "projected z"}
# Linear classifiers, in words.
LINEAR = {
    "clean": "L-BFGS, penalty chosen on val, refit, test read once",
    "official": "Adam, 1000 epochs, best test epoch of the classifier, partial batch dropped",
}


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
        Stopped: on a request to stop; a classifier on crops saves its state first.
    """
    plan = _plan(config)
    return perform(plan, plan.judge)


def results(run: Run) -> dict[str, Tensor]:
    """Tensors of a finished evaluation: `labels` and `features` of the test images, and predictions
    `<subject>.knn`, `<subject>.linear` of encoder, random, pixels."""
    return load_file(run.path / "results.safetensors")


def _plan(config: EvalConfig) -> _Evaluation:
    source = runs.encoder(config.run)
    training, snapshots = source.config, dict[int, str]()
    way = OfficialProtocol("", "backbone", config.temperature, "backbone", "last", 0)
    if config.protocol == "official":
        if source.stage == "semi":
            raise ConfigError(
                f"protocol='official' is of self-supervised runs, and run={source.id!r} is "
                f"semi-supervised: take 'clean'."
            )
        way = training.get_chosen("method").official_protocol(training)
        snapshots = {} if way.classifier else checkpoints.snapshots(source)
    dataset = resolve_path(config.dataset or judged_on(images_of(source)))
    config = resolve_paths(config)
    reading = reading_of(config, source, dataset)
    # On crops an untrained encoder would take as long, and a probe cannot take pixels.
    references = config.references and not way.classifier
    fields = {"run": source.reference, "dataset": dataset, "references": references}
    config = config.replace(**fields, **reading)
    # Of a source that keeps images larger than the views that training cuts of them.
    side = (way.whole and getattr(training, "source_size", None)) or training.size
    splits = open_splits(dataset, side, config.limit, **reading)
    if way.classifier and len(splits["train"].classes) < 2:
        raise ConfigError(
            f"dataset={dataset!r} has 1 class, and the official classifier of {way.of} needs two "
            f"or more: take another data set."
        )
    run = runs.run_for(
        config,
        splits["test"].fingerprint,
        encoder=checkpoints.digest(source),
        snapshots=" ".join(snapshots.values()) or None,
    )
    device = torch_device(config.device)
    machine = {"device": device, "bf16": uses_bf16(config.precision, device)}
    about = describe(device, "bf16" if machine["bf16"] else "no", splits["test"])
    epochs = [*snapshots]
    return _Evaluation(config, run, source, splits, way, epochs, machine, environment=about)


@dataclass(frozen=True)
class _Evaluation(Plan):
    """source: the run that is judged. splits: labelled images. way: layers, τ and batch size; its
    name `of` is "" for the clean protocol. epochs: of the snapshots that the official one chooses
    among, beside the final weights."""

    source: Run
    splits: dict[str, ImageSet]
    way: OfficialProtocol
    epochs: list[int]
    machine: dict[str, Any]  # `device` and `bf16`

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self.splits["test"].size

    @property
    def classes(self) -> int:
        return len(self.splits["train"].classes)

    def labels(self, *splits: str) -> Tensor:
        return torch.cat([self.splits[name].labels for name in splits])

    def judge(self, writer: Writer | None) -> dict[str, Any]:
        """The summary; predictions and features are written beside it."""
        summary: dict[str, Any] = {"protocol": self.config.protocol}
        truth, encode = self.labels("test"), lru_cache(1)(self.encode)
        tensors, epochs = {"labels": truth}, dict[str, int | None]()
        layers = {"knn": self.way.knn, "linear": self.way.linear}
        if self.epochs:
            # The best kNN on test, as published: chosen on test data. Of equally good epochs the
            # latest counts.
            tops = {
                epoch: top1(self.nearest(encode("encoder", self.way.knn, epoch)), truth)
                for epoch in (*self.epochs, None)
            }
            best = max(reversed(tops), key=lambda epoch: tops[epoch])
            epochs = {"knn": best, "linear": best if self.way.linear_epoch == "best" else None}
            summary["knn_top1_last"] = tops[None]
            summary |= {f"{probe}_epoch": epoch for probe, epoch in epochs.items()}
        # Pixels of a set that is streamed are more than a memory holds.
        subjects = SUBJECTS[: 2 if self.splits["test"].streamed else 3]
        for subject in subjects if self.config.references else subjects[:1]:
            prefix = "" if subject == "encoder" else f"{subject}_"
            for probe, layer in layers.items():
                z = encode(subject, layer, epochs.get(probe) if subject == "encoder" else None)
                guess, values = (self.nearest(z), {}) if probe == "knn" else self.linear(z, writer)
                values |= accuracy(guess, truth[: len(guess)])._asdict()
                values["protocol"] = self.protocol(subject, probe, layer)
                summary |= {f"{prefix}{probe}_{name}": value for name, value in values.items()}
                tensors[f"{subject}.{probe}"] = guess
            if subject == "encoder":
                tensors["features"] = z["test"]
                summary["embedding_std"] = embedding_std(z["test"]).item()
                summary["effective_rank"] = effective_rank(z["test"])
            knn_top1, linear_top1 = (summary[f"{prefix}{probe}_top1"] for probe in layers)
            print(
                f"{subject}: kNN {knn_top1:.2f} %, linear {linear_top1:.2f} % "
                f"({self.config.protocol}, n = {len(truth):,})"
            )
        if writer:
            replace(self.run.path / "results.safetensors", save(tensors))
        return summary

    def encode(self, subject: str, layer: str, epoch: int | None) -> dict[str, Tensor]:
        """Features of each split (N, D), on the CPU; epoch: of a snapshot, None for the end."""
        if subject == "pixels":
            return {name: pixels(split.images) for name, split in self.splits.items()}
        if subject == "encoder":
            encoder = load_encoder(self.source, layer, epoch)._replace(size=self.side)
        else:
            encoder = random_encoder(self.source, layer)
        return encode_splits(encoder.to(self.machine["device"]), self.splits, **self.machine)

    def nearest(self, z: dict[str, Tensor]) -> Tensor:
        """kNN's predictions from a bank of train and val together."""
        bank, labels = torch.cat([z["train"], z["val"]]), self.labels("train", "val")
        how: dict[str, Any] = dict(k=self.config.k, temperature=self.way.temperature)
        queries = z["test"].to(self.machine["device"])
        return knn(bank, labels, queries, classes=self.classes, **how).cpu()

    def linear(self, z: dict[str, Tensor], writer: Writer | None) -> tuple[Tensor, dict[str, Any]]:
        """The linear classifier's predictions, and what else the summary holds of it. Its final fit
        uses train and val together."""
        config, way, values = self.config, self.way, dict[str, Any]()
        train, val, test = ((z[name], self.labels(name)) for name in ("train", "val", "test"))
        how: dict[str, Any] = dict(batch_size=way.batch_size, seed=config.seed)
        if not way.of:
            clean = linear_probe(train, val, z["test"], classes=self.classes)
            scores, values = clean.scores, {"penalty": clean.penalty, "top1_val": clean.score_val}
            values["n_val"] = len(val[1])
        elif way.classifier:
            size = self.side if way.whole else crops.enlarge(self.side)
            dataset, reading = config.dataset, config.reading
            whole, tested = (
                open_images(dataset, split, size, config.limit, **reading).with_labels()
                for split in ("trainval", "test")
            )
            encoder = load_encoder(self.source, way.linear)
            how |= {"classifier": way.classifier, **self.machine}
            scores, last = crops.crop_probe(encoder, whole, tested, self.run, writer, **how)
            values = {"top1_last": last} if way.classifier.best else {}
        else:
            both = torch.cat([train[0], val[0]]), self.labels("train", "val")
            scores, values["top1_last"] = official_probe(both, test, classes=self.classes, **how)
        if self.classes > 5:
            hit = scores.topk(5).indices == test[1][: len(scores), None]
            values["top5"] = 100 * hit.any(1).double().mean().item()
        return scores.argmax(1), values

    def protocol(self, subject: str, probe: str, layer: str) -> str:
        """Protocol, layer, probe and epoch, in words."""
        way, epoch = self.way, "last weights"
        words = LINEAR["official" if way.of else "clean"]
        if way.classifier:
            size = self.source.config.size
            streamed = self.splits["train"].streamed
            words = crops.describe(way.classifier, size, self.side, way.whole, streamed)
        name = f"official of {way.of}" if way.of else "clean"
        if way.of:
            epoch = "epoch of the file" if "imported" in self.source.environment else "final epoch"
        if self.epochs and (probe == "knn" or way.linear_epoch == "best"):
            epoch = f"best of {len(self.epochs) + 1} epochs by kNN on test"
        if probe == "knn":
            name += way.knn_note if way.of else ""
            n = len(self.splits["train"]) + len(self.splits["val"])
            words = f"k={min(self.config.k, n)}, τ={way.temperature:g}"
            words += f", images of {self.side} px" if way.whole else ""
        words += ", of one class, which is 100 % whatever the encoder is" * (self.classes == 1)
        if subject == "pixels":
            return f"{name}: raw pixels, {words}"
        features = LAYERS[layer]
        if layer == "projector" and getattr(self.source.config, "condition", None):
            features += " at the neutral condition"
        return f"{name}: {features}, {words}, {epoch if subject == 'encoder' else 'untrained'}"
