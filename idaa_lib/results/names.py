"""What a run is called, and what tells runs apart: words for tables, labels and lines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from idaa_lib import runs
from idaa_lib.configs import UNKNOWN, UserError
from idaa_lib.methods import METHODS
from idaa_lib.runs import Run, RunError

ADVERSARIES = {"none": "no adversary", "idaa": "IDAA", "clae": "CLAE", "random_sign": "random sign"}
# Stages that judge a training, which their field `run` names.
JUDGING = ("eval", "transfer")


def training_of(run: Run) -> Run | None:
    """The training that a run is of: itself, or of an evaluation what it judges, None once gone."""
    if run.stage not in JUDGING:
        return run
    try:
        return runs.encoder(run.config.run)
    except RunError:
        return None


def title(config: Any) -> tuple[str, str]:
    """Method and adversary by the names that people know them by; of a VAE or a study its own."""
    if config.stage == "vae":
        return f"VAE, dim {config.dim}", ""
    if config.stage == "theory":
        return f"identity of {config.images} images", ""
    if "adversary" not in dict(config):  # a stage of one's own, such as detection
        return config.stage, ""
    adversary = ADVERSARIES.get(config.adversary, config.adversary)
    if "adversary" in config.unknown:
        adversary = "an unknown adversary"
    if getattr(config, "lambda_u", None) == 0:  # FixMatch's other half, the control
        return "labels alone", adversary
    return getattr(METHODS.get(config.method), "__name__", config.method), adversary


def name_of(run: Run) -> str:
    """`SimCLR + IDAA`, `VAE, dim 128`; of an evaluation, what it judges."""
    training = training_of(run)
    if training is None:
        return run.config.run
    method, adversary = title(training.config)
    return method if adversary in ("", ADVERSARIES["none"]) else f"{method} + {adversary}"


def full_name(run: Run, config: Any = None) -> str:
    """`SimCLR + IDAA ε 0.1 · photos · 1a2b3c4d`, `VAE β 0.4, dim 128 · …`: what a training is, its
    images, its seed where it is not 0, and the end of its id.

    config: of a run that is not there yet.
    """
    config = config or run.config
    values, (what, adversary) = config.list_stated(), title(config)
    if config.stage == "vae":
        what = f"VAE {field_text('beta', values['beta'], ' ')}, dim {config.dim}"
    elif config.adversary != "none":
        what += f" + {adversary}"
        if "epsilon" in values:  # which an adversary of one's own may lack
            what += f" {field_text('epsilon', values['epsilon'], ' ')}"
    if config.stage == "semi":
        what += f", {config.labels_per_class} labels a class"
    words = [what, Path(config.dataset).name.removesuffix(".zip"), f"seed {values['seed']}"]
    return " · ".join([*words[: 3 if config.seed else 2], run.id[-8:]])


def find_differences(selection: Sequence[Run]) -> dict[str, list[Any]]:
    """Field → its value in each run (None: it has no such field), for the fields that differ where
    they are known.

    In place of `vae`, an id, stand the fields in which the VAEs differ, such as `beta` and `dim`,
    where these tell all of them apart.
    """
    dumps = [run.config.list_stated() for run in selection]
    for run, dump in zip(selection, dumps, strict=True):
        if "precision" in dump:  # "auto" is another one on another machine
            precision = run.environment.get("precision", dump["precision"])
            dump["precision"] = "fp32" if precision == "no" else precision
    fields = dict.fromkeys(name for dump in dumps for name in dump)
    values = {name: [dump.get(name) for dump in dumps] for name in fields}
    facts = {name: [v for v in row if v != UNKNOWN] for name, row in values.items()}
    differences = {k: values[k] for k, row in facts.items() if any(v != row[0] for v in row)}
    vaes = {name: describe_vae(name) for name in differences.get("vae", ()) if name}
    if len({repr(vae) for vae in vaes.values() if vae}) == len(vaes) > 1:
        own = [vaes.get(name, {}) for name in differences.pop("vae")]
        for field in dict.fromkeys(name for vae in own for name in vae):
            row = [vae.get(field) for vae in own]
            if len({repr(value) for value in row if value is not None}) > 1:
                differences[field] = row
    return differences


def describe_vae(name: str) -> dict[str, Any]:
    """`beta`, `dim`, `VAE epochs` and so on of a VAE by its id; nothing once the VAE is gone."""
    try:
        config = runs.get("vae", name).config
    except UserError:
        return {}
    silent = {*config.circumstances, "kappa"}  # β says what κ says
    own = {field: value for field, value in config if field not in silent}
    return {f if f in ("beta", "dim") else f"VAE {f}": value for f, value in own.items()}


def tell_apart(selection: Sequence[Run], hidden: Collection[str] = ()) -> list[str]:
    """What each run is and what tells it from the others, but for the `hidden` fields."""
    names, configs = [name_of(run) for run in selection], [run.config for run in selection]
    texts = list(names)
    for field, values in find_differences(selection).items():
        for i, (value, config) in enumerate(zip(values, configs, strict=True)):
            # β says what κ says; the name has the method, the adversary, of a VAE dim;
            # circumstances change nothing.
            silent = {*hidden, "method", "adversary", "run", "kappa", *config.circumstances}
            silent -= {"precision", "compile"}  # of which results are others
            if field in silent or value is None or (config.stage, field) == ("vae", "dim"):
                continue
            seed = getattr(config, "seed", None)
            if (field, value) in (("VAE seed", seed), ("lambda_u", 0)):  # seed and name say it
                continue
            # What only this method or adversary has tells runs apart within it, or where it is
            # not the recipe's.
            within = {str(v) for v, name in zip(values, names, strict=True) if name == names[i]}
            own = field in config.list_changes() and field != "vae"
            if field in type(config).model_fields or len(within) > 1 or own:
                texts[i] += f", {field_text(field, value)}"
    return [text + ", of a file" * bool(c.unknown) for text, c in zip(texts, configs, strict=True)]


def labels(selection: Sequence[Run]) -> dict[str, Run]:
    """Short label → run, for runs of one stage: what they are, and what differs between them."""
    texts = tell_apart(selection)
    return {
        text if texts.count(text) == 1 else f"{text} ({run.id[-8:]})": run
        for text, run in zip(texts, selection, strict=True)
    }


def field_text(field: str, value: Any, equals: str = " = ") -> str:
    """`ε = 0.3`: a field and its value, short."""
    symbol = {"epsilon": "ε", "beta": "β"}.get(field, field)
    if field.removeprefix("VAE ") in ("vae", "witness", "continue_from", "dataset", "classes"):
        # Of an id its hash, of a path its last part.
        value = str(value).rsplit("/", 1)[-1].rsplit("-", 1)[-1]
    return f"{symbol}{equals}{value_text(value)}"


def value_text(value: Any) -> str:
    """A field's value for people: `0.1, 0.3` of a list, `epochs: 3` of a table, – of None."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {value_text(own)}" for name, own in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "–"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
