"""Which run None means, and that damaged, pruned and copied ones mislead nobody."""

import itertools
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from idaa_lib import evaluate, kernels, results, runs, train_ssl, train_vae
from idaa_lib.configs import (
    ConfigError,
    DecomposeConfig,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    TheoryConfig,
    TransferConfig,
    VAEConfig,
)
from idaa_lib.evaluate.transfer import transfer
from idaa_lib.identity import study
from idaa_lib.identity.scene import open_scene
from idaa_lib.lab import notebook, rows
from idaa_lib.lab.live import Panel
from idaa_lib.lab.notebook import choose
from idaa_lib.lab.runs import RunsPage, curves
from idaa_lib.results import full_name
from idaa_lib.runs import Run, RunError, checkpoints
from idaa_lib.runs.choice import reading_of
from idaa_lib.runs.machine import hardware
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.train import stages

SMALL = {"limit": 24, "width": 4, "batch_size": 8, "epochs": 1, "device": "cpu", "size": 16}


def write_run(config, who=None, at=None, weights=True, summary=None, lines=()):
    """A finished run that a `sweep` or a `person` started at a time, written by hand."""
    run = runs.run_for(config, "pixels")
    with run.writing(config, {"dataset": {"name": "photos", "fingerprint": "pixels"}}) as writer:
        for line in lines:
            writer.log(**line)
        checkpoints.save(run, 1, {"w": torch.ones(3)}, {"step": 1})
        writer.finish(summary or {})
    if not weights:
        shutil.rmtree(run.path / "checkpoints")
    if at is not None:
        (run.path / "starts.json").write_text(json.dumps({who: at}))
        change(run, "state.json", started=at)
    return run


def change(run, name, **values):
    path = run.path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- the rule ------------------------------------------------------------------------------------


def test_weights_before_persons_before_times(outputs):
    """All combinations, made in any order; an integer stands for each part of the rule."""
    kinds = [*itertools.product((True, False), ("person", "sweep"), (1e9, 2e9))]
    random.Random(0).shuffle(kinds)
    tree = {kind: write_run(VAEConfig(seed=7 + i), kind[1], kind[2], kind[0])
            for i, kind in enumerate(kinds)}  # fmt: skip
    order = sorted(kinds, key=lambda k: 100 * k[0] + 10 * (k[1] == "person") + k[2] / 1e9)[::-1]
    assert runs.find("vae") == [tree[kind] for kind in order]
    assert runs.get("vae", None) == tree[True, "person", 2e9]
    assert runs.usable("vae") == [tree[kind] for kind in order if kind[0]]


@pytest.mark.parametrize("choice", ["method", "backbone"])
def test_a_network_that_nobody_registered_here_is_no_choice(outputs, choice):
    """After notebook 12 the latest run was of a method that other notebooks and the app do not
    know, and None meant it."""
    known, own = (write_run(SSLConfig(seed=seed), "person", 1e9 + seed) for seed in (0, 1))
    change(own, "config.json", **{choice: "my_own"})
    omissions = []
    assert runs.usable("ssl", omissions) == [known] == [runs.get("ssl", None)]
    assert len(omissions) == 1 and own.id in omissions[0] and "'my_own'" in omissions[0]
    assert "import the module that registers it" in omissions[0]
    assert runs.find("ssl") == [known, own]  # its results count all the same
    # An adversary is of the training alone: its encoder opens without it.
    change(known, "config.json", adversary="my_own")
    assert runs.usable("ssl") == [known]


def test_of_a_sweep_s_own_the_recipe_s_comes_before_what_was_varied(outputs):
    """After `make demo` the last point has dim = 512, which nobody asked for."""
    centre = write_run(VAEConfig(), "sweep", 1e9)
    points = [write_run(VAEConfig(dim=dim), "sweep", 1e9 + dim) for dim in (32, 512)]
    assert runs.find("vae") == [centre, *points[::-1]]
    person_run = write_run(VAEConfig(dim=64), "person", 1e8)
    assert runs.get("vae", None) == person_run


