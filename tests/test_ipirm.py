"""IP-IRM by docs/spec/siblings.md §2: closed forms, partitions and their fitting.

The objective with every adversary against an oracle, resuming and two processes are in
test_methods.py.
"""

import copy
import itertools
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
from conftest import outcome, whole_and_resumed
from test_methods import (
    BATCH,
    DRAWS,
    MEAN,
    MOMENT,
    PARTITIONS,
    SIZE,
    STD,
    TINY,
    B,
    a_method,
    noise,
    total,
    two_views,
)
from torch.nn import functional as F

from idaa_lib.configs import ConfigError, SSLConfig
from idaa_lib.data.cached import load
from idaa_lib.evaluate.encoders import features, load_encoder
from idaa_lib.identity.factors import compare_sides
from idaa_lib.methods import About, build_method, partitions
from idaa_lib.methods import ipirm as module
from idaa_lib.methods.ipirm import IPIRM, debiased_loss
from idaa_lib.methods.partitions import (
    OFFLINE_MIXED,
    ONLINE_MIXED,
    ORDER,
    PLAIN,
    Embedded,
    compact_logits,
    fit_partition,
    imbalance,
    mix,
    mixed_logits,
    mixed_target,
    penalty,
    soft_loss,
)
from idaa_lib.methods.simclr import nt_xent
from idaa_lib.runs import Run, Stopped, checkpoints
from idaa_lib.runs.steps import Steps
from idaa_lib.train import locate, loop, train_ssl
from idaa_lib.train.stages import _weights_of
from idaa_lib.views import keyed_generator, recipe

OFFICIAL = IPIRM.Options(temperature=0.5, irm_temp=0.5, irm_weight_maxim=0.5)


def pairs(n, dim=6, seed=0):
    generator = keyed_generator(seed, n)
    z = torch.randn(2, n, dim, dtype=torch.float64, generator=generator)
    return F.normalize(z, dim=2).requires_grad_().unbind(0)


@pytest.mark.parametrize("n", [2, 7])
def test_compact_logits_hold_the_loss_of_nt_xent(n):
    z1, z2 = pairs(n)
    logits, image = compact_logits(z1, z2)
    assert logits.shape == (2 * n, 2 * n - 1)
    s = logits / 0.3
    torch.testing.assert_close((s.logsumexp(1) - s[:, 0]).mean(), nt_xent(z1, z2, 0.3))
    for i, (_, others) in enumerate(reference.compact_rows(z1, z2)):
        assert image[i].tolist() == [j % n for j in others]


@pytest.mark.parametrize("dummy", ["vector", "scalar"])
@pytest.mark.parametrize("n", [2, 8])
def test_the_penalty_and_its_gradient_are_those_of_double_backward(n, dummy):
    z = torch.randn(2, n, 5, dtype=torch.float64, generator=keyed_generator(n))
    outcomes = []
    for form in ("closed", "double"):
        leaf = z.clone().requires_grad_()
        z1, z2 = F.normalize(leaf, dim=2)
        result = penalty(compact_logits(z1, z2)[0] / 0.5, dummy=dummy)
        value = result if form == "closed" else reference.irm_penalty(z1, z2, 0.5, dummy)
        outcomes.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*outcomes)
    assert outcomes[0][0] > 1e-6


def test_the_penalty_depends_on_the_order_of_the_batch():
    """A column is a rank among the negatives (§2.2): processes must gather in one order."""
    z1, z2 = (z.detach() for z in pairs(16))
    order = torch.randperm(16, generator=keyed_generator(5))
    one = penalty(compact_logits(z1, z2)[0])
    other = penalty(compact_logits(z1[order], z2[order])[0])
    assert one != pytest.approx(other.item(), rel=1e-6)
    scalar = [
        penalty(compact_logits(a, b)[0], dummy="scalar")
        for a, b in ((z1, z2), (z1[order], z2[order]))
    ]
    torch.testing.assert_close(*scalar)


@pytest.mark.parametrize("total", [False, True])
def test_equal_shares_give_plain_nt_xent(total):
    z1, z2 = pairs(6)
    logits, image = compact_logits(z1, z2)
    loss, omega = soft_loss(logits, image, torch.full((6,), 0.5).double(), (0.3, 0.5), total)
    torch.testing.assert_close(loss, nt_xent(z1, z2, 0.3) * (0.5 if total else 1))
    # With `nonorm` it is of the same loss, half as large, whose squared gradient is a quarter.
    torch.testing.assert_close(omega, penalty(logits / 0.5) * (0.25 if total else 1))


