"""Networks against the published counts and names, torchvision, and functional oracles."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
import torchvision
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from idaa_lib.configs import VAEConfig
from idaa_lib.methods.base import About, Moment
from idaa_lib.methods.schedules import build_schedule
from idaa_lib.methods.vae import VAETraining, vae_figures
from idaa_lib.nets import BACKBONES, build_backbone, evaluating, initial_weights
from idaa_lib.nets.resnet import convolve, project, zero_residuals
from idaa_lib.nets.vae import VAE, Output, rate, vae_loss
from idaa_lib.views import keyed_generator, recipe

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def backbone(name="resnet18", width=4, stem="cifar", adversarial_norms=True):
    return build_backbone(name, width=width, stem=stem, adversarial_norms=adversarial_norms)


def scramble(module):
    """`module` with affine parameters and statistics of its BatchNorms away from 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (part.bias.data, part.running_mean):
                tensor.normal_(std=0.3)
    return module


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed_names(before, tensors):
    return {name for name, tensor in tensors if not torch.equal(tensor, before[name])}


def modes(module):
    return [part.training for part in module.modules()]


# --- the VAE


@pytest.mark.parametrize(
    ("dim", "size", "count"),
    [(512, 32, 13_519_110), (128, 32, 4_081_158), (512, 84, 20_664_198), (3072, 224, 58_823_526)],
)
def test_vae_parameter_counts(dim, size, count):
    with torch.device("meta"):
        assert parameters(VAE(dim, size)) == count


def names(part, convs, norms, residuals):
    keys = {f"{part}.{i}.weight" for i in convs}
    keys |= {f"{part}.{i}.{leaf}" for i in norms for leaf in NORM}
    keys |= {f"{part}.{i}.convs.{j}.{w}" for i in residuals for j in (1, 4) for w in NORM[:2]}
    return keys | {f"{part}.{i}.convs.2.{leaf}" for i in residuals for leaf in NORM}


@pytest.mark.parametrize(
    ("size", "tensors", "encoder", "decoder"),
    [
        (32, 81, [(0, 3), (1, 4, 7), (6, 8)], [(4, 7), (1, 3, 5), (0, 2)]),
        (
            224,
            127,
            [(0, 3, 6, 9, 12), (1, 4, 7, 10, 13, 16, 18), (15, 17)],
            [(5, 8, 11, 14, 17), (0, 2, 4, 6, 9, 12, 15), (1, 3)],
        ),
    ],
)
def test_vae_state_dict_is_the_release_s(size, tensors, encoder, decoder):
    expected = names("encoder", *encoder) | names("decoder", *decoder)
    expected |= {f"bn.{leaf}" for leaf in NORM}
    expected |= {f"{fc}.{w}" for fc in ("fc11", "fc12", "fc21") for w in NORM[:2]}
    with torch.device("meta"):
        state = VAE(8, size).state_dict()
    assert state.keys() == expected
    assert len(state) == tensors


@pytest.mark.parametrize(
    ("size", "inner"),
    [(16, 4), (32, 8), (48, 12), (60, 15), (64, 8), (84, 10), (96, 12), (128, 16), (224, 7)],
)
def test_vae_shapes(size, inner):
    vae = VAE(5, size, width=8)
    x = torch.randn(2, 3, size, size)
    output = vae(x)
    assert output.G.shape == x.shape
    assert output.z.shape == output.mu.shape == output.logvar.shape == (2, 5)
    assert vae.fc11.in_features == vae.fc21.out_features == 16 * inner**2


def test_a_vae_of_every_size_gives_its_own_shape_back():
    """Where halving meets odd sides too: 21 → 10 at 84 px, up to three times at 220 px."""
    for size in [*range(4, 133, 4), 156, 188, 200, 220, 252, 256]:
        vae = VAE(2, size, width=8).eval()
        with torch.no_grad():
            assert vae(torch.zeros(1, 3, size, size)).G.shape == (1, 3, size, size), size


