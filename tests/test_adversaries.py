"""Adversaries against the published order of work, closed forms and invariances."""

import copy
import math

import pytest
import reference
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from idaa_lib.adversaries import CLAE, IDAA, AttackError, RandomSign, ascent
from idaa_lib.configs import ConfigError
from idaa_lib.nets import build_backbone
from idaa_lib.nets.vae import VAE
from idaa_lib.views import keyed_generator

B, SIZE, DIM = 6, 16, 8
TEMPERATURE = 0.5
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Seeds are fixed, so a test passes always or never; a correct sampler fails one time in 1,000.
P_VALUE = 1e-3


class Network(nn.Module):
    """A small encoder with two sets of norms: images (B, 3, H, W) → z (B, 8), L2-normalised."""

    def __init__(self):
        super().__init__()
        self.backbone = build_backbone("resnet18", width=4, stem="cifar", adversarial_norms=True)
        self.projector = nn.Linear(32, 8)

    def forward(self, x, adversarial=False):
        return F.normalize(self.projector(self.backbone(x, adversarial=adversarial)), dim=1)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return Network().double().train()


@pytest.fixture
def vae():
    """In train mode, with statistics from noise images."""
    torch.manual_seed(2)
    vae = VAE(DIM, SIZE, width=4).double().train()
    for part in vae.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        vae(torch.randn(16, 3, SIZE, SIZE, dtype=torch.float64))
    return vae


@pytest.fixture
def x():
    return torch.randn(B, 3, SIZE, SIZE, dtype=torch.float64, generator=keyed_generator(3))


@pytest.fixture
def make(vae):
    def make(kind, epsilon, **options):
        options = {k: v for k, v in options.items() if k in kind.Options.model_fields}
        return (
            CLAE(epsilon=epsilon, **options)
            if kind is CLAE
            else kind(vae, epsilon=epsilon, **options)
        )

    return make


def of_samples(x):
    """A loss that is a sum over the samples, so that a batch can be split."""
    weight = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return (x * weight).sin().sum()


def contrastive(network, anchor):
    z = network(anchor, adversarial=True).detach()
    return lambda x: reference.nt_xent(z, network(x, adversarial=True), TEMPERATURE)


def lengths(delta, norm):
    return delta.flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)


def zeta(vae, x):
    with torch.no_grad():
        return copy.deepcopy(vae).eval().encode(x)[0]


KINDS = pytest.mark.parametrize("kind", [IDAA, CLAE, RandomSign])
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


# --- the published order of work


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_idaa_agrees_with_the_published_order_of_work(network, vae, x, epsilon):
    twins = copy.deepcopy(network), copy.deepcopy(vae)
    oracle = reference.idaa(*twins, x, epsilon, TEMPERATURE)
    attack = IDAA(vae, epsilon=epsilon)(x, contrastive(network, x))
    torch.testing.assert_close(attack.images, oracle, rtol=0, atol=1e-10)
    leaf = zeta(vae, x).requires_grad_()
    G = twins[1].decode(leaf)
    contrastive(twins[0], x)(x - G.detach() + G).backward()
    assert torch.equal(attack.delta.sign(), leaf.grad.sign())
    assert (attack.images - x).abs().max() > 1e-3  # so that agreement means something


@pytest.mark.parametrize("epsilon", [0.03, 0.5])
def test_clae_agrees_with_the_published_order_of_work(network, x, epsilon):
    oracle = reference.clae(copy.deepcopy(network), x, epsilon, TEMPERATURE)
    attack = CLAE(epsilon=epsilon)(x, contrastive(network, x))
    assert torch.equal(attack.images, oracle)
    assert attack.z is None and attack.reconstruction is None


@pytest.mark.parametrize("kind", [IDAA, RandomSign])
def test_idaa_and_its_control_change_the_reconstruction_alone(make, vae, x, kind):
    attack = make(kind, 0.7)(x, of_samples)
    twin = copy.deepcopy(vae).eval()
    with torch.no_grad():
        G = twin.decode(zeta(vae, x))
        torch.testing.assert_close(attack.reconstruction, G)
        torch.testing.assert_close(attack.z, zeta(vae, x) + attack.delta)
        torch.testing.assert_close(attack.images - x, twin.decode(attack.z) - G)


