"""The table of the runs page: what each run directory says, a row a run or a row for all seeds."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from idaa_lib import results
from idaa_lib.evaluate.encoders import judged_on
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.lab import process
from idaa_lib.runs import Run
from idaa_lib.runs.progress import clock

# A state is a sign and a word, never a colour alone.
DAMAGED = "damaged"
SIGNS = {
    "finished": "✓", "going": "▶", "interrupted": "◼", "failed": "✗", "new": "○", DAMAGED: "⚠",
}  # fmt: skip
# Where a training's row has what its evaluations found, by their protocol and metric.
TESTS = {
    (protocol, metric): f"{word} {metric} (%)"
    for protocol, word in (("clean", "test"), ("official", "official"))
    for metric in ("kNN", "linear")
}
SIZE = "size (MiB)"
# By the names that a user types: epsilon=0.3, where other columns write ε=0.3.
FIELDS = "fields"
COLUMNS = (
    "state", "stage", "run", "data", "method", "adversary", "differs from preset", "seed", "result",
    *TESTS.values(), "tags", "started", SIZE, "id", FIELDS,
)  # fmt: skip
# What a row is made from.
FILES = ("config.json", "state.json", "process.json", "summary.json", "tags.json")
# Fields with a column of their own.
HIDDEN = {"preset", "seed", "dataset", "method", "adversary", "run"}


class Row(NamedTuple):
    state: str  # one of SIGNS
    texts: dict[str, str]  # of COLUMNS
    figures: list[dict[str, Any]]  # `results.key_figures`
    family: str  # what it has in common with runs of other seeds
    training: str  # id of the training that an evaluation judges
    own_images: bool  # whether the evaluation is on the training's own images
    start: float  # when it was started last
    progress: str  # of a run under way
    size: int  # bytes
    stamps: list[tuple[int, int]]  # of FILES


def row_of(run: Run, old: Row | None = None) -> Row:
    """What the files of a run say, whatever their state; `old`, if they are as they were then."""
    stamps = [process.stamp(run.path / name) for name in FILES]
    if old and old.state != "going" and old.stamps == stamps:
        return old
    size = run.size
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.last_start))
    texts = {"stage": run.stage, "run": run.id[-8:], "started": started, "id": run.id}
    try:
        config, look, method, adversary = run.config, process.look(run), "–", "–"
        hidden = HIDDEN | config.circumstances
        changes = {k: v for k, v in config.list_changes().items() if k not in hidden and v != ""}
        if "beta" in changes:  # which says the same
            changes.pop("kappa", None)
        training = results.training_of(run)  # None: what it judged is gone
        about: Any = config if training == run else training and training.config
        named = changes | {"seed": config.list_stated()["seed"]}
        if hasattr(about, "adversary"):
            method, adversary = results.title(about)
            epsilon = None if about.adversary == "none" else about.list_stated().get("epsilon")
            named |= {name: getattr(about, name) for name in ("method", "adversary")}
            if epsilon is not None:
                named["epsilon"] = epsilon
                adversary += f" {results.field_text('epsilon', epsilon, '=')}"
                changes.pop("epsilon", None)
        training_id = Path(config.run or "").name if run.stage in results.JUDGING else ""
        differs = [f"of {training_id[-8:]}"] if training_id else []
        differs += [results.field_text(k, v, "=") for k, v in changes.items()]
        state = "going" if look.word in process.UNDER_WAY else look.word
        progress = ""
        if state != "finished" and "steps" in look.state:
            progress = f"{look.state['step']:,} of {look.state['steps']:,}"
        figures = results.key_figures(run)
        silent = {"seed", *config.circumstances} | ({"run"} if training_id else set())
        fields = config.model_dump(mode="json", exclude=silent)
        fields["precision"] = run.environment.get("precision")
        if vae := fields.get("vae"):  # a grid trains one for each seed
            own = results.describe_vae(vae).items()
            fields["vae"] = {k: v for k, v in own if k != "VAE seed"} or vae
        images = run.environment.get("dataset", {}).get("fingerprint")
        texts |= {
            "state": f"{SIGNS[state]} {look.word}",
            "data": Path(config.dataset or getattr(about, "dataset", "–")).name,
            "method": method, "adversary": adversary,
            "differs from preset": ", ".join(differs), "seed": str(named["seed"]),
            "result": look.reason or results.headline(figures), "tags": ", ".join(run.tags),
            FIELDS: ", ".join(f"{k}={results.value_text(v)}" for k, v in named.items()),
        }  # fmt: skip
        if state == "going":
            progress += f", {clock(look.state.get('seconds_left'))} left"
        elif progress:
            texts["state"] += f", {progress}"
        family = json.dumps([run.stage, images, fields], sort_keys=True)
        own_images = run.stage != "eval" or config.dataset in (None, judged_on(about.dataset))
        start = run.last_start
        return Row(
            state, texts, figures, family, training_id, own_images, start, progress, size, stamps
        )
    except results.DAMAGE as error:
        texts |= {"state": f"{SIGNS[DAMAGED]} {DAMAGED}", "result": str(error)}
        return Row(DAMAGED, texts, [], run.id, "", False, 0.0, "", size, stamps)


def tabulate(rows: Mapping[Run, Row], means: bool) -> tuple[pd.DataFrame, list[list[Run]]]:
    """The table as COLUMNS, and the runs of each of its lines.

    A training has the figures of its newest evaluation of each protocol on its own images.

    Args:
        means: one line for runs that differ in their seed alone, with means over them.
    """
    ids = {run.id: row for run, row in rows.items()}
    tests: dict[str, dict[str, Any]] = {}  # id → figures by their column
    for run, row in sorted(rows.items(), key=lambda item: item[1].start):
        for figure in row.figures:
            if column := TESTS.get((figure.get("evaluation", ""), figure["metric"])):
                for name in (run.id, row.training)[: 1 + row.own_images]:
                    tests.setdefault(name, {})[column] = figure
    families: dict[Hashable, list[Run]] = {}
    for run, row in rows.items():
        training = ids.get(row.training)
        family = (row.family, training.family if training else row.training) if means else run
        families.setdefault(family, []).append(run)
    lines, members = [], [*families.values()]
    for group in members:
        mine = [rows[run] for run in group]
        line = {name: join(row.texts.get(name, "") for row in mine) for name in COLUMNS}
        if len(mine) > 1:
            states = Counter(row.state for row in mine)
            words = [f"{SIGNS[s]} {states[s]} {s}" for s in reversed(SIGNS) if s in states]
            line["state"] = ", ".join(words)
            line["result"] = results.headline(_means(mine)) or line["result"]
            line["started"] = max(row.texts["started"] for row in mine)
            seeds = {row.texts.get("seed", "") for row in mine}
            line["seed"] = ", ".join(sorted(seeds, key=results.natural))
        figures = [tests.get(run.id, {}) for run in group]
        finished = sum(row.state == "finished" for row in mine)
        for column in TESTS.values():
            own = [each[column] for each in figures if column in each]
            text = _write(own)
            # A mean over fewer than the line has says so.
            line[column] = text + f", {len(own)} of {finished}" * bool(text and len(own) < finished)
        lines.append(line | {SIZE: round(sum(row.size for row in mine) / 2**20, 1)})
    frame = pd.DataFrame(lines, columns=COLUMNS)
    for column in (*TESTS.values(), "seed"):
        frame[column] = _order(frame[column])
    return frame, members


def _means(mine: Sequence[Row]) -> list[dict[str, Any]]:
    """The figures of the first of these with the mean over all of them as `text`."""
    alike: dict[Hashable, list[dict[str, Any]]] = {}
    for figure in itertools.chain.from_iterable(row.figures for row in mine):
        key = figure["metric"], figure["split"], figure.get("dataset")
        alike.setdefault(key, []).append(figure)
    return [figures[0] | {"text": _write(figures)} for figures in alike.values()]


def _write(figures: Sequence[Mapping[str, Any]]) -> str:
    """`41.3 [36.0, 46.2]`: of one its interval over test images, of several Student's of their
    mean; nothing where their n or protocol differ."""
    if len({(figure.get("n"), figure.get("protocol")) for figure in figures}) != 1:
        return ""
    values = [figure["value"] for figure in figures]
    own: Any = [figures[0].get(end) for end in ("value", "low", "high")]
    unit = figures[0]["unit"]
    ends = student_interval(values, unit) if len(values) > 1 else own
    texts = [results.number_text(x, unit) for x in ends if x is not None]
    return texts[0] if len(texts) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def join(texts: Iterable[str]) -> str:
    """Each different text once; of texts that differ each of their parts."""
    unique = dict.fromkeys(filter(None, texts))
    parts = dict.fromkeys(part for text in unique for part in text.split(", "))
    return ", ".join(unique if len(unique) == 1 else parts)


def _order(texts: pd.Series) -> pd.Categorical:
    """Texts that are sorted by the number that they begin with."""
    order = sorted({text for text in texts if text}, key=results.natural)
    return pd.Categorical(texts.where(texts != ""), order, ordered=True)
