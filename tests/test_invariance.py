"""What encoders keep of how views were drawn, by made networks whose answer is known; what a step
costs; notebook 11 from its first cell to its last."""

import json
import math
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idaa_lib import grids, runs, sweeps
from idaa_lib.configs import ConfigError, EvalConfig, SSLConfig, SystemsConfig, VAEConfig
from idaa_lib.data import cached
from idaa_lib.data.cached import load
from idaa_lib.evaluate import invariance as measures
from idaa_lib.evaluate.encoders import Encoder, features, load_encoder, load_method
from idaa_lib.evaluate.invariance import (
    invariance,
    measure_r2,
    predict_differences,
    read_differences,
    shuffle_condition,
)
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.identity import factors, systems
from idaa_lib.identity.theory import retention
from idaa_lib.results import tabulate
from idaa_lib.train import train_ssl, train_vae
from idaa_lib.train.passes import count_passes
from idaa_lib.views import keyed_generator, recipe

SIZE, MEAN, STD = 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
README = "crop, color, color_diff, blur, grayscale"
SMALL = dict(
    width=4, size=SIZE, limit=128, batch_size=32, epochs=1, device="cpu", augmentation="cassle"
)


@pytest.fixture(scope="module")
def outputs(module_outputs):
    return module_outputs


@pytest.fixture(scope="module")
def conditioned(outputs):
    return train_ssl(SSLConfig(**SMALL, condition=README, augself="crop=1, color=1"))


@pytest.fixture(scope="module")
def images():
    return {split: load("photos", split, SIZE, 300) for split in ("train", "test")}


class Linear(nn.Module):
    """Features that are means of colour: they see colour, and no crop or flip of one colour."""

    def forward(self, x):
        return x.mean((2, 3))


def one_colour(n, seed=0):
    """Images of one colour each, uint8."""
    colours = torch.randint(40, 216, (n, 3, 1, 1), generator=keyed_generator(seed))
    return colours.to(torch.uint8).expand(n, 3, SIZE, SIZE).contiguous()


def test_features_of_colour_are_read_for_colour_and_not_for_crop():
    encoder = Encoder(Linear(), SIZE, MEAN, STD)
    scores = read_differences(encoder, one_colour(2000), one_colour(1000, seed=1))
    assert scores["colour"].low > 0.1
    assert scores["crop"].value < 0.02
    noise = Encoder(lambda x: x.flatten(1)[:, :3] * 0 + 1, SIZE, MEAN, STD)
    noise_scores = read_differences(noise, one_colour(400), one_colour(400, seed=1))
    assert all(abs(score.value) < 0.05 for score in noise_scores.values())


