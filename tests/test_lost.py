"""Nothing is lost: kills, full and broken disks, damaged files, signals, memory, NaN."""

import errno
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from idaa_lib import results, runs, sweeps
from idaa_lib.configs import CompareConfig, EvalConfig, VAEConfig
from idaa_lib.lab import rows
from idaa_lib.methods.vae import VAETraining
from idaa_lib.runs import RunError, Stopped, checkpoints, files
from idaa_lib.runs import steps as steps_module
from idaa_lib.runs.progress import Lines
from idaa_lib.runs.steps import Steps
from idaa_lib.train import locate, train_vae

ROOT = Path(__file__).resolve().parent.parent
TOTAL, EPOCH = 12, 4


@pytest.fixture
def run(outputs):
    return runs.run_for(VAEConfig(), "pixels")


def train(run, act=lambda step, model: None, value=lambda step: 1.0, **options):
    """Steps to the end, a checkpoint after every fourth; what is trained is a sum of all steps.
    `act` is called within each step; the loss is `value` of it."""
    model = torch.zeros(())
    with run.writing(VAEConfig(), {"dataset": {"name": "photos"}}) as writer:
        steps = Steps(
            run,
            writer,
            TOTAL,
            per_epoch=EPOCH,
            images=1,
            log_every=2,
            state=lambda: ({"model": model}, {}),
            restore=lambda tensors, values: model.copy_(tensors["model"]),
            batch_of=lambda step: {"images": [step, 100 + step]},
            **options,
        )
        steps.resume()
        for step in steps:
            model += step
            act(step, model)
            steps.add({"loss": torch.tensor(value(step))})
        writer.finish({"sum": model.item()})


def steps_of(run):
    return [line["step"] for line in run.metrics()]


class Dead(BaseException):
    """Ends a training as a kill does: nothing of ours runs afterwards."""


def kill_in(run, step, monkeypatch):
    """A run as a process leaves it that was killed in this step."""

    def die(at, model):
        if at == step:
            raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(runs.Writer, "state", lambda writer, **news: None)
        with pytest.raises(Dead):
            train(run, die)


# --- kills ----------------------------------------------------------------------------------------


