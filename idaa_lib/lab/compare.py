"""What tells runs apart: the fields that differ, a short name for each, accuracies and curves."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from idaa_lib import runs
from idaa_lib.configs import SSLConfig
from idaa_lib.lab import plots
from idaa_lib.lab.plots import SUBJECTS
from idaa_lib.lab.style import NAMES, svg
from idaa_lib.methods import METHODS
from idaa_lib.runs import Run, RunError

CURVES = {
    "vae": ("loss", "reconstruction_val", "rate_nats_val"),
    "ssl": ("loss", "knn_top1_val", "effective_rank"),
    "semi": ("loss", "ema_top1_val", "believed", "pseudo_top1"),
    "detection": ("loss", "loss_classifier", "loss_mask"),
}


class Accuracies(NamedTuple):
    """Evaluations that may stand in one table: same test images, limit and protocols.

    rows: column → text, a row each; the reference rows last. evaluated: the run of each row, None
    for a reference.
    """

    title: str
    protocols: tuple[str, str]
    rows: list[dict[str, str]]
    evaluated: list[Run | None]


def differing(chosen: Sequence[Run]) -> dict[str, list[Any]]:
    """Field → its value in each run, for the fields that all have and that differ between them."""
    dumps = [run.config.model_dump() for run in chosen]
    shared = [name for name in (dumps[0] if dumps else ()) if all(name in dump for dump in dumps)]
    values = {name: [dump[name] for dump in dumps] for name in shared}
    return {name: row for name, row in values.items() if any(v != row[0] for v in row)}


def labels(chosen: Sequence[Run]) -> dict[str, Run]:
    """Short label → run, for runs of one stage: what they are, and what differs between them."""
    said = apart(chosen)
    return {
        text if said.count(text) == 1 else f"{text} ({run.id[-8:]})": run
        for text, run in zip(said, chosen, strict=True)
    }


def apart(chosen: Sequence[Run], told: frozenset[str] = frozenset()) -> list[str]:
    """What tells each run from the others, but for the fields that are `told` elsewhere."""
    names = [name_of(run) for run in chosen]
    said = list(names)
    # β says what κ says; the name has the method, the adversary, of a VAE dim; circumstances change
    # nothing.
    hidden = told | {"method", "adversary", "run", "kappa"}
    hidden |= chosen[0].config.circumstances if chosen else set()
    hidden |= {"dim"} if chosen and chosen[0].stage == "vae" else set()
    for field, values in differing(chosen).items():
        for i, value in enumerate(values):
            # Another adversary has another ε by itself: only within one does it tell runs apart.
            alike = {str(v) for v, name in zip(values, names, strict=True) if name == names[i]}
            silent = field in ("epsilon", "vae") and len(alike) == 1
            if not (silent or field in hidden or value is None):
                said[i] += f", {say(field, value)}"
    return said


def name_of(run: Run) -> str:
    """`SimCLR + IDAA`, `VAE, dim 128`; of an evaluation, what it judged."""
    if run.stage in ("eval", "transfer", "detection"):
        try:
            return name_of(judged(run))
        except RunError:  # the training was deleted: its id still tells
            return run.config.run
    config = run.config
    if run.stage == "vae":
        return f"VAE, dim {config.dim}"
    if run.stage == "theory":
        return f"identity of {config.images} images"
    method, adversary = method_of(config)
    return method if config.adversary == "none" else f"{method} + {adversary}"


def method_of(config: SSLConfig) -> tuple[str, str]:
    """Method and adversary by the names that people know them by."""
    made = METHODS.get(config.method)
    adversary = NAMES.get(config.adversary, config.adversary)
    return getattr(made, "__name__", config.method), adversary


def judged(run: Run) -> Run:
    """The training that an evaluation is of.

    Raises:
        RunError: it is gone.
    """
    return runs.encoder(run.config.run)


def accuracies(evaluations: Sequence[Run]) -> list[Accuracies]:
    """Finished evaluations in tables that mix neither images, nor limits, nor protocols."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in evaluations:
        told, data = run.summary, run.environment.get("dataset", {})
        if told and "knn_n" in told:
            same = (
                data.get("name", run.config.dataset), data.get("fingerprint"), run.config.limit,
                told["knn_n"], told["linear_n"], told["knn_protocol"], told["linear_protocol"],
            )  # fmt: skip
            groups.setdefault(same, []).append(run)
    return [_table(same, members) for same, members in groups.items()]


