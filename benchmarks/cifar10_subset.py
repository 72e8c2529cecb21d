"""Does the pipeline learn? Notebooks 01, 03 and 04 on a subset of CIFAR-10, headless.

`python benchmarks/cifar10_subset.py <zip or folder> [limit] [epochs]` runs SimCLR with no
adversary, CLAE and IDAA on a reduced ResNet-18 and writes test accuracies beside raw-pixel kNN on
the same split. Sized for 2 CPU cores (about 15 minutes): it compares each with pixels, not with
the paper, whose encoder is 16 times as wide in multiply-adds and sees 100 times as many images.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import record

from idaa_lib import sweeps
from idaa_lib.configs import EvalConfig, SSLConfig, VAEConfig


def main(dataset: str, limit: int = 10_000, epochs: int = 8) -> None:
    data: dict[str, Any] = {"dataset": dataset, "limit": limit}
    training = data | {"epochs": epochs, "width": 16, "knn_every": 4}
    vae = sweeps.ensure(VAEConfig(**data, epochs=20, dim=128, width=16))

    def judge(adversary: Any) -> dict[str, Any]:
        ssl = sweeps.ensure(SSLConfig(**training, adversary=adversary, vae=vae.id))
        asked = EvalConfig(run=ssl.id, limit=limit, references=adversary == "none")
        return sweeps.ensure(asked).summary or {}

    names = ("idaa", "clae", "none")  # the longest first
    results = sweeps.together([partial(judge, name) for name in names], jobs=2)
    judged = dict(zip(names, results, strict=True))

    def accuracy(what: str, summary: dict[str, Any], key: str) -> dict[str, Any]:
        spread = [summary[f"{key}_low"], summary[f"{key}_high"]]
        return record.row(what, summary[f"{key}_top1"], "% top-1", summary[f"{key}_n"], spread)

    rows = [accuracy("knn_pixels", judged["none"], "pixels_knn")]
    rows += [accuracy("knn_untrained", judged["none"], "random_knn")]
    rows += [accuracy(f"knn_{name}", judged[name], "knn") for name in ("none", "clae", "idaa")]
    rows += [
        accuracy(f"linear_{name}", judged[name], "linear") for name in ("none", "clae", "idaa")
    ]
    rows += [accuracy("linear_pixels", judged["none"], "pixels_linear")]
    rows += [accuracy("linear_untrained", judged["none"], "random_linear")]
    none, ssl = judged["none"], SSLConfig(**training)
    protocol = (
        f"CIFAR-10 as JPEG class folders (pixels went through JPEG once); {limit:,} training "
        f"images (seeded subset of the train split, 10 % of CIFAR's train part being held out for "
        f"validation), test images as n says; VAE m={vae.config.dim}, width {vae.config.width}, "
        f"{vae.config.epochs} epochs; SimCLR, ResNet-18 of width {ssl.width}, batch "
        f"{ssl.batch_size}, Adam {ssl.learning_rate:g}, {epochs} epochs, seed {ssl.seed} alone; "
        f"ε = {ssl.epsilons['idaa']:g} of z (IDAA), {ssl.epsilons['clae']:g} of normalised pixels "
        f"(CLAE). kNN {none['knn_protocol']}. Linear {none['linear_protocol']}. spread: bootstrap "
        f"95 % interval over test images."
    )
    print(record.write("cifar10-subset", protocol, rows))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
