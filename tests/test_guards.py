"""What makes a step fast on a GPU, without one: nothing in it waits for the device, draws on the
host or makes a tensor there; it compiles once; what a recording reads stays where it is."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from idaa_lib.adversaries import build_adversary
from idaa_lib.configs import SemiConfig, SSLConfig, VAEConfig
from idaa_lib.methods import About, build_method
from idaa_lib.methods.vae import VAETraining
from idaa_lib.nets.resnet import ResNet
from idaa_lib.nets.vae import VAE
from idaa_lib.registry import CHOICES
from idaa_lib.train import loop
from idaa_lib.train.loop import Fit
from idaa_lib.views import recipe

SIZE, B, N = 16, 4, 24
MEAN, STD = (0.5,) * 3, (0.25,) * 3
METHODS = ("simclr", "plain", "uel", "simsiam", "moco", "byol", "barlow", "rsa", "fixmatch")
ADVERSARIES = ("none", "clae", "idaa", "random_sign")


class OnDevice(TorchDispatchMode):
    """Counts operations; refuses a value that the host reads, a draw, and a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        kwargs = kwargs or {}
        name = str(function)
        assert "_local_scalar_dense" not in name and not name.startswith("aten.equal"), name
        assert not any(isinstance(v, torch.Generator) for v in (*args, *kwargs.values())), name
        assert not any(word in name for word in ("aten.rand", "aten.normal", "bernoulli")), name
        result = function(*args, **kwargs)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type != "cpu", f"{name} makes a tensor on the host"
        return result


def a_config(method, adversary):
    values = dict(size=SIZE, width=4, batch_size=B, adversary=adversary, epochs=2, device="cpu")
    values |= {"backbone": "wrn10" if method == "fixmatch" else "tiny"}
    if method == "fixmatch":
        return SemiConfig(**values, mu=2, labels_per_class=2)
    return SSLConfig(**values, method=method, **({"queue": 8} if method == "moco" else {}))


def a_fit(config, device, monkeypatch, dtype=torch.float32):
    """A `Fit` of random images on a device that may be no real one."""
    about = About(
        recipe(config.augmentation, SIZE, MEAN, STD),
        torch.arange(N) % 2,
        2,
        config.epochs,
        config.batch_size,
    )
    if config.stage == "vae":
        method, adversary = VAETraining(config, about), None
    else:
        method = build_method(config, about)
        adversary = build_adversary(config, VAE(8, SIZE, width=4).to(dtype), mean=None, std=None)
    build_plain = lambda name, groups, rate: torch.optim.SGD(  # noqa: E731 - fused knows no such device
        groups, rate, momentum=0.9, foreach=False
    )
    monkeypatch.setattr(loop, "build_optimizer", build_plain)
    if device == "meta":  # which autocast does not know
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    accelerator = SimpleNamespace(
        device=torch.device(device),
        num_processes=1,
        process_index=0,
        mixed_precision="no",
        autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward(),
        unwrap_model=lambda model, **_: model,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return Fit(accelerator, method.to(dtype).train(), images, config, adversary)


def a_step(fit, step=0):
    """What a step is given, and the work that a recording would hold."""
    batch = next(iter(fit.method.batches(0)))
    batch = {name: index.to(fit.device) for name, index in batch.items()}
    size = fit.method.recipe.size
    images = {
        name: torch.zeros(len(index), 3, size, size, dtype=torch.uint8, device=fit.device)
        for name, index in batch.items()
    }
    numbers = fit._numbers(step, {name: len(index) for name, index in batch.items()})
    return images, batch, numbers


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A ResNet of two blocks, one of which projects, which is soon traced and compiled."""
    monkeypatch.setitem(CHOICES["backbone"], "tiny", lambda **knobs: ResNet((1, 1), **knobs))


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_nothing_but_launch_work_on_the_device(method, adversary, monkeypatch):
    fit = a_fit(a_config(method, adversary), "meta", monkeypatch)
    arguments = a_step(fit)
    with OnDevice() as mode:
        fit._work(*arguments)
    if (method, adversary) == ("simclr", "idaa"):
        assert mode.count < 1720  # 1,656 with views and the parts of a plain optimiser


def test_the_vae_s_step_does_nothing_but_launch_work_on_the_device(monkeypatch):
    config = VAEConfig(size=SIZE, width=4, dim=8, batch_size=B, epochs=2, device="cpu")
    fit = a_fit(config, "meta", monkeypatch)
    arguments = a_step(fit)
    with OnDevice():
        fit._work(*arguments)


@pytest.mark.parametrize("kind", ["resnet", "wrn", "vae"])
def test_a_compiled_step_is_compiled_once_and_is_the_plain_one(kind, monkeypatch):
    """By inductor, in fp64, where rounding turns no sign: losses and weights after three steps."""
    config = {
        "resnet": a_config("simclr", "idaa"),
        "wrn": a_config("fixmatch", "clae"),
        "vae": VAEConfig(size=SIZE, width=4, dim=8, batch_size=B, epochs=2, device="cpu"),
    }[kind]
    outcomes = []
    for compiles in (False, True):
        torch.compiler.reset()
        fit = a_fit(config.replace(compile=compiles), "cpu", monkeypatch, torch.float64)
        fit.method._makers = {}  # views are drawn in fp32, where compilation rounds otherwise
        draw, losses = fit.method.draw, []
        fit.method.draw = lambda *arguments, draw=draw: tuple(
            view._replace(images=view.images.double()) for view in draw(*arguments)
        )
        for step in range(3):
            stance = "fail_on_recompile" if compiles and step > 0 else "default"
            with torch.compiler.set_stance(stance):
                images, batch, _ = a_step(fit)
                images = {k: fit.feed.images[index] for k, index in batch.items()}
                losses.append(fit.train_step(step, images, batch)["loss"].item())
        outcomes.append((losses, fit.method.state_dict()))
    (loss, weights), (compiled_loss, compiled_weights) = outcomes
    assert compiled_loss == pytest.approx(loss, rel=1e-6)  # a loss is logged in fp32
    for name, value in weights.items():
        torch.testing.assert_close(compiled_weights[name], value, rtol=1e-7, atol=1e-8, msg=name)


def test_parameters_and_buffers_stay_where_they_are(monkeypatch):
    """Over validation and a checkpoint: a recording reads and writes these addresses."""
    fit = a_fit(a_config("moco", "idaa"), "cpu", monkeypatch)
    images, batch, _ = a_step(fit)
    fit.train_step(0, images, batch)
    fit.steps = SimpleNamespace(step=1)

    def addresses():
        parts = {**dict(fit.method.named_parameters()), **dict(fit.method.named_buffers())}
        return {name: tensor.data_ptr() for name, tensor in parts.items()}

    before = addresses()
    fit.validate = lambda method, pulse: {
        "n": float(len(method.encoder("backbone").eval().state_dict()))
    }
    fit._validate()
    fit.state()
    fit.method.train()
    fit.train_step(1, images, batch)
    assert addresses() == before
