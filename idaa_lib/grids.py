"""Grids: which points a study has, as data.

A grid is a YAML file or a dict, with the fields of `Grid`:

    fixed: {all: {preset: demo, limit: 500}, vae: {seed: 0}}    # stage → field → value
    cross: {ssl: {method: [simclr, moco], epsilon: [0.1, 0.3]}, vae: {dim: [32, 64]}}
    seeds: [0, 1]

`recipes/sweeps` has the paper's figures 5 and 6 and its main table. Notebooks 05, 06 and 11 make
theirs of a form (`sensitivity`, `cells`).
"""

from __future__ import annotations

import contextlib
import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field

from idaa_lib.configs import (
    CompareConfig,
    ConfigError,
    EvalConfig,
    SSLConfig,
    SweepConfig,
    VAEConfig,
)
from idaa_lib.configs.base import Positive, Seed, Values
from idaa_lib.configs.reading import expand, quote
from idaa_lib.evaluate.encoders import judged_on
from idaa_lib.runs import CONFIGS

RECIPES = Path(__file__).resolve().parent / "recipes" / "sweeps"
STAGES = ("vae", "ssl", "eval", "transfer")  # each needs one before it
Fields = dict[str, dict[str, Any]]  # stage → field → value
# A column of a table of results that is named as a field of `ssl` is of the training; these alone
# are of the images that judge its encoder.
TEST_FIELDS = ("dataset", "classes", "limit", "split")


class Point(NamedTuple):
    """One place of a grid: what names it in a table, and the fields of its runs, None of a stage
    that it does not have."""

    labels: dict[str, Any]
    vae: Any = None
    ssl: Any = None
    eval: Any = None
    transfer: Any = None

    @property
    def name(self) -> str:
        """Its labels and its seed, for a sentence."""
        seeds = [f"seed {s['seed']}" for s in (self.ssl, self.vae) if s and "seed" in s]
        labels = {**self.labels}
        if labels.get("axis") is not None and "at" in labels:
            labels["at"] = f"{labels.pop('axis')}={labels['at']}"
        values = [value for value in labels.values() if value is not None]
        words = [v if isinstance(v, str) and len(v) <= 100 else quote(v) for v in values]
        text, seed = " × ".join(words), ", ".join(seeds[:1])
        return f"{text} ({seed})" if text and seed else text or seed or "its one point"


