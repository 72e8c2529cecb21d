"""Published checkpoints of IDAA and its baselines as modules (docs/spec/idaa.md §1, §4).

They are told apart by the names of their tensors. Nothing that a file holds is ever executed
(`weights_only=True`), and a tensor too many or too few is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idaa_lib.configs import ConfigError
from idaa_lib.evaluate.encoders import Encoder
from idaa_lib.nets import build_backbone
from idaa_lib.nets.heads import Embedder, mlp, simclr_projector, simsiam_projector
from idaa_lib.nets.resnet import SHAPES, ResNet
from idaa_lib.nets.vae import VAE

Channels = tuple[float, ...]
_Units = tuple[int, Channels, Channels]  # size, mean, std
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Official:
    """A published checkpoint as modules: frozen, on the CPU, in eval mode.

    kind: vae, simclr, simsiam, or plain (UEL's files are alike: one network, another loss).
    module: the VAE, or the backbone: images (B, 3, size, size) → h (B, D).
    projector: h → z before its L2 norm; predictor: SimSiam's, z → p; None where there is none.
    size, mean, std: of the normalised images that it expects.
    epoch, acc (kNN top-1 on test images, percent): as the file or its name says; else None.
    """

    kind: str
    module: Any
    projector: nn.Module | None
    predictor: nn.Module | None
    size: int
    mean: Channels
    std: Channels
    epoch: int | None
    acc: float | None

    @property
    def units(self) -> _Units:
        return self.size, self.mean, self.std

    def encoder(self, layer: str = "backbone") -> Encoder:
        """As `load_encoder` gives it: `backbone` for h, `projector` for the L2-normalised z.

        Raises:
            ConfigError: it is a VAE, or there is no such layer.
        """
        if self.projector is None:
            raise ConfigError(f"A checkpoint of kind {self.kind!r} holds no encoder.")
        if layer not in ("backbone", "projector"):
            raise ConfigError(f"layer must be backbone or projector, and is {layer!r}.")
        module = Embedder(self.module, self.projector).eval() if layer == "projector" else None
        return Encoder(module or self.module, *self.units)


def load_official(
    path: str | Path,
    *,
    size: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Official:
    """Read a checkpoint of IDAA (VAE, SimCLR), Plain or UEL, or SimSiam, of CIFAR or ImageNet.

    A stem whose BatchNorm output the published code discards (spec §8.7) comes back as the same
    function: with a BatchNorm there that changes nothing in eval mode.

    Args:
        size, mean, std: what no file says, where it is not as published. CIFAR's statistics for a
            CIFAR stem and for a VAE of 32 or 84 px, else ImageNet's (at 64 px an inference).
            32 px for a CIFAR stem, 224 for the ImageNet SimSiam, else 84 as mini-ImageNet.
    Raises:
        ConfigError: the file is missing or damaged, would run code, or is none of these; tensors
            are missing, left over or of another shape, and which.
    """
    path = Path(path).expanduser()
    state, epoch, acc = _read(path)
    try:
        mark = _mark(state)
        parts, names, published = _networks(mark, state)
        _fill(parts, state, names)
        _settle(mark, parts, names)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    kind, _ = _KINDS[mark]
    units = size or published[0], tuple(mean or published[1]), tuple(std or published[2])
    module: Any = parts["vae" if kind == "vae" else "backbone"]
    if kind == "vae":
        if units[0] != module.size:
            raise ConfigError(f"{path} is of a VAE for size={module.size}, not {size}.")
        _, module.mean, module.std = units
    if epoch is None and (said := re.search(r"epoch_?(\d+)", path.stem)):
        epoch = int(said[1])
    return Official(
        kind, module, parts.get("projector"), parts.get("predictor"), *units, epoch, acc
    )


def _read(path: Path) -> tuple[dict[str, Tensor], int | None, float | None]:
    """Tensors by name, without DataParallel's `module.`; epoch and accuracy where they are kept."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"There is no checkpoint {path}.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged file can raise anything
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConfigError(
                f"{path} was not loaded: it holds more than tensors, and wants {code[1]} to be run."
            ) from error
        raise ConfigError(f"{path} is cut short, damaged or no PyTorch checkpoint.") from error
    about: Mapping[str, Any] = {}
    if isinstance(held, Mapping):
        for name in ("net", "model", "state_dict"):  # Plain and UEL, SimCLR, SimSiam (spec §4)
            if isinstance(held.get(name), Mapping):
                about, held = held, held[name]
                break
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise ConfigError(f"{path} has no state dict, alone or as net, model or state_dict.")
    wrapped = all(key.startswith("module.") for key in held)
    state = {key.removeprefix("module.") if wrapped else key: v for key, v in held.items()}
    epoch, acc = about.get("epoch"), about.get("acc")
    return (
        state,
        epoch if isinstance(epoch, int) else None,
        float(acc) if isinstance(acc, int | float | Tensor) else None,
    )


# Parts of our names → of a file's; first by what only files of this kind have a name begin with.
_Names = dict[str, str]
_SIMSIAM_IMAGENET = "encoder.fc."
_KINDS: dict[str, tuple[str, _Names]] = {
    "fc11.": ("vae", {"vae.": ""}),
    _SIMSIAM_IMAGENET: ("simsiam", {"backbone.": "encoder.", "projector.": "encoder.fc."}),
    "projector.layer": ("simsiam", {
        "projector.0.": "projector.layer1.0.", "projector.1.": "projector.layer1.1.",
        "projector.3.": "projector.layer3.0.", "projector.4.": "projector.layer3.1.",
        "predictor.0.": "predictor.layer1.0.", "predictor.1.": "predictor.layer1.1.",
        "predictor.3.": "predictor.layer2.",
    }),
    "projector.": ("simclr", {"backbone.": "encoder."}),
    "net.": ("plain", {"backbone.": "net.", "projector.": "net.fc."}),
    "linear.": ("plain", {"backbone.": "", "projector.": "linear."}),
}  # fmt: skip
_SHORTCUTS: dict[str, _Names] = {
    ".ds_conv1.": {"shortcut.0.": "ds_conv1.", "shortcut_bn": "ds_bn1"},
    ".downsample.": {"shortcut.0.": "downsample.0.", "shortcut_bn.": "downsample.1."},
}
# What the published networks have beside a tensor, whether they ever run it or not.
_BESIDE = {".ds_bn1.": ".ds_bn1_adv.", "projector.layer1.": "projector.layer2."}


def _mark(state: Mapping[str, Tensor]) -> str:
    for mark in _KINDS:
        if any(key.startswith(mark) for key in state):
            return mark
    some = ", ".join(sorted(state)[:3]) or "no tensor at all"
    raise ConfigError(
        f"it is no VAE, SimCLR, Plain, UEL or SimSiam of the published projects (it has {some})."
    )


def _shape(state: Mapping[str, Tensor], key: str) -> torch.Size:
    if key not in state:
        raise ConfigError(f"it lacks {key}.")
    return state[key].shape


def _networks(
    mark: str, state: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], _Names, _Units]:
    """Our parts, without storage, that the tensors fit; the file's names; the published units."""
    _, names = _KINDS[mark]
    with torch.device("meta"):  # which draws none of the caller's random numbers either
        if mark == "fc11.":
            vae = _vae(state)
            return {"vae": vae}, names, (vae.size, *(_CIFAR if vae.size in (32, 84) else _IMAGENET))
        backbone, shortcuts = _backbone(state, names.get("backbone.", "backbone."))
        parts = {"backbone": backbone, **_heads(mark, state, backbone.feature_dim)}
    if backbone.stem == "cifar":
        return parts, names | shortcuts, (32, *_CIFAR)
    size = 224 if mark == _SIMSIAM_IMAGENET else 84
    return parts, names | shortcuts, (size, *_IMAGENET)


