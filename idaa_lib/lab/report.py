"""What notebook 13 shows as HTML: all results, each with the commands that made it.

`make report` executes it into one page that needs nothing beside itself. Only what may be compared
stands in one table (`idaa_lib.results`). A run that cannot be read is named at the end, not lost.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

from idaa_lib import grids, results, runs
from idaa_lib.configs import SweepConfig
from idaa_lib.lab import plots, style, verdict
from idaa_lib.runs import NOTEBOOKS, Run
from idaa_lib.runs.choice import list_starter
from idaa_lib.runs.machine import hardware, versions

# What notebook 02 draws, and what it shows.
PICTURES = {
    "decomposition.png": "x, its reconstruction G(x), the residual R(x), and x′ as ε grows",
    "idaa_and_clae.png": "IDAA's x′ beside CLAE's, at the same size of change",
}


class Report:
    """The finished runs of `outputs/` now, as parts of a page."""

    def __init__(self) -> None:
        self.damage: list[str] = []
        stages = [stage for stage in runs.CONFIGS if stage != "detection"]  # it has its own part
        finished = [run for run in runs.list_runs(*stages) if run.finished]
        # Seeds in their order: 10 after 2.
        finished.sort(key=lambda run: (stages.index(run.stage), results.natural(run.id)))
        self.frame = results.results(finished, self.damage)
        damaged = tuple(line.partition(": ")[0] for line in self.damage)
        self.runs = {run.id: run for run in finished if str(run.path) not in damaged}

    def _each(self, parts: Iterable[Any], show: Callable[[Any], str], empty: str) -> HTML:
        """What `show` makes of each part, but for damaged ones; where there is none, `empty`."""
        text = ""
        for part in parts:
            try:
                text += show(part)
            except results.DAMAGE as error:
                members = part if isinstance(part, list) else [part]
                names = ", ".join(str(getattr(member, "path", member)) for member in members)
                self.damage.append(f"{names}: {error}")
        return HTML(text or f"<p>{empty}</p>")

    def origins(self) -> HTML:
        """On what and with what the runs were made, and this page."""
        about, stages = [run.environment for run in self.runs.values()], self.frame["stage"]
        counts = self.frame["run"].groupby(stages).nunique()
        lines = {f"{stage} runs": {str(n)} for stage, n in counts.items()}
        for name in ("commit", "hardware", "precision"):
            lines[f"{name} of the runs"] = {str(each[name]) for each in about if each.get(name)}
        lines["this page"] = {f"idaa_lib {versions()['idaa_lib']} on {hardware()}"}
        items = [
            f"<dt>{name}</dt><dd>{html.escape('; '.join(sorted(values)))}</dd>"
            for name, values in lines.items()
        ]
        return HTML(f"<dl>{''.join(items)}</dl>")

    def results(self) -> HTML:
        """The test figures of all stages, in tables of those that may be compared."""

        def show(group: results.Group) -> str:
            lines = [line for name in group.runs for line in _lineage(self.runs[name])]
            return f"<h3>{html.escape(group.title)}</h3>{group.html()}{_commands(lines)}"

        empty = "No evaluation yet: run notebooks/04_evaluate.ipynb, or make demo for all stages."
        return self._each(results.groups(self.frame), show, empty)

    def studies(self) -> HTML:
        """The sensitivity studies, drawn anew from their tables."""

        def show(table: Path) -> str:
            config = SweepConfig(**(runs.read_json(table.parent / "config.json") or {}))
            frame = pd.read_csv(table)
            if frame.empty:
                return "<p>Nothing of it is finished yet.</p>"
            # Fields that a grid of the user's own crosses, as notebook 05 draws them.
            labels = grids.name_labels(grids.read(config.grid).points()) if config.grid else []
            draw = plots.sensitivity if "axis" in frame else plots.heat_maps
            figure = draw(frame, [name for name in labels if name in frame])
            made_by = papermill("05_sensitivity", runs.parameters(config))
            return f"<h3>{html.escape(table.parent.name)}</h3>{_svg(figure)}{_commands([made_by])}"

        studies = sorted((runs.outputs_root() / "sweep").glob("*/sensitivity.csv"))
        return self._each(studies, show, "No study yet: run notebooks/05_sensitivity.ipynb.")

    def pictures(self) -> HTML:
        """What notebook 02 drew of each VAE."""

        def show(run: Run) -> str:
            text = ""
            for name, caption in PICTURES.items():
                if (path := run.figures / name).exists():
                    data = base64.b64encode(path.read_bytes()).decode()
                    text += f"<figure><img src='data:image/png;base64,{data}' alt='{caption}'>"
                    text += f"<figcaption>{caption}</figcaption></figure>"
            made_by = papermill("02_decompose", {"vae": run.reference})
            return text and _heading(run) + text + _commands([*_lineage(run), made_by])

        vaes = [run for run in self.runs.values() if run.stage == "vae"] + list_starter("vae")
        return self._each(vaes, show, "No pictures yet: run notebooks/02_decompose.ipynb.")

    def identity(self) -> HTML:
        """The claims of each study of identity, with their verdicts."""

        def show(run: Run) -> str:
            table = results.html_table(verdict.verdict_table(run.summary or {}), index=False)
            return _heading(run) + table + _commands(_lineage(run))

        studies = [run for run in self.runs.values() if run.stage == "theory"]
        return self._each(studies, show, "No study yet: run notebooks/08_identity_theory.ipynb.")

    def trainings(self) -> HTML:
        """The curves and the figures of each training, those of several seeds together."""

        def show(members: list[Run]) -> str:
            text, named = "", results.labels(members)
            for run in members:
                values, seconds = run.config.list_stated(), (run.summary or {}).get("seconds", 0)
                figures = results.headline(results.key_figures(run))
                line = f"{values['epochs']} epochs, seed {values['seed']}, {figures}"
                text += f"<p class='quiet'>{html.escape(line)}, {seconds:,.0f} s</p>"
            if len(members) > 1:
                own = self.frame["run"].isin([run.id for run in members])
            if len(members) > 1 and own.any():  # without labels there are no figures
                table = results.tabulate(self.frame[own], ["label", "split"]).reset_index()
                text += results.html_table(table, index=False)
            figure = plots.curves(named, plots.CURVES[members[0].stage][:3])
            if figure.axes:
                text = _svg(figure) + text
            lines = itertools.chain.from_iterable(map(_lineage, members))
            return _heading(*members) + text + _commands(lines)

        trainings = [run for run in self.runs.values() if run.stage in plots.CURVES]
        groups: dict[Any, list[Run]] = {}
        for run, label in zip(trainings, results.tell_apart(trainings, {"seed"}), strict=True):
            images = run.environment.get("dataset", {}).get("fingerprint")
            groups.setdefault((run.stage, label, images), []).append(run)
        empty = "No training yet: run notebooks/01_pretrain_vae.ipynb."
        return self._each(groups.values(), show, empty)

    def detection(self, compare: Callable[[Run], tuple[list[dict[str, str]], str]]) -> HTML:
        """Box and mask AP of detectors, a table of those that `compare` (examples/detection) puts
        beside each other, and its sentence."""
        tables: list[list[dict[str, str]]] = []

        def show(run: Run) -> str:
            rows, note = compare(run)
            if rows in tables:
                return ""
            tables.append(rows)
            summary, made_by = run.summary or {}, runs.parameters(run.config)
            about = summary.get("protocol", "")
            text = f"AP in %, n seeds. {summary['n']:,} images. {about}. {note}"
            table = results.html_table(pd.DataFrame(rows).fillna("–"), index=False)
            commands = _commands([papermill("10_detection", made_by)])
            return f"<h3>{run.id}</h3>{table}<p class='quiet'>{html.escape(text)}</p>{commands}"

        detectors = [run for run in runs.list_runs("detection") if run.finished]
        return self._each(detectors, show, "No detector yet: run notebooks/10_detection.ipynb.")

    def left_out(self) -> HTML:
        """What could not be read, and why. The last part: the others add to it."""
        items = "".join(f"<li>{html.escape(line)}</li>" for line in self.damage)
        return HTML(f"<ul>{items}</ul>" if items else "<p>Nothing: all of it could be read.</p>")


def _lineage(run: Run) -> Iterator[str]:
    """The commands that lead to a run, in order: those of the runs that it starts from first."""
    for field, stage in (("vae", "vae"), ("run", "ssl"), ("continue_from", run.stage)):
        path = runs.outputs_root() / stage / str(getattr(run.config, field, None))
        if (path / "config.json").exists():
            yield from _lineage(Run(path))
    if run.stage in NOTEBOOKS:
        yield runs.command(run)


def papermill(notebook: str, parameters: Mapping[str, Any]) -> str:
    """The shell command that runs `notebooks/<notebook>.ipynb` with these parameters."""
    words = ["papermill", f"notebooks/{notebook}.ipynb", f"outputs/{notebook}.ipynb"]
    for name, value in parameters.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += ["-p", name, text.strip("()").rstrip(",") if isinstance(value, tuple) else text]
    return shlex.join(words)


def _heading(*members: Run) -> str:
    ids = "<br>".join(run.id for run in members)
    return f"<h3>{html.escape(results.name_of(members[0]))}</h3><p class='quiet'>{ids}</p>"


def _commands(lines: Iterable[str]) -> str:
    text = html.escape("\n".join(dict.fromkeys(lines)))
    return f"<details><summary>the commands that made this</summary><pre>{text}</pre></details>"


def _svg(figure: Figure) -> str:
    """Inline SVG without its groups' names, which many figures on one page would share."""
    text = re.sub(r'<g id="(?!legend)[^"]*"', "<g", style.svg(figure))
    return f"<figure>{text}</figure>"
