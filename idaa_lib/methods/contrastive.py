"""The step that SimCLR, Plain and UEL share: a loss of two views' embeddings, and an attack on the
first view that it guides (docs/spec/idaa.md §2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from idaa_lib import configs
from idaa_lib.configs.base import Positive
from idaa_lib.methods.base import About, Batch, Method, Moment, Step, anchored
from idaa_lib.nets.heads import Embedding, Network, mlp
from idaa_lib.nets.processes import gather
from idaa_lib.views import View


class Contrastive(Method):
    """A method that is its loss `contrast`, its head `projector` and its recipe.

    A subclass has at least `contrast`; its options have at least `projection_dim`.
    """

    class Options(configs.Options):
        """projection_dim: D of the embeddings."""

        projection_dim: Positive = 64

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        projector = self.projector(backbone.feature_dim, options.projection_dim)
        self.network = Network(backbone, projector=projector)

    def projector(self, features: int, dim: int) -> nn.Module:
        """The head: (B, features) → (B, dim); SimCLR's by default."""
        return mlp(features, features, dim, norm=False)

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss (a scalar) of two views' embeddings (B, D), L2-normalised, B of all processes.

        The adversary ascends it between a view and itself: there it needs a gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `contrast`, which is its loss.")

    def ascent(self, view: View) -> Callable[[Embedding, bool], Tensor]:
        """What an attack on the view ascends: `contrast` of the view itself and what it becomes."""
        anchor = anchored(lambda: gather(self.embed(view, adversarial=True).z))

        def attack_loss(e: Embedding, at_start: bool) -> Tensor:
            z = gather(e.z)
            return self.contrast(anchor(z, at_start), z)

        return attack_loss

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        v1, v2 = views
        e1, e2 = self.embed(v1), self.embed(v2)
        z1, z2 = gather(e1.z), gather(e2.z)  # (B, D) of all processes

        def adversarial_loss(e: Embedding, v_adv: View) -> Tensor:
            return self.contrast(z1, gather(e.z))

        loss = self.contrast(z1, z2)
        both = e1._replace(z=z1), e2._replace(z=z2)
        return self.two_view_step(loss, views, both, self.ascent(v1), adversarial_loss)
