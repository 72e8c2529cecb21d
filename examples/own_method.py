"""A method and an adversary of one's own, in one file outside the library (notebook 12).

Method: alignment and uniformity (Wang & Isola, ICML 2020, arXiv:2005.10242, §4): for embeddings
z1, z2 of two views, L2-normalised,
    L = mean ‖z1 − z2‖² + λ · [U(z1) + U(z2)] / 2,   U(z) = log mean_{i<j} exp(−2 ‖zᵢ − zⱼ‖²).

Adversary: IDAA with a step that the VAE's own uncertainty measures. IDAA moves each coordinate of z
by ε; here x′ = x − G(x) + D(E(x) + δ) with |δₖ| = ε · σₖ(x)ᵖ, σₖ(x) being the standard deviation of
the posterior. p = 0 is IDAA; at p = 1 each coordinate moves by ε standard deviations, so x′ moves
less where the VAE is sure of z (small σ). It is ours, from no paper; whether it helps is not known.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import idaa_lib


def uniformity(z: Tensor) -> Tensor:
    """U of embeddings (B, D): 0 where all are one point, about −4 + 8/D on a full sphere."""
    return (-2 * torch.pdist(z.float()).square()).exp().mean().log()


@idaa_lib.register_method("align_uniform")
class AlignUniform(idaa_lib.Contrastive):
    class Options(idaa_lib.Contrastive.Options):
        """spread: λ, the weight of uniformity."""

        spread: Annotated[float, Field(ge=0)] = 1.0

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        alignment = (z1 - z2).square().sum(1).mean()
        return alignment + self.options.spread * (uniformity(z1) + uniformity(z2)) / 2


@idaa_lib.register_adversary("idaa_posterior")
class PosteriorIDAA(idaa_lib.Adversary):
    class Options(idaa_lib.VAEOptions):
        """epsilon: ε, in units of σᵖ. power: p."""

        epsilon: Annotated[float, Field(ge=0)] = 0.25
        power: Annotated[float, Field(ge=0, le=1)] = 1.0

    needs_vae = True

    def __call__(self, x, attack_loss, generator=None, numbers=None):
        mu, logvar = self.encode(x)  # (B, m)
        delta = torch.zeros_like(mu, requires_grad=True)
        G = self.decode(mu + delta)
        x_of_delta = (x - G.detach()) + G  # x itself, at δ = 0
        (gradient,) = torch.autograd.grad(attack_loss(x_of_delta), delta)
        sigma = (logvar / 2).exp()
        delta = self.options.epsilon * sigma**self.options.power * gradient.sign()
        with torch.no_grad():
            images = (x - G) + self.decode(mu + delta)
        return idaa_lib.Attack(images, delta, mu + delta, G.detach())
