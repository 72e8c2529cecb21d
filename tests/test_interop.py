"""Weights from elsewhere and to elsewhere: files with the published names against an oracle that
computes on those names (docs/spec/idaa.md §1, §4), and exports read back as their targets do."""

import functools
import io
import itertools
import math
import os
import pickle
import random
import re
import shlex
from collections import OrderedDict

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from reference import batch_norm, cifar_vae
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import idaa_lib
from idaa_lib import ConfigError, SSLConfig, VAEConfig, interop, results, runs
from idaa_lib.__main__ import main
from idaa_lib.adversaries import IDAA
from idaa_lib.evaluate.encoders import Encoder, features
from idaa_lib.interop import imported, writers
from idaa_lib.interop.imported import read_name
from idaa_lib.lab.rows import row_of
from idaa_lib.methods.cassle import NEUTRAL
from idaa_lib.nets import build_backbone
from idaa_lib.nets.resnet import torchvision_weights
from idaa_lib.runs import checkpoints
from idaa_lib.runs.machine import open_images

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
SHORTCUTS = {
    "cifar": ("shortcut.0", "shortcut_bn", "shortcut_bn_adv"),
    "ds": ("ds_conv1", "ds_bn1", "ds_bn1_adv"),
    "torchvision": ("downsample.0", "downsample.1", None),
}


# --- files with the published names ---------------------------------------------------------


