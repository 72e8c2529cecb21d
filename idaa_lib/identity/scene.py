"""What notebook 02 looks at: a VAE's split of some images, and attacks on them at any ε."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib import runs
from idaa_lib.adversaries import CLAE, IDAA, Anchor, Attack, Direction, RandomSign
from idaa_lib.configs import ConfigError, DecomposeConfig, SSLConfig
from idaa_lib.data.cached import ImageSet, decode
from idaa_lib.evaluate.encoders import load_encoder, load_vae
from idaa_lib.methods import build_method
from idaa_lib.methods.simclr import against
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run
from idaa_lib.runs.machine import open_images
from idaa_lib.views import denormalise, keyed_generator, normalise, recipe

ADVERSARIES = ("idaa", "clae", "random_sign")
UNTRAINED = "untrained"  # in place of a run


@dataclass(frozen=True)
class Pictures:
    """Images x (N, 3, size, size), normalised as the VAE expects them, the VAE, and its run.

    `names` says which image each is, `classes` what there is; `pool` (M, 3, size, size) holds
    other images of the same split. `labels` (N + M,) int64 are the classes of x and then of the
    pool, -1 where there is none.
    """

    x: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    pool: Tensor
    labels: Tensor
    vae: VAE
    run: Run
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, x: Tensor) -> Tensor:
        """Normalised images as pixels in [0, 1] (not clipped)."""
        return denormalise(x, self.mean, self.std)

    def contrast(self, part: Tensor, gain: float | None = None) -> tuple[Tensor, float]:
        """A part around 0 (R, x′ − x) as pixels around mid-gray, and the gain that was used: by
        default what takes all but 1 % of its values, in [0, 1] units, within full contrast."""
        shift = part * torch.tensor(self.std).view(3, 1, 1)
        gain = gain or 0.5 / max(shift.abs().flatten().quantile(0.99).item(), 1e-6)
        return 0.5 + gain * shift, gain


@dataclass(frozen=True)
class Scene(Pictures):
    """Pictures under attack.

    `config` has the norm, steps and seed of the attack, and names the VAE and the encoder that
    were chosen; `loss`, images (N, 3, size, size) → scalar, is what the attack ascends.
    """

    config: DecomposeConfig
    loss: Callable[[Tensor], Tensor]
    _directions: dict[str, Direction] = field(default_factory=dict)
    _lines: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def attacked(self) -> str:
        """The attacked encoder's run, or `untrained`."""
        assert self.config.run is not None
        return self.config.run

    def direction(self, adversary: str) -> Direction:
        """The one-step direction at x, computed once."""
        if adversary not in self._directions:
            made = self._adversary(adversary, 1.0)
            generator = keyed_generator(self.config.seed)
            self._directions[adversary] = made.direction(self.x, self.loss, generator)
        return self._directions[adversary]

    def live(self, adversary: str) -> bool:
        """Whether another ε costs one decode alone: one step, or signs that no gradient guides."""
        return self.config.steps == 1 or adversary == "random_sign"

    @torch.no_grad()
    def attack(self, adversary: str, epsilon: float, first: int | None = None) -> Attack:
        """x′ of all images, or of the first so many (which are attacked among all the same)."""
        made = self._adversary(adversary, epsilon)
        if self.live(adversary):
            direction = _head(self.direction(adversary), first)
            if adversary == "clae":
                return made.apply(direction, epsilon)
            return self._along(direction, (adversary, first), epsilon)
        whole = made(self.x, self.loss, keyed_generator(self.config.seed))
        parts = (whole.images, whole.delta, whole.z, whole.reconstruction)
        return Attack(*(None if part is None else part[:first] for part in parts))  # type: ignore[arg-type]

    def _along(self, direction: Direction, key: tuple[str, int | None], epsilon: float) -> Attack:
        """`IDAA.apply` without the decoder's first layer, whose output is linear in ε and known:
        its weights, most of the VAE's, are what a decode of few images waits for."""
        anchor, vae = direction.anchor, self.vae
        assert anchor.reconstruction is not None
        if key not in self._lines:
            self._lines[key] = vae.fc21(anchor.point), F.linear(direction.unit, vae.fc21.weight)
        start, step = self._lines[key]
        with evaluating(vae):
            decoded = vae.expand(start + epsilon * step)
        delta = epsilon * direction.unit
        images = anchor.images - anchor.reconstruction + decoded
        return Attack(images, delta, anchor.point + delta, anchor.reconstruction)

    def _adversary(self, name: str, epsilon: float) -> Any:
        if name == "clae":
            return CLAE(epsilon, self.config.steps, norm=self.config.norm)
        if name not in ADVERSARIES:
            raise ValueError(f"adversary must be one of {', '.join(ADVERSARIES)}, and is {name!r}.")
        kind = IDAA if name == "idaa" else RandomSign
        return kind(self.vae, epsilon, self.config.steps, norm=self.config.norm)


def _head(direction: Direction, n: int | None) -> Direction:
    """The direction of the first n images."""
    anchor = direction.anchor
    G = None if anchor.reconstruction is None else anchor.reconstruction[:n]
    return Direction(Anchor(anchor.images[:n], anchor.point[:n], G), direction.unit[:n])


