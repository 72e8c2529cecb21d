"""Photographs that stay in their files: crops of the originals, shards, and what a change does."""

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import outcome
from PIL import Image
from torchvision.transforms import functional as F

from idaa_lib.configs import (
    ConfigError,
    DecomposeConfig,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    VAEConfig,
)
from idaa_lib.data import __main__ as commands
from idaa_lib.data import cached, pool, sources, streamed
from idaa_lib.evaluate.crops import crop_probe, describe
from idaa_lib.evaluate.encoders import Encoder
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.identity.scene import open_scene
from idaa_lib.methods import About, Classifier, Moment, build_method
from idaa_lib.runs import RunError, Stopped, run_for
from idaa_lib.train import feed, locate, train_ssl, train_vae
from idaa_lib.train.loop import Fit
from idaa_lib.views import Recipe, keyed_generator, recipe

SIDES = (100, 75)  # width and height of ImageNet's photographs, mostly, divided by 5
TINY = {"size": 32, "width": 4, "batch_size": 8, "epochs": 2, "streamed": True, "device": "cpu"}
TINY |= {"precision": "fp32"}


def photograph(seed, sides=SIDES):
    """Coloured noise with broad and fine structure, as a photograph has."""
    rng = np.random.default_rng(seed)
    base = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(sides)
    noise = rng.normal(0, 8, (sides[1], sides[0], 3))
    return Image.fromarray((np.asarray(base) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def photos(tmp_path, data):
    """ImageNet's layout: 40 in train/, 10 in val/, of two classes, some upright; no test/."""
    for i in range(50):
        path = tmp_path / f"net/{'train' if i < 40 else 'val'}/n{i % 2}/{i:03}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(i, SIDES if i % 3 else SIDES[::-1]).save(path, quality=90)
    return tmp_path / "net"


@pytest.fixture
def one_process(monkeypatch):
    """Photographs are read in the training's own process: what workers do, sooner."""
    monkeypatch.setattr(feed, "count_cores", lambda: 0)


def decoders():
    return ["Pillow", *["torchcodec"] * (streamed.jpeg_decoder() is not None)]


# --- Crops of originals


@pytest.mark.parametrize("decoder", decoders())
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "turned"])
def test_crops_are_those_of_the_upright_original(tmp_path, data, monkeypatch, mode, decoder):
    if decoder == "Pillow":
        monkeypatch.setattr(streamed, "jpeg_decoder", lambda: None)
    (tmp_path / "one").mkdir()
    image, options = photograph(1), {}
    if mode == "turned":  # a camera held upright
        options = {"exif": image.getexif()}
        options["exif"][0x0112] = 6
    else:
        image = image.convert(mode)
    image.save(tmp_path / "one/0.jpg", quality=90, **options)
    original = Image.open(tmp_path / "one/0.jpg").convert("RGB")
    original = F.pil_to_tensor(original.rotate(-90, expand=True) if options else original)
    dataset = cached.load(tmp_path / "one", "train", 32, streamed=True)
    height, width = original.shape[1:]
    assert dataset.sizes.tolist() == [[height, width]]
    boxes = torch.tensor([[0, 0, height, width], [3, 9, 40, 31], [height - 1, 0, 1, width]])
    crops = dataset.gather(torch.tensor([0]), boxes[:, None], 24)  # three crops of one image
    assert crops.dtype == torch.uint8 and crops.shape == (3, 1, 3, 24, 24)
    for crop, box in zip(crops[:, 0], boxes.tolist(), strict=True):
        oracle = F.resized_crop(original / 255, *box, [24, 24], antialias=True)
        assert (crop / 255 - oracle).abs().max() < 1.6 / 255
    side, top, left = min(height, width), max(0, height - width) // 2, max(0, width - height) // 2
    middle = F.resized_crop(original / 255, top, left, side, side, [32, 32], antialias=True)
    assert (dataset.images[0] / 255 - middle).abs().max() < 1.6 / 255


