"""What is said of identity: marks, meters and a sentence of the explorer; tables of a study."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pandas as pd

from idaa_lib import runs
from idaa_lib.evaluate.metrics import paired_difference
from idaa_lib.identity.networks import UNTRAINED
from idaa_lib.identity.scene import Reading
from idaa_lib.identity.stage import verdict
from idaa_lib.identity.theory import Retention
from idaa_lib.lab.engine import EPSILONS, Engine
from idaa_lib.lab.pictures import SAME
from idaa_lib.lab.style import NAMES
from idaa_lib.results import full_name

# Column → its text, of a reading's row.
METERS = {
    f"finds {SAME}, given x′": (
        "{retrieved:.0f} % of {images} images [{low:.0f}, {high:.0f}], mean rank {rank:.1f} of {n}"
    ),
    "cosine to x · to the nearest other": "{own:.3f} · {nearest:.3f}",
    "‖x′ − x‖₂ · ‖x′ − x‖∞ (normalised)": "{l2:.2f} · {linf:.2f}",
    "loss at x → at x′ (nats)": "{loss_before:.3f} → {loss_after:.3f}",
}
TELLS = {
    "more": "IDAA keeps more identity.",
    "less": "IDAA keeps less identity.",
    "cannot be told": "{n} images cannot tell which keeps more.",
}


def title(adversary: str, epsilon: float) -> str:
    return f"{NAMES[adversary]}, ε = {epsilon:.6g}"


def strength(engine: Engine, adversary: str, idaa: float, equal: bool) -> tuple[float, str]:
    """The ε to attack with where IDAA has ε = `idaa`, and a title; with `equal`, the one at which
    the attack is as hard as IDAA's, or else its hardest."""
    if not equal or adversary == "idaa":
        return idaa, title(adversary, idaa)
    if (epsilon := engine.as_hard(adversary, idaa)) is not None:
        return epsilon, f"{NAMES[adversary]}, ε = {epsilon:.3g}: as hard as IDAA at {idaa:.6g}"
    hardest = max(engine.curves[adversary], key=lambda row: row["loss_after"])["epsilon"]
    return hardest, f"{title(adversary, hardest)}: its hardest, not as hard as IDAA at {idaa:.6g}"


def marks(identity: Retention) -> list[tuple[str, str, str]]:
    """For `Grid.mark`: of each image, whether the witness finds x first, and its rank."""
    return [
        (f"{'✓' if rank == 1 else '✗'} {rank}", "idaa-kept" if rank == 1 else "idaa-lost",
         f"Given x′, the witness finds x at rank {rank} of {identity.n}")
        for rank in identity.ranks.tolist()
    ]  # fmt: skip


def meters(engine: Engine, readings: Mapping[str, Reading]) -> tuple[pd.DataFrame, str]:
    """A row of METERS for each title → reading, and the `note`."""
    rows = {}
    for title, reading in readings.items():
        values = reading.row | {"images": len(reading.identity.ranks)}
        rows[title] = [text.format_map(values) for text in METERS.values()]
    text = f"in [ ] 95 % intervals · {note(engine)}"
    return pd.DataFrame.from_dict(rows, "index", columns=[*METERS]), text


def note(engine: Engine) -> str:
    """Which encoder judges, which one is attacked, and which VAE splits x."""
    seed = " of another seed" if engine.witness.name == UNTRAINED else ""
    judge, attacked = map(_encoder_name, (engine.witness.name, engine.scene.attacked))
    return f"judged by {judge}{seed} · attacked: {attacked} · {_vae_name(engine.scene.run)}"


@functools.cache
def _encoder_name(name: str) -> str:
    """What a run, or `untrained`, is called in the notebooks; an id stays what it is."""
    return "an untrained ResNet-18" if name == UNTRAINED else full_name(runs.encoder(name))


# A run that is shown may be deleted meanwhile: its name stays.
_vae_name = functools.cache(full_name)