def test_attack_of_several_steps_agrees_with_a_loop(make, x):
    epsilon, steps = 0.2, 4
    delta = torch.zeros_like(x)
    for _ in range(steps):
        leaf = (x + delta).requires_grad_()
        of_samples(leaf).backward()
        delta = (delta + 2.5 * epsilon / steps * leaf.grad.sign()).clamp(-epsilon, epsilon)
    attack = CLAE(epsilon=epsilon, steps=steps)(x, of_samples)
    torch.testing.assert_close(attack.delta, delta)


@NORMS
@pytest.mark.parametrize("kind", [IDAA, CLAE])
def test_attack_raises_the_loss_more_than_random_signs(make, network, x, kind, norm):
    network.eval()
    loss = contrastive(network, torch.randn_like(x))
    epsilon = (0.02 if kind is IDAA else 0.002) * (1 if norm == "linf" else 3)
    attack = make(kind, epsilon, norm=norm)(x, loss)
    with torch.no_grad():
        gain = loss(attack.images) - loss(x)
        for seed in range(10):
            delta = torch.randn(attack.delta.shape, generator=keyed_generator(seed)).sign()
            delta = delta * lengths(attack.delta, norm).mean() / lengths(delta, norm).mean()
            adversary = make(kind, epsilon, norm=norm)
            images = adversary.render(adversary.anchor(x), delta)
            assert gain > 1.5 * (loss(images) - loss(x)).abs()


# --- the ball


@KINDS
@NORMS
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("random_start", [False, True])
def test_zero_epsilon_gives_back_x(make, x, kind, norm, steps, random_start):
    adversary = make(kind, 0.0, norm=norm, steps=steps, random_start=random_start)
    attack = adversary(x, of_samples)
    torch.testing.assert_close(attack.images, x, rtol=0, atol=1e-10)
    assert not attack.delta.any()


def test_zero_epsilon_gives_back_x_in_single_precision(vae, x):
    attack = IDAA(vae.float(), epsilon=0.0)(x.float(), of_samples)
    torch.testing.assert_close(attack.images, x.float(), rtol=0, atol=1e-5)


@KINDS
@NORMS
@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"step_size": 100.0}, {"step_size": 1e-3}])
@pytest.mark.parametrize("random_start", [False, True])
def test_perturbation_stays_in_the_ball(make, x, kind, norm, options, random_start):
    epsilon = 0.3
    adversary = make(kind, epsilon, norm=norm, random_start=random_start, **options)
    delta = adversary(x, of_samples).delta
    assert (lengths(delta, norm) <= epsilon * (1 + 1e-12)).all()
    assert delta.any()


@KINDS
@NORMS
def test_one_step_goes_all_the_way(make, vae, x, kind, norm):
    attack = make(kind, 0.3, norm=norm)(x, of_samples)
    torch.testing.assert_close(lengths(attack.delta, norm), x.new_full((B,), 0.3))
    if norm == "linf":
        torch.testing.assert_close(attack.delta.abs(), torch.full_like(attack.delta, 0.3))
    if kind is not CLAE:
        torch.testing.assert_close(attack.z - zeta(vae, x), attack.delta)


@KINDS
@NORMS
def test_direction_has_norm_one(make, x, kind, norm):
    unit = make(kind, 0.3, norm=norm).direction(x, of_samples).unit
    torch.testing.assert_close(lengths(unit, norm), x.new_ones(B))


@pytest.mark.parametrize("kind", [IDAA, CLAE])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_l2_direction_does_not_depend_on_the_loss_s_scale(make, vae, x, kind, scale):
    vae.float()
    adversary = make(kind, 0.3, norm="l2")
    unit = adversary.direction(x.float(), of_samples).unit
    scaled_unit = adversary.direction(x.float(), lambda x: scale * of_samples(x)).unit
    torch.testing.assert_close(scaled_unit, unit, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [IDAA, CLAE])
