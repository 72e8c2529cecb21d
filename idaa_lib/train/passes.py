"""How many passes of the backbone an image costs: what methods are compared at beside epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idaa_lib.adversaries import build_adversary
from idaa_lib.configs import SSLConfig
from idaa_lib.methods import About, build_method
from idaa_lib.methods.base import Work
from idaa_lib.nets.vae import VAE
from idaa_lib.train.accelerator import make_accelerator
from idaa_lib.train.loop import Fit
from idaa_lib.views import keyed_generator, recipe

N = 8  # images of the step that is counted


def count_passes(config: SSLConfig) -> float:
    """Forward passes of a backbone for each image of a batch, counted with narrow networks: the
    mean over epochs.

    Those of target networks count too, and of an attack those that it differentiates. Of IP-IRM
    its maximisation counts, and a step with the partitions that an epoch has.
    """
    plain: Any = {"device": "cpu", "precision": "fp32", "compile": False, "tracker": "none"}
    narrow = config.replace(width=4, batch_size=N, processes=1, **plain)
    views = recipe(config.augmentation, config.size, (0.5,) * 3, (0.25,) * 3)
    about = About(views, torch.zeros(N), 1, config.epochs, N, config.seed)
    method = build_method(narrow, about)
    count = 0

    def add(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal count
        count += len(output)

    def embed(layer: str = "backbone", **how: Any) -> Tensor:
        nonlocal count
        count += N
        generator = keyed_generator(count)
        return torch.nn.functional.normalize(torch.randn(N, 16, generator=generator), dim=1)

    silent = lambda message: None  # noqa: E731
    work = Work(torch.zeros(N, 3, 1, 1, dtype=torch.uint8), embed, silent, silent)
    for module in method.modules():
        if hasattr(module, "feature_dim"):
            module.register_forward_hook(add)
    shape = (N, 3, config.size, config.size)
    images = torch.randint(0, 256, shape, generator=keyed_generator(config.seed)).to(torch.uint8)
    units: Any = {"mean": views.mean, "std": views.std}
    vae = VAE(8, config.size, 8, **units) if config.needs_vae else None
    adversary = build_adversary(narrow, vae, **units)
    fit = Fit(make_accelerator(narrow, Path()), method.train(), images, narrow, adversary)
    of_steps = of_step = 0
    for epoch in range(config.epochs):
        before = count
        method.before_epoch(epoch, work)
        if epoch == 0 or count > before:  # after it a step may cost more; until the next, as much
            start = count
            fit.train_step(0, {"images": images}, {"images": torch.arange(N)})
            count, of_step = start, count - start
        of_steps += of_step
    return (count + of_steps) / config.epochs / N
