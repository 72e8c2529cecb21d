"""The paper's main table: method × adversary, kNN and linear, beside the paper's own numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.lab import style
from idaa_lib.lab.plots import SUBJECTS
from idaa_lib.lab.style import COLOURS, INK, NAMES
from idaa_lib.methods import METHODS
from idaa_lib.sweeps import Point

# kNN and linear top-1 in percent as published, mean ± spread over seeds whose number is not stated
# (docs/spec/idaa.md §5, §7).
PAPER: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "cifar10": {
        "plain": {"none": ("82.78±.20", "79.65±.43"), "clae": ("83.09±.19", "79.94±.28"),
                  "idaa": ("86.00±.16", "82.83±.10")},
        "uel": {"none": ("83.63±.14", "80.63±.18"), "clae": ("84.00±.15", "80.94±.13"),
                "idaa": ("86.69±.13", "83.65±.17")},
        "simsiam": {"none": ("88.22±.10", "89.84±.15"), "clae": ("85.59±.21", "87.77±.08"),
                    "idaa": ("89.08±.12", "90.99±.18")},
        "simclr": {"none": ("80.79±.10", "86.40±.18"), "clae": ("80.27±.18", "85.25±.07"),
                   "idaa": ("83.41±.22", "88.07±.22")},
    },
    "cifar100": {
        "plain": {"none": ("54.73±.20", "51.82±.46"), "clae": ("55.28±.12", "52.14±.21"),
                  "idaa": ("58.64±.15", "56.12±.16")},
        "uel": {"none": ("55.23±.28", "52.99±.25"), "clae": ("55.96±.06", "54.27±.40"),
                "idaa": ("59.04±.18", "57.25±.19")},
        "simsiam": {"none": ("57.13±.20", "62.76±.13"), "clae": ("53.88±.08", "60.89±.22"),
                    "idaa": ("58.19±.19", "65.21±.37")},
        "simclr": {"none": ("41.11±.28", "57.81±.10"), "clae": ("43.57±.17", "57.69±.25"),
                   "idaa": ("46.78±.22", "60.90±.08")},
    },
    "mini-imagenet": {
        "plain": {"none": ("46.96±.32", "44.90±.29"), "clae": ("47.01±.28", "45.43±.15"),
                  "idaa": ("47.83±.29", "46.81±.16")},
        "uel": {"none": ("40.71±.73", "43.08±.35"), "clae": ("41.75±.39", "44.32±.24"),
                "idaa": ("43.24±.32", "45.74±.30")},
        "simsiam": {"none": ("31.68±.28", "40.62±.48"), "clae": ("27.77±3.47", "37.32±.47"),
                    "idaa": ("32.14±.58", "41.24±.51")},
        "simclr": {"none": ("30.13±.28", "46.13±.23"), "clae": ("32.23±.08", "46.76±.16"),
                   "idaa": ("33.66±.16", "48.23±.23")},
    },
}  # fmt: skip
# ImageNet, SimSiam with a ResNet-50 and batch 256: epochs → linear top-1 and top-5.
PAPER_IMAGENET = {
    100: {"none": ("68.1", "88.2"), "idaa": ("69.0", "88.8")},
    200: {"none": ("69.8", "89.2"), "idaa": ("70.6", "89.7")},
}
PAPER_PROTOCOL = {
    "cifar10": (
        "Paper: CIFAR-10, ResNet-18 of width 64, 50,000 training images, 300 epochs (Plain and UEL "
        "301), official protocol: best test epoch, features and τ of kNN differ between methods."
    ),
    "cifar100": (
        "Paper: CIFAR-100, otherwise as CIFAR-10: ResNet-18 of width 64, 50,000 training images, "
        "300 epochs, official protocol: best test epoch."
    ),
    "mini-imagenet": (
        "Paper: mini-ImageNet at 84 px, 100 classes; schedules and stems differ between methods "
        "(docs/spec/idaa.md §4), official protocol: best test epoch."
    ),
    "imagenet": (
        "Paper: ImageNet at 224 px, ResNet-50, batch 256, as many epochs as the row; linear "
        "classifier, inferred to be SimSiam's (LARS on random crops), top-1 and top-5; SimSiam as "
        "the authors ran it again."
    ),
}
PROBES = {"knn_top1": "kNN", "linear_top1": "linear"}


def known(dataset: str, datasets: Collection[str]) -> str | None:
    """Which of the paper's `datasets` a name or path means: `cifar100-images.zip` is CIFAR-100, but
    `imagenet-100` and `cifar10-c` are data of their own."""
    name = Path(dataset).name.lower().replace("_", "-").replace("miniimagenet", "mini-imagenet")
    name = name.removesuffix(".zip").removesuffix("-images")
    return name if name in datasets else None


def protocol(made: Sequence[Point]) -> str:
    """What the paper's numbers are of, in a sentence; nothing where it has none of these images."""
    return PAPER_PROTOCOL.get(known(made[0].ssl["dataset"], PAPER_PROTOCOL) or "", "")


