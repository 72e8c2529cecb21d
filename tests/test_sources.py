"""What a training reads: chosen class folders, partly labelled images, crops of larger originals.

Folders, zips and STL-10's binary files are written here: it is known what should come out.
"""

import itertools
import os
import pickle
import re
import unicodedata
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from reference import knn as naive_knn

from idaa_lib.configs import (
    CompareConfig,
    ConfigError,
    DecomposeConfig,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    TransferConfig,
    VAEConfig,
)
from idaa_lib.data import cached as images
from idaa_lib.data import pool, sources
from idaa_lib.data.layout import list_some
from idaa_lib.evaluate.encoders import features, load_encoder
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.evaluate.transfer import transfer
from idaa_lib.grids import cells
from idaa_lib.identity.scene import open_scene
from idaa_lib.runs.machine import open_images
from idaa_lib.train import locate, stages, train, train_ssl, train_vae

TINY = {"limit": 96, "batch_size": 16, "epochs": 1, "width": 4, "log_every": 4, "device": "cpu"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def ssl(**values):
    return SSLConfig(**(TINY | {"projection_dim": 8} | values))


# --- mini-ImageNet as its authors keep it


def mini(folder, kind=list, protocol=4, labels=(7, 0, 3, 7, 0, 3) * 4, size=84):
    """Both files; image i of train has red i, of test red 200 + i."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, first, n in (("train", 0, len(labels)), ("test", 200, 6)):
        pixels = np.zeros((n, size, size, 3), np.uint8)
        pixels[..., 0] = first + np.arange(n)[:, None, None]
        arrays = pixels if kind is np.asarray else list(pixels)
        content = {"images": arrays, "labels": kind(labels[:n])}
        (folder / f"{part}.pkl").write_bytes(pickle.dumps(content, protocol))
    return folder


@pytest.mark.parametrize("kind", [list, np.asarray, lambda v: [np.int64(x) for x in v]])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_the_authors_pickles_of_mini_imagenet_are_read_as_they_are(data, kind, protocol):
    mini(data / "mini-imagenet", kind, protocol)
    test = images.load("mini-imagenet", "test", 84)
    assert (test.name, test.classes, test.n) == ("mini-imagenet", ("0", "3", "7"), 6)
    assert test.images[:, 0, 5, 5].tolist() == list(range(200, 206))
    assert not test.images[:, 1:].any()
    assert test.labels.tolist() == [2, 0, 1, 2, 0, 1]
    parts = [images.load("mini-imagenet", part, 84) for part in ("train", "val", "trainval")]
    assert sorted(parts[2].images[:, 0, 0, 0].tolist()) == list(range(24))
    assert parts[0].n + parts[1].n == parts[2].n
    for part in parts:
        expected = [(2, 0, 1)[int(red) % 3] for red in part.images[:, 0, 0, 0]]
        assert part.labels.tolist() == expected


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["IDAA_TEST_HARM"],)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"images": Harm(), "labels": [0]}, r"it wants \w+.mkdir to be run"),
        ({"images": np.array([Harm()], object), "labels": [0]}, r"it wants \w+.mkdir to be run"),
        ({"images": torch.zeros(1, 2, 2, 3), "labels": [0]}, r"it wants torch\S+ to be run"),
        ({"image_data": np.zeros((1, 2, 2, 3), "u1"), "class_dict": {}}, "'images'"),
        ({"images": np.zeros((1, 2, 2, 3)), "labels": [0]}, "its images are float64"),
        ({"images": np.zeros((1, 3, 2, 2), "u1"), "labels": [0]}, "its images are uint8"),
        ({"images": np.zeros((2, 2, 2, 3), "u1"), "labels": [0]}, "of 1 labels"),
        ({"images": np.zeros((1, 2, 2, 3), "u1"), "labels": ["cat"]}, "of 1 labels"),
        ({"images": np.zeros((1, 2, 2, 3), "u1"), "labels": [5]}, "has label 5, which train.pkl"),
        (b"no pickle", "should be a pickled dict of images"),
        (pickle.dumps({"images": np.zeros((1, 2, 2, 3), "u1"), "labels": [0]})[:-30], "pickled"),
    ],
)
def test_a_pickle_that_is_none_of_theirs_is_one_sentence_and_runs_nothing(
    tmp_path, data, monkeypatch, content, sentence
):
    monkeypatch.setenv("IDAA_TEST_HARM", str(tmp_path / "harm"))
    content = content if isinstance(content, bytes) else pickle.dumps(content)
    (mini(tmp_path / "mini") / "test.pkl").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence) as refusal:
        open_images(str(tmp_path / "mini"), "train", 84, None)
    assert re.fullmatch(r"[^\n]+\.", str(refusal.value))
    assert not (tmp_path / "harm").exists()


def test_mini_imagenet_s_recipe_is_what_its_page_says(data):
    """docs/mini-imagenet.md, docs/spec/idaa.md §1 and §4."""
    with pytest.raises(ConfigError, match=r"mini-imagenet is not in .*: put it .* as docs/mini-im"):
        open_images("mini-imagenet", "train", 84, None)
    units = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=84)
    units |= dict(dataset="mini-imagenet", split="trainval")
    vae = VAEConfig(preset="mini-imagenet")
    assert units.items() <= dict(vae).items()
    assert (vae.dim, vae.width, vae.kappa, vae.epochs) == (512, 64, 0.1, 300)
    sgd = dict(stem="mini", optimizer="sgd", learning_rate=0.03, weight_decay=5e-4)
    batch = dict(epochs=100, batch_size=128, augmentation="normal")
    for method, fields in {
        "simclr": dict(stem="imagenet", epochs=300, batch_size=256, learning_rate=3e-4,
                       optimizer="adam", schedule="delayed_cosine", augmentation="simclr"),
        "plain": sgd | batch | dict(schedule="delayed_cosine"),
        "uel": sgd | batch | dict(schedule="constant"),
        "simsiam": sgd | dict(epochs=300, batch_size=256, schedule="cosine_by_step", warmup=10,
                              augmentation="simsiam", pairing="cifar"),
    }.items():  # fmt: skip
        config = SSLConfig(preset="mini-imagenet", method=method)
        assert (units | fields | dict(backbone="resnet18", width=64)).items() <= dict(
            config
        ).items()
    assert CompareConfig(preset="mini-imagenet").dataset == "mini-imagenet"
    assert EvalConfig(preset="mini-imagenet").protocol == "official"


# --- classes=<file>

CLASSES = ("ant", "bee", "cat", "dog")


def class_folders(root, parts, n=6):
    """Images of one colour each: the class gives red, the part and the number give green, blue."""
    for p, part in enumerate(parts):
        for c, name in enumerate(CLASSES):
            for i in range(n):
                path = root / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (10 * c, p, i)).save(path)
    return root


def pack(root):
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, "wrapped/" + file.relative_to(root).as_posix())
    return path


def write_list(tmp_path, *names, file="list.txt"):
    (tmp_path / file).write_text("\n".join(names) + "\n")
    return tmp_path / file


@pytest.mark.parametrize("parts", [("",), ("train", "test"), ("Train", "val", "TEST")])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("names", [("dog", "bee"), ("cat",)])
def test_a_file_picks_class_folders_in_its_order(tmp_path, parts, zipped, names):
    root = class_folders(tmp_path / "pets", parts, n=20)
    (root / parts[0] / "loose.png").write_bytes(b"of no class: not looked at")
    (root / parts[0] / "ant/broken.png").write_bytes(b"of another class: not looked at")
    source, file = pack(root) if zipped else root, write_list(tmp_path, *names)
    colours = set()
    for split in ("train", "val", "test"):
        pets = images.load(source, split, classes=file)
        assert pets.classes == names and pets.labelled
        for image, label in zip(pets.images, pets.labels, strict=True):
            red, *others = image[:, 0, 0].tolist()
            assert names[label] == CLASSES[red // 10]
            colours.add((red, *others))
    reds = {10 * CLASSES.index(name) for name in names}
    assert colours == {(r, p, i) for r in reds for p in range(len(parts)) for i in range(20)}


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_name_is_one_name_however_a_system_writes_it(tmp_path, parts, zipped):
    """macOS writes é as two characters: its folders, and a list of them, are those of others."""
    names, contents = ("f", "zoé", "é"), set()
    forms = [*itertools.product(("NFC", "NFD"), repeat=len(parts))]
    for number, of_parts in enumerate(forms):
        root = tmp_path / f"set{number}"
        for part, form in zip(parts, of_parts, strict=True):
            for label, i in itertools.product(range(3), range(20)):
                path = root / part / unicodedata.normalize(form, f"{names[label]}/é{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (label, i, len(part))).save(path)
        source = pack(root) if zipped else root
        for form in (None, "NFC", "NFD"):
            lines = [unicodedata.normalize(form, name) for name in names] if form else []
            how = {"classes": write_list(tmp_path, *lines)} if lines else {}
            splits = [images.load(source, split, 8, **how) for split in ("train", "val", "test")]
            assert all(split.classes == names for split in splits)
            assert all((s.images[:, 0, 0, 0] == s.labels).all() for s in splits)
            contents.add((*(split.fingerprint for split in splits),))
    assert len(contents) == 1


def test_classes_are_known_by_content_and_a_changed_list_is_seen(tmp_path):
    root = class_folders(tmp_path / "pets", ("train", "test"))
    prints = {}
    for key, names in {
        "two": ("dog", "bee"),
        "again": ("dog", "", "bee "),
        "marked": ("\ufeffdog", "bee"),  # a byte order mark, as editors of Windows write it
        "turned": ("bee", "dog"),
        "more": ("dog", "bee", "cat"),
        "all": CLASSES,
    }.items():
        prints[key] = images.load(root, "train", classes=write_list(tmp_path, *names)).fingerprint
    prints["none"] = images.load(root, "train").fingerprint
    assert prints["two"] == prints["again"] == prints["marked"] and prints["all"] == prints["none"]
    assert len({prints[key] for key in ("two", "turned", "more", "all")}) == 4


def test_files_of_other_classes_are_not_looked_at(tmp_path):
    """Of ImageNet a tenth is read; a folder of a class's name inside a class folder is of that."""
    root = class_folders(tmp_path / "pets", ("train", "test"))
    (root / "train/dog/bee").mkdir()
    (root / "train/dog/wild").mkdir()
    source = sources.Source(root, "pets", ("dog", "bee"))
    folders = {name for name, _, _ in source.members() if name.endswith("/")}
    inner_folders = {"train/dog/bee/", "train/dog/wild/"}
    assert folders - inner_folders == {"train/", "test/"} | {
        f"{part}/{name}/" for part in ("train", "test") for name in ("dog", "bee")
    }
    assert inner_folders <= folders


def test_imagenet_100_ships_and_a_file_of_one_s_own_comes_first(tmp_path, data, monkeypatch):
    names = sources.read_classes("imagenet100.txt", data)
    assert len(set(names)) == 100 and all(re.fullmatch(r"n\d{8}", name) for name in names)
    assert names[:2] == ("n02869837", "n01749939")  # the place is the label: not sorted
    data.mkdir()
    write_list(data, "of the data folder", file="imagenet100.txt")
    assert sources.read_classes("imagenet100.txt", data) == ("of the data folder",)
    monkeypatch.chdir(tmp_path)
    write_list(tmp_path, "of this folder", file="imagenet100.txt")
    assert sources.read_classes("imagenet100.txt", data) == ("of this folder",)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ("dog", "emu", "bee", "fly"),
            r"has no class folder 'emu', 'fly', which classes names: add",
        ),
        (("dog", "bee", "dog", "bee", "cat"), r"list\.txt repeats 'dog', 'bee': name each once"),
        ((" ", ""), r"list\.txt is empty: name class folders in it, one a line"),
        (
            [f"n{i:08}" for i in range(100)],
            r"no class folder 'n00000000', 'n00000001',.* and \d\d more, which classes names: add",
        ),
        (
            [f"n{i // 2:08}" for i in range(200)],
            r"repeats 'n00000000', .* and \d\d more: name each",
        ),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, outputs, names, words):
    root, file = class_folders(tmp_path / "pets", ("train", "test")), write_list(tmp_path, *names)
    for source in (root, pack(root)):
        with pytest.raises(ConfigError, match=words) as error:
            train_ssl(ssl(dataset=str(source), classes=str(file)))
        assert len(str(error.value)) <= 400
    assert not outputs.exists()


