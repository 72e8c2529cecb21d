"""The VAE of IDAA, which splits an image into G(x) and R(x) = x − G(x) (docs/spec/idaa.md §1).

Layers, their order and their names are those of the official release, so its checkpoints fit.
The output is BatchNorm(tanh(decoder)): in eval mode a per-channel affine map of (−1, 1), which lets
G span the range of normalised pixels; the release does so without saying why.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.nets import evaluating


class Output(NamedTuple):
    """A pass through the VAE: z, mu, logvar (B, m); G (B, 3, H, W)."""

    z: Tensor
    G: Tensor
    mu: Tensor
    logvar: Tensor


class Decomposition(NamedTuple):
    """x = G + R, each (B, 3, H, W) in the units of x."""

    G: Tensor
    R: Tensor


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.LeakyReLU(0.01),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(0.01),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


def halvings(size: int, width: int) -> int:
    """How often a VAE halves images of `size` pixels: twice up to 60, three times up to 128, else
    five times, as the published ones of 32, 64, 84 and 224 px do; ValueError where there is none.
    """
    if size < 4 or size % 4:
        below = size // 4 * 4
        near = f"{below} or {below + 4}" if below > 0 else "4 or more"
        raise ValueError(f"size must be a multiple of 4 for the VAE, and is {size}: take {near}.")
    times = 2 if size <= 60 else 3 if size <= 128 else 5
    if width < (least := 1 << max(0, times - 2)):
        raise ValueError(
            f"width must be at least {least} at size={size}, for the VAE's first layer to have a "
            f"channel, and is {width}."
        )
    return times


class VAE(nn.Module):
    """The CIFAR (up to 60 px), mini (up to 128 px) and ImageNet variants, by size.

    Args:
        dim: bottleneck dimension m.
        size: image side, pixels, a multiple of 4.
        width: half the channels of the innermost feature map (64 in the paper, so d = 128).
        mean, std: the normalisation of the images that it is trained on, per channel in [0, 1]
            units; an adversary that meets other units converts (None: units are never converted).
    Raises:
        ValueError: as `halvings`.
    """

    def __init__(
        self,
        dim: int,
        size: int = 32,
        width: int = 64,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        times = halvings(size, width)
        self.dim, self.size, self.width, self.mean, self.std = dim, size, width, mean, std
        d, side = 2 * width, size >> times
        self.inner = (d, side, side)
        channels = [3, *(d >> k for k in reversed(range(times)))]
        # What halving odd sides lost: a step of the decoder without padding gives two pixels more.
        lost = size - (side << times)

        down: list[nn.Module] = []
        for c, c_next in pairwise(channels):
            down += [nn.Conv2d(c, c_next, 4, 2, 1, bias=False), nn.BatchNorm2d(c_next), nn.ReLU()]
        up: list[nn.Module] = []
        for i, (c, c_next) in enumerate(pairwise(channels[::-1])):
            # 84 px: 84 → 42 → 21 → 10, and back 10 → 20 → 42 → 84.
            padding = 0 if lost & (1 << (times - i)) else 1
            up += [nn.ConvTranspose2d(c, c_next, 4, 2, padding, bias=False)]
            up += [nn.BatchNorm2d(c_next), nn.LeakyReLU(0.01)]
        residuals = lambda: [_Residual(d), nn.BatchNorm2d(d), _Residual(d)]  # noqa: E731
        # Only the ImageNet variant has a BatchNorm on either side of the bottleneck.
        edge = lambda: [nn.BatchNorm2d(d)] if times == 5 else []  # noqa: E731
        self.encoder = nn.Sequential(*down, *residuals(), *edge())
        self.decoder = nn.Sequential(*edge(), *residuals(), nn.BatchNorm2d(d), *up[:-2])
        flat = d * self.inner[1] ** 2
        self.fc11 = nn.Linear(flat, dim)
        self.fc12 = nn.Linear(flat, dim)
        self.fc21 = nn.Linear(dim, flat)
        self.bn = nn.BatchNorm2d(3)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) → μ, log σ², each (B, m)."""
        h, layout = self.encoder(x), torch.channels_last
        if h.requires_grad and h.is_contiguous(memory_format=layout):
            # `reshape` gives back a gradient in another layout, with which the backward pass of a
            # BatchNorm takes 15 times as long (CPU).
            h.register_hook(lambda gradient: gradient.contiguous(memory_format=layout))
        # reshape, not view: in channels_last the activations are not contiguous.
        h = h.reshape(len(x), -1)
        return self.fc11(h), self.fc12(h)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, m) → G (B, 3, H, W).

        In eval mode the last layer keeps the parameters' precision under autocast too (cuDNN's TF32
        on a GPU, if allowed): x′ − x is a difference of two G, and in bf16 their own rounding is as
        large as what a small δ changes.
        """
        h = self.fc21(z).reshape(-1, *self.inner).contiguous(memory_format=torch.channels_last)
        if self.training:
            # A BatchNorm of 3 channels is slow in channels_last (CPU).
            return self.bn(torch.tanh(self.decoder(h).contiguous()))
        h = self.decoder[:-1](h)
        with torch.autocast(h.device.type, enabled=False):
            return self.bn(torch.tanh(self.decoder[-1](h.to(self.bn.weight.dtype))))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Output:
        """z = μ + σ·noise, with noise (B, m) standard normal; z = μ without it."""
        mu, logvar = self.encode(x)
        z = mu if noise is None else mu + torch.exp(0.5 * logvar) * noise
        return Output(z, self.decode(z), mu, logvar)

    @torch.no_grad()
    def decompose(self, x: Tensor) -> Decomposition:
        """Split images (B, 3, H, W), in the units the VAE was trained with, at z = μ."""
        with evaluating(self):
            G = self(x).G
        return Decomposition(G, x - G)


def rate(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z|x) ‖ N(0, I)) of each image in nats, (B, m), (B, m) → (B,) (spec §6.1)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def vae_loss(x: Tensor, output: Output, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """L = L_rec + κ·L_KL, and its two parts, scalars (spec §1).

    L_rec is the mean squared error per pixel and channel; L_KL is the KL term divided by B·3·m:
    the 3 is stray, but every published κ is meant with it. In the precision of x, whatever the
    autocast that made `output`.
    """
    G, mu, logvar = (part.to(x.dtype) for part in output[1:])
    reconstruction = F.mse_loss(G, x)
    kl = rate(mu, logvar).mean() / (3 * mu.shape[1])
    return reconstruction + kappa * kl, reconstruction, kl
