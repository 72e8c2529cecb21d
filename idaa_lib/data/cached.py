"""Images in memory: any source, decoded once, as one uint8 tensor.

A *source* (the embedded photographs, a torchvision data set, a folder or a zip) is listed, every
image is decoded into one pool ordered train, val, test, and the pool is kept under `data/cache/`
as raw bytes that later calls map into memory. A split and a limit only select rows of the pool.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from idaa_lib.data.sources import Listing, Source, Torchvision, find_source, read_stamp, sha256

PARTS = ("train", "val", "test")
SPLITS = {"train": slice(0, 1), "val": slice(1, 2), "test": slice(2, 3), "trainval": slice(0, 2)}
VERSION = 2  # of the decoding below and of the files of the cache: another number, another entry

PUBLISHED = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # what papers normalise CIFAR with
CIFAR = (  # start of the sha256 of the class names of CIFAR-10 and of CIFAR-100, sorted, one a line
    "bb3914949cecedee",
    "fbe8ad23bbaf2496",
)


@dataclass(frozen=True)
class Description:
    """One split of a source without its images: what names, ids and configurations need.

    `n` images of `size` pixels a side; `mean` and `std` per channel of pixels in [0, 1], the same
    for every split and limit: those that papers use where the source is CIFAR-10 or CIFAR-100 (by
    name, or by its class names and 32 px), else those of train and val. `fingerprint` tells apart
    any other pixels, labels or selection, alike on every machine; `labelled` is whether every image
    has a class; `skipped` counts the source's files that `on_error="skip"` left out.
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

    def __len__(self) -> int:
        return self.n


@dataclass(frozen=True, eq=False)
class ImageSet(Description):
    """One split of a source, in memory: the source of training.

    `images` uint8 (N, 3, size, size), a private map of the cache (writing to it changes no file)
    or a copy where a limit picked rows; `labels` int64 (N,), -1 where an image has none.
    """

    images: Tensor
    labels: Tensor

    @property
    def sizes(self) -> Tensor:
        """Height and width of each image in pixels: int64 (N, 2)."""
        return torch.full((self.n, 2), self.size)

    def gather(self, index: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Crops of the images at `index` (B,), resized: uint8 (B, 3, size, size), antialiased.

        boxes: (B, 4) top, left, height, width in pixels of each image, whole numbers.
        """
        crops = []
        for i, (top, left, height, width) in zip(index.tolist(), boxes.int().tolist(), strict=True):
            crop = self.images[i, :, top : top + height, left : left + width]
            crops.append(interpolate(crop[None], (size, size), mode="bilinear", antialias=True))
        return torch.cat(crops)

    def subset(self, indices: Tensor | Sequence[int] | slice) -> "ImageSet":
        """The images at `indices` (or where a boolean mask holds), in that order, copied."""
        index = torch.arange(self.n)[indices]
        images, labels = self.images[index], self.labels[index]
        fingerprint = _fingerprint(self.fingerprint, index.numpy())
        return replace(self, n=len(index), images=images, labels=labels, fingerprint=fingerprint)


def data_root() -> Path:
    """`IDAA_DATA`, taken from the project's folder where it is relative, else `data/` there."""
    project = Path(__file__).resolve().parents[2]
    return project / Path(os.environ.get("IDAA_DATA") or "data").expanduser()


def describe(
    source: str | Path, split: str, size: int = 32, limit: int | None = None, **options: Any
) -> Description:
    """What `load` with the same arguments gives but for the images, opening no data where it can.

    It is read from an index beside the cache, which holds as long as nothing that `Source.watch`
    names has another size or time of change: the zip, or the folders and up to 4,096 of the files.
    Otherwise everything is opened, as by `load`, and the index is written anew. `load` itself looks
    at every file: it notices where one of very many was written anew under its own name.
    """
    pool = _find_pool(source, split, size, limit, **options)
    return pool.select(pool.read_index() or pool.open()[0], split, limit)[0]


def load(
    source: str | Path,
    split: str,
    size: int = 32,
    limit: int | None = None,
    *,
    on_error: str = "raise",
    download: bool = True,
    data_dir: str | Path | None = None,
) -> ImageSet:
    """One split ("train", "val", "test" or "trainval") of a source, `size` pixels a side.

    `source` is one of `NAMES`, or the path of a folder or zip (also relative to the data folder).
    Class folders may lie under train/, [val/,] test/; a folder without test/ is split 80/10/10 by
    a hash of its file names, train/ without val/ 90/10. Images that lie in no class folder have
    label -1. `limit` keeps a random subset of the split, the same on every call. `on_error="skip"`
    leaves unreadable images out and counts them. `data_dir` defaults to `$IDAA_DATA`, else to
    `data/` of the project.

    Raises FileNotFoundError for a missing source, ValueError for an impossible argument or bad
    content, OSError where the cache cannot be written; each is one sentence, and no half-written
    cache stays behind.
    """
    pool = _find_pool(source, split, size, limit, on_error, download, data_dir)
    about, labels, pixels = pool.open()
    description, index = pool.select(about, split, limit)
    whole = len(index) == index[-1] + 1 - index[0]
    images = pixels[index[0] : index[-1] + 1] if whole else pixels[index]  # whole: nothing is read
    return ImageSet(
        **vars(description),
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels[index]),
    )


