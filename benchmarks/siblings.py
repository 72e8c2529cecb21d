"""`make siblings`: CASSLE, AugSelf, IP-IRM and RSA beside SimCLR and BYOL, with and without IDAA.

    python benchmarks/siblings.py [dataset] [images] [epochs] [row ...]
    python benchmarks/siblings.py steps      # how long a step of each takes, in turns
    python benchmarks/siblings.py planted    # whether IP-IRM's maximisation finds a planted factor

Makes what notebook 11 shows, with a small encoder and a small budget; a stopped one goes on. One
seed of each row, three of SimCLR, CASSLE, AugSelf, IP-IRM and RSA. CIFAR-10 is $IDAA_CIFAR10_ZIP,
else torchvision's. The result file holds what is finished.
"""

from __future__ import annotations

import os
import sys
import time
from statistics import fmean, quantiles
from typing import Any

import pandas as pd
import record
import sides
import torch
from torch.nn import functional as F

from idaa_lib import grids, plans, results, sweeps
from idaa_lib.configs import SSLConfig, SystemsConfig
from idaa_lib.data.cached import load
from idaa_lib.evaluate.invariance import predict_differences
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.identity import systems
from idaa_lib.methods.partitions import Embedded, fit_partition
from idaa_lib.nets.vae import VAE
from idaa_lib.train.passes import count_passes
from idaa_lib.views import keyed_generator

SEEDED = ("simclr_heads", "cassle", "augself", "ipirm", "rsa")
# Keys of the result file, by the metrics of `systems.measure`.
KEYS = {
    "own image found": "retention_found", "own image": "retention_nats",
    "colour read": "r2_colour", "crop read": "r2_crop", "shuffled ω": "shuffled_omega_nats",
}  # fmt: skip


def main(dataset: str = "cifar10", limit: int = 5000, epochs: int = 8, *methods: str) -> None:
    """Make the rows of these methods (of all without any), and write what is finished."""
    if dataset == "cifar10":
        dataset = os.environ.get("IDAA_CIFAR10_ZIP", dataset)
    fields: dict[str, Any] = {
        "dataset": dataset,
        "vae": {"limit": limit, "dim": 128, "width": 16, "epochs": 12},
        "ssl": {"limit": limit, "width": 16, "epochs": epochs, "knn_every": 1},
        "eval": {"limit": limit},
        "jobs": 2,
    }
    methods = methods or SystemsConfig().methods
    seeded = tuple(name for name in methods if name in SEEDED)
    studies: list[dict[str, Any]] = [
        {"methods": seeded if seed else methods, "adversaries": name, "seeds": (seed,)}
        for seeds in ((0,), (1, 2))
        for name in ("none", "idaa")
        for seed in seeds
        if seeded or not seed
    ]
    parts = [grids.cells(SystemsConfig(**fields | study)) for study in studies]
    interrupted = False
    try:
        for grid in parts:  # what a stop leaves out are further seeds
            sweeps.check(sweeps.perform_all(plans.plan(grid), fields["jobs"]))
    except KeyboardInterrupt:
        interrupted = True
    rows = measure([point for grid in parts for point in grid], limit)
    name = "siblings-photos" if dataset == "photos" else "siblings"
    name += f"-{'-'.join(methods)}" if methods != SystemsConfig().methods else ""
    about = "photographs that ship in two dependencies" if dataset == "photos" else "CIFAR-10"
    protocol = f"""{limit:,} training images of {about}, at most as many of each other split,
ResNet-18 of width 16, clean protocol; demo preset (batch 128, rates for a short training),
{epochs} epochs, each row with the views of its system; one VAE for all (m=128, width 16, 12
epochs). Mean of n seeds with Student's 95 % interval where n > 1, else the interval over images.
shuffled_omega_nats (of cassle) and heads_r2 are of validation images. forward_passes: of a
backbone, an image. It shows that each row trains and what its mechanism does, not which is
best."""
    if interrupted:
        protocol += " Stopped before its end: rows that are missing were not made yet."
    print(record.write(name, " ".join(protocol.split()), rows))


