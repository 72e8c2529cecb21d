"""The ε explorer: drag ε, and watch x′ and its identity change at once (notebook 02).

Where another ε costs one decode, the picture is drawn in the slider's own callback, and moves that
arrive meanwhile collapse into the latest, as ipywidgets coalesces them. All else happens in the
background, most urgent first: other images or networks, attacks of several steps, the meters, the
verdict, what is folded away, the curves over ε; each gives way to the next move.
"""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import ipywidgets as widgets
import torch
from IPython.display import HTML, DisplayHandle, display
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, DecomposeConfig, UserError
from idaa_lib.identity.scene import ADVERSARIES, Reading
from idaa_lib.lab import pictures, verdict
from idaa_lib.lab.background import Background
from idaa_lib.lab.controls import (
    EQUAL_HARDNESS,
    FIELDS,
    HIGH,
    LOW,
    Controls,
    control,
    folder,
    keep_image,
)
from idaa_lib.lab.engine import MOVING, STILL, STRIP, STRIP_NAMES, Engine
from idaa_lib.lab.grid import Grid
from idaa_lib.lab.kernel import SHEET, guard, is_attended, query
from idaa_lib.lab.style import COLOURS, NAMES, picture, svg
from idaa_lib.lab.walk import WalkPanel
from idaa_lib.results import html_table

SCRIPT = (Path(__file__).parent / "explorer.js").read_text(encoding="utf-8")
FOLDS = ("One image over ε", "Spectra", "Walk in the latent: what is identity?")
LARGE = 150  # pixels a side of an enlarged image


