"""The training panel: it watches a run that trains in a process of its own, and steers it.

All that is shown is read from the run directory and all that is asked goes through its
`control.json`, so any notebook may attach to any run at any time.
"""

from __future__ import annotations

import html
import math
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML, display

from idaa_lib.configs import TrainingConfig, UserError
from idaa_lib.lab import plots, style
from idaa_lib.lab.grid import Grid
from idaa_lib.lab.kernel import SHEET, apart, guard, is_attended, newcomer
from idaa_lib.lab.process import UNDER_WAY, Look, launch, look, stamp, start
from idaa_lib.registry import SOURCES
from idaa_lib.results import full_name
from idaa_lib.runs import Run, RunError, Stopped
from idaa_lib.runs.progress import clock
from idaa_lib.train import samples, stages

# Seconds between two looks at a run that goes and at one that stands, and between two drawings.
GOING, STANDING, DRAWING = 1.0, 3.0, 2.0
BELOW = "The cells below did not run."
NOTICE = (
    "This notebook was opened anew while its cell waited, so the cells below did not run: once the "
    "training is over, select this cell and choose Run ▸ Run Selected Cell and All Below."
)


def train(config: TrainingConfig) -> Run:
    """The finished run of `config`: trained, resumed, attached to, or found.

    In front of a person a process of its own trains, and this waits beside its panel, and so do
    several `processes`; else the training is here, with a log. However it ends, its record
    (`leave_record`) stays in the cell.

    Raises:
        ConfigError, RunError: one sentence; also why the run failed.
        Stopped: the run was stopped and saved; or this no longer waits for it, while it goes on:
            the kernel was interrupted, or the notebook was opened anew.
    """
    person, own = is_attended(), config.foreign().items()
    names = " and ".join(n for n, kind in own if not Path(SOURCES[kind][0]).is_file())
    if person and names:
        print(f"{names}: typed in this kernel, so training runs here and ends with it.")
    if names or not (person or config.processes > 1):
        run = stages.train(config)
    elif (run := start(config)).finished:
        print(f"{run.id} is finished: showing its result.")
    else:
        _attach(run)
    leave_record(run)
    return run


def _attach(run: Run) -> None:
    """Show the panel of `run` until it is finished. Raises as `train`."""
    if run.path not in _panels:
        _panels[run.path] = Panel(run)
    panel = _panels[run.path]
    panel.notice = ""
    print(
        f"{run.id}: the panel below is for a page with its kernel. Elsewhere run this cell again, "
        f"which attaches to the training or shows its result."
    )
    try:
        display(HTML(SHEET))
        display(panel.ui)
        panel.follow()
        end = _wait(run)
        if end is None:
            panel.notice = NOTICE
    except KeyboardInterrupt:
        end = None
    panel.refresh()
    if end is not None:
        apart(panel.hide_curves)  # the record has them
        if end.word == "finished":
            return
    leave_record(run)
    if end is None:
        raise Stopped(
            f"No longer waiting for {run.id}, which goes on in a process of its own: run this cell "
            f"again to attach to it; the panel's buttons pause and stop it. {BELOW}"
        )
    if end.reason:
        raise RunError(f"{run.id} {end.word}. {end.reason}")
    step, steps = end.state.get("step", 0), end.state.get("steps", "?")
    raise Stopped(
        f"{run.id} was stopped after step {step} of {steps} and saved: run this cell again to go "
        f"on, or press start in the panel. {BELOW}"
    )


