"""The step that SimCLR, Plain and UEL share: a loss of two views' embeddings, and an attack on the
first view that it guides (docs/spec/idaa.md §2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from idaa_lib import configs
from idaa_lib.configs.base import Positive, Rate
from idaa_lib.methods.base import (
    About,
    Batch,
    Method,
    Moment,
    Step,
    anchored,
    gather,
    two_view_step,
)
from idaa_lib.nets.network import Network
from idaa_lib.views import View


class Contrastive(Method):
    """A method that is its loss `contrast`, its head `projector` and its recipe."""

    class Options(configs.Options):
        """projection_dim: D of the embeddings; temperature: τ of the loss."""

        projection_dim: Positive = 64
        temperature: Rate = 0.5

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        projector = self.projector(backbone.feature_dim, options.projection_dim)
        self.network = Network(backbone, projector=projector)
        self.temperature = options.temperature

    def projector(self, features: int, dim: int) -> nn.Module:
        """The head: (B, features) → (B, dim)."""
        raise NotImplementedError

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D), L2-normalised."""
        raise NotImplementedError

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        v1, v2 = views
        z1, z2 = gather(self.embed(v1).z), gather(self.embed(v2).z)  # (B, D) of all processes
        anchor = anchored(lambda: gather(self.embed(v1, adversarial=True).z))

        def attack_loss(x: Tensor, at_start: bool = False) -> Tensor:
            with self.fixed_weights():
                z = gather(self.embed(v1._replace(images=x), adversarial=True).z)
            return self.contrast(anchor(z, at_start), z)

        def adversarial_loss(x_adv: Tensor) -> Tensor:
            z_adv = gather(self.embed(v1._replace(images=x_adv), adversarial=True).z)
            return self.contrast(z1, z_adv)

        return two_view_step(
            self.contrast(z1, z2),
            views,
            (z1, z2),
            attack_loss=attack_loss,
            adversarial_loss=adversarial_loss,
        )
