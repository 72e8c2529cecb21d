"""What a study tells, claim by claim: a difference, its interval, and whether it can be told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

OTHERS = {"clae": "CLAE", "random_sign": "random sign"}
MEASURES = {"retrieved": ("retrieval@1", "points"), "infonce": ("InfoNCE", "nats")}


def verdicts(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with the keys section, claim, value, low, high, unit, n, verdict, note.

    verdict: `more` where the whole 95 % interval lies above what the claim compares with (0 unless
    it says otherwise), `less` where it lies below, else `cannot be told`; `left out` where there is
    nothing to compare, for the reason in note. note also says why the witness is no fair judge.

    Args:
        summary: of a finished study.
    """
    return [*_latent(summary), *_parts(summary), *_attacks(summary)]


def _row(
    section: str, claim: str, values: Sequence[float], unit: str, n: int,
    note: str = "", than: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    value, low, high = values
    verdict = "more" if low > than else "less" if high < than else "cannot be told"
    return dict(
        section=section, claim=claim, value=value, low=low, high=high, unit=unit, n=n,
        verdict=verdict, note=note,
    )  # fmt: skip


def _latent(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    latent, n, most = summary["latent"], summary["n"], summary["log_n"]
    nats, spread = latent["information"], 1.96 * latent["error"]
    claim = f"I(z; y) > 99 % of log N = {most:.2f}: a sampled z names the image"
    values = nats, nats - spread, nats + spread
    yield _row("latent", claim, values, "nats", n, f"rate {latent['rate']:.1f}", 0.99 * most)
    bound = -math.inf if latent["bound"] is None else latent["bound"]
    note = f"vacuous, and whatever β were at most log N − rate = {latent['limit']:,.1f}"
    note = note if bound <= 0 else "for a small enough δ; how small, the theorem does not say"
    yield _row("latent", "Theorem 3.5: its bound on I(x′; y) > 0", 3 * [bound], "nats", n, note)


def _parts(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    n, note, probes = summary["n"], "; ".join(summary["caveats"]), summary["probes"]
    for key, (measure, unit) in MEASURES.items():
        difference = summary["R_minus_G"][key]
        yield _row("parts", f"R keeps more than G: witness, {measure}", difference, unit, n, note)
    for kind, (count, what) in {
        "instance": (probes["instances"], f"which of {probes['instances']} images"),
        "class": (n, "which class"),
    }.items():
        if kind in probes:
            claim = f"R keeps more than G: linear probe on pixels, {what}"
            yield _row("parts", claim, probes[kind]["R_minus_G"], "points", count)
    claim = "G(a) + R(b) is taken for b, whose R it is, by more than half"
    yield _row("exchange", claim, summary["exchange"]["follows_R"], "%", n, note, 50)


def _attacks(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    n, note, start = summary["n"], "; ".join(summary["caveats"]), summary["loss_before"]
    largest = max(row["epsilon"] for row in summary["equal"])
    for at in ("hardness", "epsilon"):
        for row in sorted(summary["equal"], key=lambda row: row["adversary"]):
            name, epsilon = OTHERS[row["adversary"]], row["epsilon"]
            claim = f"IDAA ε = {epsilon:.3g} keeps more than {name}"
            if at == "epsilon":
                claim += " of equal ε"
            elif row["matched"]:
                claim += f" ε = {row['matched']:.3g}, equally hard"
            if (pair := row[f"at_equal_{at}"]) is None:
                soft = row["at_equal_epsilon"]["loss"][0] <= start
                why = f"no ε of {name} up to {largest:g} is as hard as IDAA"
                why = "IDAA does not make x harder" if soft else why
                values = 3 * [math.nan]
                left_out = _row("attacks", f"{claim} of equal hardness", values, "", n, why)
                yield left_out | {"verdict": "left out"}
                continue
            losses = "loss {:.2f}, {:.2f}".format(*pair["loss"])
            for key, (measure, unit) in MEASURES.items():
                text = "; ".join([losses, note] if note else [losses])
                yield _row("attacks", f"{claim}: {measure}", pair[key], unit, n, text)
