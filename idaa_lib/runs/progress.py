"""Progress that reads well where it is read: a terminal, JupyterLab, a papermill or cluster log.

A terminal gets tqdm's bar. Everything else gets lines: at most one every few seconds, fewer as the
run lasts longer, because a bar in a log is thousands of lines. A notebook kernel gets its lines and
one output that is updated in place, which papermill stores once.
"""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

# The values that a line of progress has room for.
BRIEF = ("loss", "adversarial_loss", "reconstruction_val", "rate_nats_val", "knn_top1_val",
         "ema_top1_val")  # fmt: skip


class Progress:
    """Steps done out of `total`, `step` of them already; `pace`: seconds a step, 0 if unknown."""

    def __init__(self, name: str, total: int, step: int) -> None:
        self.name, self.total, self.step, self.pace = name, total, step, 0.0
        self._start, self._updated, self._printed = time.monotonic(), 0.0, 0.0
        self._bar = None
        self._handle = _notebook_display()
        if self._handle is None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=step, desc=name, unit="step")

    @property
    def seconds_left(self) -> float | None:
        """At the present pace; None before the first line of the log."""
        return (self.total - self.step) * self.pace if self.pace else None

    def update(self, step: int) -> None:
        self.step = step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, epoch: str, values: Mapping[str, Any]) -> None:
        """Show the latest values; `epoch` such as '3/10'."""
        parts = [f"{name} {values[name]:.4g}" for name in BRIEF if name in values]
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.0f} images/s")
        if self._bar is not None:
            self._bar.set_postfix_str(" · ".join(parts))
            return
        seconds, last = time.monotonic() - self._start, self.step >= self.total
        parts = [self.name, f"epoch {epoch}", f"step {self.step}/{self.total}", *parts]
        line = " · ".join([*parts, f"{clock(self.seconds_left)} left"])
        if self._handle is not None and (last or seconds - self._updated > 0.25):
            self._updated = seconds
            self._handle.update(_Bar(self.step / self.total, line))
        # Log lines thin out: 5 s apart at first, a twentieth of the time so far later.
        if last or seconds - self._printed > max(5.0, 0.05 * seconds):
            self._printed = seconds
            with contextlib.suppress(BrokenPipeError):  # a reader that left must not end the run
                print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


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


def _notebook_display() -> Any:
    """A display handle where a Jupyter kernel runs this process, else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
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
