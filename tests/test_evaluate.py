"""Evaluation of features: kNN, linear probes and figures against loops, scikit-learn and closed
forms; features leave their module alone."""

import copy
import math

import numpy as np
import pytest
import reference
import scipy.stats
import torch
import torchvision.transforms.v2.functional as TF
from reference import predict
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from idaa_lib import runs
from idaa_lib.configs import EvalConfig, SSLConfig
from idaa_lib.data.cached import load
from idaa_lib.evaluate.crops import crop_probe, enlarge
from idaa_lib.evaluate.encoders import Encoder, features, pixels
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.metrics import (
    accuracy,
    alignment,
    bootstrap_interval,
    effective_rank,
    embedding_std,
    mean_per_class,
    mean_per_class_interval,
    paired_difference,
    student_interval,
    top1,
    uniformity,
)
from idaa_lib.evaluate.probe import CLEAN, linear_probe, official_probe
from idaa_lib.methods.lars import LARS
from idaa_lib.nets import build_backbone
from idaa_lib.runs import checkpoints
from idaa_lib.views import Recipe, keyed_generator, recipe

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=keyed_generator(seed), dtype=dtype)


def clusters(n, dim=6, classes=4, spread=1.0, seed=0, dtype=torch.float64):
    """Features (n, dim) around one centre per class, and labels (n,)."""
    labels = torch.arange(n) % classes
    centres = normal(classes, dim, seed=99, dtype=dtype)
    return centres[labels] + spread * normal(n, dim, seed=seed, dtype=dtype), labels


# --- kNN


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
def test_knn_agrees_with_naive_loop(k, temperature):
    (bank, labels), (queries, _) = clusters(40), clusters(25, seed=1)
    predictions = knn(bank, labels, queries, classes=4, k=k, temperature=temperature)
    assert predictions.tolist() == reference.knn(bank, labels, queries, 4, k, temperature)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_knn_agrees_with_sklearn(temperature):
    (bank, labels), (queries, _) = clusters(300), clusters(200, seed=1)
    oracle = KNeighborsClassifier(
        n_neighbors=30,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    expected = oracle.fit(bank, labels).predict(queries)
    predictions = knn(bank, labels, queries, classes=4, k=30, temperature=temperature)
    assert predictions.tolist() == expected.tolist()
    assert len(set(expected)) == 4


def test_knn_caps_k_by_the_bank():
    (bank, labels), (queries, _) = clusters(40), clusters(25, seed=1)
    predictions = knn(bank, labels, queries, classes=4, k=200)
    assert predictions.tolist() == reference.knn(bank, labels, queries, 4, 40, 0.5)


def test_knn_does_not_depend_on_chunks_lengths_or_order():
    (bank, labels), (queries, _) = clusters(60), clusters(25, seed=1)
    predictions = knn(bank, labels, queries, classes=4, k=7)
    length = normal(60, 1).exp()
    order = torch.randperm(60, generator=keyed_generator(2))
    assert torch.equal(knn(bank, labels, queries, classes=4, k=7, chunk=4), predictions)
    for block in (1, 5, 20, 59):  # rows of the bank at a time, fewer than k too
        assert torch.equal(knn(bank, labels, queries, classes=4, k=7, block=block), predictions)
    assert torch.equal(knn(length * bank, labels, 1e3 * queries, classes=4, k=7), predictions)
    assert torch.equal(knn(bank[order], labels[order], queries, classes=4, k=7), predictions)


def test_knn_survives_a_tiny_temperature():
    bank, labels = clusters(40)
    assert torch.equal(knn(bank, labels, bank, classes=4, k=10, temperature=1e-4), labels)


# --- linear probes


def logistic_regression(x, y, classes, *penalties):
    """Weights under the last of `penalties`, each fitted from those of the one before."""
    protocol = CLEAN._replace(penalties=penalties, standardise=False, refit=False)
    scores = iter(range(len(penalties)))
    options = dict(classes=classes, protocol=protocol, score=lambda *_: next(scores))
    return reference.probe_weights(lambda z: linear_probe((x, y), (x, y), z, **options).scores, x)


def objective(weights, x, y, penalty):
    logits = x @ weights[:-1] + weights[-1]
    return (F.cross_entropy(logits, y) + penalty / 2 * weights[:-1].square().sum()).item()


def sklearn_weights(x, y, penalty):
    """C Σ ce + ½‖W‖² is C·n times mean ce + penalty/2 ‖W‖² where penalty = 1/(C n)."""
    fit = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)
    weights = np.concatenate([fit.coef_.T, fit.intercept_[None]])
    return torch.from_numpy(weights).to(x.dtype)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_logistic_regression_agrees_with_sklearn(penalty):
    (x, y), (queries, _) = clusters(200, spread=1.5), clusters(300, seed=1)
    ours, oracle = logistic_regression(x, y, 4, penalty), sklearn_weights(x, y, penalty)
    assert objective(ours, x, y, penalty) == pytest.approx(
        objective(oracle, x, y, penalty), rel=1e-8
    )
    torch.testing.assert_close(ours[:-1], oracle[:-1], rtol=1e-3, atol=1e-4)
    assert torch.equal(predict(ours, queries), predict(oracle, queries))


