"""What all tests share: data and outputs of their own, and a list of what was skipped and why."""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Small tensors gain nothing from threads, and tests run side by side (pytest -n): torch's threads
# would fight for the cores. Set before torch is imported, and inherited by kernels and processes.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from idaa_lib.configs import SSLConfig
from idaa_lib.methods import Moment
from idaa_lib.runs import Stopped, checkpoints, steps
from idaa_lib.train import locate
from idaa_lib.train.loop import Fit

ROOT = Path(__file__).resolve().parent.parent
# Parts that CI names must be there: what would be skipped elsewhere is a failure then.
REQUIRED = set(filter(None, os.environ.get("IDAA_REQUIRE", "").split(",")))


def pytest_configure(config):
    # The project's own cache of decoded images is left alone; one for the session is shared.
    if "IDAA_DATA" not in os.environ:
        cache = getattr(config, "cache", None)  # there is none with -p no:cacheprovider
        folder = str(cache.mkdir("data")) if cache else tempfile.mkdtemp(prefix="idaa-data-")
        os.environ["IDAA_DATA"] = folder


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device: run `make test` on a machine with one")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)


def outcome(run):
    """Weights, optimiser, metrics and snapshots of a run, without its times."""
    tensors, state = checkpoints.load(run)
    times = {"time", "images_per_second"}
    lines = [{k: v for k, v in line.items() if k not in times} for line in run.metrics()]
    summary = {k: v for k, v in run.summary.items() if k not in ("seconds", "images_per_second")}
    state.pop("seconds")
    return tensors, state, lines, summary, checkpoints.snapshots(run)


@pytest.fixture
def late(monkeypatch):
    """late(n): numbers of a line of the log come n steps later, as on a GPU, and are NaN till then.
    The list that it gives gets the step of each line that was waited for."""

    line = steps.Line

    def begin(delay):
        waits = []

        class Late(line):
            def __init__(self, *args):
                super().__init__(*args)
                self.truth, self.left, self.event = self.copy, delay, self
                self.copy = torch.full_like(self.truth, torch.nan)

            def query(self):
                self.left -= 1
                if self.left < 0:
                    self.copy = self.truth
                return self.left < 0

            def synchronize(self):
                if self.copy is not self.truth:
                    waits.append(self.step)
                self.copy = self.truth

        monkeypatch.setattr(steps, "Line", Late)
        return waits

    return begin


def fit_of(method, config, rank=0, processes=1, adversary=None):
    """A training's loop on the CPU, as this rank of so many processes has it; no images."""
    place = dict(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    images = torch.zeros(config.batch_size, 3, 1, 1, dtype=torch.uint8)
    return Fit(SimpleNamespace(**place), method, images, config, adversary)


def views_of(method, rank, processes, images):
    """Views that this rank of so many processes draws in a training's first step of its uint8
    images (name → (B, 3, H, W)), by the loop's own random numbers."""
    config = SSLConfig(batch_size=len(images["images"]) * processes)
    fit = fit_of(method, config, rank, processes)
    numbers = fit._numbers(0, {name: len(part) for name, part in images.items()})
    return method.draw(images, {}, Moment(numbers=numbers))


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A folder of run directories for one test."""
    folder = tmp_path / "outputs"
    monkeypatch.setenv("IDAA_OUTPUTS", str(folder))
    return folder


@pytest.fixture(scope="module")
def module_outputs(tmp_path_factory):
    """A folder of run directories for the tests of a file."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(folder))
        yield folder


@pytest.fixture
def latin_locale(tmp_path):
    """Variables of the environment that make ISO-8859-1 the encoding of the system."""
    if not shutil.which("localedef"):
        pytest.skip("localedef, which makes a locale, is not installed")
    name = "en_US.ISO-8859-1"
    localedef = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", tmp_path / name]
    if subprocess.run(localedef, capture_output=True).returncode:
        pytest.skip("this system has no sources of locales")
    return {"LOCPATH": str(tmp_path), "LC_ALL": name}


@pytest.fixture(scope="session")
def cifar10_zip():
    """The 60,000 images of CIFAR-10 as a zip of class folders."""
    default = ROOT.parent / "shared" / "data" / "cifar10-images.zip"
    path = Path(os.environ.get("IDAA_CIFAR10_ZIP", default))
    if not path.exists():
        text = f"no CIFAR-10 zip at {path}: export IDAA_CIFAR10_ZIP=<zip of train/, test/ folders>"
        if "cifar10" in REQUIRED:
            pytest.fail(text)
        pytest.skip(text)
    return path


def whole_and_resumed(train, config, monkeypatch, after, total):
    """`outcome` of a training, and of the same one that Ctrl-C stops after so many of its steps and
    that goes on then."""
    result = outcome(train(config))
    shutil.rmtree(locate(config).path)
    original = Fit.train_step

    def step(fit, *args):
        values = original(fit, *args)
        if fit.steps.step == after - 1:  # counted after the step
            signal.raise_signal(signal.SIGINT)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "train_step", step)
        with pytest.raises(Stopped, match=f"after step {after} of {total} and saved"):
            train(config)
    return result, outcome(train(config))
