"""The figures of runs and results: each takes runs, tidy results or tensors and returns a Figure.

No axis is without a label and a unit; how they look is `style`'s.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from idaa_lib.lab import style
from idaa_lib.lab.pictures import image_rows
from idaa_lib.lab.style import INK, PALETTE, entry, legend, look, looks
from idaa_lib.lab.style import save as save  # what notebooks call beside the figures
from idaa_lib.results import field_text, interval, natural, title, value_text
from idaa_lib.runs import Run

Lines = Sequence[Mapping[str, Any]]  # of a metrics.jsonl

LABELS = {
    "loss": "loss (unit of its method)", "clean_loss": "loss on clean pairs (unit of its method)",
    "adversarial_loss": "loss on (x, x′) (same unit)", "reconstruction": "reconstruction (MSE)",
    "kl": "KL term of the loss (nats / 3m)",
    "reconstruction_val": "validation reconstruction (MSE)",
    "rate_nats_val": "rate on validation (nats per image)",
    "knn_top1_val": "validation kNN top-1 (%)", "ema_top1_val": "validation top-1 (%)",
    "ema_top1": "test top-1 (%)", "ema_n": "test images",
    "rate_nats": "rate (nats per image)", "n_val": "validation images",
    "knn_protocol": "protocol of kNN", "ema_protocol": "protocol", "seconds": "training (s)",
    "supervised_loss": "loss on labelled images (nats)",
    "unsupervised_loss": "loss on strong views (nats)", "believed": "pseudo-labels believed (%)",
    "believed_right": "believed and right (%)", "pseudo_top1": "pseudo-labels right (%)",
    "alignment": "alignment (squared distance)", "uniformity": "uniformity (log mean kernel)",
    "embedding_std": "embedding std (√D · std, sphere = 1)",
    "feature_std": "std of features (√D · std)",
    "effective_rank": "effective rank of features", "moved": "‖x′ − x‖₂ (normalised units)",
    "aggressive_weak": "cosine of aᵢ and wⱼ: aggressive, weak",
    "aggressive_aggressive": "cosine of aᵢ and aⱼ: both aggressive",
    "beta": "weight β of the online targets", "loss_classifier": "classes of regions (nats)",
    "loss_box_reg": "boxes of regions (smooth L1)", "loss_mask": "masks (nats per pixel)",
    "loss_objectness": "objectness of anchors (nats)",
    "loss_rpn_box_reg": "boxes of anchors (smooth L1)", "lr": "learning rate",
    "images_per_second": "speed (images/s)",
}  # fmt: skip
AXES = {"epsilon": "ε (units of z)", "beta": "β (nats KL per nat NLL)", "dim": "dim m"}
Point = tuple[int, float, float]  # its number of trainings, and the ends of its interval
# What is drawn of a run of each stage, where it was logged.
CURVES = {
    "vae": ("loss", "reconstruction_val", "rate_nats_val", "lr", "images_per_second"),
    "ssl": ("loss", "adversarial_loss", "knn_top1_val", "effective_rank", "lr",
            "images_per_second"),
    "semi": ("loss", "adversarial_loss", "believed", "pseudo_top1", "ema_top1_val", "lr"),
}  # fmt: skip


@look()
def curves(runs: Mapping[str, Run | Lines], keys: Sequence[str]) -> Figure:
    """Training curves, a panel a key, a line a run: label → run, or the lines of its metrics.jsonl.

    The adversary gives the colour, the method dashes and marker. Where several runs are drawn, the
    loss of attacked ones is that on clean pairs, which compares. Bands are 95 % intervals over the
    validation images. In an SVG a line is a group whose id is its key.
    """
    readings = {name: run.metrics() if isinstance(run, Run) else run for name, run in runs.items()}
    keys = [k for k in keys if any(k in line for lines in readings.values() for line in lines)]
    if not keys:
        return Figure()
    several = len(runs) > 1
    figure, axes = style.panels(len(keys), 3, (4.6, 3.2))
    for key, axis in zip(keys, axes, strict=True):
        own = key
        for (label, lines), how in zip(readings.items(), _lines(runs), strict=True):
            if not (lines := [line for line in lines if key in line]):
                continue
            if key == "loss" and several and any("clean_loss" in line for line in lines):
                own = "clean_loss"
            steps = [line["step"] for line in lines]
            values = [line.get(own, line[key]) for line in lines]
            few = len(lines) <= 20
            marks = dict(marker=how["marker"] if several or few else None)
            marks |= dict(markersize=4, markevery=None if few else 0.1)
            axis.plot(steps, values, **how | marks, label=entry(label), gid=key)
            ends = [key.replace("top1", end) for end in ("low", "high")]
            if "top1" in key and all(end in line for line in lines for end in ends):
                limits = ([line[end] for line in lines] for end in ends)
                shade = dict(color=how["color"], alpha=min(0.15, 0.4 / len(runs)), lw=0)
                axis.fill_between(steps, *limits, **shade)
        axis.set(xlabel="step", ylabel=textwrap.fill(LABELS.get(own, own), 32))
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    legend(figure, axes, least=2)
    return figure


def _lines(runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The look of each run's line."""
    configs = [run.config if isinstance(run, Run) else None for run in runs.values()]
    adversaries = [getattr(config, "adversary", None) for config in configs]
    pairs = zip(configs, adversaries, strict=True)
    methods = [title(config)[0] if name else i for i, (config, name) in enumerate(pairs)]
    return looks(zip(adversaries, methods, strict=True))


