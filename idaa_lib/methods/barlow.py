"""Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230): embeddings with entries of their own each.

No paper describes it with IDAA. Here the first view is attacked against the loss with the other
view's embedding stopped; the adversarial loss is the same with x′ for the first view. The head is
the paper's, which AugSelf's code has too (docs/spec/siblings.md §1.4); biases and norms learn at a
lower rate, as in both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.configs import ConfigError
from idaa_lib.configs.base import NonNegative, Positive
from idaa_lib.methods.augself import augself_head
from idaa_lib.methods.base import Batch, Moment, Step, register_method, similarity
from idaa_lib.methods.cassle import Conditioned
from idaa_lib.nets.heads import Embedding
from idaa_lib.nets.processes import gather
from idaa_lib.views import View

VECTOR_RATE = 0.024  # of biases and norms, beside the rate of the weights


def redundancy(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Σ_i (1 − C_ii)² + weight · Σ_{i≠j} C_ij² with C = z1ᵀ z2 / B (Barlow Twins, Eq. 1–2).

    z1, z2: (B, D), each entry with mean 0 and variance 1 over its view's batch.
    """
    c = similarity(z1.T, z2.T, len(z1))  # (D, D)
    diagonal = c.diagonal()
    others = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + weight * others


@register_method("barlow")
class Barlow(Conditioned):
    class Options(Conditioned.Options):
        """projection_dim: D, of all three layers of the projector. off_diagonal: λ, the weight of
        the entries of C that shall be 0."""

        projection_dim: Positive = 8192
        off_diagonal: NonNegative = 0.0051

    recordable = True
    unit = False

    @classmethod
    def check(cls, config: Any) -> None:
        super().check(config)
        if config.injection == "hypernetwork":
            raise ConfigError(
                "injection='hypernetwork' is not for method='barlow', whose loss needs the "
                "BatchNorm that its projector ends in: take 'concatenate'."
            )

    def projector(self, inputs: int, dim: int) -> nn.Module:
        return augself_head(inputs, dim, dim, 3, last_norm=True, affine=False)

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        e1, e2 = self.embed(views[0]), self.embed(views[1])
        z2 = gather(e2.z)  # (B, D) of all processes
        fixed = z2.detach()

        def loss_of(e: Embedding, other: Tensor) -> Tensor:
            return redundancy(gather(e.z), other, self.options.off_diagonal)

        unit1, unit2 = (e._replace(z=F.normalize(e.z, dim=1)) for e in (e1, e2))
        return self.two_view_step(
            loss_of(e1, z2),
            views,
            (unit1, unit2),
            lambda e, at_start: loss_of(e, fixed),
            lambda e, v_adv: loss_of(e, z2),
        )

    def param_groups(self) -> list[dict[str, Any]]:
        (group,) = super().param_groups()
        vectors = [p for p in group["params"] if p.ndim < 2]
        weights = [p for p in group["params"] if p.ndim >= 2]
        return [{"params": weights}, {"params": vectors, "rate": VECTOR_RATE}]
