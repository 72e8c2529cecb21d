"""What a result was made with: versions, device, commit, data (a run's environment.json)."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from idaa_lib.configs import ConfigError
from idaa_lib.data.cached import ImageSet, load
from idaa_lib.data.sources import NAMES

PACKAGES = ("idaa_lib", "torch", "torchvision", "accelerate", "numpy", "scikit-learn", "pillow")


def open_images(dataset: str, split: str, size: int, limit: int | None) -> ImageSet:
    """`images.load`, with what a user can mend as a ConfigError: one sentence, no traceback.

    Raises:
        ConfigError: the source is missing, unreadable, or lacks the split.
    """
    try:
        return load(dataset, split, size, limit)
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset={dataset!r}: {error}.") from error


def settled(dataset: str) -> str:
    """An existing path made absolute: later stages may run in another folder."""
    path = Path(dataset).expanduser()
    return str(path.resolve()) if dataset not in NAMES and path.exists() else dataset


def torch_device(name: str) -> torch.device:
    """The device a configuration names; `auto` is a CUDA GPU where there is one, else the CPU.

    Raises:
        ConfigError: it is not there.
    """
    available = ["auto", "cpu"] + ["cuda"] * torch.cuda.is_available()
    available += ["mps"] * torch.backends.mps.is_available()
    if name not in available:
        raise ConfigError(f"device must be one of {', '.join(available)}, and is {name!r}.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether `fp32`, `bf16` or `auto` (bf16 where it is native) means bf16 on this device."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Emulated bf16 is slower than fp32: only CPUs that multiply it natively gain.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and bool(native)


def describe(device: torch.device, precision: str, images: ImageSet) -> dict[str, Any]:
    """JSON values; `dataset` has the normalisation that the trained network expects."""
    return surroundings(device, precision) | {
        "dataset": {
            "name": images.name,
            "split": images.split,
            "n": len(images),
            "size": images.size,
            "classes": len(images.classes),
            "fingerprint": images.fingerprint,
            "mean": list(images.mean),
            "std": list(images.std),
            "skipped": images.skipped,
        },
    }


def surroundings(device: torch.device, precision: str) -> dict[str, Any]:
    """What a run was made with, whatever its data."""
    return {
        "versions": versions(),
        "hardware": hardware(device),
        "device": str(device),
        "precision": precision,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: torch.device | None = None) -> str:
    """The accelerator in use, else the processor and the cores this process may use.

    With family and model where Linux tells: virtual machines of one name can differ in them.
    """
    if (device or torch_device("auto")).type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text().partition("\n\n")[0]  # a paragraph for each processor
        told = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in first.splitlines())}
        name = told.get("model name", name)
        if "cpu family" in told:
            name += f" (family {told['cpu family']}, model {told['model']})"
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
