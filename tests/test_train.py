"""Training: it learns, it stops and goes on bit for bit, and a user's mistakes cost nothing."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.tracking import get_available_trackers
from conftest import outcome
from PIL import Image
from reference import knn as naive_knn
from reference import rsa_beta

import idaa_lib
from idaa_lib import adversaries, runs
from idaa_lib.configs import ConfigError, EvalConfig, SemiConfig, SSLConfig, VAEConfig
from idaa_lib.data import cached as images
from idaa_lib.evaluate import encoders
from idaa_lib.evaluate import stage as evaluation
from idaa_lib.evaluate.encoders import features, load_encoder, load_vae, random_encoder
from idaa_lib.evaluate.stage import evaluate, results
from idaa_lib.methods import METHODS, About, Moment, build_method
from idaa_lib.methods.simclr import SimCLR
from idaa_lib.runs import RunError, Stopped, checkpoints
from idaa_lib.train import locate, loop, stages, train, train_semi, train_ssl, train_vae
from idaa_lib.train.feed import Feed
from idaa_lib.train.loop import Fit
from idaa_lib.views import keyed_generator, recipe

TINY = {"limit": 96, "batch_size": 16, "epochs": 2, "width": 4, "log_every": 4, "device": "cpu"}
VAE = VAEConfig(**TINY, dim=8)


def ssl(**values):
    return SSLConfig(**(TINY | {"projection_dim": 8} | values))


@pytest.fixture
def vae(outputs):
    return train_vae(VAE)


def stop_after(monkeypatch, steps, how):
    """Call `how` when `steps` steps were made in this process."""
    train_step, calls = Fit.train_step, []

    def step(self, *args):
        values = train_step(self, *args)
        calls.append(1)
        if len(calls) == steps:
            how(self)
        return values

    monkeypatch.setattr(Fit, "train_step", step)


def interrupt(fit):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("adversary", ["vae", "none", "clae", "idaa", "random_sign"])
@pytest.mark.parametrize("steps", [4, 6, 9])  # 6: exactly at the end of the first epoch
def test_a_run_that_was_interrupted_ends_bit_for_bit_like_one_that_was_not(
    outputs, vae, monkeypatch, adversary, steps
):
    if adversary == "vae":
        config = VAEConfig(**TINY, dim=8, seed=1)
    else:
        config = ssl(adversary=adversary, keep_every=1)
    expected = outcome(train(config))
    run = locate(config)
    shutil.rmtree(run.path)
    with monkeypatch.context() as patch:
        stop_after(patch, steps, interrupt)
        with pytest.raises(Stopped, match=rf"after step {steps} of 12 and saved"):
            train(config)
    assert run.state["state"] == "interrupted"
    assert not run.finished
    again = outcome(train(config))
    assert expected[0].keys() == again[0].keys()
    assert all(torch.equal(expected[0][k], again[0][k]) for k in expected[0])
    assert expected[1:] == again[1:]


def test_a_killed_run_goes_on_from_its_last_checkpoint(outputs, monkeypatch):
    expected = outcome(train_vae(VAE))
    shutil.rmtree(locate(VAE).path)
    with monkeypatch.context() as patch:

        def die(fit):
            raise SystemExit

        stop_after(patch, 9, die)
        with pytest.raises(SystemExit):
            train_vae(VAE)
    assert [line["step"] for line in locate(VAE).metrics()] == [4, 6, 8]
    again = outcome(train_vae(VAE))
    assert all(torch.equal(expected[0][k], again[0][k]) for k in expected[0])
    assert expected[1:] == again[1:]


def test_two_epochs_differ_and_two_runs_agree(outputs):
    first = outcome(train_ssl(ssl()))
    shutil.rmtree(locate(ssl()).path)
    second = outcome(train_ssl(ssl()))
    assert all(torch.equal(first[0][k], second[0][k]) for k in first[0])
    losses = [line["loss"] for line in first[2] if "loss" in line]
    assert len(losses) == len(set(losses)) == 3


def test_a_finished_run_is_shown_and_not_trained_again(outputs, vae, monkeypatch, capsys):
    def times():
        files = [p for p in vae.path.rglob("*") if p.is_file() and p.name != "starts.json"]
        return {p: p.stat().st_mtime_ns for p in files}

    before = times()
    monkeypatch.setattr(Fit, "run", lambda self: pytest.fail("trained again"))
    assert train_vae(VAE) == vae
    assert "is finished: showing its result" in capsys.readouterr().out
    assert before == times()


def test_a_run_directory_holds_what_the_design_says(outputs, vae):
    run = train_ssl(ssl(adversary="idaa"))
    for name in ("config.json", "environment.json", "metrics.jsonl", "state.json", "latest.json"):
        assert (run.path / name).exists()
    assert {"reconstruction", "kl", "kappa", "beta", "dim", "rate_nats"} <= vae.summary.keys()
    assert {"knn_top1_val", "seconds", "images_per_second"} <= run.summary.keys()
    assert 0 <= run.summary["knn_top1_val"] <= 100
    assert run.config.vae == vae.id
    assert run.environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert all({"step", "epoch", "time"} <= line.keys() for line in run.metrics())
    keys = set().union(*run.metrics())
    assert {"embedding_std", "effective_rank", "alignment", "uniformity"} <= keys


def test_training_learns(outputs):
    """The VAE reconstructs better than the mean colour does; the SSL loss falls below chance."""
    run = train_vae(VAEConfig(limit=500, width=8, dim=32, epochs=6, batch_size=32, device="cpu"))
    assert run.summary["reconstruction"] < 0.8  # 1 is the variance of normalised pixels
    assert run.summary["rate_nats"] > 1
    long_run = train_ssl(
        SSLConfig(limit=600, width=8, epochs=4, batch_size=64, learning_rate=2e-3, log_every=9)
    )
    losses = [line["loss"] for line in long_run.metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    knn = [line["knn_top1_val"] for line in long_run.metrics() if "knn_top1_val" in line]
    assert knn[-1] > 100 / 13 * 2


def test_a_longer_run_continues_from_a_finished_one(outputs, vae):
    longer_run = train_vae(VAE.model_copy(update={"continue_from": vae.id, "epochs": 3}))
    assert longer_run != vae
    assert vae.finished
    assert longer_run.metrics()[0]["loss"] < vae.metrics()[0]["loss"]


def test_continuing_from_other_weights_is_told_before_work(outputs, vae):
    with pytest.raises(ConfigError, match=r"continue_from=.* has other weights: .*fc11"):
        train_vae(VAE.model_copy(update={"continue_from": vae.id, "dim": 16}))
    assert len(runs.find("vae", finished=False)) == 1


def test_request_to_stop_and_to_pause(outputs, monkeypatch):
    def pause(fit):
        fit.writer.run.ask("pause")
        requests = [(0.6, "go"), (1.2, "stop")]
        for delay, request in requests:
            threading.Timer(delay, fit.writer.run.ask, (request,)).start()

    stop_after(monkeypatch, 2, pause)
    config = VAE.model_copy(update={"epochs": 400})
    start = time.monotonic()
    with pytest.raises(Stopped, match=r"Stopped \(stop\)"):
        train_vae(config)
    assert time.monotonic() - start > 1.0
    state = locate(config).state
    assert (state["state"], state["paused"]) == ("interrupted", False)
    assert checkpoints.load(locate(config))[1]["seconds"] < time.monotonic() - start - 0.5


def test_the_command_line_trains_and_speaks_in_sentences(outputs):
    command = [sys.executable, "-m", "idaa_lib.train"]
    words = [f"{k}={v}" for k, v in TINY.items()]
    process = subprocess.run([*command, "vae", *words, "dim=8"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert locate(VAE).finished
    assert "epoch 2/2" in process.stdout  # a readable log where there is no terminal
    run = train_ssl(ssl())
    words = [f"run={run.id}", "limit=60", "references=False"]
    process = subprocess.run([*command, "eval", *words], capture_output=True, text=True)
    assert '"knn_top1"' in process.stdout, process.stderr
    (damaged := outputs / "damaged.json").write_text("method", encoding="utf-8")
    for arguments, sentence in (
        (["ssl", "epsilom=3"], "did you mean 'epsilon'"),
        (["ssl", "epsilon"], "neither name=value nor @file.json"),
        (["ssl", "dataset=nowhere"], "nowhere"),
        (["ssl", "@nowhere.json"], "There is no configuration nowhere.json."),
        (["ssl", f"@{damaged}"], "holds no configuration (Expecting value"),
    ):
        process = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert process.returncode == 2
        assert sentence in process.stderr
        assert "Traceback" not in process.stderr


def test_ctrl_c_in_a_process_saves_and_says_how_to_go_on(outputs):
    words = [f"{k}={v}" for k, v in (TINY | {"epochs": 4000}).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "idaa_lib.train", "vae", *words, "dim=8"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = locate(VAE.model_copy(update={"epochs": 4000}))
    while not run.metrics() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "start the same run again to continue" in errors
    assert run.state["state"] == "interrupted"
    assert checkpoints.load(run)[1]["step"] > 0


def test_a_vae_of_other_images_attacks_in_its_own_units(
    outputs, vae, tmp_path, monkeypatch, capsys
):
    """VAE transfer: a VAE of the photographs, an encoder of the same in pale colours."""
    data = images.load("photos", "train", limit=160)
    for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        path = (
            tmp_path / "pale" / ("train" if i % 4 else "test") / str(label.item() % 2) / f"{i}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((160 + image // 3).permute(1, 2, 0).numpy()).save(path)
    fields = dict(dataset=str(tmp_path / "pale"), adversary="idaa", limit=64)
    with pytest.raises(RunError, match=r"no finished vae run with dataset=.*pale"):
        train_ssl(ssl(**fields))

    calls, anchor = [], adversaries.IDAA.anchor

    def watch(attack, x, graph=False):
        result = anchor(attack, x, graph)
        mean, std = (torch.tensor(u)[:, None, None] for u in attack.units[0])
        pixels = x * std + mean  # back in [0, 1], and into the VAE's units by hand
        own_pixels = (pixels - torch.tensor(vae_.mean)[:, None, None]) / torch.tensor(vae_.std)[
            :, None, None
        ]
        calls.append((attack.units, result.point, vae_.encode(own_pixels)[0]))
        return result

    vae_ = load_vae(vae)
    monkeypatch.setattr(adversaries.IDAA, "anchor", watch)
    run = train_ssl(ssl(**fields, vae=vae.id, precision="fp32"))
    assert f"vae: {vae.id} was trained on photos, not on" in capsys.readouterr().out
    dataset = run.environment["dataset"]
    units = (tuple(dataset["mean"]), tuple(dataset["std"])), (vae_.mean, vae_.std)
    assert units[0] != units[1] and len(calls) == 8
    for attack_units, point, z_by_hand in calls:
        assert attack_units == units
        torch.testing.assert_close(point, z_by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tracker", ["tensorboard"])
def test_a_tracker_is_one_parameter(outputs, tracker):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    run = train_vae(VAE.model_copy(update={"tracker": tracker}))
    events = list(run.path.rglob("events.out.tfevents*"))
    assert events
    assert sum(p.stat().st_size for p in events) > 100


@pytest.mark.parametrize(
    ("tracker", "error", "help_"),
    [
        ("wandb", "api_key not configured (no-tty).\nCall wandb.login().", "run `wandb login`"),
        ("mlflow", "Connection refused", "look at MLFLOW_TRACKING_URI"),
        ("tensorboard", "", "leave tracker at 'none'"),
    ],
)
def test_a_tracker_that_does_not_start_is_a_sentence_before_a_step(
    outputs, monkeypatch, tracker, error, help_
):
    def refuse(*_):
        raise RuntimeError(error)

    trackers = [*map(str, get_available_trackers()), tracker]
    monkeypatch.setattr("idaa_lib.train.accelerator.get_available_trackers", lambda: trackers)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    with pytest.raises(ConfigError, match=help_) as refusal:
        train_vae(VAE.model_copy(update={"tracker": tracker}))
    text = str(refusal.value)
    reason = error.splitlines()[0].rstrip(".") if error else "RuntimeError"
    assert text.startswith(f"tracker={tracker!r} does not start ({reason})") and "\n" not in text
    assert not runs.find("vae", finished=False)[0].metrics()


# --- a user's mistakes ------------------------------------------------------------------------


def test_a_missing_vae_is_told_before_work(outputs):
    with pytest.raises(RunError, match=r"no finished vae run with dataset=photos and size=32"):
        train_ssl(ssl(adversary="idaa"))
    assert not (outputs / "ssl").exists()


def test_a_vae_that_does_not_fit_is_told_before_work(outputs, vae):
    with pytest.raises(ConfigError, match="size=32, and this run needs 64"):
        train_ssl(ssl(adversary="idaa", vae=vae.id, size=64))
    with pytest.raises(ConfigError, match="dim=8, and this run needs 16"):
        train_ssl(ssl(adversary="idaa", vae=vae.id, dim=16))
    with pytest.raises(RunError, match="dim=16"):
        train_ssl(ssl(adversary="idaa", dim=16))
    assert not (outputs / "ssl").exists()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"method": "simclrr"}, "method must be one of .*simclr.*'simclrr'"),
        ({"backbone": "resnet19"}, "backbone must be one of resnet18.*'resnet19'"),
        ({"device": "tpu"}, "device must be one of .*'tpu'"),
        ({"batch_size": 97}, "batch_size=97 is more than the 96 training images"),
        ({"dataset": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"tracker": "mlflow"}, "tracker='mlflow' is not installed: pip install mlflow"),
    ],
)
def test_values_that_only_the_start_can_judge(outputs, values, sentence, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises((ConfigError, ValueError, FileNotFoundError), match=sentence):
        train_ssl(ssl(**values))


def test_no_space_is_told_before_work(outputs, monkeypatch):
    assert len(images.load("photos", "train").images)  # decoded, while there is space
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    sizes = {}
    for every in (None, 1):
        with pytest.raises(
            RunError, match=r"No space for .*: its checkpoints need \d+ MiB"
        ) as refusal:
            train_ssl(ssl(epochs=101, width=16, keep_every=every))
        sizes[every] = int(re.search(r"need (\d+) MiB", str(refusal.value))[1])
    # Three checkpoints of weights and two moments; each of the 100 snapshots is of weights alone.
    assert sizes[1] == pytest.approx(sizes[None] * (9 + 100) / 9, rel=0.1)
    run = locate(ssl(epochs=101, width=16))
    for epoch in range(1, 101):  # an interrupted run has them already
        checkpoints.keep(run, epoch, {"weight": torch.zeros(1)})
    with pytest.raises(RunError, match=rf"its checkpoints need {sizes[None]} MiB"):
        train_ssl(ssl(epochs=101, width=16, keep_every=1))


def test_a_disk_that_fills_up_ends_in_a_sentence(outputs, monkeypatch):
    def fill_disk(fit):
        raise OSError(28, os.strerror(28))

    stop_after(monkeypatch, 9, fill_disk)
    with pytest.raises(RunError, match="No space left on device, so"):
        train_vae(VAE)
    assert checkpoints.load(locate(VAE))[1]["step"] == 6


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_finite_stops_with_advice_and_is_not_saved(outputs, log_every):
    config = ssl(learning_rate=1e20, precision="fp32", log_every=log_every, epochs=30)
    for _ in range(2):  # starting again does not go on from broken weights
        with pytest.raises(RunError, match=r"loss is nan at step \d+: lower learning_rate"):
            train_ssl(config)
    run = locate(config)
    assert run.state["state"] == "failed"
    checkpoint = checkpoints.load(run)
    assert checkpoint is None or all(t.isfinite().all() for t in checkpoint[0].values())
    report = json.loads((run.path / "not_finite.json").read_text())
    assert report["checkpoint"] == (checkpoint and checkpoint[1]["step"])
    order = torch.randperm(96, generator=keyed_generator(config.seed, 0, 0, 0))
    first = 16 * (report["step"] - 1)
    assert report["images"] == {"images": order[first : first + 16].tolist()}


def test_an_attack_that_is_not_finite_keeps_its_step(outputs):
    """On the CPU it is known at once; there was no checkpoint yet."""
    config = ssl(adversary="clae", learning_rate=1e30, optimizer="sgd")
    with pytest.raises(RunError, match=r"gradient is not finite.* What was saved is intact"):
        train_ssl(config)
    report = json.loads((locate(config).path / "not_finite.json").read_text())
    assert report["checkpoint"] is None and report["step"] in (2, 3) and "finite" in report["what"]
    assert len(report["images"]["images"]) == config.batch_size


OPTIMIZERS = ["sgd", "lars", "adam", "adam_b0"]


@pytest.mark.parametrize(("first", "second"), itertools.product(OPTIMIZERS, repeat=2))
def test_another_optimiser_continues_with_weights_alone(outputs, capsys, first, second):
    """Its moments mean something else, or are of other parameters (LARS splits its groups)."""
    start = train_ssl(ssl(optimizer=first, learning_rate=1e-3, epochs=1))
    run = train_ssl(
        ssl(optimizer=second, learning_rate=1e-3, epochs=1, seed=1, continue_from=start.id)
    )
    assert ("moments start at 0" in capsys.readouterr().out) == (first != second)
    tensors, _ = checkpoints.load(run)
    slots = {name.rpartition(".")[2] for name in tensors if name.startswith("optimizer.")}
    moments = {"exp_avg", "exp_avg_sq", "step"}
    assert slots == (moments if second.startswith("adam") else {"momentum_buffer"})


@pytest.mark.parametrize("delay", [0, 1, 9])
def test_an_attack_that_is_not_finite_is_told_by_the_log(vae, monkeypatch, late, delay):
    monkeypatch.setattr(adversaries.ascent, "waits", lambda device: True)  # as on a GPU
    late(delay)

    def load_broken(run):
        network = load_vae(run)
        network.fc21.bias.data.fill_(torch.nan)
        return network

    monkeypatch.setattr(stages, "load_vae", load_broken)
    config = ssl(adversary="idaa", log_every=3)
    with pytest.raises(RunError, match="By step 3: An attack's gradient was not finite"):
        train_ssl(config)
    assert checkpoints.load(locate(config)) is None
    assert not locate(config).metrics()
    assert not (locate(config).path / "samples").exists()


@pytest.mark.parametrize("delay", [1, 3, 99])
def test_lines_that_come_late_change_no_training(outputs, late, delay):
    expected = outcome(train_vae(VAE))
    shutil.rmtree(locate(VAE).path)
    late(delay)
    again = outcome(train_vae(VAE))
    assert again[1:] == expected[1:]
    assert all(torch.equal(again[0][name], value) for name, value in expected[0].items())


def test_images_from_the_host_are_those_of_the_device():
    pixels = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    device = torch.device("cpu")
    resident_feed, host_feed = Feed(pixels, device), Feed(pixels, device, resident=False)
    for epoch in range(2):  # workers outlive an epoch
        order = torch.randperm(50, generator=torch.Generator().manual_seed(epoch)).split(8)
        batches = [{"images": index, "unlabelled": index.flip(0)} for index in order]
        for ours, theirs, batch in zip(
            resident_feed(batches), host_feed(batches), batches, strict=True
        ):
            for name, index in batch.items():
                for indices, tensors in (ours, theirs):
                    assert torch.equal(indices[name], index)
                    assert torch.equal(tensors[name], pixels[index])


def test_a_run_that_streams_its_images_is_the_same_run(outputs, monkeypatch):
    expected = outcome(train_vae(VAE))
    shutil.rmtree(outputs)
    monkeypatch.setattr(loop, "Feed", partial(Feed, resident=False))
    streamed_outcome = outcome(train_vae(VAE))
    assert all(torch.equal(expected[0][k], streamed_outcome[0][k]) for k in expected[0])
    assert expected[1:] == streamed_outcome[1:]


def compile_without_inductor(monkeypatch):
    """All but the C++ compiler, which works a minute on a network's graphs. What inductor makes of
    them is compared in test_guards.py and test_views.py."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def test_compiled_views_are_the_same_views(outputs, monkeypatch):
    compile_without_inductor(monkeypatch)
    data = images.load("photos", "train", 32, 24)
    method = build_method(ssl(), About(recipe("simclr", 32, data.mean, data.std)))
    batch = {"images": data.images}
    moment = Moment(numbers=method.numbers({"images": len(data)}, keyed_generator(1)))
    expected = method.draw(batch, {}, moment)
    method.compile_parts()
    for ours, theirs in zip(method.draw(batch, {}, moment), expected, strict=True):
        torch.testing.assert_close(ours.images, theirs.images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "adversary"),
    [
        ("vae", None), ("simclr", "clae"), ("simclr", "idaa"), ("moco", "none"), ("byol", "none"),
        ("simsiam", "none"), ("fixmatch", "clae"), ("rsa", "none"),
    ],
)  # fmt: skip
def test_a_compiled_network_trains_like_a_plain_one_and_is_a_run_of_its_own(
    method, adversary, outputs, monkeypatch
):
    compile_without_inductor(monkeypatch)
    fields = {"precision": "fp32", "limit": 32, "epochs": 1, "log_every": 1}
    if method == "vae":
        config = VAEConfig(**TINY | fields, dim=8)
    else:
        if adversary == "idaa":
            train_vae(VAE)
        # Its preset's ε; in small steps, as a δ of little gradient turns its sign with rounding.
        fields |= {"adversary": adversary, "learning_rate": 1e-5}
        if method == "fixmatch":
            limits = {"limit": 64, "batch_size": 4, "mu": 2, "labels_per_class": 2}
            config = SemiConfig(**TINY | fields | limits)
        else:
            config = ssl(**fields, method=method, **({"queue": 32} if method == "moco" else {}))
    compiled_config = config.replace(compile=True)
    assert locate(compiled_config) != locate(config)  # it rounds otherwise
    first = outcome(train(config))
    second = outcome(train(compiled_config))
    assert first[0].keys() == second[0].keys()
    for line, other in zip(first[2], second[2], strict=True):
        assert line == pytest.approx(other, rel=1e-2)  # Adam turns rounding into steps
    if method == "rsa":  # β moves in compiled steps too
        betas = [line["beta"] for line in second[2] if "beta" in line]
        assert betas == pytest.approx([rsa_beta(0.4, s, 2) for s in (1, 2)], abs=1e-6)