@pytest.mark.parametrize(
    ("size", "near"), [(0, "4 or more"), (-4, "4 or more"), (30, "28 or 32"), (98, "96 or 100")]
)
def test_vae_of_other_sizes_is_refused(size, near):
    with pytest.raises(ValueError, match=f"multiple of 4 for the VAE, and is {size}: take {near}"):
        VAE(8, size)


def test_vae_too_narrow_for_its_size_is_refused():
    """At 224 px the first layer has width / 8 channels, so width 4 would leave it none."""
    with pytest.raises(ValueError, match="width"):
        VAE(8, 224, width=4)


@pytest.mark.parametrize("training", [False, True])
def test_vae_agrees_with_functional_form(training):
    torch.manual_seed(0)
    vae = scramble(VAE(6, 32, width=4)).double().train(training)
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    G, mu, logvar = reference.cifar_vae(vae.state_dict(), x, training)
    output = vae(x)
    torch.testing.assert_close(output.G, G)
    torch.testing.assert_close(output.mu, mu)
    torch.testing.assert_close(output.logvar, logvar)


@pytest.mark.parametrize("size", [16, 64, 84])
def test_eval_decode_of_mu_is_G_bit_for_bit(size):
    vae = scramble(VAE(6, size, width=4)).eval()
    output = vae(torch.randn(3, 3, size, size))
    assert torch.equal(output.z, output.mu)
    assert torch.equal(vae.decode(output.mu), output.G)


def test_latent_is_reparametrised():
    vae = VAE(6, 16, width=4).double().eval()
    noise = torch.randn(4, 6, dtype=torch.float64)
    output = vae(torch.randn(4, 3, 16, 16, dtype=torch.float64), noise)
    q = Normal(output.mu, output.logvar.exp().sqrt())
    torch.testing.assert_close(q.cdf(output.z), Normal(0.0, 1.0).cdf(noise))
    torch.testing.assert_close(output.G, vae.decode(output.z))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_each_batchnorm_gets_its_gradient_in_the_layout_of_its_input(layout):
    """Else its backward pass takes many times as long on a CPU."""
    vae = VAE(6, 16, width=4).to(memory_format=layout)
    inputs, gradients = {}, {}

    def watch(name, x, y):
        inputs[name] = x.stride()
        y.register_hook(lambda gradient: gradients.update({name: gradient.stride()}))

    for name, module in vae.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, xs, y, name=name: watch(name, xs[0], y))
    x = torch.randn(3, 3, 16, 16)
    vae_loss(x, vae(x, torch.randn(3, 6)), 0.1)[0].backward()
    assert gradients == inputs
    assert inputs["bn"] == x.stride()  # 3 channels are slow in channels_last


def test_channels_last_changes_nothing():
    vae = scramble(VAE(6, 16, width=4)).double().eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    mu = vae(x).mu
    vae.to(memory_format=torch.channels_last)
    torch.testing.assert_close(vae(x.contiguous(memory_format=torch.channels_last)).mu, mu)


def test_decompose_splits_and_leaves_the_vae_alone():
    vae = scramble(VAE(6, 16, width=4)).train()
    vae.bn.eval()
    x = torch.randn(4, 3, 16, 16)
    before, modes_before = clones(vae.state_dict().items()), modes(vae)
    G, R = vae.decompose(x)
    assert not changed_names(before, vae.state_dict().items())
    assert modes(vae) == modes_before
    assert not G.requires_grad and not R.requires_grad
    torch.testing.assert_close(G + R, x)
    assert torch.equal(G, vae.eval()(x).G)


def test_rate_closed_forms():
    torch.manual_seed(0)
    mu, logvar = torch.randn(2, 7, 5, dtype=torch.float64)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(rate(mu, logvar), kl)
    assert torch.equal(rate(torch.zeros(3, 4), torch.zeros(3, 4)), torch.zeros(3))


