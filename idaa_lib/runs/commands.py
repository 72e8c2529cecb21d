"""The shell commands that make a run again."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from typing import Any

from idaa_lib.configs import Config, UserError
from idaa_lib.runs import Run


def asked(config: Config) -> dict[str, Any]:
    """The least that must be said to get `config` again: the preset, and what it does not imply."""
    values = {name: value for name, value in config if value is not None}
    for name in [name for name in values if name != "preset"]:
        fewer = {k: v for k, v in values.items() if k != name}
        with contextlib.suppress(UserError):
            if type(config)(**fewer) == config:
                values = fewer
    return values


def command(run: Run) -> str:
    """The shell command that makes the run (or resumes it, or shows it)."""
    if imported := run.environment.get("imported"):
        given = [f"{name}={value!r}" for name, value in imported["given"].items()]
        arguments = ", ".join([repr(imported["path"]), repr(run.config.dataset), *given])
        return shlex.join(["python", "-c", f"import idaa_lib; idaa_lib.import_run({arguments})"])
    fields = asked(run.config)
    words = [f"{name}={value}" for name, value in fields.items()]
    return shlex.join(["python", "-m", "idaa_lib.train", run.stage, *words])


def papermill(notebook: str, parameters: Mapping[str, Any]) -> str:
    """The shell command that runs `notebooks/<notebook>.ipynb` with these parameters."""
    words = ["papermill", f"notebooks/{notebook}.ipynb", f"outputs/{notebook}.ipynb"]
    for name, value in parameters.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += ["-p", name, text.strip("()").rstrip(",") if isinstance(value, tuple) else text]
    return shlex.join(words)
