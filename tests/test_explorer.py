"""The ε explorer without a browser: pictures against the attack itself, meters against loops."""

import datetime
import html
import io
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import urlencode

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from idaa_lib.adversaries import CLAE, IDAA, RandomSign
from idaa_lib.configs import ConfigError, DecomposeConfig, SSLConfig, VAEConfig
from idaa_lib.identity.networks import UNTRAINED
from idaa_lib.identity.scene import ADVERSARIES
from idaa_lib.lab.background import Background
from idaa_lib.lab.controls import EQUAL_HARDNESS, Epsilon, keep_image
from idaa_lib.lab.engine import EPSILONS, GAIN, SHARES, STRIP, Engine
from idaa_lib.lab.explorer import Explorer
from idaa_lib.lab.grid import Grid
from idaa_lib.results import full_name
from idaa_lib.runs import Run, find
from idaa_lib.runs.machine import open_images
from idaa_lib.train import train_ssl, train_vae
from idaa_lib.train.samples import grid

SMALL = dict(limit=300, width=8, batch_size=32, device="cpu")
CONFIG = DecomposeConfig(images=4, epsilon=0.3)
NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def outputs(module_outputs):
    train_vae(VAEConfig(**SMALL, epochs=1, dim=8))
    train_vae(VAEConfig(**SMALL, epochs=3, dim=16))  # the newest
    return module_outputs


@pytest.fixture(scope="module")
def engine(outputs):
    return Engine(CONFIG, candidates=60)


@pytest.fixture
def explorer(outputs):
    app = Explorer(CONFIG)
    assert app.status.value == app.problems.value == ""
    app.epsilon.value = 0.3
    yield app
    app.engine = None  # its curves are read no further
    assert app._background.settle()  # nothing of one test runs in the next


def picture_of(rows):
    """What a widget shows of rows of pixels."""
    return grid(list(rows), form="webp")


