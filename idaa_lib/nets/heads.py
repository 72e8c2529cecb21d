"""Projection and prediction heads, one function per paper, and the networks that end in them.

Shapes and layers: docs/spec/idaa.md §4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def simclr_projector(features: int, dim: int) -> nn.Sequential:
    """Linear-ReLU-Linear (Chen et al. 2020, arXiv:2002.05709, §2.1): (B, features) → (B, dim).

    MoCo v2 has the same one (arXiv:2003.04297, §3).
    """
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear-BN-ReLU-Linear: BYOL's projector and predictor (Grill et al. 2020, arXiv:2006.07733,
    §3.3) and SimSiam's predictor: (B, inputs) → (B, outputs)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def simsiam_projector(features: int, dim: int, layers: int) -> nn.Sequential:
    """Chen & He 2021 (arXiv:2011.10566): (B, features) → (B, dim), BatchNorm after every layer.

    layers: 2 on CIFAR (appendix D); 3 on ImageNet, as the released code has them: those before the
    last as wide as the features and without bias, the last BatchNorm without affine parameters.
    """
    parts: list[nn.Module] = []
    hidden, bias = (dim, True) if layers == 2 else (features, False)
    for _ in range(layers - 1):
        parts += [nn.Linear(features, hidden, bias=bias), nn.BatchNorm1d(hidden), nn.ReLU()]
        features = hidden
    return nn.Sequential(*parts, nn.Linear(features, dim), nn.BatchNorm1d(dim, affine=layers == 2))


class Embedder(nn.Module):
    """Backbone, projector, L2 norm: images (B, 3, H, W) → z (B, D)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor, adversarial: bool = False) -> Tensor:
        return F.normalize(self.projector(self.backbone(images, adversarial=adversarial)), dim=1)


class Siamese(nn.Module):
    """Backbone, projector, predictor: images (B, 3, H, W) → z and its prediction p, (B, D) each,
    L2-normalised. The heads' BatchNorms have no adversarial twins: both kinds of input share them
    (spec §2)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    @property
    def embedder(self) -> Embedder:
        """What gives z alone, of the same modules."""
        return Embedder(self.backbone, self.projector)

    def forward(self, images: Tensor, adversarial: bool = False) -> tuple[Tensor, Tensor]:
        z = self.projector(self.backbone(images, adversarial=adversarial))
        return F.normalize(z, dim=1), F.normalize(self.predictor(z), dim=1)


class Classifier(nn.Module):
    """Backbone and a linear head: images (B, 3, H, W) → logits (B, C), L2-normalised h (B, D)."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_dim, classes)
        nn.init.xavier_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, adversarial: bool = False) -> tuple[Tensor, Tensor]:
        h = self.backbone(images, adversarial=adversarial)
        return self.head(h), F.normalize(h, dim=1)
