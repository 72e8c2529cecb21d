"""Images of any source: decoded once, as one uint8 tensor, or streamed from where they lie.

Every image of a source is decoded into one pool ordered train, val, test, which is kept under
`data/cache/` as raw bytes that later calls map into memory. A split and a limit only select rows of
the pool. An index beside it says what the pool holds, so that describing a set opens nothing. Of a
streamed set the pool has a row for each photograph (`streamed`) in place of its pixels.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from idaa_lib.data.decoding import Item, decode_items, square
from idaa_lib.data.layout import HEIF, sha256
from idaa_lib.data.sources import (
    Listing,
    Source,
    Torchvision,
    find_source,
    read_classes,
    read_stamp,
)
from idaa_lib.data.streamed import CONTENT, Images, Photographs, describe, row_width

PARTS = ("train", "val", "test")
SPLITS = {"train": slice(0, 1), "val": slice(1, 2), "test": slice(2, 3), "trainval": slice(0, 2)}
VERSION = 4  # of the decoding and of the files of the cache: another number, another entry
Pool = tuple[dict[str, Any], np.ndarray, Images]  # what describes it, labels, pixels
# Bytes of images that are taken into memory where a limit picks them; more stay in their file.
SMALL = 2**28
# Of streamed photographs so many, this large, say what their mean and std are.
SAMPLE, SAMPLE_SIZE = 500, 224

# The mean and std that papers normalise CIFAR with.
CIFAR_UNITS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# Of the class names of CIFAR-10 and CIFAR-100, sorted, one a line: the start of their sha256.
CIFAR = ("bb3914949cecedee", "fbe8ad23bbaf2496")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a source: what it is, and from their first use on its images.

    `n` images of `size` pixels a side; `labelled`: whether each has a class; `mean`, `std`: per
    channel of pixels in [0, 1], alike for every split and limit: what papers use where the source
    is CIFAR-10 or CIFAR-100 (by name, or by class names and 32 px), else those of train and val,
    of streamed photographs of 500 of them;
    `fingerprint` tells apart any other pixels, labels or selection, alike on every machine;
    `skipped`: how many images of the source `on_error="skip"` left out; `notes`: sentences on what
    else the source holds that is left out, or read in another way than it seems; `streamed`:
    whether photographs are read from where they lie, each time.
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
            crop = self.images[i : i + 1, :, top : top + height, left : left + width]
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
    project = Path(__file__).resolve().parents[2]
    return project / Path(os.environ.get("IDAA_DATA") or "data").expanduser()


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
    it can be decoded. data_dir: else `data_root()`. What is left out or read in another way than it
    seems is printed, once in a process.

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
    data = Path(data_dir).expanduser() if data_dir else data_root()
    chosen = read_classes(classes, data) if classes else ()
    origin = find_source(source, data, download, chosen)
    pool = _Pool(origin, data / "cache", 0 if streamed else size, gray_bits)
    name, about = pool.source.name, pool.read_index() or pool.open()[0]
    if about["errors"] and on_error == "raise":
        about = pool.open(again=True)[0]
        if about["errors"]:
            what = "replace what is broken, or leave it out by on_error='skip'"
            raise ValueError(f"{_join(about['errors'].values())}: {what}")
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
        classes=tuple(about["classes"]),
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


def _join(errors: Collection[str]) -> str:
    more = f"; and {len(errors) - 50} more" if len(errors) > 50 else ""
    return "; ".join(sorted(errors)[:50]) + more


@dataclass(frozen=True)
class _Pool:
    """All images of a source in the cache: a folder with the pixels and what describes them.

    size: side of the images, in pixels; 0 of a streamed set, which has a row for each instead.
    """

    source: Source
    cache: Path
    size: int
    bits: int

    def path(self, key: str, ending: str = "") -> Path:
        slug = re.sub(r"[^\w.-]", "_", self.source.name)
        classes = repr(self.source.classes) if self.source.classes else ""
        rules = f"{VERSION}{' heif' * HEIF}{classes}" + f" {self.bits}" * (self.bits < 16)
        digest = sha256(f"{key} {self.size} {rules}")
        return self.cache / f"{slug}-{self.size}-{digest[:16]}{ending}"

    def read_index(self, name: str = "about") -> Any:
        """What describes the pool (or its `entry`), if nothing that is watched changed since it was
        written."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            index = json.loads(self.path(str(self.source.path), ".json").read_text("utf-8"))
            if all(list(read_stamp(path)) == stamp for path, stamp in index["stamps"].items()):
                return index[name]
        return None

    def open(self, again: bool = False) -> Pool:
        """What describes the pool, labels (N,), images (N, 3, size, size); decoded if need be. Of a
        streamed set whose index holds, no folder is walked: each photograph is checked when read.

        again: also where an image that could not be read can be read now, as no stamp tells.
        """
        name = None if self.size or again else self.read_index("entry")
        if name and (pool := _read(self.cache / name)):
            return pool
        entry, stamps = self._scan()
        if (pool := self._keep(entry, again)) is None:
            self.cache.mkdir(parents=True, exist_ok=True)
            with FileLock(self.cache / f"{self.source.path.name}.lock"):
                entry, stamps = self._scan()
                # Perhaps another process decoded it meanwhile.
                if (pool := self._keep(entry, again)) is None:
                    listing = self.source.listing()  # may download, which changes the key
                    entry, stamps = self._scan()
                    self._build(entry, listing)
                    pool = _read(entry)
            if pool is None:
                raise OSError(f"{entry} changed while it was written: load it again")
        if self.read_index() != pool[0]:
            draft = self.path(str(self.source.path), f".{os.getpid()}")
            with contextlib.suppress(OSError):  # others' cache, which may only be read
                index = {"stamps": stamps, "entry": entry.name, "about": pool[0]}
                draft.write_text(json.dumps(index), "utf-8")
                draft.replace(draft.with_suffix(".json"))
        return pool

    def _scan(self) -> tuple[Path, dict[str, tuple[int, int]]]:
        """Where the pool lies of what is there now, and the stamps of what is watched."""
        members = self.source.members()
        stamps = {path: read_stamp(path) for path in self.source.watch(members)}
        entry = self.path(repr(sorted(members)))
        if not isinstance(self.source, Torchvision):  # of whose files several sets are made
            # Whatever the folder was called when its images were decoded.
            alike = self.cache.glob(f"*-{self.size}-{entry.name.rpartition('-')[2]}")
            entry = next(alike, entry)
        return entry, stamps

    def _keep(self, entry: Path, again: bool) -> Pool | None:
        """As `_read`; None too where `again` finds what could not be read before."""
        pool = _read(entry)
        if pool and again and (places := [*map(int, pool[0]["errors"])]):
            listing = self.source.listing()
            items = decode_items(listing, places, *self._maker(listing))
            return pool if all(item.error for item in items) else None
        return pool

    def _maker(self, listing: Listing) -> tuple[tuple[int, ...], Callable[..., np.ndarray]]:
        """The shape of what the pool keeps of an item, and what makes it of its image."""
        if self.size:
            return (3, self.size, self.size), lambda i, image: square(image, self.size, self.bits)
        if not listing.places:
            raise ValueError(
                f"streamed photographs lie in a folder or in tar shards, and {self.source.name} is "
                f"neither: leave streamed out, or unpack it"
            )
        width = row_width(listing)
        return (width,), lambda i, image: describe(listing, width, self.bits, i, image)

    def _build(self, entry: Path, listing: Listing) -> None:
        """Decode a source into `entry`, which appears in full or not at all; the lock is held."""
        draft = entry.with_name(f"{entry.name}.partial")
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        need = len(listing.names) * math.prod(self._maker(listing)[0])
        try:
            draft.mkdir()
            if shutil.disk_usage(draft).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            body = json.dumps(self._decode(draft / "images.u8", listing))
            (draft / "about.json").write_text(f"{sha256(body)}\n{body}", "utf-8")
            shutil.rmtree(entry, ignore_errors=True)  # one that `_read` refused
            draft.rename(entry)
        except OSError as error:
            raise OSError(
                f"the decoded images of {self.source.name} could not be written to {self.cache} "
                f"({error}): they take {need / 2**20:.0f} MiB; make room, or set IDAA_DATA to a "
                f"folder that has it, or decode none ahead by streamed=True"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _decode(self, file: Path, listing: Listing) -> dict[str, Any]:
        """Decode a source into a file: what `_read` gives, as JSON values."""
        order = sorted(range(len(listing.names)), key=lambda i: PARTS.index(listing.splits[i]))
        items: list[Item] = []
        errors: dict[str, str] = {}  # place in the listing: why it cannot be read
        kept, make = self._maker(listing)
        stream = decode_items(listing, order, kept, make)
        title = f"{'decoding' if self.size else 'checking'} {self.source.name}"
        # Not through a map of the file: a disk that fills up would kill the process there.
        with open(file, "wb") as target:
            for item in tqdm(stream, title, len(order), unit="image", delay=2, mininterval=1):
                if item.error:
                    errors[str(item.place)] = item.error
                else:
                    target.write(item.pixels)
                    items.append(item._replace(pixels=None))
            target.flush()
            os.fsync(target.fileno())
        notes = self._check(listing, items, errors)
        labels = [item.label for item in items]
        counts = [sum(listing.splits[item.place] == part for item in items) for part in PARTS]
        images = Images(file, (len(items), *kept), np.arange(len(items)))
        learnt = counts[0] + counts[1]
        if self.size:
            mean, std = _measure(images.map()[:learnt])
        else:
            sample = images.rows[: learnt : -(-learnt // SAMPLE)]
            place = file, images.whole, sample, listing.root
            mean, std = _measure(Photographs(*place, SAMPLE_SIZE, self.bits)[:].numpy())
        names = "\n".join(sorted(name.lower().replace(" ", "_") for name in listing.classes))
        alike = sha256(names)[:16] in CIFAR and {item.sides for item in items} == {(32, 32)}
        if alike or (isinstance(self.source, Torchvision) and self.source.name.startswith("cifar")):
            mean, std = CIFAR_UNITS
        described = json.dumps([self.size, listing.classes, labels, counts])
        with open(file, "rb") as target:
            content = hashlib.file_digest(target, "sha256")
        if not self.size:  # of the photographs, wherever they lie
            content = hashlib.sha256(images.map()[:, CONTENT].tobytes())
        ends = itertools.pairwise(np.cumsum([0, *counts]))
        about = {
            "classes": listing.classes,
            "counts": counts,
            "labelled": [-1 not in labels[a:b] for a, b in ends],
            "mean": list(mean),
            "std": list(std),
            "digest": sha256(f"{content.hexdigest()} {described}"),
            "errors": errors,
            "notes": notes,
        }
        return {"about": about, "labels": labels, "shape": images.whole, "stamp": read_stamp(file)}

    def _check(self, listing: Listing, items: list[Item], errors: dict[str, str]) -> list[str]:
        """Sentences on what is left out, or not what it seems; ValueError where it is too much."""
        labels = {item.label for item in items}
        lost = [f"class {c!r}" for n, c in enumerate(listing.classes) if errors and n not in labels]
        lost += [] if any(listing.splits[item.place] == "train" for item in items) else ["train"]
        n, notes = len(listing.names), [*listing.notes]
        if errors:
            notes.append(f"{len(errors)} of {n} images cannot be read: {_join(errors.values())}")
        if lost:
            what = f"{self.source.name} has no image for {lost[0]}"
            raise ValueError(f"{what}, and {notes[-1] if errors else f'{n} in all'}: add images")
        peak = max(item.peak for item in items)
        if 0 < peak < 2**14 and self.bits == 16:
            notes.append(
                f"its images of 16 bits are dark, since they use the values to {peak} alone: "
                f"gray_bits={peak.bit_length()} makes those white"
            )
        if len(listing.classes) == 1:
            notes.append(
                f"it has one class alone, {listing.classes[0]!r}, so an accuracy is 100 % whatever "
                f"the encoder is"
            )
        return notes


def _measure(pixels: np.ndarray) -> tuple[Any, Any]:
    """Mean and std by channel of pixels in [0, 1], from sums that are exact on every machine.

    A channel that is the same everywhere has no spread to divide by, and views whose hue is changed
    have some in it: it gets that of another channel, or one level where none has more.
    """
    sums = np.zeros((2, 3), np.int64)
    for start in range(0, len(pixels), 1024):
        chunk = pixels[start : start + 1024]
        sums[0] += chunk.sum((0, 2, 3), dtype=np.int64)
        sums[1] += np.square(chunk, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
    mean, square = sums / (pixels.size // 3)
    std = np.sqrt(square - mean**2) / 255
    return mean / 255, np.where(std < 1 / 255, std.max().clip(1 / 255), std)


def _read(entry: Path) -> Pool | None:
    """What describes a finished pool, its labels and images; None where it is not as written."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        seal, body = (entry / "about.json").read_text("utf-8").split("\n", 1)
        content, file = json.loads(body), entry / "images.u8"
        if seal == sha256(body) and content["stamp"] == list(read_stamp(file)):
            labels = np.array(content["labels"], np.int64)
            images = Images(file, tuple(content["shape"]), np.arange(len(labels)))
            return content["about"], labels, images
    return None
