"""Published linear classifiers that see another view of each image in each epoch.

Their protocols are data (`methods.Classifier`): SimSiam's on ImageNet (docs/spec/idaa.md §5),
IP-IRM's and RSA's two (docs/spec/siblings.md §2.6, §3.4). Features are made anew for each view; the
encoder's BatchNorm stays in eval mode.

Images are kept as squares. Where the encoder takes 224 pixels of a photograph, a crop is of the
square in its middle, of 256 pixels, and not of all of it, unless photographs are streamed; the test
crops are the published ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import Encoder, features
from idaa_lib.evaluate.metrics import top1
from idaa_lib.methods import Classifier
from idaa_lib.methods.schedules import build_optimizer, build_schedule
from idaa_lib.nets import initial_weights
from idaa_lib.runs import Run, Writer, checkpoints
from idaa_lib.runs.steps import State, Steps
from idaa_lib.views import Recipe, keyed_generator, recipe

OPTIMIZERS = {"lars": "LARS", "adam": "Adam", "sgd": "SGD", "nesterov": "Nesterov's SGD"}


def enlarge(size: int) -> int:
    """Side of the images that crops of `size` pixels are taken of: 256 for 224."""
    return round(size * 256 / 224)


def describe(
    classifier: Classifier, size: int, side: int, whole: bool, streamed: bool = False
) -> str:
    """A classifier in words.

    Args:
        size: of a view, in pixels. side: of the images. whole: `OfficialProtocol.whole`. streamed:
            whether crops are of the originals.
    """
    words = f"{OPTIMIZERS[classifier.optimizer]} on random "
    if classifier.augmentation:
        words += f"views ({classifier.augmentation!r})"
    else:
        words += "crops" if whole or streamed else "crops of central squares"
    if classifier.standardise:
        words += ", features L2-normalised and standardised"
    words += f", {classifier.epochs} epochs, the {'best on test' if classifier.best else 'last'}"
    if whole:
        middle = f"the middle {size} px of " if classifier.middle and size < side else ""
        words += f", tested on {middle}{side} px"
    if classifier.drifts:
        words += ", BatchNorm in eval mode (the published code lets it drift)"
    return words


def crop_probe(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    run: Run,
    writer: Writer | None,
    *,
    classifier: Classifier,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Scores (Q, C) of the test images by the classifier of `run`, at the epoch that
    counts, and its top-1 in percent at the last one. It is trained from the run's last checkpoint
    on.

    Args:
        encoder: frozen. train, test: images that views are cut of, of one size.
    Raises:
        Stopped: on a request to stop, after the state was saved.
    """
    module, size, mean, std = encoder.to(device)
    machine: dict[str, Any] = dict(device=device, output_device=device, bf16=bf16)
    views = Recipe(size, mean, std, crop_scale=(0.08, 1.0), flip=0.5)
    if classifier.augmentation:
        views = recipe(classifier.augmentation, size, mean, std)

    def encode(images: Any) -> Tensor:
        """Features of test views, of the middle or of all of the images."""
        side = images.shape[-1]
        crop_side = size if classifier.middle else side
        middle = slice((side - crop_side) // 2, (side + crop_side) // 2)
        part = Part(images, torch.arange(len(images)), middle)
        return features(module, part, crop_side, mean, std, **machine)

    prepare = _standardise(encode(train.images)) if classifier.standardise else lambda z: z
    z_test, truth = prepare(encode(test.images)), test.labels.to(device)

    with initial_weights(seed):
        layer = nn.Linear(z_test.shape[1], len(train.classes))
    if classifier.deviation is not None:
        nn.init.normal_(layer.weight, 0, classifier.deviation, generator=keyed_generator(seed))
        nn.init.zeros_(layer.bias)
    # The classifier that counts: of the best epoch so far, or as it is now.
    scorer = copy.deepcopy(layer.to(device)) if classifier.best else layer
    best_top1 = -1.0
    parameters = dict(layer.named_parameters())
    batch_size = min(batch_size, len(train))
    batches = len(train) / batch_size
    per_epoch = math.floor(batches) if classifier.drop_last else math.ceil(batches)
    factor = build_schedule(classifier.schedule, classifier.epochs, per_epoch)
    rate = classifier.rate * batch_size / 256 if classifier.scaled else classifier.rate
    group = {"params": [*parameters.values()], "weight_decay": classifier.weight_decay}
    optimizer = build_optimizer(classifier.optimizer, [group], rate)

    def state() -> State:
        slots = {
            f"optimizer.{name}.{slot}": value
            for name, parameter in parameters.items()
            for slot, value in optimizer.state[parameter].items()
        }
        weights = scorer.state_dict().items() if classifier.best else ()
        best = {f"best.{name}": value for name, value in weights}
        return parameters | slots | best, {"best_top1": best_top1}

    def restore(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        nonlocal best_top1
        layer.load_state_dict({name: tensors[name] for name in parameters})
        if classifier.best:
            scorer.load_state_dict(checkpoints.under("best.", tensors))
            best_top1 = values["best_top1"]
        for key, value in checkpoints.under("optimizer.", tensors).items():
            name, _, slot = key.partition(".")
            optimizer.state[parameters[name]][slot] = value.to(device)

    @torch.no_grad()
    def judge() -> float:
        return top1(layer(z_test).argmax(1), truth)

    def keep_best(epoch: int) -> dict[str, float]:
        """Of equally good epochs the first is kept."""
        nonlocal best_top1
        if not classifier.best:
            return {}
        if (value := judge()) > best_top1:
            best_top1 = value
            scorer.load_state_dict(layer.state_dict())
        return {"top1_test": value}

    steps = Steps(
        run,
        writer,
        classifier.epochs * per_epoch,
        per_epoch=per_epoch,
        images=batch_size,
        log_every=min(10, per_epoch),
        state=state,
        restore=restore,
        at_epoch_end=keep_best,
    )
    steps.resume()
    for step in steps:
        epoch, at = divmod(step, per_epoch)
        order = torch.randperm(len(train), generator=keyed_generator(seed, epoch))
        index = order[at * batch_size : (at + 1) * batch_size]
        generator = keyed_generator(seed, epoch, at)
        options = machine | {"transform": views, "generator": generator}
        options["originals"] = train.streamed
        part = train.images.pick(index.numpy()) if train.streamed else Part(train.images, index)
        z = prepare(features(module, part, size, mean, std, **options))
        optimizer.param_groups[0]["lr"] = rate * factor(step)
        with torch.enable_grad():
            loss = F.cross_entropy(layer(z), train.labels[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps.add({"loss": loss})
    with torch.no_grad():
        return scorer(z_test).cpu(), judge()


class Part:
    """The `middle` of some of the images, read where they are asked for, so that of several
    processes each reads its own."""

    def __init__(self, images: Any, rows: Tensor, middle: slice = slice(None)) -> None:
        self.images, self.rows, self.middle = images, rows, middle

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Tensor:
        return self.images[self.rows[index]][..., self.middle, self.middle]


def _standardise(z: Tensor) -> Callable[[Tensor], Tensor]:
    """What L2-normalises features and standardises them as the training's (N, D) are then."""
    z = F.normalize(z, dim=1)
    mean, deviation = z.mean(0), (z.var(0) + 1e-5).sqrt()
    return lambda z: (F.normalize(z, dim=1) - mean) / deviation
