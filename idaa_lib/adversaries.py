"""Adversaries: from (x, a loss of x) to x′. They know no method (contract: docs/architecture.md).

IDAA (Yang et al., ICML 2022): x′ = R(x) + D(E(x) + δ), R(x) = x − G(x): only what the VAE's
bottleneck holds is attacked, the residual with the sample's identity stays (docs/spec/idaa.md §2).
CLAE (Ho & Vasconcelos, NeurIPS 2020): x′ = x + δ on the pixels (spec §3).
RandomSign: IDAA's perturbation with random signs, the control that no gradient guides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from idaa_lib import configs
from idaa_lib.configs.base import NonNegative, Positive, Rate, UserError
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import VAE, folded
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
    """An attacked batch, detached.

    images: x′ (B, 3, H, W); delta: δ (B, m), or (B, 3, H, W) for CLAE;
    z: E(x) + δ (B, m) and reconstruction: G(x), both None for CLAE.
    """

    images: Tensor
    delta: Tensor
    z: Tensor | None = None
    reconstruction: Tensor | None = None


@dataclass(frozen=True)
class Anchor:
    """What an attack starts from: images x, the point that is perturbed, and G(x) if there is.

    start: δ = 0 and x′ there with a graph back to it, good for one gradient.
    """

    images: Tensor
    point: Tensor
    reconstruction: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Direction:
    """The unit step (‖·‖ = 1 in the attack's norm) from x: one direction serves every ε."""

    anchor: Anchor
    unit: Tensor


def register_adversary(name: str) -> Callable[[Any], Any]:
    """A decorator that makes an adversary available as `adversary=name`.

    The class is an `Adversary`, the names of its `Options` are its knobs; see `register_method`.
    """
    return register("adversary", name, Adversary, configs.Options)


class Adversary:
    """Base of all adversaries: x and an attack loss in, an `Attack` out. A subclass has `__call__`.

    needs_vae: whether it is given a frozen VAE, whose knobs are `VAEOptions`: it then has `encode`
    and `decode`. recordable: whether a call does nothing but launch work on the device, always the
    same, so that a CUDA graph can stand for it; a subclass says so itself.

    Args:
        vae: run in eval mode whatever its mode, its buffers, mode and gradients left alone.
        mean, std: normalisation of the images that will come, which it keeps as attributes: pixels
            in [0, 1] are x · std + mean. None: that of the VAE.
        knobs: see `Options`.
    """

    class Options(configs.Options):
        """alpha: weight of the adversarial loss."""

        alpha: NonNegative = 1.0

    needs_vae = False
    recordable = False

    def __init__(
        self,
        vae: VAE | None = None,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **knobs: Any,
    ) -> None:
        self.options: Any = self.Options(**knobs)
        self.vae: Any = vae
        self.mean, self.std = (mean, std) if vae is None or mean else (vae.mean, vae.std)
        # (mean, std) of the images and of the VAE, where they differ.
        self.units: tuple[Any, Any] | None = None
        if vae is not None and mean is not None and std is not None:
            if vae.mean is None or vae.std is None:
                raise ValueError("mean and std were given, but the VAE does not know its own.")
            own = (vae.mean, vae.std)
            self.units = None if (mean, std) == own else ((mean, std), own)

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
        """The random numbers of an attack on images (n, 3, H, W), by name, n rows each, on the CPU.

        The loop draws them for the global batch and keeps the rows of its process.
        """
        return {}

    def __call__(
        self,
        x: Tensor,
        attack_loss: AttackLoss,
        generator: torch.Generator | None = None,
        numbers: Numbers | None = None,
    ) -> Attack:
        """Attack images x (B, 3, H, W).

        Args:
            attack_loss: ascended; differentiated with respect to δ alone, no `.grad` is written.
            numbers: as `numbers` draws them; None: drawn here, by `generator`.
        Raises:
            AttackError: the gradient is not finite.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__, which makes the attack.")

    def prepare(self, device: torch.device, compile: bool) -> None:
        """Move what it holds to the device; with `compile` also what gains by it, which changes
        rounding and nothing else."""
        if self.vae is not None:
            self.vae = folded(self.vae) if compile else self.vae
            self.vae.to(device, memory_format=torch.channels_last)

    def check(self) -> None:
        """Raise AttackError if a gradient since the last check was not finite (waits for a GPU)."""


class Radius(Adversary.Options):
    """epsilon: radius, in units of the point that is perturbed. norm: of δ, for each sample."""

    epsilon: NonNegative = 0.1
    norm: Literal["linf", "l2"] = "linf"


class VAEOptions(Adversary.Options):
    """vae: id or path of a VAE run (None: one that fits). dim: its bottleneck dimension
    (None: any)."""

    vae: str | None = None
    dim: Positive | None = None


@register_adversary("none")
class NoAdversary(Adversary):
    """The baseline without an adversarial term."""

    class Options(configs.Options):
        pass

    recordable = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None


class GradientAscent(Adversary):
    """Projected gradient ascent within ‖δ‖ ≤ ε, on pixels: x′ = x + δ.

    A subclass that perturbs something else has its own `anchor`, `render` and `point_shape`.
    """

    class Options(Radius):
        """steps: of the gradient. step_size: None for ε at one step, as published, and 2.5·ε/steps
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
        anchor = self.anchor(x, graph="start" not in numbers)
        delta = self._start(anchor.point, numbers)
        steps = self.options.steps
        default = self.epsilon if steps == 1 else 2.5 * self.epsilon / steps
        for step in range(steps):
            at_start = step == 0 and "start" not in numbers
            unit = self._unit(anchor, delta, attack_loss, at_start)
            delta = self._project(delta + (self.options.step_size or default) * unit)
        return self._attack(anchor, delta)

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

    def _unit(
        self, anchor: Anchor, delta: Tensor, attack_loss: AttackLoss, at_start: bool
    ) -> Tensor:
        with torch.enable_grad():
            if at_start and anchor.start is not None:
                delta, images = anchor.start
            else:
                delta = delta.detach().requires_grad_()
                images = self.render(anchor, delta)
            start = {}
            if "at_start" in inspect.signature(attack_loss).parameters:
                start = {"at_start": at_start and self.options.reuse_anchor}
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
        if self._finite is None:
            return
        finite = bool(self._finite)
        self._finite.fill_(True)
        if not finite:
            raise AttackError(
                "An attack's gradient was not finite since the last line of the log: the encoder "
                "diverged, τ is too small, or the VAE is broken."
            )

    def _project(self, delta: Tensor) -> Tensor:
        if self.norm == "linf":
            return delta.clamp(-self.epsilon, self.epsilon)
        # In two divisions' rounding the factor can exceed 1 by nothing: clamped.
        factor = self.epsilon / _length(delta).clamp_min(torch.finfo(delta.dtype).tiny)
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

    def __call__(
        self,
        x: Tensor,
        attack_loss: AttackLoss,
        generator: torch.Generator | None = None,
        numbers: Numbers | None = None,
    ) -> Attack:
        direction = self.direction(x, attack_loss, generator=generator, numbers=numbers)
        return self.apply(direction, self.epsilon)

    def direction(self, x: Tensor, attack_loss: AttackLoss, **random: Any) -> Direction:
        anchor = self.anchor(x)
        numbers = random.get("numbers") or self.numbers(x.shape, random.get("generator"))
        signs = numbers["signs"].to(anchor.point).sub(0.5).sign()
        return Direction(anchor, signs if self.norm == "linf" else signs / _length(signs))


def build_adversary(config: Any, vae: VAE | None = None, **units: Any) -> Adversary:
    """The adversary that a configuration names, with its knobs.

    units: `mean`, `std` of the images.
    """
    kind = config.chosen("adversary")
    knobs = {k: v for k, v in config.options("adversary") if k not in ("vae", "dim")}
    return kind(vae, **units, **knobs) if kind.needs_vae else kind(**units, **knobs)


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
