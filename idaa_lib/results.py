"""All results in one tidy table, and the one rule for what may stand together.

`results` makes a row of each figure of each run. The runs page, the notebooks, the report and CSV
files are views of it: `groups` of evaluations, what stands `beside` one run, a `table` for people.
The paper's figures, and those of the sibling systems' READMEs, are docs/paper.csv; they stand only
where data, size, classes and network are theirs.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from idaa_lib import runs
from idaa_lib.configs import UNKNOWN, UserError
from idaa_lib.evaluate.metrics import share_interval, student_interval
from idaa_lib.methods import METHODS
from idaa_lib.runs import Run, RunError

if TYPE_CHECKING:
    import pandas as pd

PAPER = Path(__file__).resolve().parent.parent / "docs" / "paper.csv"
ADVERSARIES = {"none": "no adversary", "idaa": "IDAA", "clae": "CLAE", "random_sign": "random sign"}
# What a figure is of: by the prefix of its key in a summary.
FEATURES = {"": "encoder", "random_": "untrained encoder", "pixels_": "raw pixels"}
REFERENCES = tuple(FEATURES.values())[1:]
PROBES = {"knn": "kNN", "linear": "linear", "ema": "top-1"}
# Stages that judge a training, which their field `run` names.
JUDGING = ("eval", "transfer")
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
# What a published figure has in common with those that it stands beside, where it says it.
AGREE = ["size", "classes", "backbone", "width", "normalisation"]
OWN_COLUMNS = {"seed", "dataset", "labels_per_class"}  # fields that a label need not say
DAMAGE = (UserError, ValueError, KeyError, TypeError, AttributeError, OSError)


def results(chosen: Sequence[Run], damage: list[str] | None = None) -> pd.DataFrame:
    """A row for each figure of finished runs: COLUMNS, then the fields in which trainings differ.

    `value`, `low` and `high` (the 95 % interval over the n test images) are in `unit`. Two figures
    may stand in one column of a table where `alike` is the same. `label` says what a training is,
    and how it differs from the others but for seed, data and number of labels.

    Args:
        damage: takes a sentence for each run that cannot be read, which is left out then.
    Raises:
        RunError, ValueError: a run cannot be read.
    """
    import pandas as pd

    records, trainings = [], {}
    for run in chosen:
        try:
            about = _about(run)
            records += [about | figure for figure in _figures(run)]
            trainings[run] = training_of(run)
        except DAMAGE as error:
            if damage is None:
                raise
            damage.append(f"{run.path}: {error}")
    unique = list(dict.fromkeys(run for run in trainings.values() if run))
    own, fields = {}, dict[str, Any]()
    for stage in dict.fromkeys(run.stage for run in unique):  # each among its like
        members = [run for run in unique if run.stage == stage]
        labels, values = apart(members, OWN_COLUMNS), differing(members)
        fields |= values
        for i, (run, label) in enumerate(zip(members, labels, strict=True)):
            own[run.id] = {"label": label} | {name: row[i] for name, row in values.items()}
    records = [own.get(r["training"], {"label": r["training"]}) | r for r in records]
    columns = [*COLUMNS, *(field for field in fields if field not in COLUMNS)]
    frame = pd.DataFrame(records, columns=columns, dtype=object)  # a seed stays a whole number
    frame["alike"] = [" ".join(map(str, row)) for row in frame[SAME].to_numpy()]
    return frame.astype(dict.fromkeys(("value", "low", "high"), float))


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
    (method, adversary), stated = title(config), config.stated()
    return about | {
        "training": training.id, "method": method, "adversary": adversary, "seed": stated["seed"],
        "epochs": stated.get("epochs"),
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
    datasets = {data["name"]: data for data in run.environment.get("datasets", ())}
    for row in summary.get("rows", ()):  # of a transfer
        data = datasets.get(row["dataset"], {})
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
            yield figure | {"metric": f"x found from {part}", "value": values["retrieved"]}


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
        where = f" on {first['dataset']}, test" + (f"; {more} more data sets" if more else "")
    texts = [f.get("text") or number_text(f["value"], f["unit"]) for f in figures]
    parts = [f"{f['metric']} {t} {f['unit']}" for f, t in zip(figures, texts, strict=True)]
    return ", ".join(parts[:count]) + where


def number_text(value: float, unit: str) -> str:
    """A percentage with one decimal, any other value with three digits."""
    return f"{value:.1f}" if unit == "%" else f"{value:.3g}"


# --- views ----------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Results that may stand together: a table, what it is of, by which protocols, and its runs."""

    title: str
    table: pd.DataFrame
    protocols: str
    runs: list[str]

    def html(self) -> str:
        """The table and its protocols."""
        lines = html.escape(self.protocols).replace("\n", "<br>")
        return f"{html_table(self.table)}<p class='quiet'>{lines}</p>"