class Grid(Values):
    """A grid.

    Fields:
        about: what it is for. jobs: notebooks that run at a time. stages: what each point is made
            of; a VAE only where the adversary needs one. seeds: of the encoder, and of the VAE
            unless `fixed` has another.
        fixed: stage → field → value; `all` means each stage that knows the field.
        cross: stage → field → values, of which every combination is a point. Where values go
            together: stage → list of {field: value}, or any other name → list of {stage: {field:
            value}}, each entry perhaps with `labels`.
        vary: as `cross`, but one field at a time; the others stay as `fixed` has them. The labels
            `axis` and `at` say which.
        labels: of all points. grids: several grids in one file, each with what stands here besides.
        notebooks: for the command, other notebooks to run at the end, with their parameters.
    """

    about: str = ""
    jobs: Positive = 1
    stages: Annotated[
        tuple[Literal["vae", "ssl", "eval", "transfer"], ...], Field(min_length=1)
    ] = ("vae", "ssl", "eval")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    fixed: Fields = Field(default_factory=dict)
    cross: dict[str, Any] = Field(default_factory=dict)
    vary: Fields = Field(default_factory=dict)
    labels: dict[str, Any] = Field(default_factory=dict)
    grids: list[dict[str, Any]] = Field(default_factory=list)
    notebooks: Fields = Field(default_factory=dict)

    def points(self) -> list[Point]:
        """Every combination of the crossed values, for each varied value and each seed.

        Raises:
            ConfigError: a stage or a field that there is not, or no list of values.
        """
        if self.grids:
            here = {name: getattr(self, name) for name in self.model_fields_set - {"grids"}}
            fixed = [_merge(self.fixed, Grid(**part).fixed) for part in self.grids]
            parts = [here | p | {"fixed": f} for p, f in zip(self.grids, fixed, strict=True)]
            return [point for part in parts for point in Grid(**part).points()]
        varied = [
            (own, {"axis": axis, "at": value})
            for steps in _axes("vary", self.vary)
            for own, names in steps
            for axis, value in names.items()
        ]
        crossed = _axes("cross", self.cross)
        named = {stage for own, _ in itertools.chain(varied, *crossed) for stage in own}
        if idle := [stage for stage in STAGES if stage in named - {*self.stages}]:
            raise ConfigError(
                f"cross and vary set fields of {', '.join(idle)}, and the stages of the points are "
                f"{', '.join(self.stages)}: add the stage, or leave the fields out."
            )
        if "seed" in self.fixed.get("all", {}):
            raise ConfigError("fixed cannot set the seed of all stages: give seeds: [0, 1, …].")
        axes: list[Any] = [varied] * bool(varied) + crossed
        places = []
        for *entries, seed in itertools.product(*axes, self.seeds):
            own: Fields = {"vae": {"seed": seed}, "ssl": {"seed": seed}}
            fields: Fields = {stage: {} for stage in self.stages}
            labels = dict(self.labels)
            for values in ({"all": self.fixed.get("all", {})}, own, self.fixed | {"all": {}}):
                _apply(fields, values)
            for values, names in entries:
                _apply(fields, values)
                labels |= names
            trained = fields.get("ssl", fields.get("vae", {}))
            if len(self.seeds) > 1 and trained.get("seed", seed) != seed:
                raise ConfigError(
                    f"seed={quote(trained['seed'])} of one stage stands beside seeds="
                    f"{quote(list(self.seeds))}, whose points would be one: leave one of them out."
                )
            places.append(Point(labels, **fields))
        return places


def name_labels(points: Sequence[Point]) -> list[str]:
    """The names of all labels that points have, in their order."""
    return list(dict.fromkeys(name for point in points for name in point.labels))


def read(grid: str | Path | Mapping[str, Any]) -> Grid:
    """The grid that a dict holds, or a file: a name of `recipes/sweeps`, or a path.

    Raises:
        ConfigError: there is no such file, it is no YAML, or a name in it is unknown.
    """
    if isinstance(grid, Mapping):
        return Grid(**_check_pairs("A grid", grid))
    try:
        path = RECIPES / f"{grid}.yaml"
        path = path if path.exists() else expand(grid)
        if path.exists() and not path.is_file():  # a pipe would never end
            raise OSError("it is no file")
        values = _check_pairs("it", yaml.safe_load(path.read_text(encoding="utf-8")))
        if isinstance(about := values.get("about"), str):  # may be of several lines
            values["about"] = " ".join(about.split())
        return Grid(**values)
    except (OSError, ValueError, RuntimeError, yaml.YAMLError) as error:  # nested too deeply, too
        names = ", ".join(sorted(other.stem for other in RECIPES.glob("*.yaml")))
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise ConfigError(
            f"The grid {quote(str(grid))} cannot be read: {reason} (Of this package: {names}.)"
        ) from error


def _check_pairs(what: str, values: Any) -> dict[str, Any]:
    """`values`, which must be pairs of name and value."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ConfigError(
            f"{what} must be pairs of name and value, such as {{epsilon: 0.1}}, and is "
            f"{quote(values)}."
        )
    return dict(values)


def _merge(fixed: Fields, own: Fields) -> Fields:
    return {stage: fixed.get(stage, {}) | own.get(stage, {}) for stage in fixed | own}


def _apply(fields: Fields, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Set `values` of each stage; of `all` in every stage that knows the name."""
    for stage, own in values.items():
        if stage not in (*STAGES, "all"):
            names = ", ".join(STAGES)
            raise ConfigError(f"A grid has {quote(stage)}, which is none of {names}, all.")
        for name, value in own.items():
            knowing = [s for s in STAGES if stage == s or CONFIGS[s]._owner(name)]
            if stage == "all" and not knowing:
                raise ConfigError(
                    f"A grid sets {quote(name)} of all stages, which none of them knows."
                )
            for other in {*knowing} & {*fields} if stage == "all" else {stage} & {*fields}:
                fields[other][name] = value


