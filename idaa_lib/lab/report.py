"""What notebook 11 shows as HTML: all results, each with the commands that made it.

`make report` executes it into one page that needs nothing beside itself. Only what may be compared
stands in one table (`idaa_lib.results`). A run that cannot be read is named at the end, not lost.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

from idaa_lib import results, runs
from idaa_lib.configs import SweepConfig
from idaa_lib.lab import plots, style
from idaa_lib.runs import NOTEBOOKS, Run
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
        self.frame = results.results([r for r in runs.every() if r.finished], self.damage)
        sound = set(self.frame["run"])
        self.runs = [run for run in runs.every() if run.id in sound]

    def _each(self, parts: Iterable[Any], show: Callable[[Any], str], empty: str) -> HTML:
        """What `show` makes of each part, but for damaged ones; where there is none, `empty`."""
        shown = []
        for part in parts:
            try:
                shown.append(show(part))
            except results.DAMAGE as error:
                self.damage.append(f"{getattr(part, 'path', part)}: {error}")
        text = "".join(shown)
        return HTML(text or f"<p>{empty}</p>")

    def origins(self) -> HTML:
        """On what and with what the runs were made, and this page."""
        about = [run.environment for run in self.runs]
        lines = {
            f"{stage} runs": [str(n)]
            for stage in runs.CONFIGS
            if (n := sum(run.stage == stage for run in self.runs))
        }
        for name in ("commit", "hardware", "precision"):
            lines[f"{name} of the runs"] = sorted({str(e[name]) for e in about if e.get(name)})
        lines["torch of the runs"] = sorted(
            {str(e["versions"]["torch"]) for e in about if "versions" in e}
        )
        lines["this page"] = [f"idaa_lib {versions()['idaa_lib']} on {hardware()}"]
        items = (
            f"<dt>{name}</dt><dd>{html.escape('; '.join(values))}</dd>"
            for name, values in lines.items()
            if values
        )
        return HTML(f"<dl>{''.join(items)}</dl>")

    def results(self) -> HTML:
        """The evaluations, in tables of those that may be compared."""
        by_id = {run.id: run for run in self.runs}

        def show(group: results.Group) -> str:
            lines = [line for name in group.runs for line in _lineage(by_id[name])]
            protocols = html.escape(group.protocols).replace("\n", "<br>")
            return (
                f"<h3>{html.escape(group.title)}</h3>{style.table(group.table)}"
                f"<p class='quiet'>{protocols}</p>{_commands(lines)}"
            )

        empty = "No evaluation yet: run notebooks/04_evaluate.ipynb, or make demo for all stages."
        return self._each(results.groups(self.frame), show, empty)

    def studies(self) -> HTML:
        """The sensitivity studies, drawn anew from their tables."""

        def show(table: Path) -> str:
            config = SweepConfig(**(runs.read_json(table.parent / "config.json") or {}))
            text = f"{config.adversary}, seeds {', '.join(map(str, config.seeds))}, accuracy on "
            text += "validation: hyper-parameters are not judged on test."
            made_by = papermill("05_sensitivity", runs.parameters(config))
            figure = _svg(plots.sensitivity(pd.read_csv(table)))
            return (
                f"<h3>{html.escape(table.parent.name)}</h3><p class='quiet'>{text}</p>{figure}"
                f"{_commands([made_by])}"
            )

        studies = sorted((runs.outputs_root() / "sweep").glob("*/sensitivity.csv"))
        return self._each(studies, show, "No study yet: run notebooks/05_sensitivity.ipynb.")

    def pictures(self) -> HTML:
        """What notebook 02 drew of each VAE."""

        def show(run: Run) -> str:
            text = ""
            for name, caption in PICTURES.items():
                if (path := run.path / "figures" / name).exists():
                    data = base64.b64encode(path.read_bytes()).decode()
                    text += f"<figure><img src='data:image/png;base64,{data}' alt='{caption}'>"
                    text += f"<figcaption>{caption}</figcaption></figure>"
            made_by = papermill("02_decompose", {"vae": run.reference})
            return text and _heading(run) + text + _commands([*_lineage(run), made_by])

        vaes = [run for run in self.runs if run.stage == "vae"]
        return self._each(vaes, show, "No pictures yet: run notebooks/02_decompose.ipynb.")

    def trainings(self) -> HTML:
        """The curves and the figures of each training."""

        def show(run: Run) -> str:
            config, summary = run.config, run.summary or {}
            texts = [f"{config.epochs} epochs", f"seed {config.seed}", results.headline(run)]
            texts += [f"{summary['seconds']:,.0f} s"] if "seconds" in summary else []
            figure = plots.curves({run.id: run}, plots.CURVES[run.stage][:3])
            drawn = _svg(figure) if figure.axes else ""
            text = html.escape(", ".join(texts))
            return _heading(run) + drawn + f"<p class='quiet'>{text}</p>" + _commands(_lineage(run))

        trainings = [run for run in self.runs if run.stage in plots.CURVES]
        return self._each(trainings, show, "No training yet: run notebooks/01_pretrain_vae.ipynb.")

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


def _heading(run: Run) -> str:
    name, path = html.escape(results.name_of(run)), html.escape(run.id)
    return f"<h3>{name}</h3><p class='quiet'>{path}</p>"


def _commands(lines: Iterable[str]) -> str:
    text = html.escape("\n".join(dict.fromkeys(lines)))
    return f"<details><summary>the commands that made this</summary><pre>{text}</pre></details>"


def _svg(figure: Figure) -> str:
    """Inline SVG without its groups' names, which many figures on one page would share."""
    text = re.sub(r'<g id="(?!legend)[^"]*"', "<g", style.svg(figure))
    # No request, but a page that names no other place is easier to trust.
    return f"<figure>{re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)}</figure>"
