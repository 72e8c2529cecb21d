"""ResNets with an optional second set of BatchNorms for adversarial input.

He et al. 2016 (arXiv:1512.03385); CIFAR stem: 3×3, no pooling; ImageNet stem: 7×7 stride 2 and
max-pooling; mini stem, that of Plain, UEL and SimSiam on mini-ImageNet: 3×3 and max-pooling. The
second set (AdvProp, Xie et al. 2020, arXiv:1911.09665) keeps statistics and affine parameters of
its own with momentum .01; convolutions are shared, and inference uses the main set.
Names of parameters and parameter counts: docs/spec/idaa.md §4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.nets import register_backbone

ADVERSARIAL_MOMENTUM = 0.01


class Normed(nn.Module):
    """A module with BatchNorms by name, each with an adversarial twin `<name>_adv` if asked, and
    with residual blocks in stages `layer1`, `layer2`, …"""

    def __init__(self, adversarial_norms: bool) -> None:
        super().__init__()
        self.adversarial_norms = adversarial_norms

    def add_norm(self, name: str, channels: int) -> None:
        self.add_module(name, nn.BatchNorm2d(channels))
        if self.adversarial_norms:
            twin = nn.BatchNorm2d(channels, momentum=ADVERSARIAL_MOMENTUM)
            self.add_module(f"{name}_adv", twin)

    def norm(
        self,
        name: str,
        x: Tensor,
        adversarial: bool,
        residual: Tensor | None = None,
        slope: float | None = None,
    ) -> Tensor:
        """The BatchNorm of that name (or its twin) of x, plus `residual`, then a ReLU whose slope
        below 0 is `slope` (None: no ReLU)."""
        y = getattr(self, f"{name}_adv" if adversarial else name)(x)
        # In place: no backward pass needs what a BatchNorm gave.
        y = y if residual is None else y.add_(residual)
        if slope is None:
            return y
        return F.leaky_relu(y, slope, inplace=True) if slope else F.relu(y, inplace=True)

    def add_stages(self, block: Any, blocks: Sequence[int], channels: int, width: int) -> int:
        """The channels after the last stage. block(inputs, width, stride) has them as `outputs`;
        each stage has twice the width of the one before and half its side."""
        for stage, depth in enumerate(blocks):
            layer = nn.ModuleList()
            for i in range(depth):
                part = block(channels, width << stage, 2 if i == 0 and stage > 0 else 1)
                layer.append(part)
                channels = part.outputs
            self.add_module(f"layer{stage + 1}", layer)
        return channels

    def run_stages(self, x: Tensor, adversarial: bool) -> Tensor:
        for name, layer in self.named_children():
            for block in layer.children() if name.startswith("layer") else ():
                x = block(x, adversarial)
        return x

    def draw_weights(self) -> None:
        """Draw convolutions from a normal of variance 2 / (k²·outputs) (He et al. 2015)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _Block(Normed):
    """Two 3×3 convolutions, or a bottleneck of 1×1, 3×3 (which has the stride: v1.5) and 1×1."""

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, adversarial_norms: bool
    ) -> None:
        super().__init__(adversarial_norms)
        shapes = [(1, width), (3, width), (1, 4 * width)] if bottleneck else [(3, width)] * 2
        self.depth, self.outputs = len(shapes), shapes[-1][1]
        channels = inputs
        for i, (kernel, outputs) in enumerate(shapes):
            step = stride if i == bottleneck else 1
            convolution = nn.Conv2d(channels, outputs, kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{i + 1}", convolution)
            self.add_norm(f"bn{i + 1}", outputs)
            channels = outputs
        self.projects = stride != 1 or inputs != channels
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False))
            self.add_norm("shortcut_bn", channels)

    def forward(self, x: Tensor, adversarial: bool = False) -> Tensor:
        y = x
        for i in range(1, self.depth):
            y = self.norm(f"bn{i}", convolve(y, getattr(self, f"conv{i}")), adversarial, slope=0.0)
        if self.projects:
            x = self.norm("shortcut_bn", project(x, self.shortcut[0]), adversarial)
        y = getattr(self, f"conv{self.depth}")(y)
        return self.norm(f"bn{self.depth}", y, adversarial, residual=x, slope=0.0)


