"""`make demo`: from nothing to results. Runs the notebooks under papermill and says what came out.

Everything is a run like any other, so a second `make demo` finds the first one's results at once.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from idaa_lib import adversaries, sweeps
from idaa_lib.configs import EvalConfig, SSLConfig, SweepConfig, UserError, VAEConfig
from idaa_lib.methods import About, Method, build_method
from idaa_lib.methods.vae import VAETraining
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run, outputs_root
from idaa_lib.runs.machine import hardware
from idaa_lib.train.accelerator import make_accelerator
from idaa_lib.train.loop import Fit
from idaa_lib.views import recipe

Adversary = Literal["none", "clae", "idaa"]
ADVERSARIES: tuple[Adversary, ...] = ("none", "clae", "idaa")


def main() -> int:
    began = time.monotonic()
    minutes = estimate() / 60
    print(
        f"IDAA workbench demo on {hardware()}\n"
        f"This takes about {minutes:.0f} minutes on this machine: a VAE, SimCLR with no adversary, "
        f"CLAE and IDAA, their evaluation, and a small sensitivity study.\n",
        flush=True,
    )
    try:
        rows, notebooks = run(lambda text: print(f"[{_clock(began)}] {text}", flush=True))
    except UserError as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: `make demo` goes on from there.")
        return 130
    print(f"\n{table(rows)}\n\nFigures:")
    for path in sorted(p for row in rows for p in row["figures"]):
        print(f"  {_short(path)}")
    print("\nExecuted notebooks:")
    for path in notebooks:
        print(f"  {_short(path)}")
    print(f"\nDone in {_clock(began)}. To open them:  make lab")
    return 0


def run(say: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[Path]]:
    """All stages; a row for each adversary, and the executed notebooks in reading order."""
    say("1/4  VAE")
    vae = sweeps.ensure(VAEConfig())

    def pipeline(adversary: Adversary) -> dict[str, Any]:
        named: dict[str, Any] = {"vae": vae.id} if adversary == "idaa" else {}
        ssl = sweeps.ensure(SSLConfig(adversary=adversary, **named))
        say(f"     trained    {ssl.id}")
        judged = sweeps.ensure(EvalConfig(run=ssl.id))
        say(f"     evaluated  {ssl.id}")
        return row(adversary, ssl, judged)

    def vary(point: sweeps.Point) -> None:
        sweeps.run_point(point)
        say("     swept      {axis} = {value:g}".format(**point.labels))

    say("2/4  SimCLR with no adversary, CLAE, IDAA, their evaluation; sensitivity to ε, β and dim")
    study = SweepConfig()
    tasks: list[Callable[[], Any]] = [partial(pipeline, a) for a in reversed(ADVERSARIES)]
    tasks += [partial(vary, point) for point in sweeps.points(study)]
    rows = sweeps.together(tasks, study.jobs)[: len(ADVERSARIES)][::-1]
    folder = outputs_root() / "notebooks"
    say("3/4  Decomposition: pictures of x′ over ε")
    pictures = {"vae": vae.id, "run": rows[-1]["ssl"].id}
    decomposed = sweeps.execute("02_decompose", pictures, folder / "02_decompose.ipynb")
    say("4/4  Sensitivity curves")
    swept = sweeps.execute("05_sensitivity", {}, folder / "05_sensitivity.ipynb")

    rows[0]["figures"] += [*(vae.path / "figures").glob("*.png")]
    rows[0]["figures"] += [*sweeps.folder_of(study).glob("*.png")]
    notebooks = [vae.path / "notebook.ipynb", decomposed]
    notebooks += [r[stage].path / "notebook.ipynb" for r in rows for stage in ("ssl", "eval")]
    return rows, [path for path in [*notebooks, swept] if path.exists()]


def row(adversary: str, ssl: Run, judged: Run) -> dict[str, Any]:
    figures = [p for r in (ssl, judged) for p in (r.path / "figures").glob("*.png")]
    return {"adversary": adversary, "ssl": ssl, "eval": judged, "figures": figures}


def table(rows: list[dict[str, Any]]) -> str:
    """method × kNN, linear (with 95 % intervals), seconds; the reference rows below."""
    lines = [f"{'':<22}{'kNN (%)':>20}{'linear (%)':>20}{'seconds':>10}"]

    def accuracy(summary: dict[str, Any], key: str) -> str:
        low, high = summary[f"{key}_low"], summary[f"{key}_high"]
        return f"{summary[f'{key}_top1']:.1f} [{low:.1f}, {high:.1f}]"

    for entry in rows:
        judged, name = entry["eval"].summary, entry["adversary"]
        label = "SimCLR" if name == "none" else f"SimCLR + {name.upper()}"
        seconds = entry["ssl"].summary["seconds"]
        lines.append(
            f"{label:<22}{accuracy(judged, 'knn'):>20}{accuracy(judged, 'linear'):>20}"
            f"{seconds:>10.0f}"
        )
    judged = rows[0]["eval"].summary
    for prefix, label in (("random_", "untrained encoder"), ("pixels_", "raw pixels")):
        knn, linear = accuracy(judged, f"{prefix}knn"), accuracy(judged, f"{prefix}linear")
        lines.append(f"{label:<22}{knn:>20}{linear:>20}")
    lines.append(f"Test accuracy, n = {judged['knn_n']:,}, 95 % bootstrap intervals over images;")
    lines += [judged["knn_protocol"] + ";", judged["linear_protocol"] + "."]
    lines.append("One seed and a few epochs: it shows that everything works, not which is best.")
    return "\n".join(lines)


def estimate() -> float:
    """Seconds of the whole demo, from one step of each kind and one start of Python measured here.

    Two notebooks at a time share the threads, so the sum of their training steps is what counts.
    """
    ssl, vae, sweep = SSLConfig(adversary="idaa"), VAEConfig(), SweepConfig()
    assert ssl.limit is not None
    assert vae.limit is not None
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import idaa_lib.lab.plots"], check=True)
    kernel = 2 * (time.monotonic() - start)  # the same again to start it and to draw the figures
    vaes = len(set(sweep.betas) | set(sweep.dims)) - 1
    points = sum(len(values) - 1 for values in (sweep.epsilons, sweep.betas, sweep.dims))
    steps = ssl.epochs * (ssl.limit // ssl.batch_size)
    # CLAE costs nine tenths of an IDAA step, no adversary half of it.
    training = (points + 2.4) * steps * _seconds(ssl)
    training += vaes * vae.epochs * (vae.limit // vae.batch_size) * _seconds(vae)
    notebooks = 3 + (6 + vaes + 2 * points) / sweep.jobs
    # A probe's and a t-SNE's arithmetic, counted in kernel starts: 2 of them where all is judged.
    return training + kernel * (notebooks + (3 * 2 + points) / sweep.jobs)


def _seconds(config: SSLConfig | VAEConfig) -> float:
    """One training step of `config` here, after a warm-up."""
    accelerator = make_accelerator(config, outputs_root())
    transform = recipe(config.augmentation, config.size, (0.5,) * 3, (0.25,) * 3)
    about = About(transform, torch.zeros(config.batch_size).long(), 1, 1, config.batch_size)
    method: Method
    adversary: Any = adversaries.NoAdversary()
    if isinstance(config, SSLConfig):
        method = build_method(config, about)
        adversary = adversaries.IDAA(VAE(128, config.size, 16).to(accelerator.device), 0.1)
    else:
        method = VAETraining(config, about)
    shape = (config.batch_size, 3, config.size, config.size)
    images = torch.zeros(shape, dtype=torch.uint8, device=accelerator.device)
    fit = Fit(accelerator, method, images, config, adversary)
    method.network = accelerator.prepare_model(method.network)
    for index in range(4):
        start = time.monotonic()
        fit.train_step(index, {"images": images}, {})
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
    return time.monotonic() - start


def _clock(began: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    return f"{minutes}:{seconds:02}"


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())
