"""The linear classifier that SimSiam's ImageNet numbers are of (docs/spec/idaa.md §5).

It sees another random crop of each image in each of 90 epochs, so features are made anew each time:
as long as such a training takes. What the specification leaves open is as in SimSiam's public code
(`main_lincls.py`): momentum .9, trust .001, normal weights of .01, a cosine by epoch.

Images are kept as squares, so a crop is of the square in the middle of a photograph, of 256 pixels
where the encoder takes 224, and not of all of it; the test crops are the published ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import Encoder, features
from idaa_lib.methods.schedules import build_optimizer, build_schedule
from idaa_lib.runs import Stopped, Writer, checkpoints
from idaa_lib.runs.machine import signals
from idaa_lib.views import Recipe, keyed_generator

EPOCHS, TRUST = 90, 0.001
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
    """Train the classifier of the writer's run, or go on after its last checkpoint, and apply it.

    Args:
        encoder: frozen. train, test: images of `enlarged(encoder.size)` pixels.
    Raises:
        Stopped: on a request to stop or pause, after the state was saved.
    """
    module, size, mean, std = encoder.to(device)
    edge = (test.size - size) // 2
    central = test.images[..., edge : edge + size, edge : edge + size]
    z_test = features(module, central, size, mean, std, device=device, bf16=bf16)
    crops = Recipe(size, mean, std, crop_scale=(0.08, 1.0), flip=0.5)

    layer = nn.Linear(z_test.shape[1], len(train.classes))
    generator = keyed_generator(seed)
    with torch.no_grad():
        layer.weight.normal_(0, 0.01, generator=generator)
        layer.bias.zero_()
    layer.to(device)
    batch_size = min(batch_size, len(train))
    per_epoch = math.ceil(len(train) / batch_size)
    rate, factor = RATE * batch_size / 256, build_schedule("cosine", epochs, per_epoch)
    optimizer = build_optimizer("sgd", [{"params": [*layer.parameters()]}], rate)
    first, steps = _load(writer, layer, optimizer), epochs * per_epoch
    writer.rewind(first)
    order, began = torch.empty(0), time.monotonic()
    with signals() as asked:
        for step in range(first, steps):
            epoch, at = divmod(step, per_epoch)
            if step == first or at == 0:
                order = torch.randperm(len(train), generator=keyed_generator(seed, epoch))
            index = order[at * batch_size : (at + 1) * batch_size]
            z = features(
                module, train.images[index], size, mean, std, device=device, bf16=bf16,
                transform=crops, generator=keyed_generator(seed, epoch, at),
            )  # fmt: skip
            optimizer.param_groups[0]["lr"] = rate * factor(step)
            with torch.enable_grad():
                loss = F.cross_entropy(layer(z.to(device)), train.labels[index].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            scale_by_trust(layer.parameters())
            optimizer.step()

            done, stop = step + 1, bool(asked) or writer.request() is not None
            left = (time.monotonic() - began) / (done - first) * (steps - done)
            writer.log(step=done, epoch=epoch, time=time.time(), loss=loss.item())
            writer.state(state="going", step=done, steps=steps, seconds_left=left)
            if stop or done % per_epoch == 0:
                _save(writer, layer, optimizer, done)
            if stop:
                raise Stopped(
                    f"Stopped after step {done} of {steps} and saved: start the same evaluation "
                    f"again to go on."
                )
    with torch.no_grad():
        scores = layer(z_test.to(device)).cpu()
    return CropProbe(scores.argmax(1), scores.topk(min(5, scores.shape[1])).indices)


@torch.no_grad()
def scale_by_trust(parameters: Iterable[nn.Parameter]) -> None:
    """LARS (You et al. 2017, arXiv:1708.03888, Eq. 6, without weight decay), on the gradients: each
    becomes as long as `TRUST` times its parameter; that of a parameter at 0 stays."""
    for parameter in parameters:
        assert parameter.grad is not None
        length, gradient = parameter.norm(), parameter.grad.norm()
        trusted = TRUST * length / gradient.clamp_min(1e-12)
        parameter.grad *= torch.where(length > 0, trusted, torch.ones_like(trusted))


def _save(writer: Writer, layer: nn.Linear, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = dict(layer.state_dict())
    for name, parameter in layer.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    checkpoints.save(writer.run, step, tensors, {"step": step})


def _load(writer: Writer, layer: nn.Linear, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on after: 0 where there is no checkpoint."""
    if (loaded := checkpoints.load(writer.run)) is None:
        return 0
    tensors, state = loaded
    for name, parameter in layer.named_parameters():
        momentum = tensors.pop(f"momentum.{name}").to(parameter.device)
        optimizer.state[parameter]["momentum_buffer"] = momentum
    layer.load_state_dict(tensors)
    print(f"{writer.run.id}: going on after step {state['step']} of the classifier.")
    return int(state["step"])
