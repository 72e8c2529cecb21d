"""SimCLR (Chen et al. 2020, arXiv:2002.05709), with IDAA or CLAE on its first view.

The recipe is the official IDAA release's (docs/spec/idaa.md §2 and §4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.configs.base import Rate
from idaa_lib.methods.base import register_method, similarity
from idaa_lib.methods.cassle import Conditioned
from idaa_lib.methods.contrastive import Contrastive
from idaa_lib.methods.protocols import OfficialProtocol


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, Eq. 1): mean over 2B rows of −log softmax of the partner, itself left out.

    z1, z2: (B, D), L2-normalised.
    """
    z = torch.cat([z1, z2])
    logits = similarity(z, z, temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    n = len(z1)
    partners = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(logits, partners)


@register_method("simclr")
class SimCLR(Conditioned, Contrastive):
    class Options(Conditioned.Options, Contrastive.Options):
        """temperature: τ of the loss."""

        temperature: Rate = 0.5

    recordable = True
    projector_first = True
    official = OfficialProtocol("SimCLR", "projector", 0.5, "backbone", "last", 256)

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, self.options.temperature)
