"""The widget that shows a grid of small images enlarged and unsmoothed."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import ipywidgets as widgets
from torch import Tensor

from idaa_lib.train.samples import grid

WIDEST = 16383  # pixels of a WebP picture
Cell = tuple[str, str, str]  # a text (HTML), its CSS class, its tooltip


class Grid(widgets.HBox):
    """A `grid` with a name beside each row, names above the columns where they are given, and with
    `marks` what `mark` says below them.

    Its size is set by `resize` alone: new pixels change nothing else on the page. What it showed
    before is hidden from then on, until there are pixels.

    Args:
        text: what a reader of the screen hears in the place of the picture.
    """

    def __init__(
        self,
        rows: Sequence[str],
        name: str,
        text: str = "",
        marks: bool = False,
    ) -> None:
        self.rows, self._marks = tuple(rows), marks
        self._side, self._text = 0, text
        self.image = widgets.Image()
        self.image.add_class(name).add_class("idaa-pixels")
        self._left, self._top, self._bottom = widgets.HTML(), widgets.HTML(), widgets.HTML()
        columns = widgets.VBox([self._top, self.image, self._bottom])
        super().__init__([self._left, columns], layout={"align_items": "flex-start"})
        self.add_class("idaa-grid")

    def resize(
        self,
        columns: int,
        size: int,
        names: Sequence[str] = (),
        scale: int | None = None,
        rows: Iterable[str] = (),
    ) -> None:
        """Make room for so many images of `size` pixels a side, on `scale` screen pixels each; and
        for other `rows`."""
        self.rows = tuple(rows) or self.rows
        self._side = side = (scale or (2 if size <= 48 else 1)) * (size + 1)
        width, height = f"{columns * side}px", f"{len(self.rows) * side}px"
        self.image.layout = widgets.Layout(
            width=width, min_width=width, height=height, align_self="flex-start"
        )
        self.image.layout.visibility = "hidden"
        self.image.format = "webp" if columns * (size + 1) <= WIDEST else "png"
        self._show(self._top, [(html.escape(name), "", "") for name in names[:columns]])
        self.mark([])
        left = "".join(f'<div class="idaa-row">{html.escape(row)}</div>' for row in self.rows)
        left += '<div class="idaa-marks"></div>' * self._marks
        style, text = f"--side: {side}px", html.escape(self._text or ", ".join(self.rows))
        self._left.value = f'<div class="idaa-text" style="{style}" title="{text}">{left}</div>'

    def mark(self, cells: Sequence[Cell]) -> None:
        """Show these below the images, one each."""
        self._show(self._bottom, cells, "idaa-marks" if self._marks else "")

    def _show(self, line: widgets.HTML, cells: Sequence[Cell], kind: str = "") -> None:
        spans = (
            f'<span class="{name}" title="{html.escape(title)}">{text}</span>'
            for text, name, title in cells
        )
        line.layout.display = None if cells or kind else "none"
        style = f"--side: {self._side}px"
        line.value = f'<div class="idaa-names {kind}" style="{style}">{"".join(spans)}</div>'

    def show(self, rows: Iterable[Tensor]) -> None:
        """Rows of pixels in [0, 1] (N, 3, H, W)."""
        self.image.value = grid(list(rows), form=self.image.format)
        self.image.layout.visibility = None
