"""Many runs: `perform` makes one of a plan's, `perform_all` all of them.

    python -m idaa_lib.sweeps [options] GRID     # a file of idaa_lib/recipes/sweeps, or a path

    --dry-run          say what is to be made, what it takes, and what is refused; make nothing
    --retry            make those runs again that failed, and what waits for them; nothing else
    --jobs N           notebooks that run at a time, in place of the grid's
    --scheduler URL    of a Dask cluster, whose workers make the runs: tcp://host:8786

A run is made by its notebook under papermill (01 a VAE, 03 an encoder, 04 its evaluation, 09 its
transfer), which is kept in the run directory. Only that directory says whether the run is finished:
a killed kernel leaves every cell marked "completed". So what is finished costs nothing, and what
was interrupted goes on. `perform` can be pickled: joblib runs it in threads, Dask on a cluster or
SLURM.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from idaa_lib import results
from idaa_lib.configs import CompareConfig, ConfigError, ImagesConfig, SweepConfig, UserError
from idaa_lib.configs.lookups import remember
from idaa_lib.configs.reading import quote
from idaa_lib.grids import STAGES, Grid, Point, read
from idaa_lib.kernels import FOLDER, execute, find_leftovers
from idaa_lib.plans import (
    Task,
    admit,
    check_files,
    find_chains,
    find_finished,
    find_runs,
    is_whole,
    locate,
    name_needs,
    outline,
    plan,
    refuse,
    table,
)
from idaa_lib.runs import NOTEBOOKS, Run, RunError, outputs_root, parameters, write_json
from idaa_lib.runs.files import make_folder
from idaa_lib.runs.machine import hardware, repeat, resolve_paths
from idaa_lib.runs.progress import Lines, Tally, clock


class Outcome(NamedTuple):
    """What became of a task: the run's id, `finished`, `failed` or `left out`, a sentence why, and
    the seconds that it took, 0 if it was there already."""

    id: str
    state: str
    error: str | None = None
    seconds: float = 0.0


def perform_all(
    tasks: Mapping[str, Task],
    jobs: int = 1,
    show: Callable[[Mapping[str, Outcome]], object] = len,
    *,
    scheduler: str | None = None,
    retry: bool = False,
    lines: Lines | None = None,
    kernels: Kernels | None = None,
) -> dict[str, Outcome]:
    """Key → outcome of all tasks, `jobs` at a time; one that fails stops only those that need it.

    How it goes is printed, and `show` is called with all outcomes so far whenever there are more.
    An encoder is judged at once, so that its figures are there while others train. An interrupt
    ends it as `Kernels.cancel`; what workers of a cluster have begun they finish.

    Args:
        scheduler: of a Dask cluster, whose workers make the runs (`joblib.parallel_config`, where
            it names another backend than threads, holds too). retry: make those alone that failed,
            and what needs them. lines: which show how it goes. kernels: by which another thread
            may cancel it.
    Raises:
        ConfigError: as `refuse`, before anything starts.
    """
    kernels = kernels or Kernels()
    refuse(tasks)
    runs = find_runs(tasks)
    whole = {key: run for key, run in runs.items() if is_whole(run)}
    outcomes = {key: Outcome(run.reference, "finished") for key, run in whole.items()}
    if retry:
        again = find_failures(tasks, runs)
        tasks = {key: task for key, task in tasks.items() if key in outcomes or key in again}
    tally = Tally({key: task.config for key, task in tasks.items()}, jobs, kernels.runs)
    lines = lines or Lines(30.0)

    def line() -> tuple[float, str]:
        return tally.line({key: outcome.state for key, outcome in list(outcomes.items())})

    try:
        calls = _workers(jobs, scheduler, kernels)
        with calls as call, repeat(1.0, lambda: lines.show(*line())):
            while chains := _ready(tasks, outcomes):
                for news in call(chains, outcomes):
                    outcomes |= news
                    for key, outcome in news.items():
                        if outcome.state == "finished" and outcome.seconds:
                            tally.add(tasks[key].config, outcome.seconds)
                        if outcome.error or outcome.seconds:
                            print(f"{outcome.id}: {outcome.error or outcome.state}", flush=True)
                    lines.show(*line())
                    show(outcomes)
        lines.show(*line(), last=True)
    except BaseException:
        kernels.cancel()
        raise
    return outcomes


@contextlib.contextmanager
def _workers(
    jobs: int, scheduler: str | None, kernels: Kernels
) -> Iterator[Callable[..., Iterator[Any]]]:
    """A function of chains and of the outcomes that they need, which gives the outcomes of each
    chain as it ends. Kernels of this machine share its threads: N with all of them each would fight
    for the processor."""
    import joblib

    with contextlib.ExitStack() as stack:
        submit = stack.enter_context(_dask(scheduler)) if scheduler else None
        if not submit and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
            stack.callback(os.environ.pop, "OMP_NUM_THREADS")

        def call(chains: Any, outcomes: Mapping[str, Outcome]) -> Iterator[dict[str, Outcome]]:
            needs = [{k for t in chain.values() for k in t.needs.values()} for chain in chains]
            there = [{key: outcomes[key] for key in keys & outcomes.keys()} for keys in needs]
            if submit:
                return submit(chains, there)
            work = joblib.Parallel(
                n_jobs=jobs, prefer="threads", batch_size=1, return_as="generator_unordered"
            )
            make = itertools.repeat(kernels.ensure)
            return work(map(joblib.delayed(_perform), chains, there, make))

        yield call


@contextlib.contextmanager
def _dask(scheduler: str) -> Iterator[Callable[..., Iterator[dict[str, Outcome]]]]:
    """A function of chains and of what each needs, as `_workers` has it, on a Dask cluster. A chain
    that the cluster gives up, since each worker that began it died, is a failure like others."""
    try:
        from distributed import Client, as_completed

        client = Client(scheduler)
    except ImportError:
        raise ConfigError(
            f"scheduler={quote(scheduler)} needs Dask, which is not installed: pip install "
            f"distributed."
        ) from None
    except Exception as error:  # an address that is none; nobody answers there
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ConfigError(
            f"scheduler={quote(scheduler)} is no Dask scheduler that answers ({reason}): give its "
            f"address, such as tcp://host:8786."
        ) from error

    def submit(chains: Any, there: Any) -> Iterator[dict[str, Outcome]]:
        calls = [functools.partial(_perform, *each) for each in zip(chains, there, strict=True)]
        futures = {client.submit(call, pure=False): call for call in calls}
        for future in as_completed(futures):
            try:
                yield future.result()
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"

                def give_up(config: ImagesConfig, reason: str = reason) -> Run:
                    raise RunError(f"The cluster gave it up ({reason}).")

                yield futures[future](give_up)

    with client:
        yield submit


def _ready(tasks: Mapping[str, Task], outcomes: Mapping[str, Outcome]) -> list[dict[str, Task]]:
    """The tasks that can begin now, each followed by those that wait for it alone."""
    waiting: dict[str, list[str]] = {}
    for key, task in tasks.items():
        for other in task.needs.values():
            waiting.setdefault(other, []).append(key)
    chains = []
    for key, task in tasks.items():
        if key not in outcomes and outcomes.keys() >= set(task.needs.values()):
            chains.append(chain := {key: task})
            while len(next_ := waiting.get([*chain][-1], [])) == 1:
                chain[next_[0]] = tasks[next_[0]]
    return chains


def _perform(
    chain: Mapping[str, Task],
    outcomes: Mapping[str, Outcome],
    make: Callable[[ImagesConfig], Run] | None = None,
) -> dict[str, Outcome]:
    """The outcomes of tasks of which each needs none but the one before and `outcomes`; `make` as
    `perform` takes it."""
    news: dict[str, Outcome] = {}
    for key, task in chain.items():
        needs = {f: news.get(other) or outcomes[other] for f, other in task.needs.items()}
        if lacks := [need for need in needs.values() if need.state != "finished"]:
            reason = f"It needs {lacks[0].id}, which {lacks[0].state}."
            news[key] = Outcome(key, "left out", reason)
        else:
            config = task.config.replace(**{f: need.id for f, need in needs.items()})
            news[key] = perform(config, make)
    return news


def perform(config: ImagesConfig, make: Callable[[ImagesConfig], Run] | None = None) -> Outcome:
    """What became of the run of `config`, which is made if it is not there (by `make`, else by
    `ensure`). An error that a user can mend is an Outcome that failed, so that other runs go on."""
    name, start = config.stage, time.monotonic()
    try:
        run = find_finished(config) or locate(config)
        name = run.id
        if run.finished:
            check_files(run)
        if is_whole(run):
            return Outcome(run.reference, "finished")
        run = (make or ensure)(config)
        return Outcome(run.reference, "finished", None, time.monotonic() - start)
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Outcome(name, "failed", f"{kind}{error}")


def find_failures(tasks: Mapping[str, Task], runs: Mapping[str, Run]) -> dict[str, str]:
    """Key → id of tasks whose notebook failed, and of those that need one of them, whose id is not
    known yet and is their key; `runs` are those that are finished."""
    ids: dict[str, str] = {}
    for key, (config, needs) in tasks.items():
        others = set(needs.values())
        if others & ids.keys():
            ids[key] = key
        elif others <= runs.keys():
            with contextlib.suppress(UserError):  # a run that is damaged
                run = runs.get(key) or locate(name_needs(config, needs, runs))
                if find_leftovers(run.path / "notebook.ipynb")[1].exists():
                    ids[key] = run.id
    return ids


def check(outcomes: Mapping[str, Outcome]) -> None:
    """Raises a RunError that names each run that is not finished, and says why."""
    lines = [f"{o.id} {o.state}: {o.error}" for o in outcomes.values() if o.error]
    if lines:
        raise RunError(
            f"{len(lines)} of {len(outcomes)} are missing (what is finished is kept):\n"
            + "\n".join(lines)
        )


# --- runs -----------------------------------------------------------------------------------------


class Kernels:
    """The kernels that make the runs of a sweep in this process.

    Fields:
        runs: that they make now. cancelled: whether none may start any more.
    """

    def __init__(self) -> None:
        self.runs, self.cancelled = set[Run](), False

    def ensure(self, config: ImagesConfig) -> Run:
        """As the function `ensure`; a RunError once the sweep is cancelled."""
        config = resolve_paths(config)
        run = find_finished(config) or locate(config)
        make_folder(run.path)
        lock, output = FileLock(run.path / ".sweep"), run.path / "notebook.ipynb"
        while not self.cancelled:
            with contextlib.suppress(Timeout), lock.acquire(timeout=1):
                if run.state["state"] == "going":  # a panel, a command or a killed sweep's kernel
                    time.sleep(1)
                    continue
                if not is_whole(run):
                    self.runs.add(run)
                    try:
                        values = parameters(run.config if run.finished else config)
                        execute(NOTEBOOKS[config.stage], values, output)
                    finally:
                        self.runs.discard(run)
                if not run.finished:
                    raise RunError(f"Run {run.id} was not finished by its notebook, {output}.")
                return run
        raise RunError(f"Run {run.id} was not started: the sweep was stopped.")

    def cancel(self) -> None:
        """Stop the runs under way after their step, wait until they are saved, and start no
        more."""
        self.cancelled = True
        # Again and again: a kernel that is still starting forgets what was asked before its run.
        while self.runs:
            for run in set(self.runs):
                run.ask("stop")
            time.sleep(0.5)


def ensure(config: ImagesConfig) -> Run:
    """The finished run of `config`, made by its notebook under papermill if it is not there yet; of
    a run that was killed between its summary and the end of its notebook the rest is made.

    A file lock beside the run holds over processes and machines: of two that want the same run the
    second waits, and finds it finished.

    Raises:
        RunError: the notebook failed; its executed copy lies in the run directory.
    """
    return Kernels().ensure(config)


def folder_of(config: SweepConfig | CompareConfig) -> Path:
    """Where a study's table and figure belong, `outputs/<stage>/<id>/` (made).

    Named by its axes, whichever of the paper's figures they are of.
    """
    silent = {"jobs", "device", "launch", "figure"}
    silent |= set() if getattr(config, "grid", None) else {"grid"}
    digest = hashlib.sha256(config.model_dump_json(exclude=silent).encode()).hexdigest()
    words = [config.stage, Path(config.dataset).name]
    words += [config.adversary] if isinstance(config, SweepConfig) else []
    folder = outputs_root() / config.stage / "-".join([*words, digest[:8]])
    make_folder(folder)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    return folder


# --- the command ----------------------------------------------------------------------------------


def _check_notebooks(grid: Grid) -> None:
    """Raises a ConfigError where a further notebook of a grid could not be run after its runs."""
    there = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    stages = {*grid.stages}.union(*(Grid(**part).stages for part in grid.grids))
    runs = [f"@{stage}" for stage in STAGES if stage in stages]
    for name, fields in grid.notebooks.items():
        if name not in there:
            raise ConfigError(
                f"notebooks names {quote(name)}, which is none of notebooks/: {', '.join(there)}."
            )
        for field, value in fields.items():
            if str(value).startswith("@") and value not in runs:
                raise ConfigError(
                    f"{field} of notebook {name} is {quote(value)}, and must be one of "
                    f"{', '.join(runs)}: the run of that stage of the last point."
                )


def _execute(name: str, fields: Mapping[str, Any], points: Sequence[Point]) -> Outcome:
    """What became of a further notebook; "@vae" among its fields is the VAE of the last point that
    is finished and has one."""
    last = {f"@{run.stage}": run.reference for _, chain in find_chains(points) for run in chain}
    values = {field: last.get(str(value), value) for field, value in fields.items()}
    if lacks := [value for value in values.values() if str(value).startswith("@")]:
        reason = f"It needs {lacks[0]}, of which no run is finished."
        return Outcome(f"{name}.ipynb", "left out", reason)
    try:
        execute(name, values, outputs_root() / "notebooks" / f"{name}.ipynb")
    except (UserError, OSError) as error:
        return Outcome(f"{name}.ipynb", "failed", str(error))
    return Outcome(f"{name}.ipynb", "finished")


def _print_results(
    points: Sequence[Point], name: str, runs: Sequence[Run], notebooks: Sequence[Path]
) -> None:
    """Save and print the table of a grid, and print where its files lie."""
    frame = table(points)
    for group in results.groups(frame):
        print(f"\n{group.title}\n{group.table.to_string()}\n{group.protocols}")
    files = {
        "Tables": results.save(frame, outputs_root() / "sweeps" / name),
        "Figures": [path for run in runs for path in sorted((run.path / "figures").glob("*.png"))],
        "Executed notebooks": [*(run.path / "notebook.ipynb" for run in runs), *notebooks],
    }
    for title, paths in files.items():
        lines = [f"  {os.path.relpath(path)}" for path in paths if path.exists()]
        more = [f"  … and {len(lines) - 30} more beside them"] * (len(lines) > 30)
        print(f"\n{title}:", *lines[:30], *more, sep="\n")


def main(words: Sequence[str]) -> int:
    """Perform the grid that is named: 1 if a run failed or was refused, 2 if nothing could
    start. What is refused is named before the others start, and again at the end."""
    about, _, flags = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m idaa_lib.sweeps", description=about, epilog=flags,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("grid", metavar="GRID")
    for flag in ("--dry-run", "--retry"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--scheduler", metavar="URL")
    options = parser.parse_args(words)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{clock(time.monotonic() - began)}] {text}", flush=True)

    try:
        if options.jobs is not None and options.jobs < 1:
            raise ConfigError(f"--jobs must be 1 or more, and is {options.jobs}.")
        grid = read(options.grid)
        _check_notebooks(grid)
        jobs = options.jobs or grid.jobs
        with remember():
            points, refusal = admit(grid.points())
            if not points:
                raise ConfigError(refusal)
            print(f"{grid.about or options.grid}\nOn {hardware()}.\n")
            print("\n".join(filter(None, (outline(points, jobs), refusal))), flush=True)
            tasks = plan(points)
            if options.dry_run:
                if options.retry:
                    again = find_failures(tasks, find_runs(tasks)).values()
                    print(f"To be made again: {', '.join(again) or 'none'}.")
                return 1 if refusal else 0
        outcomes = perform_all(tasks, jobs, scheduler=options.scheduler, retry=options.retry)
        for name, fields in grid.notebooks.items():
            say(f"{name}.ipynb")
            outcomes[name] = _execute(name, fields, points)
        finished = [n for n in grid.notebooks if outcomes[n].state == "finished"]
        others = [outputs_root() / "notebooks" / f"{name}.ipynb" for name in finished]
        _print_results(points, Path(options.grid).stem, [*find_runs(tasks).values()], others)
        if refusal:
            print(f"\n{options.grid}: {refusal}", file=sys.stderr)
        check(outcomes)
        if absent := len(tasks.keys() - outcomes.keys()):
            raise RunError(
                f"{absent} of {len(tasks)} runs are missing that did not fail: the same command "
                f"without --retry makes them."
            )
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: the same command goes on from there.")
        return 130
    except ConfigError as error:
        print(f"\n{options.grid}: {error}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"\n{options.grid}: {error}", file=sys.stderr)
        return 1
    say("Done. To open the notebooks:  make lab")
    return 1 if refusal else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