def test_logistic_regression_ends_at_the_same_place_from_any_start():
    x, y = clusters(200, spread=1.5)
    warm_fit, cold_fit = (logistic_regression(x, y, 4, *path) for path in ((1e-5, 0.1), (0.1,)))
    torch.testing.assert_close(warm_fit[:-1], cold_fit[:-1], rtol=0, atol=1e-3)
    assert objective(warm_fit, x, y, 0.1) == pytest.approx(objective(cold_fit, x, y, 0.1), rel=1e-7)
    assert not torch.equal(warm_fit, cold_fit) and not warm_fit.requires_grad


def test_bias_alone_is_not_penalised():
    """A penalty that leaves no weight leaves the classes' log frequencies."""
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    weights = logistic_regression(normal(100, 3), y, 3, 1e6)
    frequencies = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    torch.testing.assert_close(weights[-1].softmax(0), frequencies, rtol=0, atol=1e-4)
    assert weights[:-1].abs().max() < 1e-4


def noisy(n, seed):
    """Five weak features among fifty: a probe that fits all of them fails."""
    y = torch.arange(n) % 2
    x = normal(n, 50, seed=seed)
    x[:, :5] += 0.4 * (2 * y[:, None] - 1)
    return x, y


def nearly_equal(n, seed):
    """The class is in a small difference of two features: only large weights find it."""
    y = torch.arange(n) % 2
    base = normal(n, 1, seed=seed) + 0.5 * y[:, None]
    difference = 0.01 * (2 * y[:, None] - 1)
    return torch.cat([base + difference, base - difference], 1), y


@pytest.mark.parametrize(("data", "low", "high"), [(noisy, 0.1, 1), (nearly_equal, 1e-6, 1e-3)])
def test_linear_probe_chooses_the_penalty_that_validates_best(data, low, high):
    train, val, test = data(60, seed=0), data(4000, seed=10), data(50, seed=20)
    probe = linear_probe(train, val, test[0], classes=2)
    mean, std = train[0].mean(0), train[0].std(0)
    x, x_val = (train[0] - mean) / std, (val[0] - mean) / std
    right = {
        penalty: (predict(sklearn_binary(x, train[1], penalty), x_val) == val[1]).sum().item()
        for penalty in (10.0**e for e in range(-6, 1))
    }
    assert right[probe.penalty] == max(right.values())
    assert low <= probe.penalty <= high
    assert max(right.values()) - min(right.values()) > 100  # the choice matters


def sklearn_binary(x, y, penalty):
    """Two-class softmax weights ±w/2 cost half of what sklearn's one vector w does."""
    weights = sklearn_weights(x, y, penalty / 2)
    return torch.cat([-weights / 2, weights / 2], 1)


