"""A run as a line of the runs page: state, configuration, result, size and age."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from idaa_lib import results
from idaa_lib.lab import process
from idaa_lib.runs import Run

# A state is a sign and a word, never a colour alone.
DAMAGED = "damaged"
SIGNS = {
    "finished": "✓", "going": "▶", "interrupted": "◼", "failed": "✗", "new": "○", DAMAGED: "⚠",
}  # fmt: skip
COLUMNS = (
    "state", "run", "data", "method", "adversary", "differs from preset", "seed", "result",
    "size", "age",
)  # fmt: skip
# Fields with a column of their own.
HIDDEN = {"preset", "seed", "dataset", "method", "adversary", "run"}


class Row(NamedTuple):
    state: str  # one of SIGNS
    texts: tuple[str | tuple[str, str], ...]  # of `cells`, up to the result
    error: str  # why it is not finished
    size: int  # bytes
    times: list[int]  # of the files that it is made from

    def html(self, run: Run) -> str:
        """The line as HTML; a failure's reason below."""
        line = cells([*self.texts, mebibytes(self.size), _age(run.last_start)], run.id)
        error = f'<div class="idaa-runs-error">{html.escape(self.error)}</div>'
        return line + error * bool(self.error)


def row_of(run: Run) -> Row:
    """The line of a run, whatever the state of its files."""
    size, times, name = run.size, file_times(run), (run.stage, run.id[-8:])
    try:
        config, look, method, adversary = run.config, process.look(run), "–", "–"
        hidden = HIDDEN | config.circumstances
        changed = {k: v for k, v in config.changed().items() if k not in hidden}
        if "beta" in changed:  # which says the same
            changed.pop("kappa", None)
        differs = [f"of {config.run[-8:]}"] if run.stage in results.JUDGING else []
        differs += [results.field_text(k, v, "=") for k, v in changed.items()]
        training = results.training_of(run)  # None: what it judged is gone
        if training and hasattr(training.config, "adversary"):
            method, adversary = results.title(training.config)
        state = "going" if look.word in process.UNDER_WAY else look.word
        progress = ""
        if state != "finished" and "steps" in look.state:
            progress = f"{look.state['step']:,} of {look.state['steps']:,}"
        texts = (
            (f"{SIGNS[state]} {look.word}", progress), name, Path(config.dataset or "–").name,
            method, adversary, ", ".join(differs), str(config.stated()["seed"]),
            results.headline(run),
        )  # fmt: skip
        return Row(state, texts, look.reason, size, times)
    except results.DAMAGE as error:
        damaged = (f"{SIGNS[DAMAGED]} {DAMAGED}", name, "", "", "", run.id, "", "")
        return Row(DAMAGED, damaged, str(error), size, times)


def file_times(run: Run) -> list[int]:
    """When the files that a row is made from changed."""
    times = []
    for name in ("config.json", "state.json", "process.json", "summary.json"):
        with contextlib.suppress(OSError):
            times.append((run.path / name).stat().st_mtime_ns)
    return times


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


def _age(began: float) -> str:
    """Time since then, in its largest unit."""
    seconds = time.time() - began
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "now"
