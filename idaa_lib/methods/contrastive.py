"""What methods of two views share: a backbone with a projector, an attack on the first view; and
the step of SimCLR, Plain and UEL, a loss of two embeddings (docs/spec/idaa.md §2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from idaa_lib import configs
from idaa_lib.configs.base import Positive
from idaa_lib.methods.base import About, Batch, Method, Moment, Step, make_anchor
from idaa_lib.nets.heads import Embedding, Network, mlp
from idaa_lib.nets.processes import gather
from idaa_lib.views import View


class TwoViews(Method):
    """A method of two views whose network ends in a projector; its options have `projection_dim`,
    D of the embeddings."""

    unit = True  # whether embeddings are L2-normalised

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        self.features: int = backbone.feature_dim
        dim: int = options.projection_dim
        heads = {
            "projector": self.condition_projector(lambda inputs: self.projector(inputs, dim)),
            "predictor": self.predictor(dim),
        }
        self.network = Network(backbone, self.unit, **heads)

    def projector(self, inputs: int, dim: int) -> nn.Module:
        """(B, inputs) → (B, dim); SimCLR's by default."""
        return mlp(inputs, self.features, dim, norm=False)

    def predictor(self, dim: int) -> nn.Module | None:
        """(B, dim) → (B, dim); none by default."""
        return None

    def condition_projector(self, build: Callable[[int], nn.Module]) -> nn.Module:
        """The projector that `build` makes for so many inputs, of features alone by default."""
        return build(self.features)

    def two_view_step(
        self,
        loss: Tensor,
        views: tuple[View, ...],
        embeddings: tuple[Embedding, Embedding],
        *attack: Any,
    ) -> Step:
        """The `Step` of a loss of two views and their embeddings; the first view is attacked as the
        two functions of `attack_on` say."""
        return Step(
            loss,
            embeddings=(embeddings[0].z.detach(), embeddings[1].z.detach()),
            pictures={"view 1": views[0].images, "view 2": views[1].images},
            **self.attack_on(views[0], *attack),
        )


class Contrastive(TwoViews):
    """A method that is its loss `contrast`, its head `projector` and its recipe."""

    class Options(configs.Options):
        """projection_dim: D of the embeddings."""

        projection_dim: Positive = 64

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss (a scalar) of two views' embeddings (B, D), L2-normalised, B of all processes.

        The adversary ascends it between a view and itself: there it needs a gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `contrast`, which is its loss.")

    def ascent(self, view: View) -> Callable[[Embedding, bool], Tensor]:
        """What an attack on the view ascends: `contrast` of the view itself and what it becomes."""
        anchor = make_anchor(lambda: gather(self.embed(view, adversarial=True).z))

        def attack_loss(e: Embedding, at_start: bool) -> Tensor:
            z = gather(e.z)
            return self.contrast(anchor(z, at_start), z)

        return attack_loss

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        e1, e2 = map(self.embed, views)
        z1, z2 = gather(e1.z), gather(e2.z)  # (B, D) of all processes

        def adversarial_loss(e: Embedding, v_adv: View) -> Tensor:
            return self.contrast(z1, gather(e.z))

        loss, ascent = self.contrast(z1, z2), self.ascent(views[0])
        return self.two_view_step(loss, views, (e1, e2), ascent, adversarial_loss)