def folder(root, n=24, classes=("a", "b")):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(0, 256, (20, 24, 3), generator=generator)
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(root / part / name / f"{i}.png")
    return root


def test_own_images_without_labels_train_and_cannot_be_evaluated(outputs, tmp_path):
    for split in folder(tmp_path / "own").iterdir():
        for i, path in enumerate(sorted(split.rglob("*.png"))):
            path.rename(tmp_path / "own" / f"{split.name}{i}.png")
        shutil.rmtree(split)
    run = train_ssl(ssl(dataset=str(tmp_path / "own"), limit=None, size=16))
    assert not [key for key in run.summary if key.startswith("knn")]
    assert run.summary["effective_rank"] >= 1
    with pytest.raises(ConfigError, match="no labels to learn from"):
        train_semi(SemiConfig(dataset=str(tmp_path / "own"), size=16, device="cpu"))
    with pytest.raises(ConfigError, match="no labels"):
        evaluate(EvalConfig(run=run.id))


def test_a_relative_path_is_meant_from_where_it_was_given(outputs, tmp_path, monkeypatch):
    folder(tmp_path / "work" / "own")
    monkeypatch.chdir(tmp_path / "work")
    run = train_ssl(ssl(dataset="own", size=16, limit=20))
    monkeypatch.chdir(tmp_path)
    assert run.config.dataset == str(tmp_path / "work" / "own")
    assert evaluate(EvalConfig(run=run.id, references=False)).finished