def test_words_are_listed_where_a_long_path_leaves_no_room():
    assert list_some(["cat", "dog"], -60) == "cat, dog"
    assert list_some(["x" * 50, "dog"], -60) == f"{'x' * 20} … {'x' * 20} and 1 more"


def test_a_list_that_is_not_there_and_data_without_class_folders_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"classes='absent\.txt' is no list.* or imagenet100\.txt"
    ):
        locate(ssl(classes="absent.txt"))
    file = str(write_list(tmp_path, "dog"))
    for dataset in ("photos", "cifar10"):
        with pytest.raises(ConfigError, match=f"class folders, and '{dataset}' has none"):
            locate(ssl(dataset=dataset, classes=file))
    (tmp_path / "heap").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "heap/loose.png")
    with pytest.raises(ConfigError, match="has no class folders, of which classes picks"):
        locate(ssl(dataset=str(tmp_path / "heap"), classes=file))


def test_a_run_keeps_its_classes_wherever_it_is_judged(tmp_path, outputs, monkeypatch):
    root = class_folders(tmp_path / "pets", ("train", "val", "test"), n=12)
    write_list(tmp_path, "dog", "bee")
    monkeypatch.chdir(tmp_path)
    run = train_ssl(ssl(dataset="pets", classes="list.txt", limit=None))
    assert run.config.classes == str(tmp_path / "list.txt") and run.model["classes"] == 2
    assert run.summary["n_val"] == 24
    other = ssl(dataset="pets", classes=str(write_list(tmp_path, "dog", "bee", file="copy.txt")))
    assert locate(other.replace(limit=None)) == run  # known by what it says
    assert locate(ssl(dataset="pets", limit=None)).id[-8:] != run.id[-8:]

    monkeypatch.chdir(root)  # a notebook runs in another folder
    fields = {"run": run.id, "references": False, "device": "cpu"}
    assert evaluate(EvalConfig(**fields)).environment["dataset"]["classes"] == 2
    evaluation = evaluate(EvalConfig(**fields, dataset=str(root)))
    assert evaluation.summary["knn_n"] == 24 and evaluation.config.classes == run.config.classes
    assert evaluate(EvalConfig(**fields, classes="")).summary["knn_n"] == 48
    transfer_config = TransferConfig(
        run=run.id, fractions="1.0", shots="1", references=False, device="cpu"
    )
    rows = transfer(transfer_config.replace(ways=2, queries=2, episodes=2, draws=2)).summary["rows"]
    assert rows[0]["n"] == 24

    vae = train_vae(VAEConfig(**TINY | {"limit": None}, dim=8, **_own(run)))
    assert open_scene(DecomposeConfig(vae=vae.id, images=4)).data.classes == ("dog", "bee")
    train_vae(VAEConfig(**TINY | {"limit": None}, dim=8, dataset=str(root)))  # newer, of all
    config = stages.settle(ssl(adversary="idaa", limit=None, **_own(run)))[0]
    assert config.vae == vae.id


