"""What an encoder keeps of how its views were drawn (docs/spec/siblings.md §1.7, §1.9).

Augmentations, here those of the recipe `cassle`, ask an encoder to forget them. CASSLE and AugSelf
let it remember: where, and how much, is measured on any run, in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.configs import ConfigError
from idaa_lib.evaluate.encoders import Encoder, load_method
from idaa_lib.evaluate.metrics import Interval, bootstrap_interval
from idaa_lib.methods.augself import differences
from idaa_lib.methods.base import Method, similarity
from idaa_lib.nets import evaluating
from idaa_lib.runs import Run
from idaa_lib.views import Params, Recipe, View, keyed_generator, recipe

BATCH = 250


def single_augmentations(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Recipes that do one thing each, to every image, as strongly as `cassle` does it; by name."""
    whole, plain = recipe("cassle", size, mean, std), recipe("none", size, mean, std)
    return {
        "crop": replace(plain, crop_scale=whole.crop_scale),
        "flip": replace(plain, flip=1.0),
        "colour": replace(plain, jitter=whole.jitter, jitter_probability=1.0),
        "gray": replace(plain, gray=1.0),
        "blur": replace(plain, blur=1.0, kernels=whole.kernels),
    }


@torch.no_grad()
def invariance(run: Run, images: Tensor, seed: int = 0) -> list[dict[str, Any]]:
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
    with evaluating(method):
        for part in images.split(BATCH):
            x = _layers(method, plain(part, None))
            for name, transform in transforms.items():
                y = _layers(method, transform(part, generators[name]))
                for layer, outputs in y.items():
                    own = F.cosine_similarity(x[layer], outputs)
                    other = F.cosine_similarity(x[layer], outputs.flip(0))
                    gaps.setdefault((name, layer), []).append(own - other)
    return [
        {"augmentation": name, "layer": layer, **bootstrap_interval(torch.cat(gap))._asdict()}
        for (name, layer), gap in gaps.items()
    ]


def read_differences(
    encoder: Encoder, train: Tensor, test: Tensor, seed: int = 0
) -> dict[str, Interval]:
    """R² of a ridge regression from [h_a ; h_b] to how two views differ, on test images.

    `colour` and `crop`: the differences that AugSelf predicts (`augself.differences`), the mean
    over their four entries; 0 is what their mean has. Each with its 95 % interval over images. The
    views are those of `cassle`; the penalty is chosen on the training images.

    Args:
        encoder: frozen; train, test: uint8 images (N, 3, H, W).
    """
    from sklearn.linear_model import RidgeCV

    sets, views = {}, recipe("cassle", *encoder[1:])
    for split, images in (("train", train), ("test", test)):
        pairs, a, b = _draw_pairs(encoder.module, images, views, (seed, split == "test"))
        sets[split] = pairs.double(), differences(a, b, views)
    mean, std = sets["train"][0].mean(0), sets["train"][0].std(0).clamp_min(1e-6)
    x, x_test = ((h - mean) / std for h, _ in sets.values())
    scores = {}
    for name, key in (("colour", "color"), ("crop", "crop")):
        y, y_test = (targets[key].double() for _, targets in sets.values())
        ridge = RidgeCV(alphas=[10.0**k for k in range(-2, 6)]).fit(x.numpy(), y.numpy())
        scores[name] = explained(torch.as_tensor(ridge.predict(x_test.numpy())), y_test)
    return scores


def predict_differences(run: Run, images: Tensor, seed: int = 0) -> dict[str, Interval]:
    """R² of AugSelf's heads on images (N, 3, H, W), uint8, by head: 0 is what the mean has."""
    method = load_method(run)
    if not getattr(method.options, "augself", None):
        raise ConfigError(f"run={run.id!r} has no heads of AugSelf: give one that trained them.")
    with torch.no_grad(), evaluating(method):
        embed = method.network.get_submodule("backbone")
        pairs, a, b = _draw_pairs(embed, images, method.recipe, (seed,))
        outputs = method.network(pairs=pairs)
    targets = differences(a, b, method.recipe)
    return {
        name: explained(output.tanh(), targets[name])
        for name, output in outputs.items()
        if name != "flip"  # a class, not a number
    }


@torch.no_grad()
def shuffle_condition(run: Run, images: Tensor, seed: int = 0) -> dict[str, Interval]:
    """InfoNCE in nats of a conditioned run on images (N, 3, H, W): with the right ω, with ω of
    another image, and their difference by image, which is what the projector makes of ω.

    `right`, `shuffled`, `difference`, each with its 95 % interval over images. Views are the run's
    own; negatives are the other images of batches of 250; τ is the run's, or .2 where it has none.
    """
    method = load_method(run)
    if not getattr(method.options, "condition", None):
        raise ConfigError(f"run={run.id!r} is not conditioned: give one with a condition.")
    tau = getattr(method.options, "temperature", 0.2)
    generator = keyed_generator(seed)
    losses: dict[str, list[Tensor]] = {"right": [], "shuffled": []}
    with evaluating(method):
        for part in images.split(BATCH):
            views = [method.recipe(part, generator) for _ in range(2)]
            others = [View(v.images, {k: p.roll(1, 0) for k, p in v.params.items()}) for v in views]
            for name, pair in (("right", views), ("shuffled", others)):
                z1, z2 = (F.normalize(method.embed(view).z, dim=1) for view in pair)
                logits = similarity(z1, z2, tau)
                losses[name].append(
                    F.cross_entropy(logits, torch.arange(len(part)), reduction="none")
                )
    right, shuffled = (torch.cat(values) for values in losses.values())
    parts = {"right": right, "shuffled": shuffled, "difference": shuffled - right}
    return {name: bootstrap_interval(values) for name, values in parts.items()}


def explained(predictions: Tensor, targets: Tensor) -> Interval:
    """R² of predictions (N, K), the mean over K targets, with its 95 % interval over rows."""
    errors = (predictions - targets).square() / targets.var(0, unbiased=False)
    return bootstrap_interval(1 - errors.mean(1))


def _draw_pairs(
    embed: Any, images: Tensor, views: Recipe, key: tuple[int, ...]
) -> tuple[Tensor, Params, Params]:
    """[h_a ; h_b] (N, 2C) of two views of each image, and the parameters of both."""
    features, params = [], []
    for number in (0, 1):
        generator = keyed_generator(*key, number)
        parts = [views(part, generator) for part in images.split(BATCH)]
        with torch.no_grad():
            features.append(torch.cat([embed(view.images) for view in parts]))
        params.append({k: torch.cat([view.params[k] for view in parts]) for k in parts[0].params})
    return torch.cat(features, 1), params[0], params[1]


def _layers(method: Method, view: View) -> dict[str, Tensor]:
    """Outputs (B, ·) of the layers of a method's network, for the view's images."""
    with _recording(method.network.get_submodule("backbone")) as outputs:
        embedding = method.embed(view)
    layers = {name: output.flatten(1) for name, output in outputs.items()}
    layers["features"] = embedding.h
    return layers if embedding.z is None else layers | {"projector": embedding.z}


@contextmanager
def _recording(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, a pass of a ResNet leaves the outputs of its stem and stages; of another, none."""
    outputs: dict[str, Tensor] = {}
    stages = {f"stage {k}": getattr(backbone, f"layer{k}", [None])[-1] for k in (1, 2, 3, 4)}
    parts = {"stem": getattr(backbone, "maxpool", None)} | stages

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items() if part]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
