"""What a method is to the training loop (contract: docs/architecture.md, "A method").

The loop draws `batches`, asks `draw` for views and `step` for a `Step`, lets the adversary change
`step.attacked` against `step.attack_loss`, adds α · `step.adversarial_loss(x′)`, and steps. It
never asks which method it runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from idaa_lib.configs import ConfigError, EncoderConfig, SSLConfig
from idaa_lib.nets import build_backbone, initial_weights
from idaa_lib.views import Recipe, View, compile_view, keyed_generator

Batch = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


@dataclass
class Step:
    """One training step's parts, which share their embeddings by closure.

    Fields:
        loss: scalar with graph; parts: named scalars to be logged.
        attacked: images (B, 3, H, W) that an adversary may change.
        attack_loss(x, at_start=False): scalar to be ascended.
        adversarial_loss(x′): scalar with graph.
        embeddings: the positive pairs (B, D), (B, D), L2-normalised, for collapse diagnostics.
        shown: label → normalised images (B, 3, H, W), detached, for who watches; a pair of them
            stands for its difference. References only: nothing is computed for a picture that
            nobody may ever see.
        carry: what `after_step` needs.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    attacked: Tensor | None = None
    attack_loss: Callable[..., Tensor] | None = None
    adversarial_loss: Callable[[Tensor], Tensor] | None = None
    embeddings: tuple[Tensor, Tensor] | None = None
    shown: dict[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    carry: dict[str, Any] = field(default_factory=dict)


class OfficialProtocol(NamedTuple):
    """How the official code judges a method's encoder (docs/spec/idaa.md §5).

    Fields:
        of: whose protocol it is. knn, linear: the layer that each of the two looks at.
        temperature: of kNN, which is that of the best epoch on test.
        linear_epoch: the epoch that the linear classifier is of, that one (`best`) or the `last`.
        batch_size: of the linear classifier.
        crops: the linear classifier is trained on random crops, as on ImageNet.
    """

    of: str
    knn: str
    temperature: float
    linear: str
    linear_epoch: Literal["best", "last"]
    batch_size: int
    crops: bool = False


class Method(nn.Module):
    """Base of all methods.

    `network` holds what is trained; the loop replaces it by what Accelerate prepares, so a method
    must call `self.network(…)` as a whole: a call of an inner part would skip the gradient
    exchange between processes. All state that training needs is in `state_dict()`.

    views: how many of each image `draw` makes. recordable: whether `step` does nothing but launch
    work on the device, always the same, on tensors that stay where they are: then a CUDA graph can
    stand for it (`compile=True`). official: the published evaluation; SimSiam's, of backbone
    features, where nothing is published for a method with IDAA.
    """

    views = 2
    recordable = True
    official = OfficialProtocol("SimSiam", "backbone", 0.5, "backbone", "best", 256)

    def __init__(self, network: nn.Module, recipe: Recipe, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.weight_decay = weight_decay
        self.augment: Callable[[Tensor, Tensor], View] = recipe.view

    @classmethod
    def official_protocol(cls, config: SSLConfig) -> OfficialProtocol:
        """The published evaluation of a run with this configuration."""
        return cls.official

    def steps_per_epoch(self, labels: Tensor, batch_size: int) -> int:
        """How many batches `batches` yields."""
        return len(labels) // batch_size

    def images_per_step(self, batch_size: int) -> int:
        """How many images a batch of `batches` names, for images/s."""
        return batch_size

    def batches(self, labels: Tensor, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Global batches of an epoch as named index tensors (int64): one permutation, drop last.

        labels: (N,) of all training images, −1 where unknown, for methods that choose by them.
        """
        n = len(labels)
        order = torch.randperm(n, generator=keyed_generator(seed, epoch, 0, 0))
        for start in range(0, n - batch_size + 1, batch_size):
            yield {"images": order[start : start + batch_size]}

    def draw(
        self, images: Batch, generator: torch.Generator, shard: tuple[int, int] = (0, 1)
    ) -> tuple[View, ...]:
        """Random views of uint8 images (B, 3, H, W); `shard` as in `view`."""
        return tuple(self.view(images["images"], generator, shard) for _ in range(self.views))

    def view(self, images: Tensor, generator: torch.Generator, shard: tuple[int, int]) -> View:
        """One view of each image; shard is (rank, processes)."""
        return self.augment(images, share_of_numbers(self.recipe, images, generator, shard))

    def step(self, views: tuple[View, ...], batch: Batch) -> Step:
        raise NotImplementedError

    def with_fixed_weights(self, images: Tensor, **how: Any) -> Any:
        """What the network gives, with a gradient back to the images alone: for an attack's loss.

        A compiled network computes the gradients of all that asks for one, whoever is interested.
        """
        fixed = {name: value.detach() for name, value in self.network.named_parameters()}
        return functional_call(self.network, fixed, (images,), how)

    def compile_parts(self) -> None:
        """Compile what gains by it (`compile=True`), which changes rounding and nothing else."""
        self.augment = compile_view(self.recipe)
        self.network.compile(dynamic=False)  # a few sizes, each with kernels of its own

    def param_groups(self, epochs: int, steps_per_epoch: int) -> list[dict[str, Any]]:
        """Groups with `params`, `lr_scale`, `weight_decay`, `schedule` (global step → factor).

        By default one group of all parameters.
        """
        schedule = self.schedule(epochs, steps_per_epoch)
        params = list(self.network.parameters())
        group = dict(params=params, lr_scale=1.0, weight_decay=self.weight_decay)
        return [group | {"schedule": schedule}]

    def schedule(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        """Factor of the learning rate by global step; constant by default."""
        return lambda step: 1.0

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        # Fused: one kernel for all parameters, on the CPU too; the arithmetic is Adam's.
        return torch.optim.Adam(groups, lr=lr, fused=True)

    def encoder(self, layer: str) -> nn.Module:
        """What is evaluated: images (B, 3, H, W) → features (B, D).

        `backbone` gives h; `projector` the embedding z that the loss compares. The default suits a
        network with an attribute `backbone` whose own output is z, or that has an `embedder` which
        gives z; others override it.
        """
        if layer not in ("backbone", "projector"):
            raise ValueError(f"layer must be backbone or projector, and is {layer!r}.")
        if layer == "backbone":
            return self.network.get_submodule("backbone")
        return getattr(self.network, "embedder", self.network)

    def on_epoch_start(self, epoch: int, images: Tensor, generator: torch.Generator) -> None:
        """Before an epoch's first step (not again when resuming inside the epoch)."""

    def after_step(self, step: Step, progress: float) -> None:
        """After the optimiser has stepped: queues, moving averages.

        progress: the share of the training that was done before this step, in [0, 1).
        """


METHODS: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Make a method available as `method=name`; it is built as cls(config, recipe)."""

    def register(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        return cls

    return register


def method_class(name: str) -> type[Method]:
    """The registered method `name`.

    Raises:
        ConfigError: no method has this name.
    """
    if name not in METHODS:
        raise ConfigError(
            f"method must be one of {', '.join(METHODS)}, and is {name!r} (your own: import the "
            f"module that registers it first)."
        )
    return METHODS[name]


def build_method(config: SSLConfig, recipe: Recipe) -> Method:
    """The method that `config.method` names, with initial weights drawn from `config.seed`.

    Raises:
        ConfigError: no method has this name.
    """
    made: Any = method_class(config.method)
    with initial_weights(config.seed):
        return made(config, recipe)


def backbone_of(config: EncoderConfig) -> Any:
    """The backbone that `config` names, with adversarial norms where it names an adversary."""
    return build_backbone(
        config.backbone,
        width=config.width,
        stem=config.stem,
        adversarial_norms=config.adversary != "none",
    )


def anchored(embed: Callable[[], Tensor], reuse: bool = True) -> Callable[[Tensor, bool], Tensor]:
    """What an attack loss compares with: the attacked view's own embedding, stopped.

    Gives a function of the embedding z at hand and of whether this is the attack's start. There the
    images are the view itself, so z is it: exact, a pass saved. `embed()` makes it elsewhere, or
    where nothing is to be reused. It stays the same through all steps of the attack.
    """
    anchor: Tensor | None = None

    def of(z: Tensor, at_start: bool) -> Tensor:
        nonlocal anchor
        if anchor is None and at_start and reuse:
            anchor = z.detach()
        elif anchor is None:
            with torch.no_grad():
                anchor = embed()
        return anchor

    return of


def two_view_step(
    loss: Tensor,
    views: tuple[View, ...],
    batch: Batch,
    embeddings: tuple[Tensor, Tensor],
    **attack: Any,
) -> Step:
    """The `Step` of a loss of two views whose first is attacked.

    embeddings: of both (B, D). attack: `attack_loss`, `adversarial_loss`, and other fields.
    """
    v1, v2 = (view.images for view in views)
    return Step(
        loss,
        attacked=v1,
        embeddings=(embeddings[0].detach(), embeddings[1].detach()),
        shown={"view 1": v1, "view 2": v2},
        **attack,
    )


def similarity(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """rows (N, D) · columns (M, D)ᵀ / τ, (N, M): the cosines of a contrastive loss.

    In fp32 whatever the autocast around it: at small τ the exponents lose too much in bf16.
    """
    with torch.autocast(rows.device.type, enabled=False):
        half = (torch.bfloat16, torch.float16)
        rows, columns = (z.float() if z.dtype in half else z for z in (rows, columns))
        return rows @ columns.T / temperature


def frozen_copy(network: M) -> M:
    """A twin that no optimiser trains: what starts as a key encoder or a target network."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target ← m · target + (1 − m) · online, parameter by parameter.

    The target's parameters are the first of `online`'s, in its order, whatever wraps that one;
    BatchNorm statistics are each network's own.
    """
    theirs: list[Tensor] = [*target.parameters()]
    ours: list[Tensor] = [p for p, _ in zip(online.parameters(), theirs, strict=False)]
    torch._foreach_lerp_(theirs, ours, 1 - momentum)


def share_of_numbers(
    recipe: Recipe, images: Tensor, generator: torch.Generator, shard: tuple[int, int]
) -> Tensor:
    """Random numbers of one view of each of the B images of this process, shard (rank, processes).

    They are drawn for the global batch of processes · B images and the part of this rank is kept,
    so that n processes draw what one would.
    """
    rank, processes = shard
    b = len(images)
    return recipe.numbers(processes * b, generator)[rank * b : (rank + 1) * b]


class _Gather(torch.autograd.Function):
    """All processes' rows; each row's gradient is the sum of what every process has for it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(z: Tensor) -> Tensor:
    """Embeddings (B, D) of all processes (processes · B, D), with gradient; z itself for one.

    Every process then has the whole loss, and the mean of gradients that DistributedDataParallel
    takes is the gradient of one process with the whole batch.
    """
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    return z if alone else _Gather.apply(z)


def momentum_sgd(
    groups: list[dict[str, Any]], lr: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """SGD as all methods but SimCLR have it: heavy-ball momentum, decay of every parameter."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)


def epoch_cosine(epochs: int, steps_per_epoch: int, delay: int = 0) -> Callable[[int], float]:
    """A cosine over `epochs`, stepped per epoch: constant through epoch `delay`, then one step of
    the cosine an epoch."""

    def factor(step: int) -> float:
        steps = max(0, step // steps_per_epoch - delay)
        return 0.5 * (1 + math.cos(math.pi * steps / epochs))

    return factor
