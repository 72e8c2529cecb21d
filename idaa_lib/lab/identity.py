"""The study of notebook 08: how much identity z, G, R and x′ hold on a user's own data.

`study` measures (docs/spec/idaa.md §6, by `theory`) and writes a run; `findings` makes figures and
sentences from its summary alone, so that a finished study is shown again without its networks.

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
import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib import checkpoints, runs, theory
from idaa_lib.configs import ConfigError, DecomposeConfig, TheoryConfig, UserError
from idaa_lib.environment import describe, open_images, settled, torch_device
from idaa_lib.evaluate.encoders import load_vae
from idaa_lib.evaluate.linear import choose, predict
from idaa_lib.images import ImageSet
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
from idaa_lib.methods.simclr import against, nt_xent
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import VAE, rate
from idaa_lib.runs import Run
from idaa_lib.theory import Bound, Hardness, Retention, interval, retention
from idaa_lib.views import Recipe, keyed_generator, normalise, recipe

PARTS = ("x", "G", "R")
LABELS = {"x": "x", "G": "G(x)", "R": "R(x)"}
SEARCH = 12  # losses that are computed in search of an equal one
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


def _began_alike(*encoders: Run) -> bool:
    """Whether two runs began with the same weights of the backbone, which the seed draws."""
    a, b = encoders
    drawn = ("seed", "backbone", "width", "stem")
    same = all(getattr(a.config, key) == getattr(b.config, key) for key in drawn)
    return same and not any("imported" in run.environment for run in encoders)


def _measure(plan: _Plan) -> dict[str, Any]:
    config, shown, n = plan.config, plan.shown, len(plan.shown.x)
    judge = _Judge(plan)
    told: dict[str, Any] = {"n": n, "log_n": math.log(n), "candidates": config.augmentation}
    told |= {"attacked": config.run, "witness": config.witness}
    told["witness_adversary"], told["witness_began_alike"] = None, False
    if config.witness != UNTRAINED:
        judging = runs.get("ssl", config.witness)
        told["witness_adversary"] = judging.config.adversary
        if config.run != UNTRAINED:
            told["witness_began_alike"] = _began_alike(judging, runs.get("ssl", config.run))
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
    config, step = shown.run.config, [1 / (255 * std) for std in shown.std]
    bound = Bound(
        n=n,
        distortion=theory.distortion(mse, size, step),
        rate=rate(mu, logvar).mean().item(),
        information=exact.nats,
        # The configuration's is of unit variance; here of the distortion's (spec §1: β ∝ 1/s²).
        beta=config.beta / (mse + theory.quantisation(step)),
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
        of the curve is as hard, or none comes within 1 % of the rise (a loss that jumps)."""
        trail = [_Loss(point.epsilon, point.loss_after) for point in curve]
        for turn in range(SEARCH):
            epsilon = radius(trail, loss, self.before)
            if not epsilon:
                return None
            if turn % 2:  # false position creeps along a bent curve: every other time by halves
                above = next(point.epsilon for point in trail if point.loss_after >= loss)
                below = max((p.epsilon for p in trail if p.epsilon < above), default=above / 4)
                epsilon = math.sqrt(below * above)
            point = _Loss(epsilon, self._loss_at(adversary, epsilon))
            if abs(point.loss_after - loss) < 0.01 * (loss - self.before):
                return self.read(adversary, epsilon)
            insort(trail, point)
        return None

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
