"""Result files, `benchmarks/results/<date>-<hardware>-<name>.json`, and what is read from them.

    python benchmarks/record.py compare OLD.json NEW.json   # what moved beyond the noise
    python benchmarks/record.py page                        # the table in docs/speed.md, anew

A row has moved where its values differ by more than both spreads together (their half widths), or,
where a file gives none, by more than 5 %; the exit status is 1 if anything moved for the worse.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from idaa_lib.runs.machine import hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "speed.md"
# Without a spread, what two runs of the same thing differ by on a quiet machine.
NOISE = 0.05
# Of other units neither is better: such as nats, images, kills.
MORE_IS_BETTER = ("ratio", "% top-1", "%", "points", "R²", "images/s", "GFLOP/s", "GB/s")
LESS_IS_BETTER = ("s", "s a step", "s each", "s of CPU", "ms", "min", "minutes", "MiB", "GiB")
# Rows of speed.py in words, and what each must reach on a machine that multiplies bf16 natively.
ROWS = {
    "views_ratio_eager": ("two SimCLR views of 32² images", "≥ 3.5"),
    "views_ratio_compiled": ("the same, compiled", "≥ 5"),
    "simclr_step_ratio": ("SimCLR step, ResNet-18, batch 256", "≥ 2"),
    "idaa_step_ratio": ("SimCLR + IDAA step (without native bf16: ≥ 1.4)", "≥ 2.6"),
    "idaa_step_ratio_default_allocator": ("the same, against glibc's allocator settings", "≥ 4"),
    "vae_epoch_ratio": ("VAE epoch", "≥ 1.9"),
    "linear_eval_ratio": ("linear evaluation, against encoding 1000 times", "≥ 1000"),
    "idaa_over_simclr": ("ours alone: SimCLR + IDAA over SimCLR, a step", "≤ 1.95"),
    "step_peak_mib": ("memory of an IDAA step", ""),
    "knn_extra_mib": ("memory of kNN, 10,000 against 50,000, beyond the features", ""),
    "startup_seconds": ("import, cached images, first SimCLR step", ""),
    "transfer_probe_seconds": ("a probe with 45 penalties on 50,000 × 512 features", ""),
    "epoch_seconds_simclr": ("an epoch of SimCLR, 50,000 images", ""),
    "epoch_seconds_idaa": ("an epoch of SimCLR + IDAA", ""),
    "minutes_300_epochs_idaa": ("300 epochs of SimCLR + IDAA with validation, added up", ""),
}


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
    """The file of today's measurement on this hardware, which is written."""
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
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@functools.cache  # a file that is written twice would make the second dirty
def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(
        command, cwd=RESULTS.parent, capture_output=True, encoding="utf-8", check=True
    ).stdout.strip()


# --- comparing two files -------------------------------------------------------------------------


def half_width(row: dict[str, Any]) -> float:
    """Half of the row's spread (an interval, or a deviation); `NOISE` of its value without one."""
    spread = row.get("spread")
    if isinstance(spread, list):
        return (spread[1] - spread[0]) / 2
    return float(spread) if spread is not None else NOISE * abs(row["value"])


def moves(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """(what, old value, new value, verdict) of the rows that both files have.

    Verdicts: `same`, `better`, `worse`; `moved` where neither is better.
    """
    before = {row["what"]: row for row in old["rows"]}
    rows = []
    for after in new["rows"]:
        if (earlier := before.get(after["what"])) is None:
            continue
        a, b = earlier["value"], after["value"]
        if abs(b - a) <= half_width(earlier) + half_width(after):
            verdict = "same"
        elif after["unit"] in (*MORE_IS_BETTER, *LESS_IS_BETTER):
            more = after["unit"] in MORE_IS_BETTER and after["what"] != "idaa_over_simclr"
            verdict = "better" if (b > a) == more else "worse"
        else:
            verdict = "moved"
        rows.append((after["what"], a, b, verdict))
    return rows


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """1 if a row moved for the worse, else 0; prints all that both have."""
    for field in ("hardware", "protocol"):
        if old[field] != new[field]:
            print(f"{field} differs: compare with care.\n  {old[field]}\n  {new[field]}")
    rows = moves(old, new)
    for what, a, b, verdict in rows:
        change = f"{b / a - 1:+.1%}" if a else "–"
        print(f"{verdict:>7}  {what:<36} {a:>10.4g} → {b:<10.4g} ({change})")
    if only := {row["what"] for row in old["rows"]} ^ {row["what"] for row in new["rows"]}:
        print(f"only in one: {', '.join(sorted(only))}")
    return int(any(verdict == "worse" for *_, verdict in rows))


# --- docs/speed.md -------------------------------------------------------------------------------


def table(files: dict[str, dict[str, Any]]) -> str:
    """The table of docs/speed.md: a line for each of ROWS, a column for each machine, with the
    newest figure of each; below it the files.

    Args:
        files: name → content of result files of speed.py.
    """
    newest: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {}
    for name, file in sorted(files.items()):  # by date
        for each in file["rows"]:
            newest.setdefault(file["hardware"], {})[each["what"]] = (name, each)
    machines = sorted(newest)
    lines = [f"| ours against the straightforward | target | {' | '.join(machines)} |"]
    lines += ["|---|---|" + "---|" * len(machines)]
    for what, (words, target) in ROWS.items():
        cells = [_cell(newest[machine].get(what)) for machine in machines]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {words} | {target} | {' | '.join(cells)} |")
    links: dict[str, list[str]] = {}  # by what they were measured with
    for name in sorted({name for figures in newest.values() for name, _ in figures.values()}):
        file = files[name]
        software = ", ".join(f"{k} {file['versions'][k]}" for k in ("python", "torch"))
        link = f"[{file['date']} {file['name']}](../benchmarks/results/{name})"
        links.setdefault(f"{file['hardware']}; {software}", []).append(link)
    lines += ["", "Files, with the protocol, versions and commit of each:", ""]
    lines += [f"- {machine}: {', '.join(own)}" for machine, own in links.items()]
    return "\n".join(lines)


def _cell(figure: tuple[str, dict[str, Any]] | None) -> str:
    """`4.11 × [3.96, 4.21], n = 7`; – where nothing was measured."""
    if figure is None:
        return "–"
    _, row = figure
    unit = {"ratio": "×"}.get(row["unit"], row["unit"])
    spread = row["spread"]
    interval = f" [{spread[0]:g}, {spread[1]:g}]" if isinstance(spread, list) else ""
    value = row["value"]
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {unit}{interval}, n = {row['n']}"


def page() -> int:
    """0, after the table between the two marks of docs/speed.md is made anew."""
    files = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in RESULTS.glob("*-speed*.json")
    }
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    PAGE.write_text(f"{before}{mark}{table(files)}\n{end}{after}", encoding="utf-8")
    return 0


def main(words: list[str]) -> int:
    if words == ["page"]:
        return page()
    if len(words) == 3 and words[0] == "compare":
        old, new = (json.loads(Path(word).read_text(encoding="utf-8")) for word in words[1:])
        return compare(old, new)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
