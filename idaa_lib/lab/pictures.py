"""Figures of images, of their parts, and of how much identity is left in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from idaa_lib.lab import style
from idaa_lib.lab.style import COLOURS, INK, NAMES


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


def identity_curves(curves: Mapping[str, Sequence[Any]]) -> Figure:
    """Hardness and retrieval over ε, and retrieval over hardness: adversary → readings by ε.

    A reading has epsilon, loss_after (nats), retrieved (%), loss_before and n, as `engine.Meters`.
    The right panel compares adversaries where it is fair: at an equal loss.
    """
    figure, (left, middle, right) = style.axes(1, 3, figsize=(10.2, 2.9))
    for (name, curve), marker in zip(curves.items(), "os^", strict=False):
        look = dict(color=COLOURS[name], label=NAMES[name], marker=marker, markersize=3.5)
        epsilons = [point.epsilon for point in curve]
        loss, found = [p.loss_after for p in curve], [p.retrieved for p in curve]
        left.plot(epsilons, loss, **look)
        middle.plot(epsilons, found, **look)
        right.plot(loss, found, **look)
        for point in curve[:1]:
            left.axhline(point.loss_before, color=INK, linewidth=0.8, linestyle=":")
            unit = f"x found among {point.n} (%)"
            middle.set(ylabel=unit)
            right.set(ylabel=unit)
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
