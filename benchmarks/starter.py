"""data/starter from finished runs: what the explorer shows before anybody has trained.

    python benchmarks/starter.py <VAE> <encoder> <witness>   # ids or paths of runs

Writes the three runs with their weights in half precision, and 500 test images of CIFAR-10 as PNG
class folders; and a result file with their figures, and with how far half precision moves pictures.
Images: $IDAA_CIFAR10_ZIP, else torchvision's.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import record
import torch
from PIL import Image
from torch import Tensor

from idaa_lib import runs
from idaa_lib.adversaries.ascent import Direction
from idaa_lib.configs import DecomposeConfig
from idaa_lib.data.places import STARTER
from idaa_lib.identity.scene import open_scene
from idaa_lib.runs import Run, checkpoints
from idaa_lib.runs.machine import open_images

DATASET = os.environ.get("IDAA_CIFAR10_ZIP", "cifar10")
PARTS = {"train": 10, "val": 30, "test": 10}  # images of each class: of the explorer, most in val
PROTOCOL = """Differences in 8-bit pixel values between pictures by 16-bit and by 32-bit weights, of
256 CIFAR-10 validation images: G(x), and IDAA's x′ along the same direction at ε .1 and 1."""


def export(run: Run, name: str) -> Run:
    """The run of this name in the starter: `run` with its network's weights alone, in half
    precision, and the readings of its epochs."""
    copy, checkpoint = Run(STARTER / run.stage / name), checkpoints.load(run)
    if run.path == copy.path:
        return run
    if checkpoint is None:
        sys.exit(f"{run.id} has no weights: train it again.")
    tensors, _ = checkpoint
    shutil.rmtree(copy.path, ignore_errors=True)
    copy.path.mkdir(parents=True)
    weights = {k: halve(v) for k, v in tensors.items() if k.startswith("method.")}
    latest = runs.read_json(run.path / "latest.json") or {}
    checkpoints.save(copy, latest["step"], weights, {})
    config = runs.read_json(run.path / "config.json") or {}
    runs.write_json(copy.path / "config.json", config | {"dataset": "cifar10"})
    # Whoever has CIFAR-10 may have its original pixels, where ours were compressed: there the name
    # says that they are the same images.
    environment = run.environment
    environment["dataset"].pop("fingerprint", None)
    runs.write_json(copy.path / "environment.json", environment)
    for file in ("model.json", "summary.json"):
        runs.write_json(copy.path / file, runs.read_json(run.path / file) or {})
    readings = [row for row in run.metrics() if any(key.endswith("_val") for key in row)]
    text = "".join(json.dumps(row) + "\n" for row in readings)
    (copy.path / "metrics.jsonl").write_text(text, encoding="utf-8")
    return copy


def halve(tensor: Tensor) -> Tensor:
    """16-bit floats in place of 32-bit ones; counts stay."""
    return tensor.half() if tensor.is_floating_point() else tensor


def write_images() -> int:
    """How many images were written: the first of each class of CIFAR-10's test split."""
    data = open_images(DATASET, "test", 32, None)
    shutil.rmtree(STARTER / "images", ignore_errors=True)
    for label, name in enumerate(data.classes):
        indices = iter((data.labels == label).nonzero().flatten().tolist())
        for part, count in PARTS.items():
            folder = STARTER / "images" / part / name
            folder.mkdir(parents=True)
            for index in islice(indices, count):
                pixels = data.images[index].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / f"{index:05}.png", optimize=True)
    return len(data.classes) * sum(PARTS.values())


def compare_pictures(whole: Run, half: Run) -> dict[str, float]:
    """Picture → the largest difference that 16-bit weights make, in 8-bit values."""
    config = DecomposeConfig(vae=whole.reference, run="starter", dataset=DATASET, images=256)
    ours, theirs = (open_scene(config.replace(vae=run.reference)) for run in (whole, half))
    pairs = zip(ours.directions("idaa"), theirs.directions("idaa"), strict=True)
    theirs._directions["idaa"] = [Direction(own.anchor, other.unit) for other, own in pairs]

    def pictures(scene: Any) -> dict[str, Tensor]:
        rows = {"G": scene.parts["G"]}
        rows |= {f"x_adv_{e:g}": scene.attack("idaa", e) for e in (0.1, 1.0)}
        return {name: 255 * scene.pixels(images) for name, images in rows.items()}

    with torch.no_grad():
        both = pictures(ours), pictures(theirs)
        return {name: (both[0][name] - both[1][name]).abs().max().item() for name in both[0]}


def main(vae: str, encoder: str, witness: str) -> None:
    """Write all of it, and the result file."""
    n = write_images()
    rows = [record.row("starter_images", n, "images", 1)]
    whole = runs.get("vae", vae)
    half = export(whole, "starter")
    for name, other in (("starter", encoder), ("starter2", witness)):
        export(runs.get("ssl", other), name)
    for picture, difference in compare_pictures(whole, half).items():
        what = f"starter_half_precision_{picture}"
        rows.append(record.row(what, round(difference, 3), "8-bit values", 256))
    size = sum(path.stat().st_size for path in Path(STARTER).rglob("*") if path.is_file())
    rows.append(record.row("starter_size", round(size / 2**20, 2), "MiB", 1))
    print(record.write("starter", " ".join(PROTOCOL.split()), rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
