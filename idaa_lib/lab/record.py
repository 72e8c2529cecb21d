"""What a notebook shows where its widgets cannot: without its kernel, under papermill, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import HTML, display

from idaa_lib.lab import pictures, style

# Stands in a widget: while the widgets are there, the record of the same cell is hidden.
ALIVE = "<style>.jp-OutputArea-child:has(.{name}) ~ .jp-OutputArea-child {{display: none}}</style>"


class Record:
    """Two outputs of the running cell, a figure and a table, that are replaced as it goes on."""

    def __init__(self) -> None:
        self._figure, self._table = (display(HTML(""), display_id=True) for _ in range(2))
        self._latest: tuple[Any, int] = (None, 0)

    def keep(
        self, curves: Mapping[str, Sequence[Mapping[str, float]]], verdict: str, table: pd.DataFrame
    ) -> None:
        """Show curves over ε as PNG, and the verdict (HTML) over a table."""
        points = sum(map(len, curves.values()))
        if curves is not self._latest[0] or points != self._latest[1]:
            self._latest = curves, points
            figure = pictures.identity_curves(curves, pictures.SAME)
            self._figure.update(style.picture(figure))
        content = {
            "text/plain": table.to_string(),
            "text/html": f"<p>{verdict}</p>{table.to_html()}",
        }
        self._table.update(content, raw=True)