@pytest.mark.parametrize("kappa", [0.0, 0.1, 10.0])
def test_vae_loss_agrees_with_naive_loop(kappa):
    torch.manual_seed(0)
    x, G = torch.randn(2, 4, 3, 8, 8)
    mu, logvar = torch.randn(2, 4, 5)
    loss, reconstruction, kl = vae_loss(x, Output(mu, G, mu, logvar), kappa)
    assert loss.item() == pytest.approx(reference.vae_loss(x, G, mu, logvar, kappa), rel=1e-5)
    assert reconstruction.item() == pytest.approx(reference.vae_loss(x, G, mu, logvar, 0), rel=1e-5)
    assert kl.item() == pytest.approx(reference.vae_loss(x, x, mu, logvar, 1), rel=1e-5)


def vae_training(**values):
    return VAETraining(
        VAEConfig(size=16, dim=5, width=4, **values), About(recipe("simclr", 16, *IMAGENET))
    )


def test_vae_training_follows_its_schedule_and_loss():
    config = VAEConfig(preset="paper")
    factor = build_schedule(config.schedule, config.epochs, 7)
    factors = [factor(step) for step in (0, 6, 7, 7 * 299, 7 * 300 - 1)]
    assert factors == pytest.approx([1, 1, 299 / 300, 1 / 300, 1 / 300])
    method = vae_training(kappa=0.3)
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    moment = Moment(numbers=method.numbers({"images": 6}, keyed_generator(1)))
    views = method.draw({"images": images}, {}, moment)
    twin = copy.deepcopy(method.network)
    loss = method.step(views, {}, moment).loss
    x, noise = views[0].images, moment.numbers["noise"]
    with torch.no_grad():
        mu, logvar = twin.encode(x)
        G = twin.decode(mu + (logvar / 2).exp() * noise)
    assert loss.item() == pytest.approx(reference.vae_loss(x, G, mu, logvar, 0.3), rel=1e-4)


@pytest.mark.parametrize("black", [0, 3, 7], ids=["none", "some", "all"])
def test_figures_of_a_vae_are_means_over_images_and_shares_over_those_with_energy(black):
    mean, std = (0.0, 0.0, 0.0), (1.0, 0.5, 2.0)
    vae = VAE(5, 16, 4, mean, std)
    images = torch.randint(1, 256, (7, 3, 16, 16), generator=keyed_generator(0)).to(torch.uint8)
    images[:black] = 0  # x = 0, which has no share of its energy in anything
    figures = vae_figures(vae, recipe("none", 16, mean, std), images)
    x = images.double() / 255 / torch.tensor(std)[:, None, None]
    with torch.no_grad(), evaluating(vae.double()):
        _, G, mu, logvar = vae(x)
    nats = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean().item()
    expected = {"reconstruction": (x - G).square().mean().item(), "kl": nats / 15}
    expected["rate_nats"] = nats
    for name, part in {"acc_gx": x - G, "acc_rx": G}.items():
        shares = [(p.norm() / v.norm()) ** 2 for p, v in zip(part, x, strict=True) if v.any()]
        if shares:
            expected[name] = 1 - sum(shares).item() / len(shares)
    expected = {f"{name}_val": value for name, value in expected.items()}
    assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --- ResNets


def test_cifar_resnet18_counts_and_names():
    counts = {}
    for adversarial in (False, True):
        with torch.device("meta"):
            net = backbone(width=64, adversarial_norms=adversarial)
        twins = ("", "_adv") if adversarial else ("",)
        expected = {"conv1.weight"} | {f"bn1{t}.{leaf}" for t in twins for leaf in NORM}
        for at in (f"layer{k}.{b}" for k in (1, 2, 3, 4) for b in (0, 1)):
            shrinks = at in ("layer2.0", "layer3.0", "layer4.0")
            expected |= {f"{at}.conv1.weight", f"{at}.conv2.weight"}
            expected |= {f"{at}.shortcut.0.weight"} if shrinks else set()
            for norm in ("bn1", "bn2", "shortcut_bn")[: 3 if shrinks else 2]:
                expected |= {f"{at}.{norm}{t}.{leaf}" for t in twins for leaf in NORM}
        assert net.state_dict().keys() == expected
        assert net.feature_dim == 512
        counts[adversarial] = parameters(net)
    assert counts == {False: 11_168_832, True: 11_178_432}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("adversarial", [False, True])
