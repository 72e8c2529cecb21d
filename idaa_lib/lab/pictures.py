"""Figures of images, of their parts, and of how much identity is left in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from idaa_lib.identity.stage import PARTS
from idaa_lib.identity.verdicts import verdicts
from idaa_lib.lab import style
from idaa_lib.lab.style import COLOURS, INK, NAMES, PALETTE


def image_rows(
    rows: Mapping[str, Tensor], title: str = "", columns: int = 8, names: Sequence[str] = ()
) -> Figure:
    """Images in labelled rows, the first `columns` of each.

    Args:
        rows: label → pixels in [0, 1] (N, 3, H, W); values outside are clipped.
        names: of the columns.
    """
    rows = {label: images[:columns] for label, images in rows.items()}
    n, lines = max(len(images) for images in rows.values()), len(rows)
    # In inches: cells of one, room for the names of rows and columns and for the title.
    left, top = 0.3 + 0.085 * max(map(len, rows)), 0.04 + 0.34 * bool(title) + 0.24 * bool(names)
    width, height = left + 1.04 * n, top + 1.04 * lines
    figure, axes = style.axes(lines, n, figsize=(width, height), layout=None, squeeze=False)
    figure.subplots_adjust(
        left=left / width, right=1, bottom=0, top=1 - top / height, wspace=0.04, hspace=0.04
    )
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        # The first cell's left edge carries the row's name; its axes are off, so as text.
        line[0].text(-0.1, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
    for axis, name in zip(axes[0], names, strict=False):
        axis.set_title(name, fontsize="small", fontweight="normal", pad=3)
    if title:
        figure.suptitle(title, fontsize="medium", fontweight="bold", y=0.998, va="top")
    return figure


def energy_maps(maps: Mapping[str, Tensor]) -> Figure:
    """Where in the image something lives: per-pixel RMS over images and channels, on one scale.

    Args:
        maps: label → differences or parts (N, 3, H, W), normalised units.
    """
    found = {label: part.square().mean((0, 1)).sqrt().numpy() for label, part in maps.items()}
    figure, axes = style.axes(1, len(maps), figsize=(2.6 * len(maps) + 0.6, 3), squeeze=False)
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
    figure, axis = style.axes(figsize=(6.4, 4))
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


def identity_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Hardness and retrieval over ε, and retrieval over hardness: adversary → rows by ε.

    A row has epsilon, loss_before, loss_after (nats), retrieved (%) and n, as `scene.Reading.row`.
    The right panel compares adversaries where it is fair: at an equal loss.
    """
    figure, (left, middle, right) = style.axes(1, 3, figsize=(10.2, 2.9))
    keys = ("epsilon", "loss_after", "retrieved")
    for (name, curve), marker in zip(curves.items(), "os^", strict=False):
        look = dict(color=COLOURS[name], label=NAMES[name], marker=marker, markersize=3.5)
        epsilon, loss, retrieved = ([row[key] for row in curve] for key in keys)
        left.plot(epsilon, loss, **look)
        middle.plot(epsilon, retrieved, **look)
        right.plot(loss, retrieved, **look)
        for row in curve[:1]:
            left.axhline(row["loss_before"], color=INK, linewidth=0.8, linestyle=":")
            for axis in (middle, right):
                axis.set(ylabel=f"x found among {row['n']} (%)")
    for axis in (left, middle):
        axis.set(xscale="log", xlabel="ε (z; CLAE: normalised pixels)")
    left.set(ylabel="loss at x′ (nats)", title="Hardness")
    middle.set(ylim=(-5, 105), title="Identity")
    right.set(ylim=(-5, 105), xlabel="loss at x′ (nats)", title="Identity at equal hardness")
    left.legend(fontsize="x-small", loc="upper left")
    return figure


