"""Mask R-CNN fine-tuned from an SSL run, and its AP (docs/spec/idaa.md §5).

    python examples/detection/detect.py size=128 iterations=300

The words are fields of `DetectionConfig`. Each run is a run directory, `outputs/detection/<id>/`.

The protocol is SimSiam's and MoCo's, inferred to be the paper's: Detectron2's 1× schedule on R50-C4
with all layers and BatchNorms tuned. It runs on one device, whose BatchNorms see the whole batch,
as synchronised ones of several devices would. Batches are not grouped by aspect ratio, as
Detectron2's are.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from coco import CocoSet, Target, average_precision
from configuration import DetectionConfig
from mask_rcnn import STRIDE, STRIDES, mask_rcnn
from shapes import Paths, synthetic_shapes
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from training import Training

from idaa_lib import results, runs
from idaa_lib.configs import ConfigError
from idaa_lib.data.cached import data_root
from idaa_lib.evaluate.encoders import load_encoder
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.nets import evaluating, initial_weights
from idaa_lib.nets.resnet import ResNet
from idaa_lib.runs import Run, RunError, Writer, checkpoints
from idaa_lib.runs.machine import describe, resolve_path, torch_device
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.train.__main__ import answer, read_words

COCO = 80, 5000  # categories and images of val2017
PAPER = "resnet50-C4, width 64"  # its network, as `protocol` writes it; inferred (docs/paper.csv)

__all__ = ["DetectionConfig", "compare", "detect", "load_detector", "locate", "predict", "sets"]


def locate(config: DetectionConfig) -> Run:
    """The run directory that `config` leads to, whether it was trained yet or not."""
    return prepare(config).run


def detect(config: DetectionConfig) -> Run:
    """The finished run of `config`: trained and judged, continued, or shown if it is finished.

    Its `summary.json` has `box_ap`, `box_ap50`, `box_ap75`, the same of masks, in percent on the
    evaluation set, `n`, its images, `masks`, present or why absent, `fingerprint`, of both sets,
    and the protocol.

    Raises:
        ConfigError, RunError: one sentence, before work starts where it can be known then.
        Stopped: on a request to stop, after the state was saved.
    """
    task = prepare(config)
    config, device = task.config, torch_device(config.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("Detection runs on one device: start it without accelerate launch.")

    def body(writer: Writer) -> Mapping[str, Any]:
        detector = build_detector(config, task.source, task.model).to(device)
        training = Training(detector, task.train, config, writer)
        training.run()
        print(f"Judging on {len(task.val):,} images …")
        precision = average_precision(
            (predict(detector, image), target)
            for image, target in DataLoader(task.val, None, num_workers=config.workers)
        )
        seconds = training.steps.seconds
        return {
            **precision,
            "masks": task.masks,
            "n": len(task.val),
            "n_objects": task.val.objects,
            "fingerprint": task.fingerprint,
            "protocol": protocol(config, task.source),
            "seconds": seconds,
            "images_per_second": training.steps.step * config.batch_size / max(seconds, 1e-9),
        }

    environment = describe(device, "no") | {"dataset": task.about}
    return perform(Plan(config, task.run, environment=environment, model=task.model), body)


def load_detector(run: Run) -> GeneralizedRCNN:
    """The detector of a finished detection run, on the CPU, in eval mode.

    Raises:
        RunError: the SSL run that it started from is gone, or there is no checkpoint.
    """
    checkpoint = checkpoints.load(run)
    if checkpoint is None:
        raise RunError(f"Run {run.id} has no checkpoint under {run.path / 'checkpoints'}.")
    detector = build_detector(run.config, runs.get("ssl", run.config.run), run.model)
    detector.load_state_dict(checkpoints.under("detector.", checkpoint[0]))
    return detector.eval()


def sets(config: DetectionConfig) -> tuple[CocoSet, CocoSet]:
    """The sets for training and for evaluation; the synthetic shapes where `config` names none.

    Raises:
        ConfigError: a file or package is missing, a file is not in COCO's format, or the two sets
            differ in their classes.
    """
    for package in ("pycocotools", "torchmetrics"):
        if find_spec(package) is None:
            raise ConfigError(f"{package} is missing: pip install 'idaa_lib[detection]'.")
    own = [Path(path) for name in config.sets if (path := getattr(config, name))]
    paths = Paths(*own) if own else synthetic_shapes(data_root() / "synthetic-shapes")
    train = CocoSet(paths.train_images, paths.train_annotations)
    val = CocoSet(paths.val_images, paths.val_annotations)
    if train.classes != val.classes:
        raise ConfigError(
            f"{paths.train_annotations} and {paths.val_annotations} differ in their categories."
        )
    if not train.useful:
        raise ConfigError(
            f"{paths.train_annotations} has no object to train on: all are crowds, or have boxes "
            f"of less than a pixel."
        )
    if train.unmasked or val.unmasked:
        train.give_masks(False)
        val.give_masks(False)
    return train, val


# --- what comes out ------------------------------------------------------------------------------


@torch.no_grad()
def predict(detector: GeneralizedRCNN, image: Tensor) -> Target:
    """Detections in a uint8 image (3, H, W), on the CPU, at most 100, best first: `boxes`,
    `labels`, `scores`, and `masks` (N, H, W) bool where the detector has them."""
    device = next(detector.parameters()).device
    with evaluating(detector):
        (detections,) = detector([image.to(device).float() / 255])
    if "masks" in detections:
        detections["masks"] = detections["masks"][:, 0] >= 0.5
    return {name: values.cpu() for name, values in detections.items()}


def compare(run: Run) -> tuple[list[dict[str, str]], str]:
    """A row for each training that was judged as `run` was: mean AP in percent over its seeds with
    Student's 95 % interval, and n, the seeds. The paper's rows follow where the images are COCO's
    val2017, and size and network of one of these the paper's; else a sentence says what differs.

    Those are the finished detection runs on the same images, by content, and of the same
    configuration and results version. A training is its configuration without the seed.
    """
    keys = [key for key in run.summary or {} if "_ap" in key]
    others = []
    for other in runs.find("detection"):
        with contextlib.suppress(*results.DAMAGE):
            others += [other] * (judged_as(other) == judged_as(run))
    summaries: dict[str, list[Mapping[str, float]]] = {}
    for name, other in zip(training_names(others), others, strict=True):
        summaries.setdefault(name, []).append(other.summary or {})
    rows = [
        {"training": name, "n": str(len(own))}
        | {key: mean([each[key] for each in own if key in each]) for key in keys}
        for name, own in sorted(summaries.items())
    ]
    if (len(run.model["classes"]), (run.summary or {})["n"]) != COCO:
        return rows, ""
    theirs, differs = paper(keys, run.config.size, sorted({network(other) for other in others}))
    return (rows, differs) if differs else (rows + theirs, "")


def judged_as(run: Run) -> tuple[Any, ...]:
    """What two runs must have in common to stand in one table."""
    settings = {k: v for k, v in run.config.identity().items() if k != "seed"}
    return (run.summary or {})["fingerprint"], run.environment["results_version"], settings


def training_names(chosen: Sequence[Run]) -> list[str]:
    """What the SSL run under each detection run is, but for its seed; its id where it is gone."""
    trainings: dict[Run, Run] = {}
    for run in chosen:
        with contextlib.suppress(RunError):
            trainings[run] = runs.encoder(run.config.run)
    unique = list(dict.fromkeys(trainings.values()))
    names = dict(zip(unique, results.tell_apart(unique, {"seed"}), strict=True))
    return [names[trainings[run]] if run in trainings else run.config.run for run in chosen]


def mean(values: list[float]) -> str:
    """The mean, with Student's 95 % interval where there are several values; – where none."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return "{:.1f} [{:.1f}, {:.1f}]".format(*student_interval(values, "%"))


