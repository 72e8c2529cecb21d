"""The tidy results, what stands beside what, the paper's numbers, and what makes its tables."""

import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from idaa_lib import grids, plans, runs, sweeps
from idaa_lib.configs import (
    EvalConfig,
    SemiConfig,
    SSLConfig,
    SweepConfig,
    TheoryConfig,
    TransferConfig,
    VAEConfig,
)
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.results import (
    COLUMNS,
    PAPER,
    beside,
    find_differences,
    groups,
    interval,
    means,
    paper_name,
    results,
    tabulate,
    tell_apart,
)
from idaa_lib.train import train

ROOT = Path(__file__).resolve().parent.parent
SPEC = (ROOT / "docs/spec/idaa.md").read_text()
CLASSES = {"cifar10": 10, "cifar100": 100, "mini-imagenet": 100, "imagenet": 1000}
THEIRS = pd.read_csv(PAPER, dtype=str, keep_default_na=False)


CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def test_trainings_of_two_precisions_are_told_apart(outputs):
    """`auto` is another precision on another machine, and their results are others."""
    pair = [finish_run(SSLConfig(epochs=n), {}, ("photos", "pixels")) for n in (3, 4)]
    for run, precision in zip(pair, ("no", "bf16"), strict=True):
        runs.write_json(run.path / "environment.json", run.environment | {"precision": precision})
    assert find_differences(pair)["precision"] == ["fp32", "bf16"]
    assert tell_apart(pair)[1].endswith("precision = bf16")


def test_transfers_to_folders_of_one_name_keep_their_content(outputs):
    rows = [
        {"features": "encoder", "dataset": "images", "fingerprint": name, "probe": "linear",
         "value": value, "metric": "top-1", "n": 9, "protocol": "p", "low": 1.0, "high": 2.0}
        for name, value in (("A", 72.2), ("B", 66.7))
    ]  # fmt: skip
    training = finish_run(SSLConfig(), {}, ("photos", "pixels"))
    run = finish_run(TransferConfig(run=training.id), {"rows": rows}, ("images", "A"))
    data = [{"name": "images", "fingerprint": name, "size": 32, "classes": 2} for name in "AB"]
    runs.write_json(run.path / "environment.json", run.environment | {"datasets": data})
    frame = results([run])
    assert dict(zip(frame["fingerprint"], frame["value"], strict=True)) == {"A": 72.2, "B": 66.7}


def finish_run(config, summary, *data, size=32, classes=None, units=CIFAR):
    """A finished run written by hand, on data sets (name, fingerprint)."""
    pointers = {name: getattr(config, name, None) for name in ("vae", "run", "continue_from")}
    run = runs.run_for(config, " ".join(f"{each}" for each in data), **pointers)
    sets = [
        {"name": name, "fingerprint": pixels, "n": 640, "size": size}
        | {"classes": classes or CLASSES.get(paper_name(name), 2)}
        for name, pixels in data
    ]
    environment = {"dataset": sets[0], **({"datasets": sets} if run.stage == "transfer" else {})}
    with run.writing(config, environment, {"size": size, "classes": 2, **units}) as writer:
        writer.finish(summary)
    return run


def mean(values):
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=stats.tmean(values), scale=stats.sem(values)
    )
    return f"{stats.tmean(values):.2f} [{low:.2f}, {high:.2f}]"


def share(percent, n=1000):
    low, high = (100 / n * end for end in stats.binom.interval(0.95, n, percent / 100))
    return f"{percent:.2f} [{low:.2f}, {high:.2f}]"


# --- the paper's figures -------------------------------------------------------------------------


def figures(beginning):
    """The numbers with a point of each part of a line of the specification's section 7."""
    section = SPEC.partition("## 7. ")[2].partition("## 8. ")[0]
    (line,) = (line for line in section.split("\n") if line.startswith(beginning))
    return [tuple(map(float, re.findall(r"\d+\.\d+", part))) for part in line.split(";")], line


def of_paper(stage, columns="metric"):
    """The rows of a table of docs/paper.csv: method and adversary → figures in order."""
    table = THEIRS[THEIRS["stage"] == stage]
    return {
        key: (tuple(map(float, rows["value"])), tuple(rows[columns]))
        for key, rows in table.groupby(["method", "adversary"], sort=False)
    }