def likeness(shares: Sequence[float], cosines: Mapping[str, Tensor]) -> Figure:
    """Whose image is it, as a part goes over from image a to image b?

    Args:
        cosines: what moves → cosine to a and to b (N, 2) at each of the N shares of b.
    """
    figure, axes = style.axes(
        1, len(cosines), figsize=(4.4 * len(cosines), 2.6), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, (name, values) in zip(axes.flat, cosines.items(), strict=True):
        for column, (who, marker) in enumerate((("a", "o"), ("b", "s"))):
            axis.plot(shares, values[:, column], marker=marker, markersize=3.5, label=f"to {who}")
        axis.set(title=name, xlabel="share of b (1 = exchanged)")
    axes[0, 0].set(ylabel="cosine by the witness")
    axes[0, 0].legend(fontsize="x-small")
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


# --- of an identity study, from the summary of its run --------------------------------------------

LOOKS = {  # of x, its parts and its x′: label, marker, colour
    "x": ("x", "x", INK), "G": ("G(x)", "D", PALETTE[4]), "R": ("R(x)", "v", PALETTE[3]),
    "idaa": ("IDAA x′", "o", COLOURS["idaa"]), "clae": ("CLAE x′", "s", COLOURS["clae"]),
}  # fmt: skip
Summary = Mapping[str, Any]


def information(summary: Summary) -> Figure:
    """I(z; y) and its bounds from batches of K."""
    latent = summary["latent"]
    k, lower, upper = np.array(latent["batches"]).T
    figure, axis = style.axes(figsize=(7.6, 3.8))
    axis.plot(k, upper, marker="v", markersize=4, color=PALETTE[1], label="upper, leave-one-out")
    axis.axhline(latent["rate"], color=PALETTE[4], linestyle="-.", label="rate (upper)")
    axis.axhline(summary["log_n"], color=INK, linestyle=":", label="log N")
    axis.axhline(latent["information"], color=PALETTE[0], label="I(z; y), exact aggregate")
    axis.plot(k, np.log(k), color=INK, linewidth=0.8, linestyle="--", label="log K")
    axis.plot(k, lower, marker="^", markersize=4, color=PALETTE[2], label="lower, batch of K")
    axis.set(xlabel="batch size K (images)", ylabel="I(z; y) (nats)", xscale="log")
    axis.set(title=f"Which of {summary['n']} images is it? What a sampled z says")
    axis.set_yscale("symlog", linthresh=10, linscale=2)
    axis.set_ylim(0, 1.3 * max(upper.max(), latent["rate"], 10))
    _ticks(axis, k)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def parts(summary: Summary) -> Figure:
    """x, G and R by the witness (percent, nats) and by linear probes (percent)."""
    rows, probes, n = [summary["parts"][part] for part in PARTS], summary["probes"], summary["n"]
    titles = {"instance": f"which of {probes['instances']}?", "class": "which class?"}
    kinds = [kind for kind in titles if kind in probes]
    figure, axes = style.axes(1, 2 + len(kinds), figsize=(2.7 * (2 + len(kinds)), 3.1))
    found = [(row["retrieved"], row["low"], row["high"]) for row in rows]
    nats = [(row["infonce"], row["infonce_low"], row["infonce_high"]) for row in rows]
    panels = [found, nats, *([probes[kind][part] for part in PARTS] for kind in kinds)]
    for axis, values in zip(axes, panels, strict=True):
        mean, spread = _spread(values)
        colours = [LOOKS[part][2] for part in PARTS]
        axis.bar(PARTS, mean, 0.62, yerr=spread, capsize=4, color=colours)
        axis.set(xlabel="seen by the witness", ylabel="accuracy (%)", ylim=(0, 100))
        axis.grid(axis="x", visible=False)
    axes[0].set(ylabel=f"x found among {n} (%)", title="Witness: retrieval@1")
    axes[0].axhline(100 / n, color=INK, linewidth=0.8, linestyle=":")
    fano = [row["fano"] for row in rows]
    axes[1].scatter(PARTS, fano, marker="D", s=26, color="white", edgecolors=INK, label="Fano")
    axes[1].axhline(summary["log_n"], color=INK, linewidth=0.8, linestyle=":", label="log N")
    axes[1].set(ylabel="lower bound on I(v; y) (nats)", title="Witness: InfoNCE")
    axes[1].set_ylim(min(0, np.min(nats)), 1.25 * summary["log_n"])
    axes[1].legend(fontsize="x-small", loc="upper right", ncols=2)
    for axis, kind in zip(axes[2:], kinds, strict=True):
        axis.set(xlabel="linear probe on", title=f"Pixels: {titles[kind]}")
    return figure


def exchange(summary: Summary) -> Figure:
    """Mean likeness to a and to b as G, or R, goes over from a to b."""
    curves = {name: torch.tensor(of) for name, of in summary["exchange"]["cosines"].items()}
    return likeness(summary["exchange"]["shares"], curves)


def equal_hardness(summary: Summary) -> Figure:
    """IDAA less CLAE, and less random signs, at the same loss; label consistency over the loss."""
    curves, epsilons = summary["curves"], sorted({row["epsilon"] for row in summary["equal"]})
    labelled = "consistency" in curves["idaa"][0]
    figure, axes = style.axes(1, 2 + labelled, figsize=(3.6 * (2 + labelled), 3.1))
    units = {"retrieved": "retrieval@1 (points)", "infonce": "InfoNCE (nats)"}
    for axis, (key, unit) in zip(axes, units.items(), strict=False):
        for shift, name, marker in ((0.94, "clae", "s"), (1.06, "random_sign", "^")):
            rows = [
                (shift * row["epsilon"], row["at_equal_hardness"][key])
                for row in summary["equal"]
                if row["adversary"] == name and row["at_equal_hardness"]
            ]
            look = dict(color=COLOURS[name], marker=marker, markersize=5, linestyle="", capsize=3)
            mean, spread = _spread([values for _, values in rows])
            at = [epsilon for epsilon, _ in rows]
            axis.errorbar(at, mean, yerr=spread, label=f"IDAA − {NAMES[name]}", **look)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xscale="log", xlabel="ε of IDAA (units of z)", ylabel=f"difference in {unit}")
        axis.set_xlim(epsilons[0] / 1.6, epsilons[-1] * 1.6)
        _ticks(axis, epsilons)
    axes[0].set(title="Identity at equal hardness")
    axes[1].set(title="above 0: IDAA keeps more")
    axes[0].legend(fontsize="x-small")
    for (name, curve), marker in zip(curves.items(), "os^" if labelled else "", strict=False):
        loss, same = ([row[key] for row in curve] for key in ("loss_after", "consistency"))
        look = dict(color=COLOURS[name], marker=marker, markersize=3.5, label=NAMES[name])
        axes[2].plot(loss, same, **look)
        axes[2].set(xlabel="loss at x′ (nats)", ylabel="same class as x (%)", ylim=(-5, 105))
        axes[2].set(title="Label consistency")
    return figure


