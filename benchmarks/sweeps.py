"""Trials of sweeps: failures, SIGKILL at random moments, two drivers, Dask, and what they cost.

    python benchmarks/sweeps.py [trial …]    # kills drivers dask failures kernels locate overhead
    python benchmarks/sweeps.py write        # the result file of the trials that there are

The grid has 24 encoders: 2 methods × 3 ε × 2 dim × 2 seeds, at the scale of a smoke test, without
evaluations, whose notebooks would double the time. All trials take about an hour on 2 quiet cores.
Each writes what it found to outputs/sweep-trials as it ends; the result file is made of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import psutil
import record

from idaa_lib import kernels, plans, sweeps
from idaa_lib.grids import read
from idaa_lib.runs import outputs_root, parameters, write_json
from idaa_lib.train import train

FOLDER = outputs_root() / "sweep-trials"
SMALL = {"device": "cpu", "limit": 96, "epochs": 1, "batch_size": 32, "width": 4}
GRID: dict[str, Any] = {
    "jobs": 2,
    "stages": ["vae", "ssl"],
    "seeds": [0, 1],
    "fixed": {"all": SMALL, "vae": {"seed": 0}, "ssl": {"adversary": "idaa"}},
    "cross": {
        "ssl": {"method": ["simclr", "simsiam"], "epsilon": [0.05, 0.1, 0.2]},
        "vae": {"dim": [4, 8]},
    },
}
FIGURES = {"vae": {"reconstruction.png", "curves.png"}}
FIGURES["ssl"] = {"views.png", "curves.png", "collapse.png"}
# A driver whose kernels are noted: run directory, the kernel's process, the driver's, and whether
# another kernel of the run lives, or its notebook is complete already.
DRIVER = """
import contextlib, os, sys
from pathlib import Path
import psutil
from idaa_lib import kernels, sweeps
plain, notes = kernels._kernel, os.environ["KERNELS"]
@contextlib.contextmanager
def note_kernel(stderr, variables):
    folder = os.path.dirname(stderr.name)
    before = Path(notes).read_text("utf-8").splitlines() if os.path.exists(notes) else []
    pids = [int(line.split("\\t")[1]) for line in before if line.startswith(folder + "\\t")]
    again = any(map(psutil.pid_exists, pids)) or sweeps.is_whole(sweeps.Run(Path(folder)))
    with plain(stderr, variables) as kernel:
        pid = kernel.provisioner.process.pid
        with open(notes, "a", encoding="utf-8") as file:
            print(folder, pid, os.getpid(), int(again), sep="\\t", file=file)
        yield kernel
kernels._kernel = note_kernel
sys.exit(sweeps.main(sys.argv[1:]))
"""
Row = dict[str, Any]


def home(name: str, keep: bool = False) -> Path:
    """The folder of a trial's runs, which is empty, and where this process looks for them."""
    folder = FOLDER / name
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["IDAA_OUTPUTS"], os.environ["KERNELS"] = str(folder), str(folder / "kernels.tsv")
    write_json(folder / "grid.yaml", GRID)  # JSON is YAML
    return folder


def drive(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """A driver of the grid, which has begun."""
    command = [sys.executable, "-c", DRIVER, str(folder / "grid.yaml"), *flags]
    log = (folder / "log.txt").open("a", encoding="utf-8")
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, encoding="utf-8")


def starts(folder: Path) -> list[list[str]]:
    """The notes of each kernel so far, as DRIVER writes them."""
    with contextlib.suppress(FileNotFoundError):
        text = (folder / "kernels.tsv").read_text(encoding="utf-8")
        return [line.split("\t") for line in text.splitlines()]
    return []


def tasks() -> dict[str, sweeps.Task]:
    return plans.plan(read(GRID).points())


