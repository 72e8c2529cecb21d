"""Linear classifiers on pixels: what anyone can read of an image in a part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from idaa_lib.evaluate.probe import CLEAN, linear_probe

# A coarse grid, which is enough to compare parts.
PROTOCOL = CLEAN._replace(
    penalties=(10.0, 1.0, 1e-1, 1e-2, 1e-3), standardise=False, refit=False, iterations=50
)
# So many images are told apart, by views of each to learn and to judge, and one for the penalty.
INSTANCES, LEARNT, JUDGED = 60, 3, 4
DRAWS = LEARNT + 1 + JUDGED


def name_instances(views: Sequence[Tensor]) -> Tensor:
    """Percent (N,) of the last `JUDGED` of `DRAWS` views (N, 3, H, W) of each image that a
    classifier of images, which learns from the first ones, names rightly."""
    which = torch.arange(len(views[0]))
    learn = torch.cat([*views[:LEARNT]]), which.repeat(LEARNT)
    guess = probe(learn, (views[LEARNT], which), torch.cat([*views[LEARNT + 1 :]]), len(which))
    return 100 * (guess.view(JUDGED, -1) == which).double().mean(0)


def probe(
    learn: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], queries: Tensor, classes: int
) -> Tensor:
    """Predictions (Q,) of a linear probe on standardised features (N, …), labels (N,); its penalty
    is chosen on `held`."""
    (_, y), (_, y_held) = learn, held
    x, x_held, queries = (part.flatten(1).cpu() for part in (learn[0], held[0], queries))
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    # Weights under a penalty lie in the span of the N images that they are learnt from: in a basis
    # of it they are the same, and N numbers are fewer than the pixels of an image.
    basis = torch.linalg.qr(((x - mean) / std).T).Q  # (D, min(D, N))
    x, x_held, queries = ((part - mean) / std @ basis for part in (x, x_held, queries))
    fit = linear_probe((x, y), (x_held, y_held), queries, classes=classes, protocol=PROTOCOL)
    return fit.predictions
