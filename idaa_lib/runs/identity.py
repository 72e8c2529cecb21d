"""Which directory a configuration leads to, and what makes a run again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from idaa_lib.configs import Config, UserError
from idaa_lib.runs.directory import RESULTS_VERSION, Run, outputs_root
from idaa_lib.runs.machine import torch_device, uses_bf16


def run_for(config: Config, dataset: str, **digests: str | None) -> Run:
    """The run directory that `config` leads to, whether it exists yet or not.

    Its id ends in a hash over the fields that differ from their defaults, the precision and the
    compilation that they mean on this machine, and what else the run starts from, by content.

    Args:
        dataset: fingerprint of the images.
        digests: of the VAE's weights (`vae`), of sources of registered classes, and so on.
    """
    fields = {k: v for k, v in config.identity().items() if k != "precision"}
    identity = {"config": fields, "dataset": dataset, "version": RESULTS_VERSION}
    if (precision := getattr(config, "precision", "fp32")) != "fp32":
        identity["bf16"] = uses_bf16(precision, torch_device(getattr(config, "device", "auto")))
    identity["compile"] = getattr(config, "compile", False)  # which rounds otherwise
    identity = {name: value for name, value in (identity | digests).items() if value}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    # Of a path, the last part; of a run's id, all but its stage.
    words = [Path(str(getattr(config, name))).name for name in config.principal]
    words = [word.removesuffix(".zip").removeprefix("ssl-") for word in words]
    changes = config.list_changes()
    # κ and β say the same, and β is the one that compares; what is named by content is in the hash.
    hidden = config.circumstances | config.pointers | {"kappa", "seed", "mean", "std"}
    hidden |= set() if "kappa" in changes else {"beta"}
    hidden |= set() if "source_size" in fields else {"source_size"}
    words += [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in changes.items()
        if name not in hidden
    ]
    if vae := digests.get("vae"):
        words.append(f"vae={vae[:4]}")
    text = re.sub(r"[^\w.=-]+", "_", "-".join([config.stage, *words]))
    text = text.encode()[:120].decode(errors="ignore")  # a file's name has 255 bytes
    run = Run(outputs_root() / config.stage / f"{text}-s{getattr(config, 'seed', 0)}-{digest}")
    if run.path.exists():
        return run
    # When this run was made, the folder of images may have had another name, and a recipe of the
    # same values as well.
    before = sorted(run.path.parent.glob(f"*-{digest}/config.json"))
    return Run(before[0].parent) if before else run


def parameters(config: Config) -> dict[str, Any]:
    """The least that makes `config` again: the preset, and what it does not imply."""
    values = {name: value for name, value in config if value is not None}
    names = {"preset", *config.principal, *config.list_changes()}
    few = {name: value for name, value in values.items() if name in names}
    with contextlib.suppress(UserError):
        values = few if type(config)(**few) == config else values
    for name in [name for name in values if name != "preset"]:
        fewer = {k: v for k, v in values.items() if k != name}
        with contextlib.suppress(UserError):
            if type(config)(**fewer) == config:
                values = fewer
    return values


def command(run: Run) -> str:
    """The shell command that makes the run (or resumes it, or shows it)."""
    if source := run.environment.get("imported"):
        values = {"dataset": run.config.dataset, **source["given"]}
        words = [source["path"], *(f"{name}={value}" for name, value in values.items())]
        return shlex.join(["python", "-m", "idaa_lib", "import", *words])
    words = [f"{name}={value}" for name, value in parameters(run.config).items()]
    return shlex.join(["python", "-m", "idaa_lib.train", run.stage, *words])
