"""Images: what comes out is checked against Pillow, numpy and closed forms computed here."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torchvision.transforms.v2 import functional as F

from idaa_lib.configs import ConfigError, EvalConfig, SSLConfig, VAEConfig
from idaa_lib.data import __main__ as data_commands
from idaa_lib.data import cached as images
from idaa_lib.data import decoding, photos, pool, sources
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.grids import read
from idaa_lib.runs import CONFIGS, RunError, get, outputs_root
from idaa_lib.sweeps import plan
from idaa_lib.train.stages import locate, train, train_ssl

ROOT = Path(__file__).resolve().parents[1]
ROW = {"train": 0, "val": 1, "test": 2}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def noise(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def class_folders(root, parts=("train/", "test/"), classes=("cat", "dog"), n=6):
    """PNGs of noise, each another; returns path → pixels (H, W, 3)."""
    files = {}
    for seed, (part, name, i) in enumerate(itertools.product(parts, classes, range(n))):
        files[f"{part}{name}/{i}.png"] = noise(seed)
        save(root / f"{part}{name}/{i}.png", files[f"{part}{name}/{i}.png"])
    return files


def pack(root, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def rows(image_set):
    """The set of images, each as bytes of (3, H, W)."""
    return {image.numpy().tobytes() for image in image_set.images}


def chw(pixels):
    return pixels.transpose(2, 0, 1).tobytes()


def only(tmp_path, **options):
    """The single image of a folder that holds one training image, shown as (H, W, 3)."""
    image_set = images.load(tmp_path / "one", "train", **options)
    assert len(image_set) == 1
    return image_set.images[0].permute(1, 2, 0).numpy()


def nothing_left(data):
    return [path.name for path in (data / "cache").glob("*") if not path.name.endswith(".lock")]


# --- Folders and zips


def test_folder_and_zip_give_every_image_of_every_split_unchanged(tmp_path):
    files = class_folders(tmp_path / "pets")
    zip_path = pack(tmp_path / "pets", tmp_path / "pets.zip")
    for source in (tmp_path / "pets", zip_path):
        sets = {split: images.load(source, split) for split in images.SPLITS}
        for split, parts in {"trainval": ["train/"], "test": ["test/"]}.items():
            expected = {chw(p) for name, p in files.items() if name.startswith(tuple(parts))}
            assert rows(sets[split]) == expected
        labels = {chw(p): "dog" in name for name, p in files.items()}
        for image_set in sets.values():
            assert image_set.classes == ("cat", "dog")
            assert image_set.images.dtype == torch.uint8 and image_set.labels.dtype == torch.int64
            guesses = {
                image.numpy().tobytes(): int(y)
                for image, y in zip(image_set.images, image_set.labels, strict=True)
            }
            assert all(labels[image] == y for image, y in guesses.items())
        assert rows(sets["train"]) | rows(sets["val"]) == rows(sets["trainval"])
        assert not rows(sets["train"]) & rows(sets["val"])


def test_zip_and_folder_share_a_fingerprint_and_selections_do_not(tmp_path):
    class_folders(tmp_path / "pets")
    zip_path = pack(tmp_path / "pets", tmp_path / "pets.zip", prefix="wrapped/twice/")
    image_set = images.load(tmp_path / "pets", "train")
    assert image_set.fingerprint == images.load(zip_path, "train").fingerprint
    assert image_set.fingerprint == images.load(zip_path, "train", limit=10**6).fingerprint
    selections = [
        images.load(zip_path, "trainval"),
        images.load(zip_path, "test"),
        images.load(zip_path, "train", limit=3),
        images.load(zip_path, "train", size=16),
        image_set.subset([1, 0]),
        image_set.subset([0, 1]),
    ]
    assert len({selection.fingerprint for selection in [image_set, *selections]}) == 7


def test_mean_and_std_are_those_of_the_pool_whatever_is_selected(tmp_path):
    files = class_folders(tmp_path / "pets")
    pool = np.stack([p for name, p in files.items() if name.startswith("train")]) / 255
    for options in ({"split": "train"}, {"split": "test"}, {"split": "train", "limit": 2}):
        image_set = images.load(tmp_path / "pets", **options)
        np.testing.assert_allclose(image_set.mean, pool.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(image_set.std, pool.std((0, 1, 2)), rtol=1e-9)


def test_limit_keeps_the_same_random_images_and_subset_picks_rows(tmp_path):
    class_folders(tmp_path / "pets", n=20)
    image_set = images.load(tmp_path / "pets", "test")
    sample = images.load(tmp_path / "pets", "test", limit=10)
    assert len(sample) == 10 and rows(sample) < rows(image_set)
    assert torch.equal(sample.images, images.load(tmp_path / "pets", "test", limit=10).images)
    assert set(sample.labels.tolist()) == {0, 1}  # not the first ten, which are all cats
    subset = image_set.subset(torch.tensor([3, 1]))
    assert torch.equal(subset.images, image_set.images[[3, 1]]) and subset.size == 32
    assert len(image_set.subset(image_set.labels == 1)) == 20


def test_single_folder_is_split_by_name_and_a_new_file_moves_no_other(tmp_path):
    class_folders(tmp_path / "pets", parts=("",), n=100)
    before = {split: rows(images.load(tmp_path / "pets", split)) for split in ROW}
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 200
    assert 140 < len(before["train"]) < 180 and len(before["val"]) > 5 and len(before["test"]) > 5
    save(tmp_path / "pets/cat/0a.png", noise(999))
    after = {split: rows(images.load(tmp_path / "pets", split)) for split in ROW}
    assert all(before[split] <= after[split] for split in ROW)
    assert sum(map(len, after.values())) == 201


def part_of(files, part):
    return {chw(pixels) for name, pixels in files.items() if name.startswith(part)}


def test_own_val_is_taken_beside_a_test(tmp_path):
    files = class_folders(tmp_path / "pets", parts=("train/", "val/", "test/"))
    for split in ROW:
        image_set = images.load(tmp_path / "pets", split)
        assert rows(image_set) == part_of(files, split) and not image_set.notes


@pytest.mark.parametrize(("val", "zipped"), [("val/", False), ("Validation/", True)])
def test_without_a_test_val_takes_its_place_and_train_is_shared(tmp_path, capsys, val, zipped):
    """As ImageNet is laid out. No image of val is trained on, and none chooses anything."""
    root = tmp_path / "pets"
    files = class_folders(root, parts=("train/", val), n=20)
    source = pack(root, tmp_path / "pets.zip", "wrapped/") if zipped else root
    sets = {split: images.load(source, split) for split in ROW}
    assert rows(sets["test"]) == part_of(files, val)
    assert rows(sets["train"]) | rows(sets["val"]) == part_of(files, "train")
    assert not rows(sets["train"]) & rows(sets["val"]) and 0 < len(sets["val"]) < 20
    assert capsys.readouterr().out.count("no test/, so val/ is the test split") == 1
    shutil.move(root / val, root / "test")  # what it is the same as
    assert images.load(root, "train").fingerprint == sets["train"].fingerprint


def test_images_without_classes_have_no_label(tmp_path):
    for i in range(20):
        save(tmp_path / f"heap/{i}.png", noise(i))
    for source in (tmp_path / "heap", pack(tmp_path / "heap", tmp_path / "heap.zip", "heap/")):
        image_set = images.load(source, "train")
        assert image_set.classes == () and not image_set.labelled and (image_set.labels == -1).all()


def test_deeper_files_belong_to_their_class_and_hidden_ones_to_nobody(tmp_path):
    class_folders(tmp_path / "pets")
    save(tmp_path / "pets/test/cat/more/deep/x.png", noise(77))
    zip_path = pack(tmp_path / "pets", tmp_path / "pets.zip", prefix="pets/")
    with zipfile.ZipFile(zip_path, "a") as archive:
        archive.writestr("__MACOSX/pets/train/cat/._0.png", b"resource fork")
        archive.writestr("pets/train/.DS_Store", b"")
        archive.writestr("pets/README.txt", b"")
    assert images.load(zip_path, "test").labels.tolist() == [0] * 7 + [1] * 6


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda root: (root / "train/cow").mkdir(), r"'train/cow/'.*holds no image"),
        (lambda root: save(root / "test/emu/0.png", noise(0)), r"'emu' in test/ but not in train/"),
        (lambda root: save(root / "train/0.png", noise(0)), r"'train/0.png'.*beside class folders"),
        (lambda root: save(root / "more/0.png", noise(0)), r"'more/0.png' beside train/.*more/ aw"),
        (lambda root: save(root / "0.png", noise(0)), r"'0.png' beside train/.* move it away"),
        (lambda root: (root / "train").rename(root / "learn"), r"test/ but no train/"),
    ],
)
def test_unclear_folders_are_refused_by_name(tmp_path, data, breakage, message):
    class_folders(tmp_path / "pets")
    breakage(tmp_path / "pets")
    with pytest.raises(ValueError, match=message):
        images.load(tmp_path / "pets", "train")
    assert not nothing_left(data)


def test_folder_without_images_says_what_it_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no image: looked for .*\.png and"):
        images.load(tmp_path / "empty", "train")
    (tmp_path / "empty/photo.HEIC").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no image.*: 1 \.heic; pip install pillow-heif, and"):
        images.load(tmp_path / "empty", "train")


@pytest.mark.parametrize("member", ["../evil.png", "/evil.png", "a/../../evil.png", "C:\\evil.png"])
def test_zip_that_leaves_its_folder_is_refused_before_reading(tmp_path, data, member):
    class_folders(tmp_path / "pets")
    zip_path = pack(tmp_path / "pets", tmp_path / "pets.zip")
    with zipfile.ZipFile(zip_path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(member), b"")
    with pytest.raises(ValueError, match=r"member .*evil.png.* leaves it"):
        images.load(zip_path, "train")
    assert not data.exists()


def test_missing_path_unknown_name_and_broken_zip(tmp_path):
    names = "photos, starter, cifar10, .*caltech101"  # no path is one of them, mistyped
    for source, hint in (("cifar11", names), (tmp_path / "absent.zip", "path of a folder or zip")):
        with pytest.raises(FileNotFoundError, match=hint):
            images.load(source, "train")
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ValueError, match=r"broken.zip is neither a folder nor a readable zip"):
        images.load(tmp_path / "broken.zip", "train")
    for name in ("a.tar", "a.tar.gz", "a.tgz"):
        (tmp_path / name).write_bytes(b"n/1.jpg")
        with pytest.raises(ValueError, match=rf"{name} is a tar: give the folder that it lies in"):
            images.load(tmp_path / name, "train")


@pytest.mark.parametrize("dataset", ["cifar11", "", "/no/such.zip", "2401"])
def test_a_missing_data_set_is_named_by_the_field_that_names_it(dataset, data):
    with pytest.raises(ConfigError, match=f"dataset='{dataset}': ") as refusal:
        locate(SSLConfig(dataset=dataset))
    assert "source" not in str(refusal.value)


def test_a_folder_of_the_data_folder_goes_by_its_name(data):
    class_folders(data / "pets")
    assert images.load("pets", "test").name == "pets"


@pytest.mark.parametrize(
    "mistake",
    [{"split": "valid"}, {"size": 0}, {"size": 32.0}, {"size": True}, {"limit": 0}, {"limit": "9"},
     {"on_error": "ignore"}, {"gray_bits": 17}],
)  # fmt: skip
def test_impossible_arguments_are_named_before_any_work(mistake, data):
    [(field, value)] = mistake.items()
    with pytest.raises(ValueError, match=f"^{field}={value!r}"):
        images.load("photos", **{"split": "train", **mistake})
    assert not data.exists()


# --- Decoding


def gradient(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, x + y], -1).astype(np.float64) * 255 / (height + width)


def exif_rotated(path):
    pixels = noise(3, 32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the stored image needs a quarter turn clockwise
    Image.fromarray(pixels).save(path, exif=exif)
    return np.rot90(pixels, -1)


def gray(path):
    Image.fromarray(noise(4)[..., 0]).save(path)
    return np.repeat(noise(4)[..., :1], 3, -1)


def gray16(path):
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(values).save(path)
    return np.repeat((values / 65535 * 255).round()[..., None], 3, -1)


def cmyk(path):
    ink = noise(5)
    ink = np.concatenate([ink, np.zeros_like(ink[..., :1])], -1)  # no black: RGB is 255 - ink
    Image.fromarray(ink, "CMYK").save(path, format="TIFF")
    return 255 - ink[..., :3]


def alpha(path):
    rgba = np.concatenate([noise(6), noise(7)[..., :1]], -1).astype(np.float64)
    Image.fromarray(rgba.astype(np.uint8)).save(path)
    cover = rgba[..., 3:] / 255
    return rgba[..., :3] * cover + 255 * (1 - cover)


def gray_alpha(path):
    la = noise(6)[..., :2]
    Image.fromarray(la, "LA").save(path)
    cover = la[..., 1:] / 255
    return np.repeat(la[..., :1] * cover + 255 * (1 - cover), 3, -1)


def palette_with_a_transparent_colour(path):
    index = (noise(8)[..., 0] % 2).astype(np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(path, transparency=1)
    return np.where(index[..., None] == 1, 255, [10, 20, 30])


def one_bit(path):
    bits = noise(9)[..., 0] > 127
    Image.fromarray(bits).save(path)
    return np.repeat(bits[..., None] * 255, 3, -1)


MODES = [exif_rotated, gray, gray16, cmyk, alpha, gray_alpha, palette_with_a_transparent_colour]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow's, of fromarray's mode
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("write", [*MODES, one_bit])
def test_every_mode_becomes_the_right_rgb(tmp_path, write, streamed):
    (tmp_path / "one").mkdir()
    expected = write(tmp_path / "one/image.png" if write is not cmyk else tmp_path / "one/i.tif")
    pixels = only(tmp_path, streamed=streamed)
    np.testing.assert_allclose(pixels, expected, atol=1 if "alpha" in write.__name__ else 0)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (301, 200)])
def test_other_shapes_are_shrunk_and_cropped_in_the_middle(tmp_path, shape):
    save(tmp_path / "one/image.png", gradient(*shape).round().astype(np.uint8))
    side = min(shape)
    top, left = (shape[0] - side) / 2, (shape[1] - side) / 2
    at = (np.arange(16) + 0.5) * side / 16 - 0.5  # centres of the new pixels among the old
    y, x = np.meshgrid(at + top, at + left, indexing="ij")
    expected = np.stack([x, y, x + y], -1) * 255 / sum(shape)  # a gradient shrinks to itself
    middle = (slice(1, -1), slice(1, -1))  # at the border the filter leans inwards
    np.testing.assert_allclose(only(tmp_path, size=16)[middle], expected[middle], atol=1.5)


@pytest.fixture
def damaged(tmp_path):
    """12 training images, of which train/cat/0 is cut off and train/dog/1 is no image."""
    class_folders(tmp_path / "pets")
    content = (tmp_path / "pets/train/cat/0.png").read_bytes()
    (tmp_path / "pets/train/cat/0.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "pets/train/dog/1.png").write_bytes(b"not an image")
    return tmp_path / "pets"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(lambda png: png[: len(png) // 2], "truncated"), (lambda png: b"x", "no image format")],
)
def test_an_unreadable_image_is_named(tmp_path, content, reason):
    class_folders(tmp_path / "pets")
    file = tmp_path / "pets/train/cat/3.png"
    file.write_bytes(content(file.read_bytes()))
    for source in (tmp_path / "pets", pack(tmp_path / "pets", tmp_path / "pets.zip")):
        with pytest.raises(ValueError, match=rf"train/cat/3.png cannot be read \(.*{reason}"):
            images.load(source, "test")


def test_unreadable_images_are_skipped_and_counted_and_no_sound_one_is_decoded_again(
    damaged, capsys, monkeypatch
):
    calls, decode = [], decoding._decode

    def count(listing, *arguments):
        calls.append(listing.names[arguments[-1]])
        return decode(listing, *arguments)

    monkeypatch.setattr(decoding, "_decode", count)
    paths = ["train/cat/0.png", "train/dog/1.png"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.png cannot be read.*1\.png.*on_error='skip'$"):
            images.load(damaged, "test")
    output = capsys.readouterr().out
    moved = damaged.rename(damaged.with_name("moved"))  # what was seen there is said of here
    with pytest.raises(ValueError, match=r"^train/cat/0\.png cannot be read [^/]*, train/dog"):
        images.load(moved, "test")
    moved.rename(damaged)
    capsys.readouterr()
    image_set = images.load(damaged, "trainval", on_error="skip")
    assert (len(image_set), image_set.skipped) == (10, 2)
    assert images.load(damaged, "test", on_error="skip").skipped == 2
    (note,) = image_set.notes
    assert note.startswith("2 of 24 images cannot be read: ") and all(b in note for b in paths)
    assert output.count("\n") == 1 and all(b in output for b in paths)  # once in a process
    assert capsys.readouterr().out == f"pets: {note}.\n"
    names = [name for name in calls if name not in paths]
    assert len(names) == len(set(names)) == 22


def test_what_no_stamp_tells_is_looked_at_again(tmp_path, monkeypatch):
    """Rights that were given, a disk that is back: the files are as old and as long as before."""
    class_folders(tmp_path / "pets")
    with monkeypatch.context() as patch:
        refuse = lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))  # noqa: E731
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match="no image for class 'cat'"):
            images.load(tmp_path / "pets", "train")
        opener = Path.open
        patch.setattr(
            Path, "read_bytes", lambda p: refuse() if p.name == "1.png" else opener(p, "rb").read()
        )
        with pytest.raises(ValueError, match=r"cat/1\.png cannot .*Permission denied"):
            images.load(tmp_path / "pets", "train")
    assert images.load(tmp_path / "pets", "train").skipped == 0


@pytest.mark.parametrize("lies", ["data", "data/cache", "data/cache/pets.lock/x"])
def test_a_cache_that_cannot_be_written_is_a_sentence_with_what_to_do(tmp_path, data, lies):
    """A file has the folder's name, or a folder that of the lock."""
    class_folders(tmp_path / "pets")
    (tmp_path / lies).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / lies).write_text("")
    with pytest.raises(OSError, match=r"cache cannot be written \(\w.*or set IDAA_DATA to another"):
        images.load(tmp_path / "pets", "train")


