"""Batched random views: each paper's augmentation, drawn per sample and applied on any device.

A view is made in two steps. `Recipe.numbers` draws what is random about a whole (global) batch on
the CPU from a `torch.Generator`; a process keeps its rows of it. `Recipe.made`, which finds the
parameters (`parameters`) and the views (`apply`), is tensor work alone: no generator, no shape that
depends on data, no wait for the device; it can be compiled or captured.

Pixels are float in [0, 1] between the operations. Each operation agrees with torchvision's on float
tensors; unlike PIL, nothing is rounded to 8 bits on the way.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softmax

Params = dict[str, Tensor]
"""The drawn parameters, a row per sample, float unless said. A neutral value changes nothing.

| name | shape | what | neutral |
|---|---|---|---|
| `crop` | (B, 4) | top, left, height, width in source pixels | the whole image |
| `flip` | (B, 1) | 1 where mirrored | 0 |
| `color` | (B, 4) | brightness, contrast and saturation factors; hue shift in turns | 1, 1, 1, 0 |
| `order` | (B, 4) | the four parts of `color` (int64) in the order they are applied | any |
| `gray` | (B, 1) | 1 where turned gray | 0 |
| `blur` | (B, 1) | standard deviation in pixels of the view | 0 |
"""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering, in `color` and `order`


class Views(NamedTuple):
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

    @property
    def blur_kernel(self) -> int:
        """Side of the blur's kernel: about a tenth of the image, 3 at 32 px and 23 at 224 px."""
        return 2 * (self.size // 20) + 1

    def numbers(self, n: int, generator: torch.Generator | None) -> Tensor:
        """The random numbers in [0, 1) that n views take: (n, ·), a row per sample, on the CPU.

        What the recipe never does takes none, so `none` needs no generator; elsewhere None is
        torch's global one. They are float64, so that integers made of them are unbiased.
        """
        return torch.cat(
            [
                torch.rand(n, columns, dtype=torch.float64, generator=generator)
                for columns in (0, *self._columns())
            ],
            1,
        )

    def _columns(self) -> list[int]:
        """How many `parameters` asks for at a time."""
        crop = [20, 2] if self.crop_scale is not None else [2] if self.shift else []
        flip, gray = [1] if self.flip else [], [1] if self.gray else []
        jitter = [1, 4, 4] if self.jitter_probability else []
        return [*crop, *flip, *jitter, *gray, *([1, 1] if self.blur else [])]

    def parameters(self, numbers: Tensor, image_size: Sequence[int]) -> Params:
        """What `numbers` (n, ·) mean for images of `image_size` (height, width), on their device.

        What the recipe never does gets its neutral value.
        """
        return self._meaning(numbers, iter(numbers.split(self._columns(), 1)), image_size)

    def _meaning(
        self, numbers: Tensor, given: Iterator[Tensor], image_size: Sequence[int]
    ) -> Params:
        """`parameters`, of all numbers and of their columns in the order of use."""
        (height, width), n = image_size, len(numbers)

        def happens(probability: float) -> Tensor:
            if not probability:
                return numbers.new_zeros(n, 1, dtype=torch.bool)
            return next(given) < probability

        if self.crop_scale is None:
            crop = row((0, 0, height, width), numbers).expand(n, 4)
            if self.shift:
                room = row(self._margin(image_size), numbers)
                corner = (next(given) * (2 * room + 1)).floor() - room
                crop = torch.cat([corner, crop[:, 2:]], 1)
        else:
            sides, corners = next(given).unflatten(1, (10, 2)), next(given)
            crop = draw_crops(sides, corners, (height, width), self.crop_scale, self.crop_ratio)
        flip = happens(self.flip)
        color = row((1, 1, 1, 0), numbers).expand(n, 4)
        place = torch.arange(4, device=numbers.device)
        order = place.expand(n, 4)
        if self.jitter_probability:
            *factors, hue = self.jitter
            low = row([*(max(0, 1 - f) for f in factors), -hue], numbers).expand(n, 4)
            high = row([*(1 + f for f in factors), hue], numbers).expand(n, 4)
            color = torch.where(
                happens(self.jitter_probability), low.lerp(high, next(given)), color
            )
            # Sorted by random numbers; no two are equal but once in 2⁵³.
            by = next(given)
            rank = (by[:, None] < by[:, :, None]).sum(2)
            order = ((rank[:, None] == place[:, None]) * place).sum(2)
        gray = happens(self.gray)
        sigma = numbers.new_zeros(n, 1)
        if self.blur:
            weakest, strongest = self.blur_sigma
            sigma = happens(self.blur) * (weakest + (strongest - weakest) * next(given))
        params = {"crop": crop, "flip": flip, "color": color, "gray": gray, "blur": sigma}
        return {name: value.float() for name, value in params.items()} | {"order": order}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """The views (B, 3, size, size), normalised, of uint8 images (B, 3, H, W)."""
        params = to_device(params, images.device)
        x = self.photometry(self.geometry(images, params), params)
        return normalise(x, self.mean, self.std)

    def geometry(self, images: Tensor, params: Params) -> Tensor:
        """Crop, resize and flip: uint8 (B, 3, H, W) → float in [0, 1] (B, 3, size, size)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be uint8 of shape (B, 3, H, W), not {got}.")
        height, width = images.shape[2:]
        still = self.crop_scale is None and not self.flip and not self.shift
        if still and height == width == self.size:
            return images / 255
        x, crop = images.float(), params["crop"]
        if self.shift:
            rows, columns = self._margin((height, width))
            x = pad(x, (columns, columns, rows, rows), mode="reflect")
            top, left, *sides = crop.split(1, 1)
            crop = torch.cat([top + rows, left + columns, *sides], 1)
        return resized_crop(x, crop, params["flip"], self.size).div_(255)

    def _margin(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns that a shift may move by."""
        height, width = image_size
        return int(self.shift * height), int(self.shift * width)

    def photometry(self, x: Tensor, params: Params) -> Tensor:
        """Colour jitter, gray and blur: float in [0, 1] (B, 3, H, W) → the same."""
        if self.jitter_probability:
            x = color_jitter(x, params["color"], params["order"])
        if self.gray:
            x = torch.lerp(x, luma(x), params["gray"][..., None, None])
        if self.blur:
            x = gaussian_blur(x, params["blur"], self.blur_kernel)
        return x

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Views:
        """One random view of every uint8 image (B, 3, H, W)."""
        return self.made(images, self.numbers(len(images), generator))

    def made(self, images: Tensor, numbers: Tensor) -> Views:
        """The view of each of uint8 images (B, 3, H, W) that `numbers` (B, ·) stand for."""
        params = to_device(self.parameters(numbers, images.shape[2:]), images.device)
        return Views(self.apply(images, params), params)


RECIPES: dict[str, dict[str, Any]] = {
    "simclr": {"crop_scale": (0.08, 1.0), "flip": 0.5, "gray": 0.2}
    | {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_probability": 0.8},
    "simsiam": {"crop_scale": (0.2, 1.0), "flip": 0.5, "gray": 0.2, "blur": 0.5}
    | {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_probability": 0.8},
    "normal": {"crop_scale": (0.2, 1.0), "flip": 0.5, "gray": 0.2}  # Plain and UEL
    | {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_probability": 1.0},
    # BYOL on CIFAR-10 as its public code (lightly's benchmark) has it.
    "byol": {"crop_scale": (0.08, 1.0), "flip": 0.5, "gray": 0.2}
    | {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_probability": 0.8},
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


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator for an integer key such as (seed, epoch, step, stream).

    The same key gives the same numbers on every platform; neighbouring keys give unrelated ones.
    torch seeds its CPU generator with 32 bits, so two keys in 2³² share a stream.
    """
    digest = hashlib.sha256(",".join(str(int(part)) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std by channel of images (…, 3, H, W), uint8 or float in [0, 1]."""
    x = images / 255 if images.dtype == torch.uint8 else images
    # Numbers, not tensors of three: each call would wait for those to be copied to the device.
    channels = zip(x.unbind(-3), mean, std, strict=True)
    return torch.stack([(channel - m) / s for channel, m, s in channels], -3)


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalise`: float in [0, 1]."""
    channels = zip(images.unbind(-3), mean, std, strict=True)
    return torch.stack([channel * s + m for channel, m, s in channels], -3)


def to_device(params: Params, device: torch.device) -> Params:
    return {name: sent(value, device) for name, value in params.items()}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """It on the device, without waiting for what that still computes: a GPU copies memory that is
    not pinned only when it is done, from a certain size on."""
    waits = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if waits else tensor).to(device, non_blocking=True)


def compiled(recipe: Recipe) -> Callable[[Tensor, Tensor], Views]:
    """`recipe.made` in a few kernels, where the images are.

    A batch then costs the host its random numbers and one copy, where the parameters took it sixty
    small operations and six copies: more time than a GPU needs for the views themselves.
    """
    made = torch.compile(recipe.made, dynamic=False)

    def on_device(images: Tensor, numbers: Tensor) -> Views:
        return made(images, sent(numbers, images.device))

    return on_device


def row(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of the kind of `like`, by no copy to its device."""
    return torch.stack([like.new_full((), value) for value in values])


def draw_crops(
    sides: Tensor,
    corners: Tensor,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """RandomResizedCrop's boxes (n, 4) from uniform numbers `sides` (n, 10, 2), `corners` (n, 2).

    torchvision tries ten times for a box that fits, then takes the largest central one of an
    allowed ratio; here the ten are made at once and the first that fits is kept.
    """
    height, width = image_size
    bounds = row((height, width), sides)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * sides[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * sides[..., 1]).exp()
    tried = torch.stack([area / aspect, area * aspect], -1).sqrt().round()  # (n, 10, 2)
    fits = ((tried > 0) & (tried <= bounds)).all(-1)
    attempts = fits.shape[1]
    attempt = torch.arange(attempts, device=fits.device)
    first = torch.where(fits, attempt, attempts).amin(1, keepdim=True)
    found = first < attempts
    fitting = tried.gather(1, first.clamp(max=attempts - 1)[..., None].expand(-1, 1, 2))[:, 0]
    central = (min(height, round(width / ratio[0])), min(width, round(height * ratio[1])))
    box = torch.where(found, fitting, row(central, sides))
    room = bounds - box
    corner = torch.where(found, corners * (room + 1), room / 2).floor()
    return torch.cat([corner, box], 1)


def resized_crop(x: Tensor, crop: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop x (B, 3, H, W) to its boxes, resize bilinearly, mirror: → (B, 3, size, size)."""
    top, left, height, width = crop.split(1, 1)
    rows = interpolation(top, height, torch.zeros_like(flip), x.shape[2], size)
    columns = interpolation(left, width, flip, x.shape[3], size)
    return separable(x, rows, columns)


def interpolation(start: Tensor, length: Tensor, mirror: Tensor, source: int, size: int) -> Tensor:
    """Matrices (B, size, source) that resize [start, start + length) to `size` pixels.

    Bilinear: a triangle around each output pixel's centre, as wide as the step between them where
    that shrinks (antialiasing) and one pixel to each side where it does not.
    """
    output = torch.arange(size, device=start.device) + 0.5
    output = output + mirror * (size - 2 * output)  # (B, size)
    pixel = torch.arange(source, device=start.device) + 0.5 - start  # (B, source), in the box
    step = length / size  # (B, 1)
    distance = (pixel[:, None] - (output * step)[..., None]).abs()  # (B, size, source)
    weight = (1 - distance / step.clamp(min=1)[..., None]).clamp(min=0)
    weight = weight * ((pixel > 0) & (pixel < length))[:, None]
    return weight / weight.sum(2, keepdim=True)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image of x (B, 3, H, W) times its own matrices (B, S, H) and (B, S, W): (B, 3, S, S)."""
    return torch.einsum("bih,bchw,bjw->bcij", rows, x, columns)


def luma(x: Tensor) -> Tensor:
    """Gray values (B, 1, H, W) of x (B, 3, H, W), with torchvision's weights."""
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def color_jitter(x: Tensor, color: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in each sample's own order.

    Hue costs as much as four of the others, so it is computed once: three steps before it, three
    after; in those that are not its own, a sample takes the factor 1. On a CPU that is three times
    as fast as all four parts at all four places, and no shape or index depends on data.
    """
    factors = color.gather(1, order)
    place = torch.arange(4, device=order.device)
    hue_place = (place * (order == HUE)).sum(1, keepdim=True)
    before = torch.where(place < hue_place, factors, 1)
    after = torch.where(place > hue_place, factors, 1)
    for k in (0, 1, 2):
        x = blend(x, before[:, k], order[:, k])
    x = shift_hue(x, color[:, HUE])
    for k in (1, 2, 3):
        x = blend(x, after[:, k], order[:, k])
    return x


def blend(x: Tensor, factor: Tensor, part: Tensor) -> Tensor:
    """clamp(f x + (1 - f) other): brightness, contrast or saturation, by sample.

    `other` is black for brightness, the image's mean gray for contrast, the pixel's gray for
    saturation. `factor` and `part` are (B,).
    """
    gray = luma(x)
    mean = gray.mean((1, 2, 3), keepdim=True)
    of_mean = ((1 - factor) * (part == CONTRAST))[:, None, None, None]
    of_gray = ((1 - factor) * (part == SATURATION))[:, None, None, None]
    other = torch.addcmul(of_mean * mean, of_gray, gray)  # (B, 1, H, W)
    return torch.addcmul(other, factor[:, None, None, None], x).clamp_(0, 1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of x (B, 3, H, W) by `turns` (B,), keeping HSV's value and saturation.

    A channel is a trapezoid of the hue: max within 1/6 turn of its own colour, min beyond 1/3.
    """
    red, green, blue = x.unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    # Sixths of a turn from red, times chroma. `lerp` by 0 or 1: `where` is slower on the CPU.
    sixths = (red - green).add_(chroma, alpha=4)
    sixths = sixths.lerp_((blue - red).add_(chroma, alpha=2), (top == green).float())
    sixths = sixths.lerp_(green - blue, (top == red).float())
    hue = sixths.div_(6 * chroma.clamp(min=1e-12)).add_(turns[:, None, None])
    away = torch.stack([hue, hue - 1 / 3, hue - 2 / 3], 1)  # from red, green, blue, in turns
    away = away.sub_(away.round()).abs_().clamp_(1 / 6, 1 / 3)
    return torch.addcmul((top + chroma)[:, None], (-6 * chroma)[:, None], away)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur x (B, 3, S, S) by its own `sigma` (B, 1), 0 for none; reflecting at the border."""
    side, device = x.shape[-1], x.device
    offset = torch.arange(kernel, device=device) - kernel // 2
    weight = softmax(-(offset**2) / (2 * sigma**2).clamp(min=1e-12), 1)  # (B, kernel)
    pixel = torch.arange(side, device=device)
    tap = (pixel[:, None] + offset).abs()
    tap = side - 1 - (side - 1 - tap).abs()  # (S, kernel): the source pixel of each tap
    taps = (tap.T[..., None] == pixel).float()  # (kernel, S, S)
    matrix = torch.tensordot(weight, taps, 1)
    return separable(x, matrix, matrix)
