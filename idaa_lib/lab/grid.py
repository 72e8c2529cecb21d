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


class Grid(widgets.HBox):
    """A `grid` with a name beside each row, and where it is given a name above each column.

    Its size is set by `shape` alone: new pixels change nothing else on the page.
    """

    def __init__(self, rows: Sequence[str], name: str, form: str = "webp") -> None:
        self.rows = tuple(rows)
        self.image = widgets.Image(format=form)
        self.image.add_class(name)
        self.image.add_class("idaa-pixels")
        self._left, self._top = widgets.HTML(), widgets.HTML()
        super().__init__([self._left, widgets.VBox([self._top, self.image])])

    def shape(self, columns: int, size: int, names: Sequence[str] = ()) -> None:
        """Make room for so many images of `size` pixels a side."""
        scale = SCALE if size <= 48 else 1
        side = scale * (size + 1)
        self.image.layout = widgets.Layout(
            width=f"{columns * side}px", min_width=f"{columns * side}px",
            height=f"{len(self.rows) * side}px", align_self="flex-start",
        )  # fmt: skip
        cell = f"width:{side}px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap"
        self._top.layout.display = None if names else "none"
        self._top.value = _line(
            f'<span style="display:inline-block;vertical-align:top;font-size:11px;{cell}" '
            f'title="{html.escape(name)}">{html.escape(name)}</span>'
            for name in names[:columns]
        )
        line = (
            f'<div style="height:{side}px;line-height:{side}px;width:104px;padding-right:8px;'
            f'white-space:nowrap;text-align:right">'
        )
        head = '<div style="height:22px"></div>' if names else ""
        self._left.value = head + "".join(f"{line}{html.escape(row)}</div>" for row in self.rows)

    def show(self, rows: Iterable[Tensor]) -> None:
        """Rows of pixels in [0, 1] (N, 3, H, W)."""
        self.image.value = grid(list(rows), form=self.image.format)


def _line(parts: object) -> str:
    cells = "".join(parts)  # type: ignore[arg-type]
    return f'<div style="white-space:nowrap;height:22px;line-height:22px">{cells}</div>'
