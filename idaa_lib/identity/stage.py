"""The study of notebook 08 as a stage: how much identity z, G, R and x′ hold on given images.

Identity is judged by a `Witness` that looks for x among other views of the N images, and by linear
probes on pixels; attacks are compared at equal ε and at equal hardness (docs/spec/idaa.md §6). The
summary's `claims` say of each comparison what can be told from these images.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import DecomposeConfig, TheoryConfig, UserError
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import load_vae
from idaa_lib.evaluate.metrics import bootstrap_interval
from idaa_lib.evaluate.probe import CLEAN, linear_probe
from idaa_lib.identity import theory
from idaa_lib.identity.scene import (
    ADVERSARIES,
    BATCH,
    UNTRAINED,
    Scene,
    Witness,
    name_runs,
    open_scene,
    read,
)
from idaa_lib.identity.theory import Retention
from idaa_lib.nets.vae import rate
from idaa_lib.runs import Run, checkpoints
from idaa_lib.runs.choice import reading_of
from idaa_lib.runs.machine import describe, open_images, resolve_path, torch_device
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.views import keyed_generator, normalise, recipe

PARTS = ("x", "G", "R")
OTHERS = {"clae": "CLAE", "random_sign": "random sign"}  # than IDAA
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a part that is exchanged between two images
# Instance probe: so many images, views of each to learn and to judge, and one for the penalty.
INSTANCES, LEARNT, JUDGED = 60, 3, 4
# Linear probes on pixels: a coarse grid, which is enough to compare parts.
PROTOCOL = CLEAN._replace(
    penalties=(10.0, 1.0, 1e-1, 1e-2, 1e-3), standardise=False, refit=False, iterations=50
)
START = ("seed", "backbone", "width", "stem")  # fields that initial weights follow from
VAES = 8  # of one axis at most, the newest
# Streams of random numbers beside the images' own order.
CANDIDATES, NOISE, HALVES, INSTANCE_VIEWS = 1, 2, 3, 4


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
        for by, name, unit in (("hits", "retrieval@1", "points"), ("gains", "InfoNCE", "nats")):
            difference = bootstrap_interval(getattr(one, by) - getattr(other, by))
            self.claim(f"{claim}: {name}", difference, unit, by=by, **about)

    @cached_property
    def caveats(self) -> list[str]:
        """Why the witness is no fair judge; empty where it is one."""
        if self.config.witness == UNTRAINED:
            return ["the witness is untrained: it sees colours and edges more than content"]
        witness, reasons = runs.get("ssl", self.config.witness), []
        if (adversary := witness.config.adversary) != "none":
            reasons.append(f"the witness was trained with {adversary}, to see past such changes")
        if self.config.run != UNTRAINED:
            attacked, start = runs.get("ssl", self.config.run), attrgetter(*START)
            imported = any("imported" in run.environment for run in (witness, attacked))
            if start(witness.config) == start(attacked.config) and not imported:
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
        return normalise(self.train.images, self.scene.mean, self.scene.std).to(self.scene.x)

    @property
    def labels(self) -> Tensor | None:
        """Classes of the studied images; None where they, or those to learn from, have none."""
        labelled = (self.scene.labels >= 0).all() and self.train.labelled
        return self.scene.labels if labelled and len(self.train.classes) > 1 else None

    def classify(self, features: Tensor, queries: Tensor) -> Tensor:
        """Classes of queries (Q, D) by a linear probe on features (N, D) of `learn`."""
        order = torch.randperm(len(features), generator=keyed_generator(self.config.seed, HALVES))
        held, learn = order.tensor_split([max(1, len(order) // 5)])
        labels = self.train.labels
        pairs = (features[learn], labels[learn]), (features[held], labels[held])
        return _probe(*pairs, queries, len(self.train.classes))


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
    config = name_runs(config)
    fields = {"vae", "run", "dataset", "split", "seed", "on_error", "gray_bits"}
    images = DecomposeConfig(**config.model_dump(include=fields))
    device = torch_device(config.device)
    scene = open_scene(images, config.images, device)
    vae, data = scene.run, scene.data
    dataset = resolve_path(config.dataset or vae.config.dataset)
    config = config.replace(dataset=dataset)
    reading = reading_of(config, vae, dataset)
    train = open_images(dataset, "train", data.size, config.limit, **reading)
    others = siblings(vae)
    weights = "".join(checkpoints.digest(run) for axis in others.values() for run in axis)
    encoders = {"run": config.run, "witness": config.witness}
    encoders = {role: name for role, name in encoders.items() if name != UNTRAINED}
    digests = {role: checkpoints.digest(runs.get("ssl", name)) for role, name in encoders.items()}
    digests |= {"vae": checkpoints.digest(vae), "train": train.fingerprint}
    digests["others"] = hashlib.sha256(weights.encode()).hexdigest()
    run = runs.run_for(config, data.fingerprint, **digests)
    return Study(config, run, scene, train, others, environment=describe(device, "no", data))


def siblings(run: Run) -> dict[str, list[Run]]:
    """Finished VAE runs on the same images that differ from `run` in β alone, and in dim alone.

    The newest `VAES` of each by ascending value, `run` itself among them.
    """

    def rest(run: Run) -> tuple[dict[str, Any], str]:
        axes = {"beta", "dim", "kappa"}  # κ follows from the others
        fields = {k: v for k, v in run.config.identity().items() if k not in axes}
        fields["unknown"] = run.config.unknown  # of an imported one
        return fields, run.environment["dataset"]["fingerprint"]

    members = {axis: {getattr(run.config, axis): run} for axis in ("beta", "dim")}
    for other in runs.usable("vae", size=run.config.size):
        with contextlib.suppress(UserError, KeyError, TypeError):  # it is damaged
            same_dim = other.config.dim == run.config.dim
            same_beta = math.isclose(other.config.beta, run.config.beta, rel_tol=1e-6)
            axis = "beta" if same_dim else "dim"
            alike = same_dim != same_beta and rest(other) == rest(run)
            if alike and len(members[axis]) < VAES:
                members[axis].setdefault(getattr(other.config, axis), other)
    return {axis: [of[value] for value in sorted(of)] for axis, of in members.items()}


@torch.no_grad()
def _measure(plan: Study) -> dict[str, Any]:
    config, scene, n = plan.config, plan.scene, len(plan.scene.x)
    print(f"VAE {config.vae}\nattacked: {config.run}\nwitness: {config.witness}")
    summary = {"n": n, "log_n": math.log(n), "candidates": config.augmentation}
    summary |= {"attacked": config.run, "witness": config.witness, "caveats": plan.caveats}
    summary["latent"] = latent = _latent(scene, config.seed)
    nats, spread = latent["information"], 1.96 * latent["error"]
    claim = f"I(z; y) > 99 % of log N = {math.log(n):.2f}: a sampled z names the image"
    about = {"section": "latent", "note": f"rate {latent['rate']:.1f}", "than": 0.99 * math.log(n)}
    plan.claim(claim, (nats, nats - spread, nats + spread), "nats", **about)
    bound, note = latent["bound"], "for a small enough δ; how small, the theorem does not say"
    if bound is None or bound <= 0:
        note = f"vacuous, and whatever β were at most log N − rate = {latent['limit']:,.1f}"
    if "beta" in scene.run.config.unknown:
        note += "; β of this VAE is unknown, and its recipe's is taken"
    interval = None if bound is None else 3 * [bound]
    claim = "Theorem 3.5: its bound on I(x′; y) > 0"
    plan.claim(claim, interval, "nats", section="latent", note=note)
    kept = {part: plan.witness.retention(images) for part, images in scene.parts.items()}
    summary["parts"] = {part: kept[part].row() for part in PARTS}
    summary["among"] = {"k": _counts(n)} | {part: _among(kept[part]) for part in PARTS}
    plan.compare("R keeps more than G, by the witness", kept["R"], kept["G"], section="parts")
    summary["probes"] = _probes(plan)
    summary["exchange"] = _exchange(plan)
    summary |= _attacks(plan)
    middle = config.epsilons[len(config.epsilons) // 2]
    summary["vaes"] = {"epsilon": middle} | {
        axis: [_vae(other, axis, plan, middle) for other in members]
        for axis, members in plan.others.items()
        if len(members) > 1
    }
    return summary | {"claims": plan.claims}


def _latent(scene: Scene, seed: int) -> dict[str, Any]:
    """What z says of y, and Theorem 3.5's bound, of the scene's VAE on its images."""
    x, vae, n = scene.x, scene.vae, len(scene.x)
    codes = [vae.encode(part) for part in x.split(BATCH)]
    mu, logvar = (torch.cat(parts) for parts in zip(*codes, strict=True))
    z = theory.sample(mu, logvar, keyed_generator(seed, NOISE))
    G = torch.cat([vae.decode(part) for part in z.split(BATCH)])
    mse = (x - G).square().mean().item()
    mu, logvar = mu.double().cpu(), logvar.double().cpu()
    nats, error = theory.information(mu, logvar, keyed_generator(seed, NOISE, 1))
    sizes = [*(2**power for power in range(1, 10) if 2**power < n), n]
    batches = [
        (k, *theory.batch_bounds(mu, logvar, k, keyed_generator(seed, NOISE, k))) for k in sizes
    ]
    step, beta = [1 / (255 * std) for std in scene.std], scene.run.config.beta
    # The configuration's β is of unit variance; here of the distortion's (spec §1: β ∝ 1/s²).
    calibrated = beta / (mse + theory.quantisation(step))
    distortion = theory.distortion(mse, x.shape[-1], step)
    mean_rate = rate(mu, logvar).mean().item()
    bound, limit = theory.bound(n, distortion, mean_rate, nats, calibrated)
    figures = {"information": nats, "error": error, "batches": batches, "mse": mse}
    figures |= {"rate": mean_rate, "distortion": distortion, "beta": calibrated, "vae_beta": beta}
    figures["continuous_distortion"] = theory.distortion(mse, x.shape[-1])
    # JSON has no −∞, which the bound is at β = 0.
    return figures | {"bound": bound if math.isfinite(bound) else None, "limit": limit}


def _counts(n: int) -> list[int]:
    """Numbers of candidates to look among, 2 to n."""
    return sorted({round(k) for k in np.geomspace(2, n, 12)})


def _among(kept: Retention) -> list[float]:
    return [kept.among(k) for k in _counts(kept.n)]


def _exchange(plan: Study) -> dict[str, Any]:
    """Likeness to image a and to the next one, b, as G or R goes over from a to b, over all a.

    At the end it is of G(b) + R(a), or of G(a) + R(b); of these, how many are more like b.
    """
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
    follows = bootstrap_interval(100 * (to_b > to_a).double())  # the last: R in whole
    claim = "G(a) + R(b) is taken for b, whose R it is, by more than half"
    plan.claim(claim, follows, "%", section="exchange", note="; ".join(plan.caveats), than=50)
    return {"shares": SHARES, "cosines": cosines}


def _probes(plan: Study) -> dict[str, Any]:
    """Linear classifiers on the pixels of each part: which class, and which of some images."""
    right = {"instance": _instances(plan)}
    if (labels := plan.labels) is not None:
        learn, judge = _flat(plan.scene.split(plan.learn)), _flat(plan.scene.parts)
        right["class"] = {
            part: 100 * (plan.classify(learn[part], judge[part]) == labels).double()
            for part in PARTS
        }
    rows: dict[str, Any] = {"instances": len(right["instance"]["x"])}
    for kind, hits in right.items():
        rows[kind] = {part: bootstrap_interval(values) for part, values in hits.items()}
        claim = f"R keeps more than G, by a linear probe on pixels: which {kind}"
        difference, n = bootstrap_interval(hits["R"] - hits["G"]), len(hits["R"])
        plan.claim(claim, difference, "points", section="parts", by="probe", n=n)
    return rows


def _instances(plan: Study) -> dict[str, Tensor]:
    """Part → percent of new views of each image that a linear classifier of images names rightly.

    Views are mild: in those that encoders are trained with, pixels tell it next to nothing.
    """
    scene, x = plan.scene, plan.scene.x[:INSTANCES]
    views = [
        _flat(scene.split(plan.views("mild", x, INSTANCE_VIEWS, i)))
        for i in range(LEARNT + 1 + JUDGED)
    ]
    which, right = torch.arange(len(x)), {}
    for part in PARTS:
        images = [view[part] for view in views]
        learn, held = (torch.cat(images[:LEARNT]), which.repeat(LEARNT)), (images[LEARNT], which)
        guess = _probe(learn, held, torch.cat(images[LEARNT + 1 :]), len(which))
        right[part] = 100 * (guess.view(JUDGED, -1) == which).double().mean(0)
    return right


def _flat(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: images.flatten(1).cpu() for part, images in parts.items()}


def _probe(
    learn: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], queries: Tensor, classes: int
) -> Tensor:
    """Predictions (Q,) of a linear probe on standardised features (N, D), labels (N,); its penalty
    is chosen on `held`."""
    x, y = learn
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    # Weights under a penalty lie in the span of the N images that they are learnt from: in a basis
    # of it they are the same, and N numbers are fewer than the pixels of an image.
    basis = torch.linalg.qr(((x - mean) / std).T).Q  # (D, min(D, N))
    x, x_held, queries = ((part - mean) / std @ basis for part in (x, held[0], queries))
    fit = linear_probe((x, y), (x_held, held[1]), queries, classes=classes, protocol=PROTOCOL)
    return fit.predictions


def _attacks(plan: Study) -> dict[str, Any]:
    """Curves over ε, each adversary beside IDAA at equal ε and at equal hardness, and over N."""
    scene, witness, epsilons = plan.scene, plan.witness, sorted(plan.config.epsilons)
    # (adversary, ε) → what is read there; the radii of equal hardness come in addition.
    readings = {(a, e): read(scene, witness, a, e) for a in ADVERSARIES for e in epsilons}
    radii: dict[str, float] = {}
    for (adversary, name), epsilon in product(OTHERS.items(), epsilons):
        mine, same = readings["idaa", epsilon], readings[adversary, epsilon]
        loss, losses = mine.row["loss_after"], "loss {:.2f}, {:.2f}"
        about: dict[str, Any] = {"section": "attacks", "adversary": adversary, "epsilon": epsilon}
        claim = f"IDAA ε = {epsilon:.3g} keeps more than {name}"
        note = [losses.format(loss, same.row["loss_after"])]
        plan.compare(f"{claim} of equal ε", mine.kept, same.kept, note, **about)
        about["at"] = "hardness"
        curve = [(e, readings[adversary, e].row["loss_after"]) for e in epsilons]
        loss_at = partial(_loss_at, scene, adversary)
        matched = equal_hardness(loss_at, curve, loss, scene.loss_before)
        if matched is None:
            why = f"no ε of {name} up to {epsilons[-1]:g} is as hard as IDAA"
            why = why if loss > scene.loss_before else "IDAA does not make x harder"
            plan.claim(f"{claim} of equal hardness", None, "", note=why, **about)
            continue
        other = readings[adversary, matched] = read(scene, witness, adversary, matched)
        note = [losses.format(loss, other.row["loss_after"])]
        claim += f" ε = {matched:.3g}, equally hard"
        plan.compare(claim, mine.kept, other.kept, note, **about)
        if adversary == "clae":  # the last is the hardest, where most is at stake
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
        over_n = {a: _among(readings[a, e].kept) for a, e in radii.items()}
        summary["among_attacked"] = over_n | {"radii": radii}
    return summary


def _loss_at(scene: Scene, adversary: str, epsilon: float) -> float:
    return scene.loss(scene.attack(adversary, epsilon)).item()


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
    epsilon = float(brentq(lambda e: loss_at(e) - loss, below, above, xtol=1e-6, rtol=1e-3))
    return epsilon if abs(loss_at(epsilon) - loss) < 0.01 * (loss - start) else None


def _vae(run: Run, axis: str, plan: Study, epsilon: float) -> dict[str, Any]:
    """What another VAE's latent, G, R and x′ hold of the same images."""
    scene, witness = plan.scene, plan.witness
    if run != scene.run:
        scene = replace(scene, run=run, vae=load_vae(run).to(scene.x.device))
    attack = read(scene, witness, "idaa", epsilon).row
    kept = {part: witness.retention(scene.parts[part]).row() for part in ("G", "R")}
    return {
        "value": getattr(run.config, axis),
        "run": run.reference,
        "loss": attack["loss_after"],
        "latent": _latent(scene, plan.config.seed),
        "kept": kept | {"idaa": attack},
    }
