"""All runs at a glance: a table to sort and search, the chosen ones side by side, and what to do to
them.

States are read from the run directories, by a thread while the page is shown. The table is itables'
(DataTables), which sorts, searches, hides columns and writes CSV in the browser. It is sent again
when a line is new or says something else; the browser remembers how it was sorted and searched.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from itables.widget import ITable

from idaa_lib import results, runs
from idaa_lib.configs.lookups import remember
from idaa_lib.lab import plots, process, style
from idaa_lib.lab.kernel import SHEET, VisitorsText, guard, hide_paths
from idaa_lib.lab.live import Panel
from idaa_lib.lab.notebook import link, notebook_of
from idaa_lib.lab.rows import COLUMNS, DAMAGED, FIELDS, SIZE, TESTS, Row, join, row_of, tabulate
from idaa_lib.runs import Run, RunError

RATED = [COLUMNS.index(name) for name in TESTS.values()]
# Columns that are shown on request; the search is in what each row shows without it, and in the
# fields by their names.
OPTIONAL = [i for i, name in enumerate(COLUMNS) if "official" in name or name in (SIZE, "id")]
# Options of DataTables and of itables.
TABLE: dict[str, Any] = {
    "columnDefs": [
        {"targets": [*RATED, COLUMNS.index("seed")], "type": "num"},
        {"targets": RATED, "orderSequence": ["desc", "asc"]},
        {"targets": OPTIONAL, "visible": False, "searchable": False},
        {"targets": COLUMNS.index(FIELDS), "visible": False},
        *({"targets": i, "className": f"idaa-{name.split()[0]}"} for i, name in enumerate(COLUMNS)),
    ],
    "order": [[COLUMNS.index("started"), "desc"]],
    "layout": {
        "topStart": "search", "topEnd": "buttons", "bottomStart": "info", "bottomEnd": "paging",
    },
    "buttons": [
        {"extend": "colvis", "text": "Columns", "align": "button-right", "background": False},
        {"extend": "csv", "text": "CSV", "title": None, "filename": "runs", "bom": True},
    ],
    "language": {"searchPlaceholder": "such as: clae epsilon=0.3"},
    "select": {"style": "multi", "keys": True},
    "pageLength": 20,
    "stateSave": True,
    "stateDuration": -1,  # in this tab alone
    "maxBytes": 0,
    "showIndex": False,
    "text_in_header_can_be_selected": False,  # a click sorts
    "classes": "compact hover",
    "style": "width:100%",
}  # fmt: skip


class RunsPage:
    """The page as a widget, `ui`; `show()` displays it and keeps it up to date until `close()`.

    Args:
        read_only: for visitors: they change nothing and see no path of this machine.
    """

    _present: RunsPage | None = None  # the one that a cell which runs again replaces

    def __init__(self, read_only: bool = False) -> None:
        self.picked: list[Run] = []
        self._rows: dict[Run, Row] = {}
        self._members: list[list[Run]] = []  # the runs of each line
        self._panel: Panel | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()  # the refreshing thread and the callbacks share all this
        self._read_only = read_only

        kind = VisitorsText if read_only else widgets.HTML
        self.status, self.head, self.chosen, self.links, self.accuracy, self.diff, self.curves = (
            kind().add_class(f"idaa-runs-{name}")
            for name in ("status", "head", "chosen", "links", "accuracy", "diff", "curves")
        )
        self.question, self.live = widgets.HTML(), widgets.VBox()
        self._safe = guard(self.status)
        self.means = widgets.Checkbox(
            description="means over seeds", indent=False, layout=widgets.Layout(width="auto")
        )
        self.means.add_class("idaa-runs-means").observe(self._safe(lambda _: self._fill()), "value")
        again = self._button("refresh", "Refresh", lambda: self.refresh(redraw=True))
        self.table = ITable(**TABLE).add_class("idaa-runs-table")
        self._picking = self._safe(lambda _: self._pick())
        self.table.observe(self._picking, "selected_rows")
        self.open = self._button("open", "Open notebook", self._open)
        self.watch = self._button("watch", "Watch", lambda: self._attach(self.picked[0]))
        self.resume = self._button("resume", "Resume", self._resume)
        self.delete = self._button("delete", "Delete …", self._ask)
        self.yes = self._button("yes", "Yes, delete", self._delete)
        self.no = self._button("no", "No", self._unask)
        self.yes.button_style = "danger"
        self.confirm = _bar(self.question, self.yes, self.no).add_class("idaa-runs-confirm")
        self.tags = widgets.Text(placeholder="tags, with commas").add_class("idaa-runs-tags")
        self.tag = self._button("tag", "Tag", self._tag)
        acts = self.open, self.watch, self.resume, self.delete, self.tags, self.tag
        bars = _bar(self.chosen, *acts), self.confirm
        if read_only:
            for widget in (*bars, *acts, self.yes, self.no):
                widget.close()  # so that no message of a browser reaches it
        parts = (
            widgets.HTML(SHEET), _bar(self.means, again, self.head), self.table,
            *((self.chosen,) if read_only else bars),
            self.status, self.links, self.live, self.accuracy, self.diff, self.curves,
        )  # fmt: skip
        self.ui = widgets.VBox(parts).add_class("idaa-runs")
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
        if self._panel is not None:
            self._panel.close()

    def _follow(self) -> None:
        while not self._closed.wait(2):
            self._safe(self.refresh)()

    # --- the table ----------------------------------------------------------------------------

    def refresh(self, redraw: bool = False) -> None:
        """Look at all run directories anew; `redraw` also what is shown of the chosen ones."""
        with self._lock, remember():  # for this look alone: each configuration is read once
            present = {run: row_of(run, self._rows.get(run)) for run in runs.list_runs()}
            # A run keeps its line, so that a click that is on its way means what was clicked.
            old = {run: present.pop(run) for run in self._rows if run in present}
            before, self._rows = self._rows, old | present
            if self._rows != before or self.table.df is None:
                self._fill()
            pairs = [(before[run], self._rows[run]) for run in self.picked if run in before]
            if redraw or any(old.texts != new.texts for old, new in pairs):
                self._choose()

    def _fill(self) -> None:
        """The table from what `refresh` read, with the same runs chosen."""
        with self._lock:
            frame, self._members = tabulate(self._rows, self.means.value)
            if self._read_only:
                texts = frame[["data", "differs from preset", "result", FIELDS]].map(hide_paths)
                frame = frame.assign(**texts)
            # A size that grows is no reason to send all lines again.
            old = self.table.df
            if old is None or not frame.drop(columns=SIZE).equals(old.drop(columns=SIZE)):
                picked = {run for run in self.picked if run in self._rows}
                lines = [i for i, group in enumerate(self._members) if picked & {*group}]
                self.table.unobserve(self._picking, "selected_rows")
                # First none: a table that is built anew must find no chosen line to restore.
                self.table.selected_rows = []
                self.table.update(frame, selected_rows=lines, **TABLE)
                self.table.observe(self._picking, "selected_rows")
                self._pick()
            self.head.value = self._write_head()
            self._buttons()

    def _write_head(self) -> str:
        """What is under way, or where to start."""
        if not self._rows:
            where = "" if self._read_only else f" in {html.escape(str(runs.outputs_root()))}"
            return (
                f"No runs{where} yet. Start with <b>01_pretrain_vae.ipynb</b>, or with "
                f"<code>make demo</code> in a terminal."
            )
        lines = [
            f"{row.texts['method']} {row.texts['run']}: {row.progress}"
            for row in self._rows.values()
            if row.state == "going"
        ]
        return html.escape(f"▶ {'; '.join(lines)}") if lines else ""

    # --- the chosen ones ----------------------------------------------------------------------

    def _pick(self) -> None:
        """Take over which lines are chosen in the table."""
        with self._lock:
            picked = [run for i in self.table.selected_rows for run in self._members[i]]
            if picked != self.picked:
                self.picked = picked
                self._choose()

    def _choose(self) -> None:
        """Show the chosen runs side by side: accuracies, configuration, curves."""
        self._unask()
        self.status.value = self.links.value = ""
        self._buttons()
        self.tags.value = join(self._rows[run].texts.get("tags", "") for run in self.picked)
        sound = [run for run in self.picked if self._rows[run].state != DAMAGED]
        stages = {s: [run for run in sound if run.stage == s] for s in runs.CONFIGS}
        groups = [group for group in stages.values() if group]
        ids = {run.id for run in sound}
        judging = [run for run, row in self._rows.items() if ids & {run.id, row.training}]
        self.accuracy.value = accuracies([run for run in judging if run.stage == "eval"])
        self.diff.value = "".join(map(differences, groups))
        self.curves.value = "".join(map(curves, groups))

    def _buttons(self) -> None:
        states = [self._rows[run].state for run in self.picked]
        trainings = all(run.stage in plots.CURVES for run in self.picked)
        size = mebibytes(sum(self._rows[run].size for run in self.picked))
        text = f"{_many(len(self.picked), 'run')} chosen, {size}:"
        self.chosen.value = text if self.picked else "Click on runs to compare them."
        self.open.disabled = not states or DAMAGED in states
        self.watch.disabled = states != ["going"] or not trainings
        resumable = states in (["interrupted"], ["failed"], ["new"])
        self.resume.disabled = not (resumable and trainings)  # an evaluation starts over
        self.delete.disabled = not states or "going" in states
        self.tags.disabled = self.tag.disabled = not states

    def _open(self) -> None:
        self.links.value = "<br>".join(link(run, notebook_of(run)) for run in self.picked)

    def _resume(self) -> None:
        (run,) = self.picked
        self._attach(process.start(run.config))

    def _tag(self) -> None:
        tags = [tag for text in self.tags.value.split(",") if (tag := text.strip())]
        for run in self.picked:
            run.tag(tags)
        self.refresh()

    def _attach(self, run: Run) -> None:
        """The live panel of a run, in the place of the one before."""
        if self._panel is not None:
            self._panel.close()
        self._panel = Panel(run)
        self._panel.follow()
        self.live.children = (self._panel.ui,)

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
        freed, refusals = 0, []
        for run in self.picked:
            try:
                freed += run.delete()
            except RunError as error:
                refusals.append(html.escape(str(error)))
        self.refresh(redraw=True)
        self.status.value = "<br>".join([f"{mebibytes(freed)} freed.", *refusals])

    def _button(self, name: str, label: str, act: Callable[[], None]) -> widgets.Button:
        button = widgets.Button(description=label, layout=widgets.Layout(width="auto"))
        button.on_click(self._safe(lambda _: act()))
        return button.add_class(f"idaa-runs-{name}")


def _bar(*children: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(children).add_class("idaa-runs-bar")


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def _many(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'s' * (n != 1)}"


# --- the chosen runs as HTML: nothing where there is nothing to compare ---------------------------


def accuracies(evaluations: Sequence[Run]) -> str:
    """Accuracies of finished evaluations, a row each."""
    frame = results.results([run for run in evaluations if run.finished])
    # Of a training that is gone the seed is unknown.
    frame["label"] += frame["seed"].map(lambda seed: f", seed {seed}" if pd.notna(seed) else "")
    return "".join(f"<h4>{html.escape(g.title)}</h4>{g.html()}" for g in results.groups(frame))


def differences(selection: Sequence[Run]) -> str:
    """Each field that differs between runs of one stage, and its value in each run."""
    if not (fields := results.find_differences(selection)):
        return ""
    frame = pd.DataFrame.from_dict(fields, "index", dtype=object, columns=results.labels(selection))
    frame = frame.map(results.value_text).reset_index(names="field")
    heading = f"<h4>What differs between the {selection[0].stage} runs</h4>"
    return heading + results.html_table(frame, index=False)


def curves(selection: Sequence[Run]) -> str:
    """Training curves of runs of one stage, overlaid; a sentence on each whose log is damaged."""
    stage, sound, damage = selection[0].stage, {}, ""
    for label, run in results.labels(selection).items():
        try:
            run.metrics()
            sound[label] = run
        except results.DAMAGE as error:
            damage += f"<p>{html.escape(f'{run.id} has no curves: {error}')}</p>"
    figure = plots.curves(sound, plots.CURVES.get(stage, ()))
    heading = f"<h4>Curves of {_many(len(sound), 'run')}: {stage}</h4>"
    return damage + (heading + style.svg(figure) if figure.axes else "")
