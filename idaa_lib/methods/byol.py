"""BYOL (Grill et al. 2020, arXiv:2006.07733).

No paper describes it with IDAA. Here the first online view is attacked against its own prediction
of the other view's target; the second direction's target is stopped, so it moves nothing. The
adversarial loss is BYOL's own, both directions, with x′ for the first view, in the target network
too.

The paper trains on ImageNet with LARS; optimiser, rate, views, the momentum to start from (.99, in
the paper .996) and the loss's scale (mean of −cos over both directions: the paper's Eq. 2 up to a
factor and a constant) are those of lightly's CIFAR-10 benchmark, where the momentum stays.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from idaa_lib.configs.base import Positive, Share
from idaa_lib.methods.augself import augself_head
from idaa_lib.methods.averages import Targeted, follow
from idaa_lib.methods.base import Batch, Moment, Step, register_method
from idaa_lib.methods.cassle import Conditioned
from idaa_lib.methods.simsiam import negative_cosine
from idaa_lib.nets.heads import mlp
from idaa_lib.views import View


@register_method("byol")
class BYOL(Targeted):
    class Options(Conditioned.Options):
        """projection_dim: D of the embeddings. momentum: τ of the moving average at the start, in
        [0, 1]."""

        projection_dim: Positive = 256
        momentum: Share = 0.99

    recordable = True
    last_bias = True  # of both heads' last layers

    def projector(self, inputs: int, dim: int) -> nn.Module:
        return self._head(inputs, dim, augself=self.features)

    def predictor(self, dim: int) -> nn.Module:
        return self._head(dim, dim, augself=4096)

    def _head(self, inputs: int, dim: int, augself: int) -> nn.Module:
        if self.has_augself_heads:
            return augself_head(inputs, augself, dim)
        # Hidden: 4096 for a ResNet-50 in the paper, 1024 for CIFAR's.
        return mlp(inputs, 2 * self.features, dim, last_bias=self.last_bias)

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        v1, v2 = views
        online1, online2 = self.embed(v1), self.embed(v2)  # z, p (B, D)
        t1, t2 = self.aim(v1).z, self.aim(v2).z

        def loss_of(p: Tensor, t: Tensor) -> Tensor:  # of the first view, online and target
            both = negative_cosine(p, t2) + negative_cosine(online2.p, t)
            return 2 * both if self.has_augself_heads else both / 2

        return self.two_view_step(
            loss_of(online1.p, t1),
            views,
            (online1, online2),
            lambda e, at_start: negative_cosine(e.p, t2),
            lambda e, v_adv: loss_of(e.p, self.aim(v_adv, adversarial=True).z),
        )

    def after_step(self, step: Step, moment: Moment) -> None:
        """τ = 1 − (1 − τ_base)·(cos πk/K + 1)/2 (the paper, §3.3): the target slows to a halt."""
        share = (math.cos(math.pi * moment.step / moment.steps) + 1) / 2
        follow(self.target, self.network, 1 - (1 - self.options.momentum) * share)
