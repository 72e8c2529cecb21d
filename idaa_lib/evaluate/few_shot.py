"""Few labels: balanced draws of them, episodes of few classes and shots.

An episode is a classification problem of its own: some classes (`ways`), some labelled images of
each (`shots`), some to tell apart (`queries`). Its probe sees L2-normalised features and is solved
in closed form, all episodes at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.views import keyed_generator


def draw_balanced(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Indices of about `fraction` of the labels (N,): as many of each class, one at least.

    A class that has fewer gives all. A larger fraction of the same generator holds the smaller.
    """
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    each = max(1, round(fraction * len(labels) / len(members)))
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:each]] for m in members])


def draw_episodes(
    labels: Tensor, ways: int, shots: int, queries: int, n: int, seed: int = 0
) -> Tensor:
    """Indices (n, ways, shots + queries) of n episodes: random classes, random images of each.

    Raises:
        ValueError: fewer than `ways` classes have shots + queries images.
    """
    each = shots + queries
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    members = [m for m in members if len(m) >= each]
    if len(members) < ways:
        raise ValueError(
            f"{len(members)} classes have {each} images ({shots} shots, {queries} queries), and "
            f"ways is {ways}"
        )
    generator = keyed_generator(seed, ways, shots, queries)
    rows = []
    for _ in range(n):
        for c in torch.randperm(len(members), generator=generator)[:ways].tolist():
            order = torch.randperm(len(members[c]), generator=generator)
            rows.append(members[c][order[:each]])
    return torch.stack(rows).view(n, ways, each)


def few_shot(
    features: Tensor, episodes: Tensor, shots: int, classifier: str = "centroid"
) -> Tensor:
    """Accuracy (n,) in percent of each episode (n, ways, shots + queries) on features (N, D).

    `centroid`: the class whose mean of support features has the largest cosine (Snell et al. 2017,
    arXiv:1703.05175, with cosines). `ridge`: least squares on one-hot labels with a free bias and
    λ‖W‖², where λ is the mean squared distance of the support features from their mean.
    """
    z = F.normalize(features, dim=1)
    accuracies = []
    for part in episodes.to(z.device).split(100):  # 100 of 5 × 20 × 2048 floats are 80 MiB
        support, queries = z[part].tensor_split([shots], dim=2)  # (E, ways, shots | queries, D)
        truth = torch.arange(part.shape[1], device=z.device).repeat_interleave(queries.shape[2])
        queries = queries.flatten(1, 2)  # (E, ways · queries, D)
        if classifier == "ridge":
            scores = _ridge(support, queries)
        else:
            scores = queries @ F.normalize(support.mean(2), dim=2).mT
        accuracies.append(100 * (scores.argmax(2) == truth).float().mean(1))
    return torch.cat(accuracies)


def _ridge(support: Tensor, queries: Tensor) -> Tensor:
    """Least-squares scores (E, Q, ways), by the dual: there are fewer images than features."""
    ways, shots = support.shape[1:3]
    x = support.flatten(1, 2)  # (E, ways·shots, D)
    mean = x.mean(1, keepdim=True)
    x, queries = x - mean, queries - mean
    target = torch.eye(ways, device=x.device, dtype=x.dtype).repeat_interleave(shots, 0) - 1 / ways
    gram = x @ x.mT
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(x.dtype).tiny)
    one = torch.eye(ways * shots, device=x.device, dtype=x.dtype)
    return queries @ x.mT @ torch.linalg.solve(gram + ridge[:, None, None] * one, target)