def open_pictures(config: DecomposeConfig) -> Pictures:
    """The images that `config` chooses, and the VAE that splits them.

    Raises:
        RunError: there is no finished VAE run. ConfigError: the images are not there.
    """
    run = runs.get("vae", config.vae)
    trained, vae = run.config, load_vae(run)
    assert vae.mean is not None
    assert vae.std is not None
    source = config.dataset or trained.dataset
    data = open_images(source, config.split, trained.size, None)
    order = _order(config, data)
    chosen, names = data.images[order], [_name(data, i) for i in order.tolist()]
    labels = data.labels[order]
    if config.own is not None:
        try:
            first = decode(config.own, trained.size)
        except (OSError, ValueError) as error:
            raise ConfigError(f"own={config.own!r} cannot be read as an image: {error}.") from error
        chosen, names = torch.cat([first[None], chosen]), ["your own", *names]
        labels = torch.cat([torch.tensor([-1]), labels])
    x = normalise(chosen, vae.mean, vae.std)
    n, classes = config.images, tuple(data.classes)
    some = x[:n], tuple(names[:n]), classes, x[n:], labels
    return Pictures(*some, vae, run, vae.mean, vae.std)


def _order(config: DecomposeConfig, data: ImageSet) -> Tensor:
    """Indices of the chosen images first, then up to 1,000 others as they come by chance."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    if config.only is not None:
        if config.only not in data.classes:
            known = ", ".join(data.classes) or "none"
            raise ConfigError(f"only must be a class of {data.name} ({known}): {config.only!r}.")
        wanted = data.labels[order] == data.classes.index(config.only)
        order = torch.cat([order[wanted], order[~wanted]])
    for index in reversed(config.indices):
        if index >= len(data):
            raise ConfigError(f"indices: {index} is beyond the {len(data)} {config.split} images.")
        order = torch.cat([torch.tensor([index]), order[order != index]])
    if len(order) < config.images:
        raise ConfigError(f"images={config.images} is more than the {len(order)} of the split.")
    return order[: config.images + 1000]


def _name(data: ImageSet, index: int) -> str:
    label = int(data.labels[index])
    return f"{data.classes[label]} {index}" if label >= 0 else str(index)


def open_scene(config: DecomposeConfig) -> Scene:
    """The pictures, and the loss of the encoder that is attacked.

    Raises:
        RunError: there is no finished VAE run. ConfigError: the encoder is for another size.
    """
    shown = open_pictures(config)
    attacked, embed = attacked_encoder(shown, config.run)
    settled = config.model_copy(update={"vae": shown.run.reference, "run": attacked})
    return Scene(**vars(shown), config=settled, loss=against(embed, shown.x))


def attacked_encoder(shown: Pictures, run: str | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The encoder that is attacked, as `encoder` gives it: `run`, else the newest on the same
    images and size, else an untrained one."""
    found = [] if run else _encoders(shown)
    return encoder(shown, run or (found[0] if found else UNTRAINED), "projector")


def witness(
    shown: Pictures, attacked: str, run: str | None = None
) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The encoder that judges identity, never the attacked one: `run`, else the newest other, those
    first that no adversary taught to see past its changes, then those of another seed (the same
    one begins with the same weights), else an untrained one of another seed.

    Raises:
        ConfigError: `run` is the attacked encoder.
    """
    others = [other for other in _encoders(shown) if other.reference != attacked]
    seed = None if attacked == UNTRAINED else runs.get("ssl", attacked).config.seed
    others.sort(key=lambda other: (other.config.adversary != "none", other.config.seed == seed))
    made = encoder(shown, run or (others[0] if others else UNTRAINED), "backbone", seed=1)
    if made[0] == attacked != UNTRAINED:
        raise ConfigError(f"witness={run!r} is the encoder that is attacked: name another.")
    return made


def _encoders(shown: Pictures) -> list[Run]:
    trained = shown.run.config
    return runs.find("ssl", dataset=trained.dataset, size=trained.size)


def encoder(
    shown: Pictures, run: Run | str, layer: str, seed: int = 0
) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A run's frozen encoder, or with `UNTRAINED` a narrow ResNet-18 as it is before training.

    What a configuration calls it, and a function from images in the units of the pictures, on
    their device, to features (N, D).

    Raises:
        RunError: there is no such run. ConfigError: the encoder is for another size.
    """
    size = shown.run.config.size
    if run == UNTRAINED:
        transform = recipe("none", size, shown.mean, shown.std)
        method = build_method(SSLConfig(size=size, width=16, seed=seed), transform)
        return UNTRAINED, method.encoder(layer).eval().requires_grad_(False).to(shown.x.device)
    source = runs.get("ssl", run)
    module, expected, mean, std = load_encoder(source, layer)
    if expected != size:
        raise ConfigError(f"run={source.id!r} is for {expected} px, its images {size} px.")
    module.to(shown.x.device)
    if (mean, std) == (shown.mean, shown.std):
        return source.reference, module
    return source.reference, lambda x: module(normalise(shown.pixels(x), mean, std))