def test_explained_is_r2():
    targets = torch.randn(200, 3, generator=keyed_generator(1)) * torch.tensor([1.0, 5, 0.2])
    assert measure_r2(targets, targets).value == 1
    mean = targets.mean(0).expand_as(targets)
    assert measure_r2(mean, targets).value == pytest.approx(0, abs=1e-5)
    guess = 0.5 * targets
    by_hand = 1 - (targets - guess).square().mean(0) / targets.var(0, unbiased=False)
    assert measure_r2(guess, targets).value == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_invariance_is_the_mean_of_differences_of_cosines(conditioned, images):
    """By hand for the features under a flip; the projector is given the flip's descriptor."""
    test = images["test"].images
    rows = invariance(conditioned, test)
    table = {(row["augmentation"], row["layer"]): row for row in rows}
    layers = ["stem", *(f"stage {k}" for k in (1, 2, 3, 4)), "features", "projector"]
    assert [*table] == [
        (name, layer) for name in ("crop", "flip", "colour", "gray", "blur") for layer in layers
    ]
    encoder = load_encoder(conditioned)
    pixels = recipe("none", *encoder[1:])(test, None).images
    x, y = (encoder.module(part).detach() for part in (pixels, pixels.flip(3)))
    parts, place = [], 0
    for part in x.tensor_split(-(-len(x) // 250)):  # none is left over alone
        rows_y = y[place : place + len(part)]
        parts.append(
            F.cosine_similarity(part, rows_y) - F.cosine_similarity(part, rows_y.roll(1, 0))
        )
        place += len(part)
    row = table["flip", "features"]
    assert row["value"] == pytest.approx(torch.cat(parts).mean().item(), abs=1e-5)
    assert row["low"] <= row["value"] <= row["high"]
    assert all(-2 <= row["value"] <= 2 for row in rows)


def test_measures_read_images_that_stay_in_their_file(conditioned, images, monkeypatch):
    """Those of a large set are no tensor; and an image more leaves none without others."""
    test = images["test"].images
    monkeypatch.setattr(cached, "SMALL", 0)
    large = cached.load("photos", "test", *test.shape[2:3], len(test)).images
    assert not isinstance(large, torch.Tensor)
    for measure in (invariance, shuffle_condition):
        assert measure(conditioned, large) == measure(conditioned, test)
    labels = torch.zeros(len(test), dtype=torch.long)
    own, theirs = (factors.known_factors(part, labels) for part in (large, test))
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    monkeypatch.setattr(measures, "BATCH", len(test) - 1)
    right = shuffle_condition(conditioned, test)["right"]
    assert right.low > 0.5 * math.log(len(test) / 2)


def test_a_flip_alone_leaves_no_difference_to_features_that_no_flip_changes(monkeypatch, images):
    method = SimpleNamespace()
    run = train_ssl(SSLConfig(**SMALL))
    method = load_method(run)
    method.network.backbone.forward = lambda x, adversarial=False: torch.cat(
        [x.mean((2, 3))] * 11, 1
    )[:, :32]
    monkeypatch.setattr(measures, "load_method", lambda run: method)
    table = {(r["augmentation"], r["layer"]): r for r in invariance(run, images["test"].images)}
    gray, flip = (table[name, "features"]["value"] for name in ("gray", "flip"))
    assert flip > 0.05 and gray < flip  # a flip keeps the mean colour, gray does not


def test_other_images_conditions_cost_infonce_and_the_right_ones_are_those_of_the_views(
    conditioned, images
):
    test = images["test"].images
    values = shuffle_condition(conditioned, test)
    method = load_method(conditioned)
    generator, losses = keyed_generator(0), []
    with torch.no_grad():
        for part in test.tensor_split(-(-len(test) // 250)):
            z1, z2 = (method.embed(method.recipe(part, generator)).z for _ in range(2))
            logits = z1 @ z2.T / conditioned.config.temperature
            losses.append(F.cross_entropy(logits, torch.arange(len(part)), reduction="none"))
    assert values["right"].value == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    difference = values["shuffled"].value - values["right"].value
    assert values["difference"].value == pytest.approx(difference, abs=1e-6)


def test_the_heads_of_augself_are_judged_against_their_mean(conditioned, images):
    scores = predict_differences(conditioned, images["test"].images)
    assert scores.keys() == {"color", "crop"}
    assert all(score.low <= score.value <= score.high <= 1 for score in scores.values())


def test_runs_without_condition_or_heads_are_refused(outputs, images):
    run = train_ssl(SSLConfig(**SMALL))
    with pytest.raises(ConfigError, match="is not conditioned"):
        shuffle_condition(run, images["test"].images)
    with pytest.raises(ConfigError, match="has no heads of AugSelf"):
        predict_differences(run, images["test"].images)


def test_the_own_image_is_looked_for_among_all(conditioned, images):
    test = images["test"].images
    encoder = load_encoder(conditioned)
    result = systems.find_own(encoder, test)
    options = dict(transform=recipe("mild", *encoder[1:]), generator=keyed_generator(0))
    views = features(encoder.module, test, *encoder[1:], **options)
    expected = retention(views, features(encoder.module, test, *encoder[1:]))
    assert torch.equal(result.ranks, expected.ranks) and result.n == len(test)


# --- what a step costs (docs/spec/siblings.md §4.3)

PASSES = {
    "simclr": 2, "plain": 2, "uel": 2, "moco": 2, "simsiam": 2, "barlow": 2, "byol": 4, "rsa": 4,
}  # fmt: skip


@pytest.mark.parametrize("method", PASSES)
def test_passes_are_those_of_the_specification(method):
    views = {"augmentation": "rsa"} if method == "rsa" else {}
    config = SSLConfig(method=method, size=SIZE, **views)
    assert count_passes(config) == PASSES[method]
    assert count_passes(config.replace(processes=16)) == PASSES[method]  # as many trained it
    # The attack looks once and the adversarial loss once; BYOL embeds x′ by its target too.
    attack_config = config.replace(adversary="idaa")
    assert count_passes(attack_config) == PASSES[method] + 2 + (method == "byol")


@pytest.mark.parametrize(("epochs", "interval"), [(6, 50), (7, 3), (400, 50)])
def test_ip_irm_embeds_all_images_twice_a_partition(epochs, interval):
    config = SSLConfig(
        method="ipirm", augmentation="ipirm", epochs=epochs, maximize_iter=interval, size=SIZE
    )
    partitions = -(-epochs // interval)
    assert count_passes(config) == pytest.approx(2 * (1 + partitions / epochs))


@pytest.mark.parametrize(("epochs", "interval"), [(1, 1), (7, 1), (7, 3)])
def test_mixed_ip_irm_embeds_all_images_twice_more_for_each_partition_so_far(epochs, interval):
    config = SSLConfig(method="ipirm", mixup=True, epochs=epochs, maximize_iter=interval, size=SIZE)
    partitions = [1 + epoch // interval for epoch in range(epochs)]
    passes = [2 + 2 * p + 2 * (epoch % interval == 0) for epoch, p in enumerate(partitions)]
    assert count_passes(config) == pytest.approx(sum(passes) / epochs)


def test_cassle_and_augself_cost_what_their_trunk_costs():
    for knobs in ({"condition": README}, {"augself": "crop=1"}):
        assert count_passes(SSLConfig(augmentation="cassle", size=SIZE, **knobs)) == 2


# --- the table


def test_figures_of_several_seeds_are_their_mean_and_of_one_its_own():
    rows = [
        {"system": "a", "metric": "m", "value": v, "low": v - 9, "high": v + 9, "unit": "%"}
        for v in (11.0, 12.0, 13.0)
    ]
    rows += [{"system": "b", "metric": "m", "value": 5.0, "low": 4.0, "high": 6.0, "unit": "%"}]
    table = tabulate(pd.DataFrame(rows), ["system"])
    assert table.loc["a", "m (%)"] == "12.00 [9.52, 14.48]"  # Student's, t = 4.303, s/√n = .577
    assert table.loc["b", "m (%)"] == "5.00 [4.00, 6.00]"


def test_knn_within_the_seconds_of_another_training(conditioned, monkeypatch):
    lines = [{"epoch": e, "knn_top1_val": 10.0 * e} for e in range(5)]
    run = SimpleNamespace(
        metrics=lambda: lines,
        summary={"images_per_second": 10},
        environment={"dataset": {"n": 100}},
    )
    assert systems.seconds_per_epoch(run) == 10
    assert [systems.knn_within(run, s) for s in (5, 30, 39, 50, 500)] == [0, 20, 20, 40, 40]


def test_rows_are_registered_methods_or_systems_of_the_recipe():
    grid = grids.cells(SystemsConfig(methods="cassle, moco, rsa", adversaries="none"))
    configs = [SSLConfig(**point.ssl) for point in grid]
    assert [config.method for config in configs] == ["simclr", "moco", "rsa"]
    assert configs[0].condition and configs[0].heads == "augself"
    assert [point.labels["system"] for point in grid] == ["cassle", "moco", "rsa"]
    grid_config = SystemsConfig(
        methods="mine", adversaries="none", systems='{"mine": {"method": "moco", "queue": 512}}'
    )
    assert SSLConfig(**grids.cells(grid_config)[0].ssl).queue == 512


def test_notebook_11_shows_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    knobs = {k: v for k, v in SMALL.items() if k not in ("device", "augmentation")}
    fields = {
        "methods": "cassle, ipirm, rsa", "adversaries": "none, idaa", "device": "cpu",
        "transfer_to": "photos", "ssl": json.dumps(knobs), "eval": json.dumps({"limit": 100}),
        "vae": json.dumps({"size": 16, "width": 4, "dim": 4, "limit": 100, "epochs": 1}),
    }  # fmt: skip
    grid = grids.cells(SystemsConfig(**fields))
    vae = train_vae(VAEConfig(**grid[1].vae))
    for point in (*grid[::2], grid[1]):  # with IDAA CASSLE alone
        own = {"vae": vae.reference} if point is grid[1] else {}
        run = train_ssl(SSLConfig(**point.ssl, **own))
        evaluate(EvalConfig(**point.eval, run=run.reference))
    sweeps.execute("11_identity_preserving_methods", fields, tmp_path / "out.ipynb")
    (study,) = (tmp_path / "outputs" / "compare").iterdir()
    assert {path.name for path in study.iterdir()} == {
        "config.json", "attacked.png", "invariance.png", "partitions.png", "similarities.png",
        "systems.png", "table.csv", "kept.csv",
    }  # fmt: skip
    assert len(runs.find("transfer")) == 4
    table = pd.read_csv(study / "kept.csv")
    assert set(table["system"]) == {"cassle", "ipirm", "rsa"}
    assert [*table[table["metric"] == "passes"]["value"]] == [2, 4, 4, 4]
    assert set(table[table["metric"] == "shuffled ω"]["system"]) == {"cassle"}
    cells = json.loads((tmp_path / "out.ipynb").read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    (moved,) = (page for page in pages if "photos (%)" in page)
    assert re.findall(r"<th>([^<]+)</th>\s*<td>", moved) == [
        "cassle", "cassle + idaa", "ipirm", "rsa",
    ]  # fmt: skip


def test_a_notebook_gets_a_condition_and_heads_as_parameters(tmp_path, monkeypatch):
    """A sweep hands a list and a dict to papermill."""
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    config = SSLConfig(**SMALL, condition="crop, color", augself="crop=0.5")
    outcome = sweeps.perform(config)
    assert outcome.state == "finished", outcome.error
