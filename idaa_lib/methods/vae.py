"""The VAE's own training (docs/spec/idaa.md §1) as a method: one loop trains everything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from idaa_lib.configs import VAEConfig
from idaa_lib.methods.base import About, Batch, Method, Moment, Step
from idaa_lib.nets import initial_weights
from idaa_lib.nets.vae import VAE, vae_loss
from idaa_lib.views import View


class VAETraining(Method):
    """One view, reparametrised with noise that is drawn with the view's numbers."""

    views = 1
    recordable = True

    def __init__(self, config: VAEConfig, about: About) -> None:
        super().__init__(self.Options(), None, about)
        with initial_weights(config.seed):
            recipe = about.recipe
            self.network = VAE(config.dim, config.size, config.width, recipe.mean, recipe.std)
        self.dim, self.kappa = config.dim, config.kappa

    def numbers(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        numbers = super().numbers(sizes, generator)
        return numbers | {"noise": torch.randn(sizes["images"], self.dim, generator=generator)}

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        x = views[0].images
        output = self.network(x, moment.numbers["noise"])
        loss, reconstruction, kl = vae_loss(x, output, self.kappa)
        G = output.G.detach()
        return Step(
            loss,
            parts={"reconstruction": reconstruction, "kl": kl},
            pictures={"x": x, "G(x)": G, "R(x)": (x, G)},
        )
