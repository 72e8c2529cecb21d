"""The contract of adversaries: from (x, a loss of x) to x′."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idaa_lib import configs
from idaa_lib.configs import UserError
from idaa_lib.configs.base import NonNegative, Positive
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import VAE
from idaa_lib.registry import register
from idaa_lib.views import denormalise, normalise

# What is ascended: images (B, 3, H, W) → scalar. One that takes the keyword `at_start` learns from
# it whether the images are the attacked ones themselves.
AttackLoss = Callable[..., Tensor]
Numbers = Mapping[str, Tensor]


class AttackError(UserError, ArithmeticError):
    """An attack whose gradient is not finite."""


@dataclass(frozen=True)
class Attack:
    """An attacked batch, detached."""

    images: Tensor  # x′ (B, 3, H, W)
    delta: Tensor  # δ (B, m), or (B, 3, H, W) for CLAE
    z: Tensor | None = None  # E(x) + δ (B, m), and G(x); None for CLAE
    reconstruction: Tensor | None = None


def register_adversary(name: str) -> Callable[[Any], Any]:
    """A decorator that makes an adversary available as `adversary=name`.

    The class is an `Adversary`, the names of its `Options` are its knobs; see `register_method`.
    """
    return register("adversary", name, Adversary, configs.Options)


class Adversary:
    """Base of all adversaries: x and an attack loss in, an `Attack` out. A subclass has `__call__`.

    Args:
        vae: run in eval mode whatever its mode, its buffers, mode and gradients left alone.
        mean, std: normalisation of the images that will come, which it keeps as attributes: pixels
            in [0, 1] are x · std + mean. None: that of the VAE.
        knobs: see `Options`.
    """

    class Options(configs.Options):
        """alpha: weight of the adversarial loss."""

        alpha: NonNegative = 1.0

    # Whether it is given a frozen VAE, whose knobs are `VAEOptions`: it can `encode` and `decode`.
    needs_vae = False
    # Whether a call does nothing but launch work on the device, always the same, so that a CUDA
    # graph can stand for it. Each class says so itself.
    recordable = False

    def __init__(
        self, vae: VAE | None = None, *, mean: Any = None, std: Any = None, **knobs: Any
    ) -> None:
        self.options: Any = self.Options(**knobs)
        self.vae: Any = vae
        own: Any = (None, None) if vae is None else (vae.mean, vae.std)
        units = (mean, std) if vae is None or mean else own
        self.mean, self.std = units
        if vae is not None and None in own and units != own:
            raise ValueError("mean and std were given, but the VAE does not know its own.")
        # (mean, std) of the images and of the VAE, where they differ.
        self.units = None if vae is None or units == own else (units, own)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ² (B, m) that the VAE has for images x (B, 3, H, W); without a graph."""
        if self.vae is None:
            raise ValueError(f"{type(self).__name__} has no VAE: its class needs needs_vae = True.")
        with torch.no_grad(), evaluating(self.vae):
            mu, logvar = self.vae.encode(self._convert(x, 0, 1))
        # In the precision of x under autocast too: bf16 would round μ, δ and ε themselves.
        return mu.to(x.dtype), logvar.to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """The VAE's images (B, 3, H, W) of z (B, m), in the units of x; with a graph back to z."""
        with evaluating(self.vae):
            return self._convert(self.vae.decode(z).to(z.dtype), 1, 0)

    def _convert(self, x: Tensor, source: int, target: int) -> Tensor:
        """Between the normalisations of the images (0) and of the VAE (1)."""
        if self.units is None:
            return x
        return normalise(denormalise(x, *self.units[source]), *self.units[target])

    def numbers(self, shape: torch.Size, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The random numbers of an attack on images (n, 3, H, W), by name, n rows each, on the CPU:
        the loop draws them for the global batch and keeps the rows of its process."""
        return {}

    def __call__(
        self,
        x: Tensor,
        attack_loss: AttackLoss,
        generator: torch.Generator | None = None,
        numbers: Numbers | None = None,
    ) -> Attack:
        """The attack on images x (B, 3, H, W); AttackError where its gradient is not finite.

        attack_loss: ascended; differentiated with respect to δ alone, no `.grad` is written.
        numbers: as `numbers` draws them; None: drawn here, by `generator`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__, which makes the attack.")

    def prepare(self, device: torch.device) -> None:
        """Move what it holds to the device."""
        if self.vae is not None:
            self.vae.to(device, memory_format=torch.channels_last)

    def check(self) -> None:
        """Raise AttackError if a gradient since the last check was not finite (waits for a GPU)."""


class VAEOptions(Adversary.Options):
    """vae: id or path of a VAE run (None: one that fits). dim: its bottleneck dimension
    (None: any)."""

    vae: str | None = None
    dim: Positive | None = None


@register_adversary("none")
class NoAdversary(Adversary):
    """The baseline without an adversarial term."""

    class Options(configs.Options):
        """None."""

    recordable = True


def build_adversary(config: Any, vae: VAE | None = None, **units: Any) -> Adversary:
    """The adversary that a configuration names, with its knobs.

    units: `mean`, `std` of the images.
    """
    kind = config.get_chosen("adversary")
    knobs = {k: v for k, v in config.options("adversary") if k not in ("vae", "dim")}
    return kind(vae, **units, **knobs) if kind.needs_vae else kind(**units, **knobs)
