"""Many runs: a grid is data, a plan is the runs that it takes, `perform` makes one of them.

    python -m idaa_lib.sweeps demo            # a file of idaa_lib/recipes/sweeps, or a path

A run is made by its notebook under papermill (01 a VAE, 03 an encoder, 04 its evaluation), which is
kept in the run directory. Only that directory says whether the run is finished: a killed kernel
leaves every cell marked "completed". So what is finished costs nothing, and what was interrupted
goes on. `perform` can be pickled: joblib runs it in threads, on Dask, on SLURM.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from idaa_lib import results, train
from idaa_lib.configs import (
    CompareConfig,
    EvalConfig,
    ImagesConfig,
    SSLConfig,
    SweepConfig,
    UserError,
    VAEConfig,
)
from idaa_lib.evaluate import stage as evaluation
from idaa_lib.evaluate.encoders import judged_on
from idaa_lib.runs import (
    NOTEBOOKS,
    Run,
    RunError,
    get,
    outputs_root,
    parameters,
    report_left_out,
    write_json,
)
from idaa_lib.runs.directory import STARTER
from idaa_lib.runs.machine import hardware, resolve_paths
from idaa_lib.runs.progress import Lines, Tally, clock

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
RECIPES = Path(__file__).resolve().parent / "recipes" / "sweeps"
# Runs that notebooks of this process are making now, and whether no further one may start.
_going: set[Run] = set()
_cancelled = False
# What a kernel runs first, so that its runs are known as a sweep's (`Run.note_start`).
SWEEP = f"exec_lines=__import__('os').environ['{STARTER}'] = 'sweep'"

# --- grids ----------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One place of a grid: what names it in a table, and the fields of its runs."""

    labels: dict[str, Any]
    vae: dict[str, Any]
    ssl: dict[str, Any]
    eval: dict[str, Any]


def points(grid: Mapping[str, Any]) -> list[Point]:
    """The points of a grid: every combination of the crossed values, for each seed.

    `fixed` and `cross` are stage → field → value, or values; `all` means every stage. `seeds` are
    of the encoder, and of the VAE unless `fixed` has another. `labels` name all points alike.
    """
    fixed = {"all": {}} | grid.get("fixed", {})
    cross = grid.get("cross", {}).items()
    axes = {(stage, name): values for stage, along in cross for name, values in along.items()}
    places = []
    for *values, seed in itertools.product(*axes.values(), grid.get("seeds", [0])):
        own = {"vae": {"seed": seed}, "ssl": {"seed": seed}, "eval": {}}
        fields = {stage: fixed["all"] | own[stage] | fixed.get(stage, {}) for stage in own}
        labels = dict(grid.get("labels", {}))
        for (stage, name), value in zip(axes, values, strict=True):
            labels[name] = value
            for each in own if stage == "all" else (stage,):
                fields[each][name] = value
        places.append(Point(labels, **fields))
    return places


def sensitivity(config: SweepConfig) -> list[Point]:
    """The points of a sensitivity study: each axis around the middle, for each seed.

    The middle is what the recipes say of what is not varied; it is a point of every axis whose
    values contain it. Along the further axes there is each value without an adversary too; to ε, β
    and dim a training without one is the same everywhere: one point, `at` None.

    Hyper-parameters are chosen on a validation split, whatever the preset: it is held out of all
    trainings, and every point is judged by the clean protocol.
    """
    shared = _shared(config)
    shared["eval"] = {"protocol": "clean"} | shared["eval"]
    vae, ssl = ({"split": "train"} | fields for fields in (config.vae, config.ssl))
    # At a fixed κ another dim is another β: β is held, or two things would change at once.
    held = {name: value for name, value in vae.items() if name != "kappa"}
    held["beta"] = VAEConfig(**shared["all"] | vae).beta
    axes: dict[str, Sequence[Any]] = {"epsilon": config.epsilons, "beta": config.betas}
    axes |= {"dim": config.dims, **config.axes}
    attack = f"adversary = {config.adversary}"
    knobs = {row["knob"] for row in SSLConfig.knobs() if row["of"] == attack}
    places = []
    for axis, values in axes.items():
        stage = "vae" if axis in ("beta", "dim") else "ssl"
        fixed = shared | {"vae": held if stage == "vae" else vae, "ssl": ssl}
        cross: dict[str, dict[str, Sequence[Any]]] = {"vae": {}, "ssl": {}}
        cross[stage][axis] = values
        cross["ssl"]["adversary"] = [config.adversary] + ["none"] * (axis in config.axes)
        for point in points({"fixed": fixed, "cross": cross, "seeds": config.seeds}):
            labels = {"axis": axis, "at": point.labels[axis], "adversary": point.ssl["adversary"]}
            places.append(point._replace(labels=labels))
        if values and axis not in config.axes:
            fixed |= {"ssl": {k: v for k, v in ssl.items() if k not in knobs}}
            plain = {"ssl": {"adversary": ["none"]}}
            for point in points({"fixed": fixed, "cross": plain, "seeds": config.seeds}):
                labels = {"axis": axis, "at": None, "adversary": "none"}
                places.append(point._replace(labels=labels))
    return places