def test_moving_a_folder_is_the_same_run(outputs, tmp_path):
    path = folder(tmp_path / "here")
    config = ssl(dataset=str(path), size=16)
    run = locate(config)
    target = shutil.move(path, tmp_path / "sub" / "here")
    assert locate(config.model_copy(update={"dataset": str(target)})) == run
    (Path(target) / "train" / "a" / "0.png").unlink()
    assert locate(config.model_copy(update={"dataset": str(target)})) != run


def test_an_encoder_of_an_unfinished_or_damaged_run_is_refused(outputs, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7, interrupt)
        with pytest.raises(Stopped):
            train_ssl(ssl())
    run = locate(ssl())
    with pytest.raises(RunError, match="is interrupted, not finished"):
        load_encoder(run)
    train_ssl(ssl())
    path = run.path / "checkpoints" / "12" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match=r"The last checkpoint of .* is damaged"):
        load_encoder(run)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [({"device": "gpu"}, "device must be one of .*'gpu'"), ({"run": "vae"}, "stage 'vae'")],
)
def test_an_evaluation_that_cannot_be_leaves_nothing_behind(outputs, vae, values, sentence):
    run = train_ssl(ssl())
    values = {"run": run.id} | {k: str(vae.path) if v == "vae" else v for k, v in values.items()}
    with pytest.raises((ConfigError, RunError), match=sentence):
        evaluate(EvalConfig(**values))
    assert not (outputs / "eval").exists()


