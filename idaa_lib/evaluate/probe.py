"""Linear probes on features that were encoded once (docs/spec/idaa.md §5).

`linear_probe` is multinomial logistic regression by L-BFGS under a `Protocol`; `official_probe` is
the published classifier, which stands beside the paper's tables only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.configs import ConfigError
from idaa_lib.evaluate.metrics import top1
from idaa_lib.views import keyed_generator

# Directions of less variance than this share of the largest are scaled as if they had it: float32
# knows no more of them, and their rounding would be blown up.
FLOOR = 1e-6
LAMBDAS = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))


class Protocol(NamedTuple):
    """How a linear probe is penalised and its penalty chosen.

    Fields:
        penalties: in the order in which they are fitted, each from the weights of the one before.
            Of those that validate equally well the first is chosen.
        standardise: features by mean and deviation of the training set; else they stay as they are.
        summed: λ‖W‖² beside the summed cross-entropy, so that more images are penalised less; else
            λ/2·‖W‖² beside the mean. penalise_bias: the bias counts in ‖W‖².
        refit: on train and val together, from the chosen weights; else those are kept.
        iterations: of L-BFGS for each penalty, at most.
        tolerance: it ends where no derivative is larger, each taken in units in which the curvature
            is about 1. Below 1e-7 it works in float64: in float32 such a gradient is rounding.
    """

    penalties: tuple[float, ...]
    standardise: bool = False
    summed: bool = True
    penalise_bias: bool = False
    refit: bool = True
    iterations: int = 50
    tolerance: float = 1e-5


# Ours, that of Kornblith et al. 2019 (arXiv:1805.08974), and that of CASSLE's authors
# (docs/spec/siblings.md §1.7), which goes from the smallest penalty to the largest.
CLEAN = Protocol(tuple(10.0**e for e in range(2, -7, -1)), True, False, False, True, 100, 1e-6)
TRANSFER = Protocol(LAMBDAS[::-1])
SIBLINGS = Protocol(LAMBDAS, penalise_bias=True, iterations=5000, tolerance=1e-10)


class Probe(NamedTuple):
    """Scores (Q, C) of the test features; the penalty, and how it scored on validation before the
    refit."""

    scores: Tensor
    penalty: float
    score_val: float

    @property
    def predictions(self) -> Tensor:
        """(Q,) int64."""
        return self.scores.argmax(1)


class Axes(NamedTuple):
    """Principal axes of N features: mean (D,), directions (D, K) as columns, variances (K,).

    K is the lesser of N and D: no feature has a part along further directions.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor


def principal_axes(x: Tensor, centred: bool = True) -> Axes:
    """The principal axes of features (N, D), about their mean or about 0."""
    mean = x.mean(0) * centred
    x = x - mean
    # On the CPU: not every device has these decompositions.
    if len(x) < x.shape[1]:
        _, roots, rows = torch.linalg.svd(x.cpu(), full_matrices=False)
        variances, directions = roots.square() / len(x), rows.T
    else:
        variances, directions = torch.linalg.eigh((x.T @ x / len(x)).cpu())
    return Axes(mean, directions.to(x), variances.clamp_min(FLOOR * variances.max().item()).to(x))