def test_many_unreadable_images_are_one_short_sentence_and_all_of_them_are_printed(
    tmp_path, outputs, capsys
):
    class_folders(tmp_path / "pets", ("train/",), n=30)
    long = "a long name with spaces " * 9
    for i in range(30):
        (tmp_path / "pets/train/cat" / f"{i % 5} {long}.png").write_bytes(b"")
        save(tmp_path / f"pets/train/dog/{i}.tiff", np.zeros((8, 8), np.float32))
    config = SSLConfig(dataset=str(tmp_path / "pets"), width=4, device="cpu")
    with pytest.raises(ConfigError, match=r"cannot be read.* and 34 more: .* on_error='skip'") as e:
        train_ssl(config)
    assert len(str(e.value)) <= 400
    output = capsys.readouterr().out
    assert all(f"dog/{i}.tiff cannot be read" in output for i in range(30))
    for file in (tmp_path / "pets/train/dog").iterdir():
        file.unlink()
    (tmp_path / "pets/train/dog/0.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="no image for class 'dog', and 6 of 36 ") as e:
        train_ssl(config)
    assert len(str(e.value)) <= 400


def test_class_with_no_readable_image_is_an_error(tmp_path, data):
    class_folders(tmp_path / "pets")
    for part in ("train", "test"):
        for file in (tmp_path / "pets" / part / "dog").iterdir():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image for class 'dog', and 12 of 24 .*dog/0\.png"):
        images.load(tmp_path / "pets", "train", on_error="skip")
    assert not nothing_left(data)


def test_decompression_bomb_is_named(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"/cat/0.png .*DecompressionBomb"):
        images.load(tmp_path / "pets", "train")


def test_float_images_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "one/depth.tiff")
    with pytest.raises(ValueError, match=r"depth.tiff cannot be read .*floats of unknown range"):
        images.load(tmp_path / "one", "train")


