"""Several processes train as one does on the global batch."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from idaa_lib import SSLConfig, VAEConfig, runs
from idaa_lib.methods import About, build_method
from idaa_lib.nets.processes import share_statistics
from idaa_lib.runs import checkpoints
from idaa_lib.train import locate, train_ssl, train_vae
from idaa_lib.views import recipe

COMMON = dict(dataset="photos", limit=64, size=16, epochs=2, batch_size=16, precision="fp32")
COMMON |= dict(device="cpu", log_every=1)
TRAININGS = [
    dict(
        method=method,
        adversary="idaa",
        width=4,
        knn_every=2,
        norm="l2",
        optimizer="sgd",
        learning_rate=1e-5,
    )
    for method in ("simclr", "moco", "simsiam")
]
SCRIPT = """
import sys
from idaa_lib import SSLConfig
from idaa_lib.train import train_ssl
for values in eval(sys.argv[1]):
    train_ssl(SSLConfig(**values))
"""


@pytest.fixture(scope="module")
def configs(module_outputs):
    vae = train_vae(VAEConfig(**COMMON, width=4, dim=8))
    return [SSLConfig(**COMMON, **own, vae=str(vae.path)) for own in TRAININGS]


@pytest.fixture(scope="module")
def shared(configs, tmp_path_factory):
    """The trainings by two processes, in outputs of their own."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(folder))
        values = repr(
            [COMMON | own | {"vae": c.vae} for own, c in zip(TRAININGS, configs, strict=True)]
        )
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, "--nproc-per-node=2", str(folder / "script.py"), values]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        return [locate(config) for config in configs]


@pytest.mark.parametrize("which", range(3), ids=[own["method"] for own in TRAININGS])
def test_two_processes_train_as_one_does(which, configs, shared, module_outputs):
    """Weights and statistics, adversarial norms too, after 8 steps in fp32. By SGD, slowly: Adam's
    first step has the size of its rate also where a gradient is rounding alone, and at a high rate
    so small a network multiplies each rounding by 30 a step."""
    two, one = shared[which], train_ssl(configs[which])
    assert one.id == two.id and one.path != two.path
    start = build_method(configs[which], About(recipe("none", 16, (0,) * 3, (1,) * 3)))
    own, theirs = (checkpoints.load(run)[0] for run in (one, two))
    rows = {f"method.{name}": value for name, value in start.named_parameters()}
    moved = max((own[name] - value).abs().max().item() for name, value in rows.items())
    apart = {
        name: ((value - theirs[name]).abs() / value.abs().clamp(min=1)).max().item()
        for name, value in own.items()
        if value.is_floating_point() and value.numel()
    }
    weights = [difference for name, difference in apart.items() if name in rows]
    assert 0 < max(weights) < min(1e-5, moved / 20)
    assert any("running_var" in name and "_adv" in name for name in apart)
    assert not {name: d for name, d in apart.items() if "running" in name and d > 2e-3}
    assert len(one.metrics()) == len(two.metrics())
    for line, other in zip(one.metrics()[:2], two.metrics(), strict=False):
        common = ("loss", "clean_loss", "adversarial_loss", "moved")
        own, theirs = ({k: v for k, v in each.items() if k in common} for each in (line, other))
        assert own == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_one_process_where_two_were_asked_for_is_a_sentence(outputs):
    words = [f"{name}={value}" for name, value in COMMON.items()]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    command += ["--mixed_precision=no", "--num_machines=1", "--dynamo_backend=no"]
    command += ["-m", "idaa_lib.train", "ssl", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode and "write torchrun --nproc_per_node=2 in place of" in done.stderr
    assert not runs.find("ssl", finished=False)


# --- statistics of the global batch


def parts_of(rank, processes, share):
    """This rank's output, gradient and statistics of BatchNorms of a global batch of 12, of which
    two processes have 7 and 5."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(5), nn.BatchNorm2d(5, momentum=0.01), nn.BatchNorm1d(5, affine=False)]
    network = nn.ModuleList(norms).double()
    if share:
        share_statistics(network)
    results = []
    for norm, shape in zip(network, [(12, 5), (12, 5, 3, 2), (12, 5)], strict=True):
        x = torch.randn(shape, dtype=torch.double) * 3 + 1
        weight = torch.randn(shape, dtype=torch.double)
        rows = torch.arange(12).split([12] if processes == 1 else [7, 5])[rank]
        mine = x[rows].clone().requires_grad_()
        y = norm(mine)
        (y.square() * weight[rows]).sum().backward()
        results.append([y.detach(), mine.grad, norm.running_mean, norm.running_var])
    evaluated = network[0].eval()(torch.ones(2, 5, dtype=torch.double)).detach()
    return results, evaluated


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(parts_of(rank, 2, share=True), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shared_statistics_are_torch_s_batchnorm_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    whole, evaluated = parts_of(0, 1, share=False)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for i, (y, gradient, mean, var) in enumerate(whole):
        halves = [results[i] for results, _ in ranks]
        torch.testing.assert_close(torch.cat([half[0] for half in halves]), y)
        torch.testing.assert_close(torch.cat([half[1] for half in halves]), gradient)
        for half in halves:
            torch.testing.assert_close(half[2], mean)
            torch.testing.assert_close(half[3], var)
    for _, own in ranks:
        torch.testing.assert_close(own, evaluated)
