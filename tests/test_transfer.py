"""Transfer and probes from few labels, against scikit-learn, loops and closed forms; the stage on
photographs and on folders."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from PIL import Image
from reference import predict, probe_weights
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn import functional as F

from idaa_lib import runs, sweeps
from idaa_lib.configs import ConfigError, SSLConfig, TransferConfig
from idaa_lib.data import cached as images
from idaa_lib.data import sources
from idaa_lib.evaluate import transfer as stage
from idaa_lib.evaluate.encoders import features, load_encoder
from idaa_lib.evaluate.few_shot import draw_balanced, draw_episodes, few_shot
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.evaluate.probe import (
    CLEAN,
    FLOOR,
    LAMBDAS,
    SIBLINGS,
    TRANSFER,
    Axes,
    linear_probe,
    principal_axes,
)
from idaa_lib.evaluate.transfer import transfer
from idaa_lib.lab import plots
from idaa_lib.lab.rows import row_of
from idaa_lib.results import results
from idaa_lib.train import train_ssl
from idaa_lib.train.__main__ import main
from idaa_lib.views import keyed_generator

ROOT = Path(__file__).resolve().parent.parent
SSL = {"limit": 64, "width": 4, "epochs": 1, "batch_size": 32, "device": "cpu"}
SMALL = {"limit": 400, "draws": 2, "episodes": 20, "iterations": 20, "device": "cpu"}
DOUBLE = torch.float64


def problem(n, dim=12, classes=4, seed=0, dtype=DOUBLE, signal=0.7, decades=1.5):
    """Correlated features far from the origin, of scales 10^±decades, and labels (n,)."""
    labels = torch.arange(n) % classes
    one, two = keyed_generator(9), keyed_generator(seed)
    centres = torch.randn(classes, dim, generator=one, dtype=DOUBLE)
    mix = torch.randn(dim, dim, generator=one, dtype=DOUBLE)
    noise = torch.randn(n, dim, generator=two, dtype=DOUBLE)
    x = (signal * centres[labels] + noise) @ mix
    x = x * torch.logspace(-decades, decades, dim, dtype=DOUBLE)
    return (x + 20).to(dtype), labels


def objective(weights, x, y, decay):
    """Kornblith's: the sum of the cross-entropies, plus λ times the squared weights."""
    logits = x @ weights[:-1] + weights[-1]
    return F.cross_entropy(logits, y, reduction="sum") + decay * weights[:-1].square().sum()


def sklearn_fit(x, y, decay):
    """C Σ ce + ½‖W‖² is C times Σ ce + λ‖W‖² where λ = 1/(2C). Newton's, on centred features."""
    mean = x.mean(0)
    fit = LogisticRegression(C=1 / (2 * decay), tol=1e-10, max_iter=1000, solver="newton-cg")
    fit.fit((x - mean).numpy(), y.numpy())
    return lambda queries: torch.from_numpy(fit.predict((queries - mean).numpy())), fit


# --- the solver


def fit(x, y, classes, *decays, axes=None, protocol=TRANSFER, **limits):
    """Weights under the last of `decays`, each fitted from those of the one before."""
    protocol = protocol._replace(penalties=decays, refit=False, **limits)
    counter = iter(range(len(decays)))
    how = dict(classes=classes, protocol=protocol, axes=axes, score=lambda *_: next(counter))
    return probe_weights(lambda z: linear_probe((x, y), (x, y), z, **how).scores, x)


@pytest.mark.parametrize("decay", [1e-2, 1.0, 100.0, 1e4])
def test_the_solver_ends_at_sklearn_s_optimum(decay):
    (x, y), (queries, _) = problem(300), problem(400, seed=1)
    weights = fit(x, y, 4, decay, iterations=500, tolerance=1e-10)
    classify, oracle = sklearn_fit(x, y, decay)
    oracle = torch.from_numpy(oracle.coef_.T)
    torch.testing.assert_close(weights[:-1], oracle, rtol=1e-3, atol=1e-5 * oracle.abs().max())
    assert (predict(weights, queries) == classify(queries)).double().mean() > 0.995