def leave_record(run: Run) -> None:
    """Display the figures and curves of `run` as a table and a picture, which need no kernel; the
    picture is kept as `figures/curves.png` too. Nothing where nothing was logged."""
    lines = run.metrics()
    if not lines:
        return
    summary, name = run.summary or {}, full_name(run)
    values = {key: value for line in lines for key, value in line.items()} | summary
    cells = {"state": run.state["state"], "step": f"{lines[-1]['step']:,}"}
    fields = dict(run.config)  # what it was given is no figure of it
    for key in dict.fromkeys([*plots.CURVES[run.stage], *summary]):
        if key in fields:
            continue
        ends = [key.replace("top1", end) for end in ("low", "high")]
        if key in values and not re.search("_(low|high)(_|$)", key):
            text = write_value(values[key])
            if "top1" in key and all(end in values for end in ends):
                text += f" [{', '.join(write_value(values[end]) for end in ends)}]"
            cells[plots.LABELS.get(key, key)] = text
    with pd.option_context("display.max_colwidth", None):
        display(pd.DataFrame({name: cells}))
    figure = plots.curves({name: run}, plots.CURVES[run.stage])
    display(plots.save(figure, run.figure("curves.png")))


def write_value(value: Any) -> str:
    """A figure as a person reads it while it changes: four digits of what is measured."""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


# The one that `train` shows of each run: shown again, so that no older output of a cell goes stale.
_panels: dict[Path, Panel] = {}


def _wait(run: Run) -> Look | None:
    """Until the run stands still, or another page wants this kernel: None then.

    Standing still must be seen for a while: where two kernels start the same run, one process gives
    way before the other has said that it is going.
    """
    since = time.monotonic()
    with newcomer() as event:
        while not event.wait(0.3):
            now = look(run)
            if now.word in UNDER_WAY:
                since = time.monotonic()
            elif now.word == "finished" or time.monotonic() - since > 2:
                return now
    return None


# --- the panel --------------------------------------------------------------------------------


