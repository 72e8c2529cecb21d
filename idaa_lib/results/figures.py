"""All figures of runs in one tidy table, and the one rule for what may stand together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idaa_lib import runs
from idaa_lib.configs import UserError
from idaa_lib.evaluate.metrics import share_interval, student_interval
from idaa_lib.results.names import JUDGING, find_differences, tell_apart, title, training_of
from idaa_lib.runs import Run
from idaa_lib.runs.files import make_folder, replace

if TYPE_CHECKING:
    import pandas as pd

# What a figure is of: by the prefix of its key in a summary.
FEATURES = {"": "encoder", "random_": "untrained encoder", "pixels_": "raw pixels"}
REFERENCES = tuple(FEATURES.values())[1:]
PROBES = {"knn": "kNN", "linear": "linear", "ema": "top-1"}
COLUMNS = (
    "run", "stage", "training", "label", "method", "adversary", "seed", "epochs", "images",
    "backbone", "width", "normalisation", "dataset", "size", "classes", "features", "metric",
    "value", "low", "high", "unit", "n", "split", "labels", "protocol", "limit", "fingerprint",
    "version", "alike",
)  # fmt: skip
# The rule: what two figures have in common that may stand in one column of a table.
SAME = ["fingerprint", "limit", "n", "protocol", "version"]
# What a notebook shows of tidy results.
SHOWN = ["dataset", "features", "metric", "value", "low", "high", "unit", "n", "labels", "protocol"]
OWN_COLUMNS = {"seed", "dataset", "labels_per_class"}  # fields that a label need not say
DAMAGE = (UserError, ValueError, KeyError, TypeError, AttributeError, OSError)


def results(
    selection: Iterable[Run] | None = None, damage: list[str] | None = None
) -> pd.DataFrame:
    """A row for each figure of finished runs: COLUMNS, then the fields in which trainings differ.

    `value`, `low` and `high` (the 95 % interval over the n test images) are in `unit`. Two figures
    may stand in one column of a table where `alike` is the same. `label` says what a training is,
    and how it differs from the others but for seed and number of labels; its data are named where
    trainings on others are judged on the same images.

    Args:
        selection: such as `idaa_lib.find("eval", protocol="clean")`; None: all that are finished.
        damage: takes a sentence for each run that cannot be read and is left out; None: they are
            printed.
    Raises:
        RunError: no run can be read of those that were selected.
    """
    import pandas as pd

    records, trainings, sentences = [], {}, list[str]()
    if selection is None:
        selection = [run for run in runs.list_runs() if run.finished]
    for run in selection:
        try:
            about = _about(run)
            records += [about | figure for figure in _figures(run)]
            trainings[run] = training_of(run)
        except DAMAGE as error:
            sentences.append(f"{run.path}: {error}")
    if damage is not None:
        damage += sentences
    elif sentences and not trainings:
        raise runs.RunError(sentences[0])
    elif sentences:
        print(*runs.report_left_out(sentences), sep="\n")
    unique = list(dict.fromkeys(run for run in trainings.values() if run))
    own, fields = {}, dict[str, Any]()
    for stage in dict.fromkeys(run.stage for run in unique):  # each among its like
        members = [run for run in unique if run.stage == stage]
        labels, values = tell_apart(members, OWN_COLUMNS), find_differences(members)
        fields |= values
        for i, (run, label) in enumerate(zip(members, labels, strict=True)):
            own[run.id] = {"label": label} | {name: row[i] for name, row in values.items()}
    records = [own.get(r["training"], {"label": r["training"]}) | r for r in records]
    columns = [*COLUMNS, *(field for field in fields if field not in COLUMNS)]
    frame = pd.DataFrame(records, columns=columns, dtype=object)  # a seed stays a whole number
    frame["alike"] = [" ".join(map(str, row)) for row in frame[SAME].to_numpy()]
    _name_data(frame)
    _tell_images_apart(frame, unique)
    return frame.astype(dict.fromkeys(("value", "low", "high"), float))


def _name_data(frame: pd.DataFrame) -> None:
    """Give each data set of transfers, which its content tells from others, a name of its own: each
    run numbers folders of one name in the order in which it was given them."""
    names = dict[str, str]()  # fingerprint → name
    transfers = frame[(frame["stage"] == "transfer") & frame["fingerprint"].notna()]
    for content, name in transfers[["fingerprint", "dataset"]].drop_duplicates().to_numpy():
        numbers = (f"{re.sub(r' [(][0-9]+[)]$', '', name)} ({i})" for i in itertools.count(2))
        free = (each for each in itertools.chain([name], numbers) if each not in names.values())
        names.setdefault(content, next(free))
    frame.loc[transfers.index, "dataset"] = transfers["fingerprint"].map(names)


def _tell_images_apart(frame: pd.DataFrame, trainings: Sequence[Run]) -> None:
    """Where trainings on different images are judged on the same ones, add to their labels what
    they were trained on: no table may take them for seeds of one training."""
    data = {run.id: run.environment.get("dataset", {}) for run in trainings}
    titles = {each.get("fingerprint"): each.get("name", "") for each in data.values()}
    images = frame["training"].map(lambda name: data.get(name, {}).get("fingerprint", ""))
    names = images.map(lambda content: titles.get(content, ""))

    def differ(kinds: pd.Series, *by: str) -> pd.Series:
        """Whether others of another kind are judged on the same images."""
        rows = frame.assign(kind=kinds)[frame["stage"].isin(JUDGING) & (kinds != "")]
        counts = rows.groupby(["alike", *by])["kind"].transform("nunique")
        return frame["training"].isin(rows["training"][counts > 1])

    frame["label"] += (", trained on " + names).where(differ(names), "")
    frame["label"] += (" (" + images.str[:8] + ")").where(differ(images, "label"), "")


def _about(run: Run) -> dict[str, Any]:
    """What a run is: the columns that all its figures share."""
    environment = run.environment
    data = environment.get("dataset", {})
    about = {
        "run": run.id, "stage": run.stage, "dataset": data.get("name", str(run.config.dataset)),
        "limit": getattr(run.config, "limit", None), "version": environment.get("results_version"),
    }  # fmt: skip
    about |= {name: data.get(name) for name in ("size", "classes", "fingerprint")}
    # Of a training whose images are kept larger, that of what is judged.
    about["size"] = getattr(run.config, "size", None) or about["size"]
    if (training := training_of(run)) is None:
        return about | {"training": run.config.run, "method": "", "adversary": ""}
    config = training.config
    (method, adversary), values = title(config), config.list_stated()
    return about | {
        "training": training.id, "method": method, "adversary": adversary, "seed": values["seed"],
        "epochs": values.get("epochs"),
        "images": training.environment.get("dataset", {}).get("n"),
        "backbone": getattr(config, "backbone", None), "width": getattr(config, "width", None),
        "normalisation": _normalisation(training),
        # A protocol may test larger images than the encoder was trained on.
        "size": config.size if run.stage == "eval" else about["size"],
    }  # fmt: skip


def _normalisation(training: Run) -> str | None:
    """Mean and std that a training's images are normalised with, as docs/paper.csv writes them."""
    if not (training.path / "model.json").exists():
        return None
    units = {name: " ".join(f"{v:.4g}" for v in training.model[name]) for name in ("mean", "std")}
    return f"mean {units['mean']}, std {units['std']}"


