"""The study of notebook 08: how much identity z, G, R and x′ hold on a user's own data.

`study` measures (docs/spec/idaa.md §6, by `theory`) and writes a run; figures and `sentences` are
made from its summary alone, so that a finished study is shown again without its networks.

Identity is judged by the *witness*, a frozen encoder that was not attacked: does it find x among
other views of N images, given x, G(x), R(x) or an x′? And by linear probes on their pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from idaa_lib import checkpoints, runs, theory
from idaa_lib.configs import ConfigError, DecomposeConfig, TheoryConfig, UserError
from idaa_lib.environment import describe, open_images, settled, torch_device
from idaa_lib.evaluate.encoders import load_vae
from idaa_lib.evaluate.linear import choose, predict
from idaa_lib.images import ImageSet
from idaa_lib.lab import plots
from idaa_lib.lab.decompose import (
    ADVERSARIES,
    UNTRAINED,
    Pictures,
    Scene,
    attacked_encoder,
    pictures,
    witness,
)
from idaa_lib.lab.engine import radius
from idaa_lib.lab.style import COLOURS, INK, NAMES, PALETTE
from idaa_lib.methods.simclr import against, nt_xent
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import VAE, rate
from idaa_lib.runs import Run
from idaa_lib.theory import Bound, Hardness, Retention, interval, retention
from idaa_lib.views import Recipe, keyed_generator, normalise, recipe

PARTS = ("x", "G", "R")
LABELS = {"x": "x", "G": "G(x)", "R": "R(x)"}
BATCH = 256  # images that are attacked together, as in training: they are each other's negatives
TEMPERATURE = 0.5  # of the attacked loss, SimCLR's own
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a part that is exchanged between two images
# Linear probes on pixels: a coarse grid, which is enough to compare parts.
PENALTIES, ITERATIONS = (1e-3, 1e-2, 1e-1, 1.0, 10.0), 50
# Instance probe: so many images, and views of each to learn, to choose the penalty, to judge.
INSTANCES, LEARNT, JUDGED = 60, 3, 4
VAES = 8  # of one axis at most, the newest
# Streams of random numbers beside the images' own order.
CANDIDATES, NOISE, HALVES, INSTANCE_VIEWS = 1, 2, 3, 4


@dataclass(frozen=True)
class Point:
    """An adversary at one ε: hardness (losses in nats, distances in normalised units) and identity.

    retrieved: percent of the x′ whose x the witness finds among n, with its 95 % interval;
    infonce and fano: lower bounds in nats; consistency: percent of the x′ that a linear classifier
    on the witness gives the class that it gives x (None: the images have no labels).
    """

    epsilon: float
    loss_before: float
    loss_after: float
    cosine: float
    l2: float
    linf: float
    retrieved: float
    low: float
    high: float
    mrr: float
    infonce: float
    infonce_low: float
    infonce_high: float
    fano: float
    n: int
    consistency: float | None = None


# --- the study ----------------------------------------------------------------------------------


class _Plan(NamedTuple):
    config: TheoryConfig
    run: Run
    shown: Pictures
    embed: Callable[[Tensor], Tensor]
    witness: Callable[[Tensor], Tensor]
    data: ImageSet
    train: ImageSet
    others: dict[str, list[Run]]


def locate(config: TheoryConfig) -> Run:
    """The run directory that `config` leads to, whether it was studied yet or not."""
    return _plan(config).run


def study(config: TheoryConfig) -> Run:
    """Measure what `config` describes; a finished study is given back as it is.

    Raises:
        RunError: there is no finished VAE run. ConfigError: the images or the encoders do not fit.
    """
    plan = _plan(config)
    run = plan.run
    if run.finished:
        print(f"{run.id} is finished: showing its result.")
        return run
    about = describe(plan.shown.x.device, "no", plan.data)
    with run.writing(plan.config, about) as writer, torch.no_grad():
        began = time.monotonic()
        writer.finish(_measure(plan) | {"seconds": time.monotonic() - began})
    return run


def _plan(config: TheoryConfig) -> _Plan:
    n, device = config.images, torch_device(config.device)
    shown = pictures(
        DecomposeConfig(
            vae=config.vae, dataset=config.dataset, split=config.split, seed=config.seed,
            images=min(n, BATCH),
        )
    )  # fmt: skip
    x = torch.cat([shown.x, shown.pool])[:n]
    if len(x) < n:
        raise ConfigError(f"images={n} is more than the {len(x)} of split={config.split!r}.")
    shown = replace(shown, x=x.to(device), pool=x[:0], vae=shown.vae.to(device))
    attacked, embed = attacked_encoder(shown, config.run)
    judge, see = witness(shown, attacked, config.witness)
    trained = shown.run.config
    dataset = settled(config.dataset or trained.dataset)
    config = config.model_copy(
        update={
            "vae": shown.run.reference, "run": attacked, "witness": judge, "dataset": dataset,
        }
    )  # fmt: skip
    data = open_images(dataset, config.split, trained.size, None)
    train = open_images(dataset, "train", trained.size, config.limit)
    others = siblings(shown.run)
    listed = "".join(checkpoints.digest(run) for axis in others.values() for run in axis)
    run = runs.run_for(
        config,
        data.fingerprint,
        vae=checkpoints.digest(shown.run),
        train=train.fingerprint,
        others=hashlib.sha256(listed.encode()).hexdigest(),
        **{
            role: None if name == UNTRAINED else checkpoints.digest(runs.get("ssl", name))
            for role, name in (("run", attacked), ("witness", judge))
        },
    )
    return _Plan(config, run, shown, embed, see, data, train, others)


def siblings(run: Run) -> dict[str, list[Run]]:
    """Finished VAE runs on the same images that differ from `run` in β alone, and in dim alone.

    The newest `VAES` of each by ascending value, `run` itself among them.
    """
    found = {"beta": [run], "dim": [run]}
    for other in runs.find("vae", dataset=run.config.dataset, size=run.config.size):
        if (axis := _axis(run, other)) and len(members := found[axis]) < VAES:
            known = {getattr(member.config, axis) for member in members}
            members += [other] * (getattr(other.config, axis) not in known)
    return {
        axis: sorted(members, key=lambda member: getattr(member.config, axis))
        for axis, members in found.items()
    }


def _axis(one: Run, other: Run) -> str | None:
    """`beta` or `dim`, if two VAE runs on the same images differ in that alone."""
    axes = {"beta", "dim", "kappa"}  # κ follows from the others
    with contextlib.suppress(UserError, KeyError):  # one is damaged
        a, b = one.config, other.config
        rest, images = (
            [made(run) for run in (one, other)]
            for made in (
                lambda run: {k: v for k, v in run.config.identity().items() if k not in axes},
                lambda run: run.environment["dataset"]["fingerprint"],
            )
        )
        if rest[0] == rest[1] and images[0] == images[1]:
            beta, dim = math.isclose(a.beta, b.beta, rel_tol=1e-6), a.dim == b.dim
            return "beta" if dim and not beta else "dim" if beta and not dim else None
    return None


def _measure(plan: _Plan) -> dict[str, Any]:
    config, shown, n = plan.config, plan.shown, len(plan.shown.x)
    judge = _Judge(plan)
    told: dict[str, Any] = {"n": n, "log_n": math.log(n), "candidates": config.augmentation}
    told |= {"attacked": config.run, "witness": config.witness}
    told["witness_adversary"] = None
    if config.witness != UNTRAINED:
        told["witness_adversary"] = runs.get("ssl", config.witness).config.adversary
    print(f"VAE {config.vae}\nattacked: {config.run}\nwitness: {config.witness}")
    told["latent"] = _latent(shown.vae, shown, config.seed)
    told |= _parts(plan, judge)
    attacks = _Attacks(shown, plan.embed, judge, config)
    told |= _adversaries(plan, judge, attacks)
    middle = config.epsilons[len(config.epsilons) // 2]
    told["vaes"] = {
        axis: [_of_vae(other, axis, plan, judge, middle) for other in members]
        for axis, members in plan.others.items()
        if len(members) > 1
    } | {"epsilon": middle}
    return told


class _Judge:
    """The witness with its candidates: other views of the images."""

    def __init__(self, plan: _Plan) -> None:
        shown, config = plan.shown, plan.config
        # Back to bytes: `normalise` lost nothing.
        self.images = shown.pixels(shown.x).mul(255).round().to(torch.uint8)
        views = _views(config.augmentation, shown)(
            self.images, keyed_generator(config.seed, CANDIDATES)
        ).images
        self.see = plan.witness
        self.candidates = self.features(views)

    def features(self, x: Tensor) -> Tensor:
        """(N, D) on the CPU, of normalised images."""
        return torch.cat([self.see(part).float().cpu() for part in x.split(BATCH)])

    def retention(self, x: Tensor) -> Retention:
        return retention(self.features(x), self.candidates)


def _latent(vae: VAE, shown: Pictures, seed: int) -> dict[str, Any]:
    """What z says of y, and Theorem 3.5's bound, of the VAE on these images."""
    x, n, size = shown.x, len(shown.x), shown.x.shape[-1]
    with evaluating(vae):
        codes = [vae.encode(part) for part in x.split(BATCH)]
        mu, logvar = (torch.cat(parts) for parts in zip(*codes, strict=True))
        z = theory.sample(mu, logvar, keyed_generator(seed, NOISE))
        error = torch.cat(
            [(a - vae.decode(b)).square().flatten(1).mean(1)
             for a, b in zip(x.split(BATCH), z.split(BATCH), strict=True)]
        )  # fmt: skip
    mu, logvar, mse = mu.double().cpu(), logvar.double().cpu(), error.mean().item()
    exact = theory.information(mu, logvar, keyed_generator(seed, NOISE, 1))
    sizes = sorted({min(n, k) for k in (2, 4, 8, 16, 32, 64, 128, 256, 512, n)})
    batches = [
        (k, *theory.batch_bounds(mu, logvar, k, keyed_generator(seed, NOISE, k))) for k in sizes
    ]
    config = shown.run.config
    bound = Bound(
        n=n,
        distortion=theory.distortion(mse, size, [1 / (255 * std) for std in shown.std]),
        rate=rate(mu, logvar).mean().item(),
        information=exact.nats,
        beta=config.beta / mse,  # which is of unit variance
    )
    return {
        "information": exact.nats, "error": exact.error, "batches": batches, "mse": mse,
        "continuous_distortion": theory.distortion(mse, size), **asdict(bound),
        # JSON has no −∞, which it is at β = 0.
        "bound": bound.nats if bound.beta else None,
        "statement": bound.statement, "vae_beta": config.beta,
    }  # fmt: skip


