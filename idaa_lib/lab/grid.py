"""The widget that shows a grid of small images enlarged and unsmoothed."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import ipywidgets as widgets
from torch import Tensor

from idaa_lib.train.samples import grid

# Pixels as they are: the browser neither smooths nor stretches them.
STYLE = "<style>.idaa-pixels { image-rendering: pixelated; }</style>"
WIDEST = 16383  # pixels of a WebP picture
_MARK = 17  # pixels of the line of marks
_CELL = (
    "display:inline-block;font-size:11px;line-height:13px;padding:2px 0;box-sizing:border-box;"
    "text-align:center;vertical-align:bottom;white-space:normal;overflow-wrap:anywhere;"
    "width:{side}px"
)
_LEFT = (
    "height:{side}px;line-height:{side}px;width:104px;padding-right:8px;white-space:nowrap;"
    "text-align:right"
)


class Grid(widgets.HBox):
    """A `grid` with a name beside each row, names above the columns where they are given, and with
    `marks` what `mark` says below them.

    Its size is set by `resize` alone: new pixels change nothing else on the page.
    """

    def __init__(
        self,
        rows: Sequence[str],
        name: str,
        text: str = "",
        marks: bool = False,
        form: str = "webp",
    ) -> None:
        self.rows, self._side, self._marks, self._form = tuple(rows), 0, marks, form
        self._text = text or ", ".join(rows)  # what a reader of the screen hears in its place
        self.image = widgets.Image(format=form)
        self.image.add_class(name)
        self.image.add_class("idaa-pixels")
        self._left, self._top, self._bottom = widgets.HTML(), widgets.HTML(), widgets.HTML()
        columns = widgets.VBox([self._top, self.image, self._bottom])
        super().__init__([self._left, columns], layout={"align_items": "flex-start"})
        self.add_class("idaa-grid")

    def resize(
        self, columns: int, size: int, names: Sequence[str] = (), scale: int | None = None
    ) -> None:
        """Make room for so many images of `size` pixels a side, on `scale` screen pixels each."""
        side = (scale or (2 if size <= 48 else 1)) * (size + 1)
        width, height = f"{columns * side}px", f"{len(self.rows) * side}px"
        self.image.layout = widgets.Layout(
            width=width, min_width=width, height=height, align_self="flex-start"
        )
        self.image.format = self._form if columns * (size + 1) <= WIDEST else "png"
        self._side = side
        self._show(self._top, [(html.escape(name), "", "") for name in names[:columns]])
        self.mark([])
        css = _LEFT.format(side=side)
        left = (
            f'<div class="idaa-row" style="{css}">{html.escape(row)}</div>' for row in self.rows
        )
        below = f'<div style="height:{_MARK}px"></div>' * self._marks
        text = html.escape(self._text)
        self._left.value = f'<div class="idaa-text" title="{text}">{"".join(left)}{below}</div>'

    def mark(self, cells: Sequence[tuple[str, str, str]]) -> None:
        """Below each image: a text (HTML), its CSS class, its tooltip."""
        self._show(self._bottom, cells)

    def _show(self, line: widgets.HTML, cells: Sequence[tuple[str, str, str]]) -> None:
        css = _CELL.format(side=self._side)
        spans = (
            f'<span style="{css}" class="{name}" title="{html.escape(title)}">{text}</span>'
            for text, name, title in cells
        )
        height = f"min-height:{_MARK}px;" if line is self._bottom and self._marks else ""
        line.layout.display = None if cells or height else "none"
        line.value = f'<div style="{height}white-space:nowrap">{"".join(spans)}</div>'

    def show(self, rows: Iterable[Tensor]) -> None:
        """Rows of pixels in [0, 1] (N, 3, H, W)."""
        self.image.value = grid(list(rows), form=self.image.format)
