"""The figures of the notebooks: each takes tensors or runs and gives back a matplotlib Figure.

No axis is without a label and a unit; how they look is `style`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from idaa_lib.lab import style
from idaa_lib.lab.style import COLOURS, INK, NAMES, PALETTE
from idaa_lib.lab.style import save as save  # what notebooks call beside the figures
from idaa_lib.runs import Run

LABELS = {
    "loss": "loss (nats)",
    "clean_loss": "loss on clean pairs (nats)",
    "adversarial_loss": "loss on (x, x′) (nats)",
    "reconstruction": "reconstruction (MSE)",
    "kl": "KL term of the loss (nats / 3m)",
    "reconstruction_val": "validation reconstruction (MSE)",
    "rate_nats_val": "rate on validation (nats per image)",
    "knn_top1_val": "validation kNN top-1 (%)",
    "ema_top1_val": "validation top-1 (%)",
    "supervised_loss": "loss on labelled images (nats)",
    "unsupervised_loss": "loss on strong views (nats)",
    "believed": "pseudo-labels believed (%)",
    "believed_right": "believed and right (%)",
    "pseudo_top1": "pseudo-labels right (%)",
    "alignment": "alignment (squared distance)",
    "uniformity": "uniformity (log mean kernel)",
    "embedding_std": "embedding std (√D · std, sphere = 1)",
    "effective_rank": "effective rank of features",
    "moved": "‖x′ − x‖₂ (normalised units)",
    "loss_classifier": "classes of regions (nats)",
    "loss_box_reg": "boxes of regions (smooth L1)",
    "loss_mask": "masks (nats per pixel)",
    "loss_objectness": "objectness of anchors (nats)",
    "loss_rpn_box_reg": "boxes of anchors (smooth L1)",
    "lr": "learning rate",
    "images_per_second": "speed (images/s)",
}
# The prefixes of a summary's accuracies, and what they are of.
SUBJECTS = {"": "this run", "random_": "untrained encoder", "pixels_": "raw pixels"}
_PREFIX = {"encoder": "", "random": "random_"}  # of a transfer's rows


def curves(runs: Mapping[str, Run], keys: Sequence[str]) -> Figure:
    """Training curves from metrics.jsonl, one panel a key, one line a run (label → run)."""
    return curves_of({label: run.metrics() for label, run in runs.items()}, keys)


def curves_of(readings: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> Figure:
    """The same from lines of metrics.jsonl (label → lines). In an SVG a line is a group whose id is
    its key."""
    keys = [k for k in keys if any(k in line for lines in readings.values() for line in lines)]
    if not keys:
        return Figure()
    figure, axes = style.panels(len(keys), 3, (4.6, 3.2))
    for key, axis in zip(keys, axes, strict=True):
        for label, lines in readings.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                marker = "o" if len(points) <= 20 else None
                look = dict(label=label, gid=key, marker=marker, markersize=4)
                axis.plot(*zip(*points, strict=True), **look)
        axis.set(xlabel="step", ylabel=LABELS.get(key, key))
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(readings) > 1:
        # One for all panels, below them: names of runs are long, and would hide the curves.
        drawn = {str(line.get_label()): line for axis in axes for line in axis.lines}
        figure.legend(
            drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(3, len(drawn))
        )
    return figure


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
    figure, axis = style.axes(figsize=(6.4, 3.6))
    for shift, probe, label in ((-0.2, "knn", "kNN"), (0.2, "linear", "linear")):
        top, low, high = (
            np.array([summary[f"{p}{probe}_{end}"] for p in names])
            for end in ("top1", "low", "high")
        )
        at = np.arange(len(names)) + shift
        axis.bar(at, top, 0.38, label=label, yerr=np.abs([top - low, high - top]), capsize=4)
    axis.set_xticks(range(len(names)), list(names.values()))
    axis.set(xlabel="features of", ylabel="top-1 (%)", ylim=(0, 100))
    axis.set_title(f"Accuracy on {summary['knn_n']:,} test images, with 95 % intervals")
    axis.legend(title="probe", loc="upper right")
    return figure


def transfer_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A transfer's accuracies with their 95 % intervals, a line each."""
    rows = [
        {
            "data set": row["dataset"],
            "features": SUBJECTS[_PREFIX[row["features"]]],
            "probe": row["probe"],
            "metric": row["metric"],
            "accuracy (%)": round(row["value"], 2),
            "95 % interval": f"{row['low']:.1f} – {row['high']:.1f}",
            "over": f"{row['n']:,} {row['of']}",
            "labels": row["labels"],
        }
        for row in summary["rows"]
    ]
    return pd.DataFrame(rows)


def transfer_bars(summary: Mapping[str, Any]) -> Figure:
    """The same as bars with their intervals: a panel for each data set, a group for each probe."""
    rows = pd.DataFrame(summary["rows"])
    names = list(rows["dataset"].unique())
    figure, axes = style.panels(len(names), 2, (6.4, 3.4))
    subjects = [key for key in _PREFIX if key in set(rows["features"])]
    for name, axis in zip(names, axes, strict=True):
        mine = rows[rows["dataset"] == name]
        probes = list(mine["probe"].unique())
        for place, subject in enumerate(subjects):
            found = mine[mine["features"] == subject].set_index("probe").loc[probes]
            at = np.arange(len(probes)) + (place - (len(subjects) - 1) / 2) * 0.4
            spread = np.abs([found["value"] - found["low"], found["high"] - found["value"]])
            label = SUBJECTS[_PREFIX[subject]]
            axis.bar(at, found["value"], 0.38, label=label, yerr=spread, capsize=4)
        axis.set_xticks(range(len(probes)), probes)
        axis.set(ylabel=f"{mine['metric'].iloc[0]} (%)", ylim=(0, 100), title=name)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(subjects)
    )
    return figure


