"""All images of a source, decoded once: files in the cache, and an index that says what they hold.

A pool is ordered train, val, test, and is kept as raw bytes that later calls map into memory. Of a
streamed set it has a row for each photograph (`streamed`) in place of its pixels.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from idaa_lib.data.decoding import Item, decode_items, square
from idaa_lib.data.layout import HEIF, list_some, sha256
from idaa_lib.data.places import read_file, read_stamp
from idaa_lib.data.sources import Listing, Source, Torchvision
from idaa_lib.data.streamed import CONTENT, Images, Photographs, describe, row_width

PARTS = ("train", "val", "test")
VERSION = 8  # of the decoding and of the files of the cache: another number, another entry
# The names of its folders and, with .json, of their indices.
NAME = re.compile(r".+-\d+-[0-9a-f]{16}(\.partial|\.json)?", re.DOTALL)
Content = tuple[dict[str, Any], np.ndarray, Images]  # what describes a pool, labels, pixels
# Mean and std of a streamed set are measured on so many of its photographs, at this size.
SAMPLE, SAMPLE_SIZE = 500, 224

# The mean and std that papers normalise CIFAR with.
CIFAR_UNITS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# Of the class names of CIFAR-10 and CIFAR-100, sorted, one a line: the start of their sha256.
CIFAR = ("bb3914949cecedee", "fbe8ad23bbaf2496")


@dataclass(frozen=True)
class Pool:
    """All images of a source in the cache: a folder with the pixels and what describes them.

    size: side of the images, in pixels; 0 of a streamed set, which has a row for each instead.
    """

    source: Source
    cache: Path
    size: int
    bits: int

    @property
    def slug(self) -> str:
        """What the names of its files in the cache begin with."""
        name = re.sub(r"[^\w.-]", "_", self.source.name)
        return name.encode()[:200].decode(errors="ignore")  # a file's name has 255 bytes

    def path(self, key: str, ending: str = "") -> Path:
        classes = repr(self.source.classes) if self.source.classes else ""
        rules = f"{VERSION}{' heif' * HEIF}{classes}" + f" {self.bits}" * (self.bits < 16)
        digest = sha256(f"{key} {self.size} {rules}")
        return self.cache / f"{self.slug}-{self.size}-{digest[:16]}{ending}"

    def read_index(self, name: str = "about") -> Any:
        """What describes the pool (or its `entry`), if nothing that is watched changed since it was
        written."""
        index = read_sealed(self.path(str(self.source.path), ".json"))
        return index[name] if index and is_current(index) else None

    def open(self, again: bool = False) -> Content:
        """What describes the pool, labels (N,), images (N, 3, size, size); decoded if need be. Of a
        streamed set whose index holds, no folder is walked: each photograph is checked when read.

        again: also where an image that could not be read can be read now, as no stamp tells.
        """
        name = None if self.size or again else self.read_index("entry")
        if name and (pool := _read(self.cache / name)):
            return pool
        entry, stamps = self._scan()
        if (pool := self._keep(entry, again)) is None:
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
                guard = lock(self.cache, self.slug).acquire()
            except OSError as error:
                raise OSError(
                    f"{self.cache} cannot be written ({error.strerror or error}): give yourself "
                    f"the right to, or set IDAA_DATA to another folder"
                ) from error
            with guard:
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
                values = {"stamps": stamps, "entry": entry.name, "about": pool[0]}
                _write_sealed(draft, {"version": VERSION} | values)
                draft.replace(draft.with_suffix(".json"))
        return pool

    def _scan(self) -> tuple[Path, dict[str, tuple[int, int]]]:
        """Where the pool lies of what is there now, and the stamps of what is watched."""
        members = self.source.members()
        stamps = {path: read_stamp(path) for path in self.source.watch(members)}
        entry = self.path(repr(sorted(members)))
        if not isinstance(self.source, Torchvision):  # whose data sets share a folder
            # The folder may have been renamed since its images were decoded.
            alike = self.cache.glob(f"*-{self.size}-{entry.name.rpartition('-')[2]}")
            entry = next(alike, entry)
        return entry, stamps

    def _keep(self, entry: Path, again: bool) -> Content | None:
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
            content = self._decode(draft / "images.u8", listing)
            _write_sealed(draft / "about.json", self._share(draft / "images.u8", content))
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

    def _share(self, file: Path, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a pool that was decoded into `file`. Where another pool has the same
        pixels, as that of a copied folder, the two become one file on the disk."""
        others = self.cache.glob(f"*-{self.size}-*") if self.size else ()
        for other in others:
            pool = _read(other)
            if pool and pool[0]["digest"] == content["about"]["digest"]:
                link = file.with_suffix(".link")
                with contextlib.suppress(OSError):  # a file system without links
                    link.hardlink_to(other / file.name)
                    link.replace(file)
                return content | {"stamp": read_stamp(file)}
        return content

    def _decode(self, file: Path, listing: Listing) -> dict[str, Any]:
        """Decode a source into a file: what `_read` gives, as JSON values."""
        order = sorted(range(len(listing.names)), key=lambda i: PARTS.index(listing.splits[i]))
        items: list[Item] = []
        errors: dict[str, str] = {}  # place in the listing: why it cannot be read
        shape, make = self._maker(listing)
        stream = decode_items(listing, order, shape, make)
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
        images = Images(file, (len(items), *shape), np.arange(len(items)))
        learnt = counts[0] + counts[1]
        if self.size:
            mean, std = _measure(images.map()[:learnt])
        else:
            sample = images.rows[: learnt : -(-learnt // SAMPLE)]
            place = file, images.whole, sample, listing.root
            try:
                mean, std = _measure(Photographs(*place, SAMPLE_SIZE, self.bits)[:].numpy())
            except OSError as error:  # of reading: those of writing are the disk's
                raise ValueError(str(error)) from error
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
            what = f"{len(errors)} of {n} images cannot be read"
            notes.append(f"{what}: {list_some(sorted(errors.values()), 5000)}")
        if lost:
            why = f"{what}, {list_some(sorted(errors.values()), 160)}" if errors else f"{n} in all"
            raise ValueError(
                f"{self.source.name} has no image for {lost[0]}, and {why}: add images"
            )
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


def _read(entry: Path) -> Content | None:
    """What describes a finished pool, its labels and images; None where it is not as written."""
    content, file = read_sealed(entry / "about.json"), entry / "images.u8"
    if content and content["stamp"] == list(read_stamp(file)):
        labels = np.array(content["labels"], np.int64)
        images = Images(file, tuple(content["shape"]), np.arange(len(labels)))
        return content["about"], labels, images
    return None


def _write_sealed(path: Path, values: dict[str, Any]) -> None:
    body = json.dumps(values)
    path.write_text(f"{sha256(body)}\n{body}", "utf-8")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What a file of the cache holds: a line with the SHA-256 of the JSON behind it; None where it
    is not as it was written."""
    with contextlib.suppress(OSError, ValueError):
        seal, body = read_file(path).decode().split("\n", 1)
        return json.loads(body) if seal == sha256(body) else None
    return None


def is_current(index: dict[str, Any]) -> bool:
    """Whether it is of this VERSION, and nothing that it watches changed since it was written."""
    same = (stamp == [*read_stamp(path)] for path, stamp in index["stamps"].items())
    return index.get("version") == VERSION and all(same)


def lock(cache: Path, slug: str) -> FileLock:
    """What is held while pools of this `slug` are written or removed."""
    return FileLock(cache / f"{slug}.lock")
