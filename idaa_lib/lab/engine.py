"""What the ε explorer shows: pictures of x′ at any ε, and what is left of the identity of x.

A one-step attack without random start has one direction for every ε, computed once per set of
images, so each picture costs one decode and one small PNG.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from idaa_lib import runs
from idaa_lib.adversaries import CLAE, Attack, Direction, RandomSign
from idaa_lib.configs import DecomposeConfig, SSLConfig
from idaa_lib.environment import open_images
from idaa_lib.evaluate.encoders import load_encoder
from idaa_lib.lab.decompose import Scene, scene
from idaa_lib.methods import build_method
from idaa_lib.views import keyed_generator, normalise, recipe

ADVERSARIES = ("idaa", "clae", "random_sign")
# Of the rows that show a difference: fixed, so that nothing jumps while ε moves.
GAIN = 3.0


@dataclass(frozen=True)
class Meters:
    """What is left of the identity of x in x′, by an encoder that was not attacked.

    retrieved: percent of the images whose x′ has its own x as the nearest of `n` candidates by
    cosine; rank: mean rank of its x (1 is first); cos_self, cos_other: mean cosine of x′ to its x
    and to its nearest other candidate; l2, linf: mean ‖x′ − x‖₂ and the largest ‖x′ − x‖∞, in
    normalised units; loss_before, loss_after: what the attack ascends, at x and at x′.
    """

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
        config: the VAE, the encoder attacked, the images and the norm.
        candidates: how many images x is sought among, the shown ones included.
    Raises:
        RunError: there is no finished VAE run.
    """

    def __init__(self, config: DecomposeConfig, candidates: int = 500) -> None:
        self.scene: Scene = scene(config)
        self._seed = config.seed
        self._random = RandomSign(self.scene.vae, config.epsilon, norm=config.norm)
        self._clae = CLAE(config.epsilon, norm=config.norm)
        trained = self.scene.run.config
        pool = open_images(trained.dataset, "train", trained.size, candidates).images
        fill = normalise(pool[: candidates - len(self.scene.x)], self.scene.mean, self.scene.std)
        self.candidates = torch.cat([self.scene.x, fill])  # x_i is candidate i

    @torch.no_grad()
    def attack(self, adversary: str, epsilon: float) -> Attack:
        """x′ of all images: one decode, or none for CLAE."""
        if adversary == "clae":
            return self._clae.apply(self.scene.pixel_direction, epsilon)
        if adversary == "random_sign":
            return self._random.apply(self._random_direction, epsilon)
        return self.scene.attack(epsilon)

    @torch.no_grad()
    def picture(self, adversary: str, epsilon: float) -> bytes:
        """The grid of `rows()` as a PNG at one screen pixel a pixel."""
        attack, shown = self.attack(adversary, epsilon), self.scene
        G, R = self._parts
        decoded = G if attack.z is None else attack.images - R  # CLAE leaves the latent alone
        live = (
            shown.pixels(decoded),
            shown.pixels(attack.images),
            self._around_gray(attack.images - shown.x),
        )
        grid = np.concatenate([self._still, *map(_strip, live)])
        png = io.BytesIO()
        # Level 1: lossless, and four times as fast to encode as the default.
        Image.fromarray(grid).save(png, "png", compress_level=1)
        return png.getvalue()

    @staticmethod
    def rows() -> tuple[str, ...]:
        return ("x", "G(x)", f"R(x) × {GAIN:g}", "G(z + δ)", "x′", f"x′ − x, × {GAIN:g}")

    @torch.no_grad()
    def meters(self, adversary: str, epsilon: float) -> Meters:
        shown, attack = self.scene, self.attack(adversary, epsilon)
        z = F.normalize(self.witness(attack.images), dim=1)
        cosine = z @ self._candidate_features.T  # (B, n)
        own = torch.arange(len(z))
        self_cos = cosine[own, own].clone()
        rank = 1 + (cosine > self_cos[:, None]).sum(1)
        cosine[own, own] = -torch.inf
        change = (attack.images - shown.x).flatten(1)
        return Meters(
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

    @cached_property
    def witness(self) -> Any:
        """The encoder that judges identity: another run than the attacked one, else untrained."""
        shown = self.scene
        trained = shown.run.config
        others = [
            run
            for run in runs.find("ssl", dataset=trained.dataset, size=trained.size)
            if run.id != shown.attacked
        ]
        self.witness_name = others[0].id if others else "an untrained ResNet-18 of another seed"
        if others:
            return load_encoder(others[0]).module
        transform = recipe("none", trained.size, shown.mean, shown.std)
        untrained = build_method(SSLConfig(size=trained.size, width=16, seed=1), transform)
        return untrained.encoder("backbone").eval().requires_grad_(False)

    @cached_property
    def _random_direction(self) -> Direction:
        generator = keyed_generator(self._seed)
        return self._random.direction(self.scene.x, self.scene.loss, generator)

    @cached_property
    def _candidate_features(self) -> Tensor:
        with torch.no_grad():
            parts = [self.witness(part) for part in self.candidates.split(250)]
        return F.normalize(torch.cat(parts), dim=1)

    @cached_property
    def _loss_before(self) -> float:
        with torch.no_grad():
            return self.scene.loss(self.scene.x).item()

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.scene.vae.decompose(self.scene.x)

    @cached_property
    def _still(self) -> np.ndarray:
        G, R = self._parts
        shown = self.scene
        rows = (shown.pixels(shown.x), shown.pixels(G), self._around_gray(R))
        return np.concatenate([_strip(row) for row in rows])

    def _around_gray(self, part: Tensor) -> Tensor:
        return 0.5 + GAIN * part * torch.tensor(self.scene.std).view(3, 1, 1)


def _strip(pixels: Tensor) -> np.ndarray:
    """Images in [0, 1] (N, 3, H, W) side by side with white gaps: uint8 (H + 1, N·(W + 1), 3)."""
    framed = F.pad(pixels.clamp(0, 1), (0, 1, 0, 1), value=1.0)
    return framed.mul(255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy()
