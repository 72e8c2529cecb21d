"""Do two processes train as one does? SimCLR, MoCo and SimSiam with IDAA, 8 steps in fp32.

    python benchmarks/processes.py        # about ten minutes

Both see the same global batches, views and random signs, so weights differ by rounding alone: sums
over a batch are of two halves. What a training makes of rounding is its own: a sign step and Adam's
first steps are as large for a gradient of 1e-9 as for one of 1. So each is also compared with
itself, from weights that were moved by one rounding (`nudged`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

import record
import torch

from idaa_lib import SSLConfig, VAEConfig
from idaa_lib.methods import Method
from idaa_lib.runs import Run, checkpoints
from idaa_lib.train import locate, stages, train_ssl, train_vae

METHODS = ("simclr", "moco", "simsiam")
COMMON: dict[str, Any] = {"dataset": "photos", "limit": 256, "size": 32, "batch_size": 32}
COMMON |= {"precision": "fp32", "device": "cpu", "epochs": 1}
# SGD at a small rate follows the gradient; the others are what recipes train with.
WAYS: dict[str, dict[str, Any]] = {
    "sgd_slow": {"optimizer": "sgd", "learning_rate": 1e-5, "norm": "l2"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.03 * 32 / 256, "norm": "l2"},
    "sgd_sign": {"optimizer": "sgd", "learning_rate": 0.03 * 32 / 256, "norm": "linf"},
    "adam_sign": {"optimizer": "adam", "learning_rate": 3e-4, "norm": "linf"},
}


PROTOCOL = f"""After 8 steps, the largest difference of a weight (relative where the weight is above
1) between a training by two processes (gloo, 16 images each) and by one; baseline: between that one
and itself from weights that were moved by one rounding (± 1.2e-7 of each). {COMMON["limit"]}
photographs of 32 px, batch {COMMON["batch_size"]}, fp32, IDAA, a VAE of m = 64 and width 16,
ResNet-18 of width 16, seed 0. Ways: {WAYS}. two_process_max_difference: of sgd_slow, the largest
of n methods: there rounding is not multiplied."""


def configure(vae: str) -> dict[str, SSLConfig]:
    common = COMMON | {"adversary": "idaa", "width": 16, "vae": vae}
    return {
        f"{method}_{way}": SSLConfig(**common, method=method, **own)
        for method in METHODS
        for way, own in WAYS.items()
    }


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The trained parameters, without buffers."""
    tensors, _ = checkpoints.load(run) or ({}, {})
    names = [k for k in tensors if k.startswith("method.network.") and "running_" not in k]
    return {k: tensors[k] for k in names if tensors[k].is_floating_point()}


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight, relative where the weight is above 1."""
    return max(((v - two[k]).abs() / v.abs().clamp(min=1)).max().item() for k, v in one.items())


def nudge(method: Method) -> Method:
    """Its weights moved by one rounding, up or down."""
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():
        sign = torch.randn(parameter.shape, generator=generator).sign()
        parameter.data.mul_(1 + sign * torch.finfo(torch.float32).eps)
    return method


def train_alone(folder: str, configs: dict[str, SSLConfig], change: Any) -> dict[str, Any]:
    """Weights of each configuration, trained here from weights that `change` was given."""
    os.environ["IDAA_OUTPUTS"], build = folder, stages.build_method
    stages.build_method = lambda *args: change(build(*args))
    try:
        return {name: weights(train_ssl(config)) for name, config in configs.items()}
    finally:
        stages.build_method = build


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        alone, nudged, together = (f"{folder}/{name}" for name in ("alone", "nudged", "together"))
        os.environ["IDAA_OUTPUTS"] = alone
        vae = train_vae(VAEConfig(**COMMON | {"epochs": 2}, width=16, dim=64))
        configs = configure(str(vae.path))
        one = train_alone(alone, configs, lambda method: method)
        moved = train_alone(nudged, configs, nudge)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, "--nproc-per-node=2", __file__, str(vae.path)]
        subprocess.run(command, check=True, env=os.environ | {"IDAA_OUTPUTS": together})
        os.environ["IDAA_OUTPUTS"] = together
        two = {name: weights(locate(config)) for name, config in configs.items()}
    rows = [
        record.row(
            f"two_process_max_difference_{name}",
            distance(one[name], two[name]),
            "of a weight",
            1,
            baseline=distance(one[name], moved[name]),
        )
        for name in configs
    ]
    slow = max(row["value"] for row in rows if row["what"].endswith("_slow"))
    rows.insert(0, record.row("two_process_max_difference", slow, "of a weight", len(METHODS)))
    print(record.write("processes", " ".join(PROTOCOL.split()), rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for config in configure(sys.argv[1]).values():
            train_ssl(config)
    else:
        main()
