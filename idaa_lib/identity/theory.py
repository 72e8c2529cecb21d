"""How much of an image's identity something still holds, in nats (docs/spec/idaa.md §6).

y says which of N images it is, each as likely: log N nats. Yang et al., ICML 2022, bound I(x′; y)
by the VAE's loss (Theorem 3.5); here are the terms of that bound. Images determine y as soon as no
two are alike, so of x, G(x), R(x) and x′ the question is another: how much of it can an observer
with finite means still use? `Retention` is that of a frozen encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import scipy  # scipy.stats, half a second to import, comes with its first use
import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.evaluate.metrics import bootstrap_interval, wilson_interval
from idaa_lib.nets.vae import VAE, rate
from idaa_lib.views import keyed_generator

BATCH = 256  # images that go through a VAE together
NOISE = 2  # a stream of random numbers


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
    mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """I(z; y) of N posteriors, mu and logvar (N, m), in nats, and its standard error (spec §6.2).

    A Monte-Carlo estimate over one z of each of E_i E_{z~q_i} [log q_i(z) − log (1/N) Σ_j q_j(z)],
    the exact aggregate. log q_i is replaced by its mean under p(j|z) ∝ q_j(z): the same
    expectation, a smaller variance, and never outside [0, log N].
    """
    mu, logvar = mu.double(), logvar.double()
    log_n = math.log(len(mu))
    log_q = log_densities(sample(mu, logvar, generator), mu, logvar)  # (N, N)
    mean = (log_q.softmax(1) * log_q).sum(1)
    gains = mean - log_q.logsumexp(1) + log_n
    gains = gains.clamp(0, log_n)  # beyond by rounding alone
    error = gains.std(unbiased=False).item() / math.sqrt(len(gains))
    return gains.mean().item(), error


def batch_bounds(
    mu: Tensor, logvar: Tensor, size: int, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Bounds on I(z; y) in nats, in expectation, from random batches of K = `size` posteriors.

    Lower: mean log q_i(z_i) / ((1/K) Σ_j q_j(z_i)), at most log K. Upper: the same, its own q_i
    left out of the mean (spec §6.3; Poole et al. 2019, arXiv:1905.06922, §2). Images beyond the
    last full batch are not used; K is within 2…N.
    """
    n = len(mu)
    z = sample(mu.double(), logvar.double(), generator)
    order = torch.randperm(n, generator=generator)[: n // size * size].to(mu.device)
    lower, upper = [], []
    for index in order.view(-1, size):
        log_q = log_densities(z[index], mu[index], logvar[index])  # (K, K)
        own = log_q.diagonal().clone()
        lower.append(own - log_q.logsumexp(1) + math.log(size))
        others = log_q.fill_diagonal_(-math.inf).logsumexp(1) - math.log(size - 1)
        upper.append(own - others)
    return torch.cat(lower).mean().item(), torch.cat(upper).mean().item()


def distortion(mse: float, size: int, step: Sequence[float] | None = None) -> float:
    """−E log q_D(x|z) in nats per image under N(G, s²I) with the best s² (spec §6.3).

    (3HW/2)(1 + log 2πs²), s² = `mse`, the mean squared error of images (3, size, size) at sampled
    z. Of continuous pixels it may be negative, and only differences between VAEs mean something.
    With `step`, the width of a pixel's values per channel in units of x (1/(255·std)), it is the
    code length of discrete pixels with uniform noise within their cells: never less than −E log of
    the cells' probability.
    """
    if step is None:
        return 1.5 * size**2 * (1 + math.log(2 * math.pi * mse))
    cells = size**2 * sum(math.log(width) for width in step)
    return distortion(mse + quantisation(step), size) - cells


def quantisation(step: Sequence[float]) -> float:
    """Variance of uniform noise within the cells of pixels, mean over channels of widths `step`."""
    return sum(width**2 for width in step) / len(step) / 12


def bound(
    n: int, distortion: float, rate: float, information: float, beta: float
) -> tuple[float, float]:
    """The right-hand side of Theorem 3.5 in nats, and what no β lifts it above: log N − rate.

    I(x′; y) ≥ I(x; y) − (L_VAE + I(z; x)) / β, where L_VAE = distortion + β·rate, and I(x; y) is
    log N of N ≥ 2 distinct images, on which I(z; x) = I(z; y) = `information`. It holds for ‖δ‖ ≤
    some ϵ that the theorem does not name; a bound of 0 or less is vacuous. The distortion is of
    discrete pixels (else H(x) ≥ 0, which the proof drops, fails), β of the loss at the same s².
    """
    if distortion < 0:
        raise ValueError(f"distortion of discrete pixels cannot be {distortion:g} nats.")
    limit = math.log(n) - rate
    return limit - (distortion + information) / beta if beta else -math.inf, limit


@torch.no_grad()
def read_latent(vae: VAE, x: Tensor, weight: float, seed: int) -> dict[str, Any]:
    """What z says of y, and Theorem 3.5's bound, of a VAE on images x (N, 3, H, W), by name.

    information, error (its standard error), rate, distortion, bound and limit are in nats; batches
    are (K, lower, upper) bounds on I(z; y). weight is the β that the VAE was trained with, for the
    NLL at unit variance; beta is that of the distortion's s² (spec §1: β ∝ 1/s²).
    """
    codes = [vae.encode(part) for part in x.split(BATCH)]
    mu, logvar = (torch.cat(parts) for parts in zip(*codes, strict=True))
    z = sample(mu, logvar, keyed_generator(seed, NOISE))
    G = torch.cat([vae.decode(part) for part in z.split(BATCH)])
    mse, n, size = (x - G).square().mean().item(), len(x), x.shape[-1]
    mu, logvar = mu.double().cpu(), logvar.double().cpu()
    nats, error = information(mu, logvar, keyed_generator(seed, NOISE, 1))
    sizes = [*(2**power for power in range(1, 10) if 2**power < n), n]
    batches = [(k, *batch_bounds(mu, logvar, k, keyed_generator(seed, NOISE, k))) for k in sizes]
    step = [1 / (255 * std) for std in vae.std or ()]
    beta, mean_rate = weight / (mse + quantisation(step)), rate(mu, logvar).mean().item()
    discrete = distortion(mse, size, step)
    nats_bound, limit = bound(n, discrete, mean_rate, nats, beta)
    return {
        "information": nats, "error": error, "batches": batches, "mse": mse, "rate": mean_rate,
        "distortion": discrete, "continuous_distortion": distortion(mse, size), "limit": limit,
        # JSON has no −∞, which the bound is at β = 0.
        "bound": nats_bound if math.isfinite(nats_bound) else None, "beta": beta,
        "vae_beta": weight,
    }  # fmt: skip


# Wide enough that the best is inside: from one candidate deciding to all alike.
TEMPERATURES = tuple(10 ** (exponent / 8) for exponent in range(-20, 9))  # 0.003 … 10


@dataclass(frozen=True)
class Retention:
    """What a frozen encoder still knows of which of N images each of n queries came from.

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

    def row(self) -> dict[str, float]:
        """Means over the queries, with 95 % intervals of `retrieved` and `infonce`.

        retrieved: retrieval@1 in percent. rank: mean rank. mrr: mean reciprocal rank, 1 at best.
        infonce: InfoNCE's lower bound on I(v; y) in nats (van den Oord et al. 2018,
        arXiv:1807.03748). fano: Fano's, from retrieval@1 alone. own, nearest: cosines. n: N.
        """
        ranks = self.ranks.double()
        hits, nats = wilson_interval(self.hits), bootstrap_interval(self.gains)
        means = {"rank": ranks, "mrr": 1 / ranks, "own": self.own, "nearest": self.nearest}
        row = {name: values.mean().item() for name, values in means.items()}
        row |= {"retrieved": hits.value, "low": hits.low, "high": hits.high, "n": self.n}
        row |= {"infonce": nats.value, "infonce_low": nats.low, "infonce_high": nats.high}
        return row | {"fano": fano(1 - hits.value / 100, self.n)}

    def among(self, k: int) -> float:
        """retrieval@1 in percent among k of 1…N candidates: the own image and k − 1 random others.

        Exact, without a draw: the own image comes first if none of the rank − 1 better ones of the
        N − 1 others is among the k − 1.
        """
        better = (self.ranks - 1).numpy()
        return 100 * float(scipy.stats.hypergeom.pmf(0, self.n - 1, better, k - 1).mean())


def retention(queries: Tensor, candidates: Tensor) -> Retention:
    """How well features (n, D) of images v_i find those of x_i, the i-th of candidates (N ≥ n, D).

    I(v; y) ≥ log N + E log p(y|v) for any p (Barber & Agakov); here it is a softmax of cosines.
    """
    a, b = (F.normalize(part.double().cpu(), dim=1) for part in (queries, candidates))
    cosine = a @ b.T  # (n, N)
    own = cosine.diagonal().clone()
    # Equal features may differ in the last bits of a matrix product.
    ranks = (cosine >= own[:, None] - 1e-9).sum(1)
    gains = torch.stack([own / tau - (cosine / tau).logsumexp(1) for tau in TEMPERATURES])
    gains += math.log(len(b))  # (temperatures, n)
    halves = torch.arange(len(a)) % 2 == 0
    best_gains = torch.empty_like(own)
    for half, other in ((halves, ~halves), (~halves, halves)):
        # A single query has no other half: it is judged at the τ that says nothing.
        best = gains[:, other].mean(1).argmax() if other.any() else -1
        best_gains[half] = gains[best, half]
    nearest = cosine.fill_diagonal_(-torch.inf).amax(1)
    return Retention(ranks, best_gains, own, nearest, len(b))


def fano(error: float, n: int) -> float:
    """Lower bound on I(v; y) in nats where a share e of answers among n alternatives is wrong:
    (1 − e) log n − h(e), h the binary entropy; 0 where that is negative."""
    return max(0.0, (1 - error) * math.log(n) - float(scipy.stats.entropy([error, 1 - error])))


def hardness(
    x: Tensor, x_adv: Tensor, z: Tensor, z_adv: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """How far a batch x_adv (B, 3, H, W) is from x, with the attacked encoder's z_adv, z (B, D):
    the rise of `loss` (two batches of embeddings → scalar, nats), and means over the images of the
    cosine of z and z_adv, and of the norms l2 and linf of x_adv − x in normalised units."""
    change = (x_adv - x).flatten(1)
    return {
        "rise": (loss(z, z_adv) - loss(z, z)).item(),
        "cosine": F.cosine_similarity(z, z_adv).mean().item(),
        "l2": change.norm(dim=1).mean().item(),
        "linf": change.abs().amax(1).mean().item(),
    }
