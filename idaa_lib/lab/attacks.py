"""The attacks of the study of notebook 08: identity over ε, at equal ε and at equal hardness."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idaa_lib.configs import DecomposeConfig, TheoryConfig
from idaa_lib.evaluate.metrics import bootstrap_interval
from idaa_lib.identity import theory
from idaa_lib.identity.scene import ADVERSARIES, Pictures, Scene
from idaa_lib.identity.theory import Hardness, Retention, retention
from idaa_lib.lab.engine import radius
from idaa_lib.lab.judge import BATCH, Judge, Plan, classify, counts, labels_of, row_of
from idaa_lib.methods.simclr import against, nt_xent
from idaa_lib.views import normalise

SEARCH = 12  # losses that are computed in search of an equal one
TEMPERATURE = 0.5  # of the attacked loss, SimCLR's own


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


class Read(NamedTuple):
    epsilon: float
    loss_after: float
    hardness: Hardness
    kept: Retention
    features: Tensor


class Loss(NamedTuple):
    epsilon: float
    loss_after: float


class Attacks:
    """Readings of attacks on all images, in batches of at most `BATCH`."""

    def __init__(
        self,
        shown: Pictures,
        embed: Callable[[Tensor], Tensor],
        judge: Judge,
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

    def read(self, adversary: str, epsilon: float) -> Read:
        changed = [scene.attack(adversary, epsilon).images for scene in self.scenes]
        measured = [
            theory.hardness(scene.x, x_adv, z, self.embed(x_adv), self.loss)
            for scene, x_adv, z in zip(self.scenes, changed, self.anchors, strict=True)
        ]
        hard = Hardness(*(self._mean(values) for values in zip(*measured, strict=True)))
        features = self.judge.features(torch.cat(changed))
        kept = retention(features, self.judge.candidates)
        return Read(epsilon, self.before + hard.rise, hard, kept, features)

    def as_hard(self, adversary: str, curve: Sequence[Read], loss: float) -> Read | None:
        """The reading where `adversary` reaches `loss`, sought from its curve; None where no radius
        of the curve is as hard, or none comes within 1 % of the rise (a loss that jumps)."""
        trail = [Loss(point.epsilon, point.loss_after) for point in curve]
        for turn in range(SEARCH):
            epsilon = radius(trail, loss, self.before)
            if not epsilon:
                return None
            if turn % 2:  # false position creeps along a bent curve: every other time by halves
                above = next(point.epsilon for point in trail if point.loss_after >= loss)
                below = max((p.epsilon for p in trail if p.epsilon < above), default=above / 4)
                epsilon = math.sqrt(below * above)
            point = Loss(epsilon, self._loss_at(adversary, epsilon))
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


def adversaries(plan: Plan, judge: Judge, attacks: Attacks) -> dict[str, Any]:
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
                        consistency=consistent.get((name, point.epsilon)), **row_of(point.kept),
                    )
                )
                for point in curve
            ]
            for name, curve in curves.items()
        },
    }  # fmt: skip
    if pairs:  # the hardest pair, where most is at stake
        mine, matched = pairs[max(pairs)]
        k = counts(len(plan.shown.x))
        found["among_attacked"] = {
            "epsilon": mine.epsilon, "matched": matched.epsilon,
            "idaa": [mine.kept.among(i) for i in k], "clae": [matched.kept.among(i) for i in k],
        }  # fmt: skip
    return found


def _differences(mine: Read, other: Read) -> dict[str, Any]:
    """IDAA less the other, over the same images: retrieval in points, InfoNCE in nats."""
    return {
        "loss": (mine.loss_after, other.loss_after),
        "retrieved": (mine.kept.retrieved, other.kept.retrieved),
        "retrieved_difference": bootstrap_interval(mine.kept.hits - other.kept.hits),
        "infonce": (mine.kept.infonce, other.kept.infonce),
        "infonce_difference": bootstrap_interval(mine.kept.gains - other.kept.gains),
    }


def _consistency(
    plan: Plan, judge: Judge, curves: dict[str, list[Read]]
) -> dict[tuple[str, float], float]:
    """(adversary, ε) → percent of the x′ that a linear classifier puts in the class of their x."""
    if labels_of(plan) is None:
        return {}
    shown, n = plan.shown, len(plan.shown.x)
    learn = normalise(plan.train.images, shown.mean, shown.std).to(shown.x)
    keys = [(name, point.epsilon) for name, curve in curves.items() for point in curve]
    asked = [point.features for curve in curves.values() for point in curve]
    guess = classify(plan, judge.features(learn), torch.cat([judge.features(shown.x), *asked]))
    same = (guess.view(-1, n)[1:] == guess[:n]).double().mean(1)
    return dict(zip(keys, (100 * same).tolist(), strict=True))
