"""Winograd's convolutions against the convolution itself: exactly, where all sums are whole numbers
that bf16 and fp32 hold, and within a tolerance where they round."""

import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.cpp_extension import get_cxx_compiler

from idaa_lib.adversaries import IDAA
from idaa_lib.nets import winograd
from idaa_lib.nets.convolution import Conv3x3, prepare
from idaa_lib.nets.vae import VAE

needs_kernels = pytest.mark.skipif(
    not (winograd.possible and shutil.which(get_cxx_compiler())),
    reason="this machine has no AVX-512 bf16, or no C++ compiler",
)
LAST = torch.channels_last


@pytest.fixture
def kernels():
    winograd.load()
    return torch.ops.idaa_winograd


def whole(*shape, most=3, times=1):
    return (times * torch.randint(-most, most + 1, shape)).float()


def exact(x, weight, gradient):
    """y, the gradients of x and of the weight, by torch in fp64."""
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    y = F.conv2d(x, weight, padding=1)
    return y, *torch.autograd.grad(y, (x, weight), gradient.double())


def ours(kernels, x, weight, gradient):
    x, gradient = (t.to(torch.bfloat16) for t in (x, gradient))
    return (
        kernels.convolve(x, weight, False),
        kernels.convolve(gradient, weight, True),
        kernels.weight_gradient(x, gradient),
    )


# One tile; an odd number of tiles; sides that differ; blocks that do not divide the tiles; many
# tiles, of which each thread sums its own, and a deep layer, whose products threads share.
@needs_kernels
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "height", "width"),
    [
        (1, 64, 64, 2, 2), (3, 64, 128, 2, 6), (1, 128, 64, 10, 4), (5, 64, 64, 14, 14),
        (9, 64, 192, 32, 32), (3, 256, 256, 6, 4), (40, 256, 192, 12, 12),
    ],
)  # fmt: skip
def test_whole_numbers_are_convolved_exactly(kernels, batch, inputs, outputs, height, width):
    torch.manual_seed(0)
    x, gradient = whole(batch, inputs, height, width), whole(batch, outputs, height, width)
    # Multiples of 4: the transform of a weight has quarters of its entries.
    weight = whole(outputs, inputs, 3, 3, most=1, times=4)
    y, of_x, of_weight = exact(x, weight, gradient)
    found = ours(kernels, x, weight, gradient)
    assert torch.equal(found[0], y.to(torch.bfloat16))  # rounded once, at the end
    assert torch.equal(found[1], of_x.to(torch.bfloat16))
    assert torch.equal(found[2], of_weight.float())


@needs_kernels
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_what_bf16_rounds_stays_small(kernels, layout):
    """Relative errors of the norm; oneDNN's are .0024, .0024 and .0017."""
    torch.manual_seed(0)
    x, gradient = (torch.randn(8, 128, 16, 16).to(torch.bfloat16) for _ in "xg")
    weight = torch.randn(128, 128, 3, 3) * (2 / (9 * 128)) ** 0.5
    expected = exact(x, weight, gradient)
    laid = (t.to(memory_format=layout) for t in (x, weight, gradient))
    for one, other in zip(ours(kernels, *laid), expected, strict=True):
        assert one.is_contiguous(memory_format=LAST)
        assert (one - other).norm() < 0.005 * other.norm()


@needs_kernels
def test_what_the_kernels_cannot_read_is_refused(kernels):
    maps, weight = torch.zeros(2, 64, 4, 4, dtype=torch.bfloat16), torch.zeros(128, 64, 3, 3)
    wide = torch.zeros(2, 128, 4, 4, dtype=torch.bfloat16)
    for wrong, match in (
        (lambda: kernels.convolve(wide, weight, False), r"\(B, 64, H, W\).* are \[2, 128, 4, 4\]"),
        (lambda: kernels.convolve(maps, weight, True), r"\(B, 128, H, W\)"),
        (lambda: kernels.convolve(maps[..., 1:], weight, False), "even sides"),
        (lambda: kernels.convolve(maps[:, :32], weight[:, :32], False), "multiple of 64 channels"),
        (lambda: kernels.convolve(maps, weight[:32], False), "multiple of 64 outputs"),
        (lambda: kernels.convolve(maps, weight[..., 1:], False), r"is \[128, 64, 3, 2\]"),
        (lambda: kernels.convolve(maps.float(), weight, False), "BFloat16"),
        (lambda: kernels.convolve(maps, weight.bfloat16(), False), "Float"),
        (lambda: kernels.weight_gradient(maps, wide[:1]), "differ in batch or side"),
        (lambda: kernels.weight_gradient(maps, wide[:, :, :2]), "differ in batch or side"),
    ):
        with pytest.raises(RuntimeError, match=match):
            wrong()


