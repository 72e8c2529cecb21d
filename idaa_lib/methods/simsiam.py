"""SimSiam (Chen & He 2021, arXiv:2011.10566), with IDAA or CLAE on its first view.

Two variants, `pairing` in the configuration, as the authors' development code pairs x′; the
official release has no SimSiam, and the final settings are not known (docs/spec/idaa.md §2, §4):

- `cifar`: the sum of both directions without ½; x′ is paired with the view that was attacked;
  projector of 2 layers; warm-up and cosine by iteration, the predictor at a constant rate.
- `imagenet`: the mean of both directions; x′ is paired with the other view; projector of 3 layers;
  cosine by epoch for all; residual branches start at 0.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from idaa_lib.configs.base import Positive
from idaa_lib.methods.augself import augself_head
from idaa_lib.methods.base import About, Batch, Moment, Step, make_anchor, register_method
from idaa_lib.methods.cassle import Conditioned
from idaa_lib.methods.protocols import Classifier, OfficialProtocol
from idaa_lib.nets.heads import Embedding, mlp
from idaa_lib.nets.resnet import zero_residuals
from idaa_lib.views import View


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) = −cos(p, stop-gradient z) (SimSiam, Eq. 1), mean over B.

    p, z: (B, D), L2-normalised. A mean over samples: processes need not exchange embeddings.
    """
    return -(p * z.detach()).sum(1).mean()


@register_method("simsiam")
class SimSiam(Conditioned):
    """The attack starts at its own anchor, but a predictor lies between: its gradient is not 0."""

    class Options(Conditioned.Options):
        """projection_dim: D of the embeddings. pairing: as IDAA's authors developed it for CIFAR,
        or for ImageNet. heads: `own`, or those of AugSelf's code (`augself`), where the projector
        has 3 layers if pairing is `imagenet`, else 2; the loss is the mean, and the predictor's
        rate constant, with both."""

        projection_dim: Positive = 2048
        pairing: Literal["cifar", "imagenet"] = "cifar"

    recordable = True

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        if options.pairing == "imagenet":
            zero_residuals(backbone)
        super().__init__(options, backbone, about)

    @property
    def cifar(self) -> bool:
        return self.options.pairing == "cifar"

    def projector(self, inputs: int, dim: int) -> nn.Module:
        if self.has_augself_heads:
            return augself_head(inputs, dim, dim, 2 if self.cifar else 3, last_norm=True)
        if self.cifar:
            return mlp(inputs, dim, dim, last_norm=True)
        return mlp(inputs, self.features, dim, 3, last_norm=True, affine=False, bias=False)

    def predictor(self, dim: int) -> nn.Module:
        return mlp(dim, max(1, dim // 4), dim, bias=self.cifar and not self.has_augself_heads)

    @classmethod
    def official_protocol(cls, config: Any) -> OfficialProtocol:
        if config.pairing == "imagenet":
            # What the specification leaves open is as in SimSiam's public code (main_lincls.py).
            classifier = Classifier("lars", 0.1, "cosine", epochs=90, best=False, scaled=True)
            return OfficialProtocol(
                "SimSiam on ImageNet", "backbone", 0.5, "backbone", "last", 4096, classifier
            )
        return cls.official

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        v1, v2 = views
        e1, e2 = self.embed(v1), self.embed(v2)
        anchor = make_anchor(lambda: self.embed(v1, adversarial=True).z)
        return self.two_view_step(
            self._both(e1, e2),
            views,
            (e1, e2),
            lambda e, at_start: negative_cosine(e.p, anchor(e.z, at_start)),
            lambda e, v_adv: self._both(e1 if self.cifar else e2, e),
        )

    def _both(self, a: Embedding, b: Embedding) -> Tensor:
        both = negative_cosine(a.p, b.z) + negative_cosine(b.p, a.z)
        return both if self.cifar and not self.has_augself_heads else both / 2

    def param_groups(self) -> list[dict[str, Any]]:
        """On CIFAR and in AugSelf's code the predictor learns at a constant rate from the start."""
        (group,) = super().param_groups()
        if not (self.cifar or self.has_augself_heads):
            return [group]
        predictor = list(self.network.get_submodule("predictor").parameters())
        body = [p for p in group["params"] if not any(p is own for own in predictor)]
        return [{"params": body}, {"params": predictor, "schedule": "constant", "warmup": 0}]