def test_the_paper_s_figures_are_those_of_the_specification():
    numbers, line = figures("FixMatch CIFAR-100 (400/2500/10000): ")
    rows = of_paper("semi")
    assert [values for values, _ in rows.values()] == numbers
    labels = tuple(f"{n // 100} labels a class" for n in (400, 2500, 10000))
    assert {columns for _, columns in rows.values()} == {labels}
    assert [adversary for _, adversary in rows] == ["", *re.findall(r"\+(\w+)", line)]
    (note,) = set(THEIRS[THEIRS["stage"] == "semi"]["note"])
    assert "reports 57.5/72.9/78.1" in SPEC and "57.5/72.9/78.1" in note

    numbers, line = figures("Transfer (")
    rows = of_paper("transfer", "dataset")
    assert [values for values, _ in rows.values()] == numbers
    assert line.startswith(
        "Transfer (C10, C100, Birdsnap, Aircraft, DTD, Pets, Flower, CUB): SimCLR"
    )
    assert {columns for _, columns in rows.values()} == {TransferConfig(preset="paper").datasets}

    numbers, line = figures("COCO AP50/AP/AP75, mask likewise: ")
    rows = of_paper("detection")
    assert [values for values, _ in rows.values()] == numbers
    (columns,) = {columns for _, columns in rows.values()}
    assert columns == ("box AP50", "box AP", "box AP75", "mask AP50", "mask AP", "mask AP75")

    (line,) = (x for x in SPEC.split("\n") if x.startswith("ImageNet (epochs/batch"))
    pairs = re.findall(r"(\d+\.\d)/(\d+\.\d)", line[line.index("SimSiam§") :])
    imagenet = THEIRS[(THEIRS["dataset"] == "imagenet") & (THEIRS["source"] == "")]
    order = imagenet.groupby(["epochs", "adversary"], sort=True)["value"].apply(tuple)
    assert list(order) == pairs


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_the_paper_s_epochs_are_those_of_the_recipe(dataset):
    table = THEIRS[(THEIRS["stage"] == "eval") & (THEIRS["dataset"] == dataset)]
    for method, rows in table.groupby("method"):
        config = SSLConfig(preset="paper", method=method.lower(), dataset=dataset)
        assert {*rows["epochs"]} == {str(config.epochs)}, method


@pytest.mark.parametrize(
    ("column", "dataset"), [(0, "cifar10"), (1, "cifar100"), (2, "mini-imagenet")]
)
def test_every_cell_of_the_main_table_is_that_of_the_specification(column, dataset):
    name = r"(Plain|UEL|SimSiam|SimCLR|\+CLAE|\+IDAA)"
    lines = re.findall(rf"^\| {name} \| ([\d.,± ]+) \| ([\d.,± ]+) \|$", SPEC, re.M)
    assert len(lines) == 12
    table = THEIRS[(THEIRS["stage"] == "eval") & (THEIRS["dataset"] == dataset)]
    for probe, part in (("kNN", 1), ("linear", 2)):
        rows = table[table["metric"] == probe]
        texts = rows["value"] + "±" + rows["spread"]
        assert list(texts) == [line[part].split(", ")[column] for line in lines]
        methods = [line[0] for line in lines]
        assert [a or m for m, a in zip(rows["method"], rows["adversary"], strict=True)] == [
            text.removeprefix("+") for text in methods
        ]


THEIR_CIFAR = "mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201"
THEIR_IMAGENET = "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"


@pytest.mark.parametrize(
    ("dataset", "size", "units", "first"),
    [("cifar10", 32, CIFAR, "82.78±.20"), ("cifar100-images", 32, CIFAR, "54.73±.20"),
     ("Mini-ImageNet", 84, IMAGENET, "46.96±.32"), ("stl10", 32, CIFAR, None),
     ("cifar10", 64, CIFAR, "size is 32 there and 64 here"),
     ("miniImageNet", 32, IMAGENET, "size is 84 there and 32 here"),
     ("mini-imagenet", 84, CIFAR,
      f"normalisation is {THEIR_IMAGENET} there and {THEIR_CIFAR} here"),
     ("cifar10", 32, {"mean": (0.5,) * 3, "std": (0.25,) * 3},
      f"normalisation is {THEIR_CIFAR} there and mean 0.5 0.5 0.5, std 0.25 0.25 0.25 here"),
     ("mini-imagenet", 32, CIFAR,
      "size is 84 there and 32 here; normalisation is "
      f"{THEIR_IMAGENET} there and {THEIR_CIFAR} here"),
     ("imagenet-100", 224, IMAGENET, None), ("cifar10-c", 32, CIFAR, None),
     ("cifar1000", 32, CIFAR, None)],
)  # fmt: skip
def test_the_paper_s_rows_stand_beside_their_own_data_size_classes_and_units(
    outputs, dataset, size, units, first
):
    config = SSLConfig(method="plain", size=size)
    run = finish_run(config, {}, (dataset, "pixels"), size=size, units=units)
    judgement = {f"{p}_{k}": 1.0 for p in ("knn", "linear") for k in ("top1", "low", "high", "n")}
    evaluation = finish_run(EvalConfig(run=run.id), judgement, (dataset, "pixels"), size=size)
    (group,) = groups(results([evaluation]))
    theirs = [name for name in group.table.index if "paper" in name]
    stands = first is not None and "±" in first
    assert theirs == stands * ["Plain (paper)", "Plain + CLAE (paper)", "Plain + IDAA (paper)"]
    if stands:
        assert group.table.loc["Plain (paper)", "kNN (%)"] == first
        assert "official protocol" in group.protocols
    elif first:
        assert f"Figures of the paper do not stand here: {first}." in group.protocols
    elif dataset == "stl10":
        assert "Figures of IP-IRM's README do not stand here: " in group.protocols
    else:
        assert "none stands here" in group.protocols


