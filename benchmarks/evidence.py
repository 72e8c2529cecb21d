"""`make evidence`: do the paper's claims hold on CIFAR-10, at a scale that two cores can reach?

    python benchmarks/evidence.py          # make what is missing, in order, then write
    python benchmarks/evidence.py write    # the result file of all that is finished

Takes about twelve hours of two cores. Ctrl-C or SIGTERM stops it after a step, and the same command
goes on, to the same bits. What is finished goes into evidence.jsonl beside this file, a line each.
Commit it: another machine then goes on with what is missing, also without `outputs/` of this one.
Images: all training images of CIFAR-10 ($IDAA_CIFAR10_ZIP, else torchvision's), and for the VAE on
other images two sets that packages ship.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import record
import torch
from PIL import Image
from scipy.optimize import brentq

from idaa_lib import grids, plans, results, runs, train
from idaa_lib.configs import DecomposeConfig, EvalConfig, TheoryConfig, VAEConfig
from idaa_lib.data.cached import data_root
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.grids import Point
from idaa_lib.identity import study
from idaa_lib.identity.scene import ADVERSARIES as ATTACKS
from idaa_lib.identity.scene import Scene, loss, open_scene
from idaa_lib.runs import RESULTS_VERSION, Run, Stopped, checkpoints
from idaa_lib.runs.machine import hardware, open_images, uses_bf16

DATASET = os.environ.get("IDAA_CIFAR10_ZIP", "cifar10")
ENTRIES = Path(__file__).with_name("evidence.jsonl")
# By what is worth most where time ends: the claim, then what else could explain it.
ADVERSARIES = ("none", "idaa", "clae", "random_sign")
SEEDS = (0, 1, 2)
EPOCHS = 6
# Of SimCLR alone in the seconds of 6 with IDAA, whose step takes 1.86 times as long (result files
# `speed-steps`; 1.87 on another processor).
EQUAL_SECONDS = 11
EPSILONS = (0.03, 0.1, 0.3, 1.0)
IMAGES = 2000
# Of shorter VAEs that keep fewer nats: is it the rate that decides where identity is?
RATES: dict[str, Any] = {"epochs": 3, "limit": 20000, "width": 32, "dim": 128, "seed": 0}
KAPPAS = (0.1, 1.0, 10.0, 100.0)
ENCODERS: dict[str, Any] = {"run": "starter", "witness": "starter2"}
# Sets that packages ship, on which the VAE of CIFAR-10 serves, or does not.
OTHER_IMAGES = ("photos", "digits")
OTHER: dict[str, Any] = {"epochs": 10, "limit": 2000, "width": 16}
# Figure 6 at a small scale: one field at a time around ε .1, β .4 and dim 128.
AXES = {"epsilon": [0.03, 0.1, 0.3, 1.0], "beta": [0.04, 0.4, 4.0], "dim": [32, 128, 512]}
SMALLER: dict[str, Any] = {"epochs": 6, "limit": 10000, "width": 16}
CPU = torch.device("cpu")
Rows = Iterator[dict[str, Any]]
PROTOCOL = f"""All training images of CIFAR-10 (44,988 after a tenth is held out for validation)
from JPEG class folders, recipe `cifar10`: batch 256, Adam, the same batches, views and number of
steps for each adversary. ResNet-18 of width 16, {EPOCHS} epochs, SimCLR; ε .1 (clae: the recipe's).
*_at_equal_seconds: {EQUAL_SECONDS} epochs without an adversary, which take as long as IDAA's.
VAE: the starter's (width 32, dim 128, κ .1, 30 epochs). Clean protocol: kNN and linear classifier
(penalty chosen on validation) on the 10,000 test images. Means over n seeds with Student's 95 %
interval; differences are paired by seed, and all of one seed are of one precision: bf16 where the
processor has it. Identity: {IMAGES} validation images; the starter's encoder (SimCLR, seed 0) is
attacked, the starter's witness (seed 1) judges, by other views of the
images (recipe `mild`); bootstrapped 95 % intervals over the images; equal hardness: the ε of CLAE
at which the attacked loss is IDAA's. rise_*: how much SimCLR's loss of (x, x') rises by the
attacked encoder and by the witness, whom no attack saw; Student's 95 % interval over 4 batches of
250 images. *_kappa_*: the same for 500 images and VAEs of width 32 and
dim 128 after 3 epochs on 20,000 images, which differ in κ alone. *_on_photos, *_on_digits: SimCLR,
recipe `demo`, width {OTHER["width"]}, {OTHER["epochs"]} epochs, at most {OTHER["limit"]:,} training
images of the photographs that scikit-image and scikit-learn ship, and of scikit-learn's handwritten
digits (the last fifth is the test split): without an adversary, with IDAA by the starter's VAE
(cifar10_vae), and with IDAA by a VAE of its size and epochs that was trained on those images
(own_vae). *_epsilon_*, *_beta_*, *_dim_*: SimCLR + IDAA, recipe `demo` on {SMALLER["limit"]:,}
images of CIFAR-10, width {SMALLER["width"]}, {SMALLER["epochs"]} epochs, a VAE (width 32, 12
epochs) for each β, dim and seed; one field at a time around ε .1, β .4 and dim 128."""


def grid(adversaries: tuple[str, ...] = ADVERSARIES, epochs: int = EPOCHS) -> list[Point]:
    """SimCLR with each adversary, seed by seed, so that whole comparisons come first."""
    fixed = {
        "all": {"preset": "cifar10", "dataset": DATASET, "device": "cpu"},
        "ssl": {
            "width": 16, "epochs": epochs, "knn_every": 3, "checkpoint_every": 1, "compile": True,
        },
        "eval": {"references": False},
    }  # fmt: skip
    needs_vae = {"idaa", "random_sign"}
    cross = [{"adversary": a} | ({"vae": "starter"} if a in needs_vae else {}) for a in adversaries]
    whole = {"fixed": fixed, "cross": {"ssl": cross}, "labels": {"part": "comparison"}}
    parts = [whole | {"seeds": [seed]} for seed in SEEDS]
    return [point for part in parts for point in grids.read(part).points()]


def longer_grid() -> list[Point]:
    """SimCLR without an adversary for as many epochs as take the seconds of IDAA's."""
    return grid(("none",), EQUAL_SECONDS)


def other_grid() -> list[Point]:
    """SimCLR on other images, seed by seed: without an adversary, with IDAA by the VAE of CIFAR-10,
    and with IDAA by a VAE of the images themselves."""
    cross = [
        {"adversary": "none"}, {"adversary": "idaa", "vae": "starter"}, {"adversary": "idaa"},
    ]  # fmt: skip
    vae = runs.get("vae", "starter").config
    points = []
    for seed, name in itertools.product(SEEDS, OTHER_IMAGES):
        dataset = name if name == "photos" else str(write_digits())
        fixed = {
            "all": {"preset": "demo", "dataset": dataset, "device": "cpu", "limit": OTHER["limit"]},
            "vae": {key: getattr(vae, key) for key in ("epochs", "width", "dim")},
            "ssl": {**OTHER, "knn_every": OTHER["epochs"], "compile": True},
            "eval": {"references": False},
        }
        labels = {"part": "other images", "set": name}
        part = {"fixed": fixed, "cross": {"ssl": cross}, "labels": labels, "seeds": [seed]}
        points += grids.read(part).points()
    return points


def sensitivity_grid() -> list[Point]:
    """SimCLR without an adversary, and with IDAA over ε, β and dim, axis by axis: one that is
    finished has all its seeds."""
    images = {"preset": "demo", "dataset": DATASET, "device": "cpu", "limit": SMALLER["limit"]}
    fixed = {
        "all": images,
        "vae": {"width": 32, "epochs": 12, "beta": 0.4, "dim": 128},
        "ssl": {**SMALLER, "knn_every": SMALLER["epochs"], "compile": True, "adversary": "idaa"},
        "eval": {"references": False},
    }
    common = {"fixed": fixed, "labels": {"part": "sensitivity", "axis": None, "at": None}}
    plain = {"fixed": {"ssl": {"adversary": "none"}}}
    axes = [
        {"vary": {"ssl" if name == "epsilon" else "vae": {name: values}}}
        for name, values in AXES.items()
    ]
    parts = [
        common | {"seeds": [seed], "grids": [part]} for part in (plain, *axes) for seed in SEEDS
    ]
    return [point for part in parts for point in grids.read(part).points()]


def write_digits() -> Path:
    """scikit-learn's 1,797 handwritten digits as class folders: `train`, and the last fifth as
    `test`."""
    from sklearn.datasets import load_digits

    folder, digits = data_root() / "digits", load_digits()
    first_of_test = len(digits.target) * 4 // 5
    for i, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if i < first_of_test else "test"
        path = folder / split / str(digit) / f"{i:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype("uint8")).save(path)
    return folder


def describe_point(point: Point) -> dict[str, Any]:
    """What tells a point from the others: also the weights of a VAE that it names."""
    names: tuple[str, ...] = ("part", "set", "axis", "at")
    about: dict[str, Any] = {k: point.labels[k] for k in names if k in point.labels}
    names = ("adversary", "seed", "epochs", "width", "limit")
    about |= {name: point.ssl[name] for name in names if name in point.ssl}
    about["vae"] = "own" if about["adversary"] == "idaa" else None
    if name := point.ssl.get("vae"):
        about["vae"] = checkpoints.digest(runs.get("vae", name))[:12]
    about["precision"] = "bf16" if uses_bf16("auto", CPU) else "fp32"
    return about | describe_images("train", point.ssl["dataset"])


def describe_study(config: TheoryConfig) -> dict[str, Any]:
    """What tells a study from one of other encoders, images or ε."""
    encoders = [checkpoints.digest(runs.get("ssl", name))[:12] for name in ENCODERS.values()]
    about = {"encoders": encoders, "n": config.images, "epsilons": [*config.epsilons]}
    return about | describe_images("val")


def describe_images(split: str, dataset: str | None = None) -> dict[str, Any]:
    """The pixels that are read (a JPEG copy of CIFAR-10 has others), and the library's version."""
    images = open_images(dataset or DATASET, split, 32, None).fingerprint[:12]
    return {"images": images, "results_version": RESULTS_VERSION}


def find_points(points: list[Point]) -> list[dict[str, Any]]:
    """What was finished so far of these. A processor decides the precision. Entries of one seed
    and set are of one precision, of which most are finished, so that they compare."""
    groups: dict[Any, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for about in map(describe_point, points):
        del about["precision"]
        for entry in find_entries(about):
            groups[entry["seed"], entry.get("set")][entry["precision"]].append(entry)
    return [entry for group in groups.values() for entry in max(group.values(), key=len)]


def read_entries() -> list[dict[str, Any]]:
    """What was finished so far, on any machine."""
    lines = ENTRIES.read_text(encoding="utf-8").splitlines() if ENTRIES.exists() else []
    return [json.loads(line) for line in lines]


def find_entries(about: dict[str, Any]) -> list[dict[str, Any]]:
    """What was finished so far of what this describes."""
    return [entry for entry in read_entries() if about.items() <= entry.items()]


def keep(about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Add a line, with what made it."""
    here = {"hardware": hardware(), "date": datetime.date.today().isoformat()}
    line = json.dumps(about | figures | here, ensure_ascii=False)
    with ENTRIES.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def make_points(points: list[Point]) -> None:
    """Train and judge each point that is missing."""
    for point in points:
        about = describe_point(point)
        if find_entries(about):
            continue
        by_task: dict[str, Run] = {}
        for name, (config, needs) in plans.plan([point]).items():
            config = plans.name_needs(config, needs, by_task)
            judge = isinstance(config, EvalConfig)
            by_task[name] = evaluate(config) if judge else train.train(config)
        *_, training, evaluation = by_task.values()
        frame = results.results([evaluation])
        test = frame[(frame["split"] == "test") & (frame["features"] == "encoder")]
        figures = {m: test.loc[test["metric"] == m, "value"].item() for m in ("kNN", "linear")}
        keep(about, figures | {"seconds": round((training.summary or {})["seconds"])})


def studies() -> Iterator[tuple[dict[str, Any], TheoryConfig, VAEConfig | None]]:
    """The studies of notebook 08: what tells each from the others, its configuration, and the VAE
    to train for it, None for the starter's. First one with the starter's VAE, then smaller ones
    with VAEs that differ in κ alone."""
    images: dict[str, Any] = {"preset": "cifar10", "dataset": DATASET, "device": "cpu"}
    config = TheoryConfig(
        **images, **ENCODERS, vae="starter", images=IMAGES, limit=10000, epsilons=EPSILONS
    )
    weights = checkpoints.digest(runs.get("vae", "starter"))[:12]
    yield {"part": "identity", "vae": weights, **describe_study(config)}, config, None
    config = config.replace(images=500, limit=2000, epsilons=(*EPSILONS[1:], 3.0))
    for kappa in KAPPAS:
        about = {"part": "rate", "kappa": kappa, **RATES, **describe_study(config)}
        yield about, config, VAEConfig(**images, **RATES, kappa=kappa)


def study_identity() -> None:
    """Make each study that is missing."""
    for about, config, own in studies():
        if find_entries(about):
            continue
        vae = train.train(own) if own else runs.get("vae", "starter")
        summary = study(config.replace(vae=vae.reference)).summary or {}
        names = ("epsilon", "loss_after", "retrieved", "consistency")
        curves = {
            a: [{k: row[k] for k in names} for row in rows] for a, rows in summary["curves"].items()
        }
        figures = {name: summary[name] for name in ("loss_before", "claims")}
        rate = {"rate_nats": (vae.summary or {})["rate_nats"]}
        keep(about, rate | figures | {"curves": curves})


def describe_hardness() -> dict[str, Any]:
    """What tells the comparison of hardness from one of other networks or images."""
    return next(studies())[0] | {"part": "hardness"}


def compare_hardness() -> None:
    """Keep how hard attacks that are equally hard for the attacked encoder are for another one."""
    if find_entries(about := describe_hardness()):
        return
    attacked, other = (
        open_scene(DecomposeConfig(vae="starter", run=name, dataset=DATASET), IMAGES // 2)
        for name in ENCODERS.values()
    )

    def excess(log_epsilon: float, attack: str, target: float) -> float:
        with torch.no_grad():
            return attacked.loss(attacked.attack(attack, math.exp(log_epsilon))).item() - target

    rows: list[dict[str, Any]] = []
    for epsilon in EPSILONS:
        target = excess(math.log(epsilon), "idaa", 0.0)
        for attack in ATTACKS:
            low, high, radius = math.log(1e-4), math.log(30.0), epsilon
            if attack != "idaa":
                if excess(high, attack, target) < 0:
                    continue  # no radius is as hard
                how = {"args": (attack, target), "xtol": 0.01}
                radius = math.exp(brentq(excess, low, high, **how))
            images = attacked.attack(attack, radius)
            rises = {
                "attacked": measure_rise(attacked, images),
                "other": measure_rise(other, images),
            }
            rows.append({"epsilon": epsilon, "attack": attack, "radius": radius} | rises)
    keep(about, {"rises": rows})


@torch.no_grad()
def measure_rise(scene: Scene, images: torch.Tensor) -> list[float]:
    """How much the loss of each batch rises by a scene's encoder, with these images for x."""
    parts = zip(scene.batches, images.chunk(len(scene.batches)), strict=True)
    return [(loss(z, scene.embed(part)) - loss(z, scene.embed(x))).item() for (x, z), part in parts]


def write() -> str:
    """Where the result file of all entries was written."""
    values = collect(grid() + longer_grid(), name_training)
    rows = [row for metric, own in values.items() for row in summarise(metric, own)]
    rows += describe_other_images()
    rows += describe_sensitivity()
    for about, _, own in studies():
        ending = f"_kappa_{own.kappa:g}" if own else ""
        for entry in find_entries(about):
            figures = [*describe_identity(entry["claims"]), *describe_classes(entry)]
            rows += [row | {"what": row["what"] + ending} for row in figures]
            rate = round(entry["rate_nats"], 1)
            rows.append(record.row(f"vae_rate{ending}", rate, "nats", 1))
    for entry in find_entries(describe_hardness()):
        for row, by in itertools.product(entry["rises"], ("attacked", "other")):
            ends = [round(end, 4) for end in student_interval(row[by])[1:]]
            what = f"rise_by_{by}_encoder_{row['attack']}_as_hard_as_idaa_{row['epsilon']:g}"
            rows.append(record.row(what, round(fmean(row[by]), 4), "nats", len(row[by]), ends))
    rows += describe_vae(runs.get("vae", "starter"))
    machines = "; ".join(sorted({entry["hardware"] for entry in read_entries()}))
    protocol = f"{' '.join(PROTOCOL.split())} Made on: {machines}."
    return str(record.write("evidence", protocol, rows))


def collect(
    points: list[Point], name: Callable[[dict[str, Any]], str]
) -> dict[str, dict[str, dict[int, float]]]:
    """Metric → what `name` calls an entry → seed → accuracy, of the points that are finished."""
    values: Any = defaultdict(lambda: defaultdict(dict))
    for entry, metric in itertools.product(find_points(points), ("kNN", "linear")):
        values[metric.lower()][name(entry)][entry["seed"]] = entry[metric]
    return values


def name_training(entry: dict[str, Any]) -> str:
    """The adversary, and whether the epochs are those of equal seconds."""
    return entry["adversary"] + "_at_equal_seconds" * (entry["epochs"] == EQUAL_SECONDS)


def describe_other_images() -> Rows:
    """Rows of the VAE of CIFAR-10 on other images: means, and differences paired by seed."""
    grid = other_grid()
    for name in OTHER_IMAGES:
        points = [point for point in grid if point.labels["set"] == name]
        for metric, by_vae in collect(points, name_vae).items():
            ending = f"{metric}_on_{name}"
            for which, by_seed in by_vae.items():
                yield average(f"evidence_{which}_{ending}", [*by_seed.values()])
            for which in ("no_adversary", "own_vae"):
                what = f"evidence_difference_cifar10_vae_{which}_{ending}"
                yield from subtract(what, by_vae["cifar10_vae"], by_vae[which])


def name_vae(entry: dict[str, Any]) -> str:
    """Which VAE a training on other images had."""
    return {None: "no_adversary", "own": "own_vae"}.get(entry["vae"], "cifar10_vae")


def describe_sensitivity() -> Rows:
    """Rows of each value of ε, β and dim: means, and differences to no adversary paired by seed."""

    def name_place(entry: dict[str, Any]) -> str:
        return f"{entry['axis']}_{entry['at']:g}" if entry["axis"] else "no_adversary_of_axes"

    values = collect(sensitivity_grid(), name_place)
    for metric, by_place in values.items():
        plain = by_place.get("no_adversary_of_axes", {})
        for at, by_seed in by_place.items():
            yield average(f"evidence_{metric}_{at}", [*by_seed.values()])
            if at != "no_adversary_of_axes":
                yield from subtract(f"evidence_difference_{at}_none_{metric}", by_seed, plain)


def summarise(metric: str, by_adversary: dict[str, dict[int, float]]) -> Rows:
    """Rows of each adversary's mean, and of IDAA's differences to the others, paired by seed;
    by_adversary: adversary → seed → value."""
    for adversary, by_seed in by_adversary.items():
        yield average(f"evidence_{metric}_{adversary}", [*by_seed.values()])
    idaa = by_adversary.get("idaa", {})
    for other, theirs in by_adversary.items():
        if other != "idaa":
            yield from subtract(f"evidence_difference_idaa_{other}_{metric}", idaa, theirs)


def subtract(what: str, ours: dict[int, float], theirs: dict[int, float]) -> Rows:
    """A row of the mean difference of seeds that both have, none where there is no such seed."""
    if pairs := [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]:
        yield average(what, pairs)


def average(what: str, values: list[float]) -> dict[str, Any]:
    """A row of one value a seed: their mean, with Student's interval where there are several."""
    spread = None
    if len(values) > 1:
        spread = [round(end, 3) for end in student_interval(values)[1:]]
    return record.row(what, round(fmean(values), 3), "% top-1", len(values), spread)


def describe_identity(claims: list[dict[str, Any]]) -> Rows:
    """Rows of what the witness keeps: R against G, and IDAA against others at each ε."""
    units = {"hits": "points", "gains": "nats", "probe": "points"}
    for claim in claims:
        unit = units.get(claim.get("by", ""), claim["unit"])
        if claim["value"] is None:
            continue
        if claim["section"] == "exchange":
            what = "identity_exchange_taken_for_whose_R_it_is"
        elif claim["section"] == "attacks":
            at = "equal_hardness" if claim.get("at") else "equal_epsilon"
            what = f"identity_difference_idaa_{claim['adversary']}_{unit}_{at}"
            what += f"_{claim['epsilon']:g}"
        elif claim["section"] == "parts":
            which = claim["claim"].rpartition(": ")[2].replace(" ", "_")
            what = f"identity_R_minus_G_{which if claim['by'] == 'probe' else unit}"
        else:
            continue
        ends = [round(claim[end], 4) for end in ("low", "high")]
        yield record.row(what, round(claim["value"], 4), unit, claim["n"], ends)


def describe_classes(entry: dict[str, Any]) -> Rows:
    """Rows of what a supervised judge keeps: how many x′ have the class that a linear probe on the
    witness's features gives x, at IDAA's ε and where CLAE is as hard."""
    for reading in entry["curves"]["idaa"]:
        loss, readings = reading["loss_after"], entry["curves"]["clae"]
        other = min(readings, key=lambda row: abs(row["loss_after"] - loss))
        if abs(other["loss_after"] - loss) > 0.02 * (loss - entry["loss_before"]):
            continue  # no ε of CLAE is as hard
        at = f"{reading['epsilon']:g}"
        yield record.row(f"identity_class_kept_idaa_{at}", reading["consistency"], "%", entry["n"])
        what = f"identity_class_kept_clae_as_hard_as_idaa_{at}"
        yield record.row(what, other["consistency"], "%", entry["n"])


def describe_vae(run: Run) -> Rows:
    """Rows of a VAE's reconstruction on validation, and of how much it fell in 5 epochs."""
    errors = [row["reconstruction_val"] for row in run.metrics() if "reconstruction_val" in row]
    change = round(1 - errors[-1] / errors[-6:][0], 5)
    yield record.row("vae_reconstruction", round(errors[-1], 5), "mean squared error", 1)
    yield record.row("vae_reconstruction_fell_in_5_epochs", change, "share", 1)


if __name__ == "__main__":
    try:
        if sys.argv[1:] != ["write"]:
            study_identity()
            compare_hardness()
            make_points(other_grid())
            make_points(grid())
            make_points(longer_grid())
            make_points(sensitivity_grid())
        print(write())
    except Stopped as stop:
        sys.exit(str(stop))
