"""Mask R-CNN fine-tuned from an SSL run, and its AP (docs/spec/idaa.md §5).

    python examples/detection/detect.py size=128 iterations=300

The words are fields of `DetectionConfig`. Each run is a run directory, `outputs/detection/<id>/`.

The protocol is SimSiam's and MoCo's, inferred to be the paper's: Detectron2's 1× schedule on R50-C4
with all layers and BatchNorms tuned, statistics of the BatchNorms averaged anew over 200 batches
before AP is read (`PRECISE_BN`). It runs on one device, whose BatchNorms see the whole batch, as
synchronised ones of several devices would. Batches are not grouped by aspect ratio, as Detectron2's
are.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from coco import CocoSet, Target, average_precision, for_training
from mask_rcnn import STRIDE, STRIDES, mask_rcnn
from pydantic import Field
from scipy import stats
from shapes import Paths, synthetic_shapes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from idaa_lib import runs
from idaa_lib.configs import PRESET, Config, ConfigError, UserError
from idaa_lib.configs.base import Positive, Rate, Seed
from idaa_lib.data.cached import data_root
from idaa_lib.evaluate.encoders import load_encoder
from idaa_lib.nets import build_backbone, evaluating, initial_weights
from idaa_lib.nets.resnet import ResNet
from idaa_lib.runs import Run, RunError, Stopped, Writer, checkpoints
from idaa_lib.runs.machine import settled, surroundings, torch_device
from idaa_lib.runs.processes import signals
from idaa_lib.views import keyed_generator

# Streams of random numbers (the last part of the key).
ORDER, SAMPLE = 1, 2
DROPS = (2 / 3, 8 / 9)  # of the schedule: 60,000 and 80,000 of 90,000
PRECISE = 200  # batches that the BatchNorms' statistics are averaged over
# Detectron2's defaults.
MOMENTUM, WEIGHT_DECAY, WARMUP_FACTOR = 0.9, 1e-4, 1e-3


class DetectionConfig(Config):
    """Fine-tuning of Mask R-CNN from a run with an ImageNet stem, and its AP.

    Fields:
        run: id or path of an SSL run (None: the newest finished one with an ImageNet stem).
        train_images, train_annotations, val_images, val_annotations: folders and COCO-format JSON
            files of what is trained on and judged on; all four, or None for synthetic shapes.
        architecture: `c4` as in the paper, or `fpn`, whose results do not compare with it.
        size: pixels of the shorter side (paper: 800; of training images, four fifths of it and up).
        iterations: steps; the rate drops tenfold at 2/3 and at 8/9 of them (paper: 1×, 90,000).
        warmup: steps of linear warm-up. batch_size: images a step.
        learning_rate: None for 0.02 · batch_size / 16 in `paper` (linear scaling), 0.02 in `demo`.
        rois: regions sampled of each image (paper: 512).
        log_every, checkpoint_every: steps. workers: processes that read images.
        seed: of the heads' weights, batches, flips, sides and sampled regions.
    """

    stage = "detection"
    principal = ("run", "architecture")
    sets: ClassVar[tuple[str, ...]] = (
        "train_images", "train_annotations", "val_images", "val_annotations",
    )  # fmt: skip
    pointers = Config.pointers | frozenset(sets)
    circumstances = Config.circumstances | {"log_every", "checkpoint_every", "workers"}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "demo": dict(size=128, iterations=300, warmup=30, batch_size=4, rois=32,
                     learning_rate=0.02),
        "paper": dict(size=800, iterations=90_000, warmup=1000, batch_size=16, rois=512,
                      log_every=20, checkpoint_every=1000, workers=8),
    }  # fmt: skip

    preset: Literal["demo", "paper"] = "demo"
    run: str | None = None
    train_images: str | None = None
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    architecture: Literal["c4", "fpn"] = "c4"
    size: Annotated[int, Field(ge=32)] = PRESET
    iterations: Positive = PRESET
    warmup: Seed = PRESET
    batch_size: Positive = PRESET
    learning_rate: Rate = PRESET
    rois: Positive = PRESET
    log_every: Positive = 10
    checkpoint_every: Positive = 100
    workers: Seed = 0
    seed: Seed = 0
    device: str = "auto"

    @property
    def dataset(self) -> str:
        """What its AP is of, as tables name it."""
        return self.val_annotations or "synthetic shapes"

    @classmethod
    def _derive(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in cls.sets if not given.get(name)]
        if missing and len(missing) < len(cls.sets):
            raise ConfigError(f"{missing[0]} is missing: give {', '.join(cls.sets)}, or none.")
        batch = values.get("batch_size")
        if isinstance(batch, int):  # linear scaling (Goyal et al. 2017)
            values.setdefault("learning_rate", 0.02 * batch / 16)
        return values


# A stage of its own beside the library's: `runs.find("detection")` and `Run.config` know it.
runs.CONFIGS["detection"] = DetectionConfig
runs.NOTEBOOKS["detection"] = "10_detection"


def locate(config: DetectionConfig) -> Run:
    """The run directory that `config` leads to, whether it was trained yet or not."""
    return _plan(config).run


def detect(config: DetectionConfig) -> Run:
    """Fine-tune and judge under `config`, or resume it, or show it if it is finished.

    The run's `summary.json` has `box_ap`, `box_ap50`, `box_ap75`, the same of masks, in percent on
    the evaluation set, `n`, its images, `masks`, present or why absent, and the protocol.

    Raises:
        ConfigError, RunError: one sentence, before work starts where it can be known then.
        Stopped: on a request to stop or pause, after the state was saved.
    """
    plan = _plan(config)
    config, run = plan.config, plan.run
    if run.finished:
        print(f"{run.id} is finished: showing its result.")
        return run
    device = torch_device(config.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("Detection runs on one device: start it without accelerate launch.")
    with run.writing(config, surroundings(device, "no") | {"dataset": _about(plan)}) as writer:
        training = Training(plan, device, writer)
        training.run()
        print(f"Judging on {len(plan.val):,} images …")
        precision = average_precision(
            (predict(training.detector, image), target)
            for image, target in DataLoader(plan.val, None, num_workers=config.workers)
        )
        done = training.step * config.batch_size
        writer.finish({
            **precision, "masks": plan.masks, "n": len(plan.val), "n_objects": plan.val.objects,
            "protocol": _protocol(plan), "seconds": training.seconds,
            "images_per_second": done / max(training.seconds, 1e-9),
        })  # fmt: skip
    return run


def load_detector(run: Run) -> GeneralizedRCNN:
    """The detector of a finished detection run, on the CPU, in eval mode.

    Raises:
        RunError: the SSL run that it started from is gone, or there is no checkpoint.
    """
    data, loaded = run.environment["dataset"], checkpoints.load(run)
    if loaded is None:
        raise RunError(f"Run {run.id} has no checkpoint under {run.path / 'checkpoints'}.")
    source = runs.get("ssl", run.config.run)
    detector = _detector(run.config, source, len(data["classes"]), data["masks"])
    detector.load_state_dict(checkpoints.under("detector.", loaded[0]))
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
        raise ConfigError(f"{paths.train_annotations} has no object to train on: all are crowds.")
    if train.unmasked or val.unmasked:
        train.give_masks(False)
        val.give_masks(False)
    return train, val


# --- what comes out ------------------------------------------------------------------------------


@torch.no_grad()
def predict(detector: GeneralizedRCNN, image: Tensor) -> Target:
    """What is found in a uint8 image (3, H, W), on the CPU, at most 100, best first: `boxes`,
    `labels`, `scores`, and `masks` (N, H, W) bool where the detector has them."""
    device = next(detector.parameters()).device
    with evaluating(detector):
        (detections,) = detector([image.to(device).float() / 255])
    if "masks" in detections:
        detections["masks"] = detections["masks"][:, 0] >= 0.5
    return {name: values.cpu() for name, values in detections.items()}


def compare(run: Run) -> list[dict[str, str]]:
    """A row for each training that was judged as `run` was: mean AP in percent over its seeds with
    Student's 95 % interval, and n, the seeds.

    Those are the finished detection runs on the same images, by content, and of the same
    configuration and results version. A training is its configuration without the seed.
    """
    values: dict[str, list[Mapping[str, float]]] = {}
    for other in runs.find("detection"):
        if _judged_as(other) == _judged_as(run):
            values.setdefault(_training(other), []).append(other.summary or {})
    keys = [key for key in run.summary or {} if "_ap" in key]
    rows = [
        {"training": name}
        | {key: _mean([each[key] for each in summaries if key in each]) for key in keys}
        | {"n": str(len(summaries))}
        for name, summaries in values.items()
    ]
    return sorted(rows, key=lambda row: row["training"])


def _judged_as(run: Run) -> tuple[Any, ...]:
    """What two runs must have in common to stand in one table."""
    about = run.environment
    settings = {k: v for k, v in run.config.identity().items() if k != "seed"}
    return about["dataset"]["fingerprint"], about["results_version"], settings


def _training(run: Run) -> str:
    """Method, adversary and what else was set, but for the seed, of the SSL run; its id if gone."""
    try:
        config = runs.get("ssl", run.config.run).config
    except RunError:
        return run.config.run
    hidden = {"method", "adversary", "seed", "vae", "preset", "kappa", *config.circumstances}
    others = [f"{k}={v}" for k, v in config.changed().items() if k not in hidden]
    attack = "" if config.adversary == "none" else f" + {config.adversary}"
    return ", ".join([f"{config.method}{attack}", *others])


def _mean(values: Sequence[float]) -> str:
    """The mean, with Student's 95 % interval where there are several values; – where none."""
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


