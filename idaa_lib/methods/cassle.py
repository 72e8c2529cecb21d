"""CASSLE (Przewięźlikowski et al. 2023; docs/spec/siblings.md §1): a projector that is given the
parameters of the augmentation.

z_v = π([h_v ; γ(ω_v)]): ω_v describes how view v was drawn, and the loss stays the method's. The
projector can then compare views without the backbone forgetting what augmentations change; only
the backbone is used later. With an adversary x′ keeps the ω of its view. What is here serves every
method whose `Options` are `Conditioned.Options`; AugSelf's heads (`augself`) are added here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor, nn

from idaa_lib import configs
from idaa_lib.configs import ConfigError
from idaa_lib.configs.base import NonNegative, Positive
from idaa_lib.methods.augself import (
    augself_head,
    difference_heads,
    difference_losses,
    relative_color,
    relative_crop,
)
from idaa_lib.methods.base import About, Method, Step, build_method
from idaa_lib.nets.heads import ConditionedProjector, Embedding, Hypernetwork, mlp
from idaa_lib.nets.resnet import zero_residuals
from idaa_lib.views import Params, Recipe, View
from idaa_lib.views import recipe as find_recipe

# Values of each key of ω, those of a view without augmentation.
NEUTRAL = {
    **{"blur": (0,), "color": (0, 0, 0, 0), "color_diff": (0, 0, 0)},
    **{"crop": (0.5, 0.5, 1, 1), "flip": (0,), "grayscale": (0,)},
}
MOST_WEIGHTS = 2_000_000  # that a hypernetwork may emit for a sample


def describe(params: Params, keys: Sequence[str], recipe: Recipe) -> Tensor:
    """ω (B, D): the parameters of views by `recipe`, the keys in alphabetical order (§1.2).

    `crop`: centre and size as fractions of the source, the centre mirrored where flipped; `color`
    in [−½, ½]; `blur`: σ in pixels; `color_diff`, `flip` and `grayscale` as in `views.Params`.
    """
    y, x, height, width = relative_crop(params).split(1, 1)
    x = torch.where(params["flip"] > 0, 1 - x, x)
    parts = {
        "blur": params["blur"],
        "color": relative_color(params, recipe),
        "color_diff": params["color_diff"],
        "crop": torch.cat([y, x, height, width], 1),
        "flip": params["flip"],
        "grayscale": params["gray"],
    }
    return torch.cat([parts[key] for key in sorted(keys)], 1)


def neutral_condition(keys: Sequence[str]) -> list[float]:
    """ω of a view without augmentation (§1.2)."""
    return [value for key in sorted(keys) for value in NEUTRAL[key]]


def _views(config: Any) -> Recipe:
    return find_recipe(config.augmentation, config.size, (0, 0, 0), (1, 1, 1))


def _in_order(keys: tuple[str, ...]) -> tuple[str, ...]:
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"condition names {key!r} twice: leave one of them out.")
    return tuple(sorted(keys))


def _sort(weights: dict[str, float]) -> dict[str, float]:
    return {name: weight for name, weight in sorted(weights.items()) if weight}


Key = Literal["blur", "color", "color_diff", "crop", "flip", "grayscale"]
Head = Literal["blur", "color", "crop", "flip"]


class Conditioned(Method):
    """A method whose projector may be conditioned, and whose backbone may predict differences."""

    class Options(configs.Options):
        """condition: what of a view's parameters the projector is given, of blur, color,
        color_diff, crop, flip and grayscale; empty: nothing. injection: how it is given;
        `hypernetwork` is a toy. gamma: γ is an MLP, or the parameters `raw`. gamma_depth,
        gamma_width: layers of the MLP and their width.
        augself: weights of AugSelf's heads, as in "crop=0.5, color=0.5". heads: the method's `own`,
        or those of AugSelf's code (`augself`) with its initial weights and scale of the loss
        (§1.4): the default where there is a condition or augself."""

        own_heads_alone: ClassVar[bool] = False  # whether there are no others for the method

        condition: Annotated[tuple[Key, ...], AfterValidator(_in_order)] = ()
        injection: Literal["concatenate", "add", "multiply", "hypernetwork"] = "concatenate"
        gamma: Literal["mlp", "raw"] = "mlp"
        gamma_depth: Positive = 6
        gamma_width: Positive = 64
        augself: Annotated[dict[Head, NonNegative], AfterValidator(_sort)] = Field({})
        heads: Literal["own", "augself"] | None = Field(None, validate_default=True)

        @field_validator("heads")
        @classmethod
        def _choose_heads(cls, heads: str | None, info: ValidationInfo) -> str | None:
            if cls.own_heads_alone:
                if heads == "augself":
                    raise ConfigError("heads='augself' is not for this method: leave it out.")
                return None
            if info.data.get("condition") or info.data.get("augself"):
                return heads or "augself"
            return "augself" if heads == "augself" else None

    @classmethod
    def draws(cls, config: Any) -> set[str]:
        """The keys of ω that differ between views of a configuration's augmentation."""
        views = _views(config)
        happens = {
            "crop": views.crop_scale is not None,
            "flip": views.flip,
            "color": views.jitter_probability,
            "color_diff": views.jitter_probability,
            "blur": views.blur,
            "grayscale": views.gray,
        }
        return {key for key, probability in happens.items() if probability}

    @classmethod
    def check(cls, config: Any) -> None:
        super().check(config)
        for field in ("condition", "augself"):
            missing = sorted(set(getattr(config, field)) - cls.draws(config))
            if missing:
                raise ConfigError(
                    f"augmentation={config.augmentation!r} draws no {missing[0]}, which {field} "
                    f"names: leave it out, or take another augmentation, such as 'cassle'."
                )
        if config.condition and config.injection != "concatenate":
            with torch.device("meta"):  # whether the projector can be, before data are read
                build_method(config, About(_views(config)))

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        if self.has_augself_heads:  # its initial weights
            for module in backbone.modules():
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()
            zero_residuals(backbone)

    @property
    def has_augself_heads(self) -> bool:
        """Whether heads and scale of the loss are those of AugSelf's code."""
        return self.options.heads == "augself"

    def condition_projector(self, features: int, build: Callable[[int], nn.Module]) -> nn.Module:
        """The projector that `build` makes for so many inputs, conditioned as the options say."""
        own = self.options
        if not own.condition:
            return build(features)
        neutral = neutral_condition(own.condition)
        count = len(neutral)

        def gamma(outputs: int) -> nn.Module:
            width, depth = own.gamma_width, own.gamma_depth
            return augself_head(count, width, outputs, depth, last_norm=True)

        if own.injection == "hypernetwork":
            layers = [layer for layer in build(features).modules() if isinstance(layer, nn.Linear)]
            sides = [features, *(layer.out_features for layer in layers)]
            if (weights := Hypernetwork.count(sides)) > MOST_WEIGHTS:
                raise ConfigError(
                    f"injection='hypernetwork' would emit {weights:,} weights for each image, and "
                    f"{MOST_WEIGHTS:,} are the most: take 'concatenate', or a narrower network."
                )
            return Hypernetwork(sides, gamma, neutral)
        width = own.gamma_width if own.injection == "concatenate" else features
        if own.gamma == "raw" and own.injection != "concatenate" and count != features:
            raise ConfigError(
                f"injection={own.injection!r} with gamma='raw' needs as many values in condition "
                f"({count}) as there are features ({features}): take gamma='mlp'."
            )
        code = gamma(width) if own.gamma == "mlp" else nn.Identity()
        added = (width if own.gamma == "mlp" else count) * (own.injection == "concatenate")
        return ConditionedProjector(build(features + added), code, own.injection, neutral)

    def two_layer_projector(self, features: int, dim: int) -> nn.Module:
        """SimCLR's and MoCo's, conditioned as the options say; AugSelf's code has a BatchNorm."""
        augself = self.has_augself_heads
        return self.condition_projector(
            features, lambda inputs: mlp(inputs, features, dim, norm=augself, bias=not augself)
        )

    def describe(self, view: View) -> Tensor | None:
        keys = self.options.condition
        return describe(view.params, keys, self.recipe) if keys else None

    def add_difference_heads(self, features: int) -> None:
        """AugSelf's heads, last in `network`, where there are any."""
        if self.options.augself:
            self.network.add_module("differences", difference_heads(features, self.options.augself))

    def two_view_step(
        self,
        loss: Tensor,
        views: tuple[View, ...],
        embeddings: tuple[Embedding, Embedding],
        *attack: Any,
    ) -> Step:
        """As `Method.two_view_step`; with AugSelf's losses of the clean views where asked for."""
        step = super().two_view_step(loss, views, embeddings, *attack)
        if weights := self.options.augself:
            losses = difference_losses(
                lambda pairs: self.network(pairs=pairs),
                (embeddings[0].h, embeddings[1].h),
                (views[0].params, views[1].params),
                self.recipe,
            )
            step.loss = loss + sum(weights[name] * value for name, value in losses.items())
            step.parts = {f"augself_{name}": value for name, value in losses.items()}
        return step
