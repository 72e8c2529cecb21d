"""Weighted kNN (Wu et al. 2018, arXiv:1805.01978, §3.4; docs/spec/idaa.md §5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def knn(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.5,
    chunk: int = 125,
) -> Tensor:
    """Predicted classes (Q,) int64 of queries (Q, D) from a bank (N, D) with labels (N,).

    score_c = Σ over the k nearest with label c of exp(cos / τ). At most `chunk`·N similarities are
    held at a time. k is capped by N. Rows are L2-normalised here; all lie on one device.
    """
    bank = F.normalize(bank.float(), dim=1)
    # One block for all: freed and taken anew, it can break up the heap and grow it many times over.
    block = bank.new_empty(min(chunk, len(queries)), len(bank))
    predictions = []
    for part in F.normalize(queries.float(), dim=1).split(chunk):
        cosines = torch.mm(part, bank.T, out=block[: len(part)])
        similarity, nearest = cosines.topk(min(k, len(bank)), dim=1)  # (chunk, k)
        # exp(cos/τ) over its row's largest: the same order, and no overflow at small τ.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        scores = weights.new_zeros(len(part), classes)
        predictions.append(scores.scatter_add_(1, labels[nearest], weights).argmax(1))
    return torch.cat(predictions)
