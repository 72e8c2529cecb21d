"""The widget that shows a grid of small images enlarged and unsmoothed."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import ipywidgets as widgets
from torch import Tensor

from idaa_lib.train.samples import grid

SCALE = 2  # screen pixels a pixel of small images
# Pixels as they are: the browser neither smooths nor stretches them.
STYLE = "<style>.idaa-pixels { image-rendering: pixelated; }</style>"
_TOP, _LEFT = (
    "display:inline-block;vertical-align:top;font-size:11px;height:22px;line-height:22px;"
    "white-space:nowrap;overflow:hidden;text-overflow:ellipsis;width:{side}px",
    "height:{side}px;line-height:{side}px;width:104px;padding-right:8px;white-space:nowrap;"
    "text-align:right",
)


class Grid(widgets.HBox):
    """A `grid` with a name beside each row, and where it is given a name above each column.

    Its size is set by `resize` alone: new pixels change nothing else on the page.
    """

    def __init__(self, rows: Sequence[str], name: str, form: str = "webp") -> None:
        self.rows = tuple(rows)
        self.image = widgets.Image(format=form)
        self.image.add_class(name)
        self.image.add_class("idaa-pixels")
        self._left, self._top = widgets.HTML(), widgets.HTML()
        super().__init__([self._left, widgets.VBox([self._top, self.image])])

    def resize(self, columns: int, size: int, names: Sequence[str] = ()) -> None:
        """Make room for so many images of `size` pixels a side."""
        side = (SCALE if size <= 48 else 1) * (size + 1)
        width, height = f"{columns * side}px", f"{len(self.rows) * side}px"
        self.image.layout = widgets.Layout(
            width=width, min_width=width, height=height, align_self="flex-start"
        )
        cells = [(html.escape(name), _TOP.format(side=side)) for name in names[:columns]]
        top = "".join(f'<span style="{css}" title="{name}">{name}</span>' for name, css in cells)
        self._top.layout.display = None if names else "none"
        self._top.value = f'<div style="white-space:nowrap">{top}</div>'
        css = _LEFT.format(side=side)
        head = '<div style="height:22px"></div>' if names else ""
        left = (f'<div style="{css}">{html.escape(row)}</div>' for row in self.rows)
        self._left.value = head + "".join(left)

    def show(self, rows: Iterable[Tensor]) -> None:
        """Rows of pixels in [0, 1] (N, 3, H, W)."""
        self.image.value = grid(list(rows), form=self.image.format)
