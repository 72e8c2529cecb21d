"""What sweeps do when things end too early: kernels, drivers, workers; and who gets which GPU."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import nbformat
import pandas as pd
import pytest

from idaa_lib import grids, kernels, plans, results, runs, sweeps
from idaa_lib.configs import ConfigError, EvalConfig, SSLConfig, VAEConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.lab import plots
from idaa_lib.runs import RunError, write_json
from idaa_lib.train import accelerator, train, train_vae

SMALL = {"limit": 64, "batch_size": 32, "epochs": 1, "width": 4, "device": "cpu", "dim": 8}


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Makes `of.ipynb`, with one cell."""

    def make(source):
        content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        content.metadata["kernelspec"] = {"name": "python3", "display_name": ""}
        nbformat.write(content, tmp_path / "of.ipynb")
        return "of"

    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    return make


@pytest.fixture
def three_points(monkeypatch, outputs):
    """The plan of three encoders and their evaluations, of which those at `bad_rates` fail, and
    what is performed: no notebook is started."""
    cross = {"ssl": {"learning_rate": [1e-3, 2e-3, 3e-3]}}
    tasks = plans.plan(grids.read({"fixed": {"all": {"device": "cpu"}}, "cross": cross}).points())
    order, bad_rates = [], {2e-3}

    def perform(config, make=None):
        order.append(config.stage)
        fails = getattr(config, "learning_rate", None) in bad_rates
        state = ("failed", "Why.") if fails else ("finished", None)
        return sweeps.Outcome(f"{config.stage}-x", *state, 1.0)

    monkeypatch.setattr(sweeps, "perform", perform)
    return tasks, order


def test_a_kernel_that_crashes_is_named_by_its_signal_and_its_place(notebook, tmp_path):
    name = notebook("import ctypes\n\ndef crash():\n    ctypes.string_at(0)\n\ncrash()")
    with pytest.raises(RunError, match=r"of\.ipynb was killed by SIGSEGV in string_at \(.*ctypes"):
        kernels.execute(name, {}, tmp_path / "runs" / "out.ipynb")
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"out.failed.ipynb", "out.trace.txt"}
    assert "Segmentation fault" in (tmp_path / "runs" / "out.trace.txt").read_text()


