"""The figures of the notebooks: each takes tensors or runs and gives back a matplotlib Figure.

Colours are Okabe & Ito's, which colour-blind readers can tell apart; no axis is without a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from idaa_lib.runs import Run

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LABELS = {
    "loss": "loss (nats)",
    "clean_loss": "loss on clean pairs (nats)",
    "adversarial_loss": "loss on (x, x′) (nats)",
    "reconstruction": "reconstruction (MSE)",
    "kl": "KL term of the loss (nats / 3m)",
    "reconstruction_val": "validation reconstruction (MSE)",
    "rate_nats_val": "rate on validation (nats per image)",
    "knn_top1_val": "validation kNN top-1 (%)",
    "alignment": "alignment (squared distance)",
    "uniformity": "uniformity (log mean kernel)",
    "embedding_std": "embedding std (√D · std, sphere = 1)",
    "effective_rank": "effective rank of features",
    "moved": "‖x′ − x‖₂ (normalised units)",
}
# The prefixes of a summary's accuracies, and what they are of.
SUBJECTS = {"": "this run", "random_": "untrained encoder", "pixels_": "raw pixels"}

sns.set_theme(
    context="notebook",
    style="whitegrid",
    palette=PALETTE,
    rc={"figure.dpi": 110, "savefig.bbox": "tight", "axes.labelsize": "small",
        "axes.titlesize": "medium", "axes.titleweight": "bold", "grid.color": "#e4e4e4",
        "font.family": "DejaVu Sans"},
)  # fmt: skip


def image_rows(rows: Mapping[str, Tensor], title: str = "") -> Figure:
    """Images in labelled rows.

    Args:
        rows: label → pixels in [0, 1] (N, 3, H, W); values outside are clipped.
    """
    n = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), n, figsize=(1.05 * n + 1.6, 1.1 * len(rows) + 0.4), squeeze=False
    )
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        # The first cell's left edge carries the row's name; its axes are off, so as text.
        line[0].text(-0.12, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
    figure.suptitle(title, fontsize="medium", fontweight="bold")
    figure.subplots_adjust(wspace=0.04, hspace=0.04, top=0.92 if title else 0.99)
    return figure


def curves(runs: Mapping[str, Run], keys: Sequence[str]) -> Figure:
    """Training curves from metrics.jsonl, one panel a key, one line a run (label → run)."""
    keys = [k for k in keys if any(k in line for run in runs.values() for line in run.metrics())]
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    for key, axis in zip(keys, axes.flat, strict=False):
        for label, run in runs.items():
            points = [(line["step"], line[key]) for line in run.metrics() if key in line]
            if points:
                marker = "o" if len(points) <= 20 else None
                axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
        axis.set(xlabel="step", ylabel=LABELS.get(key, key))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(runs) > 1:
            axis.legend(fontsize="small")
    return figure


def energy_maps(maps: Mapping[str, Tensor]) -> Figure:
    """Where in the image something lives: per-pixel RMS over images and channels, on one scale.

    Args:
        maps: label → differences or parts (N, 3, H, W), normalised units.
    """
    found = {label: part.square().mean((0, 1)).sqrt().numpy() for label, part in maps.items()}
    figure, axes = plt.subplots(
        1, len(maps), figsize=(2.6 * len(maps) + 0.6, 3), squeeze=False, layout="constrained"
    )
    highest = max(part.max() for part in found.values())
    for axis, (label, part) in zip(axes.flat, found.items(), strict=True):
        shown = axis.imshow(part, cmap="magma", vmin=0, vmax=highest)
        axis.set(title=label, xlabel="x (pixels)")
        axis.grid(False)
    axes[0, 0].set(ylabel="y (pixels)")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="RMS (normalised units)")
    return figure


def spectra(parts: Mapping[str, Tensor]) -> Figure:
    """In which frequencies something lives: radially averaged power of (N, 3, H, W)."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for label, part in parts.items():
        frequency, power = radial_power(part)
        axis.plot(frequency, power, label=label, marker="o", markersize=3)
    axis.set(
        yscale="log",
        xlabel="spatial frequency (cycles per image)",
        ylabel="mean power (normalised units²)",
        title="Which frequencies each part holds",
    )
    axis.legend()
    return figure


