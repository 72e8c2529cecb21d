"""Progress that reads well where it is read: a terminal, JupyterLab, a papermill or cluster log.

All of them get lines: at most one every few seconds, fewer as the work lasts longer, because a bar
in a log is thousands of lines. A notebook kernel gets besides one output that is updated in place,
which papermill stores once.
"""

from __future__ import annotations

import contextlib
import html
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Set
from statistics import mean
from typing import Any

from idaa_lib.configs import Config
from idaa_lib.runs.directory import Run, RunError, list_runs, outputs_root, read_json

# The values that a line of progress has room for.
BRIEF = ("loss", "adversarial_loss", "reconstruction_val", "rate_nats_val", "knn_top1_val",
         "ema_top1_val")  # fmt: skip
# Seconds that a kernel takes to start, to import and to draw, beside the work of its run.
KERNEL = 12.0


class Lines:
    """A line of text that goes on changing: a notebook's is replaced, a log gets some of them,
    `least` seconds apart at first.

    place: what shows a notebook's line, like a display handle; None is an output of the cell.
    """

    def __init__(self, least: float = 5.0, place: Any = None) -> None:
        self.least = least
        self._start, self._updated, self._printed = time.monotonic(), 0.0, 0.0
        self._handle = place or _notebook_display()

    def show(self, fraction: float, text: str, last: bool = False) -> None:
        """Show `text` and a bar of which `fraction` is full; the `last` line is never left out."""
        seconds = time.monotonic() - self._start
        if self._handle is not None and (last or seconds - self._updated > 0.25):
            self._updated = seconds
            self._handle.update(_bar(fraction, text), raw=True)
        # Later a twentieth of the time so far apart, 10 minutes at most.
        if last or seconds - self._printed > min(600.0, max(self.least, 0.05 * seconds)):
            self._printed = seconds
            with contextlib.suppress(OSError):  # a reader that left must not end the run
                print(text, flush=True)


def brief(values: Mapping[str, Any], seconds_left: float | None) -> str:
    """The values of a line of the log that there is room for, and the time left."""
    parts = [f"{name} {values[name]:.4g}" for name in BRIEF if name in values]
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:.0f} images/s")
    return " · ".join([*parts, f"{clock(seconds_left)} left"])