@look()
def accuracies(frame: pd.DataFrame, panels: str, groups: str, colours: str) -> Figure:
    """Means of tidy results with their 95 % intervals, and a dot a seed where there are several.

    Bands are the intervals of the lines.

    Args:
        frame: of `results.results`, of one split. panels, groups, colours: its columns, such as
            metric, method and adversary; where none of them is `features`, what an untrained
            encoder and raw pixels have are lines. A row whose VAE is of other images (`vae_of`) has
            no place of its own, and is in tables alone.
    """
    if "vae_of" in frame:
        frame = frame[frame["vae_of"].isna()]
    with_lines = "features" not in (groups, colours)
    own = frame[frame["features"] == "encoder"] if with_lines else frame
    names = [*frame[panels].unique()]
    places, members = [*own[groups].unique()], [*own[colours].unique()]
    hows = looks((m if colours == "adversary" else None, m) for m in members)
    texts = [str(place).replace(", ", ",\n") for place in places]
    letters = max(8, *(len(line) for text in texts for line in text.split("\n")))
    size = (max(4.8, 1.2 + 0.1 * letters * len(places)), 3.6)
    figure, axes = style.panels(len(names), 2, size)
    points = list[Point]()
    for name, axis in zip(names, axes, strict=True):
        mine = own[own[panels] == name]
        for (member, place), rows in mine.groupby([colours, groups], sort=False):
            i = members.index(member)
            at = places.index(place) + (i - (len(members) - 1) / 2) * 0.8 / len(members)
            mean, low, high = interval(rows)
            spread = None if np.isnan(low) else [[mean - low], [high - mean]]
            how = dict(fmt=hows[i]["marker"], color=hows[i]["color"], markersize=6, capsize=4)
            axis.errorbar(at, mean, spread, label=entry(member), **how)
            if len(rows) > 1:
                axis.plot([at] * len(rows), rows["value"], ".", color=INK, markersize=4)
            points.append((len(rows), low, high))
        if with_lines:
            lines = frame[(frame["features"] != "encoder") & (frame[panels] == name)]
            kinds = lines.groupby("features", sort=False)
            for (what, rows), dash in zip(kinds, "-:", strict=False):
                _level(axis, rows[:1], what, color=INK, lw=1, ls=dash)
        axis.set(title=str(name), xlabel=groups, ylabel="accuracy (%)")
        axis.set_xticks(range(len(places)), texts)
        axis.grid(axis="x", visible=False)
        axis.margins(x=0.2 / len(places))
    legend(figure, axes)
    several = any(n > 1 for n, *_ in points)  # else over images, or draws of few labels
    title = "95 % intervals" + (f" over {_count_trainings(points)}" if several else "")
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())))
    return figure


def _level(axis: Any, rows: pd.DataFrame, label: str, **how: Any) -> None:
    """A line at what results have, with their interval as a band."""
    level, *ends = interval(rows)
    axis.axhline(level, label=entry(label), **how)
    axis.axhspan(*np.nan_to_num(ends, nan=level), color=how["color"], alpha=0.1, lw=0)


