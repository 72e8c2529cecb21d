"""What an encoder keeps of how its views were drawn (docs/spec/siblings.md §1.7, §1.9).

Augmentations, here those of the recipe `cassle`, ask an encoder to forget them. CASSLE and AugSelf
let it remember: where, and how much, is measured on any run, in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.configs import ConfigError
from idaa_lib.evaluate.encoders import Encoder, load_method
from idaa_lib.evaluate.metrics import Interval, bootstrap_interval
from idaa_lib.methods.augself import differences
from idaa_lib.methods.base import Method, similarity
from idaa_lib.runs import Run
from idaa_lib.views import Recipe, View, keyed_generator, recipe

BATCH = 250


def single_augmentations(*units: Any) -> dict[str, Recipe]:
    """Recipes that do one thing each, to every image, as strongly as `cassle` does it; by name.

    units: size, mean and std.
    """
    whole, plain = recipe("cassle", *units), recipe("none", *units)
    return {
        "crop": replace(plain, crop_scale=whole.crop_scale),
        "flip": replace(plain, flip=1.0),
        "colour": replace(plain, jitter=whole.jitter, jitter_probability=1.0),
        "gray": replace(plain, gray=1.0),
        "blur": replace(plain, blur=1.0, kernels=whole.kernels),
    }


@torch.no_grad()
def invariance(run: Run, images: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Of each augmentation and layer the mean over images of cos(x, t(x)) − cos(x, t(other)).

    0: the layer sees no more of an image in its augmented view than in another's; towards 1: it is
    invariant. A row has `augmentation`, `layer` (`stem`, `stage 1` … of a ResNet, `features`,
    `projector`) and `value`, `low`, `high`, the 95 % interval over images. A conditioned projector
    is given the parameters of each view.

    Args:
        images: uint8 (N, 3, H, W).
    """
    method = load_method(run)
    units = method.recipe.size, method.recipe.mean, method.recipe.std
    transforms, plain = single_augmentations(*units), recipe("none", *units)
    generators = {name: keyed_generator(seed, i) for i, name in enumerate(transforms)}
    gaps: dict[tuple[str, str], list[Tensor]] = {}
    for part in _split(images):
        x = _layers(method, plain(part, None))
        for name, transform in transforms.items():
            for layer, y in _layers(method, transform(part, generators[name])).items():
                own, other = (F.cosine_similarity(x[layer], of) for of in (y, y.roll(1, 0)))
                gaps.setdefault((name, layer), []).append(own - other)
    return [
        {"augmentation": name, "layer": layer, **bootstrap_interval(torch.cat(gap))._asdict()}
        for (name, layer), gap in gaps.items()
    ]


def read_differences(encoder: Encoder, train: Any, test: Any, seed: int = 0) -> dict[str, Interval]:
    """R² of a ridge regression from [h_a ; h_b] to how two views differ, on test images.

    `colour` and `crop`: the differences that AugSelf predicts (`augself.differences`), the mean
    over their four entries; 0 is what their mean has. Each with its 95 % interval over images. The
    views are those of `cassle`; the penalty is chosen on the training images.

    Args:
        encoder: frozen; train, test: uint8 images (N, 3, H, W).
    """
    from sklearn.linear_model import RidgeCV

    views = recipe("cassle", *encoder[1:])
    (x, y), (x_test, y_test) = (
        _draw_pairs(encoder.module, images, views, (seed, number))
        for number, images in enumerate((train, test))
    )
    x, x_test = x.double(), x_test.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = ((h - mean) / std for h in (x, x_test))
    scores = {}
    for name, key in (("colour", "color"), ("crop", "crop")):
        ridge = RidgeCV(alphas=[10.0**k for k in range(-2, 6)])
        guess = ridge.fit(x.numpy(), y[key].double().numpy()).predict(x_test.numpy())
        scores[name] = measure_r2(torch.as_tensor(guess), y_test[key].double())
    return scores