def test_nonorm_takes_the_place_of_both_constraints():
    p = torch.rand(7, 2).double().softmax(1)
    entropy = lambda q: -(q * q.log()).sum(-1)  # noqa: E731
    expected = 0.2 * (entropy(p).mean() - entropy(p.mean(0)))
    for constrain in ("relaxed", "strict"):
        torch.testing.assert_close(imbalance(p, constrain, total=True), expected)
    assert imbalance(p, "none", total=True) == 0


def test_certain_shares_give_the_loss_among_a_subset():
    """Up to the factor (2n − 2)/(number of the subset's negatives) of the negatives (§2.8)."""
    z1, z2 = pairs(6)
    subset = [0, 2, 3, 5]
    shares = torch.zeros(6).double()
    shares[subset] = 1
    loss, _ = soft_loss(*compact_logits(z1, z2), shares, (0.3, 0.5), False)
    z = torch.cat([z1[subset], z2[subset]])
    rows = []
    for i, (partner, others) in enumerate(reference.compact_rows(z1[subset], z2[subset])):
        positive = torch.exp(z[i] @ z[partner] / 0.3)
        negatives = sum(torch.exp(z[i] @ z[j] / 0.3) for j in others) * 10 / len(others)
        rows.append(-torch.log(positive / (positive + negatives)))
    torch.testing.assert_close(loss, torch.stack(rows).mean())


def test_shares_that_underflow_have_a_finite_gradient():
    z1, z2 = pairs(6)
    scores = torch.tensor([800.0, -800, 0, 1, 2, 3]).double().requires_grad_()
    loss, omega = soft_loss(*compact_logits(z1, z2), scores.sigmoid(), (0.3, 0.5), False)
    (gradient,) = torch.autograd.grad(loss + omega, scores)
    assert gradient.isfinite().all()


def test_an_imbalance_of_two_to_one_is_free():
    p = torch.tensor([[1.0, 0]] * 2 + [[0.0, 1]] * 4, dtype=torch.float64)
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert imbalance(p, "relaxed", False) == 0
    assert imbalance(p[1:], "relaxed", False).item() == pytest.approx(
        0.6365 + 0.2 * math.log(0.2) + 0.8 * math.log(0.8)
    )
    assert imbalance(p, "strict", False).item() == pytest.approx(-entropy)
    assert imbalance(p, "none", False) == 0
    half = torch.full((4, 2), 0.5, dtype=torch.float64)
    assert imbalance(half, "relaxed", True).item() == pytest.approx(0.0)  # −log 2 + log 2


