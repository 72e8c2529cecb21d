"""Figures of images with annotated or detected objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from coco import Target
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from idaa_lib.lab import style


@style.look()
def pictures(
    images: Sequence[Tensor],
    rows: Mapping[str, Sequence[Target]],
    classes: Sequence[str],
    threshold: float = 0.5,
) -> Figure:
    """A figure of images with boxes, names and masks on them, a line for each row.

    Args:
        images: uint8 (3, H, W). rows: label → objects of each image; those with a score below
            `threshold` are left out.
        classes: names of labels 1, 2, ….
    """
    size = (2.6 * len(images), 2.3 * len(rows))
    figure, grid = style.axes(len(rows), len(images), figsize=size, squeeze=False)
    for line, (label, targets) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(label)
        for axis, image, objects in zip(line, images, targets, strict=True):
            pixels = image.permute(1, 2, 0).numpy().copy()
            axis.grid(False)
            axis.set(xticks=[], yticks=[])
            for i, name in enumerate(objects["labels"].tolist()):
                score = objects["scores"][i].item() if "scores" in objects else None
                if score is not None and score < threshold:
                    continue
                colour = style.PALETTE[name % len(style.PALETTE)]
                if "masks" in objects:
                    mask = objects["masks"][i].bool().numpy()
                    tint = [255 * part for part in to_rgb(colour)]
                    pixels[mask] = (0.5 * pixels[mask] + 0.5 * np.array(tint)).astype("u1")
                x1, y1, x2, y2 = objects["boxes"][i].tolist()
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2))
                text = classes[name - 1] + (f" {score:.2f}" if score is not None else "")
                axis.text(
                    x1,
                    y1,
                    text,
                    color="white",
                    fontsize=7,
                    va="bottom",
                    bbox=dict(facecolor=colour, edgecolor="none", pad=1),
                )
            axis.imshow(pixels)
    return figure
