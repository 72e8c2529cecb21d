"""Does speed cost accuracy? SimCLR + IDAA in fp32 and in bf16, seed by seed.

    python benchmarks/precision.py [images] [epochs] [seeds]      # of CIFAR-10 ($IDAA_CIFAR10_ZIP)

Training, attack and evaluation are all in the one precision or the other; one VAE serves all. How
much time bf16 saves is a row of speed.py. About half an hour on two cores that multiply bf16
natively; others emulate it, slowly.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import record
import torch

from idaa_lib import evaluate
from idaa_lib.configs import EvalConfig, SSLConfig, VAEConfig
from idaa_lib.evaluate.encoders import load_vae
from idaa_lib.evaluate.metrics import student_interval
from idaa_lib.runs import Run
from idaa_lib.runs.machine import open_images
from idaa_lib.train import train_ssl, train_vae
from idaa_lib.views import keyed_generator, normalise

IMAGES = 256  # of which x′ − x is compared
WIDTH = 32
JUDGED = ("knn_top1", "linear_top1")
WAYS = ("fp32", "bf16")


def main(limit: int = 3000, epochs: int = 5, seeds: int = 3) -> None:
    data: dict[str, Any] = {"dataset": os.environ.get("IDAA_CIFAR10_ZIP", "photos"), "limit": limit}
    fields = data | {"adversary": "idaa", "width": WIDTH, "batch_size": 128, "learning_rate": 1e-3}
    accuracies: dict[str, dict[str, list[float]]] = {
        way: {name: [] for name in JUDGED} for way in WAYS
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IDAA_OUTPUTS"] = folder
        vae = train_vae(VAEConfig(**data, dim=128, width=WIDTH, epochs=epochs, precision="fp32"))
        errors = perturbation_errors(vae, data["dataset"])
        for seed in range(seeds):
            for way in WAYS:
                own: dict[str, Any] = {"precision": way, "seed": seed, "vae": vae.id}
                run = train_ssl(SSLConfig(**fields, **own, epochs=epochs))
                judge: dict[str, Any] = {"run": run.id, "limit": limit, "precision": way}
                summary = evaluate(EvalConfig(**judge, references=False)).summary or {}
                for name in JUDGED:
                    accuracies[way][name].append(summary[name])
    rows = [row for name in JUDGED for row in compare_ways(name, accuracies)]
    protocol = f"""{Path(data["dataset"]).stem}, {limit:,} training images; VAE m=128, width
{WIDTH}, fp32, {epochs} epochs; SimCLR + IDAA (ε = 0.1), ResNet-18 of width {WIDTH}, batch 128,
{epochs} epochs, seeds 0 to {seeds - 1}; training and attack as the row names it, encoding in its
precision; accuracy:
top-1 on {limit:,} test images, clean protocol, mean over seeds, spread [least, most].
*_difference_*: way − fp32, paired by seed, spread: Student's 95 % interval of the mean.
perturbation_error_*: relative error of x′ − x in bf16 against fp32 at the same z
and δ, random signs of that ε, n images (attacked δ change more and have less)."""
    rows += errors
    print(record.write("precision", " ".join(protocol.split()), rows))


@torch.no_grad()
def perturbation_errors(run: Run, dataset: str) -> list[dict[str, Any]]:
    """How far bf16's rounding moves x′ − x, whose two G differ the less the smaller δ is."""
    vae = load_vae(run)
    assert vae.mean is not None
    assert vae.std is not None
    x = normalise(open_images(dataset, "test", vae.size, IMAGES).images, vae.mean, vae.std)
    z, signs = vae.encode(x)[0], torch.randn(IMAGES, vae.dim, generator=keyed_generator(0)).sign()
    rows = []
    for epsilon in (0.01, 0.03, 0.1, 0.3):
        exact = vae.decode(z + epsilon * signs) - vae.decode(z)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = vae.decode(z + epsilon * signs) - vae.decode(z)
        error = round(((rounded - exact).norm() / exact.norm()).item(), 3)
        rows.append(record.row(f"perturbation_error_{epsilon:g}", error, "ratio", IMAGES))
    return rows


def compare_ways(name: str, accuracies: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    rows = []
    for way, values in accuracies.items():
        one, n = values[name], len(values[name])
        spread = [min(one), max(one)]
        rows.append(record.row(f"{name}_{way}", round(fmean(one), 2), "%", n, spread))
        if way != "fp32":
            gaps = [b - a for a, b in zip(accuracies["fp32"][name], one, strict=True)]
            gap, low, high = student_interval(gaps)
            spread = [round(low, 2), round(high, 2)]
            rows.append(record.row(f"{name}_difference_{way}", round(gap, 2), "%", n, spread))
    return rows


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
