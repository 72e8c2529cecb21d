"""The study of notebook 08 as a stage: how much identity z, G, R and x′ hold on given images.

Identity is judged by a `Witness` that looks for x among other views of the N images, and by linear
probes on pixels; attacks are compared at equal ε and at equal hardness (docs/spec/idaa.md §6). The
summary's `claims` say of each comparison what can be told from these images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from operator import attrgetter
from typing import Any

import numpy as np
import scipy  # scipy.optimize, half a second to import, comes with its first use
import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import DecomposeConfig, TheoryConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import load_vae
from idaa_lib.evaluate.metrics import bootstrap_interval, paired_difference, wilson_interval
from idaa_lib.identity.networks import UNTRAINED, name_images, name_runs, siblings
from idaa_lib.identity.pixels import DRAWS, INSTANCES, name_instances, probe
from idaa_lib.identity.scene import (
    ADVERSARIES,
    Reading,
    Scene,
    Witness,
    open_scene,
    open_split,
    read,
)
from idaa_lib.identity.theory import Retention, read_latent
from idaa_lib.runs import Run, checkpoints
from idaa_lib.runs.machine import describe, torch_device
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.views import keyed_generator, normalise, recipe

PARTS = ("x", "G", "R")
OTHERS = {"clae": "CLAE", "random_sign": "random sign"}  # than IDAA
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a part that is exchanged between two images
START = attrgetter("seed", "backbone", "width", "stem")  # what initial weights follow from
# Streams of random numbers beside the images' own order; `theory` has a further one.
CANDIDATES, HALVES, INSTANCE_VIEWS = 1, 3, 4


@dataclass(frozen=True)
class Study(Plan):
    """What a study measures. train: images to learn classes from. others: VAEs, see `siblings`."""

    scene: Scene
    train: ImageSet
    others: dict[str, list[Run]]
    claims: list[dict[str, Any]] = field(default_factory=list, init=False)

    def claim(self, claim: str, interval: Sequence[float] | None, unit: str, **about: Any) -> None:
        """Add a claim with its interval, the `verdict` on it, and what else is said about it: its
        section of the study; a note; than, what the interval is compared with (0)."""
        value, low, high = interval or 3 * [None]
        row = {"claim": claim, "value": value, "low": low, "high": high, "unit": unit, "note": ""}
        row |= {"n": len(self.scene.x), "verdict": verdict(interval, about.get("than", 0))}
        self.claims.append(row | about)

    def compare(
        self, claim: str, one: Retention, other: Retention, note: Sequence[str] = (), **about: Any
    ) -> None:
        """Claim that the witness finds more in one than in the other, by both of its measures."""
        about["note"] = "; ".join([*note, *self.caveats])
        points = paired_difference(one.hits, other.hits)
        nats = bootstrap_interval(one.gains - other.gains)
        self.claim(f"{claim}: retrieval@1", points, "points", by="hits", **about)
        self.claim(f"{claim}: InfoNCE", nats, "nats", by="gains", **about)

    @cached_property
    def caveats(self) -> list[str]:
        """Why the witness is no fair judge; empty where it is one."""
        if self.config.witness == UNTRAINED:
            return ["the witness is untrained: it sees colours and edges more than content"]
        witness, reasons = runs.get("ssl", self.config.witness), []
        if (adversary := witness.config.adversary) != "none":
            reasons.append(f"the witness was trained with {adversary}, to see past such changes")
        if self.config.run != UNTRAINED:
            attacked = runs.get("ssl", self.config.run)
            imported = any("imported" in run.environment for run in (witness, attacked))
            if START(witness.config) == START(attacked.config) and not imported:
                reasons.append("the witness began with the attacked encoder's weights, same seed")
        return reasons

    def views(self, name: str, x: Tensor, *stream: int) -> Tensor:
        """Views of images x of the scene by the recipe `name`, normalised as they are."""
        images = self.scene.pixels(x).mul(255).round().to(torch.uint8)  # the originals
        views = recipe(name, x.shape[-1], self.scene.mean, self.scene.std)
        return views(images, keyed_generator(self.config.seed, *stream)).images

    @cached_property
    def witness(self) -> Witness:
        """The witness, with other views of the images as candidates."""
        views = self.views(self.config.augmentation, self.scene.x, CANDIDATES)
        return Witness(self.scene, self.config.witness, views)

    @cached_property
    def learn(self) -> Tensor:
        """The images to learn classes from, normalised."""
        return normalise(self.train.images[:], self.scene.mean, self.scene.std).to(self.scene.x)

    @property
    def labels(self) -> Tensor | None:
        """Classes of the studied images; None where they, or those to learn from, have none."""
        labelled = (self.scene.labels >= 0).all() and self.train.labelled
        return self.scene.labels if labelled and len(self.train.classes) > 1 else None

    def classify(self, features: Tensor, queries: Tensor) -> Tensor:
        """Classes (Q,) of queries (Q, …) by a linear probe on features (N, …) of `learn`."""
        order = torch.randperm(len(features), generator=keyed_generator(self.config.seed, HALVES))
        held, learn = order.tensor_split([max(1, len(order) // 5)])
        labels = self.train.labels
        pairs = (features[learn], labels[learn]), (features[held], labels[held])
        return probe(*pairs, queries, len(self.train.classes))


def verdict(interval: Sequence[float] | None, than: float = 0.0) -> str:
    """`more` where a whole interval (mean, low, high) lies above `than`, `less` where it lies
    below, else `cannot be told`; without an interval `left out`."""
    if interval is None:
        return "left out"
    _, low, high = interval
    return "more" if low > than else "less" if high < than else "cannot be told"


def study(config: TheoryConfig) -> Run:
    """Measure what `config` describes; a finished study is given back as it is.

    Raises:
        RunError: there is no finished VAE run. ConfigError: the images or the encoders do not fit.
    """
    plan = plan_study(config)
    return perform(plan, lambda _: _measure(plan))


def plan_study(config: TheoryConfig) -> Study:
    """The run that `config` leads to, with its images, its VAE and the encoders' names."""
    config, device = name_runs(config), torch_device(config.device)
    shared = config.model_dump(include=DecomposeConfig.model_fields.keys() - {"preset", "images"})
    scene = open_scene(DecomposeConfig(**shared), config.images, device)
    vae, data = scene.run, scene.data
    config = config.replace(dataset=name_images(config, vae))
    train, others = open_split(config, vae, "train", config.limit), siblings(vae)
    weights = "".join(checkpoints.digest(run) for axis in others.values() for run in axis)
    encoders = {"run": config.run, "witness": config.witness}
    encoders = {role: name for role, name in encoders.items() if name != UNTRAINED}
    digests = {role: checkpoints.digest(runs.get("ssl", name)) for role, name in encoders.items()}
    digests |= {"vae": checkpoints.digest(vae), "train": train.fingerprint}
    digests["others"] = hashlib.sha256(weights.encode()).hexdigest()
    run = runs.run_for(config, data.fingerprint, **digests)
    return Study(config, run, scene, train, others, environment=describe(device, "no", data))