def test_linear_probe_refits_on_train_and_val_with_the_train_set_s_scale():
    train, val, test = clusters(40), clusters(60, seed=1), clusters(400, spread=2, seed=2)
    scale = torch.tensor([1e-3, 1.0, 1e3, 5.0, 1.0, 1.0], dtype=torch.float64)
    train, val, test = ((scale * f + 7, y) for f, y in (train, val, test))
    probe = linear_probe(train, val, test[0], classes=4, protocol=CLEAN._replace(penalties=(0.03,)))
    mean, std = train[0].mean(0), train[0].std(0)
    both = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    oracle = sklearn_weights((both[0] - mean) / std, both[1], 0.03)
    assert probe.penalty == 0.03
    assert torch.equal(probe.predictions, predict(oracle, (test[0] - mean) / std))


def test_linear_probe_does_not_learn_from_test_features():
    train, val, (test, _) = noisy(60, seed=0), noisy(300, seed=10), noisy(50, seed=20)
    probe = linear_probe(train, val, test, classes=2)
    order = torch.randperm(50, generator=keyed_generator(1))
    shuffle = linear_probe(train, val, test[order], classes=2)
    assert torch.equal(shuffle.predictions, probe.predictions[order])
    extension = linear_probe(train, val, torch.cat([test, 1e3 * test]), classes=2)
    assert torch.equal(extension.predictions[:50], probe.predictions)
    assert extension.penalty == shuffle.penalty == probe.penalty


def test_linear_probe_survives_a_constant_feature():
    train, val, test = (clusters(80, spread=0.2, seed=s) for s in (0, 1, 2))
    for f, _ in (train, val, test):
        f[:, 2] = 3.0
    probe = linear_probe(train, val, test[0], classes=4)
    assert (probe.predictions == test[1]).double().mean() > 0.9


@pytest.mark.parametrize("classes", [3, 10])
def test_official_probe_agrees_with_full_batch_oracle(classes):
    """The test labels contradict the training labels: accuracy sinks, an early epoch is best."""
    x, y = clusters(64, classes=classes, dtype=torch.float32)
    x_test, y_test = clusters(100, classes=classes, seed=1, dtype=torch.float32)
    y_test = (y_test + 1) % classes
    curve = reference.official_probe((x, y), (x_test[:64], y_test[:64]), classes, 120, seed=3)
    scores, share = official_probe(
        (x, y), (x_test, y_test), classes=classes, epochs=120, batch_size=64, seed=3
    )
    assert scores.shape == (64, classes)
    assert top1(scores.argmax(1), y_test[:64]) == pytest.approx(max(curve))
    assert share == pytest.approx(curve[-1])
    assert max(curve) > curve[-1]


