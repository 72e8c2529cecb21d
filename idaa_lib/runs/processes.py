"""Whether a process still lives, and what a user asks of this one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import psutil


def born(pid: int) -> float | None:
    """When the process `pid` began, in seconds since 1970; None where there is none (a zombie, dead
    but not yet buried by its parent, is none)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def alive(pid: int, since: float | None) -> bool:
    """Whether the process `pid` that began at `since` lives: a later one may have its number."""
    began = born(pid)
    # The system's clock may have been set meanwhile, which moves these times a little.
    return began is not None and (since is None or abs(began - since) < 5)


@contextlib.contextmanager
def signals() -> Iterator[list[str]]:
    """Collects Ctrl-C and SIGTERM instead of raising; a second Ctrl-C raises at once."""
    asked: list[str] = []

    def note(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python delivers signals to the main thread only
        return
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
