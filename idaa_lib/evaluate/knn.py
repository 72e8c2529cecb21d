"""Weighted kNN (Wu et al. 2018, arXiv:1805.01978, §3.4; docs/spec/idaa.md §5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.nets.processes import share

BLOCK = 2**16  # rows of the bank that lie beside the queries at a time


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
    block: int = BLOCK,
) -> Tensor:
    """Predicted classes (Q,) int64 of queries (Q, D) from a bank (N, D) with labels (N,).

    score_c = Σ over the k nearest with label c of exp(cos / τ). k is capped by N. Rows are
    L2-normalised here. It is computed where the queries lie; the bank may lie elsewhere, and comes
    in blocks: `block` rows and `chunk`·`block` similarities are held at a time, and k of each
    query. Of several processes each answers a part of the queries.
    """

    def answer(rows: Any) -> Tensor:
        parts = F.normalize(queries[rows].float(), dim=1).split(chunk)
        # One for all: freed and taken anew, it can break up the heap and grow it many times over.
        held = parts[0].new_empty(len(parts[0]) * min(block, len(bank)))
        nearest: list[tuple[Tensor, Tensor]] = []  # of each part: cosines and labels (chunk, k)
        for vectors, classes_ in zip(bank.split(block), labels.split(block), strict=True):
            vectors = F.normalize(vectors.to(queries.device).float(), dim=1)
            before, nearest = nearest, []
            for i, part in enumerate(parts):
                out = held[: len(part) * len(vectors)].view(len(part), -1)
                cosines, index = torch.mm(part, vectors.T, out=out).topk(min(k, len(vectors)), 1)
                pair = cosines, classes_.to(queries.device)[index]
                if before:
                    both = [torch.cat(halves, 1) for halves in zip(before[i], pair, strict=True)]
                    cosines, index = both[0].topk(min(k, both[0].shape[1]), 1)
                    pair = cosines, both[1].gather(1, index)
                nearest.append(pair)
        return torch.cat([_vote(*pair, classes, temperature) for pair in nearest])

    return share(range(len(queries)), answer)


def _vote(cosines: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Classes (Q,) that neighbours (Q, k) of descending cosines vote for by their labels (Q, k)."""
    # exp(cos/τ) over its row's largest: the same order, and no overflow at small τ.
    weights = ((cosines - cosines[:, :1]) / temperature).exp()
    return weights.new_zeros(len(cosines), classes).scatter_add_(1, labels, weights).argmax(1)