def test_official_probe_drops_partial_batches():
    x, y = clusters(70, spread=0.3, dtype=torch.float32)
    x_test, y_test = clusters(50, spread=0.3, seed=1, dtype=torch.float32)
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        scores, share = official_probe((x, y), (x_test, y_test), classes=4, epochs=5, batch_size=16)
    finally:
        hook.remove()
    assert len(steps) == 5 * (70 // 16)
    assert len(scores) == 48
    x_test[48:], y_test[48:] = math.nan, 0
    repeat = official_probe((x, y), (x_test, y_test), classes=4, epochs=5, batch_size=16)
    assert torch.equal(repeat[0], scores) and repeat[1] == share


def test_official_probe_learns_and_its_best_is_no_less_than_its_last():
    train = clusters(256, spread=0.3, dtype=torch.float32)
    test = clusters(128, spread=0.3, seed=1, dtype=torch.float32)
    scores, share = official_probe(train, test, classes=4, epochs=300, batch_size=32)
    assert top1(scores.argmax(1), test[1]) >= share > 90


# --- figures


@pytest.mark.parametrize(("right", "n"), [(166, 200), (3, 40), (512, 1000)])
def test_accuracy_s_interval_is_the_bootstrap_s(right, n):
    labels = torch.zeros(n, dtype=torch.int64)
    predictions = (torch.arange(n) >= right).long()
    result = accuracy(predictions, labels)
    low, high = reference.bootstrap(predictions == labels, 20_000, keyed_generator(1))
    assert result.top1 == pytest.approx(100 * right / n)
    assert result.n == n
    assert result.low == pytest.approx(low, abs=100.01 / n)
    assert result.high == pytest.approx(high, abs=100.01 / n)


def test_the_interval_of_a_mean_is_the_bootstrap_s():
    assert bootstrap_interval(torch.full((20,), 3.0)) == (3, 3, 3)
    assert bootstrap_interval(torch.tensor([2.0])) == (2, 2, 2)
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=1000))
    generator = torch.Generator().manual_seed(1)
    means = values[torch.randint(1000, (9999, 1000), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert bootstrap_interval(values) == pytest.approx((values.mean().item(), low, high), abs=0.01)


def test_the_interval_of_a_paired_difference_covers_as_often_as_it_says():
    # Exactly, over all tables of pairs that 20 images can have.
    n, counts = 20, [(b, c) for b in range(21) for c in range(21 - b)]
    hits = torch.zeros(len(counts), 2, n)
    for i, (b, c) in enumerate(counts):
        hits[i, 0, :b] = hits[i, 1, b : b + c] = 100
    intervals = [paired_difference(*pair) for pair in hits]
    for gain, loss in ((0.0, 0.0), (0.1, 0.1), (0.4, 0.1), (0.05, 0.6), (0.3, 0.3)):
        law = scipy.stats.multinomial(n, (gain, loss, 1 - gain - loss))
        truth = 100 * (gain - loss)
        covers = [low <= truth <= high for _, low, high in intervals]
        share = sum(
            law.pmf((b, c, n - b - c)) * cover for (b, c), cover in zip(counts, covers, strict=True)
        )
        assert 0.93 < share <= 1 + 1e-9
    a, b = hits[counts.index((7, 2))]
    value, low, high = paired_difference(a, b)
    assert value == pytest.approx(25)
    assert paired_difference(b, a) == pytest.approx((-value, -high, -low))
    value, low, high = paired_difference(a, a)  # none differs, and so few images say little
    assert value == 0 and low == -high < -5


def test_the_interval_of_seeds_is_student_s():
    assert student_interval([1.0, 3.0]) == pytest.approx((2, 2 - 12.7062, 2 + 12.7062), abs=1e-3)
    values = normal(600)
    low, high = scipy.stats.t.interval(
        0.95, 599, loc=values.mean().item(), scale=scipy.stats.sem(values.numpy())
    )
    assert student_interval(values)[1:] == pytest.approx((low, high))
    assert student_interval([7.0, 7.0, 7.0]) == (7, 7, 7)


@pytest.mark.parametrize("values", [(2.0, 30.0), (70.0, 99.0), (1.0, 99.0), (0.0, 0.0), (40, 41)])
def test_the_interval_of_shares_ends_where_shares_do(values):
    """So it holds a true share just as often: none lies in what is cut off."""
    mean, *ends = student_interval(values)
    shares = student_interval(values, "%")
    assert shares == (mean, max(0.0, ends[0]), min(100.0, ends[1]))
    assert 0 <= shares.low <= mean <= shares.high <= 100


def test_mean_per_class_agrees_with_sklearn_and_its_interval_with_resampling():
    labels = torch.tensor([0] * 100 + [1] * 40 + [3] * 20)  # no image of class 2
    errors = torch.rand(160, generator=keyed_generator(0)) < 0.3
    guess = torch.where(errors, (labels + 1) % 4, labels)
    guess[guess == 2] = 3  # scikit-learn warns of a class that no label has
    expected = 100 * balanced_accuracy_score(labels, guess)
    assert mean_per_class(guess, labels) == pytest.approx(expected)
    value, low, high = mean_per_class_interval(guess, labels)
    assert value == pytest.approx(expected)
    rng = np.random.default_rng(0)
    right = [(guess == labels)[labels == c].numpy() for c in (0, 1, 3)]
    means = [
        100 * np.mean([rng.choice(part, len(part)).mean() for part in right]) for _ in range(4000)
    ]
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.5)
    assert mean_per_class_interval(labels, labels) == (100, 100, 100)


@pytest.mark.parametrize("right", [True, False])
def test_accuracy_of_all_or_none_right(right):
    labels = torch.ones(30, dtype=torch.int64)
    expected = 100 * right
    assert accuracy(labels * right, labels) == (expected, expected, expected, 30)


def test_effective_rank_closed_forms():
    D = 6
    corners = torch.cat([torch.eye(D), -torch.eye(D)])  # isotropic and centred
    assert effective_rank(corners) == pytest.approx(D)
    assert effective_rank(3 * corners + 5) == pytest.approx(D)
    assert effective_rank(torch.outer(normal(50), normal(D)) + 2) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(50, D)) == pytest.approx(1)
    half = corners.clone()
    half[:, D // 2 :] = 0
    assert effective_rank(half) == pytest.approx(D / 2, rel=1e-5)


def test_effective_rank_agrees_with_singular_values():
    for shape in ((100, 7), (5, 20)):
        x = normal(*shape) * torch.linspace(0.1, 2, shape[1])
        assert effective_rank(x) == pytest.approx(reference.effective_rank(x), rel=1e-5)


def test_embedding_std_closed_forms():
    assert embedding_std(torch.ones(100, 8)) == pytest.approx(0, abs=1e-6)
    lengths = normal(100, 1).exp()
    assert embedding_std(lengths * normal(1, 8)) == pytest.approx(0, abs=1e-6)
    assert embedding_std(normal(100_000, 8)) == pytest.approx(1, abs=5e-3)
    assert embedding_std(7 * normal(100_000, 8)) == pytest.approx(1, abs=5e-3)


def test_alignment_and_uniformity_against_their_definitions_and_at_both_ends():
    z1, z2 = (F.normalize(normal(40, 6), dim=1) for _ in range(2))
    pairs = torch.tensor([torch.dist(a, b).square() for a, b in zip(z1, z2, strict=True)])
    assert alignment(z1, z2) == pytest.approx(pairs.mean().item(), rel=1e-5)
    assert alignment(z1, z1) == 0
    kernel = torch.pdist(z1.double()).square().mul(-2).exp()
    assert uniformity(z1) == pytest.approx(kernel.mean().log().item(), rel=1e-5)
    assert uniformity(z1[:1].expand(30, -1)) == pytest.approx(0, abs=1e-5)
    sphere = F.normalize(normal(3000, 64), dim=1)
    assert uniformity(sphere) == pytest.approx(-4 + 8 / 64, abs=0.02)


# --- features


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(196, 5)
    )
    module[1].running_mean.normal_()
    module[3].eval()
    return module


