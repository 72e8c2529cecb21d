"""How long the linear probe of a transfer takes: 45 penalties on features as large as CIFAR-10's.

    python benchmarks/transfer.py [rows]     # of features; 50,000 without an argument

The features are made: ReLU of correlated normals around a centre for each class, as far apart as
leaves half of the images wrong. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import record
import torch
from torch import Tensor

from idaa_lib.evaluate.metrics import top1
from idaa_lib.evaluate.probe import LAMBDAS, TRANSFER, linear_probe
from idaa_lib.runs.machine import torch_device

DIM, CLASSES, RUNS = 512, 10, 3


def main(rows: int = 50_000) -> None:
    device = torch_device("auto")
    x, y = (part.to(device) for part in made(rows + rows // 5))
    val, test = rows * 9 // 10, rows
    splits = (x[:val], y[:val]), (x[val:test], y[val:test]), x[test:]
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        probe = linear_probe(*splits, classes=CLASSES, protocol=TRANSFER)
        score = top1(probe.predictions, y[test:])  # which waits for the device
        seconds.append(time.perf_counter() - began)
        print(f"{seconds[-1]:.1f} s, λ = {probe.penalty:.3g}, {score:.1f} % of test", flush=True)
    protocol = (
        f"{rows:,} × {DIM} float32 features of {CLASSES} classes (made), a tenth of them for "
        f"validation; {len(LAMBDAS)} λ of the transfer protocol, each at most 50 iterations to "
        f"1e-5, the principal axes, the refit and the predictions included. Median; spread: "
        f"smallest and largest. baseline: top-1 on {rows // 5:,} further rows, in percent."
    )
    found = record.row(
        "transfer_probe_seconds", round(median(seconds), 2), "s", RUNS,
        [round(min(seconds), 2), round(max(seconds), 2)], round(score, 1),
    )  # fmt: skip
    print(record.write("transfer" if rows == 50_000 else f"transfer-{rows}", protocol, [found]))


def made(n: int) -> tuple[Tensor, Tensor]:
    """Features (n, DIM) with a decaying spectrum, as a trained network's, and labels (n,)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(CLASSES, (n,), generator=generator)
    spectrum = torch.arange(1, DIM + 1) ** -0.7
    latent = (normal(n, DIM) + 0.13 * normal(CLASSES, DIM)[labels]) * spectrum
    return (latent @ normal(DIM, DIM)).relu(), labels


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
