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


def energy_maps(maps: Mapping[str, Tensor]) -> Figure:
    """Where in the image something lives: per-pixel RMS over images and channels, on one scale.

    Args:
        maps: label → differences or parts (N, 3, H, W), normalised units.
    """
    energy = {label: part.square().mean((0, 1)).sqrt().numpy() for label, part in maps.items()}
    figure, axes = style.axes(1, len(maps), figsize=(2.6 * len(maps) + 0.6, 3), squeeze=False)
    highest = max(part.max() for part in energy.values())
    for axis, (label, part) in zip(axes.flat, energy.items(), strict=True):
        image = axis.imshow(part, cmap="magma", vmin=0, vmax=highest)
        axis.set(title=label, xlabel="x (pixels)")
        axis.grid(False)
    axes[0, 0].set(ylabel="y (pixels)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="RMS (normalised units)")
    return figure


def spectra(parts: Mapping[str, Tensor]) -> Figure:
    """In which frequencies something lives: radially averaged power of (N, 3, H, W)."""
    figure, axis = style.axes(figsize=(6.4, 4))
    for label, part in parts.items():
        axis.plot(*radial_power(part), label=label, marker="o", markersize=3)
    axis.set(xlabel="spatial frequency (cycles per image)", yscale="log")
    axis.set(ylabel="mean power (normalised units²)", title="Which frequencies each part holds")
    axis.legend()
    return figure


def radial_power(part: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies 0, 1, …, H/2 cycles per image and the mean power |FFT|²/HW in each ring."""
    h, w = part.shape[-2:]
    power = torch.fft.fft2(part.double()).abs().square().mean((0, 1)) / (h * w)
    frequency = np.hypot(np.fft.fftfreq(h, 1 / h)[:, None], np.fft.fftfreq(w, 1 / w))
    ring, rings = frequency.round().astype(int).ravel(), min(h, w) // 2 + 1
    mean = np.bincount(ring, power.numpy().ravel()) / np.bincount(ring)
    return np.arange(rings), mean[:rings]


def likeness(shares: Sequence[float], cosines: Mapping[str, Any]) -> Figure:
    """Whose image is it, as a part goes over from image a to image b?

    Args:
        cosines: what moves → cosine to a and to b (N, 2) at each of the N shares of b.
    """
    size = (4.4 * len(cosines), 2.6)
    figure, axes = style.axes(1, len(cosines), figsize=size, sharey=True, squeeze=False)
    for axis, (name, values) in zip(axes.flat, cosines.items(), strict=True):
        for who, marker, column in zip("ab", "os", np.asarray(values).T, strict=True):
            axis.plot(shares, column, marker=marker, markersize=3.5, label=f"to {who}")
        axis.set(title=name, xlabel="share of b (1 = exchanged)")
    axes[0, 0].set(ylabel="cosine by the witness")
    axes[0, 0].legend(fontsize="x-small")
    return figure


# --- of identity, from rows of readings and the summary of a study --------------------------------

Summary = Mapping[str, Any]
# How x, its parts and its x′ look in every figure.
LOOKS: dict[str, dict[str, Any]] = {
    name: dict(label=label, marker=marker, color=color, markersize=4)
    for name, label, marker, color in (
        ("x", "x", "x", INK),
        ("G", "G(x)", "D", PALETTE[4]),
        ("R", "R(x)", "v", PALETTE[3]),
        *(
            (name, NAMES[name], marker, COLOURS[name])
            for name, marker in (("idaa", "o"), ("clae", "s"), ("random_sign", "^"))
        ),
    )
}
_THIN: dict[str, Any] = dict(color=INK, linewidth=0.8, linestyle=":")


# What a witness looks for among candidates: x as it is (notebook 02), or another view of it (08).
SAME, VIEW = "x itself", "another view of x"


def identity_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], sought: str = VIEW
) -> Figure:
    """Hardness and retrieval over ε, and retrieval over hardness: adversary → rows by ε.

    Rows are those of `scene.Reading`; `sought` says what their witness looks for. The right panel
    compares adversaries where it is fair: at an equal loss.
    """
    figure, (left, middle, right) = style.axes(1, 3, figsize=(10.2, 2.9))
    for name, curve in curves.items():
        keys = ("epsilon", "loss_after", "retrieved")
        epsilon, loss, retrieved = ([row[key] for row in curve] for key in keys)
        left.plot(epsilon, loss, **LOOKS[name])
        middle.plot(epsilon, retrieved, **LOOKS[name])
        right.plot(loss, retrieved, **LOOKS[name])
    row = next((row for curve in curves.values() for row in curve), {"n": 0})
    left.axhline(row.get("loss_before", 0), **_THIN)
    left.set(ylabel="loss at x′ (nats)", title="Hardness")
    middle.set(title="Identity")
    right.set(xlabel="loss at x′ (nats)", title="Identity at equal hardness")
    for axis in (left, middle):
        axis.set(xscale="log", xlabel="ε (z; CLAE: normalised pixels)")
    for axis in (middle, right):
        axis.set(ylabel=f"{sought} found\namong {row['n']} (%)", ylim=(-5, 105))
    left.legend(fontsize="x-small", loc="upper left")
    return figure


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
    hits = [(row["retrieved"], row["low"], row["high"]) for row in rows]
    nats = [(row["infonce"], row["infonce_low"], row["infonce_high"]) for row in rows]
    panels = [hits, nats, *([probes[kind][part] for part in PARTS] for kind in kinds)]
    for axis, values in zip(axes, panels, strict=True):
        mean, spread = _spread(values)
        colours = [LOOKS[part]["color"] for part in PARTS]
        axis.bar(PARTS, mean, 0.62, yerr=spread, capsize=4, color=colours)
        axis.set(xlabel="linear probe on", ylabel="accuracy (%)", ylim=(0, 100))
        axis.grid(axis="x", visible=False)
    for axis, kind in zip(axes[2:], kinds, strict=True):
        axis.set(title=f"Pixels: {titles[kind]}")
    axes[0].set(xlabel="seen by the witness", ylabel=f"{VIEW} found among {n} (%)")
    axes[0].set(title="Witness: retrieval@1")
    axes[0].axhline(100 / n, **_THIN)
    fano = [row["fano"] for row in rows]
    axes[1].scatter(PARTS, fano, marker="D", s=26, color="white", edgecolors=INK, label="Fano")
    axes[1].axhline(summary["log_n"], label="log N", **_THIN)
    axes[1].set(xlabel="seen by the witness", ylabel="lower bound on I(v; y) (nats)")
    axes[1].set(title="Witness: InfoNCE", ylim=(min(0, np.min(nats)), 1.25 * summary["log_n"]))
    axes[1].legend(fontsize="x-small", loc="upper right", ncols=2)
    return figure


def exchange(summary: Summary) -> Figure:
    """Mean likeness to a and to b as G, or R, goes over from a to b."""
    return likeness(summary["exchange"]["shares"], summary["exchange"]["cosines"])


def equal_hardness(summary: Summary) -> Figure:
    """IDAA less CLAE, and less random signs, at the same loss; label consistency over the loss."""
    curves, claims = summary["curves"], pd.DataFrame(summary["claims"])
    epsilons = sorted(claims["epsilon"].dropna().unique())
    labelled = "consistency" in curves["idaa"][0]
    figure, axes = style.axes(1, 2 + labelled, figsize=(3.6 * (2 + labelled), 3.1))
    units = {"hits": "retrieval@1 (points)", "gains": "InfoNCE (nats)"}
    for axis, (measure, unit) in zip(axes, units.items(), strict=False):
        for shift, name in ((0.94, "clae"), (1.06, "random_sign")):
            fits = (claims["adversary"] == name) & (claims["at"] == "hardness")
            rows = claims[fits & (claims["by"] == measure)]
            mean, spread = _spread(rows[["value", "low", "high"]].to_numpy(float))
            look = LOOKS[name] | dict(label=f"IDAA − {NAMES[name]}", linestyle="", capsize=3)
            axis.errorbar(shift * rows["epsilon"], mean, yerr=spread, **look)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xscale="log", xlabel="ε of IDAA (units of z)", ylabel=f"difference in {unit}")
        axis.set_xlim(epsilons[0] / 1.6, epsilons[-1] * 1.6)
        _ticks(axis, epsilons)
    axes[0].set(title="Identity at equal hardness")
    axes[1].set(title="above 0: IDAA keeps more")
    axes[0].legend(fontsize="x-small")
    if labelled:
        for name, curve in curves.items():
            loss, same = ([row[key] for row in curve] for key in ("loss_after", "consistency"))
            axes[2].plot(loss, same, **LOOKS[name])
        axes[2].set(xlabel="loss at x′ (nats)", ylabel="same class as x (%)", ylim=(-5, 105))
        axes[2].set(title="Label consistency")
    return figure


def candidates(summary: Summary) -> Figure:
    """retrieval@1 over the number of candidates."""
    k, attacked = summary["among"]["k"], summary.get("among_attacked", {})
    radii = attacked.get("radii", {})
    figure, axis = style.axes(figsize=(6.4, 3.6))
    for name, curve in (summary["among"] | attacked).items():
        if look := LOOKS.get(name):
            label = f"{look['label']} x′, ε = {radii[name]:.2g}" if name in radii else look["label"]
            axis.plot(k, curve, **look | {"label": label})
    axis.plot(k, [100 / i for i in k], label="by chance", **_THIN)
    axis.set(xscale="log", xlabel="candidates", ylabel=f"{VIEW} found (%)", ylim=(-5, 105))
    axis.set(title="Identity over the number of candidates")
    _ticks(axis, [i for i in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if i <= summary["n"]])
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def vaes(summary: Summary) -> Figure | None:
    """Information, identity and hardness over β and over dim; None where there is one VAE alone."""
    names = {"beta": "β (nats KL per nat NLL)", "dim": "dim m"}
    present = [axis for axis in names if axis in summary["vaes"]]
    if not present:
        return None
    epsilon, size = summary["vaes"]["epsilon"], (10.4, 3.0 * len(present))
    figure, grid = style.axes(len(present), 3, figsize=size, squeeze=False)
    for panels, axis in zip(grid, present, strict=True):
        left, middle, right = panels
        rows = summary["vaes"][axis]
        value, latents = [row["value"] for row in rows], [row["latent"] for row in rows]
        rate = [latent["rate"] for latent in latents]
        left.plot(value, rate, **LOOKS["G"] | {"label": "rate", "marker": "v"})
        nats = [latent["information"] for latent in latents]
        left.plot(value, nats, **LOOKS["idaa"] | {"label": "I(z; y)"})
        left.axhline(summary["log_n"], label="log N", **_THIN)
        left.set_yscale("symlog", linthresh=10)
        left.set(ylabel="nats", title="Latent", ylim=(0, 1.6 * max(10, *rate)))
        for part in ("G", "R", "idaa"):
            kept = [row["kept"][part] for row in rows]
            mean, spread = _spread([(one["retrieved"], one["low"], one["high"]) for one in kept])
            middle.errorbar(value, mean, yerr=spread, capsize=3, **LOOKS[part])
        middle.set(ylabel=f"x found among {summary['n']} (%)", title=f"Identity, ε = {epsilon:g}")
        right.plot(value, [row["loss"] for row in rows], **LOOKS["idaa"])
        right.axhline(summary["loss_before"], **_THIN)
        right.set(ylabel="loss at x′ (nats)", title=f"Hardness of ε = {epsilon:g}")
        for panel in panels:
            panel.set(xscale="log", xlabel=names[axis])
            _ticks(panel, value)
            panel.legend(fontsize="x-small")
    return figure


def hardness_table(summary: Summary) -> pd.DataFrame:
    """Each adversary at each ε that was read: hardness and identity."""
    columns = {
        "epsilon": "ε",
        "loss_after": "loss (nats)",
        "cosine": "cos z, z′",
        "l2": "‖x′ − x‖₂",
        "linf": "‖x′ − x‖∞",
        "retrieved": "found (%)",
        "mrr": "MRR",
        "infonce": "InfoNCE (nats)",
        "fano": "Fano (nats)",
        "consistency": "same class (%)",
    }
    rows = [{"": NAMES[name], **row} for name, curve in summary["curves"].items() for row in curve]
    table = pd.DataFrame(rows)
    return table[["", *(key for key in columns if key in table)]].rename(columns=columns).round(3)


def verdict_table(summary: Summary, *sections: str) -> pd.DataFrame:
    """The claims of these sections (of all) with their verdicts."""
    rows = [row for row in summary["claims"] if not sections or row["section"] in sections]
    table = pd.DataFrame(rows)
    table["95 % interval"] = [
        "" if pd.isna(low) else f"{low:,.2f} … {high:,.2f}"
        for low, high in zip(table["low"], table["high"], strict=True)
    ]
    table["value"] = table["value"].map(lambda value: "" if pd.isna(value) else f"{value:,.2f}")
    return table[["claim", "value", "95 % interval", "unit", "n", "verdict", "note"]]


def _spread(rows: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means (N,) and the two sides of their intervals (2, N) of rows (mean, low, high)."""
    mean, low, high = np.array(rows).reshape(-1, 3).T
    return mean, np.maximum(0, [mean - low, high - mean])


def _ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
