"""Training in a process of its own, which outlives the notebook that started it.

`python -m idaa_lib.train` writes the run directory, in a session of its own, so that the kernel's
end does not take it along. All that is known of it here is in that directory, so any kernel finds
the process that another one started.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from idaa_lib import runs
from idaa_lib.configs import TrainingConfig
from idaa_lib.registry import SOURCES
from idaa_lib.runs import Run, RunError, machine
from idaa_lib.runs.files import saving
from idaa_lib.train import stages

# Words of `look` for a run that a process is at.
UNDER_WAY = ("starting", "going", "paused", "ending")
# Seconds that a process which has saved its run may take to end.
ENDING = 60.0
# Processes that this kernel started: their parent must ask after them, or they stay as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


def start(config: TrainingConfig) -> Run:
    """The run of `config`, with a process at work on it unless it is finished.

    Raises:
        ConfigError, RunError: one sentence, where it can be known before the process starts.
    """
    config, run = stages.settle(config)
    run.note_start(config)
    launch(run, config)
    return run


def launch(run: Run, config: TrainingConfig) -> None:
    """Start the process of `run`, if it needs one. It may be on its way when this returns."""
    # The second of two tabs finds the first one's process.
    with saving(run.path), FileLock(run.path / ".start"):
        since = time.monotonic()
        while (now := look(run)).word == "ending" and time.monotonic() - since < ENDING:
            time.sleep(0.1)
        if now.word in UNDER_WAY or now.word == "finished":
            return
        files = sorted({SOURCES[kind][0] for kind in config.foreign().values()})
        runs.write_json(run.path / "config.json", config.model_dump(mode="json"))
        command = [sys.executable, "-m", "idaa_lib.train", run.stage, *files]
        own = {"IDAA_OUTPUTS": str(run.path.parent.parent), "PYTHONUNBUFFERED": "1"}
        with (run.path / "log.txt").open("ab") as log:
            length = log.tell()
            process = subprocess.Popen(
                [*command, f"@{run.path / 'config.json'}"], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | own,
            )  # fmt: skip
        _children[process.pid] = process
        about = {
            "pid": process.pid, "born": machine.birth(process.pid), "log": length,
            "host": socket.gethostname(), "started": time.time(),
        }  # fmt: skip
        runs.write_json(run.path / "process.json", about)


class Look(NamedTuple):
    """A run at one moment.

    word: new, starting, going, paused, ending (over, its process about to go), finished,
    interrupted or failed; state: its state.json; reason: sentences, where something went wrong.
    """

    word: str
    state: dict[str, Any]
    reason: str = ""


def look(run: Run) -> Look:
    """How the run is, from its directory and from the process that was started for it last."""
    state = run.state
    word = state["state"]
    if word == "going":
        return Look("paused" if state.get("paused") else "going", state)
    process: dict[str, Any] = {}
    with contextlib.suppress(RunError):  # of one that is damaged the run's own state says enough
        process = runs.read_json(run.path / "process.json") or {}
    process = process if {"pid", "born", "host", "log"} <= process.keys() else {}
    # Whether that process was the run's writer at all.
    wrote = state.get("heartbeat", 0.0) > process.get("started", 0.0)
    lives = bool(process) and _lives(process)  # of a finished run too: a zombie goes by that
    if word == "finished":
        return Look(word, state)
    if lives:
        return Look("ending" if wrote else "starting", state)
    if process and not wrote:
        return Look("failed", state, _last_words(run, process))
    if word == "failed":
        return Look(word, state, _sentence(state.get("error") or "", run))
    stored = runs.read_json(run.path / "state.json") or {}
    if stored.get("state") == "going":  # and its process is gone
        reason = "Its process was killed, by hand or for want of memory (a lower batch_size helps)."
        return Look(word, state, f"{reason} Start goes on from the last checkpoint.")
    return Look(word, state)


def stamp(path: Path) -> tuple[int, int]:
    """What changes with the content of a file; zeros where there is none."""
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def _lives(process: dict[str, Any]) -> bool:
    if child := _children.get(process["pid"]):
        return child.poll() is None
    here = process["host"] == socket.gethostname()
    return here and machine.is_alive(process["pid"], process["born"])


def _last_words(run: Run, process: dict[str, Any]) -> str:
    """Why a process ended that never became the run's writer."""
    with contextlib.suppress(OSError), (run.path / "log.txt").open("rb") as log:
        log.seek(process["log"])
        lines = log.read().decode(errors="replace").strip().splitlines()
        # torchrun's own error says that a process ended, which has said why.
        pattern = r"(?!.*ChildFailedError)[\w.]+(Error|Exception|Stopped): "
        errors = [line for line in lines if re.match(pattern, line)]
        if lines:
            return _sentence((errors or lines)[-1], run)
    return f"The process ended before it began to train and said nothing in {run.path / 'log.txt'}."


def _sentence(error: str, run: Run) -> str:
    """An error of ours is a sentence already; of any other the whole text is in the log."""
    if ours := re.fullmatch(r"(?:RunError|ConfigError|Stopped): (.*)", error, re.DOTALL):
        return ours[1]
    log = run.path / "log.txt"
    more = f" What led to it is in {log}." if log.exists() else ""
    return f"It ended with {error or 'an unknown error'}.{more}"