def groups(frame: pd.DataFrame) -> list[Group]:
    """Test figures in tables that mix neither stages, images, limits, n, protocols or versions. Of
    transfers it is the linear probe on all labels, a column each data set."""
    frame = frame[frame["split"] == "test"]
    other = (frame["stage"] == "transfer") & ~frame["metric"].str.startswith("linear")
    frame = frame[~other]
    own = frame[frame["features"] == "encoder"]
    metric = own["metric"].mask(own["stage"] == "semi", "")  # columns: how many labels a class
    kinds = (own["stage"] + metric + own["alike"]).groupby(own["run"], sort=False).agg(frozenset)
    members = kinds.groupby(kinds, sort=False).groups.values()
    parts = (frame[frame["run"].isin(ids)] for ids in members)
    return [_group(part, _columns(part["stage"].iloc[0])) for part in parts]


def _columns(stage: str) -> str:
    """What the columns of a table of that stage are."""
    return "dataset" if stage == "transfer" else "metric"


def beside(run: Run) -> Group:
    """The test figures of a run with those of all finished runs that may stand beside them."""
    damage: list[str] = []
    others = [other for other in runs.find(run.stage, left_out=damage) if other != run]
    by = _columns(run.stage)

    def test_figures(chosen: Sequence[Run]) -> pd.DataFrame:
        frame = results(chosen, damage)
        frame = frame[(frame["split"] == "test") & (frame["features"] == "encoder")]
        frame = frame[frame["metric"].str.startswith("linear")] if by == "dataset" else frame
        return frame[frame["alike"].isin(frame[frame["run"] == run.id]["alike"])]

    members = set(test_figures([run, *others])["run"])
    # Once more, of these alone: a label says what differs between them.
    frame = test_figures([run, *(other for other in others if other.id in members)])
    group = _group(frame.sort_values("label", kind="stable"), by)
    protocols = [group.protocols, *runs.report_left_out(damage)]
    return group._replace(protocols="\n".join(protocols))


def _group(frame: pd.DataFrame, by: str) -> Group:
    own = frame[frame["features"] == "encoder"]
    first = own.iloc[0]
    n = " or ".join(f"{value:,}" for value in dict.fromkeys(own["n"].dropna()))
    limit = "" if first["limit"] is None else f", at most {first['limit']:,} images of a split"
    protocols = [f"{p}." for p in dict.fromkeys((own["metric"] + ": " + own["protocol"]).dropna())]
    theirs, others = paper(own)
    notes = (theirs["source"].replace("", "Paper") + ": " + theirs["note"] + ".").unique()
    protocols += [*notes, *others]
    if theirs.empty and not others:
        protocols.append("The paper's figures are of other data: none stands here.")
    datasets = ", ".join(dict.fromkeys(own["dataset"]))
    return Group(
        f"{datasets}: {n} test images{limit}", table(frame, by), "\n".join(protocols),
        list(dict.fromkeys(own["run"])),
    )  # fmt: skip


