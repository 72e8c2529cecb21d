"""All runs at a glance: a table with filters, the chosen ones side by side, and what to do to them.

States are read from the run directories, by a thread while the page is shown; a row is sent to the
browser only where its text has changed.
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
from idaa_lib.lab.guard import guarded
from idaa_lib.lab.live import Panel
from idaa_lib.lab.notebook import link, notebook_of
from idaa_lib.lab.rows import COLUMNS, DAMAGED, SIGNS, Row, cells, mebibytes, row_of, stamp
from idaa_lib.runs import Run, RunError

PAGE = 20  # rows
STYLE = (Path(__file__).parent / "runs.css").read_text(encoding="utf-8")


class RunsPage:
    """The page as a widget, `ui`; `show()` displays it and keeps it up to date until `close()`."""

    _shown: RunsPage | None = None  # the one that a cell which runs again replaces

    def __init__(self) -> None:
        self.picked: list[Run] = []
        self._rows: dict[Run, Row] = {}
        self._stamps: dict[Run, list[int]] = {}
        self._lines: dict[Run, tuple[widgets.HTML, widgets.HBox]] = {}
        self._page = 0
        self._panel: Panel | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()  # the refreshing thread and the callbacks share all this

        self.status = _html("status")
        self._safe = guarded(self.status)
        self.stage = self._filter("stage", [("all stages", ""), *((s, s) for s in runs.CONFIGS)])
        states = [(f"{sign} {state}", state) for state, sign in SIGNS.items()]
        self.state = self._filter("state", [("all states", ""), *states])
        self.text = widgets.Text(placeholder="words of the id, such as: clae epsilon=0.3")
        self.text.add_class("idaa-runs-filter-text")
        self.text.observe(self._safe(self._turn), "value")
        self.refresh_button = self._button("refresh", "Refresh", lambda: self.refresh(redraw=True))
        self.older = self._button("older", "older ›", lambda: self._turn(step=1))
        self.newer = self._button("newer", "‹ newer", lambda: self._turn(step=-1))
        self.count = _html("count")
        self.head = _html("head", cells(COLUMNS))
        self.table = widgets.VBox([self.head])
        self.table.add_class("idaa-runs-table")

        self.chosen = _html("chosen")
        self.open = self._button("open", "Open notebook", self._open)
        self.watch = self._button("watch", "Watch", lambda: self._attach(self.picked[0]))
        self.resume = self._button("resume", "Resume", self._resume)
        self.delete = self._button("delete", "Delete …", self._ask)
        self.question = widgets.HTML()
        self.yes = self._button("yes", "Yes, delete", self._delete)
        self.no = self._button("no", "No", self._unask)
        self.yes.button_style = "danger"
        self.confirm = _bar(self.question, self.yes, self.no)
        self.confirm.add_class("idaa-runs-confirm")
        self.links, self.live = _html("links"), widgets.VBox()
        self.curves, self.diff = _html("curves"), _html("diff")
        self.accuracy = _html("accuracy")
        self.ui = widgets.VBox(
            [
                widgets.HTML(f"<style>{STYLE}</style>"),
                _bar(self.stage, self.state, self.text, self.refresh_button),
                self.table,
                _bar(self.newer, self.count, self.older),
                _bar(self.chosen, self.open, self.watch, self.resume, self.delete),
                self.confirm,
                self.status,
                self.links,
                self.live,
                self.accuracy,
                self.diff,
                self.curves,
            ]
        )
        self.ui.add_class("idaa-runs")
        self._safe(self._choose)()
        self._safe(self.refresh)()

    def show(self) -> None:
        if RunsPage._shown is not None:
            RunsPage._shown.close()
        RunsPage._shown = self
        threading.Thread(target=self._keep_up, daemon=True).start()
        display(self.ui)

    def close(self) -> None:
        self._closed.set()
        self._detach()

    # --- the table ----------------------------------------------------------------------------

    def refresh(self, redraw: bool = False) -> None:
        """Look at all run directories anew; `redraw` also what is shown of the chosen ones."""
        with self._lock:
            found = runs.every()
            self._rows = {run: self._look(run) for run in found}
            self.picked = [run for run in self.picked if run in self._rows]
            self._fill()
            if redraw:
                self._choose()
            else:
                self._buttons()

    def _look(self, run: Run) -> Row:
        """The run's row; what cannot have changed is not read again."""
        known, now = self._rows.get(run), stamp(run)
        if known and known.state != "going" and self._stamps.get(run) == now:
            return known
        self._stamps[run] = now
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
        shown = fitting[self._page * PAGE : (self._page + 1) * PAGE]
        for run in shown:
            if run not in self._lines:
                self._lines[run] = self._line(run)
            _tell(self._lines[run][0], self._rows[run].html(run))
        children = tuple(self._lines[run][1] for run in shown)
        if self.table.children[1:] != children:
            self.table.children = (self.head, *children)
        told = f"page {self._page + 1} of {pages}; {_many(len(fitting), 'run')}"
        if not self._rows:
            told = (
                f"No runs in {html.escape(str(runs.outputs_root()))} yet. Start with "
                f"<b>01_pretrain_vae.ipynb</b>, or with <code>make demo</code> in a terminal."
            )
        elif not fitting:
            told = f"None of {_many(len(self._rows), 'run')} fits these filters."
        _tell(self.count, told)
        self.newer.disabled, self.older.disabled = self._page == 0, self._page == pages - 1

    def _line(self, run: Run) -> tuple[widgets.HTML, widgets.HBox]:
        pick = widgets.Checkbox(value=run in self.picked, indent=False, tooltip=run.id)
        pick.add_class("idaa-runs-pick")
        pick.observe(self._safe(lambda change: self._pick(run, change["new"])), "value")
        told = widgets.HTML()
        line = widgets.HBox([pick, told])
        line.add_class("idaa-runs-row")
        return told, line

    def _turn(self, _: Any = None, step: int | None = None) -> None:
        """Another page, or another filter and its first page."""
        with self._lock:
            self._page = 0 if step is None else self._page + step
            self._fill()

    def _keep_up(self) -> None:
        refresh = self._safe(self.refresh)
        while not self._closed.wait(2):
            refresh()

    # --- the chosen ones ----------------------------------------------------------------------

    def _pick(self, run: Run, wanted: bool) -> None:
        with self._lock:
            self.picked = [other for other in self.picked if other != run]
            self.picked += [run] * wanted
            self._choose()

    def _choose(self) -> None:
        """Show the chosen runs side by side: accuracies, configuration, curves."""
        self._unask()
        self.status.value = self.links.value = ""
        self._buttons()
        sound = [run for run in self.picked if self._rows[run].state != DAMAGED]
        stages = {s: [run for run in sound if run.stage == s] for s in runs.CONFIGS}
        self.accuracy.value = accuracies(stages["ssl"], stages["eval"])
        self.diff.value = "".join(map(differences, stages.values()))
        self.curves.value = "".join(map(curves, stages.values()))

    def _buttons(self) -> None:
        states = [self._rows[run].state for run in self.picked]
        trainings = all(run.stage not in ("eval", "theory") for run in self.picked)
        told = "Choose runs to compare them."
        if self.picked:
            size = sum(self._rows[run].size for run in self.picked)
            told = f"{_many(len(self.picked), 'run')} chosen, {mebibytes(size)}:"
        _tell(self.chosen, told)
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
        told = f"Delete {_many(len(self.picked), 'run')}, {size}?"
        if users:
            told += f" {_many(len(users), 'other run')} use{'s' * (len(users) == 1)} "
            told += "it." if len(self.picked) == 1 else "them."
        self.question.value = f"<b>{told}</b>"
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

    # --- widgets ------------------------------------------------------------------------------

    def _filter(self, name: str, options: list[tuple[str, str]]) -> widgets.Dropdown:
        made = widgets.Dropdown(options=options, layout=widgets.Layout(width="140px"))
        made.add_class(f"idaa-runs-filter-{name}")
        made.observe(self._safe(self._turn), "value")
        return made

    def _button(self, name: str, label: str, act: Callable[[], None]) -> widgets.Button:
        made = widgets.Button(description=label, layout=widgets.Layout(width="auto"))
        made.add_class(f"idaa-runs-{name}")
        made.on_click(self._safe(lambda _: act()))
        return made


