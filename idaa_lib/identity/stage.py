"""The study of notebook 08 as a stage: how much identity z, G, R and x′ hold on given images.

Identity is judged by a `Witness` that looks for x among other views of the N images, and by linear
probes on pixels; attacks are compared at equal ε and at equal hardness (docs/spec/idaa.md §6).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from idaa_lib.identity.scene import ADVERSARIES, BATCH, UNTRAINED, Scene, Witness, open_scene, read
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import rate
from idaa_lib.runs import Run, checkpoints
from idaa_lib.runs.machine import describe, open_images, settled, torch_device
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.views import keyed_generator, normalise, recipe

PARTS = ("x", "G", "R")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a part that is exchanged between two images
# Instance probe: so many images, and views of each to learn, to choose the penalty, to judge.
INSTANCES, LEARNT, JUDGED = 60, 3, 4
# Linear probes on pixels: a coarse grid, which is enough to compare parts.
PROTOCOL = CLEAN._replace(
    penalties=(10.0, 1.0, 1e-1, 1e-2, 1e-3), standardise=False, refit=False, iterations=50
)
VAES = 8  # of one axis at most, the newest
# Streams of random numbers beside the images' own order.
CANDIDATES, NOISE, HALVES, INSTANCE_VIEWS = 1, 2, 3, 4


@dataclass(frozen=True)
class StudyPlan(Plan):
    """The run with what it measures: train has images to learn classes from, others VAEs to compare
    (`siblings`)."""

    scene: Scene
    train: ImageSet
    others: dict[str, list[Run]]


def study(config: TheoryConfig) -> Run:
    """Measure what `config` describes; a finished study is given back as it is.

    Raises:
        RunError: there is no finished VAE run. ConfigError: the images or the encoders do not fit.
    """
    plan = plan_study(config)

    def body(_: object) -> dict[str, Any]:
        with torch.no_grad():
            return _measure(plan)

    return perform(plan, body)


def plan_study(config: TheoryConfig) -> StudyPlan:
    """The run that `config` leads to, with its images, its VAE and the encoders' names."""
    chosen = DecomposeConfig(
        vae=config.vae, run=config.run, dataset=config.dataset, split=config.split, seed=config.seed
    )
    device = torch_device(config.device)
    scene = open_scene(chosen, config.images, device)
    names = {"vae": scene.run.reference, "run": scene.attacked}
    names["witness"] = scene.witness(config.witness)
    names["dataset"] = settled(config.dataset or scene.run.config.dataset)
    config = config.model_copy(update=names)
    size = scene.run.config.size
    data = open_images(names["dataset"], config.split, size, None)
    train = open_images(names["dataset"], "train", size, config.limit)
    others = siblings(scene.run)
    weights = "".join(checkpoints.digest(run) for axis in others.values() for run in axis)
    encoders = {
        role: None if names[role] == UNTRAINED else checkpoints.digest(runs.get("ssl", names[role]))
        for role in ("run", "witness")
    }
    run = runs.run_for(
        config, data.fingerprint, vae=checkpoints.digest(scene.run), train=train.fingerprint,
        others=hashlib.sha256(weights.encode()).hexdigest(), **encoders,
    )  # fmt: skip
    about = describe(device, "no", data)
    return StudyPlan(config, run, scene, train, others, environment=about)


def siblings(run: Run) -> dict[str, list[Run]]:
    """Finished VAE runs on the same images that differ from `run` in β alone, and in dim alone.

    The newest `VAES` of each by ascending value, `run` itself among them.
    """
    members = {axis: {getattr(run.config, axis): run} for axis in ("beta", "dim")}
    for other in runs.find("vae", dataset=run.config.dataset, size=run.config.size):
        if (axis := _axis(run, other)) and len(members[axis]) < VAES:
            members[axis].setdefault(getattr(other.config, axis), other)
    return {axis: [found[value] for value in sorted(found)] for axis, found in members.items()}