class State(dict):
    """A state dict under construction, every tensor drawn: fresh norms would hide a mix-up."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def conv(self, name, *shape):
        fan_in = shape[1] * shape[2] * shape[3]
        self[f"{name}.weight"] = torch.randn(shape, generator=self.generator) * (2 / fan_in) ** 0.5

    def norm(self, name, channels, affine=True):
        draw = lambda: torch.rand(channels, generator=self.generator)  # noqa: E731
        if affine:
            self[f"{name}.weight"], self[f"{name}.bias"] = draw() + 0.5, draw() - 0.5
        self[f"{name}.running_mean"], self[f"{name}.running_var"] = draw() - 0.5, draw() + 0.5
        self[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def linear(self, name, outputs, inputs, bias=True):
        weight = torch.randn(outputs, inputs, generator=self.generator)
        self[f"{name}.weight"] = weight / inputs**0.5
        if bias:
            self[f"{name}.bias"] = torch.randn(outputs, generator=self.generator) * 0.1

    def resnet(self, prefix, name, width, names, kernel, adv):
        def norm(at, channels):
            self.norm(at, channels)
            if adv:
                self.norm(f"{at}_adv", channels)

        conv, bn, bn_adv = SHORTCUTS[names]
        bottleneck = name == "resnet50"
        self.conv(f"{prefix}conv1", width, 3, kernel, kernel)
        norm(f"{prefix}bn1", width)
        inputs = width
        for stage, depth in enumerate(BLOCKS[name]):
            planes = width * 2**stage
            outputs = planes * 4 if bottleneck else planes
            for block in range(depth):
                at = f"{prefix}layer{stage + 1}.{block}."
                kernels = (1, 3, 1) if bottleneck else (3, 3)
                widths = (planes, planes, outputs) if bottleneck else (planes, outputs)
                channels = inputs
                for i, (k, w) in enumerate(zip(kernels, widths, strict=True), start=1):
                    self.conv(f"{at}conv{i}", w, channels, k, k)
                    norm(f"{at}bn{i}", w)
                    channels = w
                if inputs != outputs or (stage and block == 0):
                    self.conv(at + conv, outputs, inputs, 1, 1)
                    self.norm(at + bn, outputs)
                    if adv or names == "ds":  # there, used or not
                        self.norm(at + bn_adv, outputs)
                inputs = outputs
        return inputs


def resnet(state, prefix, x, *, legacy, pool, adv=False):
    """The oracle: features (B, D), by the names that the tensors have."""

    def norm(name, y):
        return batch_norm(state, f"{prefix}{name}" + ("_adv" if adv else ""), y, False)

    def conv(name, y, stride=1):
        weight = state[f"{prefix}{name}.weight"]
        return F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2)

    h = conv("conv1", x, stride=2 if state[f"{prefix}conv1.weight"].shape[-1] == 7 else 1)
    h = (h if legacy else norm("bn1", h)).relu()
    h = F.max_pool2d(h, 3, 2, 1) if pool else h
    for stage in (1, 2, 3, 4):
        block = 0
        while f"{prefix}layer{stage}.{block}.conv1.weight" in state:
            at = f"layer{stage}.{block}."
            stride = 2 if stage > 1 and block == 0 else 1
            bottleneck = f"{prefix}{at}conv3.weight" in state
            y = norm(f"{at}bn1", conv(f"{at}conv1", h, 1 if bottleneck else stride)).relu()
            y = norm(f"{at}bn2", conv(f"{at}conv2", y, stride if bottleneck else 1))
            y = norm(f"{at}bn3", conv(f"{at}conv3", y.relu())) if bottleneck else y
            for shortcut, bn, _ in SHORTCUTS.values():
                if f"{prefix}{at}{shortcut}.weight" in state:
                    h = norm(at + bn, conv(at + shortcut, h, stride))
            h = (h + y).relu()
            block += 1
    return h.mean((2, 3))


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm1d(state, name, x):
    y = (x - state[f"{name}.running_mean"]) / (state[f"{name}.running_var"] + 1e-5).sqrt()
    if f"{name}.weight" not in state:
        return y
    return y * state[f"{name}.weight"] + state[f"{name}.bias"]


def simclr(adv, names="cifar", kernel=3):
    state = State()
    d = state.resnet("encoder.", "resnet18", 4, names, kernel, adv)
    state.linear("projector.0", d, d)
    state.linear("projector.2", 6, d)
    head = lambda h: linear(state, "projector.2", linear(state, "projector.0", h).relu())  # noqa: E731
    return state, "encoder.", head, None


def plain(adv, names="cifar"):
    prefix, head = ("", "linear") if names == "cifar" else ("net.", "net.fc")
    state = State()
    state.linear(head, 6, state.resnet(prefix, "resnet18", 4, names, 3, adv))
    return state, prefix, lambda h: linear(state, head, h), None


def simsiam(adv, names="cifar"):
    state = State()
    d = state.resnet("backbone.", "resnet18", 4, names, 3, adv)
    for layer, inputs in (("layer1", d), ("layer2", 8), ("layer3", 8)):
        state.linear(f"projector.{layer}.0", 8, inputs)
        state.norm(f"projector.{layer}.1", 8)
    state.linear("predictor.layer1.0", 2, 8)
    state.norm("predictor.layer1.1", 2)
    state.linear("predictor.layer2", 8, 2)

    def layer(name, x):
        return norm1d(state, f"{name}.1", linear(state, f"{name}.0", x))

    head = lambda h: layer("projector.layer3", layer("projector.layer1", h).relu())  # noqa: E731
    predict = lambda z: linear(state, "predictor.layer2", layer("predictor.layer1", z).relu())  # noqa: E731
    return state, "backbone.", head, predict


def simsiam_imagenet(adv, names):
    state = State()
    d = state.resnet("encoder.", "resnet50", 2, names, 7, adv)
    state.linear("encoder.fc.0", d, d, bias=False)
    state.norm("encoder.fc.1", d)
    state.linear("encoder.fc.3", d, d, bias=False)
    state.norm("encoder.fc.4", d)
    state.linear("encoder.fc.6", 8, d)
    state.norm("encoder.fc.7", 8, affine=False)
    state.linear("predictor.0", 2, 8, bias=False)
    state.norm("predictor.1", 2)
    state.linear("predictor.3", 8, 2)

    def layer(part, i, x):
        return norm1d(state, f"{part}.{i + 1}", linear(state, f"{part}.{i}", x))

    def head(h):
        for i in (0, 3):
            h = layer("encoder.fc", i, h).relu()
        return layer("encoder.fc", 6, h)

    predict = lambda z: linear(state, "predictor.3", layer("predictor", 0, z).relu())  # noqa: E731
    return state, "encoder.", head, predict


def wrap(state):
    return {f"module.{key}": value for key, value in state.items()}


# name → what makes the file, how it is wrapped, and: kind, legacy stem, pooling, size, units
FILES = {
    "cifar10_resnet18_batch_256_proj_dim_64_seed_1_epoch_300.pt":
        (lambda: simclr(False), dict, "simclr", False, False, 32, CIFAR),
    "cifar10_resnet18_alpha_1.0_adv_eps_0.1_best.t":
        (lambda: simclr(True), lambda s: {"model": wrap(s), "acc": 83.4, "epoch": 297},
         "simclr", False, False, 32, CIFAR),
    "simclr_mini.pt":
        (lambda: simclr(True, "ds", 7), dict, "simclr", True, True, 84, IMAGENET),
    "plain_best.t":
        (lambda: plain(True), lambda s: {"net": wrap(s), "acc": 86.0, "epoch": 250},
         "plain", False, False, 32, CIFAR),
    "uel_mini_best.t":
        (lambda: plain(False, "ds"), lambda s: {"net": dict(s), "epoch": 9, "acc": 43.2},
         "plain", True, True, 84, IMAGENET),
    "simsiam_best.t":
        (lambda: simsiam(True), dict, "simsiam", False, False, 32, CIFAR),
    "simsiam_mini_best.t":
        (lambda: simsiam(False, "ds"), dict, "simsiam", True, True, 84, IMAGENET),
    "checkpoint_0099.pth.tar":
        (lambda: simsiam_imagenet(True, "ds"),
         lambda s: {"epoch": 100, "arch": "resnet50_imagenet", "state_dict": wrap(s),
                    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}},
                                  "param_groups": [{"lr": 0.05, "params": [0]}]}},
         "simsiam", False, True, 224, IMAGENET),
    "facebook.pth.tar":
        (lambda: simsiam_imagenet(False, "torchvision"),
         lambda s: {"epoch": 100, "arch": "resnet50", "state_dict": wrap(s), "optimizer": {}},
         "simsiam", False, True, 224, IMAGENET),
}  # fmt: skip


# Of the others neither name nor content says its epoch and accuracy.
RECORDS = {
    "cifar10_resnet18_batch_256_proj_dim_64_seed_1_epoch_300.pt": (300, None),
    "cifar10_resnet18_alpha_1.0_adv_eps_0.1_best.t": (297, 83.4),
    "plain_best.t": (250, 86.0),
    "uel_mini_best.t": (9, 43.2),
    "checkpoint_0099.pth.tar": (100, None),
    "facebook.pth.tar": (100, None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_published_encoder_computes_what_its_names_say(name, tmp_path):
    make, pack, kind, legacy, pool, size, units = FILES[name]
    state, prefix, head, predict = make()
    torch.save(pack(state), tmp_path / name)
    before = torch.get_rng_state()
    official = interop.load_official(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
    assert (official.kind, official.size, (official.mean, official.std)) == (kind, size, units)
    assert (official.epoch, official.acc) == RECORDS.get(name, (None, None))
    x = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        h = resnet(state, prefix, x, legacy=legacy, pool=pool)
        torch.testing.assert_close(official.module(x), h, **tolerance)
        torch.testing.assert_close(official.encoder().module(x), h, **tolerance)
        torch.testing.assert_close(official.projector(h), head(h), **tolerance)
        z = official.encoder("projector").module(x)
        torch.testing.assert_close(z, F.normalize(head(h), dim=1), **tolerance)
        if official.module.adversarial_norms:
            h_adv = resnet(state, prefix, x, legacy=legacy, pool=pool, adv=True)
            torch.testing.assert_close(official.module(x, adversarial=True), h_adv, **tolerance)
            assert (h_adv - h).abs().max() > 0.01
        if predict is None:
            assert official.predictor is None
        else:
            torch.testing.assert_close(official.predictor(head(h)), predict(head(h)), **tolerance)
    assert official.module.adversarial_norms == any(
        "bn1_adv" in key and "ds" not in key for key in state
    )
    for part in filter(None, (official.module, official.projector, official.predictor)):
        assert not any(m.training for m in part.modules())
        assert not any(p.requires_grad for p in part.parameters())


# --- the VAE --------------------------------------------------------------------------------


def vae_state(size, dim, d):
    """Indices of each variant as the specification counts them (§1)."""
    state = State(2)
    halvings = {64: 3, 84: 3, 224: 5}.get(size, 2)
    f = {64: 8, 84: 10, 224: 7}.get(size, size // 4)
    channels = [3] + [d // 2**k for k in reversed(range(halvings))]

    def residual(at):
        for i, k in ((1, 3), (4, 1)):
            state.conv(f"{at}.convs.{i}", d, d, k, k)
            state[f"{at}.convs.{i}.bias"] = torch.randn(d, generator=state.generator) * 0.1
        state.norm(f"{at}.convs.2", d)

    for i in range(halvings):
        state.conv(f"encoder.{3 * i}", channels[i + 1], channels[i], 4, 4)
        state.norm(f"encoder.{3 * i + 1}", channels[i + 1])
    first = 3 * halvings
    residual(f"encoder.{first}")
    state.norm(f"encoder.{first + 1}", d)
    residual(f"encoder.{first + 2}")
    edge = size == 224
    if edge:
        state.norm(f"encoder.{first + 3}", d)
        state.norm("decoder.0", d)
    for i, kind in enumerate((residual, None, residual, None)):
        at = f"decoder.{i + edge}"
        residual(at) if kind else state.norm(at, d)
    for i in range(halvings):
        at = 4 + edge + 3 * i
        state.conv(f"decoder.{at}", channels[-1 - i], channels[-2 - i], 4, 4)
        if i + 1 < halvings:
            state.norm(f"decoder.{at + 1}", channels[-2 - i])
    state.norm("bn", 3)
    state.linear("fc11", dim, d * f * f)
    state.linear("fc12", dim, d * f * f)
    state.linear("fc21", d * f * f, dim)
    return state


def vae(state, x):
    """The oracle for every variant: layer after layer, by what their tensors are."""
    norm = lambda name, y: batch_norm(state, name, y, False)  # noqa: E731
    leaky = lambda y: torch.where(y > 0, y, 0.01 * y)  # noqa: E731

    def residual(at, y):
        h = leaky(y)
        h = F.conv2d(h, state[f"{at}.convs.1.weight"], state[f"{at}.convs.1.bias"], padding=1)
        h = leaky(norm(f"{at}.convs.2", h))
        return y + F.conv2d(h, state[f"{at}.convs.4.weight"], state[f"{at}.convs.4.bias"])

    def layers(part):
        return sorted({int(k.split(".")[1]) for k in state if k.startswith(f"{part}.")})

    h, down = x, False
    for i in layers("encoder"):
        at = f"encoder.{i}"
        if f"{at}.convs.1.weight" in state:
            h = residual(at, h)
        elif f"{at}.running_mean" in state:
            h, down = norm(at, h).relu() if down else norm(at, h), False
        else:
            h, down = F.conv2d(h, state[f"{at}.weight"], stride=2, padding=1), True
    mu, logvar = linear(state, "fc11", h.flatten(1)), linear(state, "fc12", h.flatten(1))
    h, ups = linear(state, "fc21", mu).reshape(h.shape), 0
    for i in layers("decoder"):
        at = f"decoder.{i}"
        if f"{at}.convs.1.weight" in state:
            h = residual(at, h)
        elif f"{at}.running_mean" in state:
            h = norm(at, h)
            h = leaky(h) if ups else h
        else:
            ups += 1
            padding = 0 if x.shape[-1] == 84 and ups == 2 else 1
            h = F.conv_transpose2d(h, state[f"{at}.weight"], stride=2, padding=padding)
    return norm("bn", torch.tanh(h)), mu, logvar


@pytest.mark.parametrize(
    ("size", "units", "tensors"),
    [(32, CIFAR, 81), (64, IMAGENET, None), (84, CIFAR, None), (224, IMAGENET, 127)],
)
def test_a_published_vae_computes_what_its_names_say(size, units, tensors, tmp_path):
    state = vae_state(size, dim=6, d=16)
    assert tensors in (None, len(state))
    path = tmp_path / "model_epoch292.pth"
    torch.save(dict(state), path)
    official = interop.load_official(path)
    assert (official.kind, official.epoch, official.projector) == ("vae", 292, None)
    assert (official.size, official.mean, official.std) == (size, *units)
    assert (official.module.size, official.module.mean, official.module.std) == (size, *units)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    G, mu, logvar = vae(state, x)
    with torch.no_grad():
        output = official.module(x)
    for ours, theirs in zip((output.G, output.mu, output.logvar), (G, mu, logvar), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    if size == 32:  # the other tests' own reference agrees with this one
        for ours, theirs in zip(cifar_vae(state, x, False), (G, mu, logvar), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_published_vae_has_the_published_size(tmp_path):
    state = vae_state(32, dim=128, d=128)
    torch.save(dict(state), tmp_path / "model_epoch5.pth")
    official = interop.load_official(tmp_path / "model_epoch5.pth")
    assert sum(p.numel() for p in official.module.parameters()) == 4_081_158
    assert (official.module.dim, official.module.width) == (128, 64)


def test_a_vae_of_another_shape_is_refused(tmp_path):
    """Such as the dev code's, whose names are the CIFAR variant's and whose strides are not."""
    torch.save(dict(vae_state(56, dim=6, d=16)), tmp_path / "model_epoch3.pth")
    with pytest.raises(ConfigError, match="halves its images 2 times, to 14 × 14"):
        interop.load_official(tmp_path / "model_epoch3.pth")
    torch.save(dict(vae_state(32, dim=6, d=16)), tmp_path / "model_epoch3.pth")
    with pytest.raises(ConfigError, match="VAE for size=32, not 84"):
        interop.load_official(tmp_path / "model_epoch3.pth", size=84)


def test_an_attack_uses_a_published_vae_across_normalisations(tmp_path):
    """ε = 0 gives the images back, whatever units the encoder has (the attack converts)."""
    torch.save(dict(vae_state(32, 6, 16)), tmp_path / "model_epoch2.pth")
    official = interop.load_official(tmp_path / "model_epoch2.pth", mean=(0.5,) * 3, std=(0.5,) * 3)
    x = torch.randn(2, 3, 32, 32)
    attack = IDAA(official.module, epsilon=0.0, mean=CIFAR[0], std=CIFAR[1])
    result = attack(x, lambda y: y.square().sum())
    torch.testing.assert_close(result.images, x, rtol=1e-4, atol=1e-4)
    assert official.module.mean == (0.5,) * 3


# --- files that are refused -----------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_counts(name, tmp_path):
    """One too few, one too many, one of another shape: each is named."""
    make, pack, *_ = FILES[name]
    state = make()[0]
    path = tmp_path / "x.t"

    def refusal(variant):
        torch.save(pack(variant), path)
        with pytest.raises(ConfigError) as error:
            interop.load_official(path)
        return str(error.value)

    keys = list(state)
    for key in (keys[1], keys[-1], *(k for k in keys if k.endswith("layer2.0.bias"))):
        assert key in refusal({k: v for k, v in state.items() if k != key})
    extra = keys[2].rpartition(".")[0] + ".extra"
    bias = next(k for k in keys if k.endswith("bn2.bias"))
    both = refusal(state | {extra: torch.ones(1), bias: torch.ones(99)})
    assert f"beside what belongs there, {extra}" in both
    assert f"{bias} is (99,) and should be (" in both


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["IDAA_TEST_HARM"],)


def test_what_is_no_checkpoint_of_theirs_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_TEST_HARM", str(tmp_path / "harm"))
    state = dict(simclr(False)[0])
    path = tmp_path / "whole.pt"
    torch.save(state, path)
    (tmp_path / "short.pt").write_bytes(path.read_bytes()[:5000])
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "old_short.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:5000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_text("<html>Not found</html>")
    torch.save({"net": state, "acc": Harmful()}, tmp_path / "harm.pt")
    torch.save(
        {"net": state, "acc": Harmful()}, tmp_path / "old_harm.pt",
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "torchvision.pt")
    torch.save({"weights": state}, tmp_path / "other.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    for name, sentence in (
        ("none.pt", "There is no checkpoint .*none.pt"),
        (".", "cannot be read: it is no file"),
        ("short.pt", "short.pt is cut short, damaged or no PyTorch checkpoint"),
        ("old_short.pt", "is cut short"),
        ("empty.pt", "is cut short"),
        ("page.pt", "is cut short, damaged or no PyTorch checkpoint"),
        ("harm.pt", r"was not loaded: it holds more than tensors, and wants \w+.mkdir to be run"),
        ("old_harm.pt", "was not loaded"),
        ("harm.pt", r"save its weights alone: torch.save\(model.state_dict\(\), 'weights.pth'\)"),
        ("script.pt", "wants TorchScript to be run"),
        ("torchvision.pt", "it is no VAE, SimCLR, .* IP-IRM or RSA .*bn1.bias"),
        ("other.pt", "no state dict"),
        ("list.pt", "no state dict"),
        ("nothing.pt", "no tensor at all"),
    ):
        with pytest.raises(ConfigError, match=sentence) as error:
            interop.load_official(tmp_path / name)
        assert re.fullmatch(r"[^\n]+\.", str(error.value)), error.value
    assert not (tmp_path / "harm").exists()
    assert interop.load_official(tmp_path / "old.pt").kind == "simclr"  # the format before 1.6


def bytes_of(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_one_sentence_wherever_the_damage_is(zipped, tmp_path):
    """Cut anywhere, or with bytes that changed: a state dict in a zip never loads with others."""
    path, state = tmp_path / "x.pt", dict(vae_state(32, dim=2, d=16))
    data, draw = bytes_of(state, zipped), random.Random(0)
    cuts = [data[: len(data) * part // 40] for part in range(40)]
    variants = []
    for _ in range(60):
        content, at = bytearray(data), draw.randrange(len(data))
        content[at : at + draw.choice((1, 8, 100))] = draw.randbytes(draw.choice((1, 8, 100)))
        variants.append(bytes(content))
    zeros = [data[: len(data) // 2].ljust(len(data), b"\0"), b"\0" * 1000, data[100:]]
    refusals = sentences = 0
    for content in cuts + variants + zeros:
        path.write_bytes(content)
        try:
            official = interop.load_official(path)
        except ConfigError as error:
            refusals += re.fullmatch(r"[^\n]+\.", str(error)) is not None
            sentences += 1
        else:  # what changed is between the parts of the zip, or numbers alone
            tensors = official.module.state_dict()
            assert not zipped or all(torch.equal(tensors[key], state[key]) for key in state)
    assert refusals == sentences >= len(cuts) + len(zeros)


# --- files of others ------------------------------------------------------------------------


def rename(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("pack", "note"),
    [
        (lambda s: rename(s, "module."), "module. taken off its names"),
        (lambda s: rename(s, "_orig_mod."), "_orig_mod. taken off its names"),
        (lambda s: rename(s, "module._orig_mod."), "_orig_mod., module. taken off its names"),
        (lambda s: {"state_dict": rename(s, "model."), "epoch": 3, "hyper_parameters": {"lr": 1}},
         "model. taken off its names"),
        (lambda s: {"model": {"state_dict": s}, "epoch": 3}, ""),
        (lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "epoch": 3}, ""),
        (lambda s: {"network": rename(s, "module.")}, "module. taken off its names"),
        (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
         r"\d+ missing num_batches_tracked set to 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [lambda: simsiam(True, "ds")[0], lambda: vae_state(32, 6, 16)])
def test_what_others_wrap_around_a_state_dict_is_taken_off_and_said(
    make, pack, note, tmp_path, capsys
):
    state = make()
    torch.save(dict(state), tmp_path / "plain.pt")
    bare_file = interop.load_official(tmp_path / "plain.pt")
    assert capsys.readouterr().out == ""
    content = pack(dict(state))
    torch.save(content, tmp_path / "other.pt")
    official = interop.load_official(tmp_path / "other.pt")
    assert re.fullmatch(rf"other.pt: {note}\.\n" if note else "", capsys.readouterr().out)
    assert official.epoch == content.get("epoch") and official.kind == bare_file.kind
    tensors = official.module.state_dict()
    for key, tensor in bare_file.module.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(tensors[key], tensor), key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_of_a_training_that_failed_are_refused(value, tmp_path):
    state = simclr(True)[0]
    key = "encoder.layer3.1.bn2_adv.running_var"
    state[key][1] = value
    torch.save(dict(state), tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=rf"x.pt: {key} hold values that are NaN or infinite"):
        interop.load_official(tmp_path / "x.pt")


# --- runs -----------------------------------------------------------------------------------


ENCODER = "cifar100_resnet18_batch_16_alpha_0.5_adv_eps_0.03_proj_dim_6_bn_adv_momentum_0.01_seed_3"
STATEMENTS = {
    **{f"{ENCODER}_{end}": dict(
        dataset="cifar100", batch_size=16, alpha=0.5, epsilon=0.03, seed=3, adversary="idaa")
       for end in ("epoch_50.pt", "epoch_200.pt", "epoch_300.pt", "best.t")},
    "cifar10_resnet50_batch_256_proj_dim_64_bn_adv_momentum_0.01_seed_1_epoch_0.pt": dict(
        dataset="cifar10", batch_size=256, seed=1),
    "miniImagenet_resnet18_batch_128_embed_dim512_method_clae_eps_0.03_alpha_1.0_bn_adv_momentum_"
    "0.01_seed_2_best.t": dict(
        dataset="mini-imagenet", batch_size=128, epsilon=0.03, alpha=1.0, adversary="clae", seed=2),
    "miniImagenet_resnet18_batch_256_alpha_1.0_method_normal_eps_0.01_bn_adv_momentum_0.01_seed_1"
    "_best.t": dict(dataset="mini-imagenet", batch_size=256, adversary="none", seed=1),
    "cifar10_resnet18_batch_128_embed_dim_128_adv_eps_1.0_alpha_1.0_bn_adv_momentum_0.01seed5"
    "_best.t": dict(
        dataset="cifar10", batch_size=128, epsilon=1.0, alpha=1.0, adversary="idaa", seed=5),
    "CIFAR10_resnet18_batch_256_alpha_1.0_adv_eps_0.03_proj_dim_64_bn_adv_momentum_0.01_trial_0"
    "_epoch_100.pt": dict(  # CLAE's own
        dataset="cifar10", batch_size=256, epsilon=0.03, alpha=1.0),
    "tinyImagenet_resnet18_batch_128_proj_dim_64_bn_adv_momentum_0.01_seed_1_best.t": dict(
        batch_size=128, seed=1),
    "vae_cifar100_dim8_kl0.3_simsiam/model_epoch292.pth": dict(
        dataset="cifar100", kappa=0.3, augmentation="simsiam"),
    "vae_dim512_kl0.1_simclr/model_epoch92.pth": dict(kappa=0.1, augmentation="simclr"),
    "model_epoch292.pth": {}, "plain_best.t": {}, "vae_mine/x.pth": {}, "ckpt-200.pth": {},
}  # fmt: skip


@pytest.mark.parametrize("name", STATEMENTS)
def test_an_official_name_is_read_as_its_code_writes_it(name, tmp_path):
    """Names as the format strings of the official and the development code make them."""
    fields = read_name(tmp_path / name)
    stage = VAEConfig if "model_epoch" in name else SSLConfig
    assert {key: stage._read(key, value) for key, value in fields.items()} == STATEMENTS[name]


def test_what_a_published_file_does_not_say_is_unknown_to_who_looks(outputs, tmp_path, capsys):
    values = {"limit": 64, "dataset": "photos"}
    # Of a snapshot its own epoch is known, and not how long its training was.
    names = f"{ENCODER}_epoch_50.pt", "simclr_best.t"
    state = wrap(simclr(True)[0])
    torch.save(state, tmp_path / names[0])
    torch.save({"model": state, "acc": 83.4, "epoch": 297}, tmp_path / names[1])
    source, stub = (idaa_lib.import_run(tmp_path / name, **values) for name in names)
    fields, statements = source.config.list_stated(), STATEMENTS[f"{ENCODER}_best.t"]
    assert {name: fields[name] for name in statements} == statements | {"dataset": "photos"}
    assert [run.environment["imported"]["epoch"] for run in (source, stub)] == [50, 297]
    assert (fields["backbone"], fields["width"], fields["projection_dim"]) == ("resnet18", 4, 6)
    for name in ("epochs", "learning_rate", "optimizer", "schedule", "vae", "temperature"):
        assert fields[name] == "unknown", name
    stub_fields = stub.config.list_stated()
    for name in ("batch_size", "epsilon", "alpha", "seed", "adversary", "epochs"):
        assert stub_fields[name] == "unknown", name
    assert "<td>batch_size</td><td>unknown</td>" in stub.config._repr_html_()
    assert "seed='unknown'" in repr(stub.config)
    assert results.name_of(source) == "SimCLR + IDAA"
    assert results.name_of(stub) == "SimCLR + an unknown adversary"
    evaluations = []
    for run in (source, stub):
        evaluations.append(runs.run_for(idaa_lib.EvalConfig(run=run.id), run.id))
        with evaluations[-1].writing(idaa_lib.EvalConfig(run=run.id), {}) as writer:
            writer.finish({"knn_top1": 50.0, "knn_n": 64})
    frame = results.results(evaluations)
    assert [*frame["seed"].unique()] == [3, "unknown"] and {*frame["epochs"]} == {"unknown"}
    (group,) = results.groups(frame)
    assert [*group.table["seed"]] == ["3", "unknown"]
    assert all(label.endswith(", of a file") for label in group.table.index)
    # A training that goes on from it has the recipe's values, and they are known.
    config = stub.config.replace(adversary="clae", continue_from=stub.id)
    assert "unknown" not in config.list_stated().values() and config.seed == 0
    # So are κ and β of a VAE, in its figures too.
    torch.save(dict(vae_state(32, dim=8, d=16)), tmp_path / "model_epoch292.pth")
    vae_ = idaa_lib.import_run(tmp_path / "model_epoch292.pth", **values)
    assert {"kappa", "beta"} <= vae_.config.unknown and "beta" not in vae_.summary
    assert "unknown" in str(row_of(vae_).texts)  # its seed, on the page of runs
    # Notebooks name it so.
    assert results.full_name(vae_).startswith("VAE β unknown, dim 8 · photos · ")
    assert results.full_name(stub).startswith("SimCLR + an unknown adversary ε unknown · photos · ")
    assert results.full_name(source).startswith("SimCLR + IDAA ε 0.03 · photos · seed 3 · ")
    vae_ = idaa_lib.import_run(tmp_path / "model_epoch292.pth", **values, beta=0.5)
    assert not {"kappa", "beta"} & vae_.config.unknown
    assert vae_.summary["beta"] == 0.5


def test_an_import_without_a_word_takes_the_data_of_its_name(
    outputs, tmp_path, capsys, monkeypatch
):
    """`python -m idaa_lib import model_epoch292.pth`, where CIFAR-10 lies in the data folder."""
    calls = []

    def photos(dataset, split, size, limit, **reading):
        calls.append(dataset)
        return open_images("photos", split, size, 50, **reading)

    monkeypatch.setattr(imported, "open_images", photos)
    for name, dataset in (("vae_cifar100_dim8_kl0.1_simclr", "cifar100"), ("mine", "cifar10")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model_epoch292.pth"
        torch.save(dict(vae_state(32, dim=8, d=16)), path)
        calls.clear()
        assert main(["import", str(path)]) == 0
        run = runs.find("vae")[0]
        assert {*calls} == {run.config.dataset} == {dataset}
        assert str(run.path) in capsys.readouterr().out


def test_a_published_vae_becomes_a_run(outputs, tmp_path):
    path = tmp_path / "model_epoch292.pth"
    state = vae_state(32, dim=8, d=16)
    torch.save(dict(state), path)
    values = {"limit": 64, "kappa": 0.3}
    run = idaa_lib.import_run(path, "photos", **values)
    assert run.finished
    assert runs.find("vae") == [run]
    assert idaa_lib.import_run(path, "photos", **values) == run
    assert (run.config.dim, run.config.width, run.config.kappa) == (8, 8, 0.3)
    assert run.environment["imported"]["file"] == path.name
    network = idaa_lib.load_vae(run)
    assert (network.mean, network.std) == CIFAR
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x).G, vae(state, x)[0], rtol=1e-3, atol=1e-4)
    assert run.summary["rate_nats"] > 0
    # A training takes it, as any other run, and names it by its content.
    config = idaa_lib.SSLConfig(
        dataset="photos", adversary="idaa", vae=run.id, limit=32, batch_size=16, epochs=1, width=4,
        device="cpu",
    )  # fmt: skip
    assert idaa_lib.train_ssl(config).config.vae == run.id


def test_units_make_another_run_and_the_command_says_all(outputs, tmp_path, capsys):
    path = tmp_path / "model.pth"
    torch.save(dict(vae_state(32, dim=8, d=16)), path)
    half = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    run_1 = idaa_lib.import_run(path, "photos", limit=50)
    run_2 = idaa_lib.import_run(path, "photos", limit=50, kappa=0.3, **half)
    assert idaa_lib.load_vae(run_1).mean == CIFAR[0]
    assert idaa_lib.load_vae(run_2).mean == half["mean"]
    capsys.readouterr()
    for run in (run_1, run_2):
        _, _, _, *words = shlex.split(runs.command(run))
        assert main(words) == 0
        assert str(run.path) in capsys.readouterr().out.splitlines()


def test_import_is_a_command(outputs, tmp_path, capsys):
    path = tmp_path / "model_epoch292.pth"
    torch.save(dict(vae_state(32, dim=8, d=16)), path)
    words = [
        "import",
        str(path),
        "dataset=photos",
        "limit=50",
        "kappa=3/10",
        "mean=0.5 0.5 0.5",
        "dim=8",
    ]
    assert main(words) == 0
    run = idaa_lib.import_run(path, "photos", limit=50, kappa=0.3, dim=8, mean=(0.5,) * 3)
    assert capsys.readouterr().out.startswith(str(run.path))
    assert main(["import", str(tmp_path / "x.pth"), "dataset=photos"]) == 2
    assert main([*words, "method=simclr"]) == 2
    assert main(["export"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("ConfigError: There is no checkpoint")
    assert errors[1] == "ConfigError: VAEConfig has no field 'method'."
    assert errors[2].startswith("`python -m idaa_lib import model_epoch292.pth")


@pytest.mark.parametrize(
    ("units", "field"),
    [
        ({"size": 0}, "size"),
        ({"size": -32}, "size"),
        ({"size": "large"}, "size"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": (math.nan,) * 3}, "mean"),
        ({"std": (0.2, 0.2, 0)}, "std"),
    ],
)
def test_units_that_no_images_have_are_refused(units, field, outputs, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(dict(simclr(False)[0]), path)
    for read in (interop.load_official, functools.partial(idaa_lib.import_run, dataset="photos")):
        with pytest.raises(ConfigError, match=f"^{field} must be ") as refusal:
            read(path, **units)
        assert len(str(refusal.value)) <= 400
    official = interop.load_official(path, size="64", mean="0.5 0.5 0.5", std=[0.25] * 3)
    assert official.units == (64, (0.5,) * 3, (0.25,) * 3)


def test_runs_that_an_import_names_are_there_and_count_by_their_content(outputs, tmp_path):
    """As a training's `vae` and `continue_from` do."""
    path = tmp_path / "model.pth"
    torch.save(dict(simclr(True)[0]), path)
    plain, named = (idaa_lib.import_run(path, "photos", vae=vae) for vae in (None, "starter"))
    assert plain.id != named.id
    assert (plain.config.vae, named.config.vae) == (None, "starter")
    folder = str(runs.get("vae", "starter").path)
    assert idaa_lib.import_run(path, "photos", vae=folder) == named
    for field in ("vae", "continue_from"):
        with pytest.raises(runs.RunError, match="nobody"):
            idaa_lib.import_run(path, "photos", **{field: "nobody"})