@pytest.fixture
def images():
    return torch.randint(256, (23, 3, 16, 16), dtype=torch.uint8, generator=keyed_generator(0))


def test_features_are_the_module_s_on_normalised_images(module, images):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    twin = copy.deepcopy(module).eval()
    with torch.no_grad():
        expected = twin((images / 255 - mean) / std)
    for batch_size in (1, 7, 23, 500):
        values = features(module, images, 16, MEAN, STD, batch_size=batch_size)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
        assert values.dtype == torch.float32 and not values.requires_grad
    function_values = features(lambda x: twin(x), images, 16, MEAN, STD)
    torch.testing.assert_close(function_values, expected, rtol=1e-4, atol=1e-5)


def test_features_in_bf16_point_the_same_way():
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", width=8, stem="cifar", adversarial_norms=False)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=keyed_generator(0))
    z32, z16 = (features(backbone, images, 32, MEAN, STD, bf16=bf16) for bf16 in (False, True))
    assert z16.dtype == torch.float32
    assert not torch.equal(z32, z16)
    assert torch.nn.functional.cosine_similarity(z32, z16).min() > 0.999


def test_features_resize_images_of_another_size(module, images):
    pictures = torch.randint(256, (5, 3, 24, 24), dtype=torch.uint8, generator=keyed_generator(1))
    views = TF.resize(pictures / 255, [16, 16], antialias=True)
    with torch.no_grad():
        expected = copy.deepcopy(module).eval()(TF.normalize(views, MEAN, STD))
    values = features(module, pictures, 16, MEAN, STD)
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)


