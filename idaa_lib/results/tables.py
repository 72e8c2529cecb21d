"""Tables for people: groups of results that may stand together, and the paper's figures beside."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from idaa_lib import runs
from idaa_lib.configs import UNKNOWN
from idaa_lib.results.figures import interval, results
from idaa_lib.runs import Run

if TYPE_CHECKING:
    import pandas as pd

PAPER = Path(__file__).resolve().parents[2] / "docs" / "paper.csv"
# What a published figure has in common with those that it stands beside, where it says it.
AGREE = ["size", "classes", "backbone", "width", "normalisation"]


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
    """Test figures in tables that mix neither stages, images, limits, n, protocols or versions."""
    frame = _select_test(frame)
    own = frame[frame["features"] == "encoder"]
    metric = own["metric"].mask(own["stage"] == "semi", "")  # columns: how many labels a class
    kinds = (own["stage"] + metric + own["alike"]).groupby(own["run"], sort=False).agg(frozenset)
    members = kinds.groupby(kinds, sort=False).groups.values()
    return [_group(frame[frame["run"].isin(ids)]) for ids in members]


def _select_test(frame: pd.DataFrame) -> pd.DataFrame:
    """Test figures; of transfers those of the linear probe on all labels."""
    other = (frame["stage"] == "transfer") & ~frame["metric"].str.startswith("linear")
    return frame[(frame["split"] == "test") & ~other]


def beside(run: Run) -> Group:
    """The test figures of a run with those of all finished runs that may stand beside them."""
    damage: list[str] = []
    others = [other for other in runs.find(run.stage, left_out=damage) if other != run]

    def test_figures(selection: Sequence[Run]) -> pd.DataFrame:
        frame = _select_test(results(selection, damage))
        frame = frame[frame["features"] == "encoder"]
        return frame[frame["alike"].isin(frame[frame["run"] == run.id]["alike"])]

    members = set(test_figures([run, *others])["run"])
    # Once more, of these alone: a label says what differs between them.
    frame = test_figures([run, *(other for other in others if other.id in members)])
    group = _group(frame.sort_values("label", kind="stable"))
    protocols = [group.protocols, *runs.report_left_out(damage)]
    return group._replace(protocols="\n".join(protocols))


def _group(frame: pd.DataFrame) -> Group:
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
        f"{datasets}: {n} test images{limit}", table(frame), "\n".join(protocols),
        list(dict.fromkeys(own["run"])),
    )  # fmt: skip


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """For people: a row each label, then references, then the paper's; a column each metric, of
    transfers each data set.

    Of one seed the interval is over test images; of several it is the mean with Student's interval
    over trainings, cut at 0 and 100 %, and `seed` says which. Of two runs with one seed the first
    counts.
    """
    import pandas as pd

    about, key = ["seed", "epochs", "images"], ["label", "heading"]  # about: of trainings
    reference = frame["features"] != "encoder"
    ours = frame.assign(heading=_heading(frame))
    ours["label"] = ours["label"].mask(reference, ours["features"])
    # References are the same for all, whatever the training.
    ours[about] = ours[about].mask(reference, None)
    ours = pd.concat([ours[~reference], ours[reference]]).drop_duplicates([*key, "seed"])
    rows = _interval_table(ours, ["label"]).join(ours.groupby("label")[about].agg(_values))

    theirs, _ = paper(frame)
    names = {paper_name(name): name for name in frame["dataset"]}  # theirs → ours
    theirs = theirs.assign(dataset=theirs["dataset"].map(names))
    theirs = theirs.assign(heading=_heading(theirs))
    their_rows = theirs.pivot_table("text", "label", "heading", aggfunc="first", sort=False)
    their_rows["epochs"] = theirs.groupby("label")["epochs"].first().replace("", "not stated")
    their_rows["seed"] = "not stated"

    columns = sorted({*ours["heading"], *theirs["heading"]}, key=natural)
    rows = pd.concat([rows, their_rows]).reindex(columns=[*columns, *about])
    return rows.fillna("–").rename_axis(index=None, columns=None)


def _heading(frame: pd.DataFrame) -> pd.Series:
    """The column of a table that each figure stands in."""
    datasets = frame["dataset"] + frame["metric"].str.removeprefix("linear")
    return frame["metric"].where(frame["stage"] != "transfer", datasets) + " (%)"


def natural(text: str) -> list[Any]:
    """A key that sorts 4, 25 and 100 by size, and 1e-05, 0.03 and 0.1."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _values(column: pd.Series) -> str:
    values = {*column.dropna()}
    numbers = [f"{value:,}" for value in sorted(values - {UNKNOWN})]
    return ", ".join([*numbers, *values & {UNKNOWN}]) or "–"


def _interval_table(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row for each value of the columns `by`, a column for each of `heading`: interval texts."""

    def write(mine: pd.DataFrame) -> str:
        value, low, high = interval(mine)
        return f"{value:.2f}" if low != low else f"{value:.2f} [{low:.2f}, {high:.2f}]"

    figures = frame.groupby([*by, "heading"], sort=False)[["value", "low", "high", "unit"]]
    return figures.apply(write).unstack(sort=False)


def tabulate(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """For people: a row for each value of the columns `by`, a column each metric with its unit; –
    is no value.

    frame: `metric`, `value`, `low`, `high`, `unit`. Of one row the interval is its own, of several
    Student's of their mean.
    """
    rows = frame.assign(heading=frame["metric"] + " (" + frame["unit"] + ")")
    rows[by] = rows[by].astype(object).fillna("–")
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
