"""Recipes: published and demo settings as data, one TOML file a paper and data set.

A file has a table for each stage: `[ssl]` with its fields and knobs. A table `where` below
it holds where a field has a value: `[ssl.where.method.simsiam]`, also inside one another. What
comes later wins, and what the user gives wins over all. `extends` names another recipe that is
read first, or its path from where this one lies. `base_rate` is the learning rate of 256 images a
step, scaled to the batch (Goyal et al. 2017, arXiv:1706.02677).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from idaa_lib.configs.base import Config
from idaa_lib.configs.reading import ConfigError, expand, quote


def recipe_values(stage: type[Config], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the recipe gives to a configuration of `stage`.

    Args:
        explicit: what the user gives, which decides which tables hold.
    Raises:
        ConfigError: there is no such recipe, it is no TOML, a name in it is unknown, or what should
            be a table, a number or the name of another recipe is none.
    """
    preset, values = str(explicit.get("preset", "demo")), dict(explicit)
    documents = list(_documents(preset, stage.recipes))
    for _ in range(10):  # a condition is of the final value, whichever table sets it
        merged: dict[str, Any] = {}
        for path, document in documents:
            _apply(stage, document.get(stage.stage, {}), merged, values, path)
        before, values = values, {**merged, **explicit}
        if values == before:
            break
    else:
        raise ConfigError(
            f"preset={quote(preset)} never settles: a table below `where` changes the field that "
            f"it depends on."
        )
    base, batch = merged.pop("base_rate", None), values.get("batch_size")
    if not isinstance(base, int | float | None):
        raise ConfigError(
            f"base_rate of preset={quote(preset)} must be a number, and is {quote(base)}."
        )
    if base is not None and isinstance(batch, int):
        merged["learning_rate"] = base * batch / 256
    return merged


def _documents(
    preset: str, folder: Path, above: tuple[str, ...] = ()
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The recipe and those that it extends, the most basic one first."""
    path = folder / f"{preset}.toml"
    if not os.path.isfile(path):
        path = expand(preset)
    if path.suffix != ".toml":
        names = sorted(other.stem for other in folder.glob("*.toml"))
        raise ConfigError(
            f"preset must be one of {', '.join(names)} or the path of a .toml file, and is "
            f"{quote(preset)}."
        )
    try:
        stat = path.stat()
        if not path.is_file():  # a pipe would never end
            raise OSError("it is no file")
        document = _read(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError) as error:
        raise ConfigError(f"preset={quote(preset)} cannot be read: {error}.") from error
    if preset in above:
        raise ConfigError(f"preset={quote(preset)} extends itself, by {', '.join(above)}.")
    if base := document.get("extends"):
        beside = path.parent / expand(str(base))  # whichever folder the process is in
        if os.path.isfile(beside):  # by its full path, which shows one that extends itself
            base = beside.parent.resolve() / beside.name
        yield from _documents(str(base), folder, (*above, preset))
    yield path, document


@lru_cache
def _read(path: Path, time: int, size: int) -> dict[str, Any]:
    """The document in a file; read again once the file has another time or size."""
    return tomllib.loads(path.read_text(encoding="utf-8-sig"))


def _apply(
    stage: type[Config],
    table: Mapping[str, Any],
    merged: dict[str, Any],
    values: Mapping[str, Any],
    path: Path,
) -> None:
    """Add a table's values to `merged`, then those of the tables below it that hold."""
    for name, value in _table(table, path).items():
        if name == "where":
            continue
        if name != "base_rate" and stage._owner(name) is None:
            raise ConfigError(f"The recipe {path} has {name!r}, which no {stage.stage} run knows.")
        merged.pop({"base_rate": "learning_rate", "learning_rate": "base_rate"}.get(name, ""), None)
        if isinstance(value, str):  # the configuration reads all values; this one may mean None
            value = stage._read(name, value)
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = value
    for name, cases in _table(table.get("where", {}), path).items():
        if stage._owner(name) is None:
            raise ConfigError(
                f"The recipe {path} has where.{name}, which no {stage.stage} run knows."
            )
        field = stage.model_fields.get(name)
        value = values.get(name, field.default if field else None)
        word = str(value).lower() if isinstance(value, bool) else str(value)  # as TOML has it
        _apply(stage, _table(cases, path).get(word, {}), merged, values, path)


def _table(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"The recipe {path} has {quote(value)} where a table should be.")
    return value
