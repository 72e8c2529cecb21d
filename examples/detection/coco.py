"""Images with boxes and masks in COCO's format, by torchvision's own reader, and their AP.

COCO: Lin et al. 2014 (arXiv:1405.0312), https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
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


class _Upright(CocoDetection):
    """torchvision's reader; images of the ids `turned` are turned as their note (EXIF) says."""

    turned: frozenset[int] = frozenset()

    def __init__(self, images: Path, annotations: Path) -> None:
        from pycocotools.coco import COCO

        super(CocoDetection, self).__init__(images)  # whose own takes the system's encoding
        self.coco = COCO()
        self.coco.dataset = json.loads(annotations.read_text("utf-8-sig"))
        self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)

    def _load_image(self, id: int) -> Image.Image:
        if id not in self.turned:
            return super()._load_image(id)
        with Image.open(Path(self.root) / self.coco.imgs[id]["file_name"]) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


class CocoSet(Dataset[tuple[Tensor, Target]]):
    """Item i: a uint8 image (3, H, W) and its `Target`, as annotated.

    Args:
        images: the folder that `file_name` is relative to. annotations: the JSON file.
        masks: give the objects' masks too.

    `classes` has the names, label 1 first, in the order of their ids; `unmasked` counts the
    objects without a segmentation; `useful` lists the images with an object to train on;
    `fingerprint` is of the annotations, and of the images' names and sizes in bytes.

    Polygons without an area are left out of an object that has others. A photograph with a note on
    its orientation (EXIF) is read upright, unless its width and height are of the pixels as stored.

    Raises:
        ConfigError: a file is missing, or is not in COCO's format; an image or an annotation does
            not fit, by its id.
    """

    def __init__(self, images: Path, annotations: Path, masks: bool = True) -> None:
        self.annotations = annotations
        for path in (images, annotations):
            if not path.exists():
                raise ConfigError(f"There is no {path}, which should hold a COCO-format set.")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                self.data = _Upright(images, annotations)
            self.coco, self.ids = self.data.coco, self.data.ids
            categories = sorted(self.coco.cats)
            self.classes = tuple(self.coco.cats[i]["name"] for i in categories)
            self._labels = {category: label for label, category in enumerate(categories, 1)}
            files = [images / self.coco.imgs[i]["file_name"] for i in self.ids]
            objects: list[dict[str, Any]] = self.coco.dataset["annotations"]
        except (OSError, ValueError, AssertionError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{annotations} is not in COCO's format ({type(error).__name__}: {error})."
            ) from error
        if not objects:
            raise ConfigError(f"{annotations} has no annotated object.")
        digest = hashlib.sha256(annotations.read_bytes())
        turned = [i for i, path in zip(self.ids, files, strict=True) if self._is_turned(i, path)]
        self.data.turned = frozenset(turned)
        for i, path in zip(self.ids, files, strict=True):
            turn = " upright" * (i in self.data.turned)
            digest.update(f"{path.name} {path.stat().st_size}{turn}\n".encode())
        self.fingerprint = digest.hexdigest()
        for kind in ("images", "annotations"):
            numbers = Counter(each["id"] for each in self.coco.dataset.get(kind, ()))
            if twice := [id_ for id_, n in numbers.items() if n > 1]:
                raise ConfigError(
                    f"{annotations} has more than one of its {kind} with id {twice[0]}: number "
                    f"them anew."
                )
        for each in objects:
            if fault := self._fault(each):
                raise ConfigError(
                    f"{annotations}: annotation {each['id']} {fault}; mend it, or take it out."
                )
        self.objects = len(objects)
        self.unmasked = sum(not each.get("segmentation") for each in objects)
        annotated = [self.coco.imgToAnns[i] for i in self.ids]
        self.useful = [i for i, each in enumerate(annotated) if any(map(_is_trained_on, each))]
        self.give_masks(masks)

    def _is_turned(self, id_: int, path: Path) -> bool:
        """Whether an image is to be turned as its note says.

        Raises:
            ConfigError: it is missing, no image, or of another size than stated.
        """
        about, objects = self.coco.imgs[id_], self.coco.imgToAnns.get(id_, ())
        whose = f"image {id_}" + (f" of annotation {objects[0]['id']}" if objects else "")
        try:
            with Image.open(path) as image:
                stored, exif = image.size, "exif" in image.info  # else a PNG would be decoded here
                note = image.getexif().get(ExifTags.Base.Orientation, 1) if exif else 1
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.annotations} names {path}, which is missing ({whose}): add it, or take it "
                f"out."
            ) from error
        except (OSError, ValueError) as error:  # of a name that no file can have
            raise ConfigError(f"{path} is no image that can be read ({whose}).") from error
        upright = stored[::-1] if note >= 5 else stored
        width = about.setdefault("width", upright[0])
        height = about.setdefault("height", upright[1])
        if (width, height) not in (stored, upright):
            raise ConfigError(
                f"{path} has {stored[0]} × {stored[1]} pixels, and {self.annotations} says "
                f"{width} × {height} ({whose}): give the images that were annotated."
            )
        return note > 1 and (width, height) == upright

    def _fault(self, each: dict[str, Any]) -> str:
        """What is wrong with an annotation. What is missing and harmless is filled, and polygons
        without an area are taken out of an object that has others."""
        image, box = self.coco.imgs.get(each["image_id"]), each.get("bbox", ())
        if image is None:
            return f"is of image {each['image_id']}, which is not listed"
        if each.get("category_id") not in self._labels:
            return f"has category_id {each.get('category_id')}, which is not listed"
        if not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
            return f"has the bbox {box}, not x, y, width and height in pixels"
        if each.setdefault("iscrowd", 0) not in (0, 1):
            return f"has iscrowd {each['iscrowd']!r}, which is 0 or 1"
        if not _are_numbers([each.get("area")]):
            each["area"] = box[2] * box[3]
        mask, height, width = each.get("segmentation"), image["height"], image["width"]
        if not mask:
            return ""
        if isinstance(mask, dict):
            return _fault_of_runs(mask, height, width, _is_trained_on(each))
        if not isinstance(mask, list):
            return f"has the segmentation {mask!r}, neither polygons nor runs (RLE)"
        polygons = mask if isinstance(mask[0], list) else [mask]  # one alone, as some tools have it
        for polygon in polygons:
            if not _are_numbers(polygon) or len(polygon) % 2:
                return "has a polygon that is not x, y, x, y, … in finite numbers"
            for side, values in ((width, polygon[::2]), (height, polygon[1::2])):
                if values and not -side <= min(values) <= max(values) <= 2 * side:
                    return f"has a polygon far outside of its image of {width} × {height} pixels"
        whole = [polygon for polygon in polygons if _has_area(polygon)]
        if not (whole or any(polygons)):
            each["segmentation"] = []
        elif whole or not _is_trained_on(each):
            nothing = {"size": [height, width], "counts": [height * width]}
            each["segmentation"] = whole or nothing
        else:
            return "has a polygon without an area, which takes three points that are not in line"
        if (
            whole
            and not each["iscrowd"]
            and min(box[2:]) >= 2
            and _extent(whole, width, height) < 1
        ):
            return (
                f"has polygons of less than a pixel in its image of {width} × {height}: give x, y, "
                f"x, y, … in pixels"
            )
        return ""

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