def plant_factor(length, seed, n=256):
    """Two views of n images with a factor ±1 along u, and that factor (§2.8)."""
    generator = keyed_generator(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    unit = lambda x: F.normalize(x, dim=-1)  # noqa: E731
    factor = torch.arange(n) % 2
    base = unit(draw(n, 32)) + (2 * factor - 1)[:, None] * length * unit(draw(32))
    return [unit(base + 0.3 * unit(draw(n, 32))) for _ in range(2)], factor


def agreement(length, seed, n=256):
    views, factor = plant_factor(length, seed, n)
    scores = torch.randn(n, 2, generator=keyed_generator(seed, 1))
    partition = fit_partition(lambda epoch, batches: Embedded(*views), scores, OFFICIAL, (seed,))
    share = (partition.argmax(1) == factor).double().mean().item()
    return max(share, 1 - share)


def test_a_planted_factor_is_found_from_most_starts():
    """At N = 256 from 34 of 40 (docs/siblings.md), at 128 from all of these but two; the others end
    in a worse optimum. What it finds in noise agrees with a factor by chance."""
    assert agreement(0.6, 1) >= 0.99
    assert sum(agreement(0.6, seed, n=128) >= 0.99 for seed in range(8)) >= 5
    assert max(agreement(0.0, seed, n=128) for seed in range(4)) <= 0.65


@pytest.mark.parametrize(
    ("tint", "low", "high", "random_init"),
    [(0.85, 90, 100, True), (0.0, 50, 70, True), (0.85, 90, 100, False)],
)
def test_a_tint_of_half_the_photographs_is_found(tint, low, high, random_init):
    """One maximisation of an encoder that sees the mean colour of views, and without `random_init`
    a second one, which goes on from it."""
    images = load("photos", "train", 32, 160).images.float()
    half = torch.arange(len(images)) % 2
    red = torch.tensor([255.0, 0, 0])[:, None, None]
    pixels = torch.lerp(images, red, tint * half[:, None, None, None]).to(torch.uint8)
    config = SSLConfig(method="ipirm", width=4, random_init=random_init)
    views = replace(recipe("ipirm", 32, (0.5,) * 3, (0.25,) * 3), jitter_probability=0, gray=0)
    method = build_method(config, About(views, torch.zeros(len(images))))

    def embed(layer, **options):
        colour = features(lambda x: x.mean((2, 3)), pixels, 32, views.mean, views.std, **options)
        return F.normalize(colour - colour.mean(0), dim=1)

    work = SimpleNamespace(embed=embed, pulse=lambda message: None, say=print)
    for epoch in (0,) if random_init else (0, config.maximize_iter):
        method.before_epoch(epoch, work)
        partition = method.present()[-1]
        assert len(partition.unique()) == 2
        assert low <= compare_sides(partition, half).value <= high


@pytest.mark.parametrize("constrain", ["relaxed", "strict", "none"])
@pytest.mark.parametrize(("batch", "drop_last"), [(24, False), (10, False), (10, True)])
def test_the_maximisation_is_step_by_step_that_of_the_specification(constrain, batch, drop_last):
    """Optimiser, schedule, batches, weights, what is kept and when it stops (§2.3)."""
    z1, z2 = (z.detach() for z in pairs(24))
    options = IPIRM.Options(temperature=0.3, irm_weight_maxim=0.7, constrain=constrain)
    scores = torch.randn(24, 2, dtype=torch.float64, generator=keyed_generator(2))
    fitting = PLAIN._replace(batch=batch)

    def order(epoch):
        permutation = torch.randperm(24, generator=keyed_generator(7, epoch, ORDER))
        return permutation[:20] if drop_last else permutation

    embeddings = lambda epoch, batches: Embedded(z1, z2)  # noqa: E731
    ours = fit_partition(embeddings, scores, options, (7,), fitting, drop_last)
    oracle = reference.ip_irm_maximisation(z1, z2, scores, order, batch, 0.3, 0.5, 0.7, constrain)
    torch.testing.assert_close(ours, oracle, rtol=1e-6, atol=1e-8)
    assert (ours - scores).abs().max() > 1


def test_a_maximisation_of_several_processes_ends_with_the_first(monkeypatch):
    """Where another one's numbers would end it sooner or later: else it would wait for ever."""
    ends, means = [], []

    def fit(seed, agree):
        epochs = []
        z = pairs(32, seed=seed)
        embeddings = lambda epoch, batches: epochs.append(epoch) or Embedded(*z)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(partitions, "agree", agree)
            scores = torch.randn(32, 2, dtype=torch.float64, generator=keyed_generator(seed))
            fit_partition(embeddings, scores, OFFICIAL, (seed,), PLAIN._replace(least=5))
        ends.append(len(epochs))

    fit(0, lambda mean: means.append(mean) or mean)
    fit(1, lambda mean: mean)
    first = iter(means)
    fit(1, lambda mean: next(first))
    assert ends[0] != ends[1] and ends[2] == ends[0] == len(means)


def test_images_that_are_fewer_than_a_batch_of_the_maximisation_are_one_batch(monkeypatch, capsys):
    z1, z2 = pairs(6)
    pulses = []
    scores = torch.zeros(6, 2).double()
    fit_partition(
        lambda epoch, batches: Embedded(z1.detach(), z2.detach()), scores, OFFICIAL, (0,),
        drop_last=True, pulse=pulses.append,
    )  # fmt: skip
    assert 51 <= len(pulses) <= 61
    maximise(monkeypatch, limit=8)
    assert capsys.readouterr().out.splitlines() == [
        "partition: 8 images are one batch of the maximisation, not 3096."
    ]


@pytest.mark.parametrize(("fitting", "epochs"), [(PLAIN, 52), (ONLINE_MIXED, 27)])
def test_a_maximisation_without_improvement_ends_in_the_epoch_that_the_code_has(fitting, epochs):
    """Equal images: the risk is that of the start for ever."""
    calls = []
    z = F.normalize(torch.ones(6, 4).double(), dim=1)
    embeddings = lambda epoch, batches: calls.append(epoch) or Embedded(z, z)  # noqa: E731
    fit_partition(embeddings, torch.zeros(6, 2).double(), OFFICIAL, (0,), fitting)
    assert len(calls) == epochs


def test_dcl_s_loss():
    z1, z2 = pairs(5)
    for prior in (0.05, 0.1, 0.9):
        loss, oracle = debiased_loss(z1, z2, 0.5, prior), reference.debiased(z1, z2, 0.5, prior)
        torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(debiased_loss(z1, z2, 0.5, 0.0), nt_xent(z1, z2, 0.5))


@pytest.mark.parametrize("temperature", [0.002, 0.01, 0.05, 20.0])
def test_dcl_s_loss_is_finite_at_any_temperature(temperature):
    """In single precision, where e^(1/T) overflows below .0113; of no prior it is NT-Xent."""
    z1, z2 = pairs(5)
    for prior in (0.0, 0.1, 0.9):
        z = z1.float().requires_grad_()
        loss = debiased_loss(z, z2.float(), temperature, prior)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
        oracle = reference.debiased(z1, z2, temperature, prior)
        if temperature > 0.002:  # there doubles overflow too, row by row
            torch.testing.assert_close(loss.double(), oracle, rtol=1e-4, atol=1e-5)
    loss = debiased_loss(z1, z2, temperature, 0.0)
    torch.testing.assert_close(loss, nt_xent(z1, z2, temperature))


@pytest.mark.parametrize("baseline", [False, True])
def test_initial_weights_are_those_of_torchvision_s_resnet_with_another_stem(baseline):
    """He et al.'s fan-out normal, no residual branch at 0; the stem, which replaces torchvision's,
    has a Conv2d's default, U(±1/√fan_in) (spec §2.1)."""
    config = SSLConfig(preset="ipirm-cifar100", width=32, baseline=baseline)
    backbone = build_method(config, About(recipe("ipirm", 32, MEAN, STD))).network.backbone
    convolutions = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions[1:]:
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
    largest = convolutions[0].weight.abs().max().item()
    assert 0.9 / math.sqrt(27) < largest <= 1 / math.sqrt(27)
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() for norm in norms)