class Tally:
    """How the runs of a plan go, and how long the others take.

    Args:
        configs: the configuration of each run, by its key in the plan. jobs: runs at a time.
        going: those that are being made, as the caller knows them from moment to moment.

    The time of a run is estimated from finished runs of the same preset, scaled by epochs × images
    × pixels. Runs of this plan join them as they end.
    """

    def __init__(self, configs: Mapping[str, Config], jobs: int, going: Set[Run] = frozenset()):
        self.configs, self.jobs, self.going = configs, jobs, going
        self._parts = {key: _part(config) for key, config in configs.items()}
        # By `_kind`, and by stage for what has no like: seconds for each unit of work, and bytes.
        self._seconds: dict[Any, list[float]] = defaultdict(list)
        self._bytes: dict[Any, list[int]] = defaultdict(list)
        for stage, preset in {config.stage: config.preset for config in configs.values()}.items():
            for run in list_runs(stage):
                with contextlib.suppress(RunError):  # it is damaged
                    values = read_json(run.path / "config.json") or {}
                    took = (run.summary or {}).get("seconds")
                    if values.get("preset") == preset and took is not None:
                        self._add(stage, values, took)
                        if len(self._bytes[stage]) < 20:  # each walks a directory
                            size = run.size
                            for key in (stage, _kind(stage, values)):
                                self._bytes[key].append(size)

    def add(self, config: Config, seconds: float) -> None:
        """Count a run of this plan that took so long, its kernel's start in it."""
        self._add(config.stage, dict(config), max(0.0, seconds - KERNEL))

    def _add(self, stage: str, values: Mapping[str, Any], seconds: float) -> None:
        for key in (stage, _kind(stage, values)):
            self._seconds[key].append(seconds / _work(values, key != stage))

    def _left(self, keys: Collection[str]) -> Counter[tuple[Any, ...]]:
        """How many runs are not done, by stage, `_kind`, what tells their seconds, and `_work`."""
        counts = Counter[tuple[Any, ...]]()
        for key in self.configs.keys() - set(keys):
            stage, kind, *works = self._parts[key]
            alike = kind in self._seconds
            counts[stage, kind, kind if alike else stage, works[alike]] += 1
        return counts

    def seconds_left(self, keys: Collection[str]) -> float | None:
        """For all that is not done; None where nothing is known of a stage."""
        seconds, counts = defaultdict[str, float](float), Counter[str]()
        shares = defaultdict[str, float](float)
        for (stage, _, basis, work), n in self._left(keys).items():
            if not (rates := self._seconds[basis]):
                return None
            seconds[stage] += n * (KERNEL + work * mean(rates))
            counts[stage] += n
        for run in list(self.going):  # which other threads change
            shares[run.stage] += _share(run)
        rest = (t * max(0.0, 1 - shares[stage] / counts[stage]) for stage, t in seconds.items())
        return sum(rest) / self.jobs

    def plan(self, keys: Collection[str]) -> str:
        """What is to be made, before it starts."""
        stages = Counter(config.stage for config in self.configs.values())
        parts = ", ".join(f"{n} {stage}" for stage, n in stages.items())
        text = f"{len(self.configs)} runs ({parts}): {len(keys)} finished"
        if count := len(self.configs) - len(keys):
            seconds = self.seconds_left(keys)
            basis = "no such run yet"
            if seconds:
                left = self._left(keys)
                sizes = [
                    (n, self._bytes.get(k) or self._bytes[s]) for (s, k, *_), n in left.items()
                ]
                mib = sum(n * mean(each) for n, each in sizes) / 2**20
                root = outputs_root()
                place = next(path for path in (root, *root.parents) if path.exists())
                free = shutil.disk_usage(place).free / 2**20
                others = any(kind != basis for _, kind, basis, _ in left)
                basis = f"about {clock(seconds)} and {mib:,.0f} MiB of disk, by the runs so far"
                basis += ", which have other networks or images" * others
                basis += f" (only {free:,.0f} MiB are free)" * (free < mib)
            text += f", {count} to make, {self.jobs} at a time: {basis}"
        return f"{text}."

    def line(self, states: Mapping[str, str]) -> tuple[float, str]:
        """The share of the runs that is done, and a sentence; `states` of those done, by key."""
        counts = Counter(states.values())
        parts = [f"{counts.pop('finished', 0)} of {len(self.configs)} runs finished"]
        complete = len(states) == len(self.configs)
        if not complete:
            shares = [(run.stage, _share(run)) for run in list(self.going)]
            names = sorted(stage + (f" {share:.0%}" if share else "") for stage, share in shares)
            parts.append(f"{len(names)} going" + (f" ({', '.join(names)})" if names else ""))
        parts += [f"{n} {state}" for state, n in counts.items()]
        if not complete and (seconds := self.seconds_left(states)) is not None:
            parts.append(f"about {clock(seconds)} left")
        return len(states) / max(1, len(self.configs)), " · ".join(parts)


def _part(config: Config) -> tuple[Any, ...]:
    """Stage, `_kind`, and `_work` among all of its stage and among its like."""
    stage, values = config.stage, dict(config)
    return stage, _kind(stage, values), _work(values, False), _work(values, True)


def _kind(stage: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs have in common that take as long for the same `_work`."""
    fields = ("dataset", "backbone", "width", "method", "adversary")
    return stage, values.get("limit") is None, *(values.get(field) for field in fields)


def _work(values: Mapping[str, Any], alike: bool) -> float:
    """Epochs × images × pixels, as far as the fields say; `alike`: compared within a `_kind`."""
    images = values.get("limit") if alike else 1
    return (values.get("epochs") or 1) * (images or 1) * ((values.get("size") or 32) / 32) ** 2


def _share(run: Run) -> float:
    """What is done of the steps of a training that goes, from 0 to 1; else 0."""
    state = run.state
    return state.get("step", 0) / state.get("steps", 1) if state["state"] == "going" else 0.0


def _bar(fraction: float, text: str) -> dict[str, str]:
    """The text, and the same with a bar where HTML is shown, by MIME type."""
    bar = f'<progress value="{fraction:.4f}" style="width:30%"></progress>'
    line = f'{bar} <code style="font-size:smaller">{html.escape(text)}</code>'
    return {"text/plain": text, "text/html": line}


def _notebook_display() -> Any:
    """A display handle where a Jupyter kernel runs this process, else None."""
    ipython = sys.modules.get("IPython")
    if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
        return None
    return ipython.display.display(_bar(0.0, "starting …"), raw=True, display_id=True)


def clock(seconds: float | None) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03, and `?` while nothing is known."""
    if seconds is None:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
