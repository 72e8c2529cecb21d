"""What is sent by mistake, or by someone who means harm, ends in one clear sentence."""

import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import hostile

from idaa_lib import interop
from idaa_lib.configs import (
    CompareConfig,
    ConfigError,
    EvalConfig,
    SSLConfig,
    SweepConfig,
    TransferConfig,
    VAEConfig,
)
from idaa_lib.data.decoding import decode
from idaa_lib.evaluate.probe import linear_probe
from idaa_lib.runs import Run, RunError, files
from idaa_lib.runs.machine import open_images
from idaa_lib.train import train


def test_drawn_configurations_are_accepted_or_refused_clearly(outputs):
    assert hostile.try_configurations(40, seed=1) == (40, [])


def test_drawn_grids_are_accepted_or_refused_clearly(outputs):
    assert hostile.try_grids(60, seed=1) == (60, [])


def test_damaged_images_are_read_or_refused_clearly(tmp_path):
    assert hostile.try_images(130, tmp_path, seed=1) == (130, [])


def test_hostile_checkpoints_are_read_or_refused_clearly(tmp_path):
    assert hostile.try_checkpoints(40, tmp_path, seed=1) == (40, [])


def test_what_is_sound_is_accepted(tmp_path):
    """Else all of it would be clear, and nothing would work."""
    for name, state in hostile.make_published(0).items():
        torch.save(state, tmp_path / "x.pth")
        assert interop.load_official(tmp_path / "x.pth").kind in (name, "simclr", "ipirm")
    draw = random.Random(0)
    stages = {hostile.draw_configuration(draw)[0] for _ in range(100)}
    assert stages == {*hostile.CONFIGS}


IDAA = {"adversary": "idaa"}


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (SSLConfig, IDAA | {"epsilon": 10**39}, "epsilon must be between -1e+30"),
        (SSLConfig, IDAA | {"epsilon": 1e308}, "epsilon must be between -1e+30 and 1e+30"),
        (SSLConfig, {"batch_size": 10**39}, "batch_size must be between -1e+30 and 1e+30"),
        (SSLConfig, {"batch_size": 10**5000}, "a int that is too large to print"),
        (SweepConfig, {"axes": "[" * 10**5}, "axes must be text of 1,000 characters"),
        (SweepConfig, {"ssl": '{"a":' * 900 + "1" + "}" * 900}, "ssl must be text of Unicode"),
        (SweepConfig, {"ssl": {"mean": hostile.NESTED}}, "ssl must be text of Unicode"),
        (CompareConfig, {"methods": True}, "methods must be a list of values, and is True"),
        (CompareConfig, {"methods": ()}, "methods must be one value or more, and is ()"),
        (SweepConfig, {"epsilons": "1e9999999999"}, "epsilons must be a finite number, and is inf"),
        (SSLConfig, {"method": ["simclr"]}, "method must be one of "),
        (SSLConfig, {"dataset": "\ud800"}, "dataset must be text of Unicode"),
        (SSLConfig, {"dataset": "a\0"}, "dataset must be text of 1,000 characters"),
        (SSLConfig, {"dataset": "a\nb"}, "dataset must be text of 1,000 characters"),
        (SSLConfig, {"schedule": "x " * 2500}, "schedule must be text of 1,000 characters at most"),
        (SSLConfig, {"on_error": "x" * 500}, "on_error must be 'raise' or 'skip', and is 'xxx"),
        (SSLConfig, {"preset": "x" * 5000}, "preset must be text of 1,000 characters at most"),
        (SSLConfig, {"preset": "~nosuchuser/x"}, "preset must be one of "),
        (SSLConfig, {"preset": "~nosuchuser/x.toml"}, "cannot be read"),
        (SSLConfig, {"x" * 5000: 1}, "SSLConfig has no field 'xxx"),
        (SSLConfig, {"std": (0, 1, 1)}, "std must be greater than 0, and is 0"),
    ],
)  # fmt: skip
def test_what_no_run_can_have_is_refused_in_few_words(config, values, words):
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert words in str(error.value)
    assert len(str(error.value)) <= hostile.LENGTH and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('extends = "mine.toml"', "extends itself"),
        ('extends = "../own/mine.toml"', "extends itself"),
        ("extends = 3", "preset must be one of"),
        ("ssl = 3", "has 3 where a table should be"),
        ("[ssl]\nwhere = 3", "has 3 where a table should be"),
        ('[ssl.where]\nmethod = "x"', "has 'x' where a table should be"),
        ('[ssl]\nbase_rate = "x"', "base_rate of preset='mine.toml' must be a number, and is 'x'"),
    ],
)
def test_a_recipe_that_is_none_is_one_sentence(text, words, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    Path("mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        SSLConfig(preset="mine.toml", batch_size=2)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (SSLConfig, {"projection_dim": 10**9}),
        (SSLConfig, {"method": "moco", "queue": 10**10}),
        (SSLConfig, {"projection_dim": 10**25}),
        (SSLConfig, {"batch_size": 10**9}),
        (VAEConfig, {"dim": 10**9}),
        (VAEConfig, {"width": 10**6}),
    ],
)
def test_memory_that_no_machine_has_is_refused_before_it_is_asked_for(config, values, outputs):
    before = psutil.Process().memory_info().rss
    name, number = [*values.items()][-1]
    sentence = rf"needs .* GiB .* take less of {name}={number}\.$"  # a seed takes no memory
    with pytest.raises(ConfigError, match=sentence):
        train(config(**hostile.TINY | values | {"seed": 2024}))
    assert psutil.Process().memory_info().rss - before < 2**29