def lacking() -> list[str]:
    """What runs of the grid lack: themselves, their executed notebook, a figure."""
    there, lacks = plans.find_runs(tasks()), []
    for key in tasks():
        if (run := there.get(key)) is None:
            lacks.append(key)
            continue
        figures = {path.name for path in (run.path / "figures").glob("*.png")}
        lacks += [f"{run.id}: {name}" for name in FIGURES[run.stage] - figures]
        notebook = run.path / "notebook.ipynb"
        if not notebook.exists() or "Made with" not in notebook.read_text(encoding="utf-8"):
            lacks.append(f"{run.id}: notebook")
    return lacks


def encoders() -> list[tuple[Any, ...]]:
    """The accuracy of each encoder, by which two ways of making them are compared."""
    frame = plans.table(read(GRID).points())
    frame = frame[(frame["metric"] == "kNN") & (frame["split"] == "validation")]
    columns = ["run", "method", "seed", "value"]
    return sorted(map(tuple, frame[columns].itertuples(index=False)))


def failures() -> list[Row]:
    """Three runs whose checkpoints cannot be written; then they can, and `--retry` makes them."""
    folder = home("failures")
    vaes = {key: task for key, task in tasks().items() if task.config.stage == "vae"}
    sweeps.check(sweeps.perform_all(vaes, 2))
    there, bad = plans.find_runs(tasks()), []
    for task in list(tasks().values())[5:20:6]:
        config = task.config.replace(vae=there[task.needs["vae"]].reference)
        path = sweeps.locate(config).path / "checkpoints"
        path.parent.mkdir(parents=True)
        path.write_text("no folder", encoding="utf-8")
        bad.append(path)
    status = drive(folder).wait()
    count, rows = len(starts(folder)), len(encoders())
    text = (folder / "log.txt").read_text(encoding="utf-8")
    errors = {path.parent.name for path in bad if f"{path.parent.name} failed: " in text}
    for path in bad:
        path.unlink()
    again = drive(folder, "--retry").wait()
    retried = {start[0] for start in starts(folder)[count:]}
    return [
        record.row("grid_rows_with_3_bad_points", rows, "rows of 24", 1),
        record.row("grid_exit_status", status, "status", 1),
        record.row("grid_errors_named", len(errors), "errors of 3", 1),
        record.row("retry_started", len(retried), "runs of 3", 1),
        record.row("retry_exit_status", again, "status", 1),
        record.row("grid_rows_after_retry", len(encoders()), "rows of 24", 1),
        record.row(
            "retry_starts_other_runs", len(retried - {str(p.parent) for p in bad}), "runs", 1
        ),
    ]


def kills(moments: int = 20) -> list[Row]:
    """SIGKILL of the driver, of a kernel, or of both between a summary and the notebook's end."""
    folder, chance = home("kills"), random.Random(0)
    kinds = Counter[str]()
    driver = drive(folder)
    while sum(kinds.values()) < moments:
        kind = ("driver", "kernel", "summary")[sum(kinds.values()) % 3]
        moment = time.monotonic() + chance.uniform(2, 25)
        while time.monotonic() < moment and driver.poll() is None:
            time.sleep(0.2)
        if kind == "summary":  # the next run that has one while its notebook goes on
            while driver.poll() is None and not half_made(folder):
                time.sleep(0.05)
        if driver.poll() is not None:
            if not lacking():
                break  # all is made: no moment is left
            driver = drive(folder)
            continue
        mine = [int(pid) for _, pid, of, _ in starts(folder) if int(of) == driver.pid]
        living = [pid for pid in mine if psutil.pid_exists(pid)]
        if kind == "kernel" and living:
            os.kill(chance.choice(living), signal.SIGKILL)
            kinds[kind] += 1
        elif kind != "kernel":
            driver.kill()
            driver.wait()
            kinds[kind] += 1
            driver = drive(folder)
    status = driver.wait()
    if status:  # a kernel that was killed twice counts as failed
        status = drive(folder).wait()
    twice = sum(int(again) for *_, again in starts(folder))
    lacks = lacking()
    print(dict(kinds), lacks, twice)
    tried = sum(kinds.values())
    return [
        record.row("sweep_kills_tried", tried, "kills", len(tasks())),
        record.row("sweep_kills_survived", tried if not (lacks or status) else 0, "kills", 26),
        *(record.row(f"sweep_kills_of_{kind}", n, "kills", tried) for kind, n in kinds.items()),
        record.row("kernels_started_twice", twice, "kernels", len(starts(folder))),
        record.row("runs_without_notebook_or_figure", len(lacks), "runs", len(tasks())),
    ]