@pytest.mark.parametrize("name", ["plain_best.t", "simsiam_best.t", "checkpoint_0099.pth.tar"])
def test_a_published_encoder_becomes_a_run(name, outputs, tmp_path):
    make, pack, kind, legacy, pool, _, units = FILES[name]
    state, prefix, head, _ = make()
    torch.save(pack(state), tmp_path / name)
    with pytest.raises(ConfigError, match=r"has width=\d, not 99"):
        idaa_lib.import_run(tmp_path / name, "photos", width=99)
    with pytest.raises(ConfigError, match="adversary='none' does not go"):
        idaa_lib.import_run(tmp_path / name, "photos", adversary="none")
    run = idaa_lib.import_run(tmp_path / name, "photos", size=32, limit=64, epsilon=0.1)
    assert (run.config.method, run.config.adversary) == (kind, "idaa")
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(u)[:, None, None] for u in units)
    h = resnet(state, prefix, (images / 255 - mean) / std, legacy=legacy, pool=pool)
    for layer, expected in (("backbone", h), ("projector", F.normalize(head(h), dim=1))):
        encoder = idaa_lib.load_encoder(run, layer)
        values = features(encoder.module, images, *encoder[1:])
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)
    evaluation = idaa_lib.evaluate(
        idaa_lib.EvalConfig(run=run.id, limit=64, references=False, device="cpu")
    )
    assert evaluation.summary["knn_n"] == 64
    if kind == "plain":
        config = idaa_lib.EvalConfig(run=run.id, limit=64, references=False, protocol="official")
        official = idaa_lib.evaluate(config).summary
        assert official["knn_protocol"].endswith(", epoch of the file")


