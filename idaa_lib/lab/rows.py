"""What the table of runs says of one: state, configuration, result, size and age, as a line."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from idaa_lib.lab import compare, process
from idaa_lib.runs import Run, RunError

# A state is told by a sign and a word, never by a colour alone.
DAMAGED = "damaged"
SIGNS = {
    "finished": "✓", "going": "▶", "interrupted": "◼", "failed": "✗", "new": "○", DAMAGED: "⚠",
}  # fmt: skip
# Words of `process.look` for a run that a process is at.
UNDER_WAY = ("starting", "going", "paused", "ending")
COLUMNS = (
    "state", "run", "data", "method", "adversary", "differs from preset", "seed", "result",
    "size", "age",
)  # fmt: skip
# Fields with a column of their own, and those that change no result.
HIDDEN = {"preset", "seed", "dataset", "method", "adversary", "run"}


class Row(NamedTuple):
    """`told` as in COLUMNS from `data` to `result`; `error`, in full, why it is not finished."""

    state: str  # one of SIGNS
    word: str  # the same, more exactly: starting, paused, …
    progress: str
    told: tuple[str, ...]
    error: str
    size: int  # bytes
    began: float  # seconds since 1970

    def html(self, run: Run) -> str:
        """The line as HTML; a failure's reason below."""
        first = (f"{SIGNS[self.state]} {self.word}", self.progress), (run.stage, run.id[-8:])
        line = cells([*first, *self.told, mebibytes(self.size), age(self.began)], run.id)
        return line + (f'<div class="idaa-runs-error">{html.escape(self.error)}</div>'
                       if self.error else "")  # fmt: skip


def row_of(run: Run) -> Row:
    """What the table says of a run, whatever the state of its files."""
    size, began = run.size, run.last_start
    try:
        config, found, summary = run.config, process.look(run), run.summary or {}
        method = adversary = "–"
        changed = {k: v for k, v in config.changed().items() if k not in HIDDEN}
        said = [compare.say(k, v, "=") for k, v in changed.items() if k not in config.circumstances]
        if "kappa" in changed and "beta" in changed:  # which say the same
            said.remove(compare.say("kappa", changed["kappa"], "="))
        if run.stage in ("ssl", "semi"):
            method, adversary = compare.method_of(config)
        elif run.stage in ("eval", "transfer", "detection"):
            said.insert(0, f"of {config.run[-8:]}")
            with contextlib.suppress(RunError):  # what it judged may be gone
                method, adversary = compare.method_of(compare.judged(run).config)
        told = (
            Path(config.dataset or "–").name, method, adversary, ", ".join(said),
            str(config.seed), result(summary),
        )  # fmt: skip
        state = "going" if found.word in UNDER_WAY else found.word
        progress = ""
        if state != "finished" and "steps" in found.state:
            progress = f"{found.state['step']:,} of {found.state['steps']:,}"
        return Row(state, found.word, progress, told, found.reason, size, began)
    except (RunError, ValueError, KeyError, TypeError, OSError) as error:
        return Row(DAMAGED, DAMAGED, "", ("", "", "", run.id, "", ""), str(error), size, began)


def stamp(run: Run) -> tuple[int, ...]:
    """Changes with the files that a row is made from."""

    def changed(name: str) -> int:
        try:
            return (run.path / name).stat().st_mtime_ns
        except OSError:
            return 0

    return tuple(map(changed, ("config.json", "state.json", "process.json", "summary.json")))


def result(summary: dict[str, Any]) -> str:
    """The key figure of a finished run, with its unit."""
    if "knn_top1" in summary:
        return (
            f"kNN {summary['knn_top1']:.1f} %, linear {summary['linear_top1']:.1f} %, test, "
            f"{summary['protocol']}"
        )
    if "rows" in summary:
        first, *others = (row for row in summary["rows"] if row["probe"] == "linear")
        more = len({row["dataset"] for row in others} - {first["dataset"]})
        told = f"linear {first['value']:.1f} % on {first['dataset']}, test"
        return f"{told}; {more} more data sets" if more else told
    if "box_ap" in summary:
        masks = f", masks {summary['mask_ap']:.1f}" if "mask_ap" in summary else ""
        return f"AP boxes {summary['box_ap']:.1f}{masks}"
    if "parts" in summary:
        found = {part: summary["parts"][part]["retrieved"] for part in ("G", "R")}
        return f"x found from R {found['R']:.1f} %, from G {found['G']:.1f} %"
    if "ema_top1" in summary:
        return f"accuracy {summary['ema_top1']:.1f} %, test"
    if "knn_top1_val" in summary:
        return f"kNN {summary['knn_top1_val']:.1f} %, validation"
    return f"rate {summary['rate_nats']:.1f} nats" if "rate_nats" in summary else ""


def cells(texts: Sequence[str | tuple[str, str]], title: str = "") -> str:
    """One line of the table; of a pair, the second stands small below the first."""
    line = ""
    for name, text in zip(COLUMNS, texts, strict=True):
        first, second = text if isinstance(text, tuple) else (text, "")
        small = f"<small>{html.escape(second)}</small>" if second else ""
        line += f'<span class="idaa-{name.split()[0]}">{html.escape(first)}{small}</span>'
    return f'<div class="idaa-runs-cells" title="{html.escape(title)}">{line}</div>'


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def age(began: float) -> str:
    """Time since then, in its largest unit."""
    seconds = max(0.0, time.time() - began)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "now"