# --- x, G and R ---------------------------------------------------------------------------------


def _parts(plan: _Plan, judge: _Judge) -> dict[str, Any]:
    """Retention of x, G and R by the witness, of exchanged parts, and the linear probes."""
    shown = plan.shown
    split = _split(shown.vae, shown.x)
    kept = {part: judge.retention(images) for part, images in split.items()}
    k = _counts(len(shown.x))
    found: dict[str, Any] = {
        "parts": {part: _row(held) for part, held in kept.items()},
        "among": {"k": k} | {part: [held.among(i) for i in k] for part, held in kept.items()},
        "R_minus_G": {
            "retrieved": interval(kept["R"].hits - kept["G"].hits),
            "infonce": interval(kept["R"].gains - kept["G"].gains),
        },
    }
    # a is each image, b the next: at the end G(a) + R(b), or G(b) + R(a).
    G, R, own = split["G"], split["R"], F.normalize(judge.features(shown.x), dim=1)
    donors = own.roll(-1, 0)
    like: dict[str, list[list[float]]] = {"G: a → b, R of a": [], "R: a → b, G of a": []}
    for share in SHARES:
        mixed = (torch.lerp(part, part.roll(-1, 0), share) for part in (G, R))
        for (name, curve), part, rest in zip(like.items(), mixed, (R, G), strict=True):
            seen = F.normalize(judge.features(part + rest), dim=1)
            to_a, to_b = (seen * own).sum(1), (seen * donors).sum(1)
            curve.append([to_a.mean().item(), to_b.mean().item()])
            if name.startswith("R"):  # at the last share, in whole
                followed = interval(100 * (to_b > to_a).double())
    found["exchange"] = {"shares": SHARES, "cosines": like, "follows_R": followed}
    found["probes"] = _probes(plan, judge, split)
    return found