def test_validation_images_are_never_in_their_own_bank(outputs, monkeypatch):
    """Trained on `trainval`, an image would otherwise be its own nearest neighbour."""
    banks = []
    knn = idaa_lib.train.stages.knn

    def watch(bank, *arguments, **options):
        banks.append(bank)
        return knn(bank, *arguments, **options)

    monkeypatch.setattr("idaa_lib.train.stages.knn", watch)
    run = train_ssl(ssl(split="trainval", limit=4500, epochs=1, batch_size=64))
    assert len(banks[0]) == len(images.load("photos", "train")) == 4000
    assert "trained on without their labels" in run.summary["knn_protocol"]


# --- what comes back --------------------------------------------------------------------------


def test_an_encoder_comes_back_in_one_line(outputs):
    run = train_ssl(ssl(adversary="clae"))
    (run.path / "environment.json").unlink()  # for the record alone
    module, size, mean, std = load_encoder(run)
    data = images.load("photos", "train", limit=96)
    assert (size, mean, std) == (32, data.mean, data.std)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    tensors, _ = checkpoints.load(run)
    for name, value in module.state_dict().items():
        assert torch.equal(value, tensors[f"method.network.backbone.{name}"])
    z = features(load_encoder(run, "projector").module, data.images, size, mean, std)
    assert z.shape == (96, 8)
    assert torch.allclose(z.norm(dim=1), torch.ones(96), atol=1e-5)
    with pytest.raises(ValueError, match="layer must be backbone or projector"):
        load_encoder(run, "head")


