"""The losses of IP-IRM within subsets of images, and how a partition into them is fitted
(docs/spec/siblings.md §2.2–2.4; the method is in `ipirm`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.methods.base import similarity
from idaa_lib.nets.processes import agree, count_processes, gather, rank
from idaa_lib.views import keyed_generator

# Entropy in nats that a relaxed constraint asks of the shares of two subsets: that of 1 : 2.
BALANCE = 0.6365
PATIENCE = 5  # epochs without improvement after which a maximisation ends, once it may
ORDER = 14  # stream of the random order of a maximisation's batches


# --- the loss of a set of images ------------------------------------------------------------------


def compact_logits(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities (2n, 2n − 1) of n pairs, the partner first, then the others in their order.

    z1, z2: (n, D), L2-normalised. Also the image (2n, 2n − 2) that each of the others is of.
    """
    n, z = len(z1), torch.cat([z1, z2])
    s = similarity(z, z, 1.0)
    row = torch.arange(2 * n, device=z.device)
    partner = row.roll(n)
    others = (row != row[:, None]) & (row != partner[:, None])  # (2n, 2n)
    image = (row % n).expand(2 * n, -1)[others].view(2 * n, 2 * n - 2)
    negatives = s[others].view(2 * n, 2 * n - 2)
    return torch.cat([s[row, partner, None], negatives], 1), image


def penalty(
    logits: Tensor,
    log_weights: Tensor | None = None,
    rows: Tensor | None = None,
    dummy: str = "vector",
    target: Tensor | None = None,
) -> Tensor:
    """Ω: the squared gradient, at 1, of the loss with respect to a factor of the logits (R, C).

    In closed form (§2.2): g_j = Σ_i a_i (q_ij − y_ij) s_ij, q = softmax(s + log w̃).

    Args:
        log_weights: (R, C), log w̃; None for 0. rows: (R,), the a_i; None for 1/R each.
        dummy: a factor for each column (`vector`), Ω = Σ g_j², or one (`scalar`), Ω = (Σ g_j)².
        target: (R, C), y; None for 1 in the first column.
    """
    q = (logits if log_weights is None else logits + log_weights).softmax(1)
    if target is None:
        q = torch.cat([q[:, :1] - 1, q[:, 1:]], 1)
    else:
        q = q * target.sum(1, keepdim=True) - target
    g = (q * logits).mean(0) if rows is None else rows @ (q * logits)
    return g.square().sum() if dummy == "vector" else g.sum().square()


def debiased_loss(z1: Tensor, z2: Tensor, temperature: float, prior: float) -> Tensor:
    """DCL's loss (Chuang et al. 2020, arXiv:2007.00224; spec §2.6) of pairs z1, z2 (B, D).

    prior: τ⁺, the share of negatives that are of the anchor's class; 0 gives NT-Xent.
    """
    s = compact_logits(z1, z2)[0] / temperature
    n, top = s.shape[1] - 1, s.detach().amax(1)  # e^top alone is infinite at small T
    s, least = s - top[:, None], n * (-1 / temperature - top).exp()
    positive, negatives = s[:, 0].exp(), s[:, 1:].exp().sum(1)
    others = ((negatives - prior * n * positive) / (1 - prior)).maximum(least)
    return (torch.log(positive + others) - s[:, 0]).mean()


