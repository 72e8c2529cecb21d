"""One look for all figures: readable on light and dark pages, colour-blind safe, ready for print.

It holds inside `look` alone: matplotlib stays as the user has it. `save` writes what notebooks keep
and papers print, `svg` what widgets show; a figure that ends a cell shows itself.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import pickle
import textwrap
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import PIL.Image
from cycler import cycler
from IPython.display import Image, display
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from idaa_lib.results import ADVERSARIES as NAMES
from idaa_lib.runs.files import saving

# Okabe & Ito's colours, of which colour-blind readers can tell any two apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]
# An adversary has the same colour in every figure, and nothing else has it.
COLOURS = {"none": PALETTE[3], "idaa": PALETTE[0], "clae": PALETTE[1], "random_sign": PALETTE[2]}
COLOURS |= {NAMES[name]: colour for name, colour in COLOURS.items()}  # by either of its names
INK, GRID = "#1f2328", "#dfe3e8"
OTHERS = [INK, "#7F7F7F", "#B8860B", "#8A63D2"]  # of what is no adversary, or one of the user's own
DASHES = ["-", "--", ":", "-."]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*"]

RC: dict[Any, Any] = {
    # Lines and text of a paper, on a white grid.
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 10.56),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9.68),
    "axes.linewidth": 1.0,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.8,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0.8,
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "axes.axisbelow": True,
    "axes.grid": True,
    "xtick.bottom": False,
    "ytick.left": False,
    "axes.prop_cycle": cycler(color=OTHERS),
    # An opaque card: on a dark page text and axes stay as readable as on a light one.
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
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
DPI = 150  # of saved pictures: sharp on dense screens; notebooks show them at their size in inches
COLUMNS = {"single": 3.3, "double": 6.9}  # of a paper, in inches
POINTS = 8  # of text in print
# No font has them, and names of files may. A line may end.
CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n")}, " ")
_LOCK = threading.RLock()


@contextlib.contextmanager
def look() -> Iterator[None]:
    """matplotlib with the look of our figures, in here alone; one thread at a time."""
    with _LOCK, mpl.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # `_prepare` says it
        yield


class Picture(Figure):
    """A figure that the end of a cell shows, as `save` would write it."""

    def _ipython_display_(self) -> None:
        display(picture(self))


def axes(
    lines: int = 1, columns: int = 1, *, figsize: Any, layout: Any = "constrained", **kwargs: Any
) -> tuple[Picture, Any]:
    """As `plt.subplots`, outside pyplot's list of figures, so that any thread may draw."""
    figure = Picture(figsize=figsize, layout=layout)
    return figure, figure.subplots(lines, columns, **kwargs)


