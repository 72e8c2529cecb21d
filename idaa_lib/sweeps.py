"""Grids of papermill runs: finished ones are skipped, interrupted ones resumed, results collected.

A point of a grid is three notebooks in a row, 01 (VAE), 03 (SSL), 04 (evaluation), each of which
makes one run directory; the executed notebook is kept there as `notebook.ipynb`. "Finished" is what
the run directory says, never what papermill's cell states say: a killed kernel leaves every cell
marked "completed". Points run in threads, one kernel each; under
`joblib.parallel_config(backend="dask")` on the workers of a Dask cluster that shares the outputs.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from idaa_lib import train
from idaa_lib.configs import Config, EvalConfig, SSLConfig, SweepConfig, TrainingConfig, VAEConfig
from idaa_lib.evaluate import stage as evaluation
from idaa_lib.runs import NOTEBOOKS, Run, RunError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
# Two points may share a VAE: the second waits for the first to have trained it.
_making: dict[str, threading.Lock] = defaultdict(threading.Lock)


class Point(NamedTuple):
    """One place of a grid: which axis is varied, its value, and the three runs' fields."""

    axis: str
    value: float
    vae: dict[str, Any]
    ssl: dict[str, Any]
    eval: dict[str, Any]


def points(config: SweepConfig) -> list[Point]:
    """The points of a sensitivity study: each axis around the middle, for each seed.

    The middle is what the stage presets give for what is not varied. It is a point of every axis
    whose values contain it.
    """
    made = []
    axes = (("epsilon", config.epsilons), ("beta", config.betas), ("dim", config.dims))
    for axis, values in axes:
        for value in values:
            for seed in config.seeds:
                shared: dict[str, Any] = {
                    "preset": config.preset,
                    "dataset": config.dataset,
                    "seed": seed,
                }
                varied = {axis: value}
                if axis == "dim":
                    # At a fixed κ another dim is another β: hold β, or two things change at once.
                    varied["beta"] = VAEConfig(**shared, **config.vae).beta
                vae = shared | config.vae | (varied if axis != "epsilon" else {})
                ssl = shared | {"adversary": config.adversary} | config.ssl
                ssl |= varied if axis == "epsilon" else {}
                evaluated = {"preset": config.preset, "references": False} | config.eval
                made.append(Point(axis, value, vae, ssl, evaluated))
    return made


def run_point(point: Point) -> dict[str, Any]:
    """Make (or find) the three runs of a point: a row with its figures and the runs' ids."""
    vae = ensure(VAEConfig(**point.vae))
    ssl = ensure(SSLConfig(**point.ssl, vae=vae.id))
    judged = ensure(EvalConfig(**point.eval, run=ssl.id))
    figures = (vae.summary or {}) | (ssl.summary or {}) | (judged.summary or {})
    kept = ("knn_top1_val", "knn_top1", "linear_top1", "kappa", "beta", "dim", "seconds")
    return {
        "axis": point.axis,
        "value": point.value,
        "seed": ssl.config.seed,
        **{name: figures.get(name) for name in kept},
        "vae": vae.id,
        "ssl": ssl.id,
        "eval": judged.id,
    }


def run_all(made: list[Point], jobs: int = 1) -> list[dict[str, Any]]:
    """Rows of all points, `jobs` at a time; every configuration is checked before the first runs.

    Raises:
        ConfigError: a point cannot be run. RunError: a notebook failed (finished runs are kept).
    """
    from joblib import Parallel, delayed

    for point in made:
        VAEConfig(**point.vae), SSLConfig(**point.ssl), EvalConfig(**point.eval)
    with shared_threads(jobs):
        return Parallel(n_jobs=jobs, prefer="threads")(delayed(run_point)(p) for p in made)


def locate(config: Config) -> Run:
    """The run directory that a configuration of any stage leads to."""
    if isinstance(config, EvalConfig):
        return evaluation.locate(config)
    assert isinstance(config, TrainingConfig)
    return train.locate(config)


def ensure(config: Config) -> Run:
    """The finished run of `config`, made by its notebook under papermill if it is not there yet.

    Raises:
        RunError: the notebook failed; its executed copy lies in the run directory.
    """
    run = locate(config)
    with _making[run.id]:
        if not run.finished:
            asked = config.changed() | {n: getattr(config, n) for n in config.principal}
            asked |= {"preset": config.preset, "seed": config.seed, "device": config.device}
            execute(NOTEBOOKS[config.stage], asked, run.path / "notebook.ipynb")
        if not run.finished:
            raise RunError(f"{NOTEBOOKS[config.stage]} ended without finishing run {run.id}.")
    return run


def execute(notebook: str, parameters: dict[str, Any], output: Path, tries: int = 2) -> Path:
    """Run `notebooks/<notebook>.ipynb` under papermill; `output` appears when it has succeeded.

    Args:
        parameters: JSON values, named as in the notebook's parameters cell.
        tries: a kernel that dies or does not start is tried again; a failing cell is not.
    Raises:
        RunError: a parameter that the notebook lacks, or a failing cell.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source = FOLDER / f"{notebook}.ipynb"
    known = papermill.inspect_notebook(str(source))
    if unknown := sorted(parameters.keys() - known.keys()):
        raise RunError(f"{source.name} has no parameter {', '.join(unknown)}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    running = output.with_name(f"{output.stem}.running.ipynb")
    for attempt in range(1, tries + 1):
        try:
            papermill.execute_notebook(
                str(source),
                str(running),
                parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(FOLDER),
                # ipykernel warns of unencrypted TCP at every start (the port is this machine's) and
                # reports the interrupt that ends it; an error in a cell is raised all the same.
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
        except PapermillExecutionError as error:
            failed = output.with_name(f"{output.stem}.failed.ipynb")
            running.replace(failed)
            raise RunError(f"{source.name} failed: {error.evalue} (see {failed})") from None
        except Exception as error:
            # The kernel, not the notebook: ports that collide, a kernel killed for memory.
            if attempt == tries:
                raise RunError(
                    f"The kernel of {source.name} died {tries} times ({type(error).__name__}: "
                    f"{error}); what it had saved is kept in {output.parent}."
                ) from error
        else:
            running.replace(output)
            break
    return output


@contextmanager
def shared_threads(jobs: int) -> Iterator[None]:
    """Kernels started inside share the processor: N kernels with all threads each fight for it."""
    old = os.environ.get("OMP_NUM_THREADS")
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // jobs))
    try:
        yield
    finally:
        if jobs > 1:
            os.environ.pop("OMP_NUM_THREADS")
            if old is not None:
                os.environ["OMP_NUM_THREADS"] = old