def network(run: Run) -> str:
    """The network of a detection run, as its protocol has it: its SSL run may be gone."""
    words = re.match(r"Mask R-CNN, (\S+, width \d+),", (run.summary or {}).get("protocol", ""))
    return words[1] if words else "unknown"


def paper(
    keys: Sequence[str], size: int, networks: Sequence[str]
) -> tuple[list[dict[str, str]], str]:
    """The paper's rows of COCO, as `compare` has ours, and how they differ from ours, if so."""
    rows, sizes = dict[str, dict[str, str]](), set[str]()
    with results.PAPER.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            key = line["metric"].lower().replace(" ", "_")  # box AP50
            if line["stage"] == "detection" and key in keys:
                attack = f" + {line['adversary']}" if line["adversary"] else ""
                name = f"{line['method']}{attack} (paper)"
                row = rows.setdefault(name, {"training": name, "n": "not stated"})
                row[key] = line["value"]
                sizes.add(line["size"])
    theirs = {"size": (" or ".join(sizes), [str(size)]), "the network": (PAPER, networks)}
    differs = [
        f"{what} is {their} there and {' or '.join(ours)} here"
        for what, (their, ours) in theirs.items()
        if their not in ours
    ]
    text = f"Figures of the paper do not stand here: {'; '.join(differs)}."
    return [*rows.values()], text if differs else ""