def test_large_images_take_threads_and_keep_their_order(tmp_path):
    for i in range(600):
        save(tmp_path / f"heap/{i:03}.png", np.full((400, 400, 3), i % 256, np.uint8))
    for part in ("train", "val", "test"):
        image_set = images.load(tmp_path / "heap", part, size=8)
        values = image_set.images.flatten(1)
        assert (values == values[:, :1]).all()
        wraps = (values[1:, 0].int() <= values[:-1, 0].int()).sum()
        assert wraps == 2  # 0…255, 0…255, 0…87: sorted by name


# --- The cache


def entry(data):
    [path] = (path for path in (data / "cache").iterdir() if path.is_dir())
    return path


def test_second_load_decodes_nothing_and_writing_stays_private(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets")
    first = images.load(tmp_path / "pets", "train")
    pixels = first.images.clone()
    first.images.zero_()
    monkeypatch.setattr(decoding, "_decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(images.load(tmp_path / "pets", "train").images, pixels)
    assert len(images.load(tmp_path / "pets", "test", limit=3)) == 3


def test_changed_content_is_seen(tmp_path):
    class_folders(tmp_path / "pets")
    before = images.load(tmp_path / "pets", "test")
    save(tmp_path / "pets/test/cat/0.png", noise(1234))
    after = images.load(tmp_path / "pets", "test")
    assert chw(noise(1234)) in rows(after) and after.fingerprint != before.fingerprint


def cut(path):
    os.truncate(path / "images.u8", 100)


def scribble(path):
    with open(path / "images.u8", "r+b") as file:
        file.write(b"\xff" * 100)


def relabel(path):
    about = path / "about.json"
    about.write_text(about.read_text().replace('"labels": [0', '"labels": [1'))


@pytest.mark.parametrize("damage", [cut, scribble, relabel, lambda p: (p / "images.u8").unlink()])
def test_damaged_entry_is_built_again(tmp_path, data, damage):
    class_folders(tmp_path / "pets")
    image_set = images.load(tmp_path / "pets", "train")
    tensors = image_set.images.clone(), image_set.labels.clone()
    time.sleep(0.01)
    damage(entry(data))
    repeat = images.load(tmp_path / "pets", "train")
    assert torch.equal(repeat.images, tensors[0]) and torch.equal(repeat.labels, tensors[1])
    assert repeat.fingerprint == image_set.fingerprint


def test_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, data):
    resource = pytest.importorskip("resource")
    class_folders(tmp_path / "pets", n=100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a write fails half-way
    try:
        with pytest.raises(OSError, match=r"pets could not be written to .*they take 1 MiB"):
            images.load(tmp_path / "pets", "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not nothing_left(data)


def test_a_disk_known_to_be_too_small_is_refused_before_decoding(tmp_path, data, monkeypatch):
    class_folders(tmp_path / "pets")
    monkeypatch.setattr(pool.shutil, "disk_usage", lambda _: SimpleNamespace(free=24 * 3072 - 1))
    monkeypatch.setattr(decoding, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(OSError, match="No space left on device"):
        images.load(tmp_path / "pets", "train")
    assert not nothing_left(data)


def test_what_a_killed_process_left_is_cleared_away(tmp_path, data):
    class_folders(tmp_path / "pets")
    pixels = rows(images.load(tmp_path / "pets", "test"))
    folder = entry(data)
    cut(folder)
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    assert rows(images.load(tmp_path / "pets", "test")) == pixels
    assert entry(data) == folder


def test_processes_that_start_at_once_decode_once(tmp_path, data):
    class_folders(tmp_path / "pets", n=150)
    script = f"""
import os, time
from pathlib import Path
from idaa_lib.data import cached as images
from idaa_lib.data import decoding
original = decoding._decode
def logged(listing, make, i):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write(listing.names[i] + "\\n")
    time.sleep(0.001)
    return original(listing, make, i)
decoding._decode = logged
Path({str(tmp_path)!r}, f"ready{{os.getpid()}}").touch()
while not Path({str(tmp_path / "go")!r}).exists():
    time.sleep(0.01)
print(images.load({str(tmp_path / "pets")!r}, "train").fingerprint)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
        for _ in range(3)
    ]
    while len(list(tmp_path.glob("ready*"))) < 3 and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    (tmp_path / "go").touch()
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outputs) == 1 and len(outputs.pop()) == 65  # one fingerprint and a newline
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(lines) == len(set(lines)) == 600
    assert entry(data)


# --- photos


def test_photos_are_thirteen_balanced_classes_the_same_on_every_call(data):
    for split, count in photos.COUNTS.items():
        part = images.load("photos", split)
        assert part.images.shape == (count, 3, 32, 32) and len(part.classes) == 13
        counts = torch.bincount(part.labels)
        assert counts.max() - counts.min() <= 1
    repeat = images.load("photos", "test", data_dir=data / "elsewhere")
    assert torch.equal(repeat.images, part.images) and repeat.fingerprint == part.fingerprint
    assert len(images.load("photos", "trainval")) == 4500


def test_photos_are_crops_of_their_photographs():
    image_set = images.load("photos", "test", size=48)
    crops = [crop for crop in photos.crops() if crop.split == "test"]
    for i in range(0, 1000, 97):
        photograph = Image.open(photos.paths()[crops[i].photo]).convert("RGB")
        expected = photograph.crop(crops[i].box).resize((48, 48), Image.Resampling.BILINEAR)
        assert image_set.images[i].numpy().tobytes() == chw(np.asarray(expected))
        assert image_set.classes[image_set.labels[i]] == crops[i].photo


def test_no_pixel_of_a_photograph_lies_in_crops_of_two_splits():
    shapes = {photo: Image.open(path).size[::-1] for photo, path in photos.paths().items()}
    masks = {photo: np.zeros((3, *shape), bool) for photo, shape in shapes.items()}
    for crop in photos.crops():
        height, width = shapes[crop.photo]
        left, top, right, bottom = crop.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert right - left == bottom - top
        masks[crop.photo][ROW[crop.split], top:bottom, left:right] = True
    assert len(masks) == 13
    assert all(mask.sum(0).max() == 1 and mask.any((1, 2)).all() for mask in masks.values())


def test_raw_pixels_say_something_about_photos_and_not_everything():
    train, test = images.load("photos", "train"), images.load("photos", "test")
    classifier = KNeighborsClassifier(5).fit(train.images.flatten(1), train.labels)
    accuracy = classifier.score(test.images.flatten(1), test.labels)
    print(f"raw-pixel 5-NN on photos: {100 * accuracy:.1f} %")
    assert 0.40 < accuracy < 0.70


# --- torchvision

SPLIT = {split: {"split": split} for split in ("train", "val", "test")}
TRAIN_TEST = {"train": SPLIT["train"], "test": SPLIT["test"]}
REQUESTS = {  # name: torchvision's class, and what it should be asked for
    "cifar10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "stl10": ("STL10", TRAIN_TEST),
    "stl10-unlabeled": ("STL10", {"train": {"split": "unlabeled"}, "test": SPLIT["test"]}),
    "stl10-all": ("STL10", {"train": {"split": "train+unlabeled"}, "test": SPLIT["test"]}),
    "svhn": ("SVHN", TRAIN_TEST),
    "flowers102": ("Flowers102", SPLIT),
    "oxfordiiitpet": ("OxfordIIITPet", {"train": {"split": "trainval"}, "test": SPLIT["test"]}),
    "dtd": ("DTD", SPLIT),
    "fgvcaircraft": ("FGVCAircraft", SPLIT),
    "food101": ("Food101", TRAIN_TEST),
    "caltech101": ("Caltech101", {"all": {}}),
}


@pytest.mark.parametrize("name", sources.TORCHVISION)
def test_every_torchvision_name_asks_for_its_parts(name, monkeypatch, data):
    kind, parts = REQUESTS[name]
    calls = []

    class Fake:
        def __init__(self, root, download, **arguments):
            assert root == data / name.split("-")[0] and download
            self.seed = 1000 * len(calls)
            calls.append(arguments)
            if kind == "Caltech101":
                self.categories = list("abcdefghij")
            elif kind != "SVHN":
                self.classes = list("abcdefghij")

        def __len__(self):
            return 60

        def __getitem__(self, i):
            if not 0 <= i < 60:
                raise IndexError(i)
            return Image.fromarray(noise(self.seed + i)), i % 10

    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    sets = {split: images.load(name, split) for split in ("train", "val", "test", "trainval")}
    assert sorted(map(repr, calls)) == sorted(map(repr, parts.values()))  # each once, then cached
    assert sets["train"].classes == tuple("0123456789" if kind == "SVHN" else "abcdefghij")
    if "all" in parts:
        assert sum(len(sets[split]) for split in ROW) == 60
    else:
        assert len(sets["test"]) == 60
        assert len(sets["val"]) == 60 if "val" in parts else 0 < len(sets["val"]) < 20
        assert len(sets["trainval"]) == 60 * (len(parts) - 1)
    seeds = {chw(noise(s)): s for part in range(3) for s in range(1000 * part, 1000 * part + 60)}
    for image_set in sets.values():
        assert [seeds[i.numpy().tobytes()] % 1000 % 10 for i in image_set.images] == list(
            image_set.labels
        )
    if name in ("cifar10", "cifar100"):
        assert sets["train"].mean == (0.4914, 0.4822, 0.4465)
        assert sets["train"].std == (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize("error", [RuntimeError("not found"), urllib.error.URLError("no network")])
def test_absent_torchvision_set_says_where_its_files_go(monkeypatch, data, error):
    def refuse(root, **_):
        raise error

    monkeypatch.setattr(torchvision.datasets, "DTD", refuse)
    with pytest.raises(FileNotFoundError, match=r"dtd is not complete in .*/data/dtd and .*put"):
        images.load("dtd", "train")
    with pytest.raises(FileNotFoundError, match="download=False"):
        images.load("dtd", "train", download=False)
    assert not nothing_left(data)


# --- All of CIFAR-10


def test_cifar10_is_decoded_once_in_little_memory(data, cifar10_zip):
    # VmHWM and not getrusage, whose peak a child inherits from the process that started it.
    script = f"""
import json, re, time, torch
from idaa_lib.data import cached as images
seconds, counts = [], []
for split in ("trainval", "test"):  # the second finds the cache
    begin = time.perf_counter()
    some = images.load({str(cifar10_zip)!r}, split)
    seconds.append(time.perf_counter() - begin)
    assert some.images.amax() == 255  # reads every pixel
    counts.append(torch.bincount(some.labels).tolist())
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps([seconds, peak, counts]))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc/self/status, which only Linux has")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", script]
    process = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
    (first, repeat), peak, counts = json.loads(process.stdout)
    print(f"CIFAR-10: decoded in {first:.1f} s, again {repeat:.2f} s, peak {peak:.0f} MiB")
    assert counts == [[5000] * 10, [1000] * 10]
    assert peak < 1024
    image_set = images.load(cifar10_zip, "test")
    with zipfile.ZipFile(cifar10_zip) as archive:
        for i in range(0, 10_000, 1111):
            member = f"test/{image_set.classes[image_set.labels[i]]}/{i % 1000:04}.jpg"
            image = Image.open(io.BytesIO(archive.read(member))).convert("RGB")
            assert image_set.images[i].numpy().tobytes() == chw(np.asarray(image))


# --- What lies in folders of other people


@pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "testing")])
def test_a_part_by_another_name_is_no_class(tmp_path, train, test):
    """Train/ and Test/ would otherwise be two classes, and nobody would notice."""
    files = class_folders(tmp_path / "pets", parts=(f"{train}/", "Validation/", f"{test}/"))
    for split, part in (("train", train), ("val", "Validation"), ("test", test)):
        image_set = images.load(tmp_path / "pets", split)
        assert rows(image_set) == {chw(p) for name, p in files.items() if name.startswith(part)}
        assert image_set.classes == ("cat", "dog")


