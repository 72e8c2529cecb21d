"""Files of a run directory: read whole or refused in a sentence, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from idaa_lib.configs import UserError
from idaa_lib.data.places import check_regular
from idaa_lib.runs.machine import birth

# Of a run's files, what their entries are where they are there.
NUMBER = (int, float)
KINDS: dict[str, dict[str, Any]] = {
    "environment.json": {"imported": dict, "dataset": dict, "datasets": list},
    "model.json": {"size": int, "mean": list, "std": list},
    "summary.json": {"rows": list, "parts": dict, "seconds": NUMBER},
    "state.json": {"state": str, "pid": int, "host": str, "born": (*NUMBER, type(None))}
    | {"heartbeat": NUMBER, "started": NUMBER, "step": int, "steps": int},
    "process.json": {"pid": int, "host": str, "born": (*NUMBER, type(None))}
    | {"started": NUMBER, "log": int},
    "checksums.json": {"tensors.safetensors": str},
    "control.json": {"request": str},
    "latest.json": {"step": int},
    "tags.json": {"tags": list},
}
# What helps where a disk refuses.
CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EIO: "have the disk looked at",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "give yourself the right to",
    errno.EPERM: "give yourself the right to",
    errno.ESTALE: "mount it anew",
    errno.ENOTDIR: "move away the file that has a folder's name",
    errno.EEXIST: "move away the file that has a folder's name",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EISDIR: "delete that folder",
}


class RunError(UserError, RuntimeError):
    """A run that cannot start, continue or be found."""


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around whatever writes to `path`, or below it.

    Raises:
        RunError: the disk refuses: it is full, a quota is used up, it fails or is read-only.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has the system's error in its own words.
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else getattr(error, "errno", None)
        file = Path(os.fsdecode(getattr(error, "filename", None) or path))
        ours = file.is_relative_to(path.parent) or path.is_relative_to(file)
        if code not in CURES or not ours:
            raise
        file = path if file.name.startswith(".") else file  # of a draft what it would be
        raise RunError(
            f"{os.strerror(code)}, so {file} was not written; what was saved is intact: "
            f"{CURES[code]}, or set IDAA_OUTPUTS to a folder on another disk, and start again."
        ) from error


def replace(path: Path, content: bytes) -> None:
    """Replace `path` as a whole: a reader, or a crash, sees the old file or the new one.

    Raises: as `saving`.
    """
    draft = draft_of(path)
    with saving(path):
        try:
            draft.write_bytes(content)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those around it, where they are not there.

    Raises: as `saving`.
    """
    with saving(path):
        path.mkdir(parents=True, exist_ok=True)


def draft_of(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def clear_drafts(folder: Path) -> None:
    """Remove what processes that are gone had not yet put in its place."""
    for path in folder.glob(".*"):
        number = re.fullmatch(r"\..+\.(\d+)", path.name)
        with contextlib.suppress(OSError):
            # A process that is younger than the draft only has the same number.
            if number and (
                (since := birth(int(number[1]))) is None or path.stat().st_mtime < since
            ):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path: Path, value: Any) -> None:
    """As `replace`."""
    replace(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a file holds, None where there is no such file.

    Raises:
        RunError: it cannot be read, or is no JSON object, or none of its name's `KINDS`.
    """
    try:
        check_regular(path)
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {str(value)[:40]!r}, not an object")
        for name, kind in KINDS.get(path.name, {}).items():
            if name in value and not isinstance(value[name], kind):
                raise ValueError(f"its {name} is {str(value[name])[:40]!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it, or its folder.") from error
    return value


def read_lines(path: Path, lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The readings in whole lines of a metrics.jsonl.

    Raises:
        RunError: a line is no reading.
    """
    readings = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            reading = json.loads(line)
            if not isinstance(reading["step"], int):
                raise TypeError
            sum(reading.values())  # all are numbers
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RunError(
                f"{path} is damaged: line {number} is no reading; delete that line to see the rest."
            ) from None
        readings.append(reading)
    return readings
