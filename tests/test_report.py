"""The report: self-contained, true to the run directories, valid whatever is there."""

import html
import html.parser
import json
import os
import re
import subprocess

import pandas as pd
import pytest
from browser import recipe
from scipy import stats
from test_runs_page import judgement, made

from idaa_lib import grids, kernels, results, runs
from idaa_lib.configs import (
    EvalConfig,
    SemiConfig,
    SSLConfig,
    SweepConfig,
    TheoryConfig,
    TransferConfig,
    VAEConfig,
)
from idaa_lib.lab.report import Report, papermill
from idaa_lib.sweeps import folder_of

PNG = b"\x89PNG\r\n\x1a\n not a real one"
VOID = {"meta", "img", "br", "link", "hr"}


class Checker(html.parser.HTMLParser):
    """Tags that close in the order in which they opened; addresses that are asked for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "data", "srcset"):
                (self.links if tag == "a" else self.asked).append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


PARTS = ("origins", "results", "studies", "pictures", "identity", "trainings", "left_out")


def page():
    """All parts of the report, as notebook 13 shows them."""
    report = Report()
    return "".join(getattr(report, part)().data for part in PARTS)


@pytest.fixture
def filled(outputs):
    lines = [{"step": s, "loss": 9 - s, "knn_top1_val": 10 + s, "epoch": 0} for s in range(3)]
    vae = made(VAEConfig(), {"rate_nats": 12.34, "reconstruction": 0.5, "seconds": 3}, lines=lines)
    vae.figure("decomposition.png").write_bytes(PNG)
    values = {"knn_top1_val": 41.26, "knn_low_val": 38.0, "knn_high_val": 44.5, "n_val": 500}
    one = made(SSLConfig(adversary="idaa", vae=vae.id, epsilon=0.3), values, lines=lines)
    two = made(SSLConfig(adversary="clae"), values, lines=lines)
    made(EvalConfig(run=one.id), judgement(43.21))
    made(EvalConfig(run=two.id), judgement(32.19))
    made(EvalConfig(run=two.id, limit=64), judgement(11.11, 64))
    made(EvalConfig(run=two.id, protocol="official"), judgement(54.32, 96, "official: z"))
    folder = folder_of(SweepConfig(epsilons=(0.1, 0.3), betas=(), dims=(), vae={"epochs": 1}))
    rows = [
        {"axis": "epsilon", "at": e, "adversary": "IDAA", "seed": 0, "split": "validation"}
        | {"features": "encoder"}
        | {"metric": metric, "value": 30 + e, "low": 20.0, "high": 40.0}
        for e in (0.1, 0.3)
        for metric in ("kNN", "linear")
    ]
    pd.DataFrame(rows).to_csv(folder / "sensitivity.csv", index=False)
    return vae, one, two


def test_the_page_asks_for_nothing_beside_itself(filled):
    """What `make report` writes: one file, no code, no script, no damage."""
    outputs = runs.outputs_root()
    command = f"cd {kernels.FOLDER.parent} && {recipe('report')}"
    subprocess.run(["sh", "-c", command], check=True, capture_output=True, env=dict(os.environ))
    text = (outputs / "report.html").read_text()
    checker = Checker(text)
    assert all(address.startswith(("data:", "#")) for address in checker.asked)
    assert any(address.startswith("data:image/png;base64,") for address in checker.asked)
    links = [a for a in checker.links if not a.startswith("#")]
    assert links == ["https://proceedings.mlr.press/v162/yang22s.html"]  # of the paper, plain
    styles = "".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
    assert not re.search(r"url\((?!['\"]?(#|data:))|@import|<script", styles + text)
    assert "Report()" not in text and "43.21 [39.21, 47.21]" in text


GRIDS = {  # and what stands at the axes of its figure
    "two": ({"cross": {"ssl": {"epsilon": [0.1, 0.3]}, "vae": {"dim": [32, 128]}}},
            ["ε (units of z)", "dim m", "32", "128"]),
    "three": ({"cross": {"ssl": {"epsilon": [0.1, 0.3], "alpha": [1, 2], "steps": [3, 4, 5]}}},
              ["steps", "ε (units of z)", "alpha = 1", "alpha = 2"]),
    "one": ({"cross": {"ssl": {"epochs": [3, 7]}}}, ["epochs", "3", "7"]),
    "labels": ({"cross": {"budget": [{"ssl": {"epochs": n}, "labels": {"budget": f"of {n}"}}
                                     for n in (1, 2)], "ssl": {"width": [4, 8]}}},
               ["budget", "of 1", "of 2", "width"]),
    "varied": ({"vary": {"ssl": {"epsilon": [0.1, 0.3]}}}, ["ε (units of z)", "0.1", "0.3"]),
}  # fmt: skip


@pytest.mark.parametrize("path", [False, True], ids=["dict", "file"])
@pytest.mark.parametrize("name", GRIDS)
def test_a_study_of_a_grid_is_drawn_as_notebook_05_draws_it(name, path, outputs, tmp_path):
    grid, words = GRIDS[name]
    if path:
        (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    config = SweepConfig(grid=str(tmp_path / "grid.yaml") if path else grid)
    about = {"adversary": "IDAA", "seed": 0, "split": "validation", "features": "encoder"}
    rows = [
        about | point.labels | {"metric": probe, "value": 30.0 + i, "low": 20.0, "high": 50.0}
        for i, point in enumerate(grids.sensitivity(config))
        for probe in ("kNN", "linear")
    ]
    results.save(pd.DataFrame(rows), folder_of(config) / "sensitivity")
    report = Report()
    text = html.unescape(report.studies().data)
    assert not report.damage
    Checker(text)
    drawn = set(re.findall(r"<text[^>]*>([^<]*)</text>", text))
    assert {*words, "kNN: validation top-1 (%)", "linear: validation top-1 (%)"} <= drawn


def test_it_has_every_figure_and_its_command(filled):
    text = html.unescape(page())
    for figure in ("43.21 [39.21, 47.21]", "32.19 [28.19, 36.19]", "54.32 [50.32, 58.32]",
                  "rate 12.3 nats", "kNN 41.3 %, validation"):  # fmt: skip
        assert figure in text
    for run in runs.list_runs():
        assert runs.command(run) in text
    assert (
        "papermill notebooks/05_sensitivity.ipynb outputs/05_sensitivity.ipynb -p preset demo "
        "-p vae '{\"epochs\": 1}' -p epsilons '0.1, 0.3' -p betas '' -p dims ''"
    ) in text
    vae = filled[0]
    assert f"02_decompose.ipynb -p vae {vae.id}" in text


def test_every_finished_stage_is_there_once_and_seeds_are_in_their_order(outputs):
    lines = [{"step": s, "loss": 9 - s, "epoch": 0} for s in range(3)]
    for seed in (10, 2, 0):
        values = {"knn_top1_val": 40.0 + seed, "knn_low_val": 38.0, "knn_high_val": 60, "n_val": 50}
        run = made(SSLConfig(seed=seed), values, lines=lines)
        made(EvalConfig(run=run.id), judgement(40.0 + seed))
    test = {"ema_top1": 61.0, "ema_low": 55.0, "ema_high": 67.0, "ema_n": 90, "ema_protocol": "e"}
    for weight in (0.0, 1.0):
        made(SemiConfig(lambda_u=weight), test | {"ema_top1": 61.0 + weight}, lines=lines)
    row = dict(dataset="pets", metric="top-1", probe="linear", features="encoder", value=71.5)
    rows = [row | dict(low=70.0, high=73.0, n=90, protocol="t")]
    made(TransferConfig(run=run.id), {"rows": rows, "left_out": {}})
    claim = dict(claim="R keeps more than G", value=3.25, low=1.0, high=5.0, unit="points")
    claims = [claim | dict(n=20, verdict="more", note="", section="parts")]
    made(TheoryConfig(vae="v"), {"claims": claims, "n": 20})
    report = Report()
    tables, trainings = report.results().data, report.trainings().data
    for text in ("71.50 [70.00, 73.00]", "61.00 [55.00, 67.00]", "62.00 [55.00, 67.00]"):
        assert tables.count(text) == 1
    # Means over seeds with Student's interval, seeds by size; the control has its own name.
    low, high = stats.t.interval(0.95, 2, loc=44.0, scale=stats.sem([40.0, 42.0, 50.0]))
    mean = f"44.00 [{low:.2f}, {high:.2f}]"
    assert mean in tables and mean in trainings and "0, 2, 10" in tables
    assert [int(seed) for seed in re.findall(r"epochs, seed (\d+), kNN", trainings)] == [0, 2, 10]
    for name in ("labels alone", "FixMatch", "SimCLR"):
        assert trainings.count(f"<h3>{name}</h3>") == 1
        assert name in tables
    for label in ("SimCLR", "labels alone", "FixMatch"):  # whatever other stages there are
        assert f"<th>{label}</th>" in tables
    assert "R keeps more than G" in report.identity().data
    assert not report.damage


def test_trainings_before_and_after_images_were_added_are_no_seeds_of_one(outputs):
    for content, seeds in (("pixels", (0, 1)), ("further pixels", (0, 2))):
        for seed in seeds:
            values = {"knn_top1_val": 40.0 + 10 * seed, "knn_low_val": 38.0, "n_val": 50}
            made(SSLConfig(seed=seed), values, content)
    trainings = Report().trainings().data
    assert trainings.count("<h3>SimCLR</h3>") == 2
    for values in ([40.0, 50.0], [40.0, 60.0]):
        low, high = stats.t.interval(0.95, 1, loc=sum(values) / 2, scale=stats.sem(values))
        low, high = max(low, 0), min(high, 100)  # what a share can be
        assert f"{sum(values) / 2:.2f} [{low:.2f}, {high:.2f}]" in trainings


def test_no_table_mixes_protocols_limits_or_sizes(filled):
    tables = re.findall(r"<h3>([^<]*)</h3>(<table.*?</table>)", Report().results().data, re.DOTALL)
    values = {title: set(re.findall(r"\d\d\.\d(?=\d \[)", table)) for title, table in tables}
    assert sorted(values.values(), key=min) == [{"11.1"}, {"32.1", "43.2"}, {"54.3"}]
    assert any("96 test images" in title for title in values)


def test_the_sweep_s_command_gives_its_configuration_back():
    import shlex

    config = SweepConfig(epsilons=(0.1,), betas=(), seeds=(0, 1), ssl={"epochs": 2}, jobs=3)
    words = shlex.split(papermill("05_sensitivity", runs.parameters(config)))[3:]
    assert SweepConfig(**dict(zip(words[1::3], words[2::3], strict=True))) == config


def test_with_nothing_there_it_says_what_to_run_first(outputs):
    text = page()
    Checker(text)
    for name in ("01_pretrain_vae", "02_decompose", "04_evaluate", "05_sensitivity"):
        assert f"{name}.ipynb" in text


def test_names_are_escaped_and_damage_is_named(outputs):
    dataset = "/data/<script>alert(1)</script>"
    made(VAEConfig(dataset=dataset), {"rate_nats": 1.0, "reconstruction": 1.0})
    made(EvalConfig(run="<img src=x>"), judgement(12.0))
    broken_run = made(VAEConfig(seed=1), {})
    (broken_run.path / "config.json").write_text("{")
    folder = outputs / "sweep" / "sweep-<b>"
    folder.mkdir(parents=True)
    (folder / "sensitivity.csv").write_text("axis\n")
    text = page()
    Checker(text)
    assert "<script" not in text and "<img src=x" not in text and "sweep-<b>" not in text
    assert "&lt;img src=x&gt;" in text  # an evaluation whose training is gone keeps its row
    assert f"{broken_run.id}" in text and "is damaged" in text