def decode(png, rows, columns, size=32):
    """A grid's cells (rows, columns, size, size, 3) in [0, 1]."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    tiles = pixels.reshape(rows, size + 1, columns, size + 1, 3).transpose(0, 2, 1, 3, 4)
    return tiles[:, :, :size, :size].astype(float) / 255


def cells(pixels):
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()


HALF = 0.5 / 255 + 1e-5  # what a byte rounds away, and fp32


@pytest.mark.parametrize("form", ["png", "webp"])
def test_a_grid_is_the_pixels_themselves(form):
    rows = [torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    picture = decode(grid(rows, form=form), 2, 3, size=8)
    for tiles, pixels in zip(picture, rows, strict=True):
        assert np.abs(tiles - cells(pixels)).max() <= HALF
    widget = Grid(["a", "b"], "idaa-x")
    widget.resize(3, 8)
    assert (widget.image.layout.width, widget.image.layout.height) == ("54px", "36px")


def test_a_grid_without_pixels_is_no_broken_picture():
    """An `<img>` without a source has the browser's sign for what is broken; one of another size
    shows what was there before."""
    widget = Grid(["a"], "idaa-x")
    for size in (8, 16):
        widget.resize(3, size)
        assert widget.image.layout.visibility == "hidden"
        widget.show([torch.rand(3, 3, size, size)])
        assert widget.image.layout.visibility is None


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("epsilon", [0.01, 0.3, 3.0])
def test_the_picture_is_the_attack(outputs, epsilon, norm):
    engine = Engine(CONFIG.model_copy(update={"norm": norm}))
    scene = engine.scene
    attack = IDAA(scene.vae, epsilon=epsilon, norm=norm)(scene.x, scene.loss)
    G, R = scene.vae.decompose(scene.x)
    x_, G_, R_ = decode(grid([*engine.still().values()]), 3, 4)
    assert np.abs(x_ - cells(scene.pixels(scene.x))).max() <= HALF
    assert np.abs(G_ - cells(scene.pixels(G))).max() <= HALF
    std = torch.tensor(scene.std).view(3, 1, 1)
    assert np.abs(R_ - cells(0.5 + GAIN * std * R)).max() <= HALF
    G_adv, x_adv, change = decode(grid([*engine.moving("idaa", epsilon).values()]), 3, 4)
    assert np.abs(G_adv - cells(scene.pixels(scene.vae.decode(attack.z)))).max() <= 2 * HALF
    assert np.abs(x_adv - cells(scene.pixels(attack.images))).max() <= HALF
    assert np.abs(change - cells(0.5 + GAIN * std * (attack.images - scene.x))).max() <= HALF


def test_clae_moves_pixels_and_leaves_the_latent(engine):
    scene = engine.scene
    attack = CLAE(epsilon=0.05)(scene.x, scene.loss)
    G_adv, x_adv, _ = decode(grid([*engine.moving("clae", 0.05).values()]), 3, 4)
    assert np.abs(x_adv - cells(scene.pixels(attack.images))).max() <= HALF
    assert np.array_equal(G_adv, decode(grid([*engine.still().values()]), 3, 4)[1])


def test_several_steps_are_the_adversary_s_own(outputs):
    engine = Engine(CONFIG.model_copy(update={"steps": 3}))
    scene = engine.scene
    assert not scene.live("idaa")
    assert scene.live("random_sign")
    options = {"epsilon": 0.3, "steps": 3}
    for name, adversary in (("idaa", IDAA(scene.vae, **options)), ("clae", CLAE(**options))):
        expected = adversary(scene.x, scene.loss).images
        assert torch.equal(scene.attack(name, 0.3), expected)
        assert torch.equal(scene.attack(name, 0.3, first=2), expected[:2])
    (signs,) = (direction.unit for direction in scene.directions("random_sign"))
    assert torch.equal(signs.abs(), torch.ones_like(signs))


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_the_first_images_are_attacked_among_all(engine, adversary):
    batch = engine.scene.attack(adversary, 0.3)
    rows = engine.scene.attack(adversary, 0.3, first=2)
    assert torch.allclose(rows, batch[:2], atol=1e-5)
    strip = engine.strip(1)
    row = list(strip)[ADVERSARIES.index(adversary)]
    for image, e in zip(strip[row], STRIP, strict=True):
        expected = engine.scene.pixels(engine.scene.attack(adversary, e)[1])
        assert torch.allclose(image, expected, atol=1e-5)


def test_random_signs_are_the_same_at_every_epsilon(engine):
    scene = engine.scene
    (direction,) = scene.directions("random_sign")
    assert direction.unit.abs().unique().tolist() == [1.0]
    for e in (0.1, 0.4):
        with torch.no_grad():
            G_adv = scene.vae.decode(scene.vae.encode(scene.x)[0] + e * direction.unit)
        expected = scene.parts["R"] + G_adv
        assert torch.allclose(scene.attack("random_sign", e), expected, atol=1e-5)
    assert isinstance(scene._adversary("random_sign", 0.1), RandomSign)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_meters_agree_with_loops(engine, adversary):
    scene, row = engine.scene, engine.reading(adversary, 0.3).row
    x_adv, witness = scene.attack(adversary, 0.3), engine.witness.embed
    with torch.no_grad():
        embed = lambda x: witness(x[None])[0].double()  # noqa: E731
        pool = [embed(x) for x in engine.candidates]
        ranks, own_cosines, other_cosines = [], [], []
        for i, x in enumerate(x_adv):
            z = embed(x)
            cosines = [(z @ c / z.norm() / c.norm()).item() for c in pool]
            ranks.append(1 + sum(c > cosines[i] + 1e-9 for c in cosines))
            own_cosines.append(cosines.pop(i))
            other_cosines.append(max(cosines))
    assert row["n"] == 60
    assert row["rank"] == pytest.approx(np.mean(ranks), abs=0.26)  # a tie in fp32 is one rank
    assert row["own"] == pytest.approx(np.mean(own_cosines), abs=1e-4)
    assert row["nearest"] == pytest.approx(np.mean(other_cosines), abs=1e-4)
    change = (x_adv - scene.x).flatten(1)
    assert row["l2"] == pytest.approx(np.mean([c.norm().item() for c in change]))
    assert row["linf"] == pytest.approx(change.abs().amax(1).mean().item())
    assert row["loss_after"] == pytest.approx(scene.loss(x_adv).item())


def test_without_a_change_identity_is_whole(engine):
    for adversary in ADVERSARIES:
        row = engine.reading(adversary, 1e-9).row
        assert row["retrieved"] == 100
        assert row["rank"] == 1
        assert row["own"] == pytest.approx(1, abs=1e-5)
        assert row["loss_after"] == pytest.approx(row["loss_before"], abs=1e-5)


def test_curves_are_the_meters_and_equal_hardness_reads_them(outputs):
    engine = Engine(CONFIG, candidates=30)
    count = 0
    while engine.advance():
        count += 1
        for curve in engine.curves.values():
            epsilons = [row["epsilon"] for row in curve]
            assert epsilons == sorted(epsilons)
    assert count == 3 * len(EPSILONS)
    assert engine.complete
    for adversary, curve in engine.curves.items():
        assert [row["epsilon"] for row in curve] == list(EPSILONS)
        assert curve[8] == engine.reading(adversary, EPSILONS[8]).row
    for e in (0.1, 0.4):
        epsilon = engine.as_hard("clae", e)
        assert 0 < epsilon < 10
        target, loss = (
            engine.reading(*a).row["loss_after"] for a in (("idaa", e), ("clae", epsilon))
        )
        # Between two points of the curves the loss is interpolated.
        assert loss == pytest.approx(target, abs=0.05)
    # IDAA is as hard as itself at its own ε, wherever its loss grows.
    assert engine.as_hard("idaa", EPSILONS[6]) == pytest.approx(EPSILONS[6])
    assert engine.as_hard("idaa", EPSILONS[0] / 2) == pytest.approx(EPSILONS[0] / 2)


def test_where_no_epsilon_is_as_hard_it_says_so(engine, monkeypatch):
    def point(epsilon, loss_after):
        return {"epsilon": epsilon, "loss_after": loss_after}

    curves = {
        "idaa": [point(0.1, 2.0), point(1.0, 4.0)],
        "clae": [point(0.1, 1.5), point(1.0, 3.0)],
    }
    monkeypatch.setattr(engine, "curves", curves)
    monkeypatch.setitem(engine.scene.__dict__, "loss_before", 1.0)
    assert engine.as_hard("clae", 1.0) is None
    assert engine.as_hard("clae", 0.1) == pytest.approx(10 ** (-1 + 1 / 3))  # a third from 1.5 to 3
    # Below the first point a decade leads to the loss of x: IDAA's 1.25 is CLAE's half-way.
    assert engine.as_hard("clae", 0.01 * 10**0.25) == pytest.approx(0.01 * 10**0.5)
    curves["idaa"][0]["loss_after"] = 0.9
    assert engine.as_hard("clae", 0.1) == 0


def test_the_witness_is_not_the_attacked_encoder(engine):
    witness = engine.witness.embed
    assert (engine.witness.name, engine.scene.attacked) == (UNTRAINED, UNTRAINED)
    x = engine.scene.x
    with torch.no_grad():
        a, b = witness(x), engine.scene.loss(x)
    assert a.shape[0] == 4 and b.dim() == 0
    other_engine = Engine(CONFIG.model_copy(update={"run": UNTRAINED}))
    with torch.no_grad():
        assert torch.equal(other_engine.witness.embed(x), a)


def test_a_trained_encoder_is_attacked_and_another_one_judges(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    train_vae(VAEConfig(**SMALL, epochs=1, dim=8))
    first, second = (train_ssl(SSLConfig(**SMALL, epochs=1, seed=seed)) for seed in (0, 1))
    engine = Engine(CONFIG)
    assert (engine.scene.attacked, engine.witness.name) == (second.id, first.id)
    choice = Engine(CONFIG.model_copy(update={"run": first.id}))
    assert (choice.scene.attacked, choice.witness.name) == (first.id, second.id)


# --- which images ------------------------------------------------------------------------------


def test_images_by_class_index_and_file(outputs, tmp_path):
    data = open_images("photos", "val", 32, None)
    pixels = lambda e: e.scene.pixels(e.scene.x).mul(255).round().byte()  # noqa: E731
    by_index = Engine(CONFIG.model_copy(update={"indices": (17, 3)}))
    assert torch.equal(pixels(by_index)[:2], data.images[[17, 3]])
    assert by_index.scene.names[0].endswith(" 17")
    class_name = data.classes[2]
    assert (data.labels == 2).sum() >= 4
    by_class = Engine(CONFIG.model_copy(update={"only": class_name}))
    assert all(name.startswith(class_name) for name in by_class.scene.names)
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[::2] = 255
    Image.fromarray(stripes).save(tmp_path / "mine.png")
    by_file = Engine(CONFIG.model_copy(update={"own": str(tmp_path / "mine.png"), "indices": (3,)}))
    assert torch.equal(pixels(by_file)[0], torch.tensor(stripes).permute(2, 0, 1))
    assert torch.equal(pixels(by_file)[1], data.images[3])
    assert len(by_file.scene.x) == 4
    # No candidate twice: an image would be found as its own copy.
    crops = by_index.candidates.flatten(1).unique(dim=0)
    assert len(crops) >= len(by_index.candidates) - 5  # the photographs have some equal crops


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        (dict(only="unicorn"), "only must be a class"),
        (dict(only="coffee", images=99), "images=99 is more than the .* of only='coffee' in split"),
        (dict(indices=(10**6,)), "1000000 is beyond"),
        (dict(own="/no/such.png"), "own='/no/such.png' cannot be read"),
        (dict(dataset="/no/such/folder"), "/no/such/folder"),
        (dict(run="nobody"), "no ssl run"),
    ],
)
def test_images_that_are_not_there_are_one_sentence(outputs, update, sentence):
    with pytest.raises((ConfigError, RuntimeError), match=sentence):
        Engine(CONFIG.model_copy(update=update))


# --- walks -------------------------------------------------------------------------------------


def test_walks_in_the_latent(engine):
    scene = engine.scene
    G, _ = scene.vae.decompose(scene.x)
    for kind in ("coordinate", "principal direction"):
        still, back = engine.step(kind, 0, 0.0).values()
        assert torch.allclose(still, scene.pixels(G), atol=1e-5)
        assert torch.allclose(back, scene.pixels(scene.x), atol=1e-5)
    latents = scene.vae.encode(engine.candidates)[0].double().numpy()
    values, vectors = np.linalg.eigh(np.cov(latents.T))
    step = engine.steps["principal direction"][0].double().numpy()
    assert np.linalg.norm(step) == pytest.approx(values[-1] ** 0.5, rel=1e-3)
    assert abs(step @ vectors[:, -1]) == pytest.approx(np.linalg.norm(step), rel=1e-3)
    walk = engine.steps["coordinate"][5]
    assert walk.nonzero().flatten().tolist() == [5]
    assert walk[5] == pytest.approx(latents[:, 5].std(ddof=1), rel=1e-3)


def test_a_residual_exchanged(engine):
    scene = engine.scene
    G, R = scene.vae.decompose(scene.x)
    z_moves, r_moves = engine.morph(0, 2).values()
    assert len(z_moves) == len(r_moves) == len(SHARES)
    for first in (z_moves[0], r_moves[0]):
        assert torch.allclose(first, scene.x[0], atol=1e-5)
    assert torch.allclose(z_moves[-1], R[0] + G[2], atol=1e-5)
    assert torch.allclose(r_moves[-1], G[0] + R[2], atol=1e-5)
    like = engine.likeness(torch.cat([z_moves[:1], scene.x[2:3]]), 0, 2)
    assert torch.allclose(like.diagonal(), torch.ones(2), atol=1e-5)
    with torch.no_grad():
        z = F.normalize(engine.witness.embed(scene.x[[0, 2]]), dim=1)
    assert like[0, 1] == pytest.approx((z[0] @ z[1]).item(), abs=1e-5)


# --- widgets -----------------------------------------------------------------------------------


def test_moving_the_slider_changes_the_picture_and_the_meters_follow(explorer):
    first, still = explorer.picture.image.value, explorer.still.image.value
    explorer.epsilon.value = 2.0
    assert explorer.picture.image.value != first
    assert explorer.still.image.value == still
    assert explorer._background.settle()
    assert "IDAA, ε = 2<" in explorer.meters.value
    explorer.epsilon.value = 0.3
    assert explorer.picture.image.value == first
    explorer.adversary.value = "clae"
    assert explorer._background.settle()
    assert "CLAE, ε = 0.3<" in explorer.meters.value
    assert explorer.status.value == ""


@pytest.mark.parametrize(
    ("text", "epsilon"),
    [("8/255", 8 / 255), ("0,05", 0.05), (" .123 ", 0.123), ("1e-2", 0.01), ("10", 10.0),
     ("1 / 3", 1 / 3), ("0.12345678901", 0.12345678901), ("1/1000", 0.001)],
)  # fmt: skip
def test_epsilon_is_what_was_typed(text, epsilon):
    control = Epsilon(0.1)
    control.field.value = text
    assert (control.value, control.field.value, control.complaint) == (epsilon, text, "")
    assert abs(np.log10(control.slider.value / epsilon)) < 0.005  # the slider's place follows
    # The page answers with the step next to it, which is no move.
    control.slider.value = 10 ** (round(np.log10(epsilon) * 100) / 100)
    assert (control.value, control.field.value) == (epsilon, text)
    control.slider.value = 0.5
    assert (control.value, control.field.value) == (0.5, "0.5")


@pytest.mark.parametrize(
    "text", ["20", "0", "-1", "0.0009", "wide", "", "1/0", "nan", "inf", "1,000.5"]
)
def test_what_is_no_epsilon_stays_marked_until_it_is_mended(text):
    control = Epsilon(0.1)
    control.field.value = text
    assert (control.value, control.field.value) == (0.1, text)
    assert repr(text) in control.complaint
    control.field.value = "0.1"
    assert control.complaint == ""
    control.field.value = text
    control.slider.value = 1.0
    assert (control.value, control.field.value, control.complaint) == (1.0, "1", "")


def test_epsilon_starts_where_training_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    train_vae(VAEConfig(**SMALL, epochs=1, dim=8))
    assert Engine(CONFIG).trained_epsilon is None
    for adversary, epsilon in (("clae", 0.02), ("idaa", 0.4)):
        train_ssl(SSLConfig(**SMALL, epochs=1, adversary=adversary, epsilon=epsilon))
        explorer = Explorer(CONFIG)
        expected = epsilon if adversary == "idaa" else IDAA.Options().epsilon  # CLAE's is of pixels
        assert explorer.epsilon.value == expected
        words = "in training" if adversary == "idaa" else "IDAA's default"
        assert f"{expected:g} {words}" in explorer.epsilon.mark.value
        explorer.engine = None
        assert explorer._background.settle()


def test_the_verdict_compares_at_an_equal_loss(explorer):
    assert explorer._background.settle()
    engine = explorer.engine
    idaa, clae = engine.at_equal_loss(0.3)
    assert clae.row["epsilon"] == engine.as_hard("clae", 0.3)
    text = html.unescape(explorer.verdict.value)
    assert f"IDAA (ε = 0.3) keeps {idaa.row['retrieved']:.0f} % of 4 images" in text
    assert f"{clae.row['retrieved']:.0f} %" in text and "95 %" in text
    marks = re.findall(r">([✓✗]) (\d+)<", explorer.picture._bottom.value)
    assert [(sign == "✓", int(rank)) for sign, rank in marks] == [
        (rank == 1, rank) for rank in idaa.identity.ranks.tolist()
    ]


def test_all_images_are_shown_and_one_is_enlarged(explorer):
    explorer.images.value = 40
    assert settle(explorer)
    assert decode(explorer.picture.image.value, 3, 40).shape[1] == 40
    explorer.chosen.value = 33
    assert settle(explorer)
    x, *_, x_adv, _ = decode(explorer.large.image.value, 1, 6)[0]
    scene = explorer.engine.scene
    assert np.abs(x - cells(scene.pixels(scene.x))[33]).max() <= HALF
    assert np.abs(x_adv - cells(scene.pixels(scene.attack("idaa", 0.3)))[33]).max() <= HALF
    explorer.images.value = 4  # fewer than that one
    assert settle(explorer)
    assert explorer.chosen.value == -1 and explorer.status.value == ""


def test_two_settings_are_seen_side_by_side(explorer):
    assert settle(explorer)
    picture = explorer.picture.image.value
    explorer.pin.value = True
    assert settle(explorer)
    explorer.epsilon.field.value = "2"
    assert settle(explorer)
    assert explorer.pinned.image.value == picture != explorer.picture.image.value
    assert "IDAA, ε = 2<" in explorer.meters.value
    assert "pinned: IDAA, ε = 0.3<" in explorer.meters.value
    old, new = (full_name(run) for run in find("vae"))
    assert old in explorer.meters.value and new not in explorer.meters.value
    explorer.vae.value = find("vae")[1].reference  # the same encoders, another split
    assert settle(explorer)
    pinned, now = explorer.meters.value.split("</table>")
    assert re.search(
        rf"pinned: IDAA, ε = 0.3 \(judged by an untrained .* · {re.escape(old)}\)", pinned
    )
    assert new in now and old not in now
    explorer.pin.value = False
    assert settle(explorer)
    assert "pinned" not in explorer.meters.value


def test_a_setting_comes_back_by_reset_and_by_a_link(explorer, monkeypatch):
    assert settle(explorer)
    start = explorer.setting
    explorer.indices.value, explorer.seed.value, explorer.norm.value = "3, 17", 4, "l2"
    explorer.adversary.value, explorer.epsilon.field.value = "random_sign", "8/255"
    assert settle(explorer)
    picture, setting = explorer.picture.image.value, explorer.setting
    monkeypatch.setenv("QUERY_STRING", "token=x")
    explorer._write_meters()
    link = re.search(r'href="\?([^"]*)"', explorer.meters.value)[1]
    explorer.reset.click()
    assert settle(explorer)
    assert explorer.setting == start | {"epsilon": "0.1"}
    assert explorer.picture.image.value != picture
    for query, complaint in ((html.unescape(link), ""), ("seed=many&epsilon=99", "seed must be")):
        monkeypatch.setenv("QUERY_STRING", query)
        visitor = Explorer(CONFIG)
        assert settle(visitor)
        assert complaint in visitor.problems.value
        assert visitor.setting == (start | {"epsilon": "0.1"} if complaint else setting)
        assert (visitor.picture.image.value == picture) == (not complaint)
        visitor.engine = None
        assert visitor._background.settle()


@pytest.fixture
def pets(tmp_path):
    """A folder of this server with images, of which no visitor knows."""
    for i in range(60):
        path = tmp_path / "our own pets" / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (4 * i, 0, 0)).save(path)
    return tmp_path / "our own pets"


@pytest.fixture
def visit(outputs, monkeypatch):
    """Makes the explorer of a visitor, where one run is damaged, and closes it."""
    visitors, bad = [], outputs / "vae" / "vae-bad-00000000"
    bad.mkdir()
    (bad / "config.json").write_text("{")

    def open_page(query, config=CONFIG):
        monkeypatch.setenv("QUERY_STRING", query)
        visitors.append(Explorer(config))
        assert settle(visitors[-1])
        return visitors[-1]

    yield open_page
    shutil.rmtree(bad)
    for visitor in visitors:
        visitor.engine = None
        assert visitor._background.settle()


def state_of(widget):
    """All that a browser gets of a widget and its children."""
    children = getattr(widget, "children", ())
    return html.unescape(str(widget.get_state())) + "".join(map(state_of, children))


def test_a_visitor_names_data_sets_and_sees_no_path(visit, pets, outputs):
    secrets = str(pets), str(outputs), str(Path.cwd()), str(Path.home())
    visitor = visit(urlencode({"dataset": str(pets)}))
    assert "dataset='our own pets' is no data set" in html.unescape(visitor.problems.value)
    assert "vae-bad-00000000" in visitor.left_out.value and "damaged" in visitor.left_out.value
    engine = visitor.engine
    for name in (pets, "nope", "/", "~", "..", pets / "cat", "./data/starter/images", "x" * 999):
        visitor.dataset.value = str(name)
        assert settle(visitor)
        sentence = html.unescape(visitor.problems.value)
        assert "is no data set of this page" in sentence and len(sentence) < 500
        assert visitor.engine is engine and not visitor.status.value
        # What was typed stands in its own field.
        assert not any(secret in state_of(visitor.ui) for secret in secrets[1:])
    for name in ("photos", "starter", ""):  # as before
        visitor.dataset.value = name
        assert settle(visitor)
        assert visitor.problems.value == visitor.status.value == ""
        assert visitor.engine.scene.config.dataset == (name or None)
        assert not any(secret in state_of(visitor.ui) for secret in secrets)


@pytest.mark.parametrize("name", ["vae", "run"])
def test_a_visitor_opens_no_run_by_its_path(name, visit, outputs, tmp_path):
    shutil.copytree(Run(next((outputs / "vae").glob("*dim=16*"))).path, tmp_path / "vae-theirs")
    visitor = visit(urlencode({name: str(tmp_path / "vae-theirs")}))
    assert "vae-theirs" in visitor.problems.value
    assert str(tmp_path) not in state_of(visitor.ui)


def test_the_data_set_of_the_page_has_a_name_for_visitors(visit, pets):
    visitor = visit("", CONFIG.replace(dataset=str(pets)))
    assert visitor.engine.scene.config.dataset == str(pets)
    assert visitor.dataset.value == pets.name in visitor.dataset.options
    link = re.search(r'href="\?([^"]*)"', visitor.meters.value)[1]
    assert "dataset=our+own+pets" in link and str(pets) not in state_of(visitor.ui)
    again = visit(html.unescape(link), CONFIG.replace(dataset=str(pets)))
    assert again.problems.value == "" and again.engine.scene.config.dataset == str(pets)


def test_the_app_explains_what_notebook_02_explains():
    folder = Path(__file__).resolve().parent.parent / "notebooks"
    names = ("02_decompose.ipynb", "02-03"), ("app/01_explorer.ipynb", "explanation")
    cells = [
        cell["source"]
        for name, key in names
        for cell in json.loads((folder / name).read_text(encoding="utf-8"))["cells"]
        if cell["id"] == key
    ]
    assert len(cells) == 2 and cells[0] == cells[1]


def test_each_control_says_what_it_is_for(explorer):
    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    kinds = widgets.ValueWidget, widgets.Button
    for widget in walk(explorer.ui):
        if isinstance(widget, kinds) and not isinstance(widget, widgets.HTML | widgets.Image):
            assert widget.tooltip, widget


def test_the_marker_stands_at_epsilon(explorer):
    assert explorer._background.settle()
    places = []
    for value in (0.01, 0.1, 1.0):
        explorer.epsilon.value = value
        style = explorer.marker.value.split("left:")[1]
        places.append(float(style.partition("%")[0]))
    assert places[0] < places[1] < places[2]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.02)  # log axis


def test_equal_hardness_sets_the_other_s_epsilon(explorer):
    explorer.fairness.value = EQUAL_HARDNESS
    explorer.adversary.value = "clae"
    assert explorer._background.settle()
    epsilon = explorer.engine.as_hard("clae", 0.3)
    assert f"CLAE, ε = {epsilon:.3g}: as hard as IDAA at 0.3" in explorer.meters.value
    expected = picture_of(explorer.engine.moving("clae", epsilon).values())
    assert explorer.picture.image.value == expected


def test_what_waits_for_the_curves_shows_and_saves_nothing_of_other_images(
    explorer, outputs, monkeypatch
):
    explorer.adversary.value, explorer.fairness.value = "clae", EQUAL_HARDNESS
    assert explorer._background.settle()
    former = explorer._attack
    advance, event = Engine.advance, threading.Event()
    monkeypatch.setattr(Engine, "advance", lambda self: event.wait(60) and advance(self))
    explorer.seed.value = 7
    assert settle(explorer)
    assert "how hard" in explorer.status.value
    assert explorer.picture.image.layout.visibility == "hidden"
    before = {*(outputs / "explorer").glob("*")}
    explorer.keep.click()
    event.set()
    assert explorer._background.settle()
    assert explorer.picture.image.layout.visibility is None
    (place,) = {*(outputs / "explorer").glob("*")} - before
    expected = explorer.engine.as_hard("clae", 0.3)
    assert expected != former[1]
    assert place.name.endswith(f"-clae-epsilon={expected:.3g}")
    shutil.rmtree(place)


def settle(explorer):
    """All but the curves over ε, which take their time."""
    return explorer._background.settle("load", "paint", "meters", "verdict", "fold")


def test_other_choices_make_another_engine(explorer):
    assert settle(explorer)
    before, still = explorer.engine, explorer.still.image.value
    explorer.seed.value = 5
    assert settle(explorer)
    assert explorer.engine is not before
    assert explorer.still.image.value != still
    vae_id = next(key for _, key in explorer.vae.options if key != explorer.vae.value)
    explorer.vae.value = vae_id
    assert settle(explorer)
    assert explorer.engine.scene.run.id == vae_id
    explorer.only.value = explorer.only.options[1][1]
    explorer.steps.value = 2
    assert settle(explorer)
    assert explorer.engine.scene.config.steps == 2
    assert explorer.status.value == ""
    successor = explorer.engine
    for name, mistake, correction in (
        ("indices", "three", "3"), ("indices", "9999999", ""), ("images", 300, 5),
        ("seed", -1, 2), ("steps", 0, 1), ("dataset", "/no/such/folder", ""),
    ):  # fmt: skip
        getattr(explorer, name).value = mistake
        assert settle(explorer)
        assert str(mistake) in explorer.problems.value
        assert explorer.engine is successor  # a mistake costs nothing
        explorer.epsilon.slider.value = 0.5 if mistake == "three" else 0.7
        assert settle(explorer)
        assert str(mistake) in explorer.problems.value  # still, whatever else is done
        assert "idaa-bad" in getattr(explorer, name)._dom_classes
        getattr(explorer, name).value = correction
        assert settle(explorer)
        assert explorer.problems.value == explorer.status.value == ""
        assert "idaa-bad" not in getattr(explorer, name)._dom_classes
        successor = explorer.engine


def test_an_image_of_one_s_own(explorer):
    red = io.BytesIO()
    Image.new("RGB", (50, 40), (255, 0, 0)).save(red, "png")
    content = memoryview(red.getvalue())
    explorer.upload.value = ({"name": "red.png", "type": "image/png", "size": 1,
                              "content": content, "last_modified": NOW},)  # fmt: skip
    assert settle(explorer)
    assert explorer.status.value == ""
    first = decode(explorer.still.image.value, 3, 4)[0, 0]
    assert np.array_equal(first, np.broadcast_to([1.0, 0, 0], first.shape))
    explorer.forget.click()
    assert settle(explorer)
    assert explorer.engine.scene.config.own is None
    predecessor = explorer.engine
    explorer.upload.value = ({"name": "x.png", "type": "image/png", "size": 1,
                              "content": memoryview(b"text"), "last_modified": NOW},)  # fmt: skip
    assert settle(explorer)
    assert "x.png cannot be read" in explorer.problems.value
    assert explorer.engine is predecessor


def encode_image(form, mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, form)
    return file.getvalue()


def spoil(content, seed):
    """The bytes with up to six of the first 200 changed."""
    draws, spoilt = random.Random(seed), bytearray(content)
    for _ in range(draws.randint(1, 6)):
        spoilt[draws.randrange(min(len(spoilt), 200))] = draws.randrange(256)
    return bytes(spoilt)


def large_png(side):
    """The head of a PNG of this many pixels a side, and few of its pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 9999)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


