"""Figures of images, of their parts, and of how much identity is left in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from idaa_lib.evaluate.metrics import share_interval
from idaa_lib.identity.stage import PARTS
from idaa_lib.lab import style
from idaa_lib.lab.style import COLOURS, INK, NAMES, OTHERS, entry, legend, look, looks


@look()
def image_rows(
    rows: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]],
    title: str = "",
    columns: int = 8,
    names: Sequence[str] = (),
) -> Figure:
    """Images in labelled rows, the first `columns` of each. Cell (i, j) is the unit square at
    (j, i) of the one axes.

    Args:
        rows: label → pixels in [0, 1] (N, 3, H, W); values outside are clipped.
        names: of the columns.
    """
    labels, rows = zip(*(rows.items() if isinstance(rows, Mapping) else rows), strict=True)
    lines, n = len(rows), max(len(images[:columns]) for images in rows)
    # In inches: cells of one, room for the names of rows and columns and for the title.
    size = (n + 0.3 + 0.085 * max(map(len, labels)), lines + 0.3 * bool(title) + 0.2 * bool(names))
    figure, axis = style.axes(figsize=size, layout="compressed")
    for line, images in enumerate(rows):
        for column, image in enumerate(images[:columns].clamp(0, 1)):
            cell = (column + 0.02, column + 0.98, line + 0.98, line + 0.02)
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", extent=cell)
    axis.set(xlim=(0, n), ylim=(lines, 0), frame_on=False)
    axis.set_xticks(np.arange(len(names)) + 0.5, names)
    axis.set_yticks(np.arange(lines) + 0.5, labels)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.grid(False)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


@look()
def energy_maps(maps: Mapping[str, Tensor]) -> Figure:
    """Where in the image something lives: per-pixel RMS over images and channels, on one scale.

    Args:
        maps: label → differences or parts (N, 3, H, W), normalised units.
    """
    energy = {label: part.square().mean((0, 1)).sqrt().numpy() for label, part in maps.items()}
    size = (2.6 * len(maps) + 0.6, 3)
    how: dict[str, Any] = dict(layout="compressed", sharey=True, squeeze=False)
    figure, axes = style.axes(1, len(maps), figsize=size, **how)
    highest = max(part.max() for part in energy.values())
    for axis, (label, part) in zip(axes.flat, energy.items(), strict=True):
        image = axis.imshow(part, cmap="magma", vmin=0, vmax=highest)
        axis.set(title=label, xlabel="x (pixels)")
        axis.grid(False)
    axes[0, 0].set(ylabel="y (pixels)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="RMS (normalised units)")
    return figure


@look()
def spectra(parts: Mapping[str, Tensor]) -> Figure:
    """In which frequencies something lives: radially averaged power of (N, 3, H, W)."""
    figure, axis = style.axes(figsize=(6.4, 4))
    names = [label.partition(" x′")[0] for label in parts]
    hows = looks((n if n in COLOURS else None, n) for n in names)
    by_label = {how["label"]: how for how in LOOKS.values()}
    for (label, part), how in zip(parts.items(), hows, strict=True):
        how |= by_label.get(label, {}) | {"label": entry(label), "markersize": 3}
        axis.plot(*radial_power(part), **how)
    axis.set(xlabel="spatial frequency (cycles per image)", yscale="log")
    axis.set(ylabel="mean power (normalised units²)", title="Which frequencies each part holds")
    legend(figure, [axis])
    return figure


def radial_power(part: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies 0, 1, …, H/2 cycles per image and the mean power |FFT|²/HW in each ring."""
    h, w = part.shape[-2:]
    power = torch.fft.fft2(part.double()).abs().square().mean((0, 1)) / (h * w)
    frequency = np.hypot(np.fft.fftfreq(h, 1 / h)[:, None], np.fft.fftfreq(w, 1 / w))
    ring, rings = frequency.round().astype(int).ravel(), min(h, w) // 2 + 1
    mean = np.bincount(ring, power.numpy().ravel()) / np.bincount(ring)
    return np.arange(rings), mean[:rings]


@look()
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
    legend(figure, axes.flat)
    return figure


# --- of identity, from rows of readings and the summary of a study --------------------------------

Summary = Mapping[str, Any]
# How x, its parts and its x′ look in every figure.
LOOKS: dict[str, dict[str, Any]] = {
    name: dict(label=label, marker=marker, color=color, markersize=4)
    for name, label, marker, color in (
        ("x", "x", "x", INK),
        ("G", "G(x)", "D", OTHERS[2]),
        ("R", "R(x)", "v", OTHERS[3]),
        ("idaa", NAMES["idaa"], "o", COLOURS["idaa"]),
        ("clae", NAMES["clae"], "s", COLOURS["clae"]),
        ("random_sign", NAMES["random_sign"], "^", COLOURS["random_sign"]),
    )
}
_THIN: dict[str, Any] = dict(color=INK, linewidth=0.8, linestyle=":")


# What a witness looks for among candidates: x as it is (notebook 02), or another view of it (08).
SAME, VIEW = "x itself", "another view of x"