def test_what_systems_and_tools_leave_behind_is_no_image_and_no_class(tmp_path):
    files = class_folders(tmp_path / "pets", parts=("",), n=10)
    root = tmp_path / "pets"
    for name in (".ipynb_checkpoints", "__MACOSX/cat", "@eaDir", "#recycle", "cat/@eaDir/0.png"):
        save(root / name / "x.png", noise(1))
    save(root / "cat/._0.png", noise(1))
    (root / ".DS_Store").write_bytes(b"x")
    (root / "cat/Thumbs.db").write_bytes(b"x")
    (root / "cat/.#notes.txt").symlink_to("user@host.123:456")
    (root / "gone.txt").symlink_to("/nowhere/x.txt")
    (root / "scripts").mkdir()
    (root / "scripts/run.py").write_text("")
    os.mkfifo(root / "cat/pipe")
    (root / "lost+found").mkdir()
    (root / "cat/up").symlink_to("..")  # without an end
    (root / "cat/self").symlink_to("self")
    (root / "bird").symlink_to("/nowhere/bird")
    sets = [images.load(root, split) for split in ROW]
    assert set().union(*map(rows, sets)) == set(map(chw, files.values()))
    assert sets[0].classes == ("cat", "dog")
    (note,) = sets[0].notes
    assert "not read as images: 1 .py, 4 broken link, 1 without extension; give" in note


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to("/nowhere/x.png"), "FileNotFoundError"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: path.symlink_to("."), "a folder, pipe or device"),
        (os.mkfifo, "a folder, pipe or device"),
        (lambda path: path.symlink_to("/dev/zero"), "a folder, pipe or device"),
    ],
)
def test_what_is_named_as_an_image_and_is_no_file_is_an_unreadable_image(tmp_path, make, reason):
    class_folders(tmp_path / "pets")
    make(tmp_path / "pets/train/cat/x.png")
    with pytest.raises(ValueError, match=rf"cat/x\.png cannot be read \(.*{reason}"):
        images.load(tmp_path / "pets", "train")
    assert len(images.load(tmp_path / "pets", "trainval", on_error="skip")) == 12


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_that_is_called_as_an_image_is_a_folder(tmp_path, zipped):
    files = class_folders(tmp_path / "pets", classes=("slide_1.tif", "slide_2.tif"))
    for name in ("train/slide_1.tif/a.png", "train/slide_1.tif/@eaDir/0.png"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        save(tmp_path / "pets" / name / "tile.png", noise(99))
    source = pack(tmp_path / "pets", tmp_path / "pets.zip") if zipped else tmp_path / "pets"
    image_set = images.load(source, "trainval")
    assert image_set.classes == ("slide_1.tif", "slide_2.tif")
    assert rows(image_set) == part_of(files, "train") | {chw(noise(99))} and len(image_set) == 13


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"train/dog cannot be read \(Permission denied\): change"):
        images.load(tmp_path / "pets", "train")