def classifier_bars(runs: Mapping[str, Run]) -> Figure:
    """Test accuracy of semi-supervised runs (label → run) with 95 % intervals."""
    told = [run.summary or {} for run in runs.values()]
    ends = ("top1", "low", "high")
    top, low, high = (np.array([one[f"ema_{end}"] for one in told]) for end in ends)
    figure, axis = style.axes(figsize=(1.6 + 1.4 * len(runs), 3.4))
    names = [name.replace(": ", ":\n") for name in runs]
    bars = axis.bar(names, top, 0.6, yerr=np.abs([top - low, high - top]), capsize=4)
    axis.bar_label(bars, [f"{value:.1f}" for value in top], label_type="center", color="white")
    axis.set(ylabel="top-1 (%)", ylim=(0, 100))
    axis.set_title(f"{told[0]['ema_n']:,} test images, 95 % intervals")
    return figure


def confusion(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Rows: true class, columns: predicted class; percent of the row."""
    n = len(classes)
    counts = torch.bincount(labels * n + predictions, minlength=n * n).reshape(n, n)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    figure, axis = style.axes(figsize=(0.52 * n + 2.2, 0.46 * n + 1.6))
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
    figure, axis = style.axes(figsize=(8, 5.4))
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
    figure, axes = style.axes(len(queries), count + 1, figsize=size, layout=None, squeeze=False)
    for line, q, found in zip(axes, queries, near, strict=True):
        name = classes[int(labels[q])]
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        for axis, i in zip(line, [q, *found.tolist()], strict=True):
            axis.imshow(images[i].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            same = labels[i] == labels[q]
            colour = INK if i == q else (PALETTE[2] if same else PALETTE[1])
            for side in axis.spines.values():
                side.set(color=colour, linewidth=2.5)
    axes[0, 0].set_title("query", fontsize="small")
    axes[0, (count + 1) // 2].set_title(
        "nearest first: green = same class, orange = another", fontsize="small"
    )
    figure.subplots_adjust(wspace=0.08, hspace=0.12)
    return figure


def sensitivity(rows: pd.DataFrame) -> Figure:
    """Validation accuracy over ε, β, dim and further axes: a column each, kNN above, linear below.

    Several seeds give their mean and ±1 std. Values that are not numbers stand side by side.
    """
    names = {"epsilon": "ε (units of z)", "beta": "β (nats KL per nat NLL)", "dim": "dim m"}
    columns = list(dict.fromkeys(rows["axis"]))
    probes = {"knn_top1_val": "kNN", "linear_top1_val": "linear"}
    figure, panels = style.axes(
        2, len(columns), figsize=(4.1 * len(columns), 5.4), sharey="row", sharex="col",
        squeeze=False,
    )  # fmt: skip
    adversaries = list(dict.fromkeys(rows["adversary"]))
    for column, axis in enumerate(columns):
        mine = rows[rows["axis"] == axis]
        numbers = pd.to_numeric(mine["value"], errors="coerce")  # a table from a file has text
        if numeric := bool(numbers.notna().all()):
            mine = mine.assign(value=numbers)
        values = list(dict.fromkeys(mine["value"]))
        at = {value: value if numeric else i for i, value in enumerate(values)}
        for line, (key, probe) in enumerate(probes.items()):
            panel = panels[line, column]
            for adversary, group in mine.groupby("adversary", sort=False):
                grouped = group.groupby("value", sort=numeric)[key]
                mean, several = grouped.mean(), grouped.size().max() > 1
                panel.errorbar(
                    [at[value] for value in mean.index], mean,
                    yerr=grouped.std() if several else None, marker="o", capsize=4,
                    color=COLOURS[adversary], label=NAMES[adversary],
                )  # fmt: skip
            if not numeric:
                panel.set_xlim(-0.5, len(values) - 0.5)  # names are wide
            elif axis != "epochs":  # which are tried in steps, all else in factors
                panel.set(xscale="log")
            told = [f"{value:g}" if numeric else str(value) for value in values]
            panel.set_xticks(list(at.values()), told)
            panel.minorticks_off()
            panels[line, 0].set(ylabel=f"{probe}: validation top-1 (%)")
        panels[-1, column].set(xlabel=names.get(axis, axis.replace("_", " ")))
    if len(adversaries) > 1:
        whole = max(panels[0], key=lambda panel: len(panel.get_legend_handles_labels()[1]))
        handles, told = whole.get_legend_handles_labels()
        figure.legend(handles, told, loc="outside lower center", ncols=len(told))
    seeds = rows["seed"].nunique()
    of = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "1 seed a point"
    figure.suptitle(f"Sensitivity, {of}")
    return figure
