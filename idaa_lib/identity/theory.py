"""How much of an image's identity something still holds, in nats (docs/spec/idaa.md §6).

y says which of N images it is, each as likely: log N nats. Yang et al., ICML 2022, bound I(x′; y)
by the VAE's loss (Lemma 3.2, Theorem 3.5). Here are the terms of that bound, and what can be
measured instead.

Of a latent z ~ q(z|x_i) the information I(z; y) follows from the posteriors alone. Images determine
y as soon as no two are alike, so of x, G(x), R(x) and x′ the question is another: how much can an
observer with finite means still use? `Retention` is that of a frozen encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.evaluate.metrics import bootstrap_interval

# --- information in the latent ------------------------------------------------------------------


class Information(NamedTuple):
    """I(z; y) in nats, and the standard error of its Monte-Carlo estimate (at most, roughly)."""

    nats: float
    error: float


class BatchBounds(NamedTuple):
    """Bounds on I(z; y) in nats that see a batch at a time; each holds in expectation."""

    lower: float
    upper: float


def log_densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z_i; μ_j, σ_j²) for all pairs: z (M, m), mu and logvar (N, m) → (M, N) float64."""
    z, mu, logvar = z.double(), mu.double(), logvar.double()
    precision = (-logvar).exp()
    squares = z.square() @ precision.T - 2 * z @ (mu * precision).T
    constants = (mu.square() * precision + logvar + math.log(2 * math.pi)).sum(1)
    return -0.5 * (squares + constants)


