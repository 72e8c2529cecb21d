"""The ε explorer: drag ε, and watch x′ and its identity change at once (notebook 02).

Where another ε costs one decode, the picture is drawn in the slider's own callback, and moves that
arrive meanwhile collapse into the latest, as ipywidgets coalesces them. All else happens in the
background, most urgent first: other images or networks, attacks of several steps, the meters, what
is folded away, the curves over ε; each gives way to the next move.
"""

from __future__ import annotations

import datetime
import hashlib
import html
import math
import threading
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
from idaa_lib.lab.engine import MOVING, STILL, STRIP, STRIP_NAMES, Engine
from idaa_lib.lab.grid import STYLE, Grid
from idaa_lib.lab.kernel import guarded
from idaa_lib.lab.style import COLOURS, NAMES, svg
from idaa_lib.lab.walk import WalkPanel
from idaa_lib.results import full_name
from idaa_lib.runs import RunError

EQUAL_EPSILON, EQUAL_HARDNESS = "equal ε", "equal hardness"
FAIRNESS = {
    EQUAL_EPSILON: "each attack at the slider's ε",
    EQUAL_HARDNESS: "CLAE and random sign at the ε that makes them as hard as IDAA's",
}
FOLDS = ("One image over ε", "Spectra", "Walk in the latent: what is identity?")
METERS = {
    "x′ still finds its x": "{retrieved:.0f} % of {images} images, mean rank {rank:.1f} of {n} "
    "candidates",
    "cosine to its x · to the nearest other": "{own:.3f} · {nearest:.3f}",
    "‖x′ − x‖₂ · ‖x′ − x‖∞ (normalised)": "{l2:.2f} · {linf:.2f}",
    "contrastive loss at x → at x′ (nats)": "{loss_before:.3f} → {loss_after:.3f}",
    "judged by": "{witness}",
    "attacked": "{attacked}",
}
_OVER = """<style>
.idaa-over { position: relative; width: fit-content; margin-left: 20px }
.idaa-over .widget-html { margin: 0 }
.idaa-marker { position: absolute; inset: 0; pointer-events: none }
</style>"""


# Controls whose values choose another engine.
RELOADING = ("vae", "encoder", "dataset", "only", "indices", "seed", "images", "steps", "norm")


def _control(
    name: str, kind: type[widgets.Widget], description: str = "", width: int = 0, **options: Any
) -> Any:
    """A widget of CSS class `idaa-<name>`; with a width (pixels), its label has a column."""
    if width:
        style = {"description_width": "80px"}
        options |= {"layout": widgets.Layout(width=f"{width}px"), "style": style}
    control = kind(description=description, **options) if description else kind(**options)
    control.add_class(f"idaa-{name}")
    return control


