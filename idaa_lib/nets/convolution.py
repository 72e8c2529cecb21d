"""A 3×3 convolution by whichever way is fastest on a CPU.

With `compile=True` by Winograd's algorithm (`winograd`); else oneDNN's, with a weight gradient that
is nine products of matrices where these are faster: its bf16 kernel for that reaches about two
thirds of a product's rate on processors with AVX-512 and without AMX, where a layer has many
channels and few pixels, or a stride. The gradient of tap (i, j) is gᵀ · x over all pixels that this
tap sees: the same sums, in fp32 as the kernel's are. Measured: benchmarks/results,
`simclr_step_ratio`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from idaa_lib.nets import winograd


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` of a 3×3 kernel with padding 1; stride 1 or 2."""

    # Whether this machine's processor has the slow kernel.
    by_taps = winograd.wins

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__(inputs, outputs, 3, stride, 1, bias=bias)
        self.by_winograd = False
        self._wide = min(inputs, outputs) >= (512 if stride == 1 else 256)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_winograd and winograd.fits(x, self.weight):
            return self._biased(winograd.Winograd.apply(x, self.weight))
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        half = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        if not (self._wide and self.by_taps and half and learns):
            return super().forward(x)
        y = self._conv_forward(x, self.weight.detach(), None)
        gradient = _WeightGradient.apply(self.weight, x.detach(), y.detach(), self.stride[0])
        return self._biased(_Join.apply(y, gradient))

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


def prepare(module: nn.Module) -> None:
    """Have a module convolve by Winograd's algorithm where that serves and wins (`compile=True`).

    Without its kernels (no compiler, say) nothing changes; a line says why.
    """
    served = [
        m
        for m in module.modules()
        if isinstance(m, Conv3x3) and m.stride == (1, 1) and winograd.serves(m.weight)
    ]
    if served and winograd.wins:
        try:
            winograd.load()
        except (OSError, RuntimeError) as error:
            print(f"compile: convolutions stay as they are. {error}")
        for convolution in served:
            convolution.by_winograd = winograd.loaded


class _Join(torch.autograd.Function):
    """y, with its gradient going both into the convolution and to the weight.

    Two nodes, because autograd then leaves out the one of the weight where nobody asks for it: an
    attack differentiates with respect to images alone.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class _WeightGradient(torch.autograd.Function):
    """Stands for a weight (K, C, 3, 3) where a convolution of x (B, C, H, W) gives y."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, y: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(weight, x)
        ctx.stride = stride
        return y.new_zeros(()).expand_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, x = ctx.saved_tensors
        taps = weight_gradient(gradient, x, ctx.stride)
        return torch.empty_like(weight).copy_(taps), None, None, None


def weight_gradient(gradient: Tensor, x: Tensor, stride: int) -> Tensor:
    """Gradient of the weight (K, C, 3, 3) of a 3×3 convolution with padding 1.

    gradient: of its output (B, K, h, w); x: its input (B, C, H, W).
    """
    g, x = gradient.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    found = g.new_empty(3, 3, g.shape[-1], x.shape[-1])
    rows, columns = (_seen(g.shape[d], x.shape[d], stride) for d in (1, 2))
    for i, (out_rows, in_rows) in enumerate(rows):
        for j, (out_columns, in_columns) in enumerate(columns):
            a = g[:, out_rows, out_columns].flatten(0, 2)
            b = x[:, in_rows, in_columns].flatten(0, 2)
            torch.mm(a.T, b, out=found[i, j])
    return found.permute(2, 3, 0, 1)


def _seen(outputs: int, inputs: int, stride: int) -> list[tuple[slice, slice]]:
    """For each tap of a side: the outputs where it lies on the image, and the inputs it sees."""
    found = []
    for tap in range(3):
        shift = tap - 1
        first = 1 if shift < 0 else 0
        last = min(outputs, (inputs - 1 - shift) // stride + 1)
        start = first * stride + shift
        found.append((slice(first, last), slice(start, (last - 1) * stride + shift + 1, stride)))
    return found