@torch.no_grad()
def _measure(plan: Study) -> dict[str, Any]:
    config, n = plan.config, len(plan.scene.x)
    print(f"VAE {config.vae}\nattacked: {config.run}\nwitness: {config.witness}")
    summary = {"n": n, "log_n": math.log(n), "candidates": config.augmentation}
    summary |= {"attacked": config.run, "witness": config.witness, "caveats": plan.caveats}
    for section in (_latent, _parts, _exchange, _attacks, _vaes):
        summary |= section(plan)
    return summary | {"claims": plan.claims}


def _latent(plan: Study) -> dict[str, Any]:
    """What a sampled z says of y, and what the theorem says of x′."""
    scene, log_n = plan.scene, math.log(len(plan.scene.x))
    latent = read_latent(scene.vae, scene.x, scene.run.config.beta, plan.config.seed)
    nats, spread, bound = latent["information"], 1.96 * latent["error"], latent["bound"]
    claim = f"I(z; y) > 99 % of log N = {log_n:.2f}: a sampled z names the image"
    about = {"section": "latent", "note": f"rate {latent['rate']:.1f}", "than": 0.99 * log_n}
    plan.claim(claim, (nats, nats - spread, nats + spread), "nats", **about)
    note = "for a small enough δ; how small, the theorem does not say"
    if bound is None or bound <= 0:
        note = f"vacuous, and whatever β were at most log N − rate = {latent['limit']:,.1f}"
    if "beta" in scene.run.config.unknown:
        note += "; β of this VAE is unknown, and its recipe's is taken"
    interval = None if bound is None else 3 * [bound]
    claim = "Theorem 3.5: its bound on I(x′; y) > 0"
    plan.claim(claim, interval, "nats", section="latent", note=note)
    return {"latent": latent}


