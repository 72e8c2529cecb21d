"""Images in memory: any source, decoded once, as one uint8 tensor.

A *source* (the embedded photographs, a torchvision data set, a folder or a zip) is listed, every
image is decoded into one pool ordered train, val, test, and the pool is kept under `data/cache/`
as raw bytes that later calls map into memory. A split and a limit only select rows of the pool.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from idaa_lib.data.sources import Listing, Origin, find_source, sha256

SPLITS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}
VERSION = 1  # of the decoding below and of the files of the cache: another number, another entry

PUBLISHED = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # what papers normalise CIFAR with


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a source, in memory.

    `images` uint8 (N, 3, size, size), a private map of the cache (writing to it changes no file)
    or a copy where a limit picked rows; `labels` int64 (N,), -1 where an image has none; `mean` and
    `std` per channel of pixels in [0, 1], over train and val, the same for every split and limit;
    `fingerprint` tells apart any other pixels, labels or selection, alike on every machine;
    `skipped` counts the source's files that `on_error="skip"` left out.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str
    split: str
    fingerprint: str
    skipped: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]

    @property
    def labelled(self) -> bool:
        """Whether every image has a class."""
        return bool((self.labels >= 0).all())

    def subset(self, indices: Tensor | Sequence[int] | slice) -> "ImageSet":
        """The images at `indices` (or where a boolean mask holds), in that order, copied."""
        index = torch.arange(len(self))[indices]
        fingerprint = _selection(self.fingerprint, index.numpy())
        return replace(
            self, images=self.images[index], labels=self.labels[index], fingerprint=fingerprint
        )


def data_root() -> Path:
    """`IDAA_DATA`, else `data/` of the project."""
    project = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("IDAA_DATA") or project / "data").expanduser()


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
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is no split: use one of {', '.join(SPLITS)}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error={on_error!r} is not allowed: use "raise" or "skip"')
    if not _positive(size):
        raise ValueError(f"size={size!r} is not allowed: use a positive number of pixels")
    if limit is not None and not _positive(limit):
        raise ValueError(f"limit={limit!r} is not allowed: use None or a positive integer")
    data = Path(data_dir).expanduser() if data_dir else data_root()
    origin = find_source(source, data, download)
    pool = _pool(origin, data / "cache", size, on_error)

    first, last = SPLITS[split][0], SPLITS[split][-1]
    index = np.arange(pool.bounds[first][0], pool.bounds[last][1])
    if not len(index):
        counts = ", ".join(f"{part} {stop - start}" for part, (start, stop) in pool.bounds.items())
        raise ValueError(f"{origin.name} has no image in split={split!r} ({counts}): use another")
    if limit is not None and limit < len(index):
        index = np.sort(np.random.default_rng(0).permutation(index)[:limit])
        images = pool.images[index]
    else:
        images = pool.images[index[0] : index[-1] + 1]  # a view: nothing is read yet
    mean, std = PUBLISHED if source in ("cifar10", "cifar100") else (pool.mean, pool.std)
    return ImageSet(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(pool.labels[index]),
        classes=pool.classes,
        mean=mean,
        std=std,
        name=origin.name,
        split=split,
        fingerprint=_selection(pool.digest, index),
        skipped=pool.skipped,
    )


def decode(path: str | Path, size: int) -> Tensor:
    """One image file as every source's are decoded: uint8 (3, size, size).

    Raises OSError where it is missing or no image.
    """
    with Image.open(path) as image:
        return torch.tensor(_square(image, size))


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _selection(digest: str, index: np.ndarray) -> str:
    return sha256(digest, index.astype("<i8").tobytes())


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
    return np.asarray(image).transpose(2, 0, 1)


@dataclass(frozen=True)
class _Chunk:
    items: list[int]
    pixels: np.ndarray  # uint8 (n, 3, size, size)
    labels: list[int]
    broken: list[str]  # a phrase for each item that could not be read, and is in none of the above


def _decode(listing: Listing, items: list[int], size: int) -> _Chunk:
    kept: list[int] = []
    labels: list[int] = []
    broken: list[str] = []
    pixels = np.empty((len(items), 3, size, size), np.uint8)
    for i in items:
        try:
            image, label = listing.read(i)
            pixels[len(kept)] = _square(image, size)
        except UnidentifiedImageError:  # whose own text names an address in memory
            broken.append(f"{listing.names[i]} cannot be read (no image format that Pillow knows)")
        except Exception as error:  # Pillow's plugins raise whatever a broken file trips them with
            broken.append(f"{listing.names[i]} cannot be read ({type(error).__name__}: {error})")
        else:
            kept.append(i)
            labels.append(label)
    return _Chunk(kept, pixels[: len(kept)], labels, broken)


def _chunks(listing: Listing, order: list[int], size: int) -> Iterator[_Chunk]:
    """Decoded chunks in order, a few at a time in memory."""
    rows = max(1, min(256, 2**24 // (3 * size**2)))
    chunks = [order[start : start + rows] for start in range(0, len(order), rows)]
    begin = time.perf_counter()
    yield _decode(listing, chunks[0], size)
    # Threads fight for the interpreter where images are small: on 2 cores CIFAR-10's JPEGs took
    # 8 s with one and 12 s with two. At 500 x 400 pixels two are 1.9 times as fast as one.
    slow = (time.perf_counter() - begin) / len(chunks[0]) > 1e-3
    workers = min(8, os.cpu_count() or 1) if slow else 1
    with ThreadPoolExecutor(workers) as executor:
        waiting = deque(executor.submit(_decode, listing, c, size) for c in chunks[1 : 2 * workers])
        for chunk in chunks[2 * workers :]:
            yield waiting.popleft().result()
            waiting.append(executor.submit(_decode, listing, chunk, size))
        while waiting:
            yield waiting.popleft().result()


# --- The cache: a folder a pool, with its pixels and, written last, what describes them.


@dataclass(frozen=True)
class _Pool:
    """All images of a source: train, then val, then test, between the rows of `bounds`."""

    images: np.ndarray  # uint8 (N, 3, size, size)
    labels: np.ndarray  # int64 (N,)
    bounds: dict[str, tuple[int, int]]
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str
    skipped: int


def _pool(origin: Origin, cache: Path, size: int, on_error: str) -> _Pool:
    slug = re.sub(r"[^\w.-]", "_", origin.name)

    def entry() -> Path:
        key = sha256(f"{origin.key()} {size} {on_error} {VERSION}")
        return cache / f"{slug}-{size}-{key[:16]}"

    pool = _open(entry(), size)
    if pool is not None:
        return pool
    try:
        cache.mkdir(parents=True, exist_ok=True)
        held = FileLock(cache / f"{slug}.lock").acquire()
    except OSError as error:
        raise OSError(f"{cache} cannot be written ({error}): set IDAA_DATA elsewhere") from error
    with held:
        pool = _open(entry(), size)  # another process may have made it while this one waited
        if pool is None:
            listing = origin.listing()  # may download, which changes the key
            path = entry()
            _build(path, origin.name, listing, size, on_error)
            pool = _open(path, size)
            if pool is None:
                raise OSError(f"{path} changed while it was written: load {origin.name} again")
    return pool


def _build(entry: Path, name: str, listing: Listing, size: int, on_error: str) -> None:
    """Decode a source into `entry`, which appears in full or not at all; the lock is held."""
    partial = entry.with_name(f"{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    need = len(listing.names) * 3 * size**2
    try:
        partial.mkdir()
        if shutil.disk_usage(partial).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(partial / "images.u8", "wb") as file:
            about = _fill(file, name, listing, size, on_error)
        # A change of the pixels later on shows in the time; whole even seconds fit any file system.
        about["time"] = int(time.time()) // 2 * 2
        os.utime(partial / "images.u8", (about["time"], about["time"]))
        body = json.dumps(about)
        (partial / "about.json").write_text(f"{sha256(body)}\n{body}", encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # one that `_open` refused
        partial.rename(entry)
    except OSError as error:
        raise OSError(
            f"the decoded images of {name} could not be written to {entry.parent} ({error}): they "
            f"take {need / 2**20:.0f} MiB; make room, or set IDAA_DATA to a folder that has it"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(file: BinaryIO, name: str, listing: Listing, size: int, on_error: str) -> dict[str, Any]:
    """Decode a source into an open file; what `_open` wants to know of it."""
    parts = ["train", "val", "test"]
    order = sorted(range(len(listing.names)), key=lambda i: parts.index(listing.splits[i]))
    digest = hashlib.sha256()
    items: list[int] = []
    labels: list[int] = []
    broken: list[str] = []
    sums = np.zeros((2, 3), np.int64)  # of values, of their squares: exact on every machine
    pace = 0.1 if sys.stderr.isatty() else 5.0  # in a log, each refresh is another line
    with tqdm(
        desc=f"decoding {name}", total=len(order), unit="image", delay=2, mininterval=pace
    ) as bar:
        for chunk in _chunks(listing, order, size):
            if chunk.broken and on_error == "raise":
                raise ValueError(f'{chunk.broken[0]}: replace it, or pass on_error="skip"')
            # Not through a map of the file: a disk that fills up would kill the process there.
            pixels = chunk.pixels.data
            file.write(pixels)
            digest.update(pixels)
            items += chunk.items
            labels += chunk.labels
            broken += chunk.broken
            pooled = chunk.pixels[: sum(listing.splits[i] != "test" for i in chunk.items)]
            sums[0] += pooled.sum((0, 2, 3), dtype=np.int64)
            sums[1] += np.square(pooled, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
            bar.update(len(chunk.items) + len(chunk.broken))
    file.flush()
    os.fsync(file.fileno())

    counts = [sum(listing.splits[i] == part for i in items) for part in parts]
    lost = sorted(set(range(len(listing.classes))) - set(labels)) if broken else []
    left_out = f"{len(broken)} of {len(order)} images could not be read"
    left_out += f", first {broken[0]}" if broken else ""
    if lost or not counts[0]:
        place = f"class {listing.classes[lost[0]]!r}" if lost else "train"
        raise ValueError(f"{name} has no image for {place}: {left_out}; add images")
    if broken:
        warnings.warn(f"{name} goes without some images: {left_out}", stacklevel=5)
    mean, square = sums / ((counts[0] + counts[1]) * size**2)
    described = [size, listing.classes, labels, counts]
    return {
        "classes": listing.classes,
        "labels": labels,
        "counts": counts,
        "mean": list(mean / 255),
        "std": list(np.sqrt(square - mean**2) / 255),
        "digest": sha256(f"{digest.hexdigest()} {json.dumps(described)}"),
        "skipped": len(broken),
    }


def _open(entry: Path, size: int) -> _Pool | None:
    """The pool of a finished entry; None where there is none, or it is not what was written."""
    try:
        seal, body = (entry / "about.json").read_text(encoding="utf-8").split("\n", 1)
        about = json.loads(body)
        shape = (len(about["labels"]), 3, size, size)
        status = (entry / "images.u8").stat()
        whole = (status.st_size, status.st_mtime) == (math.prod(shape), about["time"])
        if seal != sha256(body) or not whole:
            return None
        images = np.memmap(entry / "images.u8", np.uint8, mode="c", shape=shape)
    except (OSError, ValueError, KeyError):
        return None
    stops = [0, *itertools.accumulate(about["counts"])]
    return _Pool(
        images=images,
        labels=np.array(about["labels"], np.int64),
        bounds=dict(zip(("train", "val", "test"), itertools.pairwise(stops), strict=True)),
        classes=tuple(about["classes"]),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        digest=about["digest"],
        skipped=about["skipped"],
    )
