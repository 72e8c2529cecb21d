"""The figures of runs and results: each takes runs, tidy results or tensors and returns a Figure.

No axis is without a label and a unit; how they look is `style`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from idaa_lib.lab import style
from idaa_lib.lab.style import COLOURS, INK, PALETTE
from idaa_lib.lab.style import save as save  # what notebooks call beside the figures
from idaa_lib.results import interval
from idaa_lib.runs import Run

LABELS = {
    "loss": "loss (unit of its method)",
    "clean_loss": "loss on clean pairs (same unit)",
    "adversarial_loss": "loss on (x, x′) (same unit)",
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
# What is drawn of a run of each stage, where it was logged.
CURVES = {
    "vae": ("loss", "reconstruction_val", "rate_nats_val", "lr", "images_per_second"),
    "ssl": (
        "loss",
        "adversarial_loss",
        "knn_top1_val",
        "effective_rank",
        "lr",
        "images_per_second",
    ),
    "semi": ("loss", "adversarial_loss", "believed", "pseudo_top1", "ema_top1_val", "lr"),
}


def curves(runs: Mapping[str, Run | Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> Figure:
    """Training curves, a panel a key, a line a run: label → run, or the lines of its metrics.jsonl.

    In an SVG a line is a group whose id is its key.
    """
    readings = {name: run.metrics() if isinstance(run, Run) else run for name, run in runs.items()}
    keys = [k for k in keys if any(k in line for lines in readings.values() for line in lines)]
    if not keys:
        return Figure()
    figure, axes = style.panels(len(keys), 3, (4.6, 3.2))
    for key, axis in zip(keys, axes, strict=True):
        for i, (label, lines) in enumerate(readings.items()):  # a run has one colour in all panels
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                marker = "o" if len(points) <= 20 else None
                look = dict(label=label, gid=key, color=f"C{i}", marker=marker, markersize=4)
                axis.plot(*zip(*points, strict=True), **look)
        axis.set(xlabel="step", ylabel=LABELS.get(key, key))
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return figure


# Of RSA's log: mean cosines of predictions, and β (docs/spec/siblings.md §3.2).
SIMILARITIES = {
    "aggressive_weak": "aᵢ and wⱼ: aggressive, weak",
    "aggressive_aggressive": "aᵢ and aⱼ: both aggressive",
}


def plot_similarities(runs: Mapping[str, Run | Sequence[Mapping[str, Any]]]) -> Figure:
    """Cosines of RSA's predictions with weak and with aggressive views over the training, and β
    below them, a column a run: label → run, or the lines of its metrics.jsonl."""
    size = (0.8 + 4.6 * len(runs), 4.8)
    how: dict[str, Any] = dict(sharex="col", sharey="row", squeeze=False, height_ratios=(3, 1))
    figure, grid = style.axes(2, len(runs), figsize=size, **how)
    for (above, below), (label, run) in zip(grid.T, runs.items(), strict=True):
        lines = run.metrics() if isinstance(run, Run) else run
        lines = [line for line in lines if "beta" in line]
        steps = [line["step"] for line in lines]
        for colour, (key, name) in zip(PALETTE, SIMILARITIES.items(), strict=False):
            above.plot(steps, [line[key] for line in lines], color=colour, label=name)
        below.plot(steps, [line["beta"] for line in lines], color=INK)
        above.set(title=label)
        below.set(xlabel="step")
        below.margins(y=0.15)
        below.xaxis.get_major_locator().set_params(integer=True)
    grid[0, 0].set(ylabel="mean cosine")
    grid[1, 0].set(ylabel="weight β")
    _legend(figure, grid[0])
    return figure


def accuracies(frame: pd.DataFrame, panels: str, groups: str, colours: str) -> Figure:
    """Means of tidy results with their 95 % intervals, and a dot a seed where there are several.

    Args:
        frame: of `results.results`, of one split. panels, groups, colours: its columns, such as
            metric, method and adversary; where none of them is `features`, what an untrained
            encoder and raw pixels have are lines.
    """
    with_lines = "features" not in (groups, colours)
    own = frame[frame["features"] == "encoder"] if with_lines else frame
    names = [*frame[panels].unique()]
    places, members = [*own[groups].unique()], [*own[colours].unique()]
    most = 2 if len(names) > 1 else 1
    figure, axes = style.panels(len(names), most, (max(4.8, 1.2 + 0.9 * len(places)), 3.6))
    for name, axis in zip(names, axes, strict=True):
        mine = own[own[panels] == name]
        for (member, place), rows in mine.groupby([colours, groups], sort=False):
            i = members.index(member)
            at = places.index(place) + (i - (len(members) - 1) / 2) * 0.8 / len(members)
            mean, low, high = interval(rows)
            spread = None if np.isnan(low) else [[mean - low], [high - mean]]
            look = dict(fmt="D", color=COLOURS.get(member, PALETTE[i % len(PALETTE)]))
            axis.errorbar(at, mean, spread, label=member, markersize=6, capsize=4, **look)
            if len(rows) > 1:
                axis.plot([at] * len(rows), rows["value"], ".", color=INK, markersize=4)
        if with_lines:
            lines = frame[(frame["features"] != "encoder") & (frame[panels] == name)]
            levels = lines.drop_duplicates("features")[["features", "value"]].values
            for (what, level), dash in zip(levels, "-:", strict=False):
                axis.axhline(level, color=INK, lw=1, ls=dash, alpha=0.6, label=what)
        axis.set(title=str(name), xlabel=groups, ylabel="accuracy (%)")
        axis.set_xticks(range(len(places)), [str(place).replace(", ", ",\n") for place in places])
        axis.grid(axis="x", visible=False)
        axis.margins(x=0.2 / len(places), y=0.15)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Iterable[Any], least: int = 1) -> None:
    """One for all panels, below them: names of runs are long, and would hide the curves."""
    handles: dict[str, Any] = {}
    for axis in axes:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    if len(handles) >= least:
        columns = min(4 if max(map(len, handles)) < 24 else 2, len(handles))
        lines, labels = [*handles.values()], [*handles]
        figure.legend(lines, labels, loc="outside lower center", ncols=columns)


def plot_invariance(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """How far each layer of each run overlooks an augmentation: a panel an augmentation, a line a
    run, from rows of `evaluate.invariance.invariance` by label; bands are 95 % intervals."""
    names = list(dict.fromkeys(row["augmentation"] for own in rows.values() for row in own))
    figure, axes = style.panels(len(names), 3, (4.6, 3.4))
    for name, axis in zip(names, axes, strict=True):
        for label, own in rows.items():
            mine = [row for row in own if row["augmentation"] == name]
            layers = [row["layer"] for row in mine]
            axis.plot(layers, [row["value"] for row in mine], "o-", label=label, markersize=4)
            ends = ([row[end] for row in mine] for end in ("low", "high"))
            axis.fill_between(layers, *ends, alpha=0.2, lw=0)
        axis.set(title=f"{name} alone", ylabel="invariance (difference of cosines)")
        axis.tick_params(axis="x", rotation=45)
    _legend(figure, axes)
    return figure


def confusion(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Rows: true class, columns: predicted class; percent of the row."""
    from sklearn.metrics import confusion_matrix

    n = len(classes)
    share = confusion_matrix(labels, predictions, labels=range(n), normalize="true")
    figure, axis = style.axes(figsize=(0.52 * n + 2.2, 0.46 * n + 1.6))
    sns.heatmap(
        100 * share, annot=n <= 20, fmt=".0f", cmap="Blues", vmin=0, vmax=100, ax=axis,
        xticklabels=classes, yticklabels=classes, cbar_kws={"label": "percent of the true class"},
    )  # fmt: skip
    axis.set(
        xlabel="predicted class", ylabel="true class", title="Confusion of the linear probe on test"
    )
    return figure