# --- mixed images (§2.4)


def test_images_are_mixed_as_drawn():
    x = noise(1, 6)
    images, target = mix(x, DRAWS[:, 1])
    oracle, share, partners = reference.mixup(x, DRAWS[:, 1])
    torch.testing.assert_close(images, oracle)
    assert sorted(partners) == [*range(6)] and 0.5 <= share <= 1
    expected = share * torch.eye(6).double()
    for i, j in enumerate(partners):
        expected[i, j] += 1 - share
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("n", [2, 7])
def test_the_soft_loss_of_mixed_images_is_that_of_the_specification(n):
    """Loss, penalty and the gradients of both, for scores and embeddings; λ of each image acts, as
    no mean over a batch is taken before shares weight it."""
    z, draws = torch.randn(2, n, 5).double(), torch.rand(n, 2).double()
    share, partner = draws.max(1).values, torch.randperm(n)
    outcomes = []
    for by_hand in (False, True):
        leaf, scores = z.clone().requires_grad_(), draws[:, 0].clone().requires_grad_()
        (z1, z2), p = F.normalize(leaf, dim=2), (3 * scores).sigmoid()
        if by_hand:
            loss, omega = reference.soft_mixed_subset(
                z1, z2, p, 0.3, share.tolist(), partner.tolist()
            )
        else:
            logits, image, target = Embedded(z1, z2, share, partner).logits(torch.arange(n))
            loss, omega = soft_loss(logits, image, p, (0.3, 0.3), False, target)
        gradients = torch.autograd.grad(loss + omega, (leaf, scores))
        outcomes.append((loss.detach(), omega.detach(), *gradients))
    torch.testing.assert_close(*outcomes)


def test_with_a_partner_in_no_batch_the_image_itself_counts_alone():
    share = torch.tensor([0.6, 0.8, 1.0]).double()
    target = mixed_target(share, torch.tensor([2, -1, 0]))
    torch.testing.assert_close(
        target, torch.tensor([[0.6, 0, 0.4], [0, 0.8, 0], [0, 0, 1]]).double()
    )
    z1, z2 = pairs(3)
    shares = torch.full((3,), 0.5).double()
    s = z1 @ z2.T / 0.3
    loss, _ = soft_loss(*mixed_logits(z1, z2), shares, (0.3, 0.3), False, torch.diag(share))
    losses = F.cross_entropy(s, torch.arange(3), reduction="none")
    torch.testing.assert_close(loss, (share * losses).mean())
    embeddings = Embedded(z1, z2, share, torch.tensor([1, 2, 0]))
    *_, target = embeddings.logits(torch.tensor([2, 0]))  # of image 0 the partner is not there
    torch.testing.assert_close(target, torch.tensor([[1, 0], [0, 0.6]]).double())