@NORMS
def test_zero_gradient_moves_nothing(make, x, kind, norm):
    attack = make(kind, 0.3, norm=norm)(x, lambda x: (0 * x).sum())
    assert not attack.delta.any()


@KINDS
@NORMS
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3, 2.0])
def test_one_direction_serves_every_epsilon(make, x, kind, norm, epsilon):
    adversary = make(kind, 0.3, norm=norm)
    direction = adversary.direction(x, of_samples, generator=keyed_generator(7))
    attack = adversary.apply(direction, epsilon)
    expected = make(kind, epsilon, norm=norm)(x, of_samples, generator=keyed_generator(7))
    torch.testing.assert_close(attack.images, expected.images)
    torch.testing.assert_close(attack.delta, expected.delta)
    if kind is not CLAE:
        torch.testing.assert_close(attack.z, expected.z)
        torch.testing.assert_close(attack.reconstruction, expected.reconstruction)


def starts(norm, n, epsilon=0.4):
    """Random starts δ (n, 3) of CLAE on images of one pixel, as the loss sees them."""
    batches = []

    def spy(x):
        batches.append(x.detach().flatten(1))
        return x.sum()

    adversary = CLAE(epsilon=epsilon, norm=norm, random_start=True)
    adversary(torch.zeros(n, 3, 1, 1, dtype=torch.float64), spy, generator=keyed_generator(5))
    return batches[0] / epsilon


def test_random_start_is_uniform_in_the_l2_ball():
    start = starts("l2", 4000)
    radius = start.norm(dim=1)
    assert stats.kstest(radius**3, "uniform").pvalue > P_VALUE
    for axis in (start / radius[:, None]).T:  # Archimedes: uniform on [−1, 1]
        assert stats.kstest((axis + 1) / 2, "uniform").pvalue > P_VALUE


def test_random_start_is_uniform_in_the_linf_ball():
    start = starts("linf", 4000)
    for axis in start.T:
        assert stats.kstest((axis + 1) / 2, "uniform").pvalue > P_VALUE
    assert torch.corrcoef(start.T).sub(torch.eye(3)).abs().max() < 0.06


# --- what is left alone


@KINDS
@pytest.mark.parametrize("options", [{}, {"steps": 2, "norm": "l2", "random_start": True}])
def test_networks_are_left_as_they_were(make, network, vae, x, kind, options):
    vae.encoder[0].eval()
    vae.fc11.weight.grad = torch.ones_like(vae.fc11.weight)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    modes = [part.training for part in vae.modules()]
    attack = make(kind, 0.3, **options)(x, contrastive(network, x))
    for key, tensor in vae.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert [part.training for part in vae.modules()] == modes
    assert torch.equal(vae.fc11.weight.grad, torch.ones_like(vae.fc11.weight))
    vae.fc11.weight.grad = None
    for p in [*network.parameters(), *vae.parameters()]:
        assert p.grad is None and p.requires_grad
    for tensor in (attack.images, attack.delta, attack.z, attack.reconstruction):
        assert tensor is None or not tensor.requires_grad


@KINDS
def test_images_with_a_graph_stay_out_of_it(make, x, kind):
    leaf = x.clone().requires_grad_()
    attack = make(kind, 0.3)(leaf, of_samples)
    assert not attack.images.requires_grad
    assert leaf.grad is None
    assert torch.equal(leaf, x)


def test_attack_works_inside_no_grad(make, x):
    with torch.no_grad():
        attack = make(IDAA, 0.3)(x, of_samples)
    torch.testing.assert_close(attack.images, make(IDAA, 0.3)(x, of_samples).images)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True]),
        ({"steps": 3}, [True, False, False]),
        ({"steps": 2, "random_start": True}, [False, False]),
    ],
)
def test_loss_is_told_when_it_sees_x_itself(make, x, options, expected):
    flags = []

    def loss(images, at_start=False):
        flags.append(at_start)
        assert torch.allclose(images, x, rtol=0, atol=1e-10) == at_start
        return of_samples(images)

    make(IDAA, 0.3, **options)(x, loss)
    assert flags == expected