def test_a_uel_file_is_a_run_of_uel_where_one_says_so(outputs, tmp_path):
    torch.save({"net": wrap(plain(False)[0])}, tmp_path / "x_best.t")
    run = idaa_lib.import_run(tmp_path / "x_best.t", "photos", method="uel", limit=64)
    assert (run.config.method, run.config.augmentation) == ("uel", "normal")
    with pytest.raises(ConfigError, match="has method='plain', not 'simclr'"):
        idaa_lib.import_run(tmp_path / "x_best.t", "photos", method="simclr")


# --- the sibling systems (docs/spec/siblings.md §1.10, §2.9, §3.7) ---------------------------
# The models are written as the published code has them, on torchvision's ResNets: their own state
# dicts have the published names.


class Narrow(torchvision.models.ResNet):
    """Torchvision's ResNet with 4 channels where it has 64, or with 64, and without `fc`."""

    def __init__(self, name, stem, width=4):
        self.share = 64 // width
        block = torchvision.models.resnet
        super().__init__(block.Bottleneck if name == "resnet50" else block.BasicBlock, BLOCKS[name])
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = self.maxpool if stem in ("imagenet", "mini") else nn.Identity()
        self.features, self.fc = self.fc.in_features // self.share, nn.Identity()

    def _make_layer(self, block, planes, *arguments, **options):
        self.inplanes = self.inplanes // self.share if planes == 64 else self.inplanes
        return super()._make_layer(block, planes // self.share, *arguments, **options)


def perceptron(*sides, biases=False, last_bias=True, last=()):
    layers = []
    for inputs, outputs in itertools.pairwise(sides[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=biases), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sides[-2:], bias=last_bias), *last)


