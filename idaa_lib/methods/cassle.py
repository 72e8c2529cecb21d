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
from idaa_lib.methods.base import About, Step, build_method
from idaa_lib.methods.contrastive import TwoViews
from idaa_lib.nets.heads import ConditionedProjector, Hypernetwork, mlp
from idaa_lib.nets.resnet import zero_residuals
from idaa_lib.views import Params, Recipe, View
from idaa_lib.views import recipe as find_recipe

# Values of each key of ω, those of a view without augmentation.
NEUTRAL = {
    "blur": (0,),
    "color": (0, 0, 0, 0),
    "color_diff": (0, 0, 0),
    "crop": (0.5, 0.5, 1, 1),
    "flip": (0,),
    "grayscale": (0,),
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


def restart(backbone: nn.Module) -> None:
    """Draw AugSelf's initial weights (§1.4): torch's own; residual branches start at 0."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    zero_residuals(backbone)


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


class Conditioned(TwoViews):
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

    # Whether its weights are drawn before those that AugSelf's code gives the backbone.
    projector_first = False

    @classmethod
    def draws(cls, config: Any) -> set[str]:
        """The keys of ω that differ between views of a configuration's augmentation."""
        views = _views(config)
        happens = {
            "crop": views.crop_scale,
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
            if missing := sorted(set(getattr(config, field)) - cls.draws(config)):
                raise ConfigError(
                    f"augmentation={config.augmentation!r} draws no {missing[0]}, which {field} "
                    f"names: leave it out, or take another augmentation, such as 'cassle'."
                )
        for field in ("injection", "gamma", "gamma_depth", "gamma_width"):
            value = getattr(config, field)
            if value == cls.Options.model_fields[field].default:
                continue
            if not config.condition:
                raise ConfigError(
                    f"{field}={value!r} is of a condition, and there is none: name one, as in "
                    f"condition='crop, color', or leave {field} out."
                )
            if config.gamma == "raw" and field.startswith("gamma_"):
                raise ConfigError(
                    f"{field}={value} is of an MLP, and gamma='raw' has none: leave one out."
                )
        if config.condition and config.injection != "concatenate":
            if (config.injection, config.gamma) == ("hypernetwork", "raw"):
                raise ConfigError("gamma='raw' is not for injection='hypernetwork': leave it out.")
            # Whether the projector can be, before data are read; the user's generator stays.
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                build_method(config, About(_views(config)))

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        augself = options.heads == "augself"
        if augself and not self.projector_first:
            restart(backbone)
        super().__init__(options, backbone, about)
        if augself and self.projector_first:
            restart(backbone)
        if options.augself:
            self.network.add_module("differences", difference_heads(self.features, options.augself))

    @property
    def has_augself_heads(self) -> bool:
        """Whether heads and scale of the loss are those of AugSelf's code."""
        return self.options.heads == "augself"

    def projector(self, inputs: int, dim: int) -> nn.Module:
        """SimCLR's and MoCo's; AugSelf's code has a BatchNorm."""
        augself = self.has_augself_heads
        return mlp(inputs, self.features, dim, norm=augself, bias=not augself)

    def condition_projector(self, build: Callable[[int], nn.Module]) -> nn.Module:
        own, features = self.options, self.features
        if not own.condition:
            return build(features)
        neutral = neutral_condition(own.condition)
        count, concatenates = len(neutral), own.injection == "concatenate"

        def gamma(outputs: int) -> nn.Module:
            return augself_head(count, own.gamma_width, outputs, own.gamma_depth, last_norm=True)

        if own.injection == "hypernetwork":
            layers = [layer for layer in build(features).modules() if isinstance(layer, nn.Linear)]
            sides = [features, *(layer.out_features for layer in layers)]
            if (weights := Hypernetwork.count(sides)) > MOST_WEIGHTS:
                raise ConfigError(
                    f"injection='hypernetwork' would emit {weights:,} weights for each image, and "
                    f"{MOST_WEIGHTS:,} are the most: take 'concatenate', or a narrower network."
                )
            return Hypernetwork(sides, gamma, neutral)
        if own.gamma == "mlp":
            width = own.gamma_width if concatenates else features
            code = gamma(width)
        elif concatenates or count == features:
            width, code = count, nn.Identity()
        else:
            raise ConfigError(
                f"injection={own.injection!r} with gamma='raw' needs as many values in condition "
                f"({count}) as there are features ({features}): take gamma='mlp'."
            )
        head = build(features + width if concatenates else features)
        return ConditionedProjector(head, code, own.injection, neutral)

    def describe(self, view: View) -> Tensor | None:
        keys = self.options.condition
        return describe(view.params, keys, self.recipe) if keys else None

    def two_view_step(self, loss: Tensor, views: Any, embeddings: Any, *attack: Any) -> Step:
        """With AugSelf's losses of the clean views where asked for."""
        step = super().two_view_step(loss, views, embeddings, *attack)
        if weights := self.options.augself:
            losses = difference_losses(
                lambda pairs: self.network(pairs=pairs),
                [e.h for e in embeddings],
                [view.params for view in views],
                self.recipe,
            )
            step.loss = loss + sum(weights[name] * value for name, value in losses.items())
            step.parts = {f"augself_{name}": value for name, value in losses.items()}
        return step
