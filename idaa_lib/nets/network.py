"""A backbone with its heads as one module: what a method trains."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


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
        for name in ("projector", "predictor", "head"):
            if name in heads:
                self.add_module(name, heads[name])

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
