"""The ε explorer without a browser: pictures against the attack itself, meters against loops."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from idaa_lib.adversaries import CLAE, IDAA
from idaa_lib.configs import DecomposeConfig, VAEConfig
from idaa_lib.lab.engine import ADVERSARIES, Engine
from idaa_lib.lab.explorer import Explorer
from idaa_lib.train import train_vae

CONFIG = DecomposeConfig(images=4, epsilon=0.3)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(folder))
        train_vae(VAEConfig(limit=300, epochs=3, width=8, dim=16, batch_size=32, device="cpu"))
        yield folder


@pytest.fixture(scope="module")
def engine(outputs):
    return Engine(CONFIG, candidates=60)


def tiles(png):
    """The picture's cells (rows, images, 32, 32, 3) in [0, 1]."""
    grid = np.asarray(Image.open(io.BytesIO(png)))
    cut = grid.reshape(6, 33, 4, 33, 3).transpose(0, 2, 1, 3, 4)
    return cut[:, :, :32, :32].astype(float) / 255


def cells(pixels):
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 3.0])
def test_the_picture_is_the_attack(engine, epsilon):
    shown = engine.scene
    attack = IDAA(shown.vae, epsilon)(shown.x, shown.loss)
    G, R = shown.vae.decompose(shown.x)
    picture = tiles(engine.picture("idaa", epsilon))
    half = 0.5 / 255 + 1e-6
    assert np.abs(picture[0] - cells(shown.pixels(shown.x))).max() <= half
    assert np.abs(picture[1] - cells(shown.pixels(G))).max() <= half
    decoded = shown.vae.decode(attack.z)
    assert np.abs(picture[3] - cells(shown.pixels(decoded))).max() <= 2 * half
    assert np.abs(picture[4] - cells(shown.pixels(attack.images))).max() <= half
    std = torch.tensor(shown.std).view(3, 1, 1)
    assert np.abs(picture[2] - cells(0.5 + 3 * std * R)).max() <= half
    change = attack.images - shown.x
    assert np.abs(picture[5] - cells(0.5 + 3 * std * change)).max() <= half


def test_clae_moves_pixels_and_leaves_the_latent(engine):
    shown = engine.scene
    attack = CLAE(0.05)(shown.x, shown.loss)
    picture = tiles(engine.picture("clae", 0.05))
    assert np.abs(picture[4] - cells(shown.pixels(attack.images))).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(picture[3], picture[1])


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_meters_agree_with_loops(engine, adversary):
    shown, measured = engine.scene, engine.meters(adversary, 0.3)
    x_adv = engine.attack(adversary, 0.3).images
    with torch.no_grad():
        of = lambda x: engine.witness(x[None])[0].double()  # noqa: E731
        pool = [of(x) for x in engine.candidates]
        ranks, own, other = [], [], []
        for i, x in enumerate(x_adv):
            z = of(x)
            cosines = [(z @ c / z.norm() / c.norm()).item() for c in pool]
            ranks.append(1 + sum(c > cosines[i] + 1e-9 for c in cosines))
            own.append(cosines.pop(i))
            other.append(max(cosines))
    assert measured.n == 60
    assert measured.rank == pytest.approx(np.mean(ranks), abs=0.26)  # a tie in fp32 is one rank
    assert measured.cos_self == pytest.approx(np.mean(own), abs=1e-4)
    assert measured.cos_other == pytest.approx(np.mean(other), abs=1e-4)
    change = (x_adv - shown.x).flatten(1)
    assert measured.l2 == pytest.approx(np.mean([c.norm().item() for c in change]))
    assert measured.linf == pytest.approx(change.abs().max().item())
    assert measured.loss_after == pytest.approx(shown.loss(x_adv).item())


def test_without_a_change_identity_is_whole(engine):
    for adversary in ADVERSARIES:
        measured = engine.meters(adversary, 1e-9)
        assert measured.retrieved == 100
        assert measured.rank == 1
        assert measured.cos_self == pytest.approx(1, abs=1e-5)
        assert measured.loss_after == pytest.approx(measured.loss_before, abs=1e-5)


def test_the_witness_is_not_the_attacked_encoder(engine):
    assert engine.witness_name != engine.scene.attacked
    features = engine.witness(engine.scene.x)
    assert features.shape[0] == 4


def settle(explorer, told):
    for _ in range(100):
        if told in explorer.meters.value:
            return True
        time.sleep(0.1)
    return False


def test_moving_the_slider_changes_the_picture_and_the_meters_follow(outputs):
    explorer = Explorer(CONFIG)
    assert explorer.status.value == ""
    first = explorer.picture.value
    explorer.epsilon.value = 2.0
    second = explorer.picture.value
    assert second != first
    assert settle(explorer, "IDAA, ε = 2")
    explorer.epsilon.value = 0.3
    assert explorer.picture.value == first
    explorer.adversary.value = "clae"
    assert settle(explorer, "CLAE, ε = 0.3")
    before = explorer.picture.value
    explorer.seed.value = 5
    assert explorer.picture.value != before
    assert explorer.status.value == ""


def test_meters_of_an_older_move_are_dropped(outputs):
    explorer = Explorer(CONFIG)
    for value in (0.1, 0.2, 0.5):
        explorer.epsilon.value = value
    assert settle(explorer, "ε = 0.5")
    time.sleep(0.5)
    assert "ε = 0.5" in explorer.meters.value


def test_without_a_vae_it_says_what_to_run_first(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    explorer = Explorer(CONFIG)
    assert "01_pretrain_vae" in explorer.status.value
    assert "Traceback" not in explorer.status.value
