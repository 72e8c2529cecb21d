"""Projection and prediction heads, and the networks that end in them.

Shapes and layers: docs/spec/idaa.md §4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
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

    last_norm: a BatchNorm at the end too; affine: whether it has parameters. bias: of the layers
    before the last; last_bias: of the last.
    """
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(inputs, hidden, bias=bias)]
        parts += [nn.BatchNorm1d(hidden), nn.ReLU()] if norm else [nn.ReLU()]
        inputs = hidden
    parts += [nn.Linear(inputs, outputs, bias=last_bias)]
    parts += [nn.BatchNorm1d(outputs, affine=affine)] if last_norm else []
    return nn.Sequential(*parts)


class ConditionedProjector(nn.Module):
    """z = π([h ; γ(ω)]): a projector that knows how its view was drawn (spec/siblings.md §1.3).

    h: (B, C); condition ω: (B, D), None for the neutral one; z: before its L2 norm.
    injection: what becomes of h and γ(ω): `concatenate`, `add` or `multiply`.
    neutral: the D values of a view without augmentation.
    """

    def __init__(
        self, head: nn.Module, gamma: nn.Module, injection: str, neutral: Sequence[float]
    ) -> None:
        super().__init__()
        self.head, self.gamma = head, gamma
        self.injection, self.neutral = injection, tuple(neutral)

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            condition = h.new_tensor(self.neutral).expand(len(h), -1)
        code = self.gamma(condition)
        if self.injection == "add":
            return self.head(h + code)
        if self.injection == "multiply":
            return self.head(h * code)
        return self.head(torch.cat([h, code], 1))


class Hypernetwork(nn.Module):
    """A projector whose weights γ emits, of each sample its own (spec/siblings.md §1.3, a toy).

    sides: features of its layers, from C to those of z. gamma: number of weights → the network
    (B, D) → (B, weights). neutral: as `ConditionedProjector`.
    """

    def __init__(
        self, sides: Sequence[int], gamma: Callable[[int], nn.Module], neutral: Sequence[float]
    ) -> None:
        super().__init__()
        self.sides, self.neutral = tuple(sides), tuple(neutral)
        self.gamma = gamma(self.count(sides))

    @staticmethod
    def count(sides: Sequence[int]) -> int:
        """Weights and biases of linear layers with these sides."""
        return sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(sides))

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            condition = h.new_tensor(self.neutral).expand(len(h), -1)
        layers = [*itertools.pairwise(self.sides)]
        sizes = [size for inputs, outputs in layers for size in (inputs * outputs, outputs)]
        weights, x = iter(self.gamma(condition).split(sizes, 1)), h[:, None]  # x: (B, 1, C)
        for k, shape in enumerate(layers):
            matrix, bias = next(weights).unflatten(1, shape), next(weights)
            x = (x if k == 0 else x.relu()) @ matrix + bias[:, None]
        return x[:, 0]


class Embedder(nn.Module):
    """Backbone, projector, L2 norm: images (B, 3, H, W) → z (B, D); at the neutral condition where
    the projector has one."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor, adversarial: bool = False) -> Tensor:
        return F.normalize(self.projector(self.backbone(images, adversarial=adversarial)), dim=1)


class Embedding(NamedTuple):
    """What a network makes of B images; None where it lacks the head.

    h: features (B, feature_dim) of the backbone. z: projected, p: predicted from z, both (B, D) and
    L2-normalised (Barlow Twins' z is not). logits: (B, C).
    """

    h: Tensor
    z: Any = None
    p: Any = None
    logits: Any = None


class Network(nn.Module):
    """Images (B, 3, H, W) → `Embedding`, by a backbone and the heads that are given.

    The heads' BatchNorms have no adversarial twins: both kinds of input share them (spec §2).

    projector: h → z before its L2 norm (`unit`); called with the condition too where there is one.
    predictor: z before its L2 norm → p before its own. head: h → logits.
    differences: heads by name, of AugSelf: [h_a ; h_b] (B, 2 · feature_dim) → (B, ·). They are
    called as network(pairs=…), which gives their outputs by name.
    """

    def __init__(self, backbone: nn.Module, unit: bool = True, **heads: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.unit = backbone, unit
        for name, head in heads.items():
            if head is not None:
                self.add_module(name, head)

    def forward(
        self,
        images: Tensor | None = None,
        condition: Tensor | None = None,
        adversarial: bool = False,
        pairs: Tensor | None = None,
    ) -> Any:
        heads: dict[str, Any] = dict(self.named_children())
        if pairs is not None:
            return {name: head(pairs) for name, head in heads["differences"].items()}
        h = self.backbone(images, adversarial=adversarial)
        z = p = logits = None
        if "projector" in heads:
            z = heads["projector"](*([h] if condition is None else [h, condition]))
            if "predictor" in heads:
                p = F.normalize(heads["predictor"](z), dim=1)
            z = F.normalize(z, dim=1) if self.unit else z
        if "head" in heads:
            logits = heads["head"](h)
        return Embedding(h, z, p, logits)
