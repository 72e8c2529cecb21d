"""A study in a notebook: a row and a point on the curve as each of its runs is judged."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import joblib
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from idaa_lib import plans, results, sweeps
from idaa_lib.grids import Point, name_labels
from idaa_lib.lab import style
from idaa_lib.lab.kernel import SHEET, apart, is_attended, newcomer
from idaa_lib.runs import Stopped
from idaa_lib.runs.progress import Lines

Draw = Callable[[pd.DataFrame], Figure]
NOTICE = (
    "This notebook was opened anew while its cell worked, so the cells below did not run: once all "
    "runs are done, select this cell and choose Run ▸ Run Selected Cell and All Below."
)
# Those that go on in this kernel, by the keys of their plans.
_studies: dict[tuple[str, ...], Study] = {}


def perform(grid: Sequence[Point], jobs: int, split: str, draw: Draw) -> dict[str, sweeps.Outcome]:
    """The outcomes of all runs of `grid`, as `sweeps.perform_all` gives them.

    While it works, a table and a figure grow below the line that says how far it is. They go when
    all is done, for then the notebook shows them in full; after a stop they stay. A thread of the
    kernel does the work: a page that is opened anew meanwhile shows how it goes on, and this cell,
    run again, attaches to it.

    Args:
        split: whose accuracies are shown, `validation` or `test`. draw: the figure of such rows of
            `plans.table`.
    Raises:
        Stopped: the kernel was interrupted, and the runs under way were saved; or the notebook was
            opened anew, and the study goes on.
    """
    tasks = plans.plan(grid)
    key = tuple(tasks)
    if key not in _studies:
        _studies[key] = Study(grid, tasks, jobs, split, draw)
    study = _studies[key]
    study.open()
    try:
        with newcomer() as event:
            while study.is_alive() and not event.wait(0.1):
                pass
        if study.is_alive():
            study.notice = NOTICE
            study.show()
            raise Stopped(
                "No longer waiting for the study, which goes on in this kernel: run this cell "
                "again to attach to it. The cells below did not run."
            )
    except KeyboardInterrupt:
        study.kernels.cancel()
        study.join()
        display(HTML(study.body))  # stays, also without this kernel
        study.close()
        raise Stopped(
            "The study was stopped, and what was under way is saved. The cells below did not run: "
            "run this cell again to go on."
        ) from None
    finally:
        if not study.is_alive():
            del _studies[key]
    study.close()
    if study.error:
        raise study.error
    return study.outcomes


class Study(threading.Thread):
    """Performs a grid, and shows how it goes: to a person by a widget, which a page that is opened
    anew shows again, else by an output of the cell."""

    def __init__(
        self,
        grid: Sequence[Point],
        tasks: Mapping[str, plans.Task],
        jobs: int,
        split: str,
        draw: Draw,
    ) -> None:
        super().__init__(daemon=True)
        self.grid, self.tasks, self.jobs, self.split, self.draw = grid, tasks, jobs, split, draw
        self.outcomes: dict[str, sweeps.Outcome] = {}
        self.kernels = sweeps.Kernels()
        self.error: BaseException | None = None
        # HTML: how far it is, table and figure, a sentence.
        self.line = self.body = self.notice = ""
        self._evaluations, self._draw_after = 0, 0.0
        self._widget = None
        if is_attended():
            self._widget = apart(lambda: widgets.HTML().add_class("idaa-study"))
        # What a caller's `joblib.parallel_config` says holds for its own thread alone.
        self._backend, _ = joblib.parallel.get_active_backend(prefer="threads")

    def open(self) -> None:
        """Show it below the present cell, and start it if it does not go yet."""
        if self._widget is not None:
            display(HTML(SHEET))
            display(self._widget)
        elif self.ident is None:
            self._handle = display(HTML(""), display_id=True)
        self.notice = ""
        if self.ident is None:
            self.start()

    def run(self) -> None:
        try:
            with joblib.parallel_config(self._backend):
                lines, kernels = Lines(30.0, self), self.kernels
                self.outcomes = sweeps.perform_all(
                    self.tasks, self.jobs, self.extend, lines=lines, kernels=kernels
                )
            if self.notice:  # no cell below shows the last ones
                self._draw_after = 0.0
                self.extend(self.outcomes)
        except BaseException as error:  # for the cell that waits
            self.error = error

    def update(self, line: Mapping[str, str], raw: bool = True) -> None:
        """Show a line of progress, as a display handle of `Lines` does."""
        self.line = line["text/html"]
        self.show()

    def extend(self, outcomes: Mapping[str, sweeps.Outcome]) -> None:
        """Draw table and figure once more where further runs are judged."""
        count = sum(o.state == "finished" for key, o in outcomes.items() if key[:4] == "eval")
        start = time.monotonic()
        if count == self._evaluations or start < self._draw_after:
            return
        self._evaluations = count
        with contextlib.suppress(Exception):  # others still train; the cells below say it
            frame = plans.table(self.grid)
            frame = frame[(frame["split"] == self.split) & (frame["features"] == "encoder")]
            by = [name for name in (*name_labels(self.grid), "seed") if frame[name].notna().any()]
            rows = results.html_table(results.tabulate(frame, by))
            self.body = rows + style.svg(self.draw(frame))
            self.show()
        self._draw_after = time.monotonic() + 4 * (time.monotonic() - start)

    def close(self) -> None:
        """Leave the last line alone."""
        self.notice = self.body = ""
        self.show()

    def show(self) -> None:
        text = f"{self.line}<p><b>{self.notice}</b></p>{self.body}"
        if self._widget is None:
            self._handle.update(HTML(text))
        else:
            apart(lambda: setattr(self._widget, "value", text))
