"""Does bf16 cost accuracy? SimCLR + IDAA in bf16 and in fp32, seed by seed.

    python benchmarks/precision.py [images] [epochs] [seeds]      # of CIFAR-10 ($IDAA_CIFAR10_ZIP)

Training, attack and evaluation are all in the one precision or the other; one VAE serves all.
About ten quiet minutes on two cores that multiply bf16 natively; others emulate it, slowly.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import record
import torch
from scipy.stats import t as student

from idaa_lib import evaluate
from idaa_lib.configs import EvalConfig, SSLConfig, VAEConfig
from idaa_lib.environment import open_images
from idaa_lib.evaluate.encoders import load_vae
from idaa_lib.runs import Run
from idaa_lib.train import train_ssl, train_vae
from idaa_lib.views import keyed_generator, normalise

IMAGES = 256  # of which x′ − x is compared
JUDGED = ("knn_top1", "linear_top1")


def main(limit: int = 3000, epochs: int = 5, seeds: int = 3) -> None:
    data: dict[str, Any] = {"dataset": os.environ.get("IDAA_CIFAR10_ZIP", "photos"), "limit": limit}
    asked = data | {"adversary": "idaa", "width": 16, "batch_size": 128, "learning_rate": 1e-3}
    found: dict[str, dict[str, list[float]]] = {p: {} for p in ("fp32", "bf16")}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IDAA_OUTPUTS"] = folder
        vae = train_vae(VAEConfig(**data, dim=128, width=16, epochs=epochs, precision="fp32"))
        errors = perturbation_errors(vae, data["dataset"])
        for seed in range(seeds):
            for precision, values in found.items():
                config = SSLConfig(
                    **asked, epochs=epochs, seed=seed, precision=precision, vae=vae.id
                )  # type: ignore[arg-type]
                run = train_ssl(config)
                judged = evaluate(
                    EvalConfig(run=run.id, limit=limit, precision=precision, references=False)
                )  # type: ignore[arg-type]
                for name in JUDGED:
                    values.setdefault(name, []).append((judged.summary or {})[name])
                values.setdefault("seconds", []).append((run.summary or {})["seconds"])
    rows = [row for name in JUDGED for row in compared(name, found)]
    ratios = [a / b for a, b in zip(*(found[p]["seconds"] for p in found), strict=True)]
    low, high = (round(edge, 2) for edge in (min(ratios), max(ratios)))
    both = [round(fmean(found[p]["seconds"]), 1) for p in found]
    rows += [
        record.row("seconds_ratio", round(fmean(ratios), 2), "ratio", seeds, [low, high], both)
    ]
    protocol = f"""{Path(data["dataset"]).stem}, {limit:,} training images; VAE m=128, width 16,
fp32, {epochs} epochs; SimCLR + IDAA (ε = 0.1), ResNet-18 of width 16, batch 128, {epochs} epochs,
seeds 0 to {seeds - 1}; training, attack and encoding in the precision that the row names; accuracy:
top-1 on {limit:,} test images, clean protocol, mean over seeds, spread [least, most]. *_difference:
bf16 − fp32, paired by seed, spread: Student's 95 % interval of the mean. seconds_ratio: fp32 / bf16
of training; baseline: mean seconds of [fp32, bf16]. perturbation_error_*: relative error of x′ − x
in bf16 against fp32 at the same z and δ, random signs of that ε, n images (attacked δ change more
and have less)."""
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
        error = ((rounded - exact).norm() / exact.norm()).item()
        rows.append(record.row(f"perturbation_error_{epsilon:g}", round(error, 3), "ratio", IMAGES))
    return rows


def compared(name: str, found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    rows = [
        record.row(
            f"{name}_{p}", round(fmean(v[name]), 2), "%", len(v[name]), [min(v[name]), max(v[name])]
        )
        for p, v in found.items()
    ]
    gaps = [b - a for a, b in zip(found["fp32"][name], found["bf16"][name], strict=True)]
    half = student.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
    spread = [round(fmean(gaps) - half, 2), round(fmean(gaps) + half, 2)]
    return [*rows, record.row(f"{name}_difference", round(fmean(gaps), 2), "%", len(gaps), spread)]


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
