"""What the explorer says of identity: marks below images, meters, a sentence, a table to keep."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping

import pandas as pd

from idaa_lib import runs
from idaa_lib.evaluate.metrics import paired_difference
from idaa_lib.identity.scene import UNTRAINED, Reading
from idaa_lib.identity.stage import verdict
from idaa_lib.identity.theory import Retention
from idaa_lib.lab.engine import EPSILONS, Engine
from idaa_lib.lab.pictures import SAME
from idaa_lib.results import full_name

# Column → its text, of a reading's row.
METERS = {
    f"finds {SAME}, given x′": "{retrieved:.0f} % of {images} images, mean rank {rank:.1f} of {n}",
    "cosine to x · to the nearest other": "{own:.3f} · {nearest:.3f}",
    "‖x′ − x‖₂ · ‖x′ − x‖∞ (normalised)": "{l2:.2f} · {linf:.2f}",
    "loss at x → at x′ (nats)": "{loss_before:.3f} → {loss_after:.3f}",
}
TELLS = {
    "more": "IDAA keeps more identity.",
    "less": "IDAA keeps less identity.",
    "cannot be told": "{n} images cannot tell which keeps more.",
}


def marks(kept: Retention) -> list[tuple[str, str, str]]:
    """For `Grid.mark`: of each image, whether the witness finds x first, and its rank."""
    return [
        (f"{'✓' if rank == 1 else '✗'} {rank}", "idaa-kept" if rank == 1 else "idaa-lost",
         f"Given x′, the witness finds x at rank {rank} of {kept.n}")
        for rank in kept.ranks.tolist()
    ]  # fmt: skip


def meters(engine: Engine, readings: Mapping[str, Reading], note: str = "") -> str:
    """HTML: a line for each title → reading; then who judges, who is attacked, and a note."""
    head = "".join(f"<th>{name}</th>" for name in ("", *METERS))
    lines = ""
    for title, reading in readings.items():
        values = reading.row | {"images": len(reading.kept.ranks)}
        cells = "".join(f"<td>{text.format_map(values)}</td>" for text in METERS.values())
        lines += f"<tr><td><b>{html.escape(title)}</b> </td>{cells}</tr>"
    attacked = encoder_name(engine.scene.attacked)
    who = html.escape(f"judged by {judge(engine)} · attacked: {attacked}")
    return f'<table><tr>{head}</tr>{lines}</table><div class="idaa-quiet">{who}{note}</div>'


def judge(engine: Engine) -> str:
    name = engine.witness.name
    another = " of another seed" if name == UNTRAINED else ""
    return encoder_name(name) + another


@functools.cache
def encoder_name(name: str) -> str:
    """What a run, or `untrained`, is called in the notebooks; an id stays what it is."""
    return "an untrained ResNet-18" if name == UNTRAINED else full_name(runs.encoder(name))


def sentence(engine: Engine, epsilon: float) -> str:
    """Which of IDAA, with this ε, and CLAE keeps more identity at the same loss."""
    if not engine.complete:
        done, all_ = sum(map(len, engine.curves.values())), len(engine.curves) * len(EPSILONS)
        return f"IDAA and CLAE at the same loss: {done} of {all_} points over ε are read …"
    if (pair := engine.at_equal_loss(epsilon)) is None:
        if engine.as_hard("clae", epsilon) is None:
            return f"No ε of CLAE up to {EPSILONS[-1]:g} is as hard as IDAA with ε = {epsilon:.6g}."
        return f"IDAA with ε = {epsilon:.6g} does not make x harder: there is nothing to compare."
    idaa, clae = (reading.kept for reading in pair)
    own, other, n = idaa.hits.mean(), clae.hits.mean(), len(idaa.ranks)
    change = paired_difference(idaa.hits, clae.hits)
    text = (
        f"At a loss of {pair[0].row['loss_after']:.2f} nats IDAA (ε = {epsilon:.6g}) keeps "
        f"{own:.0f} % of {n} images, CLAE (ε = {pair[1].row['epsilon']:.3g}) {other:.0f} %: "
        f"{change.value:+.0f} points (95 %: {change.low:+.0f} … {change.high:+.0f}). "
        f"{TELLS[verdict(change)].format(n=n)}"
    )
    return text.replace("-", "−").replace("+0 ", "0 ")


def table(engine: Engine, readings: Mapping[str, Reading]) -> pd.DataFrame:
    """A row for each title → reading: what is kept with its interval, the loss, who judges."""
    return pd.DataFrame(
        {
            "attack": title,
            f"{SAME} found (%)": round(reading.row["retrieved"], 1),
            "95 %": f"{reading.row['low']:.1f} … {reading.row['high']:.1f}",
            "mean rank": round(reading.row["rank"], 2),
            "loss (nats)": round(reading.row["loss_after"], 3),
            "images": len(reading.kept.ranks),
            "among": reading.row["n"],
            "judged by": judge(engine),
            "attacked": encoder_name(engine.scene.attacked),
        }
        for title, reading in readings.items()
    )
