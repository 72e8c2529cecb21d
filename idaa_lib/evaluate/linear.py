"""Linear probes on features that were encoded once (docs/spec/idaa.md §5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.evaluate.metrics import top1
from idaa_lib.views import keyed_generator

# Of the standardised features' squared weights, per sample: from nearly none to nearly all.
PENALTIES = tuple(10.0**e for e in range(-6, 3))
# Directions of less variance than this share of the largest are scaled as if they had it: float32
# knows no more of them, and their rounding would be blown up.
FLOOR = 1e-6


class Probe(NamedTuple):
    """A fitted probe: predictions (Q,) int64, and of each query the (up to five) likeliest classes
    (Q, 5); the penalty that validation chose, and its top-1 there in percent before the refit: what
    hyper-parameters are judged by."""

    predictions: Tensor
    likeliest: Tensor
    penalty: float
    top1_val: float


class Choice(NamedTuple):
    """The penalty of the best score on validation, that score, and its weights (D + 1, C)."""

    penalty: float
    score: float
    weights: Tensor


class OfficialProbe(NamedTuple):
    """What the official protocol reports: top1 in percent at the best test epoch, and the last."""

    top1: float
    top1_last: float
    n: int
    predictions: Tensor


class Axes(NamedTuple):
    """Principal axes of features: mean (D,), directions (D, D) as columns, variances (D,)."""

    mean: Tensor
    directions: Tensor
    variances: Tensor


def linear_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    iterations: int = 100,
) -> Probe:
    """Multinomial logistic regression, `clean`: penalty by validation, refit on both, test once.

    Args:
        train, val: (features (N, D), labels (N,)). test: features (Q, D).
        iterations: at most, of L-BFGS for each penalty, each warm-started from the one before.
    """
    x, y = train
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_val, x_test = ((f - mean) / std for f in (x, val[0], test))
    axes = principal_axes(x)
    best = choose((x, y), (x_val, val[1]), classes, penalties, iterations=iterations, axes=axes)
    x, y = torch.cat([x, x_val]), torch.cat([y, val[1]])
    weights = logistic_regression(
        x, y, classes, best.penalty, iterations, start=best.weights, axes=axes
    )
    scores = logits(weights, x_test)
    likeliest = scores.topk(min(5, classes)).indices
    return Probe(scores.argmax(1), likeliest, best.penalty, best.score)


def choose(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    penalties: Sequence[float],
    *,
    score: Callable[[Tensor, Tensor], float] = top1,
    iterations: int = 100,
    tolerance: float = 1e-6,
    axes: Axes | None = None,
) -> Choice:
    """The penalty that validates best, of ties the largest, with its weights on `train`.

    Args:
        train, val: (features (N, D), labels (N,)).
        score: of predictions (Q,) and labels (Q,); more is better.
        iterations, tolerance, axes: as in `logistic_regression`; from the largest penalty to the
            smallest, each is warm-started from the one before.
    """
    fit = _Fit(*train, classes, axes)
    best = Choice(max(penalties), -1.0, fit.weights())
    for penalty in sorted(penalties, reverse=True):
        weights = fit(penalty, iterations, tolerance)
        found = score(predict(weights, val[0]), val[1])
        if found > best.score:
            best = Choice(penalty, found, weights)
    return best


def logistic_regression(
    x: Tensor,
    y: Tensor,
    classes: int,
    penalty: float,
    iterations: int = 100,
    tolerance: float = 1e-6,
    *,
    start: Tensor | None = None,
    axes: Axes | None = None,
) -> Tensor:
    """Weights (D + 1, C), the bias last, that minimise mean cross-entropy + penalty/2·‖W‖².

    Full-batch L-BFGS on the features' device and in their precision; the bias is not penalised.

    Args:
        x: (N, D), y: (N,) int64.
        iterations: at most. tolerance: it ends where no derivative is larger, each taken in the
            units in which the curvature is about 1, so that the loss is ‖gradient‖²/2 too large.
        start: weights (D + 1, C) to start from. axes: the principal axes of x, or of features like
            it: they decide how soon it ends, not where.
    """
    return _Fit(x, y, classes, axes, start)(penalty, iterations, tolerance)


def principal_axes(x: Tensor) -> Axes:
    """The principal axes of features (N, D)."""
    mean = x.mean(0)
    centred = x - mean
    # On the CPU: not every device has an eigendecomposition.
    variances, directions = torch.linalg.eigh((centred.T @ centred / len(x)).cpu())
    return Axes(mean, directions.to(x.device), variances.clamp_min(0).to(x.device))


class _Fit:
    """Multinomial logistic regression of one training set under one penalty after another.

    In principal axes a rotation leaves ‖W‖² as it is, and the Hessian is nearly diagonal: about
    variance/C + penalty (exactly so at W = 0, up to the softmax's null direction). L-BFGS works on
    weights in units of its root. On 512 features of a ResNet-18, 5,000 images and the penalties of
    the transfer protocol, 50 iterations each then end at most 1e-6 nats above the optimum, not .1.
    """

    def __init__(
        self, x: Tensor, y: Tensor, classes: int, axes: Axes | None, start: Tensor | None = None
    ) -> None:
        self.axes = axes or principal_axes(x)
        mean, directions, variances = self.axes
        self.x = (x - mean) @ directions
        # Classes are rows here: ten columns make a slow product and a slow softmax.
        self.target = F.one_hot(y, classes).T.to(x.dtype) / len(x)  # (C, N)
        curvature = variances.clamp_min(FLOOR * variances.max().item()) / classes
        self.curvature = torch.cat([curvature, curvature.new_tensor([1 / classes])])
        start = x.new_zeros(x.shape[1] + 1, classes) if start is None else start
        bias = start[-1] + mean @ start[:-1]
        self.rows = torch.cat([directions.T @ start[:-1], bias[None]]).T.contiguous()  # (C, D + 1)

    def __call__(self, penalty: float, iterations: int, tolerance: float) -> Tensor:
        """Weights (D + 1, C) under `penalty`, started from those of the call before."""
        penalties = torch.full_like(self.curvature, penalty)
        penalties[-1] = 0
        unit = (self.curvature + penalties).rsqrt()
        scaled = (self.rows / unit).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=iterations,
            history_size=10,
            tolerance_grad=tolerance,
            tolerance_change=tolerance**2,
            line_search_fn="strong_wolfe",
        )
        n = self.x.shape[0]

        @torch.no_grad()
        def closure() -> Tensor:
            rows = scaled * unit
            log_p = torch.addmm(rows[:, -1:], rows[:, :-1], self.x.T).log_softmax(0)  # (C, N)
            shrink = penalties * rows
            loss = (0.5 * shrink * rows).sum() - (self.target * log_p).sum()
            error = log_p.exp_().div_(n).sub_(self.target)
            gradient = torch.cat([error @ self.x, error.sum(1, keepdim=True)], 1)
            scaled.grad = (gradient + shrink) * unit
            return loss

        optimizer.step(closure)
        self.rows = scaled.detach() * unit
        return self.weights()

    def weights(self) -> Tensor:
        """The present weights (D + 1, C), of the features as they were given."""
        weights = self.axes.directions @ self.rows[:, :-1].T
        return torch.cat([weights, (self.rows[:, -1] - self.axes.mean @ weights)[None]])


def predict(weights: Tensor, x: Tensor) -> Tensor:
    """Classes (Q,) of features (Q, D) under weights (D + 1, C)."""
    return logits(weights, x).argmax(1)


def logits(weights: Tensor, x: Tensor) -> Tensor:
    """Logits (Q, C) of features (Q, D) under weights (D + 1, C)."""
    return x @ weights[:-1] + weights[-1]


def official_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    epochs: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
) -> OfficialProbe:
    """The published protocol on cached features, to stand beside the paper's tables only.

    Adam at 3e-4, no augmentation, 1000 epochs, drop_last in training and test (9,984 of CIFAR's
    10,000 are counted), and the largest test accuracy over all epochs is reported: the epoch is
    chosen on test data. Equal to the release's 1000 encodings, which are all the same.
    """
    (x, y), (x_test, y_test) = train, test
    batch_size = min(batch_size, len(x), len(x_test))
    n = len(x_test) // batch_size * batch_size
    torch.manual_seed(seed)
    layer = nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, fused=True)
    best, top1, predictions = -1.0, 0.0, torch.full_like(y_test[:n], -1)
    with torch.enable_grad():
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=keyed_generator(seed, epoch)).to(x.device)
            for start in range(0, len(x) - batch_size + 1, batch_size):
                index = order[start : start + batch_size]
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(layer(x[index]), y[index]).backward()
                optimizer.step()
            with torch.no_grad():
                guess = layer(x_test[:n]).argmax(1)
                top1 = 100 * (guess == y_test[:n]).double().mean().item()
            if top1 > best:
                best, predictions = top1, guess
    return OfficialProbe(best, top1, n, predictions)
