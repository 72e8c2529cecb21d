"""How long does `make demo` take, and what comes out? In outputs of its own, from nothing.

`make demo` itself, after installation; the seconds of each executed notebook are papermill's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import record

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        environment = os.environ | {"IDAA_OUTPUTS": folder}
        subprocess.run(["make", "demo"], cwd=ROOT, env=environment, check=True)
        minutes = (time.monotonic() - began) / 60
        seconds: dict[str, list[float]] = {}
        for path in Path(folder).rglob("*.ipynb"):
            told = json.loads(path.read_text())["metadata"]["papermill"]
            seconds.setdefault(Path(told["input_path"]).stem, []).append(told["duration"])
        rows = [record.row("demo_minutes", round(minutes, 2), "minutes", 1)]
        for name, values in sorted(seconds.items()):
            spread = [round(min(values), 1), round(max(values), 1)]
            rows.append(
                record.row(f"seconds_{name}", round(median(values), 1), "s", len(values), spread)
            )
        for path in sorted(Path(folder).glob("eval/*photos-simclr-*/summary.json")):
            summary = json.loads(path.read_text())
            adversary = path.parent.name.split("-")[3]
            if "pixels_knn_top1" not in summary:
                continue  # a point of the sensitivity study
            keys = {"": adversary} | (
                {"pixels_": "pixels", "random_": "untrained"} if adversary == "none" else {}
            )
            for prefix, name in keys.items():
                for probe in ("knn", "linear"):
                    key = f"{prefix}{probe}"
                    spread = [summary[f"{key}_low"], summary[f"{key}_high"]]
                    value = summary[f"{key}_top1"]
                    n = summary[f"{key}_n"]
                    rows.append(record.row(f"{probe}_{name}", value, "% top-1", n, spread))
    protocol = (
        "`make demo` after installation, outputs empty, photographs decoded or not as found; "
        "two notebooks at a time. seconds_*: papermill's duration of each executed notebook, "
        "median, spread: smallest and largest, n: notebooks (05 finds its runs finished). "
        "knn_*, linear_*: test accuracy on photos, spread: bootstrap 95 % interval over n images."
    )
    print(record.write("demo", protocol, rows))


if __name__ == "__main__":
    sys.exit(main())