def _parts(plan: Study) -> dict[str, Any]:
    """What the witness, and linear probes, find of x in x, G and R."""
    parts = {part: plan.witness.retention(images) for part, images in plan.scene.parts.items()}
    plan.compare("R keeps more than G, by the witness", parts["R"], parts["G"], section="parts")
    return {
        "parts": {part: parts[part].row() for part in PARTS},
        "among": {"k": _counts(len(plan.scene.x))} | {part: _among(parts[part]) for part in PARTS},
        "probes": _probes(plan),
    }


def _counts(n: int) -> list[int]:
    """Numbers of candidates to look among, 2 to n."""
    return sorted({round(k) for k in np.geomspace(2, n, 12)})


def _among(identity: Retention) -> list[float]:
    return [identity.among(k) for k in _counts(identity.n)]


def _probes(plan: Study) -> dict[str, Any]:
    """Linear classifiers on the pixels of each part: which class, and which of some images."""
    scene, labels = plan.scene, plan.labels
    # In views that encoders are trained with, pixels tell next to nothing of the image.
    draws = (plan.views("mild", scene.x[:INSTANCES], INSTANCE_VIEWS, i) for i in range(DRAWS))
    views = [scene.split(draw) for draw in draws]
    hits = {"instance": {part: name_instances([view[part] for view in views]) for part in PARTS}}
    if labels is not None:
        learn = scene.split(plan.learn)
        guesses = {part: plan.classify(learn[part], scene.parts[part]) for part in PARTS}
        hits["class"] = {p: 100 * (guess == labels).double() for p, guess in guesses.items()}
    rows: dict[str, Any] = {"instances": len(hits["instance"]["x"])}
    for kind, of in hits.items():
        rows[kind] = {part: bootstrap_interval(values) for part, values in of.items()}
        claim = f"R keeps more than G, by a linear probe on pixels: which {kind}"
        difference, n = bootstrap_interval(of["R"] - of["G"]), len(of["R"])
        plan.claim(claim, difference, "points", section="parts", by="probe", n=n)
    return rows


def _exchange(plan: Study) -> dict[str, Any]:
    """Likeness to image a and to the next one, b, as G or R goes over from a to b, over all a; and
    how many of G(a) + R(b) are more like b."""
    scene, witness = plan.scene, plan.witness
    own = witness.features(scene.x)
    cosines: dict[str, list[list[float]]] = {}
    for moves, stays in (("G", "R"), ("R", "G")):
        part, rest, curve = scene.parts[moves], scene.parts[stays], []
        for share in SHARES:
            cosine = witness.cosines(torch.lerp(part, part.roll(-1, 0), share) + rest, own)
            to_a, to_b = cosine.diagonal(), cosine.roll(-1, 1).diagonal()
            curve.append([to_a.mean().item(), to_b.mean().item()])
        cosines[f"{moves}: a → b, {stays} of a"] = curve
    follows = wilson_interval(to_b > to_a)  # the last: R in whole
    claim = "G(a) + R(b) is taken for b, whose R it is, by more than half"
    plan.claim(claim, follows, "%", section="exchange", note="; ".join(plan.caveats), than=50)
    return {"exchange": {"shares": SHARES, "cosines": cosines}}


def _attacks(plan: Study) -> dict[str, Any]:
    """Curves over ε, each adversary beside IDAA at equal ε and at equal hardness, and over N."""
    scene, witness, epsilons = plan.scene, plan.witness, sorted(plan.config.epsilons)
    # (adversary, ε) → what is read there; the radii of equal hardness come in addition.
    readings = {(a, e): read(scene, witness, a, e) for a in ADVERSARIES for e in epsilons}
    radii: dict[str, float] = {}
    for adversary, epsilon in product(OTHERS, epsilons):
        matched = _compare_attacks(plan, adversary, epsilon, readings)
        if matched and adversary == "clae":  # the last is the hardest, where most is at stake
            radii = {"idaa": epsilon, "clae": matched}
    if (labels := plan.labels) is not None:
        queries = [witness.features(scene.x), *(reading.features for reading in readings.values())]
        guess = plan.classify(witness.features(plan.learn), torch.cat(queries))
        first, *others = guess.view(-1, len(labels))
        for reading, classes in zip(readings.values(), others, strict=True):
            reading.row["consistency"] = 100 * (classes == first).double().mean().item()
    curves = {
        name: [readings[a, e].row for a, e in sorted(readings) if a == name] for name in ADVERSARIES
    }
    summary = {"loss_before": scene.loss_before, "curves": curves}
    if radii:
        over_n = {a: _among(readings[a, e].identity) for a, e in radii.items()}
        summary["among_attacked"] = over_n | {"radii": radii}
    return summary


