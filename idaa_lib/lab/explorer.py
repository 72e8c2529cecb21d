"""The ε explorer: drag ε, and watch x′ and its identity change at once (notebook 02).

Where another ε costs one decode, the picture is drawn in the slider's own callback, and moves that
arrive meanwhile collapse into the latest, as ipywidgets coalesces them. All else happens in the
background, most urgent first: other images or networks, attacks of several steps, the meters, the
curves over ε; each gives way to the next move.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import html
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import HTML, display

from idaa_lib import runs
from idaa_lib.configs import DecomposeConfig
from idaa_lib.data.sources import NAMES as DATASETS
from idaa_lib.identity.scene import ADVERSARIES, UNTRAINED
from idaa_lib.lab import pictures
from idaa_lib.lab.background import Background
from idaa_lib.lab.engine import STRIP, Engine, Meters
from idaa_lib.lab.grid import STYLE, Grid
from idaa_lib.lab.guard import guarded
from idaa_lib.lab.style import COLOURS, NAMES, svg
from idaa_lib.lab.walk import WalkPanel
from idaa_lib.runs import Run, RunError

EQUAL_EPSILON, EQUAL_HARDNESS = "equal ε", "equal hardness"
SPECTRA = 1  # the place of the spectra among what is folded away, after the strip
_OVER = """<style>
.idaa-over { position: relative; width: fit-content; margin-left: 20px }
.idaa-over .widget-html { margin: 0 }
.idaa-marker { position: absolute; inset: 0; pointer-events: none }
</style>"""


class Explorer:
    """Controls, pictures, meters and curves over an `Engine`; `show()` displays them.

    Args:
        config: VAE, attacked encoder, images, attack, and the ε at which the slider starts.
    """

    def __init__(self, config: DecomposeConfig) -> None:
        self.config = config
        self.engine: Engine | None = None  # None until a VAE was found
        self.status = widgets.HTML()
        self.status.add_class("idaa-status")
        self._guard = guarded(self.status)
        self._offering = 0  # the thread that sets choices now: those are no requests
        self._shown = (ADVERSARIES[0], config.epsilon)
        self._panels: tuple[Any, ...] = ()  # of the curves over ε: box in the figure, limits of ε
        self._background = Background("load", "paint", "meters", "aside", "curves")
        self._make_controls()
        self._make_displays()
        self._guard(self._load)()
        if self.engine is None:
            self.status.value += " Then run this cell again."
            self.ui.children = (self.status,)
        else:
            self._listen()

    # --- widgets ------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        config, wide = self.config, widgets.Layout(width="440px")
        narrow = widgets.Layout(width="215px")
        label = {"description_width": "80px"}
        self.epsilon = widgets.FloatLogSlider(
            value=config.epsilon, min=-3, max=1, step=0.02, description="ε", readout_format=".3g",
            layout=wide, style=label,
        )  # fmt: skip
        self.adversary = widgets.ToggleButtons(
            options=[(NAMES[a], a) for a in ADVERSARIES], style={"button_width": "104px"}
        )
        self.fairness = widgets.ToggleButtons(
            options=[EQUAL_EPSILON, EQUAL_HARDNESS], style={"button_width": "126px"},
            tooltips=["each attack at the slider's ε",
                      "CLAE and random sign at the ε that makes them as hard as IDAA's"],
        )  # fmt: skip
        self.vae = widgets.Dropdown(description="VAE", layout=wide, style=label)
        self.encoder = widgets.Dropdown(description="attacked", layout=wide, style=label)
        self.dataset = widgets.Combobox(
            value=config.dataset or "", placeholder="the VAE's own", options=DATASETS,
            description="images of", continuous_update=False, layout=narrow, style=label,
        )  # fmt: skip
        self.only = widgets.Dropdown(description="class", layout=narrow, style=label)
        self.indices = widgets.Text(
            value=", ".join(map(str, config.indices)), placeholder="such as 3, 17",
            description="indices", continuous_update=False, layout=narrow, style=label,
        )  # fmt: skip
        number = dict(layout=widgets.Layout(width="160px"), style=label, continuous_update=False)
        self.seed = widgets.BoundedIntText(config.seed, 0, 10**6, description="seed", **number)
        self.images = widgets.BoundedIntText(config.images, 2, 256, description="images", **number)
        self.steps = widgets.BoundedIntText(config.steps, 1, 100, description="steps", **number)
        self.norm = widgets.Dropdown(
            options=[("ℓ∞", "linf"), ("ℓ2", "l2")], value=config.norm, description="norm",
            layout=widgets.Layout(width="160px"), style=label,
        )  # fmt: skip
        self.upload = widgets.FileUpload(accept="image/*", description="your image")
        self.forget = widgets.Button(description="remove your image")
        self.keep = widgets.Button(description="Save", icon="save", tooltip="figures and code")
        for name in ("epsilon", "adversary", "fairness", "vae", "encoder", "dataset", "only",
                     "indices", "seed", "images", "steps", "norm", "upload", "forget",
                     "keep"):  # fmt: skip
            getattr(self, name).add_class(f"idaa-{name}")
        self.own = config.own

    def _make_displays(self) -> None:
        self.still = Grid(Engine.STILL, "idaa-still")
        self.picture = Grid(Engine.MOVING, "idaa-picture")
        self.meters = widgets.HTML()
        self.curves, self.marker = widgets.HTML(), widgets.HTML()
        self.strip = Grid([f"{NAMES[a]} x′" for a in ADVERSARIES], "idaa-strip")
        self.chosen = widgets.BoundedIntText(0, 0, 0, description="image")
        self.spectra = widgets.HTML()
        for name in ("meters", "curves", "marker", "spectra", "chosen"):
            getattr(self, name).add_class(f"idaa-{name}")
        self.walk = WalkPanel(self._background, self._guard)
        # The marker lies over the curves: moving it redraws nothing.
        over = widgets.Box([self.curves, self.marker], layout=widgets.Layout(overflow="visible"))
        over.add_class("idaa-over")
        self.asides = widgets.Accordion(
            [widgets.VBox([self.chosen, self.strip]), self.spectra, self.walk.ui],
            titles=("One image over ε", "Spectra", "Walk in the latent: what is identity?"),
            selected_index=None,
        )
        lines = (
            [self.vae, self.encoder],
            [self.dataset, self.only, self.indices, self.seed],
            [self.images, self.norm, self.steps, self.upload, self.forget, self.keep],
            [self.epsilon, self.adversary, self.fairness],
        )
        wrapped = widgets.Layout(flex_flow="row wrap")
        self.ui = widgets.VBox(
            [
                *(widgets.HBox(line, layout=wrapped) for line in lines),
                self.status,
                widgets.VBox([self.still, self.picture]),
                self.meters,
                over,
                self.asides,
            ]
        )
        self.ui.add_class("idaa-explorer")

    def _listen(self) -> None:
        """From now on controls act: what the first load set in them was no request."""
        redraw = self._guard(lambda _: self._draw())
        for control in (self.epsilon, self.adversary, self.fairness):
            control.observe(redraw, "value")
        for control in (self.vae, self.encoder, self.dataset, self.only, self.indices, self.seed,
                        self.images, self.steps, self.norm):  # fmt: skip
            control.observe(self._guard(lambda _: self._reload()), "value")
        self.upload.observe(self._guard(self._uploaded), "value")
        self.forget.on_click(self._guard(lambda _: self._take(None)))
        self.keep.on_click(self._guard(lambda _: self._save()))
        for control, trait in ((self.asides, "selected_index"), (self.chosen, "value")):
            control.observe(self._guard(lambda _: self._ask_aside()), trait)

    def show(self) -> None:
        display(HTML(STYLE + _OVER), self.ui)

    # --- other images, networks, attacks --------------------------------------------------------

    def _reload(self) -> None:
        if self._offering == threading.get_ident():
            return
        self.status.value = "recomputing …"
        self._background.disturb()
        self._background.ask("load", self._guard(self._load))

    def _wanted(self) -> DecomposeConfig:
        """What the controls ask for.

        Raises:
            ConfigError: indices that are no numbers, …
        """
        asked = dict(
            vae=self.vae.value, run=self.encoder.value, dataset=self.dataset.value.strip() or None,
            only=self.only.value or None, indices=self.indices.value, own=self.own,
            seed=self.seed.value, images=self.images.value, steps=self.steps.value,
            norm=self.norm.value,
        )  # fmt: skip
        return DecomposeConfig(**dict(self.config) | asked)

    def _load(self) -> None:
        """Another engine: the direction of its attack is computed once."""
        engine = Engine(self.config if self.engine is None else self._wanted())
        still = engine.still()
        engine.scene.direction("idaa")
        columns, size = engine.columns, engine.scene.x.shape[-1]
        self.engine = engine
        self._offer(engine)
        self.still.shape(columns, size, engine.scene.names)
        self.picture.shape(columns, size)
        self.strip.shape(len(STRIP), size, [f"ε = {e:.2g}" for e in STRIP])
        self.chosen.max = columns - 1
        self.forget.layout.display = None if self.own else "none"
        self.still.show(still)
        self.walk.open(engine)
        self.curves.value, self._panels = "<i>The curves over ε are being read …</i>", ()
        self._draw()
        self._ask_aside()
        self._background.ask("curves", self._guard(lambda: self._advance(engine)))

    def _offer(self, engine: Engine) -> None:
        """The choices that fit, with the engine's own chosen."""
        shown = engine.scene
        vaes = {run.reference: _vae_name(run) for run in (*runs.find("vae"), shown.run)}
        size = shown.run.config.size
        encoders = {run.reference: _ssl_name(run) for run in runs.find("ssl", size=size)}
        encoders |= {UNTRAINED: "a ResNet-18 before training"}
        classes = {"": "all classes"} | {name: name for name in shown.classes}
        self._offering = threading.get_ident()
        try:
            for control, choices, value in (
                (self.vae, vaes, shown.run.reference),
                (self.encoder, {shown.attacked: shown.attacked} | encoders, shown.attacked),
                (self.only, classes, shown.config.only or ""),
            ):
                control.options = [(name, key) for key, name in choices.items()]
                control.value = value
        finally:
            self._offering = 0

    def _uploaded(self, change: Any) -> None:
        """An image of the user's own becomes the first; kept, so that code can find it again."""
        (file,) = change["new"][:1] or [None]
        if file is None:
            return
        content = bytes(file["content"])
        name = hashlib.sha256(content).hexdigest()[:12] + Path(file["name"]).suffix
        folder = runs.outputs_root() / "explorer" / "uploads"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        self.upload.value = ()  # the same file may be given again
        self._take(str(folder / name))

    def _take(self, own: str | None) -> None:
        self.own = own
        self._reload()

    # --- a move -------------------------------------------------------------------------------

    def _draw(self) -> None:
        engine, adversary = self.engine, self.adversary.value
        if engine is None:
            return
        self._background.disturb()
        epsilon, told = self._strength(engine, adversary, self.epsilon.value)
        if epsilon is None:
            self.status.value = told
            return  # the last point of the curves draws
        self._shown = adversary, epsilon
        self.status.value = ""
        self._mark()

        def paint() -> None:
            with _few_threads(engine.scene.x.shape[-1]):
                self.picture.show(engine.moving(adversary, epsilon))
            self.status.value = ""

        def measure() -> None:
            measured = engine.meters(adversary, epsilon)
            if engine is self.engine:
                self.meters.value = table(measured, engine, adversary, told)

        if engine.scene.live(adversary):
            paint()
        else:
            self.status.value = f"attacking in {self.steps.value} steps …"
            self._background.ask("paint", self._guard(paint))
        self._background.ask("meters", self._guard(measure))
        if self.asides.selected_index == SPECTRA:
            self._ask_aside()

    def _strength(self, engine: Engine, adversary: str, asked: float) -> tuple[float | None, str]:
        """The ε to attack with, and how it is told; None while that is not known."""
        name = NAMES[adversary]
        if self.fairness.value == EQUAL_EPSILON or adversary == "idaa":
            return asked, f"{name}, ε = {asked:.3g}"
        if not engine.complete:
            return None, "reading how hard each attack is over ε …"
        epsilon = engine.as_hard(adversary, asked)
        if epsilon is not None:
            return epsilon, f"{name}, ε = {epsilon:.3g}: as hard as IDAA at {asked:.3g}"
        hardest = max(engine.curves[adversary], key=lambda point: point.loss_after).epsilon
        told = f"{name}, ε = {hardest:.3g}: its hardest, not as hard as IDAA at {asked:.3g}"
        return hardest, told

    def _mark(self) -> None:
        """A line at the present ε over the curves."""
        adversary, epsilon = self._shown
        lines = []
        for box, (low, high) in self._panels:
            share = (math.log(epsilon) - math.log(low)) / (math.log(high) - math.log(low))
            lines.append(
                f'<div style="position:absolute;left:{100 * (box.x0 + share * box.width):.2f}%;'
                f"bottom:{100 * box.y0:.2f}%;height:{100 * box.height:.2f}%;"
                f'border-left:2px solid {COLOURS[adversary]}"></div>'
            )
        self.marker.value = "".join(lines) if epsilon > 0 else ""

    def _advance(self, engine: Engine) -> bool:
        """One further point of the curves; drawn when they are coarse, finer, whole."""
        if engine is not self.engine:
            return False
        more = engine.advance()
        if not more or {len(curve) for curve in engine.curves.values()} in ({5}, {9}):
            figure = pictures.identity_curves(engine.curves)
            self.curves.value = svg(figure)
            self._panels = tuple((a.get_position(), a.get_xlim()) for a in figure.axes[:2])
            self._mark()
            # A page of Voilà's that connected while these were measured has missed them.
            self.meters.send_state("value")
        if not more and self.fairness.value != EQUAL_EPSILON:
            self._draw()
        return more

    def _ask_aside(self) -> None:
        """What is folded away costs nothing until it is opened."""
        engine, which = self.engine, self.asides.selected_index
        if engine is None or which is None:
            return

        def work() -> None:
            if which < SPECTRA:
                self.strip.show(engine.strip(self.chosen.value).values())
            elif which == SPECTRA:
                self.spectra.value = svg(pictures.spectra(engine.parts(*self._shown)))
            else:
                self.walk.draw()

        self._background.ask("aside", self._guard(work))

    # --- keeping ------------------------------------------------------------------------------

    def _save(self) -> None:
        """Figures, and the code that makes them again, in a folder of their own."""
        engine = self.engine
        if engine is None:
            raise RunError("There is nothing to save yet.")
        (adversary, epsilon), index = self._shown, self.chosen.value
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        folder = runs.outputs_root() / "explorer" / f"{now}-{adversary}-epsilon={epsilon:.3g}"

        def work() -> None:
            engine.save(folder, adversary, epsilon, index)
            code = engine.code(adversary, epsilon, index)
            if (walk := self.walk.walk) is not None and self.walk.moved.image.value:
                walk.save(folder, *self.walk.shown)
                given = ", ".join(map(repr, self.walk.shown))
                code += (
                    f"\nfrom idaa_lib.lab.walk import Walk\n\nWalk(engine).save(folder, {given})\n"
                )
            (folder / "again.py").write_text(code)
            self.status.value = f"Saved, with the code that makes it again: {folder}"

        self.status.value = "saving …"
        self._background.ask("aside", self._guard(work))