def test_a_run_that_is_killed_ends_like_one_that_was_not(tmp_path):
    """The benchmark, small: at one moment by chance, and before one operation on files."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "vae", "1", "1", "0", "0"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kills, 0 lost" in result.stdout


@pytest.mark.parametrize("again", [False, True])
def test_a_run_can_be_read_at_each_moment_of_its_start(run, monkeypatch, again):
    """Killed before each of its first files is written, of a new run and of one that goes on."""
    if again:
        kill_in(run, 9, monkeypatch)
    original = files.replace
    for at in itertools.count():
        count = itertools.count()

        def replace(path, content, at=at, count=count):
            if next(count) == at:
                raise Dead
            original(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "replace", replace)
            patch.setattr(runs.Writer, "state", lambda writer, **news: None)
            try:
                with run.writing(VAEConfig(), {}, {"size": 32}):
                    break
            except Dead:
                pass
        for entry in runs.list_runs():
            assert entry.config == VAEConfig() and entry.state["state"] in ("new", "interrupted")
            assert rows.row_of(entry).state != rows.DAMAGED
    assert at == 4
    assert runs.find("vae", finished=False) == [run]


def test_drafts_of_processes_that_are_gone_are_cleared_away(run, monkeypatch):
    kill_in(run, 9, monkeypatch)
    child = subprocess.Popen(["true"])
    child.wait()
    dead_pid, own_pid, stamp = child.pid, os.getpid(), 1.0
    drafts = [f".state.json.{dead_pid}", f"checkpoints/.8.{dead_pid}", f"../.{run.id}.{dead_pid}"]
    drafts += [
        f"samples/.latest.png.{dead_pid}",
        f".latest.json.{own_pid}",
        f".config.json.{os.getppid()}",
    ]
    (run.path / "samples").mkdir()
    for name in drafts:
        (run.path / name).mkdir() if "8." in name or run.id in name else (run.path / name).touch()
    # A number that a process has again: the draft is older than the process.
    os.utime(run.path / drafts[4], (stamp, stamp))
    train(run)
    assert [name for name in drafts if (run.path / name).exists()] == drafts[-1:]
    assert {path.name for path in run.path.glob(".*")} == {".lock", Path(drafts[-1]).name}


# --- disks ----------------------------------------------------------------------------------------

DISKS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES]
DISKS += [errno.EPERM, errno.ENOTDIR, errno.ESTALE]


@pytest.mark.parametrize("number", DISKS, ids=errno.errorcode.get)
@pytest.mark.parametrize("target", ["safetensors", "replace", "log"])
def test_a_disk_that_refuses_is_a_sentence(run, monkeypatch, target, number):
    def refuse(*args, **options):
        if target == "safetensors":
            words = f"I/O error: {os.strerror(number)} (os error {number})"
            raise SafetensorError(f"Error while serializing: {words}")
        raise OSError(number, os.strerror(number))

    train(run)
    checkpoint = checkpoints.load(run)
    (run.path / "summary.json").unlink()
    shutil.rmtree(run.path / "checkpoints" / "12")
    (run.path / "latest.json").write_text('{"step": 8}')
    place = {
        "safetensors": (checkpoints, "save_file"),
        "replace": (os, "replace"),
        "log": (runs.Writer, "log"),
    }[target]
    with monkeypatch.context() as patch:
        patch.setattr(*place, refuse)
        words = (
            f"{os.strerror(number)}, so .*{run.id}.* was not written; what was saved is intact: "
        )
        with pytest.raises(RunError, match=words) as error:
            train(run)
    assert len(str(error.value).splitlines()) == 1
    train(run)
    assert torch.equal(checkpoints.load(run)[0]["model"], checkpoint[0]["model"])


@pytest.mark.parametrize("size", [1024, 100_000])
def test_files_that_may_not_grow_are_a_sentence(run, size):
    """No simulation: the system refuses what is written beyond a limit, to safetensors too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = {"w": torch.zeros(size)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * size // 2, limits[1]))
    words = r"File too large, so .* was not written.*ulimit"
    try:
        with pytest.raises(RunError, match=words), run.writing(VAEConfig(), {}):
            checkpoints.save(run, 1, weights, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*(run.path / "checkpoints").iterdir()]


@pytest.mark.parametrize("limit", [10, 1000])
def test_a_table_is_written_whole_or_a_sentence(tmp_path, limit):
    """Of 2 files the first, and the second, is larger than files may be."""
    frame = pd.DataFrame({"value": range(50), "text": ["ab"] * 50})
    paths = results.save(frame, tmp_path / "a/b/whole")
    csv, parquet = (path.read_bytes() for path in paths)
    assert len(csv) < 1000 < len(parquet)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(RunError, match=r"File too large, so .*table\.\w+ was not written"):
            results.save(frame, tmp_path / "table")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert left == ({} if limit == 10 else {"table.csv": csv})


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_file_in_a_folder_s_place_is_a_sentence(outputs, monkeypatch, depth):
    """In that of the folder itself, of the one around it, and of `outputs` itself."""
    config = VAEConfig(epochs=1, limit=64, width=4, dim=4, device="cpu")
    study = CompareConfig()
    monkeypatch.setattr(sweeps, "execute", lambda *_: pytest.fail("started"))
    folders = {
        sweeps.folder_of(study): lambda: sweeps.folder_of(study),
        locate(config).path: lambda: sweeps.ensure(config),
        locate(config).figures: lambda: locate(config).figure("x.png"),
        outputs / "sweeps/x": lambda: results.save(pd.DataFrame(), outputs / "sweeps/x/table"),
    }
    for folder, make in folders.items():
        shutil.rmtree(outputs, ignore_errors=True)
        place = [folder, *folder.parents][depth] if folder != locate(config).figures else folder
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        with pytest.raises(RunError, match=r"was not written.*move away the file that") as error:
            make()
        assert str(place) in str(error.value) and len(str(error.value)) < 400
        place.unlink()


def test_an_error_of_other_files_is_not_the_run_s(run, tmp_path):
    with pytest.raises(PermissionError), run.writing(VAEConfig(), {}):
        raise PermissionError(errno.EACCES, "no", str(tmp_path / "images" / "1.png"))


# --- damaged files --------------------------------------------------------------------------------

CONTENTS = [b"", b'{"step": 3, "da', b"\x80\x00" * 9, b"null", b"[" * 99_999, None]
CONTENTS += [b'{"step": [], "state": 1, "request": 2, "seed": {}}', b'{"step": 99, "x": Infinity}']


# Files that a start replaces, which a folder in their place forbids.
NAMES = ("config.json", "environment.json", "latest.json", "metrics.jsonl", "control.json")


def damage(path, content):
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.mark.filterwarnings("ignore:Checkpoint")
def test_a_damaged_file_costs_a_run_that_goes_on_nothing(run, monkeypatch):
    """Of all files of a training that was killed, in every way: it ends as if nothing had been, or
    says in a sentence what to delete (a folder in a file's place)."""
    train(run)
    model, lines = checkpoints.load(run)[0]["model"], run.metrics()
    shutil.rmtree(run.path)
    kill_in(run, 9, monkeypatch)
    run.ask("go on")
    (run.path / "state.json").write_text("{}")
    backup = run.path.with_name("kept")
    shutil.copytree(run.path, backup)
    names = [path.relative_to(backup) for path in backup.rglob("*.*") if path.is_file()]
    names = [name for name in names if name.name != ".lock"]
    assert len(names) == 13
    for name, content in itertools.product(names, CONTENTS):
        shutil.rmtree(run.path)
        shutil.copytree(backup, run.path)
        damage(run.path / name, content)
        if content is None and name.name in NAMES:
            with pytest.raises(RunError, match=rf"{name.name} was not .*delete that folder"):
                train(run)
            continue
        train(run)
        assert torch.equal(checkpoints.load(run)[0]["model"], model), (name, content)
        steps = [line["step"] for line in lines]
        assert steps_of(run) == (steps[-2:] if name.name == "metrics.jsonl" else steps)


MODEL = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "classes": 2}