def frame(made: Sequence[Point], rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for each method × adversary: test top-1 in percent, and the paper's on the same images.

    On ImageNet top-5 of the linear probe too. With several seeds the mean and Student's 95 %
    interval over them; an empty cell has no finished run. `n` is the number of seeds. Last the
    encoder before training and raw pixels, where they were judged. Where trainings differ in
    length, each row says its own.
    """
    table, lengths = [], {row["epochs"] for row in rows}
    for cell in dict.fromkeys(_cell(point.labels) for point in made):
        mine = [row for row in rows if _cell(row) == cell]
        method, adversary, elsewhere = cell
        name = NAMES[adversary] + (f", VAE of {Path(elsewhere).stem}" if elsewhere else "")
        row: dict[str, Any] = {"method": _title(method), "adversary": name, "n": len(mine)}
        if len(lengths) > 1:
            row["epochs"] = " or ".join(map(str, sorted({r["epochs"] for r in mine}))) or "–"
        for key, (probe, theirs) in _beside(made[0], mine, cell).items():
            row[f"{probe} (%)"] = said([r[key] for r in mine if r[key] is not None])
            row[f"paper's {probe} (%)"] = theirs
        table.append(row)
    for name, level in references(rows).items():
        row = {"method": name, "adversary": "–", "n": "–"}
        table.append(row | {f"{probe} (%)": f"{level[key]:.2f}" for key, probe in PROBES.items()})
    return pd.DataFrame(table).fillna("–")


def references(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """`untrained encoder` and `raw pixels` → kNN and linear top-1, under the clean protocol, where
    they are the same for every method."""
    for row in rows:
        if row.get("protocol") == "clean" and row.get("random_knn_top1") is not None:
            return {
                SUBJECTS[prefix]: {key: row[f"{prefix}{key}"] for key in PROBES}
                for prefix in ("random_", "pixels_")
            }
    return {}


def _beside(
    point: Point, mine: Sequence[dict[str, Any]], cell: tuple[str, str, str | None]
) -> dict[str, tuple[str, str]]:
    """Key of a row → its name and the paper's number, for one method × adversary."""
    method, adversary, elsewhere = cell
    data = known(point.ssl["dataset"], PAPER_PROTOCOL)
    names, found = PROBES, PAPER.get(data or "", {}).get(method, {}).get(adversary)
    if data == "imagenet":
        names = PROBES | {"linear_top5": "linear top-5"}
        by_epochs = [PAPER_IMAGENET.get(epochs, {}) for epochs in {row["epochs"] for row in mine}]
        if method == "simsiam" and len(by_epochs) == 1 and adversary in by_epochs[0]:
            found = ("–", *by_epochs[0][adversary])
    if found is None or elsewhere:
        found = ("–",) * len(names)
    return {key: (name, text) for (key, name), text in zip(names.items(), found, strict=True)}


def said(values: Sequence[float]) -> str:
    """`61.2`, or with several seeds `61.2 [60.1, 62.3]`, or – where there is none."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    mean, low, high = student_interval(values)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def levels(rows: Sequence[dict[str, Any]]) -> Figure:
    """kNN and linear test top-1 of each method: a bar the mean of an adversary, a dot a seed; a
    line what an untrained encoder and raw pixels have."""
    beside = references(rows)
    rows = [row for row in rows if not row["vae_of"]]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    adversaries = list(dict.fromkeys(row["adversary"] for row in rows))
    figure, panels = style.axes(1, 2, figsize=(9.6, 3.8), sharey=True)
    width = 0.8 / len(adversaries)
    for (key, probe), panel in zip(PROBES.items(), panels, strict=True):
        for i, adversary in enumerate(adversaries):
            for at, method in enumerate(methods):
                wanted = (method, adversary)
                values = [r[key] for r in rows if (r["method"], r["adversary"]) == wanted]
                x = at + (i - (len(adversaries) - 1) / 2) * width
                if values:
                    # A level, not a column: the axis does not start at 0.
                    half = 0.45 * width
                    panel.hlines(np.mean(values), x - half, x + half, COLOURS[adversary], lw=4)
                    panel.plot([x] * len(values), values, ".", color=INK, markersize=5)
        for (name, level), dash in zip(beside.items(), ("--", ":"), strict=False):
            panel.axhline(level[key], color=INK, lw=1, ls=dash, alpha=0.6, label=name)
        panel.set(title=probe, xlabel="method")
        panel.set_xticks(range(len(methods)), [_title(method) for method in methods])
        panel.grid(axis="x", visible=False)
    panels[0].set(ylabel="test top-1 (%)")
    handles = [Line2D([], [], color=COLOURS[a], lw=4, label=NAMES[a]) for a in adversaries]
    handles += panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def budget(rows: Sequence[dict[str, Any]]) -> str:
    """What these numbers were made with, in a sentence, where it is one; else each with its own."""
    told = {
        key: sorted({row[key] for row in rows}) for key in ("images", "epochs", "width", "n_test")
    }
    text = {key: " or ".join(f"{value:,}" for value in values) for key, values in told.items()}
    data = " and ".join(sorted({row["dataset"] for row in rows}))
    protocols = " and ".join(sorted({row["protocol"] for row in rows}))
    return (
        f"Ours: {data}, {text['images']} training images, {text['epochs']} epochs, ResNet of width "
        f"{text['width']}, {text['n_test']} test images, {protocols} protocol."
    )


def missing(made: Sequence[Point], rows: Sequence[dict[str, Any]]) -> str:
    """Which cells have no finished run for each seed, and how they come about."""
    have = {(*_cell(row), row["seed"]) for row in rows}
    lacking = [
        f"{p.labels['method']} × {p.labels['adversary']} (seed {p.ssl['seed']})"
        for p in made
        if (*_cell(p.labels), p.ssl["seed"]) not in have
    ]
    if not lacking:
        return "Every cell has its runs."
    return (
        f"{len(lacking)} of {len(made)} runs are missing: {', '.join(lacking)}. They are made with "
        f"launch = True."
    )


def _cell(labels: Mapping[str, Any]) -> tuple[str, str, str | None]:
    return labels["method"], labels["adversary"], labels["vae_of"]


def _title(method: str) -> str:
    return getattr(METHODS.get(method), "__name__", method)
