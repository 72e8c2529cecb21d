"""The notebooks under papermill, at a smoke scale, and what they say of a user's mistakes."""

import json
import subprocess
import sys

import pytest

from idaa_lib import runs, sweeps
from idaa_lib.configs import SweepConfig, VAEConfig
from idaa_lib.runs import Run, RunError
from idaa_lib.train import train_vae

SMALL = {"limit": 128, "batch_size": 32, "epochs": 1, "width": 4, "device": "cpu"}
VAE = SMALL | {"dim": 8}


def figures(run: Run):
    return {path.name for path in (run.path / "figures").glob("*.png")}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(folder))
        yield folder


def execute(notebook, parameters, folder, name="out"):
    return sweeps.execute(notebook, parameters, folder / f"{notebook}-{name}.ipynb")


@pytest.mark.xdist_group("photos")
def test_the_five_notebooks_run_on_photos(outputs, tmp_path):
    execute("01_pretrain_vae", VAE, tmp_path)
    (vae,) = runs.find("vae")
    assert figures(vae) == {"reconstruction.png", "curves.png"}

    execute("02_decompose", {"images": 3}, tmp_path, "untrained")  # no encoder is there yet
    execute("03_train_ssl", SMALL | {"adversary": "idaa"}, tmp_path)
    (ssl,) = runs.find("ssl")
    assert ssl.config.vae == vae.id
    assert figures(ssl) == {"curves.png", "collapse.png"}

    execute("02_decompose", {"images": 3}, tmp_path)
    assert {"decomposition.png", "idaa_and_clae.png", "where.png", "spectra.png"} <= figures(vae)

    execute("04_evaluate", {"limit": 128}, tmp_path)
    (judged,) = runs.find("eval")
    assert judged.config.run == ssl.id
    assert figures(judged) == {"accuracy.png", "confusion.png", "map.png", "neighbours.png"}

    # The middle of the grid is the run above, so three points make one new run each.
    stages = {"vae": VAE, "ssl": SMALL}
    stages = {k: {n: v for n, v in fields.items() if n != "device"} for k, fields in stages.items()}
    grid = {
        "epsilons": "0.1, 0.3", "betas": "6.4", "dims": "8", "jobs": 2, "device": "cpu",
        "eval": json.dumps({"limit": 128}), **{k: json.dumps(v) for k, v in stages.items()},
    }  # fmt: skip
    execute("05_sensitivity", grid, tmp_path)
    (study,) = (outputs / "sweep").iterdir()
    assert {path.name for path in study.iterdir()} == {
        "config.json", "sensitivity.csv", "sensitivity.png",
    }  # fmt: skip
    made = runs.find("ssl")
    assert len(made) == 2
    assert all((run.path / "notebook.ipynb").exists() for run in made if run != ssl)


@pytest.mark.xdist_group("cifar")
def test_01_03_04_run_on_a_subset_of_cifar10(cifar10_zip, tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    data = {"dataset": str(cifar10_zip), "limit": 500}
    execute("01_pretrain_vae", VAE | data, tmp_path)
    for adversary in ("clae", "idaa"):
        execute("03_train_ssl", SMALL | data | {"adversary": adversary}, tmp_path, adversary)
    execute("04_evaluate", {"limit": 500}, tmp_path)
    (judged,) = runs.find("eval")
    assert judged.summary["knn_n"] == 500
    assert judged.environment["dataset"]["name"] == "cifar10-images"


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"epsilom": 0.1}, "no parameter epsilom"),
        ({"epsilon": "wide", "adversary": "clae"}, "epsilon must be a number"),
        ({"adversary": "idaa"}, "no finished vae run"),
        ({"dataset": "/no/such/folder"}, "/no/such/folder"),
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
    command = [sys.executable, "-m", "papermill", str(sweeps.FOLDER / "03_train_ssl.ipynb")]
    command += [str(tmp_path / "out.ipynb"), "-p", "epsilom", "0.1", "--no-progress-bar"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "This notebook has no parameter 'epsilom'; did you mean 'epsilon'" in done.stderr


def test_a_sweep_checks_everything_before_it_runs_anything(monkeypatch):
    made = []
    monkeypatch.setattr(sweeps, "ensure", lambda config: made.append(config) or pytest.fail("ran"))
    grid = sweeps.points(SweepConfig(epsilons=(0.1, 0.2), betas=(1.0,), dims=(), seeds=(0, 1)))
    assert [(p.axis, p.value, p.ssl["seed"]) for p in grid] == [
        ("epsilon", 0.1, 0), ("epsilon", 0.1, 1), ("epsilon", 0.2, 0), ("epsilon", 0.2, 1),
        ("beta", 1.0, 0), ("beta", 1.0, 1),
    ]  # fmt: skip
    bad = SweepConfig(epsilons=(0.1,), betas=(), dims=(), ssl={"width": 0})
    with pytest.raises(ValueError, match="width must be"):
        sweeps.run_all(sweeps.points(bad))
    assert not made


def test_a_finished_point_starts_no_notebook(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    config = VAEConfig(**VAE)
    made = train_vae(config)
    monkeypatch.setattr(sweeps, "execute", lambda *a: pytest.fail("a notebook was started"))
    assert sweeps.ensure(config) == made


def test_over_dim_the_beta_of_the_middle_is_held():
    grid = sweeps.points(SweepConfig(epsilons=(), betas=(), dims=(32, 128, 512)))
    assert [p.vae["beta"] for p in grid] == pytest.approx([0.4] * 3)
