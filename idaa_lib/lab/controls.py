"""The explorer's controls: what each is called and is for, and ε as it is typed."""

from __future__ import annotations

import hashlib
import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import traitlets

from idaa_lib import runs
from idaa_lib.adversaries import IDAA
from idaa_lib.configs import ConfigError, DecomposeConfig
from idaa_lib.configs.reading import quote
from idaa_lib.data.decoding import decode
from idaa_lib.data.sources import NAMES as DATASETS
from idaa_lib.identity.networks import STARTER_NOTE, UNTRAINED
from idaa_lib.identity.scene import ADVERSARIES, Scene
from idaa_lib.lab.kernel import VisitorsText, query
from idaa_lib.lab.style import NAMES
from idaa_lib.results import full_name
from idaa_lib.runs.choice import list_starter

LOW, HIGH = 1e-3, 10.0  # of ε
STEP = 0.01  # of the slider, in log10 of ε

EQUAL_EPSILON, EQUAL_HARDNESS = "equal ε", "equal hardness"
FAIRNESS = {
    EQUAL_EPSILON: "each attack at the slider's ε",
    EQUAL_HARDNESS: "CLAE and random sign at the ε that makes them as hard as IDAA's",
}
# Fields of the configuration that have a control of their name.
FIELDS = ("vae", "run", "dataset", "only", "indices", "seed", "images", "steps", "norm")
SAVED = ("open saved …", "")  # what the menu of saved settings says, where none is open