def candidates(summary: Summary) -> Figure:
    """retrieval@1 over the number of candidates."""
    k, attacked = summary["among"]["k"], summary.get("among_attacked", {})
    radii = {"idaa": attacked.get("epsilon"), "clae": attacked.get("matched")}
    figure, axis = style.axes(figsize=(6.4, 3.6))
    for name, (label, marker, colour) in LOOKS.items():
        if name in (found := summary["among"] | attacked):
            label += f", ε = {radii[name]:.2g}" if name in radii else ""
            axis.plot(k, found[name], marker=marker, markersize=4, color=colour, label=label)
    axis.plot(k, [100 / i for i in k], color=INK, linewidth=0.8, linestyle=":", label="by chance")
    axis.set(xscale="log", xlabel="candidates", ylabel="x found (%)", ylim=(-5, 105))
    axis.set(title="Identity over the number of candidates")
    _ticks(axis, [i for i in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if i <= summary["n"]])
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def vaes(summary: Summary) -> Figure | None:
    """Information, identity and hardness over β and over dim; None where there is one VAE alone."""
    names = {"beta": "β (nats KL per nat NLL)", "dim": "dim m"}
    drawn = [axis for axis in names if axis in summary["vaes"]]
    if not drawn:
        return None
    epsilon = summary["vaes"]["epsilon"]
    size = (10.4, 3.0 * len(drawn))
    figure, grid = style.axes(len(drawn), 3, figsize=size, squeeze=False)
    for (left, middle, right), axis in zip(grid, drawn, strict=True):
        rows = summary["vaes"][axis]
        value = [row["value"] for row in rows]
        for key, label, marker, colour in (
            ("rate", "rate", "v", PALETTE[4]), ("information", "I(z; y)", "o", PALETTE[0]),
        ):  # fmt: skip
            line = [row["latent"][key] for row in rows]
            left.plot(value, line, marker=marker, markersize=4, color=colour, label=label)
        left.axhline(summary["log_n"], color=INK, linewidth=0.8, linestyle=":", label="log N")
        left.set(ylabel="nats", title="Latent")
        left.set_yscale("symlog", linthresh=10)
        left.set_ylim(0, 1.6 * max(10, *(row["latent"]["rate"] for row in rows)))
        for part in ("G", "R", "idaa"):
            label, marker, colour = LOOKS[part]
            kept = [row["kept"][part] for row in rows]
            mean, spread = _spread([(one["retrieved"], one["low"], one["high"]) for one in kept])
            look = dict(marker=marker, markersize=4, color=colour, label=label, capsize=3)
            middle.errorbar(value, mean, yerr=spread, **look)
        middle.set(ylabel=f"x found among {summary['n']} (%)", title=f"Identity, ε = {epsilon:g}")
        loss = [row["loss"] for row in rows]
        right.plot(value, loss, marker="o", markersize=4, color=COLOURS["idaa"])
        right.axhline(summary["loss_before"], color=INK, linewidth=0.8, linestyle=":")
        right.set(ylabel="loss at x′ (nats)", title=f"Hardness of ε = {epsilon:g}")
        left.legend(fontsize="x-small")
        middle.legend(fontsize="x-small")
        for panel in (left, middle, right):
            panel.set(xscale="log", xlabel=names[axis])
            _ticks(panel, value)
    return figure


