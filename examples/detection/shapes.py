"""A small synthetic set in COCO's format: it needs no network and no download.

It shows that the machinery works; an AP on it says nothing of an encoder.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from idaa_lib.data import photos

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
    """Paths of coloured rectangles and discs on cut-outs of the embedded photographs.

    Each image has one to four shapes that do not overlap, with polygons as masks. What is in
    `folder` already is used.

    Args:
        folder: is made where it is missing. counts: images of `train` and `val`.
        size: width, height in pixels.
    """
    paths = Paths(*(folder / part for split in COUNTS for part in (split, f"{split}.json")))
    if folder.exists():
        return paths
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    for stream, split in enumerate(COUNTS):
        rng = np.random.default_rng([seed, stream])
        (draft / split).mkdir(parents=True)
        listing = _draw_split(draft / split, split, counts[split], size, rng)
        (draft / f"{split}.json").write_text(json.dumps(listing), encoding="utf-8")
    try:
        os.replace(draft, folder)
    except OSError:  # another process was faster, with the same files
        shutil.rmtree(draft)
        if not folder.exists():
            raise
    return paths


def _draw_split(
    folder: Path, split: str, count: int, size: tuple[int, int], rng: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    """The annotations of `count` images, which are written to `folder`."""
    files = list(photos.paths().values())
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        picture = _background(files[i % len(files)], STRIPS[split], size, rng)
        for shape, (x1, y1, x2, y2), polygon in _scene(size, rng):
            ImageDraw.Draw(picture).polygon(polygon, fill=tuple(rng.integers(0, 256, 3)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 10 * (shape + 1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": [polygon],
                    "area": _area(polygon),
                    "iscrowd": 0,
                }
            )
        name = f"{i:04}.png"
        images.append({"id": i, "file_name": name, "width": size[0], "height": size[1]})
        picture.save(folder / name)
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(SHAPES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _background(
    photo: Path, strip: tuple[float, float], size: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """A random cut-out of the strip of a photograph, stretched to `size`."""
    with Image.open(photo) as whole:
        left, right = (round(edge * whole.width) for edge in strip)
        width, height = (int(rng.integers(n // 2, n)) for n in (right - left, whole.height))
        x, y = int(rng.integers(left, right - width)), int(rng.integers(0, whole.height - height))
        box = (x, y, x + width, y + height)
        return whole.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=box)


def _scene(
    size: tuple[int, int], rng: np.random.Generator
) -> list[tuple[int, tuple[int, int, int, int], list[float]]]:
    """Shapes of an image: which of SHAPES, its box x1, y1, x2, y2, its polygon x, y, x, y, …"""
    shapes: list[tuple[int, tuple[int, int, int, int], list[float]]] = []
    for _ in range(rng.integers(1, 5)):
        shape = int(rng.integers(len(SHAPES)))
        width, height = (int(n) for n in rng.integers(min(size) // 5, min(size) // 2, 2))
        height = width if SHAPES[shape] == "disc" else height
        x, y = int(rng.integers(0, size[0] - width)), int(rng.integers(0, size[1] - height))
        box = (x, y, x + width, y + height)
        if any(_overlap(box, other) for _, other, _ in shapes):
            continue  # it would hide a part of another one
        if SHAPES[shape] == "disc":
            turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
            edge = np.stack([np.cos(turn), np.sin(turn)], 1) * width / 2 + [x, y] + [width / 2] * 2
        else:
            edge = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
        shapes.append((shape, box, [float(v) for v in edge.ravel()]))
    return shapes


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _area(polygon: list[float]) -> float:
    """Shoelace formula."""
    x, y = np.reshape(polygon, (-1, 2)).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