def half_made(folder: Path) -> list[Path]:
    """Runs with a summary whose notebook goes on."""
    return [
        path for path in folder.glob("*/*/summary.json")
        if (path.parent / "notebook.running.ipynb").exists()
    ]  # fmt: skip


def drivers() -> list[Row]:
    """Two at once on one folder, against the trial of kills, whose table must be the same."""
    folder = home("drivers")
    both = [drive(folder) for _ in range(2)]
    statuses = [driver.wait() for driver in both]
    home("kills", keep=True)
    once = encoders()
    home("drivers", keep=True)
    starts_of = Counter(start[0] for start in starts(folder))
    return [
        record.row("two_drivers_same_table", int(encoders() == once), "1 is yes", len(once)),
        record.row("two_drivers_exit_statuses", sum(statuses), "sum", 2),
        record.row("two_drivers_kernels_of_a_run", max(starts_of.values()), "most", len(starts_of)),
    ]


def dask() -> list[Row]:
    """A cluster of two workers, of which one is killed when it has made two runs."""
    folder = home("dask")
    cluster = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0"]
    cluster += ["--scheduler-file", str(folder / "scheduler.json"), "--no-dashboard"]
    log = (folder / "dask.txt").open("w", encoding="utf-8")
    others = [subprocess.Popen(cluster, stdout=log, stderr=log)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny"]
    worker += ["--scheduler-file", str(folder / "scheduler.json"), "--no-dashboard"]
    try:
        others += [subprocess.Popen(worker, stdout=log, stderr=log) for _ in range(2)]
        while not (folder / "scheduler.json").exists():
            time.sleep(0.2)
        text = (folder / "scheduler.json").read_text(encoding="utf-8")
        driver = drive(folder, "--scheduler", json.loads(text)["address"])
        while driver.poll() is None and len([*folder.glob("ssl/*/summary.json")]) < 4:
            time.sleep(0.2)
        others[1].kill()
        status = driver.wait()
    finally:
        for process in others:
            process.kill()
    home("kills", keep=True)
    once = encoders()
    home("dask", keep=True)
    return [
        record.row("dask_with_a_killed_worker_same_table", int(encoders() == once), "1 is yes", 24),
        record.row("dask_exit_status", status, "status", 1),
    ]


def kernels_in_a_row(n: int = 200) -> list[Row]:
    """Kernels of a notebook that does nothing, one after another; what is left of them."""
    folder, errors, mine = home("kernels"), 0, psutil.Process()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, folder / "nothing.ipynb")
    kernels.FOLDER = folder
    start = time.monotonic()
    for i in range(n):
        try:
            kernels.execute("nothing", {}, folder / f"{i}.ipynb")
        except Exception as error:
            print(error)
            errors += 1
    children = len(mine.children(recursive=True))
    return [
        record.row("kernels_in_a_row", n - errors, "kernels", n),
        record.row("kernels_left_processes", children, "processes", n),
        record.row("kernel_seconds", round((time.monotonic() - start) / n, 2), "s each", n),
    ]


