"""Optimisers and schedules by name: what recipes choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from idaa_lib.configs import ConfigError

Factor = Callable[[int], float]  # global step → factor of the learning rate


def _constant(epochs: int, per_epoch: int) -> Factor:
    return lambda step: 1.0


def _linear(epochs: int, per_epoch: int) -> Factor:
    """Epoch e = 1…E at 1 − (e−1)/E (the release's VAE)."""
    return lambda step: 1 - (step // per_epoch) / epochs


def _cosine(epochs: int, per_epoch: int, delay: int = 0) -> Factor:
    """½(1 + cos(πe/E)) by epoch, the first `delay` epochs at 1 and the cosine from there on."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * max(0, step // per_epoch - delay) / epochs))


def _cosine_by_step(epochs: int, per_epoch: int) -> Factor:
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / (epochs * per_epoch)))


def _drops(epochs: int, per_epoch: int) -> Factor:
    """×.1 from epoch 120, ×.05 from 160, ×.01 from 200 of Plain's published 301; in a training of
    another length at the same shares of it (spec §4; not the drops of its mini-ImageNet runs)."""

    def factor(step: int) -> float:
        epoch = step // per_epoch * 301
        drops = ((200, 0.01), (160, 0.05), (120, 0.1))
        return next((low for at, low in drops if epoch >= at * epochs), 1.0)

    return factor


def _seven_sixteenths(epochs: int, per_epoch: int) -> Factor:
    """cos(7πk / 16K) at step k of K (FixMatch)."""
    return lambda step: math.cos(7 * math.pi * step / (16 * epochs * per_epoch))


SCHEDULES: dict[str, Callable[[int, int], Factor]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "delayed_cosine": partial(_cosine, delay=11),  # SimCLR's code: from the 13th epoch (spec §4)
    "cosine_by_step": _cosine_by_step,
    "drops": _drops,
    "seven_sixteenths": _seven_sixteenths,
}


def build_schedule(name: str, epochs: int, per_epoch: int, warmup: int = 0) -> Factor:
    """The schedule `name` of a training of so many epochs and steps an epoch.

    Args:
        warmup: epochs of linear warm-up from 0, a tenth of all at most; the rest has the schedule.
    Raises:
        ConfigError: no schedule has this name.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, and is {name!r}.")
    warmup = min(warmup, epochs // 10)
    factor, steps = SCHEDULES[name](epochs - warmup, per_epoch), warmup * per_epoch
    return lambda step: step / steps if step < steps else factor(step - steps)


def build_optimizer(name: str, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """The optimiser `name` of parameter groups.

    `adam_b0` is the VAE's, with β₁ = 0. (The release's own Adam adds 1e-8 to √v before the bias
    correction, torch's after it: below rounding wherever √v is not itself near 1e-8.) `sgd` has
    momentum .9.
    """
    # Fused: one kernel for all parameters, on the CPU too; the arithmetic is the same.
    if name in ("adam", "adam_b0"):
        betas = (0.9 if name == "adam" else 0.0, 0.999 if name == "adam" else 0.9)
        return torch.optim.Adam(groups, lr=rate, betas=betas, fused=True)
    if name in ("sgd", "nesterov"):
        return torch.optim.SGD(
            groups, lr=rate, momentum=0.9, nesterov=name == "nesterov", fused=True
        )
    if name == "lars":
        from idaa_lib.methods.lars import LARS

        return LARS(groups, lr=rate)
    raise ConfigError(f"optimizer must be adam, adam_b0, sgd, nesterov or lars, and is {name!r}.")
