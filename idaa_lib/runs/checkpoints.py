"""Checkpoints of a run: written in full, then `latest.json` replaced; the last two are kept.

A checkpoint is a folder with `tensors.safetensors`, `state.json` and their checksums in
`checksums.json`; nothing in it unpickles. Reading checks the checksums, and falls back to the
checkpoint before if the newest is damaged.

Snapshots are the weights alone at the end of chosen epochs, `snapshots/<epoch>/`, all of them kept:
what the official protocol chooses among.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    with _told_if_full(run, tensors):
        _write(run.path / "checkpoints" / str(step), tensors, state)
        write_json(run.path / "latest.json", {"step": step})
    for old in _numbered(run.path / "checkpoints")[:-KEEP]:
        shutil.rmtree(run.path / "checkpoints" / str(old), ignore_errors=True)


def keep(run: Run, epoch: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write the snapshot of the weights after `epoch` epochs.

    Raises:
        RunError: the disk is full.
    """
    with _told_if_full(run, tensors):
        _write(run.path / "snapshots" / str(epoch), tensors, {"epoch": epoch})


def kept(run: Run) -> dict[int, str]:
    """Epoch → hash of the tensors, of each snapshot of a run, the earliest first.

    Raises:
        RunError: one is damaged.
    """
    root = run.path / "snapshots"
    return {epoch: _digest(root / str(epoch)) for epoch in snapshots(run)}


def snapshots(run: Run) -> list[int]:
    """The epochs of a run's snapshots, damaged ones too."""
    return _numbered(run.path / "snapshots")


def snapshot(run: Run, epoch: int) -> dict[str, torch.Tensor]:
    """The weights that were kept after `epoch` epochs.

    Raises:
        RunError: none were, or they are damaged.
    """
    folder = run.path / "snapshots" / str(epoch)
    if not _undamaged(folder):
        raise RunError(f"There is no undamaged snapshot of epoch {epoch} in {run.path}.")
    return load_file(folder / "tensors.safetensors")


@contextmanager
def _told_if_full(run: Run, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    try:
        yield
    # safetensors reports a failed write as its own error, with the system's words in it.
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            raise RunError(
                f"No space left on the disk of {run.path} for a checkpoint of {size / 2**20:.0f} "
                f"MiB; earlier checkpoints are intact: free some space and start the run again."
            ) from error
        raise


def _write(final: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """The folder `final` of tensors, state and checksums, whole or not at all."""
    draft = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Tied tensors would be refused by safetensors: each name gets storage of its own.
        plain = {name: t.clone() if t is tensors[name] else t for name, t in plain.items()}
        save_file(plain, draft / "tensors.safetensors")
        (draft / "state.json").write_text(json.dumps(state))
        sums = {name: _sha256(draft / name) for name in ("tensors.safetensors", "state.json")}
        (draft / "checksums.json").write_text(json.dumps(sums))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The latest undamaged checkpoint as (tensors on the CPU, state); None if there is none.

    A run that is not finished may go on from the one before; a finished one is its last checkpoint
    and nothing else, since its results and `digest` speak of that.

    Raises:
        RunError: there are checkpoints, and none that may be used is undamaged.
    """
    latest = (read_json(run.path / "latest.json") or {}).get("step")
    root = run.path / "checkpoints"
    steps = [step for step in reversed(_numbered(root)) if latest is None or step <= latest]
    if latest is not None and not steps:
        raise RunError(
            f"The checkpoints of {run.path} are gone, though it had one at step {latest}: delete "
            f"the folder to start anew."
        )
    for step in steps[:1] if run.finished else steps:
        folder = root / str(step)
        if _undamaged(folder):
            state = json.loads((folder / "state.json").read_text())
            return load_file(folder / "tensors.safetensors"), state
        if not run.finished:
            warnings.warn(f"Checkpoint {folder} is damaged; trying the one before.", stacklevel=2)
    if steps:
        which = "The last checkpoint" if run.finished else "Every checkpoint"
        raise RunError(f"{which} of {run.path} is damaged: delete the folder to start anew.")
    return None


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def digest(run: Run) -> str:
    """Hash of the latest checkpoint's tensors: what another run that starts from it names."""
    latest = read_json(run.path / "latest.json")
    if latest is None:
        raise RunError(f"Run {run.id} has no checkpoint.")
    return _digest(run.path / "checkpoints" / str(latest["step"]))


def _digest(folder: Path) -> str:
    sums = read_json(folder / "checksums.json")
    if not sums:
        raise RunError(f"{folder} is damaged: it has no checksums.json.")
    return sums["tensors.safetensors"]


def _undamaged(folder: Path) -> bool:
    sums = read_json(folder / "checksums.json") or {}
    return bool(sums) and all(_sha256(folder / name) == digest for name, digest in sums.items())


def _numbered(root: Path) -> list[int]:
    """The steps or epochs that `root` has folders of."""
    return sorted(int(p.name) for p in root.glob("[0-9]*") if p.is_dir())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