@look()
def identity_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], sought: str = VIEW
) -> Figure:
    """Hardness and retrieval over ε, and retrieval over hardness: adversary → rows by ε.

    Rows are those of `scene.Reading`; `sought` says what their witness looks for. The right panel
    compares adversaries at an equal loss of the attacked encoder.
    """
    figure, (left, middle, right) = style.axes(1, 3, figsize=(10.2, 3.2))
    for name, curve in curves.items():
        keys = ("epsilon", "loss_after", "retrieved", "low", "high")
        epsilon, loss, retrieved, *ends = ([row[key] for row in curve] for key in keys)
        left.plot(epsilon, loss, **LOOKS[name])
        for axis, at in ((middle, epsilon), (right, loss)):
            _curve(axis, at, retrieved, ends, LOOKS[name])
    row = next((row for curve in curves.values() for row in curve), {"n": 0})
    left.axhline(row.get("loss_before", 0), **_THIN)
    left.set(ylabel="loss at x′ (nats)", title="Hardness")
    middle.set(title="Identity")
    right.set(xlabel="loss at x′ (nats)", title="Identity at equal hardness")
    for axis in (left, middle):
        axis.set(xscale="log", xlabel="ε (z; CLAE: normalised pixels)")
    for axis in (middle, right):
        axis.set(ylabel=f"{sought} found\namong {row['n']} (%)", ylim=(-5, 105))
    legend(figure, [left])
    return figure


@look()
def information(summary: Summary) -> Figure:
    """I(z; y) and its bounds from batches of K."""
    latent = summary["latent"]
    k, lower, upper = np.array(latent["batches"]).T
    figure, axis = style.axes(figsize=(7.6, 3.8))
    axis.plot(k, upper, marker="v", markersize=4, color=OTHERS[2], label="upper, leave-one-out")
    axis.axhline(latent["rate"], color=OTHERS[2], linestyle="-.", label="rate (upper)")
    axis.axhline(summary["log_n"], color=INK, linestyle=":", label="log N")
    axis.axhline(latent["information"], color=INK, label="I(z; y), exact aggregate")
    axis.plot(k, np.log(k), color=INK, linewidth=0.8, linestyle="--", label="log K")
    axis.plot(k, lower, marker="^", markersize=4, color=OTHERS[3], label="lower, batch of K")
    axis.set(xlabel="batch size K (images)", ylabel="I(z; y) (nats)", xscale="log")
    axis.set(title=f"Which of {summary['n']} images is it? What a sampled z says")
    axis.set_yscale("symlog", linthresh=10, linscale=2)
    axis.set_ylim(0, 1.3 * max(upper.max(), latent["rate"], 10))
    _ticks(axis, k)
    legend(figure, [axis])
    return figure


@look()
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
        how: dict[str, Any] = dict(color=colours, ecolor=INK, capsize=4, alpha=0.7)
        axis.bar(PARTS, mean, 0.62, yerr=spread, **how)
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


@look()
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
            how = LOOKS[name] | dict(label=f"IDAA − {NAMES[name]}", linestyle="", capsize=3)
            axis.errorbar(shift * rows["epsilon"], mean, yerr=spread, **how)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xscale="log", xlabel="ε of IDAA (units of z)", ylabel=f"difference in {unit}")
        axis.set_xlim(epsilons[0] / 1.6, epsilons[-1] * 1.6)
        _ticks(axis, epsilons)
    axes[0].set(title="Identity at equal hardness")
    axes[1].set(title="above 0: IDAA keeps more")
    if labelled:
        for name, curve in curves.items():
            loss, same = ([row[key] for row in curve] for key in ("loss_after", "consistency"))
            ends = share_interval(np.divide(same, 100), summary["n"])
            _curve(axes[2], loss, same, ends, LOOKS[name])
        axes[2].set(xlabel="loss at x′ (nats)", ylabel="same class as x (%)", ylim=(-5, 105))
        axes[2].set(title="Label consistency")
    legend(figure, axes)
    return figure


@look()
def candidates(summary: Summary) -> Figure:
    """retrieval@1 over the number of candidates."""
    k, attacked = summary["among"]["k"], summary.get("among_attacked", {})
    radii = attacked.get("radii", {})
    figure, axis = style.axes(figsize=(6.4, 3.6))
    for name, curve in (summary["among"] | attacked).items():
        if line := LOOKS.get(name):
            label = f"{line['label']} x′, ε = {radii[name]:.2g}" if name in radii else line["label"]
            # A mean of chances, which varies at most as a share of hits does.
            ends = share_interval(np.divide(curve, 100), summary["n"])
            _curve(axis, k, curve, ends, line | {"label": label})
    axis.plot(k, [100 / i for i in k], label="by chance", **_THIN)
    axis.set(xscale="log", xlabel="candidates", ylabel=f"{VIEW} found (%)", ylim=(-5, 105))
    axis.set(title="Identity over the number of candidates")
    _ticks(axis, [i for i in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if i <= summary["n"]])
    legend(figure, [axis])
    return figure


@look()
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
            points = [row["kept"][part] for row in rows]
            mean, spread = _spread([(one["retrieved"], one["low"], one["high"]) for one in points])
            middle.errorbar(value, mean, yerr=spread, capsize=3, **LOOKS[part])
        middle.set(title=f"Identity, ε = {epsilon:g}")
        middle.set(ylabel=f"{VIEW} found\namong {summary['n']} (%)")
        right.plot(value, [row["loss"] for row in rows], **LOOKS["idaa"])
        right.axhline(summary["loss_before"], **_THIN)
        right.set(ylabel="loss at x′ (nats)", title=f"Hardness of ε = {epsilon:g}")
        for panel in panels:
            panel.set(xscale="log", xlabel=names[axis])
            _ticks(panel, value)
            panel.legend(fontsize="x-small")
    return figure


def _spread(rows: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means (N,) and the two sides of their intervals (2, N) of rows (mean, low, high)."""
    mean, low, high = np.array(rows).reshape(-1, 3).T
    return mean, np.maximum(0, [mean - low, high - mean])


def _curve(axis: Any, at: Any, values: Any, ends: Any, line: Mapping[str, Any]) -> None:
    """Values with their intervals as a band."""
    axis.plot(at, values, **line)
    axis.fill_between(at, *ends, color=line["color"], alpha=0.15, linewidth=0)


def _ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
