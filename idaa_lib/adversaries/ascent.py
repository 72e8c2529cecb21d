"""Attacks within a ball: of gradient ascent, and of random signs.

IDAA (Yang et al., ICML 2022): x′ = R(x) + D(E(x) + δ), R(x) = x − G(x): only what the VAE's
bottleneck holds is attacked, the residual with the sample's identity stays (docs/spec/idaa.md §2).
CLAE (Ho & Vasconcelos, NeurIPS 2020): x′ = x + δ on the pixels (spec §3).
RandomSign: IDAA's perturbation with random signs, the control that no gradient guides.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from idaa_lib.adversaries.base import (
    Adversary,
    Attack,
    AttackError,
    AttackLoss,
    Numbers,
    VAEOptions,
    register_adversary,
)
from idaa_lib.configs.base import NonNegative, Positive, Rate
from idaa_lib.nets.vae import VAE


@dataclass(frozen=True)
class Anchor:
    """What an attack starts from."""

    images: Tensor  # x
    point: Tensor  # what is perturbed: E(x), or x itself
    reconstruction: Tensor | None = None  # G(x) if there is
    # δ = 0 and x′ there with a graph back to it, good for one gradient.
    start: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Direction:
    """The unit step (‖·‖ = 1 in the attack's norm) from x: one direction serves every ε."""

    anchor: Anchor
    unit: Tensor


class Radius(Adversary.Options):
    """epsilon: radius, in units of the point that is perturbed. norm: of δ, for each sample."""

    epsilon: NonNegative = 0.1
    norm: Literal["linf", "l2"] = "linf"


class GradientAscent(Adversary):
    """Projected gradient ascent within ‖δ‖ ≤ ε, on pixels: x′ = x + δ.

    A subclass that perturbs something else has its own `anchor`, `render` and `point_shape`.
    """

    class Options(Radius):
        """steps: gradient steps. step_size: None for ε at one step, as published, and 2.5·ε/steps
        at several (Madry et al. 2018, arXiv:1706.06083, §5). random_start: a uniform draw of the
        ball, not x. reuse_anchor: the attacked embedding serves as its own anchor where it equals
        it exactly; False lets the adversarial BatchNorm statistics see a step 3 times, as the
        official code."""

        steps: Positive = 1
        step_size: Rate | None = None
        random_start: bool = False
        reuse_anchor: bool = True

    def __init__(
        self, epsilon: float | None = None, steps: int | None = None, **knobs: Any
    ) -> None:
        knobs |= {"epsilon": epsilon, "steps": steps}
        super().__init__(**{name: value for name, value in knobs.items() if value is not None})
        self.epsilon, self.norm = self.options.epsilon, self.options.norm
        # Whether all gradients since `check` were finite, where reading one waits.
        self._finite: Tensor | None = None

    def anchor(self, x: Tensor, graph: bool = False) -> Anchor:
        """What an attack on x starts from; with `graph` ready for its first gradient."""
        return Anchor(x.detach(), x.detach())

    def render(self, anchor: Anchor, delta: Tensor) -> Tensor:
        """x′ (B, 3, H, W) at δ, with a graph back to δ where one is recorded."""
        return anchor.images + delta

    def point_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the point that is perturbed, of images (n, 3, H, W)."""
        return tuple(shape)

    def numbers(self, shape: torch.Size, generator: torch.Generator | None) -> dict[str, Tensor]:
        if not self.options.random_start:
            return {}
        point = self.point_shape(shape)
        if self.norm == "linf":
            return {"start": torch.rand(point, generator=generator)}
        normal = torch.randn(point, generator=generator)
        return {"start": normal, "radius": torch.rand(point[0], generator=generator)}

    def __call__(
        self,
        x: Tensor,
        attack_loss: AttackLoss,
        generator: torch.Generator | None = None,
        numbers: Numbers | None = None,
    ) -> Attack:
        numbers = self.numbers(x.shape, generator) if numbers is None else numbers
        return self._attack(*self._climb(x, attack_loss, numbers))

    def _climb(self, x: Tensor, attack_loss: AttackLoss, numbers: Numbers) -> tuple[Anchor, Tensor]:
        """Where the ascent starts, and δ where it ends."""
        own, at_x = self.options, "start" not in numbers
        anchor = self.anchor(x, graph=at_x)
        delta = self._start(anchor.point, numbers)
        size = own.step_size or (self.epsilon if own.steps == 1 else 2.5 * self.epsilon / own.steps)
        for step in range(own.steps):
            unit = self._unit(anchor, delta, attack_loss, at_x and step == 0)
            delta = self._project(delta + size * unit)
        return anchor, delta

    def direction(self, x: Tensor, attack_loss: AttackLoss, **random: Any) -> Direction:
        """The first step's direction at x. With one step and no random start it is the attack."""
        anchor = self.anchor(x, graph=True)
        unit = self._unit(anchor, torch.zeros_like(anchor.point), attack_loss, True)
        self.check()
        return Direction(replace(anchor, start=None), unit)

    def apply(self, direction: Direction, epsilon: float) -> Attack:
        """The one-step attack of radius `epsilon` along a direction: costs one decode."""
        return self._attack(direction.anchor, epsilon * direction.unit)

    @torch.no_grad()
    def _attack(self, anchor: Anchor, delta: Tensor) -> Attack:
        if self._finite is not None:  # NaN gets into the loss, which every line of the log checks
            delta = delta.masked_fill(~self._finite, torch.nan)
        images = self.render(anchor, delta)
        z = None if anchor.reconstruction is None else anchor.point + delta
        return Attack(images, delta, z, anchor.reconstruction)

    def _unit(self, anchor: Anchor, delta: Tensor, attack_loss: AttackLoss, at_x: bool) -> Tensor:
        """The direction of the steepest ascent at δ, ‖·‖ = 1 in the attack's norm."""
        with torch.enable_grad():
            if at_x and anchor.start is not None:
                delta, images = anchor.start
            else:
                delta = delta.detach().requires_grad_()
                images = self.render(anchor, delta)
            hears = "at_start" in inspect.signature(attack_loss).parameters
            start = {"at_start": at_x and self.options.reuse_anchor} if hears else {}
            loss = attack_loss(images, **start)
            (gradient,) = torch.autograd.grad(loss, delta)
        finite = torch.isfinite(gradient).all()
        if waits(gradient.device):
            if self._finite is None:
                self._finite = torch.ones_like(finite)
            self._finite.logical_and_(finite)  # in place: a recorded step finds it there
        elif not finite:
            raise AttackError(_cause(anchor, loss, gradient))
        if self.norm == "linf":
            return gradient.sign()
        # Its largest entry is made 1 first: the squares of a tiny (small τ) or huge gradient would
        # leave the range of floats, and the length be 0 or infinite.
        smallest = torch.finfo(gradient.dtype).tiny
        largest = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True)
        gradient = gradient / largest.clamp_min(smallest)
        return gradient / _length(gradient).clamp_min(smallest)

    def check(self) -> None:
        if self._finite is None or self._finite:
            return
        self._finite.fill_(True)
        raise AttackError(
            "An attack's gradient was not finite since the last line of the log: the encoder "
            "diverged, τ is too small, or the VAE is broken."
        )

    def _project(self, delta: Tensor) -> Tensor:
        epsilon = self.epsilon
        if self.norm == "linf":
            return delta.clamp(-epsilon, epsilon)
        # Rounding can make the factor slightly larger than 1, so it is clamped.
        factor = epsilon / _length(delta).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * factor.clamp_max(1)

    def _start(self, point: Tensor, numbers: Numbers) -> Tensor:
        """δ at the start: 0, or a uniform draw of the ε-ball for each sample."""
        if "start" not in numbers:
            return torch.zeros_like(point)
        start = numbers["start"].to(point)
        if self.norm == "linf":
            return self.epsilon * (2 * start - 1)
        length = _length(start)
        radius = numbers["radius"].to(point) ** (1 / point[0].numel())
        return self.epsilon * radius.view_as(length) * start / length