def test_features_leave_the_module_alone(module, images):
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    original = images.clone()
    features(module, images, 16, MEAN, STD)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert [part.training for part in module.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert torch.equal(images, original)


def test_pixels_are_centred():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    row = [-0.5] * 4 + [-0.3] * 4 + [0.5] * 4
    torch.testing.assert_close(pixels(images), torch.tensor([row, row]))


# --- the linear classifier on random crops -------------------------------------------------------


def lars_loop(parameters, gradients, rate, trust, momentum, decay, adapt):
    """Parameters after a step for each of `gradients`, by the definition."""
    parameters, speeds = [p.clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    for step in gradients:
        for i, g in enumerate(step):
            u = g + decay[i] * parameters[i]
            if adapt[i] and parameters[i].norm() > 0 and u.norm() > 0:
                u = trust * parameters[i].norm() / u.norm() * u
            speeds[i] = momentum * speeds[i] + u
            parameters[i] = parameters[i] - rate * speeds[i]
    return parameters


def test_lars_agrees_with_a_loop_and_leaves_out_what_it_is_told_to():
    start = [normal(3, 4), normal(4, seed=1), torch.zeros(2).double(), normal(5, seed=2)]
    gradients = [[normal(*p.shape, seed=9 + i) for p in start] for i in range(4)]
    for step in gradients:
        step[3].zero_()  # of no length
    decay, adapt = (0.1, 0.0, 0.1, 0.0), (True, False, True, True)
    parameters = [nn.Parameter(p.clone()) for p in start]
    optimizer = LARS(
        [dict(params=[p], weight_decay=d, adapt=a)
         for p, d, a in zip(parameters, decay, adapt, strict=True)],
        lr=2.0, trust=0.01, momentum=0.8,
    )  # fmt: skip
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, step, strict=True))
    expected = lars_loop(start, gradients, 2.0, 0.01, 0.8, decay, adapt)
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours.data, theirs)
    assert torch.equal(parameters[3].data, start[3])


def test_lars_makes_a_step_as_long_as_a_share_of_its_parameter():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.zeros(2))
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([1.0, -1.0])
    LARS([weight, bias], lr=1.0).step()
    torch.testing.assert_close(weight.data, torch.tensor([[3.0, 4.0 - 5 * 1e-3]]))
    assert torch.equal(bias.data, torch.tensor([-1.0, 1.0]))  # nothing to be a share of


