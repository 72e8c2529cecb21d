"""`python -m idaa_lib.train ssl adversary=idaa epsilon=0.1`: a stage without a notebook.

The first word is the stage (vae, ssl, semi, eval, transfer, …), the others are fields of its
configuration. `@config.json` starts from a stored one; `mine.py` is imported, which may register
classes. `processes=2` trains on two GPUs; under torchrun every stage runs on many, and on many
machines (docs/machines.md). `python -m idaa_lib.train ssl --help` lists the fields.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idaa_lib.configs import OFFICIAL, ConfigError, UserError
from idaa_lib.configs.reading import expand
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.evaluate.transfer import transfer
from idaa_lib.identity import study
from idaa_lib.nets.processes import leave
from idaa_lib.runs import CONFIGS, Run, RunError, Stopped, read_json
from idaa_lib.train import train

STAGES: dict[str, Callable[[Any], Run]] = dict.fromkeys(("vae", "ssl", "semi"), train)
STAGES |= {"eval": evaluate, "transfer": transfer, "theory": study}


HELP = {"-h", "--help"}


def main(words: list[str]) -> int:
    if HELP & {*words}:
        print(__doc__)
        for row in CONFIGS[words[0]].fields() if words[0] in STAGES else ():
            owner = "" if row["of"] == "all" else f" ({row['of']})"
            text = f"{row['name']}{owner}: {row['meaning']}"
            print(textwrap.fill(text, 100, subsequent_indent="    "))
        return 0
    if not words or words[0] not in STAGES:
        print(__doc__, file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", 0)):  # of several processes, the first one speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return answer(lambda: run_stage(*words))


def run_stage(stage: str, *words: str) -> Run:
    """The finished run; by as many `processes` as the configuration names."""
    config = CONFIGS[stage](**read_words([*words]))
    n = getattr(config, "processes", 1)
    if n > 1 and "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n)))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        # In this one's place: its number, output and signals are the launcher's.
        command = [sys.executable, *launcher, "-m", "idaa_lib.train", stage, *words]
        os.execv(sys.executable, command)
    return STAGES[stage](config)


def read_words(words: list[str]) -> dict[str, Any]:
    """The values that words of the command line give."""
    values: dict[str, Any] = {}
    for word in words:
        if word.startswith("@"):
            try:
                configuration = read_json(expand(word[1:]))
            except RunError as error:
                why = f"{word[1:]} holds no configuration ({error.__cause__})"
                raise ConfigError(f"{why}: mend it, or give another file.") from error
            if configuration is None:
                raise ConfigError(f"There is no configuration {word[1:]}.")
            values |= configuration
        elif word.endswith(".py") and "=" not in word:
            import_file(expand(word))
        elif "=" in word and not word.startswith("-"):
            name, _, text = word.partition("=")
            values[name] = text
        else:
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            ours = OFFICIAL.get(name)
            hint = f"; the published code's {name} is {ours} here" if ours else ""
            raise ValueError(f"{word!r} is neither name=value nor @file.json nor file.py{hint}.")
    return values


def answer(make: Callable[[], Run]) -> int:
    """Print the run that `make` gives, or its error; the exit code."""
    try:
        run = make()
    # What a user can mend is told in its sentence; anything else is our fault and keeps its trace.
    except (UserError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Stopped) else 2
    leave()
    print(run.path)
    print(json.dumps(run.summary, indent=1, ensure_ascii=False))
    return 0


def import_file(path: Path) -> None:
    """Import the user's file, which registers methods, adversaries or backbones."""
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    sys.path.insert(0, str(path.resolve().parent))
    importlib.import_module(path.stem)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
