"""Pictures of what is trained on just now: `samples/latest.png` of a run, for who watches it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.runs import Run, RunError
from idaa_lib.runs.files import replace
from idaa_lib.views import denormalise

COLUMNS = 8  # images a row at most; fewer where they are large
WIDTH = 1024  # pixels a row at most, where that leaves one image
GAIN = 3.0  # of differences around mid-gray, fixed so that two pictures compare

Row = Tensor | tuple[Tensor, Tensor]


def grid(rows: Sequence[Tensor], labels: Sequence[str] = (), form: str = "png") -> bytes:
    """Rows of images in [0, 1] (N, 3, H, W) as a picture, one screen pixel a pixel, a white line
    below and right of each; `labels` go into a PNG's text `rows` as JSON.

    form: `png`, or `webp` (lossless too), which is encoded three times as fast.
    """
    lines = []
    for pixels in rows:
        framed = F.pad(pixels.clamp(0, 1), (0, 1, 0, 1), value=1.0)
        lines.append(framed.mul(255).round().byte().permute(2, 0, 3, 1).flatten(1, 2))
    picture, encoded = Image.fromarray(torch.cat(lines).numpy()), io.BytesIO()
    if form == "webp":
        picture.save(encoded, form, lossless=True, method=0)
        return encoded.getvalue()
    text = PngImagePlugin.PngInfo()
    if labels:
        text.add_text("rows", json.dumps(list(labels)))
    # Level 1: four times as fast to encode as the default.
    picture.save(encoded, form, pnginfo=text, compress_level=1)
    return encoded.getvalue()


def read(run: Run) -> dict[str, Tensor]:
    """The rows of the run's picture: label → pixels in [0, 1] (N, 3, size, size)."""
    with Image.open(run.path / "samples" / "latest.png") as picture:
        labels = json.loads(picture.info["rows"])
        pixels = torch.from_numpy(np.array(picture)).float() / 255  # (rows·(size + 1), …, 3)
    side = len(pixels) // len(labels)  # with its white line
    tiles = pixels.unflatten(1, (-1, side)).unflatten(0, (-1, side))[:, :-1, :, :-1]
    return dict(zip(labels, tiles.permute(0, 2, 4, 1, 3), strict=True))


def write(run: Run, rows: Mapping[str, Row], mean: Sequence[float], std: Sequence[float]) -> None:
    """Replace the run's picture by a `grid`.

    Args:
        rows: label → normalised images (B, 3, H, W), of which the first are shown, or two of them,
            which are shown as `GAIN` times their difference around mid-gray.
    """
    drawing = {}
    for label, images in rows.items():
        pair = images if isinstance(images, tuple) else (images,)
        n = min(COLUMNS, max(1, WIDTH // pair[0].shape[-1]))
        first, *second = (denormalise(i[:n].detach().float().cpu(), mean, std) for i in pair)
        if second:
            drawing[f"{label}, × {GAIN:g}"] = 0.5 + GAIN * (first - second[0])
        else:
            drawing[label] = first
    path = run.path / "samples" / "latest.png"
    # A disk that is full stops the run at its next checkpoint.
    with contextlib.suppress(RunError, OSError):
        path.parent.mkdir(exist_ok=True)
        replace(path, grid(list(drawing.values()), list(drawing)))
