"""The linear classifier that SimSiam's ImageNet numbers are of (docs/spec/idaa.md §5).

It sees another random crop of each image in each of 90 epochs, so features are made anew each time.
What the specification leaves open is as in SimSiam's public code (`main_lincls.py`): momentum .9,
trust .001, normal weights of .01, a cosine by epoch.

Images are kept as squares, so a crop is of the square in the middle of a photograph, of 256 pixels
where the encoder takes 224, and not of all of it; the test crops are the published ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import Encoder, features
from idaa_lib.methods.schedules import build_optimizer, build_schedule
from idaa_lib.runs import Writer
from idaa_lib.runs.steps import State, Steps
from idaa_lib.views import Recipe, keyed_generator

EPOCHS = 90
RATE = 0.1  # of 256 images, and scaled by the batch


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
) -> Tensor:
    """Scores (Q, C) of the test images by the classifier of the writer's run after its last epoch,
    which is trained from its last checkpoint on.

    Args:
        encoder: frozen. train, test: images of `enlarged(encoder.size)` pixels.
    Raises:
        Stopped: on a request to stop, after the state was saved.
    """
    module, size, mean, std = encoder.to(device)
    how: dict[str, Any] = dict(device=device, output_device=device, bf16=bf16)
    crops = Recipe(size, mean, std, crop_scale=(0.08, 1.0), flip=0.5)
    middle = slice((test.size - size) // 2, (test.size + size) // 2)
    z_test = features(module, test.images[..., middle, middle], size, mean, std, **how)

    layer = nn.Linear(z_test.shape[1], len(train.classes))
    nn.init.normal_(layer.weight, 0, 0.01, generator=keyed_generator(seed))
    nn.init.zeros_(layer.bias)
    parameters = dict(layer.to(device).named_parameters())
    batch_size = min(batch_size, len(train))
    per_epoch = math.ceil(len(train) / batch_size)
    rate, factor = RATE * batch_size / 256, build_schedule("cosine", epochs, per_epoch)
    optimizer = build_optimizer("lars", [{"params": [*parameters.values()]}], rate)

    def state() -> State:
        slots = {f"momentum.{name}": optimizer.state[p] for name, p in parameters.items()}
        return parameters | {name: slot["momentum_buffer"] for name, slot in slots.items()}, {}

    def restore(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        layer.load_state_dict({name: tensors[name] for name in parameters})
        for name, parameter in parameters.items():
            momentum = tensors[f"momentum.{name}"].to(device)
            optimizer.state[parameter]["momentum_buffer"] = momentum

    steps = Steps(
        writer.run,
        writer,
        epochs * per_epoch,
        per_epoch=per_epoch,
        images=batch_size,
        log_every=min(10, per_epoch),
        state=state,
        restore=restore,
    )
    steps.resume()
    for step in steps:
        epoch, at = divmod(step, per_epoch)
        order = torch.randperm(len(train), generator=keyed_generator(seed, epoch))
        index = order[at * batch_size : (at + 1) * batch_size]
        how |= {"transform": crops, "generator": keyed_generator(seed, epoch, at)}
        z = features(module, train.images[index], size, mean, std, **how)
        optimizer.param_groups[0]["lr"] = rate * factor(step)
        with torch.enable_grad():
            loss = F.cross_entropy(layer(z), train.labels[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps.add({"loss": loss})
    with torch.no_grad():
        return layer(z_test).cpu()
