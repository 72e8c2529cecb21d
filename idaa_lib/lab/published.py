"""The paper's tables of few labels, transfer and detection, of all finished runs that compare.

Runs stand in one table where they are of one stage, on the same data and under one configuration,
but for what its rows and columns say (`comparable`); those that differ in the seed alone are one
row. The paper's figures, from its slides (docs/spec/idaa.md §7), stand below where the data are
theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from idaa_lib import runs
from idaa_lib.configs import UserError
from idaa_lib.lab import compare
from idaa_lib.lab.table import known, said
from idaa_lib.runs import Run, RunError

# Top-1 in percent on CIFAR-100, by labels a class.
FIXMATCH = {
    "FixMatch": {4: 47.76, 25: 66.30, 100: 74.13},
    "FixMatch + CLAE": {4: 50.34, 25: 68.58, 100: 74.54},
    "FixMatch + IDAA": {4: 52.88, 25: 68.96, 100: 75.28},
}
FIXMATCH_PROTOCOL = (
    "Paper: CIFAR-100; network, length of training and number of seeds are not stated. The public "
    "recipe of FixMatch, which preset = 'paper' follows, reports 57.5/72.9/78.1 with 4/25/100 "
    "labels a class: the paper's is inferred to be a weaker configuration."
)
# Top-1 in percent, or mean per class (docs/spec/idaa.md §5), of a linear classifier.
DATASETS = (
    "cifar10", "cifar100", "birdsnap", "fgvcaircraft", "dtd", "oxfordiiitpet", "flowers102",
    "cub200",
)  # fmt: skip
TRANSFER = {
    "SimCLR": (61.83, 36.55, 12.68, 24.19, 54.35, 46.46, 75.00, 16.73),
    "SimCLR + CLAE": (61.59, 37.13, 13.61, 25.87, 52.12, 43.55, 76.82, 17.58),
    "SimCLR + IDAA": (64.49, 38.82, 13.89, 26.02, 54.97, 46.76, 77.99, 18.15),
}
TRANSFER_PROTOCOL = (
    "Paper: pretraining set, backbone, images and number of seeds are not stated; that it follows "
    "Kornblith et al., as ours does, is inferred."
)
# In percent, of boxes and of masks.
AP = {
    f"{kind} AP{strictness}": f"{kind}_ap{strictness}"
    for kind in ("box", "mask")
    for strictness in ("50", "", "75")
}
COCO = {
    "from scratch": (44.0, 26.4, 27.8, 46.9, 29.3, 30.8),
    "supervised ImageNet": (58.2, 38.2, 41.2, 54.7, 33.3, 35.2),
    "SimSiam": (57.5, 37.9, 40.9, 54.2, 33.2, 35.2),
    "SimSiam + IDAA": (58.2, 38.7, 42.0, 55.1, 33.9, 35.9),
}
COCO_PROTOCOL = (
    "Paper: COCO; number of seeds not stated. Mask R-CNN R50-C4, the 1× schedule and val2017 are "
    "inferred: its SimSiam row is the SimSiam paper's."
)
COCO_CLASSES, COCO_VAL = 80, 5000  # categories, images of val2017


class Compared(NamedTuple):
    """table: a row for each training, then the paper's; protocols: what ours and theirs are of."""

    table: pd.DataFrame
    protocols: str


def fixmatch(run: Run) -> Compared:
    """Test top-1 in percent, adversary by labels a class, of semi-supervised runs like `run`."""
    config, data = run.config, run.environment["dataset"]
    varied = {"adversary", "epsilon", "dim", "labels_per_class", "seed"}
    members = comparable(run, varied)
    # The data are the same, wherever they lie, and so is the attack of all that attack.
    told = frozenset({"labels_per_class", "seed", "dataset", *dict(config.options("adversary"))})
    readings = [
        (name, each.config.labels_per_class, each.config.seed, (each.summary or {})["ema_top1"])
        for name, each in zip(compare.apart(members, told), members, strict=True)
    ]
    paper = FIXMATCH if known(data["name"], ("cifar100",)) else {}
    counts = sorted({count for _, count, *_ in readings}.union(*paper.values()))
    ours = (
        f"Ours: {data['name']}, {data['n']:,} training images, {config.backbone} of width "
        f"{config.width}, {config.epochs:,} epochs ({_settings(run, varied)}); averaged weights of "
        f"the last step, {(run.summary or {})['ema_n']:,} test images, read once."
    )
    theirs = FIXMATCH_PROTOCOL if paper else _elsewhere("CIFAR-100", data["name"])
    columns = {count: f"{count} labels a class (%)" for count in counts}
    return Compared(_table(readings, columns, paper), f"{ours}\n{theirs}")


def transfer(run: Run) -> Compared:
    """Linear accuracy in percent, training by data set, of transfers like `run` (its data sets)."""
    # What only probes from few labels depend on.
    others = {"fractions", "draws", "ways", "shots", "queries", "episodes", "few_shot", "seed"}
    own = _linear(run)
    readings = [
        (name, target, seed, value)
        for name, seed, each in _judging(comparable(run, {*others, "references"}))
        for target, value in _linear(each).items()
        if target in own
    ]
    theirs_of = {target: name for target in own if (name := known(target.name, DATASETS))}
    paper = {
        who: {target: figures[DATASETS.index(name)] for target, name in theirs_of.items()}
        for who, figures in (TRANSFER.items() if theirs_of else ())
    }
    columns = {
        target: f"{target.name}{'' if target.metric == 'top-1' else ', ' + target.metric} (%)"
        for target in own
    }
    limit = run.config.limit
    few = f"at most {limit:,} images of each split, " if limit else ""
    ours = f"Ours: {few}{next(iter(own)).protocol}."
    names = ", ".join(target.name for target in own)
    theirs = TRANSFER_PROTOCOL if paper else _elsewhere("other data sets", names)
    return Compared(_table(readings, columns, paper), f"{ours}\n{theirs}")


