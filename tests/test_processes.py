"""Several processes train as one does on the global batch."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from idaa_lib import ConfigError, EvalConfig, SSLConfig, VAEConfig, evaluate, runs
from idaa_lib.evaluate.stage import results
from idaa_lib.methods import About, Classifier, OfficialProtocol, build_method
from idaa_lib.methods.simclr import SimCLR
from idaa_lib.nets.processes import do_once, share, share_statistics
from idaa_lib.runs import Run, RunError, Stopped, checkpoints, machine
from idaa_lib.runs.steps import Steps
from idaa_lib.train import locate, train_ssl, train_vae
from idaa_lib.train.__main__ import main as train_command
from idaa_lib.train.loop import Fit
from idaa_lib.views import keyed_generator, recipe

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


def judge(run):
    """The evaluations of `run` by the clean protocol, and by one on crops. Of 97 images and of
    batches of 33 two processes cannot take as many each."""
    classifier = Classifier("lars", 0.1, "cosine", epochs=3, standardise=True)
    protocol = OfficialProtocol("a test", "backbone", 0.1, "projector", "last", 33, classifier)
    common = dict(run=run, limit=97, references=False, precision="fp32", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimCLR, "official_protocol", lambda config: protocol)
        return [evaluate(EvalConfig(protocol=p, **common)) for p in ("clean", "official")]


def main(trainings):
    """What each of two processes does."""
    encoders = [train_ssl(SSLConfig(**values)) for values in eval(trainings)]
    evaluations = judge(encoders[0].id)
    if dist.get_rank() == 0:
        print("runs:", *(run.path for run in encoders + evaluations))


@pytest.fixture(scope="module")
def configs(module_outputs):
    vae = train_vae(VAEConfig(**COMMON, width=4, dim=8))
    return [SSLConfig(**COMMON, **training, vae=str(vae.path)) for training in TRAININGS]


@pytest.fixture(scope="module")
def shared(configs, tmp_path_factory):
    """The trainings by two processes, and evaluations of the first, in outputs of their own."""
    folder = tmp_path_factory.mktemp("two")
    pairs = zip(TRAININGS, configs, strict=True)
    values = repr([COMMON | training | {"vae": config.vae} for training, config in pairs])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node=2", __file__, values]
    environment = os.environ | {"IDAA_OUTPUTS": str(folder)}
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Warning" not in process.stderr
    return [Run(Path(path)) for path in process.stdout.partition("runs: ")[2].split()]


@pytest.mark.parametrize("which", range(3), ids=[training["method"] for training in TRAININGS])
def test_two_processes_train_as_one_does(which, configs, shared, module_outputs):
    """Weights and statistics, adversarial norms too, after 8 steps in fp32. By SGD, slowly: Adam's
    first step has the size of its rate also where a gradient is rounding alone, and at a high rate
    so small a network multiplies each rounding by 30 a step."""
    two, one = shared[which], train_ssl(configs[which])
    assert one.id == two.id and one.path != two.path
    start = build_method(configs[which], About(recipe("none", 16, (0,) * 3, (1,) * 3)))
    ours, theirs = (checkpoints.load(run)[0] for run in (one, two))
    rows = {f"method.{name}": value for name, value in start.named_parameters()}
    movement = max((ours[name] - value).abs().max().item() for name, value in rows.items())
    differences = {
        name: ((value - theirs[name]).abs() / value.abs().clamp(min=1)).max().item()
        for name, value in ours.items()
        if value.is_floating_point() and value.numel()
    }
    weights = [difference for name, difference in differences.items() if name in rows]
    assert 0 < max(weights) < min(1e-5, movement / 20)
    assert any("running_var" in name and "_adv" in name for name in differences)
    assert not {name: d for name, d in differences.items() if "running" in name and d > 2e-3}
    assert len(one.metrics()) == len(two.metrics())
    for line, other in zip(one.metrics()[:2], two.metrics(), strict=False):
        common = ("loss", "clean_loss", "adversarial_loss", "moved")
        common += ("alignment", "uniformity", "embedding_std")
        ours, theirs = ({k: v for k, v in each.items() if k in common} for each in (line, other))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("which", range(2), ids=["clean", "crops"])
def test_two_processes_judge_as_one_does(which, shared, module_outputs):
    one, two = judge(str(shared[0].path))[which], shared[3 + which]
    assert one.path != two.path and two.config.protocol == one.config.protocol
    for name, value in (one.summary | {"seconds": two.summary["seconds"]}).items():
        tolerance = {"rel": 1e-4} if isinstance(value, float) else {}
        assert two.summary[name] == pytest.approx(value, **tolerance), name
    for name, tensor in results(one).items():
        torch.testing.assert_close(tensor, results(two)[name], rtol=1e-4, atol=1e-6)


def test_processes_are_no_part_of_a_run_s_identity(configs):
    assert locate(configs[0].replace(processes=2)) == locate(configs[0])
    with pytest.raises(ConfigError, match="batch_size=16 cannot be shared by processes=3: take a"):
        configs[0].replace(processes=3)


@pytest.mark.parametrize("stage", ["vae", "ssl"])
def test_the_command_line_starts_as_many_processes(stage, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda path, words: calls.append(words) or sys.exit(7))
    with pytest.raises(SystemExit):
        train_command([stage, "processes=4", "device=cpu"])
    assert calls[0][-6:] == [
        *("--nproc-per-node=4", "-m", "idaa_lib.train", stage, "processes=4", "device=cpu")
    ]
    # A launcher that started another number, or none: a library's call.
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="processes=4, but this is 1 of 1: leave it out, or run"):
        machine.meet(SSLConfig(processes=4))


def test_one_process_where_two_were_asked_for_is_a_sentence(outputs):
    words = [f"{name}={value}" for name, value in COMMON.items()]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    command += ["--mixed_precision=no", "--num_machines=1", "--dynamo_backend=no"]
    command += ["-m", "idaa_lib.train", "ssl", *words]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode and "write torchrun --nproc_per_node=2 in place of" in process.stderr
    assert not runs.find("ssl", finished=False)


# --- statistics of the global batch


def parts_of(rank, processes, share):
    """This rank's output, gradient and statistics of BatchNorms of a global batch of 12, of which
    two processes have 7 and 5."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(5), nn.BatchNorm2d(5, momentum=0.01), nn.BatchNorm1d(5, affine=False)]
    norms += [nn.BatchNorm1d(5, momentum=None)]  # the mean of all batches
    network = nn.ModuleList(norms).double()
    if share:
        share_statistics(network)
    results = []
    for norm, shape in zip(network, [(12, 5), (12, 5, 3, 2), (12, 5), (12, 5)], strict=True):
        x = torch.randn(shape, dtype=torch.double) * 3 + 1
        weight = torch.randn(shape, dtype=torch.double)
        rows = torch.arange(12).split([12] if processes == 1 else [7, 5])[rank]
        leaf = x[rows].clone().requires_grad_()
        y = norm(leaf)
        (y.square() * weight[rows]).sum().backward()
        results.append([y.detach(), leaf.grad, norm.running_mean, norm.running_var])
    output = network[0].eval()(torch.ones(2, 5, dtype=torch.double)).detach()
    return results, output


