"""A run's networks back as modules, and features of images from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from idaa_lib import runs
from idaa_lib.configs import ConfigError
from idaa_lib.data.cached import ImageSet
from idaa_lib.data.sources import LABELLED
from idaa_lib.methods import About, Method, build_method
from idaa_lib.nets import build_backbone, evaluating, initial_weights
from idaa_lib.nets.processes import count_processes, share
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run, RunError, checkpoints
from idaa_lib.runs.machine import drop_unlabelled, open_images
from idaa_lib.views import Recipe, recipe

M = TypeVar("M", bound=nn.Module)


class Encoder(NamedTuple):
    """An encoder with what it expects: normalised images (B, 3, size, size)."""

    module: nn.Module
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to(self, device: torch.device) -> Encoder:
        """Itself, its module moved there, channels last."""
        self.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self


def load_encoder(
    run: Run | str | None = None, layer: str = "backbone", epoch: int | None = None
) -> Encoder:
    """The frozen encoder of a finished SSL or semi-supervised run, on the CPU, in eval mode.

    A backbone comes back from its configuration and weights alone, without the adversarial norms,
    which serve training; other layers from the method.

    Args:
        run: a run, its id or path; None takes the SSL run that `EvalConfig` takes.
        layer: `backbone` gives features h (B, feature_dim); `projector` the L2-normalised z.
        epoch: of a snapshot that the run kept (`keep_every`); None takes the final weights.
    Raises:
        RunError: there is no such run or snapshot, it is not finished, or its weights do not fit.
    """
    run = runs.encoder(run)
    tensors = _tensors(run, epoch)
    # Of FixMatch the averaged weights are evaluated.
    place = "ema.backbone." if run.stage == "semi" else "network.backbone."
    if layer == "backbone" and checkpoints.under(f"method.{place}", tensors):
        module = _untrained_backbone(run)
        tensors = {name: value for name, value in tensors.items() if "_adv." not in name}
        _fill(module, f"method.{place}", tensors, run)
    else:
        module = _trained_method(run, tensors).encoder(layer)
    return Encoder(module.eval().requires_grad_(False), *_units(run))


def load_method(run: Run, epoch: int | None = None) -> Method:
    """The trained method of a run, with all its networks, on the CPU, in eval mode."""
    return _trained_method(run, _tensors(run, epoch)).eval()


def random_encoder(run: Run, layer: str = "backbone") -> Encoder:
    """The encoder of `run` with the weights it had before training: a reference row.

    Of a run that continued another, or was imported: an untrained one of the same shape.
    """
    methods = run.config.list_kinds("method")
    alone = layer == "backbone" and run.config.method not in methods
    module = _untrained_backbone(run) if alone else _method(run).encoder(layer)
    return Encoder(module.eval().requires_grad_(False), *_units(run))


def load_vae(run: Run | str | None = None, **values: object) -> VAE:
    """The VAE of a finished run, frozen, on the CPU, in eval mode.

    Args:
        run: a run, its id or path; None takes one whose configuration has `values`.
    Raises:
        RunError: there is no such run, it is not finished, or its weights do not fit.
    """
    run = runs.get("vae", run, **values)
    config, (size, mean, std) = run.config, _units(run)
    with initial_weights(config.seed):
        vae = VAE(config.dim, size, config.width, mean, std)
    return _fill(vae, "method.network.", _tensors(run), run).eval().requires_grad_(False)


@torch.no_grad()
def features(
    module: nn.Module | Callable[[Tensor], Tensor],
    images: Any,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    device: torch.device | str = "cpu",
    output_device: torch.device | str = "cpu",
    batch_size: int | None = None,
    bf16: bool = False,
    transform: Recipe | None = None,
    generator: torch.Generator | None = None,
    mixing: tuple[Tensor, Tensor] | None = None,
    originals: bool = False,
    pulse: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """Features (N, D) float32, on `output_device`, of uint8 images (N, 3, H, W).

    The module is left as it was: eval mode inside, its own modes after, no gradients. Of several
    processes each encodes a part, and all get the whole.

    Args:
        images: the tensor, or what has a length and gives the images of an index.
        batch_size: None for 512 images of 32 pixels, fewer larger ones.
        transform, generator: random views, and what draws them; None is the test transform.
        mixing: λ and partner (N,), on the CPU: of image i's view λ_i, and of its partner's 1 − λ_i.
        originals: crops of streamed photographs are cut of them, as in training, not of squares.
        bf16: multiply in bf16, about twice as fast where a device does so natively.
        pulse: called before each batch with how many images are done; what it raises goes through.
    """
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
    transform = transform or recipe("none", size, mean, std)
    batch_size = batch_size or max(64, 2**19 // size**2)
    n = len(images)
    counts = [min(batch_size, n - start) for start in range(0, max(1, n), batch_size)]
    numbers = torch.cat([transform.numbers(count, generator) for count in counts])
    crops = originals and transform.crop_scale is not None
    index = torch.arange(n)
    sizes: Any = images.sizes if crops else None

    def view(rows: Any) -> Tensor:
        if crops:
            cut = transform.cut(numbers[rows], sizes[rows])
            pixels = images.gather(index[rows], cut[:, 2:], transform.size).to(device)
            return transform.view(pixels, numbers[rows], cut.to(device)).images
        return transform.view(images[rows].to(device), numbers[rows]).images

    def encode(rows: Any) -> Tensor:
        x = view(rows)
        if mixing is not None:
            part, partner = (of[rows] for of in mixing)
            x = torch.lerp(view(partner), x, part.to(x)[:, None, None, None])
        with autocast:
            return module(x).float()

    step = batch_size * count_processes()
    results = []
    with evaluating(module) if isinstance(module, nn.Module) else torch.no_grad():
        for start in range(0, max(1, n), step):
            pulse(start)
            rows = range(start, min(start + step, n))
            results.append(share(rows, encode).to(output_device))
    return torch.cat(results)


def encode_splits(
    encoder: Encoder, splits: Mapping[str, ImageSet], **how: Any
) -> dict[str, Tensor]:
    """Features of each split, as `features` makes them with `how`."""
    return {
        name: features(encoder.module, split.images, *encoder[1:], **how)
        for name, split in splits.items()
    }


def pixels(images: Tensor) -> Tensor:
    """The other reference row: the pixels themselves, centred, (N, 3·H·W) in [−.5, .5]."""
    return images[:].flatten(1).float() / 255 - 0.5


def open_splits(dataset: str, size: int, limit: int | None, **reading: Any) -> dict[str, ImageSet]:
    """`train`, `val` and `test` of a data set to judge encoders on: the images that have a label.

    Raises:
        ConfigError: the data set cannot be read, or one of them has no labels.
    """
    if better := LABELLED.get(dataset):
        raise ConfigError(
            f"dataset={dataset!r} is to train on, since most of its images have no label: evaluate "
            f"on {better!r}."
        )
    splits = {s: open_images(dataset, s, size, limit, **reading) for s in ("train", "val", "test")}
    splits = {name: drop_unlabelled(split) for name, split in splits.items()}
    if bare := [name for name, split in splits.items() if not len(split)]:
        raise ConfigError(
            f"dataset={dataset!r} has no labels to evaluate against in {' and '.join(bare)}."
        )
    return splits


def judged_on(dataset: str) -> str:
    """The data set that an encoder trained on `dataset` is judged on where none is named: the same,
    or the one that has its labelled images alone."""
    return LABELLED.get(dataset, dataset)


def _untrained_backbone(run: Run) -> nn.Module:
    """The backbone of `run` alone, without adversarial norms."""
    config = run.config
    shape = {"width": config.width, "stem": config.stem, "adversarial_norms": False}
    with initial_weights(config.seed):
        return build_backbone(config.backbone, **shape)


def _method(run: Run) -> Method:
    """The method of `run` with the weights it had before training."""
    transform = recipe(run.config.augmentation, *_units(run))
    return build_method(run.config, About(transform, classes=run.model["classes"]))


def _trained_method(run: Run, tensors: dict[str, Tensor]) -> Method:
    """The method of `run` with a checkpoint's tensors. Buffers whose length is the number of
    training images (IP-IRM's partitions) are used in training alone, and are not loaded."""
    method = _method(run)
    fresh = {f"method.{name}": buffer for name, buffer in method.named_buffers()}
    lengths = {k: b for k, b in fresh.items() if k in tensors and b.shape != tensors[k].shape}
    return _fill(method, "method.", tensors | lengths, run)


def _fill(module: M, prefix: str, tensors: dict[str, Tensor], run: Run) -> M:
    """The module with the weights of `run` whose names begin with `prefix`."""
    try:
        module.load_state_dict(checkpoints.under(prefix, tensors))
    except RuntimeError as error:
        raise RunError(
            f"The weights of {run.id} do not fit its networks as they are now: was the code of "
            f"backbone or method changed since?"
        ) from error
    return module


def _tensors(run: Run, epoch: int | None = None) -> dict[str, Tensor]:
    if epoch is not None:
        return checkpoints.snapshot(run, epoch)
    if (checkpoint := checkpoints.load(run)) is None:
        raise RunError(f"Run {run.id} has no checkpoint under {run.path / 'checkpoints'}.")
    return checkpoint[0]


def _units(run: Run) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    model = run.model
    return model["size"], tuple(model["mean"]), tuple(model["std"])
