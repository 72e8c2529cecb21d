"""Which images a semi-supervised step sees: those that keep their label, and endless streams."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from idaa_lib.configs import ConfigError
from idaa_lib.views import keyed_generator

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
