"""Slow, obviously correct versions: the oracles of the tests, and what benchmarks stand beside.

Written from the papers, the published order of work (spec/idaa.md) and textbooks; imports nothing
of the library. A `network` is called as network(images (B, 3, H, W), adversarial=False) and gives
L2-normalised z (B, D); a `vae` has encode(x) → (μ, log σ²) and decode(z) → G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]

# --- networks, in functional form, from their state_dict


def batch_norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    """BatchNorm2d that updates nothing."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scale = weight / (variance + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]


def cifar_resnet18(state: State, x: Tensor, adversarial: bool, training: bool) -> Tensor:
    """ResNet-18 with the 3×3 stem, no pooling before the mean: (B, 3, H, W) → (B, 512)."""
    suffix = "_adv" if adversarial else ""

    def norm(name: str, y: Tensor) -> Tensor:
        return batch_norm(state, name + suffix, y, training)

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = norm(f"{at}.bn1", y).relu()
            y = norm(f"{at}.bn2", F.conv2d(y, state[f"{at}.conv2.weight"], padding=1))
            if stride == 2:
                x = F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=2)
                x = norm(f"{at}.shortcut_bn", x)
            x = (x + y).relu()
    return x.mean((2, 3))


def cifar_vae(state: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The 32 px VAE at z = μ: (B, 3, H, W) → G, μ, log σ² (spec §1)."""

    def norm(name: str, y: Tensor) -> Tensor:
        return batch_norm(state, name, y, training)

    def leaky(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, 0.01 * y)

    def residual(at: str, y: Tensor) -> Tensor:
        h = leaky(y)
        h = F.conv2d(h, state[f"{at}.convs.1.weight"], state[f"{at}.convs.1.bias"], padding=1)
        h = leaky(norm(f"{at}.convs.2", h))
        return y + F.conv2d(h, state[f"{at}.convs.4.weight"], state[f"{at}.convs.4.bias"])

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    h = norm("encoder.1", F.conv2d(x, state["encoder.0.weight"], stride=2, padding=1)).relu()
    h = norm("encoder.4", F.conv2d(h, state["encoder.3.weight"], stride=2, padding=1)).relu()
    h = residual("encoder.8", norm("encoder.7", residual("encoder.6", h)))
    mu, logvar = linear("fc11", h.flatten(1)), linear("fc12", h.flatten(1))
    h = linear("fc21", mu).reshape(h.shape)
    h = residual("decoder.2", norm("decoder.1", residual("decoder.0", h)))
    h = F.conv_transpose2d(norm("decoder.3", h), state["decoder.4.weight"], stride=2, padding=1)
    h = F.conv_transpose2d(
        leaky(norm("decoder.5", h)), state["decoder.7.weight"], stride=2, padding=1
    )
    return norm("bn", h.tanh()), mu, logvar


def vae_loss(x: Tensor, G: Tensor, mu: Tensor, logvar: Tensor, kappa: float) -> float:
    """L_rec + κ·L_KL, element by element, the stray 3 of the KL's divisor included (spec §1)."""
    reconstruction = sum((a - b) ** 2 for a, b in zip(x.flatten(), G.flatten(), strict=True))
    kl = 0.0
    for m, v in zip(mu.flatten().tolist(), logvar.flatten().tolist(), strict=True):
        kl -= 0.5 * (1 + v - m**2 - math.exp(v))
    batch, dim = mu.shape
    return float(reconstruction) / x.numel() + kappa * kl / (batch * 3 * dim)


# --- SimCLR and the attacks


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, Eq. 1), pair by pair; z1, z2 (B, D) L2-normalised."""
    z, n = torch.cat([z1, z2]), len(z1)
    total = z.new_zeros(())
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        positive = torch.exp(z[i] @ z[partner] / temperature)
        terms = [torch.exp(z[i] @ z[j] / temperature) for j in range(2 * n) if j != i]
        total = total - torch.log(positive / torch.stack(terms).sum())
    return total / (2 * n)


def idaa(
    network: Callable[..., Tensor],
    vae: nn.Module,
    x: Tensor,
    epsilon: float,
    temperature: float,
    contrast: Callable[[Tensor, Tensor, float], Tensor] = nt_xent,
) -> Tensor:
    """x′ by the published order of work, steps 2–5 of spec §2. Leaves `.grad`s behind."""
    a = network(x, adversarial=True)
    vae.eval()
    with torch.no_grad():
        zeta = vae.encode(x)[0]
        R = x - vae.decode(zeta)
    leaf = zeta.clone().requires_grad_()
    b = network(vae.decode(leaf) + R, adversarial=True)
    contrast(a, b, temperature).backward()
    with torch.no_grad():
        return vae.decode(zeta + epsilon * leaf.grad.sign()) + R


def clae(network: Callable[..., Tensor], x: Tensor, epsilon: float, temperature: float) -> Tensor:
    """x′ by CLAE's order of work (spec §3). Leaves `.grad`s behind."""
    a = network(x, adversarial=True)
    leaf = x.clone().requires_grad_()
    nt_xent(a, network(leaf, adversarial=True), temperature).backward()
    return x + epsilon * leaf.grad.sign()