def test_a_copy_with_other_times_of_files_changes_nothing(outputs, monkeypatch, tmp_path):
    for seed, (who, at) in enumerate(itertools.product(("sweep", "person"), (1e9, 3e9, 2e9))):
        write_run(VAEConfig(seed=seed), who, at)
    order = [run.id for run in runs.find("vae")]
    ages = {run.id: run.last_start for run in runs.list_runs()}
    copy = tmp_path / "copy"
    shutil.copytree(outputs, copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*"):
        os.utime(path, (random.random() * 1e9,) * 2)
    monkeypatch.setenv("IDAA_OUTPUTS", str(copy))
    assert [run.id for run in runs.find("vae")] == order
    assert {run.id: run.last_start for run in runs.list_runs()} == ages


def test_what_a_sweep_made_and_a_person_then_starts_is_a_person_s(outputs, monkeypatch):
    def start(config, starter=None):
        with monkeypatch.context() as patch:
            if starter:
                patch.setenv("IDAA_STARTED_BY", starter)
            return perform(Plan(config, runs.run_for(config, "pixels")), lambda writer: {})

    person_run = start(VAEConfig(dim=64))
    points = [start(VAEConfig(seed=seed), "sweep") for seed in (1, 2)]
    assert runs.get("vae", None) == person_run and points[0].starts.keys() == {"sweep"}
    start(VAEConfig(seed=1))  # shown: it is finished
    assert runs.find("vae") == [points[0], person_run, points[1]]
    start(VAEConfig(dim=64), "sweep")  # a sweep that passes by takes nothing away
    assert runs.find("vae") == [points[0], person_run, points[1]]


def test_a_run_is_meant_by_the_end_of_its_id(outputs):
    run, other = write_run(SSLConfig()), write_run(SSLConfig(adversary="clae"))
    assert [runs.get("ssl", r.id[-8:]) for r in (run, other)] == [run, other]
    assert runs.get("ssl", run.path) == run  # a path as such
    semi = write_run(SemiConfig())
    assert [runs.encoder(r.id[-8:]) for r in (run, semi)] == [run, semi]
    with pytest.raises(RunError, match="no ssl run '0123abcd'"):
        runs.get("ssl", "0123abcd")
    for digits in ("01234567", "00000009", "12345678"):  # of which papermill makes a number
        named = run.path.rename(run.path.with_name(f"ssl-{digits}"))
        assert runs.get("ssl", EvalConfig(run=int(digits)).run) == Run(named)
        run = Run(named)


# --- damage --------------------------------------------------------------------------------------

FILES = ("config", "state", "environment", "model", "summary", "latest", "starts", "process")
DAMAGE = {
    "empty": b"",
    "torn": b'{"preset": "de',
    "binary": b"\x80\x00\xff",
    "list": b"[1, 2]",
    "number": b"5",
    "nothing": b"null",
    "nested": b"[" * 100_000,
    "other": b'{"results_version": "x", "preset": [], "state": "going", "step": {}, "dataset": 3}',
    "folder": None,
}


def damage(run, name, content):
    path = run.path / f"{name}.json"
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.fixture
def ruins(outputs):
    """A sound VAE and encoder, and newer runs of which one file each is damaged in one way."""
    vae, ssl = write_run(VAEConfig(), "person", 1e9), write_run(SSLConfig(), "person", 1e9)
    wrecks = []
    for seed, (name, kind) in enumerate(itertools.product(FILES, DAMAGE), 1):
        config = SSLConfig(seed=seed) if seed % 2 else VAEConfig(seed=seed)
        run = write_run(config, "sweep" if name == "starts" else "person", 2e9)
        damage(run, name, DAMAGE[kind])
        wrecks.append(run)
    return vae, ssl, wrecks


def test_damage_is_a_sentence_and_takes_nobody_down(ruins):
    vae, ssl, wrecks = ruins
    assert set(runs.list_runs()) == {vae, ssl, *wrecks}
    omissions = []
    for run in (*runs.usable("vae", omissions), *runs.usable("ssl", omissions)):
        assert run.config and checkpoints.digest(run)
        run.users()
    kinds = {run.path.name for run in wrecks}
    assert omissions and {line.partition(":")[0] for line in omissions} <= kinds
    assert all(run.id in " ".join(omissions) for run in wrecks[: len(DAMAGE)])  # config.json
    states = [rows.row_of(run).state for run in wrecks]
    assert {*states} <= rows.SIGNS.keys() and {*states[: len(DAMAGE)]} == {rows.DAMAGED}
    sentences = []
    frame = results.results([run for run in runs.list_runs() if run.finished], sentences)
    assert {vae.id, ssl.id}.isdisjoint("".join(sentences)) and len(frame) == 0
    assert RunsPage().status.value == ""


def test_the_first_whole_one_is_taken(outputs):
    """Weights that are cut off, changed by a bit, or gone."""
    sound_run = write_run(VAEConfig(), "sweep", 1e9)
    files = [
        write_run(VAEConfig(seed=seed), "person", 2e9).path / "checkpoints/1/tensors.safetensors"
        for seed in range(1, 5)
    ]
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-1])
    files[1].write_bytes(content[:-1] + b"\x01")
    files[2].unlink()
    (files[3].parent / "checksums.json").unlink()
    assert runs.get("vae", None) == sound_run