def _own(run):
    return {"dataset": run.config.dataset, "classes": run.config.classes}


# --- STL-10 with its unlabelled images


@pytest.fixture
def stl10(data, monkeypatch):
    """60 labelled, 90 unlabelled and 40 test images of 96 px in the published binary format."""
    folder = data / "stl10/stl10_binary"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    rng, pixels = np.random.default_rng(0), {}
    for part, n in {"train": 60, "unlabeled": 90, "test": 40}.items():
        colour = rng.integers(0, 256, (n, 3, 1, 1))
        ramp = np.linspace(-40, 40, 96)[:, None]  # it grows from row to row
        pixels[part] = (colour + ramp + np.zeros(96)).clip(0, 255).astype(np.uint8)
        pixels[part].swapaxes(2, 3).tofile(folder / f"{part}_X.bin")  # column by column
        if part != "unlabeled":
            (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    return {part: torch.from_numpy(images_) for part, images_ in pixels.items()}


def test_stl10_all_has_the_labelled_images_of_stl10_and_those_without(stl10):
    sets = {split: images.load("stl10-all", split, 96) for split in images.SPLITS}
    train_images, labels = stl10["train"], torch.arange(60) % 10
    contents = {image.numpy().tobytes() for image in torch.cat([train_images, stl10["unlabeled"]])}
    assert {image.numpy().tobytes() for image in sets["trainval"].images} == contents
    assert len(sets["trainval"]) == 150 and not sets["trainval"].labelled
    assert sets["trainval"].labels.eq(-1).sum() == 90
    label_of = {
        image.numpy().tobytes(): int(y) for image, y in zip(train_images, labels, strict=True)
    }
    for split in ("train", "val", "test"):
        part = sets[split].with_labels()
        originals = images.load("stl10", split, 96)  # no image of its val is trained on
        assert torch.equal(part.images, originals.images) and torch.equal(
            part.labels, originals.labels
        )
        if split != "test":
            pairs = zip(part.images, part.labels, strict=True)
            assert all(label_of[image.numpy().tobytes()] == y for image, y in pairs)
    assert torch.equal(sets["test"].images, stl10["test"])


def test_what_has_no_label_is_trained_on_and_left_out_of_knn_and_said(stl10, outputs, capsys):
    run = train_ssl(ssl(dataset="stl10-all", limit=None, split="trainval", source_size=96))
    assert run.environment["dataset"]["n"] == 150
    output = capsys.readouterr().out
    train_, val = (open_images("stl10-all", split, 32, None) for split in ("train", "val"))
    for part in (train_, val):
        count = part.labels.eq(-1).sum()
        assert f"stl10-all, {part.split}: {count} of {len(part)} images have no label" in output
    bank, queries = (part.with_labels() for part in (train_, val))
    encoder = load_encoder(run)
    z = [features(encoder.module, part.images, *encoder[1:]) for part in (bank, queries)]
    guess = naive_knn(z[0], bank.labels, z[1], k=min(200, len(bank)), temperature=0.5, classes=10)
    top1 = 100 * (torch.tensor(guess) == queries.labels).double().mean().item()
    assert run.summary["knn_top1_val"] == pytest.approx(top1)
    assert run.summary["n_val"] == len(queries)  # what the interval is over
    assert f"k={len(bank)}," in run.summary["knn_protocol"]


def test_a_few_labels_among_many_images_without(stl10, outputs):
    fields = TINY | {"limit": None, "steps_per_epoch": 2, "mu": 1, "labels_per_class": 2}
    run = train(SemiConfig(**fields, dataset="stl10-all", split="trainval"))
    assert run.environment["dataset"]["n"] == 150 and run.summary["ema_n"] == 40
    assert run.summary["n_val"] == len(images.load("stl10", "val"))


def test_stl10_all_is_judged_on_stl10(stl10, outputs):
    run = train_ssl(ssl(dataset="stl10-all", limit=None))
    fields = {"run": run.id, "references": False, "device": "cpu"}
    evaluation = evaluate(EvalConfig(**fields))
    assert evaluation.config.dataset == "stl10" and evaluation.summary["knn_n"] == 40
    with pytest.raises(ConfigError, match=r"dataset='stl10-all' is to train on.* on 'stl10'\."):
        evaluate(EvalConfig(**fields, dataset="stl10-all"))
    with pytest.raises(ConfigError, match=r"dataset='stl10-unlabeled' is to train on.*'stl10'"):
        transfer(TransferConfig(**fields, datasets="stl10-unlabeled"))
    options = dict(fractions="1.0", draws=2, ways=2, shots="1", queries=2, episodes=2)
    assert transfer(TransferConfig(**fields, **options)).summary["rows"][0]["dataset"] == "stl10"
    grid = cells(CompareConfig(dataset="stl10-all", methods=("simclr",), adversaries=("none",)))
    assert (grid[0].ssl["dataset"], grid[0].eval["dataset"]) == ("stl10-all", "stl10")


# --- source_size: crops of the originals


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (ssl, {}),
        (ssl, {"augmentation": "rsa", "method": "rsa"}),
        (ssl, {"augmentation": "ipirm", "method": "ipirm", "maximize_iter": 1}),
        (VAEConfig, TINY | {"dim": 8}),
        (SemiConfig, TINY | {"steps_per_epoch": 2, "mu": 1, "labels_per_class": 2}),
    ],
)
def test_views_are_cropped_of_larger_images_and_all_else_is_of_size(
    outputs, monkeypatch, make, values
):
    datasets, fit = [], stages.Fit
    monkeypatch.setattr(stages, "Fit", lambda *args: datasets.append(args[2]) or fit(*args))
    run = train(make(**values, source_size=48))
    (training_images,) = datasets
    assert torch.equal(training_images, images.load("photos", "train", 48, 96).images)
    assert (run.config.size, run.model["size"]) == (32, 32)
    plain_run = locate(make(**values))
    assert plain_run.id != run.id and "source_size=48" in run.id
    if run.stage == "ssl":  # kNN is of images of 32 px, as the evaluation's
        bank, val = images.load("photos", "train", 32, 96), images.load("photos", "val", 32, 24)
        encoder = load_encoder(run)
        z = [features(encoder.module, part.images, *encoder[1:]) for part in (bank, val)]
        guess = naive_knn(z[0], bank.labels, z[1], k=96, temperature=0.5, classes=13)
        top1 = 100 * (torch.tensor(guess) == val.labels).double().mean().item()
        assert run.summary["knn_top1_val"] == pytest.approx(top1)
        mean = run.config.mean or images.load("photos", "train", 48).mean
        assert run.model["mean"] == pytest.approx(mean)


