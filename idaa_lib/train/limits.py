"""What a training needs of its machine, looked at before work starts."""

from __future__ import annotations

import shutil
from typing import Any

import psutil
import torch
from torch import nn

from idaa_lib import runs
from idaa_lib.configs import ConfigError, TrainingConfig, VAEConfig
from idaa_lib.methods import About, build_method
from idaa_lib.methods.vae import VAETraining
from idaa_lib.runs import Run, RunError, checkpoints
from idaa_lib.runs.machine import torch_device


def check_memory(config: TrainingConfig, about: About) -> None:
    """Compare a lower bound of the memory with what the machine has: weights, gradients, two
    moments and one batch of images. A training takes more, so none that fits is refused.

    Raises:
        ConfigError: the machine has less.
    """
    build: Any = VAETraining if isinstance(config, VAEConfig) else build_method
    sizes = {"a batch of images": 4 * config.batch_size * 3 * config.size**2}
    try:
        with torch.device("meta"):
            tensors = build(config, about).state_dict()
        sizes = {name: 4 * tensor.nbytes for name, tensor in tensors.items()} | sizes
    except (RuntimeError, TypeError):  # sizes beyond 64 bits
        if config.foreign():  # which may not be built so
            return
        sizes = {"a network": 2**63}
    need, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__)
    device, room = torch_device(config.device), psutil.virtual_memory().total
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    if need > room:
        free = {"seed", "epochs", "limit"}  # which take none
        numbers = {k: v for k, v in config if type(v) is int and v > 64 and k not in free}
        large = {name: number for name, number in numbers.items() if number > 1024} or numbers
        names = ", ".join(f"{name}={number}" for name, number in large.items())
        raise ConfigError(
            f"The training needs {need / 2**30:.3g} GiB of memory or more, most of it for "
            f"{largest}, and this machine has {room / 2**30:.3g}: take less of {names}."
        )


def check_disk(config: TrainingConfig, run: Run, method: nn.Module) -> None:
    """Room for the checkpoints that are kept and the one being written, and for snapshots, before
    work starts."""
    weights = sum(p.numel() * p.element_size() for p in method.state_dict().values())
    need = 3 * weights * (checkpoints.KEEP + 1)  # Adam's two moments beside the weights
    if every := getattr(config, "keep_every", None):
        # Those that an interrupted run has already take their room.
        need += weights * max(0, (config.epochs - 1) // every - len(checkpoints.snapshots(run)))
    folder = runs.outputs_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RunError(
            f"{folder} cannot hold runs ({error}): set IDAA_OUTPUTS elsewhere."
        ) from error
    if free < need:
        raise RunError(
            f"No space for {run.id}: its checkpoints need {need / 2**20:.0f} MiB, and the disk of "
            f"{folder} has {free / 2**20:.0f} MiB free."
        )
