"""Accuracies and means with their 95 % intervals, and measures that show a collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.stats, half a second to import, comes with its first use
import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = (0.025, 0.975)


class Accuracy(NamedTuple):
    """Top-1 accuracy in percent (0–100), its 95 % interval, and the number of test images."""

    top1: float
    low: float
    high: float
    n: int


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


def top1(predictions: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of predictions (Q,)."""
    return 100 * (predictions == labels).sum().item() / len(labels)


def accuracy(predictions: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 accuracy of predictions (Q,) with its 95 % percentile bootstrap over images."""
    n, right = len(labels), (predictions == labels).sum().item()
    low, high = share_interval([right / n], n)[:, 0]
    return Accuracy(100 * right / n, float(low), float(high), n)


def share_interval(shares: Any, n: int) -> np.ndarray:
    """Ends (2, K) in percent of the 95 % percentile bootstrap of shares (K,) in [0, 1] of n images.

    Resampling n zeros and ones with replacement gives a binomial count, so the quantiles of the
    bootstrap are exact here and not simulated.
    """
    return 100 * scipy.stats.binom.ppf(np.transpose([LEVELS]), n, shares) / n


def wilson_interval(hits: Tensor) -> Interval:
    """How many percent of n images come out right, those where `hits` (n,) is not 0.

    The interval is Wilson's (1927), which has a width where all or none of a few images come out
    right, as a bootstrap has not.
    """
    right, n = int((hits > 0).sum()), len(hits)
    low, high = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    return Interval(100 * right / n, 100 * low, 100 * high)


def student_interval(values: Tensor | Sequence[float], unit: str = "") -> Interval:
    """The mean of at least two independent values (n,) with Student's interval: seeds, draws.

    Of shares, whose `unit` is %, it is cut at 0 and 100: it holds the true mean as often.
    """
    x = np.asarray(values, dtype=np.float64)
    half = scipy.stats.t.ppf(LEVELS[1], len(x) - 1) * scipy.stats.sem(x)
    bounds = (0.0, 100.0) if unit == "%" else (-np.inf, np.inf)
    low, high = np.clip([x.mean() - half, x.mean() + half], *bounds)
    return Interval(float(x.mean()), float(low), float(high))


def bootstrap_interval(values: Tensor) -> Interval:
    """The mean of values (n,) with its percentile bootstrap over images; of differences, paired."""
    x = values.double().cpu().numpy()
    if len(x) < 2:
        return Interval(*3 * [float(x.mean())])
    low, high = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=0
    ).confidence_interval
    return Interval(float(x.mean()), float(low), float(high))


def paired_difference(first: Tensor, second: Tensor) -> Interval:
    """How many percent more of the same n images come out right in `first` than in `second` (n,).

    Both hold 0 where an image comes out wrong. The interval is that of Agresti & Min (2005,
    doi:10.1002/sim.1781), which holds for few images and where no two differ, as a bootstrap does
    not: half an image is added to each cell of the table of pairs.
    """
    change = (first > 0).double() - (second > 0).double()
    n, balance, unequal = len(change), change.sum().item(), change.abs().sum().item()
    mean = balance / (n + 2)
    half = scipy.stats.norm.ppf(LEVELS[1]) * math.sqrt(unequal + 1 - balance * mean) / (n + 2)
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return Interval(100 * balance / n, 100 * low, 100 * high)


def mean_per_class(predictions: Tensor, labels: Tensor) -> float:
    """The mean of the classes' accuracies, in percent; classes without an image do not count."""
    return 100 * float(_recalls(predictions, labels)[0].mean())


def mean_per_class_interval(predictions: Tensor, labels: Tensor) -> Interval:
    """`mean_per_class` with its percentile bootstrap over the images of each class."""
    recalls, counts = _recalls(predictions, labels)
    draw = np.random.default_rng(0).binomial(counts, recalls, (10_000, len(counts))) / counts
    low, high = np.quantile(100 * draw.mean(1), LEVELS)
    return Interval(100 * float(recalls.mean()), float(low), float(high))


def _recalls(predictions: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each class among labels (Q,): the share predicted right, in [0, 1], and its images."""
    counts = labels.cpu().bincount()
    right = labels[predictions == labels].cpu().bincount(minlength=len(counts))
    present = counts > 0
    return (right[present] / counts[present].double()).numpy(), counts[present].numpy()


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (N, D) centred features, 1…D.

    Roy & Vetterli 2007; 1 where all features lie on a line: dimensional collapse.
    """
    x = features.cpu().double()
    x = x - x.mean(0)
    singular = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(p).sum().exp().item()


def embedding_std(features: Tensor) -> Tensor:
    """√D times the mean standard deviation of L2-normalised (N, D), a scalar on their device.

    1 on a full sphere, 0 in a collapse to a point (Chen & He 2021, arXiv:2011.10566, Fig. 2).
    """
    z = F.normalize(features.float(), dim=1)
    if len(z) < 2:
        return z.new_zeros(())
    return z.std(0).mean() * z.shape[1] ** 0.5


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean ‖z₁ − z₂‖² of positive pairs (N, D), L2-normalised: a scalar on their device.

    0 where they agree, 2 at chance (Wang & Isola 2020, arXiv:2005.10242, with α = 2).
    """
    return (z1.float() - z2.float()).square().sum(1).mean()


def uniformity(z: Tensor) -> Tensor:
    """log of the mean exp(−2 ‖a − b‖²) over all pairs of (N, D), L2-normalised: a scalar.

    0 in a collapse to a point, about −4 + 8/D on a full sphere (Wang & Isola 2020, with t = 2).
    """
    z = z.float()
    kernel = (-4 * (1 - z @ z.T)).exp()  # ‖a − b‖² = 2 − 2 a·b
    return (kernel.triu(1).sum() / (len(z) * (len(z) - 1) / 2)).log()
