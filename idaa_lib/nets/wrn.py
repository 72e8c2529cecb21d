"""Wide ResNets (Zagoruyko & Komodakis 2016, arXiv:1605.07146) as FixMatch trains them.

Pre-activation, LeakyReLU(.1), and in the first block the activation precedes the shortcut too (as
in FixMatch's own code; a widely used port of it leaves the activation out before the first
convolution of stages 2 and 3). WRN-d-k: d = 6·blocks + 4, width 16·k; the stem has 16 channels
whatever the width. Adversarial norms as in `resnet`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from idaa_lib.nets import register_backbone
from idaa_lib.nets.resnet import Normed, project

SLOPE = 0.1
STEM = 16


class _Block(Normed):
    """BN, activation, 3×3, BN, activation, 3×3, and the shortcut, a 1×1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, adversarial_norms: bool) -> None:
        super().__init__(adversarial_norms)
        self.outputs, self.activates_shortcut = outputs, False
        self.add_norm("bn1", inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.add_norm("bn2", outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor, adversarial: bool) -> Tensor:
        y = self.norm("bn1", x, adversarial, slope=SLOPE)
        x = y if self.activates_shortcut else x
        y = self.conv2(self.norm("bn2", self.conv1(y), adversarial, slope=SLOPE))
        return y + (x if self.shortcut is None else project(x, self.shortcut))


class WideResNet(Normed):
    """Backbone without a classification head.

    Args:
        blocks: in each of the three stages. width: channels of the first, 16·k.
        stem: `cifar` is the only one, else ValueError. adversarial_norms: give every BatchNorm a
            twin.
    """

    def __init__(
        self, blocks: int, *, width: int = 32, stem: str = "cifar", adversarial_norms: bool = False
    ) -> None:
        super().__init__(adversarial_norms)
        if stem != "cifar":
            raise ValueError(f"stem must be cifar for a wide ResNet, and is {stem!r}.")
        self.conv1 = nn.Conv2d(3, STEM, 3, 1, 1, bias=False)
        block = partial(_Block, adversarial_norms=adversarial_norms)
        self.feature_dim = self.add_stages(block, [blocks] * 3, STEM, width)
        first: Any = self.get_submodule("layer1.0")
        first.activates_shortcut = True
        self.add_norm("bn", self.feature_dim)
        self.draw_weights()

    def forward(self, images: Tensor, adversarial: bool = False) -> Tensor:
        """Images (B, 3, H, W), normalised → features (B, 4·width)."""
        x = self.run_stages(self.conv1(images), adversarial)
        return self.norm("bn", x, adversarial, slope=SLOPE).mean((2, 3))


for _name, _blocks in (("wrn10", 1), ("wrn16", 2), ("wrn28", 4)):
    register_backbone(_name)(partial(WideResNet, _blocks))