def radial_power(part: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies 0, 1, …, H/2 cycles per image and the mean power |FFT|²/HW in each ring."""
    h, w = part.shape[-2:]
    power = torch.fft.fft2(part.double()).abs().square().mean((0, 1)) / (h * w)
    fy = torch.fft.fftfreq(h, 1 / h)
    fx = torch.fft.fftfreq(w, 1 / w)
    ring = (fy[:, None].square() + fx[None].square()).sqrt().round().long().flatten()
    rings = min(h, w) // 2 + 1
    inside = ring < rings
    total = torch.zeros(rings, dtype=torch.float64).index_add_(
        0, ring[inside], power.flatten()[inside]
    )
    count = torch.bincount(ring[inside], minlength=rings)
    return np.arange(rings), (total / count).numpy()


def accuracy_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """An evaluation's accuracies with n, 95 % interval and protocol, reference rows below."""
    rows = []
    for prefix, name in SUBJECTS.items():
        for probe in ("knn", "linear"):
            key = f"{prefix}{probe}"
            if f"{key}_top1" in summary:
                low, high = summary[f"{key}_low"], summary[f"{key}_high"]
                rows.append(
                    {
                        "features": name,
                        "probe": "kNN" if probe == "knn" else "linear",
                        "top-1 (%)": round(summary[f"{key}_top1"], 2),
                        "95 % interval": f"{low:.1f} – {high:.1f}",
                        "n": summary[f"{key}_n"],
                        "protocol": summary[f"{key}_protocol"],
                    }
                )
    return pd.DataFrame(rows)


def accuracy_bars(summary: Mapping[str, Any]) -> Figure:
    """The same as bars with their 95 % intervals."""
    names = {p: name for p, name in SUBJECTS.items() if f"{p}knn_top1" in summary}
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for shift, probe, label in ((-0.2, "knn", "kNN"), (0.2, "linear", "linear")):
        top, low, high = (
            np.array([summary[f"{p}{probe}_{end}"] for p in names])
            for end in ("top1", "low", "high")
        )
        at = np.arange(len(names)) + shift
        axis.bar(at, top, 0.38, label=label, yerr=np.abs([top - low, high - top]), capsize=4)
    axis.set_xticks(range(len(names)), list(names.values()))
    axis.set(ylabel="top-1 (%)", ylim=(0, 100))
    axis.set_title(f"Accuracy on {summary['knn_n']:,} test images, with 95 % intervals")
    axis.legend(title="probe", loc="upper right")
    return figure


def confusion(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Rows: true class, columns: predicted class; percent of the row."""
    n = len(classes)
    counts = torch.bincount(labels * n + predictions, minlength=n * n).reshape(n, n)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    figure, axis = plt.subplots(figsize=(0.52 * n + 2.2, 0.46 * n + 1.6), layout="constrained")
    sns.heatmap(
        percent.numpy(), annot=n <= 20, fmt=".0f", cmap="Blues", vmin=0, vmax=100, ax=axis,
        xticklabels=classes, yticklabels=classes, cbar_kws={"label": "percent of the true class"},
    )  # fmt: skip
    axis.set(
        xlabel="predicted class", ylabel="true class", title="Confusion of the linear probe on test"
    )
    return figure


def embedding_map(
    features: Tensor, labels: Tensor, classes: Sequence[str], seed: int = 0
) -> Figure:
    """t-SNE (after PCA to 50 dimensions) of features (N, D), coloured by class."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n, d = features.shape
    flat = PCA(min(50, n, d), random_state=0).fit_transform(features.numpy())
    perplexity = min(30, (n - 1) / 3)
    place = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat)
    figure, axis = plt.subplots(figsize=(8, 5.4), layout="constrained")
    colours = sns.color_palette("husl", len(classes)) if len(classes) > 7 else PALETTE
    for c, name in enumerate(classes):
        mine = labels.numpy() == c
        axis.scatter(
            place[mine, 0], place[mine, 1], s=12, color=colours[c], label=name, linewidths=0
        )
        # Neighbouring hues are hard to tell apart: the name stands at the middle of its class.
        if mine.any():
            x, y = np.median(place[mine], axis=0)
            box = dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.7)
            axis.annotate(name, (x, y), fontsize="small", ha="center", weight="bold", bbox=box)
    axis.set(
        xlabel="t-SNE 1 (arbitrary units)",
        ylabel="t-SNE 2 (arbitrary units)",
        title=f"Test features, {n:,} images",
    )
    axis.legend(fontsize="small", markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def neighbours(
    features: Tensor,
    images: Tensor,
    labels: Tensor,
    queries: Sequence[int],
    classes: Sequence[str],
) -> Figure:
    """Each query and its nearest other images, up to 8, by cosine; green where the class agrees."""
    z = torch.nn.functional.normalize(features, dim=1)
    similarity = z[list(queries)] @ z.T
    similarity[torch.arange(len(queries)), list(queries)] = -torch.inf
    count = min(8, len(z) - 1)
    near = similarity.topk(count, dim=1).indices
    size = (1.07 * (count + 1), 1.1 * len(queries))
    figure, axes = plt.subplots(len(queries), count + 1, figsize=size, squeeze=False)
    for line, q, found in zip(axes, queries, near, strict=True):
        name = classes[int(labels[q])]
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        for axis, i in zip(line, [q, *found.tolist()], strict=True):
            axis.imshow(images[i].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            same = labels[i] == labels[q]
            colour = "#000000" if i == q else ("#009E73" if same else "#D55E00")
            for side in axis.spines.values():
                side.set(color=colour, linewidth=2.5)
    axes[0, 0].set_title("query", fontsize="small")
    axes[0, (count + 1) // 2].set_title(
        "nearest first: green = same class, orange = another", fontsize="small"
    )
    figure.subplots_adjust(wspace=0.08, hspace=0.12)
    return figure


def sensitivity(rows: pd.DataFrame) -> Figure:
    """Validation accuracy over ε, β and dim: a column each, kNN above, linear below.

    Several seeds give their mean and ±1 std.
    """
    names = {"epsilon": "ε (units of z)", "beta": "β (nats KL per nat NLL)", "dim": "dim m"}
    columns = [axis for axis in names if axis in set(rows["axis"])]
    probes = {"knn_top1_val": "kNN", "linear_top1_val": "linear"}
    figure, panels = plt.subplots(
        2, len(columns), figsize=(4.1 * len(columns), 5.4), sharey="row", sharex="col",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, axis in enumerate(columns):
        mine = rows[rows["axis"] == axis]
        for line, (key, probe) in enumerate(probes.items()):
            grouped, panel = mine.groupby("value")[key], panels[line, column]
            mean, several = grouped.mean(), grouped.size().max() > 1
            spread = grouped.std() if several else None
            panel.errorbar(
                mean.index, mean, yerr=spread, marker="o", capsize=4, color=PALETTE[line]
            )
            panel.set(xscale="log")
            panel.set_xticks(mean.index, [f"{v:g}" for v in mean.index])
            panel.minorticks_off()
            panels[line, 0].set(ylabel=f"{probe}: validation top-1 (%)")
        panels[-1, column].set(xlabel=names[axis])
    seeds = rows["seed"].nunique()
    figure.suptitle(f"Sensitivity of the attack, {seeds} seed{'s' if seeds > 1 else ''} a point")
    return figure