def _figures(run: Run) -> Iterator[dict[str, Any]]:
    """The figures of a summary, the encoder's own first."""
    summary, figure = run.summary or {}, {"features": "encoder", "split": "test", "unit": "%"}
    described = run.environment.get("datasets", ())
    datasets = {data[key]: data for key in ("name", "fingerprint") for data in described}
    for row in summary.get("rows", ()):  # of a transfer
        data = datasets.get(row.get("fingerprint", row["dataset"]), {})
        mean = "" if row["metric"] == "top-1" else f", {row['metric']}"
        about = {name: data.get(name) for name in ("fingerprint", "size", "classes")}
        about["features"] = "encoder" if row["features"] == "encoder" else REFERENCES[0]
        yield figure | row | about | {"metric": row["probe"] + mean}
    for prefix, val, top, probe in itertools.product(FEATURES, ("", "_val"), "15", PROBES):
        stem = f"{prefix}{probe}"
        if (value := summary.get(f"{stem}_top{top}{val}")) is None:
            continue
        metric = PROBES[probe]
        if run.stage == "semi":
            metric = f"{run.config.labels_per_class} labels a class"
        ends = {end: summary.get(f"{stem}_{end}{val}") for end in ("low", "high") if top == "1"}
        # How many labels and images there were say the metric and the fingerprint.
        protocol = str(summary.get(f"{stem}_protocol", "")).partition(";")[0] or None
        about = {"metric": metric + " top-5" * (top == "5"), "value": value, "protocol": protocol}
        about |= {"features": FEATURES[prefix]}
        about["n"] = summary.get(f"{stem}_n{val}") or (summary.get("n_val") if val else None)
        if about["n"] and ends.get("low") is None:
            ends["low"], ends["high"] = share_interval([value / 100], about["n"])[:, 0]
        yield figure | about | ends | {"split": "validation" if val else "test"}
    figure["split"] = "validation"
    for key, unit in (("rate_nats", "nats"), ("reconstruction", "MSE")):
        if key in summary:
            name = key.partition("_")[0]
            yield figure | {"metric": name, "value": summary[key], "unit": unit}
    for part in ("R", "G"):  # of a study of identity
        if values := summary.get("parts", {}).get(part):
            about = {"split": "test" if run.config.split == "test" else "validation"}
            about |= {name: values.get(name) for name in ("low", "high", "n")}
            yield figure | about | {"metric": f"x found from {part}", "value": values["retrieved"]}


