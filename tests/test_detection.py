"""Detection: the COCO reader against drawn scenes, AP against pycocotools, the heads against
torchvision's, and a small training that resumes."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import coco
import detect as detection
import numpy as np
import pytest
import torch
from coco import CocoSet, average_precision, for_training
from detect import DetectionConfig, detect, load_detector, predict
from mask_rcnn import STRIDES, C4Heads, _layers, mask_rcnn
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shapes import synthetic_shapes
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from training import Training, batch_indices, rate

from idaa_lib import kernels, runs, sweeps
from idaa_lib.configs import ConfigError, SSLConfig
from idaa_lib.evaluate.encoders import load_encoder
from idaa_lib.lab.report import Report
from idaa_lib.nets import build_backbone, initial_weights
from idaa_lib.runs import Run, RunError, Stopped, checkpoints
from idaa_lib.train import train_ssl
from idaa_lib.views import keyed_generator

COUNTS, SIDES = {"train": 10, "val": 6}, (96, 80)
TINY = {"size": 64, "iterations": 24, "warmup": 2, "batch_size": 4, "rois": 16, "device": "cpu"}
TINY |= {"log_every": 4, "checkpoint_every": 8, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return synthetic_shapes(tmp_path_factory.mktemp("sets") / "shapes", COUNTS, SIDES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A finished run with an ImageNet stem, trained with adversarial norms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(tmp_path_factory.mktemp("encoder")))
        yield train_ssl(
            SSLConfig(stem="imagenet", size=32, width=4, limit=64, batch_size=32, epochs=1,
                      adversary="clae", device="cpu")
        )  # fmt: skip


@pytest.fixture
def config(encoder, shapes):
    paths = {name: str(path) for name, path in shapes._asdict().items()}
    return DetectionConfig(run=str(encoder.path), **paths, **TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder, shapes):
    paths = {name: str(path) for name, path in shapes._asdict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(tmp_path_factory.mktemp("finished")))
        yield detect(DetectionConfig(run=str(encoder.path), **paths, **TINY))


def network(task):
    return detection.build_detector(task.config, task.source, task.model)


def change(config, **values):
    return DetectionConfig(**{**config.model_dump(), **values})


# --- reading


def draw_set(folder, annotations, names=("a.png", "b.png")):
    folder.mkdir()
    for name in names:
        Image.new("RGB", (20, 10), "red").save(folder / name)
    content = {
        "images": [{"id": 7 * i, "file_name": name, "width": 20, "height": 10}
                   for i, name in enumerate(names, 1)],
        "annotations": [{"id": i, "image_id": 7, "iscrowd": 0, **a}
                        for i, a in enumerate(annotations, 1)],
        "categories": [{"id": 90, "name": "cup"}, {"id": 3, "name": "cat"}],
    }  # fmt: skip
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return folder, path


def rectangle(x1, y1, x2, y2):
    mask = np.zeros((10, 20), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    return mask


def test_boxes_labels_and_masks_of_all_three_encodings(tmp_path, monkeypatch):
    polygon = [[2, 1, 8, 1, 8, 5, 2, 5]]
    code = rle.encode(rectangle(10, 2, 15, 9))
    code["counts"] = code["counts"].decode()
    # Column by column from the top left: zeros first.
    counts = {"counts": [30, 5, 5, 5, 155], "size": [10, 20]}
    crowd = {"category_id": 3, "bbox": [3, 0, 2, 5], "segmentation": counts, "iscrowd": 1}
    data = CocoSet(*draw_set(tmp_path / "set", [
        {"category_id": 90, "bbox": [2, 1, 6, 4], "segmentation": polygon, "area": 23.5},
        {"category_id": 3, "bbox": [10, 2, 5, 7], "segmentation": code},
        crowd,
    ]))  # fmt: skip
    assert (data.classes, data.useful, data.objects, data.unmasked) == (("cat", "cup"), [0], 3, 0)
    image, target = data[0]
    assert image.shape == (3, 10, 20) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[2, 1, 8, 5], [10, 2, 15, 9], [3, 0, 5, 5]]
    assert target["labels"].tolist() == [2, 1, 1]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert target["area"].tolist() == [23.5, 35, 10]
    expected = [rectangle(2, 1, 8, 5), rectangle(10, 2, 15, 9), rectangle(3, 0, 5, 5)]
    assert np.array_equal(target["masks"], expected)
    _, blank = data[1]
    assert blank["boxes"].shape == (0, 4) and blank["masks"].shape == (0, 10, 20)

    flip = coco.AUGMENT.transforms[2]
    monkeypatch.setattr(flip, "p", 0.0)
    pixels, items = for_training(image, target)
    monkeypatch.setattr(flip, "p", 1.0)
    mirror, mirror_items = for_training(image, target)
    assert torch.equal(mirror.flip(-1), pixels) and pixels.max() == 1
    assert items["labels"].tolist() == mirror_items["labels"].tolist() == [2, 1]  # the crowd is out
    assert mirror_items["boxes"].tolist() == [[12, 1, 18, 5], [5, 2, 10, 9]]
    assert torch.equal(mirror_items["masks"], items["masks"].flip(-1))


def test_boxes_are_cut_to_the_image_and_slivers_left_out(tmp_path):
    boxes = [[15, 5, 50, 50], [2, 2, 0.5, 5], [19.5, 2, 5, 5]]
    data = CocoSet(*draw_set(
        tmp_path / "set", [{"category_id": 3, "bbox": box} for box in boxes]), masks=False
    )  # fmt: skip
    assert data.unmasked == 3
    _, target = for_training(*data[0])
    (box,) = target["boxes"].tolist()
    assert box in ([15, 5, 20, 10], [0, 5, 5, 10])  # as annotated, or mirrored
    assert len(target["labels"]) == len(target["area"]) == 1


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "annotations.json").unlink(), "There is no .*annotations.json"),
        (lambda f: (f / "annotations.json").write_text("[]"), "not in COCO's format"),
        *((lambda f, text=text: (f / "annotations.json").write_text(text), "not in COCO's format")
          for text in ("", "{", "5", "null", "[" * 100_000)),
        (lambda f: (f / "b.png").unlink(), r"b.png, which is missing \(image 14\)"),
        (lambda f: (f / "a.png").unlink(), "a.png, which is missing .image 7 of annotation 1"),
        (lambda f: (f / "a.png").write_text("<html>"), "a.png is no image that can be read"),
        (lambda f: (f / "annotations.json").write_text(
            (f / "annotations.json").read_text().replace("a.png", r"a\u0000.png")),
         "a\0.png is no image that can be read .image 7"),
    ],
)  # fmt: skip
def test_a_broken_set_is_one_sentence(tmp_path, spoil, sentence):
    folder, path = draw_set(tmp_path / "set", [{"category_id": 3, "bbox": [1, 1, 5, 5]}])
    CocoSet(folder, path)
    spoil(folder)
    with pytest.raises(ConfigError, match=sentence):
        CocoSet(folder, path)


def test_annotations_are_utf_8_whatever_the_locale(tmp_path, latin_locale):
    folder, path = draw_set(tmp_path / "set", [{"category_id": 3, "bbox": [2, 1, 6, 4]}])
    text = path.read_text("utf-8").replace("cup", "Käse 猫")
    path.write_text(json.dumps(json.loads(text), ensure_ascii=False), "utf-8")
    marked = folder / "marked.json"  # with a byte order mark, as editors of Windows write it
    marked.write_text(path.read_text("utf-8"), "utf-8-sig")
    code = "import sys, coco; folder, *paths = map(coco.Path, sys.argv[1:]);"
    code += "print(*(ascii(coco.CocoSet(folder, path).classes) for path in paths))"
    environment = os.environ | latin_locale | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-X", "utf8=0", "-c", code, folder, path, marked]
    process = subprocess.run(command, capture_output=True, env=environment, text=True)
    names = ascii(("cat", "Käse 猫"))
    assert process.stdout.strip() == f"{names} {names}", process.stderr


NAN, INF = float("nan"), float("inf")
SQUARE = [2, 1, 8, 1, 8, 5, 2, 5]
RUNS = {"counts": [30, 5, 5, 5, 155], "size": [10, 20]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"category_id": 4}, "has category_id 4, which is not listed"),
        ({"image_id": 99}, "is of image 99, which is not listed"),
        *(({"bbox": box}, "not x, y, width and height") for box in (
            [1, 1, NAN, 5], [1, INF, 5, 5], [1, 1, -5, 5], [1, 1, 5], [], None, "1 1 5 5",
            [1, 1, None, 5])),
        *(({"segmentation": [[*SQUARE[:-1], value]]}, "in finite numbers")
          for value in (NAN, INF, -INF, None, "5")),
        ({"segmentation": [SQUARE[:-1]]}, "in finite numbers"),
        ({"segmentation": [[2, 1, 8, 1e9, 8, 5]]}, "far outside of its image of 20 × 10"),
        *(({"segmentation": polygons}, "three points that are not in line") for polygons in (
            [[2, 1]], [[2, 1, 8, 5]], [[2, 1, 4, 2, 8, 4]], [[3, 3] * 5], [[], [2, 1, 8, 5]])),
        ({"segmentation": "RLE"}, "neither polygons nor runs"),
        ({"segmentation": RUNS | {"size": [20, 10]}}, r"mask of \[20, 10\] pixels, and its image"),
        ({"segmentation": RUNS | {"counts": [30, 5, 5, 5]}}, "runs do not fill its image"),
        ({"segmentation": RUNS | {"counts": [30, 5, NAN]}}, "runs do not fill its image"),
        ({"segmentation": RUNS | {"counts": [210, -10]}}, "runs do not fill its image"),
        ({"segmentation": RUNS | {"counts": [100.5, 49.5, 50]}}, "runs do not fill its image"),
        *(({"segmentation": RUNS | {"counts": runs}}, "has a mask of 0 pixels")
          for runs in ([200], [100, 0, 100], rle.encode(rectangle(0, 0, 0, 0))["counts"].decode())),
        *(({"iscrowd": value}, f"has iscrowd {re.escape(repr(value))}, which is 0 or 1")
          for value in (None, "0", 2, -1, 0.5, NAN, [], "")),
        *(({"segmentation": polygons}, "polygons of less than a pixel in its image of 20 × 10")
          for polygons in (
              [[x / (20, 10)[i % 2] for i, x in enumerate(SQUARE)]],  # in shares of the sides
              [[x + (20, 0)[i % 2] for i, x in enumerate(SQUARE)]],
              [[x - (20, 0)[i % 2] for i, x in enumerate(SQUARE)]],
              [[x + (0, 10)[i % 2] for i, x in enumerate(SQUARE)], [2, 11, 8, 11, 8, 15]])),
    ],
)  # fmt: skip
def test_an_annotation_that_would_train_something_wrong_is_named(tmp_path, changes, sentence):
    """As labelling tools and scripts leave them: NaN would take all memory at the first batch."""
    annotation = {"category_id": 3, "bbox": [2, 1, 6, 4], "segmentation": [SQUARE]}
    with pytest.raises(ConfigError, match=f"annotation 2 .*{sentence}") as error:
        CocoSet(*draw_set(tmp_path / "set", [annotation, annotation | changes]))
    assert re.fullmatch(r"[^\n]+\.", str(error.value))


@pytest.mark.parametrize(
    ("changes", "unmasked"),
    [
        ({"segmentation": [SQUARE, [2, 1], [3, 3, 4, 4], [], [2, 1, 4, 2, 8, 4]]}, 0),
        ({"segmentation": SQUARE}, 0),  # a polygon that is not in a list of polygons
        ({"segmentation": [SQUARE], "area": None, "iscrowd": 0}, 0),
        ({"segmentation": [SQUARE], "area": NAN}, 0),
        ({"segmentation": [SQUARE], "iscrowd": False}, 0),
        *(({"segmentation": blank}, 1) for blank in ([], [[]], None, {})),
    ],
)
def test_what_is_harmless_in_an_annotation_trains(tmp_path, changes, unmasked):
    annotation = {"category_id": 3, "bbox": [2, 1, 6, 4]}
    data = CocoSet(*draw_set(tmp_path / "set", [annotation | changes]), masks=not unmasked)
    assert (data.useful, data.unmasked) == ([0], unmasked)
    _, target = data[0]
    assert target["area"].tolist() == [24]
    assert unmasked or np.array_equal(target["masks"], [rectangle(2, 1, 8, 5)])


def test_compressed_runs_are_those_of_pycocotools(tmp_path):
    """A text that is damaged is refused: pycocotools reads other memory there, or crashes."""
    draw = np.random.default_rng(0)
    for density in (0, 0.02, 0.5, 1):
        pixels = (draw.random((60, 90)) < density).astype("u1")
        text = rle.encode(np.asfortranarray(pixels))["counts"].decode()
        runs = np.diff([0, *np.flatnonzero(np.diff(pixels.ravel("F"), prepend=0)), pixels.size])
        assert coco._read_runs(text) == [int(n) for n in runs]
    code = {"size": [60, 90], "counts": text}
    pixels = (draw.random((60, 90)) < 0.3).astype("u1")
    text = rle.encode(np.asfortranarray(pixels))["counts"].decode()
    assert not coco._fault_of_runs(code | {"counts": text}, 60, 90)
    for damage in ("", text[:-1], text[: len(text) // 2], text + "0P1", "é", "\0", text[3:]):
        assert coco._fault_of_runs(code | {"counts": damage}, 60, 90), damage


def test_a_flat_box_is_not_trained_on_whatever_its_polygon(tmp_path):
    line = {"category_id": 3, "bbox": [2, 1, 6, 0], "segmentation": [[2, 1, 8, 1]]}
    annotation = {"category_id": 3, "bbox": [2, 1, 6, 4], "segmentation": [SQUARE]}
    data = CocoSet(*draw_set(tmp_path / "set", [line, annotation]))
    _, target = for_training(*data[0])
    assert len(target["masks"]) == 1 and target["masks"].sum() == 24


def test_the_same_id_twice_is_refused(tmp_path):
    """As of two exports that were joined: pycocotools would show one of them twice."""
    annotation = {"category_id": 3, "bbox": [2, 1, 6, 4]}
    with pytest.raises(ConfigError, match="more than one of its annotations with id 1"):
        CocoSet(*draw_set(tmp_path / "set", [annotation, annotation | {"id": 1}]))


# How a viewer turns pixels that are stored with each note (EXIF 2.32, tag 274).
TURNS = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 3),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("note", TURNS)
def test_a_photograph_is_read_as_it_was_annotated(tmp_path, note):
    """Upright, as labelling tools show it, or as its pixels lie, where its sides say so."""
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:4, :6] = 255
    exif = Image.Exif()
    exif[274] = note
    corner = {"category_id": 3, "bbox": [0, 0, 2, 2], "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}
    folder, path = draw_set(tmp_path / "set", [corner], names=["a.jpg"])
    Image.fromarray(pixels).save(folder / "a.jpg", exif=exif, quality=95)
    oracle, content = TURNS[note](pixels), json.loads(path.read_text())
    for expected in (oracle, oracle if oracle.shape == pixels.shape else pixels):
        content["images"][0] |= {"height": expected.shape[0], "width": expected.shape[1]}
        path.write_text(json.dumps(content))
        image, target = CocoSet(folder, path)[0]
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() < 100
        assert target["masks"].shape[1:] == image.shape[1:]
    content["images"][0] |= {"height": 40, "width": 80}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"20 × 10 pixels, and .* says 80 × 40 .*annotation 1"):
        CocoSet(folder, path)


def test_synthetic_shapes_fill_their_boxes_and_are_drawn_once(shapes):
    data = CocoSet(shapes.val_images, shapes.val_annotations)
    assert len(data) == COUNTS["val"] and data.unmasked == 0
    for image, target in data:
        assert image.shape == (3, SIDES[1], SIDES[0])
        objects = zip(target["boxes"], target["labels"], target["masks"], strict=True)
        for box, label, mask in objects:
            sides = box[2:] - box[:2]
            share = math.pi / 4 if data.classes[label - 1] == "disc" else 1
            assert mask.sum().item() == pytest.approx(sides.prod().item() * share, rel=0.1)
            colours = image[:, mask.bool()].float()
            assert colours.std(1).max() < 30  # one colour, but for its edge
    before = shapes.val_annotations.stat().st_mtime_ns
    assert synthetic_shapes(shapes.val_images.parent, COUNTS, SIDES) == shapes
    assert shapes.val_annotations.stat().st_mtime_ns == before


# --- AP


def own_evaluation(path, predictions, kind, data):
    """pycocotools itself, from the file: AP, AP50, AP75 in percent."""
    ids = sorted(data.coco.cats)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        rows = [
            {"image_id": data.ids[i], "category_id": ids[label - 1], "score": score.item(),
             "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
             "segmentation": rle.encode(np.asfortranarray(mask.byte()))}
            for i, result in enumerate(predictions)
            for box, label, score, mask in zip(
                result["boxes"], result["labels"], result["scores"], result["masks"], strict=True)
        ]  # fmt: skip
        for row in rows if kind == "bbox" else ():
            del row["segmentation"]
        judge = COCOeval(truth, truth.loadRes(rows), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return (100 * judge.stats[:3]).tolist()


def with_crowd(path, folder):
    """The same annotations, the first object of every other image being a crowd."""
    content = json.loads(path.read_text())
    image_ids = set()
    for item in content["annotations"]:
        if item["image_id"] % 2 and item["image_id"] not in image_ids:
            polygons = rle.frPyObjects(item["segmentation"], SIDES[1], SIDES[0])
            union = rle.merge(polygons)
            item |= {"iscrowd": 1, "segmentation": union | {"counts": union["counts"].decode()}}
        image_ids.add(item["image_id"])
    crowd_path = folder / "crowded.json"
    crowd_path.write_text(json.dumps(content))
    return crowd_path


@pytest.fixture
def crowded(shapes, tmp_path):
    return CocoSet(shapes.train_images, with_crowd(shapes.train_annotations, tmp_path))


def test_the_truth_as_prediction_has_an_ap_of_100(crowded):
    pairs = []
    for _, target in crowded:
        prediction = {k: v[target["iscrowd"] == 0] for k, v in target.items()}
        pairs.append((prediction | {"scores": torch.ones(len(prediction["labels"]))}, target))
    assert sum(int(target["iscrowd"].sum()) for _, target in pairs) > 2
    scores = average_precision(pairs)
    assert set(scores) == {f"{kind}_ap{t}" for kind in ("box", "mask") for t in ("", "50", "75")}
    assert list(scores.values()) == [100.0] * 6


def test_ap_is_pycocotools_own(crowded):
    """Moved boxes, wrong labels, false alarms, misses, and hits inside crowds."""
    draw = keyed_generator(3)
    predictions, targets = [], []
    for _, target in crowded:
        boxes = target["boxes"].repeat(3, 1)
        boxes = boxes + 6 * torch.randn(boxes.shape, generator=draw)
        boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)], 1)
        mask = torch.rand(len(boxes), generator=draw) < 0.8
        labels = target["labels"].repeat(3)
        swaps = torch.rand(len(boxes), generator=draw) < 0.2
        masks = torch.stack([m.roll(int(s), -1) for m, s in zip(
            target["masks"].repeat(3, 1, 1), torch.randint(-9, 9, (len(boxes),), generator=draw),
            strict=True)])  # fmt: skip
        prediction = {"boxes": boxes, "labels": torch.where(swaps, 3 - labels, labels)}
        prediction |= {"scores": torch.rand(len(boxes), generator=draw), "masks": masks.bool()}
        predictions.append({k: v[mask] for k, v in prediction.items()})
        targets.append(target)
    scores = average_precision(zip(predictions, targets, strict=True))
    path = crowded.annotations
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = own_evaluation(path, predictions, kind, crowded)
        assert 1 < expected[0] < 90
        values = [scores[f"{name}_ap{t}"] for t in ("", "50", "75")]
        assert values == pytest.approx(expected, abs=1e-4)


# --- the network


def small_detector(width=4, classes=2, bottleneck=False, **values):
    with initial_weights(0):
        name = "resnet50" if bottleneck else "resnet18"
        backbone = build_backbone(name, width=width, stem="imagenet", adversarial_norms=False)
        units = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
        options = dict(architecture="c4", size=64, rois=16) | units | values
        return backbone, mask_rcnn(backbone, classes, **options)


def test_each_stem_s_stride_is_that_of_its_maps():
    for stem, stride in STRIDES.items():
        backbone = build_backbone("resnet18", width=4, stem=stem, adversarial_norms=False)
        assert _layers(backbone, 3)(torch.zeros(1, 3, 64, 64)).shape[2] == 64 / stride


@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_layers_are_the_backbone_s_and_the_map_has_stride_16(bottleneck):
    backbone, detector = small_detector(bottleneck=bottleneck)
    images = torch.randn(2, 3, 64, 96, generator=keyed_generator(0))
    backbone.eval()
    output = _layers(backbone, 4)(images).mean((2, 3))
    assert torch.allclose(output, backbone(images), atol=1e-6)
    features = detector.eval().backbone(images)
    assert features.shape == (2, backbone.feature_dim // 2, 4, 6)
    regions = detector.roi_heads.regions({"0": features}, [torch.tensor([[0.0, 0, 64, 64]])] * 2)
    assert regions.shape == (2, backbone.feature_dim, 7, 7)


class Pooled(nn.Module):
    """torchvision calls poolers with the images' sizes too."""

    def __init__(self, heads):
        super().__init__()
        self.pool = heads.box_roi_pool

    def forward(self, features, boxes, image_shapes):
        return self.pool(features["0"], boxes)