class Panel:
    """Buttons, figures, curves and pictures of one run; `ui` is the widget."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl
        self.notice = ""
        self._lock = threading.RLock()
        self._news = threading.Event()  # a button was pressed, or the panel closed
        self._closed = False
        self._thread: threading.Thread | None = None
        self._word = self._complaint = self._damage = ""
        self._steps = math.inf
        self._log_stamp, self._read_after, self._picture_stamp = (0, 0), 0.0, (0, 0)
        apart(self._build)
        self.refresh()

    def _build(self) -> None:
        self.buttons = {
            name: widgets.Button(description=name, tooltip=tip, icon=icon, disabled=True)
            for name, icon, tip in (
                ("start", "play", "Train in a process of its own, from the last checkpoint if any"),
                ("pause", "pause", "Rest after the present step; memory is kept"),
                ("resume", "step-forward", "End the pause"),
                ("stop", "stop", "Save after the present step and end the process"),
            )
        }
        self.progress = widgets.FloatProgress(max=1, layout={"width": "auto"})
        self.figures, self.curves, self.status = (
            widgets.HTML().add_class(f"idaa-live-{name}")
            for name in ("figures", "curves", "status")
        )
        self.samples = Grid((), "idaa-live-samples")
        self.samples.layout.display = "none"  # until there are some
        for name, button in self.buttons.items():
            button.add_class(f"idaa-live-{name}")
            button.on_click(lambda _, name=name: self._press(name))
        parts = (
            widgets.HBox(list(self.buttons.values())), self.progress, self.status, self.figures,
            self.samples, self.curves,
        )  # fmt: skip
        self.ui = widgets.VBox(parts).add_class("idaa-live")

    def follow(self) -> None:
        """Keep the panel true, in a thread, until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def hide_curves(self) -> None:
        """Until the run goes on."""
        self.curves.layout.display = "none"

    def close(self) -> None:
        """Let go of the run, which goes on; the panel stays as it is."""
        self._closed = True
        self._news.set()

    def _follow(self) -> None:
        while not self._closed:
            self.refresh()
            if self._word == "finished":  # for good
                break
            self._news.wait(GOING if self._word in UNDER_WAY else STANDING)
            self._news.clear()
        self._thread = None

    def _press(self, name: str) -> None:
        try:
            if name == "start":
                launch(self.run, self.run.config)
            else:
                self.run.ask({"resume": "go on"}.get(name, name))
        except (UserError, OSError) as error:
            self._complaint = str(error)
        # The thread shows it: what it changes, the next press will be answered for (`apart`).
        if self._thread is None:
            self.refresh()
        self._news.set()

    def refresh(self) -> None:
        """Read the run directory and show what is new; a widget sends only what has changed."""
        with self._lock, guard(self.status):
            apart(self._refresh)

    def _refresh(self) -> None:
        now = look(self.run)
        going, paused = now.word == "going", now.word == "paused"
        self._read(over=not (going or paused))
        request = self.run.request
        if going:
            self.curves.layout.display = None
        enabled = {
            "start": now.word in ("new", "interrupted", "failed"),
            "pause": going and request is None,
            "resume": paused and request == "pause",
            "stop": (going or paused) and request != "stop",
        }
        for name, button in self.buttons.items():
            button.disabled = not enabled[name]
        if now.word != self._word:
            self._word, self._complaint = now.word, ""
        reason = now.reason or self._complaint or self._damage
        reason = " ".join(filter(None, (reason, self.notice)))
        self.status.value = f"<b>{html.escape(reason)}</b>" if reason else ""
        self._steps = now.state.get("steps", self._steps)  # a run that starts again has none yet
        self.progress.value = self._latest().get("step", 0) / self._steps
        word = {"pause": "pausing", "stop": "stopping"}.get(request or "") if going else None
        self.figures.value = self._table(word or now.word, now.state)
        self._show_samples()

    def _latest(self) -> dict[str, Any]:
        """The last reading of each key."""
        return {key: value for line in self.lines for key, value in line.items()}

    def _read(self, over: bool) -> None:
        """The log, if it has changed, and its curves, every point of them: at most every 2 s, and
        for a fifth of the time."""
        began, log_stamp = time.monotonic(), stamp(self.run.path / "metrics.jsonl")
        if log_stamp == self._log_stamp or not (over or began >= self._read_after):
            return
        try:
            self.lines, self._damage = self.run.metrics(), ""
            figure = plots.curves({"": self.run}, plots.CURVES[self.run.stage])
            self.curves.value = style.svg(figure) if figure.axes else ""
        except RunError as error:  # the buttons work all the same
            self._damage = str(error)
        self._log_stamp = log_stamp
        self._read_after = time.monotonic() + max(DRAWING, 4 * (time.monotonic() - began))

    def _table(self, word: str, state: dict[str, Any]) -> str:
        """The figures as HTML."""
        latest, config = self._latest(), self.run.config
        steps = f" of {self._steps:,}" if self._steps < math.inf else ""
        cells = {"state": word, "step": f"{latest.get('step', 0):,}{steps}"}
        cells["epoch"] = f"{latest.get('epoch', 0) + 1} of {config.epochs}"
        for key in plots.CURVES[self.run.stage]:
            if key in latest:
                cells[plots.LABELS[key]] = write_value(latest[key])
        if word in ("going", "pausing", "stopping", "paused"):
            cells["time left"] = clock(state.get("seconds_left"))
        names = {"resident": "memory", "cuda": "GPU memory, at most"}
        for kind, mib in state.get("memory", {}).items():
            cells[names[kind]] = f"{mib:,.0f} MiB"
        used, free = self.run.size, shutil.disk_usage(self.run.path).free
        cells["disk"] = f"{used / 2**20:.1f} MiB used, {free / 2**30:.1f} GiB free"
        cells["log"] = f"{len(self.lines):,} readings"
        tiles = "".join(
            f"<div><span>{name}</span><br><b>{html.escape(value)}</b></div>"
            for name, value in cells.items()
        )
        return f'{self.run.id}<div class="idaa-live-tiles">{tiles}</div>'

    def _show_samples(self) -> None:
        """What is trained on, if it is another than what is shown."""
        picture_stamp = stamp(self.run.path / "samples" / "latest.png")
        if picture_stamp == self._picture_stamp:
            return
        self._picture_stamp = picture_stamp
        rows = samples.read(self.run)
        columns, _, _, size = next(iter(rows.values())).shape
        self.samples.layout.display = None
        self.samples.resize(columns, size, rows=rows)
        self.samples.show(rows.values())
