"""The configuration of a detection run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from idaa_lib import runs
from idaa_lib.configs import Config, ConfigError
from idaa_lib.configs.base import RECIPE, Positive, Rate, Seed


class DetectionConfig(Config):
    """Fine-tuning of Mask R-CNN from a run with an ImageNet stem, and its AP.

    Fields:
        run: id or path of an SSL run (None: your latest with an ImageNet stem).
        train_images, train_annotations, val_images, val_annotations: folders and COCO-format JSON
            files of what is trained on and judged on; all four, or None for synthetic shapes.
        architecture: `c4` as in the paper, or `fpn`, whose results do not compare with it.
        size: pixels of the shorter side (paper: 800; of training images, four fifths of it and up).
        iterations: steps; the rate drops tenfold at 2/3 and at 8/9 of them (paper: 1×, 90,000).
        warmup: steps of linear warm-up. batch_size: images a step.
        learning_rate: None for 0.02 · batch_size / 16 in `paper` (linear scaling), 0.02 in `demo`.
        rois: regions sampled of each image (paper: 512).
        log_every: steps between two lines of the log. checkpoint_every: steps between two
            checkpoints. workers: processes that read images.
        seed: of the heads' weights, batches, flips, sides and sampled regions.
    """

    stage = "detection"
    principal = ("run", "architecture")
    sets: ClassVar[tuple[str, ...]] = (
        "train_images",
        "train_annotations",
        "val_images",
        "val_annotations",
    )
    pointers = Config.pointers | frozenset(sets)
    circumstances = Config.circumstances | {"log_every", "checkpoint_every", "workers"}
    recipes = Path(__file__).resolve().parent / "recipes"

    run: str | None = None
    train_images: str | None = None
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    architecture: Literal["c4", "fpn"] = "c4"
    size: Annotated[int, Field(ge=32)] = RECIPE
    iterations: Positive = RECIPE
    warmup: Seed = RECIPE
    batch_size: Positive = RECIPE
    learning_rate: Rate = RECIPE
    rois: Positive = RECIPE
    log_every: Positive = 10
    checkpoint_every: Positive = 100
    workers: Seed = 0
    seed: Seed = 0
    device: str = "auto"

    @property
    def dataset(self) -> str:
        """What its AP is of, as tables name it."""
        return self.val_annotations or "synthetic shapes"

    def _derive(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in self.sets if not explicit.get(name)]
        if missing and len(missing) < len(self.sets):
            raise ConfigError(f"{missing[0]} is missing: give {', '.join(self.sets)}, or none.")
        return {}


# A stage of its own beside the library's: `runs.find("detection")` and `Run.config` know it.
runs.CONFIGS["detection"] = DetectionConfig
runs.NOTEBOOKS["detection"] = "10_detection"