@register_adversary("clae")
class CLAE(GradientAscent):
    """Attack on the pixels: x′ = x + δ, ‖δ‖ ≤ ε in the units of x (normalised)."""

    class Options(GradientAscent.Options):
        epsilon: NonNegative = 0.03  # CLAE's own (spec §3)

    recordable = True


@register_adversary("idaa")
class IDAA(GradientAscent):
    """Attack on the bottleneck of a VAE: x′ = R(x) + D(E(x) + δ), ‖δ‖ ≤ ε in raw units of z."""

    class Options(VAEOptions, GradientAscent.Options):
        """ε is .1 in the official README; for MoCo and BYOL nothing is published."""

    needs_vae = True
    recordable = True

    def __init__(
        self, vae: VAE, epsilon: float | None = None, steps: int | None = None, **knobs: Any
    ) -> None:
        super().__init__(epsilon, steps, vae=vae, **knobs)

    def point_shape(self, shape: torch.Size) -> tuple[int, ...]:
        return shape[0], self.vae.dim

    def anchor(self, x: Tensor, graph: bool = False) -> Anchor:
        point, _ = self.encode(x)
        # One decode serves G(x) and the first gradient.
        with torch.set_grad_enabled(graph):
            zero = torch.zeros_like(point, requires_grad=graph)
            decoded = self.decode(point + zero)
            G = decoded.detach()
            return Anchor(x, point, G, (zero, (x - G) + decoded) if graph else None)

    def render(self, anchor: Anchor, delta: Tensor) -> Tensor:
        assert anchor.reconstruction is not None
        return (anchor.images - anchor.reconstruction) + self.decode(anchor.point + delta)