def test_a_torn_reading_is_a_sentence_beside_the_curves_of_the_others(outputs):
    lines = [{"step": s, "epoch": 0, "loss": 9.0 - s} for s in range(3)]
    sound_run, torn_run = (write_run(SSLConfig(seed=seed), lines=lines) for seed in (0, 1))
    path = torn_run.path / "metrics.jsonl"
    parts = path.read_bytes().splitlines(keepends=True)
    for part in (
        b'{"step": 1, "lo{"step": 2}\n',
        b"5\n",
        b'{"loss": 1}\n',
        b"\xff\xfe\n",
        b"[" * 9999 + b"\n",
    ):
        path.write_bytes(b"".join([parts[0], part, parts[2]]))
        with pytest.raises(RunError, match="line 2 is no reading"):
            torn_run.metrics()
    html, panel = curves([sound_run, torn_run]), Panel(torn_run)
    assert html.count("<svg") == 1 and "Curves of 1 run" in html
    for text in (html, panel.status.value):
        assert "line 2 is no reading" in text and "Traceback" not in text


# --- the same images in another place ------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path):
    """A folder of class folders of noise."""
    numbers = np.random.default_rng(0)
    for part, n in {"train": 12, "test": 3}.items():
        for name, i in itertools.product(("cat", "dog", "owl"), range(n)):
            path = tmp_path / "first" / part / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "first"


@pytest.mark.parametrize("classes", ["", "dog\ncat\n"])
def test_a_folder_that_was_moved_is_the_same(outputs, photographs, tmp_path, capsys, classes):
    """No circle of "there is no VAE, make one" and "it is finished"."""
    fields = dict(SMALL)
    if classes:
        fields["classes"] = str(tmp_path / "classes.txt")
        (tmp_path / "classes.txt").write_text(classes)
    vae = train_vae(VAEConfig(dataset=str(photographs), dim=4, **fields))
    folder = photographs.rename(tmp_path / "second")
    encoder = SSLConfig(dataset=str(folder), adversary="idaa", **fields)
    assert stages.settle(encoder)[0].vae == vae.id
    assert stages.settle(encoder.replace(vae=vae.id))[0].vae == vae.id
    assert "was trained on" not in capsys.readouterr().out
    assert runs.find("vae", dataset=str(folder), classes=fields.get("classes", "")) == [vae]
    assert runs.find("vae", dataset="photos", size=16) == []
    options = {"classes": fields["classes"]} if classes else {}
    assert reading_of(EvalConfig(), vae, str(folder)) == options
    assert reading_of(EvalConfig(classes=""), vae, str(folder)) == {"classes": ""}
    assert reading_of(EvalConfig(on_error="skip"), vae, "photos") == {"on_error": "skip"}
    # Started again, it knows the new place, and other runs do.
    assert vae.config.dataset == str(photographs)
    assert train_vae(VAEConfig(dataset=str(folder), dim=4, **fields)) == vae
    assert vae.config.dataset == str(folder)
    # Other images are others, whatever their folder's name.
    image = folder / "train" / "cat" / "0.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
    with pytest.raises(RunError, match="no finished vae run with dataset="):
        stages.settle(encoder)


