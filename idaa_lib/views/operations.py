"""What views are made with: each operation on a batch, with parameters of its own for each sample.

Pixels are float in [0, 1]. Each operation agrees with torchvision's on float tensors; unlike PIL,
nothing is rounded to 8 bits on the way. None of them reads a value back or has a shape that depends
on data, so all can be compiled or recorded.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softmax

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering, in `color` and `order`


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


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied asynchronously, which needs pinned memory."""
    waits = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if waits else tensor).to(device, non_blocking=True)


def row(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor (n,) of the dtype and on the device of `like`, without a copy to it."""
    return torch.stack([like.new_full((), value) for value in values])


def draw_crops(
    sides: Tensor,
    corners: Tensor,
    source: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """RandomResizedCrop's boxes (n, 4) in pixels: top, left, height, width.

    torchvision tries ten times for a box that fits, then takes the largest central one of an
    allowed ratio; here the ten are made at once and the first that fits is kept.

    sides (n, 10, 2), corners (n, 2): uniform numbers. source: (n, 2), height and width.
    """
    area = source.prod(1, keepdim=True) * (scale[0] + (scale[1] - scale[0]) * sides[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * sides[..., 1]).exp()
    attempts = torch.stack([area / aspect, area * aspect], -1).sqrt().round()  # (n, 10, 2)
    fits = ((attempts > 0) & (attempts <= source[:, None])).all(-1)
    place = torch.arange(fits.shape[1], device=fits.device)
    first = torch.where(fits, place, len(place)).amin(1, keepdim=True)  # (n, 1)
    fitting = attempts.gather(1, first.clamp(max=len(place) - 1)[..., None].expand(-1, 1, 2))[:, 0]
    largest = torch.stack([source[:, 1] / ratio[0], source[:, 0] * ratio[1]], 1).round()
    box = torch.where(first < len(place), fitting, largest.minimum(source))
    room = source - box
    corner = torch.where(first < len(place), corners * (room + 1), room / 2).floor()
    return torch.cat([corner, box], 1)


def resized_crop(x: Tensor, crop: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop x (B, 3, H, W) to its boxes, resize bilinearly, mirror: → (B, 3, size, size)."""
    top, left, height, width = crop.split(1, 1)
    rows = weigh_pixels(top, height, torch.zeros_like(flip), x.shape[2], size)
    columns = weigh_pixels(left, width, flip, x.shape[3], size)
    return filter_sides(x, rows, columns)


def weigh_pixels(start: Tensor, length: Tensor, mirror: Tensor, source: int, size: int) -> Tensor:
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


def filter_sides(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image of x (B, 3, H, W) times its own matrices (B, S, H) and (B, S, W): (B, 3, S, S)."""
    return torch.einsum("bih,bchw,bjw->bcij", rows, x, columns)


def luma(x: Tensor) -> Tensor:
    """Gray values (B, 1, H, W) of x (B, 3, H, W), with torchvision's weights."""
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def color_jitter(x: Tensor, color: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of x (B, 3, H, W), in each sample's own order.

    Hue costs as much as four of the others, so it is computed once: three steps before it, three
    after; in those that are not its own, a sample takes the factor 1. On a CPU that is three times
    as fast as all four parts at all four places.

    color (B, 4): three factors, and the hue's shift in turns. order (B, 4): a permutation.
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
    return filter_sides(x, matrix, matrix)