def sentence(engine: Engine, epsilon: float) -> str:
    """Which of IDAA, with this ε, and CLAE keeps more identity at the same loss."""
    if not engine.complete:
        count, all_ = sum(map(len, engine.curves.values())), len(engine.curves) * len(EPSILONS)
        return f"IDAA and CLAE at the same loss: {count} of {all_} points over ε are read …"
    if (pair := engine.at_equal_loss(epsilon)) is None:
        if engine.as_hard("clae", epsilon) is None:
            return f"No ε of CLAE up to {EPSILONS[-1]:g} is as hard as IDAA with ε = {epsilon:.6g}."
        return f"IDAA with ε = {epsilon:.6g} does not make x harder: there is nothing to compare."
    idaa, clae = (reading.identity for reading in pair)
    own, other, n = idaa.hits.mean(), clae.hits.mean(), len(idaa.ranks)
    change = paired_difference(idaa.hits, clae.hits)
    text = (
        f"At a loss of {pair[0].row['loss_after']:.2f} nats IDAA (ε = {epsilon:.6g}) keeps "
        f"{own:.0f} % of {n} images, CLAE (ε = {pair[1].row['epsilon']:.3g}) {other:.0f} %: "
        f"{change.value:+.0f} points (95 %: {change.low:+.0f} … {change.high:+.0f}). "
        f"{TELLS[verdict(change)].format(n=n)}"
    )
    return text.replace("-", "−").replace("+0 ", "0 ")


# --- tables of a study, from its summary ---------------------------------------------------------


def hardness_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Each adversary at each ε that was read: hardness and identity."""
    columns = {
        "epsilon": "ε", "loss_after": "loss (nats)", "cosine": "cos z, z′", "l2": "‖x′ − x‖₂",
        "linf": "‖x′ − x‖∞", "retrieved": "found (%)", "mrr": "MRR", "infonce": "InfoNCE (nats)",
        "fano": "Fano (nats)", "consistency": "same class (%)",
    }  # fmt: skip
    rows = [{"": NAMES[name], **row} for name, curve in summary["curves"].items() for row in curve]
    table = pd.DataFrame(rows)
    return table[["", *(key for key in columns if key in table)]].rename(columns=columns).round(3)


def verdict_table(summary: Mapping[str, Any], *sections: str) -> pd.DataFrame:
    """The claims of these sections (of all) with their verdicts."""
    rows = [row for row in summary["claims"] if not sections or row["section"] in sections]
    table = pd.DataFrame(rows)

    def write(x: float, unit: str) -> str:
        if pd.isna(x):
            return ""
        # Nats are often small: to two decimals all of a clear difference could be 0.
        return format(x, ".3g" if unit == "nats" and abs(x) < 1 else ",.2f")

    low, high, value = (
        [*map(write, table[name], table["unit"])] for name in ("low", "high", "value")
    )
    table["95 % interval"] = [f"{a} … {b}" if a else "" for a, b in zip(low, high, strict=True)]
    table["value"] = value
    return table[["claim", "value", "95 % interval", "unit", "n", "verdict", "note"]]


def attack_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """The claims of a study on attacks in short: IDAA less each other adversary with 95 % intervals
    and verdicts, a row for each measure, a column for each ε of IDAA."""
    units = {"hits": "retrieval@1 (points)", "gains": "InfoNCE (nats)"}
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in summary["claims"]:
        if row["section"] == "attacks":
            text = row["verdict"]
            if row["value"] is not None:
                # Nats are often small: to one decimal all of a clear difference would be 0.
                digits = "+z.1f" if row["by"] == "hits" else "+.2g"
                value, *ends = (format(row[key], digits) for key in ("value", "low", "high"))
                text = f"{value} [{', '.join(ends)}] {text}"
            for by in [row["by"]] if "by" in row else units:  # nowhere as hard: both are left out
                at = f"IDAA − {NAMES[row['adversary']]}", f"equal {row.get('at', 'ε')}", units[by]
                cells.setdefault(at, {})[f"ε = {row['epsilon']:g}"] = text
    return pd.DataFrame.from_dict(cells, "index").set_index(pd.MultiIndex.from_tuples(cells))
