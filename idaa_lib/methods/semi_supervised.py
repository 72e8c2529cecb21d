"""What semi-supervised methods share: labelled and unlabelled images, two strengths of view, and
averaged weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from idaa_lib.configs import ConfigError, SemiConfig
from idaa_lib.methods.base import (
    Batch,
    Method,
    Step,
    backbone_of,
    follow,
    frozen_copy,
    share_of_numbers,
)
from idaa_lib.nets.heads import Classifier, Embedder
from idaa_lib.views import Recipe, View, compile_view, keyed_generator
from idaa_lib.views.randaugment import RandAugment

# Streams of random numbers, the last part of the key, beside those of the training loop.
LABELLED, UNLABELLED, SUBSET = 4, 5, 6


def labelled_subset(labels: Tensor, per_class: int, classes: int, seed: int) -> Tensor:
    """Indices (classes · per_class,), sorted, of the images whose labels (N,) are used.

    Raises:
        ConfigError: a class has fewer images.
    """
    order = torch.randperm(len(labels), generator=keyed_generator(seed, 0, 0, SUBSET))
    chosen = []
    for label in range(classes):
        members = order[labels[order] == label]
        if len(members) < per_class:
            raise ConfigError(
                f"labels_per_class={per_class} is more than the {len(members)} training images of "
                f"class {label} (of 0 … {classes - 1})."
            )
        chosen.append(members[:per_class])
    return torch.cat(chosen).sort().values


def stream(items: Tensor, size: int, first: int, key: tuple[int, int]) -> Iterator[Tensor]:
    """Batches of `size` from an endless row of permutations of `items`, from batch `first` on.

    Any batch is known without those before it, and all items come up equally often.
    """
    seed, stream = key

    @functools.lru_cache(2)
    def permutation(turn: int) -> Tensor:
        return items[torch.randperm(len(items), generator=keyed_generator(seed, turn, 0, stream))]

    place = first * size
    while True:
        parts, end = [], place + size
        while place < end:
            turn, offset = divmod(place, len(items))
            parts.append(permutation(turn)[offset : offset + end - place])
            place += len(parts[-1])
        yield torch.cat(parts)


class SemiSupervised(Method):
    """Sees B labelled and μ·B unlabelled images a step, and is judged by averaged weights.

    Fields:
        ema: the network's moving average, decay `ema_decay`, of parameters alone; BatchNorm's
            statistics, which move as slowly, are copied.
        labels: of all training images (N,), −1 where unknown, where a loss finds those of a batch
            (`batches` is told them). all_labelled: whether none is unknown.
    """

    labels: Tensor

    def __init__(self, config: SemiConfig, recipe: Recipe, classes: int) -> None:
        network = Classifier(backbone_of(config), classes)
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d) and not name.endswith("_adv"):
                module.momentum = 1 - config.ema_decay
        super().__init__(network, recipe, config.weight_decay)
        self.config, self.classes = config, classes
        self.ema = frozen_copy(network)
        self.strong = RandAugment(
            recipe.size, recipe.mean, recipe.std, flip=recipe.flip, shift=recipe.shift
        )
        self.augment_strongly: Callable[[Tensor, Tensor], View] = self.strong.view
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long), persistent=False)
        self.all_labelled = False

    def steps_per_epoch(self, labels: Tensor, batch_size: int) -> int:
        """As configured, else as many as one pass over the unlabelled images takes."""
        one_pass = len(labels) // (self.config.mu * batch_size)
        return self.config.steps_per_epoch or max(1, one_pass)

    def images_per_step(self, batch_size: int) -> int:
        return (1 + self.config.mu) * batch_size

    def batches(self, labels: Tensor, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """`labelled` (B,) and, of all images, `images` (μ·B,)."""
        if not torch.equal(self.labels.cpu(), labels):  # else where they are, for a recorded step
            self.labels, self.all_labelled = (
                labels.to(self.labels.device),
                bool((labels >= 0).all()),
            )
        known = labelled_subset(labels, self.config.labels_per_class, self.classes, seed)
        steps = self.steps_per_epoch(labels, batch_size)
        labelled = stream(known, batch_size, epoch * steps, (seed, LABELLED))
        every = torch.arange(len(labels))
        images = stream(every, self.config.mu * batch_size, epoch * steps, (seed, UNLABELLED))
        for _ in range(steps):
            yield {"labelled": next(labelled), "images": next(images)}

    def draw(
        self, images: Batch, generator: torch.Generator, shard: tuple[int, int] = (0, 1)
    ) -> tuple[View, ...]:
        """A weak view of the labelled images, a weak and a strong one of the unlabelled."""
        labelled = self.view(images["labelled"], generator, shard)
        weak = self.view(images["images"], generator, shard)
        numbers = share_of_numbers(self.strong, images["images"], generator, shard)
        return labelled, weak, self.augment_strongly(images["images"], numbers)

    def compile_parts(self) -> None:
        super().compile_parts()
        self.augment_strongly = compile_view(self.strong)

    def after_step(self, step: Step, progress: float) -> None:
        follow(self.ema, self.network, self.config.ema_decay)
        for average, present in zip(self.ema.buffers(), self.network.buffers(), strict=True):
            average.copy_(present)

    def encoder(self, layer: str) -> nn.Module:
        """Of the averaged weights: `backbone` gives the pooled features, `projector` the same,
        L2-normalised, which InfoNCE compares; `classifier` the logits (B, C)."""
        backbone, head = (self.ema.get_submodule(name) for name in ("backbone", "head"))
        parts: dict[str, nn.Module] = {
            "backbone": backbone,
            "projector": Embedder(backbone, nn.Identity()),
            "classifier": nn.Sequential(backbone, head),
        }
        if layer not in parts:
            raise ValueError(f"layer must be one of {', '.join(parts)}, and is {layer!r}.")
        return parts[layer]