def cells(config: CompareConfig) -> list[Point]:
    """The cells of the main table: method × adversary, for each seed; one VAE for all.

    `system` is the row's name among `methods`. `vae_of` is the data set of a VAE that was trained
    elsewhere, else None. The first cell is judged with its references, the encoder before training
    and raw pixels: the same for all where all are judged alike (`clean`), and left out where the
    pixels are more than a probe can take.
    """
    grid = []
    sources = dict.fromkeys((None, config.elsewhere))  # of the VAE
    for method, elsewhere in itertools.product(config.methods, sources):
        fixed = _shared(config)
        fixed["vae"] = {"seed": 0} | config.vae | ({"dataset": elsewhere} if elsewhere else {})
        fields = config.systems.get(method, {"method": method})
        fixed["ssl"] = config.ssl | config.ssl_of.get(method, {}) | fields
        cross = {"ssl": {"adversary": ["idaa"] if elsewhere else config.adversaries}}
        labels = {"system": method, "vae_of": elsewhere}
        grid += points({"labels": labels, "fixed": fixed, "cross": cross, "seeds": config.seeds})
    first = grid[0]
    if EvalConfig(**first.eval).protocol == "clean" and SSLConfig(**first.ssl).size <= 32:
        grid[0] = first._replace(eval=first.eval | {"references": True} | config.eval)
    return grid


def _shared(config: SweepConfig | CompareConfig) -> dict[str, dict[str, Any]]:
    common = {name: getattr(config, name) for name in ("preset", "device", "dataset")}
    judged = {"references": False, "dataset": judged_on(config.dataset)}
    return {"all": common, "eval": judged | config.eval}