# What each control is for, in a sentence that its tooltip shows.
TOOLTIPS = {
    "vae": "The VAE that splits x into G(x) and R(x), and whose latent IDAA attacks",
    "run": "The encoder whose loss the attack raises",
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


def control(name: str, kind: type[widgets.Widget], description: str = "", **options: Any) -> Any:
    """A widget of CSS class `idaa-<name>` with its tooltip; lab.css has its width."""
    if name in TOOLTIPS:
        options["tooltip"] = TOOLTIPS[name]
    widget = kind(description=description, **options) if description else kind(**options)
    return widget.add_class(f"idaa-{name}")


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


def folder() -> Path:
    """Where settings and images of the user's own are kept."""
    return runs.outputs_root() / "explorer"


def keep_image(file: Mapping[str, Any]) -> Path:
    """Where an uploaded file lies now, so that code can find it again.

    Raises:
        ConfigError: it is no image; nothing is kept.
    """
    content, suffix = bytes(file["content"]), Path(file["name"]).suffix
    path = folder() / "uploads" / (hashlib.sha256(content).hexdigest()[:12] + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        decode(path, 8)
    except OSError as error:
        path.unlink()
        raise ConfigError(f"{file['name']} cannot be read as an image ({error}).") from None
    return path


class Epsilon(widgets.HBox):
    """ε by a field that takes it exactly and a slider, whose place follows; a mark under the slider
    says where training has it.

    value: ε. complaint: why what stands in the field is no ε; empty where it is one.
    """

    value = traitlets.Float()
    complaint = traitlets.Unicode()

    def __init__(self, epsilon: float) -> None:
        tooltip, ends = TOOLTIPS["epsilon"], dict(min=math.log10(LOW), max=math.log10(HIGH))
        self.field = control("typed", widgets.Text, "ε", continuous_update=False, tooltip=tooltip)
        self.field.value = f"{epsilon:.15g}"
        self.slider = widgets.FloatLogSlider(epsilon, step=STEP, readout=False, **ends)
        self.slider.tooltip = tooltip
        self.mark = widgets.HTML()
        super().__init__([self.field, widgets.VBox([self.slider, self.mark])], value=epsilon)
        self.add_class("idaa-epsilon")
        self.field.observe(lambda change: self._type(change["new"]), "value")
        self.slider.observe(lambda change: self._slide(change["new"]), "value")

    def mark_trained(self, trained: float | None) -> float:
        """Put the mark at the ε of a training with IDAA, at IDAA's default where there was none;
        that ε."""
        epsilon = IDAA.Options().epsilon if trained is None else trained
        words = "IDAA's default" if trained is None else "in training"
        share = math.log(min(max(epsilon, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
        self.mark.value = (
            f'<span class="idaa-trained" style="left:calc(8px + {share:.4f} * (100% - 16px))">'
            f"▲ {epsilon:g} {words}</span>"
        )
        return epsilon

    def _type(self, text: str) -> None:
        try:
            epsilon = read_epsilon(text)
        except ConfigError as error:
            self.complaint = str(error)
        else:
            self.complaint, self.value = "", epsilon

    def _slide(self, place: float) -> None:
        # The page answers each new place with the step that is nearest: that is no move.
        if not self._near(place):
            self.value = float(f"{place:.3g}")  # what the field says

    @traitlets.observe("value")
    def _follow(self, _: Any) -> None:
        if self.complaint or read_epsilon(self.field.value) != self.value:
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
        self._for_visitors = query() is not None  # who name data sets and see no path
        self._datasets = {Path(name).name: name for name in (*DATASETS, config.dataset) if name}
        kind = VisitorsText if self._for_visitors else widgets.HTML
        self.status, self.problems, self.left_out = (
            control(name, kind) for name in ("status", "bad-status", "left-out")
        )
        self._complaints: dict[str, str] = {}  # control → what is wrong with what it holds
        menu, number, text = widgets.Dropdown, widgets.IntText, widgets.Text
        button, choice = widgets.Button, widgets.ToggleButtons
        late: dict[str, Any] = {"continuous_update": False}
        self.vae = control("vae", menu, "VAE")
        self.run = control("run", menu, "attacked")
        self.reset = control("reset", button, "Reset", icon="undo")
        self.pin = control("pin", widgets.ToggleButton, "Pin", icon="thumb-tack")
        self.keep = control("keep", button, "Save", icon="save")
        self.saved = control("saved", menu, options=[SAVED])
        self.dataset = control("dataset", widgets.Combobox, "images of", options=DATASETS, **late)
        self.dataset.placeholder = "VAE's own"
        self.only = control("only", menu, "class")
        self.indices = control("indices", text, "indices", placeholder="such as 3, 17", **late)
        self.seed, self.images, self.steps = (
            control(name, number, name) for name in ("seed", "images", "steps")
        )
        self.norm = control("norm", menu, "norm", options=[("ℓ∞", "linf"), ("ℓ2", "l2")])
        self.upload = control("upload", widgets.FileUpload, "your image", accept="image/*")
        self.forget = control("forget", button, "remove your image")
        self.epsilon = Epsilon(0.1)
        names = {NAMES[adversary]: adversary for adversary in ADVERSARIES}
        self.adversary = control("adversary", choice, options=[*names.items()])
        self.adversary.tooltips = [f"x′ by {name}" for name in names]
        self.fairness = control("fairness", choice, options=[*FAIRNESS])
        self.fairness.tooltips = [*FAIRNESS.values()]
        self.chosen = control("chosen", menu, "enlarge", options=[("no image", -1)])
        images = [getattr(self, name) for name in FIELDS[2:]]
        self.lines = [
            control("line", widgets.HBox, children=children)
            for children in (
                [self.vae, self.run, self.reset, self.pin, self.keep, self.saved],
                [*images, self.upload, self.forget],
                [self.epsilon, self.adversary, self.fairness, self.chosen],
            )
        ]
        self.put(config)

    def put(self, config: DecomposeConfig) -> None:
        """Controls hold what a configuration says."""
        for name in FIELDS:
            value, widget = getattr(config, name), getattr(self, name)
            if name == "indices":
                value = ", ".join(map(str, value))
            elif name in ("dataset", "only"):
                value = value or ""
            if name == "dataset" and self._for_visitors:
                value = Path(value).name
            if isinstance(widget, widgets.Dropdown) and value not in dict(widget.options).values():
                widget.options = [*widget.options, (str(value), value)]
            widget.value = value

    def fill(self, setting: Mapping[str, Any]) -> None:
        """Controls hold what a setting says (`Explorer.setting`); what it leaves out stays.

        Raises:
            ConfigError: a value cannot be; nothing was changed.
        """
        names = DecomposeConfig.model_fields.keys() - {"preset", "epsilon"}
        config = self.config.replace(**{k: v for k, v in setting.items() if k in names})
        choices = {"adversary": [*ADVERSARIES], "fairness": [*FAIRNESS]}
        values = {name: setting[name] for name in choices if name in setting}
        for name, value in values.items():
            if value not in choices[name]:
                wish = ", ".join(choices[name])
                raise ConfigError(f"{name} must be one of {wish}, and is {value!r}.")
        for name, value in values.items():
            getattr(self, name).value = value
        self.epsilon.field.value = str(setting.get("epsilon", self.epsilon.field.value))
        self.config = config
        self.put(config)

    def request(self) -> DecomposeConfig:
        """The configuration that the controls describe.

        Raises:
            ConfigError: indices that are no numbers, a data set that no visitor may name, …
        """
        fields = {name: getattr(self, name).value for name in FIELDS}
        fields |= {name: fields[name].strip() or None for name in ("dataset", "only")}
        if self._for_visitors and (name := fields["dataset"]):
            if name not in self._datasets:
                raise ConfigError(
                    f"dataset={quote(name)} is no data set of this page: take one of its list, or "
                    f"upload an image of your own."
                )
            fields["dataset"] = self._datasets[name]
        return DecomposeConfig(**dict(self.config) | fields)

    def list_saved(self) -> None:
        """The settings in `folder`, the latest first."""
        settings = sorted(folder().glob("*/setting.json"), reverse=True)
        self.saved.options = [SAVED, *((path.parent.name, path) for path in settings)]

    def list_choices(self, scene: Scene) -> None:
        """The choices that fit, with what is shown chosen."""
        left_out: list[str] = []
        vaes = [*runs.usable("vae", left_out), *list_starter("vae"), scene.run]
        size = scene.run.config.size
        encoders = runs.usable("ssl", left_out, size=size)
        encoders += [run for run in list_starter("ssl") if run.config.size == size]
        if self._for_visitors:
            sets = [run.config.dataset for run in (*vaes, *encoders)]
            self._datasets |= {Path(name).name: name for name in sets}
            self.dataset.options = [*self._datasets]
        notes = [STARTER_NOTE] * ("starter" in (scene.run.id, scene.attacked))
        lines = map(html.escape, [*notes, *runs.report_left_out(left_out)])
        self.left_out.value = "".join(f"<div>{line}</div>" for line in lines)
        names = {scene.attacked: scene.attacked} | {r.reference: full_name(r) for r in encoders}
        names |= {UNTRAINED: "a ResNet-18 before training"}
        classes = {"": "all classes"} | {name: name for name in scene.data.classes}
        for widget, choices, value in (
            (self.vae, {run.reference: full_name(run) for run in vaes}, scene.run.reference),
            (self.run, names, scene.attacked),
            (self.only, classes, scene.config.only or ""),
            (self.chosen, {-1: "no image"} | dict(enumerate(scene.names)), self.chosen.value),
        ):
            widget.options = [(name, key) for key, name in choices.items()]
            widget.value = value if value in choices else -1

    def complain(self, name: str, sentence: str = "") -> None:
        """Mark a control until what it holds is mended: until there is no sentence."""
        complaints = {key: text for key, text in self._complaints.items() if key != name}
        self._complaints = complaints | ({name: sentence} if sentence else {})
        act = "add_class" if sentence else "remove_class"
        getattr(getattr(self, name), act)("idaa-bad")
        lines = "<br>".join(html.escape(text) for text in self._complaints.values())
        self.problems.value = f'<span role="alert">{lines}</span>' if lines else ""