def test_a_backbone_comes_back_without_its_method(outputs, monkeypatch):
    """Whatever became of the method's code: configuration and weights are enough."""
    run = train_ssl(ssl(adversary="clae"))
    expected = load_encoder(run)
    monkeypatch.setattr(encoders, "build_method", lambda *_: pytest.fail("built"))
    state = torch.get_rng_state()
    module = load_encoder(run).module
    assert torch.equal(torch.get_rng_state(), state)
    assert module.state_dict().keys() == expected.module.state_dict().keys()
    assert not any("_adv." in name for name in module.state_dict())  # they serve training alone
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(module(x), expected.module(x))
    path = run.path / "config.json"
    path.write_text(path.read_text().replace('"width": 4', '"width": 8'))
    with pytest.raises(RunError, match="do not fit its networks as they are now"):
        load_encoder(run)


def test_images_without_a_label_are_left_out_of_what_labels_judge(outputs, monkeypatch):
    """A third of each split has none: validation, kNN and probes use the others, and only them."""

    def load(*args, **options):
        data = images.load(*args, **options)
        labels = data.labels.clone()
        labels[::3] = -1
        return replace(data, labelled=False, contents=lambda: (data.images, labels))

    monkeypatch.setattr("idaa_lib.runs.machine.load", load)
    run = train_ssl(ssl())
    assert "knn_top1_val" in run.summary and run.summary["n_val"] == 16
    summary = evaluate(EvalConfig(run=run.id, limit=90, references=False, device="cpu")).summary
    assert summary["knn_n"] == summary["linear_n"] == 60
    assert "k=120," in summary["knn_protocol"]  # train and val, 60 each
    assert (results(runs.find("eval")[0])["labels"] >= 0).all()


def test_the_reference_encoder_is_the_one_before_training(outputs, monkeypatch):
    weights, build = {}, stages.build_method

    def keep(*args):
        method = build(*args)
        weights.update({k: v.clone() for k, v in method.network.backbone.state_dict().items()})
        return method

    monkeypatch.setattr(stages, "build_method", keep)
    run = train_ssl(ssl(seed=3))
    module = random_encoder(run).module
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())


def test_an_evaluation_is_a_run_with_figures_that_say_how_they_came(outputs):
    run = train_ssl(ssl())
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    evaluation_run = evaluate(EvalConfig(run=run.id, limit=120, device="cpu"))
    summary, tensors = evaluation_run.summary, results(evaluation_run)
    test = images.load("photos", "test", limit=120)
    assert torch.equal(tensors["labels"], test.labels)
    for subject in ("", "random_", "pixels_"):
        for probe in ("knn", "linear"):
            key = f"{subject}{probe}"
            name = subject.rstrip("_") or "encoder"
            top1 = (tensors[f"{name}.{probe}"] == test.labels).double().mean().item() * 100
            assert summary[f"{key}_top1"] == pytest.approx(top1)
            assert summary[f"{key}_low"] <= top1 <= summary[f"{key}_high"]
            assert summary[f"{key}_n"] == 120
            assert summary[f"{key}_protocol"].startswith("clean: ")
    assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    assert evaluate(EvalConfig(run=run.id, limit=120)) == evaluation_run


def test_the_official_protocol_is_labelled(outputs):
    run = train_ssl(ssl())
    config = EvalConfig(run=run.id, limit=120, protocol="official", references=False)
    summary = evaluate(config).summary
    assert "official" in summary["knn_protocol"]
    assert summary["knn_protocol"].endswith(", final epoch")
    assert "best test epoch" in summary["linear_protocol"]
    assert summary["linear_protocol"].endswith(", final epoch")
    assert "knn_epoch" not in summary
    assert summary["linear_top1"] >= summary["linear_top1_last"]
    assert "pixels_knn_top1" not in summary


