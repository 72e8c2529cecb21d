"""Adversaries: from (x, a loss of x) to x′. They know no method (contract: docs/architecture.md).

IDAA (Yang et al., ICML 2022): x′ = R(x) + D(E(x) + δ), R(x) = x − G(x): only what the VAE's
bottleneck holds is attacked, the residual with the sample's identity stays (docs/spec/idaa.md §2).
CLAE (Ho & Vasconcelos, NeurIPS 2020): x′ = x + δ on the pixels (spec §3).
RandomSign: IDAA's perturbation with random signs, the control that no gradient guides.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from idaa_lib.configs import UserError
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import VAE, folded
from idaa_lib.views import denormalise, normalise

_Units = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std


class AttackError(UserError, ArithmeticError):
    """An attack whose gradient is not finite."""


class AttackLoss(Protocol):
    """What is ascended: images (B, 3, H, W) → scalar.

    One that takes the keyword `at_start` is told when the images are the attacked ones themselves.
    """

    def __call__(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor: ...


@dataclass(frozen=True)
class Attack:
    """An attacked batch, detached.

    images: x′ (B, 3, H, W); delta: δ (B, m), or (B, 3, H, W) for CLAE;
    z: E(x) + δ (B, m) and reconstruction: G(x), both None for CLAE.
    """

    images: Tensor
    delta: Tensor
    z: Tensor | None
    reconstruction: Tensor | None


@dataclass(frozen=True)
class Anchor:
    """What an attack starts from: images x, the point that is perturbed, and G(x) if there is.

    start: δ = 0 and x′ there with a graph back to it, good for one gradient.
    """

    images: Tensor
    point: Tensor
    reconstruction: Tensor | None
    start: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Direction:
    """The unit step (‖·‖ = 1 in the attack's norm) from x: one direction serves every ε."""

    anchor: Anchor
    unit: Tensor


class Turn(NamedTuple):
    """What the call of an attack says besides images and loss: see `_Adversary.__call__`."""

    generator: torch.Generator | None = None
    shard: tuple[int, int] = (0, 1)

    def draw(self, sample: Any, like: Tensor) -> Tensor:
        """This rank's part of a draw for the global batch, made on the CPU whatever the device."""
        rank, processes = self.shard
        n = len(like)
        drawn = sample((processes * n, *like.shape[1:]), generator=self.generator)
        return drawn[rank * n : (rank + 1) * n].to(like)


class NoAdversary:
    """The baseline without an adversarial term."""

    recordable = True

    def __call__(self, x: Tensor | None, attack_loss: AttackLoss | None, **_: Any) -> None:
        return None

    def check(self) -> None:
        pass

    def compile_parts(self) -> None:
        pass


class _Adversary:
    """Projected gradient ascent of `steps` steps within ‖δ‖ ≤ ε, shared by all attacks.

    Args:
        epsilon: radius, in units of the point that is perturbed. norm: `linf` or `l2` (per sample).
        steps, step_size: one step of ε by default, as published; several default to 2.5·ε/steps
            each (Madry et al. 2018, arXiv:1706.06083, §5).
        random_start: start from a uniform draw of the ball instead of x.
    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        epsilon: float,
        steps: int = 1,
        step_size: float | None = None,
        norm: str = "linf",
        random_start: bool = False,
    ) -> None:
        for name, value, ok in (
            ("epsilon", epsilon, 0 <= epsilon < math.inf),
            ("steps", steps, steps >= 1),
            ("step_size", step_size, step_size is None or step_size > 0),
        ):
            if not ok:
                raise ValueError(f"{name} of an attack cannot be {value}.")
        if norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, and is {norm!r}.")
        self.epsilon, self.steps, self.norm, self.random_start = epsilon, steps, norm, random_start
        default = epsilon if steps == 1 else 2.5 * epsilon / steps
        self.step_size = default if step_size is None else step_size
        self._finite: Tensor | None = None

    @property
    def recordable(self) -> bool:
        """Whether it does the same on the device at every call, without a draw on the host."""
        return not self.random_start

    def compile_parts(self) -> None:
        """Make faster what gains by it (`compile=True`); changes rounding and nothing else."""

    def check(self) -> None:
        """Wait for the device, and see whether the gradients since the last check were finite.

        Only the CPU is asked at every attack: a GPU would have to be waited for each time.

        Raises:
            AttackError: one was not.
        """
        if self._finite is None:
            return
        finite = bool(self._finite)
        self._finite.fill_(True)
        if not finite:
            raise AttackError(
                "An attack's gradient was not finite since the last line of the log: the encoder "
                "diverged, τ is too small, or the VAE is broken."
            )

    def anchor(self, x: Tensor, graph: bool = False) -> Anchor:
        """What an attack on x starts from; with `graph` ready for its first gradient."""
        raise NotImplementedError

    def render(self, anchor: Anchor, delta: Tensor) -> Tensor:
        """x′ (B, 3, H, W) at δ, with a graph back to δ where one is recorded."""
        raise NotImplementedError

    def __call__(
        self,
        x: Tensor,
        attack_loss: AttackLoss,
        generator: torch.Generator | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Attack:
        """Attack images x (B, 3, H, W).

        Args:
            attack_loss: ascended; differentiated with respect to δ alone, no `.grad` is written.
            generator: of random starts and random signs, on the CPU.
            shard: (rank, processes): with several, each draws for the global batch and keeps its
                part, so that n processes draw what one would.
        Raises:
            AttackError: the gradient is not finite.
        """
        return self._perform(x, attack_loss, Turn(generator, shard))

    def _perform(self, x: Tensor, attack_loss: AttackLoss, turn: Turn) -> Attack:
        anchor = self.anchor(x, graph=not self.random_start)
        delta = torch.zeros_like(anchor.point)
        if self.random_start:
            delta = self._uniform(anchor.point, turn)
        for step in range(self.steps):
            at_start = step == 0 and not self.random_start
            unit = self._unit(anchor, delta, attack_loss, at_start, turn)
            delta = self._project(delta + self.step_size * unit)
        return self._attack(anchor, delta)

    def direction(
        self,
        x: Tensor,
        attack_loss: AttackLoss,
        generator: torch.Generator | None = None,
    ) -> Direction:
        """The first step's direction at x. With one step and no random start it is the attack."""
        anchor = self.anchor(x, graph=True)
        zero = torch.zeros_like(anchor.point)
        unit = self._unit(anchor, zero, attack_loss, True, Turn(generator))
        self.check()
        return Direction(replace(anchor, start=None), unit)

    def apply(self, direction: Direction, epsilon: float) -> Attack:
        """The one-step attack of radius `epsilon` along a direction: costs one decode."""
        return self._attack(direction.anchor, epsilon * direction.unit)

    @torch.no_grad()
    def _attack(self, anchor: Anchor, delta: Tensor) -> Attack:
        images = self.render(anchor, delta)
        z = None if anchor.reconstruction is None else anchor.point + delta
        return Attack(images, delta, z, anchor.reconstruction)

    def _unit(
        self,
        anchor: Anchor,
        delta: Tensor,
        attack_loss: AttackLoss,
        at_start: bool,
        turn: Turn,
    ) -> Tensor:
        with torch.enable_grad():
            if at_start and anchor.start is not None:
                delta, images = anchor.start
            else:
                delta = delta.detach().requires_grad_()
                images = self.render(anchor, delta)
            start = {"at_start": at_start} if _knows_start(attack_loss) else {}
            loss = attack_loss(images, **start)
            (gradient,) = torch.autograd.grad(loss, delta)
        finite = torch.isfinite(gradient).all()
        if _waits(gradient.device):
            if self._finite is None:
                self._finite = torch.ones_like(finite)
            self._finite.logical_and_(finite)  # in place: a recorded step finds it there
        elif not finite:
            raise AttackError(_cause(anchor, loss, gradient))
        return self._direction(gradient)

    def _direction(self, gradient: Tensor) -> Tensor:
        """The step of length 1 in the attack's norm that a gradient asks for."""
        if self.norm == "linf":
            return gradient.sign()
        # Its largest entry made 1 first: the squares of a tiny (small τ) or huge gradient would
        # leave the range of floats, and the length be 0 or infinite.
        smallest = torch.finfo(gradient.dtype).tiny
        largest = gradient.flatten(1).abs().amax(1).view(-1, *[1] * (gradient.dim() - 1))
        gradient = gradient / largest.clamp_min(smallest)
        return gradient / _length(gradient).clamp_min(smallest)

    def _project(self, delta: Tensor) -> Tensor:
        if self.norm == "linf":
            return delta.clamp(-self.epsilon, self.epsilon)
        # In two divisions' rounding the factor can exceed 1 by nothing: clamped.
        factor = self.epsilon / _length(delta).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * factor.clamp_max(1)

    def _uniform(self, like: Tensor, turn: Turn) -> Tensor:
        """A uniform draw of the ε-ball for each sample."""
        if self.norm == "linf":
            return self.epsilon * (2 * turn.draw(torch.rand, like) - 1)
        normal = turn.draw(torch.randn, like)
        radius = turn.draw(torch.rand, like.flatten(1)[:, :1])
        radius = radius.reshape(-1, *[1] * (like.dim() - 1)) ** (1 / like[0].numel())
        return self.epsilon * radius * normal / _length(normal)


class IDAA(_Adversary):
    """Attack on the bottleneck of a VAE: x′ = R(x) + D(E(x) + δ), ‖δ‖ ≤ ε in raw units of z.

    Args:
        vae: run in eval mode whatever its mode, its buffers, mode and gradients left alone.
        mean, std: normalisation of the images that will come, where it is not the VAE's own.
        The others: see `_Adversary`.
    """

    def __init__(
        self,
        vae: VAE,
        epsilon: float,
        steps: int = 1,
        step_size: float | None = None,
        norm: str = "linf",
        random_start: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(epsilon, steps, step_size, norm, random_start)
        self.vae = vae
        self.units: tuple[_Units, _Units] | None = None  # of the images, of the VAE
        if mean is not None and std is not None:
            if vae.mean is None or vae.std is None:
                raise ValueError("mean and std were given, but the VAE does not know its own.")
            own = (vae.mean, vae.std)
            self.units = None if (mean, std) == own else ((mean, std), own)

    def compile_parts(self) -> None:
        self.vae = folded(self.vae)

    @torch.no_grad()
    def anchor(self, x: Tensor, graph: bool = False) -> Anchor:
        with evaluating(self.vae):
            # In the precision of x under autocast too: bf16 would round μ, δ and ε themselves.
            point = self.vae.mean_latent(self._to_vae(x)).to(x.dtype)
            # One decode serves G(x) and the first gradient.
            with torch.set_grad_enabled(graph):
                zero = torch.zeros_like(point, requires_grad=graph)
                decoded = self._from_vae(self.vae.decode(point + zero).to(x.dtype))
                G = decoded.detach()
                return Anchor(x, point, G, (zero, (x - G) + decoded) if graph else None)

    def render(self, anchor: Anchor, delta: Tensor) -> Tensor:
        assert anchor.reconstruction is not None
        with evaluating(self.vae):
            decoded = self.vae.decode(anchor.point + delta).to(anchor.images.dtype)
        return (anchor.images - anchor.reconstruction) + self._from_vae(decoded)

    def _to_vae(self, x: Tensor) -> Tensor:
        if self.units is None:
            return x
        data, own = self.units
        return normalise(denormalise(x, *data), *own)

    def _from_vae(self, x: Tensor) -> Tensor:
        if self.units is None:
            return x
        data, own = self.units
        return normalise(denormalise(x, *own), *data)


class CLAE(_Adversary):
    """Attack on the pixels: x′ = x + δ, ‖δ‖ ≤ ε in the units of x (normalised)."""

    def anchor(self, x: Tensor, graph: bool = False) -> Anchor:
        return Anchor(x.detach(), x.detach(), None)

    def render(self, anchor: Anchor, delta: Tensor) -> Tensor:
        return anchor.images + delta


class RandomSign(IDAA):
    """IDAA's control: every coordinate of δ is ±ε (l2: equally large, ‖δ‖ = ε) with random sign.

    One draw whatever `steps` and `random_start` say (several would average out); the loss is not
    looked at.
    """

    recordable = False

    def _perform(self, x: Tensor, attack_loss: AttackLoss, turn: Turn) -> Attack:
        anchor = self.anchor(x)
        unit = self._unit(anchor, anchor.point, attack_loss, True, turn)
        return self._attack(anchor, self.epsilon * unit)

    def _unit(
        self,
        anchor: Anchor,
        delta: Tensor,
        attack_loss: AttackLoss,
        at_start: bool,
        turn: Turn,
    ) -> Tensor:
        signs = turn.draw(torch.rand, anchor.point).sub(0.5).sign()
        return signs if self.norm == "linf" else signs / _length(signs)


def _length(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped to multiply x."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def _waits(device: torch.device) -> bool:
    """Whether reading a value means waiting for all that was launched before."""
    return device.type != "cpu"


def _knows_start(attack_loss: AttackLoss) -> bool:
    return "at_start" in inspect.signature(attack_loss).parameters


def _cause(anchor: Anchor, loss: Tensor, gradient: Tensor) -> str:
    """Where a gradient that is not finite comes from, followed from the input onwards."""
    bad = (~torch.isfinite(gradient)).flatten(1).any(1)
    head = f"The attack's gradient is not finite for {int(bad.sum())} of {len(bad)} images: "
    if not torch.isfinite(anchor.images).all():
        return head + "the images themselves are not finite."
    if not torch.isfinite(anchor.point).all():
        return head + "the VAE's encoder gives latents that are not finite (a broken VAE)."
    if anchor.reconstruction is not None and not torch.isfinite(anchor.reconstruction).all():
        return head + "the VAE's decoder gives images that are not finite (a broken VAE)."
    if not torch.isfinite(loss):
        return head + f"the attack loss is {loss.item()} (the encoder diverged, or τ is too small)."
    return head + f"the loss is {loss.item():.4g}, but its derivative overflows."