@look()
def plot_invariance(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """How far each layer of each run overlooks an augmentation: a panel an augmentation, a line a
    run, from rows of `evaluate.invariance.invariance` by label; bands are 95 % intervals."""
    names = list(dict.fromkeys(row["augmentation"] for own in rows.values() for row in own))
    figure, axes = style.panels(len(names), 3, (4.6, 3.4))
    for name, axis in zip(names, axes, strict=True):
        for (label, own), how in zip(rows.items(), _lines(rows), strict=True):
            mine = [row for row in own if row["augmentation"] == name]
            layers = [row["layer"] for row in mine]
            axis.plot(layers, [row["value"] for row in mine], **how, label=entry(label), ms=4)
            ends = ([row[end] for row in mine] for end in ("low", "high"))
            axis.fill_between(layers, *ends, color=how["color"], alpha=0.2, lw=0)
        axis.set(title=f"{name} alone", xlabel="layer")
        axis.set(ylabel="invariance (difference of cosines)")
        axis.tick_params(axis="x", rotation=45)
    legend(figure, axes)
    return figure


@look()
def confusion(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Rows: true class, columns: predicted class; percent of the row."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    n = len(classes)
    share = confusion_matrix(labels, predictions, labels=range(n), normalize="true")
    side = min(n, 40)  # of more classes smaller cells
    figure, axis = style.axes(figsize=(0.52 * side + 2.2, 0.46 * side + 1.6), layout="compressed")
    how: dict[str, Any] = dict(values_format=".0f", include_values=n <= 20, colorbar=False)
    how |= dict(cmap="Blues", xticks_rotation=90 if max(map(len, classes)) > 6 else 0)
    matrix = ConfusionMatrixDisplay(100 * share, display_labels=classes)
    matrix.plot(ax=axis, im_kw={"vmin": 0, "vmax": 100}, **how)
    figure.colorbar(matrix.im_, ax=axis, label="percent of the true class")
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set(title="Confusion of the linear probe on test")
    if n > 100:  # names would lie over one another
        ticks = range(0, n, -(-n // 20))
        axis.set_xticks(ticks, ticks)
        axis.set_yticks(ticks, ticks)
        axis.set(xlabel="predicted class, by number", ylabel="true class, by number")
    axis.grid(False)
    return figure


@look()
def embedding_map(features: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """t-SNE (after PCA to 50 dimensions) of features (N, D), coloured by class; the legend has all
    names, the map those that it has room for."""
    import seaborn as sns
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
        axis.scatter(*mine.T, s=12, color=colours[c], label=entry(name), linewidths=0)
        # Neighbouring hues are hard to tell apart: the name stands at the middle of its class.
        if len(mine):
            middle = np.median(mine, axis=0)
            box = dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.7)
            how = dict(fontsize="small", ha="center", weight="bold", bbox=box, parse_math=False)
            axis.annotate(name, middle, **how)
    axis.set(
        xlabel="t-SNE 1 (arbitrary units)",
        ylabel="t-SNE 2 (arbitrary units)",
        title=f"Test features, {n:,} images",
    )
    legend(figure, [axis])
    figure.draw_without_rendering()  # places the texts
    room: list[Any] = []
    for text in [*axis.texts]:
        extent = text.get_window_extent()
        if any(extent.overlaps(other) for other in room):
            text.remove()
        else:
            room.append(extent)
    return figure


def neighbours(
    features: Tensor, images: Tensor, labels: Tensor, queries: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Each query and its nearest other images, up to 8, by cosine; green where the class agrees."""
    z = torch.nn.functional.normalize(features, dim=1)
    similarity = z[list(queries)] @ z.T
    similarity[torch.arange(len(queries)), list(queries)] = -torch.inf
    near = similarity.topk(min(8, len(z) - 1), dim=1).indices
    indices = torch.cat([torch.tensor(queries)[:, None], near], 1)  # (Q, 1 + 8)
    names, pixels = [classes[int(labels[q])] for q in queries], images[indices] / 255
    text = "Query, then nearest first: green = same class, orange = another"
    figure = image_rows([*zip(names, pixels, strict=True)], text, indices.shape[1])
    for line, column in np.ndindex(*indices.shape):
        same = labels[indices[line, column]] == labels[queries[line]]
        colour = INK if column == 0 else PALETTE[2] if same else PALETTE[1]
        frame: dict[str, Any] = dict(fill=False, ec=colour, lw=2.5)
        figure.axes[0].add_patch(Rectangle((column + 0.02, line + 0.02), 0.96, 0.96, **frame))
    return figure


def plot_partitions(images: Tensor, partitions: Tensor, columns: int = 10) -> Figure:
    """Examples of each side of each partition (P, N) of uint8 images (N, 3, H, W), a row a side."""
    rows = {}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for i, sides in enumerate(partitions, 1):
        for side in range(int(partitions.max()) + 1):
            mine = order[sides[order] == side]
            label = f"partition {i}, side {side + 1}: {100 * len(mine) / len(order):.0f} %"
            rows[label] = images[mine[:columns]] / 255
    return image_rows(rows, f"Partitions of {len(images):,} images", columns)


def partition_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Agreement of partitions with known factors, from rows of `factors.compare_partitions`."""
    table = pd.DataFrame(rows)
    limits = zip(table["low"], table["high"], strict=True)
    table["95 % by chance"] = [f"{low:.1f} … {high:.1f}" for low, high in limits]
    table["beyond chance"] = np.where(table["value"] > table["high"], "yes", "no")
    names = {"value": "agreement (%)", "chance": "by chance (%)"}
    table = table.rename(columns=names).round(dict.fromkeys(names.values(), 1))
    columns = ["partition", "factor", *names.values(), "95 % by chance", "beyond chance", "n"]
    return table[columns]


@look()
def sensitivity(frame: pd.DataFrame, fields: Sequence[str] = ()) -> Figure:
    """Validation accuracy over ε, β, dim and further axes: a column each, kNN above, linear below.

    Args:
        frame: of `plans.table`, with the columns `axis` and `at`. Intervals are over images, or
            over several seeds. Values that are not numbers, and those of an axis with 0, stand side
            by side; results of no axis, such as those without an adversary, are a line in each that
            has none of their own. fields: further columns that were crossed: a line for each
            combination of their values.
    """
    frame = frame[(frame["split"] == "validation") & (frame["features"] == "encoder")]
    # Panels show axis and at, colours the adversary.
    others = [name for name in fields if name not in ("axis", "at", "adversary")]
    frame, fields = _vary(frame, others)
    columns, probes = list(dict.fromkeys(frame["axis"].dropna())), ("kNN", "linear")
    points = list[Point]()
    size = (4.1 * len(columns), 6.2)
    figure, panels = style.axes(
        2, len(columns), figsize=size, sharey="row", sharex="col", squeeze=False
    )
    for column, axis in enumerate(columns):
        mine = frame[frame["axis"] == axis]
        everywhere = frame[frame["axis"].isna() & ~frame["adversary"].isin(mine["adversary"])]
        numbers = pd.to_numeric(mine["at"], errors="coerce")  # a table from a file has text
        factors = not axis.endswith("epochs")  # epochs are tried in steps, all else in factors
        numeric = bool((numbers > 0 if factors else numbers.notna()).all())
        names = mine["at"].astype(str) if numbers.hasnans else numbers.map("{:g}".format)
        mine = mine.assign(at=numbers if numeric else names)
        values = [*mine["at"].unique()]
        for line, probe in enumerate(probes):
            panel = panels[line, column]
            own = mine[mine["metric"] == probe].groupby(["adversary", *fields], sort=False)
            keys = [key for key, _ in own]
            lines = looks((adversary, tuple(values)) for adversary, *values in keys)
            for (key, group), line_look in zip(own, lines, strict=True):
                places = {at: interval(rows) for at, rows in group.groupby("at", sort=numeric)}
                mean, low, high = np.array([*places.values()]).T
                points += zip(group.groupby("at", sort=numeric).size(), low, high, strict=True)
                words = [key[0], *map(field_text, fields, key[1:])]
                panel.errorbar(
                    [*places], mean, np.nan_to_num([mean - low, high - mean]),
                    capsize=4, label=entry(", ".join(words)), **line_look,
                )  # fmt: skip
            levels = everywhere[everywhere["metric"] == probe].groupby(["adversary", *fields])
            for (key, group), dash in zip(levels, itertools.cycle(["--", ":", "-."])):
                label = ", ".join([key[0], *map(field_text, fields, key[1:])])
                _level(panel, group, label, color=style.colour(key[0]), ls=dash)
                points.append((len(group), *interval(group)[1:]))
            if numeric:
                panel.set(xscale="log" if factors else "linear")
                if len(values) == 1:
                    panel.set_xlim(values[0] / 2, values[0] * 2)
                panel.set_xticks(values, [f"{value:g}" for value in values])
            else:
                panel.set_xlim(-0.5, len(values) - 0.5)  # names are wide
            panel.minorticks_off()
            panels[line, 0].set(ylabel=f"{probe}: validation top-1 (%)")
        panels[-1, column].set(xlabel=AXES.get(axis, axis.replace("_", " ")))
    legend(figure, panels.flat, least=2)
    title = f"Sensitivity, with 95 % intervals over {_count_trainings(points)}"
    figure.suptitle(textwrap.fill(title, 40 * len(columns)))
    return figure


def _count_trainings(points: Collection[Point]) -> str:
    """What the intervals of these points are over."""
    sizes = {n for n, *_ in points}
    few, many = min(sizes, default=1), max(sizes, default=1)
    cut = any(n > 1 and (low <= 0 or high >= 100) for n, low, high in points)
    end = ", cut at 0 and 100 %" * cut
    if many == 1:
        return "the images of 1 training a point"
    if few == 1:
        return f"up to {many} trainings a point, or the images of a single one{end}"
    count = f"{few} to {many}" if few < many else many
    return f"{count} trainings a point{end}"


def _vary(frame: pd.DataFrame, fields: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The frame with "–" where a point lacks one of the fields, such as ε without an adversary; and
    those of the fields that have several values."""
    frame = frame.assign(**{name: frame[name].astype(object).fillna("–") for name in fields})
    return frame, [name for name in fields if frame[name].astype(str).nunique() > 1]


@look()
def heat_maps(frame: pd.DataFrame, fields: Sequence[str]) -> Figure:
    """Validation accuracy over two fields that were crossed: a heat map for each probe (rows) and
    for each combination of the other fields (columns), with the means over seeds and half of their
    intervals. Over one field it is curves.

    Args:
        frame: of `plans.table`. fields: its columns that were crossed.
    """
    frame = frame[(frame["split"] == "validation") & (frame["features"] == "encoder")]
    frame, fields = _vary(frame, fields)
    if len(fields) < 2:
        name = fields[0] if fields else "seed"
        return sensitivity(frame.assign(axis=name, at=frame[name]))
    numbers = frame[fields].apply(pd.to_numeric, errors="coerce").notna().all()
    fields.sort(key=lambda name: (not numbers[name], -frame[name].astype(str).nunique()))
    down, across, *others = fields
    probes = [probe for probe in ("kNN", "linear") if probe in {*frame["metric"]}]
    groups, points = {"": frame}, list[Point]()
    if others:
        words = frame[others].apply(lambda own: own.map(lambda v: field_text(own.name, v)))
        groups = dict(iter(frame.groupby(words.agg(", ".join, axis=1), sort=False)))
    # Room for "± 12.3" in each cell.
    width, height = (frame[name].nunique() * inch for name, inch in ((across, 0.65), (down, 0.42)))
    size = max(3.6, width + 0.8) * len(groups) + 0.8, max(3.0, height + 0.6) * len(probes) + 0.4
    figure, panels = style.axes(len(probes), len(groups), figsize=size, squeeze=False)
    for line, probe in enumerate(probes):
        values = frame[frame["metric"] == probe]["value"]
        for column, (title_, group) in enumerate(groups.items()):
            panel, mine = panels[line, column], group[group["metric"] == probe]
            cells = {place: interval(rows) for place, rows in mine.groupby([down, across])}
            counts = mine.groupby([down, across]).size()
            points += [(n, *cells[place][1:]) for place, n in counts.items()]
            rows, columns = (
                sorted({place[i] for place in cells}, key=lambda value: natural(str(value)))
                for i in (0, 1)
            )
            means = np.full((len(rows), len(columns)), np.nan)
            for (a, b), (mean, low, high) in cells.items():
                i, j = rows.index(a), columns.index(b)
                means[i, j] = mean
                dark = mean > (values.min() + values.max()) / 2
                text = f"{mean:.1f}" + (f"\n± {(high - low) / 2:.1f}" if low == low else "")
                panel.text(j, i, text, ha="center", va="center", color="white" if dark else INK)
            image = panel.imshow(means, cmap="Blues", vmin=values.min(), vmax=values.max())
            # A table from a file has 32.0 where a field is missing elsewhere.
            panel.set_xticks(range(len(columns)), [*map(value_text, columns)])
            panel.set_yticks(range(len(rows)), [*map(value_text, rows)])
            panel.set(xlabel=AXES.get(across, across), ylabel=AXES.get(down, down))
            panel.set(title=title_, aspect="auto")
            panel.grid(False)
        figure.colorbar(image, ax=panels[line], label=f"{probe}: validation top-1 (%)")
    title = f"± half of the 95 % interval over {_count_trainings(points)}"
    figure.suptitle(textwrap.fill(title, 44 * len(groups)))
    return figure
