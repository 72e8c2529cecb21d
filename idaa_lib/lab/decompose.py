"""What notebook 02 shows: a VAE's split of some images, and an attack over ε."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from idaa_lib import images, runs
from idaa_lib.adversaries import CLAE, IDAA, Attack, Direction
from idaa_lib.configs import DecomposeConfig, SSLConfig
from idaa_lib.evaluate.encoders import load_encoder, load_vae
from idaa_lib.methods import build_method
from idaa_lib.methods.simclr import against
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run
from idaa_lib.views import denormalise, recipe


@dataclass(frozen=True)
class Scene:
    """Images x (N, 3, size, size) normalised, the VAE, its run, and the attack's direction.

    `attacked` says which encoder the direction comes from, `loss` is what it ascends: images
    (N, 3, size, size) → scalar.
    """

    x: Tensor
    vae: VAE
    run: Run
    attacked: str
    adversary: IDAA
    direction: Direction
    pixel_direction: Direction
    loss: Callable[[Tensor], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def attack(self, epsilon: float) -> Attack:
        """x′ at one ε: one decode."""
        return self.adversary.apply(self.direction, epsilon)

    def pixels(self, x: Tensor) -> Tensor:
        """Normalised images as pixels in [0, 1] (not clipped)."""
        return denormalise(x, self.mean, self.std)

    def contrast(self, part: Tensor, quantile: float = 0.99) -> tuple[Tensor, float]:
        """A part around 0 (R, x′ − x) as pixels around mid-gray, and the gain that was used: what
        takes its `quantile` of absolute values, in [0, 1] units, to full contrast."""
        shift = part * torch.tensor(self.std).view(3, 1, 1)
        gain = 0.5 / max(shift.abs().flatten().quantile(quantile).item(), 1e-6)
        return 0.5 + gain * shift, gain


def scene(config: DecomposeConfig) -> Scene:
    """Load what `config` names.

    Raises:
        RunError: there is no finished VAE run.
    """
    run = runs.get("vae", config.vae)
    trained = run.config
    vae = load_vae(run)
    assert vae.mean and vae.std
    data = images.load(trained.dataset, config.split, trained.size)
    pick = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    chosen = data.images[pick[: config.images]]
    x = recipe("none", trained.size, vae.mean, vae.std).apply(chosen, {})

    found = runs.find("ssl", dataset=trained.dataset, size=trained.size)
    if config.run or found:
        source = runs.get("ssl", config.run) if config.run else found[0]
        embed, attacked = load_encoder(source, "projector").module, source.id
    else:
        untrained = SSLConfig(size=trained.size, width=16)
        method = build_method(untrained, recipe("none", trained.size, vae.mean, vae.std))
        embed, attacked = method.network.eval().requires_grad_(False), "an untrained ResNet-18"

    loss = against(embed, x)
    adversary = IDAA(vae, config.epsilon, norm=config.norm)
    pixel = CLAE(config.epsilon, norm=config.norm)
    return Scene(
        x=x,
        vae=vae,
        run=run,
        attacked=attacked,
        adversary=adversary,
        direction=adversary.direction(x, loss),
        pixel_direction=pixel.direction(x, loss),
        loss=loss,
        mean=vae.mean,
        std=vae.std,
    )
