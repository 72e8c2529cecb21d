"""Networks: backbones by name, the VAE, heads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from idaa_lib.registry import CHOICES, register

BACKBONES: dict[str, Callable[..., nn.Module]] = CHOICES["backbone"]
_making = threading.RLock()


def register_backbone(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Make a backbone available as `backbone=name` in every configuration.

    What is registered is called as f(width=, stem=, adversarial_norms=) and gives a module with an
    attribute `feature_dim`, D, and `forward(images (B, 3, H, W), adversarial=False) → (B, D)`.
    """
    return register("backbone", name)


def build_backbone(name: str, *, width: int, stem: str, adversarial_norms: bool) -> Any:
    """The registered backbone `name`; ValueError where there is none, or it has no feature_dim."""
    if name not in BACKBONES:
        raise ValueError(
            f"backbone must be one of {', '.join(BACKBONES)}, and is {name!r} (your own: import "
            f"the module that registers it first)."
        )
    backbone = BACKBONES[name](width=width, stem=stem, adversarial_norms=adversarial_norms)
    if not hasattr(backbone, "feature_dim"):
        raise ValueError(f"backbone {name!r} needs an attribute feature_dim, its features' number.")
    return backbone


@contextlib.contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Networks made inside the block draw their weights from `seed`.

    One block at a time: torch has one generator for all threads, and a widget's thread that made
    a network meanwhile would change both.
    """
    with _making:
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """`module` in eval mode inside the block, every submodule back in its own mode after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes.items():
            part.training = mode


from idaa_lib.nets import resnet as _resnet  # noqa: E402 - registers its backbones
from idaa_lib.nets import wrn as _wrn  # noqa: E402