@pytest.mark.parametrize(
    "values",
    [
        dict(penalty_weight=4.0),
        dict(retain_group="one"),
        dict(retain_group="one", penalty_weight=4.0),
    ],
)
def test_a_penalty_weight_above_1_divides_what_a_partition_is_in(values):
    method, (v1, v2) = a_method("ipirm/mixup", "none", **values), two_views()
    group = "retain_group" in values
    twin = copy.deepcopy(method)
    step = method.step((v1, v2), BATCH, MOMENT)
    embed = lambda x: twin.network(x).z  # noqa: E731
    batch = torch.arange(B), method.present(), DRAWS[:B]
    weight = values.get("penalty_weight", 0.2)
    oracle = reference.ip_irm_mixed(embed, embed, v1.images, v2.images, *batch, 0.3, weight, group)
    loss = total(step.loss)
    torch.testing.assert_close(loss, oracle)
    assert len(step.loss) == (1 if group else 3)
    if not group:  # the logged parts are L_all and means over partitions
        parts = step.parts["contrast"] + 2 / 4 * (step.parts["subsets"] + 4 * step.parts["penalty"])
        torch.testing.assert_close(loss.detach(), parts)


@pytest.mark.parametrize(
    ("values", "passes", "batches"),
    [
        ({}, 2 + 2 * 3, 2 + 2 * 2),
        (dict(keep_cont=False), 2 * 3, 2 * 2),
        (dict(retain_group="one"), 1 + 3, 3),
        (dict(baseline=True, n=7), 2, 2),
    ],
)
def test_what_is_forwarded_again(values, passes, batches):
    """x₁ for L_all and for each subset, x₂ for L_all and for each partition; where one partition is
    kept, x₂ once (§2.4)."""
    method = a_method("ipirm/mixup", "none", **values)
    sizes = []
    method.network.register_forward_hook(lambda net, args, output: sizes.append(len(args[0])))
    step = method.step(two_views(), BATCH, MOMENT)
    total(step.loss).backward()
    assert (len(sizes), sum(sizes)) == (passes, B * batches)
    assert (step.embeddings is None) == ("keep_cont" in values)


def test_the_baseline_of_mixed_images_is_l_all_alone():
    method, (v1, v2) = a_method("ipirm/mixup", "none", n=7, baseline=True), two_views()
    twin = copy.deepcopy(method)
    images, *pairs_ = reference.mixup(v1.images, DRAWS[:B, 0])
    z1, z2 = (twin.network(x).z for x in (images, v2.images))
    expected, _ = reference.mixed_contrast(z1, z2, 0.3, *pairs_)
    torch.testing.assert_close(total(method.step((v1, v2), BATCH, MOMENT).loss), expected)
    assert not any("partition" in name for name in method.state_dict())


def test_mixing_is_drawn_from_the_step_s_numbers():
    method = a_method("ipirm/mixup", "none")
    numbers, repeat, rest = (
        method.numbers({"images": B}, keyed_generator(key))["mixup"] for key in (1, 1, 2)
    )
    assert numbers.shape == (B, 1 + method.capacity, 2)
    assert torch.equal(numbers, repeat) and not torch.equal(numbers, rest)
    plain_numbers = a_method("ipirm", "none").numbers({"images": B}, keyed_generator(1))
    assert plain_numbers.keys() == {"view 0", "view 1"}
    before = torch.get_rng_state()
    total(method.step(two_views(), BATCH, MOMENT).loss)
    assert torch.equal(torch.get_rng_state(), before)


def test_mixup_is_refused_with_what_it_cannot_have():
    values = dict(method="ipirm", mixup=True, augmentation="ipirm")
    for field, value in (("condition", "crop"), ("augself", "crop=1"), ("compile", True)):
        with pytest.raises(ConfigError, match=f"{field}.* mixup"):
            SSLConfig(**values, **{field: value})


@pytest.mark.parametrize("offline", [True, False])
def test_a_maximisation_of_mixed_images_mixes_within_its_batches(monkeypatch, offline):
    calls, method = maximise(monkeypatch, mixup=True, mixup_max=True, offline=offline)
    first, second = method.mixings[:2]
    assert second is None  # the other view is as it is
    share, partner = first
    assert ((share >= 0.5) & (share <= 1)).all() and len(share.unique()) == 8
    assert partner.tolist() == [6, 4, 7, 0, 2, 3, 5, 1]  # [6, 0, 3, 5] and [1, 7, 2, 4] in a ring
    for *_, (epoch_1, epoch_2), _, fitting in calls:
        assert fitting == (OFFLINE_MIXED if offline else ONLINE_MIXED)
        assert torch.equal(epoch_1.share, epoch_2.share) == offline
    assert ONLINE_MIXED == (0.1, (5, 25), 31, 2048, 25)
    assert OFFLINE_MIXED == (0.5, (5, 35), 61, 2048, 50)


