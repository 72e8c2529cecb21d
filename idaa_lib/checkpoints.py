"""Checkpoints of a run: written in full, then `latest.json` replaced; the last two are kept.

A checkpoint is a folder with `tensors.safetensors`, `state.json` and their checksums in
`checksums.json`; nothing in it unpickles. Reading checks the checksums, and falls back to the
checkpoint before if the newest is damaged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from idaa_lib.runs import Run, RunError, read_json, write_json

KEEP = 2


def save(run: Run, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write checkpoint `step`, make it the latest, and drop all but the last two.

    Args:
        tensors: by name, any dtype, device and memory format.
        state: JSON values (counters, optimiser groups).
    Raises:
        RunError: the disk is full; earlier checkpoints are intact.
    """
    root = run.path / "checkpoints"
    draft = root / f".{step}.{os.getpid()}"
    try:
        draft.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Tied tensors would be refused by safetensors: each name gets storage of its own.
        plain = {name: t.clone() if t is tensors[name] else t for name, t in plain.items()}
        save_file(plain, draft / "tensors.safetensors")
        (draft / "state.json").write_text(json.dumps(state))
        sums = {name: _sha256(draft / name) for name in ("tensors.safetensors", "state.json")}
        (draft / "checksums.json").write_text(json.dumps(sums))
        final = root / str(step)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
        write_json(run.path / "latest.json", {"step": step})
    # safetensors reports a failed write as its own error, with the system's words in it.
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            raise RunError(
                f"No space left on the disk of {run.path} for a checkpoint of {size / 2**20:.0f} "
                f"MiB; earlier checkpoints are intact: free some space and start the run again."
            ) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in _steps(run)[:-KEEP]:
        shutil.rmtree(root / str(old), ignore_errors=True)


def load(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The latest undamaged checkpoint as (tensors on the CPU, state); None if there is none.

    A run that is not finished may go on from the one before; a finished one is its last checkpoint
    and nothing else, since its results and `digest` speak of that.

    Raises:
        RunError: there are checkpoints, and none that may be used is undamaged.
    """
    latest = (read_json(run.path / "latest.json") or {}).get("step")
    steps = [step for step in reversed(_steps(run)) if latest is None or step <= latest]
    if latest is not None and not steps:
        raise RunError(
            f"The checkpoints of {run.path} are gone, though it had one at step {latest}: delete "
            f"the folder to start anew."
        )
    for step in steps[:1] if run.finished else steps:
        folder = run.path / "checkpoints" / str(step)
        sums = read_json(folder / "checksums.json") or {}
        if sums and all(_sha256(folder / name) == digest for name, digest in sums.items()):
            state = json.loads((folder / "state.json").read_text())
            return load_file(folder / "tensors.safetensors"), state
        if not run.finished:
            warnings.warn(f"Checkpoint {folder} is damaged; trying the one before.", stacklevel=2)
    if steps:
        which = "The last checkpoint" if run.finished else "Every checkpoint"
        raise RunError(f"{which} of {run.path} is damaged: delete the folder to start anew.")
    return None


def digest(run: Run) -> str:
    """Hash of the latest checkpoint's tensors: what another run that starts from it names."""
    latest = read_json(run.path / "latest.json")
    if latest is None:
        raise RunError(f"Run {run.id} has no checkpoint.")
    sums = read_json(run.path / "checkpoints" / str(latest["step"]) / "checksums.json")
    if not sums:
        raise RunError(f"The last checkpoint of {run.path} is damaged: it has no checksums.json.")
    return sums["tensors.safetensors"]


def _steps(run: Run) -> list[int]:
    return sorted(int(p.name) for p in (run.path / "checkpoints").glob("[0-9]*") if p.is_dir())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
