"""The ε explorer: drag ε, and watch x′ and its identity change at once (notebook 02).

The picture is drawn in the slider's own callback; moves that arrive meanwhile collapse into the
latest, as ipywidgets coalesces them. Meters follow in a thread; the next move cancels them.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML, display

from idaa_lib.configs import DecomposeConfig, UserError
from idaa_lib.lab.engine import ADVERSARIES, Engine, Meters

NAMES = {"idaa": "IDAA", "clae": "CLAE", "random_sign": "random sign"}
SCALE = 2  # screen pixels a pixel of the grid
# Pixels as they are: the browser neither smooths nor stretches them.
STYLE = "<style>.idaa-picture { image-rendering: pixelated; }</style>"


class Explorer:
    """Controls, picture and meters over an `Engine`; `show()` displays them.

    Args:
        config: VAE, attacked encoder, images, norm, and the ε at which the slider starts; `seed`
            chooses the images.
    """

    def __init__(self, config: DecomposeConfig) -> None:
        self.config = config
        self.engine: Engine | None = None  # None until a VAE was found
        self._move = 0  # counts moves: meters of an older one are dropped
        wide = widgets.Layout(width="430px")
        self.epsilon = widgets.FloatLogSlider(
            value=config.epsilon, min=-3, max=1, step=0.02, description="ε", layout=wide,
            readout_format=".3g",
        )  # fmt: skip
        self.adversary = widgets.ToggleButtons(
            options=[(NAMES[a], a) for a in ADVERSARIES], style={"button_width": "110px"}
        )
        self.seed = widgets.BoundedIntText(
            value=config.seed, min=0, max=10**6, description="image seed"
        )
        self.picture = widgets.Image(format="png")
        self.labels = widgets.HTML()
        self.meters = widgets.HTML()
        self.status = widgets.HTML()
        for name in ("epsilon", "adversary", "seed", "picture", "meters", "status"):
            getattr(self, name).add_class(f"idaa-{name}")
        self.epsilon.observe(self._guarded(self._draw), "value")
        self.adversary.observe(self._guarded(self._draw), "value")
        self.seed.observe(self._guarded(self._load), "value")
        self.ui = widgets.VBox(
            [
                widgets.HBox([self.epsilon, self.adversary]),
                self.seed,
                widgets.HBox([self.labels, self.picture, self.meters]),
                self.status,
            ]
        )
        self._guarded(self._load)(None)

    def show(self) -> None:
        display(HTML(STYLE), self.ui)

    def _load(self, _: Any) -> None:
        """Other images: another direction, computed once."""
        self.status.value = "computing the attack's direction …"
        self.engine = Engine(self.config.model_copy(update={"seed": self.seed.value}))
        n, side = self.engine.scene.x.shape[0], self.engine.scene.x.shape[-1] + 1
        rows = self.engine.rows()
        self.picture.layout = widgets.Layout(
            width=f"{SCALE * n * side}px", min_width=f"{SCALE * n * side}px",
            height=f"{SCALE * len(rows) * side}px", align_self="flex-start",
        )  # fmt: skip
        line = (
            f'<div style="height:{SCALE * side}px;line-height:{SCALE * side}px;'
            f'padding-right:8px;white-space:nowrap;text-align:right">'
        )
        self.labels.value = "".join(f"{line}{row}</div>" for row in rows)
        self.status.value = ""
        self._draw(None)

    def _draw(self, _: Any) -> None:
        if self.engine is None:
            return
        asked = self.adversary.value, self.epsilon.value
        self.picture.value = self.engine.picture(*asked)
        self._move += 1
        arguments = (self._move, self.engine, *asked)
        threading.Thread(target=self._measure, args=arguments, daemon=True).start()

    def _measure(self, move: int, engine: Engine, adversary: str, epsilon: float) -> None:
        # A short rest, so that a slider on the move costs no encoder at all.
        threading.Event().wait(0.08)
        if move != self._move:
            return
        measured = self._guarded(lambda _: engine.meters(adversary, epsilon))(None)
        if measured is not None and move == self._move:
            self.meters.value = table(measured, engine, adversary, epsilon)

    def _guarded(self, act: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """An error in a callback is invisible in a notebook: it is shown in the status line."""

        def guarded(change: Any) -> Any:
            try:
                return act(change)
            except UserError as error:
                self.status.value = f"<b>{error}</b>"
            except Exception:
                self.status.value = f"<pre>{traceback.format_exc()}</pre>"
            return None

        return guarded


def table(measured: Meters, engine: Engine, adversary: str, epsilon: float) -> str:
    """The meters as HTML, with who is attacked and who judges."""
    rows = {
        "x′ still finds its x": f"{measured.retrieved:.0f} % of {len(engine.scene.x)}, mean rank "
        f"{measured.rank:.1f} of {measured.n} candidates",
        "cosine to its x · to the nearest other": f"{measured.cos_self:.3f} · "
        f"{measured.cos_other:.3f}",
        "‖x′ − x‖₂ · ‖x′ − x‖∞ (normalised)": f"{measured.l2:.2f} · {measured.linf:.2f}",
        "contrastive loss at x → at x′ (nats)": f"{measured.loss_before:.3f} → "
        f"{measured.loss_after:.3f}",
        "judged by": engine.witness_name,
        "attacked": engine.scene.attacked if adversary != "random_sign" else "nobody",
    }
    cells = "".join(
        f'<tr><td style="padding-right:12px">{k}</td><td>{v}</td></tr>' for k, v in rows.items()
    )
    title = f"<b>{NAMES[adversary]}, ε = {epsilon:.3g}</b>"
    return f'<div style="margin-left:16px;line-height:1.6">{title}<table>{cells}</table></div>'
