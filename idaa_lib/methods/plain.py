"""Plain: in-batch instance discrimination in one direction, with IDAA or CLAE on its first view.

The "plain" of CLAE (Ho & Vasconcelos, NeurIPS 2020): no memory bank. Loss and recipe are of CLAE's
code; the step with IDAA is of the authors' development code, since the official release has no
Plain (docs/spec/idaa.md §2, §4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.configs.base import Positive, Rate
from idaa_lib.methods.base import register_method, similarity
from idaa_lib.methods.contrastive import Contrastive
from idaa_lib.methods.protocols import OfficialProtocol


def one_way(f1: Tensor, f2: Tensor, temperature: float, reduction: str = "mean") -> Tensor:
    """Mean over the B rows of −log softmax of f₁ᵢ·f₂ᵢ / τ among all f₁ᵢ·f₂ⱼ / τ (spec §4).

    f1, f2: (B, D), L2-normalised. reduction: `none` for the rows themselves (B,).
    """
    partners = torch.arange(len(f1), device=f1.device)
    return F.cross_entropy(similarity(f1, f2, temperature), partners, reduction=reduction)


@register_method("plain")
class Plain(Contrastive):
    """One linear layer on the backbone.

    The development code embeds the first view once more for the adversarial term: the same numbers
    as z₁, but the main running statistics see that view twice; here they see it once.
    """

    class Options(Contrastive.Options):
        """temperature: τ of the loss."""

        projection_dim: Positive = 128
        temperature: Rate = 0.1

    recordable = True
    official = OfficialProtocol("Plain and UEL", "projector", 0.1, "projector", "best", 128)

    def projector(self, inputs: int, dim: int) -> nn.Module:
        return nn.Linear(inputs, dim)

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        return one_way(z1, z2, self.options.temperature)