def sample(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One z ~ N(μ_i, σ_i²) of each posterior, (N, m); the noise comes from the CPU."""
    noise = torch.randn(mu.shape, generator=generator, dtype=torch.float64)
    return mu + (0.5 * logvar).exp() * noise.to(mu)


def information(
    mu: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None = None,
    draws: int = 1,
    chunk: int = 1000,
) -> Information:
    """I(z; y) of N posteriors, mu and logvar (N, m), against their exact aggregate (spec §6.2).

    E_i E_{z~q_i} [log q_i(z) − log (1/N) Σ_j q_j(z)], where log q_i is replaced by its mean under
    p(j|z) ∝ q_j(z): the same expectation, a smaller variance, and never outside [0, log N].

    Args:
        draws: samples of each posterior. chunk: how many z are looked at together.
    """
    mu, logvar = mu.double(), logvar.double()
    n, values = len(mu), []
    for _ in range(draws):
        for z in sample(mu, logvar, generator).split(chunk):
            log_q = log_densities(z, mu, logvar)  # (chunk, N)
            mean = (log_q.softmax(1) * log_q).sum(1)
            values.append(mean - log_q.logsumexp(1) + math.log(n))
    gains = torch.cat(values).clamp(0, math.log(n))  # beyond by rounding alone
    error = gains.std(unbiased=False).item() / math.sqrt(len(gains))
    return Information(gains.mean().item(), error)


def batch_bounds(
    mu: Tensor, logvar: Tensor, size: int, generator: torch.Generator | None = None
) -> BatchBounds:
    """Bounds on I(z; y) from random batches of K = `size` posteriors (spec §6.3).

    Lower: mean log q_i(z_i) / ((1/K) Σ_j q_j(z_i)), at most log K. Upper: the same, its own q_i
    left out of the mean (Poole et al. 2019, arXiv:1905.06922, §2). Images beyond the last full
    batch are not used.

    Raises:
        ValueError: K is not within 2…N.
    """
    n = len(mu)
    if not 2 <= size <= n:
        raise ValueError(f"size of a batch must be from 2 to {n}, and is {size}.")
    z = sample(mu.double(), logvar.double(), generator)
    order = torch.randperm(n, generator=generator)[: n // size * size].to(mu.device)
    lower, upper = [], []
    for index in order.view(-1, size):
        log_q = log_densities(z[index], mu[index], logvar[index])  # (K, K)
        own = log_q.diagonal().clone()
        lower.append(own - log_q.logsumexp(1) + math.log(size))
        others = log_q.fill_diagonal_(-math.inf).logsumexp(1) - math.log(size - 1)
        upper.append(own - others)
    return BatchBounds(torch.cat(lower).mean().item(), torch.cat(upper).mean().item())


# --- Theorem 3.5 --------------------------------------------------------------------------------


def distortion(mse: float, size: int, step: Sequence[float] | None = None) -> float:
    """−E log q_D(x|z) in nats per image under N(G, s²I) with the best s² (spec §6.3).

    (3HW/2)(1 + log 2πs²), s² = `mse`, the mean squared error of images (3, size, size) at sampled
    z. Of continuous pixels it may be negative, and only differences between VAEs mean something.

    Args:
        step: width of a pixel's values per channel, in units of x (1/(255·std)). With it the result
            is of the discrete pixels: their code length with uniform noise within their cells. It
            is at least −E log of the cells' probability, and never negative.
    """
    if step is None:
        return 1.5 * size**2 * (1 + math.log(2 * math.pi * mse))
    cells = size**2 * sum(math.log(width) for width in step)
    return distortion(mse + quantisation(step), size) - cells


def quantisation(step: Sequence[float]) -> float:
    """Variance of uniform noise within the cells of pixels, mean over channels of widths `step`."""
    return sum(width**2 for width in step) / len(step) / 12


@dataclass(frozen=True)
class Bound:
    """The right-hand side of Theorem 3.5: I(x′; y) ≥ I(x; y) − (L_VAE + I(z; x)) / β, in nats.

    L_VAE = distortion + β·rate, I(x; y) = log N for N distinct images, and I(z; x) = I(z; y) on
    them. It holds for ‖δ‖ ≤ some ϵ that the theorem does not name.

    Args:
        n: N. distortion: −E log q_D(x|z) of discrete pixels (else H(x) ≥ 0, which the proof drops,
            fails). rate: R̄. information: I(z; x). beta: of the loss at the same variance s²
            (mse + `quantisation`).
    Raises:
        ValueError: the distortion is negative, or N < 2.
    """

    n: int
    distortion: float
    rate: float
    information: float
    beta: float

    def __post_init__(self) -> None:
        if self.distortion < 0:
            raise ValueError(f"distortion of discrete pixels cannot be {self.distortion:g} nats.")
        if self.n < 2:
            raise ValueError(f"n must be at least 2 images, and is {self.n}.")

    @property
    def nats(self) -> float:
        if self.beta == 0:
            return -math.inf
        return self.limit - (self.distortion + self.information) / self.beta

    @property
    def limit(self) -> float:
        """What no β can lift it above: log N − R̄."""
        return math.log(self.n) - self.rate

    @property
    def vacuous(self) -> bool:
        """No information is negative: a bound of 0 or less says nothing."""
        return self.nats <= 0


# --- identity that an observer can use ----------------------------------------------------------

# Wide enough that the best is inside: from one candidate deciding to all alike.
TEMPERATURES = tuple(10 ** (exponent / 8) for exponent in range(-20, 9))  # 0.003 … 10


@dataclass(frozen=True)
class Retention:
    """What a frozen encoder still knows of which image each of n queries came from.

    ranks: (n,) int64, place of the own image among N candidates, 1 is first; of equals it counts
    as the last, so an encoder that sees nothing finds nothing. gains: (n,) nats, each query's
    log N + log softmax_j(cos/τ) of its own image, τ being the best of the queries' other half.
    own, nearest: (n,) cosines to the own image and to the nearest other.
    """

    ranks: Tensor
    gains: Tensor
    own: Tensor
    nearest: Tensor
    n: int

    @property
    def hits(self) -> Tensor:
        """(n,) 100 where the own image comes first, else 0: percent once averaged."""
        return 100 * (self.ranks == 1).double()

    @property
    def retrieved(self) -> float:
        """retrieval@1 in percent."""
        return self.hits.mean().item()

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank, 1 at best."""
        return (1 / self.ranks.double()).mean().item()

    @property
    def infonce(self) -> float:
        """InfoNCE's lower bound on I(v; y) in nats (van den Oord et al. 2018, arXiv:1807.03748)."""
        return self.gains.mean().item()

    @property
    def fano(self) -> float:
        """Fano's lower bound on I(v; y) in nats, from retrieval@1 alone."""
        return fano(1 - self.retrieved / 100, self.n)

    def row(self) -> dict[str, float]:
        """All figures by name, those over images with their 95 % intervals."""
        _, low, high = bootstrap_interval(self.hits)
        _, infonce_low, infonce_high = bootstrap_interval(self.gains)
        return {
            "retrieved": self.retrieved, "low": low, "high": high, "mrr": self.mrr,
            "infonce": self.infonce, "infonce_low": infonce_low, "infonce_high": infonce_high,
            "fano": self.fano, "rank": self.ranks.double().mean().item(),
            "own": self.own.mean().item(), "nearest": self.nearest.mean().item(), "n": self.n,
        }  # fmt: skip

    def among(self, k: int) -> float:
        """retrieval@1 in percent among k candidates: the own image and k − 1 random others.

        Exact, without a draw: the own image comes first if none of the rank − 1 better ones of the
        N − 1 others is among the k − 1.

        Raises:
            ValueError: k is not within 1…N.
        """
        if not 1 <= k <= self.n:
            raise ValueError(f"k must be from 1 to {self.n} candidates, and is {k}.")
        better = (self.ranks - 1).numpy()
        return 100 * float(stats.hypergeom.pmf(0, self.n - 1, better, k - 1).mean())


def retention(queries: Tensor, candidates: Tensor) -> Retention:
    """How well features (n, D) of images v_i find those of x_i, the i-th of (N, D), by cosine.

    I(v; y) ≥ log N + E log p(y|v) for any p (Barber & Agakov); here it is a softmax of cosines.

    Raises:
        ValueError: there are fewer candidates than queries, or fewer than 2.
    """
    n, count = len(queries), len(candidates)
    if not 1 <= n <= count or count < 2:
        raise ValueError(f"{n} queries need as many candidates, 2 at least, not {count}.")
    a, b = (F.normalize(part.double().cpu(), dim=1) for part in (queries, candidates))
    cosine = a @ b.T  # (n, N)
    own = cosine.diagonal().clone()
    # Equal features may differ in the last bits of a matrix product.
    ranks = (cosine >= own[:, None] - 1e-9).sum(1)
    gains = torch.stack([own / tau - (cosine / tau).logsumexp(1) for tau in TEMPERATURES])
    gains += math.log(count)  # (temperatures, n)
    halves = torch.arange(n) % 2 == 0
    chosen = torch.empty_like(own)
    for half, other in ((halves, ~halves), (~halves, halves)):
        # A single query has no other half: it is judged at the τ that says nothing.
        best = gains[:, other].mean(1).argmax() if other.any() else -1
        chosen[half] = gains[best, half]
    nearest = cosine.fill_diagonal_(-torch.inf).amax(1)
    return Retention(ranks, chosen, own, nearest, count)


def fano(error: float, n: int) -> float:
    """Lower bound on I(v; y) in nats of an observer that errs in a share `error` of n alternatives.

    (1 − e) log n − h(e), h the binary entropy; 0 where that is negative.
    """
    return max(0.0, (1 - error) * math.log(n) - float(stats.entropy([error, 1 - error])))


class Hardness(NamedTuple):
    """How far x′ is from x: rise of the attacked loss (nats), and means over the images of the
    cosine of their embeddings, ‖x′ − x‖₂ and ‖x′ − x‖∞ (normalised units)."""

    rise: float
    cosine: float
    l2: float
    linf: float


def hardness(
    x: Tensor, x_adv: Tensor, z: Tensor, z_adv: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Hardness:
    """Of a batch x, x_adv (B, 3, H, W) with the attacked encoder's embeddings z, z_adv (B, D).

    loss: two batches of embeddings → scalar, what the attack ascends.
    """
    change = (x_adv - x).flatten(1)
    return Hardness(
        (loss(z, z_adv) - loss(z, z)).item(),
        F.cosine_similarity(z, z_adv).mean().item(),
        change.norm(dim=1).mean().item(),
        change.abs().amax(1).mean().item(),
    )
