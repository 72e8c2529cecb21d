"""Lines of the log whose numbers come from the device some steps after they were asked for."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from idaa_lib import runs
from idaa_lib.configs import VAEConfig
from idaa_lib.runs import Run, RunError, Stopped, checkpoints
from idaa_lib.runs import steps as steps_module
from idaa_lib.runs.steps import Line, Steps

TOTAL = 23  # steps in epochs of 10; a line every 4


@pytest.fixture
def run(outputs):
    return runs.run_for(VAEConfig(), "pixels")


def train(run, bad_step=None, requests=lambda step: None):
    """Steps to the end; what happened, in its order: (what, its step, steps that were done)."""
    events, model = [], torch.zeros(())
    with run.writing(VAEConfig(), {}) as writer:

        class Asked(Run):
            request = property(lambda self: requests(steps.step))

        steps = Steps(
            Asked(run.path),
            writer,
            TOTAL,
            per_epoch=10,
            images=1,
            log_every=4,
            state=lambda: ({"model": model}, {"lines": len(run.metrics())}),
            restore=lambda tensors, values: model.copy_(tensors["model"]),
            at_log=lambda: {"double": 2 * model, "rate": 0.5},
            at_epoch_end=lambda epoch: {"validation": float(epoch)},
            track=lambda values, step: events.append(("line", step, steps.step)),
        )
        steps.resume()
        for step in steps:
            model += step
            steps.add({"loss": torch.tensor(math.nan if step == bad_step else 1.0 * step)})
    return events


def lines(run):
    return [
        {k: v for k, v in line.items() if k not in ("time", "images_per_second")}
        for line in run.metrics()
    ]


# Steps after which a line is due (an epoch's end has one more, of validation).
DUE = [4, 8, 10, 12, 16, 20, 20, 23]


@pytest.mark.parametrize(
    ("delay", "moments", "forced"),
    [
        (0, DUE, []),
        (1, [5, 9, 10, 13, 17, 20, 20, 23], [20, 23]),
        (2, [6, 10, 10, 14, 18, 20, 20, 23], [20, 23]),
        (3, [7, 10, 10, 15, 19, 20, 20, 23], [8, 20, 23]),
        (99, [8, 10, 10, 16, 20, 20, 20, 23], [4, 8, 12, 16, 20, 23]),
    ],
)
def test_a_late_line_is_not_read_early_and_never_lost(run, late, delay, moments, forced):
    waits = late(delay)
    events = train(run)
    assert events == [("line", step, after) for step, after in zip(DUE, moments, strict=True)]
    assert waits == forced  # by the next line, an epoch's end and the last step
    entries = lines(run)
    assert [line["step"] for line in entries] == DUE
    for line, first in zip(entries[:2], (0, 4), strict=True):
        steps = range(first, first + 4)
        assert line["loss"] == sum(steps) / 4
        assert line["double"] == 2 * sum(range(first + 4))
    assert list(entries[0]) == ["step", "epoch", "loss", "double", "rate"]
    assert [line["epoch"] for line in entries] == [0, 0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 99])
@pytest.mark.parametrize(
    ("bad_step", "by", "good"),
    [(0, 4, []), (6, 8, [4]), (9, 10, [4, 8]), (10, 12, [4, 8, 10]), (22, 23, DUE[:-1])],
)
def test_a_loss_that_is_not_finite_is_told_by_its_own_line(run, late, delay, bad_step, by, good):
    late(delay)
    with pytest.raises(RunError, match=f"The loss is nan at step {bad_step + 1}: lower"):
        train(run, bad_step)
    assert [line["step"] for line in run.metrics()] == good
    checkpoint = checkpoints.load(run)
    assert (checkpoint[1]["step"] if checkpoint else 0) == (by - 1) // 10 * 10


@pytest.mark.parametrize("stop", [4, 5, 9, 10, 15])
def test_a_stop_writes_the_line_before_it_saves_and_the_run_goes_on(run, late, stop):
    late(99)
    with pytest.raises(Stopped, match=f"after step {stop} "):
        train(run, requests=lambda step: "stop" if step == stop else None)
    _, values = checkpoints.load(run)
    assert (values["step"], values["lines"]) == (stop, sum(step <= stop for step in DUE))
    train(run)
    halves = lines(run)
    shutil.rmtree(run.path)
    late(0)
    train(run)
    assert halves == lines(run)


def test_a_pause_shows_the_lines_before_it(run, late):
    late(99)
    answers = iter(["pause", "pause", None])

    def request(step):
        if step != 5:
            return None
        answer = next(answers, None)
        counts.append(len(run.metrics()))
        return answer

    counts = []
    train(run, requests=request)
    assert counts == [0, 1, 1]


@pytest.mark.gpu
def test_a_line_of_a_gpu_is_copied_into_pinned_memory():
    values = {"loss": torch.tensor(2.5, device="cuda"), "rate": 0.1, "x": torch.tensor(1.0).cuda()}
    line = Line(3, 0, values)
    assert line.copy.is_pinned()
    assert line.read() == {"loss": 2.5, "rate": 0.1, "x": 1.0}
    assert line.event.query()


@pytest.mark.parametrize("within", [False, True], ids=["between two steps", "within a step"])
def test_speed_and_time_left_are_of_the_steps_alone(run, monkeypatch, within):
    """Steps of 2 s, the second half of them of 1 s; 4 s of validation, 3 s a checkpoint, and a
    pause of 6 s: none of these makes a step slower."""
    now = 1e6
    clock = SimpleNamespace(monotonic=lambda: now, time=lambda: now, sleep=lambda s: spend(s))
    monkeypatch.setattr(steps_module, "time", clock)
    states, pause = [], []

    def spend(seconds):
        nonlocal now
        now += seconds
        return {}

    def request():
        if steps.step == 5 and not pause and (within == bool(work)):
            pause.append(now)
        return "pause" if pause and now < pause[0] + 6 else None

    work = []
    with run.writing(VAEConfig(), {}) as writer:
        write = writer.state
        writer.state = lambda **news: (states.append(news), write(**news))

        class Asked(Run):
            request = property(lambda self: request())

        steps = Steps(
            Asked(run.path), writer, TOTAL, per_epoch=10, images=8, log_every=4,
            state=lambda: ({}, spend(3)), restore=lambda *_: None,
            at_epoch_end=lambda epoch: spend(4) or {"validation": 1.0},
        )  # fmt: skip
        for step in steps:
            work.append(step)
            steps.pulse()
            work.clear()
            spend(2 if step < 12 else 1)
    assert now > 1e6 + 12 * 2 + 11 + 3 * 3 + 2 * 4 + 6 - 0.1
    rates = {line["step"]: line["images_per_second"] for line in run.metrics()
             if "images_per_second" in line}  # fmt: skip
    assert rates == pytest.approx({s: 4.0 if s <= 12 else 8.0 for s in rates})
    assert {8, 10, 12, 16, 23} <= rates.keys()
    forecasts = {s["step"]: s["seconds_left"] for s in states if "seconds_left" in s}
    assert forecasts == pytest.approx({s: (TOTAL - s) * (2 if s <= 12 else 1) for s in forecasts})
    assert steps.seconds == pytest.approx(12 * 2 + 11)
    assert len(pause) == 1
