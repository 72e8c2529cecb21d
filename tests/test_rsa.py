"""RSA by docs/spec/siblings.md §3: its views, schedules and symmetry. Losses and gradients against
an oracle, resuming and two processes are in test_methods.py."""

import copy
import math
from dataclasses import replace

import pytest
import reference
import torch
from conftest import fit_of
from test_methods import MEAN, MOMENT, SIZE, STD, B, a_config, a_method, noise

from idaa_lib.configs import ConfigError, SSLConfig
from idaa_lib.methods import About, Moment, Step, build_method
from idaa_lib.methods.lars import LARS
from idaa_lib.methods.rsa import beta, distance
from idaa_lib.methods.simsiam import negative_cosine
from idaa_lib.views import View, keyed_generator, recipe


def four_views():
    """a₁, a₂, w₁, w₂."""
    return tuple(View(noise(seed), {}) for seed in (3, 4, 5, 6))


def draw_views(views="four", **changes):
    images = torch.randint(0, 256, (B, 3, 24, 24), dtype=torch.uint8, generator=keyed_generator(1))
    config = a_config("rsa", "none", rsa_views=views)
    method = build_method(config, About(recipe("rsa", SIZE, MEAN, STD)))
    method.recipe = replace(method.recipe, **changes)
    numbers = method.numbers({"images": B}, keyed_generator(2))
    return method.draw({"images": images}, {}, Moment(numbers=numbers))


def test_aggressive_views_are_their_weak_views_after_photometry():
    a1, a2, w1, w2 = draw_views()
    assert not torch.equal(w1.images, w2.images)
    for a, w in ((a1, w1), (a2, w2)):
        assert torch.equal(a.params["crop"], w.params["crop"])
        assert torch.equal(a.params["flip"], w.params["flip"])
        assert (a.images - w.images).abs().max() > 0.1
    a1, a2, w1, w2 = draw_views(jitter_probability=0, gray=0, blur=0)
    assert torch.equal(a1.images, w1.images) and torch.equal(a2.images, w2.images)


@pytest.mark.parametrize("views", ["aggressive", "weak"])
def test_byol_under_the_recipe_sees_two_views(views):
    batch_views = draw_views(views)
    assert len(batch_views) == 2
    assert any(view.params["blur"].any() for view in batch_views) == (views == "aggressive")


def test_beta_falls_from_beta0_to_0_by_a_cosine():
    """At s = 1, S/2 and S (spec §3.6)."""
    for s, expected in ((1, 0.4 * (1 + math.cos(math.pi / 100)) / 2), (50, 0.2), (100, 0.0)):
        assert beta(0.4, (s - 1) / 100, 100).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("step", [0, 4, 9])
def test_the_target_follows_as_if_it_were_averaged_before_the_next_step(step):
    """τ_{s+1} after step s = 1…S (spec §3.2); step counts from 0."""
    method = a_method("rsa", "none")
    online = list(method.network.parameters())
    before = [p.clone() for p in method.target.parameters()]
    method.after_step(Step(torch.tensor(0.0)), Moment(step=step, steps=10))
    share = (1 + math.cos(math.pi * min(step + 2, 10) / 10)) / 2
    tau = 1 - (1 - 0.8) * share
    expected = [tau * t + (1 - tau) * p for t, p in zip(before, online, strict=False)]
    torch.testing.assert_close(list(method.target.parameters()), expected)


def loss_of(method, views, moment=MOMENT):
    return method.step(views, {}, moment).loss


def test_exchanging_the_views_changes_nothing():
    a1, a2, w1, w2 = four_views()
    method = a_method("rsa", "none")
    one = loss_of(copy.deepcopy(method), (a1, a2, w1, w2))
    torch.testing.assert_close(loss_of(method, (a2, a1, w2, w1)), one)


@pytest.mark.parametrize("moment", [MOMENT, Moment(step=7, steps=8, progress=torch.tensor(0.875))])
def test_without_beta_it_is_byol_of_aggressive_and_weak_views(moment):
    """β₀ = 0 at any step, any β₀ at the last (spec §3.6): 4 + 4 times the mean of −cos."""
    last = moment.step == 7
    method = a_method("rsa", "none", beta0=0.4 if last else 0.0)
    twin = copy.deepcopy(method)
    a1, a2, w1, w2 = four_views()
    p1, p2 = (twin.embed(v).p for v in (a1, a2))
    with torch.no_grad():
        t1, t2 = (twin.target(v.images).z for v in (w1, w2))
    mean = (negative_cosine(p1, t2) + negative_cosine(p2, t1)) / 2
    torch.testing.assert_close(loss_of(method, (a1, a2, w1, w2), moment), 4 + 4 * mean)