def _compare_attacks(
    plan: Study, adversary: str, epsilon: float, readings: dict[tuple[str, float], Reading]
) -> float | None:
    """Claims on IDAA of radius `epsilon` beside an adversary at equal ε, and at the ε where that is
    as hard, which is returned (None where there is none) and read."""
    scene, name, idaa = plan.scene, OTHERS[adversary], readings["idaa", epsilon]
    loss, epsilons = idaa.row["loss_after"], sorted(plan.config.epsilons)
    claim = f"IDAA ε = {epsilon:.3g} keeps more than {name}"
    about: dict[str, Any] = {"section": "attacks", "adversary": adversary, "epsilon": epsilon}

    def compare(claim: str, other: Reading) -> None:
        note = [f"loss {loss:.2f}, {other.row['loss_after']:.2f}"]
        plan.compare(claim, idaa.identity, other.identity, note, **about)

    compare(f"{claim} of equal ε", readings[adversary, epsilon])
    about["at"] = "hardness"
    curve = [(e, readings[adversary, e].row["loss_after"]) for e in epsilons]
    loss_at = lambda e: scene.loss(scene.attack(adversary, e)).item()  # noqa: E731
    matched = equal_hardness(loss_at, curve, loss, scene.loss_before)
    if matched is None:
        why = f"no ε of {name} up to {epsilons[-1]:g} is as hard as IDAA"
        why = why if loss > scene.loss_before else "IDAA does not make x harder"
        plan.claim(f"{claim} of equal hardness", None, "", note=why, **about)
        return None
    other = readings[adversary, matched] = read(scene, plan.witness, adversary, matched)
    compare(f"{claim} ε = {matched:.3g}, equally hard", other)
    return matched


def equal_hardness(
    loss_at: Callable[[float], float],
    curve: Sequence[tuple[float, float]],
    loss: float,
    start: float,
) -> float | None:
    """The ε at which an attack reaches `loss`, sought from points (ε, loss) by ascending ε.

    None where `start`, the loss at ε = 0, is as high, where no point is as hard, or where no ε
    comes within 1 % of the rise (a loss that jumps).
    """
    above = next((epsilon for epsilon, reached in curve if reached >= loss), None)
    if loss <= start or above is None:
        return None
    below = max((epsilon for epsilon, _ in curve if epsilon < above), default=0.0)
    epsilon = float(
        scipy.optimize.brentq(lambda e: loss_at(e) - loss, below, above, xtol=1e-6, rtol=1e-3)
    )
    return epsilon if abs(loss_at(epsilon) - loss) < 0.01 * (loss - start) else None


def _vaes(plan: Study) -> dict[str, Any]:
    """What the latent, G, R and x′ of each VAE of an axis hold of the same images."""
    epsilon = plan.config.epsilons[len(plan.config.epsilons) // 2]

    def row(run: Run, axis: str) -> dict[str, Any]:
        scene = plan.scene
        if run != scene.run:
            scene = replace(scene, run=run, vae=load_vae(run).to(scene.x.device))
        attack = read(scene, plan.witness, "idaa", epsilon).row
        readings = {part: plan.witness.retention(scene.parts[part]).row() for part in ("G", "R")}
        return {
            "value": getattr(run.config, axis),
            "run": run.reference,
            "loss": attack["loss_after"],
            "latent": read_latent(scene.vae, scene.x, run.config.beta, plan.config.seed),
            "kept": readings | {"idaa": attack},
        }

    several = {axis: vaes for axis, vaes in plan.others.items() if len(vaes) > 1}
    rows = {axis: [row(vae, axis) for vae in vaes] for axis, vaes in several.items()}
    return {"vaes": {"epsilon": epsilon} | rows}