def test_cifar_resnet18_agrees_with_functional_form(adversarial, training):
    torch.manual_seed(0)
    net = scramble(backbone()).double().train(training)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    oracle = reference.cifar_resnet18(net.state_dict(), x, adversarial, training)
    torch.testing.assert_close(net(x, adversarial=adversarial), oracle)


def torchvision_name(name):
    return name.replace("shortcut_bn.", "downsample.1.").replace("shortcut.0.", "downsample.0.")


@pytest.mark.parametrize("name", sorted(n for n in BACKBONES if n.startswith("resnet")))
def test_imagenet_resnets_have_torchvision_s_tensors(name):
    with torch.device("meta"):
        ours = backbone(name, 64, "imagenet", adversarial_norms=False)
        theirs = getattr(torchvision.models, name)(weights=None)
    theirs.fc = nn.Identity()
    shapes = {torchvision_name(k): v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}
    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_block_whose_residual_is_zero_is_its_shortcut(name):
    network = backbone(name, 4, "cifar", adversarial_norms=True).train()
    zero_residuals(network)
    x = torch.randn(3, 4 * (4 if name == "resnet50" else 1), 8, 8)
    block = network.layer1[1]  # its shortcut is the identity
    for adversarial in (False, True):
        assert torch.equal(block(x, adversarial), x.relu())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_resnets_agree_with_torchvision(name):
    torch.manual_seed(0)
    ours = scramble(backbone(name, 64, "imagenet", adversarial_norms=False)).double()
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None)
    theirs.fc = nn.Identity()
    state = {torchvision_name(k): v.clone() for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        with torch.no_grad():
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[torchvision_name(key)])


def test_imagenet_stem_starts_from_he_fan_out():
    net = backbone(width=32, stem="imagenet", adversarial_norms=False)
    for conv in (net.conv1, net.layer1[0].conv1, net.layer4[1].conv2):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("adversarial", [False, True])
