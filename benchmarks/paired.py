"""Two ways of doing the same, timed in turns within one run.

Each side is a process of its own (`sides.py`), with its own environment and its own peak of memory;
only one works at a time, so what disturbs the machine disturbs both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

# The settings that `make lab` and `make demo` export (Makefile), and glibc's own.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}
PAUSE = 1.0  # seconds between two turns, so that nothing of one runs on into the next


class Side:
    """A formulation of `sides.py`, ready to work in a process of its own.

    Raises:
        RuntimeError: the process ended; its last words are above.
    """

    def __init__(self, name: str, allocator: bool = True) -> None:
        self.name = name
        environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
        environment |= ALLOCATOR if allocator else {}
        script = Path(__file__).with_name("sides.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), name],
            env=environment,
            encoding="utf-8",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()
        self.seconds: list[float] = []
        self.peak_mib = 0.0

    def work(self, count: bool = True) -> float:
        """Once; `count=False` for a warm-up."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        if count:
            self.seconds.append(answer["seconds"])
        self.peak_mib = answer["peak_mib"]
        return answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with exit status {self._process.wait()}.")


class Pair(NamedTuple):
    """slow / fast: median and quartiles of the ratios of neighbours; medians in seconds."""

    ratio: float
    quartiles: list[float]
    n: int
    slow_s: float
    fast_s: float
    slow_mib: float
    fast_mib: float


def pair(slow: Side, fast: Side, n: int, warm_up: int = 2) -> Pair:
    """Let them take turns n times, after a warm-up, and end them."""
    for _ in range(warm_up):
        slow.work(count=False)
        fast.work(count=False)
    for _ in range(n):
        for side in (slow, fast):
            side.work()
            time.sleep(PAUSE)
    slow.close()
    fast.close()
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    low, _, high = quantiles(ratios, n=4) if n > 1 else (ratios[0],) * 3
    return Pair(
        median(ratios),
        [round(low, 2), round(high, 2)],
        n,
        median(slow.seconds),
        median(fast.seconds),
        slow.peak_mib,
        fast.peak_mib,
    )