def coco(run: Run) -> Compared:
    """AP in percent of boxes and masks, a row for each training, of detection runs like `run`."""
    data, told = run.environment["dataset"], run.summary or {}
    readings = [
        (name, column, seed, (each.summary or {})[key])
        for name, seed, each in _judging(comparable(run))
        for column, key in AP.items()
        if key in (each.summary or {})
    ]
    theirs = (len(data["classes"]), data["n"]) == (COCO_CLASSES, COCO_VAL)
    paper = {who: dict(zip(AP, aps, strict=True)) for who, aps in COCO.items()} if theirs else {}
    protocols = [
        f"This run: {told['protocol']}, n = {told['n']:,}.",
        COCO_PROTOCOL if theirs else _elsewhere("COCO val2017", Path(data["name"]).name),
    ]
    return Compared(_table(readings, {ap: ap for ap in AP}, paper, 1), "\n".join(protocols))


def comparable(run: Run, varied: Collection[str] = ()) -> list[Run]:
    """Finished runs that may stand in one table with `run`: itself, then the newest first.

    They are of its stage and `runs.RESULTS_VERSION`, share data with it by content, and have its
    configuration but for the fields `varied` and for what it takes by name (a VAE, the run that is
    judged). Of those without an adversary, what an attack is like does not count.
    """

    def settings(each: Run, silent: Collection[str]) -> dict[str, Any]:
        told = each.config.identity() | {"from": getattr(each.config, "continue_from", None)}
        return {name: value for name, value in told.items() if name not in silent}

    found, data = [run], _fingerprints(run)
    for other in runs.find(run.stage):
        with contextlib.suppress(UserError, KeyError):  # one that is damaged
            alone = getattr(other.config, "adversary", None) == "none"
            silent = {*varied, *(dict(run.config.options("adversary")) if alone else ())}
            same = settings(run, silent) == settings(other, silent)
            same &= _version(run) == _version(other)
            if other != run and same and data & _fingerprints(other):
                found.append(other)
    return found


class _Target(NamedTuple):
    """What a linear row is of: two that are equal may stand in one column."""

    name: str
    fingerprint: str
    metric: str
    protocol: str


def _linear(run: Run) -> dict[_Target, float]:
    """The accuracy of a transfer's encoder on each of its data sets."""
    data = {each["name"]: each["fingerprint"] for each in run.environment["datasets"]}
    return {
        _Target(name, data[name], row["metric"], row["protocol"]): row["value"]
        for row in (run.summary or {})["rows"]
        if row["probe"] == "linear" and row["features"] == "encoder" and (name := row["dataset"])
    }


def _judging(evaluations: list[Run]) -> Iterator[tuple[str, int | None, Run]]:
    """Each with the name and the seed of the training that it judges (None: it is gone)."""
    names = compare.judged_apart(evaluations, frozenset({"seed"}))
    for name, run in zip(names, evaluations, strict=True):
        seed = None
        with contextlib.suppress(RunError):
            seed = compare.judged(run).config.seed
        yield name, seed, run


def _table(
    readings: Iterable[tuple[str, Any, int | None, float]],
    columns: Mapping[Any, str],
    paper: Mapping[str, Mapping[Any, float]],
    digits: int = 2,
) -> pd.DataFrame:
    """Readings (row, column, seed, value): of several seeds the mean and Student's 95 % interval.

    Args:
        columns: as in the readings → as shown. paper: row → column → figure, of so many digits.
    """
    found: dict[str, dict[Any, dict[int | None, float]]] = {}
    for name, column, seed, value in readings:  # of two with one seed the first, the newer
        found.setdefault(name, {}).setdefault(column, {}).setdefault(seed, value)
    rows: dict[str, list[str]] = {}
    for name, cells in sorted(found.items()):
        n = sorted({len(seeds) for seeds in cells.values()})
        rows[name] = [said([*cells.get(column, {}).values()]) for column in columns]
        rows[name] += [" to ".join(map(str, dict.fromkeys((n[0], n[-1]))))]
    for name, figures in paper.items():
        shown = {column: f"{value:.{digits}f}" for column, value in figures.items()}
        rows[f"{name} (paper)"] = [*(shown.get(column, "–") for column in columns), "not stated"]
    return pd.DataFrame.from_dict(rows, "index", columns=[*columns.values(), "seeds"])


def _version(run: Run) -> int | None:
    return run.environment.get("results_version")


def _fingerprints(run: Run) -> set[str]:
    about = run.environment
    return {data["fingerprint"] for data in about.get("datasets") or [about["dataset"]]}


def _settings(run: Run, varied: Collection[str]) -> str:
    """The preset, and what differs from it beside the fields `varied`."""
    config = run.config
    hidden = {*varied, *config.circumstances, *config.pointers, "backbone", "width", "epochs"}
    told = [compare.say(name, v) for name, v in config.changed().items() if name not in hidden]
    return ", ".join([f"preset {config.preset}", *told])


def _elsewhere(theirs: str, ours: str) -> str:
    return f"The paper's figures are of {theirs}, not of {ours}: none stands here."