def simclr_step(
    network: nn.Module,
    x_i: Tensor,
    x_j: Tensor,
    attack: Callable[[Tensor], Tensor],
    alpha: float,
    temperature: float,
    contrast: Callable[[Tensor, Tensor, float], Tensor] = nt_xent,
) -> tuple[Tensor, Tensor]:
    """Total loss and x′ of one step (spec §2, steps 1–6); the parameters' `.grad` is its gradient.

    attack: x → x′, as `idaa` or `clae` above, bound to the network.
    """
    network.zero_grad()
    z_i = network(x_i)
    x_adv = attack(x_i)
    network.zero_grad()
    z_j = network(x_j)
    loss = contrast(z_i, z_j, temperature)
    loss = loss + alpha * contrast(z_i, network(x_adv, adversarial=True), temperature)
    loss.backward()
    return loss.detach(), x_adv


def simclr_rates(epochs: int, rate: float = 3e-4) -> list[float]:
    """Learning rate of each epoch: cosine, stepped after an epoch only if its index exceeds 10."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if epoch > 10:
            cosine.step()
    return rates


# --- the other methods' losses, sample by sample


def one_way(f1: Tensor, f2: Tensor, temperature: float) -> Tensor:
    """Plain's CL(x₁, x₂) (spec §4); f1, f2 (B, D) L2-normalised."""
    total = f1.new_zeros(())
    for i in range(len(f1)):
        terms = [torch.exp(f1[i] @ f2[j] / temperature) for j in range(len(f2))]
        total = total - torch.log(terms[i] / torch.stack(terms).sum())
    return total / len(f1)


def spreading(f1: Tensor, f2: Tensor, temperature: float) -> Tensor:
    """UEL's loss (spec §4); f1, f2 (B, D) L2-normalised; no gradient by the columns."""
    f, n = torch.cat([f1, f2]), len(f1)
    total = f.new_zeros(())
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        e = {j: torch.exp(f[i] @ f[j].detach() / temperature) for j in range(2 * n) if j != i}
        p = {j: value / torch.stack([*e.values()]).sum() for j, value in e.items()}
        total = total + torch.log(p[partner])
        for j in p.keys() - {partner}:
            total = total + torch.log(1 - p[j])
    return -total / (2 * n)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) of SimSiam (Eq. 1) for rows (B, D) of any length; z is held."""
    rows = [a @ b / (a.norm() * b.norm()) for a, b in zip(p, z.detach(), strict=True)]
    return -torch.stack(rows).mean()


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo, Eq. 1: q, k (B, D) and queue (K, D), L2-normalised."""
    total = q.new_zeros(())
    for query, key in zip(q, k, strict=True):
        positive = torch.exp(query @ key / temperature)
        negatives = [torch.exp(query @ negative / temperature) for negative in queue]
        total = total - torch.log(positive / (positive + torch.stack(negatives).sum()))
    return total / len(q)


def ascend_latent(
    loss: Callable[[Tensor], Tensor], vae: nn.Module, x: Tensor, epsilon: float
) -> Tensor:
    """IDAA's x′ for any loss of it: steps 3–5 of spec §2."""
    vae.eval()
    with torch.no_grad():
        zeta = vae.encode(x)[0]
        R = x - vae.decode(zeta)
    leaf = zeta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(vae.decode(leaf) + R), leaf)
    with torch.no_grad():
        return vae.decode(zeta + epsilon * gradient.sign()) + R


def ascend_pixels(loss: Callable[[Tensor], Tensor], x: Tensor, epsilon: float) -> Tensor:
    """CLAE's x′ for any loss of it (spec §3)."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return x + epsilon * gradient.sign()


def random_signs(vae: nn.Module, x: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """x′ of IDAA's control: each coordinate of δ is ±ε, by the toss of a fair coin."""
    vae.eval()
    with torch.no_grad():
        zeta = vae.encode(x)[0]
        heads = (torch.rand(zeta.shape, generator=generator) > 0.5).to(x)
        return vae.decode(zeta + epsilon * (2 * heads - 1)) + (x - vae.decode(zeta))


