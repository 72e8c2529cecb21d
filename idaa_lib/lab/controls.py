"""The explorer's controls: what each is called, what it says of itself, and ε as it is typed."""

from __future__ import annotations

import html
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets as widgets
import traitlets

from idaa_lib import runs
from idaa_lib.configs import ConfigError, DecomposeConfig
from idaa_lib.data.sources import NAMES as DATASETS
from idaa_lib.identity.scene import ADVERSARIES, UNTRAINED, Scene
from idaa_lib.lab.style import NAMES
from idaa_lib.results import full_name

LOW, HIGH = 1e-3, 10.0  # of ε
STEP = 0.01  # of the slider, in log10 of ε

EQUAL_EPSILON, EQUAL_HARDNESS = "equal ε", "equal hardness"
FAIRNESS = {
    EQUAL_EPSILON: "each attack at the slider's ε",
    EQUAL_HARDNESS: "CLAE and random sign at the ε that makes them as hard as IDAA's",
}
# Controls whose values choose another engine.
RELOADING = ("vae", "encoder", "dataset", "only", "indices", "seed", "images", "steps", "norm")
# Controls that are named otherwise than their field of the configuration.
FIELDS = {"encoder": "run", "upload": "own"}

SAVED = ("open saved …", "")  # what the menu of saved settings says, where none is open

# What each control is for, in a sentence that its tooltip shows.
TOOLTIPS = {
    "vae": "The VAE that splits x into G(x) and R(x), and whose latent IDAA attacks",
    "encoder": "The encoder whose loss the attack raises",
    "dataset": "Where the images come from: a name, or the path of a folder or zip",
    "only": "Images of one class alone",
    "indices": "Numbers of images that come first, such as 3, 17",
    "seed": "Which images are drawn, and the random signs",
    "images": "How many images are attacked together, shown and judged: 2 to 256",
    "steps": "Steps of the attack; more than one is drawn a moment after each move",
    "norm": "In which norm δ is at most ε",
    "upload": "An image of your own becomes the first one",
    "forget": "Go on without your own image",
    "keep": "Save figures, the setting, and the code that makes them again",
    "pin": "Keep this picture and its figures, to see them beside the next setting",
    "reset": "Back to the setting at the start",
    "saved": "Open a setting that was saved",
    "epsilon": "The radius of the attack: 0.1, 0,1 or 8/255, from 0.001 to 10",
    "adversary": "Whose attack the picture shows",
    "fairness": "At which ε CLAE and random sign attack",
    "chosen": "The image that is enlarged, and shown over ε",
    "walk-kind": "Along which directions of the latent",
    "walk-index": "Which of them, the widest first",
    "walk-amount": "How far z goes, in standard deviations over the candidates",
    "walk-a": "The image whose R, then whose G, stays",
    "walk-b": "The image towards which the other part goes",
}


def control(
    name: str, kind: type[widgets.Widget], description: str = "", width: int = 0, **options: Any
) -> Any:
    """A widget of CSS class `idaa-<name>` with its tooltip; with a width (pixels), its label has a
    column."""
    if width:
        style = {"description_width": "64px" if width > 170 else "54px"}
        options |= {"layout": widgets.Layout(width=f"{width}px"), "style": style}
    if name in TOOLTIPS:
        options["tooltip"] = TOOLTIPS[name]
    widget = kind(description=description, **options) if description else kind(**options)
    widget.add_class(f"idaa-{name}")
    return widget


def read_epsilon(text: str) -> float:
    """ε as it is typed: 0.1, 0,1, 1e-2 or 8/255.

    Raises:
        ConfigError: it is no number, or out of range.
    """
    above, slash, below = "".join(text.split()).replace(",", ".").partition("/")
    try:
        epsilon = float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"ε must be a number, such as 0.1 or 8/255, and is {text!r}.") from None
    if not LOW <= epsilon <= HIGH:
        raise ConfigError(f"ε must be from {LOW:g} to {HIGH:g}, and is {text!r}.")
    return epsilon


