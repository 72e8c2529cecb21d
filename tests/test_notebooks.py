"""The notebooks under papermill, at a smoke scale, and what they say of a user's mistakes."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import defaultdict

import pandas as pd
import pytest

from idaa_lib import evaluate, grids, kernels, plans, results, runs, sweeps
from idaa_lib.configs import (
    CompareConfig,
    ConfigError,
    EvalConfig,
    SSLConfig,
    SweepConfig,
    VAEConfig,
)
from idaa_lib.runs import Run, RunError
from idaa_lib.train import train, train_ssl, train_vae

SMALL = {"limit": 128, "batch_size": 32, "epochs": 1, "width": 4, "device": "cpu"}
VAE = SMALL | {"dim": 8}


def figures(run: Run):
    return {path.name for path in (run.path / "figures").glob("*.png")}


@pytest.fixture(scope="module")
def outputs(module_outputs):
    return module_outputs


def execute(notebook, parameters, folder, name="out"):
    return sweeps.execute(notebook, parameters, folder / f"{notebook}-{name}.ipynb")


def outputs_of(path, call):
    """Of the cell that calls this: the outputs by their type, `text` for what was printed."""
    cells = json.loads(path.read_text())["cells"]
    parts = defaultdict(list)
    for output in next(c for c in cells if call in "".join(c["source"]))["outputs"]:
        for kind, value in (output.get("data") or {"text": output["text"]}).items():
            parts[kind].append("".join(value))
    return parts


@pytest.mark.xdist_group("photos")
def test_the_five_notebooks_run_on_photos(outputs, tmp_path):
    execute("01_pretrain_vae", VAE, tmp_path)
    (vae,) = runs.find("vae")
    assert figures(vae) == {"reconstruction.png", "curves.png"}
    assert vae.starts.keys() == {"sweep"}  # as `sweeps.execute` runs it

    execute("02_decompose", {"images": 3}, tmp_path, "untrained")  # no encoder is there yet
    training_notebook = execute("03_train_ssl", SMALL | {"adversary": "idaa"}, tmp_path)
    (ssl,) = runs.find("ssl")
    record = outputs_of(training_notebook, "live.train")  # of a copy, which has no kernel
    assert any(f"{ssl.summary['n_val']}" in html for html in record["text/html"])
    assert len(record["image/png"]) == 1
    assert ssl.config.vae == vae.id
    assert figures(ssl) == {"views.png", "curves.png", "collapse.png"}

    decompose_notebook = execute("02_decompose", {"images": 3}, tmp_path)
    names = [f"vae: {results.full_name(vae)}", f"run: {results.full_name(ssl)}"]
    cells = json.loads(decompose_notebook.read_text())["cells"]
    cell = next(c for c in cells if c.get("id") == "02-02")
    text = "".join(cell["outputs"][0]["text"])
    assert all(name in text for name in names) and f'as in run = "{ssl.id[-8:]}"' in text
    # What the explorer showed is there without a kernel.
    (cell,) = [cell for cell in cells if "Explorer(config)" in "".join(cell["source"])]
    kinds = [set(output.get("data", {})) for output in cell["outputs"]]
    assert {"image/png"} in [kind - {"text/plain"} for kind in kinds]
    tables = ["".join(output.get("data", {}).get("text/html", "")) for output in cell["outputs"]]
    assert any("finds x itself" in table and "IDAA, ε = 0.1" in table for table in tables)
    assert {"decomposition.png", "idaa_and_clae.png", "where.png", "spectra.png"} <= figures(vae)

    execute("04_evaluate", {"limit": 128}, tmp_path)
    (evaluation,) = runs.find("eval")
    assert evaluation.config.run == ssl.id
    assert figures(evaluation) == {"accuracy.png", "confusion.png", "map.png", "neighbours.png"}

    # The middle of the grid is the run above; another ε and no adversary are new encoders.
    stages = {"vae": VAE, "ssl": SMALL}
    stages = {k: {n: v for n, v in fields.items() if n != "device"} for k, fields in stages.items()}
    grid = {
        "epsilons": "0.1, 0.3", "betas": "6.4", "dims": "8", "jobs": 2, "device": "cpu",
        "eval": json.dumps({"limit": 128}), **{k: json.dumps(v) for k, v in stages.items()},
    }  # fmt: skip
    sweep_notebook = execute("05_sensitivity", grid, tmp_path)
    (plan,) = outputs_of(sweep_notebook, "plans.outline")["text"]
    sentence = "5 points take 7 runs (1 vae, 3 ssl, 3 eval): 3 finished, 4 to make, "
    assert plan.startswith(sentence + "2 at a time: about ")
    lines = "".join(outputs_of(sweep_notebook, "study.perform")["text"])
    assert re.search(r"(\d+) of \1 runs finished\n", lines)
    (study,) = (outputs / "sweep").iterdir()
    assert {path.name for path in study.iterdir()} == {
        "config.json", "sensitivity.csv", "sensitivity.parquet", "sensitivity.png",
    }  # fmt: skip
    encoders = runs.find("ssl")
    assert len(encoders) == 3
    assert all((run.path / "notebook.ipynb").exists() for run in encoders if run != ssl)


@pytest.mark.xdist_group("photos")
def test_a_method_and_an_adversary_of_one_s_own(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    train_vae(VAEConfig(**VAE))
    execute("12_your_own_method", SMALL | {"spread": 0.3}, tmp_path)
    ids = {path.name[: path.name.index("-limit")] for path in (tmp_path / "outputs/ssl").iterdir()}
    assert ids == {f"ssl-photos-align_uniform-{name}" for name in ("none", "idaa_posterior")}
    pictures = {path.name for path in (tmp_path / "outputs/ssl").rglob("figures/*.png")}
    assert pictures == {"curves.png", "views.png", "power.png"}


@pytest.mark.xdist_group("cifar")
def test_01_03_04_run_on_a_subset_of_cifar10(cifar10_zip, tmp_path, monkeypatch):
    """Of a zip of every twentieth image, which is soon decoded."""
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    part = tmp_path / cifar10_zip.name
    with zipfile.ZipFile(cifar10_zip) as archive, zipfile.ZipFile(part, "w") as copy:
        for name in sorted(name for name in archive.namelist() if name[-1] != "/")[::20]:
            copy.writestr(name, archive.read(name))
    data = {"dataset": str(part), "limit": 500}
    execute("01_pretrain_vae", VAE | data, tmp_path)
    execute("03_train_ssl", SMALL | data | {"adversary": "idaa"}, tmp_path)
    execute("04_evaluate", {"limit": 500}, tmp_path)
    (evaluation,) = runs.find("eval")
    assert evaluation.summary["knn_n"] == 500
    assert evaluation.environment["dataset"]["name"] == "cifar10-images"


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"epsilon": 0.1}, "epsilon is a knob of adversary=.*, and adversary is 'none'"),
        ({"adversary": "idaa"}, "no finished vae run"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, parameters, sentence):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    with pytest.raises(RunError, match=sentence):
        execute("03_train_ssl", SMALL | parameters, tmp_path)
    assert not (tmp_path / "outputs" / "ssl").exists()


def test_a_name_that_papermill_only_warns_of_stops_the_notebook(tmp_path, monkeypatch):
    """As a user types it: papermill alone, whose exit status must tell."""
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    command = [sys.executable, "-m", "papermill", str(kernels.FOLDER / "03_train_ssl.ipynb")]
    command += [str(tmp_path / "out.ipynb"), "-p", "epsilom", "0.1", "--no-progress-bar"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    assert "This notebook has no parameter 'epsilom'; did you mean 'epsilon'" in process.stderr


# --- grids, plans, sweeps ------------------------------------------------------------------------


def test_a_sweep_checks_everything_before_it_runs_anything():
    grid = grids.sensitivity(SweepConfig(epsilons=(0.1, 0.2), betas=(1.0,), dims=(), seeds=(0, 1)))
    assert [(p.labels["axis"], p.labels["at"], p.ssl["seed"], p.vae["seed"]) for p in grid] == [
        ("epsilon", 0.1, 0, 0), ("epsilon", 0.1, 1, 1), ("epsilon", 0.2, 0, 0),
        ("epsilon", 0.2, 1, 1), ("beta", 1.0, 0, 0), ("beta", 1.0, 1, 1),
        (None, None, 0, 0), (None, None, 1, 1),
    ]  # fmt: skip
    assert {p.ssl["adversary"] for p in grid if p.labels["at"] is None} == {"none"}
    # One training without an adversary is the line of all axes, without its knobs.
    knobs = SweepConfig(epsilons=(0.1,), betas=(1.0,), dims=(), ssl={"steps": 2, "epochs": 3})
    keys = [config for config, _ in plans.plan(grids.sensitivity(knobs)).values()]
    (plain_config,) = [c for c in keys if c.stage == "ssl" and c.adversary == "none"]
    assert plain_config.epochs == 3
    bad_sweep = SweepConfig(epsilons=(0.1,), betas=(), dims=(), ssl={"width": 0})
    with pytest.raises(ValueError, match="width must be"):
        plans.plan(grids.sensitivity(bad_sweep))


def test_a_grid_is_data_and_a_plan_shares_what_it_can(tmp_path):
    """One adversary needs the VAE, one does not; a seed of the encoders alone takes one VAE too."""
    text = """
        seeds: [0, 1]
        labels: {study: small}
        fixed: {all: {limit: 64}, vae: {seed: 0, dim: 8}, eval: {references: false}}
        cross: {ssl: {adversary: [clae, idaa], epsilon: [1e-1, 1/5]}}
    """
    (tmp_path / "grid.yaml").write_text(text)
    grid = grids.read(tmp_path / "grid.yaml").points()
    assert len(grid) == 8
    assert grid[3].labels == {"study": "small", "adversary": "clae", "epsilon": 0.2}
    assert grid[3].ssl == {"limit": 64, "seed": 1, "adversary": "clae", "epsilon": "1/5"}
    assert grid[3].vae == {"limit": 64, "seed": 0, "dim": 8}
    assert grid[3].eval == {"limit": 64, "references": False}
    tasks = plans.plan(grid)
    stages = [key.partition("-")[0] for key in tasks]
    assert {stage: stages.count(stage) for stage in stages} == {"ssl": 8, "eval": 8, "vae": 1}
    for key, (config, needs) in tasks.items():
        assert config.stage == key.partition("-")[0]
        assert all([*tasks].index(other) < [*tasks].index(key) for other in needs.values())
    assert pickle.loads(pickle.dumps(tasks)).keys() == tasks.keys()
    assert pickle.loads(pickle.dumps(sweeps.perform)) is sweeps.perform


def test_the_demo_s_sweep_is_that_of_notebook_05_and_three_encoders():
    grid = grids.read("demo").points()
    assert [point.labels["adversary"] for point in grid[-3:]] == ["none", "clae", "idaa"]
    tasks, study = plans.plan(grid), plans.plan(grids.sensitivity(SweepConfig()))
    # The plain encoder of the study is judged with references here, which serve there too.
    (other,) = study.keys() - tasks.keys()
    assert study[other].config.replace(references=True) in [task.config for task in tasks.values()]
    # The middle of the study is the encoder with IDAA: one run for both.
    assert len([key for key in tasks if key.startswith("ssl")]) == 3 + 6


@pytest.mark.parametrize(
    ("name", "study"),
    [("figure-5", grids.sensitivity(SweepConfig(preset="paper", figure=5))),
     ("figure-6", grids.sensitivity(SweepConfig(preset="paper"))),
     ("table", grids.cells(CompareConfig(preset="paper")))],
)  # fmt: skip
def test_the_paper_s_figures_and_table_are_grid_files(name, study):
    """The same runs as the notebooks' own forms lead to."""
    assert plans.plan(grids.read(name).points()).keys() == plans.plan(study).keys()