class Colours(nn.Module):
    """Mean colours of 4 × 4 parts of an image: (B, 48)."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 4).flatten(1)


# What is published (docs/spec/idaa.md §5, siblings.md §2.6 and §3.4): the run that has it, side of
# its images and of its test views for views of 16 px; epochs here, their rates as shares of the
# first; how it steps. A batch has 16 of 40 images.
PUBLISHED = {
    "simsiam": dict(
        run=dict(method="simsiam", pairing="imagenet"), side=18, test=16, deviation=0.01,
        rates=[0.1 * 16 / 256 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)],
        update=lambda: reference.sgd(trust=0.001),
    ),
    "ipirm": dict(
        run=dict(method="ipirm", augmentation="ipirm"), side=24, test=24, rates=[1e-3] * 3,
        update=lambda: reference.adam(1e-6),
    ),
    "rsa": dict(
        run=dict(method="rsa", augmentation="rsa", stem="cifar"), side=24, test=16, deviation=0.01,
        rates=[30, 30, 30, 3, 0.3], update=lambda: reference.sgd(nesterov=True), best=True,
        drop_last=True,
    ),
    "rsa, large": dict(
        run=dict(method="rsa", augmentation="rsa", stem="imagenet", size=224), side=18, test=16,
        rates=[0.01] * 3 + [0.001] * 3 + [0.0001] * 2, update=lambda: reference.sgd(1e-4),
        best=True, standardise=True,
    ),
}  # fmt: skip


@pytest.fixture
def crops(outputs):
    """`crop_probe` on 40 photographs by a published protocol; the run, and what it gives."""
    size = 16

    def probe(name, source="simsiam", module=None, **options):
        protocol = PUBLISHED[source]
        config = SSLConfig(**{"size": size, **protocol["run"]})
        classifier = config.get_chosen("method").official_protocol(config).classifier
        classifier = classifier._replace(epochs=len(protocol["rates"]))
        train, test = (load("photos", s, protocol["side"], 40) for s in ("trainval", "test"))
        encoder = Encoder(module or Colours().eval(), size, train.mean, train.std)
        config = EvalConfig(run=name)
        run = runs.run_for(config, name)
        with run.writing(config, {}) as writer:
            results = crop_probe(
                encoder, train, test, run, writer, classifier=classifier,
                device=torch.device("cpu"), batch_size=16, seed=3, **options,
            )  # fmt: skip
        return run, *results, train, test

    return probe


@pytest.mark.parametrize("of", PUBLISHED)
def test_a_classifier_on_fresh_views_agrees_with_a_slow_loop(crops, of):
    """Each protocol by hand: a crop and a flip of each image by torchvision (IP-IRM's views by its
    recipe), softmax regression by its closed gradient, the optimiser by its definition."""
    assert enlarge(224) == 256 and enlarge(16) == 18
    protocol, size = PUBLISHED[of], 16
    run, scores, share, train, test = crops("whole", of)
    units = train.mean, train.std
    views = Recipe(size, *units, crop_scale=(0.08, 1.0), flip=0.5)

    def encode(pictures):
        return Colours()(TF.normalize(torch.stack([*pictures]), *units)).double()

    def encode_views(pictures, generator):
        if of == "ipirm":
            return Colours()(recipe("ipirm", size, *units)(pictures, generator).images).double()
        params = views.parameters(views.numbers(len(pictures), generator), pictures.shape[2:])
        crop_views = []
        for picture, box, flip in zip(pictures, params["crop"], params["flip"], strict=True):
            box = [int(part) for part in box]
            view = TF.resized_crop(picture / 255, *box, [size, size], antialias=True)
            crop_views.append(TF.horizontal_flip(view) if flip else view)
        return encode(crop_views)

    def encode_tests(pictures):
        return encode(TF.center_crop(picture, [protocol["test"]] * 2) / 255 for picture in pictures)

    normalise_rows = lambda z: z / z.norm(dim=1, keepdim=True)  # noqa: E731
    prepare = lambda z: z  # noqa: E731
    if "standardise" in protocol:
        bank = normalise_rows(encode_tests(train.images))
        mean, variance = bank.mean(0), (bank - bank.mean(0)).square().sum(0) / (len(bank) - 1)
        prepare = lambda z: (normalise_rows(z) - mean) / (variance + 1e-5).sqrt()  # noqa: E731

    torch.manual_seed(3)
    layer = nn.Linear(48, len(train.classes))
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    if "deviation" in protocol:
        w = torch.empty(w.shape).normal_(0, 0.01, generator=keyed_generator(3)).double()
        b = torch.zeros_like(b)
    epochs = []
    for epoch, rate in enumerate(protocol["rates"]):
        batches = []
        order = torch.randperm(40, generator=keyed_generator(3, epoch))
        for at, index in enumerate(order.split(16)):
            if len(index) == 16 or "drop_last" not in protocol:
                z = prepare(encode_views(train.images[index], keyed_generator(3, epoch, at)))
                batches.append((z, train.labels[index]))
        epochs.append((rate, batches))
    after = reference.softmax_regression(w, b, epochs, protocol["update"]())

    passes = [prepare(encode_tests(test.images)) @ w.T + b for w, b, _ in after]
    tops = [100 * (logits.argmax(1) == test.labels).double().mean().item() for logits in passes]
    counts = tops.index(max(tops)) if "best" in protocol else -1
    tensors, state = checkpoints.load(run)
    assert state["step"] == sum(len(batches) for _, batches in epochs)
    for ours, theirs in (
        (tensors["weight"], after[-1][0]),
        (tensors["bias"], after[-1][1]),
        (scores, passes[counts]),
    ):
        tolerance = dict(rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
    assert share == pytest.approx(tops[-1])
    lines = [line for line in run.metrics() if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx([x for *_, x in after], rel=1e-4)
    curve = [line["top1_test"] for line in run.metrics() if "top1_test" in line]
    assert curve == pytest.approx(tops if "best" in protocol else [])


@pytest.mark.parametrize(
    ("of", "epochs", "batch_size", "temperature"),
    [("simsiam", 90, 4096, 0.5), ("ipirm", 100, 512, 0.3), ("rsa", 100, 64, 0.1),
     ("rsa, large", 40, 256, 0.1)],
)  # fmt: skip
def test_length_and_batch_of_the_published_classifiers(of, epochs, batch_size, temperature):
    """RSA's batch is that of the training, IP-IRM's τ of kNN too; a baseline has its system's."""
    values = {"batch_size": 64} | ({"temperature": 0.3} if of == "ipirm" else {})
    config = SSLConfig(**PUBLISHED[of]["run"] | values)
    way = config.get_chosen("method").official_protocol(config)
    protocol = way.classifier.epochs, way.batch_size, way.temperature
    assert protocol == (epochs, batch_size, temperature)
    baseline = {"ipirm": {"baseline": True}, "rsa": {"rsa_views": "aggressive"}}
    twin = config.replace(**baseline.get(config.method, {}))
    assert twin.get_chosen("method").official_protocol(twin) == way


