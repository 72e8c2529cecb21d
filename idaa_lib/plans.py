"""Plans: which runs a grid takes, what stands in their way, and which of them are there.

Only a run's directory says whether the run is finished, so nothing here is started or stored.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from idaa_lib import results, train
from idaa_lib.configs import (
    ConfigError,
    EvalConfig,
    ImagesConfig,
    TrainingConfig,
    TransferConfig,
    UserError,
)
from idaa_lib.configs.lookups import remember
from idaa_lib.configs.reading import quote
from idaa_lib.evaluate import stage as evaluation
from idaa_lib.evaluate import transfer
from idaa_lib.evaluate.encoders import judged_on, open_splits
from idaa_lib.grids import STAGES, Point
from idaa_lib.kernels import find_leftovers
from idaa_lib.runs import CONFIGS, Run, RunError, get, read_json, report_left_out
from idaa_lib.runs.machine import resolve_paths, torch_device
from idaa_lib.runs.progress import Tally

if TYPE_CHECKING:
    import pandas as pd

# Stage → its field that names a run → the stage of that run.
NEEDS = {"vae": {}, "ssl": {"vae": "vae"}, "eval": {"run": "ssl"}, "transfer": {"run": "ssl"}}


class Task(NamedTuple):
    """A run to be: its configuration, and what it needs: field → the key of another task, whose
    run the field will name."""

    config: ImagesConfig
    needs: dict[str, str]


def plan(grid: Sequence[Point]) -> dict[str, Task]:
    """Key → task, each after those that it needs; what two points share is there once.

    A key names a configuration. A run's id cannot: an encoder's depends on the weights of its VAE,
    which are not there before it is trained.

    Raises:
        ConfigError: points that cannot be run, and why.
    """
    return {key: task for chain in _chains(grid) for key, task in chain.items()}


def _chains(grid: Sequence[Point]) -> list[dict[str, Task]]:
    """The tasks of each point, each after those that it needs. Raises as `plan`."""
    pairs, reasons = _try_chains(grid)
    if reasons:
        raise ConfigError(_name_refused(reasons, len(grid)))
    return [chain for _, chain in pairs]


def _try_chains(
    grid: Sequence[Point],
) -> tuple[list[tuple[Point, dict[str, Task]]], dict[str, list[str]]]:
    """The points that can be configured with their tasks; reason → names of the others."""

    @functools.cache
    def configure(stage: str, fields: str) -> Any:
        config: Any = CONFIGS[stage](**json.loads(fields))
        return resolve_paths(config)

    pairs, reasons = [], dict[str, list[str]]()
    for point in grid:
        try:
            pairs.append((point, _chain(point, configure)))
        except ConfigError as error:
            reasons.setdefault(str(error), []).append(point.name)
    return pairs, reasons


def _chain(point: Point, configure: Callable[[str, str], Any]) -> dict[str, Task]:
    """The tasks of a point. An adversary without a VAE, or with one that is named, needs none."""
    stages = [stage for stage in STAGES if getattr(point, stage) is not None]
    texts = {s: json.dumps(getattr(point, s), sort_keys=True, default=str) for s in stages}
    configs = {stage: configure(stage, text) for stage, text in texts.items()}
    if "ssl" in configs and (not configs["ssl"].needs_vae or configs["ssl"].vae):
        configs.pop("vae", None)
    keys, chain = dict[str, str](), dict[str, Task]()
    for stage, config in configs.items():
        needs = {field: keys[other] for field, other in NEEDS[stage].items() if other in keys}
        if field := next((field for field in needs if getattr(config, field)), None):
            other = NEEDS[stage][field]
            raise ConfigError(
                f"{stage} names {field}={quote(getattr(config, field))}, and each point has stage "
                f"{other} for it: leave {field} out, or {other} out of stages."
            )
        if stage == "ssl" and "vae" in configs:
            train.check_vae(config, configs["vae"], "the VAE of the grid")
        text = json.dumps([config.model_dump(mode="json"), needs], sort_keys=True)
        keys[stage] = f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        chain[keys[stage]] = Task(config, needs)
    return chain


def _name_refused(reasons: Mapping[str, Sequence[str]], total: int) -> str:
    """A sentence with each reason and what cannot be made for it; empty where there is none."""
    lines = [
        f"{reason} ({', '.join(names[:3])}{f', {len(names) - 3} more' * (len(names) > 3)})"
        for reason, names in reasons.items()
    ]
    count = sum(map(len, reasons.values()))  # points of one name are several
    return f"{count} of {total} cannot be made: " + "\n".join(lines) if reasons else ""


def admit(grid: Sequence[Point]) -> tuple[list[Point], str]:
    """The points that can be made here, and a sentence that names the others and says why, empty
    where there are none."""
    pairs, reasons = _try_chains(grid)
    refusals = _find_refusals({key: task for _, chain in pairs for key, task in chain.items()})
    points = []
    for point, chain in pairs:
        if reason := next((refusals[key] for key in chain if key in refusals), None):
            reasons.setdefault(reason, []).append(point.name)
        else:
            points.append(point)
    return points, _name_refused(reasons, len(grid))


def refuse(tasks: Mapping[str, Task]) -> None:
    """Raises a ConfigError that names all tasks that cannot be made here, and says why."""
    reasons: dict[str, list[str]] = {}
    for key, reason in _find_refusals(tasks).items():
        reasons.setdefault(reason, []).append(key)
    if reasons:
        raise ConfigError(_name_refused(reasons, len(tasks)))


def _find_refusals(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Key → why a task cannot be made here, of those that cannot."""
    reasons = {}
    with remember():
        for key in tasks:
            try:
                _check(key, tasks)
            except UserError as error:
                reasons[key] = str(error)
    return reasons


