"""Run directories: `outputs/<stage>/<run id>/`, the only way that stages talk.

An id is readable and deterministic: the same configuration on the same data is the same run, so
starting a finished run again shows its result and starting an interrupted one resumes it. One
writer at a time holds the directory's lock; readers need none, since every JSON file is replaced
as a whole and `metrics.jsonl` is only appended to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from idaa_lib.configs import (
    Config,
    ConfigError,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    TheoryConfig,
    TransferConfig,
    UserError,
    VAEConfig,
)
from idaa_lib.runs.machine import birth, is_alive, torch_device, uses_bf16

# Raised whenever the same configuration would give other numbers than before.
RESULTS_VERSION = 5

# Variable of the environment that names who starts runs, where it is no person.
STARTER = "IDAA_STARTER"
# Seconds without a heartbeat after which a run on another machine counts as interrupted.
SILENCE = 600

# Stage → its configuration; and the notebook that makes its runs. Others may add theirs.
CONFIGS: dict[str, type[Config]] = {
    c.stage: c for c in (VAEConfig, SSLConfig, SemiConfig, EvalConfig, TransferConfig, TheoryConfig)
}
NOTEBOOKS = {
    "vae": "01_pretrain_vae",
    "ssl": "03_train_ssl",
    "semi": "07_semi_supervised",
    "eval": "04_evaluate",
    "transfer": "09_transfer",
    "theory": "08_identity_theory",
}


class RunError(UserError, RuntimeError):
    """A run that cannot start, continue or be found."""


class Stopped(UserError):
    """Raised inside a run that a person stopped, after its state was saved."""


def outputs_root() -> Path:
    """`IDAA_OUTPUTS`, taken from the project where it is relative, else `outputs/` there."""
    project = Path(__file__).resolve().parents[2]
    return (project / Path(os.environ.get("IDAA_OUTPUTS") or "outputs").expanduser()).resolve()


def write_json(path: Path, value: Any) -> None:
    """Replace `path` as a whole: a reader, or a crash, sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a file holds, None where there is no such file.

    Raises:
        RunError: it cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {str(value)[:40]!r}, not an object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it, or its folder.") from error
    return value


