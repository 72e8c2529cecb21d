"""The linear classifier that SimSiam's ImageNet numbers are of (docs/spec/idaa.md §5).

It sees another random crop of each image in each of 90 epochs, so features are made anew each time:
as long as such a training takes. What the specification leaves open is as in SimSiam's public code
(`main_lincls.py`): momentum .9, trust .001, normal weights of .01, a cosine by epoch.

Images are kept as squares, so a crop is of the square in the middle of a photograph, of 256 pixels
where the encoder takes 224, and not of all of it; the test crops are the published ones.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import Encoder, features
from idaa_lib.methods.lars import LARS
from idaa_lib.methods.schedules import build_schedule
from idaa_lib.runs import Writer
from idaa_lib.runs.steps import State, Steps
from idaa_lib.views import Recipe, keyed_generator

EPOCHS = 90
RATE = 0.1  # of 256 images, and scaled by the batch


class CropProbe(NamedTuple):
    """Predictions (Q,) int64 of the last epoch's classifier; the (up to) five likeliest (Q, 5)."""

    predictions: Tensor
    likeliest: Tensor


def enlarged(size: int) -> int:
    """Side of the images that crops of `size` pixels are taken of: 256 for 224."""
    return round(size * 256 / 224)


def crop_probe(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    writer: Writer,
    *,
    device: torch.device,
    bf16: bool = False,
    batch_size: int = 4096,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> CropProbe:
    """Train the classifier of the writer's run, or continue after its last checkpoint; apply it.

    Args:
        encoder: frozen. train, test: images of `enlarged(encoder.size)` pixels.
    Raises:
        Stopped: on a request to stop, after the state was saved.
    """
    module, size, mean, std = encoder.to(device)
    encode = partial(
        features, module, size=size, mean=mean, std=std, device=device, output_device=device,
        bf16=bf16,
    )  # fmt: skip
    edge = (test.size - size) // 2
    z_test = encode(test.images[..., edge : edge + size, edge : edge + size])
    crops = Recipe(size, mean, std, crop_scale=(0.08, 1.0), flip=0.5)

    layer = nn.Linear(z_test.shape[1], len(train.classes))
    nn.init.normal_(layer.weight, 0, 0.01, generator=keyed_generator(seed))
    nn.init.zeros_(layer.bias)
    layer.to(device)
    batch_size = min(batch_size, len(train))
    per_epoch = math.ceil(len(train) / batch_size)
    rate, factor = RATE * batch_size / 256, build_schedule("cosine", epochs, per_epoch)
    optimizer = LARS(layer.parameters(), rate)

    def state() -> State:
        momenta = {
            f"momentum.{name}": optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in layer.named_parameters()
        }
        return layer.state_dict() | momenta, {}

    def restore(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        for name, parameter in layer.named_parameters():
            momentum = tensors[f"momentum.{name}"].to(device)
            optimizer.state[parameter]["momentum_buffer"] = momentum
        layer.load_state_dict({name: tensors[name] for name in layer.state_dict()})

    @functools.lru_cache(1)
    def shuffle(epoch: int) -> Tensor:
        return torch.randperm(len(train), generator=keyed_generator(seed, epoch))

    steps = Steps(
        writer.run, writer, epochs * per_epoch, per_epoch=per_epoch, images=batch_size,
        log_every=min(10, per_epoch), state=state, restore=restore,
    )  # fmt: skip
    steps.resume()
    for step in steps:
        epoch, at = divmod(step, per_epoch)
        index = shuffle(epoch)[at * batch_size : (at + 1) * batch_size]
        numbers = keyed_generator(seed, epoch, at)
        z = encode(train.images[index], transform=crops, generator=numbers)
        optimizer.param_groups[0]["lr"] = rate * factor(step)
        with torch.enable_grad():
            loss = F.cross_entropy(layer(z), train.labels[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps.add({"loss": loss})
    with torch.no_grad():
        scores = layer(z_test).cpu()
    return CropProbe(scores.argmax(1), scores.topk(min(5, scores.shape[1])).indices)
