"""`make evidence`: do the paper's claims hold on CIFAR-10, at a scale that two cores can reach?

    python benchmarks/evidence.py          # make what is missing, in order
    python benchmarks/evidence.py write    # the result file of what is finished

Takes days of a CPU. Ctrl-C or SIGTERM stops it after a step, and the same command goes on, to the
same bits. Images: all 50,000 training images of CIFAR-10 ($IDAA_CIFAR10_ZIP, else torchvision's).
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import record

from idaa_lib import grids, results, sweeps, train
from idaa_lib.configs import EvalConfig
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.grids import Point
from idaa_lib.runs import Run, Stopped

DATASET = os.environ.get("IDAA_CIFAR10_ZIP", "cifar10")
ADVERSARIES = ("none", "idaa", "clae", "random_sign")
SEEDS = (0, 1, 2)
Accuracies = dict[str, dict[str, dict[int, float]]]
Rows = Iterator[dict[str, Any]]
PAPER_VAE = {"epochs": 60, "seed": 0, "compile": True}  # width 64, dim 512, κ .1: the recipe's
PROTOCOL = """All training images of CIFAR-10 (45,000 after a tenth is held out for validation) from
JPEG class folders, recipe `cifar10`: batch 256, Adam, the same batches, views and number of steps
for each adversary. ResNet-18 of width 16, 20 epochs, SimCLR; ε .1 (clae: the recipe's). VAE: width
64, dim 512, κ .1, 60 epochs. Clean protocol: kNN and linear classifier (penalty chosen on
validation) on the 10,000 test images. Means over n seeds with Student's 95 % interval; differences
are paired by seed."""


def grid() -> list[Point]:
    """SimCLR with each adversary, seed by seed, so that whole comparisons come first."""
    fixed = {
        "all": {"preset": "cifar10", "dataset": DATASET, "device": "cpu"},
        "vae": PAPER_VAE,
        "ssl": {"width": 16, "epochs": 20, "knn_every": 1, "checkpoint_every": 1},
        "eval": {"references": False},
    }
    cross = {"ssl": {"adversary": ADVERSARIES}}
    return [
        point
        for seed in SEEDS
        for point in grids.read({"fixed": fixed, "cross": cross, "seeds": [seed]}).points()
    ]


def write() -> str:
    """Where the result file of all finished runs was written."""
    values: Accuracies = defaultdict(lambda: defaultdict(dict))
    for point, judged in sweeps.finished(grid()):
        frame = results.results([judged])
        test = frame[(frame["split"] == "test") & (frame["features"] == "encoder")]
        for metric in ("kNN", "linear"):
            value = test.loc[test["metric"] == metric, "value"].item()
            values[metric.lower()][point.ssl["adversary"]][point.ssl["seed"]] = value
    rows = [*compare(values), *describe_vaes()]
    return str(record.write("evidence", " ".join(PROTOCOL.split()), rows))


def compare(values: Accuracies) -> Rows:
    """Rows of each adversary's accuracy, and of IDAA's differences to the others, paired by seed;
    `values`: metric → adversary → seed → accuracy (%)."""
    for metric, by_adversary in values.items():
        for adversary, by_seed in by_adversary.items():
            yield summarise(f"evidence_{metric}_{adversary}", [*by_seed.values()])
        idaa = by_adversary.get("idaa", {})
        for other, theirs in by_adversary.items():
            if other == "idaa":
                continue
            if pairs := [idaa[seed] - theirs[seed] for seed in idaa.keys() & theirs.keys()]:
                yield summarise(f"evidence_difference_idaa_{other}_{metric}", pairs)


def summarise(what: str, values: list[float]) -> dict[str, Any]:
    """A row of one value a seed: their mean, with Student's interval where there are several."""
    spread = None
    if len(values) > 1:
        spread = [round(end, 3) for end in student_interval(values)[1:]]
    return record.row(what, round(fmean(values), 3), "% top-1", len(values), spread)


def describe_vaes() -> Rows:
    """Rows of each finished VAE: its reconstruction error on validation, and by how much that
    fell in the last 5 epochs."""
    for task in sweeps.plan(grid()).values():
        if task.config.stage != "vae" or not (run := train.locate(task.config)).finished:
            continue
        errors = [row["reconstruction_val"] for row in run.metrics() if "reconstruction_val" in row]
        change = round(1 - errors[-1] / errors[-6], 5)
        yield record.row("vae_reconstruction", round(errors[-1], 5), "mean squared error", 1)
        yield record.row("vae_reconstruction_fell_in_5_epochs", change, "share", 1)


def main() -> None:
    """Train and judge what is missing, in order."""
    runs: dict[str, Run] = {}
    for key, (config, needs) in sweeps.plan(grid()).items():
        config = config.replace(**{field: runs[other].reference for field, other in needs.items()})
        runs[key] = evaluate(config) if isinstance(config, EvalConfig) else train.train(config)
        print(runs[key].id, flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:] != ["write"]:
            main()
        print(write())
    except Stopped as stop:
        sys.exit(str(stop))