@pytest.mark.parametrize("protocol", [TRANSFER, SIBLINGS])
@pytest.mark.parametrize("decay", [LAMBDAS[0], 1e-3, 1.0, LAMBDAS[-1]])
def test_at_the_end_newton_s_method_finds_nothing_left_to_gain(decay, protocol):
    """½ gᵀH⁻¹g is how much Newton's next step would lower the protocol's convex objective. (The
    gradient itself depends on how the processor rounds where the penalty is weak.)"""
    x, y = problem(300)
    weights = fit(x, y, 4, decay, protocol=protocol, iterations=2000, tolerance=1e-10)

    def penalised_objective(flat):
        w = flat.view_as(weights)
        bias = decay * w[-1].square().sum() if protocol.penalise_bias else 0
        return objective(w, x, y, decay) + bias

    def gain(w):
        gradient = torch.func.grad(penalised_objective)(w.flatten())
        hessian = torch.func.hessian(penalised_objective)(w.flatten())
        return gradient @ torch.linalg.pinv(hessian, hermitian=True, rtol=1e-13) @ gradient / 2

    assert gain(weights) < 1e-5 * gain(torch.zeros_like(weights))


def test_fifty_iterations_in_float32_reach_the_optimum_all_along_the_path():
    x, y = problem(2000, dim=40, classes=10, dtype=torch.float32, signal=0.3)
    path = LAMBDAS[::-1]
    for n in (1, 23, 45):
        weights = fit(x, y, 10, *path[:n])
        best_weights = fit(x, y, 10, path[n - 1], iterations=2000, tolerance=1e-9)
        ours, theirs = (
            objective(w.double(), x.double(), y, path[n - 1]) for w in (weights, best_weights)
        )
        assert (ours - theirs) / len(x) < 3e-6