@register_adversary("random_sign")
class RandomSign(IDAA):
    """IDAA's control: every coordinate of δ is ±ε (l2: equally large, ‖δ‖ = ε) with random sign.

    One draw, and the loss is not looked at.
    """

    class Options(VAEOptions, Radius):
        """As IDAA's, without those that speak of a gradient."""

    recordable = True

    def numbers(self, shape: torch.Size, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"signs": torch.rand(self.point_shape(shape), generator=generator)}

    def _climb(self, x: Tensor, attack_loss: AttackLoss, numbers: Numbers) -> tuple[Anchor, Tensor]:
        direction = self.direction(x, attack_loss, numbers=numbers)
        return direction.anchor, self.epsilon * direction.unit

    def direction(self, x: Tensor, attack_loss: AttackLoss, **random: Any) -> Direction:
        anchor = self.anchor(x)
        numbers = random.get("numbers") or self.numbers(x.shape, random.get("generator"))
        signs = numbers["signs"].to(anchor.point).sub(0.5).sign()
        return Direction(anchor, signs if self.norm == "linf" else signs / _length(signs))


def waits(device: torch.device) -> bool:
    """Whether reading a value means waiting for all that was launched before."""
    return device.type != "cpu"


def _length(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped to multiply x."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def _cause(anchor: Anchor, loss: Tensor, gradient: Tensor) -> str:
    """Where a gradient that is not finite comes from, followed from the input onwards."""
    bad = (~torch.isfinite(gradient)).flatten(1).any(1)
    head = f"The attack's gradient is not finite for {int(bad.sum())} of {len(bad)} images: "
    broken = "that are not finite (a broken VAE)."
    for values, reason in (
        (anchor.images, "the images themselves are not finite."),
        (anchor.point, f"the VAE's encoder gives latents {broken}"),
        (anchor.reconstruction, f"the VAE's decoder gives images {broken}"),
        (loss, f"the attack loss is {loss.item()} (the encoder diverged, or τ is too small)."),
    ):
        if values is not None and not torch.isfinite(values).all():
            return head + reason
    return head + f"the loss is {loss.item():.4g}, but its derivative overflows."