def steps_of(rank, folder, **control):
    """Steps of a run that is asked to pause, for longer than an exchange may take, and to stop;
    the first process alone has the run's directory. The steps that are taken until then."""
    events, start = [], time.monotonic()

    class Asked(Run):
        @property
        def request(self):
            if events[-1] == 5 and "stop" in control:
                return "stop"
            pauses = events[-1] == 3 and time.monotonic() - start < control["pause"]
            return "pause" if pauses else None

    run = Asked(Path(folder, f"of {rank}", "vae", "run"))
    writer = SimpleNamespace(run=run, log=lambda **line: None)
    writer.state = writer.rewind = lambda *args, **news: None
    steps = Steps(
        run,
        writer if rank == 0 else None,
        9,
        per_epoch=9,
        images=1,
        log_every=2,
        state=lambda: ({"weights": torch.tensor([7.0 + rank])}, {}),
        restore=lambda tensors, values: events.append(tensors["weights"].item()),
    )
    steps.resume()
    try:
        for step in steps:
            events.append(step)
            steps.add({"loss": torch.tensor(1.0)})
    except Stopped as error:
        events.append(str(error))
    return events


PARTITIONS = {
    "offline": {},
    "online": {"offline": False, "random_init": False},
    "mixed": {"mixup": True, "mixup_max": True, "offline": False},
}