class Recorder(torch.nn.Module):
    """Keeps what it is given, normalised images (B, 3, H, W), and gives their mean colours."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(x.clone())
        return x.mean((2, 3))


def test_a_classifier_on_fresh_crops_cuts_the_originals(photos, outputs):
    train, test = (cached.load(photos, s, 18, streamed=True) for s in ("trainval", "test"))
    module, n, size = Recorder(), len(train), 16
    config = EvalConfig(run="crops")
    run = run_for(config, "crops")
    classifier = Classifier("sgd", 0.1, "cosine", epochs=1)
    with run.writing(config, {}) as writer:
        crop_probe(
            Encoder(module, size, train.mean, train.std), train, test, run, writer, seed=3,
            classifier=classifier, batch_size=n, device=torch.device("cpu"),
        )  # fmt: skip
    views = Recipe(size, train.mean, train.std, crop_scale=(0.08, 1.0), flip=0.5)
    order = torch.randperm(n, generator=keyed_generator(3, 0)).tolist()
    numbers = views.numbers(n, keyed_generator(3, 0, 0))
    params = views.parameters(numbers, train.sizes[order])
    flips, boxes = params["flip"].flatten().tolist(), params["crop"].int().tolist()
    paths = sorted((photos / "train").rglob("*.JPEG"))
    by_name = {path.stem: F.pil_to_tensor(Image.open(path)) / 255 for path in paths}
    rows = train.images.rows[order]
    table = train.images._table(rows)
    crops = torch.cat(module.batches)[len(test) :][:n]
    for crop, row, box, flip in zip(crops, table, boxes, flips, strict=True):
        original = by_name[row["file"].item().decode()[-8:-5]]
        oracle = F.resized_crop(original, *box, [size, size], antialias=True)
        oracle = oracle.flip(2) if flip else oracle
        oracle = F.normalize(oracle, train.mean, train.std)
        assert (crop - oracle).abs().max() < 1.6 / 255 / min(train.std)
    words = describe(classifier, 224, 224, whole=False, streamed=True)
    assert words.startswith("SGD on random crops, 1 epochs")


def fit_on(data, config, rank=0, processes=1):
    """A training's loop on the CPU, as this rank of so many processes has it."""
    place = dict(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    views = recipe("simsiam", config.size, data.mean, data.std)
    about = About(views, data.labels, 2, config.epochs, config.batch_size)
    method = build_method(config, about)
    return Fit(SimpleNamespace(**place), method, data.images, config)


def draw_views(fit, first, last):
    """Views of the steps from `first` to `last` of a training."""
    batches = fit.feed(fit._batches(first))
    for step in range(first, last):
        batch, images = next(batches)
        numbers = fit._numbers(step, {"images": len(batch["images"])})
        yield fit.method.draw(images, batch, Moment(numbers=numbers))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_n_processes_and_a_resume_see_what_one_process_sees(photos, one_process, processes):
    config = SSLConfig(**TINY, dataset=str(photos), method="simsiam")
    dataset = cached.load(photos, "train", 32, streamed=True)
    expected = list(draw_views(fit_on(dataset, config), 0, 6))  # into the second epoch
    ranks = [fit_on(dataset, config, rank, processes) for rank in range(processes)]
    for step, views in enumerate(zip(*(draw_views(fit, 2, 6) for fit in ranks), strict=True), 2):
        for view, parts in zip(expected[step], zip(*views, strict=True), strict=True):
            assert torch.equal(view.images, torch.cat([part.images for part in parts]))
            for name, values in view.params.items():
                assert torch.equal(values, torch.cat([part.params[name] for part in parts]))


def crop_of_original(images, i, box, flip):
    """What torchvision cuts of photograph i, in [0, 1]."""
    picture = images._decode(images._table(images.rows[[i]])[0]).contiguous() / 255
    oracle = F.resized_crop(picture, *map(int, box), [32, 32], antialias=True)
    return oracle.flip(2) if flip else oracle


def test_a_view_is_what_its_parameters_say_of_the_original(photos, one_process, monkeypatch):
    config = SSLConfig(**TINY, dataset=str(photos), method="simsiam")
    dataset, calls = cached.load(photos, "train", 32, streamed=True), []
    decode = streamed.Photographs._decode
    monkeypatch.setattr(
        streamed.Photographs, "_decode", lambda self, row: calls.append(1) or decode(self, row)
    )
    fit = fit_on(dataset, config)
    fields = {"jitter_probability": 0.0, "gray": 0.0, "blur": 0.0}
    fit.method.recipe = type(fit.method.recipe)(**vars(fit.method.recipe) | fields)
    [views] = draw_views(fit, 0, 1)
    assert len(calls) == 8  # each once, for both views
    index = next(fit.method.batches(0))["images"]
    mean, std = (torch.tensor(unit)[:, None, None] for unit in (dataset.mean, dataset.std))
    for view in views:
        assert torch.equal(view.params["source"], dataset.sizes[index].float())
        assert 0 < view.params["flip"].mean() < 1
        of_view = view.images, view.params["crop"], view.params["flip"]
        for i, pixels, box, flip in zip(index, *of_view, strict=True):
            oracle = crop_of_original(dataset.images, i, box, flip)
            assert (pixels * std + mean - oracle).abs().max() < 1.6 / 255


@pytest.mark.parametrize("mixes", [False, True])
def test_a_pass_over_all_images_before_an_epoch_cuts_the_originals(photos, mixes, monkeypatch):
    """IP-IRM's, from which a partition is fitted."""
    config = SSLConfig(**TINY, dataset=str(photos), method="ipirm", augmentation="ipirm")
    dataset, works = cached.load(photos, "train", 32, streamed=True), []
    fit = fit_on(dataset, config)
    fit.accelerator.mixed_precision = "no"
    fit.accelerator.unwrap_model, fit.accelerator.print = lambda network, **how: network, print
    monkeypatch.setattr(fit.method, "before_epoch", lambda epoch, work: works.append(work))
    monkeypatch.setattr(fit.method, "encoder", lambda layer: torch.nn.Flatten())
    fit._before_epoch(SimpleNamespace(step=0))
    views, n = replace(fit.method.recipe, jitter_probability=0, gray=0, blur=0), len(dataset)
    share, partner = torch.linspace(0.5, 1, n), torch.arange(n).roll(1)
    mixing = (share, partner) if mixes else None
    rows = works[0].embed(transform=views, generator=keyed_generator(5), mixing=mixing)
    numbers = views.numbers(n, keyed_generator(5))
    params = views.parameters(numbers, dataset.sizes)
    drawn = enumerate(zip(params["crop"], params["flip"], strict=True))
    expected = torch.stack([crop_of_original(dataset.images, i, *values) for i, values in drawn])
    if mixes:
        expected = torch.lerp(expected[partner], expected, share[:, None, None, None])
    mean, std = (torch.tensor(unit)[:, None, None] for unit in (dataset.mean, dataset.std))
    assert (rows.view(n, 3, 32, 32) * std + mean - expected).abs().max() < 1.6 / 255


# --- Trainings and what follows


def interrupt_after(monkeypatch, steps):
    train_step, calls = Fit.train_step, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == steps:
            signal.raise_signal(signal.SIGINT)
        return train_step(self, *args)

    monkeypatch.setattr(Fit, "train_step", step)


def test_from_photographs_to_results_with_a_stop_on_the_way(photos, outputs, monkeypatch, capsys):
    images = {"dataset": str(photos), "split": "trainval"}
    vae = train_vae(VAEConfig(**TINY | {"epochs": 1}, **images, dim=8))
    config = SSLConfig(**TINY, **images, method="simsiam", adversary="idaa", projection_dim=8)
    expected = outcome(train_ssl(config))
    before, _, _ = capsys.readouterr().out.partition("ssl ·")
    assert "val/ is the test split, and a tenth of train/ is held out" in before
    shutil.rmtree(locate(config).path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Stopped, match="after step 7 of 10 and saved"):
            train_ssl(config)
    run = train_ssl(config)
    again = outcome(run)
    assert (
        all(torch.equal(expected[0][k], again[0][k]) for k in expected[0])
        and expected[1:] == again[1:]
    )

    evaluation = evaluate(EvalConfig(run=run.id))  # reads images as the training did
    assert evaluation.config.streamed and evaluation.summary["knn_n"] == 10
    assert "pixels_knn_top1" not in evaluation.summary
    scene = open_scene(DecomposeConfig(vae=vae.id, run=run.id, images=2))
    assert scene.data.streamed and scene.x.shape == (2, 3, 32, 32)
    assert not [*(photos.parent / "data/cache").glob("*-32-*")]  # nothing was decoded ahead

    # Shown again, nobody looks at the photographs; and one that is new makes another run.
    with monkeypatch.context() as patch:
        patch.setattr("os.walk", lambda *_, **__: pytest.fail("walked"))
        patch.setattr(streamed.Photographs, "_table", lambda *_: pytest.fail("read"))
        assert train_ssl(config).id == locate(config.replace(vae=vae.id)).id == run.id
        assert evaluate(EvalConfig(run=run.id)).id == evaluation.id
    photograph(99).save(photos / "train/n0/new.JPEG")
    assert locate(config.replace(vae=vae.id)).id != run.id


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"source_size": 48}, "source_size=48 is of images that are kept decoded"),
        ({"augmentation": "none"}, "augmentation='none' crops nothing"),
    ],
)
def test_what_streaming_cannot_be_with_is_refused(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        SSLConfig(**TINY, **values)
    with pytest.raises(ConfigError, match="streamed=True is of trainings without labels"):
        SemiConfig(streamed=True)


def test_what_lies_in_no_files_is_not_streamed(data):
    with pytest.raises(ValueError, match="photos is neither: leave streamed out"):
        cached.load("photos", "train", 32, streamed=True)


def test_the_recipe_of_imagenet():
    config = SSLConfig(preset="simsiam-imagenet", dataset="imagenet", adversary="idaa")
    assert (config.streamed, config.source_size, config.size) == (True, None, 224)
    assert (config.batch_size, config.learning_rate, config.epochs) == (512, 0.1, 100)
    vae = VAEConfig(preset="simsiam-imagenet", dataset="imagenet")
    assert (vae.size, vae.streamed, vae.dim) == (224, True, 3072)
    assert abs(vae.epochs * 1_281_167 / (300 * 50_000) - 1) < 0.05


# --- What changes


def test_a_photograph_that_changed_is_noticed_when_it_is_read(photos, monkeypatch):
    """One of a million that nobody watches, of the same size."""
    monkeypatch.setattr(sources.Source, "watch", lambda self, members: [str(self.path)])
    cached.load(photos, "train", 32, streamed=True)
    dataset = cached.load(photos, "train", 32, streamed=True)
    path = photos / "train/n0/000.JPEG"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    config = SSLConfig(**TINY, dataset=str(photos))
    with pytest.raises(
        RunError, match=r"000\.JPEG changed since it was described: start again\. What was saved"
    ):
        list(draw_views(fit_on(dataset, config), 0, 4))  # from a worker, without its trace
    with pytest.raises(ValueError, match="net changed since it was described: start again"):
        cached.load(photos, "train", 32, streamed=True).labels  # noqa: B018
    after = cached.load(photos, "train", 32, streamed=True)
    assert after.fingerprint != dataset.fingerprint and len(after.images[:]) == len(dataset)


@pytest.mark.parametrize("way", ["replaced", "rewritten"])
@pytest.mark.parametrize("kind", ["files", "shards"])
def test_a_set_that_changed_loads_again_in_the_same_process(photos, tmp_path, kind, way):
    """Read first, so that files are open; oracle: a copy, of which none is."""
    source = commands.shard(str(photos), tmp_path / "tar") if kind == "shards" else photos
    before = cached.load(source, "train", 32, streamed=True)
    before.images[:]
    old = (photos / "train/n0/000.JPEG").read_bytes()
    new = bytearray(old)
    new[-20] ^= 1
    [path] = [path for path in source.rglob("*.*") if path.is_file() and old in path.read_bytes()]
    draft, stamp = path.with_name(".draft") if way == "replaced" else path, path.stat().st_mtime
    draft.write_bytes(path.read_bytes().replace(old, new))
    os.utime(draft, (stamp + 1, stamp + 1))
    draft.replace(path)
    after = cached.load(source, "train", 32, streamed=True)
    copy = cached.load(shutil.copytree(source, tmp_path / "copy"), "train", 32, streamed=True)
    assert torch.equal(after.images[:], copy.images[:])
    assert after.fingerprint == copy.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "directory"),
        (lambda path: path.write_bytes(b"else"), "changed since it was described: start again"),
    ],
)
def test_errors_of_reading_are_not_the_disk_s(photos, monkeypatch, change, words):
    """A photograph goes, or is another, while the set is described."""
    decode_items = pool.decode_items

    def decode_and_change(*arguments):
        yield from decode_items(*arguments)
        change(photos / "train/n0/000.JPEG")

    monkeypatch.setattr(pool, "decode_items", decode_and_change)
    with pytest.raises(ValueError, match=words) as error:
        cached.load(photos, "train", 32, streamed=True)
    assert "000.JPEG" in str(error.value) and "written" not in str(error.value)