def _vae(state: Mapping[str, Tensor]) -> VAE:
    """The variant by its first residual block, after one convolution of 3 modules a halving."""
    residuals = [int(m[1]) for key in state if (m := re.match(r"encoder\.(\d+)\.convs\.", key))]
    first = min(residuals, default=6)
    d = _shape(state, f"encoder.{first}.convs.1.weight")[0]
    dim, flat = _shape(state, "fc11.weight")
    side = math.isqrt(flat // d)
    sizes = {(2, 8): 32, (3, 8): 64, (3, 10): 84, (5, 7): 224}
    if (first // 3, side) not in sizes:
        raise ConfigError(
            f"no published VAE halves its images {first // 3} times, to {side} × {side}."
        )
    try:
        return VAE(dim, sizes[first // 3, side], d // 2)
    except ValueError as error:
        raise ConfigError(f"its tensors fit no VAE: {error}") from None


def _backbone(state: Mapping[str, Tensor], prefix: str) -> tuple[ResNet, _Names]:
    """The ResNet that the tensors under `prefix` are of, and what they call its shortcuts."""
    depths = [0, 0, 0, 0]
    for key in state:
        if found := re.match(rf"{re.escape(prefix)}layer([1-4])\.(\d+)\.", key):
            stage = int(found[1]) - 1
            depths[stage] = max(depths[stage], int(found[2]) + 1)
    shape = tuple(depths), f"{prefix}layer1.0.conv3.weight" in state
    name = next((name for name, known in SHAPES.items() if known == shape), None)
    if name is None:
        raise ConfigError(f"its stages of {depths} blocks make none of {', '.join(SHAPES)}.")
    width, _, kernel, _ = _shape(state, f"{prefix}conv1.weight")
    shortcuts = next((s for s in _SHORTCUTS if any(s in key for key in state)), None)
    stem = "cifar" if shortcuts is None else "imagenet" if kernel == 7 else "mini"
    backbone = build_backbone(
        name, width=width, stem=stem, adversarial_norms=f"{prefix}bn1_adv.weight" in state
    )
    return backbone, {} if shortcuts is None else _SHORTCUTS[shortcuts]


def _heads(mark: str, state: Mapping[str, Tensor], features: int) -> dict[str, nn.Module]:
    """Projector and predictor (spec §4)."""
    outputs = lambda key: _shape(state, f"{key}.weight")[0]  # noqa: E731
    if mark == "projector.":
        return {"projector": simclr_projector(features, outputs("projector.2"))}
    if mark in ("net.", "linear."):
        head = "net.fc" if mark == "net." else "linear"
        return {"projector": nn.Linear(features, outputs(head))}
    if mark == _SIMSIAM_IMAGENET:
        dim, hidden, layers = outputs("encoder.fc.6"), outputs("predictor.0"), 3
    else:
        dim, hidden, layers = outputs("projector.layer3.0"), outputs("predictor.layer1.0"), 2
    predictor = mlp(dim, hidden, dim)
    if mark == _SIMSIAM_IMAGENET:
        predictor[0].register_parameter("bias", None)
    return {"projector": simsiam_projector(features, dim, layers), "predictor": predictor}


def _fill(parts: dict[str, nn.Module], state: Mapping[str, Tensor], names: _Names) -> None:
    """Give the networks `parts`, made without storage, the tensors of a file; strict."""
    whole = nn.ModuleDict(parts)
    ours = whole.state_dict()
    theirs: dict[str, str | None] = {}
    for key in ours:
        called = key
        for part, other in names.items():
            called = called.replace(part, other)
        theirs[called] = key
    for key in list(theirs):
        for part, other in _BESIDE.items():
            if part in key:
                theirs.setdefault(key.replace(part, other), None)
    wrong = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(ours[called].shape)}"
        for key, called in theirs.items()
        if called is not None and key in state and state[key].shape != ours[called].shape
    ]
    complaints = [
        f"{what} {_listed(keys)}"
        for what, keys in (
            ("lacks", theirs.keys() - state.keys()),
            ("has, beside what belongs there,", state.keys() - theirs.keys()),
            ("has other shapes:", wrong),
        )
        if keys
    ]
    if complaints:
        raise ConfigError(f"it {'; it '.join(complaints)}.")
    whole.load_state_dict(
        {called: state[key] for key, called in theirs.items() if called is not None}, assign=True
    )
    whole.float().eval().requires_grad_(False)


def _listed(keys: Iterable[str], most: int = 20) -> str:
    some = sorted(keys)
    rest = f" and {len(some) - most} more" if len(some) > most else ""
    return ", ".join(some[:most]) + rest


@torch.no_grad()
def _settle(mark: str, parts: dict[str, Any], names: _Names) -> None:
    """Where the published code differs from ours: our parts, the same function in eval mode."""
    if mark == _SIMSIAM_IMAGENET:  # no bias before a BatchNorm, where it changes nothing
        first = parts["predictor"][0]
        first.bias = nn.Parameter(torch.zeros(first.out_features), requires_grad=False)
    elif "ds_conv1." in names.values():  # ReLU sees conv1 itself, past the stem's norm (spec §8.7)
        for name, norm in parts["backbone"].named_children():
            if name in ("bn1", "bn1_adv"):
                norm.reset_parameters()
                norm.running_var.fill_(1 - norm.eps)