class Averaged(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.predictor = heads.box_predictor

    def forward(self, x):
        return self.predictor(x.mean((2, 3)))


def test_the_heads_agree_with_torchvision_s():
    """Where no BatchNorm learns from a batch, one pass through layer 4 or two is all the same."""
    backbone, _ = small_detector()
    ours = C4Heads(backbone, 2, 16, True).eval()
    theirs = RoIHeads(
        Pooled(ours), ours.box_head, Averaged(ours), 0.5, 0.5, 16, 0.25, None, 0.05, 0.5, 100,
        Pooled(ours), ours.box_head, ours.mask_predictor,
    ).eval()  # fmt: skip
    draw = keyed_generator(1)
    features = {"0": torch.randn(2, backbone.feature_dim // 2, 5, 5, generator=draw)}
    corners = 50 * torch.rand(2, 30, 2, generator=draw)
    proposals = [torch.cat([c, c + 8 + 20 * torch.rand(30, 2, generator=draw)], 1) for c in corners]
    masks = torch.ones(3, 80, 80, dtype=torch.uint8)
    targets = [
        {"boxes": boxes[:3], "labels": torch.tensor([1, 2, 1]), "masks": masks}
        for boxes in proposals
    ]
    inputs = (features, proposals, [(80, 80)] * 2)
    for output, oracle in zip(ours(*inputs)[0], theirs(*inputs)[0], strict=True):
        assert output.keys() == oracle.keys() and len(output["boxes"])
        assert all(torch.equal(output[name], oracle[name]) for name in output)
    ours.training = theirs.training = True  # the heads alone: their layers stay in eval mode
    losses = []
    for heads in (ours, theirs):
        torch.manual_seed(0)
        losses.append(heads(features, [*proposals], [(80, 80)] * 2, targets)[1])
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        assert losses[0][name].item() == pytest.approx(losses[1][name].item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["c4", "fpn"])
@pytest.mark.parametrize("masks", [True, False])
def test_an_image_without_objects_trains_and_every_weight_is_tuned(architecture, masks):
    _, detector = small_detector(architecture=architecture, masks=masks)
    images = [torch.rand(3, 60, 70, generator=keyed_generator(0)) for _ in range(2)]
    blank = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long),
             "masks": torch.zeros(0, 60, 70, dtype=torch.uint8)}  # fmt: skip
    target = {"boxes": torch.tensor([[10.0, 10, 40, 45]]), "labels": torch.tensor([1]),
           "masks": torch.ones(1, 60, 70, dtype=torch.uint8)}  # fmt: skip
    torch.manual_seed(0)
    losses = detector(images, [target, blank])
    assert ("loss_mask" in losses) == masks
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    blank_losses = detector(images, [blank, blank])
    assert all(loss.isfinite() for loss in blank_losses.values())
    assert blank_losses["loss_box_reg"] == blank_losses.get("loss_mask", 0) == 0


# --- the stage


def test_the_schedule_is_the_1x_one():
    config = DetectionConfig(preset="paper")
    assert config.learning_rate == 0.02
    assert DetectionConfig(preset="paper", batch_size=8).learning_rate == 0.01
    at = {0: 2e-5, 500: 0.02 * 0.5005, 1000: 0.02, 59_999: 0.02, 60_000: 0.002, 79_999: 0.002,
          80_000: 2e-4, 89_999: 2e-4}  # fmt: skip
    for step, expected in at.items():
        assert rate(config, step) == pytest.approx(expected)
    assert rate(change(config, warmup=0), 0) == 0.02


def test_batches_go_through_all_images_again_and_again(config):
    order = list(batch_indices([3, 5, 8, 9, 11], config, range(10)))
    visits = [*itertools.chain(*order)]
    for epoch in range(8):
        assert sorted(visits[5 * epoch : 5 * epoch + 5]) == [3, 5, 8, 9, 11]
    assert visits[:5] != visits[5:10] or visits[:5] != visits[10:15]
    assert list(batch_indices([3, 5, 8, 9, 11], config, range(4, 10))) == order[4:]


def test_a_step_s_batch_is_the_same_whoever_reads_it_and_wherever_it_begins(config, outputs):
    def batches(workers, first):
        task = detection.prepare(change(config, workers=workers))
        with task.run.writing(task.config, {}) as writer:
            return list(Training(network(task), task.train, task.config, writer).batches(first, 4))

    steps = batches(0, 0)
    for rest, first in ((batches(2, 0), 0), (batches(0, 2), 2)):
        for (images, targets), (theirs, expected) in zip(steps[first:], rest, strict=True):
            assert all(map(torch.equal, images, theirs))
            assert all(map(torch.equal, targets[0].values(), expected[0].values()))
    images = [image for images, _ in steps for image in images]
    mirrors = [image.flip(-1) for image in images]
    assert any(torch.equal(a, b) for a in images for b in mirrors)  # one image, both ways


def test_training_starts_from_the_run_s_weights(config, outputs, encoder):
    detector = network(detection.prepare(config))
    weights = detector.state_dict()
    source = load_encoder(encoder).module.state_dict()
    names = {"conv1": "backbone.stem.0", "bn1": "backbone.stem.1"}
    for name, value in source.items():
        part, _, rest = name.partition(".")
        key = names.get(part, f"backbone.{part}")
        key = f"roi_heads.box_head.{part}" if part == "layer4" else key
        assert torch.equal(weights[f"{key}.{rest}"], value), name
    data = encoder.environment["dataset"]
    transform = detector.transform
    assert list(transform.image_mean) == data["mean"] and list(transform.image_std) == data["std"]


def test_a_finished_run_says_what_it_reached(finished, config):
    summary, lines = finished.summary, finished.metrics()
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    losses = [line["loss_objectness"] + line["loss_rpn_box_reg"] + line["loss_classifier"]
              + line["loss_box_reg"] + line["loss_mask"] for line in lines]  # fmt: skip
    assert losses == pytest.approx([line["loss"] for line in lines])
    assert summary["masks"] == "present" and summary["n"] == COUNTS["val"]
    assert "resnet18-C4, width 4, 24 iterations of 4 images at 64 px" in summary["protocol"]
    assert finished.model["classes"] == ["rectangle", "disc"]

    detector = load_detector(finished)
    _, val = detection.sets(config)
    pairs = [(predict(detector, image), target) for image, target in val]
    repeat = average_precision(pairs)
    assert repeat == {name: summary[name] for name in repeat}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = own_evaluation(val.annotations, [p for p, _ in pairs], kind, val)
        assert [repeat[f"{name}_ap{t}"] for t in ("", "50", "75")] == pytest.approx(
            expected, abs=1e-4
        )


@pytest.mark.parametrize("way", ["request", "SIGINT", "SIGTERM"])
def test_resumed_is_uninterrupted(finished, config, outputs, monkeypatch, capsys, way):
    train_step, requests = Training.train_step, iter([None] * 9 + ["stop"])

    def interrupt(training, step, *batch):
        if step == 9:
            os.kill(os.getpid(), getattr(signal, way))
        return train_step(training, step, *batch)

    with monkeypatch.context() as patch:
        if way == "request":
            patch.setattr(runs.Run, "request", property(lambda self: next(requests)))
        else:
            patch.setattr(Training, "train_step", interrupt)
        with pytest.raises(Stopped, match="after step 10 of 24"):
            detect(config)
    run = detection.locate(config)
    assert run.state["state"] == "interrupted" and run.id == finished.id
    assert detect(config) == run
    assert "continues after step 10 of 24" in capsys.readouterr().out
    (ours, _), (theirs, _) = checkpoints.load(run), checkpoints.load(finished)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    times = {"time", "images_per_second", "seconds"}
    for line, oracle in zip(run.metrics(), finished.metrics(), strict=True):
        assert {k: v for k, v in line.items() if k not in times} == {
            k: v for k, v in oracle.items() if k not in times
        }
    keys = set(run.summary) - times
    assert {k: run.summary[k] for k in keys} == {k: finished.summary[k] for k in keys}
    detect(config)
    assert "is finished" in capsys.readouterr().out


def test_statistics_are_plain_averages_over_batches(config, outputs):
    task = detection.prepare(config)
    with task.run.writing(config, {}) as writer:
        training = Training(network(task), task.train, task.config, writer)
        training.detector.train()
        norm, means, variances = training.detector.backbone.stem[1], [], []

        def note(module, inputs):
            means.append(inputs[0].mean((0, 2, 3)))
            variances.append(inputs[0].transpose(0, 1).flatten(1).var(1))

        hook = norm.register_forward_pre_hook(note)
        training.average_statistics()
        hook.remove()
    assert len(means) == 3  # ten images, four at a time
    assert torch.allclose(norm.running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4)


def test_objects_without_segmentation_leave_boxes_alone(config, outputs, shapes, tmp_path):
    content = json.loads(shapes.val_annotations.read_text())
    del content["annotations"][1]["segmentation"]
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    config = change(config, val_annotations=str(path), iterations=1, architecture="fpn", rois=4)
    summary = detect(config).summary
    total = len(content["annotations"])
    assert summary["masks"] == f"absent: 1 of {total} objects of {path} have no segmentation"
    assert "box_ap" in summary and "mask_ap" not in summary
    assert "not comparable with the paper's C4" in summary["protocol"]


def test_what_cannot_be_is_refused_with_the_reason(config, outputs, shapes, tmp_path, encoder):
    with pytest.raises(RunError, match=r"no finished ssl run with stem=imagenet .*03_train_ssl"):
        detect(change(config, run=None))
    values = dict(size=16, width=4, limit=32, batch_size=32, epochs=1, device="cpu")
    for stem, stride in (("cifar", 4), ("mini", 8)):
        stem_run = train_ssl(SSLConfig(stem=stem, **values))
        reason = f"stem='{stem}': its layer 3 has stride {stride},.* one of 16 .*stem=\"imagenet"
        with pytest.raises(ConfigError, match=reason):
            detect(change(config, run=stem_run.id))
    wide_run = train_ssl(SSLConfig(backbone="wrn10", **values))
    with pytest.raises(ConfigError, match="no ResNet as its encoder"):
        detect(change(config, run=wide_run.id))
    with pytest.raises(ConfigError, match="val_images is missing: give"):
        change(config, val_images=None)
    with pytest.raises(ConfigError, match="preset must be one of demo, paper or"):
        DetectionConfig(preset="cifar10")
    with pytest.raises(ConfigError, match=r"There is no /no/such\.json"):
        detect(change(config, train_annotations="/no/such.json"))
    content = json.loads(shapes.val_annotations.read_text())
    content["categories"][0]["name"] = "oval"
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="differ in their categories"):
        detect(change(config, val_annotations=str(path)))
    assert not (outputs / "detection").exists()


