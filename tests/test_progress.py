"""How long work tells what it does: lines of a log, a plan of runs, a study's table and curve."""

import contextlib
import os
import socket
import threading
from itertools import pairwise
from types import SimpleNamespace

import ipywidgets as widgets
import pandas as pd
import pytest
from matplotlib.figure import Figure

from idaa_lib import grids, plans, sweeps
from idaa_lib.configs import ConfigError, SSLConfig, VAEConfig
from idaa_lib.lab import study
from idaa_lib.runs import Run, Stopped, outputs_root, progress, run_for, write_json


@pytest.fixture
def clock(monkeypatch):
    """The time of `progress`, which stands still unless it is set."""
    clock = SimpleNamespace(now=1e6)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_lines_of_a_log_thin_out_and_never_stop(clock, capsys):
    lines, moments = progress.Lines(), []
    for second in range(1, 86_400, 2):
        clock.now = 1e6 + second
        lines.show(0.5, "goes on")
        moments += [second] if capsys.readouterr().out == "goes on\n" else []
    gaps = [end - start for start, end in pairwise(moments)]
    assert 5 <= min(gaps) <= 7 and 598 <= max(gaps) <= 602
    lines.show(1.0, "the end", last=True)
    assert capsys.readouterr().out == "the end\n"


def finish(config, seconds, name):
    run = run_for(config, name)
    run.path.mkdir(parents=True)
    write_json(run.path / "config.json", config.model_dump(mode="json"))
    write_json(run.path / "summary.json", {"seconds": seconds})
    return run


def go(step, steps):
    """A run at a step, of this living process."""
    run = Run(outputs_root() / "ssl" / "ssl-goes")
    run.path.mkdir(parents=True)
    state = {"state": "going", "step": step, "steps": steps, "pid": os.getpid()}
    state |= {"host": socket.gethostname(), "heartbeat": 0.0}
    write_json(run.path / "state.json", state)
    return run


def test_a_plan_says_how_long_it_takes_by_the_runs_so_far(outputs):
    vae, ssl = VAEConfig(), SSLConfig()
    configs = {"v": vae, **{f"s{i}": ssl for i in range(4)}}
    tally = progress.Tally(configs, 2)
    assert "5 runs (1 vae, 4 ssl): 1 finished, 4 to make" in tally.plan(["v"])
    assert "2 at a time: no such run yet." in tally.plan(["v"])
    finish(ssl, 100 - progress.KERNEL, "one")
    finish(ssl, 140 - progress.KERNEL, "two")
    finish(SSLConfig(preset="cifar10"), 9e9, "of another preset")
    tally = progress.Tally(configs, 2)
    assert tally.seconds_left(["v"]) == pytest.approx(4 * 120 / 2)  # two at a time
    assert tally.seconds_left([]) is None  # how long a VAE takes is not known
    assert "2 at a time: about 4:00 and 0 MiB of disk, by the runs so far." in tally.plan(["v"])
    tally.going = {go(1, 4)}
    assert tally.seconds_left(["v"]) == pytest.approx((4 - 1 / 4) * 120 / 2)
    states = {"v": "finished", "s0": "failed", "s1": "left out"}
    share, line = tally.line(states)
    assert share == 3 / 5
    assert line == (
        "1 of 5 runs finished · 1 going (ssl 25%) · 1 failed · 1 left out · about 1:45 left"
    )
    assert progress.Tally(configs, 2).plan([*configs]) == "5 runs (1 vae, 4 ssl): 5 finished."