def _axes(what: str, axes: Mapping[str, Any]) -> list[list[tuple[Fields, dict[str, Any]]]]:
    """For each axis its values: what each sets, and its labels, which have the stage where several
    set a field of one name."""
    lists = []
    for stage, part in axes.items():
        if isinstance(part, dict):
            lists += [
                [{stage: {name: v}} for v in _list(what, name, vs)]
                for name, vs in _check_pairs(f"{what}[{quote(stage)}]", part).items()
            ]
        elif stage in (*STAGES, "all"):
            entries = [_check_pairs("An entry of a grid", own) for own in _list(what, stage, part)]
            lists.append(
                [
                    {"labels": e.pop("labels"), stage: e} if "labels" in e else {stage: e}
                    for e in entries
                ]
            )
        else:
            lists.append(_list(what, stage, part))
    parts = [[_read_entry(values) for values in each] for each in lists if each]
    fields = {
        (stage, name)
        for entry in itertools.chain(*parts)
        for stage, own in entry.items()
        if stage != "labels"
        for name in own
    }
    counts = Counter(name for _, name in fields)
    return [[_label(entry, counts) for entry in each] for each in parts]


def _list(what: str, name: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise ConfigError(
            f"{what}[{quote(name)}] must be a list of values, and is {quote(values)}."
        )
    return list(values)


def _read_entry(entry: Any) -> Fields:
    pairs = _check_pairs("An entry of a grid", entry).items()
    return {name: _check_pairs(name, own) for name, own in pairs}


def _label(parts: Fields, counts: Mapping[str, int]) -> tuple[Fields, dict[str, Any]]:
    """The fields and the labels of an entry. A label's name has the stage where a table of results
    has another field of that name; counts: name of a field → of how many stages it is."""
    fields = {stage: own for stage, own in parts.items() if stage != "labels"}
    labels: dict[str, Any] = {}
    for stage, own in fields.items():
        for name, value in own.items():
            kind = CONFIGS.get(stage, CONFIGS["ssl"])
            with contextlib.suppress(ConfigError):  # which the point is refused for, it alone
                value = kind._read(name, value)
            columns = TEST_FIELDS if stage == "ssl" else SSLConfig.model_fields
            several = counts[name] > 1 or (stage in STAGES and name in columns)
            labels[f"{stage} {name}" if several else name] = value
    return fields, parts.get("labels", labels)


# --- the forms of notebooks -----------------------------------------------------------------------


def sensitivity(config: SweepConfig) -> list[Point]:
    """The points of a sensitivity study: each axis around the middle, for each seed; or those of
    `config.grid`.

    The middle is what the recipes say of what is not varied; it is a point of every axis whose
    values contain it. Along the further axes there is each value without an adversary too; to ε, β
    and dim a training without one is the same everywhere: one point, whose `axis` is None.

    Hyper-parameters are chosen on a validation split, whatever the preset: it is held out of all
    trainings, and every point is judged by the clean protocol.

    Raises:
        ConfigError: as `read` and `Grid.points`; points that have no validation split.
    """
    points = _axes_of_form(config) if config.grid is None else _points_of_grid(config)
    if not points:
        raise ConfigError("The study has no point: give values of epsilons, betas, dims or axes.")
    for stage, name, value in (("eval", "protocol", "official"), ("ssl", "split", "trainval")):
        # An evaluation of `trainval` would call images that were trained on validation.
        clash = [p for p in points if p.eval and (getattr(p, stage) or {}).get(name) == value]
        if clash:
            raise ConfigError(
                f"{name}={value!r} of {len(clash)} of {len(points)} points (such as "
                f"{clash[0].name}) leaves no validation split, on which a study chooses its "
                f"hyper-parameters: leave it out here, or run a grid with make sweep."
            )
    return points


def _points_of_grid(config: SweepConfig) -> list[Point]:
    """The points of `config.grid`, in which what the form says stands where the grid says nothing;
    its seeds, where they are not the default, in place of the grid's."""
    grid, changes = read(config.grid or {}), config.list_changes()
    if "seeds" in changes:
        parts = [part | {"seeds": config.seeds} for part in grid.grids]
        grid = grid.model_copy(update={"seeds": config.seeds, "grids": parts})
    common = {"preset": config.preset, "device": config.device}
    # A data set that the form's preset gives would not go with another preset of the grid's.
    images = {"dataset": config.dataset} if "dataset" in changes else {}
    training = common | images | {"split": "train"}
    beneath = {"vae": training | config.vae, "ssl": training | config.ssl, "transfer": common}
    beneath["eval"] = common | {"protocol": "clean"} | config.eval
    return [
        point._replace(
            **{s: beneath[s] | own for s in STAGES if (own := getattr(point, s)) is not None}
        )
        for point in grid.points()
    ]


def _axes_of_form(config: SweepConfig) -> list[Point]:
    shared = _share_fields(config)
    shared["eval"] = {"protocol": "clean"} | shared["eval"]
    vae, ssl = ({"split": "train"} | fields for fields in (config.vae, config.ssl))
    # At a fixed κ another dim is another β: β is held, or two things would change at once.
    held = {name: value for name, value in vae.items() if name != "kappa"}
    held["beta"] = VAEConfig(**shared["all"] | vae).beta
    knobs = SSLConfig.list_kinds("adversary")[config.adversary].Options.model_fields
    plain = {name: value for name, value in ssl.items() if name not in knobs}
    grids: list[dict[str, Any]] = []

    def add(vae: Mapping[str, Any], ssl: Mapping[str, Any], *adversaries: str, **more: Any) -> None:
        cross = {"ssl": {"adversary": adversaries}}
        fixed = shared | {"vae": vae, "ssl": ssl}
        grids.append({"fixed": fixed, "cross": cross, "seeds": config.seeds} | more)

    if config.epsilons:
        add(vae, ssl, config.adversary, vary={"ssl": {"epsilon": config.epsilons}})
    if config.betas or config.dims:
        vary = {"beta": config.betas, "dim": config.dims}
        add(held, ssl, config.adversary, vary={"vae": vary})
    if grids:
        add(vae, plain, "none", labels={"axis": None, "at": None})
    if config.axes:
        add(vae, ssl, config.adversary, "none", vary={"ssl": config.axes})
    return [point for each in grids for point in Grid(**each).points()]


def cells(config: CompareConfig) -> list[Point]:
    """The cells of the main table: method × adversary, for each seed; one VAE for all.

    `system` is the row's name among `methods`. `vae_of` is the data set of a VAE that was trained
    elsewhere, else None. The first cell is judged with its references, the encoder before training
    and raw pixels: the same for all where all are judged alike (`clean`), and left out where the
    pixels are more than a probe can take.
    """
    points = []
    sources = dict.fromkeys((None, config.elsewhere))  # of the VAE
    for method, elsewhere in itertools.product(config.methods, sources):
        fixed = _share_fields(config)
        fixed["vae"] = {"seed": 0} | config.vae | ({"dataset": elsewhere} if elsewhere else {})
        fields = config.systems.get(method, {"method": method})
        fixed["ssl"] = config.ssl | config.ssl_of.get(method, {}) | fields
        cross = {"ssl": {"adversary": ["idaa"] if elsewhere else config.adversaries}}
        labels = {"system": method, "vae_of": elsewhere}
        points += Grid(labels=labels, fixed=fixed, cross=cross, seeds=config.seeds).points()
    first = points[0]
    if EvalConfig(**first.eval).protocol == "clean" and SSLConfig(**first.ssl).size <= 32:
        points[0] = first._replace(eval=first.eval | {"references": True} | config.eval)
    return points


def _share_fields(config: SweepConfig | CompareConfig) -> Fields:
    common = {name: getattr(config, name) for name in ("preset", "device", "dataset")}
    evaluation = {"references": False, "dataset": judged_on(config.dataset)}
    return {"all": common, "eval": evaluation | config.eval}
