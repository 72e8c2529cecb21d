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
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from idaa_lib.configs import (
    Config,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    TheoryConfig,
    TransferConfig,
    UserError,
    VAEConfig,
)
from idaa_lib.runs.processes import alive, born

# Raised whenever the same configuration would give other numbers than before.
RESULTS_VERSION = 4

# Seconds without a heartbeat after which a run on another machine counts as interrupted.
SILENCE = 600

CONFIGS: dict[str, type[Config]] = {
    c.stage: c
    for c in (
        VAEConfig,
        SSLConfig,
        SemiConfig,
        EvalConfig,
        TheoryConfig,
        TransferConfig,
    )
}
# The notebook that makes the runs of a stage.
NOTEBOOKS = {
    "vae": "01_pretrain_vae",
    "ssl": "03_train_ssl",
    "semi": "07_semi_supervised",
    "eval": "04_evaluate",
    "transfer": "09_transfer",
    "theory": "08_identity_theory",
}


class RunError(UserError, RuntimeError):
    """A run that cannot start, go on or be found."""


class Stopped(UserError):
    """Raised inside a run that was asked to stop, after its state was saved."""


def outputs_root() -> Path:
    """`IDAA_OUTPUTS`, else `outputs/` of the project; never the working directory."""
    given = os.environ.get("IDAA_OUTPUTS")
    return Path(given).resolve() if given else Path(__file__).resolve().parents[2] / "outputs"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` as a whole: a reader, or a crash, sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content, None where there is no such file.

    Raises:
        RunError: it is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): delete it, or its folder.") from error


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
        """The resolved configuration, as the dataclass of its stage."""
        stored = read_json(self.path / "config.json")
        if stored is None or self.stage not in CONFIGS:
            raise RunError(
                f"{self.path} is no run directory: it needs a config.json, and to lie in a folder "
                f"named by its stage ({', '.join(CONFIGS)})."
            )
        return CONFIGS[self.stage](**stored)

    @property
    def environment(self) -> dict[str, Any]:
        return read_json(self.path / "environment.json") or {}

    @property
    def model(self) -> dict[str, Any]:
        """What rebuilds the run's network beside `config` and weights: `size` in pixels, `mean` and
        `std` per channel in [0, 1] units, `classes`, their number or names.

        Raises:
            RunError: the run stores none.
        """
        stored = read_json(self.path / "model.json")
        if stored is None:
            raise RunError(
                f"{self.path} has no model.json, which says what its network expects: it holds no "
                f"network, or an earlier version made it; delete the folder and start it again."
            )
        return stored

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
        stored = read_json(self.path / "state.json") or {"state": "new"}
        if self.finished:
            stored["state"] = "finished"
        elif stored["state"] == "going":
            here = stored["host"] == socket.gethostname()
            recent = time.time() - stored["heartbeat"] < SILENCE
            if not (alive(stored["pid"], stored.get("born")) if here else recent):
                stored["state"] = "interrupted"
        return stored

    @property
    def reference(self) -> str:
        """What a configuration calls this run: its id, or its path where that lies elsewhere."""
        usual = self.path.parent.parent == outputs_root()
        return self.id if usual else str(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl (a line still being written is left out)."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def figure(self, name: str) -> Path:
        """Where the figure `name` of this run belongs (the folder is made)."""
        folder = self.path / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

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
            RunError: another process writes this run now.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            who = read_json(self.path / "state.json") or {}
            raise RunError(
                f"Run {self.id} is being written by process {who.get('pid', '?')} on "
                f"{who.get('host', '?')} already; wait for it, or stop it, and start again."
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
            writer.state(state="going", started=time.time(), error=None)
            yield writer
        except (KeyboardInterrupt, Stopped):
            writer.state(state="interrupted")
            raise
        except BaseException as error:
            writer.state(state="failed", error=f"{type(error).__name__}: {error}")
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise RunError(
                    f"No space left on the disk of {self.path}; what was saved is intact: free "
                    f"some and start the run again."
                ) from error
            raise
        finally:
            lock.release()


class Writer:
    """What the one process that holds a run's lock may do to it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._state: dict[str, Any] = {
            "pid": os.getpid(), "born": born(os.getpid()), "host": socket.gethostname()
        }  # fmt: skip

    def state(self, **news: Any) -> None:
        """Merge `news` into state.json; also the heartbeat."""
        self._state |= news | {"heartbeat": time.time()}
        # A disk that is full must not hide the error that brought us here.
        with contextlib.suppress(OSError):
            write_json(self.run.path / "state.json", self._state)

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (self.run.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def rewind(self, step: int) -> None:
        """Drop metrics after `step`: what a killed process logged beyond its last checkpoint."""
        path = self.run.path / "metrics.jsonl"
        kept = [line for line in self.run.metrics() if line["step"] <= step]
        draft = path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(draft, path)

    def request(self) -> str | None:
        """What control.json asks for: `pause`, `stop` or nothing."""
        asked = (read_json(self.run.path / "control.json") or {}).get("request")
        return asked if asked in ("pause", "stop") else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        write_json(self.run.path / "summary.json", dict(summary))
        self.state(state="finished")


def run_for(config: Config, dataset: str, **digests: str | None) -> Run:
    """The run directory that `config` leads to, whether it exists yet or not.

    Args:
        dataset: fingerprint of the images.
        digests: what else the run starts from, by content (the VAE's weights, say).
    """
    identity = {"config": config.identity(), "dataset": dataset, "version": RESULTS_VERSION}
    identity |= {name: digest for name, digest in digests.items() if digest}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    # Of a path, the last part; of a run's id, all but its stage.
    words = [Path(str(getattr(config, name))).name for name in config.principal]
    words = [word.removesuffix(".zip").removeprefix("ssl-") for word in words]
    changed = config.changed()
    # κ and β say the same, and β is the one that compares; what is named by content is in the hash.
    hidden = config.circumstances | config.pointers | {"kappa", "seed"}
    hidden |= set() if "kappa" in changed else {"beta"}
    words += [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in changed.items()
        if name not in hidden
    ]
    if vae := digests.get("vae"):
        words.append(f"vae={vae[:4]}")
    text = re.sub(r"[^\w.=-]+", "_", "-".join([config.stage, *words]))[:120]
    return Run(outputs_root() / config.stage / f"{text}-s{getattr(config, 'seed', 0)}-{digest}")


def find(stage: str, *, finished: bool = True, **values: Any) -> list[Run]:
    """Runs of a stage, newest first, whose configuration has these values."""
    if stage not in CONFIGS:
        raise RunError(f"There is no stage {stage!r}; there are {', '.join(CONFIGS)}.")
    folders = (path.parent for path in (outputs_root() / stage).glob("*/config.json"))
    runs = [run for run in map(Run, folders) if run.finished or not finished]

    def fits(run: Run) -> bool:
        # Where nothing is asked of it, a damaged config.json hides no other run.
        stored = values and (read_json(run.path / "config.json") or {})
        return all(stored.get(name) == value for name, value in values.items())

    return sorted(filter(fits, runs), key=began, reverse=True)


def every() -> list[Run]:
    """All runs of all stages, whatever their state, newest first."""
    found = (run for stage in CONFIGS for run in find(stage, finished=False))
    return sorted(found, key=began, reverse=True)


def began(run: Run) -> float:
    """When the run was last started, in seconds since 1970: every start replaces its config.json.
    0 once it is gone."""
    try:
        return (run.path / "config.json").stat().st_mtime
    except OSError:
        return 0.0


def get(stage: str, name: Run | str | None, **values: Any) -> Run:
    """The finished run with this id or path; None takes the newest that has these values.

    Raises:
        RunError: there is none, or it is not finished.
    """
    notebook = NOTEBOOKS[stage]
    if name is None:
        candidates = find(stage, **values)
        if not candidates:
            wanted = " and ".join(f"{key}={value}" for key, value in values.items())
            raise RunError(
                f"There is no finished {stage} run{' with ' + wanted if wanted else ''} under "
                f"{outputs_root() / stage}: make one with notebooks/{notebook}.ipynb."
            )
        return candidates[0]
    if isinstance(name, Run):
        run = name
    else:
        run = Run(Path(name).resolve() if os.sep in name else outputs_root() / stage / name)
    if not (run.path / "config.json").exists():
        raise RunError(f"There is no {stage} run {run.id!r} at {run.path}.")
    if run.stage != stage:
        raise RunError(
            f"{run.path} is a run of stage {run.stage!r}, and one of {stage!r} is needed."
        )
    if not run.finished:
        raise RunError(
            f"Run {run.id} is {run.state['state']}, not finished: start it again with "
            f"notebooks/{notebook}.ipynb (it goes on from its last checkpoint)."
        )
    return run


def encoder(name: Run | str | None) -> Run:
    """The finished run whose encoder is meant, by id or path: of stage ssl, the newest for None,
    or semi where the name says so.

    Raises: as `get`.
    """
    stage = name.stage if isinstance(name, Run) else Path(name or "").name.partition("-")[0]
    return get("semi" if stage == "semi" else "ssl", name)


def stop(run: Run, request: str = "stop") -> None:
    """Ask the process that writes `run` to `stop` or `pause` after its present step; anything else
    ends a pause."""
    write_json(run.path / "control.json", {"request": request})


def size_of(run: Run) -> int:
    """Bytes of all files of the run (of those that are there: one may vanish meanwhile)."""
    total = 0
    for path in run.path.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def users_of(run: Run) -> list[Run]:
    """Runs whose configuration names this one: trained with it, continued from it, judging it."""
    names = {run.reference, str(run.path)}

    def uses(other: Run) -> bool:
        with contextlib.suppress(RunError):  # a damaged configuration names nothing
            stored = read_json(other.path / "config.json") or {}
            pointers = ("vae", "run", "witness", "continue_from")
            return any(stored.get(pointer) in names for pointer in pointers)
        return False

    return [other for other in every() if uses(other)]


def delete(run: Run) -> int:
    """Remove the run's directory; the bytes that this freed.

    Raises:
        RunError: another process writes it now, or it is no run directory.
    """
    if run.stage not in CONFIGS or not (run.path / "config.json").exists():
        raise RunError(f"{run.path} is no run directory; nothing was deleted.")
    # Moved away first, at once: a crash half-way leaves no run that looks finished, and what it
    # leaves goes with the next one.
    away = run.path.parent / ".deleted"
    moved = away / f"{run.id}.{os.getpid()}.{time.time_ns()}"
    try:
        with FileLock(run.path / ".lock", timeout=0):
            freed = size_of(run)
            away.mkdir(exist_ok=True)
            run.path.rename(moved)
            shutil.rmtree(moved)
        shutil.rmtree(away, ignore_errors=True)
    except Timeout:
        raise RunError(f"Run {run.id} is going: stop it before you delete it.") from None
    except OSError as error:
        raise RunError(f"Run {run.id} could not be deleted: {error}.") from error
    return freed
