"""Is anything lost? Runs that are killed at any moment, and run directories that are damaged.

    python benchmarks/kills.py [minutes]     # all of it, about 15 minutes of two cores
    python benchmarks/kills.py vae 1 1 4 2   # one stage, so many of each, and no result file

A run is killed by SIGKILL at a random moment, or just before one of its file operations, and is
started once more: it must end bit for bit like one that nothing disturbed, and leave no draft
behind. A damaged file must be a sentence that names its run, wherever runs are read, and hide no
other run. A training that is started again with a damaged file must end as if it were whole, or in
a sentence.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import load_file

from idaa_lib import results, runs, train
from idaa_lib.configs import EvalConfig, SSLConfig, UserError, VAEConfig
from idaa_lib.evaluate import load_encoder, load_vae
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.lab import process, rows
from idaa_lib.lab.report import Report
from idaa_lib.runs import Run, checkpoints
from idaa_lib.train.loop import Fit

TINY: dict[str, Any] = {
    "limit": 96, "size": 16, "batch_size": 32, "epochs": 3, "width": 4, "log_every": 1,
    "device": "cpu",
}  # fmt: skip
VAE, SSL = VAEConfig(**TINY, dim=8), SSLConfig(**TINY, adversary="idaa", keep_every=1)
JUDGED: dict[str, Any] = {"limit": 96, "device": "cpu", "references": False}
# How a run of each stage is made, from what lies in outputs/ already.
MAKERS: dict[str, Callable[[], Run]] = {
    "vae": lambda: train.train_vae(VAE),
    "ssl": lambda: train.train_ssl(SSL),
    "eval": lambda: evaluate(EvalConfig(run=runs.get("ssl", None).id, **JUDGED)),
}
# Python's audit events that change files.
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
# What stands in a damaged file; None: a folder.
CONTENTS: dict[str, bytes | None] = {
    "empty": b"",
    "torn": b'{"step": 3, "da',
    "binary": b"\x80\x00\xff" * 40,
    "zeros": bytes(200),
    "list": b"[1, 2]",
    "number": b"5",
    "null": b"null",
    "numbers": b'{"step": Infinity, "seconds": NaN, "epochs": 1e999}',
    "other types": b'{"step": [], "dataset": 3, "state": {}, "seed": "x", "tags": 1, "rows": 2}',
    "nested": b"[" * 100_000,
    "nested object": b'{"dataset": ' * 5_000 + b"1" + b"}" * 5_000,
    "folder": None,
}
DRAWN = ("config.json", "metrics.jsonl", "summary.json")  # what the report's curves are read from
SILENT = {"seconds", "images_per_second", "time"}  # no two runs agree on these


class House:
    """A folder `whole` of finished tiny runs, which nothing disturbed, and what they hold."""

    def __init__(self, root: Path, stages: tuple[str, ...], twice: bool = True) -> None:
        self.root, self.whole, self.stages = root, root / "whole", stages
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        self.outcomes: dict[str, Any] = {}
        log = root / "operations"
        for stage in stages:
            folders = [self.whole, self.copy(stage)] if twice else [self.whole]
            for folder in folders:  # the second time images are decoded
                start = time.monotonic()
                count = partial(watch, partial(log.write_text, encoding="utf-8"))
                if not ends_well(fork(folder, count, MAKERS[stage])):
                    raise RuntimeError(f"the undisturbed {stage} run failed")
                self.seconds[stage] = time.monotonic() - start
                self.operations[stage] = int(log.read_text("utf-8"))
                one = outcome(run_in(folder, stage))
                if not same(self.outcomes.setdefault(stage, one), one):
                    raise RuntimeError(f"two undisturbed {stage} runs differ")

    def copy(self, stage: str) -> Path:
        """A new folder with what a run of `stage` needs."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        for other in {"vae": (), "ssl": ("vae",)}.get(stage, ("vae", "ssl")):
            shutil.copytree(self.whole / other, folder / other)
        return folder

    def ends_alike(self, folder: Path, stage: str, log: bool = True) -> bool:
        """Whether the run, started again there, ends like the undisturbed one."""
        if not ends_well(fork(folder, MAKERS[stage])):
            return False
        (tensors, files, log_lines), end = self.outcomes[stage], outcome(run_in(folder, stage))
        return same((tensors, files, log_lines if log else end[2]), end)

    def survives(self, stage: str, moment: float | int) -> bool | None:
        """Whether a run that is killed once ends well: after so many seconds, or before the
        operation of that number. None where it was faster than the kill."""
        folder, steps = self.copy(stage), list[Callable[[], object]]([MAKERS[stage]])
        if isinstance(moment, int):
            at = str(moment)
            steps.insert(0, lambda: watch(lambda n: os.kill(os.getpid(), 9) if n == at else 0))
        pid = fork(folder, *steps)
        if isinstance(moment, float):
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            shutil.rmtree(folder)
            return None
        readable = not complaints(folder)
        survived = self.ends_alike(folder, stage) and readable
        if survived:
            shutil.rmtree(folder)
        return survived