def key_figures(run: Run) -> list[dict[str, Any]]:
    """What a line has room for of a run: its encoder's own figures, on test images if there are
    any, of a transfer the linear ones; of an evaluation with its `evaluation` protocol."""
    own = [figure for figure in _figures(run) if figure["features"] == "encoder"]
    own = [figure for figure in own if figure["split"] == "test"] or own
    if run.stage == "eval":
        own = [figure | {"evaluation": run.config.protocol} for figure in own]
    linear = [figure for figure in own if figure["metric"].startswith("linear")]
    return linear if run.stage == "transfer" else own


def headline(figures: Sequence[dict[str, Any]]) -> str:
    """The first of a run's key figures in a line, such as `kNN 41.3 %, linear 44.0 %, test`; where
    one has a `text`, that stands for its value."""
    if not figures:
        return ""
    first, count = figures[0], 2
    where = f", {first['split']}" + (f", {first['evaluation']}" if "evaluation" in first else "")
    if "dataset" in first:  # a transfer
        more, count = len(figures) - 1, 1
        where = f" on {first['dataset']}, test"
        where += f"; {more} more data set{'s' * (more > 1)}" if more else ""
    texts = [f.get("text") or number_text(f["value"], f["unit"]) for f in figures]
    parts = [f"{f['metric']} {t} {f['unit']}" for f, t in zip(figures, texts, strict=True)]
    return ", ".join(parts[:count]) + where


def number_text(value: float, unit: str) -> str:
    """A percentage with one decimal, any other value with three digits."""
    return f"{value:.1f}" if unit == "%" else f"{value:.3g}"


def interval(mine: pd.DataFrame) -> tuple[float, float, float]:
    """Value, low and high of results that differ in the seed alone; NaN where no interval is known.

    Of one the interval is over its test images, of several Student's of their mean.
    """
    if len(mine) > 1:
        return student_interval(list(mine["value"]), next(iter(mine.get("unit", ())), "%"))
    return tuple(mine[["value", "low", "high"]].iloc[0])


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """Tidy results with one row for the `seeds` trainings that differ in the seed alone: `value` is
    their mean, `low` and `high` as `interval` gives them."""
    own = {"run", "training", "seed", "VAE seed", "vae", "value", "low", "high"} & {*frame}
    alike = [repr(row) for row in frame.drop(columns=[*own]).to_numpy().tolist()]
    rows = []
    for _, mine in frame.assign(alike_=alike).groupby("alike_", sort=False):
        value, low, high = interval(mine)
        figures = {"value": value, "low": low, "high": high, "seeds": len(mine)}
        rows.append(mine.iloc[0].to_dict() | figures)
    columns = [name for name in frame if name not in own]
    return type(frame)(rows, columns=[*columns, "value", "low", "high", "seeds"])


def save(frame: pd.DataFrame, path: Path) -> list[Path]:
    """`<path>.csv` and `<path>.parquet`, written; a column of several kinds of values is text.

    Raises:
        RunError: the disk refuses.
    """
    import pandas as pd

    make_folder(path.parent)
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("csv", "parquet")]
    replace(files[0], frame.to_csv(index=False).encode())
    table = frame.infer_objects()
    for name in table:
        if pd.api.types.infer_dtype(frame[name], skipna=True) == "integer":
            table[name] = frame[name].astype("Int64")  # also where others are missing
        elif pd.api.types.infer_dtype(table[name], skipna=True).startswith("mixed"):
            table[name] = table[name].map(str, na_action="ignore")
    replace(files[1], table.to_parquet(index=False))
    return files
