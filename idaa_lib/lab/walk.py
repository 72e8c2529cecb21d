"""What is identity? Steps through the latent with the residual fixed, and residuals exchanged.

x = G(x) + R(x) with G(x) = D(z): a walk changes z and keeps R; the reverse keeps G(x) and exchanges
R between two images. The witness, an encoder that nobody attacked, says whose image it then sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from idaa_lib.lab import pictures
from idaa_lib.lab.background import Background
from idaa_lib.lab.controls import control
from idaa_lib.lab.engine import SHARE_NAMES, SHARES, STEPPED, Engine
from idaa_lib.lab.grid import Grid
from idaa_lib.lab.style import svg

KINDS = ("principal direction", "coordinate")


class WalkPanel:
    """Sliders and pictures of an engine's walks; drawn when it is seen, in the given background."""

    engine: Engine

    def __init__(self, background: Background, guard: Callable[..., Any]) -> None:
        self._background, self._guard = background, guard
        number = widgets.BoundedIntText
        self.kind = control("walk-kind", widgets.ToggleButtons, options=KINDS)
        self.index = control("walk-index", number, "which", max=0)
        limits: dict[str, Any] = {"min": -6, "max": 6, "step": 0.1}
        self.amount = control("walk-amount", widgets.FloatSlider, "step (std)", **limits)
        self.a = control("walk-a", number, "image a", max=1)
        self.b = control("walk-b", number, "image b", max=1, value=1)
        self.likeness = control("walk-likeness", widgets.HTML)
        for widget in (self.kind, self.index, self.amount):
            widget.observe(guard(lambda _: self._step()), "value")
        for widget in (self.a, self.b):
            widget.observe(guard(lambda _: self.draw()), "value")
        self.stepped = Grid(STEPPED, "idaa-walk")
        self.between = Grid(["R(a), z moves", "G(a), R moves"], "idaa-between")
        step, pair = [self.kind, self.index, self.amount], [self.a, self.b]
        rows = widgets.HBox(step), self.stepped, widgets.HBox(pair), self.between, self.likeness
        self.ui = widgets.VBox(rows)

    def open(self, engine: Engine) -> None:
        """Take other images; nothing is computed before `draw`."""
        self.engine = engine
        self.stepped.resize(engine.columns, engine.size, engine.scene.names)
        self.between.resize(len(SHARES), engine.size, SHARE_NAMES)
        self.a.max = self.b.max = engine.columns - 1

    @property
    def state(self) -> tuple[str, int, float, int, int] | None:
        """What `Engine.save` needs to make these pictures again; None before they are drawn."""
        controls = self.kind, self.index, self.amount, self.a, self.b
        picture = self.stepped.image.value
        return tuple(control.value for control in controls) if picture else None

    def draw(self) -> None:
        self._background.request("fold", self._guard(self._draw))

    def _draw(self) -> None:
        self._step()
        engine, a, b = self.engine, self.a.value, self.b.value
        pairs = engine.morph(a, b)
        self.between.show(engine.scene.pixels(images) for images in pairs.values())
        like = {name: engine.likeness(images, a, b) for name, images in pairs.items()}
        self.likeness.value = svg(pictures.likeness(SHARES, like))

    def _step(self) -> None:
        self._background.disturb()
        self.index.max = len(self.engine.steps[self.kind.value]) - 1
        rows = self.engine.step(self.kind.value, self.index.value, self.amount.value)
        self.stepped.show(rows.values())