def test_names_that_are_no_utf_8_are_names(tmp_path):
    files = class_folders(tmp_path / "pets", parts=("",), n=20)
    for file in (tmp_path / "pets/cat").iterdir():
        file.rename(file.with_name(f"caf\udce9{file.name}"))  # as Latin-1 wrote it
    (tmp_path / "pets/cat").rename(tmp_path / "pets/caf\udce9")
    sets = [images.load(tmp_path / "pets", split) for split in ROW]
    assert sum(map(len, sets)) == len(files)
    # What a class is called can be drawn, and sent to a browser.
    assert sets[0].classes == (r"caf\udce9", "dog")


def test_formats_by_other_extensions_are_read_and_the_rest_is_counted(tmp_path):
    class_folders(tmp_path / "pets", parts=("",), n=36)
    for i, file in enumerate(sorted((tmp_path / "pets").rglob("*.png"))):
        image = Image.open(file)
        ending = (".jpg", ".JPG", ".jfif", ".jpe", "", ".heic")[i % 6]
        image.save(file.with_suffix(ending or ".x"), format="JPEG")
        if not ending:
            file.with_suffix(".x").rename(file.with_suffix(""))
        file.unlink()
    sets = [images.load(tmp_path / "pets", split) for split in ROW]
    assert sum(map(len, sets)) == 48
    text = "not read as images: 12 .heic, 12 without extension; pip install pillow-heif"
    assert all(text in image_set.notes[0] for image_set in sets)


FORMATS = {
    "APNG": "PNG", "dib": "DIB", "ico": "ICO", "jp2": "JPEG2000", "mpo": "MPO", "pbm": "PPM",
    "j2c": "JPEG2000", "j2k": "JPEG2000", "jpc": "JPEG2000", "jpf": "JPEG2000", "jpx": "JPEG2000",
    "pcx": "PCX", "PNM": "PPM", "qoi": "QOI", "sgi": "SGI", "tga": "TGA",
}  # fmt: skip


