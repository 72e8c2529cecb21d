"""Images with boxes and masks in COCO's format, by torchvision's own reader, and their AP.

COCO: Lin et al. 2014 (arXiv:1405.0312), https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from idaa_lib.configs import ConfigError

Target = dict[str, Tensor]
"""What an image shows, a row per object: `boxes` (N, 4) x1, y1, x2, y2 in pixels; `labels` (N,),
1…classes; `masks` (N, H, W) uint8, where the set has them; `iscrowd` (N,); `area` (N,) pixels."""

# What a training image goes through, after its crowds are left out: boxes cut to the image that
# are at least a pixel wide and high, one flip in two (torch's own generator decides).
AUGMENT = v2.Compose(
    [
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(
            labels_getter=lambda sample: [sample[1][k] for k in ("labels", "iscrowd", "area")]
        ),
        v2.RandomHorizontalFlip(0.5),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
    ]
)


class CocoSet(Dataset[tuple[Tensor, Target]]):
    """Item i: a uint8 image (3, H, W) and its `Target`, as annotated.

    Args:
        images: the folder that `file_name` is relative to. annotations: the JSON file.
        masks: give the objects' masks too.

    `classes` has the names, label 1 first, in the order of their ids; `unmasked` counts the
    objects without a segmentation; `useful` lists the images with an object to train on;
    `fingerprint` is of the annotations, and of the images' names and sizes in bytes.

    Raises:
        ConfigError: a file is missing, or is not in COCO's format.
    """

    def __init__(self, images: Path, annotations: Path, masks: bool = True) -> None:
        self.annotations = annotations
        for path in (images, annotations):
            if not path.exists():
                raise ConfigError(f"There is no {path}, which should hold a COCO-format set.")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                self.data = CocoDetection(images, annotations)
            self.coco, self.ids = self.data.coco, self.data.ids
            categories = sorted(self.coco.cats)
            self.classes = tuple(self.coco.cats[i]["name"] for i in categories)
            self._labels = {category: label for label, category in enumerate(categories, 1)}
            files = [images / self.coco.imgs[i]["file_name"] for i in self.ids]
            objects = list(self.coco.anns.values())
            for each in objects:
                _ = self._labels[each["category_id"]]
                _, _, width, height = each["bbox"]
                each.setdefault("iscrowd", 0)
                each.setdefault("area", width * height)
        except (OSError, ValueError, AssertionError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{annotations} is not in COCO's format ({type(error).__name__}: {error})."
            ) from error
        if not objects:
            raise ConfigError(f"{annotations} has no annotated object.")
        self.objects = len(objects)
        self.unmasked = sum(not each.get("segmentation") for each in objects)
        annotated = [self.coco.imgToAnns[i] for i in self.ids]
        self.useful = [i for i, each in enumerate(annotated) if any(map(_is_trained_on, each))]
        digest = hashlib.sha256(annotations.read_bytes())
        for path in files:
            try:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            except OSError as error:
                raise ConfigError(f"{annotations} names {path}, which is missing.") from error
        self.fingerprint = digest.hexdigest()
        self.give_masks(masks)

    def give_masks(self, masks: bool) -> None:
        """From now on, targets have masks or not."""
        self.masks = masks
        keys = {"boxes", "labels", "iscrowd", "area"} | ({"masks"} if masks else set())
        self._items = wrap_dataset_for_transforms_v2(self.data, target_keys=keys)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, values = self._items[index]
        image = v2.functional.pil_to_tensor(image)
        size = image.shape[-2:]
        if "boxes" not in values:  # torchvision's target of an image without objects
            values = {"boxes": torch.zeros(0, 4), "labels": (), "iscrowd": (), "area": ()}
            values |= {"masks": torch.zeros(0, *size, dtype=torch.uint8)} if self.masks else {}
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                values["boxes"], format="XYXY", canvas_size=size, dtype=torch.float32
            ),
            "labels": torch.tensor([self._labels[int(i)] for i in values["labels"]]).long(),
            "iscrowd": torch.tensor(values["iscrowd"]).long(),
            "area": torch.tensor(values["area"], dtype=torch.float32),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(values["masks"])
        return tv_tensors.Image(image), target


def _is_trained_on(annotation: dict[str, Any]) -> bool:
    return not annotation["iscrowd"] and min(annotation["bbox"][2:]) >= 1


def for_training(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The image as float in [0, 1], perhaps mirrored, with the objects that are trained on: no
    crowds, and boxes cut to the image that are at least a pixel wide and high."""
    one = target["iscrowd"] == 0
    chosen = {k: tv_tensors.wrap(values[one], like=values) for k, values in target.items()}
    return AUGMENT(image, chosen)


def average_precision(pairs: Iterable[tuple[Target, Target]]) -> dict[str, float]:
    """`box_ap`, `box_ap50`, `box_ap75` and, where there are masks, `mask_ap`, … in percent: COCO's
    own evaluation (pycocotools) of (prediction, annotation) of each image, crowds ignored."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = None
    for prediction, target in pairs:
        if metric is None:
            masks = "masks" in target
            # COCO's own thresholds: torchmetrics rounds its to float32, and a recall that equals
            # one falls on its other side.
            metric = MeanAveragePrecision(
                iou_type=("bbox", "segm") if masks else "bbox",
                iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
                rec_thresholds=np.linspace(0, 1, 101).tolist(),
            )
        metric.update([prediction], [target])
    assert metric is not None
    values = metric.compute()
    prefixes = {"box": "bbox_", "mask": "segm_"} if masks else {"box": ""}
    return {
        f"{name}_ap{strictness}": 100 * values[f"{prefix}map{key}"].item()
        for name, prefix in prefixes.items()
        for strictness, key in (("", ""), ("50", "_50"), ("75", "_75"))
    }