class Epsilon(widgets.HBox):
    """ε by a field that takes it exactly and a slider, whose place follows; a mark under the slider
    says where training has it.

    value: ε. complaint: why what stands in the field is no ε; empty where it is one.
    """

    value = traitlets.Float()
    complaint = traitlets.Unicode()

    def __init__(self, epsilon: float) -> None:
        self.field = control("typed", widgets.Text, "ε", continuous_update=False)
        self.field.tooltip = TOOLTIPS["epsilon"]
        self.field.layout.width, self.field.style.description_width = "110px", "14px"
        limits = {"min": math.log10(LOW), "max": math.log10(HIGH), "value": epsilon}
        self.slider = widgets.FloatLogSlider(
            **limits, step=STEP, readout=False, tooltip=TOOLTIPS["epsilon"], layout={"width": "99%"}
        )
        self.mark = widgets.HTML()
        beside = widgets.VBox([self.slider, self.mark], layout={"width": "280px"})
        super().__init__([self.field, beside], value=epsilon)
        self.add_class("idaa-epsilon")
        self.field.observe(lambda change: self._type(change["new"]), "value")
        self.slider.observe(lambda change: self._slide(change["new"]), "value")

    def trained(self, epsilon: float) -> None:
        """Put the mark at training's ε."""
        share = math.log(min(max(epsilon, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
        self.mark.value = (
            f'<span class="idaa-trained" style="left:calc(8px + {share:.4f} * (100% - 16px))">'
            f"▲ {epsilon:g} in training</span>"
        )

    def _type(self, text: str) -> None:
        try:
            epsilon = read_epsilon(text)
        except ConfigError as error:
            self.complaint = str(error)
            return
        self.complaint, self.value = "", epsilon

    def _slide(self, place: float) -> None:
        # The page answers each new place with the step that is nearest: that is no move.
        if not self._near(place):
            self.value = float(f"{place:.3g}")  # what the field says

    @traitlets.observe("value")
    def _follow(self, _: Any) -> None:
        try:
            same = read_epsilon(self.field.value) == self.value
        except ConfigError:
            same = False
        if not same:
            self.field.value = f"{self.value:.15g}"
        if not self._near(self.slider.value):
            self.slider.value = self.value

    def _near(self, place: float) -> bool:
        return abs(math.log10(place / self.value)) < STEP / 2


class Controls:
    """All controls, which show a configuration (`put`) and make one (`request`).

    Args:
        config: what they show first.
    """

    def __init__(self, config: DecomposeConfig) -> None:
        self.config = config
        self.problems = control("bad-status", widgets.HTML)
        self.left_out = control("left-out", widgets.HTML)
        self._complaints: dict[str, str] = {}  # control → what is wrong with what it holds
        self._offering = 0  # the thread that sets choices now
        number, choice = widgets.IntText, widgets.Dropdown
        narrow, short, late = 180, 106, {"continuous_update": False}
        self.vae = control("vae", choice, "VAE", 360)
        self.encoder = control("encoder", choice, "attacked", 360)
        self.encoder.layout.flex, self.encoder.layout.max_width = "1 1 auto", "450px"
        self.dataset = control("dataset", widgets.Combobox, "images of", narrow, **late)
        self.dataset.options, self.dataset.placeholder = DATASETS, "VAE's own"
        self.only = control("only", choice, "class", narrow)
        self.indices = control("indices", widgets.Text, "indices", narrow, **late)
        self.indices.placeholder = "such as 3, 17"
        self.seed, self.images, self.steps = (
            control(name, number, name, short) for name in ("seed", "images", "steps")
        )
        self.norm = control("norm", choice, "norm", short, options=[("ℓ∞", "linf"), ("ℓ2", "l2")])
        self.upload = control("upload", widgets.FileUpload, "your image", accept="image/*")
        self.forget = control("forget", widgets.Button, "remove your image")
        act, small = widgets.Button, dict[str, Any](layout={"width": "76px"})
        self.reset = control("reset", act, "Reset", icon="undo", **small)
        self.pin = control("pin", widgets.ToggleButton, "Pin", icon="thumb-tack", **small)
        self.keep = control("keep", act, "Save", icon="save", **small)
        self.saved = control("saved", choice, options=[SAVED], layout={"width": "120px"})
        self.epsilon = Epsilon(0.1)
        names = [(NAMES[adversary], adversary) for adversary in ADVERSARIES]
        self.adversary = control("adversary", widgets.ToggleButtons, options=names)
        self.adversary.tooltips = [f"x′ by {name}" for name, _ in names]
        self.adversary.style.button_width = "104px"
        self.fairness = control("fairness", widgets.ToggleButtons, options=list(FAIRNESS))
        self.fairness.tooltips, self.fairness.style.button_width = list(FAIRNESS.values()), "126px"
        self.chosen = control("chosen", choice, "enlarge", 170, options=[("no image", -1)])
        self.put(config)

    @property
    def lines(self) -> list[widgets.HBox]:
        """The controls in lines, as they stand on the page."""
        lines = (
            [self.vae, self.encoder, self.reset, self.pin, self.keep, self.saved],
            [getattr(self, name) for name in (*RELOADING[2:], "upload", "forget")],
            [self.epsilon, self.adversary, self.fairness, self.chosen],
        )
        wrapped = widgets.Layout(flex_flow="row wrap")
        return [widgets.HBox(line, layout=wrapped) for line in lines]

    def put(self, config: DecomposeConfig) -> None:
        """Controls hold what a configuration says."""
        with self.offer():
            for name in RELOADING:
                value = getattr(config, FIELDS.get(name, name))
                widget = getattr(self, name)
                if name == "indices":
                    value = ", ".join(map(str, value))
                elif name in ("dataset", "only"):
                    value = value or ""
                menu = isinstance(widget, widgets.Dropdown)
                if menu and value not in dict(widget.options).values():
                    widget.options = [*widget.options, (str(value), value)]
                widget.value = value

    @property
    def offering(self) -> bool:
        """Whether a control changes because of `offer`: that is no request."""
        return self._offering == threading.get_ident()

    @contextmanager
    def offer(self) -> Iterator[None]:
        """What is set in controls meanwhile, by this thread, is no request."""
        self._offering = threading.get_ident()
        try:
            yield
        finally:
            self._offering = 0

    def request(self) -> DecomposeConfig:
        """The configuration that the controls describe.

        Raises:
            ConfigError: indices that are no numbers, …
        """
        fields = {name: getattr(self, name).value for name in RELOADING}
        fields |= {"run": fields.pop("encoder"), "only": self.only.value or None}
        fields["dataset"] = self.dataset.value.strip() or None
        return DecomposeConfig(**dict(self.config) | fields)

    def list_choices(self, scene: Scene) -> None:
        """The choices that fit, with what is shown chosen."""
        left_out: list[str] = []
        vaes = {r.reference: full_name(r) for r in (*runs.usable("vae", left_out), scene.run)}
        fits = runs.usable("ssl", left_out, size=scene.run.config.size)
        encoders = {scene.attacked: scene.attacked} | {r.reference: full_name(r) for r in fits}
        lines = map(html.escape, runs.report_left_out(left_out))
        self.left_out.value = "".join(f"<div>{line}</div>" for line in lines)
        encoders |= {UNTRAINED: "a ResNet-18 before training"}
        classes = {"": "all classes"} | {name: name for name in scene.data.classes}
        images = {-1: "no image"} | dict(enumerate(scene.names))
        chosen = self.chosen.value if self.chosen.value in images else -1
        with self.offer():
            for widget, choices, value in (
                (self.vae, vaes, scene.run.reference),
                (self.encoder, encoders, scene.attacked),
                (self.only, classes, scene.config.only or ""),
                (self.chosen, images, chosen),
            ):
                widget.options = [(name, key) for key, name in choices.items()]
                widget.value = value

    def complain(self, name: str, sentence: str = "") -> None:
        """Mark a control until what it holds is mended: until there is no sentence."""
        complaints = {key: text for key, text in self._complaints.items() if key != name}
        self._complaints = complaints | ({name: sentence} if sentence else {})
        act = "add_class" if sentence else "remove_class"
        getattr(getattr(self, name), act)("idaa-bad")
        lines = "<br>".join(html.escape(text) for text in self._complaints.values())
        self.problems.value = f'<span role="alert">{lines}</span>' if lines else ""