FORMS = "PNG", "GIF", "TIFF", "BMP", "WEBP", "JPEG", "PPM"
UPLOADS = {form: [spoil(encode_image(form), seed) for seed in range(60)] for form in FORMS}
UPLOADS |= {"large": [large_png(30_000)], "floats": [encode_image("TIFF", "F")]}
UPLOADS |= {"text": [b"text", b""]}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it doubts
@pytest.mark.parametrize("kind", UPLOADS)
def test_a_bad_upload_is_a_sentence_with_its_name_and_leaves_no_file(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    sentences = []
    for content in UPLOADS[kind]:
        try:
            keep_image({"name": "my <photo>.png", "content": memoryview(content)}).unlink()
        except ConfigError as error:
            sentences.append(str(error))
        assert not any((tmp_path / "explorer" / "uploads").iterdir())
    assert sentences and (kind in FORMS or len(sentences) == len(UPLOADS[kind]))
    for sentence in sentences:
        assert sentence.startswith("my <photo>.png cannot be read as an image (")
        assert len(sentence) <= 400 and " at 0x" not in sentence


def test_what_is_saved_can_be_made_again(explorer, outputs):
    explorer.adversary.value = "clae"
    explorer.folds.selected_index = 2  # the walk, which is saved once it was looked at
    assert explorer._background.settle()
    explorer.walk.amount.value = 2.0
    explorer.walk.b.value = 3
    explorer.keep.click()
    assert explorer._background.settle()
    (folder,) = (path for path in (outputs / "explorer").iterdir() if "clae" in path.name)
    assert str(folder) in explorer.status.value
    names = {"picture.png", "strip.png", "spectra.png", "curves.png"}
    names |= {"walk.png", "exchange.png", "likeness.png"}
    assert {path.name for path in folder.iterdir()} == names | {"again.py", "setting.json"}
    picture = explorer.picture.image.value
    explorer.reset.click()
    assert settle(explorer)
    assert explorer.picture.image.value != picture
    for _ in range(2):  # also where it was opened already
        explorer.saved.value = folder / "setting.json"
        assert settle(explorer)
        assert explorer.picture.image.value == picture
        explorer.epsilon.field.value = "2"
        assert settle(explorer)
        assert explorer.picture.image.value != picture
    subprocess.run([sys.executable, folder / "again.py"], check=True, timeout=300)
    for name in names:
        old, new = (np.asarray(Image.open(p / name)) for p in (folder, folder / "again"))
        assert np.array_equal(old, new), name


def test_folded_pictures_are_made_when_they_are_opened(explorer):
    assert explorer._background.settle()
    assert not explorer.strip.image.value and not explorer.spectra.value
    explorer.folds.selected_index = 0
    assert explorer._background.settle()
    expected = picture_of(explorer.engine.strip(0).values())
    assert explorer.strip.image.value == expected
    explorer.folds.selected_index = 1
    assert explorer._background.settle()
    assert "<svg" in explorer.spectra.value
    explorer.folds.selected_index = 2
    assert explorer._background.settle()
    before = explorer.walk.stepped.image.value
    assert before and "<svg" in explorer.walk.likeness.value
    explorer.walk.amount.value = 3.0
    assert explorer.walk.stepped.image.value != before
    assert explorer.status.value == ""


def test_a_vae_that_is_not_there_is_named_with_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    explorer = Explorer(CONFIG.replace(vae="1a2b3c4d"))
    assert "no vae run '1a2b3c4d'" in html.unescape(explorer.status.value)
    assert "Traceback" not in explorer.status.value


def test_without_a_vae_it_shows_the_starter_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    explorer = Explorer(CONFIG)
    assert explorer.status.value == "" and "starter" in explorer.left_out.value
    assert (explorer.vae.value, explorer.run.value) == ("starter", "starter")
    before = explorer.picture.image.value
    explorer.epsilon.value = 1.0
    assert explorer.picture.image.value != before
    explorer.engine = None
    assert explorer._background.settle()


def test_beside_runs_of_one_s_own_the_starter_is_a_choice(explorer):
    assert "starter" not in explorer.left_out.value
    explorer.vae.value = "starter"
    assert explorer._background.settle(timeout=120)
    assert explorer.engine.scene.data.name == "starter"
    assert "starter" in explorer.left_out.value


def test_runs_that_are_shown_may_be_deleted(outputs, tmp_path, monkeypatch):
    shutil.copytree(outputs, tmp_path / "outputs")
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    train_ssl(SSLConfig(**SMALL, epochs=1))
    explorer = Explorer(CONFIG)
    assert settle(explorer)
    shutil.rmtree(tmp_path / "outputs")
    explorer.epsilon.field.value = "0.7"
    assert settle(explorer)
    assert "IDAA, ε = 0.7<" in explorer.meters.value and explorer.status.value == ""


def test_runs_that_cannot_be_used_are_left_out_and_named(outputs, tmp_path, monkeypatch):
    """A VAE that is newer and pruned, cut off, changed by a bit, or damaged takes nobody down."""
    copy = tmp_path / "outputs"
    shutil.copytree(outputs, copy)
    monkeypatch.setenv("IDAA_OUTPUTS", str(copy))
    sound_run = find("vae")[0]
    weights = next((sound_run.path / "checkpoints").rglob("tensors.safetensors"))
    content, name = weights.read_bytes(), weights.relative_to(sound_run.path)
    kinds = {"pruned": None, "cut": content[:-9], "bit": content[:-1] + b"\x01", "config": content}
    for kind, bytes_ in kinds.items():
        run = Run(shutil.copytree(sound_run.path, sound_run.path.with_name(f"vae-{kind}")))
        (run.path / "starts.json").write_text('{"person": 4e9}')
        if kind == "config":
            (run.path / "config.json").write_text('{"preset": "de')
        (run.path / name).unlink()
        if bytes_ is not None:
            (run.path / name).write_bytes(bytes_)
    explorer = Explorer(CONFIG)
    assert explorer.status.value == "" and explorer.engine.scene.run == sound_run
    names = [key for _, key in explorer.vae.options]
    assert sound_run.id in names and not {"vae-pruned", "vae-cut", "vae-config"} & {*names}
    for kind in ("pruned", "cut", "config"):
        assert f"Left out: vae-{kind}: " in explorer.left_out.value
    explorer.engine = None
    assert explorer._background.settle()


# --- the background ----------------------------------------------------------------------------


def test_the_newest_request_of_a_kind_is_done_and_the_urgent_one_first():
    background, calls, gate = Background("urgent", "slow", rest=0.0), [], threading.Event()
    background.request("slow", lambda: gate.wait(10) and None)
    while not background._current:
        time.sleep(0.001)
    for i in range(5):
        background.request("slow", lambda i=i: calls.append(f"slow {i}"))
        background.request("urgent", lambda i=i: calls.append(f"urgent {i}"))
    gate.set()
    assert background.settle()
    assert calls == ["urgent 4", "slow 4"]


def test_work_that_has_more_to_do_gives_way():
    background, calls = Background("urgent", "slow", rest=0.0), []

    def work():
        calls.append("slow")
        if len(calls) == 2:
            background.request("urgent", lambda: calls.append("urgent"))
        return calls.count("slow") < 4

    background.request("slow", work)
    assert background.settle()
    assert calls == ["slow", "slow", "urgent", "slow", "slow"]


def test_nothing_starts_while_a_person_moves():
    background, starts = Background("work", rest=0.3), []
    background.disturb()
    start = time.monotonic()
    background.request("work", lambda: starts.append(time.monotonic()))
    assert background.settle()
    assert starts[0] - start >= 0.29