def test_an_estimate_of_memory_is_of_the_weights_and_the_batch(outputs, monkeypatch):
    """4 numbers a weight: a network fits exactly where this product does."""
    values = hostile.TINY | {"projection_dim": 2000}
    network = SSLConfig(**values)
    weights = 4 * 4 * (32 * 32 + 32 + 32 * 2000 + 2000)  # of the projector alone
    for total, refusal in ((weights, True), (100 * weights, False)):
        room = type("Memory", (), {"total": total})
        monkeypatch.setattr(psutil, "virtual_memory", lambda room=room: room)
        start = mock.Mock(side_effect=hostile.Begun("accepted"))
        monkeypatch.setattr("idaa_lib.train.loop.Fit.run", start)
        with pytest.raises(ConfigError if refusal else hostile.Begun, match=r"network|accepted"):
            train(network)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (SSLConfig, {"dataset": "~nosuchuser/x"}),
        (SSLConfig, {"classes": "~nosuchuser/x"}),
        (SSLConfig, {"continue_from": "~nosuchuser/x"}),
        (SSLConfig, IDAA | {"vae": "~nosuchuser/" + "x" * 900}),
    ],
)
def test_the_home_of_nobody_is_a_place_where_nothing_is(config, values, outputs):
    with pytest.raises(hostile.UserError, match=r"(neither|There is no) .*~nosuchuser"):
        train(config(**hostile.TINY | values))


def test_one_image_teaches_no_classifier():
    data = torch.ones(1, 4), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ConfigError, match="needs 2 images or more to learn from, and has 1"):
        linear_probe(data, data, data[0], classes=2)
    assert EvalConfig(limit=1).limit == TransferConfig(limit=1).limit == 1  # enough for kNN


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_are_never_opened(make, tmp_path):
    for name in ("own.png", "x.pth", "x.zip", "x.toml", "classes.txt"):
        make(tmp_path / name)
    with pytest.raises(OSError, match="it is no file, but a folder, pipe or device"):
        decode(tmp_path / "own.png", 8)
    with pytest.raises(ConfigError, match="cannot be read: it is no file"):
        interop.load_official(tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="give the path of a folder or zip"):
        open_images(str(tmp_path / "x.zip"), "train", 8, None)
    with pytest.raises(ConfigError, match="is no list"):
        open_images(str(tmp_path), "train", 8, None, classes=str(tmp_path / "classes.txt"))
    with pytest.raises(ConfigError, match="cannot be read: it is no file"):
        SSLConfig(preset=str(tmp_path / "x.toml"))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_of_shards_and_runs_are_never_opened(make, tmp_path):
    make(tmp_path / "x.tar")
    for streamed in (False, True):
        with pytest.raises(ConfigError, match=r"x\.tar is no readable tar \(it is no file"):
            open_images(str(tmp_path), "train", 8, None, streamed=streamed)
    for name in ("config.json", "starts.json", "not_finite.json", *files.KINDS):
        make(tmp_path / name)
        with pytest.raises(RunError, match=rf"{name} is damaged \(it is no file"):
            files.read_json(tmp_path / name)
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be read \(it is no file"):
        Run(tmp_path).metrics()


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    path = tmp_path / "x.png"
    path.touch()
    os.truncate(path, 2**31)  # sparse
    with pytest.raises(OSError, match="it has 2 GiB, and an image file at most 1"):
        decode(path, 8)


# --- torch's own fault ---------------------------------------------------------------------------

BACKWARD = """
import sys, torch
from idaa_lib.nets import build_backbone
for width, side in ((8, 64), (4, 32), (12, 48)):
    backbone = build_backbone("resnet18", width=width, stem="cifar", adversarial_norms=False)
    x = torch.randn(8, 3, side, side).contiguous(memory_format=torch.channels_last)
    backbone.to(memory_format=torch.channels_last)(x).sum().backward()
"""


def test_narrow_networks_of_large_images_learn():
    """torch's own convolution kills the process there, or writes behind its memory unseen."""
    command = [sys.executable, "-c", BACKWARD]
    kinds = [os.environ | {"ONEDNN_MAX_CPU_ISA": isa} for isa in ("AVX2", "DEFAULT")]
    processes = [subprocess.Popen(command, env=environment) for environment in kinds]
    assert [process.wait(120) for process in processes] == [0, 0]
