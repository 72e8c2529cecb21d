"""Linear probes on features that were encoded once (docs/spec/idaa.md §5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.views import keyed_generator

# Of the standardised features' squared weights, per sample: from nearly none to nearly all.
PENALTIES = tuple(10.0**e for e in range(-6, 3))


class Probe(NamedTuple):
    """A fitted probe: predictions (Q,) int64; the penalty that validation chose, and its top-1
    there in percent before the refit: what hyper-parameters are judged by."""

    predictions: Tensor
    penalty: float
    top1_val: float


class OfficialProbe(NamedTuple):
    """What the official protocol reports: top1 in percent at the best test epoch, and the last."""

    top1: float
    top1_last: float
    n: int
    predictions: Tensor


def linear_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: Tensor,
    *,
    classes: int,
    penalties: tuple[float, ...] = PENALTIES,
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
    best, chosen, weights = -1.0, penalties[0], None
    at_best = None
    for penalty in sorted(penalties, reverse=True):
        weights = logistic_regression(x, y, classes, penalty, iterations, start=weights)
        top1 = (predict(weights, x_val) == val[1]).float().mean().item()
        if top1 > best:
            best, chosen, at_best = top1, penalty, weights
    x, y = torch.cat([x, x_val]), torch.cat([y, val[1]])
    weights = logistic_regression(x, y, classes, chosen, iterations, start=at_best)
    return Probe(predict(weights, x_test), chosen, 100 * best)


def logistic_regression(
    x: Tensor,
    y: Tensor,
    classes: int,
    penalty: float,
    iterations: int = 100,
    start: Tensor | None = None,
) -> Tensor:
    """Weights (D + 1, C), the bias last, that minimise mean cross-entropy + penalty/2·‖W‖².

    x: (N, D), y: (N,) int64. Full-batch L-BFGS; the bias is not penalised.
    """
    zeros = x.new_zeros(x.shape[1] + 1, classes)
    weights = (zeros if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        loss = F.cross_entropy(logits, y) + 0.5 * penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


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