def partition_of(rank, processes, values):
    """The partition that a training by IP-IRM fits before its first epoch, of 61 images."""
    config = SSLConfig(method="ipirm", width=4, size=16, projection_dim=8, batch_size=16, **values)
    shape = 61, 3, 16, 16
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=keyed_generator(1))
    views = recipe("ipirm", 16, (0.5,) * 3, (0.25,) * 3)
    method = build_method(config, About(views, torch.zeros(61), batch_size=16))
    place = dict(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    place |= dict(mixed_precision="no", print=print, unwrap_model=lambda network, **how: network)
    fit = Fit(SimpleNamespace(**place), method, images, config)
    fit._before_epoch(SimpleNamespace(step=0, saved=0, pulse=lambda message: None))
    return method.present()


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    parts = parts_of(rank, 2, share=True)
    # torch 2.11 has it under its old name.
    limit = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    limit(timedelta(seconds=3))
    events = [steps_of(rank, folder, pause=4, stop=True), steps_of(rank, folder, pause=0)]
    with pytest.raises(RunError, match="no good"):
        do_once(lambda: refuse(rank))
    table, counts = torch.arange(30).view(10, 3), []

    def look_up(index):
        counts.append(len(index))
        return table[index]

    for start, stop in ((0, 10), (3, 8), (9, 10)):  # as many each, one left over, one alone
        assert torch.equal(share(range(start, stop), look_up), table[start:stop])
    assert counts == [5, 3, 1]
    partitions = [partition_of(rank, 2, values) for values in PARTITIONS.values()]
    torch.save((*parts, partitions, events), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def refuse(rank):
    raise RunError("no good" if rank == 0 else "nobody asks this one")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saved."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_processes_pause_stop_and_resume_as_one(ranks):
    """None waits in an exchange through a pause; the checkpoint is read by the first alone."""
    sentence = "Stopped (stop) after step 6 of 9 and saved: start the same run again to continue."
    for *_, (events_before, events_after) in ranks:
        assert events_before == [0, 1, 2, 3, 4, 5, sentence]
        assert events_after == [7.0, 6, 7, 8]


def test_shared_statistics_are_torch_s_batchnorm_of_the_whole_batch(ranks):
    expected, output = parts_of(0, 1, share=False)
    for i, (y, gradient, mean, var) in enumerate(expected):
        halves = [results[i] for results, *_ in ranks]
        torch.testing.assert_close(torch.cat([part[0] for part in halves]), y)
        torch.testing.assert_close(torch.cat([part[1] for part in halves]), gradient)
        for part in halves:
            torch.testing.assert_close(part[2], mean)
            torch.testing.assert_close(part[3], var)
    for _, rank_output, *_ in ranks:
        torch.testing.assert_close(rank_output, output)


@pytest.mark.parametrize("which", range(len(PARTITIONS)), ids=PARTITIONS)
def test_two_processes_have_the_partition_that_one_has(which, ranks):
    expected = partition_of(0, 1, [*PARTITIONS.values()][which])
    assert len(expected) == 1 and len(expected.unique()) == 2
    assert all(torch.equal(partitions[which], expected) for *_, partitions, _ in ranks)


if __name__ == "__main__":
    main(sys.argv[1])