class PublishedRSA(nn.Module):
    def __init__(self, name="resnet18", stem="cifar", dim=6):
        super().__init__()
        self.encoder_q, self.encoder_k = Narrow(name, stem), Narrow(name, stem)
        d = self.encoder_q.features
        head = lambda inputs: perceptron(inputs, 2 * d, dim, biases=True, last_bias=False)  # noqa: E731
        self.encoder_q_head, self.encoder_k_head, self.pred = head(d), head(d), head(dim)


class PublishedIPIRM(nn.Module):
    def __init__(self, name="resnet18", width=4, dim=6):
        super().__init__()
        net = Narrow(name, "cifar", width)
        types = nn.Linear, nn.MaxPool2d
        parts = [
            m
            for k, m in net.named_children()
            if k not in ("maxpool", "fc") and not isinstance(m, types)
        ]
        self.f = nn.Sequential(*parts)
        self.g = perceptron(net.features, 512, dim)

    def forward(self, x):
        feature = self.f(x).flatten(1)
        return F.normalize(feature, dim=-1), F.normalize(self.g(feature), dim=-1)


class PublishedProjector(nn.Module):
    """CASSLE's `AugProjector`: [h ; γ(ω)] where γ has outputs, or h + γ(ω)."""

    def __init__(self, processor, projector, injection="cat"):
        super().__init__()
        self.aug_processor, self.projector, self.injection = processor, projector, injection

    def forward(self, h, omega):
        code = self.aug_processor(omega)
        match self.injection:
            case "add":
                return self.projector(h + code)
            case "mul":
                return self.projector(h * code)
            case "none":
                return self.projector(h)
        return self.projector(torch.cat([h, code], 1))


