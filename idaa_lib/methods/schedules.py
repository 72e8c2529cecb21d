"""Optimisers and schedules by name: what recipes choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from idaa_lib.configs import ConfigError
from idaa_lib.methods.lars import LARS


def _cosine(step: int, epochs: int, per_epoch: int, delay: int = 0) -> float:
    """½(1 + cos(πe/E)) by epoch, the first `delay` epochs at 1 and the cosine from there on."""
    return 0.5 * (1 + math.cos(math.pi * max(0, step // per_epoch - delay) / epochs))


def _drops(
    step: int, epochs: int, per_epoch: int, of: int, drops: tuple[tuple[int, float], ...]
) -> float:
    """(epoch, factor from there on), the last first, of a published training of `of` epochs; in one
    of another length at the same shares of it."""
    epoch = step // per_epoch * of
    return next((low for at, low in drops if epoch >= at * epochs), 1.0)


# Name → (step, epochs, steps an epoch) → factor of the learning rate.
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, epochs, per_epoch: 1.0,
    # Epoch e = 1…E at 1 − (e−1)/E (the release's VAE).
    "linear": lambda step, epochs, per_epoch: 1 - (step // per_epoch) / epochs,
    "cosine": _cosine,
    "delayed_cosine": partial(_cosine, delay=11),  # SimCLR's code: from the 13th epoch (spec §4)
    "cosine_by_step": lambda step, epochs, per_epoch: _cosine(step, epochs * per_epoch, 1),
    # Plain's (spec §4; not the drops of its mini-ImageNet runs).
    "drops": partial(_drops, of=301, drops=((200, 0.01), (160, 0.05), (120, 0.1))),
    # Of linear classifiers (spec/siblings.md §3.4).
    "drops_60_80": partial(_drops, of=100, drops=((80, 0.01), (60, 0.1))),
    "drops_15_30": partial(_drops, of=40, drops=((30, 0.01), (15, 0.1))),
    # cos(7πk / 16K) at step k of K (FixMatch).
    "seven_sixteenths": lambda k, epochs, per_epoch: math.cos(
        7 * math.pi * k / (16 * epochs * per_epoch)
    ),
}
# Fused: one kernel for all parameters, on the CPU too; the arithmetic is the same. The release's
# own Adam adds 1e-8 to √v before the bias correction, torch's after it: below rounding wherever √v
# is not itself near 1e-8.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adam_b0": partial(torch.optim.Adam, betas=(0.0, 0.9), fused=True),  # the VAE's: β₁ = 0
    "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    "lars": LARS,
}


def build_schedule(
    name: str, epochs: int, per_epoch: int, warmup: int = 0
) -> Callable[[int], float]:
    """Global step → factor of the learning rate, by the schedule `name` of a training of so many
    epochs and steps an epoch; ConfigError where no schedule has this name.

    warmup: epochs of linear warm-up from 0; the rest has the schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, and is {name!r}.")
    factor, steps = SCHEDULES[name], warmup * per_epoch

    def find(step: int) -> float:
        return step / steps if step < steps else factor(step - steps, epochs - warmup, per_epoch)

    return find


def spare_vectors(group: dict[str, Any], **how: Any) -> list[dict[str, Any]]:
    """A group of parameters in two: the rest, and its vectors (biases, norms), which do not decay
    and are treated as `how` says."""
    vectors = [p for p in group["params"] if p.ndim < 2]
    rest = [p for p in group["params"] if p.ndim >= 2]
    return [group | {"params": rest}, group | {"params": vectors, "weight_decay": 0.0, **how}]


def build_optimizer(name: str, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """The optimiser `name` of parameter groups."""
    return OPTIMIZERS[name](groups, lr=rate)
