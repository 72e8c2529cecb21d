"""`photos`: the data set that needs no network, cut from photographs inside two dependencies.

scikit-image and scikit-learn ship real photographs. An image of the set is a random square crop
of one of them, and its class is the photograph. Every photograph is cut into three vertical
strips, one a split, so no pixel of a `val` or `test` crop is ever seen in `train`. Raw-pixel 5-NN
reaches about 55 % on `test`: a left strip says something about a right one, not everything.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FILES = {  # class: (package, file in it)
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
COUNTS = {"train": 4000, "val": 500, "test": 1000}
STRIPS = {"train": (0.0, 0.60), "val": (0.60, 0.75), "test": (0.75, 1.0)}  # of the width
SIDES = (32, 96)  # pixels; drawn uniformly, so a class is seen at several scales


class Crop(NamedTuple):
    """One image of the set: where it lies in which photograph."""

    photo: str
    split: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom excluded


def paths() -> dict[str, Path]:
    """Class → file. FileNotFoundError where an installed package lacks its photograph."""
    files = {}
    for photo, (package, file) in FILES.items():
        spec = find_spec(package)  # finding is not importing: scikit-learn takes a second to import
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.is_file():
            project = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
            raise FileNotFoundError(
                f"the photograph {photo!r} of source 'photos' should ship inside {project} as "
                f"{package}/{file} and is not there: reinstall {project}"
            )
        files[photo] = path
    return files


def crops() -> list[Crop]:
    """All 5,500 crops, the same on every call; photographs take turns, so classes are balanced."""
    sizes = {}
    for photo, path in paths().items():
        with Image.open(path) as image:
            sizes[photo] = image.size
    crops = []
    for stream, (split, count) in enumerate(COUNTS.items()):
        rng = np.random.default_rng([0, stream])
        for n in range(count):
            photo = list(FILES)[n % len(FILES)]
            width, height = sizes[photo]
            first, last = (round(edge * width) for edge in STRIPS[split])
            side = int(rng.integers(SIDES[0], min(SIDES[1], last - first, height), endpoint=True))
            left = int(rng.integers(first, last - side, endpoint=True))
            top = int(rng.integers(0, height - side, endpoint=True))
            crops.append(Crop(photo, split, (left, top, left + side, top + side)))
    return crops
