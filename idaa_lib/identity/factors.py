"""What partitions of images divide them by: their agreement with known factors, and what chance
would give (docs/spec/siblings.md §2; notebook 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.stats import contingency
from torch import Tensor

from idaa_lib.evaluate.metrics import LEVELS
from idaa_lib.runs import Run, RunError, checkpoints

GRAY = 0.1  # saturation below which a border has no hue


class Agreement(NamedTuple):
    """How well a factor tells the sides of a partition apart, percent, over n images.

    `chance`, `low`, `high`: mean and 95 % interval of the same where sides are given out at random,
    sides and values of the factor as large as they are.
    """

    value: float
    chance: float
    low: float
    high: float
    n: int


def load_partitions(run: Run) -> Tensor:
    """The partitions (P, N), uint8 sides, that a finished run of IP-IRM keeps, the oldest first; N
    are its training images in their order.

    Raises:
        RunError: the run keeps none.
    """
    tensors, _ = checkpoints.load(run) or ({}, {})
    if "method.partitions" not in tensors:
        raise RunError(
            f"{run.id} keeps no partitions: take a run with method='ipirm' that is no baseline."
        )
    return tensors["method.partitions"][: int(tensors["method.fitted"])]


def known_factors(images: Any, labels: Tensor) -> dict[str, Tensor]:
    """Values (N,), int64, of what is known of uint8 images (N, 3, H, W); −1 where it is not.

    Brightness and saturation (of HSV) above their median or not; the hue of the mean colour of the
    border, an eighth of the image wide, in six sectors, or gray; the class by labels (N,).
    """
    from skimage.color import rgb2hsv  # a second to import

    x = images[:].float() / 255
    height, width = x.shape[2:]
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[height // 8 : -(height // 8) or None, width // 8 : -(width // 8) or None] = True
    border = x[:, :, ~inside] if not inside.all() else x.flatten(2)
    hue, saturation, _ = torch.as_tensor(rgb2hsv(border.mean(2).numpy())).unbind(1)
    sector = (hue * 6).round().long() % 6
    measures = {
        "brightness": x.mean((1, 2, 3)),
        "saturation": torch.as_tensor(rgb2hsv(x.numpy(), channel_axis=1))[:, 1].mean((1, 2)),
    }
    factors = {name: (value > value.median()).long() for name, value in measures.items()}
    factors["colour of the border"] = torch.where(saturation < GRAY, 6, sector)
    return factors | ({"class": labels} if (labels >= 0).any() else {})


def compare_sides(sides: Tensor, factor: Tensor, draws: int = 2000) -> Agreement:
    """The agreement of a partition (N,) and a factor (N,), both integers, −1 where unknown.

    Each value of the factor speaks for one side, the one whose larger share it holds; the agreement
    is the mean over sides of the share of their images that it speaks for, so that sides of unequal
    size have the same chance.
    """
    valid = factor >= 0
    counts = contingency.crosstab(factor[valid].numpy(), sides[valid].numpy()).count
    rows, columns = counts.sum(1), counts.sum(0)

    def find(tables: np.ndarray) -> np.ndarray:  # (…, values, sides)
        return 100 * (tables / columns).max(-1).sum(-1) / len(columns)

    random = find(stats.random_table(rows, columns, seed=0).rvs(draws))
    low, high = np.quantile(random, LEVELS)
    return Agreement(
        float(find(counts)), float(random.mean()), float(low), float(high), int(rows.sum())
    )


def compare_partitions(partitions: Tensor, factors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each of the partitions (P, N) and each factor (N,): `compare_sides`."""
    return [
        {"partition": i, "factor": name, **compare_sides(sides, values)._asdict()}
        for i, sides in enumerate(partitions, 1)
        for name, values in factors.items()
    ]
