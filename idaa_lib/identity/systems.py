"""What systems that fight augmentations are compared by, beside accuracy (docs/siblings.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idaa_lib.evaluate.encoders import features, load_encoder
from idaa_lib.evaluate.invariance import read_differences, shuffle_condition
from idaa_lib.evaluate.metrics import Interval
from idaa_lib.identity.theory import retention
from idaa_lib.runs import Run
from idaa_lib.train.passes import count_passes
from idaa_lib.views import keyed_generator, recipe


def measure(run: Run, train: Tensor, test: Tensor, seed: int = 0) -> dict[str, Any]:
    """Figures of a trained encoder's features and of its training; intervals as `Interval`.

    retrieved, nats: of mild views of test images, how often the own image is the nearest among all
    test images (percent), and InfoNCE's bound on which image it is (`theory.Retention`). r2_colour,
    r2_crop: `read_differences`. shuffled_omega_nats: of a conditioned run, the difference of
    `shuffle_condition`. seconds_per_epoch, passes: what an epoch takes, and passes of a backbone an
    image.

    Args:
        train, test: uint8 images (N, 3, H, W).
    """
    encoder = load_encoder(run)
    units = encoder[1:]
    generator = keyed_generator(seed)
    h = features(encoder.module, test, *units)
    mild = features(
        encoder.module, test, *units, transform=recipe("mild", *units), generator=generator
    )
    kept = retention(mild, h).row()
    colour, crop = read_differences(encoder, train, test, seed).values()
    values: dict[str, Any] = {
        "retrieved": Interval(kept["retrieved"], kept["low"], kept["high"]),
        "nats": Interval(kept["infonce"], kept["infonce_low"], kept["infonce_high"]),
        "r2_colour": colour,
        "r2_crop": crop,
    }
    if getattr(run.config, "condition", None):
        values["shuffled_omega_nats"] = shuffle_condition(run, test, seed)["difference"]
    return values | {
        "seconds_per_epoch": seconds_per_epoch(run),
        "passes": count_passes(run.config),
    }


def seconds_per_epoch(run: Run) -> float:
    """Seconds that the steps of an epoch take, from the median of the logged speeds."""
    speeds = [line["images_per_second"] for line in run.metrics() if "images_per_second" in line]
    n = run.environment["dataset"]["n"]
    return n / torch.tensor(speeds).median().item() if speeds else float("nan")
