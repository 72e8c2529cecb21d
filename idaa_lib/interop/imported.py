"""A published checkpoint as a finished run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from idaa_lib import runs
from idaa_lib.configs import ConfigError, SSLConfig, VAEConfig
from idaa_lib.interop.official import Channels, Official, load_official
from idaa_lib.methods import About, build_method
from idaa_lib.nets.resnet import SHAPES
from idaa_lib.runs import Run, checkpoints
from idaa_lib.runs.machine import describe, open_images, settled
from idaa_lib.train.stages import vae_figures
from idaa_lib.views import recipe


def import_run(
    path: str | Path,
    dataset: str,
    *,
    size: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    **values: Any,
) -> Run:
    """A published checkpoint as a finished run, for every notebook, `load_encoder` and `load_vae`.

    `environment.json` says which file it came from, with its SHA-256; the same file with the same
    values is the same run. A VAE's figures are measured on the validation images of `dataset`.

    Args:
        dataset: the images that it was trained on, or is to be used with, as in a configuration.
        size, mean, std: as in `load_official`.
        values: what else is known of its training, as fields of VAEConfig or SSLConfig (`kappa`,
            `adversary`, `epsilon`, …); what is not said is the preset `paper`'s.
    Raises:
        ConfigError: as `load_official`; values that the file contradicts; images that cannot be
            read.
    """
    path = Path(path).expanduser()
    read = load_official(path, size=size, mean=mean, std=std)
    config = _config(read, {"dataset": settled(dataset), **values}, path)
    data = open_images(config.dataset, config.split, config.size, config.limit)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    given = {"size": size, "mean": mean, "std": std, **values}
    given = {name: value for name, value in given.items() if value is not None}
    # Units are no field of a configuration, and make other features of the same weights.
    units_given = json.dumps([mean, std]) if mean or std else None
    run = runs.run_for(config, data.fingerprint, imported=digest, units=units_given)
    if run.finished:
        print(f"{run.id} is there already.")
        return run
    units = recipe("none", *read.units)
    about = describe(torch.device("cpu"), "no", data)
    about["dataset"] |= {"mean": read.mean, "std": read.std}
    about["imported"] = {"file": path.name, "sha256": digest, "epoch": read.epoch, "acc": read.acc}
    about["imported"] |= {"path": str(path.resolve()), "given": given}
    summary: dict[str, Any] = {"imported": path.name}
    if isinstance(config, VAEConfig):
        tensors = {f"network.{key}": tensor for key, tensor in read.module.state_dict().items()}
        val = open_images(config.dataset, "val", config.size, config.limit)
        figures = vae_figures(read.module, units, val.images, torch.device("cpu"))
        summary |= {name.removesuffix("_val"): value for name, value in figures.items()}
        summary |= {"kappa": config.kappa, "beta": config.beta, "dim": config.dim}
    else:
        method = build_method(config, About(units))
        parts = {"backbone": read.module, "projector": read.projector, "predictor": read.predictor}
        made = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        method.network.load_state_dict(made.state_dict())
        tensors = method.state_dict()
    model = {"size": read.size, "mean": read.mean, "std": read.std, "classes": len(data.classes)}
    with run.writing(config, about, model) as writer:
        counters = {"step": 0, "count": 0, "seconds": 0.0, "groups": []}
        checkpoints.save(run, 0, {f"method.{k}": v for k, v in tensors.items()}, counters)
        writer.finish(summary)
    return run


def _config(read: Official, values: dict[str, Any], path: Path) -> VAEConfig | SSLConfig:
    """The configuration that the file and the user's `values` make together."""
    module, given = read.module, {"preset": "paper"} | values
    if read.kind == "vae":
        known = {"dim": module.dim, "width": module.width}
    else:
        name = next(name for name, shape in SHAPES.items() if shape == module.shape)
        known = {"backbone": name, "width": module.width, "stem": module.stem}
        whole = read.encoder("projector").module
        linear = [part for part in whole.modules() if isinstance(part, nn.Linear)]
        known |= {"projection_dim": linear[-1].out_features}
        if read.kind == "simsiam":
            known |= {"pairing": "imagenet" if len(linear) == 3 else "cifar"}
        if (read.kind, values.get("method")) != ("plain", "uel"):
            known |= {"method": read.kind}
        given = {"adversary": "idaa" if module.adversarial_norms else "none"} | given
    for name, value in known.items():
        if values.get(name, value) != value:
            raise ConfigError(f"{path} has {name}={value!r}, not {values[name]!r}.")
    if read.kind == "vae":
        return VAEConfig(**given | known | {"size": read.size})
    config = SSLConfig(**given | known | {"size": read.size})
    if (config.adversary != "none") != module.adversarial_norms:
        raise ConfigError(
            f"adversary={config.adversary!r} does not go with {path}, whose network has "
            f"{'' if module.adversarial_norms else 'no '}adversarial norms."
        )
    return config