@pytest.mark.parametrize(("fields", "factor"), [
    ({"epochs": 30}, 10), ({"limit": 1500}, 3), ({"size": 64}, 4),
    ({"epochs": 6, "limit": 250, "size": 96}, 9), ({"learning_rate": 0.1}, 1),
])  # fmt: skip
def test_time_grows_with_epochs_images_and_pixels(outputs, fields, factor):
    known = {"epochs": 3, "limit": 500, "size": 32, "device": "cpu"}
    finish(SSLConfig(**known), 100.0, "one")
    tally = progress.Tally({"s": SSLConfig(**known | fields)}, 1)
    assert tally.seconds_left([]) == pytest.approx(progress.KERNEL + factor * 100)
    assert "by the runs so far." in tally.plan([])
    tally.add(SSLConfig(**known), progress.KERNEL + 300.0)
    assert tally.seconds_left([]) == pytest.approx(progress.KERNEL + factor * 200)


@pytest.mark.parametrize(
    "fields", [{"width": 64}, {"backbone": "resnet50"}, {"limit": None}, {"dataset": "cifar10"}]
)
def test_an_estimate_says_that_it_is_by_other_runs(outputs, fields):
    known = {"epochs": 3, "limit": 500, "width": 4, "dataset": "photos", "preset": "cifar10"}
    finish(SSLConfig(**known), 100.0, "one")
    plan = progress.Tally({"s": SSLConfig(**known | {"epochs": 30} | fields)}, 1).plan([])
    assert "about 16:52 and" in plan and "which have other networks or images" in plan


def test_the_disk_is_that_of_the_outputs(outputs, monkeypatch, tmp_path):
    places = []

    def usage(path):
        places.append(path)
        return SimpleNamespace(free=0)

    monkeypatch.setattr(progress.shutil, "disk_usage", usage)
    monkeypatch.setenv("IDAA_OUTPUTS", str(outputs))
    finish(SSLConfig(), 100.0, "one")
    tally = progress.Tally({"s": SSLConfig()}, 1)
    assert "(only 0 MiB are free)" in tally.plan([])
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "not" / "there"))
    tally.plan([])
    assert places == [outputs, tmp_path]


def grid_of(n):
    cross = {"ssl": {"learning_rate": [1e-3 * (i + 1) for i in range(n)]}}
    return grids.read({"fixed": {"all": {"device": "cpu"}}, "cross": cross}).points()


def test_each_encoder_is_judged_before_the_next_one_is_trained(outputs, monkeypatch, capsys):
    order, sizes = [], []

    def perform(config, make=None):
        order.append(config.stage)
        name = f"{config.stage}-{len(order)}"
        return sweeps.Outcome(name, "finished", None, 60.0)

    monkeypatch.setattr(sweeps, "perform", perform)
    show = lambda outcome_by_key: sizes.append(len(outcome_by_key))  # noqa: E731
    outcomes = sweeps.perform_all(plans.plan(grid_of(3)), 1, show)
    assert order == ["ssl", "eval"] * 3 and sizes == [2, 4, 6]
    assert {outcome.state for outcome in outcomes.values()} == {"finished"}
    output = capsys.readouterr().out
    assert "ssl-1: finished\n" in output
    assert output.endswith("6 of 6 runs finished\n")


class Page:
    """What a notebook shows of a study: `widget` and `handle` are its last texts."""

    def __init__(self, person, monkeypatch):
        self.outputs, self.updates = [], []
        monkeypatch.setattr(study, "is_attended", lambda: person)
        monkeypatch.setattr(study, "display", self.display)
        monkeypatch.setattr(study, "SHEET", "styles")

    def display(self, part, display_id=None):
        self.outputs.append(part)
        return SimpleNamespace(update=self.updates.append)

    @property
    def text(self):
        (part,) = self.updates[-1:] or [p for p in self.outputs if isinstance(p, widgets.HTML)][-1:]
        return getattr(part, "data", None) or part.value


def frame_of(n):
    """Judgements of the first n points of `grid_of(3)`."""
    frame = pd.DataFrame({"learning_rate": [1e-3, 2e-3, 3e-3], "value": [40.0, 50.0, 60.0]})
    frame = frame.assign(metric="kNN", unit="%", low=0.0, high=99.0, seed=0)
    return frame.assign(split="validation", features="encoder")[:n]


def keys_of(tasks):
    return [key for key in tasks if key.startswith("eval")]