def _check(key: str, tasks: Mapping[str, Task]) -> None:
    """Raises a UserError where a task cannot be made here: images that cannot be read, or have no
    labels to judge by, a device, a tracker or a run that is not there, too little memory."""
    config, needs = tasks[key]
    torch_device(config.device)
    if isinstance(config, TrainingConfig):
        train.check_start(config)
        if name := config.continue_from:
            get(config.stage, name)
    if not needs:
        locate(config)  # which reads the runs that it names
    elif "run" in needs:
        training: Any = tasks[needs["run"]].config

        def reading(dataset: str) -> dict[str, Any]:
            return (training.reading if dataset == training.dataset else {}) | config.reading

        if isinstance(config, EvalConfig):
            dataset = config.dataset or judged_on(training.dataset)
            open_splits(dataset, training.size, config.limit, **reading(dataset))
        elif isinstance(config, TransferConfig):
            transfer.open_targets(config, training, reading)


# --- what is there -------------------------------------------------------------------------------


def locate(config: Any) -> Run:
    """The run directory that a configuration of a VAE, an encoder or a judgement of one leads
    to."""
    return {"eval": evaluation, "transfer": transfer}.get(config.stage, train).locate(config)


def find_finished(config: ImagesConfig) -> Run | None:
    """The finished run of `config`. An evaluation with references serves where none are asked."""
    if (run := locate(config)).finished:
        return run
    if isinstance(config, EvalConfig) and not config.references:
        return find_finished(config.replace(references=True))
    return None


def is_whole(run: Run) -> bool:
    """Whether a run is finished, and no notebook of it was killed or failed before its end."""
    return run.finished and not any(p.exists() for p in find_leftovers(run.path / "notebook.ipynb"))


def check_files(run: Run) -> None:
    """Raises a RunError where a finished run cannot be read."""
    for name in ("summary.json", "config.json"):
        if not read_json(run.path / name):
            raise RunError(
                f"{run.path / name} is damaged (it is empty): delete the folder {run.path}, so "
                f"that the run is made again."
            )
    _ = run.config  # which reads its environment too