def test_an_executed_notebook_says_what_made_it_and_its_channels_have_no_port(notebook, tmp_path):
    name = notebook(
        "import os, ipykernel\n"
        "about = ipykernel.get_connection_info(unpack=True)\n"
        "print(about['transport'], os.environ['IDAA_STARTED_BY'])"
    )
    path = kernels.execute(name, {}, tmp_path / "runs" / "out.ipynb")
    first, last = (
        json.loads(path.read_text())["cells"][0],
        json.loads(path.read_text())["cells"][-1],
    )
    assert "".join(first["outputs"][0]["text"]) == "ipc sweep\n"
    text = "".join(last["source"])
    assert all(f"\n| {word} | " in text for word in ("software", "hardware", "commit"))
    assert [each.name for each in path.parent.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize("visible", ["0,1,2", "GPU-5f1, MIG-a/1/0 ,GPU-7"])
def test_no_two_kernels_have_one_gpu_at_a_time(visible, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: str(tmp_path))
    devices, names, clash = set(), set(), []

    def work():
        with kernels._gpu("auto") as variables:
            (name,) = variables.values()
            clash.extend([name] * (name in devices))
            devices.add(name)
            names.add(name)
            time.sleep(0.05)
            devices.discard(name)

    threads = [threading.Thread(target=work) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clash and names == {name.strip() for name in visible.split(",")}
    with kernels._gpu("cpu") as variables:
        assert variables == {}


def test_a_run_of_several_processes_has_a_gpu_for_each(monkeypatch, tmp_path):
    """Of any mix of runs: never one GPU twice, and all come to their end."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: str(tmp_path))
    devices, counts, clash = [], [], []

    def work(processes):
        with kernels._gpu("auto", processes) as variables:
            names = variables["CUDA_VISIBLE_DEVICES"].split(",")
            counts.append((processes, len(names)))
            devices.extend(names)
            clash.extend(name for name in devices if devices.count(name) > 1)
            time.sleep(0.02)
            for name in names:
                devices.remove(name)

    wishes = [2, 1, 2, 3, 1, 2, 5]
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in wishes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # More than there are: the training says so.
    assert not clash and sorted(counts) == sorted((n, min(n, 3)) for n in wishes)


def test_a_kernel_s_folder_outlives_no_driver(notebook, tmp_path, monkeypatch):
    short = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: short)
    place = kernels._folder("idaa")
    assert place.parent == Path(short)
    process = subprocess.Popen(["sleep", "60"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    for each in (process, dead):
        (place / f".abc.{each.pid}").mkdir()
    (place / f".abc.{dead.pid}" / "kernel-ipc-1").touch()
    name = notebook("import ipykernel\nprint(ipykernel.get_connection_file())")
    path = kernels.execute(name, {}, tmp_path / "runs" / "out.ipynb")
    process.kill()
    process.wait()
    assert [each.name for each in place.iterdir()] == [f".abc.{process.pid}"]
    assert rf"{place}/." in path.read_text()
    shutil.rmtree(short)


def test_a_kernel_starts_where_the_temporary_folder_has_a_long_path(
    notebook, tmp_path, monkeypatch
):
    long = tmp_path / "of a job on a cluster" / ("a" * 60)
    long.mkdir(parents=True)
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: str(long))
    path = kernels.execute(notebook("print('here')"), {}, tmp_path / "runs" / "out.ipynb")
    assert "here" in path.read_text() and not list(long.iterdir())


@pytest.mark.parametrize("visible", ["", "3", "GPU-one"])
def test_one_gpu_or_none_is_left_as_it_is(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with kernels._gpu("auto") as variables:
        assert variables == {}


@pytest.mark.parametrize("word", ["running", "failed"])
def test_a_notebook_that_lacks_its_end_is_made_though_its_run_is_finished(
    word, outputs, monkeypatch
):
    config = VAEConfig(**SMALL)
    run = train_vae(config)
    calls = []
    monkeypatch.setattr(sweeps, "execute", lambda *call: calls.append(call))
    assert sweeps.perform(config).seconds == 0.0 and not calls
    (run.path / f"notebook.{word}.ipynb").write_text("{}")
    assert sweeps.perform(config).state == "finished"
    ((name, values, output),) = calls
    assert (name, output) == ("01_pretrain_vae", run.path / "notebook.ipynb")
    assert VAEConfig(**values) == run.config


def test_a_cancelled_sweep_stops_its_own_runs_alone(outputs, monkeypatch):
    """Another one of the same process goes on, and so does what is made by hand afterwards."""
    both, over = threading.Barrier(3), threading.Event()

    def execute(name, values, output):
        run = runs.Run(output.parent)
        if not over.is_set():
            both.wait(30)
        while run.request != "stop" and not over.wait(0.05):
            pass
        if run.request == "stop":
            raise RunError("Stopped.")
        write_json(run.path / "summary.json", {})

    monkeypatch.setattr(sweeps, "execute", execute)
    configs = [VAEConfig(**SMALL, seed=seed) for seed in range(3)]
    sweep, other = sweeps.Kernels(), sweeps.Kernels()
    with ThreadPoolExecutor() as threads:
        stopped = threads.submit(sweep.ensure, configs[0])
        goes_on = threads.submit(other.ensure, configs[1])
        both.wait(30)
        sweep.cancel()
        over.set()
        assert goes_on.result().finished
        with pytest.raises(RunError, match=r"^Stopped"):
            stopped.result()
    assert sweeps.perform(configs[2]).state == "finished"
    with pytest.raises(RunError, match="the sweep was stopped"):
        sweep.ensure(VAEConfig(**SMALL, seed=3))


def test_retry_makes_what_failed_and_what_needs_it_alone(three_points):
    tasks, order = three_points
    sweeps.perform_all(tasks)
    assert order.count("ssl") == 3 and order.count("eval") == 2  # one is left out
    keys = [*tasks]
    run = sweeps.locate(tasks[keys[2]].config)
    run.path.mkdir(parents=True)
    (run.path / "notebook.failed.ipynb").write_text("{}")
    order.clear()
    outcomes = sweeps.perform_all(tasks, retry=True)
    assert order == ["ssl"] and set(outcomes) == {keys[2], keys[3]}


@pytest.mark.parametrize("missing", [False, True])
def test_retry_says_what_it_leaves_and_what_it_would_make(
    missing, three_points, tmp_path, capsys, outputs
):
    tasks, _ = three_points
    path = tmp_path / "grid.yaml"
    rates = [1e-3, 3e-3] if missing else [3e-3]
    cross = {"ssl": {"learning_rate": rates}}
    path.write_text(json.dumps({"fixed": {"all": {"device": "cpu"}}, "cross": cross}))
    ssl = [task.config for task in tasks.values() if task.config.stage == "ssl"][-1]
    run = sweeps.locate(ssl)
    run.path.mkdir(parents=True)
    (run.path / "notebook.failed.ipynb").write_text("{}")
    assert sweeps.main([str(path), "--retry", "--dry-run"]) == 0
    key = next(key for key, task in reversed(tasks.items()) if task.config.stage == "eval")
    assert f"\nTo be made again: {run.id}, {key}.\n" in capsys.readouterr().out
    assert sweeps.main([str(path), "--retry"]) == int(missing)
    sentence = "2 of 4 runs are missing that did not fail: the same command without --retry"
    assert (sentence in capsys.readouterr().err) == missing


def test_points_that_are_refused_are_named_and_stop_no_others(
    outputs, monkeypatch, tmp_path, capsys
):
    places = []

    def perform(config, make=None):
        places.append(getattr(config, "learning_rate", None))
        return sweeps.Outcome(f"{config.stage}-x", "finished")

    monkeypatch.setattr(sweeps, "perform", perform)
    path = tmp_path / "grid.yaml"
    path.write_text(
        "about: |\n  Two\n  lines.\n"
        "fixed: {all: {device: cpu}}\n"
        "cross:\n"
        "  ssl: {learning_rate: [0.1, -1, 0.2]}\n"
        "  images: [{all: {dataset: photos}}, {all: {dataset: /no/folder}}]\n"
    )
    assert sweeps.main([str(path), "--dry-run"]) == 1 and not places
    plan = capsys.readouterr().out
    assert plan.startswith("Two lines.\n") and "2 points take 4 runs" in plan
    assert "4 of 6 cannot be made: learning_rate must be" in plan and "/no/folder" in plan
    assert sweeps.main([str(path)]) == 1
    assert {rate for rate in places if rate} == {0.1, 0.2}
    assert "4 of 6 cannot be made" in capsys.readouterr().err
    path.write_text("cross: {ssl: {learning_rate: [-1]}}\n")
    assert sweeps.main([str(path)]) == 2
    assert "1 of 1 cannot be made: learning_rate must be" in capsys.readouterr().err


def finish(config, summary):
    """A run that is finished, as far as a sweep looks."""
    run = sweeps.locate(config)
    run.path.mkdir(parents=True)
    for name, value in (
        ("config", config.model_dump(mode="json")), ("summary", summary), ("environment", {})
    ):  # fmt: skip
        write_json(run.path / f"{name}.json", value)
    return run


DAMAGE = [
    (name, content)
    for name in ("summary.json", "config.json", "environment.json")
    for content in ("", "{", "[]", "{}", None)
    if (name, content) != ("environment.json", "{}")
]


@pytest.mark.parametrize(("name", "content"), [*DAMAGE, ("config.json", "absent")])
def test_a_damaged_run_is_a_failure_that_names_its_file(
    name, content, outputs, tmp_path, monkeypatch, capsys
):
    """Of one of two finished encoders, whatever is damaged in it: rc 1 and the other in the table;
    and a table of all runs has the other."""
    grid = {"stages": ["ssl"], "fixed": {"all": {"device": "cpu"}}, "seeds": [0, 1]}
    path = tmp_path / "grid.yaml"
    path.write_text(json.dumps(grid))
    tasks = plans.plan(grids.read(grid).points())
    summary = {"knn_top1_val": 50.0, "n_val": 100, "knn_low_val": 40.0, "knn_high_val": 60.0}
    runs_ = [finish(task.config, summary) for task in tasks.values()]
    monkeypatch.setattr(sweeps, "execute", lambda *call: pytest.fail("nothing is to be made"))
    assert sweeps.main([str(path)]) == 0
    (runs_[0].path / name).unlink()
    if content is None:
        (runs_[0].path / name).mkdir()
    elif content != "absent":
        (runs_[0].path / name).write_text(content)
    capsys.readouterr()
    assert sweeps.main([str(path)]) == 1
    output = capsys.readouterr()
    (line,) = [line for line in output.err.splitlines() if line.startswith(runs_[0].id)]
    assert f"{runs_[0].id} failed: " in line and f"{runs_[0].path / name} is damaged" in line
    assert "delete" in line
    frame = pd.read_csv(outputs / "sweeps" / "grid.csv")
    assert {*frame["run"]} == {runs_[1].id} == {*results.results()["run"]} - {runs_[0].id}


@pytest.mark.parametrize(("name", "content"), [*DAMAGE, ("weights", None)])
def test_a_damaged_vae_stops_only_what_needs_it(name, content, outputs, monkeypatch):
    stages = {"stages": ["vae", "ssl"], "fixed": {"all": SMALL, "ssl": {"adversary": "idaa"}}}
    points = grids.read(stages | {"seeds": [0, 1]}).points()
    tasks = plans.plan(points)
    vaes = [train_vae(task.config) for key, task in tasks.items() if key.startswith("vae")]
    calls = []

    def ensure(kernels, config):
        calls.append(config.vae)
        return sweeps.locate(config)

    monkeypatch.setattr(sweeps.Kernels, "ensure", ensure)
    if name == "weights":
        shutil.rmtree(vaes[0].path / "checkpoints")
    else:
        (vaes[0].path / name).unlink()
        (vaes[0].path / name).write_text(content) if content else (vaes[0].path / name).mkdir()
    assert "2 points take 4 runs" in plans.outline(points, 1)
    outcomes = [outcome.state for outcome in sweeps.perform_all(tasks).values()]
    last = ["finished", "failed"] if name == "weights" else ["failed", "left out"]
    assert sorted(outcomes) == sorted([*last, "finished", "finished"]) and calls == [vaes[1].id]
    assert sweeps.perform_all(tasks, retry=True).keys() < tasks.keys()


NOTEBOOK = (
    "02_decompose: {vae: '@vae', run: '@ssl'}\n  13_report: {}\n  00_start_here: {vae: '@vae'}"
)


@pytest.mark.parametrize("bad", ["failed", "refused"])
def test_what_fails_is_listed_at_the_end_whatever_fails_besides(
    bad, outputs, tmp_path, monkeypatch, capsys
):
    calls = []

    def perform(config, make=None):
        error = "Why." if config.stage == "vae" else None
        return sweeps.Outcome(f"{config.stage}-x", "failed" if error else "finished", error)

    def execute(name, values, output):
        calls.append(name)
        raise RunError(f"{name} fails too.")

    monkeypatch.setattr(sweeps, "perform", perform)
    monkeypatch.setattr(sweeps, "execute", execute)
    path = tmp_path / "grid.yaml"
    path.write_text(
        "fixed: {all: {device: cpu}, ssl: {adversary: none}}\n"
        "grids:\n  - {stages: [ssl]}\n  - {stages: [vae]}\n  - {stages: [vae], "
        f"cross: {{vae: {{kappa: [{'1' if bad == 'failed' else '-1'}]}}}}}}\n"
        f"notebooks:\n  {NOTEBOOK}\n"
    )
    assert sweeps.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert calls == ["13_report"] and (outputs / "sweeps" / "grid.csv").exists()
    for sentence in (
        "vae-x failed: Why.", "13_report.ipynb failed: 13_report fails too.",
        "02_decompose.ipynb left out: It needs @vae, of which no run is finished.",
        "00_start_here.ipynb left out: It needs @vae, of which no run is finished.",
    ):  # fmt: skip
        assert sentence in error
    assert ("1 of 3 cannot be made: kappa" in error) == (bad == "refused")


BAD_VALUES = [1e308, "much", [1, 2], {"a": 1}, "x" * 5000]


@pytest.mark.parametrize("place", ["ssl", "vae", "all", "rates"])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_bad_value_costs_its_points_alone(value, place, outputs):
    """Whatever it is, and wherever it stands, also behind a label."""
    field = {"vae": "kappa", "ssl": "learning_rate", "all": "batch_size"}.get(place)
    entries = [{"ssl": {"learning_rate": v}, "labels": {"x": 1}} for v in (0.1, value)]
    cross = {place: {field: [32, value]} if field else entries}
    stages = ["vae"] if place == "vae" else ["ssl", "eval"]
    fixed = {"all": {"device": "cpu", "limit": 64, "batch_size": 32}}
    grid = grids.read({"fixed": fixed, "cross": cross, "stages": stages, "seeds": [0, 1]})
    points, refusal = plans.admit(grid.points())
    assert len(points) == 2 and refusal.startswith("2 of 4 cannot be made: ")
    assert len(refusal) < 800 and len(refusal.splitlines()) == 1


def test_what_is_looked_at_before_a_training_decodes_no_image(outputs, monkeypatch):
    monkeypatch.setattr(ImageSet, "labels", property(lambda self: pytest.fail("decoded")))
    fixed = {"all": {"device": "cpu"}, "ssl": {"method": "moco", "queue": 4096}}
    points, refusal = plans.admit(grids.read({"fixed": fixed, "stages": ["ssl"]}).points())
    assert points and not refusal


def test_refused_points_of_one_name_are_counted(outputs):
    entries = [{"ssl": {"learning_rate": v}, "labels": {"x": "one"}} for v in (-1, -2, -1, 0.1)]
    points, refusal = plans.admit(grids.read({"cross": {"rates": entries}}).points())
    assert len(points) == 1 and refusal.startswith("3 of 4 cannot be made")


@pytest.mark.parametrize("text", [
    "", "3", "[a]", "1: 2", "labels: abc", "labels: [1]", "cross: [1]", "cross: {x: [a, b]}",
    "cross: {x: 3}", "cross: {ssl: [1, 2]}", "cross: {ssl: {1: [2]}}", "cross: {ssl: {epsilon: 1}}",
    "cross: {x: [{ssl: 3}]}", "cross: {x: [{ssl: {method: simclr}, labels: abc}]}",
    "cross: {x: [{ssl: {method: simclr}, labels: {1: 2}}]}", "cross: {x: [{nowhere: {a: 1}}]}",
    "vary: {ssl: 3}", "vary: {ssl: [1]}", "grids: 3", "grids: [3]", "grids: [{fixed: 3}]",
    "grids: [{fixed: {ssl: 3}}]", "grids: [{1: 2}]", "seeds: [x]", "jobs: many", "stages: [x]",
    "fixed: " + "[" * 5000, "x" * 5000 + ": 1", "a\0: b", "a:\n\t- b", "&a {fixed: *a}",
    f"seeds: [{'9' * 5000}]", "fixed: {all: {" + "x" * 5000 + ": 1}}",
])  # fmt: skip
def test_a_malformed_grid_is_one_sentence(text, outputs, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    assert sweeps.main([str(path), "--dry-run"]) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert len(sentence) < 400 + len(str(path))


@pytest.mark.parametrize(("stages", "values", "words"), [
    ("ssl", {"ssl": {"batch_size": 65}}, "batch_size=65 is more than the 64 training images"),
    ("vae ssl", {"vae": {"batch_size": 65}}, "batch_size=65 is more than the 64 training images"),
    ("ssl eval", {"ssl": {"projection_dim": 10**9}}, "GiB .* take less of projection_dim="),
    ("vae ssl", {"vae": {"dim": 10**9}}, "GiB .* take less of dim="),
    ("ssl", {"ssl": {"method": "moco", "queue": 10**10}}, "GiB .* take less of queue="),
    ("vae ssl", {"ssl": {"tracker": "mlflow"}}, "tracker='mlflow' is not installed"),
    ("vae", {"vae": {"tracker": "mlflow"}}, "tracker='mlflow' is not installed"),
    ("ssl transfer", {"transfer": {"datasets": "/no/such"}}, "No data set can .*/no/such"),
    ("ssl eval", {"eval": {"dataset": "/no/such"}}, "/no/such"),
    ("ssl", {"ssl": {"continue_from": "ssl-none"}}, "There is no ssl run 'ssl-none'"),
    ("ssl", {"ssl": {"vae": "vae-none"}}, "There is no vae run 'vae-none'"),
    ("ssl", {}, "There is no finished vae run"),
    ("eval", {"eval": {"run": "ssl-none"}}, "There is no ssl run 'ssl-none'"),
    ("transfer", {"transfer": {"run": "ssl-none"}}, "There is no ssl run 'ssl-none'"),
])  # fmt: skip
def test_what_a_stage_refuses_is_refused_before_the_first_begins(
    stages, values, words, outputs, monkeypatch
):
    """With a point beside it that can be made, whose stages are sound."""
    monkeypatch.setattr(accelerator, "get_available_trackers", lambda: [])
    adversary = "idaa" if stages in ("vae ssl", "ssl") and "method" not in str(values) else "none"
    fixed = {"all": {"device": "cpu", "limit": 64, "batch_size": 32}}
    fixed["ssl"] = {"adversary": adversary}
    ((stage, own),) = values.items() or [("ssl", {})]
    bad = {stage: own, "labels": {"x": "bad"}}
    grid = {"stages": stages.split(), "fixed": fixed, "cross": {"x": [bad]}}
    points, refusal = plans.admit(grids.read(grid).points())
    assert not points and re.search(rf"1 of 1 cannot be made: .*{words}", refusal)
    sound = {"stages": ["vae", "ssl", "eval", "transfer"], "fixed": fixed}
    points, refusal = plans.admit(grids.read(sound).points())
    assert len(points) == 1 and not refusal


@pytest.mark.parametrize("named", [True, False])
def test_workers_of_a_dask_cluster_make_the_runs(three_points, named):
    """By the scheduler's address, or by joblib's own way of saying it."""
    distributed = pytest.importorskip("distributed")
    tasks, order = three_points
    with distributed.Client(
        processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as client:
        if named:
            outcomes = sweeps.perform_all(tasks, scheduler=client.scheduler.address)
        else:
            with joblib.parallel_config(backend="dask"):
                outcomes = sweeps.perform_all(tasks)
    assert order.count("ssl") == 3 and len(outcomes) == 6
    assert sorted(o.state for o in outcomes.values()) == ["failed", *4 * ["finished"], "left out"]


def test_a_run_whose_worker_dies_each_time_is_a_failure(three_points, monkeypatch):
    """The others end as they would, and what waits for it is left out."""
    distributed = pytest.importorskip("distributed")
    tasks, _ = three_points
    perform = sweeps.perform

    def die(config, make=None):
        if getattr(config, "learning_rate", None) == 2e-3:
            if make is None:
                raise MemoryError("4 workers died. See the logs.")
            try:
                make(config)
            except RunError as error:
                return sweeps.Outcome("ssl-y", "failed", str(error))
        return perform(config)

    monkeypatch.setattr(sweeps, "perform", die)
    with distributed.Client(
        processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as client:
        outcomes = sweeps.perform_all(tasks, scheduler=client.scheduler.address)
    states = {o.state: o.error for o in outcomes.values()}
    assert states["failed"] == "The cluster gave it up (MemoryError: 4 workers died)."
    assert states["left out"] == "It needs ssl-y, which failed."
    assert sum(outcome.state == "finished" for outcome in outcomes.values()) == 4


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:1", "tcp://x:y", None])
def test_a_cluster_that_is_not_there_is_a_sentence(
    address, three_points, tmp_path, monkeypatch, capsys
):
    distributed = pytest.importorskip("distributed")
    if address is None:
        monkeypatch.setitem(sys.modules, "distributed", None)
    else:
        client = distributed.Client
        monkeypatch.setattr(distributed, "Client", lambda address: client(address, timeout=1))
    path = tmp_path / "grid.yaml"
    path.write_text("fixed: {all: {device: cpu}}\n")
    assert sweeps.main([str(path), "--scheduler", address or "tcp://x:1"]) == 2
    words = f"scheduler='{address}' is no Dask scheduler" if address else "needs Dask, which is not"
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "scheduler=" in line]
    assert words in sentence and len(sentence) < 400 + len(str(path))


def figures_of(values):
    """Tidy validation accuracies: (method, ε, dim, seed) → value."""
    rows = [
        {"run": f"r{i}", "training": f"r{i}", "method": m, "epsilon": e, "dim": d, "seed": s}
        | {"value": v, "low": v - 1, "high": v + 1, "metric": "kNN", "split": "validation"}
        | {"features": "encoder", "adversary": "IDAA", "unit": "%", "shape": [d]}
        for i, ((m, e, d, s), v) in enumerate(values.items())
    ]
    return pd.DataFrame(rows)


FIGURES = {
    (m, e, d, s): 10.0 * i + e + d + 2 * s
    for i, m in enumerate(("SimCLR", "SimSiam"))
    for e in (0.1, 0.2) for d in (4, 8) for s in (0, 1)
}  # fmt: skip


def test_seeds_are_rows_or_means_with_student_s_intervals(tmp_path):
    frame = figures_of(FIGURES)
    means = results.means(frame)
    assert len(means) == 8 and set(means["seeds"]) == {2} and "seed" not in means
    first = means.iloc[0]
    assert (first["value"], first["low"], first["high"]) == pytest.approx(
        student_interval([4.1, 6.1], "%")
    )
    assert results.means(frame.iloc[:0]).empty
    csv, parquet = results.save(frame, tmp_path / "new" / "table")
    for table in (pd.read_csv(csv), pd.read_parquet(parquet)):
        assert [*table.columns] == [*frame.columns]
        assert table["value"].to_list() == frame["value"].to_list()


def test_a_file_gives_whole_numbers_back_where_others_are_missing(tmp_path):
    """As is dim of a point without an adversary."""
    frame = figures_of({("SimCLR", e, d, 0): 1.0 for e in (0.1, 0.3) for d in (8, 32)})
    frame["dim"] = frame["dim"].astype(object)
    last = frame.index[-1:]
    frame = pd.concat([frame, frame.loc[last].assign(dim=None, epsilon=None)], ignore_index=True)
    frame["at"] = pd.Series([0.1, 8, None, 32, 1], dtype=object)  # of several axes
    csv, parquet = results.save(frame, tmp_path / "table")
    stored = pd.read_parquet(parquet)
    assert stored["at"].dropna().to_list() == [0.1, 8, 32, 1]
    assert stored["dim"].dropna().map(repr).to_list() == ["8", "32", "8", "32"]
    assert stored["dim"].isna().to_list() == [*[False] * 4, True]
    for table in (frame, stored, pd.read_csv(csv)):
        axis = plots.heat_maps(table, ["epsilon", "dim"]).axes[0]
        ticks = [text.get_text() for text in (*axis.get_xticklabels(), *axis.get_yticklabels())]
        assert sorted(ticks) == ["0.1", "0.3", "32", "8", "–", "–"]


def test_two_fields_that_are_crossed_are_a_heat_map_of_their_means():
    figure = plots.heat_maps(figures_of(FIGURES), ["method", "epsilon", "dim"])
    maps = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in maps] == ["method = SimCLR", "method = SimSiam"]
    for i, axis in enumerate(maps):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("dim m", "ε (units of z)")
        words = [text.get_text().split("\n")[0] for text in axis.texts]
        expected = [10 * i + e + d + 1 for e in (0.1, 0.2) for d in (4, 8)]
        assert words == [f"{value:.1f}" for value in expected]


def test_a_point_that_lacks_a_field_is_in_the_heat_map_too():
    frame = figures_of(FIGURES)
    frame = frame[frame["method"] == "SimCLR"].astype({"epsilon": object})
    frame.loc[frame["epsilon"] == 0.1, "epsilon"] = None  # as without an adversary
    figure = plots.heat_maps(frame, ["epsilon", "dim"])
    assert len([text for axis in figure.axes for text in axis.texts]) == 4
    axis = figure.axes[0]
    labels = [*axis.get_xticklabels(), *axis.get_yticklabels()]
    assert "–" in [label.get_text() for label in labels]


def test_what_is_crossed_besides_an_axis_has_lines_of_its_own():
    """Else a point is the mean of two methods, with an interval as if they were seeds."""
    frame = figures_of(FIGURES).assign(axis="epsilon", adversary="IDAA")
    frame = frame[(frame["dim"] == 4) & (frame["seed"] == 0)].assign(at=lambda f: f["epsilon"])
    figure = plots.sensitivity(frame, ["method", "dim"])
    lines = figure.axes[0].get_legend_handles_labels()
    assert lines[1] == ["IDAA, method = SimCLR", "IDAA, method = SimSiam"]
    heights = [[*line.lines[0].get_ydata()] for line in lines[0]]
    assert heights == [pytest.approx([4.1, 4.2]), pytest.approx([14.1, 14.2])]


def test_one_run_of_several_points_is_one_row(outputs):
    """The encoder without an adversary is the same for each VAE."""
    grid = grids.read({
        "fixed": {"all": {k: v for k, v in SMALL.items() if k != "dim"}},
        "stages": ["vae", "ssl"],
        "cross": {"vae": {"dim": [4, 8]}, "ssl": {"adversary": ["none", "idaa"]}},
    }).points()  # fmt: skip
    by_key = {}
    for key, (config, needs) in plans.plan(grid).items():
        by_key[key] = train(plans.name_needs(config, needs, by_key))
    frame = plans.table(grid)
    assert set(frame["run"].value_counts()) == {1} and len(frame) == 3
    assert grids.name_labels(grid) == ["dim", "adversary"]


@pytest.mark.parametrize(
    ("fixed", "cross"),
    [
        ({}, {"ssl": {"limit": [64, 96], "temperature": [0.2, 0.5]}}),
        (
            {"ssl": {"adversary": "idaa"}},
            {"vae": {"width": [4, 8]}, "ssl": {"epsilon": [0.1, 0.3]}},
        ),
        (
            {"ssl": {"adversary": "idaa"}},
            {"vae": {"epochs": [1, 2]}, "ssl": {"epsilon": [0.1, 0.3]}},
        ),
    ],
    ids=["limit", "width", "epochs"],
)
def test_a_crossed_field_is_not_that_of_another_stage(fixed, cross, outputs, monkeypatch):
    """Else `limit` is that of the evaluation, `width` the encoder's, the same for all: trainings of
    other limits and VAEs are drawn as one mean, with an interval as if they were seeds."""
    points = grids.read({"fixed": fixed, "cross": cross}).points()
    chains, heights = [], []
    for number, point in enumerate(points):
        vae = write_run(VAEConfig(**point.vae), {}) if "vae" in cross else None
        ssl = write_run(SSLConfig(**point.ssl | ({"vae": vae.id} if vae else {})), {})
        heights.append(10.0 * number)
        figures = {"linear_top1_val": heights[-1], "linear_n_val": 100, "linear_protocol": "p"}
        chains.append((point, [ssl, write_run(EvalConfig(run=ssl.id), figures)]))
    monkeypatch.setattr(plans, "find_chains", lambda *_: chains)
    frame, labels = plans.table(points), grids.name_labels(points)
    assert [*results.means(frame)["value"]] == heights
    figure = plots.heat_maps(frame, labels)
    texts = [text.get_text().split("\n")[0] for axis in figure.axes for text in axis.texts]
    assert sorted(map(float, texts)) == heights


def test_a_whole_number_stays_one_where_other_points_have_none(outputs, monkeypatch):
    chains = []
    for seed, labels in enumerate(({"dim": 8}, {})):
        run = write_run(SSLConfig(seed=seed), {"knn_top1_val": 40.0, "knn_n_val": 100})
        (point,) = grids.read({"stages": ["ssl"], "labels": labels}).points()
        chains.append((point, [run]))
    monkeypatch.setattr(plans, "find_chains", lambda *_: chains)
    table = plans.table([point for point, _ in chains])[["seed", "dim"]].dropna()
    assert [*map(repr, table.iloc[0])] == ["0", "8"]


def test_an_entry_has_labels_of_its_own_whichever_list_it_is_of():
    entries = [{"method": "simclr", "labels": {"system": "A"}}, {"method": "moco"}]
    labels = [entry.get("labels") for entry in entries]
    inside = [{"ssl": {"method": entry["method"]}} for entry in entries]
    inside = [e | ({"labels": own} if own else {}) for e, own in zip(inside, labels, strict=True)]
    of_stage, of_any = (
        grids.read({"stages": ["ssl"], "cross": {name: part}}).points()
        for name, part in (("ssl", entries), ("pairs", inside))
    )
    assert of_stage == of_any
    assert [point.labels for point in of_stage] == [{"system": "A"}, {"method": "moco"}]
    assert plans.admit(of_stage) == (of_stage, "")


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        ({"stages": ["eval"], "cross": {"eval": {"k": [5, 9]}}}, ["5", "9"]),
        ({"stages": ["vae"], "seeds": [3]}, ["seed 3"]),
        ({"stages": ["ssl"], "cross": {"ssl": {"epochs": [2]}}, "seeds": [4]}, ["2 (seed 4)"]),
        ({"stages": ["eval"]}, ["its one point"]),
    ],
)
def test_a_point_s_name_has_the_seed_that_it_has(grid, names):
    assert [point.name for point in grids.read(grid).points()] == names


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"fixed": {"ssl": {"seed": 5}}, "seeds": [0, 1]}, "seed=5 .* stands beside seeds"),
        ({"cross": {"ssl": {"seed": [0, 1]}}, "seeds": [0, 1]}, "stands beside seeds"),
        ({"fixed": {"vae": {"seed": 5}}, "seeds": [0, 1], "stages": ["vae"]}, "beside seeds"),
        ({"fixed": {"eval": {"run": "starter"}}}, "eval names run='starter', .* has stage ssl"),
        (
            {"fixed": {"transfer": {"run": "starter"}}, "stages": ["ssl", "transfer"]},
            "transfer names run='starter', .* has stage ssl",
        ),
    ],
)
def test_what_a_grid_would_overwrite_is_refused(grid, words, outputs):
    """As a run that another takes the place of; or two points would be one."""
    with pytest.raises(ConfigError, match=words):
        plans.plan(grids.read(grid).points())


@pytest.mark.parametrize(
    ("grid", "runs_of"),
    [
        ({"fixed": {"ssl": {"seed": 5}}}, [5]),
        ({"cross": {"ssl": {"seed": [3, 4]}}}, [3, 4]),
        ({"fixed": {"vae": {"seed": 5}}, "seeds": [0, 1]}, [0, 1]),
    ],
)
def test_a_stage_s_own_seed_takes_the_place_of_a_single_one(grid, runs_of):
    assert [point.ssl["seed"] for point in grids.read(grid).points()] == runs_of


def test_a_label_that_is_a_column_of_results_means_the_same():
    own = {
        "vae": set(),
        "ssl": {*SSLConfig.model_fields} - {"dataset", "classes", "limit", "split"},
    }
    for stage, config in (("vae", VAEConfig), ("ssl", SSLConfig), ("eval", EvalConfig)):
        for name in config.model_fields:
            (point,) = grids.read({"cross": {stage: {name: [None]}}}).points()
            (label,) = point.labels
            alike = own.get(stage, {"protocol", "run"})  # of an evaluation: a part of it
            assert label not in results.COLUMNS or label in alike, (stage, name)


def write_run(config, summary):
    """A finished run, written by hand."""
    pointers = {name: getattr(config, name, None) for name in ("vae", "run")}
    run = runs.run_for(config, "pixels", **pointers)
    data = {"name": "photos", "fingerprint": "pixels", "n": 640, "size": 32, "classes": 2}
    units = {"size": 32, "classes": 2, "mean": [0.5] * 3, "std": [0.2] * 3}
    with run.writing(config, {"dataset": data}, units) as writer:
        writer.finish(summary)
    return run


def test_a_tidy_table_is_a_call_on_the_package(outputs):
    import idaa_lib

    run = train_vae(VAEConfig(**SMALL))
    frame = idaa_lib.results()
    assert set(frame["run"]) == {run.id} == set(idaa_lib.results(runs.find("vae"))["run"])


def test_a_level_beside_an_axis_is_of_one_method():
    """Else the line without an adversary is the mean of two methods, as if they were seeds."""
    frame = figures_of(FIGURES).assign(axis="epsilon", adversary="IDAA", at=lambda f: f["epsilon"])
    frame = frame[frame["dim"] == 4]
    plain = frame[frame["epsilon"] == 0.1].assign(axis=None, at=None, adversary="no adversary")
    axis = plots.sensitivity(pd.concat([frame, plain]), ["method"]).axes[0]
    lines = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    for method, height in (("SimCLR", 5.1), ("SimSiam", 15.1)):
        line = lines[f"no adversary, method = {method}"]
        assert [*line.get_ydata()] == pytest.approx([height, height])


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ([], "over 2 trainings a point"),
        ([(0.1, 1)], "over up to 2 trainings a point, or the images of a single one"),
        ([(0.1, 1), (0.2, 0)], "over the images of 1 training a point"),
    ],
    ids=["all", "one is missing", "one each, of two seeds"],
)
def test_a_title_counts_the_trainings_of_a_point(left_out, words):
    frame = figures_of({place: 50 + value for place, value in FIGURES.items()})
    pairs = [*zip(frame["epsilon"], frame["seed"], strict=True)]
    frame = frame[[pair not in left_out for pair in pairs]].assign(adversary="IDAA")
    frame = frame[frame["method"] == "SimCLR"]
    lines = frame[frame["dim"] == 4].assign(axis="epsilon", at=lambda f: f["epsilon"])
    for figure in (plots.heat_maps(frame, ["epsilon", "dim"]), plots.sensitivity(lines)):
        title = figure.get_suptitle().replace("\n", " ")
        assert title.partition("95 % interval")[2].removeprefix("s") == f" {words}"


def test_a_heat_map_has_its_values_in_their_order():
    values = [1e-05, 0.03, 0.1, 0.3, 1.0, 3.0]
    frame = figures_of({("SimCLR", e, d, 0): 1.0 for e in values for d in (4, 16, 128)})
    axis = plots.heat_maps(frame, ["epsilon", "dim"]).axes[0]
    assert [float(label.get_text()) for label in axis.get_yticklabels()] == values
    assert [int(label.get_text()) for label in axis.get_xticklabels()] == [4, 16, 128]