def _split(vae: VAE, x: Tensor) -> dict[str, Tensor]:
    parts = [vae.decompose(part) for part in x.split(BATCH)]
    G, R = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"x": x, "G": G, "R": R}


def _row(kept: Retention) -> dict[str, float]:
    _, low, high = interval(kept.hits)
    _, infonce_low, infonce_high = interval(kept.gains)
    return {
        "retrieved": kept.retrieved, "low": low, "high": high, "mrr": kept.mrr,
        "infonce": kept.infonce, "infonce_low": infonce_low, "infonce_high": infonce_high,
        "fano": kept.fano,
    }  # fmt: skip


def _counts(n: int) -> list[int]:
    return sorted({round(k) for k in np.geomspace(2, n, 12)})


def _probes(plan: _Plan, judge: _Judge, split: dict[str, Tensor]) -> dict[str, Any]:
    """Linear classifiers on the pixels of each part: which class, and which of some images."""
    shown, config = plan.shown, plan.config
    found: dict[str, Any] = {"instance": _probed(_instances(shown, judge, config.seed))}
    found["instances"] = min(INSTANCES, len(judge.images))
    if (labels := _labels(plan)) is not None:
        learn = _split(shown.vae, normalise(plan.train.images, shown.mean, shown.std).to(shown.x))
        right = {}
        for part in PARTS:
            guess = _classify(plan, learn[part].flatten(1).cpu(), split[part].flatten(1).cpu())
            right[part] = 100 * (guess == labels).double()
        found["class"] = _probed(right)
    return found


def _labels(plan: _Plan) -> Tensor | None:
    """Classes of the studied images; None where they, or those to learn from, have none."""
    labels = plan.shown.labels[: len(plan.shown.x)]
    known = bool((labels >= 0).all()) and plan.train.labelled
    return labels if known and len(plan.train.classes) > 1 else None


def _classify(plan: _Plan, features: Tensor, asked: Tensor) -> Tensor:
    """Predicted classes of `asked` (Q, D) by a linear probe on features (N, D) of `plan.train`."""
    order = torch.randperm(len(features), generator=keyed_generator(plan.config.seed, HALVES))
    fifth = max(1, len(order) // 5)
    learn, held = ((features[i], plan.train.labels[i]) for i in (order[fifth:], order[:fifth]))
    return _probe(learn, held, asked, len(plan.train.classes))


def _probe(
    learn: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], asked: Tensor, classes: int
) -> Tensor:
    """Predictions (Q,) of a linear probe on standardised features (N, D), labels (N,); its penalty
    is chosen on `held`."""
    x, y = learn
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    # Weights under a penalty lie in the span of the N images that they are learnt from: in a basis
    # of it they are the same, and N numbers are fewer than the pixels of an image.
    basis = torch.linalg.qr(((x - mean) / std).T).Q  # (D, min(D, N))
    x, x_held, x_asked = ((part - mean) / std @ basis for part in (x, held[0], asked))
    found = choose((x, y), (x_held, held[1]), classes, PENALTIES, iterations=ITERATIONS)
    return predict(found.weights, x_asked)


def _instances(shown: Pictures, judge: _Judge, seed: int) -> dict[str, Tensor]:
    """Part → percent of new views of each image that a linear classifier of images names rightly.

    Views are mild: in those that encoders are trained with, pixels tell it next to nothing.
    """
    images = judge.images[:INSTANCES]
    mild = _views("mild", shown)
    views = [
        _split(shown.vae, mild(images, keyed_generator(seed, INSTANCE_VIEWS, i)).images)
        for i in range(LEARNT + 1 + JUDGED)
    ]
    which, found = torch.arange(len(images)), {}
    for part in PARTS:
        flat = [view[part].flatten(1).cpu() for view in views]
        learnt = torch.cat(flat[:LEARNT]), which.repeat(LEARNT)
        guess = _probe(learnt, (flat[LEARNT], which), torch.cat(flat[LEARNT + 1 :]), len(which))
        right = guess.view(JUDGED, -1) == which
        found[part] = 100 * right.double().mean(0)
    return found