def fork(outputs: Path, *acts: Callable[[], Any]) -> int:
    """The pid of a silent child that does these with outputs of its own."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ["IDAA_OUTPUTS"] = str(outputs)
        log = os.open(outputs.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for act in acts:
            act()
        code = 0
    except UserError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = 2
    finally:
        os._exit(code)


def ends_well(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def watch(count: Callable[[str], Any]) -> None:
    """From now on `count` gets the number of each operation that changes outputs, before it."""
    root, number = os.environ["IDAA_OUTPUTS"], 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal number
        if event in OPERATIONS and str(args[0]).startswith(root):
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            number += 1
            count(str(number))

    sys.addaudithook(hook)


def run_in(folder: Path, stage: str) -> Run:
    (path,) = (folder / stage).glob("[!.]*")
    return Run(path)


def outcome(run: Run) -> tuple[dict[str, torch.Tensor], list[str], Any]:
    """What a run holds, but for times: all tensors, the names of its files, figures and log."""
    paths = sorted(run.path.rglob("*"))
    tensors = {
        f"{path.relative_to(run.path)} {key}": value
        for path in paths
        if path.suffix == ".safetensors"
        for key, value in load_file(path).items()
    }
    values = [
        {name: value for name, value in each.items() if name not in SILENT}
        for each in (run.summary or {}, *run.metrics())
    ]
    return tensors, [str(path.relative_to(run.path)) for path in paths], values


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    equal = one[0].keys() == other[0].keys() and one[1:] == other[1:]
    return equal and all(torch.equal(value, other[0][name]) for name, value in one[0].items())


# --- damage ---------------------------------------------------------------------------------------


def damage(path: Path, content: bytes | None) -> None:
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


def complaints(folder: Path, broken: Run | None = None, draws: bool = False) -> list[str]:
    """What is wrong with how all readers take the runs of a folder, of which one may be damaged.

    draws: the report's curves too, which take seconds.
    """
    os.environ["IDAA_OUTPUTS"] = str(folder)
    faults: list[str] = []
    every, kin = set(runs.list_runs()), {broken} if broken else set()
    while broken and (more := {user for run in kin for user in run.users()} - kin):
        kin |= more  # those that it was made from

    def attempt(name: str, read: Callable[[], Any], named: bool = False) -> Any:
        try:
            return read()
        except UserError as error:
            text = str(error)
            if not named or (broken and broken.id not in text) or len(text) > 1000:
                faults.append(f"{name}: {text[:300]}")
        except BaseException as error:
            faults.append(f"{name}: {type(error).__name__} {str(error)[:200]}")

    def find() -> set[Run]:
        return {run for stage in runs.CONFIGS for run in runs.find(stage, finished=False)}

    readable = attempt("find", find) or set()
    for stage in runs.CONFIGS:
        sentences: list[str] = []
        attempt("usable", partial(runs.usable, stage, sentences))
        attempt("left out", partial(runs.report_left_out, sentences))
    if lost := every - kin - readable:
        faults.append(f"lost: {sorted(run.id for run in lost)}")
    for run in every:
        row = attempt("row", partial(rows.row_of, run))
        if row and row.state == rows.DAMAGED and run not in kin:
            faults.append(f"row of {run.id}: {row.texts['result'][:200]}")
    sentences = []
    finished = [run for run in every if run.finished]
    frame = attempt("results", lambda: results.results(finished, sentences))
    sound = {run.id for run in finished if run not in kin}
    if frame is not None and sound - {*frame["run"]}:
        faults.append(f"results lack a sound run: {sentences}")
    report = attempt("report", Report)
    for part in ("origins", "results", "identity", "pictures", *["trainings"] * draws, "left_out"):
        if report:
            attempt(f"report.{part}", getattr(report, part))
    if broken:
        readers: dict[str, Callable[[Run], Any]] = {
            "config": lambda run: run.config,
            "state": lambda run: run.state,
            "summary": lambda run: run.summary,
            "metrics": lambda run: run.metrics(),
            "tags": lambda run: run.tags,
            "command": runs.command,
            "look": process.look,
            "load": checkpoints.load,
            "get": lambda run: runs.get(run.stage, run),
        }
        loaders: dict[str, Any] = {"vae": load_vae, "ssl": load_encoder}
        readers |= {"network": loaders[broken.stage]} if broken.stage in loaders else {}
        for name, read in readers.items():
            attempt(name, partial(read, broken), named=True)
    return faults


def places(folder: Path, *stages: str) -> list[tuple[Path, str]]:
    """Each file of the runs of a folder, or of these stages, with each kind of damage."""
    paths = [path for stage in stages or MAKERS for path in (folder / stage).rglob("*")]
    files = [path.relative_to(folder) for path in sorted(paths) if path.is_file()]
    return [(file, kind) for file in files if file.name != ".lock" for kind in CONTENTS]


def kill_training(house: House, stage: str) -> Path:
    """A folder with a training that was killed after step 7 of 9: it has two checkpoints."""
    folder, original = house.copy(stage), Fit.train_step

    def step(fit: Fit, number: int, *rest: Any) -> Any:
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(fit, number, *rest)

    def patch() -> None:
        Fit.train_step = step  # type: ignore

    os.waitpid(fork(folder, patch, MAKERS[stage]), 0)
    return folder


def goes_on(house: House, folder: Path, stage: str, file: Path) -> list[str]:
    """What is wrong with how a training with a damaged file is started again."""
    code = os.waitstatus_to_exitcode(os.waitpid(fork(folder, MAKERS[stage]), 0)[1])
    words = (folder.parent / "log.txt").read_text("utf-8", "replace").strip().splitlines()
    if code == 2:  # a sentence
        return [] if run_in(folder, stage).id in words[-1] else [f"start: {words[-1]}"]
    if code:
        return [f"start: exit status {code}, {words[-1:]}"]
    if "snapshots" in file.parts:  # which nobody can make again: it stays damaged
        path = folder / file
        path.rmdir() if path.is_dir() else path.unlink()
        shutil.copy(house.whole / file, path)
    readings = file.name != "metrics.jsonl"  # readings that were lost are lost
    try:
        return [] if house.ends_alike(folder, stage, readings) else ["start: it ended otherwise"]
    except Exception as error:
        return [f"start: {type(error).__name__} {error}"]


# --- the command ----------------------------------------------------------------------------------


def kill_some(house: House, moments: int, operations: int, until: float) -> tuple[int, list[str]]:
    """How many runs were killed until then, and which of them did not end as they should."""
    rng, stages = random.Random(0), itertools.cycle(house.stages)
    plan: list[tuple[str, int | None]] = [(next(stages), None) for _ in range(moments)]
    for stage in itertools.islice(stages, operations):
        plan.append((stage, rng.randint(1, house.operations[stage])))
    rng.shuffle(plan)
    tried, lost = 0, list[str]()
    for stage, operation in plan:
        survived = None
        while survived is None and time.monotonic() < until:
            moment = operation or rng.uniform(0.0, house.seconds[stage])
            survived = house.survives(stage, moment)
            if operation:  # a faster run has fewer: an earlier one
                operation = rng.randint(1, operation)
        tried += survived is not None
        if survived is False:
            lost.append(f"{stage} killed at {moment}")
    return tried, lost


def damage_some(house: House, reads: int, starts: int, until: float) -> tuple[int, list[str]]:
    """How many files were damaged until then, and what was not clear."""
    rng = random.Random(0)
    stages = [stage for stage in house.stages if stage != "eval"]
    plan = [(house.whole, *place) for place in rng.sample(places(house.whole), reads)]
    if starts:
        halves = [
            (half, *p)
            for s in stages
            for half in [kill_training(house, s)]
            for p in places(half, s)
        ]
        plan += rng.sample(halves, starts)
    rng.shuffle(plan)
    tried, faults = 0, list[str]()
    for folder, file, kind in plan:
        if time.monotonic() > until:
            break
        copy = Path(tempfile.mkdtemp(dir=house.root)) / "outputs"
        shutil.copytree(folder, copy)
        damage(copy / file, CONTENTS[kind])
        now = complaints(copy, Run(copy / Path(*file.parts[:2])), file.name in DRAWN)
        if folder != house.whole:
            now += goes_on(house, copy, file.parts[0], file)
        tried += 1
        faults += [f"{file} {kind}: {fault}" for fault in now]
        shutil.rmtree(copy.parent)
    return tried, faults


def main(words: list[str]) -> int:
    """1 if anything was lost or unclear."""
    torch.set_num_threads(1)  # a child of a process with threads would wait for them for ever
    small, minutes = len(words) > 1, float(words[0]) if len(words) == 1 else math.inf
    moments, operations, reads, starts = map(int, words[1:] if small else (50, 40, 160, 60))
    until = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder), (words[0],) if small else tuple(MAKERS), twice=not small)
        verdict = house.root / "kills.json"
        kills = partial(kill_some, house, moments, operations, until)
        # Two at a time: kills in a child, damage here.
        pid = fork(verdict, lambda: verdict.write_text(json.dumps(kills()), "utf-8"))
        files, faults = damage_some(house, reads, starts, until)
        if not ends_well(pid):
            raise RuntimeError((house.root / "log.txt").read_text("utf-8")[-2000:])
        tried, lost = json.loads(verdict.read_text("utf-8"))
    unclear = len({fault.partition(": ")[0] for fault in faults})
    protocol = (
        "Tiny trainings of a VAE and of SimCLR + IDAA (96 photographs, 9 steps) and an evaluation, "
        "on the CPU, one thread, each in a child of one process. kills: SIGKILL at moments drawn "
        "evenly over the run's time (50 of 90) and before file operations drawn among all that "
        "Python does in outputs/ (40 of 90), in an order of chance (seed 0), then one restart: "
        "survived where tensors, figures, log (but for times) and the names of all files equal "
        "those of an undisturbed run, and all readers could read the run in between. damaged "
        "files: of finished runs (160 of 220) and of an interrupted training, which is started "
        f"again (60 of 220), in one of {len(CONTENTS)} ways; unclear where a reader ended other "
        "than in a sentence with the run's name, where another run was lost, or where the restart "
        "ended in another way."
    )
    if minutes < math.inf:
        protocol += f" Ended after {minutes:g} minutes, whatever was left to try."
    rows_ = [
        record.row("kills_tried", tried, "kills", tried),
        record.row("kills_survived", tried - len(lost), "kills", tried),
        record.row("damaged_run_files_tried", files, "files", files),
        record.row("damaged_run_files_unclear", unclear, "files", files),
    ]
    print(*lost, *faults, sep="\n")
    print(f"{tried} kills, {len(lost)} lost; {files} files, {unclear} unclear")
    if not small:
        print(record.write("kills", protocol, rows_))
    return int(bool(lost or faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