@pytest.mark.parametrize(("method", "of_linear"), [("plain", "best"), ("simclr", "last")])
def test_the_official_protocol_takes_the_kept_epoch_that_is_best_on_test(
    outputs, method, of_linear
):
    """The kept weights are made, not trained, so that no rounding decides between them: those of
    two seeds, which tell photographs apart; the last ones are spoilt: all features are the same."""
    run = train_ssl(ssl(method=method, epochs=3, keep_every=1))
    assert list(checkpoints.snapshots(run)) == [1, 2]
    tensors, state = checkpoints.load(run)
    for epoch in (1, 2):
        config = run.config.model_copy(update={"seed": epoch})
        about = About(recipe("none", 32, (0.5,) * 3, (0.25,) * 3))
        weights = build_method(config, about).state_dict()
        checkpoints.keep(run, epoch, {f"method.{k}": v for k, v in weights.items()})
    flat_tensors = {k: torch.zeros_like(v) if "conv1" in k else v for k, v in tensors.items()}
    checkpoints.save(run, state["step"], flat_tensors, state)

    how = dict(run=run.id, limit=120, k=20, references=False, device="cpu", precision="fp32")
    eval_config = EvalConfig(**how, protocol="official")
    evaluation_run = evaluate(eval_config)
    *bank, test = (images.load("photos", split, limit=120) for split in ("train", "val", "test"))
    labels = torch.cat([data.labels for data in bank])
    tau = 0.1 if method == "plain" else 0.5

    def encode(data, layer, epoch):
        module, *units = load_encoder(run, layer, epoch)
        return features(module, data.images, *units)

    accuracies = {}
    for epoch in (1, 2):
        z = torch.cat([encode(data, "projector", epoch) for data in bank])
        queries = encode(test, "projector", epoch)
        guess = naive_knn(z, labels, queries, len(test.classes), 20, tau)
        accuracies[epoch] = 100 * (torch.tensor(guess) == test.labels).double().mean().item()
    best_epoch = max(reversed(accuracies), key=accuracies.get)
    summary = evaluation_run.summary
    assert summary["knn_epoch"] == best_epoch
    assert summary["knn_top1"] == pytest.approx(accuracies[best_epoch])
    assert summary["knn_top1_last"] < summary["knn_top1"]
    assert summary["knn_protocol"].endswith(", best of 3 epochs by kNN on test")
    linear_epoch = best_epoch if of_linear == "best" else None
    assert summary["linear_epoch"] == linear_epoch
    layer = "projector" if method == "plain" else "backbone"
    torch.testing.assert_close(
        results(evaluation_run)["features"], encode(test, layer, linear_epoch)
    )
    # The same weights with other snapshots are another evaluation; the clean one knows of none.
    checkpoints.keep(run, 1, tensors)
    assert not evaluation.locate(eval_config).finished
    clean_summary = evaluate(EvalConfig(**how)).summary
    assert "knn_epoch" not in clean_summary and clean_summary["knn_protocol"].endswith(
        ", last weights"
    )


def test_of_equally_good_epochs_the_latest_is_taken(outputs):
    """As published: a later epoch that is as good takes the place of the best so far."""
    run = train_ssl(ssl(epochs=3, keep_every=1))
    weights, state = checkpoints.load(run)
    for epoch in (1, 2):
        checkpoints.keep(run, epoch, weights)
    config = EvalConfig(run=run.id, limit=60, protocol="official", references=False, device="cpu")
    assert evaluate(config).summary["knn_epoch"] is None  # the final one
    flat_weights = {k: torch.zeros_like(v) if "conv1" in k else v for k, v in weights.items()}
    checkpoints.save(run, state["step"], flat_weights, state)
    assert evaluate(config).summary["knn_epoch"] == 2


def test_imagenet_simsiam_s_official_classifier_is_trained_on_crops(outputs, monkeypatch):
    """By the final weights, whatever was kept; no references, asked for or not: one evaluation."""
    run = train_ssl(ssl(method="simsiam", pairing="imagenet", keep_every=1, epochs=2))
    config = EvalConfig(run=run.id, limit=60, protocol="official")
    assert evaluation.locate(config) == evaluation.locate(
        config.model_copy(update={"references": False})
    )
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "request", property(lambda self: "stop"))
        with pytest.raises(Stopped, match="after step 1 of 90"):
            evaluate(config)
    evaluation_run = evaluate(config)
    summary = evaluation_run.summary
    assert summary["knn_protocol"].startswith("official of SimSiam on ImageNet (bank without")
    words = "LARS on random crops of central squares, 90 epochs, the last, final epoch"
    assert summary["linear_protocol"].endswith(f": backbone features, {words}")
    assert not any("random" in key or "pixels" in key for key in summary)
    assert len(evaluation_run.metrics()) == 90  # of 60 images a step an epoch
    guess = results(evaluation_run)["encoder.linear"]
    assert summary["linear_n"] == len(guess) == 60
    assert (
        summary["linear_top1"] == 100 * (guess == results(evaluation_run)["labels"]).double().mean()
    )


def folder_of(root, n, classes=("cat", "dog")):
    """Class folders of n images each."""
    for shift, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            color = (99 * shift, 20 * i, 20 * i)
            Image.new("RGB", (40, 40), color).save(root / name / f"{i}.png")


DRIFT = "BatchNorm in eval mode (the published code lets it drift)"