def _views(name: str, shown: Pictures) -> Recipe:
    """The recipe `name`; `mild` leaves an image easy to recognise by its pixels."""
    size = shown.x.shape[-1]
    if name != "mild":
        return recipe(name, size, shown.mean, shown.std)
    return Recipe(
        size,
        shown.mean,
        shown.std,
        crop_scale=(0.8, 1.0),
        flip=0.5,
        jitter=(0.2, 0.2, 0.2, 0.05),
        jitter_probability=1.0,
    )


def _probed(right: dict[str, Tensor]) -> dict[str, Any]:
    rows: dict[str, Any] = {part: interval(values) for part, values in right.items()}
    return rows | {"R_minus_G": interval(right["R"] - right["G"])}


# --- attacks ------------------------------------------------------------------------------------


class _Read(NamedTuple):
    epsilon: float
    loss_after: float
    hardness: Hardness
    kept: Retention
    features: Tensor


class _Loss(NamedTuple):
    epsilon: float
    loss_after: float


class _Attacks:
    """Readings of attacks on all images, in batches of at most `BATCH`."""

    def __init__(
        self,
        shown: Pictures,
        embed: Callable[[Tensor], Tensor],
        judge: _Judge,
        config: TheoryConfig,
    ) -> None:
        self.judge, self.embed = judge, embed
        about = DecomposeConfig(seed=config.seed)
        self.scenes = [
            Scene(**vars(replace(shown, x=x)), config=about, loss=against(embed, x, TEMPERATURE))
            for x in shown.x.chunk(-(-len(shown.x) // BATCH))
        ]
        self.loss = partial(nt_xent, temperature=TEMPERATURE)
        self.anchors = [embed(scene.x) for scene in self.scenes]
        self.weights = [len(scene.x) / len(shown.x) for scene in self.scenes]
        self.before = self._mean([self.loss(z, z).item() for z in self.anchors])

    def read(self, adversary: str, epsilon: float) -> _Read:
        changed = [scene.attack(adversary, epsilon).images for scene in self.scenes]
        measured = [
            theory.hardness(scene.x, x_adv, z, self.embed(x_adv), self.loss)
            for scene, x_adv, z in zip(self.scenes, changed, self.anchors, strict=True)
        ]
        hard = Hardness(*(self._mean(values) for values in zip(*measured, strict=True)))
        features = self.judge.features(torch.cat(changed))
        kept = retention(features, self.judge.candidates)
        return _Read(epsilon, self.before + hard.rise, hard, kept, features)

    def as_hard(self, adversary: str, curve: Sequence[_Read], loss: float) -> _Read | None:
        """The reading where `adversary` reaches `loss`, sought from its curve; None where no radius
        of the curve is as hard."""
        trail = [_Loss(point.epsilon, point.loss_after) for point in curve]
        for _ in range(4):  # by false position: a few are enough
            epsilon = radius(trail, loss, self.before)
            if not epsilon:
                return None
            point = _Loss(epsilon, self._loss_at(adversary, epsilon))
            if abs(point.loss_after - loss) < 0.01 * (loss - self.before):
                break
            insort(trail, point)
        return self.read(adversary, point.epsilon)

    def _loss_at(self, adversary: str, epsilon: float) -> float:
        changed = [scene.attack(adversary, epsilon).images for scene in self.scenes]
        return self._mean(
            [scene.loss(x).item() for scene, x in zip(self.scenes, changed, strict=True)]
        )

    def _mean(self, values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))


def _adversaries(plan: _Plan, judge: _Judge, attacks: _Attacks) -> dict[str, Any]:
    """Curves over ε, each adversary beside IDAA at equal ε and at equal hardness, and over N."""
    epsilons = sorted(plan.config.epsilons)
    asked = {name: [attacks.read(name, e) for e in epsilons] for name in ADVERSARIES}
    curves = {name: list(curve) for name, curve in asked.items()}
    equal, pairs = [], {}
    for mine in asked["idaa"]:
        for name in ADVERSARIES[1:]:
            at_equal_epsilon = next(p for p in asked[name] if p.epsilon == mine.epsilon)
            matched = attacks.as_hard(name, asked[name], mine.loss_after)
            if matched:
                insort(curves[name], matched, key=attrgetter("epsilon"))
            equal.append(
                {
                    "adversary": name, "epsilon": mine.epsilon,
                    "at_equal_epsilon": _differences(mine, at_equal_epsilon),
                    "matched": matched and matched.epsilon,
                    "at_equal_hardness": matched and _differences(mine, matched),
                }
            )  # fmt: skip
            if name == "clae" and matched:
                pairs[mine.epsilon] = mine, matched
    consistent = _consistency(plan, judge, curves)
    found: dict[str, Any] = {
        "loss_before": attacks.before,
        "equal": equal,
        "curves": {
            name: [
                asdict(
                    Point(
                        epsilon=point.epsilon, loss_before=attacks.before,
                        loss_after=point.loss_after, cosine=point.hardness.cosine,
                        l2=point.hardness.l2, linf=point.hardness.linf, n=point.kept.n,
                        consistency=consistent.get((name, point.epsilon)), **_row(point.kept),
                    )
                )
                for point in curve
            ]
            for name, curve in curves.items()
        },
    }  # fmt: skip
    if pairs:  # the hardest pair, where most is at stake
        mine, matched = pairs[max(pairs)]
        k = _counts(len(plan.shown.x))
        found["among_attacked"] = {
            "epsilon": mine.epsilon, "matched": matched.epsilon,
            "idaa": [mine.kept.among(i) for i in k], "clae": [matched.kept.among(i) for i in k],
        }  # fmt: skip
    return found


def _differences(mine: _Read, other: _Read) -> dict[str, Any]:
    """IDAA less the other, over the same images: retrieval in points, InfoNCE in nats."""
    return {
        "loss": (mine.loss_after, other.loss_after),
        "retrieved": (mine.kept.retrieved, other.kept.retrieved),
        "retrieved_difference": interval(mine.kept.hits - other.kept.hits),
        "infonce": (mine.kept.infonce, other.kept.infonce),
        "infonce_difference": interval(mine.kept.gains - other.kept.gains),
    }


def _consistency(
    plan: _Plan, judge: _Judge, curves: dict[str, list[_Read]]
) -> dict[tuple[str, float], float]:
    """(adversary, ε) → percent of the x′ that a linear classifier puts in the class of their x."""
    if _labels(plan) is None:
        return {}
    shown, n = plan.shown, len(plan.shown.x)
    learn = normalise(plan.train.images, shown.mean, shown.std).to(shown.x)
    keys = [(name, point.epsilon) for name, curve in curves.items() for point in curve]
    asked = [point.features for curve in curves.values() for point in curve]
    guess = _classify(plan, judge.features(learn), torch.cat([judge.features(shown.x), *asked]))
    same = (guess.view(-1, n)[1:] == guess[:n]).double().mean(1)
    return dict(zip(keys, (100 * same).tolist(), strict=True))


def _of_vae(run: Run, axis: str, plan: _Plan, judge: _Judge, epsilon: float) -> dict[str, Any]:
    """What another VAE's latent, G, R and x′ hold of the same images."""
    shown = plan.shown
    if run != shown.run:
        shown = replace(shown, run=run, vae=load_vae(run).to(shown.x.device))
    split = _split(shown.vae, shown.x)
    attacked = _Attacks(shown, plan.embed, judge, plan.config).read("idaa", epsilon)
    return {
        "value": getattr(run.config, axis), "run": run.reference,
        "latent": _latent(shown.vae, shown, plan.config.seed),
        "loss": attacked.loss_after,
        "kept": {part: _row(judge.retention(split[part])) for part in ("G", "R")}
        | {"idaa": _row(attacked.kept)},
    }  # fmt: skip


# --- in words -----------------------------------------------------------------------------------


def sentences(run: Run) -> dict[str, list[str]]:
    """What a finished study found on these images, in words, by section of the notebook.

    A difference counts where its 95 % interval over the images leaves out 0.
    """
    told = run.summary or {}
    return {
        "latent": _of_latent(told),
        "parts": _of_parts(told),
        "exchange": _of_exchange(told),
        "attacks": [*_of_attacks(told), _of_witness(told)],
        "vaes": _of_vaes(told),
    }


def _of_latent(told: dict[str, Any]) -> list[str]:
    latent, n, most = told["latent"], told["n"], told["log_n"]
    known = (
        f"A sampled z holds I(z; y) = {latent['information']:.2f} ± {latent['error']:.2f} of at "
        f"most log N = {most:.2f} nats on which of the N = {n} images it came from"
    )
    if latent["information"] > 0.99 * most:
        known += ": it names the image, so the bottleneck hides no identity at this N."
    else:
        known += f": the bottleneck hides {1 - latent['information'] / most:.0%} of the identity."
    return [f"{known} Its rate is {latent['rate']:.1f} nats.", latent["statement"]]


def _of_parts(told: dict[str, Any]) -> list[str]:
    parts, n = told["parts"], told["n"]
    found = ", ".join(f"{name} {parts[part]['retrieved']:.1f} %" for part, name in LABELS.items())
    said = [
        f"The witness finds x among {n} candidates from {found} (by chance: {100 / n:.1f} %). "
        + _claim("R", "G", told["R_minus_G"]["retrieved"], n, "the paper expects R > G"),
    ]
    probes = told["probes"]
    names = {"instance": f"which of {probes['instances']} images it is", "class": "the class"}
    for kind, what in names.items():
        if kind in probes:
            found = ", ".join(f"{part} {probes[kind][part][0]:.1f} %" for part in PARTS)
            count = n if kind == "class" else probes["instances"]
            said.append(
                f"Linear probes on pixels tell {what}: {found}. "
                + _claim("R", "G", probes[kind]["R_minus_G"], count, None)
            )
    return said


def _of_exchange(told: dict[str, Any]) -> list[str]:
    mean, low, high = told["exchange"]["follows_R"]
    who = "goes by R more than by G" if low > 50 else "goes by G more than by R"
    if low <= 50 <= high:
        who = f"goes by neither more than by the other, as far as {told['n']} pairs tell"
    return [
        f"Of G(a) + R(b) the witness sees b, whose R it is, rather than a in {mean:.1f} % of the "
        f"pairs [{low:.1f}, {high:.1f}]: it {who}."
    ]


def _of_attacks(told: dict[str, Any]) -> list[str]:
    said, pairs = [], []
    for row in told["equal"]:
        if row["adversary"] != "clae" or (same := row["at_equal_hardness"]) is None:
            continue
        pairs.append(same)
        mine, other = same["retrieved"]
        _, nats_low, nats_high = same["infonce_difference"]
        said.append(
            f"IDAA ε = {row['epsilon']:.3g} is as hard as CLAE ε = {row['matched']:.3g} (loss "
            f"{same['loss'][0]:.2f}, {same['loss'][1]:.2f} nats; x itself {told['loss_before']:.2f}"
            f"); x is found from {mine:.1f} and {other:.1f} % of the x′. "
            + _claim("IDAA", "CLAE", same["retrieved_difference"], told["n"], None)
            + f" InfoNCE: {same['infonce_difference'][0]:+.2f} nats "
            f"[{nats_low:+.2f}, {nats_high:+.2f}]."
        )
    said.append(_paper_s_claim(told, pairs))
    row = max((r for r in told["equal"] if r["adversary"] == "random_sign"), key=_epsilon)
    same = row["at_equal_epsilon"]
    said.append(
        f"Random signs of the same ε = {row['epsilon']:g} reach a loss of {same['loss'][1]:.2f} "
        f"nats, IDAA's {same['loss'][0]:.2f}; x is found from {same['retrieved'][1]:.1f} and "
        f"{same['retrieved'][0]:.1f} % of the x′."
    )
    return said


def _paper_s_claim(told: dict[str, Any], pairs: Sequence[dict[str, Any]]) -> str:
    """That IDAA keeps more identity than CLAE at equal hardness: does it hold here?"""
    if not pairs:
        return (
            f"No ε of CLAE up to {max(map(_epsilon, told['equal'])):g} is as hard as IDAA at any "
            f"of its own: whether IDAA keeps more identity at equal hardness cannot be seen here."
        )
    found = []
    for measure, key in (("retrieval@1", "retrieved"), ("InfoNCE", "infonce")):
        held = [_verdict(pair[f"{key}_difference"]) for pair in pairs]
        more, less = held.count("more"), held.count("less")
        verdict = "cannot be told"
        if more and less:
            verdict = "holds at some radii and fails at others"
        elif more or less:
            verdict = "holds where a difference is seen" if more else "does not hold"
        found.append(f"by {measure} it {verdict} ({more} of {len(pairs)} more, {less} less)")
    return (
        f"The paper's claim, that IDAA keeps more identity than CLAE at equal hardness, on these "
        f"{told['n']} images: {'; '.join(found)}."
    )


def _of_witness(told: dict[str, Any]) -> str:
    if told["witness"] == UNTRAINED:
        return (
            "The witness is an untrained encoder, as no other one is there: it sees colours and "
            "edges more than content. Train another (notebook 03, adversary = none) and run again."
        )
    taught = told["witness_adversary"]
    beware = ""
    if taught != "none":
        beware = (
            f" It was trained with {NAMES[taught]}, which taught it to see past such changes: one "
            f"with adversary = none is the fairer judge."
        )
    return (
        f"The witness is {told['witness']}; the intervals are over images, not over witnesses."
        f"{beware}"
    )


def _verdict(difference: Sequence[float]) -> str:
    _, low, high = difference
    return "more" if low > 0 else "less" if high < 0 else "alike"


def _claim(a: str, b: str, difference: Sequence[float], n: int, expected: str | None) -> str:
    """A paired difference a − b in points, and what it says."""
    mean, low, high = difference
    found = _verdict(difference)
    verdict = f"{a} and {b} cannot be told apart with {n} images"
    if found != "alike":
        verdict = f"{a} keeps {found} than {b}"
    if expected:
        verdict += f" ({expected}{'' if found == 'more' else ', which is not seen here'})"
    return f"{a} − {b}: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]: {verdict}."


def _epsilon(row: dict[str, Any]) -> float:
    return row["epsilon"]


def _of_vaes(told: dict[str, Any]) -> list[str]:
    """Which axes other VAEs of the same images cover, and how to make those that are missing."""
    said = []
    for axis, name, values in (("beta", "β", "0.04, 0.4, 4"), ("dim", "dim", "32, 128, 512")):
        if rows := told["vaes"].get(axis):
            values = ", ".join(f"{row['value']:.3g}" for row in rows)
            said.append(f"{name} = {values}: finished VAEs that differ in {name} alone.")
        else:
            said.append(
                f"No other finished VAE differs from this one in {name} alone: notebook "
                f"05_sensitivity trains some ({axis}s, such as {values}), or 01_pretrain_vae one "
                f"with another {axis}."
            )
    return said


# --- figures ------------------------------------------------------------------------------------


def information_figure(run: Run) -> Figure:
    """I(z; y) and its bounds from batches of K."""
    told = run.summary or {}
    latent = told["latent"]
    k, lower, upper = np.array(latent["batches"]).T
    figure, axis = _axes(1, (7.6, 3.8))
    axis.plot(k, upper, marker="v", markersize=4, color=PALETTE[1], label="upper, leave-one-out")
    axis.axhline(latent["rate"], color=PALETTE[4], linestyle="-.", label="rate (upper)")
    axis.axhline(told["log_n"], color=INK, linestyle=":", label="log N")
    axis.axhline(latent["information"], color=PALETTE[0], label="I(z; y), exact aggregate")
    axis.plot(k, np.log(k), color=INK, linewidth=0.8, linestyle="--", label="log K")
    axis.plot(k, lower, marker="^", markersize=4, color=PALETTE[2], label="lower, batch of K")
    axis.set(xlabel="batch size K (images)", ylabel="I(z; y) (nats)", xscale="log")
    axis.set(title=f"Which of {told['n']} images is it? What a sampled z says")
    axis.set_yscale("symlog", linthresh=10, linscale=2)
    top = 1.3 * max(upper.max(), latent["rate"], 10)
    axis.set_ylim(0, top)
    marks = [0, *range(2, 11, 2), *(10**power for power in range(2, 7))]
    axis.set_yticks([y for y in marks if y < top], [f"{y:,}" for y in marks if y < top])
    axis.set_xticks(k, [f"{value:.0f}" for value in k])
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def parts_figure(run: Run) -> Figure:
    """x, G and R by the witness (percent, nats) and by linear probes (percent)."""
    told = run.summary or {}
    parts, probes, n = told["parts"], told["probes"], told["n"]
    kinds = [kind for kind in ("instance", "class") if kind in probes]
    figure, axes = _axes(2 + len(kinds), (2.7 * (2 + len(kinds)), 3.1))
    rows = [parts[part] for part in PARTS]
    _bars(axes[0], [(r["retrieved"], r["low"], r["high"]) for r in rows])
    axes[0].set(ylabel=f"x found among {n} (%)", title="Witness: retrieval@1")
    axes[0].set_ylim(0, min(100, 1.3 * max(row["high"] for row in rows)))
    axes[0].axhline(100 / n, color=INK, linewidth=0.8, linestyle=":")
    _bars(axes[1], [(r["infonce"], r["infonce_low"], r["infonce_high"]) for r in rows])
    look = dict(marker="D", s=26, color="white", edgecolors=INK, zorder=3, label="Fano")
    axes[1].scatter(PARTS, [r["fano"] for r in rows], **look)
    axes[1].axhline(told["log_n"], color=INK, linewidth=0.8, linestyle=":", label="log N")
    axes[1].set(ylabel="lower bound on I(v; y) (nats)", title="Witness: InfoNCE")
    axes[1].set_ylim(min(0, *(r["infonce_low"] for r in rows)), 1.25 * told["log_n"])
    axes[1].legend(fontsize="x-small", loc="upper right", ncols=2)
    for axis, kind in zip(axes[2:], kinds, strict=True):
        _bars(axis, [probes[kind][part] for part in PARTS])
        count = probes["instances"] if kind == "instance" else n
        title = f"Pixels: which of {count}?" if kind == "instance" else "Pixels: which class?"
        axis.set(ylabel="accuracy (%)", title=title, ylim=(0, 100))
    for axis in axes:
        axis.set(xlabel="linear probe on" if axis in axes[2:] else "seen by the witness")
        axis.grid(axis="x", visible=False)
    return figure


def exchange_figure(run: Run) -> Figure:
    """Mean likeness to a and to b as G, or R, goes over from a to b."""
    told = (run.summary or {})["exchange"]
    return plots.likeness(told["shares"], {k: torch.tensor(v) for k, v in told["cosines"].items()})


def curves_figure(run: Run) -> Figure:
    """Hardness and retrieval over ε, and retrieval over hardness."""
    return plots.identity_curves(points(run))


def points(run: Run) -> dict[str, list[Point]]:
    """Adversary → its readings by ascending ε."""
    curves = (run.summary or {})["curves"]
    return {name: [Point(**row) for row in curve] for name, curve in curves.items()}


def equal_hardness_figure(run: Run) -> Figure:
    """IDAA less CLAE, and less random signs, at the same loss; label consistency over the loss."""
    told = run.summary or {}
    consistent = any(p.consistency is not None for curve in points(run).values() for p in curve)
    figure, axes = _axes(2 + consistent, (3.6 * (2 + consistent), 3.1))
    panels = zip(
        axes,
        ("retrieved_difference", "infonce_difference"),
        ("retrieval@1 (points)", "InfoNCE (nats)"),
        strict=False,
    )
    for axis, key, unit in panels:
        for shift, name, marker in ((0.94, "clae", "s"), (1.06, "random_sign", "^")):
            rows = [
                (row["epsilon"], *row["at_equal_hardness"][key])
                for row in told["equal"]
                if row["adversary"] == name and row["at_equal_hardness"]
            ]
            if rows:
                e, mean, low, high = np.array(rows).T
                spread = np.maximum(0, [mean - low, high - mean])
                look = dict(color=COLOURS[name], marker=marker, markersize=5, capsize=3)
                label = f"IDAA − {NAMES[name]}"
                axis.errorbar(shift * e, mean, yerr=spread, linestyle="", label=label, **look)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xscale="log", xlabel="ε of IDAA (units of z)", ylabel=f"difference in {unit}")
        epsilons = sorted({row["epsilon"] for row in told["equal"]})
        axis.set_xlim(epsilons[0] / 1.6, epsilons[-1] * 1.6)
        axis.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axis.minorticks_off()
    axes[0].set(title="Identity at equal hardness")
    axes[1].set(title="above 0: IDAA keeps more")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize="x-small")
    else:
        axes[0].text(0.5, 0.5, "no pair is equally hard", transform=axes[0].transAxes, ha="center")
    if consistent:
        for (name, curve), marker in zip(points(run).items(), "os^", strict=True):
            look = dict(color=COLOURS[name], marker=marker, markersize=3.5, label=NAMES[name])
            axes[2].plot([p.loss_after for p in curve], [p.consistency for p in curve], **look)
        axes[2].set(xlabel="loss at x′ (nats)", ylabel="same class as x (%)", ylim=(-5, 105))
        axes[2].set(title="Label consistency")
        axes[2].legend(fontsize="x-small")
    return figure


