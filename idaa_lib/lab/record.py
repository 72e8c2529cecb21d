"""What a cell shows where its widgets cannot: without its kernel, under papermill, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import HTML, display

from idaa_lib.lab import pictures, style

# Styles of a page. GONE: where no widget is, as without the kernel, its place is hidden too.
# INSTEAD: while the widget of the CSS class `name` is there, what follows it is hidden.
GONE = (
    "<style>.jp-OutputArea-child:has([data-mime-type*='widget-view']):not("
    ":has([data-mime-type*='widget-view'] > *)) {display: none}</style>"
)
INSTEAD = (
    "<style>.jp-OutputArea-child:has(.{name}) ~ .jp-OutputArea-child {{display: none}}</style>"
)


class Record:
    """Two outputs of the running cell, a figure and a table, that are replaced as it goes on."""

    def __init__(self) -> None:
        self._figure, self._table = (display(HTML(""), display_id=True) for _ in range(2))
        self._latest: tuple[Any, int] = (None, 0)

    def keep(
        self,
        curves: Mapping[str, Sequence[Mapping[str, float]]],
        verdict: str,
        table: pd.DataFrame,
        note: str,
    ) -> None:
        """Show curves over ε as PNG, and the verdict (HTML) over a table and a note on it."""
        points = sum(map(len, curves.values()))
        if curves is not self._latest[0] or points != self._latest[1]:
            self._latest = curves, points
            figure = pictures.identity_curves(curves, pictures.SAME)
            self._figure.update(style.picture(figure))
        html = f"<p>{verdict}</p>{table.to_html()}<p>{note}</p>"
        self._table.update({"text/plain": table.to_string(), "text/html": html}, raw=True)
