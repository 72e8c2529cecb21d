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
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Set
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

    @contextlib.contextmanager
    def repeat(self, line: Callable[[], tuple[float, str]]) -> Iterator[None]:
        """Inside, what `line` gives (fraction, text) is shown every second, by a thread."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(1.0):
                self.show(*line())

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


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

    `seconds` and `sizes` in bytes, by stage, are those of runs of this preset; the seconds of this
    plan's own join them as they come.
    """

    def __init__(self, configs: Mapping[str, Config], jobs: int, going: Set[Run] = frozenset()):
        self.configs, self.jobs, self.going = configs, jobs, going
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.sizes: dict[str, list[int]] = defaultdict(list)
        for stage, preset in {config.stage: config.preset for config in configs.values()}.items():
            for run in list_runs(stage):
                with contextlib.suppress(RunError):  # it is damaged
                    alike = (read_json(run.path / "config.json") or {}).get("preset") == preset
                    if alike and (took := (run.summary or {}).get("seconds")) is not None:
                        self.seconds[stage].append(KERNEL + took)
                        if len(self.sizes[stage]) < 20:  # each walks a directory
                            self.sizes[stage].append(run.size)

    def _left(self, keys: Collection[str]) -> Counter[str]:
        """Stage → how many of its runs are not done."""
        return Counter(self.configs[key].stage for key in self.configs.keys() - set(keys))

    def seconds_left(self, keys: Collection[str]) -> float | None:
        """For all that is not done, by the mean of its stage; None where nothing is known of it."""
        counts, work = self._left(keys), defaultdict[str, float](float)
        for run in list(self.going):  # which other threads change
            work[run.stage] += _share(run)
        if not all(self.seconds[stage] for stage in counts):
            return None
        seconds = (max(0.0, n - work[s]) * mean(self.seconds[s]) for s, n in counts.items())
        return sum(seconds) / self.jobs

    def plan(self, keys: Collection[str]) -> str:
        """What is to be made, before it starts."""
        stages = Counter(config.stage for config in self.configs.values())
        parts = ", ".join(f"{n} {stage}" for stage, n in stages.items())
        text = f"{len(self.configs)} runs ({parts}): {len(keys)} are finished"
        if count := len(self.configs) - len(keys):
            seconds = self.seconds_left(keys)
            basis = "no such run yet"
            if seconds:
                mib = sum(n * mean(self.sizes[s]) for s, n in self._left(keys).items()) / 2**20
                free = shutil.disk_usage(outputs_root().anchor).free / 2**20
                basis = f"about {clock(seconds)} and {mib:,.0f} MiB of disk, by the runs so far"
                basis += f" (only {free:,.0f} MiB are free)" * (free < mib)
            text += f", {count} are to be made, {self.jobs} at a time: {basis}"
        return f"{text}."

    def line(self, states: Mapping[str, str]) -> tuple[float, str]:
        """The share of the runs that is done, and a sentence; `states` of those done, by key."""
        counts = Counter(states.values())
        parts = [f"{counts.pop('finished', 0)} of {len(self.configs)} runs finished"]
        shares = [(run.stage, _share(run)) for run in list(self.going)]
        names = sorted(stage + (f" {share:.0%}" if share else "") for stage, share in shares)
        parts.append(f"{len(names)} going" + (f" ({', '.join(names)})" if names else ""))
        parts += [f"{n} {state}" for state, n in counts.items()]
        if (seconds := self.seconds_left(states)) is not None:
            parts.append(f"about {clock(seconds)} left")
        return len(states) / max(1, len(self.configs)), " · ".join(parts)


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