@pytest.mark.parametrize("of", PUBLISHED)
def test_a_classifier_leaves_the_encoder_s_statistics_and_modes(crops, of):
    norm = nn.BatchNorm2d(3)
    norm.running_mean += 0.3
    module = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), norm, Colours()).train()
    before = copy.deepcopy(module.state_dict())
    crops("whole", of, module)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert module.training and norm.training
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(("of", "stopped_after", "steps"), [
    ("simsiam", 4, 12), ("simsiam", 6, 12), ("ipirm", 4, 9), ("rsa", 7, 10), ("rsa", 8, 10),
])  # fmt: skip
def test_a_classifier_on_crops_goes_on_bit_for_bit(crops, monkeypatch, of, stopped_after, steps):
    """Stopped inside an epoch, and at the end of one."""
    oracle, expected, share, *_ = crops("whole", of)
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        requests = {stopped_after: "stop"}
        patch.setattr(runs.Run, "request", property(lambda self: requests.get(next(calls))))
        message = f"after step {stopped_after} of {steps} and saved"
        with pytest.raises(runs.Stopped, match=message):
            crops("parts", of)
    parts, *outcome, _, _ = crops("parts", of)
    assert torch.equal(outcome[0], expected) and outcome[1] == share
    (left, _), (right, _) = checkpoints.load(oracle), checkpoints.load(parts)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    losses = [[x["loss"] for x in run.metrics() if "loss" in x] for run in (oracle, parts)]
    assert losses[0] == losses[1]
