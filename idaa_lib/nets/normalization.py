"""BatchNorm with the sum and the rectifier after it, in few passes over memory where compiled.

Nothing fuses with torch's own kernel, and what the compiler makes of BatchNorm sums a channel over
all pixels of a batch at once, for a CPU with long strides. Here an image's statistics come first,
while it is in the cache, then those of the batch; backwards the rectifier is part of the same
loops. Measured: benchmarks/results, `simclr_step_ratio`, `idaa_step_ratio`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RELU = 0.0  # its slope below 0


def batch_norm(
    norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None, slope: float | None = None
) -> Tensor:
    """norm(x), plus residual, rectified; all (B, C, H, W).

    slope: below 0, of the rectifier; None: there is none.
    """
    n = x.numel() // x.shape[1]  # values of a channel; of one alone torch makes an error
    if norm.training and n > 1 and torch.compiler.is_compiling() and x.device.type == "cpu":
        return _compiled(norm, x, residual, slope, n)
    y = norm(x)
    # In place: no backward pass needs what a BatchNorm gave.
    y = y if residual is None else y.add_(residual)
    return y if slope is None else rectified(y, slope, inplace=True)


def rectified(y: Tensor, slope: float, inplace: bool = False) -> Tensor:
    """y where it is above 0, slope · y elsewhere."""
    return F.leaky_relu(y, slope, inplace) if slope else F.relu(y, inplace=inplace)


def _compiled(
    norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, slope: float | None, n: int
) -> Tensor:
    assert norm.momentum is not None and norm.num_batches_tracked is not None
    assert norm.running_mean is not None and norm.running_var is not None
    y, mean, var = Normalize.apply(x, norm.weight, norm.bias, residual, norm.eps, slope)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)
    return y


class Normalize(torch.autograd.Function):
    """x, its statistics' scale and shift γ, β (C), a residual or None, ε, the
    rectifier's slope or None → y (B, C, H, W), mean and biased variance (C) of x.

    Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1 and the derivatives of §3. Sums are in fp32
    or better; an image's are joined to those of the batch by the law of total variance.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float,
        slope: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        pixels = _pixels(x)
        v = pixels.to(torch.promote_types(x.dtype, torch.float32))
        means = v.mean(1)
        variances = ((v - means[:, None]) ** 2).mean(1)
        mean = means.mean(0)
        var = variances.mean(0) + ((means - mean) ** 2).mean(0)
        inverse = (var + eps).rsqrt()
        y = v * (inverse * weight) + (bias - mean * inverse * weight)
        if residual is not None:
            y = y + _pixels(residual)
        if slope is not None:
            y = rectified(y, slope)
        y = _maps(y.to(x.dtype), x)
        ctx.save_for_backward(x, weight, mean, inverse, None if slope is None else y)
        ctx.slope = slope
        ctx.adds = residual is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, y = ctx.saved_tensors
        received = _pixels(gradient)
        if y is not None:
            below = ctx.slope * received if ctx.slope else 0  # 0 · ∞ would be no number
            received = torch.where(_pixels(y) > 0, received, below)
        g = received.to(mean.dtype)
        n = g.shape[0] * g.shape[1]
        centred = _pixels(x) - mean
        bias = g.sum(1).sum(0)
        scale = (g * centred).sum(1).sum(0) * inverse
        found = (g - bias / n - centred * inverse * (scale / n)) * (weight * inverse)
        residual = _maps(received, x) if ctx.adds else None
        return _maps(found.to(x.dtype), x), scale, bias, residual, None, None


def _pixels(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) → (B, H·W, C): a view where they are channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _maps(pixels: Tensor, like: Tensor) -> Tensor:
    """Pixels (B, H·W, C) → maps (B, C, H, W), channels-last."""
    return pixels.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
