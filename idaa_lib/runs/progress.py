"""Progress that reads well where it is read: a terminal, JupyterLab, a papermill or cluster log.

A terminal gets tqdm's bar of a training. Everything else gets lines: at most one every few seconds,
fewer as the work lasts longer, because a bar in a log is thousands of lines. A notebook kernel gets
its lines and one output that is updated in place, which papermill stores once.
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

from tqdm import tqdm

from idaa_lib.configs import Config
from idaa_lib.runs.directory import Run, RunError, list_runs, outputs_root, read_json

# The values that a line of progress has room for.
BRIEF = ("loss", "adversarial_loss", "reconstruction_val", "rate_nats_val", "knn_top1_val",
         "ema_top1_val")  # fmt: skip
# tqdm's own rate and time left would count pauses.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
# Seconds that a kernel takes to start, to import and to draw, beside the work of its run.
KERNEL = 12.0


class Lines:
    """A line of text that goes on changing: a notebook's is replaced, a log gets some of them,
    `least` seconds apart at first."""

    def __init__(self, least: float = 5.0) -> None:
        self.least = least
        self._start, self._updated, self._printed = time.monotonic(), 0.0, 0.0
        self._handle = _notebook_display()

    def show(self, fraction: float, text: str, last: bool = False) -> None:
        """Show `text` and a bar of which `fraction` is full; the `last` line is never left out."""
        seconds = time.monotonic() - self._start
        if self._handle is not None and (last or seconds - self._updated > 0.25):
            self._updated = seconds
            self._handle.update(_Bar(fraction, text))
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


class Progress:
    """Steps done out of `total`, `step` of them already; `pace`: seconds a step, 0 if unknown."""

    def __init__(self, name: str, total: int, step: int) -> None:
        self.name, self.total, self.step, self.pace = name, total, step, 0.0
        self._bar = self._lines = None
        if _shell() is None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=step, desc=name, bar_format=BAR)
        else:
            self._lines = Lines()

    @property
    def seconds_left(self) -> float | None:
        """At the present pace; None before the first line of the log."""
        return (self.total - self.step) * self.pace if self.pace else None

    def update(self, step: int) -> None:
        self.step = step
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed
                self._bar.update(step - self._bar.n)

    def show(self, epoch: str, values: Mapping[str, Any]) -> None:
        """Show the latest values; `epoch` such as '3/10'."""
        parts = [f"{name} {values[name]:.4g}" for name in BRIEF if name in values]
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.0f} images/s")
        parts.append(f"{clock(self.seconds_left)} left")
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.set_postfix_str(" · ".join(parts))
        elif self._lines is not None:
            parts = [self.name, f"epoch {epoch}", f"step {self.step}/{self.total}", *parts]
            self._lines.show(self.step / self.total, " · ".join(parts), self.step >= self.total)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


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

    def _left(self, done: Collection[str]) -> Counter[str]:
        """Stage → how many of its runs are not done."""
        return Counter(self.configs[key].stage for key in self.configs.keys() - set(done))

    def seconds_left(self, done: Collection[str]) -> float | None:
        """For all that is not done, by the mean of its stage; None where nothing is known of it."""
        left, work = self._left(done), defaultdict[str, float](float)
        for run in list(self.going):  # which other threads change
            work[run.stage] += _share(run)
        if not all(self.seconds[stage] for stage in left):
            return None
        seconds = (max(0.0, n - work[s]) * mean(self.seconds[s]) for s, n in left.items())
        return sum(seconds) / self.jobs

    def plan(self, done: Collection[str]) -> str:
        """What is to be made, before it starts."""
        stages = Counter(config.stage for config in self.configs.values())
        parts = ", ".join(f"{n} {stage}" for stage, n in stages.items())
        text = f"{len(self.configs)} runs ({parts}): {len(done)} are finished"
        if left := len(self.configs) - len(done):
            seconds = self.seconds_left(done)
            basis = "no such run yet"
            if seconds:
                mib = sum(n * mean(self.sizes[s]) for s, n in self._left(done).items()) / 2**20
                free = shutil.disk_usage(outputs_root().anchor).free / 2**20
                basis = f"about {clock(seconds)} and {mib:,.0f} MiB of disk, by the runs so far"
                basis += f" (only {free:,.0f} MiB are free)" * (free < mib)
            text += f", {left} are to be made, {self.jobs} at a time: {basis}"
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


class _Bar:
    """One line of text, and the same with a bar where HTML is shown."""

    def __init__(self, fraction: float, text: str) -> None:
        self.fraction, self.text = fraction, text

    def _repr_html_(self) -> str:
        return (
            f'<progress value="{self.fraction:.4f}" style="width:30%"></progress> '
            f'<code style="font-size:smaller">{html.escape(self.text)}</code>'
        )

    def __repr__(self) -> str:
        return self.text


def _shell() -> Any:
    """IPython's shell where a Jupyter kernel runs this process, else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if hasattr(shell, "kernel") else None


def _notebook_display() -> Any:
    """A display handle in a Jupyter kernel, else None."""
    if _shell() is None:
        return None
    from IPython.display import display

    return display(_Bar(0.0, "starting …"), display_id=True)


def clock(seconds: float | None) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03, and `?` while nothing is known."""
    if seconds is None:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