def candidates_figure(run: Run) -> Figure:
    """retrieval@1 over the number of candidates."""
    told = run.summary or {}
    k, figure = told["among"]["k"], None
    figure, axis = _axes(1, (6.4, 3.6))
    for part, marker, colour in zip(PARTS, "xDv", (INK, PALETTE[4], PALETTE[3]), strict=True):
        label = LABELS[part]
        axis.plot(k, told["among"][part], marker=marker, markersize=4, color=colour, label=label)
    if attacked := told.get("among_attacked"):
        radii = {"idaa": attacked["epsilon"], "clae": attacked["matched"]}
        for (name, epsilon), marker in zip(radii.items(), "os", strict=True):
            label = f"{NAMES[name]} x′, ε = {epsilon:.2g}"
            look = dict(color=COLOURS[name], marker=marker, markersize=4, label=label)
            axis.plot(k, attacked[name], **look)
    axis.plot(k, [100 / i for i in k], color=INK, linewidth=0.8, linestyle=":", label="by chance")
    axis.set(xscale="log", xlabel="candidates", ylabel="x found (%)", ylim=(-5, 105))
    axis.set(title="Identity over the number of candidates")
    ticks = [i for i in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if i <= told["n"]]
    axis.set_xticks(ticks, [str(i) for i in ticks])
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def vaes_figure(run: Run) -> Figure | None:
    """Information, identity and hardness over β and over dim; None where there is one VAE alone."""
    told = run.summary or {}
    vaes, names = told["vaes"], {"beta": "β (nats KL per nat NLL)", "dim": "dim m"}
    drawn = [axis for axis in names if axis in vaes]
    if not drawn:
        return None
    figure = Figure(figsize=(10.4, 3.0 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), 3, squeeze=False)
    for (left, middle, right), axis in zip(grid, drawn, strict=True):
        rows, value = vaes[axis], [row["value"] for row in vaes[axis]]
        for key, label, marker, colour in (
            ("rate", "rate", "v", PALETTE[4]), ("information", "I(z; y)", "o", PALETTE[0]),
        ):  # fmt: skip
            line = [row["latent"][key] for row in rows]
            left.plot(value, line, marker=marker, markersize=4, color=colour, label=label)
        left.axhline(told["log_n"], color=INK, linewidth=0.8, linestyle=":", label="log N")
        left.set(ylabel="nats", title="Latent")
        left.set_yscale("symlog", linthresh=10)
        left.set_ylim(bottom=0)
        looks = {"G": ("D", PALETTE[4]), "R": ("v", PALETTE[3]), "idaa": ("o", COLOURS["idaa"])}
        for part, (marker, colour) in looks.items():
            kept = [row["kept"][part] for row in rows]
            mean, low, high = (np.array([r[k] for r in kept]) for k in ("retrieved", "low", "high"))
            label = LABELS.get(part, f"IDAA x′, ε = {vaes['epsilon']:g}")
            look = dict(marker=marker, markersize=4, color=colour, label=label, capsize=3)
            middle.errorbar(value, mean, yerr=np.maximum(0, [mean - low, high - mean]), **look)
        highest = max(row["kept"][part]["high"] for row in rows for part in looks)
        middle.set_ylim(0, min(105, 1.35 * highest))
        middle.set(ylabel=f"x found among {told['n']} (%)", title="Identity")
        loss = [row["loss"] for row in rows]
        right.plot(value, loss, marker="o", markersize=4, color=COLOURS["idaa"])
        right.axhline(told["loss_before"], color=INK, linewidth=0.8, linestyle=":")
        right.set(ylabel="loss at x′ (nats)", title=f"Hardness of ε = {vaes['epsilon']:g}")
        left.legend(fontsize="x-small")
        middle.legend(fontsize="x-small")
        for panel in (left, middle, right):
            panel.set(xscale="log", xlabel=names[axis])
            panel.set_xticks(value, [f"{v:g}" for v in value])
            panel.minorticks_off()
    return figure


def hardness_table(run: Run) -> pd.DataFrame:
    """Each adversary at each ε that was read: hardness and identity."""
    columns = {
        "epsilon": "ε", "loss_after": "loss (nats)", "cosine": "cos z, z′", "l2": "‖x′ − x‖₂",
        "linf": "‖x′ − x‖∞", "retrieved": "found (%)", "mrr": "MRR", "infonce": "InfoNCE (nats)",
        "fano": "Fano (nats)", "consistency": "same class (%)",
    }  # fmt: skip
    rows = [
        {"": NAMES[name], **{label: getattr(point, key) for key, label in columns.items()}}
        for name, curve in points(run).items()
        for point in curve
    ]
    return pd.DataFrame(rows).round(3)


def _axes(columns: int, figsize: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(1, columns)


def _bars(axis: Any, rows: Sequence[Sequence[float]]) -> None:
    """A bar for each of x, G and R with its interval."""
    mean, low, high = np.array(rows).T
    spread = np.maximum(0, [mean - low, high - mean])
    axis.bar(PARTS, mean, 0.62, yerr=spread, capsize=4, color=[INK, PALETTE[4], PALETTE[3]])
