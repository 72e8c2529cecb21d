"""CASSLE and AugSelf: descriptors and targets of hand-made parameters, the projectors by their
formulas, recipes against docs/spec/siblings.md §1, what is refused. Losses and gradients of whole
steps are in test_methods.py."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from reference import barlow
from torch.nn import functional as F

from idaa_lib.configs import ConfigError, EvalConfig, SSLConfig
from idaa_lib.evaluate import stage
from idaa_lib.methods import About, Moment, build_method
from idaa_lib.methods.augself import differences
from idaa_lib.methods.barlow import redundancy
from idaa_lib.methods.cassle import NEUTRAL, describe
from idaa_lib.nets.heads import Hypernetwork
from idaa_lib.runs import parameters
from idaa_lib.views import View, keyed_generator, recipe

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CASSLE = recipe("cassle", 16, MEAN, STD)
README = "crop, color, color_diff, blur, grayscale"
SMALL = dict(size=16, width=4, batch_size=4, augmentation="cassle", projection_dim=8)


def a_view(**values):
    """Parameters of one view of a source of 40 × 80 pixels, 10 × 40 of it from (20, 30)."""
    params = dict(
        source=[40.0, 80.0], crop=[20.0, 30.0, 10.0, 40.0], flip=[0.0], color=[1.0, 1.0, 1.0, 0.0],
        order=[0, 1, 2, 3], color_diff=[0.0, 0.0, 0.0], gray=[0.0], blur=[0.0],
    )  # fmt: skip
    return {name: torch.tensor([value]) for name, value in (params | values).items()}


def a_method(**values):
    config = SSLConfig(**SMALL | values)
    views = recipe(config.augmentation, 16, MEAN, STD)
    about = About(views, torch.zeros(8), batch_size=config.batch_size, seed=config.seed)
    return build_method(config, about).double()


def draw_views(n=4):
    images = torch.randint(0, 256, (n, 3, 16, 16), generator=keyed_generator(1)).to(torch.uint8)
    views = [CASSLE(images, keyed_generator(seed)) for seed in (2, 3)]
    params = [
        {k: v.double() if v.is_floating_point() else v for k, v in p.items()} for _, p in views
    ]
    return tuple(View(view.images.double(), p) for view, p in zip(views, params, strict=True))


# --- the descriptor


def test_the_descriptor_of_hand_made_parameters():
    keys = ["grayscale", "flip", "crop", "color_diff", "color", "blur"]
    values = dict(color=[1.4, 0.6, 1.0, 0.05], color_diff=[0.1, 0.0, -0.2], blur=[1.5], gray=[1.0])
    omega = describe(a_view(**values), keys, CASSLE)
    expected = [1.5, 0.5, -0.5, 0, 0.25, 0.1, 0, -0.2, 0.625, 0.625, 0.25, 0.5, 0, 1]
    torch.testing.assert_close(omega, torch.tensor([expected]))
    mirror = describe(a_view(**values, flip=[1.0]), keys, CASSLE)
    expected[9], expected[12] = 1 - 0.625, 1  # x of the centre, and the flip
    torch.testing.assert_close(mirror, torch.tensor([expected]))
    order = describe(a_view(**values), ["blur", "crop"], CASSLE)  # alphabetical, whatever is given
    assert torch.equal(order, describe(a_view(**values), ["crop", "blur"], CASSLE))


def test_colour_is_divided_by_the_recipe_s_own_ranges():
    for name, values in (("cassle", (0.8, 0.8, 0.8, 0.2)), ("simclr", (1.6, 1.6, 1.6, 0.4))):
        views = recipe(name, 16, MEAN, STD)
        omega = describe(a_view(color=[1.2, 0.8, 1.1, -0.05]), ["color"], views)
        steps = torch.tensor([0.2, -0.2, 0.1, -0.05])
        torch.testing.assert_close(omega[0], steps / torch.tensor(values))
        numbers = views.numbers(200, keyed_generator(4))
        color = describe(
            views.parameters(numbers, (16, 16)) | {"color_diff": None}, ["color"], views
        )
        assert color.abs().max() <= 0.5 and color.abs().amax(0).min() > 0.45


def test_the_neutral_condition_is_that_of_a_view_without_augmentation():
    view = a_view(crop=[0.0, 0.0, 40.0, 80.0])
    for key, values in NEUTRAL.items():
        assert describe(view, [key], CASSLE).tolist() == [list(values)]


def test_readme_s_condition_has_13_values_and_14_with_flip():
    view = draw_views()[0]
    keys = SSLConfig(method="moco", augmentation="cassle", condition=README).condition
    assert describe(view.params, keys, CASSLE).shape == (4, 13)
    assert describe(view.params, [*keys, "flip"], CASSLE).shape == (4, 14)


# --- AugSelf's targets


def test_identical_views_differ_by_nothing():
    params = draw_views()[0].params
    for name, value in differences(params, params, CASSLE).items():
        assert torch.equal(value, torch.full_like(value, float(name == "flip"))), name


def test_a_flip_of_the_first_view_mirrors_the_target_and_one_of_the_second_does_not():
    a, b = a_view(), a_view(crop=[0.0, 10.0, 20.0, 30.0], blur=[0.5])
    targets = differences(a, b, CASSLE)
    expected = torch.tensor([[0.625 - 0.25, 0.625 - 25 / 80, 0.25 - 0.5, 0.5 - 0.375]])
    torch.testing.assert_close(targets["crop"], expected)
    mirror_a = a | {"flip": torch.ones(1, 1)}
    mirror_crop = differences(mirror_a, b, CASSLE)["crop"]
    torch.testing.assert_close(mirror_crop, expected * torch.tensor([1, -1, 1, 1]))
    mirror_b = b | {"flip": torch.ones(1, 1)}
    assert torch.equal(differences(a, mirror_b, CASSLE)["crop"], targets["crop"])
    flips = [differences(*pair, CASSLE)["flip"].item() for pair in ((a, b), (mirror_a, b))]
    assert flips == [1, 0]
    # So the target of (b, a) is minus that of (a, b) where the flips agree, and not elsewhere.
    reverse = differences(b, a, CASSLE)
    for name in ("crop", "color", "blur"):
        torch.testing.assert_close(reverse[name], -targets[name])
    assert not torch.equal(differences(b, mirror_a, CASSLE)["crop"], -mirror_crop)


# --- projectors


@pytest.mark.parametrize("method", ["simclr", "moco", "byol", "simsiam", "barlow"])
@pytest.mark.parametrize("injection", ["concatenate", "add", "multiply"])
def test_a_conditioned_projector_is_its_formula(method, injection):
    learner = a_method(method=method, condition=README, injection=injection).eval()
    view, projector = draw_views()[0], learner.network.projector
    h = learner.network.backbone(view.images)
    gamma = projector.gamma(describe(view.params, learner.options.condition, CASSLE))
    join = {
        "concatenate": lambda: torch.cat([h, gamma], 1),
        "add": lambda: h + gamma,
        "multiply": lambda: h * gamma,
    }
    z = projector.head(join[injection]())
    expected = z if method == "barlow" else F.normalize(z, dim=1)
    torch.testing.assert_close(learner.embed(view).z, expected)
    linear = [layer for layer in projector.gamma if isinstance(layer, torch.nn.Linear)]
    sides = [
        13,
        *[64] * 5,
        64 if injection == "concatenate" else learner.network.backbone.feature_dim,
    ]
    assert [tuple(layer.weight.shape) for layer in linear] == [
        (outputs, inputs) for inputs, outputs in itertools.pairwise(sides)
    ]
    assert all(layer.bias is None for layer in linear)
    assert isinstance(projector.gamma[-1], torch.nn.BatchNorm1d)  # without a ReLU after it


def test_raw_gives_the_parameters_themselves():
    learner = a_method(method="simclr", condition="crop", gamma="raw").eval()
    view = draw_views()[0]
    h, omega = learner.network.backbone(view.images), describe(view.params, ["crop"], CASSLE)
    z = learner.network.projector.head(torch.cat([h, omega], 1))
    torch.testing.assert_close(learner.embed(view).z, F.normalize(z, dim=1))


def test_a_hypernetwork_s_weights_are_row_by_row_those_it_emits():
    learner = a_method(method="simclr", condition=README, injection="hypernetwork").eval()
    view, projector = draw_views()[0], learner.network.projector
    h = learner.network.backbone(view.images)
    emissions = projector.gamma(describe(view.params, learner.options.condition, CASSLE))
    c = h.shape[1]
    assert isinstance(projector, Hypernetwork)
    assert emissions.shape[1] == c * c + c + c * 8 + 8 == Hypernetwork.count([c, c, 8])
    rows = []
    for x, weights in zip(h, emissions, strict=True):
        w1, b1, w2, b2 = weights.split([c * c, c, c * 8, 8])
        rows.append((x @ w1.view(c, c) + b1).relu() @ w2.view(c, 8) + b2)
    torch.testing.assert_close(learner.embed(view).z, F.normalize(torch.stack(rows), dim=1))


@pytest.mark.parametrize("injection", ["concatenate", "multiply", "hypernetwork"])
def test_the_layer_projector_is_z_at_the_neutral_condition(injection):
    learner = a_method(method="simclr", condition=README, injection=injection).eval()
    view = draw_views()[0]
    values = [v for key in learner.options.condition for v in NEUTRAL[key]]
    condition = torch.tensor([values], dtype=torch.float64).expand(4, -1)
    expected = learner.network(view.images, condition).z
    torch.testing.assert_close(learner.encoder("projector")(view.images), expected)
    assert not torch.allclose(learner.embed(view).z, expected)


@pytest.mark.parametrize("condition", ["crop, color", ""])
def test_a_protocol_says_that_z_is_of_the_neutral_condition(condition):
    config = SSLConfig(condition=condition)
    judgement = SimpleNamespace(
        way=config.get_chosen("method").official_protocol(config), epochs=[], side=32, classes=10,
        source=SimpleNamespace(config=config, environment={}), config=EvalConfig(run="a"),
        splits={"train": range(90), "val": range(10)},
    )  # fmt: skip
    texts = {
        layer: stage._Evaluation.protocol(judgement, "encoder", "knn", layer)
        for layer in ("backbone", "projector")
    }
    assert ("projected z at the neutral condition" in texts["projector"]) == bool(condition)
    assert "neutral" not in texts["backbone"]


@pytest.mark.parametrize("method", ["simclr", "moco", "byol", "simsiam", "barlow"])
def test_a_baseline_with_augself_s_heads_has_the_projector_and_nothing_else(method):
    """Weights and losses of the method alone: no γ, no head of a pair, nothing of the views."""
    base, variant = (
        a_method(method=method, heads="augself", condition=keys) for keys in ("", README)
    )
    names = [name for name, _ in base.network.named_parameters()]
    assert not any("gamma" in name or "differences" in name for name in names)
    shapes = {name: p.shape for name, p in variant.network.named_parameters()}
    for name, p in base.network.named_parameters():
        shape = shapes[name.replace("projector.", "projector.head.")]
        wide_shape = torch.Size([p.shape[0], p.shape[1] + 64]) if p.ndim == 2 else None
        assert shape in (p.shape, wide_shape), name
    views = draw_views()
    strangers = tuple(View(view.images, {}) for view in views)
    losses = [base.step(v, {"images": torch.arange(4)}, Moment()).loss for v in (views, strangers)]
    torch.testing.assert_close(*losses)


def test_heads_follow_a_condition_unless_they_are_given():
    make = lambda **knobs: SSLConfig(method="byol", augmentation="cassle", **knobs)  # noqa: E731
    assert make().heads is None and make(heads="own").identity() == make().identity()
    assert make(condition="crop").heads == make(augself="crop=1").heads == "augself"
    assert make(condition="crop", heads="own").heads == "own"
    assert make(augself="crop=0").identity() == make().identity()  # a head without weight is none
    baseline, variant = (
        a_method(method="byol"),
        a_method(method="byol", condition=README, heads="own"),
    )
    for name, p in baseline.network.predictor.named_parameters():
        assert p.shape == variant.network.predictor.get_parameter(name).shape


@pytest.mark.parametrize("method", ["rsa", "ipirm"])
def test_rsa_and_ip_irm_keep_their_heads_under_a_condition(method):
    baseline, variant = (a_method(method=method, condition=keys).network for keys in ("", README))
    assert str(variant.projector.head[1:]) == str(baseline.projector[1:])  # but for its inputs
    if method == "rsa":
        assert str(variant.predictor) == str(baseline.predictor)


def test_other_conditions_move_the_loss_and_the_target_has_its_own_gamma():
    learner = a_method(method="byol", condition=README)
    assert learner.target.projector.gamma is not learner.network.projector.gamma
    views = draw_views()
    shuffle = (views[0], View(views[1].images, {k: v.flip(0) for k, v in views[1].params.items()}))
    losses = [learner.step(v, {"images": torch.arange(4)}, Moment()).loss for v in (views, shuffle)]
    assert (losses[0] - losses[1]).abs() > 1e-4


@pytest.mark.parametrize("source", ["key", "query"])
def test_the_queue_holds_keys_or_as_the_code_has_it_queries(source):
    learner = a_method(method="moco", queue=8, queue_source=source)
    with torch.no_grad():
        for p in learner.network.parameters():
            p.add_(0.05)
    views = draw_views()
    query = learner.embed(views[0]).z.detach()
    key = learner.target(views[1].images).z
    step = learner.step(views, {"images": torch.arange(4)}, Moment())
    learner.after_step(step, Moment())
    assert not learner.queue.requires_grad
    torch.testing.assert_close(learner.queue[:4], {"key": key, "query": query}[source])


# --- Barlow Twins


def test_redundancy_is_the_sum_over_entries_and_0_where_entries_do_not_correlate():
    z1, z2 = torch.randn(2, 7, 3, dtype=torch.float64, generator=keyed_generator(5))
    torch.testing.assert_close(redundancy(z1, z2, 0.3), barlow(z1, z2, 0.3))
    columns = torch.linalg.qr(z1)[0] * 7**0.5  # columns of length √n at right angles
    assert redundancy(columns, columns, 0.3).abs() < 1e-12


def test_its_head_standardises_each_entry_over_the_batch():
    learner = a_method(method="barlow").train()
    z = learner.embed(draw_views()[0]).z
    torch.testing.assert_close(z.mean(0), torch.zeros(8, dtype=torch.float64))
    assert ((z.square().mean(0) - 1).abs() < 1e-2).all()  # but for the BatchNorm's ε


# --- recipes, against the specification

SPEC = {  # §1.4, §1.6: rate of MoCo and SimSiam, side, backbone, epochs, decay, λ of AugSelf
    "imagenet100": (0.03, 0.05, 224, "resnet50", 500, 1e-4, 0.5),
    "stl10": (0.03, 0.03, 96, "resnet18", 200, 5e-4, 1.0),
}


@pytest.mark.parametrize("data", SPEC)
@pytest.mark.parametrize("system", ["cassle", "augself"])
def test_recipes_are_the_published_ones(system, data):
    moco, simsiam, side, backbone, epochs, decay, weight = SPEC[data]
    make = lambda method, **kw: SSLConfig(  # noqa: E731
        preset=f"{system}-{data}", dataset="stl10", method=method, **kw
    )
    for method in ("moco", "simclr", "byol", "simsiam", "barlow"):
        config = make(method)
        assert (config.size, config.backbone, config.stem) == (side, backbone, "imagenet")
        assert (config.epochs, config.batch_size, config.weight_decay) == (epochs, 256, decay)
        assert (config.optimizer, config.schedule) == ("sgd", "cosine")
        assert config.learning_rate == (simsiam if method == "simsiam" else moco)
        assert config.augmentation == "cassle" and config.heads == "augself"
        assert config.warmup == (10 if method == "barlow" else 0)
        keys = ("blur", "color", "color_diff", "crop", "grayscale") if system == "cassle" else ()
        assert config.condition == keys
        assert config.augself == ({} if keys else {"color": weight, "crop": weight})
        assert make(method, batch_size=512).learning_rate == pytest.approx(2 * config.learning_rate)
    config = make("moco")
    assert (config.temperature, config.queue, config.momentum) == (0.2, 65536, 0.999)
    assert (config.projection_dim, config.gamma_depth, config.gamma_width) == (128, 6, 64)
    assert (make("simclr").temperature, make("simclr").projection_dim) == (0.2, 128)
    assert (make("byol").projection_dim, make("byol").momentum) == (256, 0.996)
    assert (make("barlow").projection_dim, make("barlow").off_diagonal) == (8192, 0.0051)
    assert make("simsiam").pairing == ("imagenet" if data == "imagenet100" else "cifar")
    baseline = make("moco", condition="", augself={})
    assert baseline.heads == "augself" and not baseline.condition and not baseline.augself
    if data == "stl10":
        assert (config.mean, config.std) == ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27))


def test_the_views_are_the_published_ones():
    assert CASSLE.crop_scale == (0.2, 1.0) and CASSLE.flip == CASSLE.blur == 0.5
    assert CASSLE.jitter == (0.4, 0.4, 0.4, 0.1) and CASSLE.jitter_probability == 0.8
    assert (CASSLE.gray, CASSLE.blur_sigma) == (0.2, (0.1, 2.0))
    kernels = {side: recipe("cassle", side, MEAN, STD).blur_kernel for side in (96, 224)}
    assert kernels == {96: 9, 224: 23}


# --- what is one run, and what is refused


def test_the_same_condition_in_other_words_is_the_same_run():
    base = dict(method="moco", augmentation="cassle")
    config = SSLConfig(**base, condition="crop, blur", augself="flip=1/2, crop=0.25")
    for condition, augself in (
        (["blur", "crop"], {"crop": 0.25, "flip": 0.5}),
        ("blur crop", '{"flip": 0.5, "crop": 0.25}'),
        ("('blur', 'crop')", "{'crop': 0.25, 'flip': 0.5}"),  # as Python prints them
    ):
        twin = SSLConfig(**base, condition=condition, augself=augself, heads="augself")
        assert twin.identity() == config.identity()
    names = {"condition", "injection", "gamma", "gamma_depth", "gamma_width", "augself", "heads"}
    assert not names & SSLConfig(**base).identity().keys()


def test_the_command_of_a_run_makes_its_configuration_again():
    values = dict(method="moco", augmentation="cassle", condition=README, augself="crop=0.5")
    config = SSLConfig(**values, queue=256)
    words = dict(part.split("=", 1) for part in (f"{k}={v}" for k, v in parameters(config).items()))
    assert SSLConfig(**words) == config


MISTAKES = [
    (dict(condition="blur", augmentation="normal"), "augmentation='normal' draws no blur"),
    (dict(augself="crop=1", augmentation="none"), "augmentation='none' draws no crop, .* augself"),
    (dict(condition="crop, colour"), "condition must be .*'color'.* and is 'colour'"),
    (dict(condition="crop, flip, crop"), "condition names 'crop' twice"),
    (dict(condition="crop", injection="add", gamma="raw"), "injection='add' with gamma='raw'"),
    (
        dict(condition="crop", injection="hypernetwork", width=64, projection_dim=4096),
        "injection='hypernetwork' would emit 2,363,904 weights",
    ),
    (dict(method="plain", condition="crop"), "condition is a knob of .*, and method is 'plain'"),
    (dict(method="uel", augself="crop=1"), "augself is a knob of .*, and method is 'uel'"),
    (dict(augself="crop=-0.5"), "augself.'crop'. must be greater than or equal to 0, and is -0.5"),
    (dict(augself="rot=1"), "augself.'rot'. must be 'blur', .* or 'flip', and is 'rot'"),
    (dict(augself="crop"), "augself must be pairs of name and value, each name once, as 'crop=0.5"),
    (dict(augself="crop=1, crop=0.5"), "augself must be pairs .* once, .* is 'crop=1, crop=0.5'"),
    (dict(injection="add"), "injection='add' is of a condition, and there is none: name one"),
    (dict(gamma="raw"), "gamma='raw' is of a condition, and there is none: name one"),
    (dict(method="rsa", rsa_views="weak", condition="color"), "rsa_views='weak' draws no color"),
    (
        dict(method="rsa", rsa_views="weak", augmentation="cassle", augself="crop=1, blur=1"),
        "rsa_views='weak' draws no blur, which augself names: leave it out, or take rsa_views=",
    ),
    (
        dict(method="barlow", condition="crop", injection="hypernetwork", width=8),
        "injection='hypernetwork' is not for method='barlow'",
    ),
    (dict(gamma_width=8), "gamma_width=8 is of a condition, and there is none: name one"),
    (dict(gamma_depth=2, augself="crop=1"), "gamma_depth=2 is of a condition, and there is none"),
    (dict(condition="crop", gamma="raw", gamma_width=8), "gamma_width=8 is of an MLP, and gamma="),
    (dict(method="rsa", rsa_views="weak", augmentation="none"), "draws no aggressive view"),
    (dict(method="ipirm", heads="augself"), "heads='augself' is not for this method"),
    (dict(method="ipirm", retain_group=0), "retain_group must be 'all' or 'one' or greater than 0"),
    (dict(method="ipirm", env_num=300, constrain="strict"), "env_num must be less than or equal"),
    (dict(gamma_depth=0), "gamma_depth must be greater than 0"),
    (dict(queue_source="both", method="moco"), "queue_source must be 'key' or 'query'"),
]


@pytest.mark.parametrize(("values", "words"), MISTAKES)
def test_what_makes_no_sense_is_refused_in_a_sentence(values, words):
    with pytest.raises(ConfigError, match=words) as error:
        SSLConfig(**{"method": "simclr"} | values)
    assert str(error.value).count("\n") == 0 and str(error.value).endswith(".")