def locate(n: int = 1000) -> list[Row]:
    """Finished points, an encoder and its evaluation each, of one VAE; made by hand."""
    home("locate")
    fixed = {"all": SMALL, "vae": {"seed": 0}, "ssl": {"adversary": "idaa"}}
    fixed["eval"] = {"references": False}
    cross = {"ssl": {"epsilon": [(i + 1) / 1000 for i in range(n)]}}
    points, runs_by_key = read({"fixed": fixed, "cross": cross}).points(), dict[str, Any]()
    config: Any
    for key, (config, needs) in plans.plan(points).items():
        config = config.replace(**{f: runs_by_key[other].reference for f, other in needs.items()})
        if config.stage == "vae":
            runs_by_key[key] = first = train(config)
            continue
        run = runs_by_key[key] = sweeps.locate(config)
        shutil.copytree(first.path, run.path)
        write_json(run.path / "config.json", config.model_dump(mode="json"))
    walls, seconds = [], []
    for _ in range(3):
        wall, start = time.monotonic(), time.process_time()
        there = plans.find_runs(plans.plan(points))
        walls.append(time.monotonic() - wall)
        seconds.append(time.process_time() - start)
        assert len(there) == 2 * n + 1
    spread = [round(min(walls), 2), round(max(walls), 2)]
    return [
        record.row("locate_1000_seconds", round(sorted(walls)[1], 2), "s", 3, spread),
        record.row("locate_1000_cpu_seconds", round(sorted(seconds)[1], 2), "s of CPU", 3),
    ]


def overhead(n: int = 5) -> list[Row]:
    """Seconds of CPU that a notebook takes, with its kernel and its part of the driver, beyond the
    command that trains the same; pairs that differ in the seed."""
    home("overhead")
    fixed = {"all": SMALL, "ssl": {"adversary": "none"}}
    points = read({"stages": ["ssl"], "fixed": fixed, "seeds": [*range(2 * n + 1)]}).points()
    first, *configs = [task.config for task in plans.plan(points).values()]
    sweeps.perform(first)  # imports what the driver needs
    commands, notebooks = [], []
    for command, notebook in zip(configs[::2], configs[1::2], strict=True):
        words = [f"{name}={value}" for name, value in parameters(command).items()]
        start = cpu()
        subprocess.run([sys.executable, "-m", "idaa_lib.train", "ssl", *words], check=True)
        commands.append(cpu() - start)
        start = cpu()
        sweeps.check({"": sweeps.perform(notebook)})
        notebooks.append(cpu() - start)
    values = sorted(b - a for a, b in zip(commands, notebooks, strict=True))
    spread, middle = [round(values[0], 2), round(values[-1], 2)], round(values[n // 2], 2)
    return [
        record.row("sweep_overhead_seconds", middle, "s of CPU", n, spread),
        record.row("notebook_seconds", round(sorted(notebooks)[n // 2], 2), "s of CPU", n),
        record.row("command_seconds", round(sorted(commands)[n // 2], 2), "s of CPU", n),
    ]


def cpu() -> float:
    """Seconds of CPU of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


TRIALS = {
    "kills": kills, "drivers": drivers, "dask": dask, "failures": failures,
    "kernels": kernels_in_a_row, "locate": locate, "overhead": overhead,
}  # fmt: skip


def main(words: list[str]) -> None:
    for name in [word for word in words if word != "write"] if words else TRIALS:
        rows = TRIALS[name]()
        for row in rows:
            print(row["what"], row["value"], row["unit"], flush=True)
        write_json(FOLDER / f"{name}.json", {"rows": rows, "load": os.getloadavg()})
    files = [FOLDER / f"{name}.json" for name in TRIALS if (FOLDER / f"{name}.json").exists()]
    trials = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    loads = [f"{p.stem} {each['load'][1]:.0f}" for p, each in zip(files, trials, strict=True)]
    protocol = f"""{" ".join((__doc__ or "").split())} Same table: the same runs with the same
accuracies as after the kills. Processes that wanted this machine's cores at the end of each trial:
{", ".join(loads)}."""
    rows = [row for each in trials for row in each["rows"]]
    print(record.write("sweeps", " ".join(protocol.split()), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
