"""The VAE's own training (docs/spec/idaa.md §1) as a method, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from idaa_lib.configs import VAEConfig
from idaa_lib.methods.base import About, Batch, Method, Moment, Step
from idaa_lib.nets import evaluating, initial_weights
from idaa_lib.nets.processes import share
from idaa_lib.nets.vae import VAE, rate, vae_loss
from idaa_lib.views import Recipe, View, recipe


class VAETraining(Method):
    """One view, reparametrised with noise that is drawn with the view's numbers."""

    views = 1
    recordable = True

    def __init__(self, config: VAEConfig, about: About) -> None:
        super().__init__(self.Options(), None, about)
        with initial_weights(config.seed):
            units = about.recipe.mean, about.recipe.std
            self.network = VAE(config.dim, config.size, config.width, *units)
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


@torch.no_grad()
def vae_figures(
    vae: Any,
    recipe_: Recipe,
    data: Tensor,
    pulse: Callable[[int], object] = lambda done: None,
) -> dict[str, float]:
    """On un-augmented validation images: reconstruction (MSE), kl (the loss's term), rate in nats,
    and the official acc_gx = 1 − mean ‖x−G‖²/‖x‖², acc_rx = 1 − mean ‖G‖²/‖x‖² (spec §1), of which
    an image of nothing but the mean colour (x = 0) has none. `pulse` as
    `evaluate.encoders.features` calls it."""
    transform = recipe("none", recipe_.size, recipe_.mean, recipe_.std)
    device = next(vae.parameters()).device
    totals, n = torch.zeros(5, dtype=torch.float64, device=device), len(data)

    def judge(rows: Any) -> Tensor:
        """Error, rate, shares of the energy in error and in G, and 1 if there is any (B, 5)."""
        x = transform(data[rows].to(device), None).images
        _, G, mu, logvar = vae.forward(x)  # a compiled one would be compiled anew, for these
        energy = x.square().flatten(1).sum(1)
        error = (x - G).square().flatten(1).sum(1)
        parts = torch.stack([error, G.float().square().flatten(1).sum(1), energy])
        shares = torch.where(energy > 0, parts / energy, 0)  # the last: 1 or 0
        return torch.stack([error, rate(mu.float(), logvar.float()), *shares], 1)

    with evaluating(vae):
        for start in range(0, n, 500):
            pulse(start)
            columns = share(range(start, min(start + 500, n)), judge).T.contiguous()
            totals += torch.stack([column.sum() for column in columns])
    error_sum, nats_sum, gx, rx, seen = totals.tolist()
    figures = {
        "reconstruction_val": error_sum / (n * 3 * recipe_.size**2),
        "kl_val": nats_sum / n / (3 * vae.dim),
        "rate_nats_val": nats_sum / n,
    }
    if seen:
        figures |= {"acc_gx_val": 1 - gx / seen, "acc_rx_val": 1 - rx / seen}
    return figures