def test_a_view_is_mixed_with_that_of_its_partner():
    images = torch.randint(0, 256, (7, 3, 20, 20), dtype=torch.uint8)
    share, partner = torch.linspace(0.5, 1, 7), torch.arange(7).roll(1)
    views = recipe("ipirm", SIZE, MEAN, STD)
    options = dict(transform=views, batch_size=3)

    def embed(mixing):
        units = torch.nn.Flatten(), images, SIZE, MEAN, STD
        return features(*units, **options, generator=keyed_generator(4), mixing=mixing)

    rows, mixture = embed(None), embed((share, partner))
    weights = share[:, None]
    torch.testing.assert_close(mixture, weights * rows + (1 - weights) * rows[partner])


def test_a_run_goes_on_bit_for_bit_after_a_maximisation_of_mixed_images(outputs, monkeypatch):
    knobs = dict(mixup=True, mixup_max=True, offline=False, maximize_iter=1, projection_dim=8)
    config = SSLConfig(**TINY, method="ipirm", **knobs)
    result, repeat = whole_and_resumed(train_ssl, config, monkeypatch, 3, 4)
    assert repeat[0]["method.fitted"] == 2
    assert all(torch.equal(result[0][k], repeat[0][k]) for k in result[0])
    assert result[1:] == repeat[1:]


# --- the method


def test_a_subset_of_fewer_than_two_images_is_left_out_and_counted():
    method = a_method("ipirm", "none")
    method.keep(torch.tensor([0, 0, 0, 0, 1, 0]))  # of 5 images one is alone
    z1, z2 = pairs(5)
    loss, parts = method.objective(z1, z2, torch.arange(5))
    partitions = torch.stack([PARTITIONS[1], torch.tensor([0, 0, 0, 0, 1, 0])])
    torch.testing.assert_close(loss, reference.ip_irm(z1, z2, torch.arange(5), partitions, 0.3))
    assert parts["small_subsets"] == 1


def test_a_penalty_weight_above_1_divides_the_whole_loss():
    method = a_method("ipirm", "none", penalty_weight=4.0)
    z1, z2 = pairs(5)
    loss, _ = method.objective(z1, z2, torch.arange(5))
    total_loss = reference.ip_irm(z1, z2, torch.arange(5), PARTITIONS, 0.3, penalty_weight=4.0)
    torch.testing.assert_close(loss, total_loss / 4)


@pytest.mark.parametrize(("retain", "count"), [("all", 4), ("one", 1), ("2", 2)])
def test_as_many_partitions_are_kept_as_asked_for(retain, count):
    config = SSLConfig(method="ipirm", retain_group=retain, epochs=7, maximize_iter=2, width=4)
    about = About(recipe("none", SIZE, MEAN, STD), torch.zeros(5), epochs=7)
    method = build_method(config, about)
    history = [torch.tensor([i % 2, 1, 0, 1, i > 2]).byte() for i in range(4)]
    shape = method.partitions.shape
    for partition in history:
        method.keep(partition)
        assert torch.equal(method.present()[-1], partition)
    assert method.partitions.shape == shape  # so that a checkpoint of any moment fits
    assert torch.equal(method.present(), torch.stack(history)[-count:])


def maximise(monkeypatch, **values):
    """What the maximisation is asked for in 5 epochs, and the method after them."""
    calls = []

    def fit(embeddings, scores, options, key, fitting, drop_last, pulse):
        batches = torch.tensor([6, 0, 3, 5]), torch.tensor([1, 7, 2, 4])
        pair = [embeddings(i, batches) for i in range(2)]
        calls.append((scores.clone(), key, pair, drop_last, fitting))
        return scores.flip(1) + 1

    monkeypatch.setattr(module, "fit_partition", fit)
    config = SSLConfig(method="ipirm", epochs=5, maximize_iter=2, width=4, seed=3, **values)
    about = About(recipe("ipirm", SIZE, MEAN, STD), torch.zeros(8), epochs=5, seed=3)
    method = build_method(config, about)
    mixings = []

    def embed(layer, transform, generator, mixing, pulse):
        mixings.append(mixing)
        return torch.rand(8, 4, generator=generator)

    work = SimpleNamespace(embed=embed, pulse=lambda message: None, say=print, mixings=mixings)
    for epoch in range(5):
        method.before_epoch(epoch, work)
    method.mixings = mixings
    return calls, method