def decode(path: str | Path, size: int) -> Tensor:
    """One image file as every source's are decoded: uint8 (3, size, size).

    Raises OSError where it is missing or no image.
    """
    with Image.open(path) as image:
        return torch.tensor(_square(image, size))


def _fingerprint(digest: str, index: np.ndarray) -> str:
    return sha256(digest, index.astype("<i8").tobytes())


def _find_pool(
    source: str | Path,
    split: str,
    size: int,
    limit: int | None,
    on_error: str = "raise",
    download: bool = True,
    data_dir: str | Path | None = None,
) -> "_Pool":
    """The pool of a source, not opened; ValueError or FileNotFoundError for what cannot be."""
    rules = {
        "split": (split, split in SPLITS, f"one of {', '.join(SPLITS)}"),
        "on_error": (on_error, on_error in ("raise", "skip"), '"raise" or "skip"'),
        "size": (size, type(size) is int and size > 0, "a positive number of pixels"),
        "limit": (
            limit,
            limit is None or (type(limit) is int and limit > 0),
            "None or more",
        ),
    }
    for name, (value, right, use) in rules.items():
        if not right:
            raise ValueError(f"{name}={value!r} is not allowed: use {use}")
    data = Path(data_dir).expanduser() if data_dir else data_root()
    return _Pool(find_source(source, data, download), data / "cache", size, on_error)


# --- Decoding: from any file that Pillow opens to an RGB square.