def read_published(dataset, method, size, classes, **values):
    """The test figures of a training on a data set beside the published ones."""
    config = SSLConfig(method=method, size=size, **values)
    units = IMAGENET if "imagenet" in dataset else CIFAR
    run = finish_run(config, {}, (dataset, "pixels"), size=size, classes=classes, units=units)
    judgement = {"linear_top1": 50.0, "linear_n": 5, "linear_protocol": "official of some"}
    # The test images may be larger than what the encoder was trained on.
    evaluation = finish_run(
        EvalConfig(run=run.id), judgement, (dataset, "pixels"), size=2 * size, classes=classes
    )
    (group,) = groups(results([evaluation]))
    figures = group.table["linear (%)"]
    return {name: figures[name] for name in figures.index if "README" in name}, group.protocols


IPIRM = {
    "SimCLR (DCL's README)": "80.15",
    "SimCLR, debiased with τ⁺ = .05 (DCL's README)": "81.85",
    "SimCLR, debiased with τ⁺ = .1 (DCL's README)": "84.26",
    "IP-IRM, 400 epochs (IP-IRM's README)": "84.44",
    "IP-IRM with mixup, 400 epochs (IP-IRM's README)": "88.26",
    "IP-IRM with mixup, 1000 epochs (IP-IRM's README)": "90.59",
}
RSA = {
    "BYOL, 200 epochs (RSA's README)": "70.6",
    "RSA, 200 epochs (RSA's README)": "73.1",
}


@pytest.mark.parametrize("method", ["ipirm", "simclr", "rsa"])
def test_the_siblings_figures_stand_beside_their_own_data_and_network(outputs, method):
    network = dict(backbone="resnet50", width=64)
    names, protocols = read_published("stl10", method, 32, 10, **network)
    assert names == IPIRM
    assert "IP-IRM's README: STL-10, ResNet-50 with the 3×3 stem, " in protocols
    names, protocols = read_published("imagenet", method, 224, 1000, stem="imagenet", **network)
    assert names == RSA
    assert "RSA's README: ImageNet at 224 px, ResNet-50" in protocols


@pytest.mark.parametrize(
    ("dataset", "size", "classes", "values", "differs"),
    [
        ("stl10", 64, 10, dict(backbone="resnet50", width=64), "size is 32 there and 64 here"),
        ("stl10", 32, 10, dict(backbone="resnet50", width=16), "width is 64 there and 16 here"),
        ("stl10", 32, 10, dict(backbone="resnet18", width=64),
         "backbone is resnet50 there and resnet18 here"),
        ("stl10", 32, 9, dict(backbone="resnet18", width=64),
         "classes is 10 there and 9 here; backbone is resnet50 there and resnet18 here"),
        ("imagenet", 224, 100, dict(backbone="resnet50", width=64),
         "classes is 1000 there and 100 here"),
        ("imagenet-100", 224, 100, dict(backbone="resnet50", width=64), None),
        ("cifar10", 32, 10, dict(backbone="resnet50", width=64), None),
        ("photos", 32, 13, dict(backbone="resnet50", width=64), None),
    ],
)  # fmt: skip
def test_elsewhere_the_siblings_figures_do_not_stand_and_a_note_says_why(
    outputs, dataset, size, classes, values, differs
):
    names, protocols = read_published(dataset, "ipirm", size, classes, **values)
    assert names == {}
    source = "RSA's" if dataset == "imagenet" else "IP-IRM's"
    if differs:
        assert f"Figures of {source} README do not stand here: {differs}." in protocols
    else:
        assert "none stands here" in protocols and "README" not in protocols


