"""Run directories: `outputs/<stage>/<run id>/`, the only way that stages talk.

An id is readable and deterministic: the same configuration on the same data is the same run, so
starting a finished run again shows its result and starting an interrupted one resumes it. One
writer at a time holds the directory's lock; readers need none, since every JSON file is replaced
as a whole and `metrics.jsonl` is only appended to.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
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
from idaa_lib.configs.lookups import once
from idaa_lib.data.places import STARTER, check_regular, find_root
from idaa_lib.runs.files import (
    NUMBER,
    RunError,
    clear_drafts,
    draft_of,
    make_folder,
    read_json,
    read_lines,
    replace,
    saving,
    write_json,
)
from idaa_lib.runs.machine import birth, is_alive, lacks_memory, repeat

# Raised whenever the same configuration would give other numbers than before.
RESULTS_VERSION = 5

# Variable of the environment that names who starts runs, where it is no person.
STARTED_BY = "IDAA_STARTED_BY"
# Seconds without a heartbeat after which a run on another machine counts as interrupted; and those
# between two of them, however long the work takes.
SILENCE, BEAT = 600, 30

# Stage → its configuration; and the notebook that makes its runs. Code outside the library may
# add its own stage, as `examples/detection` does.
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


class Stopped(UserError):
    """Raised inside a run that a person stopped, after its state was saved."""


def outputs_root() -> Path:
    """`IDAA_OUTPUTS`, taken from the project where it is relative, else `outputs/` there.

    Raises:
        ConfigError: it is of a user who is not there.
    """
    variable = "IDAA_OUTPUTS"
    try:
        return once(
            (variable, os.environ.get(variable)), lambda: find_root(variable, "outputs").resolve()
        )
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


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
    def ships(self) -> bool:
        """Whether it is of the starter, which stays as it is."""
        return self.path.parent.parent == STARTER

    @property
    def config(self) -> Any:
        """The resolved configuration, as the class of its stage. (The knobs of a method that this
        process has not imported are left out.) Of an imported run, `list_stated()` says which
        values nobody knows.

        Raises:
            RunError: this is no run directory, or another version of the library made it.
        """
        return once(self, self._read_config)

    def _read_config(self) -> Any:
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
            notebook = f"notebooks/{NOTEBOOKS[self.stage]}.ipynb"
            again = f"delete {self.path} and make it again with {notebook}"
            if self.ships:
                again = "get data/starter of this version"
            raise RunError(
                f"Run {self.id} was made by another version of this library "
                f"({str(error).rstrip('.')}): {again}."
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
            RunError: the run stores none, or its file is damaged.
        """
        if (values := read_json(self.path / "model.json")) is None:
            raise RunError(
                f"{self.path} has no model.json, so it holds no network, or an earlier version "
                f"made it: delete the folder and start it again."
            )
        try:
            size, mean, std, _ = (values[name] for name in ("size", "mean", "std", "classes"))
            sum([*mean, *std], size)  # all are numbers
        except (KeyError, TypeError) as error:
            raise RunError(
                f"{self.path / 'model.json'} is damaged ({error}): delete the folder and start the "
                f"run again."
            ) from None
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
            here = values.get("host") == socket.gethostname()
            recent = time.time() - values.get("heartbeat", 0) < SILENCE
            if not (is_alive(values.get("pid", 0), values.get("born")) if here else recent):
                values["state"] = "interrupted"
        return values

    @property
    def reference(self) -> str:
        """What a configuration calls this run: its id under `outputs_root`, which may be moved
        then, or in the starter, else its path."""
        usual = outputs_root() in (self.path.parent.parent, self.path.resolve().parent.parent)
        return self.id if usual or self.ships else str(self.path)

    @property
    def starts(self) -> dict[str, float]:
        """`person` and `sweep` → when each asked for this run last, in seconds since 1970."""
        with contextlib.suppress(RunError):
            times = read_json(self.path / "starts.json") or {}
            return {who: at for who, at in times.items() if isinstance(at, NUMBER)}
        return {}

    @property
    def last_start(self) -> float:
        """When it was worked on last, in seconds since 1970, as it is stored: files that are copied
        get other times. 0 where nothing is known."""
        with contextlib.suppress(RunError, KeyError):
            return (read_json(self.path / "state.json") or {})["started"]
        return max(self.starts.values(), default=0.0)

    def note_start(self, config: Config) -> None:
        """Record who starts this run, now; of a finished one also where what it names by content
        lies now, as `config` has it: a folder of images may have been moved. What earlier processes
        left half written is removed."""
        who = os.environ.get(STARTED_BY, "person")
        with contextlib.suppress(OSError, RunError):
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("..", "", "checkpoints", "snapshots", "samples"):
                clear_drafts(self.path / name)
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
            check_regular(path)
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

    @property
    def figures(self) -> Path:
        """The folder of its figures: of a run of the starter, which stays as it ships, under
        `outputs_root`."""
        return (outputs_root() / self.stage / self.id if self.ships else self.path) / "figures"

    def figure(self, name: str) -> Path:
        """Where the figure `name` of this run belongs (the folder is made)."""
        folder = self.figures
        make_folder(folder)
        return folder / name

    def ask(self, request: str) -> None:
        """Ask the process that writes this run to `stop` or `pause` after its present step;
        anything else ends a pause."""
        write_json(self.path / "control.json", {"request": request})

    @property
    def request(self) -> str | None:
        """`pause` or `stop` where that was asked last; None also where it cannot be read."""
        with contextlib.suppress(RunError):
            request = (read_json(self.path / "control.json") or {}).get("request")
            return request if request in ("pause", "stop") else None
        return None

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
            RunError: another process writes this run now; the disk refuses it; memory ran out.
        """
        lock, writer = FileLock(self.path / ".lock"), Writer(self)
        try:
            with saving(self.path):
                lock.acquire(timeout=0)  # which makes the folder
        except Timeout:
            other = read_json(self.path / "state.json") or {}
            raise RunError(
                f"Run {self.id} is being written by process {other.get('pid', '?')} on "
                f"{other.get('host', '?')} already; wait for it, or stop it, and start again."
            ) from None
        try:
            with saving(self.path), explain_memory(self, config):
                (self.path / "control.json").unlink(missing_ok=True)
                self.note_start(config)
                writer.state(state="going", started=time.time(), error=None)
                about = dict(environment) | {"results_version": RESULTS_VERSION}
                write_json(self.path / "environment.json", about)
                if model is not None:
                    write_json(self.path / "model.json", dict(model))
                # Last: with it the directory is a run, which all can be read of.
                write_json(self.path / "config.json", config.model_dump(mode="json"))
                with repeat(1.0, writer.attend):
                    yield writer
        except (KeyboardInterrupt, Stopped):
            writer.state(state="interrupted")
            if writer.interrupted:
                raise Stopped(f"Stopped: start {self.id} again to make it.") from None
            raise
        except BaseException as error:
            writer.state(state="failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            lock.release()

    def users(self) -> list[Run]:
        """Runs whose configuration names this one: trained with it, continued from it, judges of
        it."""
        names, users = {self.reference, str(self.path)}, []
        folders = outputs_root().glob("*/[!.]*/config.json")  # of all stages, as detection's
        for run in (Run(path.parent) for path in sorted(folders)):
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
        if self.stage not in CONFIGS or not (self.path / "config.json").exists() or self.ships:
            raise RunError(f"{self.path} is no run directory of yours; nothing was deleted.")
        try:
            with FileLock(self.path / ".lock", timeout=0):
                freed, draft = self.size, draft_of(self.path)
                os.replace(self.path, draft)  # at once: what a crash leaves is no run
                shutil.rmtree(draft)
        except Timeout:
            raise RunError(f"Run {self.id} is going: stop it before you delete it.") from None
        except OSError as error:
            raise RunError(f"Run {self.id} could not be deleted: {error}.") from error
        return freed


class Writer:
    """What the one process that holds a run's lock may do to it.

    Fields:
        interrupts: whether a request to stop interrupts the thread that made this, as Ctrl-C does:
            `Steps`, which hears it after a step, sets it to False. interrupted: whether it did.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.interrupts, self.interrupted = run, True, False
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._lock = threading.Lock()  # `attend` is called by a thread
        me = {"pid": os.getpid(), "born": birth(os.getpid()), "host": socket.gethostname()}
        self._state: dict[str, Any] = me

    def state(self, **news: Any) -> None:
        """Merge `news` into state.json; also the heartbeat."""
        # A disk that is full must not hide the error that brought us here.
        with self._lock, contextlib.suppress(RunError, OSError):
            self._state |= news | {"heartbeat": time.time()}
            write_json(self.run.path / "state.json", self._state)

    def attend(self) -> None:
        """Do, each second, what work that lasts long does not come to: the heartbeat, and to hear
        a stop."""
        if abs(time.time() - self._state["heartbeat"]) > BEAT:  # clocks may be set back
            self.state()
        if self.interrupts and self.run.request == "stop":
            self.interrupts, self.interrupted = False, True
            # Not by a signal: a job in the background of a shell ignores SIGINT.
            error = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, error)

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (self.run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rewind(self, step: int) -> None:
        """Drop metrics after `step`, which a killed process logged beyond its last checkpoint, and
        what is no reading."""
        path, content = self.run.path / "metrics.jsonl", b""
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            with contextlib.suppress(RunError):
                if line.endswith(b"\n") and any(
                    r["step"] <= step for r in read_lines(path, [line])
                ):
                    content += line
        replace(path, content)

    def finish(self, summary: Mapping[str, Any]) -> None:
        write_json(self.run.path / "summary.json", dict(summary))
        self.state(state="finished")


@contextlib.contextmanager
def explain_memory(run: Run, config: Config) -> Iterator[None]:
    """Inside, memory that does not suffice is one sentence: a RunError with what to lower."""
    try:
        yield
    except BaseException as error:
        if not lacks_memory(error):
            raise
        sizes = {name: getattr(config, name, None) for name in ("batch_size", "size")}
        values = [f"{name}={value}" for name, value in sizes.items() if value]
        raise RunError(
            f"The memory did not suffice, so {run.id} ended; what was saved is intact: lower "
            f"{' or '.join([*values, 'limit'])} ({error})."
        ) from error


def list_runs(*stages: str) -> list[Run]:
    """All runs of these stages, or of all, whatever their state, damaged ones too, by their names:
    no file of theirs is read."""
    root = outputs_root()
    stages = stages or tuple(CONFIGS)
    paths = [path for stage in stages for path in (root / stage).glob("[!.]*/config.json")]
    return [Run(path.parent) for path in sorted(paths)]
