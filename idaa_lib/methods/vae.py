"""The VAE's own training (docs/spec/idaa.md §1) as a method: one loop trains everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from idaa_lib.configs import VAEConfig
from idaa_lib.methods.base import Batch, Method, Step
from idaa_lib.nets import initial_weights
from idaa_lib.nets.vae import VAE, vae_loss
from idaa_lib.views import Recipe, View, send


class VAETraining(Method):
    """One view, reparametrised with noise that is drawn with the view's parameters."""

    views = 1

    def __init__(self, config: VAEConfig, recipe: Recipe) -> None:
        with initial_weights(config.seed):
            vae = VAE(config.dim, config.size, config.width, recipe.mean, recipe.std)
        super().__init__(vae, recipe)
        self.dim, self.kappa = config.dim, config.kappa

    def view(
        self, images: torch.Tensor, generator: torch.Generator, shard: tuple[int, int]
    ) -> View:
        view = super().view(images, generator, shard)
        rank, processes = shard
        b = len(images)
        noise = torch.randn(processes * b, self.dim, generator=generator)
        noise = send(noise[rank * b : (rank + 1) * b], images.device)
        return View(view.images, view.params | {"noise": noise})

    def step(self, views: tuple[View, ...], batch: Batch) -> Step:
        (view,) = views
        output = self.network(view.images, view.params["noise"])
        loss, reconstruction, kl = vae_loss(view.images, output, self.kappa)
        x, G = view.images, output.G.detach()
        return Step(
            loss,
            parts={"reconstruction": reconstruction, "kl": kl},
            shown={"x": x, "G(x)": G, "R(x)": (x, G)},
        )

    def schedule(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        """Epoch e = 1…E at lr·(1 − (e−1)/E)."""
        return lambda step: 1 - (step // steps_per_epoch) / epochs

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        # The release's own Adam adds 1e-8 to √v before the bias correction, torch's after it: a
        # difference below rounding wherever √v is not itself near 1e-8.
        return torch.optim.Adam(groups, lr=lr, betas=(0.0, 0.9), fused=True)