def diverse(module, seed=0):
    """All tensors drawn from `seed`: fresh norms would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.ndim == 1:  # a norm's, or a bias
            positive = name.endswith(("running_var", "weight"))
            tensor.copy_(
                torch.rand(tensor.shape, generator=generator) + (0.5 if positive else -0.5)
            )
        elif tensor.ndim:
            spread = (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return module.eval()


def pack(**parts):
    """As CASSLE's and AugSelf's logger saves them."""
    content = {
        name: part.state_dict() for name, part in parts.items() if isinstance(part, nn.Module)
    }
    content |= {
        k: {n: h.state_dict() for n, h in v.items()}
        for k, v in parts.items()
        if isinstance(v, dict)
    }
    training = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.03}]}
    return content | {
        "optimizers": [training],
        "schedulers": [{"T_max": 500, "last_epoch": 3}],
        "trainer": OrderedDict(epoch_length=10, max_epochs=500, iteration=30),
    }


def images(size=32, n=3):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
@pytest.mark.parametrize(("name", "stem", "file", "size", "units"), [
    ("resnet18", "cifar", "Train_cifar10_RSA_aa_200.pth.tar", 32, CIFAR),
    ("resnet18", "cifar", "Train_stl10_RSA_aa_200.pth.tar", 64,
     ((0.4408, 0.4279, 0.3867), (0.2682, 0.2610, 0.2686))),
    ("resnet50", "imagenet", "TrainMulti_ImageNet-100_RSA_200_beta0.4_lr0.2_wd0.0001.pth.tar", 224,
     IMAGENET),
])  # fmt: skip
def test_a_file_of_rsa_computes_what_its_model_does(name, stem, file, size, units, tmp_path):
    model = diverse(PublishedRSA(name, stem))
    state = model.state_dict()
    torch.save(wrap(state) if "Multi" in file else state, tmp_path / file)
    official = interop.load_official(tmp_path / file)
    assert (official.kind, official.epoch, official.module.stem) == ("rsa", 200, stem)
    assert (official.size, (official.mean, official.std)) == (size, units)
    x = images()
    h = model.encoder_q(x)
    torch.testing.assert_close(official.module(x), h, **CLOSE)
    torch.testing.assert_close(official.projector(h), model.encoder_q_head(h), **CLOSE)
    z = model.encoder_q_head(h)
    torch.testing.assert_close(official.predictor(z), model.pred(z), **CLOSE)
    t = official.target["backbone"](x)
    torch.testing.assert_close(t, model.encoder_k(x), **CLOSE)
    torch.testing.assert_close(official.target["projector"](t), model.encoder_k_head(t), **CLOSE)
    assert (t - h).abs().max() > 0.01


@torch.no_grad()
def test_max_pooling_would_give_other_features_and_no_complaint(tmp_path):
    """The trap of a 3×3 stem: the same tensors, with another network behind them."""
    model = diverse(PublishedRSA())
    torch.save(model.state_dict(), tmp_path / "x.pth.tar")
    network = Narrow("resnet18", "mini").eval()
    network.load_state_dict(model.encoder_q.state_dict())  # strict
    x = images()
    values, h = interop.load_official(tmp_path / "x.pth.tar").module(x), model.encoder_q(x)
    assert (network(x) - h).norm() > 0.3 * h.norm()
    torch.testing.assert_close(values, h, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "width"), [("resnet18", 4), ("resnet50", 64)])
def test_a_file_of_ipirm_computes_what_its_model_does(name, width, tmp_path):
    model = diverse(PublishedIPIRM(name, width))
    torch.save(wrap(model.state_dict()), tmp_path / "model_400.pth")
    official = interop.load_official(tmp_path / "model_400.pth")
    assert (official.kind, official.epoch, official.module.stem) == ("ipirm", 400, "cifar")
    assert (official.size, (official.mean, official.std)) == (32, CIFAR)
    x = images(16, 2)
    feature, z = model(x)
    torch.testing.assert_close(F.normalize(official.module(x), dim=1), feature, **CLOSE)
    torch.testing.assert_close(official.encoder("projector").module(x), z, **CLOSE)


def test_a_file_of_rsa_becomes_a_run_with_its_target(outputs, tmp_path):
    model = diverse(PublishedRSA())
    torch.save(model.state_dict(), tmp_path / "Train_cifar100_RSA_aa_200.pth.tar")
    path = tmp_path / "Train_cifar100_RSA_aa_200.pth.tar"
    run = idaa_lib.import_run(path, "photos", beta0=0.3, limit=64)
    config = run.config
    assert (config.method, config.stem, config.backbone) == ("rsa", "cifar", "resnet18")
    assert (config.beta0, config.augmentation, config.projection_dim) == (0.3, "rsa", 6)
    tensors, state = checkpoints.load(run)
    assert state["lacks"] == []
    target = {k.removeprefix("encoder_k."): v for k, v in model.state_dict().items()}
    weights = checkpoints.under("method.target.backbone.", tensors)
    assert torch.equal(weights["conv1.weight"], target["conv1.weight"])
    encoder = idaa_lib.load_encoder(run)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images()), model.encoder_q(images()), **CLOSE)
    for values, sentence in (
        ({"stem": "mini"}, "has stem='cifar', not 'mini'"),
        ({"method": "byol"}, "has method='rsa', not 'byol'"),
        ({"backbone": "resnet50"}, "has backbone='resnet18', not 'resnet50'"),
        ({"augmentation": "none"}, "draws no aggressive view"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            idaa_lib.import_run(path, "photos", limit=64, **values)


def test_what_a_file_of_ipirm_lacks_starts_as_in_a_new_run(outputs, tmp_path, capsys):
    model = diverse(PublishedIPIRM())
    torch.save(wrap(model.state_dict()), tmp_path / "model_25.pth")
    run = idaa_lib.import_run(tmp_path / "model_25.pth", "photos", limit=64)
    assert (run.config.method, run.config.batch_size) == ("ipirm", 256)
    images_ = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for layer, column in (("backbone", 0), ("projector", 1)):
        encoder = idaa_lib.load_encoder(run, layer)
        values = features(encoder.module, images_, *encoder[1:])
        mean, std = (torch.tensor(u)[:, None, None] for u in CIFAR)
        with torch.no_grad():
            expected = model((images_ / 255 - mean) / std)[column]
        torch.testing.assert_close(F.normalize(values, dim=1), expected, **CLOSE)
    config = run.config.replace(
        continue_from=run.id, epochs=1, batch_size=32, maximize_iter=1, device="cpu"
    )
    capsys.readouterr()
    training = idaa_lib.train_ssl(config)
    assert f"{run.id} lacks fitted, partitions for this run: new ones are made." in (
        capsys.readouterr().out
    )
    tensors, _ = checkpoints.load(training)
    assert tensors["method.partitions"].shape == (2, 64)
    assert tensors["method.fitted"] == 1
    # Again, with room for another number of partitions: from our own run, which has them.
    continuation = config.replace(continue_from=training.id, epochs=2)
    assert checkpoints.load(idaa_lib.train_ssl(continuation))[0]["method.fitted"] == 2
    assert f"{training.id} lacks" in capsys.readouterr().out


def test_the_kind_of_a_file_decides_its_stem(tmp_path):
    for model, sentence in (
        (PublishedIPIRM(), "first convolution is 7×7, and that of files of IP-IRM is 3×3"),
        (PublishedRSA(), "first convolution is 5×5, and that of files of RSA is 3×3 or 7×7"),
    ):
        state, side = model.state_dict(), 7 if "7×7" in sentence[:30] else 5
        key = next(iter(state))
        state[key] = torch.zeros(*state[key].shape[:2], side, side)
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ConfigError, match=sentence):
            interop.load_official(tmp_path / "x.pth")


@pytest.mark.parametrize("model", [PublishedRSA, PublishedIPIRM])
def test_every_tensor_of_a_siblings_file_counts(model, tmp_path):
    state = model().state_dict()
    keys = [k for k in state if k.endswith(("0.1.bn2.bias", "4.1.bn2.bias", "3.weight"))]
    assert len(keys) > 1
    for key in keys:
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "x.pth")
        with pytest.raises(ConfigError, match=f"it lacks {re.escape(key)}"):
            interop.load_official(tmp_path / "x.pth")
    torch.save(state | {f"{keys[-1]}s": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=f"beside what belongs there, {re.escape(keys[-1])}s"):
        interop.load_official(tmp_path / "x.pth")


KEYS = ("blur", "color", "color_diff", "crop", "flip", "grayscale")
README = tuple(key for key in KEYS if key != "flip")
# name → the projector that the published code builds after d features, what its forward needs, the
# predictor, and: method, keys of the condition, injection that must be said
LAYOUTS = {
    "moco, pretrain.py": (lambda d: perceptron(d, d, 6), None, "moco", (), None),
    "moco, proj-none": (
        lambda d: PublishedProjector(nn.Identity(), perceptron(d, d, 6), "none"),
        None, "moco", (), None),
    "moco, README": (lambda d: build(d, 13, perceptron(d + 8, d, 6)), None, "moco", README, None),
    "moco, with flip": (lambda d: build(d, 14, perceptron(d + 8, d, 6)), None, "moco", KEYS, None),
    "moco, raw": (
        lambda d: PublishedProjector(nn.Identity(), perceptron(d + 13, d, 6)),
        None, "moco", README, None),
    "moco, add": (
        lambda d: build(d, 13, perceptron(d, d, 6), "add", d), None, "moco", README, "add"),
    "moco, multiply": (
        lambda d: build(d, 13, perceptron(d, d, 6), "mul", d), None, "moco", README, "multiply"),
    "byol, AugSelf's width": (
        lambda d: perceptron(d, 24, 6), lambda: perceptron(6, 24, 6), "byol", (), None),
    "simsiam on STL-10": (
        lambda d: perceptron(d, 8, 8, last_bias=False, last=[nn.BatchNorm1d(8)]),
        lambda: perceptron(8, 2, 8), "simsiam", (), None),
    "simsiam on ImageNet, conditioned": (
        lambda d: build(d, 13, perceptron(
            d + 8, 8, 8, 8, last_bias=False, last=[nn.BatchNorm1d(8)])),
        lambda: perceptron(8, 2, 8), "simsiam", README, None),
    "barlow": (
        lambda d: perceptron(
            d, 8, 8, 8, last_bias=False, last=[nn.BatchNorm1d(8, affine=False)]),
        None, "barlow", (), None),
}  # fmt: skip


def build(d, inputs, projector, injection="cat", outputs=8):
    """Six layers of γ that end in a BatchNorm."""
    last = [nn.BatchNorm1d(outputs)]
    gamma = perceptron(inputs, *[8] * 5, outputs, last_bias=False, last=last)
    return PublishedProjector(gamma, projector, injection)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_cassle_computes_what_its_model_does(name, tmp_path):
    make, make_predictor, kind, keys, injection = LAYOUTS[name]
    backbone = diverse(Narrow("resnet18", "imagenet"))
    projector = diverse(make(backbone.features), 1)
    parts = {"backbone": backbone, "projector": projector}
    if make_predictor:
        parts["predictor"] = diverse(make_predictor(), 2)
    torch.save(pack(**parts), tmp_path / "ckpt-last.pth")
    model = interop.load_official(tmp_path / "ckpt-last.pth", injection=injection)
    assert (model.kind, model.epoch, model.module.stem) == (kind, 3, "imagenet")
    assert (model.size, model.mean, model.std) == (96, (0.43, 0.42, 0.39), (0.27, 0.26, 0.27))
    assert model.knobs["condition"] == keys
    x = images()
    h = backbone(x)
    torch.testing.assert_close(model.module(x), h, **CLOSE)
    omega = torch.randn(len(x), sum(len(NEUTRAL[key]) for key in keys))
    z = projector(h, omega) if isinstance(projector, PublishedProjector) else projector(h)
    torch.testing.assert_close(model.projector(*[h, omega][: 1 + bool(keys)]), z, **CLOSE)
    if keys:  # the layer `projector` is z at the neutral condition
        condition = torch.tensor([[v for key in keys for v in NEUTRAL[key]]], dtype=torch.float)
        z = projector(h, condition.expand(len(h), -1))
        assert (model.projector(h, omega) - z).abs().max() > 0.01
    encoding = model.encoder("projector").module(x)
    torch.testing.assert_close(encoding, F.normalize(z, dim=1), **CLOSE)
    if make_predictor:
        torch.testing.assert_close(model.predictor(z), parts["predictor"](z), **CLOSE)
    else:
        assert model.predictor is None


@torch.no_grad()
def test_a_file_of_augself_brings_its_heads(outputs, tmp_path):
    """DataParallel's prefixes, a ResNet-50, and a run of it."""
    backbone = diverse(Narrow("resnet50", "imagenet"))
    d = backbone.features
    projector = diverse(perceptron(d, d, 6), 1)
    heads = {k: diverse(perceptron(2 * d, 512, 512, n), n) for k, n in (("crop", 4), ("color", 4))}
    wrapper = nn.DataParallel(backbone)
    torch.save(
        pack(backbone=wrapper, projector=projector, ss_predictor=heads), tmp_path / "ckpt-500.pth"
    )
    official = interop.load_official(tmp_path / "ckpt-500.pth")
    assert (official.kind, official.size, (official.mean, official.std)) == ("moco", 224, IMAGENET)
    x = images(64)
    h = backbone(x)
    torch.testing.assert_close(official.module(x), h, **CLOSE)
    pairs = torch.cat([h, h.flip(0)], 1)
    for name, head in heads.items():
        torch.testing.assert_close(official.differences[name](pairs), head(pairs), **CLOSE)
    run = idaa_lib.import_run(
        tmp_path / "ckpt-500.pth", "photos", method="simclr", size=32, limit=64
    )
    config = run.config
    assert (config.preset, config.method, config.condition) == ("augself-imagenet100", "simclr", ())
    assert config.augself == {"color": 0.5, "crop": 0.5}
    encoder = idaa_lib.load_encoder(run)
    torch.testing.assert_close(encoder.module(x), h, **CLOSE)
    tensors, state = checkpoints.load(run)
    weights = checkpoints.under("method.network.differences.crop.", tensors)
    assert torch.equal(weights["6.weight"], heads["crop"][6].weight)
    assert state["lacks"] == []


