"""A recorded step trains like one that is not, bit for bit: on a tape, which plays the part of a
CUDA graph on the CPU, and on a GPU."""

import shutil

import pytest
import torch
from conftest import outcome
from torch.utils._python_dispatch import TorchDispatchMode

from idaa_lib import runs
from idaa_lib.adversaries import ascent
from idaa_lib.configs import ConfigError, SemiConfig, SSLConfig, VAEConfig
from idaa_lib.methods import METHODS
from idaa_lib.methods.simclr import SimCLR
from idaa_lib.train import locate, loop, train, train_ssl, train_vae
from idaa_lib.train.loop import Fit

TINY = {"limit": 96, "batch_size": 16, "epochs": 2, "width": 4, "log_every": 4, "device": "cpu"}
SSL = TINY | {"projection_dim": 8, "precision": "fp32"}
VAE = VAEConfig(**TINY, dim=8)


class Tape(TorchDispatchMode):
    """Notes each operation below autograd and does it again on the same tensors, as a CUDA graph
    does with kernels; refuses what a graph cannot hold: a value that the host reads, a draw."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def warm_up(self, work):
        return work()

    def record(self, work):
        with self:
            return work()

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # to note them on a CPU was to do them
            return
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                repeat = function(*args, **kwargs)
                if not function._schema.is_mutable:
                    for old, new in zip(tensors(result), tensors(repeat), strict=True):
                        old.copy_(new)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        has_draws = any(isinstance(v, torch.Generator) for v in (*args, *kwargs.values()))
        if has_draws or "_local_scalar_dense" in name or name.startswith("aten.equal"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = function(*args, **kwargs)
        if not function.is_view:
            self.operations.append((function, args, kwargs, result))
        return result


def tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.fixture
def tapes(monkeypatch):
    """Steps are recorded, and attacks look at nothing: as on a GPU with compile=True."""
    record = []

    def tape():
        record.append(Tape())
        return record[-1]

    def recordable(fit):
        kinds = (type(fit.method), type(fit.adversary))
        return all(vars(kind).get("recordable", False) for kind in kinds)

    monkeypatch.setattr(loop, "CudaGraph", tape)
    monkeypatch.setattr(Fit, "_recordable", recordable)
    monkeypatch.setattr(ascent, "waits", lambda device: True)
    return record


def assert_same(first, second):
    for before, after in zip(first[0].items(), second[0].items(), strict=True):
        assert before[0] == after[0]
        assert torch.equal(before[1], after[1]), before[0]
    assert first[1:4] == second[1:4]


CASES = [
    VAE,
    *(SSLConfig(**SSL, method=m) for m in ("plain", "uel", "byol", "rsa")),
    SSLConfig(**SSL, method="moco", queue=32, adversary="clae"),
    SSLConfig(**SSL, method="simsiam", adversary="clae"),
    *(SSLConfig(**SSL, method=m, adversary="idaa") for m in ("simclr", "byol")),
    SSLConfig(**SSL, method="moco", queue=32, adversary="idaa"),
    SSLConfig(**SSL, adversary="random_sign"),
    SSLConfig(**SSL, adversary="idaa", random_start=True),
    SSLConfig(**SSL, method="simsiam", pairing="imagenet", adversary="idaa"),
    SSLConfig(**SSL, adversary="idaa", steps=3, norm="l2"),
    SSLConfig(**SSL, adversary="idaa", reuse_anchor=False),
    SSLConfig(**SSL | {"precision": "bf16"}, adversary="idaa"),
    SemiConfig(**TINY | {"limit": 200, "batch_size": 4}, mu=2, adversary="idaa"),
]  # fmt: skip


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.stage}-{getattr(c, 'method', '')}")
def test_a_recorded_training_is_the_same_training(config, outputs, monkeypatch, tapes):
    if getattr(config, "needs_vae", False):
        train_vae(VAE)
    tapes.clear()
    result = outcome(train(config))
    assert [tape.replays for tape in tapes] == [locate(config).state["steps"] - 3]
    shutil.rmtree(locate(config).path)
    monkeypatch.setattr(Fit, "_recordable", lambda fit: False)
    assert_same(result, outcome(train(config)))


def test_what_does_not_say_that_it_can_be_recorded_is_not(outputs, tapes, monkeypatch):
    """A subclass of ours may do anything in Python, whatever its parent says."""

    class Own(SimCLR):
        pass

    monkeypatch.setitem(METHODS, "own", Own)
    assert train_ssl(SSLConfig(**SSL, method="own")).finished
    assert not tapes


def test_a_step_that_reads_a_value_is_told_what_to_do(outputs, tapes, monkeypatch):
    class Reads(SimCLR):
        recordable = True

        def step(self, views, batch, moment):
            step = super().step(views, batch, moment)
            step.parts["read"] = torch.tensor(step.loss.item())
            return step

    monkeypatch.setitem(METHODS, "reads", Reads)
    with pytest.raises(
        ConfigError, match=r"cannot be \(operation not permitted.*recordable = False"
    ):
        train_ssl(SSLConfig(**SSL, method="reads"))
    Reads.recordable = False
    assert train_ssl(SSLConfig(**SSL, method="reads")).finished


def test_a_recorded_attack_that_is_not_finite_is_told(outputs, tapes, monkeypatch):
    train_vae(VAE)
    config = SSLConfig(**SSL | {"log_every": 5}, adversary="idaa")
    original = Fit.train_step

    def step(fit, step, *args):
        if step == 7:
            fit.adversary.vae.fc21.bias.data.fill_(torch.nan)
        return original(fit, step, *args)

    monkeypatch.setattr(Fit, "train_step", step)
    with pytest.raises(runs.RunError, match="By step 10: An attack's gradient was not finite"):
        train_ssl(config)


@pytest.mark.gpu
@pytest.mark.parametrize("adversary", ["none", "clae", "idaa"])
def test_a_cuda_graph_trains_like_single_launches(outputs, adversary, monkeypatch):
    """In fp32 over twelve steps, of which nine are replayed. The rate is small: an attack's signs
    turn where a gradient is nearly 0, and Adam makes much of it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    train_vae(VAE)
    options = {"device": "cuda", "adversary": adversary, "learning_rate": 1e-5}

    def losses(compile):
        config = SSLConfig(**SSL | options, compile=compile)
        if locate(config).finished:  # `compile` is no part of a run's identity
            shutil.rmtree(locate(config).path)
        return [r["loss"] for r in train_ssl(config).metrics() if "loss" in r]

    graph_losses, launch_losses = losses(True), losses(False)
    monkeypatch.setattr(Fit, "_recordable", lambda fit: False)
    assert graph_losses == pytest.approx(losses(True), rel=1e-3)
    assert graph_losses == pytest.approx(launch_losses, rel=2e-2)
