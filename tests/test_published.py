"""The paper's numbers, which runs stand beside them, and what makes its tables and Figure 5."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from idaa_lib import runs, sweeps
from idaa_lib.configs import (
    EvalConfig,
    SemiConfig,
    SSLConfig,
    SweepConfig,
    TransferConfig,
    VAEConfig,
)
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.lab import compare, published, table
from idaa_lib.lab.published import AP, COCO, DATASETS, FIXMATCH, TRANSFER
from idaa_lib.train import train

ROOT = Path(__file__).resolve().parent.parent
SPEC = (ROOT / "docs/spec/idaa.md").read_text()


def finished(config, summary, *data):
    """A finished run written by hand, on data sets (name, fingerprint)."""
    taken = {name: getattr(config, name, None) for name in ("vae", "run", "continue_from")}
    run = runs.run_for(config, " ".join(f"{each}" for each in data), **taken)
    sets = [{"name": name, "fingerprint": pixels, "n": 640} for name, pixels in data]
    sets[0] |= {"classes": ["rectangle", "disc"]}
    environment = {"dataset": sets[0], **({"datasets": sets} if run.stage == "transfer" else {})}
    with run.writing(config, environment) as writer:
        writer.finish(summary)
    return run


# --- the paper's figures -------------------------------------------------------------------------


def figures(beginning):
    """The numbers with a point of each part of a line of the specification's section 7."""
    section = SPEC.partition("## 7. ")[2].partition("## 8. ")[0]
    (line,) = (line for line in section.split("\n") if line.startswith(beginning))
    return [tuple(map(float, re.findall(r"\d+\.\d+", part))) for part in line.split(";")], line


