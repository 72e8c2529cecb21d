"""Result files: `benchmarks/results/<date>-<hardware>-<name>.json`, what README and docs quote."""

from __future__ import annotations

import datetime
import functools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from idaa_lib.runs.machine import hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"


def row(
    what: str, value: float, unit: str, n: int, spread: Any = None, baseline: Any = None
) -> dict[str, Any]:
    """One measured figure; `spread` is an interval or a deviation, said in the protocol."""
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "n": n,
        "spread": spread,
        "baseline": baseline,
    }


def write(name: str, protocol: str, rows: list[dict[str, Any]]) -> Path:
    """Write the file of today's measurement on this hardware."""
    today = datetime.date.today().isoformat()
    machine = hardware()
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    path = RESULTS / f"{today}-{slug}-{name}.json"
    content = {
        "name": name,
        "date": today,
        "commit": _commit(),
        "hardware": machine,
        "versions": versions(),
        "protocol": protocol,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


@functools.cache  # a file that is written twice would make the second dirty
def _commit() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