def test_axes_decide_how_soon_it_ends_and_not_where():
    x, y = problem(200, decades=0.3)
    directions, _ = torch.linalg.qr(torch.randn(12, 12, generator=keyed_generator(3), dtype=DOUBLE))
    axes = principal_axes(x)
    other = Axes(x.mean(0) + 0.5, directions, torch.ones(12, dtype=DOUBLE))
    weights, again = (
        fit(x, y, 4, 10.0, axes=each, iterations=2000, tolerance=1e-9) for each in (axes, other)
    )
    torch.testing.assert_close(weights[:-1], again[:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
def test_principal_axes_make_features_uncorrelated(centred):
    x, _ = problem(200, decades=0.3)
    axes = principal_axes(x, centred)
    projections = (x - axes.mean) @ axes.directions
    moments = projections.T @ projections / len(x)
    floor = FLOOR * axes.variances.max().item()
    torch.testing.assert_close(moments, axes.variances.diag(), rtol=1e-6, atol=floor)
    assert axes.mean.any() == centred


@pytest.mark.parametrize("protocol", [CLEAN, TRANSFER, SIBLINGS])
def test_of_fewer_images_than_features_the_axes_hold_all_that_counts(protocol):
    """As raw pixels have. A complete basis of the space leads to the same scores."""
    n, n_val, dim = 30, 20, 90
    (x, y), (x_val, y_val) = (problem(k, dim, seed=k, decades=0.0) for k in (n, n_val))
    test, _ = problem(50, dim, decades=0.0)
    axes = principal_axes(x)
    assert axes.directions.shape == (dim, n)
    torch.testing.assert_close((x - axes.mean) @ axes.directions @ axes.directions.T, x - axes.mean)
    protocol = protocol._replace(
        penalties=(10.0,), standardise=False, iterations=500, tolerance=1e-9
    )
    both = F.pad(torch.cat([x, x_val]), (0, 1), value=1.0)  # as where the bias is penalised
    both = both if protocol.penalise_bias else both[:, :-1]
    mean = both.mean(0) * (not protocol.penalise_bias)
    _, roots, rows = torch.linalg.svd(both - mean, full_matrices=True)
    variances = F.pad(roots.square() / len(both), (0, len(rows) - len(roots))).clamp_min(1e-3)
    bases = None, Axes(mean, rows.T, variances)
    ours, theirs = (
        linear_probe((x, y), (x_val, y_val), test, classes=4, protocol=protocol, axes=each).scores
        for each in bases
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize(("protocol", "wins"), [(TRANSFER, 1.0), (SIBLINGS, 0.01)])
def test_of_equal_scores_the_first_fitted_wins_and_any_score_decides(protocol, wins):
    """The largest where the path goes down, the smallest where it goes up."""
    train, val = problem(80), problem(60, seed=1)
    path = sorted((0.01, 1.0, 0.1), reverse=protocol is TRANSFER)

    def choose_penalty(score):
        return linear_probe(
            train, val, val[0], classes=4, score=score,
            protocol=protocol._replace(penalties=tuple(path), iterations=50),
        ).penalty  # fmt: skip

    assert choose_penalty(lambda p, y: 3.0) == path[0] == wins
    counter = iter(range(9))
    assert choose_penalty(lambda p, y: next(counter)) == path[-1]


# --- the protocols


def test_the_penalties_are_the_protocol_s():
    assert np.allclose(LAMBDAS, np.logspace(-6, 5, 45), rtol=1e-12)
    assert TRANSFER.penalties == tuple(sorted(LAMBDAS, reverse=True))
    assert SIBLINGS.penalties == tuple(sorted(LAMBDAS))


def test_the_penalty_is_chosen_on_val_and_refitted_on_both():
    train, val, test = problem(60), problem(300, seed=1), problem(500, seed=2)
    decays = (1e5, 1e3, 10.0, 1e-3)
    protocol = TRANSFER._replace(penalties=decays, iterations=500, tolerance=1e-6)
    probe = linear_probe(train, val, test[0], classes=4, protocol=protocol)
    right = {
        decay: (sklearn_fit(*train, decay)[0](val[0]) == val[1]).double().mean().item()
        for decay in decays
    }
    assert probe.score_val == pytest.approx(100 * right[probe.penalty], abs=0.4)
    assert right[probe.penalty] > max(right.values()) - 0.004
    assert max(right.values()) - min(right.values()) > 0.05  # the choice matters
    train_val = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    oracle, _ = sklearn_fit(*train_val, probe.penalty)
    assert (probe.predictions == oracle(test[0])).double().mean() > 0.995
    protocol = protocol._replace(refit=False)
    train_probe = linear_probe(train, val, test[0], classes=4, protocol=protocol)
    oracle, _ = sklearn_fit(*train, train_probe.penalty)
    assert (train_probe.predictions == oracle(test[0])).double().mean() > 0.99
    assert not torch.equal(train_probe.predictions, probe.predictions)


def test_the_siblings_protocol_agrees_with_sklearn_s_on_a_constant_feature():
    """Their penalty counts the bias: a column of ones without an intercept of its own."""
    train, val, test = problem(60), problem(300, seed=1), problem(500, seed=2)
    ones = lambda x: np.concatenate([x.numpy(), np.ones((len(x), 1))], 1)  # noqa: E731

    def oracle(x, y, decay):
        fit = LogisticRegression(
            C=1 / (2 * decay), tol=1e-10, max_iter=10_000, solver="newton-cg", fit_intercept=False
        )
        return fit.fit(ones(x), y.numpy())

    decays = (1e-3, 10.0, 1e3, 1e5)
    protocol = SIBLINGS._replace(penalties=decays)
    probe = linear_probe(train, val, test[0], classes=4, protocol=protocol)
    right = {d: (oracle(*train, d).predict(ones(val[0])) == val[1].numpy()).mean() for d in decays}
    best_decay = max(decays, key=lambda decay: right[decay])
    assert probe.penalty == best_decay
    assert probe.score_val == pytest.approx(100 * right[best_decay])
    train_val = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    ours = probe_weights(
        lambda z: linear_probe(train, val, z, classes=4, protocol=protocol).scores, train[0]
    )
    expected = oracle(*train_val, best_decay)
    weights = torch.from_numpy(expected.coef_.T)
    torch.testing.assert_close(ours, weights, rtol=1e-3, atol=1e-4 * weights.abs().max().item())
    assert probe.predictions.tolist() == expected.predict(ones(test[0])).tolist()


def test_the_siblings_protocol_is_scipy_s_path_and_ends_where_the_gradient_is_zero():
    """docs/spec/siblings.md §1.7 by hand: Σ cross-entropy + w‖θ‖², the bias in θ; w rising, each
    from the one before; of equal ones on val the smallest; refitted on train and val."""
    generator = keyed_generator(4)
    sets = []
    for n in (60, 40):
        x, y = torch.randn(n, 6, generator=generator, dtype=DOUBLE), torch.arange(n) % 3
        sets.append((x + 0.6 * F.one_hot(y, 6), y))
    train, val = sets
    penalties = (1e-2, 0.1, 1.0, 10.0, 1e2)
    protocol = SIBLINGS._replace(penalties=penalties)
    probes = {}

    def read(z):
        probes["probe"] = linear_probe(train, val, z, classes=3, protocol=protocol)
        return probes["probe"].scores

    scores = read(torch.cat([torch.zeros(1, 6, dtype=DOUBLE), torch.eye(6, dtype=DOUBLE)]))
    theta = torch.cat([scores[1:] - scores[:1], scores[:1]])  # (7, 3), the bias last

    def add_constant(x):
        return torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE)], 1)

    def slope(theta, x, y, w):
        error = (add_constant(x) @ theta).softmax(1) - F.one_hot(y, 3)
        return add_constant(x).T @ error + 2 * w * theta

    def minimise(start, x, y, w):
        def value(vector):
            theta = torch.from_numpy(vector).view(7, 3)
            loss = F.cross_entropy(add_constant(x) @ theta, y, reduction="sum")
            total = loss + w * theta.square().sum()
            return total.item(), slope(theta, x, y, w).flatten().numpy()

        options = {"gtol": 1e-9, "maxiter": 5000}
        end = scipy.optimize.minimize(
            value, start.flatten().numpy(), jac=True, method="BFGS", options=options
        )
        return torch.from_numpy(end.x).view(7, 3)

    oracle, best = torch.zeros(7, 3, dtype=DOUBLE), (-1.0, 0.0, None)
    for w in penalties:
        oracle = minimise(oracle, *train, w)
        right = ((add_constant(val[0]) @ oracle).argmax(1) == val[1]).double().mean().item()
        best = (right, w, oracle) if right > best[0] else best
    train_val = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    expected = minimise(best[2], *train_val, best[1])
    probe = probes["probe"]
    assert probe.penalty == best[1] and probe.score_val == pytest.approx(100 * best[0])
    torch.testing.assert_close(theta, expected, rtol=1e-6, atol=1e-8)
    assert slope(theta, *train_val, probe.penalty).abs().max() < 1e-6
    assert slope(theta, *train_val, probe.penalty)[-1].abs().max() < 1e-6  # of the bias
    assert theta[-1].abs().max() > 1e-3


