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

from idaa_lib.evaluate.metrics import top1
from idaa_lib.views import keyed_generator

# Directions of less variance than this share of the largest are scaled as if they had it: float32
# knows no more of them, and their rounding would be blown up.
FLOOR = 1e-6
# Kornblith et al. 2019 (arXiv:1805.08974): 45 values from 1e-6 to 1e5.
LAMBDAS = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))


class Protocol(NamedTuple):
    """How a linear probe is penalised and its penalty chosen.

    Fields:
        penalties: in the order in which they are fitted, each from the weights of the one before.
            Of those that validate equally well the first is chosen.
        standardise: features by mean and deviation of the training set; else they stay as they are.
        summed: λ‖W‖² beside the summed cross-entropy, so that more images are penalised less; else
            λ/2·‖W‖² beside the mean.
        penalise_bias: the bias counts in ‖W‖².
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


# Ours: from the largest penalty to the smallest.
CLEAN = Protocol(
    tuple(10.0**e for e in range(2, -7, -1)),
    standardise=True, summed=False, iterations=100, tolerance=1e-6,
)  # fmt: skip
# That of Kornblith et al., which the paper's transfer is inferred to follow.
TRANSFER = Protocol(LAMBDAS[::-1])
# That of CASSLE's authors (spec/siblings.md §1.7): from the smallest penalty to the largest.
SIBLINGS = Protocol(LAMBDAS, penalise_bias=True, iterations=5000, tolerance=1e-10)


class Probe(NamedTuple):
    """A fitted probe.

    Fields:
        predictions: (Q,) int64. likeliest: the (up to) five likeliest classes (Q, 5).
        penalty: the one chosen. score_val: what it scored on validation, before the refit.
        weights: (D + 1, C), the bias last, of features as they were fitted.
    """

    predictions: Tensor
    likeliest: Tensor
    penalty: float
    score_val: float
    weights: Tensor


class OfficialProbe(NamedTuple):
    """Top-1 in percent of the best test epoch and of the last, on n images, and the predictions
    (n,) of the best."""

    top1: float
    top1_last: float
    n: int
    predictions: Tensor


class Axes(NamedTuple):
    """Coordinates in which features with a constant 1 behind them, (N, D + 1), are uncorrelated.

    Fields:
        mean: (D,), 0 where the bias is penalised. directions: (D + 1, D + 1), orthonormal columns.
        variances: (D + 1,), at least `FLOOR` of the largest.
        shrinks: (D + 1,), 1, and 0 for a bias that is not penalised.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    shrinks: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """Features (N, D) in these coordinates, (N, D + 1)."""
        return with_one(x - self.mean) @ self.directions

    def weights(self, rows: Tensor) -> Tensor:
        """Weights (D + 1, C) of features (N, D) that do what rows (C, D + 1) do in these."""
        weights = self.directions @ rows.T
        weights[-1] -= self.mean @ weights[:-1]
        return weights


