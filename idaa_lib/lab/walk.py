"""What is identity? Steps through the latent with the residual fixed, and residuals exchanged.

x = G(x) + R(x) with G(x) = D(z): a walk changes z and keeps R; the reverse keeps G(x) and exchanges
R between two images. The witness, an encoder that nobody attacked, says whose image it then sees.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from torch import Tensor

from idaa_lib.lab import pictures
from idaa_lib.lab.background import Background
from idaa_lib.lab.engine import Engine
from idaa_lib.lab.grid import Grid
from idaa_lib.lab.style import save, svg
from idaa_lib.nets import evaluating

MOVED = ("D(z + step)", "R + D(z + step)")
SHARES = tuple(step / 8 for step in range(9))  # of the second image, from none to all


class Walk:
    """Walks from an engine's images. Units of a step: standard deviations of z over the images."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.scene = engine, engine.scene

    @cached_property
    def _latents(self) -> Tensor:
        """z (n, m) of all candidates; those of the attacked images come first."""
        with torch.no_grad(), evaluating(self.scene.vae):
            return torch.cat(
                [self.scene.vae.mean_latent(part) for part in self.engine.candidates.split(250)]
            )

    @cached_property
    def _principal(self) -> tuple[Tensor, Tensor]:
        """Principal directions of z (k, m) and the standard deviation along each (k,)."""
        z = self._latents.double()
        _, s, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        return directions.float(), (s / max(1, len(z) - 1) ** 0.5).float()

    @property
    def coordinates(self) -> int:
        return self._latents.shape[1]

    @property
    def directions(self) -> int:
        return len(self._principal[0])

    def step(self, kind: str, index: int) -> Tensor:
        """One standard deviation along a coordinate or a principal direction of z: (m,)."""
        if kind == "principal direction":
            directions, std = self._principal
            return std[index] * directions[index]
        step = torch.zeros(self.coordinates)
        step[index] = self._latents[:, index].std()
        return step

    @torch.no_grad()
    def moved(self, kind: str, index: int, amount: float) -> tuple[Tensor, Tensor]:
        """D(z + amount · step) and R + that, as pixels of the shown images."""
        shown, n = self.scene, self.engine.columns
        with evaluating(shown.vae):
            decoded = shown.vae.decode(self._latents[:n] + amount * self.step(kind, index))
        _, R = self._parts
        return shown.pixels(decoded), shown.pixels(R[:n] + decoded)

    @torch.no_grad()
    def between(self, a: int, b: int) -> dict[str, Tensor]:
        """From image a towards b (9, 3, size, size), normalised: z alone with R(a) fixed, and R
        alone with G(a) fixed; the last of each has exchanged that part in whole."""
        shown, (G, R) = self.scene, self._parts
        t = torch.tensor(SHARES)[:, None]
        z = (1 - t) * self._latents[a] + t * self._latents[b]
        with evaluating(shown.vae):
            decoded = shown.vae.decode(z)
        t = t[:, :, None, None]
        return {
            "R(a) + D(z: a → b)": R[a] + decoded,
            "G(a) + (R: a → b)": G[a] + (1 - t) * R[a] + t * R[b],
        }

    def likeness(self, images: Tensor, a: int, b: int) -> Tensor:
        """Cosine by the witness of each image to a and to b: (N, 2)."""
        return self.engine.recognise(images)[:, [a, b]]

    def save(
        self, folder: Path, kind: str, index: int, amount: float, a: int, b: int
    ) -> list[Path]:
        """Write the pictures of a step and of an exchange as labelled figures."""
        pairs = self.between(a, b)
        shares = [f"{share:.0%} b" for share in SHARES]
        moved = dict(zip(MOVED, self.moved(kind, index, amount), strict=True))
        figures = {
            "walk": pictures.image_rows(
                moved, f"{kind} {index}, {amount:+g} std", columns=self.engine.columns
            ),
            "exchange": pictures.image_rows(
                {name: self.scene.pixels(images) for name, images in pairs.items()},
                f"a = {self.scene.names[a]}, b = {self.scene.names[b]}",
                columns=len(SHARES),
                names=shares,
            ),
            "likeness": pictures.likeness(
                SHARES, {name: self.likeness(images, a, b) for name, images in pairs.items()}
            ),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
        return [folder / f"{name}.png" for name in figures]

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        G, R = self.scene.vae.decompose(self.scene.x)
        return G, R


class WalkPanel:
    """Sliders and pictures over a `Walk`; drawn when it is seen, in the given background."""

    def __init__(self, background: Background, guard: Any) -> None:
        self._background, self._guard = background, guard
        self.walk: Walk | None = None
        self.kind = widgets.ToggleButtons(
            options=["principal direction", "coordinate"], style={"button_width": "150px"}
        )
        self.index = widgets.BoundedIntText(0, 0, 0, description="which")
        self.amount = widgets.FloatSlider(
            0, min=-6, max=6, step=0.1, description="step (std)", layout={"width": "440px"}
        )
        self.moved = Grid(MOVED, "idaa-walk")
        self.a = widgets.BoundedIntText(0, 0, 0, description="image a")
        self.b = widgets.BoundedIntText(1, 0, 1, description="image b")
        self.between = Grid(["R(a), z moves", "G(a), R moves"], "idaa-between")
        self.likeness = widgets.HTML()
        for name in ("kind", "index", "amount", "a", "b", "likeness"):
            getattr(self, name).add_class(f"idaa-walk-{name}")
        self.amount.observe(guard(lambda _: self._move()), "value")
        self.kind.observe(guard(lambda _: self._rekind()), "value")
        self.index.observe(guard(lambda _: self._move()), "value")
        for control in (self.a, self.b):
            control.observe(guard(lambda _: self.draw()), "value")
        self.ui = widgets.VBox(
            [
                widgets.HBox([self.kind, self.index, self.amount]),
                self.moved,
                widgets.HBox([self.a, self.b]),
                self.between,
                self.likeness,
            ]
        )

    def open(self, engine: Engine) -> None:
        """Other images; nothing is computed before `draw`."""
        self.walk = Walk(engine)
        columns, size = engine.columns, engine.scene.x.shape[-1]
        self.moved.shape(columns, size, engine.scene.names)
        self.between.shape(len(SHARES), size, [f"{share:.0%} b" for share in SHARES])
        self.a.max = self.b.max = columns - 1

    @property
    def shown(self) -> tuple[str, int, float, int, int]:
        """What `Walk.save` needs to make these pictures again."""
        return (
            self.kind.value, self.index.value, self.amount.value, self.a.value, self.b.value
        )  # fmt: skip

    def draw(self) -> None:
        self._background.ask("aside", self._guard(self._draw))

    def _draw(self) -> None:
        if self.walk is None:
            return
        self._rekind()
        pairs = self.walk.between(self.a.value, self.b.value)
        pixels = self.walk.scene.pixels
        self.between.show(pixels(images) for images in pairs.values())
        like = {
            name: self.walk.likeness(images, self.a.value, self.b.value)
            for name, images in pairs.items()
        }
        self.likeness.value = svg(pictures.likeness(SHARES, like))

    def _rekind(self) -> None:
        assert self.walk is not None
        whole = self.kind.value == "coordinate"
        self.index.max = (self.walk.coordinates if whole else self.walk.directions) - 1
        self._move()

    def _move(self) -> None:
        if self.walk is None:
            return
        self._background.disturb()
        rows = self.walk.moved(self.kind.value, self.index.value, self.amount.value)
        self.moved.show(rows)