# --- normalisations


def test_idaa_converts_between_normalisations(vae, x):
    (vae.mean, vae.std), (mean, std) = CIFAR, IMAGENET
    channel = [torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (*CIFAR, *IMAGENET)]

    def to_vae(u):
        return (u * channel[3] + channel[2] - channel[0]) / channel[1]

    def to_data(u):
        return (u * channel[1] + channel[0] - channel[2]) / channel[3]

    attack = IDAA(vae, epsilon=0.5, mean=mean, std=std)(x, of_samples)
    by_hand = IDAA(vae, epsilon=0.5)(to_vae(x), lambda u: of_samples(to_data(u)))
    assert torch.equal(attack.delta, by_hand.delta)
    torch.testing.assert_close(attack.images, to_data(by_hand.images), rtol=0, atol=1e-5)
    G = to_data(by_hand.reconstruction)
    torch.testing.assert_close(attack.reconstruction, G, rtol=0, atol=1e-5)
    default = IDAA(vae, epsilon=0.5)(x, of_samples)
    assert (default.images - attack.images).abs().max() > 1e-3
    repeat = IDAA(vae, epsilon=0.5, mean=CIFAR[0], std=CIFAR[1])(x, of_samples)
    assert torch.equal(repeat.images, default.images)


# --- random signs


def refuse(x):
    raise AssertionError("RandomSign looked at the loss")


@NORMS
def test_random_signs_are_balanced_and_follow_their_generator(make, x, norm):
    adversary = make(RandomSign, 0.3, norm=norm)
    images = x[:1].expand(2000, -1, -1, -1)
    delta = adversary(images, refuse, generator=keyed_generator(1)).delta
    repeat = adversary(images, refuse, generator=keyed_generator(1)).delta
    delta2 = adversary(images, refuse, generator=keyed_generator(2)).delta
    assert torch.equal(delta, repeat)
    assert not torch.equal(delta, delta2)
    size = 0.3 if norm == "linf" else 0.3 / DIM**0.5
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, size))
    positive = int((delta > 0).sum())
    assert stats.binomtest(positive, delta.numel()).pvalue > P_VALUE
    assert torch.corrcoef(delta.T).sub(torch.eye(DIM)).abs().max() < 0.1


@KINDS
@NORMS
@pytest.mark.parametrize("steps", [1, 3])
def test_two_ranks_draw_what_one_process_draws(make, x, kind, norm, steps):
    adversary = make(kind, 0.3, norm=norm, steps=steps, step_size=0.1, random_start=True)
    numbers = adversary.numbers(x.shape, keyed_generator(4))
    attack = adversary(x, of_samples, numbers=numbers)
    parts = [
        adversary(part, of_samples, numbers={k: v.chunk(2)[rank] for k, v in numbers.items()})
        for rank, part in enumerate(x.chunk(2))
    ]
    torch.testing.assert_close(torch.cat([part.delta for part in parts]), attack.delta)
    torch.testing.assert_close(torch.cat([part.images for part in parts]), attack.images)
    assert not torch.allclose(parts[0].delta, parts[1].delta)


# --- errors


def break_layer(vae, layer):
    twin = copy.deepcopy(vae)
    getattr(twin, layer).weight.data.fill_(math.nan)
    return twin


NOT_FINITE = f"The attack's gradient is not finite for {B} of {B} images: "


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        ("fc11", "the VAE's encoder gives latents that are not finite (a broken VAE)."),
        ("fc21", "the VAE's decoder gives images that are not finite (a broken VAE)."),
    ],
)
def test_broken_vae_is_named(vae, x, layer, cause):
    with pytest.raises(AttackError) as error:
        IDAA(break_layer(vae, layer), epsilon=0.1)(x, of_samples)
    assert str(error.value) == NOT_FINITE + cause