# --- evaluation


def knn(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, temperature: float
) -> list[int]:
    """Weighted kNN, one query at a time (Wu et al. 2018, §3.4)."""
    predictions = []
    for query in queries.double():
        cosines = [
            (F.cosine_similarity(query, row, dim=0).item(), label)
            for row, label in zip(bank.double(), labels.tolist(), strict=True)
        ]
        scores = [0.0] * classes
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            scores[label] += math.exp(cosine / temperature)
        predictions.append(max(range(classes), key=scores.__getitem__))
    return predictions


def official_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, epochs: int, seed: int
) -> list[float]:
    """Accuracy (percent) after each epoch of full-batch Adam at 3e-4 from torch's Linear init."""
    torch.manual_seed(seed)
    layer = nn.Linear(train[0].shape[1], classes)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, foreach=False)
    curve = []
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(layer(train[0]), train[1]).backward()
        optimizer.step()
        hits = [layer(x).argmax().item() == y.item() for x, y in zip(*test, strict=True)]
        curve.append(100 * sum(hits) / len(hits))
    return curve


Update = Callable[[str, Tensor, Tensor, float], Tensor]  # name, parameter, gradient, rate → new


def sgd(decay: float = 0.0, nesterov: bool = False, trust: float = 0.0) -> Update:
    """SGD with momentum .9, or LARS where there is `trust`, by the definition."""
    speeds: dict[str, Tensor] = {}

    def update(name: str, p: Tensor, g: Tensor, rate: float) -> Tensor:
        g = g + decay * p
        if trust and p.norm() > 0 and g.norm() > 0:
            g = trust * p.norm() / g.norm() * g
        speeds[name] = 0.9 * speeds.get(name, torch.zeros_like(p)) + g
        return p - rate * (g + 0.9 * speeds[name] if nesterov else speeds[name])

    return update


def adam(decay: float) -> Update:
    """Adam (Kingma & Ba 2015, Algorithm 1) with the decay added to the gradient."""
    means: dict[str, tuple[int, Tensor, Tensor]] = {}

    def update(name: str, p: Tensor, g: Tensor, rate: float) -> Tensor:
        g = g + decay * p
        t, m, v = means.get(name, (0, torch.zeros_like(p), torch.zeros_like(p)))
        t, m, v = t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        means[name] = t, m, v
        return p - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    return update


def softmax_regression(
    w: Tensor,
    b: Tensor,
    epochs: list[tuple[float, list[tuple[Tensor, Tensor]]]],
    update: Update,
) -> list[tuple[Tensor, Tensor, float]]:
    """Weights (C, D), biases (C,) and the mean loss of each epoch: its rate, and its batches of
    features and labels; by the closed gradient of the cross-entropy."""
    after = []
    for rate, batches in epochs:
        losses = []
        for z, y in batches:
            s = z @ w.T + b
            losses.append((s.logsumexp(1) - s[torch.arange(len(y)), y]).mean().item())
            error = (s.softmax(1) - F.one_hot(y, len(b))) / len(y)
            w, b = update("w", w, error.T @ z, rate), update("b", b, error.sum(0), rate)
        after.append((w, b, sum(losses) / len(losses)))
    return after


