"""The notebooks under papermill, at a smoke scale, and what they say of a user's mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from idaa_lib import evaluate, runs, sweeps
from idaa_lib.configs import (
    CompareConfig,
    ConfigError,
    EvalConfig,
    SSLConfig,
    SweepConfig,
    VAEConfig,
)
from idaa_lib.lab import table
from idaa_lib.runs import Run, RunError
from idaa_lib.train import train_ssl, train_vae

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
    told = [(p.labels["axis"], p.labels["value"], p.ssl["seed"]) for p in grid]
    assert told == [
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


def test_further_axes_have_each_value_with_the_adversary_and_without():
    axes = {"batch_size": [64, 128], "backbone": ["resnet18", "resnet34"]}
    config = SweepConfig(epsilons=(), betas=(), dims=(), axes=json.dumps(axes))
    grid = sweeps.points(config)
    told = [(p.labels["axis"], p.labels["value"], p.labels["adversary"]) for p in grid]
    assert told == [
        (name, value, adversary)
        for name, values in axes.items()
        for value in values
        for adversary in ("idaa", "none")
    ]
    assert [p.ssl[name] for p, (name, *_) in zip(grid, told, strict=True)] == [t[1] for t in told]
    for name in ("epsilon", "adversary", "widht"):
        with pytest.raises(ValueError, match=f"axes cannot vary '{name}'"):
            SweepConfig(axes={name: [1]})
    with pytest.raises(ValueError, match="must be a list of values, not 3"):
        SweepConfig(axes={"epochs": 3})


def test_the_table_is_filled_from_finished_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    small = {k: SMALL[k] for k in SMALL.keys() - {"device"}}
    config = CompareConfig(
        methods="simclr, moco", adversaries=("none", "clae"), ssl=small, eval={"limit": 100}
    )
    grid = sweeps.cells(config)
    assert len(grid) == 4 and sweeps.collect(grid) == []
    assert "4 of 4 runs are missing: simclr × none (seed 0), " in table.missing(grid, [])
    run = train_ssl(SSLConfig(**grid[0].ssl))
    assert sweeps.collect(grid) == []  # trained, not judged
    judged = evaluate(EvalConfig(**grid[0].eval, run=run.reference))
    (row,) = rows = sweeps.collect(grid)
    assert (row["method"], row["adversary"], row["vae"]) == ("simclr", "none", None)
    assert row["knn_top1"] == judged.summary["knn_top1"]
    assert "3 of 4" in (said := table.missing(grid, rows)) and "simclr × none" not in said
    shown = table.frame(grid, rows)
    assert list(shown["kNN (%)"])[:4] == [f"{row['knn_top1']:.2f}", "–", "–", "–"]
    assert set(shown["paper's kNN (%)"]) == {"–"}  # photographs are no images of the paper
    assert table.protocol(grid) == ""
    assert table.budget(rows).startswith("Ours: photos, ") and "official" not in table.budget(rows)


@pytest.mark.parametrize(
    ("dataset", "column", "first"),
    [("cifar10", 0, "82.78±.20"), ("/data/cifar100.zip", 1, "54.73±.20"),
     ("data/Mini-ImageNet.zip", 2, "46.96±.32"), ("stl10", None, "–")],
)  # fmt: skip
def test_the_paper_s_numbers_stand_beside_the_images_that_they_are_of(dataset, column, first):
    """Every cell of the specification's table, by its columns (docs/spec/idaa.md §7)."""
    text = (Path(sweeps.FOLDER).parent / "docs/spec/idaa.md").read_text()
    name = r"(Plain|UEL|SimSiam|SimCLR|\+CLAE|\+IDAA)"
    lines = re.findall(rf"^\| {name} \| ([\d.,± ]+) \| ([\d.,± ]+) \|$", text, re.M)
    assert len(lines) == 12
    grid = sweeps.cells(CompareConfig(dataset=dataset, methods="plain, uel, simsiam, simclr, moco"))
    shown = table.frame(grid, [])
    wanted = [
        tuple("–" if column is None else part.split(", ")[column] for part in line[1:])
        for line in lines
    ] + 3 * [("–", "–")]
    found = list(zip(shown["paper's kNN (%)"], shown["paper's linear (%)"], strict=True))
    assert found == wanted
    assert found[0][0] == first
    assert bool(table.protocol(grid)) == (column is not None)


@pytest.mark.parametrize("name", ["imagenet-100", "imagenet_100.zip", "cifar10-c", "cifar1000"])
def test_images_that_are_only_named_alike_have_no_paper_s_numbers(name):
    assert table.known(name, table.PAPER_PROTOCOL) is None


def test_imagenet_s_numbers_are_those_of_as_many_epochs():
    text = (Path(sweeps.FOLDER).parent / "docs/spec/idaa.md").read_text()
    (line,) = (x for x in text.split("\n") if x.startswith("ImageNet (epochs/batch"))
    pairs = re.findall(r"(\d+\.\d)/(\d+\.\d)", line[line.index("SimSiam§") :])
    assert len(pairs) == 4
    grid = sweeps.cells(
        CompareConfig(dataset="data/imagenet", methods="simsiam", adversaries="none, idaa")
    )
    common = dict.fromkeys(sweeps.REFERENCES) | {"method": "simsiam", "vae_of": None, "seed": 0}
    common |= {"knn_top1": 1.0, "linear_top1": 2.0, "linear_top5": 3.0, "protocol": "clean"}
    for epochs, wanted in ((100, pairs[:2]), (200, pairs[2:]), (150, 2 * [("–", "–")])):
        rows = [common | {"adversary": each, "epochs": epochs} for each in ("none", "idaa")]
        shown = table.frame(grid, rows)
        told = zip(shown["paper's linear (%)"], shown["paper's linear top-5 (%)"], strict=True)
        assert list(told) == wanted
        assert list(shown["linear top-5 (%)"]) == ["3.00", "3.00"]