@pytest.mark.parametrize("kind", [IDAA, CLAE])
@NORMS
@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda x: math.nan * x.sum(), "the attack loss is nan (the encoder diverged, or τ is"),
        (lambda x: math.inf * x.square().sum(), "the attack loss is inf (the encoder diverged"),
        (lambda x: 2.5 + (x - x.detach()).sqrt().sum(), "the loss is 2.5, but its derivative"),
    ],
)
def test_loss_that_is_not_finite_is_named(make, x, kind, norm, loss, cause):
    with pytest.raises(AttackError) as error:
        make(kind, 0.1, norm=norm)(x, loss)
    assert str(error.value).startswith(NOT_FINITE + cause)


@pytest.mark.parametrize("kind", [IDAA, CLAE])
def test_a_device_that_would_be_waited_for_is_asked_when_checked(make, x, kind, monkeypatch):
    monkeypatch.setattr(ascent, "waits", lambda device: True)
    adversary = make(kind, 0.1)
    adversary.check()  # nothing yet
    assert adversary(x, of_samples).images.isfinite().all()
    attack = adversary(x, lambda x: math.nan * x.sum())
    assert attack.images.isnan().all()  # so the loss tells it
    adversary(x, of_samples)  # a good one after it does not hide it
    with pytest.raises(AttackError, match="gradient was not finite since the last line"):
        adversary.check()
    adversary.check()  # told once
    with pytest.raises(AttackError):  # one that a person waits for is told at once
        adversary.direction(x, lambda x: math.nan * x.sum())


def test_an_attack_of_k_steps_decodes_k_plus_one_times(vae, x):
    for steps in (1, 3):
        calls = []
        hook = vae.fc21.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        IDAA(vae, epsilon=0.1, steps=steps)(x, of_samples)
        hook.remove()
        assert len(calls) == steps + 1  # G(x) is the first one's


@pytest.mark.parametrize("kind", [IDAA, CLAE])
def test_images_that_are_not_finite_are_named(make, x, kind):
    x[2, 1, 5, 5] = math.nan
    with pytest.raises(AttackError) as error:
        make(kind, 0.1)(x, of_samples)
    count = f"for 1 of {B} images: the images themselves are not finite."
    assert str(error.value) == f"The attack's gradient is not finite {count}"


@pytest.mark.parametrize("kind", [IDAA, CLAE, RandomSign])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": -0.1}, "epsilon must be greater than or equal to 0, and is -0.1."),
        ({"epsilon": math.nan}, "epsilon must be a finite number, and is nan."),
        ({"epsilon": math.inf}, "epsilon must be a finite number, and is inf."),
        ({"steps": 0}, "steps must be greater than 0, and is 0."),
        ({"step_size": 0.0}, "step_size must be greater than 0, and is 0.0."),
        ({"step_size": -1.0}, "step_size must be greater than 0, and is -1.0."),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', and is 'l1'."),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(vae, kind, options, sentence):
    if not options.keys() <= kind.Options.model_fields.keys():
        (name,) = options
        names = "alpha, epsilon, norm, vae, dim"
        sentence = f"RandomSign has no knob {name!r}; its knobs are {names}."
    values = {"epsilon": 0.1} | options
    with pytest.raises(ConfigError) as error:
        CLAE(**values) if kind is CLAE else kind(vae, **values)
    assert str(error.value) == sentence


def test_under_bf16_autocast_delta_keeps_to_epsilon():
    """bf16 would round ε = .1 to .10009765625, and μ + δ by up to 4e-3."""
    vae = VAE(8, 16, 4).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        attack = IDAA(vae, epsilon=0.1)(x, lambda x_adv: x_adv.float().square().sum())
    assert attack.delta.dtype == attack.z.dtype == attack.images.dtype == torch.float32
    assert attack.delta.abs().max() <= 0.1


def test_under_bf16_autocast_the_image_is_not_rounded_to_bf16():
    """x′ − x is a difference of two G, whose own rounding would be as large as a small one."""
    vae, x = VAE(8, 16, 4).eval(), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        G = IDAA(vae, epsilon=0.1).anchor(x).reconstruction
        assert vae.fc21(torch.zeros(1, 8)).dtype == torch.bfloat16
    assert (G.bfloat16() == G).float().mean() < 0.1