def measure(grid: list[grids.Point], limit: int) -> list[dict[str, Any]]:
    """The rows of the result file, of the points that are finished."""
    finished = plans.find_points(grid)
    first = SSLConfig(**grid[0].ssl)
    images = {s: load(first.dataset, s, first.size, limit) for s in ("train", "val", "test")}
    figures = []
    for point, judged in finished:
        run = results.training_of(judged)
        assert run
        about = {"system": point.labels["system"], "adversary": point.ssl["adversary"]}
        measured = systems.measure(run, images)  # `steps` is for time: here other work goes beside
        figures += [about | row for row in measured if row["metric"] != "an epoch"]
        passes = {"metric": "passes", "value": count_passes(run.config), "unit": "an image"}
        figures.append(about | passes)
        if getattr(run.config, "augself", None):
            for name, score in predict_differences(run, images["val"].images).items():
                row = {"metric": f"heads_r2_{name}", "unit": "R²", **score._asdict()}
                figures.append(about | row)
        frame = results.results([judged, run])
        frame = frame[(frame["split"] == "test") & frame["metric"].isin(("kNN", "linear"))]
        for _, row in frame.iterrows():
            fields = {k: row[k] for k in ("metric", "value", "low", "high", "unit")}
            if row["features"] == "encoder":
                figures.append(about | fields)
            else:  # what every encoder has to beat
                reference = {"system": row["features"].replace(" ", "_"), "adversary": ""} | fields
                figures += [reference] * (reference not in figures)  # one for all with its seed
    rows = []
    for (metric, system, adversary), own in pd.DataFrame(figures).groupby(
        ["metric", "system", "adversary"], sort=False
    ):
        values, unit = [*own["value"]], own["unit"].iloc[0]
        several = len(values) > 1
        spread = student_interval(values, unit)[1:] if several else own[["low", "high"]].iloc[0]
        ends = [round(float(end), 4) for end in spread]
        what = f"{KEYS.get(metric, metric.lower())}_{system}_{adversary}".rstrip("_")
        if (metric, system, adversary) == ("shuffled ω", "cassle", "none"):
            what = KEYS[metric]
        if metric == "passes":
            what = f"forward_{what}"
        interval = None if any(end != end for end in ends) else ends
        rows.append(record.row(what, round(fmean(values), 4), unit, len(values), interval))
    return rows


def time_steps(turns: int = 15) -> None:
    """Seconds of a step of each row, in turns within one process, and their ratio to SimCLR's."""
    works = {}
    for point in grids.cells(SystemsConfig(dataset="photos")):
        adversary = point.ssl["adversary"]
        config = SSLConfig(**point.ssl)
        vae = VAE(128, config.size, 16, (0.5,) * 3, (0.25,) * 3) if config.needs_vae else None
        works[point.labels["system"], adversary] = sides.train_steps(config, vae)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for turn in range(turns + 2):
        for key, work in works.items():
            start = time.perf_counter()
            work()
            if turn > 1:  # the first ones warm up
                seconds[key].append(time.perf_counter() - start)
    base = seconds["simclr_heads", "none"]
    rows = []
    for (system, adversary), own in seconds.items():
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        for what, values, unit in (("seconds", own, "s a step"), ("ratio", ratios, "ratio")):
            low, middle, high = quantiles(values, n=4)
            spread = [round(low, 4), round(high, 4)]
            name = f"{what}_{system}_{adversary}"
            rows.append(record.row(name, round(middle, 4), unit, turns, spread))
    protocol = """A step of the training loop with its views, ResNet-18 of width 16, batch 128,
32 px, a VAE of width 16 (m=128), IP-IRM with one partition; all rows in turns within one process.
Median and quartiles of n turns; ratio: to SimCLR with AugSelf's heads and no adversary, in the
same turn."""
    print(record.write("siblings-steps", " ".join(protocol.split()), rows))


def plant(seeds: int = 40, n: int = 256) -> None:
    """The share of images that a partition puts on the side of a planted factor (spec §2.8)."""
    how = SSLConfig(method="ipirm").options("method")
    rows = []
    for length in (0.0, 0.3, 0.6, 0.8, 1.0):
        values = []
        for seed in range(seeds):
            generator = keyed_generator(seed)

            def unit(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
                return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

            factor = torch.arange(n) % 2
            base = unit(n, 32) + (2 * factor - 1)[:, None] * length * unit(32)
            z = Embedded(*(F.normalize(base + 0.3 * unit(n, 32), dim=1) for _ in range(2)))
            scores = torch.randn(n, 2, generator=keyed_generator(seed, 1))
            fitted = fit_partition(lambda *_, z=z: z, scores, how, (seed,))
            same = (fitted.argmax(1) == factor).double().mean().item()
            values.append(max(same, 1 - same))
        low, middle, high = quantiles(values, n=4)
        spread = [round(low, 4), round(high, 4)]
        share = sum(value >= 0.99 for value in values) / seeds
        key = "planted_agreement" + ("" if length == 0.6 else f"_u_{length:g}")
        rows.append(record.row(key, round(middle, 4), "share of images", seeds, spread))
        rows.append(record.row(f"{key}_starts_with_0.99", share, "share of starts", seeds))
    protocol = f"""One maximisation of {n} made embeddings in 32 dimensions: normalised instance +
f·u + noise, instance and noise Gaussian of length 1 and .3, f = ±1, |u| as named. Median and
quartiles over n starts; a partition without sides' names agrees with half of the images at
least."""
    print(record.write("siblings-planted", " ".join(protocol.split()), rows))


if __name__ == "__main__":
    words: list[Any] = sys.argv[1:]
    if words == ["steps"]:
        time_steps()
    elif words == ["planted"]:
        plant()
    else:
        main(*words[:1], *map(int, words[1:3]), *words[3:])  # type: ignore[arg-type]