def test_photographs_that_cannot_be_read_are_named_before_anything_starts(photos):
    (photos / "train/n0/000.JPEG").write_bytes(b"no photograph")
    content = (photos / "train/n1/001.JPEG").read_bytes()
    (photos / "train/n1/001.JPEG").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"000\.JPEG cannot be read.*001\.JPEG cannot be"):
        cached.load(photos, "train", 32, streamed=True)
    dataset = cached.load(photos, "trainval", 32, streamed=True, on_error="skip")
    assert (len(dataset), dataset.skipped) == (38, 2) and len(dataset.images[:]) == 38


# --- Shards


def same_set(one, other, **how):
    for split in ("train", "val", "test"):
        a, b = (cached.load(source, split, 32, **how) for source in (one, other))
        assert a.fingerprint == b.fingerprint and a.classes == b.classes and a.mean == b.mean
        assert torch.equal(a.images[:], b.images[:]) and torch.equal(a.labels, b.labels)


def test_shards_are_the_folder(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "SHARD_BYTES", 20_000)
    out = tmp_path / "shards"
    assert commands.main(["shard", str(photos), str(out)]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names[0] == "train-000000.tar" and names[-1].startswith("val-") and len(names) > 4
    same_set(photos, out, streamed=True)
    same_set(photos, out)
    assert commands.main(["shard", str(photos), str(out)]) == 1
    assert "shards is there: give a new folder" in capsys.readouterr().err
    (out / names[0]).write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"train-000000\.tar is no readable tar"):
        cached.load(out, "train", 32, streamed=True)


