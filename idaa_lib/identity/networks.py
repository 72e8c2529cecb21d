"""Which VAE, encoders and images a scene is of, where its configuration leaves that open."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from idaa_lib import runs
from idaa_lib.configs import ConfigError, DecomposeConfig, TheoryConfig
from idaa_lib.runs import Run
from idaa_lib.runs.choice import first, images_of, list_starter
from idaa_lib.runs.machine import resolve_path

C = TypeVar("C", DecomposeConfig, TheoryConfig)

VAES = 8  # siblings of one axis at most, the newest
UNTRAINED = "untrained"  # in place of a run
STARTER_NOTE = (
    "The starter is a small VAE and two encoders that ship with the library, trained on CIFAR-10 "
    "(data/starter/README.md). Train your own in notebooks 01 and 03."
)


def name_images(config: Any, vae: Run) -> str:
    """The data set that `config` names, else the one that the VAE was trained on; beside the
    starter's VAE the images that ship with it. Raises: as `images_of`."""
    return resolve_path(config.dataset or ("starter" if vae.ships else images_of(vae)))


def name_runs(config: C) -> C:
    """The configuration with its VAE, attacked encoder and witness named. Where they are None: the
    VAE that None means (`runs.choice`), or the starter's where there is none; the first encoder of
    its images or else `untrained`; what `choose_witness` gives.

    Raises:
        RunError: there is no such run. ConfigError: the witness is the attacked encoder.
    """
    name, attacked = config.vae, config.run
    if name is None and (vae := first(runs.usable("vae") or list_starter("vae"))):
        name = vae.reference
    vae = runs.get("vae", name)
    if attacked is None:
        attacked = _reference(first(beside("ssl", vae)))
    elif attacked != UNTRAINED:
        attacked = runs.get("ssl", attacked).reference
    names = {"vae": vae.reference, "run": attacked}
    if isinstance(config, TheoryConfig):
        names["witness"] = choose_witness(vae, attacked, config.witness)
    return config.replace(**names)


def choose_witness(vae: Run, attacked: str, name: str | None = None) -> str:
    """The run that judges identity, never the attacked one: `name`, else another one of the VAE's
    images, else `untrained`.

    Those come first that no adversary taught to see past its changes, then those of another seed
    (the same one begins with the same weights).
    """
    if name is None:
        others = [run for run in beside("ssl", vae) if run.reference != attacked]
        seed = None if attacked == UNTRAINED else runs.get("ssl", attacked).config.seed
        others.sort(key=lambda run: (run.config.adversary != "none", run.config.seed == seed))
        return _reference(first(others))
    if name != UNTRAINED and (name := runs.get("ssl", name).reference) == attacked:
        raise ConfigError(f"witness={name!r} is the encoder that is attacked: name another.")
    return name


def _reference(run: Run | None) -> str:
    return run.reference if run else UNTRAINED


def beside(stage: str, vae: Run) -> list[Run]:
    """Finished runs of a stage with the VAE's images and image size whose weights are there, in the
    order in which None chooses them. Of the starter's VAE, those that ship."""
    if vae.ships:
        return list_starter(stage)
    names = ("dataset", "classes", "size")
    return runs.usable(stage, **{name: getattr(vae.config, name) for name in names})


def siblings(run: Run) -> dict[str, list[Run]]:
    """Finished VAE runs on the same images that differ from `run` in β alone, and in dim alone.

    The newest `VAES` of each by ascending value, `run` itself among them.
    """

    def rest(config: Any) -> tuple[dict[str, Any], frozenset[str]]:
        axes = {"beta", "dim", "kappa"}  # κ follows from the others
        return {k: v for k, v in config.identity().items() if k not in axes}, config.unknown

    config = run.config
    members = {axis: {getattr(config, axis): run} for axis in ("beta", "dim")}
    for other in beside("vae", run):
        same_dim = other.config.dim == config.dim
        same_beta = math.isclose(other.config.beta, config.beta, rel_tol=1e-6)
        axis = "beta" if same_dim else "dim"
        alike = same_dim != same_beta and rest(other.config) == rest(config)
        if alike and len(members[axis]) < VAES:
            members[axis].setdefault(getattr(other.config, axis), other)
    return {axis: [of[value] for value in sorted(of)] for axis, of in members.items()}