@pytest.mark.parametrize(
    ("values", "of", "tau", "px", "classifier"),
    [
        (dict(method="ipirm", temperature=0.3, augmentation="ipirm"), "IP-IRM", 0.3, 48,
         f"Adam on random views ('ipirm'), 100 epochs, the last, tested on 48 px, {DRIFT}"),
        (dict(method="ipirm", baseline=True, augmentation="simclr"), "IP-IRM", 0.5, 48,
         f"Adam on random views ('simclr'), 100 epochs, the last, tested on 48 px, {DRIFT}"),
        (dict(method="rsa", augmentation="rsa"), "RSA", 0.1, 48,
         "Nesterov's SGD on random crops, 100 epochs, the best on test, tested on the middle 32 px "
         f"of 48 px, {DRIFT}"),
        (dict(method="rsa", rsa_views="aggressive", source_size=None), "RSA", 0.1, 32,
         f"Nesterov's SGD on random crops, 100 epochs, the best on test, tested on 32 px, {DRIFT}"),
        (dict(method="rsa", stem="imagenet", size=224, batch_size=4), "RSA on ImageNet", 0.1, None,
         "SGD on random crops of central squares, features L2-normalised and standardised, 40 "
         f"epochs, the best on test, {DRIFT}"),
    ],
)  # fmt: skip
def test_the_siblings_official_protocols_are_labelled(
    outputs, tmp_path, monkeypatch, values, of, tau, px, classifier
):
    """And the images are as large as those that the training's crops were cut of. (Two epochs are
    enough to see that.)"""
    crop_probe = evaluation.crops.crop_probe

    def probe(*sets, classifier, **how):
        return crop_probe(*sets, classifier=classifier._replace(epochs=2), **how)

    monkeypatch.setattr(evaluation.crops, "crop_probe", probe)
    size_field = {"source_size": 48} if px == 48 else {}
    if "source_size" not in SSLConfig.model_fields:
        monkeypatch.setattr(SSLConfig, "source_size", size_field.get("source_size"), raising=False)
        size_field, values = {}, {k: v for k, v in values.items() if k != "source_size"}
    if px is None:  # photographs are many to decode at 224 px
        for part, n in (("train", 4), ("val", 2), ("test", 10)):
            folder_of(tmp_path / "two" / part, n)
        values = values | {"dataset": str(tmp_path / "two")}
    run = train_ssl(ssl(**{"epochs": 1, "limit": 32} | size_field | values))
    config = EvalConfig(run=run.id, limit=20, protocol="official", k=9, device="cpu")
    summary = evaluate(config).summary
    at = f", images of {px} px" if px else ""
    knn_protocol = f"official of {of}: backbone features, k=9, τ={tau:g}{at}, final epoch"
    assert summary["knn_protocol"] == knn_protocol
    assert summary["linear_protocol"] == (
        f"official of {of}: backbone features, {classifier}, final epoch"
    )
    assert ("linear_top1_last" in summary) == ("best" in classifier)
    assert summary["linear_top1"] >= summary.get("linear_top1_last", 0)
    assert summary["linear_n"] == summary["knn_n"] == 20
    assert not any("random" in key or "pixels" in key for key in summary)


def test_rsa_s_official_protocol_is_of_its_own_sizes_and_stems(outputs):
    run = train_ssl(ssl(method="rsa", epochs=1, stem="imagenet"))
    eval_config = EvalConfig(run=run.id, limit=20, protocol="official")
    message = r"stem='imagenet' at size=32: take protocol='clean'"
    with pytest.raises(ConfigError, match=message):
        evaluate(eval_config)
    assert not (outputs / "eval").exists()
    for values in (dict(stem="mini"), dict(size=224), dict(size=224, stem="mini")):
        config = ssl(method="rsa", **values)
        with pytest.raises(ConfigError, match=f"at size={config.size}: take"):
            METHODS["rsa"].official_protocol(config)


def test_one_class_is_refused_by_classifiers_on_fresh_views(outputs, tmp_path):
    run = train_ssl(ssl(method="rsa", epochs=1))
    for part in ("train", "val", "test"):
        folder_of(tmp_path / "one" / part, 3, ("cat",))
    config = EvalConfig(run=run.id, dataset=str(tmp_path / "one"), protocol="official")
    with pytest.raises(ConfigError, match="has 1 class, and the official classifier of RSA needs"):
        evaluate(config)


def test_a_vae_comes_back_frozen(outputs, vae):
    network = load_vae(vae)
    assert (network.dim, network.size, network.width) == (8, 32, 4)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert network.mean == images.load("photos", "train").mean


def test_a_method_without_an_attack_refuses_an_adversary(outputs, monkeypatch):
    from idaa_lib.methods import METHODS, Step

    class Bare(SimCLR):
        def step(self, views, batch, moment):
            return Step(super().step(views, batch, moment).loss)

    monkeypatch.setitem(METHODS, "bare", Bare)
    with pytest.raises(ConfigError, match="Bare has nothing to attack"):
        train_ssl(ssl(method="bare", adversary="clae"))


def test_checkpoints_that_are_gone_are_not_silently_made_again(outputs, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7, interrupt)
        with pytest.raises(Stopped):
            train_vae(VAE)
    shutil.rmtree(locate(VAE).path / "checkpoints")
    with pytest.raises(RunError, match="are gone, though it had one at step 7"):
        train_vae(VAE)