def _table(same: tuple[Any, ...], members: list[Run]) -> Accuracies:
    data, _, limit, n, n_linear, knn, linear = same
    told = frozenset({"seed", "epochs"})
    rows: list[tuple[dict[str, str], Run]] = []
    references: dict[tuple[str, ...], dict[str, str]] = {}
    for label, run in zip(judged_apart(members, told), members, strict=True):
        figures, (seed, epochs, images) = run.summary or {}, _training(run)
        about = {"seed": seed, "epochs": epochs, "training images": images}
        rows.append(({"": label, **_figures(figures, ""), **about}, run))
        for prefix, name in list(SUBJECTS.items())[1:]:
            if f"{prefix}knn_top1" in figures:
                row = {"": name, **_figures(figures, prefix)}
                row |= {"seed": seed} if prefix == "random_" else {}
                references.setdefault(tuple(row.values()), row)
    rows.sort(key=lambda pair: (pair[0][""], pair[0]["seed"]))
    last = sorted(references.values(), key=lambda row: list(SUBJECTS.values()).index(row[""]))
    tested = f"{n:,} test images" + (f" (linear: {n_linear:,})" if n != n_linear else "")
    bound = "" if limit is None else f", at most {limit:,} training images as neighbours"
    return Accuracies(
        f"{data}: {tested}{bound}",
        (knn, linear),
        [row for row, _ in rows] + last,
        [run for _, run in rows] + [None] * len(last),
    )


def judged_apart(evaluations: Sequence[Run], told: frozenset[str]) -> list[str]:
    """What tells the trainings apart that evaluations judge, but for what is `told` elsewhere."""
    sources: dict[Run, Run] = {}
    for run in evaluations:
        with contextlib.suppress(RunError):
            sources[run] = judged(run)
    unique = list(dict.fromkeys(sources.values()))
    said = dict(zip(unique, apart(unique, told), strict=True))
    return [said[sources[run]] if run in sources else name_of(run) for run in evaluations]


def _training(evaluation: Run) -> tuple[str, str, str]:
    """Seed, epochs and number of images of what was judged; – where it is gone."""
    try:
        run = judged(evaluation)
    except RunError:
        return "–", "–", "–"
    n = run.environment.get("dataset", {}).get("n")
    return str(run.config.seed), str(run.config.epochs), "–" if n is None else f"{n:,}"


def _figures(told: Mapping[str, Any], prefix: str) -> dict[str, str]:
    def text(key: str) -> str:
        return f"{told[f'{key}_top1']:.1f} [{told[f'{key}_low']:.1f}, {told[f'{key}_high']:.1f}]"

    return {"kNN (%)": text(f"{prefix}knn"), "linear (%)": text(f"{prefix}linear")}


# --- as HTML, nothing where there is nothing to compare -----------------------------------------


def judgements(trainings: Sequence[Run], evaluations: Sequence[Run]) -> str:
    """Accuracies of evaluations, those of these trainings included."""
    users = [run for training in trainings for run in training.users()]
    judging = [run for run in dict.fromkeys([*evaluations, *users]) if run.stage == "eval"]
    return "".join(
        f"<h4>{html.escape(group.title)}</h4>{table(group.rows)}"
        f"<p>Test top-1 with bootstrap 95 % intervals over images. kNN "
        f"{html.escape(group.protocols[0])}; linear {html.escape(group.protocols[1])}.</p>"
        for group in accuracies(judging)
    )


def differences(chosen: Sequence[Run]) -> str:
    """Each field that differs between runs of one stage, and its value in each run."""
    names = labels(chosen)
    rows = [
        {"field": field, **dict(zip(names, map(str, values), strict=True))}
        for field, values in differing(chosen).items()
    ]
    return f"<h4>What differs between the {chosen[0].stage} runs</h4>{table(rows)}" if rows else ""


def curves(chosen: Sequence[Run]) -> str:
    """Training curves of runs of one stage, overlaid."""
    keys = CURVES.get(chosen[0].stage, ()) if chosen else ()
    read = {key for run in chosen for line in run.metrics() for key in line}
    drawn = [key for key in keys if key in read]
    if not drawn:
        return ""
    plural = "s" * (len(chosen) > 1)
    figure = svg(plots.curves(labels(chosen), drawn))
    return f"<h4>Curves of the {chosen[0].stage} run{plural}</h4>{figure}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows (column → text) as an HTML table; everything in it is escaped."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    cells = [[html.escape(str(row.get(name, "–"))) for name in columns] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells)
    return f'<table class="idaa-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def say(field: str, value: Any, equals: str = " = ") -> str:
    """`ε = 0.3`: a field and its value, short."""
    symbol = {"epsilon": "ε", "beta": "β"}.get(field, field)
    if field in ("vae", "continue_from", "dataset"):  # of an id its hash, of a path its last part
        value = str(value).rsplit("/", 1)[-1].rsplit("-", 1)[-1]
    return f"{symbol}{equals}{value:g}" if isinstance(value, float) else f"{symbol}{equals}{value}"