def test_the_table_ends_with_what_every_encoder_has_to_beat(outputs, tmp_path, monkeypatch):
    """Notebook 06 itself, on one cell that is finished and one that is not."""
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path / "outputs"))
    small = {k: SMALL[k] for k in SMALL.keys() - {"device"}}
    asked = {"methods": "simclr", "adversaries": "none, clae", "device": "cpu"}
    asked |= {"ssl": json.dumps(small), "eval": json.dumps({"limit": 100})}
    first, _ = sweeps.cells(CompareConfig(**asked))
    run = train_ssl(SSLConfig(**first.ssl))
    first_eval = evaluate(EvalConfig(**first.eval, run=run.reference))
    judged = first_eval.summary
    execute("06_compare_methods", asked, tmp_path)
    (study,) = (tmp_path / "outputs" / "compare").iterdir()
    assert {path.name for path in study.iterdir()} >= {"table.csv", "methods.png"}
    shown = pd.read_csv(study / "table.csv", dtype=str)
    assert list(shown["method"]) == ["SimCLR", "SimCLR", "untrained encoder", "raw pixels"]
    wanted = [judged["knn_top1"], None, judged["random_knn_top1"], judged["pixels_knn_top1"]]
    assert list(shown["kNN (%)"]) == ["–" if v is None else f"{v:.2f}" for v in wanted]
    # In another study it is not the first cell: what was judged with references serves there too.
    other = CompareConfig(**asked | {"adversaries": "clae, none"})
    (row,) = sweeps.collect(sweeps.cells(other))
    assert row["eval"] == first_eval.id


def test_references_are_judged_where_they_are_the_same_for_all_and_small():
    def asked(**values):
        return [p.eval["references"] for p in sweeps.cells(CompareConfig(**values))]

    assert asked(methods="simclr, moco", adversaries="none") == [True, False]
    assert asked(methods="simclr", preset="paper", eval={"protocol": "clean"}) == [
        True,
        False,
        False,
    ]
    assert not any(asked(preset="paper"))  # each method is judged by a layer of its own
    assert not any(asked(dataset="imagenet", ssl={"size": 224}))
    assert not any(asked(eval={"references": False}))


def test_a_vae_from_elsewhere_is_a_row_more():
    config = CompareConfig(methods=("simclr", "byol"), adversaries=("none",), elsewhere="stl10")
    grid = sweeps.cells(config)
    told = [(p.labels["adversary"], p.vae["dataset"], p.ssl["dataset"]) for p in grid]
    assert told == 2 * [("none", "photos", "photos"), ("idaa", "stl10", "photos")]
    assert list(table.frame(grid, [])["adversary"]) == 2 * ["no adversary", "IDAA, VAE of stl10"]


def test_one_method_may_train_longer_and_the_table_says_so():
    config = CompareConfig(
        methods="simclr, byol", adversaries="none", ssl={"epochs": 2, "width": 4},
        ssl_of='{"byol": {"epochs": 5}}',
    )  # fmt: skip
    grid = sweeps.cells(config)
    assert [SSLConfig(**point.ssl).epochs for point in grid] == [2, 5]
    assert [SSLConfig(**point.ssl).width for point in grid] == [4, 4]
    common = dict.fromkeys(sweeps.REFERENCES) | {"vae_of": None, "adversary": "none", "seed": 0}
    common |= {"knn_top1": 1.0, "linear_top1": 2.0, "linear_top5": 3.0, "protocol": "clean"}
    rows = [common | {"method": m, "epochs": e} for m, e in (("simclr", 2), ("byol", 5))]
    assert list(table.frame(grid, rows)["epochs"]) == ["2", "5"]
    assert list(table.frame(grid, rows[1:])["n"]) == [0, 1]
    assert "epochs" not in table.frame(grid, rows[1:])  # all alike


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"moco": {}}, "ssl_of has fields of 'moco', which methods does not name"),
     ({"byol": {"seed": 1}}, "ssl_of['byol'] cannot set 'seed': the study sets it itself"),
     ({"byol": {"method": "uel"}}, "ssl_of['byol'] cannot set 'method'"),
     ({"byol": 5}, "ssl_of"), (5, "ssl_of")],
)  # fmt: skip
def test_fields_of_one_method_are_checked(fields, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        CompareConfig(methods="simclr, byol", ssl_of=fields)


def test_several_seeds_give_student_s_interval():
    low, high = stats.t.interval(0.95, 2, loc=2, scale=3**-0.5)
    assert table.said([1.0, 2.0, 3.0]) == f"2.00 [{low:.2f}, {high:.2f}]"
    assert table.said([]) == "–"


def test_over_dim_the_beta_of_the_middle_is_held():
    grid = sweeps.points(SweepConfig(epsilons=(), betas=(), dims=(32, 128, 512)))
    assert [p.vae["beta"] for p in grid] == pytest.approx([0.4] * 3)
