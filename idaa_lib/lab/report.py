"""`make report`: `outputs/report.html`, all results on one page that needs nothing beside itself.

Each table, curve and picture comes with the command that made it. Accuracies stand together only
where images, limits and protocols agree. A run that cannot be read is named at the end, not lost.
"""

from __future__ import annotations

import base64
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from idaa_lib import runs
from idaa_lib.configs import SweepConfig, UserError
from idaa_lib.lab import compare, plots, style
from idaa_lib.runs import Run, RunError, commands
from idaa_lib.runs.machine import hardware, versions

# What notebook 02 draws, and what it shows.
PICTURES = {
    "decomposition.png": "x, its reconstruction G(x), the residual R(x), and x′ as ε grows",
    "idaa_and_clae.png": "IDAA's x′ beside CLAE's, at the same size of change",
}


def main() -> int:
    try:
        path = write()
    except (UserError, OSError) as error:
        print(f"No report was written: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def write() -> Path:
    """Write the page; where it lies."""
    path = runs.outputs_root() / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(page(), encoding="utf-8")
    draft.replace(path)
    return path


def page() -> str:
    """The report of what lies in `outputs/` now, as HTML."""
    left_out: list[str] = []

    def each(made: Sequence[Any], show: Callable[[Any], Any]) -> list[Any]:
        """What `show` makes of each, but for those whose files are damaged."""
        shown = []
        for thing in made:
            try:
                shown.append(show(thing))
            except (UserError, ValueError, KeyError, TypeError, OSError) as error:
                left_out.append(f"{thing}: {error}" if isinstance(thing, Path) else str(error))
        return [entry for entry in shown if entry]

    finished = each([run for run in runs.every() if run.finished], _sound)
    stages = {stage: [run for run in finished if run.stage == stage] for stage in runs.CONFIGS}
    studies = sorted((runs.outputs_root() / "sweep").glob("*/sensitivity.csv"))
    template = Environment(
        loader=PackageLoader("idaa_lib.lab", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")  # fmt: skip
    return template.render(
        outputs=runs.outputs_root(),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        version=versions()["idaa_lib"],
        hardware=hardware(),
        counts={stage: len(members) for stage, members in stages.items()},
        origins=_origins(finished),
        results=[_result(group) for group in compare.accuracies(stages["eval"])],
        studies=each(studies, _study),
        pictures=each(stages["vae"], _pictures),
        trainings=each(stages["vae"] + stages["ssl"] + stages["semi"], _training),
        left_out=left_out,
    )


def _sound(run: Run) -> Run:
    """The run, if its files can be read.

    Raises:
        RunError, ValueError: they are damaged.
    """
    _ = run.config, run.environment, run.summary
    return run


def _origins(finished: Sequence[Run]) -> dict[str, list[str]]:
    """On what and with what the runs were made, each said once."""
    about = [run.environment for run in finished]
    found = {
        "commit": [env.get("commit") for env in about],
        "hardware": [env.get("hardware") for env in about],
        "torch": [env.get("versions", {}).get("torch") for env in about],
        # Accelerate calls it no.
        "precision": [str(env.get("precision", "")).replace("no", "fp32") for env in about],
    }
    return {name: sorted({str(v) for v in values if v}) for name, values in found.items()}


def _result(group: compare.Accuracies) -> dict[str, Any]:
    made_by = []
    for row, run in zip(group.rows, group.evaluated, strict=True):
        if run is not None:
            lines = [commands.command(run)]
            with contextlib.suppress(RunError):  # the training is gone
                lines = [*_lineage(compare.judged(run)), *lines]
            made_by.append((f"{row['']}, seed {row['seed']}", lines))
    return {"group": group, "table": Markup(compare.table(group.rows)), "commands": made_by}


def _lineage(run: Run) -> Iterator[str]:
    """The commands that lead to a run, in order: those of the runs that it starts from first."""
    config = run.config
    for stage, name in (("vae", getattr(config, "vae", None)), (run.stage, config.continue_from)):
        if name:
            with contextlib.suppress(RunError):
                yield from _lineage(runs.get(stage, name))
    yield commands.command(run)


def _study(table: Path) -> dict[str, Any]:
    """A sensitivity study, drawn anew from its table."""
    config = SweepConfig(**(runs.read_json(table.parent / "config.json") or {}))
    rows = pd.read_csv(table)
    n = ", ".join(f"{v:,.0f}" for v in sorted(rows["n_val"].dropna().unique()))
    seeds = ", ".join(map(str, config.seeds))
    return {
        "name": table.parent.name,
        "said": f"{config.adversary} on {Path(config.dataset).name}; accuracy on validation "
        f"(hyper-parameters are not judged on test), n = {n}; {len(rows)} points; seeds {seeds}.",
        "figure": _drawn(plots.sensitivity(rows)),
        "command": commands.papermill("05_sensitivity", commands.asked(config)),
    }


def _pictures(run: Run) -> dict[str, Any] | None:
    """What notebook 02 drew of a VAE, if it did."""
    paths = {run.path / "figures" / name: said for name, said in PICTURES.items()}
    found = [(said, _data(path)) for path, said in paths.items() if path.exists()]
    if not found:
        return None
    made_by = [commands.command(run), commands.papermill("02_decompose", {"vae": run.reference})]
    return {"name": compare.name_of(run), "id": run.id, "pictures": found, "commands": made_by}


def _training(run: Run) -> dict[str, Any]:
    config, told = run.config, run.summary or {}
    said = [f"{config.epochs} epochs", f"seed {config.seed}"]
    if "seconds" in told:
        said.append(f"{told['seconds']:,.0f} s")
    if "rate_nats" in told:
        said.append(f"rate {told['rate_nats']:.1f} nats an image")
        said.append(f"reconstruction {told['reconstruction']:.3f} (MSE), validation")
    if "knn_top1_val" in told:
        low, high = told["knn_low_val"], told["knn_high_val"]
        said.append(f"kNN {told['knn_top1_val']:.1f} % [{low:.1f}, {high:.1f}], validation")
        said.append(f"n = {told['n_val']:,}")
    if "ema_top1" in told:
        low, high = told["ema_low"], told["ema_high"]
        said.append(f"accuracy {told['ema_top1']:.1f} % [{low:.1f}, {high:.1f}], test")
        said.append(f"n = {told['ema_n']:,}, {told['ema_protocol']}")
    keys = [key for key in compare.CURVES[run.stage] if any(key in x for x in run.metrics())]
    return {
        "name": compare.name_of(run),
        "id": run.id,
        "said": ", ".join(said),
        "figure": _drawn(plots.curves({run.id: run}, keys[:2])) if keys else "",
        "commands": list(_lineage(run)),
    }


def _drawn(figure: Figure) -> Markup:
    """Inline SVG without its groups' names, which many figures on one page would share."""
    text = re.sub(r'<g id="(?!legend)[^"]*"', "<g", style.svg(figure))
    plt.close(figure)
    # No request, but a page that names no other place is easier to trust.
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL))


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    sys.exit(main())
