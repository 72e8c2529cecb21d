"""How long do `make demo` and the notebooks after it take, and what comes out? In outputs of its
own, from nothing.

`make demo` itself, after installation, then notebooks 06 to 10 as they stand, one at a time, with
the runs that the demo made; the seconds of each executed notebook are papermill's.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import record
from paired import ALLOCATOR

from idaa_lib import runs, sweeps
from idaa_lib.configs import SSLConfig
from idaa_lib.train import train_ssl

ROOT = Path(__file__).resolve().parent.parent
FURTHER = (
    "06_compare_methods",
    "07_semi_supervised",
    "08_identity_theory",
    "09_transfer",
    "10_detection",
)


def main() -> None:
    subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        os.environ |= ALLOCATOR | {"IDAA_OUTPUTS": folder}
        subprocess.run(["make", "demo"], cwd=ROOT, check=True)
        minutes = (time.monotonic() - start) / 60
        for name in FURTHER:
            if name == "10_detection":
                train_ssl(SSLConfig(stem="imagenet", size=64))  # what it asks for
            sweeps.execute(name, {}, Path(folder) / "notebooks" / f"{name}.ipynb")
        seconds: dict[str, list[float]] = {}
        for path in Path(folder).rglob("*.ipynb"):
            papermill = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]
            notebook = Path(papermill["input_path"]).stem
            seconds.setdefault(notebook, []).append(papermill["duration"])
        rows = [record.row("demo_minutes", round(minutes, 2), "minutes", 1)]
        for name, values in sorted(seconds.items()):
            spread = [round(min(values), 1), round(max(values), 1)]
            rows.append(
                record.row(f"seconds_{name}", round(median(values), 1), "s", len(values), spread)
            )
        for run in runs.find("eval"):
            summary = run.summary or {}
            if "pixels_knn_top1" not in summary:
                continue  # a point of the sensitivity study
            adversary = runs.encoder(run.config.run).config.adversary
            keys = {"": adversary}
            if adversary == "none":  # the references are the same for all
                keys |= {"pixels_": "pixels", "random_": "untrained"}
            for prefix, name in keys.items():
                for probe in ("knn", "linear"):
                    value, low, high, n = (
                        summary[f"{prefix}{probe}_{part}"] for part in ("top1", "low", "high", "n")
                    )
                    row = record.row(f"{probe}_{name}", round(value, 2), "% top-1", n, [low, high])
                    rows.append(row)
    protocol = (
        "`make demo` after installation, outputs empty, photographs decoded or not as found; "
        "two notebooks at a time; then 06 to 10 one at a time, on what is there (06 finds three of "
        "its cells finished and launches none; 08 and 09 take the newest runs; 10 one with an "
        "ImageNet stem at 64 px, whose training is not counted). seconds_*: papermill's duration "
        "of each executed notebook, median, spread: smallest and largest, n: notebooks (05 finds "
        "its runs finished). "
        "knn_*, linear_*: test accuracy on photos, spread: bootstrap 95 % interval over n images."
    )
    print(record.write("demo", protocol, rows))


if __name__ == "__main__":
    main()
