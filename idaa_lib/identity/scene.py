"""Images with the VAE that splits them, attacks on them at any ε, and a witness of their identity.

Explored in notebook 02 and measured in notebook 08.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib import runs
from idaa_lib.adversaries.ascent import CLAE, IDAA, Anchor, Direction, RandomSign
from idaa_lib.configs import ConfigError, DecomposeConfig, SSLConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.data.decoding import decode
from idaa_lib.evaluate.encoders import load_encoder, load_vae
from idaa_lib.identity.networks import UNTRAINED, name_images, name_runs
from idaa_lib.identity.theory import Retention, hardness, retention
from idaa_lib.methods import About, build_method
from idaa_lib.methods.simclr import nt_xent
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run
from idaa_lib.runs.choice import reading_of
from idaa_lib.runs.machine import open_images
from idaa_lib.views import denormalise, keyed_generator, normalise, recipe

Embed = Callable[[Tensor], Tensor]  # normalised images (N, 3, size, size) → features (N, D)

KINDS: dict[str, Any] = {"idaa": IDAA, "clae": CLAE, "random_sign": RandomSign}
ADVERSARIES = tuple(KINDS)
BATCH = 256  # images that are attacked together: as in training they are each other's negatives
POOL = 1000  # further images at most
# What an attack ascends: SimCLR's loss, at its τ, between embeddings of x and of x′ (B, D).
loss = partial(nt_xent, temperature=0.5)


@dataclass(frozen=True, eq=False)
class Scene:
    """Images under attack: x (N, 3, size, size), normalised as the VAE expects them.

    config has the norm, steps and seed of the attack; run is the VAE's, attacked names the attacked
    encoder's, or is `untrained`. data is the split that they are of, and pool (M, 3, size, size)
    holds other images of it; labels (N,) int64 are the classes of x, -1 where there is none.
    """

    config: DecomposeConfig
    run: Run
    attacked: str
    vae: VAE
    data: ImageSet
    x: Tensor
    pool: Tensor
    labels: Tensor
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _directions: dict[str, list[Direction]] = field(default_factory=dict, init=False)

    def pixels(self, x: Tensor) -> Tensor:
        """Normalised images as pixels in [0, 1] (not clipped)."""
        return denormalise(x, self.mean, self.std)

    def contrast(self, part: Tensor, gain: float | None = None) -> tuple[Tensor, float]:
        """A part around 0 (R, x′ − x) as pixels around mid-gray, and its gain: by default the one
        that takes all but 1 % of the values, in [0, 1] units, within full contrast."""
        shift = part * torch.tensor(self.std).view(3, 1, 1)
        gain = gain or 0.5 / max(shift.abs().flatten().quantile(0.99).item(), 1e-6)
        return 0.5 + gain * shift, gain

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """x, G(x) and R(x) of normalised images (N, 3, size, size)."""
        G = torch.cat([self.vae.decompose(part).G for part in x.split(BATCH)])
        return {"x": x, "G": G, "R": x - G}

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        return self.split(self.x)

    @cached_property
    def embed(self) -> Embed:
        """The attacked encoder with its projector."""
        return self.encoder(self.attacked, "projector")

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The images that are attacked together, at most `BATCH`, and their embeddings."""
        with torch.no_grad():
            return [(x, self.embed(x)) for x in self.x.chunk(-(-len(self.x) // BATCH))]

    def loss(self, images: Tensor) -> Tensor:
        """The attack's loss with these images (N, 3, size, size) in the place of x: a scalar."""
        parts = zip(self.batches, images.chunk(len(self.batches)), strict=True)
        losses = [len(x) / len(self.x) * self._loss(z, part) for (x, z), part in parts]
        return torch.stack(losses).sum()

    @cached_property
    def loss_before(self) -> float:
        with torch.no_grad():
            return self.loss(self.x).item()

    @torch.no_grad()
    def hardness(self, images: Tensor) -> dict[str, float]:
        """How far these images (N, 3, size, size) are from x: `theory.hardness` of all batches."""
        total: dict[str, float] = {}
        for (x, z), part in zip(self.batches, images.chunk(len(self.batches)), strict=True):
            for name, value in hardness(x, part, z, self.embed(part), loss).items():
                total[name] = total.get(name, 0) + len(x) / len(self.x) * value
        return total

    def live(self, adversary: str) -> bool:
        """Whether another ε costs one decode alone: one step, or signs that no gradient guides."""
        return self.config.steps == 1 or adversary == "random_sign"

    def directions(self, adversary: str) -> list[Direction]:
        """The one-step directions at x, batch by batch, computed once."""
        if adversary not in self._directions:
            attack, generator = self._adversary(adversary, 1.0), keyed_generator(self.config.seed)
            self._directions[adversary] = [
                attack.direction(x, partial(self._loss, z), generator=generator)
                for x, z in self.batches
            ]
        return self._directions[adversary]

    @torch.no_grad()
    def attack(self, adversary: str, epsilon: float, first: int | None = None) -> Tensor:
        """x′ of all images, or of the first so many of a batch, attacked among all the same."""
        attack = self._adversary(adversary, epsilon)
        if not self.live(adversary):
            parts = [attack(x, partial(self._loss, z)) for x, z in self.batches]
            return torch.cat([part.images for part in parts])[:first]
        directions = self.directions(adversary)
        if first:  # no more is decoded than is shown
            anchor, unit = directions[0].anchor, directions[0].unit[:first]
            G = None if anchor.reconstruction is None else anchor.reconstruction[:first]
            directions = [Direction(Anchor(anchor.images[:first], anchor.point[:first], G), unit)]
        return torch.cat([attack.apply(direction, epsilon).images for direction in directions])

    def _loss(self, z: Tensor, images: Tensor) -> Tensor:
        return loss(z, self.embed(images))

    def _adversary(self, name: str, epsilon: float) -> Any:
        steps = None if name == "random_sign" else self.config.steps
        return KINDS[name](vae=self.vae, epsilon=epsilon, norm=self.config.norm, steps=steps)

    def encoder(self, name: str, layer: str, seed: int = 0) -> Embed:
        """A run's frozen encoder, or with `UNTRAINED` a narrow ResNet-18 as it is before training.

        Raises:
            RunError: there is no such run. ConfigError: the encoder is for another size.
        """
        size, device = self.run.config.size, self.x.device
        if name == UNTRAINED:
            transform = recipe("none", size, self.mean, self.std)
            method = build_method(SSLConfig(size=size, width=16, seed=seed), About(transform))
            return method.encoder(layer).eval().requires_grad_(False).to(device)
        module, expected, mean, std = load_encoder(name, layer)
        if expected != size:
            raise ConfigError(f"run={name!r} is for {expected} px, its images {size} px.")
        module.to(device)
        if (mean, std) == (self.mean, self.std):
            return module
        return lambda x: module(normalise(self.pixels(x), mean, std))


class Witness:
    """A frozen encoder, a run's or `untrained`, that looks for each image of a scene among
    candidates (M, 3, size, size), the i-th of which is of the i-th image: that image itself in
    notebook 02, another view of it in notebook 08, which is harder to find."""

    def __init__(self, scene: Scene, name: str, candidates: Tensor) -> None:
        self.name, self.embed = name, scene.encoder(name, "backbone", seed=1)
        self.candidates = self.features(candidates)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, D) on the CPU, of normalised images."""
        return torch.cat([self.embed(part).float().cpu() for part in x.split(BATCH)])

    def retention(self, x: Tensor) -> Retention:
        """How well it finds the scene's images from x (N, 3, size, size), made from them."""
        return retention(self.features(x), self.candidates)

    def cosines(self, x: Tensor, features: Tensor) -> Tensor:
        """Cosines (N, M) between images x (N, 3, size, size) and features (M, D)."""
        return F.normalize(self.features(x), dim=1) @ F.normalize(features, dim=1).T


class Reading(NamedTuple):
    """An attack at one ε. row: epsilon, loss_before and loss_after (nats), and what
    `Scene.hardness` and `Retention.row` say of the x′, whose features (N, D) are the witness's."""

    row: dict[str, float]
    identity: Retention
    features: Tensor


def read(scene: Scene, witness: Witness, adversary: str, epsilon: float) -> Reading:
    """The reading of an attack on all images."""
    images = scene.attack(adversary, epsilon)
    change, features = scene.hardness(images), witness.features(images)
    identity, before = retention(features, witness.candidates), scene.loss_before
    losses = {"loss_before": before, "loss_after": before + change["rise"]}
    return Reading({"epsilon": epsilon, **losses, **change, **identity.row()}, identity, features)


def open_scene(
    config: DecomposeConfig, images: int | None = None, device: torch.device | str = "cpu"
) -> Scene:
    """The images that `config` chooses (so many, if `images` is given), the VAE, the encoder.

    Raises:
        RunError: there is no finished VAE run. ConfigError: the images are not there.
    """
    config, n = name_runs(config), images or config.images
    run, attacked = runs.get("vae", config.vae), str(config.run)
    vae = load_vae(run).to(device)
    assert vae.mean is not None and vae.std is not None
    data = open_split(config, run, config.split)
    order = _order(config, data, n)
    pixels, labels = data.images[order], data.labels[order[:n]]
    names = [
        f"{data.classes[label]} {index}" if label >= 0 else str(index)
        for index, label in zip(order[:n].tolist(), labels.tolist(), strict=True)
    ]
    if config.own is not None:
        try:
            own = decode(config.own, data.size)
        except (OSError, ValueError) as error:
            raise ConfigError(f"own={config.own!r} cannot be read as an image: {error}.") from error
        pixels, names = torch.cat([own[None], pixels]), ["your own", *names]
        labels = torch.cat([torch.tensor([-1]), labels])
    x = normalise(pixels, vae.mean, vae.std).to(device)
    about = labels[:n], tuple(names[:n]), vae.mean, vae.std
    return Scene(config, run, attacked, vae, data, x[:n], x[n:], *about)


def open_split(config: Any, vae: Run, split: str, limit: int | None = None) -> ImageSet:
    """The images that `name_images` names, at the VAE's size.

    Raises:
        ConfigError: they are not there.
    """
    dataset = name_images(config, vae)
    return open_images(dataset, split, vae.config.size, limit, **reading_of(config, vae, dataset))


def _order(config: DecomposeConfig, data: ImageSet, n: int) -> Tensor:
    """Indices of the n chosen images first, then of further ones as they come by chance."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed)).tolist()
    if config.only is not None:
        if config.only not in data.classes:
            names = ", ".join(data.classes) or "none"
            raise ConfigError(f"only must be a class of {data.name} ({names}): {config.only!r}.")
        other = (data.labels != data.classes.index(config.only)).tolist()
        order.sort(key=other.__getitem__)
        if (count := len(data) - sum(other)) < n:
            raise ConfigError(
                f"images={n} is more than the {count} of only={config.only!r} in "
                f"split={config.split!r} of {data.name}: take fewer."
            )
    for index in config.indices:
        if index >= len(data):
            raise ConfigError(f"indices: {index} is beyond the {len(data)} {config.split} images.")
    if len(order) < n:
        raise ConfigError(
            f"images={n} is more than the {len(order)} of split={config.split!r} of {data.name}: "
            f"take fewer, or name another dataset."
        )
    return torch.tensor([*dict.fromkeys([*config.indices, *order])][: n + POOL])