class Explorer:
    """Controls, pictures, meters and curves over an `Engine`; `show()` displays them.

    Args:
        config: VAE, attacked encoder, images, attack, and the ε at which the slider starts.
    """

    def __init__(self, config: DecomposeConfig) -> None:
        self.config = config
        self.engine: Engine | None = None  # None until a VAE was found
        self.own = config.own
        self.status = _control("status", widgets.HTML)
        self.left_out = _control("left-out", widgets.HTML)
        self._guard = guarded(self.status)
        self._offering = 0  # the thread that sets choices now: those are no requests
        self._attack = (ADVERSARIES[0], config.epsilon)  # what the picture shows
        self._panels: tuple[Any, ...] = ()  # of the curves over ε: box in the figure, limits of ε
        self._background = Background("load", "paint", "meters", "fold", "curves")
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
        config, number, choice = self.config, widgets.BoundedIntText, widgets.Dropdown
        wide, narrow, short, late = 440, 215, 160, {"continuous_update": False}
        self.vae = _control("vae", choice, "VAE", wide)
        self.encoder = _control("encoder", choice, "attacked", wide)
        self.dataset = _control("dataset", widgets.Combobox, "images of", narrow, **late)
        self.dataset.options, self.dataset.placeholder = DATASETS, "the VAE's own"
        self.only = _control("only", choice, "class", narrow)
        self.indices = _control("indices", widgets.Text, "indices", narrow, **late)
        self.indices.placeholder = "such as 3, 17"
        self.seed = _control("seed", number, "seed", short, max=10**6)
        self.images = _control("images", number, "images", short, min=2, max=256)
        self.steps = _control("steps", number, "steps", short, min=1, max=100)
        self.norm = _control("norm", choice, "norm", short, options=[("ℓ∞", "linf"), ("ℓ2", "l2")])
        self.upload = _control("upload", widgets.FileUpload, "your image", accept="image/*")
        self.forget = _control("forget", widgets.Button, "remove your image")
        self.keep = _control("keep", widgets.Button, "Save", icon="save")
        self.keep.tooltip = "figures and code"
        self.epsilon = _control("epsilon", widgets.FloatLogSlider, "ε", wide, min=-3, max=1)
        self.epsilon.step, self.epsilon.readout_format = 0.02, ".3g"
        names = [(NAMES[adversary], adversary) for adversary in ADVERSARIES]
        self.adversary = _control("adversary", widgets.ToggleButtons, options=names)
        self.adversary.style.button_width = "104px"
        self.fairness = _control("fairness", widgets.ToggleButtons, options=list(FAIRNESS))
        self.fairness.tooltips, self.fairness.style.button_width = list(FAIRNESS.values()), "126px"
        self.index = _control("chosen", number, "image", max=0)
        for name in ("seed", "images", "steps", "norm", "epsilon"):
            getattr(self, name).value = getattr(config, name)
        self.dataset.value = config.dataset or ""
        self.indices.value = ", ".join(map(str, config.indices))

    def _make_displays(self) -> None:
        self.still, self.picture = Grid(STILL, "idaa-still"), Grid(MOVING, "idaa-picture")
        self.strip = Grid([f"{NAMES[a]} x′" for a in ADVERSARIES], "idaa-strip")
        self.meters, self.curves, self.marker, self.spectra = (
            _control(name, widgets.HTML) for name in ("meters", "curves", "marker", "spectra")
        )
        self.walk = WalkPanel(self._background, self._guard)
        # The marker lies over the curves: moving it redraws nothing.
        over = widgets.Box([self.curves, self.marker], layout=widgets.Layout(overflow="visible"))
        over.add_class("idaa-over")
        folded = widgets.VBox([self.index, self.strip]), self.spectra, self.walk.ui
        self.folds = widgets.Accordion(folded, titles=FOLDS, selected_index=None)
        lines = (
            [self.vae, self.encoder],
            [self.dataset, self.only, self.indices, self.seed],
            [self.images, self.norm, self.steps, self.upload, self.forget, self.keep],
            [self.epsilon, self.adversary, self.fairness],
        )
        wrapped = widgets.Layout(flex_flow="row wrap")
        controls = [widgets.HBox(line, layout=wrapped) for line in lines]
        displays = self.status, self.still, self.picture, self.meters, over, self.folds
        self.ui = _control("explorer", widgets.VBox, children=[*controls, *displays, self.left_out])

    def _listen(self) -> None:
        """From now on controls act: what the first load set in them was no request."""
        reloading = [getattr(self, name) for name in RELOADING]
        for controls, trait, act in (
            ((self.epsilon, self.adversary, self.fairness), "value", lambda _: self._draw()),
            (reloading, "value", lambda _: self._reload()),
            ((self.upload,), "value", self._upload),
            ((self.folds,), "selected_index", lambda _: self._unfold()),
            ((self.index,), "value", lambda _: self._unfold()),
        ):
            for control in controls:
                control.observe(self._guard(act), trait)
        self.forget.on_click(self._guard(lambda _: self._take(None)))
        self.keep.on_click(self._guard(lambda _: self._save()))

    def show(self) -> None:
        display(HTML(STYLE + _OVER), self.ui)

    # --- other images, networks, attacks --------------------------------------------------------

    def _reload(self) -> None:
        if self._offering == threading.get_ident():
            return
        self.status.value = "recomputing …"
        self._background.disturb()
        self._background.request("load", self._guard(self._load))

    def _request(self) -> DecomposeConfig:
        """The configuration that the controls describe.

        Raises:
            ConfigError: indices that are no numbers, …
        """
        fields = {name: getattr(self, name).value for name in RELOADING}
        fields |= {"run": fields.pop("encoder"), "own": self.own, "only": self.only.value or None}
        fields["dataset"] = self.dataset.value.strip() or None
        return DecomposeConfig(**dict(self.config) | fields)

    def _load(self) -> None:
        """Another engine: the direction of its attack is computed once."""
        engine = Engine(self.config if self.engine is None else self._request())
        still = engine.still()
        engine.scene.directions("idaa")
        columns, size = engine.columns, engine.scene.x.shape[-1]
        self.engine = engine
        self._offer(engine)
        self.still.resize(columns, size, engine.scene.names)
        self.picture.resize(columns, size)
        self.strip.resize(len(STRIP), size, STRIP_NAMES)
        self.index.max = columns - 1
        self.forget.layout.display = None if self.own else "none"
        self.still.show(still.values())
        self.walk.open(engine)
        self.curves.value, self._panels = "<i>The curves over ε are being read …</i>", ()
        self._draw()
        self._unfold()
        self._background.request("curves", self._guard(lambda: self._advance(engine)))

    def _offer(self, engine: Engine) -> None:
        """The choices that fit, with the engine's own chosen."""
        scene = engine.scene
        left_out: list[str] = []
        vaes = {r.reference: full_name(r) for r in (*runs.usable("vae", left_out), scene.run)}
        fits = runs.usable("ssl", left_out, size=scene.run.config.size)
        encoders = {scene.attacked: scene.attacked} | {r.reference: full_name(r) for r in fits}
        self.left_out.value = "".join(
            f"<div>{html.escape(line)}</div>" for line in runs.report_left_out(left_out)
        )
        encoders |= {UNTRAINED: "a ResNet-18 before training"}
        classes = {"": "all classes"} | {name: name for name in scene.classes}
        self._offering = threading.get_ident()
        try:
            for control, choices, value in (
                (self.vae, vaes, scene.run.reference),
                (self.encoder, encoders, scene.attacked),
                (self.only, classes, scene.config.only or ""),
            ):
                control.options = [(name, key) for key, name in choices.items()]
                control.value = value
        finally:
            self._offering = 0

    def _upload(self, change: Any) -> None:
        """An image of the user's own becomes the first; kept, so that code can find it again."""
        if not change["new"]:
            return
        file = change["new"][0]
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
        if (engine := self.engine) is None:
            return
        adversary = self.adversary.value
        self._background.disturb()
        epsilon, title = self._strength(engine, adversary, self.epsilon.value)
        if epsilon is None:
            self.status.value = title
            return  # the last point of the curves draws
        self._attack = adversary, epsilon
        self.status.value = ""
        self._mark()

        def paint() -> None:
            # A decode of small images takes some 10 ms. A team of threads that slept, or shares its
            # cores with the background's, is woken late: on 2 cores the median of a move is the
            # same with one thread, and its 95th percentile half.
            threads = torch.get_num_threads()
            torch.set_num_threads(1 if engine.scene.x.shape[-1] <= 48 else threads)
            try:
                self.picture.show(engine.moving(adversary, epsilon).values())
            finally:
                torch.set_num_threads(threads)
            self.status.value = ""

        def measure() -> None:
            row = engine.meters(adversary, epsilon)
            if engine is self.engine:
                self.meters.value = table(row, engine, adversary, title)

        if engine.scene.live(adversary):
            paint()
        else:
            self.status.value = f"attacking in {self.steps.value} steps …"
            self._background.request("paint", self._guard(paint))
        self._background.request("meters", self._guard(measure))
        if self.folds.selected_index == 1:  # the spectra
            self._unfold()

    def _strength(self, engine: Engine, adversary: str, idaa: float) -> tuple[float | None, str]:
        """The ε to attack with where IDAA has ε = `idaa`, and a title; None: it is not read yet."""
        name = NAMES[adversary]
        if self.fairness.value == EQUAL_EPSILON or adversary == "idaa":
            return idaa, f"{name}, ε = {idaa:.3g}"
        if not engine.complete:
            return None, "reading how hard each attack is over ε …"
        if (epsilon := engine.as_hard(adversary, idaa)) is not None:
            return epsilon, f"{name}, ε = {epsilon:.3g}: as hard as IDAA at {idaa:.3g}"
        hardest = max(engine.curves[adversary], key=lambda row: row["loss_after"])["epsilon"]
        return hardest, f"{name}, ε = {hardest:.3g}: its hardest, not as hard as IDAA at {idaa:.3g}"

    def _mark(self) -> None:
        """Draw a line at the present ε over the curves."""
        adversary, epsilon = self._attack
        lines = []
        for box, (low, high) in self._panels if epsilon > 0 else ():
            share = math.log(epsilon / low) / math.log(high / low)
            lines.append(
                f'<div style="position:absolute;left:{100 * (box.x0 + share * box.width):.2f}%;'
                f"bottom:{100 * box.y0:.2f}%;height:{100 * box.height:.2f}%;"
                f'border-left:2px solid {COLOURS[adversary]}"></div>'
            )
        self.marker.value = "".join(lines)

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

    def _unfold(self) -> None:
        """Draw what is open below; what is folded away costs nothing."""
        engine, fold = self.engine, self.folds.selected_index
        if engine is None or fold is None:
            return

        def work() -> None:
            if fold == 0:
                self.strip.show(engine.strip(self.index.value).values())
            elif fold == 1:
                self.spectra.value = svg(pictures.spectra(engine.parts(*self._attack)))
            else:
                self.walk.draw()

        self._background.request("fold", self._guard(work))

    def _save(self) -> None:
        """Figures, and the code that makes them again, in a folder of their own."""
        if (engine := self.engine) is None:
            raise RunError("There is nothing to save yet.")
        (adversary, epsilon), index, walk = self._attack, self.index.value, self.walk.state
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        folder = runs.outputs_root() / "explorer" / f"{now}-{adversary}-epsilon={epsilon:.3g}"

        def work() -> None:
            engine.save(folder, adversary, epsilon, index, walk)
            self.status.value = f"Saved, with the code that makes it again: {folder}"

        self.status.value = "saving …"
        self._background.request("fold", self._guard(work))


def table(row: dict[str, float], engine: Engine, adversary: str, title: str) -> str:
    """The meters as HTML, with who is attacked and who judges."""
    judge = engine.witness.name
    values = row | {
        "images": len(engine.scene.x),
        "witness": "an untrained ResNet-18 of another seed" if judge == UNTRAINED else judge,
        "attacked": "nobody" if adversary == "random_sign" else engine.scene.attacked,
    }
    cells = "".join(
        f'<tr><td style="padding-right:14px">{name}</td>'
        f"<td>{html.escape(text.format_map(values))}</td></tr>"
        for name, text in METERS.items()
    )
    style = "margin:6px 0 0 112px;line-height:1.6"
    return f'<div style="{style}"><b>{html.escape(title)}</b><table>{cells}</table></div>'
