"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) and cutout, as FixMatch makes strong views.

FixMatch's 14 operations and ranges (Sohn et al. 2020, arXiv:2001.07685, Table 12, in the public
PyTorch recipe): `operations` of them are drawn with replacement, each with a strength of its own
and done with probability ½, before a gray square of half the side covers a part of the image.

Each batch goes through three operations: a table of 256 levels, a blend with another image, an
affine map. A sample that did not draw an operation has its neutral parameters there. Pixels are
8-bit levels as float, and each operation ends with whole levels, as PIL's do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from idaa_lib.views.operations import row
from idaa_lib.views.recipes import Params, Recipe

# Of an operation's strength, which is bias + range · v/10 with v from 1 … magnitude − 1: range and
# bias, in bits, levels, factors, degrees, slopes or shares of the side; 1 where it is rounded down.
OPERATIONS = {
    "identity": (0, 0, 0), "autocontrast": (0, 0, 0), "equalize": (0, 0, 0),
    "posterize": (4, 4, 1), "solarize": (256, 0, 1), "brightness": (0.9, 0.05, 0),
    "color": (0.9, 0.05, 0), "contrast": (0.9, 0.05, 0), "sharpness": (0.9, 0.05, 0),
    "rotate": (30, 0, 1), "shear_x": (0.3, 0, 0), "shear_y": (0.3, 0, 0),
    "translate_x": (0.3, 0, 1), "translate_y": (0.3, 0, 1),
}  # fmt: skip
INDEX = {name: index for index, name in enumerate(OPERATIONS)}
GRAY = 127.0