def test_what_goes_together_is_one_axis_and_all_stages_share_a_field():
    grid = grids.read({
        "stages": ["vae", "ssl", "transfer"],
        "fixed": {"all": {"limit": 64}},
        "cross": {
            "all": {"size": [32, 64]},
            "ssl": [{"adversary": "none"}, {"adversary": "idaa", "epsilon": 0.3}],
            "budget": [
                {"ssl": {"epochs": 1}, "vae": {"epochs": 2}, "labels": {"budget": "small"}},
                {"ssl": {"epochs": 5}, "vae": {"epochs": 9}, "labels": {"budget": "large"}},
            ],
        },
    }).points()  # fmt: skip
    assert len(grid) == 2 * 2 * 2 and all(point.eval is None for point in grid)
    assert grid[3].labels == {"size": 32, "adversary": "idaa", "epsilon": 0.3, "budget": "large"}
    assert (grid[3].vae["size"], grid[3].vae["epochs"], grid[3].ssl["epochs"]) == (32, 9, 5)
    assert grid[3].transfer == {"limit": 64, "size": 32}
    stages = [key.partition("-")[0] for key in plans.plan(grid)]
    assert {stage: stages.count(stage) for stage in stages} == {"ssl": 8, "transfer": 8, "vae": 4}


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [({"croos": {}}, "Grid has no field 'croos'; its fields are about, "),
     ({"cross": {"ssl": {"epochs": 3}}}, r"cross\['epochs'\] must be a list of values, and is 3"),
     ({"cross": {"sll": {"epochs": [3]}}}, "'sll', which is none of vae, ssl, eval, transfer"),
     ({"fixed": {"all": {"epoch": 3}}}, "'epoch' of all stages, which none of them knows"),
     ({"seeds": [-1]}, "seeds must be"),
     ({"stages": ["vae", "ssi"]}, "stages must be"),
     ({"cross": {"ssl": {"width": [4, 0]}}}, "1 of 2 cannot be made: width must be .*0 .seed 0"),
     ({"fixed": {"vae": {"size": 32}, "ssl": {"size": 64, "adversary": "idaa"}}},
      "the VAE of the grid has size=32, and this run needs 64"),
     ({"stages": ["ssl"], "cross": {"vae": {"dim": [8, 16]}}}, "set fields of vae, and the stages"),
     ({"vary": {"transfer": {"shots": [1, 5]}}}, "set fields of transfer, and the stages"),
     ({"fixed": {"all": {"seed": 3}}}, "cannot set the seed of all stages: give seeds"),
     ("no-such-grid", "grid 'no-such-grid' cannot be read.*demo, figure-5, figure-6, table")],
)  # fmt: skip
def test_a_grid_that_cannot_be_made_is_refused_in_a_sentence(grid, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plans.plan(grids.read(grid).points())


@pytest.mark.parametrize(("axis", "field"), [("epsilon", "epsilons"), ("dim", "dims")])
def test_a_point_of_an_axis_is_named_as_one_would_set_it(axis, field):
    values = dict(epsilons=(), betas=(), dims=()) | {field: (2, 3)}
    names = [point.name for point in grids.sensitivity(SweepConfig(**values))]
    number = float if axis == "epsilon" else int
    expected = [f"{axis}={number(value)} × idaa (seed 0)" for value in (2, 3)]
    assert names == [*expected, "none (seed 0)"]


AXES_OF_ONE_NAME = {"vae": {"epochs": [6, 12]}, "ssl": {"epochs": [3, 6]}}


@pytest.mark.parametrize(
    "grid",
    [{"cross": AXES_OF_ONE_NAME}, {"vary": AXES_OF_ONE_NAME},
     {"cross": {"all": {"width": [4, 8]}, "ssl": {"width": [16, 32]}}},
     {"cross": {"budget": [{"ssl": {"epochs": 1}, "vae": {"epochs": 2}},
                           {"ssl": {"epochs": 2}, "vae": {"epochs": 2}}]}}],
)  # fmt: skip
def test_points_that_differ_have_other_labels(grid):
    """Else a table shows one for the other, and a figure the mean of both."""
    points = grids.read(grid | {"fixed": {"ssl": {"adversary": "idaa"}}, "seeds": [0, 1]}).points()
    assert len({point.name for point in points}) == len(points)
    by_labels = {json.dumps(p.labels | {"seed": p.ssl["seed"]}, sort_keys=True) for p in points}
    assert len(by_labels) == len(points)


def test_an_axis_without_values_is_left_out():
    (point,) = grids.read(
        {"vary": {"ssl": {"epsilon": []}}, "cross": {"vae": {"dim": []}}}
    ).points()
    assert point.labels == {}
    with pytest.raises(ConfigError, match="The study has no point: give values of epsilons"):
        grids.sensitivity(SweepConfig(epsilons=[], betas=[], dims=[]))


def test_a_dry_run_refuses_what_is_not_there_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "grid.yaml").write_text("fixed: {all: {limit: 128, device: cpu}}\nseeds: [0, 1]\n")
    assert sweeps.main([str(tmp_path / "grid.yaml"), "--dry-run"]) == 0
    assert "2 points take 4 runs (2 ssl, 2 eval): 0 finished, 4" in capsys.readouterr().out
    (tmp_path / "grid.yaml").write_text("fixed: {all: {dataset: /no/folder, device: cuda}}\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sweeps.main([str(tmp_path / "grid.yaml")]) == 2
    assert "1 of 1 cannot be made: device must be" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("notebooks", "sentence"),
    [("2_decompose: {}", "notebooks names '2_decompose', .* 02_decompose, "),
     ("02_decompose: {run: '@transfer'}",
      "run of notebook 02_decompose is '@transfer', and must be one of @vae, @ssl, @eval")],
)  # fmt: skip
def test_a_further_notebook_is_checked_before_anything_is_trained(
    notebooks, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(sweeps, "perform", lambda config: pytest.fail("a run was started"))
    (tmp_path / "grid.yaml").write_text(f"notebooks: {{{notebooks}}}\n")
    for flags in ([], ["--dry-run"]):
        assert sweeps.main([str(tmp_path / "grid.yaml"), *flags]) == 2
        assert re.search(sentence, capsys.readouterr().err)


def test_a_failing_point_stops_nothing_and_is_named_at_the_end(
    outputs, tmp_path, monkeypatch, capsys
):
    """Of three trainings one fails: its evaluation is left out, all else is there."""
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    direct = lambda self, c: evaluate(c) if isinstance(c, EvalConfig) else train(c)  # noqa: E731
    monkeypatch.setattr(sweeps.Kernels, "ensure", direct)
    fields = {"all": {"device": "cpu", "limit": 128}, "eval": {"references": False}}
    fields["ssl"] = {"width": 4, "epochs": 1, "batch_size": 32}
    grid = grids.read(
        {"fixed": fields, "cross": {"ssl": {"learning_rate": [1e-3, 1e30, 1e-4]}}}
    ).points()
    counts = []
    outcomes = sweeps.perform_all(
        plans.plan(grid), 2, lambda outcome_by_key: counts.append(len(outcome_by_key))
    )
    states = sorted(outcome.state for outcome in outcomes.values())
    assert states == ["failed", *4 * ["finished"], "left out"]
    assert counts == [2, 4, 6]  # an encoder and its evaluation at a time
    lines = capsys.readouterr().out
    assert "4 of 6 runs finished · 1 failed · 1 left out" in lines
    assert "lower learning_rate" in lines
    (failure,) = (o for o in outcomes.values() if o.state == "failed")
    assert failure.id.startswith("ssl-") and "lower learning_rate" in failure.error
    assert len(plans.find_points(grid)) == 2
    assert set(plans.table(grid)["learning_rate"]) == {1e-3, 1e-4}
    assert "1 of 3 points are missing: 1e+30 (seed 0)" in plans.outline(grid, 1)
    with pytest.raises(RunError, match=r"2 of 6 are missing(.|\n)*lower learning_rate"):
        sweeps.check(outcomes)


SWEEP = """
fixed:
  all: {device: cpu, limit: 128}
  ssl: {width: 4, batch_size: 32, epochs: 1}
  eval: {references: false}
cross: {ssl: {learning_rate: [1e-3, %s]}}
"""


def test_the_command_says_what_failed_and_ends_with_1(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP % "1e30")
    environment = os.environ | {"IDAA_OUTPUTS": str(tmp_path / "outputs")}
    command = [sys.executable, "-m", "idaa_lib.sweeps", str(tmp_path / "sweep.yaml")]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 1
    assert "lower learning_rate" in process.stderr and "Traceback" not in process.stderr
    assert "kNN (%)" in process.stdout and "kNN: clean" in process.stdout
    assert "accuracy.png" in process.stdout and "notebook.ipynb" in process.stdout
    command[-1] = "no-such-sweep"
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 2 and "no-such-sweep" in process.stderr  # nothing could start


def test_notebooks_of_a_sweep_file_get_the_runs_of_its_last_point(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    text = SWEEP.replace("learning_rate: [1e-3, %s]", "adversary: [idaa]")
    text = text.replace("  ssl:", "  vae: {width: 4, batch_size: 32, epochs: 1, dim: 8}\n  ssl:", 1)
    # The last point is the first one again, and the last runs of the plan are another's.
    other = "{cross: {ssl: {adversary: [idaa]}, vae: {dim: [16]}}}"
    text += f"grids: [{{seeds: [0]}}, {other}, {{seeds: [0]}}]\n"
    text += 'notebooks: {02_decompose: {vae: "@vae", run: "@ssl", images: 3}}\n'
    (tmp_path / "sweep.yaml").write_text(text)
    direct = lambda self, c: evaluate(c) if isinstance(c, EvalConfig) else train(c)  # noqa: E731
    monkeypatch.setattr(sweeps.Kernels, "ensure", direct)
    calls = []
    monkeypatch.setattr(sweeps, "execute", lambda *args: calls.append(args) or args[-1])
    assert sweeps.main([str(tmp_path / "sweep.yaml")]) == 0
    (vae,), (other,) = runs.find("vae", dim=8), runs.find("vae", dim=16)
    (ssl,), (_,) = runs.find("ssl", vae=vae.id), runs.find("ssl", vae=other.id)
    ((name, values, _),) = calls
    assert (name, values) == ("02_decompose", {"vae": vae.id, "run": ssl.id, "images": 3})
    output = capsys.readouterr().out
    assert "6 of 6 runs finished" in output and "SimCLR + IDAA" in output and "Done" in output


def test_two_sweeps_after_one_that_was_killed_start_no_run_twice(tmp_path, monkeypatch):
    """Of a driver that SIGKILL ended the kernels end too. Two others then make one run of each
    configuration: the second waits, and finds it finished."""
    code = (
        "import os, sys; from idaa_lib import sweeps\n"
        "original = sweeps.execute\n"
        "def execute(*args):\n"
        "    with open(sys.argv[1], 'a') as file: print(os.getpid(), args[0], file=file)\n"
        "    return original(*args)\n"
        "sweeps.execute = execute\n"
        "sys.exit(sweeps.main(sys.argv[2:]))"
    )
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "sweep.yaml").write_text("jobs: 2\n" + SWEEP % "1e-4")
    command = [sys.executable, "-c", code, str(tmp_path / "log"), str(tmp_path / "sweep.yaml")]

    def drive():
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    killed = drive()
    deadline = time.monotonic() + 120
    while not [*(tmp_path / "outputs").glob("ssl/*/config.json")]:  # a kernel trains
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    processes = [drive() for _ in range(2)]
    texts = [process.communicate(timeout=500)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    starts = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(name for pid, name in starts if int(pid) != killed.pid) == [
        "03_train_ssl", "03_train_ssl", "04_evaluate", "04_evaluate",
    ]  # fmt: skip
    tables = [text[text.index("kNN (%)") :] for text in texts]
    assert tables[0].partition("Done")[0].splitlines()[:4] == tables[1].splitlines()[:4]
    for run in (everything := runs.list_runs("ssl", "eval")):
        assert plans.is_whole(run) and (run.path / "notebook.ipynb").exists() and figures(run)
    assert len(everything) == 4


def test_a_run_that_a_notebook_makes_is_stopped_by_an_interrupt(tmp_path, monkeypatch):
    """Ctrl-C in the driver: the run under way is saved after its step, and nothing else starts."""
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    text = (SWEEP % "1e-4").replace("epochs: 1", "epochs: 4000")
    (tmp_path / "sweep.yaml").write_text(text)
    command = [sys.executable, "-m", "idaa_lib.sweeps", str(tmp_path / "sweep.yaml")]
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from idaa_lib import sweeps; sys.exit(sweeps.main(sys.argv[1:]))"
    command[1:3] = ["-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (trainings := [r for r in runs.find("ssl", finished=False) if r.metrics()]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130 and "the same command goes on from there" in output
    assert [run.state["state"] for run in runs.find("ssl", finished=False)] == ["interrupted"]
    assert trainings[0].state["step"] > 0


def test_a_finished_point_starts_no_notebook(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    config = VAEConfig(**VAE)
    run = train_vae(config)
    monkeypatch.setattr(sweeps, "execute", lambda *a: pytest.fail("a notebook was started"))
    assert sweeps.ensure(config) == run
    assert sweeps.perform(config) == (run.id, "finished", None, 0.0)


def test_further_axes_have_each_value_with_the_adversary_and_without():
    axes = {"batch_size": [64, 128], "backbone": ["resnet18", "resnet34"]}
    config = SweepConfig(epsilons=(), betas=(), dims=(), axes=json.dumps(axes))
    grid = grids.sensitivity(config)
    labels = [(*point.labels.values(),) for point in grid]
    assert labels == [
        (name, value, adversary)
        for name, values in axes.items()
        for value in values
        for adversary in ("idaa", "none")
    ]
    assert [p.ssl[name] for p, (name, *_) in zip(grid, labels, strict=True)] == [
        value for _, value, _ in labels
    ]
    for name in ("epsilon", "adversary"):
        with pytest.raises(ValueError, match=f"axes cannot vary '{name}'"):
            SweepConfig(axes={name: [1]})
    with pytest.raises(ValueError, match="widht"):
        plans.plan(grids.sensitivity(SweepConfig(axes={"widht": [1]})))
    with pytest.raises(ValueError, match=r"axes\['epochs'\] must be a list of values, and is 3"):
        SweepConfig(axes={"epochs": 3})


@pytest.mark.parametrize("preset", ["demo", "paper"])
def test_a_study_chooses_on_images_that_are_held_out_whatever_the_preset(preset):
    grid = grids.sensitivity(SweepConfig(preset=preset, axes={"batch_size": [64]}))
    for point in grid:
        stages = VAEConfig(**point.vae), SSLConfig(**point.ssl)
        assert [config.split for config in stages] == ["train", "train"]
        assert EvalConfig(**point.eval).protocol == "clean"


CROSS = {"ssl": {"adversary": ["idaa"], "epsilon": [0.1, 0.3]}, "vae": {"dim": [8, 16]}}
GRIDS = {  # a grid, and what it says itself
    "open": ({"cross": CROSS}, {}),
    "preset": ({"cross": CROSS, "fixed": {"all": {"preset": "paper"}}}, {"preset": "paper"}),
    "images": (
        {"cross": CROSS, "fixed": {"all": {"dataset": "cifar100"}}, "seeds": [5]},
        {"dataset": "cifar100", "seeds": [5]},
    ),
    "parts": (
        {"grids": [{"cross": CROSS, "seeds": [0]}, {"cross": {"ssl": {"epochs": [1]}}}],
         "fixed": {"all": {"device": "cpu"}}},
        {"device": "cpu"},
    ),
    "figure-6": ("figure-6", {"preset": "paper", "dataset": "cifar10"}),
}  # fmt: skip
FORMS = [
    {}, {"preset": "paper"}, {"preset": "cifar10", "device": "cuda", "seeds": "3, 4"},
    {"dataset": "stl10-all", "seeds": "1", "eval": {"k": 7}, "ssl": {"epochs": 2}},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_what_a_grid_leaves_open_is_as_the_form_of_notebook_05_has_it(name, form):
    grid, own = GRIDS[name]
    points = grids.sensitivity(SweepConfig(grid=grid, **form))
    assert len(points) >= 2
    seeds = [int(seed) for seed in form.get("seeds", "").split(",") if seed]
    assert {p.ssl["seed"] for p in points} == {*(seeds or own.get("seeds", [0]))}
    assert {p.vae["seed"] for p in points} == {p.ssl["seed"] for p in points}
    wish = {"preset": "demo", "device": "auto"} | form | own
    for point in points:
        vae, ssl = VAEConfig(**point.vae), SSLConfig(**point.ssl)
        judgement = EvalConfig(**point.eval)
        assert {c.preset for c in (vae, ssl, judgement)} == {wish["preset"]}
        assert {c.device for c in (vae, ssl, judgement)} == {wish["device"]}
        images = wish.get("dataset") or SSLConfig(preset=wish["preset"]).dataset
        assert (vae.dataset, ssl.dataset) == (images, images)
        assert judgement.dataset in (None, own.get("dataset"))  # as its encoder's
        assert (vae.split, ssl.split, judgement.protocol) == ("train", "train", "clean")
        assert judgement.k == form.get("eval", {}).get("k", 200)
        if "ssl" in form and name != "parts":
            assert ssl.epochs == 2
    plans.plan(points)


@pytest.mark.parametrize("preset", ["demo", "paper"])
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"grid": {"fixed": {"eval": {"protocol": "official"}}}}, "protocol='official' of 1 of 1"),
     ({"grid": {"fixed": {"all": {"protocol": "official"}}}}, "protocol='official' of 1 of 1"),
     ({"grid": {"cross": {"eval": {"protocol": ["clean", "official"]}}}},
      r"protocol='official' of 1 of 2 points \(such as official"),
     ({"grid": {"fixed": {"all": {"split": "trainval"}}}}, "split='trainval' of 1 of 1"),
     ({"eval": {"protocol": "official"}}, "protocol='official' of "),
     ({"ssl": {"split": "trainval"}}, "split='trainval' of ")],
)  # fmt: skip
def test_a_study_without_a_validation_split_is_refused(fields, sentence, preset):
    with pytest.raises(ConfigError, match=sentence) as caught:
        grids.sensitivity(SweepConfig(preset=preset, **fields))
    assert len(str(caught.value)) <= 400


def test_over_dim_the_beta_of_the_middle_is_held():
    grid = grids.sensitivity(SweepConfig(epsilons=(), betas=(), dims=(32, 128, 512)))
    assert [p.vae["beta"] for p in grid[:3]] == pytest.approx([0.4] * 3)


# --- the main table ------------------------------------------------------------------------------


def test_the_table_is_filled_from_finished_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    fields = {k: SMALL[k] for k in SMALL.keys() - {"device"}}
    config = CompareConfig(
        methods="simclr, moco", adversaries=("none", "clae"), ssl=fields, eval={"limit": 100}
    )
    grid = grids.cells(config)
    assert len(grid) == 4 and plans.table(grid).empty
    assert "4 of 4 points are missing: simclr × none (seed 0), " in plans.outline(grid, 1)
    run = train_ssl(SSLConfig(**grid[0].ssl))
    assert plans.find_points(grid) == []  # trained, not judged
    evaluation = evaluate(EvalConfig(**grid[0].eval, run=run.reference))
    frame = plans.table(grid)
    assert set(frame["run"]) == {run.id, evaluation.id}
    test = frame[(frame["split"] == "test") & (frame["features"] == "encoder")]
    assert [*test["metric"]][:2] == ["kNN", "linear"]
    assert test["value"].iloc[0] == evaluation.summary["knn_top1"]
    text = plans.outline(grid, 1)
    assert "3 of 4" in text and "simclr × none" not in text
    (group,) = results.groups(frame)
    # Photographs are no images of the paper.
    assert [*group.table.index] == ["SimCLR", "untrained encoder", "raw pixels"]
    assert "official" not in group.protocols
    (run.path / "model.json").write_text("[]")
    assert plans.table(grid).empty
    assert f"Left out: {run.path}: " in capsys.readouterr().out


def test_the_table_ends_with_what_every_encoder_has_to_beat(outputs, tmp_path, monkeypatch):
    """Notebook 06 itself, on one cell that is finished and one that is not."""
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    fields = {k: SMALL[k] for k in SMALL.keys() - {"device"}}
    parameters = {"methods": "simclr", "adversaries": "none, clae", "device": "cpu"}
    parameters |= {"ssl": json.dumps(fields), "eval": json.dumps({"limit": 100})}
    first, _ = grids.cells(CompareConfig(**parameters))
    run = train_ssl(SSLConfig(**first.ssl))
    first_eval = evaluate(EvalConfig(**first.eval, run=run.reference))
    summary = first_eval.summary
    execute("06_compare_methods", parameters, tmp_path)
    (study,) = (tmp_path / "outputs" / "compare").iterdir()
    assert {path.name for path in study.iterdir()} >= {"table.csv", "methods.png"}
    frame = pd.read_csv(study / "table.csv")
    frame = frame[(frame["metric"] == "kNN") & (frame["split"] == "test")]
    assert [*frame["features"]] == ["encoder", "untrained encoder", "raw pixels"]
    values = [summary[f"{prefix}knn_top1"] for prefix in ("", "random_", "pixels_")]
    assert [*frame["value"]] == pytest.approx(values)
    # In another study it is not the first cell: what was judged with references serves there too.
    other = CompareConfig(**parameters | {"adversaries": "clae, none"})
    ((_, evaluation),) = plans.find_points(grids.cells(other))
    assert evaluation == first_eval


def test_references_are_judged_where_they_are_the_same_for_all_and_small():
    def references(**values):
        return [p.eval["references"] for p in grids.cells(CompareConfig(**values))]

    assert references(methods="simclr, moco", adversaries="none") == [True, False]
    assert references(methods="simclr", preset="paper", eval={"protocol": "clean"}) == [
        True,
        False,
        False,
    ]
    assert not any(references(preset="paper"))  # each method is judged by a layer of its own
    assert not any(references(dataset="imagenet", ssl={"size": 224}))
    assert not any(references(eval={"references": False}))


def test_a_vae_from_elsewhere_is_a_row_more():
    config = CompareConfig(methods=("simclr", "byol"), adversaries=("none",), elsewhere="stl10")
    grid = grids.cells(config)
    data = [(p.labels["adversary"], p.vae["dataset"], p.ssl["dataset"]) for p in grid]
    assert data == 2 * [("none", "photos", "photos"), ("idaa", "stl10", "photos")]
    assert [point.labels["vae_of"] for point in grid] == 2 * [None, "stl10"]


def test_one_method_may_train_longer():
    config = CompareConfig(
        methods="simclr, byol", adversaries="none", ssl={"epochs": 2, "width": 4},
        ssl_of='{"byol": {"epochs": 5}}',
    )  # fmt: skip
    grid = grids.cells(config)
    assert [SSLConfig(**point.ssl).epochs for point in grid] == [2, 5]
    assert [SSLConfig(**point.ssl).width for point in grid] == [4, 4]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"moco": {}}, "ssl_of has fields of 'moco', which methods does not name"),
     ({"byol": {"seed": 1}}, "ssl_of['byol'] cannot set 'seed': the study sets it itself"),
     ({"byol": {"method": "uel"}}, "ssl_of['byol'] cannot set 'method'"),
     ({"byol": 5}, "ssl_of"), (5, "ssl_of")],
)  # fmt: skip
def test_fields_of_one_method_are_checked(fields, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        CompareConfig(methods="simclr, byol", ssl_of=fields)