@pytest.mark.parametrize(("ending", "kind"), FORMATS.items())
def test_a_format_that_pillow_reads_is_read_by_its_first_picture(
    tmp_path, monkeypatch, ending, kind
):
    pixels = np.kron(noise(0, 4, 4), np.ones((8, 8, 1), np.uint8))
    if ending == "pbm":
        pixels = np.where(pixels[..., :1] < 128, 0, np.uint8(255)).repeat(3, 2)
    more = {"quality": 95, "subsampling": 0} if kind == "MPO" else {}
    if kind in ("PNG", "MPO"):
        more |= {"save_all": True, "append_images": [Image.new("RGB", (32, 32))]}
    for i in range(12):
        (tmp_path / f"train/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).convert("1" if ending == "pbm" else "RGB")
        image.save(tmp_path / f"train/{'ab'[i % 2]}/{i}.{ending}", format=kind, **more)
    part = images.load(tmp_path / "train", "train")
    assert part.classes == ("a", "b") and not part.notes
    difference = part.images[0].permute(1, 2, 0).numpy().astype(int) - pixels
    assert np.abs(difference).max() <= 8 * (kind == "MPO")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    monkeypatch.setenv("IDAA_DATA", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"cannot be read .*exceeds limit of 1000 pixels"):
        images.load(tmp_path / "train", "train")


def test_what_is_left_out_is_said_before_training_and_kept(tmp_path, outputs, capsys):
    class_folders(tmp_path / "pets", n=12)
    (tmp_path / "pets/train/dog/5.png").rename(tmp_path / "pets/train/dog/5.heic")
    (tmp_path / "pets/train/dog/4.png").write_bytes(b"<html>")
    knobs = {"epochs": 1, "width": 4, "batch_size": 8, "projection_dim": 4, "device": "cpu"}
    config = SSLConfig(dataset=str(tmp_path / "pets"), **knobs)
    with pytest.raises(ConfigError, match=r"dog/4\.png cannot .*on_error='skip'"):
        train_ssl(config)
    assert not outputs.exists()
    capsys.readouterr()
    run = train_ssl(config.replace(on_error="skip"))
    output, notes = capsys.readouterr().out, run.environment["dataset"]["notes"]
    assert len(notes) == 2 and "1 .heic" in notes[0] and "1 of 47 images" in notes[1]
    for note in notes:
        assert output.count(note) == 1
    evaluation = evaluate(EvalConfig(run=run.id, references=False, device="cpu"))
    assert evaluation.config.on_error == "skip"  # of its own images, as they were trained on
    assert evaluation.environment["dataset"]["notes"] == notes
    # A way of reading is known by what it gives, so the mended folder is the same run.
    (tmp_path / "pets/train/dog/4.png").unlink()
    assert locate(config) == run
    assert "on_error" not in config.replace(on_error="skip", gray_bits=12).identity()


def test_all_broken_images_are_named_at_once(damaged):
    with pytest.raises(ValueError, match=r"cat/0\.png cannot .*dog/1\.png cannot .*skip"):
        images.load(damaged, "train")


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_grey_of_few_bits_in_16_is_said_and_scaled_by_a_field(tmp_path, bits):
    top = 2**bits - 1
    values = np.random.default_rng(bits).integers(0, top + 1, (20, 32, 32), np.uint16)
    for i, image in enumerate(values):
        image[0, 0] = top
        (tmp_path / "cells").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"cells/{i:02}.{('png', 'tif')[i % 2]}")
    part = images.load(tmp_path / "cells", "train")
    assert f"gray_bits={bits} makes" in part.notes[0] and part.images.max() == round(top / 257)
    sets = [images.load(tmp_path / "cells", split, gray_bits=bits) for split in ROW]
    expected = {
        chw(np.repeat((d / top * 255).round()[..., None], 3, -1).astype("u1")) for d in values
    }
    assert set().union(*map(rows, sets)) == expected and not sets[0].notes
    with pytest.raises(
        ValueError, match=rf"go from \d+ to {top}, and those of 7 bits .* gray_bits"
    ):
        images.load(tmp_path / "cells", "train", gray_bits=7)


def test_one_class_is_said(tmp_path):
    class_folders(tmp_path / "pets", classes=("cat",))
    (note,) = images.load(tmp_path / "pets", "test").notes
    assert "one class alone, 'cat', so an accuracy is 100 %" in note


@pytest.mark.parametrize("colour", [(0, 1, 0), (0, 0, 0)])
def test_a_channel_without_spread_is_normalised_to_finite_numbers(tmp_path, colour):
    for i in range(20):
        save(tmp_path / f"cells/{i}.png", noise(i) * np.array(colour, np.uint8))
    part = images.load(tmp_path / "cells", "train")
    spread = noise(0).std() / 255 if any(colour) else 1 / 255
    assert part.std == pytest.approx([spread] * 3, rel=0.05)  # whatever a view makes of its hue
    assert all(
        mean > 0.4 if light else mean == 0 for mean, light in zip(part.mean, colour, strict=True)
    )


def write_members(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, content)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_zip_with_backslashes_has_the_folders_they_mean(tmp_path, mixed):
    files = class_folders(tmp_path / "pets")
    content = {name: (tmp_path / "pets" / name).read_bytes() for name in files}
    members = {name.replace("/", "\\"): body for name, body in content.items()}
    members |= {"train\\": b"", "train\\cat/": b"", "__MACOSX\\train\\cat\\._0.png": b"x"}
    if mixed:  # a file that another program added
        members["test/dog/5.png"] = members.pop("test\\dog\\5.png")
    write_members(tmp_path / "win.zip", members)
    for split in images.SPLITS:
        image_set, win_set = (images.load(tmp_path / name, split) for name in ("pets", "win.zip"))
        assert win_set.classes == ("cat", "dog") and win_set.fingerprint == image_set.fingerprint


@pytest.mark.parametrize("start", ["./", ".\\", "././"])
def test_a_zip_or_shard_of_the_folder_itself_has_its_images(tmp_path, start):
    """As `tar cf a.tar -C pets .` names its members, and as some zip programs do."""
    content = {
        name: (tmp_path / "pets" / name).read_bytes() for name in class_folders(tmp_path / "pets")
    }
    content |= {"train/.hidden/0.png": b"x"}
    names = {name: start + name.replace("/", start[-1]) for name in content}
    write_members(tmp_path / "a.zip", {start: b""} | {names[n]: content[n] for n in content})
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/a.tar", "w") as archive:
        archive.add(tmp_path / "pets", start.replace("\\", "/"))
    for split in images.SPLITS:
        image_set = images.load(tmp_path / "pets", split)
        for name in ("a.zip", "shards"):
            packed_set = images.load(tmp_path / name, split)
            assert packed_set.classes == ("cat", "dog")
            assert packed_set.fingerprint == image_set.fingerprint


def test_a_backslash_of_a_class_s_name_stays_in_a_zip(tmp_path):
    folders = {"back\\slash/": b"", "cat/": b""}
    png = io.BytesIO()
    Image.fromarray(noise(0)).save(png, "PNG")
    images_ = {f"{name}{i}.png": png.getvalue() for name in folders for i in range(20)}
    write_members(tmp_path / "odd.zip", folders | images_)
    assert images.load(tmp_path / "odd.zip", "train").classes == ("back\\slash", "cat")