def read_lines(path: Path, lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The readings in whole lines of a metrics.jsonl.

    Raises:
        RunError: a line is no reading.
    """
    readings = []
    for number, line in enumerate(lines, 1):
        reading = None
        with contextlib.suppress(ValueError, RecursionError):
            reading = json.loads(line) if line.strip() else {}
        if not isinstance(reading, dict) or (reading and "step" not in reading):
            raise RunError(
                f"{path} is damaged: line {number} is no reading; delete that line to see the rest."
            )
        readings += [reading] * bool(reading)
    return readings


@dataclass(frozen=True)
class Run:
    """One run directory, as a reader sees it; `writing()` makes this process its writer."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def config(self) -> Any:
        """The resolved configuration, as the class of its stage. (The knobs of a method that this
        process has not imported are left out.) Of an imported run, `stated()` says which values
        nobody knows.

        Raises:
            RunError: this is no run directory, or another version of the library made it.
        """
        values = read_json(self.path / "config.json")
        if values is None or self.stage not in CONFIGS:
            raise RunError(
                f"{self.path} is no run directory: it needs a config.json, and to lie in a folder "
                f"named by its stage ({', '.join(CONFIGS)})."
            )
        environment = self.environment
        version = environment.get("results_version", RESULTS_VERSION)
        try:
            if version != RESULTS_VERSION:
                raise ConfigError(f"its results are of version {version}, not {RESULTS_VERSION}")
            unknown = environment.get("imported", {}).get("unknown", ())
            return CONFIGS[self.stage].restore(values, unknown)
        except ConfigError as error:
            raise RunError(
                f"Run {self.id} was made by another version of this library "
                f"({str(error).rstrip('.')}): delete {self.path} and make it again with "
                f"notebooks/{NOTEBOOKS[self.stage]}.ipynb."
            ) from error

    @property
    def environment(self) -> dict[str, Any]:
        """What made the run, for the record alone."""
        return read_json(self.path / "environment.json") or {}

    @property
    def model(self) -> dict[str, Any]:
        """What rebuilds the run's network beside `config` and weights: `size` in pixels, `mean` and
        `std` per channel in [0, 1] units, `classes`, their number or names.

        Raises:
            RunError: the run stores none.
        """
        if (values := read_json(self.path / "model.json")) is None:
            raise RunError(
                f"{self.path} has no model.json, so it holds no network, or an earlier version "
                f"made it: delete the folder and start it again."
            )
        return values

    @property
    def summary(self) -> dict[str, Any] | None:
        """The final figures; None while there are none (written last, so present = finished)."""
        return read_json(self.path / "summary.json")

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    @property
    def state(self) -> dict[str, Any]:
        """state.json, with `state` one of new, going, interrupted, failed, finished.

        A run that says it is going while its process is gone was killed: interrupted. On another
        machine a heartbeat that is older than `SILENCE` tells. Readers take no lock.
        """
        values = {"state": "new"} | (read_json(self.path / "state.json") or {})
        if self.finished:
            values["state"] = "finished"
        elif values["state"] == "going":
            try:
                here = values["host"] == socket.gethostname()
                recent = time.time() - values["heartbeat"] < SILENCE
                if not (is_alive(values["pid"], values.get("born")) if here else recent):
                    values["state"] = "interrupted"
            except (KeyError, TypeError) as error:
                raise RunError(f"{self.path / 'state.json'} is damaged: delete it.") from error
        return values

    @property
    def reference(self) -> str:
        """What a configuration calls this run: its id under `outputs_root`, which may be moved
        then, else its path."""
        usual = outputs_root() in (self.path.parent.parent, self.path.resolve().parent.parent)
        return self.id if usual else str(self.path)

    @property
    def starts(self) -> dict[str, float]:
        """`person` and `sweep` → when each asked for this run last, in seconds since 1970.

        Of a run that an earlier version made: its last start, and a sweep's where a sweep locked
        it. Empty where nothing is known.
        """
        with contextlib.suppress(RunError):
            times = read_json(self.path / "starts.json")
            if times is None:
                who = "sweep" if (self.path / ".sweep").exists() else "person"
                times = {who: (read_json(self.path / "state.json") or {}).get("started")}
            return {who: t for who, t in times.items() if isinstance(t, int | float)}
        return {}

    @property
    def last_start(self) -> float:
        """When it was worked on last, in seconds since 1970, as it is stored: files that are copied
        get other times. 0 where nothing is known."""
        with contextlib.suppress(RunError):
            started = (read_json(self.path / "state.json") or {}).get("started")
            if isinstance(started, int | float):
                return started
        return max(self.starts.values(), default=0.0)

    def note_start(self, config: Config) -> None:
        """Record who starts this run, now; of a finished one also where what it names by content
        lies now, as `config` has it: a folder of images may have been moved."""
        who = os.environ.get(STARTER, "person")
        with contextlib.suppress(OSError, RunError):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "starts.json", self.starts | {who: time.time()})
            stored, values = read_json(self.path / "config.json"), config.model_dump(mode="json")
            places = {name: values[name] for name in config.pointers & values.keys()}
            if stored is not None and self.finished and stored != stored | places:
                write_json(self.path / "config.json", stored | places)

    @property
    def size(self) -> int:
        """Bytes of all files (of those that are there: one may vanish meanwhile)."""
        total = 0
        for path in self.path.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.lstat().st_size
        return total

    def metrics(self) -> list[dict[str, Any]]:
        """The readings of metrics.jsonl (a line still being written is left out).

        Raises:
            RunError: a line is damaged.
        """
        path = self.path / "metrics.jsonl"
        try:
            return read_lines(path, path.read_bytes().split(b"\n")[:-1])
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error}).") from error

    @property
    def tags(self) -> list[str]:
        """The words that a person gave the run, beside its id and its configuration."""
        return (read_json(self.path / "tags.json") or {}).get("tags", [])

    def tag(self, tags: Iterable[str]) -> None:
        """Give the run these tags in place of those that it has."""
        write_json(self.path / "tags.json", {"tags": list(dict.fromkeys(tags))})

    def figure(self, name: str) -> Path:
        """Where the figure `name` of this run belongs (the folder is made)."""
        folder = self.path / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def ask(self, request: str) -> None:
        """Ask the process that writes this run to `stop` or `pause` after its present step;
        anything else ends a pause."""
        write_json(self.path / "control.json", {"request": request})

    @contextlib.contextmanager
    def writing(
        self,
        config: Config,
        environment: Mapping[str, Any],
        model: Mapping[str, Any] | None = None,
    ) -> Iterator[Writer]:
        """Hold the run's lock and keep its state true until the block ends, however it ends.

        Args:
            environment: for the record alone. model: what `Run.model` gives back.
        Raises:
            RunError: another process writes this run now; the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            other = read_json(self.path / "state.json") or {}
            raise RunError(
                f"Run {self.id} is being written by process {other.get('pid', '?')} on "
                f"{other.get('host', '?')} already; wait for it, or stop it, and start again."
            ) from None
        except OSError as error:
            raise RunError(f"The run directory {self.path} cannot be made: {error}.") from error
        writer = Writer(self)
        try:
            write_json(self.path / "config.json", config.model_dump(mode="json"))
            about = dict(environment) | {"results_version": RESULTS_VERSION}
            write_json(self.path / "environment.json", about)
            if model is not None:
                write_json(self.path / "model.json", dict(model))
            (self.path / "control.json").unlink(missing_ok=True)
            self.note_start(config)
            writer.state(state="going", started=time.time(), error=None)
            yield writer
        except (KeyboardInterrupt, Stopped):
            writer.state(state="interrupted")
            raise
        except BaseException as error:
            writer.state(state="failed", error=f"{type(error).__name__}: {error}")
            # safetensors reports a failed write as its own error, with the system's words in it.
            if getattr(error, "errno", 0) == errno.ENOSPC or "No space left" in str(error):
                raise RunError(
                    f"No space left on the disk of {self.path}; what was saved is intact: free "
                    f"some and start the run again."
                ) from error
            raise
        finally:
            lock.release()

    def users(self) -> list[Run]:
        """Runs whose configuration names this one: trained with it, continued from it, judges of
        it."""
        names, users = {self.reference, str(self.path)}, []
        for run in list_runs():
            with contextlib.suppress(RunError):  # it is damaged
                values = read_json(run.path / "config.json") or {}
                if names & {value for value in values.values() if isinstance(value, str)}:
                    users.append(run)
        return users

    def delete(self) -> int:
        """Remove the directory; the bytes that this freed.

        Raises:
            RunError: another process writes it now, or it is no run directory.
        """
        if self.stage not in CONFIGS or not (self.path / "config.json").exists():
            raise RunError(f"{self.path} is no run directory; nothing was deleted.")
        try:
            with FileLock(self.path / ".lock", timeout=0):
                freed = self.size
                # These first: what a crash half-way leaves is no run.
                for name in ("summary.json", "config.json"):
                    (self.path / name).unlink(missing_ok=True)
                shutil.rmtree(self.path)
        except Timeout:
            raise RunError(f"Run {self.id} is going: stop it before you delete it.") from None
        except OSError as error:
            raise RunError(f"Run {self.id} could not be deleted: {error}.") from error
        return freed


class Writer:
    """What the one process that holds a run's lock may do to it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        me = {"pid": os.getpid(), "born": birth(os.getpid()), "host": socket.gethostname()}
        self._state: dict[str, Any] = me

    def state(self, **news: Any) -> None:
        """Merge `news` into state.json; also the heartbeat."""
        self._state |= news | {"heartbeat": time.time()}
        # A disk that is full must not hide the error that brought us here.
        with contextlib.suppress(OSError):
            write_json(self.run.path / "state.json", self._state)

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (self.run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rewind(self, step: int) -> None:
        """Drop metrics after `step`: what a killed process logged beyond its last checkpoint."""
        path = self.run.path / "metrics.jsonl"
        lines = [json.dumps(line) for line in self.run.metrics() if line["step"] <= step]
        draft = path.with_suffix(".draft")
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(draft, path)

    def request(self) -> str | None:
        """What control.json asks for: `pause`, `stop` or nothing."""
        request = (read_json(self.run.path / "control.json") or {}).get("request")
        return request if request in ("pause", "stop") else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        write_json(self.run.path / "summary.json", dict(summary))
        self.state(state="finished")


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
    changed = config.changed()
    # κ and β say the same, and β is the one that compares; what is named by content is in the hash.
    hidden = config.circumstances | config.pointers | {"kappa", "seed", "mean", "std"}
    hidden |= set() if "kappa" in changed else {"beta"}
    hidden |= set() if "source_size" in fields else {"source_size"}
    words += [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in changed.items()
        if name not in hidden
    ]
    if vae := digests.get("vae"):
        words.append(f"vae={vae[:4]}")
    text = re.sub(r"[^\w.=-]+", "_", "-".join([config.stage, *words]))[:120]
    run = Run(outputs_root() / config.stage / f"{text}-s{getattr(config, 'seed', 0)}-{digest}")
    if "dataset" not in config.principal or run.path.exists():
        return run
    # The folder of images may have had another name when this run was made.
    before = sorted(run.path.parent.glob(f"*-{digest}/config.json"))
    return Run(before[0].parent) if before else run


def list_runs(*stages: str) -> list[Run]:
    """All runs of these stages, or of all, whatever their state, damaged ones too, by their names:
    no file of theirs is read."""
    root = outputs_root()
    paths = [path for stage in stages or CONFIGS for path in (root / stage).glob("*/config.json")]
    return [Run(path.parent) for path in sorted(paths)]


def every() -> list[Run]:
    """All runs (`list_runs`), newest first."""
    return sorted(list_runs(), key=lambda run: -run.last_start)


def parameters(config: Config) -> dict[str, Any]:
    """The least that makes `config` again: the preset, and what it does not imply."""
    values = {name: value for name, value in config if value is not None}
    names = {"preset", *config.principal, *config.changed()}
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
        given = {"dataset": run.config.dataset, **source["given"]}
        words = [source["path"], *(f"{name}={value}" for name, value in given.items())]
        return shlex.join(["python", "-m", "idaa_lib", "import", *words])
    words = [f"{name}={value}" for name, value in parameters(run.config).items()]
    return shlex.join(["python", "-m", "idaa_lib.train", run.stage, *words])
