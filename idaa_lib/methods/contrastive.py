"""The step that SimCLR, Plain and UEL share: a loss of two views' embeddings, and an attack on the
first view that it guides (docs/spec/idaa.md §2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from idaa_lib.configs import SSLConfig
from idaa_lib.methods.base import (
    Batch,
    Method,
    Step,
    anchored,
    backbone_of,
    gathered,
    two_view_step,
)
from idaa_lib.nets.heads import Embedder
from idaa_lib.views import Recipe, View


class Contrastive(Method):
    """A method that is its loss `contrast`, its head and its recipe."""

    def __init__(self, config: SSLConfig, recipe: Recipe) -> None:
        backbone = backbone_of(config)
        projector = self.projector(backbone.feature_dim, config.projection_dim)
        super().__init__(Embedder(backbone, projector), recipe, config.weight_decay)
        self.temperature, self.reuse_anchor = config.temperature, config.reuse_anchor

    def projector(self, features: int, dim: int) -> nn.Module:
        """The head: (B, features) → (B, dim)."""
        raise NotImplementedError

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D), L2-normalised."""
        raise NotImplementedError

    def step(self, views: tuple[View, ...], batch: Batch) -> Step:
        v1, v2 = (view.images for view in views)
        z1, z2 = self._embed(v1), self._embed(v2)  # (B, D) of all processes
        anchor = anchored(lambda: self._embed(v1, adversarial=True), self.reuse_anchor)

        def attack_loss(x: Tensor, at_start: bool = False) -> Tensor:
            z = gathered(self.with_fixed_weights(x, adversarial=True))
            return self.contrast(anchor(z, at_start), z)

        def adversarial_loss(x_adv: Tensor) -> Tensor:
            return self.contrast(z1, self._embed(x_adv, adversarial=True))

        return two_view_step(
            self.contrast(z1, z2),
            views,
            batch,
            (z1, z2),
            attack_loss=attack_loss,
            adversarial_loss=adversarial_loss,
        )

    def _embed(self, images: Tensor, **how: Any) -> Tensor:
        return gathered(self.network(images, **how))