def bootstrap(correct: Tensor, draws: int, generator: torch.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean of `correct` (n,), in percent, by resampling."""
    n = len(correct)
    index = torch.randint(n, (draws, n), generator=generator)
    means = 100 * correct.double()[index].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred (N, D)."""
    singular = torch.linalg.svdvals(features.double() - features.double().mean(0))
    p = (singular / singular.sum()).tolist()
    return math.exp(-sum(v * math.log(v) for v in p if v > 0))


def probe_weights(scores: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Weights (D + 1, C), the bias last, of a linear function of features (N, D), read from it."""
    mean, std = x.mean(0), x.std(0)
    first, *rest = scores(torch.cat([mean[None], mean + std.diag()]))
    weights = (torch.stack(rest) - first) / std[:, None]
    return torch.cat([weights, (first - mean.to(weights) @ weights)[None]])


def predict(weights: Tensor, x: Tensor) -> Tensor:
    """Classes (Q,) of features (Q, D) under weights (D + 1, C)."""
    return (x @ weights[:-1] + weights[-1]).argmax(1)


def barlow(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Barlow Twins, Eq. 1 and 2, entry by entry."""
    n, d = z1.shape
    total = z1.new_zeros(())
    for i in range(d):
        for j in range(d):
            c = sum(z1[b, i] * z2[b, j] for b in range(n)) / n
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total


def descriptor(params: dict[str, Tensor], i: int, keys: Sequence[str], jitter: Sequence[float]):
    """ω of sample i as a list (docs/spec/siblings.md §1.2), for strengths of at most 1."""
    H, W = params["source"][i].tolist()
    top, left, h, w = params["crop"][i].tolist()
    flip = params["flip"][i].item() == 1
    cx = (left + w / 2) / W
    b, c, s, hue = params["color"][i].tolist()
    values = {
        "blur": params["blur"][i].tolist(),
        "color": [
            (b - 1) / (2 * jitter[0]),
            (c - 1) / (2 * jitter[1]),
            (s - 1) / (2 * jitter[2]),
            hue / (2 * jitter[3]),
        ],
        "color_diff": params["color_diff"][i].tolist(),
        "crop": [(top + h / 2) / H, 1 - cx if flip else cx, h / H, w / W],
        "flip": params["flip"][i].tolist(),
        "grayscale": params["gray"][i].tolist(),
    }
    return [number for key in sorted(keys) for number in values[key]]


def augself(
    heads: Mapping[str, nn.Module], weights: Mapping[str, float], h: Sequence[Tensor],
    params: Sequence[dict[str, Tensor]], jitter: Sequence[float],
) -> Tensor:  # fmt: skip
    """Σ λ_k L_k of AugSelf (spec siblings.md §1.5), pair by pair, both orders."""
    pairs = [(a, b, i) for a, b in ((0, 1), (1, 0)) for i in range(len(h[0]))]
    rows = torch.stack([torch.cat([h[a][i], h[b][i]]) for a, b, i in pairs])
    total = h[0].new_zeros(())
    for name, weight in weights.items():
        output = heads[name](rows)
        errors = []
        for y, (a, b, i) in zip(output, pairs, strict=True):
            p1, p2 = params[a], params[b]
            flips = [p["flip"][i].item() for p in (p1, p2)]
            if name == "flip":
                sign = 1 if flips[0] == flips[1] else -1
                errors.append(-F.logsigmoid(sign * y[0]))
                continue
            if name == "crop":  # x in the frame of a, both unflipped else
                copies = [dict(p, flip=torch.zeros_like(p["flip"])) for p in (p1, p2)]
                crops = [descriptor(p, i, ["crop"], jitter) for p in copies]
                target = [u - v for u, v in zip(*crops, strict=True)]
                target[1] *= -1 if flips[0] else 1
            elif name == "color":
                colors = [descriptor(p, i, ["color"], jitter) for p in (p1, p2)]
                target = [u - v for u, v in zip(*colors, strict=True)]
            else:
                target = [p1["blur"][i].item() - p2["blur"][i].item()]
            errors += [(torch.tanh(u) - v) ** 2 for u, v in zip(y, target, strict=True)]
        total = total + weight * torch.stack(errors).mean()
    return total


def rsa_beta(beta0: float, s: int, steps: int) -> float:
    """β of RSA at step s = 1…S (docs/spec/siblings.md §3.2)."""
    return beta0 * (1 + math.cos(math.pi * s / steps)) / 2


def compact_rows(z1: Tensor, z2: Tensor) -> list[tuple[int, list[int]]]:
    """Of each of 2n rows: its partner, and the negatives in index order (spec siblings.md §2.2)."""
    n = len(z1)
    rows = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        rows.append((partner, [j for j in range(2 * n) if j not in (i, partner)]))
    return rows


def irm_penalty(z1: Tensor, z2: Tensor, temperature: float, dummy: str = "vector") -> Tensor:
    """Ω of IP-IRM by differentiating twice: the gradient with respect to a factor w = 1 of each
    column, or of all, summed and squared (spec siblings.md §2.2)."""
    z, rows = torch.cat([z1, z2]), compact_rows(z1, z2)
    s = torch.stack([torch.stack([z[i] @ z[j] for j in (p, *others)])
                     for i, (p, others) in enumerate(rows)]) / temperature  # fmt: skip
    w = torch.ones(s.shape[1] if dummy == "vector" else 1, dtype=s.dtype, requires_grad=True)
    target = torch.zeros(len(s), dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(w * s, target)
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    return g.square().sum()


def ip_irm(
    z1: Tensor, z2: Tensor, index: Tensor, partitions: Tensor, temperature: float,
    irm_temp: float = 0.5, penalty_weight: float = 0.2,
) -> Tensor:  # fmt: skip
    """L of IP-IRM: L_all and the means over partitions and subsets (spec siblings.md §2.2)."""
    losses, penalties = [], []
    for partition in partitions:
        for k in range(2):
            rows = [i for i, image in enumerate(index.tolist()) if partition[image] == k]
            if len(rows) > 1:
                losses.append(nt_xent(z1[rows], z2[rows], temperature))
                penalties.append(irm_penalty(z1[rows], z2[rows], irm_temp))
    total = nt_xent(z1, z2, temperature)
    return total + sum(losses) / len(losses) + penalty_weight * sum(penalties) / len(penalties)


def mixup(x: Tensor, draws: Tensor) -> tuple[Tensor, float, list[int]]:
    """Images (n, 3, H, W) mixed, the mean of λ, and the partners (spec siblings.md §2.4).

    draws: (n, 2): u, of which λ is the larger part, and ranks, whose order gives the partners.
    """
    shares = [max(u, 1 - u) for u in draws[:, 0].tolist()]
    ranks = draws[:, 1].tolist()
    partners = sorted(range(len(x)), key=ranks.__getitem__)
    pairs = zip(shares, partners, strict=True)
    images = [s * x[i] + (1 - s) * x[j] for i, (s, j) in enumerate(pairs)]
    return torch.stack(images), sum(shares) / len(shares), partners


def mixed_loss(s: Tensor, share: float, partners: list[int]) -> Tensor:
    """λ̄ CE(own column) + (1 − λ̄) CE(partner's column) of logits (n, n)."""
    own = partner = s.new_zeros(())
    for i, j in enumerate(partners):
        total = torch.stack([value.exp() for value in s[i]]).sum()
        own = own - torch.log(s[i, i].exp() / total)
        partner = partner - torch.log(s[i, j].exp() / total)
    return (share * own + (1 - share) * partner) / len(s)


def mixed_contrast(
    z1: Tensor, z2: Tensor, temperature: float, share: float, partners: list[int]
) -> tuple[Tensor, Tensor]:
    """L and Ω of mixed images; Ω by differentiating twice, a factor 1 for each column."""
    s = z1 @ z2.T / temperature
    w = torch.ones(len(s), dtype=s.dtype, requires_grad=True)
    (g,) = torch.autograd.grad(mixed_loss(w * s, share, partners), w, create_graph=True)
    return mixed_loss(s, share, partners), g.square().sum()


def ip_irm_mixed(
    embed1: Callable[[Tensor], Tensor], embed2: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor,
    index: Tensor, partitions: Tensor, draws: Tensor, temperature: float,
    penalty_weight: float = 0.2, one: bool = False,
) -> Tensor:  # fmt: skip
    """L of IP-IRM with mixup (spec siblings.md §2.4): L_all, and a sum over partitions, of which
    alone λ₁ > 1 divides; all of it where `one` partition is kept.

    draws: (B, 1 + P, 2): for the batch, then for each partition.
    """

    def contrast(rows: list[int], slot: int) -> tuple[Tensor, Tensor]:
        images, share, partners = mixup(x1[rows], draws[rows, slot])
        return mixed_contrast(embed1(images), embed2(x2)[rows], temperature, share, partners)

    divisor = max(1.0, penalty_weight)
    loss = contrast([*range(len(x1))], 0)[0] / (divisor if one else 1.0)
    for slot, partition in enumerate(partitions, 1):
        sides = [[i for i, image in enumerate(index.tolist()) if partition[image] == k]
                 for k in range(2)]  # fmt: skip
        values = [contrast(rows, slot) for rows in sides if len(rows) > 1]
        for value, omega in values:
            loss = loss + (value + penalty_weight * omega) / len(values) / divisor
    return loss


def soft_mixed_subset(
    z1: Tensor, z2: Tensor, p: Tensor, temperature: float, shares: list[float], partners: list[int]
) -> tuple[Tensor, Tensor]:
    """L_k and Ω_k of a subset of mixed images, each by its own λ, element by element (spec
    siblings.md §2.4)."""
    n, s = len(z1), z1 @ z2.T / temperature

    def loss(s: Tensor) -> Tensor:
        total = s.new_zeros(())
        for i in range(n):
            others = sum(p[j] for j in range(n) if j != i)
            w = [(n - 1) * p[j] / others if j != i else p.new_ones(()) for j in range(n)]
            terms = [w[j] * s[i, j].exp() for j in range(n)]
            own, partner = (-(terms[j] / sum(terms)).log() for j in (i, partners[i]))
            total = total + p[i] * (shares[i] * own + (1 - shares[i]) * partner)
        return total / p.sum()

    dummy = torch.ones(n, dtype=s.dtype, requires_grad=True)
    (g,) = torch.autograd.grad(loss(dummy * s), dummy, create_graph=True)
    return loss(s), g.square().sum()


def debiased(z1: Tensor, z2: Tensor, temperature: float, prior: float) -> Tensor:
    """DCL's loss, row by row (spec siblings.md §2.6)."""
    z, total = torch.cat([z1, z2]), z1.new_zeros(())
    rows = compact_rows(z1, z2)
    for i, (partner, others) in enumerate(rows):
        positive = torch.exp(z[i] @ z[partner] / temperature)
        negatives = sum(torch.exp(z[i] @ z[j] / temperature) for j in others)
        n = len(others)
        g = (-prior * n * positive + negatives) / (1 - prior)
        g = torch.clamp(g, min=n * math.exp(-1 / temperature))
        total = total - torch.log(positive / (positive + g))
    return total / len(rows)


def soft_subset(
    z1: Tensor, z2: Tensor, p: Tensor, temperature: float, irm_temp: float, total: bool
) -> tuple[Tensor, Tensor]:
    """L_k and Ω_k of a subset that image i is in with probability p[i], by exponentials as they
    stand in spec siblings.md §2.3, and Ω_k by differentiating twice."""
    n, z, rows = len(z1), torch.cat([z1, z2]), compact_rows(z1, z2)
    places = torch.tensor([[partner, *others] for partner, others in rows])
    s = (z @ z.T).gather(1, places)
    negatives = p[places[:, 1:] % n]
    w = (2 * n - 2) * negatives / negatives.sum(1, keepdim=True)
    w = torch.cat([torch.ones_like(w[:, :1]), w], 1)
    a = p.repeat(2)

    def loss(s: Tensor, divisor: Tensor | float) -> Tensor:
        terms = w * s.exp()
        return (a * -(s[:, 0].exp() / terms.sum(1)).log()).sum() / divisor

    dummy = torch.ones(s.shape[1], dtype=s.dtype, requires_grad=True)
    (g,) = torch.autograd.grad(loss(dummy * s / irm_temp, a.sum()), dummy, create_graph=True)
    return loss(s / temperature, 2 * n if total else a.sum()), g.square().sum()


def ip_irm_maximisation(
    z1: Tensor, z2: Tensor, scores: Tensor, orders: Callable[[int], Tensor], batch: int,
    temperature: float, irm_temp: float, irm_weight: float, constrain: str, total: bool = False,
) -> Tensor:  # fmt: skip
    """Scores (N, K) that IP-IRM's maximisation ends with, step by step (spec siblings.md §2.3).

    Adam and its schedule by hand. orders: epoch → the order of the N images in it.
    """
    scores, steps, rate = scores.clone(), 0, 0.5
    m, v = torch.zeros_like(scores), torch.zeros_like(scores)
    minimum, best, stalls = math.inf, scores, 0
    for epoch in range(61):
        if epoch in (5, 35):
            rate *= 0.2
        risks = []
        for index in orders(epoch).split(batch):
            leaf = scores.clone().requires_grad_()
            p = leaf[index].softmax(1)
            risk = p.new_zeros(())
            for k in range(scores.shape[1]):
                values = soft_subset(z1[index], z2[index], p[:, k], temperature, irm_temp, total)
                risk = risk - (values[0] + irm_weight * values[1]) / scores.shape[1]
            mean = p.mean(0)
            entropy = -(mean * mean.log()).sum()
            if constrain == "strict":
                risk = risk - entropy
            if constrain == "relaxed":
                risk = risk + torch.clamp(0.6365 - entropy, min=0)
            (gradient,) = torch.autograd.grad(risk, leaf)
            steps += 1
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            step = (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
            scores = scores - rate * step
            risks.append(risk.item())
        stalls += 1
        if sum(risks) / len(risks) < minimum:
            minimum, best, stalls = sum(risks) / len(risks), scores, 0
        if epoch > 50 and stalls >= 5:
            break
    return best