def test_a_loss_that_is_not_finite_stops_the_run(config, outputs):
    with pytest.raises(RunError, match=r"loss is (nan|inf) at step \d+: lower learning_rate"):
        detect(change(config, learning_rate=1e12, warmup=0))


def write_run(source, ap, seed=0, n=160, classes=("rectangle", "disc"), masks=True, **values):
    """A finished detection run of an SSL run, written by hand."""
    keys = [f"{kind}_ap{t}" for kind in ("box", "mask")[: 1 + masks] for t in ("", "50", "75")]
    config = DetectionConfig(run=source.reference, seed=seed, **values)
    run = runs.run_for(config, "shapes", encoder=source.id)
    model = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "classes": list(classes)}
    about = {"n": n, "fingerprint": "shapes", "protocol": detection.protocol(config, source)}
    with run.writing(config, {}, model) as writer:
        writer.finish(dict.fromkeys(keys, ap) | about)
    return run


def test_the_table_has_trainings_with_their_seeds(outputs):
    ssl = {}
    for adversary, seed in itertools.product(("none", "clae"), (0, 1)):
        config = SSLConfig(stem="imagenet", adversary=adversary, seed=seed)
        ssl[adversary, seed] = run = runs.run_for(config, "photos")
        with run.writing(config, {}) as writer:
            writer.finish({})
    run = write_run(ssl["clae", 0], 30.0)
    write_run(ssl["clae", 1], 32.0)
    write_run(ssl["none", 0], 25.0, masks=False)
    write_run(ssl["none", 1], 99.0, iterations=7)  # another configuration
    orphan = write_run(ssl["none", 1], 20.0)
    (ssl["none", 1].path / "config.json").unlink()
    rows = {row.pop("training"): row for row in detection.compare(run)[0]}
    low, high = (31 + sign * 12.706 for sign in (-1, 1))  # t of one degree of freedom, s/√2 = 1
    assert rows.pop(orphan.config.run)["box_ap"] == "20.0"
    boxes, masks = ([f"{kind}_ap{t}" for t in ("", "50", "75")] for kind in ("box", "mask"))
    pair_row = dict.fromkeys([*boxes, *masks], f"31.0 [{low:.1f}, {high:.1f}]")
    single_row = dict.fromkeys(boxes, "25.0") | dict.fromkeys(masks, "–")
    assert rows == {"SimCLR": {"n": "1"} | single_row, "SimCLR + CLAE": {"n": "2"} | pair_row}