def embedding_map(features: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """t-SNE (after PCA to 50 dimensions) of features (N, D), coloured by class."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n, d = features.shape
    place = np.zeros((n, 2))
    if n > 1:  # one image has no neighbours
        flat = PCA(min(50, n, d), random_state=0).fit_transform(features.numpy())
        how: dict[str, Any] = dict(perplexity=min(30, (n - 1) / 3), init="pca", random_state=0)
        place = TSNE(**how).fit_transform(flat)
    figure, axis = style.axes(figsize=(8, 5.4))
    colours = sns.color_palette("husl", len(classes)) if len(classes) > 7 else PALETTE
    for c, name in enumerate(classes):
        mine = place[labels.numpy() == c]
        legend = f" {name}"  # one that begins with "_" would be left out of the legend
        axis.scatter(*mine.T, s=12, color=colours[c], label=legend, linewidths=0)
        # Neighbouring hues are hard to tell apart: the name stands at the middle of its class.
        if len(mine):
            middle = np.median(mine, axis=0)
            box = dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.7)
            axis.annotate(name, middle, fontsize="small", ha="center", weight="bold", bbox=box)
    axis.set(
        xlabel="t-SNE 1 (arbitrary units)",
        ylabel="t-SNE 2 (arbitrary units)",
        title=f"Test features, {n:,} images",
    )
    axis.legend(fontsize="small", markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def neighbours(
    features: Tensor, images: Tensor, labels: Tensor, queries: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Each query and its nearest other images, up to 8, by cosine; green where the class agrees."""
    z = torch.nn.functional.normalize(features, dim=1)
    similarity = z[list(queries)] @ z.T
    similarity[torch.arange(len(queries)), list(queries)] = -torch.inf
    count = min(8, len(z) - 1)
    near = similarity.topk(count, dim=1).indices
    size = (1.07 * (count + 1), 1.1 * len(queries))
    figure, axes = style.axes(len(queries), count + 1, figsize=size, layout=None, squeeze=False)
    for line, q, nearest in zip(axes, queries, near, strict=True):
        name = classes[int(labels[q])]
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        for axis, i in zip(line, [q, *nearest.tolist()], strict=True):
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


def sensitivity(frame: pd.DataFrame) -> Figure:
    """Validation accuracy over ε, β, dim and further axes: a column each, kNN above, linear below.

    Args:
        frame: of `sweeps.table`, with the columns `axis` and `at`. Intervals are over images, or
            over several seeds. Values that are not numbers stand side by side.
    """
    names = {"epsilon": "ε (units of z)", "beta": "β (nats KL per nat NLL)", "dim": "dim m"}
    frame = frame[(frame["split"] == "validation") & (frame["features"] == "encoder")]
    columns, probes = list(dict.fromkeys(frame["axis"])), ("kNN", "linear")
    size = (4.1 * len(columns), 5.4)
    figure, panels = style.axes(
        2, len(columns), figsize=size, sharey="row", sharex="col", squeeze=False
    )
    for column, axis in enumerate(columns):
        mine = frame[frame["axis"] == axis]
        numbers = pd.to_numeric(mine["at"], errors="coerce")  # a table from a file has text
        numeric = bool(numbers.notna().all())
        mine = mine.assign(at=numbers if numeric else mine["at"].astype(str))
        values = [*mine["at"].unique()]
        for line, probe in enumerate(probes):
            panel = panels[line, column]
            for adversary, group in mine[mine["metric"] == probe].groupby("adversary", sort=False):
                points = {at: interval(rows) for at, rows in group.groupby("at", sort=numeric)}
                mean, low, high = np.array([*points.values()]).T
                panel.errorbar(
                    [*points], mean, np.nan_to_num([mean - low, high - mean]),
                    marker="o", capsize=4, color=COLOURS[adversary], label=adversary,
                )  # fmt: skip
            if numeric:  # epochs are tried in steps, all else in factors
                panel.set(xscale="linear" if axis == "epochs" else "log")
                panel.set_xticks(values, [f"{value:g}" for value in values])
            else:
                panel.set_xlim(-0.5, len(values) - 0.5)  # names are wide
            panel.minorticks_off()
            panels[line, 0].set(ylabel=f"{probe}: validation top-1 (%)")
        panels[-1, column].set(xlabel=names.get(axis, axis.replace("_", " ")))
    _legend(figure, panels.flat, least=2)
    seeds = frame["seed"].nunique()
    of = f"{seeds} trainings a point" if seeds > 1 else "the images of 1 training a point"
    figure.suptitle(f"Sensitivity, with 95 % intervals over {of}")
    return figure
