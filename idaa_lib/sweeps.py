"""Grids of papermill runs: finished ones are skipped, interrupted ones resumed, results collected.

A point of a grid is three notebooks in a row, 01 (VAE), 03 (SSL), 04 (evaluation), each of which
makes one run directory; the executed notebook is kept there as `notebook.ipynb`. "Finished" is what
the run directory says, never what papermill's cell states say: a killed kernel leaves every cell
marked "completed". Points run in threads, one kernel each.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from idaa_lib import train
from idaa_lib.configs import (
    CompareConfig,
    Config,
    EvalConfig,
    SSLConfig,
    SweepConfig,
    TrainingConfig,
    VAEConfig,
)
from idaa_lib.evaluate import stage as evaluation
from idaa_lib.runs import NOTEBOOKS, Run, RunError, outputs_root, write_json
from idaa_lib.runs.commands import asked
from idaa_lib.runs.machine import settled

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
# Two points may share a VAE: the second waits for the first to have trained it.
_making: dict[str, threading.Lock] = defaultdict(threading.Lock)
# Runs that notebooks are making now, and whether no further one may start.
_going: set[Run] = set()
_cancelled = threading.Event()


# What stands beside a table of encoders, where an evaluation has it.
REFERENCES = ("random_knn_top1", "random_linear_top1", "pixels_knn_top1", "pixels_linear_top1")


class Point(NamedTuple):
    """One place of a grid: what names it in a row (axis and value, …), and the runs' fields."""

    labels: dict[str, Any]
    vae: dict[str, Any]
    ssl: dict[str, Any]
    eval: dict[str, Any]


def points(config: SweepConfig) -> list[Point]:
    """The points of a sensitivity study: each axis around the middle, for each seed.

    The middle is what the stage presets give for what is not varied. It is a point of every axis
    whose values contain it. Along the further axes there is each value without an adversary too.
    """
    made = []
    axes = (("epsilon", config.epsilons), ("beta", config.betas), ("dim", config.dims))
    data, evaluated = _shared(config)
    for axis, values in axes:
        for value in values:
            for seed in config.seeds:
                vae = data | config.vae | {"seed": seed}
                ssl = data | {"adversary": config.adversary} | config.ssl | {"seed": seed}
                if axis == "epsilon":
                    ssl["epsilon"] = value
                else:
                    # At a fixed κ another dim is another β: hold β, or two things change at once.
                    beta = value if axis == "beta" else VAEConfig(**vae).beta
                    vae = {k: v for k, v in vae.items() if k != "kappa"} | {"beta": beta}
                    vae |= {"dim": value} if axis == "dim" else {}
                labels = {"axis": axis, "value": value, "adversary": config.adversary}
                made.append(Point(labels, vae, ssl, evaluated))
    for axis, further in config.axes.items():
        for value, seed, adversary in itertools.product(
            further, config.seeds, (config.adversary, "none")
        ):
            vae = data | config.vae | {"seed": seed}
            ssl = data | config.ssl | {"seed": seed, "adversary": adversary, axis: value}
            labels = {"axis": axis, "value": value, "adversary": adversary}
            made.append(Point(labels, vae, ssl, evaluated))
    return made


def cells(config: CompareConfig) -> list[Point]:
    """The cells of the main table: method × adversary, for each seed.

    `vae_of` is the data set of a VAE that was trained elsewhere, else None. The first cell is
    judged with its references, the encoder before training and raw pixels: the same for all where
    all are judged alike (`clean`), and left out where the pixels are more than a probe can take.
    """
    data, evaluated = _shared(config)
    pairs: list[tuple[str, str | None]] = [(adversary, None) for adversary in config.adversaries]
    pairs += [("idaa", config.elsewhere)] if config.elsewhere else []
    made = [
        Point(
            {"method": method, "adversary": adversary, "vae_of": elsewhere},
            # One VAE for all: seeds are of the encoders.
            data | config.vae | ({"dataset": elsewhere} if elsewhere else {}),
            data
            | config.ssl
            | config.ssl_of.get(method, {})
            | {"method": method, "adversary": adversary, "seed": seed},
            evaluated,
        )
        for method in config.methods
        for adversary, elsewhere in pairs
        for seed in config.seeds
    ]
    alike = EvalConfig(**evaluated).protocol == "clean"
    if alike and SSLConfig(**made[0].ssl).size <= 32:
        made[0] = made[0]._replace(eval=evaluated | {"references": True} | config.eval)
    return made