@contextlib.contextmanager
def _few_threads(size: int) -> Iterator[None]:
    """One thread for a decode of small images, which takes some 10 ms.

    A team of threads that slept, or shares its cores with the background's, is woken late: on 2
    cores the median of a move is the same with one thread, and its 95th percentile half.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if size <= 48 else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(measured: Meters, engine: Engine, adversary: str, told: str) -> str:
    """The meters as HTML, with who is attacked and who judges."""
    shown = engine.scene
    witness, _ = engine.witness
    nobody = adversary == "random_sign"
    rows = {
        "x′ still finds its x": f"{measured.retrieved:.0f} % of {len(shown.x)} images, mean rank "
        f"{measured.rank:.1f} of {measured.n} candidates",
        "cosine to its x · to the nearest other": f"{measured.cos_self:.3f} · "
        f"{measured.cos_other:.3f}",
        "‖x′ − x‖₂ · ‖x′ − x‖∞ (normalised)": f"{measured.l2:.2f} · {measured.linf:.2f}",
        "contrastive loss at x → at x′ (nats)": f"{measured.loss_before:.3f} → "
        f"{measured.loss_after:.3f}",
        "judged by": "an untrained ResNet-18 of another seed" if witness == UNTRAINED else witness,
        "attacked": "nobody" if nobody else shown.attacked,
    }
    cells = "".join(
        f'<tr><td style="padding-right:14px">{k}</td><td>{html.escape(v)}</td></tr>'
        for k, v in rows.items()
    )
    style = "margin:6px 0 0 112px;line-height:1.6"
    return f'<div style="{style}"><b>{html.escape(told)}</b><table>{cells}</table></div>'


def _vae_name(run: Run) -> str:
    c = run.config
    data = Path(c.dataset).name
    return f"β {c.beta:.3g}, κ {c.kappa:.3g}, dim {c.dim} · {data} · {run.id[-8:]}"


def _ssl_name(run: Run) -> str:
    c = run.config
    attack = "" if c.adversary == "none" else f" + {NAMES[c.adversary]} ε {c.epsilon:.3g}"
    return f"{c.method}{attack} · {Path(c.dataset).name} · {run.id[-8:]}"