@pytest.mark.parametrize("person", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_study_grows_by_a_row_and_a_point_for_each_run(outputs, monkeypatch, person, stopped):
    points, texts, outcome_by_key, interrupted = [], [], {}, threading.Event()
    page = Page(person, monkeypatch)

    def perform_all(tasks, jobs, show, lines, kernels):
        keys = keys_of(tasks)
        for key in keys[:2]:
            outcome_by_key[key] = sweeps.Outcome("eval-1", "finished")
            show(outcome_by_key)
            show(outcome_by_key)  # nothing new
            texts.append(page.text)
        lines.show(0.5, "2 of 6 runs", last=True)
        outcome_by_key[keys[2]] = sweeps.Outcome("eval-3", "failed", "A sentence.")
        show(outcome_by_key)
        texts.append(page.text)
        assert not stopped or interrupted.wait(30)
        return outcome_by_key

    def draw(rows):
        points.append(list(rows["value"]))
        return Figure()

    @contextlib.contextmanager
    def interrupt():
        def wait(seconds):
            if stopped and len(texts) == 3:
                raise KeyboardInterrupt

        yield SimpleNamespace(wait=wait)

    monkeypatch.setattr(study, "newcomer", interrupt)
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(sweeps, "perform_all", perform_all)
    monkeypatch.setattr(sweeps.Kernels, "cancel", lambda kernels: interrupted.set())
    monkeypatch.setattr(plans, "table", lambda grid: frame_of(len(outcome_by_key)))
    if stopped:
        with pytest.raises(Stopped, match="run this cell again to go on"):
            study.perform(grid_of(3), 2, "validation", draw)
    else:
        assert study.perform(grid_of(3), 2, "validation", draw) == outcome_by_key
    assert points == [[40.0], [40.0, 50.0]]
    rows = [text.count("<tr") - 2 for text in texts]  # a table has two lines of head
    assert rows == [1, 2, 2] and all("<svg" in text for text in texts)
    assert "2 of 6 runs" in texts[2]
    # When all is done the notebook shows table and figure; after a stop they stay in the cell.
    assert "2 of 6 runs" in page.text and "<svg" not in page.text
    assert any("<svg" in getattr(part, "data", "") for part in page.outputs) == stopped
    assert not study._studies


def test_a_page_that_is_opened_anew_leaves_the_study_and_attaches_to_it(outputs, monkeypatch):
    page, go_on, starts = Page(True, monkeypatch), threading.Event(), []
    newcomers = [True, False]

    def perform_all(tasks, jobs, show, lines, kernels):
        starts.append(tasks)
        assert go_on.wait(30)
        lines.show(1.0, "all runs finished", last=True)
        return dict.fromkeys(tasks, sweeps.Outcome("run", "finished"))

    @contextlib.contextmanager
    def newcomer():
        came = newcomers.pop(0)
        if not came:
            go_on.set()
        yield SimpleNamespace(wait=lambda seconds: came)

    monkeypatch.setattr(study, "newcomer", newcomer)
    monkeypatch.setattr(sweeps, "perform_all", perform_all)
    with pytest.raises(Stopped, match="goes on in this kernel: run this cell again to attach"):
        study.perform(grid_of(2), 1, "validation", Figure)
    assert study.NOTICE in page.text
    outcomes = study.perform(grid_of(2), 1, "validation", Figure)
    assert outcomes.keys() == plans.plan(grid_of(2)).keys() and len(starts) == 1
    assert "all runs finished" in page.text and study.NOTICE not in page.text
    assert not study._studies


def test_the_error_of_a_study_is_the_cell_s(outputs, monkeypatch):
    Page(False, monkeypatch)
    grid = grids.read({"fixed": {"all": {"dataset": "/no/such/folder"}}}).points()
    with pytest.raises(ConfigError, match="/no/such/folder"):
        study.perform(grid, 1, "validation", Figure)
    assert not study._studies