def table(frame: pd.DataFrame, by: str = "metric") -> pd.DataFrame:
    """For people: a row each label, then references, then the paper's; a column each value of `by`.

    Of one seed the interval is over test images; of several it is the mean with Student's interval
    over trainings, and `seed` says which. Of two runs with one seed the first counts.
    """
    import pandas as pd

    about, key = ["seed", "epochs", "images"], ["label", "heading"]  # about: of trainings
    reference = frame["features"] != "encoder"
    ours = frame.assign(heading=_heading(frame, by))
    ours["label"] = ours["label"].mask(reference, ours["features"])
    # References are the same for all, whatever the training.
    ours[about] = ours[about].mask(reference, None)
    ours = pd.concat([ours[~reference], ours[reference]]).drop_duplicates([*key, "seed"])
    rows = _interval_table(ours, ["label"]).join(ours.groupby("label")[about].agg(_values))

    theirs, _ = paper(frame)
    theirs = theirs.assign(heading=_heading(theirs, by))
    their_rows = theirs.pivot_table("text", "label", "heading", aggfunc="first", sort=False)
    their_rows["epochs"] = theirs.groupby("label")["epochs"].first().replace("", "not stated")
    their_rows["seed"] = "not stated"

    columns = sorted({*ours["heading"], *theirs["heading"]}, key=natural)
    rows = pd.concat([rows, their_rows]).reindex(columns=[*columns, *about])
    return rows.fillna("–").rename_axis(index=None, columns=None)


def _heading(frame: pd.DataFrame, by: str) -> pd.Series:
    """The columns of a table by metric, or of the linear accuracies on several data sets."""
    metric = frame["metric"]
    return (metric if by == "metric" else frame["dataset"] + metric.str[len("linear") :]) + " (%)"


def natural(text: str) -> list[Any]:
    """A key that sorts 4, 25 and 100 by size."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _values(column: pd.Series) -> str:
    values = {*column.dropna()}
    numbers = [f"{value:,}" for value in sorted(values - {UNKNOWN})]
    return ", ".join([*numbers, *values & {UNKNOWN}]) or "–"


def interval(mine: pd.DataFrame) -> tuple[float, float, float]:
    """Value, low and high of results that differ in the seed alone; NaN where no interval is known.

    Of one the interval is over its test images, of several Student's of their mean.
    """
    if len(mine) > 1:
        return student_interval(list(mine["value"]))
    return tuple(mine[["value", "low", "high"]].iloc[0])


def _interval_text(mine: pd.DataFrame) -> str:
    value, low, high = interval(mine)
    return f"{value:.2f}" if low != low else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _interval_table(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row for each value of the columns `by`, a column for each of `heading`: interval texts."""
    figures = frame.groupby([*by, "heading"], sort=False)[["value", "low", "high"]]
    return figures.apply(_interval_text).unstack(sort=False)


