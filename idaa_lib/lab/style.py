"""One look for all figures: readable on light and dark pages, colour-blind safe, ready for print.

Importing it sets matplotlib's defaults. `save` writes what notebooks keep, `svg` what widgets show.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.text import Text

from idaa_lib.results import ADVERSARIES as NAMES

# Okabe & Ito's colours, of which colour-blind readers can tell any two apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]
# An adversary has the same colour in every figure.
COLOURS = {"none": PALETTE[3], "idaa": PALETTE[0], "clae": PALETTE[1], "random_sign": PALETTE[2]}
COLOURS |= {NAMES[name]: colour for name, colour in COLOURS.items()}  # by either of its names
INK, GRID = "#1f2328", "#dfe3e8"

RC = {
    "figure.dpi": 110,
    # An opaque card: on a dark page text and axes stay as readable as on a light one.
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
    "axes.labelsize": "small",
    "axes.titlesize": "medium",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "legend.fontsize": "small",
    "axes.titleweight": "bold",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "font.family": "DejaVu Sans",
    # Text stays text: searchable in a PDF that a journal takes, and small in an SVG.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    # The same figure is the same text, whenever it is drawn.
    "svg.hashsalt": "idaa",
    # Every point that was logged is in the drawing, however many there are.
    "path.simplify": False,
}
sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, rc=RC)


DPI = 150  # of saved pictures: sharp on dense screens; notebooks show them at their size in inches


def axes(
    lines: int = 1, columns: int = 1, *, figsize: tuple[float, float],
    layout: str | None = "constrained", **kwargs: Any,
) -> tuple[Figure, Any]:  # fmt: skip
    """As `plt.subplots`, outside pyplot's list of figures, so that any thread may draw."""
    figure = Figure(figsize=figsize, layout=layout)  # type: ignore[arg-type]
    return figure, figure.subplots(lines, columns, **kwargs)


def panels(n: int, most: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of n panels of `size` (inches), at most `most` side by side, and its axes (n,)."""
    columns = min(most, n)
    lines = -(-n // columns)
    width, height = size
    figure, grid = axes(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for left_over in grid.flat[n:]:
        left_over.axis("off")
    return figure, grid.flat[:n]


def save(figure: Figure, path: Path) -> Image:
    """Write a figure as `path` (.png), and beside it as vector PDF where `IDAA_PDF=1` asks for it.

    Gives back the picture as it was saved, which a notebook displays.

    Raises:
        ValueError: IDAA_PDF is neither 0 nor 1.
    """
    choice = os.environ.get("IDAA_PDF") or "0"
    if choice not in ("0", "1"):
        raise ValueError(f"IDAA_PDF must be 1 (figures as PDF too) or 0, and is {choice!r}.")
    draw_names_plainly(figure)
    figure.savefig(path, dpi=DPI)
    if choice == "1":
        figure.savefig(path.with_suffix(".pdf"))
    width, _ = PIL.Image.open(path).size
    return Image(path.read_bytes(), format="png", width=round(width * 96 / DPI))


def draw_names_plainly(figure: Figure) -> None:
    """Makes every text stand as it is: a user's "$5 note" is no formula. Log axes keep theirs."""
    figure.draw_without_rendering()  # which gives ticks their labels
    for text in figure.findobj(Text):
        text.set_parse_math("mathdefault" in text.get_text())


def svg(figure: Figure) -> str:
    """A figure as inline SVG for an HTML widget, whose ink is the page's own.

    The background is left out and text, ticks and grid take JupyterLab's colours, so that one and
    the same SVG reads well in the light and the dark theme.
    """
    draw_names_plainly(figure)
    target = io.StringIO()
    # The whole figure, not what `savefig.bbox` crops: places in it can be computed then.
    whole = figure.bbox_inches
    figure.savefig(
        target, format="svg", transparent=True, bbox_inches=whole, metadata={"Date": None}
    )
    text = target.getvalue()
    text = text[text.index("<svg") :]  # without the XML head
    for colour, page in (
        (INK, "var(--jp-ui-font-color1, currentColor)"),
        (GRID, "var(--jp-border-color2, #8884)"),
        ("#ffffff", "var(--jp-layout-color0, #ffffff)"),  # below a legend
    ):
        text = text.replace(colour, page)
    return text