@dataclass(frozen=True)
class RandAugment(Recipe):
    """A recipe whose views are augmented further; its parameters beside those of `Recipe`:

    | name | shape | what | neutral |
    |---|---|---|---|
    | `operations` | (B, n) | indices in `OPERATIONS` (int64), in order | 0 |
    | `strengths` | (B, n) | posterize: bits kept; solarize: threshold; brightness … sharpness: \
factor; rotate: degrees; shear: slope; translate: pixels | any |
    | `cutout` | (B, 4) | top, left, height, width in pixels; may reach over the border | 0 high |

    Cutout's square is centred on a uniformly drawn pixel and cut off at the border (DeVries &
    Taylor 2017, arXiv:1708.04552); the public recipe moves it inside at two of the four sides.
    """

    operations: int = 2
    magnitude: int = 10

    @property
    def columns(self) -> dict[str, int]:
        names = ("operation", "happens", "magnitude", "sign")
        return super().columns | dict.fromkeys(names, self.operations) | {"cutout": 2}

    def _interpret(self, uniform: Params, source: Tensor) -> Params:
        params = super()._interpret(uniform, source)
        choice = (uniform["operation"] * len(OPERATIONS)).long()
        operations = torch.where(uniform["happens"] < 0.5, choice, INDEX["identity"])
        v = 1 + (uniform["magnitude"] * (self.magnitude - 1)).floor()
        side = self.size // 2
        corner = (uniform["cutout"] * self.size).floor() - side // 2
        return params | {
            "operations": operations,
            "strengths": strengths_of(operations, v, uniform["sign"] < 0.5, self.size),
            "cutout": torch.cat([corner, torch.full_like(corner, side)], 1),
        }

    def photometry(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        x, params = super().photometry(x, params)
        x = x.mul(255).round()
        for k in range(self.operations):
            x = augment(x, params["operations"][:, k], params["strengths"][:, k])
        return cutout(x, params["cutout"]) / 255, params


def strengths_of(operations: Tensor, v: Tensor, negative: Tensor, size: int) -> Tensor:
    """Strengths, in each operation's units, of `v` in 1 … 9; all arguments of one shape."""
    columns = zip(*OPERATIONS.values(), strict=True)
    scale, bias, whole = (row(column, v)[operations] for column in columns)
    strength = scale * v / 10
    strength = torch.where(operations >= INDEX["translate_x"], strength * size, strength)
    strength = torch.where(whole > 0, strength.floor(), strength) + bias
    strength = torch.where(operations == INDEX["solarize"], 256 - strength, strength)
    return torch.where((operations >= INDEX["rotate"]) & negative, -strength, strength)


def augment(x: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """One operation (B,) of one strength (B,) on each image: levels (B, 3, H, W) → the same."""
    x = look_up(x, operation, strength)
    x = blend(x, operation, strength)
    return warp(x, operation, strength)


def look_up(x: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Autocontrast, equalize, posterize and solarize: a table of levels for each channel."""
    pixels = x.long().flatten(2)  # (B, 3, H·W)
    level = torch.arange(256, device=x.device)
    count = torch.zeros(*x.shape[:2], 256, dtype=torch.long, device=x.device)
    count = count.scatter_add_(2, pixels, torch.ones_like(pixels))
    low = torch.where(count > 0, level, 255).amin(2, keepdim=True)
    high = torch.where(count > 0, level, 0).amax(2, keepdim=True)
    stretched = 255 * (level - low) // (high - low).clamp(min=1)
    stretched = torch.where(high > low, stretched.clamp(0, 255), level)
    step = (pixels.shape[2] - count.gather(2, high)) // 255
    below = count.cumsum(2) - count
    equalized = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    equalized = torch.where(step > 0, equalized, level)

    operation, strength = operation[:, None, None], strength[:, None, None].long()
    quantum = 2 ** (8 - strength.clamp(0, 8))
    table = torch.where(operation == INDEX["autocontrast"], stretched, level)
    table = torch.where(operation == INDEX["equalize"], equalized, table)
    table = torch.where(operation == INDEX["posterize"], level - level % quantum, table)
    inverted = (operation == INDEX["solarize"]) & (level >= strength)
    table = torch.where(inverted, 255 - level, table)
    return table.gather(2, pixels).view(x.shape).to(x.dtype)


def blend(x: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Brightness, color, contrast and sharpness: from black, the pixel's gray, the image's mean
    gray and the smoothed image (factor 0) to the image itself (1)."""
    red, green, blue = x.split(1, 1)
    gray = ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()  # PIL's
    mean = (gray.mean((1, 2, 3), keepdim=True) + 0.5).floor()
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    inner = x[..., 1:-1, 1:-1]
    weighted = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    smooth = x.clone()  # the border stays
    smooth[..., 1:-1, 1:-1] = (weighted / 13 + 0.5).floor()

    operation, strength = operation[:, None, None, None], strength[:, None, None, None]
    other = torch.where(operation == INDEX["color"], gray, torch.zeros_like(x))
    other = torch.where(operation == INDEX["contrast"], mean, other)
    other = torch.where(operation == INDEX["sharpness"], smooth, other)
    blends = (operation >= INDEX["brightness"]) & (operation <= INDEX["sharpness"])
    return (other + torch.where(blends, strength, 1) * (x - other)).floor()


def warp(x: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Rotation about the centre, shears and translations: nearest pixel, black outside.

    In PIL's fixed-point numbers of 16 bits, so that ties between two pixels fall alike.
    """
    height, width = x.shape[2:]

    def own(name: str) -> Tensor:  # the strength, 0 where the operation is another
        return (operation == INDEX[name]) * strength

    turn = own("rotate") * (math.pi / 180)
    cos, sin = turn.cos(), turn.sin()
    # The source (column, row) of an output pixel's centre: [[cos, −sin], [sin, cos]], and more.
    across, down = own("shear_x") - sin, own("shear_y") + sin
    left = own("translate_x") + (1 - cos) * width / 2 + sin * height / 2
    top = own("translate_y") - sin * width / 2 + (1 - cos) * height / 2

    def to_fixed(value: Tensor) -> Tensor:
        return (value * 65536 + 0.5).floor().long()[:, None, None]

    row = torch.arange(height, device=x.device)[:, None]
    column = torch.arange(width, device=x.device)
    start = to_fixed(left + cos / 2 + across / 2), to_fixed(top + down / 2 + cos / 2)
    from_column = (start[0] + to_fixed(cos) * column + to_fixed(across) * row) >> 16  # (B, H, W)
    from_row = (start[1] + to_fixed(down) * column + to_fixed(cos) * row) >> 16
    inside = (from_column >= 0) & (from_column < width) & (from_row >= 0) & (from_row < height)
    source = from_row.clamp(0, height - 1) * width + from_column.clamp(0, width - 1)
    moved = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, 3, -1)).view(x.shape)
    return moved * inside[:, None]


def cutout(x: Tensor, box: Tensor) -> Tensor:
    """Levels (B, 3, H, W) with gray where the boxes (B, 4) are."""
    top, left, height, width = box[..., None, None].split(1, 1)  # (B, 1, 1, 1)
    row = torch.arange(x.shape[2], device=x.device)[:, None]
    column = torch.arange(x.shape[3], device=x.device)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return torch.where(inside, GRAY, x)