# --- plans ----------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A run to be: its configuration, and what it needs: field → the key of another task, whose
    run the field will name."""

    config: ImagesConfig
    needs: dict[str, str]


class Outcome(NamedTuple):
    """What became of a task: the run's id, `finished`, `failed` or `left out`, a sentence why, and
    the seconds that it took, 0 if it was there already."""

    id: str
    state: str
    error: str | None = None
    seconds: float = 0.0


def plan(grid: Sequence[Point]) -> dict[str, Task]:
    """Key → task, each after those that it needs; what two points share is there once.

    A key names a configuration. A run's id cannot: an encoder's depends on the weights of its VAE,
    which are not there before it is trained.

    Raises:
        ConfigError: a point cannot be run.
    """
    return {key: task for point in grid for key, task in _chain(point)}


def _chain(point: Point) -> Iterator[tuple[str, Task]]:
    """The tasks of a point, the evaluation last. An adversary without a VAE needs none."""
    ssl, needs = SSLConfig(**point.ssl), {}
    if ssl.needs_vae:
        yield (vae := _task(VAEConfig(**point.vae)))
        needs = {"vae": vae[0]}
    yield (trained := _task(ssl, **needs))
    yield _task(EvalConfig(**point.eval), run=trained[0])


def _task(config: ImagesConfig, **needs: str) -> tuple[str, Task]:
    config = resolve_paths(config)  # its notebook runs in another folder
    text = json.dumps([config.model_dump(mode="json"), needs], sort_keys=True)
    return f"{config.stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", Task(config, needs)


def outline(grid: Sequence[Point], jobs: int) -> str:
    """How many runs the points take, how many are finished, and how long the others take by the
    runs so far: a sentence to read before it starts."""
    tasks = plan(grid)
    tally = Tally({key: task.config for key, task in tasks.items()}, jobs)
    return f"{len(grid)} points take {tally.plan(find_runs(tasks))}"


def perform_all(
    tasks: Mapping[str, Task],
    jobs: int = 1,
    show: Callable[[Mapping[str, Outcome]], object] = len,
) -> dict[str, Outcome]:
    """Key → outcome of all tasks, `jobs` at a time; one that fails stops only those that need it.

    How it goes is printed, and `show` is called with all outcomes so far whenever there are more.
    An encoder is judged at once, so that its figures are there while others train. An interrupt
    stops the runs under way after their step, waits until they are saved, and starts no more.
    """
    from joblib import Parallel, delayed

    global _cancelled
    _cancelled = False
    outcomes: dict[str, Outcome] = {}
    tally = Tally({key: task.config for key, task in tasks.items()}, jobs, _going)
    lines = Lines(30.0)

    def line() -> tuple[float, str]:
        return tally.line({key: outcome.state for key, outcome in list(outcomes.items())})

    try:
        with _shared_threads(jobs), lines.repeat(line):
            while chains := _chains(tasks, outcomes):
                calls = [delayed(_perform)(chain, outcomes) for chain in chains]
                work = Parallel(n_jobs=jobs, prefer="threads", return_as="generator_unordered")
                for news in work(calls):
                    outcomes |= news
                    for key, outcome in news.items():
                        if outcome.state == "finished" and outcome.seconds:
                            tally.seconds[tasks[key].config.stage].append(outcome.seconds)
                        if outcome.error or outcome.seconds:
                            print(f"{outcome.id}: {outcome.error or outcome.state}", flush=True)
                    lines.show(*line(), last=len(outcomes) == len(tasks))
                    show(outcomes)
    except BaseException:
        _cancelled = True
        # Again and again: a kernel that is still starting forgets what was asked before its run.
        while _going:
            for run in set(_going):
                run.ask("stop")
            time.sleep(0.5)
        raise
    return outcomes


def _chains(tasks: Mapping[str, Task], outcomes: Mapping[str, Outcome]) -> list[dict[str, Task]]:
    """The tasks that can begin now, each followed by those that wait for it alone."""
    chains = []
    for key, task in tasks.items():
        if key not in outcomes and outcomes.keys() >= set(task.needs.values()):
            chains.append(chain := {key: task})
            last = key
            while len(next_ := [k for k, t in tasks.items() if last in t.needs.values()]) == 1:
                (last,) = next_
                chain[last] = tasks[last]
    return chains


def _perform(chain: Mapping[str, Task], outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """The outcomes of tasks of which each needs none but the one before and `outcomes`."""
    news: dict[str, Outcome] = {}
    for key, task in chain.items():
        needs = {f: news.get(other) or outcomes[other] for f, other in task.needs.items()}
        if lacks := [need for need in needs.values() if need.state != "finished"]:
            reason = f"It needs {lacks[0].id}, which {lacks[0].state}."
            news[key] = Outcome(key, "left out", reason)
        else:
            news[key] = perform(task.config.replace(**{f: need.id for f, need in needs.items()}))
    return news


def perform(config: ImagesConfig) -> Outcome:
    """What became of the run of `config`, which is made if it is not there. Raises nothing that a
    further attempt, or another configuration, could mend."""
    name, start = config.stage, time.monotonic()
    try:
        if run := _find(config):
            return Outcome(run.reference, "finished")
        name = locate(config).id
        return Outcome(ensure(config).reference, "finished", None, time.monotonic() - start)
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Outcome(name, "failed", f"{kind}{error}")


def check(outcomes: Mapping[str, Outcome]) -> None:
    """Raises a RunError that names each run that is not finished, and says why."""
    failures = [f"{o.id} {o.state}: {o.error}" for o in outcomes.values() if o.error]
    if failures:
        raise RunError(
            f"{len(failures)} of {len(outcomes)} runs are missing (what is finished is kept):\n"
            + "\n".join(failures)
        )


def find_runs(tasks: Mapping[str, Task], left_out: list[str] | None = None) -> dict[str, Run]:
    """Key → run of the tasks that are finished; nothing is started.

    left_out: takes a sentence for each run that cannot be read, or whose weights, on which the ids
    of others depend, are gone.
    """
    runs: dict[str, Run] = {}
    for key, (config, needs) in tasks.items():
        if runs.keys() >= set(needs.values()):
            names = {field: runs[other].reference for field, other in needs.items()}
            try:
                if (run := _find(config.replace(**names))) and run.config and run.summary:
                    runs[key] = run
            except RunError as error:
                if left_out is not None:
                    left_out.append(str(error))
    return runs


def finished(grid: Sequence[Point], left_out: list[str] | None = None) -> list[tuple[Point, Run]]:
    """The points whose runs are all there, with the evaluation; nothing is started.

    Raises:
        ConfigError: as `plan`.
    """
    runs = find_runs(plan(grid), left_out)
    ends = [[*_chain(point)][-1][0] for point in grid]
    return [(point, runs[key]) for point, key in zip(grid, ends, strict=True) if key in runs]


def table(grid: Sequence[Point]) -> pd.DataFrame:
    """The tidy results of all points that are finished: their labels, then `results.results`; which
    runs are left out, since they cannot be read, is printed."""
    import pandas as pd

    damage: list[str] = []
    ends = [(point.labels, run, results.training_of(run) or run) for point, run in finished(grid)]
    runs = list(dict.fromkeys([run for _, run, _ in ends] + [run for *_, run in ends]))
    figures = results.results(runs, damage)
    if damage:
        print(*report_left_out(damage), sep="\n")
    labels = pd.DataFrame([{**labels, "training": run.id} for labels, _, run in ends])
    beside = [name for name in labels if name not in figures]
    return labels[["training", *beside]].merge(figures, on="training") if ends else figures


def missing(grid: Sequence[Point]) -> str:
    """Which points have no finished evaluation, how they come about, and what cannot be read."""
    left_out: list[str] = []
    present = [point for point, _ in finished(grid, left_out)]
    lacking = [
        " × ".join(str(v) for v in point.labels.values() if v) + f" (seed {point.ssl['seed']})"
        for point in grid
        if point not in present
    ]
    text = f"{len(lacking)} of {len(grid)} points are missing: {', '.join(lacking)}. "
    text = text + "They are made with launch = True." if lacking else "Every point has its runs."
    return "\n".join([text, *report_left_out(left_out)])


def vaes(grid: Sequence[Point]) -> str:
    """The names of the VAEs that finished points have, in a line."""
    trainings = [results.training_of(run) for _, run in finished(grid)]
    ids = dict.fromkeys(getattr(run.config, "vae", None) for run in trainings if run)
    names = [results.full_name(get("vae", name)) for name in ids if name]
    return f"vae: {'; '.join(names) or 'none yet'}"


# --- runs -----------------------------------------------------------------------------------------


def locate(config: Any) -> Run:
    """The run directory that a configuration of a VAE, an encoder or an evaluation leads to."""
    return (evaluation if config.stage == "eval" else train).locate(config)


def _find(config: ImagesConfig) -> Run | None:
    """The finished run of `config`. An evaluation with references serves where none are asked."""
    kinds = [config]
    if isinstance(config, EvalConfig) and not config.references:
        kinds.insert(0, config.replace(references=True))
    return next((run for run in map(locate, kinds) if run.finished), None)


def ensure(config: ImagesConfig) -> Run:
    """The finished run of `config`, made by its notebook under papermill if it is not there yet.

    A file lock beside the run holds over processes and machines: of two that want the same run the
    second waits, and finds it finished.

    Raises:
        RunError: the notebook failed; its executed copy lies in the run directory.
    """
    config = resolve_paths(config)
    run, notebook = locate(config), NOTEBOOKS[config.stage]
    run.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.path / ".sweep")
    while not _cancelled:
        with contextlib.suppress(Timeout), lock.acquire(timeout=1):
            while run.state["state"] == "going":  # a panel or a command trains it
                time.sleep(1)
            if not run.finished:
                _going.add(run)
                try:
                    execute(notebook, parameters(config), run.path / "notebook.ipynb")
                finally:
                    _going.discard(run)
            if not run.finished:
                raise RunError(f"{notebook} ended without finishing run {run.id}.")
            return run
    raise RunError(f"Run {run.id} was not started: the sweep was stopped.")


def execute(notebook: str, parameters: Mapping[str, Any], output: Path) -> Path:
    """Run `notebooks/<notebook>.ipynb` under papermill; `output` appears when it has succeeded.

    `parameters` are JSON values. A kernel that dies or does not start is tried once again.

    Raises:
        RunError: a failing cell, or a name that the notebook's configuration lacks.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # It warns of each knob, which the notebook itself accepts or refuses.
    logging.getLogger("papermill").setLevel(logging.ERROR)

    source = FOLDER / f"{notebook}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    running = output.with_name(f"{output.stem}.running.ipynb")
    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                str(source), str(running), dict(parameters), kernel_name="python3",
                progress_bar=False, cwd=str(FOLDER),
                # ipykernel warns of unencrypted TCP at every start (the port is this machine's) and
                # reports the interrupt that ends it; an error in a cell is raised all the same.
                extra_arguments=[f"--IPKernelApp.{o}" for o in ("log_level=CRITICAL", SWEEP)],
            )  # fmt: skip
        except PapermillExecutionError as error:
            failed = output.with_name(f"{output.stem}.failed.ipynb")
            running.replace(failed)
            raise RunError(f"{source.name} failed: {error.evalue} (see {failed})") from None
        except Exception as error:
            # The kernel, not the notebook: ports that collide, a kernel killed for memory.
            if attempt == 2:
                raise RunError(
                    f"The kernel of {source.name} died 2 times ({type(error).__name__}: "
                    f"{error}); what it had saved is kept in {output.parent}."
                ) from error
        else:
            break
    return running.replace(output)