@pytest.mark.parametrize(
    ("folders", "around"),
    [
        (["."], None),
        (["cat/"], "cat"),
        (["pets/cat/"], "cat"),
        (["images/train/"], "images"),
        (["images/train/", "images/val/", "images/test/"], "images"),
        (["train/", "test/"], None),
        (["train/cat/"], None),
        (["pets/train/cat/", "pets/test/cat/"], None),
        (["pets/cat/", "pets/dog/"], None),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_around_all_that_is_taken_for_no_class_is_said(tmp_path, folders, around, zipped):
    class_folders(tmp_path / "own", folders, ("",), n=30)  # cat//0.png is cat/0.png
    source = pack(tmp_path / "own", tmp_path / "own.zip") if zipped else tmp_path / "own"
    image_set = images.load(source, "train")
    notes = [note for note in image_set.notes if "no image has a class" in note]
    assert len(notes) == (around is not None)
    if around:
        assert not image_set.classes and f"{around}/ around all" in notes[0]
        class_folders(tmp_path / "mended", [f"train/{around}/"], ("",), n=30)  # as the note says
        assert images.load(tmp_path / "mended", "train").classes == (around,)


def test_a_class_called_train_is_a_class(tmp_path):
    class_folders(tmp_path / "vehicles", parts=("",), classes=("bus", "train"), n=30)
    assert images.load(tmp_path / "vehicles", "train").classes == ("bus", "train")
    class_folders(tmp_path / "both", classes=("train", "truck"))
    assert images.load(tmp_path / "both", "test").classes == ("train", "truck")


def test_folders_of_annotations_are_neither_classes_nor_in_the_way(tmp_path):
    class_folders(tmp_path / "pets/data", classes=("images",))
    for name in ("readme.md", "annotations/a.json", "data/train/labels/0.txt"):
        (tmp_path / "pets" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pets" / name).write_text("")
    image_set = images.load(tmp_path / "pets", "test")
    assert len(image_set) == 6 and image_set.classes == ("images",)
    assert "1 .json, 1 .md, 1 .txt" in image_set.notes[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("test/0.png", r"no class folders in test/, as 'test/0.png' shows.*: move test/ away"),
        ("test/test/0.png", r"class 'test' in test/ but not in train/.*all of test/, if.*unknown"),
        ("unlabeled/0.png", r"'unlabeled/0.png' beside train/, in no split: move unlabeled/ away"),
        ("train/0.png", r"'train/0.png'.*beside class folders: .* away if its class is unknown"),
        ("bus/0.png", r"'bus/0.png' beside train/.* rename train/, if it is a class"),
    ],
)
def test_a_part_without_labels_is_refused_with_what_to_do(tmp_path, extra, message):
    class_folders(tmp_path / "pets", parts=("train/",))
    save(tmp_path / "pets" / extra, noise(0))
    with pytest.raises(ValueError, match=message):
        images.load(tmp_path / "pets", "train")


@pytest.mark.parametrize("names", [("$5 note", "100%"), ("R&D <b>", "a_b^c"), ("猫", "tab\tname")])
def test_classes_keep_their_names(tmp_path, names):
    class_folders(tmp_path / "odd", classes=names)
    assert images.load(tmp_path / "odd", "test").classes == tuple(sorted(names))


@pytest.mark.parametrize(
    ("variable", "root", "default"),
    [("IDAA_DATA", images.data_root, "data"), ("IDAA_OUTPUTS", outputs_root, "outputs")],
)
def test_a_relative_folder_is_one_place_wherever_a_process_runs(
    tmp_path, monkeypatch, variable, root, default
):
    for value in ("own/place", default, ""):
        monkeypatch.setenv(variable, value)
        roots = set()
        for folder in (tmp_path, ROOT / "notebooks"):
            monkeypatch.chdir(folder)
            roots.add(root())
        assert roots == {ROOT / (value or default)}
    monkeypatch.setenv(variable, "~/own")
    assert root() == Path.home() / "own"
    for value in ("~nosuchuser/own", "~nosuchuser"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=f"{variable}='{value}' is of a user who is not there"):
            root()
        with pytest.raises(ConfigError, match=f"{variable}='{value}' .*: give a full path"):
            locate(SSLConfig(dataset="starter"))


def test_a_relative_data_folder_of_a_study_is_found_where_its_notebooks_run(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets")
    (tmp_path / "mine.toml").write_text('extends = "demo"\n')
    fields = {"all": {"dataset": "pets", "preset": "mine.toml"}, "ssl": {"adversary": "idaa"}}
    monkeypatch.chdir(tmp_path)
    tasks = plan(read({"fixed": fields}).points()).values()
    assert [task.config.stage for task in tasks] == ["vae", "ssl", "eval"]
    assert {task.config.dataset for task in tasks} == {str(tmp_path / "pets")}
    assert {task.config.preset for task in tasks} == {str(tmp_path / "mine.toml")}
    named = {"dataset": "pets", "adversary": "idaa", "vae": "vae/mine"}
    (task,) = plan(read({"fixed": {"ssl": named}, "stages": ["ssl"]}).points()).values()
    assert task.config.vae == str(tmp_path / "vae" / "mine")


def test_home_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    class_folders(tmp_path / "pets")
    assert images.load("~/pets", "train").fingerprint
    assert decoding.decode("~/pets/train/cat/0.png", 8).shape == (3, 8, 8)
    with pytest.raises(RunError, match=f"at {tmp_path}/mine/x"):
        get("ssl", "~/mine/x")


def test_another_locale_than_utf_8_trains_and_writes_utf_8(tmp_path, latin_locale):
    """As on many clusters; and what the console cannot show ends no training."""
    class_folders(tmp_path / "pets", n=8)
    variables = latin_locale | {"IDAA_OUTPUTS": str(tmp_path / "τ")}
    fields = [f"dataset={tmp_path / 'pets'}", "epochs=1", "batch_size=8", "width=4", "device=cpu"]
    command = [sys.executable, "-X", "warn_default_encoding", "-m", "idaa_lib.train", "ssl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment.pop("PYTHONIOENCODING", None)
    process = subprocess.run([*command, *fields], capture_output=True, env=environment)
    assert process.returncode == 0, process.stderr.decode("latin-1")
    assert b"\\u03c4=0.5" in process.stdout
    [summary] = (tmp_path / "τ").rglob("summary.json")
    assert "τ=0.5" in summary.read_text("utf-8")
    warnings = [line for line in process.stderr.splitlines() if b"EncodingWarning" in line]
    assert not [line for line in warnings if b"/idaa_lib/" in line]


def test_a_missing_source_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("IDAA_DATA", "~/own")
    with pytest.raises(
        FileNotFoundError, match=rf"{ROOT}/notebooks/absent nor {Path.home()}/own/ab"
    ):
        images.load("absent", "train")


# --- Units

CIFAR10 = re.findall(r"\S+", "airplane automobile bird cat deer dog frog horse ship truck")
CIFAR100 = re.findall(
    r"\S+",
    """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm""",
)


@pytest.mark.parametrize("classes", [CIFAR10, CIFAR100])
@pytest.mark.parametrize("zipped", [False, True])
def test_cifar_by_content_has_the_published_units(tmp_path, classes, zipped):
    root = tmp_path / "own"
    for n, name in enumerate(classes):
        for part in ("train", "test"):
            save(root / part / name.replace("_", " ") / "0.png", noise(n))
    source = pack(root, tmp_path / "own.zip") if zipped else root
    for split, size in (("trainval", 32), ("test", 40)):
        cifar = images.load(source, split, size)
        assert cifar.mean == (0.4914, 0.4822, 0.4465) and cifar.std == (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize(("classes", "side"), [(CIFAR10, 33), (CIFAR10[1:], 32), (["cat"], 32)])
def test_other_sets_have_their_own_units(tmp_path, classes, side):
    for n, name in enumerate(classes):
        for part, i in itertools.product(("train", "test"), range(4)):
            save(tmp_path / "own" / part / name / f"{i}.png", noise(10 * n + i, side, 32))
    image_set = images.load(tmp_path / "own", "trainval")
    pool = image_set.images.double() / 255
    np.testing.assert_allclose(image_set.mean, pool.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(image_set.std, pool.std((0, 2, 3), correction=0), rtol=1e-9)


# --- The index


def refuse_to_open(monkeypatch):
    """Whatever opens or lists anything but the index fails from now on."""
    original = open

    def only_index(file, *args, **kwargs):
        assert str(file).endswith(".json") and "/cache/" in str(file), file
        return original(file, *args, **kwargs)

    refuse = lambda *_, **__: pytest.fail("opened")  # noqa: E731
    for place in ("builtins.open", "io.open"):
        monkeypatch.setattr(place, only_index)
    for place in ("os.walk", "os.listdir", "os.scandir", "os.open", "zipfile.ZipFile",
                  "zipfile.is_zipfile", "PIL.Image.open", "numpy.memmap"):  # fmt: skip
        monkeypatch.setattr(place, refuse)


@pytest.mark.parametrize("kind", ["folder", "zip", "photos"])
def test_what_a_set_is_costs_no_opening(tmp_path, monkeypatch, kind):
    class_folders(tmp_path / "pets", n=20)
    source = {
        "folder": tmp_path / "pets", "photos": "photos",
        "zip": pack(tmp_path / "pets", tmp_path / "pets.zip"),
    }[kind]  # fmt: skip
    requests = [("train", 8, None), ("train", 8, 10), ("trainval", 8, 7), ("test", 8, None)]
    parts = [images.load(source, *request) for request in requests]
    assert all(len(part.images) == len(part.labels) == len(part) for part in parts)
    with monkeypatch.context() as patch:
        refuse_to_open(patch)
        twins = [images.load(source, *request) for request in requests]
        for twin, part in zip(twins, parts, strict=True):
            assert len(twin) == len(part) and twin.labelled
            for name in images.ImageSet.__dataclass_fields__.keys() - {"contents"}:
                assert getattr(twin, name) == getattr(part, name)
            assert twin.sizes.tolist() == [[8, 8]] * len(part)
            assert twin.subset([1, 0]).fingerprint == part.subset([1, 0]).fingerprint
    for twin, part in zip(twins, parts, strict=True):
        assert torch.equal(twin.images, part.images) and torch.equal(twin.labels, part.labels)


def test_the_id_of_a_run_costs_no_opening(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets", n=20)
    config = VAEConfig(preset="demo", epochs=1, dataset=str(tmp_path / "pets"))
    run = locate(config)
    monkeypatch.setattr(images.Pool, "open", lambda *_: pytest.fail("opened"))
    assert locate(config).id == run.id


@pytest.mark.parametrize("stage", ["vae", "ssl", "semi"])
def test_a_finished_training_needs_no_look_at_its_images(tmp_path, outputs, monkeypatch, stage):
    class_folders(tmp_path / "pets", n=20)
    values = dict(dataset=str(tmp_path / "pets"), size=32, width=4, epochs=1, batch_size=8)
    if stage == "semi":
        values |= dict(backbone="wrn10", labels_per_class=4, mu=1)
    config = CONFIGS[stage](**values)
    run = train(config)
    for place in ("os.walk", "idaa_lib.data.pool.Pool.open"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("looked"))
    assert train(config) == run


def test_images_other_than_described_are_refused(tmp_path):
    """Written anew between describing and use, or one of very many that are not watched."""
    class_folders(tmp_path / "pets")
    images.load(tmp_path / "pets", "train")
    about = images.load(tmp_path / "pets", "train")
    time.sleep(0.02)
    save(tmp_path / "pets/train/cat/0.png", noise(99))
    with pytest.raises(ValueError, match="pets changed since it was described"):
        about.images  # noqa: B018
    after = images.load(tmp_path / "pets", "trainval")
    assert chw(noise(99)) in rows(after) and after.fingerprint != about.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda root: save(root / "train/cat/new.png", noise(99)),
        lambda root: (root / "train/cat/0.png").unlink(),
        lambda root: (root / "train/cat/0.png").rename(root / "train/dog/00.png"),
        lambda root: save(root / "train/cat/0.png", noise(99)),
        lambda root: save(root / "train/emu/0.png", noise(99)),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_changed_set_is_described_anew(tmp_path, change, zipped):
    class_folders(tmp_path / "pets")
    source = tmp_path / ("pets.zip" if zipped else "pets")
    zipped and pack(tmp_path / "pets", source)
    before = images.load(source, "trainval")
    time.sleep(0.02)
    change(tmp_path / "pets")
    zipped and pack(tmp_path / "pets", source)
    after = images.load(source, "trainval")
    assert after.fingerprint != before.fingerprint
    assert after.fingerprint == images.load(source, "trainval").fingerprint


DAMAGE = [b"", b"{", b"{}", b'{"stamps": {}}', b"[1]", b'{"stamps": 3}', b"null", b"\xff\xfe"]
DAMAGE += [b"[" * 100_000, None]


@pytest.mark.parametrize("content", [*DAMAGE, *(name.encode() for name in ("about", "stamps"))])
def test_a_broken_index_is_written_anew(tmp_path, data, content):
    """None: a pipe. A name: that entry is of another type, and all else as it was."""
    class_folders(tmp_path / "pets")
    about = images.load(tmp_path / "pets", "train")
    [index] = (data / "cache").glob("*.json")
    text = index.read_text()
    index.unlink()
    if content in (b"about", b"stamps"):
        content = text.replace(
            f'"{content.decode()}": {{', f'"{content.decode()}": 3, "y": {{'
        ).encode()
    os.mkfifo(index) if content is None else index.write_bytes(content)
    assert data_commands.main(["clean"]) == 0
    assert images.load(tmp_path / "pets", "train").fingerprint == about.fingerprint
    assert index.read_text() == text


def test_clean_removes_what_is_a_pool_and_nothing_else(tmp_path, data):
    class_folders(tmp_path / "pets")
    images.load(tmp_path / "pets", "train")
    pool_ = entry(data)
    others = [data / "cache" / name for name in ("notes", "pets-32", f"{pool_.name[:-1]}", "0-1-2")]
    for other in others:
        (other / "inner").mkdir(parents=True)
        (other / "inner/x").touch()
        other.with_suffix(".json").write_text('{"stamps": {"/nowhere": [1, 2]}, "entry": "x"}')
    pool_.with_name(f"{pool_.name}.partial").mkdir()
    assert data_commands.main(["clean", "all"]) == 0
    left = {path for path in (data / "cache").iterdir() if path.is_dir()}
    assert left == set(others) and all((other / "inner/x").exists() for other in others)
    assert all(other.with_suffix(".json").exists() for other in others)


# --- A source's crops


@pytest.mark.parametrize("small", [2**28, 0])  # in memory; in its file
def test_gather_cuts_and_resizes_as_torchvision(small, monkeypatch):
    monkeypatch.setattr(images, "SMALL", small)
    image_set = images.load("photos", "test", 48, 12)
    assert image_set.sizes.tolist() == [[48, 48]] * 12
    index = torch.tensor([3, 0, 3, 11])
    boxes = torch.tensor([[0, 0, 48, 48], [4, 7, 20, 31], [47, 0, 1, 48], [10, 11, 36, 12]])
    crops = image_set.gather(index, boxes, 24)
    assert crops.dtype == torch.uint8 and crops.shape == (4, 3, 24, 24)
    for crop, i, box in zip(crops, index, boxes.tolist(), strict=True):
        oracle = F.resized_crop(image_set.images[i] / 255, *box, [24, 24], antialias=True)
        assert (crop / 255 - oracle).abs().max() < 1.1 / 255