# --- the chosen runs as HTML: nothing where there is nothing to compare ---------------------------


def accuracies(trainings: Sequence[Run], evaluations: Sequence[Run]) -> str:
    """Accuracies of evaluations, those of these trainings included."""
    users = [run for training in trainings for run in training.users()]
    judging = [run for run in dict.fromkeys([*evaluations, *users]) if run.stage == "eval"]
    frame, text = results.results([run for run in judging if run.finished]), ""
    frame["label"] += ", seed " + frame["seed"].astype(str)  # each run has a row of its own
    for group in results.groups(frame):
        lines = html.escape(group.protocols).replace("\n", "<br>")
        text += f"<h4>{html.escape(group.title)}</h4>{style.table(group.table)}<p>{lines}</p>"
    return text


def differences(chosen: Sequence[Run]) -> str:
    """Each field that differs between runs of one stage, and its value in each run."""
    fields = results.differing(chosen)
    if not fields:
        return ""
    texts = {field: [*map(str, values)] for field, values in fields.items()}
    frame = pd.DataFrame.from_dict(texts, "index", columns=list(results.labels(chosen)))
    frame = frame.rename_axis("field").reset_index()
    heading = f"<h4>What differs between the {chosen[0].stage} runs</h4>"
    return heading + style.table(frame, index=False)


def curves(chosen: Sequence[Run]) -> str:
    """Training curves of runs of one stage, overlaid."""
    keys = plots.CURVES.get(chosen[0].stage, ()) if chosen else ()
    figure = plots.curves(results.labels(chosen), keys)
    if not figure.axes:
        return ""
    plural = "s" * (len(chosen) > 1)
    return f"<h4>Curves of the {chosen[0].stage} run{plural}</h4>{style.svg(figure)}"


# --- widgets --------------------------------------------------------------------------------------


def _html(name: str, value: str = "") -> widgets.HTML:
    made = widgets.HTML(value)
    made.add_class(f"idaa-runs-{name}")
    return made


def _bar(*children: widgets.Widget) -> widgets.HBox:
    made = widgets.HBox(children)
    made.add_class("idaa-runs-bar")
    return made


def _tell(widget: widgets.HTML, text: str) -> None:
    """Sent to the browser only where it is news."""
    if widget.value != text:
        widget.value = text


def _many(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'s' * (n != 1)}"