def test_a_forward_pass_updates_its_own_statistics_only(name, stem, adversarial):
    net = backbone(name, stem=stem).train()
    before = clones(net.named_buffers())
    net(torch.randn(2, 3, 32, 32), adversarial=adversarial)
    assert changed_names(before, net.named_buffers()) == {
        k for k in before if ("_adv." in k) == adversarial
    }


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_stride_over_one_pixel_has_the_gradient_of_the_middle_weights(kernel):
    """oneDNN's bf16 gradient reads memory that nobody wrote there."""
    layer = nn.Conv2d(16, 32, kernel, 2, kernel // 2, bias=False)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 1, 1)
    middle = layer.weight.detach()[:, :, kernel // 2, kernel // 2]
    torch.testing.assert_close(convolve(x, layer)[:, :, 0, 0], x[:, :, 0, 0] @ middle.T)
    torch.testing.assert_close(convolve(x, layer), layer(x))
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            y = convolve(x, layer)
        (gradient,) = torch.autograd.grad(y, layer.weight, torch.ones_like(y))
        own = gradient[:, :, kernel // 2, kernel // 2]
        torch.testing.assert_close(own, x.sum((0, 2, 3)).expand(32, -1), atol=0.1, rtol=0.02)
        assert gradient.count_nonzero() == own.count_nonzero()


@pytest.mark.parametrize(("adversarial", "momentum"), [(False, 0.1), (True, 0.01)])
def test_statistics_follow_their_momentum(adversarial, momentum):
    net = backbone().double().train()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    net(x, adversarial=adversarial)
    first = net.conv1(x).transpose(0, 1).flatten(1)
    norm = net.bn1_adv if adversarial else net.bn1
    torch.testing.assert_close(norm.running_mean, momentum * first.mean(1))
    torch.testing.assert_close(norm.running_var, 1 - momentum + momentum * first.var(1))


def test_both_sets_of_norms_get_gradients_of_their_own_only():
    net = backbone()
    for adversarial in (False, True):
        net.zero_grad()
        net(torch.randn(2, 3, 16, 16), adversarial=adversarial).sum().backward()
        idle_names = {name for name, p in net.named_parameters() if p.grad is None}
        norms = {name for name, _ in net.named_parameters() if "bn" in name}
        assert idle_names == {name for name in norms if ("_adv." in name) != adversarial}


def test_inference_uses_the_main_norms():
    net = backbone().eval()
    x = torch.randn(2, 3, 16, 16)
    main = net(x)
    assert torch.equal(net(x, adversarial=True), main)  # both sets start alike
    for name, tensor in net.state_dict().items():
        if "_adv.running_mean" in name:
            tensor += 1
    assert torch.equal(net(x), main)
    assert not torch.allclose(net(x, adversarial=True), main)


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match=r"backbone must be one of resnet18.*is 'resnet19'"):
        backbone("resnet19")


def test_evaluating_restores_mixed_modes_also_after_an_error():
    net = backbone().train()
    net.layer2.eval()
    modes_before = modes(net)
    with contextlib.suppress(InterruptedError), evaluating(net):
        assert not any(modes(net))
        raise InterruptedError
    assert modes(net) == modes_before


def test_networks_made_in_threads_have_the_weights_of_their_seed():
    """A widget's thread makes one while a cell makes another; torch has one generator for both."""

    def draw_weights(seed):
        with initial_weights(seed):
            return [torch.rand(1).item() for _ in range(200)]

    with ThreadPoolExecutor(4) as pool:
        weights = list(pool.map(draw_weights, [0, 1, 2, 3] * 8))
    assert all(weights[i] == draw_weights(i % 4) for i in range(len(weights)))


@pytest.mark.parametrize(("channels", "side"), [(4, 32), (8, 64), (15, 46), (4, 9)])
def test_a_projection_of_few_channels_is_its_convolution(channels, side):
    """In float64 and in rows first, where torch's own has no fault."""
    convolution = nn.Conv2d(channels, 2 * channels, 1, 2, bias=False).double()
    x = torch.randn(3, channels, side, side, dtype=torch.float64, requires_grad=True)
    parts = []
    for y in (project(x, convolution), convolution(x)):
        parts.append((y, *torch.autograd.grad(y.square().sum(), (x, convolution.weight))))
    for ours, theirs in zip(*parts, strict=True):
        torch.testing.assert_close(ours, theirs)


class Strides(TorchDispatchMode):
    """The (stride, input channels, input side) of each 1×1 convolution that runs under it."""

    def __init__(self):
        super().__init__()
        self.pointwise = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default and args[1].shape[-1] == 1:
            self.pointwise.append((args[3][0], *args[0].shape[1:3]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "wrn10", "wrn28"])
def test_no_backbone_runs_a_convolution_whose_gradient_writes_out_of_bounds(backbone, size):
    """docs/upstream.md: strided, 1×1, of fewer than 8 channels, or than 16 above 44 pixels."""
    network = build_backbone(backbone, width=4, stem="cifar", adversarial_norms=False)
    with Strides() as strides, torch.no_grad():
        network(torch.zeros(2, 3, size, size))
    assert strides.pointwise
    for stride, channels, side in strides.pointwise:
        assert stride == 1 or channels >= (16 if side > 44 else 8)