@pytest.mark.parametrize(
    "model",
    [
        *({k: v for k, v in MODEL.items() if k != name} for name in MODEL),
        *(MODEL | {name: value} for name in ("mean", "std") for value in ([None] * 3, ["1"] * 3)),
        *(MODEL | {name: value} for name in ("size", "mean", "std") for value in (None, "1", {})),
        {"step": [], "state": {}},
    ],
)
def test_what_rebuilds_a_network_is_whole_or_a_sentence(run, model):
    train(run)
    files.write_json(run.path / "model.json", MODEL)
    assert run.model == MODEL
    files.write_json(run.path / "model.json", model)
    with pytest.raises(RunError, match=rf"{run.id}/model\.json is damaged .*: delete"):
        _ = run.model


@pytest.mark.parametrize("content", CONTENTS[:-1])
@pytest.mark.parametrize("name", ["latest.json", "checkpoints/12/checksums.json"])
def test_of_a_finished_run_only_the_last_checkpoint_serves(run, name, content):
    train(run)
    model = checkpoints.load(run)[0]["model"]
    damage(run.path / name, content)
    if name == "latest.json":
        assert torch.equal(checkpoints.load(run)[0]["model"], model) and checkpoints.are_whole(run)
    else:
        with pytest.raises(RunError, match=rf"{run.id}.* (damaged|gone)"):
            checkpoints.load(run)
        assert not checkpoints.are_whole(run)


