"""SimSiam (Chen & He 2021, arXiv:2011.10566), with IDAA or CLAE on its first view.

Two variants, `pairing` in the configuration, as the authors' development code pairs x′; the
official release has no SimSiam, and the final settings are not known (docs/spec/idaa.md §2, §4):

- `cifar`: the sum of both directions without ½; x′ is paired with the view that was attacked;
  projector of 2 layers; warm-up and cosine by iteration, the predictor at a constant rate.
- `imagenet`: the mean of both directions; x′ is paired with the other view; projector of 3 layers;
  cosine by epoch for all; residual branches start at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from idaa_lib.configs import SSLConfig
from idaa_lib.methods.base import (
    Batch,
    Method,
    OfficialProtocol,
    Step,
    anchored,
    backbone_of,
    epoch_cosine,
    momentum_sgd,
    register_method,
    two_view_step,
)
from idaa_lib.nets.heads import Siamese, mlp, simsiam_projector
from idaa_lib.nets.resnet import zero_residuals
from idaa_lib.views import Recipe, View


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) = −cos(p, stop-gradient z) (SimSiam, Eq. 1), mean over B.

    p, z: (B, D), L2-normalised. A mean over samples: processes need not exchange embeddings.
    """
    return -(p * z.detach()).sum(1).mean()


@register_method("simsiam")
class SimSiam(Method):
    """The attack starts at its own anchor, but the predictor lies between: its gradient is not
    0."""

    def __init__(self, config: SSLConfig, recipe: Recipe) -> None:
        backbone, dim = backbone_of(config), config.projection_dim
        self.cifar = config.pairing == "cifar"
        if not self.cifar:
            zero_residuals(backbone)
        projector = simsiam_projector(backbone.feature_dim, dim, layers=2 if self.cifar else 3)
        network = Siamese(backbone, projector, mlp(dim, max(1, dim // 4), dim))
        super().__init__(network, recipe, config.weight_decay)
        self.reuse_anchor = config.reuse_anchor

    @classmethod
    def official_protocol(cls, config: SSLConfig) -> OfficialProtocol:
        if config.pairing == "imagenet":
            return cls.official._replace(
                of="SimSiam on ImageNet", linear_epoch="last", batch_size=4096, crops=True
            )
        return cls.official

    def step(self, views: tuple[View, ...], batch: Batch) -> Step:
        v1, v2 = (view.images for view in views)
        (z1, p1), (z2, p2) = self.network(v1), self.network(v2)  # (B, D)
        anchor = anchored(lambda: self.network(v1, adversarial=True)[0], self.reuse_anchor)

        def attack_loss(x: Tensor, at_start: bool = False) -> Tensor:
            z, p = self.with_fixed_weights(x, adversarial=True)
            return negative_cosine(p, anchor(z, at_start))

        def adversarial_loss(x_adv: Tensor) -> Tensor:
            z, p = self.network(x_adv, adversarial=True)
            return self._both(p1, z1, p, z) if self.cifar else self._both(p2, z2, p, z)

        return two_view_step(
            self._both(p1, z1, p2, z2),
            views,
            batch,
            (z1, z2),
            attack_loss=attack_loss,
            adversarial_loss=adversarial_loss,
        )

    def _both(self, p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor) -> Tensor:
        both = negative_cosine(p1, z2) + negative_cosine(p2, z1)
        return both if self.cifar else both / 2

    def schedule(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        """On CIFAR 10 epochs of warm-up (a tenth of the training, if that is less) and a cosine."""
        if not self.cifar:
            return epoch_cosine(epochs, steps_per_epoch)
        warm = min(10, epochs // 10) * steps_per_epoch
        rest = epochs * steps_per_epoch - warm

        def factor(step: int) -> float:
            if step < warm:
                return step / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / rest))

        return factor

    def param_groups(self, epochs: int, steps_per_epoch: int) -> list[dict[str, Any]]:
        (group,) = super().param_groups(epochs, steps_per_epoch)
        if not self.cifar:
            return [group]
        predictor = list(self.network.get_submodule("predictor").parameters())
        body = group["params"][: -len(predictor)]
        constant = {"params": predictor, "schedule": lambda step: 1.0}
        return [group | {"params": body}, group | constant]

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return momentum_sgd(groups, lr)