def panels(n: int, most: int, size: tuple[float, float]) -> tuple[Picture, Any]:
    """A figure of n panels of `size` (inches), at most `most` side by side, and its axes (n,)."""
    columns = min(most, n)
    lines = -(-n // columns)
    width, height = size
    figure, grid = axes(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for left_over in grid.flat[n:]:
        left_over.remove()
    return figure, grid.flat[:n]


def colour(adversary: str) -> str:
    """The colour of an adversary, by either of its names; one of the user's own keeps its first."""
    return COLOURS.setdefault(adversary, OTHERS[len(COLOURS) % len(OTHERS)])


def looks(lines: Iterable[tuple[str | None, Any]]) -> list[dict[str, Any]]:
    """The look of each line (its adversary, if any, and what it is of), no two alike: the adversary
    gives the colour, the other dashes and marker, unless another line of that colour has them."""
    things, used, styles = list[Any](), set[tuple[str, int]](), []
    for i, (adversary, thing) in enumerate(lines):
        color = colour(adversary) if adversary else OTHERS[i % len(OTHERS)]
        things += [thing] * (thing not in things)
        ranks = itertools.chain([things.index(thing)], itertools.count())
        rank = next(i for i in ranks if (color, i) not in used)
        used.add((color, rank))
        dashes, marker = DASHES[rank % len(DASHES)], MARKERS[rank % len(MARKERS)]
        styles.append(dict(color=color, linestyle=dashes, marker=marker))
    return styles


def entry(name: Any) -> str:
    """A name as a label: matplotlib leaves out of legends what begins with "_"."""
    return f" {name}" if str(name).startswith("_") else str(name)


def legend(figure: Figure, axes: Iterable[Any], least: int = 1, points: float = 10) -> None:
    """One for all panels, below them: names of runs are long, and would hide the curves. The figure
    grows by it."""
    handles: dict[str, Any] = {}
    for axis in axes:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    if len(handles) >= least:
        letter, width = 0.0085 * points, figure.get_figwidth()  # inches
        most = int(width / letter) - 8
        labels = [textwrap.fill(label.translate(CONTROL), most) for label in handles]
        room = letter * max(len(line) for label in labels for line in label.split("\n")) + 0.6
        columns = max(1, min(len(labels), int(width / room)))
        place: Any = dict(loc="outside lower center", ncols=columns, fontsize=points)
        one = figure.legend([*handles.values()], labels, **place)
        for text in one.get_texts():
            text.set_parse_math(False)  # as it will be drawn (`_prepare`)
        room = one.get_window_extent().height / figure.dpi
        figure.set_figheight(figure.get_figheight() + room)


def save(figure: Figure, path: Path | str, column: str | None = None) -> Image:
    """The picture that is written as `path` (.png), which a notebook displays.

    Args:
        column: `single` or `double`, for print: 3.3 or 6.9 inches wide, text of 8 points, no title,
            PNG and PDF. The figure itself stays as it is.
    Raises:
        ValueError: there is no such column. RunError: as `saving`.
    """
    if column not in (None, *COLUMNS):
        wish = " or ".join(f"{name!r} ({width} inches)" for name, width in COLUMNS.items())
        raise ValueError(f"column must be {wish}, and is {column!r}.")
    path, dpi, box = Path(path).with_suffix(".png"), DPI, None
    if column:
        figure, box = _print(figure, COLUMNS[column])
        dpi = 2 * DPI
    with saving(path):
        path.write_bytes(_render(figure, "png", bbox_inches=box, dpi=dpi))
        if column:
            path.with_suffix(".pdf").write_bytes(_render(figure, "pdf", bbox_inches=box))
    return _image(path.read_bytes(), dpi)


def picture(figure: Figure) -> Image:
    """A figure as `save` would write it, of which no file is kept."""
    return _image(_render(figure, "png"))


def _image(png: bytes, dpi: int = DPI) -> Image:
    width, _ = PIL.Image.open(io.BytesIO(png)).size
    return Image(png, format="png", width=round(width * 96 / dpi))


@look()
def _render(figure: Figure, form: str, **kwargs: Any) -> bytes:
    _prepare(figure)
    target = io.BytesIO()
    figure.savefig(target, format=form, **{"dpi": DPI} | kwargs)
    return target.getvalue()


def _prepare(figure: Figure) -> None:
    """Makes every text stand as it is, in a font that has its letters: a user's "$5 note" is no
    formula, and a control character is a space. Log axes keep their formulas."""
    for axis in figure.axes:  # asking for the labels of ticks makes them
        axis.get_xticklabels(which="both"), axis.get_yticklabels(which="both")
        for line in (axis.xaxis, axis.yaxis):
            names = [text.get_text() for text in line.get_ticklabels()]
            if any(name != name.translate(CONTROL) for name in names):
                line.set_ticks(line.get_ticklocs(), [name.translate(CONTROL) for name in names])
    usual, lacking = mpl.rcParams["font.family"], set[str]()
    for text in figure.findobj(Text):
        text.set_text(text.get_text().translate(CONTROL))
        text.set_parse_math("mathdefault" in text.get_text())
        fonts = {letter: _font(letter) for letter in set(text.get_text())}
        lacking |= {letter for letter, font in fonts.items() if font is None}
        if further := {font for font in fonts.values() if font} - {*usual}:
            text.set_fontfamily([*usual, *sorted(further)])
    if lacking:
        kinds = ", ".join(sorted({unicodedata.name(c, "unknown").split()[0] for c in lacking}))
        warnings.warn(
            f"No font of this machine has {''.join(sorted(lacking))!r}, so the figure has boxes in "
            f"their place: install a font for {kinds}, such as one of the Noto fonts, and restart.",
            stacklevel=5,
        )


@functools.cache
def _font(letter: str) -> str | None:
    """The name of a font that has a letter, ours before others; None where no font has it."""
    # matplotlib's "Last Resort" has a box for every letter.
    fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith("Last Resort")]
    for font in sorted(fonts, key=lambda font: font.name != RC["font.family"]):
        if letter.isspace() or font_manager.get_font(font.fname).get_char_index(ord(letter)):
            return font.name
    return None


@look()
def _print(figure: Figure, width: float) -> tuple[Figure, Bbox]:
    """A copy for a column of `width` inches, and what to save of it: no title, text of `POINTS`.
    Panels get 2 inches at least: they stand below each other where they must, and say then what
    they shared."""
    figure = pickle.loads(pickle.dumps(figure))
    panels: list[Any] = [axis for axis in figure.axes if axis.get_subplotspec()]
    grid = panels[0].get_gridspec()
    lines, columns, most = grid.nrows, grid.ncols, int(width / 2)
    ratio = figure.get_figheight() * columns / (figure.get_figwidth() * lines)
    if columns > most:
        lines = -(-len(panels) // most)
        columns = -(-len(panels) // lines)
        places = GridSpec(lines, columns, figure)
        for i, axis in enumerate(panels):
            axis.set_subplotspec(places[i])
            axis.tick_params(labelbottom=True, labelleft=True)
            for name in "xy":
                shared = getattr(axis, f"get_shared_{name}_axes")().get_siblings(axis)
                labels = [getattr(other, f"get_{name}label")() for other in shared]
                getattr(axis, f"set_{name}label")(next(filter(None, labels), ""))
    if figure.get_suptitle():
        figure.suptitle("")
    if len(panels) == 1:
        panels[0].set_title("")
    across, letter = width / columns, 0.0085 * POINTS
    free = panels[0].get_aspect() == "auto"
    down = max(1.9, min(0.7, ratio) * across) if free else ratio * across
    for axis in figure.axes:
        axis.tick_params(which="both", labelsize=POINTS)
        names = [text.get_text() for text in axis.get_xticklabels()]
        if letter * sum(max(map(len, name.split("\n"))) for name in names) > across:
            axis.tick_params(axis="x", rotation=90)
        for name, room in (("title", across), ("xlabel", across - 0.5), ("ylabel", down - 0.4)):
            words = textwrap.fill(getattr(axis, f"get_{name}")(), int(room / letter))
            getattr(axis, f"set_{name}")(words)
    figure.set_size_inches(width, lines * down)
    for old in [*figure.legends]:
        old.remove()
        legend(figure, panels, points=POINTS)
    for text in figure.findobj(Text):
        text.set_fontsize(POINTS)
    _prepare(figure)
    figure.draw_without_rendering()
    used = figure.get_tightbbox()
    return figure, Bbox.from_extents(0, used.y0 - 0.02, width, used.y1 + 0.02)


def svg(figure: Figure) -> str:
    """A figure as inline SVG for an HTML widget, whose ink is the page's own.

    The background is left out and text, ticks and grid take JupyterLab's colours, so that one and
    the same SVG reads well in the light and the dark theme.
    """
    # The whole figure, not what `savefig.bbox` crops: places in it can be computed then.
    how: dict[str, Any] = {"bbox_inches": figure.bbox_inches, "transparent": True}
    how["metadata"] = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none
    text = _render(figure, "svg", **how).decode()
    text = text[text.index("<svg") :]  # without the XML head
    for ink, page in (
        (INK, "var(--jp-ui-font-color1, currentColor)"),
        (GRID, "var(--jp-border-color2, #8884)"),
        ("#ffffff", "var(--jp-layout-color0, #ffffff)"),  # below a legend
    ):
        text = text.replace(ink, page)
    return text
