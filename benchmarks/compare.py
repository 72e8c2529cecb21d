"""What moved between two result files, beyond the noise: `compare.py OLD.json NEW.json`.

A row has moved where its values differ by more than both spreads together (their half widths), or,
where a file gives none, by more than 5 %. Exit status 1 if anything moved for the worse.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Without a spread, what two runs of the same thing differ by on a quiet machine.
NOISE = 0.05
# Of other units more is worse: seconds, memory.
MORE_IS_BETTER = ("ratio", "% top-1", "images/s")


def half_width(row: dict[str, Any]) -> float:
    """Half of the row's spread (an interval, or a deviation); `NOISE` of its value without one."""
    spread = row.get("spread")
    if isinstance(spread, list):
        return (spread[1] - spread[0]) / 2
    return float(spread) if spread is not None else NOISE * abs(row["value"])


def moves(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """(what, old value, new value, verdict) of the rows that both files have.

    Verdicts: `same`, `better`, `worse`.
    """
    before = {row["what"]: row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        if (was := before.get(row["what"])) is None:
            continue
        a, b = was["value"], row["value"]
        if abs(b - a) <= half_width(was) + half_width(row):
            verdict = "same"
        else:
            verdict = "better" if (b > a) == (row["unit"] in MORE_IS_BETTER) else "worse"
        found.append((row["what"], a, b, verdict))
    return found


def main(words: list[str]) -> int:
    if len(words) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    old, new = (json.loads(Path(word).read_text()) for word in words)
    for field in ("hardware", "protocol"):
        if old[field] != new[field]:
            print(f"{field} differs: compare with care.\n  {old[field]}\n  {new[field]}")
    rows = moves(old, new)
    for what, a, b, verdict in rows:
        print(f"{verdict:>7}  {what:<36} {a:>10.4g} → {b:<10.4g} ({b / a - 1:+.1%})")
    only = {row["what"] for row in old["rows"]} ^ {row["what"] for row in new["rows"]}
    if only:
        print(f"only in one: {', '.join(sorted(only))}")
    return int(any(verdict == "worse" for *_, verdict in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
