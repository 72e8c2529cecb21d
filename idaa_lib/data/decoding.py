"""From any file that Pillow opens to an RGB square of uint8."""

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from idaa_lib.data.layout import HEIF, printable
from idaa_lib.data.places import read_file
from idaa_lib.data.sources import Listing

if HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()


class Item(NamedTuple):
    """One decoded item of a listing, or the reason why it cannot be read."""

    place: int  # in the listing
    pixels: Any = None  # what was made of it, uint8
    label: int = -1
    sides: tuple[int, int] = (0, 0)  # of the file, in pixels
    peak: int = 0  # the highest value of an image of 16-bit grey
    error: str = ""


def decode(path: str | Path, size: int) -> Tensor:
    """One image file as every source's are decoded: uint8 (3, size, size).

    Raises OSError where it is missing, no file or no image.
    """
    content = read_file(Path(os.path.expanduser(path)))
    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.tensor(square(image, size, 16))
    except Exception as error:
        raise OSError(_explain(error)) from error


def _explain(error: Exception) -> str:
    """Why a file is no image. Pillow's plugins raise whatever a broken one trips them with."""
    if isinstance(error, UnidentifiedImageError):  # whose own text names an address in memory
        return "no image format that Pillow knows"
    return f"{type(error).__name__}: {error}"


def decode_items(
    listing: Listing,
    order: list[int],
    shape: tuple[int, ...],
    make: Callable[[int, Image.Image], np.ndarray],
) -> Iterator[Item]:
    """The items of a listing in this order, a few at a time in memory.

    make: what is kept of an item, uint8 of this shape, from its place in the listing and its image.
    """
    rows = max(1, min(256, 2**24 // math.prod(shape)))
    run: Any = map
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        for start in range(0, len(order), rows):
            begin = time.perf_counter()
            items = list(run(partial(_decode, listing, make), order[start : start + rows]))
            # Threads fight for the interpreter where images are small: on 2 cores CIFAR-10's JPEGs
            # took 8 s with one and 12 s with two. At 500 x 400 pixels two are 1.9 times as fast.
            if (time.perf_counter() - begin) / len(items) > 1e-3:
                run = executor.map
            yield from items


def _decode(listing: Listing, make: Callable[[int, Image.Image], np.ndarray], place: int) -> Item:
    try:
        image, label = listing.read(place)
        sides = image.size
        peak = int(np.asarray(image).max()) if image.mode.startswith("I") else 0
        return Item(place, make(place, image), label, sides, peak)
    except Exception as error:
        name = printable(listing.names[place])
        return Item(place, error=f"{name} cannot be read ({_explain(error)})")


def square(image: Image.Image, size: int, bits: int) -> np.ndarray:
    """(3, size, size): the short side resized to `size`, the middle kept; exact if already so.

    Bilinear, which Pillow widens when it shrinks (antialiased): bicubic rings at edges, and an
    adversary with a budget of 8/255 should find no such halo in the data.
    """
    image = ImageOps.fit(convert(image, bits), (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def convert(image: Image.Image, bits: int) -> Image.Image:
    """Upright RGB of any mode: 16 bits, of which grey uses `bits`, scaled to 8 (not clipped),
    transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # "I;16" and its kin, and the "I" of 16-bit PGM
        deep, white = np.asarray(image), 2**bits - 1
        if deep.min() < 0 or deep.max() > white:
            raise ValueError(
                f"its values go from {deep.min()} to {deep.max()}, and those of {bits} bits from 0 "
                f"to {white}: save it with 8 or 16 bits a channel, or correct gray_bits"
            )
        return Image.fromarray((deep / (white / 255)).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are floats of unknown range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
