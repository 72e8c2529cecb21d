"""Batched random views: each paper's augmentation, drawn for every sample, applied on any device.

A view is made in two steps. `Recipe.numbers` draws what is random about a whole (global) batch on
the CPU from a `torch.Generator`; a process keeps its rows of it. `Recipe.view`, which computes the
parameters (`parameters`) and the images (`apply`), is tensor work alone: no generator, no shape
that depends on data, no wait for the device; it can be compiled or recorded.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from idaa_lib.views.operations import (
    color_jitter,
    draw_crops,
    gaussian_blur,
    luma,
    normalise,
    resized_crop,
    row,
    send,
)

Params = dict[str, Tensor]
"""The parameters of views: a row a sample, float unless said. A neutral value changes nothing.

| name | shape | what | neutral |
|---|---|---|---|
| `source` | (B, 2) | height and width of the source image in pixels | |
| `crop` | (B, 4) | top, left, height, width in source pixels | the whole image |
| `flip` | (B, 1) | 1 where mirrored | 0 |
| `color` | (B, 4) | brightness, contrast and saturation factors; hue shift in turns | 1, 1, 1, 0 |
| `order` | (B, 4) | the four parts of `color` (int64) in the order they are applied | any |
| `color_diff` | (B, 3) | mean of each channel in [0, 1] before the jitter minus after it | 0 |
| `gray` | (B, 1) | 1 where turned gray | 0 |
| `blur` | (B, 1) | standard deviation in pixels of the view | 0 |
"""

NO_JITTER = (1, 1, 1, 0)


class View(NamedTuple):
    """Normalised images (B, 3, size, size) and, on their device, the parameters that made them."""

    images: Tensor
    params: Params


@dataclass(frozen=True)
class Recipe:
    """One paper's augmentation: the ranges and probabilities of what is drawn.

    Flip is applied together with the crop wherever a paper puts it: every later operation here
    commutes with a mirror, so the place makes no difference.
    """

    size: int  # side of a view in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_scale: tuple[float, float] | None = None  # share of the area; None: the whole image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    shift: float = 0.0  # without a crop: by at most this share of a side, continued by mirroring
    flip: float = 0.0  # probability, as are `jitter_probability`, `gray` and `blur`
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # as ColorJitter's arguments
    jitter_probability: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    kernels: tuple[int, float] = (1, math.inf)  # least and greatest side of the blur's kernel

    @property
    def blur_kernel(self) -> int:
        """Side of the blur's kernel: a tenth of the image, 3 at 32 px, 23 at 224, in `kernels`; no
        more than an image reflects at its border."""
        low, high = self.kernels
        return int(min(max(2 * (self.size // 20) + 1, low), high, 2 * self.size - 1))

    @property
    def jitter_range(self) -> tuple[list[float], list[float]]:
        """Least and greatest values of the four parts of `color`."""
        *factors, hue = self.jitter
        return [*(max(0, 1 - f) for f in factors), -hue], [*(1 + f for f in factors), hue]

    @property
    def columns(self) -> dict[str, int]:
        """How many numbers a view takes for what, in the order of drawing; 0 where never."""
        jitter, blur = self.jitter_probability > 0, self.blur > 0
        return {
            "crop_sides": 20 * (self.crop_scale is not None),
            "corner": 2 * (self.crop_scale is not None or self.shift > 0),
            "flip": int(self.flip > 0),
            "jitter": int(jitter),
            "color": 4 * jitter,
            "order": 4 * jitter,
            "gray": int(self.gray > 0),
            "blur": int(blur),
            "sigma": int(blur),
        }

    def numbers(self, n: int, generator: torch.Generator | None) -> Tensor:
        """The random numbers in [0, 1) that n views take: (n, ·), a row per sample, on the CPU.

        What the recipe never does takes none, so `none` needs no generator; elsewhere None is
        torch's global one. They are float64, so that integers made of them are unbiased.
        """
        shapes = [(n, columns) for columns in self.columns.values()]
        uniform = [torch.rand(s, dtype=torch.float64, generator=generator) for s in shapes]
        return torch.cat(uniform, 1)

    def parameters(
        self, numbers: Tensor, source: Sequence[int] | Tensor, cut: Tensor | None = None
    ) -> Params:
        """What `numbers` (n, ·) mean, on their device: all parameters but `color_diff`.

        source: height and width in pixels, of all images (2,) or of each (n, 2). cut: as `view`.
        """
        sides = source if isinstance(source, Tensor) else row(source, numbers)
        columns = self.columns
        uniform = dict(zip(columns, numbers.split([*columns.values()], 1), strict=True))
        params = self._interpret(uniform, sides.to(numbers).expand(len(numbers), 2))
        if cut is not None:
            params |= {"source": cut[:, :2], "crop": cut[:, 2:]}
        return {k: v if v.dtype == torch.int64 else v.float() for k, v in params.items()}

    def cut(self, numbers: Tensor, sizes: Tensor) -> Tensor:
        """The `cut` (n, 6) of `view`, of originals of these sizes (n, 2), by numbers (n, ·)."""
        params = self.parameters(numbers, sizes)
        return torch.cat([params["source"], params["crop"]], 1)

    def _interpret(self, uniform: Params, source: Tensor) -> Params:
        """`parameters` from named numbers, each (n, its columns), and sides (n, 2)."""

        def happens(name: str, probability: float) -> Tensor:  # of no number: False
            return (uniform[name] < probability).any(1, keepdim=True)

        if self.crop_scale is not None:
            attempts = uniform["crop_sides"].unflatten(1, (10, 2))
            crop = draw_crops(attempts, uniform["corner"], source, self.crop_scale, self.crop_ratio)
        else:
            corner = torch.zeros_like(source)
            if self.shift:
                room = (self.shift * source).floor()
                corner = (uniform["corner"] * (2 * room + 1)).floor() - room
            crop = torch.cat([corner, source], 1)
        color = row(NO_JITTER, source).expand(len(source), 4)
        order = torch.arange(4, device=source.device).expand(len(source), 4)
        if self.jitter_probability:
            low, high = (row(ends, source) for ends in self.jitter_range)
            jittered = low.lerp(high, uniform["color"])
            color = torch.where(happens("jitter", self.jitter_probability), jittered, color)
            order = uniform["order"].argsort(1)
        low_sigma, high_sigma = self.blur_sigma
        sigma = (low_sigma + (high_sigma - low_sigma) * uniform["sigma"]).sum(1, keepdim=True)
        return {
            "source": source,
            "crop": crop,
            "flip": happens("flip", self.flip),
            "color": color,
            "order": order,
            "gray": happens("gray", self.gray),
            "blur": happens("blur", self.blur) * sigma,
        }

    def view(self, images: Tensor, numbers: Tensor, cut: Tensor | None = None) -> View:
        """The view of each of uint8 images (B, 3, H, W) that `numbers` (B, ·) stand for.

        cut: where the images are crops already, of originals (streamed photographs): height and
        width of these, and the boxes that were cut of them (B, 6).
        """
        params = self.parameters(numbers, images.shape[2:], cut)
        return self.apply(images, params, cut is not None)

    def apply(self, images: Tensor, params: Params, is_cut: bool = False) -> View:
        """The views of uint8 images (B, 3, H, W) by parameters, here or on the images' device."""
        params = {name: send(value, images.device) for name, value in params.items()}
        x, params = self.photometry(self.geometry(images, params, is_cut), params)
        return View(normalise(x, self.mean, self.std), params)

    def pair(self, images: Tensor, numbers: Tensor, cut: Tensor | None = None) -> tuple[View, View]:
        """Two views by the same numbers: before the photometry (crop and flip alone), and after.

        The photometric parameters of the first are neutral. cut: as `view`.
        """
        after = self.parameters(numbers, images.shape[2:], cut)
        after = {name: send(value, images.device) for name, value in after.items()}
        x = self.geometry(images, after, cut is not None)
        keys = ("source", "crop", "flip", "order")
        before = {k: v if k in keys else torch.zeros_like(v) for k, v in after.items()}
        before["color"] = row(NO_JITTER, x).expand(len(x), 4)
        before["color_diff"] = x.new_zeros(len(x), 3)
        y, after = self.photometry(x, after)
        first, second = (normalise(image, self.mean, self.std) for image in (x, y))
        return View(first, before), View(second, after)

    def geometry(self, images: Tensor, params: Params, is_cut: bool = False) -> Tensor:
        """Crop, resize and flip: uint8 (B, 3, H, W) → float in [0, 1] (B, 3, size, size)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            kind = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be uint8 of shape (B, 3, H, W), not {kind}.")
        if is_cut:
            x = images / 255
            return torch.where(params["flip"][..., None, None] > 0, x.flip(3), x)
        height, width = images.shape[2:]
        still = self.crop_scale is None and not self.flip and not self.shift
        if still and height == width == self.size:
            return images / 255
        x, crop = images.float(), params["crop"]
        if self.shift:
            rows, columns = int(self.shift * height), int(self.shift * width)
            x = pad(x, (columns, columns, rows, rows), mode="reflect")
            crop = crop + row((rows, columns, 0, 0), crop)
        return resized_crop(x, crop, params["flip"], self.size).div_(255)

    def photometry(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        """Colour jitter, gray and blur of float images in [0, 1] (B, 3, H, W), and `color_diff`."""
        change = x.new_zeros(len(x), 3)
        if self.jitter_probability:
            mean, color = x.mean((2, 3)), params["color"]
            x = color_jitter(x, color, params["order"])
            jitters = (color != row(NO_JITTER, color)).any(1, keepdim=True)
            change = torch.where(jitters, mean - x.mean((2, 3)), 0)
        if self.gray:
            x = torch.lerp(x, luma(x), params["gray"][..., None, None])
        if self.blur:
            x = gaussian_blur(x, params["blur"], self.blur_kernel)
        return x, params | {"color_diff": change}

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> View:
        """One random view of every uint8 image (B, 3, H, W)."""
        return self.view(images, self.numbers(len(images), generator))


def _crops(
    least: float, *jitter: float, often: float = 0.8, gray: float = 0.2, **further: Any
) -> dict[str, Any]:
    """Mirrored crops of at least this share of the image, jittered (`often`), gray."""
    crop = {"crop_scale": (least, 1.0), "flip": 0.5}
    return crop | {"jitter": jitter, "jitter_probability": often, "gray": gray} | further


RECIPES: dict[str, dict[str, Any]] = {
    "simclr": _crops(0.08, 0.8, 0.8, 0.8, 0.2),
    "simsiam": _crops(0.2, 0.4, 0.4, 0.4, 0.1, blur=0.5),
    "normal": _crops(0.2, 0.4, 0.4, 0.4, 0.4, often=1.0),  # Plain and UEL
    # BYOL on CIFAR-10 as its public code (lightly's benchmark) has it.
    "byol": _crops(0.08, 0.4, 0.4, 0.4, 0.1),
    # The siblings' (docs/spec/siblings.md §1.6, §2.1, §3.1), which blur CIFAR too. At 32 px
    # a kernel of 13 blurs as much as PIL, which has no kernel size; one of 3 blurs half as much.
    "cassle": _crops(0.2, 0.4, 0.4, 0.4, 0.1, blur=0.5),
    "ipirm": _crops(0.08, 0.4, 0.4, 0.4, 0.1, blur=0.5, kernels=(3, 3)),
    "rsa": _crops(0.2, 0.4, 0.4, 0.4, 0.1, blur=0.5, kernels=(13, math.inf)),
    # Pixels still tell an image: for the candidates of notebook 08.
    "mild": _crops(0.8, 0.2, 0.2, 0.2, 0.05, often=1.0, gray=0.0),
    "none": {},  # the test transform: resize where the size differs, normalise; draws nothing
}


def recipe(name: str, size: int, mean: Sequence[float], std: Sequence[float]) -> Recipe:
    """The recipe `name` of `RECIPES` for views of `size` pixels, normalised by `mean` and `std`."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}, which is none of {', '.join(RECIPES)}.")
    constants = RECIPES[name]
    if name == "simsiam" and size == 32:  # SimSiam does not blur CIFAR
        constants = constants | {"blur": 0.0}
    return Recipe(size, tuple(mean), tuple(std), **constants)


def compile_view(make: Callable[..., Any]) -> Callable[..., Any]:
    """`Recipe.view` or `Recipe.pair` in a few kernels, where the images are.

    A batch then costs the host its random numbers and one copy, where the parameters took it sixty
    small operations and six copies: more time than a GPU needs for the views themselves.
    """
    view = torch.compile(make, dynamic=False)
    return lambda images, numbers, *cut: view(images, send(numbers, images.device), *cut)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator for an integer key such as (seed, epoch, step, stream).

    The same key gives the same numbers on every platform; neighbouring keys give unrelated ones.
    torch seeds its CPU generator with 32 bits, so two keys in 2³² share a stream.
    """
    digest = hashlib.sha256(",".join(str(int(part)) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
