"""Projection and prediction heads, and the networks that end in them.

Shapes and layers: docs/spec/idaa.md §4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


def mlp(
    inputs: int,
    hidden: int,
    outputs: int,
    layers: int = 2,
    *,
    norm: bool = True,
    last_norm: bool = False,
    affine: bool = True,
    bias: bool = True,
    last_bias: bool = True,
) -> nn.Sequential:
    """(B, inputs) → (B, outputs): linear layers, with a BatchNorm (`norm`) and a ReLU between them.

    SimCLR's and MoCo's projector: norm=False (Chen et al. 2020, arXiv:2002.05709, §2.1). BYOL's
    heads and SimSiam's predictor: as it is (Grill et al. 2020, arXiv:2006.07733, §3.3). SimSiam's
    projector: last_norm=True, on ImageNet with layers=3, bias=False, affine=False (Chen & He 2021,
    arXiv:2011.10566, and its released code).

    Args:
        last_norm: a BatchNorm at the end too; affine: whether it has parameters.
        bias: of the layers before the last; last_bias: of the last.
    """
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(inputs, hidden, bias=bias)]
        parts += [nn.BatchNorm1d(hidden), nn.ReLU()] if norm else [nn.ReLU()]
        inputs = hidden
    parts += [nn.Linear(inputs, outputs, bias=last_bias)]
    parts += [nn.BatchNorm1d(outputs, affine=affine)] if last_norm else []
    return nn.Sequential(*parts)


class Embedder(nn.Module):
    """Backbone, projector, L2 norm: images (B, 3, H, W) → z (B, D)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor, adversarial: bool = False) -> Tensor:
        return F.normalize(self.projector(self.backbone(images, adversarial=adversarial)), dim=1)


class Embedding(NamedTuple):
    """What a network makes of B images; None where it lacks the head.

    h: features (B, feature_dim) of the backbone. z: projected, p: predicted from z, both (B, D) and
    L2-normalised. logits: (B, C).
    """

    h: Tensor
    z: Any = None
    p: Any = None
    logits: Any = None


class Network(nn.Module):
    """Images (B, 3, H, W) → `Embedding`, by a backbone and the heads that are given.

    The heads' BatchNorms have no adversarial twins: both kinds of input share them (spec §2).

    Args:
        projector: h → z before its L2 norm; called with the condition too where there is one.
        predictor: z before its L2 norm → p before its own. head: h → logits.
    """

    def __init__(self, backbone: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(
        self, images: Tensor, condition: Tensor | None = None, adversarial: bool = False
    ) -> Embedding:
        heads: dict[str, Any] = dict(self.named_children())
        h = self.backbone(images, adversarial=adversarial)
        z = p = logits = None
        if "projector" in heads:
            z = heads["projector"](*([h] if condition is None else [h, condition]))
            if "predictor" in heads:
                p = F.normalize(heads["predictor"](z), dim=1)
            z = F.normalize(z, dim=1)
        if "head" in heads:
            logits = heads["head"](h)
        return Embedding(h, z, p, logits)