def test_a_crop_is_of_the_original_s_pixels():
    """A view of half the side of an image of 64 px is that part of it, unchanged at 32 px."""
    plan = stages._plan(ssl(source_size=64))
    about = stages._about(plan.config, plan.data)
    image = images.load("photos", "train", 64, 96).images[:1]
    params = about.recipe.parameters(about.recipe.numbers(1, None), (64, 64))
    values = {"crop": [[16, 8, 32, 32]], "flip": [[0]], "color": [[1, 1, 1, 0]], "gray": [[0]]}
    params |= {name: torch.tensor(value).float() for name, value in values.items()}
    mean, std = (
        torch.tensor(unit)[:, None, None] for unit in (about.recipe.mean, about.recipe.std)
    )
    view = about.recipe.apply(image, params).images[0] * std + mean
    torch.testing.assert_close(view, image[0, :, 16:48, 8:40] / 255, atol=1e-5, rtol=0)


def test_images_kept_at_size_are_the_run_without_source_size(outputs):
    plain_config, same_config = ssl(), ssl(source_size=32)
    assert locate(same_config) == locate(plain_config) != locate(ssl(source_size=33))
    assert (
        same_config.identity() == plain_config.identity()
        and "source_size" not in plain_config.identity()
    )
    assert same_config.replace(size=28).source_size == 32
    # A recipe's originals do not come back where the user wants none.
    large_config = SSLConfig(preset="rsa-stl10", source_size=64)
    assert large_config.replace(seed=1).source_size == 64
    assert "source_size" not in large_config.identity()


def test_a_source_size_below_size_is_refused():
    with pytest.raises(ConfigError, match=r"source_size=31 is less than size=32: views are crop"):
        ssl(source_size=31)
    with pytest.raises(ConfigError, match="source_size=96 is less than size=128"):
        SSLConfig(preset="ipirm-stl10", size=128)
    with pytest.raises(ConfigError, match="source_size must be greater than 0"):
        ssl(source_size=0)


def test_room_is_needed_for_images_as_they_are_kept(data, outputs, monkeypatch):
    usage = SimpleNamespace(free=5500 * 3 * 48**2 - 1)
    monkeypatch.setattr(pool.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"photos could not be written .* they take 36 MiB"):
        locate(ssl(source_size=48))
