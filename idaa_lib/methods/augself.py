"""AugSelf (Lee et al. 2021; docs/spec/siblings.md §1.5): features that know how two views differ.

Heads beside the projector predict, from the features of a pair of views, the difference of their
augmentation parameters: L = L_SSL + Σ_k λ_k L_k, over both orders of the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.nets.heads import mlp
from idaa_lib.views import Params, Recipe
from idaa_lib.views.operations import row
from idaa_lib.views.recipes import NO_JITTER

WIDTHS = {"blur": 1, "color": 4, "crop": 4, "flip": 1}  # outputs of a head


def augself_head(inputs: int, hidden: int, outputs: int, layers: int = 2, **how: Any) -> nn.Module:
    """A head of §1.4: no bias before a BatchNorm; the last layer has one, or the other."""
    return mlp(
        inputs, hidden, outputs, layers, bias=False, last_bias=not how.get("last_norm"), **how
    )


def difference_heads(features: int, names: Iterable[str]) -> nn.ModuleDict:
    """Heads (B, 2 · features) → (B, ·) by the name of what they predict."""
    return nn.ModuleDict({k: augself_head(2 * features, 512, WIDTHS[k], 3) for k in sorted(names)})


def relative_crop(params: Params) -> Tensor:
    """Crops (B, 4) as fractions of the source: centre's y and x, height, width; not mirrored."""
    top, left, height, width = (params["crop"] / params["source"].repeat(1, 2)).unbind(1)
    return torch.stack([top + height / 2, left + width / 2, height, width], 1)


def relative_color(params: Params, recipe: Recipe) -> Tensor:
    """Colour jitter (B, 4) in [−½, ½]: 0 where none, ±½ at the ends of the recipe's ranges."""
    low, high = recipe.jitter_range
    widths = [b - a or 1 for a, b in zip(low, high, strict=True)]
    color = params["color"]
    return (color - row(NO_JITTER, color)) / row(widths, color)


def differences(a: Params, b: Params, recipe: Recipe) -> dict[str, Tensor]:
    """What the heads predict of views a and b (§1.5), (B, ·) by name.

    `crop`: centre and size of a minus b, in a's frame (x mirrored where a is flipped); `color` in
    [−1, 1]; `flip`: 1 where both are flipped or none; `blur`: σ in pixels.
    """
    mirror = 1 - 2 * a["flip"]
    ones = torch.ones_like(mirror)
    crop = relative_crop(a) - relative_crop(b)
    return {
        "crop": crop * torch.cat([ones, mirror, ones, ones], 1),
        "color": relative_color(a, recipe) - relative_color(b, recipe),
        "flip": (a["flip"] == b["flip"]).to(crop),
        "blur": a["blur"] - b["blur"],
    }


def difference_losses(
    predict: Callable[[Tensor], dict[str, Tensor]],
    features: Sequence[Tensor],
    params: Sequence[Params],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """The loss of each head, by name, over both orders of the pair: cross-entropy of `flip`, mean
    squared error of tanh of the others.

    predict: [h_a ; h_b] (2B, 2C) → the heads' outputs. features: of two views, (B, C) each.
    """
    orders = [(0, 1), (1, 0)]
    pairs = [torch.cat([features[a], features[b]], 1) for a, b in orders]
    targets = [differences(params[a], params[b], recipe) for a, b in orders]
    losses = {}
    for name, output in predict(torch.cat(pairs)).items():
        target = torch.cat([t[name] for t in targets]).to(output)
        if name == "flip":
            losses[name] = F.binary_cross_entropy_with_logits(output, target)
        else:
            losses[name] = F.mse_loss(output.tanh(), target)
    return losses
