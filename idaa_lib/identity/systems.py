"""What systems that fight augmentations are compared by, beside accuracy (docs/siblings.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import Encoder, features, load_encoder
from idaa_lib.evaluate.invariance import read_differences, shuffle_condition
from idaa_lib.identity.theory import Retention, retention
from idaa_lib.runs import Run
from idaa_lib.views import keyed_generator, recipe


def find_own(encoder: Encoder, images: Tensor, seed: int = 0) -> Retention:
    """How well an encoder's features find, of uint8 images (N, 3, H, W), the one that a mild view
    of it came from: `theory.retention` among all N."""
    transform, generator = recipe("mild", *encoder[1:]), keyed_generator(seed)
    views = features(encoder.module, images, *encoder[1:], transform=transform, generator=generator)
    return retention(views, features(encoder.module, images, *encoder[1:]))


def measure(run: Run, splits: Mapping[str, ImageSet], seed: int = 0) -> list[dict[str, Any]]:
    """Rows `metric`, `value`, `low`, `high`, `unit` of a trained encoder; intervals over images.

    own image found, own image: of `find_own`, retrieval@1 in percent and InfoNCE in nats. colour
    read, crop read: R² of `read_differences`. shuffled ω: of a conditioned run what InfoNCE loses
    in nats (`shuffle_condition`). an epoch: `seconds_per_epoch`.

    Args:
        splits: `train`, to fit a regression, `test`, and `val`, on which ω is shuffled.
    """
    train, test = (splits[name].images for name in ("train", "test"))
    encoder = load_encoder(run)
    values = find_own(encoder, test, seed).row()
    colour, crop = read_differences(encoder, train, test, seed).values()
    rows: list[tuple[Any, ...]] = [
        ("own image found", values["retrieved"], values["low"], values["high"], "%"),
        ("own image", values["infonce"], values["infonce_low"], values["infonce_high"], "nats"),
        ("colour read", *colour, "R²"),
        ("crop read", *crop, "R²"),
    ]
    if getattr(run.config, "condition", None):
        shuffled = shuffle_condition(run, splits["val"].images, seed)
        rows.append(("shuffled ω", *shuffled["difference"], "nats"))
    rows.append(("an epoch", seconds_per_epoch(run), float("nan"), float("nan"), "s"))
    columns = ("metric", "value", "low", "high", "unit")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def seconds_per_epoch(run: Run) -> float:
    """Seconds of an epoch's steps, by the speed of the whole run."""
    return run.environment["dataset"]["n"] / (run.summary or {})["images_per_second"]


def knn_within(run: Run, seconds: float) -> float:
    """Validation kNN in percent of the last epoch that ends within so many seconds of steps; of the
    first one where none does."""
    epoch = seconds_per_epoch(run)
    readings = [(line["epoch"] + 1, line["knn_top1_val"]) for line in run.metrics()
                if "knn_top1_val" in line]  # fmt: skip
    within = [value for number, value in readings if number * epoch <= 1.001 * seconds]
    return (within[-1:] or [value for _, value in readings[:1]] or [float("nan")])[0]