def _shared(config: SweepConfig | CompareConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields that all trainings have in common, and all evaluations."""
    shared: dict[str, Any] = {"preset": config.preset, "device": config.device}
    return shared | {"dataset": config.dataset}, shared | {"references": False} | config.eval


def run_point(point: Point, make: bool = True) -> dict[str, Any] | None:
    """Make the runs of a point, or find them: a row with its figures and the runs' ids.

    A point whose adversary needs no VAE makes none. With `make=False` None where a run is missing.
    """
    finished = ensure if make else _finished
    vae = None
    if SSLConfig(**point.ssl).needs_vae:
        if (vae := finished(VAEConfig(**point.vae))) is None:
            return None
        point = point._replace(ssl=point.ssl | {"vae": vae.reference})
    if (ssl := finished(SSLConfig(**point.ssl))) is None:
        return None
    asked = EvalConfig(**point.eval | {"run": ssl.reference})
    # An evaluation with references serves where none are asked for.
    judged = _finished(asked.model_copy(update={"references": True})) or finished(asked)
    if judged is None:
        return None
    trained, tested = ssl.summary or {}, judged.summary or {}
    return {
        **point.labels,
        "seed": ssl.config.seed,
        **{k: vae and getattr(vae.config, k) for k in ("kappa", "beta", "dim")},
        **{k: trained.get(k) for k in ("knn_top1_val", "knn_low_val", "knn_high_val", "n_val")},
        "linear_top1_val": tested.get("linear_top1_val"),
        "knn_top1": tested.get("knn_top1"),
        "linear_top1": tested.get("linear_top1"),
        "linear_top5": tested.get("linear_top5"),
        **{k: tested.get(k) for k in REFERENCES},
        "n_test": tested.get("knn_n"),
        "protocol": tested.get("protocol"),
        "seconds": trained.get("seconds"),
        "epochs": ssl.config.epochs,
        "width": ssl.config.width,
        "dataset": Path(ssl.config.dataset).stem,
        "images": ssl.environment["dataset"]["n"],
        "vae": vae and vae.id,
        "ssl": ssl.id,
        "eval": judged.id,
    }


def run_all(made: list[Point], jobs: int = 1) -> list[dict[str, Any]]:
    """Rows of all points, `jobs` at a time; every configuration is checked before the first runs.

    Raises:
        ConfigError: a point cannot be run. RunError: a notebook failed (finished runs are kept).
    """
    _check(made)
    return together([partial(run_point, point) for point in made], jobs)


def collect(made: list[Point]) -> list[dict[str, Any]]:
    """Rows of the points whose runs are all finished; nothing is started.

    Raises:
        ConfigError: as `run_all`.
    """
    _check(made)
    return [row for point in made if (row := run_point(point, make=False)) is not None]


def _check(made: list[Point]) -> None:
    for point in made:
        VAEConfig(**point.vae), SSLConfig(**point.ssl), EvalConfig(**point.eval)


def _finished(config: Config) -> Run | None:
    """The finished run of `config`, None if there is none."""
    run = locate(config)
    return run if run.finished else None


def together(tasks: Sequence[Callable[[], Any]], jobs: int) -> list[Any]:
    """Results of tasks that make runs, `jobs` at a time.

    An interrupt stops the runs under way after their step, waits until they are saved, and starts
    no more.
    """
    from joblib import Parallel, delayed

    _cancelled.clear()
    try:
        with _shared_threads(jobs):
            return Parallel(n_jobs=jobs, prefer="threads")(delayed(task)() for task in tasks)
    except BaseException:
        _cancelled.set()
        # Again and again: a kernel that is still starting forgets what was asked before its run.
        while _going:
            for run in set(_going):
                run.ask("stop")
            time.sleep(0.5)
        raise


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
    if isinstance(config, TrainingConfig):  # the notebook runs in another folder
        config = config.model_copy(update={"dataset": settled(config.dataset)})
    run = locate(config)
    with _making[run.id]:
        while run.state["state"] == "going":  # another process is at it
            time.sleep(1)
        if not run.finished:
            if _cancelled.is_set():
                raise RunError(f"Run {run.id} was not started: the sweep was stopped.")
            _going.add(run)
            try:
                execute(NOTEBOOKS[config.stage], asked(config), run.path / "notebook.ipynb")
            finally:
                _going.discard(run)
        if not run.finished:
            raise RunError(f"{NOTEBOOKS[config.stage]} ended without finishing run {run.id}.")
    return run


def folder_of(config: SweepConfig | CompareConfig) -> Path:
    """Where a study's table and figure belong, `outputs/<stage>/<id>/` (made).

    Named by its axes, whichever of the paper's figures they are of.
    """
    told = config.model_dump_json(exclude={"jobs", "device", "launch", "figure"})
    digest = hashlib.sha256(told.encode()).hexdigest()
    words = [config.stage, Path(config.dataset).name]
    words += [config.adversary] if isinstance(config, SweepConfig) else []
    folder = outputs_root() / config.stage / "-".join([*words, digest[:8]])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    return folder


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
def _shared_threads(jobs: int) -> Iterator[None]:
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
