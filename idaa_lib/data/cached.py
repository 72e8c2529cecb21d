"""Images of any source: decoded once, as one uint8 tensor, or streamed from where they lie.

A pool (`pool`) holds all images of a source. A split and a limit only select rows of it, and its
index says what it holds, so that describing a set opens nothing.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from idaa_lib.data.layout import list_some, printable, sha256
from idaa_lib.data.places import find_root
from idaa_lib.data.pool import PARTS, Pool
from idaa_lib.data.sources import find_source, read_classes
from idaa_lib.data.streamed import Images, Photographs

SPLITS = {"train": slice(0, 1), "val": slice(1, 2), "test": slice(2, 3), "trainval": slice(0, 2)}
# A selection of images of fewer bytes is loaded into memory; a larger one stays in its file.
SMALL = 2**28


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a source: what it is, and its images, which are read at their first use.

    Fields:
        n, size: so many images, of so many pixels a side.
        labelled: whether each image has a class.
        mean, std: per channel of pixels in [0, 1], the same for every split and limit. Of CIFAR-10
            and CIFAR-100 (by name, or by class names and 32 px) those that papers use; else those
            of train and val, and of streamed photographs those of 500 of them.
        fingerprint: other pixels, labels or selections have another one, on every machine.
        skipped: how many images of the source `on_error="skip"` left out.
        notes: sentences on what is left out, or read in another way than it seems.
        streamed: whether photographs are read from where they lie, each time.
    """

    name: str
    split: str
    n: int
    size: int
    classes: tuple[str, ...]
    labelled: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    skipped: int
    notes: tuple[str, ...]
    streamed: bool
    contents: Callable[[], tuple[Any, Tensor]] = field(repr=False)

    def __len__(self) -> int:
        return self.n

    @property
    def images(self) -> Any:
        """uint8 (N, 3, size, size). A tensor where they take less than 256 MiB: a private map of
        the cache (writing to it changes no file), or a copy where a limit picked rows. Else, and
        where they are streamed, `Images`: an index reads those that it names."""
        return self.contents()[0]

    @property
    def labels(self) -> Tensor:
        """int64 (N,), -1 where an image has no class."""
        return self.contents()[1]

    @property
    def sizes(self) -> Tensor:
        """Height and width of each image in pixels: int64 (N, 2)."""
        return self.images.sizes if self.streamed else torch.full((self.n, 2), self.size)

    def gather(self, index: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Crops of the images at `index` (B,), resized with antialiasing: uint8 (B, 3, size, size).
        Of streamed photographs they are of the originals.

        boxes: (B, 4) top, left, height, width, whole pixels of each image.
        """
        if self.streamed:
            return self.images.gather(index, boxes, size)
        crops = []
        for i, (top, left, height, width) in zip(index.tolist(), boxes.int().tolist(), strict=True):
            crop = self.images[i][None, :, top : top + height, left : left + width]
            crops.append(interpolate(crop, (size, size), mode="bilinear", antialias=True))
        return torch.cat(crops)

    def with_labels(self) -> "ImageSet":
        """The images that have a class: all of this set, or those."""
        if self.labelled:
            return self
        return replace(self.subset(self.labels >= 0), labelled=True)

    def subset(self, indices: Tensor | Sequence[int] | slice) -> "ImageSet":
        """The images at `indices` (or where a boolean mask holds), in that order."""
        index = torch.arange(self.n)[indices]

        @functools.cache
        def contents() -> tuple[Any, Tensor]:
            images, labels = self.contents()
            lazy = isinstance(images, Images)
            return images.pick(index.numpy()) if lazy else images[index], labels[index]

        fingerprint = _fingerprint(self.fingerprint, index.numpy())
        return replace(self, n=len(index), fingerprint=fingerprint, contents=contents)


def data_root() -> Path:
    """`IDAA_DATA`, taken from the project's folder where it is relative, else `data/` there."""
    return find_root("IDAA_DATA", "data")


def load(
    source: str | Path,
    split: str,
    size: int = 32,
    limit: int | None = None,
    *,
    classes: str | Path | None = None,
    on_error: str = "raise",
    gray_bits: int = 16,
    streamed: bool = False,
    download: bool = True,
    data_dir: str | Path | None = None,
) -> ImageSet:
    """One split ("train", "val", "test" or "trainval") of a source, `size` pixels a side.

    source: one of `NAMES`, or the path of a folder or zip (also relative to the data folder), laid
    out as `arrange` says. limit: a random subset of the split, the same on every call.
    classes: a text file of class folders, as `read_classes` reads it: these alone, in its order.
    on_error: "skip" leaves unreadable images out and counts them. gray_bits: that grey images in
    16-bit files use (12 of many microscopes). streamed: photographs in a folder or in tar shards
    are read from where they lie, each time; the first opening reads each of them once, to see that
    it can be decoded. data_dir: else `data_root()`. What is left out, cannot be read, or is read in
    another way than it seems is printed, once in a process.

    A source that was opened before is not opened until its images are used: an index says what it
    holds, as long as nothing that `Source.watch` names has another size or time of change. The
    first use looks at every file, and raises ValueError if they are others than described.

    Raises FileNotFoundError for a missing source, ValueError for an impossible argument or bad
    content, OSError where the cache cannot be written; no half-written cache stays behind.
    """
    rules = {
        "split": (split, split in SPLITS, f"one of {', '.join(SPLITS)}"),
        "on_error": (on_error, on_error in ("raise", "skip"), '"raise" or "skip"'),
        "size": (size, type(size) is int and size > 0, "a positive number of pixels"),
        "gray_bits": (gray_bits, gray_bits in range(1, 17), "1 to 16"),
        "limit": (limit, limit is None or (type(limit) is int and limit > 0), "None or n > 0"),
    }
    for name, (value, right, use) in rules.items():
        if not right:
            raise ValueError(f"{name}={value!r} is not allowed: use {use}")
    data = Path(os.path.expanduser(data_dir)) if data_dir else data_root()
    names = read_classes(classes, data) if classes else ()
    origin = find_source(source, data, download, names)
    pool = Pool(origin, data / "cache", 0 if streamed else size, gray_bits)
    name, about = pool.source.name, pool.read_index() or pool.open()[0]
    if about["errors"] and on_error == "raise":
        about = pool.open(again=True)[0]
        if errors := sorted(about["errors"].values()):
            _say(pool.source.path, f"{list_some(errors, 5000)}.")
            what = "replace what is broken, or leave it out by on_error='skip'"
            raise ValueError(f"{list_some(errors, 200)}: {what}")
    for note in about["notes"]:
        _say(pool.source.path, f"{name}: {note}.")
    counts, part = about["counts"], SPLITS[split]
    index = np.arange(sum(counts[: part.start]), sum(counts[: part.stop]))
    if not len(index):
        there = ", ".join(f"{part} {n}" for part, n in zip(PARTS, counts, strict=True))
        raise ValueError(f"{name} has no image in split={split!r} ({there}): add images to it")
    rows: Any = slice(index[0], index[-1] + 1)  # a view of the map: nothing is read yet
    if limit is not None and limit < len(index):
        rows = index = np.sort(np.random.default_rng(0).permutation(index)[:limit])

    @functools.cache
    def read() -> tuple[Any, Tensor]:
        now, labels, pool_ = pool.open()
        if now != about:
            raise ValueError(f"{name} changed since it was described: start again")
        images: Any = pool_.pick(index)
        if streamed:
            place = pool_.file, pool_.whole, index, origin.path
            images = Photographs(*place, size, gray_bits)
        elif 3 * size**2 * len(index) < SMALL:
            images = torch.from_numpy(pool_.map("c")[rows])
        return images, torch.from_numpy(labels[rows])

    return ImageSet(
        name=name,
        split=split,
        n=len(index),
        size=size,
        classes=tuple(map(printable, about["classes"])),
        labelled=all(about["labelled"][part]),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        fingerprint=_fingerprint(about["digest"], index),
        skipped=len(about["errors"]),
        notes=tuple(about["notes"]),
        streamed=streamed,
        contents=read,
    )


def _fingerprint(digest: str, index: np.ndarray) -> str:
    return sha256(digest, index.astype("<i8").tobytes())


@functools.cache
def _say(source: Path, note: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks
        print(note)
