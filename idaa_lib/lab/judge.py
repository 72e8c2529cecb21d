"""The witness of the study of notebook 08, and how it and linear classifiers are asked.

Identity is judged by the *witness*, a frozen encoder that was not attacked: does it find x among
other views of N images, given x, G(x), R(x) or an x′?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from idaa_lib.configs import TheoryConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.metrics import bootstrap_interval
from idaa_lib.evaluate.probe import CLEAN, linear_probe
from idaa_lib.identity.scene import Pictures
from idaa_lib.identity.theory import Retention, retention
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run
from idaa_lib.views import Recipe, keyed_generator, recipe

BATCH = 256  # images that are attacked together, as in training: they are each other's negatives
# Linear probes on pixels: a coarse grid, which is enough to compare parts.
PROTOCOL = CLEAN._replace(
    penalties=(10.0, 1.0, 1e-1, 1e-2, 1e-3), standardise=False, refit=False, iterations=50
)
# Streams of random numbers beside the images' own order.
CANDIDATES, NOISE, HALVES, INSTANCE_VIEWS = 1, 2, 3, 4


class Plan(NamedTuple):
    """What a study is of: the run that it writes; images with their VAE; the attacked encoder and
    the witness (normalised images → z); images to learn classes from; VAEs to compare."""

    config: TheoryConfig
    run: Run
    shown: Pictures
    embed: Callable[[Tensor], Tensor]
    witness: Callable[[Tensor], Tensor]
    data: ImageSet
    train: ImageSet
    others: dict[str, list[Run]]


class Judge:
    """The witness with its candidates: other views of the images."""

    def __init__(self, plan: Plan) -> None:
        shown, config = plan.shown, plan.config
        # Back to bytes: `normalise` lost nothing.
        self.images = shown.pixels(shown.x).mul(255).round().to(torch.uint8)
        views = views_of(config.augmentation, shown)(
            self.images, keyed_generator(config.seed, CANDIDATES)
        ).images
        self.see = plan.witness
        self.candidates = self.features(views)

    def features(self, x: Tensor) -> Tensor:
        """(N, D) on the CPU, of normalised images."""
        return torch.cat([self.see(part).float().cpu() for part in x.split(BATCH)])

    def retention(self, x: Tensor) -> Retention:
        return retention(self.features(x), self.candidates)


def decomposed(vae: VAE, x: Tensor) -> dict[str, Tensor]:
    """x, G(x) and R(x) of images (N, 3, H, W)."""
    parts = [vae.decompose(part) for part in x.split(BATCH)]
    G, R = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"x": x, "G": G, "R": R}


def row_of(kept: Retention) -> dict[str, float]:
    """A retention's figures, by the names that `Point` has for them."""
    _, low, high = bootstrap_interval(kept.hits)
    _, infonce_low, infonce_high = bootstrap_interval(kept.gains)
    return {
        "retrieved": kept.retrieved, "low": low, "high": high, "mrr": kept.mrr,
        "infonce": kept.infonce, "infonce_low": infonce_low, "infonce_high": infonce_high,
        "fano": kept.fano,
    }  # fmt: skip


def counts(n: int) -> list[int]:
    """Numbers of candidates to be found among, 2 to n."""
    return sorted({round(k) for k in np.geomspace(2, n, 12)})


def views_of(name: str, shown: Pictures) -> Recipe:
    """The recipe `name`; `mild` leaves an image easy to recognise by its pixels."""
    return recipe(name, shown.x.shape[-1], shown.mean, shown.std)


def labels_of(plan: Plan) -> Tensor | None:
    """Classes of the studied images; None where they, or those to learn from, have none."""
    labels = plan.shown.labels[: len(plan.shown.x)]
    known = bool((labels >= 0).all()) and plan.train.labelled
    return labels if known and len(plan.train.classes) > 1 else None


def classify(plan: Plan, features: Tensor, asked: Tensor) -> Tensor:
    """Predicted classes of `asked` (Q, D) by a linear probe on features (N, D) of `plan.train`."""
    order = torch.randperm(len(features), generator=keyed_generator(plan.config.seed, HALVES))
    fifth = max(1, len(order) // 5)
    learn, held = ((features[i], plan.train.labels[i]) for i in (order[fifth:], order[:fifth]))
    return probe(learn, held, asked, len(plan.train.classes))


def probe(
    learn: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], asked: Tensor, classes: int
) -> Tensor:
    """Predictions (Q,) of a linear probe on standardised features (N, D), labels (N,); its penalty
    is chosen on `held`."""
    x, y = learn
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    # Weights under a penalty lie in the span of the N images that they are learnt from: in a basis
    # of it they are the same, and N numbers are fewer than the pixels of an image.
    basis = torch.linalg.qr(((x - mean) / std).T).Q  # (D, min(D, N))
    x, x_held, x_asked = ((part - mean) / std @ basis for part in (x, held[0], asked))
    return linear_probe(
        (x, y), (x_held, held[1]), x_asked, classes=classes, protocol=PROTOCOL
    ).predictions
