"""Figures that say how sure, and how healthy: accuracy with its interval, signs of a collapse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Accuracy(NamedTuple):
    """Top-1 in percent (0–100), its bootstrap 95 % interval over the n test images."""

    top1: float
    low: float
    high: float
    n: int


def accuracy(predictions: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 accuracy of predictions (Q,) with its 95 % percentile bootstrap over images.

    Resampling n zeros and ones with replacement gives a binomial count, so the bootstrap's
    quantiles are read from that distribution exactly instead of being simulated.
    """
    n = len(labels)
    p = (predictions == labels).double().mean()
    counts = torch.arange(n + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(n, p)
    cumulative = binomial.log_prob(counts).exp().cumsum(0)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.searchsorted(cumulative, levels).clamp_max(n).tolist()
    return Accuracy(100 * p.item(), 100 * low / n, 100 * high / n, n)


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (N, D) centred features, 1…D.

    Roy & Vetterli 2007; 1 where all features lie on a line: dimensional collapse.
    """
    centred = (features - features.mean(0)).double()
    singular = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.exp(torch.special.entr(p).sum()).item()


def embedding_std(features: Tensor) -> Tensor:
    """√D times the mean standard deviation of L2-normalised (N, D): 1 on a full sphere, 0 in a
    collapse to a point (Chen & He 2021, arXiv:2011.10566, Fig. 2). A scalar, where they are."""
    z = F.normalize(features.float(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean ‖z₁ − z₂‖² of positive pairs (N, D), L2-normalised: 0 where they agree, 2 at chance
    (Wang & Isola 2020, arXiv:2005.10242, with α = 2). A scalar, where they are."""
    return (z1.float() - z2.float()).square().sum(1).mean()


def uniformity(z: Tensor) -> Tensor:
    """log of the mean exp(−2 ‖a − b‖²) over all pairs of (N, D), L2-normalised: 0 in a collapse to
    a point, about −4 + 8/D on a full sphere (Wang & Isola 2020, with t = 2). A scalar, where they
    are."""
    z = z.float()
    kernel = (-4 * (1 - z @ z.T)).exp()  # ‖a − b‖² = 2 − 2 a·b
    return (kernel.triu(1).sum() / (len(z) * (len(z) - 1) / 2)).log()
