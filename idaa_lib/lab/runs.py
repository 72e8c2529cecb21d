"""All runs at a glance: a table with filters, the chosen ones side by side, and what to do to them.

States are read from the run directories, by a thread while the page is shown. A widget sends to the
browser only what has changed.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import display

from idaa_lib import results, runs
from idaa_lib.lab import plots, process, style
from idaa_lib.lab.kernel import guarded
from idaa_lib.lab.live import Panel
from idaa_lib.lab.notebook import link, notebook_of
from idaa_lib.lab.rows import COLUMNS, DAMAGED, SIGNS, Row, cells, file_times, mebibytes, row_of
from idaa_lib.runs import Run, RunError

PAGE = 20  # rows
STYLE = (Path(__file__).parent / "runs.css").read_text()


class RunsPage:
    """The page as a widget, `ui`; `show()` displays it and keeps it up to date until `close()`."""

    _present: RunsPage | None = None  # the one that a cell which runs again replaces

    def __init__(self) -> None:
        self.picked: list[Run] = []
        self._rows: dict[Run, Row] = {}
        self._lines: dict[Run, tuple[widgets.HTML, widgets.HBox]] = {}
        self._page = 0
        self._panel: Panel | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()  # the refreshing thread and the callbacks share all this

        self.status, self.count, self.chosen, self.links, self.accuracy, self.diff, self.curves = (
            _named(widgets.HTML(), name)
            for name in ("status", "count", "chosen", "links", "accuracy", "diff", "curves")
        )
        self.head, self.question = _named(widgets.HTML(cells(COLUMNS)), "head"), widgets.HTML()
        self.table, self.live = _named(widgets.VBox([self.head]), "table"), widgets.VBox()
        self._safe = guarded(self.status)
        self.stage = self._filter("stage", [("all stages", ""), *((s, s) for s in runs.CONFIGS)])
        states = [(f"{sign} {state}", state) for state, sign in SIGNS.items()]
        self.state = self._filter("state", [("all states", ""), *states])
        self.text = widgets.Text(placeholder="words of the id, such as: clae epsilon=0.3")
        _named(self.text, "filter-text").observe(self._safe(self._turn), "value")
        again = self._button("refresh", "Refresh", lambda: self.refresh(redraw=True))
        self.older = self._button("older", "older ›", lambda: self._turn(step=1))
        self.newer = self._button("newer", "‹ newer", lambda: self._turn(step=-1))
        self.open = self._button("open", "Open notebook", self._open)
        self.watch = self._button("watch", "Watch", lambda: self._attach(self.picked[0]))
        self.resume = self._button("resume", "Resume", self._resume)
        self.delete = self._button("delete", "Delete …", self._ask)
        self.yes = self._button("yes", "Yes, delete", self._delete)
        self.no = self._button("no", "No", self._unask)
        self.yes.button_style = "danger"
        self.confirm = _named(_bar(self.question, self.yes, self.no), "confirm")
        parts = (
            widgets.HTML(f"<style>{STYLE}</style>"), _bar(self.stage, self.state, self.text, again),
            self.table, _bar(self.newer, self.count, self.older),
            _bar(self.chosen, self.open, self.watch, self.resume, self.delete), self.confirm,
            self.status, self.links, self.live, self.accuracy, self.diff, self.curves,
        )  # fmt: skip
        self.ui = widgets.VBox(parts)
        self.ui.add_class("idaa-runs")
        self._safe(self._choose)()
        self._safe(self.refresh)()

    def show(self) -> None:
        if RunsPage._present is not None:
            RunsPage._present.close()
        RunsPage._present = self
        threading.Thread(target=self._follow, daemon=True).start()
        display(self.ui)

    def close(self) -> None:
        self._closed.set()
        self._detach()

    def _follow(self) -> None:
        while not self._closed.wait(2):
            self._safe(self.refresh)()

    # --- the table ----------------------------------------------------------------------------

    def refresh(self, redraw: bool = False) -> None:
        """Look at all run directories anew; `redraw` also what is shown of the chosen ones."""
        with self._lock:
            self._rows = {run: self._look(run) for run in runs.every()}
            self.picked = [run for run in self.picked if run in self._rows]
            self._fill()
            if redraw:
                self._choose()
            else:
                self._buttons()

    def _look(self, run: Run) -> Row:
        """The run's row; what cannot have changed is not read again."""
        row = self._rows.get(run)
        if row and row.state != "going" and row.times == file_times(run):
            return row
        return row_of(run)

    def _fill(self) -> None:
        """The page's rows, from what `refresh` found."""
        words = self.text.value.lower().split()
        fitting = [
            run
            for run, row in self._rows.items()
            if self.stage.value in ("", run.stage)
            and self.state.value in ("", row.state)
            and all(word in run.id.lower() for word in words)
        ]
        pages = max(1, -(-len(fitting) // PAGE))
        self._page = min(max(self._page, 0), pages - 1)
        page = fitting[self._page * PAGE : (self._page + 1) * PAGE]
        for run in page:
            if run not in self._lines:
                self._lines[run] = self._line(run)
            self._lines[run][0].value = self._rows[run].html(run)
        self.table.children = (self.head, *(self._lines[run][1] for run in page))
        self.count.value = f"page {self._page + 1} of {pages}; {_many(len(fitting), 'run')}"
        if not self._rows:
            self.count.value = (
                f"No runs in {html.escape(str(runs.outputs_root()))} yet. Start with "
                f"<b>01_pretrain_vae.ipynb</b>, or with <code>make demo</code> in a terminal."
            )
        elif not fitting:
            self.count.value = f"None of {_many(len(self._rows), 'run')} fits these filters."
        self.newer.disabled, self.older.disabled = self._page == 0, self._page == pages - 1

    def _line(self, run: Run) -> tuple[widgets.HTML, widgets.HBox]:
        pick = widgets.Checkbox(value=run in self.picked, indent=False, tooltip=run.id)
        _named(pick, "pick").observe(self._safe(lambda c: self._pick(run, c["new"])), "value")
        text = widgets.HTML()
        return text, _named(widgets.HBox([pick, text]), "row")

    def _turn(self, _: Any = None, step: int | None = None) -> None:
        """Another page, or another filter and its first page."""
        with self._lock:
            self._page = 0 if step is None else self._page + step
            self._fill()

    # --- the chosen ones ----------------------------------------------------------------------

    def _pick(self, run: Run, ticked: bool) -> None:
        with self._lock:
            self.picked = [other for other in self.picked if other != run] + [run] * ticked
            self._choose()

    def _choose(self) -> None:
        """Show the chosen runs side by side: accuracies, configuration, curves."""
        self._unask()
        self.status.value = self.links.value = ""
        self._buttons()
        sound = [run for run in self.picked if self._rows[run].state != DAMAGED]
        stages = {s: [run for run in sound if run.stage == s] for s in runs.CONFIGS}
        self.accuracy.value = accuracies(stages["ssl"], stages["eval"])
        groups = [group for group in stages.values() if group]
        self.diff.value = "".join(map(differences, groups))
        self.curves.value = "".join(map(curves, groups))

    def _buttons(self) -> None:
        states = [self._rows[run].state for run in self.picked]
        trainings = all(run.stage in plots.CURVES for run in self.picked)
        size = mebibytes(sum(self._rows[run].size for run in self.picked))
        text = f"{_many(len(self.picked), 'run')} chosen, {size}:"
        self.chosen.value = text if self.picked else "Choose runs to compare them."
        self.open.disabled = not states or DAMAGED in states
        self.watch.disabled = states != ["going"] or not trainings
        resumable = states in (["interrupted"], ["failed"], ["new"])
        self.resume.disabled = not (resumable and trainings)  # an evaluation starts over
        self.delete.disabled = not states or "going" in states

    def _open(self) -> None:
        self.links.value = "<br>".join(link(run, notebook_of(run)) for run in self.picked)

    def _resume(self) -> None:
        (run,) = self.picked
        self._attach(process.start(run.config))

    def _attach(self, run: Run) -> None:
        """The live panel of a run, in the place of the one before."""
        self._detach()
        self._panel = Panel(run)
        self._panel.follow()
        self.live.children = (self._panel.ui,)

    def _detach(self) -> None:
        if self._panel is not None:
            self._panel.close()
        self._panel, self.live.children = None, ()

    def _ask(self) -> None:
        users = {user for run in self.picked for user in run.users()} - set(self.picked)
        size = mebibytes(sum(self._rows[run].size for run in self.picked))
        text = f"Delete {_many(len(self.picked), 'run')}, {size}?"
        if users:
            text += f" {_many(len(users), 'other run')} use{'s' * (len(users) == 1)} "
            text += "it." if len(self.picked) == 1 else "them."
        self.question.value = f"<b>{text}</b>"
        self.confirm.layout.display = ""

    def _unask(self) -> None:
        self.confirm.layout.display = "none"

    def _delete(self) -> None:
        self._unask()
        freed, kept = 0, []
        for run in self.picked:
            try:
                freed += run.delete()
                self._lines.pop(run, None)
            except RunError as error:
                kept.append(html.escape(str(error)))
        self.refresh(redraw=True)
        self.status.value = "<br>".join([f"{mebibytes(freed)} freed.", *kept])

    def _filter(self, name: str, options: list[tuple[str, str]]) -> widgets.Dropdown:
        menu = widgets.Dropdown(options=options, layout=widgets.Layout(width="140px"))
        menu.observe(self._safe(self._turn), "value")
        return _named(menu, f"filter-{name}")

    def _button(self, name: str, label: str, act: Callable[[], None]) -> widgets.Button:
        button = widgets.Button(description=label, layout=widgets.Layout(width="auto"))
        button.on_click(self._safe(lambda _: act()))
        return _named(button, name)


def _named(widget: Any, name: str) -> Any:
    """The widget, with the CSS class of that name."""
    widget.add_class(f"idaa-runs-{name}")
    return widget


def _bar(*children: widgets.Widget) -> widgets.HBox:
    return _named(widgets.HBox(children), "bar")


def _many(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'s' * (n != 1)}"


# --- the chosen runs as HTML: nothing where there is nothing to compare ---------------------------


def accuracies(trainings: Sequence[Run], evaluations: Sequence[Run]) -> str:
    """Accuracies of evaluations, those of these trainings included; a row each."""
    users = [run for training in trainings for run in training.users()]
    judging = [run for run in dict.fromkeys([*evaluations, *users]) if run.stage == "eval"]
    frame = results.results([run for run in judging if run.finished])
    frame["label"] += ", seed " + frame["seed"].astype(str)
    return "".join(f"<h4>{html.escape(g.title)}</h4>{g.html()}" for g in results.groups(frame))


def differences(chosen: Sequence[Run]) -> str:
    """Each field that differs between runs of one stage, and its value in each run."""
    texts = {f: [f, *map(str, values)] for f, values in results.differing(chosen).items()}
    if not texts:
        return ""
    columns = ["field", *results.labels(chosen)]
    frame = pd.DataFrame.from_dict(texts, "index", columns=columns)
    heading = f"<h4>What differs between the {chosen[0].stage} runs</h4>"
    return heading + results.html_table(frame, index=False)


def curves(chosen: Sequence[Run]) -> str:
    """Training curves of runs of one stage, overlaid."""
    stage = chosen[0].stage
    figure = plots.curves(results.labels(chosen), plots.CURVES.get(stage, ()))
    heading = f"<h4>Curves of {_many(len(chosen), 'run')}: {stage}</h4>"
    return heading + style.svg(figure) if figure.axes else ""
