"""A published checkpoint as a finished run."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idaa_lib import runs
from idaa_lib.configs import ConfigError, SSLConfig, VAEConfig
from idaa_lib.configs.reading import expand
from idaa_lib.interop.layouts import Channels, Keys
from idaa_lib.interop.official import Official, load_official
from idaa_lib.methods import About, build_method
from idaa_lib.methods.augself import WIDTHS
from idaa_lib.methods.vae import vae_figures
from idaa_lib.nets.resnet import SHAPES
from idaa_lib.runs import Run, Writer, checkpoints
from idaa_lib.runs.machine import describe, open_images, resolve_path
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.views import recipe


def import_run(
    path: str | Path,
    dataset: str | None = None,
    *,
    size: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    condition: Keys = None,
    injection: str | None = None,
    **values: Any,
) -> Run:
    """A published checkpoint as a finished run, for every notebook, `load_encoder` and `load_vae`.

    `environment.json` says which file it came from, with its SHA-256; the same file with the same
    values is the same run. What a file lacks (target networks, MoCo's queue, IP-IRM's partitions)
    is as in a new run, and a training that continues this one says so. A VAE's figures are measured
    on the validation images of `dataset`.

    Args:
        dataset: the images that it was trained on, or is to be used with, as in a configuration;
            None: what the name says, else the preset's.
        size, mean, std, condition, injection: as in `load_official`.
        values: what else is known of its training, as fields of VAEConfig or SSLConfig (`kappa`,
            `adversary`, `epsilon`, …). What the official name of the file says need not be given
            (`read_name`). What nobody states is unknown (`Config.list_stated`); a training that
            continues the run takes the preset `paper`'s value there, of CASSLE and AugSelf that of
            their name.
    Raises:
        ConfigError: as `load_official`; values that the file contradicts; images that cannot be
            read.
    """
    path = expand(path)
    units: dict[str, Any] = {"size": size, "mean": mean, "std": std}
    conditioning: dict[str, Any] = {"condition": condition, "injection": injection}
    source = load_official(path, **units, **conditioning)
    arguments = {k: v for k, v in (units | conditioning | values).items() if v is not None}
    if dataset is not None:
        values["dataset"] = resolve_path(dataset)
    values |= {name: value for name, value in units.items() if value is not None}
    config, unknown = _config(source, values, path)
    digests: dict[str, str] = {}
    for stage, name in (("vae", "vae"), (config.stage, "continue_from")):
        if getattr(config, name, None):
            other = runs.get(stage, getattr(config, name))
            config = config.replace(**{name: other.reference})
            digests[name] = checkpoints.digest(other)
    stored, lacks = _tensors(source, config, path)
    data = open_images(config.dataset, config.split, config.size, config.limit, **config.reading)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    run = runs.run_for(config, data.fingerprint, imported=digest, **digests)
    about = describe(torch.device("cpu"), "no", data)
    about["imported"] = {
        "file": path.name,
        "sha256": digest,
        "epoch": source.epoch,
        "acc": source.acc,
        "path": str(path.resolve()),
        "given": arguments,
        "unknown": unknown,
    }
    model = {"size": source.size, "mean": source.mean, "std": source.std}
    model["classes"] = len(data.classes)

    def store(writer: Writer) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if isinstance(config, VAEConfig):
            val = open_images(config.dataset, "val", config.size, config.limit, **config.reading)
            figures = vae_figures(source.module, recipe("none", *source.units), val.images)
            figures = {name.removesuffix("_val"): value for name, value in figures.items()}
            names = {"kappa", "beta", "dim"} - {*unknown}
            figures |= {name: value for name, value in config if name in names}
        counters = {"step": 0, "count": 0, "seconds": 0.0, "groups": [], "lacks": lacks}
        checkpoints.save(run, 0, {f"method.{k}": v for k, v in stored.items()}, counters)
        return {"imported": path.name, **figures}

    return perform(Plan(config, run, environment=about, model=model), store)


def _tensors(
    source: Official, config: VAEConfig | SSLConfig, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """What the run stores of its method, by name, and the parts of it that the file lacks: they are
    as in a new run, where a target network starts as a copy of the online one."""
    if isinstance(config, VAEConfig):
        return nn.ModuleDict({"network": source.module}).state_dict(), []
    method = build_method(config, About(recipe(config.augmentation, *source.units)))
    parts: dict[str, Any] = {"backbone": source.module, "projector": source.projector}
    parts |= {"predictor": source.predictor, "differences": source.differences}
    whole: dict[str, Any] = {"network": nn.ModuleDict(parts), "target": source.target}
    theirs = nn.ModuleDict(whole).state_dict()
    ours = method.state_dict()
    others = [k for k in theirs if k not in ours or theirs[k].shape != ours[k].shape]
    missing = sorted(ours.keys() - theirs.keys())
    if others := others + [k for k in missing if k.startswith("network.")]:
        raise ConfigError(
            f"{path} is not of the network that method={config.method!r} has here (the first "
            f"difference is {others[0]}): load_official reads it."
        )
    copies = {k: theirs.get(k.replace("target.", "network.", 1), ours[k]) for k in missing}
    return theirs | copies, sorted({k.partition(".")[0] for k in missing})


def read_name(path: Path) -> dict[str, Any]:
    """What the official name of a file says of its training, as fields and knobs.

    `cifar10_resnet18_batch_256_alpha_1.0_adv_eps_0.1_proj_dim_64_…_seed_1_epoch_300.pt` of an
    encoder; of a VAE its folder, `vae_cifar10_dim512_kl0.1_simclr/model_epoch292.pth`. The epoch is
    that of the file (`Official.epoch`), not the length of its training: one is saved every 50.
    """
    number = r"(\d+(?:\.\d+)?(?:e-\d+)?)"
    folder = path.absolute().parent.name
    vae = re.fullmatch(rf"vae_(?:(\w+)_)?dim\d+_kl{number}_(simclr|simsiam|normal)", folder)
    if vae and path.name.startswith("model_epoch"):
        fields: dict[str, Any] = {"dataset": vae[1], "kappa": vae[2], "augmentation": vae[3]}
    elif beginning := re.match(r"([^\W_]+)_resnet\d+_batch_(\d+)_", path.name):
        parts = {
            "seed": r"seed_?(\d+)_", "epsilon": rf"_eps_{number}_", "alpha": rf"_alpha_{number}_",
            "adversary": r"_method_(normal|clae|idaa)_",
        }  # fmt: skip
        matches = {name: re.search(part, path.name) for name, part in parts.items()}
        fields = {"dataset": beginning[1], "batch_size": beginning[2]}
        fields |= {name: match[1] for name, match in matches.items() if match}
        if "_adv_eps_" in path.name and "seed" in fields:  # CLAE's own files have `trial` there
            fields["adversary"] = "idaa"
        if fields.get("adversary") == "normal":
            fields["adversary"] = "none"
            fields = {k: v for k, v in fields.items() if k not in ("epsilon", "alpha")}
    else:
        return {}
    dataset = DATASETS.get(str(fields.pop("dataset")).lower())
    return fields | ({"dataset": dataset} if dataset else {})


# What official names call a data set.
DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "miniimagenet": "mini-imagenet"}


def _config(
    source: Official, values: dict[str, Any], path: Path
) -> tuple[VAEConfig | SSLConfig, list[str]]:
    """The configuration that the file, its name and the user's `values` make together; the names in
    it of which none of the three says anything."""
    stage = VAEConfig if source.kind == "vae" else SSLConfig
    values = {name: stage._read(name, value) for name, value in (read_name(path) | values).items()}
    module = source.module
    fields: dict[str, Any] = {"preset": "paper"}
    if source.knobs:
        system = "augself" if source.differences else "cassle"
        data = "stl10" if module.shape == SHAPES["resnet18"] else "imagenet100"
        fields = {"preset": f"{system}-{data}", "classes": ""}  # which go with the recipe's images
        weight = 1.0 if data == "stl10" else 0.5  # of AugSelf's heads, by its README
        heads = [*(source.differences or ())]
        if others := [name for name in heads if name not in WIDTHS]:
            raise ConfigError(
                f"{path} has AugSelf's head {others[0]!r}, and a run has none of this name: "
                f"load_official reads it."
            )
        fields |= {"augself": dict.fromkeys(heads, weight)}
    if source.kind in ("ipirm", "rsa") and str(values.get("dataset")).startswith("stl10"):
        fields["source_size"] = 96  # of which their code cuts its crops
    fields |= values
    if source.kind == "vae":
        facts = {"dim": module.dim, "width": module.width}
    else:
        name = next(name for name, shape in SHAPES.items() if shape == module.shape)
        facts = {"backbone": name, "width": module.width, "stem": module.stem}
        head: Any = getattr(source.projector, "head", source.projector)
        layers = [part for part in head.modules() if isinstance(part, nn.Linear)]
        facts |= {"projection_dim": layers[-1].out_features}
        if source.kind == "simsiam":
            facts |= {"pairing": "imagenet" if len(layers) == 3 else "cifar"}
        if (source.kind, values.get("method")) not in (("plain", "uel"), ("moco", "simclr")):
            facts |= {"method": source.kind}
        fields = {"adversary": "idaa" if module.adversarial_norms else "none"} | fields
        facts |= source.knobs
    for name, value in facts.items():
        if values.get(name, value) != value:
            raise ConfigError(f"{path} has {name}={value!r}, not {values[name]!r}.")
    config = stage(**fields | facts | {"size": source.size})
    if source.kind != "vae" and (config.adversary != "none") != module.adversarial_norms:
        raise ConfigError(
            f"adversary={config.adversary!r} does not go with {path}, whose network has "
            f"{'' if module.adversarial_norms else 'no '}adversarial norms."
        )
    sure = {*values, *facts, *config.circumstances}
    sure |= {"beta", "kappa"} if sure & {"beta", "kappa"} else set()
    sure |= {"adversary"} if fields.get("adversary") == "none" else set()
    # The images that it is used with.
    sure |= {"dataset", "classes", "split", "limit", "size", "source_size", "mean", "std"}
    return config, [name for name, _ in config if name not in sure]