def test_a_checkpoint_after_a_damaged_one_leaves_two_that_serve(run, monkeypatch):
    kill_in(run, 9, monkeypatch)
    (run.path / "checkpoints" / "8" / "state.json").write_text("{")

    def die(step, model):
        if step == 5:
            raise Dead

    with pytest.warns(UserWarning, match="damaged"), pytest.raises(Dead):
        train(run, die, checkpoint_every=1)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["4", "5"]


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_the_step_and_ends_the_run(run, name):
    before = signal.getsignal(getattr(signal, name))

    def act(step, model):
        if step == 5:
            signal.raise_signal(getattr(signal, name))

    with pytest.raises(Stopped, match=rf"Stopped \({name}\) after step 6 of 12 and saved"):
        train(run, act)
    assert checkpoints.load(run)[1]["step"] == 6
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_hangup_that_nohup_ignores_ends_nothing(run):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(run, lambda step, model: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.finished


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kernel_without_its_driver_saves_before_it_ends(run, monkeypatch):
    """With ipykernel's own poller, which ends a kernel whose parent is another one."""
    parentpoller = pytest.importorskip("ipykernel.parentpoller")
    kernelapp = pytest.importorskip("ipykernel.kernelapp")
    parent, ends = os.getppid(), []
    monkeypatch.setattr(os, "getppid", lambda: parent)

    def end(code):
        ends.append(run.state["state"])
        sys.exit()  # of its thread

    monkeypatch.setattr(os, "_exit", end)
    sleep = time.sleep
    monkeypatch.setattr(parentpoller.time, "sleep", lambda seconds: sleep(seconds / 20))
    poller = parentpoller.ParentPollerUnix(parent)
    monkeypatch.setattr(kernelapp.IPKernelApp, "_instance", SimpleNamespace(poller=poller))
    poller.start()

    def orphan(step, model):
        if step == 5:
            monkeypatch.setattr(os, "getppid", lambda: 1)
        sleep(0.15)

    with pytest.raises(Stopped, match=r"\(the process that ran this notebook ended\).* and saved"):
        train(run, orphan)
    poller.join(20)
    assert ends == ["interrupted"] and checkpoints.load(run)[1]["step"] in (6, 7)


def test_a_terminal_that_is_gone_ends_no_training(monkeypatch):
    class Pipe:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

    monkeypatch.setattr(sys, "stdout", Pipe())
    Lines().show(1.0, "the end", last=True)


# --- memory, NaN, minutes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(2**60),  # torch's own words on a CPU
        lambda: bytearray(2**62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")),
    ],
)
def test_memory_that_ran_out_names_the_batch_size(run, fail):
    config = VAEConfig(batch_size=77)
    words = "memory did not suffice.*lower batch_size=77 or size=32"
    with pytest.raises(RunError, match=words), run.writing(config, {}):
        fail()
    assert run.state["state"] == "failed" and "batch_size=77" in run.state["error"]
    evaluation = EvalConfig(run="r")
    with pytest.raises(RunError, match=r"lower .*limit"), run.writing(evaluation, {}):
        fail()


def test_a_network_that_a_device_does_not_hold_is_the_same_sentence(outputs, monkeypatch):
    def fail(method, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")

    monkeypatch.setattr(VAETraining, "to", fail)
    config = VAEConfig(limit=32, batch_size=16, width=4, epochs=1)
    with pytest.raises(RunError, match=r"memory did not suffice.*lower batch_size=16 or size=32"):
        train_vae(config)
    assert not locate(config).path.exists()  # nothing was written


@pytest.mark.parametrize("fault", [0, 5, 6, 11])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite_is_kept_with_its_images(run, fault, value):
    number = fault // EPOCH * EPOCH or None
    state = f"the last checkpoint, of step {number}, is intact" if number else "no checkpoint yet"
    words = (
        rf"The loss is {value} at step {fault + 1}: lower learning_rate .*{state}.*not_finite\.json"
    )
    for _ in range(2):  # it goes on from what was sound, and says so again
        with pytest.raises(RunError, match=words):
            train(run, value=lambda step: value if step >= fault else 1.0)
    about = json.loads((run.path / "not_finite.json").read_text())
    assert about["step"] == fault + 1 and about["checkpoint"] == number
    assert about["images"] == {"images": [fault, 100 + fault]}
    train(run)
    assert run.summary == {"sum": sum(range(TOTAL))}


def test_weights_that_are_not_finite_are_not_saved(run):
    """A step whose loss was finite and whose gradient was not."""
    with pytest.raises(RunError, match=r"model is not finite at step 8: .*of step 4, is intact"):
        train(run, lambda step, model: model.fill_(math.nan) if step == 7 else None)
    assert checkpoints.load(run)[1]["step"] == 4


def test_a_checkpoint_is_due_after_minutes_too(run, monkeypatch):
    clock_time = 0.0
    clock = SimpleNamespace(monotonic=lambda: clock_time, time=time.time, sleep=time.sleep)
    monkeypatch.setattr(steps_module, "time", clock)
    saves = []
    monkeypatch.setattr(checkpoints, "save", lambda run, step, *rest: saves.append(step))

    def act(step, model):
        nonlocal clock_time
        clock_time += 40

    train(run, act, checkpoint_minutes=2)
    assert saves == [3, 4, 7, 8, 11, 12]  # 120 s after the last one, and after each epoch