def test_nothing_is_learned_from_test_features():
    train, val, (test, _) = problem(60), problem(60, seed=1), problem(50, seed=2)
    probe = linear_probe(train, val, test, classes=4, protocol=TRANSFER)
    order = torch.randperm(50, generator=keyed_generator(1))
    shuffled_probe = linear_probe(train, val, 1.0 * test[order], classes=4, protocol=TRANSFER)
    assert torch.equal(shuffled_probe.predictions, probe.predictions[order])
    assert shuffled_probe.penalty == probe.penalty and shuffled_probe.score_val == probe.score_val


@pytest.mark.parametrize(("tolerance", "dtype"), [(1e-5, torch.float32), (1e-10, DOUBLE)])
def test_what_float32_cannot_resolve_is_solved_in_float64(tolerance, dtype):
    train, val, (test, _) = (problem(40, dtype=torch.float32, seed=s) for s in (0, 1, 2))
    protocol = TRANSFER._replace(iterations=5, tolerance=tolerance)
    for axes in (None, principal_axes(train[0])):
        probe = linear_probe(train, val, test, classes=4, protocol=protocol, axes=axes)
        assert probe.scores.dtype == dtype


# --- few labels, few shots


def test_few_labels_are_drawn_by_class():
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 200 + [5] * 3)[
        torch.randperm(1003, generator=keyed_generator(0))
    ]
    few_rows, more_rows, other_rows = (
        draw_balanced(labels, fraction, keyed_generator(*key))
        for fraction, key in ((0.02, (0, 0)), (0.1, (0, 0)), (0.02, (0, 1)))
    )
    assert torch.bincount(labels[few_rows]).tolist() == [5, 5, 5, 0, 0, 3]
    assert torch.bincount(labels[more_rows]).tolist() == [25, 25, 25, 0, 0, 3]
    assert len(set(few_rows.tolist())) == len(few_rows)
    assert set(few_rows.tolist()) <= set(more_rows.tolist()) and set(few_rows.tolist()) != set(
        other_rows.tolist()
    )
    assert torch.bincount(labels[draw_balanced(labels, 1e-6, keyed_generator(0))]).tolist()[0] == 1


