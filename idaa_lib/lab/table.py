"""The paper's main table: method × adversary, kNN and linear, beside the paper's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import t as student

from idaa_lib.lab import style
from idaa_lib.lab.style import COLOURS, INK, NAMES
from idaa_lib.methods import METHODS
from idaa_lib.sweeps import Point

# kNN and linear top-1 in percent on CIFAR-10, as published: mean ± spread over seeds whose number
# is not stated, best test epoch (docs/spec/idaa.md §5, §7).
PAPER = {
    "plain": {"none": (82.78, 79.65), "clae": (83.09, 79.94), "idaa": (86.00, 82.83)},
    "uel": {"none": (83.63, 80.63), "clae": (84.00, 80.94), "idaa": (86.69, 83.65)},
    "simsiam": {"none": (88.22, 89.84), "clae": (85.59, 87.77), "idaa": (89.08, 90.99)},
    "simclr": {"none": (80.79, 86.40), "clae": (80.27, 85.25), "idaa": (83.41, 88.07)},
}
PAPER_PROTOCOL = (
    "Paper: CIFAR-10, ResNet-18 of width 64, 50,000 training images, 300 epochs (Plain and UEL "
    "301), official protocol: best test epoch, features and τ of kNN differ between methods."
)
PROBES = {"knn_top1": "kNN", "linear_top1": "linear"}


def frame(made: Sequence[Point], rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for each method × adversary: test top-1 in percent, and the paper's.

    With several seeds the mean and Student's 95 % interval over them; an empty cell has no finished
    run. `n` is the number of seeds.
    """
    table = []
    for cell in dict.fromkeys(_cell(point.labels) for point in made):
        mine = [row for row in rows if _cell(row) == cell]
        method, adversary, elsewhere = cell
        name = NAMES[adversary] + (f", VAE of {Path(elsewhere).stem}" if elsewhere else "")
        row: dict[str, Any] = {"method": _title(method), "adversary": name, "n": len(mine)}
        published = None if elsewhere else PAPER.get(method, {}).get(adversary)
        for (key, probe), theirs in zip(PROBES.items(), published or (None, None), strict=True):
            row[f"{probe} (%)"] = said([r[key] for r in mine])
            row[f"paper's {probe} (%)"] = "–" if theirs is None else f"{theirs:.2f}"
        table.append(row)
    return pd.DataFrame(table)


def said(values: Sequence[float]) -> str:
    """`61.2`, or with several seeds `61.2 [60.1, 62.3]`, or – where there is none."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    low, high = interval(values)
    return f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of two values or more."""
    n, mean = len(values), float(np.mean(values))
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean - half, mean + half


def levels(rows: Sequence[dict[str, Any]]) -> Figure:
    """kNN and linear test top-1 of each method: a bar the mean of an adversary, a dot a seed."""
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
        panel.set(title=probe, xlabel="method")
        panel.set_xticks(range(len(methods)), [_title(method) for method in methods])
        panel.grid(axis="x", visible=False)
    panels[0].set(ylabel="test top-1 (%)")
    handles = [Line2D([], [], color=COLOURS[a], lw=4, label=NAMES[a]) for a in adversaries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(adversaries))
    return figure


def budget(rows: Sequence[dict[str, Any]]) -> str:
    """What these numbers were made with, in a sentence, where it is one; else each with its own."""
    told = {
        key: sorted({row[key] for row in rows}) for key in ("images", "epochs", "width", "n_test")
    }
    text = {key: " or ".join(f"{value:,}" for value in values) for key, values in told.items()}
    protocols = " and ".join(sorted({row["protocol"] for row in rows}))
    return (
        f"Ours: {text['images']} training images, {text['epochs']} epochs, ResNet of width "
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