def test_a_head_that_no_run_has_is_read_and_makes_no_run(outputs, tmp_path):
    backbone = Narrow("resnet18", "imagenet")
    d, path = backbone.features, tmp_path / "ckpt-500.pth"
    for name, n in (("rot", 4), ("sol", 1)):
        heads = {k: perceptron(2 * d, 512, 512, m) for k, m in (("crop", 4), (name, n))}
        projector = perceptron(d, d, 6)
        torch.save(pack(backbone=backbone, projector=projector, ss_predictor=heads), path)
        assert interop.load_official(path).differences.keys() == heads.keys()
        with pytest.raises(ConfigError, match=rf"ckpt-500.pth has AugSelf's head '{name}'"):
            idaa_lib.import_run(path, "photos", size=32, limit=64)
    assert not runs.find("ssl")


def test_a_file_of_cassle_becomes_a_run_that_a_training_continues(outputs, tmp_path, capsys):
    backbone = diverse(Narrow("resnet18", "imagenet"))
    d = backbone.features
    projector = diverse(build(d, 13, perceptron(d + 8, d, 6)), 1)
    path = tmp_path / "ckpt-200.pth"
    torch.save(pack(backbone=backbone, projector=projector), path)
    run = idaa_lib.import_run(path, "photos", size=32, limit=64, queue=128)
    config = run.config
    assert (config.preset, config.method, config.condition) == ("cassle-stl10", "moco", README)
    assert (config.gamma_depth, config.gamma_width, config.injection) == (6, 8, "concatenate")
    text = "crop, color, color_diff, blur, grayscale"
    values = {"size": 32, "limit": 64, "queue": 128}
    assert idaa_lib.import_run(path, "photos", condition=text, **values) == run
    x = images()
    encoder = idaa_lib.load_encoder(run, "projector")
    condition = torch.tensor([[v for key in README for v in NEUTRAL[key]]], dtype=torch.float)
    with torch.no_grad():
        z = projector(backbone(x), condition.expand(len(x), -1))
        torch.testing.assert_close(encoder.module(x), F.normalize(z, dim=1), **CLOSE)
    # The target is not in the file: as in a new run, it starts as the online network.
    tensors, _ = checkpoints.load(run)
    weights = checkpoints.under("method.network.", tensors)
    target = checkpoints.under("method.target.", tensors)
    assert target.keys() == weights.keys()
    assert all(torch.equal(target[k], weights[k]) for k in weights)
    capsys.readouterr()
    values = {"epochs": 1, "batch_size": 32, "device": "cpu"}
    idaa_lib.train_ssl(config.replace(continue_from=run.id, **values))
    assert f"{run.id} lacks oldest, queue, target for this run" in capsys.readouterr().out
    for values, sentence in (
        ({"method": "barlow"}, "has method='moco', not 'barlow'"),
        ({"heads": "own"}, "has heads='augself', not 'own'"),
        ({"gamma_width": 64}, "has gamma_width=8, not 64"),
        ({"stem": "cifar"}, "has stem='imagenet', not 'cifar'"),
        ({"projection_dim": 64}, "has projection_dim=6, not 64"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            idaa_lib.import_run(path, "photos", limit=64, **values)
    perceptrons = diverse(perceptron(d, 24, 6), 1), diverse(perceptron(6, 24, 6), 2)
    torch.save(pack(backbone=backbone, projector=perceptrons[0], predictor=perceptrons[1]), path)
    with pytest.raises(ConfigError, match="not of the network that method='byol' has here"):
        idaa_lib.import_run(path, "photos", limit=64)


def test_a_condition_that_the_tensors_contradict_is_refused(tmp_path):
    backbone = Narrow("resnet18", "imagenet")
    d = backbone.features

    def refusal(projector, **options):
        torch.save(pack(backbone=backbone, projector=projector), tmp_path / "ckpt-200.pth")
        with pytest.raises(ConfigError) as error:
            interop.load_official(tmp_path / "ckpt-200.pth", **options)
        assert re.fullmatch(r"[^\n]+\.", str(error.value)), error.value
        return str(error.value)

    readme = build(d, 13, perceptron(d + 8, d, 6))
    assert "given 13 values of a view, and condition='crop' names 4" in refusal(
        readme, condition="crop"
    )
    assert "given 5 values of a view, and condition='' names 0" in refusal(
        build(d, 5, perceptron(d + 8, d, 6))
    )
    assert "condition[0]" not in refusal(readme, condition="crop, zoom")
    assert "zoom" in refusal(readme, condition="crop, zoom")
    assert "injection must be 'concatenate'" in refusal(readme, injection="add")
    sum_projector = build(d, 13, perceptron(d, d, 6), "add", d)
    assert "injection must be 'add' or 'multiply', as its tensors have it, and is None" in refusal(
        sum_projector
    )
    assert "and is 'concatenate'" in refusal(sum_projector, injection="concatenate")
    bare_projector = perceptron(d, d, 6)
    assert "its projector is given no condition" in refusal(bare_projector, condition="crop")
    torch.save(PublishedRSA().state_dict(), tmp_path / "x.pth.tar")
    with pytest.raises(ConfigError, match="are of CASSLE's files, and it is of 'rsa'"):
        interop.load_official(tmp_path / "x.pth.tar", injection="add")


def test_files_of_the_siblings_that_are_not_read_are_named(tmp_path):
    backbone = Narrow("resnet18", "imagenet")
    d = backbone.features
    moco = perceptron(d, d, 6)
    v3 = perceptron(d, 24, 24, 6, last_bias=False, last=[nn.BatchNorm1d(6, affine=False)])
    hypernetwork = nn.ModuleDict({"projector_hn": perceptron(13, 8, 99)})
    vit = nn.ParameterDict({"cls_token": torch.zeros(1, 1, 4)})
    network = Narrow("resnet18", "cifar")
    for name, content in (
        ("MoCo-v3", pack(backbone=backbone, projector=v3)),
        ("MoCo-v3", {"state_dict": {"module.momentum_encoder.conv1.weight": torch.zeros(1)}}),
        ("SwAV", pack(backbone=backbone, projector=moco, prototypes=nn.Linear(6, 100, False))),
        ("hypernetwork", pack(backbone=backbone, projector=hypernetwork)),
        (r"vision transformer \(ViT\)", pack(backbone=vit, projector=moco)),
        (
            "first convolution is 3×3, and that of files of CASSLE and AugSelf is 7×7",
            pack(backbone=network, projector=moco),
        ),
    ):
        torch.save(content, tmp_path / "ckpt-200.pth")
        with pytest.raises(ConfigError, match=name):
            interop.load_official(tmp_path / "ckpt-200.pth")


# --- out ------------------------------------------------------------------------------------


def vary_norms(module):
    """Affine parameters and statistics of every norm drawn too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor in (part.running_mean, part.bias):
                    tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
                for tensor in (part.running_var, part.weight):
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module.eval()


def encoder(name="resnet18", width=4, stem="imagenet", adv=True):
    backbone = build_backbone(name, width=width, stem=stem, adversarial_norms=adv)
    return Encoder(vary_norms(backbone), 32, *IMAGENET)


def pictures(n=2, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_features(theirs, ours, x):
    torch.testing.assert_close(theirs.eval()(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "adv"), [("resnet18", False), ("resnet50", True)])
def test_torchvision_gives_the_same_features_with_our_weights(name, adv, tmp_path):
    ours = encoder(name, 64, adv=adv)
    path = idaa_lib.export(ours, tmp_path / "x.pth", "torchvision")
    theirs = torchvision.models.get_model(name)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    assert_same_features(theirs, ours.module, pictures())
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_discarded_stem_norm_survives_the_export(tmp_path):
    """Torchvision has no network without it: the exported one changes nothing there."""
    state = State()
    d = state.resnet("encoder.", "resnet18", 64, "ds", 7, False)
    state.linear("projector.0", d, d)
    state.linear("projector.2", 6, d)
    torch.save(dict(state), tmp_path / "mini.pt")
    official = interop.load_official(tmp_path / "mini.pt")
    path = idaa_lib.export(official, tmp_path / "x.pth", "torchvision")
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    x = pictures()
    expected = resnet(state, "encoder.", x, legacy=True, pool=True)
    assert_same_features(theirs, lambda _: expected, x)


def test_detectron2_reads_its_own_names(tmp_path):
    """Back by MoCo's published table of names, into torchvision's ResNet-50."""
    ours = encoder("resnet50", 64)
    path = idaa_lib.export(ours, tmp_path / "r50.pkl", "detectron2")
    content = pickle.loads(path.read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    names = content["model"]
    assert len(names) == 53 * 5  # each convolution: its weight and four of its norm
    assert {"stem.conv1.weight", "stem.conv1.norm.running_var", "res2.0.shortcut.weight",
            "res2.0.shortcut.norm.bias", "res4.5.conv3.weight", "res5.2.conv2.norm.weight",
            } <= names.keys()  # fmt: skip
    weights = {}
    for key, value in names.items():
        key = key.removeprefix("stem.").replace("shortcut.norm", "downsample.1")
        key = key.replace("shortcut", "downsample.0")
        key = re.sub(r"conv(\d)\.norm", r"bn\1", key)
        key = re.sub(r"res(\d)", lambda m: f"layer{int(m[1]) - 1}", key)
        weights[key] = torch.from_numpy(value)
    theirs = torchvision.models.resnet50()
    theirs.fc = nn.Identity()
    missing_keys, unexpected_keys = theirs.load_state_dict(weights, strict=False)
    assert not unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing_keys)
    assert_same_features(theirs, ours.module, pictures())


def test_safetensors_holds_any_encoder_with_its_units(tmp_path):
    ours = encoder(stem="cifar")
    path = idaa_lib.export(ours, tmp_path / "x.safetensors", "safetensors")
    tensors = load_file(path)
    assert tensors.keys() == torchvision_weights(ours.module).keys()
    assert not any("_adv" in key for key in tensors)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["mean"] == str(IMAGENET[0])
    assert (about["size"], about["stem"], about["width"]) == ("32", "cifar", "4")
    torch.save(dict(simclr(True)[0]), tmp_path / "x.pt")
    z = interop.load_official(tmp_path / "x.pt").encoder("projector")
    tensors = load_file(idaa_lib.export(z, tmp_path / "z", "safetensors"))
    assert "projector.2.bias" in tensors
    assert any("_adv" in key for key in z.module.state_dict())
    assert not any("_adv" in key for key in tensors)


def test_onnxruntime_gives_the_same_features(tmp_path):
    torch.save(dict(simclr(True)[0]), tmp_path / "x.pt")
    ours = interop.load_official(tmp_path / "x.pt").encoder("projector")
    path = idaa_lib.export(ours, tmp_path / "x.onnx", "onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx", "x.pt"]
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {p.key: p.value for p in graph.metadata_props}["mean"] == str(CIFAR[0])
    assert not any("_adv" in tensor.name for tensor in graph.graph.initializer)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = pictures(n, 32)
        (values,) = session.run(["features"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(values), ours.module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ending", "format"),
    [("onnx", "onnx"), ("ONNX", "onnx"), ("safetensors", "safetensors"), ("pkl", "detectron2")]
    + [(ending, "torchvision") for ending in ("pth", "pt", "bin")],
)
def test_the_ending_of_a_path_names_the_format(tmp_path, monkeypatch, ending, format):
    formats = []
    for name in writers._WRITERS:
        write = lambda encoder, path, name=name: formats.append(name)  # noqa: E731
        monkeypatch.setitem(writers._WRITERS, name, write)
    idaa_lib.export(encoder(), tmp_path / f"x.{ending}")
    idaa_lib.export(encoder(), tmp_path / f"x.{ending}", "safetensors")
    assert formats == [format, "safetensors"]


def test_what_a_format_cannot_hold_is_refused_with_the_reason(outputs, tmp_path):
    for format in ("torchvision", "detectron2"):
        for stem in ("cifar", "mini"):
            with pytest.raises(ConfigError, match=f"7×7.*stem='{stem}'"):
                idaa_lib.export(encoder(stem=stem), tmp_path / "x", format)
        module = Encoder(nn.Flatten(), 32, *IMAGENET)
        with pytest.raises(ConfigError, match="not a Flatten"):
            idaa_lib.export(module, tmp_path / "x", format)
    with pytest.raises(ConfigError, match="width=4"):
        idaa_lib.export(encoder(), tmp_path / "x", "torchvision")
    with pytest.raises(ConfigError, match="one of torchvision, safetensors, onnx, detectron2"):
        idaa_lib.export(encoder(), tmp_path / "x", "tensorflow")
    for format in ("safetensors", "onnx", "detectron2"):
        with pytest.raises(ConfigError, match="cannot be written"):
            idaa_lib.export(encoder(), tmp_path / "no" / "x", format)
    torch.save(dict(vae_state(32, 6, 16)), tmp_path / "vae.pth")
    with pytest.raises(ConfigError, match="holds no encoder"):
        idaa_lib.export(interop.load_official(tmp_path / "vae.pth"), tmp_path / "x", "onnx")
    with pytest.raises(idaa_lib.RunError, match="no finished ssl run"):
        idaa_lib.export(None, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["vae.pth"]