def test_the_paper_s_figures_are_those_of_the_specification():
    found, line = figures("FixMatch CIFAR-100 (400/2500/10000): ")
    assert [tuple(row.values()) for row in FIXMATCH.values()] == found
    assert {tuple(row) for row in FIXMATCH.values()} == {(400 // 100, 2500 // 100, 10000 // 100)}
    assert re.findall(r"\+(\w+)", line) == ["CLAE", "IDAA"]
    assert "reports 57.5/72.9/78.1" in SPEC and "57.5/72.9/78.1" in published.FIXMATCH_PROTOCOL

    found, line = figures("Transfer (")
    assert [*TRANSFER.values()] == found
    assert line.startswith(
        "Transfer (C10, C100, Birdsnap, Aircraft, DTD, Pets, Flower, CUB): SimCLR"
    )
    assert TransferConfig(preset="paper").datasets == DATASETS

    found, line = figures("COCO AP50/AP/AP75, mask likewise: ")
    assert [*COCO.values()] == found
    assert re.findall(r"([A-Za-z+]+) \d+\.\d/", line) == [
        "scratch", "supervised", "SimSiam", "+IDAA",
    ]  # fmt: skip
    assert [*AP] == ["box AP50", "box AP", "box AP75", "mask AP50", "mask AP", "mask AP75"]


# --- which runs stand in one table ---------------------------------------------------------------


def semi(top1, data=("cifar100", "pixels"), **values):
    told = {"ema_top1": top1, "ema_n": 1000}
    return finished(SemiConfig(**{"preset": "paper", "labels_per_class": 4, **values}), told, data)


def test_the_fixmatch_table_has_labels_adversaries_and_seeds(outputs):
    run = semi(50.0, adversary="idaa", vae="vae-a")
    for seed, top1 in enumerate((41.0, 42.0, 44.0)):
        semi(top1, seed=seed)
    semi(61.0, labels_per_class=25)
    semi(43.0, adversary="clae", dataset="/moved/cifar100")
    # Another budget, other data, other images of that name, another start, another method, another
    # attack: each would be a column or a row of its own elsewhere.
    out = [
        semi(1.0, epochs=3), semi(2.0, ("photos", "photos"), dataset="photos"), semi(3.0, limit=99),
        semi(4.0, ("cifar100", "others"), dataset="/some/cifar100"), semi(5.0, lambda_u=0.0),
        semi(6.0, continue_from="semi-x"), semi(7.0, adversary="clae", alpha=0.5),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # of a library that computed something else
        patch.setattr(runs.directory, "RESULTS_VERSION", 0)
        out.insert(0, semi(9.0, seed=7))
    damaged = semi(8.0, seed=9)
    (damaged.path / "config.json").write_text("{")
    members = published.comparable(run, {"adversary", "epsilon", "dim", "labels_per_class", "seed"})
    assert members[0] == run and len(members) == 6 and not {*members} & {*out, damaged}

    shown, protocols = published.fixmatch(run)
    assert [*shown] == [*(f"{n} labels a class (%)" for n in (4, 25, 100)), "seeds"]
    assert shown.loc["FixMatch"].to_list() == [
        table.said([41.0, 42.0, 44.0]), "61.00", "–", "1 to 3",
    ]  # fmt: skip
    assert shown.loc["FixMatch + CLAE"].to_list() == ["43.00", "–", "–", "1"]
    assert shown.loc["FixMatch + IDAA"].to_list() == ["50.00", "–", "–", "1"]
    assert shown.loc["FixMatch + IDAA (paper)"].to_list() == [
        "52.88", "68.96", "75.28", "not stated",
    ]  # fmt: skip
    assert len(shown) == 6
    assert "Ours: cifar100, 640 training images, wrn28 of width 128, 1,024 epochs" in protocols
    assert published.FIXMATCH_PROTOCOL in protocols

    # ε and VAE are rows of their own, and an attack is the same for all that attack.
    semi(51.0, adversary="idaa", vae="vae-b", epsilon=0.1)
    rows = published.fixmatch(run).table.index
    assert {"FixMatch + IDAA, ε = 0.5, vae = a", "FixMatch + IDAA, ε = 0.1, vae = b"} <= {*rows}
    other = published.fixmatch(out[-1])
    assert [*other.table.index[:2]] == ["FixMatch", "FixMatch + CLAE"]
    assert other.table.loc["FixMatch + CLAE"].iloc[0] == "7.00" and "alpha = 0.5" in other.protocols


def test_the_paper_s_figures_stand_beside_their_own_data_alone(outputs):
    shown, protocols = published.fixmatch(semi(50.0, ("photos", "photos"), dataset="photos"))
    assert [*shown] == ["4 labels a class (%)", "seeds"] and [*shown.index] == ["FixMatch"]
    assert "The paper's figures are of CIFAR-100, not of photos: none stands here." in protocols
    for name, known in (("cifar100", 1), ("cifar100-images", 1), ("cifar10", 0), ("cifar1000", 0)):
        assert (
            "FixMatch (paper)" in published.fixmatch(semi(1.0, (name, name))).table.index
        ) == known


def trainings():
    """SimCLR with and without IDAA, of two seeds; and one of another length."""
    made = {}
    for adversary in ("none", "idaa"):
        for seed in (0, 1):
            config = SSLConfig(adversary=adversary, seed=seed, vae="vae-a")
            made[adversary, seed] = finished(config, {}, ("photos", "pixels"))
    made["short", 0] = finished(SSLConfig(epochs=1), {}, ("photos", "pixels"))
    return made


def moved(run, values, size=32, **fields):
    """A transfer to data sets: name → accuracy."""
    about = {"features": "encoder", "protocol": f"{size} px, frozen"}
    rows = [
        about | {"dataset": name, "probe": probe, "metric": metric, "value": value}
        for name, value in values.items()
        for metric in ("mean per class" if name == "oxfordiiitpet" else "top-1",)
        for probe in ("linear", "10 % of labels")
    ]
    rows += [rows[0] | {"features": "random", "value": 1.0}]
    config = TransferConfig(run=run.reference, datasets=tuple(values), **fields)
    return finished(config, {"rows": rows}, *((name, name) for name in values))


def test_the_transfer_table_has_trainings_and_data_sets(outputs):
    made = trainings()
    run = moved(made["idaa", 0], {"cifar10": 60.0, "oxfordiiitpet": 40.0, "photos": 30.0})
    moved(made["idaa", 1], {"cifar10": 61.0, "photos": 31.0}, shots=(1,), references=False)
    moved(made["none", 0], {"cifar10": 55.0, "dtd": 20.0})
    moved(made["short", 0], {"cifar10": 33.0})
    moved(made["none", 1], {"cifar10": 1.0}, limit=7)  # another configuration
    moved(made["none", 1], {"cifar10": 2.0}, size=224, seed=1)  # another protocol
    moved(made["none", 1], {"dtd": 3.0})  # other data
    shown, protocols = published.transfer(run)
    assert [*shown] == ["cifar10 (%)", "oxfordiiitpet, mean per class (%)", "photos (%)", "seeds"]
    assert shown.iloc[:3].T.to_dict("list") == {
        "SimCLR + IDAA, epochs = 3": [
            table.said([60.0, 61.0]), "40.00", table.said([30.0, 31.0]), "1 to 2",
        ],
        "SimCLR, epochs = 1": ["33.00", "–", "–", "1"],
        "SimCLR, epochs = 3": ["55.00", "–", "–", "1"],
    }  # fmt: skip
    assert shown.loc["SimCLR + IDAA (paper)"].to_list() == ["64.49", "46.76", "–", "not stated"]
    assert protocols == (
        f"Ours: at most 2,000 images of each split, 32 px, frozen.\n{published.TRANSFER_PROTOCOL}"
    )
    photos = published.transfer(moved(made["idaa", 0], {"photos": 30.0}))
    assert "not of photos: none stands here" in photos.protocols
    assert not any("paper" in row for row in photos.table.index)


def test_a_transfer_of_a_training_that_is_gone_keeps_its_name(outputs):
    made = trainings()
    run = moved(made["idaa", 0], {"cifar10": 60.0})
    gone = made["none", 0]
    moved(gone, {"cifar10": 55.0})
    (gone.path / "config.json").unlink()
    assert [*published.transfer(run).table.index[:2]] == ["SimCLR + IDAA", gone.id]


# --- what makes them -----------------------------------------------------------------------------


def test_notebook_07_s_loop_makes_the_paper_s_nine_runs():
    *_, cell = json.loads((ROOT / "notebooks/07_semi_supervised.ipynb").read_text())["cells"]
    loop = "".join(line[6:] for line in cell["source"] if line.startswith(" " * 6))
    spoken = 'python() { echo "$@"; }\n' + loop
    done = subprocess.run(["bash", "-euc", spoken], capture_output=True, text=True, check=True)
    module = ["-m", "idaa_lib.train"]
    asked = [line.split(" ") for line in done.stdout.splitlines()]
    assert all(words[:2] == module for words in asked)
    (_, _, first, *fields), *others = asked
    vae = VAEConfig(**dict(field.split("=") for field in fields))
    assert (first, vae.dataset, vae.preset) == ("vae", "cifar100", "paper")
    made = [SemiConfig(**dict(field.split("=") for field in words[3:])) for words in others]
    assert {words[2] for words in others} == {"semi"} and {c.dataset for c in made} == {"cifar100"}
    # The last is what the notebook itself, with nothing but the preset, stands beside FixMatch.
    alone = made.pop()
    assert alone == SemiConfig(preset="paper", lambda_u=0.0)
    names = {"none": "FixMatch", "clae": "FixMatch + CLAE", "idaa": "FixMatch + IDAA"}
    told = [(names[config.adversary], config.labels_per_class) for config in made]
    assert len(told) == 9
    assert {*told} == {(name, labels) for name, row in FIXMATCH.items() for labels in row}


@pytest.mark.xdist_group("photos")
def test_figure_5_is_made_from_its_sweep(outputs, tmp_path, monkeypatch):
    """Of the preset's values; the runs in this process, which the notebook then finds."""
    few = {"limit": 128, "width": 4}
    given = {"figure": 5, "device": "cpu", "eval": json.dumps({"limit": 100})}
    given |= {"ssl": json.dumps(few), "vae": json.dumps(few | {"dim": 8, "epochs": 1})}
    with monkeypatch.context() as patch:
        patch.setattr(
            sweeps, "ensure", lambda c: evaluate(c) if isinstance(c, EvalConfig) else train(c)
        )
        rows = sweeps.run_all(sweeps.points(SweepConfig(**given)))
    axes = {"batch_size": (64, 128), "backbone": ("resnet18", "resnet34"), "epochs": (3, 6)}
    told = [(row["axis"], row["value"], row["adversary"]) for row in rows]
    assert told == [
        (axis, value, adversary)
        for axis, values in axes.items()
        for value in values
        for adversary in ("idaa", "none")
    ]
    made = {run.id: run.config for run in runs.find("ssl")}
    assert len(made) == 8  # the middle is a point of each axis
    assert all(getattr(made[row["ssl"]], row["axis"]) == row["value"] for row in rows)
    sweeps.execute("05_sensitivity", given, tmp_path / "05.ipynb")
    assert len(runs.find("ssl")) == 8
    (folder,) = (outputs / "sweep").iterdir()
    kept = pd.read_csv(folder / "sensitivity.csv")
    assert kept["knn_top1_val"].to_list() == pytest.approx([row["knn_top1_val"] for row in rows])
    assert (folder / "sensitivity.png").exists()


def test_an_ssl_run_and_a_semi_supervised_one_differ_by_the_fields_that_both_have():
    """Evaluations of both may stand in one table of the runs page and of the report."""
    chosen = [SimpleNamespace(config=config) for config in (SSLConfig(), SemiConfig())]
    found = compare.differing(chosen)
    assert found["backbone"] == ["resnet18", "wrn10"] and "size" not in found
    assert not {"pairing", "mu"} & found.keys()
