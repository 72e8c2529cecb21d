"""A study in a notebook: a row and a point on the curve as each of its runs is judged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from IPython.display import HTML, DisplayHandle, display
from matplotlib.figure import Figure

from idaa_lib import plans, results, sweeps
from idaa_lib.grids import Point
from idaa_lib.lab import style
from idaa_lib.lab.kernel import attended
from idaa_lib.runs import Stopped


def perform(
    grid: Sequence[Point], jobs: int, split: str, draw: Callable[[pd.DataFrame], Figure]
) -> dict[str, sweeps.Outcome]:
    """The outcomes of all runs of `grid`, as `sweeps.perform_all` gives them.

    While it works, a table and a figure grow below the line that says how far it is. They go when
    all is done, for then the notebook shows them in full; after a stop they stay.

    Args:
        split: whose accuracies are shown, `validation` or `test`. draw: the figure of such rows of
            `plans.table`.
    Raises:
        Stopped: the kernel was interrupted; the runs under way were saved.
    """
    attended()
    tasks = plans.plan(grid)
    outputs: list[DisplayHandle] = []
    evaluations, draw_after = 0, 0.0

    def show(outcomes: Mapping[str, sweeps.Outcome]) -> None:
        nonlocal evaluations, draw_after
        count = sum(o.state == "finished" for key, o in outcomes.items() if key[:4] == "eval")
        start = time.monotonic()
        if count == evaluations or start < draw_after:
            return
        evaluations = count
        with contextlib.suppress(Exception):  # others still train; the cells below say it
            frame = plans.table(grid)
            frame = frame[(frame["split"] == split) & (frame["features"] == "encoder")]
            by = [name for name in (*grid[0].labels, "seed") if frame[name].notna().any()]
            rows = results.tabulate(frame, by)
            if not outputs:
                outputs.extend(display(HTML(""), display_id=True) for _ in range(2))
            for output, part in zip(outputs, (rows, HTML(style.svg(draw(frame)))), strict=True):
                output.update(part)
        draw_after = time.monotonic() + 4 * (time.monotonic() - start)

    try:
        outcomes = sweeps.perform_all(tasks, jobs, show)
    except KeyboardInterrupt:
        raise Stopped(
            "The study was stopped, and what was under way is saved. The cells below did not run: "
            "run this cell again to go on."
        ) from None
    for output in outputs:
        output.update(HTML(""))
    return outcomes