def test_an_episode_has_other_images_of_other_classes():
    labels = torch.arange(7).repeat_interleave(torch.tensor([30, 20, 4, 25, 30, 22, 50]))
    episodes = draw_episodes(labels, 5, 2, 8, 40, seed=3)
    assert episodes.shape == (40, 5, 10)
    for episode in episodes:
        classes = labels[episode]
        assert (classes == classes[:, :1]).all() and len(set(classes[:, 0].tolist())) == 5
        assert len(episode.unique()) == 50
    assert set(labels[episodes].unique().tolist()) == {0, 1, 3, 4, 5, 6}  # of class 2 there are 4
    assert torch.equal(episodes, draw_episodes(labels, 5, 2, 8, 40, seed=3))
    assert not torch.equal(episodes, draw_episodes(labels, 5, 2, 8, 40, seed=4))
    with pytest.raises(ValueError, match=r"1 classes have 50 images .* ways is 5"):
        draw_episodes(labels, 5, 10, 40, 1)


def centroid_loop(support, query):
    cosine = torch.nn.functional.cosine_similarity
    return cosine(query[:, None], support.mean(1)[None], dim=2).argmax(1)


def ridge_loop(support, query):
    x = support.flatten(0, 1)
    target = torch.eye(len(support)).repeat_interleave(support.shape[1], 0)
    alpha = (x - x.mean(0)).square().sum(1).mean().item()
    return torch.from_numpy(Ridge(alpha=alpha).fit(x, target).predict(query)).argmax(1)


@pytest.mark.parametrize("oracle", [centroid_loop, ridge_loop])
def test_few_shot_probes_agree_with_a_loop(oracle):
    x, labels = problem(400, dim=30, classes=8)
    for shots in (1, 5):
        episodes = draw_episodes(labels, 5, shots, 6, 120)
        scores = few_shot(x, episodes, shots, oracle.__name__.removesuffix("_loop"))
        z = F.normalize(x, dim=1)
        truth = torch.arange(5).repeat_interleave(6)
        expected = [
            (oracle(z[part[:, :shots]], z[part[:, shots:]].flatten(0, 1)) == truth).double().mean()
            for part in episodes
        ]
        torch.testing.assert_close(scores.double(), 100 * torch.stack(expected), rtol=0, atol=1e-3)
        lengths = torch.rand(400, 1, generator=keyed_generator(5), dtype=DOUBLE) + 0.1
        again = few_shot(lengths * x, episodes, shots, oracle.__name__.removesuffix("_loop"))
        torch.testing.assert_close(again, scores, rtol=0, atol=1e-3)


@pytest.mark.parametrize("classifier", ["centroid", "ridge"])
def test_few_shot_on_one_hot_and_on_meaningless_features(classifier):
    labels = torch.arange(2000) % 10
    episodes = draw_episodes(labels, 5, 1, 15, 300)
    assert few_shot(F.one_hot(labels).float(), episodes, 1, classifier).eq(100).all()
    noise = torch.randn(2000, 16, generator=keyed_generator(0))
    value, low, high = student_interval(few_shot(noise, episodes, 1, classifier))
    assert high - low < 2
    assert value == pytest.approx(20, abs=1.5)


# --- the stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained run with each stem, in a folder of outputs of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        yield {stem: train_ssl(SSLConfig(**SSL, stem=stem)) for stem in ("cifar", "imagenet")}


@pytest.fixture(scope="module")
def photos(made):
    return transfer(TransferConfig(run=made["cifar"].id, **SMALL))


