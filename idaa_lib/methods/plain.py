"""Plain: in-batch instance discrimination in one direction, with IDAA or CLAE on its first view.

The "plain" of CLAE (Ho & Vasconcelos, NeurIPS 2020): no memory bank. Loss and recipe are of CLAE's
code; the step with IDAA is of the authors' development code, since the official release has no
Plain (docs/spec/idaa.md §2, §4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.methods.base import OfficialProtocol, momentum_sgd, register_method, similarity
from idaa_lib.methods.contrastive import Contrastive


def one_way(f1: Tensor, f2: Tensor, temperature: float, reduction: str = "mean") -> Tensor:
    """Mean over the B rows of −log softmax of f₁ᵢ·f₂ᵢ / τ among all f₁ᵢ·f₂ⱼ / τ (spec §4).

    f1, f2: (B, D), L2-normalised. reduction: `none` for the rows themselves (B,).
    """
    partners = torch.arange(len(f1), device=f1.device)
    return F.cross_entropy(similarity(f1, f2, temperature), partners, reduction=reduction)


@register_method("plain")
class Plain(Contrastive):
    """One linear layer on the backbone; SGD whose rate falls in three steps.

    The development code embeds the first view once more for the adversarial term: the same numbers
    as z₁, but the main running statistics see that view twice; here they see it once.
    """

    official = OfficialProtocol("Plain and UEL", "projector", 0.1, "projector", "best", 128)

    def projector(self, features: int, dim: int) -> nn.Module:
        return nn.Linear(features, dim)

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        return one_way(z1, z2, self.temperature)

    def schedule(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        """×.1 from epoch 120, ×.05 from 160, ×.01 from 200 of the published 301; in a training of
        another length at the same shares of it. (Not so the development code's mini-ImageNet runs
        of 100 epochs, which are not imitated: a cosine for Plain, no drop at all for UEL, spec §4.)
        """

        def factor(step: int) -> float:
            epoch = step // steps_per_epoch * 301
            drops = ((200, 0.01), (160, 0.05), (120, 0.1))
            return next((low for at, low in drops if epoch >= at * epochs), 1.0)

        return factor

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return momentum_sgd(groups, lr)
