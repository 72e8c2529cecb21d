"""`make compare`: every method with every adversary, on a subset of CIFAR-10.

    python benchmarks/methods.py [images] [epochs] [methods] [adversaries]

Makes what notebook 06 shows, with a small encoder and a small budget: that each pair trains, not
which is best. One seed, SimCLR three, and one more for IDAA with a VAE of photographs. About 90
minutes on 2 cores; a stopped one goes on. Runs stay in outputs/, the executed notebook in
outputs/notebooks/. Images: $IDAA_CIFAR10_ZIP, else torchvision's. Some methods alone
(`simsiam,byol none,idaa`) have a result file of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import record

from idaa_lib import grids, plans, sweeps
from idaa_lib.configs import CompareConfig
from idaa_lib.results import ADVERSARIES as NAMES
from idaa_lib.results import groups
from idaa_lib.runs import outputs_root

METHODS = CompareConfig.model_fields["methods"].default
ADVERSARIES = ("none", "clae", "idaa", "random_sign")
# Without negatives they start slowly: as short, neither passes an untrained encoder. Longer, and in
# smaller batches, which makes twice the steps of the same images.
SLOW, SLOWER, SMALLER = ("simsiam", "byol"), 2.5, 64


def main(
    limit: int = 5000,
    epochs: int = 7,
    methods: Sequence[str] = METHODS,
    adversaries: Sequence[str] = ADVERSARIES,
) -> None:
    whole = (tuple(methods), tuple(adversaries)) == (METHODS, ADVERSARIES)
    fields: dict[str, Any] = {
        "dataset": os.environ.get("IDAA_CIFAR10_ZIP", "cifar10"),
        "vae": {"limit": limit, "dim": 128, "width": 16, "epochs": 12},
        "ssl": {"limit": limit, "width": 16, "epochs": epochs, "knn_every": epochs},
        "eval": {"limit": limit},
        "jobs": 2,
        "adversaries": tuple(adversaries),
    }
    longer = round(SLOWER * epochs)
    settings = {"epochs": longer, "knn_every": longer, "batch_size": SMALLER}
    slow = {name: settings for name in SLOW if name in methods}
    fields["ssl_of"] = slow
    once = CompareConfig(preset="demo", **fields, methods=tuple(methods))
    grid = grids.cells(once)
    if "simclr" in methods:
        simclr = fields | {"ssl_of": {}, "methods": ("simclr",)}
        if "idaa" in adversaries:
            # Photographs: nothing of CIFAR-10, and there without a download.
            elsewhere = simclr | {"adversaries": ("idaa",), "elsewhere": "photos"}
            grid += grids.cells(CompareConfig(preset="demo", **elsewhere))[1:]
        grid += grids.cells(CompareConfig(preset="demo", **simclr, seeds=(1, 2)))
    resumed, start = any(outputs_root().glob("*/*/config.json")), time.monotonic()
    outcomes = sweeps.perform_all(plans.plan(grid), once.jobs)
    minutes = (time.monotonic() - start) / 60
    sweeps.check(outcomes)
    frame = plans.table(grid)
    for group in groups(frame):
        print(group.title, group.table.to_string(), group.protocols, sep="\n")
    parameters = fields | {"seeds": "0, 1, 2" if "simclr" in methods else "0"}
    parameters |= {"methods": ", ".join(methods), "adversaries": ", ".join(adversaries)}
    parameters |= {key: json.dumps(parameters[key]) for key in ("vae", "ssl", "ssl_of", "eval")}
    notebook = outputs_root() / "notebooks" / "06_compare_methods.ipynb"
    sweeps.execute("06_compare_methods", parameters, notebook)
    lengths = f"{epochs} epochs"
    if slow:
        lengths += f", {' and '.join(slow)} {longer} in batches of {SMALLER}"
    protocol = f"""{limit:,} training images, ResNet of width 16, clean protocol. CIFAR-10 as JPEG
class folders where the zip is used; demo preset (batch 128, learning rates for a short training),
{lengths}; one VAE for all (m=128, width 16, 12 epochs). Mean over n seeds, spread [least, most]
where n > 1. It shows that each pair trains, not which is best: with so short a training differences
of some percent are noise. minutes: all of it, two notebooks at a time."""
    frame = frame[(frame["split"] == "test") & frame["metric"].isin(("kNN", "linear"))]
    encoders = frame[frame["features"] == "encoder"].fillna({"vae_of": ""})
    by = encoders.groupby(["metric", "method", "adversary", "vae_of"], sort=False)
    results = [_row(names, [*rows["value"]]) for names, rows in by]
    for (metric, of), rows in frame.groupby(["metric", "features"], sort=False):
        if of != "encoder":
            what = f"{metric.lower()}_{of.replace(' ', '_')}"
            results.append(record.row(what, round(rows["value"].iloc[0], 2), "% top-1", 1))
    if not resumed:  # else it is the time of a part
        results.append(record.row("minutes", round(minutes, 1), "min", 1))
    name = "methods" if whole else "-".join(["methods", *methods])
    print(record.write(name, " ".join(protocol.split()), results))


def _row(names: Any, values: list[float]) -> dict[str, Any]:
    metric, method, adversary, vae_of = names
    keys = {name: key for key, name in NAMES.items()}
    what = f"{metric}_{method}_{keys[adversary]}".lower() + (f"_vae_of_{vae_of}" if vae_of else "")
    spread = [round(min(values), 2), round(max(values), 2)] if len(values) > 1 else None
    return record.row(what, round(fmean(values), 2), "% top-1", len(values), spread)


if __name__ == "__main__":
    words: list[Any] = [*map(int, sys.argv[1:3]), *(word.split(",") for word in sys.argv[3:])]
    main(*words)