def test_shards_of_images_without_classes_are_the_folder(photos, tmp_path, monkeypatch):
    """No shard is taken for a class; webdataset's without .cls are of the part that they name."""
    monkeypatch.setattr(commands, "SHARD_BYTES", 20_000)
    flat, web = tmp_path / "flat", tmp_path / "web"
    for folder in (flat, web):
        folder.mkdir()
    for n, path in enumerate(sorted(photos.rglob("*.JPEG"))):
        shutil.copy(path, flat / f"{n:03}.jpg")
        with tarfile.open(web / f"{'test' if n % 5 == 0 else 'train'}-{n // 20}.tar", "a") as tar:
            tar.add(path, f"{n % 20:03}.jpg")  # one name in several shards
    with tarfile.open(web / "train-0.tar", "a") as tar:  # once more: the last is the file
        tar.add(path, "001.jpg")
    commands.shard(str(flat), tmp_path / "shards")
    assert len([*(tmp_path / "shards").iterdir()]) > 2
    for streamed_too in (False, True):
        same_set(flat, tmp_path / "shards", streamed=streamed_too)
        sets = [cached.load(web, part, 32, streamed=streamed_too) for part in ("trainval", "test")]
        assert [(len(each), each.classes) for each in sets] == [(40, ()), (10, ())]