# --- the plan ------------------------------------------------------------------------------------


class Task(NamedTuple):
    """All that a run depends on, resolved before any work starts."""

    config: DetectionConfig
    run: Run
    source: Run  # the SSL run
    train: CocoSet
    val: CocoSet
    masks: str  # present, or why absent
    fingerprint: str  # of both sets
    model: dict[str, Any]  # what rebuilds the detector beside the configuration

    @property
    def about(self) -> dict[str, Any]:
        """The data, for `environment.json`."""
        train = self.train
        return {
            "name": self.config.dataset,
            "split": "val",
            "n": len(self.val),
            "n_train": len(train.useful),
            "skipped": len(train) - len(train.useful),
            "fingerprint": self.fingerprint,
        }


def prepare(config: DetectionConfig) -> Task:
    """The task of `config`.

    Raises:
        ConfigError, RunError: one sentence on what is missing or does not fit.
    """
    stem = {} if config.run else {"stem": "imagenet"}
    source = runs.get("ssl", config.run, **stem)
    encoder = load_encoder(source)
    if not isinstance(encoder.module, ResNet):
        raise ConfigError(f"run={source.id!r} has no ResNet as its encoder.")
    if (trained := source.config.stem) != "imagenet":
        raise ConfigError(
            f"run={source.id!r} was trained with stem={trained!r}: its layer 3 has stride "
            f"{STRIDES[trained]}, and Mask R-CNN needs one of {STRIDE} to see objects whole; train "
            f'one with stem="imagenet".'
        )
    paths = {name: resolve_path(path) for name in config.sets if (path := getattr(config, name))}
    config = config.model_copy(update={"run": source.reference, **paths})
    train, val = sets(config)
    lacking = [
        f"{part.unmasked} of {part.objects} objects of {part.annotations} have no segmentation"
        for part in (train, val)
        if part.unmasked
    ]
    masks = f"absent: {' and '.join(lacking)}" if lacking else "present"
    fingerprint = f"{train.fingerprint} {val.fingerprint}"
    run = runs.run_for(config, fingerprint, encoder=checkpoints.digest(source))
    model = {
        "size": config.size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "classes": list(val.classes),
        "masks": val.masks,
    }
    return Task(config, run, source, train, val, masks, fingerprint, model)


def build_detector(
    config: DetectionConfig, source: Run, model: Mapping[str, Any]
) -> GeneralizedRCNN:
    """Mask R-CNN with new heads on the weights of the SSL run `source`."""
    backbone = load_encoder(source).module.requires_grad_(True)
    assert isinstance(backbone, ResNet)  # as `prepare` says
    with initial_weights(config.seed):
        return mask_rcnn(
            backbone,
            len(model["classes"]),
            architecture=config.architecture,
            size=config.size,
            rois=config.rois,
            mean=tuple(model["mean"]),
            std=tuple(model["std"]),
            masks=model["masks"],
        )


def protocol(config: DetectionConfig, source: Run) -> str:
    """What an AP is of, in words."""
    trained = source.config
    network = f"{trained.backbone}-{config.architecture.upper()}, width {trained.width}"
    caveat = "" if config.architecture == "c4" else "; not comparable with the paper's C4"
    return (
        f"Mask R-CNN, {network}, {config.iterations:,} iterations of {config.batch_size} images at "
        f"{config.size} px, all layers and BatchNorms tuned, on {config.dataset}{caveat}"
    )


def main(words: list[str]) -> int:
    """Run with the fields that `words` (name=value) set; the exit status."""
    return answer(lambda: detect(DetectionConfig(**read_words(words))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
