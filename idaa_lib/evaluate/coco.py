"""Images with boxes and masks in COCO's format, read lazily, and a small synthetic set of it.

COCO: Lin et al. 2014 (arXiv:1405.0312), https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor

from idaa_lib.configs import ConfigError
from idaa_lib.data import photos

Target = dict[str, Tensor]
"""What an image shows, a row per object: `boxes` (N, 4) x1, y1, x2, y2 in pixels; `labels` (N,),
1…classes; `masks` (N, H, W) uint8, where the set has them; `iscrowd` (N,); `area` (N,) pixels."""


class CocoSet(Dataset[tuple[Tensor, Target]]):
    """Item i: a uint8 image (3, H, W) and its `Target`, as annotated.

    Args:
        images: the folder that `file_name` is relative to. annotations: the JSON file.
        masks: give the objects' masks too.

    `classes` has the names, label 1 first, in the order of their ids; `unmasked` counts the
    objects without a segmentation; `useful` lists the images with an object to train on;
    `fingerprint` is of the annotations, and of the images' names and sizes in bytes.

    Raises:
        ConfigError: a file is missing, or is not in COCO's format.
    """

    def __init__(self, images: Path, annotations: Path, masks: bool = True) -> None:
        from pycocotools.coco import COCO

        self.images, self.annotations, self.masks = images, annotations, masks
        for path in (images, annotations):
            if not path.exists():
                raise ConfigError(f"There is no {path}, which should hold a COCO-format set.")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
                self.coco = COCO(str(annotations))
            self.ids = sorted(self.coco.imgs)
            files = [self.path(i) for i in range(len(self.ids))]
            ids = sorted(self.coco.cats)
            self.classes = tuple(self.coco.cats[i]["name"] for i in ids)
            self._labels = {category: label for label, category in enumerate(ids, 1)}
            objects = [o for i in range(len(self.ids)) for o in self._objects(i)]
            for found in objects:
                _ = self._labels[found["category_id"]], np.reshape(found["bbox"], 4)
        except (OSError, ValueError, AssertionError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{annotations} is not in COCO's format ({type(error).__name__}: {error})."
            ) from error
        if not objects:
            raise ConfigError(f"{annotations} has no annotated object.")
        self.objects = len(objects)
        self.unmasked = sum(not found.get("segmentation") for found in objects)
        self.useful = [i for i in range(len(self)) if any(map(_trains, self._objects(i)))]
        digest = hashlib.sha256(annotations.read_bytes())
        for path in files:
            try:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            except OSError as error:
                raise ConfigError(f"{annotations} names {path}, which is missing.") from error
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        return self.images / self.coco.imgs[self.ids[index]]["file_name"]

    def _objects(self, index: int) -> list[dict[str, Any]]:
        return self.coco.imgToAnns[self.ids[index]]

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        with Image.open(self.path(index)) as file:
            image = pil_to_tensor(file.convert("RGB"))
        found = self._objects(index)
        corners = torch.tensor([o["bbox"] for o in found], dtype=torch.float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]  # COCO has x, y, width, height
        area = [o.get("area", o["bbox"][2] * o["bbox"][3]) for o in found]
        target = {
            "boxes": corners,
            "labels": torch.tensor([self._labels[o["category_id"]] for o in found]).long(),
            "iscrowd": torch.tensor([o.get("iscrowd", 0) for o in found]).long(),
            "area": torch.tensor(area, dtype=torch.float),
        }
        if self.masks:
            size = tuple(image.shape[-2:])
            masks = [torch.from_numpy(self.coco.annToMask(o)) for o in found]
            target["masks"] = torch.stack(masks) if masks else torch.zeros((0, *size)).byte()
        return image, target


def _trains(annotation: dict[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) >= 1


def for_training(image: Tensor, target: Target, flip: bool) -> tuple[Tensor, Target]:
    """The image as float in [0, 1], mirrored where asked, with the objects that are trained on: no
    crowds, and boxes cut to the image that are at least a pixel wide and high."""
    boxes = clip_boxes_to_image(target["boxes"], tuple(image.shape[-2:]))
    kept = (target["iscrowd"] == 0) & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    chosen = {name: values[kept] for name, values in (target | {"boxes": boxes}).items()}
    if flip:
        image = image.flip(-1)
        x1, y1, x2, y2 = chosen["boxes"].unbind(1)
        width = image.shape[-1]
        chosen["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
        if "masks" in chosen:
            chosen["masks"] = chosen["masks"].flip(-1)
    return image.float() / 255, chosen


# --- a set that needs no network -----------------------------------------------------------------

SHAPES = ("rectangle", "disc")
COUNTS = {"train": 96, "val": 32}
# Parts of the photographs, as shares of their width, that no other split sees.
STRIPS = {"train": photos.STRIPS["train"], "val": photos.STRIPS["test"]}


class Paths(NamedTuple):
    """A set for training and one for evaluation: folder of images, annotation file, of each."""

    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path


def synthetic_shapes(
    folder: Path, counts: dict[str, int] = COUNTS, size: tuple[int, int] = (160, 128), seed: int = 0
) -> Paths:
    """Coloured rectangles and discs on cut-outs of the embedded photographs, as a COCO-format set.

    It shows that the machinery works; an AP on it says nothing of an encoder. Each image has one
    to four shapes that do not overlap, with polygons as masks. What is in `folder` already is used.

    Args:
        folder: is made. counts: images of `train` and `val`. size: width, height in pixels.
    """
    found = Paths(*(folder / part for s in COUNTS for part in (s, f"{s}.json")))
    if folder.exists():
        return found
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    files = list(photos.paths().values())
    for stream, split in enumerate(COUNTS):
        rng = np.random.default_rng([seed, stream])
        (draft / split).mkdir(parents=True)
        listed: dict[str, list[dict[str, Any]]] = {
            "images": [], "annotations": [],
            "categories": [{"id": 10 * i, "name": name} for i, name in enumerate(SHAPES, 1)],
        }  # fmt: skip
        for i in range(counts[split]):
            picture = _background(files[i % len(files)], STRIPS[split], size, rng)
            for shape, box, polygon in _scene(size, rng):
                ImageDraw.Draw(picture).polygon(polygon, fill=tuple(rng.integers(0, 256, 3)))
                x1, y1, x2, y2 = box
                listed["annotations"].append({
                    "id": len(listed["annotations"]) + 1, "image_id": i,
                    "category_id": 10 * (shape + 1), "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": [polygon], "area": _area(polygon), "iscrowd": 0,
                })  # fmt: skip
            listed["images"].append(
                {"id": i, "file_name": f"{i:04}.png", "width": size[0], "height": size[1]}
            )
            picture.save(draft / split / f"{i:04}.png")
        (draft / f"{split}.json").write_text(json.dumps(listed))
    try:
        os.replace(draft, folder)
    except OSError:  # another process was faster, with the same files
        shutil.rmtree(draft)
        if not folder.exists():
            raise
    return found


def _background(
    photo: Path, strip: tuple[float, float], size: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """A random cut-out of the strip of a photograph, stretched to `size`."""
    with Image.open(photo) as whole:
        left, right = (round(edge * whole.width) for edge in strip)
        width, height = (int(rng.integers(n // 2, n)) for n in (right - left, whole.height))
        x, y = int(rng.integers(left, right - width)), int(rng.integers(0, whole.height - height))
        return whole.convert("RGB").resize(size, Image.Resampling.BILINEAR,
                                           box=(x, y, x + width, y + height))  # fmt: skip


def _scene(
    size: tuple[int, int], rng: np.random.Generator
) -> list[tuple[int, tuple[int, ...], list[float]]]:
    """Shapes of an image: which of SHAPES, its box x1, y1, x2, y2, its polygon x, y, x, y, …"""
    drawn: list[tuple[int, tuple[int, ...], list[float]]] = []
    for _ in range(rng.integers(1, 5)):
        shape = int(rng.integers(len(SHAPES)))
        width, height = (int(n) for n in rng.integers(min(size) // 5, min(size) // 2, 2))
        height = width if SHAPES[shape] == "disc" else height
        x, y = int(rng.integers(0, size[0] - width)), int(rng.integers(0, size[1] - height))
        box = (x, y, x + width, y + height)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3]
               for _, b, _ in drawn):  # fmt: skip
            continue  # it would hide a part of another one
        if SHAPES[shape] == "disc":
            turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
            edge = np.stack([np.cos(turn), np.sin(turn)], 1) * width / 2 + [x, y] + [width / 2] * 2
        else:
            edge = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
        drawn.append((shape, box, [float(v) for v in edge.ravel()]))
    return drawn


def _area(polygon: list[float]) -> float:
    """Shoelace formula."""
    x, y = np.reshape(polygon, (-1, 2)).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