def _are_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    try:
        return isinstance(values, list) and math.isfinite(sum(values))
    except TypeError:
        return False


def _has_area(polygon: Sequence[float]) -> bool:
    """Whether the points x, y, x, y, … are three or more that do not lie in a line."""
    offsets = np.reshape(polygon, (-1, 2)) - polygon[:2] if len(polygon) > 4 else np.zeros((1, 2))
    x, y = offsets[np.square(offsets).sum(1).argmax()]  # the point that is farthest from the first
    return bool(np.abs(offsets @ (y, -x)).max() > 1e-3)


def _extent(polygons: list[list[float]], width: int, height: int) -> float:
    """Pixels that they reach over within an image of this size, in x or y, whichever is less."""
    reaches = []
    for axis, side in enumerate((width, height)):
        values = [value for polygon in polygons for value in polygon[axis::2]]
        reaches.append(min(max(values), side) - max(min(values), 0))
    return min(reaches)


def _fault_of_runs(mask: dict[str, Any], height: int, width: int, trains: bool = False) -> str:
    """What is wrong with a mask as runs (RLE) for an image of this size, of an object that `trains`
    or not."""
    size, runs = mask.get("size"), mask.get("counts", ())
    if size != [height, width]:
        return f"has a mask of {size} pixels, and its image has [{height}, {width}]"
    with contextlib.suppress(IndexError):  # it ends within a number
        runs = _read_runs(runs) if isinstance(runs, str) else runs
        fills = _are_numbers(runs) and runs and min(runs) >= 0 and sum(runs) == height * width
        if fills and not any(n % 1 for n in runs):
            return "" if not trains or any(runs[1::2]) else "has a mask of 0 pixels"
    return "has a mask whose runs do not fill its image with whole numbers"


def _read_runs(text: str) -> list[int]:
    """The runs that pycocotools has compressed: of a text that is damaged it would read memory that
    is not the mask's. Numbers of 5 bits a character, the lowest first, 16 a sign, 32 for more;
    from the fourth on the change against the last but one.
    """
    runs, place = list[int](), 0
    while place < len(text):
        number, bits, part = 0, 0, 32
        while part & 32:
            part = ord(text[place]) - 48
            number |= (part & 31) << bits
            place, bits = place + 1, bits + 5
        number -= (part & 16) << (bits - 4)
        runs.append(number + runs[-2] if len(runs) > 2 else number)
    return runs


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
