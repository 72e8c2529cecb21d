"""What a method is to the training loop (contract: docs/architecture.md, "A method").

The loop draws `batches` and random numbers, asks `draw` for views and `step` for a `Step`, lets the
adversary change `step.attacked` against `step.attack_loss`, adds α · `step.adversarial_loss(x′)`,
and steps. It never asks which method it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from idaa_lib import configs
from idaa_lib.configs import EncoderConfig
from idaa_lib.methods.protocols import OfficialProtocol
from idaa_lib.nets import build_backbone, initial_weights
from idaa_lib.nets.heads import Embedder, Embedding
from idaa_lib.registry import CHOICES, register
from idaa_lib.views import Recipe, View, compile_view, keyed_generator

Batch = dict[str, Tensor]
Loss = Tensor | Iterable[Callable[[], Tensor]]  # closures are differentiated one after another
METHODS = CHOICES["method"]


@dataclass(frozen=True)
class About:
    """What a method may know of its training beside its options."""

    recipe: Recipe  # of the views, with their size and normalisation
    # (N,) int64 of all training images, −1 where unknown; and how many classes there are.
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    classes: int = 0
    epochs: int = 1
    batch_size: int = 2  # of all processes together
    seed: int = 0

    @property
    def n(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Moment:
    """A place in the training, counted from 0.

    `epoch`, `step` and `steps` are for the host (`after_step`). `progress`, the share that is done,
    () in [0, 1) on the device, is for `step`, which when it is compiled or recorded sees a tensor
    move and keeps a number for ever.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 1
    progress: Tensor = field(default_factory=lambda: torch.zeros(()))
    # The step's random numbers, a row an image of this process, on the device.
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a long `before_epoch` may ask of the loop."""

    images: Tensor  # all training images, uint8 (N, 3, H, W)
    # Their features (N, D) by the present encoder, as `evaluate.encoders.features` gives them, of a
    # layer; without augmentation, or of views by `transform`, drawn from `generator`. It calls
    # `pulse` before each batch with how many images are done.
    embed: Callable[..., Tensor]
    pulse: Callable[[str], None]  # takes a message, and raises where the training shall stop
    say: Callable[..., object] = print  # a sentence for the user, once a machine


@dataclass
class Step:
    """One training step's parts, which share their embeddings by closure."""

    loss: Loss  # scalar with graph
    parts: dict[str, Tensor] = field(default_factory=dict)  # scalars to be logged
    attacked: View | None = None  # what an adversary may change
    # Of images x (B, 3, H, W): a scalar to be ascended. `at_start`: they are the view's own.
    attack_loss: Callable[..., Tensor] | None = None
    adversarial_loss: Callable[[Tensor], Loss] | None = None  # of x′
    # The positive pairs (B, D), (B, D) of this process, L2-normalised, for collapse diagnostics.
    embeddings: tuple[Tensor, Tensor] | None = None
    # Normalised images (B, 3, H, W) by label, for who watches; a pair stands for its difference.
    pictures: dict[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    carry: dict[str, Any] = field(default_factory=dict)  # what `after_step` needs


class Method(nn.Module):
    """Base of all methods: built as cls(options, backbone, about); notebook 12 has an example.

    A subclass makes `network`, of the backbone and its heads, and has `step`. The network gives an
    `Embedding`, as `Network` does. The loop replaces it by what Accelerate prepares, so a method
    must call it as a whole (`embed`): a call of an inner part would skip the gradient exchange
    between processes. All state that training needs is in `state_dict()`, with fixed shapes.
    """

    class Options(configs.Options):
        """The knobs of the method: none; a subclass has its own."""

    stage = "ssl"  # whose configurations may name it
    views = 2  # of each image
    # Whether `draw` and `step` do nothing but launch work on the device, always the same, on
    # tensors that stay where they are: then a CUDA graph can stand for them. Each class says so.
    recordable = False
    # SimSiam's, of backbone features, where nothing is published for a method with IDAA.
    official = OfficialProtocol("SimSiam", "backbone", 0.5, "backbone", "best", 256)

    network: nn.Module

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__()
        self.options, self.about, self.recipe = options, about, about.recipe
        self._makers: dict[Recipe, Callable[..., Any]] = {}

    @classmethod
    def check(cls, config: Any) -> None:
        """ConfigError where knobs and fields of a configuration cannot be together."""

    @classmethod
    def official_protocol(cls, config: Any) -> OfficialProtocol:
        """The published evaluation of a run with this configuration."""
        return cls.official

    # --- what a step sees -------------------------------------------------------------------------

    def steps_per_epoch(self) -> int:
        return self.about.n // self.about.batch_size

    def images_per_step(self) -> int:
        """How many images a batch of `batches` names, for images/s."""
        return self.about.batch_size

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Global batches of an epoch as named index tensors (int64): one permutation, drop last."""
        n, size = self.about.n, self.about.batch_size
        order = torch.randperm(n, generator=keyed_generator(self.about.seed, epoch, 0, 0))
        for start in range(0, n - size + 1, size):
            yield {"images": order[start : start + size]}

    def recipes(self) -> list[tuple[str, Recipe]]:
        """Of each view in turn: which of the batch's images it is of, and its recipe."""
        return [("images", self.recipe)] * self.views

    def maker(self, recipe: Recipe) -> Callable[..., Any]:
        """What makes a view of uint8 images and their numbers; `recipe.pair` makes two of them."""
        return recipe.view

    def numbers(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers of a global batch with `sizes[name]` images, by name, on the CPU."""
        return {
            f"view {i}": recipe.numbers(sizes[images], generator)
            for i, (images, recipe) in enumerate(self.recipes())
        }

    def draw(self, images: Batch, batch: Batch, moment: Moment) -> tuple[View, ...]:
        """Random views of uint8 images (B, 3, H, W): what `moment.numbers` mean for them.

        Of streamed photographs `images` has the crops of each view, `view i`, and `batch` how they
        were cut, `cut i` (`Recipe.view`).
        """
        views = []
        for i, (name, recipe) in enumerate(self.recipes()):
            key, make = f"view {i}", self._makers.get(recipe, self.maker(recipe))
            cut = [batch[f"cut {i}"]] if f"cut {i}" in batch else []
            views.append(make(images[key if cut else name], moment.numbers[key], *cut))
        return tuple(views)

    # --- what it learns ---------------------------------------------------------------------------

    def describe(self, view: View) -> Tensor | None:
        """The projector's condition (B, ·) of a view; None by default."""
        return None

    def embed(self, view: View, adversarial: bool = False) -> Embedding:
        """The network's embedding of a view, by the main norms or the adversarial ones."""
        return self.network(view.images, self.describe(view), adversarial)

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        """The losses of the views that `draw` made of a batch, and what may be attacked."""
        raise NotImplementedError(f"{type(self).__name__} has no `step`, which gives its losses.")

    def attack_on(
        self,
        view: View,
        attack_loss: Callable[[Embedding, bool], Tensor],
        adversarial_loss: Callable[[Embedding, View], Tensor],
    ) -> dict[str, Any]:
        """The fields of a `Step` that say how `view` is attacked, from losses of the embedding that
        other images in its place have by the adversarial norms.

        attack_loss also takes whether they are its own images, adversarial_loss the view of them.
        """

        def ascend(x: Tensor, at_start: bool = False) -> Tensor:
            with self.fixed_weights():
                embedding = self.embed(view._replace(images=x), adversarial=True)
            return attack_loss(embedding, at_start)

        def learn(x_adv: Tensor) -> Tensor:
            v_adv = view._replace(images=x_adv)
            return adversarial_loss(self.embed(v_adv, adversarial=True), v_adv)

        return {"attacked": view, "attack_loss": ascend, "adversarial_loss": learn}

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Inside, a gradient flows to the images alone, not to the weights: a compiled network
        computes the gradient of every tensor with `requires_grad`, even if nobody uses it."""
        learning = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def compile_parts(self) -> None:
        """Compile views and network (`compile=True`), which changes rounding and nothing else."""
        self._makers = {recipe: compile_view(self.maker(recipe)) for _, recipe in self.recipes()}
        self.network.compile(dynamic=False)  # a few sizes, each with kernels of its own

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups: `params` and, where not the run's, `weight_decay`, `schedule`, `warmup`; `rate`
        is a factor of the run's rate."""
        return [{"params": list(self.network.parameters())}]

    def encoder(self, layer: str) -> nn.Module:
        """What is evaluated: images (B, 3, H, W) → features (B, D).

        `backbone` gives h; `projector` the embedding z that the loss compares, L2-normalised.
        """
        if layer not in ("backbone", "projector"):
            raise ValueError(f"layer must be backbone or projector, and is {layer!r}.")
        backbone = self.network.get_submodule("backbone")
        if layer == "backbone":
            return backbone
        return Embedder(backbone, self.network.get_submodule("projector"))

    def before_epoch(self, epoch: int, work: Work) -> None:
        """Before an epoch's first step. If it takes long, it calls `work.pulse(message)`: once
        before it changes any state, which saves a checkpoint, and then regularly. `pulse` raises
        when the user asks to stop; on resume this method begins again from that checkpoint."""

    def after_step(self, step: Step, moment: Moment) -> None:
        """After the optimiser has stepped: queues, moving averages."""


def register_method(name: str) -> Callable[[Any], Any]:
    """A decorator that makes a method available as `method=name`.

    The class is a `Method`, and the names of its `Options` are its knobs. The file that registers
    it is part of a run's identity: what else the method needs belongs there.
    """
    return register("method", name, Method, configs.Options)


def build_method(config: EncoderConfig, about: About) -> Method:
    """The method that `config.method` names, with initial weights drawn from `config.seed`.

    Raises:
        ConfigError: no method has this name, or it cannot be as its options say.
    """
    kind = config.get_chosen("method")
    with initial_weights(config.seed):
        backbone = build_backbone(
            config.backbone,
            width=config.width,
            stem=config.stem,
            adversarial_norms=config.adversary != "none",
        )
        return kind(config.options("method"), backbone, about)


# --- what methods share ---------------------------------------------------------------------------


def make_anchor(embed: Callable[[], Tensor]) -> Callable[[Tensor, bool], Tensor]:
    """What an attack loss compares with: the attacked view's own embedding, stopped.

    Gives a function of the embedding z at hand and of whether the images are the view itself: then
    z is its embedding, exactly, and a pass is saved. Else `embed()` makes it, once for all steps.
    """
    anchor: Tensor | None = None

    def find(z: Tensor, at_start: bool) -> Tensor:
        nonlocal anchor
        if anchor is None:
            with torch.no_grad():
                anchor = z.detach() if at_start else embed()
        return anchor

    return find


def similarity(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """rows (N, D) · columns (M, D)ᵀ / τ, (N, M): the cosines of a contrastive loss.

    In fp32 whatever the autocast around it: at small τ the exponents lose too much in bf16.
    """
    with torch.autocast(rows.device.type, enabled=False):
        half = (torch.bfloat16, torch.float16)
        rows, columns = (z.float() if z.dtype in half else z for z in (rows, columns))
        return rows @ columns.T / temperature