def name_paths(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The setting of a link: of what may be a path, the name alone."""
    names = {k: Path(setting[k]).name for k in ("own", "vae", "run", "dataset") if setting.get(k)}
    return {**setting, **names}


class Explorer(Controls):
    """Controls, pictures, meters and curves over an `Engine`; `show()` displays them.

    Args:
        config: VAE, attacked encoder, images and attack. ε starts where training has it.
    """

    engine: Any = None  # an `Engine`, once there is a VAE
    # A figure and a table that stay in the cell without its kernel, and what the figure is of.
    _record: tuple[DisplayHandle, ...] = ()
    _recorded: tuple[Engine, bool] | None = None
    _attack = (ADVERSARIES[0], 0.1)  # what the picture shows: adversary and ε
    _waits = False  # whether it waits for the curves over ε
    _now: tuple[str, Reading] | None = None  # what the meters say, and of what
    _pinned: tuple[str, Reading, str] | None = None  # and its `verdict.note`

    def __init__(self, config: DecomposeConfig) -> None:
        super().__init__(config)
        self._guard = guard(self.status)
        self._latest = "dataset"  # the control that asked for the present engine
        self._rows: dict[str, Tensor] = {}  # of the picture
        self._panels: tuple[Any, ...] = ()  # of the curves over ε: box in the figure, limits of ε
        self._background = Background("load", "paint", "meters", "verdict", "fold", "curves")
        self._make_displays()
        self.list_saved()
        self._guard(lambda: self._load(self.request()))()
        if self.engine is None:
            self.status.value += " Then run this cell again."
            self.ui.children = (self.status,)
            return
        self._start = self.setting
        self._listen()
        if link := name_paths(query() or {}):
            own = {"own": str(folder() / "uploads" / link["own"])} if "own" in link else {}
            self.open(link | own)

    def _make_displays(self) -> None:
        text = "The attacked images x′, what the decoder gives, and x′ − x"
        self.still = Grid(STILL, "idaa-still", "The images x, G(x) and R(x)")
        self.picture = Grid(MOVING, "idaa-picture", text, marks=True)
        self.pinned = Grid(MOVING, "idaa-pinned", f"{text}: the setting that was pinned", True)
        self.large = Grid([""], "idaa-large", "One image, enlarged")
        self.strip = Grid([f"{NAMES[a]} x′" for a in ADVERSARIES], "idaa-strip")
        self.pinned.layout.display = self.large.layout.display = "none"
        self.verdict, self.meters, self.curves, self.marker, self.spectra = (
            control(name, widgets.HTML)
            for name in ("verdict", "meters", "curves", "marker", "spectra")
        )
        self.walk = WalkPanel(self._background, self._guard)
        # The marker lies over the curves: moving it redraws nothing.
        over = control("over", widgets.Box, children=[self.curves, self.marker])
        self.folds = widgets.Accordion((self.strip, self.spectra, self.walk.ui), titles=FOLDS)
        children = [
            *self.lines, self.problems, self.status, self.verdict, self.meters, self.still,
            self.large, self.picture, self.pinned, over, self.folds, self.left_out,
        ]  # fmt: skip
        self.ui = control("explorer", widgets.VBox, children=children)

    def _listen(self) -> None:
        """From now on controls act: what the first load set in them was no request."""
        for name in FIELDS:
            reload = self._guard(lambda _, name=name: self._reload(name))
            getattr(self, name).observe(reload, "value")
        for source, trait, act in (
            (self.epsilon, "value", lambda _: self._draw()),
            (self.epsilon, "complaint", lambda change: self.complain("epsilon", change["new"])),
            (self.adversary, "value", lambda _: self._draw()),
            (self.fairness, "value", lambda _: self._draw()),
            (self.upload, "value", self._upload),
            (self.pin, "value", lambda _: self._pin()),
            (self.saved, "value", lambda change: self._reopen(change["new"])),
            (self.chosen, "value", lambda _: self._enlarge()),
            (self.chosen, "value", lambda _: self._unfold()),
            (self.folds, "selected_index", lambda _: self._unfold()),
        ):
            source.observe(self._guard(act), trait)
        self.forget.on_click(self._guard(lambda _: self._take(None)))
        self.keep.on_click(self._guard(lambda _: self._save()))
        self.reset.on_click(self._guard(lambda _: self.open(self._start)))

    def show(self) -> None:
        """Display the widgets, and below them a figure and a table that stay without a kernel.

        Where nobody sits in front of the page, as under papermill, this waits for what they show.
        """
        display(HTML(f"{SHEET}<script>{SCRIPT}</script>"), self.ui)
        if self.engine is None or query() is not None:  # a page of Voilà's is never without one
            return
        engine = self.engine
        self._record = tuple(display(HTML(""), display_id=True) for _ in range(2))
        self._later("verdict", lambda: self._judge(engine))
        if not is_attended() and not self._background.settle(timeout=300):
            self._keep_record(engine)

    def _later(self, kind: str, work: Callable[[], Any]) -> None:
        self._background.request(kind, self._guard(work))

    # --- settings -----------------------------------------------------------------------------

    @property
    def setting(self) -> dict[str, Any]:
        """What `open` brings back, as JSON: the images, networks and attack that are shown."""
        fields = self.engine.scene.config.model_dump(mode="json", exclude={"preset", "epsilon"})
        attack = {"adversary": self.adversary.value, "fairness": self.fairness.value}
        return fields | attack | {"epsilon": self.epsilon.field.value}

    def open(self, setting: Mapping[str, Any]) -> None:
        """Show a `setting`; what one leaves out stays as it is. One that cannot be is said."""
        try:
            self.fill(setting)
        except ConfigError as error:
            self.complain("saved", str(error))
        else:
            self._reload()

    def _save(self) -> None:
        """Figures, the setting, and code that makes them again, in a folder of their own."""
        engine, setting, walk = self.engine, self.setting, self.walk.state
        adversary, index = self.adversary.value, max(0, self.chosen.value)
        idaa, equal = self.epsilon.value, self.fairness.value == EQUAL_HARDNESS
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")

        def work() -> None:
            engine.finish()  # an equal hardness is read off whole curves
            epsilon, _ = verdict.strength(engine, adversary, idaa, equal)
            place = folder() / f"{now}-{adversary}-epsilon={epsilon:.3g}"
            engine.save(place, adversary, epsilon, index, walk)
            runs.write_json(place / "setting.json", setting)
            self.list_saved()
            name = place if query() is None else place.name  # a visitor has no folders here
            self.status.value = f"Saved, with the code that makes it again: {name}"

        self.status.value = "saving …"
        self._later("fold", work)

    def _reopen(self, path: Path | str) -> None:
        if path:
            self.saved.value = ""  # so that the same one can be opened again
            self.open(runs.read_json(Path(path)) or {})

    def _pin(self) -> None:
        """Keep picture and meters as they are, below those that follow the slider."""

        def work() -> None:
            pin = self._now if self.pin.value else None
            self._pinned = pin and (*pin, verdict.note(self.engine))
            self.pinned.layout.display = None if self._pinned else "none"
            if self._pinned is not None:
                self.pinned.resize(self.engine.columns, self.engine.size)
                self.pinned.show(self._rows.values())
                self.pinned.mark(verdict.marks(self._pinned[1].identity))
            self._write_meters()

        self._later("fold", work)

    # --- other images, networks, attacks --------------------------------------------------------

    def _reload(self, name: str = "dataset") -> None:
        """Another engine, since the control `name` asks for it."""
        self._latest = name
        self._background.disturb()
        self._later("load", self._attempt)

    def _attempt(self) -> None:
        """Load what the controls ask for; one that holds what cannot be is marked, and said."""
        try:
            # A control that is set to what is shown asks for nothing.
            if (config := self.request()) != self.engine.scene.config:
                self._load(config)
        except UserError as error:
            self.status.value = ""
            self.complain(self._latest)
            first = str(error).partition("=")[0].split()[0]
            name = "upload" if first == "own" else first if first in FIELDS else self._latest
            self.complain(name, str(error))
        else:
            for name in (*FIELDS, "upload", "saved"):
                self.complain(name)

    def _load(self, config: DecomposeConfig) -> None:
        """Another engine: the direction of its attack is computed once."""
        self.status.value = "recomputing …"
        first, engine = self.engine is None, Engine(config)
        still = engine.still()
        engine.scene.directions("idaa")
        columns, size, names = engine.columns, engine.size, engine.scene.names
        self.engine, self._rows, self._now = engine, {}, None
        self.meters.value = ""  # those of other images
        self._judge(engine)
        self.list_choices(engine.scene)
        self.still.resize(columns, size, names)
        self.picture.resize(columns, size)
        self.large.resize(len(STILL) + len(MOVING), size, (*STILL, *MOVING), max(1, LARGE // size))
        self.strip.resize(len(STRIP), size, STRIP_NAMES)
        self.forget.layout.display = None if config.own else "none"
        self.still.show(still.values())
        self.walk.open(engine)
        self.curves.value, self._panels = "<i>The curves over ε are being read …</i>", ()
        marked = self.epsilon.mark_trained(engine.trained_epsilon)
        if first:
            self.epsilon.value = min(max(marked, LOW), HIGH)
        self._draw()
        self._unfold()
        self._later("curves", lambda: self._advance(engine))

    def _upload(self, change: Any) -> None:
        """An image of the user's own becomes the first; kept, so that code can find it again."""
        if change["new"]:
            self.upload.value = ()  # the same file may be given again
            try:
                self._take(str(keep_image(change["new"][0])))
            except ConfigError as error:
                self.complain("upload", str(error))

    def _take(self, own: str | None) -> None:
        self.config = self.config.replace(own=own)
        self._reload("upload")

    # --- a move -------------------------------------------------------------------------------

    def _draw(self) -> None:
        engine, adversary = self.engine, self.adversary.value
        self._background.disturb()
        equal = self.fairness.value == EQUAL_HARDNESS
        self._waits = equal and adversary != "idaa" and not engine.complete
        if self._waits:
            self.status.value = "reading how hard each attack is over ε …"
            return  # the last point of the curves draws
        epsilon, title = verdict.strength(engine, adversary, self.epsilon.value, equal)
        self._attack = adversary, epsilon
        self._mark()

        def paint() -> None:
            # Small images take some 10 ms. A team of threads that slept, or shares its cores with
            # the background's, is woken late at each operation: on 2 cores the median of a move is
            # the same with one thread, and its 95th percentile half.
            threads = torch.get_num_threads()
            torch.set_num_threads(1 if engine.size <= 48 else threads)
            try:
                self._rows = engine.moving(adversary, epsilon)
                self.picture.show(self._rows.values())
            finally:
                torch.set_num_threads(threads)
            self._enlarge()
            self.status.value = ""

        def measure() -> None:
            if engine is self.engine:
                self._now = title, engine.reading(adversary, epsilon)
                self.picture.mark(verdict.marks(self._now[1].identity))
                self._write_meters()

        if engine.live(adversary):
            paint()
        else:
            self.status.value = "attacking …"
            self._later("paint", paint)
        self._later("meters", measure)
        self._later("verdict", lambda: self._judge(engine))
        if self.folds.selected_index == 1:  # the spectra
            self._unfold()

    def _write_meters(self) -> None:
        """The meters of what is shown, and of what is pinned."""
        if self._now is None:
            return
        readings = dict([self._now])
        if self._pinned is not None:
            title, reading, who = self._pinned
            judges = "" if who == verdict.note(self.engine) else f" ({who})"
            readings[f"pinned: {title}{judges}"] = reading
        table, note = verdict.meters(self.engine, readings)
        note = html.escape(note)
        if query() is not None:
            fields = {k: v for k, v in self.setting.items() if v not in (None, "", [])}
            fields |= {"indices": self.indices.value} if "indices" in fields else {}
            fields = name_paths(fields)
            note += f' · <a href="?{html.escape(urlencode(fields))}">link to this setting</a>'
        self.meters.value = f'{html_table(table)}<div class="idaa-quiet">{note}</div>'

    def _judge(self, engine: Engine) -> None:
        if engine is self.engine:
            text = verdict.sentence(engine, self.epsilon.value)
            self.verdict.value = f"<b>{html.escape(text)}</b>"
            if engine.complete:
                self._keep_record(engine)

    def _keep_record(self, engine: Engine) -> None:
        if not self._record or self._now is None:
            return
        readings = dict([self._now])
        if engine.complete and (pair := engine.at_equal_loss(self.epsilon.value)):
            for adversary, reading in zip(("idaa", "clae"), pair, strict=True):
                readings.setdefault(verdict.title(adversary, reading.row["epsilon"]), reading)
        table, note = verdict.meters(engine, readings)
        figure, text = self._record
        if self._recorded != (engine, engine.complete):
            self._recorded = engine, engine.complete
            figure.update(picture(pictures.identity_curves(engine.curves, pictures.SAME)))
        page = f"<p>{self.verdict.value}</p>{html_table(table)}<p>{html.escape(note)}</p>"
        text.update({"text/plain": table.to_string(), "text/html": page}, raw=True)

    def _mark(self) -> None:
        """Draw a line at the present ε over the curves."""
        adversary, epsilon = self._attack
        lines = []
        for box, (low, high) in self._panels if epsilon > 0 else ():
            share = math.log(epsilon / low) / math.log(high / low)
            place = {"left": box.x0 + share * box.width, "bottom": box.y0, "height": box.height}
            css = "".join(f"{name}:{100 * value:.2f}%;" for name, value in place.items())
            lines.append(f'<span style="{css}border-color:{COLOURS[adversary]}"></span>')
        self.marker.value = "".join(lines)

    def _advance(self, engine: Engine) -> bool:
        """One further point of the curves; drawn when they are coarse, finer, whole."""
        if engine is not self.engine:
            return False
        more = engine.advance()
        if not more or {len(curve) for curve in engine.curves.values()} in ({5}, {9}):
            figure = pictures.identity_curves(engine.curves, pictures.SAME)
            self.curves.value = svg(figure)
            self._panels = tuple((a.get_position(), a.get_xlim()) for a in figure.axes[:2])
            self._mark()
            self._judge(engine)
            # A page of Voilà's that connected while these were measured has missed them.
            self.meters.send_state("value")
        if not more and self._waits:
            self._draw()
        return more

    def _enlarge(self) -> None:
        """The chosen image alone: all that is shown of it, enlarged, and x′ over ε."""
        index = self.chosen.value
        self.large.layout.display = "none" if index < 0 else None
        if index >= 0 and self._rows:
            rows = (self.engine.still() | self._rows).values()
            self.large.show([torch.stack([images[index] for images in rows])])

    def _unfold(self) -> None:
        """Draw what is open below; what is folded away costs nothing."""
        engine, fold = self.engine, self.folds.selected_index

        def work() -> None:
            if fold == 0:
                self.strip.show(engine.strip(max(0, self.chosen.value)).values())
            elif fold == 1:
                self.spectra.value = svg(pictures.spectra(engine.parts(*self._attack)))
            elif fold == 2:
                self.walk.draw()

        self._later("fold", work)
