"""Which run is meant: by its id, by the last eight characters of it, by its path, or by None.

None means the first of the finished runs that fit: one whose network can be opened here comes
before one that was pruned or whose method or backbone nobody has registered, then one that a person
started before one that a sweep made, then what was started last. Of a sweep's own those come first
that differ least from their recipe: the others are what it varied. The times are stored
(`Run.starts`), so a copy of `outputs/` changes nothing.

`starter` (and of encoders `starter2`) names a run that ships in data/starter. None never means it,
except where pictures and studies of identity find no VAE of the user's own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from idaa_lib.configs import ConfigError, ImagesConfig, TrainingConfig
from idaa_lib.configs.reading import expand
from idaa_lib.data.places import STARTER
from idaa_lib.runs import checkpoints
from idaa_lib.runs.directory import CONFIGS, NOTEBOOKS, Run, list_runs, outputs_root
from idaa_lib.runs.files import RunError
from idaa_lib.runs.machine import open_images


def find(
    stage: str, *, finished: bool = True, left_out: list[str] | None = None, **values: Any
) -> list[Run]:
    """Runs of a stage whose configuration has these values, the one that None means first.

    A `dataset`, and its `classes`, are compared by content (`has_images`): a folder may have been
    moved. Runs that are damaged or of another version of the library are left out.

    Args:
        left_out: takes a sentence for each of those.
    """
    _check_stage(stage)
    if lost := [name for name in values if CONFIGS[stage]._owner(name) is None]:
        raise RunError(f"A {stage} run has no field {lost[0]!r}{CONFIGS[stage]._closest(lost[0])}.")
    by_content = {"dataset", "classes"} if "dataset" in values else set()
    images = {name: value for name, value in values.items() if name in by_content}
    plain = {name: value for name, value in values.items() if name not in by_content}
    fingerprint, runs = functools.cache(_fingerprint), []  # many runs are of one set of images
    for run in list_runs(stage):
        try:
            config = run.config
            fits = all(getattr(config, name, None) == value for name, value in plain.items())
            if not fits or (finished and not run.finished):
                continue
            if not images or has_images(run, **images, fingerprint=fingerprint):
                runs.append(run)
        except RunError as error:
            if left_out is not None:
                left_out.append(f"{run.id}: {error}")
    return sorted(runs, key=_order)


def _check_stage(stage: str) -> None:
    if stage not in CONFIGS:
        raise RunError(f"There is no stage {stage!r}; there are {', '.join(CONFIGS)}.")


def _order(run: Run) -> tuple[bool, bool, int, float]:
    """Places a run by the rule; its configuration is sound."""
    closed = issubclass(CONFIGS[run.stage], TrainingConfig) and bool(_find_lack(run))
    if (person := run.starts.get("person")) is not None:
        return closed, False, 0, -person
    config = run.config
    changes = config.list_changes().keys() - config.circumstances - config.pointers
    return closed, True, len(changes), -max(run.starts.values(), default=0.0)


def _find_lack(run: Run) -> str:
    """Why the network of a training cannot be opened here, a sentence; empty where it can."""
    if not checkpoints.are_there(run):
        return "its weights are gone."
    try:
        for choice in ("method", "backbone"):
            if choice in type(run.config).model_fields:
                run.config.get_chosen(choice)
    except ConfigError as error:  # a class of the user's own, which this process does not know
        return str(error)
    return ""


def usable(stage: str, left_out: list[str] | None = None, **values: Any) -> list[Run]:
    """Those of `find` whose network can be opened here; `left_out` takes the others too."""
    lacks = {run: _find_lack(run) for run in find(stage, left_out=left_out, **values)}
    if left_out is not None:
        left_out += [f"{run.id}: {lack}" for run, lack in lacks.items() if lack]
    return [run for run, lack in lacks.items() if not lack]


def report_left_out(sentences: Iterable[str]) -> list[str]:
    """A line for each of the first three, and how many more there are."""
    lines = [f"Left out: {sentence}" for sentence in dict.fromkeys(sentences)]
    more = [f"Left out: {len(lines) - 3} more, which notebook 00 shows."]
    return lines[:3] + more * (len(lines) > 3)


def first(candidates: list[Run]) -> Run | None:
    """The first one whose weights are as they were written; None where there is none."""
    return next((run for run in candidates if checkpoints.are_whole(run)), None)


def list_starter(stage: str) -> list[Run]:
    """The runs of a stage that ship with the library and are as they shipped, the one to take
    first."""
    ships = []
    for run in map(Run, sorted((STARTER / stage).glob("starter*"))):
        with contextlib.suppress(RunError):  # its configuration cannot be read
            if run.config and checkpoints.are_there(run):
                ships.append(run)
    return ships


def get(stage: str, name: Run | Path | str | None, **values: Any) -> Run:
    """The finished run that a name or a path means; None means the best that has these values.

    Raises:
        RunError: there is none, or it is not finished.
    """
    _check_stage(stage)
    notebook = NOTEBOOKS[stage]
    if name is None:
        candidates = find(stage, **values)
        if not candidates:
            wish = " and ".join(f"{k}={v}" for k, v in values.items() if v != "")
            raise RunError(
                f"There is no finished {stage} run{' with ' + wish if wish else ''} under "
                f"{outputs_root() / stage}: make one with notebooks/{notebook}.ipynb."
            )
        return first(candidates) or candidates[0]
    if isinstance(name, Run):
        run = name
    elif isinstance(name, Path) or os.sep in name:
        run = Run(Path(os.path.realpath(expand(name))))
    else:
        folder, starter = outputs_root() / stage, STARTER / stage / name
        end = name.zfill(8) if name.isdecimal() else name  # papermill makes 1 of 00000001
        ends = [*folder.glob(f"*-{end}")] if re.fullmatch("[0-9a-f]{8}", end) else []
        ends += [starter] * (starter / "config.json").is_file()
        run = Run(ends[0] if ends else folder / name)
    if not os.path.isfile(run.path / "config.json"):
        raise RunError(f"There is no {stage} run {run.id!r} at {run.path}.")
    if run.stage != stage:
        raise RunError(
            f"{run.path} is a run of stage {run.stage!r}, and one of {stage!r} is needed."
        )
    if not run.finished:
        raise RunError(
            f"Run {run.id} is {run.state['state']}, not finished: start it again with "
            f"notebooks/{notebook}.ipynb (it goes on from its last checkpoint)."
        )
    return run


def encoder(name: Run | Path | str | None) -> Run:
    """The finished run whose encoder is meant: of stage ssl, or semi where the name says so.

    Raises: as `get`.
    """
    stage = name.stage if isinstance(name, Run) else Path(name or "").name.partition("-")[0]
    semi = stage == "semi" or any((outputs_root() / "semi").glob(f"*-{stage or '-'}"))
    return get("semi" if semi else "ssl", name)


def images_of(training: Run, field: str = "dataset") -> str:
    """The data set that a training read, for a stage whose `field` names none.

    Raises:
        ConfigError: its folder or zip is not there any more.
    """
    dataset = str(training.config.dataset)
    if os.sep in dataset and not os.path.exists(dataset):
        raise ConfigError(
            f"Run {training.id} was trained on {dataset}, which is not there any more: say where "
            f"its images are now, {field}=<new place>."
        )
    return dataset


def has_images(run: Run, dataset: str, classes: str = "", *, fingerprint: Any = None) -> bool:
    """Whether a training read images of `dataset` (of its class folders `classes` alone), by
    content. By name where nobody can look: the images, or what the run says of them, are gone."""
    config, content = run.config, None
    stored = run.environment.get("dataset", {}).get("fingerprint")
    if isinstance(config, TrainingConfig) and stored is not None:
        part = config.split, config.source_size or config.size, config.limit
        reading = config.reading | {"classes": classes}
        content = (fingerprint or _fingerprint)(dataset, *part, **reading)
    if content is None:
        return (config.dataset, getattr(config, "classes", "")) == (dataset, classes)
    return content == stored


def _fingerprint(dataset: str, *part: Any, **reading: Any) -> str | None:
    try:
        return open_images(dataset, *part, **reading).fingerprint
    except ConfigError:
        return None


def reading_of(config: ImagesConfig, training: Run, dataset: str) -> dict[str, Any]:
    """Arguments of `load` for a stage that reads `dataset`: those that its own fields set, then, of
    a training on the same images, that one's."""
    about = training.config
    own = {name: value for name, value in about.reading.items() if value != ""}
    # Most trainings have none, and to compare images means to decode them at the training's size.
    if own and not has_images(training, dataset, about.classes):
        own = {}
    return own | config.reading
