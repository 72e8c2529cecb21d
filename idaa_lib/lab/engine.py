"""What the ε explorer shows: pictures of x′ at any ε, and what is left of the identity of x.

A one-step attack without random start has one direction for every ε, computed once per set of
images, so each picture costs one decode and one small PNG.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.configs import DecomposeConfig
from idaa_lib.identity.scene import ADVERSARIES, Scene, open_scene, witness
from idaa_lib.lab import pictures
from idaa_lib.lab.style import NAMES, save
from idaa_lib.train.samples import GAIN

COLUMNS = 16  # images that a picture shows at most
# Where the curves over ε are read: four a decade, which is what an eye needs.
EPSILONS = tuple(float(e) for e in np.logspace(-3, 1, 17))
STRIP = EPSILONS[4:]  # from 0.01 on: below, an eye sees nothing


class Reading(Protocol):
    """A point of a curve over ε: the radius, and the loss that is reached there."""

    @property
    def epsilon(self) -> float: ...

    @property
    def loss_after(self) -> float: ...


def radius(curve: Sequence[Reading], loss: float, start: float) -> float | None:
    """The smallest ε at which a curve, by ascending ε, reaches `loss`; at ε = 0 it is `start`.

    Between two points the loss is taken as linear in log ε, below the first as linear in ε. None
    where it is never reached; 0 where `start` reaches it.
    """
    if loss <= start:
        return 0.0
    past, before = 0.0, start
    for point in curve:
        if point.loss_after >= loss:
            share = (loss - before) / (point.loss_after - before)
            return past * (point.epsilon / past) ** share if past else share * point.epsilon
        past, before = point.epsilon, point.loss_after
    return None


@dataclass(frozen=True, order=True)
class Meters:
    """What is left of the identity of x in x′, by an encoder that was not attacked.

    retrieved: percent of the images whose x′ has its own x as the nearest of `n` candidates by
    cosine; rank: mean rank of its x (1 is first); cos_self, cos_other: mean cosine of x′ to its x
    and to its nearest other candidate; l2, linf: mean ‖x′ − x‖₂ and the largest ‖x′ − x‖∞, in
    normalised units; loss_before, loss_after: what the attack ascends, at x and at x′ (hardness).
    """

    epsilon: float
    retrieved: float
    rank: float
    cos_self: float
    cos_other: float
    l2: float
    linf: float
    loss_before: float
    loss_after: float
    n: int


class Engine:
    """Pictures and meters of one set of images at any ε. It knows no widget.

    Args:
        config: the VAE, the encoder attacked, the images, and the attack.
        candidates: how many images x is sought among, the attacked ones included.
    Raises:
        RunError: there is no finished VAE run. ConfigError: the images are not there.
    """

    STILL = ("x", "G(x)", f"R(x), × {GAIN:g}")
    MOVING = ("G(z + δ)", "x′", f"x′ − x, × {GAIN:g}")

    def __init__(self, config: DecomposeConfig, candidates: int = 500) -> None:
        self.scene: Scene = open_scene(config)
        self.columns = min(COLUMNS, len(self.scene.x))
        pool = self.scene.pool[: max(0, candidates - len(self.scene.x))]
        self.candidates = torch.cat([self.scene.x, pool])  # x_i is candidate i
        # adversary → its meters by ascending ε, filled by `advance`
        self.curves: dict[str, list[Meters]] = {name: [] for name in ADVERSARIES}

    # --- pictures -----------------------------------------------------------------------------

    def still(self) -> tuple[Tensor, ...]:
        """The rows `STILL`, which no ε moves: pixels (columns, 3, size, size)."""
        shown, n = self.scene, self.columns
        G, R = self._parts
        return shown.pixels(shown.x[:n]), shown.pixels(G[:n]), self._around_gray(R[:n])

    def moving(self, adversary: str, epsilon: float) -> tuple[Tensor, ...]:
        """The rows `MOVING`, which follow ε."""
        shown, n = self.scene, self.columns
        attack = shown.attack(adversary, epsilon, n)
        # CLAE leaves the latent alone: what is decoded is G(x) itself.
        decoded = self._parts[0][:n] if attack.z is None else attack.images - self._parts[1][:n]
        change = self._around_gray(attack.images - shown.x[:n])
        return shown.pixels(decoded), shown.pixels(attack.images), change

    def strip(self, index: int) -> dict[str, Tensor]:
        """x′ of one image over `STRIP`: a row an adversary."""
        shown, rows = self.scene, {}
        for name in ADVERSARIES:
            images = [shown.attack(name, e, index + 1).images[index] for e in STRIP]
            rows[f"{NAMES[name]} x′"] = shown.pixels(torch.stack(images))
        return rows

    def parts(self, adversary: str, epsilon: float) -> dict[str, Tensor]:
        """What spectra are taken of, all images (N, 3, size, size)."""
        G, R = self._parts
        x_adv = self.scene.attack(adversary, epsilon).images
        change = x_adv - self.scene.x
        return {"x": self.scene.x, "G(x)": G, "R(x)": R, "x′": x_adv, "x′ − x": change}

    def save(self, folder: Path, adversary: str, epsilon: float, index: int = 0) -> list[Path]:
        """Write what the explorer shows as labelled figures; the strip is of image `index`."""
        rows = dict(zip(self.STILL, self.still(), strict=True))
        rows |= dict(zip(self.MOVING, self.moving(adversary, epsilon), strict=True))
        while self.advance():
            pass
        names = [f"ε = {e:.2g}" for e in STRIP]
        figures = {
            "picture": pictures.image_rows(
                rows, f"{NAMES[adversary]}, ε = {epsilon:.3g}", columns=self.columns
            ),
            "strip": pictures.image_rows(self.strip(index), columns=len(names), names=names),
            "spectra": pictures.spectra(self.parts(adversary, epsilon)),
            "curves": pictures.identity_curves(self.curves),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
        return [folder / f"{name}.png" for name in figures]

    def code(self, adversary: str, epsilon: float, index: int = 0) -> str:
        """A script that makes the figures of `save` again, beside itself."""
        fields = ", ".join(f"{k}={v!r}" for k, v in self.scene.config.changed().items())
        return (
            "from pathlib import Path\n\n"
            "from idaa_lib.configs import DecomposeConfig\n"
            "from idaa_lib.lab.engine import Engine\n\n"
            f"config = DecomposeConfig({fields})\n"
            f'folder = Path(__file__).parent / "again"\n'
            "engine = Engine(config)\n"
            f"engine.save(folder, {adversary!r}, epsilon={epsilon!r}, index={index})\n"
        )

    # --- identity -----------------------------------------------------------------------------

    @torch.no_grad()
    def meters(self, adversary: str, epsilon: float) -> Meters:
        shown, attack = self.scene, self.scene.attack(adversary, epsilon)
        cosine = self.recognise(attack.images)  # (N, n)
        own = torch.arange(len(cosine))
        self_cos = cosine[own, own].clone()
        rank = 1 + (cosine > self_cos[:, None]).sum(1)
        cosine[own, own] = -torch.inf
        change = (attack.images - shown.x).flatten(1)
        return Meters(
            epsilon=epsilon,
            retrieved=100 * (rank == 1).double().mean().item(),
            rank=rank.double().mean().item(),
            cos_self=self_cos.mean().item(),
            cos_other=cosine.amax(1).mean().item(),
            l2=change.norm(dim=1).mean().item(),
            linf=change.abs().max().item(),
            loss_before=self._loss_before,
            loss_after=shown.loss(attack.images).item(),
            n=len(self.candidates),
        )

    def recognise(self, images: Tensor) -> Tensor:
        """Cosines (B, n) by the witness between images and the candidates, x_i being the i-th."""
        with torch.no_grad():
            return F.normalize(self.witness[1](images), dim=1) @ self._candidate_features.T

    def advance(self) -> bool:
        """Read one further point of the curves over ε, coarse before fine; False: all are read."""
        order = (*EPSILONS[::4], *EPSILONS[2::4], *EPSILONS[1::2])
        for epsilon in order:
            for adversary, curve in self.curves.items():
                if all(point.epsilon != epsilon for point in curve):
                    insort(curve, self.meters(adversary, epsilon))
                    return True
        return False

    @property
    def complete(self) -> bool:
        return all(len(curve) == len(EPSILONS) for curve in self.curves.values())

    def as_hard(self, adversary: str, epsilon: float) -> float | None:
        """The smallest ε at which `adversary` reaches the loss that IDAA has at `epsilon`.

        Read off the curves (see `radius`). None where it never gets so hard; 0 where IDAA is no
        harder than x.
        """
        return radius(self.curves[adversary], self._hardness("idaa", epsilon), self._loss_before)

    def _hardness(self, adversary: str, epsilon: float) -> float:
        curve = self.curves[adversary]
        first = curve[0]
        if epsilon < first.epsilon:
            rise = first.loss_after - self._loss_before
            return self._loss_before + rise * epsilon / first.epsilon
        losses = [point.loss_after for point in curve]
        return float(np.interp(np.log(epsilon), np.log([p.epsilon for p in curve]), losses))

    @cached_property
    def witness(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The encoder that judges identity: another run than the attacked one, else untrained."""
        return witness(self.scene, self.scene.attacked)

    @cached_property
    def _candidate_features(self) -> Tensor:
        parts = [self.witness[1](part) for part in self.candidates.split(250)]
        return F.normalize(torch.cat(parts), dim=1)

    @cached_property
    def _loss_before(self) -> float:
        with torch.no_grad():
            return self.scene.loss(self.scene.x).item()

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.scene.vae.decompose(self.scene.x)

    def _around_gray(self, part: Tensor) -> Tensor:
        return self.scene.contrast(part, GAIN)[0]