def _rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of any mode: 16 bits scaled to 8 (not clipped), transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # "I;16" and its kin, and the "I" of 16-bit PGM
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its values are not 16-bit: save it with 8 or 16 bits a channel")
        return Image.fromarray((deep / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are floats of unknown range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size): the short side resized to `size`, the middle kept; exact if already so.

    Bilinear, which Pillow widens when it shrinks (antialiased): bicubic rings at edges, and an
    adversary with a budget of 8/255 should find no such halo in the data.
    """
    image = ImageOps.fit(_rgb(image), (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class _Item(NamedTuple):
    """One decoded image, or the sentence that says why it cannot be read."""

    place: int  # in the listing
    pixels: Any = None  # uint8 (3, size, size)
    label: int = -1
    sides: tuple[int, int] = (0, 0)  # of the file
    error: str = ""


def _decode(listing: Listing, size: int, i: int) -> _Item:
    try:
        image, label = listing.read(i)
        return _Item(i, _square(image, size), label, image.size)
    except UnidentifiedImageError:  # whose own text names an address in memory
        why = "no image format that Pillow knows"
    except Exception as error:  # Pillow's plugins raise whatever a broken file trips them with
        why = f"{type(error).__name__}: {error}"
    return _Item(i, error=f"{listing.names[i]} cannot be read ({why})")


def _decode_all(listing: Listing, order: list[int], size: int) -> Iterator[list[_Item]]:
    """Decoded items in order, a list at a time so that memory holds a few."""
    rows = max(1, min(256, 2**24 // (3 * size**2)))
    run: Any = map
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        for start in range(0, len(order), rows):
            begin = time.perf_counter()
            items = list(run(partial(_decode, listing, size), order[start : start + rows]))
            # Threads fight for the interpreter where images are small: on 2 cores CIFAR-10's JPEGs
            # took 8 s with one and 12 s with two. At 500 x 400 pixels two are 1.9 times as fast.
            if (time.perf_counter() - begin) / len(items) > 1e-3:
                run = executor.map
            yield items


# --- The cache: a folder a pool, with its pixels and, written last, what describes them.


@dataclass(frozen=True)
class _Pool:
    """All images of a source, train, then val, then test, in the cache."""

    origin: Source
    cache: Path
    size: int
    on_error: str

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.-]", "_", self.origin.name)

    def path(self, key: str, end: str = "") -> Path:
        key = sha256(f"{key} {self.size} {self.on_error} {VERSION}")
        return self.cache / f"{self.slug}-{self.size}-{key[:16]}{end}"

    def open(self) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """What describes the pool, labels (N,), pixels (N, 3, size, size); decoded if need be."""
        entry, stamps = self._scan()
        pool = _read(entry, self.size)
        if pool is None:
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
                lock = FileLock(self.cache / f"{self.slug}.lock").acquire()
            except OSError as error:
                raise OSError(
                    f"{self.cache} cannot be written ({error}): set IDAA_DATA elsewhere"
                ) from error
            with lock:
                entry, stamps = self._scan()
                pool = _read(entry, self.size)  # another process may have made it meanwhile
                if pool is None:
                    listing = self.origin.listing()  # may download, which changes the key
                    entry, stamps = self._scan()
                    self._build(entry, listing)
                    pool = _read(entry, self.size)
            if pool is None:
                raise OSError(f"{entry} changed while it was written: load {self.slug} again")
        about = pool[0]
        if self.read_index() != about:
            draft = self.path(str(self.origin.path), f".{os.getpid()}")
            draft.write_text(json.dumps({"stamps": stamps, "about": about}), encoding="utf-8")
            draft.replace(self.path(str(self.origin.path), ".json"))
        return pool

    def _scan(self) -> tuple[Path, dict[str, list[int]]]:
        """Where the pool of what is there now lies, and the stamps by which `read_index` knows."""
        members = self.origin.members()
        stamps = {path: list(read_stamp(path)) for path in self.origin.watch(members)}
        return self.path(repr(sorted(members))), stamps

    def read_index(self) -> dict[str, Any] | None:
        """What describes the pool where nothing that is watched changed since, else None."""
        try:
            index = json.loads(self.path(str(self.origin.path), ".json").read_text("utf-8"))
            fresh = all(list(read_stamp(p)) == stamp for p, stamp in index["stamps"].items())
            return index["about"] if fresh else None
        except (OSError, ValueError, KeyError):
            return None

    def select(
        self, about: dict[str, Any], split: str, limit: int | None
    ) -> tuple[Description, np.ndarray]:
        """A split's description and the rows of the pool that it has."""
        counts = dict(zip(PARTS, about["counts"], strict=True))
        parts = PARTS[SPLITS[split]]
        start = sum(about["counts"][: PARTS.index(parts[0])])
        index = np.arange(start, start + sum(counts[part] for part in parts))
        if not len(index):
            hint = ": rename val/ if you mean it" if split == "test" and counts["val"] else ""
            there = ", ".join(f"{part} {n}" for part, n in counts.items())
            raise ValueError(
                f"{self.origin.name} has no image in split={split!r} ({there}): use another{hint}"
            )
        if limit is not None and limit < len(index):
            index = np.sort(np.random.default_rng(0).permutation(index)[:limit])
        return Description(
            name=self.origin.name,
            split=split,
            n=len(index),
            size=self.size,
            classes=tuple(about["classes"]),
            labelled=all(about["labelled"][part] for part in parts),
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            fingerprint=_fingerprint(about["digest"], index),
            skipped=about["skipped"],
        ), index

    def _build(self, entry: Path, listing: Listing) -> None:
        """Decode a source into `entry`, which appears in full or not at all; the lock is held."""
        partial_entry = entry.with_name(f"{entry.name}.partial")
        shutil.rmtree(partial_entry, ignore_errors=True)  # of a process that was killed
        need = len(listing.names) * 3 * self.size**2
        try:
            partial_entry.mkdir()
            if shutil.disk_usage(partial_entry).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(partial_entry / "images.u8", "wb") as file:
                about, labels = self._fill(file, listing)
            # A later change of the pixels shows in the time; any file system has even seconds.
            seconds = int(time.time()) // 2 * 2
            os.utime(partial_entry / "images.u8", (seconds, seconds))
            body = json.dumps({"about": about, "labels": labels, "time": seconds})
            (partial_entry / "about.json").write_text(f"{sha256(body)}\n{body}", encoding="utf-8")
            shutil.rmtree(entry, ignore_errors=True)  # one that `_read` refused
            partial_entry.rename(entry)
        except OSError as error:
            raise OSError(
                f"the decoded images of {self.origin.name} could not be written to {self.cache} "
                f"({error}): they take {need / 2**20:.0f} MiB; make room, or set IDAA_DATA to a "
                f"folder that has it"
            ) from error
        finally:
            shutil.rmtree(partial_entry, ignore_errors=True)

    def _fill(self, file: BinaryIO, listing: Listing) -> tuple[dict[str, Any], list[int]]:
        """Decode a source into an open file: what describes the pool, and the labels."""
        order = sorted(range(len(listing.names)), key=lambda i: PARTS.index(listing.splits[i]))
        digest, sums = hashlib.sha256(), np.zeros((2, 3), np.int64)  # of values, of their squares
        items: list[_Item] = []
        errors: list[str] = []
        pace = 0.1 if sys.stderr.isatty() else 5.0  # in a log, each refresh is another line
        with tqdm(
            desc=f"decoding {self.origin.name}",
            total=len(order),
            unit="image",
            delay=2,
            mininterval=pace,
        ) as bar:
            for chunk in _decode_all(listing, order, self.size):
                bar.update(len(chunk))
                errors += [item.error for item in chunk if item.error]
                chunk = [item for item in chunk if item.pixels is not None]
                if not chunk:
                    continue
                pixels = np.stack([item.pixels for item in chunk])
                # Not through a map of the file: a disk that fills up would kill the process there.
                file.write(pixels.data)
                digest.update(pixels.data)
                pixels = pixels[: sum(listing.splits[item.place] != "test" for item in chunk)]
                sums[0] += pixels.sum((0, 2, 3), dtype=np.int64)
                sums[1] += np.square(pixels, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
                items += [item._replace(pixels=None) for item in chunk]
        file.flush()
        os.fsync(file.fileno())

        labels = [item.label for item in items]
        of_parts = {p: [i.label for i in items if listing.splits[i.place] == p] for p in PARTS}
        counts = [len(part) for part in of_parts.values()]
        if errors:
            self._weigh(errors, listing, labels)
        if not counts[0]:
            raise ValueError(f"{self.origin.name} has no image for train: add images")
        mean, square = sums / ((counts[0] + counts[1]) * self.size**2)
        # A channel that is the same everywhere has no spread to divide by: at least one level.
        mean, std = mean / 255, (np.sqrt(square - mean**2) / 255).clip(1 / 255)
        names = "\n".join(sorted(name.lower().replace(" ", "_") for name in listing.classes))
        alike = sha256(names)[:16] in CIFAR and {item.sides for item in items} == {(32, 32)}
        if alike or (isinstance(self.origin, Torchvision) and self.origin.name.startswith("cifar")):
            mean, std = PUBLISHED
        described = json.dumps([self.size, listing.classes, labels, counts])
        return {
            "classes": listing.classes,
            "counts": counts,
            "labelled": {part: min(of, default=0) >= 0 for part, of in of_parts.items()},
            "mean": list(mean),
            "std": list(std),
            "digest": sha256(f"{digest.hexdigest()} {described}"),
            "skipped": len(errors),
        }, labels

    def _weigh(self, errors: list[str], listing: Listing, labels: list[int]) -> None:
        """A warning that images are left out; ValueError where they may not, or a class is lost."""
        if self.on_error == "raise":
            more = f"; and {len(errors) - 50} more" if len(errors) > 50 else ""
            raise ValueError(
                f'{"; ".join(sorted(errors)[:50])}{more}: replace what is broken, or pass on_error="skip"'
            )
        what = f"{len(errors)} of {len(listing.names)} images could not be read, first {errors[0]}"
        lost = [name for n, name in enumerate(listing.classes) if n not in set(labels)]
        if lost or not labels:
            place = f"class {lost[0]!r}" if lost else "train"
            raise ValueError(f"{self.origin.name} has no image for {place}: {what}; add images")
        warnings.warn(f"{self.origin.name} goes without some images: {what}", stacklevel=5)


def _read(entry: Path, size: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """What describes a finished entry of the cache, its labels and its pixels; None where there is
    none, or it is not what was written."""
    try:
        seal, body = (entry / "about.json").read_text(encoding="utf-8").split("\n", 1)
        content = json.loads(body)
        labels = np.array(content["labels"], np.int64)
        shape = (len(labels), 3, size, size)
        status = (entry / "images.u8").stat()
        whole = (status.st_size, status.st_mtime) == (math.prod(shape), content["time"])
        if seal != sha256(body) or not whole:
            return None
        images = np.memmap(entry / "images.u8", np.uint8, mode="c", shape=shape)
        return content["about"], labels, images
    except (OSError, ValueError, KeyError):
        return None