def soft_loss(
    logits: Tensor,
    image: Tensor,
    shares: Tensor,
    temperatures: tuple[float, float],
    total: bool,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L_k and Ω_k (§2.3) of a subset that image i is in with the probability shares[i] (n,).

    Args:
        logits, image: as `compact_logits` or, with a target, `mixed_logits` gives them.
        temperatures: T of L_k, and that of Ω_k.
        total: the official `nonorm`: over the number of rows in place of the sum of shares.
        target: (n, n), of mixed images, as `mixed_target` gives it.
    """
    rows = shares.repeat(len(logits) // len(shares))  # (R,)
    # A share that underflows would be log 0, whose gradient is not finite.
    negatives = shares.clamp(min=torch.finfo(shares.dtype).tiny)[image]  # (R, C − 1)
    weights = negatives.log() - negatives.sum(1, keepdim=True).log() + math.log(image.shape[1])
    s = logits / temperatures[0]
    if target is None:
        weights = F.pad(weights, (1, 0))  # the partner counts once
        losses = (s + weights).logsumexp(1) - s[:, 0]
    else:
        weights = torch.zeros_like(s).masked_scatter(others(len(s), s.device), weights)
        losses = -(target * (s + weights).log_softmax(1)).sum(1)
    a = rows / (len(rows) if total else rows.sum())
    return a @ losses, penalty(logits / temperatures[1], weights, a, target=target)


def imbalance(p: Tensor, constrain: str, total: bool) -> Tensor:
    """R (§2.3) of probabilities p (n, K): what keeps subsets from being empty."""
    entropy = -torch.special.xlogy(p.mean(0), p.mean(0)).sum()
    if constrain == "none":
        return entropy.new_zeros(())
    if total:  # in place of both constraints
        return 0.2 * (-entropy - torch.special.xlogy(p, p).sum(1).mean())
    if constrain == "strict":
        return -entropy
    return (BALANCE - entropy).clamp(min=0)


# --- mixed images (§2.4) --------------------------------------------------------------------------


def others(n: int, device: torch.device) -> Tensor:
    """Where row and column are not of one image: (n, n), bool."""
    return ~torch.eye(n, dtype=torch.bool, device=device)


def mixed_logits(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities (n, n) of n mixed images with the second views, and of which images (n, n − 1)
    the columns beside its own are. z1, z2: (n, D), L2-normalised."""
    n = len(z1)
    image = torch.arange(n, device=z1.device).expand(n, n)[others(n, z1.device)]
    return similarity(z1, z2, 1.0), image.view(n, n - 1)


def mixed_target(share: Tensor, partner: Tensor) -> Tensor:
    """What a softmax over n columns shall be: λ_i on the image itself, 1 − λ_i on its partner.

    share: (n,), λ. partner: (n,), −1 where it is no column.
    """
    target = torch.diag(share)
    (rows,) = (partner >= 0).nonzero(as_tuple=True)
    target[rows, partner[rows]] += 1 - share[rows]
    return target


def mix(images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Each of n images mixed with another by λ = max(u, 1 − u), and the target (n, n), where the
    mean of λ acts alone (§2.4).

    draws: (n, 2) random numbers in [0, 1): u, and what puts the partners in order.
    """
    uniform, rank = draws.unbind(1)
    share, partner = torch.maximum(uniform, 1 - uniform).to(images.dtype), rank.argsort()
    mixed = torch.lerp(images[partner], images, share[:, None, None, None])
    return mixed, mixed_target(share.mean().expand_as(share), partner)


def embed_together(embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """z (n, D) of images (n, 3, H, W) that every process has, in their order: each embeds a part of
    them, or all where they are too few for batch statistics of a part."""
    processes = count_processes()
    if processes == 1 or len(images) < 2 * processes:
        return embed(images)
    parts = images.tensor_split(processes)
    z = embed(parts[rank()])
    rows = gather(F.pad(z, (0, 0, 0, len(parts[0]) - len(z)))).chunk(processes)
    return torch.cat([row[: len(part)] for row, part in zip(rows, parts, strict=True)])


# --- maximisation ---------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """z of two views of all N images, (N, D) each, L2-normalised.

    Where first views are mixed: image i's is share[i] of itself and the rest of image partner[i],
    (N,) each; else None.
    """

    z1: Tensor
    z2: Tensor
    share: Tensor | None = None
    partner: Tensor | None = None

    def logits(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, images of their columns, and the target, of a batch of images (n,)."""
        z1, z2 = self.z1[index], self.z2[index]
        if self.share is None or self.partner is None:
            return *compact_logits(z1, z2), None
        place = index.new_full((len(self.z1),), -1)
        place[index] = torch.arange(len(index), device=index.device)
        target = mixed_target(self.share[index], place[self.partner[index]])
        return *mixed_logits(z1, z2), target


class Fitting(NamedTuple):
    """How scores are fitted: rate, epochs after which it is a fifth, epochs, images of a batch, and
    the epoch (from 0) after which it may end sooner."""

    rate: float = 0.5
    drops: tuple[int, ...] = (5, 35)
    epochs: int = 61
    batch: int = 3096
    least: int = 50


PLAIN = Fitting()
OFFLINE_MIXED = Fitting(batch=2048)
# Of mixed images that are embedded anew in each epoch (§2.4).
ONLINE_MIXED = Fitting(0.1, (5, 25), 31, 2048, least=25)


def fit_partition(
    embeddings: Callable[[int, Sequence[Tensor]], Embedded],
    scores: Tensor,
    how: Any,
    key: tuple[int, ...],
    fitting: Fitting = PLAIN,
    drop_last: bool = False,
    pulse: Callable[[str], object] = lambda message: None,
) -> Tensor:
    """Scores (N, K), whose softmax divides N images into the K subsets that contrast the worst.

    Args:
        embeddings: epoch and its batches of image numbers → the embedded images.
        scores: (N, K) to start from. how: `IPIRM.Options`. key: of the random order of batches.
        drop_last: leave out the images beyond the last full batch.
    """
    scores = scores.clone().requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=fitting.rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [*fitting.drops], 0.2)
    best, lowest, since = scores.detach().clone(), math.inf, 0
    temperatures = how.temperature, how.temperature if how.mixup_max else how.irm_temp
    for epoch in range(fitting.epochs):
        order = torch.randperm(len(scores), generator=keyed_generator(*key, epoch, ORDER))
        batches = [
            index
            for i, index in enumerate(order.to(scores.device).split(fitting.batch))
            if len(index) > 1 and not (drop_last and i and len(index) < fitting.batch)
        ]
        embedded = embeddings(epoch, batches)
        risks: list[Tensor] = []
        for index in batches:
            pulse(f"partition: epoch {epoch + 1} of {fitting.epochs}")
            p = scores[index].softmax(1)
            logits, image, target = embedded.logits(index)
            parts = [
                soft_loss(logits, image, k, temperatures, how.nonorm, target) for k in p.unbind(1)
            ]
            losses, penalties = (torch.stack(values).mean() for values in zip(*parts, strict=True))
            risk = imbalance(p, how.constrain, how.nonorm)
            risk = risk - losses - how.irm_weight_maxim * penalties
            optimizer.zero_grad()
            risk.backward()
            optimizer.step()
            risks.append(risk.detach())
        schedule.step()
        # Of several processes all end with the first: GPUs may round otherwise.
        mean = agree(torch.stack(risks).mean()).item()
        since += 1
        # As in the official code: the risk was measured before this epoch's steps, the scores are
        # those after them.
        if mean < lowest:
            best, lowest, since = scores.detach().clone(), mean, 0
        if epoch > fitting.least and since >= PATIENCE:
            break
    return best
