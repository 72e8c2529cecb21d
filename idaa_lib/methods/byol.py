"""BYOL (Grill et al. 2020, arXiv:2006.07733).

No paper describes it with IDAA: the pair follows the general rule (shared design, "A method"). The
first online view is attacked against its own prediction of the other view's target; the second
direction's target is stopped, so it moves nothing. The adversarial loss is BYOL's own, both
directions, with x′ for the first view, in the target network too.

The paper trains on ImageNet with LARS; optimiser, rate, views, the momentum to start from (.99, in
the paper .996) and the loss's scale (mean of −cos over both directions: the paper's Eq. 2 up to a
factor and a constant) are those of lightly's CIFAR-10 benchmark, where the momentum stays.
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
    Step,
    backbone_of,
    epoch_cosine,
    follow,
    frozen_copy,
    momentum_sgd,
    register_method,
    two_view_step,
)
from idaa_lib.methods.simsiam import negative_cosine
from idaa_lib.nets.heads import Siamese, mlp
from idaa_lib.views import Recipe, View


@register_method("byol")
class BYOL(Method):
    def __init__(self, config: SSLConfig, recipe: Recipe) -> None:
        backbone, dim = backbone_of(config), config.projection_dim
        hidden = 2 * backbone.feature_dim  # 4096 for a ResNet-50 in the paper, 1024 for CIFAR's
        projector, predictor = mlp(backbone.feature_dim, hidden, dim), mlp(dim, hidden, dim)
        network = Siamese(backbone, projector, predictor)
        super().__init__(network, recipe, config.weight_decay)
        self.target = frozen_copy(network.embedder)
        self.momentum = config.momentum

    def step(self, views: tuple[View, ...], batch: Batch) -> Step:
        v1, v2 = (view.images for view in views)
        (z1, p1), (z2, p2) = self.network(v1), self.network(v2)  # (B, D)
        t1, t2 = self._aim(v1), self._aim(v2)

        def attack_loss(x: Tensor) -> Tensor:
            _, p = self.with_fixed_weights(x, adversarial=True)
            return negative_cosine(p, t2)

        def adversarial_loss(x_adv: Tensor) -> Tensor:
            _, p = self.network(x_adv, adversarial=True)
            t = self._aim(x_adv, adversarial=True)
            return (negative_cosine(p, t2) + negative_cosine(p2, t)) / 2

        return two_view_step(
            (negative_cosine(p1, t2) + negative_cosine(p2, t1)) / 2,
            views,
            batch,
            (z1, z2),
            attack_loss=attack_loss,
            adversarial_loss=adversarial_loss,
        )

    @torch.no_grad()
    def _aim(self, images: Tensor, **how: Any) -> Tensor:
        """The target's z (B, D)."""
        return self.target(images, **how)

    def after_step(self, step: Step, progress: float) -> None:
        """τ = 1 − (1 − τ_base)·(cos πk/K + 1)/2 (the paper, §3.3): the target slows to a halt."""
        momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
        follow(self.target, self.network, momentum)

    def schedule(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        return epoch_cosine(epochs, steps_per_epoch)

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return momentum_sgd(groups, lr)
