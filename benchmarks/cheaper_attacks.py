"""Do cheaper attacks pay? kNN against seconds of training, at equal wall time.

    python benchmarks/cheaper_attacks.py [images] [seconds]     # of CIFAR-10 ($IDAA_CIFAR10_ZIP)

SimCLR + IDAA with each `attack` (docs/cheaper-attacks.md), and SimCLR alone, each for as many
epochs as fit into the seconds that the whole attack takes for its own. What counts is the last
column: accuracy after the same time, not after the same epochs. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

from idaa_lib.configs import SSLConfig, VAEConfig
from idaa_lib.lab import style
from idaa_lib.runs import Run
from idaa_lib.train import train_ssl, train_vae

VARIANTS: dict[str, dict[str, Any]] = {
    "idaa": dict(adversary="idaa"),
    "idaa_prefix": dict(adversary="idaa", attack="prefix"),
    "idaa_carried": dict(adversary="idaa", attack="carried"),
    "idaa_free": dict(adversary="idaa", attack="free"),
    "none": dict(adversary="none"),
}


NAMES = {
    "idaa": "attack = full, as published",
    "idaa_prefix": "attack = prefix",
    "idaa_carried": "attack = carried",
    "idaa_free": "attack = free",
    "none": "no adversary",
}


def main(limit: int = 5000, seconds: float = 120.0) -> None:
    dataset = os.environ.get("IDAA_CIFAR10_ZIP", "photos")
    data: dict[str, Any] = {"dataset": dataset, "limit": limit}
    shared = data | {"width": 16, "batch_size": 128, "learning_rate": 1e-3}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IDAA_OUTPUTS"] = folder
        vae = train_vae(VAEConfig(**data, dim=128, width=16, epochs=10))
        made: dict[str, Run] = {}
        for name, fields in VARIANTS.items():
            chosen = fields | ({"vae": vae.id} if "idaa" in name else {})
            probe = train_ssl(SSLConfig(**shared, **chosen, epochs=1, seed=9))
            epochs = max(2, round(seconds / probe.summary["seconds"]))  # type: ignore[index]
            made[name] = train_ssl(SSLConfig(**shared, **chosen, epochs=epochs))
        curves = {name: curve(run) for name, run in made.items()}
        rows = [row for name, run in made.items() for row in told(name, run, curves[name])]
        config = made["idaa"].config
    protocol = f"""{Path(dataset).stem}, {limit:,} training images; VAE m=128, width 16, 10 epochs;
SimCLR, ResNet-18 of width 16, batch {config.batch_size}, Adam {config.learning_rate:g}, ε =
{config.epsilon:g}; each variant for as many epochs as come nearest to {seconds:g} s of training
steps (validation not counted) by the speed of one epoch before. knn_*: top-1 on the validation
split at the end, clean protocol, spread: bootstrap 95 % interval over images; baseline: [epochs,
seconds of training]. epoch_seconds_*: per epoch. One seed: differences within the intervals say
nothing."""
    path = record.write("cheaper-attacks", " ".join(protocol.split()), rows)
    draw(curves, path.with_suffix(".png"))
    print(path)


def curve(run: Run) -> list[tuple[float, float]]:
    """(seconds of training, validation kNN in percent) of each epoch."""
    epochs, seconds = run.config.epochs, run.summary["seconds"]  # type: ignore[index]
    lines = [line for line in run.metrics() if "knn_top1_val" in line]
    return [((line["epoch"] + 1) / epochs * seconds, line["knn_top1_val"]) for line in lines]


def told(name: str, run: Run, points: list[tuple[float, float]]) -> list[dict[str, Any]]:
    summary = run.summary or {}
    spread = [summary["knn_low_val"], summary["knn_high_val"]]
    spent = [run.config.epochs, round(summary["seconds"], 1)]
    knn, n = summary["knn_top1_val"], summary["n_val"]
    each = summary["seconds"] / run.config.epochs
    return [
        record.row(f"knn_{name}", knn, "% top-1", n, spread, spent),
        record.row(f"epoch_seconds_{name}", round(each, 2), "s", run.config.epochs),
    ]


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    figure, axis = style.axes(figsize=(6.4, 4))
    for (name, points), colour in zip(curves.items(), style.PALETTE, strict=False):
        axis.plot(
            *zip(*points, strict=True), marker="o", markersize=3, label=NAMES[name], color=colour
        )
    axis.set(xlabel="training steps (seconds)", ylabel="validation kNN top-1 (%)")
    axis.legend()
    style.save(figure, path)


if __name__ == "__main__":
    began = time.monotonic()
    main(*(int(word) for word in sys.argv[1:]))
    print(f"{time.monotonic() - began:.0f} s in all")