def linear_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: Tensor,
    *,
    classes: int,
    protocol: Protocol = CLEAN,
    score: Callable[[Tensor, Tensor], float] = top1,
    axes: Axes | None = None,
) -> Probe:
    """The probe of `protocol`, fitted on the features' device; test features are read once.

    Args:
        train, val: (features (N, D), labels (N,)). test: features (Q, D).
        score: of predictions and labels; the penalty of the largest on val is chosen.
        axes: of train and val, or of more features; they decide how soon it ends, not where.
    Raises:
        ConfigError: fewer than two images to learn from.
    """
    (x, y), (x_val, y_val) = train, val
    if len(x) < 2:
        raise ConfigError(
            f"A linear classifier needs 2 images or more to learn from, and has {len(x)}: take a "
            f"larger limit."
        )
    sets = [x, x_val, test]
    if protocol.tolerance < 1e-7:
        sets = [part.double() for part in sets]
    if protocol.standardise:
        mean, std = sets[0].mean(0), sets[0].std(0).clamp_min(1e-6)
        sets = [(part - mean) / std for part in sets]
    if protocol.penalise_bias:  # a feature that is always 1 has it as its weight
        sets = [F.pad(part, (0, 1), value=1.0) for part in sets]
    axes = axes or principal_axes(torch.cat(sets[:2]), centred=not protocol.penalise_bias)
    axes = Axes(*(part.to(sets[0]) for part in axes))
    # The last column is the free bias; where there is none, its weights stay at 0.
    one = float(not protocol.penalise_bias)
    x, x_val, test = (
        F.pad((part - axes.mean) @ axes.directions, (0, 1), value=one) for part in sets
    )
    weights = best = x.new_zeros(classes, x.shape[1])
    penalty, best_score = protocol.penalties[0], -1.0
    for candidate in protocol.penalties:
        weights = _fit(x, y, weights, axes.variances, candidate, protocol)
        if (merit := score((x_val @ weights.T).argmax(1), y_val)) > best_score:
            penalty, best_score, best = candidate, merit, weights
    if protocol.refit:
        x, y = torch.cat([x, x_val]), torch.cat([y, y_val])
        best = _fit(x, y, best, axes.variances, penalty, protocol)
    return Probe(test @ best.T, penalty, best_score)


def _fit(
    x: Tensor, y: Tensor, weights: Tensor, variances: Tensor, penalty: float, protocol: Protocol
) -> Tensor:
    """Weights (C, K) that minimise the penalised cross-entropy of features (N, K) in principal
    axes, a constant behind them, from those given.

    There ‖W‖² is what it was and the Hessian nearly diagonal: about variance/C + penalty (exactly
    so at W = 0, up to the softmax's null direction). L-BFGS works on weights in units of its root.
    On 512 features of a ResNet-18, 5,000 images and the penalties of the transfer protocol, 50
    iterations each then end at most 1e-6 nats above the optimum, not .1.
    """
    n, classes = len(x), len(weights)
    # Classes are rows here: ten columns make a slow product and a slow softmax.
    target = F.one_hot(y, classes).T.to(x.dtype) / n  # (C, N)
    strength = 2 * penalty / n if protocol.summed else penalty
    penalties = F.pad(torch.full_like(variances, strength), (0, 1))
    unit = (F.pad(variances, (0, 1), value=1.0) / classes + penalties).rsqrt()
    scaled = (weights / unit).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=protocol.iterations,
        history_size=10,
        tolerance_grad=protocol.tolerance,
        tolerance_change=protocol.tolerance**2,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        weights = scaled * unit
        log_p = (weights @ x.T).log_softmax(0)  # (C, N)
        shrink = penalties * weights
        loss = (0.5 * shrink * weights).sum() - (target * log_p).sum()
        error = log_p.exp_().div_(n).sub_(target)
        scaled.grad = (error @ x + shrink) * unit
        return loss

    optimizer.step(closure)
    return scaled.detach() * unit


def official_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    epochs: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """The published classifier on cached features: its scores (n, C) of the n test images that are
    counted, at the epoch that is best on them, and top-1 in percent at the last.

    Adam at 3e-4, no augmentation, 1000 epochs, drop_last in training and test (9,984 of CIFAR's
    10,000 are counted). Equal to the release's 1000 encodings, which are all the same.
    """
    (x, y), (x_test, y_test) = train, test
    batch_size = min(batch_size, len(x), len(x_test))
    n = len(x_test) // batch_size * batch_size
    torch.manual_seed(seed)
    layer = nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, fused=True)
    best, last, best_scores = -1.0, 0.0, x.new_zeros(n, classes)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=keyed_generator(seed, epoch)).to(x.device)
        for index in order[: len(x) // batch_size * batch_size].split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                F.cross_entropy(layer(x[index]), y[index]).backward()
            optimizer.step()
        with torch.no_grad():
            scores = layer(x_test[:n])
        last = top1(scores.argmax(1), y_test[:n])
        if last > best:
            best, best_scores = last, scores
    return best_scores, last
