"""The study of notebook 08: how much identity z, G, R and x′ hold on a user's own data.

`study` measures (docs/spec/idaa.md §6, by `theory`) and writes a run; `findings` makes figures and
sentences from its summary alone, so that a finished study is shown again without its networks.

Identity is judged by a witness (`judge`) and by linear probes on pixels, under attacks (`attacks`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib import runs
from idaa_lib.configs import ConfigError, DecomposeConfig, TheoryConfig, UserError
from idaa_lib.evaluate.encoders import load_vae
from idaa_lib.evaluate.metrics import bootstrap_interval
from idaa_lib.identity import theory
from idaa_lib.identity.scene import (
    UNTRAINED,
    Pictures,
    attacked_encoder,
    open_pictures,
    witness,
)
from idaa_lib.identity.theory import Bound
from idaa_lib.lab.attacks import Attacks, adversaries
from idaa_lib.lab.judge import (
    BATCH,
    INSTANCE_VIEWS,
    NOISE,
    Judge,
    Plan,
    classify,
    counts,
    decomposed,
    labels_of,
    probe,
    row_of,
    views_of,
)
from idaa_lib.nets import evaluating
from idaa_lib.nets.vae import VAE, rate
from idaa_lib.runs import Run, checkpoints
from idaa_lib.runs.machine import describe, open_images, settled, torch_device
from idaa_lib.views import keyed_generator, normalise

PARTS = ("x", "G", "R")
LABELS = {"x": "x", "G": "G(x)", "R": "R(x)"}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a part that is exchanged between two images
# Instance probe: so many images, and views of each to learn, to choose the penalty, to judge.
INSTANCES, LEARNT, JUDGED = 60, 3, 4
VAES = 8  # of one axis at most, the newest


# --- the study ----------------------------------------------------------------------------------


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


def _plan(config: TheoryConfig) -> Plan:
    n, device = config.images, torch_device(config.device)
    shown = open_pictures(
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
    return Plan(config, run, shown, embed, see, data, train, others)


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


def _measure(plan: Plan) -> dict[str, Any]:
    config, shown, n = plan.config, plan.shown, len(plan.shown.x)
    judge = Judge(plan)
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
    attacks = Attacks(shown, plan.embed, judge, config)
    told |= adversaries(plan, judge, attacks)
    middle = config.epsilons[len(config.epsilons) // 2]
    told["vaes"] = {
        axis: [_of_vae(other, axis, plan, judge, middle) for other in members]
        for axis, members in plan.others.items()
        if len(members) > 1
    } | {"epsilon": middle}
    return told


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


def _parts(plan: Plan, judge: Judge) -> dict[str, Any]:
    """Retention of x, G and R by the witness, of exchanged parts, and the linear probes."""
    shown = plan.shown
    split = decomposed(shown.vae, shown.x)
    kept = {part: judge.retention(images) for part, images in split.items()}
    k = counts(len(shown.x))
    found: dict[str, Any] = {
        "parts": {part: row_of(held) for part, held in kept.items()},
        "among": {"k": k} | {part: [held.among(i) for i in k] for part, held in kept.items()},
        "R_minus_G": {
            "retrieved": bootstrap_interval(kept["R"].hits - kept["G"].hits),
            "infonce": bootstrap_interval(kept["R"].gains - kept["G"].gains),
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
                followed = bootstrap_interval(100 * (to_b > to_a).double())
    found["exchange"] = {"shares": SHARES, "cosines": like, "follows_R": followed}
    found["probes"] = _probes(plan, judge, split)
    return found


def _probes(plan: Plan, judge: Judge, split: dict[str, Tensor]) -> dict[str, Any]:
    """Linear classifiers on the pixels of each part: which class, and which of some images."""
    shown, config = plan.shown, plan.config
    found: dict[str, Any] = {"instance": _probed(_instances(shown, judge, config.seed))}
    found["instances"] = min(INSTANCES, len(judge.images))
    if (labels := labels_of(plan)) is not None:
        learn = decomposed(
            shown.vae, normalise(plan.train.images, shown.mean, shown.std).to(shown.x)
        )
        right = {}
        for part in PARTS:
            guess = classify(plan, learn[part].flatten(1).cpu(), split[part].flatten(1).cpu())
            right[part] = 100 * (guess == labels).double()
        found["class"] = _probed(right)
    return found


def _instances(shown: Pictures, judge: Judge, seed: int) -> dict[str, Tensor]:
    """Part → percent of new views of each image that a linear classifier of images names rightly.

    Views are mild: in those that encoders are trained with, pixels tell it next to nothing.
    """
    images = judge.images[:INSTANCES]
    mild = views_of("mild", shown)
    views = [
        decomposed(shown.vae, mild(images, keyed_generator(seed, INSTANCE_VIEWS, i)).images)
        for i in range(LEARNT + 1 + JUDGED)
    ]
    which, found = torch.arange(len(images)), {}
    for part in PARTS:
        flat = [view[part].flatten(1).cpu() for view in views]
        learnt = torch.cat(flat[:LEARNT]), which.repeat(LEARNT)
        guess = probe(learnt, (flat[LEARNT], which), torch.cat(flat[LEARNT + 1 :]), len(which))
        right = guess.view(JUDGED, -1) == which
        found[part] = 100 * right.double().mean(0)
    return found


def _probed(right: dict[str, Tensor]) -> dict[str, Any]:
    rows: dict[str, Any] = {part: bootstrap_interval(values) for part, values in right.items()}
    return rows | {"R_minus_G": bootstrap_interval(right["R"] - right["G"])}


def _of_vae(run: Run, axis: str, plan: Plan, judge: Judge, epsilon: float) -> dict[str, Any]:
    """What another VAE's latent, G, R and x′ hold of the same images."""
    shown = plan.shown
    if run != shown.run:
        shown = replace(shown, run=run, vae=load_vae(run).to(shown.x.device))
    split = decomposed(shown.vae, shown.x)
    attacked = Attacks(shown, plan.embed, judge, plan.config).read("idaa", epsilon)
    return {
        "value": getattr(run.config, axis), "run": run.reference,
        "latent": _latent(shown.vae, shown, plan.config.seed),
        "loss": attacked.loss_after,
        "kept": {part: row_of(judge.retention(split[part])) for part in ("G", "R")}
        | {"idaa": row_of(attacked.kept)},
    }  # fmt: skip