def with_one(x: Tensor) -> Tensor:
    """Features (N, D) with a constant 1 behind them."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def principal_axes(x: Tensor, penalise_bias: bool = False) -> Axes:
    """The principal axes of features (N, D), in which ‖W‖² is what it was.

    With a free bias the constant is an axis of its own; a penalised one turns with the features.
    """
    mean = torch.zeros_like(x[0]) if penalise_bias else x.mean(0)
    x = with_one(x) if penalise_bias else x - mean
    # On the CPU: not every device has an eigendecomposition.
    variances, directions = torch.linalg.eigh((x.T @ x / len(x)).cpu())
    variances = variances.clamp_min(FLOOR * variances[-1].item())
    shrinks = torch.ones_like(variances)
    if not penalise_bias:
        directions = torch.block_diag(directions, torch.ones(1, 1))
        variances = torch.cat([variances, variances.new_ones(1)])
        shrinks = torch.cat([shrinks, shrinks.new_zeros(1)])
    return Axes(mean, directions.to(x), variances.to(x), shrinks.to(x))


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
        axes: principal axes of x, or of features like it: they decide how soon it ends, not where.
    """
    (x, y), (x_val, y_val) = train, val
    if protocol.tolerance < 1e-7:
        x, x_val, test = x.double(), x_val.double(), test.double()
    if protocol.standardise:
        mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
        x, x_val, test = ((part - mean) / std for part in (x, x_val, test))
    axes = axes or principal_axes(x, protocol.penalise_bias)
    axes = Axes(*(part.to(x) for part in axes))
    x, x_val = axes.turn(x), axes.turn(x_val)
    rows = best_rows = x.new_zeros(classes, x.shape[1])
    best, best_score = protocol.penalties[0], -1.0
    for penalty in protocol.penalties:
        rows = _fit(x, y, rows, axes, penalty, protocol)
        if (found := score((x_val @ rows.T).argmax(1), y_val)) > best_score:
            best, best_score, best_rows = penalty, found, rows
    if protocol.refit:
        x, y = torch.cat([x, x_val]), torch.cat([y, y_val])
        best_rows = _fit(x, y, best_rows, axes, best, protocol)
    logits = axes.turn(test) @ best_rows.T
    likeliest = logits.topk(min(5, classes)).indices
    return Probe(logits.argmax(1), likeliest, best, best_score, axes.weights(best_rows))


def _fit(
    x: Tensor, y: Tensor, rows: Tensor, axes: Axes, penalty: float, protocol: Protocol
) -> Tensor:
    """Weights (C, D + 1) that minimise the penalised cross-entropy of turned features (N, D + 1).

    In principal axes the Hessian is nearly diagonal: about variance/C + penalty (exactly so at
    W = 0, up to the softmax's null direction). L-BFGS works on weights in units of its root. On 512
    features of a ResNet-18, 5,000 images and the penalties of the transfer protocol, 50 iterations
    each then end at most 1e-6 nats above the optimum, not .1.
    """
    n, classes = len(x), len(rows)
    # Classes are rows here: ten columns make a slow product and a slow softmax.
    target = F.one_hot(y, classes).T.to(x.dtype) / n  # (C, N)
    penalties = (2 * penalty / n if protocol.summed else penalty) * axes.shrinks
    unit = (axes.variances / classes + penalties).rsqrt()
    scaled = (rows / unit).requires_grad_()
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
        rows = scaled * unit
        log_p = (rows @ x.T).log_softmax(0)  # (C, N)
        shrink = penalties * rows
        loss = (0.5 * shrink * rows).sum() - (target * log_p).sum()
        error = log_p.exp_().div_(n).sub_(target)
        scaled.grad = (error @ x + shrink) * unit
        return loss

    optimizer.step(closure)
    return scaled.detach() * unit


def predict(weights: Tensor, x: Tensor) -> Tensor:
    """Classes (Q,) of features (Q, D) under weights (D + 1, C)."""
    return (x @ weights[:-1] + weights[-1]).argmax(1)


def official_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    epochs: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
) -> OfficialProbe:
    """The published protocol on cached features: its epoch is chosen on test data.

    Adam at 3e-4, no augmentation, 1000 epochs, drop_last in training and test (9,984 of CIFAR's
    10,000 are counted), and the largest test accuracy over all epochs. Equal to the release's 1000
    encodings, which are all the same.
    """
    (x, y), (x_test, y_test) = train, test
    batch_size = min(batch_size, len(x), len(x_test))
    n = len(x_test) // batch_size * batch_size
    torch.manual_seed(seed)
    layer = nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, fused=True)
    best, last, predictions = -1.0, 0.0, torch.full_like(y_test[:n], -1)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=keyed_generator(seed, epoch)).to(x.device)
        for index in order[: len(x) // batch_size * batch_size].split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                F.cross_entropy(layer(x[index]), y[index]).backward()
            optimizer.step()
        with torch.no_grad():
            guess = layer(x_test[:n]).argmax(1)
        last = top1(guess, y_test[:n])
        if last > best:
            best, predictions = last, guess
    return OfficialProbe(best, last, n, predictions)
