"""What ships in data/starter: whole, small, never changed, and shown where there is no run."""

import hashlib
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import starter

from idaa_lib import runs
from idaa_lib.configs import ConfigError, DecomposeConfig, SSLConfig, TheoryConfig, VAEConfig
from idaa_lib.data.cached import load
from idaa_lib.data.places import STARTER
from idaa_lib.data.pool import CIFAR_UNITS
from idaa_lib.evaluate.encoders import load_encoder, load_vae
from idaa_lib.identity import study
from idaa_lib.identity.networks import name_images, name_runs
from idaa_lib.identity.scene import open_scene
from idaa_lib.lab.notebook import choose
from idaa_lib.runs import Run, RunError, checkpoints, choice, directory
from idaa_lib.train import train_ssl, train_vae

STAGES = {"vae": ["starter"], "ssl": ["starter", "starter2"]}


def digest_files():
    paths = sorted(path for path in STARTER.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_it_has_three_whole_runs_in_half_precision_of_at_most_8_mb():
    assert sum(path.stat().st_size for path in digest_files()) < 8e6
    for stage, names in STAGES.items():
        ships = choice.list_starter(stage)
        assert [run.id for run in ships] == names
        for run in ships:
            assert run.finished and run.metrics() and checkpoints.are_whole(run)
            assert (run.config.dataset, run.config.preset) == ("cifar10", "cifar10")
            (file,) = run.path.glob("checkpoints/*/tensors.safetensors")
            kinds = {v.dtype for v in load_file(file).values()}
            assert kinds == {torch.float16, torch.int64}


def test_its_encoders_have_seeds_of_their_own_and_no_adversary():
    first, witness = choice.list_starter("ssl")
    assert first.config.seed != witness.config.seed
    assert {first.config.adversary, witness.config.adversary} == {"none"}
    configs = [run.config.replace(seed=0) for run in (first, witness)]
    assert configs[0] == configs[1]


def test_its_images_are_500_of_cifar10_with_its_published_units():
    counts = Counter()
    for split, n in (("train", 100), ("val", 300), ("test", 100)):
        images = load("starter", split)
        assert (len(images), images.mean, images.std) == (n, *CIFAR_UNITS)
        counts.update(images.labels.tolist())
    assert counts == dict.fromkeys(range(10), 50)


def test_its_networks_load_in_full_precision():
    for module in (load_vae("starter"), load_encoder("starter").module):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_16_bit_weights_give_the_pictures_of_32_bit_ones_within_two_levels():
    """Simulated: of weights that lie anywhere between the 16-bit ones, to which they are rounded.
    (Those that were exported: `benchmarks/starter.py`, its result file.)"""
    scene = open_scene(DecomposeConfig(vae="starter", images=32))
    other = load_vae("starter")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p *= 1 + (torch.rand_like(p) - 0.5) * 2.0**-10  # half a step of 11 bits each way
    z = scene.vae.encode(scene.x)[0]
    for step in (0.0, 0.1, 1.0):  # of IDAA: each coordinate by ±ε
        point = z + step * torch.randn_like(z).sign()
        pictures = [scene.pixels(vae.decode(point)) for vae in (scene.vae, other)]
        assert 0 < (pictures[0] - pictures[1]).abs().max() < 2 / 255


def test_none_means_the_starter_where_there_is_no_vae(outputs, capsys):
    config = choose(DecomposeConfig())
    assert (config.vae, config.run) == ("starter", "starter")
    assert "The starter is a small VAE" in capsys.readouterr().out
    theory = name_runs(TheoryConfig())
    assert (theory.vae, theory.run, theory.witness) == ("starter", "starter", "starter2")
    assert name_images(theory, runs.get("vae", "starter")) == "starter"
    with pytest.raises(ConfigError, match="encoder that is attacked"):
        name_runs(TheoryConfig(witness="starter"))


def test_a_vae_of_one_s_own_comes_before_it(outputs, capsys):
    vae = train_vae(VAEConfig(limit=60, width=4, dim=4, batch_size=20, epochs=1, device="cpu"))
    config = choose(DecomposeConfig())
    assert config.vae == vae.id and config.run == "untrained"
    assert "The starter is" not in capsys.readouterr().out
    assert open_scene(DecomposeConfig(vae="starter", dataset="photos")).data.name == "photos"


def test_a_study_and_a_training_use_it_and_leave_it_as_it_was(outputs):
    before = digest_files()
    run = study(TheoryConfig(images=40, limit=60, epsilons=(0.1,), device="cpu"))
    assert run.path.is_relative_to(outputs) and run.summary["attacked"] == "starter"
    ships = runs.get("vae", "starter")
    assert ships.figure("rows.png").is_relative_to(outputs)
    with pytest.raises(RunError, match="no run directory of yours"):
        ships.delete()
    fields = {"limit": 60, "batch_size": 20, "epochs": 1, "width": 4, "device": "cpu"}
    encoder = train_ssl(SSLConfig(**fields, dataset="starter", adversary="idaa", vae="starter"))
    assert (encoder.config.vae, encoder.config.dataset) == ("starter", "starter")
    assert digest_files() == before


def test_by_a_link_to_the_checkout_it_is_the_same(tmp_path):
    (tmp_path / "link").symlink_to(STARTER)
    run = runs.get("vae", str(tmp_path / "link" / "vae" / "starter"))
    assert run.ships and run.reference == "starter"


def test_one_that_is_damaged_or_missing_takes_nobody_down(outputs, tmp_path, monkeypatch):
    copy = shutil.copytree(STARTER, tmp_path / "starter")
    for module in (directory, choice):
        monkeypatch.setattr(module, "STARTER", copy)
    assert [run.path.parent.parent for run in choice.list_starter("ssl")] == [copy, copy]
    (copy / "ssl" / "starter" / "config.json").write_text('{"preset": "ci')
    assert [run.id for run in choice.list_starter("ssl")] == ["starter2"]
    shutil.rmtree(copy)
    with pytest.raises(RunError, match="01_pretrain_vae"):
        name_runs(DecomposeConfig())


def test_an_export_is_the_run_in_half_precision(outputs, tmp_path, monkeypatch):
    vae = train_vae(VAEConfig(limit=60, width=4, dim=4, batch_size=20, epochs=1, device="cpu"))
    for module in (directory, choice, starter):
        monkeypatch.setattr(module, "STARTER", tmp_path / "starter")
    copy = starter.export(vae, "starter")
    assert copy.ships and runs.get("vae", "starter").summary == vae.summary
    assert "fingerprint" not in copy.environment["dataset"]
    weights, half_weights = load_vae(vae).state_dict(), load_vae("starter").state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(half_weights[name], tensor, rtol=2**-11, atol=1e-7)
    assert starter.export(copy, "starter") == copy and checkpoints.are_whole(copy)
    shutil.rmtree(vae.path / "checkpoints")
    with pytest.raises((SystemExit, RunError)):
        starter.export(vae, "starter")
    assert checkpoints.are_whole(Run(copy.path))
