"""What an identity study found, in sentences and figures, from its `summary.json` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from idaa_lib.identity.scene import UNTRAINED
from idaa_lib.lab import pictures, style
from idaa_lib.lab.attacks import Point
from idaa_lib.lab.identity import LABELS, PARTS
from idaa_lib.lab.style import COLOURS, INK, NAMES, PALETTE
from idaa_lib.runs import Run

# --- in words -----------------------------------------------------------------------------------


def sentences(run: Run) -> dict[str, list[str]]:
    """What a finished study found on these images, in words, by section of the notebook.

    A difference counts where its 95 % interval over the images leaves out 0.
    """
    told = run.summary or {}
    return {
        "latent": _of_latent(told),
        "parts": _of_parts(told),
        "exchange": _of_exchange(told),
        "attacks": [*_of_attacks(told), _of_witness(told)],
        "vaes": _of_vaes(told),
    }


def _of_latent(told: dict[str, Any]) -> list[str]:
    latent, n, most = told["latent"], told["n"], told["log_n"]
    known = (
        f"A sampled z holds I(z; y) = {latent['information']:.2f} ± {latent['error']:.2f} of at "
        f"most log N = {most:.2f} nats on which of the N = {n} images it came from"
    )
    if latent["information"] > 0.99 * most:
        known += ": it names the image, so the bottleneck hides no identity at this N."
    else:
        known += f": the bottleneck hides {1 - latent['information'] / most:.0%} of the identity."
    return [f"{known} Its rate is {latent['rate']:.1f} nats.", latent["statement"]]


def _of_parts(told: dict[str, Any]) -> list[str]:
    parts, n = told["parts"], told["n"]
    found = ", ".join(f"{name} {parts[part]['retrieved']:.1f} %" for part, name in LABELS.items())
    said = [
        f"The witness finds x among {n} candidates from {found} (by chance: {100 / n:.1f} %). "
        + _claim("R", "G", told["R_minus_G"]["retrieved"], n, "the paper expects R > G"),
    ]
    probes = told["probes"]
    names = {"instance": f"which of {probes['instances']} images it is", "class": "the class"}
    for kind, what in names.items():
        if kind in probes:
            found = ", ".join(f"{part} {probes[kind][part][0]:.1f} %" for part in PARTS)
            count = n if kind == "class" else probes["instances"]
            said.append(
                f"Linear probes on pixels tell {what}: {found}. "
                + _claim("R", "G", probes[kind]["R_minus_G"], count, None)
            )
    return said


def _of_exchange(told: dict[str, Any]) -> list[str]:
    mean, low, high = told["exchange"]["follows_R"]
    who = "goes by R more than by G" if low > 50 else "goes by G more than by R"
    if low <= 50 <= high:
        who = f"goes by neither more than by the other, as far as {told['n']} pairs tell"
    return [
        f"Of G(a) + R(b) the witness sees b, whose R it is, rather than a in {mean:.1f} % of the "
        f"pairs [{low:.1f}, {high:.1f}]: it {who}."
    ]


def _of_attacks(told: dict[str, Any]) -> list[str]:
    said, pairs = [], []
    for row in told["equal"]:
        if row["adversary"] != "clae" or (same := row["at_equal_hardness"]) is None:
            continue
        pairs.append(same)
        mine, other = same["retrieved"]
        _, nats_low, nats_high = same["infonce_difference"]
        said.append(
            f"IDAA ε = {row['epsilon']:.3g} is as hard as CLAE ε = {row['matched']:.3g} (loss "
            f"{same['loss'][0]:.2f}, {same['loss'][1]:.2f} nats; x itself {told['loss_before']:.2f}"
            f"); x is found from {mine:.1f} and {other:.1f} % of the x′. "
            + _claim("IDAA", "CLAE", same["retrieved_difference"], told["n"], None)
            + f" InfoNCE: {same['infonce_difference'][0]:+.2f} nats "
            f"[{nats_low:+.2f}, {nats_high:+.2f}]."
        )
    said.append(_paper_s_claim(told, pairs))
    row = max((r for r in told["equal"] if r["adversary"] == "random_sign"), key=_epsilon)
    same = row["at_equal_epsilon"]
    said.append(
        f"Random signs of the same ε = {row['epsilon']:g} reach a loss of {same['loss'][1]:.2f} "
        f"nats, IDAA's {same['loss'][0]:.2f}; x is found from {same['retrieved'][1]:.1f} and "
        f"{same['retrieved'][0]:.1f} % of the x′."
    )
    return said


def _paper_s_claim(told: dict[str, Any], pairs: Sequence[dict[str, Any]]) -> str:
    """That IDAA keeps more identity than CLAE at equal hardness: does it hold here?"""
    rows = [row for row in told["equal"] if row["adversary"] == "clae"]
    soft = sum(row["at_equal_epsilon"]["loss"][0] <= told["loss_before"] for row in rows)
    apart = len(rows) - soft - len(pairs)
    why = [f"at {soft} IDAA does not make x harder"] if soft else []
    if apart:
        why += [f"at {apart} no ε of CLAE up to {max(map(_epsilon, rows)):g} is as hard as IDAA"]
    left_out = f" Of {len(rows)} radii {' and '.join(why)}." if why else ""
    if not pairs:
        return (
            f"Whether IDAA keeps more identity than CLAE at equal hardness cannot be seen here."
            f"{left_out}"
        )
    found = []
    for measure, key in (("retrieval@1", "retrieved"), ("InfoNCE", "infonce")):
        held = [_verdict(pair[f"{key}_difference"]) for pair in pairs]
        more, less = held.count("more"), held.count("less")
        verdict = "cannot be told"
        if more and less:
            verdict = "holds at some radii and fails at others"
        elif more or less:
            verdict = "holds where a difference is seen" if more else "does not hold"
        found.append(f"by {measure} it {verdict} ({more} of {len(pairs)} more, {less} less)")
    return (
        f"The paper's claim, that IDAA keeps more identity than CLAE at equal hardness, on these "
        f"{told['n']} images: {'; '.join(found)}.{left_out}"
    )


def _of_witness(told: dict[str, Any]) -> str:
    if told["witness"] == UNTRAINED:
        return (
            "The witness is an untrained encoder, as no other one is there: it sees colours and "
            "edges more than content. Train another (notebook 03, adversary = none) and run again."
        )
    taught = told["witness_adversary"]
    beware = ""
    if taught != "none":
        beware = (
            f" It was trained with {NAMES[taught]}, which taught it to see past such changes: one "
            f"with adversary = none is the fairer judge."
        )
    if told["witness_began_alike"]:
        beware += (
            " It began with the same weights as the attacked encoder (the same seed), so attacks "
            "may pass on to it more easily than to an independent one: one of another seed is "
            "fairer."
        )
    return (
        f"The witness is {told['witness']}; the intervals are over images, not over witnesses."
        f"{beware}"
    )


def _verdict(difference: Sequence[float]) -> str:
    _, low, high = difference
    return "more" if low > 0 else "less" if high < 0 else "alike"


def _claim(a: str, b: str, difference: Sequence[float], n: int, expected: str | None) -> str:
    """A paired difference a − b in points, and what it says."""
    mean, low, high = difference
    found = _verdict(difference)
    verdict = f"{a} and {b} cannot be told apart with {n} images"
    if found != "alike":
        verdict = f"{a} keeps {found} than {b}"
    if expected:
        verdict += f" ({expected}{'' if found == 'more' else ', which is not seen here'})"
    return f"{a} − {b}: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]: {verdict}."


def _epsilon(row: dict[str, Any]) -> float:
    return row["epsilon"]


def _of_vaes(told: dict[str, Any]) -> list[str]:
    """Which axes other VAEs of the same images cover, and how to make those that are missing."""
    said = []
    for axis, name, values in (("beta", "β", "0.04, 0.4, 4"), ("dim", "dim", "32, 128, 512")):
        if rows := told["vaes"].get(axis):
            values = ", ".join(f"{row['value']:.3g}" for row in rows)
            said.append(f"{name} = {values}: finished VAEs that differ in {name} alone.")
        else:
            said.append(
                f"No other finished VAE differs from this one in {name} alone: notebook "
                f"05_sensitivity trains some ({axis}s, such as {values}), or 01_pretrain_vae one "
                f"with another {axis}."
            )
    return said


# --- figures ------------------------------------------------------------------------------------


def information_figure(run: Run) -> Figure:
    """I(z; y) and its bounds from batches of K."""
    told = run.summary or {}
    latent = told["latent"]
    k, lower, upper = np.array(latent["batches"]).T
    figure, axis = style.axes(figsize=(7.6, 3.8))
    axis.plot(k, upper, marker="v", markersize=4, color=PALETTE[1], label="upper, leave-one-out")
    axis.axhline(latent["rate"], color=PALETTE[4], linestyle="-.", label="rate (upper)")
    axis.axhline(told["log_n"], color=INK, linestyle=":", label="log N")
    axis.axhline(latent["information"], color=PALETTE[0], label="I(z; y), exact aggregate")
    axis.plot(k, np.log(k), color=INK, linewidth=0.8, linestyle="--", label="log K")
    axis.plot(k, lower, marker="^", markersize=4, color=PALETTE[2], label="lower, batch of K")
    axis.set(xlabel="batch size K (images)", ylabel="I(z; y) (nats)", xscale="log")
    axis.set(title=f"Which of {told['n']} images is it? What a sampled z says")
    axis.set_yscale("symlog", linthresh=10, linscale=2)
    top = 1.3 * max(upper.max(), latent["rate"], 10)
    axis.set_ylim(0, top)
    marks = [0, *range(2, 11, 2), *(10**power for power in range(2, 7))]
    axis.set_yticks([y for y in marks if y < top], [f"{y:,}" for y in marks if y < top])
    axis.set_xticks(k, [f"{value:.0f}" for value in k])
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def parts_figure(run: Run) -> Figure:
    """x, G and R by the witness (percent, nats) and by linear probes (percent)."""
    told = run.summary or {}
    parts, probes, n = told["parts"], told["probes"], told["n"]
    kinds = [kind for kind in ("instance", "class") if kind in probes]
    figure, axes = style.axes(1, 2 + len(kinds), figsize=(2.7 * (2 + len(kinds)), 3.1))
    rows = [parts[part] for part in PARTS]
    _bars(axes[0], [(r["retrieved"], r["low"], r["high"]) for r in rows])
    axes[0].set(ylabel=f"x found among {n} (%)", title="Witness: retrieval@1")
    axes[0].set_ylim(0, min(100, 1.3 * max(row["high"] for row in rows)))
    axes[0].axhline(100 / n, color=INK, linewidth=0.8, linestyle=":")
    _bars(axes[1], [(r["infonce"], r["infonce_low"], r["infonce_high"]) for r in rows])
    look = dict(marker="D", s=26, color="white", edgecolors=INK, zorder=3, label="Fano")
    axes[1].scatter(PARTS, [r["fano"] for r in rows], **look)
    axes[1].axhline(told["log_n"], color=INK, linewidth=0.8, linestyle=":", label="log N")
    axes[1].set(ylabel="lower bound on I(v; y) (nats)", title="Witness: InfoNCE")
    axes[1].set_ylim(min(0, *(r["infonce_low"] for r in rows)), 1.25 * told["log_n"])
    axes[1].legend(fontsize="x-small", loc="upper right", ncols=2)
    for axis, kind in zip(axes[2:], kinds, strict=True):
        _bars(axis, [probes[kind][part] for part in PARTS])
        count = probes["instances"] if kind == "instance" else n
        title = f"Pixels: which of {count}?" if kind == "instance" else "Pixels: which class?"
        axis.set(ylabel="accuracy (%)", title=title, ylim=(0, 100))
    for axis in axes:
        axis.set(xlabel="linear probe on" if axis in axes[2:] else "seen by the witness")
        axis.grid(axis="x", visible=False)
    return figure


def exchange_figure(run: Run) -> Figure:
    """Mean likeness to a and to b as G, or R, goes over from a to b."""
    told = (run.summary or {})["exchange"]
    return pictures.likeness(
        told["shares"], {k: torch.tensor(v) for k, v in told["cosines"].items()}
    )


def curves_figure(run: Run) -> Figure:
    """Hardness and retrieval over ε, and retrieval over hardness."""
    return pictures.identity_curves(points(run))


def points(run: Run) -> dict[str, list[Point]]:
    """Adversary → its readings by ascending ε."""
    curves = (run.summary or {})["curves"]
    return {name: [Point(**row) for row in curve] for name, curve in curves.items()}


def equal_hardness_figure(run: Run) -> Figure:
    """IDAA less CLAE, and less random signs, at the same loss; label consistency over the loss."""
    told = run.summary or {}
    consistent = any(p.consistency is not None for curve in points(run).values() for p in curve)
    figure, axes = style.axes(1, 2 + consistent, figsize=(3.6 * (2 + consistent), 3.1))
    panels = zip(
        axes,
        ("retrieved_difference", "infonce_difference"),
        ("retrieval@1 (points)", "InfoNCE (nats)"),
        strict=False,
    )
    for axis, key, unit in panels:
        for shift, name, marker in ((0.94, "clae", "s"), (1.06, "random_sign", "^")):
            rows = [
                (row["epsilon"], *row["at_equal_hardness"][key])
                for row in told["equal"]
                if row["adversary"] == name and row["at_equal_hardness"]
            ]
            if rows:
                e, mean, low, high = np.array(rows).T
                spread = np.maximum(0, [mean - low, high - mean])
                look = dict(color=COLOURS[name], marker=marker, markersize=5, capsize=3)
                label = f"IDAA − {NAMES[name]}"
                axis.errorbar(shift * e, mean, yerr=spread, linestyle="", label=label, **look)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xscale="log", xlabel="ε of IDAA (units of z)", ylabel=f"difference in {unit}")
        epsilons = sorted({row["epsilon"] for row in told["equal"]})
        axis.set_xlim(epsilons[0] / 1.6, epsilons[-1] * 1.6)
        axis.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axis.minorticks_off()
    axes[0].set(title="Identity at equal hardness")
    axes[1].set(title="above 0: IDAA keeps more")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize="x-small")
    else:
        axes[0].text(0.5, 0.5, "no pair is equally hard", transform=axes[0].transAxes, ha="center")
    if consistent:
        for (name, curve), marker in zip(points(run).items(), "os^", strict=True):
            look = dict(color=COLOURS[name], marker=marker, markersize=3.5, label=NAMES[name])
            axes[2].plot([p.loss_after for p in curve], [p.consistency for p in curve], **look)
        axes[2].set(xlabel="loss at x′ (nats)", ylabel="same class as x (%)", ylim=(-5, 105))
        axes[2].set(title="Label consistency")
        axes[2].legend(fontsize="x-small")
    return figure


def candidates_figure(run: Run) -> Figure:
    """retrieval@1 over the number of candidates."""
    told = run.summary or {}
    k, figure = told["among"]["k"], None
    figure, axis = style.axes(figsize=(6.4, 3.6))
    for part, marker, colour in zip(PARTS, "xDv", (INK, PALETTE[4], PALETTE[3]), strict=True):
        label = LABELS[part]
        axis.plot(k, told["among"][part], marker=marker, markersize=4, color=colour, label=label)
    if attacked := told.get("among_attacked"):
        radii = {"idaa": attacked["epsilon"], "clae": attacked["matched"]}
        for (name, epsilon), marker in zip(radii.items(), "os", strict=True):
            label = f"{NAMES[name]} x′, ε = {epsilon:.2g}"
            look = dict(color=COLOURS[name], marker=marker, markersize=4, label=label)
            axis.plot(k, attacked[name], **look)
    axis.plot(k, [100 / i for i in k], color=INK, linewidth=0.8, linestyle=":", label="by chance")
    axis.set(xscale="log", xlabel="candidates", ylabel="x found (%)", ylim=(-5, 105))
    axis.set(title="Identity over the number of candidates")
    ticks = [i for i in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if i <= told["n"]]
    axis.set_xticks(ticks, [str(i) for i in ticks])
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def vaes_figure(run: Run) -> Figure | None:
    """Information, identity and hardness over β and over dim; None where there is one VAE alone."""
    told = run.summary or {}
    vaes, names = told["vaes"], {"beta": "β (nats KL per nat NLL)", "dim": "dim m"}
    drawn = [axis for axis in names if axis in vaes]
    if not drawn:
        return None
    figure = Figure(figsize=(10.4, 3.0 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), 3, squeeze=False)
    for (left, middle, right), axis in zip(grid, drawn, strict=True):
        rows, value = vaes[axis], [row["value"] for row in vaes[axis]]
        for key, label, marker, colour in (
            ("rate", "rate", "v", PALETTE[4]), ("information", "I(z; y)", "o", PALETTE[0]),
        ):  # fmt: skip
            line = [row["latent"][key] for row in rows]
            left.plot(value, line, marker=marker, markersize=4, color=colour, label=label)
        left.axhline(told["log_n"], color=INK, linewidth=0.8, linestyle=":", label="log N")
        left.set(ylabel="nats", title="Latent")
        left.set_yscale("symlog", linthresh=10)
        left.set_ylim(0, 1.6 * max(10, *(row["latent"]["rate"] for row in rows)))
        looks = {"G": ("D", PALETTE[4]), "R": ("v", PALETTE[3]), "idaa": ("o", COLOURS["idaa"])}
        for part, (marker, colour) in looks.items():
            kept = [row["kept"][part] for row in rows]
            mean, low, high = (np.array([r[k] for r in kept]) for k in ("retrieved", "low", "high"))
            label = LABELS.get(part, f"IDAA x′, ε = {vaes['epsilon']:g}")
            look = dict(marker=marker, markersize=4, color=colour, label=label, capsize=3)
            middle.errorbar(value, mean, yerr=np.maximum(0, [mean - low, high - mean]), **look)
        highest = max(row["kept"][part]["high"] for row in rows for part in looks)
        middle.set_ylim(0, min(105, 1.35 * highest))
        middle.set(ylabel=f"x found among {told['n']} (%)", title="Identity")
        loss = [row["loss"] for row in rows]
        right.plot(value, loss, marker="o", markersize=4, color=COLOURS["idaa"])
        right.axhline(told["loss_before"], color=INK, linewidth=0.8, linestyle=":")
        right.set(ylabel="loss at x′ (nats)", title=f"Hardness of ε = {vaes['epsilon']:g}")
        left.legend(fontsize="x-small")
        middle.legend(fontsize="x-small")
        for panel in (left, middle, right):
            panel.set(xscale="log", xlabel=names[axis])
            panel.set_xticks(value, [f"{v:g}" for v in value])
            panel.minorticks_off()
    return figure


def hardness_table(run: Run) -> pd.DataFrame:
    """Each adversary at each ε that was read: hardness and identity."""
    columns = {
        "epsilon": "ε", "loss_after": "loss (nats)", "cosine": "cos z, z′", "l2": "‖x′ − x‖₂",
        "linf": "‖x′ − x‖∞", "retrieved": "found (%)", "mrr": "MRR", "infonce": "InfoNCE (nats)",
        "fano": "Fano (nats)", "consistency": "same class (%)",
    }  # fmt: skip
    rows = [
        {"": NAMES[name], **{label: getattr(point, key) for key, label in columns.items()}}
        for name, curve in points(run).items()
        for point in curve
    ]
    return pd.DataFrame(rows).round(3)


def _bars(axis: Any, rows: Sequence[Sequence[float]]) -> None:
    """A bar for each of x, G and R with its interval."""
    mean, low, high = np.array(rows).T
    spread = np.maximum(0, [mean - low, high - mean])
    axis.bar(PARTS, mean, 0.62, yerr=spread, capsize=4, color=[INK, PALETTE[4], PALETTE[3]])
