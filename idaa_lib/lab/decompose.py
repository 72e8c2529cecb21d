"""What notebook 02 shows: a VAE's split of some images, and an attack over ε."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.adversaries import CLAE, IDAA, Attack, Direction
from idaa_lib.configs import ConfigError, DecomposeConfig, SSLConfig
from idaa_lib.environment import open_images
from idaa_lib.evaluate.encoders import load_encoder, load_vae
from idaa_lib.methods import build_method
from idaa_lib.methods.simclr import against
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run
from idaa_lib.views import denormalise, normalise, recipe


@dataclass(frozen=True)
class Pictures:
    """Images x (N, 3, size, size), normalised as the VAE expects them, the VAE, and its run."""

    x: Tensor
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

    `attacked` says which encoder the directions come from; `loss`, images (N, 3, size, size) →
    scalar, is what they ascend.
    """

    attacked: str
    loss: Callable[[Tensor], Tensor]
    adversary: IDAA
    direction: Direction
    pixel_direction: Direction

    def attack(self, epsilon: float) -> Attack:
        """x′ at one ε: one decode."""
        return self.adversary.apply(self.direction, epsilon)


def pictures(config: DecomposeConfig) -> Pictures:
    """The images that `config` names, and their VAE.

    Raises:
        RunError: there is no finished VAE run. ConfigError: its images are gone.
    """
    run = runs.get("vae", config.vae)
    trained, vae = run.config, load_vae(run)
    assert vae.mean is not None
    assert vae.std is not None
    data = open_images(trained.dataset, config.split, trained.size, None)
    pick = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    x = normalise(data.images[pick[: config.images]], vae.mean, vae.std)
    return Pictures(x, vae, run, vae.mean, vae.std)


def scene(config: DecomposeConfig) -> Scene:
    """The pictures, and the directions of IDAA and CLAE against an encoder.

    Raises:
        RunError: there is no finished VAE run. ConfigError: the encoder is for another size.
    """
    shown = pictures(config)
    trained = shown.run.config
    found = runs.find("ssl", dataset=trained.dataset, size=trained.size)
    if config.run or found:
        source = runs.get("ssl", config.run or found[0])
        module, size, mean, std = load_encoder(source, "projector")
        if size != trained.size:
            raise ConfigError(f"run={source.id!r} is for {size} px, its images {trained.size} px.")
        attacked = source.id
    else:
        transform = recipe("none", trained.size, shown.mean, shown.std)
        untrained = build_method(SSLConfig(size=trained.size, width=16), transform)
        module = untrained.encoder("projector").eval().requires_grad_(False)
        attacked, mean, std = "an untrained ResNet-18", shown.mean, shown.std

    def embed(x: Tensor) -> Tensor:
        """In the encoder's own units, where they are not the VAE's."""
        same = (mean, std) == (shown.mean, shown.std)
        return module(x if same else normalise(shown.pixels(x), mean, std))

    loss = against(embed, shown.x)
    idaa = IDAA(shown.vae, config.epsilon, norm=config.norm)
    clae = CLAE(config.epsilon, norm=config.norm)
    return Scene(
        **vars(shown),
        attacked=attacked,
        loss=loss,
        adversary=idaa,
        direction=idaa.direction(shown.x, loss),
        pixel_direction=clae.direction(shown.x, loss),
    )