def tabulate(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """For people: a row for each value of the columns `by`, a column each metric with its unit.

    frame: `metric`, `value`, `low`, `high`, `unit`. Of one row the interval is its own, of several
    Student's of their mean.
    """
    rows = frame.assign(heading=frame["metric"] + " (" + frame["unit"] + ")")
    return _interval_table(rows, by).fillna("–").rename_axis(columns=None)


def html_table(frame: pd.DataFrame, index: bool = True) -> str:
    """A frame as an HTML table of class `idaa-table`, in full; its texts are escaped."""
    import pandas as pd

    with pd.option_context("display.max_colwidth", None):
        return frame.to_html(classes="idaa-table", border=0, index=index, justify="left")


def paper(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The published figures that may stand beside these, and sentences on those that may not.

    Those of the same table and data, and of what `AGREE` names where a figure says it. Of the
    paper's main table those of the same methods; of others' READMEs all. The columns of
    docs/paper.csv, `label` and `text`.
    """
    import pandas as pd

    theirs = pd.read_csv(PAPER, dtype=str, keep_default_na=False)
    columns = [*theirs.columns]
    own = frame[["stage", "dataset", *AGREE]].astype(str).drop_duplicates()
    own["dataset"] = own["dataset"].map(paper_name)
    theirs = theirs.merge(own, on=["stage", "dataset"], suffixes=("", "_own"))
    same = theirs["method"].isin(frame["method"]) | (theirs["source"] != "")
    theirs = theirs[(theirs["stage"] != "eval") | same].assign(differs="")
    for field in AGREE:
        other = (theirs[field] != "") & (theirs[field] != theirs[f"{field}_own"])
        text = f"; {field} is " + theirs[field] + " there and " + theirs[f"{field}_own"] + " here"
        theirs["differs"] += text.where(other, "")
    # Where one of these runs agrees, it stands.
    theirs = theirs.sort_values("differs", kind="stable").drop_duplicates(columns).sort_index()
    stands, source = theirs["differs"] == "", theirs["source"].replace("", "the paper")
    sentence = "Figures of " + source + " do not stand here: " + theirs["differs"].str[2:] + "."
    theirs, others = theirs[stands], [*sentence[~stands].unique()]
    attack = (" + " + theirs["adversary"]).where(theirs["adversary"] != "", "")
    several = (theirs["size"] == "224") | (theirs["source"] != "")
    epochs = (", " + theirs["epochs"] + " epochs").where(several & (theirs["epochs"] != ""), "")
    spread = ("±" + theirs["spread"]).where(theirs["spread"] != "", "")
    label = theirs["method"] + attack + epochs + " (" + source[stands].str.replace("the ", "") + ")"
    return theirs.assign(label=label, text=theirs["value"] + spread), others


def paper_name(dataset: str) -> str:
    """How the paper calls a data set, if it is one of its: `/data/cifar100-images.zip` is cifar100,
    but `imagenet-100` and `cifar10-c` are data of their own."""
    name = Path(dataset).name.lower().replace("_", "-").replace("miniimagenet", "mini-imagenet")
    return name.removesuffix(".zip").removesuffix("-images")


# --- names ----------------------------------------------------------------------------------------


def training_of(run: Run) -> Run | None:
    """The training that a run is of: itself, or of an evaluation what it judges, None once gone."""
    if run.stage not in JUDGING:
        return run
    try:
        return runs.encoder(run.config.run)
    except RunError:
        return None


def title(config: Any) -> tuple[str, str]:
    """Method and adversary by the names that people know them by; of a VAE or a study its own."""
    if config.stage == "vae":
        return f"VAE, dim {config.dim}", ""
    if config.stage == "theory":
        return f"identity of {config.images} images", ""
    adversary = ADVERSARIES.get(config.adversary, config.adversary)
    if "adversary" in config.unknown:
        adversary = "an unknown adversary"
    if getattr(config, "lambda_u", None) == 0:  # FixMatch's other half, the control
        return "labels alone", adversary
    return getattr(METHODS.get(config.method), "__name__", config.method), adversary


def name_of(run: Run) -> str:
    """`SimCLR + IDAA`, `VAE, dim 128`; of an evaluation, what it judges."""
    training = training_of(run)
    if training is None:
        return run.config.run
    method, adversary = title(training.config)
    return method if adversary in ("", ADVERSARIES["none"]) else f"{method} + {adversary}"


def full_name(run: Run, config: Any = None) -> str:
    """`SimCLR + IDAA ε 0.1 · photos · 1a2b3c4d`, `VAE β 0.4, dim 128 · …`: what a training is, its
    images, its seed where it is not 0, and the end of its id.

    config: of a run that is not there yet.
    """
    config = config or run.config
    stated, (what, adversary) = config.stated(), title(config)
    if config.stage == "vae":
        what = f"VAE {field_text('beta', stated['beta'], ' ')}, dim {config.dim}"
    elif config.adversary != "none":
        what += f" + {adversary}"
        if "epsilon" in stated:  # which an adversary of one's own may lack
            what += f" {field_text('epsilon', stated['epsilon'], ' ')}"
    if config.stage == "semi":
        what += f", {config.labels_per_class} labels a class"
    words = [what, Path(config.dataset).name.removesuffix(".zip"), f"seed {stated['seed']}"]
    return " · ".join([*words[: 3 if config.seed else 2], run.id[-8:]])


def differing(chosen: Sequence[Run]) -> dict[str, list[Any]]:
    """Field → its value in each run (None: it has no such field), for the fields that differ where
    they are known.

    In place of `vae`, an id, stand the fields in which the VAEs differ, such as `beta` and `dim`,
    where these tell all of them apart.
    """
    dumps = [run.config.stated() for run in chosen]
    fields = dict.fromkeys(name for dump in dumps for name in dump)
    values = {name: [dump.get(name) for dump in dumps] for name in fields}
    facts = {name: [v for v in row if v != UNKNOWN] for name, row in values.items()}
    differences = {k: values[k] for k, row in facts.items() if any(v != row[0] for v in row)}
    vaes = {name: _vae_fields(name) for name in differences.get("vae", ()) if name}
    if len({repr(vae) for vae in vaes.values() if vae}) == len(vaes) > 1:
        own = [vaes.get(name, {}) for name in differences.pop("vae")]
        for field in dict.fromkeys(name for vae in own for name in vae):
            row = [vae.get(field) for vae in own]
            if len({repr(value) for value in row if value is not None}) > 1:
                differences[field] = row
    return differences


def _vae_fields(name: str) -> dict[str, Any]:
    """`beta`, `dim`, `VAE epochs` and so on of a VAE by its id; nothing once the VAE is gone."""
    try:
        config = runs.get("vae", name).config
    except UserError:
        return {}
    silent = {*config.circumstances, "kappa"}  # β says what κ says
    own = {field: value for field, value in config if field not in silent}
    return {f if f in ("beta", "dim") else f"VAE {f}": value for f, value in own.items()}


def apart(chosen: Sequence[Run], hidden: Collection[str] = ()) -> list[str]:
    """What each run is and what tells it from the others, but for the `hidden` fields."""
    names, configs = [name_of(run) for run in chosen], [run.config for run in chosen]
    texts = list(names)
    for field, values in differing(chosen).items():
        for i, (value, config) in enumerate(zip(values, configs, strict=True)):
            # β says what κ says; the name has the method, the adversary, of a VAE dim;
            # circumstances change nothing.
            silent = {*hidden, "method", "adversary", "run", "kappa", *config.circumstances}
            if field in silent or value is None or (config.stage, field) == ("vae", "dim"):
                continue
            seed = getattr(config, "seed", None)
            if (field, value) in (("VAE seed", seed), ("lambda_u", 0)):  # seed and name say it
                continue
            # What only this method or adversary has tells runs apart within it, or where it is
            # not the recipe's.
            within = {str(v) for v, name in zip(values, names, strict=True) if name == names[i]}
            own = field in config.changed() and field != "vae"
            if field in type(config).model_fields or len(within) > 1 or own:
                texts[i] += f", {field_text(field, value)}"
    return [text + ", of a file" * bool(c.unknown) for text, c in zip(texts, configs, strict=True)]


def labels(chosen: Sequence[Run]) -> dict[str, Run]:
    """Short label → run, for runs of one stage: what they are, and what differs between them."""
    texts = apart(chosen)
    return {
        text if texts.count(text) == 1 else f"{text} ({run.id[-8:]})": run
        for text, run in zip(texts, chosen, strict=True)
    }


def field_text(field: str, value: Any, equals: str = " = ") -> str:
    """`ε = 0.3`: a field and its value, short."""
    symbol = {"epsilon": "ε", "beta": "β"}.get(field, field)
    if field.removeprefix("VAE ") in ("vae", "witness", "continue_from", "dataset", "classes"):
        # Of an id its hash, of a path its last part.
        value = str(value).rsplit("/", 1)[-1].rsplit("-", 1)[-1]
    return f"{symbol}{equals}{value_text(value)}"


def value_text(value: Any) -> str:
    """A field's value for people: `0.1, 0.3` of a list, `epochs: 3` of a table, – of None."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {value_text(own)}" for name, own in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "–"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
