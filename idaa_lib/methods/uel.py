"""UEL: unsupervised embedding learning by invariance and spreading (Ye et al. 2019,
arXiv:1904.03436), with IDAA or CLAE on its first view.

Network, recipe and evaluation are Plain's, and so is where they come from: the loss is that of
UEL's and CLAE's code, the step with IDAA that of the authors' development code (docs/spec/idaa.md
§2, §4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.methods.base import register_method, similarity
from idaa_lib.methods.plain import Plain


def spreading(f1: Tensor, f2: Tensor, temperature: float) -> Tensor:
    """−(1/2B) Σᵢ [log Pᵢᵢ₊ + Σ_{j ∉ {i, i₊}} log(1 − Pᵢⱼ)], P the softmax over j ≠ i (spec §4).

    f1, f2: (B, D), L2-normalised. Columns are detached: a row gets a gradient only through its own
    softmax.
    """
    f = torch.cat([f1, f2])
    n = len(f1)
    logits = similarity(f, f.detach(), temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    log_p = F.log_softmax(logits, dim=1)
    rows = torch.arange(2 * n, device=f.device)
    partner = rows == rows.roll(n)[:, None]
    # A row that is all but certain of another one has 1 − P = 0 in fp32: bounded, not infinite.
    log_rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps).log()
    return -log_p.where(partner, log_rest).sum() / (2 * n)


@register_method("uel")
class UEL(Plain):
    recordable = True

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        return spreading(z1, z2, self.options.temperature)
