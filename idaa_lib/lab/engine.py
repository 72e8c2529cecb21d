"""What the ε explorer shows: pictures of x′ at any ε, what is left of the identity of x, and walks.

A one-step attack without random start has one direction for every ε, computed once per set of
images, so each picture costs one decode and one small PNG.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import UNKNOWN, DecomposeConfig
from idaa_lib.identity.networks import UNTRAINED, choose_witness
from idaa_lib.identity.scene import (
    ADVERSARIES,
    BATCH,
    Reading,
    Scene,
    Witness,
    open_scene,
    read,
)
from idaa_lib.lab import pictures
from idaa_lib.lab.style import NAMES, save
from idaa_lib.nets import evaluating
from idaa_lib.train.samples import GAIN

COLUMNS = 16  # images that a figure on paper shows at most
LIVE = 32  # images that are decoded within a move of the slider; more of them in the background
# Where the curves over ε are read: four a decade, which is what an eye needs.
EPSILONS = tuple(float(e) for e in np.logspace(-3, 1, 17))
STRIP = EPSILONS[4:]  # from 0.01 on: below, an eye sees nothing
STRIP_NAMES = [f"ε = {e:.2g}" for e in STRIP]
SHARES = tuple(step / 8 for step in range(9))  # of the second image, from none to all
SHARE_NAMES = [f"{share:.0%} b" for share in SHARES]

STILL = ("x", "G(x)", f"R(x), × {GAIN:g}")
MOVING = ("G(z + δ)", "x′", f"x′ − x, × {GAIN:g}")
STEPPED = ("D(z + step)", "R + D(z + step)")


class Engine:
    """Pictures, meters and walks of one set of images. It knows no widget.

    Args:
        config: the VAE, the encoder attacked, the images, and the attack.
        candidates: how many images x is sought among, the attacked ones included.
    Raises:
        RunError: there is no finished VAE run. ConfigError: the images are not there.
    """

    def __init__(self, config: DecomposeConfig, candidates: int = 500) -> None:
        self.scene: Scene = open_scene(config)
        self.columns, self.size = len(self.scene.x), self.scene.x.shape[-1]
        pool = self.scene.pool[: max(0, candidates - self.columns)]
        self.candidates = torch.cat([self.scene.x, pool])  # x_i is candidate i
        # adversary → its meters by ascending ε, filled by `advance`
        self.curves: dict[str, list[dict[str, float]]] = {name: [] for name in ADVERSARIES}
        order = (*EPSILONS[::4], *EPSILONS[2::4], *EPSILONS[1::2])
        self._unread = [(name, epsilon) for epsilon in order for name in ADVERSARIES]

    @cached_property
    def witness(self) -> Witness:
        """The encoder that judges identity: another run than the attacked one, else untrained."""
        name = choose_witness(self.scene.run, self.scene.attacked)
        return Witness(self.scene, name, self.candidates)

    @cached_property
    def trained_epsilon(self) -> float | None:
        """IDAA's ε in the training of the attacked encoder; None where that had none."""
        if self.scene.attacked != UNTRAINED:
            values = runs.get("ssl", self.scene.attacked).config.list_stated()
            if values["adversary"] == "idaa" and values["epsilon"] != UNKNOWN:
                return values["epsilon"]
        return None

    def live(self, adversary: str) -> bool:
        """Whether a picture at another ε is there within a move of the slider."""
        return self.columns <= LIVE and self.scene.live(adversary)

    # --- pictures -----------------------------------------------------------------------------

    def still(self) -> dict[str, Tensor]:
        """The rows that no ε moves: name → pixels (columns, 3, size, size)."""
        x, G, R = self.scene.parts.values()
        rows = self.scene.pixels(x), self.scene.pixels(G), self.scene.contrast(R, GAIN)[0]
        return dict(zip(STILL, rows, strict=True))

    def moving(self, adversary: str, epsilon: float) -> dict[str, Tensor]:
        """The rows that follow ε."""
        x, G, R = self.scene.parts.values()
        x_adv = self.scene.attack(adversary, epsilon)
        # CLAE leaves the latent alone: what is decoded is G(x) itself.
        decoded = G if adversary == "clae" else x_adv - R
        pixels = self.scene.pixels
        rows = pixels(decoded), pixels(x_adv), self.scene.contrast(x_adv - x, GAIN)[0]
        return dict(zip(MOVING, rows, strict=True))

    def strip(self, index: int) -> dict[str, Tensor]:
        """x′ of one image over `STRIP`: a row an adversary."""
        rows = {}
        for name in ADVERSARIES:
            images = [self.scene.attack(name, e, index + 1)[index] for e in STRIP]
            rows[f"{NAMES[name]} x′"] = self.scene.pixels(torch.stack(images))
        return rows

    def parts(self, adversary: str, epsilon: float) -> dict[str, Tensor]:
        """What spectra are taken of, all images (N, 3, size, size)."""
        x, G, R = self.scene.parts.values()
        x_adv, name = self.scene.attack(adversary, epsilon), NAMES[adversary]
        return {"x": x, "G(x)": G, "R(x)": R, f"{name} x′": x_adv, f"{name} x′ − x": x_adv - x}

    # --- identity -----------------------------------------------------------------------------

    @cached_property
    def reading(self) -> Callable[[str, float], Reading]:
        """(adversary, ε) → how hard the attack is, and what identity the witness finds in its x′;
        the last ones are remembered."""
        return lru_cache(8)(partial(read, self.scene, self.witness))

    def advance(self) -> bool:
        """Read one further point of the curves over ε, coarse before fine; False: all are read."""
        if self.complete:
            return False
        adversary, epsilon = self._unread[0]
        row = read(self.scene, self.witness, adversary, epsilon).row
        insort(self.curves[adversary], row, key=itemgetter("epsilon"))
        del self._unread[0]
        return True

    def finish(self) -> None:
        """Read all points of the curves that are left."""
        while self.advance():
            pass

    @property
    def complete(self) -> bool:
        return not self._unread

    def as_hard(self, adversary: str, epsilon: float) -> float | None:
        """The smallest ε at which `adversary` reaches the loss that IDAA has at `epsilon`.

        Read off the curves, between whose points the loss is linear in log ε; a decade below the
        first it is that of x. None where it is never reached; 0 where IDAA is no harder than x.
        """
        (where, losses), own = self._line(adversary), self._line("idaa")
        target = np.interp(np.log(epsilon), *own)
        if losses.max() < target:
            return None
        if (i := int(np.argmax(losses >= target))) == 0:
            return 0.0
        return float(np.exp(np.interp(target, losses[i - 1 : i + 1], where[i - 1 : i + 1])))

    def at_equal_loss(self, epsilon: float) -> tuple[Reading, Reading] | None:
        """The readings of IDAA at `epsilon` and of CLAE where it is as hard (`as_hard`); None where
        it is nowhere, or IDAA is no harder than x."""
        matched = self.as_hard("clae", epsilon)
        return (self.reading("idaa", epsilon), self.reading("clae", matched)) if matched else None

    def _line(self, adversary: str) -> tuple[np.ndarray, np.ndarray]:
        """log ε and losses."""
        rows = self.curves[adversary]
        first = rows[0]["epsilon"] / 10
        losses = np.array([self.scene.loss_before, *(row["loss_after"] for row in rows)])
        return np.log([first, *(row["epsilon"] for row in rows)]), losses

    # --- walks --------------------------------------------------------------------------------

    @cached_property
    def _latents(self) -> Tensor:
        """z (n, m) of all candidates; those of the attacked images come first."""
        vae = self.scene.vae
        with torch.no_grad(), evaluating(vae):
            return torch.cat([vae.encode(part)[0] for part in self.candidates.split(BATCH)])

    @cached_property
    def steps(self) -> dict[str, Tensor]:
        """Steps of one standard deviation over the candidates, (k, m): along each principal
        direction of z, and along each coordinate."""
        z = self._latents.double()
        _, s, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        std = s / max(1, len(z) - 1) ** 0.5
        along = {"principal direction": std[:, None] * directions, "coordinate": z.std(0).diag()}
        return {name: steps.float() for name, steps in along.items()}

    @torch.no_grad()
    def step(self, kind: str, index: int, amount: float) -> dict[str, Tensor]:
        """D(z + amount · step) and R + that, as pixels of the shown images."""
        z = self._latents[: self.columns] + amount * self.steps[kind][index]
        with evaluating(self.scene.vae):
            decoded = self.scene.vae.decode(z)
        both = decoded, self.scene.parts["R"] + decoded
        return dict(zip(STEPPED, map(self.scene.pixels, both), strict=True))

    @torch.no_grad()
    def morph(self, a: int, b: int) -> dict[str, Tensor]:
        """From image a towards b (9, 3, size, size), normalised: z alone with R(a) fixed, and R
        alone with G(a) fixed; the last of each has exchanged that part in whole."""
        _, G, R = self.scene.parts.values()
        t = torch.tensor(SHARES).view(-1, 1, 1, 1)
        z = torch.lerp(self._latents[a], self._latents[b], t.flatten(1))
        with evaluating(self.scene.vae):
            decoded = self.scene.vae.decode(z)
        return {
            "R(a) + D(z: a → b)": R[a] + decoded,
            "G(a) + (R: a → b)": G[a] + torch.lerp(R[a], R[b], t),
        }

    def likeness(self, images: Tensor, a: int, b: int) -> Tensor:
        """Cosine by the witness of each image to a and to b: (N, 2)."""
        return self.witness.cosines(images, self.witness.candidates[[a, b]])

    # --- keeping ------------------------------------------------------------------------------

    def save(
        self,
        folder: Path,
        adversary: str,
        epsilon: float,
        index: int = 0,
        walk: tuple[str, int, float, int, int] | None = None,
    ) -> None:
        """Write what the explorer shows as figures, and `again.py`, which makes them again.

        Args:
            index: image of the strip. walk: kind, index and amount of a step, images a and b.
        """
        self.finish()
        rows = self.still() | self.moving(adversary, epsilon)
        title, names = f"{NAMES[adversary]}, ε = {epsilon:.6g}", self.scene.names
        n = min(COLUMNS, self.columns)
        figures = {
            "picture": pictures.image_rows(rows, title, n),
            "strip": pictures.image_rows(self.strip(index), "", len(STRIP), STRIP_NAMES),
            "spectra": pictures.spectra(self.parts(adversary, epsilon)),
            "curves": pictures.identity_curves(self.curves, pictures.SAME),
        }
        if walk:
            kind, which, amount, a, b = walk
            pairs = self.morph(a, b)
            rows = {name: self.scene.pixels(images) for name, images in pairs.items()}
            like = {name: self.likeness(images, a, b) for name, images in pairs.items()}
            title, images = f"{kind} {which}, {amount:+g} std", self.step(*walk[:3])
            figures["walk"] = pictures.image_rows(images, title, n)
            title = f"a = {names[a]}, b = {names[b]}"
            figures["exchange"] = pictures.image_rows(rows, title, len(SHARES), SHARE_NAMES)
            figures["likeness"] = pictures.likeness(SHARES, like)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
        fields = ", ".join(f"{k}={v!r}" for k, v in self.scene.config.list_changes().items())
        (folder / "again.py").write_text(
            "from pathlib import Path\n\n"
            "from idaa_lib.configs import DecomposeConfig\n"
            "from idaa_lib.lab.engine import Engine\n\n"
            f"config = DecomposeConfig({fields})\n"
            'folder = Path(__file__).parent / "again"\n'
            f"Engine(config).save(folder, {adversary!r}, {epsilon!r}, {index}, {walk!r})\n",
            encoding="utf-8",
        )