def test_at_beta_1_the_aggressive_pair_alone_counts_and_each_is_stopped():
    """β₀ = 1 in a training of many steps: d(q₁, sg q₂) + d(q₂, sg q₁), with no target."""
    moment = Moment(steps=10**9)
    method = a_method("rsa", "none", beta0=1.0)
    twin = copy.deepcopy(method)
    views = four_views()
    loss = loss_of(method, views, moment)
    p1, p2 = (twin.embed(v).p for v in views[:2])
    expected = sum(2 + 2 * reference.negative_cosine(p, q) for p, q in ((p1, p2), (p2, p1)))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for p, q in zip(method.network.parameters(), twin.network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


def test_a_compiled_step_sees_beta_move():
    """β reads `progress`, a tensor: a number would stay what it was when the step was compiled."""
    compiled_beta = torch.compile(lambda progress: beta(0.4, progress, 4), backend="eager")
    values = [compiled_beta(torch.tensor(k / 4)).item() for k in range(4)]
    assert values == pytest.approx([reference.rsa_beta(0.4, s, 4) for s in (1, 2, 3, 4)], abs=1e-7)


def test_the_log_has_both_similarities_and_beta():
    step = a_method("rsa", "none").step(four_views(), {}, MOMENT)
    assert step.parts["beta"].item() == pytest.approx(reference.rsa_beta(0.4, 3, 8))
    p1, p2 = (a_method("rsa", "none").embed(v).p for v in four_views()[:2])
    cosine = (p1 * p2).sum(1).mean()
    torch.testing.assert_close(step.parts["aggressive_aggressive"], cosine.detach())


def test_the_distance_of_equal_and_opposite_rows():
    z = torch.eye(3)
    assert distance(z, z) == 0 and distance(z, -z) == 4


# Batch, epochs, rate, decay, optimiser, schedule, β₀, D, size, stem, side of the images that are
# cropped (spec §3.3, §4.5).
PUBLISHED = {
    "rsa-cifar10": (256, 200, 0.1, 5e-4, "sgd", "cosine", 0.4, 128, 32, "cifar", None),
    "rsa-cifar100": (256, 200, 0.1, 5e-4, "sgd", "cosine", 0.3, 128, 32, "cifar", None),
    "rsa-stl10": (256, 200, 0.1, 5e-4, "sgd", "cosine", 0.4, 128, 64, "cifar", 96),
    "rsa-imagenet100": (
        256, 200, 0.2, 1e-4, "sgd", "cosine_by_step", 0.4, 256, 224, "imagenet", 256
    ),
    "rsa-imagenet": (
        2048, 200, 4.8, 1e-6, "lars", "cosine_by_step", 0.4, 256, 224, "imagenet", 256
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_recipes_are_as_specified(preset):
    data = {"dataset": "imagenet"} if "imagenet" in preset else {}
    config = SSLConfig(preset=preset, **data)
    names = ("batch_size", "epochs", "learning_rate", "weight_decay", "optimizer", "schedule")
    names += ("beta0", "projection_dim", "size", "stem", "source_size")
    values = tuple(getattr(config, name) for name in names)
    assert values == PUBLISHED[preset]
    assert (config.method, config.augmentation, config.momentum) == ("rsa", "rsa", 0.99)
    assert config.warmup == (10 if preset == "rsa-imagenet" else 0)
    assert config.backbone == ("resnet50" if config.size == 224 else "resnet18")
    assert config.classes == ("imagenet100.txt" if preset == "rsa-imagenet100" else "")
    if preset == "rsa-stl10":
        assert (config.dataset, config.split) == ("stl10-all", "trainval")
        assert config.mean == (0.4408, 0.4279, 0.3867) and config.std == (0.2682, 0.2610, 0.2686)
    # True division: the published lr = base · (B // 256) is 0 below 256.
    half_config = config.replace(batch_size=128, learning_rate=None)
    assert half_config.learning_rate == pytest.approx(
        config.learning_rate * 128 / config.batch_size
    )


@pytest.mark.parametrize("values", [{}, {"rsa_views": "aggressive"}], ids=["rsa", "byol"])
@pytest.mark.parametrize("stem", ["cifar", "mini", "imagenet"])
def test_initial_weights_are_torchvision_s(stem, values):
    """He et al.'s fan-out normal, the last BatchNorm of a block at 0, and a stem that replaces
    torchvision's by a Conv2d's default, U(±1/√fan_in) (spec §3.2)."""
    config = SSLConfig(preset="rsa-cifar10", stem=stem, backbone="resnet18", width=32, **values)
    method = build_method(config, About(recipe("rsa", 32, MEAN, STD)))
    backbone = method.network.backbone
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            weight, kernel = module.weight, module.kernel_size[0] ** 2
            spread = math.sqrt(2 / (module.out_channels * kernel))
            if name == "conv1" and stem != "imagenet":
                spread = 1 / math.sqrt(3 * 3 * kernel)
                assert 0.9 * math.sqrt(3) * spread < weight.abs().max() <= math.sqrt(3) * spread
            assert weight.std().item() == pytest.approx(spread, rel=0.1), name
    assert not any(block.bn2.weight.any() for block in (*backbone.layer1, *backbone.layer4))
    twins = zip(method.target.parameters(), method.network.parameters(), strict=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in twins)


def test_lars_spares_vectors_alone():
    """Biases and norms have neither decay nor a scaled step (spec §3.3)."""
    config = a_config("rsa", "none", optimizer="lars", weight_decay=0.3)
    method = a_method("rsa", "none", n=B)
    optimizer = fit_of(method, config).optimizer
    assert isinstance(optimizer, LARS)
    ids = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            vector = p.ndim == 1
            assert (group["weight_decay"], group["adapt"]) == (
                (0, False) if vector else (0.3, True)
            )
            ids.add(id(p))
    assert ids == {id(p) for p in method.network.parameters()}


def test_bad_values_are_refused():
    for values, words in (
        (dict(beta0=1.5), "beta0 must be less than or equal to 1, and is 1.5"),
        (dict(beta0=-0.1), "beta0 must be greater than or equal to 0, and is -0.1"),
        (dict(rsa_views="three"), "rsa_views must be"),
        (dict(augmentation="none"), "augmentation='none' draws no aggressive view"),
        (dict(augmentation="none", rsa_views="aggressive"), "augmentation='none' draws no"),
    ):
        with pytest.raises(ConfigError, match=words):
            a_method("rsa", **values)
