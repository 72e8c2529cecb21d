"""RSA (docs/spec/siblings.md §3): BYOL that trusts aggressive views less with time.

Two crops w₁, w₂ of an image are weak views; jitter, gray and blur on the same crops give the
aggressive views a₁, a₂. The online network sees a alone, the target w alone:

    L = Σ_{(i,j) = (1,2), (2,1)} [ β d(q_i, sg q_j) + (1 − β) d(q_i, t_j) ],   d(u, v) = 2 − 2 u·v

β falls from β₀ to 0 by a cosine over all steps. Only t is a target network's projection; q_j is the
online prediction, stopped. With an adversary a₁ is attacked against the direction (1, 2), and the
adversarial loss is L with x′ for a₁; the target never sees x′.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from idaa_lib.configs import ConfigError
from idaa_lib.configs.base import Positive, Share
from idaa_lib.methods.base import About, Batch, Moment, Step, register_method
from idaa_lib.methods.byol import BYOL
from idaa_lib.methods.protocols import Classifier, OfficialProtocol
from idaa_lib.methods.simsiam import negative_cosine
from idaa_lib.nets.resnet import start_as_torchvision, zero_residuals
from idaa_lib.views import Recipe, View

# Linear classifiers (§3.4): on small images, and on ImageNet ("mean-shift").
SMALL = Classifier("nesterov", 30.0, "drops_60_80", epochs=100, drop_last=True, drifts=True)
LARGE = Classifier(
    "sgd", 0.01, "drops_15_30", 40, weight_decay=1e-4, deviation=None, standardise=True, drifts=True
)
PHOTOMETRY = {"color", "color_diff", "grayscale", "blur"}  # what a weak view has none of


def distance(p: Tensor, z: Tensor) -> Tensor:
    """d = 2 − 2 p·z, z stopped: the mean over rows of L2-normalised p and z (B, D)."""
    return 2 + 2 * negative_cosine(p, z)


def beta(beta0: float, progress: Tensor | float, steps: int) -> Tensor:
    """β_s = β₀ (1 + cos(πs/S)) / 2 of step s = 1…S (spec §3.2): 0 at the last one.

    Args:
        progress: (s − 1) / S, the share that is done: on the device, so that a compiled or recorded
            step sees β move.
    """
    return beta0 * (1 + torch.cos(math.pi * (torch.as_tensor(progress) + 1 / steps))) / 2


@register_method("rsa")
class RSA(BYOL):
    class Options(BYOL.Options):
        """beta0: β at the start, in [0, 1]. momentum: τ at the start. rsa_views: `four`, or what
        BYOL sees under this recipe, two views for both networks, without β: `aggressive` (the
        baseline of RSA's tables) or `weak`."""

        own_heads_alone = True
        projection_dim: Positive = 128
        beta0: Share = 0.4
        rsa_views: Literal["four", "aggressive", "weak"] = "four"

    recordable = True
    last_bias = False

    @classmethod
    def check(cls, config: Any) -> None:
        weak, views = config.rsa_views == "weak", cls.draws(config)
        for field in ("condition", "augself"):
            if weak and (missing := sorted(PHOTOMETRY.intersection(getattr(config, field)))):
                raise ConfigError(
                    f"rsa_views='weak' draws no {missing[0]}, which {field} names: leave it out, "
                    f"or take rsa_views='four'."
                )
        super().check(config)
        if not (views - PHOTOMETRY if weak else views & PHOTOMETRY):
            raise ConfigError(
                f"augmentation={config.augmentation!r} draws no aggressive view for method='rsa': "
                f"take 'rsa', or another with colour or blur."
            )

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        start_as_torchvision(backbone)  # §3.2
        zero_residuals(backbone)
        super().__init__(options, backbone, about)

    @classmethod
    def official_protocol(cls, config: Any) -> OfficialProtocol:
        """That of the small images, or of ImageNet; also of the baseline."""
        large = config.stem == "imagenet"
        if large != (config.size >= 224) or config.stem == "mini":
            raise ConfigError(
                f"protocol='official' of RSA is for stem='cifar' below 224 px and for "
                f"stem='imagenet' from 224 px on, and the run has stem={config.stem!r} at "
                f"size={config.size}: take protocol='clean'."
            )
        if large:
            return OfficialProtocol(
                "RSA on ImageNet", "backbone", 0.1, "backbone", "last", 256, LARGE, knn_note=""
            )
        batch = config.batch_size
        return OfficialProtocol(
            "RSA", "backbone", 0.1, "backbone", "last", batch, SMALL, whole=True, knn_note=""
        )

    def recipes(self) -> list[tuple[str, Recipe]]:
        if self.options.rsa_views == "weak":
            return [("images", replace(self.recipe, jitter_probability=0, gray=0, blur=0))] * 2
        return super().recipes()

    def maker(self, recipe: Recipe) -> Callable[..., Any]:
        return recipe.pair if self.options.rsa_views == "four" else recipe.view

    def draw(self, images: Batch, batch: Batch, moment: Moment) -> tuple[View, ...]:
        """a₁, a₂ and their crops w₁, w₂; or the two views alone."""
        views: Any = super().draw(images, batch, moment)
        if self.options.rsa_views != "four":
            return views
        (w1, a1), (w2, a2) = views
        return a1, a2, w1, w2

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        (a1, a2), (w1, w2) = views[:2], views[-2:]
        online1, online2 = self.embed(a1), self.embed(a2)  # z, p (B, D)
        t1, t2 = self.aim(w1).z, self.aim(w2).z
        four = self.options.rsa_views == "four"
        weight = beta(self.options.beta0 * four, moment.progress, moment.steps)

        def direction(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
            return weight * distance(p, q) + (1 - weight) * distance(p, t)

        def both(p: Tensor) -> Tensor:
            return direction(p, online2.p, t2) + direction(online2.p, p, t1)

        step = self.two_view_step(
            both(online1.p),
            (a1, a2),
            (online1, online2),
            lambda e, at_start: direction(e.p, online2.p, t2),
            lambda e, v_adv: both(e.p),
        )
        step.parts |= {
            "beta": weight,
            "aggressive_weak": -negative_cosine(online1.p.detach(), t2),
            "aggressive_aggressive": -negative_cosine(online1.p.detach(), online2.p),
        }
        return step

    def after_step(self, step: Step, moment: Moment) -> None:
        """BYOL's, with τ of the next step: the official code averages at its start (§3.2)."""
        following = min(moment.step + 2, moment.steps)  # s + 1, where steps count from 1
        super().after_step(step, replace(moment, step=following))