@pytest.mark.parametrize(
    ("judge", "config", "field"),
    [(evaluate, EvalConfig(references=False, device="cpu"), "dataset"),
     (transfer, TransferConfig(device="cpu"), "datasets"),
     (open_scene, DecomposeConfig(images=2), "dataset"),
     (study, TheoryConfig(device="cpu"), "dataset")],
)  # fmt: skip
def test_where_images_went_is_asked_with_the_run_s_name(
    judge, config, field, outputs, photographs, tmp_path
):
    vae = train_vae(VAEConfig(dataset=str(photographs), dim=4, **SMALL))
    encoder = train_ssl(SSLConfig(dataset=str(photographs), **SMALL))
    folder = photographs.rename(tmp_path / "second")
    run = encoder if isinstance(config, EvalConfig | TransferConfig) else vae
    with pytest.raises(ConfigError, match=f"Run {run.id} was .*, {field}=<new place>") as caught:
        judge(config)
    assert str(photographs) in str(caught.value) and len(str(caught.value)) <= 400
    if judge is open_scene:
        assert len(open_scene(config.replace(dataset=str(folder))).x) == 2


def test_a_training_that_read_its_images_as_they_are_has_none_opened(outputs, monkeypatch):
    """To compare them with other images would decode those at the training's size."""
    monkeypatch.setattr("idaa_lib.runs.choice.open_images", None)
    for config in (EvalConfig(), EvalConfig(gray_bits=12)):
        assert reading_of(config, write_run(SSLConfig()), "food101") == config.reading


# --- what notebooks say --------------------------------------------------------------------------


def test_a_notebook_s_configuration_names_its_runs(outputs, capsys):
    vae = train_vae(VAEConfig(**SMALL, dim=4))
    ssl = train_ssl(SSLConfig(**SMALL, adversary="idaa", epsilon="8/255", seed=3))
    damage(write_run(SSLConfig(seed=5)), "config", b"{")
    assert full_name(vae) == f"VAE β 3.2, dim 4 · photos · {vae.id[-8:]}"
    assert full_name(ssl) == f"SimCLR + IDAA ε 0.0313725 · photos · seed 3 · {ssl.id[-8:]}"
    for config in (EvalConfig(), TransferConfig(), EvalConfig(run=ssl.id[-8:])):
        choice = choose(config)
        output = capsys.readouterr().out
        assert choice.run == ssl.id
        assert f"run: {full_name(ssl)}\nits vae: {full_name(vae)}\n" in output
        assert f'as in run = "{ssl.id[-8:]}"' in output and "Left out: " in output
    config = choose(SSLConfig(**SMALL, adversary="idaa"))
    assert config.vae == vae.id and f"vae: {full_name(vae)}" in capsys.readouterr().out


@pytest.mark.parametrize("person", [True, False])
def test_a_notebook_that_nobody_watches_says_what_made_it(outputs, capsys, monkeypatch, person):
    monkeypatch.setattr(notebook, "is_attended", lambda: person)
    notebook.choose(VAEConfig(**SMALL))
    output = capsys.readouterr().out
    facts = [f"torch {torch.__version__.partition('+')[0]}", hardware(), "commit: "]
    assert [fact in output for fact in facts] == [not person] * 3
    assert len(output.splitlines()) == 2 - person


def code(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", sorted(kernels.FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_names_what_it_uses_where_its_configuration_is(path):
    """By `choose` in the cell that reads its parameters; a study by its plan's VAEs. 00 and 13
    choose none, since they show all runs."""
    cells = code(path)
    readers = [cell for cell in cells if ".from_notebook(globals())" in cell]
    study = path.stem[:2] in ("05", "06", "11")
    assert (len(readers) == 1) == (path.stem[:2] not in ("00", "13"))
    if study:
        assert "plans.outline(" in "".join(cells[1:4])
    elif readers:
        assert cells.index(readers[0]) <= 2 and " = choose(" in readers[0]
    assert "this run" not in "".join(cells)