def test_two_processes_start_the_same_run_and_one_wins(outputs, tmp_path):
    words = [f"{k}={v}" for k, v in (TINY | {"epochs": 60}).items()]
    command = [sys.executable, "-m", "idaa_lib.train", "vae", *words, "dim=8"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    streams = [process.communicate(timeout=300) for process in processes]
    codes = sorted(process.returncode for process in processes)
    run = locate(VAE.model_copy(update={"epochs": 60}))
    assert run.finished
    assert codes in ([0, 2], [0, 0])  # the later one may come after the end, and shows the result
    if codes == [0, 2]:
        assert any("is being written by process" in error for _, error in streams)
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").open()]
    assert steps == sorted(steps)


def test_a_kernel_s_interrupt_saves_and_is_one_sentence(outputs):
    """What the stop button of JupyterLab does."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        fields = ", ".join(f"{k}={v!r}" for k, v in (TINY | {"epochs": 4000}).items())
        client.execute(f"from idaa_lib import *\ntrain_vae(VAEConfig({fields}, dim=8))")
        run = locate(VAE.model_copy(update={"epochs": 4000}))
        for _ in range(600):
            if run.metrics():
                break
            time.sleep(0.1)
        manager.interrupt_kernel()
        while (message := client.get_iopub_msg(timeout=60))["msg_type"] != "error":
            pass
        assert message["content"]["ename"] == "Stopped"
        assert len(message["content"]["traceback"]) == 1
        assert "start the same run again to continue" in message["content"]["evalue"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert run.state["state"] == "interrupted"


@pytest.mark.gpu
def test_training_on_a_gpu_agrees_with_the_cpu(outputs):
    """In fp32, over a few steps: the same batches and views, so nearly the same loss."""
    losses = {}
    for device in ("cpu", "cuda"):
        config = ssl(device=device, precision="fp32", epochs=1, log_every=2, adversary="clae")
        if locate(config).finished:  # the device is no part of a run's identity
            shutil.rmtree(locate(config).path)
        losses[device] = [r["loss"] for r in train_ssl(config).metrics() if "loss" in r]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)


def test_two_processes_train_one_run(outputs):
    """As `accelerate launch` starts them: each sees its half of every batch, the first writes."""
    words = [f"{k}={v}" for k, v in TINY.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--standalone", "-m", "idaa_lib.train", "ssl", "adversary=clae"]
    process = subprocess.run([*command, *words], capture_output=True, text=True, timeout=150)
    assert process.returncode == 0, process.stderr[-3000:]
    run = locate(ssl(adversary="clae", projection_dim=64))
    assert run.finished
    assert run.environment["processes"] == 2
    assert [line["step"] for line in run.metrics() if "loss" in line] == [4, 8, 12]
    assert all(k.startswith("method.network.") for k in checkpoints.load(run)[0] if "method" in k)
    assert not any(".module." in k for k in checkpoints.load(run)[0])


def test_two_processes_train_ip_irm_on_mixed_images_as_one_would_begin(outputs):
    """Parts of a step that are differentiated one after another exchange their gradients, though
    not each of them reaches the adversarial norms; the first partition is that of one process.
    (In ℓ2: the sign of a gradient near 0 can differ by rounding.)"""
    options = dict(method="ipirm", mixup=True, mixup_max=True, adversary="clae", norm="l2")
    options |= dict(maximize_iter=1)
    values = (
        TINY
        | options
        | dict(epochs=2, batch_size=8, limit=16, log_every=1, seed=1, precision="fp32")
    )
    words = [f"{k}={v}" for k, v in values.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--standalone", "-m", "idaa_lib.train", "ssl", *words]
    process = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert process.returncode == 0, process.stderr[-3000:]
    run = locate(SSLConfig(**values))
    partitions = checkpoints.load(run)[0]["method.partitions"]
    first = next(line["loss"] for line in run.metrics() if "loss" in line)
    shutil.rmtree(run.path)
    single_run = train_ssl(SSLConfig(**values))
    assert torch.equal(checkpoints.load(single_run)[0]["method.partitions"][0], partitions[0])
    assert first == pytest.approx(single_run.metrics()[0]["loss"], rel=1e-5)


# --- what a method may do besides -----------------------------------------------------------------


def test_a_loss_of_closures_is_their_sum(outputs, monkeypatch):
    """Two halves that are differentiated one after the other train as the whole does."""

    class Halves(SimCLR):
        def step(self, views, batch, moment):
            step = super().step(views, batch, moment)

            def half_loss():
                z1, z2 = (self.embed(view).z for view in views)
                return self.contrast(z1, z2) / 2

            step.loss = [half_loss, half_loss]
            return step

    monkeypatch.setitem(METHODS, "halves", Halves)
    whole_lines = train_ssl(ssl(precision="fp32")).metrics()
    halves = train_ssl(ssl(precision="fp32", method="halves")).metrics()
    for key in ("loss", "alignment"):
        first, second = (
            [line[key] for line in lines if key in line] for lines in (whole_lines, halves)
        )
        assert first == pytest.approx(second, rel=1e-3)


def test_a_long_preparation_of_an_epoch_hears_a_stop_and_starts_again(outputs, monkeypatch):
    pulses = []

    class Prepares(SimCLR):
        def before_epoch(self, epoch, work):
            assert work.embed().shape == (len(work.images), 32)
            for part in range(3):
                pulses.append((epoch, part))
                work.pulse(f"part {part}")

    monkeypatch.setitem(METHODS, "prepares", Prepares)
    config = ssl(method="prepares", checkpoint_every=2)
    expected = outcome(train_ssl(config))
    shutil.rmtree(locate(config).path)
    pulses.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            runs.Run, "request", property(lambda self: "stop" if pulses[-1] == (1, 1) else None)
        )
        with pytest.raises(Stopped, match=r"after step 6 of 12 and saved"):
            train_ssl(config)
    again = outcome(train_ssl(config))
    assert pulses == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 0), (1, 1), (1, 2)]
    assert all(torch.equal(expected[0][k], again[0][k]) for k in expected[0])


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_long_validation_hears_a_stop_and_is_made_again(outputs, monkeypatch, at):
    """Nothing that was trained is lost, though the last checkpoint is older."""
    calls = []
    count = lambda *args, **how: calls.append(1) or features(*args, **how)  # noqa: E731
    monkeypatch.setattr(stages, "features", count)
    config = ssl(checkpoint_every=2)
    expected = outcome(train_ssl(config))
    assert len(calls) == 4  # validation images and the bank, after each of two epochs
    shutil.rmtree(locate(config).path)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            runs.Run, "request", property(lambda self: "stop" if len(calls) == at else None)
        )
        step = 6 if at < 3 else 12
        with pytest.raises(Stopped, match=rf"after step {step} of 12 and saved"):
            train_ssl(config)
    assert len(calls) == at and checkpoints.load(locate(config))[1]["step"] == step
    again = outcome(train_ssl(config))
    assert all(torch.equal(expected[0][k], again[0][k]) for k in expected[0])
    assert expected[1:] == again[1:]


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 6, 12, 18, 24]), (3, [0, 12, 18, 24]), (9, [0, 12, 24])]
)
def test_a_checkpoint_before_an_epoch_is_written_where_long_work_is_due_and_none_is_there(
    outputs, monkeypatch, every, expected
):
    class PreparesEverySecond(SimCLR):
        def before_epoch(self, epoch, work):
            for _ in range(2 * (epoch % 2 == 0)):
                work.pulse("part")

    steps, save = [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *a: (steps.append(a[1]), save(*a))[1])
    monkeypatch.setitem(METHODS, "prepares", PreparesEverySecond)
    train_ssl(ssl(method="prepares", checkpoint_every=every, epochs=4))
    assert steps == expected


def test_without_a_compiler_a_run_says_so_and_goes_on(outputs, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a page more")

    monkeypatch.setattr(torch, "compile", refuse)
    assert train_ssl(ssl(compile=True, epochs=1)).finished
    output = capsys.readouterr().out
    assert "compile=True is left out" in output and "No working C++ compiler found" in output
    assert "a page more" not in output


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_settings_of_a_gpu_are_put_back_and_fp32_is_ieee_s(precision):
    backends = torch.backends

    def settings():
        cudnn = backends.cudnn
        return cudnn.benchmark, cudnn.allow_tf32, backends.cuda.matmul.allow_tf32

    before = settings()
    with loop.gpu_settings(precision):
        assert settings() == ((True, False, False) if precision == "no" else (True, *before[1:]))
    assert settings() == before
