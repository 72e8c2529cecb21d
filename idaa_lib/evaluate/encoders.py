"""A run's networks back as modules, and features of images from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from idaa_lib import runs
from idaa_lib.methods import About, Method, build_method
from idaa_lib.nets import evaluating, initial_weights
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import Run, RunError, checkpoints
from idaa_lib.views import Recipe, recipe


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

    Args:
        run: a run, its id or path; None takes the newest SSL run.
        layer: `backbone` gives features h (B, feature_dim); `projector` the L2-normalised z.
        epoch: of a snapshot that the run kept (`keep_every`); None takes the final weights.
    Raises:
        RunError: there is no such run or snapshot, or it is not finished.
    """
    run = runs.encoder(run)
    return Encoder(_layer(_method(run, _tensors(run, "method.", epoch)), layer), *_units(run))


def random_encoder(run: Run, layer: str = "backbone") -> Encoder:
    """The encoder of `run` with the weights it had before training: a reference row.

    Of a run that continued another, or was imported: an untrained one of the same shape.
    """
    return Encoder(_layer(_method(run), layer), *_units(run))


def load_vae(run: Run | str | None = None, **values: object) -> VAE:
    """The VAE of a finished run, frozen, on the CPU, in eval mode.

    Args:
        run: a run, its id or path; None takes the newest whose configuration has `values`.
    Raises:
        RunError: there is no such run, or it is not finished.
    """
    run = runs.get("vae", run, **values)
    config = run.config
    _, mean, std = _units(run)
    with initial_weights(config.seed):
        vae = VAE(config.dim, config.size, config.width, mean, std)
    vae.load_state_dict(_tensors(run, "method.network."))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def features(
    module: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    bf16: bool = False,
    transform: Recipe | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Features (N, D) float32, on the CPU, of uint8 images (N, 3, H, W).

    The module is left as it was: eval mode inside, its own modes after, no gradients.

    Args:
        batch_size: None for 512 images of 32 pixels, fewer larger ones.
        transform, generator: random views, and what draws them; None is the test transform.
        bf16: multiply in bf16, about twice as fast where a device does so natively.
    """
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
    transform = transform or recipe("none", size, mean, std)
    batch_size = batch_size or max(64, 2**19 // size**2)
    rows = []
    with evaluating(module) if isinstance(module, nn.Module) else torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].to(device)
            x = transform(batch, generator).images
            with autocast:
                z = module(x)
            rows.append(z.float().cpu())
    return torch.cat(rows)


def pixels(images: Tensor) -> Tensor:
    """The other reference row: the pixels themselves, centred, (N, 3·H·W) in [−.5, .5]."""
    return images.flatten(1).float() / 255 - 0.5


def _layer(method: Method, layer: str) -> nn.Module:
    return method.encoder(layer).eval().requires_grad_(False)


def _method(run: Run, tensors: dict[str, Tensor] | None = None) -> Method:
    """The method of `run` with these weights, or with those it had before training."""
    config = run.config
    about = About(recipe(config.augmentation, *_units(run)), classes=run.model["classes"])
    method = build_method(config, about)
    if tensors is not None:
        try:
            method.load_state_dict(tensors)
        except RuntimeError as error:
            raise RunError(
                f"The weights of {run.id} do not fit method {config.method!r} with backbone "
                f"{config.backbone!r} as they are now: was their code changed since?"
            ) from error
    return method


def _units(run: Run) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    model = run.model
    return model["size"], tuple(model["mean"]), tuple(model["std"])


def _tensors(run: Run, prefix: str, epoch: int | None = None) -> dict[str, Tensor]:
    if epoch is not None:
        found = checkpoints.snapshot(run, epoch)
    elif (loaded := checkpoints.load(run)) is not None:
        found, _ = loaded
    else:
        raise RunError(f"Run {run.id} has no checkpoint under {run.path / 'checkpoints'}.")
    return checkpoints.under(prefix, found)