@pytest.mark.parametrize("stem", ["n0144/{n:03}", "{n:03}", "n0144_{n:03}"])
def test_of_a_tar_for_each_class_without_folders_a_note_says_that_there_is_none(
    photos, tmp_path, stem
):
    """ImageNet's own inner tars hold bare names: their images have no class."""
    web = tmp_path / "web"
    web.mkdir()
    for n, path in enumerate(sorted(photos.rglob("*.JPEG"))):
        with tarfile.open(web / f"n0144{n % 2}.tar", "a") as tar:
            tar.add(path, f"{stem.replace('n0144', f'n0144{n % 2}').format(n=n)}.jpg")
    notes = cached.load(web, "train", 32, streamed=True).notes
    assert any("each tar is a class, unpack it" in note for note in notes) == ("/" not in stem)


@pytest.mark.parametrize("damage", ["header", "cut in an image", "cut before an image", "no end"])
def test_a_damaged_shard_is_refused_wherever_the_damage_is(photos, tmp_path, damage):
    """To tarfile a header that is none, and a file that ends at one, are the end of the archive."""
    commands.shard(str(photos), tmp_path / "shards")
    path = tmp_path / "shards" / "train-000000.tar"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    content, member = bytearray(path.read_bytes()), members[len(members) // 2]
    if damage == "header":
        content[member.offset : member.offset + 4] = b"\0\1\2\3"
    end = {
        "cut in an image": member.offset_data + 10, "cut before an image": member.offset,
        "no end": members[-1].offset_data + -(-members[-1].size // 512) * 512,
    }  # fmt: skip
    path.write_bytes(content[: end.get(damage)])
    with pytest.raises(ValueError, match=r"train-000000\.tar is no readable tar .*: copy it again"):
        cached.load(tmp_path / "shards", "train", 32, streamed=True)


@pytest.mark.parametrize(
    ("shard", "key", "ending"),
    [
        ("imagenet-{part}-000", "{i:06}", "jpg"),
        ("imagenet-{part}-000", "data/{i:06}", "jpg"),
        ("imagenet-{part}-000", "a/b/{i:06}", "rgb.jpg"),
        ("imagenet-{part}-000", "{half}/{i:06}", "jpg"),
        ("imagenet-{part}-000", "v1.0/a.{i:06}.x", "jpg"),
        ("latest-{part}-000", "{i:06}", "jpg"),
        ("valley_{part}2012_0", "{i:06}", "jpg"),
        ("000-{n}", "{part}/{i:06}", "jpg"),
        ("000-{n}", "{part}/data/{i:06}", "jpg"),
        ("{part}/000", "{i:06}", "jpg"),
        ("web/Validation/{part}-000", "{i:06}", "jpg"),
        ("{part}-000", "{label}/{i:06}", "jpg"),
        ("{part}/000", "{label}/{i:06}", "jpg"),
        ("{part}/000", "{label}/more/{i:06}", "jpg"),
        ("test/000-{n}", "data/{part}/{label}/{i:06}", "jpg"),
    ],
)
def test_shards_as_webdataset_has_them(photos, tmp_path, shard, key, ending):
    """Class numbers in .cls or class folders; the part in the name of the shard, of a folder that
    it lies in, or of a folder in it."""
    paths = sorted(photos.rglob("*.JPEG"))
    out = tmp_path / "web"
    out.mkdir()
    for n, part in enumerate(("train", "val")):
        file = out / f"{shard.format(part=part, n=n)}.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w") as archive:
            for i, path in enumerate(path for path in paths if part in path.parts):
                number = path.parent.name[1:]
                name = key.format(part=part, i=i, half=i // 5, label=number)
                members = [(ending, path.read_bytes())]
                members += [("cls", number.encode())] * ("{label}" not in key)
                for end, content in members:
                    member = tarfile.TarInfo(f"{name}.{end}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    for split in ("trainval", "test"):
        ours, theirs = (cached.load(p, split, 32, streamed=True) for p in (photos, out))
        assert len(ours) == len(theirs) and len(theirs.classes) == 2
        rows = [
            sorted(
                zip(
                    dataset.images[:].flatten(1).sum(1).tolist(),
                    dataset.labels.tolist(),
                    strict=True,
                )
            )
            for dataset in (ours, theirs)
        ]
        assert rows[0] == rows[1]


def test_two_shards_may_have_images_of_one_name(tmp_path):
    """As where each is packed of a folder of its own: no image takes the place of another."""

    def add(shard, name, red):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (red, len(name), 7)).save(content, "png")
        member = tarfile.TarInfo(name)
        member.size = content.tell()
        content.seek(0)
        with tarfile.open(tmp_path / shard, "a") as archive:
            archive.addfile(member, content)

    for shard, red in (("0.tar", 0), ("1.tar", 100)):
        for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"):
            add(shard, name, red)
    add("1.tar", "test/dog/1.png", 200)  # of members of one shard the last is the file
    for split, reds in (("trainval", [0, 0, 100, 100]), ("test", [0, 0, 100, 200])):
        data = cached.load(tmp_path, split, 8)
        assert len(data) == 4 and data.labels.tolist() == [0, 0, 1, 1]
        assert sorted(data.images[:, 0, 0, 0].tolist()) == reds


def test_hard_links_in_a_shard_are_the_files_that_they_name(tmp_path, data):
    """tar packs so what has two names: images and .cls alike."""
    for i in range(4):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    for i in range(2):
        (tmp_path / f"{i}.cls").write_text(str(i))
    for name, other in (("2.cls", "0.cls"), ("3.cls", "1.cls"), ("4.cls", "0.cls")):
        (tmp_path / name).hardlink_to(tmp_path / other)
    (tmp_path / "4.png").hardlink_to(tmp_path / "3.png")
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web/train-000.tar", "w") as archive:
        for path in sorted(tmp_path.glob("*.*")):
            archive.add(path, f"./{path.name}")
    images = cached.load(tmp_path / "web", "train", 8)
    rows = zip(images.images[:, 0, 0, 0].tolist(), images.labels.tolist(), strict=True)
    assert sorted(rows) == [(0, 0), (50, 1), (100, 0), (150, 0), (150, 1)]


# --- What stays in its file, and what is left in the cache


def test_many_decoded_images_stay_in_their_file(outputs, monkeypatch):
    """A limit copies none of them, and a worker of any kind is sent their place alone."""
    config = SSLConfig(
        limit=40, batch_size=8, epochs=1, width=4, device="cpu", precision="fp32", size=32
    )
    small_outcome = outcome(train_ssl(config))
    shutil.rmtree(outputs)
    monkeypatch.setattr(cached, "SMALL", 0)
    dataset = cached.load("photos", "train", 32, 40)
    assert isinstance(dataset.images, streamed.Images) and len(pickle.dumps(dataset.images)) < 2000
    large_outcome = outcome(train_ssl(config))
    assert (
        all(torch.equal(small_outcome[0][k], large_outcome[0][k]) for k in small_outcome[0])
        and small_outcome[1:] == large_outcome[1:]
    )
    index = torch.tensor([3, 0, 3])
    parts = dataset.images.split(16)
    assert [len(part) for part in parts] == [16, 16, 8]
    assert torch.equal(torch.cat([part[:] for part in parts]), dataset.images.to("cpu"))
    assert torch.equal(dataset.subset(index).images[:], dataset.images[index])
    assert torch.equal(
        dataset.images[index], torch.stack([dataset.images[3], *dataset.images[0:4:3]])
    )


def test_a_renamed_folder_has_the_same_cache_and_clean_removes_what_nobody_has(
    photos, data, capsys, monkeypatch
):
    for how in ({}, {"streamed": True}):
        cached.load(photos, "train", 32, **how)
    pools = sorted(path.name for path in (data / "cache").iterdir() if path.is_dir())
    folder = photos.rename(photos.with_name("other"))
    with monkeypatch.context() as patch:
        patch.setattr(pool, "decode_items", lambda *_: pytest.fail("decoded again"))
        for how in ({}, {"streamed": True}):
            cached.load(folder, "train", 32, **how)
    assert sorted(path.name for path in (data / "cache").iterdir() if path.is_dir()) == pools
    assert commands.main(["clean"]) == 0
    assert capsys.readouterr().out.count("kept") == 2
    time.sleep(0.02)
    photograph(99).save(folder / "train/n0/new.JPEG")
    cached.load(folder, "train", 32)
    assert commands.main(["clean"]) == 0
    assert capsys.readouterr().out.count("removed  net-") == 2
    assert len([path for path in (data / "cache").iterdir() if path.is_dir()]) == 1
    monkeypatch.setattr(pool, "VERSION", pool.VERSION + 1)  # of a library that decodes otherwise
    cached.load(folder, "train", 32)
    assert commands.main(["clean"]) == 0
    text = capsys.readouterr().out
    assert text.count("  removed  ") == 1 and text.count("kept") == 1
    assert commands.main(["clean", "all"]) == 0
    assert not [path for path in (data / "cache").iterdir() if path.is_dir()]
    assert len(cached.load(folder, "train", 32).images) > 0


def test_a_copied_folder_takes_no_second_place_in_the_cache(photos, data, capsys):
    """Also where one of the two goes; a folder of other labels or pixels has its own file."""
    copies = [photos.with_name(name) for name in ("copy", "other")]
    for copy in copies:
        shutil.copytree(photos, copy, copy_function=shutil.copyfile)  # times of change are new
    photograph(99).save(copies[1] / "train/n0/new.JPEG")
    sets = [cached.load(folder, "train", 32) for folder in (photos, *copies)]
    images = [dataset.images.clone() for dataset in sets]
    files = sorted((data / "cache").glob("*/images.u8"), key=lambda file: file.stat().st_nlink)
    assert [file.stat().st_nlink for file in files] == [1, 2, 2]
    assert files[1].samefile(files[2])
    shutil.rmtree(photos)
    other, shared = (file.stat().st_size for file in files[:2])
    assert 0 < commands.clean() < shared  # what describes it alone
    again = [cached.load(folder, "train", 32) for folder in copies]
    assert all(torch.equal(a.images, b) for a, b in zip(again, images[1:], strict=True))
    assert commands.clean(everything=True) > shared + other


@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_being_written_is_not_cleaned(photos, data, monkeypatch, zipped):
    source = shutil.make_archive(str(photos), "zip", photos) if zipped else photos
    write, statuses = pool.Pool._decode, []

    def clean_meanwhile(*arguments):
        command = [sys.executable, "-m", "idaa_lib.data", "clean", "all"]
        process = subprocess.run(command, capture_output=True, text=True)
        statuses.append((process.returncode, "in use" in process.stdout))
        return write(*arguments)

    monkeypatch.setattr(pool.Pool, "_decode", clean_meanwhile)
    assert len(cached.load(source, "train", 32).images) > 0
    assert statuses == [(0, True)]