# --- training ------------------------------------------------------------------------------------


class Training:
    """The steps of a plan, from its run's last checkpoint on."""

    def __init__(self, plan: Plan, device: torch.device, writer: Writer) -> None:
        self.plan, self.config, self.device, self.writer = plan, plan.config, device, writer
        config = plan.config
        self.detector = _detector(config, plan.source, len(plan.train.classes), plan.train.masks)
        self.detector.to(device)
        self.norms = [m for m in self.detector.modules() if isinstance(m, nn.BatchNorm2d)]
        undecayed = [p for norm in self.norms for p in norm.parameters()]
        others = {*map(id, undecayed)}
        decayed = [p for p in self.detector.parameters() if id(p) not in others]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": WEIGHT_DECAY}]
        groups += [{"params": undecayed}]
        self.optimizer = torch.optim.SGD(groups, config.learning_rate, momentum=MOMENTUM)
        self.step, self.count, self.seconds = 0, 0, 0.0
        self.sums: dict[str, float] = {}  # over the `count` steps of the log interval under way
        if (loaded := checkpoints.load(writer.run)) is not None:
            self._load(*loaded)
            print(f"{writer.run.id}: going on after step {self.step} of {config.iterations}.")
        writer.rewind(self.step)

    def run(self) -> None:
        """Train to the end, average the BatchNorms' statistics, save.

        Raises:
            Stopped: asked to. RunError: the loss is not finite.
        """
        config = self.config
        self.detector.train()
        began = time.monotonic()
        with signals() as asked:
            for images, targets in self.batches(self.step, config.iterations):
                self.train_step(images, targets)
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                if self.step % config.log_every == 0 or self.step == config.iterations:
                    self._log()
                stop = bool(asked) or self.writer.request() is not None
                if stop or self.step % config.checkpoint_every == 0:
                    self.save()
                if stop:
                    raise Stopped(
                        f"Stopped after step {self.step} of {config.iterations} and saved: start "
                        f"the same run again to go on."
                    )
        self._average_statistics()
        self.save()

    def batches(self, first: int, last: int) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """Images in [0, 1] and their targets of steps first…last − 1, on the device."""
        config, data = self.config, self.plan.train
        order = _order(data.useful, config, range(first, last))
        loader = DataLoader(data, batch_sampler=order, num_workers=config.workers, collate_fn=list)
        for step, samples in zip(range(first, last), loader, strict=True):
            # torchvision draws flips, sides and regions from torch's own generators.
            torch.manual_seed(keyed_generator(config.seed, 0, step, SAMPLE).initial_seed())
            pairs = [
                for_training(image.to(self.device), _to(target, self.device))
                for image, target in samples
            ]
            yield [image for image, _ in pairs], [target for _, target in pairs]

    def train_step(self, images: list[Tensor], targets: list[Target]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.config, self.step)
        losses: dict[str, Tensor] = self.detector(images, targets)
        loss = torch.stack([*losses.values()]).sum()
        if not math.isfinite(loss.item()):
            raise RunError(
                f"The loss is {loss.item()} at step {self.step}: lower learning_rate "
                f"({self.config.learning_rate:g}); the last checkpoint is intact."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step, self.count = self.step + 1, self.count + 1
        for name, value in {"loss": loss, **losses}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """The BatchNorms' running statistics as plain averages, with the final weights."""
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a plain average
        few = min(PRECISE, -(-len(self.plan.train.useful) // self.config.batch_size))
        for images, targets in self.batches(self.config.iterations, self.config.iterations + few):
            self.detector(images, targets)

    def _log(self) -> None:
        config = self.config
        epoch = self.step * config.batch_size // len(self.plan.train.useful)
        speed = self.step * config.batch_size / self.seconds
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        self.writer.log(
            step=self.step, epoch=epoch, time=time.time(), **means,
            lr=rate(config, self.step - 1), images_per_second=speed,
        )  # fmt: skip
        left = (config.iterations - self.step) * config.batch_size / speed
        self.writer.state(state="going", step=self.step, steps=config.iterations, seconds_left=left)
        if self.step % config.checkpoint_every == 0:
            print(f"step {self.step}/{config.iterations} · loss {means['loss']:.3f} · "
                  f"{speed:.1f} images/s · {left / 60:.0f} min left", flush=True)  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        tensors = {f"detector.{k}": v for k, v in self.detector.state_dict().items()}
        for name, parameter in self.detector.named_parameters():
            if slot := self.optimizer.state.get(parameter):
                tensors[f"momentum.{name}"] = slot["momentum_buffer"]
        counters = {"step": self.step, "count": self.count, "seconds": self.seconds}
        checkpoints.save(self.writer.run, self.step, tensors, counters | {"sums": self.sums})

    def _load(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        self.detector.load_state_dict(checkpoints.under("detector.", tensors))
        parameters = dict(self.detector.named_parameters())
        for name, value in checkpoints.under("momentum.", tensors).items():
            self.optimizer.state[parameters[name]]["momentum_buffer"] = value.to(self.device)
        self.step, self.count, self.seconds = (counters[k] for k in ("step", "count", "seconds"))
        self.sums = counters["sums"]


def rate(config: DetectionConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, and a tenth from each of DROPS on."""
    done = min(1.0, step / config.warmup) if config.warmup else 1.0
    drops = sum(step >= round(share * config.iterations) for share in DROPS)
    return config.learning_rate * (WARMUP_FACTOR + (1 - WARMUP_FACTOR) * done) * 0.1**drops


def _order(
    indices: Sequence[int], config: DetectionConfig, steps: Iterable[int]
) -> Iterator[list[int]]:
    """The batches of these steps, from an endless row of permutations."""
    n, size = len(indices), config.batch_size

    @functools.lru_cache(2)
    def permutation(epoch: int) -> list[int]:
        return torch.randperm(n, generator=keyed_generator(config.seed, epoch, 0, ORDER)).tolist()

    for step in steps:
        places = range(step * size, (step + 1) * size)
        yield [indices[permutation(place // n)[place % n]] for place in places]


# --- the plan ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """All that a run depends on, found before any work starts."""

    config: DetectionConfig
    run: Run
    source: Run
    train: CocoSet
    val: CocoSet
    masks: str  # present, or why absent


def _plan(config: DetectionConfig) -> Plan:
    stem = {} if config.run else {"stem": "imagenet"}
    source = runs.get("ssl", config.run, **stem)
    if not isinstance(load_encoder(source).module, ResNet):
        raise ConfigError(f"run={source.id!r} has no ResNet as its encoder.")
    if (trained := source.config.stem) != "imagenet":
        raise ConfigError(
            f"run={source.id!r} was trained with stem={trained!r}: its layer 3 has stride "
            f"{STRIDES[trained]}, and Mask R-CNN needs one of {STRIDE} to see objects whole; train "
            f'one with stem="imagenet".'
        )
    paths = {name: settled(path) for name in config.sets if (path := getattr(config, name))}
    config = config.model_copy(update={"run": source.reference, **paths})
    train, val = sets(config)
    lacking = [
        f"{part.unmasked} of {part.objects} objects of {part.annotations} have no segmentation"
        for part in (train, val)
        if part.unmasked
    ]
    masks = f"absent: {' and '.join(lacking)}" if lacking else "present"
    data = f"{train.fingerprint} {val.fingerprint}"
    run = runs.run_for(config, data, encoder=checkpoints.digest(source))
    return Plan(config, run, source, train, val, masks)


def _detector(config: DetectionConfig, source: Run, classes: int, masks: bool) -> GeneralizedRCNN:
    """Mask R-CNN with new heads on the run's weights (of its main norms)."""
    encoder, trained = load_encoder(source), source.config
    weights = {k: v for k, v in encoder.module.state_dict().items() if "_adv." not in k}
    with initial_weights(config.seed):
        backbone = build_backbone(
            trained.backbone, width=trained.width, stem=trained.stem, adversarial_norms=False
        )
        backbone.load_state_dict(weights)
        return mask_rcnn(
            backbone, classes, architecture=config.architecture, size=config.size,
            rois=config.rois, mean=encoder.mean, std=encoder.std, masks=masks,
        )  # fmt: skip


def _about(plan: Plan) -> dict[str, Any]:
    encoder, train, val = load_encoder(plan.source), plan.train, plan.val
    return {
        "name": plan.config.dataset, "split": "val", "n": len(val), "n_train": len(train.useful),
        "skipped": len(train) - len(train.useful), "size": plan.config.size,
        "fingerprint": f"{train.fingerprint} {val.fingerprint}", "mean": list(encoder.mean),
        "std": list(encoder.std), "classes": list(val.classes), "masks": val.masks,
    }  # fmt: skip


def _protocol(plan: Plan) -> str:
    config, trained = plan.config, plan.source.config
    network = f"{trained.backbone}-{config.architecture.upper()}, width {trained.width}"
    caveat = "" if config.architecture == "c4" else "; not comparable with the paper's C4"
    return (
        f"Mask R-CNN, {network}, {config.iterations:,} iterations of {config.batch_size} images at "
        f"{config.size} px, all layers and BatchNorms tuned, on {config.dataset}{caveat}"
    )


def _to(target: Target, device: torch.device) -> Target:
    return {name: values.to(device) for name, values in target.items()}


def main(words: list[str]) -> int:
    """Run with the fields that `words` (name=value) set; the exit status."""
    try:
        fields: dict[str, Any] = dict(word.split("=", 1) for word in words)
        run = detect(DetectionConfig(**fields))
    except (UserError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Stopped) else 2
    print(run.path, json.dumps(run.summary, indent=1, ensure_ascii=False), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
