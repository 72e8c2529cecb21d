"""How long work tells what it does: lines of a log, a plan of runs, a study's table and curve."""

import os
import socket
from itertools import pairwise
from types import SimpleNamespace

import pandas as pd
import pytest
from matplotlib.figure import Figure

from idaa_lib import grids, plans, sweeps
from idaa_lib.configs import SSLConfig, VAEConfig
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
    assert "5 runs (1 vae, 4 ssl): 1 are finished, 4 are to be made" in tally.plan(["v"])
    assert "2 at a time: no such run yet." in tally.plan(["v"])
    finish(ssl, 100 - progress.KERNEL, "one")
    finish(ssl, 140 - progress.KERNEL, "two")
    finish(SSLConfig(preset="cifar10"), 9e9, "of another preset")
    tally = progress.Tally(configs, 2)
    assert tally.seconds_left(["v"]) == 4 * 120 / 2  # two at a time
    assert tally.seconds_left([]) is None  # how long a VAE takes is not known
    assert "2 at a time: about 4:00 and 0 MiB of disk, by the runs so far." in tally.plan(["v"])
    tally.going = {go(1, 4)}
    assert tally.seconds_left(["v"]) == (4 - 1 / 4) * 120 / 2
    states = {"v": "finished", "s0": "failed", "s1": "left out"}
    share, line = tally.line(states)
    assert share == 3 / 5
    assert line == (
        "1 of 5 runs finished · 1 going (ssl 25%) · 1 failed · 1 left out · about 1:45 left"
    )
    assert progress.Tally(configs, 2).plan([*configs]) == "5 runs (1 vae, 4 ssl): 5 are finished."


def grid_of(n):
    cross = {"ssl": {"learning_rate": [1e-3 * (i + 1) for i in range(n)]}}
    return grids.read({"fixed": {"all": {"device": "cpu"}}, "cross": cross}).points()


def test_each_encoder_is_judged_before_the_next_one_is_trained(outputs, monkeypatch, capsys):
    order, sizes = [], []

    def perform(config):
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
    assert output.endswith("6 of 6 runs finished · 0 going · about 0:00 left\n")


class Output:
    """What `display` gives back; it keeps what it shows."""

    def __init__(self, part):
        self.parts = [part]

    def update(self, part):
        self.parts.append(part)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_study_grows_by_a_row_and_a_point_for_each_run(outputs, monkeypatch, stopped):
    grid, outputs_, points = grid_of(3), [], []
    keys = [key for key in plans.plan(grid) if key.startswith("eval")]
    frame = pd.DataFrame({"learning_rate": [1e-3, 2e-3, 3e-3], "value": [40.0, 50.0, 60.0]})
    frame = frame.assign(metric="kNN", unit="%", low=0.0, high=99.0, seed=0)
    frame = frame.assign(split="validation", features="encoder")
    outcome_by_key = {}

    def perform_all(tasks, jobs, show):
        for key in keys[:2]:
            outcome_by_key[key] = sweeps.Outcome("eval-1", "finished")
            show(outcome_by_key)
            show(outcome_by_key)  # nothing new
        outcome_by_key[keys[2]] = sweeps.Outcome("eval-3", "failed", "A sentence.")
        show(outcome_by_key)
        if stopped:
            raise KeyboardInterrupt
        return outcome_by_key

    def draw(rows):
        points.append(list(rows["value"]))
        return Figure()

    def display(part, display_id):
        outputs_.append(Output(part))
        return outputs_[-1]

    monkeypatch.setattr(study, "display", display)
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(sweeps, "perform_all", perform_all)
    monkeypatch.setattr(plans, "table", lambda grid: frame[: len(outcome_by_key)])
    if stopped:
        with pytest.raises(Stopped, match="run this cell again to go on"):
            study.perform(grid, 2, "validation", draw)
    else:
        assert study.perform(grid, 2, "validation", draw) == outcome_by_key
    assert points == [[40.0], [40.0, 50.0]]
    rows, curve = outputs_
    assert [len(part) for part in rows.parts[1:3]] == [1, 2]
    assert "<svg" in curve.parts[2].data
    # When all is done the notebook shows them; after a stop they stay.
    assert [output.parts[-1].data if not stopped else len(output.parts) for output in outputs_] == (
        [3, 3] if stopped else ["", ""]
    )