def test_the_siblings_figures_are_those_of_the_specification():
    text = (ROOT / "docs/spec/siblings.md").read_text()
    for name, value in {**IPIRM, **RSA}.items():
        assert value in text, name
    ours = THEIRS[THEIRS["source"] != ""]
    assert list(ours["value"]) == [*IPIRM.values(), *RSA.values()]
    assert not ours["method"].str.contains("CASSLE|AugSelf").any()


def test_imagenet_s_rows_say_their_epochs(outputs):
    config, data = SSLConfig(method="simsiam", size=224), ("imagenet", "pixels")
    run = finish_run(config, {}, data, size=224, units=IMAGENET)
    judgement = {"linear_top1": 2.0, "linear_top5": 3.0, "linear_n": 5}
    evaluation = finish_run(EvalConfig(run=run.id), judgement, ("imagenet", "pixels"), size=224)
    (group,) = groups(results([evaluation]))
    assert [*group.table.columns[:2]] == ["linear (%)", "linear top-5 (%)"]
    assert group.table.loc["SimSiam + IDAA, 200 epochs (paper)"].to_list()[:2] == ["70.6", "89.7"]
    cells = group.table.loc["SimSiam"].to_list()[:2]
    assert [cell.partition(" [")[0] for cell in cells] == ["2.00", "3.00"]


# --- which runs stand in one table ---------------------------------------------------------------


def semi(top1, data=("cifar100", "pixels"), **values):
    summary = {"ema_top1": top1, "ema_n": 1000}
    config = SemiConfig(**{"preset": "paper", "labels_per_class": 4, **values})
    return finish_run(config, summary, data)


def test_results_are_tidy(outputs, capsys):
    run = semi(50.0, adversary="clae", seed=3)
    other = semi(40.0, labels_per_class=25)
    frame = results([run, other])
    assert tuple(frame.columns[: len(COLUMNS)]) == COLUMNS
    assert {"labels_per_class", "adversary"} <= {*frame.columns}
    first = frame.iloc[0]
    assert (first["run"], first["training"], first["method"]) == (run.id, run.id, "FixMatch")
    assert (first["value"], first["n"], first["seed"], first["metric"]) == (
        50.0, 1000, 3, "4 labels a class",
    )  # fmt: skip
    (other.path / "config.json").write_text("{")
    for chosen in (None, [other, run]):
        rows = results(chosen)
        assert [*rows["run"]] == [run.id]
        assert capsys.readouterr().out.startswith(f"Left out: {other.path}: ")
    with pytest.raises(runs.RunError, match=other.id):
        results([other])
    damage = []
    assert len(results([run, other], damage)) == 1
    assert other.id in damage[0]


