"""Progress that reads well where it is read: a terminal, JupyterLab, a papermill or cluster log.

A terminal gets tqdm's bar. Everything else gets lines: at most one every few seconds, more seldom
as the run goes on, because a bar in a log is thousands of lines. A notebook kernel gets both its
lines and a bar that is one output updated in place, which papermill stores once.
"""

from __future__ import annotations

import contextlib
import html
import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Steps done out of `total`, from `start` on.

    Args:
        name: what is trained. batch_size: images a step, for images/s.
    """

    def __init__(self, name: str, total: int, start: int, batch_size: int) -> None:
        self.name, self.total, self.step, self.batch_size = name, total, start, batch_size
        self._first, self._began, self._shown, self._printed = start, time.monotonic(), 0.0, 0.0
        self._bar = None
        self._handle = _notebook_display()
        if self._handle is None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=name, unit="step")

    @property
    def images_per_second(self) -> float:
        """Since this process began, 0 before the first step."""
        seconds = time.monotonic() - self._began
        return (self.step - self._first) * self.batch_size / seconds if seconds else 0.0

    def update(self, step: int) -> None:
        self.step = step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, epoch: str, values: dict[str, Any]) -> None:
        """Show the latest values; `epoch` such as '3/10'."""
        text = " · ".join(f"{k} {v:.4g}" for k, v in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.images_per_second:.0f} images/s · {text}")
            return
        now = time.monotonic() - self._began
        last = self.step >= self.total
        line = (
            f"{self.name} · epoch {epoch} · step {self.step}/{self.total} · {text} · "
            f"{self.images_per_second:.0f} images/s · {clock(self.seconds_left)} left"
        )
        if self._handle is not None and (last or now - self._shown > 0.25):
            self._shown = now
            self._handle.update(_Bar(self.step / self.total, line))
        # Log lines thin out: 5 s apart at first, a twentieth of the time so far later.
        if last or now - self._printed > max(5.0, 0.05 * now):
            self._printed = now
            with contextlib.suppress(BrokenPipeError):  # a reader that left must not end the run
                print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds_left(self) -> float | None:
        """By the speed since this process began; None before its first step."""
        done = self.step - self._first
        seconds = time.monotonic() - self._began
        return (self.total - self.step) * seconds / done if done else None


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