def test_partitions_are_fitted_before_epoch_1_and_after_every_maximize_iter(monkeypatch):
    calls, method = maximise(monkeypatch)
    assert [key for _, key, *_ in calls] == [(3, 0), (3, 2), (3, 4)]
    starts = [scores for scores, *_ in calls]
    assert not torch.equal(starts[0], starts[1])
    expected = torch.stack([scores.flip(1).argmax(1) for scores in starts])
    assert torch.equal(method.present(), expected)
    repeat, _ = maximise(monkeypatch)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(calls, repeat, strict=True))
    for *_, ((z1, z2, share, _), (next_z1, *_)), drop_last, fitting in calls:
        assert not torch.equal(z1, z2) and torch.equal(z1, next_z1) and not drop_last
        assert share is None and fitting is PLAIN


def test_online_views_are_drawn_anew_in_each_epoch(monkeypatch):
    calls, _ = maximise(monkeypatch, offline=False)
    for *_, ((z1, *_), (next_z1, *_)), drop_last, fitting in calls:
        assert not torch.equal(z1, next_z1) and drop_last and fitting is PLAIN


def test_without_random_init_the_scores_go_on_and_what_is_kept_does_not_change(monkeypatch):
    calls, method = maximise(monkeypatch, random_init=False)
    assert torch.equal(calls[0][0], maximise(monkeypatch)[0][0][0])  # at random, as with it
    for before, after in itertools.pairwise(calls):
        assert torch.equal(after[0], before[0].flip(1) + 1)
    assert len(method.present()) == 3


@pytest.mark.parametrize(
    "knobs", [{"random_init": False}, {"mixup": True, "mixup_max": True}], ids=["scores", "mixed"]
)
def test_the_pass_over_all_images_beats_at_each_batch_and_hears_a_stop(knobs, outputs, monkeypatch):
    """Nothing is lost: the run goes on from before the pass, and ends as one that did not stop."""
    pulses, pulse = [], Steps.pulse
    monkeypatch.setattr(loop, "features", partial(features, batch_size=4))
    monkeypatch.setattr(
        Steps, "pulse", lambda self, text="": pulses.append((self.step, text)) or pulse(self, text)
    )
    config = SSLConfig(
        **TINY, method="ipirm", maximize_iter=1, projection_dim=8, checkpoint_every=2, **knobs
    )
    expected = outcome(train_ssl(config))
    shutil.rmtree(locate(config).path)
    texts = [f"partition: {done} of 32 views are embedded" for done in range(0, 32, 4)]
    assert [pulse for pulse in pulses if pulse[1] in texts] == [*product((0, 2), texts)]
    stop = property(lambda self: "stop" if pulses[-1] == (2, texts[5]) else None)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "request", stop)
        with pytest.raises(Stopped, match="after step 2 of 4 and saved"):
            train_ssl(config)
    assert pulses[-1] == (2, texts[5])
    again = outcome(train_ssl(config))
    assert again[0]["method.fitted"] == 2
    assert all(torch.equal(expected[0][k], again[0][k]) for k in expected[0])
    assert expected[1:] == again[1:]


def test_an_encoder_comes_back_and_a_run_goes_on_after_partitions_have_grown(outputs):
    config = SSLConfig(**TINY | {"epochs": 3}, method="ipirm", maximize_iter=1, projection_dim=8)
    run = train_ssl(config)
    assert len(outcome(run)[0]["method.partitions"]) == 4
    assert outcome(run)[0]["method.fitted"] == 3
    assert load_encoder(run, "projector").module(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 8)
    continuation = train_ssl(config.replace(continue_from=run.id))
    assert continuation.finished
    lines = [line for line in run.metrics() if "penalty" in line]
    assert lines and all(math.isfinite(line["penalty"]) for line in lines)