def test_the_fixmatch_table_has_labels_adversaries_and_seeds(outputs):
    run = semi(50.0, adversary="idaa", vae="vae-a")
    for seed, top1 in enumerate((41.0, 42.0, 44.0)):
        semi(top1, seed=seed)
    semi(61.0, labels_per_class=25)
    semi(43.0, adversary="clae")
    # Other data, other images of that name, fewer of them: none of these stands beside it.
    out = [
        semi(2.0, ("photos", "photos"), dataset="photos"), semi(3.0, limit=99),
        semi(4.0, ("cifar100", "others"), dataset="/some/cifar100"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # nor of a library that computed something else
        patch.setattr(runs.directory, "RESULTS_VERSION", 0)
        out.insert(0, semi(9.0, seed=7))
    damaged_run = semi(8.0, seed=9)
    (damaged_run.path / "config.json").write_text("{")
    comparison = beside(run)
    assert len(comparison.runs) == 6 and not {*comparison.runs} & {
        each.id for each in [*out, damaged_run]
    }
    table = comparison.table
    assert [*table] == [
        *(f"{n} labels a class (%)" for n in (4, 25, 100)), "seed", "epochs", "images",
    ]  # fmt: skip
    assert table.iloc[:, :4].T.to_dict("list") == {
        "FixMatch": [mean([44.0, 42.0, 41.0]), share(61), "–", "0, 1, 2"],
        "FixMatch + CLAE": [share(43), "–", "–", "0"],
        "FixMatch + IDAA": [share(50), "–", "–", "0"],
        "FixMatch (paper)": ["47.76", "66.30", "74.13", "not stated"],
        "FixMatch + CLAE (paper)": ["50.34", "68.58", "74.54", "not stated"],
        "FixMatch + IDAA (paper)": ["52.88", "68.96", "75.28", "not stated"],
    }
    assert "57.5/72.9/78.1" in comparison.protocols
    # ε and VAE are rows of their own.
    semi(51.0, adversary="idaa", vae="vae-b", epsilon=0.1)
    rows = beside(run).table.index
    assert {"FixMatch + IDAA, ε = 0.5, vae = a", "FixMatch + IDAA, ε = 0.1, vae = b"} <= {*rows}


def test_another_budget_is_a_row_that_says_so(outputs):
    run = semi(50.0)
    for values in ({"epochs": 3}, {"lambda_u": 0.0}, {"adversary": "clae", "alpha": 0.5}):
        semi(1.0, **values)
    rows = [name for name in beside(run).table.index if "paper" not in name]
    assert len(rows) == 4
    for text in ("epochs = 3", "labels alone", "alpha = 0.5"):
        assert any(text in row for row in rows), rows


def test_the_paper_s_figures_stand_beside_their_own_data_alone(outputs):
    comparison = beside(semi(50.0, ("photos", "photos"), dataset="photos"))
    assert next(iter(comparison.table)) == "4 labels a class (%)" and [*comparison.table.index] == [
        "FixMatch"
    ]
    assert "The paper's figures are of other data: none stands here." in comparison.protocols
    for name, count in (("cifar100", 1), ("cifar100-images", 1), ("cifar10", 0), ("cifar1000", 0)):
        assert ("FixMatch (paper)" in beside(semi(1.0, (name, name))).table.index) == count


def test_several_seeds_give_student_s_interval():
    frame = pd.DataFrame({"value": [41.0, 42.0, 43.0], "low": 0.0, "high": 90.0})
    assert interval(frame)[1:] == pytest.approx(stats.t.interval(0.95, 2, loc=42, scale=3**-0.5))
    assert interval(frame[:1]) == (41.0, 0.0, 90.0)


def test_several_seeds_of_shares_have_an_interval_of_shares():
    """In all tables: of two seeds Student's interval is 12.7 standard errors each way."""
    frame = pd.DataFrame({"value": [10.0, 22.0], "metric": "kNN", "low": 0.0, "high": 9.0})
    frame["label"] = "a"
    for unit, ends in (("%", "[0.00, 92.24]"), ("nats", "[-60.24, 92.24]")):
        table = tabulate(frame.assign(unit=unit), ["label"])
        assert table.loc["a", f"kNN ({unit})"] == f"16.00 {ends}"


@pytest.mark.parametrize("at", [0.3, "resnet18"])
def test_a_table_has_a_row_for_results_without_a_value(at):
    rows = {"axis": [None, "epsilon"], "at": [None, at], "metric": "kNN", "unit": "%"}
    frame = pd.DataFrame(rows | {"value": [1.0, 2.0], "low": 0.0, "high": 9.0})
    table = tabulate(frame, ["axis", "at"])
    assert [*table.index] == [("–", "–"), ("epsilon", at)]
    assert [*table["kNN (%)"]] == ["1.00 [0.00, 9.00]", "2.00 [0.00, 9.00]"]


def trainings():
    """SimCLR with and without IDAA, of two seeds; and one of another length."""
    run_by_key = {}
    for adversary in ("none", "idaa"):
        for seed in (0, 1):
            config = SSLConfig(adversary=adversary, seed=seed)
            run_by_key[adversary, seed] = finish_run(config, {}, ("photos", "pixels"))
    run_by_key["short", 0] = finish_run(SSLConfig(epochs=1), {}, ("photos", "pixels"))
    return run_by_key


def write_transfer(run, values, size=32, **fields):
    """A transfer to data sets: name → accuracy."""
    common = {"features": "encoder", "protocol": f"{size} px, frozen"}
    rows = [
        common | {"dataset": name, "probe": probe, "metric": metric, "value": value}
        for name, value in values.items()
        for metric in ("mean per class" if name == "oxfordiiitpet" else "top-1",)
        for probe in ("linear", "10 % of labels")
    ]
    rows += [rows[0] | {"features": "random", "value": 1.0}]
    config = TransferConfig(run=run.reference, datasets=tuple(values), **fields)
    return finish_run(config, {"rows": rows}, *((name, name) for name in values))


def test_the_transfer_table_has_trainings_and_data_sets(outputs):
    run_by_key = trainings()
    run = write_transfer(
        run_by_key["idaa", 0], {"cifar10": 60.0, "oxfordiiitpet": 40.0, "photos": 30.0}
    )
    write_transfer(
        run_by_key["idaa", 1], {"cifar10": 61.0, "photos": 31.0}, shots=(1,), references=False
    )
    write_transfer(run_by_key["none", 0], {"cifar10": 55.0, "dtd": 20.0})
    write_transfer(run_by_key["short", 0], {"cifar10": 33.0})
    write_transfer(run_by_key["none", 1], {"cifar10": 1.0}, limit=7)  # fewer images
    write_transfer(run_by_key["none", 1], {"cifar10": 2.0}, size=224, seed=1)  # another protocol
    write_transfer(run_by_key["none", 1], {"dtd": 3.0})  # other data
    comparison = beside(run)
    columns = ["cifar10 (%)", "oxfordiiitpet, mean per class (%)", "photos (%)"]
    assert [*comparison.table][:3] == columns
    rows = comparison.table.iloc[:3]
    assert rows[columns].T.to_dict("list") == {
        "SimCLR + IDAA, epochs = 3": [mean([60.0, 61.0]), "40.00", mean([30.0, 31.0])],
        "SimCLR, epochs = 1": ["33.00", "–", "–"],
        "SimCLR, epochs = 3": ["55.00", "–", "–"],
    }
    theirs = comparison.table.loc["SimCLR + IDAA (paper)"]
    assert theirs.to_list()[:4] == ["64.49", "46.76", "–", "not stated"]
    assert "at most 2,000 images of a split" in comparison.title
    assert "linear: 32 px, frozen." in comparison.protocols and "Kornblith" in comparison.protocols
    photos = beside(write_transfer(run_by_key["idaa", 0], {"photos": 30.0}))
    assert "none stands here" in photos.protocols
    assert not any("paper" in row for row in photos.table.index)


def test_published_transfers_stand_in_the_column_of_their_data(outputs):
    """Whatever its folder or zip is called here."""
    run = write_transfer(trainings()["none", 0], {"cifar10-images": 60.0, "CIFAR100": 30.0})
    table = beside(run).table
    assert [*table][:2] == ["CIFAR100 (%)", "cifar10-images (%)"]
    theirs = dict(zip(*of_paper("transfer", "dataset")["SimCLR", ""][::-1], strict=True))
    row = table.loc["SimCLR (paper)"]
    assert float(row["cifar10-images (%)"]) == theirs["cifar10"]
    assert float(row["CIFAR100 (%)"]) == theirs["cifar100"]


def test_a_transfer_of_a_training_that_is_gone_keeps_its_name(outputs):
    run_by_key = trainings()
    run = write_transfer(run_by_key["idaa", 0], {"cifar10": 60.0})
    source = run_by_key["none", 0]
    write_transfer(source, {"cifar10": 55.0})
    (source.path / "config.json").unlink()
    assert [*beside(run).table.index[:2]] == ["SimCLR + IDAA", source.id]


# --- what makes them -----------------------------------------------------------------------------


def test_notebook_07_s_loop_makes_the_paper_s_nine_runs():
    *_, cell = json.loads((ROOT / "notebooks/07_semi_supervised.ipynb").read_text())["cells"]
    loop = "".join(line[6:] for line in cell["source"] if line.startswith(" " * 6))
    script = 'python() { echo "$@"; }\n' + loop
    process = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    module = ["-m", "idaa_lib.train"]
    commands = [line.split(" ") for line in process.stdout.splitlines()]
    assert all(words[:2] == module for words in commands)
    (_, _, first, *fields), *others = commands
    vae = VAEConfig(**dict(field.split("=") for field in fields))
    assert (first, vae.dataset, vae.preset) == ("vae", "cifar100", "paper")
    configs = [SemiConfig(**dict(field.split("=") for field in words[3:])) for words in others]
    assert {words[2] for words in others} == {"semi"} and {c.dataset for c in configs} == {
        "cifar100"
    }
    # The last is what the notebook itself, with nothing but the preset, stands beside FixMatch.
    control = configs.pop()
    assert control == SemiConfig(preset="paper", lambda_u=0.0)
    names = {"none": "FixMatch", "clae": "FixMatch + CLAE", "idaa": "FixMatch + IDAA"}
    pairs = [(names[config.adversary], config.labels_per_class) for config in configs]
    assert len(pairs) == 9
    paper = THEIRS[THEIRS["stage"] == "semi"]
    labels = paper["metric"].str.partition(" ")[0].astype(int)
    methods = paper["method"] + (" + " + paper["adversary"]).where(paper["adversary"] != "", "")
    assert {*pairs} == {*zip(methods, labels, strict=True)}


@pytest.mark.xdist_group("photos")
def test_figure_5_is_made_from_its_sweep(outputs, tmp_path, monkeypatch):
    """Of the preset's values; the runs in this process, which the notebook then finds."""
    limits = {"limit": 128, "width": 4}
    parameters = {"figure": 5, "device": "cpu", "eval": json.dumps({"limit": 100})}
    parameters |= {"ssl": json.dumps(limits), "vae": json.dumps(limits | {"dim": 8, "epochs": 1})}
    with monkeypatch.context() as patch:
        patch.setattr(
            sweeps.Kernels,
            "ensure",
            lambda self, c: evaluate(c) if isinstance(c, EvalConfig) else train(c),
        )
        grid = grids.sensitivity(SweepConfig(**parameters))
        outcomes = sweeps.perform_all(plans.plan(grid))
    assert {outcome.state for outcome in outcomes.values()} == {"finished"}
    axes = {"batch_size": (64, 128), "backbone": ("resnet18", "resnet34"), "epochs": (3, 6)}
    attacks = {"idaa": "IDAA", "none": "no adversary"}
    assert [(*point.labels.values(),) for point in grid] == [
        (axis, value, adversary)
        for axis, values in axes.items()
        for value in values
        for adversary in attacks
    ]
    config_by_run = {run.id: run.config for run in runs.find("ssl")}
    assert len(config_by_run) == 8  # the middle is a point of each axis
    frame = plans.table(grid)
    validation = frame[(frame["split"] == "validation") & (frame["metric"] == "kNN")]
    assert [*zip(validation["axis"], validation["at"], validation["adversary"], strict=True)] == [
        (axis, value, attacks[adversary]) for axis, value, adversary in
        (point.labels.values() for point in grid)
    ]  # fmt: skip
    for _, row in validation.iterrows():
        assert getattr(config_by_run[row["training"]], row["axis"]) == row["at"]
    sweeps.execute("05_sensitivity", parameters, tmp_path / "05.ipynb")
    assert len(runs.find("ssl")) == 8
    (folder,) = (outputs / "sweep").iterdir()
    table = pd.read_csv(folder / "sensitivity.csv")
    assert table["value"].to_list() == pytest.approx(frame["value"].to_list())
    assert (folder / "sensitivity.png").exists()


def test_a_label_says_what_differs_and_no_knob_of_another_method(outputs):
    """Evaluations of both may stand in one table of the runs page and of the report."""
    pair = [finish_run(config, {}, ("photos", "p")) for config in (SSLConfig(), SemiConfig())]
    first, second = tell_apart(pair)
    assert first.startswith("SimCLR, ") and second.startswith("FixMatch, ")
    assert "backbone = resnet18" in first and "backbone = wrn10" in second
    for knob in ("mu", "temperature", "alpha", "labels_per_class"):
        assert knob not in first + second
    assert find_differences(pair)["mu"] == [None, SemiConfig().mu]


def test_a_label_names_beta_and_dim_of_the_vae_not_its_hash(outputs):
    vaes = [finish_run(VAEConfig(beta=b, dim=d), {}, ("photos", "p"))
            for b, d in ((4, 8), (1, 8), (1, 16))]  # fmt: skip
    encoders = [
        finish_run(SSLConfig(adversary="idaa", vae=v.id), {}, ("photos", "p")) for v in vaes
    ]
    encoders.append(finish_run(SSLConfig(), {}, ("photos", "p")))  # needs none
    differences = ["dim = 8, β = 4", "dim = 8, β = 1", "dim = 16, β = 1"]
    assert tell_apart(encoders) == [*(f"SimCLR + IDAA, {text}" for text in differences), "SimCLR"]
    assert "vae" not in find_differences(encoders)
    # Seeds of a VAE and its encoder are one thing to a study; a VAE of another seed is told.
    third_vae = finish_run(VAEConfig(beta=4, dim=8, seed=1), {}, ("photos", "p"))
    for seed, text in ((1, ""), (0, ", VAE seed = 1")):
        config = SSLConfig(adversary="idaa", vae=third_vae.id, seed=seed)
        pair = [encoders[0], finish_run(config, {}, ("photos", "p"))]
        assert tell_apart(pair, {"seed"}) == ["SimCLR + IDAA", f"SimCLR + IDAA{text}"]
    # Where a VAE is gone, its hash is all there is.
    third_vae.delete()
    assert re.search(r", vae = \w{8}$", tell_apart(pair, {"seed"})[1])


def test_the_control_of_fixmatch_is_not_called_so(outputs):
    pair = [finish_run(SemiConfig(lambda_u=w), {}, ("photos", "p")) for w in (0.0, 1.0)]
    assert tell_apart(pair) == ["labels alone", "FixMatch"]
    assert set(results(pair)["method"]) <= {"labels alone", "FixMatch"}


def test_an_accuracy_has_an_interval_wherever_it_has_an_n(outputs):
    summary = {"linear_top1": 50.0, "linear_top5": 80.0, "linear_n": 100, "linear_top1_val": 40.0}
    run = finish_run(EvalConfig(run="gone"), summary | {"linear_n_val": 50}, ("photos", "p"))
    frame = results([run]).set_index(["metric", "split"])
    for key, share, n in ((("linear", "test"), 0.5, 100), (("linear top-5", "test"), 0.8, 100),
                          (("linear", "validation"), 0.4, 50)):  # fmt: skip
        ends = [100 / n * end for end in stats.binom.interval(0.95, n, share)]
        assert frame.loc[key, ["low", "high"]].tolist() == pytest.approx(ends)


def write_evaluation(run, top1, data, **values):
    """An evaluation by both probes on 100 images of data (name, fingerprint)."""
    figure = {"top1": top1, "low": 0.0, "high": 90.0, "n": 100, "protocol": "clean: p"}
    summary = {f"{p}_{name}": v for p in ("knn", "linear") for name, v in figure.items()}
    return finish_run(EvalConfig(run=run.id, dataset=data[0], **values), summary, data)


def test_a_training_whose_record_says_less_of_its_images_keeps_its_row(outputs):
    run = finish_run(SSLConfig(), {"knn_top1_val": 40.0}, ("photos", "pixels"))
    (run.path / "environment.json").write_text('{"dataset": {"name": "photos"}}')
    assert [*results([run])["label"]] == ["SimCLR"]


@pytest.mark.parametrize(
    ("mine", "other", "words"),
    [
        (("photos", "pixels"), ("cifar10", "other"), ", trained on {0}"),
        (("photos", "pixels"), ("photos", "grown"), " ({1})"),
    ],
    ids=["another data set", "the same one with further images"],
)
def test_no_mean_is_over_trainings_on_other_images(mine, other, words, outputs):
    """They have one label but for that, and the seeds 0 and 0, 1: the first would count, and the
    last be taken for a seed of it."""
    place, judged = ("images", "judged"), []
    for data, seeds, top1 in ((mine, [0], 50.0), (other, [0, 1], 20.0)):
        for seed in seeds:
            # The same configuration trained again, as after images were added to a folder.
            run = finish_run(SSLConfig(dataset=data[0], seed=seed), {}, data)
            judged.append(write_evaluation(run, top1 + 2 * seed, place))
    frame = results(judged)
    kNN = frame[frame["metric"] == "kNN"]
    (group,) = groups(frame)
    expected = {f"SimCLR{words.format(*mine)}": "50.00 [0.00, 90.00]",
                f"SimCLR{words.format(*other)}": mean([20.0, 22.0])}  # fmt: skip
    assert group.table["kNN (%)"].to_dict() == expected
    assert beside(judged[0]).table["kNN (%)"].to_dict() == expected
    assert means(kNN)[["value", "seeds"]].to_numpy().tolist() == [[50.0, 1], [21.0, 2]]
    # Where nothing is judged together, a label says no more than it must.
    assert {*results(judged[:1])["label"]} == {"SimCLR"}


def test_a_column_of_transfers_is_of_one_content(outputs):
    """Folders of one name are numbered in the order in which a run was given them."""
    accuracy = {"A": 70.0, "B": 10.0}
    judged = []
    for seed, order in enumerate(("AB", "BA", "B")):
        training = finish_run(SSLConfig(seed=seed), {}, ("photos", "pixels"))
        rows = [
            {"features": "encoder", "dataset": name, "fingerprint": content, "probe": "linear",
             "value": accuracy[content] + seed, "metric": "top-1", "n": 9, "protocol": "p"}
            for name, content in zip(("images", "images (2)"), order, strict=False)
        ]  # fmt: skip
        config = TransferConfig(run=training.id, datasets=tuple(f"{c}/images" for c in order))
        judged.append(finish_run(config, {"rows": rows}, *(("images", c) for c in order)))
    for selection in (judged, judged[::-1]):
        frame = results(selection)
        assert len({*zip(frame["dataset"], frame["fingerprint"], strict=True)}) == 2
    (group, _) = groups(results(judged))
    row = group.table.loc["SimCLR"]
    assert row["images (%)"] == mean([70.0, 71.0]) and row["images (2) (%)"] == mean([10.0, 11.0])


@pytest.mark.parametrize(("split", "word"), [("val", "validation"), ("test", "test")])
def test_a_study_s_figures_are_of_its_split(split, word, outputs):
    part = {"retrieved": 40.0, "low": 30.0, "high": 50.0, "n": 250}
    summary = {"parts": {"R": part, "G": part}}
    run = finish_run(TheoryConfig(split=split), summary, ("photos", "pixels"))
    frame = results([run])
    assert {*frame["split"]} == {word} and {*frame["n"]} == {250}
    assert frame[["value", "low", "high"]].drop_duplicates().to_numpy().tolist() == [[40, 30, 50]]