VAL2017 = dict(n=5000, classes=tuple(map(str, range(80))), size=800)
HERE = {  # what differs from the paper: fields of the training, of the detector, and the sentence
    "nothing": ({}, {}, ""),
    "size": ({}, {"size": 128}, "size is 800 there and 128 here"),
    "network": ({}, {"architecture": "fpn"},
        "the network is resnet50-C4, width 64 there and resnet50-FPN, width 64 here"),
    "backbone": ({"backbone": "resnet18"}, {}, "64 there and resnet18-C4, width 64 here"),
    "width": ({"width": 16}, {}, "64 there and resnet50-C4, width 16 here"),
    "both": ({"width": 16}, {"size": 128}, "size is 800 there and 128 here; the network is "),
    "classes": ({}, {"classes": tuple(map(str, range(79)))}, ""),
    "images": ({}, {"n": 4999}, ""),
}  # fmt: skip


@pytest.mark.parametrize("what", HERE)
def test_the_paper_stands_beside_its_own_images_size_and_network_alone(what, outputs):
    training, detector, sentence = HERE[what]
    config = SSLConfig(**{"stem": "imagenet", "backbone": "resnet50", "width": 64} | training)
    source = runs.run_for(config, "photos")
    with source.writing(config, {}) as writer:
        writer.finish({})
    run = write_run(source, 38.0, **VAL2017 | detector)
    rows, note = detection.compare(run)
    assert sentence in note and bool(note) == bool(sentence) and len(note) <= 400
    # The same once the training is gone.
    (source.path / "config.json").unlink()
    assert detection.compare(run)[1] == note
    assert len(rows) == (5 if what == "nothing" else 1)
    if what == "nothing":
        assert rows[-1] == {
            "training": "SimSiam + IDAA (paper)", "n": "not stated", "box_ap50": "58.2",
            "box_ap": "38.7", "box_ap75": "42.0", "mask_ap50": "55.1", "mask_ap": "33.9",
            "mask_ap75": "35.9",
        }  # fmt: skip