def _axis(one: Run, other: Run) -> str | None:
    """`beta` or `dim`, if two VAE runs on the same images differ in that alone."""

    def rest(run: Run) -> tuple[dict[str, Any], str]:
        axes = {"beta", "dim", "kappa"}  # κ follows from the others
        fields = {k: v for k, v in run.config.identity().items() if k not in axes}
        return fields, run.environment["dataset"]["fingerprint"]

    with contextlib.suppress(UserError, KeyError):  # one is damaged
        a, b = one.config, other.config
        if rest(one) == rest(other):
            beta, dim = math.isclose(a.beta, b.beta, rel_tol=1e-6), a.dim == b.dim
            return "beta" if dim and not beta else "dim" if beta and not dim else None
    return None


def _measure(plan: StudyPlan) -> dict[str, Any]:
    config, scene, n = plan.config, plan.scene, len(plan.scene.x)
    witness = make_witness(plan)
    print(f"VAE {config.vae}\nattacked: {config.run}\nwitness: {config.witness}")
    summary = {"n": n, "log_n": math.log(n), "candidates": config.augmentation}
    summary |= {"attacked": config.run, "witness": config.witness, "caveats": caveats(config)}
    summary["latent"] = _latent(scene, config.seed)
    summary |= _parts(scene, witness)
    summary["exchange"] = _exchange(scene, witness)
    summary["probes"] = _probes(plan)
    summary |= _attacks(plan, witness)
    middle = config.epsilons[len(config.epsilons) // 2]
    summary["vaes"] = {
        axis: [_vae(other, axis, plan, witness, middle) for other in members]
        for axis, members in plan.others.items()
        if len(members) > 1
    } | {"epsilon": middle}
    return summary


def make_witness(plan: StudyPlan) -> Witness:
    """The witness with its candidates, other views of the images."""
    scene, config = plan.scene, plan.config
    views = recipe(config.augmentation, scene.x.shape[-1], scene.mean, scene.std)
    generator = keyed_generator(config.seed, CANDIDATES)
    return Witness(scene, config.witness, views(_bytes(scene), generator).images)


def caveats(config: TheoryConfig) -> list[str]:
    """Why the witness of a resolved configuration is no fair judge; empty where it is one."""
    if config.witness == UNTRAINED:
        return ["the witness is untrained: it sees colours and edges more than content"]
    witness, found = runs.get("ssl", config.witness), []
    if (adversary := witness.config.adversary) != "none":
        found.append(f"the witness was trained with {adversary}, to see past such changes")
    if config.run != UNTRAINED:
        attacked = runs.get("ssl", config.run)
        fields = ("seed", "backbone", "width", "stem")
        same = all(getattr(witness.config, k) == getattr(attacked.config, k) for k in fields)
        if same and not any("imported" in run.environment for run in (witness, attacked)):
            found.append("the witness began with the attacked encoder's weights: the same seed")
    return found


# --- the latent ---------------------------------------------------------------------------------


def _latent(scene: Scene, seed: int) -> dict[str, Any]:
    """What z says of y, and Theorem 3.5's bound, of the scene's VAE on its images."""
    x, vae, n = scene.x, scene.vae, len(scene.x)
    with evaluating(vae):
        codes = [vae.encode(part) for part in x.split(BATCH)]
        mu, logvar = (torch.cat(parts) for parts in zip(*codes, strict=True))
        z = theory.sample(mu, logvar, keyed_generator(seed, NOISE))
        G = torch.cat([vae.decode(part) for part in z.split(BATCH)])
    mse = (x - G).square().mean().item()
    mu, logvar = mu.double().cpu(), logvar.double().cpu()
    exact = theory.information(mu, logvar, keyed_generator(seed, NOISE, 1))
    sizes = sorted({min(n, k) for k in (*(2**power for power in range(1, 10)), n)})
    batches = [
        (k, *theory.batch_bounds(mu, logvar, k, keyed_generator(seed, NOISE, k))) for k in sizes
    ]
    step, beta = [1 / (255 * std) for std in scene.std], scene.run.config.beta
    bound = theory.Bound(
        n=n,
        distortion=theory.distortion(mse, x.shape[-1], step),
        rate=rate(mu, logvar).mean().item(),
        information=exact.nats,
        # The configuration's is of unit variance; here of the distortion's (spec §1: β ∝ 1/s²).
        beta=beta / (mse + theory.quantisation(step)),
    )
    return {
        **asdict(bound), "error": exact.error, "batches": batches, "mse": mse, "vae_beta": beta,
        "continuous_distortion": theory.distortion(mse, x.shape[-1]),
        # JSON has no −∞, which it is at β = 0.
        "bound": bound.nats if bound.beta else None, "limit": bound.limit,
    }  # fmt: skip


# --- x, G and R ---------------------------------------------------------------------------------


def _parts(scene: Scene, witness: Witness) -> dict[str, Any]:
    """What the witness retains of x, G and R."""
    kept = {part: witness.retention(images) for part, images in scene.parts.items()}
    k = _counts(scene)
    return {
        "parts": {part: held.row() for part, held in kept.items()},
        "among": {"k": k} | {part: [held.among(i) for i in k] for part, held in kept.items()},
        "R_minus_G": _difference(kept["R"], kept["G"]),
    }


def _difference(one: theory.Retention, other: theory.Retention) -> dict[str, Any]:
    """One less the other, over the same images: retrieval in points, InfoNCE in nats."""
    return {
        "retrieved": bootstrap_interval(one.hits - other.hits),
        "infonce": bootstrap_interval(one.gains - other.gains),
    }


def _counts(scene: Scene) -> list[int]:
    """Numbers of candidates to look among, 2 to N."""
    return sorted({round(k) for k in np.geomspace(2, len(scene.x), 12)})


def _exchange(scene: Scene, witness: Witness) -> dict[str, Any]:
    """Likeness to image a and to the next one, b, as G or R goes over from a to b, over all a.

    At the end it is of G(b) + R(a), or of G(a) + R(b); of these, how many are more like b.
    """
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
    return {"shares": SHARES, "cosines": cosines, "follows_R": follows}


# --- linear probes ------------------------------------------------------------------------------


def _probes(plan: StudyPlan) -> dict[str, Any]:
    """Linear classifiers on the pixels of each part: which class, and which of some images."""
    scene = plan.scene
    right = {"instance": _instances(scene, plan.config.seed)}
    if (labels := _labels(plan)) is not None:
        learn = scene.split(normalise(plan.train.images, scene.mean, scene.std).to(scene.x))
        flat = {
            part: (learn[part].flatten(1).cpu(), scene.parts[part].flatten(1).cpu())
            for part in PARTS
        }
        right["class"] = {
            part: 100 * (_classify(plan, *pair) == labels).double() for part, pair in flat.items()
        }
    return {"instances": min(INSTANCES, len(scene.x))} | {
        kind: {part: bootstrap_interval(values) for part, values in of.items()}
        | {"R_minus_G": bootstrap_interval(of["R"] - of["G"])}
        for kind, of in right.items()
    }


def _instances(scene: Scene, seed: int) -> dict[str, Tensor]:
    """Part → percent of new views of each image that a linear classifier of images names rightly.

    Views are mild: in those that encoders are trained with, pixels tell it next to nothing.
    """
    images = _bytes(scene)[:INSTANCES]
    mild = recipe("mild", scene.x.shape[-1], scene.mean, scene.std)
    views = [
        scene.split(mild(images, keyed_generator(seed, INSTANCE_VIEWS, i)).images)
        for i in range(LEARNT + 1 + JUDGED)
    ]
    which, right = torch.arange(len(images)), {}
    for part in PARTS:
        flat = [view[part].flatten(1).cpu() for view in views]
        learn = torch.cat(flat[:LEARNT]), which.repeat(LEARNT)
        queries = torch.cat(flat[LEARNT + 1 :])
        guess = _probe(learn, (flat[LEARNT], which), queries, len(which)).view(JUDGED, -1)
        right[part] = 100 * (guess == which).double().mean(0)
    return right


def _labels(plan: StudyPlan) -> Tensor | None:
    """Classes of the studied images; None where they, or those to learn from, have none."""
    labels = plan.scene.labels[: len(plan.scene.x)]
    usable = bool((labels >= 0).all()) and plan.train.labelled and len(plan.train.classes) > 1
    return labels if usable else None


def _classify(plan: StudyPlan, features: Tensor, queries: Tensor) -> Tensor:
    """Classes of queries (Q, D) by a linear probe on features (N, D) of `plan.train`."""
    order = torch.randperm(len(features), generator=keyed_generator(plan.config.seed, HALVES))
    fifth = max(1, len(order) // 5)
    learn, held = ((features[i], plan.train.labels[i]) for i in (order[fifth:], order[:fifth]))
    return _probe(learn, held, queries, len(plan.train.classes))


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
    x, x_held, x_queries = ((part - mean) / std @ basis for part in (x, held[0], queries))
    fit = linear_probe((x, y), (x_held, held[1]), x_queries, classes=classes, protocol=PROTOCOL)
    return fit.predictions


# --- attacks ------------------------------------------------------------------------------------


def _attacks(plan: StudyPlan, witness: Witness) -> dict[str, Any]:
    """Curves over ε, each adversary beside IDAA at equal ε and at equal hardness, and over N."""
    scene = plan.scene
    epsilons = sorted(plan.config.epsilons)
    grid = {name: [read(scene, witness, name, e) for e in epsilons] for name in ADVERSARIES}
    curves = {name: list(curve) for name, curve in grid.items()}
    equal, hardest = [], None
    for i, mine in enumerate(grid["idaa"]):
        for name in ADVERSARIES[1:]:
            trail = [(point.epsilon, point.loss_after) for point in grid[name]]
            loss_at = partial(_loss_at, scene, name)
            epsilon = equal_hardness(loss_at, trail, mine.loss_after, scene.loss_before)
            matched = epsilon and read(scene, witness, name, epsilon)
            row: dict[str, Any] = {"adversary": name, "epsilon": mine.epsilon, "matched": epsilon}
            for at, other in (("at_equal_epsilon", grid[name][i]), ("at_equal_hardness", matched)):
                row[at] = None
                if other:
                    row[at] = {"loss": (mine.loss_after, other.loss_after)}
                    row[at] |= _difference(mine.kept, other.kept)
            equal.append(row)
            if matched:
                curves[name].append(matched)
                hardest = (mine, matched) if name == "clae" else hardest
    for curve in curves.values():
        curve.sort(key=lambda point: point.epsilon)
    rows = {name: [point.row for point in curve] for name, curve in curves.items()}
    if (labels := _labels(plan)) is not None:
        points = [point for curve in curves.values() for point in curve]
        learn = normalise(plan.train.images, scene.mean, scene.std).to(scene.x)
        queries = [witness.features(scene.x), *(point.features for point in points)]
        guess = _classify(plan, witness.features(learn), torch.cat(queries)).view(-1, len(labels))
        for point, share in zip(points, (guess[1:] == guess[0]).double().mean(1), strict=True):
            point.row["consistency"] = 100 * share.item()
    summary: dict[str, Any] = {"loss_before": scene.loss_before, "equal": equal, "curves": rows}
    if hardest:  # the hardest pair, where most is at stake
        k, (mine, matched) = _counts(scene), hardest
        summary["among_attacked"] = {
            "epsilon": mine.epsilon, "matched": matched.epsilon,
            "idaa": [mine.kept.among(i) for i in k], "clae": [matched.kept.among(i) for i in k],
        }  # fmt: skip
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


# --- other VAEs ---------------------------------------------------------------------------------


def _vae(run: Run, axis: str, plan: StudyPlan, witness: Witness, epsilon: float) -> dict[str, Any]:
    """What another VAE's latent, G, R and x′ hold of the same images."""
    scene = plan.scene
    if run != scene.run:
        scene = replace(scene, run=run, vae=load_vae(run).to(scene.x.device))
    attack = read(scene, witness, "idaa", epsilon)
    kept = {part: witness.retention(scene.parts[part]).row() for part in ("G", "R")}
    return {
        "value": getattr(run.config, axis), "run": run.reference, "loss": attack.loss_after,
        "latent": _latent(scene, plan.config.seed), "kept": kept | {"idaa": attack.row},
    }  # fmt: skip


def _bytes(scene: Scene) -> Tensor:
    """The scene's images as uint8: `normalise` lost nothing."""
    return scene.pixels(scene.x).mul(255).round().to(torch.uint8)
