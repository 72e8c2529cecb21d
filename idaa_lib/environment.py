"""What a result was made with: versions, device, commit, data (a run's environment.json)."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from idaa_lib.images import ImageSet

PACKAGES = ("idaa_lib", "torch", "torchvision", "accelerate", "numpy", "scikit-learn", "pillow")


def describe(device: str, images: ImageSet) -> dict[str, Any]:
    """JSON values; `dataset` has the normalisation that the trained network expects."""
    return {
        "versions": versions(),
        "hardware": hardware(),
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": _commit(),
        "dataset": {
            "name": images.name,
            "split": images.split,
            "n": len(images),
            "size": images.size,
            "fingerprint": images.fingerprint,
            "mean": list(images.mean),
            "std": list(images.std),
            "skipped": images.skipped,
        },
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> str:
    """The accelerator, else the processor and the cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
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
