"""IP-IRM (docs/spec/siblings.md §2): contrast that is invariant over partitions of the data.

Every `maximize_iter` epochs the images are divided into `env_num` subsets so that the frozen
embeddings contrast as differently as can be within them (`fit_partition`, §2.3). In between the
network minimises, over all partitions P that are kept and their subsets k (§2.2),

    L = L_all + mean_{P,k} L_{P,k} + λ₁ mean_{P,k} Ω_{P,k}

with NT-Xent L_{P,k} among the images of a subset and the invariant-risk penalty Ω_{P,k}. With an
adversary the attack ascends L_all, and the adversarial loss is all of L with x′ for view 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.configs import ConfigError
from idaa_lib.configs.base import NonNegative, Positive, Rate
from idaa_lib.methods.base import (
    About,
    Batch,
    Moment,
    Step,
    Work,
    gather,
    register_method,
    similarity,
)
from idaa_lib.methods.simclr import SimCLR
from idaa_lib.nets.heads import Embedding, mlp
from idaa_lib.views import View, keyed_generator

Pulse = Callable[[str], object]
# Entropy in nats that a relaxed constraint asks of the shares of two subsets: that of 1 : 2.
BALANCE = 0.6365
BATCH = 3096  # images of a step of the maximisation
EPOCHS, PATIENCE = 61, 5  # of the maximisation; from epoch 51 on it stops without improvement
VIEWS, START, ORDER = 11, 13, 14  # streams of its random numbers


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
) -> Tensor:
    """Ω: the squared gradient, at 1, of the loss with respect to a factor of the logits (R, C).

    In closed form (§2.2): g_j = Σ_i a_i (q_ij − 1[j = 0]) s_ij, q = softmax(s + log w̃).

    Args:
        log_weights: (R, C), log w̃; None for 0. rows: (R,), the a_i; None for 1/R each.
        dummy: a factor for each column (`vector`), Ω = Σ g_j², or one (`scalar`), Ω = (Σ g_j)².
    """
    q = (logits if log_weights is None else logits + log_weights).softmax(1)
    q = torch.cat([q[:, :1] - 1, q[:, 1:]], 1)
    g = (q * logits).mean(0) if rows is None else rows @ (q * logits)
    return g.square().sum() if dummy == "vector" else g.sum().square()


def soft_loss(
    logits: Tensor, image: Tensor, shares: Tensor, temperatures: tuple[float, float], total: bool
) -> tuple[Tensor, Tensor]:
    """L_k and Ω_k (§2.3) of a subset that image i is in with the probability shares[i] (n,).

    Args:
        logits, image: as `compact_logits` gives them. temperatures: T of L_k, and that of Ω_k.
        total: the official `nonorm`: over 2n in place of the sum of shares.
    """
    rows = shares.repeat(2)  # (2n,)
    # A share that underflows would be log 0, whose gradient is not finite.
    negatives = shares.clamp(min=torch.finfo(shares.dtype).tiny)[image]  # (2n, 2n − 2)
    weights = negatives.log() - negatives.sum(1, keepdim=True).log() + math.log(image.shape[1])
    weights = F.pad(weights, (1, 0))  # the partner counts once
    s = logits / temperatures[0]
    losses = (s + weights).logsumexp(1) - s[:, 0]
    a = rows / rows.sum()
    loss = (rows * losses).mean() if total else a @ losses
    return loss, penalty(logits / temperatures[1], weights, a)


def imbalance(p: Tensor, constrain: str, total: bool) -> Tensor:
    """R (§2.3) of probabilities p (n, K): what keeps subsets from being empty."""
    entropy = -torch.special.xlogy(p.mean(0), p.mean(0)).sum()
    if constrain == "none":
        return entropy.new_zeros(())
    if constrain == "strict":
        return -entropy
    if total:
        return 0.2 * (-entropy - torch.special.xlogy(p, p).sum(1).mean())
    return (BALANCE - entropy).clamp(min=0)


def fit_partition(
    embeddings: Callable[[int], tuple[Tensor, Tensor]],
    scores: Tensor,
    how: Any,
    key: tuple[int, ...],
    drop_last: bool = False,
    pulse: Pulse = lambda message: None,
    batch: int = BATCH,
) -> Tensor:
    """Scores (N, K), whose softmax divides N images into the K subsets that contrast the worst.

    Args:
        embeddings: epoch → z of two views of all images, (N, D) each, L2-normalised.
        scores: (N, K) to start from. how: `IPIRM.Options`. key: of the random order of batches.
        drop_last: leave out the images beyond the last full batch.
    """
    scores = scores.clone().requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.5)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 35], 0.2)
    best, lowest, since = scores.detach().clone(), math.inf, 0
    temperatures = how.temperature, how.irm_temp
    for epoch in range(EPOCHS):
        z1, z2 = embeddings(epoch)
        order = torch.randperm(len(scores), generator=keyed_generator(*key, epoch, ORDER))
        risks: list[Tensor] = []
        for index in order.to(scores.device).split(batch):
            if len(index) < 2 or (drop_last and risks and len(index) < batch):
                continue
            pulse(f"partition: epoch {epoch + 1} of {EPOCHS}")
            p = scores[index].softmax(1)
            logits, image = compact_logits(z1[index], z2[index])
            parts = [soft_loss(logits, image, k, temperatures, how.nonorm) for k in p.unbind(1)]
            losses, penalties = (torch.stack(values).mean() for values in zip(*parts, strict=True))
            risk = imbalance(p, how.constrain, how.nonorm)
            risk = risk - losses - how.irm_weight_maxim * penalties
            optimizer.zero_grad()
            risk.backward()
            optimizer.step()
            risks.append(risk.detach())
        schedule.step()
        mean = torch.stack(risks).mean().item()
        since += 1
        if mean < lowest:  # of before the steps; the scores of after them, as the code has it
            best, lowest, since = scores.detach().clone(), mean, 0
        if epoch > 50 and since >= PATIENCE:
            break
    return best


# --- the method -----------------------------------------------------------------------------------


@register_method("ipirm")
class IPIRM(SimCLR):
    class Options(SimCLR.Options):
        """env_num: K. maximize_iter: epochs between two partitions. penalty_weight: λ₁;
        irm_weight_maxim: λ₂ of the maximisation. irm_temp: T of both penalties. constrain: balance
        of the subsets. retain_group: keep `all` partitions, `one`, or the last n. keep_cont: add
        L_all. random_init: scores start at random, not at the partition before. offline: views are
        embedded once a maximisation, not once an epoch of it. nonorm: sums over 2n. dummy: §2.2.
        baseline: L_all alone; debiased: τ⁺ of DCL's loss for it (§2.6)."""

        projection_dim: Positive = 128
        env_num: Annotated[int, Field(ge=2)] = 2
        maximize_iter: Positive = 50
        penalty_weight: NonNegative = 0.2
        irm_weight_maxim: NonNegative = 0.5
        irm_temp: Rate = 0.5
        constrain: Literal["relaxed", "strict", "none"] = "relaxed"
        retain_group: Literal["all", "one"] | Positive = "all"
        keep_cont: bool = True
        random_init: bool = True
        offline: bool = True
        nonorm: bool = False
        dummy: Literal["vector", "scalar"] = "vector"
        baseline: bool = False
        debiased: Annotated[float, Field(ge=0, lt=1)] = 0.0

    recordable = False  # data decide how large a subset is
    partitions: Tensor  # (capacity, N) uint8, of which the first are kept
    fitted: Tensor  # how many
    scores: Tensor  # (N, K) of the last partition

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        if options.constrain == "relaxed" and options.env_num != 2:
            raise ConfigError(
                f"env_num={options.env_num} needs constrain='strict' or 'none': the constant of "
                f"'relaxed' is for 2 subsets."
            )
        if options.debiased and not options.baseline:
            raise ConfigError(
                f"debiased={options.debiased:g} is a loss of the baseline alone: give "
                f"baseline=true too, or leave it out."
            )
        kept = options.retain_group
        most = -(-about.epochs // options.maximize_iter) + 1
        capacity = {"all": most, "one": 1}.get(kept, kept)
        if not options.baseline:
            shape = capacity, about.n
            self.register_buffer("partitions", torch.zeros(shape, dtype=torch.uint8))
            self.register_buffer("fitted", torch.zeros((), dtype=torch.long))
            if not options.random_init:
                self.register_buffer("scores", torch.zeros(about.n, options.env_num))
        self._present: Tensor | None = None

    def projector(self, features: int, dim: int) -> nn.Module:
        return self.conditioned(features, lambda inputs: mlp(inputs, 512, dim, bias=False))

    # --- minimisation -----------------------------------------------------------------------------

    def present(self) -> Tensor:
        """The partitions (P, N) that are kept at present."""
        if self._present is None:
            self._present = self.partitions[: int(self.fitted)]
        return self._present

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        if self.options.debiased:
            return debiased(z1, z2, self.options.temperature, self.options.debiased)
        return super().contrast(z1, z2)

    def objective(self, z1: Tensor, z2: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L of embeddings (B, D) of the images `index` (B,), and its parts to log."""
        own = self.options
        whole = self.contrast(z1, z2)
        if own.baseline:
            return whole, {}
        losses, penalties, small = [], [], 0
        for partition in self.present():
            sides = partition[index]
            for k in range(own.env_num):
                (rows,) = (sides == k).nonzero(as_tuple=True)
                if len(rows) < 2:
                    small += 1
                    continue
                logits, _ = compact_logits(z1[rows], z2[rows])
                s = logits / own.temperature
                losses.append((s.logsumexp(1) - s[:, 0]).mean())
                penalties.append(penalty(logits / own.irm_temp, dummy=own.dummy))
        if losses:
            subsets, omega = torch.stack(losses).mean(), torch.stack(penalties).mean()
        else:
            subsets = omega = whole.new_zeros(())
        loss = whole * own.keep_cont + subsets + own.penalty_weight * omega
        parts = {
            "contrast": whole,
            "subsets": subsets,
            "penalty": omega,
            "small_subsets": whole.new_full((), small),
        }
        return loss / max(1.0, own.penalty_weight), parts

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        v1, v2 = views
        index = gather(batch["images"])  # in the order that one process has (§2.2)
        e1, e2 = self.embed(v1), self.embed(v2)
        z1, z2 = gather(e1.z), gather(e2.z)  # (B, D) of all processes
        loss, parts = self.objective(z1, z2, index)

        def adversarial_loss(e: Embedding, v_adv: View) -> Tensor:
            return self.objective(gather(e.z), z2, index)[0]

        step = self.two_view_step(loss, views, (e1, e2), self.ascent(v1), adversarial_loss)
        step.parts |= {name: value.detach() for name, value in parts.items()}
        return step

    # --- maximisation -----------------------------------------------------------------------------

    def before_epoch(self, epoch: int, work: Work) -> None:
        """Before the first epoch and after every `maximize_iter` a partition is fitted (§2.3)."""
        own = self.options
        if own.baseline or epoch % own.maximize_iter:
            return
        key = self.about.seed, epoch

        def embed(number: int) -> tuple[Tensor, Tensor]:
            work.pulse(f"partition: views of {self.about.n} images are embedded")
            z1, z2 = (
                work.embed(
                    "projector",
                    transform=self.recipe,
                    generator=keyed_generator(*key, number, VIEWS + view),
                )
                for view in (0, 1)
            )
            return z1, z2

        if own.offline:
            both = embed(0)
            embeddings = lambda number: both  # noqa: E731
        else:
            embeddings = embed
        if own.random_init:
            generator = keyed_generator(*key, START)
            scores = torch.randn(self.about.n, own.env_num, generator=generator)
        else:
            scores = self.scores
        device = self.partitions.device
        scores = fit_partition(embeddings, scores.to(device), own, key, not own.offline, work.pulse)
        if not own.random_init:
            self.scores.copy_(scores)
        self.keep(scores.argmax(1))

    def keep(self, partition: Tensor) -> None:
        """Add a partition (N,); the oldest goes where there is no place."""
        if int(self.fitted) == len(self.partitions):
            self.partitions.copy_(self.partitions.roll(-1, 0))
            self.fitted -= 1
        self.partitions[int(self.fitted)] = partition
        self.fitted += 1
        self._present = None


def debiased(z1: Tensor, z2: Tensor, temperature: float, prior: float) -> Tensor:
    """DCL's loss (Chuang et al. 2020, arXiv:2007.00224; spec §2.6) of pairs z1, z2 (B, D).

    prior: τ⁺, the share of negatives that are of the anchor's class; 0 gives NT-Xent.
    """
    s = compact_logits(z1, z2)[0] / temperature
    n = s.shape[1] - 1
    positive, negatives = s[:, 0].exp(), s[:, 1:].exp().sum(1)
    others = (negatives - prior * n * positive) / (1 - prior)
    others = others.clamp(min=n * math.exp(-1 / temperature))
    return (torch.log(positive + others) - s[:, 0]).mean()
