"""Checkpoints of a run, and the snapshots of its weights that it keeps.

A checkpoint is a folder `checkpoints/<step>/` with `tensors.safetensors`, `state.json` and their
checksums in `checksums.json`, written in full before `latest.json` names it; nothing in it
unpickles. The last two stay: reading falls back to the one before if the newest is damaged.

A snapshot is a folder `snapshots/<epoch>/` of the weights alone; all stay, and the official
protocol chooses among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from idaa_lib.runs.directory import Run
from idaa_lib.runs.files import RunError, draft_of, read_json, write_json

KEEP = 2
FILES = ("tensors.safetensors", "state.json")
Tensors = dict[str, torch.Tensor]


def save(run: Run, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
    """Write checkpoint `step`, make it the latest, and drop all but the last two.

    Args:
        tensors: by name, any dtype, device and memory format.
        state: JSON values (counters, optimiser groups).
    """
    _write(run.path / "checkpoints" / str(step), tensors, state)
    write_json(run.path / "latest.json", {"step": step})
    # Later ones are damaged: the run went on from one before them.
    steps = _numbers(run.path / "checkpoints")
    for old in set(steps) - set([other for other in steps if other <= step][-KEEP:]):
        shutil.rmtree(run.path / "checkpoints" / str(old), ignore_errors=True)


def load(run: Run) -> tuple[Tensors, dict[str, Any]] | None:
    """The latest undamaged checkpoint as (tensors on the CPU, state); None if there is none.

    A run that is not finished may continue from the one before; a finished one is its last
    checkpoint and nothing else, since its results and `digest` speak of that.

    Raises:
        RunError: there are checkpoints, and none that may be used is undamaged.
    """
    latest, root = _latest(run), run.path / "checkpoints"
    steps = [step for step in reversed(_numbers(root)) if latest is None or step <= latest]
    if run.finished and latest is not None:
        steps = [step for step in steps if step == latest]
    if latest is not None and not steps:
        raise RunError(
            f"The checkpoints of {run.path} are gone, though it had one at step {latest}: delete "
            f"the folder to start anew."
        )
    for step in steps[:1] if run.finished else steps:
        folder = root / str(step)
        if _is_whole(folder):
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return load_file(folder / "tensors.safetensors"), state
        if not run.finished:
            warnings.warn(f"Checkpoint {folder} is damaged; trying the one before.", stacklevel=2)
    if steps:
        which = "The last checkpoint" if run.finished else "Every checkpoint"
        raise RunError(f"{which} of {run.path} is damaged: delete the folder to start anew.")
    return None


def digest(run: Run) -> str:
    """Hash of the latest checkpoint's tensors: what another run that starts from it names."""
    if (step := _latest(run)) is None:
        raise RunError(f"Run {run.id} has no checkpoint.")
    return _digest(run.path / "checkpoints" / str(step))


def are_there(run: Run) -> bool:
    """Whether the last weights are there, not cut off; they are not read through."""
    folder = run.path / "checkpoints" / str(_latest(run))
    try:
        with safe_open(folder / "tensors.safetensors", "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def are_whole(run: Run) -> bool:
    """Whether the last weights are as they were written."""
    return _is_whole(run.path / "checkpoints" / str(_latest(run)))


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def keep(run: Run, epoch: int, tensors: Tensors) -> None:
    """Write the snapshot of the weights after `epoch` epochs."""
    _write(run.path / "snapshots" / str(epoch), tensors, {"epoch": epoch})


def snapshots(run: Run) -> dict[int, str]:
    """Epoch → hash of the tensors, of each snapshot of a run, the earliest first.

    Raises:
        RunError: one is damaged.
    """
    root = run.path / "snapshots"
    return {epoch: _digest(root / str(epoch)) for epoch in _numbers(root)}


def snapshot(run: Run, epoch: int) -> Tensors:
    """The weights after `epoch` epochs.

    Raises:
        RunError: there is no snapshot of them, or it is damaged.
    """
    folder = run.path / "snapshots" / str(epoch)
    if not _is_whole(folder):
        raise RunError(f"There is no undamaged snapshot of epoch {epoch} in {run.path}.")
    return load_file(folder / "tensors.safetensors")


def _write(final: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """The folder `final` of tensors, state and checksums, whole or not at all."""
    draft = draft_of(final)
    try:
        draft.mkdir(parents=True, exist_ok=True)
        # Tied tensors would be refused by safetensors: each name gets storage of its own.
        plain = torch.contiguous_format
        copies = {k: v.detach().cpu().clone(memory_format=plain) for k, v in tensors.items()}
        save_file(copies, draft / FILES[0])
        (draft / FILES[1]).write_text(json.dumps(state), encoding="utf-8")
        sums = {name: _sha256(draft / name) for name in FILES}
        (draft / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _latest(run: Run) -> int | None:
    """The step of the last checkpoint, there or not; None where there was none. Where latest.json
    is damaged, that of the last folder."""
    with contextlib.suppress(RunError, KeyError):
        latest = read_json(run.path / "latest.json")
        return None if latest is None else latest["step"]
    return max(_numbers(run.path / "checkpoints"), default=None)


def _digest(folder: Path) -> str:
    sums = read_json(folder / "checksums.json") or {}
    if FILES[0] not in sums:
        raise RunError(f"{folder} is damaged: it has no checksums.json with that of its weights.")
    return sums[FILES[0]]


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(RunError, OSError):
        sums = read_json(folder / "checksums.json") or {}
        return all(_sha256(folder / name) == sums.get(name) for name in FILES)
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbers(root: Path) -> list[int]:
    """The steps or epochs that `root` has folders of."""
    return sorted(int(p.name) for p in root.glob("[0-9]*") if p.name.isdecimal() and p.is_dir())