def find_runs(tasks: Mapping[str, Task], left_out: list[str] | None = None) -> dict[str, Run]:
    """Key → run of the tasks that are finished; nothing is started.

    left_out: takes a sentence for each run that cannot be read, or whose weights, on which the ids
    of others depend, are gone.
    """
    runs: dict[str, Run] = {}
    with remember():
        for key, (config, needs) in tasks.items():
            if runs.keys() >= set(needs.values()):
                try:
                    if run := find_finished(name_needs(config, needs, runs)):
                        check_files(run)
                        runs[key] = run
                except RunError as error:
                    if left_out is not None:
                        left_out.append(str(error))
    return runs


def name_needs(config: ImagesConfig, needs: Mapping[str, str], runs: Mapping[str, Run]) -> Any:
    return config.replace(**{field: runs[other].reference for field, other in needs.items()})


def find_points(
    grid: Sequence[Point], left_out: list[str] | None = None
) -> list[tuple[Point, Run]]:
    """The points whose runs are all there, with the last of them, their evaluation; nothing is
    started.

    Raises:
        ConfigError: as `plan`.
    """
    return [(point, runs[-1]) for point, runs in find_chains(grid, left_out)]


def find_chains(
    grid: Sequence[Point], left_out: list[str] | None = None
) -> list[tuple[Point, list[Run]]]:
    """The same points with all of their runs, each after those that it needs."""
    chains = _chains(grid)
    runs = find_runs({key: task for chain in chains for key, task in chain.items()}, left_out)
    pairs = zip(grid, chains, strict=True)
    return [(p, [runs[k] for k in chain]) for p, chain in pairs if chain.keys() <= runs.keys()]


def table(grid: Sequence[Point]) -> pd.DataFrame:
    """The tidy results of all points that are finished: their labels, then `results.results`; which
    runs are left out, since they cannot be read, is printed."""
    import pandas as pd

    damage, rows = list[str](), dict[tuple[str, str], dict[str, Any]]()
    runs: dict[Run, None] = {}
    for point, chain in find_chains(grid, damage):
        # A VAE stands for itself where nothing was trained with it.
        own = [run for run in reversed(chain) if run.stage != "vae"] or chain
        runs |= dict.fromkeys(own)
        rows |= {(repr(point.labels), run.id): point.labels | {"run": run.id} for run in own}
    figures = results.results([*runs], damage)
    if damage:
        print(*report_left_out(damage), sep="\n")
    if not rows:
        return figures
    labels = pd.DataFrame([*rows.values()], dtype=object)  # a whole number stays one
    labels = labels[["run", *(name for name in labels if name not in figures)]]
    # One run may be several points, such as that without an adversary of several VAEs.
    return labels[~labels.astype(str).duplicated()].merge(figures, on="run")


def vaes(grid: Sequence[Point]) -> str:
    """The names of the VAEs that finished points have, in a line."""
    return _name_vaes(run for _, runs in find_chains(grid) for run in runs)


def _name_vaes(runs: Iterable[Run]) -> str:
    ids = dict.fromkeys(getattr(run.config, "vae", None) for run in runs)
    names = [results.full_name(get("vae", name)) for name in ids if name]
    return f"vae: {'; '.join(names) or 'none yet'}"


def outline(grid: Sequence[Point], jobs: int) -> str:
    """What is to be made before it starts: how many runs, how long they take and how much disk, by
    the runs so far; which VAEs there are, which points are missing, and what cannot be read.

    Raises:
        ConfigError: as `plan` and `refuse`.
    """
    chains, left_out = _chains(grid), list[str]()
    tasks = {key: task for chain in chains for key, task in chain.items()}
    refuse(tasks)
    runs = find_runs(tasks, left_out)
    tally = Tally({key: task.config for key, task in tasks.items()}, jobs)
    missing = [p.name for p, chain in zip(grid, chains, strict=True) if chain.keys() - runs.keys()]
    lines = [f"{len(grid)} points take {tally.plan(runs)}", _name_vaes(runs.values())]
    if missing:
        more = f", {len(missing) - 12} more" * (len(missing) > 12)
        names = ", ".join(missing[:12]) + more
        lines.append(f"{len(missing)} of {len(grid)} points are missing: {names}.")
    return "\n".join([*lines, *report_left_out(left_out)])