def test_the_report_has_each_table_once(outputs):
    assert "10_detection.ipynb" in Report().detection(detection.compare).data
    config = SSLConfig(stem="imagenet")
    source = runs.run_for(config, "photos")
    with source.writing(config, {}) as writer:
        writer.finish({})
    for seed, ap in enumerate((20.0, 22.0)):
        write_run(source, ap, seed)
    write_run(source, 33.0, iterations=7)
    report = Report()
    text = report.detection(detection.compare).data
    assert not report.damage
    assert text.count("<table") == 2 and "21.0 [8.3, 33.7]" in text and "33.0" in text
    assert "papermill notebooks/10_detection.ipynb" in text


@pytest.mark.xdist_group("photos")
def test_the_notebook_says_first_that_it_needs_a_run(outputs, tmp_path):
    with pytest.raises(
        RunError, match=r'no finished run with an ImageNet stem: run = "tiny" makes'
    ):
        sweeps.execute("10_detection", {"device": "cpu"}, tmp_path / "out.ipynb")


def test_the_notebook_makes_a_tiny_run_on_request(monkeypatch):
    """Its cell, with a training that only says what it is asked for."""
    cells = json.loads((kernels.FOLDER / "10_detection.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "train_ssl(" in "".join(c["source"])]
    calls = []
    monkeypatch.setattr("idaa_lib.train_ssl", lambda c: calls.append(c) or Run(Path("ssl/tiny-1")))
    names = {"run": "tiny", "device": "cpu"}
    exec(source, names)
    (config,) = calls
    assert (config.stem, config.preset, config.device) == ("imagenet", "demo", "cpu")
    assert names["run"] == Run(Path("ssl/tiny-1")).reference


@pytest.mark.xdist_group("photos")
def test_the_notebook_shows_detections_and_ap(encoder, outputs, tmp_path):
    values = {"run": str(encoder.path), "size": 32, "iterations": 2, "rois": 4, "device": "cpu"}
    sweeps.execute("10_detection", values, tmp_path / "out.ipynb")
    (run,) = runs.find("detection")
    assert run.environment["dataset"]["name"] == "synthetic shapes"
    assert {path.name for path in (run.path / "figures").iterdir()} == {
        "curves.png", "detections.png",
    }  # fmt: skip
