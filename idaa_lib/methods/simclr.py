"""SimCLR (Chen et al. 2020, arXiv:2002.05709), with IDAA or CLAE on its first view.

The recipe is the official IDAA release's (docs/spec/idaa.md §2 and §4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.configs import SSLConfig
from idaa_lib.methods.base import Batch, Method, Step, delayed_cosine, gathered, register_method
from idaa_lib.nets import build_backbone
from idaa_lib.nets.heads import simclr_projector
from idaa_lib.views import Recipe, Views


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, Eq. 1): mean over 2B rows of −log softmax of the partner, itself left out.

    z1, z2: (B, D), L2-normalised. In fp32 whatever the autocast around it: at small τ the
    exponents lose too much in bf16.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2])
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        logits = z @ z.T / temperature  # (2B, 2B)
        logits.fill_diagonal_(-torch.inf)
        n = len(z1)
        partners = torch.arange(2 * n, device=z.device).roll(n)
        return F.cross_entropy(logits, partners)


class Embedder(nn.Module):
    """Backbone, projector, L2 norm: images (B, 3, H, W) → z (B, D)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(
        self, images: Tensor, adversarial: bool = False, stages: int | None = None
    ) -> Tensor:
        """With `stages` the pooled features of so many stages of the backbone instead of z."""
        if stages is not None:
            return F.normalize(self.backbone(images, adversarial, stages), dim=1)
        return F.normalize(self.projector(self.backbone(images, adversarial=adversarial)), dim=1)


@register_method("simclr")
class SimCLR(Method):
    def __init__(self, config: SSLConfig, recipe: Recipe) -> None:
        backbone = build_backbone(
            config.backbone,
            width=config.width,
            stem=config.stem,
            adversarial_norms=config.adversary != "none",
        )
        projector = simclr_projector(backbone.feature_dim, config.projection_dim)
        super().__init__(Embedder(backbone, projector), recipe)
        self.temperature, self.reuse_anchor = config.temperature, config.reuse_anchor
        # How the attack looks at images; training itself always by the whole network.
        self.attacked_by: dict[str, Any] = {"adversarial": True}
        if config.attack == "prefix":
            self.attacked_by["stages"] = config.attack_stages

    def step(self, views: tuple[Views, ...], batch: Batch) -> Step:
        v1, v2 = (view.images for view in views)
        z1, z2 = self._embed(v1), self._embed(v2)  # (B, D) of all processes
        anchor: Tensor | None = None

        def attack_loss(x: Tensor, at_start: bool = False) -> Tensor:
            nonlocal anchor
            z = self._embed(x, **self.attacked_by)
            if anchor is None and at_start and self.reuse_anchor:
                # x is the first view itself, so its embedding is the anchor: exact, a pass saved.
                anchor = z.detach()
            elif anchor is None:
                with torch.no_grad():
                    anchor = self._embed(v1, **self.attacked_by)
            return nt_xent(anchor, z, self.temperature)

        def adversarial_loss(x_adv: Tensor) -> Tensor:
            return nt_xent(z1, self._embed(x_adv, adversarial=True), self.temperature)

        loss = nt_xent(z1, z2, self.temperature)
        return Step(
            loss,
            attacked=v1,
            samples=batch.get("images"),
            attack_loss=attack_loss,
            adversarial_loss=adversarial_loss,
            embeddings=(z1.detach(), z2.detach()),
            shown={"view 1": v1, "view 2": v2},
        )

    def _embed(self, images: Tensor, **how: Any) -> Tensor:
        return gathered(self.network(images, **how))

    def param_groups(self, epochs: int, steps_per_epoch: int) -> list[dict[str, Any]]:
        schedule = delayed_cosine(epochs, steps_per_epoch)
        return [group | {"schedule": schedule} for group in super().param_groups(1, 1)]


def against(
    embed: Callable[[Tensor], Tensor], x: Tensor, temperature: float = 0.5
) -> Callable[[Tensor], Tensor]:
    """The loss that an attack on images x (B, 3, H, W) ascends outside training.

    NT-Xent between the embeddings of x, held fixed, and of what stands in its place: SimCLR's own
    attack loss with the encoder `embed` (images → z (B, D), L2-normalised) as it is.
    """
    with torch.no_grad():
        anchor = embed(x)
    return lambda candidate: nt_xent(anchor, embed(candidate), temperature)