def prepared(module, monkeypatch):
    monkeypatch.setattr(winograd, "wins", True)
    prepare(module)
    return module.to(memory_format=LAST)


def ran(work):
    """How often each kernel ran in work()."""
    with torch.profiler.profile() as profile:
        work()
    own = [e for e in profile.key_averages() if e.key.startswith("idaa_winograd::")]
    return {e.key.removeprefix("idaa_winograd::"): e.count for e in own}


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_learns_as_torch_s_does(bias, monkeypatch, kernels):
    """Under autocast, eagerly and compiled; with all gradients in the parameters' own precision."""
    torch.manual_seed(0)
    layer = prepared(Conv3x3(64, 128, bias=bias), monkeypatch)
    x = torch.randn(4, 64, 8, 8).to(torch.bfloat16, memory_format=LAST).requires_grad_()
    weight = layer.weight.detach().double().requires_grad_()
    b = layer.bias.detach().double().requires_grad_() if bias else None
    y = F.conv2d(x.double(), weight, b, padding=1)
    gradient = torch.randn_like(y)
    expected = (y, *torch.autograd.grad(y, [x, weight] + [b] * bias, gradient))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def check(call):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        wanted = [x, *layer.parameters()]
        found = (y, *torch.autograd.grad(y, wanted, gradient.to(torch.bfloat16)))
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() < 0.006 * other.norm()
        assert [t.dtype for t in found[2:]] == [torch.float32] * (1 + bias)

    check(compiled)  # traced here: the operators then run once more, of nothing
    for call in (layer, compiled):
        assert ran(lambda call=call: check(call)) == {"convolve": 2, "weight_gradient": 1}


@needs_kernels
def test_an_attack_asks_for_no_weight_gradient(monkeypatch, kernels):
    layer = prepared(Conv3x3(64, 64), monkeypatch)
    x = torch.randn(2, 64, 4, 4).to(torch.bfloat16).requires_grad_()
    fixed = {"weight": layer.weight.detach()}
    y = torch.func.functional_call(layer, fixed, x)
    assert ran(y.sum().backward) == {"convolve": 1}
    assert x.grad is not None


@needs_kernels
def test_where_it_does_not_fit_torch_convolves(monkeypatch, kernels):
    layers = nn.ModuleList([Conv3x3(64, 64), Conv3x3(64, 64, stride=2), Conv3x3(32, 64)])
    layer, *others = prepared(layers, monkeypatch)
    assert layer.by_winograd and not any(other.by_winograd for other in others)
    for shape, fits in (((8, 8), True), ((7, 8), False), ((8, 7), False), ((2, 2), False)):
        x = torch.randn(2, 64, *shape)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert ran(lambda x=x: layer(x.bfloat16())) == ({"convolve": 1} if fits else {})
        assert ran(lambda x=x: layer(x)) == {}  # fp32


@needs_kernels
def test_an_adversary_s_vae_is_prepared_and_the_caller_s_is_not(monkeypatch, kernels):
    monkeypatch.setattr(winograd, "wins", True)
    torch.manual_seed(0)
    vae = VAE(8, 32, width=32).eval()
    adversary = IDAA(vae, 0.1)
    adversary.compile_parts()
    ours, theirs = (
        [m.by_winograd for m in one.modules() if isinstance(m, Conv3x3)]
        for one in (adversary.vae, vae)
    )
    assert ours == [True] * 4 and theirs == [False] * 4
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = vae(x).G
        with torch.autocast("cpu", torch.bfloat16):
            found = adversary.vae(x).G
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_without_a_compiler_convolutions_stay_as_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    for name, value in (("wins", True), ("loaded", False)):
        monkeypatch.setattr(winograd, name, value)
    layer = Conv3x3(64, 64)
    prepare(layer)
    assert not layer.by_winograd
    assert "convolutions stay as they are. no-such-compiler did not" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.so"))