@torch.no_grad()
def predict_differences(run: Run, images: Any, seed: int = 0) -> dict[str, Interval]:
    """R² of AugSelf's heads on images (N, 3, H, W), uint8, by head: 0 is what the mean has."""
    method = load_method(run)
    if not getattr(method.options, "augself", None):
        raise ConfigError(f"run={run.id!r} has no heads of AugSelf: give one that trained them.")
    backbone = method.network.get_submodule("backbone")
    pairs, targets = _draw_pairs(backbone, images, method.recipe, (seed,))
    outputs = method.network(pairs=pairs)
    return {
        name: measure_r2(output.tanh(), targets[name])
        for name, output in outputs.items()
        if name != "flip"  # a class, not a number
    }


@torch.no_grad()
def shuffle_condition(run: Run, images: Any, seed: int = 0) -> dict[str, Interval]:
    """InfoNCE in nats of a conditioned run on images (N, 3, H, W): with the right ω, with ω of
    another image, and their difference by image, which is what the projector makes of ω.

    `right`, `shuffled`, `difference`, each with its 95 % interval over images. Views are the run's
    own; negatives are the other images of batches of 250 at most; τ is the run's, or .2 where it
    has none.
    """
    method = load_method(run)
    if not getattr(method.options, "condition", None):
        raise ConfigError(f"run={run.id!r} is not conditioned: give one with a condition.")
    tau = getattr(method.options, "temperature", 0.2)
    generator = keyed_generator(seed)
    losses: dict[str, list[Tensor]] = {"right": [], "shuffled": []}
    for part in _split(images):
        views, own = [method.recipe(part, generator) for _ in range(2)], torch.arange(len(part))
        others = [View(v.images, {k: p.roll(1, 0) for k, p in v.params.items()}) for v in views]
        for name, pair in (("right", views), ("shuffled", others)):
            z1, z2 = (F.normalize(method.embed(view).z, dim=1) for view in pair)
            logits = similarity(z1, z2, tau)
            losses[name].append(F.cross_entropy(logits, own, reduction="none"))
    right, shuffled = (torch.cat(values) for values in losses.values())
    parts = {"right": right, "shuffled": shuffled, "difference": shuffled - right}
    return {name: bootstrap_interval(values) for name, values in parts.items()}


def _split(images: Any) -> Iterator[Tensor]:
    """Batches of equal size, which a mean over negatives asks for, of uint8 images (N, 3, H, W), a
    tensor or what `ImageSet.images` is where they lie in a file."""
    for index in torch.arange(len(images)).tensor_split(-(-len(images) // BATCH)):
        yield images[index]


def measure_r2(predictions: Tensor, targets: Tensor) -> Interval:
    """R² of predictions (N, K), the mean over K targets, with its 95 % interval over rows."""
    errors = (predictions - targets).square() / targets.var(0, unbiased=False)
    return bootstrap_interval(1 - errors.mean(1))


@torch.no_grad()
def _draw_pairs(
    embed: Any, images: Any, views: Recipe, key: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """[h_a ; h_b] (N, 2C) of two views of each image, and how the views differ (`differences`)."""
    features, params = [], []
    for number in (0, 1):
        generator = keyed_generator(*key, number)
        parts = [views(part, generator) for part in _split(images)]
        features.append(torch.cat([embed(view.images) for view in parts]))
        params.append({k: torch.cat([view.params[k] for view in parts]) for k in parts[0].params})
    return torch.cat(features, 1), differences(params[0], params[1], views)


def _layers(method: Method, view: View) -> dict[str, Tensor]:
    """Outputs (B, ·) of the layers of a method's network, for the view's images: of a ResNet the
    stem and the stages too."""
    backbone: Any = method.network.get_submodule("backbone")
    stages = {f"stage {k}": getattr(backbone, f"layer{k}", [None])[-1] for k in (1, 2, 3, 4)}
    layers: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: layers.update({name: output.flatten(1)})

    with ExitStack() as hooks:
        for name, part in ({"stem": getattr(backbone, "maxpool", None)} | stages).items():
            if part:
                hooks.enter_context(part.register_forward_hook(keep(name)))
        embedding = method.embed(view)
    layers["features"] = embedding.h
    return layers if embedding.z is None else layers | {"projector": embedding.z}