def convolve(x: Tensor, convolution: Any) -> Tensor:
    """A k×k convolution of x (B, C, H, W) with padding k // 2.

    Of images of one pixel the middle weights alone act. oneDNN's bf16 gradient of such a
    convolution with a stride reads memory that nobody wrote (docs/upstream.md).
    """
    if x.shape[-2:] == (1, 1) and convolution.stride[0] > 1 and x.device.type == "cpu":
        k = convolution.kernel_size[0] // 2
        return F.conv2d(x, convolution.weight[:, :, k : k + 1, k : k + 1])
    return convolution(x)


def project(x: Tensor, convolution: Any) -> Tensor:
    """A 1×1 convolution of x (B, C, H, W).

    With a stride, oneDNN's gradient of its weights writes behind its memory where channels are few:
    fewer than 8 (AVX2), or than 16 where more than 22 × 22 pixels come out (AVX-512). Pixels are
    picked before it there (docs/upstream.md).
    """
    stride, few = convolution.stride[0], 16 if x.shape[-1] > 44 else 8
    if stride > 1 and x.shape[1] < few and x.device.type == "cpu":
        return F.conv2d(x[..., ::stride, ::stride], convolution.weight)
    return convolution(x)


class ResNet(Normed):
    """Backbone without a classification head.

    Args:
        blocks: residual blocks in each stage. bottleneck: they are bottlenecks.
        width: channels of the first stage (64 in the papers; less for small machines).
        stem: `cifar`, `mini` or `imagenet`.
        adversarial_norms: give every BatchNorm an adversarial twin.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        bottleneck: bool = False,
        width: int = 64,
        stem: str = "cifar",
        adversarial_norms: bool = False,
    ) -> None:
        super().__init__(adversarial_norms)
        if stem not in ("cifar", "mini", "imagenet"):
            raise ValueError(f"stem must be cifar, mini or imagenet, and is {stem!r}.")
        self.shape, self.stem, self.width = (blocks, bottleneck), stem, width
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.add_norm("bn1", width)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        block = partial(_Block, bottleneck=bottleneck, adversarial_norms=adversarial_norms)
        self.feature_dim = self.add_stages(block, blocks, width, width)
        if stem != "cifar":
            self.draw_weights()

    def forward(self, images: Tensor, adversarial: bool = False) -> Tensor:
        """Images (B, 3, H, W), normalised → features (B, feature_dim)."""
        x = self.maxpool(self.norm("bn1", self.conv1(images), adversarial, slope=0.0))
        return torch.flatten(F.adaptive_avg_pool2d(self.run_stages(x, adversarial), 1), 1)


def zero_residuals(backbone: nn.Module) -> None:
    """Start each residual branch of a ResNet at 0: the last BatchNorm's weight of every block.

    Goyal et al. 2017 (arXiv:1706.02677), §5.1; a backbone without such blocks is left alone.
    """
    for block in backbone.modules():
        if isinstance(block, _Block):
            for name, norm in block.named_children():
                if name.removesuffix("_adv") == f"bn{block.depth}":
                    nn.init.zeros_(norm.get_parameter("weight"))


def start_as_torchvision(backbone: nn.Module) -> None:
    """Draw torchvision's initial weights where the published code replaces the stem of its ResNet:
    the new stem has a Conv2d's default. Any other backbone is left alone."""
    if isinstance(backbone, ResNet) and backbone.stem != "imagenet":  # there drawn already
        backbone.draw_weights()
        backbone.conv1.reset_parameters()


def torchvision_weights(backbone: nn.Module) -> dict[str, Tensor]:
    """A ResNet's state dict under torchvision's names, with the main norms alone.

    With an ImageNet stem and width 64, `torchvision.models` with `fc = nn.Identity()` loads it
    (strict) and gives the same features; a CIFAR stem has the same names, and another `conv1`.
    ValueError where it is no ResNet of this library.
    """
    if not isinstance(backbone, ResNet):
        raise ValueError(f"Only a ResNet has torchvision's names, not a {type(backbone).__name__}.")
    return {
        key.replace("shortcut_bn.", "downsample.1.").replace("shortcut.0.", "downsample.0."): value
        for key, value in backbone.state_dict().items()
        if "_adv." not in key
    }


# Name → blocks of each stage, and whether they are bottlenecks.
SHAPES = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
for _name, (_blocks, _bottleneck) in SHAPES.items():
    register_backbone(_name)(partial(ResNet, _blocks, bottleneck=_bottleneck))