def hardness_table(summary: Summary) -> pd.DataFrame:
    """Each adversary at each ε that was read: hardness and identity."""
    columns = {
        "epsilon": "ε", "loss_after": "loss (nats)", "cosine": "cos z, z′", "l2": "‖x′ − x‖₂",
        "linf": "‖x′ − x‖∞", "retrieved": "found (%)", "mrr": "MRR", "infonce": "InfoNCE (nats)",
        "fano": "Fano (nats)", "consistency": "same class (%)",
    }  # fmt: skip
    rows = [{"": NAMES[name], **row} for name, curve in summary["curves"].items() for row in curve]
    table = pd.DataFrame(rows)
    return table[["", *(key for key in columns if key in table)]].rename(columns=columns).round(3)


def verdict_table(summary: Summary, *sections: str) -> pd.DataFrame:
    """What the study tells, of these sections (of all): `verdicts` as a table."""
    rows = [row for row in verdicts(dict(summary)) if not sections or row["section"] in sections]
    table = pd.DataFrame(rows)
    for key in ("low", "high", "value"):
        table[key] = table[key].map("{:,.2f}".format)
    table["95 % interval"] = table["low"] + " … " + table["high"]
    return table[["claim", "value", "95 % interval", "unit", "n", "verdict", "note"]]


def _spread(rows: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means (N,) and the two sides of their intervals (2, N) of rows (mean, low, high)."""
    mean, low, high = np.array(rows).reshape(-1, 3).T
    return mean, np.maximum(0, [mean - low, high - mean])


def _ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