@pytest.mark.parametrize(
    ("preset", "knobs"),
    [
        ("ipirm-cifar100", dict(dataset="cifar100", source_size=None, irm_weight_maxim=0.2)),
        ("ipirm-stl10", dict(dataset="stl10-all", source_size=96, irm_weight_maxim=0.5)),
    ],
)
def test_recipes_are_as_specified(preset, knobs):
    """§2.1, §2.5."""
    config = SSLConfig(preset=preset)
    values = knobs | dict(
        split="trainval", backbone="resnet50", stem="cifar", size=32, width=64, epochs=400,
        batch_size=256, learning_rate=1e-3, weight_decay=1e-6, optimizer="adam",
        schedule="constant", augmentation="ipirm", penalty_weight=0.2,
        temperature=0.5, irm_temp=0.5, maximize_iter=50, constrain="relaxed", retain_group="all",
        keep_cont=True, random_init=True, offline=True, dummy="vector", projection_dim=128,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010),
    )  # fmt: skip
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(env_num=1), "env_num must be greater than or equal to 2"),
        (dict(env_num=3), "env_num=3 needs constrain='strict' or 'none'"),
        (dict(maximize_iter=0), "maximize_iter must be greater than 0"),
        (dict(debiased=0.1), "debiased=0.1 is a loss of the baseline alone"),
        (dict(debiased=0.1, baseline=True, mixup=True), "debiased is not for mixed images"),
        (dict(mixup_max=True), "mixup_max=true needs mixup=true too"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        a_method("ipirm", **values)


def test_three_subsets_without_the_relaxed_constraint():
    method = a_method("ipirm", "none", n=9, env_num=3, constrain="strict")
    method.keep(torch.arange(9) % 3)
    z1, z2 = pairs(9)
    losses = [nt_xent(z1[k::3], z2[k::3], 0.3) for k in range(3)]
    penalties = [reference.irm_penalty(z1[k::3], z2[k::3], 0.5) for k in range(3)]
    expected = nt_xent(z1, z2, 0.3) + sum(losses) / 3 + 0.2 * sum(penalties) / 3
    torch.testing.assert_close(method.objective(z1, z2, torch.arange(9))[0], expected)


def fit_in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    method = a_method("ipirm", "none", n=12, maximize_iter=1)

    def embed(layer, **options):  # by running statistics of its own
        return F.normalize(torch.randn(12, 4, generator=keyed_generator(rank)), dim=1)

    for epoch in (0, 1):
        method.before_epoch(
            epoch, SimpleNamespace(embed=embed, pulse=lambda message: None, say=print)
        )
    torch.save(method.present(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_have_the_partitions_of_the_first(tmp_path):
    torch.multiprocessing.spawn(fit_in_a_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == 2 and torch.equal(first, second)


def test_a_continued_training_takes_no_partitions_of_other_images(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    knobs = dict(size=16, width=4, limit=16, batch_size=8, epochs=1, device="cpu")
    run = train_ssl(SSLConfig(**knobs, method="ipirm", augmentation="ipirm"))
    data = run.environment["dataset"]
    views = recipe("ipirm", 16, (0.5,) * 3, (0.25,) * 3)
    method = build_method(run.config, About(views, torch.zeros(data["n"])))
    for fingerprint, count in ((data["fingerprint"], 1), ("of other images", 0)):
        plan = SimpleNamespace(
            start=run, config=run.config, data=SimpleNamespace(fingerprint=fingerprint)
        )
        assert _weights_of(plan, method)["method.fitted"] == count


@pytest.mark.parametrize(
    ("knobs", "names"),
    [
        ({"random_init": False}, {"partitions", "fitted", "scores"}),
        ({"retain_group": "one"}, {"partitions", "fitted"}),
        ({"baseline": True}, set()),
    ],
)
def test_a_continued_training_may_keep_other_things_of_the_images(knobs, names, outputs, capsys):
    """Partitions and scores are made anew where the options ask for others; weights go on."""
    values = dict(size=16, width=4, limit=16, batch_size=8, epochs=1, device="cpu", method="ipirm")
    run = train_ssl(SSLConfig(**values))
    config = SSLConfig(**values | {"continue_from": run.id} | knobs)
    method = build_method(config, About(recipe("ipirm", 16, MEAN, STD), torch.zeros(16)))
    fingerprint = run.environment["dataset"]["fingerprint"]
    plan = SimpleNamespace(start=run, config=config, data=SimpleNamespace(fingerprint=fingerprint))
    capsys.readouterr()
    tensors = _weights_of(plan, method)
    words = capsys.readouterr().out
    assert all(name in words for name in names) and bool(names) == bool(words)
    assert {k for k in tensors if k.count(".") == 1} == {f"method.{name}" for name in names}
    assert all(not tensors[f"method.{name}"].any() for name in names)
    before = checkpoints.load(run)[0]
    weights = [k for k in before if k.startswith("method.network.")]
    assert all(torch.equal(tensors[k], before[k]) for k in weights)
