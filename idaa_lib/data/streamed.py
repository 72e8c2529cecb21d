"""Images that stay in files and are read where an index names them: decoded ones, and photographs.

Photographs stay compressed. A table has a row for each, so that opening a million opens none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

from idaa_lib.data.decoding import convert
from idaa_lib.data.places import read_place
from idaa_lib.data.sources import Listing

FIELDS = [("offset", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4")]
FIELDS += [("plain", "?"), ("content", "V32")]
FIXED = np.dtype(FIELDS).itemsize
CONTENT = slice(FIXED - 32, FIXED)  # the bytes of a row that tell a photograph's content


@dataclass(frozen=True, eq=False)
class Images:
    """uint8 images (N, 3, H, W) in a file of raw bytes; an index reads those that it names.

    Nothing is open between two reads: a worker process of any kind gets the path and the rows.

    Fields:
        whole: shape of the array in `file`. rows: (N,), which of it are meant.
    """

    file: Path
    whole: tuple[int, ...]
    rows: np.ndarray

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.whole[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Tensor:
        """A copy of the images at `index`, as of a tensor: (B, 3, H, W), or (3, H, W) of one."""
        rows = self.rows[index.numpy() if isinstance(index, Tensor) else index]
        images = self._read(np.atleast_1d(rows))
        return images if np.ndim(rows) else images[0]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def pick(self, index: Any) -> Images:
        """Those at `index`, not yet read."""
        return replace(self, rows=self.rows[index])

    def split(self, n: int) -> list[Images]:
        """Parts of n images, not yet read."""
        return [self.pick(slice(i, i + n)) for i in range(0, max(1, len(self)), n)]

    def to(self, device: torch.device | str) -> Tensor:
        """All of them there."""
        images = torch.empty(self.shape, dtype=torch.uint8, device=device)
        for target, part in zip(images.split(256), self.split(256), strict=True):
            target.copy_(part[:])
        return images

    def map(self, mode: Any = "r") -> np.ndarray:
        """The whole array; mode "c" gives a private one, where writing changes no file."""
        return np.memmap(self.file, np.uint8, mode, shape=self.whole)

    def _read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.map()[rows]))


@dataclass(frozen=True, eq=False)
class Photographs(Images):
    """Photographs in their files, as squares (N, 3, size, size) of their middle; `gather` cuts them
    otherwise.

    Fields:
        file: the table, of rows as `describe` makes them. root: what its paths are relative to.
        size: side of the squares. bits: that grey images in 16-bit files use.
    """

    root: Path
    size: int
    bits: int = 16

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), 3, self.size, self.size))

    @property
    def sizes(self) -> Tensor:
        """Height and width of each in pixels, upright: int64 (N, 2)."""
        table = self._table(self.rows)
        return torch.from_numpy(np.stack([table["height"], table["width"]], 1).astype(np.int64))

    def gather(self, index: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Crops of the originals at `index` (B,), resized with antialiasing: uint8 (…, B, 3, size,
        size). Each is decoded once for all its crops.

        boxes: (…, B, 4) top, left, height, width, whole pixels of each photograph.

        Raises OSError where a file is not as it was when the table was made.
        """
        return self._cut(self._table(self.rows[index.numpy()]), boxes, size)

    def _read(self, rows: np.ndarray) -> Tensor:
        table = self._table(rows)
        height, width = (table[side].astype(np.int64) for side in ("height", "width"))
        side = np.minimum(height, width)
        boxes = np.stack([(height - side) // 2, (width - side) // 2, side, side], 1)
        return self._cut(table, torch.from_numpy(boxes), self.size)

    def _table(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.map()[rows]).view(row_type(self.whole[1]))[:, 0]

    def _cut(self, table: np.ndarray, boxes: Tensor, size: int) -> Tensor:
        crops = torch.empty((*boxes.shape[:-1], 3, size, size), dtype=torch.uint8)
        views = boxes.reshape(-1, *boxes.shape[-2:]).long()  # (V, B, 4)
        targets = crops.view(-1, *crops.shape[-4:])  # (V, B, 3, size, size)

        def cut(k: int) -> None:
            image = self._decode(table[k])[None]
            for view, target in zip(views[:, k].tolist(), targets[:, k], strict=True):
                top, left, height, width = view
                box = image[..., top : top + height, left : left + width]
                target.copy_(interpolate(box, (size, size), mode="bilinear", antialias=True)[0])

        if get_worker_info() is not None:  # there are as many processes as cores
            for k in range(len(table)):
                cut(k)
        else:
            with ThreadPoolExecutor(count_cores()) as executor:
                list(executor.map(cut, range(len(table))))
        return crops

    def _decode(self, row: np.void) -> Tensor:
        """(3, H, W) with a pixel's values side by side: `interpolate` is twice as fast on these."""
        path, decode = self.root / os.fsdecode(row["file"].item()), jpeg_decoder()
        for _ in range(2):
            file = _open(path)  # held, or another thread may close it
            content = os.pread(file.fileno(), int(row["length"]), int(row["offset"]))
            if hashlib.sha256(content).digest() == row["content"].tobytes():  # 3 % of the time here
                break
            _open.cache_clear()  # perhaps another file has the name now
        else:
            with contextlib.suppress(OSError):
                (self.file.parent / "about.json").unlink()  # so that the table is made anew
            raise OSError(f"{path} changed since it was described: start again")
        if row["plain"] and decode is not None:
            return decode(content)
        image = convert(Image.open(io.BytesIO(content)), self.bits)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def row_type(width: int) -> np.dtype:
    """A row of a table that is `width` bytes wide: where a photograph lies, its upright size,
    whether it is a `plain` JPEG (no turn, no CMYK), and the SHA-256 of its file."""
    return np.dtype([*FIELDS, ("file", f"S{width - FIXED}")])


def row_width(listing: Listing) -> int:
    """Bytes of a row of its table."""
    return FIXED + max(len(os.fsencode(place.file)) for place in listing.places)


def describe(listing: Listing, width: int, bits: int, i: int, image: Image.Image) -> np.ndarray:
    """The row of item i, uint8 (width,), after its image was decoded, whose errors are raised."""
    place, size = listing.places[i], image.size
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    plain = plain and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    if plain:
        image.draft(image.mode, (1, 1))  # an eighth of the size: as much is read, less computed
        image.load()
    else:
        size = convert(image, bits).size
    content = hashlib.sha256(read_place(listing.root, place)).digest()
    values = (place.offset, place.length, size[1], size[0], plain, content, os.fsencode(place.file))
    return np.array([values], row_type(width)).view(np.uint8)


@functools.cache
def jpeg_decoder() -> Any:
    """torchcodec's, where it is installed and works: .7 ms for 500 × 375 pixels, and Pillow, which
    gives the same values, 1.0 (AMD EPYC, 2026-11)."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # of another version of torch, or of none
        return None
    return decode_jpeg


def count_cores() -> int:
    """The processor's cores that this process has for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@functools.lru_cache(64)
def _open(path: Path) -> Any:
    """Shards stay open: to open a file of a network costs more than to read from it."""
    return open(path, "rb", buffering=0)