@contextlib.contextmanager
def _shared_threads(jobs: int) -> Iterator[None]:
    """Kernels started inside share the processor: N kernels with all threads each fight for it."""
    before, cores = dict(os.environ), os.cpu_count() or 1
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ.update(before)


def folder_of(config: SweepConfig | CompareConfig) -> Path:
    """Where a study's table and figure belong, `outputs/<stage>/<id>/` (made).

    Named by its axes, whichever of the paper's figures they are of.
    """
    text = config.model_dump_json(exclude={"jobs", "device", "launch", "figure"})
    digest = hashlib.sha256(text.encode()).hexdigest()
    words = [config.stage, Path(config.dataset).name]
    words += [config.adversary] if isinstance(config, SweepConfig) else []
    folder = outputs_root() / config.stage / "-".join([*words, digest[:8]])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    return folder


# --- the command ----------------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """Perform the sweep file that is named; 1 if a run failed."""
    if len(words) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    began, path = time.monotonic(), RECIPES / f"{words[0]}.toml"
    path = path if path.exists() else Path(words[0])
    here = Path.cwd()  # papermill changes it, in whatever thread

    def say(text: str) -> None:
        print(f"[{clock(time.monotonic() - began)}] {text}", flush=True)

    try:
        sweep = tomllib.loads(path.read_text(encoding="utf-8"))
        print(f"{sweep.get('about', words[0])}\nOn {hardware()}.\n", flush=True)
        grid = [point for each in sweep.get("grids", []) for point in points(each)]
        studies = [SweepConfig(**fields) for fields in sweep.get("studies", [])]
        varied = [point for study in studies for point in sensitivity(study)]
        outcomes = perform_all(plan(grid + varied), sweep.get("jobs", 1))
        own = [Run(outputs_root() / key.partition("-")[0] / outcomes[key].id) for key in plan(grid)]
        notebooks = [run.path / "notebook.ipynb" for run in own]
        # "@vae" is the run of that stage of the last point of the grids.
        last = {f"@{run.stage}": run.reference for run in own}
        for name, fields in sweep.get("notebooks", {}).items():
            say(f"{name}.ipynb")
            values = {field: last.get(str(value), value) for field, value in fields.items()}
            notebooks.append(execute(name, values, outputs_root() / "notebooks" / f"{name}.ipynb"))
        for group in results.groups(table(grid)):
            print(f"\n{group.title}\n{group.table.to_string()}\n{group.protocols}")
        folders = [run.path / "figures" for run in own] + [*map(folder_of, studies)]
        figures = [path for folder in folders for path in sorted(folder.glob("*.png"))]
        for title, paths in (("Figures", figures), ("Executed notebooks", notebooks)):
            lines = [f"  {os.path.relpath(path, here)}" for path in paths if path.exists()]
            print(f"\n{title}:", *lines, sep="\n")
        check(outcomes)
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: the same command goes on from there.")
        return 130
    except (UserError, OSError, tomllib.TOMLDecodeError) as error:
        print(f"\n{words[0]}: {error}", file=sys.stderr)
        return 1
    say("Done. To open the notebooks:  make lab")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
