"""Moving averages of a network: target networks (BYOL), key encoders (MoCo), averaged weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from idaa_lib.methods.base import About
from idaa_lib.methods.cassle import Conditioned
from idaa_lib.nets.heads import Embedding, Network
from idaa_lib.views import View


def frozen_copy(network: nn.Module) -> nn.Module:
    """A twin that no optimiser trains."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target ← m · target + (1 − m) · online, parameter by parameter.

    `online` may be wrapped (DDP) and may have further parameters behind those of the target.
    BatchNorm statistics are each network's own.
    """
    slow: list[Tensor] = [*target.parameters()]
    fast: list[Tensor] = [*online.parameters()]
    torch._foreach_lerp_(slow, fast[: len(slow)], 1 - momentum)


class Targeted(Conditioned):
    """A method with a `target`, which starts as a copy of backbone and projector and follows them
    after each step; γ of a conditioned projector is its own too."""

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        projector = self.network.get_submodule("projector")
        self.target = frozen_copy(Network(backbone, projector=projector))

    @torch.no_grad()
    def aim(self, view: View, adversarial: bool = False) -> Embedding:
        """The target's embedding of a view."""
        return self.target(view.images, self.describe(view), adversarial)