def folder(root, classes=2, train=30, test=20):
    """Class folders of images whose brightness tells their class."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("test", test)):
        for c in range(classes):
            (root / part / f"class{c}").mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(80 * c, 80 * c + 80, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / f"class{c}" / f"{i}.png")
    return root


@pytest.mark.xdist_group("photos")
def test_rows_of_both_encoders_with_their_intervals(made, photos):
    summary = photos.summary
    assert summary["left_out"] == {} and summary["size"] == 32
    probes = ["linear", "1 % of labels", "10 % of labels", "5-way 1-shot", "5-way 5-shot"]
    for name in ("encoder", "random"):
        rows = [row for row in summary["rows"] if row["features"] == name]
        assert [row["probe"] for row in rows] == probes
        assert [row["n"] for row in rows] == [400, 2, 2, 20, 20]
        assert [row["labels"] for row in rows] == [800, 13, 39, 5, 25]
        assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
        assert rows[0]["penalty"] in LAMBDAS and "refit" in rows[0]["protocol"]
    assert photos.environment["datasets"][0]["name"] == "photos"
    frame = results([photos])
    assert len(frame) == 10 and set(frame["features"]) == {"encoder", "untrained encoder"}
    assert len(plots.accuracies(frame, "dataset", "metric", "features").axes) == 1
    assert "on photos, test" in row_of(photos).texts["result"]
    assert photos in made["cifar"].users()


@pytest.mark.xdist_group("photos")
def test_the_linear_row_is_sklearn_s_at_its_penalty(made, photos):
    row = photos.summary["rows"][0]
    module, size, mean, std = load_encoder(made["cifar"])
    splits = {s: images.load("photos", s, 32, 400) for s in ("train", "val", "test")}
    z = {s: features(module, d.images, size, mean, std).double() for s, d in splits.items()}
    train_val = torch.cat([z["train"], z["val"]])
    labels = torch.cat([splits["train"].labels, splits["val"].labels])
    oracle, _ = sklearn_fit(train_val, labels, row["penalty"])
    expected = 100 * (oracle(z["test"]) == splits["test"].labels).double().mean().item()
    # bf16 where the device has it, and 20 iterations.
    assert row["value"] == pytest.approx(expected, abs=4)
    assert expected > 20


@pytest.mark.xdist_group("photos")
def test_an_interrupted_transfer_judges_what_is_left_alone(made, photos, monkeypatch):
    """Asked to stop after one encoder, killed within the other: nothing is done twice."""
    config, run = TransferConfig(run=made["cifar"].id, **SMALL), photos
    before = run.path.rename(run.path.with_name("before"))
    encoders = []
    encode_splits = stage.encode_splits

    def encode(encoder, splits, **how):
        encoders.append(encoder)
        if len(encoders) == 2:
            raise KeyboardInterrupt
        return encode_splits(encoder, splits, **how)

    try:
        monkeypatch.setattr(stage, "encode_splits", encode)
        with monkeypatch.context() as patch:
            patch.setattr(runs.Run, "request", property(lambda self: "stop"))
            with pytest.raises(runs.Stopped, match=r"Stopped \(stop\) after step 1 of 2 and saved"):
                transfer(config)
        with pytest.raises(KeyboardInterrupt):
            transfer(config)
        assert transfer(config) == run and len(encoders) == 3
        summary, expected = run.summary, json.loads((before / "summary.json").read_text())
        assert summary["rows"] == expected["rows"] and summary["left_out"] == {}
    finally:
        shutil.rmtree(run.path)
        before.rename(run.path)


@pytest.mark.xdist_group("photos")
def test_a_finished_transfer_is_shown_again_by_its_command(photos, monkeypatch, capsys):
    monkeypatch.setattr(stage, "encode_splits", lambda *a, **k: pytest.fail("encoded again"))
    words = shlex.split(runs.command(photos))
    assert main(words[words.index("transfer") :]) == 0
    assert f"{photos.id} is finished" in capsys.readouterr().out


@pytest.mark.xdist_group("photos")
def test_an_imagenet_stem_sees_224_pixels_and_pets_are_judged_by_class(made, tmp_path, monkeypatch):
    sizes, encode_splits = [], stage.encode_splits

    def spy(encoder, splits, **how):
        sizes.extend((encoder.size, tuple(data.images.shape[1:])) for data in splits.values())
        return encode_splits(encoder, splits, **how)

    monkeypatch.setattr(stage, "encode_splits", spy)
    fields = {"references": False, "ways": 2, "shots": (1,), "fractions": (1.0,)}
    pets = folder(tmp_path / "oxfordiiitpet")
    config = TransferConfig(run=made["imagenet"].id, datasets=(str(pets),), **SMALL | fields)
    summary = transfer(config).summary
    assert summary["size"] == 224 and set(sizes) == {(224, (3, 224, 224))}
    linear, all_labels, shot = summary["rows"]
    assert (linear["metric"], shot["metric"]) == ("mean per class", "top-1")
    assert linear["value"] > 90  # dark and bright
    assert linear["value"] == pytest.approx(linear["mean_per_class"])
    # Every draw of all labels is the same.
    assert all_labels["low"] == all_labels["value"] == all_labels["high"]
    sizes.clear()
    transfer(config.model_copy(update={"size": 64}))
    assert set(sizes) == {(64, (3, 64, 64))}


@pytest.mark.xdist_group("photos")
def test_what_cannot_be_had_is_told_and_left_out(made, tmp_path, capsys):
    fields = {"references": False, "fractions": (), "run": made["cifar"].id}
    own_folder = folder(tmp_path / "two")
    run = transfer(TransferConfig(datasets=("birdsnap", str(own_folder)), **SMALL | fields))
    assert "birdsnap is left out: dataset='birdsnap': birdsnap is not in" in capsys.readouterr().out
    left_out = run.summary["left_out"]
    assert sources.LAYOUT in left_out["birdsnap"] and (ROOT / sources.LAYOUT).exists()
    assert "2 classes have 16 images" in left_out["two, 5-way 1-shot"]
    assert [row["probe"] for row in run.summary["rows"]] == ["linear"]
    with pytest.raises(ConfigError, match=r"No data set can be transferred to: .*birdsnap is not"):
        transfer(TransferConfig(datasets="birdsnap", **SMALL | fields))
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "0.png")
    with pytest.raises(ConfigError, match=r"\(and neither can 1 more\)"):
        transfer(TransferConfig(datasets=("cub200", str(tmp_path / "bare")), **SMALL | fields))


@pytest.mark.xdist_group("photos")
def test_a_file_picks_the_classes_of_each_data_set(made, tmp_path, monkeypatch):
    """Two of three, in the file's order; a data set without them is left out. The file may be named
    by a relative path."""
    fields = {"references": False, "fractions": (), "shots": (), "run": made["cifar"].id}
    three = folder(tmp_path / "three", classes=3)
    two = folder(tmp_path / "two").rename(tmp_path / "others")
    for part in ("train", "test"):
        (two / part / "class0").rename(two / part / "another")
    (tmp_path / "some.txt").write_text("class1\nclass0\n")
    monkeypatch.chdir(tmp_path)
    config = TransferConfig(datasets=(str(three), str(two)), **SMALL | fields)
    whole_run, part_run = transfer(config), transfer(config.replace(classes="some.txt"))
    assert part_run != whole_run and part_run.config.classes == str(tmp_path / "some.txt")
    assert [row["n"] for row in whole_run.summary["rows"]] == [60, 40]
    (row,) = part_run.summary["rows"]
    assert (row["dataset"], row["n"], part_run.environment["datasets"][0]["classes"]) == (
        "three",
        40,
        2,
    )
    assert "class0" in part_run.summary["left_out"][str(two)]
    # The same images, whatever the file is called; and a field at its default is in no id.
    (tmp_path / "some.txt").rename(tmp_path / "same.txt")
    assert transfer(config.replace(classes="same.txt")) == part_run
    assert transfer(config.replace(classes="")) == whole_run


@pytest.mark.xdist_group("photos")
def test_the_readme_s_command_is_the_siblings_protocol(made, tmp_path, monkeypatch, outputs):
    """`transfer run=<id> datasets=… iterations=5000 tolerance=1e-10 penalize_bias=true`, but for
    the 45 fits; without the last it is as it was."""
    protocols, fit_probe = [], stage.linear_probe

    def probe(*sets, protocol, axes, **how):
        protocols.append(protocol)
        assert (axes is None) == protocol.penalise_bias
        short_protocol = protocol._replace(penalties=protocol.penalties[20:30:5], iterations=20)
        return fit_probe(*sets, protocol=short_protocol, axes=axes, **how)

    monkeypatch.setattr(stage, "linear_probe", probe)
    fields = {"datasets": str(folder(tmp_path / "two")), "fractions": "1", "draws": "2"}
    fields |= {"references": "false", "device": "cpu", "shots": "1", "ways": "2", "episodes": "2"}
    values = fields | {"run": str(made["cifar"].path), "iterations": "5000", "tolerance": "1e-10"}
    words = [f"{name}={value}" for name, value in values.items()]
    assert main(["transfer", *words, "penalize_bias=true"]) == 0
    assert protocols == [SIBLINGS, *[SIBLINGS._replace(refit=False)] * 2]
    assert main(["transfer", *words]) == 0
    expected = TRANSFER._replace(iterations=5000, tolerance=1e-10)
    assert protocols[3:] == [expected, *[expected._replace(refit=False)] * 2]
    theirs, ours = runs.find("transfer", penalize_bias=True), runs.find("transfer")
    assert len(theirs) == 1 and len(ours) == 2
    (protocol,) = {row["protocol"] for row in theirs[0].summary["rows"][:1]}
    assert "Σ cross-entropy + λ(‖W‖² + ‖b‖²), λ rising (CASSLE's), one of 45 λ" in protocol
    # A field at its default is no part of a run's identity.
    assert "penalize_bias" not in TransferConfig().identity()


@pytest.mark.xdist_group("photos")
@pytest.mark.parametrize(("rare", "name"), [(40, "50 % of labels"), (3, "50 % of labels (")])
def test_a_row_of_few_labels_says_where_rare_classes_leave_fewer(
    made, tmp_path, monkeypatch, rare, name
):
    """Of classes of 40 and 3 images half of the labels cannot be drawn in equal numbers."""
    images = folder(tmp_path / "set", classes=3, train=40)
    for c in (1, 2):
        for path in sorted((images / "train" / f"class{c}").iterdir())[rare:]:
            path.unlink()
    fields = {"references": False, "fractions": (0.5,), "draws": 2, "shots": (), "device": "cpu"}
    run = transfer(TransferConfig(datasets=str(images), run=made["cifar"].id, **SMALL | fields))
    few = run.summary["rows"][1]
    assert few["probe"].startswith(name) and ("(" in few["probe"]) == (rare < 40)
    assert rare == 40 or f"({few['labels']} of " in few["probe"]


@pytest.mark.xdist_group("photos")
def test_notebook_09_runs(made, photos, tmp_path):
    values = {name: value for name, value in SMALL.items() if name != "limit"} | {"limit": 400}
    values |= {"run": made["cifar"].id, "datasets": "photos, cub200"}
    sweeps.execute("09_transfer", values, tmp_path / "09.ipynb")
    assert (photos.path / "figures" / "transfer.png").exists()


# --- what a user writes


def test_data_sets_may_be_text_with_spaces_in_paths():
    expected = ("cifar10", "/my data/birds.zip")
    for text in ("cifar10, /my data/birds.zip", str(expected), list(expected)):
        assert TransferConfig(datasets=text).datasets == expected
    assert TransferConfig(datasets=None).datasets == ()
    config = TransferConfig(datasets=expected, fractions="0.05", shots="5")
    assert TransferConfig(**runs.parameters(config)) == config
    with pytest.raises(ConfigError, match="fractions must be less than or equal to 1"):
        TransferConfig(fractions=(0.1, 2.0))


def test_the_page_s_scripts_lay_out_cub_and_birdsnap(tmp_path, monkeypatch):
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / sources.LAYOUT).read_text(), re.DOTALL)
    monkeypatch.setenv("IDAA_DATA", str(tmp_path / "data"))
    names = [f"{c}/{c}_{i}.png" for c in ("001.Albatross", "002.Tern") for i in range(12)]
    test_names = [name for name in names if name.endswith(("_0.png", "_1.png", "_2.png"))]
    for name, script in zip(("cub200", "birdsnap"), scripts, strict=True):
        source = tmp_path / "download" / name
        for n, image in enumerate(names):
            path = source / "images" / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (n, 0, 0)).save(path)
        rows = list(enumerate(names, 1))
        (source / "images.txt").write_text("".join(f"{n} {image}\n" for n, image in rows))
        split = "".join(f"{n} {int(image not in test_names)}\n" for n, image in rows)
        (source / "train_test_split.txt").write_text(split)
        (source / "test_images.txt").write_text("\n".join(["path", *test_names]))
        monkeypatch.chdir(source)
        exec(script.replace("/path/to/the/workbench", str(tmp_path)), {})
        sets = {s: images.load(name, s, 8) for s in ("trainval", "test")}
        reds = {s: sorted(d.images[:, 0, 0, 0].tolist()) for s, d in sets.items()}
        assert reds["test"] == [n for n, image in enumerate(names) if image in test_names]
        assert reds["trainval"] == [n for n, image in enumerate(names) if image not in test_names]
        assert sets["test"].classes == ("001.Albatross", "002.Tern")
